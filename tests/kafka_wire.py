"""Kafka's protocol by hand, as far as the tests of transactions need it: what librdkafka would never send, or not now.

What lives here: ``Wire`` (asks a coordinator who a transactional.id belongs to, and ends its transaction in its name), and
``Proxy`` (a broker's other address, where requests can be held back and connections cut).
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from confluent_kafka import IsolationLevel, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec  # the stubs do not re-export it
from typing_extensions import Self

from .conftest import read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT = 10.0  # seconds for everything that must happen

PRODUCE, FIND_COORDINATOR, LEAVE_GROUP, END_TXN, DESCRIBE_TRANSACTIONS = 0, 10, 13, 26, 65
INVALID_PRODUCER_EPOCH, INVALID_TXN_STATE, PRODUCER_FENCED = 47, 48, 90
NOT_THERE_YET = (14, 15, 16)  # the coordinator is loading, not available, or another
GROUP, TRANSACTION = 0, 1  # kinds of coordinators


class Identity(NamedTuple):
    """What the coordinator knows of a transactional.id: Empty, Ongoing, CompleteCommit, ...; and whom it belongs to."""

    state: str
    producer_id: int
    epoch: int


class Wire:
    """A connection to the broker that coordinates a transactional.id.

    Args:
        bootstrap: addresses of which the first is asked.
        transactional_id: whose coordinator is wanted.
    """

    def __init__(self, bootstrap: str, transactional_id: str) -> None:
        self._id = transactional_id
        host, port = bootstrap.split(",", maxsplit=1)[0].rsplit(":", 1)
        self._address = (host, int(port))

    def identity(self) -> Identity:
        """The last transaction, and the producer id and epoch that may go on."""
        name = self._id.encode()
        body = self._answer(DESCRIBE_TRANSACTIONS, 0, b"\2" + bytes([len(name) + 1]) + name + b"\0", flexible=True)
        body = body[1 + 4 + 1 :]  # tags, throttle time, length of the array
        (error,) = struct.unpack_from(">h", body)
        assert error == 0, f"DescribeTransactions: error {error}"
        at = 2 + body[2]  # after the transactional.id, which comes back
        state = body[at + 1 : at + body[at]].decode()
        _timeout, _started, producer_id, epoch = struct.unpack_from(">iqqh", body, at + body[at])
        return Identity(state, producer_id, epoch)

    def wait_for(self, state: str) -> None:
        """Wait until the coordinator says that the transaction is in this state."""
        deadline = time.monotonic() + 2 * TIMEOUT
        while (now := self.identity().state) != state:
            assert time.monotonic() < deadline, f"the transaction is {now}, not {state}"
            time.sleep(0.02)

    def end_txn(self, identity: Identity, *, commit: bool = True) -> int:
        """End the transaction of this producer, as it would with EndTxn v1. Returns the error code."""
        body = _string(self._id) + struct.pack(">qh?", identity.producer_id, identity.epoch, commit)
        _throttled, error = struct.unpack_from(">ih", self._answer(END_TXN, 1, body))
        return int(error)

    def leave_group(self, group: str, *members: str) -> None:
        """Throw members out of a consumer group (classic protocol), as they do themselves with LeaveGroup v1."""
        for member in members:
            answer = _ask(coordinator(self._address, group, GROUP), LEAVE_GROUP, 1, _string(group) + _string(member))
            _throttled, error = struct.unpack_from(">ih", answer)
            assert error == 0, f"LeaveGroup: error {error}"

    def _answer(self, api: int, version: int, body: bytes, *, flexible: bool = False) -> bytes:
        return _ask(coordinator(self._address, self._id, TRANSACTION), api, version, body, flexible=flexible)


def coordinator(address: tuple[str, int], key: str, kind: int) -> tuple[str, int]:
    """Who coordinates a group or a transactional.id, as the broker at this address has heard."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        answer = _ask(address, FIND_COORDINATOR, 1, _string(key) + bytes([kind]))
        _throttled, error, text = struct.unpack_from(">ihh", answer)
        if error == 0:
            at = 8 + max(text, 0) + 4
            (length,) = struct.unpack_from(">h", answer, at)
            host, port = struct.unpack_from(f">{length}si", answer, at + 2)
            return host.decode(), port
        assert error in NOT_THERE_YET, f"FindCoordinator: error {error}"
        time.sleep(0.05)
    raise TimeoutError(f"no coordinator of {key!r}")


def _string(text: str) -> bytes:
    return struct.pack(">h", len(text.encode())) + text.encode()


def _ask(address: tuple[str, int], api: int, version: int, body: bytes, *, flexible: bool = False) -> bytes:
    header = struct.pack(">hhi", api, version, 1) + _string("wire") + (b"\0" if flexible else b"")
    with socket.create_connection(address, timeout=TIMEOUT) as connection:
        connection.sendall(struct.pack(">i", len(header) + len(body)) + header + body)
        answer = receive(connection)
    assert answer is not None, "the broker closed the connection"
    return answer[4:]  # after the correlation id


def receive(connection: socket.socket) -> bytes | None:
    """One frame without its length; None at the end of the connection."""
    length = _exactly(connection, 4)
    return None if length is None else _exactly(connection, *struct.unpack(">i", length))


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        try:
            more = connection.recv(count - len(data))
        except OSError:
            return None
        if not more:
            return None
        data += more
    return data


def visible(bootstrap: str, topic: str) -> list[bytes]:
    """What read_committed readers see of a topic, sorted, once no transaction is open in it.

    X25: a commit is answered before its markers are written; a reader that comes at once would see too little.
    """
    admin = AdminClient({"bootstrap.servers": bootstrap})
    partitions = [
        TopicPartition(topic, number) for number in admin.list_topics(topic, timeout=TIMEOUT).topics[topic].partitions
    ]

    def ends(isolation: IsolationLevel) -> list[int]:
        latest: OffsetSpec = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        answer = admin.list_offsets(dict.fromkeys(partitions, latest), isolation_level=isolation)
        return [answer[partition].result(TIMEOUT).offset for partition in partitions]

    deadline = time.monotonic() + 2 * TIMEOUT
    while ends(IsolationLevel.READ_COMMITTED) != ends(IsolationLevel.READ_UNCOMMITTED):
        assert time.monotonic() < deadline, f"a transaction is open in {topic!r}"
        time.sleep(0.02)
    return values(read_all(bootstrap, topic))


class Held:
    """A request that the proxy keeps. Its connection to the broker stays open, whatever becomes of the client."""

    def __init__(self, frame: bytes, link: _Link) -> None:
        self._frame = frame
        self._link = link

    def send(self) -> None:
        """Send it to the broker after all; whoever waits for the answer gets it."""
        self._link.to_broker(self._frame)

    def answer(self, content: bytes) -> None:
        """Answer it in place of the broker, which does not get it: with this, behind the correlation id."""
        self._link.to_client(self._frame[4:8] + content)

    def release(self) -> int:
        """Send it to the broker after all. Returns the error code of the answer, where this is EndTxn."""
        return int(struct.unpack_from(">ih", self._link.ask(self._frame), 4)[1])


class Proxy:
    """Another address of a broker; clients that begin here stay here, since the broker's address is replaced in its answers.

    A context manager.

    Args:
        bootstrap: the broker, ``"127.0.0.1:port"``: one only.
    """

    def __init__(self, bootstrap: str) -> None:
        host, port = bootstrap.split(",", maxsplit=1)[0].rsplit(":", 1)
        self.broker = (host, int(port))
        self._port = 0
        self.up()
        self.theirs = host.encode() + struct.pack(">i", int(port))
        self.ours = host.encode() + struct.pack(">i", self._port)  # of the same length: no frame changes its size
        self._links: list[_Link] = []
        self._holding: tuple[int, Callable[[Held], None]] | None = None

    @property
    def bootstrap(self) -> str:
        """What goes into ``bootstrap.servers``."""
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        for link in self._links:
            link.close()

    def up(self) -> None:
        """Accept connections."""
        self._server = socket.create_server(("127.0.0.1", self._port))
        self._port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and close those of all clients."""
        with suppress(OSError):  # wakes the thread that accepts
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()

    def hold_next(self, api: int, then: Callable[[Held], None]) -> None:
        """Keep the next request of this kind, and call ``then`` with it, in the thread of its connection."""
        self._holding = (api, then)

    def take(self, frame: bytes, link: _Link) -> bool:
        """Whether a request is held back."""
        if self._holding is None or struct.unpack_from(">h", frame)[0] != self._holding[0]:
            return False
        (_, then), self._holding = self._holding, None
        then(Held(frame, link))
        return True

    def cut(self) -> None:
        """Close the connections of all clients, and leave those to the broker open."""
        for link in self._links:
            link.cut()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            self._links.append(_Link(self, client))


class _Link:
    """One client's connection, and the one to the broker that belongs to it."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._broker = socket.create_connection(proxy.broker)
        self._wanted: bytes | None = None
        self._answer: bytes = b""
        self._answered = threading.Event()
        for pump in (self._requests, self._answers):
            threading.Thread(target=pump, daemon=True).start()

    def _requests(self) -> None:
        while (frame := receive(self._client)) is not None:
            if not self._proxy.take(frame, self):
                self.to_broker(frame)

    def _answers(self) -> None:
        while (frame := receive(self._broker)) is not None:
            if frame[:4] == self._wanted:
                self._answer = frame
                self._answered.set()
            self.to_client(frame.replace(self._proxy.theirs, self._proxy.ours))
        self.cut()

    def to_broker(self, frame: bytes) -> None:
        with suppress(OSError):
            self._broker.sendall(struct.pack(">i", len(frame)) + frame)

    def to_client(self, frame: bytes) -> None:
        with suppress(OSError):
            self._client.sendall(struct.pack(">i", len(frame)) + frame)

    def ask(self, frame: bytes) -> bytes:
        self._wanted = frame[4:8]  # the correlation id
        self.to_broker(frame)
        assert self._answered.wait(TIMEOUT), "the broker did not answer"
        return self._answer

    def cut(self) -> None:
        with suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)
        self._client.close()

    def close(self) -> None:
        self.cut()
        with suppress(OSError):
            self._broker.shutdown(socket.SHUT_RDWR)
        self._broker.close()
