"""The other processes of a conformance suite: ``python -m ...child module:Class together|killed method place count``.

This process imports the suite and opens nothing. Each worker is forked from it, so that twenty of them start in a second.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_LIFE = 0.05  # seconds: some ten calls, so that a kill falls between calls and into them


class Start(NamedTuple):
    """A pipe whose end of file is the start. One for all: a worker would keep those of the earlier ones from their start."""

    wait: int
    go: int

    def give(self) -> None:
        os.close(self.go)
        os.close(self.wait)


class Worker:
    """A forked process that has called ``ready()`` and waits to be let go."""

    def __init__(self, work: Callable[[Path, int, Callable[[], None]], object], place: Path, number: int, start: Start) -> None:
        told, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(told)
            os.close(start.go)
            _live(work, place, number, tell, start.wait)
        os.close(tell)
        is_ready = os.read(told, 1)
        os.close(told)
        if not is_ready:
            self.end()
            raise SystemExit(f"worker {number} ended before it was ready")

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _live(work: Callable[..., object], place: Path, number: int, tell: int, wait: int) -> None:
    def ready() -> None:
        os.write(tell, b".")
        os.read(wait, 1)

    try:
        work(place, number, ready)
    except BaseException:  # noqa: BLE001 - printed, and the exit code says so
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def together(work: Callable[..., object], place: Path, count: int) -> None:
    start = Start(*os.pipe())
    workers = [Worker(work, place, number, start) for number in range(count)]
    start.give()
    codes = [worker.end() for worker in workers]
    if any(codes):
        raise SystemExit(f"exit codes: {codes}")


def killed(work: Callable[..., object], place: Path, count: int) -> None:
    moments = random.Random(count)  # noqa: S311
    for number in range(count):
        start = Start(*os.pipe())
        worker = Worker(work, place, number, start)
        start.give()
        time.sleep(moments.uniform(0, LONGEST_LIFE))
        os.kill(worker.pid, signal.SIGKILL)
        if worker.end() != -signal.SIGKILL:
            raise SystemExit(f"life {number} ended before it was killed")


def main(suite: str, how: str, method: str, place: str, count: str) -> None:
    module, _, name = suite.partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    {"together": together, "killed": killed}[how](getattr(found(), method), Path(place), int(count))


if __name__ == "__main__":
    main(*sys.argv[1:])
