"""How long a message is on its way at low traffic: sent, copied by a contestant at once, read by a reader of committed records.

Sender and reader are those of ``kafka-guarantees bench``: 100 messages a second with the time in them. They wait for nothing,
so that what differs between contestants is theirs.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from kafka_guarantees.bench.figures import Spread, spread
from kafka_guarantees.bench.latency import Audience, Echoes
from kafka_guarantees.bench.plan import RATE

from .runs import RunFailed, Running

if TYPE_CHECKING:
    from .contestants import Contestant
    from .stage import Stage

READY = 60.0  # seconds
PARTITIONS = 8
SIZE = 100


@dataclass
class Ways:
    """The ways of messages through one contestant.

    Attributes:
        rounds: milliseconds of each message.
        troubles: why there are not more.
    """

    label: str
    guarantee: str
    brokers: int
    rounds: list[list[float]] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    @property
    def medians(self) -> list[float]:
        return [median(each) for each in self.rounds]

    @property
    def spread(self) -> Spread | None:
        """Of all rounds together."""
        return spread([one / 1000 for each in self.rounds for one in each])

    def as_json(self) -> dict[str, Any]:
        found = self.spread
        return {
            "name": self.label,
            "guarantee": self.guarantee,
            "brokers": self.brokers,
            "messages": sum(map(len, self.rounds)),
            "p50": found and found.p50,
            "p99": found and found.p99,
            "p99.9": found and found.p999,
            "medians": self.medians,
            "troubles": self.troubles,
        }


def measure(stage: Stage, contestant: Contestant, guarantee: str, extra: dict[str, Any], seconds: float) -> list[float]:
    """Milliseconds of each message that counts.

    Raises:
        RunFailed: the contestant did not copy them all.
    """
    cluster = {"bootstrap.servers": stage.bootstrap}
    with stage.fresh(PARTITIONS) as source, stage.fresh(PARTITIONS) as output:
        echoes = Echoes(cluster, source, SIZE, int(RATE * seconds))
        job = {
            "work": "echo",
            "bootstrap": stage.bootstrap,
            "input": source,
            "output": output,
            "messages": echoes.all,
            "size": SIZE,
            "batch": None,
            "group": f"bench-{uuid.uuid4().hex[:12]}",
            "transactional_id": f"bench-{uuid.uuid4().hex[:12]}",
            "guarantee": guarantee,
            **extra,
        }
        with Audience(cluster, output, range(PARTITIONS), echoes.note), Running(contestant.command(job)) as running:
            _wait_until_ready(running)
            try:
                ways = echoes.send_all()
            except TimeoutError as exc:
                raise RunFailed(f"{exc}: {running.last_words()}") from exc
            if len(ways) != int(RATE * seconds):
                raise RunFailed(f"{len(ways)} of {int(RATE * seconds)} messages came: {running.last_words()}")
    return [way * 1000 for way in ways]


def _wait_until_ready(running: Running) -> None:
    """Read what the process says up to its word, with a limit.

    Raises:
        RunFailed: it ended, or said nothing.
    """
    limit = threading.Timer(READY, running.process.kill)
    limit.start()
    try:
        assert running.process.stdout is not None
        for line in running.process.stdout:
            if line.strip() == "ready":
                return
    finally:
        limit.cancel()
    raise RunFailed(f"it was never ready: {running.last_words()}")
