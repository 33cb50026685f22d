"""Whether the group still has the offsets of partitions from which nothing comes: a topic that is deleted takes them along.

Rules.
* librdkafka 2.16 does not notice that a topic was deleted and made anew, but with KIP-848: it takes no metadata with a leader
  epoch below the one it knows, and so it asks for records of the topic that was, for ever, without an event.
* Asked for is what has not moved between two looks: of the rest something may be on its way to the group.
* Where a member commits what it has in hand in that moment, the new topic takes it: then the group's offset is beyond its end.
  At two looks: a leader that was just elected may not know all of its end. Behind the end of what is committed a group may be
  as well, where somebody has set it there while a transaction is open: the end of all records counts.
* An offset that has vanished is only named here. Whoever puts it right finds out what that means.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import TimeoutError  # noqa: A004 - before Python 3.11 it is another one than the builtin
from typing import TYPE_CHECKING, Any

from confluent_kafka import IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined] # not re-exported by its stubs

from ._client import Handle
from ._offsets import named
from .errors import BrokerError, KafkaGuaranteesError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._offsets import Partition
    from ._places import Ask, Places
    from ._settings import Settings

log = logging.getLogger("kafka_guarantees")

EVERY = 30.0  # seconds between two looks
ANSWER = 2.0  # seconds


class Vanished:
    """What is known of the last look.

    Args:
        settings: of the client.
        places: of the group.
    """

    def __init__(self, settings: Settings, places: Places) -> None:
        self._settings = settings
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
            vanished, beyond = self._places.vanished(quiet, ask)
        except (KafkaException, BrokerError) as exc:
            log.info("whether the group still has its offsets is not known: %s", exc)
            return set()
        try:
            ends = _ends(self._settings, beyond.keys() & self._beyond)
        except (KafkaException, KafkaGuaranteesError, TimeoutError) as exc:
            # perhaps files with certificates are being replaced
            log.info("where %s end is not known: %s", named(beyond), exc)
            return vanished
        for partition, end in ends.items():
            if end < beyond[partition]:
                raise self._places.ended_before(partition, end)
        self._beyond = set(beyond)
        return vanished


def _ends(settings: Settings, partitions: Iterable[Partition]) -> dict[Partition, int]:
    """Where all records of these end, committed or not."""
    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    wanted = {TopicPartition(*partition): latest for partition in partitions}
    if not wanted:
        return {}
    handle, until = Handle(), time.monotonic() + ANSWER + 1
    handle.make(AdminClient, {**settings.admin, "log_level": 0})
    try:
        asked = handle.raw.list_offsets(wanted, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=ANSWER)
        found = {place: answer.result(max(0.0, until - time.monotonic())).offset for place, answer in asked.items()}
    finally:
        handle.let_go()
    return {(place.topic, place.partition): offset for place, offset in found.items()}
