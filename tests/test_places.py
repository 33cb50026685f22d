"""Where a group goes on: what is committed, what is stored, what ``start`` says, and who is asked for how long."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    OFFSET_INVALID,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from kafka_guarantees import AtLeastOnce, OffsetsLost
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._group_client import WITHIN
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._offsets import Membership, Partition
from kafka_guarantees._places import TOGETHER, Outdated, Places, Stored
from kafka_guarantees._positions import LEADERLESS
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees._topics import Topics
from kafka_guarantees.errors import OffsetBeyondEnd
from kafka_guarantees.prove.proxy import Proxy

from .conftest import fill
from .world import in_thread, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kafka_guarantees._places import Ask, Start
    from kafka_guarantees.testing.local_kafka import RunningKafka

MARK = "by an inbox"
BEGAN = "kafka-guarantees began with 3 partitions at 1700000000"


class Brokers:
    """What three partitions of a topic hold, from 10 to 90, and what a group has committed of them."""

    def __init__(self, **offsets: int) -> None:
        self.offsets = {int(name[1:]): offset for name, offset in offsets.items()}
        self.metadata = ""
        self.remembers = False
        self.said: dict[int, str] = {}  # the metadata of what was committed here
        self.count = 3
        self.without_leader: set[int] = set()
        self.deleted = False
        self.error: KafkaError | None = None  # in place of what is known of the topic
        self.questions = 0
        self.commits: list[tuple[int, int]] = []

    def ask(self, question: Callable[[Any, float], Any]) -> Any:
        return question(self, 1.0)

    def committed(self, places: list[TopicPartition], _within: float) -> list[TopicPartition]:
        known = [(place.topic, place.partition, self.offsets.get(place.partition, OFFSET_INVALID)) for place in places]
        return [TopicPartition(*place, metadata=self.said.get(place[1], self.metadata)) for place in known]

    def offsets_for_times(self, places: list[TopicPartition], _within: float) -> list[TopicPartition]:
        edges = {OFFSET_BEGINNING: 10, OFFSET_END: 90}
        self.questions += 1
        if self.without_leader & {place.partition for place in places}:
            raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
        return [TopicPartition(place.topic, place.partition, edges[place.offset]) for place in places]

    def list_topics(self, topic: str, timeout: float) -> Any:
        leaders = {number: SimpleNamespace(leader=-(number in self.without_leader)) for number in range(self.count)}
        error = KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART) if self.deleted else self.error
        return SimpleNamespace(topics={topic: SimpleNamespace(partitions=leaders, error=error)})

    def commit(self, places: Iterable[TopicPartition]) -> None:
        for place in places:
            self.commits.append((place.partition, place.offset))
            if self.remembers:
                self.offsets[place.partition] = place.offset
                self.said[place.partition] = place.metadata or ""


def of(places: Places, brokers: Brokers, *partitions: int) -> dict[int, int]:
    found = places.of([("t", number) for number in partitions], brokers.ask, brokers.commit)
    return {place.partition: place.offset for place in found}


@pytest.mark.parametrize(
    ("start", "known", "begins"),
    [("earliest", {}, 10), ("latest", {}, 90), ("earliest", {"p0": 42}, 10), ("latest", {"p0": 42}, 10)],
    ids=["earliest", "latest", "earliest, the topic is known", "latest, the topic is known"],
)
def test_a_start_is_decided_once_and_written_down(start: Start, known: dict[str, int], begins: int) -> None:
    """M05, C11: nothing is skipped of a partition that was added to a topic which the group reads."""
    brokers = Brokers(**known)
    assert of(Places("g", start), brokers, 1, 2) == {1: begins, 2: begins}
    assert brokers.commits == [(1, begins), (2, begins)]
    assert brokers.questions == 1


@pytest.mark.parametrize("once", [True, False])
def test_an_offset_that_is_gone_is_not_that_of_a_new_partition(once: bool) -> None:  # noqa: FBT001
    """M05: what was there when the topic was first seen may have had one. What was added had not."""
    brokers, places = Brokers(p1=42), Places("g", "latest", once=once)
    brokers.count = 2
    assert of(places, brokers, 0, 1) == {0: 90 if once else 10, 1: 42}
    brokers.count = 3
    assert of(places, brokers, 2) == {2: 10}


def test_members_that_begin_a_group_together_begin_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one decides when the first has committed its start: it would handle all that was ever written otherwise."""
    brokers = Brokers()
    brokers.remembers = True
    assert of(Places("g", "latest"), brokers, 0) == {0: 90}
    assert of(Places("g", "latest"), brokers, 1) == {1: 90}
    brokers.count = 4
    assert of(Places("g", "latest"), brokers, 3) == {3: 10}, "C11: it was added meanwhile"
    now = time.time()
    monkeypatch.setattr("kafka_guarantees._places.time", SimpleNamespace(time=lambda: now + TOGETHER + 1))
    assert of(Places("g", "latest"), brokers, 2) == {2: 10}, "it may have had an offset, which expired"


def test_what_is_committed_is_where_it_goes_on() -> None:
    """And nothing is committed for that."""
    brokers = Brokers(p0=42, p1=43)
    assert of(Places("g", "latest"), brokers, 0, 1) == {0: 42, 1: 43}
    assert brokers.commits == []


def test_an_offset_that_was_there_and_is_gone_is_lost() -> None:
    """Whether it was seen or committed by this process; a partition of which nothing was known begins."""
    brokers, places = Brokers(p0=42), Places("g", "earliest")
    of(places, brokers, 0)
    places.note([TopicPartition("t", 1, 50)])
    brokers.offsets.clear()
    for number in (0, 1):
        with pytest.raises(OffsetsLost, match=f"topic 't' partition {number} is gone"):
            of(places, brokers, number)
    assert of(places, brokers, 2) == {2: 10}


def test_offsets_that_went_with_their_topic_are_not_lost() -> None:
    """A topic that a pattern has found may be deleted: nothing is known of it then, and others go on."""
    brokers, places = Brokers(p0=42), Places("g", "earliest")
    places.note([TopicPartition("t", 1, 50)])
    brokers.deleted = True
    assert of(places, brokers, 0, 1) == {0: 42}


@pytest.mark.parametrize("start", ["earliest", "latest"])
def test_a_partition_without_a_leader_does_not_hold_up_others(start: Start) -> None:
    """Where it begins is not known; where others do is decided, and written down. Another error is one."""
    brokers, places = Brokers(p2=42), Places("g", start)
    brokers.without_leader = {1}
    begins = 10  # also with "latest": it was added since the group has read partition 2
    assert of(places, brokers, 0, 1, 2) == {0: begins, 2: 42}
    assert brokers.commits == [(0, begins)]
    brokers.without_leader = {0, 1}
    assert of(places, brokers, 0, 1, 2) == {2: 42}
    brokers.without_leader = {9}
    brokers.offsets_for_times = raises  # type: ignore[method-assign, assignment]
    with pytest.raises(KafkaException):
        of(places, brokers, 0)
    brokers.offsets_for_times = Brokers.offsets_for_times.__get__(brokers)  # type: ignore[method-assign]


@pytest.mark.parametrize("start", ["earliest", "latest"])
@pytest.mark.parametrize("shown", [{}, {"p0": 50}])
def test_what_is_stored_counts_also_where_its_end_is_not_known(start: Start, shown: dict[str, int]) -> None:
    """Its partition has no leader now: nothing is decided of it, and it is neither lost nor new, whatever the group shows."""
    brokers, places = Brokers(**shown), Places("g", start)
    places.stored = Stored(lambda partitions: {place: 50 for place in partitions if place == ("t", 0)}, MARK)
    brokers.without_leader = {0}
    assert of(places, brokers, 0) == {}
    assert of(places, brokers, 0, 1) == {1: 10}  # the group knows the topic
    assert brokers.commits == [(1, 10)]
    brokers.without_leader.clear()
    assert of(places, brokers, 0) == {0: 50}


def test_a_start_at_the_end_stays_one_where_it_could_not_be_told_at_first() -> None:
    """A partition without a leader, of a topic that is new to the group, is not one that was added later."""
    brokers, places = Brokers(), Places("g", "latest")
    brokers.without_leader = {1}
    assert of(places, brokers, 0, 1) == {0: 90}
    brokers.offsets[0] = 90
    brokers.without_leader.clear()
    assert of(places, brokers, 0, 1, 2) == {0: 90, 1: 90, 2: 10}


def raises(*_: object) -> list[TopicPartition]:
    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))


def test_an_offset_that_somebody_has_set_ahead_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """The inbox counts, and who has reset the group's offset must not think that it did something."""
    places, brokers = Places("g", "earliest"), Brokers(p0=80, p1=80, p2=30)
    places.stored = Stored(lambda _partitions: {("t", 0): 40, ("t", 2): 40}, MARK)
    for _ in range(3):
        found = places.committed([("t", 0), ("t", 1), ("t", 2)], brokers.ask)
        assert {(place.partition, place.offset) for place in found} == {(0, 40), (1, 80), (2, 40)}
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith("t 0: the group's offsets were set ahead of the inbox's")
    assert "stop all instances, and set it in the offset table of the inbox" in told
    brokers.offsets[0] = 81
    places.committed([("t", 0), ("t", 1), ("t", 2)], brokers.ask)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(("mark", "offset"), [(MARK, 80), (MARK, 30), ("", 40), ("", 30), ("", -1001)])
def test_an_offset_that_may_be_our_own_is_not_told(mark: str, offset: int, caplog: pytest.LogCaptureFixture) -> None:
    """Marked: of an inbox that was restored since, or has shown less. Behind: where the group began, and crashed."""
    places, brokers = Places("g", "earliest"), Brokers(p0=offset)
    brokers.metadata = mark
    places.stored = Stored(lambda _partitions: {("t", 0): 40}, MARK)
    places.committed([("t", 0)], brokers.ask)
    assert caplog.records == []


@pytest.mark.parametrize(("said", "kept"), [("of a Java service\x7f", ""), (None, ""), (BEGAN, BEGAN)])
def test_what_others_have_said_beside_an_offset_is_not_kept(said: str | None, kept: str) -> None:
    """For librdkafka 2.16 reads beyond its end: what comes is no text at times, and would be committed again."""

    class Said:
        topic, partition, offset, leader_epoch, error = "t", 0, 42, 7, None

        @property
        def metadata(self) -> str:
            return b"\xff".decode() if said is None else said

    places, raw = Places("g", "earliest"), SimpleNamespace(committed=lambda _places, _within: [Said()])
    [place] = places.committed([("t", 0)], lambda question: question(raw, 1.0))
    assert (place.offset, place.leader_epoch, place.metadata or "") == (42, 7, kept)


def test_what_is_stored_beside_the_effects_counts_more() -> None:
    """And the group's offset where nothing was ever stored."""
    brokers, places = Brokers(p0=42, p1=43), Places("g", "earliest")
    places.stored = Stored(lambda _partitions: {("t", 0): 40}, MARK)
    assert of(places, brokers, 0, 1, 2) == {0: 40, 1: 43, 2: 10}


def test_a_group_that_says_less_than_was_committed_is_not_believed() -> None:
    """X13: a broker that was its coordinator, and has not heard that another one is, answers from before: it asks nobody."""
    brokers, places = Brokers(p0=42, p1=43), Places("g", "earliest")
    places.claim([TopicPartition("t", 0, 50)])
    assert of(places, brokers, 1) == {1: 43}
    for known in (OFFSET_INVALID, 42, 49):
        brokers.offsets[0] = known
        with pytest.raises(Outdated, match=rf"offset {known} of topic 't' partition 0, and 50 was committed"):
            of(places, brokers, 0, 1)
    for known in (50, 60):
        brokers.offsets[0] = known
        assert of(places, brokers, 0) == {0: known}


def test_what_was_committed_of_a_partition_is_forgotten_once_it_is_given_away() -> None:
    """From then on others may do with it what they like."""
    brokers, places = Brokers(p0=42, p1=42), Places("g", "earliest")
    claims = [TopicPartition("t", 0, 50), TopicPartition("t", 1, 50)]
    places.claim(claims)
    places.disclaim([("t", 0)])
    assert of(places, brokers, 0) == {0: 42}
    with pytest.raises(Outdated):
        of(places, brokers, 1)
    places.disclaim()
    assert of(places, brokers, 1) == {1: 42}
    places.claim(claims)
    places.claim([TopicPartition("t", 0, 3)])  # its topic was made anew
    assert of(places, brokers, 0) == {0: 42}


def test_an_offset_that_is_gone_is_asked_for_once_where_the_store_has_it() -> None:
    """Else each look puts its partition right again, and with ``until_idle`` a run would never be at its end."""
    brokers, places = Brokers(p0=42, p1=42), Places("g", "earliest")
    places.stored = Stored(lambda _partitions: {("t", 0): 42}, MARK)
    both = {("t", 0), ("t", 1)}

    def vanished() -> set[Partition]:
        return places.vanished(both, brokers.ask)[0]

    of(places, brokers, 0, 1)
    assert not vanished()
    brokers.offsets.clear()
    assert vanished() == both
    assert of(places, brokers, 0) == {0: 42}
    assert vanished() == {("t", 1)}
    places.note([TopicPartition("t", 0, 43)])  # committed for show, behind the next message
    assert vanished() == both


def test_a_store_that_knows_less_than_the_group_or_more_than_the_topic_ends_the_run() -> None:
    """It is another database, or records are gone that were handled."""
    brokers, places = Brokers(p0=42), Places("g", "earliest")
    brokers.metadata = MARK
    places.stored = Stored(lambda _partitions: {}, MARK)
    with pytest.raises(OffsetsLost, match="this inbox knows nothing of it"):
        of(places, brokers, 0)
    places.stored = Stored(lambda _partitions: {("t", 0): 91}, MARK)
    with pytest.raises(OffsetBeyondEnd, match=r"offset 91 .* ends at 90"):
        of(places, brokers, 0)


class Slow:
    """A consumer that gives no answer. Notes for how long it was asked, and by which thread."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.threads: set[str] = set()
        self.answers = False

    def committed(self, places: list[TopicPartition], within: float) -> list[TopicPartition]:
        self.asked.append(within)
        self.threads.add(threading.current_thread().name)
        if not self.answers:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        return [TopicPartition(place.topic, place.partition, 5) for place in places]

    def seek(self, _place: TopicPartition) -> None: ...


def owns(member: GroupConsumer, owned: set[Partition], *, waiting: set[Partition]) -> None:
    """All that it owns is fetched from where the group is, but for those that wait."""
    member._assignment.assign(owned)
    member._assignment.wait(waiting)
    member._assignment.put_right()


@contextmanager
def members(monkeypatch: pytest.MonkeyPatch, **given: object) -> Iterator[GroupConsumer]:
    """One that has been given a partition, and does not know where to go on."""
    config = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "session.timeout.ms": 20_000, **given}
    monkeypatch.setattr(Topics, "require", lambda *_, **__: None)
    made = GroupConsumer(resolve(Guarantee.AT_LEAST_ONCE, config), Lifecycle("test"), ["t"], Places("g", "earliest"))
    made._assignment.assign({("t", 0)})
    made.unplace([("t", 0)])
    raw = made.raw
    yield made
    made._client.raw = raw
    made._lifecycle.stop()
    made.close()


@pytest.fixture
def member(monkeypatch: pytest.MonkeyPatch) -> Iterator[GroupConsumer]:
    """See ``members``. It need not wait for what is fetched."""
    with members(monkeypatch, **{"fetch.wait.max.ms": 0}) as made:
        yield made


def test_a_question_may_take_longer_each_time(member: GroupConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to eight seconds, and not in the thread of the loop. An answer brings it back to where it was."""
    slow = Slow()
    member._client.raw = slow
    monkeypatch.setattr("kafka_guarantees._positions.REFUSED", 0.0)
    for _ in range(5):
        assert member._find_places() == {("t", 0)}
    assert slow.asked == [1, 2, 4, 8, 8]
    for _ in range(10):
        member._find_places([Message(topic="t", partition=1, offset=0)])
    assert slow.asked[5:] == [1, 1, 1, 1, 5] * 2  # messages of other partitions wait now and then: a quarter of the session
    member._find_places([Message(topic="t", partition=0, offset=0)])
    assert slow.asked[15:] == [8]
    assert threading.current_thread().name not in slow.threads
    slow.answers = True
    member._find_places()
    assert not member._assignment.unplaced
    member.unplace([("t", 0)])
    member._find_places()
    assert slow.asked[16:] == [8, 1]
    slow.threads.clear()
    member._positions._asked_in_callback(lambda raw, within: raw.committed([], within))
    assert (slow.asked[-1], slow.threads) == (1, {threading.current_thread().name})


@pytest.mark.parametrize(("wait", "within"), [(0, 1), (3000, 4), (60_000, 8)])
def test_a_question_may_wait_for_the_fetch_before_it(monkeypatch: pytest.MonkeyPatch, wait: int, within: float) -> None:
    """A broker answers the requests of a connection one by one. But for eight seconds at most, for which the loop waits."""
    with members(monkeypatch, **{"fetch.wait.max.ms": wait}) as member:
        slow = Slow()
        member._client.raw = slow
        member._find_places([Message(topic="t", partition=1, offset=0)])
        with pytest.raises(KafkaException):
            member._positions.asked(lambda raw, within: raw.committed([], within))
        assert slow.asked == [min(within, 5), within]  # messages that are in hand wait for a quarter of the session


@pytest.mark.broker
def test_where_fetches_wait_for_long_the_group_is_asked_for_its_offsets_all_the_same(
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    fresh: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else a topic that is made anew would not be noticed, nor that offsets have vanished."""
    monkeypatch.setattr("kafka_guarantees._vanished.EVERY", 1.0)
    caplog.set_level(logging.INFO, "kafka_guarantees")
    looks, look = list[set[Partition]](), Places.vanished
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, [b"x"])

    def noted(places: Places, partitions: Iterable[Partition], ask: Ask) -> tuple[set[Partition], dict[Partition, int]]:
        quiet = set(partitions)
        found = look(places, quiet, ask)
        looks.append(quiet)
        return found

    monkeypatch.setattr(Places, "vanished", noted)
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("group"), "fetch.wait.max.ms": 4000}
    with AtLeastOnce(config, preflight="off", start="earliest") as client:
        running = in_thread(lambda: client.run([topic], lambda _message: None))
        until(lambda: sum(map(bool, looks)) >= 3, "it has looked", 60)
        client.stop()
        assert running() is None
    assert "whether the group still has its offsets is not known" not in caplog.text


def test_what_loses_its_leader_waits_when_all_is_assigned_anew(member: GroupConsumer) -> None:
    """The eager protocol assigns the whole; what is left out of that is not read before it is asked for again."""
    brokers, assigned = Brokers(p0=42, p1=43), list[list[int]]()
    brokers.without_leader = {1}
    member._places.stored = Stored(lambda partitions: {place: 50 for place in partitions if place[1] < 2}, MARK)
    member._client.raw = SimpleNamespace(
        **{name: getattr(brokers, name) for name in ("committed", "offsets_for_times", "list_topics")},
        commit=lambda offsets, asynchronous: list(map(brokers.commit, [offsets]))[1:],
        assign=lambda places: assigned.append(sorted(place.partition for place in places)),
        seek=lambda _place: None,
    )
    owns(member, {("t", 0), ("t", 1), ("t", 2)}, waiting={("t", 2)})
    assert member._find_places() == {("t", 0), ("t", 1)}
    assert (assigned, member._assignment.waiting) == ([[0, 2]], {("t", 1)})
    brokers.without_leader.clear()
    member._assignment._not_before[("t", 1)] -= LEADERLESS
    member._find_places()
    assert (assigned[1:], member._assignment.waiting) == ([[0, 1, 2]], set())


@pytest.mark.parametrize(("topics", "drained"), [(["^zzz"], True), (["^zzz", "^t"], False), (["^zzz", "named"], False)])
def test_where_no_topic_matches_there_is_nothing_to_read(
    member: GroupConsumer, caplog: pytest.LogCaptureFixture, topics: list[str], *, drained: bool
) -> None:
    """Nobody joins the group then, and a run with ``until_idle`` would wait for ever."""
    member._assignment.owned.clear()
    member._assignment.unplaced.clear()
    member._topics.names = topics
    raw = member.raw
    member._client.raw = SimpleNamespace(
        list_topics=lambda timeout: SimpleNamespace(topics={"t": None}),
        consumer_group_metadata=raw.consumer_group_metadata,
    )
    assert member._drained() is drained
    assert ("no topic matches ^zzz" in caplog.text) is drained


def test_a_member_whose_partitions_are_revoked_has_not_drained_them(member: GroupConsumer) -> None:
    """The eager protocol takes all away while the group waits for its slowest member; then ``until_idle`` does not count."""
    places = [TopicPartition("t", 0)]
    member._assignment.unplaced.clear()
    member.membership = lambda: Membership(3, "me")  # type: ignore[method-assign] # the old one, until it has joined again
    member._assignment.ends_at(("t", 0), 7)
    member._assignment.reach({("t", 0): 7})
    assert member._drained()
    member._on_revoke(member.raw, places)
    assert not member._drained()
    member._on_assign(member.raw, [])
    assert member._drained()


@pytest.mark.parametrize("protocol", ["range", "cooperative-sticky"])
def test_what_has_no_leader_is_asked_for_now_and_then(
    member: GroupConsumer, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its partition waits, and is asked for again later; the others are read, and not placed anew with every fetch."""
    member._client.incremental = protocol != "range"
    brokers, assigned = Brokers(p0=42), list[list[int]]()
    brokers.without_leader = {1}

    def assign(places: list[TopicPartition]) -> None:
        assigned.append(sorted(place.partition for place in places))

    raw = SimpleNamespace(
        **{name: getattr(brokers, name) for name in ("committed", "offsets_for_times", "list_topics")},
        commit=lambda offsets, asynchronous: list(map(brokers.commit, [offsets]))[1:],
        assign=assign,
        incremental_assign=assign,
        seek=lambda _place: None,
    )
    member._client.raw = raw
    owns(member, {("t", 0), ("t", 1), ("t", 2)}, waiting={("t", 1), ("t", 2)})
    for _ in range(3):
        if member._must_ask():
            member._find_places()
    assert assigned == [[2] if member._client.incremental else [0, 2]]
    assert member._assignment.waiting == {("t", 1)}
    assert "t 1: where to go on is not known: it has no leader" in caplog.text
    member._assignment._not_before[("t", 1)] -= LEADERLESS
    member._find_places()
    assert not assigned[1:]
    assert not member._must_ask()
    member._assignment.assign({("t", 3)})  # another one without a leader: each has its own time
    member._assignment.wait({("t", 3)})
    brokers.without_leader.add(3)
    brokers.count = 4
    for _ in range(3):
        if member._must_ask():
            member._find_places()
    assert member._assignment.waiting == {("t", 1), ("t", 3)}
    brokers.without_leader.clear()
    assert not member._must_ask()
    member._assignment._not_before[("t", 1)] -= LEADERLESS
    member._find_places()
    assert assigned[1:] == [[1] if member._client.incremental else [0, 1, 2]]
    assert member._assignment.waiting == {("t", 3)}


def test_a_stop_does_not_wait_for_an_answer(member: GroupConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Y01: nor is anything else asked of the consumer while that is open."""
    monkeypatch.setattr("kafka_guarantees._lifecycle.STOP_GRACE", 0.5)
    begun, over, used = threading.Event(), threading.Event(), list[str]()
    true = member.raw

    class Hanging(Slow):
        def committed(self, places: list[TopicPartition], within: float) -> list[TopicPartition]:
            begun.set()
            over.wait(30)
            return super().committed(places, within)

        def __getattr__(self, name: str) -> Any:
            if begun.is_set():
                used.append(name)
            return getattr(true, name)

    member._client.raw = Hanging()
    monkeypatch.setattr(member, "_take", lambda *_: ([Message(topic="t", partition=1, offset=0)], 0, None))

    def stops() -> None:
        assert begun.wait(30)
        member._lifecycle.stop()

    threading.Thread(target=stops, daemon=True).start()
    began = time.monotonic()
    with member._lifecycle.running():
        assert member.fetch(10) is None
        assert time.monotonic() - began < 2
        assert member.gone_silent
    assert not used
    over.set()


@pytest.mark.broker
def test_a_group_begins_however_far_the_brokers_are(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """A round trip is longer than a question about offsets may take at first: it may take longer each time."""
    topic, seen, full = kafka_topic(2), list[bytes](), threading.Event()
    fill(kafka.bootstrap, topic, [b"%d" % number for number in range(10)], partitions=2)

    def handler(message: Message) -> None:
        seen.append(message.value() or b"")
        if len(seen) == 10:
            full.set()

    with Proxy(kafka.bootstrap) as proxy, proxy.delay(0.6 * WITHIN):
        config = {"bootstrap.servers": proxy.bootstrap, "group.id": fresh("group")}
        with AtLeastOnce(config, preflight="off") as client:
            runner = threading.Thread(target=client.run, args=([topic], handler))
            runner.start()
            assert full.wait(60), f"{len(seen)} messages"
            client.stop()
            runner.join(30)
            assert not runner.is_alive()
    assert sorted(seen) == [b"%d" % number for number in range(10)]


def test_members_agree_though_one_of_them_has_handled_messages_already() -> None:
    """What it commits for these has no mark of its start: the other one handled all that its partitions held."""
    brokers = Brokers()
    brokers.remembers = True
    quick = Places("g", "latest")
    assert of(quick, brokers, 0) == {0: 90}
    brokers.commit(quick.marked([TopicPartition("t", 0, 91)]))
    assert of(Places("g", "latest"), brokers, 1) == {1: 90}


def test_brokers_that_cannot_tell_of_a_topic_are_asked_again() -> None:
    """M05: else it would count as one without partitions, for good, and what it holds would be read from its beginning."""
    brokers, places = Brokers(), Places("g", "latest", once=True)
    brokers.error = KafkaError(KafkaError.LEADER_NOT_AVAILABLE)
    with pytest.raises(KafkaException):
        of(places, brokers, 0)
    brokers.error = None
    assert of(places, brokers, 0) == {0: 90}


def test_what_nobody_knows_for_long_is_a_warning(
    member: GroupConsumer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As an offset in a transaction that nobody ends: its partition stands still."""
    caplog.set_level("INFO")
    member._positions._unknown("UNSTABLE")
    monkeypatch.setattr("kafka_guarantees._positions.UNKNOWN", -1.0)
    member._positions._unknown("UNSTABLE")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
