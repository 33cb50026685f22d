"""The data that crosses the API: ``Record`` (to be produced), ``Delivery`` (what became of one), the shapes of handlers."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Union

from .errors import DeliveryUnknown, concluded, delivery_failure

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Generator

    from confluent_kafka import KafkaError, Message
    from typing_extensions import Self

    from .errors import KafkaGuaranteesError

log = logging.getLogger("kafka_guarantees")

T = TypeVar("T")

MESSAGE_ID = "message-id"  # the header that carries the id of a logical message through every retry (D06)
LOST = 2.0  # seconds after which a report that should have come counts as lost; a record may be noted for 1 s and not sent
LOOKS = 10  # by which nothing was on its way, until a report counts as lost: a process that stood still has not looked

Payload = Union[bytes, bytearray, memoryview, str, None]  # noqa: UP007 - an alias is evaluated, also in 3.10
Headers = Union["Mapping[str, Payload]", "Sequence[tuple[str, Payload]]", None]


class _Unfrozen:
    """The parts of a record while they are put together: the quick way to an instance that cannot be changed afterwards."""

    __slots__ = ("headers", "key", "partition", "timestamp", "topic", "value")

    topic: str
    value: Any
    key: Any
    headers: Headers
    partition: int | None
    timestamp: int | None


@dataclass(frozen=True, init=False)
class Record(_Unfrozen):
    """A record that a handler wants produced under the guarantee it runs with.

    Args:
        topic: where to. The topic must exist: none is created on the way (P19).
        value: ``bytes``, ``bytearray``, ``memoryview``, or ``str``, which is encoded as UTF-8; ``None`` is a tombstone. Where
            the client has a ``value_serializer``, whatever that takes.
        key: likewise; decides the partition (murmur2, as in the Java client) when ``partition`` is not given.
        headers: pairs, or a dict, of name and value.
        partition: number of the partition; ``None`` lets the key decide.
        timestamp: milliseconds since the epoch, above 0; ``None`` is the time of producing.
        message_id: written to the header ``message-id``, by which a reader can tell a repeat.
    """

    __slots__ = ()

    topic: str
    value: Any
    key: Any
    headers: Headers
    partition: int | None
    timestamp: int | None

    def __new__(
        cls,
        topic: str,
        value: Any = None,
        key: Any = None,
        *,
        headers: Headers = None,
        partition: int | None = None,
        timestamp: int | None = None,
        message_id: str | bytes | None = None,
    ) -> Self:
        if message_id is not None:
            headers = with_id(headers, message_id)
        # one for each message that is handled: a frozen dataclass's own way, object.__setattr__, takes three times as long
        if cls is not Record:
            return _subclassed(cls, (headers, key, partition, timestamp, topic, value))
        parts = _Unfrozen()
        parts.topic = topic
        parts.value = value
        parts.key = key
        parts.headers = headers
        parts.partition = partition
        parts.timestamp = timestamp
        parts.__class__ = Record  # the same layout, and from here on no attribute can be set
        return parts  # type: ignore[return-value]  # it is a Record by now

    def __reduce__(self) -> tuple[Any, ...]:
        named = partial(type(self), headers=self.headers, partition=self.partition, timestamp=self.timestamp)
        return named, (self.topic, self.value, self.key)


def _subclassed(cls: type[T], parts: tuple[object, ...]) -> T:
    """A record of the user's own kind, which may have another layout."""
    record = object.__new__(cls)
    for name, part in zip(_Unfrozen.__slots__, parts, strict=True):
        object.__setattr__(record, name, part)
    return record


Records = Iterable[Record] | Record | None
Handler = Callable[["Message[Any, Any]"], Records]  # of whatever deserializers make of key and value
BatchHandler = Callable[["list[Message[Any, Any]]"], Records]
InboxHandler = Callable[["Message[Any, Any]", Any], Records]  # with the connection of the inbox
InboxBatchHandler = Callable[["list[Message[Any, Any]]", Any], Records]


def pairs(headers: Headers) -> list[tuple[str, Payload]]:
    """Headers in the one form that keeps their order and their repeats. TypeError for what a second attempt would miss."""
    if headers.__class__ is list:
        return headers
    if isinstance(headers, Iterator):
        kind = type(headers).__name__
        raise TypeError(
            f"headers must be a mapping or a list of pairs, not {kind}, which can be read once only. Nothing was sent."
        )
    try:
        return list(headers.items() if isinstance(headers, Mapping) else headers or ())
    except TypeError:
        raise no_pairs(headers) from None


def no_pairs(headers: object) -> TypeError:
    """The error for headers, or one of them, that nobody can read as such. Without the values, which may be secret."""
    kind = type(headers).__name__ + (f" of {len(headers)}" if isinstance(headers, Sized) else "")
    return TypeError(f"headers are pairs of name and value, or a dict, not {kind}. Nothing was sent.")


def with_id(headers: Headers, message_id: str | bytes) -> list[tuple[str, Payload]]:
    """Headers with the id of a message behind them."""
    return [*pairs(headers), (MESSAGE_ID, message_id)] if headers else [(MESSAGE_ID, message_id)]


def check_handler(handler: object, arguments: int) -> None:
    """Refuse what can handle no message at all: else each of them would be dropped, or set aside.

    Args:
        handler: what the user gave.
        arguments: how many it is called with: a message or several, and with an inbox its connection.

    Raises:
        TypeError: it is no plain function, or not one of so many arguments.
    """
    if not callable(handler):
        raise TypeError(f"the handler is called with messages: give a function, not {handler!r}")
    for called in (handler, getattr(handler, "__call__", None)):  # noqa: B004 - of an object the method
        if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
            raise TypeError("the handler is a coroutine function: handlers are plain functions")
    if (takes := misfit(handler, arguments)) is not None:
        given = "a message, or a list of them" + (", and the connection of the inbox" if arguments > 1 else "")
        raise TypeError(f"the handler is called with {given}, and takes {takes}. Nothing was consumed.")


def misfit(called: Callable[..., object], arguments: int) -> str | None:
    """What a function takes, and why it cannot be called with so many arguments; None: it can, or nobody knows."""
    try:
        signature = inspect.signature(called, follow_wrapped=False)  # what is called, and not what a decorator has wrapped
    except Exception:  # noqa: BLE001 - of some functions in C nobody knows it, nor where an annotation cannot be evaluated
        return None
    try:
        signature.bind(*[None] * arguments)
    except TypeError as exc:
        return f"{signature}: {exc}"
    return None


def records_in(result: Records) -> Iterable[Record]:
    """What a handler returned, to walk over: what is not records is refused, of a generator when its turn comes.

    Raises:
        NotRecords: it is neither a ``Record`` nor an iterable of them.
    """
    if result.__class__ is list or result.__class__ is tuple:  # the usual ones need no generator around them
        for record in result:
            if record.__class__ is not Record:
                break
        else:
            return result
    if result is None:
        return ()
    if result.__class__ is GeneratorType:  # for these, too, the questions below take longer than all the rest
        return _checked(result)
    if isinstance(result, Record):
        return (result,)
    if isinstance(result, (str, bytes, dict)) or not isinstance(result, Iterable):
        if inspect.iscoroutine(result):
            result.close()
            raise NotRecords("the handler is a coroutine function: handlers are plain functions")
        raise NotRecords(f"the handler returned {type(result).__name__}: return Records, yield them, or return None")
    return _checked(result)


def _checked(result: Iterable[Record]) -> Iterator[Record]:
    for record in result:
        if not isinstance(record, Record):
            raise NotRecords(f"the handler produced {type(record).__name__}: it must produce Records")
        yield record


def leave(result: object) -> None:
    """End a generator of a handler half way: until then it holds what it has, as a lock, against the next call."""
    if isinstance(result, GeneratorType):
        try:
            result.close()
        except Exception:
            log.exception("a handler that was left half way, because of another error, raised")  # never hide the first error


class NotRecords(TypeError):
    """A handler has returned something that is no record: a mistake of the program, which comes with every message."""


class RecordRefused(Exception):
    """A record of the handler is refused, before it is sent or by the brokers, as it would be each time.

    Args:
        failure: what is raised for it, where it ends the run.
    """

    def __init__(self, failure: KafkaGuaranteesError) -> None:
        super().__init__(str(failure))
        self.failure = failure


def report_lost(topic: str | None = None) -> DeliveryUnknown:
    """What is known of a record whose report was destroyed."""
    where = "" if topic is None else f" for topic {topic!r}"
    return DeliveryUnknown(f"the report on a record{where} was lost: it may or may not be written.")


class Silence:
    """Whether nothing has been on its way for so long that a report which is missing will never come.

    An exception out of a signal handler has destroyed it. Not at once: another thread may have noted a record and not sent it
    yet, or be in the callback.
    """

    __slots__ = ("_looks", "_since")

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._looks = 0

    def lasts(self, left: int | None) -> bool:
        """Take a look: how many records are on their way; None: nobody has looked."""
        if left is not None:
            self._looks += 1
        if left:
            self._since, self._looks = time.monotonic(), 0
        return self._looks > LOOKS and time.monotonic() - self._since > LOST


class _Server(Protocol):
    """Waits for delivery reports, and keeps what is not acknowledged. ``PlainProducer`` is one."""

    failed: bool
    unacknowledged: set[Delivery]
    patience: float

    def wait_for(self, delivery: Delivery, timeout: float) -> int | None: ...
    def future_of(self, delivery: Delivery) -> Future[None]: ...
    def looked_at(self, delivery: Delivery) -> None: ...


class Delivery:
    """What becomes of one record that ``AtLeastOnce.produce`` took.

    ``await`` waits for it in a coroutine of asyncio, as ``result()`` does in a thread.

    A failure cannot be dropped: one that neither of them raised is raised by the next ``produce``, ``flush`` or ``close``, and
    a run does not commit past it. Where somebody has waited in vain, and so knows that the record may be lost, ``produce`` only
    logs it: the record that is produced then is somebody else's.

    Attributes:
        topic: where the record went.
    """

    __slots__ = ("_asked", "_outcome", "_producer", "topic")  # few: the garbage collector looks at each, several times

    def __init__(self, topic: str, producer: _Server) -> None:
        self.topic = topic
        self._producer = producer
        self._outcome: tuple[int | None, int] | KafkaGuaranteesError | None = None  # partition and offset, or why not

    @property
    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._outcome is not None

    @property
    def partition(self) -> int | None:
        """The partition of the record, once it is acknowledged."""
        return self._outcome[0] if isinstance(self._outcome, tuple) else None

    @property
    def offset(self) -> int | None:
        """The offset of the record, once it is acknowledged."""
        return self._outcome[1] if isinstance(self._outcome, tuple) else None

    @property
    def _failure(self) -> KafkaGuaranteesError | None:
        return self._outcome if isinstance(self._outcome, Exception) else None

    def result(self, timeout: float | None = None) -> Self:
        """Wait until the record is acknowledged by the brokers, and return this delivery. Meanwhile nothing lingers.

        Args:
            timeout: seconds; ``None`` waits as long as the record itself may take (``delivery.timeout.ms``).

        Raises:
            DeliveryError: it was certainly not written.
            DeliveryUnknown: it may or may not have been written.
            AuthorizationError, BrokerError: the producer cannot go on. Make a new client.
            KafkaGuaranteesError: this thread is in a callback of the client, or in a signal handler that came in one.
            TimeoutError: neither is known after ``timeout`` seconds; the record is still on its way.
        """
        started = time.monotonic()
        deadline = started + (timeout if timeout is not None else self._producer.patience + LOST)
        silence = Silence()
        while not self.done:
            left = min(0.05, deadline - time.monotonic())
            if left <= 0 and timeout is None:
                self._lost()
                break
            if left <= 0:
                self._asked = True
                raise TimeoutError(
                    f"a record for topic {self.topic!r} is not acknowledged after {timeout} s; it is still on its way"
                )
            if silence.lasts(self._producer.wait_for(self, left)) and not self.done:
                self._lost()
        failure = self._failure
        if failure is not None:
            self._producer.looked_at(self)
            raise failure
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        """Wait as ``result()`` does, without a limit of its own, and raise what it raises.

        Raises:
            CancelledError: as by ``asyncio.wait_for(delivery, seconds)``; the record is still on its way.
        """
        if not self.done:
            try:
                yield from self._producer.future_of(self)
            except BaseException:
                self._asked = True
                raise
        return self.result(0)

    @property
    def asked(self) -> bool:
        """Whether somebody has waited for it in vain."""
        return hasattr(self, "_asked")  # most are made and forgotten: they do not have it at all

    def __call__(self, error: KafkaError | None, message: Message) -> None:
        """For librdkafka: it is its own delivery callback, so that none is made for each record. Never raises (P12)."""
        if error is not None:
            self._fail(delivery_failure(error, self.topic, message.partition()))
            return
        offset = message.offset()
        if offset is None:
            self._fail(concluded(self.topic, message.partition()))
            return
        self._outcome = message.partition(), offset
        self._producer.unacknowledged.discard(self)  # last: an exception out of a signal handler leaves it there

    def _fail(self, failure: KafkaGuaranteesError) -> None:
        self._producer.failed = True  # before and after: who lists failures meanwhile has taken the hint away
        self._outcome = failure
        self._producer.failed = True

    def _lost(self) -> None:
        """No report will come: an exception out of a signal handler destroyed it."""
        self._fail(report_lost(self.topic))

    def __repr__(self) -> str:
        state = "failed" if self._failure is not None else "acknowledged" if self.done else "on its way"
        return f"<Delivery to {self.topic!r}: {state}>"
