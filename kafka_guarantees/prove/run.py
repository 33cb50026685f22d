"""A proof from beginning to end: cluster, workers, faults, quiet, final reads, verdict."""

from __future__ import annotations

import logging
import shlex
import signal
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import confluent_kafka
from confluent_kafka import libversion

from kafka_guarantees import __version__
from kafka_guarantees.testing.local_kafka import LocalKafka

from .checks import verdict_and_figures
from .crew import COMMAND, Crew
from .curves import lag, rates
from .evidence import GROUPS, Evidence, Proof, Verdict
from .faults import CONNECTIONS, NOBODY, SLOWEST, Scene, Stage
from .history import read
from .life import Job
from .proxy import Proxy
from .reading import Audience, Reader, Sampler, ends
from .schedule import Lane, schedule
from .screen import Progress
from .segments import dump
from .topics import Topics
from .worker import CLASSES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from typing_extensions import Self

    from .evidence import Event, View
    from .evidence import Fault as Done
    from .faults import Fault
    from .screen import Screen

LOOK = 0.2  # seconds between two looks at everybody
CALM = 4.0  # seconds that are calm, if at most once is to be proven
LINGER = 100  # milliseconds that every other worker lets records wait: so that some are in its queue when it is killed
OTHER_SENDER: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("at-most-once", "sender"): {"acks": 1},  # its answers can be lost
    ("at-least-once", "sender"): {"delivery.timeout.ms": 6000},  # it gives records up
}
MIXED = {"transformer": "classic", "consumer": "cooperative"}
HANDLING = (0.001, 0.007)  # seconds, of a worker: some are fast, others have much in hand
ACKS = {"at-most-once": {0, 1}, "at-least-once": {-1}, "exactly-once": {-1}}
PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "classic": {},
    "cooperative": {"partition.assignment.strategy": "cooperative-sticky"},
    "consumer": {"group.protocol": "consumer"},
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is to be proven, and how hard it is tried.

    Attributes:
        guarantee: by its name.
        faults: to be done.
        seed: of the schedule, and of what workers choose.
        duration: seconds of faults.
        workers: transformers. Besides there are two consumers, in a group of their own, and two senders.
        partitions: of each topic.
        brokers: of the local cluster that is started; 0 where ``config`` reaches one that runs already.
        protocol: of the groups: classic, cooperative, consumer; or mixed: transformers classic, consumers cooperative.
        config: librdkafka's properties, for all clients.
        rate: records per second, of each sender.
        handling: seconds that handling one message takes on average; None: some workers are fast and some are not.
        patience: seconds without progress, after the faults, until what is not drained counts as stuck; and until a worker
            that was told to end is; 0: longer than a slow handler, and a session after it.
        session: milliseconds after which a silent member counts as dead.
        folder: for histories and logs.
        command: that runs a worker.
    """

    guarantee: str
    faults: Sequence[Fault]
    seed: int
    folder: Path
    duration: float = 60.0
    workers: int = 3
    partitions: int = 8
    brokers: int = 3
    protocol: str = "mixed"
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    rate: float = 80.0
    handling: float | None = None
    patience: float = 0.0
    session: int = 3000
    command: Sequence[str] = COMMAND

    @property
    def poll(self) -> int:
        """Milliseconds after which a member that does not poll loses its partitions."""
        return 5 * self.session // 2

    @property
    def waits(self) -> float:
        """Seconds: see ``patience``."""
        return self.patience or max(40.0, (SLOWEST * self.poll + self.session) / 1000 + 10)

    @property
    def transaction(self) -> int:
        """Milliseconds after which an open transaction is aborted."""
        return 2 * self.session if self.guarantee == "exactly-once" else 0


def prove(plan: Plan, screen: Screen, repeat: Sequence[str]) -> Proof:
    """Carry a plan out.

    Args:
        plan: what is to be done.
        screen: where it shows how far it is.
        repeat: the command that repeats it, for the report.

    Raises:
        LocalKafkaError: no Kafka could be started.
        KafkaException, TimeoutError: the Kafka that runs already does not answer, or refuses what a proof needs.
    """
    with storms_ignored(), _local(plan) as kafka:
        config = {**plan.config, **({"bootstrap.servers": kafka.bootstrap} if kafka is not None else {})}
        return prove_on(plan, config, screen, repeat, kafka)


def prove_on(
    plan: Plan, config: Mapping[str, Any], screen: Screen, repeat: Sequence[str] = (), kafka: LocalKafka | None = None
) -> Proof:
    """Carry a plan out on a cluster that runs. ``kafka`` are its brokers, where they are ours to hurt."""
    with Topics(config, plan.partitions) as topics, _Run(plan, config, screen, topics, kafka) as run:
        return run.whole(repeat)


def _local(plan: Plan) -> AbstractContextManager[LocalKafka | None]:
    """Brokers that notice a dead member as soon as the clients' own settings would have them (KIP-848 leaves that to them)."""
    if not plan.brokers:
        return nullcontext()
    session = {
        "group.consumer.session.timeout.ms": plan.session,
        "group.consumer.heartbeat.interval.ms": plan.session // 4,
    }
    return LocalKafka(brokers=3 if plan.brokers == 3 else 1, config=session)  # noqa: PLR2004 - one or three


@contextmanager
def storms_ignored() -> Iterator[None]:
    """Ignore SIGUSR1. Workers inherit it: a life that has not got as far as its own handler must not end by a storm."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class _Run:
    """One run, on a cluster that is there, with topics that are there. A context manager: no worker is left at its end."""

    def __init__(self, plan: Plan, config: Mapping[str, Any], screen: Screen, topics: Topics, kafka: LocalKafka | None) -> None:
        self._plan, self._config, self._screen, self._topics, self._kafka = plan, config, screen, topics, kafka
        self._reader = Reader(config, plan.partitions)
        self._counted = _Counted(plan.folder)
        self._faults: list[Done] = []
        self._lanes: list[Lane] = []
        self._date = datetime.now(timezone.utc)
        with ExitStack() as stack:
            proxied = any(fault.lane == CONNECTIONS for fault in plan.faults)
            self._proxy = stack.enter_context(Proxy(config["bootstrap.servers"])) if proxied else None
            jobs = _possible(self._jobs(self._proxy))
            self._crew = stack.enter_context(Crew(jobs, plan.folder, plan.command, plan.waits + 5))
            self._sampler = stack.enter_context(Sampler(config, topics.groups, topics.source, plan.partitions))
            self._audience = stack.enter_context(Audience(config, topics.sink, plan.partitions))
            self._stack = stack.pop_all()
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._screen.say("Interrupted, so there is no report. Workers end, and what was made for this run is removed ...")
        self._stack.close()

    def whole(self, repeat: Sequence[str]) -> Proof:
        """Everything, in order."""
        self._hurt()
        calm = self._calm_down()
        source = self._settle()
        for role in GROUPS:
            self._crew.dismiss(role)
        self._look("reading")
        self._sampler.settle()
        sink = self._reader.view(self._topics.sink)
        events = read(sorted(self._plan.folder.glob("*.history")))
        evidence = Evidence(
            guarantee=self._plan.guarantee,
            events=events,
            source=source,
            sink=sink,
            samples=self._sampler.samples,
            calm=calm,
            partitions=self._plan.partitions,
            troubles=[*self._troubles(), *_promises(events)],
        )
        proof = self._proof(evidence, repeat)
        if self._kafka is not None and proof.outcome == "broken":
            dump(self._kafka.data_dir, [self._topics.source, self._topics.sink], self._plan.folder)
        return proof

    def _jobs(self, proxy: Proxy | None) -> list[Job]:
        plan = self._plan
        shared = {**self._config, **({"bootstrap.servers": proxy.bootstrap} if proxy is not None else {})}
        names = [
            *(f"transformer-{n}" for n in range(plan.workers)),
            *(f"{role}-{n}" for role in ("consumer", "sender") for n in (0, 1)),
        ]
        return [
            Job(
                guarantee=plan.guarantee,
                who=who,
                life=0,
                config=self._client(who, shared),
                source=self._topics.source,
                sink=self._topics.sink,
                partitions=plan.partitions,
                history=str((plan.folder / f"{who}.history").resolve()),
                seed=str(plan.seed),
                rate=plan.rate,
                handling=HANDLING[_number(who) % 2] if plan.handling is None else plan.handling,
            )
            for who in names
        ]

    def _client(self, who: str, shared: Mapping[str, Any]) -> dict[str, Any]:
        """The properties of one worker: short time-outs, so that a short run meets all of them."""
        plan, role = self._plan, who.rpartition("-")[0]
        config: dict[str, Any] = {"socket.timeout.ms": plan.session}
        if _number(who) % 2:
            config |= {"linger.ms": LINGER, **OTHER_SENDER.get((plan.guarantee, role), {})}
        if role in self._topics.groups:
            protocol = MIXED[role] if plan.protocol == "mixed" else plan.protocol
            if protocol != "consumer":
                config["session.timeout.ms"] = plan.session
            config |= {"max.poll.interval.ms": plan.poll, **PROTOCOLS[protocol]}
        if plan.transaction:
            config["transaction.timeout.ms"] = plan.transaction
        config |= {**shared, "client.id": who}
        if role in self._topics.groups:
            config["group.id"] = self._topics.groups[role]
        if plan.transaction:
            config["transactional.id"] = f"{self._topics.prefix}-{who}"
        return config

    # -- the three acts -------------------------------------------------------------------------------------------------

    def _hurt(self) -> None:
        """Everybody works, and is hurt."""
        plan = self._plan
        workers = self._crew.everybody
        scene = Scene(workers, plan.brokers, plan.session / 1000, plan.transaction / 1000, plan.poll / 1000)
        stage = Stage(self._crew, self._kafka, self._proxy)
        for who in workers:
            self._crew.start(who)
        self._lanes = [
            Lane(steps, stage, self._began, self._note) for steps in schedule(plan.faults, plan.seed, plan.duration, scene)
        ]
        for lane in self._lanes:
            lane.start()
        try:
            while time.monotonic() < self._began + plan.duration:
                self._look("faults")
        finally:
            for lane in self._lanes:
                lane.end()
        self._heal()

    def _calm_down(self) -> int | None:
        """Only at most once may lose, and only where something is wrong: some records are sent while nothing is."""
        self._crew.tell_all({"failing": 0})
        if self._plan.guarantee != "at-most-once":
            return None
        self._wait((self._plan.session + self._plan.poll) / 1000 + 1)  # until the last member is forgotten, or back
        calm = time.monotonic_ns()
        self._wait(CALM)
        return calm

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._look("calming down")

    def _troubles(self) -> Iterator[str]:
        """What no fault explains."""
        yield from self._crew.troubles
        yield from (lane.trouble for lane in self._lanes if lane.trouble)
        if self._sampler.trouble:
            yield self._sampler.trouble
        if self._proxy is None:
            return
        for what, count in self._proxy.not_understood.items():
            yield f"the proxy did not understand {count} times {what}: a client may have gone past it"
        for who in self._crew.everybody:
            came = self._proxy.requests(lambda client, who=who: client == who)  # type: ignore[misc]
            if not came and any(self._plan.folder.glob(f"{who}.history")):  # else it has not come so far as to begin
                yield f"{who} never came through the proxy: no fault of connections has hit it"
        if "acks" not in self._config and "request.required.acks" not in self._config:
            for who, acks in self._proxy.acks.items():
                if not acks <= ACKS[self._plan.guarantee]:
                    yield f"{who} has produced with acks {sorted(acks)}: {self._plan.guarantee} is {ACKS[self._plan.guarantee]}"

    def _heal(self) -> None:
        """Undo what a fault that failed has left behind."""
        self._crew.resume_all()
        if self._kafka is not None:
            for number in range(self._kafka.brokers):
                self._kafka.resume(number)
                if not self._kafka.running(number):
                    self._kafka.restart(number)

    def _settle(self) -> View:
        """Nothing is sent and nobody is hurt any more, until both groups have finished everything, or nothing moves."""
        self._crew.dismiss("sender")
        source = self._reader.view(self._topics.source)
        goal = ends(source.committed)
        last, until = None, time.monotonic() + self._plan.waits
        while not self._sampler.reached(goal) and time.monotonic() < until:
            self._look("settling")
            now = {name: self._sampler.last(name) for name in GROUPS}
            if now != last:
                last, until = now, time.monotonic() + self._plan.waits
        return source

    def _look(self, phase: str) -> None:
        time.sleep(LOOK)
        self._crew.tend()
        counted = self._counted.now()
        self._screen.update(
            Progress(
                guarantee=self._plan.guarantee,
                seconds=time.monotonic() - self._began,
                of_seconds=self._plan.duration,
                phase=phase,
                sent=counted["send"],
                handled=counted["handle"],
                visible=len(self._audience.times),
                lives=self._crew.lives,
                faults_done=len(self._faults),
                fault_now=sorted(name for lane in self._lanes for name in list(lane.current)),
            )
        )

    def _note(self, fault: Done) -> None:
        self._faults.append(fault)
        self._screen.fault(fault)

    # -- the result -----------------------------------------------------------------------------------------------------

    def _proof(self, evidence: Evidence, repeat: Sequence[str]) -> Proof:
        plan, began = self._plan, int(self._began * 1e9)
        verdicts, counts = verdict_and_figures(evidence)
        return Proof(
            guarantee=plan.guarantee,
            version=f"{__version__} on confluent-kafka {confluent_kafka.__version__}, librdkafka {libversion()[0]}",
            command=shlex.join(repeat),
            began=self._date.isoformat(timespec="seconds"),
            seconds=time.monotonic() - self._began,
            setting={
                "cluster": f"{plan.brokers} local brokers" if plan.brokers else str(self._config["bootstrap.servers"]),
                "workers": f"{plan.workers} transformers, 2 consumers, 2 senders",
                "partitions": str(plan.partitions),
                "group protocol": plan.protocol,
                "faults": ", ".join(fault.text for fault in plan.faults) or "none",
                "seed": str(plan.seed),
                "session.timeout.ms": str(plan.session),
                "max.poll.interval.ms": str(plan.poll),
                **({"transaction.timeout.ms": str(plan.transaction)} if plan.transaction else {}),
            },
            figures={**counts, **{f"lives: {how}": n for how, n in self._crew.ended.items()}},
            verdicts=[*verdicts, *_hit(plan.faults, self._faults)],
            faults=sorted(self._faults, key=lambda fault: fault.began),
            rates=rates(evidence, self._audience.times, began),
            lag=lag(evidence, began),
            troubles=evidence.troubles,
            kept_in=str(plan.folder),
        )


def _hit(asked: Sequence[Fault], done: Sequence[Done]) -> Iterator[Verdict]:
    """Whether what was to be done was done: a run in which no fault has hit anything shows nothing of faults (H10)."""
    hit = sum(fault.detail != NOBODY for fault in done)
    lacking = () if hit else ("no fault has hit anything",)
    if asked:
        yield Verdict("hit", "Faults were done, and have hit something.", hit, lacking=lacking)


def _possible(jobs: list[Job]) -> list[Job]:
    """Refuse settings that contradict those of the workers: each of their lives would end at once, as if they were broken.

    Raises:
        ValueError: they do.
    """
    for job in jobs:
        try:
            CLASSES[job.guarantee].explain(job.config)
        except ValueError as error:
            raise ValueError(
                f"{job.who} cannot be made: {error} A proof has short time-outs of its own, and --protocol says how its groups "
                "work: leave what contradicts that out of the configuration."
            ) from error
    return jobs


def _number(who: str) -> int:
    return int(who.rpartition("-")[2])


def _promises(events: Sequence[Event]) -> Iterator[str]:
    """What a worker has seen the library do against its word."""
    return (f"{event.who} (life {event.life}): {event.detail}" for event in events if event.what == "broken")


class _Counted:
    """How many sends and handlings the histories have, without reading anything twice."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self._counts = {"send": 0, "handle": 0}

    def now(self) -> Mapping[str, int]:
        """The counts by now."""
        for path in self._folder.glob("*.history"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(new)
            for what in self._counts:
                self._counts[what] += new.count(b'"what":"%s","type":"invoke"' % what.encode())
        return self._counts
