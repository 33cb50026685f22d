"""Offsets of messages, and what a consumer's group metadata says. Pure: no I/O.

Rules.
* What is committed is the offset *after* the last finished message, per partition, with its leader epoch (C04, C22).
  ``position()`` and an argument-less ``commit()`` are never used: they mean "handed out", not "finished" (C02).
* ``TopicPartition`` compares and hashes without its offset (C20), so that plain tuples are the keys here.
"""

from __future__ import annotations

from collections import deque
from itertools import groupby
from operator import methodcaller
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from confluent_kafka import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from confluent_kafka import Message

Partition = tuple[str, int]

_PARTITION = methodcaller("partition")


class _Consumed(Protocol):
    """A message that was consumed: unlike ``Message`` in general it has all of these."""

    def topic(self) -> str: ...
    def partition(self) -> int: ...
    def offset(self) -> int: ...
    def leader_epoch(self) -> int | None: ...


class Span(NamedTuple):
    """What of one partition is among some messages.

    Attributes:
        first: offset of the first of them.
        behind: what to commit once all of them are finished.
    """

    first: int
    behind: TopicPartition


def spans(messages: Iterable[Message], topic: str | None = None) -> dict[Partition, Span]:
    """What of each partition is among ``messages``, in the order of consumption.

    Args:
        messages: come in runs of one partition each, as a rule.
        topic: the only one that they can be of, if there is only one.
    """
    first: dict[Partition, int] = {}
    last: dict[Partition, _Consumed] = {}
    consumed = cast("Iterable[_Consumed]", messages)
    for found, run in groupby(consumed, _place if topic is None else _PARTITION):
        partition: Partition = found if topic is None else (topic, found)
        message = next(run)
        if partition not in first:
            first[partition] = message.offset()
        rest = deque(run, 1)  # noqa: B031 - what comes after the first
        last[partition] = rest[0] if rest else message
    return {
        partition: Span(
            first[partition], TopicPartition(*partition, message.offset() + 1, leader_epoch=_epoch(message.leader_epoch()))
        )
        for partition, message in last.items()
    }


def _place(message: _Consumed) -> Partition:
    return message.topic(), message.partition()


def next_offsets(messages: Iterable[Message], topic: str | None = None) -> dict[Partition, TopicPartition]:
    """What to commit once all of ``messages`` are finished. ``topic``: see ``spans``."""
    return {partition: span.behind for partition, span in spans(messages, topic).items()}


def _epoch(known: int | None) -> int:
    """As librdkafka takes it; -1: unknown."""
    return -1 if known is None else known


def not_before(
    messages: Sequence[Message], marks: Mapping[Partition, int], found: Mapping[Partition, Span]
) -> Sequence[Message]:
    """The messages that are not below the mark of their partition (M09). ``found``: their spans."""
    if all(span.first >= marks.get(partition, 0) for partition, span in found.items()):
        return messages
    late = [m for m in cast("Sequence[_Consumed]", messages) if m.offset() >= marks.get(_place(m), 0)]
    return cast("Sequence[Message]", late)


def named(partitions: Iterable[Partition]) -> str:
    """Partitions for a log line, however many they are: ``orders 0-3,7; payments 0``."""
    numbers: dict[str, list[int]] = {}
    for topic, number in sorted(partitions):
        numbers.setdefault(topic, []).append(number)
    return "; ".join(f"{topic} {','.join(_runs(found))}" for topic, found in numbers.items()) or "nothing"


def _runs(numbers: list[int]) -> Iterator[str]:
    """Ascending numbers, with those that follow one another as ``0-3``."""
    first = last = numbers[0]
    for number in [*numbers[1:], None]:
        if number == last + 1:
            last = number
            continue
        yield str(first) if first == last else f"{first}-{last}"
        if number is not None:
            first = last = number


class Membership(NamedTuple):
    """What ``consumer_group_metadata()`` says of this consumer."""

    generation: int
    member: str

    @property
    def active(self) -> bool:
        """False before the first join and after the group has thrown the member out: then nothing is fenced (X03)."""
        return self.generation >= 0 and bool(self.member)

    def continues(self, earlier: Membership) -> bool:
        """Whether this is the same, unbroken membership, if perhaps in a later generation.

        In a later generation the member still owns what it owned: no partition is given to another before this member has
        served its revocation, which happens in poll() only.
        """
        return self.active and earlier.active and self.member == earlier.member and self.generation >= earlier.generation


_PREFIX = b"CGMDv2:"


def membership(metadata: bytes) -> Membership:
    """Decode librdkafka's serialized group metadata: ``CGMDv2:``, generation, group, member, ...

    Raises:
        ValueError: another layout. It cannot be verified then that a commit is fenced.
    """
    try:
        if not metadata.startswith(_PREFIX):
            raise ValueError  # noqa: TRY301
        rest = metadata[len(_PREFIX) :]
        _group, member, _instance = rest[4:].split(b"\0", 2)
        return Membership(int.from_bytes(rest[:4], "little", signed=True), member.decode())
    except ValueError as exc:
        raise ValueError(
            f"this librdkafka describes group membership in a form that is not known ({metadata[:8]!r}...)"
        ) from exc


def saying(metadata: str | None, place: TopicPartition) -> TopicPartition:
    """The same place with this metadata, if there is any."""
    if not metadata:
        return place
    return TopicPartition(place.topic, place.partition, place.offset, metadata, leader_epoch=epoch_of(place))


def epoch_of(place: TopicPartition) -> int:
    """The leader's epoch of what is before a place, as librdkafka takes it; -1: unknown."""
    return _epoch(place.leader_epoch)


def with_epoch(places: Iterable[TopicPartition]) -> set[Partition]:
    """The partitions of those places of which it is known under which leader what is before them was written (KIP-320).

    Only where they are sought does librdkafka 2.16 compare that with the log: not as they are assigned (its issue 5158).
    """
    return {(place.topic, place.partition) for place in places if place.leader_epoch is not None}


def where(message: Message) -> str:
    """Topic, partition and offset of a message, for a sentence."""
    return f"topic {message.topic()!r} partition {message.partition()} offset {message.offset()}"


def fields(message: Message) -> dict[str, object]:
    """The same for programs that read a log: ``extra`` of a line about one message."""
    return {"kafka_topic": message.topic(), "kafka_partition": message.partition(), "kafka_offset": message.offset()}
