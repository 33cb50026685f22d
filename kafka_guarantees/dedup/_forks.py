"""Files of SQLite and forks: the connections are closed before one, and opened again by the next call on either side (D14).

With one that lies around in a child SQLite believes that the child has the locks of its parent, and what another connection
there commits goes with the parent's write-ahead log (seen with SQLite 3.40). A fork waits for the calls of other threads:
closed under a statement of theirs a connection takes the whole process along. So it does under one of the thread that forks,
which may be a signal handler in the middle of a call: what is in use there stays open.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress
from typing import Protocol


class InUse:
    """The lock of a connection. Who has it may be interrupted by a signal handler that forks, and then finds it in use."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0

    @property
    def twice(self) -> bool:
        """Whether the thread that has it had it before."""
        return self._depth > 1

    def acquire(self, timeout: float = -1) -> bool:
        """Take it, within ``timeout`` seconds. False: another thread has it."""
        if not self._lock.acquire(timeout=timeout):
            return False
        self._depth += 1
        return True

    def release(self) -> None:
        """Give it back."""
        self._depth -= 1
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_error: object) -> None:
        self.release()


class Holder(Protocol):
    """Has a connection, and uses it while it has its own lock."""

    @property
    def _lock(self) -> InUse: ...

    def _let_go(self) -> None:
        """Close the connection. Called with the lock."""


_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_forking = threading.RLock()
_held: list[list[Holder]] = []  # of each fork, one of which may come in the middle of another


def let_go_before_forks(holder: Holder) -> None:
    """From now on. Called before it opens its first connection, which it does with its lock."""
    with _forking:
        _holders.add(holder)


def _before_fork() -> None:
    _forking.acquire()
    held: list[Holder] = []
    _held.append(held)
    for holder in list(_holders):
        holder._lock.acquire()
        held.append(holder)
        if not holder._lock.twice:
            with suppress(Exception):  # one that cannot be closed is no reason to leave the others open
                holder._let_go()


def _after_fork() -> None:
    for holder in _held.pop():
        holder._lock.release()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
