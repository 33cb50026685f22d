"""Python's garbage collector rests while the objects of a batch are made: none of them is garbage.

It looks for cycles whenever 700 more objects were made than freed. A batch of thousands makes it look again and again, in the
end through all that the process has: that took as long as all the rest of consuming messages with headers. CPython 3.12 and
later do not collect inside of a call into C, which is most of this.

Rules.
* It rests for calls that take milliseconds, unless a rebalance comes in one, never while a handler of the same client works.
* It rests by a threshold that is not reached, and that tells ours from one that the user sets meanwhile: his stays. So it is
  never off: after ``REST`` objects it looks, whatever went wrong. Whether it is enabled is the user's business alone.
* Threads need no lock: the first that is through ends the rest of all.
* The end of a run sees to it that it works: an interrupt may have come at the edge of a rest.
* A fork in another thread may come meanwhile: in the child it works as before.
"""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

REST = 1_000_003  # objects


class _Rest:
    """``with collector_rests:``."""

    __slots__ = ("_before",)

    def __init__(self) -> None:
        self._before = gc.get_threshold()[0]

    def __enter__(self) -> None:
        now = gc.get_threshold()
        if 0 < now[0] < REST:  # 0: never
            self._before = now[0]
            gc.set_threshold(REST, *now[1:])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over()

    def over(self) -> None:
        """Let it work as before."""
        if gc.get_threshold()[0] == REST:
            gc.set_threshold(self._before, *gc.get_threshold()[1:])


collector_rests = _Rest()

os.register_at_fork(after_in_child=collector_rests.over)
