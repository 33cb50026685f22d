"""Commits that trail behind: the offsets of a batch are on their way to the group while the next one is handled.

Rules.
* At most one commit is in flight, and the next one waits for its answer, so that the group's offset does not go back. But one
  that is waited for overtakes it; and librdkafka sends again what lost its connection, which then sets the group back. So the
  answer to what was overtaken is looked for, also at the end of a run, and after it the newer offsets are committed once more.
* When a batch is handled, the commit of BEHIND portions may be outstanding. Where that takes longer it is waited for: a crash
  repeats what was in hand and the three portions before it, no more.
* The offsets of a portion are sent once every record that was produced for it is acknowledged, and while the membership that
  it was handled under goes on. The answer is looked at for every partition; what was not committed is committed again (C06).
* Before a partition is given away, and before the brokers are asked where to go on, all of it is committed.
* What cannot be committed any more is dropped: it was handled, and comes again to whoever owns it now.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException, TopicPartition

from ._client import Rarely
from .errors import AuthorizationError, BrokerError, KafkaGuaranteesError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from confluent_kafka import KafkaError

    from ._batch import Batch
    from ._consumer import GroupConsumer
    from ._lifecycle import Lifecycle
    from ._offsets import Membership, Partition
    from ._posted import Posted
    from ._producer import PlainProducer

log = logging.getLogger("kafka_guarantees")

BEHIND = 3  # portions that may be uncommitted when the next one is handled
AGAIN = 0.1  # seconds until a commit that failed is sent again
LEAVING = 10.0  # seconds that the end of a run, by an error, waits for acknowledgements
GIVING_AWAY = 1.0  # seconds that a rebalance, or the end of a run, waits for them, and for the answer to a commit
END_POLL = 0.01  # seconds


class Portion:
    """Messages of one batch that are handled, and not committed.

    Attributes:
        offsets: to commit.
        served, member: of their batch, which is not kept: it may be large.
        posted: what was produced for them; None where all of it is acknowledged.
        size: how many messages.
    """

    __slots__ = ("member", "offsets", "posted", "served", "size")

    def __init__(self, offsets: dict[Partition, TopicPartition], batch: Batch, posted: Posted | None, size: int) -> None:
        self.offsets = offsets
        self.served = batch.served
        self.member = batch.member
        self.posted = posted
        self.size = size

    @property
    def acknowledged(self) -> bool:
        """Whether every record that was produced for it is written."""
        return self.posted is None or not (self.posted.unknown or self.posted.failed)


class Trail:
    """What is handled and not committed, the oldest first.

    Args:
        consumer: of the run.
        lifecycle: of the client.
        within: seconds after its fetch that a batch can be ours.
        producer: of the client, if there is one by now.
        acknowledged: waits until everything produced is acknowledged, or raises.
    """

    def __init__(
        self,
        consumer: GroupConsumer,
        lifecycle: Lifecycle,
        within: float,
        *,
        producer: Callable[[], PlainProducer | None],
        acknowledged: Callable[[], None],
    ) -> None:
        self._consumer = consumer
        self._lifecycle = lifecycle
        self._within = within
        self._producer = producer
        self._acknowledged = acknowledged
        self._portions: deque[Portion] = deque()
        self._in_flight: dict[Partition, int] = {}  # what the commit says that is not answered
        self._in_flight_portions = 0  # how many portions, from the first on, are in it
        self._overtaken: list[dict[Partition, int]] = []  # commits that were not answered when a newer one was
        self._committed_since: dict[Partition, TopicPartition] = {}  # what was committed since then
        self._recommit = False  # whether that is to be committed once more
        self._not_before = 0.0  # when the next may be sent, after one that failed
        self._problem: Exception | None = None  # of a commit, for the thread that runs
        self._rarely = Rarely()  # it is tried again ten times a second

    # -- what the loop does -------------------------------------------------------------------------------------------

    def add(self, portion: Portion) -> None:
        """A batch is handled to its end. Its commit is sent with the next fetch, which looks at the membership anyway."""
        self._portions.append(portion)

    def follow(self, member: Membership) -> None:
        """The next batch is about to be handled, and was fetched as this member.

        Raises:
            DeliveryError, DeliveryUnknown, AuthorizationError: see the class.
            RecordRefused: brokers refused what a handler returned. There is a dead letter topic.
        """
        if self._portions or self._recommit:
            self._advance(member)
            if len(self._portions) > BEHIND:
                self._await(self._portions[0])
                self._commit(self._ready())

    def idle(self) -> None:
        """There is nothing to handle: what was produced goes out at once, and its offsets after it."""
        if self._portions or self._recommit:
            if not all(portion.acknowledged for portion in self._portions):
                self._acknowledged()
            self._advance()

    def settle(self) -> None:
        """Commit all there is, and wait for the answer."""
        if (self._portions or self._recommit) and not self._consumer.gone_silent:
            self._acknowledged()
            self._commit(len(self._portions))

    def end(self) -> None:
        """The run ends, and no message that comes now is handled: commit all there is, for good."""
        self.settle()
        if not self._committed_since or self._lifecycle.forked or self._consumer.gone_silent:
            return
        deadline = time.monotonic() + GIVING_AWAY
        try:
            while (self._overtaken or self._in_flight) and time.monotonic() < deadline:
                self._consumer.raw.poll(END_POLL)
        except KafkaException as error:
            log.warning("what was handled last may be handled again: %s", error)
        self.settle()

    def leave(self) -> None:
        """The run ends with an error, which is not to be hidden: commit what is acknowledged."""
        if not (self._portions or self._recommit) or self._lifecycle.forked or self._consumer.gone_silent:
            return
        deadline = time.monotonic() + LEAVING
        try:
            for portion in self._portions:
                self._wait(portion, deadline)
            ready = self._ready()
            if (ready or self._recommit) and self._ours(ready):
                offsets = self._offsets(ready)
                self._consumer.commit(list(offsets.values()))
                self._overtake(offsets)
        except KafkaGuaranteesError as error:
            log.warning("what was handled last may be handled again: %s", error)
        finally:
            self._pop(len(self._portions))  # what is not committed the error tells of, and no rebalance took it away

    # -- with what does not trail behind -------------------------------------------------------------------------------

    def commit(self, more: Mapping[Partition, TopicPartition]) -> bool:
        """Commit all there is, with these offsets, and wait for the answer. False: it is not a good one."""
        return self._tried(len(self._portions), more)

    def clear(self) -> None:
        """Nothing of it is committed: what was handled comes again."""
        self._overtake({})
        self._pop(len(self._portions))

    # -- what the callbacks of the consumer do: in its poll, in the same thread ----------------------------------------

    def answered(self, error: KafkaError | None, places: Iterable[TopicPartition]) -> None:
        """A commit was answered: ours, or one that somebody has waited for."""
        answer = list(places)
        said = {(p.topic, p.partition): p.offset for p in answer}
        if said in self._overtaken:
            self._overtaken.remove(said)
            self._recommit = bool(self._committed_since)
            return
        if not self._in_flight or said != self._in_flight:
            return
        flying, self._in_flight_portions, self._in_flight = self._in_flight_portions, 0, {}
        try:
            self._consumer.check_commit(error, answer)
        except AuthorizationError as problem:
            self._problem = problem
        except BrokerError as problem:
            if self._rarely(str(problem)):
                log.warning("%s", problem)
            self._not_before = time.monotonic() + AGAIN
            self._recommit = bool(self._committed_since)
        else:
            self._pop(flying)
            if not (self._overtaken or self._recommit):
                self._committed_since = {}

    def revoked(self, gone: AbstractSet[Partition]) -> None:
        """Partitions are given away, once this returns or raises: commit what was handled of them."""
        try:
            self._give_away()
        finally:
            self._overtake({})
            self._in_flight_portions = 0
            self.lost(gone)

    def _give_away(self) -> None:
        deadline = time.monotonic() + GIVING_AWAY
        for portion in self._portions:
            self._wait(portion, deadline)
        if self._in_flight_portions and self._arrived(self._in_flight_portions):
            self._forget(self._in_flight_portions)
        ready = self._ready()
        if (ready or self._recommit) and self._ours(ready):
            offsets = self._offsets(ready)
            if offsets:
                self._consumer.send_commit(list(offsets.values()))
                self._overtake(offsets)
                self._in_flight = {partition: place.offset for partition, place in offsets.items()}
            if self._arrived(ready):
                self._forget(ready)

    def lost(self, gone: AbstractSet[Partition]) -> None:
        """Partitions are somebody else's: nothing of them is committed any more."""
        again = 0
        for portion in self._portions:
            if not gone.isdisjoint(portion.offsets):
                again += portion.size
                portion.offsets = {partition: place for partition, place in portion.offsets.items() if partition not in gone}
        self._committed_since = {
            partition: place for partition, place in self._committed_since.items() if partition not in gone
        }
        self._recommit = self._recommit and bool(self._committed_since)
        self._warn(again)

    # -- how ----------------------------------------------------------------------------------------------------------

    def _advance(self, member: Membership | None = None) -> None:
        """Send what is acknowledged, unless a commit is in flight."""
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem
        if any(portion.posted is not None and portion.posted.failed for portion in self._portions):
            self._acknowledged()  # raises, once all is reported: the one to blame may come after others of its request
        if self._in_flight or time.monotonic() < self._not_before:
            return
        ready = self._ready()
        if not ready and not self._recommit:
            return
        if not self._ours(ready, member):
            self._drop(ready)
            return
        offsets = self._offsets(ready)
        if not offsets:
            self._pop(ready)
            return
        if self._overtaken or self._recommit:
            self._committed_since.update(offsets)
            self._recommit = False
        self._in_flight = {partition: place.offset for partition, place in offsets.items()}
        self._in_flight_portions = ready
        self._consumer.send_commit(list(offsets.values()))

    def _commit(self, count: int) -> None:
        """Commit the first portions, and wait for the answer: again, until it is a good one, or they are not ours any more."""
        while (count or self._recommit) and self._ours(count):
            if self._tried(count, {}) or self._lifecycle.out_of_patience:
                return
        self._drop(count)

    def _tried(self, count: int, more: Mapping[Partition, TopicPartition]) -> bool:
        """Commit the first portions, with these offsets. False where that failed: after a moment, if it may be tried again."""
        offsets = {**self._offsets(count), **more}
        try:
            if offsets:
                self._consumer.commit(list(offsets.values()))
        except BrokerError as error:  # not of a right that is missing: that is raised
            if self._rarely(str(error)):
                log.warning("%s", error)
            if not self._lifecycle.out_of_patience:
                time.sleep(AGAIN)
            return False
        self._overtake(offsets)
        self._pop(count)
        return True

    def _overtake(self, offsets: Mapping[Partition, TopicPartition]) -> None:
        """These were committed, and waited for. A commit that is still unanswered has been overtaken by that.

        librdkafka may send it again later, and set the group back. So what is newer is remembered, and committed once more when
        the old answer has come.
        """
        if self._in_flight:
            self._overtaken.append(self._in_flight)
            self._in_flight = {}
        if offsets:
            self._committed_since = {**self._committed_since, **offsets} if self._overtaken else {}
            self._recommit = False

    def _await(self, portion: Portion) -> None:
        """Wait until what was produced for a portion is acknowledged, but not for what was produced later."""
        posted, producer = portion.posted, self._producer()
        if posted is not None and producer is not None:
            left = producer.wait(posted, lambda: self._lifecycle.out_of_patience)
            if left or posted.failed:
                self._acknowledged()  # raises: it says what was not

    def _wait(self, portion: Portion, deadline: float) -> None:
        producer = self._producer()
        if portion.posted is not None and portion.posted.unknown and producer is not None:
            producer.wait(portion.posted, lambda: time.monotonic() > deadline or self._lifecycle.out_of_patience)

    def _ready(self) -> int:
        """How many portions, from the first on, may be committed."""
        return next((n for n, portion in enumerate(self._portions) if not portion.acknowledged), len(self._portions))

    def _ours(self, count: int, member: Membership | None = None) -> bool:
        now, member = time.monotonic(), member or self._consumer.membership()
        portions = [self._portions[number] for number in range(count)]
        return member.active and all(
            now - portion.served < self._within and member.continues(portion.member) for portion in portions
        )

    def _offsets(self, count: int) -> dict[Partition, TopicPartition]:
        offsets = dict(self._committed_since) if self._recommit else {}
        for number in range(count):
            offsets.update(self._portions[number].offsets)
        return offsets

    def _arrived(self, count: int) -> bool:
        """Whether the group has the offsets of the first portions, as the brokers say when asked after the commit was sent."""
        offsets = self._offsets(count)
        wanted = [TopicPartition(*partition) for partition in offsets]
        try:
            found = self._consumer.raw.committed(wanted, GIVING_AWAY) if wanted else []
        except KafkaException as error:
            log.info("whether offsets are committed is not known: %s", error)
            return False
        return all(p.error is None and p.offset >= offsets[p.topic, p.partition].offset for p in found)

    def _pop(self, count: int) -> None:
        """The first portions are done with, and so is the commit in flight."""
        self._in_flight = {}
        self._forget(count)

    def _forget(self, count: int) -> None:
        """The first portions are done with; a commit that is not answered may still arrive once more."""
        self._in_flight_portions = 0
        for _ in range(count):
            self._portions.popleft()

    def _drop(self, count: int) -> None:
        self._warn(sum(self._portions[number].size for number in range(count)))
        self._pop(count)

    @staticmethod
    def _warn(again: int) -> None:
        if again:
            log.warning("the group gave partitions away: up to %d messages that were handled are handled again", again)
