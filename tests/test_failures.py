"""Retries and dead letters on a real broker: a message that fails is tried again in its place, set aside, or ends the run."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import count, product
from ssl import SSLCertVerificationError
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from confluent_kafka import Message, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.serialization import SerializationError
from tenacity import (
    AsyncRetrying,
    Retrying,
    TryAgain,
    retry_if_exception_type,
    retry_if_not_result,
    stop_after_attempt,
    stop_after_delay,
    wait_fixed,
    wait_none,
)

from kafka_guarantees import (
    AtLeastOnce,
    AtMostOnce,
    BrokerError,
    DeliveryError,
    DeliveryUnknown,
    ExactlyOnce,
    HandlerError,
    Record,
    TransactionAborted,
    UnsafeConfigError,
)
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._dead_letters import origin_of
from kafka_guarantees._failures import RETRY, Failures, GaveUp, attempt
from kafka_guarantees._futile import FUTILE, may_pass
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._producer import PlainProducer
from kafka_guarantees._serialization import Reading
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees._transactional import AbortNeeded, TransactionalProducer
from kafka_guarantees.dedup import (
    MemoryDedupStore,
    MessageIdMissing,
    MessageIdReused,
    Outcome,
    PostgresInbox,
    SqliteDedupStore,
    SqliteInbox,
)
from kafka_guarantees.dedup.contract import Item
from kafka_guarantees.dedup.ids import key_of
from kafka_guarantees.records import NotRecords
from kafka_guarantees.testing.local_kafka import LocalKafka

from .conftest import committed, read_all, values
from .kafka_wire import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from tenacity import RetryCallState

    from kafka_guarantees.errors import KafkaGuaranteesError
    from kafka_guarantees.testing.local_kafka import RunningKafka
    from kafka_guarantees.testing.servers import LocalPostgres

broker = pytest.mark.broker

KINDS = ["at-least-once", "exactly-once", "memory store", "sqlite store", "sqlite inbox"]
REMEMBER = ["memory store", "sqlite store", "sqlite inbox"]
HOW = ["run", "run_batches"]
TWO = ["at-least-once", "exactly-once"]
PROTOCOLS: dict[str, dict[str, str]] = {
    "classic": {},
    "cooperative": {"partition.assignment.strategy": "cooperative-sticky"},
    "consumer": {"group.protocol": "consumer"},
}
IDLE = 0.3  # seconds without a message that end a run here
SOON = 20.0  # seconds within which what is waited for must happen
BEGAN = int(time.time() - 3600) * 1000  # milliseconds: a time of the messages' own, which retention still keeps
QUICK = Retrying(stop=stop_after_attempt(3), wait=wait_fixed(0.01))
EVER = Retrying(wait=wait_fixed(60))
OPTIONS: dict[str, Any] = {"until_idle": IDLE}
MESSAGE = Message(topic="a-topic", partition=0, offset=7, value=b"7")
SHORT = {"heartbeat.interval.ms": 500, "transaction.timeout.ms": 1500}


def only(kind: str, settings: dict[str, int]) -> dict[str, int]:
    """The settings that a client of this kind takes."""
    return {name: value for name, value in settings.items() if kind == "exactly-once" or not name.startswith("transaction")}


class Interrupt(BaseException):
    """Comes out of a signal handler, as KeyboardInterrupt does."""


class Broken(Exception):
    """What handlers raise here."""


class World:
    """One broker, a group, topics, and the clients of a test, which are closed with their stores at its end."""

    def __init__(self, bootstrap: str, group: str, directory: Path, topic: Callable[..., str]) -> None:
        self.bootstrap = bootstrap
        self.group = group
        self.directory = directory
        self.topic = topic
        self.stack = ExitStack()
        self.remembers: dict[str, Any] = {}

    def client(self, kind: str, *, group: str | None = None, instance: int = 0, **options: Any) -> Any:
        """A client; one with a store or an inbox has the same as the others of its kind."""
        group = group or self.group
        settings = {"bootstrap.servers": self.bootstrap, "group.id": group, **options.pop("settings", {})}
        if kind == "exactly-once":
            return self.stack.enter_context(ExactlyOnce({**settings, "transactional.id": f"{group}-{instance}"}, **options))
        if kind == "at-most-once":
            return self.stack.enter_context(AtMostOnce(settings, start="earliest", **options))
        if kind in REMEMBER:
            options["inbox" if kind == "sqlite inbox" else "dedup"] = self.remembered(kind)
        return self.stack.enter_context(AtLeastOnce(settings, **options))

    def remembered(self, kind: str) -> Any:
        if kind not in self.remembers:
            path = self.directory / f"{kind}.db"
            made: dict[str, Callable[[], Any]] = {
                "memory store": MemoryDedupStore,
                "sqlite store": partial(SqliteDedupStore, path),
                "sqlite inbox": partial(SqliteInbox, path),
            }
            self.remembers[kind] = self.stack.enter_context(made[kind]())
        return self.remembers[kind]

    def offsets(self, topic: str, partitions: int = 1) -> list[int]:
        return committed(self.bootstrap, self.group, topic, partitions)

    def read(self, topic: str, isolation: str = "read_committed") -> list[Message]:
        return read_all(self.bootstrap, topic, isolation=isolation)

    def outputs(self, topic: str) -> list[int]:
        return sorted(int(value) for value in values(self.read(topic)))

    def produced(self, topic: str, kind: str) -> list[int]:
        """What handlers produced. Where an inbox rolls back, the records of what it handles again are there twice."""
        found = self.outputs(topic)
        return sorted(set(found)) if kind == "sqlite inbox" else found

    def send(self, topic: str, numbers: Iterable[int], partitions: int = 1, *, ids: bool = True) -> None:
        send(self.bootstrap, topic, numbers, partitions, ids=ids)

    def given(self, count: int = 20, partitions: int = 1) -> str:
        """A topic with messages 0, 1, ..., round robin over its partitions."""
        topic = self.topic(partitions=partitions)
        self.send(topic, range(count), partitions)
        return topic


def send(bootstrap: str, topic: str, numbers: Iterable[int], partitions: int = 1, *, ids: bool = True) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 5})
    producer.list_topics(topic, 30)
    for number in numbers:
        headers: Any = [("message-id", f"id-{number}".encode()), ("trace", b"\0\xff"), ("none", None)]
        producer.produce(
            topic,
            str(number).encode(),
            f"key-{number}".encode(),
            partition=number % partitions,
            timestamp=BEGAN + number,
            headers=headers if ids else headers[1:],
        )
    assert producer.flush(30) == 0


@pytest.fixture
def world(kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], tmp_path: Path) -> Iterator[World]:
    made = World(kafka.bootstrap, fresh("group"), tmp_path, kafka_topic)
    with made.stack:
        yield made


Row = tuple[Any, ...]


def side_by_side(*columns: Sequence[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Check a law for every row of a table at the same time, each in a world and a thread of its own: most of it is waiting."""

    def decorate(law: Callable[..., None]) -> Callable[..., None]:
        def check(kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], tmp_path: Path) -> None:
            def run(row: Row) -> None:
                directory = tmp_path / "-".join(map(str, row))
                directory.mkdir()
                world = World(kafka.bootstrap, fresh("group"), directory, kafka_topic)
                with world.stack:
                    law(world, *row)

            with ThreadPoolExecutor(10) as pool:
                runs = {row: pool.submit(run, row) for row in product(*columns)}
            errors = {row: error for row, done in runs.items() if (error := done.exception()) is not None}
            if errors:
                raise AssertionError(f"does not hold for {sorted(errors)}") from next(iter(errors.values()))

        check.__name__, check.__doc__ = law.__name__, law.__doc__
        marked: Callable[..., None] = pytest.mark.broker(check)
        return marked

    return decorate


class Calls:
    """A handler that notes its calls, and fails as it is told. Its results are the messages, if it has a topic for them.

    Attributes:
        calls: of every call, the messages' numbers and the attempt.
        handled: the numbers of what it returned from.
    """

    def __init__(self, fails: Callable[[int, int], bool], target: str | None = None) -> None:
        self.fails = fails  # by the number of a message, and how often it was called for it
        self.target = target
        self.calls: list[tuple[list[int], int]] = []
        self.handled: list[int] = []
        self.times: Counter[int] = Counter()
        self.where: dict[int, int | None] = {}

    def one(self, message: Message, *_connection: object) -> list[Record] | None:
        return self.all([message])

    def all(self, messages: Sequence[Message], *_connection: object) -> list[Record] | None:
        numbers = [number_of(message) for message in messages]
        self.calls.append((numbers, attempt.get()))
        self.times.update(numbers)
        self.where.update((number_of(message), message.partition()) for message in messages)
        for number in numbers:
            if self.fails(number, self.times[number]):
                raise Broken(f"number {number}")
        self.handled += numbers
        return None if self.target is None else [Record(self.target, str(number)) for number in numbers]

    def run(self, client: Any, topic: str, how: str = "run", **options: Any) -> None:
        handler = self.one if how == "run" else self.all
        getattr(client, how)([topic], handler, **{**OPTIONS, **options})

    def attempts(self, number: int) -> list[int]:
        return [attempt_number for numbers, attempt_number in self.calls if number in numbers]

    def in_order(self) -> bool:
        """Whether nothing was called for, or finished, before what stands before it in its partition."""
        called = [number for numbers, _ in self.calls for number in numbers]
        first = list(dict.fromkeys(called))
        last = list(dict.fromkeys(reversed(self.handled)))[::-1]  # an inbox rolls back what came before in its transaction
        lanes = set(self.where.values())
        return all(
            [n for n in found if self.where[n] == lane] == sorted(n for n in found if self.where[n] == lane)
            for found in (first, last)
            for lane in lanes
        )


def number_of(message: Message) -> int:
    return int(message.value() or b"-1")


def never(_number: int, _time: int) -> bool:
    return False


def seven(number: int, _time: int) -> bool:
    return number == 7


def until(happened: Callable[[], bool], seconds: float = SOON) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def running(target: Callable[..., object], *args: Any, **named: Any) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=target, args=args, kwargs=named)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(30)
        assert not thread.is_alive()


# -- what tenacity is asked, without a broker ----------------------------------------------------------------------------------


class Waits(list[float]):
    """Notes how long was waited for."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def failures(retry: Any = QUICK, dead_letter: str | None = None) -> Failures:
    settings = resolve(Guarantee.AT_LEAST_ONCE, {"bootstrap.servers": "127.0.0.1:1"})
    return Failures(settings, Lifecycle("test"), Reading(None, None), retry=retry, dead_letter=dead_letter)


def again(retry: Any, call: Callable[[], object], error: Exception | None = None) -> tuple[Any, Waits]:
    waits = Waits()
    return failures(retry).again(call, MESSAGE, error or Broken("first"), waits), waits


def raising(error: BaseException) -> Any:
    def call(*_: object) -> None:
        raise error

    return call


@pytest.mark.parametrize("kind", FUTILE)
def test_a_mistake_of_the_program_is_not_tried_again(kind: type[Exception]) -> None:
    """Y15: by default TypeError and its like end it at the first attempt."""
    outcome, waits = again(RETRY, pytest.fail, error := kind(""))
    assert outcome == GaveUp(error, 1)
    assert not waits


@pytest.mark.parametrize("kind", [Broken, OSError, RuntimeError, SerializationError, TimeoutError, SSLCertVerificationError])
def test_other_errors_are_tried_five_times_within_three_seconds(kind: type[Exception]) -> None:
    """The default: bounded attempts, growing waits. A SerializationError is a mistake; one of the network may pass."""
    assert issubclass(SSLCertVerificationError, ValueError)  # which is a mistake by itself
    error = kind("")
    outcome, waits = again(RETRY, raising(error), error)
    assert outcome == GaveUp(error, 1 if kind is SerializationError else 5)
    assert len(waits) == outcome.attempts - 1
    assert sum(waits) <= 3


def test_no_retrying_is_one_attempt() -> None:
    """retry=None: the handler is not called again."""
    error = Broken("first")
    assert again(None, pytest.fail, error) == (GaveUp(error, 1), [])


def test_the_last_error_is_the_one_that_counts() -> None:
    """Each attempt may fail in another way; what is told is the last, and how many there were."""
    errors = [Broken(str(n)) for n in range(2, 9)]
    left = iter(errors)

    def call() -> None:
        raise next(left)

    outcome, _ = again(QUICK, call)
    assert outcome == GaveUp(errors[1], 3)


def test_attempts_are_counted_for_the_handler() -> None:
    """The first attempt is 1, also in the next message."""
    seen: list[int] = []

    def call() -> str:
        seen.append(attempt.get())
        if len(seen) < 2:
            raise Broken
        return "done"

    assert again(QUICK, call)[0] == "done"
    assert seen == [2, 3]
    assert attempt.get() == 1


def test_the_callbacks_of_the_user_are_told_of_the_message() -> None:
    """Each callback sees the message as args[0], and the attempts; what retry_error_callback returns decides nothing."""
    told: list[tuple[str, Any, int]] = []

    def note(name: str) -> Callable[[RetryCallState], None]:
        return lambda state: told.append((name, state.args[0], state.attempt_number))

    error = Broken("always")
    retry = Retrying(
        stop=stop_after_attempt(2),
        retry=retry_if_exception_type(Broken),
        before=note("before"),
        after=note("after"),
        before_sleep=note("before_sleep"),
        retry_error_callback=note("retry_error_callback"),
    )
    outcome, waits = again(retry, raising(error), error)
    assert outcome == GaveUp(error, 2)
    assert waits == [0]
    names = ["before", "after", "before_sleep", "before", "after", "retry_error_callback"]
    assert told == [(name, MESSAGE, 1 if n < 3 else 2) for n, name in enumerate(names)]


@pytest.mark.parametrize("name", ["before", "after", "before_sleep", "retry_error_callback", "stop", "wait", "retry"])
def test_a_callback_that_raises_is_raised(name: str) -> None:
    """Its error is not taken for one of the handler: the message has not failed for good."""
    callbacks = {"stop": stop_after_attempt(2), name: raising(ZeroDivisionError())}
    with pytest.raises(ZeroDivisionError):
        again(Retrying(**callbacks), raising(Broken("always")))


def test_only_exceptions_are_looked_at() -> None:
    """A handler that returned is not called again, whatever a predicate about results says."""
    calls: list[int] = []
    retry = Retrying(retry=retry_if_exception_type() | retry_if_not_result(bool), stop=stop_after_attempt(5))
    assert again(retry, lambda: calls.append(1))[0] is None
    assert len(calls) == 1


def test_an_exception_that_is_not_true_is_one() -> None:
    """One with a length of 0, for example: futures look at its truth, and tenacity would raise nothing at all."""

    class Empty(Exception):
        def __bool__(self) -> bool:
            return False

    outcome, waits = again(QUICK, raising(error := Empty()), Empty())
    assert outcome == GaveUp(error, 3)
    assert len(waits) == 2


def test_what_keeps_from_reading_may_pass() -> None:
    """A rule of a schema that failed, as for want of a KMS, comes as a SerializationError, which is of the bytes elsewhere."""
    answers: list[Any] = [ConnectionError(), None]

    def read(data: bytes, _context: object) -> bytes:
        if (answer := answers.pop(0)) is not None:
            raise SerializationError("a rule failed") from answer
        return data

    reading = Reading(None, read)
    reading.open([MESSAGE])
    error = reading.unreadable[id(MESSAGE)]
    outcome, waits = again(QUICK, partial(reading.check, MESSAGE), error)
    assert (outcome, len(waits), reading.unreadable) == (None, 1, {})
    assert again(RETRY, raising(error), error)[0] == GaveUp(error, 5)


class RuleError(Exception):
    """As that of confluent-kafka's schema registry, which is not installed here."""


class RuleConditionError(RuleError):
    """Likewise: the message breaks the contract of its topic."""


@pytest.mark.parametrize(
    ("causes", "passes"),
    [
        ([], False),
        ([ValueError("no JSON")], False),
        ([EOFError()], False),
        ([RuleConditionError()], False),
        ([RuleError()], True),
        ([SerializationError(), ConnectionError()], True),
        ([RuntimeError("no answer"), TimeoutError()], True),
    ],
)
def test_a_serialization_error_is_of_the_bytes_unless_its_causes_say_more(causes: list[Exception], passes: bool) -> None:  # noqa: FBT001
    """Each attempt at poison takes time, and with some rules of a schema registry sends another copy of it somewhere."""
    error: BaseException = SerializationError("not read")
    link = error
    for cause in causes:
        link.__cause__ = cause
        link = cause
    assert may_pass(error) == passes
    link.__cause__ = error  # in a circle, from then on
    assert may_pass(error) == passes


def test_a_handler_that_asks_for_another_attempt_gets_one() -> None:
    """tenacity.TryAgain works as elsewhere, until stop says no."""
    error = TryAgain()
    assert again(Retrying(stop=stop_after_attempt(3), retry=lambda _state: False), raising(error), error)[0] == GaveUp(error, 3)


def test_an_exception_out_of_a_signal_handler_is_not_tried_again() -> None:
    """KeyboardInterrupt and its like end the run, also where the user's Retrying takes every exception."""
    retry, interrupt, calls = Retrying(retry=lambda _state: True), Interrupt(), []

    def call() -> None:
        calls.append(1)
        raise interrupt

    with pytest.raises(Interrupt) as caught:
        again(retry, call)
    assert caught.value is interrupt
    assert len(calls) == 1
    with pytest.raises(Interrupt):
        failures(Retrying(retry=lambda _state: True)).again(pytest.fail, MESSAGE, Broken("first"), raising(Interrupt()))


def test_an_object_that_may_be_shared_is_not_changed() -> None:
    """One Retrying may serve several clients: its own sleep and statistics stay."""
    sleep: Callable[[float], None] = raising(AssertionError())
    retry = Retrying(stop=stop_after_attempt(2), sleep=sleep)
    again(retry, raising(Broken("always")))
    assert retry.sleep is sleep
    assert not retry.statistics


@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("nonsense", [AsyncRetrying(), Retrying, 3, "retry", True, lambda: None])
def test_what_is_no_retrying_is_refused(kind: str, nonsense: Any) -> None:
    """Nothing is connected."""
    with pytest.raises(TypeError, match=r"tenacity\.Retrying"):
        made(kind, retry=nonsense)


@pytest.mark.parametrize("kind", [*TWO, "at-most-once"])
@pytest.mark.parametrize("topics", [["dead"], ["offers", "dead"], ["^de.*"], ["^[invalid", "^.*ad$"]])
def test_a_run_that_would_consume_its_own_dead_letters_is_refused(kind: str, topics: list[str]) -> None:
    """L05: a message that cannot be handled would be set aside for ever, and fill the topic."""
    with made(kind, dead_letter="dead") as client, pytest.raises(UnsafeConfigError, match="would come again, for ever"):
        client.run(topics, lambda _message: None)


@pytest.mark.parametrize("kind", [*TWO, "at-most-once"])
@pytest.mark.parametrize("nonsense", ["", 3, b"dead", ["dead"], "^dead", "a b", "dead\n", ".", "..", "d" * 250, "größe"])
def test_what_is_no_topic_is_refused(kind: str, nonsense: Any) -> None:
    """Nothing is connected."""
    with pytest.raises(ValueError, match="dead_letter is the name of a topic"):
        made(kind, dead_letter=nonsense)


def test_at_most_once_does_not_try_again() -> None:
    """M04: refused with the reason, before anything is connected."""
    with pytest.raises(UnsafeConfigError, match="second attempt would have it twice"):
        made("at-most-once", retry=QUICK)


def made(kind: str, **options: Any) -> Any:
    config = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "transactional.id": "t"}
    kinds: dict[str, Any] = {"at-least-once": AtLeastOnce, "exactly-once": ExactlyOnce, "at-most-once": AtMostOnce}
    return kinds[kind](
        config if kind == "exactly-once" else {k: config[k] for k in ("bootstrap.servers", "group.id")}, **options
    )


# -- tried again ---------------------------------------------------------------------------------------------------------------


@side_by_side(KINDS, HOW)
def test_a_message_that_fails_twice_is_handled_at_the_third_attempt(world: World, kind: str, how: str) -> None:
    """In its place, told which attempt it is; every other message once, and what they produce once."""
    topic, target = world.given(partitions=2), world.topic()
    calls = Calls(lambda number, time: number == 7 and time < 3, target)
    calls.run(world.client(kind, retry=QUICK), topic, how)
    assert calls.attempts(7) == [1, 2, 3]
    assert calls.in_order()
    assert set(calls.handled) == set(range(20))
    if how == "run" and kind != "sqlite inbox":  # which rolls back what came before in its transaction, and handles it again
        assert calls.times == Counter({number: 3 if number == 7 else 1 for number in range(20)})
    assert world.produced(target, kind) == list(range(20))
    assert world.offsets(topic, 2) == [10, 10]


@side_by_side(KINDS, HOW)
def test_a_message_that_cannot_be_handled_is_set_aside(world: World, kind: str, how: str) -> None:
    """L05, X21: exactly one copy, as it was, with its story; the others once and in order; the group at the end."""
    topic, target, dead = world.given(), world.topic(), world.topic()
    calls = Calls(seven, target)
    calls.run(world.client(kind, retry=QUICK, dead_letter=dead), topic, how)
    assert calls.in_order()
    assert world.produced(target, kind) == [number for number in range(20) if number != 7]
    assert world.offsets(topic) == [20]
    (letter,) = world.read(dead)
    check_letter(letter, topic, world.group, 7, attempts=3)
    assert calls.attempts(7) == [1, 2, 3] * (1 if how == "run" else 2)  # of the batch, and of the message alone


@side_by_side(KINDS, HOW)
def test_one_that_would_pass_is_not_set_aside_with_one_that_cannot(world: World, kind: str, how: str) -> None:
    """An outage that begins while a batch is handled one by one costs nothing: each has the attempts that it may have."""
    topic, target, dead = world.given(), world.topic(), world.topic()
    nine = count()
    calls = Calls(lambda number, _: number == 7 or (number == 9 and next(nine) < 2), target)
    calls.run(world.client(kind, retry=QUICK, dead_letter=dead), topic, how)
    assert [number_of(letter) for letter in world.read(dead)] == [7]
    assert calls.in_order()
    assert world.produced(target, kind) == [number for number in range(20) if number != 7]
    assert world.offsets(topic) == [20]


@side_by_side(KINDS, HOW)
def test_a_handler_that_fails_too_late_ends_the_run_the_second_time(world: World, kind: str, how: str) -> None:
    """C10: what fails after the group gave it away is not set aside, since another member has it; nor does it come for ever."""
    topic, dead = world.given(3), world.topic()

    def handler(given: Any, *_connection: object) -> None:
        if any(number_of(message) == 1 for message in (given if how == "run_batches" else [given])):
            time.sleep(2.5)
            raise Broken("too late")

    settings = only(kind, {**SHORT, "session.timeout.ms": 1500, "max.poll.interval.ms": 2000})
    client = world.client(kind, retry=QUICK, dead_letter=dead, settings=settings)
    watch = threading.Timer(SOON, client.stop)
    watch.start()
    with pytest.raises(HandlerError, match="for the second time") as caught:
        getattr(client, how)([topic], handler)
    watch.cancel()
    assert kind == "sqlite inbox" or isinstance(caught.value.__cause__, Broken)
    assert not world.read(dead)
    assert world.offsets(topic)[0] <= 1


def check_letter(letter: Message, topic: str, group: str, number: int, **more: Any) -> None:
    """The copy of a message that was sent by ``send``."""
    origin = origin_of(letter)
    assert origin is not None
    assert (letter.key(), letter.value()) == (f"key-{number}".encode(), str(number).encode())
    assert letter.timestamp()[1] == origin.timestamp == BEGAN + number
    assert list(origin.headers) == [("message-id", f"id-{number}".encode()), ("trace", b"\0\xff"), ("none", None)]
    found = {"topic": origin.topic, "partition": origin.partition, "offset": origin.offset, "group": origin.group}
    expected = {"topic": topic, "partition": 0, "offset": number, "group": group}
    named = {name: getattr(origin, name) for name in more}
    assert (found, named) == ({**expected, **{n: more.get(n, expected[n]) for n in expected}}, more)
    assert abs(origin.time / 1000 - time.time()) < 120
    if "error_type" not in more:
        assert (origin.error_type, origin.error) == (f"{__name__}.Broken", f"number {number}")


@side_by_side(KINDS, HOW)
def test_without_a_dead_letter_topic_the_run_ends_before_the_message(world: World, kind: str, how: str) -> None:
    """L01: HandlerError with its cause and the number of attempts; the next run begins with it."""
    topic, calls = world.given(), Calls(seven)
    client = world.client(kind, retry=QUICK)
    with pytest.raises(HandlerError, match=r"in 3 attempts \(Broken: number 7\)") as caught:
        calls.run(client, topic, how)
    assert isinstance(caught.value.__cause__, Broken)
    assert ("failed at a batch of" in str(caught.value)) == (how == "run_batches")
    assert calls.attempts(7) == [1, 2, 3]
    (offset,) = world.offsets(topic)
    assert offset == 7 if how == "run" else offset <= 7
    after = Calls(never)
    after.run(client, topic)
    assert after.handled == list(range(max(offset, 0), 20))


@side_by_side(KINDS, HOW)
def test_a_failing_message_in_each_partition_under_load(world: World, kind: str, how: str) -> None:
    """Four partitions of 200: only the four are set aside, once each; all others are handled, in order, and produce once."""
    topic, target, dead = world.given(800, partitions=4), world.topic(), world.topic(partitions=2)
    poison = {401, 402, 703, 704}  # one in each
    calls = Calls(lambda number, _time: number in poison, target)
    calls.run(world.client(kind, retry=QUICK, dead_letter=dead), topic, how)
    assert calls.in_order()
    assert world.produced(target, kind) == sorted(set(range(800)) - poison)
    assert sorted(number_of(letter) for letter in world.read(dead)) == sorted(poison)
    assert world.offsets(topic, 4) == [200] * 4


@pytest.mark.broker
@pytest.mark.parametrize("kind", ["at-least-once", "sqlite store", "exactly-once"])
def test_one_that_fails_does_not_cost_a_commit_for_each_of_its_batch(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its batch is handled one by one, and committed together, as portions are."""
    topic, target, dead = world.given(600), world.topic(), world.topic()
    commits = list[object]()

    def counted(true: Callable[..., None]) -> Callable[..., None]:
        def commit(*given: Any) -> None:
            commits.append(true)
            true(*given)

        return commit

    monkeypatch.setattr(GroupConsumer, "commit", counted(GroupConsumer.commit))
    monkeypatch.setattr(TransactionalProducer, "commit", counted(TransactionalProducer.commit))
    bad = {207, 208, 580}
    calls = Calls(lambda number, _time: number in bad, target)
    calls.run(world.client(kind, retry=None, dead_letter=dead), topic, "run_batches", max_batch=200)
    assert world.produced(target, kind) == sorted(set(range(600)) - bad)
    assert sorted(number_of(letter) for letter in world.read(dead)) == sorted(bad)
    assert world.offsets(topic) == [600]
    assert len(commits) < 40


@side_by_side(KINDS)
def test_a_message_is_tried_as_often_as_it_says(world: World, kind: str) -> None:
    """retry=None calls the handler once for it, also where repeats of its neighbours stand behind it."""
    topic, dead = world.topic(), world.topic()
    world.send(topic, [*range(8), 3, 3, 5, 8, 9])
    calls = Calls(seven)
    calls.run(world.client(kind, retry=None, dead_letter=dead), topic)
    assert calls.attempts(7) == [1]
    assert len(world.read(dead)) == 1
    assert world.offsets(topic) == [13]


# -- while it waits ------------------------------------------------------------------------------------------------------------


@side_by_side(KINDS)
def test_a_wait_may_be_longer_than_the_group_would_wait(world: World, kind: str) -> None:
    """C10, L08: the group is served meanwhile, so that the same member goes on with the second attempt."""
    topic, calls = world.given(), Calls(lambda number, time: number == 7 and time < 2)
    settings = {**SHORT, "session.timeout.ms": 3000, "max.poll.interval.ms": 3000}
    retry = Retrying(stop=stop_after_attempt(2), wait=wait_fixed(3.5))
    calls.run(world.client(kind, retry=retry, settings=only(kind, settings)), topic)
    assert calls.attempts(7) == [1, 2]
    assert sorted(set(calls.handled)) == list(range(20))
    assert world.offsets(topic) == [20]


@side_by_side(KINDS)
def test_attempts_without_a_pause_keep_the_member_in_its_group(world: World, kind: str) -> None:
    """C10: also a Retrying that never stops and never waits serves the group, and hears of stop()."""
    topic, calls = world.given(), Calls(seven)
    retry = Retrying(wait=wait_none())
    settings = {**SHORT, "session.timeout.ms": 2000, "max.poll.interval.ms": 2000}
    client = world.client(kind, retry=retry, settings=only(kind, settings))
    with running(calls.run, client, topic):
        until(lambda: 7 in calls.times)
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 3)
        asked = time.monotonic()
        client.stop()
    assert time.monotonic() - asked < 2
    assert calls.attempts(7).count(1) == 1  # it was never given away
    assert world.offsets(topic) == [7]


@side_by_side(KINDS, HOW)
def test_stop_ends_the_wait(world: World, kind: str, how: str) -> None:
    """L07: within two seconds; the message was neither handled nor set aside, and comes again."""
    topic, dead, calls, waits = world.given(), world.topic(), Calls(seven), threading.Event()
    retry = EVER.copy(before_sleep=lambda _state: waits.set())
    client = world.client(kind, retry=retry, dead_letter=dead)
    with running(calls.run, client, topic, how):
        assert waits.wait(SOON)
        asked = time.monotonic()
        client.stop()
    assert time.monotonic() - asked < 2
    (offset,) = world.offsets(topic)
    assert offset == 7 if how == "run" else offset <= 7
    after = Calls(never)
    after.run(client, topic, how)
    assert after.handled == list(range(max(offset, 0), 20))
    assert not world.read(dead)


SIGNALLED = """
import sys
from tenacity import Retrying, wait_fixed
from kafka_guarantees import AtLeastOnce, ExactlyOnce

bootstrap, group, kind, topic, dead = sys.argv[1:]
config = {"bootstrap.servers": bootstrap, "group.id": group}
retry = Retrying(wait=wait_fixed(60), before_sleep=lambda state: print("waits", flush=True))

def handler(message):
    if message.offset() == 7:
        raise OSError("down")

made = ExactlyOnce({**config, "transactional.id": group}, retry=retry, dead_letter=dead) if kind == "exactly-once" else \\
    AtLeastOnce(config, retry=retry, dead_letter=dead)
with made as kafka:
    kafka.run([topic], handler)
print("ended", flush=True)
"""


@side_by_side(TWO)
def test_a_signal_ends_the_wait(world: World, kind: str) -> None:
    """SIGTERM in a retry's sleep: the process ends by itself within two seconds, with the message uncommitted."""
    topic, dead = world.given(), world.topic()
    command = [sys.executable, "-W", "error", "-c", SIGNALLED, world.bootstrap, world.group, kind, topic, dead]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - asked < 2.5
        assert process.stdout.read() == "ended\n"
    assert world.offsets(topic) == [7]
    assert not world.read(dead)


@side_by_side(TWO, list(PROTOCOLS))
def test_a_member_that_joins_during_the_wait_gets_its_share(world: World, kind: str, protocol: str) -> None:
    """L08: the wait does not hold up the rebalance. Whoever has the message then handles it; nothing is lost."""
    topic, target = world.given(40, partitions=4), world.topic()
    joined, waits = threading.Event(), threading.Event()
    retry = Retrying(wait=wait_fixed(0.3), before_sleep=lambda _state: waits.set())
    settings = {**PROTOCOLS[protocol], "heartbeat.interval.ms": 500} if protocol != "consumer" else PROTOCOLS[protocol]
    first = Calls(lambda number, _time: number in (20, 21, 22, 23) and not joined.is_set(), target)
    second = Calls(never, target)

    def joining(message: Message) -> Any:
        joined.set()
        return second.one(message)

    one, two = (world.client(kind, instance=n, retry=retry, settings=settings) for n in (1, 2))
    with running(one.run, [topic], first.one), ExitStack() as stops:
        stops.callback(one.stop)
        assert waits.wait(SOON)
        with running(two.run, [topic], joining):
            stops.callback(two.stop)
            assert joined.wait(SOON)
            until(lambda: sum(world.offsets(topic, 4)) == 40)
            two.stop()
        one.stop()
    assert set(first.handled) | set(second.handled) == set(range(40))
    outputs = world.outputs(target)
    assert sorted(set(outputs)) == list(range(40))
    if kind == "exactly-once":
        assert len(outputs) == 40


class Outage:
    """One broker of our own, that goes away at the first wait of a client and comes back."""

    def __init__(self) -> None:
        self.waits = threading.Event()

    def note(self, _state: RetryCallState) -> None:
        self.waits.set()


@broker
def test_brokers_that_are_gone_during_the_wait_change_nothing(tmp_path: Path) -> None:
    """L01, X21: attempts go on, dead letters wait for the brokers; nothing is lost, and exactly once stays exact."""
    with LocalKafka() as kafka:

        def topic(partitions: int = 1, config: Any = None) -> str:
            name = f"topic-{next(names)}"
            kafka.create_topic(name, partitions, None, config)
            return name

        names = iter(range(1000))
        waiting = {kind: Outage() for kind in KINDS}
        open_before: list[Callable[[], object]] = []
        back = threading.Event()

        def run(kind: str) -> None:
            (tmp_path / kind).mkdir()
            world = World(kafka.bootstrap, f"group-{kind.replace(' ', '-')}", tmp_path / kind, topic)
            with world.stack:
                source, target, dead = world.given(40, partitions=2), world.topic(), world.topic()
                if kind == "exactly-once":
                    open_before.extend((partial(visible, kafka.bootstrap, target), partial(world.offsets, source, 2)))
                # 7 succeeds once the brokers are back, 8 never does
                calls = Calls(lambda number, _time: (number == 7 and not back.is_set()) or number == 8, target)
                retry = Retrying(stop=stop_after_delay(5), wait=wait_fixed(0.3), before_sleep=waiting[kind].note)
                calls.run(world.client(kind, retry=retry, dead_letter=dead), source, until_idle=1)
                letters = [number_of(letter) for letter in world.read(dead)]
                outputs = world.outputs(target)
                assert sum(world.offsets(source, 2)) == 40
            if kind == "exactly-once":
                assert (sorted([*outputs, *letters])) == list(range(40))
            assert set(outputs) | set(letters) == set(range(40))
            assert 8 in letters
            assert calls.in_order()

        with ThreadPoolExecutor(len(KINDS)) as pool:
            runs = [pool.submit(run, kind) for kind in KINDS]
            for outage in waiting.values():
                assert outage.waits.wait(30)
            # a broker alone that dies between a commit and its markers may forget these (KAFKA-20734): readers would wait for
            # ever. So the transaction before the message that waits is over, markers and all
            for until_ended in open_before:
                until_ended()
            kafka.kill(0)
            time.sleep(2)  # for so long it is gone
            kafka.restart(0)
            back.set()
            for done in runs:
                done.result(60)


# -- set aside -----------------------------------------------------------------------------------------------------------------


@side_by_side(KINDS, HOW)
def test_a_dead_letter_topic_that_refuses_ends_the_run(world: World, kind: str, how: str) -> None:
    """L05: the error names the topic; nothing is committed past the message, and the next run begins with it."""
    topic, dead = world.given(), world.topic(config={"max.message.bytes": 100})
    calls = Calls(seven)
    client = world.client(kind, retry=QUICK, dead_letter=dead)
    # P05: of a batch that the brokers refuse, an earlier try may have been written, but for one whose transaction is aborted
    error = DeliveryError if kind == "exactly-once" else DeliveryUnknown
    with pytest.raises(error, match=rf"{dead}.*MSG_SIZE_TOO_LARGE"):
        calls.run(client, topic, how)
    assert world.offsets(topic) == [7]
    assert not world.read(dead)
    after = Calls(never)
    after.run(client, topic, how)
    assert after.handled == list(range(7, 20))


@side_by_side(KINDS, HOW)
def test_a_message_that_leaves_no_room_for_its_story_does_not_stop_the_group(world: World, kind: str, how: str) -> None:
    """As large as a producer takes: its dead letter is without the value, says so, and where it was."""
    topic, dead = world.topic(), world.topic()
    producer, story = Producer({"bootstrap.servers": world.bootstrap}), [("message-id", b"large")]
    producer.produce(topic, b"7".rjust(999_900), b"key", headers=story)  # type: ignore[arg-type] # a list of pairs
    assert producer.flush(30) == 0
    world.send(topic, [8])
    calls = Calls(seven)
    calls.run(world.client(kind, retry=QUICK, dead_letter=dead), topic, how)
    assert world.offsets(topic) == [2]
    assert 8 in calls.handled
    (letter,) = world.read(dead)
    origin = origin_of(letter)
    assert origin is not None
    assert (letter.key(), letter.value(), list(origin.headers)) == (b"key", b"", story)
    assert (origin.topic, origin.partition, origin.offset, origin.lost) == (topic, 0, 0, ("value",))


@side_by_side(KINDS)
def test_a_dead_letter_topic_that_does_not_exist_is_refused(world: World, kind: str) -> None:
    """C19: before anything is handled."""
    topic, calls = world.given(), Calls(seven)
    with pytest.raises(BrokerError, match=r"'missing'.* does not exist"):
        calls.run(world.client(kind, retry=QUICK, dead_letter="missing"), topic)
    assert not calls.calls


@side_by_side(TWO, HOW)
def test_an_output_topic_that_is_missing_sets_nothing_aside(world: World, kind: str, how: str) -> None:
    """L05: no message is to blame, and the next ones would go the same way: all of the topic would be set aside."""
    topic, dead = world.given(200), world.topic()
    client = world.client(kind, retry=QUICK, dead_letter=dead)
    for _ in range(3):  # librdkafka refuses it at once, once it knows that it is missing
        with pytest.raises((DeliveryError, DeliveryUnknown)):
            Calls(never, f"missing-{topic}").run(client, topic, how)
    assert not world.read(dead)
    assert world.offsets(topic) == [0]


@side_by_side(KINDS)
def test_a_dead_letter_topic_that_is_lost_ends_the_run(world: World, kind: str) -> None:
    """L05: also where it was there at the start, and was written to before. Whoever waited in vain does not know more."""
    topic, dead = world.given(), world.topic()
    deleted = threading.Event()

    def fails(number: int, _time: int) -> bool:
        if number == 7 and not deleted.is_set():
            admin = AdminClient({"bootstrap.servers": world.bootstrap})
            admin.delete_topics([dead])[dead].result(20)
            until(lambda: dead not in admin.list_topics(timeout=10).topics)
            deleted.set()
        return number in (3, 7)

    calls = Calls(fails)
    client = world.client(kind, retry=QUICK, dead_letter=dead, settings=LOSES[kind == "exactly-once"])
    with pytest.raises((DeliveryError, DeliveryUnknown), match=dead):
        calls.run(client, topic)
    assert world.offsets(topic) == [7]


# a topic that is gone fails a record after this time, which must be within the transaction: else it is begun again and again
GONE = {"topic.metadata.propagation.max.ms": 1000}
LOSES = {False: {**GONE, "delivery.timeout.ms": 3000}, True: {**GONE, "transaction.timeout.ms": 4000}}


@side_by_side(["at-least-once", *REMEMBER])
def test_a_dead_letter_is_there_before_its_offset(world: World, kind: str) -> None:
    """L05: the offset is never past a message whose copy is not in its topic."""
    topic, dead = world.given(), world.topic()
    seen: list[tuple[int, int]] = []

    def fails(number: int, _time: int) -> bool:
        if number > 7:
            seen.append((world.offsets(topic)[0], len(world.read(dead))))
        return number == 7

    Calls(fails).run(world.client(kind, retry=None, dead_letter=dead), topic)
    assert seen
    assert all(letters == 1 for offset, letters in seen if offset > 7)


@broker
def test_a_dead_letter_is_visible_with_its_offset_or_not_at_all(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """X21: where its transaction is aborted, the copy in it is, too; the message comes again, and one copy is visible."""
    topic, target, dead = world.given(), world.topic(), world.topic()
    commit, aborts = TransactionalProducer.commit, iter([True])
    seen: list[int] = []

    def committing(producer: TransactionalProducer, claim: Callable[[], None]) -> None:
        if len(calls.attempts(7)) == 3 and next(aborts, False):
            until(lambda: len(world.read(dead, "read_uncommitted")) == 1)
            seen.append(len(world.read(dead)))
            raise AbortNeeded("says the test")
        commit(producer, claim)

    monkeypatch.setattr(TransactionalProducer, "commit", committing)
    calls = Calls(seven, target)
    client = world.client("exactly-once", retry=QUICK, dead_letter=dead, commit_interval=0.01)
    calls.run(client, topic)
    assert seen == [0]
    assert world.outputs(target) == [number for number in range(20) if number != 7]
    assert len(world.read(dead)) == 1
    assert len(world.read(dead, "read_uncommitted")) == 2
    assert world.offsets(topic) == [20]


@side_by_side(REMEMBER, HOW)
def test_the_id_of_a_message_that_was_set_aside_is_new_again(world: World, kind: str, how: str) -> None:
    """Its replay is handled; one that was handled after retries is a repeat when it comes again."""
    topic, dead = world.given(), world.topic()
    calls = Calls(lambda number, time: number == 7 or (number == 5 and time < 2))
    client = world.client(kind, retry=QUICK, dead_letter=dead)
    calls.run(client, topic, how)
    assert len(world.read(dead)) == 1
    world.send(topic, range(20))
    replayed = Calls(never)
    replayed.run(client, topic, how)
    assert replayed.handled == [7]
    assert world.offsets(topic) == [40]


@side_by_side(REMEMBER, HOW)
def test_a_repeat_of_a_message_that_was_set_aside_is_handled(world: World, kind: str, how: str) -> None:
    """D09: also in the same batch, where it was left out for the first, next to it or further on, and between others."""
    topic, dead = world.topic(), world.topic()
    world.send(topic, [0, 7, 7, 1, 9, 2, 9, 1, 3])
    handled: set[int | None] = set()

    def handle(messages: Sequence[Message], *_connection: object) -> None:
        offsets = {message.offset() for message in messages}
        if offsets & {1, 4}:  # the first 7, and the first 9
            raise Broken
        handled.update(offsets)

    handler = handle if how == "run_batches" else lambda message, *connection: handle([message], *connection)
    getattr(world.client(kind, retry=QUICK, dead_letter=dead), how)([topic], handler, **OPTIONS)
    assert len(world.read(dead)) == 2
    assert handled == {0, 2, 3, 5, 6, 8}
    assert world.offsets(topic) == [9]


@side_by_side(HOW)
def test_the_writes_of_a_failed_attempt_are_rolled_back(world: World, how: str) -> None:
    """With an inbox only the attempt that succeeded has written, and of what was set aside nothing is left."""
    topic, dead = world.given(), world.topic()
    calls = Calls(lambda number, time: number == 7 or (number in (3, 11) and time < 3))
    client = world.client("sqlite inbox", retry=QUICK, dead_letter=dead)
    with closing(sqlite3.connect(world.directory / "sqlite inbox.db")) as connection:
        connection.execute("CREATE TABLE effects (number INTEGER)")
        connection.commit()

    def write(messages: Sequence[Message], connection: Any) -> None:
        connection.executemany("INSERT INTO effects VALUES (?)", [(number_of(message),) for message in messages])
        calls.all(messages)

    handler = write if how == "run_batches" else lambda message, connection: write([message], connection)
    getattr(client, how)([topic], handler, **OPTIONS)
    with closing(sqlite3.connect(world.directory / "sqlite inbox.db")) as connection:
        rows = [number for (number,) in connection.execute("SELECT number FROM effects ORDER BY number")]
    assert rows == [number for number in range(20) if number != 7]
    assert len(world.read(dead)) == 1


@pytest.mark.broker
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dead_letters", [True, False])
def test_a_message_that_fails_at_the_commit_of_an_inbox_is_set_aside(
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    postgres_server: LocalPostgres,
    tmp_path: Path,
    how: str,
    *,
    dead_letters: bool,
) -> None:
    """By a constraint that is deferred: it alone goes to the dead letter topic; or it ends the run, with nothing written."""
    table = f"effects_{uuid.uuid4().hex[:12]}"
    world = World(kafka.bootstrap, table, tmp_path, kafka_topic)
    topic, dead = world.given(), world.topic()
    with (
        psycopg.connect(postgres_server.dsn, autocommit=True) as admin,
        PostgresInbox(postgres_server.dsn, prefix=table) as inbox,
    ):
        admin.execute(f"CREATE TABLE {table} (number int UNIQUE DEFERRABLE INITIALLY DEFERRED)".encode())
        admin.execute(f"INSERT INTO {table} VALUES (7)".encode())

        def write(messages: Sequence[Message], connection: Any) -> None:
            for message in messages:
                connection.execute(f"INSERT INTO {table} VALUES (%s)".encode(), [number_of(message)])

        handler = write if how == "run_batches" else lambda message, connection: write([message], connection)
        config = {"bootstrap.servers": world.bootstrap, "group.id": table}
        with AtLeastOnce(
            config, inbox=inbox, message_id=None, retry=QUICK, dead_letter=dead if dead_letters else None
        ) as client:
            if dead_letters:
                getattr(client, how)([topic], handler, **OPTIONS)
            else:
                with pytest.raises(HandlerError) as caught:
                    getattr(client, how)([topic], handler, **OPTIONS)
                assert isinstance(caught.value.__cause__, psycopg.errors.UniqueViolation)
        rows = [number for (number,) in admin.execute(f"SELECT number FROM {table} ORDER BY number".encode()).fetchall()]
    if dead_letters:
        assert rows == list(range(20))
        assert [number_of(letter) for letter in world.read(dead)] == [7]
    else:
        assert rows == [7]


@side_by_side(REMEMBER, [True, False])
def test_a_message_without_an_id_is_set_aside_or_ends_the_run(world: World, kind: str, dead_letters: bool) -> None:  # noqa: FBT001
    """It alone goes to the dead letter topic, and the rest of its batch is handled; without that topic it is an error."""
    topic, dead, calls = world.given(8), world.topic(), Calls(never)
    world.send(topic, [8], ids=False)
    world.send(topic, range(9, 20))
    client = world.client(kind, retry=QUICK, dead_letter=dead if dead_letters else None)
    if dead_letters:
        calls.run(client, topic)
        assert set(calls.handled) == set(range(20)) - {8}
        assert [number_of(letter) for letter in world.read(dead)] == [8]
        assert world.offsets(topic) == [20]
    else:
        with pytest.raises(MessageIdMissing):
            calls.run(client, topic)
        assert calls.handled == list(range(8))
        assert world.offsets(topic) == [8]


@side_by_side(REMEMBER, [True, False])
def test_a_message_with_the_id_of_another_is_set_aside_or_ends_the_run(
    world: World,
    kind: str,
    dead_letters: bool,  # noqa: FBT001
) -> None:
    """D08: likewise."""
    topic, dead, calls = world.given(8), world.topic(), Calls(never)
    producer = Producer({"bootstrap.servers": world.bootstrap})
    producer.produce(topic, b"8", headers=[("message-id", b"id-3")])
    assert producer.flush(30) == 0
    world.send(topic, range(9, 20))
    client = world.client(kind, retry=QUICK, dead_letter=dead if dead_letters else None)
    if dead_letters:
        calls.run(client, topic)
        assert calls.handled == [number for number in range(20) if number != 8]
        (letter,) = world.read(dead)
        origin = origin_of(letter)
        assert origin is not None
        assert (origin.offset, origin.error_type) == (8, "kafka_guarantees.errors.MessageIdReused")
        assert world.offsets(topic) == [20]
    else:
        with pytest.raises(MessageIdReused):
            calls.run(client, topic)
        assert calls.handled == list(range(8))
        assert world.offsets(topic) == [8]


@side_by_side(["memory store", "sqlite store"])
def test_a_message_without_an_id_waits_for_those_before_it(world: World, kind: str) -> None:
    """D09, L01: while another worker is at a message of its partition, setting it aside would commit past that one."""
    topic, dead, calls = world.given(20, partitions=2), world.topic(), Calls(never)
    world.send(topic, [20, 21], partitions=2, ids=False)
    world.send(topic, range(22, 30), partitions=2)
    store, busy = world.remembered(kind), Item(key_of("id-6"), b"elsewhere at all")
    foreign = b"f" * 16
    assert store.claim(world.group, [busy], token=foreign, lease=60) == [Outcome.NEW]
    client = world.client(kind, retry=QUICK, dead_letter=dead)
    with running(calls.run, client, topic, until_idle=1):
        until(lambda: 5 in calls.times)
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 1)
        offset = world.offsets(topic, 2)[0]
        store.release(world.group, [busy], token=foreign)
    assert offset <= 3
    assert set(calls.handled) == set(range(30)) - {20, 21}
    assert sorted(number_of(letter) for letter in world.read(dead)) == [20, 21]
    assert world.offsets(topic, 2) == [15, 15]


REFUSED: dict[str, tuple[Callable[[str], Any], str]] = {
    "too large": (lambda target: [Record(target, b"x" * 2_000_000)], "MSG_SIZE_TOO_LARGE"),
    "no bytes": (lambda target: [Record(target, 42)], "TypeError"),
    "no partition": (lambda target: [Record(target, b"x", partition=99)], "UNKNOWN_PARTITION"),
    "no time": (lambda target: [Record(target, b"x", timestamp=-1)], "ValueError"),
    "no number": (lambda target: [Record(target, b"x", timestamp=2**63)], "ValueError"),
}


NO_RECORDS: dict[str, Callable[[Record], Any]] = {
    "a number": lambda _record: 1,
    "text": lambda record: [record, "x"],
    "pairs": lambda record: ((n, record) for n in range(2)),
}


@side_by_side(TWO, list(NO_RECORDS), HOW)
def test_a_handler_that_returns_no_records_ends_the_run(world: World, kind: str, returned: str, how: str) -> None:
    """It would do so for every message: all would be set aside, each after its effect. Nothing is committed past the first."""
    topic, target, dead = world.given(), world.topic(), world.topic()
    client = world.client(kind, retry=QUICK, dead_letter=dead)

    def handler(messages: Any) -> Any:
        first = number_of(messages if how == "run" else messages[0])
        return [] if first < 3 else NO_RECORDS[returned](Record(target, b"x"))

    with pytest.raises(HandlerError, match=r"the handler (returned|produced) .*Correct the handler\. What it does besides"):
        getattr(client, how)([topic], handler, **OPTIONS, max_batch=3)
    assert world.offsets(topic)[0] <= 3
    assert not world.read(dead)


def test_at_most_once_a_handler_that_returns_no_records_costs_its_messages(world: World) -> None:
    """They are dropped, with a copy, like those whose handler raises: to end the run would cost what is in hand besides."""
    topic, dead, errors = world.given(), world.topic(), list[Exception]()
    client = world.client("at-most-once", dead_letter=dead, on_error=lambda _message, error: errors.append(error))
    client.run([topic], lambda message: True if number_of(message) in (3, 7) else [], **OPTIONS)
    assert sorted(number_of(letter) for letter in world.read(dead)) == [3, 7]
    assert [type(error).__name__ for error in errors] == ["NotRecords"] * 2
    assert world.offsets(topic) == [20]


def test_no_records_are_not_tried_again() -> None:
    """Whatever ``retry`` says: each attempt would have the effects of the handler."""
    error = NotRecords("the handler returned bool")
    outcome, waits = again(Retrying(), pytest.fail, error)
    assert (outcome, waits) == (GaveUp(error, 1), [])
    assert not failures(dead_letter="dlq").narrows(GaveUp(error, 1))
    assert failures(dead_letter="dlq").narrows(GaveUp(Broken(), 1))
    assert not failures().narrows(GaveUp(Broken(), 1))


@side_by_side(TWO, list(REFUSED), [True, False])
def test_a_record_that_no_topic_takes_is_the_fault_of_its_message(
    world: World,
    kind: str,
    refused: str,
    dead_letters: bool,  # noqa: FBT001
) -> None:
    """X21: its message is set aside with what was wrong; without a dead letter topic it ends the run, not committed."""
    topic, target, dead = world.given(), world.topic(), world.topic()
    bad, wrong = REFUSED[refused]
    handled: list[int] = []

    def handler(message: Message) -> Any:
        handled.append(number_of(message))
        return bad(target) if number_of(message) == 7 else [Record(target, message.value())]

    client = world.client(kind, retry=QUICK, dead_letter=dead if dead_letters else None)
    if not dead_letters:
        with pytest.raises((DeliveryError, HandlerError), match=wrong.replace("ValueError", "timestamp")):
            client.run([topic], handler, **OPTIONS)
        assert world.offsets(topic)[0] <= 7
        return
    client.run([topic], handler, **OPTIONS)
    assert world.outputs(target) == [number for number in range(20) if number != 7]
    (letter,) = world.read(dead)
    origin = origin_of(letter)
    assert origin is not None
    assert (origin.offset, wrong in f"{origin.error_type} {origin.error}") == (7, True)
    assert world.offsets(topic) == [20]


BY_BROKERS: dict[str, tuple[dict[str, Any], Callable[[str, Message], Record], str]] = {
    "too large": ({"max.message.bytes": 1000}, lambda target, _message: Record(target, os.urandom(2000)), "MSG_SIZE_TOO_LARGE"),
    "no key": (
        {"cleanup.policy": "compact"},
        lambda target, message: Record(target, message.value()),
        "INVALID_RECORD",
    ),
}


def bad_ones(target: str, refused: str, bad: Iterable[int] = (7, 30)) -> Callable[[Any], Any]:
    """A handler of one message, or of several, some of whose records the brokers refuse."""
    made = BY_BROKERS[refused][1]

    def one(message: Message) -> Record:
        good = Record(target, message.value(), message.key())
        return made(target, message) if number_of(message) in bad else good

    return lambda given, *_connection: [one(message) for message in (given if isinstance(given, list) else [given])]


@side_by_side(KINDS, list(BY_BROKERS), HOW)
def test_a_record_that_only_brokers_refuse_is_the_fault_of_its_message(world: World, kind: str, refused: str, how: str) -> None:
    """X21: its message is found among those that were on their way, and set aside; whatever ``retry`` says."""
    config, _, code = BY_BROKERS[refused]
    topic, target, dead = world.given(40, 2), world.topic(config=config), world.topic()
    client = world.client(kind, retry=Retrying(stop=stop_after_attempt(2)), dead_letter=dead)
    getattr(client, how)([topic], bad_ones(target, refused), **OPTIONS)
    others = [number for number in range(40) if number not in (7, 30)]
    found = world.outputs(target)
    assert (found if kind == "exactly-once" else sorted(set(found))) == others
    origins = [origin for letter in world.read(dead) if (origin := origin_of(letter)) is not None]
    assert sorted((origin.partition, origin.offset) for origin in origins) == [(0, 15), (1, 3)]
    assert all(code in origin.error for origin in origins)
    assert world.offsets(topic, 2) == [20, 20]


@pytest.mark.broker
@pytest.mark.parametrize("kind", TWO)
def test_a_signal_before_such_a_message_is_looked_for_ends_the_run(
    world: World, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run begins anew then; what the process does with SIGTERM without one would not commit, nor leave the group."""
    topic, target = world.given(40), world.topic(config={"max.message.bytes": 1000})
    client = world.client(kind, dead_letter=world.topic())
    look = client._failures.look_closely

    def terminated(failure: KafkaGuaranteesError) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        look(failure)

    monkeypatch.setattr(client._failures, "look_closely", terminated)
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: caught.append(number))
    try:
        client.run([topic], bad_ones(target, "too large"), **OPTIONS)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not caught
    assert client._failures.closely
    assert world.offsets(topic)[0] <= 7  # it was to stop, before that message was found


@side_by_side(TWO, HOW)
def test_such_a_message_may_be_anywhere(world: World, kind: str, how: str) -> None:
    """In the first batch or a later one, next to another, or the last one."""
    topic, target, dead = world.given(300, 3), world.topic(config={"max.message.bytes": 1000}), world.topic()
    bad = [0, 1, 3, 100, 101, 297, 299]
    client = world.client(kind, dead_letter=dead)
    getattr(client, how)([topic], bad_ones(target, "too large", bad), **OPTIONS, max_batch=40)
    assert sorted(number_of(letter) for letter in world.read(dead)) == bad
    assert sorted(set(world.outputs(target))) == [number for number in range(300) if number not in bad]
    assert world.offsets(topic, 3) == [100] * 3


@side_by_side(KINDS, HOW)
def test_records_that_are_too_large_together_are_sent_one_by_one(world: World, kind: str, how: str) -> None:
    """A topic that takes less than a request of several: its messages are not to blame."""
    topic, target, dead = world.given(), world.topic(config={"max.message.bytes": 1000}), world.topic()

    def handler(given: Any, *_connection: object) -> list[Record]:
        many = (message for message in (given if how == "run_batches" else [given]) for _ in range(8))
        return [Record(target, os.urandom(200), message.value()) for message in many]

    getattr(world.client(kind, dead_letter=dead), how)([topic], handler, **OPTIONS)
    assert not world.read(dead)
    found = Counter(int(message.key() or b"-1") for message in world.read(target))
    assert set(found) == set(range(20))
    assert set(found.values()) == {8} if kind == "exactly-once" else min(found.values()) >= 8
    assert world.offsets(topic) == [20]


@pytest.mark.broker
@pytest.mark.parametrize("kind", TWO)
def test_it_takes_any_time_until_such_a_message_is_in_hand_again(
    world: World, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow handler, or a group that waits for others: it would be looked for without an end."""
    monkeypatch.setattr("kafka_guarantees._failures.CLOSELY", 0.1)
    topic, target, dead = world.given(), world.topic(config={"max.message.bytes": 1000}), world.topic()
    handled: list[int] = []

    def handler(messages: Sequence[Message]) -> Any:
        handled.extend(map(number_of, messages))
        time.sleep(0.3)
        return bad_ones(target, "too large", [7])(messages)

    with running(world.client(kind, dead_letter=dead).run_batches, [topic], handler, **OPTIONS):
        pass
    assert [number_of(letter) for letter in world.read(dead)] == [7]
    assert world.offsets(topic) == [20]


@contextmanager
def answered_meanwhile(monkeypatch: pytest.MonkeyPatch, client: Any) -> Iterator[None]:
    """Brokers have the first records of a transaction, and have answered, before its last ones are produced."""
    produce = TransactionalProducer.produce

    def slowly(producer: TransactionalProducer, given: Iterable[Record]) -> None:
        records = list(given)
        produce(producer, records[:10])
        if records[10:]:
            time.sleep(0.3)
            produce(producer, records[10:])

    monkeypatch.setattr(TransactionalProducer, "produce", slowly)
    timer = threading.Timer(SOON, client.stop)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.broker
@pytest.mark.parametrize("how", HOW)
def test_such_a_record_may_be_refused_while_others_are_produced(
    world: World, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X21: librdkafka takes no more then, and says nothing of why: it would be aborted and made again, for ever."""
    topic, target, dead = world.given(40), world.topic(config={"max.message.bytes": 1000}), world.topic()
    client = world.client("exactly-once", dead_letter=dead)
    with answered_meanwhile(monkeypatch, client):
        getattr(client, how)([topic], bad_ones(target, "too large", [5]), **OPTIONS)
    assert [number_of(letter) for letter in world.read(dead)] == [5]
    assert world.outputs(target) == [number for number in range(40) if number != 5]
    assert world.offsets(topic) == [40]


@pytest.mark.broker
@pytest.mark.parametrize("how", HOW)
def test_such_a_record_ends_a_run_that_has_no_dead_letter_topic(
    world: World, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likewise."""
    topic, target = world.given(40), world.topic(config={"max.message.bytes": 1000})
    client = world.client("exactly-once")
    with answered_meanwhile(monkeypatch, client), pytest.raises(DeliveryError, match="MSG_SIZE_TOO_LARGE"):
        getattr(client, how)([topic], bad_ones(target, "too large", [5]), **OPTIONS)
    assert world.offsets(topic)[0] <= 5


@pytest.mark.broker
def test_a_loop_with_transactions_hears_of_a_record_that_is_refused(world: World) -> None:
    """X21: also in the middle of a transaction. Its own work takes longer than an answer of the brokers."""
    topic, target, rounds = world.given(200), world.topic(config={"max.message.bytes": 1000}), count(1)
    client, made = world.client("exactly-once"), bad_ones(target, "too large", [5])

    def loop() -> None:
        for tx in client.transactions([topic], until_idle=IDLE):
            if next(rounds) > 20:
                return
            with tx:
                for message in tx.messages:
                    for record in made(message):
                        tx.produce(record.topic, record.value, record.key)
                    time.sleep(0.02)

    with pytest.raises(TransactionAborted, match="MSG_SIZE_TOO_LARGE"):
        loop()
    assert world.offsets(topic)[0] <= 5


@pytest.mark.broker
def test_a_transaction_says_which_record_was_refused(world: World) -> None:
    """X21: and not only that it is being aborted, as if it could be made again."""
    target = world.topic(config={"max.message.bytes": 1000})

    def produced() -> None:
        with world.client("exactly-once").transaction() as tx:
            tx.produce(target, os.urandom(2000))
            for _ in range(100):
                tx.produce(target, b"y")
                time.sleep(0.02)

    with pytest.raises(TransactionAborted, match="MSG_SIZE_TOO_LARGE"):
        produced()


@pytest.mark.broker
def test_a_large_batch_with_such_a_record_is_in_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """X07: its records are not sent one by one, for which a transaction is too short where brokers are far away."""
    topic, target, dead = world.given(3000), world.topic(config={"max.message.bytes": 1000}), world.topic()
    client = world.client("exactly-once", dead_letter=dead, settings=SHORT)
    flush = TransactionalProducer.flush

    def far_away(producer: TransactionalProducer) -> None:
        flush(producer)
        time.sleep(0.01)

    monkeypatch.setattr(TransactionalProducer, "flush", far_away)
    client.run_batches([topic], bad_ones(target, "too large", [2990]), max_batch=10_000, max_wait=1.0, **OPTIONS)
    assert [number_of(letter) for letter in world.read(dead)] == [2990]
    assert world.offsets(topic) == [3000]


@side_by_side(["memory store", "sqlite store"], HOW)
def test_what_is_beside_such_a_record_is_handled_twice(world: World, kind: str, how: str) -> None:
    """D13: with a store its portion is in hand when it is refused. The run does not begin anew for it: that would be thrice."""
    topic, target, dead = world.given(), world.topic(config={"max.message.bytes": 1000}), world.topic()
    calls, made = Counter[int](), bad_ones(target, "too large", [7])

    def handler(given: Any) -> Any:
        calls.update(map(number_of, given if isinstance(given, list) else [given]))
        return made(given)

    getattr(world.client(kind, dead_letter=dead), how)([topic], handler, **OPTIONS)
    assert [number_of(letter) for letter in world.read(dead)] == [7]
    assert set(calls) == set(range(20))
    assert max(calls.values()) == 2


@pytest.mark.broker
def test_whoever_flushes_hears_nothing_of_what_a_run_sets_aside(world: World) -> None:
    """P01: a run waits for what it sends by itself. What other threads have sent is theirs."""
    topic, target, dead = world.given(200), world.topic(config={"max.message.bytes": 1000}), world.topic()
    client, over, raised = world.client("at-least-once", dead_letter=dead), threading.Event(), list[Exception]()

    def flush() -> None:
        while not over.is_set():
            try:
                client.produce(dead, b"-1").result()
                client.flush()
            except Exception as error:  # noqa: BLE001 - it is what is looked at
                raised.append(error)

    with running(flush):
        try:
            client.run([topic], bad_ones(target, "too large", range(0, 200, 10)), **OPTIONS)
        finally:
            over.set()
    assert not raised
    assert sorted({number_of(letter) for letter in world.read(dead)}) == [-1, *range(0, 200, 10)]


@side_by_side(KINDS, ["run"])
def test_such_a_record_may_come_of_a_second_attempt(world: World, kind: str, how: str) -> None:
    """L05: of a handler whose first one always fails. Its message is set aside, and not tried again for ever."""
    topic, target, dead = world.given(3), world.topic(config={"max.message.bytes": 1000}), world.topic()
    calls, client = list[int](), world.client(kind, retry=QUICK, dead_letter=dead)

    def handler(message: Message, *_connection: object) -> Record:
        calls.append(number_of(message))
        if number_of(message) == 1 and attempt.get() == 1:
            raise Broken
        return Record(target, os.urandom(2000) if number_of(message) == 1 else b"1")

    getattr(client, how)([topic], handler, **OPTIONS)
    assert [number_of(letter) for letter in world.read(dead)] == [1]
    assert calls.count(1) < 10


@side_by_side(["exactly-once"], [0.0, 0.5])
def test_a_dead_letter_that_is_refused_ends_the_run_whatever_its_message_took(world: World, kind: str, wait: float) -> None:
    """Its refusal is met while other transactions are on their way; then it is looked for, and found."""
    topic, dead = world.given(), world.topic(config={"max.message.bytes": 100})
    retry = Retrying(stop=stop_after_attempt(2), wait=wait_fixed(wait))
    with pytest.raises(DeliveryError, match=rf"{dead}.*MSG_SIZE_TOO_LARGE"):
        Calls(seven).run(world.client(kind, retry=retry, dead_letter=dead), topic)
    assert world.offsets(topic) == [7]


@side_by_side(KINDS, HOW)
def test_a_message_may_fail_behind_such_a_record(world: World, kind: str, how: str) -> None:
    """It is set aside for what its handler raised, once; and the record is nobody else's fault."""
    topic, target, dead = world.given(), world.topic(config={"max.message.bytes": 1000}), world.topic()

    def handler(given: Any, *_connection: object) -> Iterator[Record]:
        for message in given if how == "run_batches" else [given]:
            if number_of(message) == 7:
                yield Record(target, os.urandom(2000))
                raise Broken("seven")
            yield Record(target, message.value())

    getattr(world.client(kind, retry=QUICK, dead_letter=dead), how)([topic], handler, **OPTIONS)
    (letter,) = world.read(dead)
    assert number_of(letter) == 7
    assert sorted(set(world.outputs(target))) == [number for number in range(20) if number != 7]
    assert world.offsets(topic) == [20]


@side_by_side(KINDS, HOW)
def test_without_a_dead_letter_topic_such_a_record_ends_the_run(world: World, kind: str, how: str) -> None:
    """Nothing is committed past its message."""
    topic, target = world.given(), world.topic(config={"max.message.bytes": 1000})
    with pytest.raises((DeliveryError, DeliveryUnknown), match="MSG_SIZE_TOO_LARGE"):
        getattr(world.client(kind), how)([topic], bad_ones(target, "too large", [7]), **OPTIONS)
    assert world.offsets(topic)[0] <= 7


@side_by_side(["at-least-once", *REMEMBER], [False, True])
def test_no_message_is_set_aside_for_what_another_thread_may_have_produced(world: World, kind: str, both: bool) -> None:  # noqa: FBT001
    """P01: of what ``produce`` sent and nobody looked at, nobody knows which message it is of, if of any."""
    topic, target, dead = world.given(), world.topic(config={"max.message.bytes": 1000}), world.topic()
    client = world.client(kind, dead_letter=dead)

    def handler(message: Message, *_connection: object) -> Record:
        if number_of(message) == 7:
            client.produce(target, os.urandom(2000))
            return Record(target, os.urandom(2000) if both else b"7")
        return Record(target, message.value())

    with pytest.raises(DeliveryUnknown, match="MSG_SIZE_TOO_LARGE"):
        client.run([topic], handler, **OPTIONS)
    assert world.offsets(topic)[0] <= 7
    assert not world.read(dead)


@side_by_side(TWO, list(REFUSED))
def test_such_a_record_may_be_the_first_of_a_process(world: World, kind: str, refused: str) -> None:
    """The producer does not know the topic yet then: the message is set aside all the same."""
    topic, target, dead = world.given(), world.topic(), world.topic()
    bad, _ = REFUSED[refused]

    def handler(message: Message) -> Any:
        return bad(target) if message.offset() == 0 else None

    world.client(kind, retry=QUICK, dead_letter=dead).run([topic], handler, **OPTIONS)
    assert [number_of(letter) for letter in world.read(dead)] == [0]
    assert world.offsets(topic) == [20]


@side_by_side(["at-least-once", *REMEMBER], [True, False])
def test_a_call_of_produce_that_raises_fails_its_message(world: World, kind: str, dead_letters: bool) -> None:  # noqa: FBT001
    """P01: a handler that lets the exception through is set aside, or ends the run; it is not stuck with a record to come."""
    topic, target, dead = world.given(), world.topic(), world.topic()

    def handler(message: Message, *_connection: object) -> None:
        value: Any = 42 if number_of(message) == 7 else message.value()
        client.produce(target, value)

    client = world.client(kind, retry=QUICK, dead_letter=dead if dead_letters else None)
    if dead_letters:
        client.run([topic], handler, **OPTIONS)
        assert [number_of(letter) for letter in world.read(dead)] == [7]
        assert world.offsets(topic) == [20]
        assert world.produced(target, kind) == [number for number in range(20) if number != 7]
    else:
        with pytest.raises(HandlerError, match="TypeError"):
            client.run([topic], handler, **OPTIONS)
        assert world.offsets(topic) == [7]
    client.produce(target, b"100").result(20)
    client.flush()


@side_by_side(["at-least-once", *REMEMBER])
def test_a_record_that_was_refused_to_another_message_is_not_forgiven(world: World, kind: str) -> None:
    """P01: one message swallows the error of its record; a later one that fails because of it does not make up for that."""
    topic, target, dead = world.given(), world.topic(), world.topic()
    kept: list[TypeError] = []

    def handler(message: Message, *_connection: object) -> None:
        if number_of(message) == 3:
            try:
                client.produce(target, 42)
            except TypeError as error:
                kept.append(error)
        if number_of(message) == 7:
            raise Broken from kept[0]

    client = world.client(kind, retry=None, dead_letter=dead)
    with pytest.raises(DeliveryError):
        client.run([topic], handler, **OPTIONS)
    assert world.offsets(topic)[0] <= 3


# -- interrupts ----------------------------------------------------------------------------------------------------------------


@side_by_side(KINDS, ["handler", "wait", "callback"])
def test_an_interrupt_ends_the_run_and_loses_nothing(world: World, kind: str, where: str) -> None:
    """Out of the handler, a wait or a callback: nothing is committed past the message, and the next run begins with it."""
    topic, target, dead = world.given(), world.topic(), world.topic()
    client = world.client(kind, retry=QUICK.copy(**INTERRUPTS.get(where, {})), dead_letter=dead)

    def fails(number: int, time: int) -> bool:
        if number == 7 and where == "handler" and time == 2:
            raise Interrupt
        return number == 7

    with pytest.raises(Interrupt):
        Calls(fails, target).run(client, topic)
    (offset,) = world.offsets(topic)
    assert offset == 7
    after = Calls(never, target)
    after.run(client, topic)
    assert after.handled == list(range(7, 20))
    assert world.produced(target, kind) == list(range(20))
    assert not world.read(dead)


INTERRUPTS: dict[str, dict[str, Any]] = {
    "wait": {"wait": raising(Interrupt())},
    "callback": {"before_sleep": raising(Interrupt())},
}


@broker
@pytest.mark.parametrize("kind", [*TWO, "sqlite inbox"])
def test_a_signal_handler_that_raises_in_the_wait(world: World, kind: str) -> None:
    """The same in the main thread, where the exception comes in the middle of a poll."""
    topic, target = world.given(), world.topic()
    calls = Calls(seven, target)

    def soon(_state: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.25)

    before = signal.signal(signal.SIGALRM, raising(Interrupt()))
    try:
        client = world.client(kind, retry=EVER.copy(before_sleep=soon))
        with pytest.raises(Interrupt):
            calls.run(client, topic)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert world.offsets(topic) == [7]
    after = Calls(never, target)
    after.run(client, topic)
    assert after.handled == list(range(7, 20))
    assert world.produced(target, kind) == list(range(20))


@broker
@pytest.mark.parametrize("kind", [*TWO, "sqlite inbox"])
def test_an_interrupt_while_a_dead_letter_is_flushed(world: World, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """L05: the offset does not move; the message comes again, and is set aside again."""
    topic, target, dead = world.given(), world.topic(), world.topic()
    calls, interrupts = Calls(seven, target), iter([True])
    owner = TransactionalProducer if kind == "exactly-once" else PlainProducer
    flush: Any = owner.flush

    def flushing(producer: Any, *given: Any) -> Any:
        if len(calls.attempts(7)) == 3 and next(interrupts, False):
            raise Interrupt
        return flush(producer, *given)

    monkeypatch.setattr(owner, "flush", flushing)
    client = world.client(kind, retry=QUICK, dead_letter=dead)
    with pytest.raises(Interrupt):
        calls.run(client, topic)
    assert world.offsets(topic) == [7]
    calls.run(client, topic)
    assert world.offsets(topic) == [20]
    letters = [number_of(letter) for letter in world.read(dead)]
    assert letters == [7] if kind == "exactly-once" else set(letters) == {7}
    assert world.produced(target, kind) == [number for number in range(20) if number != 7]


# -- at most once --------------------------------------------------------------------------------------------------------------


@side_by_side(HOW)
def test_at_most_once_reports_a_failure_and_goes_on(world: World, how: str) -> None:
    """M04: no second handling, on_error is told, one copy at the most; what fails in a batch drops that batch."""
    topic, dead, told = world.given(), world.topic(), []
    calls = Calls(seven)
    client = world.client("at-most-once", dead_letter=dead, on_error=lambda message, error: told.append(number_of(message)))
    calls.run(client, topic, how)
    assert set(calls.times.values()) == {1}
    assert set(calls.handled) == set(range(20)) - set(told)
    assert 7 in told
    assert how == "run_batches" or told == [7]
    assert client.flush() == 0
    until(lambda: sorted(number_of(letter) for letter in world.read(dead)) == told)
    if how == "run":
        check_letter(world.read(dead)[0], topic, world.group, 7, attempts=1)
    assert world.offsets(topic) == [20]


@side_by_side(["gone", "raises"])
def test_at_most_once_goes_on_without_its_dead_letter_topic(world: World, trouble: str) -> None:
    """A copy is best effort: neither a topic that takes nothing nor an on_error that raises keeps the others back."""
    topic, dead = world.given(), world.topic(config={"max.message.bytes": 100})
    calls = Calls(seven)
    on_error = raising(ValueError()) if trouble == "raises" else None
    calls.run(world.client("at-most-once", dead_letter=dead, on_error=on_error), topic)
    assert calls.handled == [number for number in range(20) if number != 7]
    assert calls.times[7] == 1
    assert world.offsets(topic) == [20]


@pytest.mark.broker
@pytest.mark.parametrize("kind", ["at-least-once", "at-most-once"])
def test_a_line_about_one_message_has_its_place_for_programs(world: World, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A log that is kept as JSON can be searched by topic, partition and offset."""
    topic, dead = world.given(), world.topic()
    options: dict[str, Any] = {"retry": QUICK, "dead_letter": dead} if kind == "at-least-once" else {}
    Calls(seven).run(world.client(kind, **options), topic)
    lines = [line.__dict__ for line in caplog.records if "offset 7" in line.getMessage()]
    assert len(lines) == (3 if kind == "at-least-once" else 1)
    for line in lines:
        assert (line["kafka_topic"], line["kafka_partition"], line["kafka_offset"]) == (topic, 0, 7)
    assert [line.get("kafka_dead_letter") for line in lines] == ([None, None, dead] if kind == "at-least-once" else [None])
