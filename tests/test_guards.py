"""Checks that stand behind other checks: each is removed by a mutant that nothing else in the suite would notice."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import pytest
from confluent_kafka import KafkaError, Message, TopicPartition
from tenacity import Retrying, stop_after_attempt, wait_fixed

from kafka_guarantees import AtLeastOnce, AtMostOnce, BrokerError, ExactlyOnce, Record, StoreUnavailable, _failures
from kafka_guarantees._at_least_once_run import Run
from kafka_guarantees._batch import Batch
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._failures import Failed, Left
from kafka_guarantees._group_client import GroupClient
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._pace import Pace
from kafka_guarantees._places import Places
from kafka_guarantees._recognition.portions import Portions
from kafka_guarantees._serialization import Reading
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees._transaction_state import TransactionState
from kafka_guarantees._transactional import AbortNeeded, TransactionalProducer
from kafka_guarantees._watch import Watch
from kafka_guarantees.dedup import MemoryDedupStore, SqliteInbox, position
from kafka_guarantees.dedup.contract import Entry, Source

from .conftest import committed, fill, read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kafka_guarantees._recognition.claims import Work
    from kafka_guarantees.testing.local_kafka import RunningKafka

    from .world import World

broker = pytest.mark.broker
LIMIT = 300.0  # max.poll.interval.ms, in seconds
DEAD = {"bootstrap.servers": "127.0.0.1:1", "group.id": "group"}


def in_hand(*messages: str) -> Any:
    """A batch of which only some messages are committed."""
    batch = Batch((), b"CGMDv2:\1\0\0\0g\0me\0\0", 0.0)
    batch.messages = messages  # type: ignore[assignment]
    return batch


def test_one_partition_that_was_not_committed_is_an_error() -> None:
    """C06: the answer as a whole is good, and says of one partition that it was refused. Nothing of it counts as committed."""
    consumer = GroupConsumer.__new__(GroupConsumer)
    consumer._over = consumer._strict = False
    consumer._places = Places("group", "earliest")
    consumer._settings = SimpleNamespace(group_id="group")  # type: ignore[assignment] # what it needs of them
    good = SimpleNamespace(topic="t", partition=0, offset=5, error=None)
    bad = SimpleNamespace(topic="t", partition=1, offset=5, error=KafkaError(KafkaError.ILLEGAL_GENERATION))
    with pytest.raises(BrokerError, match=r"committing offsets failed.*ILLEGAL_GENERATION"):
        consumer.check_commit(None, [good, bad])  # type: ignore[list-item] # like a TopicPartition
    assert not consumer._places._seen
    consumer.check_commit(None, [good])  # type: ignore[list-item] # likewise
    assert consumer._places._seen == {("t", 0)}


def test_before_it_commits_at_most_once_asks_the_clock_as_well() -> None:
    """M03: within half a session of a poll nobody can have thrown it out; and after the commit within a whole one."""
    client = AtMostOnce({**DEAD, "session.timeout.ms": 20_000})
    asked: list[float] = []

    def still_ours(_batch: object, *, within: float) -> bool:
        asked.append(within)
        return True

    consumer: Any = SimpleNamespace(still_ours=still_ours, commit=lambda _offsets: None, rewind=lambda _messages: None)
    batch: Any = in_hand()
    assert client._committed(consumer, batch, [Message(topic="t", partition=0, offset=1)])
    assert asked == [10.0, 20.0]
    client.close()


@broker
@pytest.mark.parametrize("how", ["run", "transactions"])
def test_offsets_go_with_the_membership_that_their_batch_was_fetched_under(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """X03: what the brokers compare is who this member was then. Asked for later, it would be good after any rebalance."""
    here = world()
    here.fill(30)
    fetched: list[bytes] = []
    given: list[object] = []
    fetch, send_offsets = GroupConsumer.fetch, TransactionalProducer.send_offsets

    def fetching(consumer: GroupConsumer, *limits: Any) -> Batch | None:
        batch = fetch(consumer, *limits)
        if batch is not None:
            fetched.append(batch.metadata)
        return batch

    def sending(producer: TransactionalProducer, offsets: Sequence[TopicPartition], metadata: object) -> None:
        given.append(metadata)
        send_offsets(producer, offsets, metadata)

    monkeypatch.setattr(GroupConsumer, "fetch", fetching)
    monkeypatch.setattr(TransactionalProducer, "send_offsets", sending)
    with here.client() as kafka:
        if how == "run":
            here.run(kafka, max_batch=10)
        else:
            with here.stopping(kafka):
                for tx in kafka.transactions([here.source], max_batch=10):
                    with tx:
                        for message in tx.messages:
                            tx.produce(here.sink, message.value())
    assert given
    assert all(any(metadata is known for known in fetched) for metadata in given)


@broker
def test_a_transaction_of_a_batch_that_was_given_away_is_aborted(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """X02: the brokers check the membership, but not whose the partitions are. Its messages come again, to whoever has them."""
    here = world()
    written = here.fill(6)
    still_ours, asked = GroupConsumer.still_ours, list[bool]()

    def given_away_once(consumer: GroupConsumer, batch: Batch) -> bool:
        asked.append(True)
        return len(asked) > 1 and still_ours(consumer, batch)

    monkeypatch.setattr(GroupConsumer, "still_ours", given_away_once)
    rounds: list[int] = []
    with here.client() as kafka, here.stopping(kafka):
        for tx in kafka.transactions([here.source], max_batch=6):
            with tx:
                rounds.append(len(tx.messages))
                for message in tx.messages:
                    tx.produce(here.sink, message.value())
    assert sum(rounds) > 6
    assert here.output() == written


def made(kind: str, bootstrap: str, group: str, stack: ExitStack, directory: Path, **options: Any) -> Any:
    config = {"bootstrap.servers": bootstrap, "group.id": group}
    options["preflight"] = "off"
    if kind == "exactly-once":
        return stack.enter_context(ExactlyOnce({**config, "transactional.id": group}, **options))
    if kind == "inbox":
        options |= {"inbox": stack.enter_context(SqliteInbox(directory / "inbox.db")), "message_id": None}
    if kind == "store":
        options |= {"dedup": stack.enter_context(MemoryDedupStore()), "message_id": position()}
    return stack.enter_context(AtLeastOnce(config, **options))


@broker
@pytest.mark.parametrize("kind", ["at-least-once", "store", "inbox", "exactly-once"])
def test_a_batch_that_is_handled_one_by_one_hears_of_a_stop_and_serves_the_group(
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """C10, L08: between two messages, not after all of them; and with a store its claims are renewed (D04)."""
    topic, dead, singles, served, renewed = kafka_topic(), kafka_topic(), list[bytes](), list[float](), list[float]()
    fill(kafka.bootstrap, topic, [b"%02d" % number for number in range(20)])
    monkeypatch.setattr(_failures, "PROMPT", 0.05)
    keep_alive = GroupConsumer.serve

    def serve(consumer: GroupConsumer, batch: Batch, wait: float = 0) -> None:
        served.append(time.monotonic())
        keep_alive(consumer, batch, wait)

    monkeypatch.setattr(GroupConsumer, "serve", serve)

    def handler(messages: Sequence[Message], *_connection: object) -> None:
        if len(messages) > 1:
            raise ValueError("not together")
        singles.append(messages[0].value() or b"")
        time.sleep(0.1)
        if len(singles) == 5:
            client.stop()

    with ExitStack() as stack:
        client = made(kind, kafka.bootstrap, topic, stack, tmp_path, dead_letter=dead)
        if kind == "store":
            monkeypatch.setattr(Run, "_renew", lambda _run: renewed.append(time.monotonic()))
        client.run_batches([topic], handler)
    assert len(singles) == 5
    assert len(served) >= 2
    assert len(renewed) >= 2 or kind != "store"
    assert committed(kafka.bootstrap, topic, topic) == [5]
    assert not values(read_all(kafka.bootstrap, dead))


@broker
def test_claims_are_renewed_while_a_handler_waits_for_its_next_attempt(
    kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D04: else another worker would take the message over, in the middle of the wait."""
    topic, renewed, times = kafka_topic(), list[float](), Counter[bytes]()
    monkeypatch.setattr(_failures, "SLICE", 0.1)
    fill(kafka.bootstrap, topic, [b"1"])

    def handler(message: Message) -> None:
        times[message.value() or b""] += 1
        if times[b"1"] == 1:
            raise RuntimeError("not yet")

    retry = Retrying(stop=stop_after_attempt(2), wait=wait_fixed(0.5))
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": topic}
    with MemoryDedupStore() as store, AtLeastOnce(config, dedup=store, message_id=position(), retry=retry) as client:
        monkeypatch.setattr(Run, "_renew", lambda _run: renewed.append(time.monotonic()))
        client.run([topic], handler, until_idle=0.3)
    assert times == {b"1": 2}
    assert len(renewed) >= 3


@broker
def test_a_commit_that_fails_between_single_messages_is_not_passed_over(
    kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D17, X02: what was handled one by one and is not committed comes again; nothing behind it is committed before."""
    topic, dead, target, finished, handled = kafka_topic(), kafka_topic(), kafka_topic(), list[bool](), list[bytes]()
    fill(kafka.bootstrap, topic, [b"%02d" % number for number in range(10)])
    finish = Run.finish

    def refused_once(run: Run, batch: Batch, *given: Any, **named: Any) -> Work:
        finished.append(True)
        if len(finished) == 2:  # the first is of nothing, before the attempts at all of them
            handled.append(b"refused")
            return run.give_back(batch)
        return finish(run, batch, *given, **named)

    def handler(messages: Sequence[Message]) -> list[Record]:
        if len(messages) > 1 or messages[0].value() == b"04":
            raise ValueError("never")
        handled.append(messages[0].value() or b"")
        return [Record(target, message.value()) for message in messages]

    monkeypatch.setattr(Run, "finish", refused_once)
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": topic}
    with AtLeastOnce(config, dead_letter=dead, preflight="off") as client:
        threading.Timer(20, client.stop).start()
        client.run_batches([topic], handler, until_idle=0.5)
    assert handled[:6] == [b"00", b"01", b"02", b"03", b"refused", b"00"]
    copied = values(read_all(kafka.bootstrap, target))
    assert set(copied) == {b"%02d" % number for number in range(10) if number != 4}
    assert b"04" in values(read_all(kafka.bootstrap, dead))
    assert committed(kafka.bootstrap, topic, topic) == [10]


@broker
def test_a_stray_start_is_heeded_by_the_next_fetch(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """M02: it may have been committed while a batch was given back, or its partition waited for. A new member takes over."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, [b"1", b"2"])
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": topic, "transactional.id": topic}
    settings = resolve(Guarantee.EXACTLY_ONCE, config)
    lifecycle = Lifecycle("test")
    with (
        lifecycle.running(),
        closing(GroupConsumer(settings, lifecycle, [topic], Places(topic, "earliest"), strict=True)) as one,
    ):
        first = next(one.batches(Pace(1, 60), None, Reading(None, None)))
        member = one.membership()
        assert member.active
        one.stray = "for the test"
        second = next(one.batches(Pace(1, 60), None, Reading(None, None)))
        assert not one.stray
        assert not one.membership().continues(member)
    assert [message.value() for message in (*first.messages, *second.messages)] == [b"1"] * 2  # nothing was committed


def test_what_interrupts_a_rejoin_is_not_hidden_by_its_end() -> None:
    """Between the old client and the new one there is none: to close that is no error, and hides none."""
    client = GroupClient.__new__(GroupClient)
    client._caller = SimpleNamespace(end=lambda: None)  # type: ignore[assignment] # what it needs of it
    client.raw = None
    client.close()


@pytest.mark.parametrize("stray", ["", "it is not known whether offsets were committed"])
def test_what_was_not_committed_is_not_handled(stray: str) -> None:
    """M02: it is fetched again, by a new member where the commit may still arrive."""
    client, rewound = AtMostOnce(DEAD), list[object]()

    def fails(_offsets: object) -> None:
        raise BrokerError("refused, or lost")

    consumer: Any = SimpleNamespace(still_ours=lambda *_, **__: True, commit=fails, rewind=rewound.append, stray=stray)
    batch: Any = in_hand("all", "of it")
    assert not client._committed(consumer, batch, [Message(topic="t", partition=0, offset=1)])
    assert rewound == ([] if stray else [("all", "of it")])
    client.close()


@pytest.mark.parametrize("ours", [[False], [True, False]], ids=["before the commit", "after it"])
def test_at_most_once_gives_back_what_it_does_not_handle(ours: list[bool]) -> None:
    """M03, M07: the batch was given away. What of it was not committed is not lost: where we have it still, it comes again."""
    client, answers = AtMostOnce(DEAD), list(ours)
    rewound: list[object] = []
    consumer: Any = SimpleNamespace(
        still_ours=lambda *_, **__: answers.pop(0), commit=lambda _offsets: None, rewind=rewound.append
    )
    batch: Any = in_hand("all", "of it")
    assert not client._committed(consumer, batch, [Message(topic="t", partition=0, offset=1)])
    assert rewound == [("all", "of it")]
    client.close()


@broker
def test_a_loop_fetches_what_it_gets_through(
    kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C10: messages() learns its pace as run() does. Else all of a large batch would be fetched again every two seconds."""
    topic, sizes = kafka_topic(), list[int]()
    fill(kafka.bootstrap, topic, [b"x"] * 2000)
    fetch = GroupConsumer.fetch

    def fetching(consumer: GroupConsumer, *limits: Any) -> Batch | None:
        batch = fetch(consumer, *limits)
        sizes.append(0 if batch is None else len(batch.messages))
        return batch

    monkeypatch.setattr(GroupConsumer, "fetch", fetching)
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": topic}, preflight="off") as client:
        for number, _message in enumerate(client.messages([topic])):
            time.sleep(0.02)
            if number == 250:
                break
    assert max(sizes) > 500
    assert sum(sizes) < 3000


# -- is it still ours? ---------------------------------------------------------------------------------------------------


@broker
def test_what_was_given_away_while_the_store_was_down_is_not_claimed(
    kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D16, X02: its new owner would lose its claims to us. The messages are fetched again, by whoever has them."""
    topic, log, handled = kafka_topic(), list[str](), list[bytes]()
    fill(kafka.bootstrap, topic, [b"1", b"2"])

    class Down(MemoryDedupStore):
        def claim(self, *given: Any, **named: Any) -> Any:
            log.append("claim")
            if log.count("claim") == 1:
                raise StoreUnavailable("for the test")
            return super().claim(*given, **named)

    fetch = GroupConsumer.fetch

    def fetching(consumer: GroupConsumer, *limits: Any) -> Batch | None:
        batch = fetch(consumer, *limits)
        if batch is not None:
            log.append("fetched")
        return batch

    def given_away(_consumer: GroupConsumer, batch: Batch, _seconds: float) -> None:
        batch.served = -math.inf  # as serve() has it after a rebalance

    monkeypatch.setattr(GroupConsumer, "fetch", fetching)
    monkeypatch.setattr(GroupConsumer, "keep_alive", given_away)
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": topic}
    with Down() as store, AtLeastOnce(config, dedup=store, message_id=position(), preflight="off") as client:
        client.run([topic], lambda message: handled.append(message.value() or b""), until_idle=0.3)
    assert log == ["fetched", "claim", "fetched", "claim"]
    assert handled == [b"1", b"2"]


@broker
@pytest.mark.parametrize("kind", ["at-least-once", "store", "inbox", "exactly-once"])
def test_whoever_asks_whether_a_batch_is_ours_asks_the_clock_as_well(
    kafka: RunningKafka, kafka_topic: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """M03: a process that stood still for longer than max.poll.interval.ms hears of it with its next poll only."""
    topic, asked = kafka_topic(), list[float]()
    fill(kafka.bootstrap, topic, [b"1"])
    still_ours = GroupConsumer.still_ours

    def asking(consumer: GroupConsumer, batch: Batch) -> bool:
        asked.append(consumer._settings.max_poll_interval)
        now = still_ours(consumer, batch)
        served, batch.served = batch.served, time.monotonic() - LIMIT
        assert not still_ours(consumer, batch)
        batch.served = served
        return now

    monkeypatch.setattr(GroupConsumer, "still_ours", asking)
    with ExitStack() as stack:
        client = made(kind, kafka.bootstrap, topic, stack, tmp_path)
        client.run([topic], lambda *_: client.stop())  # what is finished then is committed at once
    assert asked
    assert set(asked) == {LIMIT}
    assert committed(kafka.bootstrap, topic, topic) == [1]


class Elsewhere:
    """A consumer whose batch is ours so many times that somebody asks, and then somebody else's."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.committed: list[list[TopicPartition]] = []

    def still_ours(self, _batch: object) -> bool:
        self.left -= 1
        return self.left >= 0

    def send_commit(self, offsets: list[TopicPartition]) -> None:
        self.committed.append(offsets)


@pytest.mark.parametrize(("times", "handled", "shown"), [(0, 0, 0), (1, 1, 0), (2, 1, 1)])
def test_an_inbox_is_not_used_for_what_was_given_away(tmp_path: Path, times: int, handled: int, shown: int) -> None:
    """X02: its owner need not wait for the lock; and the group's offset, which that one moves, is not set back."""
    consumer, seen = Elsewhere(times), list[Message]()
    message = Message(topic="t", partition=0, offset=7)
    entry = Entry(Source("t", b"i" * 16, 0), 7, None)

    def handle(messages: Sequence[Message], _connection: object) -> tuple[int, None]:
        seen.extend(messages)
        return len(messages), None

    with SqliteInbox(tmp_path / "inbox.db") as inbox:
        portions = Portions(
            Lifecycle("test"),
            consumer,  # type: ignore[arg-type] # what it needs of it
            inbox=inbox,
            recognition=SimpleNamespace(scope="g", mark="shown", counts=Counter()),  # type: ignore[arg-type] # likewise
            acknowledged=lambda: None,
            failures=SimpleNamespace(given_away=lambda *_: None),  # type: ignore[arg-type] # likewise
            send=lambda _record: None,  # type: ignore[arg-type,return-value] # likewise
        )
        batch: Any = SimpleNamespace()
        assert portions.transact(batch, [message], [entry], handle) == (handled, None)
        stored = inbox.start_offsets("g", [entry.source])
    assert len(seen) == handled
    assert stored == {entry.source: 8 if handled else None}
    assert len(consumer.committed) == shown


@pytest.mark.parametrize("late", [False, True])
def test_the_offsets_of_a_transaction_are_not_sent_after_their_time(late: bool) -> None:  # noqa: FBT001 - two rows
    """X02, M03: it may have waited long for the one before it, and nobody asks whose its partitions are any more."""
    flight, offsets = MagicMock(), [TopicPartition("t", 0, 5)]
    flight.producer.commit = MagicMock(side_effect=lambda claim: claim())
    batch: Any = SimpleNamespace(served=time.monotonic() - (LIMIT + 1 if late else LIMIT - 10))
    with ExactlyOnce({**DEAD, "transactional.id": "t"}) as client:
        if late:
            with pytest.raises(AbortNeeded):
                client._finish(flight, batch=batch, offsets=offsets, metadata=b"")
        else:
            client._finish(flight, batch=batch, offsets=offsets, metadata=b"")
        assert client._places._claimed == ({} if late else {("t", 0): 5})
    assert flight.producer.send_offsets.called is not late
    assert flight.producer.commit.called is not late


# -- transactions -------------------------------------------------------------------------------------------------------


def test_what_was_aborted_before_a_failure_is_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """X13: of every partition that was in flight. The message that failed, which has to wait for that, may be of another."""
    unplaced: list[object] = []
    consumer: Any = SimpleNamespace(unplace=unplaced.append)
    with ExactlyOnce({**DEAD, "transactional.id": "t"}) as client:
        monkeypatch.setattr(client._in_flight, "settle", lambda: {("t", 1)})
        failed = Failed(1, ValueError("for the test"))
        nothing: Any = None
        assert client._again(consumer, nothing, [Message(topic="t", partition=0, offset=1)], failed, nothing) == 0
        assert unplaced == [{("t", 1)}]
        monkeypatch.undo()


def test_what_was_given_away_while_it_could_not_be_read_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """X13: or the client is to stop. No transaction has its messages: what follows would commit offsets behind them."""
    batch: Any = SimpleNamespace(partitions={("t", 0)}, messages=())
    unplaced: list[object] = []
    consumer: Any = SimpleNamespace(batches=lambda *_: iter([batch]), unplace=unplaced.append)

    def left(*_: object) -> None:
        raise Left

    with ExactlyOnce({**DEAD, "transactional.id": "t"}) as client:
        monkeypatch.setattr(client, "_consuming", lambda *_: nullcontext(consumer))
        monkeypatch.setattr(client, "_unreadable", left)
        unused: Any = None
        assert not list(client._transactions(["t"], Pace(1, 60), None, unused))
    assert unplaced == [{("t", 0)}]


@pytest.mark.parametrize("broken", ["log", "error_cb"])
def test_a_log_line_that_could_not_be_read_counts_as_a_disturbance(broken: str) -> None:
    """X01: nobody knows what it said; and nothing is raised into librdkafka."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    state = TransactionState()
    watch = Watch(state, SimpleNamespace(log=interrupted), interrupted)  # type: ignore[arg-type] # what it needs of a logger
    if broken == "log":
        watch.log(7, "%s", "STATE", "rdkafka#producer-1", "all is well")
    else:
        watch.error(KafkaError(KafkaError._TRANSPORT, "127.0.0.1:1/bootstrap: refused (after 0ms in state CONNECT)"))
    assert state.dirty
