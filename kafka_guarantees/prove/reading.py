"""What the brokers are asked: with plain clients, so that the proof does not rest on the library that it judges."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from .evidence import Sample, Seen, View
from .life import ATTEMPT, ID, ORIGIN, content_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from confluent_kafka import Message
    from typing_extensions import Self

log = logging.getLogger(__name__)

READING = 60.0  # seconds that reading a topic to its end may take, without anything new
ANSWER = 5.0  # seconds that one request may take
SAMPLING = 0.2  # seconds between two samples of a group's offsets
UNUSED = "kafka-guarantees-prove-reader"  # a group.id is required; nothing is subscribed or committed
_QUIET: dict[str, Any] = {"log_level": 0}


def header(message: Message, name: str) -> str | None:
    """The last header of that name."""
    for key, value in reversed(message.headers() or []):
        if key == name and value is not None:
            return value.decode() if isinstance(value, bytes) else value
    return None


def seen(message: Message) -> Seen:
    """A record of ours."""
    key, origin = message.key(), header(message, ORIGIN)
    partition, _, offset = (origin or "").partition(":")
    return Seen(
        partition=message.partition() or 0,
        offset=message.offset() or 0,
        key=key.decode() if isinstance(key, bytes) else key,
        id=header(message, ID) or f"a record without id at {message.partition()}:{message.offset()}",
        attempt=header(message, ATTEMPT),
        origin=(int(partition), int(offset)) if origin else None,
        content=content_of(message),
    )


def _reading(config: Mapping[str, Any], group: str, isolation: str) -> dict[str, Any]:
    return {**_QUIET, **config, "group.id": group, "enable.auto.commit": False, "isolation.level": isolation}


class Reader:
    """Reads the topics of a run.

    Args:
        config: librdkafka's properties that reach the cluster.
        partitions: of every topic.
    """

    def __init__(self, config: Mapping[str, Any], partitions: int) -> None:
        self._config = config
        self._partitions = range(partitions)

    def view(self, topic: str) -> View:
        """A topic in both views, by new consumers, from the beginning to the end of every partition."""
        committed, unfinished = self._read(topic, "read_committed")
        uncommitted, _ = self._read(topic, "read_uncommitted")
        return View(committed, uncommitted, unfinished)

    def _read(self, topic: str, isolation: str) -> tuple[list[Seen], list[int]]:
        found: list[Seen] = []
        unfinished = set(self._partitions)
        ends = self._ends(topic)
        with closing(Consumer({**_reading(self._config, UNUSED, isolation), "enable.partition.eof": True})) as reader:
            reader.assign([TopicPartition(topic, n, OFFSET_BEGINNING) for n in self._partitions])
            deadline = time.monotonic() + READING
            while unfinished and time.monotonic() < deadline:
                for message in reader.consume(1000, 0.2):
                    error = message.error()
                    if error is None:
                        found.append(seen(message))
                        deadline = time.monotonic() + READING
                    elif (
                        error.code() == KafkaError._PARTITION_EOF and (message.offset() or 0) >= ends[message.partition() or 0]
                    ):
                        unfinished.discard(message.partition() or 0)
        return found, sorted(unfinished)

    def _ends(self, topic: str) -> list[int]:
        """The ends of the logs. A reader of committed records is told where the first open transaction begins instead."""
        with closing(Consumer(_reading(self._config, UNUSED, "read_uncommitted"))) as asker:
            return [asker.get_watermark_offsets(TopicPartition(topic, n), timeout=READING)[1] for n in self._partitions]


class Sampler:
    """Asks all the while which offsets groups have committed. A context manager.

    Args:
        config: librdkafka's properties that reach the cluster.
        groups: group.id by the name that the samples get.
        topic: whose offsets.
        partitions: of the topic.
    """

    def __init__(self, config: Mapping[str, Any], groups: Mapping[str, str], topic: str, partitions: int) -> None:
        self.trouble: str | None = None
        self.samples: dict[str, list[Sample]] = {name: [] for name in groups}
        # not the admin client's list_consumer_group_offsets(): librdkafka 2.16.0 aborts the process in it (refcnt > 0) where
        # its broker dies. A reader of committed records asks with require_stable as well (H08).
        self._askers = {name: Consumer(_reading(config, group, "read_committed")) for name, group in groups.items()}
        self._asked = [TopicPartition(topic, number) for number in range(partitions)]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample_all, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def last(self, name: str) -> Mapping[int, int]:
        """The offsets in the last sample of a group."""
        samples = self.samples[name]
        return samples[-1].offsets if samples else {}

    def reached(self, ends: Mapping[int, int]) -> bool:
        """Whether every group has committed everything before these offsets."""
        return all(self.last(name).get(partition, 0) >= end for name in self._askers for partition, end in ends.items())

    def settle(self) -> None:
        """Wait until every group was asked once more, so that the last sample is what is at the end."""
        now, until = time.monotonic_ns(), time.monotonic() + READING
        while time.monotonic() < until and any(not s or s[-1].asked < now for s in self.samples.values()):
            time.sleep(SAMPLING / 2)

    def _sample_all(self) -> None:
        try:
            self._sample_on()
        except Exception as error:
            log.exception("nobody asks for offsets any more")
            self.trouble = f"offsets could not be asked for: {type(error).__name__}: {error}"

    def _sample_on(self) -> None:
        while not self._end.wait(SAMPLING):
            for name, asker in self._askers.items():
                with suppress(KafkaException):  # asked again: the coordinator is not there, or busy
                    self.samples[name].append(self._sample(asker))
        for asker in self._askers.values():
            asker.close()

    def _sample(self, asker: Consumer) -> Sample:
        asked = time.monotonic_ns()
        answer = asker.committed(self._asked, timeout=ANSWER)
        offsets = {p.partition: p.offset for p in answer if p.error is None and p.offset >= 0}
        return Sample(asked, time.monotonic_ns(), offsets)


def ends(records: Sequence[Seen]) -> dict[int, int]:
    """Partition -> offset after its last record. The log itself ends later: marks of transactions have offsets too (C23)."""
    last: dict[int, int] = {}
    for record in records:
        last[record.partition] = max(last.get(record.partition, 0), record.offset + 1)
    return last


class Audience:
    """Reads the committed outputs as they become visible, and notes when. A context manager."""

    def __init__(self, config: Mapping[str, Any], topic: str, partitions: int) -> None:
        self.times: list[int] = []
        self._reader = Consumer(_reading(config, UNUSED, "read_committed"))
        self._reader.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in range(partitions)])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _read(self) -> None:
        with closing(self._reader):
            while not self._over.is_set():
                got = sum(message.error() is None for message in self._reader.consume(1000, 0.1))
                self.times += [time.monotonic_ns()] * got
