"""Transactions in flight: their order, what an abort takes with it, and that nothing is in flight where it must not be.

First without a broker, with producers that do what a test says; then on a real one.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Producer

from kafka_guarantees import (
    DeliveryError,
    ExactlyOnce,
    FencedError,
    ForkedClientError,
    HandlerError,
    KafkaGuaranteesError,
    Record,
)
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._in_flight import Flight, InFlight
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._places import Places
from kafka_guarantees._threads import hand
from kafka_guarantees._transactional import AbortNeeded, InDoubt, TransactionalProducer

from .conftest import fill, read_all, values
from .kafka_wire import Held, Proxy
from .world import DEADLINE, Scripted, World, fatal, in_thread, names, retriable, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from queue import SimpleQueue

    from confluent_kafka import Message

    from kafka_guarantees.testing.local_kafka import RunningKafka

TXN_OFFSET_COMMIT = 28  # the number of the request

# -- without a broker ----------------------------------------------------------------------------------------------------


class Turn:
    """Stands for a producer: notes what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log
        self.failure: Exception | None = None
        self.hurry = False

    def prepare(self) -> None:
        self.hurry = False

    def serve(self) -> None:
        self.log.append(f"serve {self.name}")

    def abort(self) -> None:
        self.log.append(f"abort {self.name}")

    def abandon(self) -> None:
        self.log.append(f"abandon {self.name}")


class Sky:
    """Flights of producers ``a``, ``b``, ``c``, whose ends a test decides by hand."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.turns = [Turn(name, self.log) for name in "abc"]
        self.lifecycle = Lifecycle("test")
        self.flights = InFlight(self.turns, self.lifecycle)  # type: ignore[arg-type]  # a stand-in
        self.flights.prepare()
        self.sent: list[str] = []
        self.may_send: dict[str, threading.Event] = defaultdict(threading.Event)
        self.may_acknowledge: dict[str, threading.Event] = defaultdict(threading.Event)
        self.may_commit: dict[str, threading.Event] = defaultdict(threading.Event)
        self.unsent: dict[str, BaseException] = {}
        self.errors: dict[str, BaseException] = {}

    def take_off(self, name: str) -> None:
        """As the loop does it, for one message that goes by this name."""

        def finish(flight: Flight) -> None:
            self.may_acknowledge[name].wait(DEADLINE)
            self.log.append(f"acknowledged {name}")
            flight.acknowledged()
            flight.follow_offsets()
            self.may_send[name].wait(DEADLINE)
            if name in self.unsent:
                raise self.unsent[name]
            self.sent.append(name)
            flight.offsets_sent()
            flight.follow()
            self.may_commit[name].wait(DEADLINE)
            if name in self.errors:
                raise self.errors[name]
            self.log.append(f"committed {name}")

        self.flights.take_off([(name, 0)], 1, finish)

    def next(self) -> Any:
        return self.flights.next_producer()

    def let(self, *names: str) -> None:
        for name in names:
            self.may_acknowledge[name].set()
            self.may_send[name].set()
            self.may_commit[name].set()


@pytest.fixture
def sky() -> Iterator[Sky]:
    sky = Sky()
    yield sky
    sky.let("1", "2", "3", "4")
    sky.flights.end()


def test_the_next_begins_once_the_records_of_the_last_are_acknowledged(sky: Sky) -> None:
    """Records of a transaction are not produced before those of the last one are with the brokers, committed or not."""
    assert sky.next() is sky.turns[0]
    sky.take_off("1")
    waiting = in_thread(lambda: sky.log.append(f"next {sky.next().name}"))
    time.sleep(0.05)
    assert sky.log == []
    sky.may_acknowledge["1"].set()
    assert waiting() is None
    assert sky.log == ["acknowledged 1", "next b"]
    assert sky.flights.unfinished


def test_producers_with_nothing_to_do_are_served_now_and_then(sky: Sky) -> None:
    """Statistics and log lines wait until librdkafka is polled. Another thread has the producer of a flight (X26)."""
    sky.flights.serve()
    sky.flights.serve()
    assert sky.log == ["serve a", "serve b", "serve c"]
    sky.log.clear()
    sky.take_off("1")
    sky.take_off("2")
    sky.let("1")
    until(lambda: "committed 1" in sky.log and sky.flights._flights[0].landed, "the first is committed")
    sky.log.clear()
    sky.flights._served = 0.0
    sky.flights.serve()
    assert sky.log == ["serve c", "serve a"]


def test_commits_are_in_order(sky: Sky) -> None:
    """A transaction whose turn it is not waits with its commit, however early it is ready."""
    for name in "123":
        sky.flights.next_producer()
        sky.take_off(name)
        sky.may_acknowledge[name].set()
    sky.let("3")
    sky.let("2")
    time.sleep(0.05)
    assert sky.log == ["acknowledged 1", "acknowledged 2", "acknowledged 3"]
    sky.let("1")
    assert sky.flights.settle() == set()
    assert sky.log[3:] == ["committed 1", "committed 2", "committed 3"]


def test_offsets_are_sent_in_order_before_the_last_is_committed(sky: Sky) -> None:
    """X13: they do not wait for the commit before them, but for its offsets: the last that came counts for the group."""
    for name in "123":
        sky.flights.next_producer()
        sky.take_off(name)
        sky.may_acknowledge[name].set()
    sky.may_send["2"].set()
    sky.may_send["3"].set()
    time.sleep(0.05)
    assert sky.sent == []
    sky.may_send["1"].set()
    until(lambda: len(sky.sent) == 3, "all are sent")
    assert sky.sent == ["1", "2", "3"]
    assert not any("committed" in line for line in sky.log)


def test_no_offsets_are_sent_behind_some_that_were_not(sky: Sky) -> None:
    """What is behind a transaction without offsets is aborted without them as well."""
    sky.unsent["1"] = AbortNeeded("for the test")
    for name in "123":
        sky.flights.next_producer()
        sky.take_off(name)
        sky.may_acknowledge[name].set()
    sky.let("1", "2", "3")
    sky.flights.wait()
    assert sky.sent == []
    assert [line for line in sky.log if "abort" in line] == ["abort a", "abort b", "abort c"]


def test_what_stands_behind_one_that_is_not_begun_ends(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends while nobody has heard of a flight does not wait for ever for that, nor for the one behind it."""
    monkeypatch.setattr("kafka_guarantees._in_flight.GRACE", 0.05)
    flights = [Flight(sky.turns[0], [], 0, None, lambda _: None)]  # type: ignore[arg-type]  # a stand-in
    flights.append(Flight(sky.turns[1], [], 0, flights[0], lambda flight: flight.follow_offsets()))  # type: ignore[arg-type]
    sky.flights._flights.extend(flights)
    behind = in_thread(flights[1].fly)
    over = in_thread(sky.flights.end)
    assert over() is None
    assert behind() is None
    assert [type(flight.failure) for flight in flights] == [AbortNeeded, AbortNeeded]


def test_there_are_as_many_as_producers(sky: Sky) -> None:
    """With all producers in flight the next transaction waits for the oldest, and has its producer."""
    for name in "123":
        sky.flights.next_producer()
        sky.take_off(name)
        sky.may_acknowledge[name].set()
    got: list[Any] = []
    waiting = in_thread(lambda: got.append(sky.flights.next_producer()))
    time.sleep(0.05)
    assert got == []
    sky.let("1")
    assert waiting() is None
    assert got == [sky.turns[0]]


@pytest.mark.parametrize("error", [AbortNeeded("for the test"), InDoubt("for the test")], ids=["abort", "doubt"])
def test_an_abort_takes_everything_behind_it_along(sky: Sky, error: Exception) -> None:
    """What is behind a transaction that is not committed is not committed; what was before it is. All comes again in order."""
    sky.errors["2"] = error
    for name in "123":
        sky.flights.next_producer()
        sky.take_off(name)
        sky.let(name)
    sky.flights.wait()
    assert sky.flights.failed
    assert sky.flights.next_producer() is None, "nothing begins behind it"
    assert sky.flights.settle() == {("2", 0), ("3", 0)}
    assert "committed 1" in sky.log
    assert "committed 3" not in sky.log
    assert [line for line in sky.log if "abort" in line] == ["abort b", "abort c"], "each transaction is ended, in order"
    assert not sky.flights.failed
    assert sky.flights.next_producer() is not None


def test_what_would_fail_again_is_raised(sky: Sky) -> None:
    """A record that cannot be written ends the run, after its transaction was aborted; so does a fenced producer, at once."""
    sky.errors["1"] = AbortNeeded("for the test")
    sky.turns[0].failure = DeliveryError("too large")
    sky.flights.next_producer()
    sky.take_off("1")
    sky.let("1")
    with pytest.raises(DeliveryError, match="too large"):
        sky.flights.settle()
    assert sky.log[-1] == "abort a"
    sky.flights.end()
    sky.flights.prepare()
    sky.errors["2"] = FencedError("for the test")
    sky.flights.next_producer()
    sky.take_off("2")
    sky.let("2")
    with pytest.raises(FencedError):
        sky.flights.settle()
    assert sky.log.count("abort a") == 1


def test_the_end_of_a_run_waits_and_leaves_nothing_open(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in flight when a run ends with an error is waited for a moment, then hurried, and its producers let go of it."""
    monkeypatch.setattr("kafka_guarantees._in_flight.GRACE", 0.05)
    sky.flights.next_producer()
    sky.take_off("1")
    over = in_thread(sky.flights.end)
    until(lambda: sky.turns[0].hurry, "it is hurried")
    sky.let("1")
    assert over() is None
    assert "abandon a" in sky.log
    assert not sky.turns[0].hurry


class Tick(Exception):
    """Out of a signal handler of the user's."""


def test_the_end_of_a_run_waits_whatever_signal_handlers_raise(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """X26: no exception ends a run while a producer is in the hands of its flight; it is raised after that."""
    monkeypatch.setattr("kafka_guarantees._in_flight.GRACE", DEADLINE)

    def tick(*_: object) -> None:
        raise Tick

    def landed_late() -> None:
        time.sleep(0.5)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sky.let("1")

    sky.flights.next_producer()
    sky.take_off("1")
    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    over = in_thread(landed_late)
    try:
        with pytest.raises(Tick):
            sky.flights.end()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert over() is None
    assert sky.log[:3] == ["acknowledged 1", "committed 1", "abandon a"]
    assert not sky.turns[0].hurry


def test_a_flight_that_an_exception_kept_from_taking_off_is_not_waited_for(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception out of a signal handler at the take-off: the run ends, and the transaction is aborted and not forgotten."""
    monkeypatch.setattr("kafka_guarantees._in_flight.GRACE", 0.05)

    class Interrupted:
        def __init__(self, calls: SimpleQueue[Any]) -> None:
            self._calls, self._first = calls, True

        def put(self, call: Any) -> None:
            if self._first:
                self._first = False
                raise Tick
            self._calls.put(call)

    monkeypatch.setattr("kafka_guarantees._in_flight.hand", lambda *given: Interrupted(hand(*given)))
    sky.flights.next_producer()
    with pytest.raises(Tick):
        sky.take_off("1")
    over = in_thread(sky.flights.end)
    assert over() is None
    assert "abandon a" in sky.log
    assert "committed 1" not in sky.log


def test_a_run_after_one_whose_end_was_interrupted(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transactions are ended by threads that are there."""
    interrupts = [Tick()]

    class Interrupted:
        def __init__(self, calls: SimpleQueue[Any]) -> None:
            self._calls = calls

        def put(self, call: Any) -> None:
            self._calls.put(call)
            if call is None and interrupts:
                raise interrupts.pop()

    monkeypatch.setattr("kafka_guarantees._in_flight.hand", lambda *given: Interrupted(hand(*given)))
    sky.let("1", "2")
    sky.next()
    sky.take_off("1")
    sky.flights.settle()
    with pytest.raises(Tick):
        sky.flights.end()
    sky.flights.prepare()
    sky.next()
    sky.take_off("2")
    assert in_thread(sky.flights.settle)() is None
    assert sky.log[-1] == "committed 2"


def test_a_run_ends_what_the_last_one_was_kept_from_ending(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception out of a signal handler came before its end had begun."""
    monkeypatch.setattr("kafka_guarantees._in_flight.GRACE", 0.05)
    sky.next()
    sky.take_off("1")
    again = in_thread(sky.flights.prepare)
    sky.let("1")
    assert again() is None
    assert sky.log == ["acknowledged 1", "committed 1", "abandon a", "abandon b", "abandon c"]
    assert not sky.flights.unfinished


LEAVING = """
import threading, time
from kafka_guarantees._in_flight import InFlight
from kafka_guarantees._lifecycle import Lifecycle
flights = InFlight([None], Lifecycle("test"))
flying = threading.Event()
flights.take_off([], 0, lambda flight: (flying.set(), time.sleep(60)))
flying.wait()
"""


def test_a_process_that_ends_waits_for_no_flight() -> None:
    """A run in a daemon thread does not keep the interpreter from ending, whatever brokers it waits for."""
    assert subprocess.run([sys.executable, "-c", LEAVING], timeout=DEADLINE, check=False).returncode == 0


def test_a_child_waits_for_nothing(sky: Sky) -> None:
    """In a child of the process nothing is in flight, and nobody is waited for: the threads are the parent's (Y04)."""
    sky.flights.next_producer()
    sky.take_off("1")
    sky.lifecycle.forked = True
    for call in (sky.flights.next_producer, sky.flights.settle):
        with pytest.raises(ForkedClientError):
            call()
    sky.flights.end()
    assert sky.log == []
    sky.lifecycle.forked = False


@pytest.mark.parametrize("number", [0, -1, True, 2.5, "3", None])
def test_a_number_of_transactions_that_cannot_be_is_refused(number: Any) -> None:
    """transactions_in_flight is 1 or more, and anything else is refused before anything is connected."""
    config = {"bootstrap.servers": "127.0.0.1:1", "transactional.id": "t"}
    with pytest.raises(ValueError, match="transactions_in_flight"):
        ExactlyOnce(config, transactions_in_flight=number)


def in_the_air(flights: Any) -> int:
    return sum(not flight.ended.is_set for flight in flights._flights)


# -- on a broker ---------------------------------------------------------------------------------------------------------


def slow_commits(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[str]:
    """Commits take so long. Returns the list that they are noted in, by the id of their producer."""
    true = TransactionalProducer.commit
    noted: list[str] = []

    def commit(self: TransactionalProducer, claim: Callable[[], None]) -> None:
        time.sleep(seconds)
        true(self, claim)
        noted.append(str(self._settings.transactional_id))

    monkeypatch.setattr(TransactionalProducer, "commit", commit)
    return noted


@pytest.mark.broker
def test_offsets_reach_the_brokers_in_order(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    """X13: however long each takes to be sent; the group's offsets never go back."""
    here = world()
    written = here.fill(30)
    true = TransactionalProducer.send_offsets
    sent: list[int] = []

    def send_offsets(self: TransactionalProducer, offsets: Any, metadata: object) -> None:
        time.sleep(0.05 * (self._settings.transactional_id == here.transactional_id))  # the first takes its time
        true(self, offsets, metadata)
        sent.append(offsets[0].offset)

    monkeypatch.setattr(TransactionalProducer, "send_offsets", send_offsets)
    with here.client(transactions_in_flight=3) as kafka:
        here.run(kafka, max_batch=1)
    assert sent == list(range(1, 31))
    assert here.committed() == here.ends
    assert here.output() == written


@pytest.mark.broker
def test_offsets_that_arrive_twice_do_not_overtake(
    kafka: RunningKafka, world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """X01, X13: librdkafka sends the offsets of the first again, since their connection is lost, and the first copy comes late.

    Behind those of the second it would set the group back, and what the second had consumed would come again. So the second
    waits until the first is over, whose producer is made anew.
    """
    here = world()
    written = here.fill(2)
    held: list[Held] = []
    second_sent = threading.Event()
    true_send, true_commit = TransactionalProducer.send_offsets, TransactionalProducer.commit
    late: list[bool] = []

    with Proxy(kafka.bootstrap) as proxy:

        def hold_and_cut(request: Held) -> None:
            held.append(request)
            proxy.cut()

        def send_offsets(self: TransactionalProducer, offsets: Any, metadata: object) -> None:
            if not held:
                proxy.hold_next(TXN_OFFSET_COMMIT, hold_and_cut)
            true_send(self, offsets, metadata)
            if offsets[0].offset == 2:
                second_sent.set()

        def commit(self: TransactionalProducer, claim: Callable[[], None]) -> None:
            if held and not late:
                late.append(second_sent.wait(1))
                held[0].release()
            true_commit(self, claim)

        monkeypatch.setattr(TransactionalProducer, "send_offsets", send_offsets)
        monkeypatch.setattr(TransactionalProducer, "commit", commit)
        with here.client(bootstrap_servers=proxy.bootstrap) as client:
            here.run(client, max_batch=1)
            assert client._producer.renewals == 1
    assert late == [False]
    assert here.committed() == here.ends
    assert here.output() == written


@pytest.mark.broker
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_messages_are_handled_while_earlier_ones_are_committed(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """While N transactions are being committed one more is handled, and no other; the ids of the producers take turns."""
    here = world()
    written = here.fill(20)
    noted = slow_commits(monkeypatch, 0.1)
    ahead: list[int] = []

    def handler(message: Message) -> Iterator[Record]:
        ahead.append((message.offset() or 0) - len(noted))
        return here.copy(message)

    with here.client(transactions_in_flight=number) as kafka:
        here.run(kafka, handler, max_batch=1)
    assert here.output() == written
    assert max(ahead) == number, "how many earlier messages are not committed when one is handled"
    ids = [here.transactional_id, *(f"{here.transactional_id}-in-flight-{n}" for n in range(1, number))]
    assert noted == (ids * 20)[:20]


@pytest.mark.broker
def test_outputs_and_offsets_keep_their_order_through_aborts(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever verb of whichever transaction fails, each message is there once, in order, and offsets only ever grow."""
    here = world(4)
    written = here.fill(3000)
    chance = random.Random(7)
    failed: list[str] = []
    for verb in ("flush", "send_offsets", "commit", "begin"):
        true = getattr(TransactionalProducer, verb)

        def fails(self: TransactionalProducer, *args: Any, verb: str = verb, true: Any = true) -> None:
            if chance.random() < 0.015:
                failed.append(verb)
                self.poison(None)
                raise (InDoubt if verb == "begin" else AbortNeeded)("for the test")
            true(self, *args)
            if chance.random() < 0.01:
                failed.append(f"after {verb}")
                if verb != "begin":
                    self._lose()
                    raise InDoubt("for the test")

        monkeypatch.setattr(TransactionalProducer, verb, fails)
    offsets: list[int] = []
    send = TransactionalProducer.send_offsets

    def noted(self: TransactionalProducer, places: Any, metadata: Any) -> None:
        send(self, places, metadata)
        offsets.extend(place.offset for place in places if place.partition == 0)

    monkeypatch.setattr(TransactionalProducer, "send_offsets", noted)
    with here.client(transactions_in_flight=3) as kafka:
        here.run(kafka, max_batch=25)
    assert len(failed) > 5, "the control: transactions did fail"
    assert len(set(failed)) > 3
    messages = read_all(here.bootstrap, here.sink)
    assert values(messages) == written
    for number in range(4):
        assert [m.value() for m in messages if m.partition() == number] == written[number::4]
    assert here.committed() == here.ends


@pytest.mark.broker
def test_nobody_asks_where_the_group_is_while_something_is_in_flight(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The committed offsets are asked for when nothing is in flight: else what is would be fetched and committed twice."""
    here = world(2)
    written = here.fill(300)
    slow_commits(monkeypatch, 0.02)
    asked: list[bool] = []
    true = Places.committed

    def asking(self: Places, partitions: Any, ask: Any) -> Any:
        asked.append(in_the_air(kafka._in_flight) > 0)
        return true(self, partitions, ask)

    monkeypatch.setattr(Places, "committed", asking)
    failing = set(range(7, 150, 20))

    def handler(message: Message) -> Iterator[Record]:
        if message.offset() in failing and message.partition() == 0:
            failing.discard(message.offset() or 0)
            raise ConnectionError
        time.sleep(0.001)
        return here.copy(message)

    def late(kafka: ExactlyOnce) -> None:  # gives the rest of a batch back now and then
        must = kafka._must_poll
        kafka._must_poll = lambda batch, pace: random.random() < 0.3 or must(batch, pace)  # type: ignore[method-assign]

    with here.client(transactions_in_flight=3, commit_interval=0.005) as kafka:
        late(kafka)
        here.run(kafka, handler, max_batch=20)
    assert len(asked) > 5
    assert not any(asked)
    assert here.output() == written


@pytest.mark.broker
def test_what_was_fetched_behind_an_abort_is_not_handled(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the place of a partition is asked for, a transaction of another turns out to be aborted: nothing overtakes."""
    here = world(2)
    written = here.fill(100)
    commit, take = TransactionalProducer.commit, GroupConsumer._take
    asked: list[int] = []
    failed: list[int] = []

    def fails(self: TransactionalProducer, claim: Callable[[], None]) -> None:
        if asked and not failed:
            failed.append(1)
            time.sleep(0.3)  # the next message is fetched meanwhile
            raise AbortNeeded("for the test")
        commit(self, claim)

    def taken(self: GroupConsumer, *args: Any) -> Any:
        if asked == [1]:
            asked.append(2)
            self.unplace([(here.source, 1)])  # as after brokers that did not answer
        return take(self, *args)

    monkeypatch.setattr(TransactionalProducer, "commit", fails)
    monkeypatch.setattr(GroupConsumer, "_take", taken)

    def handler(message: Message) -> Iterator[Record]:
        if message.partition() == 0 and message.offset() == 5:
            asked.append(1)
        return here.copy(message)

    with here.client(transactions_in_flight=3) as kafka:
        here.run(kafka, handler, max_batch=1)
    assert failed, "the control"
    messages = read_all(here.bootstrap, here.sink)
    assert values(messages) == written
    for number in range(2):
        assert [m.value() for m in messages if m.partition() == number] == written[number::2]


@pytest.mark.broker
@pytest.mark.parametrize(
    "protocol",
    [{}, {"partition_assignment_strategy": "cooperative-sticky"}, {"group_protocol": "consumer"}],
    ids=["range", "cooperative-sticky", "kip-848"],
)
def test_partitions_are_given_away_with_nothing_in_flight(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, protocol: dict[str, Any]
) -> None:
    """A rebalance waits for the end of the transactions in flight before it takes partitions away, and the output is exact."""
    here = world(4)
    written = here.fill(240)
    slow_commits(monkeypatch, 0.1)
    waited_for: list[int] = []
    settle = GroupConsumer._settle

    def settled(self: GroupConsumer) -> None:
        waited_for.append(in_the_air(self._in_flight))
        settle(self)
        assert in_the_air(self._in_flight) == 0

    monkeypatch.setattr(GroupConsumer, "_settle", settled)
    handled: list[bytes | None] = []
    lock = threading.Lock()

    def handler(message: Message) -> Iterator[Record]:
        with lock:
            handled.append(message.value())
        time.sleep(0.002)
        return here.copy(message)

    if "group_protocol" not in protocol:
        protocol = {**protocol, "heartbeat_interval_ms": 200}
    protocol["commit_interval"] = 0.01
    first = here.client(**protocol)
    second = here.client(**{**protocol, "transactional_id": f"{here.transactional_id}-b"})
    with first, second, here.stopping(first, second):
        one = in_thread(lambda: first.run([here.source], handler, max_batch=10))
        until(lambda: len(handled) > 20, "the first is at work")
        two = in_thread(lambda: second.run([here.source], handler, max_batch=10))
        assert one() is None
        assert two() is None
    assert here.output() == written
    if "partition_assignment_strategy" not in protocol:  # there the brokers refuse what is in flight before the poll tells us
        assert max(waited_for) > 0, "the control: there was something to wait for"


@pytest.mark.broker
def test_after_a_handler_error_all_before_it_is_committed(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that fails waits for what is in flight before it: when HandlerError is raised, that is committed."""
    here = world()
    written = here.fill(10)
    slow_commits(monkeypatch, 0.1)

    def failing(message: Message) -> Iterator[Record]:
        if message.offset() == 7:
            raise ZeroDivisionError
        return here.copy(message)

    with here.client(transactions_in_flight=3) as kafka, pytest.raises(HandlerError, match="offset 7"):
        kafka.run([here.source], failing, max_batch=2)
    assert here.output() == written[:7]
    assert here.committed() == [7]


@pytest.mark.broker
def test_a_handler_error_is_not_raised_past_what_comes_again(world: Callable[..., World], scripted: type[Scripted]) -> None:
    """Where a transaction before the message that fails is aborted, its messages are handled again before the run ends."""
    here = world()
    written = here.fill(10)
    scripted.before["commit_transaction"] = [fatal()]
    handled: list[int | None] = []

    def failing(message: Message) -> Iterator[Record]:
        handled.append(message.offset())
        if message.offset() == 1:
            raise ZeroDivisionError
        return here.copy(message)

    with here.client(transactions_in_flight=3) as kafka, pytest.raises(HandlerError, match="offset 1 "):
        kafka.run([here.source], failing, max_batch=1)
    assert handled == [0, 1, 0, 1]
    assert here.output() == written[:1]
    assert here.committed() == [1]


@pytest.mark.broker
def test_a_record_that_cannot_be_written_is_raised_also_by_a_run_that_stops(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """stop(): what is wrong with the last transaction is known only after it, and is raised all the same."""
    here = world()
    here.fill(1)

    def flush(self: TransactionalProducer) -> None:
        time.sleep(0.1)
        self.poison(DeliveryError("refused by the broker"))
        raise AbortNeeded("for the test")

    monkeypatch.setattr(TransactionalProducer, "flush", flush)
    with here.client() as kafka:

        def handler(message: Message) -> Iterator[Record]:
            kafka.stop()
            return here.copy(message)

        with pytest.raises(DeliveryError, match="refused by the broker"):
            kafka.run([here.source], handler)
    assert here.output() == []
    assert here.committed() in ([0], [-1001])


@pytest.mark.broker
def test_a_run_that_is_idle_has_committed_everything(
    world: Callable[..., World], scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """until_idle: a run does not end before what is in flight is committed, nor before what was aborted is handled again."""
    here = world()
    written = here.fill(5)
    slow_commits(monkeypatch, 0.4)
    scripted.before["commit_transaction"] = [None, None, None, None, fatal()]  # the last one is the one that must come again
    with here.client(transactions_in_flight=3) as kafka:
        kafka.run([here.source], here.copy, max_batch=1, until_idle=0.1)
    assert here.output() == written
    assert here.committed() == [5]


@pytest.mark.broker
def test_a_stop_commits_what_is_in_flight(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    """stop(): what was handled is committed before run returns, however many transactions that is."""
    here = world()
    here.fill(10)
    slow_commits(monkeypatch, 0.1)
    handled: list[bytes] = []
    with here.client(transactions_in_flight=3) as kafka:

        def handler(message: Message) -> Iterator[Record]:
            handled.append(message.value() or b"")
            if len(handled) == 4:
                kafka.stop()
            return here.copy(message)

        kafka.run([here.source], handler, max_batch=1)
    assert here.output() == handled
    assert here.committed() == [4]


@pytest.mark.broker
def test_an_exception_of_a_callback_in_another_thread_ends_the_run(world: Callable[..., World]) -> None:
    """What a user's callback raises while a transaction is ended beside the loop is raised by run."""
    here = world()
    here.fill(50)

    def stats(_text: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise SystemExit(7)

    def handler(message: Message) -> Iterator[Record]:
        time.sleep(0.01)
        return here.copy(message)

    with here.client(stats_cb=stats, statistics_interval_ms=1) as kafka, pytest.raises(SystemExit):
        kafka.run([here.source], handler, max_batch=1, until_idle=1)


@pytest.mark.broker
def test_close_in_a_callback_is_refused(world: Callable[..., World]) -> None:
    """close() in a callback, in the thread of a flight, raises at once, as in a handler: it would wait for itself."""
    here = world()
    written = here.fill(300)
    refused: list[float] = []

    def stats(_text: str) -> None:
        if threading.current_thread() is not threading.main_thread() and not refused:
            began = time.monotonic()
            with pytest.raises(KafkaGuaranteesError, match="callback"):
                kafka.close()
            refused.append(time.monotonic() - began)

    def handler(message: Message) -> Iterator[Record]:
        if not refused:
            time.sleep(0.01)
        return here.copy(message)

    with here.client(stats_cb=stats, statistics_interval_ms=1) as kafka:
        here.run(kafka, handler, max_batch=1)
    assert refused[0] < 1
    assert here.output() == written


def test_close_in_a_log_handler_is_refused(sky: Sky) -> None:
    """close() in the thread of a flight raises at once also where no callback of ours is between: out of a log line."""
    refused: list[float] = []

    def finish(_flight: Flight) -> None:
        began = time.monotonic()
        with pytest.raises(KafkaGuaranteesError, match="callback"):
            sky.lifecycle.end_run(DEADLINE)
        refused.append(time.monotonic() - began)

    with sky.lifecycle.running():
        sky.flights.next_producer()
        sky.flights.take_off([], 0, finish)
        sky.flights.wait()
    assert refused
    assert refused[0] < 1


@pytest.mark.broker
def test_each_producer_has_its_own_hygiene(world: Callable[..., World]) -> None:
    """X01: a producer that met something ambiguous is made anew before its next transaction, and the others are not."""
    here = world()
    written = here.fill(30)
    with here.client(transactions_in_flight=3) as kafka:
        second = kafka._in_flight.producers[1]

        def handler(message: Message) -> Iterator[Record]:
            if message.offset() == 10:
                second._state.soil("for the test")
            return here.copy(message)

        here.run(kafka, handler, max_batch=1)
        assert [producer.renewals for producer in kafka._in_flight.producers] == [0, 1, 0]
    assert here.output() == written


@pytest.mark.broker
@pytest.mark.parametrize("suffix", ["", "-in-flight-1", "-in-flight-2"])
def test_another_instance_fences_each_of_them(world: Callable[..., World], suffix: str) -> None:
    """A second user of any of the ids ends the run with FencedError, and of what it had in flight nothing is left over.

    It comes again with the message. Brokers that are asked to commit in the moment they take note of it may answer
    UNKNOWN_SERVER_ERROR. Then the run does not know that it was fenced: it begins anew, and fences the other.
    """
    here = world()
    written = here.fill(200)

    def handler(message: Message) -> Iterator[Record]:
        if message.offset() == 20:
            name = here.transactional_id + suffix
            Producer({"bootstrap.servers": here.bootstrap, "transactional.id": name}).init_transactions(DEADLINE)
        return here.copy(message)

    with here.client(transactions_in_flight=3) as kafka:
        with pytest.raises(FencedError):
            here.run(kafka, handler, max_batch=5)
        here.run(kafka)
    assert here.output() == written


ALONE = """
import sys, threading, time
from kafka_guarantees import ExactlyOnce, Record
bootstrap, source, sink, group, name = sys.argv[1:]
config = {"bootstrap.servers": bootstrap, "group.id": group, "transactional.id": name}
at_work = threading.Event()
def handler(message):
    at_work.set()
    time.sleep(0.01)
    return [Record(sink, message.value())]
def run():
    with ExactlyOnce(config, preflight="off") as kafka:
        kafka.run([source], handler, max_batch=1, until_idle=1)
    print("done", flush=True)
threading.Thread(target=run).start()
at_work.wait()
"""


@pytest.mark.broker
def test_a_run_goes_on_when_the_main_thread_is_done(world: Callable[..., World]) -> None:
    """A run in another thread keeps the process alive, as threads do, and handles everything."""
    here = world()
    written = here.fill(100)
    arguments = [here.bootstrap, here.source, here.sink, here.group, here.transactional_id]
    done = subprocess.run([sys.executable, "-c", ALONE, *arguments], timeout=DEADLINE, check=False, stdout=subprocess.PIPE)
    assert done.stdout == b"done\n"
    assert here.output() == written


@pytest.mark.broker
@pytest.mark.parametrize("verb", ["flush", "send_offsets", "commit"])
def test_close_while_a_handler_hangs_and_something_is_in_flight(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Whatever a flight is doing when close() takes its producer away, the run ends with an error that says so."""
    here = world()
    written = here.fill(5)
    true = getattr(TransactionalProducer, verb)

    def slow(self: TransactionalProducer, *args: Any) -> None:
        true(self, *args)
        time.sleep(1)

    monkeypatch.setattr(TransactionalProducer, verb, slow)
    hanging, release = threading.Event(), threading.Event()

    def handler(message: Message) -> Iterator[Record]:
        if message.offset() == 2:
            hanging.set()
            release.wait(DEADLINE)
        return here.copy(message)

    kafka = here.client()
    ended = in_thread(lambda: kafka.run([here.source], handler, max_batch=1))
    assert hanging.wait(DEADLINE)
    kafka.close(0.1)
    until(lambda: not kafka._in_flight.unfinished or kafka._in_flight.failed, "what is in flight has ended")
    release.set()
    error = ended()
    assert error is None or isinstance(error, KafkaGuaranteesError), repr(error)
    monkeypatch.undo()
    with here.client() as again:
        here.run(again)
    assert here.output() == written


DYING = """
import os, sys, time
from kafka_guarantees import ExactlyOnce, Record
from kafka_guarantees._transactional import TransactionalProducer
bootstrap, source, sink, group, name = sys.argv[1:]
TransactionalProducer.commit = lambda self, claim: time.sleep(60)
def handler(message):
    print("handled", flush=True)
    return [Record(sink, message.value())]
config = {"bootstrap.servers": bootstrap, "group.id": group, "transactional.id": name, "transaction.timeout.ms": 60000,
          "session.timeout.ms": 6000, "max.poll.interval.ms": 70000}
with ExactlyOnce(config, transactions_in_flight=3, preflight="off") as kafka:
    kafka.run([source], handler, max_batch=1)
"""


@pytest.mark.broker
def test_a_restart_ends_all_that_was_in_flight(world: Callable[..., World]) -> None:
    """X14, X24: after a SIGKILL with three open transactions a new start ends all three at once, and readers go on."""
    here = world()
    written = here.fill(10)
    arguments = [here.bootstrap, here.source, here.sink, here.group, here.transactional_id]
    with subprocess.Popen([sys.executable, "-c", DYING, *arguments], stdout=subprocess.PIPE) as dying:
        assert dying.stdout is not None
        for _ in range(4):  # three are in flight, and one waits for its turn
            assert dying.stdout.readline() == b"handled\n"
        time.sleep(0.5)  # the records of the third are on their way
        dying.send_signal(signal.SIGKILL)
    began = time.monotonic()
    with here.client(transactions_in_flight=3, session_timeout_ms=6000) as kafka:
        here.run(kafka)
    assert here.output() == written
    assert time.monotonic() - began < 30, "not the transaction.timeout.ms of the dead"


@pytest.mark.broker
@pytest.mark.parametrize("doubt", [False, True], ids=["abort", "doubt"])
def test_x16_what_failed_in_flight_holds_up_nobody(
    world: Callable[..., World],
    monkeypatch: pytest.MonkeyPatch,
    doubt: bool,  # noqa: FBT001 - two rows
) -> None:
    """X16: a transaction that is not committed is ended at once, also while a handler takes its time: readers go on."""
    here = world()
    written = here.fill(3)
    true = TransactionalProducer.commit
    failing = [1]

    def commit(self: TransactionalProducer, claim: Callable[[], None]) -> None:
        if failing and failing.pop():
            if doubt:
                self._lose()
            raise (InDoubt if doubt else AbortNeeded)("for the test")
        true(self, claim)

    monkeypatch.setattr(TransactionalProducer, "commit", commit)
    waited: list[float] = []

    def handler(message: Message) -> Iterator[Record]:
        if message.offset() == 1 and not waited:
            fill(here.bootstrap, here.sink, [b"of another"])
            began = time.monotonic()
            while values(read_all(here.bootstrap, here.sink)) != [b"of another"] and time.monotonic() < began + 5:
                time.sleep(0.02)
            waited.append(time.monotonic() - began)
        return here.copy(message)

    with here.client() as kafka:
        here.run(kafka, handler, max_batch=1)
    assert not failing, "the control"
    assert waited[0] < 5
    assert here.output() == [*written, b"of another"]


@pytest.mark.broker
def test_a_late_answer_to_a_commit_is_waited_for_in_order(world: Callable[..., World], scripted: type[Scripted]) -> None:
    """A commit that is tried again holds up those behind it; they are committed after it, and nothing is handled twice."""
    here = world()
    written = here.fill(8)
    scripted.before["commit_transaction"] = [retriable(-185), retriable(-185), None]
    handled: list[bytes | None] = []

    def handler(message: Message) -> Iterator[Record]:
        handled.append(message.value())
        return here.copy(message)

    with here.client(transactions_in_flight=3) as kafka:
        here.run(kafka, handler, max_batch=1)
    assert handled == here.output() == written
    assert names(scripted).count("commit_transaction") == 10
