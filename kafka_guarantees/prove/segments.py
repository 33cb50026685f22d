"""What the brokers have on their disks, in words: kept with every anomaly, for whoever looks for its cause.

Readers of a topic see records. Which producer wrote them (its id and epoch), and which marker ended its transaction, is only in
the batches of the log, and answers most questions at once.
"""

from __future__ import annotations

import shutil
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_PREFIX = struct.Struct(">qi")  # base offset, length of the rest
_HEADER = struct.Struct(">iBIhiqqqhii")  # the rest of a batch's header, in the format that Kafka has written since 0.11
_TRANSACTIONAL, _CONTROL = 0x10, 0x20
_MARKERS = {0: "ABORT", 1: "COMMIT"}
INTERNAL = "__transaction_state"  # copied as it is: which transaction was in which state, and when


class Batch(NamedTuple):
    """What a producer, or a transaction coordinator, appended at once."""

    first: int
    last: int
    timestamp: int
    producer_id: int
    epoch: int
    sequence: int
    transactional: bool
    marker: str | None

    def __str__(self) -> str:
        """One line."""
        who = f"producer {self.producer_id} epoch {self.epoch}" if self.producer_id >= 0 else "no producer id"
        what = self.marker or f"sequence {self.sequence}{', in a transaction' if self.transactional else ''}"
        return f"{self.first}-{self.last}  {who}  {what}  at {self.timestamp}"


def batches(segment: bytes) -> Iterator[Batch]:
    """The batches of one segment of a log. Ends where the segment does, or where it is not understood."""
    at = 0
    while at + _PREFIX.size + _HEADER.size <= len(segment):
        first, length = _PREFIX.unpack_from(segment, at)
        header = _HEADER.unpack_from(segment, at + _PREFIX.size)
        _, magic, _, attributes, last_delta, _, timestamp, producer_id, epoch, sequence, _ = header
        if magic != 2 or length <= 0:  # noqa: PLR2004 - the format's number
            return
        marker = None
        if attributes & _CONTROL:
            # of its one record: length, attributes, two deltas, length of the key: a byte each; then the key's version and type
            (kind,) = struct.unpack_from(">h", segment, at + _PREFIX.size + _HEADER.size + 7)
            marker = _MARKERS.get(kind, f"control {kind}")
        yield Batch(
            first, first + last_delta, timestamp, producer_id, epoch, sequence, bool(attributes & _TRANSACTIONAL), marker
        )
        at += _PREFIX.size + length


def dump(node: Path, topics: Iterable[str], folder: Path) -> None:
    """Write the batches of some topics into a folder, a file for each partition, and copy the coordinators' logs.

    Args:
        node: the data folder of one broker, or one with those of several. Of every partition the longest copy is taken.
        topics: names.
        folder: where to.
    """
    found: dict[str, Path] = {}
    for path in (path for path in node.rglob("*.log") if path.stem.isdigit()):
        name = f"{path.parent.name}.{path.stem}"
        if name not in found or path.stat().st_size > found[name].stat().st_size:
            found[name] = path
    for name, path in found.items():
        topic = path.parent.name.rpartition("-")[0]
        if topic == INTERNAL and path.stat().st_size:
            shutil.copyfile(path, folder / f"{name}.dump")
        elif topic in topics:
            (folder / f"{name}.dump").write_text("".join(f"{batch}\n" for batch in batches(path.read_bytes())))
