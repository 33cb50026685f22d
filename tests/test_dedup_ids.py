"""Laws of message ids: what an extractor finds, what it never takes for an id, and which digests differ."""

from __future__ import annotations

import json
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Message, Uuid
from hypothesis import given, settings
from hypothesis import strategies as st

from kafka_guarantees import KafkaGuaranteesError
from kafka_guarantees._recognition.topics import TopicIds
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees.dedup import POSITION, cloudevent, first_of, header, json_field, position
from kafka_guarantees.dedup.ids import FINGERPRINT_SIZE, KEY_SIZE, fingerprint_of, key_of, position_of

if TYPE_CHECKING:
    from collections.abc import Callable

ID = header("message-id")
EVENT = cloudevent()
STRUCTURED = ("content-type", b"application/cloudevents+json; charset=UTF-8")
TOPIC_ID = bytes(range(16))
MANY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def message(*headers: tuple[str, bytes | str | None], key: bytes | None = None, value: bytes | None = None) -> Message:
    return Message(topic="orders", partition=0, offset=7, key=key, value=value, headers=list(headers) or None)


class Unreadable(Message):
    """A record whose header has a name that is not UTF-8, as librdkafka hands it out (S04)."""

    error_of_headers: Exception = SystemError("returned NULL without setting an exception")

    def headers(self) -> Any:
        raise self.error_of_headers


class NotUtf8(Unreadable):
    error_of_headers = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


# -- headers --------------------------------------------------------------------------------------------------------------


def test_the_header_of_that_name_is_the_id() -> None:
    """Its bytes as they are, or text as UTF-8."""
    assert ID(message(("other", b"x"), ("message-id", b"42"))) == b"42"
    assert ID(message(("message-id", b"\x00\xff"))) == b"\x00\xff"
    assert ID(message(("message-id", "\u00e4"))) == "\u00e4".encode()


def test_of_headers_with_the_same_name_the_last_counts() -> None:
    """Retry topics append theirs; the one that was added last is the one that the last sender meant."""
    assert ID(message(("message-id", b"first"), ("x", b""), ("message-id", b"last"))) == b"last"


def test_an_empty_last_header_is_no_id() -> None:
    """No earlier one is dug out from below it: that would be a guess."""
    for empty in (None, b"", ""):
        assert ID(message(("message-id", b"first"), ("message-id", empty))) is None
        assert ID(message(("message-id", empty))) is None


@pytest.mark.parametrize("name", ["Message-Id", "MESSAGE-ID", "x-message-id", "message-id ", "message-i"])
def test_a_name_is_matched_exactly(name: str) -> None:
    """Neither case nor a prefix nor a suffix is overlooked: NATS matched a suffix, and dropped messages."""
    assert ID(message((name, b"42"))) is None
    assert header(name)(message((name, b"42"))) == b"42"


def test_no_headers_no_id() -> None:
    """A message without any has none."""
    assert ID(message()) is None
    assert EVENT(message()) is None


@pytest.mark.parametrize("kind", [Unreadable, NotUtf8])
@pytest.mark.parametrize("extractor", [ID, EVENT])
def test_headers_that_cannot_be_read_are_no_id(kind: type[Message], extractor: Callable[[Message], object]) -> None:
    """S04: a header whose name is not UTF-8 breaks neither the consumer nor the rule for messages without an id."""
    assert extractor(kind(topic="orders", value=b"{}")) is None


def test_an_id_may_be_a_megabyte() -> None:
    """S04: nothing is cut off, so that two long ids which differ at their ends stay two; the key is short anyway."""
    long = b"x" * 1_000_000
    assert ID(message(("message-id", long))) == long
    assert len(key_of(long)) == KEY_SIZE
    assert key_of(long + b"1") != key_of(long + b"2")


@pytest.mark.parametrize("name", ["", None, 7, b"message-id"])
def test_a_name_that_is_none_is_refused(name: Any) -> None:
    """When the extractor is made, not at the first message."""
    with pytest.raises(ValueError, match="name of a header"):
        header(name)


# -- CloudEvents ----------------------------------------------------------------------------------------------------------


def binary(source: str, name: str) -> Message:
    return message(("ce_source", source.encode("utf-8", "surrogatepass")), ("ce_id", name.encode("utf-8", "surrogatepass")))


def structured(source: object, name: object) -> Message:
    return message(STRUCTURED, value=json.dumps({"source": source, "id": name, "data": {"id": "inner"}}).encode())


def test_an_event_in_either_mode_has_the_same_id() -> None:
    """Binary or structured is how it travels, not which event it is."""
    assert EVENT(binary("/shop", "42")) == EVENT(structured("/shop", "42")) is not None


@MANY
@given(st.tuples(st.text(min_size=1), st.text(min_size=2)), st.tuples(st.text(min_size=1), st.text(min_size=1)))
def test_two_events_have_two_ids(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Source and id are not run together: ("ab", "c") is another event than ("a", "bc")."""
    shifted = (one[0] + one[1][:1], one[1][1:])
    for second in (other, shifted):
        assert (EVENT(binary(*one)) == EVENT(binary(*second))) == (one == second)
        assert (EVENT(structured(*one)) == EVENT(structured(*second))) == (one == second)


@pytest.mark.parametrize("whole", ["1:1:a", "11:a1:", "::::", "1a1a1a1a1a1a", "2:1:a"])
def test_lengths_in_a_source_confuse_nobody(whole: str) -> None:
    """However much a source or an id looks like the length in front of it: each border makes another event."""
    found = {EVENT(binary(whole[:border], whole[border:])) for border in range(1, len(whole))}
    assert len(found) == len(whole) - 1


@pytest.mark.parametrize(
    "incomplete",
    [
        message(("ce_id", b"42")),
        message(("ce_source", b"/shop")),
        message(("ce_source", b""), ("ce_id", b"42")),
        message(("CE_ID", b"42"), ("CE_SOURCE", b"/shop")),
        structured("/shop", None),
        structured("", "42"),
        structured(["/shop"], "42"),
        message(STRUCTURED, value=b"[1, 2]"),
        message(STRUCTURED, value=b"not JSON"),
        message(STRUCTURED, value=None),
        message(value=b'{"source": "/shop", "id": "42"}'),
        message(("content-type", b"application/json"), value=b'{"source": "/shop", "id": "42"}'),
        message(("content-type", None), value=b'{"source": "/shop", "id": "42"}'),
    ],
)
def test_half_an_event_has_no_id(incomplete: Message) -> None:
    """By the specification an id is unique only within its source; and JSON is no event unless it says so."""
    assert EVENT(incomplete) is None


# -- JSON -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("id", b'{"id": "42"}', b"42"),
        ("id", b'{"id": 42}', b"42"),
        ("id", b'{"id": -0}', b"0"),
        ("event.id", b'{"event": {"id": "a.b"}}', b"a.b"),
        ("events.1.id", b'{"events": [{"id": 1}, {"id": 2}]}', b"2"),
        ("0", b'["first"]', b"first"),
        ("0", b'{"0": "a name"}', b"a name"),
        ("id", '{"id": "\u00e4\\ud800"}'.encode(), "\u00e4\ud800".encode("utf-8", "surrogatepass")),
        ("id", b'{"id": 12345678901234567890123456789}', b"12345678901234567890123456789"),
    ],
)
def test_a_field_of_the_value_is_the_id(path: str, value: bytes, expected: bytes) -> None:
    """Text or a whole number, at any depth."""
    assert json_field(path)(message(value=value)) == expected


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("id", None),
        ("id", b""),
        ("id", b"\xff\xfe\xfd"),
        ("id", b"{"),
        ("id", b"[" * 100_000),
        ("id", b'{"id": ' + b"1" * 5_000 + b"}"),
        ("id", b"null"),
        ("id", b'"id"'),
        ("id", b'{"ID": "42"}'),
        ("id", b'{"id": ""}'),
        ("id", b'{"id": null}'),
        ("id", b'{"id": true}'),
        ("id", b'{"id": 1.0}'),
        ("id", b'{"id": NaN}'),
        ("id", b'{"id": {"id": "42"}}'),
        ("id", b'{"id": ["42"]}'),
        ("id.id", b'{"id": "42"}'),
        ("2", b'["a", "b"]'),
        ("-1", b'["a", "b"]'),
    ],
)
def test_what_is_no_text_and_no_whole_number_is_no_id(path: str, value: bytes | None) -> None:
    """S04: whatever somebody sends, there is an id or there is none; no exception."""
    assert json_field(path)(message(value=value)) is None


@MANY
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\id0123456789.eE+-truefalsn', max_size=40).map(str.encode))
def test_any_value_is_survived(value: bytes) -> None:
    """S04: extractors raise for no message."""
    for extractor in (json_field("id"), json_field("0.id"), EVENT):
        found = extractor(message(STRUCTURED, value=value))
        assert found is None or isinstance(found, bytes)


@pytest.mark.parametrize("path", ["", ".", "a.", ".a", "a..b", None, 7])
def test_a_path_with_an_empty_name_is_refused(path: Any) -> None:
    """When the extractor is made, not at the first message."""
    with pytest.raises(ValueError, match="a path is"):
        json_field(path)


# -- several, or none -----------------------------------------------------------------------------------------------------


def test_the_first_that_finds_an_id_is_asked_last() -> None:
    """In their order; what finds nothing, or something empty, is passed over."""
    asked = []

    def finds(found: Any) -> Callable[[Message], Any]:
        def extractor(_message: Message) -> Any:
            asked.append(found)
            return found

        return extractor

    def answers(*found: Any) -> Any:
        return first_of(*map(finds, found))(message())

    assert answers(None, "", b"", "id", "another") == "id"
    assert asked == [None, "", b"", "id"]
    assert answers(None, POSITION, "id") is POSITION
    assert answers(None, "") is None
    assert answers(b"\x00") == b"\x00"


def test_first_of_nothing_is_refused() -> None:
    """It would find no id, ever."""
    with pytest.raises(ValueError, match="first_of"):
        first_of()


def test_position_is_found_in_every_message() -> None:
    """It stands for the place; also where headers cannot be read."""
    for one in (message(), Unreadable(topic="orders"), message(("message-id", b"42"))):
        assert position()(one) is POSITION
    assert first_of(ID, position())(message()) is POSITION
    assert first_of(ID, position())(message(("message-id", b"42"))) == b"42"


# -- digests --------------------------------------------------------------------------------------------------------------


@MANY
@given(st.text(), st.text())
def test_a_key_has_sixteen_bytes_and_is_one_id(one: str, other: str) -> None:
    """Text and its UTF-8 are the same id; two ids have two keys."""
    assert key_of(one) == key_of(one.encode("utf-8", "surrogatepass"))
    assert len(key_of(one)) == KEY_SIZE
    assert (key_of(one) == key_of(other)) == (one == other)


def test_keys_stay_the_same_for_ever() -> None:
    """They are in databases: another digest would be another id for all that was handled."""
    assert key_of("42").hex() == "755345b7ef54b0d592c17e04737ab3d9"
    assert position_of(TOPIC_ID, 3, 41).hex() == "80443552b50ca2ee0000000000000029"
    assert fingerprint_of(message(key=b"k", value=b"v")).hex() == "4ab4ee5336ca59ee"


PLACES = st.tuples(
    st.sampled_from([bytes(16), TOPIC_ID, b"1" * 16]), st.integers(0, 2**31 - 1) | st.integers(0, 12), st.integers(0, 2**63 - 1)
)


@MANY
@given(PLACES, PLACES)
def test_two_places_have_two_positions(one: tuple[bytes, int, int], other: tuple[bytes, int, int]) -> None:
    """D06: topic id, partition and offset are all in it, and none runs into the other."""
    assert len(position_of(*one)) == KEY_SIZE
    assert (position_of(*one) == position_of(*other)) == (one == other)
    topic_id, partition, offset = one
    assert position_of(topic_id, partition, offset) != position_of(topic_id, partition + 1, offset)
    assert position_of(topic_id, 1, offset % 100) != position_of(topic_id, 11, offset % 100)


Content = tuple[bytes | None, bytes | None]
CONTENTS = st.tuples(st.none() | st.binary(max_size=6), st.none() | st.binary(max_size=6))


@MANY
@given(CONTENTS, CONTENTS)
def test_two_contents_have_two_fingerprints(one: Content, other: Content) -> None:
    """D08: key and value, each None, empty or filled, and the border between them."""

    def fingerprint(pair: Content) -> bytes:
        return fingerprint_of(message(key=pair[0], value=pair[1]))

    assert len(fingerprint(one)) == FINGERPRINT_SIZE
    assert (fingerprint(one) == fingerprint(other)) == (one == other)
    whole = (one[0] or b"") + (one[1] or b"")
    borders = {fingerprint((whole[:border], whole[border:])) for border in range(len(whole) + 1)}
    assert len(borders) == len(whole) + 1


def test_none_and_empty_have_different_fingerprints() -> None:
    """A tombstone is not an empty value."""
    pairs = [(key, value) for key in (None, b"", b"-1:", b"0:") for value in (None, b"", b"-1:", b"0:")]
    assert len({fingerprint_of(message(key=key, value=value)) for key, value in pairs}) == len(pairs)


def test_headers_are_not_in_the_fingerprint() -> None:
    """Tracing headers change with each send; the message is the same."""
    assert fingerprint_of(message(("trace", b"1"), value=b"v")) == fingerprint_of(message(("trace", b"2"), value=b"v"))


# -- which incarnation of a topic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("high", "low"), [(0, 0), (0, 1), (-1, 0)])
def test_brokers_without_topic_ids_are_refused(monkeypatch: pytest.MonkeyPatch, high: int, low: int) -> None:
    """D06: with an id of zeros, messages at one place of two topics would be one."""
    found: Future[Any] = Future()
    found.set_result(SimpleNamespace(topic_id=Uuid(high, low)))
    admin = SimpleNamespace(describe_topics=lambda *_, **__: {"t": found})
    ids = TopicIds(resolve(Guarantee.AT_LEAST_ONCE, {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"}))
    monkeypatch.setattr(ids, "raw", admin)
    if high or low:
        assert len(ids("t")) == 16
    else:
        with pytest.raises(KafkaGuaranteesError, match="as before Kafka"):
            ids("t")
