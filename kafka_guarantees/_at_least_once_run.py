"""One run of an at-least-once client: what happens to the messages of a batch before and after their handling.

    ids claimed -> handled -> records acknowledged -> ids completed -> offsets committed
                   raised  -> tried again, or set aside -> records acknowledged -> ...

Rules.
* Each step returns what is left in hand. Where that comes again, it is nothing: whoever says so has given it back already.
* Nothing is committed past a record that was not acknowledged (P01), and nothing of a batch that is not ours any more (X02).
* Where there is a store, ids are completed before offsets are committed, and released at the end of the batch if they are not.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ._failures import Failed, GaveUp, Left, attempted
from ._producer import raise_failures
from ._recognition.claims import Work
from ._recognition.message_ids import entries_of, entry_of
from ._recognition.patience import patiently
from ._recognition.portions import Portions
from ._trail import Portion, Trail
from .errors import BrokerError, PartitionFenced, StoreUnavailable
from .records import RecordRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from confluent_kafka import Message

    from ._batch import Batch
    from ._consumer import GroupConsumer
    from ._failures import Failures, Handling
    from ._handler_thread import HandlerThread
    from ._lifecycle import Lifecycle
    from ._pace import Pace
    from ._producer import PlainProducer
    from ._recognition.claims import Claims
    from ._recognition.message_ids import Problem
    from ._recognition.options import Recognition
    from ._recognition.topics import TopicIds
    from ._serialization import Reading
    from ._settings import Settings
    from .dedup.contract import Entry
    from .records import Delivery, Record

log = logging.getLogger("kafka_guarantees")

T = TypeVar("T")

COMMIT_EVERY = 1.0  # seconds of handling between two commits inside a batch
NOTHING = Work(())  # is in hand of a batch that comes again
NOT_PAST = "Nothing was committed past the messages it came from."


class Run:
    """One run, and what it needs of its client.

    Args:
        settings, lifecycle, reading: of the client.
        consumer: a member of the group, for this run.
        topic_ids: likewise for this run.
        failures: what to do about messages that fail.
        recognition: how to recognise what was handled before.
        thread: of the handler, where it has one of its own.
        producer: of the client, if there is one by now.
        send: produces a record.

    Attributes:
        consumer: as given.
        trail: what is handled and not committed.
        portions: the transactions of the inbox, if there is one.
        left: its user has left its loop, and hears of no failure: whoever looks next is told of it.
    """

    def __init__(
        self,
        settings: Settings,
        lifecycle: Lifecycle,
        consumer: GroupConsumer,
        topic_ids: TopicIds,
        *,
        reading: Reading,
        failures: Failures,
        recognition: Recognition,
        thread: HandlerThread | None,
        producer: Callable[[], PlainProducer | None],
        send: Callable[[Record], Delivery],
    ) -> None:
        self._settings = settings
        self._lifecycle = lifecycle
        self._topic_ids = topic_ids
        self._reading = reading
        self._failures = failures
        self._recognition = recognition
        self._thread = thread
        self._producer = producer
        self._send = send
        self._claims = recognition.claims(topic_ids)
        self._ids = recognition.ids(topic_ids)
        self.left = False
        self.consumer = consumer
        self.trail = consumer.trail = Trail(
            consumer,
            lifecycle,
            settings.max_poll_interval,
            producer=producer,
            acknowledged=self.acknowledged,
        )
        consumer.idle = self._idle
        self.portions: Portions | None = None
        if recognition.inbox is not None:
            self.portions = Portions(
                lifecycle,
                consumer,
                inbox=recognition.inbox,
                recognition=recognition,
                acknowledged=self.acknowledged,
                failures=failures,
                send=send,
            )

    # -- before the handling: recognising what was handled before -------------------------------------------------------

    @contextmanager
    def claimed(self, batch: Batch) -> Iterator[Work]:
        """What of a batch is to be handled. Claims that are not completed at the end are released."""
        self._attend(batch)
        if self._claims is None:
            self._reading.open(batch.messages)
            yield Work(batch.messages)
            return
        self._topic_ids.renew()
        try:
            work = self._claim(batch, self._claims)
            self._reading.open(work.fresh)
            yield work
        finally:
            self._claims.release()
        self._claims.tidy()

    def entries(self, batch: Batch) -> tuple[Sequence[Message], Sequence[Entry], Problem | None]:
        """What of a batch an inbox is asked about: messages, what it knows them by, and the one after them that has no id."""
        self._attend(batch)
        self._topic_ids.renew()
        entries, problem = entries_of(batch.messages, self._ids)  # asks nobody: to be placed, each topic had an id
        messages = batch.messages[: len(entries)]
        self._reading.open(messages)
        return messages, entries, problem

    def _attend(self, batch: Batch) -> None:
        if self._thread is not None:
            self._thread.attend(partial(self._serve, batch), self.consumer.resume)

    def _serve(self, batch: Batch) -> None:
        """Serve the group while a handler works in its own thread."""
        self.consumer.serve_beside(batch)
        self._renew()

    def _renew(self) -> None:
        if self._claims is not None:
            self._claims.renew()

    def _claim(self, batch: Batch, claims: Claims) -> Work:
        try:
            work, held = self._patiently(partial(self._claim_now, batch, claims), batch)
        except (StoreUnavailable, BrokerError) as error:
            if not self._no_more():
                raise  # not of the store: the group was served meanwhile
            if self._lifecycle.stopping:
                return NOTHING
            if not self.consumer.still_ours(batch):
                return self.give_back(batch)
            log.warning("%d messages are handled without protection from repeats: %s", len(batch.messages), error)
            return claims.unprotected(batch.messages)
        except PartitionFenced:
            return self.give_back(batch)  # the group went on while the store was down, or slow
        self._recognition.note(others=self.consumer.shares)
        if held:
            self.consumer.rest(held, claims.rest_for(held))
        return work

    def _claim_now(self, batch: Batch, claims: Claims) -> tuple[Work, Sequence[Message]]:
        """Claim a batch that is still ours: else its new owner would lose its claims to us.

        And is ours when the answer is there: it may have stood still for so long that the new owner is done with it (X02).
        """
        self._must_own(batch)
        answer = claims.claim(batch.messages)
        self._must_own(batch)
        return answer

    def _must_own(self, batch: Batch) -> None:
        if not self.consumer.still_ours(batch):
            raise PartitionFenced("the group gave partitions away.")

    def _patiently(self, call: Callable[[], T], batch: Batch) -> T:
        # brokers are asked for the ids of topics
        return patiently(call, self.consumer, batch, self._no_more, StoreUnavailable, BrokerError)

    def _no_more(self) -> bool:
        """Whether a store that does not answer is not asked again."""
        return self._lifecycle.stopping or not self._recognition.waits

    # -- after the handling: the end of a portion -----------------------------------------------------------------------

    def finish(
        self, batch: Batch, work: Work, handled: int, handle: Handling | None = None, *, to_the_end: bool = False
    ) -> Work:
        """Wait for what was produced, then commit what was handled. Returns what is left: nothing, where it comes again.

        Where that is all of a batch, handled ``to_the_end`` and soon, its commit trails behind: see ``Trail``.

        Raises:
            DeliveryError, DeliveryUnknown: nothing was committed.
            RecordRefused: likewise, nor what trails behind, whose record it may be.
        """
        behind = to_the_end and handled == len(work.fresh) and work.problem is None and self._soon(batch)
        producer, posted = self._producer(), None
        if behind and self._claims is None and (producer is None or not (producer.unacknowledged or producer.failed)):
            posted = None if producer is None else producer.portion()
        else:
            try:
                self.acknowledged()
            except RecordRefused as refused:
                if handle is None or not (self._failures.closely or self._claims is not None):
                    raise
                return self._find_refused(batch, work, handled, refused, handle)
        finished = work.finished(handled)
        if not finished:
            self.trail.settle()
        elif self._claims is not None and not self._complete(batch, self._claims, handled, finished):
            return self.give_back(batch)
        elif behind:
            self.trail.add(Portion(batch.next_offsets(finished), batch, posted, len(finished)))
        elif not self._commit(batch, finished):
            return NOTHING
        if self._failures.closely:
            self._failures.went_well()
        return work.rest(handled)

    def end(self) -> None:
        """The run ends, and no message that comes now is handled."""
        self.trail.end()
        if self.portions is not None:
            self.portions.end()

    def leave(self) -> None:
        """The run ends with an error."""
        self.trail.leave()
        if self.portions is not None:
            self.portions.end()

    def must_poll(self, batch: Batch, pace: Pace) -> bool:
        """Whether the rest of a batch must be given back: to stop, or since the group wants to hear of us (C10)."""
        now = time.monotonic()
        late = now - batch.served > pace.late or now - batch.fetched > self._settings.max_poll_interval / 2  # claims lapse
        return late or self._lifecycle.stopping

    def give_back(self, batch: Batch) -> Work:
        """Have what is not finished fetched again. Returns what is left: nothing.

        From all its partitions: behind what is in hand may be a message that must not be handled, and what comes after it.
        """
        self.consumer.rewind(batch.messages)
        return NOTHING

    def acknowledged(self) -> None:
        """Wait until everything produced is acknowledged. Nothing is committed past a record that is not (P01).

        Raises:
            DeliveryError, DeliveryUnknown: see the class.
            RecordRefused: brokers refused what a handler returned. There is a dead letter topic.
        """
        self._lifecycle.handled()
        producer = self._producer()
        if producer is not None:
            left = producer.flush(lambda: self._lifecycle.out_of_patience)
            producer.begin()  # what was posted until now is judged here: no portion to come is held up by it
            self._raise_failures(left)

    def _raise_failures(self, left: int) -> None:
        producer = self._producer()
        if producer is not None:
            forget = not (self.left or self._lifecycle.in_other_hands)
            if not left and forget and self._failures.topic is not None and (refused := producer.refused()) is not None:
                raise RecordRefused(refused)
            # not those that were asked for: they are of no message of a run, and had been let go of outside of it
            raise_failures(producer.failures(forget=forget, asked=False), left, NOT_PAST)

    def _soon(self, batch: Batch) -> bool:
        """Whether a batch was handled so fast that waiting for its commit would count. A client that stops waits for all."""
        return time.monotonic() - batch.fetched < COMMIT_EVERY and not (self._lifecycle.stopping or self._failures.closely)

    def _complete(self, batch: Batch, claims: Claims, handled: int, finished: Sequence[Message]) -> bool:
        """Complete the ids of what was handled. False: they are not, and what was handled is handled again (D17)."""
        try:
            self._patiently(partial(claims.complete, handled, finished), batch)
        except (StoreUnavailable, BrokerError) as error:
            if not self._no_more():
                raise
            finished_all_the_same = not self._recognition.waits
            claims.skip(handled, finished=finished_all_the_same)
            log.warning("the ids of %d messages that were handled could not be stored: %s", handled, error)
            return finished_all_the_same
        return True

    def _commit(self, batch: Batch, finished: Sequence[Message]) -> bool:
        """Commit these, with all that trails behind, and wait for the answer. False: they come again."""
        while self.consumer.still_ours(batch):
            if self.trail.commit(batch.next_offsets(finished)):
                return True
            if self._lifecycle.out_of_patience:
                return False
        self.trail.clear()
        self._failures.given_away(finished, batch)
        log.warning("the group gave partitions away: up to %d messages that were handled are handled again", len(finished))
        self.consumer.rewind(batch.messages)
        return False

    def _idle(self) -> None:
        """There is nothing to handle: what trails behind is finished, and what other threads have produced need not linger."""
        self.trail.idle()
        producer = self._producer()
        if producer is not None:
            producer.send_lingering()

    # -- what fails -----------------------------------------------------------------------------------------------------

    def again(self, batch: Batch, work: Work, failed: Failed, handle: Handling) -> Work:
        """Try again what failed, and set it aside where that has no use. Returns what is left: nothing, where it comes again.

        Not what the group has given away meanwhile: that is somebody else's by now, and may be finished there.

        Raises:
            HandlerError: there is nowhere to set it aside; or the handler was too slow again.
            DeliveryError, DeliveryUnknown: the dead letter was not acknowledged. Nothing of this is committed.
        """
        messages = work.fresh[: failed.size]
        if not self.consumer.still_ours(batch):
            self._failures.given_away(messages, batch, failed.error)
            return self.give_back(batch)
        attempt = partial(attempted, handle, messages)
        self._failures.flush_each = self._failures.closely
        try:
            outcome = self._failures.again(attempt, messages[0], failed.error, self._waiting(batch))
        except Left:
            return self.give_back(batch)
        finally:
            self._failures.flush_each = False
        if isinstance(outcome, GaveUp):
            if len(messages) > 1 and self._failures.narrows(outcome):
                return self._one_by_one(batch, work, handle, len(messages))
            return self._set_aside(batch, work, outcome._replace(size=len(messages)))
        if len(messages) > 1:
            return self.finish(batch, work, len(messages), handle)
        return self._finish_alone(batch, work, 1)

    def _find_refused(self, batch: Batch, work: Work, size: int, refused: RecordRefused, handle: Handling) -> Work:
        """Brokers refused a record of these: of which message is found out. Returns what is left, as ``again`` does."""
        self._failures.look_closely(refused.failure)
        if not self.consumer.still_ours(batch):
            self._failures.given_away(work.fresh[: max(1, size)], batch, refused)
            return self.give_back(batch)
        return self._one_by_one(batch, work, handle, size)

    def _one_by_one(self, batch: Batch, work: Work, handle: Handling, size: int) -> Work:
        """Find out which messages of a batch fail, and try again, or set aside, only these. Returns what is left in hand."""
        others = len(work.fresh) - size
        self._forget_refused()
        while len(work.fresh) > others:
            self._failures.flush_each = self._failures.closely
            try:
                handled, failed = self._each(batch, work.fresh[: len(work.fresh) - others], handle)
            finally:
                self._failures.flush_each = False
            if failed is None and not handled:
                return self.give_back(batch)
            if handled:
                work = self._finish_alone(batch, work, handled)
            if failed is not None and work.messages:
                work = self.again(batch, work, Failed(1, failed.error), handle)
        return work

    def _finish_alone(self, batch: Batch, work: Work, handled: int) -> Work:
        """Finish what was handled in calls of its own: one message, while it is looked closely, which may be set aside."""
        try:
            return self.finish(batch, work, handled)
        except RecordRefused as refused:
            if not self._failures.closely:
                raise
            return self._set_aside(batch, work, GaveUp(refused, 1))

    def _each(self, batch: Batch, messages: Sequence[Message], handle: Handling) -> tuple[int, Failed | None]:
        """Handle messages in calls of their own until the portion is full, up to one that fails. Returns how many they are."""
        until = time.monotonic() + (0 if self._failures.closely else COMMIT_EVERY)
        for number, message in enumerate(messages):
            if not self._failures.in_hand(self.consumer, batch, self._renew):
                return number, None
            _, failed = handle([message])
            if failed is not None:
                return number, failed
            if time.monotonic() >= until:
                return number + 1, None
        return len(messages), None

    def read_again(self, batch: Batch, work: Work) -> Work:
        """If the next message cannot be read, read it again, or set it aside. Returns what is left, as ``again`` does.

        Raises:
            HandlerError, DeliveryError, DeliveryUnknown: as ``again`` does.
        """
        if not work.fresh or self._reading.readable(work.fresh):
            return work
        message = work.fresh[0]
        check, error = partial(self._reading.check, message), self._reading.unreadable[id(message)]
        try:
            outcome = self._failures.again(check, message, error, self._waiting(batch))
        except Left:
            return self.give_back(batch)
        if not isinstance(outcome, GaveUp):
            return work
        return self._set_aside(batch, work, outcome)

    def get_past(self, batch: Batch, problem: Problem | None, pace: Pace) -> Sequence[Message]:
        """What is in hand ends before a message that must not be handled, if there is one: that is raised, or set aside.

        Returns what came after it in the batch; nothing, where that comes again.
        """
        if problem is None:
            return ()
        message, error = problem
        if self._failures.topic is None:
            raise error
        done = 1
        if self.portions is not None:
            done = self.portions.set_aside(batch, message, entry_of(message, self._ids), GaveUp(error, 0))
        else:
            self._send(self._failures.letter(message, GaveUp(error, 0)))
            self.finish(batch, Work([message]), 1)
        if not done or self.must_poll(batch, pace):
            return self.give_back(batch).messages
        place = next(number for number, each in enumerate(batch.messages) if each is message)
        return self.consumer.in_place(batch.messages[place + 1 :])

    def _set_aside(self, batch: Batch, work: Work, outcome: GaveUp) -> Work:
        """Send the next message to the dead letter topic. It is finished once that is acknowledged (L05). Returns what is left.

        Its id is free then: a repeat of it in this batch, which was left out, is claimed anew.
        """
        self._forget_refused()
        self._send(self._failures.letter(work.fresh[0], outcome))
        if self._claims is None or not self._claims.set_aside():
            return self.finish(batch, work, 1)
        self.finish(batch, work.first(), 1)
        return self.give_back(batch)

    def _forget_refused(self) -> None:
        """What attempts that failed have sent is in nobody's way: their messages are handled again, or set aside."""
        try:
            self.acknowledged()
        except RecordRefused:
            if not self._failures.closely:
                raise

    def _waiting(self, batch: Batch) -> Callable[[float], None]:
        return self._failures.waiting(self.consumer, batch, self._renew)
