"""At most once: a message is handled once or not at all, never twice.

What happens to one message::

    fetched with others -> its offset committed, synchronously, with those of its portion -> still a member of the group?
    -> handled, once

* A process that dies after the commit loses what it had not handled of the portion: a portion is at most ``max_batch``
  messages, and grows only while it is handled in PORTION seconds (M07). What was fetched but not committed is not lost.
* A commit whose outcome is unknown is not followed by handling: the brokers are asked what is committed (M02).
* A commit that may have been sent twice, or whose outcome is unknown, is the last of its member: it leaves the group, so that
  the one that comes late is refused, and joins as another. A static member of the classic protocol does not leave: the one
  that comes late is refused from the moment on in which that other one has joined.
* A handler that raises is not called again for that message (M04). A dead letter of it is sent, and not waited for.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from ._consumer import RECENT, GroupConsumer
from ._failures import Failures, GaveUp
from ._handler_thread import ended_after, handler_thread
from ._lifecycle import Lifecycle, close_behind
from ._offsets import fields, where
from ._pace import Pace
from ._places import Places
from ._preflight import Preflight
from ._printable import text_of
from ._producer import PlainProducer, first_producer
from ._serialization import Reading, Writing
from ._settings import Guarantee, explain, resolve
from ._topics import check_run
from .errors import BrokerError, DeliveryError, UnsafeConfigError
from .records import Record, check_handler, leave, records_in

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from types import TracebackType

    from confluent_kafka import Message
    from typing_extensions import Self

    from ._batch import Batch
    from ._handler_thread import HandlerThread
    from ._lifecycle import Itself
    from ._offsets import Partition
    from ._places import Start
    from ._preflight import AtStart, PreflightReport
    from ._serialization import Deserializer, Serializer
    from ._settings import Explanation
    from .records import BatchHandler, Handler, Headers, Records

log = logging.getLogger("kafka_guarantees")

PORTION = 0.1  # seconds that the handling of one committed portion should take


class AtMostOnce:
    """Produce and consume at most once: fast, and never twice, at the price of losses.

    Args:
        config: librdkafka's properties, for both sides. See ``explain()`` for what is set on top.
        start: where a group without committed offsets begins. ``"latest"`` is the only start that can never handle a message
            twice: ``"earliest"`` repeats everything once the group's offsets have expired or were deleted (M05). So a partition
            without an offset is read from its end, unless it was added to its topic while this client was there.
        on_error: called with a message and the exception that the handler raised for it; by default it is logged.
        retry: refused: a second attempt is a second handling.
        dead_letter: topic for messages that could not be handled, or read. Copies are sent at most once, like all records.
        keep_alive: handlers have a thread of their own, and may take longer than ``max.poll.interval.ms``.
        key_deserializer, value_deserializer: of confluent-kafka, or any function of bytes and a SerializationContext; handlers
            see what they return. ``None`` is left alone.
        key_serializer, value_serializer: the same for records that are produced.
        preflight: when a run starts, the brokers are asked whether their topics and settings keep this guarantee. What is
            found is logged (``"warn"``), or what is unsafe ends the run before it consumes (``"raise"``); or nothing is asked
            (``"off"``). See ``preflight()``.

    Promised: no message is handled twice, whatever is killed, paused or rebalanced. A record is sent at most once.
    Not promised: that a record arrives, or that it is handled. Two records with the same content are two messages (M06).

    Raises:
        UnsafeConfigError: a setting contradicts the guarantee. Nothing was connected.
        TypeError, ValueError: an argument is not valid.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        /,
        *,
        start: Start = "latest",
        on_error: Callable[[Message, Exception], object] | None = None,
        retry: None = None,
        dead_letter: str | None = None,
        keep_alive: bool = False,
        key_deserializer: Deserializer | None = None,
        value_deserializer: Deserializer | None = None,
        key_serializer: Serializer | None = None,
        value_serializer: Serializer | None = None,
        preflight: AtStart = "warn",
    ) -> None:
        if retry is not None:
            raise UnsafeConfigError(
                "retry",
                retry,
                "a handler that raised may have had its effect, and a second attempt would have it twice (M04)",
                "on_error or dead_letter tell of the message; AtLeastOnce tries again",
            )
        self._settings = resolve(Guarantee.AT_MOST_ONCE, config)
        self._places = Places(self._settings.group_id, start, once=True)
        if not (on_error is None or callable(on_error)):
            raise TypeError(f"on_error is called with a message and its error: give a function, not {on_error!r}")
        self._on_error = on_error or _log_dropped
        self._lifecycle = Lifecycle("AtMostOnce")
        self._producer: PlainProducer | None = None
        self._making = threading.RLock()  # also by a signal handler, in the middle of it
        self._handled: dict[Partition, int] = {}  # M09: below this nothing is handled, whatever the group's offsets say
        self._reading = Reading(key_deserializer, value_deserializer)
        self._writing = Writing(key_serializer, value_serializer)
        self._thread = handler_thread(keep_alive, self._lifecycle, self._settings.max_poll_interval)
        self._failures = Failures(self._settings, self._lifecycle, self._reading, retry=None, dead_letter=dead_letter)
        self._preflight = Preflight(self._settings, self._lifecycle, preflight, dead_letter=dead_letter)
        self._recent: deque[float] = deque(maxlen=RECENT)  # how long the last commits took, also those of earlier runs

    # -- consuming ----------------------------------------------------------------------------------------------------

    def run(self, topics: Sequence[str], handler: Handler, *, max_batch: int = 500, until_idle: float | None = None) -> None:
        """Call ``handler`` at most once for every message of ``topics``; records that it returns are produced.

        Blocks until ``stop()``, until SIGINT or SIGTERM if this is the main thread, or until no message has come for
        ``until_idle`` seconds. What is committed for handling, about 0.1 s of work, is finished, and the group left, before it
        returns.

        Args:
            topics: names, or patterns that begin with ``^``.
            handler: called with a ``confluent_kafka.Message``; returns or yields ``Record``, or returns None.
            max_batch: messages fetched at a time, and the most that a crash can lose.
            until_idle: seconds.

        Raises:
            UnsafeConfigError: there is no ``group.id``, or what is set aside would be consumed; or something is unsafe, and
                ``preflight="raise"``. Nothing was consumed.
            FencedError: another instance has this ``group.instance.id``.
            OffsetsLost, AuthorizationError, BrokerError: see the class.
        """
        check_handler(handler, 1)
        with closing(self._portions(topics, self._pace(max_batch), until_idle)) as portions:
            for messages in portions:
                call = self._reading.checked(handler)
                if self._thread is None:
                    self._handle(call, messages)
                else:
                    self._handle_in_thread(self._thread, call, messages)

    def _handle(self, call: Handler, messages: Sequence[Message]) -> None:
        for message in messages:
            try:
                self._send_all(call(message))
            except Exception as error:  # noqa: BLE001 - M04: reported, and never tried again
                self._dropped([message], error)
            if self._lifecycle.forked:
                break

    def _handle_in_thread(self, thread: HandlerThread, call: Handler, messages: Sequence[Message]) -> None:
        """The same with a handler that has a thread of its own. What it returned is sent by this one."""
        made = self._writing.made_by(call)
        while messages:
            done: list[list[Record]] = []
            try:
                error = thread.each(made, messages, done, math.inf)
            finally:  # whatever has ended it: these were handled, and are not again
                for message, records in zip(messages, done, strict=False):
                    try:
                        self._send_all(records, ready=True)
                    except Exception as refused:  # noqa: BLE001 - M04
                        self._dropped([message], refused)
            messages = messages[len(done) :]
            if error is not None:
                self._dropped(messages[:1], error)
                messages = messages[1:]

    def run_batches(
        self, topics: Sequence[str], handler: BatchHandler, *, max_batch: int = 500, until_idle: float | None = None
    ) -> None:
        """Like ``run``, with a handler that takes several messages at once. All of them are dropped where it raises.

        And all of them go to the dead letter topic, also those that had their effect by then: a replay handles these twice.
        """
        check_handler(handler, 1)
        ready, call = self._thread is not None, handler
        if self._thread is not None:
            call = partial(self._thread.call, self._writing.made_by(handler))
        with closing(self._portions(topics, self._pace(max_batch), until_idle)) as portions:
            for portion in portions:
                messages = self._readable(portion)
                try:
                    if messages:
                        self._send_all(call(list(messages)), ready=ready)
                except Exception as error:  # noqa: BLE001 - M04
                    self._dropped(messages, error)

    def messages(
        self, topics: Sequence[str], *, max_batch: int = 500, until_idle: float | None = None
    ) -> Generator[Message, None, None]:
        """Iterate over messages that are committed already: each comes once at most. Signals are left to the caller.

        Raises:
            TypeError: the client has ``keep_alive``.
            UnsafeConfigError: there is no ``group.id``, or what is set aside would be consumed; or something is unsafe, and
                ``preflight="raise"``. Nothing was consumed.
            FencedError: another instance has this ``group.instance.id``.
            OffsetsLost, AuthorizationError, BrokerError: see the class.
        """
        if self._thread is not None:
            raise TypeError("keep_alive needs a handler, to give it a thread: use run() or run_batches(), not messages()")
        check_run(self._settings, self._lifecycle, topics, until_idle, dead_letter=self._failures.topic)
        pace = self._pace(max_batch)
        return self._lifecycle.iterate(lambda itself: self._messages(topics, pace, until_idle, itself))

    def _messages(
        self, topics: Sequence[str], pace: Pace, until_idle: float | None, itself: Itself
    ) -> Generator[Message, None, None]:
        with closing(self._portions(topics, pace, until_idle, itself)) as portions:
            for messages in portions:
                yield from self._readable(messages)

    def _readable(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Those that can be read; the others are dropped."""
        unreadable = self._reading.unreadable
        if not unreadable:
            return messages
        for message in messages:
            if id(message) in unreadable:
                self._dropped([message], unreadable[id(message)])
        return [message for message in messages if id(message) not in unreadable]

    def _pace(self, max_batch: int) -> Pace:
        return Pace(max_batch, self._settings.max_poll_interval / 2, served=self._thread is not None)

    def _portions(
        self, topics: Sequence[str], pace: Pace, until_idle: float | None, itself: Itself | None = None
    ) -> Generator[Sequence[Message], None, None]:
        """The loop: as a member of the group, fetch, commit a portion, and hand it out if it is still ours."""
        check_run(self._settings, self._lifecycle, topics, until_idle, dead_letter=self._failures.topic)
        with self._lifecycle.running(itself), ended_after(self._thread):
            self._preflight.start(topics)
            also = self._failures.topics
            member = GroupConsumer(self._settings, self._lifecycle, topics, self._places, also=also, strict=True)
            member.idle, member.recent = self._send_lingering, self._recent
            with closing(member) as consumer:
                yield from self._portions_of(consumer, pace, until_idle)

    def _portions_of(
        self, consumer: GroupConsumer, pace: Pace, until_idle: float | None
    ) -> Generator[Sequence[Message], None, None]:
        size = 1
        for batch in consumer.batches(pace, until_idle, self._reading):
            if self._thread is not None:
                self._thread.attend(partial(consumer.serve_beside, batch), consumer.resume)
            rest = consumer.without_repeats(batch, self._handled, "; a new client handles them")
            while rest and not self._lifecycle.stopping and not consumer.stray:
                if time.monotonic() - batch.fetched > pace.late:
                    consumer.rewind(rest)
                    break
                portion, rest = rest[:size], rest[size:]
                if not self._committed(consumer, batch, portion):
                    break
                started = time.monotonic()
                self._reading.open(portion, whole=True)
                yield portion
                seconds = time.monotonic() - started
                size = next_size(len(portion), size, seconds, pace.size)
                pace.took(len(portion), seconds)

    def _committed(self, consumer: GroupConsumer, batch: Batch, portion: Sequence[Message]) -> bool:
        """Commit a portion. True: it is committed, and this member may handle it."""
        # M03: a plain commit of a member that the group has thrown out is accepted once the group is empty, so the clock is
        # asked as well: within half a session of a poll nobody can have thrown it out
        if not consumer.still_ours(batch, within=self._settings.session_timeout / 2):
            consumer.rewind(batch.messages)
            return False
        offsets = batch.next_offsets(portion)
        try:
            consumer.commit(offsets.values())
        except BrokerError as exc:
            log.warning("%s Nothing of this batch was handled; the brokers are asked what is committed.", exc)
            if not consumer.stray:  # the one request there was, was refused; to join anew would only make others be refused
                consumer.rewind(batch.messages)
            return False
        if not consumer.still_ours(batch, within=self._settings.session_timeout):
            log.warning("%d messages are dropped: the group gave them away while they were committed", len(portion))
            consumer.rewind(batch.messages)
            return False
        self._handled.update((partition, offset.offset) for partition, offset in offsets.items())
        return True

    def _dropped(self, messages: Sequence[Message], error: Exception) -> None:
        for message in messages:
            try:
                self._on_error(message, error)
            except Exception:
                log.exception("on_error raised")
            if self._failures.topic is not None:
                try:
                    self._send(self._failures.letter(message, GaveUp(error, 1)))
                except Exception:
                    log.exception("a dead letter was not sent")

    def _send_all(self, records: Records, *, ready: bool = False) -> None:
        try:
            for record in records_in(records):
                self._send(record if ready else self._writing.serialize(record))
        except BaseException:
            leave(records)
            raise

    # -- producing ----------------------------------------------------------------------------------------------------

    def produce(
        self,
        topic: str,
        value: Any = None,
        key: Any = None,
        *,
        headers: Headers = None,
        partition: int | None = None,
        timestamp: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Send a record at most once, and do not look back: no acknowledgement is asked for, nothing is retried (P07).

        Args:
            topic, value, key, headers, partition, timestamp: see ``Record``.
            timeout: seconds to wait where the queue is full; None: ``delivery.timeout.ms``.

        Raises:
            DeliveryError: it was certainly not sent: too large, or the queue stayed full for so long; or an *earlier* record
                was refused for want of an ACL, as this one would be.
            TypeError, ValueError: it is not a record.
            Exception: whatever a serializer raises. Nothing was sent.
            ForkedClientError: made by another process.
        """
        record = Record(topic, value, key, headers=headers, partition=partition, timestamp=timestamp)
        self._send(self._writing.serialize(record), timeout)

    def _send(self, record: Record, timeout: float | None = None) -> None:
        self._lifecycle.check()
        (self._producer or self._made()).send(record, timeout=timeout)

    def _send_lingering(self) -> None:
        """There is nothing to handle: no other record will come to keep those company that linger."""
        if self._producer is not None:
            self._producer.send_lingering()

    def _made(self) -> PlainProducer:
        """The producer, made when it is needed first."""
        return first_producer(self, self._settings, self._lifecycle)

    def flush(self, timeout: float = 10.0) -> int:
        """Wait until what was produced is with the network, for at most ``timeout`` seconds. Returns how much is not.

        Raises:
            DeliveryError: a record was refused for want of an ACL.
            BrokerError: the producer cannot go on.
            KafkaGuaranteesError: this thread is in a callback of the client, or in a signal handler that came in one.
            ForkedClientError: made by another process.
        """
        self._lifecycle.check()
        if self._producer is None:
            return 0
        deadline = time.monotonic() + timeout
        left = self._producer.drain(lambda: time.monotonic() >= deadline)
        self._producer.raise_refused()
        return left

    # -- ending -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask ``run`` to return after what is in hand. Safe in threads and signal handlers; without a run it ends the next."""
        self._lifecycle.stop()

    def close(self, timeout: float | None = None) -> None:
        """End a run, send what is queued, and let the clients go, within ``timeout`` seconds (None: 10). Losses are logged.

        Raises:
            KafkaGuaranteesError: this thread is in the handler or in a callback of the client, or in a signal handler that
                came in one: call ``stop()`` there.
        """
        if self._lifecycle.closed or self._lifecycle.forked:
            return
        if self._producer is not None:
            self._producer.check_waiting()
        timeout = 10.0 if timeout is None else timeout
        deadline = time.monotonic() + timeout
        with self._lifecycle.ending(timeout) as ended:
            if not ended:
                log.warning("the handler has not returned within %.1f s; its thread goes on without a client", timeout)
            with self._making:  # a thread that produces first has one by then, or is refused
                self._lifecycle.closed = True
            if self._producer is not None:
                left = self._producer.close(max(0.0, deadline - time.monotonic()))
                try:
                    self._producer.raise_refused()
                except DeliveryError as exc:
                    log.warning("%s", exc)
                if left:
                    why = "the brokers do not take them, or have no such topic"
                    log.warning("%d records were not sent within %.1f s: %s", left, timeout, why)

    def __enter__(self) -> Self:
        self._lifecycle.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        close_behind(error, self.close)

    def preflight(self, topics: Sequence[str] = ()) -> PreflightReport:
        """Ask the brokers whether they keep this guarantee for ``topics``, consumed or produced to, within 5 seconds.

        Returns:
            The findings: what was seen, what is needed, why, and the command that mends it. What may not be asked is a finding.

        Raises:
            TypeError: ``topics`` is a single name.
            ForkedClientError: made by another process.
        """
        return self._preflight.report(topics)

    @classmethod
    def explain(cls, config: Mapping[str, object] | None = None) -> Explanation:
        """What this guarantee sets and why, with ``config`` on top. Needs no broker; never shows a secret.

        Raises:
            UnsafeConfigError: a setting contradicts the guarantee, or nobody knows it.
            TypeError: ``config`` is not a mapping.
        """
        return explain(Guarantee.AT_MOST_ONCE, config)


def next_size(handled: int, size: int, seconds: float, limit: int) -> int:
    """How many messages to commit next, when the last ``handled`` took ``seconds``: about PORTION seconds' worth."""
    if seconds > PORTION:
        return max(1, min(limit, int(handled * PORTION / seconds)))
    return min(limit, 2 * size) if handled == size else size


def _log_dropped(message: Message, error: Exception) -> None:
    log.error(
        "%s could not be handled (%s: %s); the message is dropped",
        where(message),
        type(error).__name__,
        text_of(error),
        exc_info=error,
        extra=fields(message),
    )
