"""One worker process: consumes, transforms, produces, with nothing but the public contract of the library.

Run as ``python -m tests.chaos.worker JOB`` with a ``Job`` in JSON. Every start and end of a handling is a line in the
history, written by one ``write`` to a file opened with O_APPEND: it survives a SIGKILL (H06). What ends the worker, other
than a stop, is a line in the crash file.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, HandlerError, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    from confluent_kafka import Message

log = logging.getLogger(__name__)

CLASSES = {"AtMostOnce": AtMostOnce, "AtLeastOnce": AtLeastOnce, "ExactlyOnce": ExactlyOnce}
CRASHED = 3


@dataclass(frozen=True)
class Job:
    """What a worker is to do. All workers of a group have the same, but for ``config``.

    Attributes:
        guarantee: name of the class, or of a mutant.
        config: librdkafka's properties.
        source, sink: topics with the same number of partitions.
        history, crashes: files to append to.
        style: ``run``, ``run_batches`` or ``iterate`` (``messages()``, or ``transactions()`` for ExactlyOnce).
        pause: seconds that handling one message takes.
        arguments: more arguments of the constructor.
        tantrums: SIGUSR1 raises in the main thread, and the user's callbacks raise at random.
    """

    guarantee: str
    config: dict[str, Any]
    source: str
    sink: str
    partitions: int
    history: str
    crashes: str
    style: str = "run"
    pause: float = 0.0005
    arguments: dict[str, Any] = field(default_factory=dict)
    tantrums: bool = False

    def to_json(self) -> str:
        """The form that travels on the command line."""
        return json.dumps(asdict(self))


class Boom(Exception):
    """Raised by the worker's own signal handler, at any instant."""


class Work:
    """What is done with a message: two records for it, and two lines in the history."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._history = os.open(job.history, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, what: str, message: Message) -> None:
        """One line: what, partition, offset, pid, value."""
        value = (message.value() or b"").decode()
        os.write(self._history, f"{what} {message.partition()} {message.offset()} {os.getpid()} {value}\n".encode())

    def handle(self, message: Message) -> Iterator[Record]:
        """A handler that is a generator."""
        self.note("start", message)
        time.sleep(self._job.pause)
        yield from self.records(message)
        self.note("end", message)

    def handle_batch(self, messages: Iterable[Message]) -> Iterator[Record]:
        """A handler of batches."""
        for message in messages:
            yield from self.handle(message)

    def records(self, message: Message) -> list[Record]:
        """The outputs: one in the partition of the same number, one in the next, so that a torn transaction shows."""
        number, partition = (message.value() or b"").decode(), message.partition() or 0
        return [Record(self._job.sink, f"{number}.{n}", partition=(partition + n) % self._job.partitions) for n in (0, 1)]


def consume(job: Job, client: Any, work: Work) -> None:
    """Consume until stopped, in the style of the job."""
    if job.style == "run":
        client.run([job.source], work.handle)
    elif job.style == "run_batches":
        client.run_batches([job.source], work.handle_batch)
    elif isinstance(client, ExactlyOnce):
        for transaction in client.transactions([job.source]):
            with calm(job), transaction:
                for message in transaction.messages:
                    for record in work.handle(message):
                        transaction.produce(record.topic, record.value, partition=record.partition)
    else:
        for message in client.messages([job.source]):
            for record in work.handle(message):
                client.produce(record.topic, record.value, partition=record.partition)


@contextmanager
def calm(job: Job) -> Iterator[None]:
    """A loop that goes on after its own signal handler raised in it."""
    try:
        yield
    except Boom:
        if not job.tantrums:
            raise


def serve(job: Job) -> None:
    """The whole life of a worker."""
    stopping: list[bool] = []
    config = {**job.config, **(_raising_callbacks() if job.tantrums else {})}
    with CLASSES[job.guarantee](config, **job.arguments) as client:

        def stop(_number: int, _frame: FrameType | None) -> None:
            stopping.append(True)
            client.stop()

        signal.signal(signal.SIGTERM, stop)
        if job.tantrums:
            signal.signal(signal.SIGUSR1, _raise)
        work = Work(job)
        while not stopping:
            try:
                consume(job, client, work)
            except Boom:
                continue
            except HandlerError as error:
                if not isinstance(error.__cause__, Boom):  # it hit the handler
                    raise
                continue
            break  # run() takes SIGTERM for itself
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise Boom


def _raising_callbacks() -> dict[str, Any]:
    def naughty(*_: object) -> None:
        if random.random() < 0.3:
            raise RuntimeError("a callback of the user raises")

    return {"error_cb": naughty, "stats_cb": naughty, "statistics.interval.ms": 50}


def main(serve: Callable[[Job], None] = serve) -> None:
    """Serve the job of the command line; what goes wrong is written down."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    job = Job(**json.loads(sys.argv[1]))
    try:
        serve(job)
    except Exception as error:
        entry = {"pid": os.getpid(), "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        with Path(job.crashes).open("a") as crashes:
            crashes.write(json.dumps(entry) + "\n")
        log.exception("crashed")
        sys.exit(CRASHED)


if __name__ == "__main__":
    main()
