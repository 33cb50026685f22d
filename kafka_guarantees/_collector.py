"""Python's garbage collector rests while the objects of a batch are made: none of them is garbage.

It looks for cycles whenever 700 more objects were made than freed. A batch of thousands makes it look again and again, in the
end through all that the process has: that took as long as all the rest of consuming messages with headers. CPython 3.12 and
later do not collect inside of a call into C, which is most of this.

Rules.
* It rests for a call, never while a handler works: what that leaves behind must be found.
* Where the user has turned it off, it is left so.
* A fork in another thread may come meanwhile: in the child it works again.
"""

from __future__ import annotations

import gc
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


class _Rest:
    """``with collector_rests:``. In several threads at a time, the first that is through ends it, which costs time only."""

    __slots__ = ("_lock", "_ours")

    def __init__(self) -> None:
        self._ours = False  # it was we who turned it off
        self._lock = threading.RLock()  # a thread that looks must not see half of what another one does

    def __enter__(self) -> None:
        with self._lock:
            if gc.isenabled():
                self._ours = True  # first: after an interrupt in between, the next one turns it on
                gc.disable()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            if self._ours:
                gc.enable()
                self._ours = False

    def forked(self) -> None:
        """In a child: the threads of its parent are not there."""
        self._lock = threading.RLock()
        self.__exit__(None, None, None)


collector_rests = _Rest()

os.register_at_fork(after_in_child=collector_rests.forked)
