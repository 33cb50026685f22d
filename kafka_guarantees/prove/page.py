"""How the reports of this package look: a page that stands alone, plots as a part of it, tables on a terminal.

Rules. What a report holds comes from anywhere (exceptions, brokers, arguments): it is text, and nothing in it becomes markup,
an escape sequence or mathematics. The page needs nothing beside itself: no script, no font, no picture from elsewhere. The
same report gives the same bytes.

Colours are those of Okabe and Ito, which the colour-blind can tell apart; shapes and dashes differ besides. In the page each is
a variable, so that light and dark have their own.

This file needs the extra ``prove`` (rich, jinja2, matplotlib).
"""

from __future__ import annotations

import io
import re
from importlib import resources
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.style
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from rich.box import Box
from rich.console import Console, Group
from rich.table import Table

from kafka_guarantees._printable import printable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from matplotlib.figure import Figure
    from rich.console import RenderableType

WIDTH = 120  # letters, on a terminal
INCHES = 10.0  # of a plot, wide
INK, GRID, FAULT, SENT, HANDLED, VISIBLE, LAG = (
    "#1b1f24",
    "#d5d9de",
    "#d55e00",
    "#56b4e9",
    "#0072b2",
    "#e69f00",
    "#cc79a7",
)
_VARIABLES = {
    INK: "--ink",
    GRID: "--grid",
    FAULT: "--fault",
    SENT: "--sent",
    HANDLED: "--handled",
    VISIBLE: "--visible",
    LAG: "--lag",
}
_STYLE: dict[str, object] = {
    "svg.fonttype": "none",  # text stays text: it is small, and is found and copied
    "svg.hashsalt": "kafka-guarantees",
    "font.family": "DejaVu Sans",  # it comes with matplotlib: the same measures everywhere
    "font.size": 9,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.color": GRID,
    "ytick.labelcolor": INK,
}


def many(count: int, one: str, more: str = "") -> str:
    """A number and a noun."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


# -- a page -----------------------------------------------------------------------------------------------------------------


def rendered(template: str, **values: object) -> str:
    """A page made of a template, which may include ``page.css``, and of text that is shown as it is."""
    environment = Environment(
        loader=FunctionLoader(lambda name: (resources.files(__package__) / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_plain,
        keep_trailing_newline=True,
    )
    environment.filters.update(number="{:,}".format, many=many)
    return environment.from_string(template).render(values)


def _plain(value: object) -> object:
    """What the template writes: Markup as it is, any other text without what is not printed."""
    return printable(value, but="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


# -- a plot -----------------------------------------------------------------------------------------------------------------


def drawing() -> AbstractContextManager[None]:
    """The block in which a figure is made and drawn."""
    return mpl.style.context(["default", _STYLE])


def svg(figure: Figure, label: str) -> Markup:
    """A figure as a part of a page: without prolog, metadata, namespaces and size, and with the page's colours."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(f": {colour}", f": var({variable})")
    start = f'<svg {box[0] if box else ""} role="img" aria-label="{label}">'
    return Markup(start + rest)  # noqa: S704 - matplotlib escapes what is written into it


# -- on a terminal ----------------------------------------------------------------------------------------------------------

_RULES = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def table() -> Table:
    """A table without columns and rows, as all reports have it."""
    return Table(box=_RULES, pad_edge=False, show_edge=False, expand=False)


def as_text(*parts: RenderableType) -> str:
    """Plain text, not wider than WIDTH, without a line end."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, force_terminal=False, color_system=None, emoji=False, _environ={})
    console.print(Group(*parts))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
