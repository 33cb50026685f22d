"""What ours is to reach, as data: ratios to others in the same race, and what it may add to a message's way. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from .plan import FRANZ, OURS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .latency import Ways
    from .results import Result

TUNED, DEFAULT, AIO, STREAMS = "confluent_tuned", "confluent_default", "aiokafka", "kafka-streams"
GUARANTEES = ("at-most-once", "at-least-once", "exactly-once")
ADDED_MS = 0.2


@dataclass(frozen=True)
class Target:
    """A ratio, ours to the fastest of those whose label begins with ``peer``."""

    race: str
    peer: str
    least: float


TARGETS = (
    Target("consume", TUNED, 0.8),
    Target("consume", DEFAULT, 8),
    Target("consume", AIO, 2.5),
    Target("produce", TUNED, 0.85),
    Target("produce", AIO, 3),
    Target("transform", DEFAULT, 2),
    Target("transform", AIO, 3),
    Target("transform", STREAMS, 1),
    Target("exactly-once, batch 1", DEFAULT, 15),
    Target("exactly-once, batch 100", DEFAULT, 5),
    Target("exactly-once, batch 1,000", DEFAULT, 3),
    *(Target(f"exactly-once, batch {batch:,}", FRANZ, 2.5) for batch in (1, 100, 1000, 10_000)),
    Target("exactly-once, batch 10,000", STREAMS, 2),
    *(Target(f"exactly-once, batch {batch:,}, 3 brokers", peer, 5) for batch in (100, 1000) for peer in (DEFAULT, FRANZ)),
    Target("exactly-once, batch 10,000, 3 brokers", f"{STREAMS}, 100 ms", 2),
)


@dataclass(frozen=True)
class Verdict:
    """A target, and what was found.

    Attributes:
        value: the median; None where nothing was found.
        spread: the least and the most of the rounds.
        met: None where nothing was found.
    """

    what: str
    limit: str
    value: float | None
    spread: tuple[float, float] | None
    met: bool | None

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "limit": self.limit, "value": self.value, "spread": self.spread, "met": self.met}


def verdicts(results: Sequence[Result], ways: Sequence[Ways]) -> list[Verdict]:
    """Every target of a race that was run, and of the latencies that were measured."""
    races = {result.race.name: result for result in results}
    found = [_verdict(target, races[target.race]) for target in TARGETS if target.race in races]
    return found + _added(ways)


def _verdict(target: Target, result: Result) -> Verdict:
    ratios = [ratios for label in result.columns if label.startswith(target.peer) if (ratios := result.ratios(label))]
    what, limit = f"{target.race}: ours / {target.peer}", f">= {target.least:g}"
    if not ratios:
        return Verdict(what, limit, None, None, None)
    hardest = min(ratios, key=median)
    value = median(hardest)
    return Verdict(what, limit, value, (min(hardest), max(hardest)), value >= target.least)


def _added(ways: Sequence[Ways]) -> list[Verdict]:
    """What ours adds to the way of a message, at the median, on one broker."""
    by: Mapping[tuple[str, str], Ways] = {(way.guarantee, way.label): way for way in ways if way.brokers == 1}
    found = []
    for guarantee in GUARANTEES:
        ours, bare = by.get((guarantee, OURS)), by.get((guarantee, TUNED))
        if ours is None or bare is None:
            continue
        what, limit = f"latency, {guarantee}: ours - {TUNED} at p50, ms", f"<= {ADDED_MS:g}"
        pairs = [mine - theirs for mine, theirs in zip(ours.medians, bare.medians, strict=False)]
        if not pairs:
            found.append(Verdict(what, limit, None, None, None))
            continue
        value = median(pairs)
        found.append(Verdict(what, limit, value, (min(pairs), max(pairs)), value <= ADDED_MS))
    return found
