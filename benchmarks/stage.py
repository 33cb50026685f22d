"""The brokers' side of a benchmark: topics that are filled, topics that are fresh, and what is committed in them."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kafka_guarantees.testing import RunningKafka

ANSWER = 30.0  # seconds
NOISE = os.urandom(1 << 20)  # values are cut out of it: nothing that compresses
STEP = 61  # bytes from one value to the next
KEYS = [b"%08d" % number for number in range(500)]
AT_ONCE = 10_000


class Stage:
    """Topics on one cluster.

    Args:
        kafka: a cluster that runs.
        brokers: of which it has so many.

    Attributes:
        warm: works that these brokers have done before.
    """

    def __init__(self, kafka: RunningKafka, brokers: int) -> None:
        self.bootstrap = kafka.bootstrap
        self.brokers = brokers
        self.warm: set[str] = set()
        self._kafka = kafka
        self._admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
        self._filled: dict[tuple[int, int, int, int], str] = {}

    def filled(self, messages: int, size: int, partitions: int, worker: int = 0) -> str:
        """A topic with exactly so many messages, spread evenly; made once, as nobody changes it."""
        what = (messages, size, partitions, worker)
        if what not in self._filled:
            name = self._new("in", partitions)
            self._fill(name, messages, size, partitions)
            self._filled[what] = name
        return self._filled[what]

    @contextmanager
    def fresh(self, partitions: int) -> Iterator[str]:
        """An empty topic, which is deleted in the end."""
        name = self._new("out", partitions)
        try:
            yield name
        finally:
            self._delete([name])

    def tidy(self) -> None:
        """Delete the topics that were filled."""
        self._delete(list(self._filled.values()))
        self._filled.clear()

    def records(self, topic: str) -> int:
        """How many records a reader of committed ones finds."""
        reader = Consumer(
            {
                "bootstrap.servers": self.bootstrap,
                "log_level": 0,
                "group.id": f"bench-{uuid.uuid4().hex}",
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "fetch.queue.backoff.ms": 2,
                "fetch.wait.max.ms": 10,  # the end of a partition is told by a fetch that finds nothing
            }
        )
        try:
            # asked by the reader itself: else its own look at the topic is half a second away
            partitions = set(reader.list_topics(topic, timeout=ANSWER).topics[topic].partitions)
            reader.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
            return _count(reader, partitions)
        finally:
            reader.close()

    def committed(self, group: str, topic: str) -> int:
        """How far a group has come, all partitions together, as every input begins with offset 0."""
        client = Consumer({"bootstrap.servers": self.bootstrap, "group.id": group, "log_level": 0})
        try:
            wanted = [TopicPartition(topic, number) for number in self._partitions(topic)]
            return sum(max(0, answer.offset) for answer in client.committed(wanted, ANSWER))
        finally:
            client.close()

    def _partitions(self, topic: str) -> list[int]:
        return list(self._admin.list_topics(topic, timeout=ANSWER).topics[topic].partitions)

    def _new(self, what: str, partitions: int) -> str:
        name = f"bench-{what}-{uuid.uuid4().hex[:8]}"
        self._kafka.create_topic(name, partitions)
        self._wait_for_leaders(name, partitions)
        return name

    def _wait_for_leaders(self, topic: str, partitions: int) -> None:
        """Until they answer: a leader that does not know yet that it is one costs the first contestant a retry."""
        asker = Consumer({"bootstrap.servers": self.bootstrap, "group.id": topic, "log_level": 0})
        until = time.monotonic() + ANSWER
        try:
            for number in range(partitions):
                while not _answers(asker, TopicPartition(topic, number)):
                    if time.monotonic() > until:
                        raise TimeoutError(f"partition {number} of {topic} has no leader after {ANSWER:.0f} s")
                    time.sleep(0.02)
        finally:
            asker.close()

    def _delete(self, names: list[str]) -> None:
        if names:
            for answer in self._admin.delete_topics(names, request_timeout=ANSWER).values():
                answer.result()

    def _fill(self, topic: str, messages: int, size: int, partitions: int) -> None:
        producer = Producer(
            {
                "bootstrap.servers": self.bootstrap,
                "log_level": 0,
                "acks": "all",
                "enable.idempotence": True,
                "delivery.report.only.error": True,
            }
        )
        failed: list[object] = []
        room = len(NOISE) - size
        for number in range(messages):
            start = number * STEP % room
            key, value = KEYS[number % len(KEYS)], NOISE[start : start + size]
            while True:
                try:
                    producer.produce(
                        topic, value, key, number % partitions, on_delivery=lambda error, _message: failed.append(error)
                    )
                except BufferError:
                    producer.poll(0.05)
                else:
                    break
        if (left := producer.flush(60)) or failed:
            raise KafkaException(failed[0] if failed else f"{left} records were not written within a minute")


def _answers(asker: Consumer, partition: TopicPartition) -> bool:
    try:
        asker.get_watermark_offsets(partition, timeout=ANSWER)
    except KafkaException:
        return False
    return True


def _count(reader: Consumer, open_partitions: set[int]) -> int:
    count = 0
    while open_partitions:
        messages = reader.consume(AT_ONCE, 0.1)
        for message in messages:
            error = message.error()
            if error is None:
                count += 1
            elif error.name() == "_PARTITION_EOF":
                open_partitions.discard(message.partition() or 0)
            else:
                raise KafkaException(error)
    return count
