"""KIP-848: a group without members forgets each offset whose commit is older than a limit. So members commit again."""

from __future__ import annotations

import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import OFFSET_END, Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from kafka_guarantees import AtLeastOnce, AtMostOnce, BrokerError, ExactlyOnce, StoreUnavailable
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._offset_expiry import Refresh
from kafka_guarantees._offsets import Membership
from kafka_guarantees._places import Places, Stored
from kafka_guarantees.testing import LocalKafka

from .conftest import fill, read_all
from .world import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from confluent_kafka import Message

    from kafka_guarantees.testing.local_kafka import RunningKafka

    from .world import World

CLASSES = pytest.mark.parametrize("guarantee", [AtMostOnce, AtLeastOnce, ExactlyOnce])
EXPIRED = 65.0  # seconds: brokers count in whole minutes


def _run(bootstrap: str, guarantee: type[Any], topic: str, protocol: str, *, idle: float) -> list[tuple[int, int]]:
    """Partitions and offsets of what one member handles."""
    handled: list[tuple[int, int]] = []

    def handler(message: Message) -> None:
        handled.append((message.partition() or 0, message.offset() or 0))

    config = {"bootstrap.servers": bootstrap, "group.id": f"group-{topic}", "group.protocol": protocol}
    if guarantee is ExactlyOnce:
        config["transactional.id"] = f"tx-{topic}"
    with guarantee(config, start="earliest", preflight="off") as client:
        client.run([topic], handler, until_idle=idle)
    return handled


def _commits(bootstrap: str, topic: str) -> list[tuple[int, int]]:
    """Partitions and offsets of all commits that the brokers have written down for the group, transactional ones as well."""
    found = []
    for record in read_all(bootstrap, "__consumer_offsets"):
        key, value = record.key() or b"", record.value()
        if struct.unpack_from(">h", key)[0] > 1 or value is None:
            continue  # not of an offset
        names, place = [], 2
        for _ in range(2):
            length = struct.unpack_from(">h", key, place)[0]
            names.append(key[place + 2 : place + 2 + length].decode())
            place += 2 + length
        if names == [f"group-{topic}", topic]:
            found.append((struct.unpack_from(">i", key, place)[0], struct.unpack_from(">q", value, 2)[0]))
    return found


class Group:
    """What it has committed, of one partition; and what is committed again, by a member that may be thrown out meanwhile."""

    def __init__(self) -> None:
        self.offset = 5
        self.takes = 0.0  # seconds, to answer
        self.member = Membership(1, "me")
        self.again: list[int] = []
        self.refusal: Exception | None = None

    def ask(self, question: Callable[[Any, float], Any]) -> Any:
        return question(self, 1.0)

    def committed(self, places: list[TopicPartition], _within: float) -> list[TopicPartition]:
        time.sleep(self.takes)
        return [TopicPartition(place.topic, place.partition, self.offset) for place in places]

    def commit(self, places: list[TopicPartition], recent: Collection[float]) -> None:
        assert min(recent) >= self.takes
        if self.refusal is not None:
            raise self.refusal
        self.again += [place.offset for place in places]

    def refresh(self, refresh: Refresh) -> None:
        refresh.commit({("t", 0)}, lambda: self.member, self.ask, self.commit)


def test_what_has_moved_since_is_not_committed_again() -> None:
    """It was committed. And of what nothing was ever committed, nothing is."""
    group, refresh = Group(), Refresh(Places("g", "earliest"), late=60)
    for offset in (5, 6, 6, -1001, -1001):
        group.offset = offset
        group.refresh(refresh)
    assert group.again == [5, 6]


@pytest.mark.parametrize(
    ("committed", "reached", "moved"),
    [(5, 5, [6]), (5, -1, [6]), (4, 5, []), (6, 5, []), (6, -1, []), (-1001, -1, [])],
    ids=["all is committed", "nothing came", "something is in hand", "at the end", "at the end, nothing came", "none"],
)
def test_an_offset_with_only_markers_behind_it_is_moved_to_the_end(committed: int, reached: int, moved: list[int]) -> None:
    """C11: retention takes the markers as well; then it would be before the log, though everything was handled."""
    group, refresh = Group(), Refresh(Places("g", "earliest"), late=60)
    group.offset = committed
    ends = {("t", 0): (reached, 6)}
    for _ in range(2):
        if behind := refresh.behind(ends):
            refresh.pass_markers(behind, lambda: group.member, group.ask, group.commit)
            group.offset = (group.again or [group.offset])[-1]
    assert group.again == moved
    assert bool(refresh.behind(ends)) is (not moved and committed < 6), "the brokers are not asked again where it is there"


def test_an_offset_is_not_moved_by_a_member_that_may_be_out() -> None:
    """M03: somebody else may be further on."""
    group, refresh = Group(), Refresh(Places("g", "earliest"), late=60)
    behind = {("t", 0): (5, 6)}
    members = iter([Membership(1, "me"), Membership(2, "another")])
    refresh.pass_markers(behind, lambda: next(members), group.ask, group.commit)
    assert not group.again
    group.refusal = BrokerError("away")
    refresh.pass_markers(behind, lambda: group.member, group.ask, group.commit)
    assert refresh.behind(behind), "it is tried again"


def test_where_messages_are_the_last_nobody_is_asked() -> None:
    """As in topics that nobody writes to in transactions."""
    refresh = Refresh(Places("g", "earliest"), late=60)
    assert not refresh.behind({("t", 0): (6, 6), ("t", 1): (7, 6)})
    assert not refresh.markers_due


@pytest.mark.broker
@CLASSES
def test_a_quiet_topic_of_transactions_outlives_its_retention(
    kafka: RunningKafka, kafka_topic: Callable[..., str], guarantee: type[Any]
) -> None:
    """C11: what is left of it behind the group's offset are markers. That these are gone too is not OffsetsLost."""
    topic = kafka_topic(partitions=1)
    with ExactlyOnce({"bootstrap.servers": kafka.bootstrap, "transactional.id": f"writer-{topic}"}) as writer:
        for number in range(2):
            with writer.transaction() as tx:
                tx.produce(topic, b"%d" % number, partition=0)
    assert len(_run(kafka.bootstrap, guarantee, topic, "classic", idle=0.5)) == 2
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    (deleted,) = admin.delete_records([TopicPartition(topic, 0, OFFSET_END)]).values()
    assert deleted.result().low_watermark == 4
    assert _run(kafka.bootstrap, guarantee, topic, "classic", idle=0.5) == []
    fill(kafka.bootstrap, topic, [b"2"])
    assert len(_run(kafka.bootstrap, guarantee, topic, "classic", idle=0.5)) == 1


def test_it_is_done_when_partitions_were_assigned_and_not_again_soon() -> None:
    """And not before."""
    group, refresh = Group(), Refresh(Places("g", "earliest"), late=60)
    assert not refresh.due
    refresh.begin()
    assert refresh.due
    group.refresh(refresh)
    assert not refresh.due


@pytest.mark.parametrize(("stored", "again"), [({("t", 0): 7}, []), ({}, [5]), ({("t", 1): 7}, [5])])
def test_what_is_stored_beside_the_effects_does_not_expire(stored: dict[tuple[str, int], int], again: list[int]) -> None:
    """C12: but a group that has moved to an inbox still lives by its own offsets, where nothing has come since."""
    group, places = Group(), Places("g", "earliest")
    places.stored = Stored(lambda partitions: {place: stored[place] for place in partitions if place in stored}, "mark")
    refresh = Refresh(places, late=60)
    refresh.begin()
    assert refresh.due
    group.refresh(refresh)
    assert group.again == again


def test_an_inbox_that_does_not_answer_is_asked_again() -> None:
    """A database that is away ends no run."""

    def away(_partitions: object) -> dict[tuple[str, int], int]:
        raise StoreUnavailable("it is away")

    group, places = Group(), Places("g", "earliest")
    places.stored = Stored(away, "mark")
    refresh = Refresh(places, late=60)
    refresh.begin()
    group.refresh(refresh)
    assert not group.again
    assert not refresh.due


@pytest.mark.parametrize("why", ["an answer that came late", "another membership"])
def test_what_may_be_another_ones_is_not_committed_again(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """M03: somebody else may have gone on from there, whom it would set back. It is tried again."""
    monkeypatch.setattr("kafka_guarantees._offset_expiry.SOON", 0.0)
    group, refresh = Group(), Refresh(Places("g", "earliest"), late=0.05)
    if why == "another membership":
        members = [Membership(1, "me"), Membership(2, "another")]
        refresh.commit({("t", 0)}, lambda: members.pop(0), group.ask, group.commit)
    else:
        group.takes = 0.1
        group.refresh(refresh)
    assert not group.again
    assert refresh.due


def test_to_commit_again_may_fail() -> None:
    """It is of no use to the messages in hand, and there is time to try again."""
    group, refresh = Group(), Refresh(Places("g", "earliest"), late=60)
    refresh.begin()
    group.refusal = BrokerError("no answer")
    group.refresh(refresh)
    assert not refresh.due


@pytest.mark.broker
@CLASSES
@pytest.mark.parametrize("protocol", ["consumer", "classic"])
def test_where_nothing_comes_the_offset_is_committed_again(
    guarantee: type[Any],
    protocol: str,
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once in REFRESH seconds, and where it has not moved. Groups of the classic protocol keep what they have read of late."""
    monkeypatch.setattr("kafka_guarantees._offset_expiry.REFRESH", 0.3)
    topic = kafka_topic(2)
    fill(kafka.bootstrap, topic, [b"%d" % number for number in range(10)], 2)
    assert len(_run(kafka.bootstrap, guarantee, topic, protocol, idle=2.0)) == 10
    before = len(_commits(kafka.bootstrap, topic))
    assert not _run(kafka.bootstrap, guarantee, topic, protocol, idle=2.0)
    again = _commits(kafka.bootstrap, topic)[before:]
    if protocol == "classic":
        assert not again
    else:
        assert again.count((0, 5)) >= 2  # when it was assigned, and later
        assert again.count((1, 5)) >= 2
        assert set(again) == {(0, 5), (1, 5)}


@pytest.mark.broker
def test_commits_that_take_a_while_do_not_keep_a_member_from_its_work(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """M02: one that may have been sent twice has a new member take over, which would find the same, and so on for ever."""
    here = world()
    here.fill(10)

    class Slow(Consumer):
        def commit(self, *args: Any, **options: Any) -> Any:
            time.sleep(0.4)
            return super().commit(*args, **options)

    took_over: list[str] = []
    rejoin = GroupConsumer.rejoin

    def counted(consumer: GroupConsumer, why: str) -> None:
        took_over.append(why)
        rejoin(consumer, why)

    monkeypatch.setattr(GroupConsumer, "rejoin", counted)
    monkeypatch.setattr("kafka_guarantees._group_client.Consumer", Slow)
    with here.client(group_protocol="consumer") as kafka:
        threading.Timer(10, kafka.stop).start()
        kafka.run([here.source], here.copy)
    assert here.committed() == [10]
    assert 1 <= len(took_over) <= 2  # by where it begins, and when that is committed again


@pytest.mark.broker
@pytest.mark.soak
@CLASSES
def test_a_quiet_partition_is_not_read_again_after_a_restart(guarantee: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It was: all that the partition still holds, since its offset was gone in the first moment without members."""
    monkeypatch.setattr("kafka_guarantees._offset_expiry.REFRESH", 5.0)
    settings = {"offsets.retention.minutes": 1, "offsets.retention.check.interval.ms": 500}
    with LocalKafka(config=settings) as kafka:
        kafka.create_topic("offers", 2)
        fill(kafka.bootstrap, "offers", [b"quiet"] * 10, 2)

        def keep_busy() -> None:
            until = time.monotonic() + EXPIRED
            while time.monotonic() < until:
                fill(kafka.bootstrap, "offers", [b"busy"])
                time.sleep(1)

        ended = in_thread(keep_busy)
        handled = _run(kafka.bootstrap, guarantee, "offers", "consumer", idle=5.0)
        assert ended() is None
        time.sleep(3)  # nobody is a member
        fill(kafka.bootstrap, "offers", [b"after"])
        again = _run(kafka.bootstrap, guarantee, "offers", "consumer", idle=5.0)
    assert len(handled) == len(set(handled)) >= 60
    assert len(again) == 1
