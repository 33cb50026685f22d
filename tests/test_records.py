"""Laws of the data that crosses the API: records, what handlers return, deliveries, and what of them arrives."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import threading
import time
import traceback
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import partial, wraps
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kafka_guarantees import AtLeastOnce, AtMostOnce, Delivery, Record, _turns, records
from kafka_guarantees._enqueue import _payload, checked_headers, enqueue
from kafka_guarantees._failures import GaveUp, handler_error
from kafka_guarantees._turns import TURN, Turns
from kafka_guarantees.errors import DeliveryError, DeliveryUnknown
from kafka_guarantees.records import check_handler, records_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kafka_guarantees.records import Headers, Payload
    from kafka_guarantees.testing import RunningKafka

DEAD = "127.0.0.1:1"
A, B = Record("a"), Record("b", b"2")


# --- Record ----------------------------------------------------------------------------------------------------------


def test_a_record_is_its_parts() -> None:
    """Value and key come by place, the rest by name; what is not given is None."""
    record = Record("t", b"v", b"k", headers={"h": b"x"}, partition=3, timestamp=4)
    assert dataclasses.asdict(record) == {
        "topic": "t",
        "value": b"v",
        "key": b"k",
        "headers": {"h": b"x"},
        "partition": 3,
        "timestamp": 4,
    }
    assert set(dataclasses.asdict(Record("t")).values()) == {"t", None}


def test_records_with_the_same_parts_are_equal() -> None:
    """Handlers are tested by comparing what they return."""
    assert Record("t", b"v", b"k") == Record("t", b"v", b"k")
    assert Record("t", b"v", b"k") != Record("t", b"v")
    assert hash(Record("t", b"v")) == hash(Record("t", b"v"))


@pytest.mark.parametrize("headers", [None, [("a", b"1")], {"a": b"1"}])
def test_the_id_of_a_record_is_its_last_header(headers: Headers) -> None:
    """D06: where readers look for it by default, behind its own headers, in a copy of the record too."""
    record = Record("t", b"v", headers=headers, message_id="id-1")
    assert checked_headers(record.headers) == [*(checked_headers(headers) or []), ("message-id", b"id-1")]
    assert pickle.loads(pickle.dumps(record)) == record
    assert Record("t", b"v", headers=headers).headers is headers


def test_a_record_does_not_change() -> None:
    """A record that a handler has returned cannot be altered behind the producer's back."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        A.topic = "other"  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        A.other = 1  # type: ignore[attr-defined]


class Priced(Record):
    """A record of the user's own kind."""

    price = 1


def pickled(record: Record) -> Record:
    """What another process gets."""
    made: Record = pickle.loads(pickle.dumps(record))
    return made


@pytest.mark.parametrize("kind", [Record, Priced])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickled, dataclasses.replace])
def test_a_copy_of_a_record_equals_it(kind: type[Record], way: Callable[[Record], Record]) -> None:
    """Pickled for another process, copied, or replaced: the same parts, the same class, and frozen like the first."""
    record = kind("t", b"v", b"k", headers=[("h", b"x")], partition=3, timestamp=4)
    made = way(record)
    assert (made, type(made), repr(made)) == (record, kind, repr(record))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.value = b"other"  # type: ignore[misc]


# --- records_in ------------------------------------------------------------------------------------------------------


def two() -> Iterator[Record]:
    yield A
    yield B


@pytest.mark.parametrize("result", [[A, B], (A, B), two(), iter([A, B]), {A: 1, B: 2}.keys()])
def test_any_iterable_of_records_is_taken(result: Iterable[Record]) -> None:
    """Lists, tuples, generators, views: each record once, in their order."""
    assert list(records_in(result)) == [A, B]


def test_one_record_need_not_be_in_a_list() -> None:
    """``return Record(...)`` is what most write first, also with a kind of their own."""
    own = Priced("t", b"v")
    assert list(records_in(A)) == [A]
    assert list(records_in(own)) == [own]


@pytest.mark.parametrize("result", [None, [], ()])
def test_nothing_is_no_records(result: Iterable[Record] | None) -> None:
    """A handler without output returns None, or an empty iterable."""
    assert list(records_in(result)) == []


@pytest.mark.parametrize(
    ("result", "named"),
    [
        ("text", "returned str"),
        (b"text", "returned bytes"),
        ({}, "returned dict"),
        ({"a": A}, "returned dict"),
        (0, "returned int"),
        (7, "returned int"),
        (False, "returned bool"),
        (object(), "returned object"),
        ([b"v"], "produced bytes"),
        ([None], "produced NoneType"),
        ([("t", b"v")], "produced tuple"),
        ([A, "b"], "produced str"),
        (bytearray(b"ab"), "produced int"),
    ],
)
def test_what_is_not_records_is_refused_by_name(result: Any, named: str) -> None:
    """A str (an iterable of str), a falsy mistake: none is silently taken for "no output"."""
    with pytest.raises(TypeError, match=named):
        list(records_in(result))


class Asynchronous:
    async def __call__(self, _message: Message) -> None: ...


@pytest.mark.parametrize(
    ("handler", "arguments", "said"),
    [
        (Asynchronous(), 1, "coroutine function"),
        (lambda: None, 1, "called with a message, or a list of them, and takes"),
        (lambda _message, _connection: None, 1, r"missing a required argument: '_connection'"),
        (lambda _message: None, 2, r"and the connection of the inbox, and takes \(_message\): too many"),
        (partial(lambda _message, *, price: price, "offer"), 0, "price"),
    ],
)
def test_a_handler_that_can_take_no_message_is_refused(handler: Any, arguments: int, said: str) -> None:
    """Else each message would fail, and be dropped or set aside, to the end of the topic."""
    with pytest.raises(TypeError, match=said):
        check_handler(handler, arguments)


@wraps(lambda _message, _connection, _price: None)
def decorated(_message: Message) -> None: ...


class Unevaluated:
    """What it takes cannot be found out: in Python 3.14 that asks for annotations, which may be of nothing that is there."""

    @property
    def __signature__(self) -> Any:
        raise NameError("Message")

    def __call__(self, _message: Message) -> None: ...


@pytest.mark.parametrize(
    ("handler", "arguments"),
    [
        (lambda _message: None, 1),
        (decorated, 1),
        (Unevaluated(), 1),
        (Mock(), 2),
        (lambda _message, _connection: None, 2),
        (lambda _message, factor=2: factor, 1),
        (lambda *parts: parts, 2),
        (partial(lambda _offer, _message: None, "offer"), 1),
        ([].append, 1),
        (print, 2),
        (str, 1),
        (max, 1),
    ],
)
def test_a_handler_of_any_other_kind_is_taken(handler: Any, arguments: int) -> None:
    """Functions, methods, partials, classes, functions in C of which nobody knows what they take."""
    check_handler(handler, arguments)


def test_a_coroutine_function_as_handler_is_refused_and_its_coroutine_closed() -> None:
    """``async def`` would never run; and a coroutine that is dropped warns at another place, so it is closed."""

    async def handler(_message: Message) -> None:
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coroutine: Any = handler(Message(topic="t"))
        with pytest.raises(TypeError, match="coroutine function"):
            list(records_in(coroutine))
    assert coroutine.cr_frame is None


def test_records_before_a_wrong_one_were_seen() -> None:
    """Records are checked as they come: a generator runs no further than its first mistake."""
    rest: Iterator[Any] = iter([A, 5, B])
    walk = iter(records_in(rest))
    assert next(walk) is A
    with pytest.raises(TypeError):
        next(walk)
    assert next(rest) is B


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attempts", "said"), [(1, "offset 41 (KeyError"), (3, "offset 41, in 3 attempts (KeyError")])
def test_the_error_for_a_failed_handler_names_its_message(attempts: int, said: str) -> None:
    """Topic, partition, offset, the handler's own text, how often it was tried, what is safe and what to do."""
    message = Message(topic="orders", partition=2, offset=41)
    error = handler_error(message, GaveUp(KeyError("amount"), attempts))
    assert (error.topic, error.partition, error.offset) == (message.topic(), message.partition(), message.offset())
    text = str(error)
    assert "topic 'orders' partition 2 " + said + ": 'amount')" in text
    assert "Nothing at or after that offset was committed" in text
    assert "dead_letter=" in text


# --- Delivery --------------------------------------------------------------------------------------------------------


class Server:
    """Stands for the producer: settles a delivery at the n-th look."""

    def __init__(self, settle_at: int = 0, settle: Callable[[], None] | None = None) -> None:
        self.failed = False
        self.unacknowledged: set[Delivery] = set()
        self.patience = 30.0
        self.looks = 0
        self._settle_at = settle_at
        self._settle = settle
        self.longest = 0.0

    def future_of(self, delivery: Delivery) -> Any:
        raise NotImplementedError

    def looked_at(self, delivery: Delivery) -> None:
        self.unacknowledged.discard(delivery)

    def wait_for(self, _delivery: Delivery, timeout: float) -> None:
        assert timeout > 0  # librdkafka would wait without a limit
        self.looks += 1
        self.longest = max(self.longest, timeout)
        if self._settle is not None and self.looks == self._settle_at:
            self._settle()
        elif self._settle_at == 0:
            time.sleep(timeout)


def test_result_waits_until_the_report_comes() -> None:
    """It serves the producer meanwhile, in slices, and returns the delivery itself."""
    server = Server(3, lambda: delivery(None, Message(topic="t", partition=4, offset=9)))
    delivery = Delivery("t", server)
    assert not delivery.done
    assert delivery.result() is delivery
    assert (delivery.done, delivery.topic, delivery.partition, delivery.offset) == (True, "t", 4, 9)
    assert server.looks == 3
    assert 0 < server.longest <= 0.1
    assert not server.unacknowledged


@pytest.mark.parametrize("left", [0, 1, None])
def test_a_report_that_was_destroyed_is_not_waited_for_as_long_as_a_record_may_take(
    left: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Y03: an exception out of a signal handler. Nothing is on its way then, and result() waited for delivery.timeout.ms."""
    monkeypatch.setattr(records, "LOST", 0.1)
    server = Server()
    server.patience = 60.0 if left == 0 else 0.6

    def nothing_comes(*_: object) -> int | None:
        time.sleep(0.002)
        return left

    monkeypatch.setattr(server, "wait_for", nothing_comes)
    began = time.monotonic()
    with pytest.raises(DeliveryUnknown, match="the report on a record for topic 't' was lost"):
        Delivery("t", server).result()
    took = time.monotonic() - began
    assert took >= 0.1
    if left != 0:
        assert took >= 0.6, "it may still come"
    else:
        assert took < 30


def test_result_does_not_wait_for_what_is_known() -> None:
    """Once done, always done: no look at the producer, not even with a timeout of 0."""
    server = Server()
    delivery = Delivery("t", server)
    delivery(None, Message(topic="t", partition=0, offset=1))
    assert delivery.result(0) is delivery
    assert server.looks == 0


def test_a_success_without_an_offset_is_none() -> None:
    """P13: librdkafka concludes it from the success of a later record, and may be wrong."""
    delivery = Delivery("t", Server())
    delivery(None, Message(topic="t", partition=0))
    with pytest.raises(DeliveryUnknown, match="'t' partition 0 may or may not have been written"):
        delivery.result()


@pytest.mark.parametrize("timeout", [0, 0.12])
def test_result_gives_up_after_its_timeout_and_can_be_asked_again(timeout: float) -> None:
    """TimeoutError is not a failure: the record is on its way, and its outcome is told later."""
    server = Server()
    delivery = Delivery("t", server)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="still on its way"):
        delivery.result(timeout)
    assert timeout <= time.monotonic() - started < timeout + 1
    assert not delivery.done
    assert not server.unacknowledged
    delivery(None, Message(topic="t", partition=0, offset=1))
    assert delivery.result(0).offset == 1


def test_a_report_that_never_comes_is_not_waited_for_longer_than_its_record() -> None:
    """P01: something destroyed it. Nobody knows what became of the record, and that is said."""
    server = Server()
    server.patience = -0.9
    with pytest.raises(DeliveryUnknown, match="was lost"):
        Delivery("t", server).result()
    assert server.looks


@pytest.mark.parametrize(
    ("code", "kind"), [(KafkaError._MSG_TIMED_OUT, DeliveryUnknown), (KafkaError.MSG_SIZE_TOO_LARGE, DeliveryError)]
)
def test_a_failure_is_kept_for_others_and_raised_by_every_result(code: int, kind: type[Exception]) -> None:
    """P01: a failure stays with what is not acknowledged until result() has raised it, which it does each time."""
    server = Server()
    delivery = Delivery("t", server)
    server.unacknowledged.add(delivery)
    delivery(KafkaError(code), Message(topic="t"))
    assert server.unacknowledged == {delivery}
    assert delivery.done
    for _ in range(2):
        with pytest.raises(kind):
            delivery.result()
    assert not server.unacknowledged
    assert delivery.offset is None


def test_a_delivery_shows_its_state() -> None:
    """Its repr is for logs: topic and state, never the payload."""
    one, two = Delivery("t", Server()), Delivery("t", Server())
    assert repr(one) == "<Delivery to 't': on its way>"
    one(None, Message(topic="t", partition=0, offset=1))
    two(KafkaError(KafkaError._MSG_TIMED_OUT), Message(topic="t"))
    assert repr(one) == "<Delivery to 't': acknowledged>"
    assert repr(two) == "<Delivery to 't': failed>"


# --- several threads wait ---------------------------------------------------------------------------------------------


def in_threads(*works: Callable[[], object]) -> None:
    """Do all of it at the same time, and raise what one raised. Whoever is told nothing waits for a minute: too long."""
    with ThreadPoolExecutor(len(works)) as pool:
        for one in [pool.submit(work) for work in works]:
            one.result(timeout=20)


def until_done(turns: Turns, delivery: Delivery, serve: Callable[[], object]) -> None:
    while not delivery.done:
        turns.wait(delivery, 60, serve)


def test_who_serves_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look brings the report of one of ten threads, whoever looks: all return, and as a rule one looks at a time."""
    monkeypatch.setattr(_turns, "TURN", 60)
    turns = Turns()
    deliveries = [Delivery("t", Server()) for _ in range(10)]
    at_work: set[int] = set()
    together: list[int] = []
    left = deque(deliveries)

    def serve() -> None:
        at_work.add(threading.get_ident())
        together.append(len(at_work))
        time.sleep(0.01)  # the others come meanwhile
        left.pop()(None, Message(topic="t", partition=0, offset=1))
        at_work.discard(threading.get_ident())

    in_threads(*[partial(until_done, turns, delivery, serve) for delivery in deliveries])
    assert together.count(1) > 5  # two may find that it is nobody's turn


def test_a_thread_that_gives_up_leaves_the_turn_to_another() -> None:
    """Whose timeout has passed serves no longer, and who waited for it does."""
    turns, mine, others = Turns(), Delivery("t", Server()), Delivery("t", Server())
    other_waits = threading.Event()

    def serve() -> None:
        other_waits.wait(10)
        time.sleep(0.05)

    def gives_up() -> None:
        turns.wait(mine, 60, serve)

    def waits() -> None:
        other_waits.set()
        until_done(turns, others, lambda: others(None, Message(topic="t", partition=0, offset=1)))

    in_threads(gives_up, waits)
    assert (mine.done, others.done) == (False, True)


def test_a_turn_that_was_not_given_back_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception out of a signal handler, between two instructions: the next thread waits a moment, and then serves."""
    turns, delivery = Turns(), Delivery("t", Server())
    monkeypatch.setattr(turns, "_until", time.monotonic() + TURN)
    looks = []
    for _ in range(1000):
        turns.wait(delivery, 0.05, lambda: looks.append(delivery))
        if looks:
            break
    assert looks


def test_an_error_while_serving_is_raised_where_it_comes_up_and_the_next_serves() -> None:
    """A fatal error of librdkafka ends one ``result()``; the turn is free."""
    turns, delivery = Turns(), Delivery("t", Server())

    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        turns.wait(delivery, 60, fails)
    turns.wait(delivery, 60, lambda: delivery(None, Message(topic="t", partition=0, offset=1)))
    assert delivery.done


# --- what crosses into C ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (None, None),
        (b"", b""),
        ("", ""),
        (b"a\0b", b"a\0b"),
        ("a\0b", "a\0b"),
        (bytearray(b"a\0"), b"a\0"),
        (memoryview(b"abcd")[::2], b"ac"),
    ],
)
def test_payloads_are_bytes_str_or_none(part: Payload, expected: object) -> None:
    """P20: buffers become bytes; None stays a tombstone, and what is empty stays empty."""
    made = _payload(part, "value")
    assert made == expected
    assert type(made) is type(expected)


@pytest.mark.parametrize("part", [0, 1.5, True, {}, ["a"], object()])
def test_other_payloads_are_refused_by_name(part: Any) -> None:
    """Nothing is serialized by guess; in particular bytes(5) would be five NULs."""
    with pytest.raises(TypeError, match=f"value must be bytes, str or None, not {type(part).__name__}. Nothing was sent"):
        _payload(part, "value")


def test_header_values_are_encoded_before_c_sees_them() -> None:
    """P20: librdkafka's binding cuts a header's str at its first NUL."""
    given: Headers = [("a", "x\0y"), ("b", b"x\0y"), ("c", None), ("d", bytearray(b"z")), ("a", "ü")]
    assert checked_headers(given) == [("a", b"x\0y"), ("b", b"x\0y"), ("c", None), ("d", b"z"), ("a", b"\xc3\xbc")]


def test_headers_come_as_dict_or_pairs() -> None:
    """Both forms mean the same; nothing is no headers."""
    assert checked_headers({"a": "1", "b": None}) == checked_headers([("a", "1"), ("b", None)]) == [("a", b"1"), ("b", None)]
    assert checked_headers(None) is checked_headers({}) is checked_headers([]) is None


def test_headers_that_can_be_read_once_are_refused() -> None:
    """Where the queue is full they are read a second time: the record would go without them."""
    with pytest.raises(TypeError, match="not zip, which can be read once"):
        checked_headers(zip(["a"], [b"1"], strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ("abc", "str of 3"),
        (b"abc", "bytes of 3"),
        (["abc"], "str of 3"),
        ([1], "int"),
        ([("a", b"1", 0)], "tuple of 3"),
        (7, "int"),
    ],
)
def test_headers_that_are_no_pairs_are_named(headers: Any, kind: str) -> None:
    """Python would say that there are not enough values to unpack, or that something cannot be iterated."""
    with pytest.raises(TypeError, match=f"headers are pairs of name and value, or a dict, not {kind}. Nothing was sent"):
        checked_headers(headers)


@pytest.mark.parametrize("wrong", ["3", 1.5, datetime.now(timezone.utc)])
@pytest.mark.parametrize("name", ["partition", "timestamp"])
def test_a_partition_and_a_timestamp_are_whole_numbers(name: str, wrong: Any) -> None:
    """Of a time and of text C, or a comparison, would only say that these are no numbers."""
    raw, record = Producer({"bootstrap.servers": DEAD}), Record("a-topic", **{name: wrong})
    with pytest.raises(TypeError, match=f"{name} is .*not {re.escape(repr(wrong))}. Nothing was sent"):
        enqueue(raw, record, None, lambda _waited: False, set(), serve=lambda _call: 0)


@pytest.mark.parametrize("name", ["\0", "a\0b", "a\0"])
def test_a_nul_in_a_headers_name_is_refused(name: str) -> None:
    """P20: C would take the name to end there, and a dedup id would not be found again."""
    with pytest.raises(ValueError, match="NUL"):
        checked_headers([(name, b"x")])


@pytest.mark.parametrize("name", [b"a", 1, None])
def test_a_headers_name_is_str(name: Any) -> None:
    """A name in bytes is a mistake that C would report obscurely."""
    with pytest.raises(TypeError, match="name must be str"):
        checked_headers([(name, b"x")])


@pytest.mark.parametrize("make", [AtMostOnce, AtLeastOnce])
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("t", 5), {}),
        (("t", b"", 5), {}),
        ((None,), {}),
        ((b"t",), {}),
        (("a\0b",), {}),
        (("t",), {"headers": [("a\0", b"")]}),
        (("t",), {"headers": [("a", 5)]}),
        (("t",), {"headers": 5}),
        (("t",), {"partition": "0"}),
        (("t",), {"timestamp": "now"}),
        (("t",), {"timestamp": 2**63}),
        (("t",), {"partition": 2**31}),
        (("t", "\ud800"), {}),
    ],
)
def test_what_is_not_a_record_raises_at_produce_and_nothing_else_later(
    make: type[AtMostOnce | AtLeastOnce], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """TypeError or ValueError, in the line of the mistake; close() has nothing left to complain about."""
    with make({"bootstrap.servers": DEAD}) as kafka, pytest.raises((TypeError, ValueError)):
        kafka.produce(*arguments, **options)


@pytest.mark.parametrize(
    ("topic", "said"),
    [
        (None, "topic must be str, not None. Nothing was sent."),
        (b"t", "topic must be str, not bytes. Nothing was sent."),
        (A, "topic must be str, not Record. Nothing was sent. Give its parts, or return it from the handler."),
    ],
    ids=["None", "bytes", "Record"],
)
@pytest.mark.parametrize("partition", [None, 0])
def test_what_is_no_topic_is_named(topic: Any, said: str, partition: int | None) -> None:
    """C would speak of argument 1, which nobody has written."""
    record = Record(topic, b"v", partition=partition)
    with AtMostOnce({"bootstrap.servers": DEAD}) as once, AtLeastOnce({"bootstrap.servers": DEAD}) as kafka:
        for send in (
            lambda: once.produce(topic, b"v", partition=partition),
            lambda: kafka.produce(topic, b"v", partition=partition),
            lambda: kafka._send_all(record),
        ):
            with pytest.raises(TypeError) as caught:
                send()
            assert str(caught.value) == said
            assert "argument 1" not in "".join(traceback.format_exception(caught.value))


# --- what arrives ----------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=20)  # with NUL, without surrogates
PAYLOADS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.binary(max_size=20),
    TEXT,
    st.binary(max_size=20).map(bytearray),
    st.binary(max_size=20).map(lambda part: memoryview(part)),  # noqa: PLW0108 - mypy cannot infer the class itself
)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=10)
RECORDS = st.tuples(PAYLOADS, PAYLOADS, st.lists(st.tuples(NAMES, PAYLOADS), max_size=4), st.integers(1, 1_700_000_000_000))


def first_messages(bootstrap: str, topic: str, count: int) -> list[Message]:
    """So many messages of partition 0, as soon as they are there."""
    config = {"bootstrap.servers": bootstrap, "group.id": "reader", "enable.auto.commit": False, "fetch.queue.backoff.ms": 2}
    consumer = Consumer(config)
    found: list[Message] = []
    deadline = time.monotonic() + 20
    try:
        consumer.assign([TopicPartition(topic, 0, 0)])
        while len(found) < count and time.monotonic() < deadline:
            found += [one for one in consumer.consume(count - len(found), 0.2) if one.error() is None]
    finally:
        consumer.close()
    return found


def as_bytes(part: Payload) -> bytes | None:
    if part is None:
        return None
    return part.encode() if isinstance(part, str) else bytes(part)


@pytest.mark.broker
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
@given(batch=st.lists(RECORDS, min_size=10, max_size=40))
def test_what_is_produced_is_what_arrives(
    kafka: RunningKafka, kafka_topic: Callable[..., str], batch: list[tuple[Any, Any, list[tuple[str, Any]], int]]
) -> None:
    """P20: value, key, every header in its order, and the timestamp, byte for byte; None stays None, empty stays empty."""
    topic = kafka_topic(1, config={"retention.ms": -1})  # the timestamps are old
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "linger.ms": 1}) as producer:
        for value, key, headers, timestamp in batch:
            producer.produce(topic, value, key, headers=headers, timestamp=timestamp)
        producer.flush()
    arrived = [
        (m.value(), m.key(), m.headers() or [], m.timestamp()[1]) for m in first_messages(kafka.bootstrap, topic, len(batch))
    ]
    expected = [
        (as_bytes(value), as_bytes(key), [(name, as_bytes(part)) for name, part in headers], timestamp)
        for value, key, headers, timestamp in batch
    ]
    assert arrived == expected


@pytest.mark.parametrize("timestamp", [0, -1])
def test_a_timestamp_that_librdkafka_would_replace_is_refused(timestamp: int) -> None:
    """Librdkafka writes the present time for 0, so that 1970-01-01 would silently become now."""
    with (
        AtMostOnce({"bootstrap.servers": "127.0.0.1:1"}) as producer,
        pytest.raises(ValueError, match=r"present time.*Nothing was sent"),
    ):
        producer.produce("orders", b"old", timestamp=timestamp)
