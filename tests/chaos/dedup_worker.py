"""One worker process with a deduplication store or an inbox: its effects, and what the store said, go into a history.

Run as ``python -m tests.chaos.dedup_worker JOB`` with a ``Job`` in JSON. ``guarantee`` is the name of a store, an inbox or a
mutant; ``arguments`` are ``where`` it is, ``table`` for the effects of an inbox, and ``max_batch``.

The effect of a handler under a store is its line in the history, in the middle of handling: what a SIGKILL can come before and
after. Under an inbox it is a row of the inbox's database, and its line says only that it was tried.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from kafka_guarantees import AtLeastOnce
from kafka_guarantees.dedup import MemoryDedupStore, Outcome, PostgresDedupStore, PostgresInbox, SqliteDedupStore, SqliteInbox
from kafka_guarantees.dedup.redis import RedisDedupStore

from .worker import main

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from confluent_kafka import Message

    from kafka_guarantees.dedup import Item

    from .worker import Job

PATIENCE = 2.0  # seconds that a client of Redis waits for an answer


class History:
    """The file of a job. A line is one ``write`` to a file opened with O_APPEND: it survives a SIGKILL, and is whole (H06)."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, what: str, *names: str) -> None:
        """A line for each name: what, pid, when, name. The clock is the same for all processes of the host."""
        start = f"{what} {os.getpid()} {time.monotonic():.6f} "
        os.write(self._file, "".join(f"{start}{name}\n" for name in names).encode())


class Noted:
    """A store whose takeovers, and whose completions that came too late, are in the history."""

    def __init__(self, store: Any, history: History) -> None:
        self._store, self._history = store, history
        self.capabilities, self.retention = store.capabilities, store.retention
        self.release, self.purge, self.close = store.release, store.purge, store.close

    def claim(self, scope: str, items: Sequence[Item], **how: Any) -> list[Outcome]:
        outcomes: list[Outcome] = self._store.claim(scope, items, **how)
        taken = [item.key.hex() for item, outcome in zip(items, outcomes, strict=True) if outcome is Outcome.TAKEN_OVER]
        self._history.note("taken", *taken)
        return outcomes

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        done: list[bool] = self._store.complete(scope, items, token=token)
        self._history.note("late", *(item.key.hex() for item, completed in zip(items, done, strict=True) if not completed))
        return done


class MarksFirst(Noted):
    """Mutant: completes what it claims, so before it is handled (D02)."""

    def claim(self, scope: str, items: Sequence[Item], **how: Any) -> list[Outcome]:
        outcomes = super().claim(scope, items, **how)
        mine = [item for item, outcome in zip(items, outcomes, strict=True) if outcome <= Outcome.TAKEN_OVER]
        super().complete(scope, mine, token=how["token"])
        return outcomes


class NeverMarks(Noted):
    """Mutant: forgets what it claimed instead of completing it."""

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        self.release(scope, items, token=token)
        return [True] * len(items)


class SkipsClaimed(Noted):
    """Mutant: what somebody has claimed counts as done, whoever comes for it (D09)."""

    def claim(self, scope: str, items: Sequence[Item], **how: Any) -> list[Outcome]:
        outcomes = super().claim(scope, items, **{**how, "takeover": "lease"})
        return [Outcome.DUPLICATE if outcome is Outcome.IN_PROGRESS else outcome for outcome in outcomes]


def open_memory(job: Job, history: History, stack: ExitStack) -> dict[str, Any]:
    """Open the store or the inbox of a job: an argument of ``AtLeastOnce``."""
    where = job.arguments["where"]
    match job.guarantee:
        case "SqliteInbox" | "EffectsApart":
            return {"inbox": stack.enter_context(SqliteInbox(where))}
        case "PostgresInbox":
            return {"inbox": stack.enter_context(PostgresInbox(where))}
        case "MemoryDedupStore":
            store: Any = stack.enter_context(MemoryDedupStore())
        case "PostgresDedupStore":
            store = PostgresDedupStore(where)
            stack.callback(store.close)
        case "RedisDedupStore":
            import redis  # noqa: PLC0415 - an extra

            client = redis.Redis.from_url(where, socket_timeout=PATIENCE, socket_connect_timeout=PATIENCE)
            store = RedisDedupStore(stack.enter_context(client))
        case _:
            store = stack.enter_context(SqliteDedupStore(where))
    wrapper = {"MarksFirst": MarksFirst, "NeverMarks": NeverMarks, "SkipsClaimed": SkipsClaimed}.get(job.guarantee, Noted)
    return {"dedup": wrapper(store, history)}


class Handler:
    """Handles messages, with their effect in the middle of a pause."""

    def __init__(self, job: Job, history: History) -> None:
        self._job = job
        self._history = history
        mark = "%s" if job.guarantee == "PostgresInbox" else "?"
        self._insert = f"INSERT INTO {job.arguments.get('table', 'effects')} VALUES ({mark})"

    def handle(self, message: Message, connection: Any = None) -> None:
        """Have the effect of one message."""
        name = (message.value() or b"").decode()
        time.sleep(self._job.pause / 2)
        self._history.note("effect", name)
        if self._job.guarantee == "EffectsApart":  # mutant: the effect is not in the inbox's transaction
            with sqlite3.connect(self._job.arguments["where"] + "-apart", isolation_level=None) as other:
                other.execute(self._insert, [name])
            other.close()
        elif connection is not None:
            connection.execute(self._insert, [name])
        time.sleep(self._job.pause / 2)

    def handle_all(self, messages: Sequence[Message], *connection: Any) -> None:
        """Have the effects of a batch."""
        for message in messages:
            self.handle(message, *connection)


def consume(job: Job, client: AtLeastOnce, handler: Handler) -> None:
    """Consume until stopped, in the style of the job."""
    max_batch = job.arguments["max_batch"]
    if job.style == "run":
        client.run([job.source], handler.handle, max_batch=max_batch)
    elif job.style == "run_batches":
        client.run_batches([job.source], handler.handle_all, max_batch=max_batch)
    else:
        for message in client.messages([job.source], max_batch=max_batch):
            handler.handle(message)


def serve(job: Job) -> None:
    """The whole life of a worker."""
    history = History(job.history)
    with ExitStack() as stack:
        memory = open_memory(job, history, stack)
        client = stack.enter_context(AtLeastOnce(job.config, **memory))

        def stop(_number: int, _frame: FrameType | None) -> None:
            client.stop()

        signal.signal(signal.SIGTERM, stop)
        consume(job, client, Handler(job, history))


if __name__ == "__main__":
    main(serve)
