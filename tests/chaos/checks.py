"""What a history and the topics must look like under each guarantee. Pure: files and topics come in as plain data.

A check returns its complaints, one line each; none means that the law was kept. The names follow Jepsen's Kafka workload.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

SHOWN = 10  # complaints of one kind that are listed


class Effect(NamedTuple):
    """One line of a history."""

    what: str
    partition: int
    offset: int
    pid: int
    value: str


class Seen(NamedTuple):
    """One record of a topic."""

    partition: int
    offset: int
    value: str


class Outcome(NamedTuple):
    """What is left of a run: the input, the output in the committed view, and what the handlers did."""

    source: Sequence[Seen]
    sink: Sequence[Seen]
    history: Sequence[Effect]


def effects(text: str) -> list[Effect]:
    """Read a history. A last line without its end was cut by a kill, and is not there."""
    lines = text.split("\n")[:-1]
    found = (line.split(" ", 4) for line in lines)
    return [Effect(what, int(partition), int(offset), int(pid), value) for what, partition, offset, pid, value in found]


def handled_twice(outcome: Outcome) -> list[str]:
    """No offset is begun more than once."""
    begun: dict[tuple[int, int], list[int]] = {}
    for effect in outcome.history:
        if effect.what == "start":
            begun.setdefault((effect.partition, effect.offset), []).append(effect.pid)
    return _shown("handled twice", (f"{at} by {pids}" for at, pids in begun.items() if len(pids) > 1))


def not_handled(outcome: Outcome) -> list[str]:
    """Every offset was handled to its end."""
    ended = {(effect.partition, effect.offset) for effect in outcome.history if effect.what == "end"}
    return _shown("not handled", (f"{seen}" for seen in outcome.source if (seen.partition, seen.offset) not in ended))


def lost(outcome: Outcome) -> list[str]:
    """Every output of every input is there."""
    missing = _expected(outcome) - Counter(seen.value for seen in outcome.sink)
    return _shown("lost", (f"{value} x{count}" for value, count in missing.items()))


def duplicates(outcome: Outcome) -> list[str]:
    """No output is there more often than its input is."""
    surplus = Counter(seen.value for seen in outcome.sink) - _expected(outcome)
    return _shown("duplicate", (f"{value} x{count} too many" for value, count in surplus.items()))


def disorder(outcome: Outcome) -> list[str]:
    """The outputs of one input partition have the order of their inputs."""
    last: dict[tuple[int, str], tuple[int, int]] = {}
    complaints = []
    for seen in sorted(outcome.sink):
        number, which = seen.value.split(".")
        before, at = last.get((seen.partition, which), (-1, -1))
        if int(number) < before:
            complaints.append(f"{seen} comes after {before} at offset {at}")
        last[seen.partition, which] = (int(number), seen.offset)
    return _shown("disorder", complaints)


def idle(outcome: Outcome) -> list[str]:
    """More than half of the input was handled: a library that does nothing never does it twice (H10)."""
    handled = len({(effect.partition, effect.offset) for effect in outcome.history if effect.what == "end"})
    return [] if 2 * handled > len(outcome.source) else [f"idle: {handled} of {len(outcome.source)} were handled"]


LAWS: dict[str, tuple[Callable[[Outcome], list[str]], ...]] = {
    "AtMostOnce": (handled_twice, duplicates, idle),
    "AtLeastOnce": (not_handled, lost),
    "ExactlyOnce": (not_handled, lost, duplicates, disorder),
}


def complaints(guarantee: str, outcome: Outcome) -> list[str]:
    """What an outcome has against a guarantee."""
    return [complaint for law in LAWS[guarantee] for complaint in law(outcome)]


def _expected(outcome: Outcome) -> Counter[str]:
    return Counter(f"{seen.value}.{n}" for seen in outcome.source for n in (0, 1))


def _shown(kind: str, found: Iterable[str]) -> list[str]:
    listed = [f"{kind}: {text}" for text in found]
    more = len(listed) - SHOWN
    return listed if more <= 0 else [*listed[:SHOWN], f"{kind}: and {more} more"]
