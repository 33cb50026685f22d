"""The faults: what can be done to workers, brokers and connections.

A fault is a small object with a name, a lane and three methods: ``aim`` chooses (by dice, and nothing but dice) whom it hits
and for how long; ``start`` does it; ``stop`` undoes it. Lanes go on at the same time, so that a worker is killed while a
broker is frozen; within a lane one target is hit by one fault at a time.
"""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from .proxy import API, NotRunning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kafka_guarantees.testing.local_kafka import LocalKafka

    from .crew import Crew
    from .proxy import Dropping, Held, Proxy, Refusing, Request

WORKERS, BROKERS, CONNECTIONS = "workers", "brokers", "connections"
AIMED = 0.8  # of the held requests arrive in the next transaction, the others at any time
FIRST = 0.6  # of the refused requests are of idempotent producers that have just begun
NEXT = 2.0  # seconds that the next transaction is waited for
SLOWEST = 1.4  # times max.poll.interval.ms that a slow handler takes, at most
ANSWER = 2.0  # seconds that the answer to a late request is waited for
NOBODY = "there was none"  # what a fault says that has hit nothing


class Aim(NamedTuple):
    """Whom a fault hits, for how many seconds, and what else the dice said."""

    target: str
    seconds: float
    choice: Any = None


@dataclass(frozen=True)
class Scene:
    """What faults can be aimed at.

    Attributes:
        workers: their names.
        brokers: how many are ours to hurt.
        session: seconds after which a group counts a silent member as dead.
        transaction: seconds after which a transaction is aborted; 0 without transactions.
        poll: seconds after which a member that does not poll loses its partitions.
    """

    workers: Sequence[str]
    brokers: int
    session: float
    transaction: float
    poll: float

    @property
    def handlers(self) -> list[str]:
        """Those who handle messages."""
        return [who for who in self.workers if not who.startswith("sender")]


@dataclass(frozen=True)
class Stage:
    """What faults are done to: the real thing behind a ``Scene``. A schedule has no fault of what is not there."""

    crew: Crew
    kafka: LocalKafka | None
    proxy: Proxy | None

    @property
    def cluster(self) -> LocalKafka:
        """The brokers."""
        if self.kafka is None:
            raise TypeError("these brokers are not ours to hurt")
        return self.kafka

    @property
    def connections(self) -> Proxy:
        """The way to the brokers."""
        if self.proxy is None:
            raise TypeError("there is no proxy")
        return self.proxy


class Fault:
    """See the file's docstring. What ``start`` returns, ``stop`` gets; it says in a few words what came of the fault."""

    name: ClassVar[str]
    lane: ClassVar[str]
    weight: ClassVar[int] = 1  # how often it comes before every other has come once

    @property
    def text(self) -> str:
        """As in ``--faults``."""
        return self.name

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        raise NotImplementedError

    def start(self, stage: Stage, aim: Aim) -> Any:
        raise NotImplementedError

    def stop(self, stage: Stage, aim: Aim, started: Any) -> str | None:
        return None


# -- workers --------------------------------------------------------------------------------------------------------------


class KillWorker(Fault):
    """SIGKILL between any two steps; a new life soon after (H09)."""

    name, lane, weight = "kill-worker", WORKERS, 3

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(dice.choice(scene.workers), dice.choice((0.0, 0.3, 1.0)))

    def start(self, stage: Stage, aim: Aim) -> None:
        stage.crew.kill(aim.target)

    def stop(self, stage: Stage, aim: Aim, started: None) -> None:
        stage.crew.start(aim.target)


class PauseWorker(Fault):
    """SIGSTOP for half, and for one and a half times the session or the transaction timeout: then it is a zombie (M03, X03)."""

    name, lane, weight = "pause-worker", WORKERS, 2

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        timeout = dice.choice([t for t in (scene.session, scene.transaction) if t])
        return Aim(dice.choice(scene.workers), dice.choice((0.5, 1.5)) * timeout)

    def start(self, stage: Stage, aim: Aim) -> None:
        stage.crew.pause(aim.target)

    def stop(self, stage: Stage, aim: Aim, started: None) -> None:
        stage.crew.resume(aim.target)


class Churn(Fault):
    """SIGTERM: a member finishes what is in hand and leaves; it joins again soon after (X12)."""

    name, lane, weight = "churn", WORKERS, 2

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(dice.choice(scene.workers), dice.uniform(1.0, 3.0))

    def start(self, stage: Stage, aim: Aim) -> threading.Thread:
        leaving = threading.Thread(target=stage.crew.stop, args=(aim.target,))  # takes as long as what is in hand
        leaving.start()
        return leaving

    def stop(self, stage: Stage, aim: Aim, started: threading.Thread) -> None:
        started.join()
        stage.crew.start(aim.target)


class SlowHandler(Fault):
    """A handler that takes longer than max.poll.interval.ms (C10), or only longer than its transaction may (X07)."""

    name, lane = "slow-handler", WORKERS

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        shorter = max(scene.transaction, scene.session)
        seconds = dice.choice((scene.poll * dice.uniform(1.1, SLOWEST), dice.uniform(shorter, scene.poll)))
        return Aim(dice.choice(scene.handlers), seconds)

    def start(self, stage: Stage, aim: Aim) -> None:
        stage.crew.tell(aim.target, {"slow": aim.seconds})


class SignalStorm(Fault):
    """Signals whose handler raises, at any instant and inside of any call (Y02)."""

    name, lane, weight = "signal-storm", WORKERS, 2
    signals = 12

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(dice.choice(scene.workers), 0.0, [dice.uniform(0.0, 0.15) for _ in range(self.signals)])

    def start(self, stage: Stage, aim: Aim) -> None:
        for pause in aim.choice:
            stage.crew.interrupt(aim.target)
            time.sleep(pause)


class CallbackErrors(Fault):
    """The user's error_cb and stats_cb raise (C01, P12)."""

    name, lane = "callback-errors", WORKERS

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(dice.choice(scene.workers), dice.uniform(1.0, 3.0))

    def start(self, stage: Stage, aim: Aim) -> None:
        stage.crew.tell(aim.target, {"callbacks raise": True})

    def stop(self, stage: Stage, aim: Aim, started: None) -> None:
        stage.crew.tell(aim.target, {"callbacks raise": False})


# -- brokers, where they are ours -----------------------------------------------------------------------------------------


class KillBroker(Fault):
    """SIGKILL; its partitions get other leaders, and it comes back with its data."""

    name, lane, weight = "kill-broker", BROKERS, 2

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(f"broker-{dice.randrange(scene.brokers)}", dice.uniform(0.5, 5.0))

    def start(self, stage: Stage, aim: Aim) -> None:
        stage.cluster.kill(_number(aim))

    def stop(self, stage: Stage, aim: Aim, started: None) -> None:
        stage.cluster.restart(_number(aim))


class PauseBroker(Fault):
    """SIGSTOP, for less and for more than the other brokers tolerate; what it has received it answers later."""

    name, lane, weight = "pause-broker", BROKERS, 2

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(f"broker-{dice.randrange(scene.brokers)}", dice.choice((1.0, 4.0, 9.0)))

    def start(self, stage: Stage, aim: Aim) -> None:
        stage.cluster.pause(_number(aim))

    def stop(self, stage: Stage, aim: Aim, started: None) -> None:
        stage.cluster.resume(_number(aim))


class RollingRestart(Fault):
    """One broker after the other, each once the one before is in sync."""

    name, lane = "rolling-restart", BROKERS

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        first = dice.randrange(scene.brokers)
        return Aim("all brokers", 0.0, [(first + n) % scene.brokers for n in range(scene.brokers)])

    def start(self, stage: Stage, aim: Aim) -> None:
        for number in aim.choice:
            stage.cluster.restart(number)


# -- connections ----------------------------------------------------------------------------------------------------------


class Cut(Fault):
    """Connections are closed: about half of them, all of them, or all of them with nobody let in for a while (X01 b, B03)."""

    name, lane = "cut", CONNECTIONS

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        short, long = dice.uniform(0.3, 0.6 * scene.session), 1.3 * max(scene.session, scene.transaction)
        only, refused = dice.choice(((0.5, 0.0), (1.0, 0.0), (1.0, short), (1.0, long)))
        return Aim("connections", refused, (only, dice.random()))

    def start(self, stage: Stage, aim: Aim) -> ExitStack:
        only, seed = aim.choice
        with ExitStack() as going:
            if aim.seconds:
                going.enter_context(stage.connections.refuse())
            else:
                stage.connections.cut(only, random.Random(seed))  # noqa: S311 - repeatable is the point
            return going.pop_all()

    def stop(self, stage: Stage, aim: Aim, started: ExitStack) -> str:
        started.close()
        return "nobody let in" if aim.seconds else "all" if aim.choice[0] == 1 else "about half"


class Delay(Fault):
    """Every request and every answer takes longer (X01 c)."""

    name, lane = "delay", CONNECTIONS

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim("connections", dice.uniform(1.0, 3.0), dice.choice((0.02, 0.05, 0.2)))

    def start(self, stage: Stage, aim: Aim) -> ExitStack:
        with ExitStack() as going:
            going.enter_context(stage.connections.delay(aim.choice))
            return going.pop_all()

    def stop(self, stage: Stage, aim: Aim, started: ExitStack) -> str:
        started.close()
        return f"{aim.choice * 1000:.0f} ms each way"


@dataclass(frozen=True)
class _OfRequests(Fault):
    """A fault of single requests. A kind that is named twice is chosen twice as often."""

    kinds: Sequence[str]
    lane = CONNECTIONS

    @property
    def text(self) -> str:
        """As in ``--faults``."""
        return f"{self.name}:{self.kinds[0]}" if len(self.kinds) == 1 else self.name


class DropResponse(_OfRequests):
    """A request reaches its broker, and the answer is lost with its connection: the client must ask again (P05, M02, X09)."""

    name, weight = "drop-response", 3
    within = 1.5  # seconds that such a request is waited for

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(dice.choice(self.kinds), self.within, dice.choice((1, 1, 3)))

    def start(self, stage: Stage, aim: Aim) -> Dropping:
        return stage.connections.drop_responses([API[aim.target]], aim.choice)

    def stop(self, stage: Stage, aim: Aim, started: Dropping) -> str:
        started.cancel()
        clients = sorted({request.client_id for request in started.dropped})
        return f"{len(started.dropped)} of {', '.join(clients)}" if clients else NOBODY


@dataclass(frozen=True)
class NotLeader(Fault):
    """The first request of a client is answered as by a broker that is not the leader yet; the next one is taken (P13).

    Or one in the middle, as where a partition gets another leader: ``first`` is the share of the former. Of a producer that is
    not idempotent nobody knows that it begins.
    """

    first: float
    name, lane, weight = "not-leader", CONNECTIONS, 3
    within = 3.0  # seconds that such a request is waited for

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim("Produce", self.within, (dice.choice((1, 1, 3)), dice.random() < self.first))

    def start(self, stage: Stage, aim: Aim) -> Refusing:
        count, beginning = aim.choice
        return stage.connections.refuse_records(count, beginning=beginning)

    def stop(self, stage: Stage, aim: Aim, started: Refusing) -> str:
        started.cancel()
        clients = sorted({request.client_id for request in started.refused})
        if not clients:
            return NOBODY
        return f"{len(started.refused)} of {', '.join(clients)}{', which had just begun' if aim.choice[1] else ''}"


class HoldFrame(_OfRequests):
    """A request is held back and its connection cut, so that it is sent again; the held one arrives later (X01).

    Mostly it arrives in the middle of the next transaction: once the client has sent it again and then produced. Else at any
    time.
    """

    name, weight = "hold-frame", 4
    within = 1.5

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        late = None if dice.random() < AIMED else dice.uniform(0.1, 2 * scene.session)
        return Aim(dice.choice(self.kinds), self.within + (NEXT if late is None else late), late)

    def start(self, stage: Stage, aim: Aim) -> Held:
        held = stage.connections.hold([API[aim.target]], aim.choice)
        if aim.choice is None:
            threading.Thread(target=self._release_in_the_next, args=(stage.connections, held), daemon=True).start()
        return held

    def _release_in_the_next(self, proxy: Proxy, held: Held) -> None:
        """Let it arrive in what comes after what it belongs to."""
        with suppress(TimeoutError, NotRunning):
            request = held.wait(self.within)
            for name in (request.name, "Produce"):
                _wait_for_more(proxy, request.client_id, name)
            held.release(ANSWER)

    def stop(self, stage: Stage, aim: Aim, started: Held) -> str:
        if started.request is None:
            started.cancel()
            return NOBODY
        try:
            answer = started.release(ANSWER).detail  # if the run is over before its time, or the next did not come
        except TimeoutError:
            answer = "no answer yet"
        late = (started.released_at or time.monotonic()) - (started.held_at or 0)
        return f"of {started.request.client_id}, {late:.2f} s late: {answer}"


class KillInCall(_OfRequests):
    """SIGKILL while a request is on its way: before it reaches its broker, or before its answer is back (M01, X09, X14)."""

    name, weight = "kill-in-call", 4
    within = 1.5

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        role = dice.choice(("transformer", "transformer", "consumer", "sender"))
        return Aim(dice.choice(self.kinds), self.within, (role, dice.random() < 0.5))  # noqa: PLR2004 - a coin

    def start(self, stage: Stage, aim: Aim) -> _Killing:
        role, before = aim.choice
        killing = _Killing(stage, API[aim.target], role, self.within, before=before)
        killing.start()
        return killing

    def stop(self, stage: Stage, aim: Aim, started: _Killing) -> str:
        started.join()
        if started.who is None:
            return NOBODY
        stage.crew.start(started.who)
        return f"of {started.who}, {'before it arrived' if aim.choice[1] else 'before its answer came'}"


class _Killing(threading.Thread):
    """Waits for a request of a role, and kills whoever sent it. ``who``: whom it has killed."""

    def __init__(self, stage: Stage, api: int, role: str, within: float, *, before: bool) -> None:
        super().__init__(daemon=True)
        self.who: str | None = None
        self._stage, self._api, self._role, self._within, self._before = stage, api, role, within, before

    def run(self) -> None:
        """Wait, and kill, unless the proof ends meanwhile."""
        with suppress(NotRunning):
            if self._before:
                self._before_it_arrives()
            else:
                self._before_its_answer_comes()

    def _ours(self, client: str) -> bool:
        return client.startswith(self._role)

    def _before_it_arrives(self) -> None:
        held = self._stage.connections.hold([self._api], clients=self._ours)
        with suppress(TimeoutError):
            self._kill(held.wait(self._within))
        held.cancel()  # it never arrives

    def _before_its_answer_comes(self) -> None:
        dropping = self._stage.connections.drop_responses([self._api], clients=self._ours, cut_after=None)
        until = time.monotonic() + self._within
        while not dropping.dropped and time.monotonic() < until:
            time.sleep(0.001)
        dropping.cancel()
        for request in dropping.dropped:
            self._kill(request)

    def _kill(self, request: Request) -> None:
        self._stage.crew.kill(request.client_id)
        self.who = request.client_id


def _wait_for_more(proxy: Proxy, client: str, name: str) -> None:
    """Wait until a client has sent another such request, or for NEXT seconds."""

    def count() -> int:
        return proxy.requests(lambda who: who == client).get(name, 0)

    before, until = count(), time.monotonic() + NEXT
    while count() == before and time.monotonic() < until:
        time.sleep(0.001)


def _number(aim: Aim) -> int:
    return int(aim.target.rpartition("-")[2])


# -- which ----------------------------------------------------------------------------------------------------------------

REQUESTS = {
    "at-most-once": ("OffsetCommit", "OffsetCommit", "Produce", "OffsetFetch", "JoinGroup", "FindCoordinator"),
    "at-least-once": ("Produce", "Produce", "OffsetCommit", "OffsetFetch", "JoinGroup", "FindCoordinator"),
    "exactly-once": (
        "EndTxn",
        "EndTxn",
        "TxnOffsetCommit",
        "AddPartitionsToTxn",
        "AddOffsetsToTxn",
        "Produce",
        "InitProducerId",
        "OffsetFetch",
        "FindCoordinator",
    ),
}
OF_TRANSACTIONS = {"EndTxn", "TxnOffsetCommit", "AddPartitionsToTxn", "AddOffsetsToTxn"}
CALLS = {
    "at-most-once": ("OffsetCommit", "OffsetCommit", "Produce"),
    "at-least-once": ("OffsetCommit", "OffsetCommit", "Produce"),
    "exactly-once": ("EndTxn", "EndTxn", "EndTxn", "TxnOffsetCommit", "Produce"),
}
KINDS: dict[str, type[Fault]] = {
    kind.name: kind
    for kind in (
        KillWorker,
        PauseWorker,
        Churn,
        SlowHandler,
        SignalStorm,
        CallbackErrors,
        KillBroker,
        PauseBroker,
        RollingRestart,
        Cut,
        Delay,
        DropResponse,
        NotLeader,
        HoldFrame,
        KillInCall,
    )
}


def possible(guarantee: str, *, brokers: bool, connections: bool) -> list[Fault]:
    """All faults that can be done, for a guarantee.

    Args:
        guarantee: by its name.
        brokers: whether they are ours to hurt.
        connections: whether they can go through a proxy.
    """
    lanes = {WORKERS, *([BROKERS] if brokers else []), *([CONNECTIONS] if connections else [])}
    return [fault(name, guarantee) for name, kind in KINDS.items() if kind.lane in lanes]


def fault(text: str, guarantee: str) -> Fault:
    """The fault with a name, such as ``kill-worker``; of requests also ``hold-frame:EndTxn``, which hits only these.

    Raises:
        ValueError: there is none of that name, or no such request.
    """
    name, _, request = text.partition(":")
    kind = KINDS.get(name)
    if kind is None:
        raise ValueError(f"there is no fault {name!r}: choose from {', '.join(KINDS)}")
    if issubclass(kind, _OfRequests):
        if request and request not in API:
            raise ValueError(f"there is no request {request!r}: choose from {', '.join(API)}")
        if request in OF_TRANSACTIONS and guarantee != "exactly-once":
            raise ValueError(f"{text}: {guarantee} makes no such request, so nothing would be hit")
        usual = CALLS if kind is KillInCall else REQUESTS
        return kind((request,) if request else usual[guarantee])
    if request:
        raise ValueError(f"{name} is not a fault of requests: {text!r} means nothing")
    if kind is NotLeader:
        return NotLeader(0.0 if guarantee == "at-most-once" else FIRST)
    return kind()
