"""Guards of claims of message ids, and of inboxes, one by one and without a broker.

Each is removed by a mutant that no other test would notice, or only one that takes its time with a broker.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import psycopg
import pytest

from kafka_guarantees import KafkaGuaranteesError
from kafka_guarantees._recognition.claims import Claims, Work
from kafka_guarantees._recognition.message_ids import MessageIds
from kafka_guarantees.dedup import MemoryDedupStore, SqliteInbox
from kafka_guarantees.dedup.contract import Entry, Item, Outcome, Source
from kafka_guarantees.dedup.ids import header, key_of, position_of
from kafka_guarantees.dedup.postgres import _outcome
from kafka_guarantees.dedup.postgres_inbox import PostgresInbox
from kafka_guarantees.errors import AuthorizationError, PartitionFenced, StoreUnavailable

from .test_dedup_claims import Answers, claims, keys, message

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kafka_guarantees.testing.servers import LocalPostgres

OTHER = b"o" * 16


def item(name: str, offset: int) -> Item:
    return Item(key_of(name), position_of(bytes(16), 0, offset))


def test_what_has_no_id_waits_behind_what_is_given_back() -> None:
    """D09, D20: set aside now, its offset would pass that of a message which nobody has handled."""
    batch = [message("busy", 0), message(None, 1), message("c", 2), message("x", 0, partition=1)]
    work, held = claims(Answers({key_of("busy"): Outcome.IN_PROGRESS})).claim(batch)
    assert work.problem is None
    assert not work.messages
    assert list(held) == batch  # also what was not claimed at all, wherever it is: else it would be passed over


def test_what_has_no_id_does_not_wait_behind_another_partition() -> None:
    """It ends the run, or is set aside, as soon as its turn has come."""
    batch = [message("busy", 0), message(None, 7, partition=1)]
    work, held = claims(Answers({key_of("busy"): Outcome.IN_PROGRESS})).claim(batch)
    assert work.problem is not None
    assert work.problem.message is batch[1]
    assert list(held) == batch[:1]


def test_the_id_of_a_message_that_was_set_aside_is_free() -> None:
    """D09: not completed with those behind it, nor left claimed: a replay of it has the same id, and another place."""
    with MemoryDedupStore() as store:
        tested = claims(store)
        work, _ = tested.claim([message("a", 0), message("b", 1)])
        assert not tested.set_aside()
        assert store.claim("scope", [item("a", 9)], token=OTHER, lease=1000) == [Outcome.NEW]
        store.release("scope", [item("a", 9)], token=OTHER)
        tested.complete(2, work.finished(2))
        assert store.claim("scope", [item("a", 9), item("b", 9)], token=OTHER, lease=1000) == [Outcome.NEW, Outcome.DUPLICATE]


def test_what_comes_again_in_its_batch_is_behind_a_message_that_is_set_aside() -> None:
    """D09: it was left out as a repeat of that. What is finished with it ends before it."""
    tested = claims(Answers({key_of("known"): Outcome.DUPLICATE}))
    batch = [message("known", 0), message("a", 1), message("a", 2), message("b", 3), message("a", 4)]
    work, _ = tested.claim(batch)
    assert list(work.fresh) == [batch[1], batch[3]]
    assert list(work.first().finished(1)) == batch[:2]
    assert tested.set_aside()
    tested.complete(1, batch[:2])
    assert not tested.set_aside()  # b comes once
    assert list(Work(batch).first().finished(1)) == batch[:1]
    tested.claim([message("a", 5)])
    assert not tested.set_aside()


def test_ids_that_could_not_be_stored_are_not_those_of_the_next_messages() -> None:
    """D17: the store is back, and completes what is handled now."""
    store = Answers()
    tested = claims(store)
    work, _ = tested.claim([message("a", 0), message("b", 1)])
    tested.skip(1, finished=False)
    tested.complete(1, work.rest(1).finished(1))
    tested.release()
    assert store.asked[1:] == [("complete", keys("b"))]


def test_ids_that_could_not_be_stored_are_stored_before_the_next_claim() -> None:
    """D16: with on_store_error="process". Their claims are ours: a repeat would be new here, and wait elsewhere."""
    with MemoryDedupStore() as store:
        counts: Counter[str] = Counter()
        tested = claims(store, counts)
        tested.claim([message("a", 0), message("b", 1)])
        tested.skip(2, finished=True)
        tested.release()
        assert counts["unprotected"] == 2
        work, _ = tested.claim([message("a", 2), message("c", 3)])
        assert [one.offset() for one in work.fresh] == [3]
        assert store.claim("scope", [item("b", 9)], token=OTHER, lease=1000) == [Outcome.DUPLICATE]


def test_a_store_that_is_still_down_is_not_claimed_from() -> None:
    """Nothing more is owed to it then than one batch; and what is owed is not forgotten."""
    store = Answers()
    tested = claims(store)
    tested.claim([message("a", 0)])
    tested.skip(1, finished=True)
    with pytest.MonkeyPatch.context() as patch:

        def down(*_: object, **__: object) -> list[bool]:
            raise StoreUnavailable("for the test")

        patch.setattr(store, "complete", down)
        with pytest.raises(StoreUnavailable):
            tested.claim([message("b", 1)])
    tested.claim([message("b", 1)])
    tested.claim([message("c", 2)])
    assert store.asked == [
        ("claim", keys("a")),
        ("complete", keys("a")),
        ("claim", keys("b")),
        ("claim", keys("c")),
    ]


def test_a_message_that_is_handled_without_the_store_can_be_set_aside() -> None:
    """D16: it has no claim to release, and its number is that of no claim of the batch before."""
    store = Answers()
    tested = claims(store)
    work = tested.unprotected([message("a", 0), message("b", 1)])
    tested.set_aside()
    tested.complete(2, work.finished(2))
    tested.release()
    assert store.asked == []


def test_a_child_that_leaves_the_handler_releases_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Y04: its parent is still about them, and another worker would handle them as well."""
    store = Answers()
    tested = claims(store)
    tested.claim([message("a", 0)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        tested.release()
    assert [what for what, _ in store.asked] == ["claim"]
    tested.release()
    assert store.asked[1:] == [("release", keys("a"))]


def test_what_was_handled_is_completed_although_another_has_begun_it() -> None:
    """D04: also where a claim is taken over by its lease only. Else a third one would handle it, if that one dies."""
    now = [0.0]
    with MemoryDedupStore(clock=lambda: now[0]) as store:
        ids = MessageIds(header("id"), "raise", lambda _topic: bytes(16), fingerprint=True)
        counts: Counter[str] = Counter()
        tested = Claims(store, ids, "scope", max_poll_interval=300, takeover="lease", counts=counts)
        work, _ = tested.claim([message("a", 0)])
        now[0] = 1000.0  # this process stood still
        assert store.claim("scope", [item("a", 0)], token=OTHER, lease=1000, takeover="lease") == [Outcome.TAKEN_OVER]
        tested.complete(1, work.finished(1))
        assert store.claim("scope", [item("a", 0)], token=b"3" * 16, lease=1000, takeover="lease") == [Outcome.DUPLICATE]
    assert counts["lost"] == 1


def test_who_has_lost_a_partition_takes_no_claim_back() -> None:
    """D04: a slow handler's claims are renewed; one that the new owner has is that one's, and a third one waits for it."""
    with MemoryDedupStore() as store:
        slow = claims(store)
        slow.claim([message("a", 0)])
        assert store.claim("scope", [item("a", 0)], token=OTHER, lease=1000) == [Outcome.TAKEN_OVER]
        slow._renew_at = 0.0
        slow.renew()
        slow.release()  # its handler failed, or its batch is given back
        assert store.claim("scope", [item("a", 7)], token=b"3" * 16, lease=1000) == [Outcome.IN_PROGRESS]


# -- an inbox in an SQLite file ------------------------------------------------------------------------------------------


PLACE = Source("t", bytes(16), 0)


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[SqliteInbox]:
    with SqliteInbox(tmp_path / "inbox.db") as inbox:
        yield inbox


def test_an_offset_does_not_move_without_the_effects(inbox: SqliteInbox) -> None:
    """D14: SQLite itself may end a transaction, and the handler may not look at the error: its effects are gone."""
    with inbox.transaction("scope", []) as transaction:
        transaction.connection.execute("CREATE TABLE effect (number INTEGER PRIMARY KEY)")

    def handle() -> None:
        with inbox.transaction("scope", [Entry(PLACE, 7, None)]) as transaction:
            transaction.connection.execute("INSERT INTO effect VALUES (1)")
            with suppress(sqlite3.IntegrityError):
                transaction.connection.execute("INSERT OR ROLLBACK INTO effect VALUES (1)")
            transaction.finish(1)

    with pytest.raises(KafkaGuaranteesError, match="ended the transaction"):
        handle()
    assert inbox.start_offsets("scope", [PLACE]) == {PLACE: None}


@pytest.mark.parametrize("before", [None, 7])
def test_an_offset_that_another_has_moved_meanwhile_is_not_moved_back(
    inbox: SqliteInbox, tmp_path: Path, before: int | None
) -> None:
    """X02: whoever has done what the lock does not let another owner do."""
    if before is not None:
        with inbox.transaction("scope", [Entry(PLACE, before - 1, None)]):
            pass
    with closing(sqlite3.connect(tmp_path / "inbox.db", isolation_level=None)) as mine:
        mine.execute("BEGIN IMMEDIATE")
        transaction = inbox.enlist(mine, "scope", [Entry(PLACE, 7, None)])
        there = (PLACE.topic, PLACE.partition, PLACE.topic_id)
        mine.execute("INSERT OR REPLACE INTO kg_inbox_offset VALUES ('scope', ?, ?, ?, 9)", there)
        with pytest.raises(PartitionFenced):
            transaction.finish()
        mine.execute("COMMIT")
    assert inbox.start_offsets("scope", [PLACE]) == {PLACE: 9}


def test_a_child_that_leaves_the_handler_leaves_the_transaction_alone(
    inbox: SqliteInbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Y04: it is its parent's, in the same file."""
    opened: list[sqlite3.Connection] = []

    def handle() -> None:
        with inbox.transaction("scope", [Entry(PLACE, 7, None)]) as transaction:
            opened.append(transaction.connection)
            patch.setattr(os, "getpid", lambda: -1)
            raise LookupError

    with monkeypatch.context() as patch, pytest.raises(LookupError):
        handle()
    assert opened[0].in_transaction
    opened[0].rollback()


def test_a_fork_in_the_handler_does_not_end_the_transaction(inbox: SqliteInbox) -> None:
    """Y04: also where the child is a command that has nothing to do with it."""
    with inbox.transaction("scope", [Entry(PLACE, 7, None)]) as transaction:
        inbox._let_go()  # as before each fork
        transaction.connection.execute("CREATE TABLE effect (number INTEGER PRIMARY KEY)")
    assert inbox.start_offsets("scope", [PLACE]) == {PLACE: 8}


# -- PostgreSQL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure])
def test_what_the_server_ended_for_the_sake_of_others_is_not_the_fault_of_the_message(
    postgres_server: LocalPostgres, error: type[psycopg.Error]
) -> None:
    """L05: it is tried again with the same messages, which would go to the dead letter topic else."""
    with PostgresInbox(postgres_server.dsn, prefix="guards") as inbox:

        def handle() -> None:
            with inbox.transaction(error.__name__, [Entry(PLACE, 7, None)]):
                raise error("for the test")

        with pytest.raises(StoreUnavailable, match="Repeat it"):
            handle()
        assert inbox.start_offsets(error.__name__, [PLACE]) == {PLACE: None}


def test_an_expired_id_that_somebody_else_takes_is_no_duplicate() -> None:
    """D04: it was free when it was looked at, and its new owner has not handled it yet. It would be lost with that one."""
    free, completed = True, True
    assert _outcome((free, completed, b"f" * 8), b"f" * 8) is Outcome.IN_PROGRESS
    assert _outcome((not free, completed, b"f" * 8), b"f" * 8) is Outcome.DUPLICATE


@pytest.mark.parametrize("error", [StoreUnavailable("it is away"), AuthorizationError("no login")])
def test_a_store_that_lets_nobody_release_hides_no_other_error(error: Exception) -> None:
    """The end of a batch lets claims go: what the handler raised is what the run raises."""

    class Refusing(MemoryDedupStore):
        def release(self, *_args: object, **_named: object) -> None:
            raise error

    with Refusing() as store:
        ids = MessageIds(header("id"), "raise", lambda _topic: bytes(16), fingerprint=True)
        tested = Claims(store, ids, "scope", max_poll_interval=300, takeover="position", counts=Counter())
        tested.claim([message("a", 0), message("b", 1)])
        tested.set_aside()
        tested.release()
