"""A deduplication store in PostgreSQL: several hosts, ids that survive power loss.

Rules.
* One round trip per call, and one statement where all in it is new, or is completed as it was claimed.
* The clock is the server's, for leases and for retention (D15).
* Who waits for others holds locks in one order: ids by key, then batches. Else batches that overlap deadlock (D13).
* The decisions are the database's, and are made on the newest version of a row: READ COMMITTED, whatever the default is.

There are two tables. One has a row for each id, which says in which batch it is. The other has a row for each batch: whose it
is, whether it is completed, and until when that holds: the end of the lease, and then of the retention. So each id is written
once, when it is claimed, and completing a thousand of them changes one row.

* ``digest`` is that of the keys and fingerprints of a batch, and finds it when it is completed as a whole. Whoever takes ids
  out of a batch, or completes or releases some of them, clears it first: from then on each id is looked at. What is taken, or
  completed apart, gets a batch of its own.
* A batch that is not there any more has expired, and so have its ids. Therefore ``purge`` removes batches first: a completion
  that comes too late finds nothing, not a half of it.
* Neither time has an index, which would be a page to write for each id. ``purge`` walks through the tables instead, some pages
  at a time (from PostgreSQL 14 on it reads only those). In the primary key of ids the key comes first, since it nearly always
  tells two rows apart.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import threading
from datetime import timedelta
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool

from ..errors import AuthorizationError, ForkedClientError, KafkaGuaranteesError, StoreUnavailable
from ._connecting import check_pool, connection_of, first_line, own_options, plain_cursor
from ._pooler import pooled
from ._silence import Asked
from .contract import Capabilities, Outcome, check_retention
from .ids import KEY_SIZE, NO_FINGERPRINT, joined, split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from .contract import Item, Takeover

_TABLE: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,62}\.)?[A-Za-z_][A-Za-z0-9_]{0,54}")  # S03; PostgreSQL cuts off at 63
_BATCHES: Final = "_batches"  # behind the name of the table
_VERSION: Final = "kafka_guarantees.dedup 2"  # D19: kept as the comment of the table
_SCHEMA_LOCK: Final = 0x6B675F6465647570  # any number that all agree on: "kg_dedup"

_CONNECTION_WAIT: Final = 10.0  # seconds for a connection of the pool
_ATTEMPTS: Final = 5
_TRY_AGAIN: Final = {"40001", "40P01"}  # a serialization failure, a deadlock: nothing was written (D13)
# What no waiting helps against, and what does.
_REFUSED: Final[dict[type[psycopg.Error], str]] = {
    psycopg.errors.InsufficientPrivilege: "Grant the role of the connection SELECT, INSERT, UPDATE and DELETE on the table and "
    "on the one with _batches behind its name; to make them it needs CREATE on the schema.",
    psycopg.errors.UndefinedTable: "Somebody dropped a table while it was in use, and with it what was known of ids. A new "
    "store makes it anew.",
    psycopg.errors.InvalidSchemaName: "Create the schema.",
}
_PURGE_CHUNK: Final = 1000  # rows that are locked at a time
_PURGE_PAGES: Final = 200  # that are looked at at a time; some sixty ids in each

_CREATE: Final = (
    # Each row is updated once: with room in its page that changes no index.
    """
    CREATE TABLE {batches} (
        batch uuid PRIMARY KEY, scope text NOT NULL, token bytea NOT NULL, completed boolean NOT NULL,
        until timestamptz NOT NULL, digest bytea
    ) WITH (fillfactor = 50)
    """,
    "CREATE INDEX ON {batches} (digest) WHERE digest IS NOT NULL",
    """
    CREATE TABLE {table} (
        key bytea, scope text, batch uuid NOT NULL, position bytea NOT NULL, fingerprint bytea NOT NULL,
        PRIMARY KEY (key, scope)
    )
    """,
    f"COMMENT ON TABLE {{table}} IS '{_VERSION}'",
)

# A rival that holds rows and stands still does not stop us for longer. Without the other scans a plan that was made while the
# tables were small is good when they are large: it may be kept until the next ANALYZE. See also OFFSET.
_SETTINGS: Final = b"""
    SELECT set_config('lock_timeout', '5s', true), set_config('statement_timeout', '30s', true),
        set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true)
"""

# One argument with all keys, one after the other, is packed and parsed faster than an array of them.
_ITEMS: Final = """(
    SELECT substring(%(keys)b FROM n * 16 + 1 FOR 16) AS key, substring(%(positions)b FROM n * 16 + 1 FOR 16) AS position,
        substring(%(fingerprints)b FROM n * 8 + 1 FOR 8) AS fingerprint
    FROM generate_series(0, octet_length(%(keys)b) / 16 - 1) AS n
) AS item"""
# OFFSET keeps the planner from the other way round, which it takes where it expects few rows: each, and all items again.
_KNOWN: Final = f"""
    {_ITEMS} JOIN LATERAL (
        SELECT *, ctid AS place FROM {{table}} WHERE key = item.key AND scope = %(scope)s OFFSET 0
    ) AS t ON true
"""  # noqa: S608 - all values are bound
_IN_BATCHES: Final = _KNOWN + " LEFT JOIN LATERAL (SELECT * FROM {batches} WHERE batch = t.batch OFFSET 0) AS b ON true"  # noqa: S608

# The batch of what a part of the same statement, called "own", has written. The digest is made in the order of writing, which
# is that of the keys; if it were not, it would find nothing, and each id would be looked at.
_NOTE: Final = """
    joined AS MATERIALIZED (
        SELECT string_agg(key, '') AS keys, string_agg(fingerprint, '') AS fingerprints FROM own
    ), noted AS (
        INSERT INTO {batches} (batch, scope, token, completed, until, digest)
        SELECT %(batch)s, %(scope)s, %(token)b, %(completed)s, clock_timestamp() + %(time)s, sha256(keys || fingerprints)
        FROM joined WHERE keys IS NOT NULL
    )
"""

_CLAIM: Final = f"""
    WITH own AS (
        INSERT INTO {{table}} (key, scope, batch, position, fingerprint)
        SELECT item.key, %(scope)s, %(batch)s, item.position, item.fingerprint FROM {_ITEMS}
        ON CONFLICT DO NOTHING RETURNING key, fingerprint
    ), {_NOTE}
    SELECT keys FROM joined
"""  # noqa: S608 - all values are bound

_FREE: Final = """(
    b.batch IS NULL OR b.until <= clock_timestamp()
    OR NOT b.completed AND (b.token = %(token)b OR %(by_position)s AND t.position = item.position)
)"""
_READ: Final = f"SELECT item.key, {_FREE}, b.completed, t.fingerprint FROM {_IN_BATCHES}"  # noqa: S608 - all values are bound

# Before ids leave their batches. Each statement sees what was committed before it began, so it sees what the one before it has
# waited for; and ids that came since then, which it takes along where nobody has them: who holds batches waits for no id.
# ANY, not IN: else a plan from when there were few batches goes through all of them.
_LOCK: Final = (
    f"SELECT FROM {_KNOWN} ORDER BY t.key FOR UPDATE OF t",
    f"""
    WITH ids AS MATERIALIZED (
        SELECT t.batch FROM {_KNOWN} FOR UPDATE OF t SKIP LOCKED
    ), held AS MATERIALIZED (
        SELECT batch, digest FROM {{batches}} WHERE batch = ANY(ARRAY(SELECT batch FROM ids)) ORDER BY batch FOR UPDATE
    )
    UPDATE {{batches}} SET digest = NULL WHERE batch = ANY(ARRAY(SELECT batch FROM held WHERE digest IS NOT NULL))
    """,  # noqa: S608 - all values are bound
)

# An id that is not locked is left alone: it is in a batch with a digest, or leaves "before".
_FOUND: Final = f"""
    found AS MATERIALIZED (
        SELECT item.*, t.place, t.batch AS before, b.batch IS NULL OR b.completed OR b.token = %(token)b AS unhandled
        FROM {_IN_BATCHES} WHERE b.digest IS NULL AND {{which}}
    )
"""  # noqa: S608 - all values are bound
_STILL: Final = "t.ctid = found.place AND t.batch = found.before"  # the second for a row that is waited for: its place is old
_MOVE: Final = f"""
    WITH {_FOUND}, own AS (
        UPDATE {{table}} AS t SET batch = %(batch)s, position = found.position, fingerprint = found.fingerprint
        FROM found WHERE {_STILL} RETURNING t.key, t.fingerprint, found.unhandled
    ), {_NOTE}
    SELECT key, unhandled FROM own
"""  # noqa: S608 - all values are bound
_FORGET: Final = f"WITH {_FOUND} DELETE FROM {{table}} AS t USING found WHERE {_STILL}"  # noqa: S608 - all values are bound

_TAKE: Final = (*_LOCK, _MOVE.replace("{which}", _FREE))

_COMPLETE: Final = """
    UPDATE {batches} SET completed = true, until = clock_timestamp() + %(time)s
    WHERE digest = %(digest)b AND scope = %(scope)s AND token = %(token)b AND NOT completed
"""
_CLAIMED: Final = "NOT b.completed AND b.token = %(token)b"
_COMPLETE_SOME: Final = (*_LOCK, _MOVE.replace("{which}", _CLAIMED))
_COMPLETED: Final = f"SELECT item.key FROM {_IN_BATCHES} WHERE b.completed AND b.until > clock_timestamp()"  # noqa: S608
_RELEASE: Final = (*_LOCK, _FORGET.replace("{which}", _CLAIMED))

_PURGE: Final = {
    # A claim that nobody came back for is kept as long as a completed id.
    "{batches}": """
        DELETE FROM {batches} WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM {batches} WHERE ctid >= %(begin)s::tid AND ctid < %(end)s::tid
                AND until < now() - CASE WHEN completed THEN interval '0' ELSE %(retention)s END
            LIMIT %(limit)s FOR UPDATE SKIP LOCKED
        ))
    """,
    # By the snapshot an id that was taken a moment ago is in a batch that is not there; but it has moved to another ctid, which
    # the snapshot does not have either. OFFSET as above: one look-up for each id.
    "{table}": """
        DELETE FROM {table} WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM {table} AS t WHERE ctid >= %(begin)s::tid AND ctid < %(end)s::tid
                AND NOT EXISTS (SELECT FROM {batches} AS b WHERE b.batch = t.batch OFFSET 0)
            LIMIT %(limit)s FOR UPDATE SKIP LOCKED
        ))
    """,
}
_PAGES: Final = "SELECT pg_relation_size('{walked}') / current_setting('block_size')::int"


class PostgresDedupStore:
    """Message ids in a table of PostgreSQL 12 or newer, which is created on the first use.

    Args:
        pool: a pool of psycopg, which stays the caller's; or what ``psycopg.connect`` takes: then the store has a small pool
            of its own, which ``close()`` closes.
        table: its name, with or without a schema. The table of batches has ``_batches`` behind it.
        retention: how long a completed id is remembered.

    Raises:
        ValueError: the table's name, the retention or the connection string is not valid.
        TypeError: that is no pool, or one of asyncio (``AsyncConnectionPool``).
    """

    def __init__(
        self, pool: ConnectionPool[Any] | str, *, table: str = "kg_dedup", retention: timedelta = timedelta(hours=24)
    ) -> None:
        if not isinstance(table, str) or not _TABLE.fullmatch(table):
            raise ValueError(f"table={table!r}: letters, digits and _ are allowed, and one dot after a schema")
        check_retention(retention)
        check_pool(pool)
        self._pool: ConnectionPool[Any] = _small_pool(pool) if isinstance(pool, str) else pool
        self._own = isinstance(pool, str)
        self._pid = os.getpid()
        self._table = table
        self._quoted, self._batches = (".".join(f'"{name}"' for name in full.split(".")) for full in (table, table + _BATCHES))
        self._retention = retention
        self._opening = threading.Lock()
        self._ready = False
        self._purged: dict[str, int] = {}  # up to which page of each table purge() came

    def __repr__(self) -> str:
        return f"PostgresDedupStore(table={self._table!r}, retention={self._retention})"  # S01: nothing of the connection

    @property
    def capabilities(self) -> Capabilities:
        """Shared, and durable, as long as ``synchronous_commit`` is not off."""
        return Capabilities(shared=True, durable="power", clock="server")

    @property
    def retention(self) -> timedelta:
        """How long a completed id is remembered."""
        return self._retention

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        """See ``DedupStore.claim``.

        Raises:
            StoreUnavailable: PostgreSQL did not answer.
            AuthorizationError: it does not let this client in, or the role has no right to the table.
            ForkedClientError: the store was made by another process.
            KafkaGuaranteesError: the table is of another version, or was dropped.
            ValueError: a key, position, fingerprint or token of another size than the contract says.
        """
        if not items:
            return []
        arguments = {**_packed(items, token), **_batch(scope, token, timedelta(seconds=lease), completed=False)}
        [(keys,)] = self._rows(_CLAIM, arguments)
        if keys is not None and len(keys) == len(arguments["keys"]):
            return [Outcome.NEW] * len(items)
        outcomes = dict.fromkeys(split(keys or b""), Outcome.NEW)
        others = [item for item in items if item[0] not in outcomes]
        if others:  # none where an id comes twice
            outcomes.update(self._claim_known(scope, others, token, lease, by_position=takeover == "position"))
        return [outcomes[item[0]] for item in items]

    def _claim_known(
        self, scope: str, items: Sequence[Item], token: bytes, lease: float, *, by_position: bool
    ) -> dict[bytes, Outcome]:
        """Claim ids that were there already. What changes meanwhile is in progress: the next claim knows more."""
        arguments = {**_packed(items, token), "scope": scope, "by_position": by_position}
        found = {key: rest for key, *rest in self._rows(_READ, arguments)}
        free = [item for item in items if item[0] in found and found[item[0]][0]]
        outcomes = {item[0]: _outcome(found.get(item[0]), item[2]) for item in items}
        if free:
            taking = _batch(scope, token, timedelta(seconds=lease), completed=False)
            for key, unhandled in self._rows(_TAKE, {**_packed(free, token), **taking, "by_position": by_position}):
                outcomes[key] = Outcome.NEW if unhandled else Outcome.TAKEN_OVER
        return outcomes

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        """See ``DedupStore.complete``.

        Raises:
            StoreUnavailable: PostgreSQL did not answer.
            AuthorizationError: it does not let this client in, or the role has no right to the table.
            KafkaGuaranteesError: the table is of another version, or was dropped.
            ValueError: a key, fingerprint or token of another size than the contract says.
        """
        if not items:
            return []
        arguments = {**_packed(items, token), **_batch(scope, token, self._retention, completed=True)}
        digest = hashlib.sha256(arguments["keys"] + arguments["fingerprints"]).digest()
        if self._count(_COMPLETE, {**arguments, "digest": digest}) or self._count(_COMPLETE_SOME, arguments) == len(items):
            return [True] * len(items)
        done = {key for (key,) in self._rows(_COMPLETED, arguments)}
        return [item[0] in done for item in items]

    def release(self, scope: str, items: Sequence[Item], *, token: bytes) -> None:
        """See ``DedupStore.release``.

        Raises:
            StoreUnavailable: PostgreSQL did not answer.
            AuthorizationError: it does not let this client in, or the role has no right to the table.
            KafkaGuaranteesError: the table is of another version, or was dropped.
            ValueError: a key or token of another size than the contract says.
        """
        if items:
            self._count(_RELEASE, {**_packed(items, token), "scope": scope})

    def purge(self, *, limit: int = 10_000) -> int:
        """See ``DedupStore.purge``. Looks at some five times as many ids. Those that somebody uses are left for the next time.

        Raises:
            StoreUnavailable: PostgreSQL did not answer.
            AuthorizationError: it does not let this client in, or the role has no right to the table.
            KafkaGuaranteesError: the table is of another version, or was dropped.
        """
        self._walk("{batches}", limit)
        return self._walk("{table}", limit)

    def _walk(self, table: str, limit: int) -> int:
        """Remove what is expired in the next pages of a table. Returns how many rows."""
        [(count,)] = self._rows(_PAGES.replace("{walked}", table), {})
        if count and table not in self._purged:  # not the first: a process that ends soon would never come to the last
            self._purged[table] = random.randrange(0, count, _PURGE_PAGES)  # noqa: S311 - no secret
        removed = walked = 0
        while removed < limit and walked < min(count, max(_PURGE_PAGES, limit // 16)):
            begin = self._purged[table] if self._purged[table] < count else 0
            chunk, end = min(_PURGE_CHUNK, limit - removed), begin + _PURGE_PAGES
            where = {"begin": f"({begin},0)", "end": f"({end},0)"}
            found = self._count(_PURGE[table], {**where, "retention": self._retention, "limit": chunk})
            removed += found
            if found < chunk:  # else there may be more in these pages
                walked += _PURGE_PAGES
                self._purged[table] = end
        return removed

    def close(self) -> None:
        """Close the pool, if it is the store's own."""
        if self._own and os.getpid() == self._pid:  # the threads of the pool are not in a child, and its sockets the parent's
            self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- one transaction, one round trip ------------------------------------------------------------------------------------

    def _rows(self, statements: str | tuple[str, ...], arguments: dict[str, Any]) -> list[tuple[Any, ...]]:
        return self._run(statements, arguments).fetchall()

    def _count(self, statements: str | tuple[str, ...], arguments: dict[str, Any]) -> int:
        return self._run(statements, arguments).rowcount

    def _run(self, statements: str | tuple[str, ...], arguments: dict[str, Any]) -> psycopg.Cursor[tuple[Any, ...]]:
        """Returns what the last of the statements answers."""
        if os.getpid() != self._pid:
            raise ForkedClientError(
                "this PostgresDedupStore was made in another process, and connections to PostgreSQL do not survive fork(). "
                "Nothing was written. Make the store after the fork, in the process that uses it."
            )
        try:
            if not self._ready:
                self._open()
            with connection_of(self._pool, _CONNECTION_WAIT) as connection, Asked(connection), _OfOurs(connection):
                for _ in range(_ATTEMPTS - 1):
                    try:
                        return self._transaction(connection, statements, arguments)
                    except psycopg.OperationalError as exc:
                        if exc.sqlstate not in _TRY_AGAIN:
                            raise
                return self._transaction(connection, statements, arguments)
        except tuple(_REFUSED) as exc:
            kind = AuthorizationError if isinstance(exc, psycopg.errors.InsufficientPrivilege) else KafkaGuaranteesError
            raise kind(
                f"PostgreSQL refused the store {self._table} ({type(exc).__name__}, SQLSTATE {exc.sqlstate}), and would do so "
                f"again. Nothing was written. {_REFUSED[type(exc)]}"
            ) from exc
        except psycopg.Error as exc:
            # Not the server's text: it may quote values. Without a code it is libpq's, of a connection that was lost.
            said = f", SQLSTATE {exc.sqlstate}" if exc.sqlstate else f": {first_line(exc)}"
            raise StoreUnavailable(
                f"PostgreSQL did not answer, or refused ({type(exc).__name__}{said}): whether ids were written is unknown. "
                "The same call may be made again."
            ) from exc

    def _transaction(
        self, connection: psycopg.Connection[Any], statements: str | tuple[str, ...], arguments: dict[str, Any]
    ) -> psycopg.Cursor[tuple[Any, ...]]:
        *before, last = (statements,) if isinstance(statements, str) else statements
        cursor = plain_cursor(connection)
        try:
            with connection.pipeline():
                plain_cursor(connection).execute(b"BEGIN ISOLATION LEVEL READ COMMITTED")
                plain_cursor(connection).execute(_SETTINGS)
                for statement in before:
                    plain_cursor(connection).execute(self._sql(statement), arguments, binary=True)
                cursor.execute(self._sql(last), arguments, binary=True)
                plain_cursor(connection).execute(b"COMMIT")
        finally:
            if connection.info.transaction_status in {TransactionStatus.INERROR, TransactionStatus.INTRANS}:
                connection.rollback()
        return cursor

    def _sql(self, statement: str) -> bytes:
        return statement.replace("{table}", self._quoted).replace("{batches}", self._batches).encode()

    def _open(self) -> None:
        """Open the pool and create the table, where that is to be done."""
        with self._opening:
            if self._ready:
                return
            if self._own:
                self._pool.open()
            with connection_of(self._pool, _CONNECTION_WAIT) as connection, Asked(connection), _OfOurs(connection):
                if self._comment(connection) is None:
                    with connection.transaction():
                        cursor = plain_cursor(connection)
                        cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
                        cursor.execute("SET LOCAL lock_timeout = '30s'")
                        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (_SCHEMA_LOCK,))
                        if self._comment(connection) is None:  # nobody was faster
                            for statement in _CREATE:
                                cursor.execute(self._sql(statement))
                comment = self._comment(connection)
            if comment != _VERSION:
                raise KafkaGuaranteesError(
                    f"the table {self._table} is not of this version: its comment is {comment!r}, not {_VERSION!r}. Nothing "
                    "was handled. Give the store another table."
                )
            self._ready = True

    def _comment(self, connection: psycopg.Connection[Any]) -> str | None:
        """The table's comment; empty where it has none, None where there is no table."""
        row = plain_cursor(connection).execute(
            "SELECT coalesce(obj_description(oid, 'pg_class'), '') FROM pg_class WHERE oid = to_regclass(%s)", (self._quoted,)
        )
        found = row.fetchone()
        if found is None:
            return None
        return found[0].decode(errors="replace") if isinstance(found[0], bytes) else str(found[0])  # bytes from SQL_ASCII


class _OfOurs:
    """A connection is as we need it for a while, whatever the pool has set: ``BEGIN`` is ours, and see ``_pooler.py``."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._autocommit, self._threshold = connection.autocommit, connection.prepare_threshold

    def __enter__(self) -> None:
        self._connection.autocommit = True
        try:
            if pooled(self._connection):
                self._connection.prepare_threshold = None
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._connection.prepare_threshold = self._threshold
        if not self._connection.closed:
            self._connection.autocommit = self._autocommit


def _small_pool(conninfo: str) -> ConnectionPool[Any]:
    options = own_options(conninfo)
    return ConnectionPool("", min_size=1, max_size=4, open=False, name="kafka-guarantees-dedup", kwargs=options)


def _packed(items: Sequence[Item], token: bytes) -> dict[str, Any]:
    """What each statement takes: the items in the order of their keys, and the token."""
    if len(token) != KEY_SIZE:
        raise ValueError(f"a token has {KEY_SIZE} bytes, not {len(token)}")
    return {**joined(sorted(items, key=itemgetter(0))), "token": token}


def _batch(scope: str, token: bytes, time: timedelta, *, completed: bool) -> dict[str, Any]:
    """A batch that ids may get into."""
    return {"batch": uuid4(), "scope": scope, "token": token, "completed": completed, "time": time}


def _outcome(found: Sequence[Any] | None, mine: bytes) -> Outcome:
    """What an id that was not free says; None: it was released meanwhile, and the next claim gets it."""
    if found is None:
        return Outcome.IN_PROGRESS
    free, completed, fingerprint = found
    if free or not completed:
        return Outcome.IN_PROGRESS
    return Outcome.MISMATCH if mine and fingerprint not in {mine, NO_FINGERPRINT} else Outcome.DUPLICATE
