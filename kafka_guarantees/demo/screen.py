"""What the demo says while it works: one line that renews itself on a terminal, plain lines anywhere else.

And where the library says it meanwhile.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LIVE = 0.1  # seconds between two states of the live line
PLAIN = 5.0  # seconds between two plain lines
_CLEAR = "\r\x1b[K"


class Screen:
    """Where the demo prints.

    Args:
        out: a terminal, or any text stream.
        clock: seconds.
    """

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = sys.stdout if out is None else out
        self._live = self._out.isatty()
        self._clock = clock
        self._next = clock()

    def say(self, text: str = "") -> None:
        """Print lines that stay."""
        self._out.write(f"{_CLEAR if self._live else ''}{text}\n")
        self._out.flush()

    def progress(self, text: Callable[[], str]) -> None:
        """Show how far it is, if that was not shown a moment ago."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + (LIVE if self._live else PLAIN)
        if self._live:
            self._out.write(_CLEAR + text()[: shutil.get_terminal_size().columns - 1])
            self._out.flush()
        else:
            self.say(text())


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """What the library has to say goes to a file: the screen is for the progress."""
    log, to_file = logging.getLogger("kafka_guarantees"), logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log.addHandler(to_file)
    try:
        yield
    finally:
        log.removeHandler(to_file)
        to_file.close()
