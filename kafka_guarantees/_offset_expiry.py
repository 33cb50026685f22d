"""Offsets that have not moved are committed again: a quiet partition's would expire, and what it still holds come again.

And those behind which only the markers of transactions are, are moved to the end: once retention takes these, the offset would
be before the log, as if records had been deleted unread, and each start would end with ``OffsetsLost``.

Rules.
* A group of KIP-848 expires each offset by the time of its commit, once it has no member; others by when that was. So only a
  member of such a group does this: when it is assigned partitions, and every REFRESH seconds.
* What is committed again is what the group has just said, by the same membership, and soon: else somebody else may be further
  on (M03).
* It may fail: it is tried again.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException, TopicPartition

from ._offsets import epoch_of
from .errors import BrokerError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from ._offsets import Membership, Partition
    from ._places import Ask, Places

    Commit = Callable[[list[TopicPartition], Collection[float]], None]

log = logging.getLogger("kafka_guarantees")

REFRESH = 3600.0  # seconds after which offsets that have not moved are committed again
SOON = 1.0  # seconds until that is tried again after an answer that came late
AGAIN = 60.0  # seconds until that is tried again after it failed
MARKERS = 30.0  # seconds between two looks for ends that are further on than what was handled


class Refresh:
    """When that is due, for one member and the one that takes over.

    Args:
        places: of the group. What is stored elsewhere does not expire.
        late: seconds after which the group may have given the partitions to others.
    """

    def __init__(self, places: Places, late: float) -> None:
        self._places = places
        self._late = late
        self._at = math.inf  # until partitions are assigned
        self._unmoved: dict[Partition, int] = {}  # what was committed when that was looked at last
        self._look_at = time.monotonic() + MARKERS
        self._passed: dict[Partition, int] = {}  # ends up to which the group is

    def begin(self) -> None:
        """Partitions were assigned."""
        self._at = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self._at

    def commit(
        self,
        partitions: set[Partition],
        membership: Callable[[], Membership],
        ask: Ask,
        commit: Commit,
    ) -> None:
        """Commit once more where nothing was committed since this was done last.

        Args:
            partitions: that are owned, and fetched. Nothing of them is on its way to the group.
            membership: at this moment.
            ask: for a short answer.
            commit: takes as well how long such an answer takes.
        """
        self._at = time.monotonic() + REFRESH
        try:
            places, usual = self._said(partitions, membership, ask)
            if usual > self._late:
                self._at = time.monotonic() + SOON
                return
            quiet = [p for p in places if self._unmoved.get((p.topic, p.partition), p.offset) == p.offset]
            if quiet:
                commit(quiet, (usual,))
            self._unmoved = {(place.topic, place.partition): place.offset for place in places}
        except (KafkaException, BrokerError, StoreUnavailable) as exc:
            self._at = time.monotonic() + AGAIN
            log.info("offsets that have not moved were not committed again: %s", exc)

    def _said(
        self, partitions: Collection[Partition], membership: Callable[[], Membership], ask: Ask
    ) -> tuple[list[TopicPartition], float]:
        """What the group has committed, and the seconds it took to say so: too many where others may be further on (M03)."""
        began, member = time.monotonic(), membership()
        places = [place for place in self._places.kept_by_group(partitions, ask) if place.offset >= 0]
        usual = time.monotonic() - began
        return places, usual if membership().continues(member) else math.inf

    @property
    def markers_due(self) -> bool:
        """Whether it is time to look at ends."""
        return time.monotonic() >= self._look_at

    def behind(self, ends: Mapping[Partition, tuple[int, int]]) -> dict[Partition, tuple[int, int]]:
        """Of which of these is to be asked whether the group is at their end. It needs no broker.

        Args:
            ends: see ``Assignment``.
        """
        self._look_at = time.monotonic() + MARKERS
        return {p: (position, end) for p, (position, end) in ends.items() if position < end != self._passed.get(p)}

    def pass_markers(
        self,
        behind: Mapping[Partition, tuple[int, int]],
        membership: Callable[[], Membership],
        ask: Ask,
        commit: Commit,
    ) -> None:
        """Commit these ends, where all that came before them is committed. Arguments as for ``commit``."""
        try:
            places, usual = self._said(behind, membership, ask)
            if usual > self._late:
                return
            moved = []
            for place in places:
                partition = (place.topic, place.partition)
                position, end = behind[partition]
                if place.offset < end and (position < 0 or position == place.offset):
                    moved.append(TopicPartition(*partition, end, leader_epoch=epoch_of(place)))
            if moved:
                commit(moved, (usual,))
            done = {(place.topic, place.partition): place.offset for place in (*places, *moved)}
            self._passed.update((p, end) for p, (_, end) in behind.items() if done.get(p, -1) >= end)
        except (KafkaException, BrokerError, StoreUnavailable) as exc:
            log.info("offsets behind which only markers are were not moved: %s", exc)
