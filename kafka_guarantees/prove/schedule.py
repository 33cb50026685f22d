"""When which fault is done: planned beforehand from a seed, and then carried out, each lane in a thread of its own."""

from __future__ import annotations

import heapq
import logging
import random
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from .evidence import Fault as Done
from .faults import BROKERS, CONNECTIONS, WORKERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .faults import Aim, Fault, Scene, Stage

BREAKS = {WORKERS: (0.2, 1.4), BROKERS: (9.0, 16.0), CONNECTIONS: (0.2, 1.6)}  # seconds between two faults of a lane
WAVE, CALM = 12.0, 5.0  # seconds: each wave begins with a calm, in which what is left over is worked off

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """A fault in a schedule. ``at``: seconds from the beginning."""

    at: float
    fault: Fault
    aim: Aim


def schedule(faults: Sequence[Fault], seed: int, seconds: float, scene: Scene) -> list[list[Step]]:
    """The steps of every lane. The same arguments give the same steps."""
    lanes = [(lane, [fault for fault in faults if fault.lane == lane]) for lane in BREAKS]
    return [_steps(lane, mine, seed, seconds, scene) for lane, mine in lanes if mine]


def _steps(lane: str, faults: Sequence[Fault], seed: int, seconds: float, scene: Scene) -> list[Step]:
    dice = random.Random(f"{seed}/{lane}")  # noqa: S311 - repeatable is the point
    at, steps = 0.0, list[Step]()
    busy: dict[str, float] = {}  # target -> until when it is hit by another fault
    turn: list[Fault] = []
    weights = [fault.weight for fault in faults]
    while (at := at + dice.uniform(*BREAKS[lane])) < seconds:
        if at % WAVE < CALM:
            at += CALM - at % WAVE
        turn = turn or dice.sample(faults, k=sum(weights), counts=weights)
        fault = turn.pop()
        aim = fault.aim(dice, scene)
        if lane == BROKERS:
            at = max(at, busy.get(lane, 0.0))  # one broker at a time: two of three must be there
            busy[lane] = at + aim.seconds
        elif lane == WORKERS:
            if busy.get(aim.target, 0.0) > at:
                continue
            busy[aim.target] = at + aim.seconds
        steps.append(Step(at, fault, aim))
    return steps


class _Going(NamedTuple):
    """A fault that has been started. ``number``: of its step, so that no two are equal in order."""

    until: float
    number: int
    step: Step
    began: float
    started: object


class Lane(threading.Thread):
    """Carries out the steps of one lane.

    Args:
        steps: in the order of time.
        stage: what they are done to.
        began: when the run began, on the monotonic clock.
        done: called with every fault that is over.
    """

    def __init__(self, steps: Sequence[Step], stage: Stage, began: float, done: Callable[[Done], None]) -> None:
        super().__init__(daemon=True)
        self._steps = steps
        self._stage = stage
        self._began = began
        self._done = done
        self._over = threading.Event()
        self._going: list[_Going] = []  # by when they stop
        self.current: set[str] = set()  # names of the faults that go on at the moment
        self.trouble: str | None = None

    def run(self) -> None:
        """Start and stop every fault in its time."""
        try:
            self._carry_out()
        except Exception as error:
            log.exception("a fault could not be done")
            self.trouble = f"a fault could not be done: {type(error).__name__}: {error}"
            for going in self._going:
                with suppress(Exception):
                    self._undo(going)

    def _carry_out(self) -> None:
        going = self._going
        for number, step in enumerate([*self._steps, None]):
            while going and (step is None or going[0].until <= step.at or self._in_the_way(going, step)):
                self._wait(going[0].until)
                self._undo(heapq.heappop(going))
            if step is None or self._over.is_set():
                continue
            self._wait(step.at)
            if self._over.is_set():
                continue
            began = self._now()
            self.current.add(f"{step.fault.name} {step.aim.target}")
            started = step.fault.start(self._stage, step.aim)
            heapq.heappush(going, _Going(self._now() + step.aim.seconds, number, step, began, started))

    def _in_the_way(self, going: Sequence[_Going], step: Step) -> bool:
        """Whether something must be over before a step, however late it is: two of three brokers must be there."""
        if step.fault.lane == CONNECTIONS:
            return False
        return step.fault.lane == BROKERS or any(other.step.aim.target == step.aim.target for other in going)

    def _undo(self, going: _Going) -> None:
        fault, aim = going.step.fault, going.step.aim
        detail = fault.stop(self._stage, aim, going.started) or ""
        self.current.discard(f"{fault.name} {aim.target}")
        self._done(Done(fault.name, aim.target, going.began, self._now(), detail))

    def _wait(self, until: float) -> None:
        self._over.wait(max(0.0, until - self._now()))

    def _now(self) -> float:
        return time.monotonic() - self._began

    def end(self) -> None:
        """Start nothing more, and stop what goes on."""
        self._over.set()
        self.join()
