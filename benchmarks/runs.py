"""One run of one contestant: its process, its time limit, the line that it prints, and whether the brokers agree."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from typing_extensions import Self

    from .contestants import Contestant
    from .plan import Race
    from .stage import Stage

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 300  # letters of what a process said last


@dataclass(frozen=True)
class Sample:
    """What a run says about itself.

    Attributes:
        messages: that were handled, by all workers.
        seconds: that it took, or the slowest worker.
        transactions: all workers' together; None where there are none, or nobody counts them.
        first: seconds from start to the first message.
        rss: peak of resident bytes, of one process.
    """

    messages: int
    seconds: float
    transactions: int | None
    first: float | None
    rss: int | None
    version: str

    @property
    def rate(self) -> float:
        return self.messages / self.seconds


class RunFailed(Exception):
    """A contestant did not do its job; its argument says why."""


class TookTooLong(RunFailed):
    """It was ended at its limit."""


class Running:
    """The process of a contestant. A context manager, which leaves nothing of it behind."""

    def __init__(self, command: Sequence[str]) -> None:
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in the end
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # so that its children can be ended with it
            )
        except OSError as exc:
            self._said.close()
            raise RunFailed(f"it cannot be started: {exc}") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._said.close()

    def result(self, limit: float) -> dict[str, Any]:
        """Wait for its end, and for the line with its result.

        Raises:
            RunFailed: there is none.
        """
        try:
            out, _ = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise TookTooLong(f"not done after {limit:.0f} s: {self.last_words()}") from None
        if self.process.returncode:
            raise RunFailed(f"exit status {self.process.returncode}: {self.last_words()}")
        for line in reversed(out.splitlines()):
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RunFailed(f"it printed no result: {self.last_words()}")

    def last_words(self) -> str:
        self._said.seek(0)
        lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[-SHOWN:] if lines else "it said nothing"


def run(stage: Stage, race: Race, contestant: Contestant, extra: Mapping[str, Any], *, messages: int, limit: float) -> Sample:
    """Let a contestant do a work once, on fresh topics and with a fresh group.

    Raises:
        RunFailed: it did not, or the brokers have something else than it says.
    """
    share = messages // race.workers
    with stage.fresh(race.partitions) as output:
        jobs = [
            {
                "work": race.work,
                "bootstrap": stage.bootstrap,
                "input": None if race.work == "produce" else stage.filled(share, race.size, race.share, worker),
                "output": None if race.work == "consume" else output,
                "messages": share,
                "size": race.size,
                "batch": race.batch,
                "group": f"bench-{uuid.uuid4().hex[:12]}",
                "transactional_id": f"bench-{uuid.uuid4().hex[:12]}",
                **extra,
            }
            for worker in range(race.workers)
        ]
        sample = _together([contestant.command(job) for job in jobs], limit)
        _check(stage, race, jobs, output, share * race.workers)
        return sample


def _together(commands: Collection[Sequence[str]], limit: float) -> Sample:
    """Run processes side by side; one after the other is waited for, since all are to end."""
    until = time.monotonic() + limit
    with ExitStack() as stack:
        running = [stack.enter_context(Running(command)) for command in commands]
        results = [each.result(max(1.0, until - time.monotonic())) for each in running]
    counted = [result["transactions"] for result in results if result.get("transactions") is not None]
    return Sample(
        messages=sum(result["messages"] for result in results),
        seconds=max(result["seconds"] for result in results),
        transactions=sum(counted) if counted else None,
        first=max((result["first"] for result in results if result.get("first") is not None), default=None),
        rss=max((result["rss"] for result in results if result.get("rss")), default=None),
        version=results[0].get("version", ""),
    )


def _check(stage: Stage, race: Race, jobs: Sequence[Mapping[str, Any]], output: str, messages: int) -> None:
    if race.work != "consume":
        expected = messages + len(jobs) if race.work == "produce" else messages  # produce sends one more, to begin with
        if (found := stage.records(output)) != expected:
            raise RunFailed(f"its output has {found:,} committed records instead of {expected:,}")
    if race.work != "produce":
        committed = sum(stage.committed(job["group"], job["input"]) for job in jobs)
        if committed != messages:
            raise RunFailed(f"its group has committed {committed:,} of {messages:,} messages")
