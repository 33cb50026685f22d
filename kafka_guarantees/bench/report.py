"""What was measured, shown: as JSON for programs, as text for a terminal, as one HTML page for people.

Rules. Those of ``prove.page``. A rate is the median of its rounds, and its spread is beside it.

This file needs the extra ``prove`` (rich, jinja2, matplotlib).
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from importlib import resources
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from rich.text import Text

from kafka_guarantees._printable import printable
from kafka_guarantees.prove import page
from kafka_guarantees.prove.page import WIDTH

from .plan import GUARANTEES, RATE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from markupsafe import Markup
    from matplotlib.axes import Axes
    from rich.table import Table

    from .figures import Bench, Latency, Row, Spread

FORMAT = 1  # of the JSON: counts up when a key changes its meaning or goes
NOTES = (
    (
        "consume: with a handler that does nothing. transform: with one that returns a copy of each message. batch: messages "
        "of a transaction, x transactions in flight."
    ),
    (
        "messages/s: the median of the rounds; of what consumes, until offsets are committed. spread: between the lowest and "
        "the highest round. MB/s: of values."
    ),
    "price: messages/s, as a part of the same work at most once.",
    (
        "read: milliseconds from producing a result until a reader of committed records has it, at full load, in a round "
        "of its own. It is known to the millisecond."
    ),
    "first: seconds from the start of the process to its first message, joining the group included. MiB: the most memory.",
    f"there and back: from sending a message to reading the copy that a handler made of it, at {RATE} messages/s.",
)


def columns_of(bench: Bench) -> tuple[Sequence[str], list[Sequence[str]]]:
    """The table of throughput: its head and its rows."""
    head = (
        "work",
        "guarantee",
        "batch",
        "messages/s",
        "spread",
        "MB/s",
        "price",
        "read p50 ms",
        "p99 ms",
        "first s",
        "MiB",
    )
    return head, [_cells(bench, row) for row in bench.rows]


def _cells(bench: Bench, row: Row) -> Sequence[str]:
    price, spread = bench.price(row), row.readable
    return (
        row.measure.work,
        row.measure.guarantee,
        _batch(row),
        _number(row.rate),
        f"{(max(row.rates) - min(row.rates)) / row.rate:.0%}",
        _short(row.megabytes(bench.size)),
        "-" if price is None else f"{price:.2f}" if price >= 0.01 else f"{price:.4f}",  # noqa: PLR2004 - else it reads as 0
        "-" if spread is None else _short(spread.p50),
        "-" if spread is None else _short(spread.p99),
        f"{row.first:.2f}",
        f"{row.memory / 2**20:.0f}",
    )


def _batch(row: Row) -> str:
    in_flight = f" x {row.measure.in_flight}" if row.measure.in_flight else ""
    return f"{row.measure.batch:,}{in_flight}" if row.measure.batch else "-"


def latencies_of(bench: Bench) -> tuple[Sequence[str], list[Sequence[str]]]:
    """The table of latency: its head and its rows."""
    head = ("there and back", "p50 ms", "p99 ms", "p99.9 ms", "messages", "missing")
    return head, [(each.guarantee, *_times(each.there_and_back), f"{each.missing:,}") for each in bench.latencies]


def _times(spread: Spread | None) -> Sequence[str]:
    if spread is None:
        return ("-", "-", "-", "0")
    return (*(f"{value:.1f}" for value in (spread.p50, spread.p99, spread.p999)), f"{spread.count:,}")


def _number(rate: float) -> str:
    return f"{rate:,.0f}"


def _short(value: float) -> str:
    """With two digits, and no more than three behind the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.1 else f"{value:.3f}"  # noqa: PLR2004 - see above


# -- for programs -----------------------------------------------------------------------------------------------------------


def as_json(bench: Bench) -> str:
    """The figures as a JSON object.

    ===================================  ====================================================================================
    key                                  value
    ===================================  ====================================================================================
    format                               1; counts up when a key changes its meaning or goes
    version, command, began              strings
    seconds, size                        numbers
    setting                              name -> string
    rows                                 list of {measure: {work, guarantee, batch, in_flight}, rate, rates, megabytes, price,
                                         first, memory, readable: null or {count, p50, p99, p999}}
    latencies                            list of {guarantee, missing, there_and_back: null or {count, p50, p99, p999}}
    ===================================  ====================================================================================
    """
    whole = asdict(bench)
    for data, row in zip(whole["rows"], bench.rows, strict=True):
        data |= {"rate": row.rate, "megabytes": row.megabytes(bench.size), "price": bench.price(row)}
    return json.dumps({"format": FORMAT, **whole}, indent=1)


# -- for a terminal ---------------------------------------------------------------------------------------------------------


def as_text(bench: Bench) -> str:
    """The tables, and what their columns mean. Plain text, not wider than WIDTH, without a line end."""
    notes = [line for note in NOTES for line in textwrap.wrap(note, WIDTH, initial_indent="* ", subsequent_indent="  ")]
    tables = _table(*columns_of(bench), words=2), _table(*latencies_of(bench), words=1)
    return page.as_text(tables[0], Text(), tables[1], Text(), Text("\n".join(notes)))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> Table:
    """The first columns are words, the others numbers."""
    table = page.table()
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number < words else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


# -- for people -------------------------------------------------------------------------------------------------------------


def as_html(bench: Bench) -> str:
    """The figures as one HTML page that stands alone."""
    return page.rendered(
        (resources.files(__package__) / "report.html.jinja").read_text(encoding="utf-8"),
        bench=bench,
        sentences=list(sentences(bench)),
        head={"date": bench.began, "duration": f"{bench.seconds:.0f} s", "versions": bench.version, **bench.setting},
        tables=[(*columns_of(bench), 2), (*latencies_of(bench), 1)],
        plot=_plot(bench),
        notes=NOTES,
    )


def sentences(bench: Bench) -> Iterator[str]:
    """What each guarantee costs, in a sentence each: of consume, transform, produce, with its best setting."""
    back = {each.guarantee: each.there_and_back for each in bench.latencies}
    for guarantee in GUARANTEES:
        rows = [row for row in bench.rows if row.measure.work == "transform" and row.measure.guarantee == guarantee]
        if rows:
            best = max(rows, key=lambda row: row.rate)
            latency = back.get(guarantee)
            batch = f", {_batch(best)} a transaction" if best.measure.batch else ""
            there = (
                f" At {RATE} messages/s a copy is back after {latency.p50:.1f} ms (p99: {latency.p99:.1f} ms)."
                if latency
                else ""
            )
            yield f"{guarantee}{batch}: up to {_number(best.rate)} messages/s through a handler.{there}"


# -- the plot ---------------------------------------------------------------------------------------------------------------

_COLOURS: Mapping[str, str] = dict(zip(GUARANTEES, (page.VISIBLE, page.HANDLED, page.FAULT), strict=True))
_SHAPES: Mapping[str, str] = dict(zip(GUARANTEES, "so^", strict=True))
_DASHES = ("-", (0, (4, 1.5)), ":")  # of the numbers of transactions in flight
_LEAST = 0.5  # milliseconds: records tell their time to the millisecond


def _plot(bench: Bench) -> Markup:
    """Throughput against latency at full load; below, latency at low traffic, and the other works. As SVG."""
    with page.drawing():
        figure = Figure(figsize=(page.INCHES, 6.4), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(2.2, 1))
        _draw_trade_off(figure.add_subplot(grid[0, :]), bench.rows)
        _draw_latencies(figure.add_subplot(grid[1, 0]), bench.latencies)
        _draw_works(figure.add_subplot(grid[1, 1]), bench.rows)
        return page.svg(figure, "Throughput against latency, by guarantee")


def _draw_trade_off(axes: Axes, rows: Sequence[Row]) -> None:
    lines: dict[tuple[str, int | None], list[tuple[Row, Spread]]] = {}
    for row in rows:
        if row.readable is not None:
            lines.setdefault((row.measure.guarantee, row.measure.in_flight), []).append((row, row.readable))
    depths = sorted({depth or 0 for _, depth in lines})
    for (guarantee, depth), points in lines.items():
        colour, times = _COLOURS[guarantee], [max(_LEAST, spread.p50) for _, spread in points]
        axes.plot(
            times,
            [row.rate for row, _ in points],
            color=colour,
            marker=_SHAPES[guarantee],
            linestyle=_DASHES[depths.index(depth or 0) % len(_DASHES)],
            linewidth=1.2,
            label=f"{guarantee}, {depth} in flight" if depth else guarantee,
        )
        for (row, spread), time in zip(points, times, strict=True):
            axes.hlines(row.rate, time, max(time, spread.p99), color=colour, linewidth=1, alpha=0.6)
            if row.measure.batch:
                axes.annotate(f"{row.measure.batch:,}", (time, row.rate), (5, -11), textcoords="offset points", fontsize=8)
    axes.set_title("transform at full load (numbers: messages a transaction; bars reach to p99)")
    axes.set_xlabel("milliseconds until a result can be read, p50")
    axes.set_ylabel("messages/s")
    if lines:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.legend(loc="best", frameon=False)
    _plain(axes)


def _draw_latencies(axes: Axes, latencies: Sequence[Latency]) -> None:
    shown = [(each.guarantee, each.there_and_back) for each in latencies if each.there_and_back is not None]
    for row, (guarantee, spread) in enumerate(shown):
        axes.hlines(row, spread.p50, spread.p999, color=_COLOURS[guarantee], linewidth=1.4)
        axes.plot([spread.p50, spread.p99, spread.p999], [row] * 3, _SHAPES[guarantee], color=_COLOURS[guarantee], markersize=5)
    axes.set_yticks(range(len(shown)), [guarantee for guarantee, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_title(f"there and back at {RATE} messages/s: p50, p99, p99.9, ms")
    axes.tick_params(length=0)


def _draw_works(axes: Axes, rows: Sequence[Row]) -> None:
    shown = [row for row in rows if row.measure.work != "transform"]
    names = [f"{row.measure.work}, {row.measure.guarantee}" for row in shown]
    axes.barh(range(len(shown)), [row.rate for row in shown], 0.6, color=[_COLOURS[row.measure.guarantee] for row in shown])
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_title("messages/s")
    axes.tick_params(length=0)


def _plain(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_thousands))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(length=0)


def _thousands(value: float, _place: object = None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
