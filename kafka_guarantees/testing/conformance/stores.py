"""The laws of deduplication stores: answers, states, time, threads, processes, kills, and calls whose answer got lost."""

# ruff: noqa: S101, PLR2004 - a suite of tests, which its users inherit

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from kafka_guarantees.dedup.contract import DedupStore, Item, Outcome
from kafka_guarantees.dedup.ids import key_of, position_of
from kafka_guarantees.errors import StoreUnavailable

from .running import in_processes, in_threads

if TYPE_CHECKING:
    from pathlib import Path

    from kafka_guarantees.dedup.contract import Takeover

Clock = Callable[[], float]

NEW, TAKEN_OVER, DUPLICATE, IN_PROGRESS, MISMATCH = Outcome
SCOPE = "orders"
OURS, THEIRS, OTHERS = b"\x00" * 16, b"\xff" * 16, b"'\"\\%{}:\n\t\x00;--_?$1"[:16]
LONG = timedelta(days=1)
LEASE = 600.0  # seconds: longer than any test
IDS = 400  # that several contend for
WARM_UP = 1_000_000_000  # ids from here on open connections and schemas, before it counts
TAKEOVERS: tuple[Takeover, ...] = ("position", "lease")
ODD_SCOPES = (
    *("a", "A", "a ", "a:", "a:b", "{a}", "a}", "a'b", 'a"b', "a\\", "a%", "a_", "a*", "a/b"),
    *("\u00e4", "a\u0308", "\U0001f9fe", "x" * 249, "x" * 248),
)
ODD_KEYS = (
    bytes(16),
    b"\xff" * 16,
    bytes(15) + b"\x01",
    b"\x01" + bytes(15),
    b"a" * 15 + b"\x00",
    b"a" * 15 + b" ",
    b"A" * 15 + b" ",
    b"\x80" * 16,
    b"\r\n" * 8,
    b"';DROP TABLE a;--"[:16],
    b"{}" * 8,
    b"%s%(a)s\\x00?$1-\x00",
)


def item(number: int, place: int = 0, fingerprint: bytes = b"") -> Item:
    """The id of this number, at one of the places where it may be."""
    return Item(key_of(f"id {number}"), position_of(bytes(16), place, number), fingerprint)


def items(numbers: Sequence[int], place: int = 0) -> list[Item]:
    return [item(number, place) for number in numbers]


class Rig:
    """The stores of one test, and their time: a virtual one where the clock is the client's, a short real one else."""

    def __init__(self, suite: DedupStoreConformance, place: Path) -> None:
        self.place = place
        self._suite = suite
        self._now = time.time()  # other processes go by this one
        self._opened: list[DedupStore] = []
        self.store = self.open(LONG)
        self.virtual = self.store.capabilities.clock == "client"
        self.unit = 60.0 if self.virtual else 0.25

    def open(self, retention: timedelta) -> DedupStore:
        self._opened.append(self._suite.make_store(self.place, retention, lambda: self._now))
        return self._opened[-1]

    def remembering(self, units: float) -> DedupStore:
        """A store with this retention, in units, and nothing in it."""
        self.place = self.place.with_name(fresh_name())
        return self.open(timedelta(seconds=units * self.unit))

    def wait(self, units: float) -> None:
        """Let time pass, in units."""
        if self.virtual:
            self._now += units * self.unit
        else:
            time.sleep(units * self.unit)

    def close(self) -> None:
        for store in self._opened:
            store.close()


def fresh_name() -> str:
    return f"kg_{uuid4().hex[:16]}"


def difference(found: Sequence[object], expected: Sequence[object]) -> tuple[int, object, object] | None:
    """The first index at which two long lists differ, and what is there; None where they are the same.

    A failed ``==`` between lists of ten thousand keeps pytest busy for minutes where the variable CI is set: it looks for the
    shortest difference then.
    """
    pairs = enumerate(zip_longest(found, expected))
    return next(((index, one, other) for index, (one, other) in pairs if one != other), None)


class DedupStoreConformance:
    """Inherit, write ``make_store``, and call the class ``Test...``."""

    patience = 60.0  # seconds in which a test with threads or processes must end

    def make_store(self, place: Path, retention: timedelta, clock: Clock) -> DedupStore:
        """A new store on the data at ``place``.

        Args:
            place: the same one, the same data, also in another process.
            retention: as in the contract.
            clock: seconds, for a store whose ``capabilities.clock`` is ``"client"``. Others have a clock, and leave it alone.
        """
        raise NotImplementedError

    @pytest.fixture
    def rig(self, tmp_path: Path) -> Iterator[Rig]:
        rig = Rig(self, tmp_path / fresh_name())
        try:
            yield rig
        finally:
            rig.close()

    @pytest.fixture
    def store(self, rig: Rig) -> DedupStore:
        return rig.store

    # -- answers ----------------------------------------------------------------------------------------------------------

    def test_an_empty_batch_is_nothing(self, store: DedupStore) -> None:
        """No items, no outcomes, no error."""
        assert store.claim(SCOPE, [], token=OURS, lease=LEASE) == []
        assert store.complete(SCOPE, [], token=OURS) == []
        store.release(SCOPE, [], token=OURS)

    @pytest.mark.parametrize("size", [1, 2, 1_000, 10_000])
    def test_batches_have_any_size(self, store: DedupStore, size: int) -> None:
        """Every id is NEW, then completed, then a DUPLICATE: in a batch of one and of ten thousand."""
        batch = items(range(size))
        assert difference(store.claim(SCOPE, batch, token=OURS, lease=LEASE), [NEW] * size) is None
        assert difference(store.complete(SCOPE, batch, token=OURS), [True] * size) is None
        assert difference(store.claim(SCOPE, batch, token=THEIRS, lease=LEASE), [DUPLICATE] * size) is None

    def test_outcomes_come_in_the_order_of_the_items(self, store: DedupStore) -> None:
        """Each item has its own outcome, at its own index, whatever the order of the keys."""
        numbers = list(range(60))
        store.claim(SCOPE, items(numbers[:40]), token=OURS, lease=LEASE)
        store.complete(SCOPE, items(numbers[:20]), token=OURS)
        random.Random(1).shuffle(numbers)  # noqa: S311
        expected = [DUPLICATE if number < 20 else IN_PROGRESS if number < 40 else NEW for number in numbers]
        assert store.claim(SCOPE, items(numbers, place=1), token=THEIRS, lease=LEASE) == expected
        random.Random(2).shuffle(numbers)  # noqa: S311
        expected_done = [number < 20 or number >= 40 for number in numbers]
        assert store.complete(SCOPE, items(numbers), token=THEIRS) == expected_done

    def test_one_duplicate_does_not_make_the_others_duplicates(self, store: DedupStore) -> None:
        """In a batch only what was completed is left out: the rest would be lost."""
        store.claim(SCOPE, [item(2)], token=OURS, lease=LEASE)
        store.complete(SCOPE, [item(2)], token=OURS)
        assert store.claim(SCOPE, items(range(5)), token=THEIRS, lease=LEASE) == [NEW, NEW, DUPLICATE, NEW, NEW]

    def test_keys_are_any_sixteen_bytes(self, store: DedupStore) -> None:
        """Neither NUL nor high bytes nor quotes mean anything, in keys, positions, fingerprints and tokens."""
        odd = [Item(key, key[::-1], key[5:12] + b"\x01") for key in ODD_KEYS]
        for number, one in enumerate(odd):
            assert store.claim(SCOPE, odd[number:], token=OTHERS, lease=LEASE) == [NEW] * (len(odd) - number)
            assert store.complete(SCOPE, [one], token=OTHERS) == [True]
        assert store.claim(SCOPE, odd, token=OURS, lease=LEASE) == [DUPLICATE] * len(odd)
        other = [one._replace(fingerprint=b"another!") for one in odd]
        assert store.claim(SCOPE, other, token=OURS, lease=LEASE) == [MISMATCH] * len(odd)

    def test_scopes_are_apart(self, store: DedupStore) -> None:
        """D07: what one scope has claimed, completed or released does not exist in another, however alike their names."""
        for scope in ODD_SCOPES:
            assert store.claim(scope, items(range(3)), token=OURS, lease=LEASE) == [NEW] * 3, scope
            assert store.complete(scope, [item(0)], token=OURS) == [True], scope
            store.release(scope, [item(1)], token=OURS)
        for scope in ODD_SCOPES:
            outcomes = store.claim(scope, items(range(3), place=1), token=THEIRS, lease=LEASE)
            assert outcomes == [DUPLICATE, NEW, IN_PROGRESS], scope

    def test_unknown_ids_are_harmless(self, store: DedupStore) -> None:
        """Completing or releasing what nobody has claimed does nothing, and does nothing to the others in the batch."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=LEASE)
        store.release(SCOPE, [item(2), item(3)], token=OURS)
        assert store.complete(SCOPE, [item(2), item(1), item(3)], token=OURS) == [False, True, False]
        assert store.claim(SCOPE, items([1, 2, 3]), token=THEIRS, lease=LEASE) == [DUPLICATE, NEW, NEW]

    def test_the_same_place_has_the_same_ids(self, rig: Rig) -> None:
        """A store that is opened again knows what the one before it was told."""
        self._needs_processes(rig.store)
        rig.store.claim(SCOPE, items([1, 2]), token=OURS, lease=LEASE)
        rig.store.complete(SCOPE, [item(1)], token=OURS)
        rig.store.close()
        outcomes = rig.open(LONG).claim(SCOPE, items([1, 2, 3], place=1), token=THEIRS, lease=LEASE)
        assert outcomes == [DUPLICATE, IN_PROGRESS, NEW]

    def test_the_retention_is_the_one_that_was_asked_for(self, rig: Rig) -> None:
        """``retention`` says what it was made with."""
        assert rig.store.retention == LONG

    # -- states -----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("takeover", TAKEOVERS)
    def test_somebody_elses_claim_is_in_progress(self, store: DedupStore, takeover: Takeover) -> None:
        """D09: an id that is claimed at another position is neither new nor done, as often as one asks."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=LEASE)
        for _ in range(3):
            assert store.claim(SCOPE, [item(1, place=1)], token=THEIRS, lease=LEASE, takeover=takeover) == [IN_PROGRESS]
        assert store.complete(SCOPE, [item(1)], token=OURS) == [True]

    @pytest.mark.parametrize("takeover", TAKEOVERS)
    def test_a_claim_made_again_with_the_same_token_is_new(self, store: DedupStore, takeover: Takeover) -> None:
        """The owner's own claim is no obstacle for him, so that a call whose answer got lost may be repeated."""
        for place in (0, 0, 1):
            assert store.claim(SCOPE, [item(1, place)], token=OURS, lease=LEASE, takeover=takeover) == [NEW]

    def test_a_claim_made_again_has_the_new_lease(self, rig: Rig, store: DedupStore) -> None:
        """Whoever claims again owns it for the lease that he asked for last."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=rig.unit)
        store.claim(SCOPE, [item(1)], token=OURS, lease=LEASE)
        rig.wait(2)
        assert store.claim(SCOPE, [item(1, place=1)], token=THEIRS, lease=LEASE) == [IN_PROGRESS]

    def test_the_same_record_is_taken_over_at_once(self, store: DedupStore) -> None:
        """A record that comes again at its position lost its owner: nobody waits for the lease."""
        store.claim(SCOPE, items([1, 2]), token=OURS, lease=LEASE)
        assert store.claim(SCOPE, items([1, 2, 3]), token=THEIRS, lease=LEASE) == [TAKEN_OVER, TAKEN_OVER, NEW]

    def test_takeover_by_lease_waits_for_the_lease(self, rig: Rig, store: DedupStore) -> None:
        """With ``takeover="lease"`` the position is no reason, and the end of the lease is."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=LEASE)
        assert store.claim(SCOPE, [item(1)], token=THEIRS, lease=LEASE, takeover="lease") == [IN_PROGRESS]
        store.claim(SCOPE, [item(2)], token=OURS, lease=rig.unit)
        rig.wait(2)
        assert store.claim(SCOPE, [item(2)], token=THEIRS, lease=LEASE, takeover="lease") == [TAKEN_OVER]

    @pytest.mark.parametrize("takeover", TAKEOVERS)
    def test_a_lapsed_lease_is_taken_over(self, rig: Rig, store: DedupStore, takeover: Takeover) -> None:
        """Anybody may have a claim whose lease is over, at any position, and no other."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=rig.unit)
        store.claim(SCOPE, [item(2)], token=OURS, lease=LEASE)
        rig.wait(2)
        claimed = store.claim(SCOPE, items([1, 2], place=1), token=THEIRS, lease=LEASE, takeover=takeover)
        assert claimed == [TAKEN_OVER, IN_PROGRESS]

    def test_a_takeover_replaces_token_position_and_lease(self, rig: Rig, store: DedupStore) -> None:
        """The former owner's position and lease mean nothing any more."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=rig.unit)
        rig.wait(2)
        store.claim(SCOPE, [item(1, place=1)], token=THEIRS, lease=LEASE)
        assert store.claim(SCOPE, [item(1)], token=OTHERS, lease=LEASE) == [IN_PROGRESS]
        assert store.claim(SCOPE, [item(1, place=1)], token=OTHERS, lease=LEASE) == [TAKEN_OVER]

    @pytest.mark.parametrize("by", ["position", "lease"])
    def test_the_former_owner_cannot_complete(self, rig: Rig, store: DedupStore, by: str) -> None:
        """D04: after a takeover only the new owner's word counts."""
        self._take_over(rig, store, by)
        assert store.complete(SCOPE, [item(1)], token=OURS) == [False]
        assert store.claim(SCOPE, [item(1, place=2)], token=OTHERS, lease=LEASE) == [IN_PROGRESS]
        assert store.complete(SCOPE, [item(1)], token=THEIRS) == [True]

    @pytest.mark.parametrize("by", ["position", "lease"])
    def test_the_former_owner_cannot_release(self, rig: Rig, store: DedupStore, by: str) -> None:
        """D04: a release that comes late does not free what another one handles."""
        self._take_over(rig, store, by)
        store.release(SCOPE, [item(1)], token=OURS)
        assert store.claim(SCOPE, [item(1, place=2)], token=OTHERS, lease=LEASE) == [IN_PROGRESS]
        assert store.complete(SCOPE, [item(1)], token=THEIRS) == [True]

    @staticmethod
    def _take_over(rig: Rig, store: DedupStore, by: str) -> None:
        store.claim(SCOPE, [item(1)], token=OURS, lease=LEASE if by == "position" else rig.unit)
        if by == "lease":
            rig.wait(2)
        assert store.claim(SCOPE, [item(1, place=int(by == "lease"))], token=THEIRS, lease=LEASE) == [TAKEN_OVER]

    def test_a_late_owner_completes_what_nobody_took(self, rig: Rig, store: DedupStore) -> None:
        """A lease that is over while nobody else came takes nothing away: the effect has happened, and is recorded."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=rig.unit)
        rig.wait(2)
        assert store.complete(SCOPE, [item(1)], token=OURS) == [True]
        assert store.claim(SCOPE, [item(1)], token=THEIRS, lease=LEASE) == [DUPLICATE]

    def test_completing_without_a_claim_is_refused(self, store: DedupStore) -> None:
        """What nobody claimed, or what was released, is not completed by a word."""
        assert store.complete(SCOPE, [item(1)], token=OURS) == [False]
        store.claim(SCOPE, [item(2)], token=OURS, lease=LEASE)
        store.release(SCOPE, [item(2)], token=OURS)
        assert store.complete(SCOPE, [item(2)], token=OURS) == [False]
        assert store.claim(SCOPE, items([1, 2]), token=THEIRS, lease=LEASE) == [NEW, NEW]

    def test_completing_somebody_elses_claim_is_refused(self, store: DedupStore) -> None:
        """The token says whose it is."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=LEASE)
        assert store.complete(SCOPE, [item(1)], token=THEIRS) == [False]
        assert store.complete(SCOPE, [item(1)], token=OURS) == [True]

    def test_completing_again_is_completing_once(self, store: DedupStore) -> None:
        """What is completed stays so, and the answer is whether it is, whoever asks."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=LEASE)
        assert [store.complete(SCOPE, [item(1)], token=token) for token in (OURS, OURS, THEIRS)] == [[True]] * 3
        assert store.claim(SCOPE, [item(1)], token=OTHERS, lease=LEASE) == [DUPLICATE]

    @pytest.mark.parametrize("takeover", TAKEOVERS)
    def test_completed_is_a_duplicate_for_everybody(self, store: DedupStore, takeover: Takeover) -> None:
        """Also for the owner, and at the same position."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=LEASE)
        store.complete(SCOPE, [item(1)], token=OURS)
        for token, place in ((OURS, 0), (OURS, 1), (THEIRS, 0), (THEIRS, 1)):
            assert store.claim(SCOPE, [item(1, place)], token=token, lease=LEASE, takeover=takeover) == [DUPLICATE]

    def test_released_is_new(self, store: DedupStore) -> None:
        """A handler that failed leaves nothing behind: the retry is not dropped as a duplicate (D02)."""
        store.claim(SCOPE, items([1, 2]), token=OURS, lease=LEASE)
        store.release(SCOPE, [item(1)], token=OURS)
        assert store.claim(SCOPE, items([1, 2], place=1), token=THEIRS, lease=LEASE) == [NEW, IN_PROGRESS]

    def test_completed_is_not_released(self, store: DedupStore) -> None:
        """A release that comes after the completion, also by the same owner, forgets nothing."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=LEASE)
        store.complete(SCOPE, [item(1)], token=OURS)
        for token in (OURS, THEIRS):
            store.release(SCOPE, [item(1)], token=token)
        assert store.claim(SCOPE, [item(1)], token=THEIRS, lease=LEASE) == [DUPLICATE]

    def test_another_fingerprint_is_a_mismatch_once_completed(self, store: DedupStore) -> None:
        """D08: two different messages with one id are noticed, where both fingerprints are known."""
        store.claim(SCOPE, [item(1, 0, b"one-----")], token=OURS, lease=LEASE)
        assert store.claim(SCOPE, [item(1, 1, b"other---")], token=THEIRS, lease=LEASE) == [IN_PROGRESS]
        store.complete(SCOPE, [item(1, 0, b"one-----")], token=OURS)
        answers = [
            store.claim(SCOPE, [item(1, 0, fingerprint)], token=THEIRS, lease=LEASE)[0]
            for fingerprint in (b"one-----", b"other---", b"", b"one-----")
        ]
        assert answers == [DUPLICATE, MISMATCH, DUPLICATE, DUPLICATE]

    def test_without_a_fingerprint_nothing_is_compared(self, store: DedupStore) -> None:
        """An id that was completed without one is a duplicate of every message with that id."""
        store.claim(SCOPE, [item(1)], token=OURS, lease=LEASE)
        store.complete(SCOPE, [item(1)], token=OURS)
        assert store.claim(SCOPE, [item(1, 0, b"some----")], token=THEIRS, lease=LEASE) == [DUPLICATE]

    # -- time -------------------------------------------------------------------------------------------------------------

    def test_retention_begins_with_the_completion(self, rig: Rig) -> None:
        """D05: time spent in the handler is not taken off the time for which an id is remembered."""
        store = rig.remembering(8)
        store.claim(SCOPE, [item(1)], token=OURS, lease=LEASE)
        rig.wait(9)
        began = time.monotonic()
        assert store.complete(SCOPE, [item(1)], token=OURS) == [True]
        rig.wait(0 if not rig.virtual else 7)
        outcome = store.claim(SCOPE, [item(1)], token=THEIRS, lease=LEASE)
        if not rig.virtual and time.monotonic() - began > 7 * rig.unit:
            pytest.skip("this machine was too slow to see it within the retention")
        assert outcome == [DUPLICATE]

    def test_an_id_is_new_again_after_its_retention(self, rig: Rig) -> None:
        """D18: nothing is remembered for ever. Three times the retention is enough for everybody, after a purge."""
        store = rig.remembering(3)
        store.claim(SCOPE, items([1, 2]), token=OURS, lease=LEASE)
        store.complete(SCOPE, items([1, 2]), token=OURS)
        rig.wait(10)
        assert store.purge() >= 0
        assert store.claim(SCOPE, items([1, 2]), token=THEIRS, lease=LEASE) == [NEW, NEW]
        assert store.complete(SCOPE, [item(1)], token=THEIRS) == [True]

    def test_purge_leaves_what_is_alive(self, rig: Rig) -> None:
        """Neither a claim with a lease nor an id within its retention is removed, however often it is called."""
        rig.store.claim(SCOPE, items([1, 2]), token=OURS, lease=LEASE)
        rig.store.complete(SCOPE, [item(1)], token=OURS)
        rig.wait(1)
        for _ in range(5):
            rig.store.purge()
            rig.store.purge(limit=1)
        assert rig.store.claim(SCOPE, items([1, 2], place=1), token=THEIRS, lease=LEASE) == [DUPLICATE, IN_PROGRESS]
        assert rig.store.complete(SCOPE, [item(2)], token=OURS) == [True]

    def test_any_sequence_of_calls_answers_like_the_model(self, rig: Rig) -> None:
        """Calls of all kinds in any order, with time in between, against a model of a few lines (Hypothesis)."""
        if not rig.virtual:
            pytest.skip("its clock is the server's: the model has a virtual one")
        pytest.importorskip("hypothesis", reason="the model test needs hypothesis")
        from .models import try_store  # noqa: PLC0415 - only users of this test have hypothesis

        directory = rig.place.parent
        try_store(lambda retention, clock: self.make_store(directory / fresh_name(), retention, clock))

    # -- several at once --------------------------------------------------------------------------------------------------

    def test_of_many_threads_one_claims_an_id(self, store: DedupStore) -> None:
        """D01: eight threads, overlapping batches in different orders: each id is NEW once, and nobody waits for ever."""
        found = in_threads(8, lambda number: self._contend(store, number), self.patience)
        assert_each_once([line for lines in found for line in lines])

    def test_of_many_processes_one_claims_an_id(self, rig: Rig) -> None:
        """D01, D14: the same with four processes, each with its own store."""
        self._needs_processes(rig.store)
        in_processes(self, "together", self._contend_in_process, rig.place, count=4, patience=self.patience)
        assert_each_once([line for number in range(4) for line in Journal(rig.place, number).read()])

    def _contend_in_process(self, place: Path, number: int, ready: Callable[[], None]) -> None:
        store = self.make_store(place, LONG, time.time)
        try:
            store.claim(SCOPE, [item(WARM_UP + number)], token=OURS, lease=LEASE)  # connected, and with a schema
            ready()
            Journal(place, number).write(self._contend(store, number))
        finally:
            store.close()

    def _contend(self, store: DedupStore, worker: int) -> list[tuple[str, int]]:
        """Claim and complete until all ids are done by somebody. Returns what this worker claimed and completed."""
        order, token = random.Random(worker), bytes([worker + 1]) * 16  # noqa: S311
        left, log, until = list(range(IDS)), list[tuple[str, int]](), time.monotonic() + self.patience
        while left:
            assert time.monotonic() < until, f"{len(left)} ids are still in progress after {self.patience} s"
            order.shuffle(left)
            for batch in [left[start : start + 40] for start in range(0, len(left), 40)]:
                outcomes = store.claim(SCOPE, items(batch, place=worker), token=token, lease=LEASE)
                mine = [number for number, outcome in zip(batch, outcomes, strict=True) if outcome is NEW]
                done = store.complete(SCOPE, items(mine, place=worker), token=token)
                log += [(outcome.name, number) for number, outcome in zip(batch, outcomes, strict=True)]
                log += [("completed" if one else "lost", number) for number, one in zip(mine, done, strict=True)]
            left = sorted(set(left) - {number for name, number in log if name in {"DUPLICATE", "completed"}})
        return log

    # -- kills ------------------------------------------------------------------------------------------------------------

    def test_a_killed_process_loses_nothing_and_blocks_nothing(self, rig: Rig) -> None:
        """D02, D09: after twenty SIGKILLs no completed id is new, and what was in hand is claimable at its position at once."""
        self._needs_processes(rig.store)
        in_processes(self, "killed", self._live, rig.place, count=20, patience=self.patience)
        log = Journal(rig.place, 0).read()
        known = {number for _, number in log}
        completed: set[int] = set()
        for name, number in log:
            if name == "completed":
                completed.add(number)
            assert name != "IN_PROGRESS", f"id {number} is stuck, although it came again at its position"
            assert number not in completed or name not in {"NEW", "TAKEN_OVER"}, f"id {number} was completed, and is {name}"
        assert completed
        after = dict(zip(sorted(known), rig.store.claim(SCOPE, items(sorted(known)), token=OURS, lease=LEASE), strict=True))
        assert {after[number] for number in completed} == {DUPLICATE}
        assert IN_PROGRESS not in after.values()

    def _live(self, place: Path, life: int, ready: Callable[[], None]) -> None:
        """Handle ids without end, from where the last life got to."""
        journal, token = Journal(place, 0), bytes([life + 1]) * 16
        begun = max((number for _, number in journal.read()), default=-1)
        store = self.make_store(place, LONG, time.time)
        store.claim(SCOPE, [item(WARM_UP + life)], token=token, lease=LEASE)
        ready()
        for start in range(max(0, begun // 50 * 50 - 50), 10_000_000, 50):
            batch = list(range(start, start + 50))
            outcomes = store.claim(SCOPE, items(batch), token=token, lease=LEASE)
            journal.write([(outcome.name, number) for number, outcome in zip(batch, outcomes, strict=True)])
            mine = [number for number, outcome in zip(batch, outcomes, strict=True) if outcome in {NEW, TAKEN_OVER}]
            done = store.complete(SCOPE, items(mine), token=token)
            journal.write([("completed" if one else "lost", number) for number, one in zip(mine, done, strict=True)])

    @staticmethod
    def _needs_processes(store: DedupStore) -> None:
        if store.capabilities.durable == "none" and not store.capabilities.shared:
            pytest.skip("its ids are in the memory of one process")

    # -- answers that get lost ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", range(3))
    def test_a_call_whose_answer_got_lost_may_be_made_again(self, store: DedupStore, seed: int) -> None:
        """D16, D17: calls that raise before or after they did their work, repeated: NEW again, True again, nothing twice."""
        faulty = _Faulty(random.Random(seed))  # noqa: S311
        for start in range(0, 100, 10):
            batch = items(range(start, start + 10))
            assert faulty(store.claim, SCOPE, batch, token=OURS, lease=LEASE) == [NEW] * 10
            assert faulty(store.complete, SCOPE, batch[:5], token=OURS) == [True] * 5
            faulty(store.release, SCOPE, batch[5:], token=OURS)
        assert faulty.lost
        outcomes = store.claim(SCOPE, items(range(100), place=1), token=THEIRS, lease=LEASE)
        assert outcomes == ([DUPLICATE] * 5 + [NEW] * 5) * 10


class _Faulty:
    """Makes a call until it answers. Some attempts raise before they do their work, and some after."""

    def __init__(self, chance: random.Random) -> None:
        self.lost = 0
        self._chance = chance

    def __call__(self, call: Callable[..., object], *args: object, **named: object) -> object:
        while True:
            try:
                return self._once(call, *args, **named)
            except StoreUnavailable:
                self.lost += 1

    def _once(self, call: Callable[..., object], *args: object, **named: object) -> object:
        fault = self._chance.choice(("before", "after", "none"))
        if fault == "before":
            raise StoreUnavailable("a time-out: it was not asked")
        answer = call(*args, **named)
        if fault == "after":
            raise StoreUnavailable("a time-out: its answer got lost")
        return answer


class Journal:
    """What a process did, line by line, in a file that survives it. A line that a kill has cut off was not written."""

    def __init__(self, place: Path, number: int) -> None:
        self._path = place.with_name(f"{place.name}.journal.{number}")

    def write(self, lines: Sequence[tuple[str, int]]) -> None:
        """All lines or, killed, the first of them: the kernel looks for signals between two pages of a file."""
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, "".join(["\n", *(f"{name} {number} .\n" for name, number in lines)]).encode())
        os.close(file)

    def read(self) -> list[tuple[str, int]]:
        if not self._path.exists():
            return []
        lines = [line.split() for line in self._path.read_text("utf-8").splitlines() if line.endswith(" .")]
        return [(name, int(number)) for name, number, _ in lines]


def assert_each_once(log: Sequence[tuple[str, int]]) -> None:
    """Every id was claimed by one worker, who completed it; nobody took one over, nobody lost one."""
    counts = Counter(log)
    wrong = {number: counts["NEW", number] for number in range(IDS) if counts["NEW", number] != 1}
    assert not wrong, f"NEW more or less than once: {wrong}"
    assert [counts["completed", number] for number in range(IDS)] == [1] * IDS
    assert not [line for line in log if line[0] in {"TAKEN_OVER", "MISMATCH", "lost"}]
