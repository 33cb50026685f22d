"""A store and an inbox of few lines, to read, and for the suite to be tried on. Right, and slow: one statement per id.

SQLite files; every call of the store opens its own connection. ``broken_stores.py`` breaks one part each.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from kafka_guarantees.dedup.contract import Capabilities, Outcome
from kafka_guarantees.errors import MessageIdReused, PartitionFenced, StoreUnavailable, TopicRecreated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import timedelta
    from pathlib import Path

    from kafka_guarantees.dedup.contract import Entry, Item, Source, Takeover

BUSY = 30.0  # seconds to wait for the other writers


@contextmanager
def _known_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as exc:
        raise StoreUnavailable(f"the file did not answer ({exc}). Whether it was written is unknown: call again.") from exc


class Row(NamedTuple):
    """What is known of an id. Completed ids have no token."""

    token: bytes
    position: bytes
    until: float
    fingerprint: bytes


class Rows:
    """The rows of one scope, in an open transaction."""

    def __init__(self, connection: sqlite3.Connection, scope: str) -> None:
        self._connection = connection
        self._scope = scope

    def get(self, key: bytes) -> Row | None:
        query = "SELECT token, position, until, fingerprint FROM ids WHERE scope = ? AND key = ?"
        found = self._connection.execute(query, (self._scope, key)).fetchone()
        return None if found is None else Row(*found)

    def put(self, key: bytes, row: Row) -> None:
        self._connection.execute("INSERT OR REPLACE INTO ids VALUES (?, ?, ?, ?, ?, ?)", (self._scope, key, *row))

    def remove(self, key: bytes) -> None:
        self._connection.execute("DELETE FROM ids WHERE scope = ? AND key = ?", (self._scope, key))


class ReferenceStore:
    """A ``DedupStore``."""

    capabilities = Capabilities(shared=False, durable="process", clock="client")

    def __init__(self, path: Path, retention: timedelta, clock: Callable[[], float]) -> None:
        self.retention = retention
        self.clock = clock
        self._path = path

    @contextmanager
    def rows(self, scope: str) -> Iterator[Rows]:
        """One transaction."""
        with _known_errors(), closing(sqlite3.connect(self._path, timeout=BUSY, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("BEGIN IMMEDIATE")
            columns = "scope, key, token, position, until, fingerprint, PRIMARY KEY (scope, key)"
            connection.execute(f"CREATE TABLE IF NOT EXISTS ids ({columns}) WITHOUT ROWID")
            yield Rows(connection, scope)
            connection.execute("COMMIT")

    def outcome(self, row: Row | None, item: Item, token: bytes, takeover: Takeover) -> Outcome:
        """The whole decision about one id."""
        over = row is not None and row.until <= self.clock()
        if row is None or (over and not row.token):
            return Outcome.NEW
        if not row.token:
            differ = row.fingerprint and item.fingerprint and row.fingerprint != item.fingerprint
            return Outcome.MISMATCH if differ else Outcome.DUPLICATE
        if row.token == token:
            return Outcome.NEW
        if over or (takeover == "position" and row.position == item.position):
            return Outcome.TAKEN_OVER
        return Outcome.IN_PROGRESS

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        outcomes = []
        with self.rows(scope) as rows:
            for item in items:
                outcomes.append(self.outcome(rows.get(item.key), item, token, takeover))
                if outcomes[-1] in {Outcome.NEW, Outcome.TAKEN_OVER}:
                    rows.put(item.key, Row(token, item.position, self.clock() + lease, b""))
        return outcomes

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        until = self.clock() + self.retention.total_seconds()
        done = []
        with self.rows(scope) as rows:
            for item in items:
                row = rows.get(item.key)
                done.append(row is not None and row.token in {token, b""})
                if row is not None and row.token == token:
                    rows.put(item.key, Row(b"", item.position, until, item.fingerprint))
        return done

    def release(self, scope: str, items: Sequence[Item], *, token: bytes) -> None:
        with self.rows(scope) as rows:
            for item in items:
                row = rows.get(item.key)
                if row is not None and row.token == token:
                    rows.remove(item.key)

    def purge(self, *, limit: int = 10_000) -> int:
        query = "DELETE FROM ids WHERE (scope, key) IN (SELECT scope, key FROM ids WHERE token = x'' AND until <= ? LIMIT ?)"
        with self.rows("") as rows:
            return rows._connection.execute(query, (self.clock(), limit)).rowcount

    def close(self) -> None:
        pass


class ReferenceTransaction:
    """An ``InboxTransaction``."""

    def __init__(self, inbox: ReferenceInbox, scope: str, entries: Sequence[Entry]) -> None:
        self.connection = inbox.connection
        self.inbox, self.scope, self.entries = inbox, scope, entries
        self.before = {entry.source: inbox.next_offset(scope, entry.source) for entry in entries}
        self.fresh = [index for index, entry in enumerate(entries) if self.is_fresh(entry)]
        for index, entry in enumerate(entries):
            if not self.is_behind(entry) and inbox.differs(scope, entry):
                raise MessageIdReused(f"entry {index} has the id of another message. Nothing was written.", index)
        self.finished = False

    def is_fresh(self, entry: Entry) -> bool:
        """Whether it is to be handled; its id is known from then on."""
        if self.is_behind(entry):
            return False
        return entry.key is None or self.inbox.remember(self.scope, entry.key, entry.fingerprint)

    def is_behind(self, entry: Entry) -> bool:
        return entry.offset < (self.before[entry.source] or 0)

    def finish(self, handled: int | None = None) -> None:
        self.finished = True
        left = [self.entries[index] for index in (self.fresh[handled:] if handled is not None else ())]
        for entry in left:
            if entry.key is not None:
                self.forget(entry.key)
        ends: dict[Source, int] = {}
        for entry in reversed(self.entries):
            ends[entry.source] = entry.offset if self.stays(entry, left) else ends.get(entry.source, entry.offset + 1)
        for source, end in ends.items():
            self.inbox.advance(self.scope, source, self.before[source], end)

    def stays(self, entry: Entry, left: Sequence[Entry]) -> bool:
        """Whether the offset stops before it: it is not handled, or repeats what is not."""
        repeats = entry.key is not None and entry.key in {one.key for one in left}
        return entry in left or (repeats and entry.offset >= (self.before[entry.source] or 0))

    def forget(self, key: bytes) -> None:
        self.inbox.connection.execute("DELETE FROM inbox_ids WHERE scope = ? AND key = ?", (self.scope, key))


class ReferenceInbox:
    """An ``Inbox[sqlite3.Connection]``."""

    kind = ReferenceTransaction

    def __init__(self, path: Path, retention: timedelta, clock: Callable[[], float]) -> None:
        self.retention = retention
        self.clock = clock
        self.connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
        with _known_errors():
            self.connection.execute("PRAGMA synchronous = OFF")
            self.connection.execute("BEGIN IMMEDIATE")
            ids = "scope, key, until, fingerprint, PRIMARY KEY (scope, key)"
            self.connection.execute(f"CREATE TABLE IF NOT EXISTS inbox_ids ({ids})")
            columns = "scope, topic, partition, topic_id, next, PRIMARY KEY (scope, topic, partition)"
            self.connection.execute(f"CREATE TABLE IF NOT EXISTS inbox_offsets ({columns})")
            self.connection.execute("COMMIT")

    def next_offset(self, scope: str, source: Source) -> int | None:
        query = "SELECT topic_id, next FROM inbox_offsets WHERE scope = ? AND topic = ? AND partition = ?"
        found = self.connection.execute(query, (scope, source.topic, source.partition)).fetchone()
        if found is None:
            return None
        if found[0] != source.topic_id:
            raise TopicRecreated(f"the offset of {source.topic} [{source.partition}] belongs to a topic that was deleted")
        offset: int = found[1]
        return offset

    def remember(self, scope: str, key: bytes, fingerprint: bytes) -> bool:
        """Whether the id was not known. Now it is."""
        now = self.clock()
        self.connection.execute("DELETE FROM inbox_ids WHERE scope = ? AND key = ? AND until <= ?", (scope, key, now))
        row = (scope, key, now + self.retention.total_seconds(), fingerprint)
        return self.connection.execute("INSERT OR IGNORE INTO inbox_ids VALUES (?, ?, ?, ?)", row).rowcount > 0

    def differs(self, scope: str, entry: Entry) -> bool:
        """Whether the id is known with another fingerprint."""
        query = "SELECT fingerprint FROM inbox_ids WHERE scope = ? AND key = ?"
        [known] = self.connection.execute(query, (scope, entry.key)).fetchone() or (b"",)
        return bool(known and entry.fingerprint and known != entry.fingerprint)

    def advance(self, scope: str, source: Source, before: int | None, end: int) -> None:
        if before is None:
            row = (scope, source.topic, source.partition, source.topic_id, end)
            self.connection.execute("INSERT INTO inbox_offsets VALUES (?, ?, ?, ?, ?)", row)
        elif end > before:
            query = "UPDATE inbox_offsets SET next = ? WHERE scope = ? AND topic = ? AND partition = ? AND next = ?"
            if not self.connection.execute(query, (end, scope, source.topic, source.partition, before)).rowcount:
                raise PartitionFenced(f"another owner advanced {source.topic} [{source.partition}]. Nothing was written.")

    def start_offsets(self, scope: str, sources: Sequence[Source]) -> dict[Source, int | None]:
        with _known_errors():
            return {source: self.next_offset(scope, source) for source in sources}

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[ReferenceTransaction]:
        with _known_errors():
            self.connection.execute("BEGIN IMMEDIATE")
        try:
            transaction = self.kind(self, scope, entries)
            yield transaction
            if not transaction.finished:
                transaction.finish()
            self.commit()
        except BaseException:
            self.rollback()
            raise

    def commit(self) -> None:
        with _known_errors():
            self.connection.execute("COMMIT")

    def rollback(self) -> None:
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    def purge(self, *, limit: int = 10_000) -> int:
        query = "DELETE FROM inbox_ids WHERE rowid IN (SELECT rowid FROM inbox_ids WHERE until <= ? LIMIT ?)"
        with _known_errors():
            return self.connection.execute(query, (self.clock(), limit)).rowcount

    def close(self) -> None:
        self.connection.close()
