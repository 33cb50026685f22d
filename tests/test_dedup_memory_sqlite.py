"""Laws of the deduplication stores that need no server: in memory, and in a file."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import timedelta
from functools import partial
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees.dedup import Entry, Source, SqliteInbox, sqlite
from kafka_guarantees.dedup.contract import Capabilities, Item, Outcome
from kafka_guarantees.dedup.memory import MemoryDedupStore
from kafka_guarantees.dedup.sqlite import SqliteDedupStore
from kafka_guarantees.errors import KafkaGuaranteesError, StoreUnavailable, UnsafeConfigError

from .conftest import in_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from multiprocessing.connection import Connection

Store = MemoryDedupStore | SqliteDedupStore

NEW, TAKEN_OVER, DUPLICATE, IN_PROGRESS, MISMATCH = Outcome
A, B = b"a" * 16, b"b" * 16  # tokens
HOUR = 3600.0
PATIENCE = 120.0  # seconds; other work may run on the same cores


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "ids.db")


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, path: str, clock: Clock) -> Iterator[Store]:
    retention = timedelta(hours=24)
    with (
        MemoryDedupStore(retention=retention, clock=clock)
        if request.param == "memory"
        else SqliteDedupStore(path, retention=retention, clock=clock)
    ) as made:
        yield made


def digest(name: object, size: int = 16) -> bytes:
    return blake2b(str(name).encode(), digest_size=size).digest()


def item(name: object, position: object = 0, fingerprint: bytes = b"") -> Item:
    return Item(digest(name), digest(f"at {position}"), fingerprint)


def handle(store: Store, *items: Item, token: bytes = A) -> None:
    assert set(store.claim("group", items, token=token, lease=60)) <= {NEW, TAKEN_OVER}
    assert all(store.complete("group", items, token=token))


def claim(store: Store, one: Item, *, token: bytes = B, scope: str = "group") -> Outcome:
    return store.claim(scope, [one], token=token, lease=60)[0]


# -- claim, complete, release ---------------------------------------------------------------------------------------------


def test_a_claim_belongs_to_its_token(store: Store) -> None:
    """D01: the first claims, with its token it may ask again, and another one waits."""
    assert claim(store, item("id", 1), token=A) == NEW
    assert claim(store, item("id", 1), token=A) == NEW
    assert claim(store, item("id", 2), token=B) == IN_PROGRESS
    assert claim(store, item("id", 2), token=A) == NEW


def test_the_record_that_comes_again_is_taken_over_at_once(store: Store) -> None:
    """DEDUP 1.4: the same position is the same record, whose owner is gone; the new owner's claim is as good as any."""
    claim(store, item("id", 1), token=A)
    assert claim(store, item("id", 1), token=B) == TAKEN_OVER
    assert claim(store, item("id", 2), token=A) == IN_PROGRESS


def test_takeover_by_lease_waits_for_the_lease(store: Store, clock: Clock) -> None:
    """D04: with ``takeover="lease"`` the position does not count; when the lease is over, anybody takes over."""
    one = item("id", 1)
    store.claim("group", [one], token=A, lease=60)
    assert store.claim("group", [one], token=B, lease=60, takeover="lease") == [IN_PROGRESS]
    clock.now += 59
    assert store.claim("group", [one], token=B, lease=60, takeover="lease") == [IN_PROGRESS]
    clock.now += 1
    assert store.claim("group", [one], token=B, lease=60, takeover="lease") == [TAKEN_OVER]
    assert store.claim("group", [one], token=A, lease=60, takeover="lease") == [IN_PROGRESS]


def test_claiming_again_renews_position_and_lease(store: Store, clock: Clock) -> None:
    """Contract: whoever claims becomes the owner: token, position and lease are replaced."""
    claim(store, item("id", 1), token=A)
    clock.now += 40
    claim(store, item("id", 2), token=A)
    clock.now += 40
    assert claim(store, item("id", 1), token=B) == IN_PROGRESS
    assert claim(store, item("id", 2), token=B) == TAKEN_OVER


def test_what_is_completed_is_a_duplicate(store: Store) -> None:
    """A completed id is a duplicate for everybody, at any position."""
    handle(store, item("id", 1))
    assert claim(store, item("id", 1), token=A) == DUPLICATE
    assert claim(store, item("id", 2), token=B) == DUPLICATE


def test_what_was_only_claimed_is_no_duplicate(store: Store, clock: Clock) -> None:
    """D09: however long ago it was claimed, an id that nobody completed is handled."""
    for hours in (0, 1, 30, 1000):
        clock.now += hours * HOUR
        one = item(hours)
        assert claim(store, one, token=A) == NEW
        clock.now += 61
        assert claim(store, one, token=B) == TAKEN_OVER


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [(b"x" * 8, b"x" * 8, DUPLICATE), (b"x" * 8, b"y" * 8, MISMATCH), (b"", b"y" * 8, DUPLICATE), (b"x" * 8, b"", DUPLICATE)],
)
def test_one_id_for_two_messages_is_a_mismatch(store: Store, before: bytes, after: bytes, outcome: Outcome) -> None:
    """D08: another fingerprint is another message; where one of the two is empty, they are not compared."""
    handle(store, item("other", fingerprint=b"z" * 8), item("id", fingerprint=before))
    assert claim(store, item("id", fingerprint=after)) == outcome


def test_only_the_owner_completes(store: Store) -> None:
    """D04: who lost a claim completes nothing, and the new owner does."""
    one = item("id", 1)
    claim(store, one, token=A)
    claim(store, one, token=B)
    assert store.complete("group", [one], token=A) == [False]
    assert claim(store, one, token=B) == NEW
    assert store.complete("group", [one], token=B) == [True]
    assert store.complete("group", [one], token=A) == [True]  # it *is* completed


def test_a_late_complete_counts(store: Store, clock: Clock) -> None:
    """Contract: the effect happened, so a claim whose lease is over, and that nobody took, is completed."""
    claim(store, item("id", 1), token=A)
    clock.now += 10 * HOUR
    assert store.complete("group", [item("id", 1)], token=A) == [True]
    assert claim(store, item("id", 2)) == DUPLICATE


def test_complete_may_be_asked_again(store: Store) -> None:
    """D17: the answer to the first call was lost."""
    handle(store, item("id"))
    assert store.complete("group", [item("id"), item("nobody's")], token=A) == [True, False]
    assert claim(store, item("nobody's")) == NEW


def test_release_makes_new(store: Store) -> None:
    """What failed is handled again; claims of others and completed ids stay."""
    handle(store, item("completed"))
    claim(store, item("own"), token=A)
    claim(store, item("other's"), token=B)
    store.release("group", [item("completed"), item("own"), item("other's"), item("unknown")], token=A)
    assert claim(store, item("own", 2), token=B) == NEW
    assert claim(store, item("other's", 2), token=A) == IN_PROGRESS
    assert claim(store, item("completed")) == DUPLICATE


def test_scopes_are_apart(store: Store) -> None:
    """D07: what one application handled, another did not."""
    handle(store, item("id"))
    assert claim(store, item("id"), scope="another") == NEW
    assert store.complete("third", [item("id")], token=A) == [False]
    store.release("third", [item("id")], token=B)
    assert claim(store, item("id", 2), token=A, scope="another") == IN_PROGRESS


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 3500])
def test_answers_come_in_the_order_of_the_items(store: Store, size: int) -> None:
    """Contract: an answer for each item, in their order, however many they are."""
    shuffle = random.Random(size).shuffle
    kinds: dict[Outcome, Callable[[Item], object]] = {
        DUPLICATE: lambda each: handle(store, each._replace(fingerprint=b"x" * 8)),
        MISMATCH: lambda each: handle(store, each._replace(fingerprint=b"y" * 8)),
        TAKEN_OVER: lambda each: claim(store, each, token=B),
        IN_PROGRESS: lambda each: claim(store, item("id", "elsewhere")._replace(key=each.key), token=B),
    }
    items = [item(number, number, b"x" * 8) for number in range(size)]
    expected = [NEW] * size
    for number, kind in zip(range(0, size, 7), [*kinds] * 200, strict=False):
        kinds[kind](items[number])
        expected[number] = kind
    both = list(zip(items, expected, strict=True))
    shuffle(both)
    items, expected = [each for each, _ in both], [kind for _, kind in both]
    assert store.claim("group", items, token=A, lease=60) == expected
    assert store.complete("group", items, token=A) == [kind != IN_PROGRESS for kind in expected]


def test_both_stores_say_the_same(path: str, clock: Clock) -> None:
    """Whatever is asked of them, in whatever order, the stores answer alike."""
    choice = random.Random(5)
    with MemoryDedupStore(clock=clock) as one, SqliteDedupStore(path, clock=clock) as other:
        for step in range(600):
            items = [
                item(number, choice.randrange(3), choice.choice([b"", b"x" * 8, b"y" * 8]))
                for number in choice.sample(range(40), choice.randrange(8))
            ]
            token, scope = choice.choice([A, B]), choice.choice(["group", "another"])
            does = choice.choice(["claim", "claim", "complete", "release"])
            takeover = choice.choice(["position", "lease"])
            more = {"lease": choice.choice([1, 50]), "takeover": takeover} if does == "claim" else {}
            said = [getattr(store, does)(scope, items, token=token, **more) for store in (one, other)]
            assert said[0] == said[1], (step, does)
            clock.now += choice.choice([0, 1, 10])


# -- retention ----------------------------------------------------------------------------------------------------------


def test_an_id_is_remembered_for_its_retention_and_not_for_ever(store: Store, clock: Clock) -> None:
    """D05, D18: an id is a duplicate for a retention from its completion on, and gone soon after, whenever it was completed."""
    longest = 2.0 if isinstance(store, MemoryDedupStore) else 4 / 3
    completed: dict[int, float] = {}
    start = clock.now
    for number in range(30):
        clock.now = start + number * 5 * HOUR
        handle(store, item(number))
        completed[number] = clock.now
        for other, when in completed.items():
            age = clock.now - when
            said = claim(store, item(other, 2))
            store.release("group", [item(other)], token=B)
            assert said == DUPLICATE or age > 24 * HOUR, (other, age / HOUR)
            assert said == NEW or age < longest * 24 * HOUR, (other, age / HOUR)


@pytest.mark.parametrize("pause", [23.9, 24.0])
def test_retention_counts_while_nobody_asks(store: Store, clock: Clock, pause: float) -> None:
    """A pause does not make ids go earlier."""
    clock.now += 7 * HOUR
    handle(store, item("id"))
    clock.now += pause * HOUR
    assert claim(store, item("id")) == DUPLICATE
    assert store.complete("group", [item("id")], token=B) == [True]


def test_after_a_long_pause_everything_is_gone(store: Store, clock: Clock) -> None:
    """D18: what is expired does not come back because nobody cleaned up."""
    handle(store, item("id"))
    clock.now += 24 * 30 * HOUR
    assert claim(store, item("id")) == NEW
    handle(store, item("next"))
    assert claim(store, item("next")) == DUPLICATE


def test_purge_says_how_many_went(store: Store, clock: Clock) -> None:
    """D18: purge removes what is expired and counts it; what is not expired stays."""
    handle(store, *(item(number) for number in range(2500)))
    clock.now += 30 * HOUR
    handle(store, item("later"))
    assert store.purge() == 0
    clock.now += 19 * HOUR
    assert store.purge() == 2500
    assert store.purge() == 0
    assert claim(store, item("later")) == DUPLICATE
    handle(store, item("last"))
    clock.now += 1000 * HOUR
    assert store.purge() == 2


def test_abandoned_claims_do_not_pile_up(store: Store, clock: Clock) -> None:
    """D18: a claim that nobody completed is forgotten a retention after its lease."""
    store.claim("group", [item(number) for number in range(100)], token=A, lease=60)
    clock.now += 24 * HOUR
    assert claim(store, item(0, 2)) == TAKEN_OVER
    clock.now += 24 * HOUR
    assert claim(store, item(1, 2)) == NEW


@pytest.mark.parametrize("retention", [timedelta(0), timedelta(seconds=-1)])
def test_a_retention_is_more_than_nothing(path: str, retention: timedelta) -> None:
    """Without a retention nothing would ever be a duplicate."""
    for make in (lambda: MemoryDedupStore(retention=retention), lambda: SqliteDedupStore(path, retention=retention)):
        with pytest.raises(ValueError, match="retention"):
            make()


# -- threads, processes, forks ------------------------------------------------------------------------------------------------


def batches(seed: int) -> Iterator[list[Item]]:
    """The same 600 ids, in batches and an order that the seed decides."""
    numbers = list(range(600))
    random.Random(seed).shuffle(numbers)
    for start in range(0, 600, 50):
        yield [item(number, seed) for number in numbers[start : start + 50]]


def claim_all(store: Store, seed: int) -> list[bytes]:
    """Claim and complete what is new."""
    token, won = digest(f"token {seed}"), []
    for batch in batches(seed):
        said = store.claim("group", batch, token=token, lease=600)
        mine = [each for each, outcome in zip(batch, said, strict=True) if outcome == NEW]
        assert set(said) <= {NEW, DUPLICATE, IN_PROGRESS}
        assert all(store.complete("group", mine, token=token))
        won += [each.key for each in mine]
    return won


def everybody_won_once(won: Iterable[Sequence[bytes]]) -> bool:
    return sorted(key for keys in won for key in keys) == sorted(digest(number) for number in range(600))


def test_of_many_threads_one_claims_an_id(store: Store) -> None:
    """D01: eight threads with overlapping batches: each id is new exactly once."""
    barrier = threading.Barrier(8)

    def one(seed: int) -> list[bytes]:
        barrier.wait(PATIENCE)
        return claim_all(store, seed)

    with ThreadPoolExecutor(8) as threads:
        assert everybody_won_once(list(threads.map(one, range(8))))


def claim_in_process(path: str, seed: int, pipe: Connection) -> None:
    pipe.recv()
    with SqliteDedupStore(path) as store:
        pipe.send(claim_all(store, seed))


def test_of_many_processes_one_claims_an_id(path: str) -> None:
    """D01, D14: processes that create, open and use a file at the same moment: each id is new exactly once."""
    spawn = multiprocessing.get_context("spawn")
    ours, processes = [], []
    for seed in range(6):
        here, there = spawn.Pipe()
        processes.append(spawn.Process(target=claim_in_process, args=(path, seed, there)))
        processes[-1].start()
        there.close()
        ours.append(here)
    for pipe in ours:
        pipe.send("go")
    won = [pipe.recv() for pipe in ours if pipe.poll(PATIENCE)]
    for process, pipe in zip(processes, ours, strict=True):
        process.join(PATIENCE)
        pipe.close()
    assert [process.exitcode for process in processes] == [0] * 6
    assert everybody_won_once(won)


def test_a_file_that_somebody_makes_meanwhile_is_ours(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D14: whatever another process does between two looks at a file, it is not taken for another application's."""
    connect = sqlite3.connect

    class Watched(sqlite3.Connection):
        looks = 0

        def execute(self, *what: Any) -> sqlite3.Cursor:
            self.looks += 1
            if self.looks == 2:  # one look before it is made, and one after
                monkeypatch.setattr(sqlite3, "connect", connect)
                SqliteDedupStore(path).close()
            return super().execute(*what)

    monkeypatch.setattr(sqlite3, "connect", partial(connect, factory=Watched))
    with SqliteDedupStore(path) as store:
        assert claim(store, item(1)) == NEW


def complete_for_ever(path: str, pipe: Connection) -> None:
    with SqliteDedupStore(path) as store:
        for number in count():
            handle(store, *(item(f"{number} {each}") for each in range(20)), token=digest(number))
            pipe.send(number)


def test_what_was_completed_survives_sigkill(path: str) -> None:
    """D02: after SIGKILL at any moment what complete() said is true, and the file goes on without repair."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=complete_for_ever, args=(path, there))
    process.start()
    there.close()
    last = -1
    while last < 50:
        assert here.poll(PATIENCE)
        last = here.recv()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE)
    while here.poll(0):
        try:
            last = here.recv()
        except EOFError:
            break
    here.close()
    with SqliteDedupStore(path) as store:
        for number in range(last + 1):
            items = [item(f"{number} {each}") for each in range(20)]
            assert store.claim("group", items, token=A, lease=60) == [DUPLICATE] * 20
        items = [item(f"{last + 1} {each}") for each in range(20)]  # where it died: all or nothing
        assert len(set(store.claim("group", items, token=A, lease=60))) == 1


def test_a_fork_shares_no_connection(path: str) -> None:
    """D14: parent and child go on, and what either completes is kept, also when the parent closes first."""
    to_child, to_parent = os.pipe(), os.pipe()
    with SqliteDedupStore(path) as store:
        handle(store, item("before"))

        def child() -> None:
            assert claim(store, item("before")) == DUPLICATE
            handle(store, item("child 1"))
            os.write(to_parent[1], b".")
            os.read(to_child[0], 1)
            handle(store, item("child 2"))
            os.kill(os.getpid(), signal.SIGKILL)  # it does not write back what is in the write-ahead log

        ended = in_child(child)
        os.read(to_parent[0], 1)
        handle(store, item("parent"))
        assert claim(store, item("child 1")) == DUPLICATE
    os.write(to_child[1], b".")
    assert ended() == -signal.SIGKILL
    for end in (*to_child, *to_parent):
        os.close(end)
    with SqliteDedupStore(path) as store:
        assert [claim(store, item(name)) for name in ("before", "parent", "child 1", "child 2")] == [DUPLICATE] * 4


def test_a_signal_handler_may_fork_in_the_middle_of_a_call_of_a_store(path: str) -> None:
    """D14: the fork does not wait for its own thread, nor close the connection under it."""
    forks: list[int] = []

    def clock() -> float:  # is looked at in the middle of each call
        forks.append(in_child(lambda: None)())
        return time.time()

    with SqliteDedupStore(path, clock=clock) as store:
        handle(store, item("a"))
        assert claim(store, item("a")) == DUPLICATE
    assert set(forks) == {0}


def test_a_file_is_the_same_after_a_fork_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D14: it is opened again, where a service that became a daemon has changed its working directory."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    source = Source("orders", bytes(16), 0)
    with SqliteDedupStore("ids.db") as store, SqliteInbox("inbox.db") as inbox:
        handle(store, item("before"))
        with inbox.transaction("group", [Entry(source, 0, None)]):
            pass
        monkeypatch.chdir(elsewhere)
        assert in_child(lambda: None)() == 0
        assert claim(store, item("before")) == DUPLICATE
        assert inbox.start_offsets("group", [source]) == {source: 1}
    assert not list(elsewhere.iterdir())


def test_a_path_through_a_link_is_the_one_that_sqlite_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D14: else a transaction that is enlisted, by the same path, is one in another file than the offsets."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path)
    with SqliteInbox("link/../inbox.db") as inbox, closing(sqlite3.connect("link/../inbox.db", isolation_level=None)) as own:
        own.execute("BEGIN IMMEDIATE")
        inbox.enlist(own, "group", [Entry(Source("orders", bytes(16), 0), 0, None)]).finish()
        own.execute("COMMIT")


def test_a_fork_waits_for_the_call_of_another_thread(path: str) -> None:
    """D14: no child begins with a transaction, or a lock, that a thread of its parent has."""
    with SqliteDedupStore(path) as store, ThreadPoolExecutor(1) as threads:
        over = threading.Event()

        def busy() -> None:
            for number in count():
                handle(store, item(number))
                if over.is_set():
                    return

        running = threads.submit(busy)
        try:
            ends = [in_child(partial(handle, store, item(f"child {number}")))() for number in range(10)]
        finally:
            over.set()
        running.result(PATIENCE)
        assert ends == [0] * 10
        assert {claim(store, item(f"child {number}")) for number in range(10)} == {DUPLICATE}


# -- the file ---------------------------------------------------------------------------------------------------------------


def test_a_file_is_remembered(path: str) -> None:
    """What is completed, and what is claimed, is known to the next who opens the file."""
    with SqliteDedupStore(path) as store:
        handle(store, item("completed"))
        claim(store, item("claimed"), token=A)
    with SqliteDedupStore(path) as store:
        assert claim(store, item("completed")) == DUPLICATE
        assert claim(store, item("claimed", 2)) == IN_PROGRESS


@pytest.mark.parametrize("new", [True, False])
def test_a_file_that_was_removed_is_used_no_more(
    path: str,
    caplog: pytest.LogCaptureFixture,
    new: bool,  # noqa: FBT001 - two rows
) -> None:
    """D11: a process that begins later has another file, so each would handle what the other has handled. Said once."""
    with SqliteDedupStore(path) as store:
        handle(store, item("before"))
        for end in ("", "-wal", "-shm"):
            Path(path + end).unlink()
        with ExitStack() as later:
            other = later.enter_context(SqliteDedupStore(path)) if new else None
            if other is not None:
                handle(other, item("by the other"))
                assert claim(store, item("by the other")) == DUPLICATE
            handle(store, item("after"))
            if other is None:
                other = later.enter_context(SqliteDedupStore(path))
            assert claim(other, item("after")) == DUPLICATE
    assert caplog.text.count("was removed, or another one took its place") == 1
    with SqliteDedupStore(path) as store:
        assert claim(store, item("after")) == DUPLICATE


def test_a_locked_file_is_unavailable(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D16: a store that cannot look says so, in bounded time, for every call; afterwards it works as before."""
    monkeypatch.setattr(sqlite, "WAIT", 0.05)
    with SqliteDedupStore(path) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        handle(store, item("id"))
        other.execute("BEGIN IMMEDIATE")
        calls: list[Callable[[], object]] = [
            lambda: claim(store, item("id")),
            lambda: store.complete("group", [item("id")], token=A),
            lambda: store.release("group", [item("id")], token=A),
            store.purge,
            lambda: SqliteDedupStore(path),
        ]
        for call in calls:
            with pytest.raises(StoreUnavailable, match=r"make the same call again") as caught:
                call()
            assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        other.execute("ROLLBACK")
        assert claim(store, item("id")) == DUPLICATE


def test_a_thread_waits_in_bounded_time(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D16: a call that another thread keeps waiting says so."""
    monkeypatch.setattr(sqlite, "WAIT", 0.05)
    with SqliteDedupStore(path) as store, ThreadPoolExecutor() as threads, store._lock:
        waited = threads.submit(store.purge)
        with pytest.raises(StoreUnavailable, match="other threads"):
            waited.result()


def test_a_call_that_fails_changes_nothing(path: str) -> None:
    """Contract: a call is atomic, also one that is many statements; and the store goes on after a full disk."""
    with SqliteDedupStore(path) as store:
        items = [item(number) for number in range(3000)]
        assert store._connection is not None
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages + 40}")
        with pytest.raises(StoreUnavailable, match="full"):
            store.claim("group", items, token=A, lease=60)
        store._connection.execute("PRAGMA max_page_count = 1000000")
        wrong = Item(b"\xff" * 17, A)  # the last of them in the order of keys
        with pytest.raises(ValueError, match="16 bytes"):
            store.claim("group", [*items, wrong], token=A, lease=60)
        assert store.claim("group", [item(number, 2) for number in range(3000)], token=B, lease=60) == [NEW] * 3000


@pytest.mark.parametrize("wrong", [Item(b"k" * 15, A), Item(A, b"p"), Item(A, A, b"f" * 7)])
def test_lengths_are_kept(path: str, wrong: Item) -> None:
    """A key of another length would be taken for other keys: it is refused."""
    with SqliteDedupStore(path) as store, pytest.raises(ValueError, match="16 bytes"):
        claim(store, wrong)


def test_files_of_others_are_refused(path: str) -> None:
    """D19: neither a later version's file nor another application's is touched."""
    SqliteDedupStore(path).close()
    with closing(sqlite3.connect(path)) as later:
        later.execute("PRAGMA user_version = 2")
    with pytest.raises(UnsafeConfigError, match="its format is 2"):
        SqliteDedupStore(path)
    with closing(sqlite3.connect(f"{path}.other")) as other:
        other.execute("CREATE TABLE claim (id)")
    with pytest.raises(UnsafeConfigError, match="another application"):
        SqliteDedupStore(f"{path}.other")


@pytest.mark.parametrize("kind", [SqliteDedupStore, SqliteInbox])
@pytest.mark.parametrize("nowhere", [":memory:", ""])
def test_a_file_is_a_file(kind: Any, nowhere: str) -> None:
    """What says that it survives its process is not kept in memory, where not even a fork leaves it."""
    with pytest.raises(UnsafeConfigError, match="write-ahead log"):
        kind(nowhere)


def test_a_clock_that_was_put_back_loses_nothing(path: str, clock: Clock) -> None:
    """D15: an id is remembered for its retention, and the generations still rotate."""
    with SqliteDedupStore(path, clock=clock) as store:
        clock.now += 100 * 24 * HOUR
        handle(store, item("then"))
        clock.now -= 100 * 24 * HOUR
        handle(store, item("now"))
        clock.now += 24 * HOUR
        assert claim(store, item("then")) == DUPLICATE
        assert claim(store, item("now")) == DUPLICATE
        clock.now += 24 * HOUR
        assert claim(store, item("then")) == NEW


def test_the_last_to_open_a_file_decides_on_its_retention(path: str, clock: Clock) -> None:
    """A longer retention holds for the ids that are in the file already, and for all who share it."""
    with SqliteDedupStore(path, retention=timedelta(hours=1), clock=clock) as store:
        handle(store, item("id"))
        with SqliteDedupStore(path, retention=timedelta(hours=10), clock=clock):
            clock.now += 9 * HOUR
            assert claim(store, item("id")) == DUPLICATE


# -- what they say of themselves ----------------------------------------------------------------------------------------------


def test_capabilities(path: str) -> None:
    """What cannot be expected of a store is said: D11."""
    with MemoryDedupStore() as store:
        assert store.capabilities == Capabilities(shared=False, durable="none", clock="client")
        assert store.retention == timedelta(hours=24)
    for durability, synchronous in (("process", 1), ("power", 2)):
        with SqliteDedupStore(path, durability=durability) as file:  # type: ignore[arg-type]
            assert file.capabilities == Capabilities(shared=False, durable=durability, clock="client")  # type: ignore[arg-type]
            assert file.retention == timedelta(hours=24)
            assert file._connection is not None
            assert file._connection.execute("PRAGMA synchronous").fetchone() == (synchronous,)
    with pytest.raises(ValueError, match="durability"):
        SqliteDedupStore(path, durability="none")  # type: ignore[arg-type]


def test_a_closed_store_raises(store: Store) -> None:
    """After close() nothing is new: every call raises, and close() may be called again."""
    store.close()
    store.close()
    calls: list[Callable[[], object]] = [
        lambda: claim(store, item("id")),
        lambda: store.complete("group", [item("id")], token=A),
        lambda: store.release("group", [item("id")], token=A),
        store.purge,
    ]
    for call in calls:
        with pytest.raises(KafkaGuaranteesError, match="is closed"):
            call()


@pytest.mark.parametrize("kind", ["store", "inbox"])
def test_an_interrupt_while_it_waits_for_the_lock_leaves_no_transaction_open(kind: str, path: str) -> None:
    """Ctrl-C comes out where BEGIN has got the lock; nobody would ever undo it, and everybody else find the file locked."""
    with ExitStack() as stack:
        store = stack.enter_context(closing(SqliteDedupStore(path) if kind == "store" else SqliteInbox(path)))
        source = Source("t", bytes(16), 0)

        def call() -> None:
            if isinstance(store, SqliteInbox):
                with store.transaction("group", [Entry(source, 0, None)]):
                    pass
            else:
                store.claim("group", [item("a")], token=A, lease=60)

        other = stack.enter_context(closing(sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)))
        other.execute("BEGIN IMMEDIATE")
        ends = threading.Timer(0.6, other.execute, ("COMMIT",))
        ends.start()
        stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, _interrupt))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            call()
        ends.join()
        other.execute("BEGIN IMMEDIATE")
        other.execute("COMMIT")
        call()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_store_that_a_signal_handler_uses_in_its_own_call_is_not_undone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That one is told to come again, and the call that it interrupted goes on."""
    inner: list[str] = []
    with closing(SqliteDedupStore(path)) as used:

        def clock() -> float:
            if not inner:
                inner.append("asked")
                with pytest.raises(StoreUnavailable, match="another call of this thread"):
                    used.claim("group", [item("b")], token=A, lease=60)
            return time.time()

        monkeypatch.setattr(used, "_clock", clock)
        assert used.claim("group", [item("a")], token=A, lease=60) == [Outcome.NEW]
        assert inner == ["asked"]
        assert used.claim("group", [item("a", 1), item("b")], token=B, lease=60) == [Outcome.IN_PROGRESS, Outcome.NEW]
