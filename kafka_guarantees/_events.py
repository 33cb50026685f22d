"""What comes in place of a message: the end of a partition, or an error. Never data (C14).

Rules.
* Errors that pass by themselves are logged; those that do not end the run.
* Whoever calls this has messages in hand that came before: they are not lost by what it raises.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException

from ._client import Rarely
from ._group_client import SAFE
from .errors import NO_TOPIC, OffsetsLost, broker_failure, describe, stops

if TYPE_CHECKING:
    from confluent_kafka import Message

    from ._assignment import Assignment
    from ._places import Places
    from ._settings import Settings
    from ._topics import Topics

log = logging.getLogger("kafka_guarantees")


class Events:
    """Those that the member of a group is told of.

    Args:
        settings: the resolved settings of the guarantee.
        assignment: to note ends in.
        topics: of the run.
        places: say what to do where an offset is not in the log.
    """

    def __init__(self, settings: Settings, assignment: Assignment, topics: Topics, places: Places) -> None:
        self._settings = settings
        self._group = settings.group_id
        self._assignment = assignment
        self._topics = topics
        self._places = places
        self._rarely = Rarely()

    def heed(self, event: Message, error: KafkaError) -> None:
        """Do what one asks for, which has come in place of a message.

        Raises:
            OffsetsLost, AuthorizationError, BrokerError: the run cannot go on.
        """
        code = error.code()
        where = f"as a member of group {self._group!r}" if event.topic() is None else f"topic {event.topic()!r}"
        where += "" if event.topic() is None or event.partition() is None else f" partition {event.partition()}"
        if code == KafkaError._PARTITION_EOF:
            self._assignment.ends_at((event.topic() or "", event.partition() or 0), event.offset() or 0)
            return
        if code == KafkaError._AUTO_OFFSET_RESET:
            raise OffsetsLost(
                f"{where}: {error.str()}. The group's position is not in the log any more: records were deleted before they "
                "were handled, or only the markers of transactions came behind it, or the topic was made anew. Nothing was "
                f"committed. Decide where to go on, and set it {self._places.how_to_set}."
            )
        if code in NO_TOPIC and event.topic() in self._topics.names:
            self._topics.require([event.topic() or ""])
        elif code in NO_TOPIC:  # one that a pattern has found, and that is gone
            if self._rarely(event.topic()):
                log.warning("consuming %s: %s", where, describe(error))
        elif stops(error):
            at = "" if event.offset() is None or (event.offset() or 0) < 0 else f" at offset {event.offset()}"
            doing = f"consuming {where}" if event.topic() is None else f"consuming {where}{at}"
            failure = broker_failure(error, doing, SAFE, topic=event.topic(), group=self._group)
            raise failure from KafkaException(error)
        elif code == KafkaError._MAX_POLL_EXCEEDED:
            log.error(
                "the handler took longer than max.poll.interval.ms (%.0f s): the group gave the partitions to others, and "
                "what was in hand comes again, unless that is at most once. Say keep_alive=True; or make the interval longer, "
                "or batches smaller (max_batch).",
                self._settings.max_poll_interval,
            )
        else:
            log.warning("consuming %s: %s", where, describe(error))
