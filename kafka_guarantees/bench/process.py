"""The process that is measured, as its driver sees it: it gets a job, says what came of it, and is gone."""

from __future__ import annotations

import json
import subprocess
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kafka_guarantees.testing._process import environment, python

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from typing_extensions import Self

COMMAND = [*python("kafka_guarantees.bench.work"), "-"]
LIMIT = 600.0  # seconds that one job may take
STOPPING = 15.0  # seconds for leaving a group after SIGTERM


class WorkFailed(Exception):
    """A process has not done its job."""


class Process:
    """A context manager: the process is gone at its end, and has left its group if it could.

    Args:
        job: for ``bench.work``. It goes to stdin: its settings may hold a password, which must not be in everybody's ``ps``.
        folder: for what it writes to stderr.
    """

    def __init__(self, job: Mapping[str, Any], folder: Path) -> None:
        self._job = job
        self._log = folder / "work.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, without a shell
                COMMAND,
                stdin=subprocess.PIPE,  # its end tells it that nobody is there any more
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the driver, who ends it
                env=environment(),
            )
        self._late = threading.Timer(LIMIT, self._process.kill)
        self._late.daemon = True

    def __enter__(self) -> Self:
        self._late.start()
        with suppress(OSError):  # it has ended already: its result will be missed
            assert self._process.stdin is not None  # noqa: S101 - for the type checker
            self._process.stdin.write(json.dumps(self._job) + "\n")
            self._process.stdin.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._late.cancel()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOPPING)
        self._process.kill()
        self._process.communicate()

    def ready(self) -> None:
        """Wait until it says that it is.

        Raises:
            WorkFailed: it ended instead.
        """
        self._line()

    def result(self) -> dict[str, Any]:
        """Wait for the result.

        Raises:
            WorkFailed: it ended without one.
        """
        return dict(json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        line = self._process.stdout.readline()
        if not line:
            raise WorkFailed(f"{self._job['work']}, {self._job['guarantee']}: {self._last_words()}")
        return line

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else f"it ended without a word, or took more than {LIMIT:.0f} s"
