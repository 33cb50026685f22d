"""How processes of this package are started: with this package, wherever that is."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kafka_guarantees.bench import process as bench
from kafka_guarantees.demo import process as demo
from kafka_guarantees.prove import crew
from kafka_guarantees.testing._process import PACKAGE, environment, python

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MODULES = ("json", "runpy", "kafka_guarantees", "confluent_kafka")


@pytest.mark.parametrize("command", [crew.COMMAND, demo.COMMAND, bench.COMMAND], ids=["prove", "demo", "bench"])
def test_what_lies_in_the_current_folder_is_not_imported(
    command: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with PYTHONPATH of relative folders. They end, since nobody gives them a job, and not by what was put there."""
    executed = tmp_path / "executed"
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text(f"open({str(executed)!r}, 'w').close()\nraise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ".")
    subprocess.run([sys.executable, "-m", "json.tool"], capture_output=True, check=False)
    executed.unlink()  # the trap works
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=environment(), timeout=60)
    assert ran.returncode
    assert not executed.exists()


def test_a_module_gets_its_arguments_and_options() -> None:
    """As with ``python -m``."""
    command = [*python("kafka_guarantees", "-X", "dev"), "--version"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert ran.stdout.startswith("kafka-guarantees ")


def test_pythonpath_counts_but_for_relative_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the package itself comes first."""
    monkeypatch.setenv("PYTHONPATH", "/a:.::b:/c")
    assert environment()["PYTHONPATH"] == f"{PACKAGE}:/a:/c"
