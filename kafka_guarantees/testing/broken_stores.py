"""Stores and inboxes with one mistake each, as real ones had. The conformance suite must fail for every one of them.

Each is the reference with a part replaced, so that nothing else can be the reason. ``CAUGHT_BY`` has the test for each mistake.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from kafka_guarantees.dedup.contract import Outcome
from kafka_guarantees.errors import StoreUnavailable

from .conformance.reference import ReferenceInbox, ReferenceStore, ReferenceTransaction, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kafka_guarantees.dedup.contract import Entry, Item, Source, Takeover

    from .conformance.reference import Rows

BETWEEN = 0.002  # seconds: what a round trip takes, so that others come in between

# -- stores ---------------------------------------------------------------------------------------------------------------


class ChecksThenSets(ReferenceStore):
    """D01: reads what is there, and writes in another transaction."""

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        with self.rows(scope) as rows:
            outcomes = [self.outcome(rows.get(item.key), item, token, takeover) for item in items]
        time.sleep(BETWEEN)
        with self.rows(scope) as rows:
            for item, outcome in zip(items, outcomes, strict=True):
                if outcome in {Outcome.NEW, Outcome.TAKEN_OVER}:
                    rows.put(item.key, Row(token, item.position, self.clock() + lease, b""))
        return outcomes


class CompletesForAnybody(ReferenceStore):
    """D04: does not look at the token; so did two stores of Powertools."""

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        with self.rows(scope) as rows:
            owners = {row.token for item in items if (row := rows.get(item.key)) is not None}
        for owner in owners:
            super().complete(scope, items, token=owner)
        return super().complete(scope, items, token=token)


class ReleasesForAnybody(ReferenceStore):
    """D04: does not look at the token."""

    def release(self, scope: str, items: Sequence[Item], *, token: bytes) -> None:  # noqa: ARG002 - that is the mistake
        with self.rows(scope) as rows:
            for item in items:
                row = rows.get(item.key)
                if row is not None and row.token:
                    rows.remove(item.key)


class ReleasesWhatIsCompleted(ReferenceStore):
    """Forgets the id altogether."""

    def release(self, scope: str, items: Sequence[Item], *, token: bytes) -> None:
        with self.rows(scope) as rows:
            for item in items:
                row = rows.get(item.key)
                if row is not None and row.token in {token, b""}:
                    rows.remove(item.key)


class MarksAtTheClaim(ReferenceStore):
    """D02: seen is done; the retry of a failed handler is dropped. So did Watermill's and Spring Integration's."""

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        outcomes = super().claim(scope, items, token=token, lease=lease, takeover=takeover)
        super().complete(scope, items, token=token)
        return outcomes


class ForgetsTheScope(ReferenceStore):
    """D07: one name for all groups; so did NServiceBus with a shared table prefix."""

    @contextmanager
    def rows(self, scope: str) -> Iterator[Rows]:  # noqa: ARG002 - that is the mistake
        with super().rows("") as rows:
            yield rows


class CutsTheScope(ReferenceStore):
    """D07: takes the part before a colon, which may be in the name of a group."""

    @contextmanager
    def rows(self, scope: str) -> Iterator[Rows]:
        with super().rows(scope.partition(":")[0]) as rows:
            yield rows


class RemembersForEver(ReferenceStore):
    """D18: the retention is not used."""

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        self.retention, retention = self.retention * 1000, self.retention
        try:
            return super().complete(scope, items, token=token)
        finally:
            self.retention = retention


class CountsFromTheClaim(ReferenceStore):
    """D05: a slow handler's id is forgotten at once."""

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        with self.rows(scope) as rows:
            before = {item: rows.get(item.key) for item in items}
        done = super().complete(scope, items, token=token)
        with self.rows(scope) as rows:
            for item, row in before.items():
                if row is not None and row.token == token:
                    until = row.until - self.leases[item.key] + self.retention.total_seconds()
                    rows.put(item.key, Row(b"", row.position, until, item.fingerprint))
        return done

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        self.leases = {**getattr(self, "leases", {}), **{item.key: lease for item in items}}
        return super().claim(scope, items, token=token, lease=lease, takeover=takeover)


class DropsTheFingerprint(ReferenceStore):
    """D08: lost at the completion; so did two stores of Powertools."""

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        return super().complete(scope, [item._replace(fingerprint=b"") for item in items], token=token)


class ReportsTheWholeBatch(ReferenceStore):
    """One duplicate, and all are; a bulk insert that fails has said no more. So did Wolverine's."""

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        outcomes = super().claim(scope, items, token=token, lease=lease, takeover=takeover)
        return [Outcome.DUPLICATE] * len(items) if Outcome.DUPLICATE in outcomes else outcomes


class AnswersInItsOwnOrder(ReferenceStore):
    """Sorts the keys against deadlocks, and forgets to sort the answers back."""

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        return super().claim(scope, sorted(items), token=token, lease=lease, takeover=takeover)


class IgnoresThePosition(ReferenceStore):
    """After a crash each partition waits for the lease; so did idemkit's, whose loop then skipped the record."""

    def outcome(self, row: Row | None, item: Item, token: bytes, takeover: Takeover) -> Outcome:  # noqa: ARG002
        return super().outcome(row, item, token, "lease")


class TakesOverAnything(ReferenceStore):
    """A claim that is alive protects nobody."""

    def outcome(self, row: Row | None, item: Item, token: bytes, takeover: Takeover) -> Outcome:
        found = super().outcome(row, item, token, takeover)
        return Outcome.TAKEN_OVER if found is Outcome.IN_PROGRESS else found


class TakesOverDespiteTheLease(ReferenceStore):
    """``takeover="lease"`` is not looked at."""

    def outcome(self, row: Row | None, item: Item, token: bytes, takeover: Takeover) -> Outcome:  # noqa: ARG002
        return super().outcome(row, item, token, "position")


class CallsProgressDone(ReferenceStore):
    """D09: whoever is left out by this is lost, when the other one dies."""

    def outcome(self, row: Row | None, item: Item, token: bytes, takeover: Takeover) -> Outcome:
        found = super().outcome(row, item, token, takeover)
        return Outcome.DUPLICATE if found is Outcome.IN_PROGRESS else found


class DoesNotKnowItsOwner(ReferenceStore):
    """A call that is repeated after a time-out meets its own claim."""

    def outcome(self, row: Row | None, item: Item, token: bytes, takeover: Takeover) -> Outcome:
        mine = row is not None and row.token == token
        return Outcome.IN_PROGRESS if mine else super().outcome(row, item, token, takeover)


class LosesLateCompletions(ReferenceStore):
    """A claim ends with its lease, although nobody came: the effect has happened, and is forgotten."""

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        with self.rows(scope) as rows:
            for item in items:
                row = rows.get(item.key)
                if row is not None and row.token and row.until <= self.clock():
                    rows.remove(item.key)
        return super().complete(scope, items, token=token)


class CompletesLater(ReferenceStore):
    """Keeps completed ids for the next call: a kill in between forgets what was acknowledged."""

    later: tuple[str, Sequence[Item], bytes] | None = None

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        if self.later is not None:
            super().complete(self.later[0], self.later[1], token=self.later[2])
        return super().claim(scope, items, token=token, lease=lease, takeover=takeover)

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        self.later = (scope, items, token)
        return [True] * len(items)


class PurgesEverything(ReferenceStore):
    """Removes what is oldest, whether it is expired or not."""

    def purge(self, *, limit: int = 10_000) -> int:
        clock, self.clock = self.clock, lambda: float("inf")
        try:
            return super().purge(limit=limit)
        finally:
            self.clock = clock


class CutsLongBatches(ReferenceStore):
    """Asks for the first thousand, as much as one statement takes, and believes that the rest is new."""

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        known = super().claim(scope, items[:1000], token=token, lease=lease, takeover=takeover)
        return known + [Outcome.NEW] * len(items[1000:])


class TrustsTheOwner(ReferenceStore):
    """What its owner has completed is new to him: a record that comes again in the same assignment is handled again."""

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        self.owners = {**getattr(self, "owners", {}), **{item.key: token for item in items}}
        return super().complete(scope, items, token=token)

    def outcome(self, row: Row | None, item: Item, token: bytes, takeover: Takeover) -> Outcome:
        mine = row is not None and not row.token and getattr(self, "owners", {}).get(item.key) == token
        return Outcome.NEW if mine else super().outcome(row, item, token, takeover)


class ComparesWithNothing(ReferenceStore):
    """An id that was completed without a fingerprint is called another message."""

    def outcome(self, row: Row | None, item: Item, token: bytes, takeover: Takeover) -> Outcome:
        found = super().outcome(row, item, token, takeover)
        differ = row is not None and row.fingerprint != item.fingerprint
        return Outcome.MISMATCH if found is Outcome.DUPLICATE and differ else found


class CannotDoNothing(ReferenceStore):
    """A statement without rows is an error."""

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        if not items:
            raise StoreUnavailable("syntax error near ()")
        return super().complete(scope, items, token=token)


class HasItsOwnRetention(ReferenceStore):
    """Takes what it was asked for, and keeps to something else."""

    def __init__(self, path: Path, retention: timedelta, clock: Callable[[], float]) -> None:
        super().__init__(path, min(retention, timedelta(hours=1)), clock)


# -- inboxes --------------------------------------------------------------------------------------------------------------


class _WithoutMarks(ReferenceTransaction):
    """Writes neither ids nor offsets; what it does write, others see first."""

    handled: int | None = None

    def finish(self, handled: int | None = None) -> None:
        self.finished = True
        self.handled = handled


class CommitsTheMarksApart(ReferenceInbox):
    """D03: the effects first, then ids and offsets in a transaction of their own: a crash in between repeats the effects."""

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[ReferenceTransaction]:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            self.connection.execute("SAVEPOINT looking")
            transaction = _WithoutMarks(self, scope, entries)
            self.connection.execute("ROLLBACK TO looking")
            yield transaction
            self.commit()
        except BaseException:
            self.rollback()
            raise
        time.sleep(BETWEEN)
        with super().transaction(scope, entries) as marks:
            marks.finish(transaction.handled)


class MarksBeforeTheEffect(ReferenceInbox):
    """D02: ids and offsets first, then the effects: a crash in between loses them."""

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[ReferenceTransaction]:
        with super().transaction(scope, entries) as marks:
            transaction = _WithoutMarks(self, scope, [])
            transaction.fresh = marks.fresh
        time.sleep(BETWEEN)
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield transaction
            self.commit()
        except BaseException:
            self.rollback()
            raise


class AdvancesAlthoughRolledBack(ReferenceInbox):
    """An exception undoes the effects, and not the offsets."""

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[ReferenceTransaction]:
        try:
            with super().transaction(scope, entries) as transaction:
                yield transaction
        except BaseException:
            with super().transaction(scope, entries):
                pass
            raise


class ReadsBeforeItLocks(ReferenceInbox):
    """Two owners read the same offset, both handle, and neither is fenced."""

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[ReferenceTransaction]:
        self.read = {one.source: super(ReadsBeforeItLocks, self).next_offset(scope, one.source) for one in entries}
        time.sleep(BETWEEN)
        try:
            with super().transaction(scope, entries) as transaction:
                yield transaction
        finally:
            self.read = {}

    def next_offset(self, scope: str, source: Source) -> int | None:
        read: dict[Source, int | None] = getattr(self, "read", {})
        return read[source] if source in read else super().next_offset(scope, source)

    def advance(self, scope: str, source: Source, before: int | None, end: int) -> None:
        row = (scope, source.topic, source.partition, source.topic_id, max(before or 0, end))
        self.connection.execute("INSERT OR REPLACE INTO inbox_offsets VALUES (?, ?, ?, ?, ?)", row)


class IgnoresIds(ReferenceInbox):
    """Knows offsets only: what was sent twice is handled twice."""

    def remember(self, scope: str, key: bytes, fingerprint: bytes) -> bool:
        return super().remember(scope, key, fingerprint) or True


class IgnoresFingerprints(ReferenceInbox):
    """D08: an id that is used once more for another message swallows that."""

    def differs(self, scope: str, entry: Entry) -> bool:  # noqa: ARG002 - that is its mistake
        return False


class ComparesIdsOnly(ReferenceInbox):
    """A message that was sent twice is an error, where its fingerprint is not known or not asked for."""

    def differs(self, scope: str, entry: Entry) -> bool:
        query = "SELECT 1 FROM inbox_ids WHERE scope = ? AND key = ? AND fingerprint <> ?"
        return bool(self.connection.execute(query, (scope, entry.key, entry.fingerprint)).fetchall())


class IgnoresOffsets(ReferenceInbox):
    """Knows ids only: what has none, or whose id is forgotten, is handled again."""

    def next_offset(self, scope: str, source: Source) -> int | None:
        inside = self.connection.in_transaction
        return super().next_offset(scope, source) if not inside else None

    def advance(self, scope: str, source: Source, before: int | None, end: int) -> None:  # noqa: ARG002 - read wrongly
        super().advance(scope, source, super().next_offset(scope, source), end)


class IgnoresTheTopicId(ReferenceInbox):
    """D06: the offset of a deleted topic swallows the messages of the new one. So did two sinks."""

    def next_offset(self, scope: str, source: Source) -> int | None:
        return super().next_offset(scope, source._replace(topic_id=b""))

    def advance(self, scope: str, source: Source, before: int | None, end: int) -> None:
        super().advance(scope, source._replace(topic_id=b""), before, end)


class RemembersIdsForEver(ReferenceInbox):
    """D18: the retention is not used."""

    def remember(self, scope: str, key: bytes, fingerprint: bytes) -> bool:
        self.retention, retention = self.retention * 1000, self.retention
        try:
            return super().remember(scope, key, fingerprint)
        finally:
            self.retention = retention


class WrapsTheError(ReferenceInbox):
    """Whatever the handler raises becomes an error of the inbox: nobody can tell them apart."""

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[ReferenceTransaction]:
        try:
            with super().transaction(scope, entries) as transaction:
                yield transaction
        except Exception as exc:
            raise StoreUnavailable(f"the transaction was rolled back: {exc}") from exc


class CountsOffsets(ReferenceInbox):
    """Adds how many there were: in a log with gaps the offset falls behind, and what was handled comes again."""

    def advance(self, scope: str, source: Source, before: int | None, end: int) -> None:
        super().advance(scope, source, before, end if before is None else min(end, before + 3))


class HasOneOffsetPerTopic(ReferenceInbox):
    """The offset of one partition is taken for all."""

    def next_offset(self, scope: str, source: Source) -> int | None:
        return super().next_offset(scope, source._replace(partition=0))

    def advance(self, scope: str, source: Source, before: int | None, end: int) -> None:  # noqa: ARG002 - read again
        source = source._replace(partition=0)
        super().advance(scope, source, super().next_offset(scope, source), end)


class AlwaysRollsBack(ReferenceInbox):
    """Forgets the commit, as a driver does that begins transactions by itself."""

    def commit(self) -> None:
        self.rollback()


class TrustsItsMemory(ReferenceInbox):
    """Reads an offset once, and does not see what another owner has done since; nor does the database tell it."""

    def next_offset(self, scope: str, source: Source) -> int | None:
        known: dict[Source, int | None] = self.__dict__.setdefault("known", {})
        if source not in known:
            known[source] = super().next_offset(scope, source)
        return known[source]

    def advance(self, scope: str, source: Source, before: int | None, end: int) -> None:
        self.__dict__["known"][source] = max(before or 0, end)
        row = (scope, source.topic, source.partition, source.topic_id, end)
        self.connection.execute("INSERT OR REPLACE INTO inbox_offsets VALUES (?, ?, ?, ?, ?)", row)


class _PassesAll(ReferenceTransaction):
    def finish(self, handled: int | None = None) -> None:  # noqa: ARG002 - that is the mistake
        super().finish()


class PassesWhatIsNotHandled(ReferenceInbox):
    """``finish(k)`` is taken for ``finish()``: the rest is lost."""

    kind = _PassesAll


class _PassesRepeats(ReferenceTransaction):
    def stays(self, entry: Entry, left: Sequence[Entry]) -> bool:
        return entry in left


class PassesRepeatsOfWhatIsNotHandled(ReferenceInbox):
    """Left out as a repeat of an id that is then forgotten: nobody handles that event."""

    kind = _PassesRepeats


class _KeepsIds(ReferenceTransaction):
    def forget(self, key: bytes) -> None:
        pass


class RemembersWhatIsNotHandled(ReferenceInbox):
    """The offset stops, and the ids stay: the messages come again, and are left out."""

    kind = _KeepsIds


class _ForgetsAll(ReferenceTransaction):
    def finish(self, handled: int | None = None) -> None:
        super().finish(handled)
        for entry in self.entries if handled == 0 else ():
            if entry.key is not None:
                self.forget(entry.key)


class ForgetsWhatWasKnown(ReferenceInbox):
    """``finish(k)`` forgets the ids of earlier transactions too, where they are in the batch once more."""

    kind = _ForgetsAll


# -- who finds out --------------------------------------------------------------------------------------------------------

CAUGHT_BY: dict[type[ReferenceStore | ReferenceInbox], str] = {
    ChecksThenSets: "test_of_many_threads_one_claims_an_id",
    CompletesForAnybody: "test_the_former_owner_cannot_complete",
    ReleasesForAnybody: "test_the_former_owner_cannot_release",
    ReleasesWhatIsCompleted: "test_completed_is_not_released",
    MarksAtTheClaim: "test_released_is_new",
    ForgetsTheScope: "test_scopes_are_apart",
    CutsTheScope: "test_scopes_are_apart",
    RemembersForEver: "test_an_id_is_new_again_after_its_retention",
    CountsFromTheClaim: "test_retention_begins_with_the_completion",
    DropsTheFingerprint: "test_another_fingerprint_is_a_mismatch_once_completed",
    ReportsTheWholeBatch: "test_one_duplicate_does_not_make_the_others_duplicates",
    AnswersInItsOwnOrder: "test_outcomes_come_in_the_order_of_the_items",
    IgnoresThePosition: "test_the_same_record_is_taken_over_at_once",
    TakesOverAnything: "test_a_lapsed_lease_is_taken_over",
    TakesOverDespiteTheLease: "test_takeover_by_lease_waits_for_the_lease",
    CallsProgressDone: "test_somebody_elses_claim_is_in_progress",
    DoesNotKnowItsOwner: "test_a_call_whose_answer_got_lost_may_be_made_again",
    LosesLateCompletions: "test_a_late_owner_completes_what_nobody_took",
    CompletesLater: "test_a_killed_process_loses_nothing_and_blocks_nothing",
    PurgesEverything: "test_purge_leaves_what_is_alive",
    CutsLongBatches: "test_batches_have_any_size",
    TrustsTheOwner: "test_completed_is_a_duplicate_for_everybody",
    ComparesWithNothing: "test_without_a_fingerprint_nothing_is_compared",
    CannotDoNothing: "test_an_empty_batch_is_nothing",
    HasItsOwnRetention: "test_the_retention_is_the_one_that_was_asked_for",
    CommitsTheMarksApart: "test_kills_neither_lose_nor_repeat_an_effect",
    MarksBeforeTheEffect: "test_kills_neither_lose_nor_repeat_an_effect",
    AdvancesAlthoughRolledBack: "test_an_exception_undoes_everything",
    ReadsBeforeItLocks: "test_rival_threads_handle_each_message_once",
    IgnoresIds: "test_ids_that_are_known_are_left_out",
    IgnoresFingerprints: "test_an_id_of_another_message_is_refused",
    ComparesIdsOnly: "test_without_a_fingerprint_nothing_is_compared",
    IgnoresOffsets: "test_offsets_that_come_again_are_left_out",
    IgnoresTheTopicId: "test_a_topic_that_was_created_again_is_refused",
    RemembersIdsForEver: "test_an_id_is_forgotten_after_its_retention_and_the_offset_never",
    CountsOffsets: "test_gaps_in_offsets_mean_nothing",
    HasOneOffsetPerTopic: "test_partitions_and_topics_have_their_own_offsets",
    AlwaysRollsBack: "test_effects_and_offsets_are_committed_together",
    TrustsItsMemory: "test_the_second_owner_writes_nothing_twice",
    WrapsTheError: "test_an_exception_undoes_everything",
    PassesWhatIsNotHandled: "test_what_is_not_handled_comes_again",
    PassesRepeatsOfWhatIsNotHandled: "test_a_repeat_of_what_is_not_handled_is_not_passed",
    RemembersWhatIsNotHandled: "test_what_is_not_handled_comes_again",
    ForgetsWhatWasKnown: "test_what_was_known_before_stays_known",
}
