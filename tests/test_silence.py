"""A PostgreSQL that keeps its connections and says nothing, as where its storage stalls: calls of ours end, a handler's not."""

from __future__ import annotations

import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from kafka_guarantees.dedup import Item, PostgresDedupStore, PostgresInbox, Source, _silence
from kafka_guarantees.dedup.contract import Entry, Outcome
from kafka_guarantees.dedup.ids import key_of
from kafka_guarantees.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kafka_guarantees.testing.servers import LocalPostgres

SILENCE = 1.0  # seconds
SOON = 25.0  # seconds: another ten for a connection, and a slow machine
PLACE = Source("orders", b"i" * 16, 0)
ITEMS = [Item(key_of("a"), bytes(16))]
TOKEN = b"t" * 16
NAME = "kafka-guarantees-silence"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_silence, "SILENCE", SILENCE)
    monkeypatch.setattr(_silence, "LOOK", 0.1)


@pytest.fixture
def prefix(postgres_server: LocalPostgres) -> str:
    made = f"box_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_server.dsn, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {made}_effect (what text)".encode())
    return made


def effects(server: LocalPostgres, prefix: str) -> list[str]:
    with psycopg.connect(server.dsn) as connection:
        return [what for (what,) in connection.execute(f"SELECT what FROM {prefix}_effect ORDER BY 1".encode())]


@contextmanager
def silent(server: LocalPostgres) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


def given_up(call: Callable[[], object]) -> None:
    """A call ends, and says that the store is away. In a thread: else one that hangs would keep the server paused."""
    ended: list[BaseException | None] = []

    def make() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - looked at below
            ended.append(error)
        else:
            ended.append(None)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(SOON)
    assert [type(error) for error in ended] == [StoreUnavailable]


def entry(offset: int) -> list[Entry]:
    return [Entry(PLACE, offset, key_of(f"{offset}"))]


def again(call: Callable[[], Any]) -> Any:
    """As a run does: until the server answers."""
    until = time.monotonic() + SOON
    while True:
        try:
            return call()
        except StoreUnavailable:
            assert time.monotonic() < until
            time.sleep(0.05)


STORE: dict[str, Callable[[PostgresDedupStore], object]] = {
    "claim": lambda store: store.claim("group", ITEMS, token=TOKEN, lease=60),
    "complete": lambda store: store.complete("group", ITEMS, token=TOKEN),
    "release": lambda store: store.release("group", ITEMS, token=TOKEN),
    "purge": lambda store: store.purge(),
}


@pytest.mark.parametrize("call", STORE)
@pytest.mark.parametrize("ready", [True, False], ids=["", "at first"])
def test_every_call_of_a_store_ends(
    postgres_server: LocalPostgres, prefix: str, caplog: pytest.LogCaptureFixture, call: str, *, ready: bool
) -> None:
    """D16: the group would not be served, and a stop not heard, until the server is back. The log says why."""
    with PostgresDedupStore(postgres_server.dsn, table=prefix) as store:
        if ready:
            store.purge()
        else:
            store._pool.open(wait=True)
        with silent(postgres_server):
            given_up(lambda: STORE[call](store))
        assert "PostgreSQL has not answered for 1 s" in caplog.text
        assert again(lambda: store.claim("group", ITEMS, token=TOKEN, lease=60)) == [Outcome.NEW]


INBOX: dict[str, Callable[[PostgresInbox], object]] = {
    "start_offsets": lambda inbox: inbox.start_offsets("group", [PLACE]),
    "transaction": lambda inbox: inbox.transaction("group", entry(1)).__enter__(),
    "purge": lambda inbox: inbox.purge(),
}


@pytest.mark.parametrize("call", INBOX)
def test_every_call_of_an_inbox_ends(postgres_server: LocalPostgres, prefix: str, call: str) -> None:
    """D16: likewise."""
    with PostgresInbox(postgres_server.dsn, prefix=prefix) as inbox:
        with inbox.transaction("group", entry(0)):
            pass
        with silent(postgres_server):
            given_up(lambda: INBOX[call](inbox))
        assert again(lambda: inbox.start_offsets("group", [PLACE])) == {PLACE: 1}


def test_making_the_tables_ends(postgres_server: LocalPostgres, prefix: str) -> None:
    """D16: the first call of a run, before it has a partition."""
    with PostgresInbox(postgres_server.dsn, prefix=prefix) as inbox:
        with inbox._pool.connection():
            pass
        with silent(postgres_server):
            given_up(lambda: inbox.start_offsets("group", [PLACE]))
        assert again(lambda: inbox.start_offsets("group", [PLACE])) == {PLACE: None}


@pytest.mark.parametrize("fails", [False, True], ids=["commit", "rollback"])
def test_the_end_of_a_transaction_ends(postgres_server: LocalPostgres, prefix: str, *, fails: bool) -> None:
    """D16: a handler has done its work, and COMMIT or ROLLBACK is not answered. Each effect is there once in the end."""
    with PostgresInbox(postgres_server.dsn, prefix=prefix) as inbox:

        def transact() -> None:
            with inbox.transaction("group", entry(0)) as tx:
                for _ in tx.fresh:
                    tx.connection.execute(f"INSERT INTO {prefix}_effect VALUES ('once')".encode())
                if not paused:
                    paused.append(True)
                    postgres_server.pause()
                    if fails:
                        raise StoreUnavailable("for the test")

        paused: list[bool] = []
        try:
            given_up(transact)
        finally:
            postgres_server.resume()
        again(transact)
        assert again(lambda: inbox.start_offsets("group", [PLACE])) == {PLACE: 1}
    assert effects(postgres_server, prefix) == ["once"]


@pytest.mark.parametrize("call", ["enlist", "finish"])
def test_calls_in_a_transaction_of_the_caller_end(postgres_server: LocalPostgres, prefix: str, call: str) -> None:
    """D16: his connection is ended with them; what he executes himself is up to him."""
    with PostgresInbox(postgres_server.dsn, prefix=prefix) as inbox:
        inbox.start_offsets("group", [PLACE])
        mine = psycopg.connect(postgres_server.dsn)
        tx = inbox.enlist(mine, "group", entry(0)) if call == "finish" else None
        with silent(postgres_server):
            given_up(lambda: inbox.enlist(mine, "group", entry(0)) if tx is None else tx.finish())
        assert mine.closed


def test_a_handler_may_be_slow(postgres_server: LocalPostgres, prefix: str) -> None:
    """Its statements take as long as they take, and so do its pauses between them."""
    with PostgresInbox(postgres_server.dsn, prefix=prefix) as inbox:
        with inbox.transaction("group", entry(0)) as tx:
            tx.connection.execute("SELECT pg_sleep(%s)", (2 * SILENCE,))
            time.sleep(2 * SILENCE)
        with psycopg.connect(postgres_server.dsn) as mine:
            enlisted = inbox.enlist(mine, "group", entry(1))
            mine.execute("SELECT pg_sleep(%s)", (2 * SILENCE,))
            enlisted.finish()
        assert inbox.start_offsets("group", [PLACE]) == {PLACE: 2}


def test_nobody_looks_where_nobody_asks(postgres_server: LocalPostgres, prefix: str) -> None:
    """One thread for all, that ends by itself, and comes again."""

    def lookers() -> int:
        return sum(thread.name == NAME for thread in threading.enumerate())

    with PostgresDedupStore(postgres_server.dsn, table=prefix) as store:
        for _ in range(3):
            with ThreadPoolExecutor(4) as threads:
                for _ in range(50):
                    threads.submit(store.purge)
            assert lookers() <= 1
            until = time.monotonic() + SOON
            while lookers():
                assert time.monotonic() < until
                time.sleep(0.01)
    assert not _silence._asked
    assert not _silence._looking


class Asks:
    """Stands for a connection that nobody can end."""

    def fileno(self) -> int:
        raise psycopg.OperationalError("the connection is closed")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 warns of every fork with threads
def test_a_child_looks_for_itself() -> None:
    """Y04: the thread is the parent's, and so is what it looks after."""
    connection: Any = Asks()
    with _silence.Asked(connection):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            clean = not _silence._asked and not _silence._looking
            with _silence.Asked(connection):
                looks = any(thread.name == NAME for thread in threading.enumerate())
            os.write(write, b"." if clean and looks else b"x")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 1) == b"."
        os.close(read)
        os.close(write)


def test_a_thread_that_does_not_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Y03: the next call looks again; else nobody ever would."""

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    connection: Any = Asks()
    with monkeypatch.context() as patch:
        patch.setattr(_silence, "_looking", False)
        patch.setattr(_silence, "start", refused)
        with pytest.raises(RuntimeError), _silence.Asked(connection):
            pytest.fail("it began")
        assert not _silence._looking
        assert not _silence._asked
    with _silence.Asked(connection):
        assert any(thread.name == NAME for thread in threading.enumerate())
