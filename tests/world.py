"""What tests of transactions share: topics and a group of their own, and a C producer that fails where a test says."""

from __future__ import annotations

import gc
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from kafka_guarantees import ExactlyOnce, Record

from .conftest import committed, fill
from .kafka_wire import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from confluent_kafka import Message

DEADLINE = 60.0  # seconds for everything that must happen


class World:
    """An input and an output topic, a group and a transactional.id that nobody else uses."""

    def __init__(self, bootstrap: str, source: str, sink: str, partitions: int, name: str) -> None:
        self.bootstrap = bootstrap
        self.source = source
        self.sink = sink
        self.partitions = partitions
        self.group = f"group-{name}"
        self.transactional_id = f"tx-{name}"
        self.ends = [0] * partitions

    def client(self, *, commit_interval: float = 0.1, transactions_in_flight: int = 3, **config: object) -> ExactlyOnce:
        """Keyword arguments are librdkafka's, with ``_`` for dots."""
        given = {
            "bootstrap.servers": self.bootstrap,
            "group.id": self.group,
            "transactional.id": self.transactional_id,
            **{name if name.endswith("_cb") else name.replace("_", "."): value for name, value in config.items()},
        }
        return ExactlyOnce(given, commit_interval=commit_interval, transactions_in_flight=transactions_in_flight)

    def fill(self, count: int) -> list[bytes]:
        """Write so many more messages, round robin, and return their values, sorted."""
        first = sum(self.ends)
        written = [b"%06d" % number for number in range(first, first + count)]
        fill(self.bootstrap, self.source, written, self.partitions)
        for number in range(count):
            self.ends[number % self.partitions] += 1
        return written

    def copy(self, message: Message) -> Iterator[Record]:
        """The handler that copies a message to the same partition of the output."""
        yield Record(self.sink, message.value(), partition=message.partition())

    def output(self) -> list[bytes]:
        return visible(self.bootstrap, self.sink)

    def committed(self) -> list[int]:
        return committed(self.bootstrap, self.group, self.source, self.partitions)

    def run(self, client: ExactlyOnce, handler: Callable[[Message], Any] | None = None, **options: Any) -> None:
        """Run until the whole input is committed."""
        with self.stopping(client):
            client.run([self.source], handler or self.copy, **options)

    @contextmanager
    def stopping(self, *clients: ExactlyOnce) -> Iterator[None]:
        """Stop the clients once the whole input is committed."""
        over = threading.Event()

        def watch() -> None:
            deadline = time.monotonic() + DEADLINE
            reader = Consumer(
                {"bootstrap.servers": self.bootstrap, "group.id": self.group, "isolation.level": "read_committed"}
            )
            wanted = [TopicPartition(self.source, number) for number in range(self.partitions)]
            while not over.wait(0.02) and time.monotonic() < deadline:
                with suppress(KafkaException):  # an open transaction
                    if [partition.offset for partition in reader.committed(wanted, 1)] == self.ends:
                        break
            if not over.is_set():  # a stop that comes after a run would end the next one
                for client in clients:
                    client.stop()
            reader.close()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def in_thread(target: Callable[[], object]) -> Callable[[], BaseException | None]:
    """Call ``target`` in a thread. The answer waits for its end and returns what it raised."""
    raised: list[BaseException] = []

    def call() -> None:
        try:
            target()
        except BaseException as error:  # noqa: BLE001 - it is returned
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()

    def ended() -> BaseException | None:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "still running"
        return raised[0] if raised else None

    return ended


def until(happened: Callable[[], bool], what: str, timeout: float = DEADLINE) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


class Scripted(Producer):
    """A producer whose transactional calls are recorded and may fail as a test says."""

    calls: list[tuple[str, tuple[object, ...]]]
    before: dict[str, list[BaseException | None]]
    after: dict[str, list[BaseException | None]]

    def _do(self, name: str, *args: object) -> Any:
        self.calls.append((name, args))
        self._raise(self.before, name)
        result = getattr(super(), name)(*args)
        self._raise(self.after, name)
        return result

    @staticmethod
    def _raise(script: dict[str, list[BaseException | None]], name: str) -> None:
        error = script[name].pop(0) if script.get(name) else None
        if error is not None:
            raise error

    def init_transactions(self, *args: object) -> Any:
        return self._do("init_transactions", *args)

    def begin_transaction(self, *args: object) -> Any:
        return self._do("begin_transaction", *args)

    def send_offsets_to_transaction(self, *args: object) -> Any:
        return self._do("send_offsets_to_transaction", *args)

    def commit_transaction(self, *args: object) -> Any:
        return self._do("commit_transaction", *args)

    def abort_transaction(self, *args: object) -> Any:
        return self._do("abort_transaction", *args)


def names(script: type[Scripted]) -> list[str]:
    return [name for name, _ in script.calls]


def retriable(code: int) -> KafkaException:
    return KafkaException(KafkaError(code, "for the test", retriable=True))


def fatal() -> KafkaException:
    return KafkaException(KafkaError(KafkaError._FATAL, "for the test", fatal=True))


@contextmanager
def without_collector() -> Iterator[None]:
    """It comes when it comes: nothing may depend on it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
