"""One guarantee on stage: offers are sent, its worker is killed at random moments, and what happened becomes a History."""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kafka_guarantees.testing.local_kafka import RunningKafka

from .check import History
from .effects import effects_in
from .offers import INBOX, Task
from .process import WorkerProcess
from .sender import SENDERS, Stream
from .topics import PARTITIONS, Group, delete_topics, ends, follow, read_back

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from confluent_kafka import Message
    from typing_extensions import Self

    from .offers import Flow
    from .screen import Screen

TICK = 0.01  # seconds between two looks at everything
PATIENCE = 30.0  # seconds without a handling, after which nothing is waited for any more
LIMIT = 180.0  # seconds for a whole stage: a worker that handles the same for ever does not get on either
AFTERGLOW = 1.0  # seconds of sending after the last kill: the worker must be seen to go on
BACKLOG, LIFE = 0.15, 2.0  # seconds: the longest life of a worker that dies in its backlog, and of any other


@dataclass(frozen=True)
class Plan:
    """How a demo is run: where, how much, by which dice, and where its files and its words go."""

    bootstrap: str
    kills: int
    rate: int
    dice: random.Random
    folder: Path
    screen: Screen


def run_stage(flow: Flow, plan: Plan, config: dict[str, str | int]) -> History:
    """Run one flow under kills, on topics of its own, and return what happened."""
    suffix = uuid.uuid4().hex[:8]
    flow = replace(flow, reads=f"{flow.reads}-{suffix}", writes=f"{flow.writes}-{suffix}")
    kafka = RunningKafka(plan.bootstrap)
    for topic in (flow.reads, flow.writes):
        kafka.create_topic(topic, PARTITIONS)
    try:
        with _Stage(flow, plan, config) as stage:
            return stage.run()
    finally:
        delete_topics(plan.bootstrap, [flow.reads, flow.writes])


class _Stage:
    """Everybody who takes part, and what has gone wrong: after the first trouble nothing is waited for any more."""

    def __init__(self, flow: Flow, plan: Plan, config: dict[str, str | int]) -> None:
        self._flow, self._plan = flow, plan
        self._effects = plan.folder / f"{flow.name}.effects"
        self._database = plan.folder / f"{flow.name}.db"
        self._effects.touch()
        self._troubles: list[str] = []
        self._killed: list[int] = []
        self._limit = time.monotonic() + LIMIT
        self._visible: dict[str, int] = {}
        with ExitStack() as stack:
            task = Task(flow.guarantee, config, flow.reads, flow.writes, str(self._effects), str(self._database))
            self._worker = stack.enter_context(WorkerProcess(task, plan.folder / f"{flow.name}.log"))
            self._group = stack.enter_context(closing(Group(plan.bootstrap, str(config["group.id"]), flow.reads)))
            self._sender = stack.enter_context(closing(SENDERS[flow.guarantee](plan.bootstrap, flow.reads)))
            stack.enter_context(self._audience())
            self._stack = stack.pop_all()
        self._stream = Stream(self._sender, plan.rate)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> History:
        # a start that is not decided yet would count what was sent before it as lost
        self._until(self._group.started, "the worker has joined its group")
        began = time.monotonic()
        self._send_and_kill()
        acknowledged = self._sender.acknowledged()
        inputs = self._read_back(self._flow.reads, "inputs")
        self._until(lambda: self._group.reached(ends(inputs)), "the worker has committed all that was sent")
        seconds = time.monotonic() - began
        self._note(self._worker.stop())
        outputs = self._booked() if self._flow.guarantee == INBOX else self._outputs()
        return History(
            guarantee=self._flow.guarantee,
            tried=self._stream.tried,
            acknowledged=acknowledged,
            inputs=[_text(message.key()) for message in inputs],
            handled=effects_in(self._effects.read_text()),
            outputs=outputs,
            visible=dict(self._visible),
            killed=tuple(self._killed),
            seconds=seconds,
            troubles=tuple(self._troubles),
        )

    def _outputs(self) -> list[tuple[str, str]]:
        return [(_text(message.key()), _text(message.value())) for message in self._read_back(self._flow.writes, "outputs")]

    def _booked(self) -> list[tuple[str, str]]:
        """What is in the database of an inbox, and not what its handler says: that may have been rolled back."""
        with closing(sqlite3.connect(self._database)) as database:
            try:
                return database.execute("SELECT offer, code FROM booked").fetchall()
            except sqlite3.OperationalError:
                return []  # the worker did not come as far as to make the table

    def _read_back(self, topic: str, name: str) -> list[Message]:
        """A topic to its end, with a copy for whoever has to find out why a guarantee was broken."""
        found = read_back(self._plan.bootstrap, topic)
        lines = (f"{message.partition()} {message.offset()} {_text(message.key())}\n" for message in found)
        (self._plan.folder / f"{self._flow.name}.{name}").write_text("".join(lines))
        return found

    def _send_and_kill(self) -> None:
        """Send at the planned rate, and kill the worker, until it was killed often enough and goes on after it."""
        while len(self._killed) < self._plan.kills and self._goes_on(self._moment()):
            self._killed.append(self._worker.restart())
        self._goes_on(AFTERGLOW)

    def _moment(self) -> float:
        """Seconds from the first handling in a life to its end. Half of the lives end in the backlog that they begin with."""
        dice = self._plan.dice
        return dice.uniform(0, dice.choice((BACKLOG, LIFE)))

    def _goes_on(self, seconds: float) -> bool:
        """Send until the worker has handled something, and for some seconds more. False: it does not go on."""
        before = self._effects.stat().st_size
        self._until(lambda: self._effects.stat().st_size > before, "the worker handles something", self._stream.tick)
        end = time.monotonic() + seconds
        return self._until(lambda: time.monotonic() >= end, "the next kill is due", self._stream.tick)

    def _until(self, happened: Callable[[], bool], what: str, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Wait, showing how far it is, while the worker handles something. False: there is trouble, of before or now."""
        size, end = -1, 0.0
        while not self._troubles and not happened():
            meanwhile()
            self._plan.screen.progress(self._progress)
            self._note(self._worker.ended())
            if self._effects.stat().st_size != size:  # a machine that is busy with other things is slow, and no trouble
                size, end = self._effects.stat().st_size, min(time.monotonic() + PATIENCE, self._limit)
            if time.monotonic() > end:
                self._note(f"waited in vain until {what}; {self._worker.last_words()}")
            time.sleep(TICK)
        return not self._troubles

    def _note(self, trouble: str | None) -> None:
        if trouble is not None and not self._troubles:
            self._troubles.append(trouble)

    def _progress(self) -> str:
        handled = self._effects.read_bytes().count(b"\n")
        return (
            f"{self._flow.guarantee:<26}  {len(self._stream.tried):>5} sent  {handled:>5} handled  "
            f"{len(self._killed)} of {self._plan.kills} kills"
        )

    @contextmanager
    def _audience(self) -> Iterator[None]:
        """Somebody who reads the outputs all the while, and notes when each becomes visible."""
        over = threading.Event()

        def watch() -> None:
            for message in follow(self._plan.bootstrap, self._flow.writes, over.is_set):
                self._visible.setdefault(_text(message.key()), time.monotonic_ns())

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            try:
                yield
            finally:
                over.set()
        watching.result()


def _text(data: bytes | str | None) -> str:
    return data.decode() if isinstance(data, bytes) else data or ""
