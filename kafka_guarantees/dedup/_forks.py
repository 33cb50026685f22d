"""Files of SQLite and forks: the connections are closed before one, and opened again by the next call on either side (D14).

With one that lies around in a child SQLite believes that the child has the locks of its parent, and what another connection
there commits goes with the parent's write-ahead log (seen with SQLite 3.40). A fork waits for the calls of other threads:
closed under a statement of theirs a connection takes the whole process along.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _thread import RLock


class Holder(Protocol):
    """Has a connection, and uses it while it has its own lock."""

    @property
    def _lock(self) -> threading.Lock | RLock: ...

    def _let_go(self) -> None:
        """Close the connection. Called with the lock."""


_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_forking = threading.Lock()
_held: list[Holder] = []


def let_go_before_forks(holder: Holder) -> None:
    """From now on. Called before it opens its first connection, which it does with its lock."""
    with _forking:
        _holders.add(holder)


def _before_fork() -> None:
    _forking.acquire()
    for holder in list(_holders):
        holder._lock.acquire()
        _held.append(holder)
        holder._let_go()


def _after_fork() -> None:
    while _held:
        _held.pop()._lock.release()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
