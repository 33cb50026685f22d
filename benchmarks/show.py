"""What a benchmark shows: tables on the terminal, and one page of HTML with bars, from the same JSON that is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from kafka_guarantees.prove.page import rendered

from .plan import OURS
from .results import Spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .latency import Ways
    from .results import Column, Result
    from .targets import Verdict

MET = {True: "met", False: "MISSED", None: "not measured"}
STYLES = {True: "green", False: "bold red", None: "dim"}


# -- for a terminal --------------------------------------------------------------------------------------------------------


def race_table(result: Result) -> Table:
    """A line for each contestant."""
    table = Table("", title=result.race.name, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
    for heading in ("messages/s", "least..most", "ours / it", "least..most", "ms a transaction", "first, s", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for column in result.columns.values():
        table.add_row(*_cells(column, result.ratios(column.label)))
    return table


def _cells(column: Column, ratios: Sequence[float]) -> list[str]:
    rates, ratio = Spread.of(column.rates), None if column.label == OURS else Spread.of(ratios)
    return [
        column.label,
        f"{rates.median:,.0f}" if rates else "-",
        f"{rates.least:,.0f}..{rates.most:,.0f}" if rates else "",
        f"{ratio.median:.2f}" if ratio else "",
        f"{ratio.least:.2f}..{ratio.most:.2f}" if ratio else "",
        _or_nothing(column.transaction_ms, 1),
        _or_nothing(column.first, 2),
        _or_nothing(column.rss and column.rss / 1e6, 0),
    ]


def latency_table(ways: Iterable[Ways]) -> Table:
    """Percentiles of each contestant by guarantee."""
    table = Table("", "guarantee", title="latency at 100 messages/s, ms", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("brokers", "p50", "p99", "p99.9", "p50 by rounds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for way in ways:
        spread = way.spread
        shares = [f"{share:.2f}" for share in (spread.p50, spread.p99, spread.p999)] if spread else ["-"] * 3
        table.add_row(way.label, way.guarantee, str(way.brokers), *shares, ", ".join(f"{one:.2f}" for one in way.medians))
    return table


def troubles(columns: Iterable[Column | Ways]) -> Iterator[Text]:
    """A line for each reason why one failed."""
    for column in columns:
        for trouble in column.troubles:
            yield Text(f"{column.label} failed: {trouble}", style="red")


def verdict_table(verdicts: Iterable[Verdict]) -> Table:
    """Targets, and whether they are met."""
    table = Table("", title="targets", title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
    for heading in ("target", "found", "least..most", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for verdict in verdicts:
        spread = f"{verdict.spread[0]:.2f}..{verdict.spread[1]:.2f}" if verdict.spread else ""
        word = Text(MET[verdict.met], style=STYLES[verdict.met])
        table.add_row(verdict.what, verdict.limit, _or_nothing(verdict.value, 2) or "-", spread, word)
    return table


def _or_nothing(number: float | None, digits: int) -> str:
    return "" if number is None else f"{number:,.{digits}f}"


# -- for people ------------------------------------------------------------------------------------------------------------

WIDTH, LABELS, RIGHT = 1000, 190, 330  # of a drawing, in its units: all of it, the names, the figures
ROW = 24


class Bar(NamedTuple):
    """A contestant in a drawing: what is written, and where its marks are."""

    label: str
    text: str
    ours: bool
    y: float
    end: float
    least: float
    most: float


class Drawing(NamedTuple):
    """Bars over a scale of powers of ten.

    Attributes:
        ticks: where, and what is written there.
        failed: who is not drawn, and why.
    """

    name: str
    height: float
    bars: Sequence[Bar]
    ticks: Sequence[tuple[float, str]]
    failed: Sequence[tuple[str, str]]


def drawing(race: Mapping[str, Any]) -> Drawing:
    """A race, as ``Result.as_json`` has it, as bars: the longer, the more messages a second. No bar is too short to be seen."""
    shown = [one for one in race["contestants"] if one["rates"]]
    rates = [rate for one in shown for rate in one["rates"]] or [1.0]
    low, high = math.floor(math.log10(min(rates) / 2)), math.ceil(math.log10(max(rates) * 1.0001))

    def x(rate: float) -> float:
        return LABELS + (math.log10(rate) - low) / (high - low) * (WIDTH - LABELS - RIGHT)

    bars = []
    for number, one in enumerate(shown):
        rate = Spread.of(one["rates"])
        ratio = Spread.of(one["ratios"])
        assert rate is not None
        text = f"{rate.median:,.0f}/s"
        if ratio is not None and one["name"] != OURS:
            text += f"   ours / it {ratio.median:.2f} ({ratio.least:.2f}..{ratio.most:.2f})"
        ours = one["name"].startswith(OURS)
        bars.append(Bar(one["name"], text, ours, number * ROW, x(rate.median), x(rate.least), x(rate.most)))
    ticks = [(x(10**power), f"{10**power:,}") for power in range(low, high + 1)]
    failed = [(one["name"], trouble) for one in race["contestants"] for trouble in one["troubles"]]
    return Drawing(race["race"], len(shown) * ROW, bars, ticks, failed)


def as_html(report: Mapping[str, Any]) -> str:
    """The report as a page that stands alone."""
    return rendered(
        Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"),
        report=report,
        drawings=[drawing(race) for race in report["races"]],
        words=MET,
        width=WIDTH,
        labels=LABELS,
        row=ROW,
    )
