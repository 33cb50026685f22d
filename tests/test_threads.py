"""Threads and waiting, with an exception out of a signal handler at every instant that there is (Y03)."""

from __future__ import annotations

import operator
import random
import signal
import sys
import threading
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees._apart import Apart
from kafka_guarantees._client import Caller
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._threads import Flag, start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE = 10.0  # seconds
LASTING = 2.0  # seconds of shots, some thousands; of those that hit threading.Event some tens do harm


class Storm(BaseException):
    """What a signal handler of the user raises."""


class Shots:
    """Each is one signal, whose handler raises."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._fired = False
        self.seen: Counter[str] = Counter()  # what came out

    def fire(self, _number: int, _frame: object) -> None:
        self._fired = True
        raise Storm

    def at(self, call: Callable[[], object], within: float) -> bool:
        """Make a call, and shoot at it within so many seconds. Returns whether it came to its end."""
        self._fired = False
        ended = False
        try:
            signal.setitimer(signal.ITIMER_REAL, self._dice.uniform(1e-6, within))
            call()
            ended = True
            while not self._fired:
                time.sleep(0)
        except BaseException as error:  # noqa: BLE001 - counted
            self.seen[repr(error)] += 1
        while not self._fired:
            time.sleep(0)
        return ended

    def lasting(self) -> Iterator[int]:
        until = time.monotonic() + LASTING
        number = 0
        while time.monotonic() < until:
            yield number
            number += 1
        assert set(self.seen) == {"Storm()"}, self.seen
        assert number > 100


@pytest.fixture
def shots(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shots]:
    hook = sys.unraisablehook

    def unraisable(problem: Any) -> None:
        if problem.exc_type is not Storm:  # in a callback of a weak reference, which raises nothing
            hook(problem)

    made = Shots(seed=7)
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
            others = [start(flag.wait, name="waits") for _ in range(3)]
            start(flag.set, name="sets").join(DEADLINE)
            assert flag.wait(0)
            for other in others:
                other.join(DEADLINE)
                assert not other.is_alive()


def test_a_flag_is_set_for_all_that_wait(shots: Shots) -> None:
    for _ in shots.lasting():
        flag = Flag()
        others = [start(flag.wait, name="waits") for _ in range(2)]
        shots.at(flag.set, within=2e-5)
        if not flag.is_set:
            flag.set()
        flag.set()
        for other in others:
            other.join(DEADLINE)
            assert not other.is_alive()


def test_a_flag_that_does_not_come_is_waited_for_as_long_as_was_said() -> None:
    began = time.monotonic()
    assert not Flag().wait(0.25)
    assert 0.2 < time.monotonic() - began < DEADLINE
    assert not Flag().wait(-1)


def test_calls_are_made_one_at_a_time(shots: Shots) -> None:
    """Y01: also where the first call was interrupted while its thread began."""
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
        caller.call(work, bool, "working")
        caller.end()
    assert max(most) == 1
    assert becomes_true(lambda: len(left("shot at")) < 3)  # one that began right then waits for work for ever


def test_handlers_are_waited_for(shots: Shots) -> None:
    lifecycle = Lifecycle("client")
    handled: list[int] = []

    def handler(number: int) -> None:
        time.sleep(1e-4)
        handled.append(number)

    for number in shots.lasting():
        apart = Apart(lifecycle)
        before = len(handled)
        shots.at(partial(apart.call, handler, number), within=5e-4)
        so_far = len(handled)
        apart.call(handler, -1)
        assert handled[before:so_far] in ([], [number])
        assert len(handled) == so_far + 1  # none was still at work
        apart.close()
    assert becomes_true(lambda: len(lifecycle.hands) < 3)


def test_who_closes_a_client_waits_for_the_run_of_another_thread(shots: Shots) -> None:
    for _ in shots.lasting():
        lifecycle = Lifecycle("client")
        running, release = Flag(), Flag()

        def run(lifecycle: Lifecycle = lifecycle, running: Flag = running, release: Flag = release) -> None:
            with lifecycle.running():
                running.set()
                release.wait()

        runner = start(run, name="runs")
        running.wait()
        shots.at(partial(lifecycle.end_run, 5e-5), within=1.5e-4)
        release.set()
        assert lifecycle.end_run(DEADLINE)
        runner.join(DEADLINE)
        assert not runner.is_alive()


def test_a_thread_that_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            start(print, name="refused")
    with monkeypatch.context() as patched:
        patched.setattr("_thread.start_new_thread", refuse)
        with pytest.raises((RuntimeError, TypeError)):
            start(print, name="refused")
