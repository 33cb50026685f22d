"""What a dead letter looks like: the record as it came, and after its own headers those that say what happened to it.

Rules.
* Key, value, headers and timestamp stay as they were; a message that is dead-lettered again keeps the earlier set too.
* A set begins with ``dead-letter-topic``. The last one in a record is the one that counts: all that is before it was written
  by others, who may have made it look like ours (S04).
* All values are text in UTF-8. What comes from an exception is bounded and without control characters (S09).
* One that the producer would not take, since what is said about the message makes it too large, leaves out the largest part
  of the message, and says so: whoever may write to a topic could stop its group with such a message.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE

from ._printable import printable, text_of
from .records import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from confluent_kafka import Message

    Header = tuple[str, bytes | None]

PREFIX = "dead-letter-"
TOPIC = PREFIX + "topic"
PARTITION = PREFIX + "partition"
OFFSET = PREFIX + "offset"
TIMESTAMP = PREFIX + "timestamp"  # milliseconds; without it the message had none
GROUP = PREFIX + "group"
ERROR_TYPE = PREFIX + "error-type"
ERROR = PREFIX + "error"
ATTEMPTS = PREFIX + "attempts"
TIME = PREFIX + "time"  # milliseconds
# only where they could not be kept
HEADERS, VALUE, KEY = PREFIX + "headers", PREFIX + "value", PREFIX + "key"
REPLAYED = PREFIX + "replayed"  # of a marker, not of a dead letter

_SET = {TOPIC, PARTITION, OFFSET, TIMESTAMP, GROUP, ERROR_TYPE, ERROR, ATTEMPTS, TIME, HEADERS, VALUE, KEY}
_LOST = b"lost"
_TEXT = 1000  # characters of an error's text
_NAME = 250  # characters of an error's type
_FRAME, _HEADER_FRAME = 36, 10  # bytes that librdkafka counts for a record, and at the most for a header
TOPIC_NAME = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,249}\Z")
_NUMBER = re.compile(rb"[0-9]{1,19}\Z")
_INT32, _INT64 = 2**31 - 1, 2**63 - 1

# Not message.headers(): Python may call that on a short way, on which it does not look whether C code has left an exception.
_read_headers = methodcaller("headers")


@dataclass(frozen=True)
class DeadLetter:
    """What the headers of a dead letter say.

    Attributes:
        topic, partition, offset: where the message was.
        timestamp: its own, in milliseconds; None if it had none.
        group: consumer group that could not handle it.
        error_type, error: the last error.
        attempts: how often it was tried.
        time: when it became a dead letter, in milliseconds.
        headers: the message's own.
        lost: what is missing of "headers", "value" and "key": it could not be read, or would have made this too large.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int | None
    group: str | None
    error_type: str
    error: str
    attempts: int
    time: int
    headers: Sequence[Header]
    lost: tuple[str, ...]


# -- writing --------------------------------------------------------------------------------------------------------------


def dead_letter(
    topic: str,
    message: Message,
    error: BaseException,
    *,
    group: str | None,
    attempts: int,
    raw: tuple[bytes | None, bytes | None] | None,
    headers_lost: bool,
    now: float,
    most: int,
) -> Record:
    """The record that goes to the dead letter topic for a message. Its key decides the partition.

    Args:
        topic: the dead letter topic.
        message: as it was consumed.
        error: the last one.
        group: consumer group.
        attempts: how often it was tried.
        raw: key and value as they came, where a deserializer has replaced those of the message.
        headers_lost: they could not be read, and the message must not be asked for them again.
        now: seconds since the epoch.
        most: bytes that the producer takes.
    """
    own: Sequence[Header] | None = None if headers_lost else headers_of(message)
    key, value = (message.key(), message.value()) if raw is None else raw
    kind, moment = message.timestamp()
    timestamp: int | None = None if kind == TIMESTAMP_NOT_AVAILABLE or moment < 0 else moment
    said = {
        TOPIC: message.topic(),
        PARTITION: message.partition(),
        OFFSET: message.offset(),
        TIMESTAMP: timestamp,
        GROUP: group,
        ERROR_TYPE: printable(_type_of(error), _NAME),
        ERROR: text_of(error, _TEXT),
        ATTEMPTS: attempts,
        TIME: int(now * 1000),
    }
    about: list[Header] = [(name, str(what).encode("utf-8", "replace")) for name, what in said.items() if what is not None]
    about += [(HEADERS, _LOST)] if own is None else []
    sizes = {VALUE: _bytes(value), HEADERS: _size(own or ()), KEY: _bytes(key)}
    while _FRAME + sum(sizes.values()) + _size(about) > most and any(sizes.values()):
        largest = max(sizes, key=sizes.__getitem__)
        sizes[largest] = 0
        about.append((largest, _LOST))
    lost = {name for name, said in about if said is _LOST}
    return Record(
        topic,
        b"" if VALUE in lost else value,  # a null would remove others from a compacted topic
        None if KEY in lost else key,
        headers=[*(() if own is None or HEADERS in lost else own), *about],
        timestamp=timestamp or None,  # librdkafka takes 0 for the time of now, which keeps it in this topic for longer
    )


def _bytes(part: object) -> int:
    """How large a part is on the wire. The handler may have put something else into the message."""
    if isinstance(part, str):
        return len(part.encode("utf-8", "replace"))
    return memoryview(part).nbytes if isinstance(part, (bytes, bytearray, memoryview)) else 0


def _size(headers: Sequence[Header]) -> int:
    return sum(len(name.encode()) + _bytes(value) + _HEADER_FRAME for name, value in headers)


def headers_of(message: Message) -> list[Header] | None:
    """The headers of a message; None if they cannot be read, and from then on it says that it has none."""
    try:
        headers: list[Header] | None = _read_headers(message)
    except (SystemError, UnicodeDecodeError):
        # S04: a name that is not UTF-8. Asked a second time, confluent-kafka gives a list that crashes the process.
        message.set_headers([])
        return None
    return headers or []


def _type_of(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# -- reading --------------------------------------------------------------------------------------------------------------


def origin_of(message: Message) -> DeadLetter | None:
    """What a record of a dead letter topic says about itself; None if it is no dead letter, or a damaged one."""
    headers = headers_of(message) or []
    start = max((n for n, (name, _) in enumerate(headers) if name == TOPIC), default=None)
    if start is None:
        return None
    own, about = headers[:start], {}
    for name, value in headers[start:]:
        if name not in _SET:
            own.append((name, value))  # put behind ours on the way, as tracing does
        elif name in about or value is None:
            return None
        else:
            about[name] = value
    try:
        return _parsed(about, own)
    except (KeyError, ValueError):
        return None


def _parsed(about: dict[str, bytes], own: list[Header]) -> DeadLetter:
    topic = about[TOPIC].decode()
    if not TOPIC_NAME.match(topic):
        raise ValueError(topic)
    return DeadLetter(
        topic=topic,
        partition=_number(about[PARTITION], _INT32),
        offset=_number(about[OFFSET], _INT64),
        timestamp=_number(about[TIMESTAMP], _INT64) if TIMESTAMP in about else None,
        group=about[GROUP].decode() if GROUP in about else None,
        error_type=about[ERROR_TYPE].decode(),
        error=about[ERROR].decode(),
        attempts=_number(about[ATTEMPTS], _INT32),
        time=_number(about[TIME], _INT64),
        headers=tuple(own),
        lost=tuple(name.removeprefix(PREFIX) for name in (HEADERS, VALUE, KEY) if about.get(name) == _LOST),
    )


def _number(text: bytes, most: int) -> int:
    if not _NUMBER.match(text) or int(text) > most:
        raise ValueError(text)
    return int(text)


# -- markers ----------------------------------------------------------------------------------------------------------------


def marker(topic: str, partition: int, offset: int) -> Record:
    """The record that says that the dead letter at this place was replayed. It is written in the same transaction.

    It is in the same partition, behind what it marks: retention removes it later. Its key is its own, and its value is not
    null: compaction removes neither what it marks nor the marker itself.
    """
    text = str(offset).encode()
    return Record(topic, b"", REPLAYED.encode() + b":" + text, headers=[(REPLAYED, text)], partition=partition)


def marked_by(message: Message) -> int | None:
    """The offset of the dead letter that this record marks as replayed; None if it is not a marker."""
    headers = headers_of(message) or []
    if len(headers) != 1 or headers[0][0] != REPLAYED:
        return None  # also a dead letter whose own headers look like a marker's: it has ours besides
    text = headers[0][1] or b""
    return int(text) if _NUMBER.match(text) and message.key() == REPLAYED.encode() + b":" + text else None
