"""The producer without transactions: records go in (``_enqueue.py``), and deliveries come out of it.

Rules.
* Delivery callbacks never raise: inside commit_transaction() that would hide a success (X04, P12).
* A C producer is never closed by ``close()``, which waits without a limit (P15): it is flushed, purged and let go.
"""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Protocol

from confluent_kafka import KafkaError, KafkaException, Producer

from ._awaited import Awaited
from ._client import Callbacks, Handle, Rarely
from ._enqueue import AS_IT_IS, KNOWING, SLICE, checked_headers, enqueue, not_a_topic
from ._posted import Posted
from ._settings.values import shown
from ._threads import Flag, start
from ._turns import Turns
from .errors import (
    MISSING_ACL,
    DeliveryError,
    DeliveryUnknown,
    DurabilityWarning,
    KafkaGuaranteesError,
    broker_failure,
    delivery_failure,
    describe,
    kafka_error,
    of_record,
)
from .records import LOST, Delivery, Record, Silence

if TYPE_CHECKING:
    import threading
    from asyncio import Future
    from collections.abc import Callable, Iterable, Sequence

    from confluent_kafka import Message

    from ._enqueue import DeliveryCallback
    from ._lifecycle import Lifecycle
    from ._settings import Settings
    from .records import Headers, Payload

log = logging.getLogger("kafka_guarantees")

HURRY = 0.002  # seconds at a time, where only some of the records are waited for
SERVE_EVERY = 200  # produced records between two looks at the callbacks
ASKED = 1000  # failures that were waited for in vain, and are kept for flush() and close()
IDLE_SERVE = 0.5  # seconds: how late callbacks are served while nobody calls


class PlainProducer(Handle):
    """A producer of at-most-once and at-least-once: records go out one by one.

    Args:
        owner: the client that this belongs to; when it is forgotten without ``close()``, a warning says what was lost.
        settings: the resolved settings of the guarantee.
        lifecycle: of the owner.
    """

    def __init__(self, owner: object, settings: Settings, lifecycle: Lifecycle) -> None:
        self._callbacks = Callbacks()
        super().__init__()
        self._refused: deque[KafkaGuaranteesError] = deque(maxlen=1)  # of a record that nobody else hears of
        refused = self._callbacks.shim("on_delivery", partial(_note_lost, self._refused, Rarely()))
        self.make(Producer, {**settings.producer, **self._callbacks.of(settings.callbacks), "on_delivery": refused})
        self._lifecycle = lifecycle
        self.patience = settings.delivery_timeout
        self._known: set[str] = set()
        self._topics: set[str] = set()  # of what was posted
        self._unserved = 0
        self._served = time.monotonic()
        self.failed = False  # a hint that there are failures in the next: looking through it for each record is too slow
        self.unacknowledged: set[Delivery] = set()  # on their way, or failed and not looked at
        self.warn_if_forgotten(owner, _warn_unsent, self.raw, self._callbacks, introduced(settings))
        self._open: list[Posted] = []  # with reports that have not come
        self.not_written: list[KafkaGuaranteesError] = []  # of what was posted, and not looked at
        self._turns = Turns()
        self._awaited = Awaited()
        self._rarely = Rarely()
        self._asked: dict[Delivery, None] = {}  # that have failed, and had been waited for in vain
        self._forgotten: list[None] = []  # one for each of these that there was no room for
        self.begin()
        self._closing = Flag()
        start(_serve_idle, weakref.ref(self), self._closing, name="kafka-guarantees-serve")

    def meet(self, topic: str) -> None:
        """Wait a moment for a broker to answer, before the first record.

        librdkafka asks for the id of an idempotent producer whenever a broker answers, and else after half a second. The first
        answer may be one that makes it close the connection it came by, that of a bootstrap address: then nobody is asked.

        Raises:
            BrokerError: none lets this client in. That does not pass, and records would be tried for ``delivery.timeout.ms``.
        """
        try:
            for _ in ("by its address", "by its id"):
                self.raw.list_topics(topic, KNOWING)
        except KafkaException as exc:
            kafka_error(exc)  # lets go of what its user is handling
            self.serve()
            self._callbacks.raise_shut_out()
        except (TypeError, ValueError, RuntimeError):  # what is wrong is said of the record
            pass

    def produce(self, record: Record) -> Delivery:
        """Queue a record. Its failure, now or later, is in the delivery; only TypeError and ValueError are raised."""
        return self.deliver(record.topic, record.value, record.key, record.headers, record.partition, record.timestamp)

    def deliver(  # noqa: PLR0917 - it is called for each record, and calls and names cost time
        self,
        topic: str,
        value: Payload,
        key: Payload,
        headers: Headers,
        partition: int | None,
        timestamp: int | None,
        timeout: float | None = None,
    ) -> Delivery:
        """The same for a record that need not be made; for ``timeout`` seconds where the queue is full."""
        raw = self.raw
        if raw is None:
            raw = self._open_raw()
        delivery = Delivery(topic, self)
        self.unacknowledged.add(delivery)  # before it is sent: what is not struck off again was not acknowledged
        try:
            plain = partition is None and timestamp is None
            if plain and value.__class__ in AS_IT_IS and key.__class__ in AS_IT_IS:
                try:
                    if headers:
                        raw.produce(topic, value, key, -1, delivery, None, 0, checked_headers(headers))
                    else:
                        raw.produce(topic, value, key, -1, delivery)
                except BufferError:
                    self._queue(Record(topic, value, key, headers=headers), delivery, timeout)
            else:
                record = Record(topic, value, key, headers=headers, partition=partition, timestamp=timestamp)
                self._queue(record, delivery, timeout)
        except (DeliveryError, DeliveryUnknown) as exc:
            delivery._fail(exc)
        except KafkaException as exc:
            delivery._fail(self._not_taken(exc, topic))
        except (TypeError, ValueError) as exc:
            problem = not_a_topic(topic) or exc
            failure = DeliveryError(f"a record for topic {topic!r} was not written: {problem}")
            failure.__cause__ = problem
            delivery._fail(failure)
            if not self._lifecycle.in_hand:  # a handler may swallow it, but then its message is not finished
                self.unacknowledged.discard(delivery)
            raise problem from problem.__cause__
        self._unserved += 1
        if self._unserved >= SERVE_EVERY:  # behind all that: what a signal handler raises here says nothing of the record
            self.serve()
        return delivery

    def post(self, record: Record) -> None:
        """Queue a record that nobody asks about: only ``flush`` and ``failures`` tell of it. For one thread at a time.

        Raises:
            DeliveryError, DeliveryUnknown: librdkafka did not take it. It is not among the failures.
            TypeError, ValueError: it is not a record.
        """
        raw, posted, topic = self.raw, self._posted, record.topic
        value, key, headers = record.value, record.key, record.headers
        if raw is None:
            raw = self._open_raw()
        plain = record.partition is None and record.timestamp is None
        if topic not in self._topics:
            self._topics.add(topic)
        posted.sent += 1  # before it is sent: what is not reported on was not acknowledged
        try:
            if plain and value.__class__ in AS_IT_IS and key.__class__ in AS_IT_IS:
                try:
                    if headers:
                        raw.produce(topic, value, key, -1, self._report, None, 0, checked_headers(headers))
                    else:
                        raw.produce(topic, value, key, -1, self._report)
                except BufferError:
                    enqueue(raw, record, self._report, self._patient, self._known, serve=self._callbacks.serve)
            else:
                enqueue(raw, record, self._report, self._patient, self._known, serve=self._callbacks.serve)
        except KafkaException as exc:
            posted.sent -= 1
            raise self._not_taken(exc, topic) from exc
        except (DeliveryError, TypeError, ValueError) as exc:
            posted.sent -= 1
            problem = not_a_topic(topic) or exc
            raise problem from problem.__cause__
        self._unserved += 1
        if self._unserved >= SERVE_EVERY:
            self.serve()

    def begin(self) -> None:
        """Count what is posted from now on by itself, and forget what is acknowledged."""
        self._posted = Posted(self.not_written)
        self._report = self._posted.report  # made once
        self._open = [*(posted for posted in self._open if posted.unknown), self._posted]

    def abandon(self) -> None:
        """A run begins: what an interrupted one posted, and nobody knows the fate of, comes again with its messages."""
        for posted in self._open:
            posted.abandon()
        self.not_written[:] = [failure for failure in self.not_written if not isinstance(failure, DeliveryUnknown)]
        self.begin()

    def portion(self) -> Posted | None:
        """What was posted since this was last asked; None: nothing."""
        posted = self._posted
        if not posted.sent and not posted.failed:
            return None
        self.begin()
        return posted

    def send_lingering(self) -> None:
        """Send what lingers, and give it a moment to leave."""
        self._lifecycle.check_fork()
        if self.raw is not None and len(self.raw):
            self._call(lambda raw: raw.flush(HURRY))

    def wait(self, posted: Posted, give_up: Callable[[], bool]) -> int:
        """Wait for the reports of these only, or until ``give_up()``. Returns how many are missing."""
        self.serve()
        return self._settled([], [posted], give_up)

    def note(self, failure: KafkaGuaranteesError) -> None:
        """Have a record that was not taken among the failures."""
        self._posted.fail(failure)

    def send(self, record: Record, timeout: float | None = None) -> None:
        """Queue a record that nobody hears of again, within ``timeout`` seconds. Raises where librdkafka does not take it.

        And where an earlier record was refused for want of an ACL: this one would be, too.
        """
        self._queue(record, None, timeout)
        self._unserved += 1
        if self._unserved >= SERVE_EVERY:
            self.serve()

    def _queue(self, record: Record, callback: DeliveryCallback | None, timeout: float | None) -> None:
        if self._refused:
            self.raise_refused()
        try:
            patient = self._patient if timeout is None else partial(self._patient_for, timeout)
            enqueue(self._open_raw(), record, callback, patient, self._known, serve=self._callbacks.serve)
        except KafkaException as exc:
            raise self._not_taken(exc, record.topic) from exc

    def _open_raw(self) -> Producer:
        raw: Producer | None = self.raw
        if raw is None:
            raise KafkaGuaranteesError("the client was closed meanwhile. This record was not sent.")
        return raw

    def _not_taken(self, exc: KafkaException, topic: str) -> KafkaGuaranteesError:
        """Why librdkafka did not take a record."""
        error = kafka_error(exc)
        failure = delivery_failure(error, topic)
        if error.code() == KafkaError._FATAL:  # and nothing more: what it is comes with the callbacks (P09)
            try:
                self.serve(SLICE)
            except KafkaGuaranteesError as fatal:
                failure = DeliveryError(f"a record for topic {topic!r} was not written: {fatal}")
        failure.__cause__ = exc
        return failure

    def raise_refused(self) -> None:
        """Raise the refusal of an earlier record that has no callback, once."""
        if self._refused:
            raise self._refused.pop()

    def _patient(self, waited: float) -> bool:
        # by then the oldest record in the queue must have been settled, one way or the other
        return waited < self.patience and not (self._lifecycle.out_of_patience or self._callbacks.serving)

    def _patient_for(self, timeout: float, waited: float) -> bool:
        return waited < timeout and self._patient(waited)

    def serve(self, timeout: float = 0) -> None:
        """Serve what waits of callbacks, for at most ``timeout`` seconds. In one of them it does nothing."""
        if self._callbacks.serving:
            return
        self._unserved = 0
        self._served = time.monotonic()
        self._call(lambda raw: raw.poll(timeout))

    def wait_for(self, delivery: Delivery, timeout: float) -> int | None:
        """Serve callbacks for a moment, or have another thread do it, for at most ``timeout`` seconds. Nothing lingers.

        Returns:
            How many records are on their way; None: another thread serves.
        """
        self.check_waiting()
        return self._turns.wait(delivery, timeout, lambda: self._call(partial(self._hasten, delivery, min(timeout, HURRY))))

    def future_of(self, delivery: Delivery) -> Future[None]:
        """A future of the running event loop, which is done when the delivery is. Meanwhile nothing lingers."""
        self.check_waiting()
        return self._awaited.future(delivery, self.patience, self.wait_for)

    @staticmethod
    def _hasten(delivery: Delivery, timeout: float, raw: Producer) -> int:
        left = raw.flush(timeout)
        if not left and not delivery.done:
            raw.poll(timeout)  # its report was lost: flush() does not wait where nothing is on its way
        return left

    def drain(self, give_up: Callable[[], bool]) -> int:
        """Wait until nothing is queued, nor what is produced meanwhile, or ``give_up()``. Returns how many records are."""
        while (left := self._call(lambda raw: raw.flush(SLICE))) and not give_up():
            self._served = time.monotonic()
        return left

    def flush(self, give_up: Callable[[], bool]) -> int:
        """Wait until what was produced before is settled, or ``give_up()``. Returns how many records are not.

        What others produce meanwhile is not waited for: they may never pause. What a run posts, the run itself waits for.
        """
        posted = [] if self._lifecycle.in_other_hands else self._open
        return self._settled(list(self.unacknowledged), posted, give_up)

    def _settled(self, waiting: list[Delivery], posted: Sequence[Posted], give_up: Callable[[], bool]) -> int:
        """Wait for these reports, or until ``give_up()``. Returns how many are missing. One that cannot come any more is lost.

        It cannot where nothing was on its way for a while; and where others always produce, once its record must have been
        settled.
        """
        began = now = time.monotonic()
        silence = Silence()
        while True:
            # serves callbacks as poll() does, and sends at once what lingers; returns early only when the whole queue is empty
            pause = min(SLICE, max(HURRY, (now - began) / 8))
            left = self._call(lambda raw: raw.flush(pause))  # noqa: B023 - it is called at once
            now = self._served = time.monotonic()
            while waiting and waiting[-1].done:
                waiting.pop()
            posted = [each for each in posted if each.unknown]
            if not (waiting or posted):
                return 0
            if silence.lasts(left) or now - began > self.patience + LOST:
                _lose(waiting, posted)
                return 0
            if give_up():
                return sum(not delivery.done for delivery in waiting) + sum(each.unknown for each in posted)
            if not left:
                self.serve(SLICE / 10)

    def _call(self, serve: Callable[[Producer], int]) -> int:
        """Serve callbacks. librdkafka raises a fatal error of the producer here, and only here (P09)."""
        self._lifecycle.check_fork()
        raw: Producer | None = self.raw  # read once: another thread may close the client here
        if raw is None:  # close() did not wait any longer for the handler that is in hand
            raise KafkaGuaranteesError("the client was closed meanwhile. Nothing of a message that is in hand was committed.")
        try:
            return self._callbacks.serve(lambda: serve(raw))
        except KafkaException as exc:
            topics = self._topics | {delivery.topic for delivery in list(self.unacknowledged)}
            safe = "The producer cannot go on: make a new client."
            raise broker_failure(kafka_error(exc), "producing", safe, output=topics) from exc
        finally:
            self._callbacks.raise_interrupt()

    def check_waiting(self) -> None:
        """Refuse to wait for callbacks in one of them, before anything has changed.

        Raises:
            ForkedClientError: made by another process.
            KafkaGuaranteesError: it is in one of them.
        """
        self._lifecycle.check_fork()
        self._callbacks.check()

    def failures(self, *, forget: bool, posted: bool = True, asked: bool = True) -> list[KafkaGuaranteesError]:
        """The failures that nobody has looked at. With ``forget`` these, and no later ones, count as looked at.

        Those of records that were posted do so only with ``posted`` as well, and are not listed without ``forget``: whoever has
        no part in a run hears nothing of what it sends, and may set aside; but for ``close()``, which ends that. Without
        ``asked`` those that ``forget_asked`` has logged are not among them.
        """
        if forget:
            self.failed = False  # before they are listed: one that comes meanwhile sets it again
        failed = [delivery for delivery in list(self.unacknowledged) if delivery._failure is not None]
        found = [delivery._failure for delivery in failed if delivery._failure is not None]
        not_written = self.not_written[:] if forget or self._lifecycle.closed else []
        if forget and posted:
            del self.not_written[: len(not_written)]
        if forget:
            self.unacknowledged.difference_update(failed)
        if asked:
            late = list(self._asked)
            found += [delivery._failure for delivery in late if delivery._failure is not None]
            found += found[-1:] * len(self._forgotten)  # that is how many there were
            if forget:
                for delivery in late:
                    self._asked.pop(delivery, None)
                self._forgotten.clear()
        return found + not_written

    def refused(self) -> KafkaGuaranteesError | None:
        """Why brokers refused a record that was posted, if they did: what was not written of these counts as looked at then."""
        failures = self.not_written[:]
        refused = next((failure for failure in failures if of_record(failure)), None)
        if refused is not None:
            del self.not_written[: len(failures)]
        return refused

    def forget_asked(self) -> None:
        """Log failures that somebody has waited for in vain, and keep some for flush(): the next record is not to pay."""
        failed = [delivery for delivery in list(self.unacknowledged) if delivery._failure is not None and delivery.asked]
        for delivery in failed:
            if len(self._asked) < ASKED:
                self._asked[delivery] = None
            else:
                self._forgotten.append(None)
            if self._rarely(str(delivery._failure)):
                log.warning("%s It had been waited for in vain.", delivery._failure)
        self.unacknowledged.difference_update(failed)

    def looked_at(self, delivery: Delivery) -> None:
        """Somebody has been told of its failure."""
        self.unacknowledged.discard(delivery)
        self._asked.pop(delivery, None)

    def forgive(self, error: Exception) -> None:
        """What was refused with this exception counts as looked at."""
        if self.failed:
            refused = [d for d in list(self.unacknowledged) if d._failure is not None and d._failure.__cause__ is error]
            self.unacknowledged.difference_update(refused)

    def close(self, timeout: float) -> int:
        """Flush for at most ``timeout`` seconds and let the client go. Returns how many records were given up."""
        deadline = time.monotonic() + timeout
        self._closing.set()
        try:
            left = self.drain(lambda: time.monotonic() >= deadline) or self.flush(lambda: time.monotonic() >= deadline)
            if left:
                # P14: this does not block. With False confluent-kafka 2.16 waits, and holds up all threads of Python, for as
                # long as the name of a broker is looked up
                self.raw.purge(in_queue=True, in_flight=True, blocking=True)
                # the reports of what was purged: every delivery is settled
                self._callbacks.serve(partial(self.raw.flush, SLICE))
                _lose(list(self.unacknowledged), self._open)
        finally:  # also of a producer that cannot go on (P09)
            self.closed()
            self.let_go()
        return left


class _Owner(Protocol):
    """A client that has a producer once it needs one."""

    _producer: PlainProducer | None
    _making: threading.RLock


def first_producer(owner: _Owner, settings: Settings, lifecycle: Lifecycle, meet: str | None = None) -> PlainProducer:
    """The producer of a client, made when it is needed first, and once: what another one took nobody would flush.

    Args:
        owner: the client.
        settings, lifecycle: of it.
        meet: the topic of the first record, where brokers are waited for a moment before that.

    Raises:
        KafkaGuaranteesError: the client is closed.
        ForkedClientError: made by another process.
    """
    lifecycle.check()  # a child would wait for a thread that it does not have
    with owner._making:
        lifecycle.check()
        while owner._producer is None:
            made = PlainProducer(owner, settings, lifecycle)
            if owner._producer is None:
                owner._producer = made
                if meet is not None:
                    made.meet(meet)
            else:  # a signal handler has produced meanwhile
                made.closed()
                made.let_go()
        return owner._producer


def _lose(waiting: Iterable[Delivery], posted: Iterable[Posted]) -> None:
    """No report on these will come."""
    for delivery in waiting:
        if not delivery.done:
            delivery._lost()
    for each in posted:
        each.lose()


def _note_lost(refused: deque[KafkaGuaranteesError], rarely: Rarely, error: KafkaError | None, message: Message) -> None:
    """Say that a record was lost, or keep what the brokers will say of the next one, too.

    It must not hold the producer, which may be forgotten.
    """
    if error is None or error.code() in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):  # close() says how many
        return
    topic = message.topic() or "?"
    if error.code() in MISSING_ACL:
        refused.append(delivery_failure(error, topic))
    elif rarely((topic, error.code())):
        log.warning("a record for topic %r is lost, or may be, and is not sent again: %s", topic, describe(error))


def introduced(settings: Settings) -> str:
    """A client, for a sentence that begins with it: its guarantee, and its client.id where it has one."""
    name = settings.producer.get("client.id")
    return f"an {settings.guarantee.value} client" + ("" if name is None else f" ({shown('client.id', name)})")


def _records(number: int) -> str:
    return "1 record" if number == 1 else f"{number} records"


def _warn_unsent(raw: Producer, callbacks: Callbacks, client: str) -> None:
    """P04: a producer that is forgotten loses its queue without a word."""
    if not callbacks.serving:  # forgotten in one of its callbacks: to serve it again would abort the process (P12)
        callbacks.serve(partial(raw.poll, 0))  # len() counts waiting events as well
    unsent = len(raw)
    if unsent:
        text = f"{client} was not closed, with {_records(unsent)} that nobody has acknowledged. Use `with`, or close()."
        warnings.warn(text, DurabilityWarning, stacklevel=2)
    else:
        warn_unclosed(client)


def warn_unclosed(client: str) -> None:
    """A client that is forgotten leaves its group late, and its transaction open."""
    warnings.warn(f"{client} was not closed. Use `with`, or close().", ResourceWarning, stacklevel=2)


def _serve_idle(producer: weakref.ref[PlainProducer], end: Flag) -> None:
    """Serve callbacks of a producer that nobody calls (Y12). A busy one is left alone: two pollers would fight for the GIL."""
    while not end.wait(IDLE_SERVE) and _serve_once(producer()):
        pass  # no reference is kept while waiting, so that a forgotten producer is collected


def _serve_once(producer: PlainProducer | None) -> bool:
    raw = None if producer is None else producer.raw
    if producer is not None and raw is not None and time.monotonic() - producer._served > IDLE_SERVE:
        try:
            producer._callbacks.serve(partial(raw.poll, 0))
        except KafkaException as exc:
            log.warning("the producer cannot go on: %s", describe(kafka_error(exc)))  # the next call fails as well
    return raw is not None


def raise_failures(failures: list[KafkaGuaranteesError], left: int, safe: str) -> None:
    """Raise for records that were not acknowledged, with their number; nothing where all were."""
    if failures:
        more = f" And {len(failures) - 1} more failed." if len(failures) > 1 else ""
        if left:
            more += f" Of {left} more it is not known whether they were written: there was no answer in time."
        unknown = left or any(isinstance(failure, DeliveryUnknown) for failure in failures)
        kind = DeliveryUnknown if unknown else DeliveryError
        raise kind(f"{failures[0]}{more} {safe}") from failures[0]
    if left:
        raise DeliveryUnknown(f"not acknowledged in time: {_records(left)}, which may or may not have been written. {safe}")
