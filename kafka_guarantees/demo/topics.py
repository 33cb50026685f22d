"""What the demo asks the brokers: plain clients, so that the counting does not rest on the library that it checks."""

from __future__ import annotations

import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._resource import ResourceType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from confluent_kafka import Message

PARTITIONS = 2
ANSWER = 10.0  # seconds that one request may take
READING = 30.0  # seconds that reading a topic to its end may take
QUIET: dict[str, str | int | float | bool] = {"log_level": 0}  # the screen belongs to the demo; errors are raised
DEFAULT_SESSION = 6000  # milliseconds
MIN_SESSION = "group.min.session.timeout.ms"


def shortest_session(config: Mapping[str, Any]) -> int:
    """The shortest ``session.timeout.ms`` that the brokers let a group have; Kafka's default where they do not tell.

    Args:
        config: librdkafka's properties that reach them.

    Raises:
        KafkaException: nobody answers.
    """
    admin = AdminClient({**QUIET, **config})
    try:
        broker = next(iter(admin.list_topics(timeout=ANSWER).brokers))
    except KafkaException as exc:
        raise KafkaException(f"no Kafka answers at {config['bootstrap.servers']}") from exc
    resource = ConfigResource(ResourceType.BROKER, str(broker))
    try:
        settings = admin.describe_configs([resource], request_timeout=ANSWER)[resource].result()
    except KafkaException:
        return DEFAULT_SESSION  # no right to ask
    return int(settings[MIN_SESSION].value)


def delete_topics(bootstrap: str, names: list[str]) -> None:
    """Delete topics, if the brokers do it at once: tidying up is no reason to fail."""
    admin = AdminClient({**QUIET, "bootstrap.servers": bootstrap})  # named, since its end would end its requests
    for deleted in admin.delete_topics(names, request_timeout=ANSWER).values():
        with suppress(KafkaException):
            deleted.result()


def read_back(bootstrap: str, topic: str) -> list[Message]:
    """Every committed record in a topic, read by a consumer of its own from the first to the last.

    Raises:
        TimeoutError: the end was not reached, as where a transaction is left open.
    """
    found: dict[tuple[int | None, int | None], Message] = {}  # by place: what is read twice is not there twice
    open_partitions = set(range(PARTITIONS))
    deadline = time.monotonic() + READING
    with closing(_reader(bootstrap, topic, {"enable.partition.eof": True})) as reader:
        while open_partitions:
            message = reader.poll(0.5)
            if message is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the end of topic {topic!r} was not reached within {READING:.0f} s")
            elif _is_record(message):
                found[message.partition(), message.offset()] = message
            else:
                open_partitions.discard(message.partition() or 0)
    return list(found.values())


def follow(bootstrap: str, topic: str, stopped: Callable[[], bool]) -> Iterator[Message]:
    """The committed records of a topic as they become visible."""
    with closing(_reader(bootstrap, topic, {"fetch.wait.max.ms": 50, "fetch.queue.backoff.ms": 2})) as reader:
        while not stopped():
            message = reader.poll(0.1)
            if message is not None and _is_record(message):
                yield message


class Group:
    """How far a group is: its committed offsets, asked of the brokers without being a member."""

    def __init__(self, bootstrap: str, group: str, topic: str) -> None:
        self._partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        self._asker = Consumer({**QUIET, "bootstrap.servers": bootstrap, "group.id": group})

    def committed(self) -> dict[int, int]:
        """Partition -> committed offset, without the partitions that have none."""
        try:
            answer = self._asker.committed(self._partitions, timeout=ANSWER)
        except KafkaException:
            return {}  # asked again: the coordinator is not there yet, or busy
        return {p.partition: p.offset for p in answer if p.error is None and p.offset >= 0}

    def started(self) -> bool:
        """Whether the group has decided where it begins, in every partition."""
        return len(self.committed()) == PARTITIONS

    def reached(self, ends: Mapping[int, int]) -> bool:
        """Whether everything before these offsets is committed."""
        committed = self.committed()
        return all(committed.get(partition, -1) >= end for partition, end in ends.items())

    def close(self) -> None:
        self._asker.close()


def ends(messages: list[Message]) -> dict[int, int]:
    """Partition -> offset after its last record. The log itself ends later: the marks of transactions have offsets too."""
    last: dict[int, int] = {}
    for message in messages:
        partition, offset = message.partition() or 0, message.offset() or 0
        last[partition] = max(last.get(partition, 0), offset + 1)
    return last


def _reader(bootstrap: str, topic: str, more: Mapping[str, str | int | bool]) -> Consumer:
    reader = Consumer(
        {
            **QUIET,
            "bootstrap.servers": bootstrap,
            "group.id": "kafka-guarantees-demo-reader",  # required, and not used: nothing is subscribed or committed
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            **more,
        }
    )
    reader.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
    return reader


def _is_record(message: Message) -> bool:
    """True: a record. False: the end of its partition, for the time being."""
    error = message.error()
    if error is not None and error.code() != KafkaError._PARTITION_EOF:
        raise KafkaException(error)
    return error is None
