"""The effect log: what a handler did, in a file that survives the SIGKILL of its process.

A line is one ``write()`` to a file opened with O_APPEND, and synced before the handler goes on. All lines have the same
length, a divisor of the size of a page: a kill can cut a write in two where a page ends, and there a line ends too.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

LINE = 64  # bytes
_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class EffectLog:
    """The end that a worker writes to: ``append()`` returns when the line is on disk."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def append(self, offer: str) -> None:
        """Note that the handling of this offer begins now."""
        at = time.monotonic_ns()  # one clock for all processes of a machine
        os.write(self._file, f"{offer} {at}".encode().ljust(LINE - 1) + b"\n")
        _sync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def effects_in(text: str) -> list[tuple[str, int]]:
    """The log as data: offer and time (nanoseconds of the monotonic clock), in the order in which they were written.

    Raises:
        ValueError: a line is not what a worker writes. Nothing is guessed: a count must not rest on it.
    """
    lines = text.splitlines(keepends=True)
    if any(len(line) != LINE or not line.endswith("\n") for line in lines):
        raise ValueError("the effect log has a line that no worker wrote")
    return [(offer, int(at)) for offer, at in map(str.split, lines)]
