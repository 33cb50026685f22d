"""What is run, as data: the races, who takes part in each, and how many messages they get.

Rules.
    * A race is one work with its parameters, on one kind of cluster. Its contestants take turns.
    * A run lasts a second or two. How fast a contestant is expected to be stands in ``EXPECTED``; how fast it was in the rounds
      before counts more. Fast or slow, it handles all of its topic: exactly as many messages as it was told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

OURS = "ours"
STREAMS = "kafka-streams"
FRANZ = "franz-go"
LIMIT_BYTES = 200_000_000  # of a topic: more would take longer to write than to read
STEPS = (1, 2, 5)
# librdkafka fetches 100,000 messages ahead: whoever consumes few of them shows neither its pauses nor its fetches.
BEYOND_THE_QUEUE = 500_000
FAST = 80_000  # messages a second, from which on that matters


@dataclass(frozen=True)
class Entry:
    """A contestant in a race.

    Attributes:
        label: what it is called there.
        contestant: its name; the label's, unless it takes part more than once.
        extra: what its job has besides.
        once: it takes part in the first round only.
    """

    label: str
    contestant: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    once: bool = False

    @property
    def name(self) -> str:
        return self.contestant or self.label


@dataclass(frozen=True)
class Race:
    """One work.

    Attributes:
        section: what ``--only`` chooses by.
        work: of a job.
        brokers: one, or three with replication 3.
        batch: messages of a transaction, or between two commits; None where the contestant's own choice is measured.
        workers: processes that share the partitions; each has its part of them as a topic of its own, so that all work from
            the first message to the last.
        rounds: at most.
    """

    section: str
    work: str
    entries: Sequence[Entry]
    brokers: int = 1
    batch: int | None = None
    size: int = 100
    partitions: int = 8
    workers: int = 1
    rounds: int = 100

    @property
    def name(self) -> str:
        """What targets and reports call it."""
        parts = [
            f"batch {self.batch:,}" if self.work == "exactly-once" else "",
            f"{self.size:,} B" if self.size != Race.size else "",
            f"{self.partitions} partitions" if self.partitions != Race.partitions else "",
            f"{self.workers} workers" if self.workers != 1 else "",
            f"{self.brokers} brokers" if self.brokers != 1 else "",
        ]
        return ", ".join([self.work, *filter(None, parts)])

    @property
    def share(self) -> int:
        """Partitions of a worker."""
        return max(1, self.partitions // self.workers)


@dataclass(frozen=True)
class Expected:
    """Messages a second on one broker; inside transactions, and the seconds that the end of one takes."""

    produce: int = 50_000
    consume: int = 50_000
    transform: int = 20_000
    inside: int = 50_000
    end: float = 0.02


EXPECTED = {
    OURS: Expected(600_000, 1_000_000, 200_000, 250_000, 0.004),
    "confluent_tuned": Expected(700_000, 1_500_000, 250_000, 300_000, 0.004),
    "confluent_default": Expected(300_000, 140_000, 90_000, 90_000, 0.03),
    "aiokafka": Expected(100_000, 300_000, 60_000, 60_000, 0.015),
    "quixstreams": Expected(50_000, 100_000, 50_000, 50_000, 0.01),
    FRANZ: Expected(1_000_000, 2_000_000, 200_000, 250_000, 0.005),
    STREAMS: Expected(50_000, 50_000, 150_000, 130_000, 0.01),
    "kafka-python": Expected(25_000, 60_000, 20_000, 20_000, 0.02),
    "faststream": Expected(25_000, 250_000, 15_000),
    "faust": Expected(8_000, 12_000, 5_000),
}
SLOWER = {1: 1.0, 3: 0.5}  # by brokers
END_OF_THREE = 0.06  # seconds that the markers of a transaction take to be replicated


def expected(race: Race, entry: Entry) -> float:
    """Messages a second, so that the first round takes about as long as it should."""
    known = EXPECTED.get(entry.name, Expected())
    if race.work == "exactly-once":
        batch = race.batch or 1000
        end = known.end + (END_OF_THREE if race.brokers > 1 else 0)
        rate = batch / (end + batch / known.inside)
    else:
        rate = {"produce": known.produce, "consume": known.consume, "transform": known.transform}[race.work]
    return rate * SLOWER[race.brokers] / (1 + race.size / 4000)


def messages(race: Race, rate: float, seconds: float) -> int:
    """How many messages take about so long: a round number, and whole batches for each worker."""
    most = LIMIT_BYTES // (race.size + 20)
    wanted = rate * seconds * race.workers
    if race.work != "produce" and rate > FAST:
        wanted = max(wanted, BEYOND_THE_QUEUE)
    wanted = min(wanted, most)
    unit = (race.batch or 1) * race.workers
    return max(_round(wanted), race.share * race.workers, 5 * unit) // unit * unit


def pace(race: Race, entry: Entry, rates: Sequence[float]) -> float:
    """Messages a second that one worker does: what was seen, else what is expected."""
    return median(rates) / race.workers if rates else expected(race, entry)


def _round(number: float) -> int:
    """1, 2 or 5 and noughts, so that few topics serve all."""
    unit = 1
    while unit * 10 <= number:
        unit *= 10
    return max(step * unit for step in STEPS if step * unit <= max(number, 1))


# -- the plan --------------------------------------------------------------------------------------------------------------

BARE, DEFAULT = "confluent_tuned", "confluent_default"
OWN = (Entry(OURS), Entry(BARE), Entry(DEFAULT))
ONE_IN_FLIGHT = Entry("ours, 1 in flight", OURS, {"transactions_in_flight": 1})
FRANZ_DEFAULTS = Entry("franz-go, its defaults", FRANZ, {"defaults": True})
STREAMS_100 = Entry("kafka-streams, 100 ms", STREAMS, {"commit_interval_ms": 100})
STREAMS_500 = Entry("kafka-streams, 500 ms", STREAMS, {"commit_interval_ms": 500})
BATCHES = (1, 100, 1000, 10_000)
SIZES = (1000, 10_000)
PARTITIONS = (1, 16, 64)  # the main races have 8
WORKERS = (2, 4)
SIDE = 2  # rounds of what only shows how cost grows
ONCE = frozenset({"kafka-python", "faststream", "faust"})  # far behind: one round on one broker says it


def plan(peers: Mapping[str, frozenset[str]]) -> Iterator[Race]:
    """All races.

    Args:
        peers: the works of each.
    """
    for brokers in (1, 3):
        yield from _main(peers, brokers)
    for size in SIZES:
        for work, batch in (("produce", None), ("consume", None), ("transform", 1000), ("exactly-once", 1000)):
            yield Race("sizes", work, OWN, size=size, batch=batch, rounds=SIDE)
    for count in PARTITIONS:
        for work, batch in (("consume", None), ("exactly-once", 1000)):
            yield Race("partitions", work, OWN[:2], partitions=count, batch=batch, rounds=SIDE)
    for count in WORKERS:
        for work, batch in (("transform", 1000), ("exactly-once", 1000)):
            yield Race("workers", work, OWN[:2], workers=count, batch=batch, rounds=SIDE)


def _main(peers: Mapping[str, frozenset[str]], brokers: int) -> Iterator[Race]:
    def who(work: str) -> list[Entry]:
        able = [name for name, works in peers.items() if work in works and name != STREAMS]
        return [Entry(OURS)] + [Entry(name, once=name in ONCE) for name in able if brokers == 1 or name not in ONCE]

    yield Race("produce", "produce", who("produce"), brokers)
    yield Race("consume", "consume", who("consume"), brokers)
    streams = peers.get(STREAMS, frozenset())
    yield Race("transform", "transform", who("transform") + [STREAMS_100] * ("transform" in streams), brokers, batch=1000)
    for batch in BATCHES:
        entries = [*who("exactly-once"), ONE_IN_FLIGHT]
        if "exactly-once" in peers.get(FRANZ, frozenset()):
            entries.append(FRANZ_DEFAULTS)
        if batch == BATCHES[-1] and "exactly-once" in streams:  # it has no batches: this is about its best
            entries += [STREAMS_100, STREAMS_500]
        yield Race("exactly-once", "exactly-once", entries, brokers, batch=batch)
