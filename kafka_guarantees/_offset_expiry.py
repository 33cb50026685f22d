"""Offsets that have not moved are committed again: a quiet partition's would expire, and what it still holds come again.

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

from .errors import BrokerError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from ._offsets import Membership, Partition
    from ._places import Ask, Places

log = logging.getLogger("kafka_guarantees")

REFRESH = 3600.0  # seconds after which offsets that have not moved are committed again
SOON = 1.0  # seconds until that is tried again after an answer that came late
AGAIN = 60.0  # seconds until that is tried again after it failed


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
        commit: Callable[[list[TopicPartition], Collection[float]], None],
    ) -> None:
        """Commit once more where nothing was committed since this was done last.

        Args:
            partitions: that are owned, and fetched. Nothing of them is on its way to the group.
            membership: at this moment.
            ask: for a short answer.
            commit: takes as well how long such an answer takes.
        """
        began, member = time.monotonic(), membership()
        self._at = began + REFRESH
        try:
            places = [place for place in self._places.kept_by_group(partitions, ask) if place.offset >= 0]
            quiet = [p for p in places if self._unmoved.get((p.topic, p.partition), p.offset) == p.offset]
            usual = time.monotonic() - began
            if usual > self._late or not membership().continues(member):
                self._at = began + SOON  # M03: somebody else may be further on by now
                return
            if quiet:
                commit(quiet, (usual,))
            self._unmoved = {(place.topic, place.partition): place.offset for place in places}
        except (KafkaException, BrokerError, StoreUnavailable) as exc:
            self._at = time.monotonic() + AGAIN
            log.info("offsets that have not moved were not committed again: %s", exc)
