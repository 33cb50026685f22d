"""An inbox in PostgreSQL: message ids, offsets and the handler's own tables, in one transaction.

Rules.
* READ COMMITTED, always: with a higher level a transaction that waited for another fails instead of seeing what it did (D13).
* Locks are taken in one order: offsets by topic and partition, then ids by key. Else batches with common ids deadlock (D13).
* The unique index is the claim: who inserts an id that another open transaction has inserted waits for the end of that one.
* No COMMIT but ours goes through. The ids of all messages are there before the first is handled: committed without their
  offsets, the messages would be left out as repeats. So a transaction breaks a deferred constraint when it begins, and keeps it
  only with the move of its offsets.
* What is handed to a log or an exception never contains the conninfo (S01).
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import IsolationLevel
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool

from ..errors import AuthorizationError, ForkedClientError, KafkaGuaranteesError, StoreUnavailable
from ._connecting import check_pool, connection_of, first_line, own_options, plain_cursor, shut_down
from ._pooler import pooled
from ._progress import (
    UNFINISHED,
    Advance,
    Reached,
    advance,
    batch_of,
    broke_off,
    compare,
    ended,
    fenced,
    finished_twice,
    fresh_of,
    pending,
    recreated,
)
from ._silence import Asked
from .contract import check_retention
from .ids import FINGERPRINT_SIZE, KEY_SIZE, split

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from ._progress import Batch, Offsets
    from .contract import Entry, Source

    Connection = psycopg.Connection[Any]
    Cursor = psycopg.Cursor[tuple[Any, ...]]

VERSION = 3  # 1: without fingerprints; 2: without the constraint that no COMMIT of a handler keeps
PATIENCE = "10s"  # that a transaction waits for a lock of another one, or for a connection
CONNECT_TIMEOUT = 10  # seconds
LONGEST_IDLE = timedelta(milliseconds=2**31 - 1)  # that PostgreSQL takes
LET_GO = 0.5  # seconds that a handler's own thread may still use the connection when the handler has ended

_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,49}", re.ASCII)  # S03; PostgreSQL cuts names off at 63

_PLAIN = re.compile(r"[A-Za-z0-9_$ .-]+", re.ASCII)

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS "{p}_version" (version int PRIMARY KEY)""",
    # The rows are few and updated all the time: room in the page makes that cheap.
    """CREATE TABLE IF NOT EXISTS "{p}_offset" (
        scope text COLLATE "C" NOT NULL, topic text COLLATE "C" NOT NULL, partition int NOT NULL,
        topic_id bytea NOT NULL, next_offset bigint, {guard}, PRIMARY KEY (scope, topic, partition)) WITH (fillfactor = 50)""",
    # The key comes first: it nearly always tells two rows apart, so that the scope need not be looked at. (It came
    # second in tables of early versions, with an index by time: they work as well, an eighth slower.) Nothing else is indexed:
    # purge() walks through the table.
    # Not partitioned by time: a unique index covers only one partition, so an id would be new again the next day.
    """CREATE TABLE IF NOT EXISTS "{p}_id" (
        expires timestamptz NOT NULL, key bytea NOT NULL, scope text COLLATE "C" NOT NULL, fingerprint bytea,
        PRIMARY KEY (key, scope))""",
    """INSERT INTO "{p}_version" SELECT {version} WHERE NOT EXISTS (SELECT FROM "{p}_version")""",
)
# There is no version 0: a row that says so cannot be committed. Looked at by COMMIT, in whatever words it is said.
_GUARD = f'unfinished int CONSTRAINT "{{p}}{UNFINISHED}" REFERENCES "{{p}}_version" (version) DEFERRABLE INITIALLY DEFERRED'
_UPGRADE = (
    # first, and in the order in which transactions lock them: else the upgrade of a busy inbox ends in a deadlock each time
    """LOCK TABLE "{p}_offset", "{p}_id" IN ACCESS EXCLUSIVE MODE""",
    """ALTER TABLE "{p}_id" ADD COLUMN IF NOT EXISTS fingerprint bytea""",
    """CREATE UNIQUE INDEX IF NOT EXISTS "{p}_version_one" ON "{p}_version" (version)""",
    """ALTER TABLE "{p}_offset" ADD COLUMN IF NOT EXISTS {guard}""",
    """UPDATE "{p}_version" SET version = {version}""",
)


_WHERE = "SELECT nspname FROM pg_namespace WHERE oid = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass(%s))"

# What the move of the offsets says when it fails, between quotation marks in a message in whatever language. Only there: the
# details of other errors quote values, which may be anything.
_MOVED = "kafka_guarantees: an offset has moved"
_ENDED = "kafka_guarantees: another transaction"
_UNDONE = "kafka_guarantees: enlist() was rolled back"
_TRANSACTION = b"SELECT current_setting('transaction_isolation'), pg_current_xact_id()::text::bigint"
_MEDDLED = "the handler ended the transaction"
_CLOSED = "the handler closed the connection"


class _Statements:
    """What is sent to the server, with the names of the tables filled in.

    Args:
        prefix: of the tables.
        schema: that they are in, once it is known: a handler may change the search_path. One with a name that would have to be
            quoted here, or in which the encoding of the connection counts, is left to the search_path.
    """

    def __init__(self, prefix: str, schema: str = "") -> None:
        self.prefix = prefix
        inside = f'"{schema}".' if _PLAIN.fullmatch(schema) else ""

        def named(statement: str) -> bytes:
            sizes = {"version": VERSION, "size": KEY_SIZE, "short": FINGERPRINT_SIZE}
            guard = _GUARD.format(p=prefix)
            said = {"ended": _ENDED, "moved": _MOVED, "undone": _UNDONE}
            return statement.format(p=prefix, s=inside, guard=guard, **said, **sizes).encode()

        self.schema = [named(statement) for statement in _SCHEMA]
        self.upgrade = [named(statement) for statement in _UPGRADE]
        self.version = named('SELECT version FROM "{p}_version"')
        self.read = named(
            'SELECT topic, partition, topic_id, next_offset FROM {s}"{p}_offset" '
            "WHERE scope = %s AND (topic, partition) IN (SELECT * FROM unnest(%s::text[], %s::int[]))"
        )
        # VALUES, not arrays: with one partition the planner makes it a plain look-up in the index. The ids come in one
        # parameter, one after the other and sorted: that is read twice as fast as an array. Each part needs the one before
        # it: how long to wait is said before anything is locked, the offsets are locked before an id is inserted, and what the
        # handler's own waits may be is restored after both.
        self._limits = named("WITH limits AS MATERIALIZED (") + _LIMITS
        self._locked = named(
            "), locked AS MATERIALIZED (SELECT o.topic, o.partition, o.topic_id, o.next_offset "
            'FROM limits, {s}"{p}_offset" AS o JOIN (VALUES @) AS m(topic, partition) '
            "ON o.topic = m.topic AND o.partition = m.partition "
            "WHERE o.scope = %s ORDER BY o.topic, o.partition FOR UPDATE OF o)"
            ', unfinished AS (UPDATE {s}"{p}_offset" AS o SET unfinished = 0 FROM locked AS l WHERE o.scope = %s '
            "AND o.topic = l.topic AND o.partition = l.partition AND l.topic = %s AND l.partition = %s)"
        )
        self._added = named(
            ', added AS (INSERT INTO {s}"{p}_id" (expires, key, scope, fingerprint) '
            "SELECT statement_timestamp() + %s, substring(%s::bytea FROM i * {size} + 1 FOR {size}), %s, "
            "substring(%s::bytea FROM i * {short} + 1 FOR {short}) "
            "FROM generate_series(0, %s - 1) AS i WHERE (SELECT count(*) FROM locked) = @@ "
            "ON CONFLICT DO NOTHING RETURNING key), done AS MATERIALIZED (SELECT count(*) AS new, "
            "CASE WHEN count(*) < %s THEN (SELECT string_agg(key, '') FROM added) END AS keys FROM added)"
        )
        self._nothing_added = named(", done AS MATERIALIZED (SELECT 0 AS new, NULL::bytea AS keys, count(*) FROM locked)")
        self.rows = self._limits + named(
            '), added AS (INSERT INTO {s}"{p}_offset" (scope, topic, partition, topic_id) '
            "SELECT %s, place.* FROM limits, unnest(%s::text[], %s::int[], %s::bytea[]) AS place "
            "ON CONFLICT DO NOTHING RETURNING 1), done AS MATERIALIZED (SELECT count(*) FROM added) "
            "SELECT set_config('lock_timeout', limits.before, true) FROM limits, done"
        )
        self._begun = named(
            " SELECT locked.*, pg_current_xact_id()::text::bigint, done.new, done.keys, "
            "set_config('lock_timeout', limits.before, true) FROM limits, done, locked"
        )
        # FOR UPDATE in the order of the keys comes first: UPDATE alone locks in any order.
        self.refresh = named(
            'WITH old AS (SELECT key FROM {s}"{p}_id" WHERE scope = %(scope)s AND key = ANY(%(keys)s) '
            "AND expires <= statement_timestamp() ORDER BY key FOR UPDATE) "
            'UPDATE {s}"{p}_id" AS known SET expires = statement_timestamp() + %(retention)s, fingerprint = came.fingerprint '
            "FROM old JOIN unnest(%(keys)s::bytea[], %(fingerprints)s::bytea[]) AS came(key, fingerprint) USING (key) "
            "WHERE known.scope = %(scope)s AND known.key = old.key RETURNING known.key"
        )
        self.fingerprints = named('SELECT key, fingerprint FROM {s}"{p}_id" WHERE scope = %s AND key = ANY(%s)')
        self.forget = named('DELETE FROM {s}"{p}_id" WHERE scope = %s AND key = ANY(%s)')
        # It fails where it does not move what it has to, so that the COMMIT that is sent with it is not executed. The number of
        # the transaction is that of the locks and the ids. Another one: the handler ended that. A guard that does not say
        # unfinished: a savepoint took the ids along. Else it has no rows: behind a cursor.stream() of the handler's libpq would
        # hand out those of what comes first in a pipeline one by one.
        self._move = named(
            'WITH moved AS (UPDATE {s}"{p}_offset" AS o SET topic_id = m.topic_id, next_offset = m.after, unfinished = '
            "CASE WHEN o.unfinished IS NULL AND o.topic = %s AND o.partition = %s THEN 0 END "
            "FROM (VALUES @) AS m(topic, partition, topic_id, before, after) "
            "WHERE o.scope = %s AND o.topic = m.topic AND o.partition = m.partition "
            "AND o.next_offset IS NOT DISTINCT FROM m.before RETURNING unfinished) "
            "SELECT FROM moved HAVING (CASE WHEN pg_current_xact_id() <> %s::bigint::text::xid8 THEN '{ended}' "
            "WHEN count(*) <> %s THEN '{moved}' WHEN count(unfinished) > 0 THEN '{undone}' END)::int IS NOT NULL"
        )
        self.purge = named(
            'DELETE FROM {s}"{p}_id" WHERE ctid = ANY(ARRAY(SELECT ctid FROM {s}"{p}_id" '
            "WHERE ctid >= %s::tid AND ctid < %s::tid "
            "AND expires <= statement_timestamp() LIMIT %s FOR UPDATE SKIP LOCKED))"
        )
        self.pages = named("SELECT pg_relation_size('{s}\"{p}_id\"') / current_setting('block_size')::int")

    def begin(self, partitions: int, *, ids: bool) -> bytes:
        added = self._added.replace(b"@@", b"%d" % partitions) if ids else self._nothing_added
        places = b", ".join([b"(%s::text, %s::int)"] * partitions)
        return b"".join((self._limits, self._locked.replace(b"@", places), added, self._begun))

    def move(self, partitions: int) -> bytes:
        return self._move.replace(b"@", b", ".join([b"(%s::text, %s::int, %s::bytea, %s::bigint, %s::bigint)"] * partitions))


# How long to wait for a lock is ours to say for our own statements only: the handler gets its own setting back.
# D04: an owner that is stopped (SIGSTOP, a lost host) must not keep its locks. A limit that the user has set is left alone.
_LIMITS = (
    "SELECT current_setting('lock_timeout') AS before, "
    f"set_config('lock_timeout', '{PATIENCE}', true), set_config('idle_in_transaction_session_timeout', "
    "CASE current_setting('idle_in_transaction_session_timeout') WHEN '0' THEN %s "
    "ELSE current_setting('idle_in_transaction_session_timeout') END, true)"
).encode()


class PostgresInbox:
    """An inbox in a PostgreSQL database (14 or newer).

    The handler writes into the same database, with the connection that it is given; its effects happen once, whichever
    member handles the partition, on whichever host.

    Attributes:
        retention: how long an id is remembered at least, from the beginning of its transaction on, by the server's clock.
    """

    def __init__(
        self,
        pool_or_conninfo: ConnectionPool[Any] | str,
        *,
        prefix: str = "kg_inbox",
        retention: timedelta = timedelta(hours=24),
        idle_limit: timedelta = timedelta(minutes=5),
    ) -> None:
        """Nothing is connected yet. The tables are made at the first use, where they are missing.

        Args:
            pool_or_conninfo: a pool, which stays open after ``close()``; or where to connect, for a pool of two connections.
            prefix: what the names of the tables begin with: an ASCII letter or ``_``, then letters, digits and ``_``.
            retention: how long an id is remembered at least.
            idle_limit: how long a handler may let the connection wait for its next statement, until the server rolls the
                transaction back and frees the partition. Not less than ``max.poll.interval.ms``; 24 days at most.

        Raises:
            ValueError: the prefix, the retention, the idle_limit or the connection string is not valid.
            TypeError: that is no pool, or one of asyncio (``AsyncConnectionPool``).
        """
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise ValueError(f"prefix is an ASCII letter or _, then at most 49 letters, digits and _, not {prefix!r}")
        check_retention(retention)
        check_pool(pool_or_conninfo)
        if not timedelta(milliseconds=1) <= idle_limit <= LONGEST_IDLE:
            raise ValueError(f"idle_limit is a millisecond or longer, and {LONGEST_IDLE} at most, not {idle_limit}")
        self._retention = retention
        self._idle_limit = f"{idle_limit // timedelta(milliseconds=1)}ms"
        self._prefix = prefix
        self._statements = _Statements(prefix)
        self._own: ConnectionPool[Any] | None = None
        self._pool = pool_or_conninfo if isinstance(pool_or_conninfo, ConnectionPool) else self._open_pool(pool_or_conninfo)
        self._pid = os.getpid()
        self._with_rows: set[tuple[str, Source]] = set()  # whose offsets have a row for certain
        self._reached = Reached()
        # in which transaction, the last time
        self._enlisted: weakref.WeakKeyDictionary[Connection, object] = weakref.WeakKeyDictionary()
        self._prepared = False
        self._purged = 0  # up to which page of the ids purge() came
        self._preparing = threading.Lock()
        self._open_connection: Connection | None = None  # in a transaction
        _alive.add(self)

    @property
    def retention(self) -> timedelta:
        return self._retention

    def start_offsets(self, scope: str, sources: Sequence[Source]) -> dict[Source, int | None]:
        """The offsets to go on at; None where nothing of the partition was handled yet.

        Raises:
            TopicRecreated: the offset that is stored belongs to another topic of the same name.
            AuthorizationError: the database does not let this client in, or it has no right to the tables.
            StoreUnavailable: the database did not answer.
        """
        self._prepare()
        with (
            _answers("reading offsets"),
            connection_of(self._pool) as connection,
            Asked(connection),
            _read_committed(connection),
        ):
            rows = plain_cursor(connection).execute(self._statements.read, (scope, *_places(sources))).fetchall()
        offsets = self._offsets(scope, sources, rows)
        self._reached.note(scope, offsets)
        return offsets

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[PostgresInboxTransaction]:
        """Begin; lock the offsets; find out what is fresh. Commit at the end, roll back on an exception.

        The exception is raised as it is, unless it says that the database failed under the handler, not the message: where the
        connection was lost, or the server ended the transaction for a deadlock, ``StoreUnavailable`` is raised from it. What
        the server refuses at the end, by a deferred constraint for example, is raised as it is, too: nothing was written.

        Args:
            scope: whose ids and offsets these are.
            entries: in the order of their offsets within each partition.

        Raises:
            PartitionFenced: another owner advanced an offset meanwhile; or one has gone back, as where a failover lost
                transactions: what they had written is missing, so go on at ``start_offsets()``. Nothing was written.
            TopicRecreated: an offset that is stored belongs to another topic of the same name.
            MessageIdReused: an entry has the id of another message. Nothing was written.
            AuthorizationError: the database does not let this client in, or it has no right to the tables.
            StoreUnavailable: the database did not answer, or another transaction held a lock for 10 seconds. Repeat it.
            KafkaGuaranteesError: the handler ended the transaction or closed the connection, left a statement unfinished, or
                went on after one had failed.
        """
        batch = batch_of(entries)
        self._prepare()
        connection: Connection | None = None
        committing = cut = False
        try:
            with (
                connection_of(self._pool) as connection,
                Asked(connection) as asking,
                _read_committed(connection),
                ExitStack() as committed,
            ):
                with _answers("beginning a transaction"):
                    # in no pipeline: that ends with a Flush behind its Sync, by which PostgreSQL stops the clock of idle_limit
                    committed.enter_context(psycopg.Transaction(connection))
                    asked = self._ask(connection, scope, batch, self._idle_limit)
                opened = self._open(connection, scope, batch, asked)
                self._reached.compare(scope, opened._stored)
                self._open_connection = connection
                try:
                    with asking.in_other_hands():
                        yield opened
                except BaseException as exc:
                    cut = not opened._let_go()
                    if not cut and isinstance(exc, Exception):
                        opened._look_why(exc)
                    cut = cut or isinstance(exc, psycopg.errors.ReadOnlySqlTransaction)  # closed for that, which is its own
                    raise
                finally:
                    self._open_connection = None
                committing = True
                opened._commit(committed)
            self._with_rows.update((scope, source) for source in batch.first)
            self._reached.note(scope, opened._advance.offsets)
        except psycopg.Error as exc:
            if committing and not isinstance(first := _first(exc), _FAILURES):
                raise first from None  # of a constraint, a trigger, or what the handler has set: nothing was written
            if committing:
                raise StoreUnavailable(
                    f"committing a transaction of the inbox failed ({_text(exc)}), so whether it was written is unknown. "
                    "Repeat it with the same entries: what was written is left out then."
                ) from exc
            if connection is None or (connection.closed and not cut) or isinstance(exc, _REPEATABLE):
                raise _unavailable("a transaction", exc) from exc
            raise

    def enlist(self, connection: Connection, scope: str, entries: Sequence[Entry]) -> PostgresInboxTransaction:
        """The same inside a transaction that the caller began, and will commit or roll back. Once in a transaction.

        Call ``finish()`` before the commit, which fails without it (``ForeignKeyViolation``). With SQLAlchemy the connection is
        ``session.connection().connection.driver_connection``. How long it may stay idle is up to the caller.

        Raises:
            PartitionFenced: an offset has gone back, as where a failover lost transactions. Roll back, and go on at
                ``start_offsets()``.
            TopicRecreated: an offset that is stored belongs to another topic of the same name.
            MessageIdReused: an entry has the id of another message. Roll back.
            AuthorizationError: the database does not let this client in, or it has no right to the tables.
            StoreUnavailable: the database did not answer. Roll back, and repeat the transaction.
            KafkaGuaranteesError: no transaction is open, or its isolation level is not READ COMMITTED, or it has one enlisted.
        """
        batch = batch_of(entries)
        self._prepare()
        if connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
            raise KafkaGuaranteesError("no transaction is open on this connection. Nothing was done. Begin one first.")
        with _answers("enlisting"), Asked(connection):
            [(level, number)] = plain_cursor(connection).execute(_TRANSACTION).fetchall()
        if self._enlisted.get(connection) == number:
            raise KafkaGuaranteesError(
                "enlist() was called in this transaction already, whose finish() lets it commit: the ids of another one might "
                "stay without its offsets. Nothing was done. If the first has raised, roll back, and begin anew; else enlist "
                "all entries at once, or in a transaction of their own."
            )
        if (level := _decoded(level)) != "read committed":
            raise KafkaGuaranteesError(
                f"the isolation level of this transaction is {level}, in which it fails when it has waited for another one "
                "(40001), each time that it is repeated. Nothing was done. Begin it with READ COMMITTED."
            )
        self._enlisted[connection] = number  # before it may raise: the ids are there then, and would be repeats for another one
        with Asked(connection):
            with _answers("enlisting"), connection.pipeline():
                asked = self._ask(connection, scope, batch, "0")
            opened = self._open(connection, scope, batch, asked, enlisted=self._reached)
        self._reached.join(scope, opened._stored, batch.first)
        return opened

    def purge(self, *, limit: int = 10_000) -> int:
        """Remove at most ``limit`` of the ids that are expired, and look at some five times as many. Returns how many."""
        self._prepare()
        removed, pages = 0, max(100, limit // 20)  # of a hundred ids each
        with _answers("purging"), connection_of(self._pool) as connection, Asked(connection), _read_committed(connection):
            [(count,)] = plain_cursor(connection).execute(self._statements.pages).fetchall()
            for begin in (min(self._purged, count), 0):  # to the end, and once more from the beginning
                end = begin + pages
                where = (f"({begin},0)", f"({end},0)", limit - removed)
                removed += plain_cursor(connection).execute(self._statements.purge, where).rowcount
                self._purged = begin if removed == limit else end
                if removed == limit or end < count:
                    break
        return removed

    def close(self) -> None:
        """Close the pool that the inbox made itself."""
        if self._own is not None and os.getpid() == self._pid:  # the threads of the pool are not in a child
            self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ask(self, connection: Connection, scope: str, batch: Batch, idle_limit: str) -> Cursor:
        """Lock the offsets and remember the ids, in one statement. Its answer is there after the pipeline."""
        sources, keys = batch.first, batch.keys
        asked = plain_cursor(connection)
        if sources:
            if not self._with_rows.issuperset((scope, source) for source in sources):
                rows = (idle_limit, scope, *_places(sources), [source.topic_id for source in sources])
                plain_cursor(connection).execute(self._statements.rows, rows)
            what: list[object] = [idle_limit]
            for source in sources:
                what += (source.topic, source.partition)
            what += (scope, scope, batch.guard.topic, batch.guard.partition)
            if keys:
                fingerprints = b"".join(map(batch.fingerprints.__getitem__, keys)) if batch.fingerprints else None
                what += (self._retention, b"".join(keys), scope, fingerprints, len(keys), len(keys))
            asked.execute(self._statements.begin(len(sources), ids=bool(keys)), what, binary=True)
        return asked

    def _open(
        self, connection: Connection, scope: str, batch: Batch, asked: Cursor, *, enlisted: Reached | None = None
    ) -> PostgresInboxTransaction:
        with _answers("looking for what is fresh"):
            rows = asked.fetchall() if batch.first else []
            if len(rows) < len(batch.first):
                self._with_rows.clear()
                raise StoreUnavailable(
                    f"somebody deleted an offset of {scope!r} from {self._prefix}_offset. Nothing was written. "
                    "Repeat the transaction: the partition begins anew."
                )
            stored = self._offsets(scope, batch.first, rows)
            fresh = pending(batch, stored)
            number, count, new = rows[0][4:7] if rows else (None, 0, None)
            if count < len(batch.keys) or len(fresh) < len(batch.entries):
                keys = batch.keys if count == len(batch.keys) else split(new or b"")
                fresh = self._sort_out(connection, scope, batch, fresh, set(keys))
        return PostgresInboxTransaction(
            connection, self._statements, scope, batch=batch, stored=stored, fresh=fresh, number=number, enlisted=enlisted
        )

    def _sort_out(
        self, connection: Connection, scope: str, batch: Batch, waiting: Sequence[int], new: set[bytes]
    ) -> Sequence[int]:
        """What is fresh where some ids were known, or some entries are behind the offsets."""
        keys = {key for index in waiting if (key := batch.entries[index].key) is not None}
        if behind := new - keys:  # their ids had expired; the offsets know that they are handled
            plain_cursor(connection).execute(self._statements.forget, (scope, sorted(behind)))
        if known := sorted(keys - new):
            ids = {"keys": known, "fingerprints": [*map(batch.fingerprints.get, known)]}
            expired = {"scope": scope, "retention": self._retention, **ids}
            new.update(key for (key,) in plain_cursor(connection).execute(self._statements.refresh, expired).fetchall())
        if batch.fingerprints and (known := sorted(keys - new)):
            found = plain_cursor(connection).execute(self._statements.fingerprints, (scope, known)).fetchall()
            compare(batch, waiting, dict(found))
        return fresh_of(batch, waiting, new)

    def _offsets(self, scope: str, sources: Collection[Source], rows: Iterable[tuple[Any, ...]]) -> dict[Source, int | None]:
        found = {(_decoded(topic), partition): (topic_id, offset) for topic, partition, topic_id, offset, *_ in rows}
        offsets: dict[Source, int | None] = {}
        for source in sources:
            topic_id, offset = found.get((source.topic, source.partition), (source.topic_id, None))
            if offset is not None and topic_id != source.topic_id:
                raise recreated(scope, source, topic_id, f"{self._prefix}_offset")
            offsets[source] = offset
        return offsets

    def _open_pool(self, conninfo: str) -> ConnectionPool[Any]:
        options = own_options(conninfo, connect_timeout=CONNECT_TIMEOUT)
        self._own = ConnectionPool(
            "", kwargs=options, configure=_configure, min_size=0, max_size=2, timeout=CONNECT_TIMEOUT, open=True
        )
        return self._own

    def _prepare(self) -> None:
        """Make the tables where they are missing, once."""
        if os.getpid() != self._pid:
            raise ForkedClientError(
                "this PostgresInbox was made in another process, and connections cannot be shared with it. "
                "Nothing was written. Make the inbox after the fork, in the process that uses it."
            )
        if self._prepared:
            return
        with (
            self._preparing,
            _answers("making the tables"),
            connection_of(self._pool) as connection,
            Asked(connection),
            _read_committed(connection),
            connection.transaction(),
        ):
            connection.execute(f"SET LOCAL lock_timeout = '{PATIENCE}'".encode())
            cursor = plain_cursor(connection)
            # Looked for first: who may not make tables can still use them.
            if cursor.execute("SELECT to_regclass(%s)", (f'"{self._prefix}_version"',)).fetchall() == [(None,)]:
                # IF NOT EXISTS alone fails when two begin at the same time.
                cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (self._prefix,))
                for statement in self._statements.schema:
                    cursor.execute(statement)
            [(version,)] = cursor.execute(self._statements.version).fetchall()
            if version in {1, 2}:
                version = self._upgrade(cursor)
            [(schema,)] = cursor.execute(_WHERE, (f'"{self._prefix}_version"',)).fetchall()
        if version != VERSION:
            raise KafkaGuaranteesError(
                f"the inbox {self._prefix!r} has version {version} of its tables, and this library knows {VERSION}. "
                "Nothing was changed. Use the release of kafka-guarantees that made them, or a newer one."
            )
        self._statements = _Statements(self._prefix, _decoded(schema))
        self._prepared = True

    def _upgrade(self, cursor: Cursor) -> int:
        """Bring tables of earlier versions up to date. Two that do so at the same time do no harm."""
        try:
            for statement in self._statements.upgrade:
                cursor.execute(statement)
        except psycopg.errors.InsufficientPrivilege as exc:
            by_hand = "; ".join(["BEGIN", *(statement.decode() for statement in self._statements.upgrade), "COMMIT"])
            raise KafkaGuaranteesError(
                f"the tables of the inbox {self._prefix!r} are of an earlier version, and this user may not change them. "
                f"Nothing was changed. Have their owner execute: {by_hand};"
            ) from exc
        return VERSION


class PostgresInboxTransaction:
    """An open transaction of an inbox. See ``InboxTransaction``.

    Attributes:
        connection: for the handler's own writes. It neither commits nor rolls back.
        fresh: which of the entries are to be handled, by their index and in their order.
    """

    def __init__(
        self,
        connection: Connection,
        statements: _Statements,
        scope: str,
        *,
        batch: Batch,
        stored: Offsets,
        fresh: Sequence[int],
        number: int | None,
        enlisted: Reached | None,
    ) -> None:
        self.connection = connection
        self.fresh = fresh
        self._statements = statements
        self._scope = scope
        self._batch = batch
        self._stored = stored
        self._number = number
        self._enlisted = enlisted  # where finish() notes the offsets; None: who commits does
        self._advance = Advance({}, [])
        self._finished = False

    def finish(self, handled: int | None = None) -> None:
        """Advance the offsets: at once after ``enlist()``, else with the commit. Called once, after the handler's writes.

        Args:
            handled: how many of ``fresh`` are handled, if not all.

        Raises:
            PartitionFenced: another owner advanced an offset since this transaction began. This one, and the next, only after
                ``enlist()``; else the end of ``transaction()`` raises them.
            StoreUnavailable: the database did not answer. Nothing was written.
            KafkaGuaranteesError: the handler ended the transaction, or went on after a failure; or a savepoint of before
                ``enlist()`` was rolled back; or this is the second call.
        """
        if self._finished:
            raise finished_twice()
        self._check_open()
        self._advance = advance(self._batch, self._stored, self.fresh, handled)
        if self._enlisted is not None:
            # A pipeline of the caller may be open: what became of the move is known at the end of ours.
            with Asked(self.connection), _answers("advancing the offsets"), self._fenced(), self.connection.pipeline():
                self._send()
            self._enlisted.note_joined(self._scope, self._advance.offsets)
        self._finished = True

    def _commit(self, committed: ExitStack) -> None:
        """Send the move of the offsets together with the COMMIT: one answer to wait for instead of two."""
        if not self._finished:
            self.finish()
        self._check_open()
        with self._fenced(), self.connection.pipeline():
            with _answers("advancing the offsets"), self._fenced():  # the first answer may be there when the second is sent
                self._send()
            committed.close()  # sends COMMIT

    def _send(self) -> None:
        offsets, forget = self._advance
        if forget:
            plain_cursor(self.connection).execute(self._statements.forget, (self._scope, forget))
        if self._batch.first:
            guard = self._batch.guard  # also where its offset stays
            moves = {guard: self._stored[guard], **offsets}
            what: list[object] = [guard.topic, guard.partition]
            for source, offset in moves.items():
                what += (source.topic, source.partition, source.topic_id, self._stored[source], offset)
            what += (self._scope, self._number, len(moves))
            plain_cursor(self.connection).execute(self._statements.move(len(moves)), what)

    @contextmanager
    def _fenced(self) -> Iterator[None]:
        """What a move says that fails becomes an error of ours."""
        try:
            yield
        except psycopg.Error as exc:
            first = _first(exc)
            said = (first.diag.message_primary or "") if isinstance(first, psycopg.errors.InvalidTextRepresentation) else ""
            if _MOVED in said:
                raise fenced(self._scope, self._advance.offsets or self._batch.first) from exc
            if _ENDED in said:
                raise ended(_MEDDLED) from exc
            if _UNDONE in said:
                raise KafkaGuaranteesError(
                    "the transaction was rolled back to a savepoint of before enlist(): the ids of the messages are gone. "
                    "Nothing of it can be committed any more. Roll it back, and enlist them in another one."
                ) from exc
            if isinstance(first, psycopg.errors.InsufficientPrivilege) and self._statements.prefix in str(first):
                raise AuthorizationError(
                    f"moving the offsets in the inbox was refused ({_text(exc)}). Nothing was written. If the handler has set "
                    "another role, have it RESET ROLE; else grant the role of the connection what it had when the transaction "
                    "began: SELECT, INSERT, UPDATE and DELETE on the inbox's tables."
                ) from exc
            raise

    def _look_why(self, error: Exception) -> None:
        """A handler raised. Raise another error where that came of its meddling, and not of its message."""
        if broke_off(error) or self.connection.info.transaction_status == TransactionStatus.IDLE:
            raise ended(_MEDDLED) from error
        if isinstance(error, psycopg.Error) and self._closed():
            raise ended(_CLOSED) from error

    def _closed(self) -> bool:
        """Whether the handler has closed the connection. One that was lost is not: that may pass."""
        return self.connection.closed and not self.connection.broken

    def _let_go(self) -> bool:
        """Whether no statement of the handler is under way any more. Else the connection is closed, and nothing was written.

        ``cursor.stream()`` holds the lock of the connection until it was read to its end, and the traceback of an error keeps
        it: a ROLLBACK would wait for that for ever.
        """
        connection = self.connection
        if connection.info.transaction_status != TransactionStatus.ACTIVE or connection.pgconn.pipeline_status:
            return True
        if connection.lock.acquire(timeout=LET_GO):
            connection.lock.release()
            if connection.info.transaction_status != TransactionStatus.ACTIVE:
                return True
        shut_down(connection)  # for a thread that is in the middle of a statement
        free = connection.lock.acquire(timeout=LET_GO)
        connection.pgconn.finish()
        if free:
            connection.lock.release()
        else:
            connection.lock = threading.Lock()  # for who enlisted it, and rolls back: that fails now, and does not wait
        return False

    def _check_open(self) -> None:
        if not self._let_go():
            raise KafkaGuaranteesError(
                "the handler has left a statement unfinished on the connection of the inbox: a cursor.stream() or copy() that "
                "did not come to its end. The connection is closed, and nothing of the transaction was written. Have it close "
                "that: with contextlib.closing(cursor.stream(...)) as rows."
            )
        if self._closed():
            raise ended(_CLOSED)
        status = self.connection.info.transaction_status
        if status == TransactionStatus.IDLE:
            raise ended(_MEDDLED)
        if status == TransactionStatus.INERROR:  # COMMIT would roll back, and not say so
            raise KafkaGuaranteesError(
                "a statement of the handler failed, and it went on: the transaction cannot be committed any more. Nothing of "
                "it was written. Let the error out of the handler, or put the statement into connection.transaction()."
            )


# -- asking the server ----------------------------------------------------------------------------------------------------

# Ended by the server for the sake of other transactions, or because the client was silent: the next time it may go well.
_REPEATABLE = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.IdleInTransactionSessionTimeout,
)
_FAILURES = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.InternalError)


def _configure(connection: Connection) -> None:
    """A connection of our own is always as ``_read_committed()`` needs it."""
    connection.autocommit = True
    connection.isolation_level = IsolationLevel.READ_COMMITTED


@contextmanager
def _read_committed(connection: Connection) -> Iterator[None]:
    """Begin transactions only where it is asked for, with READ COMMITTED; afterwards the connection is as its owner had it."""
    before = connection.autocommit, connection.isolation_level
    threshold = connection.prepare_threshold
    if before[1] is not IsolationLevel.READ_COMMITTED:
        connection.isolation_level = IsolationLevel.READ_COMMITTED
    if not before[0]:
        connection.autocommit = True
    try:
        if pooled(connection):
            connection.prepare_threshold = None  # also for what the handler executes
        yield
    finally:
        connection.prepare_threshold = threshold
        # no COMMIT was executed: something before it failed, or an interrupt came
        if connection.info.transaction_status in (TransactionStatus.INERROR, TransactionStatus.INTRANS):
            with suppress(psycopg.Error):
                connection.rollback()
        if connection.info.transaction_status == TransactionStatus.IDLE:  # else it is lost, and its pool drops it
            if not before[0]:
                connection.autocommit = False
            if before[1] is not IsolationLevel.READ_COMMITTED:
                connection.isolation_level = before[1]


def _decoded(text: str | bytes) -> str:
    """Texts come as bytes from SQL_ASCII, which initdb chooses for the locale C."""
    return text.decode(errors="replace") if isinstance(text, bytes) else text


def _places(sources: Iterable[Source]) -> tuple[list[str], list[int]]:
    listed = list(sources)
    return [source.topic for source in listed], [source.partition for source in listed]


@contextmanager
def _answers(doing: str) -> Iterator[None]:
    """The one place where errors of the inbox's own statements become ours."""
    try:
        yield
    except psycopg.Error as exc:
        if isinstance(_first(exc), psycopg.errors.InsufficientPrivilege):
            raise AuthorizationError(
                f"{doing} in the inbox was refused ({_text(exc)}). Nothing was written. Grant the role of the connection "
                "SELECT, INSERT, UPDATE and DELETE on the inbox's tables; to make them it needs CREATE on the schema."
            ) from exc
        if not isinstance(exc, _FAILURES):
            raise
        raise _unavailable(doing, exc) from exc


def _unavailable(doing: str, exc: psycopg.Error) -> StoreUnavailable:
    return StoreUnavailable(
        f"{doing} in the inbox failed ({_text(exc)}). Nothing was written, and the transaction is rolled back. "
        "Repeat it with the same entries."
    )


def _first(exc: psycopg.Error) -> BaseException:
    """What failed: of a pipeline psycopg may raise what came after it, and was not executed."""
    return exc.__context__ or exc if isinstance(exc, psycopg.errors.PipelineAborted) else exc


def _text(exc: psycopg.Error) -> str:
    first = _first(exc)
    return f"{type(first).__name__}: {first_line(first)}"


# -- forks ----------------------------------------------------------------------------------------------------------------

_alive: weakref.WeakSet[PostgresInbox] = weakref.WeakSet()


def _in_child() -> None:
    """A child that leaves the handler by an exception would end the transaction of its parent, on the parent's socket."""
    for inbox in _alive:
        connection = inbox._open_connection
        if connection is not None and not connection.closed:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, connection.fileno())
            os.close(nowhere)


os.register_at_fork(after_in_child=_in_child)
