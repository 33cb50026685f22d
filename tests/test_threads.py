"""Threads and waiting, with an exception out of a signal handler at every instant that there is (Y03)."""

from __future__ import annotations

import operator
import random
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees import _threads
from kafka_guarantees._client import Caller
from kafka_guarantees._handler_thread import HandlerThread
from kafka_guarantees._lifecycle import SIGNALS, Lifecycle
from kafka_guarantees._threads import Flag, Task, start

from .world import without_collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE = 10.0  # seconds
LASTING = 2.0  # seconds of shots, some thousands; of those that hit threading.Event some tens do harm


class Storm(BaseException):
    """What a signal handler of the user raises."""


class Shutdown(RuntimeError):
    """What another one raises."""


class Shots:
    """Each is one signal, whose handler raises."""

    def __init__(self, kind: type[BaseException]) -> None:
        self._kind = kind
        self._dice = random.Random(7)
        self._fired = False
        self._hits = 0  # came out of the call itself
        self.seen: Counter[str] = Counter()

    def fire(self, _number: int, _frame: object) -> None:
        self._fired = True
        raise self._kind

    def at(self, call: Callable[[], object], within: float) -> bool:
        """Make a call, and shoot at it within so many seconds. Returns whether it came to its end."""
        self._fired = False
        ended = False
        try:
            signal.setitimer(signal.ITIMER_REAL, self._dice.uniform(1e-6, within))
            call()
            ended = True
            self._until_fired()
        except BaseException as error:  # noqa: BLE001 - counted
            self.seen[type(error).__name__] += 1
            self._hits += not ended
        with suppress(self._kind):
            self._until_fired()
        return ended

    def _until_fired(self) -> None:
        while not self._fired:  # not in a ``try``: Python 3.13 leaves the jump back to here out of it
            time.sleep(0)

    def lasting(self) -> Iterator[int]:
        """Numbers, as long as it lasts. In the end nothing but shots has come out of the calls, and of many."""
        until = time.monotonic() + LASTING
        number = 0
        while time.monotonic() < until:
            yield number
            number += 1
        assert set(self.seen) == {self._kind.__name__}, self.seen
        assert self._hits > 20


@pytest.fixture(params=[Storm, Shutdown])
def shots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shots]:
    hook = sys.unraisablehook

    def unraisable(problem: Any) -> None:
        if problem.exc_type is not request.param:  # in a callback of a weak reference, which raises nothing
            hook(problem)

    made = Shots(request.param)
    before = signal.signal(signal.SIGALRM, made.fire)
    monkeypatch.setattr(sys, "unraisablehook", unraisable)
    yield made
    signal.signal(signal.SIGALRM, before)


def becomes_true(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + DEADLINE
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def left(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def beside(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def over(*threads: threading.Thread) -> bool:
    for thread in threads:
        thread.join(DEADLINE)
    return not any(thread.is_alive() for thread in threads)


# -- at every instant --------------------------------------------------------------------------------------------------


def test_a_thread_is_started_or_is_not(shots: Shots) -> None:
    """It is never left before its first line, with what it was to let go of."""
    for _ in shots.lasting():
        box = [1]
        if shots.at(partial(start, box.clear, name="shot at"), within=3e-4):
            assert becomes_true(partial(operator.not_, box))
    assert becomes_true(lambda: not left("shot at"))


def test_who_waits_for_a_flag_is_interrupted_and_nobody_else(shots: Shots) -> None:
    for number in shots.lasting():
        flag = Flag()
        shots.at(partial(flag.wait, 3e-5), within=1e-4)
        assert not flag.is_set
        if number % 20 == 0:
            others = [beside(flag.wait) for _ in range(3)]
            flag.set()
            assert flag.wait(0)
            assert over(*others)


def test_calls_are_made_one_at_a_time(shots: Shots) -> None:
    """Y01: also where the first call was interrupted while its thread began, or while it was called off."""
    at_work: list[int] = []
    most: list[int] = [0]

    def work() -> None:
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(1e-4)
        at_work.pop()

    for _ in shots.lasting():
        caller = Caller("shot at")
        shots.at(partial(caller.call, work, bool, "working"), within=5e-4)
        silent = caller.left
        assert silent or not at_work
        caller.call(work, bool, "working")
        assert not caller.left
        caller.end()
    assert max(most) == 1
    assert becomes_true(lambda: len(left("shot at")) < 3)  # one that began right then waits for work for ever


def test_handlers_are_waited_for(shots: Shots) -> None:
    """A handler that nobody waits for could write into a transaction that is not its own."""
    lifecycle = Lifecycle("client")
    handled: list[int] = []

    def handler(number: int) -> None:
        time.sleep(1e-4)
        handled.append(number)

    for number in shots.lasting():
        thread = HandlerThread(lifecycle, DEADLINE)
        before = len(handled)
        shots.at(partial(thread.call, handler, number), within=5e-4)
        so_far = len(handled)
        thread.call(handler, -1)
        assert handled[before:so_far] in ([], [number])
        assert len(handled) == so_far + 1  # none was still at work
        thread.close()
    assert becomes_true(lambda: len(lifecycle.hands) < 3)


def test_handlers_are_called_after_a_close_that_was_interrupted(shots: Shots) -> None:
    thread = HandlerThread(Lifecycle("client"), DEADLINE)
    for number in shots.lasting():
        assert over(beside(partial(thread.call, int, number)))
        shots.at(thread.close, within=2e-5)
    thread.close()


def test_who_closes_a_client_waits_for_the_run_of_another_thread(shots: Shots) -> None:
    for _ in shots.lasting():
        lifecycle = Lifecycle("client")
        running, release = Flag(), Flag()

        def run(lifecycle: Lifecycle = lifecycle, running: Flag = running, release: Flag = release) -> None:
            with lifecycle.running():
                running.set()
                release.wait()

        runner = beside(run)
        running.wait()
        shots.at(partial(lifecycle.end_run, 5e-5), within=1.5e-4)
        release.set()
        assert lifecycle.end_run(DEADLINE)
        assert over(runner)


def test_a_run_that_was_interrupted_is_over(shots: Shots) -> None:
    """The client can be run again, and signals are the user's own."""
    lifecycle = Lifecycle("client")
    before = [signal.getsignal(number) for number in SIGNALS]

    def run() -> None:
        with lifecycle.running():
            pass

    for _ in shots.lasting():
        shots.at(run, within=4e-5)
        assert not lifecycle.in_run
        assert [signal.getsignal(number) for number in SIGNALS] == before


# -- one after the other -------------------------------------------------------------------------------------------------


def test_a_flag_that_does_not_come_is_waited_for_as_long_as_was_said() -> None:
    began = time.monotonic()
    assert not Flag().wait(0.25)
    assert 0.2 < time.monotonic() - began < DEADLINE
    assert not Flag().wait(-1)


def test_a_flag_is_set_for_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, however often it is set."""
    monkeypatch.setattr(_threads, "LATE", 1e6)
    flag = Flag()
    others = [beside(flag.wait) for _ in range(4)]
    time.sleep(0.05)
    flag.set()
    assert over(*others)
    flag.set()
    flag.set()
    assert flag.wait()


def test_a_flag_whose_setting_was_left_half_way_comes_a_little_late() -> None:
    flag = Flag()
    others = [beside(flag.wait) for _ in range(2)]
    time.sleep(0.05)
    flag.is_set = True
    assert over(*others)


def test_a_task_is_done_once() -> None:
    done: list[int] = []
    task = Task(lambda: done.append(1))
    assert not task.begun
    assert task.run()
    assert task.begun
    assert not task.run()
    assert not task.call_off()
    assert task.result() is None
    assert done == [1]


def test_a_task_that_is_called_off_is_never_done() -> None:
    """However often it is called off: the first time may have been interrupted."""
    done: list[int] = []
    task = Task(lambda: done.append(1))
    assert task.call_off()
    assert task.call_off()
    assert task.ended.wait(0)
    assert not task.run()
    assert done == []


def test_a_call_that_was_called_off_is_not_on() -> None:
    """It was never begun, since another one was: nothing is on that the C client must be spared for."""
    caller, release, made = Caller("busy"), Flag(), list[int]()
    try:
        with pytest.raises(Exception, match="first got no answer"):
            caller.call(release.wait, lambda: True, "first")
        assert caller.left
        with pytest.raises(Exception, match="second got no answer"):
            caller.call(lambda: made.append(2), lambda: True, "second")
        assert caller.left  # the first one is on still
        release.set()
        assert caller.call(lambda: 3, bool, "third") == 3
        assert not caller.left
        assert made == []
    finally:
        caller.end()


def test_an_error_of_a_task_holds_nothing() -> None:
    """X20: what the call was about is let go of with the error, and not by the garbage collector."""

    class Client:
        gone = False

        def __del__(self) -> None:
            Client.gone = True

        def fail(self) -> None:
            raise ValueError("no")

    caller = Caller("failing")
    try:
        with without_collector():
            with suppress(ValueError):
                caller.call(Client().fail, bool, "failing")
            assert becomes_true(lambda: Client.gone)
    finally:
        caller.end()


def test_a_thread_that_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first or the second that a start takes."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    for name in ("threading.Thread.start", "_thread.start_new_thread"):
        with monkeypatch.context() as patched:
            patched.setattr(name, refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                start(print, name="refused")


def test_a_thread_that_cannot_begin_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that came into threading's own lock does not wait for itself."""
    monkeypatch.setattr(_threads, "BEGUN", 0.1)
    begun: SimpleQueue[int] = SimpleQueue()
    with threading._active_limbo_lock:  # type: ignore[attr-defined]
        start(begun.put, 1, name="later")
    assert begun.get(timeout=DEADLINE) == 1
