"""The laws of inboxes: one effect per message, whatever is thrown, killed, redelivered, or tried by two owners."""

# ruff: noqa: S101, PLR2004 - a suite of tests, which its users inherit

from __future__ import annotations

import random
import time
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import pytest

from kafka_guarantees.dedup.contract import Entry, Source
from kafka_guarantees.dedup.ids import key_of
from kafka_guarantees.errors import MessageIdReused, PartitionFenced, StoreUnavailable, TopicRecreated

from .running import in_processes, in_threads
from .stores import LONG, ODD_KEYS, ODD_SCOPES, SCOPE, difference, fresh_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kafka_guarantees.dedup.contract import Inbox

    from .stores import Clock

ORDERS = Source("orders", b"\x00\xff" * 8, 0)
OTHERS = ORDERS._replace(partition=1)
PAYMENTS = Source("payments", b"\x01" * 16, 0)


class HandlerFailed(BaseException):
    """Not an ``Exception``: whatever leaves the block rolls back, also KeyboardInterrupt."""


def entry(offset: int, key: object = None, source: Source = ORDERS) -> Entry:
    """A message with an id of its own, or with the id of this name; ``""``: without one."""
    name = f"{source.topic}-{source.partition}-{offset}" if key is None else key
    return Entry(source, offset, key_of(str(name)) if name else None)


def some_without_id(offset: int) -> Entry:
    """Every other one has no id, so that only its offset can tell that it was handled."""
    return entry(offset, "" if offset % 2 else None)


def signed(offset: int, key: str, fingerprint: int, source: Source = ORDERS) -> Entry:
    """A message with the id of this name, and one of several fingerprints."""
    return Entry(source, offset, key_of(key), b"\x00\xff'%5d" % fingerprint)


def entries(offsets: Sequence[int], source: Source = ORDERS) -> list[Entry]:
    return [entry(offset, source=source) for offset in offsets]


def text_of(scope: str, one: Entry) -> str:
    return f"{scope}/{one.source.topic}/{one.source.partition}/{one.offset}"


class Desk:
    """The inboxes of one test, their effects, and their time."""

    def __init__(self, suite: InboxConformance, place: Path) -> None:
        self.place = place
        self.suite = suite
        self.unit = 60.0 if suite.clock == "client" else 0.25
        self._now = time.time()
        self._opened: list[Inbox[Any]] = []
        suite.prepare(place)
        self.inbox = self.open(LONG)

    def open(self, retention: timedelta) -> Inbox[Any]:
        self._opened.append(self.suite.make_inbox(self.place, retention, lambda: self._now))
        return self._opened[-1]

    def remembering(self, units: float) -> None:
        """Put another inbox, with this retention, in units, in the place of the one."""
        self.place = self.place.with_name(fresh_name())
        self.suite.prepare(self.place)
        self.inbox = self.open(timedelta(seconds=units * self.unit))

    def wait(self, units: float) -> None:
        if self.suite.clock == "client":
            self._now += units * self.unit
        else:
            time.sleep(units * self.unit)

    def handle(
        self, batch: Sequence[Entry], *, scope: str = SCOPE, handled: int | None = None, error: BaseException | None = None
    ) -> list[int]:
        """One transaction with an effect for each fresh entry, or for the first ``handled``. Returns what was fresh."""
        return handle(self.suite, self.place, self.inbox, scope, batch, handled=handled, error=error)

    def next_offset(self, source: Source = ORDERS, scope: str = SCOPE) -> int | None:
        return self.inbox.start_offsets(scope, [source])[source]

    def effects(self) -> list[str]:
        return sorted(self.suite.effects(self.place))

    def close(self) -> None:
        for inbox in self._opened:
            inbox.close()


def handle(
    suite: InboxConformance,
    place: Path,
    inbox: Inbox[Any],
    scope: str,
    batch: Sequence[Entry],
    *,
    handled: int | None = None,
    error: BaseException | None = None,
) -> list[int]:
    with inbox.transaction(scope, batch) as transaction:
        fresh = list(transaction.fresh)
        for index in fresh[:handled]:
            suite.effect(place, transaction.connection, text_of(scope, batch[index]))
        if handled is not None:
            transaction.finish(handled)
        if error is not None:
            raise error
    return fresh


class InboxConformance:
    """Inherit, write the four methods, and call the class ``Test...``.

    Attributes:
        clock: whose clock the retention of ids goes by: ``"client"``, then ``make_inbox`` gets a virtual one, or ``"server"``.
        patience: seconds in which a test with threads or processes must end.
    """

    clock: Literal["client", "server"] = "client"
    patience = 60.0

    def make_inbox(self, place: Path, retention: timedelta, clock: Clock) -> Inbox[Any]:
        """A new inbox on the database at ``place``, as ``make_store`` of ``DedupStoreConformance``."""
        raise NotImplementedError

    def prepare(self, place: Path) -> None:
        """Make what ``effect`` writes to. Called once for each place, before any inbox."""
        raise NotImplementedError

    def effect(self, place: Path, connection: Any, text: str) -> None:
        """Write ``text`` through the connection of a transaction, as a handler would."""
        raise NotImplementedError

    def effects(self, place: Path) -> list[str]:
        """All that was written and committed, in any order, read by a connection of its own."""
        raise NotImplementedError

    @pytest.fixture
    def desk(self, tmp_path: Path) -> Iterator[Desk]:
        desk = Desk(self, tmp_path / fresh_name())
        try:
            yield desk
        finally:
            desk.close()

    # -- one transaction --------------------------------------------------------------------------------------------------

    def test_effects_and_offsets_are_committed_together(self, desk: Desk) -> None:
        """At the end of the block both are there, and the same messages are not fresh again."""
        batch = entries([5, 6, 7])
        assert desk.next_offset() is None
        assert desk.handle(batch) == [0, 1, 2]
        assert desk.effects() == [text_of(SCOPE, one) for one in batch]
        assert desk.next_offset() == 8
        assert desk.handle(batch) == []
        assert len(desk.effects()) == 3

    @pytest.mark.parametrize("kind", [ValueError, HandlerFailed, StoreUnavailable, GeneratorExit])
    def test_an_exception_undoes_everything(self, desk: Desk, kind: type[BaseException]) -> None:
        """The block's own exception comes out, unchanged; no effect, no offset, no id stays."""
        desk.handle(entries([1]))
        before, error = desk.effects(), kind("the handler's")
        with pytest.raises(kind) as caught:
            desk.handle(entries([2, 3]), error=error)
        assert caught.value is error
        assert (desk.effects(), desk.next_offset()) == (before, 2)
        assert desk.handle(entries([2, 3])) == [0, 1]
        assert desk.handle([entry(9, "orders-0-2")]) == []

    def test_an_exception_after_finish_undoes_everything(self, desk: Desk) -> None:
        """``finish`` is not the commit."""
        with pytest.raises(HandlerFailed):
            desk.handle(entries([1, 2]), handled=2, error=HandlerFailed())
        assert (desk.effects(), desk.next_offset()) == ([], None)
        assert desk.handle(entries([1, 2])) == [0, 1]

    def test_no_entries_are_nothing(self, desk: Desk) -> None:
        """No entries, nothing fresh, no error."""
        assert desk.handle([]) == []
        assert desk.inbox.start_offsets(SCOPE, []) == {}

    @pytest.mark.parametrize("size", [1, 1_000, 10_000])
    def test_batches_have_any_size(self, desk: Desk, size: int) -> None:
        """A transaction of one and of ten thousand messages."""
        batch = entries(range(size))
        for expected in (list(range(size)), []):
            with desk.inbox.transaction(SCOPE, batch) as transaction:
                assert difference(transaction.fresh, expected) is None
        assert desk.next_offset() == size

    # -- what is fresh ----------------------------------------------------------------------------------------------------

    def test_offsets_that_come_again_are_left_out(self, desk: Desk) -> None:
        """What is before the stored offset was handled; what is after it was not."""
        log = [some_without_id(offset) for offset in range(8)]
        desk.handle(log[3:6])
        assert desk.handle(log[4:]) == [2, 3]
        assert desk.next_offset() == 8
        assert len(desk.effects()) == 5

    def test_gaps_in_offsets_mean_nothing(self, desk: Desk) -> None:
        """Compaction and transactions leave holes in a log."""
        assert desk.handle(entries([3, 10, 400])) == [0, 1, 2]
        assert desk.next_offset() == 401
        assert desk.handle(entries([2**40])) == [0]
        assert desk.next_offset() == 2**40 + 1

    def test_ids_that_are_known_are_left_out(self, desk: Desk) -> None:
        """The same event at another offset, in another partition, in another topic: handled once, and passed."""
        desk.handle([entry(0, "event"), entry(1)])
        assert desk.handle([entry(2, "event"), entry(3)]) == [1]
        assert desk.handle([entry(0, "event", OTHERS), entry(1, "event", OTHERS)]) == []
        assert desk.handle([entry(0, "event", PAYMENTS), entry(1, source=PAYMENTS)]) == [1]
        assert [desk.next_offset(source) for source in (ORDERS, OTHERS, PAYMENTS)] == [4, 2, 2]

    def test_of_an_id_that_repeats_in_a_call_the_first_is_fresh(self, desk: Desk) -> None:
        """In one batch too an event is handled once, also when it is in two partitions."""
        batch = [entry(0, "a"), entry(1, "b"), entry(2, "a"), entry(0, "b", OTHERS), entry(1, "c", OTHERS)]
        assert desk.handle(batch) == [0, 1, 4]
        assert [desk.next_offset(source) for source in (ORDERS, OTHERS)] == [3, 2]

    def test_without_a_key_only_the_record_itself_is_recognised(self, desk: Desk) -> None:
        """``key=None``: never a repeat of another, and left out when it comes again."""
        batch = [entry(0, ""), entry(1, ""), entry(0, "", OTHERS)]
        assert desk.handle(batch) == [0, 1, 2]
        assert desk.handle(batch) == []
        assert desk.handle([entry(2, ""), entry(3)]) == [0, 1]

    def test_partitions_and_topics_have_their_own_offsets(self, desk: Desk) -> None:
        """One transaction over several sources advances each of them, and no other."""
        mixed = [entry(10), entry(20, source=OTHERS), entry(11), entry(30, source=PAYMENTS)]
        assert desk.handle(mixed) == [0, 1, 2, 3]
        unknown = PAYMENTS._replace(partition=9)
        expected = {ORDERS: 12, OTHERS: 21, PAYMENTS: 31, unknown: None}
        assert dict(desk.inbox.start_offsets(SCOPE, list(expected))) == expected

    def test_scopes_are_apart(self, desk: Desk) -> None:
        """D07: ids and offsets of one consumer group do not exist for another, however alike their names."""
        batch = entries([1, 2])
        for scope in ODD_SCOPES:
            assert desk.next_offset(scope=scope) is None, scope
            assert desk.handle(batch, scope=scope) == [0, 1], scope
        for scope in ODD_SCOPES:
            assert desk.handle(batch, scope=scope) == [], scope
            assert desk.next_offset(scope=scope) == 3, scope

    def test_keys_are_any_sixteen_bytes(self, desk: Desk) -> None:
        """Neither NUL nor high bytes nor quotes mean anything."""
        odd = [Entry(ORDERS, offset, key) for offset, key in enumerate(ODD_KEYS)]
        assert desk.handle(odd) == list(range(len(odd)))
        again = [one._replace(source=OTHERS) for one in odd]
        assert desk.handle(again) == []

    def test_an_id_of_another_message_is_refused(self, desk: Desk) -> None:
        """D08: known from before, or from the same call, with another fingerprint: an error says which, and nothing is done."""
        desk.handle([signed(0, "a", 1), signed(1, "b", 1)])
        for batch, index in (
            ([signed(2, "c", 1), signed(3, "a", 1), signed(4, "b", 2), signed(5, "c", 1)], 2),
            ([signed(2, "c", 1), signed(0, "d", 1, OTHERS), signed(3, "c", 2), signed(4, "b", 1)], 2),
            ([signed(0, "b", 2, OTHERS)], 0),
        ):
            with pytest.raises(MessageIdReused) as caught:
                desk.handle(batch)
            assert caught.value.index == index
            assert [desk.next_offset(source) for source in (ORDERS, OTHERS)] == [2, None]
            assert len(desk.effects()) == 2
        assert desk.handle([signed(2, "c", 1), signed(3, "a", 1), signed(0, "d", 2, OTHERS)]) == [0, 2]

    def test_what_is_behind_the_offset_is_not_compared(self, desk: Desk) -> None:
        """It was handled, whatever it was."""
        desk.handle([signed(0, "a", 1), signed(1, "b", 1)])
        assert desk.handle([signed(0, "a", 2), signed(1, "c", 1), signed(2, "c", 2)]) == [2]

    def test_without_a_fingerprint_nothing_is_compared(self, desk: Desk) -> None:
        """On either side: neither what is known, nor what comes."""
        desk.handle([signed(0, "a", 1), signed(1, "b", 1)])
        desk.handle([entry(2, "c"), entry(3, "d")])
        assert desk.handle([entry(4, "a"), entry(5, "e"), entry(6, "e")]) == [1]
        assert desk.handle([signed(7, "c", 1), signed(8, "b", 1), signed(9, "f", 1)]) == [2]

    def test_a_fingerprint_is_forgotten_with_its_id(self, desk: Desk) -> None:
        """After the retention, or where it was not handled, an id is free for another message, and has its fingerprint."""
        desk.remembering(3)
        desk.handle([signed(0, "event", 1)])
        desk.handle([signed(1, "left", 1)], handled=0)
        desk.wait(10)
        assert desk.handle([signed(1, "left", 2), signed(0, "event", 2, OTHERS)]) == [0, 1]
        with pytest.raises(MessageIdReused):
            desk.handle([signed(1, "event", 1, OTHERS)])

    # -- a part of it -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("handled", [0, 1, 2, 3])
    def test_what_is_not_handled_comes_again(self, desk: Desk, handled: int) -> None:
        """``finish(k)``: the offset stops before the first that is not handled, and the ids from there on are forgotten."""
        batch = entries([5, 6, 7])
        assert desk.handle(batch, handled=handled) == [0, 1, 2]
        assert desk.next_offset() in ({5, None} if handled == 0 else {5 + handled})
        assert desk.handle(batch) == list(range(handled, 3))
        assert desk.effects() == [text_of(SCOPE, one) for one in batch]

    def test_a_part_is_counted_over_all_partitions(self, desk: Desk) -> None:
        """The first k of ``fresh`` are handled, whichever partition they are of: each stops at its own first that is not."""
        batch = [entry(0), entry(0, source=OTHERS), entry(1), entry(1, source=OTHERS), entry(2, source=OTHERS)]
        assert desk.handle(batch, handled=3) == [0, 1, 2, 3, 4]
        assert [desk.next_offset(source) for source in (ORDERS, OTHERS)] == [2, 1]
        assert desk.handle(batch[3:]) == [0, 1]

    def test_a_repeat_of_what_is_not_handled_is_not_passed(self, desk: Desk) -> None:
        """In the same partition or in another: else nobody would ever handle that event."""
        batch = [entry(0, "a"), entry(1, "b"), entry(2, "b"), entry(0, "b", OTHERS), entry(1, "c", OTHERS)]
        assert desk.handle(batch, handled=1) == [0, 1, 4]
        assert desk.next_offset() == 1
        assert desk.next_offset(OTHERS) in {0, None}
        assert desk.handle(batch[3:]) == [0, 1]
        assert desk.handle(batch[1:3]) == []
        assert len(desk.effects()) == 3

    def test_what_was_known_before_stays_known(self, desk: Desk) -> None:
        """Forgetting the ids of what is not handled forgets none of earlier transactions."""
        desk.handle([entry(0, "old")])
        assert desk.handle([entry(1, "new"), entry(2, "old")], handled=0) == [0]
        assert desk.handle([entry(1, "new"), entry(2, "old")]) == [0]
        assert desk.effects() == [text_of(SCOPE, entry(offset)) for offset in (0, 1)]

    def test_an_old_offset_does_not_go_back(self, desk: Desk) -> None:
        """A transaction of old messages only, or one that handles nothing, leaves the offset where it is."""
        desk.handle(entries([0, 1, 2]))
        desk.handle(entries([0]))
        desk.handle(entries([0, 1, 2, 3]), handled=0)
        assert desk.next_offset() == 3

    # -- another topic ----------------------------------------------------------------------------------------------------

    def test_a_topic_that_was_created_again_is_refused(self, desk: Desk) -> None:
        """D06: its offsets begin anew, so that the old ones would swallow messages."""
        desk.handle(entries([0, 1]))
        again = ORDERS._replace(topic_id=b"\x02" * 16)
        with pytest.raises(TopicRecreated):
            desk.inbox.start_offsets(SCOPE, [OTHERS, again])
        with pytest.raises(TopicRecreated):
            desk.handle(entries([0, 5], source=again))
        assert len(desk.effects()) == 2
        assert desk.next_offset() == 2
        assert desk.next_offset(again, "another scope") is None

    # -- time ---------------------------------------------------------------------------------------------------------------

    def test_an_id_is_forgotten_after_its_retention_and_the_offset_never(self, desk: Desk) -> None:
        """D05, D18: three times the retention and a purge later the id is fresh elsewhere; the record itself never is."""
        desk.remembering(3)
        desk.handle([entry(0, "event")])
        desk.wait(10)
        assert desk.inbox.purge() >= 0
        assert desk.handle([entry(0, "event"), entry(1, "event"), entry(2, "event")]) == [1]
        assert desk.next_offset() == 3

    def test_purge_leaves_what_is_alive(self, desk: Desk) -> None:
        """An id within its retention is known, however often it is called."""
        desk.handle([entry(0, "event")])
        desk.wait(1)
        for _ in range(5):
            desk.inbox.purge()
            desk.inbox.purge(limit=1)
        assert desk.handle([entry(1, "event")]) == []

    # -- two owners -------------------------------------------------------------------------------------------------------

    def test_the_second_owner_writes_nothing_twice(self, desk: Desk) -> None:
        """Two inboxes, one partition: whoever is second finds nothing fresh, or is fenced, and his effects are undone."""
        rival = desk.suite.make_inbox(desk.place, LONG, time.time)
        try:
            batch = [some_without_id(offset) for offset in (0, 1)]
            assert desk.next_offset() is None
            handle(self, desk.place, rival, SCOPE, batch)
            assert desk.handle(batch) == []
            assert desk.next_offset() == rival.start_offsets(SCOPE, [ORDERS])[ORDERS] == 2
        finally:
            rival.close()

    def test_rival_threads_handle_each_message_once(self, desk: Desk) -> None:
        """Four owners of one partition, each with an inbox: one effect per offset; who loses is told, and undone."""
        in_threads(4, lambda number: self._rival(desk.place, number, lambda: None), self.patience)
        assert_one_effect_each(desk, [some_without_id(offset) for offset in range(300)])

    def test_rival_processes_handle_each_message_once(self, desk: Desk) -> None:
        """The same with processes."""
        in_processes(self, "together", self._rival, desk.place, count=4, patience=self.patience)
        assert_one_effect_each(desk, [some_without_id(offset) for offset in range(300)])

    def test_ids_that_meet_in_several_partitions_are_handled_once(self, desk: Desk) -> None:
        """D13: owners of different partitions with the same ids in different orders: one effect per id, and no deadlock."""
        in_processes(self, "together", self._neighbour, desk.place, count=4, patience=self.patience)
        events = Counter(text.rpartition("=")[2] for text in self.effects(desk.place))
        assert events == {str(number): 1 for number in range(200)}

    # -- kills ------------------------------------------------------------------------------------------------------------

    def test_kills_neither_lose_nor_repeat_an_effect(self, desk: Desk) -> None:
        """D02, D03: twenty SIGKILLs, in the handler, in ``finish`` and in the commit: each message has one effect."""
        in_processes(self, "killed", self._live, desk.place, count=20, patience=self.patience)
        until = desk.next_offset()
        assert until, "no life got as far as a commit"
        assert_one_effect_each(desk, [some_without_id(offset) for offset in range(until)])
        assert desk.handle([entry(until), entry(until + 1)]) == [0, 1]

    def _rival(self, place: Path, number: int, ready: Callable[[], None]) -> None:
        """Handle 300 messages, together with others who do the same."""
        sizes, until = random.Random(number), time.monotonic() + self.patience  # noqa: S311
        inbox = self.make_inbox(place, LONG, time.time)
        try:
            inbox.start_offsets(SCOPE, [ORDERS])
            ready()
            start = 0
            while start < 300:
                assert time.monotonic() < until, f"at offset {start} after {self.patience} s"
                batch = [some_without_id(offset) for offset in range(start, min(300, start + sizes.randint(1, 20)))]
                try:
                    handle(self, place, inbox, SCOPE, batch)
                except (PartitionFenced, StoreUnavailable):
                    start = inbox.start_offsets(SCOPE, [ORDERS])[ORDERS] or 0
                else:
                    start = batch[-1].offset + 1
        finally:
            inbox.close()

    def _neighbour(self, place: Path, number: int, ready: Callable[[], None]) -> None:
        """Handle the same 200 events as the others, in a partition and an order of its own."""
        source, chance, until = ORDERS._replace(partition=number), random.Random(number), time.monotonic() + self.patience  # noqa: S311
        events = list(range(200))
        chance.shuffle(events)
        log = [Entry(source, offset, key_of(str(event))) for offset, event in enumerate(events)]
        inbox = self.make_inbox(place, LONG, time.time)
        try:
            inbox.start_offsets(SCOPE, [source])
            ready()
            start = 0
            while start < len(log):
                assert time.monotonic() < until, f"at offset {start} after {self.patience} s"
                batch = log[start : start + 20]
                try:
                    with inbox.transaction(SCOPE, batch) as transaction:
                        for index in transaction.fresh:
                            self.effect(place, transaction.connection, f"{number}={events[start + index]}")
                    start += 20
                except StoreUnavailable:  # also a deadlock that the database ended: the same call again
                    continue
        finally:
            inbox.close()

    def _live(self, place: Path, life: int, ready: Callable[[], None]) -> None:
        """Handle messages without end, from the stored offset on; a few before it come again."""
        inbox, chance = self.make_inbox(place, LONG, time.time), random.Random(life)  # noqa: S311
        start = inbox.start_offsets(SCOPE, [ORDERS])[ORDERS] or 0
        ready()
        while True:
            batch = [some_without_id(offset) for offset in range(max(0, start - 3), start + chance.randint(1, 20))]
            handle(self, place, inbox, SCOPE, batch)
            start = batch[-1].offset + 1

    # -- anything -----------------------------------------------------------------------------------------------------------

    def test_any_sequence_of_transactions_answers_like_the_model(self, desk: Desk) -> None:
        """Batches, repeats, redeliveries, exceptions and parts in any order, against a model of a few lines (Hypothesis)."""
        pytest.importorskip("hypothesis", reason="the model test needs hypothesis")
        from .models import try_inbox  # noqa: PLC0415 - only users of this test have hypothesis

        def deliver(scope: str, batch: Sequence[Entry], handled: int | None, fail: bool) -> list[int] | None:  # noqa: FBT001
            try:
                return desk.handle(batch, scope=scope, handled=handled, error=HandlerFailed() if fail else None)
            except HandlerFailed:
                return None

        try_inbox(deliver, lambda scope, source: desk.next_offset(source, scope))
        assert max(Counter(desk.effects()).values()) == 1


def assert_one_effect_each(desk: Desk, handled: Sequence[Entry]) -> None:
    found = Counter(desk.effects())
    expected = {text_of(SCOPE, one) for one in handled}
    assert not expected - set(found), "messages without an effect"
    assert not set(found) - expected, "effects of messages that are not passed"
    assert max(found.values()) == 1, "messages with two effects"
