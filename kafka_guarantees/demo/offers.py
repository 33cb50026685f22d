"""The story of the demo: user offers. Which topics a flow reads and writes, and the handlers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, Record

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator

    from confluent_kafka import Message

    from .effects import EffectLog


@dataclass(frozen=True)
class Flow:
    """What goes under one guarantee: the class, and the topics that its worker reads and writes.

    Args:
        guarantee: the name of the row.
        kafka: the class.
        reads, writes: topics.
        remembers: the argument of the class that removes repeats, and what is given for it. Each offer is sent twice then.
    """

    guarantee: str
    kafka: type[AtMostOnce | AtLeastOnce | ExactlyOnce]
    reads: str
    writes: str
    remembers: str = ""

    @property
    def name(self) -> str:
        """The guarantee as part of the names of files and groups."""
        return self.guarantee.lower().replace(" + ", "-").replace(" ", "-")


STORE, INBOX = "AtLeastOnce + SQLite store", "AtLeastOnce + SQLite inbox"
FLOWS = (
    Flow("at-most-once", AtMostOnce, "debug-events", "debug-report"),
    Flow("at-least-once", AtLeastOnce, "offer-changes", "notifications"),
    Flow(STORE, AtLeastOnce, "offer-events", "notifications", "dedup=SqliteDedupStore"),
    Flow(INBOX, AtLeastOnce, "offer-credits", "unused", "inbox=SqliteInbox"),
    Flow("exactly-once", ExactlyOnce, "offer-requests", "user-offers"),
)


@dataclass(frozen=True)
class Task:
    """What a worker is told: the guarantee, its configuration, its topics, and the files of its effect log and database."""

    guarantee: str
    config: dict[str, str | int]
    reads: str
    writes: str
    effects: str
    database: str

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


BOOKED = "CREATE TABLE IF NOT EXISTS booked (offer TEXT, code TEXT)"


def book_with(effects: EffectLog) -> Callable[[Message, sqlite3.Connection], None]:
    """The handler of an inbox: note that it began, and book the offer's code with the connection that it is given."""

    def book(message: Message, connection: sqlite3.Connection) -> None:
        offer = (message.key() or b"").decode()
        effects.append(offer)
        connection.execute("INSERT INTO booked VALUES (?, ?)", (offer, code(offer)))

    return book
