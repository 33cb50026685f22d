"""The ids of messages as stores and inboxes need them, by an extractor that nobody vouches for (S04)."""

from __future__ import annotations

from itertools import groupby, repeat
from operator import methodcaller
from typing import TYPE_CHECKING, Literal, NamedTuple

from .._collector import collector_rests
from .._offsets import where
from .._printable import text_of
from ..dedup.contract import Entry, Source
from ..dedup.ids import OFFSET_SIZE, POSITION, fingerprint_of, key_of, partition_of, position_of
from ..errors import MessageIdMissing, MessageIdReused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from confluent_kafka import Message

    from .._offsets import Partition
    from ..dedup.ids import Id, IdOf
    from ..errors import KafkaGuaranteesError

OnMissingId = Literal["raise", "position", "process"]


class Problem(NamedTuple):
    """A message that must not be handled, and why."""

    message: Message
    error: KafkaGuaranteesError


class MessageIds:
    """The ids of messages, by an extractor that nobody vouches for. ``Reading`` has looked at their headers before (S04).

    Args:
        extractor: of the user. None: messages have no ids, only places.
        on_missing: what a message without an id is: an error, the record at its place, or a message without protection.
        topic_id: asks the brokers for the id of a topic.
        fingerprint: whether to notice an id that is used for another message.
    """

    def __init__(
        self, extractor: IdOf | None, on_missing: OnMissingId, topic_id: Callable[[str], bytes], *, fingerprint: bool
    ) -> None:
        self._extractor = extractor
        self._on_missing = on_missing
        self._fingerprint = fingerprint and extractor is not None
        self.topic_id = topic_id

    def fingerprints_of(self, messages: Iterable[Message]) -> Iterator[bytes]:
        """What tells a message from another one with its id; without an end, where they are not compared."""
        return map(fingerprint_of, messages) if self._fingerprint else repeat(b"")

    def place_of(self, message: Message) -> bytes:
        """What stands for the place of a record."""
        topic, partition, offset = place(message)
        return position_of(self.topic_id(topic), partition, offset)

    def places_of(self, messages: Sequence[Message]) -> list[bytes]:
        """The same of many records, which come in runs of one partition each, as a rule."""
        places: list[bytes] = []
        for (topic, partition), run in groupby(messages, _partition):
            part = partition_of(self.topic_id(topic), partition)
            places += [part + offset.to_bytes(OFFSET_SIZE, "big") for offset in map(_offset, run)]
        return places

    def keys(self, messages: Sequence[Message]) -> tuple[list[bytes | None], MessageIdMissing | None]:
        """The keys of the messages before the first that has no id and must have one, and what is wrong with that one."""
        keys: list[bytes | None] = []
        for message in messages:
            try:
                keys.append(self.key(message))
            except MessageIdMissing as error:
                return keys, error
        return keys, None

    def key(self, message: Message) -> bytes | None:
        """The key of a message; None: it is handled without protection.

        Raises:
            MessageIdMissing: it has no id, and must have one.
        """
        if self._extractor is None:
            return None
        try:
            found: Id = self._extractor(message)
        except Exception as error:
            raise _without_id(message, f"message_id raised {type(error).__name__}: {text_of(error)}.") from error
        if isinstance(found, (str, bytes)):
            if found:
                return key_of(found)
        elif found is not None and found is not POSITION:
            raise _without_id(message, f"message_id returned {type(found).__name__}, not str or bytes.")
        if found is not POSITION:
            if self._on_missing == "process":
                return None
            if self._on_missing == "raise":
                raise _without_id(
                    message,
                    'Correct its producer; or say with on_missing_id that such a message is the record at its "position", or '
                    'is to be handled ("process") without protection from repeats.',
                )
        return self.place_of(message)


_NOT_HANDLED = "It was not handled."


def _without_id(message: Message, more: str) -> MessageIdMissing:
    return MessageIdMissing(f"{_where(message)} has no id. {_NOT_HANDLED} {more}")


def place(message: Message) -> tuple[str, int, int]:
    """Topic, partition and offset of a message that was consumed."""
    return message.topic(), message.partition(), message.offset()  # type: ignore[return-value]  # it has all of them


def _partition(message: Message) -> Partition:
    return message.topic(), message.partition()  # type: ignore[return-value]  # as above


_offset: Callable[[Message], int] = methodcaller("offset")


def _where(message: Message) -> str:
    return f"the message at {where(message)}"


def reused_id(message: Message) -> MessageIdReused:
    """The error for a message that has the id of another one."""
    return MessageIdReused(
        f"{_where(message)} has the id of another message, with another key or value. {_NOT_HANDLED} Two messages must not "
        "have one id: correct the producer, or take the id from somewhere else (message_id). Where the same message may come "
        "with another value, say fingerprint=False: only the first is handled then."
    )


def entry_of(message: Message, ids: MessageIds) -> Entry:
    """A message as an inbox sees it, without an id."""
    topic, partition, offset = place(message)
    return Entry(Source(topic, ids.topic_id(topic), partition), offset, None)


def entries_of(messages: Sequence[Message], ids: MessageIds) -> tuple[list[Entry], Problem | None]:
    """The messages as an inbox sees them, before the first that has no id and must have one."""
    entries: list[Entry] = []
    with collector_rests:
        for (topic, partition), run in groupby(messages, _partition):
            source, of_run = Source(topic, ids.topic_id(topic), partition), list(run)
            for message, fingerprint in zip(of_run, ids.fingerprints_of(of_run), strict=False):
                try:
                    entries.append(Entry(source, _offset(message), ids.key(message), fingerprint))
                except MessageIdMissing as error:
                    return entries, Problem(message, error)
    return entries, None
