"""The story of the demo: user offers. Which topics a flow reads and writes, and the handler that all three flows share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from confluent_kafka import Message

    from .effects import EffectLog


@dataclass(frozen=True)
class Flow:
    """What goes under one guarantee: the class, and the topics that its worker reads and writes."""

    guarantee: str
    kafka: type[AtMostOnce | AtLeastOnce | ExactlyOnce]
    reads: str
    writes: str


FLOWS = (
    Flow("at-most-once", AtMostOnce, "debug-events", "debug-report"),
    Flow("at-least-once", AtLeastOnce, "offer-changes", "notifications"),
    Flow("exactly-once", ExactlyOnce, "offer-requests", "user-offers"),
)


@dataclass(frozen=True)
class Task:
    """What a worker is told: the guarantee, its configuration, its topics, and the file of its effect log."""

    guarantee: str
    config: dict[str, str | int]
    reads: str
    writes: str
    effects: str

    def __str__(self) -> str:
        return json.dumps(asdict(self))


def code(offer: str) -> str:
    """The f of output = f(input): a code that belongs to one offer."""
    return hashlib.blake2b(offer.encode(), digest_size=6).hexdigest().upper()


def grant_to(effects: EffectLog, writes: str) -> Callable[[Message], Iterator[Record]]:
    """The handler, the same under every guarantee: note that it began, and produce the offer's code."""

    def grant(message: Message) -> Iterator[Record]:
        offer = (message.key() or b"").decode()
        effects.append(offer)
        yield Record(writes, key=offer, value=code(offer))

    return grant
