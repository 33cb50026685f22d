"""The measuring, from the topics to the figures: each measure in a process of its own, all in turn."""

from __future__ import annotations

import itertools
import os
import platform
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from kafka_guarantees.prove.topics import OwnTopics

from . import plan as plans
from .figures import Bench, Latency, Row, Spread, row_of, spread
from .latency import Ages, Audience, Echoes
from .plan import GUARANTEES, MEASURES, RATE, TRANSFORMS, Measure
from .process import Process

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kafka_guarantees.demo.screen import Screen

    from .plan import Plan

PREFIX = "kafka-guarantees-bench-"
FEW = 20_000  # messages: their readers read all of them; of more they read one partition, to take less from what is measured
CREATED = {"message.timestamp.type": "CreateTime"}  # the age of a record is told by when it was produced


def bench(plan: Plan, config: Mapping[str, Any], folder: Path, screen: Screen, repeat: str) -> Bench:
    """Measure everything, on a cluster that runs.

    Args:
        plan: how much.
        config: librdkafka's properties that reach the cluster.
        folder: for the logs of processes.
        screen: where it says how far it is.
        repeat: the command that repeats it, for the report.

    Raises:
        KafkaException, TimeoutError: the cluster does not answer, or refuses what is needed.
        WorkFailed: a process could not do its work.
    """
    began, date = time.monotonic(), datetime.now(timezone.utc)
    with OwnTopics(
        config,
        PREFIX,
        ("in", "out", *GUARANTEES),
        partitions=plan.partitions,
        replication=plan.replication,
        settings=CREATED,
    ) as topics:
        run = _Run(plan, config, folder, screen, topics)
        rows = run.throughput()
        return Bench(
            version=run.version,
            command=repeat,
            began=date.isoformat(timespec="seconds"),
            size=plan.size,
            setting=run.setting(),
            rows=rows,
            latencies=[run.latency(guarantee) for guarantee in GUARANTEES],
            seconds=time.monotonic() - began,
        )


class _Run:
    def __init__(self, plan: Plan, config: Mapping[str, Any], folder: Path, screen: Screen, topics: OwnTopics) -> None:
        self._plan, self._config, self._folder, self._screen, self._topics = plan, config, folder, screen, topics
        self._numbers = itertools.count(1)
        self._done, self._of = 0, 1 + plans.ROUNDS * len(MEASURES) + len(TRANSFORMS) + len(GUARANTEES)
        self.version = ""

    def throughput(self) -> list[Row]:
        """Every measure, in turn."""
        self._work(Measure("produce", "at-least-once"), self._topics.topics["in"])
        results: dict[Measure, list[dict[str, Any]]] = {measure: [] for measure in MEASURES}
        for _ in range(plans.ROUNDS):
            for measure in MEASURES:
                results[measure].append(self._work(measure))
        readable = {measure: self._watched(measure) for measure in TRANSFORMS}
        return [row_of(measure, results[measure], readable.get(measure)) for measure in MEASURES]

    def setting(self) -> dict[str, str]:
        """What it was measured with."""
        plan, topics = self._plan, self._topics
        return {
            "cluster": str(self._config["bootstrap.servers"]),
            "messages": f"{plan.messages:,} of {plan.size:,} bytes",
            "topics": f"{plan.partitions} partitions, replication {topics.replication}",
            "rounds": str(plans.ROUNDS),
            "latency": f"{RATE} messages/s for {plan.seconds} s",
            "this machine": f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        }

    def _work(self, measure: Measure, output: str | None = None) -> dict[str, Any]:
        """Do it once. Whatever consumes is a new group."""
        self._say(str(measure))
        with Process(self._job(measure, output), self._folder) as process:
            result = process.result()
        self.version = str(result["version"])
        return result

    def _watched(self, measure: Measure) -> Spread | None:
        """How old results are when they can be read, at full load: measured apart, since the reader takes its part."""
        few = measure.messages(self._plan.messages) < FEW
        ages = Ages()
        with Audience(self._config, self._topics.topics["out"], range(self._plan.partitions if few else 1), ages.note):
            self._work(measure)
        return spread(ages.seconds)

    def latency(self, guarantee: str) -> Latency:
        """From sending to reading a copy, at low traffic."""
        self._say(f"latency, {guarantee}, for {self._plan.seconds} s")
        source, sink = self._topics.topics[guarantee], self._topics.topics["out"]
        echoes = Echoes(self._config, source, self._plan.size, self._plan.echoes)
        job = {**self._job(Measure("echo", guarantee)), "input": source, "messages": echoes.all}
        with (
            Audience(self._config, sink, range(self._plan.partitions), echoes.note),
            Process(job, self._folder) as process,
        ):
            process.ready()
            seconds = echoes.send_all()
        return Latency(guarantee, spread(seconds), self._plan.echoes - len(seconds))

    def _job(self, measure: Measure, output: str | None = None) -> dict[str, Any]:
        name = f"{self._topics.prefix}-{next(self._numbers)}"
        if measure.work != "produce":
            self._topics.groups[name] = name
        return {
            "work": measure.work,
            "guarantee": measure.guarantee,
            "bootstrap": self._config["bootstrap.servers"],
            "config": dict(self._config),
            "input": self._topics.topics["in"],
            "output": output or self._topics.topics["out"],
            "messages": measure.messages(self._plan.messages),
            "size": self._plan.size,
            "batch": measure.batch,
            "group": name,
            "transactional_id": name,
            **({"transactions_in_flight": measure.in_flight} if measure.in_flight else {}),
        }

    def _say(self, what: str) -> None:
        self._done += 1
        self._screen.progress(lambda: f"{self._done:3} of {self._of}  {what}")
