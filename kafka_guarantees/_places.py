"""Where partitions are read from: what the group has committed, or what is stored beside the effects; else ``start`` decides.

Rules.
* The brokers are asked each time. Nothing here remembers a place.
* A start is a decision, and is committed before anything is handled: a crash must not take it again with another result (M05).
* A group that had an offset and has none any more has lost it. Where to go on is not ours to decide then (``OffsetsLost``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, get_args

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, OFFSET_INVALID, KafkaException, TopicPartition

from .errors import OffsetBeyondEnd, OffsetsLost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ._offsets import Partition

Start = Literal["earliest", "latest"]
T = TypeVar("T")


class Stored(NamedTuple):
    """Offsets that are stored elsewhere than with the group.

    Attributes:
        offsets: asks for them; gives those of partitions that have one there. May raise StoreUnavailable, BrokerError.
        mark: the metadata of what was committed to the group for show. Where the group has that and nothing is stored, the
            store has lost it.
    """

    offsets: Callable[[Iterable[Partition]], Mapping[Partition, int]]
    mark: str


class Ask(Protocol):
    """Puts a question to the C consumer, with the seconds that it may take. May raise KafkaException, BrokerError."""

    def __call__(self, question: Callable[[Any, float], T], /) -> T: ...


class Places:
    """Where a group goes on. One for all runs of a client.

    Args:
        group: its id.
        start: where it begins if it has no committed offset.
        once: nothing may be handled twice. Partitions are added behind the last one: so one without an offset before one that
            has one is not new, its offset expired or was deleted, and it is read from its end.

    Attributes:
        stored: where offsets are, if not with the group.

    Raises:
        ValueError: there is no such start.
    """

    def __init__(self, group: str | None, start: Start, *, once: bool = False) -> None:
        if start not in get_args(Start):
            raise ValueError(f"start is one of {', '.join(map(repr, get_args(Start)))}, not {start!r}")
        self.stored: Stored | None = None
        self._reset = f"with kafka-consumer-groups.sh --group {group} --reset-offsets"
        self._start = start
        self._once = once
        self._seen: set[Partition] = set()  # had a committed offset before

    @property
    def how_to_set(self) -> str:
        """What to do where somebody must decide."""
        return self._reset if self.stored is None else "in the offset table of the inbox"

    def note(self, committed: Iterable[TopicPartition]) -> None:
        """Something was committed of these partitions: from now on it is lost if there is nothing."""
        self._seen.update((place.topic, place.partition) for place in committed)

    def of(
        self, partitions: Iterable[Partition], ask: Ask, commit: Callable[[list[TopicPartition]], None]
    ) -> list[TopicPartition]:
        """Where to read these partitions from. A start that is decided is committed.

        Raises:
            OffsetsLost: their committed offsets are gone.
            KafkaException, BrokerError, StoreUnavailable: that is not known now.
        """
        places = self.committed(partitions, ask)
        fresh = [place for place in places if place.offset < 0]
        if fresh:
            self._choose(fresh, ask)
            commit(fresh)
        return places

    def committed(self, partitions: Iterable[Partition], ask: Ask) -> list[TopicPartition]:
        """What the group has committed of these, or what is stored; a negative offset if neither is. Raises as above."""
        wanted = [TopicPartition(*partition) for partition in partitions]
        if not wanted:
            return []
        committed: list[TopicPartition] = ask(lambda raw, within: raw.committed(wanted, within))
        for place in committed:
            if place.error is not None:
                raise KafkaException(place.error)
        self.note(place for place in committed if place.offset >= 0)
        return committed if self.stored is None else self._stored_or(committed, self.stored, ask)

    def _stored_or(self, committed: list[TopicPartition], stored: Stored, ask: Ask) -> list[TopicPartition]:
        """The offsets that are stored beside the effects, and the group's where nothing was ever stored."""
        offsets = stored.offsets((place.topic, place.partition) for place in committed)
        found = [TopicPartition(*place, offset) for place, offset in offsets.items()]
        for place, end in zip(found, _edges(found, OFFSET_END, ask), strict=True):
            if place.offset > end:
                raise OffsetBeyondEnd(
                    f"the inbox is at offset {place.offset} of {_where(place)}, which ends at {end}. Records that were handled "
                    "are not in the topic any more (an unclean leader election, a restored cluster). Nothing was handled. Find "
                    "out what was lost; then set the offset in the inbox's table."
                )
        others = [place for place in committed if (place.topic, place.partition) not in offsets]
        for place in others:
            if place.metadata == stored.mark and place.offset >= 0:
                raise OffsetsLost(
                    f"the group has come to offset {place.offset} of {_where(place)} with an inbox, and this inbox knows "
                    "nothing of it: it is another database, or an older state of it, without the effects. Nothing was handled. "
                    f"Give the right database; or say where to go on, {self._reset}."
                )
        return [*found, *others]

    def _choose(self, fresh: list[TopicPartition], ask: Ask) -> None:
        """Fill in where partitions begin that the group has no committed offset of."""
        for place in fresh:
            if (place.topic, place.partition) in self._seen:
                raise OffsetsLost(
                    f"the group's committed offset of {_where(place)} is gone: it expired or was deleted while this process "
                    "ran. Nothing was committed. Going on from the start would repeat messages, from the end lose them: "
                    f"decide, and set it {self._reset}."
                )
        last: dict[str, int | None] = {}
        if self._start == "latest":
            last = {topic: self._last(topic, ask) for topic in {place.topic for place in fresh}}
        at_end = [place for place in fresh if place.topic in last and self._old(place.partition, last[place.topic])]
        at_beginning = [place for place in fresh if place not in at_end]
        for places, edge in ((at_beginning, OFFSET_BEGINNING), (at_end, OFFSET_END)):
            for place, offset in zip(places, _edges(places, edge, ask), strict=True):
                place.offset = offset

    def _old(self, number: int, last: int | None) -> bool:
        """Whether a partition without an offset was there when the group began to read its topic; ``last``: see ``_last``.

        One that was added since must not be read from its end: its first messages would be skipped (C11).
        """
        return last is None or (self._once and number < last)

    def _last(self, topic: str, ask: Ask) -> int | None:
        """The last partition of a topic of which the group has an offset. None: it has not read the topic before."""
        numbers = ask(lambda raw, within: raw.list_topics(topic, timeout=within)).topics[topic].partitions
        committed = self.committed([(topic, number) for number in numbers], ask)
        return max((place.partition for place in committed if place.offset != OFFSET_INVALID), default=None)


def _edges(places: Sequence[TopicPartition], edge: int, ask: Ask) -> list[int]:
    """Where these partitions begin, or end: one question for all of them, for there may be hundreds."""
    if not places:
        return []
    wanted = [TopicPartition(place.topic, place.partition, edge) for place in places]
    found: list[TopicPartition] = ask(lambda raw, within: raw.offsets_for_times(wanted, within))
    for place in found:
        if place.error is not None:
            raise KafkaException(place.error)
    offsets = {(place.topic, place.partition): place.offset for place in found}
    return [offsets[place.topic, place.partition] for place in places]


def _where(place: TopicPartition) -> str:
    return f"topic {place.topic!r} partition {place.partition}"
