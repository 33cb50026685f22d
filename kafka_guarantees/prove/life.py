"""What one process of a worker is told, and what it tells: shared by all that it does."""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .history import History

if TYPE_CHECKING:
    from confluent_kafka import Message

CRASHED = 3  # exit status of a life that an exception ended
ID, ATTEMPT, ORIGIN = "prove-id", "prove-attempt", "prove-origin"  # headers of every record; all others are its content
FAILING = 1 / 60  # of handlings fail
REFUSING = "refused"  # the end of the name of a topic
TOO_LARGE = b"x" * 2_000_000  # librdkafka itself refuses it
LARGE = b"x" * 400_000  # the brokers do: more than the topics take


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Attributes:
        guarantee: by its name.
        who: the worker's name: its role, and a number.
        life: how often it was started.
        config: librdkafka's properties.
        source, sink: topics with the same number of partitions.
        history: the file to append to.
        seed: of the choices of this life.
        rate: records per second that a sender sends.
        handling: seconds that handling one message takes on average.
    """

    guarantee: str
    who: str
    life: int
    config: dict[str, Any] = field(repr=False)
    source: str
    sink: str
    partitions: int
    history: str
    seed: str
    rate: float
    handling: float

    def __str__(self) -> str:
        """The form that travels on stdin."""
        return json.dumps(asdict(self))

    @property
    def refusing(self) -> str:
        """The topic for outputs that the brokers refuse: with one they refuse the whole batch that it is in."""
        return self.sink.removesuffix("out") + REFUSING

    @property
    def role(self) -> str:
        """``sender``, ``transformer`` or ``consumer``."""
        return self.who.rpartition("-")[0]


class Storm(Exception):
    """Raised by the worker's own signal handler, at any instant."""


class Deliberate(Exception):
    """Raised by a handler, or in the middle of a transaction, to see what becomes of it."""


class Life:
    """One process of a worker.

    Attributes:
        job: what it is to do.
        history: what it did.
        dice: its choices.
        stopping: whether it was told to stop.
        failing: how many of its handlings raise.
        slow: seconds that the next handling takes on top.
        slowed: how often it was told so.
        callbacks_raise: whether the user's callbacks are to raise.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.history = History(job.history, job.who, job.life)
        self.dice = random.Random(job.seed)  # noqa: S311 - repeatable is the point
        self.stopping = False
        self.failing = FAILING
        self.slow = 0.0
        self.slowed = 0
        self.callbacks_raise = False

    def broken(self, what: str) -> None:
        """Note that the library did not do what its documentation says."""
        self.history.note("broken", "info", detail=what)


def content(key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes | None]]) -> str:
    """What must be the same wherever a record is."""
    return f"{zlib.crc32(repr((key, value, headers)).encode()):08x}"


def extra(message: Message) -> list[tuple[str, bytes | None]]:
    """The headers of a message that are not the proof's."""
    headers: Any = message.headers() or []  # a list, whatever the stubs say
    return [(name, _bytes(value)) for name, value in headers if name not in (ID, ATTEMPT, ORIGIN)]


def content_of(message: Message) -> str:
    """The content of a message that was read."""
    return content(_bytes(message.key()), _bytes(message.value()), extra(message))


def _bytes(data: bytes | str | None) -> bytes | None:
    return data.encode() if isinstance(data, str) else data
