"""Exactly once: from Kafka to Kafka, on one cluster, for readers with ``isolation.level=read_committed``.

What happens to one message::

    fetched with others -> transaction begun -> handled, its records produced -> every record with the brokers
    -> still a member of the group? -> offsets into the transaction -> committed

* Whatever goes wrong before the end of that line aborts the transaction: none of its records becomes visible, no offset
  moves, and the messages are fetched again from where the group has committed (X13).
* Where nobody can say whether a commit happened, the producer is made anew: that ends the old transaction one way or the
  other, and then the committed offsets tell which (X09).
* A producer that met anything ambiguous is made anew before the next transaction, so that a request of the past that is
  still on its way cannot end a transaction of the future (X01).
* A record that cannot be produced poisons its transaction, also where the handler swallowed the exception (X05).
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ._client import Abandoned
from ._consumer import GroupConsumer, check_run
from ._lifecycle import Lifecycle
from ._offsets import next_offsets
from ._settings import Guarantee, explain, resolve
from ._transactional import AbortNeeded, InDoubt, TransactionalProducer
from .errors import DeliveryUnknown, FencedError, KafkaGuaranteesError, TransactionAborted
from .records import Record, handler_error, outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from types import TracebackType

    from confluent_kafka import Message
    from typing_extensions import Self

    from ._consumer import Batch, Start
    from ._lifecycle import Itself
    from ._offsets import Partition
    from ._settings import Explanation
    from .records import BatchHandler, Handler, Headers, Payload

log = logging.getLogger("kafka_guarantees")


class ExactlyOnce:
    """Consume, transform and produce exactly once; or produce several records all or none.

    Args:
        config: librdkafka's properties, for both sides. ``transactional.id`` is required: stable per instance, so that a
            restart fences what the last run left behind, and unique among instances. See ``explain()``.
        start: where a group without committed offsets begins.
        commit_interval: seconds after which ``run`` closes a transaction; what is left of the batch goes into the next one.
            Readers see nothing of a transaction before its end.

    Promised: the records produced for a message, and the fact that it was consumed, become visible together, once.
    Not promised: anything outside of Kafka (a mail, a database) - handlers may run again after an abort; more than one
    cluster; isolation between transactions (Kafka has none for writes); readers with read_uncommitted.

    Raises:
        UnsafeConfigError: a setting contradicts the guarantee. Nothing was connected.
    """

    def __init__(self, config: Mapping[str, object], /, *, start: Start = "earliest", commit_interval: float = 0.1) -> None:
        self._settings = resolve(Guarantee.EXACTLY_ONCE, config, commit_interval=commit_interval)
        self._start = start
        self._commit_interval = commit_interval
        self._lifecycle = Lifecycle("ExactlyOnce")
        self._producer = TransactionalProducer(self, self._settings, self._lifecycle)
        self._seen: set[Partition] = set()

    # -- consume, transform, produce ------------------------------------------------------------------------------------

    def run(self, topics: Sequence[str], handler: Handler, *, max_batch: int = 10_000, until_idle: float | None = None) -> None:
        """Call ``handler`` for every message of ``topics``; what it returns becomes visible exactly once.

        Blocks until ``stop()``, until SIGINT or SIGTERM if this is the main thread, or until no message has come for
        ``until_idle`` seconds. The message in hand is finished and committed, and the group left, before it returns.

        Args:
            topics: names, or patterns that begin with ``^``.
            handler: called with a ``confluent_kafka.Message``; returns or yields ``Record``, or returns None. It may be called
                again for a message whose transaction was aborted.
            max_batch: messages fetched at a time.
            until_idle: seconds.

        Raises:
            HandlerError: the handler raised; its transaction was aborted.
            DeliveryError: a record cannot be written; its transaction was aborted.
            FencedError: another instance has this transactional.id.
            OffsetsLost, AuthorizationError, BrokerError: see there.
        """

        def portion(messages: Sequence[Message]) -> int:
            until, done = time.monotonic() + self._commit_interval, 0
            for message in messages:
                self._produce(outputs(handler, message, message), message)
                done += 1
                if time.monotonic() >= until or self._lifecycle.stopping:
                    break
            return done

        self._loop(topics, portion, max_batch, until_idle)

    def run_batches(
        self, topics: Sequence[str], handler: BatchHandler, *, max_batch: int = 1000, until_idle: float | None = None
    ) -> None:
        """Like ``run``, with a handler that takes a whole batch, in one transaction."""

        def whole(messages: Sequence[Message]) -> int:
            self._produce(outputs(handler, messages, messages[0]), messages[0])
            return len(messages)

        self._loop(topics, whole, max_batch, until_idle)

    def _loop(
        self,
        topics: Sequence[str],
        handle: Callable[[Sequence[Message]], int],
        max_batch: int,
        until_idle: float | None,
    ) -> None:
        try:
            with self._consuming(topics, max_batch) as consumer:
                for batch in consumer.batches(max_batch, until_idle):
                    rest = batch.messages
                    while rest:
                        done = self._in_transaction(consumer, batch, rest, handle)
                        rest = rest[done:]
                        if rest and (not done or self._must_poll(batch)):
                            consumer.rewind(rest)
                            break
        except Abandoned as exc:
            log.warning("%s", exc)  # stop() was called and no broker answers: nothing is lost, and the caller wants to go

    def _in_transaction(
        self,
        consumer: GroupConsumer,
        batch: Batch,
        messages: Sequence[Message],
        handle: Callable[[Sequence[Message]], int],
    ) -> int:
        """Handle messages in one transaction. Returns how many are committed; 0 where it was aborted and all come again."""
        producer = self._producer
        try:
            producer.begin()
            done = handle(messages)
            self._commit(consumer, batch, messages[:done])
        except (AbortNeeded, InDoubt) as exc:
            log.warning("a transaction of %d messages is aborted, and they are fetched again: %s", len(messages), exc)
            failure = producer.failure
            producer.abort()
            if failure is not None:
                raise failure from exc  # it would fail again
            return 0
        except FencedError:
            raise
        except BaseException:
            producer.abandon()
            raise
        else:
            return done

    def _commit(self, consumer: GroupConsumer, batch: Batch, messages: Sequence[Message]) -> None:
        """The end of a transaction.

        Raises:
            AbortNeeded: it must be aborted.
            InDoubt: nobody knows whether it was committed.
            FencedError, AuthorizationError: see there.
        """
        self._producer.flush()
        # X02: the broker checks the membership (and it alone can), but not that these partitions are ours
        if not consumer.still_ours(batch, within=self._settings.max_poll_interval):
            raise AbortNeeded("the group has given partitions away")
        self._producer.send_offsets(list(next_offsets(messages).values()), batch.metadata)
        self._producer.commit()

    def _produce(self, records: Iterator[Record], message: Message) -> None:
        for record in records:
            try:
                self._producer.produce(record)
            except (TypeError, ValueError) as error:
                raise handler_error(message, error) from error

    def _must_poll(self, batch: Batch) -> bool:
        """Whether the rest of a batch must be given back: to stop, or since the group wants to hear of us (C10)."""
        late = time.monotonic() - batch.fetched > self._settings.max_poll_interval / 2
        return late or self._lifecycle.stopping

    @contextmanager
    def _consuming(self, topics: Sequence[str], max_batch: int, itself: Itself | None = None) -> Iterator[GroupConsumer]:
        check_run(self._settings, self._lifecycle, topics, max_batch)
        with self._lifecycle.running(itself):
            self._producer.prepare()  # X24: the last run's transaction is ended before its messages are fetched again
            consumer = GroupConsumer(self._settings, self._lifecycle, topics, self._start, self._seen)
            try:
                yield consumer
            finally:
                consumer.close()

    # -- the caller's own loop ----------------------------------------------------------------------------------------

    def transactions(
        self, topics: Sequence[str], *, max_batch: int = 1000, until_idle: float | None = None
    ) -> Generator[Transaction, None, None]:
        """Iterate over transactions, each with the messages that it consumes.

        ::

            for tx in kafka.transactions(["offer-requests"]):
                with tx:
                    for message in tx.messages:
                        tx.produce("user-offers", transform(message))

        Leaving the ``with`` normally commits. Leaving it by an exception aborts and rewinds: the next transaction begins with
        the same messages. So it does, without an exception, where a rebalance or a broker kept it from being committed.
        Signals are left to the caller.

        Raises:
            FencedError, OffsetsLost, AuthorizationError, BrokerError: see there.
            KafkaGuaranteesError: a transaction was not used in a ``with``.
        """
        check_run(self._settings, self._lifecycle, topics, max_batch)
        return self._lifecycle.iterate(lambda itself: self._transactions(topics, max_batch, until_idle, itself))

    def _transactions(
        self, topics: Sequence[str], max_batch: int, until_idle: float | None, itself: Itself
    ) -> Generator[Transaction, None, None]:
        with self._consuming(topics, max_batch, itself) as consumer:
            for batch in consumer.batches(max_batch, until_idle):
                transaction = Transaction(self, consumer, batch)
                yield transaction
                if not transaction._committed:  # whatever the reason: its messages must not be passed over
                    consumer.unplace(batch.messages)
                transaction._check_used()
                self._producer.prepare()  # what the last one left open is ended before its messages are asked for again

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """A transaction for producing only: ``with kafka.transaction() as tx: tx.produce(...)``. All records or none.

        Raises:
            TransactionAborted: none of its records is visible. The block can be run again.
            DeliveryUnknown: it may or may not have been committed.
            FencedError, AuthorizationError, BrokerError: see there.
        """
        with self._lifecycle.running(lambda: None), Transaction(self, None, None) as transaction:
            yield transaction

    # -- ending -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask ``run`` to return after what is in hand. Safe in threads and signal handlers; without a run it ends the next."""
        self._lifecycle.stop()

    def close(self, timeout: float | None = None) -> None:
        """End a run and let the clients go, within ``timeout`` seconds (None: 30). A transaction left open is aborted."""
        if self._lifecycle.closed or self._lifecycle.forked:
            return
        timeout = 30.0 if timeout is None else timeout
        if not self._lifecycle.end_run(timeout):
            log.warning("the handler has not returned within %.1f s; its transaction is aborted", timeout)
        self._lifecycle.closed = True
        self._producer.close()

    def __enter__(self) -> Self:
        self._lifecycle.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @classmethod
    def explain(cls, config: Mapping[str, object] | None = None) -> Explanation:
        """What this guarantee sets and why, with ``config`` on top. Needs no broker; never shows a secret."""
        return explain(Guarantee.EXACTLY_ONCE, config)


class Transaction:
    """One transaction: commits on leaving its ``with`` block, aborts if that is left by an exception.

    Attributes:
        messages: what it consumes; empty for one that only produces.
    """

    def __init__(self, kafka: ExactlyOnce, consumer: GroupConsumer | None, batch: Batch | None) -> None:
        self.messages: Sequence[Message] = batch.messages if batch is not None else ()
        self._kafka = kafka
        self._producer = kafka._producer
        self._consumer = consumer
        self._batch = batch
        self._phase = "new"
        self._committed = False
        self._aborted: TransactionAborted | None = None  # raised by produce(), for a reason that is not the record's

    def produce(
        self,
        topic: str,
        value: Payload = None,
        key: Payload = None,
        *,
        headers: Headers = None,
        partition: int | None = None,
        timestamp: int | None = None,
    ) -> None:
        """Add a record to the transaction.

        Args:
            topic, value, key, headers, partition, timestamp: see ``Record``.

        Raises:
            DeliveryError: this record cannot be written. The transaction will be aborted, even if this is swallowed (X05).
            TypeError, ValueError: it is not a record. Likewise.
            TransactionAborted: the transaction must be aborted already.
            KafkaGuaranteesError: the transaction is over, or was not begun (X18).
        """
        self._kafka._lifecycle.check_fork()
        if self._phase != "open":
            raise KafkaGuaranteesError(f"this transaction is {self._phase}: produce inside its `with` block. Nothing was sent.")
        try:
            self._producer.produce(Record(topic, value, key, headers=headers, partition=partition, timestamp=timestamp))
        except AbortNeeded as exc:
            self._aborted = TransactionAborted(f"the transaction is being aborted: {exc}")
            raise self._aborted from exc

    def __enter__(self) -> Self:
        if self._phase != "new":
            raise KafkaGuaranteesError(f"this transaction is {self._phase}: each is used once")
        self._phase = "open"
        try:
            self._producer.begin()
        except InDoubt as exc:
            self._producer.abort()
            raise TransactionAborted(f"the transaction could not begin: {exc}") from exc
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        self._phase = "over"
        if error is None:
            self._end()
            return False
        try:
            self._producer.abort()
        except Exception:
            log.exception("aborting a transaction failed after the error that is raised")  # never hide the first error
            return False
        # a broker's trouble is no reason to leave the loop: its next transaction has the same messages
        return error is self._aborted and self._consumer is not None

    def _end(self) -> None:
        try:
            self._commit()
        except AbortNeeded as exc:
            self._producer.abort()
            if self._consumer is None or self._producer.failure is not None:
                raise TransactionAborted(f"nothing of the transaction is visible: {exc}") from (self._producer.failure or exc)
            log.warning("a transaction of %d messages is aborted, and they are fetched again: %s", len(self.messages), exc)
        except InDoubt as exc:
            self._producer.abort()
            if self._consumer is None:
                raise DeliveryUnknown(f"the transaction may or may not have been committed: {exc}") from exc
            log.warning("a transaction of %d messages is in doubt; its offsets will tell: %s", len(self.messages), exc)

    def _commit(self) -> None:
        if self._consumer is not None and self._batch is not None:
            self._kafka._commit(self._consumer, self._batch, self.messages)
        else:
            self._producer.flush()
            self._producer.commit()
        self._committed = True

    def _check_used(self) -> None:
        if self._phase != "over":
            raise KafkaGuaranteesError(
                f"a transaction of {len(self.messages)} messages was not used: write `for tx in ...: with tx: ...`. Nothing of "
                "it was committed, and its messages come again."
            )
