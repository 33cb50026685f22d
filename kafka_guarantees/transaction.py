"""A transaction of the caller's own: what he produces in its ``with`` block, and what it consumes, all of it or nothing.

What happens at the end of the block::

    left normally  -> its records with the brokers -> still a member of the group? -> offsets into the transaction -> committed
    left by error  -> aborted

* A record that cannot be produced poisons it, also where the block swallowed the exception (X05).
* Where a rebalance or a broker kept it from being committed, it is aborted, and its loop goes on with the same messages. One
  that only produces raises that instead.
* Where nobody can say whether it was committed, the committed offsets will tell, and one that only produces says so.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ._client import Abandoned
from ._printable import text_of
from ._transactional import AbortNeeded, InDoubt
from .errors import DeliveryError, DeliveryUnknown, KafkaGuaranteesError, TransactionAborted
from .records import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from confluent_kafka import Message, TopicPartition
    from typing_extensions import Self

    from ._batch import Batch
    from ._consumer import GroupConsumer
    from ._lifecycle import Lifecycle
    from ._serialization import Writing
    from ._transactional import TransactionalProducer
    from .records import Headers

log = logging.getLogger("kafka_guarantees")


class Consumed(NamedTuple):
    """What a transaction consumes.

    Attributes:
        consumer: a member of the group.
        batch: of that.
        letters: for those of its messages that cannot be read, by the identity of the message.
        offsets: tells what to commit of the batch; None: it is not ours any more.
    """

    consumer: GroupConsumer
    batch: Batch
    letters: Mapping[int, Record]
    offsets: Callable[[], Sequence[TopicPartition] | None]


class Transaction:
    """One transaction: commits on leaving its ``with`` block, aborts if that is left by an exception.

    Attributes:
        messages: what it consumes; empty for one that only produces.
    """

    def __init__(
        self, producer: TransactionalProducer, lifecycle: Lifecycle, writing: Writing, consumed: Consumed | None = None
    ) -> None:
        self._producer = producer
        self._lifecycle = lifecycle
        self._writing = writing
        self._consumed = consumed
        self._consumer: GroupConsumer | None = None
        self._letters: Mapping[int, Record] = {}
        self.messages: Sequence[Message] = ()
        if consumed is not None:
            self._consumer, batch, self._letters, _ = consumed
            self.messages = [m for m in batch.messages if id(m) not in self._letters] if self._letters else batch.messages
        self._phase = "new"
        self._committed = False
        self._aborted: TransactionAborted | None = None  # raised by produce(), for a reason that is not the record's
        self._committing = False  # from here on it may be committed, whatever is raised
        self._left = False  # to the brokers, which did not answer: there is nothing to end

    def produce(
        self,
        topic: str,
        value: Any = None,
        key: Any = None,
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
            Exception: whatever a serializer raises. Likewise.
            TransactionAborted: the transaction must be aborted already, or the brokers take its records more slowly than it may
                last.
            KafkaGuaranteesError: the transaction is over, or was not begun (X18).
        """
        self._lifecycle.check_fork()
        if self._phase != "open":
            raise KafkaGuaranteesError(f"this transaction is {self._phase}: produce inside its `with` block. Nothing was sent.")
        if self._aborted is not None:
            raise self._aborted
        try:
            record = self._made(Record(topic, value, key, headers=headers, partition=partition, timestamp=timestamp))
            self._producer.produce([record])
        except AbortNeeded as exc:
            self._aborted = TransactionAborted(f"the transaction is being aborted: {exc}")
            raise self._aborted from (self._producer.failure or exc)

    def _made(self, record: Record) -> Record:
        """A record as it is sent. Where that fails, the transaction would lack it, whoever swallows the error (X05)."""
        try:
            return self._writing.serialize(record)
        except BaseException as error:
            self._producer.poison(DeliveryError(f"a record for topic {record.topic!r} was not written: {text_of(error)}"))
            raise

    def __enter__(self) -> Self:
        if self._phase != "new":
            raise KafkaGuaranteesError(f"this transaction is {self._phase}: each is used once")
        self._phase = "over"  # where it cannot begin
        if self._consumer is not None and self._consumer.raw is None:
            raise KafkaGuaranteesError("this transaction is over: the loop that it belongs to has ended. Nothing was sent.")
        try:
            self._producer.begin()
        except InDoubt as exc:
            self._producer.abort()
            raise TransactionAborted(f"the transaction could not begin: {exc}") from exc
        except Abandoned as exc:
            if self._consumer is None:
                raise
            self._phase = "open"
            self._aborted, self._left = TransactionAborted(f"the transaction could not begin: {exc}"), True
            return self  # stop() was called: the iteration ends after this
        self._phase = "open"
        for letter in self._letters.values():
            self._set_aside(letter)
        return self

    def _set_aside(self, letter: Record) -> None:
        try:
            self._producer.produce([letter])
        except AbortNeeded as exc:
            self._aborted = TransactionAborted(f"the transaction is being aborted: {exc}")  # at its end
        except BaseException:
            self._phase = "over"
            self._producer.abandon()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        self._phase = "over"
        if self._left:
            return error is self._aborted
        if error is None:
            try:
                self._end()
            except Abandoned as exc:
                if self._consumer is None:
                    raise
                log.warning("%s", exc)  # stop() was called and no broker answers: the iteration ends next
            return False
        try:
            self._lifecycle.handled()
            self._producer.abort(leaving=error is not self._aborted)
        except Exception as exc:
            if error is not self._aborted:
                log.exception("aborting a transaction failed after the error that is raised")  # never hide the first error
                return False
            if self._consumer is None or not isinstance(exc, Abandoned):
                raise  # the reason, as FencedError, for what produce() could only call aborted
            log.warning("%s", exc)
        # a broker's trouble is no reason to leave the loop: its next transaction has the same messages
        return error is self._aborted and self._consumer is not None and self._producer.failure is None

    def _end(self) -> None:
        try:
            self._commit()
        except AbortNeeded as exc:
            self._producer.abort()
            if self._consumer is None or self._producer.failure is not None:
                raise TransactionAborted(f"nothing of the transaction is visible: {exc}") from (self._producer.failure or exc)
            log.warning("a transaction of %d messages is aborted, and they are fetched again: %s", len(self.messages), exc)
        except InDoubt as exc:
            too_long = self._producer.too_long
            try:
                self._producer.abort()
            except KafkaGuaranteesError as worse:  # also where nothing can be found out any more
                if self._consumer is not None:
                    raise
                exc.args = (f"{exc}. {worse}",)
            if self._consumer is None and not self._committing:
                raise TransactionAborted(f"nothing of the transaction is visible: {exc}{too_long}") from exc
            if self._consumer is None:
                raise DeliveryUnknown(f"the transaction may or may not have been committed: {exc}{too_long}") from exc
            log.warning("a transaction of %d messages is in doubt; its offsets will tell: %s", len(self.messages), exc)

    def _commit(self) -> None:
        self._lifecycle.handled()
        self._producer.flush()
        claimed = None
        if self._consumed is not None:
            offsets = self._consumed.offsets()
            if offsets is None:
                raise AbortNeeded("the group has given partitions away")
            self._producer.send_offsets(offsets, self._consumed.batch.metadata)
            claimed = partial(self._consumed.consumer.claim, offsets)
        self._committing = True
        self._producer.commit(claimed)
        self._committed = True

    def _check_used(self) -> None:
        if self._phase != "over":
            raise KafkaGuaranteesError(
                f"a transaction of {len(self.messages)} messages was not used: write `for tx in ...: with tx: ...`. Nothing of "
                "it was committed, and its messages come again."
            )
