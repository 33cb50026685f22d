"""What becomes of the records of a portion, which nobody asks about one by one. Pure counting; no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import concluded, delivery_failure
from .records import report_lost

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Message

    from .errors import KafkaGuaranteesError


class Posted:
    """What becomes of records that nobody asks about one by one: how many there are, and which were not written.

    Attributes:
        sent: how many were given to librdkafka; counted by the one thread that does.
        failed: whether one was not written, or may not have been. For good: nothing is committed past it.

    Args:
        failures: to note these in, until somebody has looked at them.
    """

    __slots__ = ("_failures", "_known", "failed", "sent")

    def __init__(self, failures: list[KafkaGuaranteesError]) -> None:
        self.sent = 0
        self.failed = False
        self._failures = failures
        self._known: list[None] = []  # one for each report: several threads serve them, and append() is atomic, += is not

    @property
    def unknown(self) -> int:
        """How many have not been reported on."""
        return max(0, self.sent - len(self._known))  # a report may come although it was taken for lost

    def lose(self) -> None:
        """No report will come: an exception out of a signal handler destroyed it."""
        self.failed = self.failed or self.unknown > 0
        self._failures += [report_lost()] * self.unknown
        self.sent = len(self._known)

    def abandon(self) -> None:
        """The messages that these came from are handled again: what becomes of them is told to nobody."""
        self._failures = []

    def fail(self, failure: KafkaGuaranteesError) -> None:
        """Note one that was not written."""
        self.failed = True
        self._failures.append(failure)

    def report(self, error: KafkaError | None, message: Message) -> None:
        """The delivery callback: it never raises (P12)."""
        if error is not None:
            self.fail(delivery_failure(error, message.topic() or "?", message.partition()))
        elif message.offset() is None:
            self.fail(concluded(message.topic() or "?", message.partition()))
        self._known.append(None)  # last: an exception out of a signal handler leaves it unknown
