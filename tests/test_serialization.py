"""Serializers and deserializers, and messages that nobody can read: what handlers see, what is set aside, what ends a run."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import Mock

import confluent_kafka
import pytest
from confluent_kafka import Message, Producer
from confluent_kafka.serialization import (
    IntegerDeserializer,
    IntegerSerializer,
    MessageField,
    SerializationContext,
    SerializationError,
    StringDeserializer,
    StringSerializer,
)
from tenacity import Retrying, stop_after_attempt, wait_none

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, HandlerError, Record, StoreUnavailable, _serialization
from kafka_guarantees._dead_letters import origin_of
from kafka_guarantees._serialization import HeadersLost, Reading, Writing
from kafka_guarantees.dedup import MemoryDedupStore, SqliteInbox, json_field

from .conftest import committed, read_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kafka_guarantees.testing.local_kafka import RunningKafka

    Client = AtMostOnce | AtLeastOnce | ExactlyOnce

broker = pytest.mark.broker

IDLE = 0.2  # seconds: a run ends only at the end of every partition
AT_ONCE = Retrying(stop=stop_after_attempt(5), wait=wait_none())
WAYS = [  # that there are to consume
    ("AtLeastOnce", "run"),
    ("AtLeastOnce", "run_batches"),
    ("AtLeastOnce", "messages"),
    ("ExactlyOnce", "run"),
    ("ExactlyOnce", "run_batches"),
    ("ExactlyOnce", "transactions"),
    ("AtMostOnce", "run"),
    ("AtMostOnce", "run_batches"),
    ("AtMostOnce", "messages"),
]
EACH_LOOP = [
    ("AtLeastOnce", "run_batches"),
    ("AtLeastOnce", "messages"),
    ("ExactlyOnce", "run"),
    ("ExactlyOnce", "transactions"),
]
CLASSES = {kind.__name__: kind for kind in (AtLeastOnce, ExactlyOnce, AtMostOnce)}


def from_json(payload: bytes, _context: SerializationContext) -> Any:
    try:
        return json.loads(payload)
    except ValueError as error:
        raise SerializationError(str(error)) from error


def to_json(payload: Any, _context: SerializationContext) -> bytes:
    return json.dumps(payload).encode()


class Noting:
    """A deserializer that notes what it was asked, and fails as it is told."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.asked: list[bytes] = []
        self.contexts: list[tuple[str, str, Any]] = []

    def __call__(self, payload: bytes, context: SerializationContext) -> str:
        assert isinstance(payload, bytes), "never what it has returned before"
        self.asked.append(payload)
        self.contexts.append((context.topic, context.field, context.headers))
        if self.failures:
            raise self.failures.pop(0)
        return payload.decode()


# -- reading, without Kafka --------------------------------------------------------------------------------------------------


def message(value: bytes | None = b"value", key: bytes | None = b"key", headers: Any = None) -> Message:
    return Message(topic="orders", partition=0, offset=7, value=value, key=key, headers=headers)


class Asked(Message):
    """A message that says how its headers were asked for."""

    bad = False
    asked = 0

    def headers(self) -> Any:
        self.asked += 1
        if self.bad and self.asked == 1:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        return super().headers()


def opened(reading: Reading, *messages: Message) -> None:
    reading.begin(messages)
    reading.open(messages)


def test_a_deserializer_gets_what_confluent_kafkas_own_expect() -> None:
    """Bytes, and a context with topic, field and headers; handlers see what it returns, and dead letters the bytes."""
    key, value = Noting(), Noting()
    one = message(headers=[("a", b"1")])
    reading = Reading(key, value)
    opened(reading, one)
    assert both(one) == ("key", "value")
    assert key.contexts == [("orders", MessageField.KEY, [("a", b"1")])]
    assert value.contexts == [("orders", MessageField.VALUE, [("a", b"1")])]
    assert reading.raw(one) == (b"key", b"value")


def test_confluent_kafkas_own_deserializers() -> None:
    """They are taken as they are."""
    one = message(value=(258).to_bytes(4, "big"), key="ключ".encode())
    opened(Reading(StringDeserializer(), IntegerDeserializer()), one)
    assert both(one) == ("ключ", 258)


def test_none_is_left_alone() -> None:
    """A tombstone and a missing key are no data; an empty payload is."""
    key, value = Noting(), Noting()
    opened(Reading(key, value), message(None, None), message(b"", b""))
    assert (key.asked, value.asked) == ([b""], [b""])


def test_one_deserializer_leaves_the_other_side_as_it_is() -> None:
    """Each is optional."""
    one, two = message(), message()
    opened(Reading(None, Noting()), one)
    opened(Reading(Noting(), None), two)
    assert both(one) == (b"key", "value")
    assert both(two) == ("key", b"value")


def test_a_message_is_deserialized_once() -> None:
    """Whoever asks again, and as part of whatever."""
    value = Noting()
    reading, one = Reading(None, value), message()
    opened(reading, one)
    reading.open([one])
    reading.check(one)
    assert value.asked == [b"value"]
    assert both(one)[1] == "value"


def test_a_failing_value_leaves_the_key_as_it_came() -> None:
    """What is set aside is the bytes of both."""
    reading, one = Reading(Noting(), Noting(SerializationError("no"))), message()
    opened(reading, one)
    assert both(one) == (b"key", b"value")
    assert reading.raw(one) is None
    with pytest.raises(SerializationError):
        reading.check(one)


def test_bytes_that_mean_nothing_are_not_asked_about_twice() -> None:
    """A SerializationError is about the bytes; anything else may pass, and the deserializer is asked again."""
    for error, asked in ((SerializationError("no"), 1), (ConnectionError("away"), 2)):
        value = Noting(error)
        reading, one = Reading(None, value), message()
        opened(reading, one)
        if asked == 1:
            with pytest.raises(SerializationError):
                reading.check(one)
        else:
            reading.check(one)
            assert both(one)[1] == "value"
        assert len(value.asked) == asked


@pytest.mark.parametrize("bad", [{0}, {3}, {1, 2}, {0, 1, 2, 3}, set()])
def test_headers_are_looked_at_by_us_first(bad: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """S04: asked a second time for headers whose name is not UTF-8, confluent-kafka crashes the process: they are replaced."""
    monkeypatch.setattr(_serialization, "Message", Asked)
    messages = [Asked(topic="orders", partition=0, offset=n, value=b"x", headers=[("a", b"1")]) for n in range(4)]
    for place in bad:
        messages[place].bad = True
    reading, value = Reading(None, None), Noting()
    reading.begin(messages)
    assert [one.asked for one in messages] == [1] * 4
    assert {place for place, one in enumerate(messages) if reading.headers_lost(one)} == bad
    assert reading.readable(messages) == min(bad, default=4)
    assert [one.headers() for one in messages] == [[] if place in bad else [("a", b"1")] for place in range(4)]
    for place in bad:
        with pytest.raises(HeadersLost, match="UTF-8"):
            reading.check(messages[place])
    assert value.asked == []


def test_nothing_is_kept_of_the_batch_before() -> None:
    """A batch that is done with is not held in memory."""
    reading, one, bad = Reading(None, Noting(SerializationError("no"))), message(), message()
    opened(reading, bad, one)
    assert reading.readable([bad, one]) == 0
    reading.begin([])
    assert reading.raw(one) is None
    assert reading.readable([bad, one]) == 2


def test_what_cannot_be_called_is_refused() -> None:
    """When the client is made, not when a message comes; with the name of the option."""
    for kind in CLASSES.values():
        config: dict[str, object] = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"}
        if kind is ExactlyOnce:
            config["transactional.id"] = "x"
        for option in ("key_deserializer", "value_deserializer", "key_serializer", "value_serializer"):
            given: dict[str, Any] = {option: "json"}
            with pytest.raises(TypeError, match=option):
                kind(config, **given)


@pytest.mark.parametrize("option", ["key_deserializer", "value_deserializer", "key_serializer", "value_serializer"])
def test_a_function_that_can_read_no_message_is_refused_at_once(option: str) -> None:
    """json.loads takes one argument: each message would be set aside, until the topic is empty."""
    for kind in CLASSES.values():
        config: dict[str, object] = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"}
        if kind is ExactlyOnce:
            config["transactional.id"] = "x"
        for bad in (json.loads, lambda data: data):
            given: dict[str, Any] = {option: bad}
            with pytest.raises(TypeError, match=rf"{option} is called with .* a SerializationContext, and takes .*lambda data"):
                kind(config, **given)

        def adapted(data: Any, _context: object) -> Any:
            return json.loads(data)

        decorated = functools.wraps(json.loads)(adapted)
        for good in (
            decorated,
            lambda data, context: data,
            lambda data, context=None, *more: data,
            StringDeserializer(),
            str,
            Mock(),
        ):
            given = {option: good}
            kind(config, **given).close(0.1)


# -- writing, without Kafka --------------------------------------------------------------------------------------------------


def test_a_serializer_may_add_headers() -> None:
    """As those do that put the id of a schema there; the record of the caller stays as it is."""

    def adding(payload: str, context: SerializationContext) -> bytes:
        assert isinstance(context.headers, list)
        context.headers.append((context.field, b"schema"))
        return payload.encode()

    given = {"a": "1"}
    before = Record("orders", "value", "key", headers=given, partition=2, timestamp=5)
    after = Writing(adding, adding).serialize(before)
    assert after == Record(
        "orders",
        b"value",
        b"key",
        headers=[("a", "1"), ("key", b"schema"), ("value", b"schema")],
        partition=2,
        timestamp=5,
    )
    assert given == {"a": "1"}


def test_nothing_is_serialized_that_is_none_and_nothing_is_copied_without_a_serializer() -> None:
    """A tombstone stays one."""
    record = Record("orders", None, None)
    assert Writing(None, None).serialize(record) is record
    assert Writing(StringSerializer(), to_json).serialize(record) == Record("orders")


class Buffer(bytearray):
    """A kind of its own."""


def test_records_are_fixed_one_after_the_other() -> None:
    """What a generator, or a serializer, uses again keeps what it had; a StopIteration of one is not the end of the records."""
    buffer, headers, out = Buffer(b"?"), {"n": bytearray(b"?")}, bytearray(b"?")

    def handler(*letters: bytes) -> Iterator[Record]:
        for letter in letters:
            buffer[:], headers["n"][:] = letter, letter
            yield Record("t", buffer, memoryview(buffer), headers=headers)

    def reusing(value: Any, _context: object) -> Any:
        out[:] = bytes(value).upper()
        return out

    plain = Writing(None, None).made_by(handler)(b"a", b"b")
    assert [(r.value, r.key, r.headers) for r in plain] == [(x, x, [("n", x)]) for x in (b"a", b"b")]
    serialized = Writing(None, reusing).made_by(handler)(b"a", b"b")
    assert [(r.value, r.key) for r in serialized] == [(b"A", b"a"), (b"B", b"b")]
    assert all(type(part) is bytes for r in plain for part in (r.value, r.key))
    bytes_alone = Record("t", b"v", b"k")
    assert Writing(None, None).records([bytes_alone])[0] is bytes_alone
    assert Writing(None, None).records(None) == []
    with pytest.raises(StopIteration):
        Writing(None, lambda _value, _context: next(iter(()))).records([bytes_alone, bytes_alone])


# -- on a broker -------------------------------------------------------------------------------------------------------------


class Here(NamedTuple):
    """What a test on a broker needs.

    Attributes:
        bootstrap: address of the broker.
        group: a consumer group of its own.
        topic: creates a topic and returns its name.
    """

    bootstrap: str
    group: str
    topic: Callable[..., str]

    def make(self, kind: str, **more: Any) -> Client:
        config: dict[str, object] = {"bootstrap.servers": self.bootstrap, "group.id": self.group}
        if kind == "ExactlyOnce":
            config["transactional.id"] = self.group
        if kind == "AtMostOnce":
            more.setdefault("start", "earliest")
        client: Client = CLASSES[kind](config, preflight="off", **more)
        return client


@pytest.fixture
def here(kafka: RunningKafka, fresh: Callable[[str], str], kafka_topic: Callable[..., str]) -> Here:
    return Here(kafka.bootstrap, fresh("group"), kafka_topic)


def write(bootstrap: str, topic: str, *records: tuple[bytes | None, bytes | None, Any]) -> None:
    """Key, value and headers of each record, with plain confluent-kafka, in order."""
    producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "message.max.bytes": 2_000_000})
    for key, value, headers in records:
        producer.produce(topic, value, key, partition=0, headers=headers)
    assert producer.flush(30) == 0


def letters(bootstrap: str, topic: str) -> list[dict[str, Any]]:
    """What a dead letter topic has: key, value, and the headers as a dict."""
    return [
        {"key": letter.key(), "value": letter.value(), **dict(letter.headers() or [])} for letter in read_all(bootstrap, topic)
    ]


@broker
@pytest.mark.parametrize("kind", CLASSES)
def test_handlers_see_objects_and_produce_objects(kind: str, here: Here) -> None:
    """Through run: bytes in the topics, objects in the handler; tombstones on both sides stay None."""
    source, target = here.topic(), here.topic()
    write(here.bootstrap, source, (b"a", b'{"n": 1}', None), (b"b", None, None), (None, b"[]", None))
    seen: list[Any] = []

    def handler(message: Message) -> Iterator[Record]:
        seen.append((message.key(), message.value()))
        value: Any = message.value()
        yield Record(target, value, message.key())

    with here.make(
        kind,
        key_deserializer=StringDeserializer(),
        value_deserializer=from_json,
        key_serializer=StringSerializer(),
        value_serializer=to_json,
    ) as kafka:
        kafka.run([source], handler, until_idle=IDLE)
    assert seen == [("a", {"n": 1}), ("b", None), (None, [])]
    assert [(m.key(), m.value()) for m in read_all(here.bootstrap, target)] == [
        (b"a", b'{"n": 1}'),
        (b"b", None),
        (None, b"[]"),
    ]
    assert committed(here.bootstrap, here.group, source) == [3]


@broker
@pytest.mark.parametrize("kind", ["AtLeastOnce", "AtMostOnce"])
def test_produce_serializes(kind: str, here: Here) -> None:
    """Of one that fails nothing is sent, its own exception is raised, and the client goes on."""
    topic = here.topic()
    with here.make(kind, key_serializer=IntegerSerializer(), value_serializer=to_json) as kafka:
        assert not isinstance(kafka, ExactlyOnce)
        value: Any = {"n": 1}
        key: Any = 7
        kafka.produce(topic, value, key)
        bad: Any = object()
        with pytest.raises(TypeError, match="JSON"):
            kafka.produce(topic, bad, key)
        with pytest.raises(SerializationError):
            kafka.produce(topic, value, "no number")
        kafka.produce(topic, value, key)
        kafka.flush()
    assert [(m.key(), m.value()) for m in read_all(here.bootstrap, topic)] == [((7).to_bytes(4, "big"), b'{"n": 1}')] * 2


@broker
def test_a_transaction_serializes(here: Here) -> None:
    """A record that fails is raised in the block, which is aborted by it; another transaction goes on."""
    topic = here.topic()
    with here.make("ExactlyOnce", value_serializer=to_json) as kafka:
        assert isinstance(kafka, ExactlyOnce)
        one: Any = {"n": 1}
        bad: Any = object()
        with pytest.raises(TypeError, match="JSON"), kafka.transaction() as tx:  # noqa: PT012 - the block is the transaction
            tx.produce(topic, one)
            tx.produce(topic, bad)
        with kafka.transaction() as tx:
            tx.produce(topic, one)
    assert [m.value() for m in read_all(here.bootstrap, topic)] == [b'{"n": 1}']


@broker
@pytest.mark.parametrize(
    ("kind", "how", "outcome"),
    [
        ("AtLeastOnce", "run", "set aside"),
        ("AtLeastOnce", "run_batches", "ends the run"),
        ("ExactlyOnce", "run", "ends the run"),
        ("ExactlyOnce", "run_batches", "set aside"),
    ],
)
def test_a_record_that_cannot_be_serialized_is_its_messages_failure(kind: str, how: str, outcome: str, here: Here) -> None:
    """It is set aside, and the others are written; or the run ends, and nothing at or after the message is committed."""
    source, target, dead = here.topic(), here.topic(), here.topic()
    write(here.bootstrap, source, *((None, b"%d" % number, None) for number in range(5)))

    def record(message: Message) -> Record:
        value: Any = object() if message.offset() == 2 else message.offset()
        return Record(target, value)

    with here.make(kind, value_serializer=to_json, dead_letter=dead if outcome == "set aside" else None, retry=None) as kafka:

        def run() -> None:
            handler: Any = (lambda m: [record(m)]) if how == "run" else (lambda batch: [record(m) for m in batch])
            getattr(kafka, how)([source], handler, until_idle=IDLE)

        if outcome == "set aside":
            run()
        else:
            with pytest.raises(HandlerError, match="JSON"):
                run()
    if outcome == "set aside":
        assert [letter["value"] for letter in letters(here.bootstrap, dead)] == [b"2"]
        assert {m.value() for m in read_all(here.bootstrap, target)} == {b"0", b"1", b"3", b"4"}
        assert committed(here.bootstrap, here.group, source) == [5]
    else:
        assert not letters(here.bootstrap, dead)
        expected = 2 if how == "run" else 0
        assert max(committed(here.bootstrap, here.group, source)[0], 0) == expected
    if kind == "ExactlyOnce":
        assert len(read_all(here.bootstrap, target)) == (4 if outcome == "set aside" else 2 if how == "run" else 0)


@broker
@pytest.mark.parametrize("how", ["run", "run_batches"])
@pytest.mark.parametrize("kind", ["AtLeastOnce", "ExactlyOnce"])
@pytest.mark.parametrize("ending", ["well", "badly"])
def test_a_generator_that_is_left_half_way_gives_back_what_it_has_before_the_next_attempt(
    kind: str, how: str, ending: str, here: Here, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler yields with a lock held, and its record is not serialized, once: only the generator can give the lock back."""
    source, target = here.topic(), here.topic()
    write(here.bootstrap, source, (None, b"1", None))
    lock, got = threading.Lock(), list[bool]()
    broken = [ConnectionError("the schema registry is away")]

    def serializer(value: Any, _context: SerializationContext) -> bytes:
        if broken:
            raise broken.pop()
        return bytes(value)

    def handler(_messages: Any) -> Iterator[Record]:
        got.append(lock.acquire(timeout=5))
        try:
            yield Record(target, b"1")
        finally:
            lock.release()
            if ending == "badly" and len(got) == 1:
                raise OSError("the lock is of no use any more")

    with here.make(kind, value_serializer=serializer) as kafka:
        getattr(kafka, how)([source], handler, until_idle=IDLE)
    assert got == [True, True]
    assert [m.value() for m in read_all(here.bootstrap, target)] == [b"1"]
    assert ("of no use" in caplog.text) == (ending == "badly"), "the error that it was left for is not hidden"


@broker
@pytest.mark.parametrize(("kind", "how"), WAYS)
def test_what_cannot_be_deserialized_is_set_aside_as_it_came(kind: str, how: str, here: Here) -> None:
    """Key and value as bytes, after one attempt; what is around it is handled once, and its offset is passed."""
    source, dead = here.topic(), here.topic()
    write(
        here.bootstrap,
        source,
        *((b'"k"', b"%d" % n, None) for n in range(5)),
        (b'"key"', b"\xff", [("a", b"1")]),
        (b'"k"', b"6", None),
    )
    asked: list[bytes] = []

    def reading(payload: bytes, context: SerializationContext) -> Any:
        asked.append(payload)
        return from_json(payload, context)

    with here.make(kind, key_deserializer=from_json, value_deserializer=reading, dead_letter=dead) as kafka:
        seen = handled(kafka, how, source)
    assert seen == [("k", n) for n in (0, 1, 2, 3, 4, 6)]
    assert asked.count(b"\xff") == 1
    (letter,) = letters(here.bootstrap, dead)
    assert (letter["key"], letter["value"], letter["a"]) == (b'"key"', b"\xff", b"1")
    assert letter["dead-letter-attempts"] == b"1"
    assert letter["dead-letter-offset"] == b"5"
    assert b"SerializationError" in letter["dead-letter-error-type"]
    assert committed(here.bootstrap, here.group, source) == [7]


def both(message: Message) -> tuple[Any, Any]:
    return message.key(), message.value()


def handled(kafka: Any, how: str, topic: str, note: Callable[[Message], object] = both) -> list[Any]:
    """Run over a topic in one of the ways that there are. What ``note`` says of each message that was handled."""
    seen: list[Any] = []

    def handler(message: Message, *_connection: object) -> None:
        seen.append(note(message))

    def batch_handler(messages: Sequence[Message], *_connection: object) -> None:
        seen.extend(map(note, messages))

    if how == "run":
        kafka.run([topic], handler, until_idle=IDLE)
    elif how == "run_batches":
        kafka.run_batches([topic], batch_handler, until_idle=IDLE)
    elif how == "messages":
        for message in kafka.messages([topic], until_idle=IDLE):
            handler(message)
    else:
        for tx in kafka.transactions([topic], until_idle=IDLE):
            with tx:
                batch_handler(tx.messages)
    return seen


@broker
@pytest.mark.parametrize(("kind", "how"), EACH_LOOP)
def test_what_cannot_be_deserialized_ends_the_run_without_a_dead_letter_topic(kind: str, how: str, here: Here) -> None:
    """HandlerError with the place; what came before is committed, in the caller's own transaction too; it comes again."""
    source = here.topic()
    write(here.bootstrap, source, *((None, b"%d" % n, None) for n in range(3)), (None, b"\xff", None))
    with here.make(kind, value_deserializer=from_json) as kafka:
        with pytest.raises(HandlerError, match=r"offset 3.*SerializationError"):
            handled(kafka, how, source)
        assert committed(here.bootstrap, here.group, source) == [3]
        with pytest.raises(HandlerError, match="offset 3"):
            handled(kafka, how, source)


@broker
@pytest.mark.parametrize(("kind", "how"), [way for way in WAYS if way[0] != "AtMostOnce" and way[1] != "transactions"])
def test_a_slow_deserializer_does_not_keep_a_run_from_its_group(
    kind: str, how: str, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C10: a registry that does not answer takes seconds for each of thousands of messages: each is read in its turn."""
    monkeypatch.setattr("kafka_guarantees._serialization.AT_ONCE", 0.05)
    source, dead = here.topic(), here.topic()
    write(here.bootstrap, source, *((None, b"\xff" if n == 7 else b"%d" % n, None) for n in range(30)))
    asked: list[float] = []

    def reading(payload: bytes, context: SerializationContext) -> Any:
        asked.append(time.monotonic())
        time.sleep(0.02)
        return from_json(payload, context)

    with here.make(kind, value_deserializer=reading, dead_letter=dead, retry=AT_ONCE) as kafka:
        seen = handled(kafka, how, source)
        assert sorted(seen) == [(None, n) for n in range(30) if n != 7]
        asked.clear()
        write(here.bootstrap, source, *((None, b"%d" % n, None) for n in range(200)))
        threading.Timer(1.0, kafka.stop).start()
        handled(kafka, how, source)
    assert time.monotonic() - asked[-1] < 1.0
    assert 0 < len(asked) < 150, "it was not stopped before all of it was read"
    assert [letter.offset for letter in map(origin_of, read_all(here.bootstrap, dead)) if letter is not None] == [7]


@broker
@pytest.mark.parametrize(("kind", "how"), EACH_LOOP)
def test_a_registry_that_was_away_is_asked_again(kind: str, how: str, here: Here) -> None:
    """A deserializer that fails for another reason than the bytes is tried again as a handler is, and nothing is set aside."""
    source, dead = here.topic(), here.topic()
    write(here.bootstrap, source, *((None, b"%d" % n, None) for n in range(4)))
    away = {b"1": 3, b"2": 2}

    def reading(payload: bytes, context: SerializationContext) -> Any:
        if away.get(payload):
            away[payload] -= 1
            raise ConnectionError("the registry is away")
        return from_json(payload, context)

    with here.make(kind, value_deserializer=reading, dead_letter=dead, retry=AT_ONCE) as kafka:
        assert handled(kafka, how, source) == [(None, n) for n in range(4)]
    assert not letters(here.bootstrap, dead)
    assert committed(here.bootstrap, here.group, source) == [4]


@broker
@pytest.mark.parametrize(
    ("memory", "how"), [("none", "run_batches"), ("store", "run"), ("inbox", "run"), ("inbox", "run_batches")]
)
def test_a_message_is_deserialized_once_however_often_it_is_tried(how: str, memory: str, here: Here, tmp_path: Path) -> None:
    """Retries of the handler, one by one after a batch, an inbox that did not answer: all with the same object (L01)."""
    source, dead = here.topic(), here.topic()
    write(here.bootstrap, source, *((None, b'{"id": "%d"}' % n, None) for n in range(4)))
    asked: list[bytes] = []
    tries: list[int] = []
    refusals = iter([StoreUnavailable("the database was away"), StoreUnavailable("the database was away")])

    def reading(payload: bytes, context: SerializationContext) -> Any:
        asked.append(payload)
        return from_json(payload, context)

    def handler(message: Message, *connection: object) -> None:
        value: Any = message.value()
        assert value == {"id": str(message.offset())}
        if value["id"] == "2":
            tries.append(1)
            if connection and (refusal := next(refusals, None)) is not None:
                raise refusal
            raise ConnectionError

    def all_of(batch: Sequence[Message], *connection: object) -> None:
        for one in batch:
            handler(one, *connection)

    options: dict[str, Any] = {} if memory == "none" else {"message_id": json_field("id")}
    with MemoryDedupStore() as store, SqliteInbox(tmp_path / "inbox.db") as inbox:
        if memory != "none":
            options |= {"dedup": store} if memory == "store" else {"inbox": inbox}
        with here.make("AtLeastOnce", value_deserializer=reading, dead_letter=dead, retry=AT_ONCE, **options) as kafka:
            getattr(kafka, how)([source], handler if how == "run" else all_of, until_idle=1)
    assert len(tries) >= 5
    assert sorted(asked) == [b'{"id": "%d"}' % n for n in range(4)], "ids are taken from bytes, and each value is read once"
    assert [letter["value"] for letter in letters(here.bootstrap, dead)] == [b'{"id": "2"}']
    assert committed(here.bootstrap, here.group, source) == [4]


# -- poison ------------------------------------------------------------------------------------------------------------------

NAMES = [b"\xff", b"bad\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"]  # none of them is UTF-8
GOOD = 100  # before and after
UNREADABLE = 50
POISON = 200


def write_unreadable(bootstrap: str, topic: str, count: int) -> None:
    """Records with header names that are not UTF-8, which the Python binding does not let one write, among good headers."""
    (library,) = Path(confluent_kafka.__file__).parents[1].glob("confluent_kafka.libs/librdkafka*")
    script = f"""
import ctypes
lib = ctypes.CDLL({str(library)!r})
lib.rd_kafka_conf_new.restype = lib.rd_kafka_new.restype = ctypes.c_void_p
why = ctypes.create_string_buffer(512)
conf = ctypes.c_void_p(lib.rd_kafka_conf_new())
assert lib.rd_kafka_conf_set(conf, b"bootstrap.servers", {bootstrap.encode()!r}, why, 512) == 0
client = ctypes.c_void_p(lib.rd_kafka_new(0, conf, why, 512))
TOPIC, VALUE, FLAGS, HEADER, END, COPY = 1, 4, 7, 9, 0, 2
i, size = ctypes.c_int, ctypes.c_ssize_t
for number in range({count}):
    name = {NAMES!r}[number % {len(NAMES)}]
    assert lib.rd_kafka_producev(client, i(TOPIC), {topic.encode()!r}, i(FLAGS), i(COPY), i(VALUE), b"poison", size(6),
                                 i(HEADER), b"message-id", b"%d" % number, size(-1),
                                 i(HEADER), name, b"v", size(1), i(END)) == 0
assert lib.rd_kafka_flush(client, 10000) == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def write_poison(bootstrap: str, topic: str, unreadable: int = UNREADABLE, poison: int = POISON) -> None:
    """Records that somebody else made, in the middle of good ones. Of offsets 100 and up ``unreadable`` cannot be read."""
    good = [(b"k", b"good", [("message-id", b"good %d" % n)]) for n in range(2 * GOOD)]
    large = b"x" * 900_000
    kinds: list[tuple[bytes | None, bytes | None, Any]] = [
        (None, None, None),
        (b"", b"", []),
        (b"tombstone", None, [("message-id", b"\xff\xfe")]),
        (b"", None, [("message-id", None)]),
        (b"k", b"v", [("message-id", b""), ("", b""), ("a", None)]),
        (b"k", b"v", [("message-id", b"twice"), ("message-id", b"not unique")]),
        (b"\0", b"\0", [("message-id", b"\0" * 10)]),
        (b"k", b"v", [("Message-ID", b"1")]),
        (b"k", b"v", [(f"header {n}", b"%d" % n) for n in range(100)]),
    ]
    rest = poison - unreadable
    others = [(large, b"v", [("message-id", b"of a large key")]), (b"k", b"v", [("message-id", large)]), *(kinds * rest)][:rest]
    write(bootstrap, topic, *good[:GOOD])
    write_unreadable(bootstrap, topic, unreadable)
    write(bootstrap, topic, *others, *good[GOOD:])


@pytest.fixture(scope="module")
def poisoned(kafka: RunningKafka) -> str:
    """A topic that many tests read, each with a group of its own."""
    name = f"poisoned-{uuid.uuid4().hex[:12]}"
    kafka.create_topic(name, 1)
    write_poison(kafka.bootstrap, name)
    return name


LOST = list(range(GOOD, GOOD + UNREADABLE))
READABLE = [offset for offset in range(2 * GOOD + POISON) if offset not in LOST]


def look(message: Message) -> int:
    """The offset of a message whose headers are asked for again and again."""
    for _ in range(3):
        headers: Any = message.headers() or []
        for name, value in headers:
            assert isinstance(name, str)
            assert value is None or isinstance(value, bytes)
    return message.offset() or 0


def offsets_of(bootstrap: str, topic: str) -> list[int]:
    return [int(letter["dead-letter-offset"]) for letter in letters(bootstrap, topic)]


@broker
@pytest.mark.parametrize(("kind", "how"), WAYS)
def test_poison_is_set_aside(kind: str, how: str, poisoned: str, here: Here) -> None:
    """S04: every record is handled once, or is a dead letter once; no process crashes over any of them."""
    dead = here.topic()
    with here.make(kind, dead_letter=dead) as kafka:
        assert handled(kafka, how, poisoned, look) == READABLE
    assert offsets_of(here.bootstrap, dead) == LOST
    assert {(letter["dead-letter-headers"], letter["value"]) for letter in letters(here.bootstrap, dead)} == {
        (b"lost", b"poison")
    }
    assert committed(here.bootstrap, here.group, poisoned) == [2 * GOOD + POISON]


@broker
@pytest.mark.parametrize(("kind", "how"), [*EACH_LOOP, ("AtMostOnce", "run"), ("AtMostOnce", "messages")])
def test_poison_without_a_dead_letter_topic(kind: str, how: str, poisoned: str, here: Here) -> None:
    """At most once drops what cannot be read, and says so; the others stop before it, each time, and never pass it."""
    dropped: list[int | None] = []
    if kind == "AtMostOnce":
        with here.make(kind, on_error=lambda message, error: dropped.append(message.offset())) as kafka:
            assert handled(kafka, how, poisoned, look) == READABLE
        assert dropped == LOST
        assert committed(here.bootstrap, here.group, poisoned) == [2 * GOOD + POISON]
        return
    with here.make(kind) as kafka:
        for _ in range(2):
            with pytest.raises(HandlerError, match=rf"offset {LOST[0]} \(HeadersLost"):
                handled(kafka, how, poisoned, look)
    assert committed(here.bootstrap, here.group, poisoned) == [LOST[0]]


@broker
@pytest.mark.parametrize(
    "case",
    [
        ("store", "run", "raise"),
        ("store", "run_batches", "position"),
        ("store", "run", "process"),
        ("inbox", "run_batches", "raise"),
        ("inbox", "run", "position"),
        ("inbox", "run_batches", "process"),
    ],
)
def test_poison_with_ids_in_a_header(case: tuple[str, str, Any], poisoned: str, here: Here, tmp_path: Path) -> None:
    """Every record is handled, a dead letter, or a duplicate of one that is handled; none is two of these, or nothing."""
    memory, how, missing = case
    dead, source, unreadable, poison = here.topic(), poisoned, UNREADABLE, POISON
    if missing == "raise":  # each of them costs a fetch
        source, unreadable, poison = here.topic(), 5, 20
        write_poison(here.bootstrap, source, unreadable, poison)
    with MemoryDedupStore() as store, SqliteInbox(tmp_path / "inbox.db") as inbox:
        option: dict[str, Any] = {"dedup": store} if memory == "store" else {"inbox": inbox}
        with here.make("AtLeastOnce", dead_letter=dead, on_missing_id=missing, **option) as kafka:
            seen = handled(kafka, how, source, look)
            assert isinstance(kafka, AtLeastOnce)
            duplicates = kafka.dedup_counts["duplicate"]
    aside = offsets_of(here.bootstrap, dead)
    if memory == "store":  # where a transaction of an inbox is rolled back, what came before the failure is handled again
        assert len(seen) == len(set(seen))
    assert len(aside) == len(set(aside))
    assert not set(seen) & set(aside)
    assert set(LOST[:unreadable]) <= set(aside)
    assert len(set(seen)) + len(aside) + duplicates == 2 * GOOD + poison
    assert committed(here.bootstrap, here.group, source) == [2 * GOOD + poison]
