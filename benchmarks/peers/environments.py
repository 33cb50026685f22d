"""Where other clients run: a virtual environment, a Go program, a folder of Java classes; each made once, under build/bench.

Rules.
    * A folder is complete or is made again: it has the file ``complete`` only once it was filled.
    * Its name carries the hash of what it is made from, so that another version of a client is another folder.
    * One process makes it; others wait.
    * What cannot be made is ``Unavailable`` and says why, in a line. Nothing is remembered of that: the next run tries again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / "build" / "bench"
REQUIREMENTS = HERE / "requirements.txt"
GO = HERE / "franz_go"
JAVA = HERE / "kafka_streams"

_COMPLETE = "complete"
_ALSO_LOOKED_AT = "/usr/local/go/bin"  # where Go's own archive puts it, on no PATH
_TIMEOUT_S = 600
_SHOWN = 300  # letters of an error


class Unavailable(Exception):
    """A client that cannot be had here; its argument says why."""


def python_with(client: str, module: str) -> str:
    """The path of a Python that can import a client's module, in one environment for all of them.

    Args:
        client: its name in the requirements.
        module: that it is imported as.
    """
    python = str(_made("venv", [REQUIREMENTS], _fill_venv) / "bin" / "python")
    imports = [python, "-c", f"import {module}"]
    if not _succeeds(imports):
        _run([*_install(python), _requirement(client)])  # where pip refused one client, it installed none
        _run(imports)
    return python


def go_program() -> str:
    """The path of the contestant that is written in Go."""
    return str(_made("franz_go", sorted(GO.glob("*.*")), _fill_go) / "franz_go")


def java_command() -> list[str]:
    """The words of a command, but for the job, that runs the contestant that is written in Java."""
    folder = _made("kafka_streams", sorted(JAVA.glob("*.*")), _fill_java)
    path = f"{folder / 'target' / 'classes'}{os.pathsep}{folder / 'lib'}/*"
    return [_on_the_path("java"), "-Dorg.slf4j.simpleLogger.defaultLogLevel=error", "-cp", path, "Streams"]


def _made(name: str, sources: Sequence[Path], fill: Callable[[Path], None]) -> Path:
    made_from = hashlib.sha256(sys.version.encode())
    for source in sources:
        made_from.update(source.read_bytes())
    folder = BUILD / f"{name}-{made_from.hexdigest()[:12]}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _COMPLETE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fill(folder)
            (folder / _COMPLETE).touch()
    return folder


def _fill_venv(folder: Path) -> None:
    """All clients at once, so that pip finds versions that go together; if that does not work, each when it is asked for."""
    print("benchmarks: installing the Python clients, once", file=sys.stderr)
    _run([sys.executable, "-m", "venv", str(folder)])
    _succeeds([*_install(str(folder / "bin" / "python")), "--requirement", str(REQUIREMENTS)])


def _install(python: str) -> list[str]:
    return [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def _requirement(client: str) -> str:
    """The line of a client in the requirements."""
    return next(line for line in REQUIREMENTS.read_text().splitlines() if re.split("[^A-Za-z0-9-]", line)[0] == client)


def _succeeds(command: Sequence[str]) -> bool:
    try:
        _run(command)
    except Unavailable:
        return False
    return True


def _fill_go(folder: Path) -> None:
    print("benchmarks: building the Go client, once", file=sys.stderr)
    environ = {**os.environ, "GOTOOLCHAIN": "local"}  # an older Go says so, and does not look for another one
    _run([_on_the_path("go"), "build", "-o", str(folder / "franz_go"), "."], cwd=GO, env=environ)


def _fill_java(folder: Path) -> None:
    print("benchmarks: building Kafka Streams, once", file=sys.stderr)
    for source in JAVA.glob("*.*"):
        shutil.copy(source, folder)
    maven = [_on_the_path("mvn"), "-q", "-B", "compiler:compile", "dependency:copy-dependencies"]
    _run([*maven, "-DoutputDirectory=lib", "-DincludeScope=runtime"], cwd=folder)


def _run(command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Unavailable(str(exc)[:_SHOWN]) from exc
    if done.returncode:
        raise Unavailable(_what_it_said(done.stdout) or f"{command[0]}: exit status {done.returncode}")


def _what_it_said(output: str) -> str:
    """The first line that speaks of an error, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines[-1:] or [""])[0][:_SHOWN]


def _on_the_path(command: str) -> str:
    found = shutil.which(command) or shutil.which(command, path=_ALSO_LOOKED_AT)
    if found is None:
        raise Unavailable(f"{command} is not installed")
    return found
