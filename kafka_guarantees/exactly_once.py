"""Exactly once: from Kafka to Kafka, on one cluster, for readers with ``isolation.level=read_committed``.

What happens to one message::

    fetched with others -> handled, its records kept -> the records of the transaction before are with the brokers
    -> still a member of the group? -> transaction begun -> records produced     and then, while the next messages are handled:
    -> all of them with the brokers -> so are the offsets of the transaction before -> offsets into the transaction
    -> the transaction before is committed -> committed

* Handlers work before the transaction begins. So one that takes its time holds up no reader, and of one that raises nothing
  was produced: its message is tried again, as ``retry`` says, or its copy for the dead letter topic goes into a transaction
  with its offset (X21). Without that topic the run ends.
* Several producers take turns, so that a transaction is ended beside the loop (``_in_flight.py``). Nothing is in flight when
  partitions are given away, and where a message fails, all before it are committed first.
* Whatever goes wrong in the transaction aborts it, and those behind it: none of its records becomes visible, no offset moves,
  and the messages are fetched again from where the group has committed (X13).
* Where nobody can say whether a commit happened, the producer is made anew: that ends the old transaction one way or the
  other, and then the committed offsets tell which (X09).
* A producer that met anything ambiguous is made anew before the next transaction, so that a request of the past that is
  still on its way cannot end a transaction of the future (X01).

``transaction.py`` has what a loop of the caller's own does with one transaction.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from bisect import bisect_left
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain
from operator import length_hint
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from ._client import Abandoned
from ._consumer import GroupConsumer
from ._failures import RETRY, Failed, Failures, GaveUp, Left, attempted, not_set_aside
from ._handler_thread import ended_after, handler_thread
from ._in_flight import InFlight
from ._lifecycle import Lifecycle, close_behind
from ._pace import FIRST_BATCH, Pace
from ._places import Places
from ._preflight import Preflight
from ._serialization import Reading, Writing
from ._settings import Guarantee, explain, resolve
from ._topics import check_run
from ._transactional import AbortNeeded, InDoubt, TransactionalProducer, turns
from .errors import DeliveryError, FencedError, HandlerError, of_topic
from .records import Record, RecordRefused, check_handler
from .transaction import Consumed, Transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from types import TracebackType

    from confluent_kafka import Message, TopicPartition
    from tenacity import Retrying
    from typing_extensions import Self

    from ._batch import Batch
    from ._failures import Handling
    from ._handler_thread import HandlerThread
    from ._in_flight import Flight
    from ._lifecycle import Itself
    from ._places import Start
    from ._preflight import AtStart, PreflightReport
    from ._serialization import Deserializer, Serializer
    from ._settings import Explanation
    from .errors import KafkaGuaranteesError
    from .records import BatchHandler, Handler

log = logging.getLogger("kafka_guarantees")


class _Refused(Exception):
    """A record cannot be produced, as it could not the next time.

    Args:
        number: of it, counted from 1; None: one of them, as the brokers said.
        error: treated as if the handler had raised it.
    """

    def __init__(self, number: int | None, error: Exception) -> None:
        super().__init__(number, error)
        self.number = number
        self.error = error


class Outputs(NamedTuple):
    """What was handled, in order.

    Attributes:
        records: what the handler produced.
        ends: how many of these there were after each of its calls.
        size: how many messages it was called with.
    """

    records: Sequence[Record]
    ends: Sequence[int]
    size: int

    @property
    def handled(self) -> int:
        """How many messages these are the outputs of."""
        return len(self.ends) * self.size

    def before(self, number: int) -> Outputs:
        """What comes of the calls before the one that produced this record, counted from 1."""
        return self._first(bisect_left(self.ends, number))

    def half(self) -> Outputs:
        """What comes of the first half of the calls: of none, where there was one."""
        return self._first(len(self.ends) // 2)

    def _first(self, calls: int) -> Outputs:
        return Outputs(self.records[: self.ends[calls - 1] if calls else 0], self.ends[:calls], self.size)


class ExactlyOnce:
    """Consume, transform and produce exactly once; or produce several records all or none.

    Args:
        config: librdkafka's properties, for both sides. ``transactional.id`` is required: stable per instance, so that a
            restart fences what the last run left behind, and unique among instances. See ``explain()``.
        start: where a group without committed offsets begins.
        commit_interval: seconds after which ``run`` closes a transaction; what is left of the batch goes into the next one.
            Readers see nothing of a transaction before its end.
        transactions_in_flight: of ``run`` and ``run_batches``: while so many are being committed, one after the other, the
            next is handled. Each has a producer of its own: the first with the given ``transactional.id``, the others with
            ``-in-flight-1`` and so on behind it. Where ACLs do not allow these, one is in flight, and that is logged. On a
            single broker 1 is 10 to 40 % slower; where commits wait for replicas, 3 take half the time.
        retry: a ``tenacity.Retrying`` that decides whether a handler that raised is called again, and when. Only exceptions are
            looked at; its ``sleep`` is replaced: meanwhile the group is served, and ``stop()`` is heard. By default five
            attempts within three seconds, and only one after a mistake of the program, as a TypeError or ValueError is. None:
            one attempt.
        dead_letter: topic for messages that cannot be handled, or read, or whose records are refused for what they are: the
            copy there becomes visible together with the offset. None: such a message ends the run.
        keep_alive: handlers have a thread of their own, and may take longer than ``max.poll.interval.ms``.
        key_deserializer, value_deserializer: of confluent-kafka, or any function of bytes and a SerializationContext; handlers
            see what they return. ``None`` is left alone.
        key_serializer, value_serializer: the same for records that are produced.
        preflight: when a run starts, the brokers are asked whether their topics and settings keep this guarantee. What is
            found is logged (``"warn"``), or what is unsafe ends the run before it consumes (``"raise"``); or nothing is asked
            (``"off"``). See ``preflight()``.

    Promised: the records produced for a message, and the fact that it was consumed, become visible together, once.
    Not promised: anything outside of Kafka (a mail, a database) - handlers may run again after an abort; more than one
    cluster; isolation between transactions (Kafka has none for writes); readers with read_uncommitted.

    Raises:
        UnsafeConfigError: a setting contradicts the guarantee. Nothing was connected.
        TypeError, ValueError: an argument is not valid.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        /,
        *,
        start: Start = "earliest",
        commit_interval: float = 0.1,
        transactions_in_flight: int = 3,
        retry: Retrying | None = RETRY,
        dead_letter: str | None = None,
        keep_alive: bool = False,
        key_deserializer: Deserializer | None = None,
        value_deserializer: Deserializer | None = None,
        key_serializer: Serializer | None = None,
        value_serializer: Serializer | None = None,
        preflight: AtStart = "warn",
    ) -> None:
        self._settings = resolve(Guarantee.EXACTLY_ONCE, config, commit_interval=commit_interval)
        if type(transactions_in_flight) is not int or transactions_in_flight < 1:
            raise ValueError(f"transactions_in_flight is a number of transactions, 1 or more, not {transactions_in_flight!r}")
        self._most = sys.maxsize  # messages in a transaction; fewer after a record that was refused, or came too late
        self._places = Places(self._settings.group_id, start)
        self._commit_interval = commit_interval
        self._lifecycle = Lifecycle("ExactlyOnce")
        turn, given = turns(self._settings, transactions_in_flight), self._settings.transactional_id
        self._producer, *others = (TransactionalProducer(self, settings, self._lifecycle, given) for settings in turn)
        self._in_flight = InFlight([self._producer, *others], self._lifecycle)
        self._reading = Reading(key_deserializer, value_deserializer)
        self._writing = Writing(key_serializer, value_serializer)
        self._thread = handler_thread(keep_alive, self._lifecycle, self._settings.max_poll_interval)
        self._failures = Failures(self._settings, self._lifecycle, self._reading, retry=retry, dead_letter=dead_letter)
        self._preflight = Preflight(self._settings, self._lifecycle, preflight, dead_letter=dead_letter)

    # -- consume, transform, produce ------------------------------------------------------------------------------------

    def run(self, topics: Sequence[str], handler: Handler, *, max_batch: int = 10_000, until_idle: float | None = None) -> None:
        """Call ``handler`` for every message of ``topics``; what it returns becomes visible exactly once.

        Blocks until ``stop()``, until SIGINT or SIGTERM if this is the main thread, or until no message has come for
        ``until_idle`` seconds. The message in hand is finished and committed, and the group left, before it returns; one that
        waits to be tried again is left, and comes again.

        Args:
            topics: names, or patterns that begin with ``^``.
            handler: called with a ``confluent_kafka.Message``; returns or yields ``Record``, or returns None. It may be called
                again for a message whose transaction was aborted.
            max_batch: messages fetched at a time.
            until_idle: seconds.

        Raises:
            HandlerError: the handler raised, in every attempt, or there was no use in another, and there is no dead letter
                topic; or it took longer than ``max.poll.interval.ms``, twice at the same message. What it finished before is
                committed, nothing at or after that message.
            DeliveryError: a record, perhaps a dead letter, cannot be written; its transaction was aborted.
            UnsafeConfigError: there is no ``group.id``, or what is set aside would be consumed; or something is unsafe, and
                ``preflight="raise"``. Nothing was consumed.
            FencedError: another instance has this transactional.id, or ``group.instance.id``.
            OffsetsLost, AuthorizationError, BrokerError: see the class.
        """
        check_handler(handler, 1)
        handle = self._handle if self._thread is None else partial(self._handle_in_thread, self._thread)
        self._run(topics, partial(handle, handler), self._pace(max_batch), until_idle)

    def _handle(self, handler: Handler, messages: Sequence[Message]) -> tuple[Outputs, Failed | None]:
        """Handle messages until it is time to commit, the client is to stop, or one fails. Returns what they produce."""
        clock, lifecycle, made = time.monotonic, self._lifecycle, self._writing.records
        call = self._reading.checked(handler)
        records: list[Record] = []
        ends: list[int] = []
        until = clock() + self._commit_interval
        for message in messages[: self._most]:
            try:
                result = call(message)
                if result is not None:
                    records += made(result)
            except Exception as error:  # noqa: BLE001 - it is tried again, set aside, or raised
                return Outputs(records, ends, 1), Failed(1, error)
            ends.append(len(records))
            if clock() >= until or lifecycle.stopping:
                break
        return Outputs(records, ends, 1), None

    def _handle_in_thread(
        self, thread: HandlerThread, handler: Handler, messages: Sequence[Message]
    ) -> tuple[Outputs, Failed | None]:
        """The same with a handler that has a thread of its own."""
        call = self._writing.made_by(self._reading.checked(handler))
        messages = messages[: self._most]
        done: list[list[Record]] = []
        error, until = None, time.monotonic() + self._commit_interval
        while error is None and len(done) < len(messages) and not (done and self._lifecycle.stopping):
            left = until - time.monotonic()
            if done and left <= 0:
                break
            error = thread.each(call, messages[len(done) :], done, left)
        ends = list(accumulate(map(len, done)))
        return Outputs([*chain.from_iterable(done)], ends, 1), None if error is None else Failed(1, error)

    def run_batches(
        self,
        topics: Sequence[str],
        handler: BatchHandler,
        *,
        max_batch: int = 1000,
        max_wait: float = 0.0,
        until_idle: float | None = None,
    ) -> None:
        """Like ``run``, with a handler that takes a batch, which is one transaction.

        Of few messages at first, then of as many as it can handle in good time; with ``max_batch=10_000`` two to three times as
        fast, where the handler is. Where it raises, the batch is tried again. With a dead letter topic its messages are then
        handled one by one, and those that fail are set aside.

        Args:
            topics, handler, until_idle: as for ``run``; the handler is called with a list.
            max_batch: messages of a transaction.
            max_wait: seconds that a batch which is not full waits for more, once it has a message; up to a quarter of
                ``max.poll.interval.ms``. 0: it takes what is there,
                which where little comes is a transaction for each message.
        """
        check_handler(handler, 1)
        call = self._writing.made_by(handler)
        if self._thread is not None:
            call = partial(self._thread.call, call)
        self._run(topics, partial(self._handle_all, call), self._pace(max_batch, FIRST_BATCH, max_wait=max_wait), until_idle)

    def _handle_all(self, call: Callable[..., list[Record]], messages: Sequence[Message]) -> tuple[Outputs, Failed | None]:
        """Handle messages in one call, up to one that cannot be read. Returns what they produce."""
        messages = messages[: self._reading.readable(messages)][: self._most] or messages[:1]
        try:
            self._reading.check(messages[0])
            records = call(list(messages))
            return Outputs(records, [len(records)], len(messages)), None
        except Exception as error:  # noqa: BLE001 - as above
            return Outputs((), (), 0), Failed(len(messages), error)

    def _pace(self, max_batch: int, first: int | None = None, *, aim: float = math.inf, max_wait: float = 0.0) -> Pace:
        limit = self._settings.max_poll_interval / 2
        return Pace(max_batch, limit, first, aim=aim, served=self._thread is not None, max_wait=max_wait)

    def _run(self, topics: Sequence[str], handle: Handling, pace: Pace, until_idle: float | None) -> None:
        check_run(self._settings, self._lifecycle, topics, until_idle, dead_letter=self._failures.topic)
        with self._stopped(), self._lifecycle.running(), ended_after(self._thread):
            while True:
                try:
                    self._run_on(topics, handle, pace, until_idle)
                except DeliveryError as failure:
                    # what is looked at closely is in hand when it is refused: this is a dead letter
                    if self._lifecycle.stopping or self._failures.closely or not self._failures.blames(failure):
                        raise
                    self._failures.look_closely(failure)
                else:
                    return

    def _run_on(self, topics: Sequence[str], handle: Handling, pace: Pace, until_idle: float | None) -> None:
        with self._consuming(topics) as consumer:
            for batch in consumer.batches(pace, until_idle, self._reading):
                self._read(consumer, batch)
                rest = batch.messages
                while rest:
                    began = time.monotonic()
                    outputs, failed = handle(rest)
                    pace.took(outputs.handled, time.monotonic() - began)
                    done, failed = self._sent(consumer, batch, rest, outputs, failed)
                    del outputs  # they would be kept while the next ones are made
                    rest = rest[done:]
                    if failed is not None:
                        done = self._again(consumer, batch, rest[: failed.size], failed, handle)
                        rest = rest[done:]
                    if rest and (not done or (failed and done < failed.size) or self._must_poll(batch, pace)):
                        consumer.rewind(rest)
                        break

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        """End what is inside without an error where stop() was called and no broker answers: nothing is lost by that."""
        try:
            yield
        except Abandoned as exc:
            log.warning("%s", exc)
            self._lifecycle.answered()

    def _sent(
        self,
        consumer: GroupConsumer,
        batch: Batch,
        messages: Sequence[Message],
        outputs: Outputs,
        failed: Failed | None,
    ) -> tuple[int, Failed | None]:
        """Send what was handled on its way. Where a record of one message is refused, send what comes before that message.

        Returns:
            How many messages are on their way, and what failed after them: nothing, where a transaction was aborted.
        """
        flush_each = False
        while True:
            try:
                sent = self._transact(consumer, batch, messages, outputs, flush_each=flush_each)
            except _Refused as refused:
                if refused.number is None and len(outputs.ends) > 1:
                    outputs, failed = outputs.half(), None  # the other one is handled again
                    continue
                if refused.number is None and outputs.size == 1 and len(outputs.records) > 1 and not flush_each:
                    # together they may be too large for one request. Of a batch each message is handled alone first
                    flush_each = True
                    continue
                if outputs.size == 1:
                    self._most = 1  # what was handled behind it is handled again
                failed = Failed(outputs.size, refused.error)
                outputs = outputs.half() if refused.number is None else outputs.before(refused.number)
            else:
                return (outputs.handled, failed) if sent else (0, None)

    def _transact(
        self, consumer: GroupConsumer, batch: Batch, messages: Sequence[Message], outputs: Outputs, *, flush_each: bool = False
    ) -> bool:
        """One transaction with what the first messages produced, whose end is left to another thread.

        Args:
            consumer, batch, messages, outputs: as they are.
            flush_each: each record is waited for before the next one.

        Returns:
            False: it was aborted, or one before it, and all messages come again.

        Raises:
            _Refused: the transaction was aborted, because a record cannot be written.
        """
        if not outputs.ends:
            return True
        messages = messages[: outputs.handled]
        self._lifecycle.handled()
        producer = self._in_flight.next_producer()
        if producer is None or not self._still_ours(consumer, batch, messages):
            return False
        try:
            producer.begin()
            self._produce(producer, outputs.records, flush_each=flush_each)
        except (AbortNeeded, InDoubt) as exc:
            log.warning("a transaction of %d messages is aborted, and they are fetched again: %s", len(messages), exc)
            self._shrink(producer, len(messages))
            failure = producer.failure
            producer.abort()
            if failure is not None:
                self._refuse(failure)
            return False
        except _Refused:
            producer.abort()
            raise
        except FencedError:
            raise
        except BaseException:
            producer.abandon()
            raise
        offsets, metadata = batch.next_offsets(messages), batch.metadata
        finish = partial(self._finish, batch=batch, offsets=self._places.marked(offsets.values()), metadata=metadata)
        self._in_flight.take_off(offsets, len(messages), finish)
        return not self._failures.closely or self._landed(consumer)

    def _landed(self, consumer: GroupConsumer) -> bool:
        """Wait for the end of what took off. False: it is aborted, and comes again. Raises what ``_transact`` does."""
        try:
            landed = self._settled(consumer)
        except DeliveryError as failure:
            self._refuse(failure)
        if landed:
            self._failures.went_well()
        return landed

    def _refuse(self, failure: KafkaGuaranteesError) -> NoReturn:
        """Raise for a record that would be refused again: by the brokers, of what is in hand."""
        if self._failures.closely and self._failures.blames(failure):
            self._failures.look_closely(failure)
            raise _Refused(None, RecordRefused(failure)) from failure
        raise failure

    def _shrink(self, producer: TransactionalProducer, size: int) -> None:
        """Take fewer messages at a time, where the brokers take what they produce more slowly than a transaction may last."""
        if producer.late:
            self._most = max(1, min(self._most, size) // 2)

    def _produce(self, producer: TransactionalProducer, records: Sequence[Record], *, flush_each: bool) -> None:
        left = iter(records)
        try:
            if flush_each:
                for record in left:
                    producer.produce([record])
                    producer.flush()
                    if not producer.awaited:
                        raise AbortNeeded(f"its records are sent one by one{producer.too_long}")
            producer.produce(left)
        except (TypeError, ValueError, DeliveryError) as error:
            if of_topic(error):
                raise
            number = len(records) - length_hint(left)
            raise _Refused(number, RecordRefused(error) if isinstance(error, DeliveryError) else error) from error

    def _finish(self, flight: Flight, *, batch: Batch, offsets: Sequence[TopicPartition], metadata: bytes) -> None:
        """The end of a transaction, in a thread of its own, while the loop handles what comes next.

        Raises:
            AbortNeeded: it must be aborted.
            InDoubt: nobody knows whether it was committed.
            FencedError, AuthorizationError: see the class.
        """
        producer = flight.producer
        try:
            producer.flush()
        except AbortNeeded:
            self._shrink(producer, flight.size)
            raise
        flight.acknowledged()  # the next one may produce
        flight.follow_offsets()
        # the membership was looked at before it began, and what has changed since the brokers know: they compare ``metadata``
        if time.monotonic() - batch.served > self._settings.max_poll_interval:
            raise AbortNeeded("the group has given partitions away")
        producer.send_offsets(offsets, metadata)
        calm = producer.undisturbed()
        if calm:  # else a first copy of the request may still come, and what comes last counts for the group
            flight.offsets_sent()  # the next one may send its own
        flight.follow()  # and this one is committed once the one before it is
        flight.committing = True
        producer.commit(partial(self._places.claim, offsets))
        self._most = min(2 * self._most, sys.maxsize)
        if not calm:
            producer.prepare()  # a new one, whose start waits for the end of this transaction in all partitions

    # -- what fails -----------------------------------------------------------------------------------------------------

    def _again(
        self, consumer: GroupConsumer, batch: Batch, messages: Sequence[Message], failed: Failed, handle: Handling
    ) -> int:
        """Try again what failed, and set it aside where that has no use. Returns how many are on their way; 0: they come again.

        Once all before it are committed; and not what the group has given away meanwhile.

        Raises:
            HandlerError, DeliveryError: there is nowhere to set it aside, or the dead letter cannot be written; or the handler
                was too slow again.
        """
        if not self._settled(consumer):
            return 0
        if not consumer.still_ours(batch):
            self._failures.given_away(messages, batch, failed.error)
            return 0
        attempt = partial(attempted, handle, messages)
        try:
            outcome = self._failures.again(attempt, messages[0], failed.error, self._failures.waiting(consumer, batch))
        except Left:
            return 0
        if not isinstance(outcome, GaveUp):
            done, refused = self._sent(consumer, batch, messages, outcome, None)
            if refused is None:
                return done
            outcome = GaveUp(refused.error, 1)
        if len(messages) > 1 and self._failures.narrows(outcome):
            return self._one_by_one(consumer, batch, messages, handle)
        return self._set_aside(consumer, batch, messages[0], outcome._replace(size=len(messages)))

    def _one_by_one(self, consumer: GroupConsumer, batch: Batch, messages: Sequence[Message], handle: Handling) -> int:
        """Find out which messages of a batch fail, to try these again or set them aside. Returns how many are on their way."""
        done = 0
        while done < len(messages):
            outputs, failed = self._each(consumer, batch, messages[done:], handle)
            sent, failed = self._sent(consumer, batch, messages[done:], outputs, failed)
            done += sent
            if failed is not None:
                sent = self._again(consumer, batch, messages[done : done + 1], failed, handle)
                done += sent
            if not sent:
                break
        return done

    def _each(
        self, consumer: GroupConsumer, batch: Batch, messages: Sequence[Message], handle: Handling
    ) -> tuple[Outputs, Failed | None]:
        """Handle messages in calls of their own, as many as a transaction may last, up to one that fails."""
        records: list[Record] = []
        ends: list[int] = []
        until = time.monotonic() + self._commit_interval
        for message in messages[: self._most]:
            if not self._failures.in_hand(consumer, batch):
                break
            outputs, failed = handle([message])
            if failed is not None:
                return Outputs(records, ends, 1), failed
            records += outputs.records
            ends.append(len(records))
            if time.monotonic() >= until:
                break
        return Outputs(records, ends, 1), None

    def _set_aside(self, consumer: GroupConsumer, batch: Batch, message: Message, outcome: GaveUp) -> int:
        """Send the dead letter of a message on its way, together with its offset. Returns how many are."""
        letter = self._failures.letter(message, outcome)
        done, refused = self._sent(consumer, batch, [message], Outputs([letter], [1], 1), None)
        if refused is not None:
            raise not_set_aside(refused.error)
        return done

    def _still_ours(self, consumer: GroupConsumer, batch: Batch, messages: Sequence[Message]) -> bool:
        """X02: the broker checks the membership (and it alone can), but not that these partitions are ours."""
        if consumer.still_ours(batch):
            return True
        self._failures.given_away(messages, batch)
        log.warning("%d messages that were handled come again: the group has given partitions away", len(messages))
        return False

    def _offsets_of(self, consumer: GroupConsumer, batch: Batch) -> Sequence[TopicPartition] | None:
        """What to commit of a batch; None: it is not ours any more."""
        if not self._still_ours(consumer, batch, batch.messages):
            return None
        return self._places.marked(batch.next_offsets(batch.messages).values())

    def _settled(self, consumer: GroupConsumer) -> bool:
        """Wait for what is in flight. False: some of it is not committed, and comes again."""
        again = self._in_flight.settle()
        consumer.unplace(again)
        return not again

    def _read(self, consumer: GroupConsumer, batch: Batch, *, whole: bool = False) -> None:
        """Make a batch readable, and ready to be handled."""
        self._reading.open(batch.messages, whole=whole)
        if self._thread is not None:
            self._thread.attend(partial(consumer.serve_beside, batch), consumer.resume)

    def _must_poll(self, batch: Batch, pace: Pace) -> bool:
        """Whether the rest of a batch must be given back: to stop, or since the group wants to hear of us (C10)."""
        return time.monotonic() - batch.served > pace.late or self._lifecycle.stopping

    @contextmanager
    def _consuming(self, topics: Sequence[str]) -> Iterator[GroupConsumer]:
        self._preflight.start(topics)
        for producer in self._in_flight.producers:
            producer.late_records = self._preflight.late_records
        consumer = None
        try:
            self._in_flight.prepare()  # X24: the last run's transactions are ended before their messages are fetched again
            consumer = GroupConsumer(
                self._settings,
                self._lifecycle,
                topics,
                self._places,
                also=self._failures.topics,
                in_flight=self._in_flight,
                strict=True,
            )
            yield consumer
            self._in_flight.settle()
        finally:
            try:
                self._in_flight.end()
            finally:
                if consumer is not None:
                    consumer.close()

    # -- the caller's own loop ----------------------------------------------------------------------------------------

    def transactions(
        self, topics: Sequence[str], *, max_batch: int = 1000, max_wait: float = 0.0, until_idle: float | None = None
    ) -> Generator[Transaction, None, None]:
        """Iterate over transactions, each with the messages that it consumes.

        ::

            for tx in kafka.transactions(["offer-requests"]):
                with tx:
                    for message in tx.messages:
                        tx.produce("user-offers", transform(message))

        Leaving the ``with`` normally commits. Leaving it by an exception aborts and rewinds: the next transaction begins with
        the same messages. So it does, without an exception, where a rebalance or a broker kept it from being committed.
        Signals are left to the caller, and so are failures: only what cannot be read is tried again, or set aside in the
        transaction, without being among its messages.

        The first have few messages, then as many as the loop gets through in half of ``transaction.timeout.ms``: a block that
        takes longer than all of that is aborted. One transaction is in flight at a time, whatever ``transactions_in_flight``
        is. With ``max_batch=10_000`` it is two to
        three times as fast, where the loop is quick and readers may wait for so many.

        Args:
            topics, until_idle: as for ``run``.
            max_batch: messages of a transaction.
            max_wait: seconds that one with fewer waits for more, once it has one; up to a quarter of ``max.poll.interval.ms``.
                0: it takes what is there.

        Raises:
            HandlerError: a message cannot be read, and there is no dead letter topic. What came before is committed. Or, where
                the ``with`` is left: it took longer than ``max.poll.interval.ms``, twice at the same message.
            TypeError: the client has ``keep_alive``.
            UnsafeConfigError: there is no ``group.id``, or what is set aside would be consumed; or something is unsafe, and
                ``preflight="raise"``. Nothing was consumed.
            FencedError, OffsetsLost, AuthorizationError, BrokerError: see the class.
            KafkaGuaranteesError: a transaction was not used in a ``with``.
        """
        if self._thread is not None:
            raise TypeError("keep_alive needs a handler, to give it a thread: use run() or run_batches(), not transactions()")
        check_run(self._settings, self._lifecycle, topics, until_idle, dead_letter=self._failures.topic)
        pace = self._pace(max_batch, FIRST_BATCH, aim=self._settings.transaction_timeout / 2, max_wait=max_wait)
        return self._lifecycle.iterate(lambda itself: self._transactions(topics, pace, until_idle, itself))

    def _transactions(
        self, topics: Sequence[str], pace: Pace, until_idle: float | None, itself: Itself
    ) -> Generator[Transaction, None, None]:
        with self._stopped(), self._lifecycle.running(itself), self._consuming(topics) as consumer:
            for batch in consumer.batches(pace, until_idle, self._reading):
                self._read(consumer, batch, whole=True)
                partitions = batch.partitions
                try:
                    letters, failure = self._unreadable(consumer, batch)
                except Left:
                    consumer.unplace(partitions)
                    continue
                consumed = Consumed(consumer, batch, letters, partial(self._offsets_of, consumer, batch))
                transaction = Transaction(self._producer, self._lifecycle, self._writing, consumed)
                began = time.monotonic()
                yield transaction
                self._lifecycle.check_fork()
                pace.took(len(batch.messages), time.monotonic() - began)
                if not transaction._committed:  # whatever the reason: its messages must not be passed over
                    consumer.unplace(partitions)
                transaction._check_used()
                if failure is not None and transaction._committed and not self._lifecycle.stopping:  # else it is met again
                    raise failure
                self._producer.prepare()  # what the last one left open is ended before its messages are asked for again

    def _unreadable(self, consumer: GroupConsumer, batch: Batch) -> tuple[dict[int, Record], HandlerError | None]:
        """The dead letters of messages that cannot be read, by the identity of the message.

        Without a topic for them the batch ends before the first one, and what is to be raised behind it is returned.
        """
        letters: dict[int, Record] = {}
        for number, message in enumerate(batch.messages if self._reading.unreadable else ()):
            error = self._reading.unreadable.get(id(message))
            if error is not None:
                check = partial(self._reading.check, message)
                outcome = self._failures.again(check, message, error, self._failures.waiting(consumer, batch))
                if isinstance(outcome, GaveUp):
                    try:
                        letters[id(message)] = self._failures.letter(message, outcome)
                    except HandlerError as failure:
                        if not number:
                            raise
                        batch.messages = batch.messages[:number]
                        return letters, failure
        return letters, None

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """A transaction for producing only: ``with kafka.transaction() as tx: tx.produce(...)``. All records or none.

        Raises:
            TransactionAborted: none of its records is visible. The block can be run again.
            DeliveryUnknown: it may or may not have been committed.
            FencedError, AuthorizationError, BrokerError: see the class.
        """
        alone = Transaction(self._producer, self._lifecycle, self._writing)
        with self._lifecycle.running(lambda: None, consumes=False), alone as transaction:
            yield transaction

    # -- ending -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask ``run`` to return after what is in hand. Safe in threads and signal handlers; without a run it ends the next."""
        self._lifecycle.stop()

    def close(self, timeout: float | None = None) -> None:
        """End a run and let the clients go, within ``timeout`` seconds (None: 30). A transaction left open is aborted.

        Raises:
            KafkaGuaranteesError: this thread is in the handler, or in a callback of the run: call ``stop()`` there.
        """
        if self._lifecycle.closed or self._lifecycle.forked:
            return
        timeout = 30.0 if timeout is None else timeout
        with self._lifecycle.ending(timeout) as ended:
            if ended:
                self._in_flight.end()  # an exception out of a signal handler may have kept the run from it
            else:
                log.warning("the handler has not returned within %.1f s; its transaction is aborted", timeout)
            self._lifecycle.closed = True
            for producer in self._in_flight.producers:
                producer.close()

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
        return explain(Guarantee.EXACTLY_ONCE, config)
