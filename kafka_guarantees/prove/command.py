"""``kafka-guarantees prove``: from what was asked for on the command line to a report and a verdict."""

from __future__ import annotations

import fcntl
import os
import random
import stat
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kafka_guarantees import DurabilityWarning
from kafka_guarantees.demo.screen import logging_to
from kafka_guarantees.demo.topics import shortest_session

from .faults import Fault, fault, possible
from .report import as_html, as_json, as_text
from .run import Plan, prove
from .screen import Screen
from .worker import CLASSES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

SESSION = 3000  # milliseconds; brokers that other people run may insist on more
OURS = (".history", ".log", ".dump")  # suffixes of what a run writes into its folder
OF_EACH = ("group.id", "group.instance.id", "transactional.id", "client.id")  # of each worker; never the user's own
ENCRYPTED = ("SSL", "SASL_SSL")  # of security.protocol: a proxy cannot look into it


@dataclass(frozen=True)
class Asked:
    """What the command line says. See its help."""

    guarantee: str
    config: Mapping[str, Any] = field(repr=False)
    brokers: int | None
    duration: float
    workers: int
    partitions: int
    faults: Sequence[str] | None
    seed: int | None
    protocol: str
    report: Path
    config_file: Path | None = None

    @property
    def local(self) -> bool:
        """Whether the cluster is made for it."""
        return "bootstrap.servers" not in self.config


def run_proof(asked: Asked) -> bool:
    """Do what was asked for, write the report, and print the verdict.

    Returns:
        True where every check held, and enough happened to say so.

    Raises:
        ValueError: something cannot be, or contradicts the guarantee, or what a proof sets itself.
        OSError: the report cannot be written.
        LocalKafkaError: no Kafka could be started.
        KafkaException: the Kafka that runs already does not answer, or refuses what is needed.
    """
    faults = _faults(asked)
    seed = random.SystemRandom().randrange(10**6) if asked.seed is None else asked.seed
    protocol = _protocol(asked)
    _refuse_weaker(asked)
    check_report(asked.report)
    session = _session(asked)
    with _own_folder(asked.report) as folder:
        for earlier in (asked.report, asked.report.with_suffix(".json")):
            earlier.unlink(missing_ok=True)  # what stands beside this run's files is this run's, or nothing
        plan = Plan(
            guarantee=asked.guarantee,
            faults=faults,
            seed=seed,
            folder=folder,
            duration=asked.duration,
            workers=asked.workers,
            partitions=asked.partitions,
            brokers=(asked.brokers or 3) if asked.local else 0,
            protocol=protocol,
            config={key: value for key, value in asked.config.items() if key not in {*OF_EACH, "group.protocol"}},
            session=session,
        )
        with logging_to(folder / "driver.log"), Screen() as screen:
            screen.say(_opening(asked, faults, seed))
            proof = prove(plan, screen, _command(asked, faults, seed))
        try:
            print(as_text(proof), flush=True)  # noqa: T201 - a command prints; first, should the disk be full
        finally:
            asked.report.write_text(as_html(proof), encoding="utf-8")
            asked.report.with_suffix(".json").write_text(as_json(proof), encoding="utf-8")
    print(f"The report: {asked.report}. Histories, logs and dumps: {folder}")  # noqa: T201 - likewise
    return proof.outcome == "held"


def check_report(path: Path) -> None:
    """Refuse a place where the report cannot be, before there is one to be lost.

    Raises:
        ValueError, OSError: it cannot be there.
    """
    if path.suffix == ".json":
        raise ValueError(f"{path}: the page would be overwritten by the JSON that is put beside it; give it another suffix")
    for each in (path, path.with_suffix(".json")):
        if (each.exists() and not each.is_file()) or not os.access(each if each.exists() else each.parent, os.W_OK):
            raise OSError(f"{each} is no file, or may not be written to: choose another --report")


def _faults(asked: Asked) -> list[Fault]:
    """The faults that were named, or all that are possible.

    Raises:
        ValueError: one is not known, or not possible on this cluster.
    """
    visible = str(asked.config.get("security.protocol", "PLAINTEXT")).upper() not in ENCRYPTED
    all_of_them = possible(asked.guarantee, brokers=asked.local, connections=visible)
    if asked.faults is None:
        return all_of_them
    chosen = [fault(name, asked.guarantee) for name in asked.faults if name != "none"]
    for one in chosen:
        if one.lane not in {each.lane for each in all_of_them}:
            why = "the brokers are not ours to hurt" if visible else "a connection with TLS cannot be looked into"
            raise ValueError(f"{one.name} is not possible here: {why}. Use a local cluster (without -b), or leave it out.")
    return chosen


def _refuse_weaker(asked: Asked) -> None:
    """Refuse a configuration that the guarantee refuses, before anything is started."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DurabilityWarning)  # the report says what was proven
        CLASSES[asked.guarantee].explain(asked.config)


def _protocol(asked: Asked) -> str:
    """Of the groups: where nothing was asked for, what the configuration says.

    Raises:
        ValueError: the two contradict each other.
    """
    theirs = str(asked.config.get("group.protocol", "")).lower()
    if theirs == "consumer" and asked.protocol == "mixed":
        return "consumer"
    if theirs and (theirs == "consumer") != (asked.protocol == "consumer"):
        raise ValueError(f"group.protocol={theirs} and --protocol {asked.protocol} contradict each other: leave one out.")
    return asked.protocol


def _session(asked: Asked) -> int:
    """Milliseconds: what the configuration says, or as short as the brokers allow."""
    given = asked.config.get("session.timeout.ms")
    if given is not None:
        return int(given)
    return SESSION if asked.local else max(SESSION, shortest_session(asked.config))


@contextmanager
def _own_folder(report: Path) -> Iterator[Path]:
    """An empty folder beside the report, for this run alone. What an earlier run has left in it is removed, and nothing else.

    Raises:
        ValueError: another run writes into it: their histories would be mixed. Or it is somebody else's, who could have links
            there in the place of files.
    """
    folder = report.with_name(f"{report.stem}-files")
    report.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{folder} is somebody else's, or others may write to it: choose another --report, or remove it")
    with (folder / "driver.log").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back when the process is gone, however it went
        except BlockingIOError:
            raise ValueError(f"another proof writes into {folder}: choose another --report, or wait until it is over") from None
        lock.truncate(0)
        for path in folder.iterdir():
            if path.suffix in OURS and path.name != "driver.log":
                path.unlink()
        yield folder


def _command(asked: Asked, faults: Sequence[Fault], seed: int) -> list[str]:
    """The command that repeats it."""
    where = ["-b", str(asked.config["bootstrap.servers"])] if not asked.local else ["--brokers", str(asked.brokers or 3)]
    return [
        *("kafka-guarantees", "prove", asked.guarantee, *where),
        *(("--config", str(asked.config_file)) if asked.config_file is not None else ()),
        *("--duration", f"{asked.duration:g}", "--workers", str(asked.workers), "--partitions", str(asked.partitions)),
        *("--protocol", _protocol(asked), "--faults", ",".join(one.text for one in faults) or "none", "--seed", str(seed)),
    ]


def _opening(asked: Asked, faults: Sequence[Fault], seed: int) -> str:
    where = f"{asked.brokers or 3} local brokers" if asked.local else "the cluster that runs already"
    what = ", ".join(one.text for one in faults) or "no faults"
    return f"Proving {asked.guarantee} on {where}: {asked.duration:.0f} s of {what}. Seed {seed}."
