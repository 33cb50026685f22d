"""Starts workers, feeds them, hurts them, and reads what is left.

Rules.
* A fault is aimed at a process that this file started, by its pid.
* Whatever the faults were, in the end all workers run undisturbed until the group's offsets have reached the end of the input:
  that is what "lost" is measured against (H02, H10).
* The random generator comes in, so that its seed tells how to see a failure again; the instants still differ.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition

from . import checks
from .worker import CRASHED, Job

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from kafka_guarantees.testing.local_kafka import RunningKafka

ROOT = Path(__file__).parents[2]
PROTOCOLS: dict[str, dict[str, Any]] = {
    "range": {"session.timeout.ms": 1500, "heartbeat.interval.ms": 300},
    "cooperative": {
        "session.timeout.ms": 1500,
        "heartbeat.interval.ms": 300,
        "partition.assignment.strategy": "cooperative-sticky",
    },
    "consumer": {"group.protocol": "consumer"},  # its session is the brokers' setting
}


@contextmanager
def _reader(bootstrap: str, group: str) -> Iterator[Consumer]:
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": group,
            "isolation.level": "read_committed",  # also makes the brokers answer with stable offsets only (H08)
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    try:
        yield consumer
    finally:
        consumer.close()


def _committed(reader: Consumer, partitions: list[TopicPartition]) -> list[int]:
    try:
        return [partition.offset for partition in reader.committed(partitions, 10)]
    except KafkaException:
        return []  # the coordinator is moving: it is asked again


def read_to_end(bootstrap: str, topic: str, partitions: int, within: float = 60.0) -> list[checks.Seen]:
    """The committed view of a topic, from the beginning to the end of all partitions (H02, H03)."""
    deadline = time.monotonic() + within
    found: list[checks.Seen] = []
    unfinished = set(range(partitions))
    with _reader(bootstrap, f"reader-{uuid.uuid4().hex}") as reader:
        reader.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in unfinished])
        while unfinished:
            assert time.monotonic() < deadline, f"no end of {topic} {unfinished} within {within} s: an open transaction?"
            for message in reader.consume(1000, 0.1):
                error, partition = message.error(), message.partition() or 0
                if error is None:
                    found.append(checks.Seen(partition, message.offset() or 0, (message.value() or b"").decode()))
                elif error.code() == KafkaError._PARTITION_EOF:
                    unfinished.discard(partition)
    return found


class Feed(threading.Thread):
    """Writes numbered messages at a steady rate until it is told to end, all acknowledged."""

    def __init__(self, bootstrap: str, topic: str, partitions: int, rate: int) -> None:
        super().__init__(name="feed", daemon=True)
        self._producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 5})
        self._topic, self._partitions, self._rate = topic, partitions, rate
        self._end = threading.Event()
        self.written = 0
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        while not self._end.wait(0.01):
            for number in range(self.written, int((time.monotonic() - began) * self._rate)):
                self._producer.produce(self._topic, str(number), partition=number % self._partitions)
                self.written = number + 1
            self._producer.poll(0)

    def end(self) -> None:
        self._end.set()
        self.join()
        assert self._producer.flush(60) == 0, "the feed was not acknowledged"


class Crew:
    """Some workers of one group. One that ends by itself is started again, and its exception kept.

    Args:
        kafka: where.
        directory: for histories and logs.
        job: what the class and its settings are; the rest is filled in here.
        size: how many workers.
        program: the module that they run.
    """

    def __init__(
        self, kafka: RunningKafka, directory: Path, job: Job, *, size: int = 3, program: str = "tests.chaos.worker"
    ) -> None:
        self.bootstrap = kafka.bootstrap
        self.job = job
        self.group = str(job.config["group.id"])
        self._directory = directory
        self._program = program
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._paused: set[int] = set()
        self.slots = range(size)
        self.kills = 0
        self.exits: list[int] = []

    # -- workers ------------------------------------------------------------------------------------------------------

    def start(self, slot: int) -> None:
        """Start a worker; ``slot`` decides its transactional.id."""
        config = dict(self.job.config)
        if self.job.guarantee == "ExactlyOnce":
            config["transactional.id"] = f"{self.group}-{slot}"
        # inherited: a worker that has not got as far as its own handler must not die of a signal of the storm
        before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            self._spawn(slot, config)
        finally:
            signal.signal(signal.SIGUSR1, before)

    def _spawn(self, slot: int, config: dict[str, Any]) -> None:
        with (self._directory / f"worker-{slot}.log").open("ab") as log:
            self._workers[slot] = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", self._program, replace(self.job, config=config).to_json()],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def start_all(self) -> None:
        """Start all of them."""
        for slot in self.slots:
            self.start(slot)

    def tend(self) -> None:
        """Start again whoever has ended by itself."""
        for slot in self.slots:
            worker = self._workers.get(slot)
            if worker is not None and worker.poll() is not None:
                self.exits.append(worker.returncode)
                self.start(slot)

    def send(self, slot: int, number: int) -> None:
        """Send a signal to a worker that runs."""
        self._workers[slot].send_signal(number)

    def kill(self, slot: int) -> None:
        """SIGKILL; returns when it is gone."""
        self.send(slot, signal.SIGKILL)
        self._workers.pop(slot).wait()
        self._paused.discard(slot)
        self.kills += 1

    def pause(self, slot: int) -> None:
        """SIGSTOP."""
        self.send(slot, signal.SIGSTOP)
        self._paused.add(slot)

    def resume(self, slot: int) -> None:
        """SIGCONT."""
        self._paused.discard(slot)
        self.send(slot, signal.SIGCONT)

    def stop(self, slot: int, *, within: float = 10.0) -> float:
        """SIGTERM, and how long it took. Fails where that is longer than ``within``, or the worker does not end cleanly."""
        began = time.monotonic()
        self.send(slot, signal.SIGTERM)
        worker = self._workers.pop(slot)
        try:
            code = worker.wait(within)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            raise AssertionError(f"worker {slot} did not end within {within} s of SIGTERM: {self.log(slot)}") from None
        self.exits.append(code)
        assert code in (0, CRASHED, -signal.SIGTERM), f"worker {slot} ended with {code}: {self.log(slot)}"
        return time.monotonic() - began

    def running(self, slot: int) -> bool:
        """True while the worker has a process."""
        return slot in self._workers and self._workers[slot].poll() is None

    def stop_all(self) -> None:
        """SIGTERM to all."""
        for slot in list(self._workers):
            self.stop(slot)

    def end(self) -> None:
        """Nothing is left, whatever happened."""
        for worker in self._workers.values():
            worker.kill()
        for worker in self._workers.values():
            worker.wait()

    def log(self, slot: int, size: int = 3000) -> str:
        """The end of what a worker wrote."""
        path = self._directory / f"worker-{slot}.log"
        return path.read_text(errors="replace")[-size:] if path.exists() else ""

    def crashes(self) -> list[dict[str, Any]]:
        """The exceptions that ended workers."""
        path = Path(self.job.crashes)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until_history_grows(self, within: float = 30.0) -> None:
        """Wait until something is being handled."""
        deadline = time.monotonic() + within
        path = Path(self.job.history)
        while not path.exists() or not path.stat().st_size:
            assert time.monotonic() < deadline, f"nothing was handled within {within} s: {self.log(0)}"
            time.sleep(0.05)

    # -- what is left -------------------------------------------------------------------------------------------------

    def drain(self, within: float = 60.0) -> None:
        """Wait until the group has finished the input: its committed offsets are the end of it."""
        for slot in self.slots:
            if slot in self._paused:
                self.resume(slot)
            if slot not in self._workers:
                self.start(slot)
        deadline = time.monotonic() + within
        partitions = [TopicPartition(self.job.source, number) for number in range(self.job.partitions)]
        with _reader(self.bootstrap, self.group) as reader:
            ends = [reader.get_watermark_offsets(partition, timeout=30)[1] for partition in partitions]
            while (offsets := _committed(reader, partitions)) != ends:
                self.tend()
                if time.monotonic() > deadline:
                    logs = "\n".join(f"--- worker {slot}\n{self.log(slot)}" for slot in self.slots)
                    raise AssertionError(f"not drained within {within} s: {offsets} of {ends}; {self.crashes()}\n{logs}")
                time.sleep(0.1)

    def outcome(self) -> checks.Outcome:
        """Read the topics and the history."""

        def seen(topic: str) -> list[checks.Seen]:
            return read_to_end(self.bootstrap, topic, self.job.partitions)

        path = Path(self.job.history)
        history = checks.effects(path.read_text() if path.exists() else "")
        return checks.Outcome(seen(self.job.source), seen(self.job.sink), history)

    def verdict(self) -> list[str]:
        """What the outcome has against the guarantee."""
        return checks.complaints(self.job.guarantee, self.outcome())


@contextmanager
def crew(
    kafka: RunningKafka,
    directory: Path,
    guarantee: str,
    protocol: str,
    *,
    partitions: int = 8,
    size: int = 3,
    rate: int = 1000,
    program: str = "tests.chaos.worker",
    patience: float = 60.0,
    **job: Any,
) -> Iterator[Crew]:
    """Workers of one group at work on a topic that is being fed. When the block ends well, they are drained."""
    name = f"{guarantee}-{protocol}-{uuid.uuid4().hex[:8]}".lower()
    directory = directory / name
    directory.mkdir(parents=True)
    for topic in (f"{name}-in", f"{name}-out"):
        kafka.create_topic(topic, partitions)
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": name, **PROTOCOLS[protocol], **job.pop("config", {})}
    if guarantee == "ExactlyOnce":
        config = {"transaction.timeout.ms": 5000, **config}
    arguments = {"start": "earliest", **job.pop("arguments", {})}
    if program != "tests.chaos.worker":
        config.pop("transaction.timeout.ms", None)
    work = Job(
        guarantee=guarantee,
        config=config,
        arguments=arguments,
        source=f"{name}-in",
        sink=f"{name}-out",
        partitions=partitions,
        history=str(directory / "history"),
        crashes=str(directory / "crashes"),
        **job,
    )
    team = Crew(kafka, directory, work, size=size, program=program)
    feed = Feed(kafka.bootstrap, f"{name}-in", partitions, rate)
    try:
        team.start_all()
        yield team
        feed.end()
        team.drain(patience)
        team.stop_all()
    finally:
        feed.end()
        team.end()


# -- faults, at several crews at once ------------------------------------------------------------------------------------


def kill_at_random(teams: Sequence[Crew], chance: random.Random, kills: int, longest: float = 0.8) -> None:
    """SIGKILL one worker of every crew after the other, each started again at once."""
    for _ in range(kills):
        for team in teams:
            time.sleep(chance.uniform(0.02, longest) / len(teams))
            team.tend()
            slot = chance.choice(team.slots)
            team.kill(slot)
            team.start(slot)


def pause_at_random(teams: Sequence[Crew], chance: random.Random, rounds: int, shortest: float, longest: float) -> None:
    """SIGSTOP one worker of every crew for a while, so that others take its work over, then SIGCONT."""
    for _ in range(rounds):
        slots = []
        for team in teams:
            time.sleep(chance.uniform(0.2, 0.5))
            team.tend()
            slots.append(chance.choice(team.slots))
            team.pause(slots[-1])
        time.sleep(chance.uniform(shortest, longest))
        for team, slot in zip(teams, slots, strict=True):
            team.resume(slot)
            time.sleep(chance.uniform(0, 0.2))


def come_and_go(teams: Sequence[Crew], chance: random.Random, rounds: int) -> None:
    """SIGTERM one worker of every crew after the other; each is back a moment later."""
    for _ in range(rounds):
        for team in teams:
            time.sleep(chance.uniform(0.2, 0.6))
            team.tend()
            slot = chance.choice(team.slots)
            team.stop(slot)
            time.sleep(chance.uniform(0, 0.2))
            team.start(slot)


def interrupt_at_random(teams: Sequence[Crew], chance: random.Random, signals: int, longest: float = 0.15) -> None:
    """SIGUSR1, which raises in the workers, to one of every crew after the other."""
    for _ in range(signals):
        time.sleep(chance.uniform(0.02, longest))
        for team in teams:
            team.tend()
            team.send(chance.choice(team.slots), signal.SIGUSR1)
