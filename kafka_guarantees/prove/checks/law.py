"""What a check is: a name, a meaning, and a look at a story. Its anomalies are all counted, and the first of them are told."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..evidence import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .story import Story

SHOWN = 200  # anomalies of one check that are told


class Found(NamedTuple):
    """How many things were looked at, a sentence for each that is wrong, and one for each that there was too little of."""

    examined: int
    anomalies: Sequence[str]
    lacking: Sequence[str] = ()


@dataclass(frozen=True)
class Check:
    """A law about a story.

    Attributes:
        name: of the anomaly that it looks for.
        meaning: what holds where there is none, a sentence: the first line of the docstring of ``look``.
        look: finds it.
    """

    name: str
    meaning: str
    look: Callable[[Story], Found]

    def on(self, story: Story) -> Verdict:
        """Judge a story."""
        examined, anomalies, lacking = self.look(story)
        more = max(0, len(anomalies) - SHOWN)
        return Verdict(self.name, self.meaning, examined, tuple(anomalies[:SHOWN]), more, tuple(lacking))


def check(name: str) -> Callable[[Callable[[Story], Found]], Check]:
    """Make a check of a function; what it means stands in the first line of its docstring, and only there."""

    def made(look: Callable[[Story], Found]) -> Check:
        return Check(name, (inspect.getdoc(look) or name).split("\n", 1)[0], look)

    return made
