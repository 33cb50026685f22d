"""Histories: files in which workers note what they do, so that it survives whatever is done to them (H06).

* One event is one line of JSON, written by one ``write`` to a file opened with O_APPEND.
* A process that is killed in a write may leave the beginning of a line: whoever opens the file next cuts it off, and a reader
  skips it. What it was to tell is unknown then, as if the process had been killed a moment before.
"""

from __future__ import annotations

import json
import os
import time
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from .evidence import Event

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from typing_extensions import Self

SYNC_EVERY = 50_000_000  # ns between two fdatasync: they take longer than everything else here
_CHUNK = 4096


class History:
    """The history of one process of a worker, to append to. One process at a time has the file.

    An exception out of a signal handler may hit any of its methods: a line is then there or not, and always whole.

    Args:
        path: of the file; made if it is not there.
        who: the worker.
        life: counted from 1.
    """

    def __init__(self, path: Path | str, who: str, life: int) -> None:
        self._who, self._life = who, life
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._synced = 0
        _cut_torn_line(self._file)

    def note(self, what: str, type: str, **fields: str | int | None) -> None:  # noqa: A002 - as in Event
        """Append an event. Fields that are None are left out.

        Raises:
            OSError: it could not be written: the disk is full.
        """
        now = time.monotonic_ns()
        event = {"at": now, "who": self._who, "life": self._life, "what": what, "type": type}
        event.update((name, value) for name, value in fields.items() if value is not None)
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError(f"a line of the history was not written as a whole: {line!r}")
        if now - self._synced >= SYNC_EVERY:
            self._synced = now
            os.fdatasync(self._file)

    def close(self) -> None:
        """Sync, and let the file go."""
        file, self._file = self._file, -1
        if file >= 0:
            os.fdatasync(file)
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def read(paths: Iterable[Path | str]) -> list[Event]:
    """All events of some files, in the order of time; those of one file that have the same time stay in their order.

    Raises:
        ValueError: a line is not an event.
    """
    events = [event for path in paths for event in _events(Path(path))]
    events.sort(key=attrgetter("at"))
    return events


def _events(path: Path) -> Iterable[Event]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return  # the last one, cut by a kill
            try:
                yield Event(**json.loads(line))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number} is not an event: {line!r}") from error


def _cut_torn_line(file: int) -> None:
    """Let a file end with the end of a line."""
    size = end = os.fstat(file).st_size
    while end:
        start = max(0, end - _CHUNK)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        end = start + newline + 1
        if newline >= 0:
            break
    if end < size:
        os.ftruncate(file, end)
