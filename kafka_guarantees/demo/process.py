"""The worker as its driver sees it: a process that is started, killed, started again, and in the end stopped."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

from kafka_guarantees.testing._process import environment, python

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

    from .offers import Task

COMMAND = python("kafka_guarantees.demo.worker")
STOPPING = 30.0  # seconds that a worker may take to finish what is in hand and leave its group
_LOG_LINES = 15


class WorkerProcess:
    """A context manager: the process is gone at its end, however that is reached.

    Args:
        task: what the worker is told.
        log: the file for what it writes to stderr, over all its lives.
    """

    def __init__(self, task: Task, log: Path) -> None:
        self._task = task
        self._log = log
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own module, without a shell
                [*COMMAND, str(self._task)],
                stdin=subprocess.PIPE,  # its end tells the worker that the driver is gone
                stdout=log,
                stderr=log,
                env=environment(),
            )

    def restart(self) -> int:
        """SIGKILL, and a new life at once. Returns when the old one was over: nanoseconds of the monotonic clock."""
        self._kill()
        over = time.monotonic_ns()
        self._process = self._start()
        return over

    def ended(self) -> str | None:
        """How it ended by itself, with the last lines of its log; None while it runs, as it should."""
        code = self._process.poll()
        return None if code is None else f"the worker ended by itself (exit status {code}): {self.last_words()}"

    def stop(self) -> str | None:
        """SIGTERM, and wait. Returns what was wrong with the way in which it ended."""
        self._process.terminate()
        try:
            code = self._process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            return f"the worker did not stop within {STOPPING:.0f} s: {self.last_words()}"
        return None if code == 0 else f"the worker stopped with exit status {code}: {self.last_words()}"

    def _kill(self) -> None:
        self._process.kill()
        self._process.communicate()  # waits, and closes its stdin

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]) or "it said nothing"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
