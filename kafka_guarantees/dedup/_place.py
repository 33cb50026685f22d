"""Where a file of SQLite is, and where none can be: said as a path that is refused, since the same call would never go well.

And its write-ahead log.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from ..errors import UnsafeConfigError


def place_of(path: str | os.PathLike[str]) -> str:
    """The path from the root on: the file is opened again, after a fork, where a daemon may have another working directory.

    Not ``abspath()``, which takes ``..`` for what stands before it, also where that is a link to another folder.
    """
    name = os.fspath(path)
    return name if name in {"", ":memory:"} else str(Path.cwd() / name)


def file_at(path: str) -> tuple[int, int] | None:
    """Which file is there; None: there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a fifth of the time that Path takes, in every call
    except OSError:
        return None
    return found.st_dev, found.st_ino


def refuse(path: str, error: BaseException | None) -> None:
    """Look at why a file could not be opened, and raise where that does not pass by itself.

    Args:
        path: of the file.
        error: of SQLite.

    Raises:
        UnsafeConfigError: the path is the reason.
    """
    folder = Path(path).parent
    with suppress(OSError):  # of a name that the system cannot look at
        if Path(path).is_dir():
            raise UnsafeConfigError("path", path, "it is a folder", "give the path of a file in it") from error
        if not folder.is_dir():
            raise UnsafeConfigError("path", path, f"there is no folder {folder}", "make it, or give another path") from error
    if str(error) == "file is not a database":
        why, instead = "what is there was not written by SQLite", "give a file that is not there yet"
        raise UnsafeConfigError("path", path, why, instead) from error


def write_ahead(connection: sqlite3.Connection, within: float) -> str:
    """Have the file keep a write-ahead log, also while others open or close it: here SQLite does not wait by itself.

    Args:
        connection: to the file.
        within: seconds to wait.

    Returns:
        The journal that it keeps; not ``wal``, where it can have none.

    Raises:
        sqlite3.OperationalError: it was locked for so long.
    """
    give_up_at = time.monotonic() + within
    while True:
        try:
            [(journal,)] = connection.execute("PRAGMA journal_mode = WAL").fetchall()
        except sqlite3.OperationalError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.005)
        else:
            return str(journal)
