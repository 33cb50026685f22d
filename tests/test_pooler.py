"""PostgreSQL behind a pooler that has another connection of the server for each transaction: PgBouncer, as most run it."""

from __future__ import annotations

import hashlib
import signal
import socket
import threading
import uuid
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg_pool import ConnectionPool

import kafka_guarantees.dedup._pooler as poolers
from kafka_guarantees.dedup import PostgresDedupStore, PostgresInbox, postgres
from kafka_guarantees.dedup.contract import Entry, Item, Outcome, Source
from kafka_guarantees.testing.local_kafka import _free_ports
from kafka_guarantees.testing.pytest_plugin import _installed
from kafka_guarantees.testing.servers import _as_somebody_else, _find, _Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from kafka_guarantees.testing.servers import LocalPostgres

TOKEN = b"t" * 16
THREADS, ROUNDS, AT_ONCE = 6, 40, 20


class LocalPgBouncer:
    """PgBouncer in transaction mode, before a PostgreSQL of ours."""

    def __init__(self, behind: LocalPostgres) -> None:
        self._behind = behind
        self._port = 0

    @property
    def dsn(self) -> str:
        return self._behind.dsn.replace(f":{self._behind.port}/", f":{self._port}/")

    def __enter__(self) -> Self:
        program = _find("pgbouncer", [Path("/usr/sbin")], "pgbouncer")
        (self._port,) = _free_ports(1)
        server = self._server = _Server("pgbouncer", self._answers)
        with server.stopped_on_error():
            server.folder.chmod(0o755)
            users, settings = server.folder / "users", server.folder / "pgbouncer.ini"
            users.write_text(f'"postgres" "{self._behind.password}"\n')
            settings.write_text(
                f"[databases]\n* = host=127.0.0.1 port={self._behind.port}\n"
                f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self._port}\nunix_socket_dir =\n"
                f"auth_type = plain\nauth_file = {users}\npool_mode = transaction\ndefault_pool_size = 3\n"
            )
            server.start([*_as_somebody_else(), program, str(settings)])
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(signal.SIGINT)

    def _answers(self, _pid: int) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
            return True
        return False


@pytest.fixture(scope="module")
def pgbouncer(postgres_server: LocalPostgres) -> Iterator[LocalPgBouncer]:
    yield from _installed(LocalPgBouncer(postgres_server))


@pytest.fixture(params=["by its address", "by a pool of the user"])
def target(request: pytest.FixtureRequest, pgbouncer: LocalPgBouncer) -> Iterator[ConnectionPool[Any] | str]:
    """What a store or an inbox is given. The pool is as psycopg makes it: its connections prepare what comes again."""
    if request.param == "by its address":
        yield pgbouncer.dsn
        return
    with ConnectionPool(pgbouncer.dsn, min_size=4, max_size=4, open=True) as pool:
        yield pool


def key(text: str) -> bytes:
    return hashlib.md5(text.encode(), usedforsecurity=False).digest()


def at_the_same_time(work: Callable[[int], None]) -> None:
    """In threads, all of which must end well."""
    failures: list[BaseException] = []

    def one(number: int) -> None:
        try:
            work(number)
        except BaseException as failure:  # noqa: BLE001 - raised below
            failures.append(failure)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]


def test_a_store_behind_a_pooler(target: ConnectionPool[Any] | str) -> None:
    """D13: each call says what it should; a statement of another client by the same name would say something, too."""
    with closing(PostgresDedupStore(target, table=f"ids_{uuid.uuid4().hex[:12]}")) as store:

        def work(number: int) -> None:
            for count in range(ROUNDS):
                items = [Item(key(f"{number}-{count}-{one}"), b"p" * 16, b"") for one in range(AT_ONCE)]
                assert store.claim("group", items, token=TOKEN, lease=60) == [Outcome.NEW] * AT_ONCE
                assert store.complete("group", items[1:], token=TOKEN) == [True] * (AT_ONCE - 1)
                store.release("group", items[:1], token=TOKEN)
                again = store.claim("group", items, token=TOKEN, lease=60)
                assert again == [Outcome.NEW] + [Outcome.DUPLICATE] * (AT_ONCE - 1)

        at_the_same_time(work)


def test_an_inbox_behind_a_pooler(target: ConnectionPool[Any] | str, postgres_server: LocalPostgres) -> None:
    """D13: so does each transaction, and what its handler executes is prepared no more than what the inbox does."""
    table, prefix = f"effects_{uuid.uuid4().hex[:12]}", f"box_{uuid.uuid4().hex[:12]}"
    with (
        psycopg.connect(postgres_server.dsn, autocommit=True) as direct,
        closing(PostgresInbox(target, prefix=prefix)) as inbox,
    ):
        direct.execute(f"CREATE TABLE {table} (what text)".encode())

        def work(number: int) -> None:
            source = Source("topic", b"i" * 16, number)
            for count in range(ROUNDS):
                entries = [Entry(source, count * AT_ONCE + one, key(f"{number}-{count}-{one}")) for one in range(AT_ONCE)]
                for fresh in (AT_ONCE, 0):
                    with inbox.transaction("group", entries) as tx:
                        assert len(tx.fresh) == fresh
                        for one in tx.fresh:
                            tx.connection.execute(f"INSERT INTO {table} VALUES (%s)".encode(), (f"{number}-{count}-{one}",))
                        tx.finish()
            assert inbox.start_offsets("group", [source]) == {source: ROUNDS * AT_ONCE}

        at_the_same_time(work)
        found = direct.execute(f"SELECT count(*), count(DISTINCT what) FROM {table}".encode()).fetchone()
    assert found == (THREADS * ROUNDS * AT_ONCE,) * 2


def test_what_the_user_has_set_for_a_connection_is_as_before(pgbouncer: LocalPgBouncer) -> None:
    """Whether it prepares is ours to say only while we have it."""
    with ConnectionPool(pgbouncer.dsn, min_size=1, max_size=1, open=True, kwargs={"prepare_threshold": 7}) as pool:
        inbox, store = PostgresInbox(pool, prefix=f"box_{uuid.uuid4().hex[:12]}"), PostgresDedupStore(pool, table="kg_dedup")
        with inbox.transaction("group", [Entry(Source("topic", b"i" * 16, 0), 0, None)]) as tx:
            assert tx.connection.prepare_threshold is None
            tx.finish()
        store.claim("group", [Item(key("one"), b"p" * 16, b"")], token=TOKEN, lease=60)
        with pool.connection() as connection:
            assert connection.prepare_threshold == 7
            assert not connection.autocommit


def test_a_connection_of_the_user_is_as_before_when_asking_fails(
    postgres_server: LocalPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of it: a connection that commits each statement by itself would go back to the user's pool."""

    def interrupted(_connection: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(postgres, "pooled", interrupted)
    with psycopg.connect(postgres_server.dsn) as connection:
        with pytest.raises(KeyboardInterrupt), postgres._OfOurs(connection):
            pass
        assert not connection.autocommit


def test_without_a_pooler_statements_are_prepared(postgres_server: LocalPostgres) -> None:
    """As psycopg does by itself; and each connection is asked once whether there is one."""
    with ConnectionPool(postgres_server.dsn, min_size=1, max_size=1, open=True) as pool:
        store = PostgresDedupStore(pool, table=f"ids_{uuid.uuid4().hex[:12]}")
        for number in range(10):
            store.claim("group", [Item(key(f"{number}"), b"p" * 16, b"")], token=TOKEN, lease=60)
        with pool.connection() as connection:
            assert not poolers.pooled(connection)
            statements = [text for (text,) in connection.execute("SELECT statement FROM pg_prepared_statements").fetchall()]
    assert any("INSERT" in text for text in statements)
    assert not [text for text in statements if "pg_backend_pid" in text]
