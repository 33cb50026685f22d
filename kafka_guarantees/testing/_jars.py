"""Kafka's jars: resolved once by Maven from the pom.xml beside this file, then taken from the user's cache.

Rules.
    * A cache folder is complete or absent: it is filled under another name and renamed.
    * One process fills it (a file lock), for Maven's own repository cannot be written by two at once either.
    * The folder's name carries the hash of the pom, so another version of Kafka is another folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kafka_guarantees.errors import KafkaGuaranteesError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

POM = Path(__file__).with_name("pom.xml")
KAFKA_VERSION = "4.3.1"
LIB = "lib"
CHECKPOINT = "bootstrap.checkpoint"

_NO_JAVA = "LocalKafka needs Java 17 or newer on the PATH: install a JRE, for example the package openjdk-17-jre-headless."
_NO_MAVEN = "LocalKafka needs Maven (mvn) on the PATH to fetch Kafka's jars once: install it, for example the package maven."
_TIMEOUT_S = 600
_ERROR_LINES = 20


class LocalKafkaError(KafkaGuaranteesError):
    """The local Kafka could not be started or told what to do. The message ends with what its log says."""


def java() -> str:
    """The path of the ``java`` command."""
    return _on_the_path("java", _NO_JAVA)


def explain_java(output: str) -> str:
    """The sentence for a Java that is too old for Kafka, or "" when the output does not say so."""
    return _NO_JAVA if "UnsupportedClassVersionError" in output else ""


def kafka_home() -> Path:
    """The folder with Kafka's jars (``lib``) and the ``bootstrap.checkpoint`` that its storage tool writes.

    The first call on a machine takes about ten seconds and needs Maven.

    Raises:
        LocalKafkaError: ``mvn`` or ``java`` is missing, or failed; the message has its last lines.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kafka-guarantees"
    home = caches / f"kafka-{KAFKA_VERSION}-{hashlib.sha256(POM.read_bytes()).hexdigest()[:12]}"
    if home.is_dir():
        return home
    caches.mkdir(parents=True, exist_ok=True)
    with _locked(home.with_suffix(".lock")):
        if not home.is_dir():
            _fill(home)
    return home


def _fill(home: Path) -> None:
    filling = home.with_suffix(".filling")
    shutil.rmtree(filling, ignore_errors=True)  # left by a process that was killed: we hold the lock
    filling.mkdir()
    _resolve(filling)
    _format(filling)
    filling.rename(home)


def _resolve(home: Path) -> None:
    mvn = _on_the_path("mvn", _NO_MAVEN)
    shutil.copy(POM, home)
    run([mvn, "-q", "-B", "dependency:copy-dependencies", f"-DoutputDirectory={LIB}", "-DincludeScope=runtime"], home)


def _format(home: Path) -> None:
    """Keep what ``StorageTool format`` writes for this version of Kafka: LocalKafka copies it for each new broker.

    The file says which features the cluster begins with; nothing in it belongs to one cluster or node. Running the
    tool for each broker instead costs 1.5 s of processor time each.
    """
    scratch, config = home / "scratch", home / "scratch.properties"
    config.write_text(
        "process.roles=broker,controller\nnode.id=0\ncontroller.quorum.voters=0@127.0.0.1:9093\n"
        "listeners=PLAINTEXT://127.0.0.1:9092,CONTROLLER://127.0.0.1:9093\n"
        f"controller.listener.names=CONTROLLER\nlog.dirs={scratch}\n"
    )
    tool = [java(), "-cp", f"{home / LIB}/*", "kafka.tools.StorageTool", "format"]
    run([*tool, "-t", "AAAAAAAAAAAAAAAAAAAAAQ", "-c", str(config)], home)
    (scratch / CHECKPOINT).rename(home / CHECKPOINT)
    shutil.rmtree(scratch)
    config.unlink()


def run(argv: Sequence[str], cwd: Path, timeout_s: float = _TIMEOUT_S) -> None:
    """Run one of Java's tools.

    Raises:
        LocalKafkaError: it failed; the message has its last lines.
    """
    done = subprocess.run(  # noqa: S603 - a fixed command, without a shell
        argv,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-_ERROR_LINES:])
        why = explain_java(done.stdout) or f"{Path(argv[0]).name} failed (exit code {done.returncode})."
        raise LocalKafkaError(f"{why}\n{tail}")


def _on_the_path(command: str, otherwise: str) -> str:
    found = shutil.which(command)
    if found is None:
        raise LocalKafkaError(otherwise)
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back by closing the file, also when this process is killed
        yield
