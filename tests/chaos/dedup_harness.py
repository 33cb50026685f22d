"""Feeds workers with messages that come two or three times, hurts the workers and the server of their store, counts effects.

Rules.
* A fault is aimed at a process that the tests started.
* Each fault waits until messages are being handled again: one that strikes a group that stands still shows nothing.
* In the end all run undisturbed until the input is finished: that is what "lost" is measured against (H02, H10).
"""

from __future__ import annotations

import heapq
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psycopg
from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient

from kafka_guarantees.dedup import PostgresInbox, Source, SqliteInbox

from . import dedup_checks as checks
from .harness import Crew, Feed
from .worker import CRASHED, Job

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from kafka_guarantees.dedup import Inbox
    from kafka_guarantees.testing.local_kafka import RunningKafka

log = logging.getLogger(__name__)

MAX_BATCH = 20
SESSION = 3.0  # seconds
INTERVAL = 8.0  # seconds of max.poll.interval.ms
LEASE = INTERVAL + 60  # seconds that a claim may be waited for, if its owner died and nobody comes with its position
CONFIG = {
    "session.timeout.ms": int(SESSION * 1000),
    "heartbeat.interval.ms": 600,
    "max.poll.interval.ms": int(INTERVAL * 1000),
}
STRATEGIES = ("range", "cooperative-sticky")
GAPS = (2, 60, 3000)  # other sends between two of a message, at most: in one batch, near each other, far apart
AHEAD = 400  # messages that wait to be handled, at most: else a group that is hurt all the time never catches up


class Server(Protocol):
    """A database server that a test may hurt."""

    def kill(self) -> None: ...

    def restart(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Effects:
    """How many lines of a history, so far, are effects."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._read = 0
        self._count = 0
        self._lock = threading.Lock()

    def count(self) -> int:
        """Read what is new."""
        with self._lock:
            if self._path.exists():
                with self._path.open("rb") as history:
                    history.seek(self._read)
                    new = history.read()
                whole = new[: new.rfind(b"\n") + 1]
                self._read += len(whole)
                self._count += whole.count(b"effect ")
            return self._count


class RepeatingFeed(Feed):
    """Sends each message two or three times, into random partitions, with others in between. All are acknowledged.

    Args:
        bootstrap, topic, partitions: where.
        rate: sends in a second, at most.
        chance: decides.
        effects: of which it is not too far ahead.
    """

    def __init__(
        self, bootstrap: str, topic: str, partitions: int, rate: int, *, chance: random.Random, effects: Effects
    ) -> None:
        self._chance = chance
        self._effects = effects
        self._due: list[tuple[int, str]] = []  # a heap: after so many sends it is this message's turn again
        self._sends = 0
        self.sent: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()  # of the partitions
        super().__init__(bootstrap, topic, partitions, rate)

    def run(self) -> None:
        while not self._end.wait(0.02):
            if self.written < self._effects.count() + AHEAD:
                for _ in range(self._rate // 50):
                    self._send_next()
            self._producer.poll(0)
        while self._due:
            self._send(heapq.heappop(self._due)[1])

    def _send_next(self) -> None:
        if self._due and self._due[0][0] <= self._sends:
            self._send(heapq.heappop(self._due)[1])
            return
        name = f"m{self.written}"
        self.written += 1
        at = self._sends
        for _ in range(self._chance.choice((1, 2))):
            at += self._chance.randint(1, self._chance.choice(GAPS))
            heapq.heappush(self._due, (at, name))
        self._send(name)

    def _send(self, name: str) -> None:
        partition = self._chance.randrange(self._partitions)
        self._producer.produce(self._topic, name, f"key of {name}", partition, headers={"message-id": name})
        self.sent[name] += 1
        self.sizes[partition] += 1
        self._sends += 1


class DedupCrew(Crew):
    """Workers of one group with one store or inbox."""

    def __init__(self, kafka: RunningKafka, directory: Path, job: Job, feed: RepeatingFeed, *, size: int) -> None:
        super().__init__(kafka, directory, job, size=size, program="tests.chaos.dedup_worker")
        self.feed = feed
        self.effects = Effects(job.history)
        self.did: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    @property
    def inbox(self) -> bool:
        """Whether the effects are rows of an inbox's database."""
        return self.job.guarantee in {"SqliteInbox", "PostgresInbox", "EffectsApart"}

    def until_at_work(self, messages: int = 1, within: float = 60.0) -> None:
        """Wait until some more messages are handled."""
        began = time.monotonic()
        before = self.effects.count()
        while self.effects.count() < before + messages:
            self.tend()
            assert time.monotonic() < began + within, f"nothing was handled for {within} s: {self.crashes()} {self.log(0)}"
            time.sleep(0.01)
        self.seconds["longest stall"] = max(self.seconds["longest stall"], round(time.monotonic() - began))

    def finish(self) -> None:
        """End the feed, and wait until its messages are finished."""
        self.feed.end()
        began = time.monotonic()
        self.drain(LEASE + 30)
        self.seconds["drain"] = round(time.monotonic() - began)
        self.stop_all()

    def drain(self, within: float = 60.0) -> None:
        """Wait until the input is finished: by the group's offsets, or by those of the inbox, which alone decide there."""
        if not self.inbox:
            super().drain(within)
            return
        for slot in self.slots:
            if slot not in self._workers:
                self.start(slot)
        sources, ends = self._sources()
        deadline = time.monotonic() + within
        with closing(self._open_inbox()) as inbox:
            while (offsets := [offset or 0 for offset in inbox.start_offsets(self.group, sources).values()]) != ends:
                self.tend()
                logs = (f"\n--- worker {slot}\n{self.log(slot)}" for slot in self.slots)
                assert time.monotonic() < deadline, f"not drained in {within} s: {offsets} of {ends}" + "".join(logs)
                time.sleep(0.1)

    def _sources(self) -> tuple[list[Source], list[int]]:
        """The partitions of the input, and where they end."""
        admin = AdminClient({"bootstrap.servers": self.bootstrap})
        (answer,) = admin.describe_topics(TopicCollection([self.job.source])).values()
        topic = answer.result(30)
        halves = topic.topic_id.get_most_significant_bits(), topic.topic_id.get_least_significant_bits()
        topic_id = b"".join((half % 2**64).to_bytes(8, "big") for half in halves)
        sources = [Source(self.job.source, topic_id, number) for number in range(self.job.partitions)]
        return sources, [self.feed.sizes[number] for number in range(self.job.partitions)]

    def _open_inbox(self) -> Inbox[Any]:
        where = self.job.arguments["where"]
        return PostgresInbox(where) if self.job.guarantee == "PostgresInbox" else SqliteInbox(where)

    def any_of_them(self, chance: random.Random) -> int:
        """A slot: mostly of the worker that handled something last, which has a batch in hand."""
        with Path(self.job.history).open("rb") as history:
            history.seek(-min(200, history.seek(0, os.SEEK_END)), os.SEEK_END)
            *_, last = history.read().decode().splitlines()
        at_work = [slot for slot, worker in self._workers.items() if f" {worker.pid} " in last]
        return chance.choice(at_work or self.slots) if chance.random() < 0.8 else chance.choice(self.slots)

    def tried_again(self) -> bool:
        """Whether an effect that was rolled back, or may have been, was tried a second time."""
        tried = [line.name for line in checks.lines(Path(self.job.history).read_text()) if line.what == "effect"]
        return len(tried) > len(set(tried))

    # -- what is left -----------------------------------------------------------------------------------------------------

    def result(self) -> checks.Outcome:
        """The effects and the history."""
        history = checks.lines(Path(self.job.history).read_text())
        effects = self._rows() if self.inbox else Counter(line.name for line in history if line.what == "effect")
        hurt = self.kills + self.did["pause"] + self.exits.count(CRASHED)
        allowed = MAX_BATCH * (hurt + len(self.slots) * (self.did["outage"] + self.did["freeze"]))
        outcome = checks.Outcome(self.feed.sent, effects, history, allowed)
        log.info("%s", self._figures(outcome))
        return outcome

    def _rows(self) -> Counter[str]:
        """How many rows each message has."""
        where, select = self.job.arguments["where"], f"SELECT name FROM {self.job.arguments['table']}"
        if self.job.guarantee == "PostgresInbox":
            with psycopg.connect(where) as connection:
                return Counter(name for (name,) in connection.execute(select.encode()))
        apart = "-apart" if self.job.guarantee == "EffectsApart" else ""
        with closing(sqlite3.connect(where + apart)) as file:
            return Counter(name for (name,) in file.execute(select))

    def _figures(self, outcome: checks.Outcome) -> str:
        counts = Counter(line.what for line in outcome.history)
        figures = {
            "events": len(outcome.sent),
            "sends": sum(outcome.sent.values()),
            "kills": self.kills,
            **{f"{what}s": count for what, count in self.did.items() if what != "kill"},
            "crashes": [crash["error"][:60] for crash in self.crashes()],
            "attempts": counts["effect"],
            "taken over": counts["taken"],
            "late": counts["late"],
            "lost": sum(name not in outcome.effects for name in outcome.sent),
            "repeated": outcome.repeats,
            "allowed": outcome.allowed,
            **{f"{what} s": seconds for what, seconds in self.seconds.items()},
        }
        kind = f"{self.job.guarantee} {self.job.style} {self.job.config['partition.assignment.strategy']}"
        return f"{kind}: " + ", ".join(f"{what} {count}" for what, count in figures.items())


@contextmanager
def dedup_crew(
    kafka: RunningKafka,
    directory: Path,
    kind: str,
    chance: random.Random,
    *,
    where: str | None = None,
    size: int = 3,
    partitions: int = 6,
    rate: int = 600,
    pause: float = 0.005,
) -> Iterator[DedupCrew]:
    """Workers at work on a topic that is being fed. When the block ends well, they finish it.

    Args:
        kafka: where.
        directory: for files.
        kind: the store, inbox or mutant.
        chance: decides on styles, protocols, partitions and repeats.
        where: the server of the store or inbox; None: a file.
        size: how many workers.
        partitions: of the topic.
        rate: sends in a second, at most.
        pause: seconds that handling one message takes.
    """
    name = f"{kind.lower()}-{uuid.uuid4().hex[:8]}"
    directory = directory / name
    directory.mkdir()
    kafka.create_topic(name, partitions)
    styles = ["run", "run_batches"] + ([] if kind.endswith("Inbox") or kind == "EffectsApart" else ["messages"])
    job = Job(
        guarantee=kind,
        config={
            "bootstrap.servers": kafka.bootstrap,
            "group.id": name,
            "partition.assignment.strategy": chance.choice(STRATEGIES),
            **CONFIG,
        },
        source=name,
        sink="",
        partitions=partitions,
        history=str(directory / "history"),
        crashes=str(directory / "crashes"),
        style=chance.choice(styles),
        pause=pause,
        arguments={"where": where or str(directory / "file"), "table": f"effects_{uuid.uuid4().hex}", "max_batch": MAX_BATCH},
    )
    with ExitStack() as stack:
        feed = RepeatingFeed(kafka.bootstrap, name, partitions, rate, chance=chance, effects=Effects(job.history))
        stack.callback(feed.end)
        team = DedupCrew(kafka, directory, job, feed, size=size)
        stack.callback(team.end)
        if team.inbox:
            make_table(job)
        team.start_all()
        team.until_at_work()
        yield team
        team.finish()


def make_table(job: Job) -> None:
    """The table of the effects, which keeps everything that it is given."""
    where, create = job.arguments["where"], f"CREATE TABLE {job.arguments['table']} (name text)"
    if job.guarantee == "PostgresInbox":
        with psycopg.connect(where) as connection:
            connection.execute(create.encode())
        return
    apart = "-apart" if job.guarantee == "EffectsApart" else ""
    with closing(sqlite3.connect(where + apart, isolation_level=None)) as file:
        file.execute(create)


# -- faults ------------------------------------------------------------------------------------------------------------------


def kill(team: DedupCrew, chance: random.Random, _server: Server | None) -> None:
    """SIGKILL a worker; another one joins."""
    slot = team.any_of_them(chance)
    team.kill(slot)
    team.start(slot)


def pause(team: DedupCrew, chance: random.Random, _server: Server | None) -> None:
    """SIGSTOP a worker for longer than its session, sometimes longer than max.poll.interval.ms, and wake it."""
    slot = team.any_of_them(chance)
    team.pause(slot)
    time.sleep(chance.uniform(SESSION + 0.5, chance.choice((SESSION + 2, INTERVAL + 2))))
    team.resume(slot)


def churn(team: DedupCrew, chance: random.Random, _server: Server | None) -> None:
    """SIGTERM a worker; it ends its work, and another one joins."""
    slot = team.any_of_them(chance)
    team.stop(slot, within=30)
    time.sleep(chance.uniform(0, 0.5))
    team.start(slot)


def outage(team: DedupCrew, chance: random.Random, server: Server | None) -> None:
    """SIGKILL the server, sometimes a worker too that waits for it, and start it again."""
    assert server is not None
    server.kill()
    try:
        time.sleep(chance.uniform(0, 1.5))
        if chance.random() < 0.5:
            kill(team, chance, None)
        time.sleep(chance.uniform(0, 1.5))
    finally:
        server.restart()


def freeze(_team: DedupCrew, chance: random.Random, server: Server | None) -> None:
    """SIGSTOP the server for a few seconds: connections stay open, and nothing is answered."""
    assert server is not None
    server.pause()
    try:
        time.sleep(chance.uniform(2, 5))
    finally:
        server.resume()


def storm(team: DedupCrew, chance: random.Random, server: Server | None, seconds: float) -> None:
    """Every fault at least once, in any order, until the time is over."""
    faults: list[Callable[[DedupCrew, random.Random, Server | None], None]] = [kill, kill, pause, churn]
    if server is not None:
        faults += [outage, freeze]
    until = time.monotonic() + seconds
    while time.monotonic() < until or team.did.keys() < {fault.__name__ for fault in faults}:
        for fault in chance.sample(faults, len(faults)):
            if time.monotonic() > until and team.did[fault.__name__]:
                continue
            team.until_at_work(chance.randint(1, 200))
            time.sleep(chance.uniform(0, chance.choice((0.02, 0.3))))  # in a batch, or between two
            team.tend()
            team.did[fault.__name__] += 1
            fault(team, chance, server)
