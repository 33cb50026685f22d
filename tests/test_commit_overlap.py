"""Commits that trail behind handling: what is in flight, what is waited for, and what a rebalance or an error finds."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from kafka_guarantees import (
    AtLeastOnce,
    AuthorizationError,
    BrokerError,
    DeliveryError,
    HandlerError,
    KafkaGuaranteesError,
    Record,
)
from kafka_guarantees._assignment import Assignment
from kafka_guarantees._at_least_once_run import Run
from kafka_guarantees._batch import Batch
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._offsets import Membership
from kafka_guarantees._posted import Posted
from kafka_guarantees._trail import AGAIN, BEHIND, Portion, Trail
from kafka_guarantees.prove.proxy import API, Proxy
from kafka_guarantees.records import LOST

from .conftest import committed, fill, read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kafka_guarantees.testing.local_kafka import RunningKafka

ME = b"CGMDv2:" + (1).to_bytes(4, "little") + b"g\0me\0\0"
T0, T1 = ("t", 0), ("t", 1)
IDLE = 0.5  # seconds without a message that end a run here


# --- the rules, without a broker ----------------------------------------------------------------------------------------


class Group:
    """Stands for the consumer, and the brokers behind it: commits are answered when the test says so."""

    def __init__(self) -> None:
        self.member = Membership(1, "me")
        self.sent: list[dict[tuple[str, int], int]] = []
        self.committed: dict[tuple[str, int], int] = {}
        self.waited = 0
        self.raw = self  # for committed()
        self.trail: Trail
        self.refusal: Exception | None = None
        self.gone_silent = False

    def membership(self) -> Membership:
        return self.member

    def send_commit(self, offsets: list[TopicPartition]) -> None:
        self.sent.append({(place.topic, place.partition): place.offset for place in offsets})

    def commit(self, offsets: Iterable[TopicPartition]) -> None:
        self.waited += 1
        self.send_commit(list(offsets))
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None
            raise refusal
        self.arrive(-1)

    def arrive(self, number: int) -> None:
        """A commit takes effect."""
        for place, offset in self.sent[number].items():
            assert offset >= self.committed.get(place, 0), "the group's offset went back"
            self.committed[place] = offset

    def answer(self, number: int, error: KafkaError | None = None) -> None:
        """A commit is answered in a poll."""
        if error is None:
            self.arrive(number)
        self.trail.answered(error, [TopicPartition(*place, offset) for place, offset in self.sent[number].items()])

    def check_commit(self, error: KafkaError | None, _answer: list[TopicPartition]) -> None:
        if error is not None:
            denied = error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED
            raise (AuthorizationError if denied else BrokerError)(error.str())

    def committed_(self, places: list[TopicPartition], _timeout: float) -> list[TopicPartition]:
        return [TopicPartition(p.topic, p.partition, self.committed.get((p.topic, p.partition), -1001)) for p in places]


class Asked(Group):
    """What ``raw`` is for the trail."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def committed(self, places: list[TopicPartition], timeout: float) -> list[TopicPartition]:  # type: ignore[override]
        if self._group.sent:
            self._group.arrive(-1)  # sent before, on the same connection
        return self._group.committed_(places, timeout)


class Reports:
    """Stands for the producer: everything is reported on as soon as somebody waits for it."""

    def wait(self, posted: Posted, _give_up: Callable[[], bool]) -> int:
        while posted.unknown:
            posted.report(None, Message(topic="t", partition=0, offset=1))
        return 0


class Scene:
    """A trail with its surroundings."""

    def __init__(self) -> None:
        self.group = Group()
        self.failures: list[Any] = []
        self.lifecycle = Lifecycle("test")
        self.group.raw = Asked(self.group)
        producer: Any = Reports()
        self.trail = self.group.trail = Trail(
            self.group,  # type: ignore[arg-type]
            self.lifecycle,
            60.0,
            producer=lambda: producer,
            acknowledged=self.acknowledged,
        )

    def acknowledged(self) -> None:
        if self.failures:
            raise DeliveryError("a record was not written")

    def handled(self, *places: tuple[tuple[str, int], int], posted: Posted | None = None) -> Portion:
        """A batch of the present membership is handled up to these offsets."""
        offsets = {place: TopicPartition(*place, offset) for place, offset in places}
        batch = Batch([], ME, time.monotonic())
        batch.member = self.group.member
        portion = Portion(offsets, batch, posted, 1)
        self.trail.add(portion)
        self.trail._advance(self.group.member)  # as the next fetch does
        return portion


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_one_commit_is_in_flight_and_the_next_waits_for_its_answer(scene: Scene) -> None:
    """What is finished meanwhile is kept, and sent in one commit with all that is newer."""
    scene.handled((T0, 10))
    scene.handled((T0, 20), (T1, 5))
    assert scene.group.sent == [{T0: 10}]
    scene.group.answer(0)
    scene.trail.idle()
    assert scene.group.sent == [{T0: 10}, {T0: 20, T1: 5}]


def test_no_more_than_three_portions_trail_when_a_batch_is_handled(scene: Scene) -> None:
    """A crash repeats the three portions before the one in hand at most: where the answer takes longer it is waited for."""
    scene.handled((T0, 10))
    scene.trail.follow(scene.group.member)
    assert scene.group.waited == 0
    for offset in range(20, 100, 10):
        scene.handled((T0, offset))
        scene.trail.follow(scene.group.member)
        assert scene.group.committed.get(T0, 0) >= offset - BEHIND * 10


def test_a_commit_that_fails_again_and_again_is_logged_now_and_then(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """It is tried ten times a second, for as long as the group may wait for us."""
    scene.handled((T0, 10))
    refusals = [BrokerError("no coordinator")] * 3

    def commit(_offsets: Iterable[TopicPartition]) -> None:
        if refusals:
            raise refusals.pop()

    scene.group.commit = commit  # type: ignore[assignment,method-assign]
    scene.trail.settle()
    assert not refusals
    assert [record.getMessage() for record in caplog.records] == ["no coordinator"]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_commit_that_failed_is_sent_again_with_the_newest_offsets(scene: Scene, times: int) -> None:
    """C06: until it is answered well; and what was finished meanwhile goes with it."""
    scene.handled((T0, 10))
    scene.handled((T0, 20))
    for number in range(times):
        scene.group.answer(number, KafkaError(KafkaError.REQUEST_TIMED_OUT))
        assert len(scene.group.sent) == number + 1
        time.sleep(0.11)
        scene.trail.idle()
        assert scene.group.sent[-1] == {T0: 20}
    scene.group.answer(times)
    scene.trail.settle()
    assert scene.group.committed == {T0: 20}
    assert scene.group.waited == 0


@pytest.mark.parametrize("error", [None, KafkaError(KafkaError.REQUEST_TIMED_OUT)])
def test_an_answer_is_that_of_the_commit_it_names(scene: Scene, error: KafkaError | None) -> None:
    """on_commit also hears of commits that were waited for: an old answer says nothing of what is in flight."""
    scene.handled((T0, 10))
    scene.trail.settle()
    scene.handled((T0, 20))
    scene.trail.answered(error, [TopicPartition(*T0, 10)])
    time.sleep(0.11)
    scene.handled((T0, 30))
    assert scene.group.sent == [{T0: 10}, {T0: 10}, {T0: 20}]
    scene.trail.settle()
    assert scene.group.committed == {T0: 30}


def test_a_missing_right_ends_the_run(scene: Scene) -> None:
    """A commit that is refused for want of an ACL is raised, once, in the thread that runs."""
    scene.handled((T0, 10))
    scene.group.answer(0, KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED))
    with pytest.raises(AuthorizationError):
        scene.trail.follow(scene.group.member)


def test_nothing_is_sent_for_a_membership_that_has_ended(scene: Scene) -> None:
    """C09, X02: the brokers would take it, also from a member that was thrown out and has joined again."""
    posted = Posted([])
    posted.sent = 1
    scene.handled((T0, 10), posted=posted)
    scene.group.member = Membership(3, "me, again")
    posted.report(None, Message(topic="t", partition=0, offset=1))
    scene.trail.idle()
    scene.trail.settle()
    assert scene.group.sent == []


def test_offsets_wait_for_the_records_of_their_portion_only(scene: Scene) -> None:
    """P01: a portion is committed once its own records are acknowledged; and not before those in front of it."""
    first, second = Posted([]), Posted([])
    first.sent = second.sent = 2
    scene.handled((T0, 10), posted=first)
    scene.handled((T0, 20), posted=second)
    assert scene.group.sent == []
    for _ in range(2):
        second.report(None, Message(topic="t", partition=0, offset=1))
    for offset in range(30, 30 + 10 * BEHIND, 10):
        scene.handled((T0, offset))
    assert scene.group.sent == []
    scene.trail.follow(scene.group.member)
    assert scene.group.sent == [{T0: 20 + 10 * BEHIND}]


@pytest.mark.parametrize("end", ["follow", "idle", "settle"])
def test_nothing_is_committed_past_a_record_that_was_not_written(
    scene: Scene, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """P01, L03: also when everybody was told; what came before is committed as the run ends, and no rebalance is blamed."""
    good, bad = Posted([]), Posted(scene.failures)
    good.sent = bad.sent = 1
    scene.handled((T0, 10), posted=good)
    scene.handled((T0, 20), posted=bad)
    bad.fail(DeliveryError("too large"))
    with pytest.raises(DeliveryError):
        getattr(scene.trail, end)(*([scene.group.member] if end == "follow" else []))
    scene.failures.clear()
    scene.trail.leave()
    scene.trail.revoked({T0})  # as the consumer is closed
    assert scene.group.committed == {T0: 10}
    assert not caplog.records


def test_what_is_given_away_is_committed_before(scene: Scene) -> None:
    """C03: also where a commit is in flight, and newer offsets wait behind it."""
    scene.handled((T0, 10))
    scene.handled((T0, 20), (T1, 5))
    scene.trail.revoked({T0})
    assert scene.group.committed == {T0: 20, T1: 5}
    sent = len(scene.group.sent)
    scene.trail.settle()
    assert len(scene.group.sent) == sent


def test_nothing_is_committed_of_what_was_lost(scene: Scene) -> None:
    """C07: it is somebody else's by now; the rest is committed."""
    posted = Posted([])
    posted.sent = 1
    scene.handled((T0, 10), (T1, 5), posted=posted)
    scene.trail.lost({T0})
    scene.trail.follow(scene.group.member)
    posted.report(None, Message(topic="t", partition=0, offset=1))
    scene.trail.settle()
    assert scene.group.committed == {T1: 5}


@pytest.mark.parametrize("problem", [BrokerError("it was not sent"), KeyboardInterrupt()])
def test_what_was_given_away_is_not_committed_later(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    """C03: also where committing it before did not go well: by the end of the run its next owner is further on."""
    scene.handled((T0, 10), (T1, 5))

    def refused(_offsets: list[TopicPartition]) -> None:
        raise problem

    with monkeypatch.context() as patch:
        patch.setattr(scene.group, "send_commit", refused)
        patch.setattr(scene.trail, "_arrived", lambda _count: False)
        with pytest.raises(type(problem)):
            scene.trail.revoked({T0})
    scene.group.committed[T0] = 30
    scene.trail.leave()
    assert scene.group.committed == {T0: 30, T1: 5}


def test_a_refusal_while_all_is_settled_is_tried_again(scene: Scene) -> None:
    """C06: the brokers may be in trouble for a moment."""
    scene.handled((T0, 10))
    scene.group.refusal = BrokerError("not now")
    scene.trail.settle()
    assert scene.group.committed == {T0: 10}
    assert scene.group.waited == 2


# --- on a broker ----------------------------------------------------------------------------------------------------------


def numbers(count: int) -> list[bytes]:
    return [str(number).encode() for number in range(count)]


def set_back(scene: Scene) -> None:
    """The first commit is sent again, since its connection was lost: it takes effect behind a newer one."""
    scene.handled((T0, 10))
    scene.handled((T0, 20))
    scene.trail.settle()
    assert scene.group.committed == {T0: 20}
    scene.group.committed[T0] = 10
    scene.trail.answered(None, [TopicPartition(*T0, 10)])


def refuse_and_go_on(scene: Scene) -> None:
    scene.trail.idle()
    scene.group.answer(-1, KafkaError(KafkaError.REQUEST_TIMED_OUT))
    time.sleep(AGAIN)
    scene.trail.idle()


def refuse_at_the_end(scene: Scene) -> None:
    """What was committed once more is on its way when the run ends, and is refused then."""
    scene.trail.idle()
    sent = len(scene.group.sent) - 1

    class Raw(Asked):
        def poll(self, _timeout: float) -> None:
            self._group.answer(sent, KafkaError(KafkaError.REQUEST_TIMED_OUT))

    scene.group.raw = Raw(scene.group)
    scene.trail.end()


GOES_ON: dict[str, Callable[[Scene], object]] = {
    "idle": lambda scene: scene.trail.idle(),
    "follow": lambda scene: scene.trail.follow(scene.group.member),
    "settle": lambda scene: scene.trail.settle(),
    "leave": lambda scene: scene.trail.leave(),
    "end": lambda scene: scene.trail.end(),
    "revoked": lambda scene: scene.trail.revoked({T0}),
    "refused": refuse_and_go_on,
    "refused at the end": refuse_at_the_end,
}


@pytest.mark.parametrize("how", GOES_ON)
def test_a_group_that_was_set_back_is_set_right(scene: Scene, how: str) -> None:
    """C06: with the next commit, whoever makes it; and one is made for it alone."""
    set_back(scene)
    GOES_ON[how](scene)
    assert scene.group.sent[-1] == {T0: 20}
    assert len(scene.group.sent) >= 3
    if scene.group.committed != {T0: 20}:
        scene.group.answer(-1)
    sent = len(scene.group.sent)
    scene.trail.idle()
    scene.trail.end()
    assert len(scene.group.sent) == sent, "once is enough"


@pytest.mark.parametrize("how", ["idle", "follow", "settle", "leave", "end", "revoked"])
def test_who_is_no_member_sets_nothing_right(scene: Scene, how: str) -> None:
    """Its partitions may be somebody else's, who has committed more."""
    set_back(scene)
    scene.group.member = Membership(-1, "")
    GOES_ON[how](scene)
    assert len(scene.group.sent) == 2


def test_a_commit_of_a_rebalance_that_arrives_late_is_noticed(scene: Scene) -> None:
    """A partition is given away, another is kept."""
    scene.handled((T0, 10), (T1, 5), posted=Posted([]))
    scene.group.answer(-1)
    scene.handled((T0, 20), (T1, 6))
    scene.trail._arrived = lambda count: False  # type: ignore[method-assign] # nobody knows
    scene.trail.revoked({T1})
    scene.handled((T0, 30))
    scene.trail.settle()
    scene.group.committed[T0] = 20
    scene.trail.answered(None, [TopicPartition(*T0, 20), TopicPartition(*T1, 6)])
    scene.trail.idle()
    assert scene.group.sent[-1] == {T0: 30}


@pytest.mark.parametrize("meanwhile", ["nothing", "a rebalance", "a freeze"])
def test_the_membership_is_asked_for_before_a_message_is_waited_for(monkeypatch: pytest.MonkeyPatch, meanwhile: str) -> None:
    """Asking takes 0.1 ms, for which the message would wait. After a rebalance, or a freeze, it is asked again (M03)."""
    assignment = Assignment()
    callbacks = SimpleNamespace(raise_interrupt=lambda: None)
    stub = SimpleNamespace(_assignment=assignment, _problem=None, _callbacks=callbacks, _in_flight=None)
    now, message, calls = [100.0], object(), list[str]()

    class Raw:
        def poll(self, wait: float) -> object:
            calls.append("poll")
            if not wait:
                return None
            assignment.rebalances += meanwhile == "a rebalance"
            now[0] += 5.0 if meanwhile == "a freeze" else wait
            return message

        def consume(self, _count: int, _wait: float) -> list[object]:
            return [message]

        def consumer_group_metadata(self) -> bytes:
            calls.append("asked")
            return ME

    stub.raw = Raw()
    monkeypatch.setattr("kafka_guarantees._consumer.time", SimpleNamespace(monotonic=lambda: now[0]))
    taken = GroupConsumer._take(stub, 10, 0.1, lambda: calls.append("idle"))  # type: ignore[arg-type]
    assert taken == ([message] * 2, assignment.rebalances, ME if meanwhile == "nothing" else None)
    assert calls == ["poll", "idle", "asked", "poll"]


@pytest.fixture
def trailing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many portions trail behind, whenever a batch is about to be handled."""
    counts, follow = list[int](), Trail.follow

    def followed(trail: Trail, member: Membership) -> None:
        follow(trail, member)
        counts.append(len(trail._portions))

    monkeypatch.setattr(Trail, "follow", followed)
    return counts


@pytest.mark.broker
def test_the_next_batch_is_handled_while_a_commit_is_unanswered(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """Answers take two seconds: the next three batches begin at once, the fifth when the first is committed."""
    topic, group, began, seen = kafka_topic(), fresh("group"), dict[int, float](), dict[int, int]()
    fill(kafka.bootstrap, topic, numbers(50))
    waiting = threading.Event()
    with Proxy(kafka.bootstrap) as proxy, AtLeastOnce({"bootstrap.servers": proxy.bootstrap, "group.id": group}) as client:

        def handler(message: Message) -> None:
            number = message.offset() or 0
            if number % 10 == 0:
                began[number] = time.monotonic()
                seen[number] = committed(kafka.bootstrap, group, topic)[0]
            if number == 0:
                waiting.set()
                assert slow.wait(20)

        slow = threading.Event()
        runner = threading.Thread(target=client.run, args=([topic], handler), kwargs={"max_batch": 10, "until_idle": 2 * IDLE})
        runner.start()
        assert waiting.wait(20)
        with proxy.delay(1):
            slow.set()
            deadline = time.monotonic() + 20
            while 40 not in began and time.monotonic() < deadline:
                time.sleep(0.01)
        runner.join(30)
    assert began[30] - began[0] < 1.5
    assert seen[30] <= 10, "the first commit may have arrived, after a second; no other is sent before its answer"
    assert seen[40] >= 10
    assert committed(kafka.bootstrap, group, topic) == [50]


@pytest.mark.broker
@pytest.mark.parametrize("protocol", ["range", "cooperative-sticky", "consumer"])
def test_a_second_member_begins_exactly_behind_what_was_handled(
    protocol: str,
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    fresh: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """C03: the commit in flight is lost, and a partition is given away: it is committed before, and nothing comes twice."""
    topic, handled, lost = kafka_topic(partitions=2), list[tuple[int | None, int | None]](), list[object]()
    fill(kafka.bootstrap, topic, numbers(100), partitions=2)
    own = {"group.protocol": "consumer"} if protocol == "consumer" else {"partition.assignment.strategy": protocol}
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("group"), **own}
    send = GroupConsumer.send_commit

    def sending(self: GroupConsumer, offsets: list[TopicPartition]) -> None:
        if sum(place.offset for place in offsets) == 100 and not lost:
            lost.append(offsets)  # the last of the first member, before anything else happens
        else:
            send(self, offsets)

    monkeypatch.setattr(GroupConsumer, "send_commit", sending)
    others = threading.Event()

    def handler(message: Message) -> None:
        handled.append((message.partition(), message.offset()))

    with AtLeastOnce(config) as one, AtLeastOnce(config) as two:
        runs = [
            threading.Thread(target=client.run, args=([topic], handler), kwargs={"max_batch": 1000}) for client in (one, two)
        ]
        runs[0].start()
        deadline = time.monotonic() + 30
        while len(handled) < 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        runs[1].start()
        others.wait(4.0 if protocol == "range" else 6.0)
        fill(kafka.bootstrap, topic, numbers(100), partitions=2)
        while len(handled) < 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        others.wait(IDLE)
        one.stop()
        two.stop()
        for run in runs:
            run.join(10)
    assert lost
    assert sorted(handled) == [(partition, offset) for partition in (0, 1) for offset in range(100)]
    assert committed(kafka.bootstrap, config["group.id"], topic, 2) == [100, 100]


@pytest.mark.broker
@pytest.mark.parametrize("produces", [0, 1])
def test_everything_before_a_failure_is_committed(
    produces: int, kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """L01: the batches before it, whose commits were under way, and what came before it in its own batch."""
    topic, target, group = kafka_topic(), kafka_topic(), fresh("group")
    fill(kafka.bootstrap, topic, numbers(20))

    def handler(message: Message) -> list[Record]:
        if message.offset() == 12:
            raise ValueError("twelve")
        return [Record(target, message.value())] * produces

    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": group}, retry=None) as client:
        with pytest.raises(HandlerError):
            client.run([topic], handler, max_batch=5)
        assert committed(kafka.bootstrap, group, topic) == [12]
    if produces:
        assert values(read_all(kafka.bootstrap, target)) == sorted(numbers(12))


@pytest.mark.broker
def test_an_answer_that_is_lost_costs_nothing(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """C06: the commit arrives, its answer does not, and the connection is gone: nothing is handled twice, all is committed."""
    topic, group, handled = kafka_topic(), fresh("group"), list[int | None]()
    fill(kafka.bootstrap, topic, numbers(50))
    with Proxy(kafka.bootstrap) as proxy, AtLeastOnce({"bootstrap.servers": proxy.bootstrap, "group.id": group}) as client:
        dropping: list[Any] = []

        def handler(message: Message) -> None:
            handled.append(message.offset())
            if message.offset() == 15:
                dropping.append(proxy.drop_responses({API["OffsetCommit"]}))

        client.run([topic], handler, max_batch=10, until_idle=2 * IDLE)
        dropping[0].wait(1)
    assert handled == list(range(50))
    assert committed(kafka.bootstrap, group, topic) == [50]


@pytest.mark.broker
@pytest.mark.parametrize("stops", [False, True])
def test_a_commit_that_arrives_late_does_not_set_the_group_back(
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    fresh: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    stops: bool,
) -> None:
    """C06: librdkafka sends a commit once more, behind a newer one that was waited for: that is committed once more, too."""
    topic, group = kafka_topic(), fresh("group")
    fill(kafka.bootstrap, topic, numbers(50))
    late: list[list[TopicPartition]] = []
    true_send, true_commit = GroupConsumer.send_commit, GroupConsumer.commit
    arrived: list[int] = []

    def behind(consumer: GroupConsumer, offsets: Iterable[TopicPartition]) -> None:
        if late and [place.offset for place in offsets] == [50]:
            places = late.pop()
            arrived.append(places[0].offset)
            true_send(consumer, places)

    def send_commit(consumer: GroupConsumer, offsets: list[TopicPartition]) -> None:
        if not late and not arrived:
            late.append(offsets)
        else:
            true_send(consumer, offsets)
            behind(consumer, offsets)

    def commit(consumer: GroupConsumer, offsets: Iterable[TopicPartition]) -> None:
        offsets = list(offsets)
        true_commit(consumer, offsets)
        behind(consumer, offsets)

    monkeypatch.setattr(GroupConsumer, "send_commit", send_commit)
    monkeypatch.setattr(GroupConsumer, "commit", commit)
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": group}) as client:

        def handler(message: Message) -> None:
            if stops and message.offset() == 49:
                client.stop()

        client.run([topic], handler, max_batch=10, until_idle=IDLE)
    assert arrived == [10]
    assert committed(kafka.bootstrap, group, topic) == [50]


@pytest.mark.broker
def test_a_break_in_the_next_batch_does_not_undo_the_last_one(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a run ends, what is finished is committed: here by an exception that is no Exception, with a commit under way."""
    topic, group = kafka_topic(), fresh("group")
    fill(kafka.bootstrap, topic, numbers(20))
    monkeypatch.setattr(GroupConsumer, "send_commit", lambda *_: None)  # it takes for ever

    class Break(BaseException):
        pass

    def handler(message: Message) -> None:
        if message.offset() == 13:
            raise Break

    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": group}) as client, pytest.raises(Break):
        client.run([topic], handler, max_batch=10)
    assert committed(kafka.bootstrap, group, topic) == [10]


def test_a_callback_never_raises(scene: Scene) -> None:
    """C08: what goes wrong while partitions are given away is raised by the fetch, not into librdkafka."""

    class Broken:
        def revoked(self, _gone: object) -> None:
            raise KafkaException(KafkaError(KafkaError._FAIL))

        answered = lost = revoked

    consumer: Any = GroupConsumer.__new__(GroupConsumer)
    consumer.trail, consumer._problem = Broken(), None
    consumer._gone = lambda *_given, **_named: None
    consumer._on_revoke(None, [])
    assert isinstance(consumer._problem, KafkaException)
    consumer._problem = None
    consumer._on_commit(None, [])
    assert consumer._problem is not None


@pytest.mark.broker
def test_a_record_that_ended_a_run_does_not_hold_up_the_next_one(
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    fresh: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    trailing: list[int],
) -> None:
    """Commits of the next run trail two portions behind, as ever: what was refused before is nothing to them."""
    topic, target, group = kafka_topic(), kafka_topic(), fresh("group")
    fill(kafka.bootstrap, topic, numbers(40))
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": group}) as client:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "_soon", lambda _run, _batch: False)  # this batch is not one that trails
            with pytest.raises(DeliveryError):
                client.run([topic], lambda _message: [Record(target, bytes(2_000_000))], max_batch=5)
        client.run([topic], lambda message: [Record(target, message.value())], max_batch=5, until_idle=IDLE)
    assert max(trailing) <= BEHIND


@pytest.mark.broker
def test_a_report_that_an_interrupt_destroyed_does_not_end_the_next_run(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C01, P12: a signal handler raises in the delivery callback. The message was not committed, and comes again."""
    topic, target, group = kafka_topic(), kafka_topic(), fresh("group")
    fill(kafka.bootstrap, topic, numbers(40))
    true_report, reports = Posted.report, list[int]()

    def report(posted: Posted, error: KafkaError | None, message: Message) -> None:
        reports.append(1)
        if len(reports) == 3:
            raise KeyboardInterrupt
        true_report(posted, error, message)

    monkeypatch.setattr(Posted, "report", report)
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": group}) as client:

        def copy(message: Message) -> list[Record]:
            return [Record(target, message.value())]

        with pytest.raises(KeyboardInterrupt):
            client.run([topic], copy, max_batch=5, until_idle=IDLE)
        client.run([topic], copy, max_batch=5, until_idle=IDLE)
        client.flush()
    assert committed(kafka.bootstrap, group, topic) == [40]
    assert set(values(read_all(kafka.bootstrap, target))) == set(numbers(40))


@pytest.mark.broker
def test_records_that_are_acknowledged_are_not_remembered(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of months does not grow, also where every commit is waited for."""
    topic, target, group = kafka_topic(), kafka_topic(), fresh("group")
    fill(kafka.bootstrap, topic, numbers(40))
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": group}) as client:
        monkeypatch.setattr(Run, "_soon", lambda _run, _batch: False)
        client.run([topic], lambda message: [Record(target, message.value())], max_batch=5, until_idle=IDLE)
        assert client._producer is not None
        assert sum(len(posted._known) for posted in client._producer._open) <= 5


@pytest.mark.broker
def test_flush_does_not_wait_for_what_a_run_goes_on_sending(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """Nor does it take that for lost, although acknowledgements take longer than a lost report is waited for."""
    topic, target = kafka_topic(), kafka_topic()
    fill(kafka.bootstrap, topic, numbers(1))
    under_way, over, sent = threading.Event(), threading.Event(), list[None]()

    def handler(message: Message) -> Iterator[Record]:
        while not over.is_set():
            yield Record(target, message.value())
            sent.append(None)
            under_way.set()
            time.sleep(0.002)

    group = {"group.id": fresh("group")}
    with (
        ThreadPoolExecutor() as pool,
        Proxy(kafka.bootstrap) as proxy,
        AtLeastOnce({"bootstrap.servers": proxy.bootstrap, **group}) as client,
    ):
        run = pool.submit(client.run, [topic], handler, until_idle=IDLE)
        try:
            assert under_way.wait(30)
            with proxy.delay(LOST / 2 + 0.2):
                mine, began = client.produce(target, b"mine"), time.monotonic()
                client.flush()
                assert mine.done
                assert time.monotonic() - began < 3 * LOST
                for _ in range(10):  # at once: nothing of this thread is on its way
                    client.flush(0.1)
        finally:
            over.set()
        run.result()
    assert len(read_all(kafka.bootstrap, target)) == len(sent) + 1


@pytest.mark.broker
def test_a_run_goes_on_beside_a_thread_that_always_produces(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """It waits for what was produced by the end of a batch, and not for an instant in which nothing is on its way."""
    topic, target, side = kafka_topic(), kafka_topic(), kafka_topic()
    fill(kafka.bootstrap, topic, numbers(40))
    over = threading.Event()
    with Proxy(kafka.bootstrap) as proxy, AtLeastOnce({"bootstrap.servers": proxy.bootstrap, "group.id": fresh("g")}) as client:

        def produce() -> int:
            sent = 0
            while not over.wait(0.002):
                client.produce(side, b"x")
                sent += 1
            return sent

        with ThreadPoolExecutor() as pool:
            client.produce(side, b"first").result()
            with proxy.delay(0.05):
                producing, began = pool.submit(produce), time.monotonic()
                try:
                    client.run([topic], lambda message: [Record(target, message.value())], max_batch=5, until_idle=IDLE)
                    client.flush(5)
                    took = time.monotonic() - began
                finally:
                    over.set()
            assert producing.result() > 100 * took  # there always was something on its way
    assert took < 20
    assert len(read_all(kafka.bootstrap, target)) == 40


@pytest.mark.broker
def test_a_record_that_is_not_sent_yet_is_not_lost(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """Its thread asks the brokers about the partition first, for a second at most."""
    known, unknown = kafka_topic(), kafka_topic()
    with Proxy(kafka.bootstrap) as proxy, AtLeastOnce({"bootstrap.servers": proxy.bootstrap}) as client:
        client.produce(known, b"x").result()
        with proxy.delay(0.6), ThreadPoolExecutor() as pool:
            producing = pool.submit(client.produce, unknown, b"x", partition=0)
            time.sleep(0.1)
            client.flush()
            assert producing.result().offset == 0


@pytest.mark.broker
def test_a_stop_is_heard_while_brokers_do_not_answer_a_commit(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Y01: once a call was left without an answer nothing else is asked of the consumer, which would wait for that call."""
    monkeypatch.setattr("kafka_guarantees._lifecycle.STOP_GRACE", 1.3)
    topic, handled, behind = kafka_topic(), list[int | None](), threading.Event()
    fill(kafka.bootstrap, topic, numbers(50))
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("group")}
    with Proxy(kafka.bootstrap) as proxy, AtLeastOnce({**config, "bootstrap.servers": proxy.bootstrap}) as client:

        def handler(message: Message) -> None:
            handled.append(message.offset())
            if message.offset() == 4:
                behind.set()
                assert silent.wait(20)

        silent = threading.Event()
        runner = threading.Thread(target=client.run, args=([topic], handler), kwargs={"max_batch": 5})
        runner.start()
        assert behind.wait(20)
        with proxy.delay(15):
            silent.set()
            time.sleep(0.5)  # by now the commit of the first of these is waited for
            stopped = time.monotonic()
            client.stop()
            runner.join(20)
            took = time.monotonic() - stopped
    assert handled == list(range(5 + 5 * BEHIND))
    assert took < 5


@pytest.mark.broker
def test_what_was_finished_before_a_close_that_does_not_wait_is_committed(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """A handler that takes longer than close() waits loses what is in hand, and not the batches before it."""
    topic, target, group, ended = kafka_topic(), kafka_topic(), fresh("group"), list[BaseException]()
    fill(kafka.bootstrap, topic, numbers(20))
    at_work, closed = threading.Event(), threading.Event()
    client = AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": group})

    def handler(message: Message) -> list[Record]:
        if message.offset() == 12:
            at_work.set()
            assert closed.wait(20)
        return [Record(target, message.value())]

    def run() -> None:
        try:
            client.run([topic], handler, max_batch=5)
        except BaseException as error:  # noqa: BLE001 - looked at below
            ended.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    assert at_work.wait(20)
    client.close(0.5)
    closed.set()
    runner.join(20)
    assert [type(error) for error in ended] == [KafkaGuaranteesError]
    assert committed(kafka.bootstrap, group, topic) == [10]


@pytest.mark.broker
def test_a_record_of_a_run_that_was_interrupted_does_not_hold_up_the_next_one(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], trailing: list[int]
) -> None:
    """Once flush() has told of it: the message comes again, and is handled anew."""
    topic, target = kafka_topic(), kafka_topic()
    fill(kafka.bootstrap, topic, numbers(40))

    def interrupted(_message: Message) -> Iterator[Record]:
        yield Record(target, bytes(2_000_000))
        raise KeyboardInterrupt

    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": fresh("group")}) as client:
        with pytest.raises(KeyboardInterrupt):
            client.run([topic], interrupted, max_batch=5)
        with pytest.raises(DeliveryError):
            client.flush()
        client.run([topic], lambda message: [Record(target, message.value())], max_batch=5, until_idle=IDLE)
    assert max(trailing) <= BEHIND
