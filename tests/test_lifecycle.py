"""Laws of running, stopping, closing and forking, which hold for all three classes alike."""

from __future__ import annotations

import ast
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
import weakref
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, _lifecycle
from kafka_guarantees._client import Abandoned, Callbacks, Caller, Handle
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._group_client import GroupClient
from kafka_guarantees._lifecycle import SECOND_THOUGHTS, Lifecycle
from kafka_guarantees._places import Places
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees._threads import Flag
from kafka_guarantees.errors import BrokerError, ForkedClientError, HandlerError, KafkaGuaranteesError

from .world import without_collector

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from confluent_kafka import Message

    from kafka_guarantees._lifecycle import Itself
    from kafka_guarantees.testing import RunningKafka

    Client = AtMostOnce | AtLeastOnce | ExactlyOnce
    Make = Callable[[str], Client]

DEAD = "127.0.0.1:1"
DEADLINE = 20.0
CLASSES = [AtMostOnce, AtLeastOnce, ExactlyOnce]


def becomes_true(condition: Callable[[], bool], seconds: float = DEADLINE) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return true


def client(kind: type[Client], bootstrap: str, name: str, **more: object) -> Client:
    config: dict[str, object] = {"bootstrap.servers": bootstrap, "group.id": name, **more}
    if kind is ExactlyOnce:
        config["transactional.id"] = name
    return kind(config)


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


# --- Lifecycle: one run at a time --------------------------------------------------------------------------------------


def test_a_stop_before_the_run_ends_the_next_one() -> None:
    """A stop is never lost: it counts for the next run, and for that one only."""
    life = Lifecycle("Client")
    life.stop()
    with life.running(lambda: None):
        assert life.stopping
    with life.running(lambda: None):
        assert not life.stopping
        assert not life.out_of_patience


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_transaction_that_only_produces_leaves_a_stop_to_the_next_run(when: str) -> None:
    """A signal that comes while a service announces itself must end the loop that it begins then."""
    lifecycle = Lifecycle("Test")
    if when == "before":
        lifecycle.stop()
    with lifecycle.running(lambda: None, consumes=False):
        if when == "meanwhile":
            lifecycle.stop()
    assert lifecycle.stopping
    with lifecycle.running(lambda: None, consumes=False):
        assert lifecycle._give_up_at is None  # it has its time: a service that stops may have an outbox to send
    with lifecycle.running(lambda: None):
        assert lifecycle._give_up_at is not None
    assert not lifecycle.stopping


def test_a_stop_that_an_error_answered_ends_the_next_run() -> None:
    """SIGTERM, then the handler raises: a loop that runs again after errors must come to its end, and knows of no signal."""
    life = Lifecycle("Client")

    def fail() -> None:
        with life.running():
            os.kill(os.getpid(), signal.SIGTERM)
            assert becomes_true(lambda: life.stopping)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with life.running():
        assert life.stopping
        assert not life.out_of_patience
    with life.running():
        assert not life.stopping


def test_a_run_belongs_to_its_thread() -> None:
    """X26, Y01: a second run is refused, in this thread and in others, and the first goes on."""
    life = Lifecycle("Client")
    refused: list[BaseException] = []

    def again() -> None:
        try:
            with life.running(lambda: None):
                pass
        except KafkaGuaranteesError as error:
            refused.append(error)

    with life.running(lambda: None):
        assert life.in_run
        assert life.in_hand
        again()
        with in_thread(again):
            pass
        assert life.in_run
    assert [("is running already" in str(error)) for error in refused] == [True, True]
    assert not life.in_run
    again()
    assert len(refused) == 2


def test_in_hand_is_only_the_thread_that_runs() -> None:
    """What another thread produces meanwhile is not of the handler."""
    life = Lifecycle("Client")
    seen: list[tuple[bool, bool]] = []
    with life.running(lambda: None), in_thread(lambda: seen.append((life.in_run, life.in_hand))):
        pass
    assert seen == [(True, False)]


def test_a_run_that_raises_is_over() -> None:
    """The client can run again after any end of a run."""
    life = Lifecycle("Client")
    with suppress(ZeroDivisionError), life.running(lambda: None):
        life.stop()
        raise ZeroDivisionError
    assert not life.in_run
    assert not life.stopping


def test_patience_ends_some_time_after_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brokers that do not answer are waited for a moment, not for ever; a second stop does not prolong it."""
    monkeypatch.setattr("kafka_guarantees._lifecycle.STOP_GRACE", 0.5)
    life = Lifecycle("Client")
    with life.running(lambda: None):
        assert not life.out_of_patience
        life.stop()
        assert not life.out_of_patience
        first = life._give_up_at
        life.stop()
        assert life._give_up_at == first
        assert becomes_true(lambda: life.out_of_patience, 5)


def test_close_has_its_own_time_also_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop gives brokers six seconds. close(30) gives them thirty, and the handler of another thread does not extend that."""
    lifecycle = Lifecycle("AtLeastOnce")
    closing = threading.Thread(target=lifecycle.end_run, args=(30,))
    began = time.monotonic()
    with lifecycle.running():
        lifecycle.stop()
        closing.start()
        assert becomes_true(lambda: (lifecycle._give_up_at or 0) > began + 20)
        lifecycle.handled()
        for later, given_up in ((29, False), (40, True)):
            with monkeypatch.context() as patched:
                patched.setattr(time, "monotonic", lambda moment=began + later: moment)
                assert lifecycle.out_of_patience is given_up
    closing.join(5)
    assert not closing.is_alive()


@pytest.mark.parametrize("how", ["run", "answered"])
@pytest.mark.parametrize("behind", ["_give_up_at", "stopping"])
def test_a_stop_at_the_end_of_a_run_takes_no_time_from_the_next_one(behind: str, how: str) -> None:
    """It ends the next run, or ended the last one. What it never does is to leave a run that goes on without patience."""

    class Ending(Lifecycle):
        armed = False

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if self.armed and name == behind:
                self.armed = False
                self.stop()

    life = Ending("Client")
    with life.running(lambda: None):
        life.stop()
        life.armed = how == "run"
    if how == "answered":
        life.stop()  # the log line before it takes its time
        life.armed = True
        life.answered()
    assert not life.armed
    assert life.stopping or life._give_up_at is None


def test_a_run_may_end_while_another_thread_asks_for_its_patience() -> None:
    """That thread, in produce() or flush(), hears yes or no, and no TypeError."""

    class Ending(Lifecycle):
        asked = 0

        @property
        def _give_up_at(self) -> float | None:
            Ending.asked += 1
            return time.monotonic() - 1 if Ending.asked == 1 else None

        @_give_up_at.setter
        def _give_up_at(self, _until: float | None) -> None: ...

    lifecycle = Ending("AtLeastOnce")
    with lifecycle.running():
        Ending.asked = 0
        assert lifecycle.out_of_patience
        Ending.asked = 0
        lifecycle.handled()


def test_a_closed_client_refuses_and_says_that_nothing_was_sent() -> None:
    """After close() there is one answer to everything."""
    life = Lifecycle("Client")
    life.closed = True
    with pytest.raises(KafkaGuaranteesError, match=r"this Client is closed\. Nothing was sent"):
        life.check()
    with pytest.raises(KafkaGuaranteesError), life.running(lambda: None):
        pass


# --- Lifecycle: signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_a_client_is_closed_though_the_end_of_its_loop_fails(kind: type[Client]) -> None:
    """What that raises, as of a right to commit that is missing, is raised behind it: else its producer would be left open."""
    made = client(kind, DEAD, "closed")

    def loop(itself: Itself) -> Generator[int, None, None]:
        with made._lifecycle.running(itself):
            try:
                yield 1
            except GeneratorExit:
                raise BrokerError("no right to commit") from None

    kept = made._lifecycle.iterate(loop)
    next(kept)
    with pytest.raises(BrokerError, match="no right to commit"):
        made.close()
    assert made._lifecycle.closed
    made.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_only_asks_the_run_to_stop(number: signal.Signals) -> None:
    """C01, Y03: no exception comes out of whatever C call is on; then the handlers that were there are back."""
    calls: list[int] = []
    before = signal.signal(number, lambda found, _frame: calls.append(found))
    try:
        mine = signal.getsignal(number)
        life = Lifecycle("Client")
        with life.running():
            assert signal.getsignal(number) is not mine
            os.kill(os.getpid(), number)
            assert becomes_true(lambda: life.stopping)
        assert signal.getsignal(number) is mine
        os.kill(os.getpid(), number)
        assert becomes_true(lambda: calls == [number])
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_interrupts_and_an_echo_of_the_first_does_not() -> None:
    """A handler may never return. A terminal sends SIGINT to the whole group, and a wrapper passes its own on as well."""
    life = Lifecycle("Client")
    with life.running():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert life.stopping
        time.sleep(SECOND_THOUGHTS)
        os.kill(os.getpid(), signal.SIGTERM)  # asks once more, and no more than that
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - where it comes
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def test_a_second_ctrl_c_changes_nothing_where_handlers_have_a_thread() -> None:
    """It cannot interrupt them, and the thread that serves the group meanwhile must go on."""
    config = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"}
    with AtLeastOnce(config, keep_alive=True) as client, client._lifecycle.running():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(SECOND_THOUGHTS + 0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert client._lifecycle.stopping


def test_handlers_are_put_back_after_an_exception() -> None:
    """Whatever ends a run, Ctrl-C works afterwards as it did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(ZeroDivisionError), Lifecycle("Client").running():
        raise ZeroDivisionError
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_end_of_a_run_is_that_of_the_next_one_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop around run() begins another before close() is awake: that would go on with a client that is closed."""
    life, second, over = Lifecycle("Client"), threading.Event(), threading.Event()

    class LateToHear(Flag):
        def wait(self, timeout: float | None = None) -> bool:
            came = super().wait(timeout)
            return second.wait(DEADLINE) and came

    def run_again_and_again() -> None:
        for number in range(2):
            with life.running():
                if number == 1:
                    second.set()
                while not (life.stopping or over.is_set()):
                    time.sleep(0.001)

    monkeypatch.setattr(_lifecycle, "Flag", LateToHear)
    with in_thread(run_again_and_again) as thread:
        assert becomes_true(lambda: life.in_run)
        try:
            assert life.end_run(DEADLINE)
            assert not life.in_run
        finally:
            over.set()
    assert not thread.is_alive()


def test_a_run_without_signals_leaves_the_handlers_alone() -> None:
    """messages() and transactions() leave signals to the caller."""
    before = signal.getsignal(signal.SIGINT)
    with Lifecycle("Client").running(lambda: None):
        assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_touch_no_signal_handler() -> None:
    """Python sets handlers in the main thread only: a run elsewhere works, and leaves them to the main thread."""
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def run() -> None:
        with Lifecycle("Client").running():
            seen.append(signal.getsignal(signal.SIGINT))

    with in_thread(run):
        pass
    assert seen == [before]


# --- Caller ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def caller() -> Iterator[Caller]:
    made = Caller("test-caller")
    yield made
    made.end()
    assert becomes_true(lambda: not made._hands)


def never() -> bool:
    return False


def test_a_call_returns_what_it_returns(caller: Caller) -> None:
    """On one thread that is not this one, call after call."""
    threads = {caller.call(lambda n=n: (n, threading.get_ident()), never, "counting") for n in range(50)}  # type: ignore[misc]
    assert {number for number, _ in threads} == set(range(50))
    assert len({thread for _, thread in threads}) == 1
    assert threading.get_ident() not in {thread for _, thread in threads}


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_a_call_raises_what_it_raises_and_the_next_one_works(caller: Caller, kind: type[BaseException]) -> None:
    """An exception of the call comes here, whatever it is; the thread goes on, and nothing of it is left."""

    def fails() -> None:
        raise kind("this")

    with pytest.raises(kind, match="this"):
        caller.call(fails, never, "failing")
    assert caller.call(lambda: 5, never, "counting") == 5


def test_a_call_is_given_up_and_waited_for_by_the_next(caller: Caller) -> None:
    """Y01: two threads are never in the C client at once, and the outcome of one call is not taken for that of the next."""
    release, running = threading.Event(), []

    def slow() -> str:
        running.append("slow begins")
        assert release.wait(DEADLINE)
        running.append("slow ends")
        return "slow"

    started = time.monotonic()
    with pytest.raises(BrokerError, match="leaving got no answer from the brokers: its outcome is unknown"):
        caller.call(slow, lambda: True, "leaving")
    assert time.monotonic() - started < 5
    with pytest.raises(BrokerError):
        caller.call(lambda: running.append("too early"), lambda: True, "committing")
    threading.Timer(0.2, release.set).start()
    assert caller.call(lambda: list(running), never, "committing") == ["slow begins", "slow ends"]


def test_a_call_that_a_signal_walked_away_from_is_waited_for(caller: Caller) -> None:
    """C01: an exception out of a signal handler leaves the wait; the call goes on, and the next one waits for it."""
    running: list[str] = []
    release = threading.Event()

    def slow() -> None:
        running.append("slow begins")
        assert release.wait(DEADLINE)
        running.append("slow ends")

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            caller.call(slow, never, "committing")
        threading.Timer(0.2, release.set).start()
        caller.call(lambda: running.append("next"), never, "committing")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert running == ["slow begins", "slow ends", "next"]


def test_the_thread_ends_and_holds_nothing() -> None:
    """After end() no thread is left, also where a call was given up; nothing keeps the C client alive (X20)."""
    release = threading.Event()
    caller = Caller("test-caller")
    with pytest.raises(BrokerError):
        caller.call(lambda: release.wait(DEADLINE), lambda: True, "leaving")
    (thread,), calls = caller._hands, caller._calls
    assert thread.daemon
    assert calls is not None
    caller.end()
    assert thread.is_alive()
    release.set()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert calls.empty()
    Caller("never used").end()


# --- Callbacks ---------------------------------------------------------------------------------------------------------


def test_an_exception_of_a_callback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """C01, P12: an exception that leaves a callback destroys messages or hides a commit; so it does not leave it."""
    callbacks = Callbacks()

    def fails(*_args: object) -> None:
        raise ValueError("of the user")

    callbacks.shim("stats_cb", fails)("{}")
    callbacks.raise_interrupt()
    assert "stats_cb raised" in caplog.text
    assert "of the user" in caplog.text


def test_a_callback_that_always_raises_is_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """A traceback for each of many statistics takes longer than they take to come: a flush, and a commit, would not end."""
    faults: list[type[Exception]] = [ZeroDivisionError, KeyError]

    def raises(number: int) -> None:
        raise faults[number % 2]

    shim = Callbacks().shim("stats_cb", raises)
    for number in range(10):
        shim(number)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == faults


def test_a_callback_that_comes_while_a_client_fails_has_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """confluent-kafka calls it while it raises that there is no token: whatever it calls fails. The BrokerError tells."""
    fault = SystemError("<built-in function monotonic> returned a result with an exception set")

    def callback() -> None:
        raise fault from KafkaException("OAuth token not set")

    callbacks = Callbacks()
    callbacks.shim("error_cb", callback)()
    callbacks.raise_interrupt()
    assert not caplog.records


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_callback_is_raised_after_the_c_call_once(kind: type[BaseException]) -> None:
    """P12: Ctrl-C in a callback is neither lost nor raised inside C."""
    callbacks = Callbacks()

    def interrupted(*_args: object) -> None:
        raise kind

    callbacks.shim("error_cb", interrupted)("x")
    with pytest.raises(kind):
        callbacks.raise_interrupt()
    callbacks.raise_interrupt()


def test_a_callback_hears_what_librdkafka_says() -> None:
    """The shim passes everything on; where the user has none, errors are logged; the user's logger is used."""
    heard: list[object] = []
    logger = logging.getLogger("test.user")
    made = Callbacks().of({"stats_cb": heard.append, "error_cb": heard.append, "logger": logger})
    made["stats_cb"]("{}")
    error = KafkaError(KafkaError._TRANSPORT)
    made["error_cb"](error)
    assert heard == ["{}", error]
    assert made["logger"] is logger
    assert set(Callbacks().of({})) == {"error_cb", "logger"}


def test_an_error_that_comes_all_the_time_is_not_logged_all_the_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Brokers that are down are tried several times a second: that is said once in a while, and another error at once."""
    error_cb = Callbacks().of({})["error_cb"]
    now = time.monotonic()
    for later, code in (
        (0, KafkaError._TRANSPORT),
        (1, KafkaError._TRANSPORT),
        (2, KafkaError._SSL),
        (10, KafkaError._TRANSPORT),
    ):
        monkeypatch.setattr(time, "monotonic", lambda moment=now + later: moment)
        error_cb(KafkaError(code, "what happened"))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["_TRANSPORT", "_SSL", "_TRANSPORT"]


# --- the three classes: running, stopping, closing -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def topic(kafka: RunningKafka) -> str:
    """A topic with three messages, which no test adds to: each reads it with a group of its own."""
    name = f"lifecycle-{uuid.uuid4().hex[:12]}"
    kafka.create_topic(name, 1)
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap}) as producer:
        for value in (b"1", b"2", b"3"):
            producer.produce(name, value)
        producer.flush(DEADLINE)
    return name


@pytest.fixture(params=CLASSES, ids=[kind.__name__ for kind in CLASSES])
def kafka_client(request: pytest.FixtureRequest, kafka: RunningKafka, fresh: Callable[[str], str]) -> Iterator[Client]:
    """One client of each class that begins at the first message."""
    name = fresh("lifecycle")
    config: dict[str, object] = {"bootstrap.servers": kafka.bootstrap, "group.id": name}
    if request.param is ExactlyOnce:
        config["transactional.id"] = name
    with request.param(config, start="earliest") as made:
        yield made


@pytest.mark.broker
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_cleanly(kafka_client: Client, topic: str, number: signal.Signals) -> None:
    """run() in the main thread returns, without an exception, after the message in hand; and the next run goes on there."""
    before = signal.getsignal(number)
    seen: list[bytes | None] = []

    def handler(message: Message) -> None:
        seen.append(message.value())
        if len(seen) == 2:
            os.kill(os.getpid(), number)
            assert becomes_true(lambda: kafka_client._lifecycle.stopping)

    kafka_client.run([topic], handler, max_batch=10)
    assert signal.getsignal(number) is before
    assert seen[:2] == [b"1", b"2"]
    if not isinstance(kafka_client, AtMostOnce):  # which finishes the portion that it has committed
        assert len(seen) == 2
    kafka_client.run([topic], lambda message: seen.append(message.value()), until_idle=0.3)
    assert seen == [b"1", b"2", b"3"]


@pytest.mark.broker
def test_a_second_ctrl_c_leaves_a_handler_that_hangs(kafka_client: Client, topic: str) -> None:
    """What was not committed comes again, but for at-most-once."""
    seen: list[bytes | None] = []

    def handler(message: Message) -> None:
        seen.append(message.value())
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(SECOND_THOUGHTS + 0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            time.sleep(30)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        kafka_client.run([topic], handler, max_batch=10)
    assert time.monotonic() - started < 25
    for _ in ("ended by the signal, which was answered with an error", "to the end"):
        kafka_client.run([topic], lambda message: seen.append(message.value()), until_idle=0.3)
    assert seen == ([b"1", b"2"] if isinstance(kafka_client, AtMostOnce) else [b"1", b"2", b"1", b"2", b"3"])


@pytest.mark.broker
def test_stop_from_another_thread_ends_the_run_soon(kafka_client: Client, topic: str) -> None:
    """Y01: stop() returns at once and the run does within two seconds, with nothing to consume."""
    seen: list[bytes | None] = []
    with in_thread(lambda: kafka_client.run([topic], lambda message: seen.append(message.value()))) as thread:
        assert becomes_true(lambda: len(seen) == 3)
        started = time.monotonic()
        kafka_client.stop()
        assert time.monotonic() - started < 1
        thread.join(3)
        assert not thread.is_alive()


@pytest.mark.broker
def test_why_a_run_ended_is_in_the_log(kafka_client: Client, topic: str, caplog: pytest.LogCaptureFixture) -> None:
    """A batch job that SIGTERM has cut short ends as one that is done: without an error. Each run has its own reason."""
    caplog.set_level(logging.INFO, "kafka_guarantees")
    kafka_client.stop()
    kafka_client.run([topic], lambda _message: None)
    kafka_client.run([topic], lambda _message: None, until_idle=0.3)
    before = signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        assert becomes_true(lambda: signal.getsignal(signal.SIGTERM) is not before)
        os.kill(os.getpid(), signal.SIGTERM)

    with in_thread(terminate):
        kafka_client.run([topic], lambda _message: None)
    with in_thread(lambda: kafka_client.run([topic], lambda _message: None)):
        assert becomes_true(lambda: kafka_client._lifecycle.in_run)
        kafka_client.close()
    leaving = f"leaving group {kafka_client._settings.group_id!r}: "
    reasons = [line.removeprefix(leaving) for line in caplog.messages if line.startswith(leaving)]
    assert reasons == ["stop()", "nothing came for 0.3 s", "SIGTERM", "close()"]


@pytest.mark.broker
def test_stop_before_run_ends_the_next_run(kafka_client: Client, topic: str) -> None:
    """A stop that a signal or thread asked for a moment too early is not lost, and handles nothing."""
    seen: list[bytes | None] = []
    kafka_client.stop()
    kafka_client.run([topic], lambda message: seen.append(message.value()))
    assert seen == []
    kafka_client.run([topic], lambda message: seen.append(message.value()), until_idle=0.3)
    assert seen == [b"1", b"2", b"3"]


@pytest.mark.broker
def test_close_from_another_thread_ends_the_run(kafka_client: Client, topic: str) -> None:
    """close() waits for the run to finish what is in hand; after it, every call is refused."""
    seen: list[bytes | None] = []
    with in_thread(lambda: kafka_client.run([topic], lambda message: seen.append(message.value()))):
        assert becomes_true(lambda: len(seen) == 3)
        kafka_client.close(10)
        assert not kafka_client._lifecycle.in_run
    with pytest.raises(KafkaGuaranteesError, match="is closed"):
        kafka_client.run([topic], lambda _message: None)
    kafka_client.close()  # twice is fine


@pytest.mark.broker
def test_close_in_the_handler_is_refused(kafka_client: Client, topic: str) -> None:
    """Y09: a handler that closes its own client would wait for itself. It is told what to do instead, and the client lives."""
    refused: list[BaseException] = []

    def handler(_message: Message) -> None:
        try:
            kafka_client.close(30)
        except KafkaGuaranteesError as error:
            refused.append(error)
            raise

    started = time.monotonic()
    with suppress(HandlerError):
        kafka_client.run([topic], handler, until_idle=0.3)
    assert time.monotonic() - started < 10
    assert refused
    assert "call stop() there" in str(refused[0])
    assert not kafka_client._lifecycle.closed


@pytest.mark.broker
def test_a_loop_that_was_left_ends_at_once(kafka_client: Client, topic: str) -> None:
    """Break out of messages() or transactions() ends the run with it: the client can begin another."""
    for _ in iterate(kafka_client, topic):
        break
    assert not kafka_client._lifecycle.in_run


@pytest.mark.broker
def test_a_loop_that_somebody_still_holds_ends_with_close(kafka_client: Client, topic: str) -> None:
    """An iterator that is kept, as the traceback of an exception keeps it, is a group member: close() ends it at once."""
    kept = iterate(kafka_client, topic)
    next(kept)
    assert kafka_client._lifecycle.in_run
    started = time.monotonic()
    kafka_client.close(20)
    assert time.monotonic() - started < 5
    assert not kafka_client._lifecycle.in_run


@pytest.mark.broker
def test_a_second_loop_does_not_keep_close_from_ending_the_first(kafka_client: Client, topic: str) -> None:
    """One client runs one loop: the second is refused, and close() still ends the first at once."""
    first = iterate(kafka_client, topic)
    next(first)
    try:
        with pytest.raises(KafkaGuaranteesError, match="running already"):
            next(iterate(kafka_client, topic))
        kafka_client.close(1)
        assert not kafka_client._lifecycle.in_run
    finally:
        first.close()


@pytest.mark.broker
def test_close_does_not_wait_for_a_thread_that_is_gone(kafka_client: Client, topic: str) -> None:
    """A loop that was left by break, in a thread that is over since: nobody can finish it, so nobody is waited for."""

    def leave() -> None:
        for _ in iterate(kafka_client, topic):
            break

    with in_thread(leave):
        pass
    started = time.monotonic()
    kafka_client.close(2)
    assert time.monotonic() - started < 1.5


def iterate(kafka_client: Client, topic: str) -> Any:
    return kafka_client.transactions([topic]) if isinstance(kafka_client, ExactlyOnce) else kafka_client.messages([topic])


# --- fork ----------------------------------------------------------------------------------------------------------------

# Every call that a user can make on a client, or on what came from one. close() is harmless, so that `with` blocks end.
CALLS = {
    "AtMostOnce": {
        "produce": "kafka.produce('t', b'x')",
        "flush": "kafka.flush()",
        "run": "kafka.run(['t'], print)",
        "run_batches": "kafka.run_batches(['t'], print)",
        "messages": "next(kafka.messages(['t']))",
        "preflight": "kafka.preflight()",
        "with": "kafka.__enter__()",
    },
    "AtLeastOnce": {
        "produce": "kafka.produce('t', b'x')",
        "flush": "kafka.flush()",
        "run": "kafka.run(['t'], print)",
        "run_batches": "kafka.run_batches(['t'], print)",
        "messages": "next(kafka.messages(['t']))",
        "preflight": "kafka.preflight()",
        "with": "kafka.__enter__()",
    },
    "ExactlyOnce": {
        "run": "kafka.run(['t'], print)",
        "run_batches": "kafka.run_batches(['t'], print)",
        "transactions": "next(kafka.transactions(['t']))",
        "transaction": "kafka.transaction().__enter__()",
        "preflight": "kafka.preflight()",
        "with": "kafka.__enter__()",
    },
}
HARMLESS = {"close", "stop", "explain", "dedup_counts"}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_fork_test_knows_every_public_method(kind: type[Client]) -> None:
    """A new public method is tried after a fork as well."""
    public = {name for name in vars(kind) if not name.startswith("_")}
    assert public == set(CALLS[kind.__name__]) - {"with"} | (HARMLESS & public)


FORK = """
import os, sys, time, warnings
from kafka_guarantees import {kind}
from kafka_guarantees.errors import ForkedClientError, KafkaGuaranteesError
warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)
kafka = {kind}({{"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "transactional.id": "x"}} if {eos} else
               {{"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "log_level": 0}})
if not {eos}:
    kafka.produce("t", b"queued")
child = os.fork()
if child == 0:
    for name, call in {calls}.items():
        try:
            eval(call)
        except ForkedClientError as error:
            assert "Nothing was sent" in str(error)
            print(name, "refused", flush=True)
        except BaseException as error:
            print(name, repr(error), flush=True)
        else:
            print(name, "accepted", flush=True)
    kafka.stop()
    kafka.close()
    {end}
started = time.monotonic()
_, status = os.waitpid(child, 0)
print("child", status, time.monotonic() - started < 5, flush=True)
if not {eos}:
    assert not kafka._lifecycle.forked
    kafka.produce("t", b"of the parent")
    # drain() counts events that wait to be served as well, so it is asked until they are
    assert any(kafka._producer.drain(lambda: True) == 2 for _ in range(20)), "the parent's queue is as it was"
    try:
        kafka.close(0.2)
    except KafkaGuaranteesError as error:
        assert "And 1 more" in str(error), error
else:
    kafka.close(0.2)
"""


def python(script: str, *options: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)"])
@pytest.mark.parametrize("kind", sorted(CALLS))
def test_a_forked_child_refuses_every_call_and_ends_quickly(kind: str, end: str) -> None:
    """Y04: each public method raises ForkedClientError, the child ends with status 0, and the parent does not notice."""
    done = python(FORK.format(kind=kind, eos=kind == "ExactlyOnce", calls=CALLS[kind], end=end))
    assert done.returncode == 0, done.stderr
    expected = [f"{name} refused" for name in CALLS[kind]] + ["child 0 True"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_a_forked_child_does_not_warn_of_its_parents_client() -> None:
    """P04 is about the parent, who still has the client: a warning from each child is a false alarm, and -W error an error."""
    script = """
        import faulthandler, os, sys, warnings
        from kafka_guarantees import AtLeastOnce
        warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)
        kafka = AtLeastOnce({"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
        kafka.produce("t", b"x")
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(15, exit=True)  # seen once on a busy machine: one of the two stood still
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status))
        """
    done = python(script, "-W", "always")
    assert done.returncode == 0, done.stderr
    assert "was not closed" not in done.stderr


def test_a_delivery_of_the_parent_is_refused_in_the_child() -> None:
    """Y04: no report will ever come in the child, so result() must not wait for one."""
    script = """
        import os, warnings
        from kafka_guarantees import AtLeastOnce
        warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)
        kafka = AtLeastOnce({"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
        delivery = kafka.produce("t", b"x")
        kafka._producer._turns._until = float("inf")  # another thread serves, which is not in the child
        child = os.fork()
        if child == 0:
            try:
                delivery.result(0.3)
            except BaseException as error:
                print(type(error).__name__, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        os._exit(0)
        """
    assert python(script).stdout.split() == ["ForkedClientError"]


@pytest.mark.broker
def test_a_transaction_of_the_parent_is_refused_in_the_child(
    kafka: RunningKafka, topic: str, fresh: Callable[[str], str]
) -> None:
    """Y04: a record that the child produces would never be sent, without a word."""
    script = f"""
        import os, warnings
        from kafka_guarantees import ExactlyOnce
        warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)
        with ExactlyOnce({{"bootstrap.servers": "{kafka.bootstrap}", "transactional.id": "{fresh("fork")}"}}) as kafka:
            with kafka.transaction() as tx:
                child = os.fork()
                if child == 0:
                    try:
                        tx.produce("{topic}", b"lost")
                        print("accepted", flush=True)
                    except BaseException as error:
                        print(type(error).__name__, flush=True)
                    os._exit(0)
                os.waitpid(child, 0)
        """
    assert python(script).stdout.split() == ["ForkedClientError"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.broker
def test_multiprocessing_children_make_clients_of_their_own(
    kafka: RunningKafka, kafka_topic: Callable[..., str], method: str
) -> None:
    """Y04: the inherited client is refused in a forked child; one that the child makes itself works, in both methods."""
    topic = kafka_topic(1)
    script = f"""
        import multiprocessing, os, sys, warnings
        from kafka_guarantees import AtLeastOnce
        from kafka_guarantees.errors import ForkedClientError
        warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)
        CONFIG = {{"bootstrap.servers": "{kafka.bootstrap}"}}
        kafka = None
        def work(expected):
            try:
                kafka.produce("{topic}", b"inherited")
            except ForkedClientError:
                assert expected == "fork"
            except AttributeError:
                assert expected == "spawn"
            else:
                sys.exit(3)
            with AtLeastOnce(CONFIG) as own:
                own.produce("{topic}", b"own").result(10)
        if __name__ == "__main__":
            kafka = AtLeastOnce(CONFIG)
            kafka.produce("{topic}", b"parent").result(10)
            context = multiprocessing.get_context("{method}")
            child = context.Process(target=work, args=("{method}",))
            child.start()
            child.join(20)
            kafka.produce("{topic}", b"parent again").result(10)
            kafka.close()
            print(child.exitcode)
        """
    # spawn imports the main script by its file
    path = f"/tmp/kafka-guarantees-{os.getpid()}-{method}.py"
    try:
        with open(path, "w") as file:  # noqa: PTH123 - two lines
            file.write(textwrap.dedent(script))
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=False)
    finally:
        os.unlink(path)  # noqa: PTH108 - as above
    assert done.stdout.split() == ["0"], done.stderr


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_client_cannot_be_sent_to_another_process(kind: type[Client]) -> None:
    """What a spawned child gets is pickled: a client is refused there, instead of arriving without its connections."""
    with client(kind, DEAD, "g") as made, pytest.raises(TypeError, match="pickle"):
        pickle.dumps(made)


def test_fork_marks_every_client_of_the_parent() -> None:
    """Also those that are used by nobody yet; the ones that were forgotten cost nothing."""
    script = """
        import gc, os, warnings
        from kafka_guarantees._lifecycle import Lifecycle, _alive
        warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)
        many = [Lifecycle(str(n)) for n in range(5)]
        del many[3:]
        gc.collect()
        assert len(_alive) == 3
        child = os.fork()
        if child == 0:
            os._exit(0 if all(life.forked for life in many) and not Lifecycle("own").forked else 1)
        _, status = os.waitpid(child, 0)
        assert not any(life.forked for life in many)
        print(status)
        """
    done = python(script)
    assert done.stdout.split() == ["0"], done.stderr


def test_the_refusal_after_a_fork_says_what_to_do() -> None:
    """ForkedClientError names the reason, what is safe, and the remedy; it comes before "closed"."""
    life = Lifecycle("AtLeastOnce")
    life.forked = life.closed = True
    with pytest.raises(ForkedClientError, match=r"Nothing was sent\. Make the client after the fork"):
        life.check()
    gc.collect()


STORM_OVER_MAKING = """
import collections, random, signal
from confluent_kafka import Producer
from kafka_guarantees._client import Handle

class Storm(Exception): pass

def storm(*_): raise Storm

signal.signal(signal.SIGALRM, storm)
found = collections.Counter()
config = {"bootstrap.servers": "127.0.0.1:1", "log_level": "0", "client.id": "made-in-a-storm"}
for _ in range(1500):
    handle = Handle()
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.002))
        try:
            handle.make(Producer, config)
            found["made"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            handle.let_go()
    except Storm:
        found["storm"] += 1
    except Exception as error:
        found[f"{type(error).__name__}: {error}"] += 1
print(dict(found))
"""


def test_a_signal_that_raises_while_a_client_is_made_comes_as_it_is() -> None:
    """Ctrl-C must not come as an error about the configuration: str() of C code asks for signals, and its caller hides them."""
    done = subprocess.run([sys.executable, "-c", STORM_OVER_MAKING], capture_output=True, text=True, timeout=120, check=True)
    found = ast.literal_eval(done.stdout)
    assert set(found) == {"made", "storm"}
    assert found["storm"] > 20


# -- members that nobody serves ---------------------------------------------------------------------------------------------


class Alarm(Exception):
    """What a signal handler of the user raises."""


def members(kafka: RunningKafka, group: str) -> int:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    return len(admin.describe_consumer_groups([group])[group].result(30).members)


def gone(kafka: RunningKafka, group: str, seconds: float = 15.0) -> bool:
    """Whether the group has no member any more, before long: the session of one takes 1.5 s."""
    deadline = time.monotonic() + seconds
    while (there := members(kafka, group)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not there


SESSION = {"session.timeout.ms": 1500, "heartbeat.interval.ms": 300}


@pytest.mark.broker
def test_a_close_that_is_interrupted_leaves_no_member_behind(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C01: before its first call has begun. Such a member would hold up every rebalance for max.poll.interval.ms."""
    group = fresh("group")
    true_give_back = GroupClient._give_back

    def give_back(client: GroupClient, given_up: Callable[[], bool]) -> None:
        calls = client._caller._calls
        assert calls is not None
        calls.put(lambda: time.sleep(1))  # its thread does not get its turn
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        true_give_back(client, given_up)

    def ring(_number: int, _frame: object) -> None:
        raise Alarm

    monkeypatch.setattr(GroupClient, "_give_back", give_back)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        with without_collector(), AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": group, **SESSION}) as client:
            with pytest.raises(Alarm):
                client.run([kafka_topic()], lambda _message: None, until_idle=0.5)
            assert gone(kafka, group)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.broker
@pytest.mark.parametrize("guarantee", [Guarantee.AT_MOST_ONCE, Guarantee.AT_LEAST_ONCE])
def test_a_consumer_that_nobody_holds_leaves_no_member_behind(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], guarantee: Guarantee
) -> None:
    """C01: an exception came when it had been made, and before anybody could close it."""
    group = fresh("group")
    settings = resolve(guarantee, {"bootstrap.servers": kafka.bootstrap, "group.id": group, **SESSION})
    with without_collector():
        strict = guarantee is Guarantee.AT_MOST_ONCE
        consumer = GroupConsumer(settings, Lifecycle("test"), [kafka_topic()], Places(group, "earliest"), strict=strict)
        deadline = time.monotonic() + 15
        while not consumer._assignment.owned:
            consumer.fetch(1)
            assert time.monotonic() < deadline
        assert members(kafka, group) == 1
        del consumer
        assert gone(kafka, group)


DROPPED = """
import gc, time
from kafka_guarantees import AtLeastOnce, AtMostOnce
kept, calls = {}, []
"""
FORGOTTEN = """
def error_cb(error):
    if how == "replaced":
        calls.append(kept.pop("client", None))
        del calls[-1]
        calls.append(error)

def stats_cb(text):
    if how == "collected":
        calls.append(gc.collect())

client = kind({"bootstrap.servers": "127.0.0.1:1", "error_cb": error_cb, "stats_cb": stats_cb, "statistics.interval.ms": 50})
client.produce("t", b"x", **({"timeout": 0} if kind is AtLeastOnce else {}))
if how == "replaced":
    kept["client"] = client
else:
    gc.disable()
    cycle = [client]
    cycle.append(cycle)
    del cycle
del client
until = time.monotonic() + 10
while not calls and time.monotonic() < until:
    time.sleep(0.02)
time.sleep(0.2)
print(len(calls) > 0)
"""


@pytest.mark.parametrize("kind", ["AtMostOnce", "AtLeastOnce"])
@pytest.mark.parametrize("how", ["replaced", "collected"])
def test_a_client_may_be_forgotten_in_one_of_its_callbacks(kind: str, how: str) -> None:
    """P12: it makes a new one on an error, or the collector runs there. To serve it once more aborted the process."""
    done = python(f"how = {how!r}\n{DROPPED}kind = {kind}\n{FORGOTTEN}")
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr[-2000:]


LEFT_BEHIND = """
import gc
from kafka_guarantees._client import Handle

class Client:
    def __del__(self):
        print("destroyed by the collector, which waits for its threads")

gc.disable()
handle = Handle()
handle.raw = Client()
handle.raw.owner = handle  # a cycle, as an exception out of a signal handler leaves it
del handle
"""


def test_what_was_left_behind_is_not_destroyed_at_the_end_of_the_process() -> None:
    """X20: a consumer that was never closed kept the process from ending, for ever."""
    done = python(LEFT_BEHIND)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_client_is_let_go_where_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """X20: Python 3.12 begins none once the interpreter ends, and that hid what close() had to say of lost records."""

    def none(*_: object) -> int:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr("kafka_guarantees._client._thread.start_new_thread", none)
    handle = Handle()
    handle.raw = client = SimpleNamespace()
    before = sys.getrefcount(client)
    handle.let_go()
    assert handle.raw is None
    assert sys.getrefcount(client) == before  # not destroyed in this thread, which would wait


def test_the_error_of_a_call_that_was_left_does_not_keep_its_client() -> None:
    """Y01: somebody may keep what was raised or logged; meanwhile the client would stay a member of its group."""
    may_end = threading.Event()

    class Client:
        def close(self) -> None:
            may_end.wait(10)

    client = Client()
    gone = weakref.ref(client)
    caller = Caller("kafka-guarantees-test")
    with pytest.raises(Abandoned) as kept:
        caller.call(client.close, lambda: True, "leaving the group")
    del client
    may_end.set()
    until = time.monotonic() + 5
    while gone() is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert gone() is None
    assert kept.value.__traceback__ is not None
    caller.end()
