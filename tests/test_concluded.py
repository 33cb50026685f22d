"""P13: what librdkafka takes for written because a later record was. On a real broker, behind a relay that answers once for it.

A partition gets a new leader, or is made, while a producer sends its first records to it: the first request is answered with
"not the leader", and the one after it is taken, since a broker that has nothing of a producer takes any sequence number.
"""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees import AtLeastOnce, DeliveryUnknown, ExactlyOnce, Record, TransactionAborted
from kafka_guarantees.testing.local_kafka import LocalKafka

from .conftest import fill, read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.broker

PRODUCE, NOT_LEADER = 0, 6
DEADLINE = 20.0  # seconds


def frame(connection: socket.socket) -> bytes:
    """The next one, without its length."""
    (length,) = struct.unpack(">i", exactly(connection, 4))
    return exactly(connection, length)


def exactly(connection: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        more = connection.recv(size - len(got))
        if not more:
            raise EOFError
        got += more
    return got


def send(connection: socket.socket, content: bytes) -> None:
    connection.sendall(struct.pack(">i", len(content)) + content)


def not_leader(correlation: int, topic: str) -> bytes:
    """An answer to Produce, of version 9 or 10, for partition 0."""
    name = bytes([len(topic) + 1]) + topic.encode()
    partition = struct.pack(">ihqqq", 0, NOT_LEADER, -1, -1, -1) + b"\1\0\0"
    return struct.pack(">i", correlation) + b"\0\2" + name + b"\2" + partition + b"\0" + struct.pack(">i", 0) + b"\0"


class Relay:
    """In front of a broker that names it as its own address. Passes everything on, but for one Produce after ``arm``."""

    def __init__(self) -> None:
        self.behind = 0  # the broker's port
        self.swallowed = threading.Event()
        self._armed: str | None = None
        self._first = self._second = -1
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets, self._threads = [self._server], [threading.Thread(target=self._accept)]
        self.port: int = self._server.getsockname()[1]
        self._threads[0].start()

    def arm(self, topic: str) -> None:
        """The next Produce does not arrive; it is answered as by a broker that is not the leader, before the one after it."""
        self.swallowed.clear()
        self._armed, self._first, self._second = topic, -1, -1

    def close(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._server.accept()[0]
                self._sockets.append(client)
                with suppress(ConnectionError):  # the broker is not there yet: the client finds that out
                    broker = socket.create_connection(("127.0.0.1", self.behind))
                    self._sockets.append(broker)
                    for passing, source, sink in ((self._up, client, broker), (self._down, broker, client)):
                        self._threads.append(threading.Thread(target=self._pass, args=(passing, source, sink)))
                        self._threads[-1].start()
                    continue
                client.close()

    @staticmethod
    def _pass(passing: Callable[[bytes, socket.socket], None], source: socket.socket, sink: socket.socket) -> None:
        with suppress(EOFError, OSError):
            while True:
                passing(frame(source), sink)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _up(self, request: bytes, broker: socket.socket) -> None:
        api, _version, correlation = struct.unpack(">hhi", request[:8])
        if api == PRODUCE and self._armed is not None:
            if self._first < 0:
                self._first = correlation
                self.swallowed.set()
                return
            if self._second < 0:
                self._second = correlation
        send(broker, request)

    def _down(self, answer: bytes, client: socket.socket) -> None:
        (correlation,) = struct.unpack(">i", answer[:4])
        if self._armed is not None and correlation == self._second:
            send(client, not_leader(self._first, self._armed))
            self._armed = None
        send(client, answer)


@pytest.fixture(scope="module")
def relay() -> Iterator[tuple[Relay, LocalKafka]]:
    with closing(Relay()) as relay:

        class Behind(LocalKafka):
            def _spawn(self, n: int) -> None:
                relay.behind = self._ports[n][0]
                super()._spawn(n)

        with Behind(config={"advertised.listeners": f"PLAINTEXT://127.0.0.1:{relay.port}"}) as kafka:
            yield relay, kafka


def made(kafka: LocalKafka, topic: str) -> dict[str, Any]:
    """Configuration of a client for a new topic."""
    kafka.create_topic(topic)
    return {"bootstrap.servers": kafka.bootstrap, "linger.ms": 0, "group.id": topic}


def test_a_record_that_is_taken_for_written_is_not_acknowledged(relay: tuple[Relay, LocalKafka]) -> None:
    """A success was reported of a record that is nowhere. Who asks is told that it may not be there."""
    behind, kafka = relay
    config = made(kafka, "delivered")
    with AtLeastOnce(config) as client:
        behind.arm("delivered")
        first = client.produce("delivered", b"1")
        assert behind.swallowed.wait(DEADLINE)
        client.produce("delivered", b"2").result(DEADLINE)
        with pytest.raises(DeliveryUnknown, match="no broker has said where this one is"):
            first.result(DEADLINE)
    assert values(read_all(kafka.bootstrap, "delivered")) == [b"2"], "then this test shows nothing"


def test_no_offset_is_committed_for_an_output_that_is_taken_for_written(relay: tuple[Relay, LocalKafka]) -> None:
    """The message that it was made of is handled again."""
    behind, kafka = relay
    config = made(kafka, "posted")
    kafka.create_topic("posted-in")
    fill(kafka.bootstrap, "posted-in", [b"1", b"2"])

    def handler(message: Any) -> Record:
        if message.value() == b"2":
            assert behind.swallowed.wait(DEADLINE)
        return Record("posted", message.value())

    with AtLeastOnce(config) as client:
        behind.arm("posted")
        with suppress(DeliveryUnknown):
            client.run(["posted-in"], handler, until_idle=1)
    with AtLeastOnce(config) as client:
        client.run(["posted-in"], handler, until_idle=1)
    assert set(values(read_all(kafka.bootstrap, "posted"))) == {b"1", b"2"}


def test_a_transaction_is_not_committed_without_a_record_of_it(relay: tuple[Relay, LocalKafka]) -> None:
    """It was, with a record that no broker has. It is aborted, and can be tried again."""
    behind, kafka = relay
    config = {**made(kafka, "committed"), "transactional.id": "committed"}
    with ExactlyOnce(config) as client:
        behind.arm("committed")
        with pytest.raises(TransactionAborted), client.transaction() as transaction:  # noqa: PT012 - the block commits
            transaction.produce("committed", b"1")
            assert behind.swallowed.wait(DEADLINE)
            transaction.produce("committed", b"2")
        with client.transaction() as transaction:
            transaction.produce("committed", b"3")
    assert values(read_all(kafka.bootstrap, "committed")) == [b"3"]
