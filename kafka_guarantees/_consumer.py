"""The only user of ``confluent_kafka.Consumer``: batches of messages that are still ours, commits, and the way back.

Rules.
* One thread, no poll between the fetch of a batch and its end: a revocation is served in poll only, so that a batch in hand
  cannot lose a partition silently. What it can lose is the whole membership, which is compared before anything is committed
  (C03, C09): the broker itself does not check who owns the partition whose offset is committed (X02).
* A rebalance while messages are taken drops them, and the brokers say where to go on.
* After anything unusual the position is what the *group has committed*, asked of the brokers; never a memory of ours, never
  ``position()``. See ``Places``.
* A consumer lives for one run. Whatever ends the run closes it, and with it every doubt about positions (C01).
"""

from __future__ import annotations

import logging
import math
import re
import time
import weakref
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from ._client import Callbacks, Caller, Handle, Rarely
from ._collector import collector_rests
from ._offsets import Membership, Partition, membership, named, next_offsets
from .errors import (
    NO_TOPIC,
    REBALANCED,
    BrokerError,
    OffsetsLost,
    StoreUnavailable,
    UnsafeConfigError,
    broker_failure,
    describe,
    kafka_error,
    stops,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from ._lifecycle import Lifecycle
    from ._pace import Pace
    from ._places import Ask, Places
    from ._serialization import Reading
    from ._settings import Settings
    from .errors import KafkaGuaranteesError

log = logging.getLogger("kafka_guarantees")
T = TypeVar("T")

WITHIN = 1.0  # seconds that a question about offsets may take at first
LONGEST = 8.0  # seconds that it may take after it got no answer several times
PATIENT = 5  # how often that is asked while there are messages of other partitions in hand, until these wait for it
WAIT = 0.1  # seconds that a fetch waits for the first message: how late a stop is noticed
UNASSIGNED = 5.0  # seconds that a new member waits for partitions before having none counts as having nothing to do
CLOSING = 10.0  # seconds that leaving the group may take
GIVING_BACK = 1.0  # seconds of these for giving back the partitions, which needs no broker
LEADERLESS = 5.0  # seconds until is asked again for what could not be told
REFRESH = 3600.0  # seconds after which offsets that have not moved are committed again
REFRESH_AGAIN = 60.0  # seconds until that is tried again
UNKNOWN_TOPIC = 5.0  # seconds until a topic that the brokers do not know is an error: metadata takes a moment to spread
_SAFE = "Nothing was committed that was not handled."


def check_run(
    settings: Settings,
    lifecycle: Lifecycle,
    topics: Sequence[str],
    until_idle: float | None,
    *,
    dead_letter: str | None = None,
) -> None:
    """Refuse arguments that are not valid, before anything is connected."""
    lifecycle.check()
    if settings.group_id is None:
        raise UnsafeConfigError(
            "group.id",
            None,
            "a consumer group keeps the offsets of what is finished",
            "give group.id in the configuration",
        )
    if until_idle is not None and not (isinstance(until_idle, (int, float)) and until_idle >= 0):
        raise ValueError(f"until_idle is a number of seconds, or None, not {until_idle!r}")
    if isinstance(topics, str) or not topics or not all(isinstance(topic, str) and topic for topic in topics):
        raise TypeError(f"topics must be a list of topic names that is not empty, not {topics!r}")
    if dead_letter is not None and any(_includes(topic, dead_letter) for topic in topics):
        raise UnsafeConfigError(
            "dead_letter",
            dead_letter,
            f"it is among the topics of this run, {', '.join(topics)}: what is set aside would come again, for ever",
            "choose another topic for dead letters, or leave it out of what is consumed",
        )


def sent_twice(seconds: float, recent: Collection[float], backoff: float) -> bool:
    """Whether a commit took so long that librdkafka may have sent it again (M02).

    It does so after ``backoff`` seconds, more or less a fifth. The quickest of the recent commits tells what the network needs.
    """
    return seconds > min(recent, default=0.0) + backoff / 2


def _includes(topic: str, name: str) -> bool:
    """Whether a name of a topic, or a pattern of librdkafka, which is close enough to one of Python, is for this topic."""
    if not topic.startswith("^"):
        return topic == name
    with suppress(re.error):
        return re.search(topic, name) is not None
    return False


class Batch:
    """Messages of one fetch, in the order of their partitions, and the membership that they were fetched under."""

    __slots__ = ("fetched", "member", "messages", "metadata", "taken", "topic")

    def __init__(self, messages: Sequence[Message], metadata: bytes, fetched: float, topic: str | None = None) -> None:
        self.messages = messages
        self.topic = topic  # if they can be of one only
        self.belongs_to(metadata)
        self.taken = fetched
        self.fetched = fetched  # later: when the group was last served with the batch in hand

    def belongs_to(self, metadata: bytes) -> None:
        """Take over the membership that holds the batch."""
        self.metadata = metadata
        self.member = membership(metadata)

    @property
    def partitions(self) -> set[Partition]:
        """Where its messages come from."""
        return set(next_offsets(self.messages, self.topic))


class InFlight(Protocol):
    """What was handled, and is committed while the loop goes on. Nothing of it may be fetched again before its end is known."""

    @property
    def failed(self) -> bool:
        """Whether something of it was not committed."""

    @property
    def unfinished(self) -> bool:
        """Whether something of it is not committed."""

    def wait(self) -> None:
        """Wait for its end. Never raises."""

    def settle(self) -> Iterable[Partition]:
        """Wait for its end. Returns of which partitions something was not committed, and comes again."""


class Trailing(Protocol):
    """Commits that trail behind the handling of messages. ``Trail`` is one."""

    def follow(self, member: Membership) -> None: ...
    def settle(self) -> None: ...
    def answered(self, error: KafkaError | None, places: Iterable[TopicPartition]) -> None: ...
    def revoked(self, gone: AbstractSet[Partition]) -> None: ...
    def lost(self, gone: AbstractSet[Partition]) -> None: ...


class GroupConsumer(Handle):
    """A member of a consumer group, for one run.

    Args:
        settings: the resolved settings of the guarantee.
        lifecycle: of the client that runs.
        topics: names, or patterns that begin with ``^``.
        places: where it goes on.
        also: other topics that must exist.
        in_flight: what is committed beside the loop.
        trailing: there will be commits that nobody waits for: see ``send_commit``.
        strict: what the group has committed must never go back. A plain commit that librdkafka may have sent twice can arrive
            once more, later: then a new member takes over, whose group refuses what an old one sends (M02).

    Attributes:
        trail: hears of their answers, and of what happens meanwhile.
        idle: is called before a message is waited for.
    """

    def __init__(
        self,
        settings: Settings,
        lifecycle: Lifecycle,
        topics: Sequence[str],
        places: Places,
        *,
        also: Sequence[str] = (),
        in_flight: InFlight | None = None,
        trailing: bool = False,
        strict: bool = False,
    ) -> None:
        self.trail: Trailing | None = None
        self.idle: Callable[[], None] | None = None
        self._settings = settings
        self._in_flight = in_flight
        self._lifecycle = lifecycle
        self._topic = topics[0] if len(topics) == 1 and not topics[0].startswith("^") else None
        self._places = places
        self._within = WITHIN
        self._longest = max(WITHIN, min(LONGEST, settings.max_poll_interval / 4))
        self._brief = 0  # how often was asked while other messages waited: each PATIENT-th question may take longer
        self._callbacks = Callbacks()
        self._caller = Caller("kafka-guarantees-consumer", lifecycle.hands)
        self._owned: set[Partition] = set()
        self._waiting: set[Partition] = set()  # owned, but not fetched yet: nobody knows from where
        self._not_before: dict[Partition, float] = {}  # when that is asked again of some of these
        self._rarely = Rarely()
        self._resting: dict[Partition, float] = {}  # given back, and not fetched again before this time
        self._unplaced: set[Partition] = set()  # fetched, but from the wrong place: to be put right before the next message
        self._ends: dict[Partition, int] = {}  # where librdkafka saw the end of a partition, when it came to it
        self._reached: dict[Partition, int] = {}  # up to where messages were handed out
        self._given_away: set[Partition] = set()  # since the batch in hand was fetched
        self._strict = strict
        self._stray = ""  # why something that was committed may still be on its way
        self._rebalances = 0
        self._closing = self._joined = False
        self._rejoining_until = 0.0  # when there should be partitions again, after all were given away for a moment
        self._looked = 0  # what _rebalances was when shares() was asked last
        self._problem: Exception | None = None  # of a rebalance callback, raised after the C call
        self._kip_848 = settings.consumer.get("group.protocol") == "consumer"
        # KIP-345: such a member keeps its partitions while it restarts, and only close() knows not to leave the group
        self._static = "group.instance.id" in settings.consumer and not self._kip_848
        self._incremental = self._kip_848 or settings.consumer.get("partition.assignment.strategy") == "cooperative-sticky"
        # A group of KIP-848 expires each offset by the time of its commit, once it has no member; others by when that was
        self._refresh_at = math.inf  # until partitions are assigned
        self._unmoved: dict[Partition, int] = {}  # what was committed when that was looked at last
        super().__init__()
        self._config = {**settings.consumer, **self._callbacks.of(settings.callbacks), "enable.partition.eof": True}
        if trailing:
            self._config["on_commit"] = _weakly(self._on_commit)
        self._topics = list(topics)
        self.make(Consumer, self._config)
        try:
            self._require(topics)
            self._require(also, written=True)
            self._join()
        except KafkaException as exc:
            self.close()
            raise ValueError(
                f"topics {topics!r} are refused ({describe(kafka_error(exc))}). Nothing was consumed. Correct the names; one "
                "that begins with ^ is a regular expression."
            ) from exc
        except BaseException:
            self.close()
            raise

    # -- fetching -----------------------------------------------------------------------------------------------------

    def batches(self, pace: Pace, until_idle: float | None, reading: Reading) -> Iterator[Batch]:
        """Batches until the client is to stop, or nothing came for ``until_idle`` seconds at the end of every partition.

        Their headers are read before anybody else sees them (S04). Nothing of one is kept while the next one is fetched.
        """
        began = last = time.monotonic()
        while not self._lifecycle.stopping:
            batch = self.fetch(pace.size, pace.max_wait)
            if self.gone_silent:
                return
            if batch is not None:
                reading.begin(batch.messages)
                yield batch
                if until_idle is not None:
                    self._reached.update((p, o.offset) for p, o in next_offsets(batch.messages, batch.topic).items())
                batch.messages = ()  # free them now, even where somebody still has the batch
                reading.begin(())
            if until_idle is not None:
                if batch is not None or (not self._owned and time.monotonic() - began < UNASSIGNED) or not self._drained():
                    last = time.monotonic()
                elif time.monotonic() - last >= until_idle:
                    return

    def _drained(self) -> bool:
        """Whether every partition was read to its end, as librdkafka reports it: silence alone may be a slow broker."""
        if self._in_flight is not None and self._in_flight.unfinished:
            return False
        at_end = all(self._reached.get(p, 0) <= self._ends.get(p, -1) for p in self._owned)
        rejoining = time.monotonic() < self._rejoining_until
        if not at_end or self._unplaced or self._resting or rejoining:
            return False
        return self.membership().active or self._matches_nothing()

    def _matches_nothing(self) -> bool:
        """Whether there are only patterns, and no topic for any of them: then nobody joins the group."""
        if self._owned or not all(topic.startswith("^") and "[:" not in topic for topic in self._topics):
            return False  # or Python knows too little of the pattern
        try:
            known = self.raw.list_topics(timeout=1).topics
        except KafkaException:
            return False
        time.sleep(WAIT)  # it is asked with every fetch
        if any(_includes(pattern, name) for pattern in self._topics for name in known):
            return False
        if self._rarely("patterns"):
            log.warning("no topic matches %s", ", ".join(self._topics))
        return True

    def fetch(self, max_batch: int, max_wait: float = 0.0) -> Batch | None:
        """Wait a moment for a first message and take what is there with it. None: nothing came, or it was not ours.

        Args:
            max_batch: messages.
            max_wait: seconds that more messages are waited for, if there are fewer.

        Raises:
            OffsetsLost, AuthorizationError, BrokerError: see the class.
        """
        if not self._put_right():
            return None
        asked = time.monotonic()  # before anything is taken: a process may be stopped at any point from here on (M03)
        fetched, before, metadata = self._take(max_batch, WAIT, self.idle)
        messages = self._without_events(fetched)
        if max_wait and messages and not self._must_ask():
            self._gather(messages, max_batch, max_wait, before)
            metadata = None
        if self._rebalances != before:
            self.unplace(next_offsets(messages))  # C03: they may be of an assignment that is over
            messages = []
        if self._must_ask():
            messages = self._without_moved(messages)
        if not messages:
            return None
        batch = Batch(messages, metadata or self.raw.consumer_group_metadata(), asked, self._topic)
        if not batch.member.active:
            self.unplace(batch.partitions)  # thrown out just now; the next poll says that the partitions are lost
            return None
        self._given_away.clear()
        if self.trail is not None:
            self.trail.follow(batch.member)
        return batch

    def _must_ask(self) -> bool:
        """Whether the brokers are to be asked where to go on, or the group to be joined anew."""
        return bool(self._unplaced or self._stray or self._due())

    def _due(self) -> set[Partition]:
        """Those of which may be asked now where they begin."""
        now = time.monotonic()
        return {partition for partition in self._waiting if self._not_before.get(partition, 0.0) <= now}

    def _put_right(self) -> bool:
        """Do what is due before messages are taken. False: a call got no answer, in a client that stops."""
        self._wake()
        if self._in_flight is not None and self._in_flight.failed:
            self._find_places()
        if self._owned and time.monotonic() >= self._refresh_at and not self.gone_silent:
            self._refresh()
        return not self.gone_silent

    def _without_moved(self, messages: list[Message]) -> list[Message]:
        """Find out where partitions go on, and drop their messages: they come again."""
        moved = self._find_places(messages)
        if self.gone_silent:
            return []
        if self._stray and not (self._due() or self._unplaced):
            self.rejoin(self._stray)
            return []
        return [m for m in messages if (m.topic(), m.partition()) not in moved]

    def _take(
        self, max_batch: int, wait: float, idle: Callable[[], None] | None = None
    ) -> tuple[list[Message], int, bytes | None]:
        """What librdkafka has, how many rebalances had been when the first of it was taken, and the membership, if known."""
        metadata: bytes | None = None
        try:
            first = None if idle is None else self.raw.poll(0)
            if first is None:
                if idle is not None:
                    idle()
                    metadata = self.raw.consumer_group_metadata()  # now, since a message would wait for it for 0.1 ms
                before, began = self._rebalances, time.monotonic()
                first = self.raw.poll(wait)
                if self._rebalances != before or time.monotonic() - began > 2 * wait:  # or the process stood still (M03)
                    metadata = None
            fetched = [] if first is None else [first]
            before = self._rebalances  # poll() serves rebalances before it takes a message, consume() also in between
            if first is not None and max_batch > 1:
                with collector_rests:
                    fetched += self.raw.consume(max_batch - 1, 0)
        except KafkaException as exc:
            raise broker_failure(kafka_error(exc), "consuming", _SAFE, group=self._settings.group_id) from exc
        self._callbacks.raise_interrupt()
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem
        return fetched, before, metadata

    def _gather(self, messages: list[Message], max_batch: int, max_wait: float, before: int) -> None:
        """Wait until there are ``max_batch`` messages, for so many seconds; not after a rebalance, which drops them."""
        until = time.monotonic() + max_wait
        while len(messages) < max_batch and self._rebalances == before and self._problem is None:
            left = until - time.monotonic()
            if left <= 0 or self._lifecycle.stopping:
                break
            fetched, *_ = self._take(max_batch - len(messages), min(left, WAIT), self.idle)
            try:
                messages += self._without_events(fetched)
            except Exception as problem:  # noqa: BLE001 - for the next fetch: these messages must not be passed over
                self._problem = problem

    def _without_events(self, fetched: list[Message]) -> list[Message]:
        if not any(map(Message.error, fetched)):
            return fetched
        events = [(message, error) for message in fetched if (error := message.error()) is not None]
        for event, error in events:
            try:
                self._on_event(event, error)
            except Exception as problem:
                before = [message for message in fetched[: fetched.index(event)] if message.error() is None]
                if not before:
                    raise
                self._problem = problem  # for the next fetch: who sets the offset behind the event must not pass these over
                return before
        return [message for message in fetched if message.error() is None]

    def _on_event(self, event: Message, error: KafkaError) -> None:
        """An error that comes in place of a message: never data (C14)."""
        code = error.code()
        where = f"as a member of group {self._settings.group_id!r}" if event.topic() is None else f"topic {event.topic()!r}"
        where += "" if event.topic() is None or event.partition() is None else f" partition {event.partition()}"
        if code == KafkaError._PARTITION_EOF:
            self._ends[event.topic() or "", event.partition() or 0] = event.offset() or 0
            return
        if code == KafkaError._AUTO_OFFSET_RESET:
            raise OffsetsLost(
                f"{where}: {error.str()}. The group's position is not in the log any more: records were deleted before they "
                "were handled, or the topic was made anew. Nothing was committed. Decide where to go on, and set it "
                f"{self._places.how_to_set}."
            )
        if code in NO_TOPIC and event.topic() in self._topics:
            self._require([event.topic() or ""])
        elif code in NO_TOPIC:  # one that a pattern has found, and that is gone
            if self._rarely(event.topic()):
                log.warning("consuming %s: %s", where, describe(error))
        elif stops(error):
            at = "" if event.offset() is None or (event.offset() or 0) < 0 else f" at offset {event.offset()}"
            doing = f"consuming {where}" if event.topic() is None else f"consuming {where}{at}"
            failure = broker_failure(error, doing, _SAFE, topic=event.topic(), group=self._settings.group_id)
            raise failure from KafkaException(error)
        elif code == KafkaError._MAX_POLL_EXCEEDED:
            log.error(
                "the handler took longer than max.poll.interval.ms (%.0f s): the group gave the partitions to others, and "
                "what was in hand comes again, unless that is at most once. Say keep_alive=True; or make the interval longer, "
                "or batches smaller (max_batch).",
                self._settings.max_poll_interval,
            )
        else:
            log.warning("consuming %s: %s", where, describe(error))

    def _require(self, topics: Sequence[str], *, written: bool = False) -> None:
        """A topic that does not exist is an error, not a silence (C19)."""
        for topic in topics:
            if topic.startswith("^"):
                self._topic_error(topic)  # whether a broker answers at all
                continue
            deadline = time.monotonic() + UNKNOWN_TOPIC
            while (error := self._topic_error(topic)) is not None:
                if stops(error):
                    doing = f"{'writing to' if written else 'consuming'} topic {topic!r}"
                    failure = broker_failure(error, doing, _SAFE, **{"output" if written else "topic": topic})
                    raise failure from KafkaException(error)
                if error.code() not in NO_TOPIC:
                    log.warning("asking for topic %r: %s", topic, describe(error))
                    break  # it exists, and its brokers are in trouble: that passes
                if time.monotonic() > deadline:
                    raise BrokerError(
                        f"topic {topic!r} does not exist ({describe(error)}). {_SAFE} Create it, or correct the name."
                    )
                if self._lifecycle.stopping:
                    return
                time.sleep(WAIT)

    def _topic_error(self, topic: str) -> KafkaError | None:
        try:
            metadata = self.raw.list_topics(topic, timeout=1).topics[topic]
        except KafkaException as exc:
            if self._lifecycle.stopping:
                return None
            if not self._joined:  # later it would take a message that nobody gets, or serve a rebalance with a batch in hand
                self.raw.poll(0)  # serves error_cb
                self._callbacks.raise_shut_out()
            log.warning("asking for topic %r: %s", topic, describe(kafka_error(exc)))
            return None  # no broker answers: that is not the topic's fault, and joining the group waits for one
        else:
            error: KafkaError | None = metadata.error
            return error

    def _forget(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self._ends.pop(partition, None)
            self._reached.pop(partition, None)

    # -- still ours? --------------------------------------------------------------------------------------------------

    @property
    def gone_silent(self) -> bool:
        """Whether a call was left without an answer, in a client that stops. Another one would wait for its end (Y01)."""
        return self._caller.left

    def membership(self) -> Membership:
        """The membership at this moment."""
        return membership(self.raw.consumer_group_metadata())

    def still_ours(self, batch: Batch, *, within: float) -> bool:
        """Whether this member still owns the partitions of a batch that it fetched with its last poll.

        Args:
            batch: what was fetched.
            within: seconds. A process that was stopped for longer than the session learns only from its next heartbeat that
                it was thrown out, and may get here before the answer. So the clock is asked too.
        """
        return time.monotonic() - batch.fetched < within and self.membership().continues(batch.member)

    def shares(self) -> bool:
        """Whether a rebalance, since this was last asked, has left partitions of its topics to others. False: nobody knows."""
        if self._rebalances == self._looked:
            return False
        try:
            known = self.raw.list_topics(timeout=1).topics
        except KafkaException:
            return False
        self._looked = self._rebalances
        return len(self._owned) < sum(len(known[topic].partitions) for topic in {t for t, _ in self._owned} if topic in known)

    # -- waiting ------------------------------------------------------------------------------------------------------

    def keep_alive(self, batch: Batch, seconds: float) -> None:
        """Wait with ``batch`` in hand, and stay a member: everything is paused, and the group served.

        Returns at once in a client that is to stop. A rebalance meanwhile is served: see ``serve``.
        """
        until = time.monotonic() + seconds
        try:
            while not self._lifecycle.stopping:  # once at least: attempts without a pause must not cost the membership
                self.serve(batch, max(0.0, min(until - time.monotonic(), WAIT)))
                if time.monotonic() >= until:
                    return
        finally:
            self.resume()

    def serve(self, batch: Batch, wait: float = 0) -> None:
        """Serve the group for a moment, with ``batch`` in hand. Everything is paused, until ``resume()``.

        Where a rebalance takes a partition of the batch away, if only for a moment, the batch is not ``still_ours`` after it;
        else it is held under the new generation.
        """
        self.raw.pause([TopicPartition(*partition) for partition in self._owned])  # the new ones too
        asked = time.monotonic()
        fetched, *_ = self._take(1, wait)
        self.unplace(next_offsets(self._without_events(fetched)))
        if batch.partitions & self._given_away:
            batch.fetched = -math.inf  # for good, also if it is waited for again
        elif batch.fetched > -math.inf:
            batch.fetched = asked
            metadata = self.raw.consumer_group_metadata()
            if membership(metadata).continues(batch.member):
                batch.belongs_to(metadata)

    def serve_beside(self, batch: Batch) -> None:
        """``serve`` while a handler works in another thread. What goes wrong is not its fault: the next fetch raises it."""
        try:
            self.serve(batch)
        except Exception as problem:  # noqa: BLE001 - as it says
            self._problem = problem

    def resume(self) -> None:
        """Fetch again, after ``serve()`` or ``serve_beside()``."""
        self.raw.resume([TopicPartition(*partition) for partition in self._owned - self._resting.keys()])

    def rest(self, messages: Iterable[Message], seconds: float) -> None:
        """Give messages back, and fetch their partitions again, from where the group has committed them, after some time."""
        self._rest(next_offsets(messages).keys() & self._owned, seconds)

    def _rest(self, partitions: Collection[Partition], seconds: float) -> None:
        self.raw.pause([TopicPartition(*partition) for partition in partitions])
        self._resting.update(dict.fromkeys(partitions, time.monotonic() + seconds))

    def _wake(self) -> None:
        """Go on with the partitions whose rest is over."""
        if self._resting:
            now = time.monotonic()
            due = {partition for partition, until in self._resting.items() if until <= now}
            self.raw.resume([TopicPartition(*partition) for partition in due])
            self._unplaced |= due
            for partition in due:
                del self._resting[partition]

    # -- committing ---------------------------------------------------------------------------------------------------

    def commit(self, offsets: Iterable[TopicPartition]) -> None:
        """Commit synchronously, and check the answer for every partition (C06). What was deleted with its topic is left out.

        Raises:
            BrokerError: at least one was not committed, or that is unknown.
            AuthorizationError: no right to.
        """
        places = list(offsets)
        try:
            self._commit(places)
        except KafkaException as exc:
            error, left = kafka_error(exc), places
            if error.code() in NO_TOPIC and not self._strict:
                deleted = {topic for topic in {place.topic for place in places} if self._deleted(topic)}
                left = [place for place in places if place.topic not in deleted]
            if len(left) == len(places):
                raise self._not_committed(error, places) from exc
            if left:
                self.commit(left)

    def send_commit(self, offsets: list[TopicPartition]) -> None:
        """Commit, and do not wait: a later poll tells ``trail`` of the answer.

        Raises:
            BrokerError: it was not sent.
        """
        try:
            self.raw.commit(offsets=offsets, asynchronous=True)
        except KafkaException as exc:
            raise self._not_committed(kafka_error(exc), offsets) from exc

    def check_commit(self, error: KafkaError | None, answer: list[TopicPartition]) -> None:
        """Raise, as ``commit`` does, what an answer says."""
        try:
            if error is not None:
                raise KafkaException(error)  # noqa: TRY301 - the same as for a partition
            self._check_commit(answer)
        except KafkaException as exc:
            raise self._not_committed(kafka_error(exc), answer) from exc

    def _not_committed(self, error: KafkaError, places: Iterable[TopicPartition]) -> KafkaGuaranteesError:
        return broker_failure(
            error,
            "committing offsets",
            "They may or may not be committed.",
            topic={place.topic for place in places},
            group=self._settings.group_id,
        )

    def _commit(self, offsets: list[TopicPartition]) -> None:
        self._check_commit(
            self._caller.call(
                lambda: self.raw.commit(offsets=offsets, asynchronous=False), self._given_up, "committing offsets"
            )
        )

    def _check_commit(self, answer: list[TopicPartition]) -> None:
        for partition in answer:
            if partition.error is not None:
                raise KafkaException(partition.error)
        self._places.note(answer)

    def _deleted(self, topic: str) -> bool:
        """Whether the brokers know that there is no such topic, of which nothing can be committed any more."""
        error = self._topic_error(topic)
        return error is not None and error.code() in NO_TOPIC

    def _commit_places(self, places: list[TopicPartition], usual: float = 0.0) -> None:
        """Commit where partitions begin, by a decision of ours, or where they are; ``usual``: seconds that an answer takes."""
        began = time.monotonic()
        try:
            self._commit(places)
        except BaseException as exc:
            refused = isinstance(exc, KafkaException) and kafka_error(exc).code() in REBALANCED
            if self._strict and not refused:
                self._stray = "it is not known whether offsets were committed"
            raise
        finally:
            seconds = time.monotonic() - began
            if self._strict and sent_twice(seconds, (usual,), self._settings.retry_backoff):
                self._stray = f"committing offsets took {seconds:.1f} s: the first try may still be on its way"

    def _refresh(self) -> None:
        """Commit once more where nothing was committed for long: else it expires, and what was handled comes again."""
        self._settle_all()
        began, member = time.monotonic(), self.membership()
        self._refresh_at = began + REFRESH
        try:
            ask: Ask = partial(self._asked, limit=WITHIN)
            places = [place for place in self._places.committed(self._owned - self._waiting, ask) if place.offset >= 0]
            quiet = [p for p in places if self._unmoved.get((p.topic, p.partition), p.offset) == p.offset]
            usual = time.monotonic() - began
            if usual > self._settings.session_timeout / 2 or not self.membership().continues(member):
                self._refresh_at = began + WITHIN  # M03: somebody else may be further on by now
                return
            if quiet:
                self._commit_places(quiet, usual)
            self._unmoved = {(place.topic, place.partition): place.offset for place in places}
        except (KafkaException, BrokerError) as exc:
            self._refresh_at = time.monotonic() + REFRESH_AGAIN
            log.info("offsets that have not moved were not committed again: %s", exc)

    def _given_up(self) -> bool:
        return self._lifecycle.out_of_patience

    # -- going back ---------------------------------------------------------------------------------------------------

    def rewind(self, messages: Iterable[Message]) -> None:
        """Fetch the partitions of these messages again, from where the group has committed them.

        Where the brokers do not answer, that is asked again with the next fetch; no message of theirs comes before.

        Raises:
            OffsetsLost, AuthorizationError: see the class.
        """
        self.unplace(next_offsets(messages))
        if not self._lifecycle.stopping:
            self._find_places()

    def unplace(self, partitions: Iterable[Partition]) -> None:
        """Have these partitions fetched again with the next fetch, like ``rewind``, but ask no broker now."""
        self._unplaced.update(partitions)

    def _find_places(self, messages: Iterable[Message] = ()) -> set[Partition]:
        """Returns the partitions that go on elsewhere, now or once the brokers answer: what was fetched of them comes again.

        Args:
            messages: in hand. Those of other partitions do not wait for long.
        """
        self._settle_all()
        moved = set(self._unplaced)
        busy = any((message.topic(), message.partition()) not in moved for message in messages)
        limit = math.inf
        if busy:  # they wait for a long answer now and then only, and never so long that nobody knows whose they are (M03)
            self._brief += 1
            limit = WITHIN if self._brief % PATIENT else max(WITHIN, self._settings.session_timeout / 4)
        ask: Ask = partial(self._asked, limit=limit)
        try:
            if due := self._due():
                moved |= self._fetch_waiting(due, ask)
            unplaced = (self._unplaced & self._owned) - self._waiting
            places = self._places.of(unplaced, ask, self._commit_places)
            for place in places:
                self.raw.seek(place)
            if unknown := self._without_place(unplaced, places):
                self._rest(unknown, LEADERLESS)
            self._within = WITHIN
            self._forget(moved)
            self._unplaced.clear()
        except KafkaException as exc:
            error = kafka_error(exc)
            if stops(error):
                names = {"topic": {topic for topic, _ in self._owned}, "group": self._settings.group_id}
                raise broker_failure(error, "asking for offsets, or committing where to begin,", _SAFE, **names) from exc
            log.info("where to go on is not known yet: %s", describe(error))
        except (StoreUnavailable, BrokerError) as exc:
            log.warning("where to go on is not known yet: %s", exc)
        return moved

    def _settle_all(self) -> None:
        """Wait for the end of what is on its way: the brokers would name a place before it."""
        if self._in_flight is not None:
            self.unplace(self._in_flight.settle())
        if self.trail is not None:
            self.trail.settle()

    def _fetch_waiting(self, due: set[Partition], ask: Ask) -> set[Partition]:
        """Begin to fetch those of which it is known where. Returns what goes on elsewhere by that."""
        places = self._places.of(due, ask, self._commit_places)
        unknown = self._without_place(due, places)
        others: set[Partition] = set()
        if places and self._incremental:
            self.raw.incremental_assign(places)
        elif places:
            others = self._owned - self._waiting  # the eager protocol knows only the whole
            self._unplaced |= others
            places += self._places.of(others, ask, self._commit_places)
            unknown = self._without_place(due | others, places)
            self.raw.assign(places)
            self._unplaced.clear()
        self._waiting = (self._waiting - due) | unknown
        self._not_before.update(dict.fromkeys(unknown, time.monotonic() + LEADERLESS))
        return others

    def _without_place(self, asked: set[Partition], places: Iterable[TopicPartition]) -> set[Partition]:
        """Those of which it is not known where to go on; they must not hold up the others."""
        unknown = asked - {(place.topic, place.partition) for place in places}
        if unknown and self._rarely(named(unknown)):
            log.warning("%s: where to go on is not known: it has no leader, or was deleted. Others go on.", named(unknown))
        return unknown

    def _asked(self, question: Callable[[Consumer, float], T], *, limit: float) -> T:
        """What the brokers answer. The limit grows while they do not: they may be far away, or have much to do."""
        within = min(self._within, limit)
        try:
            return self._caller.call(lambda: question(self.raw, within), self._given_up, "asking where to go on")
        except KafkaException:
            if within == self._within:
                self._within = min(2 * within, self._longest)
            raise

    def _asked_in_callback(self, question: Callable[[Consumer, float], T]) -> T:
        """The same where no other thread may be waited for. Whoever gets no answer asks again with the next fetch."""
        return question(self.raw, WITHIN)

    # -- rebalances: never raise in a callback (C08) -------------------------------------------------------------------

    def _on_assign(self, raw: Consumer, partitions: list[TopicPartition]) -> None:
        try:
            self._settle()
            self._rebalances += 1
            new = {(p.topic, p.partition) for p in partitions}
            self._owned |= new
            self._rejoining_until = 0.0
            if new and self._kip_848 and self._places.stored is None:
                self._refresh_at = 0.0
            log.info("group %r has assigned %s", self._settings.group_id, named(new))
            if self._closing:
                return  # revoked in the next moment: confluent-kafka accepts them
            places = self._placed(new)
            (raw.incremental_assign if self._incremental else raw.assign)(places)
        except BaseException as problem:  # noqa: BLE001 - raised after the C call
            self._keep(problem)

    def _placed(self, partitions: set[Partition]) -> list[TopicPartition]:
        """Where the group has committed these partitions.

        Those without a committed offset wait for the next fetch: their start is committed, by a call of another thread, which
        would wait for the end of this callback.
        """
        try:
            committed = self._places.committed(partitions, self._asked_in_callback)
        except KafkaException as exc:
            log.info("where to begin is not known yet: %s", describe(kafka_error(exc)))
            committed = []
        except (StoreUnavailable, BrokerError) as exc:
            log.warning("where to begin is not known yet: %s", exc)
            committed = []
        placed = [place for place in committed if place.offset >= 0]
        self._waiting |= partitions - {(place.topic, place.partition) for place in placed}
        return placed

    def _on_revoke(self, raw: Consumer, partitions: list[TopicPartition]) -> None:
        if self.trail is not None:
            try:
                self.trail.revoked({(p.topic, p.partition) for p in partitions})
            except BaseException as problem:  # noqa: BLE001 - raised after the C call
                self._keep(problem)
        self._gone(raw, partitions)

    def _gone(self, raw: Consumer, partitions: list[TopicPartition], *, lost: bool = False) -> None:
        try:
            self._settle()  # before the partitions are given away
            self._rebalances += 1
            gone = {(p.topic, p.partition) for p in partitions}
            log.info("group %r has %s %s", self._settings.group_id, "given away" if lost else "revoked", named(gone))
            if lost and self.trail is not None:
                self.trail.lost(gone)
            raw.resume(partitions)  # librdkafka keeps a pause, and would read nothing once they are assigned again
            if self._incremental and self._waiting & gone:
                raw.incremental_unassign([TopicPartition(*partition) for partition in gone - self._waiting])
            self._owned -= gone
            self._given_away |= gone
            if lost or not self._incremental:  # it joins again, and the classic group waits for its slowest member
                self._rejoining_until = time.monotonic() + (UNASSIGNED if self._kip_848 else self._settings.max_poll_interval)
            self._waiting -= gone
            self._unplaced -= gone
            self._not_before = {partition: at for partition, at in self._not_before.items() if partition not in gone}
            self._resting = {partition: until for partition, until in self._resting.items() if partition not in gone}
            self._forget(gone)
        except BaseException as problem:  # noqa: BLE001 - raised after the C call
            self._keep(problem)

    def _on_lost(self, raw: Consumer, partitions: list[TopicPartition]) -> None:
        # nothing is committed for what was lost (C07); nothing is in hand, since no poll happens with a batch in hand
        self._gone(raw, partitions, lost=True)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        try:
            if self.trail is not None:
                self.trail.answered(error, partitions)
        except BaseException as problem:  # noqa: BLE001 - raised after the C call
            self._keep(problem)

    def _settle(self) -> None:
        """Wait for what is in flight, whatever a signal handler raises meanwhile: nothing is given away before that."""
        while self._in_flight is not None:
            try:
                self._in_flight.wait()
            except BaseException as interrupt:  # noqa: BLE001 - raised after the C call
                self._callbacks.interrupt(interrupt)
            else:
                return

    def _keep(self, problem: BaseException) -> None:
        if isinstance(problem, Exception):
            self._problem = problem
        else:
            self._callbacks.interrupt(problem)

    # -- joining and leaving ------------------------------------------------------------------------------------------

    def _join(self) -> None:
        log.info("joining group %r for %s", self._settings.group_id, ", ".join(self._topics))
        self._joined = True
        heard = {"on_assign": self._on_assign, "on_revoke": self._on_revoke, "on_lost": self._on_lost}
        callbacks = {name: _weakly(method) for name, method in heard.items()}
        # beside the main thread for the same reason as in make()
        self._caller.call(lambda: self.raw.subscribe(self._topics, **callbacks), self._given_up, "subscribing")

    def rejoin(self, why: str) -> None:
        """Have a new member of the group take over, which goes on from what is committed. What is in hand is given back."""
        log.info("a new member of the group takes over, because %s", why)
        self._leave()
        self._caller.end()
        self._caller = Caller("kafka-guarantees-consumer", self._lifecycle.hands)
        for partitions in (
            self._owned,
            self._waiting,
            self._not_before,
            self._resting,
            self._unplaced,
            self._ends,
            self._reached,
        ):
            partitions.clear()
        self._rebalances += 1
        self._closing, self._stray = False, ""
        self.make(Consumer, self._config)
        self._join()

    def close(self) -> None:
        """Leave the group, and let the client go. Waits for that CLOSING seconds, or STOP_GRACE in a client that stops."""
        collector_rests.over()
        if self._lifecycle.forked:
            return  # the parent is still a member
        try:
            self._leave()
        finally:
            self._caller.end()

    def _leave(self) -> None:
        if self.raw is None:
            return  # what interrupted a rejoin is not to be hidden
        log.info("leaving group %r", self._settings.group_id)
        deadline = time.monotonic() + CLOSING
        self._closing = True

        def given_up() -> bool:
            return time.monotonic() > deadline or self._given_up()

        try:
            if not self._static:
                self._give_back(given_up)
            self._caller.call(self.raw.close, given_up, "leaving the group")
        except (BrokerError, KafkaException, RuntimeError) as exc:
            log.warning("%s The group gives the partitions to others when the session ends.", exc)
        finally:
            self.let_go()

    def _give_back(self, given_up: Callable[[], bool]) -> None:
        """Have the partitions revoked by a poll, and not inside of ``raw.close()``.

        There librdkafka 2.16.0 may end the group before the revocation is answered, and then never answers: confluent-kafka
        waits for that with the GIL, so that the whole process stands still (seen after max.poll.interval.ms had passed).
        """
        self._caller.call(self.raw.unsubscribe, given_up, "leaving the group")
        until = time.monotonic() + GIVING_BACK
        with suppress(KafkaException):
            self.raw.poll(0)
            while self._owned and time.monotonic() < until:
                self.raw.poll(WAIT / 10)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A callback that does not keep its consumer alive.

    An exception out of a signal handler may come between any two steps, and leave a consumer that nobody closes. In a cycle
    with the C client it would stay a member of the group, which nobody serves, until the garbage collector comes.
    """
    held = weakref.WeakMethod(method)

    def call(*arguments: object) -> None:
        found = held()
        if found is not None:
            found(*arguments)

    return call
