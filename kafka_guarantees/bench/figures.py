"""What was measured. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .plan import Measure


@dataclass(frozen=True)
class Spread:
    """Times of single messages, in milliseconds.

    Attributes:
        count: of what.
        p50, p99, p999: half of them, 99 %, 99.9 % took this long or less.
    """

    count: int
    p50: float
    p99: float
    p999: float


def spread(seconds: Sequence[float]) -> Spread | None:
    """The spread of times in seconds; None where there are none."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return Spread(len(ordered), *(1000 * _percentile(ordered, part) for part in (0.5, 0.99, 0.999)))


def _percentile(ordered: Sequence[float], part: float) -> float:
    """The least value that so many are not above (nearest rank): one that was measured, never one in between."""
    return ordered[max(0, math.ceil(part * len(ordered) - 1e-9) - 1)]


@dataclass(frozen=True)
class Row:
    """One measure.

    Attributes:
        measure: what was done.
        rates: messages per second, in each round.
        first: seconds from the start of a process to its first message, the median of the rounds.
        memory: the most bytes that a process had.
        readable: from a result being produced to its being readable, at full load; None: not measured.
    """

    measure: Measure
    rates: Sequence[float]
    first: float
    memory: int
    readable: Spread | None = None

    @property
    def rate(self) -> float:
        """Messages per second: the median of the rounds."""
        return median(self.rates)

    def megabytes(self, size: int) -> float:
        """Of values, per second."""
        return self.rate * size / 1e6


def row_of(measure: Measure, results: Sequence[Mapping[str, float]], readable: Spread | None) -> Row:
    """What the processes of a measure have said, in one row."""
    return Row(
        measure,
        [result["messages"] / result["seconds"] for result in results],
        median(result["first"] for result in results),
        int(max(result["rss"] for result in results)),
        readable,
    )


@dataclass(frozen=True)
class Latency:
    """From sending a message to reading its copy, at low traffic.

    Attributes:
        guarantee: of whatever copied it.
        there_and_back: the times.
        missing: messages that did not come back, which only at most once may lose.
    """

    guarantee: str
    there_and_back: Spread | None
    missing: int


@dataclass(frozen=True)
class Bench:
    """Everything that was measured, and how.

    Attributes:
        version: of what was measured.
        command: that repeats it.
        began: the date.
        seconds: how long it took.
        size: bytes of a value.
        setting: what it was measured with, by name.
        rows: throughput.
        latencies: by guarantee.
    """

    version: str
    command: str
    began: str
    seconds: float
    size: int
    setting: Mapping[str, str]
    rows: Sequence[Row]
    latencies: Sequence[Latency]

    def price(self, row: Row) -> float | None:
        """The row's throughput as a part of that of the same work at most once."""
        cheapest = [r.rate for r in self.rows if (r.measure.work, r.measure.guarantee) == (row.measure.work, "at-most-once")]
        return row.rate / cheapest[0] if cheapest else None
