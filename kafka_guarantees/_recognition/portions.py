"""What happens to messages in the transactions of an inbox.

    begun: offsets locked, ids noted, what was handled before left out -> handled -> every record produced acknowledged
    -> offsets moved -> committed -> the group's offset committed as well, for those who watch it

The inbox decides, not the group: a second owner waits for the lock, and finds the messages handled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from confluent_kafka import Message, TopicPartition

from .._offsets import next_offsets
from ..errors import BrokerError, KafkaGuaranteesError, PartitionFenced, StoreUnavailable
from .claims import TIDY_EVERY, Work, tidy
from .patience import patiently

if TYPE_CHECKING:
    from collections import Counter

    from .._consumer import Batch, GroupConsumer
    from .._lifecycle import Lifecycle
    from .._settings import Settings
    from ..dedup.contract import Entry, Inbox

log = logging.getLogger("kafka_guarantees")

# Takes fresh messages and the connection of an inbox. Returns how many are finished, and what failed after them.
Handling = Callable[[Sequence[Message], Any], tuple[int, KafkaGuaranteesError | None]]


class _RolledBack(Exception):
    """A handler failed in a transaction.

    Args:
        place: of its message.
        failure: to be raised.
    """

    def __init__(self, place: int, failure: KafkaGuaranteesError) -> None:
        super().__init__(place, failure)
        self.place = place
        self.failure = failure


class Portions:
    """The transactions of one run.

    Args:
        settings: of the client.
        lifecycle: of the client.
        consumer: of the run.
        inbox: whose transactions these are.
        scope: whose ids and offsets these are.
        mark: is committed with the group's offsets.
        counts: to count in.
        handle: handles messages.
        acknowledged: waits until every record that was produced is acknowledged, or raises.
    """

    def __init__(
        self,
        settings: Settings,
        lifecycle: Lifecycle,
        consumer: GroupConsumer,
        *,
        inbox: Inbox[Any],
        scope: str,
        mark: str,
        counts: Counter[str],
        handle: Handling,
        acknowledged: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._lifecycle = lifecycle
        self._consumer = consumer
        self._inbox = inbox
        self._scope = scope
        self._mark = mark
        self._counts = counts
        self._handle = handle
        self._acknowledged = acknowledged
        self._tidy_at = time.monotonic() + TIDY_EVERY

    def transact(
        self, batch: Batch, messages: Sequence[Message], entries: Sequence[Entry]
    ) -> tuple[int, KafkaGuaranteesError | None]:
        """Handle messages in one transaction. If one fails, that is rolled back, and those before it are handled in another.

        Returns:
            How many are finished, and what failed after them.
        """
        failure = None
        while messages:
            transaction = partial(self._in_transaction, batch, messages, entries)
            try:
                finished = patiently(transaction, self._consumer, batch, self._stopping)
            except _RolledBack as error:
                failure = error.failure
                messages, entries = messages[: error.place], entries[: error.place]
            except (PartitionFenced, StoreUnavailable) as error:
                log.warning("%d messages were given back: %s", len(messages), error)
                break
            else:
                self._show(batch, finished)
                return len(finished), failure
        return 0, failure

    def _in_transaction(self, batch: Batch, messages: Sequence[Message], entries: Sequence[Entry]) -> Sequence[Message]:
        """Handle messages in one transaction. Returns those that are finished.

        Raises:
            _RolledBack: one failed.
            PartitionFenced, StoreUnavailable: nothing happened, or nobody knows; the next transaction knows.
        """
        if not self._ours(batch):
            raise PartitionFenced("the group gave partitions away.")
        rolled_back = None
        try:
            with self._inbox.transaction(self._scope, entries) as transaction:
                work = Work(messages, transaction.fresh)
                handled, failure = self._handle(work.fresh, transaction.connection)
                finished = work.finished(handled)
                if failure is not None:
                    rolled_back = _RolledBack(len(finished), failure)
                    raise failure.__cause__ or failure  # noqa: TRY301 - an inbox tells by it whether its connection was lost
                self._acknowledged()
                transaction.finish(handled)
        except Exception as error:
            if rolled_back is not None and error in (rolled_back.failure, rolled_back.failure.__cause__):
                raise rolled_back from None
            raise
        self._counts["duplicate"] += len(finished) - handled
        return finished

    def _show(self, batch: Batch, finished: Sequence[Message]) -> None:
        """Commit offsets for those who watch the group: where to go on is in the inbox."""
        if finished and self._ours(batch):
            try:
                self._consumer.commit(self._marked(finished))
            except BrokerError as error:
                log.info("%s The inbox has them.", error)

    def _marked(self, finished: Sequence[Message]) -> list[TopicPartition]:
        return [TopicPartition(p.topic, p.partition, p.offset, self._mark) for p in next_offsets(finished).values()]

    def tidy(self) -> None:
        """Remove expired ids, a few at a time."""
        self._tidy_at = tidy(self._inbox, self._tidy_at)

    def _ours(self, batch: Batch) -> bool:
        return self._consumer.still_ours(batch, within=self._settings.max_poll_interval)

    def _stopping(self) -> bool:
        return self._lifecycle.stopping
