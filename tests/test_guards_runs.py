"""Guards of a run: how a member joins, leaves and is told of things, one by one and without a broker.

Each is removed by a mutant that no other test would notice, or only one that takes its time with a broker.
"""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from kafka_guarantees import AuthorizationError, BrokerError, OffsetsLost, StoreUnavailable, UnsafeConfigError
from kafka_guarantees._assignment import Assignment
from kafka_guarantees._client import Callbacks
from kafka_guarantees._collector import collector_rests
from kafka_guarantees._consumer import GroupConsumer, sent_twice
from kafka_guarantees._events import Events
from kafka_guarantees._group_client import GroupClient
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._offset_expiry import Refresh
from kafka_guarantees._offsets import Membership
from kafka_guarantees._pace import Pace
from kafka_guarantees._places import TOGETHER, Places, Stored
from kafka_guarantees._serialization import Reading
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees._topics import Topics, _includes, check_run

from .test_guards_partitions import LONG, T0, T1, Raw, at, ends, fetched, members, metadata
from .test_places import Brokers, of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kafka_guarantees._offsets import Partition

T2 = ("t", 2)
NO_ANSWER = KafkaException(KafkaError(KafkaError._TIMED_OUT))
MEMBERS = "kafka-guarantees-consumer"  # name of a thread
DEADLINE = 10.0  # seconds: an error if it takes so long


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GroupConsumer]]:
    """See ``members``; one that leaves does not wait long for its partitions to be taken."""
    monkeypatch.setattr("kafka_guarantees._group_client.GIVING_BACK", 0.05)
    monkeypatch.setattr("kafka_guarantees._positions.REFUSED", 0.0)
    with members(monkeypatch) as make:
        yield make


@pytest.fixture
def member(made: Callable[..., GroupConsumer]) -> GroupConsumer:
    return made()


def named(name: str) -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == name}


def none_left(before: set[threading.Thread]) -> bool:
    """None but those of other tests."""
    until = time.monotonic() + DEADLINE
    while (left := named(MEMBERS) - before) and time.monotonic() < until:
        time.sleep(0.01)
    return not left


# -- what is owned ---------------------------------------------------------------------------------------------------------


def test_two_rebalances_in_one_poll_take_both_away(member: GroupConsumer) -> None:
    """X02: the second does not make good what the first took away of the batch in hand."""
    batch = fetched(member, at(T0, 5))
    member.raw.comes = [
        member.raw.rebalance("revoke", T0),
        member.raw.rebalance("assign", T0),
        member.raw.rebalance("revoke", T1),
    ]
    member.serve(batch)
    assert not member.still_ours(batch, within=LONG)


def test_what_is_fetched_again_is_not_at_its_end(member: GroupConsumer) -> None:
    """A run with until_idle would end without what comes again: where its partition ended is known from before."""
    ends(member, 9)
    member._assignment.reach({T0: 9, T1: 9})
    assert member._drained()
    member.unplace([T0])
    assert member.fetch(10) is None
    assert member.raw.last("seek") == [T0]
    assert not member._drained()


def test_what_has_no_leader_is_not_read_on_from_where_it_was(member: GroupConsumer) -> None:
    """C01: behind that may be messages that were given back. It rests until somebody knows where to go on."""
    unled = SimpleNamespace(partitions={0: SimpleNamespace(leader=-1)}, error=None)

    def nobody(_places: object, _within: float) -> None:
        raise NO_ANSWER

    member._places.stored = Stored(lambda _partitions: {T0: 7}, "mark")
    member.raw.offsets_for_times = nobody
    member.raw.list_topics = lambda _topic, timeout: SimpleNamespace(topics={"t": unled})
    member.unplace([T0])
    assert member.fetch(10) is None
    assert member.raw.last("pause") == [T0]
    assert not member.raw.times("seek")
    assert not member._must_ask(), "others are read meanwhile"
    assert member._assignment.awake == {T1}


def away(_partitions: Iterable[Partition]) -> dict[Partition, int]:
    raise StoreUnavailable("for the test")


def test_a_store_that_is_away_when_it_is_asked_where_to_go_on_ends_no_run(member: GroupConsumer) -> None:
    """D16: when partitions are assigned, and when they are to be fetched again. Nothing is read from a place of old."""
    member._places.stored = Stored(away, "mark")
    member.raw.comes = [member.raw.rebalance("assign", T2), at(T0, 5)]
    member.unplace([T0])
    assert member.fetch(10) is None
    assert member._assignment.waiting == {T2}
    assert member._assignment.unplaced == {T0}
    assert not member.raw.times("seek")
    assert member._problem is None


def test_brokers_that_do_not_answer_when_partitions_are_assigned_end_no_run(member: GroupConsumer) -> None:
    """They may be in trouble for a moment: it waits, and they are asked again."""
    known = member.raw.committed

    def nobody(_places: object, _within: float) -> None:
        raise NO_ANSWER

    member.raw.committed = nobody
    member.raw.rebalance("assign", T2)()
    assert member._assignment.waiting == {T2}
    member.raw.committed = known
    member.raw.committed_at[T2] = 7
    assert member.fetch(10) is None
    assert member._assignment.waiting == set()


def test_what_has_no_offset_is_not_fetched_before_its_start_is_committed(made: Callable[..., GroupConsumer]) -> None:
    """M05: librdkafka would begin where it likes, and a crash would decide once more."""
    member = made(partition_assignment_strategy="cooperative-sticky")
    member.raw.rebalance("assign", T2)()
    assert member.raw.last("incremental_assign") == []
    assert member._assignment.waiting == {T2}
    assert member.fetch(10) is None
    order = [(what, places) for what, places in member.raw.log if what in {"commit", "incremental_assign"}]
    assert order[1:] == [("commit", [T2]), ("incremental_assign", [T2])]


def unanswered(member: GroupConsumer) -> list[float]:
    """Nobody answers. Returns the list of how long each question may take."""
    asked: list[float] = []

    def nobody(_places: object, within: float) -> None:
        asked.append(within)
        raise NO_ANSWER

    member.raw.committed = nobody
    member.unplace([T0])
    return asked


def test_brokers_that_refuse_at_once_are_not_asked_with_every_fetch(
    made: Callable[..., GroupConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group without a coordinator answers at once, and messages of other partitions are there: thousands of questions."""
    member = made(fetch_wait_max_ms=0)
    asked = unanswered(member)
    monkeypatch.setattr("kafka_guarantees._positions.REFUSED", 0.2)
    began = time.monotonic()
    assert member._find_places() == {T0}
    for _ in range(100):
        assert member._find_places([at(T0, 5), at(T1, 5)]) == {T0}
    assert time.monotonic() - began < 0.2, "others do not wait"
    assert len(asked) == 1
    assert member._find_places() == {T0}
    assert len(asked) == 2
    assert time.monotonic() - began >= 0.2


def test_messages_of_one_partition_do_not_wait_long_for_another(made: Callable[..., GroupConsumer]) -> None:
    """M03: also where there are some of the other as well, which are dropped."""
    member = made(fetch_wait_max_ms=0)
    asked = unanswered(member)
    for _ in range(4):
        assert member._find_places() == {T0}
    assert member._find_places([at(T0, 5), at(T1, 5)]) == {T0}
    assert asked == [1, 2, 4, 8, 1]


def test_no_question_takes_longer_than_the_group_waits(made: Callable[..., GroupConsumer]) -> None:
    """C10: a member that asks does not poll."""
    member = made(fetch_wait_max_ms=0, max_poll_interval_ms=12_000, session_timeout_ms=6_000)
    asked = unanswered(member)
    for _ in range(4):
        member._find_places()
    assert asked == [1, 2, 3, 3]


def test_a_right_that_is_missing_ends_the_run(member: GroupConsumer) -> None:
    """S07: to ask again where to go on is of no use, and nothing would be read, without a word."""

    def denied(_places: object, _within: float) -> None:
        raise KafkaException(KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED))

    member.raw.committed = denied
    member.unplace([T0])
    with pytest.raises(AuthorizationError, match="asking for offsets"):
        member.fetch(10)


# -- how it leaves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "given_back"), [("classic", False), ("consumer", True)])
def test_a_static_member_keeps_its_partitions(
    made: Callable[..., GroupConsumer],
    protocol: str,
    given_back: bool,  # noqa: FBT001 - two rows
) -> None:
    """KIP-345: it comes back in a moment. With KIP-848 the group keeps them by itself, and a poll gives them back."""
    member = made(group_protocol=protocol, group_instance_id="static")
    raw = member.raw
    member.close()
    assert bool(raw.times("unsubscribe")) is given_back
    assert raw.times("close") == 1


def test_no_thread_is_left_by_a_member_that_left(made: Callable[..., GroupConsumer]) -> None:
    """Nor by the one before it: a service may run for months, and rejoin each time its network is slow (M02)."""
    before = named(MEMBERS)
    member = made(strict=True)
    member.rewind([at(T0, 5)])  # asks, in a thread
    member.rejoin("for the test")
    member.close()
    assert none_left(before)


@pytest.mark.parametrize("error", [RuntimeError("closed already"), NO_ANSWER])
def test_a_member_that_cannot_leave_is_let_go(
    member: GroupConsumer, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a run does not fail, nor hides why it ends; the group is told by the end of the session."""

    def refuse() -> None:
        raise error

    member.raw.close = refuse
    member.close()
    assert member.raw is None
    assert "when the session ends" in caplog.text


def test_an_interrupt_while_it_leaves_lets_it_go(member: GroupConsumer) -> None:
    """Y03: else librdkafka would stay a member of the group, which nobody serves."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    member.raw.close = interrupted
    with pytest.raises(KeyboardInterrupt):
        member.close()
    assert member.raw is None


def test_an_error_of_the_last_poll_does_not_keep_a_member_from_leaving(member: GroupConsumer) -> None:
    """The group would wait for the end of its session."""
    raw = member.raw

    def poll(_wait: float = 0) -> None:
        raise NO_ANSWER

    raw.poll = poll
    member.close()
    assert raw.times("close") == 1


def test_a_revocation_that_does_not_come_is_not_waited_for(member: GroupConsumer) -> None:
    """It has a moment; then the group takes the partitions when the session ends."""
    raw, began = member.raw, time.monotonic()

    def poll(_wait: float = 0) -> None:
        assert time.monotonic() - began < DEADLINE, "it is waited for"

    raw.poll = poll
    member.close()
    assert raw.times("close") == 1


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        ({"partition_assignment_strategy": "cooperative-sticky"}, True),
        ({"partition_assignment_strategy": "range"}, False),  # librdkafka says so after it was told to close
        ({"group_protocol": "consumer"}, False),  # so it does here, and such a member keeps its id
    ],
)
def test_the_group_is_told_before_the_consumer_is_closed(
    made: Callable[..., GroupConsumer], config: dict[str, str], *, asked: bool
) -> None:
    """Closed while it lets partitions go, librdkafka sends no LeaveGroup: nobody has them until the session ends."""
    member = made(**config)
    raw = member.raw
    raw.comes, raw.member_ids = [raw.rebalance("revoke", T0, T1)], ["me"] * 3
    left: list[bool] = []
    raw.close = lambda: left.append(not raw.member_ids)
    member.close()
    assert left == [asked]


@pytest.mark.parametrize(("protocol", "waits"), [("consumer", True), ("classic", False)])
def test_a_member_that_is_about_to_be_let_in_waits_for_that(
    made: Callable[..., GroupConsumer], protocol: str, *, waits: bool
) -> None:
    """KIP-848: librdkafka does not leave a group that has not answered yet, which then has a member that reads nothing."""
    member = made(group_protocol=protocol)
    raw = member.raw
    raw.metadata = metadata(0)
    raw.comes = [lambda: None, lambda: setattr(raw, "metadata", metadata(1)), raw.rebalance("revoke", T0, T1)]
    unsubscribed: list[bytes] = []
    raw.unsubscribe = lambda: unsubscribed.append(raw.metadata)
    member.close()
    assert unsubscribed == [metadata(1 if waits else 0)]


def test_who_joins_anew_does_not_wait_to_be_let_in_before(made: Callable[..., GroupConsumer]) -> None:
    """It was put out of the group, or never let in: another member takes over, and each moment is one without messages."""
    member = made(group_protocol="consumer")
    old = member.raw
    old.metadata = metadata(0)
    old.comes = [lambda: setattr(old, "metadata", metadata(1)), old.rebalance("revoke", T0, T1)]
    unsubscribed: list[bytes] = []
    old.unsubscribe = lambda: unsubscribed.append(old.metadata)
    member.rejoin("for the test")
    assert unsubscribed == [metadata(0)]


@pytest.mark.parametrize("generation", [0, -1])
def test_a_member_that_is_never_let_in_leaves_all_the_same(made: Callable[..., GroupConsumer], generation: int) -> None:
    """It waits a moment."""
    member = made(group_protocol="consumer")
    raw, began = member.raw, time.monotonic()
    raw.metadata = metadata(generation)
    member.close()
    assert time.monotonic() - began < DEADLINE / 2
    assert raw.times("unsubscribe") == raw.times("close") == 1


def test_a_group_that_is_not_told_is_not_waited_for(made: Callable[..., GroupConsumer]) -> None:
    """It has a moment for that, too."""
    member = made(partition_assignment_strategy="cooperative-sticky")
    raw, began = member.raw, time.monotonic()
    raw.comes, raw.memberid = [raw.rebalance("revoke", T0, T1)], lambda: "me"
    member.close()
    assert time.monotonic() - began < DEADLINE / 2
    assert raw.times("close") == 1


@pytest.mark.parametrize("why", ["its time is up", "the client stops"])
def test_a_member_does_not_wait_for_ever_to_leave(
    member: GroupConsumer, monkeypatch: pytest.MonkeyPatch, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Y01: brokers that do not answer keep no process from ending."""
    over = threading.Event()
    member.raw.close = lambda: over.wait(DEADLINE)
    member.raw.comes = [member.raw.rebalance("revoke", T0, T1)]
    if why == "its time is up":
        monkeypatch.setattr("kafka_guarantees._group_client.CLOSING", 0.2)
    began = time.monotonic()
    with member._lifecycle.running(lambda: None):
        if why == "the client stops":
            member._lifecycle.leave(0.2)
        member.close()
    assert time.monotonic() - began < DEADLINE / 2
    assert "leaving the group got no answer" in caplog.text
    over.set()


@pytest.mark.parametrize(("code", "level"), [(KafkaError._FATAL, "INFO"), (KafkaError._STATE, "WARNING")])
def test_a_member_that_cannot_leave_any_more_is_no_news(
    member: GroupConsumer, caplog: pytest.LogCaptureFixture, code: int, level: str
) -> None:
    """Librdkafka refuses everything after a fatal error, and that was raised: "look at the brokers" would mislead."""

    def refused() -> None:
        raise KafkaException(KafkaError(code))

    member.raw.unsubscribe = refused
    with caplog.at_level("INFO"):
        member.close()
    assert [r.levelname for r in caplog.records if "gives the partitions to others" in r.getMessage()] == [level]


def test_nothing_is_fetched_by_a_member_that_leaves(member: GroupConsumer) -> None:
    """What it is assigned in that moment is revoked in the next. To ask where that goes on would hold up the whole group."""
    raw = member.raw
    raw.comes = [raw.rebalance("assign", T2), raw.rebalance("revoke", T0, T1, T2)]
    member.close()
    assert not raw.times("committed")
    assert not raw.times("assign")


def test_partitions_are_given_back_before_it_leaves(member: GroupConsumer) -> None:
    """C06: what trails behind is committed in that, in a poll, and not in the end of the C client (L07)."""
    raw, order = member.raw, list[str]()
    member.trail = cast("Any", SimpleNamespace(revoked=lambda _gone: order.append("revoked")))
    raw.close = lambda: order.append("closed")
    polls(member, None, None, raw.rebalance("revoke", T0, T1))
    member.close()
    assert order == ["revoked", "closed"]


def test_who_takes_over_is_assigned_partitions(made: Callable[..., GroupConsumer]) -> None:
    """M02: the one before it was leaving; it is not."""
    member = made(strict=True)
    member.rejoin("for the test")
    member.raw.committed_at = {T0: 5}
    member.raw.rebalance("assign", T0)()
    assert member.raw.last("assign") == [T0]


# -- topics ----------------------------------------------------------------------------------------------------------------


class Known:
    """Stands for the client of a member that has not joined, and what it hears of topics."""

    def __init__(self, *answers: KafkaError | Exception | None) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.joined = self.kip_848 = False
        self.within = 1.0
        self.raw = self

    def list_topics(self, topic: str = "", timeout: float = 0) -> Any:
        self.asked += 1
        answer = self.answers[min(self.asked, len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(topics={topic or "known": SimpleNamespace(error=answer)})

    def poll(self, _wait: float) -> None: ...


def topics_of(known: Known, *names: str, callbacks: Callbacks | None = None, lifecycle: Lifecycle | None = None) -> Topics:
    client: Any = known
    return Topics(names, client, callbacks or Callbacks(), lifecycle or Lifecycle("test"))


MISSING = KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)


def test_who_is_not_let_in_hears_of_it_also_with_a_pattern() -> None:
    """C19: with a pattern there is no topic to ask for, but a broker: else the run would wait without a word, for ever."""
    callbacks = Callbacks()
    callbacks._shut_out = KafkaError(KafkaError._AUTHENTICATION)
    topics = topics_of(Known(NO_ANSWER), "^any", callbacks=callbacks)
    with pytest.raises(BrokerError, match="no broker lets this client in"):
        topics.require(["^any"])


def test_a_stop_does_not_wait_for_a_topic() -> None:
    """It may be there in a moment, and nobody wants to know any more."""
    lifecycle = Lifecycle("test")
    lifecycle.stop()
    known = Known(MISSING)
    topics_of(known, "t", lifecycle=lifecycle).require(["t"])
    assert known.asked == 1


def test_a_topic_may_take_a_moment_to_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """C19: metadata takes a moment to spread. And a topic whose brokers are in trouble exists."""
    known = Known(MISSING, MISSING, None)
    topics_of(known, "t").require(["t"])
    assert known.asked == 3
    monkeypatch.setattr("kafka_guarantees._topics.UNKNOWN_TOPIC", -1.0)
    known = Known(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
    topics_of(known, "t").require(["t"])
    assert known.asked == 1


DENIED = KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)


@pytest.mark.parametrize(("written", "operation"), [(True, "--operation WRITE"), (False, "--operation READ")])
def test_a_right_to_a_topic_that_is_missing_is_named(written: bool, operation: str) -> None:  # noqa: FBT001 - two rows
    """S07: that to write, for dead letters. It is not waited for."""
    known = Known(DENIED)
    with pytest.raises(AuthorizationError, match=operation):
        topics_of(known, "t").require(["t"], written=written)
    assert known.asked == 1


def test_who_stops_is_told_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Brokers that do not answer, or let nobody in, are no error of a run that is to end."""
    lifecycle, callbacks = Lifecycle("test"), Callbacks()
    callbacks._shut_out = KafkaError(KafkaError._AUTHENTICATION)
    lifecycle.stop()
    topics_of(Known(NO_ANSWER), "t", callbacks=callbacks, lifecycle=lifecycle).require(["t"])
    assert not caplog.records


def test_until_idle_may_be_nothing_at_all() -> None:
    """It ends at the end of what is there: the first look that finds nothing is enough."""
    settings = resolve(Guarantee.AT_LEAST_ONCE, {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"})
    check_run(settings, Lifecycle("test"), ["t"], 0, dead_letter=None)
    with pytest.raises(ValueError, match="until_idle"):
        check_run(settings, Lifecycle("test"), ["t"], -1, dead_letter=None)


@pytest.mark.parametrize("topics", ["t", b"t", [], [""], [b"t"], {"t"}, {"t": 1}, (t for t in ["t"]), 5, None])
def test_topics_are_a_list(topics: Any) -> None:
    """Refused before anything is connected, and not by an error from deep inside."""
    settings = resolve(Guarantee.AT_LEAST_ONCE, {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"})
    check_run(settings, Lifecycle("test"), ("t", "^p"), 0, dead_letter=None)
    with pytest.raises(TypeError, match="topics must be a list of topic names"):
        check_run(settings, Lifecycle("test"), topics, 0, dead_letter=None)


@pytest.mark.parametrize("topics", [["t", "t"], ["^p", "t", "u", "t"]])
def test_a_topic_is_named_once(topics: list[str]) -> None:
    """Brokers would be asked first, and librdkafka would speak of an invalid argument."""
    settings = resolve(Guarantee.AT_LEAST_ONCE, {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"})
    with pytest.raises(ValueError, match="topic 't' is named twice"):
        check_run(settings, Lifecycle("test"), topics, 0, dead_letter=None)


@pytest.mark.parametrize(
    ("blacklist", "topics", "out"),
    [
        ("^private-,orders$", ["t", "new-orders"], "'new-orders'"),  # librdkafka takes each part for a pattern
        ("t", ["of-trips"], "'of-trips'"),
        ("^t", ["__consumer_offsets"], "'__consumer_offsets'"),
        ("^private-", ["t", "^private-"], None),  # a pattern may have others
        ("^t[[:alpha:]]", ["trips"], None),  # perhaps
        (r"^tmp-\d+", ["tmp-1af5581"], None),  # librdkafka's are of POSIX, which means a "d" by that
        (r"^tmp\.", ["tmp.x"], "'tmp.x'"),
        ("^t(", ["t"], None),  # librdkafka says what is wrong with it
    ],
)
def test_a_run_for_what_librdkafka_is_to_overlook_is_refused(blacklist: str, topics: list[str], out: str | None) -> None:
    """It would act as if the topic did not exist, and the run would wait for ever."""
    settings = resolve(Guarantee.AT_LEAST_ONCE, {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"})
    settings = replace(settings, consumer={**settings.consumer, "topic.blacklist": f"{blacklist},^__consumer_offsets$"})
    if out is None:
        check_run(settings, Lifecycle("test"), topics, 0, dead_letter=None)
    else:
        with pytest.raises(UnsafeConfigError, match=rf"topic\.blacklist.* {out} of this run"):
            check_run(settings, Lifecycle("test"), topics, 0, dead_letter=None)


@pytest.mark.parametrize(
    ("pattern", "name", "included"),
    [
        ("^letters", "letters-of-orders", True),
        ("^letters$", "letters-of-orders", False),
        ("^[[:alpha:]]+$", "letters", False),  # perhaps: who is assigned the topic hears of it
        ("^(", "letters", False),  # librdkafka says what is wrong with it
        ("letters", "letters-of-orders", False),
    ],
)
def test_a_pattern_is_for_what_begins_like_it(pattern: str, name: str, included: bool) -> None:  # noqa: FBT001 - a table
    """As librdkafka has it: else dead letters would be consumed, and set aside again, for ever."""
    assert _includes(pattern, name) is included


@pytest.mark.parametrize(("names", "answer"), [(("^other", "^[[:alpha:]]+$"), None), (("^other",), NO_ANSWER)])
def test_nothing_is_said_of_patterns_that_nobody_knows(names: tuple[str, ...], answer: Exception | None) -> None:
    """A run with until_idle would end while there is much to read: librdkafka may know better, or the brokers are away."""
    assert not topics_of(Known(answer), *names).match_nothing()


# -- events ----------------------------------------------------------------------------------------------------------------


class Required:
    """Stands for the topics of a run."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.required: list[str] = []

    def require(self, topics: list[str]) -> None:
        self.required += topics


def heed(code: int, topics: Required, *, topic: str | None = "t") -> Assignment:
    assignment, settings = Assignment(), SimpleNamespace(group_id="g", max_poll_interval=300.0)
    events = Events(cast("Any", settings), assignment, cast("Any", topics), Places("g", "earliest"))
    events.heed(Message(topic=topic, partition=0, offset=9), KafkaError(code))
    return assignment


def test_the_end_of_a_partition_is_noted_and_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """C14: it comes again and again."""
    assignment = heed(KafkaError._PARTITION_EOF, Required("t"))
    assert assignment._ends == {T0: 9}
    assert not caplog.records


def test_a_topic_that_is_gone_ends_a_run_that_names_it(caplog: pytest.LogCaptureFixture) -> None:
    """C19: unless the brokers know it again in a moment. One that a pattern has found may go."""
    named, found = Required("t"), Required("^t")
    heed(MISSING.code(), named)
    heed(MISSING.code(), found)
    assert named.required == ["t"]
    assert not found.required
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_position_that_is_not_in_the_log_ends_the_run() -> None:
    """C11: to go on elsewhere would lose messages, or repeat them, without a word."""
    with pytest.raises(OffsetsLost, match="topic 't' partition 0"):
        heed(KafkaError._AUTO_OFFSET_RESET, Required("t"))


def test_a_right_that_is_taken_away_ends_the_run() -> None:
    """S07: librdkafka would try for ever."""
    with pytest.raises(AuthorizationError, match="consuming topic 't' partition 0 at offset 9"):
        heed(DENIED.code(), Required("t"))


def test_a_handler_that_was_too_slow_is_an_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """C10: what it handled comes again, and what to do is said."""
    heed(KafkaError._MAX_POLL_EXCEEDED, Required("t"), topic=None)
    assert [(record.levelname, "keep_alive=True" in record.getMessage()) for record in caplog.records] == [("ERROR", True)]


# -- what a member of the group does -----------------------------------------------------------------------------------------


class Clock:
    """Stands for the module ``time``: it moves when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("how", ["fetch", "serve"])
def test_a_process_that_stood_still_in_a_poll_does_not_know_whose_its_batch_is(
    member: GroupConsumer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """M03: what counts is the time before it: the group may have thrown it out while it stood still."""
    clock, batch = Clock(), fetched(member, at(T0, 5))
    monkeypatch.setattr("kafka_guarantees._consumer.time", clock)

    def frozen() -> None:
        clock.now += LONG

    batch.served = clock.now
    member.raw.comes = [frozen, at(T0, 6)]
    if how == "serve":
        member.serve(batch)
        assert not member.still_ours(batch, within=LONG)
    else:
        second = member.fetch(10)
        assert second is not None
        assert not member.still_ours(second, within=LONG)


@pytest.mark.parametrize("refused", [True, False])
def test_a_member_that_could_not_join_is_closed(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:  # noqa: FBT001
    """C15: nobody else has it: it would be a member until the garbage collector comes, or hold its connections."""
    left, before = list[Raw](), named(MEMBERS)

    class Noted(Raw):
        def close(self) -> None:
            left.append(self)

        def subscribe(self, _topics: list[str], **_heard: object) -> None:
            raise KafkaException(KafkaError(KafkaError._INVALID_ARG))

    def missing(*_: object, **__: object) -> None:
        raise BrokerError("there is no such topic")

    monkeypatch.setattr("kafka_guarantees._group_client.Consumer", Noted)
    monkeypatch.setattr("kafka_guarantees._group_client.GIVING_BACK", 0.05)
    settings = resolve(Guarantee.AT_LEAST_ONCE, {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"})
    monkeypatch.setattr(Topics, "require", lambda *_, **__: None if refused else missing())
    with pytest.raises(ValueError if refused else BrokerError, match="are refused" if refused else "no such topic"):
        GroupConsumer(settings, Lifecycle("test"), ["t"], Places("g", "earliest"))
    assert len(left) == 1
    assert none_left(before)


def polls(member: GroupConsumer, *comes: Message | Callable[[], object] | None) -> list[object]:
    """Each poll brings one of these, and in the end stops the client. Returns what is left of them."""
    left: list[Any] = list(comes)

    def poll(_wait: float = 0) -> Message | None:
        if not left:
            member._lifecycle.stop()
            return None
        coming = left.pop(0)
        if coming is None or isinstance(coming, Message):
            return cast("Message | None", coming)
        coming()
        return None

    member.raw.poll = poll
    return left


def offsets_of(member: GroupConsumer, until_idle: float) -> list[int | None]:
    """Of what comes, one message in each batch."""
    return [batch.messages[0].offset() for batch in member.batches(Pace(1, 60), until_idle, Reading(None, None))]


@pytest.mark.parametrize(("generation", "said"), [(-1, 2), (0, 2), (1, 0)], ids=["no answer", "none with KIP-848", "heard"])
def test_a_group_that_lets_nobody_in_is_heard_of(
    member: GroupConsumer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    generation: int,
    said: int,
) -> None:
    """Brokers before 4.0 never answer a member of KIP-848, and librdkafka says nothing. A member without partitions is well."""
    clock = Clock()
    monkeypatch.setattr("kafka_guarantees._consumer.time", clock)
    member._heard = clock.now
    member.raw.rebalance("revoke", T0, T1)()
    member.raw.metadata = metadata(generation)

    def passes() -> None:
        clock.now += 20

    polls(member, *[None, passes] * 5)
    with caplog.at_level("WARNING"):
        assert not offsets_of(member, LONG)
    assert caplog.text.count("has not let this member in for 30 s") == said


@pytest.mark.parametrize("how", ["given away", "rejoin"])
def test_a_group_is_not_unheard_of_at_once(
    member: GroupConsumer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """A member that has had partitions until now has been heard, and one that takes over has just asked."""
    clock = Clock()
    monkeypatch.setattr("kafka_guarantees._consumer.time", clock)
    member._heard = clock.now - 1000
    if how == "rejoin":
        member.rejoin("for the test")
        polls(member, None, None)
    else:
        polls(member, at(T0, 5), member.raw.rebalance("lost", T0, T1), None, None)
    member.raw.metadata = metadata(1 if how == "given away" else -1)
    for _ in member.batches(Pace(1, 60), None, Reading(None, None)):
        member.raw.metadata = metadata(-1)
    assert "has not let this member in" not in caplog.text


@pytest.mark.parametrize("seconds", [0.0, LONG])
def test_who_has_just_joined_waits_for_partitions(
    made: Callable[..., GroupConsumer], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """With KIP-848 nobody is told of an empty assignment: to have none counts as having nothing to do after a while."""
    monkeypatch.setattr("kafka_guarantees._consumer.UNASSIGNED", seconds)
    member = made(group_protocol="consumer")
    member.raw.rebalance("revoke", T0, T1)()
    polls(member, None, None, member.raw.rebalance("assign", T0), at(T0, 5))
    assert offsets_of(member, 0) == ([5] if seconds else [])


def test_there_may_be_more_where_a_message_came_after_the_end(member: GroupConsumer) -> None:
    """A run with until_idle ends at an end that librdkafka has come to, not at one of before."""
    ends(member, 5)
    polls(member, at(T0, 5), None, None, at(T0, 6), lambda: member._assignment.ends_at(T0, 7))
    assert offsets_of(member, 0) == [5, 6]


@pytest.mark.parametrize("due", [True, False])
def test_ends_behind_markers_are_committed_now_and_then(member: GroupConsumer, *, due: bool) -> None:
    """C11: also in a run that never ends. What is on its way is settled first."""
    order: list[str] = []
    member.trail = cast("Any", SimpleNamespace(settle=lambda: order.append("settled"), follow=lambda _member: None))
    member._assignment.reach({T0: 5})
    member._assignment.ends_at(T0, 6)
    member.raw.committed_at[T0] = 5
    commit = member.raw.commit

    def committing(**given: Any) -> Any:
        order.append("committed")
        return commit(**given)

    member.raw.commit = committing
    if due:
        member._refresh._look_at = 0.0
    member.fetch(1)
    assert order == (["settled", "committed"] if due else [])


def test_who_stops_without_an_answer_asks_for_nothing_more(member: GroupConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Y01: whoever asks whether all was read would wait for the call that is on."""

    def hanging(*_: object) -> None:
        monkeypatch.setattr(GroupClient, "gone_silent", True)

    monkeypatch.setattr(member, "fetch", hanging)
    monkeypatch.setattr(member, "_drained", lambda: pytest.fail("it was asked"))
    assert offsets_of(member, 0) == []


def test_what_was_handled_is_settled_before_offsets_are_committed_again(made: Callable[..., GroupConsumer]) -> None:
    """C06: what the group says would be committed behind what is on its way, and set it back."""
    member, order = made(group_protocol="consumer"), list[str]()
    commit, committed = member.raw.commit, member.raw.committed
    member.trail = cast("Any", SimpleNamespace(settle=lambda: order.append("settled")))

    def noted(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*given: Any, **named: Any) -> Any:
            order.append(what)
            return call(*given, **named)

        return noting

    member.raw.committed, member.raw.commit = noted("asked", committed), noted("committed", commit)
    member._refresh.begin()
    assert member.fetch(10) is None
    assert order == ["settled", "asked", "committed"]


def test_what_took_half_a_session_to_answer_is_not_committed_again(
    made: Callable[..., GroupConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """M03: the group may have given the partitions to somebody who is further on."""
    member, clock = made(group_protocol="consumer"), Clock()
    monkeypatch.setattr("kafka_guarantees._offset_expiry.time", clock)
    known, half = member.raw.committed, member._settings.session_timeout / 2

    def slow(places: list[TopicPartition], within: float) -> Any:
        clock.now += half + seconds
        return known(places, within)

    member.raw.committed = slow
    for seconds in (0.1, -0.1):
        member._refresh.begin()
        assert member.fetch(10) is None
        assert member.raw.times("commit") == (seconds < 0)


def test_what_was_given_away_meanwhile_is_not_committed_again() -> None:
    """M03: the group has answered; but who asked was another member than the one that has the answer."""
    members, commits = [Membership(1, "me")], list[object]()

    def ask(_question: object) -> list[TopicPartition]:
        members[0] = Membership(2, "another")
        return [TopicPartition(*T0, 5)]

    refresh = Refresh(Places("g", "earliest"), late=60)
    refresh.commit({T0}, lambda: members[0], cast("Any", ask), lambda *given: commits.append(given))
    assert not commits


def test_brokers_that_do_not_answer_are_asked_once_more_what_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is time: nothing expires in a minute. But it is tried again, for a quiet partition would be read once more."""
    monkeypatch.setattr("kafka_guarantees._offset_expiry.AGAIN", 0.0)

    def ask(_question: object) -> None:
        raise NO_ANSWER

    refresh = Refresh(Places("g", "earliest"), late=60)
    refresh.commit({T0}, lambda: Membership(1, "me"), cast("Any", ask), lambda *_: None)
    assert refresh.due


def test_nothing_is_committed_again_by_who_stops_without_an_answer(
    made: Callable[..., GroupConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Y01: it would wait for the call that is on."""
    member = made(group_protocol="consumer")
    member.trail = cast("Any", SimpleNamespace(settle=lambda: pytest.fail("it was asked")))
    member._refresh.begin()
    monkeypatch.setattr(GroupClient, "gone_silent", True)
    assert member.fetch(10) is None
    assert not member.raw.times("committed")


def test_nothing_is_kept_of_a_batch_while_the_next_is_fetched(member: GroupConsumer) -> None:
    """C24: nor of what its messages were read to."""
    reading = Reading(None, None)
    polls(member, at(T0, 5), at(T0, 6))
    begun: list[int] = []
    begin = reading.begin
    reading.begin = lambda messages: begun.append(len(messages)) or begin(messages)  # type: ignore[method-assign,func-returns-value]
    batches = member.batches(Pace(1, 60), None, reading)
    first = next(batches)
    assert len(first.messages) == 1
    next(batches)
    assert not first.messages
    assert begun == [1, 0, 1]


class Flights:
    """Nothing is in flight."""

    failed = unfinished = False

    def wait(self) -> None:
        """It is over."""

    def serve(self) -> None:
        """There is nothing to serve."""

    def settle(self) -> dict[Partition, TopicPartition]:
        return {}


@pytest.mark.parametrize("transactional", [True, False])
def test_what_comes_again_though_nobody_sought_it_is_in_no_other_transaction(
    made: Callable[..., GroupConsumer], caplog: pytest.LogCaptureFixture, *, transactional: bool
) -> None:
    """M09: librdkafka gives a portion twice where a rebalance stops its partition in the moment in which it is given."""
    member = made(in_flight=Flights() if transactional else None)
    polls(member, at(T0, 5), at(T1, 7), at(T0, 5), at(T0, 6))
    batches = member.batches(Pace(1, 60), None, Reading(None, None))
    seen = [next(batches).messages[0].offset() for _ in range(3)]
    assert seen == ([5, 7, 6] if transactional else [5, 7, 5])
    assert ("1 messages are left out" in caplog.text) is transactional


def test_what_is_assigned_anew_with_others_comes_again(made: Callable[..., GroupConsumer]) -> None:
    """C13: the eager protocol knows only the whole. Its place counts from then on, whatever fails of the others behind it."""
    member, asked = made(in_flight=Flights()), [0]
    raw = member.raw

    def committed(places: list[TopicPartition], _within: float) -> list[TopicPartition]:
        numbers = {place.partition for place in places}
        asked[0] += numbers == {1}
        if numbers == {1} and asked[0] == 1:
            raise NO_ANSWER
        return [TopicPartition("t", n, 0 if n == 2 else 5, leader_epoch=7 if n == 1 else -1) for n in sorted(numbers)]

    raw.committed = committed
    polls(member, at(T0, 5), None, None, at(T0, 5), at(T0, 6))
    batches = member.batches(Pace(1, 60), None, Reading(None, None))
    batch = next(batches)
    member._assignment.owned.add(T2)  # it was assigned without a leader, and has one now
    member._assignment.wait({T2})
    member.unplace(batch.partitions)  # its transaction was aborted
    assert next(batches).messages[0].offset() == 5
    assert asked[0] > 0


def test_a_group_that_says_less_than_was_committed_for_long_is_joined_anew(
    made: Callable[..., GroupConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A former coordinator may never hear that it is none, and cannot let anybody in. Until then others are read."""
    clock = Clock()
    monkeypatch.setattr("kafka_guarantees._consumer.time", clock)
    monkeypatch.setattr("kafka_guarantees._positions.time.monotonic", clock.monotonic)
    member, joined = made(in_flight=Flights()), list[str]()
    monkeypatch.setattr(member, "rejoin", joined.append)
    member.raw.committed_at[T0] = 5
    member.claim([TopicPartition(*T0, 7)])
    member.unplace([T0])
    member.raw.comes = [at(T1, 3), at(T0, 5), at(T1, 4)]
    batch = member.fetch(1)
    assert batch is not None
    assert batch.partitions == {T1}
    assert member.fetch(1) is None
    assert not joined
    clock.now += 2.1
    assert member.fetch(1) is None
    assert joined == ["the group says less than this member has committed, or may have"]


@pytest.mark.parametrize("how", ["revoke", "lost"])
def test_what_was_committed_before_a_partition_was_given_away_says_nothing(member: GroupConsumer, how: str) -> None:
    """Else a group whose offsets were set back meanwhile would be waited for."""
    member.claim([TopicPartition(*T0, 7), TopicPartition(*T1, 7)])
    member.raw.rebalance(how, T0)()
    assert member._places._claimed == {T1: 7}


@pytest.mark.parametrize("strict", [True, False])
def test_what_a_member_has_committed_is_what_its_group_cannot_say_less_of(
    made: Callable[..., GroupConsumer], *, strict: bool
) -> None:
    """Where nothing may be handled twice. Elsewhere commits that arrive late may set a group back."""
    member = made(strict=strict)
    member.commit([TopicPartition(*T0, 7)])
    assert member._places._claimed == ({T0: 7} if strict else {})


def test_a_new_member_believes_its_group(made: Callable[..., GroupConsumer]) -> None:
    """To join is written. So it is where a run begins: what one before it has committed may have been set back."""
    member = made(strict=True)
    member.claim([TopicPartition(*T0, 7)])
    member._positions.outdated_since = 0.0
    member.rejoin("for the test")
    assert not member._places._claimed
    assert member._positions.outdated_since == float("inf")
    member.claim([TopicPartition(*T0, 7)])
    GroupConsumer(member._settings, member._lifecycle, ["t"], member._places).close()
    assert not member._places._claimed


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_given_back_comes_again(made: Callable[..., GroupConsumer], *, at_once: bool) -> None:
    """While it is in hand, or behind it: it was not handled, or its transaction was aborted."""
    member = made(in_flight=Flights())
    polls(member, at(T0, 5), None, None, at(T0, 5))
    batches = member.batches(Pace(1, 60), None, Reading(None, None))
    batch = next(batches)
    if at_once:
        member.rewind(batch.messages)
    else:
        member.unplace(batch.partitions)
    assert next(batches).messages[0].offset() == 5


@pytest.mark.parametrize("why", ["a stop", "a rebalance"])
def test_more_messages_are_not_waited_for(member: GroupConsumer, why: str) -> None:
    """C03: the group waits for this member, or its client for the end; ``max_wait`` may be minutes."""

    def happens() -> None:
        if why == "a stop":
            member._lifecycle.stop()
        else:
            member.raw.rebalance("assign")()

    member.raw.comes = [at(T0, 5), happens]
    began = time.monotonic()
    with member._lifecycle.running(lambda: None):
        batch = member.fetch(10, 60.0)
    assert time.monotonic() - began < DEADLINE
    assert (batch is not None) is (why == "a stop")


def test_more_messages_are_not_waited_for_while_others_wait_for_a_place(member: GroupConsumer) -> None:
    """C01: the brokers are asked first; what is in hand may come again by that."""
    member._assignment.wait({T1})
    left = polls(member, at(T0, 5), None, None, None)
    assert member.fetch(2, 60.0) is None
    assert len(left) == 2


def test_a_batch_that_waited_for_more_is_held_by_the_membership_of_now(member: GroupConsumer) -> None:
    """X03: brokers refuse the offsets of a generation that is over."""

    def later() -> None:
        member.raw.metadata = metadata(2)

    polls(member, None, at(T0, 5), later, None, at(T0, 6))
    with member._lifecycle.running(lambda: None):
        batch = member.fetch(2, 60.0)
    assert batch is not None
    assert len(batch.messages) == 2
    assert batch.metadata == metadata(2)


def damaged(offset: int) -> Message:
    return Message(topic="t", partition=0, offset=offset, error=KafkaError(KafkaError._BAD_MSG))


def test_what_came_before_an_error_is_handled_and_what_came_behind_it_is_not(
    member: GroupConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C01: the run ends at the damaged record, and whoever sets the offset behind it passes over nothing else."""
    failure = BrokerError("damaged")

    def heed(*_: object) -> None:
        raise failure

    monkeypatch.setattr(member._events, "heed", heed)
    member.raw.comes = [at(T0, 5), damaged(6), at(T0, 7)]
    batch = member.fetch(10)
    assert batch is not None
    assert [message.offset() for message in batch.messages] == [5]
    with pytest.raises(BrokerError, match="damaged"):
        member.fetch(10)
    member.raw.comes = [damaged(6), at(T0, 7)]
    with pytest.raises(BrokerError, match="damaged"):
        member.fetch(10)


def test_a_group_is_shared_where_others_have_some_of_its_partitions(member: GroupConsumer) -> None:
    """D11: then a store that others do not see is worth a warning; asked once after each rebalance."""
    count = 2

    def known(timeout: float) -> Any:
        return SimpleNamespace(topics={"t": SimpleNamespace(partitions=range(count))})

    member.raw.list_topics = known
    assert not member.shares()
    count = 3
    assert not member.shares()
    member.raw.rebalance("assign")()
    assert member.shares()
    assert not member.shares()


def test_a_wait_that_goes_wrong_leaves_nothing_paused(member: GroupConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    """C12: whoever goes on after it would read nothing any more."""
    batch = fetched(member, at(T0, 5))

    def fail(*_: object) -> None:
        raise BrokerError("for the test")

    monkeypatch.setattr(member, "serve", fail)
    with pytest.raises(BrokerError):
        member.keep_alive(batch, 0)
    assert member.raw.last("resume") == [T0, T1]


def test_a_stop_ends_the_wait_with_a_batch_in_hand(member: GroupConsumer) -> None:
    """L08: however long the next attempt is away."""
    batch = fetched(member, at(T0, 5))
    member.raw.comes = [member._lifecycle.stop]
    began = time.monotonic()
    member.keep_alive(batch, 60)
    assert time.monotonic() - began < DEADLINE


def test_what_is_not_owned_any_more_is_not_given_back(member: GroupConsumer) -> None:
    """C13: librdkafka refuses to pause it, which would end the run."""
    batch = fetched(member, at(T0, 5), at(T1, 5))
    member.raw.rebalance("revoke", T0)()
    member.rest(batch.messages, LONG)
    assert member.raw.last("pause") == [T1]


def test_a_lost_partition_may_come_back_in_a_moment(made: Callable[..., GroupConsumer]) -> None:
    """A run with until_idle would end while it joins again, with all that there is to read."""
    member = made(partition_assignment_strategy="cooperative-sticky")
    member.raw.rebalance("lost", T0, T1)()
    assert not member._drained()
    member.raw.rebalance("assign")()
    assert member._drained()


@pytest.mark.parametrize(("strategy", "waits"), [("range", True), ("cooperative-sticky", False)])
def test_a_classic_group_waits_for_its_slowest_member(
    made: Callable[..., GroupConsumer],
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    waits: bool,  # noqa: FBT001 - two rows
) -> None:
    """A run with until_idle would end meanwhile: for max.poll.interval.ms nothing may be assigned."""
    clock = Clock()
    monkeypatch.setattr("kafka_guarantees._consumer.time", clock)
    member = made(partition_assignment_strategy=strategy)
    member.raw.rebalance("revoke", T0, T1)()
    clock.now += 299
    assert member._drained() is not waits
    clock.now += 2
    assert member._drained()


def test_nobody_takes_over_while_the_brokers_do_not_answer(made: Callable[..., GroupConsumer]) -> None:
    """M02: to leave and to join would take its time, and the next start that is not answered be a reason for another."""
    member = made(strict=True)
    raw, asked = member.raw, unanswered(member)
    member.stray = "for the test"
    assert member.fetch(10) is None
    assert member.raw is raw
    assert asked


def test_nobody_joins_anew_only_to_leave(made: Callable[..., GroupConsumer]) -> None:
    """M02: nothing is handled in a client that is to stop."""
    member = made(strict=True)
    raw, member.stray = member.raw, "for the test"
    member._lifecycle.stop()
    assert member.fetch(10) is None
    assert member.raw is raw


def test_nothing_is_handled_while_a_start_may_still_be_on_its_way(made: Callable[..., GroupConsumer]) -> None:
    """M02: not while it is unknown where another partition goes on, either: its first try may come behind what is committed."""
    member = made(strict=True, partition_assignment_strategy="cooperative-sticky", retry_backoff_ms=1)
    raw, known, commit = member.raw, member.raw.committed, member.raw.commit

    def committed(places: list[TopicPartition], within: float) -> Any:
        if {place.partition for place in places} == {0}:
            raise NO_ANSWER
        return known(places, within)

    def slow(**given: Any) -> Any:
        time.sleep(0.02)
        return commit(**given)

    raw.committed, raw.commit = committed, slow
    member.unplace([T0])
    for comes in ([raw.rebalance("assign", T2)], [at(T2, 0)]):
        raw.comes = comes
        assert member.fetch(10) is None
        assert raw.last("incremental_assign") == [T2]
    assert member.raw is raw
    raw.committed = known
    assert member.fetch(10) is None
    assert member.raw is not raw, "a new member goes on, from what is committed"


def test_who_has_taken_over_does_not_commit_again_what_it_finds(made: Callable[..., GroupConsumer]) -> None:
    """M02: where commits take their time, that would be a reason for another to take over, and so on for ever."""
    member = made(group_protocol="consumer", strict=True)
    member._refresh = Refresh(member._places, 60)
    member.rejoin("for the test")
    member.raw.committed_at = {T0: 5}
    member.raw.rebalance("assign", T0)()
    assert not member._refresh.due


def test_the_collector_works_again_when_a_member_has_left(member: GroupConsumer) -> None:
    """C24: an interrupt may have come at the edge of its rest."""
    before = gc.get_threshold()
    try:
        with collector_rests:
            member.close()
            assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*before)


# -- commits ---------------------------------------------------------------------------------------------------------------


def test_a_topic_that_was_deleted_does_not_hold_up_the_others(
    made: Callable[..., GroupConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C06: a request with it is refused as a whole. At most once nothing is handled that is not committed."""
    gone = TopicPartition("gone", 0, 7)

    def commit(*, offsets: list[TopicPartition], asynchronous: bool) -> list[TopicPartition]:
        assert not asynchronous
        sent.append([(place.topic, place.offset) for place in offsets])
        if any(place.topic == "gone" for place in offsets):
            raise KafkaException(MISSING)
        return offsets

    for strict in (False, True):
        member, sent = made(strict=strict), list[list[tuple[str, int]]]()
        member.raw.commit = commit
        monkeypatch.setattr(member._topics, "deleted", lambda topic: topic == "gone")
        if strict:
            with pytest.raises(BrokerError):
                member.commit([gone, TopicPartition("t", 0, 6)])
            assert len(sent) == 1
        else:
            member.commit([gone, TopicPartition("t", 0, 6)])
            assert sent == [[("gone", 7), ("t", 6)], [("t", 6)]]


@pytest.mark.parametrize("how", ["commit", "send_commit"])
def test_how_a_group_began_is_said_with_the_next_commits(member: GroupConsumer, how: str) -> None:
    """C11: a member that begins with it would read all that its partitions hold, though start is "latest"."""
    said = f"kafka-guarantees began with 2 partitions at {time.time():.0f}"
    sent: list[TopicPartition] = []

    def commit(*, offsets: list[TopicPartition], asynchronous: bool) -> list[TopicPartition]:
        assert asynchronous is (how == "send_commit")
        sent.extend(offsets)
        return offsets

    member._places._begun[T0] = said
    member.raw.commit = commit
    getattr(member, how)([TopicPartition(*T0, 6, leader_epoch=4), TopicPartition(*T1, 6, "by an inbox")])
    assert [(place.metadata, place.offset) for place in sent] == [(said, 6), ("by an inbox", 6)]
    assert sent[0].leader_epoch == 4


def test_what_an_inbox_says_with_a_commit_stays(member: GroupConsumer) -> None:
    """D07: by it an inbox knows its own, and that another database is not the right one."""
    member._places._begun[T0] = f"kafka-guarantees began with 2 partitions at {time.time():.0f}"
    [place] = member._places.marked([TopicPartition(*T0, 6, "by an inbox")])
    assert place.metadata == "by an inbox"


def test_a_commit_that_was_refused_as_a_whole_is_an_error(member: GroupConsumer) -> None:
    """C06: the answer says nothing of its partitions then."""
    with pytest.raises(BrokerError, match="committing offsets failed"):
        member.check_commit(KafkaError(KafkaError.REQUEST_TIMED_OUT), [TopicPartition(*T0, 6)])
    assert T0 not in Places("g", "earliest")._seen


@pytest.mark.parametrize(("usual", "stray"), [(0.0, True), (2.99, False)])
def test_what_is_usual_is_no_reason_to_join_anew(
    made: Callable[..., GroupConsumer],
    monkeypatch: pytest.MonkeyPatch,
    usual: float,
    stray: bool,  # noqa: FBT001 - two rows
) -> None:
    """M02: the network is slow, and each new member would find the same."""
    member, clock = made(strict=True), Clock()

    def slow(_places: object) -> None:
        clock.now += 3.0

    monkeypatch.setattr("kafka_guarantees._consumer.time", clock)
    monkeypatch.setattr(member, "_check_commit", slow)
    member._commit([TopicPartition(*T0, 5)], (usual,))
    assert bool(member.stray) is stray


@pytest.mark.parametrize(
    ("seconds", "recent", "twice"),
    [(0.81, (0.0,), True), (0.81, (0.4, 9.0), False), (0.95, (0.4, 9.0), True), (0.81, (), True), (0.4, (), False)],
)
def test_a_commit_may_have_been_sent_twice_after_a_fifth_less_than_the_backoff(
    seconds: float,
    recent: tuple[float, ...],
    twice: bool,  # noqa: FBT001 - a table
) -> None:
    """M02: librdkafka takes a fifth more or less. One slow answer among the last is no measure of the network."""
    assert sent_twice(seconds, recent, 1.0) is twice


def test_who_stops_asks_nobody_where_to_go_on(member: GroupConsumer) -> None:
    """What is given back is fetched by the next run: to ask would hold up the end."""
    member._lifecycle.stop()
    member.rewind([at(T0, 5)])
    assert not member.raw.times("committed")
    assert member._assignment.unplaced == {T0}


# -- rebalances ------------------------------------------------------------------------------------------------------------


class InTheAir:
    """Stands for transactions in flight. Notes who owned what while they were waited for."""

    def __init__(self, *interrupts: BaseException) -> None:
        self.failed = self.unfinished = False
        self.interrupts = list(interrupts)
        self.owned: list[set[Partition]] = []
        self.assignment: Assignment | None = None
        self.again: set[Partition] = set()

    def serve(self) -> None:
        """There is nothing to serve."""

    def wait(self) -> None:
        if self.assignment is not None:
            self.owned.append(set(self.assignment.owned))
        if self.interrupts:
            raise self.interrupts.pop(0)

    def settle(self) -> set[Partition]:
        return self.again


@pytest.mark.parametrize("interrupts", [(), (KeyboardInterrupt(),)])
@pytest.mark.parametrize("kind", ["assign", "revoke", "lost"])
def test_a_rebalance_waits_for_what_is_in_flight(
    member: GroupConsumer, kind: str, interrupts: tuple[BaseException, ...]
) -> None:
    """X12: nothing is given away before it has ended, whatever signal handlers raise, which is raised after that."""
    flights: Any = InTheAir(*interrupts)
    member._in_flight, flights.assignment = flights, member._assignment
    member.raw.comes = [member.raw.rebalance(kind, T2 if kind == "assign" else T1)]
    if interrupts:
        with pytest.raises(KeyboardInterrupt):
            member.fetch(10)
    else:
        member.fetch(10)
    assert flights.owned == [{T0, T1}] * (1 + len(interrupts))
    assert member._assignment.owned == ({T0, T1, T2} if kind == "assign" else {T0})


def test_who_has_something_in_flight_has_not_read_all(member: GroupConsumer) -> None:
    """X13: it may be aborted, and its messages come again: a run with until_idle would end without them."""
    ends(member, 0)
    assert member._drained()
    flights: Any = InTheAir()
    member._in_flight, flights.unfinished = flights, True
    assert not member._drained()


def test_what_failed_in_flight_is_fetched_again_before_anything_else(member: GroupConsumer) -> None:
    """X13: behind it nothing is handled."""
    flights: Any = InTheAir()
    member._in_flight, flights.failed, flights.again = flights, True, {T0}
    member.raw.comes = [at(T1, 5)]
    batch = member.fetch(10)
    assert [what for what, _ in member.raw.log] == ["committed", "seek"]
    assert member.raw.last("seek") == [T0]
    assert batch is not None


@pytest.mark.parametrize("problem", [BrokerError("the first"), KeyboardInterrupt()])
def test_a_callback_keeps_what_must_be_raised(member: GroupConsumer, problem: BaseException) -> None:
    """C08: nothing is raised into librdkafka, nor forgotten; and of several problems the first is the cause."""

    def fail(error: BaseException) -> None:
        raise error

    member.trail = cast("Any", SimpleNamespace(revoked=lambda _gone: fail(problem)))
    member.raw.resume = lambda _places: fail(BrokerError("the second"))
    member.raw.comes = [member.raw.rebalance("revoke", T1)]
    with pytest.raises(type(problem)) as raised:
        member.fetch(10)
    assert raised.value is problem
    assert member._assignment.owned == {T0}


def test_an_assignment_is_a_rebalance_as_well(member: GroupConsumer) -> None:
    """C03: what is taken from there on may be of another assignment, also where nothing was revoked before it."""
    before = member._assignment.rebalances
    member.raw.rebalance("assign", T2)()
    assert member._assignment.rebalances > before


# -- places ----------------------------------------------------------------------------------------------------------------


def test_an_inbox_that_has_handled_all_is_at_the_end() -> None:
    """It is not beyond it: the next offset is that of the message to come."""
    brokers, places = Brokers(), Places("g", "earliest")
    places.stored = Stored(lambda _partitions: {T0: 90}, "mark")
    assert of(places, brokers, 0) == {0: 90}


@pytest.mark.parametrize("ahead", [TOGETHER + 5, -TOGETHER - 5])
def test_how_a_group_began_is_said_and_heard_for_a_while(monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    """C11, M05: a partition without an offset has lost it later, and what came since must not be skipped. Clocks differ."""
    brokers, first = Brokers(), Places("g", "latest")
    brokers.remembers = True
    assert of(first, brokers, 0) == {0: 90}
    [place] = first.marked([TopicPartition(*T0, 91)])
    assert place.metadata
    now = time.time()
    monkeypatch.setattr("kafka_guarantees._places.time", SimpleNamespace(time=lambda: now + ahead))
    assert of(Places("g", "latest"), brokers, 1) == {1: 10}
    [place] = first.marked([TopicPartition(*T0, 92)])
    assert not place.metadata


def test_a_start_at_the_end_stays_one_until_it_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """M05, C11: its partition had no leader for a while, and then no commit was answered. Others began long ago by then."""
    brokers, places, now = Brokers(), Places("g", "latest"), time.time()
    brokers.remembers = True
    brokers.without_leader = {1}
    assert of(places, brokers, 0, 1) == {0: 90}
    monkeypatch.setattr("kafka_guarantees._places.time", SimpleNamespace(time=lambda: now + TOGETHER + 1))
    brokers.without_leader.clear()
    commit = brokers.commit

    def nobody(places: Iterable[TopicPartition]) -> None:
        raise NO_ANSWER

    brokers.commit = nobody  # type: ignore[method-assign]
    with pytest.raises(KafkaException):
        of(places, brokers, 1)
    brokers.commit = commit  # type: ignore[method-assign]
    assert of(places, brokers, 1) == {1: 90}


def test_what_has_its_place_is_read_while_brokers_do_not_say_it_again(made: Callable[..., GroupConsumer]) -> None:
    """The eager protocol assigns the whole: for one that waits all others are asked for, and read on where that fails."""
    member = made()
    known, answers = member.raw.committed, list[bool]()

    def one_answer(places: list[TopicPartition], within: float) -> Any:
        if len(places) > 1:
            raise NO_ANSWER
        answers.append(True)
        return known(places, within)

    member.raw.committed_at[T2] = 7
    member._assignment.assign({T2})
    member._assignment.wait({T2})
    member.raw.committed = one_answer
    for offset in (5, 6, 7):
        batch = fetched(member, at(T0, offset))
        assert [message.offset() for message in batch.messages] == [offset]
    assert len(answers) == 3
    assert member._assignment.waiting == {T2}
