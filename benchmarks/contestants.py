"""Who takes part: ours, and the peers that could be made ready here."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from .plan import OURS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

WORKS = frozenset({"produce", "consume", "transform", "exactly-once", "echo"})


class Contestant(NamedTuple):
    """A command for a job.

    Attributes:
        works: that it knows.
        command: the words of the command that does a job.
    """

    name: str
    works: frozenset[str]
    command: Callable[[Mapping[str, Any]], list[str]]


def _ours(job: Mapping[str, Any]) -> list[str]:
    return [sys.executable, "-m", "kafka_guarantees.bench.work", json.dumps(job)]


def contestants(names: Collection[str] | None) -> tuple[dict[str, Contestant], dict[str, str]]:
    """By name, ours first; and of those that cannot be had the reason.

    Args:
        names: of peers; None means all.
    """
    from .peers import peers  # noqa: PLC0415 - it makes environments

    found, missing = peers(names)
    everyone = [Contestant(OURS, WORKS, _ours), *(Contestant(peer.name, frozenset(peer.works), peer.command) for peer in found)]
    return {one.name: one for one in everyone}, missing
