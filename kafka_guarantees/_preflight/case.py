"""What the checks look at, and the words that their tables share. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from .._settings import Guarantee
from .._settings.properties import PROPERTIES
from .report import Level
from .seen import OFFSETS, PATTERN, TRANSACTIONS, Cluster, Topic, matches

if TYPE_CHECKING:
    from .._settings import Settings

AMO, ALO, EXO = Guarantee.AT_MOST_ONCE, Guarantee.AT_LEAST_ONCE, Guarantee.EXACTLY_ONCE

REPLICAS = 3  # one may be repaired, and another one die
IN_SYNC = 2
HOUR, DAY, WEEK = (int(timedelta(hours=hours).total_seconds() * 1000) for hours in (1, 24, 7 * 24))

DATA, DEAD_LETTERS, POSITIONS, OUTCOMES = "topic", "dead letter topic", "offsets topic", "transactions topic"  # roles
NAMES = {DATA: "topic", DEAD_LETTERS: "dead letter topic", POSITIONS: "internal topic", OUTCOMES: "internal topic"}

Levels = Mapping[Guarantee, Level]
KEPT: Levels = {ALO: "unsafe", EXO: "unsafe"}  # what loses acknowledged records
POSITION: Levels = {AMO: "unsafe", ALO: "warning", EXO: "unsafe"}  # what loses committed offsets (M05)
TRANSACTED: Levels = {EXO: "unsafe"}


@dataclass(frozen=True)
class Case:
    """Everything that checks look at.

    Attributes:
        settings: of the client.
        seen: what the brokers said.
        topics: names and patterns.
        dead_letter: the dead letter topic.
        retention: how long an id is remembered.
    """

    settings: Settings
    seen: Cluster
    topics: tuple[str, ...] = ()
    dead_letter: str | None = None
    retention: timedelta | None = None

    @property
    def inputs(self) -> dict[str, Topic]:
        """The topics, those that patterns match among them, without the dead letter topic."""
        return {
            name: topic
            for name, topic in self.seen.topics.items()
            if name in self.topics
            or any(p.startswith(PATTERN) and name != self.dead_letter and matches(p, name) for p in self.topics)
        }

    def asked_for(self, role: str) -> dict[str, Topic]:
        """The topics of a role that this client has a use for."""
        if role == DATA:
            return self.inputs
        name = {
            DEAD_LETTERS: self.dead_letter,
            POSITIONS: OFFSETS if self.settings.group_id is not None else None,
            OUTCOMES: TRANSACTIONS if self.settings.guarantee is EXO else None,
        }[role]
        topic = self.seen.topics.get(name) if name is not None else None
        return {} if name is None or topic is None else {name: topic}

    def limit(self, name: str, side: str = "producer") -> int:
        """A setting of the client that is a number."""
        given: Mapping[str, object] = getattr(self.settings, side)
        return int(str(given.get(name, PROPERTIES[name].default)))


class Needed(NamedTuple):
    """What is needed instead: for people, and what to set (None where that is not the way)."""

    text: str
    set_to: str | None = None
    level: Level | None = None  # where it is not that of the row
    seen: str | None = None  # where the bare value does not say it


def span(milliseconds: int) -> str:
    """A time for people, with the number that the brokers know it by."""
    if milliseconds < 0:
        return "for ever"
    for unit, size in (("d", DAY), ("h", HOUR), ("min", 60_000), ("s", 1000)):
        if milliseconds >= size and not milliseconds % size:
            return f"{milliseconds} ({milliseconds // size} {unit})"
    return str(milliseconds)
