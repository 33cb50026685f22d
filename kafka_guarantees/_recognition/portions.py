"""What happens to messages in the transactions of an inbox.

    begun: offsets locked, ids noted, what was handled before left out -> handled -> every record produced acknowledged
    -> offsets moved -> committed -> the group's offset committed as well, for those who watch it

The inbox decides, not the group: a second owner waits for the lock, and finds the messages handled.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException, TopicPartition

from .._failures import Ends, Failed, GaveUp, Left
from .._offsets import next_offsets, saying
from ..dedup._progress import broke_off, ended
from ..errors import BrokerError, KafkaGuaranteesError, MessageIdReused, PartitionFenced, StoreUnavailable
from ..records import RecordRefused
from .claims import TIDY_EVERY, Work, tidy
from .message_ids import reused_id
from .patience import patiently

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from confluent_kafka import Message

    from .._batch import Batch
    from .._consumer import GroupConsumer
    from .._failures import Failures, Handling
    from .._lifecycle import Lifecycle
    from ..dedup.contract import Entry, Inbox
    from ..records import Delivery, Record
    from .options import Recognition

log = logging.getLogger("kafka_guarantees")

ARRIVING = 1.0  # seconds


class _RolledBack(Exception):
    """A handler failed in a transaction.

    Args:
        place: of the first message that failed.
        failed: how many messages failed together, and why.
    """

    def __init__(self, place: int, failed: Failed) -> None:
        super().__init__(place, failed)
        self.place = place
        self.failed = failed


class Portions:
    """The transactions of one run.

    Args:
        lifecycle: of the client.
        consumer: of the run.
        inbox: whose transactions these are.
        recognition: whose ids and offsets these are, and where messages are counted.
        acknowledged: waits until every record that was produced is acknowledged, or raises.
        failures: what to do about messages that fail.
        send: produces a record.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        consumer: GroupConsumer,
        *,
        inbox: Inbox[Any],
        recognition: Recognition,
        acknowledged: Callable[[], None],
        failures: Failures,
        send: Callable[[Record], Delivery],
    ) -> None:
        self._lifecycle = lifecycle
        self._consumer = consumer
        self._inbox = inbox
        self._recognition = recognition
        self._acknowledged = acknowledged
        self._failures = failures
        self._send = send
        self._tidy_at = time.monotonic() + TIDY_EVERY
        self._shown: list[TopicPartition] | None = None  # what was committed last

    def transact(
        self, batch: Batch, messages: Sequence[Message], entries: Sequence[Entry], handle: Handling
    ) -> tuple[int, Failed | None]:
        """Handle messages in one transaction. If one fails, that is rolled back, and those before it are handled in another.

        Args:
            batch: which they are of.
            messages: in their order.
            entries: of these messages.
            handle: handles messages, with the connection of the inbox.

        Returns:
            How many are finished, and what failed after them.
        """
        failed = None
        while messages:
            transaction = partial(self._in_transaction, batch, messages, entries, handle)
            try:
                finished = patiently(transaction, self._consumer, batch, self._stopping, StoreUnavailable)
            except _RolledBack as error:
                self._forget_refused()
                failed = error.failed
                messages, entries = messages[: error.place], entries[: error.place]
            except (PartitionFenced, StoreUnavailable) as error:
                self._forget_refused()
                log.warning("%d messages were given back: %s", len(messages), error)
                if isinstance(error, PartitionFenced):
                    self._failures.given_away(messages, batch)
                return 0, None
            else:
                self._show(batch, finished)
                # a stop, or the end of its time, may have cut it short of the message that failed
                return len(finished), failed if len(finished) == len(messages) else None
        return 0, failed

    def _forget_refused(self) -> None:
        """What was sent in a transaction that is undone is in nobody's way: its messages come again."""
        with suppress(RecordRefused):
            self._acknowledged()

    def _attempt(self, batch: Batch, messages: Sequence[Message], entries: Sequence[Entry], handle: Handling) -> int:
        """Handle messages that failed before. Returns how many are finished.

        Raises:
            Exception: what their handler raised.
            Left: they were given back.
            Ends: the transaction failed, and not for them: it is not held against them.
        """
        try:
            done, failed = self.transact(batch, messages, entries, handle)
        except KafkaGuaranteesError as error:
            raise Ends(error) from error
        if failed is not None:
            raise failed.error
        if not done:
            raise Left
        return done

    def again(
        self, batch: Batch, messages: Sequence[Message], entries: Sequence[Entry], failed: Failed, handle: Handling
    ) -> int:
        """Try again what failed, each time in a transaction of its own, and set it aside where that has no use.

        Returns:
            How many are finished; 0: they come again.

        Raises:
            HandlerError, MessageIdReused: there is nowhere to set it aside.
            KafkaGuaranteesError: the transaction failed, and not for a message.
        """
        messages, entries = messages[: failed.size], entries[: failed.size]
        if not self._ours(batch):
            self._failures.given_away(messages, batch, failed.error)
            return 0
        if isinstance(failed.error, MessageIdReused):  # no attempt would help
            if self._failures.topic is None:
                raise failed.error
            return self.set_aside(batch, messages[0], entries[0], GaveUp(failed.error, 0))
        attempt = partial(self._attempt, batch, messages, entries, handle)
        try:
            outcome = self._failures.again(attempt, messages[0], failed.error, self._failures.waiting(self._consumer, batch))
        except Ends as ends:
            raise ends.error from ends.error.__cause__
        except Left:
            return 0
        if not isinstance(outcome, GaveUp):
            return outcome
        together = isinstance(outcome.error, RecordRefused) and not self._failures.flush_each  # for one request, it may be
        if not (len(messages) > 1 or together) or not self._failures.narrows(outcome):
            return self.set_aside(batch, messages[0], entries[0], outcome._replace(size=len(messages)))
        return self._one_by_one(batch, messages, entries, handle)

    def _one_by_one(self, batch: Batch, messages: Sequence[Message], entries: Sequence[Entry], handle: Handling) -> int:
        """Find out which messages of a batch fail, and try again, or set aside, only these. Returns how many are finished."""
        self._failures.flush_each = True
        try:
            return self._each(batch, messages, entries, handle)
        finally:
            self._failures.flush_each = False

    def _each(self, batch: Batch, messages: Sequence[Message], entries: Sequence[Entry], handle: Handling) -> int:
        for number, (message, entry) in enumerate(zip(messages, entries, strict=True)):
            if not self._failures.in_hand(self._consumer, batch):
                return number
            done, failing = self.transact(batch, [message], [entry], handle)
            if failing is not None:
                done = self.again(batch, [message], [entry], failing, handle)
            if not done:
                return number
        return len(messages)

    def set_aside(self, batch: Batch, message: Message, entry: Entry, outcome: GaveUp) -> int:
        """Send a message to the dead letter topic, and move its offset. Its id is not noted, so that it can be sent again.

        Raises:
            Exception: the database does not commit that, and not for the message: it would be sent there again and again.
        """
        letter = self._failures.letter(message, outcome)
        sent: Delivery | None = None

        def send(fresh: Sequence[Message], _connection: object) -> tuple[int, None]:
            nonlocal sent
            # not again where the database was away at the end: one that has not failed is acknowledged, or still waited for
            if fresh and (sent is None or sent._failure is not None):
                sent = self._send(letter)
            return len(fresh), None

        done, failed = self.transact(batch, [message], [entry._replace(key=None)], send)
        if failed is not None:
            raise failed.error
        return done

    def _in_transaction(
        self, batch: Batch, messages: Sequence[Message], entries: Sequence[Entry], handle: Handling
    ) -> Sequence[Message]:
        """Handle messages in one transaction. Returns those that are finished.

        Raises:
            _RolledBack: one failed.
            PartitionFenced, StoreUnavailable: nothing happened, or nobody knows; the next transaction knows.
        """
        if not self._ours(batch):
            raise PartitionFenced("the group gave partitions away.")
        rolled_back, begun, ending = None, False, False
        finished: Sequence[Message] = ()
        try:
            with self._inbox.transaction(self._recognition.scope, entries) as transaction:
                begun = True
                work = Work(messages, transaction.fresh)
                handled, failed = handle(work.fresh, transaction.connection)
                self._lifecycle.check_fork()  # a child that returns from the handler commits nothing of its parent's (Y04)
                finished = work.finished(handled)
                if failed is not None:
                    # one that failed alone stays alone: repeats of others behind it are not tried with it
                    together = 1 if failed.size == 1 else len(work.finished(handled + failed.size)) - len(finished)
                    rolled_back = _RolledBack(len(finished), Failed(together, failed.error))
                    raise failed.error  # noqa: TRY301 - an inbox tells by it whether its connection was lost
                try:
                    self._acknowledged()
                except RecordRefused as refused:
                    rolled_back = _RolledBack(0, Failed(len(finished), refused))
                    raise
                transaction.finish(handled)
                ending = True
        except Exception as error:
            if isinstance(error, MessageIdReused) and error.index is not None and not begun:
                raise _RolledBack(error.index, Failed(1, reused_id(messages[error.index]))) from None
            if rolled_back is not None and error is rolled_back.failed.error:
                if broke_off(error):  # in an inbox around an ORM: not the fault of the message, and it would come each time
                    raise ended("the handler ended the transaction") from error
                raise rolled_back from None
            if ending and finished and not isinstance(error, KafkaGuaranteesError):
                # a constraint of the user's that the database looks at last: any of them may have broken it
                raise _RolledBack(0, Failed(len(finished), error)) from None
            raise
        self._recognition.counts["duplicate"] += len(finished) - handled
        return finished

    def _show(self, batch: Batch, finished: Sequence[Message]) -> None:
        """Commit offsets for those who watch the group: where to go on is in the inbox, so that nobody waits for the answer."""
        if finished and self._ours(batch):
            self._shown = self._marked(finished)
            try:
                self._consumer.send_commit(self._shown)
            except BrokerError as error:
                log.info("%s The inbox has them.", error)

    def end(self) -> None:
        """The run ends: give the last commit a moment to arrive. What is asked behind it is answered behind it."""
        quiet = self._lifecycle.forked or self._lifecycle.out_of_patience or self._consumer.gone_silent
        if self._shown is not None and not quiet:
            with suppress(KafkaException):
                self._consumer.raw.committed(self._shown, ARRIVING)

    def _marked(self, finished: Sequence[Message]) -> list[TopicPartition]:
        return [saying(self._recognition.mark, place) for place in next_offsets(finished).values()]

    def tidy(self) -> None:
        """Remove expired ids, a few at a time."""
        self._tidy_at = tidy(self._inbox, self._tidy_at)

    def _ours(self, batch: Batch) -> bool:
        return self._consumer.still_ours(batch)

    def _stopping(self) -> bool:
        return self._lifecycle.stopping
