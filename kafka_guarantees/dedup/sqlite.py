"""Deduplication in a file, for the processes of one host.

Rules.
* Every call is one transaction, begun with BEGIN IMMEDIATE: SQLite itself cannot retry a read that turns into a write (D14).
* One connection and a lock: SQLite has one writer anyway, and threads that wait for a lock are woken, while connections that
  wait for each other poll.
* No connection crosses a fork. It is closed before, and opened again by the next call on either side. Opening another one in
  the child is not enough (D14).
* Completed ids lie in four tables, one for each third of the retention. A table is emptied as a whole, which costs next to
  nothing (D18), and is the current one then; so an id is remembered for 1 to 1.34 retentions. Claims are few, and have a table
  of their own: who claims and completes does not touch a page of the big tables twice.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from ..errors import KafkaGuaranteesError, StoreUnavailable, UnsafeConfigError
from ._forks import InUse, let_go_before_forks
from ._place import file_at, place_of, refuse, write_ahead
from .contract import Capabilities, Outcome, check_retention
from .ids import NO_FINGERPRINT, joined

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Self

    from .contract import Item, Takeover

    _Packed = dict[str, bytes | int]

log = logging.getLogger("kafka_guarantees")

WAIT = 5.0  # seconds that a call waits for other processes, or for other threads
FORMAT = 1  # PRAGMA user_version: D19
OURS = 0x6B676464  # PRAGMA application_id: "kgdd"
CHECKPOINT = 10_000  # pages: random ids touch a page each, which is worth writing back once for many batches
CACHE = 16_384  # KiB: SQLite's own 2 MB are less than the inner pages of some million ids
CHUNK = 1000  # keys in one statement
GENERATIONS = 4
SYNCHRONOUS = {"process": "NORMAL", "power": "FULL"}

# No error of our own code: the file, the disk, or somebody else's lock.
OUTSIDE = (sqlite3.OperationalError, sqlite3.DatabaseError)

SCHEMA = (
    *(
        f"CREATE TABLE completed_{number} (scope INTEGER, key BLOB, fingerprint BLOB, PRIMARY KEY (scope, key)) WITHOUT ROWID"
        for number in range(GENERATIONS)
    ),
    "CREATE TABLE claim (scope, key BLOB, token BLOB, position BLOB, until REAL, PRIMARY KEY (scope, key)) WITHOUT ROWID",
    "CREATE TABLE scope (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    "CREATE TABLE rotation (current INTEGER NOT NULL, since REAL NOT NULL, retention REAL NOT NULL)",
    "CREATE TABLE place (number INTEGER PRIMARY KEY)",  # 0, 1, 2 ...: takes apart keys that were joined to one blob
)

# A batch comes joined: one value to bind instead of a thousand, and one statement to compile for batches of every size.
_KEY = "substr(:keys, place.number * 16 + 1, 16)"
_POSITION = "substr(:positions, place.number * 16 + 1, 16)"
_FINGERPRINT = "substr(:fingerprints, place.number * 8 + 1, 8)"
_BATCH = "FROM place WHERE place.number < :count"
_HERE = f"place.number < :count AND scope = :scope AND key = {_KEY}"
# EXISTS is asked once: most of the time there are no claims, and an empty generation need not be asked for each key.
_FOUND_IN = f"FROM place CROSS JOIN {{table}} WHERE EXISTS (SELECT 1 FROM {{table}}) AND {_HERE}"  # noqa: S608 - of constants
_OWN = f"scope = :scope AND token = :token AND key IN (SELECT {_KEY} {_BATCH})"

COMPLETED = " UNION ALL ".join(
    f"SELECT key, fingerprint, NULL, NULL, NULL {_FOUND_IN}".format(table=f"completed_{number}")
    for number in range(GENERATIONS)
)
KNOWN = f"{COMPLETED} UNION ALL SELECT key, NULL, token, position, until {_FOUND_IN.format(table='claim')}"
CLAIM = f"REPLACE INTO claim SELECT :scope, {_KEY}, :token, {_POSITION}, :until {_BATCH}"
COMPLETE = [
    f"REPLACE INTO completed_{number} SELECT :scope, key, {_FINGERPRINT} {_FOUND_IN.format(table='claim')} AND token = :token"
    for number in range(GENERATIONS)
]
RELEASE = f"DELETE FROM claim WHERE {_OWN}"  # noqa: S608 - of constants
MORE_CLAIMS = "SELECT 1 FROM claim LIMIT 1 OFFSET :count"
RELEASE_ALL = "DELETE FROM claim"  # which SQLite does by the page
BEGUN = "SELECT current, since, retention, (SELECT number FROM scope WHERE name = ?) FROM rotation"


class SqliteDedupStore:
    """Remembers ids in a file, which the processes of one host may share.

    Not for several hosts: when a partition moves to another one, its ids stay behind (D11). The file lies on a local disk, for
    locks on NFS and the like do not hold, and belongs to this store alone. ``-wal`` and ``-shm`` beside it are part of it.

    Takes about 50 bytes for an id. The system clock counts: when it jumps ahead by the retention, all ids are forgotten.

    Args:
        path: the file. It is created when there is none.
        retention: how long a completed id is remembered at least; at most a third longer. Of several who share a file, and give
            different ones, the last to open it decides.
        durability: ``"process"`` survives the end of the process, also by SIGKILL; after a power loss the last ids may be
            forgotten, and their messages be handled again. ``"power"`` survives that too, and waits for the disk in every call.
        clock: seconds since whenever, the same for all who share the file.

    Raises:
        UnsafeConfigError: the file is not one of this store, or of a later version; or none can be there.
        StoreUnavailable: the file cannot be opened.
        ValueError, TypeError: ``retention`` or ``durability`` is not valid.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        retention: timedelta = timedelta(hours=24),
        durability: Literal["process", "power"] = "process",
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_retention(retention)
        if durability not in SYNCHRONOUS:
            raise ValueError(f'durability is "process" or "power", not {durability!r}')
        self._path = place_of(path)
        self._retention = retention
        self._durability = durability
        self._clock = clock
        self._lock = InUse()
        self._closed = False
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None  # which file that was
        let_go_before_forks(self)
        try:
            with self._lock, self._answering():
                self._connection = self._open()
        except StoreUnavailable as exc:
            refuse(self._path, exc.__cause__)
            raise

    @property
    def capabilities(self) -> Capabilities:
        """Not shared with other hosts; durable as chosen; goes by the clock of the host."""
        return Capabilities(shared=False, durable=self._durability, clock="client")

    @property
    def retention(self) -> timedelta:
        """How long a completed id is remembered at least."""
        return self._retention

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        """Claim each key that may be claimed. See ``DedupStore.claim``."""
        outcomes: dict[bytes, Outcome] = {}
        with self._transaction(scope) as transaction:
            now, until = transaction.now, transaction.now + lease
            for chunk, packed in _chunks(items):
                claimed = packed
                known = {row[0]: row for row in transaction.execute(KNOWN, packed)}
                if known:
                    judged = {item.key: _judge(known.get(item.key), item, token, takeover, now) for item in chunk}
                    outcomes.update(judged)
                    claimed = _packed([item for item in chunk if judged[item.key] <= Outcome.TAKEN_OVER])
                transaction.execute(CLAIM, claimed, token=token, until=until)
        return [outcomes.get(item.key, Outcome.NEW) for item in items] if outcomes else [Outcome.NEW] * len(items)

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        """Turn claims with this token into completed ids. See ``DedupStore.complete``."""
        left_out: set[bytes] = set()
        with self._transaction(scope) as transaction:
            for chunk, packed in _chunks(items):
                completed = transaction.execute(COMPLETE[transaction.current], packed, token=token).rowcount
                if completed == len(chunk) and not transaction.execute(MORE_CLAIMS, packed).fetchone():  # all that there are
                    transaction.execute(RELEASE_ALL, packed)
                elif completed:
                    transaction.execute(RELEASE, packed, token=token)
                if completed < len(chunk):
                    left_out.update(item.key for item in chunk)
                    left_out.difference_update(row[0] for row in transaction.execute(COMPLETED, packed))
        return [item.key not in left_out for item in items] if left_out else [True] * len(items)

    def release(self, scope: str, items: Sequence[Item], *, token: bytes) -> None:
        """Forget claims with this token. See ``DedupStore.release``."""
        with self._transaction(scope) as transaction:
            for _, packed in _chunks(items):
                transaction.execute(RELEASE, packed, token=token)

    def purge(self, *, limit: int = 10_000) -> int:  # noqa: ARG002 - a generation goes as a whole, as fast as few of its ids
        """Forget what is expired, as every call does. Returns how many ids went."""
        with self._transaction(None) as transaction:
            return transaction.purged

    def close(self) -> None:
        """Close the file. What is in it stays. Later calls raise."""
        with self._lock:
            self._closed = True
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self, scope: str | None) -> Iterator[_Transaction]:
        """Alone on the file until the end of the block, which commits, or undoes all on an exception."""
        if not self._lock.acquire(timeout=WAIT):
            raise self._unavailable(f"other threads kept it busy for {WAIT:g} s")
        try:
            if self._closed:
                raise KafkaGuaranteesError(f"the store {self._path!r} is closed. Nothing was changed. Make a new one.")
            with self._answering():
                if self._connection is not None and file_at(self._path) != self._opened:  # others would have another one
                    log.warning(
                        "the file of the store %r was removed, or another one took its place: the ids in it are forgotten, and "
                        "their messages may be handled again",
                        self._path,
                    )
                    self._let_go()
                if self._connection is None:  # there was a fork
                    self._connection = self._open()
                connection = self._connection
                if connection.in_transaction:
                    if self._lock.twice:  # from a signal handler
                        raise self._unavailable("another call of this thread is at work")
                    connection.execute("ROLLBACK")  # an exception out of a signal handler came where it was undone
                try:  # such a one may come with the lock, for which BEGIN has waited
                    connection.execute("BEGIN IMMEDIATE")
                    yield _Transaction(connection, scope, self._clock())
                    connection.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):  # the first error counts; SQLite may have rolled back by itself
                        connection.execute("ROLLBACK")
                    raise
        finally:
            self._lock.release()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """What the file or the disk answers instead becomes ``StoreUnavailable``."""
        try:
            yield
        except sqlite3.DatabaseError as exc:
            if type(exc) not in OUTSIDE:
                raise
            raise self._unavailable(str(exc)) from exc

    def _unavailable(self, why: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"the store {self._path!r} did not answer ({why}). Nothing is known of these ids: make the same call again. "
            "If it goes on, look for a process that holds the file locked, for a full disk, and for permissions."
        )

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=WAIT, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._opened = file_at(self._path)
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        def ask(pragma: str) -> Any:
            return connection.execute(f"PRAGMA {pragma}").fetchone()[0]

        # In this order: somebody else may make the file between the two, tables and application_id in one transaction.
        if connection.execute("SELECT 1 FROM sqlite_master").fetchone() and ask("application_id") != OURS:
            raise UnsafeConfigError(
                "path", self._path, "it is the database of another application", "a file for this store alone"
            )
        if write_ahead(connection, WAIT) != "wal":
            raise UnsafeConfigError(
                "path", self._path, "SQLite keeps no write-ahead log there", "a file on a local disk, or MemoryDedupStore"
            )
        connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS[self._durability]}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT}")
        connection.execute(f"PRAGMA cache_size = -{CACHE}")
        connection.execute(
            "PRAGMA temp_store = MEMORY"
        )  # else each batch copies the pages it changes to a file, to undo itself
        connection.execute("BEGIN IMMEDIATE")  # of several who create the file one does
        if ask("user_version") == 0:
            for statement in SCHEMA:
                connection.execute(statement)
            connection.executemany("INSERT INTO place VALUES (?)", ((number,) for number in range(CHUNK)))
            connection.execute("INSERT INTO rotation VALUES (0, ?, 0)", (self._clock(),))
            connection.execute(f"PRAGMA application_id = {OURS}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        if (version := ask("user_version")) != FORMAT:
            raise UnsafeConfigError(
                "path",
                self._path,
                f"its format is {version}, and this version of kafka_guarantees knows {FORMAT}",
                "a later version, or another file; that one knows no id yet",
            )
        connection.execute("UPDATE rotation SET retention = ?", (self._retention.total_seconds(),))
        connection.execute("COMMIT")

    def _let_go(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Transaction:
    """What the calls do inside of one; its beginning empties the generations that are due."""

    def __init__(self, connection: sqlite3.Connection, scope: str | None, now: float) -> None:
        self._connection = connection
        self.now = now
        self.purged = 0
        self.current, since, retention, self._scope = connection.execute(BEGUN, (scope,)).fetchone()
        period = retention / (GENERATIONS - 1)
        if not 0 <= now - since < period:
            self._rotate(now - since, period)
        if self._scope is None and scope is not None:
            self._scope = connection.execute("INSERT INTO scope (name) VALUES (?)", (scope,)).lastrowid

    def execute(self, statement: str, packed: _Packed, *, token: bytes = b"", until: float = 0.0) -> sqlite3.Cursor:
        """Once for all items of a chunk."""
        return self._connection.execute(statement, {**packed, "scope": self._scope, "token": token, "until": until})

    def _rotate(self, age: float, period: float) -> None:
        """Empty the oldest generation, and make it the current one, once for each period that is over."""
        if age < 0:  # the clock was put back: its future must not keep everything for ever, nor its past forget too early
            self._connection.execute("UPDATE rotation SET since = ?", (self.now,))
            return
        over = min(int(age / period), GENERATIONS)
        for _ in range(over):
            self.current = (self.current + 1) % GENERATIONS
            # Without WHERE SQLite gives the pages back unread by row, and counts.
            self.purged += self._connection.execute(f"DELETE FROM completed_{self.current}").rowcount  # noqa: S608
        since = self.now if over == GENERATIONS else self.now - age + over * period
        self._connection.execute("UPDATE rotation SET current = ?, since = ?", (self.current, since))
        # A claim outlives its lease by a retention: until then a late complete() counts.
        self._connection.execute("DELETE FROM claim WHERE until < ?", (self.now - period * (GENERATIONS - 1),))


def _chunks(items: Sequence[Item]) -> Iterator[tuple[list[Item], _Packed]]:
    """As many as one statement takes, in the order of their keys: neighbours share pages (D18)."""
    ordered = sorted(items, key=itemgetter(0))
    for start in range(0, len(ordered), CHUNK):
        chunk = ordered[start : start + CHUNK]
        yield chunk, _packed(chunk)


def _packed(chunk: Sequence[Item]) -> _Packed:
    """What statements take for these items."""
    return {"count": len(chunk), **joined(chunk)}


def _judge(known: tuple[Any, ...] | None, item: Item, token: bytes, takeover: Takeover, now: float) -> Outcome:
    """The outcome of a claim of a key of which the file knows this."""
    if known is None:
        return Outcome.NEW
    _, fingerprint, owner, position, until = known
    if owner is None:
        differs = NO_FINGERPRINT != fingerprint != (item.fingerprint or fingerprint)
        return Outcome.MISMATCH if differs else Outcome.DUPLICATE
    if owner == token:
        return Outcome.NEW
    if until <= now or (takeover == "position" and position == item.position):
        return Outcome.TAKEN_OVER
    return Outcome.IN_PROGRESS
