"""Which message is it? What takes the id out of a message, and the digests that stores keep of it.

An extractor is any function of a message that returns its id as ``str`` or ``bytes``, POSITION for "it is the record at its
place", or None for "it should have an id, and has none". Nothing here guesses: an id found in the first send and not in the
second is worse than none.

Not offered: a hash of the payload. Two equal messages may well mean two events (D06).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Union

if TYPE_CHECKING:
    from collections.abc import Sequence

    from confluent_kafka import Message

    from .contract import Item

KEY_SIZE = 16  # bytes: with 1e10 ids alive the chance that any two meet is 1.5e-19
FINGERPRINT_SIZE = 8
NO_FINGERPRINT: Final = bytes(FINGERPRINT_SIZE)  # stands for none, so that all have one length
PARTITION_SIZE = 8
OFFSET_SIZE = KEY_SIZE - PARTITION_SIZE

# To copy one that is empty takes two thirds of the time that a new one takes.
_KEY = blake2b(digest_size=KEY_SIZE)
_FINGERPRINT = blake2b(digest_size=FINGERPRINT_SIZE)


class Position(Enum):
    """Stands for the place of a record: topic, partition and offset."""

    POSITION = "position"


POSITION: Final = Position.POSITION

Id = Union[str, bytes, Position, None]  # noqa: UP007 - an alias is evaluated, also in 3.10
IdOf = Callable[["Message"], Id]


def header(name: str) -> IdOf:
    """The id is the value of this header; of several with the same name the last. Upper and lower case differ.

    Args:
        name: the whole name. ``AtLeastOnce.produce(message_id=...)`` writes ``message-id``.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a header is a str that is not empty, not {name!r}")

    def id_in_header(message: Message) -> Id:
        return _header(message, name)

    return id_in_header


def cloudevent() -> IdOf:
    """The id is ``source`` and ``id`` of a CloudEvent together, in binary mode (headers) or structured mode (JSON value).

    By the specification the id alone is unique only within its source.
    """

    def id_of_event(message: Message) -> Id:
        source, name = _header(message, "ce_source"), _header(message, "ce_id")
        kind = _header(message, "content-type") or b""
        if name is None and kind.startswith(b"application/cloudevents+json"):
            event = _json(message)
            source, name = _text(_step(event, "source")), _text(_step(event, "id"))
        return None if source is None or name is None else b"%d:%b%b" % (len(source), source, name)

    return id_of_event


def json_field(path: str) -> IdOf:
    """The id is a field of the JSON value: text or a whole number.

    Args:
        path: names with dots in between, as ``event.id``; a number is an index into an array.
    """
    steps = path.split(".") if isinstance(path, str) else []
    if not all(steps) or not steps:
        raise ValueError(f"a path is names with dots in between, not {path!r}")

    def id_in_value(message: Message) -> Id:
        found = _json(message)
        for step in steps:
            found = _step(found, step)
        return _text(found)

    return id_in_value


def first_of(*extractors: IdOf) -> IdOf:
    """The id is what the first of these finds that finds one. ``first_of(header("id"), position())``."""
    if not extractors:
        raise ValueError("first_of() needs an extractor")

    def id_by_first(message: Message) -> Id:
        return next((found for extractor in extractors if (found := extractor(message)) not in (None, "", b"")), None)

    return id_by_first


def position() -> IdOf:
    """The message is the record at its place: topic (its id, not its name), partition and offset.

    Recognises a record that comes again after a crash or a rebalance. Does not recognise the same event when it was sent twice.
    """

    def id_by_position(_message: Message) -> Id:
        return POSITION

    return id_by_position


# -- digests --------------------------------------------------------------------------------------------------------------


def key_of(message_id: str | bytes) -> bytes:
    """The digest of a message id. Text is taken as UTF-8."""
    digest = _KEY.copy()
    digest.update(message_id.encode("utf-8", "surrogatepass") if isinstance(message_id, str) else message_id)
    return digest.digest()


def position_of(topic_id: bytes, partition: int, offset: int) -> bytes:
    """What stands for a place: a digest of the partition, and the offset."""
    return partition_of(topic_id, partition) + offset.to_bytes(OFFSET_SIZE, "big")


@lru_cache(4096)
def partition_of(topic_id: bytes, partition: int) -> bytes:
    return blake2b(b"%b%d" % (topic_id, partition), digest_size=PARTITION_SIZE).digest()


def fingerprint_of(message: Message) -> bytes:
    """The digest of key and value."""
    key, value = message.key(), message.value()
    digest = _FINGERPRINT.copy()
    lengths = -1 if key is None else len(key), key or b"", -1 if value is None else len(value)
    digest.update(b"%d:%b%d:" % lengths)
    if value:
        digest.update(value)
    return digest.digest()


def joined(items: Sequence[Item]) -> dict[str, bytes]:
    """Keys, positions and fingerprints, each of them one after the other: one value to bind instead of a thousand.

    Raises:
        ValueError: one of another length would make others of all that follow it.
    """
    keys, positions, fingerprints = zip(*items, strict=True) if items else ((), (), ())
    if not all(fingerprints):
        fingerprints = tuple(fingerprint or NO_FINGERPRINT for fingerprint in fingerprints)
    if not {KEY_SIZE}.issuperset(map(len, keys + positions)) or not {FINGERPRINT_SIZE}.issuperset(map(len, fingerprints)):
        raise ValueError(f"a key and a position have {KEY_SIZE} bytes, a fingerprint {FINGERPRINT_SIZE} bytes or none")
    return {"keys": b"".join(keys), "positions": b"".join(positions), "fingerprints": b"".join(fingerprints)}


def split(keys: bytes) -> list[bytes]:
    """Keys that were joined."""
    return [keys[start : start + KEY_SIZE] for start in range(0, len(keys), KEY_SIZE)]


# -- looking into messages that nobody vouches for (S04) ----------------------------------------------------------------------


def _header(message: Message, name: str) -> bytes | None:
    """The last header of this name; None if there is none, it is empty, or the headers cannot be read."""
    try:
        headers = message.headers() or ()
    except (SystemError, UnicodeDecodeError):  # the name of a header that is not UTF-8
        return None
    for known, value in reversed(headers):
        if known == name:
            return (value.encode() if isinstance(value, str) else value) or None
    return None


def _json(message: Message) -> object:
    try:
        value = message.value()
        return None if value is None else json.loads(value)
    except (ValueError, RecursionError):
        return None


def _step(value: object, name: str) -> object:
    if isinstance(value, dict):
        return value.get(name)
    if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
        return value[int(name)]
    return None


def _text(value: object) -> bytes | None:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return value.encode("utf-8", "surrogatepass") or None if isinstance(value, str) else None
