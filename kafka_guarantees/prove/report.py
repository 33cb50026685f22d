"""A proof, shown: as JSON for programs, as text for a terminal, as one HTML page for people.

Rules. Those of ``page``. A check that examined nothing, or too little, is neither kept nor broken; and a run in which that is
all of them, or in which too little happened, says nothing.

This file needs the extra ``prove`` (rich, jinja2, matplotlib).
"""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Final, Literal

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from rich.table import Table
from rich.text import Text

from kafka_guarantees._printable import printable

from . import page
from .page import WIDTH, many

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from matplotlib.axes import Axes
    from rich.console import RenderableType

    from .evidence import Fault, Proof, Verdict

FORMAT = 1  # of the JSON: counts up when a key changes its meaning or goes
KEPT: Final = "kept"
BROKEN: Final = "broken"
NOT_EXERCISED: Final = "not exercised"
TOO_LITTLE: Final = "too little"
_IN_TEXT = 5  # anomalies of a check that the terminal shows
_AT_ONCE = 25  # anomalies of a check that the page shows unfolded
_ON_PAGE = 2_000  # anomalies of a check that the page shows; the JSON has all


def result(verdict: Verdict) -> Literal["kept", "broken", "too little", "not exercised"]:
    """What a check says. One that examined nothing says nothing."""
    if verdict.anomalies:
        return BROKEN
    if verdict.lacking:
        return TOO_LITTLE
    return KEPT if verdict.examined else NOT_EXERCISED


def why(proof: Proof) -> str:
    """The reason for the outcome, in a sentence."""
    exercised = [verdict for verdict in proof.verdicts if verdict.examined]
    faults = many(len(proof.faults), "fault") if proof.faults else "no fault at all"
    if proof.outcome == "inconclusive":
        return f"Nothing wrong was found, but this run says nothing about the guarantee: {_lacking(proof)}."
    if proof.outcome == "held":
        idle = len(proof.verdicts) - len(exercised)
        rest = f" {many(idle, 'check')} had nothing to examine." if idle else ""
        examined = sum(verdict.examined for verdict in exercised)
        return f"{many(len(exercised), 'check')} looked at {examined:,} things under {faults} and found nothing wrong.{rest}"
    parts = [f"{verdict.check} ({_anomalies(verdict)})" for verdict in _broken(proof)]
    if proof.troubles:
        parts.append(f"{many(len(proof.troubles), 'trouble')} that no fault explains")
    return f"Under {faults}: {'; '.join(parts)}."


def _lacking(proof: Proof) -> str:
    sentences = [sentence for verdict in proof.verdicts for sentence in verdict.lacking]
    return "; ".join(sentences) if sentences else "no check had anything to examine"


def _broken(proof: Proof) -> list[Verdict]:
    return [verdict for verdict in proof.verdicts if verdict.anomalies]


def _anomalies(verdict: Verdict) -> str:
    return many(verdict.found, "anomaly", "anomalies")


# -- for programs -----------------------------------------------------------------------------------------------------------


def as_json(proof: Proof) -> str:
    """The proof as a JSON object.

    ===================================  ====================================================================================
    key                                  value
    ===================================  ====================================================================================
    format                               1; counts up when a key changes its meaning or goes
    guarantee                            "at-most-once", "at-least-once" or "exactly-once"
    held                                 whether every check held, nothing else went wrong, and enough happened to say so
    outcome                              "held", "broken", or "inconclusive": nothing was wrong, and too little happened
    version, command, began, kept_in     strings, as in Proof
    seconds                              a number
    setting                              name -> string
    figures                              name -> number
    verdicts                             list of {check, meaning, examined, anomalies: list of strings, more, result: "kept",
                                         "broken", "too little" or "not exercised", lacking: list of strings}
    faults                               list of {name, target, began, ended, detail}, in the order of time
    rates                                list of {at, sent, handled, visible}
    lag                                  list of {at, lag}
    troubles                             list of strings
    ===================================  ====================================================================================
    """
    return json.dumps(
        {
            "format": FORMAT,
            "guarantee": proof.guarantee,
            "held": proof.outcome == "held",
            "outcome": proof.outcome,
            "version": proof.version,
            "command": proof.command,
            "began": proof.began,
            "seconds": proof.seconds,
            "kept_in": proof.kept_in,
            "setting": dict(proof.setting),
            "figures": dict(proof.figures),
            "verdicts": [
                {
                    "check": verdict.check,
                    "result": result(verdict),
                    "meaning": verdict.meaning,
                    "examined": verdict.examined,
                    "anomalies": list(verdict.anomalies),
                    "more": verdict.more,
                    "lacking": list(verdict.lacking),
                }
                for verdict in proof.verdicts
            ],
            "troubles": list(proof.troubles),
            "faults": [
                {
                    "name": fault.name,
                    "target": fault.target,
                    "began": fault.began,
                    "ended": fault.ended,
                    "detail": fault.detail,
                }
                for fault in proof.faults
            ],
            "rates": [dict(zip(("at", "sent", "handled", "visible"), row, strict=True)) for row in proof.rates],
            "lag": [dict(zip(("at", "lag"), row, strict=True)) for row in proof.lag],
        },
        indent=1,
    )


# -- for a terminal ---------------------------------------------------------------------------------------------------------


def as_text(proof: Proof) -> str:
    """The table of checks, what is wrong, and a closing line. Plain text, not wider than WIDTH, without a line end."""
    return page.as_text(_table(proof), *_wrong(proof), Text(_shortened(printable(_closing(proof)))))


def _table(proof: Proof) -> Table:
    table = page.table()
    table.add_column("check", overflow="fold", max_width=32)
    table.add_column("result", no_wrap=True)
    table.add_column("examined", no_wrap=True, justify="right")
    table.add_column("anomalies", no_wrap=True, justify="right")
    table.add_column("meaning", overflow="fold")
    for verdict in proof.verdicts:
        said = result(verdict)
        cells = (
            verdict.check,
            said.upper() if said == BROKEN else said,
            f"{verdict.examined:,}",
            f"{verdict.found:,}",
            verdict.meaning,
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _wrong(proof: Proof) -> Iterator[RenderableType]:
    yield Text()
    lists = [(verdict.check, _anomalies(verdict), verdict.anomalies) for verdict in _broken(proof)]
    if proof.troubles:
        lists.append(("troubles", "no fault explains them", proof.troubles))
    lists += [(verdict.check, "too little to say anything", verdict.lacking) for verdict in proof.verdicts if verdict.lacking]
    for name, count, sentences in lists:
        yield Text(printable(f"{name}: {count}"))
        shown = Table.grid(padding=(0, 1))
        for sentence in sentences[:_IN_TEXT]:
            shown.add_row("  *", Text(_on_a_line(sentence)))
        if len(sentences) > _IN_TEXT:
            shown.add_row("", f"... and {len(sentences) - _IN_TEXT:,} more: the report has them")
        yield shown
        yield Text()


def _on_a_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _shortened(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 4] + "...)"


def _closing(proof: Proof) -> str:
    if proof.outcome == "inconclusive":
        return f"INCONCLUSIVE  {proof.guarantee}: this run says nothing ({_on_a_line(_lacking(proof))})"
    if proof.outcome == "held":
        return _fitting(f"kept  {proof.guarantee}: ", [f"{value:,} {name}" for name, value in proof.figures.items()])
    broken = _broken(proof)
    if not broken:
        return f"BROKEN  {proof.guarantee}: {many(len(proof.troubles), 'trouble')} ({_on_a_line(proof.troubles[0])})"
    first = broken[0]
    also = f", and {many(len(broken) - 1, 'more check')}" if broken[1:] else ""
    return f"BROKEN  {proof.guarantee}: {_on_a_line(first.check)}: {_anomalies(first)}{also} ({_on_a_line(first.anomalies[0])})"


def _fitting(start: str, parts: Sequence[str]) -> str:
    line = start + ", ".join(parts)
    while len(line) > WIDTH and parts:
        parts = parts[:-1]
        line = start + ", ".join([*parts, "..."])
    return line.rstrip(": ")


# -- for people -------------------------------------------------------------------------------------------------------------


def as_html(proof: Proof) -> str:
    """The proof as one HTML page that stands alone."""
    return page.rendered(
        (resources.files(__package__) / "report.html.jinja").read_text(encoding="utf-8"),
        proof=proof,
        why=why(proof),
        head=_head(proof),
        verdicts=[(verdict, result(verdict)) for verdict in proof.verdicts],
        plot=_plot(proof),
        not_drawn=[what for what, data in (("rates", proof.rates), ("lag", proof.lag)) if not data],
        first=_AT_ONCE,
        most=_ON_PAGE,
    )


def _head(proof: Proof) -> Mapping[str, str]:
    minutes, seconds = divmod(round(proof.seconds), 60)
    lasted = f"{minutes:,} min {seconds} s" if minutes else f"{proof.seconds:.1f} s"
    first = {"seed": proof.setting["seed"]} if "seed" in proof.setting else {}
    return {**first, "date": proof.began, "duration": lasted, "versions": proof.version} | {
        name: value for name, value in proof.setting.items() if name != "seed"
    }


# -- the plot ---------------------------------------------------------------------------------------------------------------
_ROW = 0.21  # inches for a name of a fault
_POINTS = 300  # along the axis of time: more than that nobody sees
_CROWD = 200  # faults: from here on their marks are smaller
_NAME = 28  # letters of the name of a fault


def _plot(proof: Proof) -> Markup:
    """Faults above throughput above lag, over one axis of time, as SVG; empty where there is nothing to draw."""
    end = max([proof.seconds, 1.0, *(fault.ended for fault in proof.faults), *(row[0] for row in proof.rates)])
    bin_ = max(1, -(-int(end) // _POINTS))
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    if proof.faults:
        panels.append((_ROW * len({fault.name for fault in proof.faults}) + 0.1, lambda axes: _draw_faults(axes, proof.faults)))
    if proof.rates:
        panels.append((2.0, lambda axes: _draw_rates(axes, proof.rates, bin_)))
    if proof.lag:
        panels.append((1.1, lambda axes: _draw_lag(axes, proof.lag, bin_)))
    if not panels:
        return Markup("")
    heights = [height for height, _ in panels]
    with page.drawing():
        figure = Figure(figsize=(page.INCHES, sum(heights) + 0.38 * len(panels) + 0.4), layout="constrained")
        all_axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (_, draw) in zip(all_axes, panels, strict=True):
            draw(axes)
        all_axes[-1].set_xlim(0, end)
        all_axes[-1].set_xlabel("seconds since the beginning of the run")
        return page.svg(figure, "Faults, throughput and lag over time")


def _draw_faults(axes: Axes, faults: Sequence[Fault]) -> None:
    names = sorted({fault.name for fault in faults})  # the same order in every report
    row = {name: number for number, name in enumerate(names)}
    for name in names:
        long = [
            (fault.began, fault.ended - fault.began) for fault in faults if fault.name == name and fault.ended > fault.began
        ]
        if long:  # the edge keeps what is short visible over a long run
            axes.broken_barh(long, (row[name] - 0.32, 0.64), color=page.FAULT, alpha=0.75, linewidth=1)
    short = [(fault.began, row[fault.name]) for fault in faults if fault.ended <= fault.began]
    if short:
        axes.plot(*zip(*short, strict=True), "D", color=page.INK, markersize=4.5 if len(faults) < _CROWD else 3, alpha=0.85)
    axes.set_title("faults: a bar lasts, a diamond is an instant")
    axes.set_yticks(range(len(names)), [_label(name) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(length=0)


def _draw_rates(axes: Axes, rates: Sequence[tuple[float, int, int, int]], bin_: int) -> None:
    at, sent, handled, visible = zip(*_binned(rates, bin_, lambda values: sum(values) / len(values)), strict=True)
    axes.fill_between(at, sent, color=page.SENT, alpha=0.45, linewidth=0, label="records sent")
    axes.plot(at, handled, color=page.HANDLED, linewidth=1.4, label="messages handled")
    axes.plot(at, visible, color=page.VISIBLE, linewidth=1.4, linestyle=(0, (4, 1.5)), label="outputs visible")
    axes.set_title("per second" if bin_ == 1 else f"per second, mean of {bin_} s")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=3, frameon=False)
    _counts(axes)


def _draw_lag(axes: Axes, lag: Sequence[tuple[float, int]], bin_: int) -> None:
    at, most = zip(*(lag if bin_ == 1 else _binned(lag, bin_, max)), strict=True)
    axes.fill_between(at, most, color=page.LAG, alpha=0.35, linewidth=0)
    axes.plot(at, most, color=page.LAG, linewidth=1.4)
    axes.set_title("lag: messages not committed yet" + ("" if bin_ == 1 else f", maximum of {bin_} s"))
    _counts(axes)


def _counts(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(length=0)


def _binned(
    rows: Sequence[tuple[float, ...]], width: int, into_one: Callable[[Sequence[float]], float]
) -> list[tuple[float, ...]]:
    """Rows of (time, values): one in the middle of every ``width`` seconds, each value made of those in them."""
    bins: dict[int, list[tuple[float, ...]]] = {}
    for row in rows:
        bins.setdefault(int(row[0] // width), []).append(row)
    return [
        ((number + 0.5) * width, *(into_one(values) for values in list(zip(*rows_, strict=True))[1:]))
        for number, rows_ in sorted(bins.items())
    ]


def _label(name: str) -> str:
    plain = name.encode("ascii", "backslashreplace").decode()  # the font has not every letter
    return printable(plain if len(plain) <= _NAME else plain[: _NAME - 3] + "...")
