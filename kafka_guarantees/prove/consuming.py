"""What transformers and consumers do: handle messages, in every way that the library offers, and note it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kafka_guarantees import ExactlyOnce, Record

from .evidence import FAIL, INVOKE, OK, OUTPUTS, REFUSED
from .life import ATTEMPT, ID, LARGE, ORIGIN, TOO_LARGE, Deliberate, content_of, extra
from .reading import header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from confluent_kafka import Message

    from kafka_guarantees import AtLeastOnce, AtMostOnce

    from .life import Life

MAX_BATCH = 100
TOO_LARGE_INSTEAD = 0.3  # of failing handlings yield what no topic takes


class Consuming:
    """The consuming side of a life."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._attempts = 0
        self._outputs = OUTPUTS if life.job.role == "transformer" else 0

    def run(self, client: Any) -> None:
        """Handle messages until stopped."""
        source = [self._life.job.source]
        ways: list[Callable[[], None]] = [
            lambda: client.run(source, self._handle),
            lambda: client.run_batches(source, self._handle_batch, max_batch=MAX_BATCH),
            lambda: (self._transactions if isinstance(client, ExactlyOnce) else self._messages)(client),
        ]
        self._life.dice.choice(ways)()
        self._life.stopping = True  # run() takes SIGTERM for itself, and returns

    def closed(self) -> None:
        """The client was closed, and has raised nothing."""

    def _messages(self, client: AtMostOnce | AtLeastOnce) -> None:
        """A loop of one's own."""
        for message in client.messages([self._life.job.source]):
            for record in self._handle(message):
                _produce(client, record)

    def _transactions(self, client: ExactlyOnce) -> None:
        """A loop of one's own over transactions."""
        for transaction in client.transactions([self._life.job.source], max_batch=MAX_BATCH):
            first = self._attempts
            if len(transaction.messages) > MAX_BATCH:
                self._life.broken(f"a transaction of {len(transaction.messages)} messages, with max_batch={MAX_BATCH}")
            try:
                with transaction:
                    for message in transaction.messages:
                        for record in self._handle(message):
                            _produce(transaction, record)
            except Deliberate:
                for number in range(first, self._attempts):
                    self._life.history.note("attempt", FAIL, attempt=self._name(number))

    def _handle_batch(self, messages: Sequence[Message]) -> Iterator[Record]:
        """A handler of batches."""
        if len(messages) > MAX_BATCH:
            self._life.broken(f"a batch of {len(messages)} messages, with max_batch={MAX_BATCH}")
        for message in messages:
            yield from self._handle(message)

    def _handle(self, message: Message) -> Iterator[Record]:
        """A handler: its beginning and its end are in the history, and so are its failures."""
        life, partition, offset = self._life, message.partition() or 0, message.offset() or 0
        known: dict[str, Any] = {
            "id": header(message, ID),
            "attempt": self._name(self._attempts),
            "topic": message.topic(),
            "partition": partition,
            "offset": offset,
            "content": content_of(message),
        }
        self._attempts += 1
        life.history.note("handle", INVOKE, **known)
        slow, life.slow = life.slow, 0.0
        time.sleep(slow + life.dice.expovariate(1 / life.job.handling))
        failing = life.dice.random() < life.failing
        for number in range(self._outputs):
            if failing and number:
                break
            yield self._output(message, known["attempt"], number)
        if failing and self._outputs and life.dice.random() < TOO_LARGE_INSTEAD:
            life.history.note("handle", FAIL, detail=REFUSED, **known)
            # and nothing is said: that is for the library to find out, at once or from a report that comes later
            yield life.dice.choice((Record(life.job.sink, TOO_LARGE), Record(life.job.refusing, LARGE)))
        elif failing:
            life.history.note("handle", FAIL, **known)
            raise Deliberate
        else:
            life.history.note("handle", OK, **known)

    def _output(self, message: Message, attempt: str, number: int) -> Record:
        partition, sink = message.partition() or 0, self._life.job.sink
        ours = [(ID, f"{header(message, ID)}/{number}"), (ATTEMPT, attempt), (ORIGIN, f"{partition}:{message.offset()}")]
        return Record(
            sink,
            message.value(),
            message.key(),
            headers=[*extra(message), *ours],
            partition=(partition + number) % self._life.job.partitions,
        )

    def _name(self, attempt: int) -> str:
        return f"{self._life.job.who}.{self._life.job.life}.{attempt}"


def _produce(client: Any, record: Record) -> None:
    client.produce(record.topic, record.value, record.key, headers=record.headers, partition=record.partition)
