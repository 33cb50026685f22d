"""Records on their way into the queue of a ``confluent_kafka.Producer``: what crosses into C, and in which form.

Rules.
* A full queue is waited for, with the callbacks served meanwhile; never dropped, never raised as BufferError (P10).
* ``produce_batch`` is not used: it drops headers and ignores the partition (P11).
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from operator import index
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException

from .errors import DeliveryError, kafka_error
from .records import Record, no_pairs, pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from confluent_kafka import KafkaError, Message, Producer

    from .records import Headers, Payload

    DeliveryCallback = Callable[[KafkaError | None, Message], None]

AS_IT_IS = frozenset({bytes, str, type(None)})  # what librdkafka takes for a key or a value
SLICE = 0.1  # seconds that serving callbacks waits at a time, so that a stop is noticed
SHORT = 0.002  # seconds of the first of these slices, so that a short patience is not exceeded by much
NOT_AT_ALL = -1.0  # seconds that were waited: whoever has no patience may look once
KNOWING = 1.0  # seconds that the partitions of a topic are asked for


class QueueFull(DeliveryError):
    """There was no room for a record in time: the fault of the brokers, not of the record."""


def _payload(part: Payload, name: str) -> bytes | str | None:
    if part is None or isinstance(part, (bytes, str)):
        return part
    if isinstance(part, (bytearray, memoryview)):
        return bytes(part)
    raise TypeError(f"{name} must be bytes, str or None, not {type(part).__name__}. Nothing was sent. Serialize it first.")


def not_a_topic(topic: object) -> TypeError | None:
    """Why that cannot be the name of a topic: librdkafka says that it is argument 1. None: it can."""
    if isinstance(topic, str):
        return None
    kind = "None" if topic is None else type(topic).__name__
    advice = " Give its parts, or return it from the handler." if isinstance(topic, Record) else ""
    return TypeError(f"topic must be str, not {kind}. Nothing was sent.{advice}")


def _whole(number: int, what: str) -> int:
    try:
        return index(number)
    except TypeError:
        raise TypeError(f"{what}, or None, not {number!r}. Nothing was sent.") from None


def _timestamp(milliseconds: int) -> int:
    if _whole(milliseconds, "timestamp is a number of milliseconds since the epoch") <= 0:
        raise ValueError(f"timestamp {milliseconds} is refused: librdkafka writes the present time for it. Nothing was sent.")
    return milliseconds


def checked_headers(headers: Headers) -> list[tuple[str, str | bytes | None]] | None:
    """Headers as librdkafka takes them. Raises TypeError and ValueError for what it would not take, or cut."""
    if not headers:
        return None
    checked: list[tuple[str, str | bytes | None]] = []
    for header in pairs(headers):
        try:
            name, value = header
        except (TypeError, ValueError):
            raise no_pairs(headers if isinstance(headers, (str, bytes)) else header) from None
        if name.__class__ is not str or not name.isascii() or "\0" in name:
            _check_header_name(name)
        checked.append((name, value if value.__class__ is bytes else _header_value(value)))
    return checked


def _check_header_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a header's name must be str, not {type(name).__name__}. Nothing was sent.")
    try:
        name.encode()
    except UnicodeEncodeError:  # with a lone surrogate in it librdkafka 2.16 crashes the process
        raise ValueError(f"header name {name!r} is not text that UTF-8 can hold. Nothing was sent.") from None
    if "\0" in name:
        raise ValueError(f"header name {name!r} has a NUL, where librdkafka would cut it (P20). Nothing was sent.")


def _header_value(value: Payload) -> bytes | None:
    part = _payload(value, "a header's value")
    return part.encode() if isinstance(part, str) else part  # P20: a str would be cut at its first NUL


def enqueue(
    raw: Producer,
    record: Record,
    callback: DeliveryCallback | None,
    patient: Callable[[float], bool],
    known: set[str],
    *,
    serve: Callable[[Callable[[], object]], object],
) -> None:
    """Put one record into librdkafka's queue, waiting while that is full.

    The loops that do this for each message have a shorter way for one without partition and timestamp, and come here where
    that is blocked.

    Args:
        raw: the C producer.
        record: what to produce.
        callback: hears what became of it.
        patient: whether to wait on, after so many seconds.
        known: topics that librdkafka has been asked about. Of one that it does not know it takes a record for any partition,
            and says only later, of no message in particular, that there is none of that number.
        serve: makes a C call in which callbacks come.

    Raises:
        TypeError, ValueError: not a record.
        KafkaException: librdkafka refuses it.
        QueueFull: the queue stayed full for longer than ``patient`` allows.
    """
    topic, value, key = record.topic, record.value, record.key
    if topic.__class__ is not str and (wrong := not_a_topic(topic)) is not None:
        raise wrong
    if value.__class__ not in AS_IT_IS:
        value = _payload(value, "value")
    if key.__class__ not in AS_IT_IS:
        key = _payload(key, "key")
    partition, timestamp = record.partition, record.timestamp
    if partition is not None and topic not in known and patient(KNOWING):
        known.add(topic)  # once: who produces while no broker answers must not wait for each record
        try:
            raw.list_topics(topic, KNOWING)
        except KafkaException as exc:  # no answer: then it is said later
            kafka_error(exc)  # lets go of what its user is handling
        except RuntimeError:  # no topic of such a name (Metadata.c:388-394): said in the next moment
            pass
    number = -1 if partition is None else _whole(partition, "partition is the number of one")
    when = 0 if timestamp is None else _timestamp(timestamp)
    headers = checked_headers(record.headers)
    try:
        raw.produce(topic, value, key, number, callback, None, when, headers)
    except BufferError:
        _when_there_is_room(raw, (topic, value, key, number, callback, None, when, headers), patient, serve)
    except OverflowError as exc:
        raise ValueError(f"partition {partition} or timestamp {timestamp} is too large a number. Nothing was sent.") from exc


def _when_there_is_room(
    raw: Producer,
    arguments: tuple[Any, ...],
    patient: Callable[[float], bool],
    serve: Callable[[Callable[[], object]], object],
) -> None:
    started, pause = time.monotonic(), 0.0  # at first only what has been reported already makes room
    while patient(time.monotonic() - started if pause else NOT_AT_ALL):
        serve(partial(raw.poll, pause))
        empty = not len(raw)
        with suppress(BufferError):
            raw.produce(*arguments)
            return
        if empty and not len(raw):  # and nobody else has filled it: it never will (X21)
            raise DeliveryError(
                f"a record for topic {arguments[0]!r} was not sent: it is larger than the producer's queue "
                "(queue.buffering.max.kbytes)."
            )
        pause = min(SLICE, max(SHORT, (time.monotonic() - started) / 4))
    raise QueueFull(
        f"a record for topic {arguments[0]!r} was not sent: the producer's queue stayed full. The brokers take "
        "records more slowly than they are produced, or not at all."
    )
