"""At least once: no message is lost, some may be handled again.

What happens to one message::

    fetched with others -> handled -> every record produced meanwhile is acknowledged -> still a member of the group?
    -> its offset committed, synchronously, with those of its portion

* A portion ends with the batch, after COMMIT_EVERY seconds of handling, or with the message before one that failed. What is
  repeated after a crash is at most one portion.
* A failing handler stops the run: nothing at or after its message is committed (L01).
* A record that was not acknowledged stops the run as well, whoever produced it, unless its ``result()`` raised that in the
  handler, which then knows (P01, L03).

With a deduplication store, around handling::

    ids claimed, one call for the batch -> those that were handled before left out -> handled -> ... acknowledged
    -> ids completed -> offset committed

With an inbox::

    database transaction begun: offsets locked, ids noted, what was handled before left out -> handled -> ... acknowledged
    -> offsets moved -> transaction committed -> the group's offset committed, for those who watch it
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ._consumer import GroupConsumer, check_run
from ._lifecycle import Lifecycle
from ._offsets import next_offsets
from ._producer import PlainProducer, raise_failures
from ._recognition.claims import Work
from ._recognition.message_ids import entries_of
from ._recognition.options import BY_HEADER, MESSAGE_ID, Recognition
from ._recognition.patience import patiently
from ._recognition.portions import Portions
from ._recognition.topics import TopicIds
from ._settings import Guarantee, explain, resolve
from .errors import AuthorizationError, BrokerError, PartitionFenced, StoreUnavailable
from .records import Record, handler_error, records_in

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import TracebackType

    from confluent_kafka import Message
    from typing_extensions import Self

    from ._consumer import Batch, Start
    from ._lifecycle import Itself
    from ._offsets import Partition
    from ._recognition.claims import Claims, OnStoreError
    from ._recognition.message_ids import OnMissingId
    from ._recognition.portions import Handling
    from ._settings import Explanation
    from .dedup.contract import DedupStore, Inbox, Takeover
    from .dedup.ids import IdOf
    from .errors import KafkaGuaranteesError
    from .records import BatchHandler, Delivery, Handler, Headers, InboxBatchHandler, InboxHandler, Payload

log = logging.getLogger("kafka_guarantees")

LEAVING = 10.0  # seconds that a loop which is left waits for brokers that do not answer
FENCED_REST = 0.5  # seconds until messages are fetched again that another member handles, or that an inbox did not take
COMMIT_EVERY = 1.0  # seconds of handling between two commits inside a batch


class AtLeastOnce:
    """Produce and consume at least once: nothing acknowledged is lost; after a failure something may come again.

    Args:
        config: librdkafka's properties, for both sides. See ``explain()`` for what is set on top.
        start: where a group without committed offsets begins.
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
    once for each message. With a store a message is handled once, unless a worker dies or loses its partition between an effect
    and its mark.
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
        self._start = start
        self._lifecycle = Lifecycle("AtLeastOnce")
        self._producer: PlainProducer | None = None
        self._seen: set[Partition] = set()
        self._claims: Claims | None = None  # of the run
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

    # -- consuming ----------------------------------------------------------------------------------------------------

    def run(
        self,
        topics: Sequence[str],
        handler: Handler | InboxHandler,
        *,
        max_batch: int = 2000,
        until_idle: float | None = None,
    ) -> None:
        """Call ``handler`` for every message of ``topics``; records that it returns are produced before its offset moves.

        Blocks until ``stop()``, until SIGINT or SIGTERM if this is the main thread, or until no message has come for
        ``until_idle`` seconds. The message in hand is finished and committed, and the group left, before it returns.

        Args:
            topics: names, or patterns that begin with ``^``.
            handler: called with a ``confluent_kafka.Message``, and with an inbox also its connection; returns or yields
                ``Record``, or returns None.
            max_batch: messages fetched at a time, and the most that are repeated after a crash.
            until_idle: seconds.

        Raises:
            HandlerError: the handler raised. What it finished before is committed, nothing at or after that message.
            DeliveryError, DeliveryUnknown: a record was not acknowledged; nothing of its portion is committed.
            MessageIdMissing, MessageIdReused: it has no id, or that of another one. What came before is committed.
            OffsetsLost, AuthorizationError, BrokerError: see there.
        """
        inbox = self._recognition.inbox
        if inbox is not None:
            with_connection = cast("InboxHandler", handler)
            handle: Handling = lambda messages, c: self._handle(lambda m: with_connection(m, c), messages)  # noqa: E731
            self._run_inbox(inbox, topics, max_batch, until_idle, handle)
            return
        with self._consuming(topics, max_batch) as consumer:
            for batch in consumer.batches(max_batch, until_idle):
                with self._claimed(consumer, batch) as claimed:
                    work = claimed
                    while work.messages:
                        done, failure = self._handle(cast("Handler", handler), work.fresh)
                        if not self._finish(consumer, batch, work, done):
                            break
                        if failure is not None:
                            raise failure
                        work = work.rest(done)
                        if work.messages and self._must_poll(batch):
                            consumer.rewind(work.messages)
                            break
                    else:
                        work.end()

    def _handle(self, handler: Handler, messages: Sequence[Message]) -> tuple[int, KafkaGuaranteesError | None]:
        """Handle messages until the portion is full, the client is to stop, or one fails. Returns how many are finished."""
        clock, lifecycle, done = time.monotonic, self._lifecycle, 0
        until = clock() + COMMIT_EVERY
        for message in messages:
            try:
                records = handler(message)
                if records is not None:
                    for record in records_in(records):
                        self._send(record)
            except Exception as error:  # noqa: BLE001 - it is raised as HandlerError, after what came before is committed
                failure = handler_error(message, error)
                failure.__cause__ = error
                return done, failure
            done += 1
            if clock() >= until or lifecycle.stopping:
                break
        return done, None

    def run_batches(
        self,
        topics: Sequence[str],
        handler: BatchHandler | InboxBatchHandler,
        *,
        max_batch: int = 2000,
        until_idle: float | None = None,
    ) -> None:
        """Like ``run``, with a handler that takes a whole batch. Where it raises, nothing of the batch is committed."""
        inbox = self._recognition.inbox
        if inbox is not None:
            with_connection = cast("InboxBatchHandler", handler)
            handle: Handling = lambda messages, c: self._handle_all(lambda m: with_connection(m, c), messages)  # noqa: E731
            self._run_inbox(inbox, topics, max_batch, until_idle, handle)
            return
        with self._consuming(topics, max_batch) as consumer:
            for batch in consumer.batches(max_batch, until_idle):
                with self._claimed(consumer, batch) as work:
                    done, failure = self._handle_all(cast("BatchHandler", handler), work.fresh)
                    if failure is not None:
                        raise failure
                    if self._finish(consumer, batch, work, done):
                        work.end()

    def _handle_all(self, handler: BatchHandler, messages: Sequence[Message]) -> tuple[int, KafkaGuaranteesError | None]:
        """Handle messages in one call, unless there are none. Returns how many are finished: all or none."""
        try:
            for record in records_in(handler(messages) if messages else None):
                self._send(record)
        except Exception as error:  # noqa: BLE001 - it is raised as HandlerError
            failure = handler_error(messages[0], error)
            failure.__cause__ = error
            return 0, failure
        return len(messages), None

    def messages(
        self, topics: Sequence[str], *, max_batch: int = 2000, until_idle: float | None = None
    ) -> Generator[Message, None, None]:
        """Iterate over messages; a message is finished when the loop asks for the next one.

        A loop that is left by ``break`` or by an exception has not finished the message in hand: it comes again. Signals are
        left to the caller. Use ``with`` around the client, so that the group is left at once.

        Raises:
            TypeError: the client has an inbox, which must know where its transactions end.
            MessageIdMissing, MessageIdReused: it has no id, or that of another one. What came before is committed.
            DeliveryError, DeliveryUnknown: a record was not acknowledged; nothing of its portion is committed.
            OffsetsLost, AuthorizationError, BrokerError: see there.
        """
        if self._recognition.inbox is not None:
            raise TypeError("an inbox needs to know where a transaction ends: use run() or run_batches(), not messages()")
        check_run(self._settings, self._lifecycle, topics, max_batch)
        return self._lifecycle.iterate(lambda itself: self._messages(topics, max_batch, until_idle, itself))

    def _messages(
        self, topics: Sequence[str], max_batch: int, until_idle: float | None, itself: Itself
    ) -> Generator[Message, None, None]:
        with self._consuming(topics, max_batch, itself) as consumer:
            for batch in consumer.batches(max_batch, until_idle):
                with self._claimed(consumer, batch) as claimed:
                    work = claimed
                    while work.messages:
                        done, until = 0, time.monotonic() + COMMIT_EVERY
                        try:
                            for message in work.fresh:
                                yield message
                                done += 1
                                if time.monotonic() >= until or self._lifecycle.stopping:
                                    break
                        except GeneratorExit:
                            self._lifecycle.leave(LEAVING)
                            self._finish(consumer, batch, work, done)
                            raise
                        if not self._finish(consumer, batch, work, done):
                            break
                        work = work.rest(done)
                        if work.messages and self._must_poll(batch):
                            consumer.rewind(work.messages)
                            break
                    else:
                        work.end()

    # -- recognising what was handled before ---------------------------------------------------------------------------

    @contextmanager
    def _claimed(self, consumer: GroupConsumer, batch: Batch) -> Iterator[Work]:
        """What of a batch is to be handled. Claims that are not completed at the end are released."""
        if self._claims is None:
            yield Work(batch.messages)
            return
        self._topic_ids.renew()
        try:
            yield self._claim(consumer, batch, self._claims)
        finally:
            self._claims.release()
        self._claims.tidy()

    def _claim(self, consumer: GroupConsumer, batch: Batch, claims: Claims) -> Work:
        try:
            work, held = patiently(partial(self._claim_now, consumer, batch, claims), consumer, batch, self._no_more)
        except (StoreUnavailable, BrokerError) as error:
            if not self._no_more():
                raise  # not of the store: the group was served meanwhile
            if self._lifecycle.stopping:
                return Work(())
            log.warning("%d messages are handled without protection from repeats: %s", len(batch.messages), error)
            return claims.unprotected(batch.messages)
        except PartitionFenced:
            consumer.rewind(batch.messages)  # the group went on while the store was down
            return Work(())
        self._recognition.note(apart=consumer.shares)
        if held:
            consumer.rest(held, claims.rest_for(held))
        return work

    def _claim_now(self, consumer: GroupConsumer, batch: Batch, claims: Claims) -> tuple[Work, Sequence[Message]]:
        """Claim a batch that is still ours: else its new owner would lose its claims to us."""
        if not consumer.still_ours(batch, within=self._settings.max_poll_interval):
            raise PartitionFenced("the group gave partitions away.")
        return claims.claim(batch.messages)

    def _complete(
        self, consumer: GroupConsumer, batch: Batch, claims: Claims, handled: int, finished: Sequence[Message]
    ) -> bool:
        """Complete the ids of what was handled. False: they are not, and what was handled is handled again (D17)."""
        try:
            patiently(partial(claims.complete, handled, finished), consumer, batch, self._no_more)
        except (StoreUnavailable, BrokerError) as error:
            if not self._no_more():
                raise
            claims.skip(handled)
            log.warning("the ids of %d messages that were handled could not be stored: %s", handled, error)
            return not self._recognition.waits
        return True

    def _no_more(self) -> bool:
        """Whether a store that does not answer is not asked again."""
        return self._lifecycle.stopping or not self._recognition.waits

    def _run_inbox(
        self, inbox: Inbox[Any], topics: Sequence[str], max_batch: int, until_idle: float | None, handle: Handling
    ) -> None:
        """The loop with an inbox: each portion of a batch is one transaction of its database."""
        with self._consuming(topics, max_batch) as consumer:
            portions = Portions(
                self._settings,
                self._lifecycle,
                consumer,
                inbox=inbox,
                scope=self._recognition.scope,
                mark=self._recognition.mark,
                counts=self._recognition.counts,
                handle=handle,
                acknowledged=self._acknowledged,
            )
            for batch in consumer.batches(max_batch, until_idle):
                self._topic_ids.renew()
                entries, problem = patiently(partial(entries_of, batch.messages, self._ids), consumer, batch, self._no_more)
                messages = batch.messages[: len(entries)]
                while messages:
                    done, failure = portions.transact(batch, messages, entries)
                    if failure is not None:
                        raise failure
                    messages, entries = messages[done:], entries[done:]
                    if not done:
                        consumer.rest(batch.messages, FENCED_REST)
                        break
                    if messages and self._must_poll(batch):
                        consumer.rewind(batch.messages)
                        break
                else:
                    if problem is not None:
                        raise problem
                portions.tidy()

    # -- finishing ------------------------------------------------------------------------------------------------------

    def _must_poll(self, batch: Batch) -> bool:
        """Whether the rest of a batch must be given back: to stop, or since the group wants to hear of us (C10)."""
        late = time.monotonic() - batch.taken > self._settings.max_poll_interval / 2  # also before claims lapse
        return late or self._lifecycle.stopping

    def _finish(self, consumer: GroupConsumer, batch: Batch, work: Work, handled: int) -> bool:
        """Wait for what was produced, then commit what was handled. False: it was not committed, and comes again.

        Raises:
            DeliveryError, DeliveryUnknown: nothing was committed.
        """
        self._acknowledged()
        finished = work.finished(handled)
        if not finished:
            return True
        if self._claims is not None and not self._complete(consumer, batch, self._claims, handled, finished):
            consumer.rewind(batch.messages)
            return False
        while consumer.still_ours(batch, within=self._settings.max_poll_interval):
            try:
                consumer.commit(next_offsets(finished).values())
            except AuthorizationError:
                raise
            except BrokerError as exc:
                log.warning("%s", exc)
                if self._lifecycle.stopping:
                    return False
                time.sleep(0.1)
            else:
                return True
        log.warning("the group gave partitions away: up to %d messages that were handled are handled again", len(finished))
        consumer.rewind(batch.messages)
        return False

    def _acknowledged(self) -> None:
        """Wait until everything produced is acknowledged. Nothing is committed past a record that is not (P01)."""
        if self._producer is not None:
            left = self._producer.flush(lambda: self._lifecycle.out_of_patience)
            self._raise_failures(left, "Nothing was committed past the messages it came from.")

    @contextmanager
    def _consuming(self, topics: Sequence[str], max_batch: int, itself: Itself | None = None) -> Iterator[GroupConsumer]:
        check_run(self._settings, self._lifecycle, topics, max_batch)
        with self._lifecycle.running(itself), closing(TopicIds(self._settings)) as topic_id:
            self._topic_ids = topic_id
            self._claims, self._ids = self._recognition.claims(topic_id), self._recognition.ids(topic_id)
            stored = self._recognition.stored(topic_id)
            consumer = GroupConsumer(self._settings, self._lifecycle, topics, self._start, self._seen, stored=stored)
            with closing(consumer):
                yield consumer

    @property
    def dedup_counts(self) -> Mapping[str, int]:
        """How many messages so far came to what.

        ``duplicate``: left out. ``taken over``: handled, although somebody had begun to. ``waited for``: given back until
        somebody else is done with their id. ``unprotected``: handled without an id or a store. ``lost``: handled by another
        member as well.
        """
        return dict(self._recognition.counts)

    # -- producing ----------------------------------------------------------------------------------------------------

    def produce(
        self,
        topic: str,
        value: Payload = None,
        key: Payload = None,
        *,
        headers: Headers = None,
        partition: int | None = None,
        timestamp: int | None = None,
        message_id: str | bytes | None = None,
    ) -> Delivery:
        """Send a record, and keep trying until it is acknowledged or ``delivery.timeout.ms`` has passed.

        Args:
            topic, value, key, headers, partition, timestamp: see ``Record``.
            message_id: written to the header ``message-id``, by which a reader can tell a repeat.

        Returns:
            What becomes of it. A failure that ``result()`` has not raised is raised by the next ``produce``, ``flush`` or
            ``close``; inside a run it is raised by the run, which commits nothing past it.

        Raises:
            DeliveryError, DeliveryUnknown: an *earlier* record failed and nobody looked. This one was not sent.
            TypeError, ValueError: it is not a record.
            ForkedClientError: made by another process.
        """
        self._lifecycle.check()
        if message_id is not None:
            pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
            headers = [*pairs, (MESSAGE_ID, message_id)]
        record = Record(topic, value, key, headers=headers, partition=partition, timestamp=timestamp)
        if self._producer is not None and self._producer.failed and not self._lifecycle.in_run:
            self._raise_failures(0, "This record was not sent.")
        return self._send(record)

    def _send(self, record: Record) -> Delivery:
        self._lifecycle.check()
        if self._producer is None:
            self._producer = PlainProducer(self, self._settings, self._lifecycle)
        return self._producer.produce(record)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every record is acknowledged.

        Args:
            timeout: seconds; None waits as long as ``delivery.timeout.ms`` allows each record.

        Raises:
            DeliveryError, DeliveryUnknown: records were not written, or not acknowledged in time; with their number.
        """
        self._lifecycle.check()
        if self._producer is not None:
            deadline = None if timeout is None else time.monotonic() + timeout
            left = self._producer.flush(lambda: deadline is not None and time.monotonic() >= deadline)
            self._raise_failures(left, "What was acknowledged is safe.")

    def _raise_failures(self, left: int, safe: str) -> None:
        if self._producer is None:
            return
        # in a run only the run forgets them: it must not commit past them, whoever saw them
        forget = self._lifecycle.in_hand or not self._lifecycle.in_run
        raise_failures(self._producer.failures(forget=forget), left, safe)

    # -- ending -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask ``run`` to return after what is in hand. Safe in threads and signal handlers; without a run it ends the next."""
        self._lifecycle.stop()

    def close(self, timeout: float | None = None) -> None:
        """End a run, wait for acknowledgements, and let the clients go, within ``timeout`` seconds (None: 30).

        Raises:
            DeliveryError, DeliveryUnknown: records were not written, or not acknowledged in time; with their number.
        """
        if self._lifecycle.closed or self._lifecycle.forked:
            return
        timeout = 30.0 if timeout is None else timeout
        deadline = time.monotonic() + timeout
        if not self._lifecycle.end_run(timeout):
            log.warning("the handler has not returned within %.1f s; what it has in hand is not committed", timeout)
        self._lifecycle.closed = True
        if self._producer is not None:
            self._producer.close(max(0.0, deadline - time.monotonic()))
            self._raise_failures(0, "What was acknowledged is safe.")

    def __enter__(self) -> Self:
        self._lifecycle.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            log.exception("close() failed after the error that is raised")  # never hide the first error

    @classmethod
    def explain(cls, config: Mapping[str, object] | None = None) -> Explanation:
        """What this guarantee sets and why, with ``config`` on top. Needs no broker; never shows a secret."""
        return explain(Guarantee.AT_LEAST_ONCE, config)
