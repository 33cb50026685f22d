"""``kafka-guarantees bench``: from what was asked for on the command line to the figures and a report."""

from __future__ import annotations

import shlex
import sys
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException

from kafka_guarantees import DurabilityWarning, SecurityWarning
from kafka_guarantees.demo.screen import Screen
from kafka_guarantees.errors import MISSING_ACL, describe, kafka_error
from kafka_guarantees.prove.command import OF_EACH, check_report
from kafka_guarantees.testing.local_kafka import LocalKafka

from .report import as_html, as_json, as_text
from .run import PREFIX, bench
from .work import CLASSES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .plan import Plan

RIGHTS = (
    "bench needs CREATE, READ, WRITE, DELETE on topics, READ and DELETE on groups, WRITE on transactional ids, all with the "
    f"prefix '{PREFIX}'"
)


class Refused(Exception):
    """The brokers do not answer, or refuse what is needed."""


@dataclass(frozen=True)
class Asked:
    """What the command line says. See its help."""

    config: Mapping[str, Any] = field(repr=False)
    plan: Plan
    report: Path
    config_file: Path | None = None


def run_bench(asked: Asked) -> None:
    """Do what was asked for, write the report, and print the figures.

    Raises:
        ValueError: a setting contradicts a guarantee. Nothing was connected.
        OSError: the report cannot be written.
        LocalKafkaError: no Kafka could be started.
        Refused: the Kafka that runs already does not answer, or refuses what is needed.
        WorkFailed: a process could not do its work.
    """
    config = {key: value for key, value in asked.config.items() if key not in OF_EACH}
    _refuse_weaker(config)
    if not asked.report.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {asked.report.parent} for the report")
    check_report(asked.report)
    screen = Screen(sys.stderr)
    screen.say(_opening(asked.plan))
    with _kafka(config) as reached, tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        try:
            measured = bench(asked.plan, reached, Path(folder), screen, shlex.join(_command(asked)))
        except KafkaException as exc:
            error = kafka_error(exc)
            rights = f" {RIGHTS}." if error.code() in MISSING_ACL else ""
            raise Refused(f"the brokers refuse, or do not answer ({describe(error)}).{rights}") from exc
    asked.report.write_text(as_html(measured), encoding="utf-8")
    asked.report.with_suffix(".json").write_text(as_json(measured), encoding="utf-8")
    print(f"{as_text(measured)}\nThe report, with the plot: {asked.report}")  # noqa: T201 - a command prints


def _refuse_weaker(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that one of the guarantees refuses, before anything is started."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DurabilityWarning)  # the processes log them
        warnings.simplefilter("ignore", SecurityWarning)
        for guarantee in CLASSES.values():
            guarantee.explain(config)


@contextmanager
def _kafka(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The properties that reach the cluster: the user's, or one that is started."""
    if "bootstrap.servers" in config:
        yield config
        return
    with LocalKafka(brokers=1, full_jvm=True) as kafka:
        yield {**config, "bootstrap.servers": kafka.bootstrap}


def _opening(plan: Plan) -> str:
    megabytes = plan.records * plan.size / 1e6
    copies = f"{plan.replication} replicas" if plan.replication else "as many replicas as there are brokers, three at most"
    return (
        f"Writes {plan.records:,} records of {plan.size:,} bytes, {megabytes:,.0f} MB, with {copies}, to topics of its own, "
        f"{PREFIX}*, which are deleted at the end."
    )


def _command(asked: Asked) -> list[str]:
    """The command that repeats it. Settings of --set are left out: they may hold a secret."""
    plan, where = asked.plan, asked.config.get("bootstrap.servers")
    return [
        *("kafka-guarantees", "bench"),
        *(("-b", str(where)) if where else ()),
        *(("--config", str(asked.config_file)) if asked.config_file is not None else ()),
        *("--messages", str(plan.messages), "--size", str(plan.size), "--seconds", str(plan.seconds)),
        *("--partitions", str(plan.partitions)),
        *(("--replication", str(plan.replication)) if plan.replication else ()),
    ]
