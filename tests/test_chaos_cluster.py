"""Every guarantee on three real brokers, of which one dies or freezes."""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees import AtLeastOnce, AtMostOnce, DeliveryUnknown, ExactlyOnce

from .chaos.harness import crew
from .conftest import fill

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from confluent_kafka import Message

    from kafka_guarantees.testing.local_kafka import LocalKafka

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
GUARANTEES = {"AtMostOnce": AtMostOnce, "AtLeastOnce": AtLeastOnce, "ExactlyOnce": ExactlyOnce}
SESSION = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 1000}


def test_one_broker_dies_and_one_freezes(kafka_cluster: LocalKafka, tmp_path: Path) -> None:
    """All three guarantees hold, and no worker dies of it, while one broker is killed and another stands still."""
    seed = random.randrange(1_000_000)
    chance = random.Random(seed)
    killed, frozen = chance.sample(range(3), 2)
    with ExitStack() as stack:
        teams = [
            stack.enter_context(
                crew(kafka_cluster, tmp_path, guarantee, "range", size=1, rate=150, config=SESSION, patience=120)
            )
            for guarantee in GUARANTEES
        ]
        for team in teams:
            team.until_history_grows()
        kafka_cluster.kill(killed)
        _tend(teams, chance.uniform(1, 4))
        kafka_cluster.restart(killed)
        kafka_cluster.pause(frozen)
        try:
            _tend(teams, chance.uniform(5, 7))
        finally:
            kafka_cluster.resume(frozen)
    for team in teams:
        assert not team.verdict(), f"seed {seed}, killed {killed}, frozen {frozen}"
        assert not team.crashes(), f"seed {seed}, killed {killed}, frozen {frozen}"


def _tend(teams: list[Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for team in teams:
            team.tend()
        time.sleep(0.1)


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_stop_returns_while_no_broker_answers(kafka_cluster: LocalKafka, guarantee: str, fresh: Callable[[str], str]) -> None:
    """stop() ends a run within seconds, whatever it was waiting for; close() keeps to its timeout."""
    source, group = fresh("source"), fresh("group")
    kafka_cluster.create_topic(source, 1)
    fill(kafka_cluster.bootstrap, source, [b"x"] * 2000)
    config = {"bootstrap.servers": kafka_cluster.bootstrap, "group.id": group}
    client: Any = GUARANTEES[guarantee](
        {**config, "transactional.id": group} if guarantee == "ExactlyOnce" else config,
        start="earliest",
    )
    began, ended = threading.Event(), threading.Event()

    def handler(message: Message) -> None:
        began.set()
        time.sleep(0.01)

    def run() -> None:
        try:
            client.run([source], handler)
        finally:
            ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert began.wait(30)
        for n in range(3):
            kafka_cluster.pause(n)
        client.stop()
        assert ended.wait(10), "run() still waits for brokers 10 s after stop()"
    finally:
        for n in range(3):
            kafka_cluster.resume(n)
        thread.join(60)
        client.close()


def test_close_reports_what_no_broker_took(kafka_cluster: LocalKafka, fresh: Callable[[str], str]) -> None:
    """close(timeout=3) with 1000 records that nobody acknowledges: back in 4 s, and it raises with their number."""
    sink = fresh("sink")
    kafka_cluster.create_topic(sink, 1)
    client = AtLeastOnce({"bootstrap.servers": kafka_cluster.bootstrap})
    client.produce(sink, b"first").result(30)
    for n in range(3):
        kafka_cluster.pause(n)
    try:
        for _ in range(1000):
            client.produce(sink, b"x")
        began = time.monotonic()
        with pytest.raises(DeliveryUnknown, match="999 more"):
            client.close(timeout=3)
        assert time.monotonic() - began < 4
    finally:
        for n in range(3):
            kafka_cluster.resume(n)
