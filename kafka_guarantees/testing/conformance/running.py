"""Several threads or processes that do the same at the same time, and processes that are killed while they do.

All of it ends: whoever is late is an error, and no process is left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")


def in_threads(count: int, work: Callable[[int], T], patience: float) -> list[T]:
    """Call ``work(number)`` in as many threads, started by a barrier, and return what they returned."""
    barrier = threading.Barrier(count)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def one(number: int) -> None:
        try:
            barrier.wait(patience)
            results[number] = work(number)
        except BaseException as exc:  # noqa: BLE001 - raised again in the test's own thread
            errors.append(exc)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(count)]
    until = time.monotonic() + patience
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if errors:
        raise errors[0]
    late = [number for number, thread in enumerate(threads) if thread.is_alive()]
    if late:
        raise AssertionError(f"threads {late} of {count} have not ended within {patience} s: a deadlock?")
    return [results[number] for number in range(count)]


def in_processes(
    suite: object, how: Literal["together", "killed"], work: Callable[..., Any], place: Path, *, count: int, patience: float
) -> None:
    """Call ``work(place, number, ready)`` of a new object of the suite's class in other processes.

    Args:
        suite: what has the method ``work``. Its class must be found by its module and name.
        how: ``"together"``: all at once, each waits in ``ready()`` for the others. ``"killed"``: one after the other, and each
            is killed a few milliseconds after it called ``ready()``.
        work: a method of ``suite``.
        place: given on.
        count: how many.
        patience: seconds for all of them.
    """
    kind = type(suite)
    arguments = [f"{kind.__module__}:{kind.__qualname__}", how, work.__name__, str(place), str(count)]
    child = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", f"{__package__}.child", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with child:
        try:
            _, said = child.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            said = f"{count} processes, {how}, have not ended within {patience} s: a deadlock?"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 0, said  # noqa: S101
