"""The other clients, each a command that does a job."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

HERE = Path(__file__).parent
WORKS = frozenset({"produce", "consume", "transform", "exactly-once", "echo"})


@dataclass(frozen=True)
class Peer:
    """A client, the works that it knows, and the command for a job."""

    name: str
    works: frozenset[str]
    command: Callable[[Mapping[str, Any]], list[str]]


def _script(name: str) -> Peer:
    return Peer(name, WORKS, lambda job: [sys.executable, str(HERE / f"{name}.py"), json.dumps(job)])


def peers(names: Collection[str] | None) -> tuple[list[Peer], dict[str, str]]:
    """Those that can be made ready here; and of the others, by name, why not."""
    found = [_script("confluent_default"), _script("confluent_tuned")]
    known = {peer.name for peer in found}
    missing = {name: "no peer is called so" for name in names or () if name not in known}
    return [peer for peer in found if names is None or peer.name in names], missing
