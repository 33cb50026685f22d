"""``python -m benchmarks``: all of it, or a part, on Kafkas that are started for it. See README.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from kafka_guarantees.testing import LocalKafka

from .contestants import contestants
from .latency import Ways, measure
from .plan import BARE, ONE_IN_FLIGHT, OURS, Entry, messages, pace, plan
from .results import Column, Result
from .runs import RunFailed, TookTooLong, run
from .show import as_html, latency_table, race_table, troubles, verdict_table
from .stage import Stage
from .targets import GUARANTEES, verdicts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal

    from .contestants import Contestant
    from .plan import Race

SECTIONS = ("produce", "consume", "transform", "exactly-once", "latency", "sizes", "partitions", "workers")
LIMIT = 20.0  # seconds for a process to start and to end
SLOWER_THAN_EXPECTED = 15  # times: then it is ended
OUT_AFTER = 2  # failures in one race
ROUNDS = {1: 4, 3: 1}  # of latency, by brokers


@dataclass
class Bench:
    """What was asked for, and what has come of it so far."""

    rounds: int
    seconds: float
    out: Path
    everyone: Mapping[str, Contestant]
    missing: Mapping[str, str]
    console: Console = field(default_factory=lambda: Console(width=150, highlight=False))
    results: list[Result] = field(default_factory=list)
    ways: list[Ways] = field(default_factory=list)
    began: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M"))

    def race(self, stage: Stage, race: Race) -> None:
        """Let all take turns, in one order and then in the other, and show what came of it."""
        entries = [entry for entry in race.entries if entry.name in self.everyone]
        result = Result(replace(race, entries=entries), {entry.label: Column(entry.label) for entry in entries})
        self._warm_up(stage, race, entries)
        for number in range(min(self.rounds, race.rounds)):
            for entry in entries if number % 2 == 0 else reversed(entries):
                self._turn(stage, race, entry, result.columns[entry.label])
        self.results.append(result)
        self.console.print(race_table(result), *troubles(result.columns.values()), sep="\n")
        self.keep()

    def _warm_up(self, stage: Stage, race: Race, entries: Sequence[Entry]) -> None:
        """A run that does not count, the first time that brokers have this work: what they pay once is nobody's."""
        if race.work not in stage.warm:
            stage.warm.add(race.work)
            entry = next((entry for entry in entries if entry.name == BARE), entries[0])
            self._turn(stage, race, entry, Column(entry.label))

    def _turn(self, stage: Stage, race: Race, entry: Entry, column: Column) -> None:
        if column.failures >= OUT_AFTER or (entry.once and column.samples):
            column.skip()
            return
        count = messages(race, pace(race, entry, column.rates) / 10**column.failures, self.seconds)
        limit = LIMIT + SLOWER_THAN_EXPECTED * self.seconds
        try:
            column.add(run(stage, race, self.everyone[entry.name], entry.extra, messages=count, limit=limit))
        except TookTooLong as exc:
            column.fail(f"{count:,} messages: {exc}")
        except RunFailed as exc:
            column.fail(str(exc))

    def latency(self, stage: Stage, seconds: float) -> None:
        """Ours and the bare client, in turns, guarantee by guarantee."""
        shown: list[Ways] = []
        for guarantee in GUARANTEES:
            entries = [Entry(OURS), Entry(BARE), *([ONE_IN_FLIGHT] if guarantee == "exactly-once" else [])]
            ways = {one.label: Ways(one.label, guarantee, stage.brokers) for one in entries if one.name in self.everyone}
            if ways:  # what brokers pay the first time is nobody's
                self._way(stage, entries[1] if BARE in ways else entries[0], Ways("warm-up", guarantee, stage.brokers), seconds)
            for number in range(ROUNDS[stage.brokers]):
                for entry in entries if number % 2 == 0 else reversed(entries):
                    if entry.label in ways and not ways[entry.label].troubles:
                        self._way(stage, entry, ways[entry.label], seconds)
            shown += ways.values()
        self.ways += shown
        self.console.print(latency_table(shown), *troubles(shown), sep="\n")
        self.keep()

    def _way(self, stage: Stage, entry: Entry, ways: Ways, seconds: float) -> None:
        try:
            ways.rounds.append(measure(stage, self.everyone[entry.name], ways.guarantee, dict(entry.extra), seconds))
        except RunFailed as exc:
            ways.troubles.append(str(exc))

    def report(self) -> dict[str, Any]:
        return {
            "format": 1,
            "began": self.began,
            "python": platform.python_version(),
            "machine": platform.platform(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[1],
            "rounds": self.rounds,
            "races": [result.as_json() for result in self.results],
            "latency": [way.as_json() for way in self.ways],
            "targets": [verdict.as_json() for verdict in verdicts(self.results, self.ways)],
            "missing": dict(self.missing),
        }

    def keep(self) -> None:
        """Write what is known: whoever stops it half-way has that."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        report = self.report()
        self.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
        self.out.with_suffix(".html").write_text(as_html(report), encoding="utf-8")


def on(brokers: int, bench: Bench, races: Sequence[Race], latency: float) -> None:
    """Start a Kafka, and run on it what is for so many brokers."""
    if not races and not latency:
        return
    with LocalKafka(brokers=cast("Literal[1, 3]", brokers), full_jvm=True) as kafka:
        stage = Stage(kafka, brokers)
        for race in races:
            bench.race(stage, race)
        if latency:
            bench.latency(stage, latency)


def main() -> None:
    """Run it, and show what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ours beside other clients of Kafka.")
    parser.add_argument("--only", default=",".join(SECTIONS), help="some of: %(default)s")
    parser.add_argument("--peers", help="some of them, by name (default: all that can be made ready here)")
    parser.add_argument("--brokers", type=int, choices=(1, 3), help="one kind of cluster (default: both)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="that a run is to take (default: %(default)s)")
    parser.add_argument("--latency-seconds", type=float, default=8, help="of each run of latency (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/bench/result.json"), help="default: %(default)s, and .html")
    asked = parser.parse_args()
    sections = asked.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no section is called {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that contestants and brokers end with it
    began = time.monotonic()
    everyone, missing = contestants(asked.peers.split(",") if asked.peers else None)
    bench = Bench(asked.rounds, asked.seconds, asked.out, everyone, missing)
    works = {name: one.works for name, one in everyone.items() if name != OURS}
    races = [race for race in plan(works) if race.section in sections]
    for brokers in (1, 3) if asked.brokers is None else (asked.brokers,):
        chosen = [race for race in races if race.brokers == brokers]
        on(brokers, bench, chosen, asked.latency_seconds if "latency" in sections else 0)
    bench.console.print(verdict_table(verdicts(bench.results, bench.ways)))
    for name, why in missing.items():
        bench.console.print(f"missing: {name}: {why}", style="red", markup=False)
    if (load := os.getloadavg()[1]) > 2 * (os.cpu_count() or 1):
        bench.console.print(f"load {load:.1f}: ratios are partly what others took")
    bench.console.print(
        f"{(time.monotonic() - began) / 60:.0f} minutes: {asked.out} and {asked.out.with_suffix('.html')}", markup=False
    )


if __name__ == "__main__":
    main()
