"""The proof catches liars: mutants of the library, each by the name of what it does wrong; and nothing where nothing is wrong.

All that are selected run as one campaign, some at a time, on one broker. ``MUTANTS_SEED`` repeats a seed. ``make test`` has a
few of them, which show quickly what they are; ``make mutants`` has all.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees.prove.faults import (
    CONNECTIONS,
    NOBODY,
    WORKERS,
    Aim,
    CallbackErrors,
    Churn,
    Cut,
    Delay,
    DropResponse,
    Fault,
    HoldFrame,
    KillWorker,
    NotLeader,
    PauseWorker,
    SignalStorm,
)
from kafka_guarantees.prove.proxy import API
from kafka_guarantees.prove.run import Plan, prove_on, storms_ignored
from kafka_guarantees.prove.screen import Screen, fault_line

from .mutants import ALO, AMO, EOS, IN_HAND, MUTANTS

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from kafka_guarantees.prove.evidence import Proof
    from kafka_guarantees.prove.faults import Scene, Stage
    from kafka_guarantees.testing.local_kafka import RunningKafka

pytestmark = [pytest.mark.broker, pytest.mark.timeout(600)]

AT_ONCE = 3
ALWAYS = {  # at least one by each way of finding out, and those that lie all the time
    "amo_commits_after_handling",
    "amo_tries_again",
    "amo_drops_half",
    "alo_commits_before_handling",
    "alo_does_not_wait_for_acknowledgements",
    "alo_skips_what_is_empty",
    "alo_handles_backwards",
    "eos_commits_offsets_apart",
    "eos_reads_what_is_not_committed",
    "eos_produces_outside",
    "eos_drops_a_record",
    "eos_sends_offsets_out_of_turn",
    "at most once",
    "at least once",
    "exactly once",
}
TRIES = 3  # short runs by which a liar must be caught, or enough must have happened
PARTITIONS = 4
WORKER = (sys.executable, "-X", "faulthandler", str(Path(__file__).with_name("mutants.py")))


# -- faults, aimed where a lie shows ----------------------------------------------------------------------------------------


def _only(scene: Scene, *roles: str) -> Scene:
    return replace(scene, workers=[who for who in scene.workers if who.startswith(roles)])


class _Kill(KillWorker):
    """Kills some roles only, and leaves them dead for as long as it takes until others have their partitions."""

    def __init__(self, *roles: str) -> None:
        self._roles = roles

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(dice.choice(_only(scene, *self._roles).workers), dice.choice((0.0, 0.5, scene.session)))


class _KillAtWork(Fault):
    """Kills everybody of some roles at once, in the middle of their work: that is, once their group has recovered."""

    name, lane = "kill-at-work", WORKERS

    def __init__(self, *roles: str, slow: float = 0.0) -> None:
        self._roles, self._slow = roles, slow

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(" and ".join(self._roles), 0.0, (scene.session, _only(scene, *self._roles).workers))

    def start(self, stage: Stage, aim: Aim) -> None:
        session, workers = aim.choice
        time.sleep(session + 1.2)
        for who in workers:
            stage.crew.tell(who, {"slow": self._slow})
        time.sleep(0.6 * self._slow)
        for who in workers:
            stage.crew.kill(who)

    def stop(self, stage: Stage, aim: Aim, started: None) -> str:
        for who in aim.choice[1]:
            stage.crew.start(who)
        return ""


class _Freeze(PauseWorker):
    """Pauses transformers until the group has given their partitions away, but their transaction is still open."""

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(dice.choice(_only(scene, "transformer").workers), 1.5 * scene.session)


class _FreezeInHand(_Freeze):
    """Likewise, always the same one and for long, with much in hand: what has gathered while a message took its time."""

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(_only(scene, "transformer").workers[0], 2.7 * scene.session)

    def start(self, stage: Stage, aim: Aim) -> None:
        time.sleep(0.8)  # until it has partitions
        stage.crew.tell(aim.target, {"slow": 1.0})
        time.sleep(1.15)
        stage.crew.tell(aim.target, {"slow": 0.4})
        time.sleep(0.1)
        super().start(stage, aim)


class _FreezeWhileHandling(_Freeze):
    """Likewise, always the same one, and in the middle of a transaction: the other one does its work meanwhile."""

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(_only(scene, "transformer").workers[0], 1.5 * scene.session)

    def start(self, stage: Stage, aim: Aim) -> None:
        time.sleep(1.0)  # until it has partitions
        stage.crew.tell(aim.target, {"slow": 0.6})
        time.sleep(0.3)
        super().start(stage, aim)


class _ChurnOne(Churn):
    """The same member leaves, and comes again: the other one gets its partitions each time."""

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim(_only(scene, "transformer").workers[-1], 0.8)

    def start(self, stage: Stage, aim: Aim) -> threading.Thread:
        time.sleep(2.0)  # until it has partitions
        return super().start(stage, aim)


class _Slow(Fault):
    """A handler that takes longer than a transaction may, and than half of the time between two polls, but not all of it."""

    name, lane = "slow-handler", WORKERS

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        least = max(0.6 * scene.poll, 1.04 * scene.transaction)
        return Aim(dice.choice(scene.handlers), dice.uniform(least, 0.96 * scene.poll))

    def start(self, stage: Stage, aim: Aim) -> None:
        stage.crew.tell(aim.target, {"slow": aim.seconds})


class _Raising(CallbackErrors):
    """Callbacks raise where messages are fetched."""

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return super().aim(dice, _only(scene, *scene.handlers))


class _Storm(SignalStorm):
    """Exceptions out of whatever call a handler's process is in."""

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return super().aim(dice, _only(scene, *scene.handlers))


class _LostCommit(Fault):
    """Commits of senders are done, and before these hear of it nobody is let in until they have given up (X09)."""

    name, lane = "lost-commit", CONNECTIONS

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim("EndTxn", 0.0, (2 * scene.transaction + 1.0, [who for who in scene.workers if who.startswith("sender")]))

    def start(self, stage: Stage, aim: Aim) -> str:
        seconds, senders = aim.choice
        lost = [stage.connections.drop_responses([API["EndTxn"]], clients=sender.__eq__, cut_after=None) for sender in senders]
        for each in lost:
            each.wait(30.0)
        with stage.connections.refuse():
            time.sleep(seconds)
        return f"{sum(len(each.dropped) for each in lost)} answers"


class _LostRequest(Fault):
    """A sender's commit does not arrive before its transaction has timed out (X09)."""

    name, lane = "lost-request", CONNECTIONS

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim("EndTxn", 0.0, scene.transaction + 1.3)

    def start(self, stage: Stage, aim: Aim) -> str:
        held = stage.connections.hold([API["EndTxn"]], aim.choice, clients=lambda name: name.startswith("sender"))
        held.wait(30.0)
        with stage.connections.refuse():
            time.sleep(aim.choice)
        return held.result(30.0).detail


class _NotLeaderYet(NotLeader):
    """Of producers that begin, since their worker was killed."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def aim(self, dice: random.Random, scene: Scene) -> Aim:
        return Aim("Produce", 4.0, (3, True))


FAULTS: Mapping[str, Callable[[], Fault]] = {
    "kill transformers": lambda: _Kill("transformer"),
    "kill handlers at work": lambda: _KillAtWork("transformer", "consumer", slow=0.8),
    "kill all at work": lambda: _KillAtWork("transformer", "consumer"),
    "kill transformers at work": lambda: _KillAtWork("transformer"),
    "kill senders": lambda: _Kill("sender"),
    "freeze in hand": _FreezeInHand,
    "freeze while handling": _FreezeWhileHandling,
    "slow handlers": _Slow,
    "churn": Churn,
    "churn one": _ChurnOne,
    "raising callbacks": _Raising,
    "storm": _Storm,
    "delay": Delay,
    "cut": Cut,
    "lose acknowledgements": lambda: DropResponse(["Produce"]),
    "not leader yet": _NotLeaderYet,
    "lost commit": _LostCommit,
    "lost request": _LostRequest,
    "hold commits": lambda: HoldFrame(["EndTxn"]),
}

# -- those who do not lie, under what brings liars to light -----------------------------------------------------------------

HONEST: Mapping[str, Mapping[str, Any]] = {
    "at most once": {
        "guarantee": AMO,
        "faults": ["kill handlers at work", "freeze in hand", "churn", "churn one", "lose acknowledgements"],
        **IN_HAND,
    },
    "at least once": {
        "guarantee": ALO,
        "faults": [
            "kill handlers at work",
            "kill transformers at work",
            "kill senders",
            "storm",
            "raising callbacks",
            "churn",
        ],
        "duration": 14.0,
        "session": 1500,
        "config": {"linger.ms": 300},
    },
    "at least once, not leader": {
        "guarantee": ALO,
        "faults": ["kill senders", "kill transformers", "not leader yet"],
        "duration": 12.0,
        "config": {"batch.num.messages": 1},
    },
    "at least once, slowly": {"guarantee": ALO, "faults": ["slow handlers", "delay", "cut"], "duration": 12.0, "session": 1500},
    "exactly once": {
        "guarantee": EOS,
        "faults": [
            "kill transformers",
            "kill transformers at work",
            "kill all at work",
            "kill senders",
            "freeze while handling",
            "slow handlers",
        ],
        "duration": 16.0,
        "session": 3000,
    },
    "exactly once, in doubt": {
        "guarantee": EOS,
        "faults": ["lost commit", "lost request"],
        "duration": 15.0,
        "session": 2100,
        "rate": 300.0,  # little time is left without a fault
    },
    "exactly once, not leader": {
        "guarantee": EOS,
        "faults": ["kill transformers", "kill senders", "not leader yet"],
        "duration": 12.0,
        "session": 2100,
        "config": {"batch.num.messages": 1},
    },
    "exactly once, late": {
        "guarantee": EOS,
        "faults": ["hold commits"],
        "duration": 14.0,
        "handling": 0.001,
        "rate": 200.0,
    },
}


def complaining(proof: Proof) -> set[str]:
    """The checks that found an anomaly, or too little to let the run pass."""
    return {verdict.check for verdict in proof.verdicts if verdict.anomalies or verdict.lacking}


# -- the campaign -----------------------------------------------------------------------------------------------------------


def settled(name: str, proof: Proof) -> bool:
    """Whether a run says something: a liar was caught; of the honest, that enough happened to say so."""
    if name in MUTANTS:
        return bool(complaining(proof) & MUTANTS[name].caught_by)
    return proof.outcome != "inconclusive" and (not name.endswith("not leader") or refused(proof))


def refused(proof: Proof) -> bool:
    """Whether records were refused as by a broker that does not lead their partition."""
    return any(fault.name == NotLeader.name and fault.detail != NOBODY for fault in proof.faults)


def carry_out(name: str, bootstrap: str, make: Callable[[str], Path], seed: int) -> Proof:
    """The proof of one mutant, or of one who does not lie: a few short runs, since a busy machine may do little in one."""
    proof = run_once(name, bootstrap, make(name.replace(" ", "-")), seed)
    for more in range(1, TRIES):
        if settled(name, proof):
            break
        proof = run_once(name, bootstrap, make(name.replace(" ", "-")), seed + more)
    return proof


def run_once(name: str, bootstrap: str, folder: Path, seed: int) -> Proof:
    """One run."""
    if name in MUTANTS:
        mutant = MUTANTS[name]
        wanted: dict[str, Any] = {"guarantee": mutant.guarantee, "faults": mutant.faults, **mutant.plan}
        wanted["command"] = (*WORKER, name)
    else:
        wanted = dict(HONEST[name])
    faults = [FAULTS[fault]() for fault in wanted.pop("faults")]
    config = {"bootstrap.servers": bootstrap, **wanted.pop("config", {})}
    usual = {
        "duration": 8.0,
        "handling": 0.002,
        "session": 2500,
        "patience": 12.0,
        "workers": 2,
        "partitions": PARTITIONS,
        "brokers": 0,
    }
    plan = Plan(faults=faults, seed=seed, folder=folder, config=config, **{**usual, **wanted})
    with Screen(io.StringIO()) as screen:
        return prove_on(plan, config, screen)


@pytest.fixture(scope="module")
def campaign(
    kafka: RunningKafka, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Future[Proof]]]:
    """The proofs of all that are selected, on their way."""
    selected = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and "campaign" in item.fixturenames
    ]
    seed = int(os.environ.get("MUTANTS_SEED") or random.randrange(10**6))
    tmp_path_factory.getbasetemp()  # made here: two threads that ask first would make two
    with storms_ignored():
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            yield {name: pool.submit(carry_out, name, kafka.bootstrap, tmp_path_factory.mktemp, seed) for name in selected}
        finally:
            pool.shutdown(cancel_futures=True)


def told(proof: Proof) -> str:
    """What is known of a proof, for whoever looks for the reason."""
    found = {verdict.check: [*verdict.anomalies[:3], *verdict.lacking] for verdict in proof.verdicts}
    return json.dumps(
        {
            "seed": proof.setting["seed"],
            "folder": proof.kept_in,
            "found": {check: sentences for check, sentences in found.items() if sentences},
            "figures": proof.figures,
            "faults": [fault_line(fault) for fault in proof.faults],
            "troubles": proof.troubles,
        },
        indent=1,
    )


def of_campaign(names: Iterable[str]) -> list[Any]:
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.soak) for name in names]


@pytest.mark.parametrize("name", of_campaign(MUTANTS))
def test_is_caught(name: str, campaign: Mapping[str, Future[Proof]]) -> None:
    proof = campaign[name].result()
    assert proof.outcome != "held"
    assert complaining(proof) & MUTANTS[name].caught_by, f"{MUTANTS[name].lie}\n{told(proof)}"


@pytest.mark.parametrize("name", of_campaign(HONEST))
def test_is_honest(name: str, campaign: Mapping[str, Future[Proof]]) -> None:
    proof = campaign[name].result()
    assert proof.outcome == "held", told(proof)
    assert settled(name, proof), told(proof)


EACH_PATCHES = """
import os, sys, traceback
from tests.mutants import MUTANTS
lost = []
for name, mutant in MUTANTS.items():
    if os.fork() == 0:
        try:
            mutant.patch()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if os.wait()[1]:
        lost.append(name)
print(*lost)
"""


def test_every_mutant_finds_what_it_patches() -> None:
    """Also those that run seldom: the library has changed since."""
    tried = subprocess.run([sys.executable, "-c", EACH_PATCHES], capture_output=True, text=True, timeout=60, check=True)
    assert not tried.stdout.strip(), tried.stdout + tried.stderr


@pytest.mark.parametrize("guarantee", [AMO, ALO, EOS])
def test_who_does_not_lie_meets_whatever_brings_liars_to_light(guarantee: str) -> None:
    liars = {fault for mutant in MUTANTS.values() if mutant.guarantee == guarantee for fault in mutant.faults}
    honest = {fault for plan in HONEST.values() if plan["guarantee"] == guarantee for fault in plan["faults"]}
    assert liars <= honest
    assert honest <= FAULTS.keys()
