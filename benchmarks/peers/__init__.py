"""The other clients, each a command that does a job. What they run in is made when they are first asked for."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .environments import HERE, Unavailable, go_program, java_command, python_with

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

WORKS = frozenset({"produce", "consume", "transform", "exactly-once", "echo"})
AT_LEAST_ONCE = frozenset({"produce", "consume", "transform"})
STREAMING = frozenset({"transform", "exactly-once", "echo"})


@dataclass(frozen=True)
class Peer:
    """A client, the works that it knows, and the command for a job."""

    name: str
    works: frozenset[str]
    command: Callable[[Mapping[str, Any]], list[str]]


def peers(names: Collection[str] | None) -> tuple[list[Peer], dict[str, str]]:
    """Those that can be made ready here; and of the others, by name, why not.

    The first call takes minutes where it has something to install or to build.

    Args:
        names: of peers; None means all.
    """
    missing = {name: "no peer is called so" for name in names or () if name not in _PEERS}
    found = []
    for name, (works, prepare) in _PEERS.items():
        if names is None or name in names:
            try:
                found.append(Peer(name, works, partial(_command, prepare())))
            except Unavailable as exc:
                missing[name] = str(exc)
    return found, missing


def _command(words: list[str], job: Mapping[str, Any]) -> list[str]:
    return [*words, json.dumps(job)]


def _ours_runs(script: str) -> list[str]:
    return [sys.executable, str(HERE / f"{script}.py")]


def _theirs_runs(script: str, client: str, module: str) -> list[str]:
    return [python_with(client, module), str(HERE / f"{script}.py")]


_PEERS: dict[str, tuple[frozenset[str], Callable[[], list[str]]]] = {
    "confluent_default": (WORKS, partial(_ours_runs, "confluent_default")),
    "confluent_tuned": (WORKS, partial(_ours_runs, "confluent_tuned")),
    "aiokafka": (WORKS, partial(_theirs_runs, "aiokafka_peer", "aiokafka", "aiokafka")),
    "quixstreams": (WORKS - {"echo"}, partial(_theirs_runs, "quixstreams_peer", "quixstreams", "quixstreams")),
    "kafka-python": (WORKS, partial(_theirs_runs, "kafka_python_peer", "kafka-python", "kafka")),
    "faststream": (AT_LEAST_ONCE, partial(_theirs_runs, "faststream_peer", "faststream", "faststream.confluent")),
    "faust": (AT_LEAST_ONCE, partial(_theirs_runs, "faust_peer", "faust-streaming", "faust")),
    "franz-go": (WORKS, lambda: [go_program()]),
    "kafka-streams": (STREAMING, java_command),
}
