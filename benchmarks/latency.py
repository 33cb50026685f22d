"""How long a message is on its way at low traffic: sent, copied by a contestant at once, read by a reader of committed records.

A sender here writes 100 messages a second with the time in their values; the contestant does the work "echo"; a reader here
takes the time again. Both wait for nothing, so that what differs between contestants is theirs.
"""

from __future__ import annotations

import struct
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer, TopicPartition

from .runs import RunFailed, Running

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .contestants import Contestant
    from .stage import Stage

RATE = 100  # messages a second
WARM = 200  # messages that are not counted: connections are made, code is warmed up
READY = 60.0  # seconds
LATE = 10.0  # seconds that the last may take
STAMP = struct.Struct("<q")
PARTITIONS = 8
SIZE = 100


@dataclass
class Ways:
    """The ways of messages through one contestant.

    Attributes:
        rounds: milliseconds of each message.
        troubles: why there are not more.
    """

    label: str
    guarantee: str
    brokers: int
    rounds: list[list[float]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    @property
    def medians(self) -> list[float]:
        return [median(each) for each in self.rounds]

    def percentile(self, share: float) -> float | None:
        return percentile([one for each in self.rounds for one in each], share)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.label,
            "guarantee": self.guarantee,
            "brokers": self.brokers,
            "messages": sum(map(len, self.rounds)),
            "p50": self.percentile(50),
            "p99": self.percentile(99),
            "p99.9": self.percentile(99.9),
            "medians": self.medians,
            "troubles": self.troubles,
        }


def percentile(numbers: Sequence[float], share: float) -> float | None:
    """The smallest number that so many percent do not exceed; None of none."""
    if not numbers:
        return None
    ordered = sorted(numbers)
    return ordered[max(0, -int(-len(ordered) * share // 100) - 1)]


def measure(stage: Stage, contestant: Contestant, guarantee: str, extra: dict[str, Any], seconds: float) -> list[float]:
    """Milliseconds of each message, in the order in which they arrived.

    Raises:
        RunFailed: the contestant did not copy them all, each once.
    """
    count = WARM + int(RATE * seconds)
    with stage.fresh(PARTITIONS) as source, stage.fresh(PARTITIONS) as output:
        job = {
            "work": "echo",
            "bootstrap": stage.bootstrap,
            "input": source,
            "output": output,
            "messages": count,
            "size": SIZE,
            "batch": None,
            "group": f"bench-{uuid.uuid4().hex[:12]}",
            "transactional_id": f"bench-{uuid.uuid4().hex[:12]}",
            "seconds": None,
            "guarantee": guarantee,
            **extra,
        }
        with _reader(stage, output) as reader, Running(contestant.command(job)) as running:
            _wait_until_ready(running)
            time.sleep(0.5)  # it has said that it is assigned: its first fetch may be on its way
            sender = threading.Thread(target=_send, args=(stage.bootstrap, source, count))
            sender.start()
            ways = _read(reader, count, time.monotonic() + count / RATE + LATE)
            sender.join()
            if len(ways) != count:
                raise RunFailed(f"{len(ways)} of {count} messages came: {running.last_words()}")
    return ways[WARM:]


def _wait_until_ready(running: Running) -> None:
    """Read what the process says up to its word, with a limit.

    Raises:
        RunFailed: it ended, or said nothing.
    """
    limit = threading.Timer(READY, running.process.kill)
    limit.start()
    try:
        assert running.process.stdout is not None
        for line in running.process.stdout:
            if line.strip() == "ready":
                return
    finally:
        limit.cancel()
    raise RunFailed(f"it was never ready: {running.last_words()}")


def _send(bootstrap: str, topic: str, count: int) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "acks": "all", "linger.ms": 0})
    producer.list_topics(topic, 30)
    padding = bytes(SIZE - STAMP.size)
    began = time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, began + number / RATE - time.monotonic()))
        producer.produce(topic, STAMP.pack(time.time_ns()) + padding, b"%08d" % number, partition=number % PARTITIONS)
        producer.poll(0)
    producer.flush(LATE)


@contextmanager
def _reader(stage: Stage, topic: str) -> Iterator[Consumer]:
    reader = Consumer(
        {
            "bootstrap.servers": stage.bootstrap,
            "group.id": f"bench-{uuid.uuid4().hex}",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 10,
            "fetch.queue.backoff.ms": 2,
        }
    )
    try:
        found = reader.list_topics(topic, timeout=READY).topics[topic].partitions
        reader.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in found])
        yield reader
    finally:
        reader.close()


def _read(reader: Consumer, count: int, until: float) -> list[float]:
    ways: list[float] = []
    seen: set[bytes] = set()
    while len(ways) < count and time.monotonic() < until:
        message = reader.poll(0.1)
        if message is None:
            continue
        now = time.time_ns()
        if message.error() is not None:
            raise KafkaException(message.error())
        key, value = message.key(), message.value()
        assert isinstance(key, bytes)
        assert value is not None
        if key in seen:
            raise RunFailed(f"message {key.decode()} came twice")
        seen.add(key)
        ways.append((now - STAMP.unpack_from(value)[0]) / 1e6)
    return ways
