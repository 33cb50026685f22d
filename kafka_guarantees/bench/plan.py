"""What is measured, and how much is written for it. Data, and pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

AT_MOST_ONCE, AT_LEAST_ONCE, EXACTLY_ONCE = GUARANTEES = ("at-most-once", "at-least-once", "exactly-once")
ROUNDS = 3  # how often each throughput is measured; all take turns, so that what disturbs them disturbs all
TRANSACTIONS = 50  # of a measure whose batches are given: on a cluster that replicates each takes 60 ms
RATE = 100  # messages per second, where latency is measured
WARM = 50  # messages at that pace that do not count
BATCHES = (1, 100, 1000, 10_000)
DEPTHS = (1, 3)  # transactions in flight


@dataclass(frozen=True)
class Measure:
    """One work under one guarantee.

    Attributes:
        work: as ``bench.work`` knows it.
        guarantee: by its name.
        batch: the most messages of a transaction; None: what the class does by itself.
        in_flight: transactions in flight; None: what the class does by itself.
    """

    work: str
    guarantee: str
    batch: int | None = None
    in_flight: int | None = None

    def messages(self, most: int) -> int:
        """How many messages it takes, where others take ``most``."""
        return most if self.batch is None else min(most, self.batch * TRANSACTIONS * (self.in_flight or 1))

    def __str__(self) -> str:
        batch = f", {self.batch:,} a transaction" if self.batch else ""
        in_flight = f", {self.in_flight} in flight" if self.in_flight else ""
        return f"{self.work}, {self.guarantee}{batch}{in_flight}"


MEASURES: Sequence[Measure] = (
    Measure("produce", AT_MOST_ONCE),
    Measure("produce", AT_LEAST_ONCE),
    Measure("produce", EXACTLY_ONCE, 1000),
    *(Measure("consume", guarantee) for guarantee in GUARANTEES),
    Measure("transform", AT_MOST_ONCE),
    Measure("transform", AT_LEAST_ONCE),
    *(Measure("transform", EXACTLY_ONCE, batch, depth) for depth in DEPTHS for batch in BATCHES),
)
TRANSFORMS = [measure for measure in MEASURES if measure.work == "transform"]


@dataclass(frozen=True)
class Plan:
    """How much of it.

    Attributes:
        messages: of each measure, at most.
        size: bytes of a value.
        seconds: for how long latency is measured, for each guarantee.
        partitions: of each topic.
        replication: of each topic; None: three, or as many as there are brokers.
    """

    messages: int
    size: int
    seconds: int
    partitions: int
    replication: int | None

    @property
    def echoes(self) -> int:
        """Messages whose latency counts, for each guarantee."""
        return RATE * self.seconds

    @property
    def records(self) -> int:
        """How many records are written to the cluster, in all."""
        return sum(self._records())

    def _records(self) -> Iterator[int]:
        yield self.messages + 1  # what is consumed; one record first connects
        for measure in MEASURES:
            if measure.work != "consume":
                yield ROUNDS * measure.messages(self.messages)
        yield from (measure.messages(self.messages) for measure in TRANSFORMS)  # once more, watched
        yield 2 * len(GUARANTEES) * (1 + WARM + self.echoes)
