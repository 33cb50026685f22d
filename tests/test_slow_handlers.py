"""Handlers that take longer than ``max.poll.interval.ms``, on a real broker: with a thread of their own, and without (C10)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
from confluent_kafka import Message
from tenacity import Retrying, stop_after_attempt, wait_none

from kafka_guarantees import (
    AtLeastOnce,
    AtMostOnce,
    BrokerError,
    ExactlyOnce,
    HandlerError,
    KafkaGuaranteesError,
    Record,
    _at_least_once_run,
    _handler_thread,
    at_least_once,
)
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._failures import attempt
from kafka_guarantees._handler_thread import HandlerThread
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees.dedup import MemoryDedupStore, SqliteDedupStore, SqliteInbox, position

from .conftest import committed, fill, read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from kafka_guarantees.testing.local_kafka import RunningKafka

    Client = AtMostOnce | AtLeastOnce | ExactlyOnce

broker = pytest.mark.broker

INTERVAL = 1.2  # seconds: max.poll.interval.ms
SLOW = 3 * INTERVAL
DEADLINE = 20.0
IDLE = 0.3
HAND = "kafka-guarantees-handler"
TWO_TRIES = Retrying(stop=stop_after_attempt(2), wait=wait_none())
PROTOCOLS: dict[str, dict[str, object]] = {
    "eager": {"partition.assignment.strategy": "range"},
    "cooperative": {"partition.assignment.strategy": "cooperative-sticky"},
    "consumer": {"group.protocol": "consumer"},
}
CLASSES = {kind.__name__: kind for kind in (AtLeastOnce, ExactlyOnce, AtMostOnce)}


class Here(NamedTuple):
    """What a test on a broker needs: its address, names that nobody has used, and new topics."""

    bootstrap: str
    fresh: Callable[[str], str]
    topic: Callable[..., str]


@pytest.fixture
def here(
    kafka: RunningKafka, fresh: Callable[[str], str], kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Here:
    monkeypatch.setattr(_handler_thread, "AT_ONCE", INTERVAL / 6)  # as far from the interval as in production
    return Here(kafka.bootstrap, fresh, kafka_topic)


def settings(kind: str, bootstrap: str, name: str, protocol: str = "cooperative") -> dict[str, object]:
    config: dict[str, object] = {
        "bootstrap.servers": bootstrap,
        "group.id": name,
        "max.poll.interval.ms": int(INTERVAL * 1000),
        **PROTOCOLS[protocol],
    }
    if protocol != "consumer":
        config |= {"session.timeout.ms": 1000, "heartbeat.interval.ms": 200}
    if kind == "ExactlyOnce":
        config |= {"transactional.id": name, "transaction.timeout.ms": 1000, "delivery.timeout.ms": 900}
    return config


def client(kind: str, config: dict[str, object], **more: Any) -> Client:
    if kind == "AtMostOnce":
        more.setdefault("start", "earliest")
    made: Client = CLASSES[kind](config, preflight="off", **more)
    return made


def numbers(count: int) -> list[bytes]:
    return [str(number).encode() for number in range(count)]


def becomes_true(condition: Callable[[], object], seconds: float = DEADLINE) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := bool(condition())) and time.monotonic() < deadline:
        time.sleep(0.01)
    return true


def hands() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == HAND]


@contextmanager
def in_thread(target: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run it beside the block. It must be over soon after the block; what it raised is raised here."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            target()
        except BaseException as error:  # noqa: BLE001 - raised again below
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield thread
    thread.join(DEADLINE)
    assert not thread.is_alive()
    for error in raised:
        raise error


class Rebalances:
    """How often any consumer of this process was assigned partitions, or had them revoked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: Counter[str] = Counter()
        for name in ("_on_assign", "_on_revoke"):
            monkeypatch.setattr(GroupConsumer, name, self._counting(name, getattr(GroupConsumer, name)))

    def _counting(self, name: str, method: Callable[..., None]) -> Callable[..., None]:
        def counting(consumer: Any, raw: Any, partitions: Any) -> None:
            if not consumer._client.leaving:
                self.seen[name] += bool(partitions)
            method(consumer, raw, partitions)

        return counting


# -- a thread of its own, without Kafka --------------------------------------------------------------------------------------


@pytest.fixture
def thread() -> Iterator[HandlerThread]:
    made = HandlerThread(Lifecycle("Client"), DEADLINE)
    yield made
    made.close()


def test_a_quick_handler_costs_no_pause(thread: HandlerThread) -> None:
    """The group is served only where a handler takes its time."""
    served: list[str] = []
    thread.attend(lambda: served.append("serve"), lambda: served.append("resume"))
    for number in range(100):
        assert thread.call(lambda given: given + 1, number) == number + 1
    assert served == []


def test_the_group_is_served_until_the_handler_returns(thread: HandlerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """C10: again and again, and then everything is resumed, once."""
    monkeypatch.setattr(_handler_thread, "AT_ONCE", 0.01)
    monkeypatch.setattr(_handler_thread, "SERVE_EVERY", 0.001)
    served: list[str] = []
    go_on = threading.Event()

    def serve() -> None:
        served.append("serve")
        if len(served) == 5:
            go_on.set()

    thread.attend(serve, lambda: served.append("resume"))
    assert thread.call(go_on.wait, DEADLINE)
    assert served[:5] == ["serve"] * 5
    assert served.count("resume") == 1
    assert served[-1] == "resume"


def test_a_generator_runs_wholly_in_the_thread_of_the_handler(thread: HandlerThread) -> None:
    """Nothing of a handler is left to be done where the group would have to wait for it."""
    threads: list[threading.Thread] = []

    def handler() -> Iterator[int]:
        for number in range(3):
            threads.append(threading.current_thread())
            yield number

    assert thread.call(handler) == [0, 1, 2]
    assert [thread.name for thread in threads] == [HAND] * 3


def test_what_the_handler_raises_is_raised_with_its_traceback(thread: HandlerThread) -> None:
    """Also where it is no Exception; and the thread goes on."""

    def handler(error: BaseException) -> None:
        raise error

    for error in (ValueError("no"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught:
            thread.call(handler, error)
        assert caught.traceback[-1].name == "handler"
    assert thread.call(lambda: 1) == 1


def test_context_variables_reach_the_handler(thread: HandlerThread) -> None:
    """``attempt`` among them."""
    token = attempt.set(4)
    try:
        assert thread.call(attempt.get) == 4
    finally:
        attempt.reset(token)


def test_the_thread_ends_with_the_run_and_the_next_has_another(thread: HandlerThread) -> None:
    """None is left behind, and calls from a thread that is gone are of no handler."""
    lifecycle = thread._lifecycle
    first = thread.call(threading.current_thread)
    with lifecycle.running(lambda: None):
        assert thread.call(lambda: lifecycle.in_hand)
    thread.close()
    first.join(DEADLINE)
    assert not first.is_alive()
    assert not lifecycle.hands
    assert thread.call(threading.current_thread) is not first


def test_a_run_without_messages_takes_nothing_from_the_next(thread: HandlerThread) -> None:
    """A run that had no thread ends none: the handlers of the next run are called."""
    thread.close()
    called: list[int] = []
    caller = threading.Thread(target=lambda: called.append(thread.call(lambda: 5)), daemon=True)
    caller.start()
    caller.join(DEADLINE)
    assert called == [5]


def test_a_run_that_cannot_have_a_thread_says_so_each_time(thread: HandlerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may refuse one; then no call waits for a thread that is not there."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="new thread"):
                thread.call(lambda: None)
    assert thread.call(lambda: 1) == 1


class Alarm(BaseException):
    """What a signal handler of the user raises."""


def test_an_exception_out_of_a_signal_handler_waits_for_the_handler(
    thread: HandlerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that nobody waits for could write into a transaction that is not its own. Then the exception is raised."""
    monkeypatch.setattr(_handler_thread, "AT_ONCE", 0.01)
    finished: list[int] = []

    def raise_alarm(_number: int, _frame: object) -> None:
        raise Alarm

    def handler() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
        finished.append(1)

    before = signal.signal(signal.SIGUSR1, raise_alarm)
    try:
        with pytest.raises(Alarm):
            thread.call(handler)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert finished == [1]


def together(
    thread: HandlerThread, handler: Callable[[Any], Any], messages: Iterable[Any], seconds: float = 60
) -> tuple[list[Any], Any]:
    """What came of each, and what was raised for the one after these."""
    done: list[Any] = []
    error = thread.each(handler, cast("Any", list(messages)), done, seconds)
    return done, error


def test_messages_go_together_and_come_back_together(thread: HandlerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """One way to and fro, up to the message whose handler raises; its error comes back beside the results. L01."""
    ways, threads, tenant = list[object](), set[str](), ContextVar[int]("tenant", default=-1)
    true = HandlerThread.call

    def call(self: HandlerThread, *given: Any) -> Any:
        ways.append(given)
        return true(self, *given)

    monkeypatch.setattr(HandlerThread, "call", call)
    monkeypatch.setattr("kafka_guarantees._handler_thread.AT_ONCE", 60.0)  # a busy machine stands still for half of a second

    def handler(number: int) -> list[int]:
        threads.add(threading.current_thread().name)
        assert tenant.get() == -1  # each message has a context of its own
        tenant.set(number)
        if number == 70:
            raise ConnectionError("seventy")
        return [number]

    done, error = together(thread, handler, range(100))
    assert done == [[number] for number in range(70)]
    assert isinstance(error, ConnectionError)
    assert together(thread, handler, range(60)) == (done[:60], None)
    assert (len(ways), threads) == (2, {HAND})
    with pytest.raises(SystemExit):
        together(thread, lambda _message: sys.exit(3), range(3))


def test_what_was_handled_behind_a_refused_record_is_not_handled_again(thread: HandlerThread) -> None:
    """It is kept until its turn comes, if it is still of the same batch."""
    messages, handled = [Message(topic="t", partition=0, offset=number) for number in range(6)], list[int | None]()

    def handler(message: Message) -> list[Any]:
        handled.append(message.offset())
        return [message.offset()]

    done, _ = together(thread, handler, messages[:4])
    error = KeyError(4)
    behind: list[Any] = list(zip(messages[1:5], [*done[1:], error], strict=True))
    thread.keep(behind)
    assert together(thread, handler, messages[:1]) == ([[0]], None)  # tried again
    assert together(thread, handler, messages[1:]) == ([[1], [2], [3]], error)  # one attempt was made at it
    assert together(thread, handler, messages[4:]) == ([[4], [5]], None)
    assert handled == [0, 1, 2, 3, 0, 4, 5]
    thread.keep(behind)
    thread.attend(lambda: None, lambda: None)  # another batch
    assert together(thread, handler, messages[1:2]) == ([[1]], None)
    assert handled[-1] == 1
    thread.narrow()
    assert [len(together(thread, handler, messages)[0]) for _ in range(4)] == [1, 2, 4, 6]


def test_a_portion_ends_before_the_group_must_be_served(thread: HandlerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick messages cost no pause; a slow one ends it, and so do a stop, many records, and whoever interrupts the wait."""
    served, now = threading.Event(), [0.0]
    monkeypatch.setattr(_handler_thread, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def quick(_message: object) -> list[Any]:
        now[0] += 0.5
        return []

    def slow(_message: object) -> list[Any]:
        now[0] += 5
        assert served.wait(60)
        return []

    thread.attend(served.set, lambda: None)
    monkeypatch.setattr(_handler_thread, "AT_ONCE", 8.0)
    assert len(together(thread, quick, range(1000))[0]) == 8
    assert len(together(thread, quick, range(1000), 1.0)[0]) == 2
    assert len(together(thread, lambda _message: [1] * 4000, range(1000))[0]) == 3
    assert not served.is_set()
    monkeypatch.setattr(_handler_thread, "AT_ONCE", 0.1)
    assert len(together(thread, slow, range(1000))[0]) == 1
    done: list[Any] = []

    interrupted = threading.Event()

    def interrupt() -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def slower(_message: Message) -> list[Record]:
        now[0] += 5
        assert interrupted.wait(60)
        return []

    thread.attend(interrupt, lambda: None)
    monkeypatch.setattr(thread._lifecycle, "hands", set())
    with pytest.raises(KeyboardInterrupt):
        thread.each(slower, cast("Any", range(1000)), done, 60)
    assert len(done) == 1  # what was handled is known
    with thread._lifecycle.running():
        thread._lifecycle.stop()
        assert len(together(thread, lambda _message: [], range(1000))[0]) == 1


# -- with a thread of its own ------------------------------------------------------------------------------------------------


@broker
@pytest.mark.parametrize(
    ("kind", "protocol"),
    [
        ("AtLeastOnce", "eager"),
        ("AtLeastOnce", "consumer"),
        ("ExactlyOnce", "cooperative"),
        ("AtMostOnce", "consumer"),
    ],
)
def test_a_slow_handler_keeps_its_partition(
    kind: str, protocol: str, here: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """C10: three times slower than the interval: no rebalance; all is handled once, written, committed. The log names it."""
    source, target, name = here.topic(), here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(3))
    rebalances = Rebalances(monkeypatch)
    seen: list[tuple[bytes | None, str]] = []

    def handler(message: Message) -> Iterator[Record]:
        seen.append((message.value(), threading.current_thread().name))
        if message.offset() == 1:
            time.sleep(SLOW)
        yield Record(target, message.value())

    with client(kind, settings(kind, here.bootstrap, name, protocol), keep_alive=True) as kafka:
        kafka.run([source], handler, until_idle=IDLE)
        assert becomes_true(lambda: not hands()), "the thread ends with the run"
    assert seen == [(value, HAND) for value in numbers(3)]
    assert rebalances.seen == {"_on_assign": 1}
    assert committed(here.bootstrap, name, source) == [3]
    assert values(read_all(here.bootstrap, target)) == numbers(3)
    assert named_in(caplog)[:2] == [f"topic {source!r} partition 0 offset 1"] * 2


def named_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Where the handlers were that the log says take long."""
    said = "the handler has not returned for "
    return [text.split(": ")[1].split(". ")[0] for text in caplog.messages if text.startswith(said)]


@broker
@pytest.mark.parametrize("kind", ["ExactlyOnce", "AtMostOnce"])
def test_a_slow_batch_handler_keeps_its_partition(
    kind: str, here: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """C10, run_batches. The log names its first message."""
    source, target, name = here.topic(), here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(5))
    rebalances = Rebalances(monkeypatch)
    seen: list[bytes | None] = []

    def handler(messages: Sequence[Message]) -> list[Record]:
        if not seen:
            time.sleep(SLOW)
        seen.extend(message.value() for message in messages)
        return [Record(target, message.value()) for message in messages]

    with client(kind, settings(kind, here.bootstrap, name), keep_alive=True) as kafka:
        kafka.run_batches([source], handler, until_idle=IDLE)
    assert named_in(caplog)[:2] == [f"topic {source!r} partition 0 offset 0"] * 2
    assert seen == numbers(5)
    assert rebalances.seen == {"_on_assign": 1}
    assert committed(here.bootstrap, name, source) == [5]
    assert values(read_all(here.bootstrap, target)) == numbers(5)


@broker
@pytest.mark.parametrize(("memory", "how"), [("sqlite store", "run"), ("sqlite inbox", "run_batches")])
def test_a_slow_handler_with_a_store_or_an_inbox(how: str, memory: str, here: Here, tmp_path: Path) -> None:
    """The handler writes with the inbox's connection from its own thread; duplicates are left out; each effect happens once."""
    source, name = here.topic(), here.fresh("group")
    with AtLeastOnce({"bootstrap.servers": here.bootstrap}) as producer:
        for value in (b"0", b"1", b"1", b"2"):
            producer.produce(source, value, message_id=value)
    seen: list[bytes] = []

    def handler(message: Message, connection: Any = None) -> None:
        seen.append(message.value() or b"")
        if connection is not None:
            connection.execute("INSERT INTO effect VALUES (?)", (message.value(),))
        if message.value() == b"1":
            time.sleep(SLOW)

    def batch_handler(messages: Sequence[Message], connection: Any = None) -> None:
        for message in messages:
            handler(message, connection)

    opened: Any = (SqliteInbox if memory == "sqlite inbox" else SqliteDedupStore)(tmp_path / "memory.db")
    with opened:
        if memory == "sqlite inbox":
            opened._connection.execute("CREATE TABLE effect (value BLOB)")
        option = {"inbox" if memory == "sqlite inbox" else "dedup": opened}
        with AtLeastOnce(settings("AtLeastOnce", here.bootstrap, name), keep_alive=True, **option) as kafka:
            given = handler if how == "run" else batch_handler
            getattr(kafka, how)([source], given, until_idle=IDLE)
            assert kafka.dedup_counts["duplicate"] == 1
        if memory == "sqlite inbox":
            assert opened._connection.execute("SELECT * FROM effect").fetchall() == [(b"0",), (b"1",), (b"2",)]
    assert seen == [b"0", b"1", b"2"]
    assert committed(here.bootstrap, name, source) == [4]


@broker
@pytest.mark.parametrize("kind", ["AtLeastOnce", "ExactlyOnce"])
def test_failures_work_from_the_thread_of_the_handler(kind: str, here: Here) -> None:
    """Slow attempts, ``attempt``, dead letters and HandlerError are as without; the group is served in all of it."""
    source, dead, name = here.topic(), here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(3))
    attempts: list[tuple[bytes | None, int]] = []

    def handler(message: Message) -> None:
        attempts.append((message.value(), attempt.get()))
        if message.value() == b"1":
            time.sleep(INTERVAL * 1.2)
            raise ConnectionError("no such service")

    with client(kind, settings(kind, here.bootstrap, name), keep_alive=True, retry=TWO_TRIES, dead_letter=dead) as kafka:
        kafka.run([source], handler, until_idle=IDLE)
    assert attempts == [(b"0", 1), (b"1", 1), (b"1", 2), (b"2", 1)]
    (letter,) = read_all(here.bootstrap, dead)
    assert letter.value() == b"1"
    assert dict(letter.headers() or [])["dead-letter-attempts"] == b"2"
    assert committed(here.bootstrap, name, source) == [3]
    again = here.fresh("group")
    with client(kind, settings(kind, here.bootstrap, again), keep_alive=True, retry=None) as kafka:
        with pytest.raises(HandlerError, match=r"offset 1.*no such service") as caught:
            kafka.run([source], handler, until_idle=IDLE)
        assert isinstance(caught.value.__cause__, ConnectionError)
    assert committed(here.bootstrap, again, source) == [1]


@broker
def test_what_a_slow_handler_produces_is_its_own(here: Here) -> None:
    """P01, L03: a record that it failed to produce is not committed past, though nobody looked, and other threads saw it."""
    source, target, name = here.topic(), here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(2))
    with AtLeastOnce(settings("AtLeastOnce", here.bootstrap, name), keep_alive=True) as kafka:

        def handler(message: Message) -> None:
            if message.offset() == 1:
                with pytest.raises(TypeError):
                    kafka.produce(target, 7)
            assert kafka.produce(target, message.value()).result().done

        with pytest.raises(KafkaGuaranteesError, match="Nothing was committed"):
            kafka.run([source], handler, until_idle=IDLE)
    assert committed(here.bootstrap, name, source)[0] < 2
    assert values(read_all(here.bootstrap, target)) == numbers(2)


@broker
@pytest.mark.parametrize("kind", CLASSES)
def test_stop_and_close_in_the_handler(kind: str, here: Here) -> None:
    """stop() ends the run after this message; close() says what to do instead."""
    source, name = here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(2))
    refused: list[str] = []
    with client(kind, settings(kind, here.bootstrap, name), keep_alive=True) as kafka:

        def handler(message: Message) -> None:
            try:
                kafka.close()
            except KafkaGuaranteesError as error:
                refused.append(str(error))
            kafka.stop()

        kafka.run([source], handler)
    assert len(refused) == 1
    assert "call stop() there" in refused[0]
    assert committed(here.bootstrap, name, source) == [1]


@broker
@pytest.mark.parametrize("kind", CLASSES)
def test_close_from_another_thread_does_not_wait_for_a_handler_that_hangs(kind: str, here: Here) -> None:
    """It returns in its time. What the handler had in hand is not committed, unless that is at most once."""
    source, target, name = here.topic(), here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(2))
    entered, go_on = threading.Event(), threading.Event()
    ended: list[BaseException | None] = []

    def handler(message: Message) -> list[Record]:
        entered.set()
        assert go_on.wait(DEADLINE)
        return [Record(target, message.value())]

    kafka = client(kind, settings(kind, here.bootstrap, name), keep_alive=True)

    def run() -> None:
        try:
            kafka.run([source], handler)
        except KafkaGuaranteesError as error:
            ended.append(error)
        else:
            ended.append(None)

    with in_thread(run):
        try:
            assert entered.wait(DEADLINE)
            began = time.monotonic()
            kafka.close(0.5)
            assert time.monotonic() - began < 5
            assert not ended
        finally:
            go_on.set()
    assert ended
    assert max(committed(here.bootstrap, name, source)[0], 0) == (1 if kind == "AtMostOnce" else 0)
    assert read_all(here.bootstrap, target) == []
    assert becomes_true(lambda: not hands())


@broker
@pytest.mark.parametrize("kind", CLASSES)
def test_an_exception_out_of_a_signal_handler_ends_the_run_after_the_handler(kind: str, here: Here) -> None:
    """The handler is not torn from its message; then the exception is raised, and nothing is committed past it."""
    source, name = here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(2))
    finished: list[int | None] = []

    def raise_alarm(_number: int, _frame: object) -> None:
        raise Alarm

    def handler(message: Message) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(INTERVAL / 2)
        finished.append(message.offset())

    before = signal.signal(signal.SIGUSR1, raise_alarm)
    try:
        with client(kind, settings(kind, here.bootstrap, name), keep_alive=True) as kafka, pytest.raises(Alarm):
            kafka.run([source], handler)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert finished == [0]
    assert max(committed(here.bootstrap, name, source)[0], 0) == (1 if kind == "AtMostOnce" else 0)


@broker
@pytest.mark.parametrize("kind", CLASSES)
def test_sigterm_while_a_slow_handler_works(kind: str, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is finished and committed, with what it produced, though that takes longer than a stop waits for brokers."""
    monkeypatch.setattr("kafka_guarantees._lifecycle.STOP_GRACE", 1.3)
    source, target, name = here.topic(), here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(2))

    def handler(message: Message) -> Iterator[Record]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        yield Record(target, message.value())

    with client(kind, settings(kind, here.bootstrap, name), keep_alive=True) as kafka:
        kafka.run([source], handler)
    assert committed(here.bootstrap, name, source) == [1]
    assert values(read_all(here.bootstrap, target)) == [b"0"]


@broker
@pytest.mark.parametrize("kind", CLASSES)
def test_a_problem_of_the_group_is_not_the_handlers(kind: str, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong while the group is served ends the run; the message was handled: no second attempt, no dead letter."""
    source, dead, name = here.topic(), here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(2))
    seen: list[int | None] = []
    served = GroupConsumer.serve

    def failing(consumer: GroupConsumer, batch: Any, wait: float = 0) -> None:
        served(consumer, batch, wait)
        raise BrokerError("the group is in trouble, says the test")

    monkeypatch.setattr(GroupConsumer, "serve", failing)

    def handler(message: Message) -> None:
        seen.append(message.offset())
        if message.offset() == 0:
            time.sleep(INTERVAL / 2)

    with (
        client(kind, settings(kind, here.bootstrap, name), keep_alive=True, dead_letter=dead) as kafka,
        pytest.raises(BrokerError, match="says the test"),
    ):
        kafka.run([source], handler, until_idle=IDLE)
    assert seen[0] == 0
    assert len(seen) == len(set(seen))
    assert committed(here.bootstrap, name, source)[0] == len(seen)
    assert read_all(here.bootstrap, dead) == []


FORK = """
import os, sys, warnings
from kafka_guarantees import {kind}
warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)
children = []

def handler(message):
    child = os.fork()
    if child == 0:
        return
    children.append(child)
    kafka.stop()

with {kind}({config!r}, keep_alive=True, start="earliest", preflight="off") as kafka:
    kafka.run([{source!r}], handler)
_, status = os.waitpid(children[0], 0)
print("child", status != 0)
"""


@broker
@pytest.mark.parametrize("kind", CLASSES)
def test_a_child_that_leaves_the_handler_ends_there(kind: str, here: Here) -> None:
    """Y04: the thread that made the run is not there, so nothing could go on; it does not look as if all was done."""
    source, name = here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(1))
    script = FORK.format(kind=kind, config=settings(kind, here.bootstrap, name), source=source)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.stdout.split() == ["child", "True"], done.stderr
    assert committed(here.bootstrap, name, source) == [1]


@pytest.mark.parametrize(
    ("kind", "how"), [("AtLeastOnce", "messages"), ("ExactlyOnce", "transactions"), ("AtMostOnce", "messages")]
)
def test_a_loop_of_the_users_own_cannot_be_kept_alive(kind: str, how: str) -> None:
    """There is no handler to give a thread: the error says what to use."""
    config: dict[str, object] = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"}
    if kind == "ExactlyOnce":
        config["transactional.id"] = "g"
    with client(kind, config, keep_alive=True) as kafka, pytest.raises(TypeError, match=r"use run\(\) or run_batches\(\)"):
        getattr(kafka, how)(["topic"])


@broker
@pytest.mark.parametrize(
    ("kind", "protocol"),
    [
        ("AtLeastOnce", "eager"),
        ("AtLeastOnce", "cooperative"),
        ("AtLeastOnce", "consumer"),
        ("ExactlyOnce", "eager"),
        ("ExactlyOnce", "consumer"),
        ("AtMostOnce", "cooperative"),
    ],
)
def test_a_second_member_joins_while_a_handler_works(
    kind: str, protocol: str, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partition that stays is committed, and not handled twice. One that goes is left to its new owner: no record twice."""
    source, target, name = here.topic(partitions=2), here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(4))  # all in one of them
    for module in (at_least_once, _at_least_once_run):
        monkeypatch.setattr(module, "COMMIT_EVERY", 0.0)  # what was in hand is one message
    handled: Counter[bytes] = Counter()
    working = threading.Event()
    moves = Moves(monkeypatch, working)

    def finished() -> bool:
        return committed(here.bootstrap, name, source) == [4]

    def handler(message: Message) -> list[Record]:
        handled[message.value() or b""] += 1
        if not working.is_set():
            working.set()
            assert moves.over.wait(DEADLINE)
            assert 0 not in moves.taken or becomes_true(finished), "its new owner handles all of it"
        return [Record(target, message.value())]

    def member(number: int) -> Client:
        config = settings(kind, here.bootstrap, name, protocol)
        config["max.poll.interval.ms"] = 20_000  # long enough that the clock does not tell
        if protocol != "consumer":
            config["session.timeout.ms"] = 10_000
        config["client.id"] = str(number)  # by which "range" sorts the members: the second gets the first partition
        if kind == "ExactlyOnce":
            config["transactional.id"] = f"{name}-{number}"
        return client(kind, config, keep_alive=True)

    with member(2) as one, member(1) as two, in_thread(lambda: one.run([source], handler)):
        assert working.wait(DEADLINE)
        with in_thread(lambda: two.run([source], handler)):
            done = becomes_true(lambda: finished() and moves.over.is_set())
            one.stop()
            two.stop()
    assert done
    assert set(handled) == set(numbers(4))
    assert 0 in moves.taken or protocol != "eager"
    again = [value for value, times in handled.items() if times > 1]
    assert again == ([b"0"] if 0 in moves.taken and kind != "AtMostOnce" else [])
    assert finished()
    if kind != "AtLeastOnce":
        assert values(read_all(here.bootstrap, target)) == numbers(4)


class Moves:
    """Which partitions are taken away while a handler works, and whether another member has some then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, working: threading.Event) -> None:
        self.taken: set[int] = set()
        self.over = threading.Event()
        on_assign, on_revoke = GroupConsumer._on_assign, GroupConsumer._on_revoke
        consumers: list[object] = []

        def assigned(consumer: GroupConsumer, raw: Any, partitions: Any) -> None:
            on_assign(consumer, raw, partitions)
            consumers.append(consumer)
            if working.is_set() and partitions and consumer is not consumers[0]:
                self.over.set()

        def revoked(consumer: GroupConsumer, raw: Any, partitions: Any) -> None:
            if not self.over.is_set():
                self.taken.update(partition.partition for partition in partitions)
            on_revoke(consumer, raw, partitions)

        monkeypatch.setattr(GroupConsumer, "_on_assign", assigned)
        monkeypatch.setattr(GroupConsumer, "_on_revoke", revoked)


@broker
@pytest.mark.parametrize("how", ["run", "run_batches"])
@pytest.mark.parametrize("kind", ["AtLeastOnce", "ExactlyOnce", "AtMostOnce", "with a store", "with an inbox"])
def test_with_a_thread_of_its_own_each_message_has_what_it_had_without(here: Here, tmp_path: Path, kind: str, how: str) -> None:
    """Failures, refused records, handlers and serializers that use a dict or a buffer again: all come as they were returned."""
    topic, target, dead = here.topic(), here.topic(), here.topic()
    fill(here.bootstrap, topic, numbers(300))
    handled, running, buffer, out = Counter[int](), {"last": -1}, bytearray(8), bytearray(8)
    bad = {5, 100, 101, 200, 201, 202}

    def handler(given: Any, _connection: object = None) -> Any:
        for message in given if how == "run_batches" else [given]:
            number = int(message.value() or b"")
            handled[number] += 1
            if number in (5, 100):
                raise KeyError(number)
            running["last"], buffer[:] = number, b"%08d" % number
            yield Record(target, running, buffer, headers={"x": b"x" * 2_000_000} if number in bad else {"n": buffer})

    def serializer(value: Any, _context: object) -> bytearray:
        out[:] = b"%08d" % value["last"]
        return out

    inbox = SqliteInbox(tmp_path / "inbox.db")
    again = Retrying(stop=stop_after_attempt(2), wait=wait_none())  # also of records that are refused
    more: dict[str, dict[str, Any]] = {
        "AtLeastOnce": {"retry": again},
        "with a store": {"retry": again, "dedup": MemoryDedupStore(), "message_id": position()},
        "with an inbox": {"inbox": inbox, "message_id": None},
    }
    options = {"keep_alive": True, "dead_letter": dead, "value_serializer": serializer, **more.get(kind, {})}
    name = kind if kind in CLASSES else "AtLeastOnce"
    calm = {**settings(name, here.bootstrap, here.fresh("g")), "max.poll.interval.ms": 60_000}  # else some are given back
    with closing(inbox), client(name, calm, **options) as kafka:
        getattr(kafka, how)([topic], handler, until_idle=1)
    sent = [(int(m.value() or b""), int(m.key() or b""), m.headers()) for m in read_all(here.bootstrap, target)]
    letters = sorted(int(m.value() or b"") for m in read_all(here.bootstrap, dead))
    expected = [(n, n, [("n", b"%08d" % n)]) for n in range(300) if n not in bad]
    every, kept = set(map(repr, expected)), {repr(one) for one in expected if one[0] not in letters}
    if kind == "ExactlyOnce" or (how == "run" and kind != "with an inbox"):
        assert sent == expected
    assert kept <= set(map(repr, sent)) <= every  # else what came before a failure is sent again
    if (kind, how) != ("AtMostOnce", "run_batches"):  # which sets aside all of a batch
        assert letters == sorted(bad)
    if how == "run" and kind in ("AtLeastOnce", "AtMostOnce", "with a store"):
        assert all(handled[number] == 1 for number in range(300) if number not in bad)


@broker
@pytest.mark.parametrize("how", ["run", "run_batches", "keep_alive"])
def test_records_that_are_all_refused_cost_no_more_than_some_calls_each(here: Here, how: str) -> None:
    """What is handled behind a refused record is handled again in exactly-once: in few messages, until one is taken."""
    topic, target, dead = here.topic(), here.topic(), here.topic()
    fill(here.bootstrap, topic, numbers(20))
    calls = list[int]()

    def handler(given: Any) -> Any:
        messages = given if how == "run_batches" else [given]
        calls.append(len(messages))
        return [Record(target, b"x" * 2_000_000) for _ in messages]

    options = {"keep_alive": how == "keep_alive", "dead_letter": dead}
    calm = {**settings("ExactlyOnce", here.bootstrap, here.fresh("g")), "max.poll.interval.ms": 60_000}
    with client("ExactlyOnce", calm, **options) as kafka:
        (kafka.run_batches if how == "run_batches" else kafka.run)([topic], handler, until_idle=1)
    assert len(read_all(here.bootstrap, dead)) == 20
    assert sum(calls) < 100  # 210 by handling all that is behind again each time


# -- without -----------------------------------------------------------------------------------------------------------------


@broker
@pytest.mark.parametrize("kind", CLASSES)
def test_a_handler_that_was_too_slow_once(kind: str, here: Here, caplog: pytest.LogCaptureFixture) -> None:
    """C10: the log says what to change. Nothing is lost; at least once handles it again, the others have each record once."""
    source, target, name = here.topic(), here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(3))
    handled: Counter[bytes] = Counter()

    def handler(message: Message) -> list[Record]:
        handled[message.value() or b""] += 1
        if message.offset() == 1 and handled[b"1"] == 1:
            time.sleep(SLOW)
        return [Record(target, message.value())]

    with client(kind, settings(kind, here.bootstrap, name)) as kafka:
        kafka.run([source], handler, until_idle=IDLE)
    log = [record.getMessage() for record in caplog.records if "max.poll.interval.ms" in record.getMessage()]
    assert any("keep_alive=True" in line and "max_batch" in line for line in log)
    assert committed(here.bootstrap, name, source) == [3]
    assert handled[b"1"] == (1 if kind == "AtMostOnce" else 2)
    assert set(values(read_all(here.bootstrap, target))) == set(numbers(3))
    if kind != "AtLeastOnce":
        assert values(read_all(here.bootstrap, target)) == numbers(3)


@broker
@pytest.mark.parametrize(("kind", "how"), [("AtLeastOnce", "run_batches"), ("ExactlyOnce", "run")])
def test_a_handler_that_is_always_too_slow_ends_the_run(kind: str, how: str, here: Here) -> None:
    """It would be handled again for ever: after the second time HandlerError says what to change, and nothing was committed."""
    source, name = here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(1))
    seen: list[object] = []

    def handler(given: object) -> None:
        seen.append(given)
        time.sleep(INTERVAL * 1.3)

    with client(kind, settings(kind, here.bootstrap, name)) as kafka, pytest.raises(HandlerError, match="keep_alive=True"):
        getattr(kafka, how)([source], handler, until_idle=IDLE)
    assert len(seen) == 2
    assert max(committed(here.bootstrap, name, source)[0], 0) == 0


@broker
@pytest.mark.parametrize("protocol", ["eager", "consumer"])
@pytest.mark.parametrize(
    "what", ["AtMostOnce.run", "AtLeastOnce.run", "AtLeastOnce.messages", "AtLeastOnce.inbox", "ExactlyOnce.run"]
)
def test_a_new_member_need_not_wait_for_a_whole_batch(
    what: str, protocol: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C10: a rebalance waits for all members. One with 80 seconds of messages in hand is served after a second or two."""
    source, name = here.topic(partitions=2), here.fresh("group")
    fill(here.bootstrap, source, numbers(4000), partitions=2)
    handled: dict[int, Counter[tuple[int | None, int | None]]] = {1: Counter(), 2: Counter()}
    members, file, on_assign = list[int](), tmp_path / "inbox.db", GroupConsumer._on_assign
    kind, how = what.split(".")

    def assigned(consumer: GroupConsumer, raw: Any, partitions: Any) -> None:
        members.extend([id(consumer)] * bool(partitions))
        on_assign(consumer, raw, partitions)

    monkeypatch.setattr(GroupConsumer, "_on_assign", assigned)

    def run(kafka: Any, number: int) -> None:
        def handler(message: Message, *_connection: object) -> None:
            time.sleep(0.02)
            handled[number][message.partition(), message.offset()] += 1

        if how == "messages":
            for message in kafka.messages([source]):
                handler(message)
        else:
            kafka.run([source], handler)

    def member(number: int) -> Client:
        config = settings(kind, here.bootstrap, name, protocol)
        config["max.poll.interval.ms"] = 300_000
        if protocol != "consumer":
            config["session.timeout.ms"] = 30_000
        if kind == "ExactlyOnce":
            config |= {"transactional.id": f"{name}-{number}", "transaction.timeout.ms": 10_000, "delivery.timeout.ms": 9000}
        return client(kind, config, **({"inbox": SqliteInbox(file), "message_id": None} if how == "inbox" else {}))

    with member(1) as one, member(2) as two, in_thread(lambda: run(one, 1)):
        assert becomes_true(lambda: len(handled[1]) > 20)
        with in_thread(lambda: run(two, 2)):
            began = time.monotonic()
            # in one file the second waits for the first; that it may begin is all that the group has to do with
            assert becomes_true(lambda: handled[2] if how != "inbox" else len(set(members)) > 1)
            waited = time.monotonic() - began
            before = len(handled[1])
            assert becomes_true(lambda: len(handled[1]) > before + 20), "the first one goes on"
            one.stop()
            two.stop()
    assert waited < 8
    repeated = sum((handled[1] + handled[2]).values()) - len(handled[1] | handled[2])
    assert repeated == 0, "what was handled is committed before its partition is given away"


@broker
@pytest.mark.parametrize("kind", ["AtLeastOnce"])
def test_batches_shrink_to_what_fits_and_grow_again(kind: str, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """C10: with 50 ms for a message and room for 1000 in a batch nothing is given away; a quick handler gets more again."""
    source, name = here.topic(), here.fresh("group")
    fill(here.bootstrap, source, numbers(1000))
    rebalances = Rebalances(monkeypatch)
    sizes: list[int] = []
    seen: list[int | None] = []

    def handler(messages: Sequence[Message]) -> None:
        if len(seen) < 60:
            time.sleep(0.05 * len(messages))
        sizes.append(len(messages))
        seen.extend(message.offset() for message in messages)

    with client(kind, settings(kind, here.bootstrap, name)) as kafka:
        kafka.run_batches([source], handler, max_batch=1000, until_idle=IDLE)
    assert seen == list(range(1000))
    assert rebalances.seen == {"_on_assign": 1}
    slow = [size for size, end in zip(sizes, _sums(sizes), strict=True) if end <= 60]
    assert slow[0] == 20
    assert max(slow[1:]) * 0.05 <= INTERVAL / 2
    assert max(sizes) > 80


def _sums(sizes: Sequence[int]) -> Iterator[int]:
    total = 0
    for size in sizes:
        total += size
        yield total


# -- claims ------------------------------------------------------------------------------------------------------------------


@broker
def test_the_claim_of_a_slow_handler_is_renewed(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim whose lease is shorter than its handler is not taken over: another group of the same scope waits for it."""
    monkeypatch.setattr("kafka_guarantees._recognition.claims.LEASE_MARGIN", 0.0)  # a lease is one interval
    source = here.topic()
    with AtLeastOnce({"bootstrap.servers": here.bootstrap}) as producer:
        producer.produce(source, b"0", message_id="one")
    handled: list[str] = []
    working = threading.Event()

    def slow(message: Message) -> None:
        working.set()
        time.sleep(SLOW)
        handled.append("slow")

    with MemoryDedupStore() as store:
        options: dict[str, Any] = {"dedup": store, "scope": "one", "takeover": "lease"}
        with (
            AtLeastOnce(settings("AtLeastOnce", here.bootstrap, here.fresh("group")), keep_alive=True, **options) as one,
            AtLeastOnce(settings("AtLeastOnce", here.bootstrap, here.fresh("group")), **options) as two,
            in_thread(lambda: one.run([source], slow, until_idle=IDLE)),
        ):
            assert working.wait(DEADLINE)
            with in_thread(lambda: two.run([source], lambda message: handled.append("other"), until_idle=IDLE)):
                assert becomes_true(lambda: two.dedup_counts["waited for"])
            counts = two.dedup_counts
    assert handled == ["slow"]
    assert counts["duplicate"] == 1
    assert one.dedup_counts["lost"] == 0
