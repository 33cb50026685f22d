"""What becomes of records, counted portion by portion. Pure; no I/O."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException

from .errors import delivery_failure, report_lost

if TYPE_CHECKING:
    from collections.abc import Callable

    from confluent_kafka import KafkaError, Message

    from .errors import KafkaGuaranteesError


class Posted:
    """What becomes of records that were given to librdkafka together: how many are on their way, and which were not written.

    Attributes:
        on_way: as long as there are records without a report. A list, since several threads send and serve: ``append()`` and
            ``pop()`` are atomic, ``+=`` is not.
        failed: whether one was not written, or may not have been. For good: nothing is committed past it.

    Args:
        note: told of each that was not written, or may not have been.
    """

    __slots__ = ("_note", "failed", "on_way")

    def __init__(self, note: Callable[[KafkaGuaranteesError], None]) -> None:
        self.on_way: list[None] = []
        self.failed = False
        self._note = note

    def reported(self) -> None:
        """One is not on its way any more. Never raises, as its callers do not (P12)."""
        with suppress(IndexError):  # it was given up as lost before
            self.on_way.pop()

    def lose(self) -> None:
        """No report will come: an exception out of a signal handler destroyed it."""
        lost = len(self.on_way)
        self.failed = self.failed or lost > 0
        for _ in range(lost):
            self._note(report_lost())
        del self.on_way[:lost]

    def abandon(self) -> None:
        """The messages that these came from are handled again: what becomes of them is told to nobody."""
        self._note = _told_to_nobody

    def fail(self, failure: KafkaGuaranteesError) -> None:
        """Note one that was not written."""
        self.failed = True
        self._note(failure)

    def report(self, error: KafkaError | None, message: Message) -> None:
        """A delivery callback for those that nobody asks about one by one: it never raises (P12)."""
        if error is not None:
            failure = delivery_failure(error, message.topic() or "?", message.partition())
            failure.__cause__ = KafkaException(error)
            self.fail(failure)
        try:  # noqa: SIM105 - for each record: no more calls than are needed
            self.on_way.pop()  # last: an exception out of a signal handler leaves it there
        except IndexError:
            pass


def _told_to_nobody(_failure: KafkaGuaranteesError) -> None:
    pass
