"""The demo as a program: all flows, one after the other, on one Kafka; then one table and the verdict."""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kafka_guarantees.testing.local_kafka import local_or_running

from .check import judge, verdict
from .offers import FLOWS, INBOX
from .screen import Screen
from .stage import Plan, run_stage
from .table import notes, table
from .topics import shortest_session

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

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


def run_demo(
    *, seed: int | None = None, kills: int = 3, rate: int = 400, flows: Sequence[Flow] = FLOWS, screen: Screen | None = None
) -> bool:
    """Run the demo, and print what came of it.

    Args:
        seed: of the moments at which workers are killed.
        kills: how often the worker of each guarantee is killed.
        rate: offers sent per second.
        flows: which guarantees.
        screen: where to print.

    Returns:
        True where every guarantee was kept.

    Raises:
        LocalKafkaError: no Kafka could be started.
        KafkaException: the Kafka that runs already does not answer.
    """
    screen = Screen() if screen is None else screen
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    screen.say(_opening(flows, seed, kills))
    dice = random.Random(seed)  # noqa: S311 - repeatable is the point
    with local_or_running() as bootstrap:
        session = max(SESSION_MS, shortest_session({"bootstrap.servers": bootstrap}))
        with _Evidence(screen) as evidence, _logging_to(evidence.folder / "driver.log"):
            kept = _run(flows, Plan(bootstrap, kills, rate, dice, evidence.folder, screen), session)
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


def _run(flows: Sequence[Flow], plan: Plan, session: int) -> bool:
    rows = []
    for flow in flows:
        config = _config(flow, plan.bootstrap, session)
        figures = judge(run_stage(flow, plan, config))
        plan.screen.say(verdict(figures))
        rows.append((figures, _settings(flow, config)))
    plan.screen.say(f"\n{table(rows)}\n{notes()}")
    return not any(figures.broken for figures, _ in rows)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """What the library has to say goes to a file: the screen belongs to the demo."""
    log, to_file = logging.getLogger("kafka_guarantees"), logging.FileHandler(path)
    log.addHandler(to_file)
    try:
        yield
    finally:
        log.removeHandler(to_file)
        to_file.close()


def _opening(flows: Sequence[Flow], seed: int, kills: int) -> str:
    made = [f"{flow.kafka.__name__}(config{f', {flow.remembers}(file)' if flow.remembers else ''})" for flow in flows]
    width = max(map(len, made))
    lines = [f"    {client:<{width}}.run([{flow.reads!r}], {_handler(flow)})" for flow, client in zip(flows, made, strict=True)]
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
