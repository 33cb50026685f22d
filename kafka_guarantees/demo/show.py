"""The demo as a program: all flows, one after the other, on one Kafka; then one table and the verdict."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kafka_guarantees.testing.local_kafka import local_or_running

from .check import judge, verdict
from .offers import FLOWS, INBOX
from .screen import Screen, logging_to
from .stage import Plan, run_stage
from .table import notes, table
from .topics import shortest_session

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

    from .offers import Flow

SESSION_MS = 1500  # a dead member is noticed soon; brokers that other people run may insist on more
MATTER = {
    "acks": "acks={}",
    "offsets are committed": "offsets committed {}",
    "enable.idempotence": "enable.idempotence={}",
    "transactional.id": "transactional.id={}",
    "isolation.level": "isolation.level={}",
    "session.timeout.ms": "session.timeout.ms={}",
}
WHEN = {"before": "before handling", "after": "after handling", "with": "in the transaction"}


def run_demo(*, seed: int | None, kills: int, rate: int) -> bool:
    """Run the demo, and print what came of it.

    Args:
        seed: of the moments at which workers are killed; None: any.
        kills: how often the worker of each guarantee is killed.
        rate: offers sent per second.

    Returns:
        True where every guarantee was kept.

    Raises:
        LocalKafkaError: no Kafka could be started.
        KafkaException: the Kafka that runs already does not answer.
    """
    screen = Screen()
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    screen.say(_opening(seed, kills))
    dice = random.Random(seed)  # noqa: S311 - repeatable is the point
    with local_or_running() as bootstrap:
        session = max(SESSION_MS, shortest_session({"bootstrap.servers": bootstrap}))
        with _Evidence(screen) as evidence, logging_to(evidence.folder / "driver.log"):
            kept = _run(Plan(bootstrap, kills, rate, dice, evidence.folder, screen), session)
            evidence.keep = not kept
    return kept


class _Evidence:
    """The folder for effect logs, topics, and what the workers say. It stays where somebody will want to read it."""

    def __init__(self, screen: Screen) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kafka-guarantees-demo-"))
        self.keep = False
        self._screen = screen

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.keep or (kind is not None and issubclass(kind, Exception)):  # not after Ctrl-C
            self._screen.say(f"Effect logs, copies of the topics, and what the workers said: {self.folder}")
        else:
            shutil.rmtree(self.folder)


def _run(plan: Plan, session: int) -> bool:
    rows = []
    for flow in FLOWS:
        config = _config(flow, plan.bootstrap, session)
        figures = judge(run_stage(flow, plan, config))
        plan.screen.say(verdict(figures))
        rows.append((figures, _settings(flow, config)))
    plan.screen.say(f"\n{table(rows)}\n{notes()}")
    return not any(figures.broken for figures, _ in rows)


def _opening(seed: int, kills: int) -> str:
    made = [f"{flow.kafka.__name__}(config{f', {flow.remembers}(file)' if flow.remembers else ''})" for flow in FLOWS]
    width = max(map(len, made))
    lines = [f"    {client:<{width}}.run([{flow.reads!r}], {_handler(flow)})" for flow, client in zip(FLOWS, made, strict=True)]
    return "\n".join(
        [
            f"Keeping user offers consistent while workers die: each is killed (SIGKILL) {kills} times. Seed {seed}.",
            "The handler is the same function, and only the class changes; with an inbox it writes to the inbox's database:",
            "",
            *lines,
            "",
        ]
    )


def _handler(flow: Flow) -> str:
    return "book" if flow.guarantee == INBOX else "grant"


def _config(flow: Flow, bootstrap: str, session: int) -> dict[str, str | int]:
    config: dict[str, str | int] = {
        "bootstrap.servers": bootstrap,
        "group.id": f"{flow.name}-demo",
        "session.timeout.ms": session,
        "heartbeat.interval.ms": session // 4,
    }
    return {**config, "transactional.id": "offers-0"} if flow.guarantee == "exactly-once" else config


def _settings(flow: Flow, config: Mapping[str, str | int]) -> list[str]:
    """The settings that matter, as ``explain()`` says that they are."""
    values = {row.setting: WHEN.get(row.value, row.value) for row in flow.kafka.explain(config)}
    if flow.guarantee == INBOX:
        values["offsets are committed"] = WHEN["with"]
    shown = [text.format(values[setting]) for setting, text in MATTER.items() if setting in values]
    return [flow.remembers, "each offer sent twice", *shown] if flow.remembers else shown
