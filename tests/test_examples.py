"""Laws of the examples: each does what it says on a real Kafka, can be run again, and is short."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kafka_guarantees.testing import DedupStoreConformance

if TYPE_CHECKING:
    from datetime import timedelta

    from kafka_guarantees.dedup import DedupStore
    from kafka_guarantees.testing import LocalPostgres, RunningKafka
    from kafka_guarantees.testing.conformance import Clock

EXAMPLES = Path(__file__).parents[1] / "examples"

PRINTS = {
    "debug_events": (
        "handled: offer page opened",
        "dropped: the event that nobody can read (not an event)",
        "handled: offer page closed",
        "done",
    ),
    "ledger": (
        "rolled back: the worker crashed",
        "booked: alice 10",
        "booked: bob 10",
        "booked: carol 10",
    ),
    "notify_once": (
        "relayed: alice, bob",
        "relayed: alice, bob",
        "notified alice: your offer ends today",
        "notified bob: your offer ends today",
        "left out: 2",
        "relayed: alice, bob, carol",
        "notified carol: your offer ends today",
        "left out: 2",
    ),
    "offer_notifications": (
        "acknowledged: 3 changes",
        "notified alice: ends today",
        "stopped: the mail server is away",
        "notified bob: ends today",
        "notified carol: ends today",
        "done",
    ),
    "offer_codes": (
        "granting: alice",
        "granting: bob",
        "failed: the code generator is away",
        "granting: bob",
        "granting: carol",
        "visible: CODE-FOR-ALICE",
        "visible: CODE-FOR-BOB",
        "visible: CODE-FOR-CAROL",
    ),
    "orm_ledger": (
        "booked: alice",
        "booked: bob",
    ),
    "outbox": (
        "booked for alice",
        "booked for bob",
    ),
    "own_store": (
        "mailed: a coupon for alice",
        "mailed: a coupon for bob",
        "left out: 2",
    ),
    "poisoned_offers": (
        "attempt 1: alice",
        "attempt 1: bob",
        "attempt 2: bob",
        "attempt 3: bob",
        *(f"attempt {number}: mallory" for number in (1, 2, 3, 4, 5)),
        "attempt 1: carol",
        "visible: CODE-FOR-ALICE",
        "visible: CODE-FOR-BOB",
        "visible: CODE-FOR-CAROL",
        "replayed: 1",
        "attempt 1: mallory",
        "visible: CODE-FOR-MALLORY",
    ),
    "produce_offers": (
        "committed: the winter campaign",
        "aborted: the summer campaign (bob is not a customer any more)",
        "visible: winter offer for alice",
        "visible: winter offer for bob",
    ),
}


def test_every_example_is_tested() -> None:
    """An example that is not run here does not exist."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == PRINTS.keys()


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_is_short(name: str) -> None:
    """An example has fewer than 60 lines; so has a class that it shows how to write, and these are not counted then."""
    source = (EXAMPLES / f"{name}.py").read_text()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for node in classes]
    assert max(lengths, default=0) < 60
    assert len(source.splitlines()) - sum(lengths) < 60


class TestOwnStore(DedupStoreConformance):
    """What ``own_store.py`` shows is a store: it passes the suite that others' stores must pass."""

    def make_store(self, place: Path, retention: timedelta, clock: Clock) -> DedupStore:
        store: DedupStore = runpy.run_path(str(EXAMPLES / "own_store.py"))["TableStore"](place, retention, clock)
        return store


@pytest.mark.broker
@pytest.mark.parametrize("name", PRINTS)
def test_an_example_prints_what_it_shows_every_time(name: str, kafka: RunningKafka, request: pytest.FixtureRequest) -> None:
    """An example shows the same on a broker and a database server that it has run on before."""
    variables = {"KAFKA_GUARANTEES_BOOTSTRAP": kafka.bootstrap}
    if "LEDGER_DSN" in (EXAMPLES / f"{name}.py").read_text():
        postgres: LocalPostgres = request.getfixturevalue("postgres_server")  # where it is not installed, it is skipped
        variables["LEDGER_DSN"] = postgres.dsn
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (ran.returncode, "Warning" in ran.stderr) == (0, False), ran.stderr  # librdkafka may say that it tries again
        assert tuple(ran.stdout.splitlines()) == PRINTS[name]
