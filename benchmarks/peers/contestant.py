"""What every contestant that is written in Python shares: the job it was given, its clock, and its one line of result.

Rules.
    * Imported before the client's library, so that its import counts in ``first``. Imports nothing that takes time itself.
    * The standard library only: contestants run in environments of their own.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter
from typing import Any

BEGAN = perf_counter()
JOB: dict[str, Any] = json.loads(sys.argv[-1])
MESSAGES: int = JOB["messages"]
SIZE: int = JOB.get("size") or 100
BATCH: int = JOB.get("batch") or 1000
KEYS = [b"key-%04d" % i for i in range(500)]


def empty(_message: object) -> None:
    """The handler of the work "consume"."""


def ready() -> None:
    """The partitions are assigned: the driver may send."""
    print("ready", flush=True)


class Clock:
    """When the first message was in hand, and how many were handled since."""

    def __init__(self) -> None:
        self.first: float | None = None  # seconds from BEGAN to the first message
        self.since = BEGAN
        self.handled = 0
        self.transactions = 0

    def start(self) -> None:
        """The first message is in hand (or, producing, the first record was acknowledged). Later calls do nothing."""
        if self.first is None:
            self.since = perf_counter()
            self.first = self.since - BEGAN

    @property
    def left(self) -> int:
        """How many messages are still to be handled."""
        return MESSAGES - self.handled

    def done(self, version: str) -> None:
        """Everything is handled, acknowledged and committed: print the result."""
        seconds = perf_counter() - self.since
        result = {
            "messages": self.handled,
            "seconds": seconds,
            "transactions": self.transactions or None,
            "first": self.first,
            "rss": _peak_rss(),
            "version": version,
        }
        print(json.dumps(result), flush=True)


def _peak_rss() -> int:
    # Not getrusage: its maximum begins with what the parent had when it forked, and survives exec().
    with open("/proc/self/status") as status:  # noqa: PTH123 - pathlib is an import more
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
