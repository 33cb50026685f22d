"""The workers as their driver sees them: processes that are started, hurt, started again, and in the end told to stop."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from kafka_guarantees.testing._process import environment, python

from .life import CRASHED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from .life import Job

COMMAND = python("kafka_guarantees.prove.worker", "-X", "faulthandler")
_LOG_LINES = 12
_TRACEBACKS = 80  # lines, of all threads of a worker
_LAST_WORDS_WITHIN = 5.0  # seconds


class Crew:
    """All workers of a run, by name. A context manager: no process is left at its end.

    Safe to use from several threads, which hurt different workers.

    Args:
        jobs: what each is to do; ``life`` and the seed are counted on.
        folder: for what they write to stderr.
        command: that runs a worker. Its job comes on its stdin.
        within: seconds that a worker may take to finish what is in hand and leave its group.
    """

    def __init__(self, jobs: Sequence[Job], folder: Path, command: Sequence[str], within: float = 45.0) -> None:
        self._within = within
        self._jobs = {job.who: job for job in jobs}
        self._folder = folder
        self._command = command
        self._lock = threading.RLock()
        self._closed = False
        # a worker dies with the thread that started it (PR_SET_PDEATHSIG): this one lasts as long as the crew
        self._spawner = ThreadPoolExecutor(1, "spawner")
        self._workers: dict[str, subprocess.Popen[str]] = {}
        self._leaving: list[subprocess.Popen[str]] = []
        self._paused: set[str] = set()
        self._for_all: list[Mapping[str, object]] = []  # said to everybody: later lives are told, too
        self.ended: Counter[str] = Counter()  # how lives ended that nobody ended
        self.troubles: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True  # a fault that is not over yet starts nobody any more
            for worker in [*self._workers.values(), *self._leaving]:
                worker.kill()
                worker.communicate()
        self._spawner.shutdown()

    @property
    def lives(self) -> int:
        """How many processes there were."""
        return sum(job.life for job in self._jobs.values())

    def start(self, who: str) -> None:
        """Begin a new life, if the worker has none.

        The process inherits that this one ignores SIGUSR1: a life that has not got as far as its own handler must not end
        by a signal of the storm.
        """
        with self._lock:
            if who in self._workers or self._closed:
                return
            job = self._jobs[who]
            job = replace(job, life=job.life + 1, seed=f"{job.seed.partition('/')[0]}/{who}/{job.life + 1}")
            self._jobs[who] = job
            worker = self._workers[who] = self._spawner.submit(self._spawn, who).result()
            self._say(worker, str(job))  # not on the command line: its settings may hold a password
            for order in self._for_all:
                self._say(worker, json.dumps(order))

    def _spawn(self, who: str) -> subprocess.Popen[str]:
        with (self._folder / f"{who}.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own module, without a shell
                self._command,
                stdin=subprocess.PIPE,  # its end tells the worker that nobody is there any more
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the driver, who ends everybody
                env=environment(),
            )

    def tend(self) -> None:
        """Begin a new life for everybody whose life has ended by itself."""
        with self._lock:
            for who, worker in list(self._workers.items()):
                code = worker.poll()
                if code is not None:
                    self._forget(who)
                    self._note(who, code)
                    self.start(who)

    def _note(self, who: str, code: int) -> None:
        if code == CRASHED:
            self.ended["ended by an error"] += 1  # which one is in the history
        else:
            self.troubles.append(
                f"{who} ended by itself, with exit status {code} and no fault to explain it: {self.last_words(who)}"
            )

    @property
    def everybody(self) -> list[str]:
        """The names of all, whether they are there at the moment or not."""
        return list(self._jobs)

    # -- hurting ------------------------------------------------------------------------------------------------------

    def kill(self, who: str) -> None:
        """SIGKILL; returns when it is gone."""
        with self._lock:
            worker = self._workers.get(who)
            if worker is not None:
                worker.kill()
                self._forget(who)

    def pause(self, who: str) -> None:
        """SIGSTOP."""
        with self._lock:
            self._send(who, signal.SIGSTOP)
            self._paused.add(who)

    def resume(self, who: str) -> None:
        """SIGCONT."""
        with self._lock:
            self._paused.discard(who)
            self._send(who, signal.SIGCONT)

    def interrupt(self, who: str) -> None:
        """SIGUSR1: an exception, wherever it is."""
        with self._lock:
            self._send(who, signal.SIGUSR1)

    def tell_all(self, order: Mapping[str, object]) -> None:
        """Say something to everybody, also to lives that begin later."""
        self._for_all.append(order)
        for who in list(self._workers):
            self.tell(who, order)

    def tell(self, who: str, order: Mapping[str, object]) -> None:
        """Say something on its stdin."""
        with self._lock:
            worker = self._workers.get(who)
            if worker is not None:
                self._say(worker, json.dumps(order))

    @staticmethod
    def _say(worker: subprocess.Popen[str], line: str) -> None:
        with suppress(OSError):  # it is gone already
            if worker.stdin is not None:
                worker.stdin.write(line + "\n")
                worker.stdin.flush()

    def stop(self, who: str, within: float | None = None) -> None:
        """SIGTERM, and wait until it has left its group. One that does not end is a trouble."""
        within = self._within if within is None else within
        with self._lock:
            worker = self._workers.pop(who, None)
            if worker is None:
                return
            self._leaving.append(worker)
            if who in self._paused:
                self._paused.discard(who)
                worker.send_signal(signal.SIGCONT)
            worker.terminate()
        try:
            code = worker.wait(within)
        except subprocess.TimeoutExpired:
            worker.send_signal(signal.SIGABRT)  # faulthandler writes where each of its threads is, and it ends
            with suppress(subprocess.TimeoutExpired):
                worker.wait(_LAST_WORDS_WITHIN)
            worker.kill()
            self.troubles.append(f"{who} did not end within {within:.0f} s of SIGTERM: {self.last_words(who, _TRACEBACKS)}")
        else:
            if code not in (0, -signal.SIGTERM):  # that comes before it has begun
                self._note(who, code)
        worker.communicate()
        with self._lock:
            self._leaving.remove(worker)

    def resume_all(self) -> None:
        """SIGCONT to everybody who is paused, and a life to everybody who has none."""
        with self._lock:
            for who in list(self._paused):
                self.resume(who)
            for who in self._jobs:
                self.start(who)

    def dismiss(self, role: str) -> None:
        """Tell all of a role to stop, together."""
        names = [who for who in self._workers if self._jobs[who].role == role]
        threads = [threading.Thread(target=self.stop, args=(who,)) for who in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def last_words(self, who: str, count: int = _LOG_LINES) -> str:
        """The end of what it wrote, in lines."""
        path = self._folder / f"{who}.log"
        lines = path.read_text(errors="replace").splitlines()[-count:] if path.exists() else []
        return "\n".join(lines) or "it said nothing"

    def _send(self, who: str, number: int) -> None:
        worker = self._workers.get(who)
        if worker is not None:
            worker.send_signal(number)  # does nothing once it has ended

    def _forget(self, who: str) -> None:
        self._workers.pop(who).communicate()
        self._paused.discard(who)
