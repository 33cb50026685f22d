"""A real Redis or PostgreSQL on this machine: started in a temporary folder, gone with its owner.

Rules.
    * It is the server as it is installed, on a free port of the loopback address.
    * Every server belongs to a keeper (``_keeper.py``), which ends it when the owner is gone, however it went.
    * Nothing here waits without a deadline.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Self

from kafka_guarantees.testing.local_kafka import _free_ports, _KeeperPipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["LocalPostgres", "LocalRedis", "LocalServerError", "ServerNotInstalled"]

_START_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 10.0
_POLL_S = 0.02
_LOG_LINES = 20
_DEBIAN_POSTGRES = "/usr/lib/postgresql"  # Debian keeps the servers out of PATH


class LocalServerError(Exception):
    """A server did not start or stop. The message has the last lines of its log."""


class ServerNotInstalled(LocalServerError):
    """The programs of the server are not on this machine."""


class _LocalServer:
    """What every server here can do, once it is entered."""

    def __init__(self, *, config: Mapping[str, object] | None = None) -> None:
        self._config = dict(config or {})
        self._server: _Server | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """The port on 127.0.0.1; the same after a restart."""
        return self._port

    def kill(self) -> None:
        """SIGKILL every process of it, as a power cut of the machine would, save that the page cache stays.

        What it has acknowledged is there after :meth:`restart`.
        """
        self._running().kill()

    def restart(self) -> None:
        """Start it again with its data, on the same port, and wait for its recovery. One that still runs is killed first."""
        self._running().restart()

    def pause(self) -> None:
        """SIGSTOP every process of it (Linux; elsewhere the first one only): connections stay open and nothing is answered."""
        self._running().pause()

    def resume(self) -> None:
        """SIGCONT after :meth:`pause`."""
        self._running().resume()

    def _running(self) -> _Server:
        if self._server is None:
            name = type(self).__name__
            raise LocalServerError(f"this {name} is not started: use it as `with {name}() as server:`")
        return self._server


class LocalRedis(_LocalServer):
    """Redis with an append-only file, on loopback, in a temporary folder. A context manager.

    Args:
        config: settings of redis.conf that win over the ones that LocalRedis sets.

    Raises:
        ServerNotInstalled: on entering, where there is no ``redis-server``.
        LocalServerError: on entering, when it does not answer within 60 seconds.
    """

    @property
    def url(self) -> str:
        """What redis-py's ``Redis.from_url`` takes."""
        password = self._config.get("requirepass")
        return f"redis://{f':{password}@' if password else ''}127.0.0.1:{self._port}/0"

    def __enter__(self) -> Self:
        program = _find("redis-server", [], "redis-server")
        (self._port,) = _free_ports(1)
        server = self._server = _Server("redis", self._answers)
        with server.stopped_on_error():
            settings = {
                "bind": "127.0.0.1",
                "port": self._port,
                "dir": server.folder,
                "save": "",
                "appendonly": "yes",
                **self._config,
            }
            file = server.folder / "redis.conf"
            file.write_text("".join(f"{key} {_quoted(value)}\n" for key, value in settings.items()))
            server.start([program, str(file)])
        return self

    def __exit__(self, *_: object) -> None:
        self._running().stop(signal.SIGTERM)

    def _answers(self, _pid: int) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))  # not -LOADING
        return False


class LocalPostgres(_LocalServer):
    """PostgreSQL on loopback, in a temporary folder, with one superuser and its password. A context manager.

    It refuses to run as root: there it becomes the user ``postgres``, or ``nobody`` where that does not exist.

    Args:
        config: settings of postgresql.conf that win over the ones that LocalPostgres sets.

    Raises:
        ServerNotInstalled: on entering, where there is no ``initdb``.
        LocalServerError: on entering, when it is not ready within 60 seconds.
    """

    def __init__(self, *, config: Mapping[str, object] | None = None) -> None:
        super().__init__(config=config)
        self._password = secrets.token_hex(12)

    @property
    def password(self) -> str:
        """The superuser's; part of ``dsn``."""
        return self._password

    @property
    def dsn(self) -> str:
        """What ``psycopg.connect`` takes."""
        return f"postgresql://postgres:{self._password}@127.0.0.1:{self._port}/postgres"

    def __enter__(self) -> Self:
        debian = sorted(Path(_DEBIAN_POSTGRES).glob("*/bin"), key=lambda path: path.parent.name, reverse=True)
        initdb = _find("initdb", debian, "postgresql")
        (self._port,) = _free_ports(1)
        server = self._server = _Server("postgres", self._answers)
        with server.stopped_on_error():
            self._initdb(initdb, server.folder)
            settings = {
                "listen_addresses": "127.0.0.1",
                "port": self._port,
                "unix_socket_directories": "",
                "dynamic_shared_memory_type": "mmap",  # in the data folder: a killed server leaves nothing elsewhere
                **self._config,
            }
            options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
            postgres = str(Path(initdb).with_name("postgres"))
            server.start([*_as_somebody_else(), postgres, "-D", str(server.folder / "data"), *options])
        return self

    def __exit__(self, *_: object) -> None:
        self._running().stop(signal.SIGINT)  # "fast": open transactions are rolled back

    def _initdb(self, initdb: str, folder: Path) -> None:
        data, password = folder / "data", folder / "password"
        data.mkdir(mode=0o700)
        password.touch(mode=0o600)
        password.write_text(self._password)
        who = _somebody_else()
        if who is not None:
            folder.chmod(0o711)
            for path in (data, password):
                os.chown(path, who.pw_uid, who.pw_gid)
        command = [*_as_somebody_else(), initdb, "-D", str(data), "-U", "postgres", "-A", "scram-sha-256", "-E", "UTF8"]
        command += ["--pwfile", str(password), "--locale=C", "--no-sync"]
        done = subprocess.run(  # noqa: S603 - our own command, without a shell
            command, cwd=folder, capture_output=True, text=True, timeout=_START_DEADLINE_S, check=False
        )
        password.unlink()
        if done.returncode:
            raise LocalServerError(f"initdb failed (exit code {done.returncode}):\n{done.stdout}{done.stderr}")

    def _answers(self, pid: int) -> bool:
        """What ``pg_ctl`` looks at too: the postmaster writes that it is ready, after recovery, into its pid file."""
        try:
            lines = (self._running().folder / "data" / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() == "ready"  # noqa: PLR2004 - its line 8


class _Server:
    """One server process with its children, kept by a keeper."""

    def __init__(self, name: str, answers: Callable[[int], bool]) -> None:
        self._name = name
        self._answers = answers
        self._keeper = _KeeperPipe()
        self._argv: list[str] = []
        self._pid = 0  # 0: none runs
        self._paused: list[int] = []
        self.folder = self._keeper.data_dir

    def start(self, argv: list[str]) -> None:
        self._argv = argv
        self._pid = self._keeper.ask("start", name=self._name, argv=argv, log=str(self.folder / "log"))
        deadline = time.monotonic() + _START_DEADLINE_S
        while not self._answers(self._pid):
            code = self._keeper.ask("poll", name=self._name)
            if code is not None or time.monotonic() > deadline:
                why = "does not answer" if code is None else f"ended (exit code {code})"
                lines = (self.folder / "log").read_text(errors="replace").splitlines()[-_LOG_LINES:]
                raise LocalServerError("\n".join((f"{self._name} {why}. Its log ends:", *lines)))
            time.sleep(_POLL_S)

    def kill(self) -> None:
        if not self._pid:
            return
        self.pause()  # else it could make children while they are counted
        _signal(self._paused, signal.SIGKILL)
        self._keeper.ask("kill", name=self._name)
        _wait_for(self._paused, _gone)
        self._pid, self._paused = 0, []

    def restart(self) -> None:
        self.kill()
        self.start(self._argv)

    def pause(self) -> None:
        if self._paused or self._keeper.ask("poll", name=self._name) is not None:
            return
        self._keeper.ask("pause", name=self._name)
        # Each of PostgreSQL's children leads a session of its own: there is no group of processes to signal.
        children = _children(self._pid)
        _signal(children, signal.SIGSTOP)
        _wait_for(children, _stopped)
        self._paused = [self._pid, *children]

    def resume(self) -> None:
        _signal(reversed(self._paused), signal.SIGCONT)
        self._paused = []

    def stop(self, polite: signal.Signals) -> None:
        """Ask it to end and, if it does not, kill it; then remove its folder."""
        try:
            if self._pid and os.getpid() == self._keeper._owner:
                self.resume()
                _signal([self._pid], polite)
                deadline = time.monotonic() + _STOP_DEADLINE_S
                while self._keeper.ask("poll", name=self._name) is None and time.monotonic() < deadline:
                    time.sleep(_POLL_S)
                self.kill()
        finally:
            self._keeper.close()

    @contextmanager
    def stopped_on_error(self) -> Iterator[None]:
        """A start that fails leaves nothing running."""
        try:
            yield
        except BaseException:
            self.stop(signal.SIGTERM)
            raise


def _find(program: str, folders: Iterable[Path], package: str) -> str:
    found = next((path for folder in ("", *folders) if (path := shutil.which(program, path=str(folder) or None))), None)
    if found is None:
        raise ServerNotInstalled(f"there is no {program} on PATH: install it (Debian: apt-get install {package})")
    return found


def _quoted(value: object) -> str:
    text = str(value)
    return f'"{text}"' if not text or " " in text else text


def _somebody_else() -> pwd.struct_passwd | None:
    """Whom PostgreSQL runs as; None: as whoever runs us."""
    if os.geteuid() != 0:
        return None
    with suppress(KeyError):
        return pwd.getpwnam("postgres")
    return pwd.getpwnam("nobody")


def _as_somebody_else() -> list[str]:
    who = _somebody_else()
    if who is None:
        return []
    # A change of user takes away the signal that comes when the parent dies, so it is asked for again.
    change = ["--reuid", str(who.pw_uid), "--regid", str(who.pw_gid), "--clear-groups", "--pdeathsig", "KILL"]
    return [_find("setpriv", [], "util-linux"), *change]


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # not Linux, or it ended just now
        return []


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _state(pid: int) -> str:
    """The letter of ``ps``; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def _gone(pid: int) -> bool:
    return _state(pid) in {"", "Z"}


def _stopped(pid: int) -> bool:
    return _state(pid) in {"", "Z", "T"}


def _wait_for(pids: Iterable[int], reached: Callable[[int], bool]) -> None:
    deadline = time.monotonic() + _STOP_DEADLINE_S
    for pid in pids:
        while not reached(pid):
            if time.monotonic() > deadline:
                raise LocalServerError(f"process {pid} is still in state {_state(pid)!r}")
            time.sleep(_POLL_S / 10)
