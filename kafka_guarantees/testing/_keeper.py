"""A process that owns the brokers, so that they die with the process that asked for them.

``LocalKafka`` runs this file as a script and speaks to it in JSON lines, one request and one answer at a time. The
keeper alone spawns and signals the brokers. When its owner is gone, it kills all of them and removes their data.

Rules.
    * Standard library only: it starts in 30 ms, and no import of the package can break it.
    * It runs in its own session, so Ctrl-C on the terminal reaches the owner, never a broker.
    * The end of stdin is not enough to know that the owner died: a child that the owner forked has the write end too.
      So the parent's pid is looked at as well.
    * One thread, one request at a time: nothing can happen between spawning a broker and knowing its pid.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OWNER_CHECK_S = 0.25
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_the_keeper() -> None:
    """The second line of defence, for a keeper that is SIGKILLed itself. Runs in the child, before exec."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Keeper:
    """The brokers of one cluster by name, and the folder that they live in."""

    def __init__(self, data_dir: str) -> None:
        self.data_dir = data_dir
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, argv: list[str], log: str) -> int:
        with Path(log).open("ab") as output:
            child = subprocess.Popen(  # noqa: S603 - the command is LocalKafka's own, without a shell
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.data_dir,
                preexec_fn=_die_with_the_keeper,  # noqa: PLW1509 - safe: this process has one thread
            )
        self.children[name] = child
        return child.pid

    def poll(self, name: str) -> int | None:
        """The exit code, or None while it runs."""
        return self.children[name].poll()

    def kill(self, name: str) -> int:
        """SIGKILL, which also ends a paused process; returns when it is gone."""
        child = self.children[name]
        child.kill()
        return child.wait()

    def pause(self, name: str) -> int | None:
        """SIGSTOP; returns when every thread of it stands still."""
        child = self.children[name]
        if child.poll() is None:
            child.send_signal(signal.SIGSTOP)
            _, status = os.waitpid(child.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                child.returncode = os.waitstatus_to_exitcode(status)
        return child.returncode

    def resume(self, name: str) -> int | None:
        child = self.children[name]
        child.send_signal(signal.SIGCONT)
        return child.poll()

    def close(self) -> None:
        for child in self.children.values():
            child.kill()
        for child in self.children.values():
            child.wait()
        shutil.rmtree(self.data_dir, ignore_errors=True)


def _next_request(owner: int) -> str:
    """The next line, or "" when the owner is gone."""
    while os.getppid() == owner:
        readable, _, _ = select.select([sys.stdin], [], [], OWNER_CHECK_S)
        if readable:  # at most one line is under way, so readline() cannot hide a second one from select()
            line = sys.stdin.readline()
            return line if line.endswith("\n") else ""
    return ""


def _answer(keeper: Keeper, request: dict[str, Any]) -> dict[str, object]:
    verb = request.pop("do")
    try:
        return {"ok": getattr(keeper, verb)(**request)}
    except OSError as exc:
        return {"error": str(exc)}


def _stop(_signal: int, _frame: object) -> None:
    sys.exit(1)


def main() -> None:
    """``argv``: the owner's pid, and the prefix of the data folder's name."""
    owner, prefix = int(sys.argv[1]), sys.argv[2]
    signal.signal(signal.SIGTERM, _stop)
    keeper = Keeper(tempfile.mkdtemp(prefix=prefix))
    try:
        print(json.dumps({"ok": keeper.data_dir}), flush=True)  # noqa: T201 - the first answer
        while line := _next_request(owner):
            request = json.loads(line)
            if request == {"do": "close"}:
                break
            print(json.dumps(_answer(keeper, request)), flush=True)  # noqa: T201 - the protocol
    except BrokenPipeError:
        pass  # the owner died while it was being answered
    finally:
        keeper.close()


if __name__ == "__main__":
    main()
