"""Laws of what a batch comes to when a store has answered, and of how far its offset may move. No broker, no store."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from confluent_kafka import Message
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kafka_guarantees._recognition.claims import Claims, Sorted, Work, sort_out
from kafka_guarantees._recognition.message_ids import MessageIds, Problem
from kafka_guarantees.dedup import MemoryDedupStore
from kafka_guarantees.dedup.contract import Item, Outcome
from kafka_guarantees.dedup.ids import header, key_of, position_of
from kafka_guarantees.errors import MessageIdMissing, MessageIdReused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kafka_guarantees.dedup.contract import DedupStore

MANY = settings(max_examples=150, deadline=None, derandomize=True, database=None)
UNSURE = [Outcome.NEW, Outcome.TAKEN_OVER, Outcome.DUPLICATE, Outcome.IN_PROGRESS]


class Given(NamedTuple):
    """A batch, and what its store answers."""

    partitions: list[tuple[str, int]]
    items: list[Item | None]
    outcomes: dict[bytes, Outcome]


@st.composite
def batches(draw: st.DrawFn) -> Given:
    """Few partitions, ids and contents, so that they meet."""
    contents = draw(st.sampled_from(["f", ["", "f"], ["", "f", "g"]]))
    one = st.tuples(st.integers(0, 1), st.sampled_from([*"abcd", None]), st.sampled_from(contents))
    letters = draw(st.lists(one, min_size=draw(st.sampled_from([0, 6])), max_size=10))
    items = [
        None if name is None else Item(name.encode() * 16, number.to_bytes(16, "big"), content.encode() * 8)
        for number, (_, name, content) in enumerate(letters)
    ]
    kinds = draw(st.sampled_from([[Outcome.NEW], [Outcome.NEW, Outcome.IN_PROGRESS], UNSURE, [*UNSURE, Outcome.MISMATCH]]))
    keys = sorted({item.key for item in items if item is not None})
    outcomes = {key: draw(st.sampled_from(kinds)) for key in keys}
    return Given([("topic", partition) for partition, _, _ in letters], items, outcomes)


def before_stop(given: Given, done: Sorted) -> range:
    return range(len(given.items) if done.stop is None else done.stop)


# -- which messages are handled, left out, or wait ------------------------------------------------------------------------


@MANY
@given(batches())
def test_every_message_is_in_hand_or_given_back_or_behind_the_stop(batch: Given) -> None:
    """Once, and in the order of the batch; what is fresh is in hand."""
    done = sort_out(*batch)
    assert sorted([*done.kept, *done.held]) == list(before_stop(batch, done))
    for places in (done.kept, done.held, done.fresh):
        assert list(places) == sorted(places)
    assert set(done.fresh) <= set(done.kept)


@MANY
@given(batches())
def test_nothing_is_in_hand_behind_a_message_of_its_partition_that_is_given_back(batch: Given) -> None:
    """D09, D20: the offset must not pass it."""
    done = sort_out(*batch)
    for place in done.kept:
        assert not any(batch.partitions[held] == batch.partitions[place] for held in done.held if held < place)


@MANY
@given(batches())
def test_an_id_in_progress_is_never_in_hand(batch: Given) -> None:
    """D09: it is neither handled nor left out; and nothing is given back without one."""
    done = sort_out(*batch)
    in_hand = [item for place in done.kept if (item := batch.items[place]) is not None]
    assert not any(batch.outcomes[item.key] is Outcome.IN_PROGRESS for item in in_hand)
    if Outcome.IN_PROGRESS not in batch.outcomes.values():
        assert not done.held


@MANY
@given(batches())
def test_of_an_id_that_is_in_hand_the_first_is_handled_unless_it_is_known(batch: Given) -> None:
    """The others are left out, and so is what was completed before; what has no id is always handled."""
    done = sort_out(*batch)
    first: dict[bytes, int] = {}
    for place in done.kept:
        item = batch.items[place]
        if item is None:
            assert place in done.fresh
        else:
            known = batch.outcomes[item.key] is Outcome.DUPLICATE
            assert (place in done.fresh) == (not known and item.key not in first)
            first.setdefault(item.key, place)


BUSY, BEHIND = Item(b"b" * 16, b"1" * 16), Item(b"n" * 16, b"2" * 16)


@MANY
@example(
    Given([("t", 0), ("t", 0), ("t", 1)], [BUSY, BEHIND, BEHIND], {BUSY.key: Outcome.IN_PROGRESS, BEHIND.key: Outcome.NEW})
)
@given(batches())
def test_an_id_is_not_in_hand_once_an_earlier_one_like_it_is_given_back(batch: Given) -> None:
    """In whatever partition: left out there, it would be finished before its first was handled."""
    done = sort_out(*batch)
    for place in done.kept:
        item = batch.items[place]
        earlier = [batch.items[held] for held in done.held if held < place]
        assert item is None or item.key not in {other.key for other in earlier if other is not None}


@MANY
@given(batches())
def test_it_stops_only_before_an_id_that_is_used_for_another_message(batch: Given) -> None:
    """D08: by the answer of the store, or by the fingerprints of two in the batch; and it stops before every such one."""
    done = sort_out(*batch)
    firsts: dict[bytes, bytes] = {}
    for place in done.kept:
        item = batch.items[place]
        if item is not None:
            assert batch.outcomes[item.key] is not Outcome.MISMATCH
            earlier = firsts.setdefault(item.key, item.fingerprint)
            assert not (earlier and item.fingerprint) or earlier == item.fingerprint
    if done.stop is not None:
        item = batch.items[done.stop]
        assert item is not None
        other = firsts.get(item.key, item.fingerprint) != item.fingerprint
        assert other or batch.outcomes[item.key] is Outcome.MISMATCH


# -- how far the offset may move -------------------------------------------------------------------------------------------


@st.composite
def works(draw: st.DrawFn) -> tuple[list[Any], list[int] | None]:
    """Messages, and which are fresh."""
    messages = [f"message {number}" for number in range(draw(st.integers(0, 12)))]
    if draw(st.booleans()):
        return messages, None
    return messages, [place for place in range(len(messages)) if draw(st.booleans())]


@MANY
@given(works(), st.data())
def test_what_is_finished_ends_before_the_first_that_is_not_handled(
    given_work: tuple[list[Any], list[int] | None], data: st.DataObject
) -> None:
    """D20: it is a beginning of the batch, has all that was handled, and nothing fresh besides."""
    messages, places = given_work
    work = Work(messages, places)
    assert list(work.fresh) == (messages if places is None else [messages[place] for place in places])
    handled = data.draw(st.integers(0, len(work.fresh)))
    finished = list(work.finished(handled))
    assert finished == messages[: len(finished)]
    assert [message for message in finished if message in work.fresh] == list(work.fresh[:handled])
    if handled == len(work.fresh):
        assert finished == messages


@MANY
@given(works(), st.data())
def test_the_rest_of_the_rest_is_the_rest(given_work: tuple[list[Any], list[int] | None], data: st.DataObject) -> None:
    """Whatever the portions: each continues where the one before ended, and together they are the batch."""
    messages, places = given_work
    problem = Problem(Message(), MessageIdMissing("the next has none"))
    whole = work = Work(messages, places, problem)
    finished: list[Any] = []
    handled = 0
    while work.fresh:
        step = data.draw(st.integers(1, len(work.fresh)))
        finished += work.finished(step)
        work, handled = work.rest(step), handled + step
        assert finished == whole.finished(handled)
        assert [*finished, *work.messages] == messages
        assert list(work.fresh) == list(whole.fresh[handled:])
        assert list(work.messages) == list(whole.rest(handled).messages)
        assert work.problem is problem  # the reason why the batch ends there is not lost on the way
    assert [*finished, *work.finished(0)] == messages


@MANY
@given(batches())
def test_a_repeat_is_not_finished_before_its_first(batch: Given) -> None:
    """Together: a worker that handles some and dies has committed no id of which none was handled or known."""
    done = sort_out(*batch)
    where = {place: number for number, place in enumerate(done.kept)}
    names: list[Any] = list(done.kept)
    work = Work(names, [where[place] for place in done.fresh])
    for handled in range(len(done.fresh) + 1):
        safe = {item.key for place in done.fresh[:handled] if (item := batch.items[place]) is not None}
        for place in work.finished(handled):
            item = batch.items[place]  # type: ignore[call-overload]  # the messages are places here
            assert item is None or item.key in safe or batch.outcomes[item.key] is Outcome.DUPLICATE


# -- claims ------------------------------------------------------------------------------------------------------------------


class Answers:
    """A store that answers what it is told to, and notes what it is asked."""

    def __init__(self, outcomes: Mapping[bytes, int] | None = None) -> None:
        self.outcomes = outcomes or {}
        self.asked: list[tuple[str, list[bytes]]] = []
        self.places: dict[bytes, bytes] = {}

    def claim(self, _scope: str, items: Sequence[Item], **_named: Any) -> list[int]:
        self.asked.append(("claim", [item.key for item in items]))
        self.places.update((item.key, item.position) for item in items)
        return [self.outcomes.get(item.key, Outcome.NEW) for item in items]

    def complete(self, _scope: str, items: Sequence[Item], **_named: Any) -> list[bool]:
        self.asked.append(("complete", [item.key for item in items]))
        return [True] * len(items)

    def release(self, _scope: str, items: Sequence[Item], **_named: Any) -> None:
        self.asked.append(("release", [item.key for item in items]))


def claims(store: Answers | MemoryDedupStore, counts: Counter[str] | None = None) -> Claims:
    ids = MessageIds(header("id"), "raise", lambda _topic: bytes(16), fingerprint=True)
    kept: Counter[str] = Counter() if counts is None else counts
    made: DedupStore = store  # type: ignore[assignment]  # what Claims does not call is missing
    return Claims(made, ids, "scope", max_poll_interval=300, takeover="position", counts=kept)


def message(name: str | None, offset: int = 0, partition: int = 0, value: bytes | None = None) -> Message:
    headers: Any = None if name is None else [("id", name.encode())]
    content = f"value of {name}".encode() if value is None else value
    return Message(topic="orders", partition=partition, offset=offset, value=content, headers=headers)


def keys(*names: str) -> list[bytes]:
    return [key_of(name) for name in names]


def test_the_store_is_asked_once_for_each_id() -> None:
    """The keys of a call are distinct, each with the place of its first message: that is the one that is handled."""
    store = Answers()
    work, held = claims(store).claim([message(name, number) for number, name in enumerate("abacb")])
    (call,) = store.asked
    assert Counter(call[1]) == Counter(keys("a", "b", "c"))
    assert store.places == {key: position_of(bytes(16), 0, offset) for key, offset in zip(keys(*"abc"), (0, 1, 3), strict=True)}
    assert [m.offset() for m in work.fresh] == [0, 1, 3]
    assert len(work.messages) == 5
    assert list(held) == []


def test_ids_in_hand_are_completed_and_the_others_released() -> None:
    """Of what is fresh, in its order; nothing of what is left out or given back is completed."""
    store = Answers({key_of("b"): Outcome.DUPLICATE})
    tested = claims(store)
    work, _ = tested.claim([message(name, number) for number, name in enumerate("abcd")])
    tested.complete(1, work.finished(1))
    tested.complete(1, work.rest(1).finished(1))
    tested.release()
    assert store.asked[1:] == [("complete", keys("a")), ("complete", keys("c")), ("release", keys("d"))]


def test_what_was_claimed_behind_one_that_is_given_back_is_released_at_once() -> None:
    """Else the next claim of it, elsewhere, would wait for nobody."""
    store = Answers({key_of("busy"): Outcome.IN_PROGRESS})
    work, held = claims(store).claim([message("a", 0), message("busy", 1), message("c", 2), message("x", 0, partition=1)])
    assert [m.offset() for m in held] == [1, 2]
    assert [(m.partition(), m.offset()) for m in work.messages] == [(0, 0), (1, 0)]
    assert store.asked[1:] == [("release", keys("c"))]


def test_what_was_claimed_behind_the_stop_is_released_at_once() -> None:
    """The batch ends there, with the error; the run that comes after it finds them new."""
    store = Answers({key_of("b"): Outcome.MISMATCH})
    work, _ = claims(store).claim([message(name, number) for number, name in enumerate("abcd")])
    assert [m.offset() for m in work.messages] == [0]
    assert store.asked[1][0] == "release"
    assert Counter(store.asked[1][1]) == Counter(keys("c", "d"))
    assert work.problem is not None
    assert work.problem.message.offset() == 1
    assert isinstance(work.problem.error, MessageIdReused)
    assert "offset 1" in str(work.problem.error)


def test_a_message_without_an_id_ends_the_batch_before_it() -> None:
    """Nothing behind it is claimed."""
    store = Answers()
    work, _ = claims(store).claim([message("a", 0), message(None, 1), message("c", 2)])
    assert store.asked == [("claim", keys("a"))]
    assert [m.offset() for m in work.messages] == [0]
    assert work.problem is not None
    assert work.problem.message.offset() == 1
    assert isinstance(work.problem.error, MessageIdMissing)
    assert "offset 1" in str(work.problem.error)


def test_what_becomes_of_messages_is_counted() -> None:
    """Of what is in hand; what waits is not also taken over."""
    answers = {
        "taken": Outcome.TAKEN_OVER,
        "known": Outcome.DUPLICATE,
        "busy": Outcome.IN_PROGRESS,
        "behind": Outcome.TAKEN_OVER,
    }
    store, counts = Answers({key_of(name): outcome for name, outcome in answers.items()}), Counter[str]()
    names = ["new", "taken", "known", "new", "busy", "behind"]
    claims(store, counts).claim([message(name, number) for number, name in enumerate(names)])
    assert counts == Counter({"duplicate": 2, "taken over": 1, "waited for": 2})


def test_a_store_may_answer_with_numbers_but_only_those_of_outcomes() -> None:
    """A store's author may well keep outcomes as numbers; one that nobody knows must not be taken for new."""
    work, _ = claims(Answers({key_of("a"): 3})).claim([message("a", 0), message("b", 1)])
    assert [m.offset() for m in work.fresh] == [1]
    with pytest.raises(ValueError, match="6"):
        claims(Answers({key_of("a"): 6})).claim([message("a")])


def test_a_store_that_answers_for_fewer_is_not_believed() -> None:
    """What an answer belongs to would be a guess."""
    store = Answers()
    store.claim = lambda *_args, **_named: [Outcome.NEW]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="zip"):
        claims(store).claim([message("a"), message("b")])


def test_the_wait_for_an_id_grows_until_something_of_its_partition_is_finished() -> None:
    """Twice as long each time, up to five seconds."""
    tested = claims(Answers())
    busy = [message("a", 7)]
    waits = [tested.rest_for(busy) for _ in range(10)]
    assert waits[:3] == pytest.approx([0.1, 0.2, 0.4])
    assert waits == sorted(waits)
    assert waits[-1] == 5.0
    tested.complete(0, [message("other", 3, partition=1)])
    assert tested.rest_for(busy) == 5.0
    tested.complete(0, [message("before", 6)])
    assert tested.rest_for(busy) == pytest.approx(0.1)


def test_a_claim_of_a_dead_worker_is_found_at_each_place_of_its_id() -> None:
    """D04: the id was sent three times, and its owner died with the last of them; the batch has the others before it."""
    batch = [message("a", 0), message("a", 1), message("b", 2), message("a", 3)]
    with MemoryDedupStore() as store:
        dead = Item(key_of("a"), position_of(bytes(16), 0, 3))
        store.claim("scope", [dead], token=b"d" * 16, lease=1000)
        work, held = claims(store).claim(batch)
    assert (list(work.messages), list(held)) == (batch, [])
    assert list(work.fresh) == [batch[0], batch[2]]


def test_a_claim_of_somebody_else_holds_all_places_of_its_id() -> None:
    """D09: none of them is where the owner has it, so all wait."""
    batch = [message("a", 0), message("a", 1)]
    with MemoryDedupStore() as store:
        store.claim("scope", [Item(key_of("a"), position_of(bytes(16), 0, 9))], token=b"o" * 16, lease=1000)
        work, held = claims(store).claim(batch)
    assert (list(work.messages), list(held)) == ([], batch)


def test_what_was_handled_is_completed_although_another_took_it_and_let_it_go() -> None:
    """A zombie claims a record that is in hand elsewhere, sees that it is not its own any more, and releases it."""
    with MemoryDedupStore() as store:
        counts: Counter[str] = Counter()
        owner = claims(store, counts)
        owner.claim([message("a", 0)])
        same = [Item(key_of("a"), position_of(bytes(16), 0, 0))]
        assert store.claim("scope", same, token=b"z" * 16, lease=1000) == [Outcome.TAKEN_OVER]
        store.release("scope", same, token=b"z" * 16)
        owner.complete(1, [])
        assert store.claim("scope", same, token=b"n" * 16, lease=1000) == [Outcome.DUPLICATE]
    assert counts["lost"] == 1


def test_ids_that_a_store_forgot_are_completed_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """As by FLUSHALL while they are handled: there need not be another member."""
    with MemoryDedupStore() as store:
        counts: Counter[str] = Counter()
        tested = claims(store, counts)
        tested.claim([message("a", 0)])
        store.release("scope", [Item(key_of("a"), b"p" * 16)], token=tested._token)
        tested.complete(1, [])
        assert store.claim("scope", [Item(key_of("a"), b"p" * 16)], token=b"n" * 16, lease=1000) == [Outcome.DUPLICATE]
    assert counts["lost"] == 1
    assert "1 ids were taken over by another member, or forgotten by the store, while" in caplog.text


def test_the_wait_for_an_id_stays_a_number() -> None:
    """After a day of waiting as well: 2.0 ** 1024 is none."""
    asking = claims(Answers())
    assert {asking.rest_for([message("a", 0)]) for _ in range(3000)} <= {0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0}
