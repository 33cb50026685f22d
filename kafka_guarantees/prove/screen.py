"""What a run says while it works: a picture that renews itself on a terminal, plain lines anywhere else.

All of it goes to stderr, since stdout is for the verdict: print that after the block has been left.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from kafka_guarantees._printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from rich.live import Live
    from rich.table import Table
    from typing_extensions import Self

    from .evidence import Fault

PLAIN = 5.0  # seconds between two plain lines
_LIVE = 8  # pictures per second


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        guarantee: that is to be proven.
        seconds: since the beginning of the run.
        of_seconds: how long it is to last.
        phase: what is done now, in a word or two: ``faults``, ``calming down``, ``settling``, ``reading``.
        sent, handled, visible: records sent, messages handled, outputs visible, until now.
        lives: processes of workers that were started.
        faults_done: that have ended.
        fault_now: what is being done to whom, a few words each.
    """

    guarantee: str
    seconds: float
    of_seconds: float
    phase: str
    sent: int
    handled: int
    visible: int
    lives: int
    faults_done: int
    fault_now: Sequence[str] = ()


class Screen:
    """Where a run shows how far it is. A context manager.

    Args:
        out: a terminal, or any text stream; stderr by default.
        clock: seconds.
    """

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = sys.stderr if out is None else out
        self._clock = clock
        self._next = clock()
        self._phase = ""
        self._live: Live | None = None

    def __enter__(self) -> Self:
        """Begin the picture, if there is a terminal."""
        if self._out.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
            self._live = _live(self._out)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Take the picture away; lines of faults stay."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, state: Progress) -> None:
        """Show how far it is: at once on a terminal, else every PLAIN seconds and as a phase begins."""
        if self._live is not None:
            self._live.update(_picture(state))
            return
        now = self._clock()
        if now < self._next and state.phase == self._phase:
            return
        self._next, self._phase = now + PLAIN, state.phase
        self._say(_line(state))

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live is None:
            self._say(text)
        else:
            self._live.console.print(printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True)

    def fault(self, fault: Fault) -> None:
        """Log a fault that was done: a line that stays."""
        line = printable(fault_line(fault))
        if self._live is None:
            self._say(line)
        else:
            self._live.console.print(line, markup=False, emoji=False, highlight=False, style="dim", soft_wrap=True)

    def _say(self, line: str) -> None:
        self._out.write(f"{printable(line)}\n")
        self._out.flush()


def fault_line(fault: Fault) -> str:
    """A fault in one line: when, what, to whom, for how long."""
    lasted = f"for {fault.ended - fault.began:.1f} s" if fault.ended > fault.began else ""
    return "  ".join(part for part in (f"{fault.began:7.1f} s", f"{fault.name:16}", fault.target, lasted, fault.detail) if part)


def _line(state: Progress) -> str:
    now = f"  now: {', '.join(state.fault_now)}" if state.fault_now else ""
    counts = "  ".join(f"{name} {count}" for name, count in _counts(state))
    return f"{state.seconds:7.1f} s  of {state.of_seconds:.0f}  {state.guarantee}  {state.phase}  {counts}{now}"


def _counts(state: Progress) -> Sequence[tuple[str, str]]:
    return (
        ("sent", f"{state.sent:,}"),
        ("handled", f"{state.handled:,}"),
        ("visible", f"{state.visible:,}"),
        ("lives", f"{state.lives:,}"),
        ("faults", f"{state.faults_done:,}"),
    )


# -- the picture ----------------------------------------------------------------------------------------------------------


def _live(out: TextIO) -> Live:
    from rich.console import Console  # noqa: PLC0415 - rich comes with the extra `prove`: plain lines do without
    from rich.live import Live  # noqa: PLC0415 - likewise

    return Live(console=Console(file=out), refresh_per_second=_LIVE, transient=True, redirect_stdout=False)


def _picture(state: Progress) -> Table:
    from rich.progress_bar import ProgressBar  # noqa: PLC0415 - see _live
    from rich.table import Table  # noqa: PLC0415 - likewise
    from rich.text import Text  # noqa: PLC0415 - likewise

    head = Table.grid(padding=(0, 2), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True, justify="right")
    total = max(state.of_seconds, 0.1)
    head.add_row(
        Text(state.guarantee, style="bold"),
        Text(printable(state.phase)),
        ProgressBar(total=total, completed=min(state.seconds, total)),
        Text(f"{state.seconds:.0f} of {state.of_seconds:.0f} s"),
    )
    counts = Text("   ").join(Text.assemble((f"{name} ", "dim"), (count, "bold")) for name, count in _counts(state))
    now = Text(f"now: {printable(', '.join(state.fault_now)) or '-'}", style="yellow" if state.fault_now else "dim")
    now.truncate(200, overflow="ellipsis")
    picture = Table.grid(expand=True)
    for row in ("", head, counts, now):
        picture.add_row(row)
    return picture
