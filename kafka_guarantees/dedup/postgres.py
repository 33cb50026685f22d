"""A deduplication store in PostgreSQL: several hosts, ids that survive power loss.

Rules.
* One statement per call, over the whole batch; a second one only where not everything in it is new.
* The clock is the server's, for leases and for retention (D15).
* Rows are locked in the order of their keys, whoever locks them: else batches that overlap deadlock (D13).
* The decisions are the database's, and are made on the newest version of a row: READ COMMITTED, whatever the default is.

The table has one row for each id. ``state`` is the outcome that made it so: claimed (1, 2) or completed (3). ``until`` is the
end of the lease, and then of the retention. It changes with each completion, so it has no index and updates stay in their page
(HOT; that is what the fill factor is for). Nor has ``claimed_at``: an index is a page to write for each id, and ``purge`` walks
through the table instead, some pages at a time (from PostgreSQL 14 on it reads only those). In the primary key the key comes
first, since it nearly always tells two rows apart. Tables of early versions have the scope first, and an index on
``claimed_at``: they work as well, and are slower.
"""

from __future__ import annotations

import os
import re
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import ConnectionPool

from ..errors import ForkedClientError, KafkaGuaranteesError, StoreUnavailable
from .contract import Capabilities, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from .contract import Item, Takeover

_TABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}(\.[A-Za-z_][A-Za-z0-9_]{0,62})?")  # S03
_VERSION: Final = "kafka_guarantees.dedup 1"  # D19: kept as the comment of the table
_SCHEMA_LOCK: Final = 0x6B675F6465647570  # any number that all agree on: "kg_dedup"

_CONNECTION_WAIT: Final = 10.0  # seconds for a connection of the pool
_ATTEMPTS: Final = 5
_TRY_AGAIN: Final = {"40001", "40P01"}  # a serialization failure, a deadlock: nothing was written (D13)
_PURGE_CHUNK: Final = 1000  # rows that are locked at a time
_PURGE_PAGES: Final = 200  # that are looked at at a time; some thirty ids in each

# A database host that is gone is noticed in about 20 seconds, not in two hours.
_CONNECTION: Final = {"keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}

_CREATE: Final = (
    """
    CREATE TABLE {table} (
        scope text, key bytea, state smallint NOT NULL, token bytea NOT NULL, position bytea NOT NULL,
        fingerprint bytea NOT NULL, until timestamptz NOT NULL, claimed_at timestamptz NOT NULL,
        PRIMARY KEY (key, scope)
    ) WITH (fillfactor = 50)
    """,
    f"COMMENT ON TABLE {{table}} IS '{_VERSION}'",
)

# A rival that holds rows and stands still does not stop us for longer. Without the other scans rows are visited in the order of
# the keys, and a plan that was made while the table was small does not stay.
_SETTINGS: Final = """
    SELECT set_config('lock_timeout', '5s', true), set_config('statement_timeout', '30s', true),
        set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true)
"""

# One argument with all keys, one after the other, is packed and parsed faster than an array of them.
_ITEMS: Final = """(
    SELECT substring(%(keys)b FROM n * 16 + 1 FOR 16) AS key, substring(%(others)b FROM n * %(size)s + 1 FOR %(size)s) AS other
    FROM generate_series(0, octet_length(%(keys)b) / 16 - 1) AS n
) AS item"""

_CLAIM: Final = f"""
    INSERT INTO {{table}} AS t (scope, key, state, token, position, fingerprint, until, claimed_at)
    SELECT %(scope)s, item.key, 1, %(token)b, item.other, '', clock.now + %(lease)s, clock.now
    FROM (SELECT clock_timestamp() AS now) AS clock, {_ITEMS}
    ON CONFLICT (scope, key) DO UPDATE SET
        state = CASE WHEN t.state = 3 OR t.token = EXCLUDED.token THEN 1 ELSE 2 END,
        token = EXCLUDED.token, position = EXCLUDED.position, until = EXCLUDED.until
    WHERE t.until <= clock_timestamp()
        OR t.state < 3 AND (t.token = EXCLUDED.token OR %(by_position)s AND t.position = EXCLUDED.position)
    RETURNING key, state
"""  # noqa: S608 - all values are bound
_READ: Final = "SELECT key, state, fingerprint FROM {table} WHERE scope = %(scope)s AND key = ANY(%(keys)b)"

# An upsert that only finds rows: UPDATE .. FROM visits rows in the planner's order, by estimates that are wrong for
# a token that statistics have not seen.
_COMPLETE: Final = f"""
    INSERT INTO {{table}} AS t (scope, key, state, token, position, fingerprint, until, claimed_at)
    SELECT %(scope)s, item.key, 3, %(token)b, '', item.other, clock.now + %(retention)s, clock.now
    FROM (SELECT clock_timestamp() AS now) AS clock, {_ITEMS}
    WHERE (SELECT c.state < 3 AND c.token = %(token)b FROM {{table}} AS c WHERE c.scope = %(scope)s AND c.key = item.key)
    ON CONFLICT (scope, key) DO UPDATE SET state = 3, fingerprint = EXCLUDED.fingerprint, until = EXCLUDED.until
    WHERE t.state < 3 AND t.token = EXCLUDED.token
"""  # noqa: S608 - all values are bound
_COMPLETED: Final = f"{_READ} AND state = 3 AND until > clock_timestamp()"

_RELEASE: Final = """
    DELETE FROM {table} WHERE scope = %(scope)s AND key = ANY(%(keys)b) AND state < 3 AND token = %(token)b
"""

# A claim that nobody came back for is kept as long as a completed id.
_PURGE: Final = """
    DELETE FROM {table} WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM {table} WHERE ctid >= %(begin)s::tid AND ctid < %(end)s::tid
            AND until < now() - CASE WHEN state = 3 THEN interval '0' ELSE %(retention)s END
        LIMIT %(limit)s FOR UPDATE SKIP LOCKED
    ))
"""
_PAGES: Final = "SELECT pg_relation_size('{table}') / current_setting('block_size')::int"

_NO_FINGERPRINT: Final = bytes(8)


class PostgresDedupStore:
    """Message ids in a table of PostgreSQL 12 or newer, which is created on the first use.

    Args:
        pool: a pool of psycopg, which stays the caller's; or what ``psycopg.connect`` takes: then the store has a small pool
            of its own, which ``close()`` closes.
        table: its name, with or without a schema.
        retention: how long a completed id is remembered.

    Raises:
        ValueError: the table's name, the retention or the connection string cannot be.
    """

    def __init__(
        self, pool: ConnectionPool[Any] | str, *, table: str = "kg_dedup", retention: timedelta = timedelta(hours=24)
    ) -> None:
        if not isinstance(table, str) or not _TABLE.fullmatch(table):
            raise ValueError(f"table={table!r}: letters, digits and _ are allowed, and one dot after a schema")
        if retention <= timedelta(0):
            raise ValueError(f"retention={retention!r}: must be more than nothing")
        self._pool: ConnectionPool[Any] = _small_pool(pool) if isinstance(pool, str) else pool
        self._own = isinstance(pool, str)
        self._pid = os.getpid()
        self._table = table
        self._quoted = ".".join(f'"{name}"' for name in table.split("."))
        self._retention = retention
        self._opening = threading.Lock()
        self._ready = False
        self._purged = 0  # up to which page purge() came

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
            StoreUnavailable: PostgreSQL did not answer, or refused.
            ForkedClientError: the store was made by another process.
            KafkaGuaranteesError: the table is of another version.
            ValueError: a key, position, fingerprint or token of another size than the contract says.
        """
        if not items:
            return []
        _check(items, token)
        arguments = {
            **_packed(items, [item[1] for item in items]),
            "scope": scope,
            "token": token,
            "lease": timedelta(seconds=lease),
            "by_position": takeover == "position",
        }
        outcomes = {key: Outcome(state) for key, state in self._rows(_CLAIM, arguments)}
        if len(outcomes) < len(items):
            # They were locked, and are read after that: with the snapshot of the first statement a rival's would be missing.
            others = {item[0]: item[2] for item in items if item[0] not in outcomes}
            found = {key: rest for key, *rest in self._rows(_READ, {"scope": scope, "keys": list(others)})}
            outcomes.update((key, _outcome(found.get(key), mine)) for key, mine in others.items())
        return [outcomes[item[0]] for item in items]

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        """See ``DedupStore.complete``.

        Raises:
            StoreUnavailable: PostgreSQL did not answer, or refused.
            KafkaGuaranteesError: the table is of another version.
            ValueError: a key, fingerprint or token of another size than the contract says.
        """
        if not items:
            return []
        _check(items, token)
        packed = _packed(items, [item[2] or _NO_FINGERPRINT for item in items])
        arguments = {**packed, "scope": scope, "token": token, "retention": self._retention}
        if self._count(_COMPLETE, arguments) == len(items):
            return [True] * len(items)
        keys = [item[0] for item in items]
        done = {row[0] for row in self._rows(_COMPLETED, {"scope": scope, "keys": keys})}
        return [key in done for key in keys]

    def release(self, scope: str, items: Sequence[Item], *, token: bytes) -> None:
        """See ``DedupStore.release``.

        Raises:
            StoreUnavailable: PostgreSQL did not answer, or refused.
            KafkaGuaranteesError: the table is of another version.
            ValueError: a key or token of another size than the contract says.
        """
        if items:
            _check(items, token)
            self._count(_RELEASE, {"scope": scope, "keys": [item[0] for item in items], "token": token})

    def purge(self, *, limit: int = 10_000) -> int:
        """See ``DedupStore.purge``. Looks at some five times as many ids. Those that somebody uses are left for the next time.

        Raises:
            StoreUnavailable: PostgreSQL did not answer, or refused.
            KafkaGuaranteesError: the table is of another version.
        """
        [(count,)] = self._rows(_PAGES, {})
        removed = walked = 0
        while removed < limit and walked < min(count, max(_PURGE_PAGES, limit // 5)):
            begin = self._purged if self._purged < count else 0
            chunk, end = min(_PURGE_CHUNK, limit - removed), begin + _PURGE_PAGES
            where = {"begin": f"({begin},0)", "end": f"({end},0)"}
            found = self._count(_PURGE, {**where, "retention": self._retention, "limit": chunk})
            removed += found
            if found < chunk:  # else there may be more in these pages
                walked += _PURGE_PAGES
                self._purged = end
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

    def _rows(self, statement: str, arguments: dict[str, Any]) -> list[tuple[Any, ...]]:
        return self._run(statement, arguments).fetchall()

    def _count(self, statement: str, arguments: dict[str, Any]) -> int:
        return self._run(statement, arguments).rowcount

    def _run(self, statement: str, arguments: dict[str, Any]) -> psycopg.Cursor[tuple[Any, ...]]:
        if os.getpid() != self._pid:
            raise ForkedClientError(
                "this PostgresDedupStore was made in another process, and connections to PostgreSQL do not survive fork(). "
                "Nothing was written. Make the store after the fork, in the process that uses it."
            )
        try:
            if not self._ready:
                self._open()
            with self._pool.connection(_CONNECTION_WAIT) as connection, _Autocommit(connection):
                for last in (*[False] * (_ATTEMPTS - 1), True):
                    try:
                        return self._transaction(connection, statement, arguments)
                    except psycopg.OperationalError as exc:
                        if last or exc.sqlstate not in _TRY_AGAIN:
                            raise
                raise AssertionError("the last attempt returns or raises")
        except psycopg.Error as exc:
            # Not its text: it may quote parts of the connection string (S01).
            code = f"{type(exc).__name__}, SQLSTATE {exc.sqlstate}" if exc.sqlstate else type(exc).__name__
            raise StoreUnavailable(
                f"PostgreSQL did not answer, or refused ({code}): whether ids were written is unknown. "
                "The same call may be made again."
            ) from exc

    def _transaction(
        self, connection: psycopg.Connection[Any], statement: str, arguments: dict[str, Any]
    ) -> psycopg.Cursor[tuple[Any, ...]]:
        cursor = psycopg.Cursor(connection, row_factory=tuple_row)
        try:
            with connection.pipeline():
                connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
                connection.execute(_SETTINGS)
                cursor.execute(self._sql(statement), arguments, binary=True)
                connection.execute("COMMIT")
        finally:
            if connection.info.transaction_status in {TransactionStatus.INERROR, TransactionStatus.INTRANS}:
                connection.rollback()
        return cursor

    def _sql(self, statement: str) -> bytes:
        return statement.replace("{table}", self._quoted).encode()

    def _open(self) -> None:
        """Open the pool and create the table, where that is to be done."""
        with self._opening:
            if self._ready:
                return
            if self._own:
                self._pool.open()
            with self._pool.connection(_CONNECTION_WAIT) as connection, _Autocommit(connection):
                if self._comment(connection) is None:
                    with connection.transaction():
                        connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
                        connection.execute("SET LOCAL lock_timeout = '30s'")
                        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_SCHEMA_LOCK,))
                        if self._comment(connection) is None:  # nobody was faster
                            for statement in _CREATE:
                                connection.execute(self._sql(statement))
                comment = self._comment(connection)
            if comment != _VERSION:
                raise KafkaGuaranteesError(
                    f"the table {self._table} is not of this version: its comment is {comment!r}, not {_VERSION!r}. Nothing "
                    "was handled. Give the store another table."
                )
            self._ready = True

    def _comment(self, connection: psycopg.Connection[Any]) -> str | None:
        """The table's comment; empty where it has none, None where there is no table."""
        row = psycopg.Cursor(connection, row_factory=tuple_row).execute(
            "SELECT coalesce(obj_description(oid, 'pg_class'), '') FROM pg_class WHERE oid = to_regclass(%s)", (self._quoted,)
        )
        found = row.fetchone()
        return None if found is None else str(found[0])


class _Autocommit:
    """A connection begins no transaction by itself for a while: whatever the pool has set, ``BEGIN`` is ours."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._usual = connection.autocommit

    def __enter__(self) -> None:
        self._connection.autocommit = True

    def __exit__(self, *_: object) -> None:
        if not self._connection.closed:
            self._connection.autocommit = self._usual


def _small_pool(conninfo: str) -> ConnectionPool[Any]:
    try:
        known = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
        host, port = known.get("host", ""), known.get("port", "5432")
        readable = "@" not in host[1:] and port.replace(",", "").isdigit()
    except psycopg.Error:
        readable = False
    if not readable:
        # What a password with @ or / spoils becomes the host or the port, and those are quoted in messages and logs (S01).
        raise ValueError("the connection string of PostgreSQL cannot be read; a URL needs %XX for special characters") from None
    more = {name: value for name, value in _CONNECTION.items() if name not in known}
    return ConnectionPool(conninfo, min_size=1, max_size=4, open=False, name="kafka-guarantees-dedup", kwargs=more)


def _check(items: Sequence[Item], token: bytes) -> None:
    # "others" of the wrong size would be those of other keys.
    if not {16}.issuperset(map(len, (token, *[part for item in items for part in item[:2]]))):
        raise ValueError("a key, a position and a token have 16 bytes")
    if not {0, 8}.issuperset([len(item[2]) for item in items]):
        raise ValueError("a fingerprint has 8 bytes, or none")


def _packed(items: Sequence[Item], others: list[bytes]) -> dict[str, Any]:
    """The keys in their order, and one more value for each of them."""
    pairs = sorted(zip((item[0] for item in items), others, strict=True))
    return {
        "keys": b"".join([key for key, _ in pairs]),
        "others": b"".join([other for _, other in pairs]),
        "size": len(others[0]),
    }


def _outcome(found: Sequence[Any] | None, mine: bytes) -> Outcome:
    """What a row that could not be claimed says; None: it was released meanwhile, and the next claim gets it."""
    if found is None or found[0] != Outcome.DUPLICATE:
        return Outcome.IN_PROGRESS
    return Outcome.MISMATCH if mine and found[1] not in {mine, _NO_FINGERPRINT} else Outcome.DUPLICATE
