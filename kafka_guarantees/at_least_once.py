"""At least once: no message is lost, some may be handled again.

What happens to one message::

    fetched with others -> handled -> every record produced meanwhile is acknowledged -> still a member of the group?
    -> its offset committed with those of its portion, and the answer looked at

* A portion ends with the batch, after COMMIT_EVERY seconds of handling, or with the message before one that failed. The commit
  of a whole batch is on its way while the next one is handled, see ``Trail``: what is repeated after a crash is at most four
  portions. All other commits are waited for.
* A message whose handler raised is tried again in its place, as ``retry`` says. If that does not help, it goes to the dead
  letter topic, and is finished once its copy there is acknowledged (L05); without that topic the run ends. Either way nothing
  at or after a message that is not finished is committed (L01).
* A record that was not acknowledged stops the run as well, whoever produced it, unless its ``result()`` raised that in the
  handler, which then knows (P01, L03).

With a deduplication store, around handling::

    ids claimed, one call for the batch -> those that were handled before left out -> handled -> ... acknowledged
    -> ids completed -> offset committed

With an inbox::

    database transaction begun: offsets locked, ids noted, what was handled before left out -> handled -> ... acknowledged
    -> offsets moved -> transaction committed -> the group's offset committed, for those who watch it

The loops are here; ``_at_least_once_run.py`` has what they do with a batch before and after its handling.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ._at_least_once_run import COMMIT_EVERY, NOT_PAST, Run
from ._consumer import GroupConsumer
from ._enqueue import QueueFull
from ._failures import RETRY, Failed, Failures
from ._handler_thread import ended_after, handler_thread
from ._lifecycle import Lifecycle, close_behind
from ._pace import FIRST_BATCH, Pace
from ._places import Places
from ._preflight import Preflight
from ._producer import PlainProducer, first_producer, raise_failures
from ._recognition.options import BY_HEADER, Recognition
from ._recognition.topics import TopicIds
from ._serialization import Reading, Writing
from ._settings import Guarantee, explain, resolve
from ._topics import check_run
from .dedup._progress import check_open
from .errors import DeliveryError, DeliveryUnknown, of_topic
from .records import Record, RecordRefused, check_handler, leave, records_in, with_id

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from types import TracebackType

    from confluent_kafka import Message
    from tenacity import Retrying
    from typing_extensions import Self

    from ._batch import Batch
    from ._failures import Handling
    from ._handler_thread import HandlerThread
    from ._lifecycle import Itself
    from ._places import Start
    from ._preflight import AtStart, PreflightReport
    from ._recognition.claims import OnStoreError
    from ._recognition.message_ids import OnMissingId
    from ._recognition.portions import Portions
    from ._serialization import Deserializer, Serializer
    from ._settings import Explanation
    from .dedup.contract import DedupStore, Inbox, Takeover
    from .dedup.ids import IdOf
    from .records import BatchHandler, Delivery, Handler, Headers, InboxBatchHandler, InboxHandler, Records

log = logging.getLogger("kafka_guarantees")

LEAVING = 10.0  # seconds that a loop which is left waits for brokers that do not answer
FENCED_REST = 0.5  # seconds until messages are fetched again that another member handles, or that an inbox did not take


class AtLeastOnce:
    """Produce and consume at least once: nothing acknowledged is lost; after a failure something may come again.

    Args:
        config: librdkafka's properties, for both sides. See ``explain()`` for what is set on top.
        start: where a group without committed offsets begins.
        retry: a ``tenacity.Retrying`` that decides whether a handler that raised is called again, and when. Only exceptions are
            looked at; its ``sleep`` is replaced: meanwhile the group is served, and ``stop()`` is heard. By default five
            attempts within three seconds, and only one after a mistake of the program, as a TypeError or ValueError is. None:
            one attempt.
        dead_letter: topic for messages that cannot be handled, or read, or whose records are refused for what they are. They
            are finished once their copy there is acknowledged. None: such a message ends the run.
        keep_alive: handlers have a thread of their own, and may take longer than ``max.poll.interval.ms``.
        key_deserializer, value_deserializer: of confluent-kafka, or any function of bytes and a SerializationContext; handlers
            see what they return. ``None`` is left alone.
        key_serializer, value_serializer: the same for records that are produced.
        preflight: when a run starts, the brokers are asked whether their topics and settings keep this guarantee. What is
            found is logged (``"warn"``), or what is unsafe ends the run before it consumes (``"raise"``); or nothing is asked
            (``"off"``). See ``preflight()``.
        dedup: a store of ``kafka_guarantees.dedup``: messages with an id that was handled before are left out.
        inbox: an inbox of ``kafka_guarantees.dedup``: ids, offsets and the handler's own writes are one transaction of its
            database. Handlers are called with its connection as their second argument.
        message_id: takes the id out of a message, as ``header(name)``, ``cloudevent()`` or any function of a message do. None,
            with an inbox: only the same record is recognised when it comes again, which costs next to nothing.
        on_missing_id: a message without an id is an error (``"raise"``), is the record at its place (``"position"``), or is
            handled without protection (``"process"``).
        on_store_error: while the store is down nothing is handled (``"wait"``), or everything is, without protection
            (``"process"``).
        takeover: a message whose owner died is handled by the next one at once (``"position"``); or only when its claim ends,
            ``max.poll.interval.ms`` and a minute later (``"lease"``), so that an owner who is only slow is not doubled.
        scope: whose ids these are; ``group.id`` by default. Two applications with one scope lose messages to each other (D07).
        fingerprint: an id that comes with another key or value than before is an error, not a message that is silently left out
            (D08).

    Promised: every message is handled to its end at least once; an offset moves only after that, and after every record that
    was produced meanwhile is acknowledged by all in-sync replicas. With an inbox the handler's writes to its database happen
    once for each message. With a store a message is handled once, unless its handler raises after an effect, or a worker dies
    or loses its partition between an effect and its mark; or a record is refused, by the brokers, or with ``keep_alive``.
    Not promised: that it is handled only once. Even the idempotent producer can write a record twice (P08).

    Raises:
        UnsafeConfigError: a setting contradicts the guarantee. Nothing was connected.
        TypeError, ValueError: the arguments contradict each other.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        /,
        *,
        start: Start = "earliest",
        retry: Retrying | None = RETRY,
        dead_letter: str | None = None,
        keep_alive: bool = False,
        key_deserializer: Deserializer | None = None,
        value_deserializer: Deserializer | None = None,
        key_serializer: Serializer | None = None,
        value_serializer: Serializer | None = None,
        preflight: AtStart = "warn",
        dedup: DedupStore | None = None,
        inbox: Inbox[Any] | None = None,
        message_id: IdOf | None = BY_HEADER,
        on_missing_id: OnMissingId = "raise",
        on_store_error: OnStoreError = "wait",
        takeover: Takeover = "position",
        scope: str | None = None,
        fingerprint: bool = True,
    ) -> None:
        self._settings = resolve(Guarantee.AT_LEAST_ONCE, config)
        self._places = Places(self._settings.group_id, start)
        self._lifecycle = Lifecycle("AtLeastOnce")
        self._producer: PlainProducer | None = None
        self._making = threading.RLock()  # also by a signal handler, in the middle of it
        self._reading = Reading(key_deserializer, value_deserializer)
        self._writing = Writing(key_serializer, value_serializer)
        self._thread = handler_thread(keep_alive, self._lifecycle, self._settings.max_poll_interval)
        self._failures = Failures(self._settings, self._lifecycle, self._reading, retry=retry, dead_letter=dead_letter)
        self._recognition = Recognition(
            self._settings,
            dedup,
            inbox,
            message_id,
            on_missing_id=on_missing_id,
            on_store_error=on_store_error,
            takeover=takeover,
            scope=scope,
            fingerprint=fingerprint,
        )
        self._preflight = Preflight(
            self._settings, self._lifecycle, preflight, dead_letter=dead_letter, retention=self._recognition.retention
        )

    # -- consuming ----------------------------------------------------------------------------------------------------

    def run(
        self,
        topics: Sequence[str],
        handler: Handler | InboxHandler,
        *,
        max_batch: int = 4000,
        until_idle: float | None = None,
    ) -> None:
        """Call ``handler`` for every message of ``topics``; records that it returns are produced before its offset moves.

        Blocks until ``stop()``, until SIGINT or SIGTERM if this is the main thread, or until no message has come for
        ``until_idle`` seconds. The message in hand is finished and committed, and the group left, before it returns; one that
        waits to be tried again is left, and comes again.

        Args:
            topics: names, or patterns that begin with ``^``.
            handler: called with a ``confluent_kafka.Message``, and with an inbox also its connection; returns or yields
                ``Record``, or returns None.
            max_batch: messages fetched at a time. At most four times as many are repeated after a crash.
            until_idle: seconds.

        Raises:
            HandlerError: the handler raised, in every attempt, or there was no use in another, and there is no dead letter
                topic; or it took longer than ``max.poll.interval.ms``, twice at the same message. What it finished before is
                committed, nothing at or after that message.
            DeliveryError, DeliveryUnknown: a record, perhaps a dead letter, was not acknowledged; nothing of its portion is
                committed.
            MessageIdMissing, MessageIdReused: it has no id, or that of another one, and there is no dead letter topic. What
                came before is committed.
            UnsafeConfigError: there is no ``group.id``, or what is set aside would be consumed; or something is unsafe, and
                ``preflight="raise"``. Nothing was consumed.
            FencedError: another instance has this ``group.instance.id``.
            OffsetsLost, AuthorizationError, BrokerError: see the class.
        """
        check_handler(handler, self._arguments)
        handle = self._handle if self._thread is None else partial(self._handle_in_thread, self._thread)
        self._run(topics, partial(handle, handler), self._pace(max_batch), until_idle)

    def _handle(
        self, handler: Callable[..., Records], messages: Sequence[Message], *connection: Any
    ) -> tuple[int, Failed | None]:
        """Handle messages until the portion is full, the client is to stop, or one fails. Returns how many are finished."""
        clock, lifecycle, done = time.monotonic, self._lifecycle, 0
        call = self._reading.checked(handler if not connection else lambda message: handler(message, *connection))
        until = clock() + COMMIT_EVERY
        for message in messages:
            try:
                records = call(message)
                if records is not None:
                    self._send_all(records)
                if connection:
                    check_open(*connection)
            except Exception as error:  # noqa: BLE001 - it is tried again, set aside, or raised
                self._forgive(error)
                return done, Failed(1, error)
            done += 1
            if clock() >= until or lifecycle.stopping:
                break
        return done, None

    def _handle_in_thread(
        self, thread: HandlerThread, handler: Callable[..., Records], messages: Sequence[Message], *connection: Any
    ) -> tuple[int, Failed | None]:
        """The same with a handler that has a thread of its own. What it returned is sent afterwards.

        What was handled behind a message whose record is refused is kept until its turn comes. Not with an inbox, whose
        transaction is rolled back: that is handled again.
        """
        made_by = self._writing.made_by(self._reading.checked(handler))

        def call(message: Message) -> list[Record]:
            records = made_by(message, *connection)
            if connection:
                check_open(*connection)
            return records

        done: list[list[Record]] = []
        error = thread.each(call, messages, done, COMMIT_EVERY)
        if error is not None:
            self._forgive(error)
        for number, records in enumerate(done):
            try:
                self._send_all(records, ready=True)
            except Exception as refused:  # noqa: BLE001 - as above
                self._forgive(refused)
                behind = [*done[number + 1 :], *(() if error is None else (error,))]
                if connection:
                    thread.narrow()
                elif behind:
                    thread.keep(list(zip(messages[number + 1 :], behind, strict=False)))
                return number, Failed(1, refused)
        return len(done), None if error is None else Failed(1, error)

    def run_batches(
        self,
        topics: Sequence[str],
        handler: BatchHandler | InboxBatchHandler,
        *,
        max_batch: int = 4000,
        max_wait: float = 0.0,
        until_idle: float | None = None,
    ) -> None:
        """Like ``run``, with a handler that takes a batch: few messages at first, then as many as it can handle in good time.

        Where it raises, nothing of the batch is committed, and the batch is tried again. With a dead letter topic its messages
        are then handled one by one, and those that fail are set aside.

        Args:
            topics, handler, until_idle: as for ``run``; the handler is called with a list.
            max_batch: messages of a batch.
            max_wait: seconds that a batch which is not full waits for more, once it has a message; up to a quarter of
                ``max.poll.interval.ms``. 0: it takes what is there.
        """
        check_handler(handler, self._arguments)
        handle = partial(self._handle_all, handler, self._send_all)
        if self._thread is not None:
            call = partial(self._thread.call, self._writing.made_by(handler))
            handle = partial(self._handle_all, call, partial(self._send_all, ready=True))
        self._run(topics, handle, self._pace(max_batch, FIRST_BATCH, max_wait=max_wait), until_idle)

    def _handle_all(
        self, handler: Callable[..., Records], send: Callable[[Records], None], messages: Sequence[Message], *connection: Any
    ) -> tuple[int, Failed | None]:
        """Handle messages in one call, unless there are none, up to one that cannot be read. All are finished, or none."""
        messages = messages[: self._reading.readable(messages)] or messages[:1]
        if messages:
            try:
                self._reading.check(messages[0])
                send(handler(list(messages), *connection))
            except Exception as error:  # noqa: BLE001 - as above
                self._forgive(error)
                return 0, Failed(len(messages), error)
        return len(messages), None

    @property
    def _arguments(self) -> int:
        """How many a handler is called with."""
        return 1 if self._recognition.inbox is None else 2

    def _run(self, topics: Sequence[str], handle: Handling, pace: Pace, until_idle: float | None) -> None:
        check_run(self._settings, self._lifecycle, topics, until_idle, dead_letter=self._failures.topic)
        with self._lifecycle.running(), ended_after(self._thread):
            while True:
                try:
                    self._run_on(topics, handle, pace, until_idle)
                except RecordRefused as refused:
                    if self._lifecycle.stopping:
                        raise_failures([refused.failure], 0, NOT_PAST)
                    self._failures.look_closely(refused.failure)
                else:
                    return

    def _run_on(self, topics: Sequence[str], handle: Handling, pace: Pace, until_idle: float | None) -> None:
        with self._consuming(topics) as run:
            for batch in run.consumer.batches(pace, until_idle, self._reading):
                if run.portions is None:
                    self._work_off(run, batch, handle, pace)
                else:
                    self._transact(run, run.portions, batch, handle, pace)

    @staticmethod
    def _work_off(run: Run, batch: Batch, handle: Handling, pace: Pace) -> None:
        """Handle and finish a batch, portion by portion, to its end or until the rest is given back."""
        while batch.messages:
            with run.claimed(batch) as claimed:
                work = claimed
                while work.messages:
                    began = time.monotonic()
                    done, failed = handle(work.fresh)
                    pace.took(done, time.monotonic() - began)
                    work = run.finish(batch, work, done, handle, to_the_end=failed is None)
                    if failed is not None and work.messages:
                        work = run.again(batch, work, failed, handle)
                    if work.messages and run.must_poll(batch, pace):
                        work = run.give_back(batch)
                batch.messages = run.get_past(batch, work.problem, pace)

    @staticmethod
    def _transact(run: Run, portions: Portions, batch: Batch, handle: Handling, pace: Pace) -> None:
        """The same with an inbox: each portion is one transaction of its database."""
        while batch.messages:
            messages, entries, problem = run.entries(batch)
            while messages:
                began = time.monotonic()
                done, failed = portions.transact(batch, messages, entries, handle)
                pace.took(done, time.monotonic() - began)
                messages, entries = messages[done:], entries[done:]
                if failed is not None:
                    done = portions.again(batch, messages, entries, failed, handle)
                    messages, entries = messages[done:], entries[done:]
                if not done:
                    run.consumer.rest(batch.messages, FENCED_REST)
                    problem = None
                    break
                if messages and (run.must_poll(batch, pace) or (failed and done < failed.size)):
                    run.give_back(batch)
                    problem = None
                    break
            batch.messages = run.get_past(batch, problem, pace)
        portions.tidy()

    def messages(
        self, topics: Sequence[str], *, max_batch: int = 4000, until_idle: float | None = None
    ) -> Generator[Message, None, None]:
        """Iterate over messages; a message is finished when the loop asks for the next one.

        A loop that is left by ``break`` or by an exception has not finished the message in hand: it comes again; what became of
        records is told by ``flush`` or ``close`` then. Signals are left to the caller, and so are failures: only what cannot be
        read is tried again, or set aside. Use ``with`` around the client, so that the group is left at once.

        Raises:
            TypeError: the client has an inbox, which must know where its transactions end, or ``keep_alive``.
            HandlerError: a message cannot be read, and there is no dead letter topic. What came before is committed. Or
                the loop took longer than ``max.poll.interval.ms``, twice at the same message.
            MessageIdMissing, MessageIdReused: likewise, it has no id, or that of another one.
            DeliveryError, DeliveryUnknown: a record was not acknowledged; nothing of its portion is committed.
            UnsafeConfigError: there is no ``group.id``, or what is set aside would be consumed; or something is unsafe, and
                ``preflight="raise"``. Nothing was consumed.
            FencedError: another instance has this ``group.instance.id``.
            OffsetsLost, AuthorizationError, BrokerError: see the class.
        """
        if self._recognition.inbox is not None:
            raise TypeError("an inbox needs to know where a transaction ends: use run() or run_batches(), not messages()")
        if self._thread is not None:
            raise TypeError("keep_alive needs a handler, to give it a thread: use run() or run_batches(), not messages()")
        check_run(self._settings, self._lifecycle, topics, until_idle, dead_letter=self._failures.topic)
        pace = self._pace(max_batch)
        return self._lifecycle.iterate(lambda itself: self._messages(topics, pace, until_idle, itself))

    def _messages(
        self, topics: Sequence[str], pace: Pace, until_idle: float | None, itself: Itself
    ) -> Generator[Message, None, None]:
        with self._lifecycle.running(itself), self._consuming(topics) as run:
            for batch in run.consumer.batches(pace, until_idle, self._reading):
                while batch.messages:
                    with run.claimed(batch) as claimed:
                        work = claimed
                        del claimed  # it would keep its messages while the next ones are fetched
                        while work.messages:
                            done, began = 0, time.monotonic()
                            until = began + COMMIT_EVERY
                            try:
                                for message in work.fresh[: self._reading.readable(work.fresh)]:
                                    yield message
                                    done += 1
                                    if time.monotonic() >= until or self._lifecycle.stopping:
                                        break
                            except GeneratorExit:
                                if self._lifecycle.forked:
                                    raise
                                self._lifecycle.leave(LEAVING)
                                run.left = True
                                with suppress(DeliveryError, DeliveryUnknown):  # close() raises them: here nobody hears
                                    run.finish(batch, work, done)
                                raise
                            pace.took(done, time.monotonic() - began)
                            work = run.finish(batch, work, done, to_the_end=True)
                            work = run.read_again(batch, work)
                            if work.messages and run.must_poll(batch, pace):
                                work = run.give_back(batch)
                        batch.messages = run.get_past(batch, work.problem, pace)

    @contextmanager
    def _consuming(self, topics: Sequence[str]) -> Iterator[Run]:
        """A run, with its member of the group. What trails behind at its end is committed."""
        with closing(TopicIds(self._settings)) as topic_ids:
            if self._producer is not None:
                self._producer.abandon()
            self._preflight.start(topics)
            self._places.stored = self._recognition.stored(topic_ids)
            consumer = GroupConsumer(self._settings, self._lifecycle, topics, self._places, also=self._failures.topics)
            run = Run(
                self._settings,
                self._lifecycle,
                consumer,
                topic_ids,
                reading=self._reading,
                failures=self._failures,
                recognition=self._recognition,
                thread=self._thread,
                producer=lambda: self._producer,
                send=self._send,
            )
            try:
                yield run
                run.end()
            except BaseException:
                run.leave()
                raise
            finally:
                consumer.close()

    def _pace(self, max_batch: int, first: int | None = None, *, max_wait: float = 0.0) -> Pace:
        limit = self._settings.max_poll_interval / 2
        return Pace(max_batch, limit, first, served=self._thread is not None, max_wait=max_wait)

    @property
    def dedup_counts(self) -> Mapping[str, int]:
        """How many messages so far came to what.

        ``duplicate``: left out. ``taken over``: handled, although somebody had begun to. ``waited for``: given back until
        somebody else is done with their id. ``unprotected``: handled without an id or a store. ``lost``: perhaps handled by
        another member as well.
        """
        return dict(self._recognition.counts)

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
        message_id: str | bytes | None = None,
        timeout: float | None = None,
    ) -> Delivery:
        """Send a record, and keep trying until it is acknowledged or ``delivery.timeout.ms`` has passed.

        Args:
            topic, value, key, headers, partition, timestamp: see ``Record``.
            message_id: written to the header ``message-id``, by which a reader can tell a repeat.
            timeout: seconds to wait where the queue is full (``queue.buffering.max.messages``, ``.kbytes``), until the record
                has failed as not sent; None: as long as ``delivery.timeout.ms`` allows it. With one, the first call does not
                wait for brokers, either: an event loop is not held up by ``timeout=0``.

        Returns:
            What becomes of it. A failure that ``result()`` has not raised is raised by the next ``produce``, ``flush`` or
            ``close``; inside a run it is raised by the run, which commits nothing past it. One whose ``result()`` ended with
            TimeoutError is logged by the next ``produce``, and raised by ``flush`` or ``close``.

        Raises:
            DeliveryError, DeliveryUnknown: an *earlier* record failed and nobody looked. This one was not sent.
            BrokerError: no broker lets this client in, which is looked at with the first record: this one was not sent. Or the
                producer cannot go on, which is seen behind it: it may have been.
            TypeError, ValueError: it is not a record.
            Exception: whatever a serializer raises. Nothing was sent.
            ForkedClientError: made by another process.
        """
        if self._lifecycle.closed or self._lifecycle.forked:
            self._lifecycle.check()
        if message_id is not None:
            headers = with_id(headers, message_id)
        if self._writing.needed:
            record = Record(topic, value, key, headers=headers, partition=partition, timestamp=timestamp)
            record = self._writing.serialize(record)
            value, key, headers = record.value, record.key, record.headers
        producer = self._producer
        if producer is None:
            producer = self._made(topic if timeout is None else None)
        elif (producer.failed or producer.not_written) and not self._lifecycle.in_run:
            producer.forget_asked()
            safe = f"That is of earlier calls; the record of this one, for topic {topic!r}, was not sent."
            self._raise_failures(0, safe, asked=False)
        return producer.deliver(topic, value, key, headers, partition, timestamp, timeout)

    def _send_all(self, records: Records, *, ready: bool = False) -> None:
        """Send what a handler returned; ``ready``: with what serializers made of it.

        Raises:
            RecordRefused: one of them is refused before it is sent, and may be the fault of this message alone.
        """
        if records is None:
            return
        producer, writing = self._producer, self._writing
        if self._lifecycle.closed:
            self._lifecycle.check()
        serialize = writing.serialize if writing.needed and not ready else None
        flush_each = self._failures.flush_each
        try:
            for record in records_in(records):
                if producer is None:
                    producer = self._made(record.topic)
                try:
                    producer.post(record if serialize is None else serialize(record))
                    if flush_each:
                        producer.flush(lambda: self._lifecycle.out_of_patience)
                except (DeliveryError, DeliveryUnknown) as failure:
                    of_record = isinstance(failure, DeliveryError) and not isinstance(failure, QueueFull)
                    if of_record and not of_topic(failure) and self._failures.topic is not None:
                        raise RecordRefused(failure) from failure
                    producer.note(failure)
        except BaseException:
            leave(records)
            raise

    def _forgive(self, error: Exception) -> None:
        """A record that was refused with this error is not held against its message: that goes another way."""
        if self._producer is not None:
            self._producer.forgive(error)

    def _send(self, record: Record) -> Delivery:
        return (self._producer or self._made(record.topic)).produce(record)

    def _made(self, topic: str | None) -> PlainProducer:
        """The producer, made when it is needed first; and brokers are waited for a moment, if it is for a ``topic``."""
        return first_producer(self, self._settings, self._lifecycle, meet=topic)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every record that was produced before is acknowledged. What a run sends it waits for by itself.

        Args:
            timeout: seconds; None waits as long as ``delivery.timeout.ms`` allows each record.

        Raises:
            DeliveryError, DeliveryUnknown: records were not written, or not acknowledged in time; with their number.
            AuthorizationError, BrokerError: the producer cannot go on. Make a new client.
            KafkaGuaranteesError: this thread is in a callback of the client, or in a signal handler that came in one.
        """
        self._lifecycle.check()
        if self._producer is not None:
            deadline = None if timeout is None else time.monotonic() + timeout
            left = self._producer.flush(lambda: deadline is not None and time.monotonic() >= deadline)
            self._raise_failures(left, "What was acknowledged is safe.")

    def _raise_failures(self, left: int, safe: str, *, asked: bool = True) -> None:
        if self._producer is None:
            return
        # in a run only the run forgets them: it must not commit past them, whoever saw them
        forget = not self._lifecycle.in_other_hands
        posted = not self._lifecycle.in_run  # also a handler that flushes: these may be of an earlier batch
        raise_failures(self._producer.failures(forget=forget, posted=posted, asked=asked), left, safe)

    # -- ending -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask ``run`` to return after what is in hand. Safe in threads and signal handlers; without a run it ends the next."""
        self._lifecycle.stop()

    def close(self, timeout: float | None = None) -> None:
        """End a run, wait for acknowledgements, and let the clients go, within ``timeout`` seconds (None: 30).

        Raises:
            DeliveryError, DeliveryUnknown: records were not written, or not acknowledged in time; with their number.
            AuthorizationError, BrokerError: the producer cannot go on. Make a new client.
            KafkaGuaranteesError: this thread is in the handler or in a callback of the client, or in a signal handler that
                came in one: call ``stop()`` there.
        """
        if self._lifecycle.closed or self._lifecycle.forked:
            return
        if self._producer is not None:
            self._producer.check_waiting()
        timeout = 30.0 if timeout is None else timeout
        deadline = time.monotonic() + timeout
        with self._lifecycle.ending(timeout) as ended:
            if not ended:
                log.warning("the handler has not returned within %.1f s; what it has in hand is not committed", timeout)
            with self._making:  # a thread that produces first has one by then, or is refused
                self._lifecycle.closed = True
            if self._producer is not None:
                self._producer.close(max(0.0, deadline - time.monotonic()))
                self._raise_failures(0, "What was acknowledged is safe.")

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
        return explain(Guarantee.AT_LEAST_ONCE, config)
