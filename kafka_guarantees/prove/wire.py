"""Kafka's protocol, as far as a proxy has to look into it: whose request this is, and where brokers' addresses are in answers.

What lives here: ``read_request`` (the head of a request), ``rewrite_answer`` (other addresses in the place of brokers', and
lower versions in the place of those that cannot be looked into), ``error_code`` (what a broker said to a request),
``partitions`` (of a Produce), ``not_leader`` (what a broker says that does not lead them).

Rules.
    * Pure: bytes in, bytes out. What is not replaced stays as it was, byte for byte.
    * Whatever cannot be understood raises ``WireError``, and nothing else.
    * The layouts are those of Kafka 4.4's message definitions (``clients/src/main/resources/common/message``).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

API = {
    "Produce": 0,
    "Fetch": 1,
    "ListOffsets": 2,
    "Metadata": 3,
    "OffsetCommit": 8,
    "OffsetFetch": 9,
    "FindCoordinator": 10,
    "JoinGroup": 11,
    "Heartbeat": 12,
    "LeaveGroup": 13,
    "SyncGroup": 14,
    "SaslHandshake": 17,
    "ApiVersions": 18,
    "CreateTopics": 19,
    "InitProducerId": 22,
    "OffsetForLeaderEpoch": 23,
    "AddPartitionsToTxn": 24,
    "AddOffsetsToTxn": 25,
    "EndTxn": 26,
    "TxnOffsetCommit": 28,
    "SaslAuthenticate": 36,
    "DescribeCluster": 60,
    "ConsumerGroupHeartbeat": 68,
    "ShareFetch": 78,
    "ShareAcknowledge": 79,
}
API_NAME = {number: name for name, number in API.items()}

# The highest versions whose answers can be looked into. Produce from 10 and Fetch from 16 carry the address of a new leader in
# tagged fields (KIP-951), behind everything that was produced or fetched: a client that never hears of those versions asks for
# Metadata instead, as all did before. The others are as far as this file's layouts go.
CAPS = {
    API["Produce"]: 9,
    API["Fetch"]: 15,
    API["Metadata"]: 13,
    API["FindCoordinator"]: 6,
    API["ApiVersions"]: 4,
    API["DescribeCluster"]: 2,
}
# They carry such addresses in every version. Share groups are not part of any guarantee here.
HIDDEN = (API["ShareFetch"], API["ShareAcknowledge"])
# A client that sees level 2 leaves AddPartitionsToTxn to Produce v12 (KIP-890), which CAPS takes away. librdkafka 2.16 does
# neither; once it does, NodeEndpoints of Produce must be parsed instead, or a proof would be about another protocol.
_FEATURE, _FEATURE_LEVEL = "transaction.version", 1

# From which version on an answer has compact lengths and tagged fields, in its header too. ApiVersions' header never has them.
_FLEXIBLE = {
    API["Produce"]: 9,
    API["Metadata"]: 9,
    API["OffsetCommit"]: 8,
    API["FindCoordinator"]: 3,
    API["AddPartitionsToTxn"]: 3,
    API["AddOffsetsToTxn"]: 3,
    API["EndTxn"]: 3,
    API["TxnOffsetCommit"]: 3,
    API["DescribeCluster"]: 0,
}
_UNSUPPORTED_VERSION = 35
_NOT_LEADER_OR_FOLLOWER = 6
_PORTS = range(1, 65_536)
_MAX_FRAME = 256 * 1024 * 1024  # brokers' own limit is 100 MiB for requests; answers to Fetch are smaller
_TLS_RECORD = b"\x16\x03"
_UUID = 16


class WireError(ValueError):
    """These bytes are not what they should be."""


class Request(NamedTuple):
    """The head of a request.

    Attributes:
        api: the API key, as in ``API``.
        version: of the API.
        correlation: what comes back in the answer.
        client_id: of the client that sent it.
        acks: of Produce.
    """

    api: int
    version: int
    correlation: int
    client_id: str
    acks: int | None = None

    @property
    def answered(self) -> bool:
        """Whether the broker answers it: all but Produce with acks=0."""
        return self.acks != 0

    @property
    def name(self) -> str:
        """What Kafka calls the API."""
        return API_NAME.get(self.api, f"API {self.api}")

    def __str__(self) -> str:
        return f"{self.name} v{self.version} of {self.client_id!r}"


def addresses(bootstrap: str) -> list[tuple[str, int]]:
    """Host and port of each bootstrap server, written as librdkafka takes them.

    Raises:
        ValueError: there is none, one is for TLS, or a port is not a number.
    """
    found = []
    for server in filter(None, (part.strip() for part in bootstrap.split(","))):
        protocol, _, rest = server.rpartition("://")
        if protocol.upper() not in ("", "PLAINTEXT", "SASL_PLAINTEXT"):
            raise ValueError(f"{server!r}: a proxy can look into PLAINTEXT and SASL_PLAINTEXT only")
        host, colon, port = rest.rpartition(":")
        if not colon or rest.endswith("]"):
            host, port = rest, "9092"  # librdkafka's default
        found.append((host.removeprefix("[").removesuffix("]"), int(port)))
    if not found:
        raise ValueError("bootstrap servers: there is none")
    return found


def frame_length(head: bytes) -> int:
    """How many bytes follow the four that every frame begins with.

    Raises:
        WireError: this is not Kafka's framing, so that nothing after it can be understood either.
    """
    if head.startswith(_TLS_RECORD):
        raise WireError("this is TLS, which a proxy cannot look into")
    (length,) = struct.unpack(">i", head)
    if not 0 <= length <= _MAX_FRAME:
        raise WireError(f"a frame of {length} bytes")
    return int(length)


def read_request(frame: bytes) -> Request:
    """The head of a request, which is the same in all versions.

    Raises:
        WireError: it is none.
    """
    return _head(_Reader(frame))


def correlation_id(frame: bytes) -> int:
    """Which request an answer belongs to.

    Raises:
        WireError: there is no room for it.
    """
    return _Reader(frame).int32()


def rewrite_answer(request: Request, frame: bytes, address: Callable[[str, int], tuple[str, int]]) -> bytes:
    """An answer with other addresses of brokers, or with lower versions of APIs; all others as they are.

    Args:
        request: what it answers.
        frame: it, from the correlation id on.
        address: the replacement of a broker's host and port. Called after all of them were read.

    Raises:
        WireError: it cannot be looked into.
    """
    if request.api in HIDDEN or request.version > CAPS.get(request.api, request.version):
        raise WireError(f"{request}: a version whose answers cannot be looked into")
    layout = _LAYOUTS.get(request.api)
    if layout is None:
        return frame
    edits = [
        edit if isinstance(edit, _Edit) else edit.replaced_by(*address(edit.host, edit.port))
        for edit in list(layout(_answer(request, frame), request.version))
    ]
    return _apply(frame, edits)


def error_code(request: Request, frame: bytes) -> int | None:
    """The error code in the answer to a request that changes something; of several, the first that is not 0.

    None where this API's answers are not understood here.

    Raises:
        WireError: the answer is not what it should be.
    """
    codes = _ERRORS.get(request.api)
    if codes is None or (request.api == API["AddPartitionsToTxn"] and request.version > 3):  # noqa: PLR2004 - brokers' own
        return None
    return next((code for code in list(codes(_answer(request, frame), request.version)) if code), 0)


def partitions(frame: bytes) -> set[tuple[str, int]]:
    """What a Produce is for.

    Raises:
        WireError: it is no Produce, or none that can be looked into.
    """
    _, _, topics = _produce(frame)
    return {(topic, number) for topic, numbers in topics for number in numbers}


def not_leader(frame: bytes) -> bytes:
    """What a broker says to a Produce that leads none of its partitions: nothing of it is written.

    Raises:
        WireError: it is no Produce, or none that can be looked into.
    """
    request, flexible, topics = _produce(frame)
    version = request.version
    end = b"\0" if flexible else b""  # of what may have tagged fields
    refused = struct.pack(">hq", _NOT_LEADER_OR_FOLLOWER, -1)  # no offset
    refused += struct.pack(">q", -1) * ((version >= 2) + (version >= 5))  # noqa: PLR2004 - nor times, nor a first offset
    if version >= 8:  # noqa: PLR2004 - KIP-467: nothing about single records, and no text
        refused += _count(0, flexible) + _string(None, flexible)
    answers = [
        _string(topic, flexible) + _array([struct.pack(">i", number) + refused + end for number in numbers], flexible) + end
        for topic, numbers in topics
    ]
    throttle = struct.pack(">i", 0) if version >= 1 else b""
    return struct.pack(">i", request.correlation) + end + _array(answers, flexible) + throttle + end


# -- reading -----------------------------------------------------------------------------------------------------------


class _Reader:
    """A place in a frame. Nothing is read beyond its end."""

    def __init__(self, data: bytes, *, flexible: bool = False) -> None:
        self.data = data
        self.at = 0
        self.flexible = flexible

    def skip(self, count: int) -> int:
        """Go on by so many bytes. Returns where they began."""
        start = self.at
        if count < 0 or start + count > len(self.data):
            raise WireError(f"{count} bytes are missing at {start} of {len(self.data)}")
        self.at = start + count
        return start

    def int16(self) -> int:
        return int(struct.unpack_from(">h", self.data, self.skip(2))[0])

    def int32(self) -> int:
        return int(struct.unpack_from(">i", self.data, self.skip(4))[0])

    def varint(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.data[self.skip(1)]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:  # noqa: PLR2004 - the last
                return value
        raise WireError(f"a number without end at {self.at}")

    def string(self) -> str | None:
        length = self.varint() - 1 if self.flexible else self.int16()
        if length == -1:
            return None
        start = self.skip(length)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as exc:
            raise WireError(f"not UTF-8 at {start}") from exc

    def count(self) -> int:
        """How many elements an array has; 0 where it is null."""
        count = self.varint() - 1 if self.flexible else self.int32()
        if not -1 <= count <= len(self.data) - self.at:  # each has a byte at least
            raise WireError(f"an array of {count} at {self.at} of {len(self.data)}")
        return max(count, 0)

    def tags(self) -> None:
        for _ in self.each_tag():
            pass

    def each_tag(self) -> Iterator[int]:
        """Stands at the value of each tagged field, and goes on behind it."""
        for _ in range(self.varint() if self.flexible else 0):
            tag, size = self.varint(), self.varint()
            end = self.skip(size) + size
            self.at = end - size
            yield tag
            self.at = end


class _Edit(NamedTuple):
    """Other bytes for those from ``start`` to ``end``."""

    start: int
    end: int
    new: bytes


class _Address(NamedTuple):
    """Where a broker's host and port are, one after the other, and what they say."""

    start: int
    end: int
    host: str
    port: int
    flexible: bool

    def replaced_by(self, host: str, port: int) -> _Edit:
        return _Edit(self.start, self.end, _string(host, self.flexible) + struct.pack(">i", port))


def _head(reader: _Reader) -> Request:
    """The head of a request, up to the acks of a Produce."""
    api, version, correlation = reader.int16(), reader.int16(), reader.int32()
    if api < 0 or version < 0:
        raise WireError(f"a request with API key {api} and version {version}")
    client_id = reader.string() or ""
    acks = None
    if api == API["Produce"]:
        reader.flexible = version >= _FLEXIBLE[api]
        reader.tags()
        if version >= 3:  # noqa: PLR2004 - transactional.id
            reader.string()
        acks = reader.int16()
    return Request(api, version, correlation, client_id, acks)


def _produce(frame: bytes) -> tuple[Request, bool, list[tuple[str, list[int]]]]:
    """A Produce: its head, whether it has compact lengths, its topics with the numbers of their partitions."""
    reader = _Reader(frame)
    request = _head(reader)
    if request.api != API["Produce"] or request.version > CAPS[request.api]:
        raise WireError(f"{request}: no Produce that can be looked into")
    reader.int32()  # timeout
    return request, reader.flexible, list(_produced(reader))


def _produced(reader: _Reader) -> Iterator[tuple[str, list[int]]]:
    for _ in range(reader.count()):
        topic, numbers = reader.string() or "", []
        for _ in range(reader.count()):
            numbers.append(reader.int32())
            reader.skip(max(0, reader.varint() - 1 if reader.flexible else reader.int32()))  # the records
            reader.tags()
        reader.tags()
        yield topic, numbers


def _answer(request: Request, frame: bytes) -> _Reader:
    """An answer behind its header."""
    reader = _Reader(frame, flexible=request.version >= _FLEXIBLE.get(request.api, request.version + 1))
    reader.int32()
    reader.tags()
    return reader


def _apply(frame: bytes, edits: list[_Edit]) -> bytes:
    parts, at = [], 0
    for edit in sorted(edits):
        parts += [frame[at : edit.start], edit.new]
        at = edit.end
    return b"".join([*parts, frame[at:]])


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:  # noqa: PLR2004 - seven bits are left
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _string(text: str | None, flexible: bool) -> bytes:  # noqa: FBT001 - as the reader's
    data = b"" if text is None else text.encode()
    length = -1 if text is None else len(data)
    return (_varint(length + 1) if flexible else struct.pack(">h", length)) + data


def _count(number: int, flexible: bool) -> bytes:  # noqa: FBT001 - as above
    return _varint(number + 1) if flexible else struct.pack(">i", number)


def _array(elements: list[bytes], flexible: bool) -> bytes:  # noqa: FBT001 - as above
    return _count(len(elements), flexible) + b"".join(elements)


# -- where addresses and versions are ----------------------------------------------------------------------------------


def _address(reader: _Reader) -> Iterator[_Address]:
    """Host and port that stand here. None of an answer that names no broker: an empty name and no port."""
    start = reader.at
    host, port = reader.string(), reader.int32()
    if not host and port == -1:
        return
    if not host or port not in _PORTS:
        raise WireError(f"a broker at {host!r}:{port}")
    yield _Address(start, reader.at, host, port, reader.flexible)


def _metadata(reader: _Reader, version: int) -> Iterator[_Address]:
    if version >= 3:  # noqa: PLR2004 - throttle time
        reader.int32()
    for _ in range(reader.count()):
        reader.int32()  # node id
        yield from _address(reader)
        if version >= 1:
            reader.string()  # rack
        reader.tags()


def _find_coordinator(reader: _Reader, version: int) -> Iterator[_Address]:
    if version >= 1:
        reader.int32()  # throttle time
    if version >= 4:  # noqa: PLR2004 - many at once (KIP-699)
        for _ in range(reader.count()):
            reader.string()  # key
            reader.int32()  # node id
            yield from _address(reader)
            reader.int16()  # error
            reader.string()  # error message
            reader.tags()
        return
    reader.int16()  # error
    if version >= 1:
        reader.string()  # error message
    reader.int32()  # node id
    yield from _address(reader)


def _describe_cluster(reader: _Reader, version: int) -> Iterator[_Address]:
    reader.skip(4 + 2)  # throttle time, error
    reader.string()  # error message
    if version >= 1:
        reader.skip(1)  # brokers or controllers
    reader.string()  # cluster id
    reader.int32()  # controller
    for _ in range(reader.count()):
        reader.int32()  # node id
        yield from _address(reader)
        reader.string()  # rack
        if version >= 2:  # noqa: PLR2004 - fenced
            reader.skip(1)
        reader.tags()


def _api_versions(reader: _Reader, version: int) -> Iterator[_Edit]:
    if reader.int16() == _UNSUPPORTED_VERSION:
        version = 0  # KIP-511: such an answer is one of version 0, whatever was asked for
    reader.flexible = version >= 3  # noqa: PLR2004 - but its header is not (KIP-511)
    start = reader.at
    count, begin, hidden = reader.count(), reader.at, 0
    for _ in range(count):
        entry = reader.at
        api, _lowest, highest = reader.int16(), reader.int16(), reader.int16()
        end = reader.at
        reader.tags()
        if api in HIDDEN:
            hidden += 1
            yield _Edit(entry, reader.at, b"")
        elif highest > CAPS.get(api, highest):
            yield _Edit(end - 2, end, struct.pack(">h", CAPS[api]))
    if hidden:
        yield _Edit(start, begin, _count(count - hidden, reader.flexible))
    if version >= 1:
        reader.int32()  # throttle time
    for tag in reader.each_tag():
        if tag == 2:  # noqa: PLR2004 - finalized features
            yield from _features(reader)


def _features(reader: _Reader) -> Iterator[_Edit]:
    for _ in range(reader.count()):
        name = reader.string()
        start = reader.at
        levels = reader.int16(), reader.int16()
        if name == _FEATURE:
            yield _Edit(start, reader.at, struct.pack(">hh", *(min(level, _FEATURE_LEVEL) for level in levels)))
        reader.tags()


_LAYOUTS: dict[int, Callable[[_Reader, int], Iterator[_Edit | _Address]]] = {
    API["Metadata"]: _metadata,
    API["FindCoordinator"]: _find_coordinator,
    API["ApiVersions"]: _api_versions,
    API["DescribeCluster"]: _describe_cluster,
}


# -- where error codes are ---------------------------------------------------------------------------------------------


def _error_alone(reader: _Reader, _version: int) -> Iterator[int]:
    """EndTxn, AddOffsetsToTxn."""
    reader.int32()  # throttle time
    yield reader.int16()


def _errors_of_partitions(reader: _Reader, version: int) -> Iterator[int]:
    """AddPartitionsToTxn up to 3, TxnOffsetCommit."""
    reader.int32()  # throttle time
    yield from _errors_of_topics(reader, by_id=version >= 6)  # noqa: PLR2004 - KIP-1319


def _errors_of_offsets(reader: _Reader, version: int) -> Iterator[int]:
    if version >= 3:  # noqa: PLR2004 - throttle time
        reader.int32()
    yield from _errors_of_topics(reader, by_id=version >= 10)  # noqa: PLR2004 - KIP-848


def _errors_of_topics(reader: _Reader, *, by_id: bool) -> Iterator[int]:
    for _ in range(reader.count()):
        if by_id:
            reader.skip(_UUID)
        else:
            reader.string()
        for _ in range(reader.count()):
            reader.int32()  # partition
            yield reader.int16()
            reader.tags()
        reader.tags()


def _errors_of_produce(reader: _Reader, version: int) -> Iterator[int]:
    if version > CAPS[API["Produce"]]:
        raise WireError(f"Produce v{version}: a version whose answers cannot be looked into")
    for _ in range(reader.count()):
        reader.string()  # topic
        for _ in range(reader.count()):
            reader.int32()  # partition
            yield reader.int16()
            # offset; from 2 on the time of appending, and from 5 on the first offset of the log
            reader.skip(8 * (1 + (version >= 2) + (version >= 5)))  # noqa: PLR2004
            if version >= 8:  # noqa: PLR2004 - KIP-467
                for _ in range(reader.count()):
                    reader.int32()  # place in the batch
                    reader.string()  # error message
                    reader.tags()
                reader.string()  # error message
            reader.tags()
        reader.tags()


_ERRORS: dict[int, Callable[[_Reader, int], Iterator[int]]] = {
    API["Produce"]: _errors_of_produce,
    API["OffsetCommit"]: _errors_of_offsets,
    API["AddPartitionsToTxn"]: _errors_of_partitions,
    API["AddOffsetsToTxn"]: _error_alone,
    API["EndTxn"]: _error_alone,
    API["TxnOffsetCommit"]: _errors_of_partitions,
}
