"""What the report draws over time, from the same evidence that the checks look at. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from typing import TYPE_CHECKING

from .evidence import INVOKE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .evidence import Evidence

SECOND = 1_000_000_000


def rates(evidence: Evidence, visible: Sequence[int], began: int) -> list[tuple[float, int, int, int]]:
    """For each second: records sent, messages that transformers began, outputs that became visible."""
    sent = Counter((e.at - began) // SECOND for e in evidence.events if e.what == "send" and e.type == INVOKE)
    handled = Counter(
        (e.at - began) // SECOND
        for e in evidence.events
        if e.what == "handle" and e.type == INVOKE and e.who.startswith("transformer")
    )
    shown = Counter((at - began) // SECOND for at in visible)
    last = max((*sent, *handled, *shown), default=-1)
    return [(float(second), sent[second], handled[second], shown[second]) for second in range(last + 1)]


def lag(evidence: Evidence, began: int) -> list[tuple[float, int]]:
    """At each sample: how many records were sent by then that the transformers' group had not committed."""
    there = {record.id: record for record in evidence.source.committed}
    sent = [e.at for e in evidence.events if e.what == "send" and e.type == INVOKE and e.id in there]
    offsets: dict[int, list[int]] = {}
    for record in evidence.source.committed:
        offsets.setdefault(record.partition, []).append(record.offset)
    for found in offsets.values():
        found.sort()
    points = []
    for sample in evidence.samples["transformer"]:
        committed = sum(bisect_left(offsets.get(p, []), offset) for p, offset in sample.offsets.items())
        points.append(((sample.answered - began) / SECOND, max(0, bisect_right(sent, sample.asked) - committed)))
    return points
