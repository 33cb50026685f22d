"""Laws of the inboxes: offsets, ids and effects are written together or not at all, whoever dies and whoever else is there."""

# ruff: noqa: PT012 - what raises is a transaction, with what happens in it

from __future__ import annotations

import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet  # before Python 3.11 it is not the builtin
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from kafka_guarantees.dedup import _progress, postgres_inbox, sqlite_inbox
from kafka_guarantees.dedup._conninfo import options_of
from kafka_guarantees.dedup.contract import Entry, Inbox, Item, Source
from kafka_guarantees.dedup.ids import key_of
from kafka_guarantees.dedup.postgres import PostgresDedupStore
from kafka_guarantees.dedup.postgres_inbox import PostgresInbox, PostgresInboxTransaction
from kafka_guarantees.dedup.sqlite import SqliteDedupStore
from kafka_guarantees.dedup.sqlite_inbox import SqliteInbox
from kafka_guarantees.errors import (
    AuthorizationError,
    ForkedClientError,
    KafkaGuaranteesError,
    MessageIdReused,
    PartitionFenced,
    StoreUnavailable,
    TopicRecreated,
    UnsafeConfigError,
)

from .conftest import in_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

DEADLINE = 60.0  # seconds
TOPIC_ID = b"i" * 16
P0, P1, P2 = (Source("orders", TOPIC_ID, number) for number in range(3))


def entries(source: Source, offsets: Sequence[int], *ids: str) -> list[Entry]:
    """Entries with an id each; where no ids are given, one made of partition and offset."""
    names = ids or [f"{source.partition}/{offset}" for offset in offsets]
    return [Entry(source, offset, key_of(name)) for offset, name in zip(offsets, names, strict=True)]


class Place:
    """Where an inbox is, with a table of effects beside it."""

    def __init__(self, kind: str, where: str) -> None:
        self.kind = kind
        self.where = where
        self._open: list[Any] = []
        self.sql("CREATE TABLE effect (what text)")

    def inbox(self, **settings: Any) -> Inbox[Any]:
        made: Any = SqliteInbox(self.where, **settings) if self.kind == "sqlite" else PostgresInbox(self.where, **settings)
        self._open.append(made)
        return made  # type: ignore[no-any-return]

    def connect(self) -> Any:
        if self.kind == "sqlite":
            return sqlite3.connect(self.where, isolation_level=None, timeout=DEADLINE)
        return psycopg.connect(self.where, autocommit=True)

    def sql(self, statement: str) -> list[Any]:
        with closing(self.connect()) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def effects(self) -> list[str]:
        return sorted(what for (what,) in self.sql("SELECT what FROM effect"))

    def ids(self) -> int:
        return int(self.sql("SELECT count(*) FROM kg_inbox_id")[0][0])

    def close(self) -> None:
        for inbox in self._open:
            inbox.close()


def act(connection: Any, what: object) -> None:
    """An effect: a row in the user's own table."""
    connection.execute(f"INSERT INTO effect VALUES ('{what}')")


@contextmanager
def _sqlite(folder: Path) -> Iterator[Place]:
    place = Place("sqlite", str(folder / "inbox.db"))
    yield place
    place.close()


@contextmanager
def _postgres(dsn: str) -> Iterator[Place]:
    schema = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}".encode())
    place = Place("postgres", make_conninfo(dsn, options=f"-csearch_path={schema}"))
    yield place
    place.close()


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with _sqlite(tmp_path) if request.param == "sqlite" else _postgres(request.getfixturevalue("postgres_server").dsn) as made:
        yield made


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[Place]:
    with _sqlite(tmp_path) as made:
        yield made


@pytest.fixture
def postgres(postgres_server: Any) -> Iterator[Place]:
    with _postgres(postgres_server.dsn) as made:
        yield made


# -- what is decided without a database ---------------------------------------------------------------------------------------


class History:
    """A call that could be: entries of some partitions, what is stored, which keys the database knows."""

    def __init__(self, draw: st.DrawFn) -> None:
        names = st.none() | st.sampled_from("abcdef")
        offsets = dict.fromkeys((P0, P1), 0)
        self.entries: list[Entry] = []
        for source in draw(st.lists(st.sampled_from((P0, P1)), max_size=14)):
            step = draw(st.integers(0, 2))  # 0: the same record again
            before = [entry for entry in self.entries if entry.source == source]
            if before and not step:
                self.entries.append(before[-1])
                continue
            offsets[source] += step
            name = draw(names)
            self.entries.append(Entry(source, offsets[source], None if name is None else key_of(name)))
        self.stored = {source: draw(st.none() | st.integers(0, offsets[source] + 2)) for source in (P0, P1)}
        self.known = {key_of(name) for name in draw(st.sets(st.sampled_from("abcdef")))}
        self.batch = _progress.batch_of(self.entries)
        waiting = _progress.pending(self.batch, self.stored)
        self.fresh = _progress.fresh_of(self.batch, waiting, set(self.batch.keys) - self.known)
        self.handled = draw(st.integers(0, len(self.fresh)))

    def behind(self, index: int) -> bool:
        entry = self.entries[index]
        return entry.offset < (self.stored[entry.source] or 0)

    def same(self, one: int, other: int) -> bool:
        """Whether two entries are the same record, or have the same id."""
        first, second = self.entries[one], self.entries[other]
        return bool(first[:2] == second[:2] or (first.key is not None and first.key == second.key))


histories = st.composite(History)()


@given(histories)
def test_fresh_is_exactly_what_nobody_handled(history: History) -> None:
    """Fresh is what is not behind its offset, not known, and not the same as an earlier entry that is not behind."""
    expected = [
        index
        for index, entry in enumerate(history.entries)
        if not history.behind(index)
        and entry.key not in history.known
        and not any(history.same(index, other) for other in range(index) if not history.behind(other))
    ]
    assert list(history.fresh) == expected


@settings(max_examples=400)
@given(histories)
def test_offsets_pass_what_is_handled_and_nothing_else(history: History) -> None:
    """No offset passes an entry that is not handled, or a repeat of one; each passes everything before the first of those."""
    offsets, forget = _progress.advance(history.batch, history.stored, history.fresh, history.handled)
    left = history.fresh[history.handled :]
    for source in history.batch.first:
        stays = [
            entry.offset
            for index, entry in enumerate(history.entries)
            if entry.source == source and not history.behind(index) and any(history.same(index, other) for other in left)
        ]
        last = max(entry.offset for entry in history.entries if entry.source == source)
        stored = history.stored[source] or 0
        expected = max(stored, min([*stays, last + 1]))
        assert offsets.get(source, stored) == expected
        assert (source in offsets) == (expected > stored)
    assert forget == sorted({key for index in left if (key := history.entries[index].key) is not None})
    assert list(offsets) == sorted(offsets)


@pytest.mark.parametrize(
    "wrong",
    [
        [Entry(P0, 5, None), Entry(P0, 3, None)],
        [Entry(P0, 5, b"short")],
        [Entry(P0, 5, b"k" * 16, b"short")],
        [Entry(P0, 5, b"k" * 16, b"f" * 8), Entry(P0, 6, b"l" * 16)],
        [Entry(P0, 5, None), Entry(P1._replace(topic_id=b"j" * 16), 6, None)],
    ],
    ids=["descending", "key", "fingerprint", "some fingerprints", "topic ids"],
)
def test_entries_that_cannot_be_are_refused(place: Place, wrong: list[Entry]) -> None:
    """Entries out of order, keys that are no digests and two incarnations of a topic raise before anything is written."""
    inbox = place.inbox()
    with pytest.raises(ValueError, match=r"after offset|16 bytes|8 bytes|two ids"), inbox.transaction("group", wrong):
        pytest.fail("it began")
    with pytest.raises(ValueError, match="handled=2"), inbox.transaction("group", entries(P0, [0])) as tx:
        tx.finish(2)
    assert inbox.start_offsets("group", [P0]) == {P0: None}


# -- both inboxes -------------------------------------------------------------------------------------------------------------


def test_what_comes_again_is_left_out(place: Place) -> None:
    """The same offsets, the same ids elsewhere and repeats in one call are not fresh; another scope knows nothing of them."""
    inbox = place.inbox()
    assert inbox.start_offsets("group", [P0, P1]) == {P0: None, P1: None}
    with inbox.transaction("group", entries(P0, [0, 1, 4])) as tx:
        assert list(tx.fresh) == [0, 1, 2]
    again = [*entries(P0, [1, 4, 5]), *entries(P1, [7, 8, 9], "0/1", "new", "new"), Entry(P1, 10, None)]
    with inbox.transaction("group", again) as tx:
        assert list(tx.fresh) == [2, 4, 6]
    assert inbox.start_offsets("group", [P0, P1, P2]) == {P0: 6, P1: 11, P2: None}
    with inbox.transaction("other ' group", again) as tx:
        assert list(tx.fresh) == [0, 1, 2, 4, 6]
    with inbox.transaction("group", []) as tx:
        assert list(tx.fresh) == []


def test_an_exception_undoes_everything_and_is_raised_as_it_is(place: Place) -> None:
    """What the handler raises comes out itself; effect, offset and ids are as if nothing had happened."""
    inbox = place.inbox()
    error = KeyError("the handler's own")
    with pytest.raises(KeyError) as caught, inbox.transaction("group", entries(P0, [0, 1])) as tx:
        act(tx.connection, "undone")
        tx.finish()
        raise error
    assert caught.value is error
    assert place.effects() == []
    assert inbox.start_offsets("group", [P0]) == {P0: None}
    with inbox.transaction("group", entries(P1, [0, 1], "0/0", "0/1")) as tx:
        assert list(tx.fresh) == [0, 1]


def test_a_rollback_that_fails_hides_nothing(place: Place) -> None:
    """The handler's exception comes out although the connection is gone as well."""
    inbox = place.inbox()
    error = KeyError("the handler's own")
    with pytest.raises(KeyError) as caught, inbox.transaction("group", entries(P0, [0])) as tx:
        tx.connection.close()
        raise error
    assert caught.value is error


def test_finishing_a_part(place: Place) -> None:
    """Offsets stop before the first entry that is not handled and before repeats of it, and its id is forgotten."""
    inbox = place.inbox()
    call = [*entries(P0, [0, 1, 2], "a", "b", "c"), *entries(P1, [0, 1, 2], "a", "b", "d")]
    with inbox.transaction("group", call) as tx:
        assert list(tx.fresh) == [0, 1, 2, 5]
        act(tx.connection, "a")
        tx.finish(1)
    assert inbox.start_offsets("group", [P0, P1]) == {P0: 1, P1: 1}
    assert place.ids() == 1
    with inbox.transaction("group", call) as tx:
        assert list(tx.fresh) == [1, 2, 5]
    assert inbox.start_offsets("group", [P0, P1]) == {P0: 3, P1: 3}
    with inbox.transaction("group", entries(P2, [0])) as tx:
        tx.finish(0)
    assert inbox.start_offsets("group", [P2]) == {P2: None}
    assert place.effects() == ["a"]


def test_finishing_twice_is_refused(place: Place) -> None:
    """A second ``finish()`` raises, and nothing is written."""
    inbox = place.inbox()
    with pytest.raises(KafkaGuaranteesError, match="already"), inbox.transaction("group", entries(P0, [0])) as tx:
        tx.finish()
        tx.finish()
    assert inbox.start_offsets("group", [P0]) == {P0: None}


@pytest.mark.parametrize("how", ["COMMIT", "ROLLBACK"])
def test_a_handler_that_ends_the_transaction_is_told(place: Place, how: str) -> None:
    """Its messages come again: no offset moves behind the back of the effects. Also told when it comes after finish()."""
    inbox = place.inbox()
    told = pytest.raises(KafkaGuaranteesError, match=r"the handler (ended|called commit)")
    with told, inbox.transaction("group", entries(P0, [0])) as tx:
        act(tx.connection, "early")
        tx.connection.execute(how)
    assert inbox.start_offsets("group", [P0]) == {P0: None}
    with told, inbox.transaction("group", entries(P1, [0])) as tx:
        tx.finish()
        tx.connection.execute(how)
    assert inbox.start_offsets("group", [P1]) == {P1: None}


@pytest.mark.parametrize("how", ["with", "commit", "rollback", "script", "COMMIT", "begin"])
def test_an_sqlite_handler_cannot_end_the_transaction(tmp_path: Path, how: str) -> None:
    """With a part of its effects it would commit the ids of the whole batch; and the rest of the batch would be left out."""
    with closing(sqlite3.connect(tmp_path / "effects.db")) as database, SqliteInbox(tmp_path / "effects.db") as inbox:
        database.execute("CREATE TABLE effects (n INTEGER)")
        database.commit()
        batch = [Entry(P0, n, key_of(str(n))) for n in range(3)]

        def handle(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO effects VALUES (0)")
            if how == "with":
                with connection:
                    connection.execute("INSERT INTO effects VALUES (1)")
            elif how == "script":
                connection.executescript("INSERT INTO effects VALUES (1);")
            elif how in {"commit", "rollback"}:
                getattr(connection, how)()
            else:
                connection.execute("COMMIT" if how == "COMMIT" else "BEGIN")

        for _ in range(2):
            with pytest.raises(KafkaGuaranteesError, match="called commit"), inbox.transaction("g", batch) as tx:
                assert list(tx.fresh) == [0, 1, 2]
                handle(tx.connection)
        assert database.execute("SELECT count(*) FROM effects").fetchone() == (0,)
        with inbox.transaction("g", batch) as tx:
            assert list(tx.fresh) == [0, 1, 2]
            tx.connection.execute("SAVEPOINT mine")
            tx.connection.execute("INSERT INTO effects VALUES (2)")
            tx.connection.execute("ROLLBACK TO mine")
        assert database.execute("SELECT count(*) FROM effects").fetchone() == (0,)
        assert inbox.start_offsets("g", [P0]) == {P0: 3}


def test_a_refusal_that_a_handler_swallowed_is_not_held_against_the_next(tmp_path: Path) -> None:
    """Its transaction commits; what another handler raises later is that."""
    with SqliteInbox(tmp_path / "effects.db") as inbox:
        with inbox.transaction("g", entries(P0, [0])) as tx, suppress(sqlite3.DatabaseError):
            tx.connection.commit()
        assert inbox.start_offsets("g", [P0]) == {P0: 1}
        with pytest.raises(sqlite3.IntegrityError), inbox.transaction("g", entries(P0, [1])) as tx:
            tx.connection.execute("INSERT INTO kg_inbox_version VALUES (NULL)")


@pytest.mark.parametrize("ids", [True, False])
def test_what_sqlite_rolled_back_is_not_forgotten_for_a_savepoint(lite: Place, *, ids: bool) -> None:
    """D14: the SAVEPOINT begins another transaction, in which the offsets would pass what the first one took along."""
    inbox = lite.inbox()
    lite.sql("CREATE UNIQUE INDEX once ON effect (what)")
    lite.sql("INSERT INTO effect VALUES ('taken')")
    batch = entries(P0, [0, 1, 2]) if ids else [Entry(P0, offset, None) for offset in range(3)]
    for finish_first in (False, True):
        told = pytest.raises(KafkaGuaranteesError, match=r"ON CONFLICT ROLLBACK\)\. .*come again")
        with told, inbox.transaction("group", batch) as tx:
            if finish_first:
                tx.finish()
            act(tx.connection, "first")
            for what in ("taken", "audit"):
                tx.connection.execute("SAVEPOINT step")  # left open, as is allowed
                with suppress(sqlite3.IntegrityError):
                    tx.connection.execute(f"INSERT OR ROLLBACK INTO effect VALUES ('{what}')")
        assert lite.effects() == ["taken"]
    with inbox.transaction("group", batch) as tx:
        assert list(tx.fresh) == [0, 1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_a_statement_that_writes_and_is_left_half_read_holds_up_one_transaction(lite: Place, *, fails: bool) -> None:
    """D14: SQLite commits nothing under it, and an error of the handler's keeps it. To try again would be in vain for ever."""
    inbox, kept = lite.inbox(), []
    error = LookupError if fails else KafkaGuaranteesError
    told = pytest.raises(error, match="its own" if fails else r"half read, such as INSERT .* RETURNING\. .*come again")
    with told as caught, inbox.transaction("group", entries(P0, [0])) as tx:
        kept.append(tx.connection.execute("INSERT INTO effect VALUES ('a'), ('b') RETURNING what"))
        assert kept[0].fetchone() == ("a",)
        if fails:
            raise LookupError("its own")
    assert type(caught.value) is error
    with pytest.raises(StoreUnavailable), inbox.transaction("group", entries(P0, [0])):
        pytest.fail("it began")
    lite.sql("INSERT INTO effect VALUES ('of somebody else')")
    with inbox.transaction("group", entries(P0, [0])) as tx:
        act(tx.connection, "c")
    assert lite.effects() == ["c", "of somebody else"]


@pytest.mark.parametrize("steps", [0, 10, 20, 40])
def test_what_a_handler_leaves_on_the_connection_holds_up_one_transaction(lite: Place, steps: int) -> None:
    """Of a connection on which nothing can be begun a new one is made, instead of waiting for ever."""
    inbox, source = lite.inbox(), Source("t", bytes(16), 0)

    def handle() -> None:
        with inbox.transaction("group", entries(source, [0])) as opened:
            if steps:
                opened.connection.set_progress_handler(lambda: 1, steps)
            else:
                opened.connection.execute("PRAGMA query_only = ON")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        handle()
    with pytest.raises(StoreUnavailable), inbox.transaction("group", entries(source, [0], "id")):
        pass
    with inbox.transaction("group", entries(source, [0])) as opened:
        act(opened.connection, "handled")
        opened.finish()
    assert lite.effects() == ["handled"]


def test_a_closed_inbox_stays_closed(tmp_path: Path) -> None:
    """Whoever closes it in a transaction gets no new connection with the next call."""
    inbox = SqliteInbox(tmp_path / "effects.db")
    with pytest.raises(KafkaGuaranteesError, match="was closed"), inbox.transaction("g", entries(P0, [0])):
        inbox.close()
    with pytest.raises(sqlite3.ProgrammingError):
        inbox.start_offsets("g", [P0])


def test_a_handler_that_begins_another_transaction_is_told(postgres: Place) -> None:
    """The offsets move only in the transaction that has the ids and the locks."""
    inbox = postgres.inbox()
    with pytest.raises(KafkaGuaranteesError, match="handler ended"), inbox.transaction("group", entries(P0, [0])) as tx:
        act(tx.connection, "early")
        tx.connection.execute("COMMIT")
        tx.connection.execute("BEGIN")
    assert inbox.start_offsets("group", [P0]) == {P0: None}
    with inbox.transaction("group", entries(P0, [1])) as tx:
        assert list(tx.fresh) == [0]


@pytest.mark.parametrize("finish_first", [True, False])
def test_an_owner_that_another_has_passed_is_fenced(place: Place, *, finish_first: bool) -> None:
    """Whether ``finish()`` tells or the end of the transaction: nothing of it is written, and the next goes on."""
    inbox = place.inbox()
    with inbox.transaction("group", entries(P0, [0])):
        pass
    with pytest.raises(PartitionFenced, match=r"orders\[0\]"), inbox.transaction("group", entries(P0, [1])) as tx:
        act(tx.connection, "undone")
        tx.connection.execute("UPDATE kg_inbox_offset SET next_offset = 7")  # what the locks do not let another do
        if finish_first:
            tx.finish()
    assert place.effects() == []
    assert place.ids() == 1
    with inbox.transaction("group", entries(P0, [1])) as tx:
        assert list(tx.fresh) == [0]
    assert inbox.start_offsets("group", [P0]) == {P0: 2}


def test_a_topic_that_was_created_again_is_refused(place: Place) -> None:
    """D06: the offset of the old topic would hide the records of the new one, so nothing is handled until it is deleted."""
    inbox = place.inbox()
    with inbox.transaction("group", entries(P0, [0, 1, 2])):
        pass
    new = P0._replace(topic_id=b"j" * 16)
    with pytest.raises(TopicRecreated, match=r"orders\[0\].*deleted and created again.*delete the rows"):
        inbox.start_offsets("group", [new])
    with pytest.raises(TopicRecreated), inbox.transaction("group", entries(new, [0], "x")):
        pytest.fail("it began")
    assert place.ids() == 3
    place.sql("DELETE FROM kg_inbox_offset WHERE scope = 'group' AND topic = 'orders'")
    with inbox.transaction("group", entries(new, [0], "x")) as tx:
        assert list(tx.fresh) == [0]
    assert inbox.start_offsets("group", [new]) == {new: 1}


def test_a_topic_of_which_nothing_was_handled_may_be_created_again(place: Place) -> None:
    """D06: where no offset is stored none can be wrong."""
    inbox = place.inbox()
    with inbox.transaction("group", entries(P0, [0])) as tx:
        tx.finish(0)
    new = P0._replace(topic_id=b"j" * 16)
    assert inbox.start_offsets("group", [new]) == {new: None}
    with inbox.transaction("group", entries(new, [0])):
        pass
    assert inbox.start_offsets("group", [new]) == {new: 1}
    with pytest.raises(TopicRecreated):
        inbox.start_offsets("group", [P0])


def test_rival_owners_write_each_effect_once(place: Place) -> None:
    """Two members that both believe to own a partition, and fail at random, leave one effect for each offset."""
    end = 120

    def own(seed: int) -> None:
        chance = random.Random(seed)
        inbox = place.inbox()
        reached = 0
        while reached < end:
            stored = inbox.start_offsets("group", [P0])[P0] or 0
            reached = max(0, stored - chance.randrange(4))  # where a member that was paused would go on
            offsets = range(reached, min(end, reached + 5))
            with (
                suppress(PartitionFenced, StoreUnavailable, InterruptedError),
                inbox.transaction("group", [Entry(P0, offset, None) for offset in offsets]) as tx,
            ):
                for index in tx.fresh:
                    act(tx.connection, offsets[index])
                if chance.random() < 0.2:
                    raise InterruptedError
            reached = stored

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(own, (1, 2)))
    assert Counter(map(int, place.effects())) == Counter(range(end))


def test_unsorted_overlapping_ids_do_not_deadlock(place: Place) -> None:
    """D13: four members with the same ids in different orders wait for each other in one direction, and each id is new once."""
    rounds, size = 8, 300
    together = threading.Barrier(4)

    def work(number: int) -> None:
        chance = random.Random(number)
        inbox = place.inbox()
        source = Source("orders", TOPIC_ID, number)
        try:
            for start in range(0, rounds * size, size):
                ids = [f"{start}-{count}" for count in range(size)]
                chance.shuffle(ids)
                together.wait(DEADLINE)
                with inbox.transaction("group", entries(source, range(start, start + size), *ids)) as tx:
                    for index in tx.fresh:
                        act(tx.connection, ids[index])
        except BaseException:
            together.abort()
            raise

    with ThreadPoolExecutor(4) as threads:
        for worker in [threads.submit(work, number) for number in range(4)]:
            worker.result()
    effects = place.effects()
    assert len(effects) == len(set(effects)) == rounds * size


def test_many_may_begin_at_once(place: Place) -> None:
    """Members that start together make the tables once, and none of them fails."""
    start = threading.Barrier(8)

    def begin(number: int) -> None:
        start.wait(DEADLINE)
        place.inbox().start_offsets("group", [P0])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(begin, range(8)))
    assert len(place.sql("SELECT version FROM kg_inbox_version")) == 1


def test_tables_of_another_version_are_refused(place: Place) -> None:
    """D19: what a newer release wrote is not touched."""
    place.inbox().start_offsets("group", [P0])
    place.sql("UPDATE kg_inbox_version SET version = 99")
    with pytest.raises(KafkaGuaranteesError, match="version 99"):
        place.inbox().start_offsets("group", [P0])


def test_an_offset_that_somebody_deleted_begins_anew(place: Place) -> None:
    """An operator who deletes a row, as TopicRecreated advises, is understood by the inboxes that are running."""
    inbox = place.inbox()
    with inbox.transaction("group", entries(P0, [0])):
        pass
    place.sql("DELETE FROM kg_inbox_offset")
    said = [PartitionFenced] if place.kind == "sqlite" else [StoreUnavailable, PartitionFenced]
    for told in said:
        with pytest.raises(told), inbox.transaction("group", [Entry(P0, 0, None)]):
            pass
    with inbox.transaction("group", [Entry(P0, 0, None), Entry(P0, 1, None)]):
        pass
    assert inbox.start_offsets("group", [P0]) == {P0: 2}


@pytest.mark.parametrize("ids", [True, False])
def test_offsets_that_have_gone_back_are_noticed(place: Place, ids: bool) -> None:  # noqa: FBT001
    """D20: a failover, or a backup, lost transactions with their effects: the next must not pass over what they handled."""
    inbox = place.inbox()
    make = entries if ids else lambda source, offsets: [Entry(source, offset, None) for offset in offsets]
    for offset in range(3):
        with inbox.transaction("group", make(P0, [offset])):
            pass
        if offset == 0:
            with inbox.transaction("group", make(P1, [0])):
                pass
    place.sql("UPDATE kg_inbox_offset SET next_offset = 1 WHERE partition = 0")
    place.sql("DELETE FROM kg_inbox_id")
    gone_back = pytest.raises(PartitionFenced, match=r"has gone back: .* failover")
    with gone_back, inbox.transaction("group", [*make(P0, [3]), *make(P1, [1])]) as tx:
        act(tx.connection, "past a gap")
    assert place.effects() == []
    assert inbox.start_offsets("group", [P0, P1]) == {P0: 1, P1: 1}
    with inbox.transaction("group", [*make(P0, [1, 2, 3]), *make(P1, [1])]) as tx:
        assert list(tx.fresh) == [0, 1, 2, 3]


class Caller:
    """Handles messages in transactions of its own."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.inbox: Any = place.inbox()

    def handle(self, *offsets: int, how: str = "COMMIT") -> None:
        with closing(self.place.connect()) as mine:
            mine.execute("BEGIN IMMEDIATE")
            try:
                self.inbox.enlist(mine, "group", [Entry(P0, offset, None) for offset in offsets]).finish()
            except BaseException:
                mine.execute("ROLLBACK")
                raise
            mine.execute(how)

    def fall_back(self, offset: int) -> None:
        self.place.sql(f"UPDATE kg_inbox_offset SET next_offset = {offset}")


def test_offsets_that_have_gone_back_are_noticed_with_enlist(lite: Place) -> None:
    """D20: as in transactions of the inbox; what the caller has rolled back, and repeats in parts, has not gone back."""
    caller = Caller(lite)
    for offset in range(3):
        caller.handle(offset, offset + 1, offset + 2, how="ROLLBACK")
        caller.handle(offset)
    caller.fall_back(1)
    with pytest.raises(PartitionFenced, match="has gone back"):
        caller.handle(3)
    assert caller.inbox.start_offsets("group", [P0]) == {P0: 1}
    caller.handle(1, 2, 3)
    caller.handle(4)


def test_offsets_that_have_gone_back_by_what_failed_a_commit_are_noticed(lite: Place) -> None:
    """D20: as a failover does. The caller repeats it, and what was committed before may be lost as well."""
    caller = Caller(lite)
    for offset in range(2):
        caller.handle(offset)
    caller.handle(2, how="ROLLBACK")
    caller.fall_back(1)
    with pytest.raises(PartitionFenced, match="has gone back"):
        caller.handle(2)
    caller.handle(1, 2)


def test_an_offset_that_began_there_and_has_gone_back_is_noticed(place: Place) -> None:
    """D20: also by a member that has committed nothing since it began at that offset."""
    with place.inbox().transaction("group", entries(P0, [0, 1])):
        pass
    inbox = place.inbox()
    assert inbox.start_offsets("group", [P0]) == {P0: 2}
    place.sql("UPDATE kg_inbox_offset SET next_offset = 1")
    with pytest.raises(PartitionFenced), inbox.transaction("group", entries(P0, [2])):
        pytest.fail("it began")


def handled_with_a_backup(place: Place, inbox: Inbox[Any], count: int, backup: Path, behind: int) -> None:
    """Messages are handled from the first on, and the file is copied behind one of them."""
    for offset in range(count):
        with inbox.transaction("group", entries(P0, [offset])) as tx:
            act(tx.connection, offset)
        if offset == behind:
            with closing(place.connect()) as live, closing(sqlite3.connect(backup)) as kept:
                live.backup(kept)


def test_a_backup_that_is_restored_into_a_file_in_use_is_noticed(lite: Place, tmp_path: Path) -> None:
    """D20: as by ``.restore`` of the sqlite3 shell, which the connections that are open see; effects and ids went with it."""
    inbox, backup = lite.inbox(), tmp_path / "backup.db"
    handled_with_a_backup(lite, inbox, 4, backup, behind=1)
    with closing(lite.connect()) as live, closing(sqlite3.connect(backup)) as kept:
        kept.backup(live)
    with pytest.raises(PartitionFenced, match=r"has gone back: .* backup"), inbox.transaction("group", entries(P0, [4])):
        pytest.fail("it began")
    assert inbox.start_offsets("group", [P0]) == {P0: 2}
    with inbox.transaction("group", entries(P0, [2, 3, 4])) as tx:
        for index in tx.fresh:
            act(tx.connection, 2 + index)
    assert lite.effects() == ["0", "1", "2", "3", "4"]


def test_a_file_that_another_one_has_replaced_is_used_no_more(lite: Place, tmp_path: Path) -> None:
    """D20: as by ``mv`` of a backup over it: what is written on would go into a file that nobody finds any more."""
    inbox, backup = lite.inbox(), tmp_path / "backup.db"
    handled_with_a_backup(lite, inbox, 3, backup, behind=0)
    for end in ("", "-wal", "-shm"):
        os.unlink(f"{lite.where}{end}")  # noqa: PTH108 - no Path is here
    with pytest.raises(StoreUnavailable, match="was removed"), inbox.transaction("group", entries(P0, [3])):
        pytest.fail("it began")
    assert not os.path.exists(lite.where)  # noqa: PTH110
    backup.replace(lite.where)
    with pytest.raises(PartitionFenced, match=r"has gone back: .* backup"), inbox.transaction("group", entries(P0, [3])):
        pytest.fail("it began")
    assert inbox.start_offsets("group", [P0]) == {P0: 1}
    with inbox.transaction("group", entries(P0, [1, 2, 3])) as tx:
        for index in tx.fresh:
            act(tx.connection, 1 + index)
    assert lite.effects() == ["0", "1", "2", "3"]


def test_an_inbox_does_not_cross_a_fork(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child every call raises, and close() leaves the parent's connections alone."""
    inbox = place.inbox()
    inbox.start_offsets("group", [P0])
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)
    with pytest.raises(ForkedClientError):
        inbox.start_offsets("group", [P0])
    with pytest.raises(ForkedClientError), inbox.transaction("group", []):
        pytest.fail("it began")
    with pytest.raises(ForkedClientError):
        inbox.purge()
    inbox.close()
    monkeypatch.undo()
    assert inbox.start_offsets("group", [P0]) == {P0: None}


@pytest.mark.parametrize("retention", [timedelta(0), timedelta(seconds=-1)])
def test_a_retention_is_longer_than_nothing(place: Place, retention: timedelta) -> None:
    """Without a retention no id would be known."""
    with pytest.raises(ValueError, match="retention"):
        place.inbox(retention=retention)


@pytest.mark.parametrize("limit", [timedelta(0), timedelta(days=24, hours=21)])
def test_an_idle_limit_is_one_that_postgresql_takes(postgres: Place, limit: timedelta) -> None:
    """Milliseconds in 32 bits: it would be noticed in the middle of a run."""
    with pytest.raises(ValueError, match=r"idle_limit is a millisecond or longer, and 24 days, 20:31:23\.647000 at most"):
        postgres.inbox(idle_limit=limit)
    with postgres.inbox(idle_limit=postgres_inbox.LONGEST_IDLE).transaction("group", entries(P0, [0])):
        pass


# -- other processes ----------------------------------------------------------------------------------------------------------

# kind, where, partition, then commands on stdin: "commit", "rollback"; or the number of messages to handle.
CHILD = """
import sys
from kafka_guarantees.dedup.contract import Entry, Source
from kafka_guarantees.dedup.ids import key_of
kind, where, partition, end = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if kind == "sqlite":
    from kafka_guarantees.dedup.sqlite_inbox import SqliteInbox as Inbox
else:
    from kafka_guarantees.dedup.postgres_inbox import PostgresInbox as Inbox
source = Source("orders", b"i" * 16, partition)
def act(connection, what):
    connection.execute(f"INSERT INTO effect VALUES ('{what}')")
with Inbox(where) as inbox:
    if end:
        reached = inbox.start_offsets("group", [source])[source] or 0
        while reached < end:
            offsets = range(max(0, reached - 3), min(end, reached + 4))
            with inbox.transaction("group", [Entry(source, o, key_of(f"{partition}/{o}")) for o in offsets]) as tx:
                for index in tx.fresh:
                    act(tx.connection, offsets[index])
            reached = offsets[-1] + 1
            print(reached, flush=True)
    else:
        try:
            with inbox.transaction("group", [Entry(source, 0, key_of("shared"))]) as tx:
                act(tx.connection, "first")
                print("open", flush=True)
                if sys.stdin.readline() == "rollback\\n":
                    raise InterruptedError
        except InterruptedError:
            pass
"""


@contextmanager
def child(place: Place, partition: int = 0, end: int = 0) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, place.kind, place.where, str(partition), str(end)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_effects_and_offsets_survive_sigkill_together(place: Place) -> None:
    """A process that is killed at any instant leaves the effect, the offset and the id of each message, or none of them."""
    end, chance = 100_000, random.Random(5)  # so many that nobody comes to the end
    place.inbox().start_offsets("group", [P0])
    kills = 0
    for _ in range(15):
        with child(place, end=end) as process:
            for _ in range(chance.randrange(1, 6)):
                line(process)
            time.sleep(chance.uniform(0, 0.004))  # the instant is the test
            process.send_signal(signal.SIGKILL)
            kills += process.wait(DEADLINE) == -signal.SIGKILL
        reached = place.inbox().start_offsets("group", [P0])[P0] or 0
        assert Counter(map(int, place.effects())) == Counter(range(reached))
        assert place.ids() == reached
    assert kills == 15
    assert reached > 0


@pytest.mark.parametrize("ending", ["commit", "rollback", "kill"])
def test_a_duplicate_elsewhere_waits_for_the_first(place: Place, ending: str) -> None:
    """An id in another partition waits for the open transaction that has it: left out if that commits, else handled."""
    inbox = place.inbox()
    inbox.start_offsets("group", [P1])
    with child(place) as process, ThreadPoolExecutor(1) as thread:
        assert line(process) == "open"

        def second() -> list[int]:
            with inbox.transaction("group", entries(P1, [0, 1], "shared", "other")) as tx:
                for index in tx.fresh:
                    act(tx.connection, f"second {index}")
                return list(tx.fresh)

        waiting = thread.submit(second)
        with pytest.raises(NotYet):
            waiting.result(0.3)
        if ending == "kill":
            process.kill()
        else:
            process.communicate(f"{ending}\n", timeout=DEADLINE)
        assert waiting.result(DEADLINE) == ([1] if ending == "commit" else [0, 1])
    assert place.effects() == (["first", "second 1"] if ending == "commit" else ["second 0", "second 1"])


# -- SQLite -------------------------------------------------------------------------------------------------------------------


def test_retention_and_purge(lite: Place) -> None:
    """An id is known until its retention is over, and removed after it, not before; offsets stay."""
    now = [1_000_000.0]
    inbox = lite.inbox(retention=timedelta(seconds=60), clock=lambda: now[0])
    assert inbox.retention == timedelta(seconds=60)
    for offset, name in enumerate("abc"):
        with inbox.transaction("group", entries(P0, [offset], name)):
            pass
        now[0] += 10
    assert inbox.purge() == 0
    now[0] += 29.9  # a: 59.9 s
    with inbox.transaction("group", entries(P1, [0], "a")) as tx:
        assert list(tx.fresh) == []
    now[0] += 0.1
    with inbox.transaction("group", entries(P1, [1, 2, 3], "b", "a", "a")) as tx:
        assert list(tx.fresh) == [1]
    now[0] += 59.9  # a was refreshed; b and c are over
    with inbox.transaction("group", entries(P1, [4], "a")) as tx:
        assert list(tx.fresh) == []
    assert inbox.purge(limit=1) == 1
    assert inbox.purge() == 1
    assert lite.ids() == 1
    assert inbox.start_offsets("group", [P0]) == {P0: 3}


def test_purge_comes_to_every_id(lite: Place) -> None:
    """It looks at a thousand ids or more in a call, removes what is expired of them, and goes on from there the next time."""
    now = [1_000_000.0]
    inbox = lite.inbox(retention=timedelta(seconds=60), clock=lambda: now[0])
    for scope in ("group", "other"):
        with inbox.transaction(scope, entries(P0, range(2500))):
            pass
    now[0] += 60
    with inbox.transaction("group", entries(P0, range(2500, 5000))):
        pass
    removed = [inbox.purge(limit=200) for _ in range(40)]
    assert sum(removed) == 5000
    assert max(removed) == 200
    assert 0 < sum(map(bool, removed)) < 40
    assert lite.ids() == 2500
    with inbox.transaction("group", entries(P1, range(2500, 5000), *(f"0/{number}" for number in range(2500, 5000)))) as tx:
        assert list(tx.fresh) == []
    now[0] += 60
    while lite.ids():
        assert inbox.purge() > 0


def test_a_foreign_key_that_is_checked_at_the_commit_is_the_handler_s(lite: Place) -> None:
    """It would be broken each time: a message to be tried again, and set aside, and no file to be waited for."""
    lite.sql("CREATE TABLE account (name text PRIMARY KEY)")
    lite.sql("CREATE TABLE credit (account text REFERENCES account DEFERRABLE INITIALLY DEFERRED)")
    inbox = lite.inbox()
    with inbox.transaction("group", []) as tx:
        kept = tx.connection
    kept.execute("PRAGMA foreign_keys = ON")  # which does nothing in a transaction
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"), inbox.transaction("group", entries(P0, [0])) as tx:
        tx.connection.execute("INSERT INTO credit VALUES ('nobody')")
    assert inbox.start_offsets("group", [P0]) == {P0: None}
    with inbox.transaction("group", entries(P0, [0])) as tx:
        assert list(tx.fresh) == [0]


@pytest.mark.parametrize("level", ["DEFERRED", "IMMEDIATE"])
def test_purge_leaves_no_transaction_open(lite: Place, level: str) -> None:
    """Where a handler has set isolation_level, Python begins one before a DELETE: the file would be locked for everybody."""
    inbox = lite.inbox()
    with inbox.transaction("group", entries(P0, [0])) as tx:
        tx.connection.isolation_level = level
    assert inbox.purge() == 0
    lite.sql("INSERT INTO effect VALUES ('of another process')")
    with inbox.transaction("group", entries(P0, [1])) as tx:
        act(tx.connection, "ours")
    assert len(lite.effects()) == 2


def test_after_repeats_the_ids_are_told_apart_again(lite: Place) -> None:
    """In each transaction, whether its ids are inserted at once or one by one, exactly those that are new are fresh."""
    inbox = lite.inbox()
    known: set[int] = set()
    chance = random.Random(3)
    for start in range(0, 600, 10):
        wanted = list(range(400 + start, 410 + start)) if start % 50 else chance.sample(range(400), 10)
        with inbox.transaction("group", entries(P0, range(start, start + 10), *map(str, wanted))) as tx:
            assert [wanted[index] for index in tx.fresh] == [one for one in wanted if one not in known]
        known.update(wanted)
    assert lite.ids() == len(known)


VERSION_1 = """
CREATE TABLE kg_inbox_version (version INTEGER NOT NULL);
CREATE TABLE kg_inbox_offset (
    scope TEXT NOT NULL, topic TEXT NOT NULL, partition INTEGER NOT NULL, topic_id BLOB NOT NULL,
    next_offset INTEGER NOT NULL, PRIMARY KEY (scope, topic, partition)) WITHOUT ROWID;
CREATE TABLE kg_inbox_id (
    scope TEXT NOT NULL, key BLOB NOT NULL, expires INTEGER NOT NULL, PRIMARY KEY (scope, key)) WITHOUT ROWID;
CREATE INDEX kg_inbox_id_expires ON kg_inbox_id (expires);
INSERT INTO kg_inbox_version VALUES (1);
INSERT INTO kg_inbox_offset VALUES ('group', 'orders', 0, CAST('iiiiiiiiiiiiiiii' AS BLOB), 3);
"""


def test_a_file_of_version_1_keeps_its_ids_and_offsets(lite: Place) -> None:
    """D19: the tables are changed when it is opened; a process of that version that has it open fails, and writes nothing."""
    with closing(lite.connect()) as old:
        old.executescript(VERSION_1)
        insert = (
            "INSERT INTO kg_inbox_id VALUES (?, ?, ?) "
            "ON CONFLICT DO UPDATE SET expires = excluded.expires WHERE kg_inbox_id.expires <= ?"
        )
        for scope, name, expires in (("group", "a", 100), ("group", "b", 50), ("other", "a", 100)):
            old.execute(insert, (scope, key_of(name), expires * 1_000_000, 0))
        for _ in range(2):
            inbox = lite.inbox(clock=lambda: 60.0)
            assert inbox.start_offsets("group", [P0, P1]) == {P0: 3, P1: None}
        for offset, scope, fresh in ((0, "group", [1, 2]), (0, "other", [1, 2]), (3, "third", [0, 1, 2])):
            with inbox.transaction(scope, entries(P1, range(offset, offset + 3), "a", "b", "c")) as tx:
                assert list(tx.fresh) == fresh
        with pytest.raises(sqlite3.OperationalError, match="columns"):
            old.execute(insert, ("group", key_of("d"), 100_000_000, 0))
        assert lite.ids() == 9


def test_tables_without_fingerprints_get_them(place: Place) -> None:
    """Those of the version before: their ids are known, and not compared. Once that is done another one finds nothing to do."""
    kinds = {"sqlite": (sqlite_inbox, 2), "postgres": (postgres_inbox, 1)}
    module, earlier = kinds[place.kind]
    with place.inbox().transaction("group", entries(P0, [0, 1], "a", "b")):
        pass
    place.sql("ALTER TABLE kg_inbox_id DROP COLUMN fingerprint")
    place.sql(f"UPDATE kg_inbox_version SET version = {earlier}")
    came = [Entry(P1, number, key_of(name), b"%8d" % number) for number, name in enumerate(["a", "c"])]
    for fresh in ([1], []):
        with place.inbox().transaction("group", came) as tx:
            assert list(tx.fresh) == fresh
    assert place.sql("SELECT version FROM kg_inbox_version") == [(module.VERSION,)]
    again = came[1]._replace(source=P2, fingerprint=b"another1")
    with pytest.raises(MessageIdReused, match=r"orders\[2\] offset 1"), place.inbox().transaction("group", [again]):
        pass


def test_tables_without_the_constraint_get_it(postgres: Place) -> None:
    """Those of the version before: offsets and ids stay, and a COMMIT of a handler is refused from then on."""
    with postgres.inbox().transaction("group", entries(P0, [0, 1], "a", "b")):
        pass
    postgres.sql("ALTER TABLE kg_inbox_offset DROP COLUMN unfinished")
    postgres.sql("ALTER TABLE kg_inbox_version DROP CONSTRAINT kg_inbox_version_pkey")
    postgres.sql("ALTER TABLE kg_inbox_version ALTER version DROP NOT NULL")
    postgres.sql("UPDATE kg_inbox_version SET version = 2")
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda _: postgres.inbox().start_offsets("group", [P0]), range(4))
        assert list(found) == [{P0: 2}] * 4
    inbox = postgres.inbox()
    with pytest.raises(KafkaGuaranteesError, match="handler ended"), inbox.transaction("group", entries(P0, [1, 2])) as tx:
        tx.connection.execute("COMMIT")
    with inbox.transaction("group", entries(P0, [1, 2], "a", "c")) as tx:
        assert list(tx.fresh) == [1]
    assert postgres.sql("SELECT version FROM kg_inbox_version") == [(postgres_inbox.VERSION,)]


def printed(source: Source, offset: int, name: str, content: bytes) -> Entry:
    """A message with an id and this content."""
    return Entry(source, offset, key_of(name), content.ljust(8))


def expired(place: Place) -> Inbox[Any]:
    """An inbox whose ids are expired as soon as anybody looks at them."""
    return place.inbox(retention=timedelta(microseconds=1))


def test_groups_keep_out_of_each_other_s_ids(place: Place) -> None:
    """D07: what one forgets, refreshes or compares is its own; else another handles a message twice, or stops at a good one."""
    inbox = place.inbox()
    with inbox.transaction("two", [printed(P0, number, name, b"two") for number, name in enumerate("abc")]):
        pass
    with expired(place).transaction("one", [printed(P0, number, name, b"one") for number, name in enumerate("bc")]):
        pass
    time.sleep(0.01)
    with inbox.transaction("one", [printed(P1, 0, "b", b"one"), printed(P1, 1, "a", b"one")]) as tx:  # b is expired
        assert list(tx.fresh) == [0, 1]
        tx.finish(1)  # a is given back
    time.sleep(0.01)
    with expired(place).transaction("one", [printed(P1, 1, "c", b"one")]) as tx:
        assert list(tx.fresh) == [0]
    time.sleep(0.01)
    with inbox.transaction("one", [printed(P2, 0, "b", b"one")]) as tx:
        assert list(tx.fresh) == []
    with inbox.transaction("two", [printed(P1, number, name, b"two") for number, name in enumerate("abc")]) as tx:
        assert list(tx.fresh) == []
    with inbox.transaction("two", [printed(P2, 0, "a", b"two")]):  # where the other is
        pass
    with inbox.transaction("one", [printed(P2, 1, "b", b"one")]):
        pass
    assert [inbox.start_offsets(scope, [P2])[P2] for scope in ("one", "two")] == [2, 1]


def test_who_may_not_change_the_tables_is_told_what_to_do(postgres: Place) -> None:
    """The statements, for their owner, who executes them one by one as psql does."""
    postgres.inbox().start_offsets("group", [P0])
    postgres.sql("ALTER TABLE kg_inbox_id DROP COLUMN fingerprint")
    postgres.sql("UPDATE kg_inbox_version SET version = 1")
    user = secret = f"u{uuid.uuid4().hex[:12]}"
    [(schema,)] = postgres.sql("SELECT current_schema()")
    postgres.sql(f"CREATE ROLE {user} LOGIN PASSWORD '{secret}'")
    postgres.sql(f"GRANT USAGE ON SCHEMA {schema} TO {user}")
    postgres.sql(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {user}")
    with (
        PostgresInbox(make_conninfo(postgres.where, user=user, password=secret)) as inbox,
        pytest.raises(KafkaGuaranteesError, match=r'may not change them.*ALTER TABLE "kg_inbox_id" ADD COLUMN') as told,
    ):
        inbox.start_offsets("group", [P0])
    assert postgres.sql("SELECT version FROM kg_inbox_version") == [(1,)]
    _, _, statements = str(told.value).partition("execute: ")
    with closing(postgres.connect()) as owner:
        for statement in statements.split("; "):
            owner.execute(statement)
    with PostgresInbox(make_conninfo(postgres.where, user=user, password=secret)) as inbox:
        assert inbox.start_offsets("group", [P0]) == {P0: None}


def test_rights_that_are_missing_are_named(postgres: Place) -> None:
    """42501, of the statements of the inbox: what to grant, and that nothing was written."""
    user = secret = f"u{uuid.uuid4().hex[:12]}"
    [(schema,)] = postgres.sql("SELECT current_schema()")
    postgres.sql(f"CREATE ROLE {user} LOGIN PASSWORD '{secret}'")
    postgres.sql(f"GRANT USAGE ON SCHEMA {schema} TO {user}")
    with PostgresInbox(make_conninfo(postgres.where, user=user, password=secret)) as inbox:
        with pytest.raises(
            AuthorizationError, match=r"making the tables .*permission denied for schema .*CREATE on the schema"
        ):
            inbox.start_offsets("group", [P0])
        postgres.inbox().start_offsets("group", [P0])
        postgres.sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {user}")
        with (
            pytest.raises(AuthorizationError, match=r"beginning a transaction .*permission denied for table .*Grant the role"),
            inbox.transaction("group", entries(P0, [0])),
        ):
            pytest.fail("it began")
        postgres.sql(f"GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {user}")
        postgres.sql(f"REVOKE ALL ON effect FROM {user}")
        with pytest.raises(psycopg.errors.InsufficientPrivilege), inbox.transaction("group", entries(P0, [0])) as tx:
            act(tx.connection, "mine")


def test_the_file_belongs_to_the_user(lite: Place) -> None:
    """D19: his tables and his user_version stay as they are, and his rows are written with ours."""
    lite.sql("PRAGMA user_version = 7")
    with lite.inbox().transaction("group", entries(P0, [0])) as tx:
        act(tx.connection, "mine")
    assert lite.sql("PRAGMA user_version") == [(7,)]
    assert lite.effects() == ["mine"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o640)])
def test_who_may_read_the_file_is_up_to_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """As with sqlite3 and most programs; and its journals are as it is, or a member of another user could not open it."""
    before = os.umask(umask)
    try:
        with SqliteInbox(tmp_path / "inbox.db") as inbox, SqliteDedupStore(tmp_path / "ids.db") as store:
            inbox.start_offsets("group", [P0])
            store.claim("group", [Item(b"k" * 16, b"p" * 16)], token=b"t" * 16, lease=60)
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert {"inbox.db", "ids.db", "ids.db-wal", "ids.db-shm"} <= modes.keys()
    assert set(modes.values()) == {mode}


@pytest.mark.parametrize(("durability", "level"), [("process", 1), ("power", 2)])
def test_durability_is_what_sqlite_calls_synchronous(lite: Place, durability: str, level: int) -> None:
    """``"power"``: an fsync in every transaction (FULL); ``"process"``: in checkpoints (NORMAL). Both with a WAL."""
    with lite.inbox(durability=durability).transaction("group", []) as tx:
        assert tx.connection.execute("PRAGMA synchronous").fetchall() == [(level,)]
        assert tx.connection.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
    with pytest.raises(ValueError, match="durability"):
        lite.inbox(durability="none")


def test_a_file_that_another_worker_writes_can_be_opened(lite: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to make in it: a worker that starts while another has a long transaction waits for nobody."""
    monkeypatch.setattr(sqlite_inbox, "PATIENCE", 0.1)
    lite.inbox().close()
    with closing(lite.connect()) as other:
        other.execute("BEGIN IMMEDIATE")
        inbox = lite.inbox()
        assert inbox.start_offsets("group", [P0]) == {P0: None}
        other.execute("ROLLBACK")


def test_a_locked_file_is_unavailable(lite: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """D14, D16: the wait for the write lock ends, nothing is written, and the same call works later."""
    monkeypatch.setattr(sqlite_inbox, "PATIENCE", 0.1)
    inbox = lite.inbox()
    with closing(lite.connect()) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"), inbox.transaction("group", entries(P0, [0])):
            pytest.fail("it began")
        with pytest.raises(StoreUnavailable):
            inbox.purge()
        other.execute("ROLLBACK")
    with inbox.transaction("group", entries(P0, [0])) as tx:
        assert list(tx.fresh) == [0]


@pytest.mark.parametrize("kind", [SqliteInbox, SqliteDedupStore])
def test_where_no_database_can_be_the_path_is_refused(kind: Any, tmp_path: Path) -> None:
    """D16: it will not answer later either, and no connection stays open. A file that may not be read may be mended."""
    path = tmp_path / "text.db"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(UnsafeConfigError, match="not written by SQLite"):
        kind(path)
    with pytest.raises(UnsafeConfigError, match=rf"there is no folder {tmp_path}/no\b"):
        kind(tmp_path / "no" / "folder.db")
    with pytest.raises(UnsafeConfigError, match="it is a folder"):
        kind(tmp_path)
    with pytest.raises(StoreUnavailable, match="unable to open"):
        kind(f"{tmp_path}/{'long' * 100}")


def test_one_transaction_at_a_time(lite: Place) -> None:
    """A transaction inside another one of the same inbox is refused, and the outer one goes on."""
    inbox = lite.inbox()
    with inbox.transaction("group", entries(P0, [0])) as tx:
        with pytest.raises(KafkaGuaranteesError, match="one at a time"), inbox.transaction("group", entries(P1, [0])):
            pytest.fail("it began")
        act(tx.connection, "outer")
    assert lite.effects() == ["outer"]
    assert inbox.start_offsets("group", [P0]) == {P0: 1}


def test_enlisting_in_a_transaction_of_sqlite(lite: Place) -> None:
    """The caller's commit keeps effects and offsets, his rollback undoes both; without a transaction it is refused."""
    inbox = lite.inbox()
    assert isinstance(inbox, SqliteInbox)
    with closing(lite.connect()) as mine:
        with pytest.raises(KafkaGuaranteesError, match="no transaction"):
            inbox.enlist(mine, "group", entries(P0, [0]))
        for end in ("ROLLBACK", "COMMIT"):
            mine.execute("BEGIN IMMEDIATE")
            tx = inbox.enlist(mine, "group", entries(P0, [0, 1]))
            assert list(tx.fresh) == [0, 1]
            act(mine, end)
            tx.finish()
            mine.execute(end)
    assert lite.effects() == ["COMMIT"]
    with closing(sqlite3.connect(lite.where)) as implicit, implicit:  # Python begins the transaction itself
        assert list(inbox.enlist(implicit, "group", entries(P0, [1, 2])).fresh) == [1]
    assert inbox.start_offsets("group", [P0]) == {P0: 2}


# -- PostgreSQL ---------------------------------------------------------------------------------------------------------------


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_retention_by_the_clock_of_the_server(postgres: Place) -> None:
    """An id is known until its retention is over, then it is new once more; purge removes what is over, not more."""
    short, long = postgres.inbox(retention=timedelta(seconds=1.5)), postgres.inbox(retention=timedelta(hours=1))
    with short.transaction("group", entries(P0, [0, 1, 2], "a", "b", "c")):
        pass
    with long.transaction("group", entries(P0, [3, 4], "d", "e")):
        pass
    with long.transaction("group", entries(P1, [0], "a")) as tx:
        assert list(tx.fresh) == []
    until(lambda: postgres.sql("SELECT count(*) FROM kg_inbox_id WHERE expires <= now()") == [(3,)])
    with long.transaction("group", entries(P1, [1, 2, 3], "d", "a", "a")) as tx:
        assert list(tx.fresh) == [1]
    with long.transaction("group", entries(P1, [4], "a")) as tx:
        assert list(tx.fresh) == []
    assert long.purge(limit=1) == 1
    assert long.purge() == 1
    assert postgres.ids() == 3
    assert long.start_offsets("group", [P0, P1]) == {P0: 5, P1: 5}


def test_purge_walks_through_the_table(postgres: Place) -> None:
    """It looks at a hundred pages or more in a call, removes what is expired there, and goes on behind them the next time."""
    short, long = postgres.inbox(retention=timedelta(milliseconds=1)), postgres.inbox()
    for start in range(0, 30_000, 6000):
        for inbox, source in ((short, P0), (long, P1)):
            with inbox.transaction("group", entries(source, range(start, start + 6000))):
                pass
    removed = [long.purge(limit=2000) for _ in range(40)]
    assert sum(removed) == 30_000
    assert max(removed) == 2000
    assert postgres.ids() == 30_000
    with long.transaction("group", entries(P2, range(30_000), *(f"1/{number}" for number in range(30_000)))) as tx:
        assert list(tx.fresh) == []


def test_tables_as_they_were_made_before_serve_as_well(postgres: Place) -> None:
    """Early versions had the scope first in the index of ids, and one by time: neither changes what the inbox does."""
    postgres.inbox().start_offsets("group", [P0])
    postgres.sql("ALTER TABLE kg_inbox_id DROP CONSTRAINT kg_inbox_id_pkey")
    postgres.sql("ALTER TABLE kg_inbox_id ADD PRIMARY KEY (scope, key)")
    postgres.sql("CREATE INDEX kg_inbox_id_expires ON kg_inbox_id USING brin (expires)")
    inbox = postgres.inbox(retention=timedelta(milliseconds=1))
    with inbox.transaction("group", entries(P0, [0, 1], "a", "b")):
        pass
    with inbox.transaction("group", entries(P1, [0, 1, 2], "a", "c", "c")) as tx:  # expired, so new
        assert list(tx.fresh) == [0, 1]
    with postgres.inbox().transaction("group", entries(P2, [0, 1], "d", "d")) as tx:
        assert list(tx.fresh) == [0]
    assert inbox.purge() == 3
    assert postgres.ids() == 1


def test_ids_of_records_that_are_behind_stay_expired(postgres: Place) -> None:
    """A record that its offset knows does not bring its expired id back."""
    inbox = postgres.inbox()
    with inbox.transaction("group", entries(P0, [0, 1], "a", "b")):
        pass
    postgres.sql("DELETE FROM kg_inbox_id")
    with inbox.transaction("group", [*entries(P0, [0, 1, 2], "a", "b", "c"), *entries(P1, [0], "b")]) as tx:
        assert list(tx.fresh) == [2, 3]
    assert postgres.ids() == 2


def test_a_silent_owner_loses_its_transaction(postgres: Place) -> None:
    """D04: the server ends it, a rival goes on, and what the owner does next says that nothing was written."""
    owner, rival = postgres.inbox(idle_limit=timedelta(milliseconds=200)), postgres.inbox()
    with pytest.raises(StoreUnavailable), owner.transaction("group", entries(P0, [0])) as tx:
        act(tx.connection, "owner")
        with rival.transaction("group", entries(P0, [0])) as other:  # waits for the server to end the owner's
            assert list(other.fresh) == [0]
            act(other.connection, "rival")
        act(tx.connection, "too late")
    assert postgres.effects() == ["rival"]
    with owner.transaction("group", entries(P0, [0, 1])) as tx:
        assert list(tx.fresh) == [1]


def test_an_owner_that_never_said_a_word_loses_its_transaction(postgres: Place) -> None:
    """D04: its host may be gone before the handler's first statement; PostgreSQL did not count that as idle."""
    owner, rival = postgres.inbox(idle_limit=timedelta(milliseconds=200)), postgres.inbox()
    with (
        pytest.raises(StoreUnavailable),
        owner.transaction("group", entries(P0, [0])),
        rival.transaction("group", entries(P0, [0])) as other,
    ):
        assert list(other.fresh) == [0]
        act(other.connection, "rival")
    assert postgres.effects() == ["rival"]


def test_waiting_for_a_lock_ends(postgres: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """D13: a rival that holds the partition makes the inbox unavailable, not hang; the handler keeps its own lock_timeout."""
    monkeypatch.setattr(postgres_inbox, "_LIMITS", postgres_inbox._LIMITS.replace(b"10s", b"200ms"))
    owner, rival = postgres.inbox(), postgres.inbox()
    with owner.transaction("group", entries(P0, [0])):  # so that there is a row to lock
        pass
    with owner.transaction("group", entries(P0, [1])) as tx:
        assert tx.connection.execute("SHOW lock_timeout").fetchall() == [("0",)]
        assert tx.connection.execute("SHOW idle_in_transaction_session_timeout").fetchall() == [("5min",)]
        for wait_for in ([Entry(P0, 1, None)], entries(P1, [0], "0/1"), [Entry(P1, 0, None), Entry(P0, 1, None)]):
            with pytest.raises(StoreUnavailable, match="LockNotAvailable"), rival.transaction("group", wait_for):
                pytest.fail("it began")
    with owner.transaction("group", [Entry(P2, 0, None)]) as tx:  # of which there is no row yet
        assert tx.connection.execute("SHOW lock_timeout").fetchall() == [("0",)]
        with pytest.raises(StoreUnavailable, match="LockNotAvailable"), rival.transaction("group", [Entry(P2, 0, None)]):
            pytest.fail("it began")
    with rival.transaction("group", entries(P0, [1])) as tx:
        assert list(tx.fresh) == []


def test_what_a_user_has_set_for_his_connections_counts_in_his_handler(postgres: Place) -> None:
    """D04: a stricter limit stays, and how long his own statements wait is his to say; also in a transaction of his own."""
    own = "-c idle_in_transaction_session_timeout=7s -c lock_timeout=3s"
    searched = conninfo_to_dict(postgres.where)["options"]
    theirs = make_conninfo(postgres.where, options=f"{searched} {own}")

    def settings_in(connection: Any) -> list[str]:
        names = ("lock_timeout", "idle_in_transaction_session_timeout")
        return [connection.execute(f"SHOW {name}").fetchone()[0] for name in names]

    with closing(PostgresInbox(theirs)) as inbox:
        for offset in (0, 1):  # at first there is no row
            with inbox.transaction("group", entries(P0, [offset])) as tx:
                assert settings_in(tx.connection) == ["3s", "7s"]
        with psycopg.connect(postgres.where) as mine:
            inbox.enlist(mine, "group", entries(P0, [2]))
            assert settings_in(mine) == ["0", "0"]
            mine.rollback()


# Plans with which rows come as they lie in the table.
AS_THEY_LIE = "-c enable_nestloop=off -c enable_mergejoin=off -c enable_indexscan=off -c enable_bitmapscan=off"


WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_blocking_pids(pid) @> ARRAY[pg_backend_pid()]"


@pytest.mark.parametrize("what", ["offset", "id"])
def test_locks_are_taken_in_one_order_however_the_rows_lie(postgres: Place, what: str) -> None:
    """D13: the planner may change its mind while two are at work; they would wait for each other, and one would fail."""
    first, last = sorted([key_of("a"), key_of("b")])
    for entry in (Entry(P1, 0, last), Entry(P0, 0, first)):  # the last lies before the first
        with expired(postgres).transaction("group", [entry]):
            pass
    wanted = [Entry(P0, 1, None), Entry(P1, 1, None)] if what == "offset" else [Entry(P2, 0, first), Entry(P2, 1, last)]
    column, places = ("partition::text", ("0", "1")) if what == "offset" else ("encode(key, 'hex')", (first.hex(), last.hex()))
    lock = f"SELECT FROM kg_inbox_{what} WHERE {column} = %s FOR UPDATE"
    searched = conninfo_to_dict(postgres.where)["options"]

    def begin() -> None:
        with inbox.transaction("group", wanted):
            pass

    with (
        closing(PostgresInbox(make_conninfo(postgres.where, options=f"{searched} {AS_THEY_LIE}"))) as inbox,
        ThreadPoolExecutor(1) as threads,
        psycopg.connect(postgres.where) as rival,
    ):
        rival.execute(lock.encode(), places[:1])
        begun = threads.submit(begin)
        until(lambda: begun.done() or rival.execute(WAITING).fetchone() == (1,))
        rival.execute(f"{lock} NOWAIT".encode(), places[1:])  # it has not locked this one yet
        rival.rollback()
        begun.result(DEADLINE)


def test_a_connection_that_is_lost_in_commit_leaves_it_open(postgres: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """D13: whether it was written is unknown to the caller, and known to the next transaction; before COMMIT nothing was."""
    inbox = postgres.inbox()
    send = PostgresInboxTransaction._send

    def lose(self: PostgresInboxTransaction) -> None:
        postgres.sql(f"SELECT pg_terminate_backend({self.connection.info.backend_pid}, 10000)")

    def send_and_lose(self: PostgresInboxTransaction) -> None:
        send(self)
        lose(self)

    def lose_and_send(self: PostgresInboxTransaction) -> None:
        lose(self)
        send(self)

    for sending, told in ((send_and_lose, "unknown"), (lose_and_send, "unknown|Nothing was written")):
        with monkeypatch.context() as patch:
            patch.setattr(PostgresInboxTransaction, "_send", sending)
            with pytest.raises(StoreUnavailable, match=told), inbox.transaction("group", entries(P0, [0])) as tx:
                act(tx.connection, "lost")
                tx.finish()
    with inbox.transaction("group", entries(P0, [0])) as tx:
        assert list(tx.fresh) == [0]
    assert postgres.effects() == []


@pytest.mark.parametrize("late", [0, 0.1], ids=["at once", "after the answer to the move"])
def test_no_commit_comes_after_a_move_that_failed(postgres: Place, monkeypatch: pytest.MonkeyPatch, late: float) -> None:
    """COMMIT is sent with the move, and is not executed where that fails; the connection of the user is as he had it."""
    send = PostgresInboxTransaction._send

    def send_and_wait(self: PostgresInboxTransaction) -> None:
        send(self)
        time.sleep(late)

    monkeypatch.setattr(PostgresInboxTransaction, "_send", send_and_wait)
    settings = {"autocommit": False, "prepare_threshold": 0}

    def configure(connection: psycopg.Connection[Any]) -> None:
        connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE

    with ConnectionPool(postgres.where, kwargs=settings, min_size=1, max_size=1, configure=configure, open=True) as pool:
        inbox = PostgresInbox(pool)
        for failing, error in (
            (["UPDATE kg_inbox_offset SET next_offset = 7"], PartitionFenced),
            (["ALTER TABLE kg_inbox_offset RENAME TO gone"], psycopg.errors.UndefinedTable),
            (["ROLLBACK", "BEGIN"], KafkaGuaranteesError),
        ):
            with pytest.raises(error) as caught, inbox.transaction("group", entries(P0, [0, 1])) as tx:
                for statement in failing:
                    tx.connection.execute(statement)
                act(tx.connection, "undone")
                tx.finish(1)  # the id of the other one is forgotten
            assert type(caught.value) is error
            assert "aborted" not in str(caught.value)  # what was not executed for it is not what failed
            with pool.connection() as connection:
                assert not connection.autocommit
                assert connection.isolation_level == psycopg.IsolationLevel.SERIALIZABLE
            assert inbox.start_offsets("group", [P0]) == {P0: None}
        assert postgres.effects() == []
        with inbox.transaction("group", entries(P0, [0, 1])) as tx:
            assert list(tx.fresh) == [0, 1]
        assert inbox.start_offsets("group", [P0]) == {P0: 2}


def test_a_constraint_that_is_checked_at_the_commit_is_the_handler_s(postgres: Place) -> None:
    """Its violation is raised as it is, and nothing was written."""
    postgres.sql("ALTER TABLE effect ADD UNIQUE (what) DEFERRABLE INITIALLY DEFERRED")
    inbox = postgres.inbox()
    with pytest.raises(psycopg.errors.UniqueViolation), inbox.transaction("group", entries(P0, [0])) as tx:
        act(tx.connection, "twice")
        act(tx.connection, "twice")
    assert postgres.effects() == []
    with inbox.transaction("group", entries(P0, [0])) as tx:
        assert list(tx.fresh) == [0]


@pytest.mark.parametrize("marker", [postgres_inbox._MOVED, postgres_inbox._ENDED])
def test_what_a_message_says_is_not_what_the_move_says(postgres: Place, marker: str) -> None:
    """The details of an error quote values of the user."""
    postgres.sql("ALTER TABLE effect ADD UNIQUE (what) DEFERRABLE INITIALLY DEFERRED")
    inbox = postgres.inbox()
    with pytest.raises(psycopg.errors.UniqueViolation), inbox.transaction("group", entries(P0, [0])) as tx:
        act(tx.connection, marker)
        act(tx.connection, marker)
    assert postgres.effects() == []


def test_an_interrupt_before_the_commit_leaves_the_connection_as_it_was(
    postgres: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was written, and the connection of the user goes back to his pool as he had it."""

    def interrupted(self: psycopg.Transaction) -> Iterator[None]:
        self._pop_savepoint("commit")
        raise KeyboardInterrupt
        yield

    with ConnectionPool(postgres.where, kwargs={"autocommit": False}, min_size=1, max_size=1, open=True) as pool:
        inbox = PostgresInbox(pool)
        with pytest.raises(KeyboardInterrupt), inbox.transaction("group", entries(P0, [0])) as tx:
            act(tx.connection, "undone")
            monkeypatch.setattr(psycopg.Transaction, "_commit_gen", interrupted)
        monkeypatch.undo()
        with pool.connection() as connection:
            assert not connection.autocommit
            assert connection.isolation_level is None
        assert inbox.start_offsets("group", [P0]) == {P0: None}
    assert postgres.effects() == []


def test_a_connection_that_is_lost_in_the_handler_is_not_the_fault_of_the_message(postgres: Place) -> None:
    """D16: StoreUnavailable is raised from the error of psycopg, so that nobody takes the message for a poisoned one."""
    inbox = postgres.inbox()
    with pytest.raises(StoreUnavailable) as caught, inbox.transaction("group", entries(P0, [0])) as tx:
        postgres.sql(f"SELECT pg_terminate_backend({tx.connection.info.backend_pid}, 10000)")
        act(tx.connection, "lost")
    assert isinstance(caught.value.__cause__, psycopg.Error)
    with pytest.raises(psycopg.errors.UndefinedTable), inbox.transaction("group", entries(P0, [0])) as tx:
        tx.connection.execute("SELECT * FROM nowhere")


def test_an_error_that_the_handler_swallowed_is_not_committed(postgres: Place) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK then, without an error: it is told here, before and after finish()."""
    inbox = postgres.inbox()
    for finish_first in (False, True):
        with pytest.raises(KafkaGuaranteesError, match="went on"), inbox.transaction("group", entries(P0, [0])) as tx:
            if finish_first:
                tx.finish()
            with suppress(psycopg.Error):
                tx.connection.execute("SELECT * FROM nowhere")
    assert inbox.start_offsets("group", [P0]) == {P0: None}


SCHEMAS = ["plain", "Tenant-1.a b", "a@b", "100%", "{p}", "it's", "ä"]


@pytest.mark.parametrize("how", ["SET", "SET LOCAL"])
@pytest.mark.parametrize("both", [False, True], ids=["", "an inbox in both"])
@pytest.mark.parametrize("schema", ["plain", "Tenant-1.a b"])
def test_the_search_path_is_the_handler_s(postgres: Place, schema: str, how: str, *, both: bool) -> None:
    """The inbox stays in its own schema: also with a connection that comes back with another search_path."""
    own, theirs = (f'"{name}_{uuid.uuid4().hex[:6]}"' for name in (schema, "tenant"))
    for name in (own, theirs):
        postgres.sql(f"CREATE SCHEMA {name}")
    postgres.sql(f"CREATE TABLE {theirs}.mine (what text)")

    def inbox_in(name: str) -> PostgresInbox:
        escaped = name.replace(" ", "\\ ")
        return PostgresInbox(make_conninfo(postgres.where, options=f"-csearch_path={escaped}"))

    if both:
        with inbox_in(theirs) as other:
            other.start_offsets("group", [P0])
    inbox = inbox_in(own)
    postgres._open.append(inbox)
    for offset in range(3):
        with inbox.transaction("group", [Entry(P0, offset, key_of(f"{offset}")), Entry(P1, offset, key_of("shared"))]) as tx:
            assert list(tx.fresh) == [0, 1]  # what is forgotten is new
            tx.connection.execute(f"{how} search_path TO {theirs}".encode())
            act_in = f"INSERT INTO mine VALUES ('{offset}')"
            tx.connection.execute(act_in.encode())
            tx.finish(1)
    assert inbox.start_offsets("group", [P0]) == {P0: 3}
    assert inbox.purge() == 0
    assert postgres.sql(f"SELECT count(*) FROM {theirs}.mine") == [(3,)]
    assert postgres.sql(f"SELECT count(*) FROM {own}.kg_inbox_id") == [(3,)]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_schema_may_have_any_name(postgres: Place, schema: str) -> None:
    """Whatever means something elsewhere in a statement."""
    name = f'"{schema}{uuid.uuid4().hex[:6]}"'
    postgres.sql(f"CREATE SCHEMA {name}")

    def configure(connection: psycopg.Connection[Any]) -> None:
        connection.execute(f"SET search_path TO {name}".encode())
        connection.commit()

    with ConnectionPool(postgres.where, min_size=1, max_size=1, configure=configure, open=True) as pool:
        inbox = PostgresInbox(pool)
        for offset in range(2):
            with inbox.transaction("group", [*entries(P0, [offset]), *entries(P1, [offset], "shared")]) as tx:
                assert list(tx.fresh) == ([0, 1] if offset == 0 else [0])
        assert inbox.start_offsets("group", [P0]) == {P0: 2}
        assert inbox.purge() == 0
    assert postgres.sql(f"SELECT count(*) FROM {name}.kg_inbox_id") == [(3,)]


@pytest.mark.parametrize("constraint", ["CHECK (n > 0)", "REFERENCES job"])
def test_a_constraint_of_the_users_may_have_a_name_like_the_inboxes(postgres: Place, constraint: str) -> None:
    """A message that breaks it is to blame, and nobody has ended the transaction."""
    inbox = postgres.inbox()
    postgres.sql("CREATE TABLE job (n int PRIMARY KEY)")
    postgres.sql(f"CREATE TABLE task (n int CONSTRAINT task_not_finished {constraint})")
    with pytest.raises(psycopg.errors.IntegrityError), inbox.transaction("group", entries(P0, [0])) as tx:
        tx.connection.execute("INSERT INTO task VALUES (0)")


@pytest.mark.parametrize("handled", [0, 1])
def test_a_handler_that_takes_another_role_is_told(postgres: Place, handled: int) -> None:
    """Its rights count for the move of the offsets, too: that is not held against the messages. Set back, all is well."""
    weak = f"u{uuid.uuid4().hex[:12]}"
    postgres.sql(f"CREATE ROLE {weak}")
    [(schema,)] = postgres.sql("SELECT current_schema()")
    postgres.sql(f"GRANT USAGE ON SCHEMA {schema} TO {weak}")
    postgres.sql(f"GRANT INSERT ON effect TO {weak}")
    inbox = postgres.inbox()
    for reset in (False, True):
        with suppress(AuthorizationError), inbox.transaction("group", entries(P0, [0])) as tx:
            tx.connection.execute(f"SET LOCAL ROLE {weak}".encode())
            act(tx.connection, f"reset {reset}")
            if reset:
                tx.connection.execute("RESET ROLE")
            tx.finish(handled)
    assert postgres.effects() == ["reset True"]
    told = pytest.raises(AuthorizationError, match=r"moving the offsets .*permission denied for table .*RESET ROLE")
    with told, inbox.transaction("group", entries(P1, [0])) as tx:
        tx.connection.execute(f"SET LOCAL ROLE {weak}".encode())
        tx.finish(handled)


def within(seconds: float, work: Callable[[], object]) -> None:
    """Do something that may hang, in a thread that nobody has to wait for."""
    raised: list[BaseException] = []

    def do() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            raised.append(error)

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()
    if raised:
        raise raised[0]


@pytest.mark.parametrize("error", [KeyError("bad row"), psycopg.DataError("of elsewhere"), KeyboardInterrupt()])
def test_a_handler_that_fails_in_the_middle_of_a_stream_fails_and_does_not_hang(postgres: Place, error: BaseException) -> None:
    """Its error comes out, whose traceback holds the rows, and with them the lock of the connection."""
    inbox = postgres.inbox()
    act_once = [error]

    def transact() -> None:
        with inbox.transaction("group", entries(P0, [0])) as tx:
            act(tx.connection, "of the stream")
            rows = tx.connection.cursor().stream("SELECT generate_series(1, 1000)")
            for _ in rows:
                if act_once:
                    raise act_once.pop()

    with pytest.raises(type(error)) as caught:
        within(20, transact)
    assert caught.value is error
    assert postgres.effects() == []
    within(20, transact)
    assert postgres.effects() == ["of the stream"]


@pytest.mark.parametrize("moves", [True, False])
def test_what_a_handler_reads_with_a_stream_does_not_hinder_the_commit(postgres: Place, *, moves: bool) -> None:
    """Read to its end, or closed. libpq stays in its mode for the next pipeline: that was taken for a database that is away."""
    inbox: Any = postgres.inbox()
    stream = "SELECT generate_series(1, 3)"
    for offset in range(2):
        with inbox.transaction("group", entries(P0, [offset])) as tx:
            assert len(list(tx.connection.cursor().stream(stream))) == 3
            tx.finish(1 if moves else 0)
        with inbox.transaction("group", entries(P1, [offset])) as tx, closing(tx.connection.cursor().stream(stream)) as rows:
            assert next(rows) == (1,)
    with psycopg.connect(postgres.where) as mine:
        assert len(list(mine.cursor().stream(stream))) == 3
        tx = inbox.enlist(mine, "group", entries(P2, [0]))
        assert len(list(mine.cursor().stream(stream))) == 3
        tx.finish()
    assert inbox.start_offsets("group", [P0, P1, P2]) == {P0: 2 if moves else 1, P1: 2, P2: 1}


@pytest.mark.parametrize("finish_first", [True, False])
@pytest.mark.parametrize("what", ["stream", "copy"])
def test_a_statement_that_a_handler_leaves_unfinished_is_told(postgres: Place, what: str, *, finish_first: bool) -> None:
    """Nobody can commit behind it; and waiting for it would be for ever, or be taken for a database that is away."""
    inbox, kept = postgres.inbox(), []

    def transact() -> None:
        with inbox.transaction("group", entries(P0, [0])) as tx:
            act(tx.connection, "undone")
            if finish_first:
                tx.finish()
            if what == "stream":
                kept.append(tx.connection.cursor().stream("SELECT generate_series(1, 1000)"))
                assert next(kept[0]) == (1,)
            else:
                kept.append(tx.connection.cursor().copy("COPY effect FROM STDIN"))
                kept[0].__enter__().write("row\n")

    with pytest.raises(KafkaGuaranteesError, match="left a statement unfinished") as caught:
        within(20, transact)
    assert type(caught.value) is KafkaGuaranteesError
    assert postgres.effects() == []
    with inbox.transaction("group", entries(P0, [0])) as tx:
        assert list(tx.fresh) == [0]


def test_a_thread_of_the_handler_s_may_come_to_its_end(postgres: Place) -> None:
    """It holds the same lock, for a moment."""
    inbox = postgres.inbox()
    with ThreadPoolExecutor(1) as thread, inbox.transaction("group", entries(P0, [0])) as tx:
        beside = thread.submit(tx.connection.execute, "INSERT INTO effect SELECT 'beside' FROM pg_sleep(0.3)")
        until(lambda: tx.connection.info.transaction_status == TransactionStatus.ACTIVE)
    assert beside.result() is not None
    assert postgres.effects() == ["beside"]


def test_enlisted_a_stream_that_is_half_read_is_told(postgres: Place) -> None:
    """By finish(); and the caller's ROLLBACK does not hang."""
    inbox: Any = postgres.inbox()
    mine = psycopg.connect(postgres.where)
    tx = inbox.enlist(mine, "group", entries(P0, [0]))
    rows = mine.cursor().stream("SELECT generate_series(1, 1000)")
    assert next(rows) == (1,)
    with pytest.raises(KafkaGuaranteesError, match="left a statement unfinished"):
        within(20, tx.finish)
    assert mine.closed
    with suppress(psycopg.Error):
        within(20, mine.rollback)


@pytest.mark.parametrize("then", ["", "SELECT 1"])
def test_a_handler_that_closes_the_connection_is_told(place: Place, then: str) -> None:
    """A database that is away is waited for; this one would be closed each time. It is not the fault of the message either."""
    inbox = place.inbox()
    for finish_first in (True, False):
        told = pytest.raises(KafkaGuaranteesError, match=r"the handler closed the connection\. .*come again")
        with told as caught, inbox.transaction("group", entries(P0, [0])) as tx:
            act(tx.connection, "undone")
            if finish_first:
                tx.finish()
            tx.connection.close()
            if then:
                tx.connection.execute(then)
        assert type(caught.value) is KafkaGuaranteesError
    assert place.effects() == []
    with inbox.transaction("group", entries(P0, [0])) as tx:
        assert list(tx.fresh) == [0]


ENDINGS: dict[str, Callable[[Any], object]] = {
    "COMMIT": lambda connection: connection.execute("COMMIT"),
    "COMMIT; BEGIN": lambda connection: connection.execute("COMMIT; BEGIN"),
    "COMMIT AND CHAIN": lambda connection: connection.execute("COMMIT AND CHAIN"),
    "PREPARE TRANSACTION": lambda connection: connection.execute("PREPARE TRANSACTION 'mine'"),
    "after a savepoint": lambda connection: connection.execute("SAVEPOINT mine; ROLLBACK TO mine; COMMIT"),
    "SET CONSTRAINTS": lambda connection: connection.execute("SET CONSTRAINTS ALL IMMEDIATE"),
    "commit()": lambda connection: connection.commit(),
    "rollback()": lambda connection: connection.rollback(),
    "with": lambda connection: connection.__exit__(None, None, None),
}


@pytest.mark.parametrize("swallows", [False, True], ids=["", "and another error"])
@pytest.mark.parametrize("how", ENDINGS)
@pytest.mark.parametrize("ids", [True, False], ids=["ids", "offsets"])
def test_no_commit_of_a_handler_goes_through(postgres: Place, how: str, *, ids: bool, swallows: bool) -> None:
    """With the ids of the whole batch, and without its offsets, the rest of the batch would be left out for good."""
    inbox = postgres.inbox()
    batch = entries(P0, [0, 1, 2]) if ids else [Entry(P0, offset, None) for offset in range(3)]
    told = pytest.raises(KafkaGuaranteesError, match=r"the handler ended the transaction\. .*were not written.*come again")
    with told, inbox.transaction("group", batch) as tx:
        act(tx.connection, "early")
        try:
            ENDINGS[how](tx.connection)
        except psycopg.Error:
            if not swallows:
                raise
            raise KeyError("of the handler") from None
    assert postgres.effects() == []
    with inbox.transaction("group", batch) as tx:
        assert list(tx.fresh) == [0, 1, 2]
        act(tx.connection, "right")
    assert postgres.effects() == ["right"]
    assert inbox.start_offsets("group", [P0]) == {P0: 3}


def test_a_commit_that_was_swallowed_is_told_at_the_end(postgres: Place) -> None:
    """What is written after it is committed by itself, and the messages come again."""
    inbox = postgres.inbox()
    told = pytest.raises(KafkaGuaranteesError, match=r"after that end, .* stays")
    with told, inbox.transaction("group", entries(P0, [0, 1])) as tx:
        act(tx.connection, "early")
        with suppress(psycopg.Error):
            tx.connection.execute("COMMIT")
        act(tx.connection, "late")
    assert postgres.effects() == ["late"]
    with inbox.transaction("group", entries(P0, [0, 1])) as tx:
        assert list(tx.fresh) == [0, 1]


def test_savepoints_are_the_handler_s(postgres: Place) -> None:
    """Released, rolled back, nested, left open, and with its own deferred constraints checked early."""
    postgres.sql("ALTER TABLE effect ADD CONSTRAINT one UNIQUE (what) DEFERRABLE INITIALLY DEFERRED")
    inbox = postgres.inbox()
    with inbox.transaction("group", [*entries(P0, [0, 1]), *entries(P1, [0])]) as tx:
        with tx.connection.transaction():
            act(tx.connection, "released")
        with suppress(KeyError), tx.connection.transaction():
            act(tx.connection, "undone")
            raise KeyError
        tx.connection.execute("SET CONSTRAINTS one IMMEDIATE")
        tx.connection.execute("SAVEPOINT mine")
        act(tx.connection, "left open")
    assert postgres.effects() == ["left open", "released"]
    assert inbox.start_offsets("group", [P0, P1]) == {P0: 2, P1: 1}


@pytest.mark.parametrize("handled", [0, 1, 2, 3])
def test_a_transaction_that_moves_nothing_can_be_committed(postgres: Place, handled: int) -> None:
    """Of several partitions, whichever stays where it is; and one whose messages are all behind."""
    inbox = postgres.inbox()
    for _ in range(2):
        with inbox.transaction("group", [*entries(P1, [0, 1]), *entries(P0, [0])]) as tx:
            tx.finish(min(handled, len(tx.fresh)))
    with inbox.transaction("group", entries(P0, [0, 1])) as tx:
        act(tx.connection, "committed")
        tx.finish(0)
    assert postgres.effects() == ["committed"]
    assert postgres.sql("SELECT count(*) FROM kg_inbox_offset WHERE unfinished IS NOT NULL") == [(0,)]


def test_a_caller_that_commits_before_finish_keeps_nothing_of_the_inbox(place: Place) -> None:
    """With ids and without offsets, what it has not handled would be left out. PostgreSQL refuses the commit as well."""
    inbox: Any = place.inbox()
    with closing(place.connect()) as mine:
        mine.execute("BEGIN IMMEDIATE" if place.kind == "sqlite" else "BEGIN")
        tx = inbox.enlist(mine, "group", entries(P0, [0, 1, 2]))
        act(mine, "early")
        with suppress(psycopg.errors.ForeignKeyViolation):
            mine.execute("COMMIT")
        with pytest.raises(KafkaGuaranteesError, match="ended the transaction"):
            tx.finish()
        assert place.effects() == (["early"] if place.kind == "sqlite" else [])
        for fresh in ([0, 1, 2], []):
            mine.execute("BEGIN IMMEDIATE" if place.kind == "sqlite" else "BEGIN")
            tx = inbox.enlist(mine, "group", entries(P0, [0, 1, 2]))
            assert list(tx.fresh) == fresh
            tx.finish()
            mine.execute("COMMIT")
    assert inbox.purge() == (1 if place.kind == "sqlite" else 0)  # what stood for the transaction
    assert place.ids() == 3


def test_a_caller_that_begins_anew_before_finish_is_told(lite: Place) -> None:
    """D20: the same ids may have been handled in between, and not as this transaction found them."""
    inbox: Any = lite.inbox()
    with closing(lite.connect()) as mine:
        mine.execute("BEGIN IMMEDIATE")
        tx = inbox.enlist(mine, "group", entries(P0, [0, 1]))
        mine.execute("COMMIT")
        with inbox.transaction("group", [*entries(P0, [0]), *entries(P1, [0], "0/1")]):
            pass
        mine.execute("BEGIN IMMEDIATE")
        with pytest.raises(KafkaGuaranteesError, match="before finish") as caught:
            tx.finish()
        assert type(caught.value) is KafkaGuaranteesError
        mine.execute("COMMIT")
    assert inbox.start_offsets("group", [P0, P1]) == {P0: 1, P1: 1}


@pytest.mark.parametrize("inbox_there", [True, False])
def test_a_connection_to_another_file_is_refused(lite: Place, tmp_path: Path, *, inbox_there: bool) -> None:
    """A file without the tables would be tried for ever; one with an inbox has other offsets, at which no run goes on."""
    inbox, other = lite.inbox(), str(tmp_path / "other.db")
    assert isinstance(inbox, SqliteInbox)
    if inbox_there:
        SqliteInbox(other).close()
    for where in (other, ":memory:"):
        with closing(sqlite3.connect(where, isolation_level=None)) as mine:
            mine.execute("BEGIN IMMEDIATE")
            with pytest.raises(KafkaGuaranteesError, match=r"the connection to .*Nothing was done") as caught:
                inbox.enlist(mine, "group", entries(P0, [0]))
            assert type(caught.value) is KafkaGuaranteesError
    (tmp_path / "link.db").symlink_to(lite.where)
    with closing(sqlite3.connect(tmp_path / "link.db", isolation_level=None)) as mine:
        mine.row_factory = lambda cursor, row: {column[0]: value for column, value in zip(cursor.description, row, strict=True)}
        mine.execute("BEGIN IMMEDIATE")
        inbox.enlist(mine, "group", entries(P0, [0])).finish()
        mine.execute("COMMIT")


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("how", ["rollback", "savepoint"])
def test_a_caller_that_rolls_back_and_goes_on_is_told(lite: Place, how: str, *, ids: bool) -> None:
    """D20: sqlite3 begins another transaction by itself; the offsets would pass what is gone with the first one."""
    inbox: Any = lite.inbox()
    lite.sql("CREATE UNIQUE INDEX once ON effect (what)")
    with closing(sqlite3.connect(lite.where)) as mine:
        act(mine, "before")
        mine.execute("SAVEPOINT older")
        tx = inbox.enlist(mine, "group", entries(P0, [0, 1, 2]) if ids else [Entry(P0, offset, None) for offset in range(3)])
        for what in ("a", "a", "c"):
            try:
                act(mine, what)
            except sqlite3.IntegrityError:
                mine.execute("ROLLBACK TO older") if how == "savepoint" else mine.rollback()
        with pytest.raises(KafkaGuaranteesError, match=r"before finish\(\).*come again"):
            tx.finish()
        mine.rollback()
    assert lite.effects() == []
    assert inbox.start_offsets("group", [P0]) == {P0: None}


def test_savepoints_of_a_caller_are_his(lite: Place) -> None:
    """One that is older is released, one that is newer is rolled back: what is left is committed with the offsets."""
    inbox: Any = lite.inbox()
    with closing(lite.connect()) as mine:
        mine.execute("BEGIN IMMEDIATE")
        mine.execute("SAVEPOINT older")
        tx = inbox.enlist(mine, "group", entries(P0, [0, 1]))
        mine.execute("SAVEPOINT newer")
        act(mine, "undone")
        mine.execute("ROLLBACK TO newer")
        act(mine, "kept")
        mine.execute("RELEASE older")
        tx.finish()
        mine.execute("COMMIT")
    assert lite.effects() == ["kept"]
    assert lite.ids() == 2


def test_enlisting_a_part_in_a_transaction_of_sqlite(lite: Place) -> None:
    """What is not handled is forgotten, as in a transaction of the inbox; what is known is left out; a new scope is made."""
    inbox: Any = lite.inbox()
    with inbox.transaction("group", entries(P1, [0], "b")):
        pass
    with closing(lite.connect()) as mine:
        mine.execute("BEGIN IMMEDIATE")
        for scope, fresh in (("group", [0, 2, 3]), ("other", [0, 1, 2, 3])):
            tx = inbox.enlist(mine, scope, entries(P0, [0, 1, 2, 3], *"abcd"))
            assert list(tx.fresh) == fresh
            tx.finish(1)
        mine.execute("COMMIT")
    assert lite.ids() == 3
    assert [inbox.start_offsets(scope, [P0])[P0] for scope in ("group", "other")] == [2, 1]


def test_a_database_without_an_encoding_will_do(postgres: Place) -> None:
    """SQL_ASCII, which initdb chooses for the locale C: there texts come as bytes."""
    where = make_conninfo(postgres.where, client_encoding="SQL_ASCII")
    with PostgresInbox(where) as inbox, psycopg.connect(where) as mine:
        for offset in range(3):
            with inbox.transaction("größe", entries(P0, [offset, offset + 1])) as tx:
                assert list(tx.fresh) == ([0, 1] if offset == 0 else [1])
        inbox.enlist(mine, "größe", entries(P0, [4])).finish()
        mine.commit()
        assert inbox.start_offsets("größe", [P0]) == {P0: 5}


@pytest.mark.parametrize("prepared", [{}, {"prepare_threshold": 0}, {"prepare_threshold": None}])
def test_a_pool_of_the_user_stays_his(postgres: Place, prepared: dict[str, Any]) -> None:
    """Whatever his connections are set to, the inbox works, and ``close()`` leaves the pool open."""
    settings = {"row_factory": dict_row, "cursor_factory": psycopg.ClientCursor, "autocommit": True, **prepared}

    def configure(connection: psycopg.Connection[Any]) -> None:
        connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE

    with ConnectionPool(postgres.where, kwargs=settings, min_size=1, max_size=1, configure=configure, open=True) as pool:
        inbox = PostgresInbox(pool)
        for offsets in ([0, 1], [1, 2]):
            with inbox.transaction("group", entries(P0, offsets)) as tx:
                act(tx.connection, len(tx.fresh))
                level = tx.connection.execute("SHOW transaction_isolation").fetchone()
                assert level == {"transaction_isolation": "read committed"}
        inbox.close()
        with pool.connection() as connection:
            assert connection.execute("SELECT 1 AS one").fetchone() == {"one": 1}
            assert connection.isolation_level == psycopg.IsolationLevel.SERIALIZABLE
    assert postgres.effects() == ["1", "2"]


def test_enlisting_in_a_transaction_of_psycopg(postgres: Place) -> None:
    """The caller's commit keeps effects and offsets, his rollback undoes both."""
    inbox = postgres.inbox()
    assert isinstance(inbox, PostgresInbox)
    with psycopg.connect(postgres.where) as mine:
        for end in (mine.rollback, mine.commit):
            tx = inbox.enlist(mine, "group", entries(P0, [0, 1]))
            assert list(tx.fresh) == [0, 1]
            act(mine, end.__name__)
            tx.finish()
            end()
        assert list(inbox.enlist(mine, "group", entries(P0, [1, 2])).fresh) == [1]
        mine.rollback()
    assert postgres.effects() == ["commit"]
    assert inbox.start_offsets("group", [P0]) == {P0: 2}


def test_enlisting_twice_in_a_transaction_is_refused(postgres: Place) -> None:
    """D13: the first finish() lets it commit, and ids of the second would stay without its offsets."""
    inbox = postgres.inbox()
    assert isinstance(inbox, PostgresInbox)
    with psycopg.connect(postgres.where) as connection:
        for _ in range(2):  # in another transaction it is the first
            first = inbox.enlist(connection, "group", entries(P0, [0, 1]))
            with pytest.raises(KafkaGuaranteesError, match=r"already.*Nothing was done"):
                inbox.enlist(connection, "group", entries(P0, [2]))
            first.finish()
            connection.rollback()
    assert inbox.start_offsets("group", [P0]) == {P0: None}


def test_enlisting_again_after_an_error_needs_another_transaction(postgres: Place) -> None:
    """D13: the ids of the first are there, and the messages would be left out as repeats that nobody has handled."""
    inbox = postgres.inbox()
    assert isinstance(inbox, PostgresInbox)
    good, bad = printed(P0, 1, "good", b"good"), printed(P0, 2, "id", b"another")
    with inbox.transaction("group", [printed(P0, 0, "id", b"one")]):
        pass
    with psycopg.connect(postgres.where) as connection:
        with pytest.raises(MessageIdReused):
            inbox.enlist(connection, "group", [good, bad])
        with pytest.raises(KafkaGuaranteesError, match=r"already.*Nothing was done\. If the first has raised, roll back"):
            inbox.enlist(connection, "group", [good])
        connection.rollback()
        assert list(inbox.enlist(connection, "group", [good]).fresh) == [0]
        connection.rollback()


def test_enlisting_in_a_pipeline(postgres: Place) -> None:
    """``finish()`` tells what became of the offsets, also where the caller sends his statements without waiting."""
    inbox = postgres.inbox()
    assert isinstance(inbox, PostgresInbox)
    with psycopg.connect(postgres.where, autocommit=True) as mine, mine.pipeline():
        with mine.transaction():
            tx = inbox.enlist(mine, "group", entries(P0, [0, 1]))
            act(mine, "kept")
            tx.finish(1)
        with pytest.raises(PartitionFenced, match=r"orders\[0\]"), mine.transaction():
            tx = inbox.enlist(mine, "group", entries(P0, [1, 2]))
            act(mine, "undone")
            mine.execute("UPDATE kg_inbox_offset SET next_offset = 7")
            tx.finish(1)
    assert postgres.effects() == ["kept"]
    assert inbox.start_offsets("group", [P0]) == {P0: 1}


def test_enlisting_needs_a_transaction_that_sees_what_it_waited_for(postgres: Place) -> None:
    """D13: REPEATABLE READ fails after every wait, so it is refused at once; so is a connection without a transaction."""
    inbox = postgres.inbox()
    assert isinstance(inbox, PostgresInbox)
    with psycopg.connect(postgres.where, autocommit=True) as mine:
        with pytest.raises(KafkaGuaranteesError, match="no transaction"):
            inbox.enlist(mine, "group", entries(P0, [0]))
        mine.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        with pytest.raises(KafkaGuaranteesError, match="repeatable read"):
            inbox.enlist(mine, "group", entries(P0, [0]))
        mine.execute("ROLLBACK")


def test_a_savepoint_that_is_rolled_back_takes_the_inbox_along(postgres: Place) -> None:
    """A caller that undoes the enlisting, and finishes nevertheless while another owner went on, is fenced."""
    inbox = postgres.inbox()
    assert isinstance(inbox, PostgresInbox)
    with inbox.transaction("group", entries(P0, [0])):
        pass
    with psycopg.connect(postgres.where) as mine:
        mine.execute("SELECT 1; SAVEPOINT before")
        tx = inbox.enlist(mine, "group", entries(P0, [1]))
        mine.execute("ROLLBACK TO before")
        with inbox.transaction("group", entries(P0, [1])):
            pass
        with pytest.raises(PartitionFenced, match=r"orders\[0\]"):
            tx.finish()
        mine.rollback()


def test_offsets_that_have_gone_back_are_noticed_by_who_enlists(postgres: Place) -> None:
    """D20: as in transactions of the inbox. What its caller rolls back has gone nowhere, and he repeats it."""
    inbox = postgres.inbox()
    assert isinstance(inbox, PostgresInbox)

    def handle(*offsets: int, committed: bool = True) -> None:
        with psycopg.connect(postgres.where) as mine:
            inbox.enlist(mine, "group", [Entry(P0, offset, None) for offset in offsets]).finish()
            if not committed:
                mine.rollback()

    for offset in range(3):
        handle(offset, committed=False)
        handle(offset)
    postgres.sql("UPDATE kg_inbox_offset SET next_offset = 1")
    with pytest.raises(PartitionFenced, match="has gone back"):
        handle(3)
    assert inbox.start_offsets("group", [P0]) == {P0: 1}
    handle(1, 2, 3)


@pytest.mark.parametrize("handled", [0, 2])
def test_a_savepoint_that_takes_the_ids_along_leaves_no_offset_without_them(postgres: Place, handled: int) -> None:
    """D20: repeats of these messages would be handled again. Nobody else came in between."""
    inbox = postgres.inbox()
    assert isinstance(inbox, PostgresInbox)
    with inbox.transaction("group", entries(P0, [0])):
        pass
    batch = entries(P0, [1, 2])
    with psycopg.connect(postgres.where) as mine:
        mine.execute("SELECT 1; SAVEPOINT before")
        tx = inbox.enlist(mine, "group", batch)
        mine.execute("ROLLBACK TO before")
        with pytest.raises(KafkaGuaranteesError, match=r"rolled back to a savepoint of before enlist.*Roll it back"):
            tx.finish(handled)
        mine.rollback()
        assert list(inbox.enlist(mine, "group", batch).fresh) == [0, 1]
        mine.rollback()
    assert (postgres.ids(), inbox.start_offsets("group", [P0])) == (1, {P0: 1})


def test_enlisting_in_a_session_of_sqlalchemy(postgres: Place) -> None:
    """The connection under a session is one that the inbox can join: one commit keeps, one rollback undoes everything."""
    sqlalchemy = pytest.importorskip("sqlalchemy")
    from sqlalchemy.orm import Session  # noqa: PLC0415 - only where it is installed

    inbox = postgres.inbox()
    assert isinstance(inbox, PostgresInbox)
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(postgres.where))
    try:
        for end in ("rollback", "commit"):
            with Session(engine) as session:
                driver: Any = session.connection().connection.driver_connection
                tx = inbox.enlist(driver, "group", entries(P0, [0, 1]))
                assert list(tx.fresh) == [0, 1]
                session.execute(sqlalchemy.text("INSERT INTO effect VALUES (:what)"), {"what": end})
                tx.finish()
                getattr(session, end)()
    finally:
        engine.dispose()
    assert postgres.effects() == ["commit"]
    assert inbox.start_offsets("group", [P0]) == {P0: 2}


@given(st.text() | st.sampled_from(['a"b', "a b", "1a", "", "a;--", "ä", "a\n", "a" * 51, "a\0"]))
def test_names_of_tables_are_names(prefix: str) -> None:
    """S03: what is not a plain name is refused before it comes near a statement."""
    plain = prefix.isascii() and prefix.isidentifier() and len(prefix) <= 50
    if plain:
        PostgresInbox("", prefix=prefix).close()
    else:
        with pytest.raises(ValueError, match="prefix"):
            PostgresInbox("", prefix=prefix)


def test_names_of_tables_can_be_chosen(postgres: Place) -> None:
    """Two inboxes with different prefixes know nothing of each other, and upper case stays upper case."""
    for prefix in ("select", "Other"):
        with postgres.inbox(prefix=prefix).transaction("group", entries(P0, [0])) as tx:
            assert list(tx.fresh) == [0]
    assert postgres.sql('SELECT count(*) FROM "Other_id"') == [(1,)]


@pytest.mark.parametrize(
    "conninfo",
    [
        "postgresql://db1,db2/app?target_session_attrs=read-write",
        "postgresql://db1:5432,db2:5433/app",
        "host=/run/postgresql dbname=app",
        "host=@abstract dbname=app",
        "postgresql://me:pass%40word@db/app",
        "dbname=app",
        "",
    ],
)
def test_addresses_that_libpq_reads_are_taken(conninfo: str) -> None:
    """Several hosts, sockets, and what the environment says."""
    assert options_of(conninfo).get("dbname", "app") == "app"


def test_no_password_in_messages(postgres: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """S01: neither an unreadable conninfo nor a server that refuses shows the password, in errors, their causes or the log."""
    secret = "s3cr3t"
    monkeypatch.setattr(postgres_inbox, "CONNECT_TIMEOUT", 1)
    caplog.set_level(logging.DEBUG)
    shown: list[BaseException | None] = []
    unreadable = (
        f"password={secret}\ud800",
        f"postgresql://me:{secret}%zz@127.0.0.1/x",
        f"password='{secret}' {secret}",
    )
    # after an @ or a / of a password comes what libpq takes for the host, or the port, which it quotes
    spoilt = (
        f"postgresql://me:pass@{secret}@127.0.0.1/x",
        f"postgresql://me:{secret}/1@127.0.0.1/x",
        f"postgresql://127.0.0.1:1/{secret}@127.0.0.1/x",
    )
    for wrong in (*unreadable, *spoilt):
        for made in (PostgresInbox, PostgresDedupStore):
            with pytest.raises(ValueError, match="neither a postgresql:// URL nor pairs") as caught:
                made(wrong)
            shown.append(caught.value)
            assert caught.value.__context__ is None
    with PostgresInbox(make_conninfo(host="127.0.0.1", port=1, user="me", password=secret, dbname="x")) as inbox:
        with pytest.raises(StoreUnavailable) as unavailable:
            inbox.start_offsets("group", [P0])
        shown.append(unavailable.value)
        shown.append(unavailable.value.__cause__)
        assert secret not in repr(inbox)
    assert secret not in "".join(f"{error!r} {error}" for error in shown)
    assert secret not in caplog.text


def test_a_server_that_is_gone_is_unavailable_until_it_is_back(postgres: Place, postgres_server: Any) -> None:
    """D16: every call raises StoreUnavailable while it is down, and what was committed is left out afterwards."""
    inbox = postgres.inbox()
    with inbox.transaction("group", entries(P0, [0])) as tx:
        act(tx.connection, "before")
    with pytest.raises(StoreUnavailable), inbox.transaction("group", entries(P0, [1])) as tx:
        act(tx.connection, "undone")
        postgres_server.kill()
    postgres_server.restart()

    def answers() -> bool:
        with suppress(StoreUnavailable):
            return inbox.start_offsets("group", [P0]) == {P0: 1}
        return False

    until(answers)
    with inbox.transaction("group", entries(P0, [0, 1])) as tx:
        assert list(tx.fresh) == [1]
    assert postgres.effects() == ["before"]


def test_a_cursor_that_a_handler_left_half_read_holds_up_one_transaction(lite: Place) -> None:
    """D14: it keeps the state of its time, from which nobody can write any more once another process has written."""
    lite.sql("INSERT INTO effect VALUES ('first'), ('second')")
    inbox, kept = lite.inbox(), []
    with inbox.transaction("group", entries(P0, [0])) as tx:
        kept.append(tx.connection.execute("SELECT what FROM effect"))
        assert kept[0].fetchone() == ("first",)
    lite.sql("INSERT INTO effect VALUES ('of somebody else')")
    with pytest.raises(StoreUnavailable), inbox.transaction("group", entries(P0, [1])):
        pytest.fail("it began")
    with inbox.transaction("group", entries(P0, [1])) as tx:
        assert list(tx.fresh) == [0]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="sqlite3 does not say there why a transaction did not begin")
def test_a_lock_that_is_held_leaves_the_handler_s_connection_as_it_was(lite: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions and PRAGMAs are of the connection: without them the next messages would fail, and be set aside."""
    monkeypatch.setattr("kafka_guarantees.dedup.sqlite_inbox.PATIENCE", 0.1)
    inbox = lite.inbox()
    with inbox.transaction("group", entries(P0, [0])) as tx:
        tx.connection.create_function("double", 1, lambda number: 2 * number)
    with closing(lite.connect()) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable), inbox.transaction("group", entries(P0, [1])):
            pytest.fail("it began")
        other.execute("ROLLBACK")
    with inbox.transaction("group", entries(P0, [1])) as tx:
        assert tx.connection.execute("SELECT double(21)").fetchone() == (42,)


@pytest.mark.parametrize("rows", [sqlite3.Row, lambda cursor, row: {column[0]: row[0] for column in cursor.description}])
def test_rows_are_as_the_handler_wants_them_and_as_the_inbox_needs_them(lite: Place, rows: Any) -> None:
    """A handler sets row_factory, for itself."""
    now = [1000.0]
    inbox = lite.inbox(clock=lambda: now[0])
    with inbox.transaction("group", entries(P0, [0])) as tx:
        tx.connection.row_factory = rows
    for _ in range(2):  # that are known are told apart in another way from the second time on
        with inbox.transaction("group", [Entry(P1, 0, key_of("0/0"), bytes(8))]) as tx:
            assert not tx.fresh
            act(tx.connection, "one")
            assert not isinstance(tx.connection.execute("SELECT what FROM effect").fetchone(), tuple)
    assert inbox.start_offsets("group", [P0]) == {P0: 1}
    now[0] += 10 * 86400
    assert inbox.purge(limit=1) == 1


FORKS = """
import os, sqlite3, sys
from kafka_guarantees.dedup import Entry, SqliteInbox, Source

def effect(inbox, partition):
    with inbox.transaction("s", [Entry(Source("t", b"i" * 16, partition), 0, None)]) as transaction:
        transaction.connection.execute("CREATE TABLE IF NOT EXISTS effects (n INTEGER)")
        transaction.connection.execute("INSERT INTO effects VALUES (?)", (partition,))

path = sys.argv[1]
idle = [SqliteInbox(f"{path}.{number}") for number in range(4)]  # of other flows of the service
parents = SqliteInbox(path)
effect(parents, 0)
if os.fork() == 0:  # another one, before
    os._exit(0)
os.wait()
effect(parents, 4)
opened, closed = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    childs = SqliteInbox(path)
    effect(childs, 1)
    os.write(opened[1], b".")
    os.read(closed[0], 1)
    effect(childs, 2)
    os._exit(0)
os.read(opened[0], 1)
effect(parents, 3)
parents.close()
os.write(closed[1], b".")
os.waitpid(child, 0)
print(sorted(n for (n,) in sqlite3.connect(path).execute("SELECT n FROM effects")))
"""


def test_what_a_child_commits_does_not_go_with_its_parent_s_inbox(tmp_path: Path) -> None:
    """D14: a service opens an inbox and forks; a child opens its own, and the parent uses and closes the first meanwhile."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS, str(tmp_path / "effects.db")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[0, 1, 2, 3, 4]"
    assert not done.stderr


FORKS_BESIDE = """
import os, sys, threading, time
from kafka_guarantees.dedup import Entry, SqliteInbox, Source
from kafka_guarantees.dedup.ids import key_of

inbox, source, handled = SqliteInbox(sys.argv[1]), Source("t", b"i" * 16, 0), []
until = time.monotonic() + 3

def run():
    while time.monotonic() < until:
        first = len(handled)
        with inbox.transaction("s", [Entry(source, n, key_of(str(n))) for n in range(first, first + 100)]) as transaction:
            handled.extend(first + index for index in transaction.fresh)
        inbox.start_offsets("s", [source])
        inbox.purge()

thread = threading.Thread(target=run)
thread.start()
while thread.is_alive():
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.01)
print(inbox.start_offsets("s", [source]) == {source: len(handled)}, time.monotonic() > until)
"""


def test_other_threads_may_fork_beside_a_run(tmp_path: Path) -> None:
    """D14: as multiprocessing does. Closed under a statement the connection would take the process along (SIGSEGV)."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS_BESIDE, str(tmp_path / "effects.db")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "True True"), done.stderr


class Forks(list[Entry]):
    """Entries that fork when they are looked at, as a signal handler may in any moment."""

    def __iter__(self) -> Iterator[Entry]:
        assert in_child(lambda: None)() == 0
        return super().__iter__()


def test_a_signal_handler_may_fork_in_the_middle_of_a_call(lite: Place) -> None:
    """D14: the connection is in use there, and is not closed; nor does the fork wait for its own thread."""
    inbox: Any = lite.inbox()
    with inbox.transaction("group", Forks(entries(P0, [0, 1]))) as tx:
        act(tx.connection, 0)
    assert not inbox._to_open
    assert inbox.start_offsets("group", [P0]) == {P0: 2}


def test_an_inbox_that_could_not_be_opened_does_not_keep_others_open_in_a_fork(lite: Place, tmp_path: Path) -> None:
    """D14: it lives on with its exception."""
    inboxes = [lite.inbox() for _ in range(4)]
    with pytest.raises(UnsafeConfigError) as raised:
        SqliteInbox(tmp_path / "nowhere" / "inbox.db")
    assert in_child(lambda: None)() == 0
    assert [inbox._to_open for inbox in inboxes] == [True] * 4  # type: ignore[attr-defined]
    assert raised.value


def test_a_child_that_returns_from_a_handler_commits_nothing(lite: Place) -> None:
    """Y04: the transaction is its parent's, who may still roll it back."""
    inbox = lite.inbox()

    def child(tx: Any) -> None:
        act(tx.connection, "child")
        tx.finish()

    pid = -1
    try:
        with inbox.transaction("group", entries(P0, [0])) as tx:
            pid = os.fork()
            if pid == 0:
                child(tx)
            else:
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
                assert lite.effects() == []
                act(tx.connection, "parent")
    except ForkedClientError:
        if pid == 0:
            os._exit(0)
        raise
    finally:
        if pid == 0:
            os._exit(1)
    assert lite.effects() == ["parent"]


def test_an_inbox_that_is_closed_under_its_handler_writes_nothing(lite: Place) -> None:
    """Y01: as by another thread, where the process ends. Closed under a statement the connection would take it along."""
    inbox = lite.inbox()
    ended = pytest.raises(KafkaGuaranteesError, match="closed while a handler was at work")
    with ended, inbox.transaction("group", entries(P0, [0])) as tx:
        inbox.close()
        act(tx.connection, 0)
    assert lite.effects() == []
    assert lite.inbox().start_offsets("group", [P0]) == {P0: None}
