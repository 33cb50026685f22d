"""ExactlyOnce where the brokers stay away, or take records more slowly than a transaction may last."""

from __future__ import annotations

import struct
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from confluent_kafka import KafkaError, Producer

from kafka_guarantees import (
    AtLeastOnce,
    DeliveryError,
    DeliveryUnknown,
    ExactlyOnce,
    KafkaGuaranteesError,
    Record,
    Transaction,
    TransactionAborted,
)
from kafka_guarantees._enqueue import QueueFull, enqueue
from kafka_guarantees._transaction_state import Event
from kafka_guarantees.prove.proxy import API, Proxy
from kafka_guarantees.transaction import Consumed

from .conftest import fill, read_all, values
from .kafka_wire import Proxy as Relay
from .world import in_thread, retriable, until, without_collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from confluent_kafka import Message

    from kafka_guarantees.testing.local_kafka import RunningKafka

    from .kafka_wire import Held
    from .world import World

pytestmark = pytest.mark.broker

NOWHERE = "127.0.0.1:1"

GRACE = 1.6  # seconds: longer than a client that stops waits for brokers


# -- a run goes on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [True, False], ids=["dead letter topic", "none"])
def test_a_queue_that_stays_full_is_no_fault_of_a_record(
    world: Callable[..., World],
    kafka_topic: Callable[..., str],
    dead: bool,  # noqa: FBT001 - two rows
) -> None:
    """Brokers that are away for longer than a transaction may last, while the queue is full, set no message aside."""
    here, letters = world(), kafka_topic()
    here.fill(3)
    with Proxy(here.bootstrap) as proxy:
        config = {
            "bootstrap.servers": proxy.bootstrap,
            "group.id": here.group,
            "transactional.id": here.transactional_id,
            "queue.buffering.max.messages": 100,
            "transaction.timeout.ms": 3000,
        }
        away: list[threading.Thread] = []

        def gone() -> None:
            with proxy.delay(4):  # silent: a connection that breaks would be noticed before the transaction begins
                time.sleep(2)

        def handler(message: Message) -> Iterator[Record]:
            if not away:
                away.append(threading.Thread(target=gone))
                away[0].start()
                time.sleep(0.3)
            for number in range(200):
                yield Record(here.sink, b"%s/%d" % (message.value(), number))

        with ExactlyOnce(config, dead_letter=letters if dead else None, preflight="off") as kafka:
            here.run(kafka, handler)
        away[0].join()
    assert read_all(here.bootstrap, letters) == []
    assert len(here.output()) == 600
    assert here.committed() == [3]


def test_a_queue_that_stays_full_ends_a_run_at_least_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By delivery.timeout.ms: nothing of its portion is committed, and its message is not set aside."""
    with AtLeastOnce({"bootstrap.servers": "127.0.0.1:1"}, dead_letter="letters") as kafka:
        noted: list[Exception] = []

        def post(_record: Record) -> None:
            raise QueueFull("full")

        monkeypatch.setattr(kafka, "_producer", SimpleNamespace(post=post, note=noted.append))
        kafka._send_all(Record("t", b"x"))
        monkeypatch.undo()
    assert [str(error) for error in noted] == ["full"]


def test_x21_a_record_that_no_queue_can_hold_is_the_records_fault() -> None:
    """Else its transaction is aborted and begun again for ever, and a dead letter topic is of no use."""
    raw = Producer({"bootstrap.servers": NOWHERE, "queue.buffering.max.kbytes": 100, "log_level": 0})
    deadline = time.monotonic() + 1
    with pytest.raises(DeliveryError, match="larger than the producer's queue") as raised:
        enqueue(raw, Record("t", bytes(200_000)), None, lambda _: time.monotonic() < deadline, set(), serve=lambda call: call())
    assert not isinstance(raised.value, QueueFull)


def test_a_queue_that_others_keep_full_is_no_fault_of_the_record() -> None:
    """What is in it may go, or the brokers may come back."""
    raw = Producer({"bootstrap.servers": NOWHERE, "queue.buffering.max.kbytes": 100, "log_level": 0})
    raw.produce("t", bytes(90_000))
    deadline = time.monotonic() + 1
    with pytest.raises(QueueFull):
        enqueue(raw, Record("t", bytes(90_000)), None, lambda _: time.monotonic() < deadline, set(), serve=lambda call: call())
    raw.purge()


def test_a_record_that_the_queue_can_never_hold_is_too_large(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """It is not waited for in vain, and does not end the run where there is a dead letter topic, which gets what has room."""
    source, target, letters = kafka_topic(), kafka_topic(), kafka_topic()
    fill(kafka.bootstrap, source, [b"y" * 400_000, b"next"])
    config = {
        "bootstrap.servers": kafka.bootstrap,
        "group.id": fresh("group"),
        "queue.buffering.max.kbytes": 256,
        "delivery.timeout.ms": 5_000,
    }
    with AtLeastOnce(config, dead_letter=letters) as client:
        client.run([source], lambda message: Record(target, message.value()), until_idle=1)
    assert values(read_all(kafka.bootstrap, target)) == [b"next"]
    assert len(read_all(kafka.bootstrap, letters)) == 1


@pytest.mark.parametrize("batches", [False, True], ids=["run", "run_batches"])
def test_outputs_that_do_not_fit_into_a_transaction_make_smaller_ones(
    world: Callable[..., World],
    batches: bool,  # noqa: FBT001 - two rows
) -> None:
    """Brokers that take the outputs of a batch more slowly than a transaction may last: fewer at a time, not for ever."""
    here = world()
    here.fill(20)

    def outputs(message: Message) -> Iterator[Record]:
        for number in range(5):
            yield Record(here.sink, b"%s/%d" % (message.value(), number) + bytes(50_000))

    def of_all(messages: list[Message]) -> Iterator[Record]:
        for message in messages:
            yield from outputs(message)

    with Proxy(here.bootstrap) as proxy:
        slow = {"max_in_flight": 1, "batch_num_messages": 1, "batch_size": 60_000}
        client = here.client(bootstrap_servers=proxy.bootstrap, transaction_timeout_ms=2000, **slow)
        with proxy.delay(0.02), client as kafka, here.stopping(kafka):  # 100 records take 4 s, and more
            if batches:
                kafka.run_batches([here.source], of_all)
            else:
                kafka.run([here.source], outputs)
    assert here.committed() == [20]
    assert len(here.output()) == 100


def test_a_run_outlasts_brokers_that_are_away_while_something_is_in_flight(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on by itself after brokers that were down: idle, and in the middle of a transaction."""
    here = world()
    here.fill(2000)
    monkeypatch.setattr("kafka_guarantees._transactional.UNANSWERED", 5.0)  # not a whole minute
    with Proxy(here.bootstrap) as proxy:
        over = threading.Event()
        handled: list[int] = []

        def gone() -> None:
            until(lambda: len(handled) > 100, "messages are handled")
            with proxy.refuse():
                over.wait(12)

        def handler(message: Message) -> Record:
            handled.append(1)
            time.sleep(0.002)
            return Record(here.sink, message.value())

        ended = in_thread(gone)
        with here.client(bootstrap_servers=proxy.bootstrap, transaction_timeout_ms=2000) as kafka:
            here.run(kafka, handler)
        assert ended() is None
    assert len(here.output()) == 2000


class Silent:
    """A C producer whose brokers are away."""

    def _no(self, _within: float) -> None:
        time.sleep(0.02)
        raise retriable(KafkaError._TIMED_OUT)

    abort_transaction = init_transactions = _no

    def poll(self, _within: float) -> int:
        return 0


def test_y03_a_block_that_raises_is_left_though_the_brokers_stay_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """SystemExit, as of a SIGTERM, or an error of the loop's: a run waits on for its brokers, and who leaves it does not."""
    monkeypatch.setattr("kafka_guarantees._transactional.UNANSWERED", 1.0)
    config = {"bootstrap.servers": NOWHERE, "group.id": "g", "transactional.id": "x", "transaction.timeout.ms": 1000}
    kafka = ExactlyOnce(config, preflight="off")
    producer: Any = kafka._producer
    producer.make = lambda *_: setattr(producer, "raw", Silent())
    producer.let_go = lambda: setattr(producer, "raw", None)
    producer.raw, producer._watch, producer.persists = Silent(), SimpleNamespace(refused=None), True  # as in a run
    producer._state.on(Event.INITIALISED, time.monotonic())
    producer._state.on(Event.BEGUN, time.monotonic())
    consumed: Any = Consumed(cast("Any", object()), cast("Any", SimpleNamespace(messages=[])), {}, lambda: None)
    transaction = Transaction(producer, kafka._lifecycle, kafka._writing, consumed)
    transaction._phase = "open"
    left = threading.Event()

    def leave() -> None:
        with kafka._lifecycle.running(lambda: None):
            assert transaction.__exit__(SystemExit, SystemExit(143), None) is False
            left.set()

    leaving = in_thread(leave)
    try:
        assert left.wait(10)
    finally:
        kafka._lifecycle.leave(0)
        assert leaving() is None
    assert producer.persists


def test_a_run_that_is_closed_while_it_waits_for_brokers_says_so() -> None:
    """Not an AttributeError of None: close() gives up when the run may."""
    kafka = ExactlyOnce({"bootstrap.servers": NOWHERE, "group.id": "g", "transactional.id": "x"}, preflight="off")
    running = in_thread(lambda: kafka.run(["t"], lambda _: None))
    time.sleep(1.2)
    kafka.close(2)
    assert type(running()) in {type(None), KafkaGuaranteesError}


# -- what is said of a commit in doubt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "for a minute"])
def test_a_commit_in_doubt_is_said_also_where_the_brokers_stay_away(
    world: Callable[..., World],
    stop: bool,  # noqa: FBT001 - two rows
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Committed, its answer lost, and no broker answers from then on: not "nothing was sent", nor "they abort it"."""
    here = world()
    monkeypatch.setattr("kafka_guarantees._transactional.UNANSWERED", 5.0)  # not a whole minute
    with Proxy(here.bootstrap) as proxy, here.client(bootstrap_servers=proxy.bootstrap, transaction_timeout_ms=2000) as kafka:
        over = threading.Event()

        def cut() -> None:
            proxy.drop_responses({API["EndTxn"]}).wait(20)
            if stop:
                kafka.stop()
            with proxy.refuse():
                over.wait(30)

        def second() -> None:
            with kafka.transaction() as tx:
                tx.produce(here.sink, b"second")
                time.sleep(0.5)

        with kafka.transaction() as tx:
            tx.produce(here.sink, b"first")
        ended = in_thread(cut)
        try:
            with pytest.raises(DeliveryUnknown) as raised:
                second()
        finally:
            over.set()
            assert ended() is None
    assert "Nothing was" not in str(raised.value)
    assert here.output() == [b"first", b"second"]


# -- answers that take their time ----------------------------------------------------------------------------------------


def test_a_run_goes_on_where_each_answer_takes_longer_than_half_a_second(world: Callable[..., World]) -> None:
    """An answer to AddOffsetsToTxn that comes after the time of the call librdkafka does not take, and asks again."""
    here = world()
    written = here.fill(3)
    handled: list[bytes | None] = []

    def handler(message: Message) -> Record:
        handled.append(message.value())
        return Record(here.sink, message.value())

    with Proxy(here.bootstrap) as proxy, proxy.delay(0.3):
        with here.client(bootstrap_servers=proxy.bootstrap, transaction_timeout_ms=20_000, transactions_in_flight=1) as kafka:
            here.run(kafka, handler)
        asked = proxy.requests(lambda _: True)
    assert handled == here.output() == written
    assert asked["AddOffsetsToTxn"] <= 3


def test_a_coordinator_that_loads_for_a_while_aborts_nothing(world: Callable[..., World]) -> None:
    """As after each failover: offsets are sent again for as long as the transaction may last."""
    here = world()
    written = here.fill(3)
    handled: list[bytes | None] = []
    name = here.source.encode()
    loading = b"\0" + struct.pack(">i", 0) + b"\2" + bytes([len(name) + 1]) + name
    loading += b"\2" + struct.pack(">ih", 0, KafkaError.COORDINATOR_LOAD_IN_PROGRESS) + b"\0\0\0"
    began: list[float] = []

    def handler(message: Message) -> Record:
        handled.append(message.value())
        return Record(here.sink, message.value())

    with Relay(here.bootstrap) as proxy:

        def refuse(held: Held) -> None:
            began.append(time.monotonic())
            if began[-1] < began[0] + 2:
                proxy.hold_next(API["TxnOffsetCommit"], refuse)
                held.answer(loading)
            else:
                held.send()

        proxy.hold_next(API["TxnOffsetCommit"], refuse)
        with here.client(bootstrap_servers=proxy.bootstrap, transactions_in_flight=1) as kafka:
            kafka.run([here.source], handler, until_idle=1)
    assert len(began) > 2
    assert handled == here.output() == written
    assert here.committed() == [3]


# -- after a stop --------------------------------------------------------------------------------------------------------


def test_a_block_that_raises_a_while_after_a_stop_leaves_nothing_open(world: Callable[..., World]) -> None:
    """Readers do not wait for a transaction whose block raised, whenever stop() was called: the brokers answer."""
    here = world()
    here.fill(3)

    def leave_one(kafka: ExactlyOnce) -> None:
        for tx in kafka.transactions([here.source]):
            with tx:
                tx.produce(here.sink, b"half")
                kafka.stop()
                time.sleep(GRACE)
                raise RuntimeError("for the test")

    with here.client() as kafka, pytest.raises(RuntimeError, match="for the test"):
        leave_one(kafka)
    fill(here.bootstrap, here.sink, [b"other"])
    assert values(read_all(here.bootstrap, here.sink, timeout=1)) == [b"other"]


def test_a_stop_of_long_ago_does_not_hurt_a_transaction_that_only_produces(world: Callable[..., World]) -> None:
    """It waits for room in the queue, and for the brokers, as if nobody had called stop(): that is for the next run."""
    here = world()
    with here.client(queue_buffering_max_messages=100) as kafka:
        kafka.stop()
        time.sleep(GRACE)
        with kafka.transaction() as tx:
            for number in range(500):
                tx.produce(here.sink, b"%d" % number)
    assert len(here.output()) == 500


# -- what the handler swallows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
def test_x05_a_swallowed_error_of_a_serializer_aborts_the_transaction(
    world: Callable[..., World], error: type[Exception]
) -> None:
    """A record that could not be serialized is missing: its transaction is not committed without it."""
    here = world()
    here.fill(3)

    def serialize(value: bytes, _context: object) -> bytes:
        if value == b"000001":
            raise error("for the test")
        return value

    config = {"bootstrap.servers": here.bootstrap, "group.id": here.group, "transactional.id": here.transactional_id}

    def copy(kafka: ExactlyOnce) -> None:
        for tx in kafka.transactions([here.source], until_idle=1):
            with tx:
                for message in tx.messages:
                    with suppress(error, DeliveryError):
                        tx.produce(here.sink, message.value())

    with ExactlyOnce(config, value_serializer=serialize) as kafka, pytest.raises(TransactionAborted) as raised:
        copy(kafka)
    assert "for the test" in str(raised.value.__cause__)
    assert here.output() == []
    assert here.committed() in ([0], [-1001])


def test_a_client_that_no_broker_answered_does_not_fence_its_successor(world: Callable[..., World]) -> None:
    """Its C producers are gone with the run. They asked for their ids on and on, also when the brokers were back."""
    here = world()
    here.fill(1)
    with Proxy(here.bootstrap) as proxy, without_collector():
        with proxy.refuse(), here.client(bootstrap_servers=proxy.bootstrap, client_id="old") as old:
            threading.Timer(2, old.stop).start()
            old.run([here.source], here.copy)
        time.sleep(5)
        assert "InitProducerId" not in proxy.requests(lambda client: client == "old")
