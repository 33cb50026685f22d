"""Laws of the examples: each does what it says on a real Kafka, can be run again, and is short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kafka_guarantees.testing import RunningKafka

EXAMPLES = Path(__file__).parents[1] / "examples"

PRINTS = {
    "debug_events": (
        "handled: offer page opened",
        "dropped: the event that nobody can read (not an event)",
        "handled: offer page closed",
        "done",
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
        "aborted: the code generator crashed",
        "granting: alice",
        "granting: bob",
        "granting: carol",
        "visible: CODE-FOR-ALICE",
        "visible: CODE-FOR-BOB",
        "visible: CODE-FOR-CAROL",
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
    """An example has fewer than 60 lines."""
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.broker
@pytest.mark.parametrize("name", PRINTS)
def test_an_example_prints_what_it_shows_every_time(name: str, kafka: RunningKafka) -> None:
    """An example shows the same on a broker that it has run on before."""
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
            env={**os.environ, "KAFKA_GUARANTEES_BOOTSTRAP": kafka.bootstrap},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (ran.returncode, "Warning" in ran.stderr) == (0, False), ran.stderr  # librdkafka may say that it tries again
        assert tuple(ran.stdout.splitlines()) == PRINTS[name]
