"""ExactlyOnce on a real broker: one test for each way in which exactly-once breaks (the X of the hazard catalogue).

Where a test needs an error at one moment, the C client is replaced by a subclass of it that raises there and is itself
everywhere else. Readers are of conftest: to the end of the topic, committed view.
"""

from __future__ import annotations

import gc
import json
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from kafka_guarantees import (
    DeliveryError,
    DeliveryUnknown,
    ExactlyOnce,
    FencedError,
    HandlerError,
    KafkaGuaranteesError,
    Record,
    TransactionAborted,
)
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._offsets import Membership
from kafka_guarantees._transactional import InDoubt, TransactionalProducer
from kafka_guarantees.prove.proxy import Proxy

from .conftest import fill, has_open_transaction, read_all, values
from .kafka_wire import Wire
from .world import DEADLINE, Scripted, World, fatal, in_thread, names, retriable, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from confluent_kafka import Message

    from kafka_guarantees.transaction import Transaction


pytestmark = pytest.mark.broker

TOO_LARGE = b"x" * 2_000_000


# -- the loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_alive", [False, True])
def test_statistics_do_not_pile_up_while_nothing_is_produced(world: Callable[..., World], *, keep_alive: bool) -> None:
    """They are kept until librdkafka is polled, without a limit: nothing came, or a handler took its time."""
    here = world()
    here.fill(1)
    seen: list[float] = []

    def stats(text: str) -> None:
        figures = json.loads(text)
        if figures["type"] == "producer":
            seen.append(figures["time"])

    def handler(message: Message) -> Iterator[Record]:
        if keep_alive:
            until(lambda: len(seen) >= 20, "there are statistics while the handler works", 20)
        return here.copy(message)

    config = {
        "bootstrap.servers": here.bootstrap,
        "group.id": here.group,
        "transactional.id": here.transactional_id,
        "stats_cb": stats,
        "statistics.interval.ms": 100,
    }
    with ExactlyOnce(config, keep_alive=keep_alive) as kafka:
        ended = in_thread(lambda: kafka.run([here.source], handler))
        until(lambda: here.committed() == [1], "the message is committed")
        before = len(seen)
        until(lambda: len(seen) >= before + 20, "there are statistics while nothing comes", 20)
        kafka.stop()
        assert ended() is None


def test_every_message_once_and_in_order(world: Callable[..., World]) -> None:
    """What run copies from 4 partitions arrives once, in the order of each, and the offsets are at the end."""
    here = world(4)
    written = here.fill(2000)
    with here.client(commit_interval=0.01) as kafka:
        here.run(kafka, max_batch=300)
    messages = read_all(here.bootstrap, here.sink)
    assert values(messages) == written
    for number in range(4):
        of_one = [m.value() for m in messages if m.partition() == number]
        assert of_one == written[number::4]
    assert here.committed() == here.ends


@pytest.mark.parametrize("refused", [0, 2, 3, 5])
def test_the_message_whose_record_is_refused_is_found(
    world: Callable[..., World], kafka_topic: Callable[..., str], refused: int
) -> None:
    """Whichever record of whichever message is refused, that message is set aside, and every other one is done."""
    here, letters = world(), kafka_topic()
    here.fill(6)
    sizes = [2, 0, 1, 3, 0, 2]  # records of each message

    def handler(message: Message) -> Iterator[Record]:
        offset = message.offset() or 0
        for number in range(sizes[offset]):
            last = number == sizes[offset] - 1
            yield Record(here.sink, TOO_LARGE if offset == refused and last else b"%d/%d" % (offset, number))

    config = {"bootstrap.servers": here.bootstrap, "group.id": here.group, "transactional.id": here.transactional_id}
    with ExactlyOnce(config, dead_letter=letters) as kafka:
        kafka.run([here.source], handler, until_idle=0.5)
    assert here.output() == sorted(b"%d/%d" % (m, n) for m in range(6) if m != refused for n in range(sizes[m]))
    assert values(read_all(here.bootstrap, letters)) == [b"%06d" % refused]
    assert here.committed() == [6]


def test_a_stop_that_no_broker_answers_ends_one_run(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped before a broker answered returns, and the next one is not ended by the same stop."""
    here = world()
    written = here.fill(3)
    unanswered = [KafkaException(KafkaError(KafkaError._TIMED_OUT, "for the test", retriable=True))]

    class Unanswered(Producer):
        def init_transactions(self, *args: Any) -> None:
            if unanswered:
                error = unanswered.pop()
                time.sleep(1.5)  # until a stopping client has no patience left
                raise error
            super().init_transactions(*args)

    monkeypatch.setattr("kafka_guarantees._transactional.Producer", Unanswered)
    with here.client(transactions_in_flight=1) as kafka:
        kafka.stop()
        kafka.run([here.source], here.copy)
        assert here.output() == []
        kafka.run([here.source], here.copy, until_idle=0.3)
    assert here.output() == written


def test_run_batches_is_one_transaction_for_a_batch(world: Callable[..., World]) -> None:
    """A handler of batches sees whole batches; each is one transaction."""
    here = world()
    written = here.fill(100)
    sizes: list[int] = []

    def handler(messages: Sequence[Message]) -> Iterator[Record]:
        sizes.append(len(messages))
        return (Record(here.sink, message.value()) for message in messages)

    with here.client() as kafka, here.stopping(kafka):
        kafka.run_batches([here.source], handler, max_batch=40)
    assert here.output() == written
    assert sum(sizes) == 100
    assert max(sizes) <= 40
    assert markers(here, len(written)) == len(sizes)


def markers(here: World, records: int) -> int:
    """How many transactions ended in the output's partition 0: each left a control record behind."""
    reader = Consumer({"bootstrap.servers": here.bootstrap, "group.id": here.group})
    try:
        _, high = reader.get_watermark_offsets(TopicPartition(here.sink, 0), DEADLINE)
        return int(high) - records
    finally:
        reader.close()


def test_commit_interval_closes_transactions_within_a_batch(world: Callable[..., World]) -> None:
    """A transaction is closed at its age; the rest of the batch goes into the next one, and nothing is fetched twice."""
    here = world()
    written = here.fill(20)
    handled: list[bytes | None] = []

    def handler(message: Message) -> Iterator[Record]:
        handled.append(message.value())
        yield from here.copy(message)
        time.sleep(0.002)  # this is how old a transaction gets with one message

    with here.client(commit_interval=0.001) as kafka:
        here.run(kafka, handler)
    assert here.output() == written == handled
    assert markers(here, 20) == 20


def test_after_a_handler_error_the_next_run_begins_with_its_message(world: Callable[..., World]) -> None:
    """HandlerError: what came before the message is committed, and the message is the first of the next run."""
    here = world()
    written = here.fill(10)

    def failing(message: Message) -> Iterator[Record]:
        if message.offset() == 5:
            raise ZeroDivisionError
        return here.copy(message)

    def remembering(message: Message) -> Iterator[Record]:
        handled.append(message.offset())
        return here.copy(message)

    handled: list[int | None] = []
    with here.client(commit_interval=10) as kafka:
        with pytest.raises(HandlerError, match="offset 5") as caught:
            here.run(kafka, failing)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert here.output() == written[:5]
        here.run(kafka, remembering)
    assert handled == list(range(5, 10))
    assert here.output() == written


def test_a_generator_that_raises_midway_leaves_nothing(world: Callable[..., World]) -> None:
    """Records that a handler yielded before it raised are aborted with the rest."""
    here = world()
    here.fill(1)

    def failing(message: Message) -> Iterator[Record]:
        yield from here.copy(message)
        raise ZeroDivisionError

    with here.client() as kafka:
        with pytest.raises(HandlerError):
            here.run(kafka, failing)
        assert here.output() == []
        here.run(kafka)
    assert here.output() == [b"000000"]


@pytest.mark.parametrize(
    "protocol",
    [{}, {"partition_assignment_strategy": "cooperative-sticky"}, {"group_protocol": "consumer"}],
    ids=["range", "cooperative-sticky", "kip-848"],
)
def test_a_partition_without_offset_beside_one_that_has_it(world: Callable[..., World], protocol: dict[str, Any]) -> None:
    """A partition that the group has no offset of is begun without fetching its neighbours a second time (M05, C11)."""
    here = world(2)
    written = here.fill(200)
    before = Consumer({"bootstrap.servers": here.bootstrap, "group.id": here.group})
    before.commit(offsets=[TopicPartition(here.source, 0, 0)], asynchronous=False)
    before.close()
    handled: list[bytes] = []

    def handler(message: Message) -> Iterator[Record]:
        handled.append(message.value() or b"")
        return here.copy(message)

    with here.client(**protocol) as kafka:
        here.run(kafka, handler)
    assert here.output() == written
    assert sorted(handled) == written


# -- X02, X03, X12: the membership --------------------------------------------------------------------------------------


def test_x02_a_batch_of_another_membership_is_not_committed(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """X02: when the membership is another one than at the fetch, the transaction is aborted and its messages come again."""
    here = world()
    written = here.fill(5)
    handled: list[bytes | None] = []
    true = GroupConsumer.membership
    lies = [Membership(7, "somebody else")]
    monkeypatch.setattr(GroupConsumer, "membership", lambda self: lies.pop() if lies else true(self))

    def handler(message: Message) -> Iterator[Record]:
        handled.append(message.value())
        return here.copy(message)

    with here.client(commit_interval=10) as kafka:
        here.run(kafka, handler)
    assert handled == written * 2
    assert here.output() == written


def test_x02_a_member_that_was_thrown_out_commits_nothing(world: Callable[..., World]) -> None:
    """X02, X12: the group throws the member out while it handles; another owns its partition then; output exact."""
    here = world()
    written = here.fill(5)
    wire = Wire(here.bootstrap, here.transactional_id)
    handled: list[bytes | None] = []

    def handler(message: Message) -> Iterator[Record]:
        if not handled:
            wire.leave_group(here.group, *members(here))
            assert second() is None  # another member takes the partition, and is done with it
        handled.append(message.value())
        return here.copy(message)

    def other() -> None:
        with here.client(transactional_id=f"{here.transactional_id}-b") as kafka:
            here.run(kafka)

    def second() -> BaseException | None:
        return in_thread(other)()

    with here.client(commit_interval=10) as kafka, here.stopping(kafka):
        kafka.run([here.source], handler)
    assert handled[0] == written[0], "the control: it did have the messages"
    assert here.output() == written


def members(here: World) -> list[str]:
    description = describe_group(here)
    return [str(member.member_id) for member in description.members]


def describe_group(here: World) -> Any:
    admin = AdminClient({"bootstrap.servers": here.bootstrap})
    return admin.describe_consumer_groups([here.group])[here.group].result(DEADLINE)


def unfenced(group: str) -> bytes:
    return b"CGMDv2:" + (-1).to_bytes(4, "little", signed=True) + group.encode() + b"\0\0\0"


def test_x03_unfenced_metadata_is_never_used(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    """X03: messages fetched with generation -1 and no member id are not handled, let alone committed; they come again."""
    here = world()
    written = here.fill(5)
    lies = [unfenced(here.group)] * 3
    lied: list[int] = []

    class Unfenced(Consumer):
        def consumer_group_metadata(self) -> Any:
            if lies and self.assignment():
                lied.append(len(handled))
                return lies.pop()
            return super().consumer_group_metadata()

    monkeypatch.setattr("kafka_guarantees._group_client.Consumer", Unfenced)
    handled: list[bytes | None] = []

    def handler(message: Message) -> Iterator[Record]:
        handled.append(message.value())
        return here.copy(message)

    with here.client() as kafka:
        here.run(kafka, handler)
    assert lied == [0, 0, 0]
    assert handled == here.output() == written


def test_x03_a_transaction_whose_membership_ended_before_its_commit(
    world: Callable[..., World], scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """X03: if the membership is gone once the messages are handled, nothing is sent for them, and they are handled again."""
    here = world()
    written = here.fill(5)
    true = GroupConsumer.membership
    lies = [Membership(-1, "")]
    monkeypatch.setattr(GroupConsumer, "membership", lambda self: lies.pop() if lies else true(self))
    handled: list[bytes | None] = []

    def handler(message: Message) -> Iterator[Record]:
        handled.append(message.value())
        return here.copy(message)

    with here.client(commit_interval=10) as kafka:
        here.run(kafka, handler)
    assert here.output() == written
    assert handled == [*written, *written]
    calls = [name for name in names(scripted) if name != "init_transactions"]
    assert calls == ["begin_transaction", "send_offsets_to_transaction", "commit_transaction"]


PROTOCOLS: list[dict[str, Any]] = [
    {},
    {"partition_assignment_strategy": "cooperative-sticky"},
    {"group_protocol": "consumer"},
]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=["range", "cooperative-sticky", "kip-848"])
def test_x12_a_member_joins_in_the_middle_of_a_transaction(world: Callable[..., World], protocol: dict[str, Any]) -> None:
    """X12: a rebalance that begins while a transaction is open moves partitions and loses or repeats nothing."""
    here = world(4)
    written = here.fill(400)
    joining = threading.Event()
    if "group_protocol" not in protocol:
        protocol = {**protocol, "heartbeat_interval_ms": 200}
    first = here.client(commit_interval=0.02, **protocol)
    second = here.client(commit_interval=0.02, transactional_id=f"{here.transactional_id}-b", **protocol)
    by_second: list[int | None] = []

    def slowly(message: Message) -> Iterator[Record]:
        if not joining.is_set():
            joining.set()
            until(lambda: len(members(here)) == 2, "the other one has joined")
        elif not by_second:
            time.sleep(0.02)  # leaves work for the other
        yield from here.copy(message)

    def counting(message: Message) -> Iterator[Record]:
        by_second.append(message.partition())
        return here.copy(message)

    def later() -> None:
        joining.wait(DEADLINE)
        second.run([here.source], counting)

    with first, second, here.stopping(first, second):
        other = in_thread(later)
        first.run([here.source], slowly, max_batch=20)
        assert other() is None
    assert here.output() == written
    assert by_second


# -- X04, X09, X10, X11: the end of a transaction ----------------------------------------------------------------------


def test_x04_a_raising_callback_does_not_hide_a_commit(world: Callable[..., World]) -> None:
    """X04: user callbacks that raise, also within the commit, change nothing: every transaction counts once."""
    here = world()
    written = here.fill(50)
    raised: list[str] = []

    def stats(_text: str) -> None:
        raised.append(threading.current_thread().name)
        raise ZeroDivisionError

    def handler(message: Message) -> Iterator[Record]:
        time.sleep(0.002)  # statistics are due in each commit
        return here.copy(message)

    with here.client(commit_interval=0.001, statistics_interval_ms=1, stats_cb=stats) as kafka:
        here.run(kafka, handler)
    assert len(raised) > 10
    assert here.output() == written


@pytest.mark.parametrize("sent", [True, False], ids=["committed", "not sent"])
def test_x09_a_commit_of_unknown_outcome(world: Callable[..., World], scripted: type[Scripted], sent: bool) -> None:  # noqa: FBT001 - two rows
    """X09: after a commit that failed fatally the committed offsets tell what happened; output exact either way."""
    here = world()
    written = here.fill(10)
    (scripted.after if sent else scripted.before)["commit_transaction"] = [fatal()]
    handled: list[bytes | None] = []

    def handler(message: Message) -> Iterator[Record]:
        handled.append(message.value())
        return here.copy(message)

    with here.client() as kafka:
        here.run(kafka, handler, max_batch=1)
        assert kafka._producer.renewals + names(scripted).count("init_transactions") > 1
    assert here.output() == written
    behind = 3  # of which one is handled, and not in flight yet
    assert len(handled) <= (10 if sent else 11) + behind, "only what was not committed, and what is behind it, is handled again"


@pytest.mark.parametrize("sent", [True, False], ids=["committed", "not sent"])
def test_x09_in_a_transaction_that_only_produces_it_is_said(
    world: Callable[..., World],
    scripted: type[Scripted],
    sent: bool,  # noqa: FBT001 - two rows
) -> None:
    """X09: without offsets nobody can tell; the caller hears DeliveryUnknown, and never that it was aborted."""
    here = world()
    (scripted.after if sent else scripted.before)["commit_transaction"] = [fatal()]
    with here.client() as kafka:
        with pytest.raises(DeliveryUnknown), kafka.transaction() as tx:
            tx.produce(here.sink, b"1")
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"2")
    assert here.output() == ([b"1", b"2"] if sent else [b"2"])


@pytest.mark.parametrize("error", [FencedError, KeyboardInterrupt])
def test_x09_a_loop_that_goes_on_after_a_failed_commit_skips_nothing(
    world: Callable[..., World], scripted: type[Scripted], error: type[BaseException]
) -> None:
    """X09, X13: whatever leaves the end of a transaction, its messages come again if the caller goes on."""
    here = world()
    written = here.fill(10)
    failure = KafkaException(KafkaError(KafkaError._FENCED, "for the test", fatal=True))
    scripted.before["commit_transaction"] = [failure if error is FencedError else KeyboardInterrupt()]

    def go_on() -> None:
        for tx in kafka.transactions([here.source], max_batch=4):
            with suppress(error), tx:
                for message in tx.messages:
                    tx.produce(here.sink, message.value())

    with here.client(transaction_timeout_ms=3000) as kafka:
        with suppress(KafkaGuaranteesError), here.stopping(kafka):  # a loop that refuses to go on skips nothing either
            go_on()
        if here.committed() != here.ends:
            here.run(kafka)
    assert here.output() == written


def test_x10_after_a_commit_timed_out_only_commit_is_called(world: Callable[..., World], scripted: type[Scripted]) -> None:
    """X10: commit that timed out is called again, and nothing else between; the transaction counts once."""
    here = world()
    written = here.fill(3)
    scripted.before["commit_transaction"] = [retriable(KafkaError._TIMED_OUT), retriable(KafkaError._TIMED_OUT)]
    with here.client(commit_interval=10) as kafka:
        here.run(kafka)
    first = names(scripted).index("commit_transaction")
    assert names(scripted)[first : first + 3] == ["commit_transaction"] * 3
    assert "abort_transaction" not in names(scripted)
    assert here.output() == written


def test_x11_send_offsets_is_repeated_with_the_same_arguments(world: Callable[..., World], scripted: type[Scripted]) -> None:
    """X11: the second send_offsets_to_transaction has the arguments of the first."""
    here = world()
    written = here.fill(3)
    scripted.before["send_offsets_to_transaction"] = [retriable(KafkaError.COORDINATOR_NOT_AVAILABLE)]
    scripted.after["send_offsets_to_transaction"] = [retriable(KafkaError._TIMED_OUT)]
    with here.client(commit_interval=10) as kafka:
        here.run(kafka)
    sent = [args for name, args in scripted.calls if name == "send_offsets_to_transaction"]
    assert len(sent) == 3
    offsets = [[(p.topic, p.partition, p.offset, p.leader_epoch) for p in partitions] for partitions, *_ in sent]  # type: ignore[attr-defined]
    assert offsets == [offsets[0]] * 3
    assert {metadata for _, metadata, _ in sent} == {sent[0][1]}
    assert here.output() == written


CALLS = ("init_transactions", "send_offsets_to_transaction", "commit_transaction", "abort_transaction")


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_never_returns_is_left_behind(
    world: Callable[..., World], scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Seen with librdkafka 2.16.0 while brokers came and went: work goes on with a new producer, exactly once."""
    here = world()
    written = here.fill(3)
    hanging, returned = threading.Event(), threading.Event()
    before, failed = getattr(scripted, call), False

    def hangs_once(self: Scripted, *args: object) -> Any:
        if not hanging.is_set():
            hanging.set()
            returned.wait(DEADLINE)
        return before(self, *args)

    def handler(message: Message) -> Iterator[Record]:
        nonlocal failed
        yield from here.copy(message)
        if not failed:  # so that there is something to abort
            failed = True
            yield Record(here.sink, TOO_LARGE)

    monkeypatch.setattr(scripted, call, hangs_once)
    monkeypatch.setattr("kafka_guarantees._transactional.HUNG", 1.0)
    try:
        with here.client(commit_interval=0.1, **{"transaction.timeout.ms": 2000, "socket.timeout.ms": 1500}) as kafka:
            with pytest.raises(DeliveryError):
                here.run(kafka, handler)
            if here.committed() != here.ends:
                here.run(kafka, handler)
    finally:
        returned.set()
    assert hanging.is_set()
    assert here.output() == written
    assert here.committed() == here.ends


# -- X05: a record that cannot be produced -----------------------------------------------------------------------------

BAD: dict[str, dict[str, Any]] = {
    "too large": {"value": TOO_LARGE},
    "unknown partition": {"partition": 99},
    "not bytes": {"value": object()},
    "NUL in a header's name": {"headers": {"a\0b": b""}},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_x05_a_swallowed_error_of_produce_aborts_the_transaction(world: Callable[..., World], bad: dict[str, Any]) -> None:
    """X05: a produce that raised cannot be swallowed: nothing of the transaction becomes visible, and that is said."""
    here = world()

    def swallowing() -> None:
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"before")
            with suppress(DeliveryError, TypeError, ValueError):
                tx.produce(here.sink, **bad)
            with suppress(KafkaGuaranteesError):
                tx.produce(here.sink, b"after")

    with here.client() as kafka:
        with pytest.raises(TransactionAborted):
            swallowing()
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"next")
    assert here.output() == [b"next"]


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_x05_within_transactions_the_input_comes_again(world: Callable[..., World], bad: dict[str, Any]) -> None:
    """X05: a swallowed error of produce aborts a consuming transaction too; its messages are the next one's."""
    here = world()
    written = here.fill(6)
    batches: list[list[bytes | None]] = []
    with here.client() as kafka, here.stopping(kafka):
        for tx in kafka.transactions([here.source]):
            batches.append([message.value() for message in tx.messages])
            with suppress(TransactionAborted), tx:
                for message in tx.messages:
                    tx.produce(here.sink, message.value())
                if len(batches) == 1:
                    with suppress(DeliveryError, TypeError, ValueError):
                        tx.produce(here.sink, **bad)
    assert batches[1][0] == batches[0][0]
    assert here.output() == written


def test_x05_in_run_the_record_is_an_error_and_nothing_of_its_message_is_visible(world: Callable[..., World]) -> None:
    """X05: run ends with DeliveryError; the messages before it are committed without it."""
    here = world()
    written = here.fill(6)

    def handler(message: Message) -> Iterator[Record]:
        yield from here.copy(message)
        if message.offset() == 3:
            yield Record(here.sink, TOO_LARGE)

    with here.client(commit_interval=10) as kafka:
        with pytest.raises(DeliveryError, match=here.sink):
            here.run(kafka, handler)
        assert here.output() == written[:3]
        here.run(kafka)
    assert here.output() == written


def test_x05_a_topic_that_does_not_exist_ends_the_run(world: Callable[..., World], fresh: Callable[[str], str]) -> None:
    """P19: a record for an unknown topic ends run with DeliveryError that names it, in seconds; not a loop for ever."""
    here = world()
    here.fill(1)
    nowhere = fresh("nowhere")
    started = time.monotonic()
    with here.client() as kafka, pytest.raises(DeliveryError, match=nowhere):
        here.run(kafka, lambda message: [Record(nowhere, message.value())])
    assert time.monotonic() - started < 12
    assert here.committed() in ([0], [-1001])


# -- X06, X07, X16: fenced, timed out ----------------------------------------------------------------------------------


def test_x06_a_second_instance_fences_the_first_and_is_not_disturbed(world: Callable[..., World]) -> None:
    """X06, X07: with the same id twice the older one gets FencedError in seconds, and never comes back."""
    here = world()
    with here.client() as first, here.client() as second:

        def fenced() -> None:
            with first.transaction() as tx:
                tx.produce(here.sink, b"first")
                with second.transaction() as other:
                    other.produce(here.sink, b"second")

        started = time.monotonic()
        with pytest.raises(FencedError, match=here.transactional_id):
            fenced()
        assert time.monotonic() - started < 10
        first.close()
        for _ in range(3):
            with second.transaction() as tx:
                tx.produce(here.sink, b"second")
        assert second._producer.renewals == 0
    assert here.output() == [b"second"] * 4


@pytest.mark.parametrize("loop", [False, True])
def test_x06_fenced_while_producing_is_no_mere_abort(world: Callable[..., World], loop: bool) -> None:  # noqa: FBT001
    """X06: produce() can only say that the transaction must abort. Leaving its block says why: else both go on for ever."""
    here = world()
    here.fill(1)
    with here.client() as first, here.client() as second:

        def produce_until_it_fails(transaction: Transaction) -> None:
            transaction.produce(here.sink, b"first")
            with second.transaction() as other:
                other.produce(here.sink, b"second")
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                transaction.produce(here.sink, b"first")
                time.sleep(0.05)

        def use() -> None:
            for tx in first.transactions([here.source]) if loop else [first.transaction()]:
                with tx as transaction:
                    produce_until_it_fails(transaction)

        with pytest.raises(FencedError, match=here.transactional_id):
            use()
    assert here.output() == [b"second"]


def test_x16_transactions_come_to_a_size_that_fits_into_their_time(world: Callable[..., World]) -> None:
    """X16: a backlog that takes three times as long as a transaction may is gone through, with max_batch as it is."""
    here = world()
    here.fill(250)
    sizes: list[int] = []
    with here.client(transaction_timeout_ms=1500) as kafka, here.stopping(kafka):
        for tx in kafka.transactions([here.source]):
            with tx:
                sizes.append(len(tx.messages))
                for message in tx.messages:
                    time.sleep(0.02)
                    tx.produce(here.sink, message.value())
    assert sizes[0] <= 20
    assert max(sizes) * 0.02 < 1.5
    assert len(here.output()) == 250


@pytest.mark.parametrize("when", ["before", "between", "between, without a record", "inside"])
def test_a_loop_that_is_stopped_ends_where_no_broker_answers(
    world: Callable[..., World], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As run() does: what is open is left to the brokers, and SIGTERM with stop() in it is no error of the process."""
    monkeypatch.setattr("kafka_guarantees._lifecycle.STOP_GRACE", 1.3)
    here = world()
    here.fill(3)
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(here.bootstrap))
        here.bootstrap, real = proxy.bootstrap, here.bootstrap
        with here.client() as kafka:
            if when == "before":
                stack.enter_context(proxy.refuse())
                threading.Timer(1.0, kafka.stop).start()
            for tx in kafka.transactions([here.source]):
                if when.startswith("between"):
                    stack.enter_context(proxy.refuse())
                    time.sleep(0.5)  # the producer has seen it, and would be made anew
                    threading.Timer(1.0, kafka.stop).start()
                with tx:
                    if when != "between, without a record":
                        tx.produce(here.sink, b"x")
                    if when == "inside":
                        stack.enter_context(proxy.refuse())
                        kafka.stop()
            assert not kafka._lifecycle.in_run
        here.bootstrap = real
    assert here.committed() in ([0], [-1001])


def test_x06_a_run_that_is_fenced_ends(world: Callable[..., World]) -> None:
    """X06, X07: run of the older instance ends with FencedError in seconds; its messages are the newer one's."""
    here = world()
    written = here.fill(20)
    with here.client(commit_interval=10) as first, here.client() as second:

        def handler(message: Message) -> Iterator[Record]:
            yield from here.copy(message)
            if message.offset() == 5:
                with second.transaction() as tx:
                    tx.produce(here.sink, b"second")

        started = time.monotonic()
        with pytest.raises(FencedError):
            here.run(first, handler)
        assert time.monotonic() - started < 10
        first.close()
        here.run(second)
        assert second._producer.renewals == 0
    assert here.output() == [*written, b"second"]


def test_x16_a_handler_slower_than_a_transaction_holds_up_nobody(world: Callable[..., World]) -> None:
    """X16: no transaction is open while a handler works: none times out, and readers of the output do not wait for it."""
    here = world()
    written = here.fill(3)
    hidden: list[bool] = []
    admin = AdminClient({"bootstrap.servers": here.bootstrap})

    def handler(message: Message) -> Iterator[Record]:
        yield from here.copy(message)
        if not hidden:
            fill(here.bootstrap, here.sink, [b"of another"])
            hidden.append(has_open_transaction(admin, here.sink))
            assert here.output() == [b"of another"]
            time.sleep(3)

    with here.client(commit_interval=0.5, transaction_timeout_ms=1500) as kafka:
        here.run(kafka, handler)
        assert kafka._producer.renewals == 0
    assert here.output() == [*written, b"of another"]
    assert hidden == [False]


@pytest.mark.parametrize("more", [False, True], ids=["silent afterwards", "produces afterwards"])
def test_x07_a_loop_slower_than_its_transaction(world: Callable[..., World], more: bool) -> None:  # noqa: FBT001 - two rows
    """X07, X16: a transaction that the coordinator timed out looks fenced and is not: it is handled again, output exact.

    Meanwhile the readers of the output wait no longer than the timeout of the transaction and some seconds.
    """
    here = world()
    written = here.fill(3)
    wire = Wire(here.bootstrap, here.transactional_id)
    waited: list[float] = []

    with here.client(commit_interval=0.5, transaction_timeout_ms=1500) as kafka:
        for tx in kafka.transactions([here.source], until_idle=1):
            with tx:
                for message in tx.messages:
                    tx.produce(here.sink, message.value())
                if not waited:
                    wire.wait_for("Ongoing")
                    fill(here.bootstrap, here.sink, [b"of another"])
                    started = time.monotonic()
                    assert here.output() == [b"of another"]
                    waited.append(time.monotonic() - started)
                    wire.wait_for("CompleteAbort")
                    if more:
                        tx.produce(here.sink, b"aborted")
    assert here.output() == [*written, b"of another"]
    assert waited[0] < 1.5 + 10


# -- X13, X18, X19, X26, X27: the caller's own loop --------------------------------------------------------------------


def test_x13_one_of_three_transactions_is_aborted(world: Callable[..., World]) -> None:
    """X13: aborts at random lose nothing, repeat nothing and keep the order of each partition."""
    here = world(4)
    written = here.fill(400)
    chance = random.Random(13)
    aborted = 0
    with here.client() as kafka, here.stopping(kafka):
        for tx in kafka.transactions([here.source], max_batch=10):
            with suppress(InterruptedError), tx:
                for message in tx.messages:
                    tx.produce(here.sink, message.value(), partition=message.partition())
                if chance.randrange(3) == 0:
                    aborted += 1
                    raise InterruptedError
    messages = read_all(here.bootstrap, here.sink)
    assert aborted > 5
    assert values(messages) == written
    for number in range(4):
        assert [m.value() for m in messages if m.partition() == number] == written[number::4]


def test_x18_nothing_is_produced_outside_of_the_block(world: Callable[..., World]) -> None:
    """X18: produce before the begin or after the end raises and sends nothing."""
    here = world()
    here.fill(1)
    with here.client() as kafka, here.stopping(kafka):
        for tx in kafka.transactions([here.source]):
            with pytest.raises(KafkaGuaranteesError, match="new"):
                tx.produce(here.sink, b"early")
            with tx:
                tx.produce(here.sink, b"in time")
            with pytest.raises(KafkaGuaranteesError, match="over"):
                tx.produce(here.sink, b"late")
            with kafka_error_of_reuse(), tx:
                pass
        with kafka.transaction() as tx, kafka_error_of_reuse(), tx:
            pass
    assert here.output() == [b"in time"]


def kafka_error_of_reuse() -> Any:
    return pytest.raises(KafkaGuaranteesError, match="used once")


def test_x19_what_the_brokers_acknowledged_is_not_visible_before_the_commit(world: Callable[..., World]) -> None:
    """X19: records that were acknowledged vanish with an abort; produce gives no receipt that could say otherwise."""
    here = world()
    with here.client() as kafka:
        with suppress(InterruptedError), kafka.transaction() as tx:
            assert tx.produce(here.sink, b"acknowledged") is None  # type: ignore[func-returns-value]
            kafka._producer.flush()
            assert values(read_all(here.bootstrap, here.sink, isolation="read_uncommitted")) == [b"acknowledged"]
            raise InterruptedError
        assert here.output() == []


def test_x20_producers_that_are_replaced_leave_nothing_behind(world: Callable[..., World]) -> None:
    """X20: 22 new producers, 2 of them after a fatal error, leave the threads and files of one, and in the end of none."""
    here = world()

    def used() -> tuple[int, int]:
        gc.collect()
        return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))

    def settle(threads: int, files: int) -> None:
        until(lambda: used()[0] <= threads and used()[1] <= files, f"{threads} threads and {files} files are left")

    def fenced() -> None:
        peer = Producer({"bootstrap.servers": here.bootstrap, "transactional.id": here.transactional_id})
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"aborted")
            kafka._producer.flush()
            peer.init_transactions()

    before = used()
    with here.client() as kafka:
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"0")
        one = used()
        for number in range(20):
            if number % 10 == 0:
                with pytest.raises(FencedError):
                    fenced()
            kafka._producer._state.soil("for the test")
            with kafka.transaction() as tx:
                tx.produce(here.sink, b"1")
        settle(*one)
    settle(*before)
    assert here.output() == [b"0"] + [b"1"] * 20


def test_x24_the_last_run_is_ended_before_anything_is_fetched(
    world: Callable[..., World], scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """X24: init_transactions has returned before the consumer subscribes."""
    here = world()
    here.fill(1)

    class Subscribing(Consumer):
        def subscribe(self, *args: Any, **options: Any) -> None:
            scripted.calls.append(("subscribe", ()))
            super().subscribe(*args, **options)

    monkeypatch.setattr("kafka_guarantees._group_client.Consumer", Subscribing)
    scripted.before["init_transactions"] = [retriable(KafkaError._TIMED_OUT)]
    with here.client() as kafka:
        here.run(kafka)
    calls = names(scripted)
    assert calls.count("init_transactions") > 1
    assert calls.index("subscribe") == calls.count("init_transactions")


def test_x26_one_thread_at_a_time(world: Callable[..., World]) -> None:
    """X26: while one thread has a transaction, every entry of another raises, and the first is not disturbed."""
    here = world()

    def enter(kafka: ExactlyOnce) -> None:
        with kafka.transaction() as other:
            other.produce(here.sink, b"of another thread")

    with here.client() as kafka:
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"1")
            for entry in (
                lambda: enter(kafka),
                lambda: kafka.run([here.source], here.copy),
                lambda: next(kafka.transactions([here.source])),
            ):
                assert isinstance(in_thread(entry)(), KafkaGuaranteesError)
            tx.produce(here.sink, b"2")
        assert kafka._producer.renewals == 0
    assert here.output() == [b"1", b"2"]


def test_x26_a_handler_cannot_open_a_second_transaction(world: Callable[..., World]) -> None:
    """X26: transaction() of the same client within its own run raises; the run ends with HandlerError, nothing visible."""
    here = world()
    here.fill(1)

    def handler(message: Message) -> Iterator[Record]:
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"nested")
        return here.copy(message)

    with here.client() as kafka, pytest.raises(HandlerError, match="running already"):
        here.run(kafka, handler)
    assert here.output() == []


def test_x27_empty_transactions(world: Callable[..., World]) -> None:
    """X27: an empty block is no error, and the offsets of messages without output move."""
    here = world()
    here.fill(5)
    with here.client() as kafka:
        for _ in range(2):
            with kafka.transaction():
                pass
        here.run(kafka, lambda _message: None)
        here.fill(5)
        with here.stopping(kafka):
            for tx in kafka.transactions([here.source]):
                with tx:
                    pass
    assert here.committed() == [10]
    assert here.output() == []


@pytest.mark.parametrize("swallows", [True, False])
def test_x07_a_block_that_goes_on_producing_in_an_aborted_transaction(
    world: Callable[..., World],
    swallows: bool,  # noqa: FBT001 - two rows
) -> None:
    """X07, X05: librdkafka has a fatal error then, which a record is not to be told of: what it means the abort finds out."""
    here = world()
    wire = Wire(here.bootstrap, here.transactional_id)

    def block(kafka: ExactlyOnce) -> None:
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"1")
            kafka._producer.flush()
            wire.wait_for("CompleteAbort")
            tx.produce(here.sink, b"2")
            time.sleep(1)
            for _ in range(2):
                with suppress(TransactionAborted) if swallows else nullcontext():
                    tx.produce(here.sink, b"3")

    with here.client(commit_interval=0.5, transaction_timeout_ms=1500) as kafka:
        with pytest.raises(TransactionAborted):
            block(kafka)
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"good")
    assert here.output() == [b"good"]


def test_x07_a_loop_that_goes_on_producing_in_an_aborted_transaction_has_its_messages_again(
    world: Callable[..., World],
) -> None:
    """X07: likewise; it is no reason to leave the loop."""
    here = world()
    written, first = here.fill(3), [True]
    wire = Wire(here.bootstrap, here.transactional_id)
    with here.client(commit_interval=0.5, transaction_timeout_ms=1500) as kafka:
        for tx in kafka.transactions([here.source], until_idle=1):
            with tx:
                for message in tx.messages:
                    tx.produce(here.sink, message.value())
                if first.pop() if first else False:
                    wire.wait_for("Ongoing")
                    wire.wait_for("CompleteAbort")
                    tx.produce(here.sink, b"aborted")
                    time.sleep(1)
                    tx.produce(here.sink, b"aborted")
    assert here.output() == written


@pytest.mark.parametrize("how", ["transaction", "transactions"])
def test_who_is_fenced_while_it_produces_does_not_take_its_id_back(world: Callable[..., World], how: str) -> None:
    """KIP-98: the newer one goes on; this one is told to stop."""
    here = world()
    here.fill(3)
    with here.client() as old, here.client() as new:

        def use(given: AbstractContextManager[Transaction]) -> None:
            with given as tx:
                tx.produce(here.sink, b"old")
                old._producer.flush()
                with new.transaction() as other:
                    other.produce(here.sink, b"new")
                tx.produce(here.sink, b"old")
                time.sleep(1)
                tx.produce(here.sink, b"old")

        def loop() -> None:
            for tx in old.transactions([here.source], until_idle=1):
                use(tx)

        with pytest.raises(FencedError):
            use(old.transaction()) if how == "transaction" else loop()
        with new.transaction() as other:
            other.produce(here.sink, b"new")
    assert here.output() == [b"new", b"new"]


def test_x07_a_block_slower_than_its_transaction_is_aborted_for_certain(world: Callable[..., World]) -> None:
    """Its commit was never called: the block can be run again, and hears which setting was exceeded."""
    here = world()
    wire = Wire(here.bootstrap, here.transactional_id)

    def too_slow() -> None:
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"1")
            kafka._producer.flush()
            wire.wait_for("CompleteAbort")
            tx.produce(here.sink, b"2")

    with here.client(transaction_timeout_ms=1500) as kafka, pytest.raises(TransactionAborted, match="took longer than"):
        too_slow()
    assert here.output() == []


def test_x28_a_transaction_that_the_coordinator_does_not_know_any_more(world: Callable[..., World]) -> None:
    """X28: INVALID_TXN_STATE at the commit is fatal for librdkafka; the caller hears that it is unknown and can go on."""
    here = world()
    wire = Wire(here.bootstrap, here.transactional_id)

    def ended_by_another() -> None:
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"1")
            kafka._producer.flush()
            assert wire.end_txn(wire.identity(), commit=False) == 0

    with here.client() as kafka:
        with pytest.raises((DeliveryUnknown, TransactionAborted)):
            ended_by_another()
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"2")
    assert here.output() == [b"2"]


# -- transactions(): ways to leave it ----------------------------------------------------------------------------------


def test_a_loop_that_is_left_by_break(world: Callable[..., World]) -> None:
    """Break within the block commits it, break before it does not; close() then leaves the group at once."""
    here = world()
    here.fill(4)
    with here.client() as kafka:
        for tx in kafka.transactions([here.source], max_batch=2):
            with tx:
                tx.produce(here.sink, b"1")
                break
    assert here.committed() == [2]
    with here.client() as kafka:
        for _unused in kafka.transactions([here.source], max_batch=2):
            break
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert here.committed() == [2]
    assert members(here) == []


def test_a_loop_goes_on_after_an_exception(world: Callable[..., World]) -> None:
    """An exception that is caught in the loop aborts its transaction; the next one has the same messages."""
    here = world()
    here.fill(4)
    seen: list[list[bytes | None]] = []
    with here.client() as kafka, here.stopping(kafka):
        for tx in kafka.transactions([here.source], max_batch=2):
            seen.append([message.value() for message in tx.messages])
            with suppress(ZeroDivisionError), tx:
                tx.produce(here.sink, b"%d" % (1 // (len(seen) - 1)))
    first = seen[0]
    assert seen[1][: len(first)] == first
    assert here.committed() == [4]
    assert len(here.output()) == len(seen) - 1


def test_a_transaction_that_is_not_used_is_an_error(world: Callable[..., World]) -> None:
    """A transaction that was not used in a ``with`` ends the loop: its messages would be skipped."""
    here = world()
    here.fill(4)
    with here.client() as kafka, pytest.raises(KafkaGuaranteesError, match="with tx"):
        for _tx in kafka.transactions([here.source]):
            pass
    assert here.committed() in ([0], [-1001])


def test_a_transaction_that_cannot_begin_is_over(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on after TransactionAborted, with the same messages; it is not told that it did not use its transaction."""
    here = world()
    written = here.fill(3)
    begin, doubts = TransactionalProducer.begin, [InDoubt("nobody knows")]

    def doubtful(producer: TransactionalProducer) -> None:
        if doubts:
            raise doubts.pop()
        begin(producer)

    monkeypatch.setattr(TransactionalProducer, "begin", doubtful)
    aborted = 0
    with here.client() as kafka:
        for tx in kafka.transactions([here.source], until_idle=1):
            try:
                with tx:
                    for message in tx.messages:
                        tx.produce(here.sink, message.value())
            except TransactionAborted:
                aborted += 1
    assert aborted == 1
    assert here.output() == written


def test_a_transaction_of_a_loop_that_has_ended_is_over(world: Callable[..., World]) -> None:
    """It is an error that says so, and none is open then."""
    here = world()
    here.fill(3)
    with here.client() as kafka:
        loop = kafka.transactions([here.source])
        kept = next(loop)
        loop.close()
        with pytest.raises(KafkaGuaranteesError, match="has ended"), kept:
            pytest.fail("it began")
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"another")
    assert here.output() == [b"another"]


def test_an_interrupt_in_the_block_aborts(world: Callable[..., World]) -> None:
    """KeyboardInterrupt leaves the block, the loop and the client; nothing of the transaction is visible."""
    here = world()
    here.fill(4)

    def interrupted() -> None:
        with here.client() as kafka:
            for tx in kafka.transactions([here.source]):
                with tx:
                    tx.produce(here.sink, b"1")
                    kafka._producer.flush()
                    signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert here.output() == []
    assert here.committed() in ([0], [-1001])
    with here.client() as kafka:
        here.run(kafka)
    assert len(here.output()) == 4


def test_close_ends_what_a_hanging_handler_has_open(world: Callable[..., World]) -> None:
    """close() is bounded: a handler that hangs in another thread is not waited for, and its transaction is aborted."""
    here = world()
    here.fill(1)
    hanging, release = threading.Event(), threading.Event()

    def handler(message: Message) -> Iterator[Record]:
        yield from here.copy(message)
        hanging.set()
        release.wait(DEADLINE)

    kafka = here.client()
    ended = in_thread(lambda: kafka.run([here.source], handler))
    assert hanging.wait(DEADLINE)
    started = time.monotonic()
    kafka.close(0.5)
    assert time.monotonic() - started < 5
    release.set()
    error = ended()
    assert error is None or isinstance(error, KafkaGuaranteesError), repr(error)
    assert here.output() == []
    assert here.committed() in ([0], [-1001])


KILLED = """
import sys, time
from kafka_guarantees import ExactlyOnce
with ExactlyOnce({"bootstrap.servers": sys.argv[1], "transactional.id": sys.argv[2]}) as kafka:
    with kafka.transaction() as tx:
        tx.produce(sys.argv[3], b"killed")
        kafka._producer.flush()
        print("open", flush=True)
        time.sleep(60)
"""


def test_x14_a_restart_after_sigkill_takes_over(world: Callable[..., World]) -> None:
    """X14, X24: a new process with the id of a killed one ends its transaction and goes on in less than 3 s."""
    here = world()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, here.bootstrap, here.transactional_id, here.sink], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
        finally:
            process.kill()
    started = time.monotonic()
    with here.client() as kafka:
        with kafka.transaction() as tx:
            tx.produce(here.sink, b"restarted")
        assert time.monotonic() - started < 3
    assert here.output() == [b"restarted"]
