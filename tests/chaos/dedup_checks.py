"""What the effects of messages with ids must look like when each was sent several times. Pure.

A check returns its complaints, one line each; none means that the law was kept.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from kafka_guarantees.dedup.ids import key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

SHOWN = 10  # complaints of one kind that are listed


class Line(NamedTuple):
    """One line of a history.

    Attributes:
        what: ``effect``; ``taken`` or ``late``, whose name is the digest of an id in hex.
        pid: of the worker.
        at: seconds of the host's monotonic clock.
        name: of the message.
    """

    what: str
    pid: int
    at: float
    name: str


class Outcome(NamedTuple):
    """What is left of a run.

    Attributes:
        sent: how often each message was sent.
        effects: how often each had its effect.
        history: in the order of the file.
        allowed: how many repeats the disturbances explain.
    """

    sent: Mapping[str, int]
    effects: Mapping[str, int]
    history: Sequence[Line]
    allowed: int

    @property
    def repeats(self) -> int:
        """Effects that are one too many."""
        return sum(count - 1 for count in self.effects.values())


def lines(text: str) -> list[Line]:
    """Read a history. A last line without its end was cut by a kill, and is not there."""
    found = (line.split(" ", 3) for line in text.split("\n")[:-1])
    return [Line(what, int(pid), float(at), name) for what, pid, at, name in found]


def lost(outcome: Outcome) -> list[str]:
    """Every message that was sent has its effect."""
    return _shown("lost", (f"{name} x{count}" for name, count in outcome.sent.items() if not outcome.effects.get(name)))


def invented(outcome: Outcome) -> list[str]:
    """Every effect is of a message that was sent."""
    return _shown("invented", outcome.effects.keys() - outcome.sent.keys())


def repeated(outcome: Outcome) -> list[str]:
    """No message has its effect twice."""
    twice = {name: count for name, count in outcome.effects.items() if count > 1}
    return _shown("repeated", (f"{name} x{count}: {_story(outcome, name)}" for name, count in twice.items()))


def unexplained(outcome: Outcome) -> list[str]:
    """A message has its effect again only after a claim that says that an earlier attempt may have had it (D03)."""
    taken = Counter(line.name for line in outcome.history if line.what == "taken")
    surplus = {name: count - 1 - taken[key_of(name).hex()] for name, count in outcome.effects.items() if count > 1}
    return _shown("unexplained", (f"{name}: {_story(outcome, name)}" for name, count in surplus.items() if count > 0))


def too_many(outcome: Outcome) -> list[str]:
    """No more repeats than the batches that were in hand when something happened to their workers (D03)."""
    return [] if outcome.repeats <= outcome.allowed else [f"too many: {outcome.repeats} repeats, {outcome.allowed} explained"]


def idle(outcome: Outcome) -> list[str]:
    """Something was sent, and more than once: else there is nothing to leave out (H10)."""
    return [] if sum(outcome.sent.values()) > 2 * len(outcome.sent) > 0 else [f"idle: {len(outcome.sent)} messages"]


LAWS: dict[str, tuple[Callable[[Outcome], list[str]], ...]] = {
    "store": (lost, invented, unexplained, too_many, idle),  # while it is disturbed
    "inbox": (lost, invented, repeated, idle),
    "calm": (lost, invented, repeated, idle),
}


def complaints(laws: str, outcome: Outcome) -> list[str]:
    """What an outcome has against some laws."""
    return [complaint for law in LAWS[laws] for complaint in law(outcome)]


def _story(outcome: Outcome, name: str) -> str:
    names = {name, key_of(name).hex()}
    return ", ".join(f"{line.what} {line.pid} {line.at:.3f}" for line in outcome.history if line.name in names)


def _shown(kind: str, found: Iterable[str]) -> list[str]:
    listed = [f"{kind}: {text}" for text in found]
    more = len(listed) - SHOWN
    return listed if more <= 0 else [*listed[:SHOWN], f"{kind}: and {more} more"]
