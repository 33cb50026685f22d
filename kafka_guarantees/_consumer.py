"""A member of a consumer group, for one run: batches of messages that are still ours, commits, and rebalances.

Rules.
* One thread. Between the fetch of a batch and its end only ``serve()`` polls. Partitions are taken away in polls only, and a
  batch that loses one there is not ours any more: none is lost silently. What can be is the whole membership, which is compared
  before anything is committed (C03, C09): the broker itself does not check who owns the partition whose offset is committed
  (X02).
* A rebalance while messages are taken drops them, and the brokers say where to go on.
* After anything unusual the position is what the *group has committed*, asked of the brokers. See ``Positions``.
* A consumer lives for one run. Whatever ends the run closes it, and with it every doubt about positions (C01).
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from ._assignment import Assignment
from ._batch import Batch
from ._client import Callbacks, weakly
from ._collector import collector_rests
from ._events import Events
from ._group_client import SAFE, GroupClient
from ._offset_expiry import Refresh
from ._offsets import Membership, Partition, membership, named, next_offsets, not_before, with_epoch
from ._positions import Positions
from ._topics import Topics, own_dead_letters
from ._vanished import Vanished
from .errors import NO_TOPIC, NOT_TAKEN, FencedError, broker_failure, describe, kafka_error, unreleased

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from ._in_flight import InFlight
    from ._lifecycle import Lifecycle
    from ._pace import Pace
    from ._places import Places
    from ._serialization import Reading
    from ._settings import Settings
    from .errors import KafkaGuaranteesError

log = logging.getLogger("kafka_guarantees")

WAIT = 0.1  # seconds that a fetch waits for the first message: how late a stop is noticed
OUTDATED = 2.0  # seconds in which a former coordinator may hear that it is none
RELEASED = 1.0  # seconds until a new member asks again for a group.instance.id that the last one has not given back
UNHEARD = 30.0  # seconds without an answer of the group, until that is said, and said again
UNASSIGNED = 5.0  # seconds that a new member waits for partitions before having none counts as having nothing to do
RECENT = 3  # commits by which the next one is judged


def sent_twice(seconds: float, recent: Collection[float], backoff: float) -> bool:
    """Whether a commit took so long that librdkafka may have sent it again (M02).

    It does so after ``backoff`` seconds, more or less a fifth. The quickest of the recent commits tells what the network needs.
    """
    return seconds > min(recent, default=0.0) + backoff / 2


class Trailing(Protocol):
    """Commits that trail behind the handling of messages. ``Trail`` is one."""

    def follow(self, member: Membership) -> None: ...
    def settle(self) -> None: ...
    def answered(self, error: KafkaError | None, places: Iterable[TopicPartition]) -> None: ...
    def revoked(self, gone: AbstractSet[Partition]) -> None: ...
    def lost(self, gone: AbstractSet[Partition]) -> None: ...


class GroupConsumer:
    """A member of a consumer group, for one run.

    Args:
        settings: the resolved settings of the guarantee.
        lifecycle: of the client that runs.
        topics: names, or patterns that begin with ``^``.
        places: where it goes on.
        also: other topics that must exist.
        in_flight: what is committed beside the loop.
        strict: what the group has committed must never go back. A plain commit that librdkafka may have sent twice can arrive
            once more, later: then a new member takes over, whose group refuses what an old one sends (M02).

    Attributes:
        trail: hears of the answers to commits, and of what happens meanwhile.
        idle: is called before a message is waited for.
        recent: how long the last calls of ``commit`` took, in seconds.
        stray: why something that was committed may still be on its way. Where ``strict``, a new member takes over with the
            next fetch, before another message is handed out.
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
        strict: bool = False,
    ) -> None:
        self.trail: Trailing | None = None
        self.idle: Callable[[], None] = lambda: None
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.stray = ""
        self._settings = settings
        self._in_flight = in_flight
        self._lifecycle = lifecycle
        self._topic = topics[0] if len(topics) == 1 and not topics[0].startswith("^") else None
        self._places = places
        self._callbacks = Callbacks()
        self._strict = strict
        self._done = ""  # why there are no more batches, where nobody stops
        self._took_over = False  # whether a member before this one has left the group
        self._fenced_from = 0.0  # an id that is not given back by then, once it was asked for, is somebody else's
        self._told = False  # that such an id is asked for again
        self._heard = time.monotonic()  # when the group was heard last, or that it is not was said
        self._looked = 0  # how many rebalances there had been when shares() was asked last
        self._resumed = 0  # the same, when all that does not rest was resumed last
        self._over = False  # librdkafka has a fatal error, and commits nothing any more; the next poll tells which
        self._problem: Exception | None = None  # of a rebalance callback, raised after the C call
        config = {**settings.consumer, **self._callbacks.of(settings.callbacks), "enable.partition.eof": True}
        if not strict:  # there will be commits that nobody waits for: see ``send_commit``
            config["on_commit"] = weakly(self._on_commit)
        self._assignment = Assignment()
        self._client = GroupClient(settings, lifecycle, self._assignment, config)
        self._topics = Topics(topics, self._client, self._callbacks, lifecycle)
        self._written = frozenset(also)
        self._events = Events(settings, self._assignment, self._topics, places)
        self._positions = Positions(settings, self._client, self._assignment, places)
        self._refresh = Refresh(places, settings.session_timeout / 2)
        self._vanished = Vanished(settings, places)
        places.disclaim()
        try:
            self._topics.require(topics)
            self._topics.require(also, written=True)
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

    @property
    def raw(self) -> Any:
        """The C consumer. None once it has left."""
        return self._client.raw

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
            if self._assignment.owned:
                self._heard = time.monotonic()
            elif batch is None:
                self._topics.nothing_comes()
                self._say_unheard()
            if batch is not None and self._in_flight is not None:
                # librdkafka 2.16 gives a portion once more, though nobody sought it, where the group stops its partition, which
                # stays, in the moment in which that is given out: it goes on where it has noted that the client is
                batch.messages = self.without_repeats(batch, self._assignment.reached)
            if batch is not None and batch.messages:
                # before it is handled: what is fetched again of it goes on elsewhere, and that is not reached
                self._assignment.reach({partition: span.behind.offset for partition, span in batch.spans.items()})
                reading.begin(batch.messages)
                yield batch
                batch.messages = ()  # free them now, even where somebody still has the batch
                reading.begin(())
            if until_idle is not None:
                joining = not self._assignment.owned and time.monotonic() - began < UNASSIGNED
                if batch is not None or joining or not self._drained():
                    last = time.monotonic()
                elif time.monotonic() - last >= until_idle:
                    self._pass_markers()
                    self._done = f"nothing came for {until_idle:g} s"
                    return

    def _say_unheard(self) -> None:
        """Say now and then that the group does not let this member in. librdkafka waits without a word, perhaps for ever."""
        now, member = time.monotonic(), self.membership()
        if member.active and member.generation > 0:  # with KIP-848 it is 0 before the first answer
            self._heard = now
        elif now - self._heard > UNHEARD:
            self._heard = now
            log.warning(
                "group %r has not let this member in for %.0f s: nothing is consumed meanwhile",
                self._settings.group_id,
                UNHEARD,
            )

    @staticmethod
    def without_repeats(batch: Batch, marks: Mapping[Partition, int], but: str = "") -> Sequence[Message]:
        """The messages of a batch that are not below these marks, and a log line where others are left out (M09).

        Args:
            batch: what was fetched.
            marks: by partition.
            but: ends the log line.
        """
        rest = not_before(batch.messages, marks, batch.spans) if marks else batch.messages
        if len(rest) < len(batch.messages):
            left_out = len(batch.messages) - len(rest)
            log.warning("%d messages are left out: this client has had them in hand before (M09)%s", left_out, but)
        return rest

    def _drained(self) -> bool:
        """Whether every partition was read to its end, as librdkafka reports it: silence alone may be a slow broker."""
        if self._in_flight is not None and self._in_flight.unfinished:
            return False
        if not self._assignment.at_end(time.monotonic()):
            return False
        # the classic protocols assign to each member, if nothing, once the group's leader has answered
        assigned = self._client.kip_848 or self._assignment.assigned
        return (assigned and self.membership().active) or (not self._assignment.owned and self._topics.match_nothing())

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
        try:
            fetched, before, metadata = self._take(max_batch, WAIT, self.idle)
            messages = self._without_events(fetched)
        except FencedError as exc:
            self._ask_again(exc)
            return None
        if max_wait and messages and not self._must_ask():
            self._gather(messages, max_batch, max_wait, before)
            metadata = None
        if self._assignment.rebalances != before:
            self.unplace(next_offsets(messages))  # C03: they may be of an assignment that is over
            messages = []
        if messages and self._assignment.resting:
            messages = self._without_resting(messages)
        if self._must_ask():
            messages = self._without_moved(messages)
        if not messages:
            return None
        batch = Batch(messages, metadata or self.raw.consumer_group_metadata(), asked, self._topic)
        if not batch.member.active:
            self.unplace(batch.partitions)  # thrown out just now; the next poll says that the partitions are lost
            return None
        self._assignment.given_away.clear()
        if self.trail is not None:
            self.trail.follow(batch.member)
        return batch

    def _ask_again(self, fenced: FencedError) -> None:
        """Have another member ask for the ``group.instance.id``, where the one before may not have given it back.

        With KIP-848 the brokers refuse it to a new member until the session of the last one is over, which was killed, or left
        without being heard. Nothing is consumed meanwhile. Who has it after that is alive: that is raised.
        """
        if not unreleased(fenced):
            raise fenced
        if not self._told:  # the brokers may have been away until now
            self._fenced_from = self._until_released()
        if time.monotonic() > self._fenced_from:
            raise fenced
        say, self._told = (log.info if self._told else log.warning), True
        say("%s It is asked for again for %.0f s.", fenced, self._fenced_from - time.monotonic())
        until = time.monotonic() + RELEASED
        while time.monotonic() < until and not self._lifecycle.stopping:
            time.sleep(WAIT)
        if not self._lifecycle.stopping:
            self._join_anew(logging.INFO)  # it had no partitions

    def _until_released(self) -> float:
        """When the session of a member is over that was heard of last a moment ago."""
        return time.monotonic() + self._settings.session_timeout + RELEASED

    def _must_ask(self) -> bool:
        """Whether the brokers are to be asked where to go on, or the group to be joined anew."""
        return bool(self.stray) or self._assignment.unsettled(time.monotonic())

    def _put_right(self) -> bool:
        """Do what is due before messages are taken. False: a call got no answer, in a client that stops."""
        self._positions.wake()
        if self._resumed != self._assignment.rebalances and not self.gone_silent:
            # librdkafka 2.16 drops a resume() in whose moment it pauses for a rebalance, and says that all went well
            self._resumed = self._assignment.rebalances
            self.resume()
        if self._in_flight is not None and self._in_flight.failed:
            self._find_places()
        if self._assignment.owned and self._refresh.due and not self.gone_silent:
            self._settle_all()
            self._refresh.commit(self._assignment.fetched, self.membership, self._positions.asked, self._commit)
        if self._refresh.markers_due and not self.gone_silent:
            self._pass_markers()
        if self._vanished.due and not self.gone_silent:
            quiet = self._assignment.fetched & self._assignment.awake
            self.unplace(self._vanished.look(self.raw, quiet, self._positions.asked))
        return not self.gone_silent

    def _pass_markers(self) -> None:
        """Commit the ends of partitions whose last offsets are no messages, before retention takes these."""
        if behind := self._refresh.behind(self._assignment.ends):
            self._settle_all()
            self._refresh.pass_markers(behind, self.membership, self._positions.asked, self._commit)

    def _without_moved(self, messages: list[Message]) -> list[Message]:
        """Find out where partitions go on, and drop their messages: they come again."""
        moved = self._find_places(messages)
        if self.gone_silent:
            return []
        now = time.monotonic()
        outdated = now - self._positions.outdated_since > OUTDATED
        if outdated:  # to join is written, which a former coordinator cannot: a new member hears what is true
            self.stray = self.stray or "the group says less than this member has committed, or may have"
        if self.stray:  # what is dropped comes again: nothing is handed out before another member has taken over
            if (outdated or not self._assignment.unsettled(now)) and not self._lifecycle.stopping:
                self.rejoin(self.stray)
            return []
        return [m for m in messages if (m.topic(), m.partition()) not in moved]

    def _without_resting(self, messages: list[Message]) -> list[Message]:
        """Drop what comes of partitions that rest: librdkafka drops a pause() in such a moment, too. They are sought again."""
        come = next_offsets(messages).keys() & self._assignment.resting
        if come:
            self.raw.pause([TopicPartition(*partition) for partition in come])
        return [m for m in messages if (m.topic(), m.partition()) not in come]

    def _take(
        self, max_batch: int, wait: float, idle: Callable[[], None] | None = None
    ) -> tuple[list[Message], int, bytes | None]:
        """What librdkafka has, how many rebalances had been when the first of it was taken, and the membership, if known."""
        metadata: bytes | None = None
        assignment = self._assignment
        if self._in_flight is not None:
            self._in_flight.serve()
        try:
            first = None if idle is None else self.raw.poll(0)
            if first is None:
                if idle is not None:
                    idle()
                    metadata = self.raw.consumer_group_metadata()  # now, since a message would wait for it for 0.1 ms
                before, began = assignment.rebalances, time.monotonic()
                first = self.raw.poll(wait)
                if assignment.rebalances != before or time.monotonic() - began > 2 * wait:  # or the process stood still (M03)
                    metadata = None
            fetched = [] if first is None else [first]
            before = assignment.rebalances  # poll() serves rebalances before it takes a message, consume() also in between
            if first is not None and max_batch > 1:
                with collector_rests:
                    fetched += self.raw.consume(max_batch - 1, 0)
        except KafkaException as exc:
            raise broker_failure(kafka_error(exc), "consuming", SAFE, group=self._settings.group_id) from exc
        self._callbacks.raise_interrupt()
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem
        return fetched, before, metadata

    def _gather(self, messages: list[Message], max_batch: int, max_wait: float, before: int) -> None:
        """Wait until there are ``max_batch`` messages, for so many seconds; not after a rebalance, which drops them."""
        until = time.monotonic() + max_wait
        while len(messages) < max_batch and self._assignment.rebalances == before and self._problem is None:
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
        events = [(place, error) for place, message in enumerate(fetched) if (error := message.error()) is not None]
        for place, error in events:
            try:
                self._events.heed(fetched[place], error)
            except Exception as problem:
                before = [message for message in fetched[:place] if message.error() is None]
                if not before:
                    raise
                self._problem = problem  # for the next fetch: who sets the offset behind the event must not pass these over
                return before
        return [message for message in fetched if message.error() is None]

    # -- still ours? --------------------------------------------------------------------------------------------------

    @property
    def gone_silent(self) -> bool:
        """Whether a call was left without an answer, in a client that stops. Another one would wait for its end (Y01)."""
        return self._client.gone_silent

    def membership(self) -> Membership:
        """The membership at this moment. None, once librdkafka has a fatal error: another instance may have its id."""
        if self._over:
            return Membership(-1, "")
        return membership(self.raw.consumer_group_metadata())

    def still_ours(self, batch: Batch, *, within: float | None = None) -> bool:
        """Whether this member still owns the partitions of a batch that it fetched with its last poll.

        Args:
            batch: what was fetched.
            within: seconds; None: ``max.poll.interval.ms``. A process that was stopped for longer than the session learns only
                from its next heartbeat that it was thrown out, and may get here before the answer. So the clock is asked too.
        """
        limit = self._settings.max_poll_interval if within is None else within
        return time.monotonic() - batch.served < limit and self.membership().continues(batch.member)

    def shares(self) -> bool:
        """Whether a rebalance, since this was last asked, has left partitions of its topics to others. False: nobody knows."""
        if self._assignment.rebalances == self._looked:
            return False
        try:
            known = self.raw.list_topics(timeout=self._client.within).topics
        except KafkaException:
            return False
        self._looked, owned = self._assignment.rebalances, self._assignment.owned
        return len(owned) < sum(len(known[topic].partitions) for topic in {topic for topic, _ in owned} if topic in known)

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
        self.raw.pause([TopicPartition(*partition) for partition in self._assignment.owned])  # the new ones too
        asked = time.monotonic()
        try:
            fetched, *_ = self._take(1, wait)
            self.unplace(next_offsets(self._without_events(fetched)))
        finally:
            if batch.partitions & self._assignment.given_away:
                batch.served = -math.inf  # for good, also if it is waited for again
        if batch.served > -math.inf:
            batch.served = asked
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
        self.raw.resume([TopicPartition(*partition) for partition in self._assignment.awake])

    def in_place(self, messages: Iterable[Message]) -> list[Message]:
        """Those of the batch in hand that do not come again: their partitions were neither given back nor given away."""
        here = self._assignment.awake - self._assignment.unplaced
        return [message for message in messages if (message.topic(), message.partition()) in here]

    def rest(self, messages: Iterable[Message], seconds: float) -> None:
        """Give messages back, and fetch their partitions again, from where the group has committed them, after some time."""
        self._positions.rest(next_offsets(messages).keys() & self._assignment.owned, seconds)

    # -- committing ---------------------------------------------------------------------------------------------------

    def commit(self, offsets: Iterable[TopicPartition]) -> None:
        """Commit synchronously, and check the answer for every partition (C06). What was deleted with its topic is left out.

        Raises:
            BrokerError: at least one was not committed, or that is unknown.
            AuthorizationError: no right to.
        """
        places, began = self._places.marked(offsets), time.monotonic()
        try:
            self._commit(places, self.recent)
        except KafkaException as exc:
            error, left = kafka_error(exc), places
            if error.code() in NO_TOPIC and not self._strict:
                deleted = {topic for topic in {place.topic for place in places} if self._topics.deleted(topic)}
                left = [place for place in places if place.topic not in deleted]
            if len(left) == len(places):
                raise self._not_committed(error, places) from exc
            if left:
                self.commit(left)
        else:
            self.recent.append(time.monotonic() - began)

    def send_commit(self, offsets: list[TopicPartition]) -> None:
        """Commit, and do not wait: a later poll tells ``trail`` of the answer.

        Raises:
            BrokerError: it was not sent.
        """
        try:
            self.raw.commit(offsets=self._places.marked(offsets), asynchronous=True)
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
        self._over = self._over or error.code() == KafkaError._FATAL
        return broker_failure(
            error,
            "committing offsets",
            "They may or may not be committed.",
            topic={place.topic for place in places},
            group=self._settings.group_id,
        )

    def _commit(self, offsets: list[TopicPartition], recent: Collection[float] = ()) -> None:
        """Commit, and note whether that may still be on its way. ``recent``: seconds that an answer took lately."""
        began = time.monotonic()
        try:
            self._check_commit(
                self._client.call(lambda: self.raw.commit(offsets=offsets, asynchronous=False), "committing offsets")
            )
        except BaseException as exc:
            refused = isinstance(exc, KafkaException) and kafka_error(exc).code() in NOT_TAKEN
            if self._strict and not refused:
                self.stray = "it is not known whether offsets were committed"
            raise
        finally:
            seconds = time.monotonic() - began
            if self._strict and sent_twice(seconds, recent, self._settings.retry_backoff):
                self.stray = f"committing offsets took {seconds:.1f} s: the first try may still be on its way"

    def claim(self, offsets: Iterable[TopicPartition]) -> None:
        """These were committed in a transaction, or may have been."""
        self._places.claim(offsets)

    def _check_commit(self, answer: list[TopicPartition]) -> None:
        for partition in answer:
            if partition.error is not None:
                raise KafkaException(partition.error)
        self._places.note(answer)
        if self._strict:
            self.claim(answer)

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
        self._assignment.unplace(partitions)

    def _find_places(self, messages: Iterable[Message] = ()) -> set[Partition]:
        """Put right what is to be fetched from elsewhere. Returns what comes again: see ``Positions.find``."""
        self._settle_all()
        return self._positions.find(self._commit, messages)

    def _settle_all(self) -> None:
        """Wait for the end of what is on its way: the brokers would name a place before it."""
        if self._in_flight is not None:
            self.unplace(self._in_flight.settle())
        if self.trail is not None:
            self.trail.settle()

    # -- rebalances: never raise in a callback (C08) -------------------------------------------------------------------

    def _on_assign(self, raw: Any, partitions: list[TopicPartition]) -> None:
        try:
            self._settle()
            self._assignment.rebalance()
            new = {(p.topic, p.partition) for p in partitions}
            self._assignment.assign(new)
            # not after a member that did it: where commits take their time, each may be a reason for another to take over
            if new and self._client.kip_848 and not self._took_over:
                self._refresh.begin()
            log.info("group %r has assigned %s", self._settings.group_id, named(new))
            for topic in self._written & {topic for topic, _ in new}:  # only the group knows all that a pattern matches
                self._keep(own_dead_letters(topic, self._topics.names))
            if self._client.leaving:
                return  # revoked in the next moment: confluent-kafka accepts them
            places = self._positions.assigned(new)
            (raw.incremental_assign if self._client.incremental else raw.assign)(places)
            self.unplace(with_epoch(places))
        except BaseException as problem:  # noqa: BLE001 - raised after the C call
            self._keep(problem)

    def _on_revoke(self, raw: Any, partitions: list[TopicPartition]) -> None:
        if self.trail is not None:
            try:
                self.trail.revoked({(p.topic, p.partition) for p in partitions})
            except BaseException as problem:  # noqa: BLE001 - raised after the C call
                self._keep(problem)
        self._gone(raw, partitions)

    def _gone(self, raw: Any, partitions: list[TopicPartition], *, lost: bool = False) -> None:
        try:
            self._settle()  # before the partitions are given away
            gone = {(p.topic, p.partition) for p in partitions}
            waiting = self._assignment.waiting & gone
            rejoining_until = None
            if lost or not self._client.incremental:  # it joins again, and the classic group waits for its slowest member
                rejoining_until = time.monotonic() + (UNASSIGNED if self._client.kip_848 else self._settings.max_poll_interval)
            self._assignment.rebalance()
            self._assignment.revoke(gone, rejoining_until)  # first: whatever fails, they are not ours (X02)
            self._places.disclaim(gone)
            log.info("group %r has %s %s", self._settings.group_id, "given away" if lost else "revoked", named(gone))
            if lost and self.trail is not None:
                self.trail.lost(gone)
            raw.resume(partitions)  # librdkafka keeps a pause, and would read nothing once they are assigned again
            if self._client.incremental and waiting:
                raw.incremental_unassign([TopicPartition(*partition) for partition in gone - waiting])
        except BaseException as problem:  # noqa: BLE001 - raised after the C call
            self._keep(problem)

    def _on_lost(self, raw: Any, partitions: list[TopicPartition]) -> None:
        # nothing is committed for what was lost (C07); nor of a batch in hand, which ``serve`` takes for given away then
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
            self._problem = self._problem or problem  # the first is the cause
        else:
            self._callbacks.interrupt(problem)

    # -- joining and leaving ------------------------------------------------------------------------------------------

    def _join(self) -> None:
        heard = {"on_assign": self._on_assign, "on_revoke": self._on_revoke, "on_lost": self._on_lost}
        self._client.join(self._topics.names, {name: weakly(method) for name, method in heard.items()})

    def rejoin(self, why: str) -> None:
        """Have a new member of the group take over, which goes on from what is committed. What is in hand is given back."""
        log.info("a new member of the group takes over, because %s", why)
        self.stray, self._took_over = "", True
        self._join_anew()
        self._fenced_from = self._until_released()

    def _join_anew(self, level: int = logging.WARNING) -> None:
        self._client.leave(level)
        self._places.disclaim()
        self._positions.outdated_since = math.inf
        self._assignment.clear()
        self._client.renew()
        self._over = False
        self._heard = self._heard if self._told else time.monotonic()
        self._join()

    def close(self) -> None:
        """Leave the group, and let the client go. Waits for that CLOSING seconds, or STOP_GRACE in a client that stops."""
        collector_rests.over()
        if not self._lifecycle.forked:  # the parent is still a member
            self._client.close(self._lifecycle.why if self._lifecycle.stopping else self._done)
