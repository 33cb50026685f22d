"""Between bytes and what handlers see: confluent-kafka's serializers and deserializers, and messages that cannot be read.

Rules.
* The headers of every message are read here first, once: where a name is not UTF-8, confluent-kafka raises, and asked a second
  time it gives a list that crashes the process (S04).
* What cannot be read is a failure of its message, not of the run: tried again, or set aside, as if the handler had raised.
* The bytes as they came are kept for as long as the batch is in hand: they are what a dead letter holds.
* ``None`` is left alone: a tombstone and a missing key are no data.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from confluent_kafka import Message
from confluent_kafka.serialization import MessageField, SerializationContext, SerializationError

from ._collector import collector_rests
from ._futile import may_pass
from .records import Record, leave, misfit, pairs, records_in

if TYPE_CHECKING:
    from .records import Records

T = TypeVar("T")

Serializer = Callable[[Any, SerializationContext], "bytes | str | None"]
Deserializer = Callable[[bytes, SerializationContext], Any]
Raw = tuple[Any, Any]  # key and value, as they came

AT_ONCE = 1.0  # seconds
NOT_YET = Exception("it was not read yet")


class HeadersLost(ValueError):
    """A header's name is not UTF-8: confluent-kafka cannot give the headers of this message to anybody."""


class Reading:
    """Makes the messages of a batch readable.

    Args:
        key: makes an object of a key's bytes.
        value: the same for values.
    """

    def __init__(self, key: Deserializer | None, value: Deserializer | None) -> None:
        for name, given in (("key_deserializer", key), ("value_deserializer", value)):
            _check(name, given, "the bytes")
        self._key = key
        self._value = value
        self._raw: dict[int, tuple[Message, Raw]] = {}  # by the identity of a message, which the entry keeps alive
        self.unreadable: dict[int, Exception] = {}  # why, by the identity of a message of the batch in hand

    def begin(self, messages: Sequence[Message]) -> None:
        """Look at the headers of a new batch, before anybody else does, and forget the last one; of no messages, only that."""
        if self._raw:
            self._raw.clear()
        if self.unreadable:
            self.unreadable.clear()
        left = iter(messages)
        while left.__length_hint__():  # type: ignore[attr-defined]  # iterators of sequences have it
            try:
                with collector_rests:
                    deque(map(Message.headers, left), 0)
            except (SystemError, UnicodeDecodeError) as error:
                message = messages[len(messages) - left.__length_hint__() - 1]  # type: ignore[attr-defined]
                message.set_headers([])  # never asked a second time
                lost = HeadersLost("a header's name is not UTF-8, so that the headers cannot be read")
                lost.__cause__ = error
                self.unreadable[id(message)] = lost

    def open(self, messages: Sequence[Message], *, whole: bool = False) -> None:
        """Deserialize messages of the batch: all, or as many as can be within AT_ONCE, and those that are left in their turn.

        A registry that does not answer takes its time with each of thousands, while nobody serves the group.
        """
        if self._key is None and self._value is None:
            return
        until = math.inf if whole else time.monotonic() + AT_ONCE
        for number, message in enumerate(messages):
            if self.unreadable.get(id(message), NOT_YET) is not NOT_YET:
                continue
            try:
                self._open(message)
            except Exception as error:  # noqa: BLE001 - raised when its turn comes, as if the handler had raised it
                self.unreadable[id(message)] = error
            else:
                self.unreadable.pop(id(message), None)
            if time.monotonic() > until:
                for left in messages[number + 1 :]:
                    self.unreadable.setdefault(id(left), NOT_YET)
                return

    def _open(self, message: Message) -> None:
        if id(message) in self._raw:
            return
        raw = message.key(), message.value()
        topic, headers = message.topic() or "", message.headers()
        key, value = raw
        if self._key is not None and key is not None:
            key = self._key(key, SerializationContext(topic, MessageField.KEY, headers))
        if self._value is not None and value is not None:
            value = self._value(value, SerializationContext(topic, MessageField.VALUE, headers))
        self._raw[id(message)] = message, raw
        message.set_key(key)
        message.set_value(value)

    def check(self, message: Message) -> None:
        """Raise why a message cannot be read. Unless it is the bytes, it is read again: a schema registry may be back."""
        error = self.unreadable.get(id(message))
        if error is not None:
            if isinstance(error, (HeadersLost, SerializationError)) and not may_pass(error):
                raise error
            self._open(message)
            del self.unreadable[id(message)]

    def readable(self, messages: Sequence[Message]) -> int:
        """How many of these, from the first on, can be read."""
        if not self.unreadable:
            return len(messages)
        if messages and self.unreadable.get(id(messages[0])) is NOT_YET:
            self.open(messages)
        return next((number for number, message in enumerate(messages) if id(message) in self.unreadable), len(messages))

    def checked(self, handler: Callable[..., T]) -> Callable[..., T]:
        """A handler of one message that raises where the message cannot be read; itself, where all of the batch can."""
        if not self.unreadable:
            return handler

        def read_first(message: Message, *more: object) -> T:
            self.check(message)
            return handler(message, *more)

        return read_first

    def raw(self, message: Message) -> Raw | None:
        """Key and value as they came, where a deserializer has replaced them."""
        entry = self._raw.get(id(message))
        return None if entry is None else entry[1]

    def headers_lost(self, message: Message) -> bool:
        """Whether the headers of a message of the batch cannot be read."""
        return isinstance(self.unreadable.get(id(message)), HeadersLost)


class Writing:
    """Serializes records.

    Args:
        key: makes bytes of a key.
        value: the same for values.
    """

    def __init__(self, key: Serializer | None, value: Serializer | None) -> None:
        for name, given in (("key_serializer", key), ("value_serializer", value)):
            _check(name, given, "an object")
        self._key = key
        self._value = value
        self.needed = key is not None or value is not None

    def serialize(self, record: Record) -> Record:
        """The record with bytes in it; itself, where nothing is to be serialized. Whatever a serializer raises is raised."""
        if not self.needed:
            return record
        headers: list[Any] = [*pairs(record.headers)]
        key, value = record.key, record.value
        if self._key is not None and key is not None:
            key = self._key(key, SerializationContext(record.topic, MessageField.KEY, headers))
        if self._value is not None and value is not None:
            value = self._value(value, SerializationContext(record.topic, MessageField.VALUE, headers))
        # some serializers put the id of a schema into the headers
        return Record(record.topic, value, key, headers=headers or None, partition=record.partition, timestamp=record.timestamp)

    def records(self, result: Records) -> list[Record]:
        """What a handler returned, as it is produced, and so that nothing the handler does later changes it.

        Raises:
            NotRecords: it is something else.
            Exception: whatever a generator of the handler, or a serializer, raises.
        """
        made: list[Record] = []
        try:
            for given in records_in(result):  # one after the other: a generator may use again what it has yielded
                record = self.serialize(given) if self.needed else given
                value, key = record.value, record.key
                changing = value.__class__ is not bytes and isinstance(value, _CHANGING)
                if changing or record.headers is not None or (key.__class__ is not bytes and isinstance(key, _CHANGING)):
                    record = _fixed(record)
                made.append(record)
        except BaseException:
            leave(result)
            raise
        return made

    def made_by(self, handler: Callable[..., Records]) -> Callable[..., list[Record]]:
        """A handler that returns what ``records`` makes of what it returns."""
        return lambda *given: self.records(handler(*given))


def _fixed(record: Record) -> Record:
    """The record without what can be changed in place."""
    headers = None if record.headers is None else [(name, _copied(content)) for name, content in pairs(record.headers)]
    return Record(
        record.topic,
        _copied(record.value),
        _copied(record.key),
        headers=headers,
        partition=record.partition,
        timestamp=record.timestamp,
    )


def _copied(part: Any) -> Any:
    return bytes(part) if isinstance(part, _CHANGING) else part


_CHANGING = (bytearray, memoryview)


def _check(name: str, given: object, payload: str) -> None:
    """Refuse what cannot be called: else no message at all could be read, and each would be set aside."""
    if given is None:
        return
    called = f"{name} is called with {payload} and a SerializationContext"
    if not callable(given):
        raise TypeError(f"{called}: give such an object, not {given!r}")
    if (takes := misfit(given, 2)) is not None:
        raise TypeError(f"{called}, and takes {takes}. Give lambda data, context: ... around it.")
