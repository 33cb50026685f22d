"""What comes of a race: rates, ratios, medians and spread. Pure.

A ratio is taken within a round, between two runs that followed each other; of all rounds the median counts, and the smallest
and the largest say how much to believe it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from .plan import OURS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .plan import Race
    from .runs import Sample


class Spread(NamedTuple):
    """Of several numbers the middle, the least and the most."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(numbers: Sequence[float]) -> Spread | None:
        """None of none."""
        return Spread(median(numbers), min(numbers), max(numbers)) if numbers else None


@dataclass
class Column:
    """One contestant of a race, by rounds.

    Attributes:
        samples: of each round; None where it failed, or took no part.
        failures: how often it failed.
        troubles: why, each reason once.
    """

    label: str
    samples: list[Sample | None] = field(default_factory=list)
    failures: int = 0
    troubles: list[str] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)

    def skip(self) -> None:
        self.samples.append(None)

    def fail(self, why: str) -> None:
        self.samples.append(None)
        self.failures += 1
        if why not in self.troubles:
            self.troubles.append(why)

    @property
    def good(self) -> list[Sample]:
        return [sample for sample in self.samples if sample is not None]

    @property
    def rates(self) -> list[float]:
        return [sample.rate for sample in self.good]

    @property
    def transaction_ms(self) -> float | None:
        """Milliseconds for a transaction, handling its messages included."""
        times = [sample.seconds * 1000 / sample.transactions for sample in self.good if sample.transactions]
        return median(times) if times else None

    @property
    def first(self) -> float | None:
        """Seconds from start to the first message."""
        times = [sample.first for sample in self.good if sample.first is not None]
        return median(times) if times else None

    @property
    def rss(self) -> float | None:
        """Bytes."""
        peaks = [sample.rss for sample in self.good if sample.rss is not None]
        return median(peaks) if peaks else None


@dataclass
class Result:
    """A race that was run."""

    race: Race
    columns: dict[str, Column]

    def ratios(self, label: str, ours: str = OURS) -> list[float]:
        """Ours divided by another, in each round that both finished."""
        if label not in self.columns or ours not in self.columns:
            return []
        pairs = zip(self.columns[ours].samples, self.columns[label].samples, strict=True)
        return [mine.rate / theirs.rate for mine, theirs in pairs if mine is not None and theirs is not None]

    def as_json(self) -> dict[str, Any]:
        race = self.race
        return {
            "race": race.name,
            "section": race.section,
            "work": race.work,
            "brokers": race.brokers,
            "batch": race.batch,
            "size": race.size,
            "partitions": race.partitions,
            "workers": race.workers,
            "contestants": [
                {
                    "name": column.label,
                    "version": column.good[0].version if column.good else None,
                    "messages": [sample.messages for sample in column.good],
                    "rates": column.rates,
                    "ratios": self.ratios(column.label),
                    "transaction_ms": column.transaction_ms,
                    "first": column.first,
                    "rss": column.rss,
                    "failures": column.failures,
                    "troubles": column.troubles,
                }
                for column in self.columns.values()
            ],
        }
