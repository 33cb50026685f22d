"""Guards of what a member of a group has in hand, one by one and without a broker.

Each is removed by a mutant that no other test would notice, or only one that takes its time with a broker.
"""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from confluent_kafka import OFFSET_INVALID, KafkaError, KafkaException, Message, TopicPartition

from kafka_guarantees import BrokerError, OffsetsLost
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._places import Places, Stored
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees._topics import Topics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kafka_guarantees._batch import Batch
    from kafka_guarantees._offsets import Partition

T0, T1 = ("t", 0), ("t", 1)
LONG = 3600.0  # seconds
REFUSED = KafkaError(KafkaError._TIMED_OUT)


def metadata(generation: int, member: str = "me") -> bytes:
    return b"CGMDv2:" + generation.to_bytes(4, "little", signed=True) + b"g\0" + member.encode() + b"\0\0"


def at(place: Partition, offset: int) -> Message:
    return Message(topic=place[0], partition=place[1], offset=offset)


class Raw:
    """Stands for the C consumer, and the group behind it: a poll brings what a test says, messages or a rebalance."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.comes: list[Message | Callable[[], object]] = []
        self.metadata = metadata(1)
        self.committed_at: dict[Partition, int] = {}
        self.log: list[tuple[str, list[Partition]]] = []
        self.member_ids: list[str] = []  # that it has one after the other, and then none
        self.heard: dict[str, Callable[..., None]] = {}

    def subscribe(self, _topics: list[str], **heard: Callable[..., None]) -> None:
        self.heard = heard

    def rebalance(self, kind: str, *places: Partition) -> Callable[[], object]:
        """What a poll calls: ``assign``, ``revoke`` or ``lost``."""
        return lambda: self.heard[f"on_{kind}"](self, [TopicPartition(*place) for place in places])

    def poll(self, _wait: float = 0) -> Message | None:
        while self.comes:
            coming = self.comes.pop(0)
            if isinstance(coming, Message):
                return coming
            coming()
        return None

    def consume(self, count: int, _wait: float) -> list[Message]:
        """Rebalances are served in between as well."""
        return [message for _ in range(count) if (message := self.poll()) is not None]

    def consumer_group_metadata(self) -> bytes:
        return self.metadata

    def memberid(self) -> str:
        return self.member_ids.pop(0) if self.member_ids else ""

    def committed(self, places: list[TopicPartition], _within: float) -> list[TopicPartition]:
        self._note("committed", places)
        found = {(p.topic, p.partition): self.committed_at.get((p.topic, p.partition), OFFSET_INVALID) for p in places}
        return [TopicPartition(*place, offset) for place, offset in found.items()]

    def offsets_for_times(self, places: list[TopicPartition], _within: float) -> list[TopicPartition]:
        return [TopicPartition(place.topic, place.partition, 0) for place in places]

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool) -> list[TopicPartition]:
        assert not asynchronous
        self._note("commit", offsets)
        return offsets

    def seek(self, place: TopicPartition) -> None:
        self._note("seek", [place])

    def __getattr__(self, name: str) -> Callable[..., None]:
        """``pause``, ``resume``, ``assign`` and the like are noted."""
        if name not in {"pause", "resume", "assign", "incremental_assign", "incremental_unassign", "unsubscribe", "close"}:
            raise AttributeError(name)
        return lambda places=(): self._note(name, places)

    def _note(self, what: str, places: Iterable[TopicPartition]) -> None:
        self.log.append((what, sorted((place.topic, place.partition) for place in places)))

    def last(self, what: str) -> list[Partition]:
        return [places for done, places in self.log if done == what][-1]

    def times(self, what: str) -> int:
        return sum(done == what for done, _ in self.log)


@contextmanager
def members(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GroupConsumer]]:
    """Makes members that own two partitions, committed at 5. With librdkafka's names for settings, ``_`` for dots."""
    monkeypatch.setattr("kafka_guarantees._group_client.Consumer", Raw)
    monkeypatch.setattr(Topics, "require", lambda *_, **__: None)
    made: list[GroupConsumer] = []

    def make(*, strict: bool = False, in_flight: Any = None, **config: object) -> GroupConsumer:
        given = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g", **{n.replace("_", "."): v for n, v in config.items()}}
        settings, places = resolve(Guarantee.AT_LEAST_ONCE, given), Places("g", "earliest")
        member = GroupConsumer(settings, Lifecycle("test"), ["t"], places, strict=strict, in_flight=in_flight)
        made.append(member)
        member.raw.committed_at = {T0: 5, T1: 5}
        member.raw.comes = [member.raw.rebalance("assign", T0, T1)]
        assert member.fetch(10) is None
        assert member.fetch(10) is None  # which resumes them
        member.raw.log.clear()
        return member

    yield make
    for member in made:
        member._client._caller.end()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GroupConsumer]]:
    """See ``members``."""
    with members(monkeypatch) as make:
        yield make


@pytest.fixture
def member(made: Callable[..., GroupConsumer]) -> GroupConsumer:
    return made()


def ends(member: GroupConsumer, offset: int) -> None:
    for place in (T0, T1):
        member._assignment.ends_at(place, offset)


def fetched(member: GroupConsumer, *messages: Message) -> Batch:
    batch = fetched_of(member, *messages)
    assert len(batch.messages) == len(messages)
    return batch


def fetched_of(member: GroupConsumer, *messages: Message) -> Batch:
    member.raw.comes = list(messages)
    batch = member.fetch(10)
    assert batch is not None
    return batch


# -- what is fetched -----------------------------------------------------------------------------------------------------


def test_what_was_fetched_before_a_rebalance_is_fetched_again(member: GroupConsumer) -> None:
    """C03: the partition was taken away and given back in the midst of a fetch, and its next owner may have gone on."""
    member.raw.comes = [
        at(T0, 5),
        member.raw.rebalance("revoke", T0),
        member.raw.rebalance("assign", T0),
        at(T1, 5),
    ]
    assert member.fetch(10) is None
    assert member.raw.times("seek") == 2
    assert not member._assignment.unplaced


def test_what_was_fetched_without_a_membership_is_fetched_again(member: GroupConsumer) -> None:
    """X03: the group has thrown the member out, and the next poll tells it so. A commit without one would be taken."""
    member.raw.comes = [at(T0, 5)]
    member.raw.metadata = metadata(-1, "")
    assert member.fetch(10) is None
    member.raw.metadata = metadata(1)
    assert member.fetch(10) is None
    assert member.raw.last("seek") == [T0]


def test_a_rebalance_of_long_ago_does_not_take_a_batch_away(member: GroupConsumer) -> None:
    """The partition is ours again, and the batch of that time: else what it has would come again, for ever."""
    first = fetched(member, at(T0, 5))
    member.raw.comes = [member.raw.rebalance("revoke", T0), member.raw.rebalance("assign", T0)]
    member.serve(first)
    assert not member.still_ours(first, within=LONG)
    second = fetched(member, at(T0, 5))
    member.serve(second)
    assert member.still_ours(second, within=LONG)


@pytest.mark.parametrize("kind", ["assign", "revoke", "lost"])
def test_after_a_rebalance_nothing_stays_paused(member: GroupConsumer, kind: str) -> None:
    """A resume() in whose moment librdkafka 2.16 pauses for a rebalance is dropped: the partition would stand still."""
    member.keep_alive(fetched(member, at(T0, 5)), 0)
    member.raw.log.clear()
    member.raw.comes = [member.raw.rebalance(kind, T1)]
    assert member.fetch(10) is None
    member.raw.log.clear()
    member.fetch(10)
    assert member.raw.last("resume") == ([T0, T1] if kind == "assign" else [T0])
    member.raw.log.clear()
    member.fetch(10)
    assert member.raw.times("resume") == 0  # until there is another one


def test_what_comes_of_a_partition_that_rests_is_not_handled(member: GroupConsumer) -> None:
    """L01: a pause() may be dropped likewise, and behind what was given back nothing may be committed."""
    member.rest([at(T0, 5)], 60)
    member.raw.log.clear()
    batch = fetched_of(member, at(T0, 6), at(T1, 5))
    assert [message.partition() for message in batch.messages] == [1]
    assert member.raw.log == [("pause", [T0])]
    member.raw.comes = [at(T0, 7)]
    assert member.fetch(10) is None
    member._assignment.rest([T0], 0)
    member.raw.log.clear()
    member.raw.comes = [at(T0, 8)]
    assert member.fetch(10) is None
    assert member.raw.log == [("resume", [T0]), ("committed", [T0]), ("seek", [T0])]
    assert fetched(member, at(T0, 5))


def test_what_comes_of_others_while_a_partition_rests_costs_nothing(member: GroupConsumer) -> None:
    """Else librdkafka is called with every fetch, to pause nothing."""
    member.rest([at(T0, 5)], 60)
    member.raw.log.clear()
    fetched(member, at(T1, 5))
    assert member.raw.log == []


# -- commits of a member that another instance fenced ---------------------------------------------------------------------


def test_who_has_a_fatal_error_owns_nothing(member: GroupConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its membership, and commits nothing any more: a loop that commits until that ends would not end."""
    batch = fetched(member, at(T0, 5))
    monkeypatch.setattr(member._client, "renew", lambda: None)
    commit = member.raw.commit

    def fatal(**_: object) -> None:
        raise KafkaException(KafkaError(KafkaError._FATAL))

    member.raw.commit = fatal
    with pytest.raises(BrokerError):
        member.commit([TopicPartition("t", 0, 6)])
    assert not member.still_ours(batch, within=LONG)
    member.raw.commit = commit
    assert not member.still_ours(batch, within=LONG)


# -- with a batch in hand ------------------------------------------------------------------------------------------------


def test_a_batch_that_was_given_away_is_not_ours_for_good(member: GroupConsumer) -> None:
    """X02: the partition came back at once, and its membership goes on; somebody else may have had it meanwhile."""
    batch = fetched(member, at(T0, 5), at(T1, 5))
    member.raw.comes = [member.raw.rebalance("revoke", T1), member.raw.rebalance("assign", T1)]
    member.serve(batch)
    assert not member.still_ours(batch, within=LONG)
    member.serve(batch)
    assert not member.still_ours(batch, within=LONG)
    assert batch.served == -math.inf


@pytest.mark.parametrize("failing", ["trail", "raw"])
def test_what_was_given_away_is_not_ours_whatever_else_went_wrong(member: GroupConsumer, failing: str) -> None:
    """X02: with keep_alive the problem waits for the next fetch, and the handler of this batch may end before that."""

    def fail(*_: object) -> None:
        raise BrokerError("for the test")

    batch = fetched(member, at(T0, 5))
    if failing == "trail":
        member.trail = cast("Any", SimpleNamespace(revoked=fail, follow=lambda _: None))
    else:
        member.raw.resume = fail
    member.raw.comes = [member.raw.rebalance("revoke", T0)]
    member.serve_beside(batch)
    assert not member.still_ours(batch, within=LONG)
    with pytest.raises(BrokerError, match="for the test"):
        member.fetch(10)


def test_a_batch_is_held_under_the_generation_that_keeps_its_partitions(member: GroupConsumer) -> None:
    """X03: brokers refuse offsets under the old one. But not under that of another member, as which it was not fetched."""
    batch = fetched(member, at(T0, 5))
    member.raw.metadata = metadata(2)
    member.raw.comes = [member.raw.rebalance("revoke", T1)]
    member.serve(batch)
    assert batch.metadata == metadata(2)
    assert member.still_ours(batch, within=LONG)
    member.raw.metadata = metadata(3, "another")
    member.serve(batch)
    assert batch.metadata == metadata(2)
    assert not member.still_ours(batch, within=LONG)


def test_to_be_served_is_to_be_heard_of(member: GroupConsumer) -> None:
    """C10: a batch that is served while it is handled may take longer than max.poll.interval.ms."""
    batch = fetched(member, at(T0, 5))
    batch.served -= LONG
    member.serve(batch)
    assert member.still_ours(batch, within=LONG)


def test_a_message_that_comes_while_the_group_is_served_is_fetched_again(member: GroupConsumer) -> None:
    """C02: nobody handles it there. Of a partition that is assigned in the same poll, it came before the pause."""
    batch = fetched(member, at(T0, 5))
    member.raw.comes = [at(T1, 5)]
    member.serve(batch)
    assert member.raw.last("pause") == [T0, T1]
    assert member.fetch(10) is None
    assert member.raw.last("seek") == [T1]


# -- what rests ----------------------------------------------------------------------------------------------------------


def test_what_is_given_back_for_a_while_stays_so(member: GroupConsumer) -> None:
    """D09: where the next batch is waited with, its partition would go on behind the messages that were given back."""
    batch = fetched(member, at(T0, 5), at(T1, 5))
    member.rest([batch.messages[0]], LONG)
    assert member.raw.last("pause") == [T0]
    member.keep_alive(batch, 0)
    assert member.raw.last("resume") == [T1]


def test_what_has_rested_goes_on_where_the_group_is(member: GroupConsumer) -> None:
    """D09: with the messages that were given back, not behind them; and what rests longer does not."""
    fetched(member, at(T0, 5), at(T1, 5))
    member.rest([at(T0, 5)], 0)
    member.rest([at(T1, 5)], LONG)
    assert member.fetch(10) is None
    assert member.raw.log[-3:] == [("resume", [T0]), ("committed", [T0]), ("seek", [T0])]
    assert member._assignment.awake == {T0}


def test_what_rests_is_not_at_its_end(member: GroupConsumer) -> None:
    """A run with until_idle would end without what was given back."""
    ends(member, 0)
    assert member._drained()
    member.rest([at(T0, 5)], LONG)
    assert not member._drained()


def test_what_is_to_be_fetched_again_is_not_at_its_end(member: GroupConsumer) -> None:
    """Likewise; and a member that the group has thrown out does not know of any end."""
    ends(member, 0)
    member.unplace([T0])
    assert not member._drained()
    member._assignment.unplaced.clear()
    member.raw.metadata = metadata(-1, "")
    assert not member._drained()


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_who_was_assigned_nothing_yet_is_not_at_the_end(made: Callable[..., GroupConsumer], protocol: str) -> None:
    """A run with until_idle would end while the group waits for its leader: it has joined, and owns nothing.

    With KIP-848 there is no leader, and nobody is told of an empty assignment.
    """
    member = made(group_protocol=protocol, strict=True)
    member.rejoin("for the test")
    assert member._drained() is (protocol == "consumer")
    member.raw.rebalance("assign")()
    assert member._drained()


def test_where_a_partition_ended_is_not_known_when_it_comes_back(member: GroupConsumer) -> None:
    """A run with until_idle would end before it has come to what was written since."""
    ends(member, 9)
    member._assignment.reach({T0: 9, T1: 9})
    assert member._drained()
    member.raw.comes = [member.raw.rebalance("revoke", T0), member.raw.rebalance("assign", T0)]
    assert member.fetch(10) is None
    assert not member._drained()


def test_a_partition_that_was_given_away_does_not_rest_when_it_comes_back(member: GroupConsumer) -> None:
    """A pause is kept by librdkafka; and what it was given back for is the business of those who had it since."""
    member.rest([at(T0, 5)], LONG)
    member.raw.comes = [member.raw.rebalance("revoke", T0), member.raw.rebalance("assign", T0)]
    assert member.fetch(10) is None
    assert member.raw.last("resume") == [T0]
    batch = fetched(member, at(T1, 5))
    member.keep_alive(batch, 0)
    assert member.raw.last("resume") == [T0, T1]


# -- where to go on ------------------------------------------------------------------------------------------------------


def test_an_offset_with_its_epoch_is_sought_once(member: GroupConsumer) -> None:
    """C22: librdkafka compares them with the log then, and only then. Others have nothing that could be compared."""
    t2, t3 = ("t", 2), ("t", 3)
    epochs = {t2: 7, t3: -1}

    def committed(places: list[TopicPartition], _within: float) -> list[TopicPartition]:
        known = [(place.topic, place.partition) for place in places]
        return [TopicPartition(*place, 5, leader_epoch=epochs[place]) for place in known]

    member.raw.committed = committed
    member.raw.comes = [member.raw.rebalance("assign", t2, t3), at(t2, 5), at(t3, 5)]
    batch = member.fetch(10)
    assert member.raw.last("seek") == [t2]
    assert batch is None or batch.partitions == {t3}
    member.raw.comes = [at(t2, 5)]
    assert member.fetch(10) is not None
    assert member.raw.times("seek") == 1


def test_nothing_is_on_its_way_to_the_group_while_it_is_asked_where_to_go_on(made: Callable[..., GroupConsumer]) -> None:
    """X13, C03: it would name a place before that, and what was handled would come again."""
    flights: Any = SimpleNamespace(failed=False, unfinished=False, wait=lambda: None, serve=lambda: None)
    member = made(in_flight=flights)
    noted = member.raw.log

    def settle() -> set[Partition]:
        noted.append(("in flight", []))
        return {T1}

    flights.settle = settle
    member.trail = SimpleNamespace(settle=lambda: noted.append(("trail", [])))
    member.rewind([at(T0, 5)])
    assert [what for what, _ in noted[:3]] == ["in flight", "trail", "committed"]
    assert sorted(places for what, places in noted if what == "seek") == [[T0], [T1]]


def test_a_partition_that_waits_and_is_given_away_is_not_fetched(made: Callable[..., GroupConsumer]) -> None:
    """X02: nobody knew where it begins before it was somebody else's. To be assigned now, it would be read by two."""
    member = made(partition_assignment_strategy="cooperative-sticky")
    t2 = ("t", 2)
    member.raw.comes = [member.raw.rebalance("assign", t2), member.raw.rebalance("revoke", t2)]
    assert member.fetch(10) is None
    assert member.raw.times("incremental_unassign") == 1
    assert not any(t2 in places for what, places in member.raw.log if what == "incremental_assign")
    assert not any(t2 in places for what, places in member.raw.log if what == "commit")


def test_what_is_not_owned_any_more_is_not_sought(member: GroupConsumer) -> None:
    """To seek it is refused, and no other partition would be put right, for ever."""
    fetched(member, at(T0, 5), at(T1, 5))
    member.raw.comes = [member.raw.rebalance("revoke", T0)]
    assert member.fetch(10) is None
    member.unplace([T0, T1])
    assert member.fetch(10) is None
    assert [places for what, places in member.raw.log if what == "seek"] == [[T1]]
    assert not member._assignment.unplaced


@pytest.mark.parametrize("error", [KafkaException(REFUSED), BrokerError("no answer"), KeyboardInterrupt()])
@pytest.mark.parametrize("strict", [True, False])
def test_a_start_of_which_nobody_knows_whether_it_was_committed_is_noted(
    made: Callable[..., GroupConsumer],
    monkeypatch: pytest.MonkeyPatch,
    strict: bool,  # noqa: FBT001 - two rows
    error: BaseException,
) -> None:
    """M02: it may still be on its way, and set the group back once it is further on."""
    member = made(strict=strict)

    def lost(_places: object) -> None:
        raise error

    monkeypatch.setattr(member, "_check_commit", lost)
    with pytest.raises(type(error)):
        member._commit([TopicPartition(*T0, 0)])
    assert bool(member.stray) is strict


@pytest.mark.parametrize(
    "code",
    [
        KafkaError.ILLEGAL_GENERATION,
        KafkaError.STALE_MEMBER_EPOCH,
        KafkaError._FATAL,  # another instance has its id, and a new member would fence that
    ],
)
@pytest.mark.parametrize("earlier", ["", "a start may be on its way"])
def test_a_commit_that_is_refused_is_no_reason_to_join_anew(
    made: Callable[..., GroupConsumer], monkeypatch: pytest.MonkeyPatch, code: int, earlier: str
) -> None:
    """M02: it did not arrive, and no copy of it can. To leave would make the group assign anew, and refuse others, for ever.

    Nor does it clear up an earlier one: that may still be on its way, until a new member has taken over.
    """
    member = made(strict=True)

    def refuse(_places: object) -> None:
        raise KafkaException(KafkaError(code))

    monkeypatch.setattr(member, "_check_commit", refuse)
    member.stray = earlier
    with pytest.raises(BrokerError):
        member.commit([TopicPartition(*T0, 6)])
    assert member.stray == earlier


@pytest.mark.parametrize("error", [None, KafkaError.ILLEGAL_GENERATION])
def test_a_commit_that_was_answered_late_may_have_been_sent_twice(
    made: Callable[..., GroupConsumer], monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    """M02: the answer is that to the second copy; the first may have arrived, or still come, whoever has the partition then."""
    member, clock = made(strict=True), [100.0]

    def slow(_places: object) -> None:
        clock[0] += 5.0
        if error is not None:
            raise KafkaException(KafkaError(error))

    monkeypatch.setattr(member, "_check_commit", slow)
    monkeypatch.setattr("kafka_guarantees._consumer.time", SimpleNamespace(monotonic=lambda: clock[0]))
    member.recent.append(0.1)
    with nullcontext() if error is None else pytest.raises(BrokerError):
        member.commit([TopicPartition(*T0, 6)])
    assert member.stray
    assert list(member.recent) == ([0.1, 5.0] if error is None else [0.1])


@pytest.mark.parametrize("question", ["committed", "offsets_for_times"])
def test_where_one_partition_has_no_answer_nothing_is_decided(member: GroupConsumer, question: str) -> None:
    """M05, C06: an error comes with an offset of -1001, like that of a partition of which nothing was ever committed."""
    error, t2 = KafkaError(KafkaError.UNSTABLE_OFFSET_COMMIT), ("t", 2)

    def answer(places: list[TopicPartition], _within: float) -> list[Any]:
        return [SimpleNamespace(topic=p.topic, partition=p.partition, offset=OFFSET_INVALID, error=error) for p in places]

    setattr(member.raw, question, answer)
    led = SimpleNamespace(partitions={2: SimpleNamespace(leader=0)}, error=None)
    member.raw.list_topics = lambda _topic, timeout: SimpleNamespace(topics={"t": led})
    member.raw.comes = [member.raw.rebalance("assign", t2)]
    assert member.fetch(10) is None
    assert not member.raw.times("commit")
    assert not member.raw.times("seek")
    assert member._assignment.waiting == {t2}


@pytest.mark.parametrize("why", ["at most once from the latest", "an inbox, while a leader is elected"])
def test_nothing_is_asked_in_a_callback_that_would_abort_the_process(member: GroupConsumer, why: str) -> None:
    """After list_topics() in it confluent-kafka has no thread for the next callback of the same poll (Metadata.c:398-403)."""
    raw, t2, asked_in = member.raw, ("t", 2), list[bool]()
    led = SimpleNamespace(partitions={2: SimpleNamespace(leader=0)}, error=None)
    inside = False

    def list_topics(_topic: str, timeout: float) -> Any:
        asked_in.append(inside)
        return SimpleNamespace(topics={"t": led})

    def assign() -> None:
        nonlocal inside
        inside = True
        raw.rebalance("assign", t2)()
        inside = False

    def electing(_places: object, _within: float) -> None:
        raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))

    raw.list_topics = list_topics
    raw.comes = [assign]
    if why.startswith("an inbox"):
        member._places.stored = Stored(lambda _partitions: {t2: 7}, "mark")
        raw.offsets_for_times = electing
    else:
        member._positions._places = Places("g", "latest", once=True)
    member.fetch(10)
    member.fetch(10)
    assert asked_in
    assert not any(asked_in)
    assert member._problem is None


def test_whether_a_topic_was_deleted_is_asked_without_a_poll(member: GroupConsumer) -> None:
    """C06: with a batch in hand a poll would take a message that nobody gets, and serve a rebalance."""

    def gone(_topic: str, timeout: float) -> Any:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    member.raw.list_topics = gone
    member.raw.comes = [at(T0, 5)]
    assert not member._topics.deleted("t")
    assert len(member.raw.comes) == 1


class Unreadable(Message):
    """To compare it decodes its headers, as confluent-kafka does (confluent_kafka.c:1096), and that raises, once."""

    __hash__ = None  # type: ignore[assignment] # as that of a Message

    def __eq__(self, other: object) -> bool:
        raise SystemError("a header's name is not UTF-8")


def test_a_header_that_cannot_be_read_hides_no_error(member: GroupConsumer) -> None:
    """S04: what the brokers say behind such a message is raised, after those before it were handed out."""
    poison = Unreadable(topic="t", partition=0, offset=5)
    gone = KafkaError(KafkaError._AUTO_OFFSET_RESET, "out of range")
    member.raw.comes = [poison, Message(topic="t", partition=1, offset=6, error=gone)]
    batch = member.fetch(10)
    assert batch is not None
    assert [message is poison for message in batch.messages] == [True]
    with pytest.raises(OffsetsLost):
        member.fetch(10)


# -- who takes over ------------------------------------------------------------------------------------------------------


def test_a_new_member_knows_nothing_of_what_the_old_one_had(made: Callable[..., GroupConsumer]) -> None:
    """It owns what it is assigned. What is not its own it neither reads nor seeks: librdkafka would refuse that, for ever."""
    member = made(group_instance_id="static", strict=True)  # one that does not give back what it has
    old = member.raw
    member._assignment.wait({T1})
    member.rest([at(T0, 5)], LONG)
    member.unplace([T0])
    ends(member, 9)
    member._assignment.reach({T0: 5})
    member.rejoin("for the test")
    assert member.raw is not old
    assert old.times("close") == 1
    now = member._assignment
    assert not any((now.owned, now.waiting, now.unplaced, now.rested(math.inf)))
    now.assign({T0})
    assert not now.at_end(math.inf), "it remembers an end"


# -- what is lost --------------------------------------------------------------------------------------------------------


def test_nothing_is_committed_for_what_was_lost(member: GroupConsumer) -> None:
    """C07, C09: it is somebody else's by now, who may be further on. The brokers would take the commit (X02)."""
    told: list[tuple[str, set[Partition]]] = []
    trail: Any = SimpleNamespace(
        revoked=lambda gone: told.append(("revoked", gone)), lost=lambda gone: told.append(("lost", gone))
    )
    member.trail = trail
    member.raw.rebalance("lost", T0)()
    member.raw.rebalance("revoke", T1)()
    assert told == [("lost", {T0}), ("revoked", {T1})]
