"""Dead letters: what they look like, and back with them to where they came from, each exactly once."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Message, Producer
from hypothesis import given
from hypothesis import strategies as st

from kafka_guarantees import (
    AtLeastOnce,
    Delivery,
    DeliveryError,
    DeliveryUnknown,
    ExactlyOnce,
    Record,
    StoreUnavailable,
    TransactionAborted,
)
from kafka_guarantees import _dead_letters as form
from kafka_guarantees._dead_letters import dead_letter, headers_of, marked_by, marker, origin_of
from kafka_guarantees._printable import printable
from kafka_guarantees._recognition.portions import Portions
from kafka_guarantees.cli import main
from kafka_guarantees.dead_letters import reading, replay
from kafka_guarantees.dead_letters.reading import Contents, TopicReader
from kafka_guarantees.dead_letters.replay import Outcome, Replay, producer, sort_out
from kafka_guarantees.dedup import SqliteInbox

from .conftest import read_all, values
from .test_dedup_runs import produce_with_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kafka_guarantees.testing.local_kafka import RunningKafka

    Header = tuple[str, bytes | None]

THEN = int(time.time() - 3600) * 1000  # milliseconds: brokers remove what is older than retention.ms
DEADLINE = 90.0  # seconds for a process


def message(topic: str = "orders", headers: Sequence[Header] | None = None, **parts: Any) -> Message:
    """A message as a consumer gives it."""
    place = {"partition": 3, "offset": 17, "timestamp": (1, THEN), "key": b"k", "value": b"v"}
    return Message(topic=topic, headers=None if headers is None else list(headers), **{**place, **parts})


def arrived(record: Record, offset: int = 0) -> Message:
    """What a reader of the dead letter topic gets of a record."""
    timestamp = (0, 0) if record.timestamp is None else (1, record.timestamp)
    headers: Any = record.headers
    key: Any = record.key
    value: Any = record.value
    return Message(topic=record.topic, partition=0, offset=offset, timestamp=timestamp, key=key, value=value, headers=headers)


def letter_of(given: Message, error: BaseException | None = None, **more: Any) -> Record:
    usual = {"group": "offers", "attempts": 3, "raw": None, "headers_lost": False, "now": THEN / 1000, "most": 10**7}
    return dead_letter("dlq", given, error or ValueError("bad"), **{**usual, **more})


# -- the format -----------------------------------------------------------------------------------------------------------

names = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
    st.sampled_from([form.TOPIC, form.OFFSET, form.ERROR, form.HEADERS, form.REPLAYED, "message-id"]),
)
own_headers = st.lists(st.tuples(names, st.one_of(st.none(), st.binary(max_size=30))), max_size=6)
payloads = st.one_of(st.none(), st.binary(max_size=30))


@given(
    headers=st.one_of(st.none(), own_headers),
    key=payloads,
    value=payloads,
    timestamp=st.one_of(st.none(), st.integers(0, 2**62)),
    group=st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=10)),
    text=st.text(max_size=3000),
    attempts=st.integers(0, 10**6),
    partition=st.integers(0, 2**31 - 1),
    offset=st.integers(0, 2**63 - 1),
)
def test_what_went_in_comes_out(  # noqa: PLR0917 - hypothesis gives them by name
    headers: list[Header] | None,
    key: bytes | None,
    value: bytes | None,
    timestamp: int | None,
    group: str | None,
    text: str,
    attempts: int,
    partition: int,
    offset: int,
) -> None:
    """Key, value, timestamp and headers are kept, whatever is in them, also headers that look like ours; the rest is said."""
    parts: dict[str, Any] = {"key": key, "value": value, "timestamp": (0, 0) if timestamp is None else (1, timestamp)}
    given_ = message(headers=headers, partition=partition, offset=offset, **parts)
    record = letter_of(given_, ValueError(text), group=group, attempts=attempts)
    assert (record.topic, record.partition) == ("dlq", None)
    assert (record.key, record.value, record.timestamp) == (key, value, timestamp or None)
    found = origin_of(arrived(record))
    assert found is not None
    assert (found.topic, found.partition, found.offset, found.timestamp) == ("orders", partition, offset, timestamp)
    assert (found.group, found.attempts, found.time, found.error_type) == (group, attempts, THEN, "ValueError")
    assert list(found.headers) == (headers or [])
    assert not found.lost
    assert len(found.error) <= 1000
    assert found.error.isprintable() or not found.error
    assert marked_by(arrived(record)) is None


@given(headers=own_headers, depth=st.integers(1, 4))
def test_sets_are_put_behind_each_other(headers: list[Header], depth: int) -> None:
    """A dead letter of a dead letter keeps the first set; the last one counts, and taking it away gives the one before."""
    given_ = message(headers=headers)
    for number in range(depth):
        given_ = arrived(letter_of(given_, attempts=number), offset=number)
    for number in reversed(range(depth)):
        found = origin_of(given_)
        assert found is not None
        assert found.attempts == number
        assert (found.topic, found.offset) == (("dlq", number - 1) if number else ("orders", 17))
        given_ = message(headers=found.headers)
    assert given_.headers() == headers


def test_a_header_that_was_put_behind_ours_is_the_message_s_own() -> None:
    """Tracing appends headers in the producer: they neither damage the set nor are they lost."""
    record = letter_of(message(headers=[("a", b"1")]))
    headers: Any = record.headers
    found = origin_of(message(headers=[*headers, ("traceparent", b"00")]))
    assert found is not None
    assert found.headers == (("a", b"1"), ("traceparent", b"00"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (form.TOPIC, b"a b"),
        (form.TOPIC, b"../x"),
        (form.TOPIC, b".."),
        (form.TOPIC, b"\xff"),
        (form.TOPIC, b""),
        (form.TOPIC, None),
        (form.PARTITION, b"-1"),
        (form.PARTITION, b"2147483648"),
        (form.PARTITION, b"1_0"),
        (form.PARTITION, b"\xd9\xa1"),
        (form.OFFSET, b"9" * 5000),
        (form.OFFSET, b"9223372036854775808"),
        (form.OFFSET, b"7\n"),
        (form.ATTEMPTS, b""),
        (form.TIME, b"now"),
        (form.TIMESTAMP, b"1.5"),
        (form.ERROR, b"\xff"),
        (form.ERROR, None),
    ],
)
def test_a_damaged_letter_is_none(name: str, value: bytes | None) -> None:
    """S04: what cannot be believed is not sent anywhere."""
    headers: Any = letter_of(message()).headers
    assert origin_of(message(headers=headers)) is not None
    assert origin_of(message(headers=[(n, value if n == name else v) for n, v in headers])) is None
    assert origin_of(message(headers=[(n, v) for n, v in headers if n != name])) is None or name == form.TIMESTAMP
    assert origin_of(message(headers=[*headers, (name, b"1")])) is None or name == form.TOPIC
    assert origin_of(message(headers=[])) is None


def test_without_headers_that_cannot_be_read() -> None:
    """S04: then they are not asked for, and the letter says that they are lost."""

    class Poison:
        def __init__(self) -> None:
            self.asked = 0
            self.given: object = None

        def headers(self) -> None:
            self.asked += 1
            raise SystemError("a second time would crash")

        def set_headers(self, headers: object) -> None:
            self.given = headers

        def __getattr__(self, name: str) -> Any:
            return getattr(message(), name)

    never, once = Poison(), Poison()
    lost: Any = letter_of(never, headers_lost=True)  # type: ignore[arg-type] # as much of a message as is needed
    same: Any = letter_of(once)  # type: ignore[arg-type]
    assert (never.asked, once.asked, once.given) == (0, 1, [])
    assert lost.headers == same.headers
    found = origin_of(arrived(lost))
    assert found is not None
    assert found.lost == ("headers",)
    assert headers_of(Poison()) is None  # type: ignore[arg-type]


@given(
    most=st.integers(500, 2000),
    key=st.one_of(st.none(), st.integers(0, 2500).map(bytes)),
    value=st.one_of(st.none(), st.integers(0, 2500).map(bytes)),
    headers=st.lists(st.tuples(names, st.one_of(st.none(), st.integers(0, 700).map(bytes))), max_size=6),
)
def test_a_letter_is_never_too_large_for_its_producer(
    most: int, key: bytes | None, value: bytes | None, headers: list[Header]
) -> None:
    """Whatever the message is, librdkafka takes it. What is left out is the largest part, is said, and nothing if all fits."""
    given_ = message(headers=headers, key=key, value=value)
    record = letter_of(given_, ValueError("x" * 40), most=most)
    if most >= 1000:  # it has no smaller limit
        producer = Producer({"bootstrap.servers": "127.0.0.1:1", "message.max.bytes": most, "log_level": 0})
        parts: Any = {"value": record.value, "key": record.key, "headers": record.headers}
        producer.produce("dlq", **parts)
        producer.purge()
    found = origin_of(arrived(record))
    assert found is not None
    sizes = {
        "key": len(key or b""),
        "value": len(value or b""),
        "headers": sum(len(n.encode()) + len(v or b"") for n, v in headers),
    }
    kept = {"key": record.key == key, "value": record.value == value, "headers": list(found.headers) == headers}
    assert {name for name, whole in kept.items() if not whole} <= set(found.lost)
    assert all(sizes[gone] + 60 >= sizes[left] for gone in found.lost for left in kept.keys() - set(found.lost))
    about: Any = letter_of(given_, ValueError("x" * 40), most=10**7).headers
    whole = 36 + len(key or b"") + len(value or b"") + sum(len(n.encode()) + len(v or b"") + 10 for n, v in about)
    assert bool(found.lost) == (whole > most)


def test_the_raw_bytes_are_kept_where_a_deserializer_replaced_them() -> None:
    """A letter has what came over the wire, not what became of it."""
    record = letter_of(message(key=b"object", value=b"object"), raw=(None, b"\x00avro"))
    assert (record.key, record.value) == (None, b"\x00avro")


def test_an_error_is_named_bounded_and_cannot_act_on_a_terminal() -> None:
    """S09: control characters are escaped, long texts are cut, and a broken __str__ is no reason to lose a letter."""

    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    found = origin_of(arrived(letter_of(message(), Broken())))
    assert found is not None
    assert found.error == "(RuntimeError in its __str__)"
    assert found.error_type.startswith(f"{__name__}.") or found.error_type.endswith("Broken")
    assert printable("a\x1b[31m\r\n\u202e\ud800", 100) == "a\\x1b[31m\\r\\n\\u202e\\ud800"
    assert printable("x" * 10, 10) == "x" * 10
    assert printable("x" * 11, 10) == "x" * 9 + "…"
    assert len(printable("\n" * 10**6, 1000)) == 1000


def test_a_marker_survives_what_cleans_a_topic() -> None:
    """Its key is its own and its value is not null, so that compaction keeps it, and keeps what it marks."""
    record = marker("dlq", 2, 17)
    assert record.partition == 2
    assert record.value is not None
    assert record.key != marker("dlq", 2, 18).key
    assert marked_by(arrived(record)) == 17
    assert origin_of(arrived(record)) is None


@given(headers=own_headers, key=st.one_of(payloads, st.just(b"dead-letter-replayed:5")))
def test_a_dead_letter_is_never_taken_for_a_marker(headers: list[Header], key: bytes | None) -> None:
    """S04: also where the message that became one was made to look like one."""
    for own in (headers, [(form.REPLAYED, b"5")]):
        assert marked_by(arrived(letter_of(message(headers=own, key=key)))) is None


# -- on a real broker -----------------------------------------------------------------------------------------------------


def put(bootstrap: str, records: Sequence[Record], **config: Any) -> None:
    """Write records as they are, all acknowledged."""
    client = Producer({"bootstrap.servers": bootstrap, "linger.ms": 2, "message.max.bytes": 10_000_000, **config})
    failures: list[object] = []
    for record in records:
        more: dict[str, Any] = {} if record.partition is None else {"partition": record.partition}
        client.produce(
            record.topic,
            record.value,
            record.key,
            headers=record.headers,  # type: ignore[arg-type]
            timestamp=record.timestamp or 0,
            on_delivery=lambda error, _message: failures.append(error) if error is not None else None,
            **more,
        )
        client.poll(0)
    assert client.flush(60) == 0
    assert not failures, failures


def parts(found: Message) -> tuple[object, ...]:
    return found.partition(), found.key(), found.value(), tuple(headers_of(found) or ()), found.timestamp()[1]


class Command:
    """``kafka-guarantees dead-letters`` in this process."""

    def __init__(self, bootstrap: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.bootstrap = bootstrap
        self._capsys = capsys
        self.err = ""

    def __call__(self, action: str, topic: str, *more: str, status: int = 0) -> list[str]:
        """The lines of stdout."""
        got = main(["dead-letters", action, topic, *more, "-b", self.bootstrap])
        out, self.err = self._capsys.readouterr()
        assert got == status, self.err
        return out.splitlines()


@pytest.fixture
def command(kafka: RunningKafka, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(kafka.bootstrap, capsys)


def simple(origin: str, dlq: str, count: int, partitions: int = 1, **more: Any) -> list[Record]:
    """Dead letters that come from consecutive offsets, in both topics."""
    records = []
    for number in range(count):
        place = {"partition": number % partitions, "offset": number // partitions, "value": b"%d" % number}
        own: list[Header] = [("message-id", b"id-%d" % number)]
        record = letter_of(message(origin, own, **place), **more)
        records.append(
            Record(
                dlq,
                record.value,
                record.key,
                headers=record.headers,
                partition=number % partitions,
                timestamp=record.timestamp,
            )
        )
    return records


def ids(bootstrap: str, topic: str) -> list[str]:
    """The message ids in a topic, sorted by number."""
    found = [dict(m.headers() or ())["message-id"] for m in read_all(bootstrap, topic)]
    return sorted((value.decode() for value in found if isinstance(value, bytes)), key=lambda text: int(text[3:]))


def all_ids(count: int) -> list[str]:
    return [f"id-{number}" for number in range(count)]


WEIRD: list[tuple[bytes | None, bytes | None, list[tuple[Any, bytes | None]]]] = [
    (b"k", None, [("message-id", b"tombstone")]),
    (None, b"", [("message-id", b"empty")]),
    (b"", b"\x00\xff", []),
    (b"\xff" * 1000, b"x", [("a", None), ("a", b""), ("", b"1"), ("é", b"\xff\xfe")]),
    (b"big", b"v" * 1_000_000, [("message-id", b"1 MB")]),
    (b"h", b"x", [("huge", b"h" * 300_000)]),
    (b"fake", b"x", [(form.TOPIC, b"elsewhere"), (form.PARTITION, b"0"), (form.REPLAYED, b"0")]),
    (b"dead-letter-replayed:0", b"", [(form.REPLAYED, b"0")]),
    (b"esc", b"\x1b[31mred", [("\x1b[2J", b"\x1b[2J")]),
    (b"many", b"x", [(f"h{number}", b"%d" % number) for number in range(200)]),
]


@pytest.mark.broker
def test_two_hundred_weird_messages_come_back_as_they_were(
    command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """Tombstones, empty values, 1 MB, huge or no headers, headers that look like ours: the same record in the same place."""
    origin, dlq = kafka_topic(partitions=3), kafka_topic(partitions=2)
    put(
        kafka.bootstrap,
        [
            Record(origin, value, key, headers=headers, partition=number % 3, timestamp=THEN + number)
            for number in range(200)
            for key, value, headers in [WEIRD[number % len(WEIRD) if number < 40 else number % 4]]
        ],
    )
    before = read_all(kafka.bootstrap, origin)
    assert len(before) == 200
    letters = [letter_of(given_) for given_ in before]
    put(
        kafka.bootstrap,
        [Record(dlq, r.value, r.key, headers=r.headers, partition=n % 2, timestamp=r.timestamp) for n, r in enumerate(letters)],
    )
    listed = command("list", dlq)
    assert len(listed) == 200
    assert all(line.isprintable() for line in listed)
    assert not any("replayed" in line for line in listed)
    assert len(command("replay", dlq, "--all")) == 200
    assert "sent: 200" in command.err
    after = read_all(kafka.bootstrap, origin)
    assert len(after) == 400
    assert sorted(map(parts, after), key=repr) == sorted([*map(parts, before), *map(parts, before)], key=repr)
    assert sum("replayed" in line for line in command("list", dlq)) == 200
    assert command("replay", dlq, "--all") == []
    assert "replayed before, and left out: 200" in command.err
    assert len(read_all(kafka.bootstrap, origin)) == 400


@pytest.mark.broker
def test_a_service_s_own_file_is_good_enough(
    kafka: RunningKafka, kafka_topic: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has what reaches the cluster; how that service produces and consumes is not how a replay does."""
    origin, dlq, file = kafka_topic(), kafka_topic(), tmp_path / "service.properties"
    put(kafka.bootstrap, simple(origin, dlq, 3))
    own = "acks=1\ndelivery.timeout.ms=120000\nlog_level=3\nsocket.timeout.ms=200000\ngroup.id=orders\nlinger.ms=1\n"
    file.write_text(f"bootstrap.servers={kafka.bootstrap}\n{own}")
    assert main(["dead-letters", "replay", dlq, "--all", "--origin", origin, "--config", str(file)]) == 0
    assert ids(kafka.bootstrap, origin) == all_ids(3)
    assert "Coordinator" not in capsys.readouterr().err


@pytest.mark.broker
@pytest.mark.parametrize("name", ["compression.type", "compression.codec"])
def test_what_is_small_enough_only_compressed_can_be_sent(
    name: str, command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """How its service compresses is taken over: else the brokers would refuse for ever what they took from that."""
    origin, dlq = kafka_topic(), kafka_topic()
    record = letter_of(message(origin, partition=0, value=b"v" * 2_000_000))
    put(kafka.bootstrap, [Record(dlq, record.value, record.key, headers=record.headers)], **{"compression.type": "zstd"})
    assert command("replay", dlq, "--all", status=1) == []
    assert "MSG_SIZE_TOO_LARGE" in command.err
    assert command("replay", dlq, "--all", "--set", f"{name}=zstd") == [f"0:0 -> {origin}/0"]
    assert [m.value() for m in read_all(kafka.bootstrap, origin)] == [b"v" * 2_000_000]


@pytest.mark.broker
def test_some_are_chosen(command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """By place, origin, type of error and time; a dry run sends nothing; and ``list`` says the same of them."""
    one, other, dlq = kafka_topic(), kafka_topic(), kafka_topic()
    put(kafka.bootstrap, simple(one, dlq, 3))
    put(kafka.bootstrap, simple(other, dlq, 2, error=KeyError("k"), now=THEN / 1000 + 60))
    put(kafka.bootstrap, [Record(dlq, b"of somebody else")])
    assert [line.split()[0] for line in command("list", dlq)] == ["0:0", "0:1", "0:2", "0:3", "0:4"]
    assert "not a dead letter, or with damaged headers: 1" in command.err
    assert [line.split()[0] for line in command("list", dlq, "--limit", "2")] == ["0:3", "0:4"]
    assert [line.split()[0] for line in command("list", dlq, "--origin", one)] == ["0:0", "0:1", "0:2"]
    assert [line.split()[0] for line in command("list", dlq, "--error", "KeyError")] == ["0:3", "0:4"]
    later = datetime.fromtimestamp(THEN / 1000 + 1, timezone.utc)
    elsewhere = later.astimezone(timezone(timedelta(hours=1)))
    for since in (f"{later:%Y-%m-%dT%H:%M:%SZ}", f"{later:%Y-%m-%d %H:%M:%S}", f"{elsewhere:%Y-%m-%dT%H:%M:%S+01:00}"):
        assert [line.split()[0] for line in command("list", dlq, "--since", since)] == ["0:3", "0:4"]
    assert json.loads(command("list", dlq, "--format", "json")[0]) == {
        "partition": 0,
        "offset": 0,
        "origin": {"topic": one, "partition": 0, "offset": 0, "timestamp": THEN},
        "group": "offers",
        "error_type": "ValueError",
        "error": "bad",
        "attempts": 3,
        "time": THEN,
        "lost": [],
        "replayed": False,
    }
    assert command("replay", dlq, "0:1", "0:4", "--dry-run") == [f"0:1 -> {one}/0", f"0:4 -> {other}/0"]
    assert read_all(kafka.bootstrap, one) == []
    assert command("replay", dlq, "0:1", "0:4", "0:1") == [f"0:1 -> {one}/0", f"0:4 -> {other}/0"]
    assert (ids(kafka.bootstrap, one), ids(kafka.bootstrap, other)) == (["id-1"], ["id-1"])
    assert command("replay", dlq, "--all", "--origin", one) == [f"0:0 -> {one}/0", f"0:2 -> {one}/0"]
    assert command("replay", dlq, "0:5", "0:6", "0:99", status=1) == []
    assert "there is no dead letter" in command.err
    assert (len(ids(kafka.bootstrap, one)), ids(kafka.bootstrap, other)) == (3, ["id-1"])


@pytest.mark.broker
def test_they_are_counted(command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """By topic of origin and type of error, the most first, as far as the filters let them through; none of them is printed."""
    one, other, dlq = kafka_topic(), kafka_topic(), kafka_topic()
    put(kafka.bootstrap, simple(one, dlq, 2))
    put(kafka.bootstrap, simple(other, dlq, 3, error=KeyError("k"), now=THEN / 1000 + 60))
    put(kafka.bootstrap, simple(one, dlq, 3, error=type("E\x1b[31m", (Exception,), {})("bad"), now=THEN / 1000 + 120)[2:])
    command("replay", dlq, "0:0")
    keys, values, strange = command("list", dlq, "--count")
    then, minute = (datetime.fromtimestamp(THEN / 1000 + s, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S") for s in (0, 60))
    assert keys.split() == ["3", "replayed", "0", f"{minute}.000Z", "to", f"{minute}.000Z", other, "KeyError"]
    assert values.split() == ["2", "replayed", "1", f"{then}.000Z", "to", f"{then}.000Z", one, "ValueError"]
    assert strange.isprintable()
    assert "dead letters: 6, replayed: 1" in command.err
    assert command("list", dlq, "--count", "--origin", one) == [values, strange]
    assert [json.loads(line) for line in command("list", dlq, "--count", "--error", "ValueError", "--format", "json")] == [
        {"origin": {"topic": one}, "error_type": "ValueError", "count": 2, "replayed": 1, "first": THEN, "last": THEN}
    ]
    assert command("list", kafka_topic(), "--count") == []
    assert "dead letters: 0, replayed: 0" in command.err


@pytest.mark.broker
def test_one_is_shown(command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """All that is known of it; text only where it is safe on a terminal; a long value in part unless all is asked for."""
    dlq = kafka_topic()
    weird = [letter_of(message(headers=h, key=k, value=v), ValueError("\x1b[2J")) for k, v, h in [WEIRD[8], WEIRD[4], WEIRD[0]]]
    put(kafka.bootstrap, [Record(dlq, r.value, r.key, headers=r.headers) for r in weird])
    put(kafka.bootstrap, [Record(dlq, b"other")])
    text = "\n".join(command("show", dlq, "0:0"))
    assert text.replace("\n", "").isprintable()
    for part in (
        "orders/3:17",
        f"{datetime.fromtimestamp(THEN / 1000, timezone.utc):%Y-%m-%dT%H:%M:%S.000Z}",
        "offers",
        "attempts    3",
        r"ValueError: \x1b[2J",
        "base64 G1szMW1yZWQ=",
    ):
        assert part in text
    forged_lines = b"k\nheader      approved-by: alice\nvalue, 12 bytes\namount=10"
    twisted = letter_of(message(headers=[("a", forged_lines)], key=forged_lines))
    put(kafka.bootstrap, [Record(other := kafka_topic(), twisted.value, twisted.key, headers=twisted.headers)])
    lines = command("show", other, "0:0")
    assert [line.split()[0] for line in lines[-4:]] == ["key", "header", "value,", "v"]
    assert len("".join(command("show", dlq, "0:1"))) < 6000
    assert "v" * 1_000_000 in command("show", dlq, "0:1", "--full")
    assert command("show", dlq, "0:1", "--raw") == ["v" * 1_000_000]
    assert command("show", dlq, "0:2")[-1] == "null"
    assert command("show", dlq, "0:3", status=1)[-1] == "other"
    ours: Any = weird[1].headers
    forged = [(name, b"\x1b[2J" if name in (form.ERROR, form.GROUP, form.ERROR_TYPE) else value) for name, value in ours]
    put(kafka.bootstrap, [Record(dlq, b"x", headers=forged)])
    for lines in (command("list", dlq), command("list", dlq, "--format", "json"), command("show", dlq, "0:4")):
        assert all(line.isprintable() for line in lines)
    for nothing in ("0:5", "1:0"):
        assert command("show", dlq, nothing, status=1) == []
        assert dlq in command.err


@pytest.mark.broker
def test_what_a_letter_lacks_is_said(command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """And where it is: not taken for an empty value, in no form, and not sent back."""
    dlq = kafka_topic()
    record = letter_of(message(value=b"v" * 2000), most=1500)
    put(kafka.bootstrap, [Record(dlq, record.value, record.key, headers=record.headers)])
    assert "without value" in command("list", dlq)[0]
    assert "left out    value, which found no room or could not be read" in command("show", dlq, "0:0")
    assert command("show", dlq, "0:0", "--raw", status=1) == []
    assert "it is at topic 'orders' 3:17" in command.err
    assert command("replay", dlq, "--all", status=1) == []
    assert "topic 'orders' partition 3 offset 17" in command.err


@pytest.mark.broker
def test_lost_headers_are_not_sent_silently(command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """S04: a message id may have been among them. It is refused, unless that is wanted."""
    origin, dlq = kafka_topic(), kafka_topic()
    produce_with_header(kafka.bootstrap, origin, b"bad\xff\xfe")
    (poison,) = read_all(kafka.bootstrap, origin)
    record = letter_of(poison)
    put(kafka.bootstrap, [Record(dlq, record.value, record.key, headers=record.headers), *simple(origin, dlq, 1)])
    produce_with_header(kafka.bootstrap, dlq, b"bad\xff\xfe")
    assert command("replay", dlq, "--all", status=1) == [f"0:1 -> {origin}/0"]
    assert "--without-headers" in command.err
    assert command("replay", dlq, "--all", "--without-headers") == [f"0:0 -> {origin}/0"]
    assert [m.value() for m in read_all(kafka.bootstrap, origin)] == [b"poison", b"0", b"poison"]


@pytest.mark.broker
def test_what_the_brokers_would_remove_is_not_sent_silently(
    command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """They go by the timestamp of the record, which is its message's: what is too old for its topic is gone in minutes."""
    origin, dlq = kafka_topic(), kafka_topic()
    now = int(time.time() * 1000)
    week = 7 * 24 * 3_600_000
    ages = (0, week // 2, week + 1)
    letters = [letter_of(message(origin, partition=0, offset=n, timestamp=(1, now - age))) for n, age in enumerate(ages)]
    put(kafka.bootstrap, [Record(dlq, r.value, r.key, headers=r.headers) for r in letters])
    assert command("replay", dlq, "--all", "--dry-run", status=1) == [f"0:0 -> {origin}/0", f"0:1 -> {origin}/0"]
    assert command("replay", dlq, "--all", status=1) == [f"0:0 -> {origin}/0", f"0:1 -> {origin}/0"]
    assert "retention.ms" in command.err
    assert "--present-time" in command.err
    assert command("replay", dlq, "--all", "--present-time") == [f"0:2 -> {origin}/0"]
    first, second, third = (m.timestamp()[1] for m in read_all(kafka.bootstrap, origin))
    assert (first, second) == (now, now - week // 2)
    assert third >= now


class Watched(ExactlyOnce):
    """Knows whether it is in a transaction."""

    inside = False

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        with super().transaction() as tx:
            self.inside = True
            yield tx
            self.inside = False


@pytest.mark.broker
def test_how_long_a_topic_keeps_records_is_not_asked_while_a_transaction_waits(
    kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer may take twice as long as a transaction may."""
    origin, dlq = kafka_topic(), kafka_topic()
    put(kafka.bootstrap, simple(origin, dlq, 3))
    config = {"bootstrap.servers": kafka.bootstrap, "transactional.id": replay.transactional_id(dlq)}
    with TopicReader(config, dlq) as reader, Watched(config) as client:
        asked: list[bool] = []

        def kept_from(_topic: str) -> int:
            asked.append(client.inside)
            return 0

        monkeypatch.setattr(reader, "kept_from", kept_from)
        contents, outcome = Contents.of(reader), Outcome()
        good = sort_out(reader, contents, list(contents.entries), outcome, present_time=True)
        Replay(client, reader, contents, outcome, lambda _entry: None).run(good)
    assert len(outcome.sent) == 3
    assert asked
    assert not any(asked)


@pytest.mark.broker
def test_a_message_of_1970_does_not_become_one_of_today(
    command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """Other clients write the timestamp 0, and librdkafka takes that for the time of now: 1 is as near as it comes."""
    origin, dlq = kafka_topic(config={"retention.ms": -1}), kafka_topic()
    letters = [letter_of(message(origin, partition=0, timestamp=when)) for when in [(1, 0), (1, 1), (0, 0)]]
    put(kafka.bootstrap, [Record(dlq, r.value, r.key, headers=r.headers) for r in letters])
    assert "timestamp 1970-01-01T00:00:00.000Z" in "".join(command("show", dlq, "0:0"))
    assert "timestamp none" in "".join(command("show", dlq, "0:2"))
    began = time.time() * 1000
    assert len(command("replay", dlq, "--all")) == 3
    zero, one, none = (m.timestamp()[1] for m in read_all(kafka.bootstrap, origin))
    assert (zero, one) == (1, 1)
    assert none >= int(began)


@pytest.mark.parametrize(
    ("settings", "oldest"),
    [
        ({"retention.ms": "86400000"}, 1_000_000_000_000 - 86_400_000 + 3_600_000),
        ({"retention.ms": "60000"}, 1_000_000_000_000 - 30_000),
        ({"retention.ms": "0"}, 1_000_000_000_000),
        ({"retention.ms": "-1"}, 0),
        ({"cleanup.policy": "compact", "retention.ms": "1"}, 0),
        ({"cleanup.policy": "compact,delete", "retention.ms": "60000"}, 1_000_000_000_000 - 30_000),
        ({"message.timestamp.type": "LogAppendTime", "retention.ms": "1"}, 0),
        ({"retention.ms": "-1", "message.timestamp.before.max.ms": "60000"}, 1_000_000_000_000 - 30_000),
        ({"retention.ms": "86400000", "message.timestamp.before.max.ms": "60000"}, 1_000_000_000_000 - 30_000),
        ({"retention.ms": "60000", "message.timestamp.before.max.ms": str(2**63 - 1)}, 1_000_000_000_000 - 30_000),
        ({"retention.ms": "-1", "message.timestamp.difference.max.ms": "60000"}, 1_000_000_000_000 - 30_000),  # Kafka 3.5
        (
            {
                "retention.ms": "-1",
                "message.timestamp.difference.max.ms": "60000",
                "message.timestamp.before.max.ms": str(2**63 - 1),
            },
            1_000_000_000_000 - 30_000,
        ),
        (
            {
                "retention.ms": "-1",
                "message.timestamp.difference.max.ms": "1",
                "message.timestamp.before.max.ms": "60000",
            },
            1_000_000_000_000 - 30_000,
        ),
    ],
)
def test_how_old_a_record_may_be_for_its_topic(settings: dict[str, str], oldest: int) -> None:
    """An hour is left to handle it, where the topic keeps anything that long; a topic whose settings nobody tells takes all."""
    defaults = {"cleanup.policy": "delete", "message.timestamp.type": "CreateTime"}
    assert reading.kept_from({**defaults, **settings}, 1_000_000_000_000) == oldest
    assert reading.kept_from({}, 1_000_000_000_000) == 0


@pytest.mark.broker
def test_what_cannot_be_sent_stays_and_the_others_go(
    command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """No topic, no partition, one of Kafka's own topics, or refused by the brokers: said for each, and nothing else is lost."""
    origin, dlq, gone = kafka_topic(config={"max.message.bytes": 3000}), kafka_topic(), fresh("gone")
    bad = [
        letter_of(message(gone)),
        letter_of(message(origin, partition=7)),
        letter_of(message("__consumer_offsets", partition=0)),
        letter_of(message(dlq, partition=0)),
        letter_of(message(origin, partition=0, value=random.randbytes(5000))),
    ]
    put(kafka.bootstrap, [Record(dlq, r.value, r.key, headers=r.headers) for r in bad[:2]])
    put(kafka.bootstrap, simple(origin, dlq, 5))
    put(kafka.bootstrap, [Record(dlq, r.value, r.key, headers=r.headers) for r in bad[2:]])
    put(kafka.bootstrap, simple(origin, dlq, 10)[5:])
    assert len(command("replay", dlq, "--all", status=1)) == 10
    for reason in (
        rf"\(0:0\): topic '{gone}' does not exist",
        r"\(0:1\).*has no partition 7",
        r"\(0:7\).*Kafka's own",
        r"\(0:8\).*or the dead letter topic itself",
        r"\(0:9\).*MSG_SIZE_TOO_LARGE",
    ):
        assert re.search(reason, command.err)
    assert ids(kafka.bootstrap, origin) == all_ids(10)
    assert command("replay", dlq, "--all", status=1) == []
    assert ids(kafka.bootstrap, origin) == all_ids(10)


@pytest.mark.broker
@pytest.mark.parametrize("policy", ["compact", "delete"])
def test_a_marker_can_be_written_to_any_topic(
    policy: str, command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """A compacted topic refuses records without a key."""
    origin, dlq = kafka_topic(), kafka_topic(config={"cleanup.policy": policy})
    put(kafka.bootstrap, simple(origin, dlq, 2))
    assert len(command("replay", dlq, "--all")) == 2
    assert command("replay", dlq, "--all") == []
    assert ids(kafka.bootstrap, origin) == all_ids(2)


@pytest.mark.broker
def test_what_an_open_transaction_hides_is_not_taken_for_absent(
    command: Command,
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    fresh: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A marker behind the open transaction of a service is there, though no reader of committed records sees it."""
    origin, dlq = kafka_topic(), kafka_topic()
    put(kafka.bootstrap, simple(origin, dlq, 2))
    service = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": fresh("service")})
    service.init_transactions(30)
    service.begin_transaction()
    service.produce(dlq, b"of a service", partition=0)
    assert service.flush(30) == 0
    with producer({"bootstrap.servers": kafka.bootstrap}, dlq) as replaying, replaying.transaction() as tx:
        record = marker(dlq, 0, 0)
        tx.produce(dlq, record.value, record.key, headers=record.headers, partition=0)
    monkeypatch.setattr(reading, "PATIENCE", 0.3)
    assert command("replay", dlq, "--all", status=1) == []
    assert "an open transaction" in command.err
    assert len(command("list", dlq, status=1)) == 2
    assert "from 2 on" in command.err
    service.abort_transaction(30)
    assert command("replay", dlq, "--all") == [f"0:1 -> {origin}/0"]
    assert ids(kafka.bootstrap, origin) == ["id-1"]


class Away(SqliteInbox):
    """A database that is away a few times when what was set aside is to be committed."""

    times = 3

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Any]) -> Iterator[Any]:
        with super().transaction(scope, entries) as transaction:
            yield transaction
            if entries[0].offset == 1 and self.times:
                self.times -= 1
                raise StoreUnavailable("for the test")


@pytest.mark.broker
def test_a_database_that_is_away_makes_no_further_letters(
    kafka: RunningKafka, kafka_topic: Callable[..., str], tmp_path: Path, fresh: Callable[[str], str]
) -> None:
    """Its transaction is tried until it answers, and the letter that is acknowledged is not sent with each."""
    origin, dlq = kafka_topic(), kafka_topic()
    put(kafka.bootstrap, [Record(origin, b"%d" % number) for number in range(3)])

    def handler(given_: Message, _connection: object) -> None:
        if given_.offset() == 1:
            raise ValueError("bad")

    config = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("group")}
    with (
        Away(tmp_path / "inbox.db") as inbox,
        AtLeastOnce(config, inbox=inbox, message_id=None, dead_letter=dlq, start="earliest") as client,
    ):
        client.run([origin], handler, until_idle=1)
        assert not inbox.times
    assert [m.value() for m in read_all(kafka.bootstrap, dlq)] == [b"1"]


def test_a_letter_that_failed_is_sent_again() -> None:
    """P01: its failure may be hidden by that of the database, and nothing is committed past it."""
    producer: Any = SimpleNamespace(unacknowledged=set())
    made: list[Delivery] = []

    def send(_letter: Record) -> Delivery:
        made.append(Delivery("dlq", producer))
        return made[-1]

    def tried_four_times(_batch: object, messages: Sequence[Message], _entries: object, handle: Any) -> tuple[int, None]:
        for failure in (DeliveryError("for the test"), DeliveryUnknown("for the test"), None, None):
            handle(messages, None)
            if failure is not None:
                made[-1]._fail(failure)
        return 1, None

    portions: Any = Portions.__new__(Portions)
    portions.__dict__ |= {"_failures": SimpleNamespace(letter=lambda *_: None), "_send": send, "transact": tried_four_times}
    entry: Any = SimpleNamespace(_replace=lambda **_: None)
    nothing: Any = None
    assert portions.set_aside(nothing, message(), entry, nothing) == 1
    assert len(made) == 3


def placed(dlq: str, partition: int, given_: Message, **more: Any) -> Record:
    """The dead letter of a message, in this partition."""
    record = letter_of(given_, **more)
    return Record(dlq, record.value, record.key, headers=record.headers, partition=partition)


@pytest.mark.broker
def test_a_message_that_has_several_letters_is_sent_once(
    command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """L05: a service died, or lost its database, between letter and offset, and has written another: the same message.

    Another group's is not, nor one of another offset, as a message has that was replayed and failed again; nor one of another
    timestamp: its topic was made anew.
    """
    origin, dlq = kafka_topic(), kafka_topic(partitions=2)
    one = message(origin, partition=0, offset=0, value=b"one")
    others = [
        placed(dlq, 0, message(origin, partition=0, offset=1, value=b"another offset")),
        placed(dlq, 0, one, group="another group"),
        placed(dlq, 0, message(origin, partition=0, offset=0, timestamp=(1, THEN + 1), value=b"another topic")),
    ]
    again = placed(dlq, 1, one, error=KeyError("k"), attempts=1, now=THEN / 1000 + 60)
    put(kafka.bootstrap, [placed(dlq, 0, one), *others, again, placed(dlq, 0, one)])
    assert len(command("list", dlq)) == 6
    for dry in (["--dry-run"], []):
        assert [line.split()[0] for line in command("replay", dlq, "--all", *dry)] == ["0:0", "0:1", "0:2", "0:3"]
        assert "the same messages again, and left out: 2" in command.err
    assert values(read_all(kafka.bootstrap, origin)) == [b"another offset", b"another topic", b"one", b"one"]
    for place in ("0:0", "0:4", "1:0"):
        assert command("show", dlq, place)[0] == f"dead letter {place}, replayed"
    put(kafka.bootstrap, [again])  # of a service that was down for longer; or of a topic that was made anew and filled again
    assert command("replay", dlq, "--all", status=1) == []
    assert "replayed before, and left out: 6" in command.err
    assert "name its place" in command.err
    assert len(read_all(kafka.bootstrap, origin)) == 4
    (late,) = [line.split()[0] for line in command("list", dlq) if "replayed" not in line]
    assert "dead letters: 7, replayed: 6" in command.err
    assert [line.split()[0] for line in command("replay", dlq, late)] == [late]
    assert len(read_all(kafka.bootstrap, origin)) == 5


@pytest.mark.broker
def test_any_letter_of_a_message_can_be_chosen(command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """By place or filter; of those that are chosen the first that can be sent is; and the others count as replayed, too."""
    origin, dlq = kafka_topic(), kafka_topic(partitions=2)
    one, two, three = (message(origin, partition=0, offset=n, value=b"v" * 2000) for n in range(3))
    first = [placed(dlq, 0, given_) for given_ in (one, two)]
    second = [placed(dlq, 1, given_, error=KeyError("k"), now=THEN / 1000 + 60) for given_ in (one, two)]
    put(kafka.bootstrap, [*first, *second, placed(dlq, 0, three, most=1500), placed(dlq, 0, three)])
    assert command("replay", dlq, "1:0", "0:0") == [f"1:0 -> {origin}/0"]
    assert "the same messages again, and left out: 1" in command.err
    assert command("replay", dlq, "0:0", "1:0") == []
    assert "replayed before, and left out: 2" in command.err
    assert command("replay", dlq, "--all", "--error", "KeyError") == [f"1:1 -> {origin}/0"]
    assert command("replay", dlq, "--all") == [f"0:3 -> {origin}/0"]  # the one before it has lost its value
    assert command("replay", dlq, "--all") == []
    assert "replayed before, and left out: 6" in command.err
    assert [len(m.value() or b"") for m in read_all(kafka.bootstrap, origin)] == [2000] * 3


@pytest.mark.broker
def test_a_letter_whose_copy_is_hidden_is_left(
    command: Command,
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    fresh: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Markers behind the open transaction of a service may say that its message was sent. Others of its partition go."""
    origin, dlq = kafka_topic(), kafka_topic(partitions=2)
    one, two = (message(origin, partition=0, offset=n, value=b"%d" % n) for n in range(2))
    put(kafka.bootstrap, [placed(dlq, 0, one), placed(dlq, 0, two), placed(dlq, 1, one)])
    service = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": fresh("service")})
    service.init_transactions(30)
    service.begin_transaction()
    service.produce(dlq, b"of a service", partition=1)
    assert service.flush(30) == 0
    monkeypatch.setattr(reading, "PATIENCE", 0.3)
    assert command("replay", dlq, "--all", status=1) == [f"0:1 -> {origin}/0"]
    assert re.search(r"not sent: 1 \(0:0\): partition 1: an open transaction", command.err)
    service.abort_transaction(30)
    assert command("replay", dlq, "--all") == [f"0:0 -> {origin}/0"]
    assert values(read_all(kafka.bootstrap, origin)) == [b"0", b"1"]


class Unlucky(ExactlyOnce):
    """Commits, and does not hear of it; or aborts, and says so."""

    trouble: list[Exception]

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        with ExitStack() as stack:
            tx = stack.enter_context(super().transaction())
            yield tx
            if self.trouble and not isinstance(self.trouble[0], DeliveryUnknown):
                raise self.trouble.pop(0)
        if self.trouble:
            raise self.trouble.pop(0)


@pytest.mark.broker
@pytest.mark.parametrize("error", [DeliveryUnknown("in doubt"), TransactionAborted("aborted")], ids=["in doubt", "aborted"])
def test_whatever_ended_a_transaction_it_is_done_once(
    error: Exception, kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """X09: the markers tell what a transaction in doubt has done; an aborted one is done again; three in a row are enough."""
    origin, dlq = kafka_topic(), kafka_topic()
    put(kafka.bootstrap, simple(origin, dlq, 30))
    monkeypatch.setattr(replay, "PORTION", 10)
    config = {"bootstrap.servers": kafka.bootstrap, "transactional.id": replay.transactional_id(dlq)}
    with TopicReader(config, dlq) as reader, Unlucky(config) as client:
        client.trouble = []
        contents, outcome = Contents.of(reader), Outcome()
        good = sort_out(reader, contents, list(contents.entries), outcome)
        client.trouble = [error, error]
        Replay(client, reader, contents, outcome, lambda _entry: None).run(good)
        assert len(outcome.sent) == 30
        assert not outcome.before
        assert not outcome.left
        put(kafka.bootstrap, simple(origin, dlq, 31)[30:])
        contents, outcome = Contents.of(reader), Outcome()
        good = sort_out(reader, contents, list(contents.entries), outcome)
        client.trouble = [TransactionAborted("aborted")] * 3
        with pytest.raises(TransactionAborted):
            Replay(client, reader, contents, outcome, lambda _entry: None).run(good)
        assert len(outcome.before) == 30
    assert ids(kafka.bootstrap, origin) == all_ids(30)


class Slow(ExactlyOnce):
    """Has brokers that take only so many records while a transaction lasts."""

    most: int
    begun = 0

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        self.begun += 1
        produced: list[str] = []
        with super().transaction() as tx:

            def produce(topic: str, *record: Any, **more: Any) -> None:
                produced.append(topic)
                tx.produce(topic, *record, **more)

            yield SimpleNamespace(produce=produce)
            if len(produced) > self.most:
                raise TransactionAborted("it took longer than transaction.timeout.ms")


@pytest.mark.broker
def test_over_a_slow_link_it_comes_to_its_end_with_smaller_transactions(
    kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """What a transaction has no time for is done in several, also what comes after it, and each once."""
    origin, dlq = kafka_topic(partitions=2), kafka_topic(partitions=2)
    put(kafka.bootstrap, simple(origin, dlq, 200, partitions=2))
    config = {"bootstrap.servers": kafka.bootstrap, "transactional.id": replay.transactional_id(dlq)}
    with TopicReader(config, dlq) as reader, Slow(config) as client:
        client.most = 30  # with their markers
        contents, outcome = Contents.of(reader), Outcome()
        good = sort_out(reader, contents, list(contents.entries), outcome)
        Replay(client, reader, contents, outcome, lambda _entry: None).run(good)
    assert (len(outcome.sent), outcome.before, outcome.left) == (200, [], [])
    assert ids(kafka.bootstrap, origin) == all_ids(200)
    assert client.begun == 2 * (1 + 2 + 4 + 8), "each portion was halved until its parts fit"


class Overtaken(ExactlyOnce):
    """Lets another replay run from beginning to end just before its own transaction begins."""

    other: Callable[[], object] | None = None

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        other, self.other = self.other, None
        if other is not None:
            other()
            self._producer._lose()  # as after a connection that broke: a new producer, which fences the other in its turn
        with super().transaction() as tx:
            yield tx


@pytest.mark.broker
def test_what_another_replay_has_sent_meanwhile_is_left_out(
    command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """The markers are read inside the transaction: what was read before its beginning may be old."""
    origin, dlq = kafka_topic(), kafka_topic()
    put(kafka.bootstrap, simple(origin, dlq, 10))
    config = {"bootstrap.servers": kafka.bootstrap, "transactional.id": replay.transactional_id(dlq)}
    with TopicReader(config, dlq) as reader, Overtaken(config) as client:
        replay.end_earlier(client)
        contents, outcome = Contents.of(reader), Outcome()
        good = sort_out(reader, contents, list(contents.entries), outcome)
        client.other = lambda: command("replay", dlq, "--all")
        Replay(client, reader, contents, outcome, lambda _entry: None).run(good)
    assert (len(outcome.before), outcome.sent, outcome.left) == (10, [], [])
    assert ids(kafka.bootstrap, origin) == all_ids(10)


def twice(letters: Sequence[Record]) -> list[Record]:
    """Dead letters in two partitions, and behind them every fifth once more, in the partition where it is not."""
    again = letters[::5]
    return [*letters, *(Record(r.topic, r.value, r.key, headers=r.headers, partition=1 - (r.partition or 0)) for r in again)]


# Transactions of twenty records: many moments at which one is half done.
REPLAY = """
import sys
from kafka_guarantees.cli import main
from kafka_guarantees.dead_letters import replay
replay.PORTION = 20
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def replaying(bootstrap: str, dlq: str) -> Iterator[subprocess.Popen[str]]:
    """A replay in a process of its own, which is gone afterwards."""
    argv = [sys.executable, "-c", REPLAY, "dead-letters", "replay", dlq, "--all", "-b", bootstrap]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.broker
def test_a_replay_that_is_killed_is_finished_by_the_next(
    command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """SIGKILL at random moments, again and again: in the end every dead letter is in its topic exactly once."""
    origin, dlq = kafka_topic(partitions=2), kafka_topic(partitions=2)
    put(kafka.bootstrap, twice(simple(origin, dlq, 1000, partitions=2)))
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    halfway = life = 0
    while life < 6 or (not halfway and life < 18):  # on a busy machine a life may be over before it began
        life += 1
        with replaying(kafka.bootstrap, dlq):
            time.sleep(chance.uniform(0.2, 1.2) * max(1, life / 6))
        halfway += 0 < len(read_all(kafka.bootstrap, origin, timeout=60)) < 1000
    command("replay", dlq, "--all")
    assert ids(kafka.bootstrap, origin) == all_ids(1000), f"seed {seed}"
    assert halfway, f"no replay was killed in the middle: seed {seed}"


@pytest.mark.broker
def test_two_replays_at_once_do_not_repeat_anything(
    command: Command, kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """They have one transactional.id: what one is about to send while the other begins is not sent, or has a marker."""
    origin, dlq = kafka_topic(partitions=2), kafka_topic(partitions=2)
    put(kafka.bootstrap, twice(simple(origin, dlq, 1000, partitions=2)))
    with (
        replaying(kafka.bootstrap, dlq) as one,
        replaying(kafka.bootstrap, dlq) as two,
        replaying(kafka.bootstrap, dlq) as three,
    ):
        said = [process.communicate(timeout=DEADLINE)[0] for process in (one, two, three)]
    assert {process.returncode for process in (one, two, three)} <= {0, 1}, said
    command("replay", dlq, "--all")
    assert ids(kafka.bootstrap, origin) == all_ids(1000)


def test_no_kafka_is_one_message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers: status 1, and a line that says so."""
    monkeypatch.setattr(reading, "ANSWER", 1.5)
    assert main(["dead-letters", "list", "dlq", "-b", "127.0.0.1:1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kafka-guarantees: no Kafka answers at 127.0.0.1:1 (_TRANSPORT: ")
    assert "Connection refused" in err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("sasl.mechanism", "SASL mechanism"),
        ("security.protocol", "security.protocol"),
        ("plugin.library.paths", "plugin.library.paths"),
    ],
)
def test_a_secret_in_the_wrong_line_is_not_shown(wrong: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """S01: librdkafka's words quote it."""
    settings = {"security.protocol": "sasl_ssl", "sasl.username": "jane", "sasl.password": "xyz", wrong: "s3cr3t-Marker"}
    more = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
    assert main(["dead-letters", "list", "dlq", "-b", "127.0.0.1:1", *more]) == 2
    err = capsys.readouterr().err
    assert "s3cr3t" not in err
    assert said in err
