"""Whether the group still has the offsets of partitions from which nothing comes: a topic that is deleted takes them along.

Rules.
* librdkafka 2.16 does not notice that a topic was deleted and made anew, but with KIP-848: it takes no metadata with a leader
  epoch below the one it knows, and so it asks for records of the topic that was, for ever, without an event.
* Asked for is what has not moved between two looks: of the rest something may be on its way to the group.
* Where a member commits what it has in hand in that moment, the new topic takes it: then the group's offset is beyond its end.
  At two looks: a leader that was just elected may not know all of its end.
* An offset that has vanished is only named here. Whoever puts it right finds out what that means.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException, TopicPartition

from .errors import BrokerError

if TYPE_CHECKING:
    from ._offsets import Partition
    from ._places import Ask, Places

log = logging.getLogger("kafka_guarantees")

EVERY = 30.0  # seconds between two looks


class Vanished:
    """What is known of the last look.

    Args:
        places: of the group.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._at = time.monotonic() + EVERY
        self._positions: dict[Partition, int] = {}
        self._beyond: set[Partition] = set()  # at the last look

    @property
    def due(self) -> bool:
        """Whether it is time to look."""
        return time.monotonic() >= self._at

    def look(self, raw: Any, partitions: set[Partition], ask: Ask) -> set[Partition]:
        """Those that are quiet, and whose offset the group had and has no more.

        Args:
            raw: the C consumer.
            partitions: that are fetched.
            ask: for a short answer.

        Raises:
            OffsetsLost: a partition ends before the group's offset.
        """
        self._at = time.monotonic() + EVERY
        before = self._positions
        try:
            here = raw.position([TopicPartition(*partition) for partition in partitions])
            self._positions = {(place.topic, place.partition): place.offset for place in here}
            quiet = {p for p, offset in self._positions.items() if before.get(p) == offset}
            vanished, ends = self._places.vanished(quiet, ask)
        except (KafkaException, BrokerError) as exc:
            log.info("whether the group still has its offsets is not known: %s", exc)
            return set()
        for partition in ends.keys() & self._beyond:
            raise self._places.ended_before(partition, ends[partition])
        self._beyond = set(ends)
        return vanished
