"""Deduplication end to end, on a real Kafka: events are sent two or three times, workers and servers are killed and stopped.

Each test holds one store or inbox to laws of ``tests/chaos/dedup_checks.py``; each law is also shown mutants that break it.
With ``KAFKA_GUARANTEES_CHAOS_SECONDS`` every storm lasts so long; ``--log-level=INFO`` shows its figures.
"""

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer

from kafka_guarantees import AtLeastOnce
from kafka_guarantees.dedup import Item, MemoryDedupStore
from kafka_guarantees.dedup.ids import key_of

from .chaos import dedup_checks as checks
from .chaos.dedup_harness import CONFIG, STRATEGIES, churn, dedup_crew, kill, storm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kafka_guarantees.testing.local_kafka import RunningKafka
    from kafka_guarantees.testing.servers import LocalPostgres, LocalRedis

    from .chaos.dedup_harness import Server

    Where = tuple[str | None, Server | None]

SECONDS = float(os.environ.get("KAFKA_GUARANTEES_CHAOS_SECONDS", "15"))
pytestmark = [pytest.mark.broker, pytest.mark.timeout(180 + SECONDS)]

ALONE: dict[str, Any] = {"size": 1, "pause": 0.002}
SERVERS: dict[str, tuple[str, str]] = {
    "RedisDedupStore": ("redis_server", "url"),
    "PostgresDedupStore": ("postgres_server", "dsn"),
    "PostgresInbox": ("postgres_server", "dsn"),
}


@pytest.fixture
def seed() -> int:
    """Of the choices of a test; every failure message has it."""
    return int(os.environ.get("KAFKA_GUARANTEES_CHAOS_SEED", random.randrange(1_000_000)))


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Callable[[str], Where]:
    """Where a store or an inbox is, and its server; both None: in a file."""

    def find(kind: str) -> Where:
        if kind not in SERVERS:
            return None, None
        fixture, attribute = SERVERS[kind]
        server: LocalRedis | LocalPostgres = request.getfixturevalue(fixture)
        return str(getattr(server, attribute)), server

    return find


@pytest.mark.parametrize("kind", ["SqliteDedupStore", "RedisDedupStore", "PostgresDedupStore"])
def test_a_store_under_disturbances(
    kafka: RunningKafka, tmp_path: Path, seed: int, place: Callable[[str], Where], kind: str
) -> None:
    """D03, D04, D09, D16: nothing is lost; an effect is repeated only where its worker was hurt before it was marked."""
    chance = random.Random(seed)
    where, server = place(kind)
    with dedup_crew(kafka, tmp_path, kind, chance, where=where) as team:
        storm(team, chance, server, SECONDS)
    assert not checks.complaints("store", team.result()), f"seed {seed}"
    assert not team.crashes(), f"seed {seed}"


@pytest.mark.parametrize("kind", ["SqliteInbox", "PostgresInbox"])
def test_an_inbox_under_disturbances(
    kafka: RunningKafka, tmp_path: Path, seed: int, place: Callable[[str], Where], kind: str
) -> None:
    """D02, D03, D13, D14: exactly one effect for each event, whatever happens to workers and server."""
    chance = random.Random(seed)
    where, server = place(kind)
    with dedup_crew(kafka, tmp_path, kind, chance, where=where) as team:
        storm(team, chance, server, SECONDS)
        while not team.tried_again():  # each fault of a short storm may have come between two transactions
            kill(team, chance, server)
            team.until_at_work(200)
    outcome = team.result()
    assert not checks.complaints("inbox", outcome), f"seed {seed}"
    assert kind == "SqliteInbox" or not team.crashes(), f"seed {seed}"  # its file may be locked while another life begins


@pytest.mark.parametrize("kind", ["MemoryDedupStore", "SqliteDedupStore", "RedisDedupStore", "PostgresDedupStore"])
def test_a_calm_store_repeats_nothing(
    kafka: RunningKafka, tmp_path: Path, seed: int, place: Callable[[str], Where], kind: str
) -> None:
    """D06, L07: one effect for each event; workers that join, and that end in order, repeat nothing either."""
    chance = random.Random(seed)
    shape = ALONE if kind == "MemoryDedupStore" else {}
    with dedup_crew(kafka, tmp_path, kind, chance, where=place(kind)[0], **shape) as team:
        if kind != "MemoryDedupStore":
            churn(team, chance, None)
        until(lambda: len(team.feed.sent) >= 1000)
    outcome = team.result()
    assert not checks.complaints("calm", outcome), f"seed {seed}"
    assert not any(line.what == "taken" for line in outcome.history), f"seed {seed}"


def test_memory_forgets_with_its_process(kafka: RunningKafka, tmp_path: Path, seed: int) -> None:
    """D11: after a SIGKILL events that come again are handled again, and none is lost: a repeat is seen where there is one."""
    chance = random.Random(seed)
    with dedup_crew(kafka, tmp_path, "MemoryDedupStore", chance, **ALONE) as team:
        until(lambda: len(team.feed.sent) >= 500)
        team.until_at_work()
        team.kill(0)
        team.start(0)
        team.until_at_work()
    outcome = team.result()
    assert not checks.lost(outcome), f"seed {seed}"
    assert outcome.repeats > 20, f"seed {seed}"


def test_the_checks_catch_stores_and_inboxes_that_lie(kafka: RunningKafka, tmp_path: Path, seed: int) -> None:
    """H01: marks before the effect, claims taken for marks, no marks, effects beside the inbox: each shows under kills."""
    chance = random.Random(seed)
    mutants = {"MarksFirst": "lost", "SkipsClaimed": "lost", "NeverMarks": "unexplained", "EffectsApart": "repeated"}
    with ExitStack() as stack:
        teams = [stack.enter_context(dedup_crew(kafka, tmp_path, kind, chance, size=2)) for kind in mutants]
        for _ in range(4):
            for team in teams:
                team.until_at_work()
                kill(team, chance, None)
    for team, complaint in zip(teams, mutants.values(), strict=True):
        found = checks.complaints("inbox" if team.inbox else "store", team.result())
        assert any(text.startswith(complaint) for text in found), f"seed {seed}, {team.group}: {found}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_partitions_that_rest_are_read_again_after_a_rebalance(
    kafka: RunningKafka, kafka_topic: Callable[..., str], strategy: str
) -> None:
    """D09: what is given away while its ids are waited for, and comes back, does not stay paused, as it does in librdkafka."""
    topic = kafka_topic(partitions=2)
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": topic, "partition.assignment.strategy": strategy, **CONFIG}
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap}) as producer:
        for number in range(2):
            producer.produce(topic, b"%d" % number, partition=number, message_id=str(number))
    handled: list[bytes | None] = []
    with MemoryDedupStore() as store, AtLeastOnce(config, dedup=store) as client:
        busy = [Item(key_of(str(number)), b"elsewhere at all") for number in range(2)]
        store.claim(topic, busy, token=b"somebody else's!", lease=600)
        run = threading.Thread(target=client.run, args=([topic], lambda message: handled.append(message.value())))
        run.start()
        try:
            until(lambda: client.dedup_counts["waited for"] >= 8)  # by now it rests for more than a second each time
            other = Consumer({**config, "enable.auto.commit": False})
            try:
                other.subscribe([topic])
                until(lambda: other.poll(0.05) is not None or bool(other.assignment()))
            finally:
                other.close()
            store.release(topic, busy, token=b"somebody else's!")
            until(lambda: sorted(map(str, handled)) == ["b'0'", "b'1'"])
        finally:
            client.stop()
            run.join(30)


def until(true: Callable[[], bool], within: float = 30.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {within} s"
        time.sleep(0.02)
