"""The table at the end: one row for each guarantee, and what the columns mean. Not wider than WIDTH."""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .check import Figures

WIDTH = 110
_GAP = "  "
_COLUMNS = (
    "guarantee",
    "sent",
    "handled",
    "lost",
    "handled\ntwice",
    "msg/s",
    "p50\nms",
    "p99\nms",
    "kills",
    "settings that matter",
)
_SETTINGS = len(_COLUMNS) - 1

NOTES = (
    (
        "sent: at-most-once: in the topic, read back, since with acks=0 nobody acknowledges; at-least-once: acknowledged; "
        "exactly-once: in a committed transaction. With a store or an inbox each is sent twice, and counted once."
    ),
    (
        "handled, handled twice: at-most-once and at-least-once: offers whose handler began, once or again, by an effect log "
        "that is synced to disk each time; exactly-once: offers with an output, or with two, in the output topic, as a new "
        "read_committed consumer reads it to the end; with an inbox: offers with a row, or with two, in its database."
    ),
    "lost: sent and not handled; at-least-once: also handled and without output.",
    (
        "with a store handled twice: by a worker that was killed between handling and noting it. No store can prevent that; an "
        "inbox can, since what it notes and what the handler writes are one transaction."
    ),
    (
        "p50, p99: from sending to the beginning of the handler; exactly-once: to its output being visible. What kills cost "
        "is in them: the group waits session.timeout.ms for a dead member, and what comes meanwhile waits too."
    ),
    "msg/s: handled per second, at a fixed pace of sending, while workers die; not how fast the classes are.",
)


def table(rows: Sequence[tuple[Figures, Sequence[str]]]) -> str:
    """The table as text.

    Args:
        rows: the figures of a guarantee, and its settings that matter.
    """
    cells = [_COLUMNS, *((*_numbers(figures), "\n".join(settings)) for figures, settings in rows)]
    widths = [max(len(line) for cell in cells for line in cell[i].splitlines()) for i in range(_SETTINGS)]
    widths.append(WIDTH - sum(widths) - len(_GAP) * _SETTINGS)
    rule = "-" * WIDTH
    return "\n".join([rule, *(line for cell in cells for line in (*_lines(cell, widths), rule))])


def notes() -> str:
    """What the columns mean."""
    return "\n".join(line for note in NOTES for line in textwrap.wrap(note, WIDTH, initial_indent="* ", subsequent_indent="  "))


def _numbers(figures: Figures) -> tuple[str, ...]:
    counts = (figures.sent, figures.handled, figures.lost, figures.twice)
    return (
        figures.guarantee.replace(" + ", "\n+ "),
        *map(str, counts),
        f"{figures.rate:.0f}",
        _milliseconds(figures.p50),
        _milliseconds(figures.p99),
        str(figures.kills),
    )


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"  # noqa: PLR2004 - two digits are enough


def _lines(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    wrapped = [
        [part for line in cell.splitlines() for part in textwrap.wrap(line, width)]
        for cell, width in zip(cells, widths, strict=True)
    ]
    for parts in zip_longest(*wrapped, fillvalue=""):
        yield _GAP.join(_aligned(i, part, width) for i, (part, width) in enumerate(zip(parts, widths, strict=True))).rstrip()


def _aligned(column: int, text: str, width: int) -> str:
    return text.ljust(width) if column in (0, _SETTINGS) else text.rjust(width)
