"""An inbox in an SQLite file: message ids, offsets and the handler's own tables, in one transaction.

Rules.
* Every transaction begins with the write lock: one that reads first and writes later fails where another wrote in between,
  and waiting does not help it (D14).
* No connection crosses a fork, unless a transaction is open (D14). The lock is held where it is used but for the handler, which
  may fork itself: a fork of another thread waits for BEGIN and COMMIT, and finds a transaction open between them.
* The file is the user's: only tables named ``kg_inbox_...`` are ours, and ``user_version`` is not touched (D19).
* An id takes few bytes and has no other index than its own: each one costs a page anyway, and what is written counts. So
  ``purge`` walks through the table from where it was, which takes along what lies together in a page.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Literal

from ..errors import ForkedClientError, KafkaGuaranteesError, StoreUnavailable, UnsafeConfigError
from ._forks import InUse, let_go_before_forks
from ._place import file_at, place_of, refuse, write_ahead
from ._progress import (
    Reached,
    advance,
    batch_of,
    check_open,
    compare,
    ended,
    fenced,
    finished_twice,
    fresh_of,
    no_longer,
    pending,
    recreated,
)
from .contract import check_retention

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from ._progress import Batch, Offsets
    from .contract import Entry, Source

VERSION = 3  # 1: ids with the name of their scope, and an index by time; 2: no fingerprints
PATIENCE = 5.0  # seconds that a transaction waits for the write lock
MICRO = 1_000_000

EXAMINED = 5  # times what purge() may remove: so many ids it looks at in one call, and at least a thousand

_IDS = (
    """CREATE TABLE kg_inbox_scope (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)""",
    # until: microseconds since 1970. Not called "expires" any more: a process with version 1 must not write here.
    """CREATE TABLE kg_inbox_id (
        scope INTEGER NOT NULL, key BLOB NOT NULL, until INTEGER NOT NULL, fingerprint BLOB, PRIMARY KEY (scope, key))
        WITHOUT ROWID""",
)
_SCHEMA = (
    """CREATE TABLE kg_inbox_version (version INTEGER NOT NULL)""",
    """CREATE TABLE kg_inbox_offset (
        scope TEXT NOT NULL, topic TEXT NOT NULL, partition INTEGER NOT NULL, topic_id BLOB NOT NULL,
        next_offset INTEGER NOT NULL, PRIMARY KEY (scope, topic, partition)) WITHOUT ROWID""",
    *_IDS,
)
_TRANSACTION = 22  # SQLITE_TRANSACTION, which sqlite3 does not name
_NOT_THE_FILE = (sqlite3.ProgrammingError, sqlite3.IntegrityError)  # the same the next time
_BUSY = 5  # SQLITE_BUSY itself: another one writes. Python 3.10 does not name it
# Texts of their own: a statement that is prepared already is not asked about again.
_BEGIN, _COMMIT, _ROLLBACK = "BEGIN IMMEDIATE -- of the inbox", "COMMIT -- of the inbox", "ROLLBACK -- of the inbox"
_LOCK = "UPDATE kg_inbox_version SET version = version WHERE 0"  # writes nothing, but takes the write lock
# Around the handler: it is gone where SQLite has rolled back, also where in_transaction says that one is open, begun since by
# a SAVEPOINT of the handler's. A row in its stead would be a page more to write in each transaction.
_HANDLER, _STILL_THERE = "SAVEPOINT kg_inbox_handler", "RELEASE kg_inbox_handler"
_READ = "SELECT topic_id, next_offset FROM kg_inbox_offset WHERE scope = ? AND topic = ? AND partition = ?"
_FIRST = "INSERT INTO kg_inbox_offset VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
_MOVE = "UPDATE kg_inbox_offset SET next_offset = ? WHERE scope = ? AND topic = ? AND partition = ? AND next_offset = ?"
# In a transaction of the caller's, and gone with it, or with a savepoint: in the scope of nobody, and expired, so that purge()
# removes what was committed of it.
_WITNESS = "INSERT INTO kg_inbox_id VALUES (0, ?, 0, NULL)"
_WITNESSED = "DELETE FROM kg_inbox_id WHERE scope = 0 AND key = ?"
_SCOPE = "SELECT number FROM kg_inbox_scope WHERE name = ?"
_NEW_SCOPE = "INSERT INTO kg_inbox_scope (name) VALUES (?) RETURNING number"
_REMEMBER = (
    "INSERT INTO kg_inbox_id VALUES (?, ?, ?, ?) "
    "ON CONFLICT DO UPDATE SET until = excluded.until, fingerprint = excluded.fingerprint WHERE kg_inbox_id.until <= ?"
)
_FINGERPRINT = "SELECT fingerprint FROM kg_inbox_id WHERE scope = ? AND key = ?"
_FORGET = "DELETE FROM kg_inbox_id WHERE scope = (SELECT number FROM kg_inbox_scope WHERE name = ?) AND key = ?"
_WALK = "SELECT scope, key FROM kg_inbox_id WHERE (scope, key) > (?, ?) ORDER BY scope, key LIMIT 1 OFFSET ?"
_START, _END = (-1, b""), (2**63 - 1, b"")  # before and behind every id
_PURGE = (
    "DELETE FROM kg_inbox_id WHERE (scope, key) IN (SELECT scope, key FROM kg_inbox_id "
    "WHERE (scope, key) > (?, ?) AND (scope, key) <= (?, ?) AND until <= ? ORDER BY scope, key LIMIT ?) RETURNING scope, key"
)
_NEWEST = "UPDATE kg_inbox_version SET version = 3"
_UPGRADE_2 = ("ALTER TABLE kg_inbox_id ADD COLUMN fingerprint BLOB", _NEWEST)
_UPGRADE_1 = (
    "DROP INDEX kg_inbox_id_expires",
    "ALTER TABLE kg_inbox_id RENAME TO kg_inbox_id_1",
    *_IDS,
    "INSERT INTO kg_inbox_scope (name) SELECT DISTINCT scope FROM kg_inbox_id_1",
    """INSERT INTO kg_inbox_id
        SELECT number, key, expires, NULL FROM kg_inbox_id_1 JOIN kg_inbox_scope ON name = scope ORDER BY 1, 2""",
    "DROP TABLE kg_inbox_id_1",
    _NEWEST,
)


class SqliteInbox:
    """An inbox in an SQLite file.

    The handler writes into the same file, with the connection that it is given; its effects happen once. The file belongs to
    one host: a partition that moves to another one ends the run there, with OffsetsLost. Not on a network file system:
    SQLite's locks do not work there.

    Attributes:
        retention: how long an id is remembered at least, from the beginning of its transaction on.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        retention: timedelta = timedelta(hours=24),
        durability: Literal["process", "power"] = "process",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the file, and make the tables where they are missing.

        Args:
            path: the file; made where it is missing.
            retention: how long an id is remembered at least.
            durability: ``"process"``: after a power loss the last transactions may be gone, effects and offsets together, so
                their messages come again. ``"power"``: they are not, for an fsync in every transaction.
            clock: seconds since 1970.

        Raises:
            StoreUnavailable: the file cannot be opened, or is locked.
            UnsafeConfigError: none can be there.
            KafkaGuaranteesError: its tables are of a version that this library does not know.
            ValueError, TypeError: ``retention`` or ``durability`` is not valid.
        """
        check_retention(retention)
        if durability not in {"process", "power"}:
            raise ValueError(f"durability is 'process' or 'power', not {durability!r}")
        self._path = place_of(path)
        self._retention = retention
        self._clock = clock
        self._synchronous = "FULL" if durability == "power" else "NORMAL"
        self._pid = os.getpid()
        self._lock = InUse()
        self._closed = False
        self._to_open = True
        self._opened: tuple[int, int] | None = None  # which file that was
        self._reached = Reached()
        self._repeats = False  # whether the last transaction met ids that were known
        self._purged = _START  # up to which id purge() came
        self._in_hands = False  # of a handler, which must not end the transaction
        self._refused = False
        let_go_before_forks(self)
        try:
            with self._lock:
                self._connection = self._connect()
                self._to_open = False
        except StoreUnavailable as exc:
            refuse(self._path, exc.__cause__)
            raise

    @property
    def retention(self) -> timedelta:
        return self._retention

    def start_offsets(self, scope: str, sources: Sequence[Source]) -> dict[Source, int | None]:
        """The offsets to go on at; None where nothing of the partition was handled yet.

        Raises:
            TopicRecreated: the offset that is stored belongs to another topic of the same name.
            StoreUnavailable: the file did not answer.
        """
        with self._lock:
            self._check()
            with self._answers("reading offsets"):
                offsets = _offsets(self._connection, scope, sources)
        self._reached.note(scope, offsets)
        return offsets

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[SqliteInboxTransaction]:
        """Begin; find out what is fresh. Commit at the end, roll back on an exception, which is raised as it is.

        Args:
            scope: whose ids and offsets these are.
            entries: in the order of their offsets within each partition.

        Raises:
            PartitionFenced: an offset has gone back, as where a backup was restored into the file: what was written after it is
                missing, so go on at ``start_offsets()``. Nothing was written.
            TopicRecreated: an offset that is stored belongs to another topic of the same name.
            MessageIdReused: an entry has the id of another message. Nothing was written.
            StoreUnavailable: the file did not answer, or was locked for 5 seconds. Nothing was written.
            KafkaGuaranteesError: the handler tried to end the transaction or closed the connection, or left a statement half
                read.
        """
        opened = self._begun(scope, entries)
        try:
            yield opened
            self._check_process()  # a child that returns from the handler: the transaction is its parent's (Y04)
            with self._lock:
                self._check_not_closed()
                opened._end()
                self._in_hands = False
                with self._answers("committing"):
                    self._connection.execute(_COMMIT)
            self._reached.note(scope, opened._moved)
        except BaseException as error:
            with self._lock:
                refused, self._in_hands, self._refused = self._refused, False, False
                closed = self._roll_back() and not self._closed
                if self._closed and os.getpid() == self._pid:
                    self._connection.close()
            if closed and isinstance(error, sqlite3.ProgrammingError):
                raise ended("the handler closed the connection") from error
            if refused and isinstance(error, sqlite3.DatabaseError) and "not authorized" in str(error):
                raise KafkaGuaranteesError(
                    "the handler called commit() or rollback(), or left a `with connection:` block: it must not end the "
                    "transaction. Nothing was written. Leave that to the inbox; SAVEPOINT works."
                ) from error
            raise

    def enlist(self, connection: sqlite3.Connection, scope: str, entries: Sequence[Entry]) -> SqliteInboxTransaction:
        """The same inside a transaction that the caller began, with ``BEGIN IMMEDIATE``, and will commit or roll back.

        Call ``finish()`` before the commit. The connection is one to the same file.

        Raises:
            PartitionFenced: an offset has gone back, as in ``transaction()``. Roll back.
            TopicRecreated: an offset that is stored belongs to another topic of the same name.
            MessageIdReused: an entry has the id of another message. Roll back.
            StoreUnavailable: the file did not answer, or was locked. Roll back, and repeat the transaction.
            KafkaGuaranteesError: the connection is to another file, or no transaction is open.
        """
        self._check_process()
        batch = batch_of(entries)
        self._check_file(connection)
        with self._answers("enlisting"):
            connection.execute(_LOCK)
        if not connection.in_transaction:
            raise KafkaGuaranteesError("no transaction is open on this connection. Nothing was done. BEGIN IMMEDIATE first.")
        # A COMMIT of the caller's cannot be refused: ids are there with the offsets only, not before. Nobody else writes.
        with self._answers("enlisting"):
            connection.execute("SAVEPOINT kg_inbox")
        try:
            opened = self._open_one_by_one(connection, scope, batch)
        finally:
            with self._answers("enlisting"):
                connection.execute("ROLLBACK TO kg_inbox")
                connection.execute("RELEASE kg_inbox")
        self._reached.join(scope, opened._stored, batch.first)
        witness = os.urandom(16)
        with self._answers("enlisting"):
            connection.execute(_WITNESS, (witness,))
        opened._reached = self._reached
        opened._joined = partial(self._joined, opened, _keys(batch, opened.fresh), witness)
        return opened

    def purge(self, *, limit: int = 10_000) -> int:
        """Remove at most ``limit`` of the ids that are expired, and look at five times as many. Returns how many."""
        removed, examine = 0, max(1000, EXAMINED * limit)
        with self._lock:
            self._check()
            self._check_none_open()
            try:
                self._begin()  # else Python does, and commits nothing, where a handler has set isolation_level
                with self._answers("purging"):
                    for _ in range(2):  # to the end, and once more from the beginning
                        begun, execute = self._purged, _plain(self._connection).execute
                        end = execute(_WALK, (*begun, examine - 1)).fetchone() or _END
                        gone = execute(_PURGE, (*begun, *end, self._now(), limit - removed)).fetchall()
                        removed += len(gone)
                        self._purged = max(gone) if removed == limit else _START if end == _END else end
                        if removed == limit or end != _END or begun == _START:
                            break
                    self._connection.execute(_COMMIT)
            except BaseException:
                self._roll_back()
                raise
        return removed

    def close(self) -> None:
        """Close the file. A transaction that a handler has is rolled back once that returns."""
        if os.getpid() == self._pid:  # closed in a child, it would take the parent's locks along
            with self._lock:
                self._closed = True
                if not self._in_hands:  # under a statement of the handler's it would take the process along
                    self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _begun(self, scope: str, entries: Sequence[Entry]) -> SqliteInboxTransaction:
        """Begin a transaction, and find out what is fresh."""
        with self._lock:
            self._check()
            batch = batch_of(entries)
            self._check_none_open()
            try:  # an exception out of a signal handler may come with the lock, for which BEGIN has waited
                self._begin()
                opened = self._open(self._connection, scope, batch)
                if opened is None:  # some ids were known, and nobody knows which
                    with self._answers("looking for what is fresh"):
                        self._connection.execute(_ROLLBACK)
                        self._connection.execute(_BEGIN)
                    opened = self._open_one_by_one(self._connection, scope, batch)
                self._reached.compare(scope, opened._stored)
                with self._answers("beginning a transaction"):
                    self._hand_over()
            except BaseException as error:
                self._roll_back()
                if _may_be_left(error.__cause__):
                    self._drop()
                raise
            self._in_hands, self._refused = True, False
            return opened

    def _open(self, connection: sqlite3.Connection, scope: str, batch: Batch) -> SqliteInboxTransaction | None:
        """Find out what is fresh. None: some ids are known, and have to be told apart from those that were inserted."""
        if self._repeats or not batch.keys:
            return self._open_one_by_one(connection, scope, batch)
        with self._answers("looking for what is fresh"):
            stored = _offsets(connection, scope, batch.first)
            fresh = pending(batch, stored)
            keys = _keys(batch, fresh)
            if connection.executemany(_REMEMBER, self._rows(connection, scope, batch, keys)).rowcount < len(keys):
                return None
        return SqliteInboxTransaction(connection, scope, batch, stored, fresh)

    def _open_one_by_one(self, connection: sqlite3.Connection, scope: str, batch: Batch) -> SqliteInboxTransaction:
        """Find out what is fresh. Each insert tells whether it did: executemany(), which is faster, counts only."""
        with self._answers("looking for what is fresh"):
            stored = _offsets(connection, scope, batch.first)
            fresh = pending(batch, stored)
            if batch.keys:
                keys = _keys(batch, fresh)
                rows = self._rows(connection, scope, batch, keys)
                new = {row[1] for row in rows if connection.execute(_REMEMBER, row).rowcount}
                self._repeats = len(new) < len(keys)
                if len(new) < len(keys):
                    if batch.fingerprints:
                        places = [row[:2] for row in rows if row[1] not in new]
                        cursor = _plain(connection)
                        known = {place[1]: cursor.execute(_FINGERPRINT, place).fetchone()[0] for place in places}
                        compare(batch, fresh, known)
                    fresh = fresh_of(batch, fresh, new)
        return SqliteInboxTransaction(connection, scope, batch, stored, fresh)

    def _joined(self, opened: SqliteInboxTransaction, keys: list[bytes], witness: bytes) -> None:
        """What finish() does besides in a transaction of the caller's, before it moves the offsets."""
        connection = opened.connection
        rows = self._rows(connection, opened._scope, opened._batch, keys) if keys else []
        here = connection.execute(_WITNESSED, (witness,)).rowcount == 1
        if not here or connection.executemany(_REMEMBER, rows).rowcount < len(rows):
            raise ended("the transaction was ended before finish(), or rolled back to a savepoint that is older than enlist()")

    def _rows(
        self, connection: sqlite3.Connection, scope: str, batch: Batch, keys: list[bytes]
    ) -> list[tuple[int, bytes, int, bytes | None, int]]:
        """What _REMEMBER takes for each of the ids."""
        cursor = _plain(connection)
        [(number,)] = cursor.execute(_SCOPE, (scope,)).fetchall() or cursor.execute(_NEW_SCOPE, (scope,)).fetchall()
        now = self._now()
        until = now + self._retention // timedelta(microseconds=1)
        prints = map(batch.fingerprints.get, keys)
        return [(number, key, until, fingerprint, now) for key, fingerprint in zip(keys, prints, strict=True)]

    def _connect(self) -> sqlite3.Connection:
        with self._answers("opening"):
            connection = sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            connection.set_authorizer(self._authorize)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        self._opened = file_at(self._path)
        return connection

    def _authorize(self, action: int, *_what: object) -> int:
        """Refuse BEGIN, COMMIT and ROLLBACK in a handler: the ids of the whole batch would be committed with a part of it."""
        if action == _TRANSACTION and self._in_hands:
            self._refused = True
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    def _check_none_open(self) -> None:
        if self._connection.in_transaction:
            raise KafkaGuaranteesError("a transaction of this SqliteInbox is open already: it has one at a time.")

    def _begin(self) -> None:
        with self._answers("beginning a transaction"):
            try:
                self._connection.execute(_BEGIN)
            except sqlite3.OperationalError as exc:
                if _may_be_left(exc):
                    self._drop()
                raise

    def _hand_over(self) -> None:
        try:
            self._connection.execute(_HANDLER)
        except sqlite3.OperationalError:
            # under a statement that writes, which a handler has left half read, nothing more could be committed
            self._roll_back()
            self._drop()
            raise

    def _drop(self) -> None:
        """Close the connection. The next call opens another one."""
        self._connection.close()
        self._to_open = True

    def _roll_back(self) -> bool:
        """Undo what is open; a failure of that would hide what went wrong first. Returns whether the connection was closed."""
        if os.getpid() != self._pid:
            return False  # a child that leaves the handler: the transaction is its parent's (Y04)
        try:
            if self._connection.in_transaction:
                self._connection.execute(_ROLLBACK)
        except sqlite3.Error as exc:
            self._drop()  # SQLite rolls back then, or when the file is opened next
            return isinstance(exc, sqlite3.ProgrammingError)
        return False

    def _prepare(self, connection: sqlite3.Connection) -> None:
        if write_ahead(connection, PATIENCE) != "wal":
            raise UnsafeConfigError("path", self._path, "SQLite keeps no write-ahead log there", "a file on a local disk")
        for pragma in (f"synchronous = {self._synchronous}", "wal_autocheckpoint = 10000"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        version = _version(connection)  # a look first: to write waits for whoever does, and most find what they need
        if version != VERSION:
            connection.execute(_BEGIN)
            try:
                version = _made(connection)
                connection.execute(_COMMIT)
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute(_ROLLBACK)
                raise
        if version != VERSION:
            raise KafkaGuaranteesError(
                f"the inbox in {self._path!r} has version {version} of its tables, and this library knows {VERSION}. "
                "Nothing was changed. Use the release of kafka-guarantees that wrote it, or a newer one."
            )

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedClientError(
                "this SqliteInbox was opened in another process, and SQLite's locks do not survive fork(). "
                "Nothing was written. Open the inbox after the fork, in the process that uses it."
            )

    def _check_not_closed(self) -> None:
        """Of a transaction that a handler had until now."""
        if self._closed:
            raise KafkaGuaranteesError(
                f"the inbox {self._path!r} was closed while a handler was at work. Nothing was written. End the run first."
            )

    def _check_file(self, connection: sqlite3.Connection) -> None:
        """Raise where a connection of the caller's is to another file: there may be an inbox as well, with other offsets."""
        here = file_at(self._path)
        paths = [path for _, _, path in _plain(connection).execute("PRAGMA database_list")]
        if here is None or here not in map(file_at, paths):
            raise KafkaGuaranteesError(
                f"the inbox is in the file {self._path!r}, and the connection to {', '.join(map(repr, paths))}. Nothing was "
                "done. Enlist with a connection to the file of the inbox, in which the effects are, too."
            )

    def _check(self) -> None:
        """Before the connection is used, with the lock."""
        self._check_process()
        here = file_at(self._path)
        if here != self._opened:  # others have another one; whether it is behind, the offsets tell
            self._let_go()
        if self._to_open and not self._closed:
            if here is None:  # an empty one would be in the way of a backup that is being restored
                raise StoreUnavailable(
                    f"the file of the inbox {self._path!r} was removed. Nothing was written. It may be done again when a file "
                    "is there: put it back. Without it its effects are gone, and so is where to go on."
                )
            self._connection = self._connect()
            self._to_open = False

    def _let_go(self) -> None:
        """Close the connection until it is used again. Not one of the parent's, nor under a transaction."""
        ours = os.getpid() == self._pid and not self._closed and not self._to_open
        if ours and not self._in_hands and not self._connection.in_transaction:
            self._drop()

    def _now(self) -> int:
        return round(self._clock() * MICRO)

    def _answers(self, doing: str) -> _Answers:
        return _Answers(self._path, doing)


def _may_be_left(error: BaseException | None) -> bool:
    """Whether something that a handler left on the connection may be why.

    A cursor half read, which keeps a state that others have written past, ``PRAGMA query_only``, a progress handler.
    """
    return isinstance(error, sqlite3.OperationalError) and getattr(error, "sqlite_errorcode", None) != _BUSY  # 3.10 has no code


class _Answers:
    """The one place where errors of SQLite become ours; those of the handler's own statements do not.

    A class, not a generator: it is entered three times in each transaction.
    """

    __slots__ = ("_doing", "_path")

    def __init__(self, path: str, doing: str) -> None:
        self._path = path
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        # a closed inbox does not answer the next time either, and a constraint may be looked at in the commit
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, _NOT_THE_FILE):
            raise StoreUnavailable(
                f"{self._doing} in the inbox {self._path!r} failed ({error}). It may be done again: what was written is left "
                f"out then. If the file is locked, another transaction in it takes longer than the {PATIENCE:.0f} s that the "
                "inbox waits."
            ) from error


class SqliteInboxTransaction:
    """An open transaction of an inbox. See ``InboxTransaction``.

    Attributes:
        connection: for the handler's own writes. It neither commits nor rolls back.
        fresh: which of the entries are to be handled, by their index and in their order.
    """

    def __init__(self, connection: sqlite3.Connection, scope: str, batch: Batch, stored: Offsets, fresh: Sequence[int]) -> None:
        self.connection = connection
        self.fresh = fresh
        self._scope = scope
        self._batch = batch
        self._stored = stored
        self._moved: Offsets = {}
        self._joined: Callable[[], None] | None = None  # what finish() does besides, after enlist()
        self._reached: Reached | None = None  # after enlist()
        self._finished = False

    def finish(self, handled: int | None = None) -> None:
        """Advance the offsets. Called once, after the handler's writes.

        Args:
            handled: how many of ``fresh`` are handled, if not all.

        Raises:
            PartitionFenced: somebody has moved an offset since the transaction began.
            KafkaGuaranteesError: the handler ended the transaction, also where another one is open now, or this is the second
                call. Roll back.
        """
        if self._finished:
            raise finished_twice()
        check_open(self.connection)
        offsets, forget = advance(self._batch, self._stored, self.fresh, handled)
        if self._joined is not None:
            self._joined()
        for source, offset in offsets.items():
            before = self._stored[source]
            place = (self._scope, source.topic, source.partition)
            if before is None:
                moved = self.connection.execute(_FIRST, (*place, source.topic_id, offset)).rowcount
            else:
                moved = self.connection.execute(_MOVE, (offset, *place, before)).rowcount
            if moved != 1:
                raise fenced(self._scope, [source])
        if forget:
            self.connection.executemany(_FORGET, [(self._scope, key) for key in forget])
        self._moved = offsets
        self._finished = True
        if self._reached is not None:
            self._reached.note_joined(self._scope, offsets)

    def _end(self) -> None:
        if not self._finished:
            self.finish()
        check_open(self.connection)
        try:
            self.connection.execute(_STILL_THERE)
        except sqlite3.OperationalError as exc:
            if "no such savepoint" in str(exc):
                raise no_longer() from exc
            if "statements in progress" not in str(exc):
                raise
            raise ended("the handler left a statement that writes half read, such as INSERT ... RETURNING") from exc


def _made(connection: sqlite3.Connection) -> int:
    """Make the tables where they are missing, and bring those of earlier versions up to date. Returns their version."""
    version = _version(connection)
    if version is None:
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute("INSERT INTO kg_inbox_version VALUES (?)", (VERSION,))
        return VERSION
    upgrade = {1: _UPGRADE_1, 2: _UPGRADE_2}.get(version)
    if upgrade is None:
        return version
    for statement in upgrade:
        connection.execute(statement)
    return VERSION


def _version(connection: sqlite3.Connection) -> int | None:
    """The version of the tables; None where there are none."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'kg_inbox_version'").fetchall():
        return None
    [(version,)] = connection.execute("SELECT version FROM kg_inbox_version").fetchall()
    return int(version)


def _keys(batch: Batch, fresh: Sequence[int]) -> list[bytes]:
    """Of these entries, sorted: neighbours share pages."""
    if len(fresh) == len(batch.entries):
        return batch.keys
    return sorted(key for index in fresh if (key := batch.entries[index].key) is not None)


def _plain(connection: sqlite3.Connection) -> sqlite3.Cursor:
    """Rows are tuples, whatever the handler has chosen for its own."""
    cursor = connection.cursor()
    cursor.row_factory = None
    return cursor


def _offsets(connection: sqlite3.Connection, scope: str, sources: Collection[Source]) -> dict[Source, int | None]:
    found: dict[Source, int | None] = {}
    cursor = _plain(connection)
    for source in sources:
        row = cursor.execute(_READ, (scope, source.topic, source.partition)).fetchone()
        if row is not None and row[0] != source.topic_id:
            raise recreated(scope, source, row[0], "kg_inbox_offset")
        found[source] = None if row is None else row[1]
    return found
