"""What an inbox decides without its database: what is fresh, how far the offsets may move, and whether they have gone back.

Rules.
* An offset passes what was handled, what is behind it, and repeats of what was handled; it never passes anything else (D20).
* A repeat of an id that is not handled stays as well: passed over, the id would be lost.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from ..errors import KafkaGuaranteesError, MessageIdReused, PartitionFenced, TopicRecreated
from .ids import FINGERPRINT_SIZE, KEY_SIZE

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from .contract import Entry, Source

    Offsets = Mapping[Source, int | None]  # where to go on; None: nothing of the partition was handled yet

_FINGERPRINT = itemgetter(3)  # of an entry

_FOREIGN_KEY = "23503"  # SQLSTATE of what breaks one
UNFINISHED = "_not_finished"  # behind the prefix: the constraint that a COMMIT before the move of the offsets breaks


class Batch(NamedTuple):
    """The entries of one transaction.

    Attributes:
        entries: as they were given.
        first: the first offset of each partition, in the order of topics and partitions: locks are taken in it (D13).
        after: the offset after the last one of each partition.
        keys: each key once, sorted: ids are inserted in this order (D13).
        fingerprints: of these keys; empty: they are not compared.
        distinct: whether no record and no key comes twice.
    """

    entries: Sequence[Entry]
    first: dict[Source, int]
    after: dict[Source, int]
    keys: list[bytes]
    fingerprints: Mapping[bytes, bytes]
    distinct: bool

    @property
    def guard(self) -> Source:
        """The partition whose row says that the transaction is not finished, of a batch that has any."""
        return next(iter(self.first))


class Advance(NamedTuple):
    """What is written at the end of a transaction.

    Attributes:
        offsets: the next offset of each partition whose offset moves, in the order of topics and partitions.
        forget: the keys of entries that are not handled, sorted.
    """

    offsets: dict[Source, int]
    forget: list[bytes]


def batch_of(entries: Sequence[Entry]) -> Batch:
    """Look at the entries once.

    Raises:
        ValueError: the offsets of a partition do not ascend, a topic has two ids, or a key or a fingerprint is not a digest.
    """
    first: dict[Source, int] = {}
    after: dict[Source, int] = {}
    records, keys = _look(entries, first, after)
    if len(first) > 1 and len({source[:2] for source in first}) > len({source.topic for source in first}):
        raise ValueError("a topic comes with two ids: one of them is of a topic that was deleted and created again")
    for size in set(map(len, keys)):
        if size != KEY_SIZE:
            raise ValueError(f"a key has {KEY_SIZE} bytes, not {size}: it is a digest of the message id")
    fingerprints: dict[bytes, bytes] = {}
    if keys and any(map(_FINGERPRINT, entries)):
        fingerprints = {key: fingerprint for _, _, key, fingerprint in entries if key is not None}
    if not set(map(len, fingerprints.values())) <= {FINGERPRINT_SIZE}:
        raise ValueError(f"a fingerprint has {FINGERPRINT_SIZE} bytes, and all entries with a key have one, or none has")
    distinct = sorted(set(keys))
    in_order = {source: first[source] for source in sorted(first)}
    return Batch(entries, in_order, after, distinct, fingerprints, len(distinct) == len(keys) and records == len(entries))


def _look(entries: Sequence[Entry], first: dict[Source, int], after: dict[Source, int]) -> tuple[int, list[bytes]]:
    """Note the first offset of each partition, and that after its last. Returns how many records these are, and their keys."""
    keys: list[bytes] = []
    records = len(entries)
    current, last = None, -1  # those of a partition stand together, mostly: a dict is asked once for all of them
    for source, offset, key, _ in entries:
        if source is not current:
            if current is not None:
                after[current] = last + 1
            current, last = source, after.get(source, offset) - 1
            first.setdefault(source, offset)
        if offset <= last:
            if offset < last:
                raise ValueError(f"offset {offset} of {_name(source)} comes after offset {last}: sort the entries")
            records -= 1  # the same record again
        last = offset
        if key is not None:
            keys.append(key)
    if current is not None:
        after[current] = last + 1
    return records, keys


def pending(batch: Batch, stored: Offsets) -> Sequence[int]:
    """The indexes of the entries that are not behind the stored offsets, and of each key only the first of them.

    Raises:
        MessageIdReused: two of them have one key, and different fingerprints.
    """
    for source, offset in batch.first.items():
        if not batch.distinct or (stored[source] or 0) > offset:
            break
    else:  # the usual batch
        return range(len(batch.entries))
    expected = {source: offset or 0 for source, offset in stored.items()}
    seen: dict[bytes, bytes] = {}
    found = []
    for index, (source, offset, key, fingerprint) in enumerate(batch.entries):
        if offset >= expected[source]:
            expected[source] = offset + 1
            if key is None or key not in seen:
                found.append(index)
                if key is not None:
                    seen[key] = fingerprint
            elif seen[key] and fingerprint and seen[key] != fingerprint:
                raise reused(batch, index)
    return found


def compare(batch: Batch, waiting: Sequence[int], known: Mapping[bytes, bytes | None]) -> None:
    """Look at the fingerprints of those of ``pending()`` whose key the database has known, with its fingerprint or without.

    Raises:
        MessageIdReused: one has another.
    """
    for index in waiting if known else ():
        _, _, key, fingerprint = batch.entries[index]
        before = known.get(key) if key is not None else None
        if before and fingerprint and before != fingerprint:
            raise reused(batch, index)


def fresh_of(batch: Batch, waiting: Sequence[int], new: Collection[bytes]) -> Sequence[int]:
    """Those of ``pending()`` that are to be handled, when the database did not know the keys ``new``."""
    entries = batch.entries
    return [index for index in waiting if (key := entries[index].key) is None or key in new]


def advance(batch: Batch, stored: Offsets, fresh: Sequence[int], handled: int | None = None) -> Advance:
    """How far the offsets may move when the first ``handled`` of ``fresh`` are handled; None: all."""
    count = len(fresh) if handled is None else handled
    if not 0 <= count <= len(fresh):
        raise ValueError(f"handled={handled}, but {len(fresh)} entries are fresh")
    offsets = batch.after
    forget: set[bytes] = set()
    if count < len(fresh):
        offsets, left = dict(offsets), set(fresh[count:])
        forget = {key for index in left if (key := batch.entries[index].key) is not None}
        for index in range(fresh[count], len(batch.entries)):  # no repeat of what is left comes before its first
            source, offset, key, _ = batch.entries[index]
            if (stored[source] or 0) <= offset < offsets[source] and (index in left or key in forget):
                offsets[source] = offset
    moved = {source: offsets[source] for source in batch.first if offsets[source] > (stored[source] or 0)}
    return Advance(moved, sorted(forget))


class Reached:
    """How far the offsets of an inbox were, as far as is known in this process.

    Entries may leave a gap, as topics have; but not one that was passed before: its effects are lost (D20).
    """

    def __init__(self) -> None:
        self._offsets: dict[tuple[str, Source], int] = {}
        self._joined: dict[tuple[str, Source], int] = {}

    def note(self, scope: str, offsets: Offsets) -> None:
        """They are so far now, or somebody goes on there."""
        for source, offset in offsets.items():  # less may be asked for, by who does not go on there
            self._offsets[scope, source] = max(offset or 0, self._offsets.get((scope, source), 0))

    def compare(self, scope: str, stored: Offsets) -> None:
        """Look at what is stored when a transaction begins.

        Raises:
            PartitionFenced: an offset is less than it was. Said once: who reads on after that has been told.
        """
        gone_back = [source for source, offset in stored.items() if (offset or 0) < self._offsets.get((scope, source), 0)]
        if gone_back:
            for source in gone_back:
                del self._offsets[scope, source]
            raise set_back(scope, gone_back)

    def join(self, scope: str, stored: Offsets, first: Mapping[Source, int]) -> None:
        """The same in a transaction of the caller's, who alone knows whether the one before was committed.

        Who goes on behind it says so; who repeats it, from a ``first`` before its end, does not. What is stored now is
        committed, whoever did it.

        Raises:
            PartitionFenced: as above.
        """
        before = {source: self._joined.pop((scope, source), 0) for source in first}
        self.note(scope, {source: offset for source, offset in before.items() if offset <= first[source]})
        self.compare(scope, stored)
        self.note(scope, stored)

    def note_joined(self, scope: str, offsets: Offsets) -> None:
        """They are so far if the caller commits."""
        self._joined.update(((scope, source), offset or 0) for source, offset in offsets.items())


# -- what went wrong ------------------------------------------------------------------------------------------------------


def recreated(scope: str, source: Source, stored: bytes, table: str) -> TopicRecreated:
    """The error for an offset of another topic of the same name (D06)."""
    return TopicRecreated(
        f"the inbox has an offset of {_name(source)} for {scope!r}, but for a topic with the id {stored.hex()}; this one has "
        f"the id {source.topic_id.hex()}: the topic was deleted and created again, or the cluster is another one. Nothing was "
        f"handled. To begin the new one at its start, stop all instances; delete the rows of {scope!r} and {source.topic!r} in "
        f"{table}, and the group's offsets: kafka-consumer-groups.sh --delete-offsets --group GROUP --topic {source.topic}."
    )


def reused(batch: Batch, index: int) -> MessageIdReused:
    """The error for one id of two messages (D08)."""
    entry = batch.entries[index]
    return MessageIdReused(
        f"the message at {_name(entry.source)} offset {entry.offset} has the id of another message, with another key or value. "
        "Nothing was written.",
        index,
    )


def fenced(scope: str, sources: Collection[Source]) -> PartitionFenced:
    """The error for an offset that somebody else moved."""
    return PartitionFenced(
        f"another member moved the offset of {', '.join(map(_name, sources))} for {scope!r} in the inbox since this "
        "transaction began. Nothing of it was written. The partition belongs to that member: go on with the others."
    )


def set_back(scope: str, sources: Collection[Source]) -> PartitionFenced:
    """The error for an offset that is less than it was."""
    return PartitionFenced(
        f"the offset of {', '.join(map(_name, sources))} for {scope!r} in the inbox has gone back: the database has lost its "
        "last transactions with their effects, as in a failover or where a backup was restored, or somebody has set it. "
        "Nothing was written. Go on at the offset that is there, and what was lost is handled again."
    )


def ended(how: str) -> KafkaGuaranteesError:
    """The error for a handler that meddles with the transaction."""
    return KafkaGuaranteesError(
        f"{how}. Its ids and offsets were not written, so its messages come again; what the handler wrote after that end, or "
        "has committed, stays. It must leave commit, rollback and the connection to the inbox: savepoints do no harm, nor an "
        "ORM's flush(), and SET CONSTRAINTS with names instead of ALL."
    )


def no_longer() -> KafkaGuaranteesError:
    """The error for a handler that goes on although SQLite has ended its transaction (D14)."""
    return ended(
        "the handler ended the transaction, or went on after an error by which SQLite did (a full disk, interrupt(), ON "
        "CONFLICT ROLLBACK)"
    )


def check_open(connection: object) -> None:
    """Raise where a handler goes on although SQLite has ended its transaction: what it writes now is committed by itself (D14).

    Args:
        connection: of sqlite3; others, and sessions of an ORM, pass.
    """
    if not getattr(connection, "in_transaction", True):
        raise no_longer()


def broke_off(error: BaseException) -> bool:
    """Whether an error came of a COMMIT by somebody else than the inbox, or of looking at its constraint too early.

    PostgreSQL says which constraint of which table was broken: the user's may have a name that ends alike. psycopg refuses
    ``commit()`` and ``rollback()`` itself. An ORM of whatever make has that error as its cause.
    """
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        diag = getattr(at, "diag", None)
        name, table = getattr(diag, "constraint_name", None), getattr(diag, "table_name", None)
        ours = isinstance(name, str) and name.endswith(UNFINISHED) and table == f"{name.removesuffix(UNFINISHED)}_offset"
        if ours and getattr(at, "sqlstate", None) == _FOREIGN_KEY:
            return True
        if type(at).__module__.startswith("psycopg") and "forbidden within a Transaction" in str(at):
            return True
        at = at.__cause__ or at.__context__
    return False


def finished_twice() -> KafkaGuaranteesError:
    """The error for a second ``finish()``."""
    return KafkaGuaranteesError("finish() was called already: the offsets of this transaction have moved. Call it once.")


def _name(source: Source) -> str:
    return f"{source.topic}[{source.partition}]"
