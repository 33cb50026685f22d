"""Processes of prove, bench and demo: they import what this process does, whatever lies in the folder where they are started.

``python -m`` looks into the current folder first. Whoever can put a ``json.py`` there would have it executed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import kafka_guarantees

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = str(Path(kafka_guarantees.__file__).parents[1])
# like python -P, which 3.10 does not have
_START = "import sys; sys.path = [folder for folder in sys.path if folder]; from runpy import run_module as run; "
_START += "run(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def python(module: str, *options: str) -> Sequence[str]:
    """The command that runs a module of this package, with these options of Python. Arguments are put behind it."""
    return (sys.executable, *options, "-c", _START, module)


def environment() -> dict[str, str]:
    """The environment for it. ``PYTHONPATH`` counts, but for relative folders."""
    others = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(folder).is_absolute()]
    installed = Path(PACKAGE).name in ("site-packages", "dist-packages")  # which stands behind the standard library
    return {**os.environ, "PYTHONPATH": os.pathsep.join(others if installed else [PACKAGE, *others])}
