"""Shared by all tests: fresh names, and reading topics back to their end."""

from __future__ import annotations

import os
import signal
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined] # not re-exported by its stubs

from kafka_guarantees._client import _Seldom, librdkafka_log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kafka_guarantees.testing.local_kafka import RunningKafka

    from .world import Scripted, World


# Files that take minutes. They come first, so that no worker is left alone with one at the end.
LONG = (
    "chaos",
    "security",
    "slow_handlers",
    "dedup_chaos",
    "exactly_once",
    "prove_mutants",
    "dedup_runs",
    "prove",
    "local_kafka",
)

MARKERS = 10.0  # seconds that the markers of a committed transaction may take, on a machine with much to do

# A shell starts what it puts into the background with SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take long come first."""
    order = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def nothing_was_logged_before() -> None:
    """What librdkafka says is left out where a test of some seconds ago had it."""
    for seldom in librdkafka_log.filters:
        if isinstance(seldom, _Seldom):
            seldom._passes._quiet_until.clear()


@pytest.fixture
def fresh() -> Callable[[str], str]:
    """``fresh("group")`` is a name that nobody has used."""
    return lambda prefix: f"{prefix}-{uuid.uuid4().hex[:12]}"


def fill(bootstrap: str, topic: str, values: Iterable[bytes | None], partitions: int = 1, *, idempotent: bool = True) -> int:
    """Write values with plain confluent-kafka, round robin over partitions, all acknowledged. Returns how many.

    ``idempotent``: a broker may have to ask the controller for producer ids first, and wait 30 s for one that stands still.
    """
    producer = Producer({"bootstrap.servers": bootstrap, "acks": "all", "enable.idempotence": idempotent, "linger.ms": 5})
    producer.list_topics(topic, 30)  # else the first record waits for librdkafka's own next look
    failures: list[object] = []
    count = 0
    for count, value in enumerate(values, 1):
        producer.produce(
            topic,
            value,
            partition=(count - 1) % partitions,
            on_delivery=lambda error, _message: failures.append(error) if error is not None else None,
        )
        producer.poll(0)
    assert producer.flush(60) == 0
    assert not failures, failures
    return count


def read_all(bootstrap: str, topic: str, *, isolation: str = "read_committed", timeout: float = 30.0) -> list[Message]:
    """Every message of a topic, from the beginning to the end of all partitions, by a consumer without a group (H02, H03)."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"reader-{uuid.uuid4().hex}",
            "isolation.level": isolation,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "fetch.queue.backoff.ms": 2,
            "fetch.wait.max.ms": 10,
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=timeout).topics[topic].partitions
        if isolation == "read_committed":
            _await_markers(bootstrap, topic, partitions)
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
        return _to_the_ends(consumer, set(partitions), timeout)
    finally:
        consumer.close()


def _await_markers(bootstrap: str, topic: str, partitions: Iterable[int]) -> None:
    """A transaction is committed before its markers are written. Not for long: a test may have left one open, and know it."""
    admin, deadline = AdminClient({"bootstrap.servers": bootstrap}), time.monotonic() + MARKERS
    with suppress(KafkaException):  # a broker may be away: the reader below waits for it
        while has_open_transaction(admin, topic, partitions) and time.monotonic() < deadline:
            time.sleep(0.02)


def has_open_transaction(admin: AdminClient, topic: str, partitions: Iterable[int] = (0,)) -> bool:
    """Whether one hides something from readers of committed records."""
    latest = {TopicPartition(topic, number): OffsetSpec.latest() for number in partitions}  # type: ignore[no-untyped-call]

    def ends(isolation: IsolationLevel) -> list[int]:
        return [future.result(30).offset for future in admin.list_offsets(latest, isolation_level=isolation).values()]

    return ends(IsolationLevel.READ_UNCOMMITTED) != ends(IsolationLevel.READ_COMMITTED)


def _to_the_ends(consumer: Consumer, open_partitions: set[int], timeout: float) -> list[Message]:
    found: list[Message] = []
    while open_partitions:
        first = consumer.poll(timeout)
        assert first is not None, f"no end of partitions {open_partitions} within {timeout} s: an open transaction?"
        messages = [first, *consumer.consume(1000, 0)]
        for message in messages:
            error = message.error()
            if error is None:
                found.append(message)
            elif error.name() == "_PARTITION_EOF":
                open_partitions.discard(message.partition() or 0)
            else:
                raise KafkaException(error)
    return found


def values(messages: Sequence[Message]) -> list[bytes]:
    """The payloads, sorted, so that lists compare as multisets."""
    return sorted(message.value() or b"" for message in messages)


def in_child(does: Callable[[], None]) -> Callable[[], int]:
    """Start it in a fork. Returns what waits for its end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            does()
            status = 0
        finally:
            os._exit(status)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def committed(bootstrap: str, group: str, topic: str, partitions: int = 1) -> list[int]:
    """The group's committed offset of every partition; -1001 where there is none."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group, "isolation.level": "read_committed"})
    try:
        answer = consumer.committed([TopicPartition(topic, number) for number in range(partitions)], 30)
        return [partition.offset for partition in answer]
    finally:
        consumer.close()


@pytest.fixture
def world(kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]) -> Callable[..., World]:
    """``world(partitions=1)``."""
    from .world import World  # noqa: PLC0415 - which uses this file

    def make(partitions: int = 1) -> World:
        return World(kafka.bootstrap, kafka_topic(partitions), kafka_topic(partitions), partitions, fresh("w"))

    return make


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    """The class that takes the place of Producer: fill its ``before`` and ``after``, read its ``calls``."""
    from .world import Scripted  # noqa: PLC0415 - as above

    script = type("Script", (Scripted,), {"calls": [], "before": {}, "after": {}})
    monkeypatch.setattr("kafka_guarantees._transactional.Producer", script)
    return script
