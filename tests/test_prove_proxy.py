"""The proxy of ``kafka-guarantees prove``: clients that come to it stay with it, and each of its faults does what it says.

Three parts: the protocol (pure), the sockets (this file plays client and broker), and real clients with a real Kafka.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import random
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, Record
from kafka_guarantees.prove import wire
from kafka_guarantees.prove.faults import Aim, fault
from kafka_guarantees.prove.proxy import API, Proxy
from kafka_guarantees.prove.wire import Request, WireError, error_code, not_leader, read_request, rewrite_answer
from kafka_guarantees.testing.local_kafka import LocalKafka

from .conftest import fill, read_all, values
from .kafka_wire import INVALID_PRODUCER_EPOCH, PRODUCER_FENCED, TIMEOUT, Wire, receive, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kafka_guarantees.testing.local_kafka import RunningKafka

AT_ONCE = {"reconnect.backoff.ms": 10, "reconnect.backoff.max.ms": 50, "retry.backoff.ms": 10, "retry.backoff.max.ms": 50}

broker = pytest.mark.broker
cluster = pytest.mark.cluster

# -- the protocol ------------------------------------------------------------------------------------------------------

# Made by Kafka 4.3.1's own classes (org.apache.kafka.common.message), of TxnOffsetCommit v6 by 4.4.0's, packed: a line for each
# API and version with its key, its version, an answer with its header (correlation id 7), and the same answer as it must be
# behind the proxy. Where there is no such, the answer says that something went wrong with error 47.
_GOLDEN = """
eNrtmVGWqyAMht9nFV0CCRDocjqj7n8JE9BaoYBWvL10jp5xsALJzycBRHkRFzEeZkpxSsFd07cEf1Na9cgHSd8ERO4/dhKxJ20s3+mMoB/S/HswSGaqqRcW
fWrutorOrxIkSoO9FNPpDVx/FCxK50th3u2XvMAr7QaD+1s/8BFLeZZUwyKQVyKyVQrzwXfzQbqSaovTZknMS8ayROvcRFP81Mmvip8++VXxo5NfFT9z8qvi
Z5vnZ6O0YZ6xVOZ7TcmVsxEZkMVZGN8AtWO1KwOpozX0EsE+yUyzfIi7FSgGUgslcY8st04WrYBbOxoFu0u2Aw8fCP7DgI+g8QT9HtDyI0F/IGwP3I3cKd1P
C4lcocLk7YxDbgGgVK8GPvUrDnMVV0RgCyKy7/76yVbYx8X2iqU+5p91skEcRgQ55zMVv77yayyYr4QYuDyHlS8hqwIxG0KhvNvKht/LYlfDbQ4UfcLbD49O
eDvhUWaIFonJ4J/Nk3b1DTkv5bCZzwZQIK8EWsIC7waDx4LZhwbeBWcdTyDlC2w6nJbX3RTOrAtwsYrrpt9iyrvdZ2L+2d+HAL4e7tcpR4tBR1wfjsSwxZGT
D2+TX3p+Vc1YPg38W82J1nk2akjYlMB2aD22v2xSqlGjLfcHHJccn4rjk0+XYm+I76BxwTbQZAk4BWUURy5Qz3lAkkv7EvkanMZvEZqDfqNf6KZzu18czxAr
RY8rfGAvYP3T6GA8XbdUZ7c8u2Vj3RIpORXj4HIgm4PZnPQ7Ng6jL1XM1Znc1OFq6Kx2ndWus9p1Ubsualf59wMIPnpgakto9K/yy+kXbOABNpIc0G9wyfSm
1sjBz79oD2BhD2BhD2Bhq1moyvq6sj6l669sUm6wncC7FavN78RtN6HqTeh6E1RvwtSbsDWdxKa/uW6vnv70eEQfS2zZrkOZj+cpI3awWtZJUP9fgj5QQo2k
gkRqX6JpX6J9i8R5HQzk94moO0J+1JRgUCkNJlvd4CwcvWycZe8VDnGNX+tIlso=
"""
HERE = {("k1", 9092): ("127.0.0.1", 40001), ("kafka-2.example.org", 9093): ("127.0.0.1", 40002)}
THERE = {ours: theirs for theirs, ours in HERE.items()}


class Sample(NamedTuple):
    """An answer, and what becomes of it."""

    request: Request
    frame: bytes
    behind: bytes | None

    def __str__(self) -> str:
        return f"{self.request.name} v{self.request.version}"


def samples() -> Iterator[Sample]:
    for line in zlib.decompress(base64.b64decode(_GOLDEN)).decode().splitlines():
        api, version, frame, *behind = line.split()
        request = Request(int(api), int(version), 7, "client")
        yield Sample(request, bytes.fromhex(frame), bytes.fromhex(behind[0]) if behind else None)


SAMPLES = list(samples())
REWRITTEN = [sample for sample in SAMPLES if sample.behind is not None]
ADDRESSED = [sample for sample in REWRITTEN if sample.request.api != API["ApiVersions"]]
FAILED = [sample for sample in SAMPLES if sample.behind is None]


def renamed(names: dict[tuple[str, int], tuple[str, int]]) -> Callable[[str, int], tuple[str, int]]:
    return lambda host, port: names[host, port]


def refusing(host: str, port: int) -> tuple[str, int]:
    raise AssertionError(f"nobody should ask for {host}:{port}")


def test_the_samples_are_of_all_versions() -> None:
    """What is tested here is every version that clients can have seen: up to the caps, and for ApiVersions itself."""
    for api, highest in {name: wire.CAPS[API[name]] for name in ("Metadata", "FindCoordinator", "DescribeCluster")}.items():
        assert [sample.request.version for sample in REWRITTEN if sample.request.name == api] == list(range(highest + 1))
    assert {sample.request.version for sample in REWRITTEN if sample.request.name == "ApiVersions"} == set(range(5))


@pytest.mark.parametrize("sample", REWRITTEN, ids=str)
def test_an_answer_is_rewritten_as_kafka_itself_would_write_it(sample: Sample) -> None:
    """Addresses of another length in, versions down, APIs out: byte for byte what Kafka writes for such values."""
    assert rewrite_answer(sample.request, sample.frame, renamed(HERE)) == sample.behind


@pytest.mark.parametrize("sample", ADDRESSED, ids=str)
@pytest.mark.parametrize("length", [1, 126, 127, 128, 249])
def test_addresses_of_any_length_go_in_and_come_back(sample: Sample, length: int) -> None:
    """The way there and back is the identity, also where the length of a name needs a second byte (from 127 on)."""
    there = {old: ("h" * length, old[1] + 1) for old in HERE}
    back = {new: old for old, new in there.items()}
    long = rewrite_answer(sample.request, sample.frame, renamed(there))
    found = [name for name in back if name[0].encode() + struct.pack(">i", name[1]) in long]
    assert found, "the new addresses are in there"
    assert rewrite_answer(sample.request, long, renamed(back)) == sample.frame


@pytest.mark.parametrize("sample", REWRITTEN, ids=str)
def test_half_an_answer_is_refused_without_a_trace(sample: Sample) -> None:
    """Cut anywhere before the end of what is looked at: WireError, and nobody was asked for a new address."""
    last = max(sample.frame.rfind(name) for name in (b"k1", b"kafka-2.example.org", struct.pack(">hhh", 79, 1, 2)))
    for end in range(last + 4):
        with pytest.raises(WireError):
            rewrite_answer(sample.request, sample.frame[:end], refusing)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_garbage_is_refused_or_left_alone(sample: Sample) -> None:
    """Random bytes, and answers with random bytes in them, raise nothing but WireError."""
    dice = random.Random(str(sample))
    for _ in range(300):
        garbage = bytearray(sample.frame if dice.random() < 0.7 else dice.randbytes(dice.randrange(200)))
        for _ in range(min(dice.randrange(1, 6), len(garbage))):
            garbage[dice.randrange(len(garbage))] = dice.randrange(256)
        with suppress(WireError):
            rewrite_answer(sample.request, bytes(garbage), lambda host, port: (host[::-1], port))
        with suppress(WireError):
            error_code(sample.request, bytes(garbage))
        with suppress(WireError):
            read_request(bytes(garbage))


@pytest.mark.parametrize("sample", FAILED, ids=str)
def test_the_error_in_an_answer_is_found(sample: Sample) -> None:
    """Also where it is that of a second partition, and the first has none."""
    assert error_code(sample.request, sample.frame) == 47
    with pytest.raises(WireError):
        error_code(sample.request, sample.frame[:7])


def test_versions_that_cannot_be_looked_into_are_said_to_be_so() -> None:
    """Produce v10 may carry addresses: it is not passed on as if it could not."""
    assert rewrite_answer(Request(API["Produce"], 9, 1, ""), b"anything", refusing) == b"anything"
    for name, version in {"Produce": 10, "Fetch": 16, "Metadata": 14, "ShareFetch": 1, "ApiVersions": 5}.items():
        with pytest.raises(WireError, match="cannot be looked into"):
            rewrite_answer(Request(API[name], version, 1, ""), b"anything", refusing)


def test_an_answer_to_an_unknown_version_of_apiversions_is_one_of_version_0() -> None:
    """KIP-511: the client asked with a version that the broker does not know, and must be able to read the answer."""
    answer = struct.pack(">ihi", 7, 35, 2) + struct.pack(">hhhhhh", 18, 0, 4, 0, 0, 13)
    expected = struct.pack(">ihi", 7, 35, 2) + struct.pack(">hhhhhh", 18, 0, 4, 0, 0, 9)
    assert rewrite_answer(Request(API["ApiVersions"], 4, 7, ""), answer, refusing) == expected


def head(api: int, version: int, correlation: int = 1, client_id: str | None = "me") -> bytes:
    name = b"\xff\xff" if client_id is None else struct.pack(">h", len(client_id)) + client_id.encode()
    return struct.pack(">hhi", api, version, correlation) + name


def test_the_head_of_a_request() -> None:
    """API, version, correlation id, client.id, which may be null; and whether Produce wants an answer."""
    assert read_request(head(26, 1, 5)) == Request(26, 1, 5, "me")
    assert read_request(head(3, 12, 5, None) + b"\0...") == Request(3, 12, 5, "")
    for acks, answered in ((-1, True), (1, True), (0, False)):
        word = struct.pack(">h", acks)
        assert read_request(head(0, 2) + word).answered is answered
        assert read_request(head(0, 7) + b"\xff\xff" + word).answered is answered
        assert read_request(head(0, 8) + b"\0\2tx" + word).answered is answered
        assert read_request(head(0, 9) + b"\0\3tx" + word).answered is answered
    for wrong in (b"", head(26, 1)[:9], head(-1, 0), head(0, 9) + b"\0\3t"):
        with pytest.raises(WireError):
            read_request(wrong)


def test_bootstrap_servers_are_read_as_librdkafka_does() -> None:
    """Several, with spaces, a protocol, no port, IPv6; and TLS is refused at once."""
    assert wire.addresses("a:1, SASL_PLAINTEXT://b:2,,c,[::1]:3,[::2]") == [
        ("a", 1),
        ("b", 2),
        ("c", 9092),
        ("::1", 3),
        ("::2", 9092),
    ]
    for wrong in ("", " , ", "SSL://a:1", "sasl_ssl://a:1", "a:b"):
        with pytest.raises(ValueError, match=r"none|PLAINTEXT|invalid literal"):
            Proxy(wrong)


# -- the sockets -------------------------------------------------------------------------------------------------------


NOT_LEADER_OR_FOLLOWER = 6


def produce(version: int, correlation: int = 1, acks: int = -1) -> bytes:
    """A Produce for partitions 3 and 300 of one topic, and for none of another."""
    flexible = version >= 9
    tags = b"\0" if flexible else b""

    def text(data: bytes) -> bytes:
        return (bytes([len(data) + 1]) if flexible else struct.pack(">h", len(data))) + data

    def many(count: int) -> bytes:
        return bytes([count + 1]) if flexible else struct.pack(">i", count)

    begin = head(0, version, correlation) + tags + (text(b"tx") if version >= 3 else b"") + struct.pack(">hi", acks, 1000)
    third = struct.pack(">i", 3) + many(7) + b"records" + tags
    other = struct.pack(">i", 300) + (b"\0" if flexible else struct.pack(">i", -1)) + tags  # null
    return begin + many(2) + text(b"orders") + many(2) + third + other + tags + text(b"t") + many(0) + tags + tags


@pytest.mark.parametrize("version", range(10))
def test_a_refusal_says_that_the_broker_is_not_the_leader(version: int) -> None:
    """Of each partition, in each version that clients speak to a proxy: with no offset, no time, and no text."""
    flexible = version >= 9
    tags = b"\0" if flexible else b""
    nothing = b"\xff" * 8
    said = b"\0\6" + nothing + nothing * ((version >= 2) + (version >= 5))
    said += (b"\1\0" if flexible else b"\0\0\0\0\xff\xff") if version >= 8 else b""
    each = [struct.pack(">i", number) + said + tags for number in (3, 300)]
    orders, t = (b"\7orders", b"\2t") if flexible else (b"\0\6orders", b"\0\1t")
    none, two = (b"\1", b"\3") if flexible else (bytes(4), b"\0\0\0\2")
    topics = two + orders + two + b"".join(each) + tags + t + none + tags
    throttled = bytes(4) if version >= 1 else b""
    frame = produce(version)
    assert not_leader(frame) == struct.pack(">i", 1) + tags + topics + throttled + tags
    assert error_code(read_request(frame), not_leader(frame)) == NOT_LEADER_OR_FOLLOWER


def test_only_a_produce_is_refused_and_only_as_a_whole() -> None:
    for frame in (head(3, 9), produce(10), *(produce(9)[:cut] for cut in range(len(produce(9)) - 1))):
        with pytest.raises(WireError):
            not_leader(frame)


class Ends:
    """The client's end of a connection through a proxy, and the broker's. Opened on first use, in this order."""

    def __init__(self, proxy: Proxy, server: socket.socket) -> None:
        self.proxy = proxy
        self._server = server
        self._open: list[socket.socket] = []

    def connect(self) -> tuple[socket.socket, socket.socket]:
        host, port = self.proxy.bootstrap.split(":")
        client = socket.create_connection((host, int(port)), timeout=TIMEOUT)
        self._open.append(client)
        there, _ = self._server.accept()
        there.settimeout(TIMEOUT)
        self._open.append(there)
        return client, there

    def close(self) -> None:
        for connection in self._open:
            connection.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT)
        with Proxy(f"127.0.0.1:{server.getsockname()[1]}") as proxy:
            both = Ends(proxy, server)
            yield both
            both.close()


def put(connection: socket.socket, frame: bytes) -> None:
    connection.sendall(struct.pack(">i", len(frame)) + frame)


def test_what_is_not_understood_is_passed_on_and_told(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    """Frames that are no requests, answers to nothing, half a Metadata answer: unchanged, one warning for each kind."""
    client, there = ends.connect()
    for _ in range(3):
        put(client, b"token")
        assert receive(there) == b"token"
        put(there, b"challenge")
        assert receive(client) == b"challenge"
        put(client, head(3, 9) + b"\0...")
        assert receive(there) == head(3, 9) + b"\0..."
        half = REWRITTEN[9].frame[:30]
        put(there, struct.pack(">i", 1) + half[4:])
        assert receive(client) == struct.pack(">i", 1) + half[4:]
    assert ends.proxy.not_understood == {"a request": 3, "an answer": 3, "the answer to Metadata v9": 3}
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3


def test_tls_is_told_and_closed(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    """A client that begins with TLS would otherwise be waited for, since its first bytes are a length of 369 MB."""
    client, there = ends.connect()
    client.sendall(bytes.fromhex("160301020001"))
    assert receive(client) is None
    assert receive(there) is None
    assert "TLS" in caplog.text


def test_what_a_client_sent_before_it_closed_arrives(ends: Ends) -> None:
    """Also with a delay: closing is not cutting. And so it is with the last answers of a broker."""
    client, there = ends.connect()
    with ends.proxy.delay(0.2):
        put(client, head(13, 1))
        client.close()
        assert receive(there) == head(13, 1)
        assert receive(there) is None
    client, there = ends.connect()
    put(client, head(13, 1))
    receive(there)
    put(there, struct.pack(">i", 1) + b"bye")
    there.close()
    assert receive(client) == struct.pack(">i", 1) + b"bye"
    assert receive(client) is None


def test_frames_keep_their_order_under_a_changing_delay(ends: Ends) -> None:
    """One that was sent while the delay was shorter waits for those before it."""
    client, there = ends.connect()
    began = time.monotonic()
    with ends.proxy.delay(0.2), ends.proxy.delay(0.3):
        put(client, head(26, 1, 1))
        eventually(lambda: ends.proxy.connections == 1)
        time.sleep(0.1)  # the proxy has read it
    put(client, head(26, 1, 2))
    assert [receive(there), receive(there)] == [head(26, 1, 1), head(26, 1, 2)]
    assert 0.45 < time.monotonic() - began < 3
    began = time.monotonic()
    with ends.proxy.delay(0.3):
        put(there, struct.pack(">i", 1))
        assert receive(client) == struct.pack(">i", 1)
    assert 0.25 < time.monotonic() - began < 3


def test_a_cut_at_the_very_moment_of_a_hold_does_not_lose_what_is_held(ends: Ends) -> None:
    """The client is cut in any case; the broker's side stays, also where both faults come in one round of the loop."""

    def cutting(_client_id: str) -> bool:
        (link,) = ends.proxy._links
        asyncio.get_running_loop().call_soon(link.cut)
        return True

    held = ends.proxy.hold({API["EndTxn"]}, clients=cutting)
    client, there = ends.connect()
    put(client, head(26, 1, 2))
    assert receive(client) is None
    held.wait(TIMEOUT)
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(held.release)
        assert receive(there) == head(26, 1, 2)
        put(there, struct.pack(">iih", 2, 0, 0))
        assert outcome.result(TIMEOUT).error == 0


def test_a_held_frame_comes_late_on_its_own_connection(ends: Ends) -> None:
    """What was before it arrived, what was behind it is lost, its client is cut; then it is sent, and the answer told."""
    held = ends.proxy.hold({API["EndTxn"]}, clients=lambda name: name == "me")
    client, there = ends.connect()
    other, other_there = ends.connect()
    put(other, head(26, 1, 8, "another"))
    assert receive(other_there) == head(26, 1, 8, "another")
    put(client, head(3, 0, 1) + b"first")
    put(client, head(26, 1, 2) + b"held")
    put(client, head(3, 0, 3) + b"lost")
    assert receive(there) == head(3, 0, 1) + b"first"
    assert held.wait(TIMEOUT) == Request(26, 1, 2, "me")
    assert receive(client) is None
    there.settimeout(0.2)
    with pytest.raises(TimeoutError):
        there.recv(1)
    with pytest.raises(TimeoutError, match="not released"):
        held.result(0.01)
    there.settimeout(TIMEOUT)
    assert ends.proxy.cut() == 1, "that of the other client: the broker's side of what is held stays open"

    def answer() -> None:
        assert receive(there) == head(26, 1, 2) + b"held"
        put(there, struct.pack(">i", 1) + b"late answer to the first")
        put(there, struct.pack(">iih", 2, 0, 47))

    answering = threading.Thread(target=answer)
    answering.start()
    outcome = held.release(TIMEOUT)
    answering.join()
    assert (outcome.sent, outcome.error) == (True, 47)
    assert held.release() is outcome, "again: what became of it"
    assert receive(there) is None
    assert held.held_at is not None
    assert held.released_at is not None
    assert held.held_at < held.released_at


def test_a_held_frame_comes_by_itself_after_its_seconds(ends: Ends) -> None:
    """Produce without acks: it was sent, and no answer is due."""
    held = ends.proxy.hold({API["Produce"]}, 0.4)
    client, there = ends.connect()
    frame = head(0, 7) + b"\xff\xff\0\0records"
    put(client, frame)
    assert receive(client) is None
    cut = time.monotonic()
    assert receive(there) == frame
    assert 0.3 < time.monotonic() - cut < 3
    assert held.result(TIMEOUT).sent
    assert "no answer is due" in held.result(0).detail


def test_a_held_frame_whose_connection_the_broker_closed_is_told_as_such(ends: Ends) -> None:
    """Before it was sent, and after: the second may have had its effect."""
    held = ends.proxy.hold({API["EndTxn"]})
    client, there = ends.connect()
    put(client, head(26, 1))
    held.wait(TIMEOUT)
    there.close()
    outcome = held.result(TIMEOUT)
    assert (outcome.sent, outcome.error, outcome.detail) == (False, None, "the broker had closed the connection")
    assert held.release() is outcome

    held = ends.proxy.hold({API["EndTxn"]}, 0)
    client, there = ends.connect()
    put(client, head(26, 1))
    assert receive(there) is not None
    there.close()
    outcome = held.result(TIMEOUT)
    assert (outcome.sent, outcome.error) == (True, None)
    assert "without an answer" in outcome.detail


def test_what_is_held_can_be_given_up(ends: Ends) -> None:
    """Before anything came, and after."""
    held = ends.proxy.hold({API["EndTxn"]})
    held.cancel()
    with pytest.raises(TimeoutError, match="cancelled"):
        held.wait(1)
    client, there = ends.connect()
    put(client, head(26, 1))
    assert receive(there) == head(26, 1)
    held = ends.proxy.hold({API["EndTxn"]})
    put(client, head(26, 1))
    held.wait(TIMEOUT)
    held.cancel()
    assert not held.result(TIMEOUT).sent
    assert receive(there) is None


def test_the_end_of_the_proxy_is_told_to_whoever_waits() -> None:
    """A thread that waits for a late answer is not left behind; and a closed proxy says that it is one."""
    with socket.create_server(("127.0.0.1", 0)) as server, Proxy(f"127.0.0.1:{server.getsockname()[1]}") as proxy:
        server.settimeout(TIMEOUT)
        both = Ends(proxy, server)
        first = proxy.hold({API["EndTxn"]})
        client, _there = both.connect()
        put(client, head(26, 1))
        first.wait(TIMEOUT)
        never = proxy.hold({API["EndTxn"]})
        proxy.__exit__(None, None, None)
        assert first.result(0).detail == "the proxy was closed"
        assert not never.result(0).sent
        with pytest.raises(RuntimeError, match="not running"):
            proxy.cut()
        both.close()


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_that_begins_as_the_proof_is_interrupted_says_nothing(before: bool) -> None:  # noqa: FBT001
    """Its thread found the proxy gone, and its traceback stood on the screen."""
    stage: Any = SimpleNamespace(connections=Proxy("127.0.0.1:1"))
    killing = fault("kill-in-call", "exactly-once").start(stage, Aim("EndTxn", 0.1, ("sender", before)))
    killing.join(TIMEOUT)
    assert killing.who is None


def test_dropped_answers_take_all_later_ones_with_them(ends: Ends) -> None:
    """As with TCP: behind a lost answer nothing comes, until the connection is cut. Other connections are not meant."""
    dropping = ends.proxy.drop_responses({API["Produce"]}, 2, clients=lambda name: name == "me", cut_after=0.3)
    client, there = ends.connect()
    other, other_there = ends.connect()
    put(other, head(0, 7, 1, "another") + b"\xff\xff\0\1")
    receive(other_there)
    put(other_there, struct.pack(">i", 1))
    assert receive(other) == struct.pack(">i", 1)
    for correlation, api in enumerate((26, 0, 26, 0)):
        put(client, head(api, 7, correlation) + b"\xff\xff\0\1")
        receive(there)
        put(there, struct.pack(">i", correlation))
    put(there, struct.pack(">i", 99))
    assert receive(client) == struct.pack(">i", 0)
    assert receive(client) is None
    assert [request.correlation for request in dropping.wait(TIMEOUT)] == [1, 3]
    assert ends.proxy.connections == 1, "the other"


def test_dropped_answers_without_a_cut_are_just_missing(ends: Ends) -> None:
    """cut_after=None: the next answer comes. And what was not dropped yet can be let be."""
    dropping = ends.proxy.drop_responses({API["Produce"]}, 2, cut_after=None)
    client, there = ends.connect()
    for correlation, api in enumerate((0, 26)):
        put(client, head(api, 7, correlation) + b"\xff\xff\0\1")
        receive(there)
        put(there, struct.pack(">i", correlation))
    assert receive(client) == struct.pack(">i", 1)
    with pytest.raises(TimeoutError, match=r"1 answers were dropped .* 1 were not"):
        dropping.wait(0.01)
    dropping.cancel()
    put(client, head(0, 7, 2) + b"\xff\xff\0\1")
    receive(there)
    put(there, struct.pack(">i", 2))
    assert receive(client) == struct.pack(">i", 2)


def test_a_refusal_keeps_its_turn(ends: Ends) -> None:
    """The broker does not see it, the answers before it come before it, and those of what was sent behind it after it."""
    refusing = ends.proxy.refuse_records()
    client, there = ends.connect()
    put(client, head(26, 1, 1))
    put(client, produce(7, 2))
    for correlation in (3, 4):
        put(client, produce(7, correlation))
    assert [receive(there), receive(there), receive(there)] == [head(26, 1, 1), produce(7, 3), produce(7, 4)]
    for correlation in (1, 3, 4):
        put(there, struct.pack(">i", correlation))
    answers = [struct.pack(">i", 1), not_leader(produce(7, 2)), struct.pack(">i", 3), struct.pack(">i", 4)]
    assert [receive(client) for _ in answers] == answers
    assert [request.correlation for request in refusing.refused] == [2]
    assert ends.proxy.requests() == {"EndTxn": 1, "Produce": 2}, "what the broker had"
    assert not ends.proxy.not_understood


@pytest.mark.parametrize("before", [False, True])
def test_a_refusal_comes_though_nothing_is_sent_behind_it(ends: Ends, before: bool) -> None:  # noqa: FBT001
    """A moment later; where another answer is due before it, right behind that."""
    ends.proxy.refuse_records(2)
    client, there = ends.connect()
    if before:
        put(client, head(26, 1, 1))
        receive(there)
    put(client, produce(9, 2))
    if before:
        time.sleep(0.5)
        put(there, struct.pack(">i", 1))
        assert receive(client) == struct.pack(">i", 1)
    assert receive(client) == not_leader(produce(9, 2))
    put(client, produce(9, 3, acks=0))
    assert receive(there) == produce(9, 3, acks=0), "nobody would hear of it"
    put(client, produce(9, 4))
    assert receive(client) == not_leader(produce(9, 4))


def test_only_producers_that_begin_are_refused(ends: Ends) -> None:
    """By client.id: who has asked for a producer id since. And nobody any more, once that is over."""
    refusing = ends.proxy.refuse_records(2, beginning=True)
    client, there = ends.connect()
    put(client, produce(9, 1))
    put(client, head(22, 1, 2, "another"))
    put(client, produce(9, 3))
    put(client, head(22, 1, 4))
    assert [receive(there) for _ in range(4)] == [produce(9, 1), head(22, 1, 2, "another"), produce(9, 3), head(22, 1, 4)]
    for correlation in (1, 2, 3, 4):
        put(there, struct.pack(">i", correlation))
        receive(client)
    put(client, produce(9, 5))
    put(client, produce(9, 6))
    assert receive(there) == produce(9, 6), "the first one only"
    assert receive(client) == not_leader(produce(9, 5))
    put(client, head(22, 1, 7))
    receive(there)
    refusing.cancel()
    put(client, produce(9, 8))
    assert receive(there) == produce(9, 8)


def test_cut_chooses_by_its_dice_and_by_client(ends: Ends) -> None:
    """The same seed cuts the same connections; a connection belongs to the client.id that it last told."""
    with pytest.raises(ValueError, match="rng"):
        ends.proxy.cut(0.5)

    def ten() -> list[socket.socket]:
        found = []
        for number in range(10):
            client, there = ends.connect()
            put(client, head(3, 0, 1, f"client-{number}"))
            receive(there)
            found.append(client)
        return found

    def gone(clients: list[socket.socket]) -> list[bool]:
        return [is_closed(client) for client in clients]

    chosen = []
    for _ in range(2):
        clients = ten()
        count = ends.proxy.cut(0.5, random.Random(3))
        chosen.append(gone(clients))
        assert sum(chosen[-1]) == count
        assert 0 < count < 10
        ends.proxy.cut()
    assert chosen[0] == chosen[1]
    clients = ten()
    assert ends.proxy.cut(clients=lambda name: name == "client-7") == 1
    assert gone(clients) == [number == 7 for number in range(10)]


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed it by now, or does within a moment."""
    connection.settimeout(0.05)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def is_turned_away(proxy: Proxy) -> bool:
    """Whether a new connection is closed at once; so soon, perhaps, that it does not come about."""
    host, port = proxy.bootstrap.split(":")
    try:
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as late:
            return receive(late) is None
    except ConnectionResetError:
        return True


def test_refuse_closes_all_and_lets_nobody_in(ends: Ends) -> None:
    """And afterwards the same address works."""
    client, _there = ends.connect()
    with ends.proxy.refuse():
        assert receive(client) is None
        assert is_turned_away(ends.proxy)
        assert ends.proxy.connections == 0
    client, there = ends.connect()
    put(client, head(3, 0))
    assert receive(there) == head(3, 0)


def test_a_broker_that_is_down_is_a_client_that_is_disconnected() -> None:
    """Its place stays, and works once the broker is back on its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with Proxy(f"127.0.0.1:{address[1]}") as proxy:
        assert is_turned_away(proxy)
        with socket.create_server(address) as server:
            server.settimeout(TIMEOUT)
            both = Ends(proxy, server)
            client, there = both.connect()
            put(client, head(3, 0))
            assert receive(there) == head(3, 0)
            both.close()


# -- real clients, a real Kafka ----------------------------------------------------------------------------------------


@pytest.fixture
def proxy(kafka: RunningKafka) -> Iterator[Proxy]:
    with Proxy(kafka.bootstrap) as started:
        yield started
        assert not started.not_understood


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stays(proxy: Proxy, client: Any) -> None:
    """A client that has seen Metadata knows no other address than ours."""
    known = {f"{broker.host}:{broker.port}" for broker in client.list_topics(timeout=TIMEOUT).brokers.values()}
    assert known
    assert known <= set(proxy.routes.values())
    assert not known & set(proxy.routes)


def consume(config: dict[str, Any], topic: str, count: int) -> list[bytes]:
    consumer = Consumer({"auto.offset.reset": "earliest", "enable.auto.commit": False, **config})
    try:
        consumer.subscribe([topic])
        found: list[bytes] = []
        deadline = time.monotonic() + 3 * TIMEOUT
        while len(found) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count}"
            for message in consumer.consume(1000, 0.1):
                assert message.error() is None
                found.append(message.value() or b"")
        consumer.commit(asynchronous=False)
        return sorted(found)
    finally:
        consumer.close()


def numbers(count: int) -> list[bytes]:
    return [b"%06d" % number for number in range(count)]


@broker
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_plain_clients_go_through(
    protocol: str, proxy: Proxy, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """Producer, group consumer, admin: all requests are seen here, in numbers, under both group protocols."""
    topic = kafka_topic(partitions=3)
    fill(proxy.bootstrap, topic, numbers(2000), partitions=3)
    group = {"bootstrap.servers": proxy.bootstrap, "group.id": fresh("group"), "group.protocol": protocol, "client.id": "c"}
    assert consume(group, topic, 2000) == numbers(2000)
    admin = AdminClient({"bootstrap.servers": proxy.bootstrap})
    stays(proxy, admin)
    described = admin.describe_cluster().result(TIMEOUT)
    assert {f"{node.host}:{node.port}" for node in described.nodes} <= set(proxy.routes.values())
    seen = proxy.requests()
    for name in ("Produce", "Fetch", "OffsetCommit", "FindCoordinator", "Metadata", "ApiVersions"):
        assert seen[name], name
    assert bool(seen.get("ConsumerGroupHeartbeat")) is (protocol == "consumer")
    assert bool(seen.get("JoinGroup")) is (protocol == "classic")
    mine = proxy.requests(lambda name: name == "c")
    assert mine["Fetch"] == seen["Fetch"]
    assert "Produce" not in mine


@broker
def test_transactions_go_through(
    kafka: RunningKafka, proxy: Proxy, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """Of a plain transactional producer: one committed, one aborted."""
    topic = kafka_topic()
    producer = Producer({"bootstrap.servers": proxy.bootstrap, "transactional.id": fresh("tx")})
    producer.init_transactions(TIMEOUT)
    for value in (b"kept", b"aborted"):
        producer.begin_transaction()
        producer.produce(topic, value)
        producer.flush(TIMEOUT)
        if value == b"kept":
            producer.commit_transaction(TIMEOUT)
        else:
            producer.abort_transaction(TIMEOUT)
    stays(proxy, producer)
    assert visible(kafka.bootstrap, topic) == [b"kept"]
    assert proxy.requests()["EndTxn"] == 2
    assert proxy.requests()["AddPartitionsToTxn"] >= 2  # X25: again, while the markers of the first are being written


@broker
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
@pytest.mark.parametrize("library", [AtMostOnce, AtLeastOnce, ExactlyOnce])
def test_our_three_go_through(  # noqa: PLR0917 - two tables, four fixtures
    library: type[AtMostOnce | AtLeastOnce | ExactlyOnce],
    protocol: str,
    kafka: RunningKafka,
    proxy: Proxy,
    kafka_topic: Callable[..., str],
    fresh: Callable[[str], str],
) -> None:
    """From topic to topic through the proxy, whichever guarantee."""
    source, sink = kafka_topic(partitions=3), kafka_topic(partitions=3)
    fill(kafka.bootstrap, source, numbers(300), partitions=3)
    config: dict[str, Any] = {
        "bootstrap.servers": proxy.bootstrap,
        "group.id": fresh("group"),
        "group.protocol": protocol,
        "client.id": "ours",
    }
    if library is AtMostOnce:
        consume({**config, "group.id": config["group.id"]}, source, 300)  # H02: a place to begin with
        fill(kafka.bootstrap, source, numbers(300), partitions=3)
    if library is ExactlyOnce:
        config["transactional.id"] = fresh("tx")
    with library(config) as client:
        client.run([source], lambda message: [Record(sink, message.value())], until_idle=1.0)
    assert visible(kafka.bootstrap, sink) == numbers(300)
    seen = proxy.requests(lambda name: name.startswith("ours"))
    assert seen["Produce"]
    assert seen["Fetch"]
    assert seen["TxnOffsetCommit" if library is ExactlyOnce else "OffsetCommit"]


@broker
def test_cut_a_client_comes_back_and_goes_on(kafka: RunningKafka, proxy: Proxy, kafka_topic: Callable[..., str]) -> None:
    """Eight cuts while an idempotent producer writes: nothing is lost, nothing twice, and it was disconnected."""
    topic = kafka_topic()
    producer = Producer({"bootstrap.servers": proxy.bootstrap, "enable.idempotence": True, "linger.ms": 5, **AT_ONCE})
    stays(proxy, producer)
    cuts = 0
    for number, value in enumerate(numbers(2000)):
        producer.produce(topic, value)
        producer.poll(0)
        if number % 250 == 249:
            written = proxy.requests().get("Produce", 0)
            eventually(lambda: proxy.requests().get("Produce", 0) > written)  # noqa: B023 - called at once
            cuts += proxy.cut()
    assert producer.flush(TIMEOUT) == 0
    assert cuts >= 8
    assert proxy.requests()["Produce"] >= 8
    assert values(read_all(kafka.bootstrap, topic)) == numbers(2000)


@broker
def test_refuse_a_client_waits_and_goes_on(kafka: RunningKafka, proxy: Proxy, kafka_topic: Callable[..., str]) -> None:
    """For as long as it lasts nothing gets through; then the same records do."""
    topic = kafka_topic()
    producer = Producer({"bootstrap.servers": proxy.bootstrap, "enable.idempotence": True, "reconnect.backoff.max.ms": 100})
    stays(proxy, producer)
    with proxy.refuse():
        producer.produce(topic, b"1")
        assert producer.flush(0.7) == 1
    assert producer.flush(TIMEOUT) == 0
    assert values(read_all(kafka.bootstrap, topic)) == [b"1"]


@broker
def test_delay_is_what_it_says(proxy: Proxy, kafka_topic: Callable[..., str]) -> None:
    """A round trip takes twice the delay longer, for those whom it is for; and no longer once it is over."""
    topic = kafka_topic()
    slow = Producer({"bootstrap.servers": proxy.bootstrap, "client.id": "slow", "linger.ms": 0})
    fast = Producer({"bootstrap.servers": proxy.bootstrap, "client.id": "fast", "linger.ms": 0})

    def round_trip(producer: Producer) -> float:
        began = time.monotonic()
        producer.produce(topic, b"x")
        assert producer.flush(TIMEOUT) == 0
        return time.monotonic() - began

    for producer in (slow, fast):
        producer.list_topics(topic, timeout=TIMEOUT)
        round_trip(producer)
    with proxy.delay(0.5, clients=lambda name: name == "slow"):
        assert 1.0 <= round_trip(slow) < 3.0
        assert round_trip(fast) < 1.0
    assert round_trip(slow) < 1.0


@broker
@pytest.mark.parametrize("idempotent", [False, True])
def test_drop_responses_the_broker_had_it(
    idempotent: bool,  # noqa: FBT001 - the two rows of a table
    kafka: RunningKafka,
    proxy: Proxy,
    kafka_topic: Callable[..., str],
) -> None:
    """A producer that sends again writes twice what was written already, unless it is idempotent (P01)."""
    topic = kafka_topic()
    producer = Producer(
        {"bootstrap.servers": proxy.bootstrap, "enable.idempotence": idempotent, "acks": "all", "retries": 10, "linger.ms": 0}
    )
    producer.list_topics(topic, timeout=TIMEOUT)
    dropping = proxy.drop_responses({API["Produce"]})
    producer.produce(topic, b"once?")
    assert producer.flush(TIMEOUT) == 0
    assert [request.name for request in dropping.wait(0)] == ["Produce"]
    assert proxy.requests()["Produce"] == 2
    assert values(read_all(kafka.bootstrap, topic)) == [b"once?"] * (1 if idempotent else 2)


@broker
@pytest.mark.parametrize("idempotent", [False, True])
def test_refused_records_are_produced_again(
    idempotent: bool,  # noqa: FBT001 - the two rows of a table
    kafka: RunningKafka,
    proxy: Proxy,
    kafka_topic: Callable[..., str],
) -> None:
    """A client takes it for what it stands for: it asks who leads, and sends all of them again. Each is there once."""
    topic = kafka_topic()
    producer = Producer(
        {"bootstrap.servers": proxy.bootstrap, "enable.idempotence": idempotent, "acks": "all", "linger.ms": 0, **AT_ONCE}
    )
    sent = [b"%d" % number for number in range(20)]
    producer.produce(topic, sent[0])
    assert producer.flush(TIMEOUT) == 0  # the broker knows it from now on: else P13, see below
    refusing = proxy.refuse_records(3)
    for value in sent[1:]:
        producer.produce(topic, value)
        producer.flush(0.01)
    assert producer.flush(TIMEOUT) == 0
    assert len(refusing.refused) == 3
    assert sorted(values(read_all(kafka.bootstrap, topic)), key=int) == sent


@broker
def test_what_librdkafka_concludes_to_be_written_is_not(
    kafka: RunningKafka, proxy: Proxy, kafka_topic: Callable[..., str]
) -> None:
    """P13: the first records of a producer are refused, the next ones taken. It reports success of all, without an offset."""
    topic = kafka_topic()
    refusing = proxy.refuse_records(beginning=True)
    told: list[Any] = []
    settings = {"acks": "all", "enable.idempotence": True, "linger.ms": 0, "batch.num.messages": 1, **AT_ONCE}
    producer = Producer({"bootstrap.servers": proxy.bootstrap, **settings})
    for value in (b"first", b"second", b"third"):
        producer.produce(
            topic, value, on_delivery=lambda error, message: told.append((error, message.value(), message.offset()))
        )
    assert producer.flush(TIMEOUT) == 0
    assert len(refusing.refused) == 1
    assert (None, b"first", None) in told
    assert b"first" not in values(read_all(kafka.bootstrap, topic))


def plain_commit_and_abort(proxy: Proxy, transactional_id: str, topic: str, second: Callable[[], None]) -> None:
    """Two transactions of a plain producer; ``second`` is called within the second one, whose record is at the broker."""
    producer = Producer({"bootstrap.servers": proxy.bootstrap, "transactional.id": transactional_id})
    producer.init_transactions(TIMEOUT)
    producer.begin_transaction()
    producer.produce(topic, b"first")
    producer.commit_transaction(TIMEOUT)
    producer.begin_transaction()
    producer.produce(topic, b"aborted")
    assert producer.flush(TIMEOUT) == 0
    second()
    with suppress(KafkaException):  # the transaction is over: INVALID_TXN_STATE
        producer.abort_transaction(TIMEOUT)


def our_commit_and_abort(proxy: Proxy, transactional_id: str, topic: str, second: Callable[[], None]) -> None:
    """The same with ExactlyOnce."""
    with ExactlyOnce({"bootstrap.servers": proxy.bootstrap, "transactional.id": transactional_id}) as kafka:
        with kafka.transaction() as tx:
            tx.produce(topic, b"first")
        with suppress(InterruptedError), kafka.transaction() as tx:
            tx.produce(topic, b"aborted")
            kafka._producer.flush()
            second()
            raise InterruptedError


@broker
def test_hold_a_late_endtxn_tears_a_plain_producers_next_transaction(
    kafka: RunningKafka, proxy: Proxy, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """X01, KAFKA-17754: the first commit, held back, commits what the application aborts later."""
    topic, name = kafka_topic(), fresh("tx")
    held = proxy.hold({API["EndTxn"]})

    def second() -> None:
        assert held.wait(0).name == "EndTxn"
        assert Wire(kafka.bootstrap, name).identity().state == "Ongoing"
        outcome = held.release()
        assert (outcome.sent, outcome.error) == (True, 0), outcome

    plain_commit_and_abort(proxy, name, topic, second)
    assert visible(kafka.bootstrap, topic) == [b"aborted", b"first"]


@broker
def test_hold_a_late_endtxn_is_refused_where_epochs_are_kept_clean(
    kafka: RunningKafka, proxy: Proxy, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """X01: the same request, of ExactlyOnce, belongs to an older epoch by then."""
    topic = kafka_topic()
    held = proxy.hold({API["EndTxn"]})
    errors = []
    our_commit_and_abort(proxy, fresh("tx"), topic, lambda: errors.append(held.release().error))
    assert errors[0] in (INVALID_PRODUCER_EPOCH, PRODUCER_FENCED)
    assert visible(kafka.bootstrap, topic) == [b"first"]


@broker
def test_hold_a_late_produce_says_what_the_broker_answered(
    kafka: RunningKafka, proxy: Proxy, kafka_topic: Callable[..., str]
) -> None:
    """Without idempotence the late copy is simply written (P01)."""
    topic = kafka_topic()
    producer = Producer({"bootstrap.servers": proxy.bootstrap, "linger.ms": 0})
    producer.list_topics(topic, timeout=TIMEOUT)
    held = proxy.hold({API["Produce"]})
    producer.produce(topic, b"twice")
    assert producer.flush(TIMEOUT) == 0
    assert len(read_all(kafka.bootstrap, topic)) == 1
    assert held.release().error == 0
    assert len(read_all(kafka.bootstrap, topic)) == 2


@broker
def test_throughput(proxy: Proxy, kafka_topic: Callable[..., str], fresh: Callable[[str], str]) -> None:
    """50,000 messages of 100 B pass in seconds: the proxy is not what a proof waits for (figures: pytest -s)."""
    topic = kafka_topic(partitions=3)
    began = time.monotonic()
    fill(proxy.bootstrap, topic, (b"x" * 100 for _ in range(50_000)), partitions=3)
    written = time.monotonic()
    assert len(consume({"bootstrap.servers": proxy.bootstrap, "group.id": fresh("group")}, topic, 50_000)) == 50_000
    read = time.monotonic()
    print(f"\n50,000 x 100 B: written in {written - began:.2f} s, read in {read - written:.2f} s")  # noqa: T201
    assert read - began < 30


class SaslKafka(LocalKafka):
    """A broker with a second listener, for which it takes a password."""

    def _settings(self, n: int) -> dict[str, object]:
        settings = super()._settings(n)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.sasl = f"127.0.0.1:{port}"
        module = "org.apache.kafka.common.security.plain.PlainLoginModule"
        return {
            **settings,
            "listeners": f"{settings['listeners']},SASL_PLAINTEXT://{self.sasl}",
            "advertised.listeners": f"{settings['advertised.listeners']},SASL_PLAINTEXT://{self.sasl}",
            "listener.security.protocol.map": ("PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT"),
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl_plaintext.plain.sasl.jaas.config": f'{module} required user_me="secret";',
        }


@broker
def test_sasl_goes_through_and_a_wrong_password_does_not(fresh: Callable[[str], str]) -> None:
    """SASL_PLAINTEXT: the handshake is made of ordinary frames; and a held request is still its user's when it comes late."""
    with SaslKafka(1) as kafka, Proxy(kafka.sasl) as proxy:
        kafka.create_topic("topic")
        config: dict[str, Any] = {
            "bootstrap.servers": proxy.bootstrap,
            "security.protocol": "SASL_PLAINTEXT",
            "sasl.mechanism": "PLAIN",
            "sasl.username": "me",
            "sasl.password": "secret",
        }
        producer = Producer({**config, "linger.ms": 0})
        stays(proxy, producer)
        held = proxy.hold({API["Produce"]})
        producer.produce("topic", b"1")
        assert producer.flush(TIMEOUT) == 0
        assert held.release().error == 0
        assert consume({**config, "group.id": fresh("group")}, "topic", 2) == [b"1", b"1"]
        assert proxy.requests()["SaslAuthenticate"] >= 2
        assert not proxy.not_understood
        wrong = AdminClient({**config, "sasl.password": "wrong"})
        with pytest.raises(KafkaException):
            wrong.list_topics(timeout=2)


# -- three brokers -----------------------------------------------------------------------------------------------------


def leaders(client: AdminClient, topic: str) -> set[int]:
    return {partition.leader for partition in client.list_topics(topic, timeout=TIMEOUT).topics[topic].partitions.values()}


@cluster
def test_three_brokers_are_three_places(kafka_cluster: LocalKafka, fresh: Callable[[str], str]) -> None:
    """Begun with one address: all three are reached here, and a broker that was away comes back to its place."""
    topic = fresh("topic")
    kafka_cluster.create_topic(topic, partitions=9)
    with Proxy(kafka_cluster.bootstrap.split(",")[0]) as proxy:
        admin = AdminClient({"bootstrap.servers": proxy.bootstrap})
        stays(proxy, admin)
        assert set(proxy.routes) == set(kafka_cluster.bootstrap.split(","))
        assert len(set(proxy.routes.values())) == 3
        assert leaders(admin, topic) == {0, 1, 2}
        fill(proxy.bootstrap, topic, numbers(900), partitions=9)
        config = {"bootstrap.servers": proxy.bootstrap, "group.id": fresh("group")}
        assert consume(config, topic, 900) == numbers(900)
        before = proxy.routes
        kafka_cluster.kill(0)
        eventually_leads(admin, topic, without=0)
        fill(before[kafka_cluster.bootstrap.split(",")[1]], topic, numbers(900), partitions=9)
        kafka_cluster.restart(0)
        fill(proxy.bootstrap, topic, numbers(900), partitions=9)
        assert proxy.routes == before
        assert consume({**config, "group.id": fresh("group")}, topic, 2700) == sorted(3 * numbers(900))
        assert not proxy.not_understood


def eventually_leads(admin: AdminClient, topic: str, without: int) -> None:
    deadline = time.monotonic() + 3 * TIMEOUT
    while without in (found := leaders(admin, topic)) or -1 in found:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


@cluster
def test_a_held_request_whose_broker_died_is_not_sent(kafka_cluster: LocalKafka, fresh: Callable[[str], str]) -> None:
    """Its connection went with the broker: the late request is never seen, and that is what is said."""
    topic = fresh("topic")
    kafka_cluster.create_topic(topic)
    with Proxy(kafka_cluster.bootstrap) as proxy:
        admin = AdminClient({"bootstrap.servers": proxy.bootstrap})
        (leader,) = leaders(admin, topic)
        held = proxy.hold({API["Produce"]})
        producer = Producer({"bootstrap.servers": proxy.bootstrap, "linger.ms": 0})
        producer.list_topics(topic, timeout=TIMEOUT)
        producer.produce(topic, b"once")
        assert producer.flush(TIMEOUT) == 0
        kafka_cluster.kill(leader)
        try:
            outcome = held.release()
            assert (outcome.sent, outcome.error) == (False, None)
            assert "the broker had closed the connection" in outcome.detail
        finally:
            kafka_cluster.restart(leader)
        assert values(read_all(kafka_cluster.bootstrap, topic)) == [b"once"]
