"""Where partitions are read from: what the group has committed, or what is stored beside the effects; else ``start`` decides.

Rules.
* The brokers are asked each time. Nothing here remembers a place.
* A start is a decision, and is committed before anything is handled: a crash must not take it again with another result (M05).
* Members that begin a group together decide alike, though one of them has committed its start when another decides: it says
  how many partitions there were.
* A group that had an offset and has none any more has lost it. Where to go on is not ours to decide then (``OffsetsLost``).
* A broker that was the group's coordinator, and has not heard that another one is, answers with offsets of old: to ask needs no
  replica. What a member knows to be committed, or may be, it does not go back behind (``Outdated``).
"""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, get_args

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, OFFSET_INVALID, KafkaError, KafkaException, TopicPartition

from ._offsets import epoch_of, named, saying
from .errors import NO_TOPIC, OffsetBeyondEnd, OffsetsLost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from ._offsets import Partition

log = logging.getLogger("kafka_guarantees")

Start = Literal["earliest", "latest"]
T = TypeVar("T")

TOGETHER = 60.0  # seconds within which members begin a group together, and that their clocks may differ by
_BEGAN = re.compile(r"kafka-guarantees began with (\d+) partitions at (\d+)")  # metadata of a start


class Stored(NamedTuple):
    """Offsets that are stored elsewhere than with the group.

    Attributes:
        offsets: asks for them; gives those of partitions that have one there. May raise StoreUnavailable, BrokerError.
        mark: the metadata of what was committed to the group for show. Where the group has that and nothing is stored, the
            store has lost it.
    """

    offsets: Callable[[Iterable[Partition]], Mapping[Partition, int]]
    mark: str


class Outdated(KafkaException):
    """The group says less than this member has committed: a former coordinator speaks, or what was in doubt did not happen."""

    def __init__(self, place: TopicPartition, claimed: int) -> None:
        where = f"the group is at offset {place.offset} of {_where(place)}, and {claimed} was committed, or may have been"
        super().__init__(KafkaError(KafkaError._WAIT_COORD, f"{where}: a former coordinator has answered, perhaps"))


class Ask(Protocol):
    """Puts a question to the C consumer, with the seconds that it may take. May raise KafkaException, BrokerError."""

    def __call__(self, question: Callable[[Any, float], T], /) -> T: ...


class Places:
    """Where a group goes on. One for all runs of a client.

    Args:
        group: its id.
        start: where it begins if it has no committed offset.
        once: nothing may be handled twice. So with ``"latest"`` a partition without an offset is read from its end, if it was
            there when its topic was first seen here: its offset may have expired, or another member decides at the same time.

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
        self._counts: dict[str, int] = {}  # of the partitions that a topic had when it was first seen
        self._seen: set[Partition] = set()  # had a committed offset before
        self._claimed: dict[Partition, int] = {}  # see ``claim``
        self._kept: set[Partition] = set()  # had one, which has gone, and are where the store has them
        self._undecided: set[Partition] = set()  # read from the end, once that is decided, while they have no offset
        self._begun: dict[Partition, str] = {}  # what was said with starts of ours, and is said on for a while
        self._told: set[tuple[str, int, int]] = set()  # offsets of the group that do not count, and of which that was said

    @property
    def how_to_set(self) -> str:
        """What to do where somebody must decide."""
        return self._reset if self.stored is None else "in the offset table of the inbox"

    def note(self, committed: Iterable[TopicPartition]) -> None:
        """Something was committed of these partitions: from now on it is lost if there is nothing."""
        partitions = {(place.topic, place.partition) for place in committed}
        self._seen |= partitions
        self._kept -= partitions

    def claim(self, committed: Iterable[TopicPartition]) -> None:
        """This member has committed these, or may have: as long as it owns them, nobody else can say less."""
        self._claimed.update(((place.topic, place.partition), place.offset) for place in committed)

    def disclaim(self, gone: Iterable[Partition] | None = None) -> None:
        """These are somebody else's now; None: all are."""
        for partition in list(self._claimed) if gone is None else gone:
            self._claimed.pop(partition, None)

    def of(
        self, partitions: Iterable[Partition], ask: Ask, commit: Callable[[list[TopicPartition]], None]
    ) -> list[TopicPartition]:
        """Where to read these partitions from, as far as that is known now. A start that is decided is committed.

        Raises:
            OffsetsLost: their committed offsets are gone.
            KafkaException, BrokerError, StoreUnavailable: it is not known of any now.
        """
        places = self.committed(partitions, ask)
        fresh = [place for place in places if place.offset < 0]
        if fresh:
            decided = self._choose(fresh, ask)
            if decided:
                commit(decided)
        return [place for place in places if place.offset >= 0]

    def committed(self, partitions: Iterable[Partition], ask: Ask) -> list[TopicPartition]:
        """What the group has committed of these, or what is stored; a negative offset if neither is.

        One that is stored, and may be beyond the end of its partition, which is not known now, is left out. Raises as above.
        """
        wanted = [TopicPartition(*partition) for partition in partitions]
        if not wanted:
            return []
        if self._once and self._start == "latest":
            for topic in {place.topic for place in wanted} - self._counts.keys():
                self._counts[topic] = len(_numbers(topic, ask))
        committed: list[TopicPartition] = ask(lambda raw, within: raw.committed(wanted, within))
        for place in committed:
            if place.error is not None:
                raise KafkaException(place.error)
            claimed = self._claimed.get((place.topic, place.partition))
            if claimed is not None and place.offset < claimed:
                raise Outdated(place, claimed)
        committed = [self._without_what_others_said(place) for place in committed]
        self.note(place for place in committed if place.offset >= 0)
        return committed if self.stored is None else self._stored_or(committed, self.stored, ask)

    def _without_what_others_said(self, place: TopicPartition) -> TopicPartition:
        """The place with its metadata if these are ours: librdkafka 2.16 reads beyond the end of what other clients commit.

        What comes of that is no text at times; and it is not to be committed.
        """
        try:
            said = place.metadata or ""
        except UnicodeDecodeError:
            said = "?"
        ours = not said or _BEGAN.fullmatch(said) or (self.stored is not None and said == self.stored.mark)
        return place if ours else TopicPartition(place.topic, place.partition, place.offset, leader_epoch=epoch_of(place))

    def vanished(self, partitions: AbstractSet[Partition], ask: Ask) -> tuple[set[Partition], dict[Partition, int]]:
        """Of which of these the group had an offset, and has none any more; and its offset of those that seem to end before it.

        To a reader of what is committed a partition seems to end where a transaction is open, too.
        """
        wanted = [TopicPartition(*partition) for partition in partitions & self._seen - self._kept]
        found: list[TopicPartition] = ask(lambda raw, within: raw.committed(wanted, within)) if wanted else []
        known = [place for place in found if place.error is None]
        here = [place for place in known if place.offset >= 0]
        ends = zip(here, _edges(here, OFFSET_END, ask), strict=True)
        beyond = {(place.topic, place.partition): place.offset for place, end in ends if end is not None and end < place.offset}
        return {(place.topic, place.partition) for place in known if place.offset < 0}, beyond

    def ended_before(self, partition: Partition, end: int) -> OffsetsLost:
        """The error for a partition that ends before the group's offset."""
        return OffsetsLost(
            f"the group's offset of {_where(TopicPartition(*partition))} is beyond its end, which is {end}: the topic was "
            "deleted and made anew while it was read, and nothing of what it holds was handled; or it has lost its last "
            f"records, and all that it holds was. Find out which, decide where to go on, and set it {self.how_to_set}."
        )

    def kept_by_group(self, partitions: Iterable[Partition], ask: Ask) -> list[TopicPartition]:
        """What the group has committed of those of which nothing is stored: it counts there, and may expire. Raises so, too."""
        wanted = set(partitions)
        if self.stored is not None:
            wanted -= self.stored.offsets(wanted).keys()
        return self.committed(wanted, ask)

    def _stored_or(self, committed: list[TopicPartition], stored: Stored, ask: Ask) -> list[TopicPartition]:
        """The offsets that are stored beside the effects, and the group's where nothing was ever stored."""
        offsets = stored.offsets((place.topic, place.partition) for place in committed)
        self._kept |= {(p.topic, p.partition) for p in committed if p.offset < 0} & self._seen & offsets.keys()
        # the epoch is not stored; the group has it with the same offset, where a run has ended in order
        epochs = {(place.topic, place.partition, place.offset): epoch_of(place) for place in committed}
        found = [TopicPartition(*p, offset, leader_epoch=epochs.get((*p, offset), -1)) for p, offset in offsets.items()]
        ends = _edges(found, OFFSET_END, ask)
        for place, end in zip(found, ends, strict=True):
            if end is not None and place.offset > end:
                raise OffsetBeyondEnd(
                    f"the inbox is at offset {place.offset} of {_where(place)}, which ends at {end}. Records that were handled "
                    "are not in the topic any more (an unclean leader election, a restored cluster). Nothing was handled. Find "
                    "out what was lost; then set the offset in the inbox's table."
                )
        self._tell(
            [p for p in committed if p.metadata != stored.mark and p.offset > offsets.get((p.topic, p.partition), p.offset)]
        )
        others = [place for place in committed if (place.topic, place.partition) not in offsets]
        for place in others:
            if place.metadata == stored.mark and place.offset >= 0:
                raise OffsetsLost(
                    f"the group has come to offset {place.offset} of {_where(place)} with an inbox, and this inbox knows "
                    "nothing of it: it is another database, or an older state of it, without the effects. Nothing was handled. "
                    f"Give the right database; or say where to go on, {self._reset}."
                )
        return [*(place for place, end in zip(found, ends, strict=True) if end is not None), *others]

    def _tell(self, ahead: Sequence[TopicPartition]) -> None:
        """Say once that somebody has set the group's offsets, and that these do not count.

        An inbox never commits one that is ahead of it. One that is behind may be from before the inbox, or where a group began,
        if what came after was not committed any more: that says nothing.
        """
        new = [place for place in ahead if (place.topic, place.partition, place.offset) not in self._told]
        if new:
            self._told.update((place.topic, place.partition, place.offset) for place in new)
            log.warning(
                "%s: the group's offsets were set ahead of the inbox's, not by an inbox (kafka-consumer-groups.sh "
                "--reset-offsets, or a run without it). They do not count: messages from the inbox's offsets on are handled. "
                "To go on elsewhere, stop all instances, and set it %s.",
                named((place.topic, place.partition) for place in new),
                self.how_to_set,
            )

    def _choose(self, fresh: list[TopicPartition], ask: Ask) -> list[TopicPartition]:
        """Fill in where partitions begin that the group has no committed offset of, as far as that is known.

        Returns what is to be committed of that.
        """
        lost = [place for place in fresh if (place.topic, place.partition) in self._seen]
        for place in lost:
            if _exists(place.topic, ask):
                raise OffsetsLost(
                    f"the group's committed offset of {_where(place)} is gone: it expired or was deleted while this process "
                    "ran. Nothing was committed. Going on from the start would repeat messages, from the end lose them: "
                    f"decide, and set it {self._reset}."
                )
        fresh = [place for place in fresh if place not in lost]
        began: dict[str, int] = {}
        if self._start == "latest":
            began = {topic: self._began_with(topic, ask) for topic in {place.topic for place in fresh}}
        at_end = [
            p
            for p in fresh
            if p.partition < max(began.get(p.topic, 0), self._counts.get(p.topic, 0))
            or (p.topic, p.partition) in self._undecided
        ]
        self._undecided.update((place.topic, place.partition) for place in at_end)
        at_beginning = [place for place in fresh if place not in at_end]
        for places, edge in ((at_beginning, OFFSET_BEGINNING), (at_end, OFFSET_END)):
            for place, offset in zip(places, _edges(places, edge, ask), strict=True):
                place.offset = OFFSET_INVALID if offset is None else offset
        starts = [*at_beginning, *(_marked(place, began.get(place.topic, 0)) for place in at_end)]
        decided = [place for place in starts if place.offset >= 0]
        self._begun.update(((place.topic, place.partition), place.metadata) for place in decided if place.metadata)
        return decided

    def marked(self, offsets: Iterable[TopicPartition]) -> list[TopicPartition]:
        """Offsets as they are to be committed: with what was said of a start a moment ago, for those who begin now."""
        places = list(offsets)
        if not self._begun:
            return places
        self._begun = {partition: said for partition, said in self._begun.items() if _began_lately(said)}
        return [place if place.metadata else saying(self._begun.get((place.topic, place.partition)), place) for place in places]

    def _began_with(self, topic: str, ask: Ask) -> int:
        """How many partitions a topic had when the group began to read it; 0: it has read it before.

        What has no offset of the others was added since, and its first messages must not be skipped (C11).
        """
        numbers = _numbers(topic, ask)
        committed = self.committed([(topic, number) for number in numbers], ask)
        if len(committed) == len(numbers) and all(place.offset == OFFSET_INVALID for place in committed):
            return len(numbers)
        return max((_began_lately(place.metadata) for place in committed), default=0)


def _marked(start: TopicPartition, count: int) -> TopicPartition:
    """The end of a partition as it is committed, for those who begin together with us. ``count``: of partitions; 0: unknown.

    With the time: later a partition that has no offset may have lost it, and what came since must not be skipped.
    """
    if not count:
        return start
    return saying(f"kafka-guarantees began with {count} partitions at {time.time():.0f}", start)


def _began_lately(metadata: str | None) -> int:
    """With how many partitions a group began, where that was a moment ago; 0: nobody knows of any."""
    mark = _BEGAN.fullmatch(metadata or "")
    return int(mark[1]) if mark is not None and abs(time.time() - int(mark[2])) < TOGETHER else 0


def _metadata(topic: str, ask: Ask) -> Any:
    return ask(lambda raw, within: raw.list_topics(topic, timeout=within)).topics[topic]


def _numbers(topic: str, ask: Ask) -> Sequence[int]:
    """The partitions of a topic. Raises KafkaException where the brokers cannot tell: none is not what they say then."""
    found = _metadata(topic, ask)
    if found.error is not None and found.error.code() not in NO_TOPIC:
        raise KafkaException(found.error)
    return list(found.partitions)


def _exists(topic: str, ask: Ask) -> bool:
    """Whether it was not deleted: its offsets go with it."""
    error = _metadata(topic, ask).error
    return error is None or error.code() not in NO_TOPIC


def _edges(places: Sequence[TopicPartition], edge: int, ask: Ask) -> list[int | None]:
    """Where these partitions begin, or end: one question for all of them, for there may be hundreds. None: it has no leader."""
    wanted = [TopicPartition(place.topic, place.partition, edge) for place in places]
    try:
        offsets = _asked(wanted, ask)
    except KafkaException:
        topics = {topic: _metadata(topic, ask).partitions for topic in {place.topic for place in places}}
        led = [p for p in wanted if p.partition in topics[p.topic] and topics[p.topic][p.partition].leader >= 0]
        if len(led) == len(wanted):
            raise  # no answer for another reason
        offsets = _asked(led, ask)
    return [offsets.get((place.topic, place.partition)) for place in places]


def _asked(wanted: Sequence[TopicPartition], ask: Ask) -> dict[Partition, int]:
    if not wanted:
        return {}
    found: list[TopicPartition] = ask(lambda raw, within: raw.offsets_for_times(list(wanted), within))
    for place in found:
        if place.error is not None:
            raise KafkaException(place.error)
    return {(place.topic, place.partition): place.offset for place in found}


def _where(place: TopicPartition) -> str:
    return f"topic {place.topic!r} partition {place.partition}"
