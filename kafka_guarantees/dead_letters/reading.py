"""What is in a dead letter topic: read with plain clients, that have no group and commit nothing.

Rules.
* Reading ends where the topic ended when it began: services write to it meanwhile.
* An open transaction hides all that is behind it, also markers of replays. What was not seen for that reason is said, and
  never taken for absent.
"""

from __future__ import annotations

import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined] # not re-exported by its stubs

from kafka_guarantees._dead_letters import DeadLetter, marked_by, origin_of
from kafka_guarantees._preflight.topics import BEFORE, DIFFERENCE, NO_LIMIT
from kafka_guarantees._settings import check, creation_failure
from kafka_guarantees._settings.merge import side_of
from kafka_guarantees._settings.properties import BOTH, canonical
from kafka_guarantees.errors import describe, kafka_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from confluent_kafka import Message
    from typing_extensions import Self

    Place = tuple[int, int]  # partition and offset in the dead letter topic

ANSWER = 30.0  # seconds without any answer that end the reading
HOUR = 3_600_000  # milliseconds
PATIENCE = 10.0  # seconds that the open transactions of others are waited for
UNUSED = "kafka-guarantees-dead-letters"  # a group.id is required; nothing is subscribed or committed
_UNKNOWN = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED)


class NotRead(Exception):
    """What is in the topic cannot be told."""


class TopicReader:
    """Reads parts of one topic. A context manager.

    Args:
        config: librdkafka's properties that reach the cluster.
        topic: its name.

    Raises:
        NotRead: there is no such topic, or nobody answers.
        ValueError: a setting is wrong.
        KafkaException: the brokers do not answer, or refuse it.
    """

    def __init__(self, config: Mapping[str, str], topic: str) -> None:
        self.topic = topic
        self._config = config
        self._kept_from: dict[str, int] = {}
        self._heard: KafkaError | None = None
        self._committed = _consumer(config, "read_committed", self._hear)
        self._asker = _consumer(config, "read_uncommitted")
        try:
            self.partitions = range(self._first_answer())
            if not self.partitions:
                raise NotRead(f"topic {topic!r} does not exist, or this client may not know of it")  # noqa: TRY301
        except BaseException:
            self.close()
            raise

    def _hear(self, error: KafkaError) -> None:
        if error.code() != KafkaError._ALL_BROKERS_DOWN:  # says less than what comes before it
            self._heard = error

    def _first_answer(self) -> int:
        try:
            return self.partitions_of(self.topic)
        except KafkaException as exc:
            self._committed.poll(0)  # serves error_cb
            why = "" if self._heard is None else f" ({describe(self._heard)})"
            if kafka_error(exc).code() not in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT):
                raise
            raise NotRead(f"no Kafka answers at {self._config.get('bootstrap.servers')}{why}") from exc

    def partitions_of(self, topic: str) -> int:
        """How many partitions a topic has; 0 if it does not exist, or this client may not know of it."""
        try:
            found = self._committed.list_topics(topic, ANSWER).topics[topic]
        except RuntimeError:  # librdkafka makes no topic of a name of more than 512 bytes (Metadata.c:388-394)
            return 0
        if found.error is not None and found.error.code() not in _UNKNOWN:
            raise KafkaException(found.error)
        return len(found.partitions)

    def kept_from(self, topic: str) -> int:
        """Milliseconds since 1970: the brokers soon remove a record with an earlier timestamp. 0 where they do not tell."""
        if topic not in self._kept_from:
            resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
            admin = AdminClient({**reaching(self._config), "log_level": 0})
            try:
                found = admin.describe_configs([resource], request_timeout=ANSWER)[resource].result(ANSWER)
            except (KafkaException, FutureTimeoutError):
                found = {}
            settings = {name: entry.value for name, entry in found.items()}
            self._kept_from[topic] = kept_from(settings, int(time.time() * 1000))
        return self._kept_from[topic]

    def end(self, partition: int) -> int:
        """Where the log ends. A reader of committed records is told where the first open transaction begins instead."""
        return self._asker.get_watermark_offsets(TopicPartition(self.topic, partition), timeout=ANSWER)[1]

    def read(self, starts: Mapping[int, int], ends: Mapping[int, int], take: Callable[[Message], object]) -> dict[int, int]:
        """Give every committed record from ``starts`` to before ``ends`` to ``take``, by partition.

        Returns:
            Partition -> offset from which an open transaction hides the rest, for longer than PATIENCE.
        """
        way = _Way({partition: start for partition, start in starts.items() if start < ends[partition]}, ends)
        if way.reached:
            self._committed.assign([TopicPartition(self.topic, partition, start) for partition, start in way.reached.items()])
        while way.reached:
            for message in self._some():
                if _is_answer(message) and way.advance(message):
                    take(message)
            waited = time.monotonic() - way.advanced
            silent = set(way.reached) - way.answered
            if not silent and waited > PATIENCE:
                break
            if waited > ANSWER:
                raise NotRead(f"partitions {sorted(silent)} of topic {self.topic!r} do not answer")
        self._committed.unassign()
        return way.reached

    def _some(self) -> list[Message]:
        first = self._committed.poll(0.1)
        return [] if first is None else [first, *self._committed.consume(1000, 0)]

    def fetch(self, partition: int, offsets: Sequence[int]) -> list[Message]:
        """The records at these offsets, as far as they are still there."""
        wanted, found = set(offsets), []

        def take(message: Message) -> None:
            if message.offset() in wanted:
                found.append(message)

        self.read({partition: min(wanted)}, {partition: max(wanted) + 1}, take)
        return found

    def close(self) -> None:
        self._committed.close()
        self._asker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kept_from(settings: Mapping[str, str | None], now: int) -> int:
    """The timestamp from which on a topic with these settings takes a record, and keeps it for an hour, or half of its time.

    Args:
        settings: of the topic, as far as they are known.
        now: in milliseconds.

    Returns:
        Milliseconds; 0: any timestamp.
    """
    if settings.get("message.timestamp.type") != "CreateTime":
        return 0
    kept = int(settings.get("retention.ms") or -1)
    removes = kept >= 0 and "delete" in (settings.get("cleanup.policy") or "")
    before, both = (int(settings.get(name) or -1) for name in (BEFORE, DIFFERENCE))
    # of brokers before Kafka 4.0 the latter, which those before 3.6 have alone, counts where the former has no limit
    taken = both if both >= 0 and before in (-1, NO_LIMIT) else before
    ages = [age for age, limits in ((kept, removes), (taken, taken >= 0)) if limits]
    return max([0, *(now - age + min(HOUR, age // 2) for age in ages)])


class _Way:
    """How far the reading of several partitions is.

    Attributes:
        reached: partition -> offset, without those that are at their end.
        answered: partitions that said that they have no more, for now.
        advanced: when anything came.
    """

    def __init__(self, reached: dict[int, int], ends: Mapping[int, int]) -> None:
        self.reached = reached
        self._ends = ends
        self.answered: set[int] = set()
        self.advanced = time.monotonic()

    def advance(self, message: Message) -> bool:
        """Take note of a record or of the end of a partition. Returns whether it is a record to be taken."""
        partition, offset = place_of(message)
        if partition not in self.reached:
            return False
        is_record = message.error() is None
        after = offset + 1 if is_record else offset
        if not is_record:
            self.answered.add(partition)
        if after > self.reached[partition]:
            self.reached[partition], self.advanced = after, time.monotonic()
        if after >= self._ends[partition]:
            del self.reached[partition]
        return is_record and offset < self._ends[partition]


def reaching(config: Mapping[str, str]) -> dict[str, str | int]:
    """What of a configuration reaches the cluster. The rest may contradict itself in a client of another kind."""
    return {name: value for name, value in config.items() if side_of(canonical(name)) == BOTH}


def _consumer(config: Mapping[str, str], isolation: str, hear: Callable[[KafkaError], None] | None = None) -> Consumer:
    ours: dict[str, Any] = {
        "log_level": 0,  # the screen belongs to the command; errors are raised
        "fetch.wait.max.ms": 50,
        "fetch.queue.backoff.ms": 2,  # a second by default, after the queue was full for a moment
        **config,
        "group.id": UNUSED,
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "auto.offset.reset": "earliest",  # where retention has removed the first ones meanwhile
        "allow.auto.create.topics": False,
        "isolation.level": isolation,
    }
    ours.pop("group.instance.id", None)
    if hear is not None:
        ours["error_cb"] = hear
    try:
        return Consumer(ours)
    except KafkaException as exc:
        failure = creation_failure(exc, ours)  # librdkafka's own words quote values (S01)
    check(ours)  # names the setting, if it is one of them
    raise failure


def _is_answer(message: Message) -> bool:
    """Whether it is a record, or the end of a partition for now."""
    error = message.error()
    if error is None or error.code() == KafkaError._PARTITION_EOF:
        return True
    if error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
        return False  # the coordinator of the unused group is looked for all the same
    if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        raise NotRead(f"reading topic {message.topic()!r} was refused. Grant READ on it")
    raise KafkaException(error)


# -- contents ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One dead letter, without what may be large.

    Attributes:
        place: partition and offset in the dead letter topic.
        letter: what its headers say; without the message's own.
        size: bytes of key, value and headers.
    """

    place: Place
    letter: DeadLetter
    size: int

    @classmethod
    def of(cls, message: Message) -> Entry | None:
        letter = origin_of(message)
        if letter is None:
            return None
        parts = [message.key(), message.value(), *(value for _, value in letter.headers)]
        return cls(place_of(message), replace(letter, headers=()), sum(len(part or b"") for part in parts))

    @property
    def message(self) -> tuple[object, ...]:
        """Which message it is of. By its timestamp it is not one of an earlier topic of that name."""
        letter = self.letter
        return letter.topic, letter.partition, letter.offset, letter.timestamp, letter.group


def place_of(message: Message) -> Place:
    """Partition and offset of a message that was consumed."""
    return message.partition() or 0, message.offset() or 0


class Contents:
    """What is in a dead letter topic.

    Attributes:
        entries: dead letters by place.
        replayed: places that have a marker.
        others: how many records are neither.
        upto: partition -> offset up to which it was read.
        hidden: partition -> how many offsets an open transaction hides behind that.
    """

    def __init__(self, reader: TopicReader) -> None:
        self._reader = reader
        self.entries: dict[Place, Entry] = {}
        self.replayed: set[Place] = set()
        self._copies: dict[Place, list[Place]] = {}  # of those messages only that have several
        self.others = 0
        self.upto: dict[int, int] = {}
        self.hidden: dict[int, int] = {}

    @classmethod
    def of(cls, reader: TopicReader, starts: Mapping[int, int] | None = None) -> Self:
        """What is in the topic now, from these offsets on if not from the beginning."""
        contents = cls(reader)
        contents._read(dict.fromkeys(reader.partitions, 0) if starts is None else starts, contents._take)
        contents._find_copies()
        return contents

    def copies(self, place: Place) -> Sequence[Place]:
        """The places of all letters of the message whose letter is there.

        A service writes another one where it died, or lost its database, between the first and its offset.
        """
        return self._copies.get(place, (place,))

    def _find_copies(self) -> None:
        messages: dict[tuple[object, ...], list[Place]] = {}
        for place, entry in self.entries.items():
            messages.setdefault(entry.message, []).append(place)
        for places in messages.values():
            if len(places) > 1:
                self._copies |= dict.fromkeys(places, places)

    def read_markers(self, partition: int) -> None:
        """Read on, for markers only: to be called inside a transaction, when no other replay can write any."""
        self._read({partition: self.upto[partition]}, self._take_marker)

    def _read(self, starts: Mapping[int, int], take: Callable[[Message], object]) -> None:
        ends = {partition: self._reader.end(partition) for partition in starts}
        stuck = self._reader.read(starts, ends, take)
        for partition, end in ends.items():
            self.upto[partition] = stuck.get(partition, end)
            self.hidden[partition] = end - self.upto[partition]

    def _take(self, message: Message) -> None:
        if self._take_marker(message):
            return
        entry = Entry.of(message)
        if entry is None:
            self.others += 1
        else:
            self.entries[entry.place] = entry

    def _take_marker(self, message: Message) -> bool:
        offset = marked_by(message)
        if offset is not None:
            self.replayed.add((message.partition() or 0, offset))
        return offset is not None

    def complaints(self) -> list[str]:
        """What could not be read."""
        return [complaint for partition in self.hidden if (complaint := self.complaint(partition)) is not None]

    def complaint(self, partition: int) -> str | None:
        """What could not be read of this partition."""
        if not self.hidden[partition]:
            return None
        return (
            f"partition {partition}: an open transaction of a producer hides the {self.hidden[partition]} offsets from "
            f"{self.upto[partition]} on. It ends with that producer, or after its transaction.timeout.ms"
        )


@dataclass(frozen=True)
class Filter:
    """Which dead letters are meant. None means any.

    Attributes:
        origin: the topic that they came from.
        error: type of the error, with or without its module.
        since: when they became dead letters, in milliseconds.
    """

    origin: str | None = None
    error: str | None = None
    since: int | None = None

    def of(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those that are meant, the oldest first; those of one partition in their order."""
        return sorted(
            (entry for entry in entries if self._means(entry.letter)), key=lambda entry: (entry.letter.time, entry.place)
        )

    def _means(self, letter: DeadLetter) -> bool:
        return (
            self.origin in (None, letter.topic)
            and self.error in (None, letter.error_type, letter.error_type.rpartition(".")[2])
            and (self.since is None or letter.time >= self.since)
        )
