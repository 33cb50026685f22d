"""Guards of what clients do with messages and records, one by one and without a broker.

Each is removed by a mutant that no other test would notice, or only one that takes its time with a broker.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from kafka_guarantees import (
    AtLeastOnce,
    AtMostOnce,
    BrokerError,
    DeliveryError,
    DeliveryUnknown,
    KafkaGuaranteesError,
    Record,
    StoreUnavailable,
    at_most_once,
)
from kafka_guarantees._at_least_once_run import Run
from kafka_guarantees._batch import Batch
from kafka_guarantees._client import Rarely
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._enqueue import QueueFull, checked_headers, enqueue
from kafka_guarantees._handler_thread import HandlerThread, _finished, handler_thread
from kafka_guarantees._lifecycle import Lifecycle, _in_child, _replaced, _restore
from kafka_guarantees._offsets import Membership
from kafka_guarantees._pace import Pace
from kafka_guarantees._posted import Posted
from kafka_guarantees._producer import SERVE_EVERY, PlainProducer, _note_lost, _serve_once, first_producer, raise_failures
from kafka_guarantees._recognition.claims import Work
from kafka_guarantees._recognition.message_ids import Problem
from kafka_guarantees._threads import Flag
from kafka_guarantees._trail import BEHIND, Portion
from kafka_guarantees.dead_letters.reading import NotRead, TopicReader
from kafka_guarantees.errors import MessageIdMissing
from kafka_guarantees.records import LOST, Delivery, RecordRefused

from .test_commit_overlap import T0, T1, Asked, Scene
from .world import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kafka_guarantees._lifecycle import Itself

DEAD = {"bootstrap.servers": "127.0.0.1:1", "group.id": "group"}


def at(offset: int) -> Message:
    return Message(topic="t", partition=0, offset=offset, value=b"%d" % offset)


MESSAGES = [at(number) for number in range(3)]


# -- at most once ------------------------------------------------------------------------------------------------------------


class Sends:
    """Stands for the producer of a client: notes what it is given."""

    def __init__(self) -> None:
        self.sent: list[bytes | None] = []
        self.refusals: list[Exception] = []
        self.waiting: Exception | None = None
        self.closed = False

    def send(self, record: Record, *, timeout: float | None = None) -> None:
        self.sent.append(cast("bytes | None", record.value))

    def drain(self, _give_up: Callable[[], bool]) -> int:
        return 0

    def raise_refused(self) -> None:
        if self.refusals:
            raise self.refusals.pop()

    def check_waiting(self) -> None:
        if self.waiting is not None:
            raise self.waiting

    def close(self, _timeout: float) -> int:
        self.closed = True
        return 0


class Once:
    """A client with such a producer, whose loop hands out one portion."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.failed: list[tuple[int | None, str]] = []
        options.setdefault("on_error", lambda message, error: self.failed.append((message.offset(), str(error))))
        self.client = AtMostOnce(DEAD, preflight="off", **options)
        self.producer = Sends()
        self.client._producer = cast("Any", self.producer)
        monkeypatch.setattr(self.client, "_portions", lambda *_: (portion for portion in [list(MESSAGES)]))


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Once]]:
    clients: list[Once] = []

    def make(**options: Any) -> Once:
        clients.append(Once(monkeypatch, **options))
        return clients[-1]

    yield make
    for one in clients:
        one.client.close()


def test_a_child_that_returns_into_the_loop_handles_nothing_more(once: Callable[..., Once]) -> None:
    """Y04, M04: the rest of the portion is the parent's. It would be handled twice."""
    one, handled = once(), list[int | None]()

    def handler(message: Message) -> None:
        handled.append(message.offset())
        one.client._lifecycle.forked = True

    one.client.run(["t"], handler)
    one.client._lifecycle.forked = False
    assert handled == [0]


def test_what_was_handled_before_an_interrupt_is_sent(once: Callable[..., Once], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is committed, and not handled again: what it produced would be lost without need."""
    one = once(keep_alive=True)

    def each(_call: object, _messages: object, done: list[list[Record]], _seconds: float) -> None:
        done.append([Record("out", b"0")])
        raise KeyboardInterrupt

    monkeypatch.setattr(one.client._thread, "each", each)
    with pytest.raises(KeyboardInterrupt):
        one.client.run(["t"], lambda _message: None)
    assert one.producer.sent == [b"0"]


@pytest.mark.parametrize("keep_alive", [False, True])
def test_one_that_fails_costs_itself_only(once: Callable[..., Once], keep_alive: bool) -> None:  # noqa: FBT001 - two rows
    """M04: the others of its portion are committed as well, and handled."""
    one = once(keep_alive=keep_alive)

    def handler(message: Message) -> Record:
        if message.offset() == 1:
            raise ValueError("never")
        return Record("out", message.value())

    one.client.run(["t"], handler)
    if one.client._thread is not None:
        one.client._thread.close()
    assert one.failed == [(1, "never")]
    assert one.producer.sent == [b"0", b"2"]


def test_a_batch_of_nothing_is_not_handled(once: Callable[..., Once], monkeypatch: pytest.MonkeyPatch) -> None:
    """S04: none of it could be read. A handler that takes the first of its messages would fail for no reason."""
    one, calls = once(), list[object]()
    monkeypatch.setattr(one.client, "_readable", lambda _messages: [])
    one.client.run_batches(["t"], calls.append)
    assert calls == []


def test_a_handler_that_empties_its_list_takes_nothing_from_the_report(once: Callable[..., Once]) -> None:
    """M04: it is called with a list of its own; all that was in hand goes to on_error, and to the dead letter topic."""
    one = once(dead_letter="letters")

    def handler(messages: Sequence[Message]) -> None:
        cast("list[Message]", messages).clear()
        raise ValueError("no")

    one.client.run_batches(["t"], handler)
    assert one.failed == [(0, "no"), (1, "no"), (2, "no")]
    assert one.producer.sent == [b"0", b"1", b"2"]


def test_what_is_dropped_is_in_the_log_with_the_reason(once: Callable[..., Once], caplog: pytest.LogCaptureFixture) -> None:
    """Also where the handler has not raised, but returned what is no record."""
    once(on_error=None).client.run(["t"], lambda message: cast("Any", message.offset() == 1) or None)
    (line,) = caplog.messages
    assert line.startswith("topic 't' partition 0 offset 1 could not be handled (NotRecords: the handler returned bool: return")
    assert line.endswith("); the message is dropped")


def test_an_on_error_that_raises_costs_no_letter(once: Callable[..., Once]) -> None:
    """Nor the messages behind: it is logged, and the run goes on."""

    def on_error(_message: Message, _error: Exception) -> None:
        raise RuntimeError("for the test")

    one = once(on_error=on_error, dead_letter="letters")

    def handler(message: Message) -> Record:
        if message.offset() == 0:
            raise ValueError("no")
        return Record("out", message.value())

    one.client.run(["t"], handler)
    assert one.producer.sent == [b"0", b"1", b"2"]


@pytest.mark.parametrize("how", ["flush", "close"])
def test_a_refusal_that_came_late_is_told(once: Callable[..., Once], how: str, caplog: pytest.LogCaptureFixture) -> None:
    """P01: at most once nobody waits for reports. An ACL that is missing is said by flush(), or logged by close()."""
    one = once()
    one.producer.refusals.append(DeliveryError("no right to write"))
    if how == "flush":
        with pytest.raises(DeliveryError, match="no right to write"):
            one.client.flush()
    else:
        one.client.close()
        assert "no right to write" in caplog.text


def test_a_close_that_is_refused_closes_nothing(once: Callable[..., Once]) -> None:
    """Y09: it came in a callback. The client is used on, and closed elsewhere."""
    one = once()
    one.producer.waiting = KafkaGuaranteesError("in a callback")
    with pytest.raises(KafkaGuaranteesError, match="in a callback"):
        one.client.close()
    assert not one.client._lifecycle.closed
    assert not one.producer.closed
    one.producer.waiting = None


@pytest.mark.parametrize("make", [AtMostOnce, AtLeastOnce])
def test_close_in_a_child_touches_nothing(make: type[Any]) -> None:
    """Y04: the producer, and what it has to send, is the parent's."""
    client = make(DEAD, preflight="off")
    client._producer = producer = Sends()
    client._lifecycle.forked = True
    client.close()
    assert not producer.closed
    client._lifecycle.forked, client._producer = False, None
    client.close()


@pytest.mark.parametrize("make", [AtMostOnce, AtLeastOnce])
def test_a_client_is_closed_while_nobody_makes_its_producer(make: type[Any]) -> None:
    """P04: a thread that produces first has one by then, which is flushed, or is refused."""
    client, seen = make(DEAD, preflight="off"), list[bool]()

    class Making:
        def __enter__(self) -> None:
            seen.append(client._lifecycle.closed)

        def __exit__(self, *_: object) -> None:
            seen.append(client._lifecycle.closed)

    client._making = Making()
    client.close()
    assert seen == [False, True]


class Taken:
    """Stands for the member of a group, with one batch."""

    without_repeats = staticmethod(GroupConsumer.without_repeats)

    def __init__(self, *, taken: float) -> None:
        self.batch = Batch(list(MESSAGES), b"CGMDv2:\1\0\0\0g\0me\0\0", taken)
        self.rewound: list[list[int | None]] = []
        self.committed = 0
        self.stray = ""
        self.serve_beside = self.resume = lambda *_: None

    def batches(self, *_: object) -> Iterator[Any]:
        yield self.batch

    def rewind(self, messages: Sequence[Message]) -> None:
        self.rewound.append([message.offset() for message in messages])

    def still_ours(self, _batch: object, *, within: float | None = None) -> bool:
        return True

    def commit(self, _offsets: object) -> None:
        self.committed += 1


def portions(client: AtMostOnce, member: Taken) -> Iterator[list[int | None]]:
    for portion in client._portions_of(cast("Any", member), Pace(10, 60), None):
        yield [message.offset() for message in portion]


def test_what_is_late_is_given_back_before_it_is_committed() -> None:
    """C10, M07: the group wants to hear of us. What is not committed is not lost: it is fetched again."""
    member = Taken(taken=time.monotonic())
    with AtMostOnce(DEAD, preflight="off") as client:
        handed = portions(client, member)
        assert next(handed) == [0]
        member.batch.fetched -= 60
        assert list(handed) == []
    assert member.committed == 1
    assert member.rewound == [[1, 2]]


@pytest.mark.parametrize("stray", ["a commit took its time", ""])
def test_nothing_more_is_committed_after_a_stop_or_by_a_member_that_is_to_leave(stray: str) -> None:
    """M07: what is committed and not handled is lost. M02: what it committed last may still come, and set the group back."""
    member = Taken(taken=time.monotonic())
    with AtMostOnce(DEAD, preflight="off") as client:
        handed = portions(client, member)
        assert next(handed) == [0]
        member.stray = stray
        client._lifecycle.stopping = not stray
        assert list(handed) == []
        client._lifecycle.stopping = False
    assert member.committed == 1


def test_the_group_is_served_while_a_handler_has_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """C10: before the first portion is handed out."""
    member = Taken(taken=time.monotonic())
    with AtMostOnce(DEAD, preflight="off", keep_alive=True) as client:
        attended: list[int] = []
        monkeypatch.setattr(client._thread, "attend", lambda *_: attended.append(member.committed))
        assert next(portions(client, member)) == [0]
    assert attended == [0]


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("batches", [True, False])
def test_a_record_is_serialized_once(once: Callable[..., Once], *, keep_alive: bool, batches: bool) -> None:
    """P20: also where that is done in the thread of the handler."""
    one = once(keep_alive=keep_alive, value_serializer=lambda value, _context: b"<%s>" % value)
    if batches:
        one.client.run_batches(["t"], lambda messages: [Record("out", message.value()) for message in messages])
    else:
        one.client.run(["t"], lambda message: Record("out", message.value()))
    if one.client._thread is not None:
        one.client._thread.close()
    assert one.producer.sent == [b"<0>", b"<1>", b"<2>"]


@pytest.mark.parametrize("make", [AtMostOnce, AtLeastOnce])
def test_a_loop_that_cannot_be_is_refused_before_it_begins(make: type[Any]) -> None:
    """Where it is written, and not where somebody asks for its first message."""
    with make(DEAD, preflight="off") as client, pytest.raises(TypeError, match="topics must be a list"):
        client.messages([])


def test_at_most_once_is_strict_about_where_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """M02: a start that is committed late would set the group back, and messages be handled twice."""
    given: list[dict[str, Any]] = []

    class Left(Exception):
        pass

    def member(*_: object, **options: Any) -> None:
        given.append(options)
        raise Left

    monkeypatch.setattr(at_most_once, "GroupConsumer", member)
    with AtMostOnce(DEAD, preflight="off") as client, pytest.raises(Left):
        client.run(["t"], lambda _message: None)
    assert given[0]["strict"] is True


# -- a run at least once -----------------------------------------------------------------------------------------------------


class Group:
    """Stands for the member of a group: what is ours, and what is committed, as a test says."""

    def __init__(self) -> None:
        self.ours = [True]
        self.refusals: list[Exception] = []
        self.committed: list[dict[tuple[str, int], int]] = []
        self.rewound: list[int] = []
        self.gone_silent = False
        self.trail: Any = None
        self.idle: Any = None
        self.resume = self.shares = None
        self.serve_beside: Any = None

    def still_ours(self, _batch: object, *, within: float | None = None) -> bool:
        return self.ours.pop(0) if len(self.ours) > 1 else self.ours[0]

    def membership(self) -> Membership:
        return Membership(1, "me")

    def commit(self, offsets: Iterable[TopicPartition]) -> None:
        self.committed.append({(place.topic, place.partition): place.offset for place in offsets})
        if self.refusals:
            raise self.refusals.pop(0)

    def rewind(self, messages: Sequence[Message]) -> None:
        self.rewound.append(len(messages))

    def in_place(self, messages: Sequence[Message]) -> Sequence[Message]:
        return messages

    def keep_alive(self, _batch: object, _seconds: float) -> None: ...


class Flushes:
    """Stands for the producer of a run."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []
        self.unacknowledged = self.failed = False

    def flush(self, give_up: Callable[[], bool]) -> int:
        self.asked.append(("flush", give_up()))
        return 0

    def begin(self) -> None:
        self.asked.append(("begin", None))

    def failures(self, *, forget: bool, asked: bool) -> list[KafkaGuaranteesError]:
        self.asked.append(("failures", (forget, asked)))
        return []

    def refused(self) -> None:
        pass

    def send_lingering(self) -> None:
        self.asked.append(("send_lingering", None))


class Runs:
    """A run with its surroundings."""

    def __init__(self, *, topic: str | None = None, waits: bool = True, claims: Any = None) -> None:
        self.group, self.producer, self.given_away, self.sent = Group(), Flushes(), list[int](), list[Record]()
        self.lifecycle = Lifecycle("test")
        failures = SimpleNamespace(
            topic=topic,
            closely=False,
            given_away=lambda messages, _batch: self.given_away.append(len(messages)),
            letter=lambda message, _outcome: Record("letters", message.value()),
            in_hand=lambda *_: True,
        )
        recognition = SimpleNamespace(claims=lambda _ids: claims, ids=lambda _ids: None, inbox=None, waits=waits)
        given: Any = (SimpleNamespace(max_poll_interval=300.0), self.lifecycle, self.group, SimpleNamespace(renew=int))
        options: Any = {"failures": failures, "recognition": recognition, "reading": SimpleNamespace(open=len)}
        send = cast("Any", self.sent.append)  # its reports are not looked at
        self.run = Run(*given, **options, thread=None, producer=lambda: cast("Any", self.producer), send=send)
        self.batch: Any = Batch(list(MESSAGES), b"CGMDv2:\1\0\0\0g\0me\0\0", time.monotonic())


def test_claims_lapse_while_the_group_is_served() -> None:
    """D04: a batch that is served may be ours for long, but not what it claimed."""
    runs = Runs()
    pace = Pace(10, 150, served=True)
    assert not runs.run.must_poll(runs.batch, pace)
    runs.batch.fetched -= 151
    assert runs.run.must_poll(runs.batch, pace)


def test_a_stop_gives_the_rest_of_a_batch_back() -> None:
    """It comes again with the next run."""
    runs = Runs()
    runs.lifecycle.stop()
    assert runs.run.must_poll(runs.batch, Pace(10, 150))


def test_brokers_have_their_grace_once_a_handler_has_returned() -> None:
    """Y01: it may take longer than STOP_GRACE after a stop; what it produced is waited for all the same."""
    runs = Runs()
    with runs.lifecycle.running(lambda: None):
        runs.lifecycle.leave(-1.0)
        runs.run.acknowledged()
    assert runs.producer.asked[0] == ("flush", False)


def test_who_is_to_blame_is_looked_for_among_all_that_was_refused_with_it() -> None:
    """P01: another thread may serve the reports of one request, and stand still between two of them. The last one tells."""
    runs, not_written, message = Runs(topic="letters"), list[Any](), Message(topic="out", partition=0)
    beside, to_blame = KafkaError(KafkaError._INVALID_DIFFERENT_RECORD), KafkaError(KafkaError.INVALID_RECORD)
    posted = Posted(not_written)
    posted.sent = 2

    def flush(_give_up: object) -> int:
        while posted.unknown:
            posted.report(to_blame, message)
        return 0

    producer: Any = SimpleNamespace(not_written=not_written, flush=flush, begin=int, failures=lambda **_: not_written[:])
    producer.refused = partial(PlainProducer.refused, producer)
    runs.producer = producer
    runs.run.trail.add(Portion({("t", 0): TopicPartition("t", 0, 1)}, runs.batch, posted, 1))
    posted.report(beside, message)
    with pytest.raises(RecordRefused):
        runs.run.trail.follow(Membership(1, "me"))


@pytest.mark.parametrize("other", [True, False])
def test_only_the_thread_that_runs_forgets_failures(other: bool) -> None:  # noqa: FBT001 - two rows
    """P01: its run must not commit past them; and whoever runs judges what was posted until now."""
    runs = Runs()
    with runs.lifecycle.running(lambda: None):
        if other:
            assert in_thread(runs.run.acknowledged)() is None
        else:
            runs.run.acknowledged()
    assert runs.producer.asked == [("flush", False), ("begin", None), ("failures", (not other, False))]


def test_a_stop_does_not_wait_for_ever_for_a_commit_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes again."""
    monkeypatch.setattr("kafka_guarantees._lifecycle.STOP_GRACE", 0.0)
    runs = Runs()
    runs.group.refusals = [BrokerError("not now")] * 3
    with runs.lifecycle.running(lambda: None):
        runs.lifecycle.stop()
        assert not runs.run.finish(runs.batch, Work(MESSAGES), 2).messages
    assert len(runs.group.committed) == 1


def test_what_was_given_away_is_not_committed_nor_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """X02: nor what trails behind, and may be of the same partition. A handler that is always too slow is told (C10)."""
    runs = Runs()
    runs.run.trail.add(Portion({("t", 0): TopicPartition("t", 0, 1)}, runs.batch, None, 1))
    runs.group.ours = [False]
    assert not runs.run.finish(runs.batch, Work(MESSAGES), 2).messages
    assert runs.group.committed == []
    assert not runs.run.trail._portions
    assert (runs.given_away, runs.group.rewound) == ([2], [3])
    assert "handled again" in caplog.text


def test_what_trails_behind_is_committed_with_what_is_waited_for() -> None:
    """C06: once, and not again by itself: that would set the group back."""
    runs = Runs()
    runs.run.trail.add(Portion({("other", 0): TopicPartition("other", 0, 5)}, runs.batch, None, 1))
    runs.run.finish(runs.batch, Work(MESSAGES), 2)
    runs.run.trail.settle()
    assert runs.group.committed == [{("other", 0): 5, ("t", 0): 2}]


def test_nothing_to_finish_settles_what_trails_behind() -> None:
    """L03: what comes next may fail, and end the run: what was handled before it is committed by then."""
    runs = Runs()
    runs.run.trail.add(Portion({("t", 0): TopicPartition("t", 0, 5)}, runs.batch, None, 1))
    runs.run.finish(runs.batch, Work(MESSAGES), 0)
    assert runs.group.committed == [{("t", 0): 5}]


@pytest.mark.parametrize("owing", ["unacknowledged", "failed"])
def test_what_a_handler_produced_itself_is_waited_for(owing: str) -> None:
    """P01: it is of no portion by itself, and so nothing trails behind it."""
    runs = Runs()
    setattr(runs.producer, owing, True)
    runs.run.finish(runs.batch, Work(MESSAGES), 3, to_the_end=True)
    assert runs.producer.asked[0][0] == "flush"


def test_what_stands_before_a_message_without_an_id_does_not_trail() -> None:
    """D17: the run may end there, and what came before is committed."""
    runs = Runs()
    work = Work(MESSAGES, problem=Problem(at(3), MessageIdMissing("none")))
    runs.run.finish(runs.batch, work, 3, to_the_end=True)
    assert runs.group.committed == [{("t", 0): 3}]


def test_what_lingers_is_sent_while_there_is_nothing_to_handle() -> None:
    """No other record will come to keep it company."""
    runs = Runs()
    runs.group.idle()
    assert runs.producer.asked == [("send_lingering", None)]


def test_what_came_behind_a_message_that_was_set_aside_is_in_hand_next() -> None:
    """D09: it was not before. To fetch it again would take a tenth of a second, for each message that lacks an id."""
    runs = Runs(topic="letters")
    rest = runs.run.get_past(runs.batch, Problem(MESSAGES[1], MessageIdMissing("none")), Pace(10, 150))
    assert [record.value for record in runs.sent] == [b"1"]
    assert runs.group.committed == [{("t", 0): 2}]
    assert (list(rest), runs.group.rewound) == ([MESSAGES[2]], [])


def test_what_came_behind_a_message_that_was_set_aside_late_is_fetched_again() -> None:
    """C10: the group wants to hear of us."""
    runs = Runs(topic="letters")
    runs.batch.fetched -= 151
    rest = runs.run.get_past(runs.batch, Problem(MESSAGES[1], MessageIdMissing("none")), Pace(10, 150))
    assert (list(rest), runs.group.rewound) == ([], [3])


def test_what_is_handled_one_by_one_is_committed_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a crash in a large batch would repeat all of it."""
    runs, clock = Runs(), SimpleNamespace(now=0.0)

    def handle(_messages: Sequence[Message]) -> tuple[int, None]:
        clock.now += 0.6
        return 1, None

    monkeypatch.setattr("kafka_guarantees._at_least_once_run.time", SimpleNamespace(monotonic=lambda: clock.now))
    assert runs.run._each(runs.batch, MESSAGES, handle) == (2, None)


@pytest.mark.parametrize("how", ["end", "leave"])
def test_the_transactions_of_an_inbox_end_with_the_run(how: str) -> None:
    """D13: an open one would hold its locks."""
    runs, ended = Runs(), list[bool]()
    runs.run.portions = cast("Any", SimpleNamespace(end=lambda: ended.append(True)))
    getattr(runs.run, how)()
    assert ended == [True]


def test_what_was_given_away_while_the_store_was_asked_is_not_handled_without_it() -> None:
    """X02: its new owner may be done with it."""

    def down(*_: object) -> None:
        raise StoreUnavailable("for the test")

    runs = Runs(claims=SimpleNamespace(claim=down, unprotected=Work, release=int, tidy=int), waits=False)
    runs.group.ours = [True, False]
    with runs.run.claimed(runs.batch) as work:
        assert not work.messages
    assert runs.group.rewound == [3]


@pytest.mark.parametrize("waits", [True, False])
def test_a_store_that_is_down_at_the_end_of_a_stopped_run(waits: bool) -> None:  # noqa: FBT001 - two rows
    """D16, D17: nothing is handled without its protection, nor committed without its ids, unless the user says so."""

    def down(*_: object) -> None:
        raise StoreUnavailable("for the test")

    claims = SimpleNamespace(
        claim=down, complete=down, unprotected=Work, skip=lambda *_, **__: None, release=int, tidy=int, renew=int
    )
    runs = Runs(claims=claims, waits=waits)
    if waits:
        runs.lifecycle.stop()
        with runs.run.claimed(runs.batch) as work:
            assert not work.messages
    runs.run.finish(runs.batch, Work(MESSAGES), 3)
    assert bool(runs.group.committed) is not waits
    assert bool(runs.group.rewound) is waits


def test_claims_are_renewed_while_a_handler_has_its_own_thread() -> None:
    """D04: it may take longer than a lease."""
    renewed: list[str] = []
    runs = Runs(claims=SimpleNamespace(renew=lambda: renewed.append("claims")))
    runs.group.serve_beside = lambda _batch: renewed.append("membership")
    runs.run._thread = cast("Any", SimpleNamespace(attend=lambda serve, _resume: serve()))
    runs.run._attend(runs.batch)
    assert renewed == ["membership", "claims"]


def test_what_was_given_away_while_it_was_claimed_is_not_handled() -> None:
    """X02: the answer of the store stood still, and the new owner is done with the batch. What is claimed is let go."""
    done: list[str] = []

    def claim(messages: Sequence[Message]) -> tuple[Work, Sequence[Message]]:
        done.append("claim")
        runs.group.ours = [False]
        return Work(messages), ()

    claims = SimpleNamespace(claim=claim, release=lambda: done.append("release"), tidy=int)
    runs = Runs(claims=claims)
    runs.run._recognition.note = lambda **_: None  # type: ignore[method-assign] # what it needs of it
    with runs.run.claimed(runs.batch) as work:
        assert not work.fresh
    assert done == ["claim", "release"]
    assert runs.group.rewound == [3]


def test_claims_are_tidied_up_with_each_batch() -> None:
    """D18: nobody else does it."""
    done: list[str] = []
    claims = SimpleNamespace(
        claim=lambda messages: (Work(messages), ()),
        release=lambda: done.append("release"),
        tidy=lambda: done.append("tidy"),
    )
    runs = Runs(claims=claims)
    runs.run._recognition.note = lambda **_: None  # type: ignore[method-assign] # what it needs of it
    with runs.run.claimed(runs.batch) as work:
        assert len(work.messages) == 3
    assert done == ["release", "tidy"]


# -- records on their way ----------------------------------------------------------------------------------------------------


class Queue:
    """Stands for a C producer whose queue is full, until so many polls have made room."""

    def __init__(self, *, room_after: int = 0, inside: int = 1) -> None:
        self.left, self.inside = room_after, inside
        self.asked: list[str] = []
        self.sent: list[object] = []
        self.headers: object = None

    def __len__(self) -> int:
        return self.inside

    def produce(self, *given: Any) -> None:
        if self.left > 0:
            raise BufferError
        self.sent.append(given[1])
        self.headers = given[7]

    def poll(self, _timeout: float) -> int:
        self.left -= 1
        return 0

    def list_topics(self, topic: str, _timeout: float) -> None:
        self.asked.append(topic)
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))


def put(queue: Queue, record: Record, patience: float, known: set[str] | None = None) -> None:
    serve: Callable[[Callable[[], object]], object] = lambda call: call()  # noqa: E731 - it is given as it is
    enqueue(cast("Any", queue), record, None, lambda waited: waited < patience, known or set(), serve=serve)


def test_who_has_no_patience_looks_once() -> None:
    """P10: what has been reported already makes room, and an event loop need not wait for that."""
    queue = Queue(room_after=1)
    put(queue, Record("t", b"1"), 0)
    assert queue.sent == [b"1"]
    with pytest.raises(QueueFull):
        put(Queue(room_after=2), Record("t", b"1"), 0)


def test_brokers_are_asked_for_partitions_by_who_has_the_time() -> None:
    """Once for each topic, and an answer that does not come is said of the record later. An event loop is not held up."""
    queue, known = Queue(), {"other"}
    for _ in range(2):
        put(queue, Record("t", b"1", partition=0), 5, known)
    assert queue.asked == ["t"]
    put(queue, Record("new", b"1", partition=0), 0, known)
    assert queue.asked == ["t"]
    assert len(queue.sent) == 3


NO_NAME = "x" * 513  # of which librdkafka makes no topic, and list_topics() raises RuntimeError (Metadata.c:388-394)


@pytest.mark.parametrize("partition", [None, 0])
def test_a_name_that_is_too_long_is_the_fault_of_its_record(partition: int | None) -> None:
    """L03: it is refused, or set aside with its message. A RuntimeError would come again after each restart."""
    record = Record(NO_NAME, b"1", partition=partition)
    with AtLeastOnce(DEAD, preflight="off") as client:
        delivery = client.produce(record.topic, record.value, partition=partition)
        with pytest.raises(DeliveryError, match="_INVALID_ARG"):
            delivery.result(5)
        producer = client._producer
        assert producer is not None
        with pytest.raises(DeliveryError, match="_INVALID_ARG"):
            producer.post(record)
        assert not producer._posted.sent
    with AtMostOnce(DEAD, preflight="off") as once_only, pytest.raises(DeliveryError, match="_INVALID_ARG"):
        once_only.produce(record.topic, record.value, partition=partition)


def test_a_run_of_a_name_that_is_too_long_is_refused() -> None:
    """C19: with the reason. A pattern may be as long as it likes: no broker is asked for a topic of that name."""
    with AtLeastOnce(DEAD, preflight="off") as client:
        with pytest.raises(ValueError, match=r"are refused \(_INVALID_ARG: .* Nothing was consumed"):
            client.run([NO_NAME], lambda _message: None)
        threading.Timer(0.2, client.stop).start()
        client.run(["^" + NO_NAME], lambda _message: None)


def test_there_are_no_dead_letters_in_a_topic_of_such_a_name() -> None:
    """Nor is there one to replay to: what a letter says of its origin may be anything."""
    with pytest.raises(NotRead, match="does not exist"):
        TopicReader({"bootstrap.servers": "127.0.0.1:1", "log_level": "0"}, NO_NAME)


def test_a_record_is_too_large_for_an_empty_queue_only() -> None:
    """X21: what empties it in this very moment leaves room for it."""

    class Emptied(Queue):
        def produce(self, *given: Any) -> None:
            try:
                super().produce(*given)
            finally:
                self.inside = self.left - 1

    queue = Emptied(room_after=2, inside=1)
    put(queue, Record("t", b"1"), 5)
    assert queue.sent == [b"1"]
    with pytest.raises(DeliveryError, match="larger than the producer's queue"):
        put(Queue(room_after=5, inside=0), Record("t", b"1"), 5)


@pytest.mark.parametrize("name", ["\udc80", "a\0b", "ä\0"])
def test_a_name_that_would_be_cut_or_crash_is_refused(name: str) -> None:
    """P20: with a lone surrogate librdkafka crashes the process, and a NUL ends a name."""
    with pytest.raises(ValueError, match="header name"):
        checked_headers([(name, b"1")])
    assert checked_headers([("ä", "ö")]) == [("ä", "ö".encode())]


@pytest.fixture
def plain() -> Iterator[PlainProducer]:
    """Of a client that reaches no broker."""
    with AtLeastOnce({**DEAD, "log_level": 0}, preflight="off") as client:
        client._producer = made = PlainProducer(client, client._settings, client._lifecycle)
        yield made
        client._producer = None
        made.closed()
        made._closing.set()
        made.let_go()


def failed(producer: PlainProducer, text: str) -> Delivery:
    delivery = Delivery("t", producer)
    producer.unacknowledged.add(delivery)
    delivery._fail(DeliveryError(text))
    return delivery


def test_a_record_is_noted_before_it_is_sent(plain: PlainProducer) -> None:
    """P01: another thread may serve its report in that moment. It would be missed for ever, or be waited for in vain."""

    def produce(_topic: str, _value: object, _key: object, _partition: int, report: Callable[..., None]) -> None:
        assert report in plain.unacknowledged
        report(None, Message(topic="t", partition=0, offset=7))

    raw, plain.raw = plain.raw, SimpleNamespace(produce=produce)
    assert plain.deliver("t", b"1", None, None, None, None).offset == 7
    plain.raw = raw
    assert not plain.unacknowledged


@pytest.mark.parametrize(("value", "timestamp"), [(b"1", None), (b"1", 5), (bytearray(b"1"), None)])
def test_what_a_signal_handler_raises_says_nothing_of_the_record(
    plain: PlainProducer, monkeypatch: pytest.MonkeyPatch, value: bytes, timestamp: int | None
) -> None:
    """It is in the queue, though callbacks are served behind it: nobody may call it refused, or forget that it is there."""

    def interrupted(*_: object) -> None:
        raise ValueError("of a signal handler")

    monkeypatch.setattr(plain, "serve", interrupted)
    plain._unserved = SERVE_EVERY
    with pytest.raises(ValueError, match="of a signal handler"):
        plain.deliver("t", value, None, None, None, timestamp)
    (queued,) = plain.unacknowledged
    assert not queued.done


@pytest.mark.parametrize(("left", "kind"), [(0, DeliveryError), (3, DeliveryUnknown)])
def test_what_is_not_known_is_said_beside_what_failed(left: int, kind: type[Exception]) -> None:
    """DeliveryError means of all that they were not written."""
    with pytest.raises(kind) as told:
        raise_failures([DeliveryError("too large"), DeliveryError("again")], left, "The rest is safe.")
    assert type(told.value) is kind
    assert ("Of 3 more it is not known" in str(told.value)) is bool(left)


def test_a_portion_whose_record_was_not_taken_is_one(plain: PlainProducer) -> None:
    """P01: nothing was sent for it, and it is not acknowledged: its offsets must not be committed."""
    assert plain.portion() is None
    plain.note(DeliveryError("too large"))
    portion = plain.portion()
    assert portion is not None
    assert portion.failed


def test_nobody_waits_for_a_record_that_was_not_taken(plain: PlainProducer) -> None:
    """P10: no report will come."""

    def refuse(*_: object) -> None:
        raise KafkaException(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE))

    raw, plain.raw = plain.raw, SimpleNamespace(produce=refuse)
    with pytest.raises(DeliveryError):
        plain.post(Record("t", b"1"))
    with pytest.raises(TypeError):
        plain.post(Record("t", cast("Any", 5)))
    plain.raw = raw
    assert not plain._posted.unknown


@pytest.mark.parametrize("why", ["its time", "the queue's time", "a callback", "a stop"])
def test_room_is_waited_for_as_long_as_somebody_has_patience(plain: PlainProducer, why: str) -> None:
    """P10, Y01, Y09: with a timeout of its own, too, nobody waits in a callback, nor for ever in a client that stops."""
    for ask in (plain._patient, lambda waited: plain._patient_for(60.0, waited)):
        assert ask(1.0)
        if why == "its time":
            assert not plain._patient_for(0.5, 1.0)
        elif why == "the queue's time":
            assert not ask(plain.patience + 1)
        elif why == "a callback":
            assert not plain._callbacks.serve(lambda ask=ask: ask(1.0))  # type: ignore[misc] # mypy knows no such lambda
        else:
            with plain._lifecycle.running(lambda: None):
                plain._lifecycle.leave(-1.0)
                assert not ask(1.0)


def test_serving_in_a_callback_does_nothing(plain: PlainProducer) -> None:
    """Y09: it would abort the process; whoever produces in a callback only queues."""
    plain._callbacks.serve(plain.serve)


def test_what_a_run_sends_is_told_to_nobody_beside_it_but_close(plain: PlainProducer) -> None:
    """P01: it may set that aside; and a handler that never returns would leave it untold."""
    plain.not_written.append(DeliveryError("too large"))
    assert plain.failures(forget=False) == []
    plain._lifecycle.closed = True
    assert [str(error) for error in plain.failures(forget=False)] == ["too large"]
    assert plain.not_written  # the run must not commit past it


def test_failures_that_were_waited_for_in_vain_are_counted(plain: PlainProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    """P02: also those that there is no room for; and one that somebody is told of later is not told again."""
    monkeypatch.setattr("kafka_guarantees._producer.ASKED", 2)
    deliveries = [failed(plain, f"number {number}") for number in range(4)]
    for delivery in deliveries:
        delivery._asked = True
    plain.forget_asked()
    assert len(plain.failures(forget=False)) == 4
    kept = next(iter(plain._asked))
    plain.looked_at(kept)
    assert len(plain.failures(forget=True)) == 3
    assert plain.failures(forget=True) == []


def test_a_failure_that_comes_while_others_are_looked_at_is_not_forgotten(plain: PlainProducer) -> None:
    """P01: reports come in other threads."""

    class Late(list[KafkaGuaranteesError]):
        def __getitem__(self, part: Any) -> Any:
            found = super().__getitem__(part)
            if len(self) == 1:
                self.append(DeliveryError("late"))
            return found

    plain.not_written = Late([DeliveryError("early")])
    plain.failed = True
    assert [str(error) for error in plain.failures(forget=True)] == ["early"]
    assert not plain.failed
    assert [str(error) for error in plain.failures(forget=True)] == ["late"]


def test_a_failure_that_was_waited_for_in_vain_is_logged_now_and_then(
    plain: PlainProducer, caplog: pytest.LogCaptureFixture
) -> None:
    """P01: the next record is not to pay for it, but it is said."""
    for _ in range(3):
        failed(plain, "timed out")._asked = True
    plain.forget_asked()
    assert [record.getMessage() for record in caplog.records] == ["timed out It had been waited for in vain."]


def test_an_idle_producer_that_cannot_go_on_says_so(plain: PlainProducer, caplog: pytest.LogCaptureFixture) -> None:
    """P09: the thread that serves it goes on; the next call fails as well."""

    def fatal(_timeout: float) -> None:
        raise KafkaException(KafkaError(KafkaError._FATAL))

    raw, plain.raw = plain.raw, SimpleNamespace(poll=fatal)
    plain._served = -math.inf
    assert _serve_once(plain)
    plain.raw = raw
    assert "the producer cannot go on" in caplog.text


def test_what_other_errors_say_is_not_said_of_the_next_record(plain: PlainProducer, caplog: pytest.LogCaptureFixture) -> None:
    """P07: at most once a record that was lost is logged. A right that is missing is missing for the next, too."""
    report = plain._callbacks.shim("on_delivery", partial(_note_lost, plain._refused, Rarely()))
    report(KafkaError(KafkaError._PURGE_QUEUE), Message(topic="t"))
    assert not caplog.records
    for _ in range(3):
        report(KafkaError(KafkaError._MSG_TIMED_OUT), Message(topic="t"))
    assert [line.getMessage() for line in caplog.records if "topic 't' is lost, or may be" in line.getMessage()] == [
        caplog.records[0].getMessage()
    ]
    plain.raise_refused()
    report(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED), Message(topic="t"))
    with pytest.raises(DeliveryError, match="Grant WRITE on topic 't'"):
        plain.raise_refused()
    plain.raise_refused()


def test_a_run_forgets_what_nobody_knows_of_an_interrupted_one(plain: PlainProducer) -> None:
    """P01: its messages come again. What was certainly not written is told all the same."""
    plain._posted.sent = 1
    posted = plain._posted
    plain.not_written += [DeliveryUnknown("lost"), DeliveryError("too large")]
    plain.abandon()
    posted.report(KafkaError(KafkaError._MSG_TIMED_OUT), Message(topic="t"))
    assert [str(error) for error in plain.not_written] == ["too large"]


def test_a_signal_handler_that_produces_first_shares_the_producer() -> None:
    """P04: of two producers nobody would flush the first."""
    client = AtLeastOnce({**DEAD, "log_level": 0}, preflight="off")

    class Interrupted:
        def __init__(self, *_: object) -> None:
            self.gone = False
            if client._producer is None:
                client._producer = cast("Any", Interrupted.first)
                made.append(self)

        first: Any = SimpleNamespace()

        def closed(self) -> None: ...

        def let_go(self) -> None:
            self.gone = True

    made: list[Interrupted] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kafka_guarantees._producer.PlainProducer", Interrupted)
        assert first_producer(client, client._settings, client._lifecycle) is Interrupted.first
    assert [one.gone for one in made] == [True]
    client._producer = None
    client.close()


def test_brokers_are_met_by_who_makes_the_producer(monkeypatch: pytest.MonkeyPatch) -> None:
    """C19: once, with the first record; and not by who has no time for it."""
    met: list[str] = []
    made: Any = SimpleNamespace(meet=met.append)
    monkeypatch.setattr("kafka_guarantees._producer.PlainProducer", lambda *_: made)
    for topic in ("orders", None):
        client = AtLeastOnce(DEAD, preflight="off")
        for _ in range(2):
            assert first_producer(client, client._settings, client._lifecycle, meet=topic) is made
        client._producer = None
        client.close()
    assert met == ["orders"]


class Reports:
    """Stands for the C producer and the clock of one that waits for reports: each flush takes so long, and leaves so many."""

    def __init__(self, *flushes: tuple[float, int]) -> None:
        self.now = 0.0
        self.flushes = list(flushes)

    def flush(self, _pause: float) -> int:
        seconds, left = self.flushes.pop(0)
        self.now += seconds
        return left

    def poll(self, _timeout: float) -> int:
        return 0


@pytest.mark.parametrize(
    ("flushes", "missing"),
    [
        ([(LOST + 1, 0)], 1),  # the process stood still: it has not looked
        ([(0.0, 1)] * 12 + [(LOST + 1, 0)], 1),  # likewise, after others had something on its way
        ([(LOST, 0)] + [(1.0, 0)] * 12, 0),  # it has looked for a while
        ([(1000.0, 1)], 0),  # others always produce, but this one must have been settled
    ],
)
def test_a_report_is_lost_once_it_cannot_come(
    plain: PlainProducer, monkeypatch: pytest.MonkeyPatch, flushes: list[tuple[float, int]], missing: int
) -> None:
    """P02: whoever waits for it would wait for ever; and a record that is only late is not called unknown."""
    reports = Reports(*flushes)
    clock = SimpleNamespace(monotonic=lambda: reports.now)
    monkeypatch.setattr("kafka_guarantees._producer.time", clock)
    monkeypatch.setattr("kafka_guarantees.records.time", clock)
    raw, plain.raw = plain.raw, reports
    delivery = Delivery("t", plain)
    plain.unacknowledged.add(delivery)
    assert plain.flush(lambda: not reports.flushes) == missing
    assert delivery.done is not bool(missing)
    plain.unacknowledged.clear()
    plain.raw = raw


def test_a_flush_beside_a_run_does_not_wait_for_what_that_sends(plain: PlainProducer) -> None:
    """It may never pause. The run waits for its own."""
    plain._posted.sent = 1
    left: list[int] = []
    with plain._lifecycle.running(lambda: None):
        assert in_thread(lambda: left.append(plain.flush(lambda: True)))() is None
        left.append(plain.flush(lambda: True))
    assert left == [0, 1]
    plain._posted.sent = 0


def test_a_thread_that_waits_to_produce_first_is_told_that_the_client_was_closed() -> None:
    """P04: a producer that is made then nobody would flush."""
    client = AtLeastOnce(DEAD, preflight="off")
    lifecycle = client._lifecycle

    class Closing:
        def __enter__(self) -> None:
            client.close()

        def __exit__(self, *_: object) -> None: ...

    owner: Any = SimpleNamespace(_producer=None, _making=Closing())
    with pytest.raises(KafkaGuaranteesError, match="is closed"):
        first_producer(owner, client._settings, lifecycle)
    assert owner._producer is None


# -- commits that trail behind -----------------------------------------------------------------------------------------------


@pytest.fixture
def scene() -> Scene:
    return Scene()


def unacknowledged() -> Posted:
    posted = Posted([])
    posted.sent = 1
    return posted


class Waits:
    """Stands for the producer: notes whether it is to wait for reports, which do not come."""

    def __init__(self, then: Callable[[Posted], object] = lambda _posted: None) -> None:
        self.given_up: list[bool] = []
        self.then = then

    def wait(self, posted: Posted, give_up: Callable[[], bool]) -> int:
        self.given_up.append(give_up())
        self.then(posted)
        return posted.unknown


def waiting(scene: Scene, then: Callable[[Posted], object] = lambda _posted: None) -> Waits:
    waits = Waits(then)
    scene.trail._producer = lambda: cast("Any", waits)
    return waits


def test_three_portions_may_trail_without_a_wait(scene: Scene) -> None:
    """Where the answer takes no longer than that, no batch pays for it."""
    for offset in range(10, 10 * BEHIND + 1, 10):
        scene.handled((T0, offset))
    scene.trail.follow(scene.group.member)
    assert scene.group.waited == 0


def test_what_is_not_acknowledged_is_flushed_where_there_is_nothing_to_handle(scene: Scene) -> None:
    """Else it would linger, and its offsets with it."""
    flushed: list[bool] = []
    scene.trail._acknowledged = lambda: flushed.append(True)
    scene.handled((T0, 10), posted=unacknowledged())
    scene.trail.idle()
    assert flushed == [True]


@pytest.mark.parametrize("why", ["a child", "no answer"])
@pytest.mark.parametrize("how", ["settle", "end", "leave"])
def test_nobody_commits_for_another_or_behind_a_call_that_is_on(scene: Scene, how: str, why: str) -> None:
    """Y01, Y04: what was handled in the parent is its business; and whoever got no answer waits for no other."""
    asked: list[str] = []

    class Raw(Asked):
        def poll(self, _timeout: float) -> None:
            asked.append("poll")

    if how == "end":
        scene.handled((T0, 10))
        scene.handled((T0, 20))
        scene.trail.settle()
        scene.group.raw = Raw(scene.group)
    else:
        scene.handled((T0, 10), posted=unacknowledged()).posted = None
    sent = len(scene.group.sent)
    if why == "a child" and how != "settle":  # that raises in whatever it asks first
        scene.lifecycle.forked = True
    else:
        scene.group.gone_silent = True
    getattr(scene.trail, how)()
    assert len(scene.group.sent) == sent
    assert not asked


def test_an_error_while_the_last_answers_are_waited_for_ends_no_run(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """C06: the run is over, and what can be committed is."""
    scene.handled((T0, 10))
    scene.handled((T0, 20))
    scene.trail.settle()
    scene.handled((T0, 30), posted=unacknowledged()).posted = None

    class Raw(Asked):
        def poll(self, _timeout: float) -> None:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))

    scene.group.raw = Raw(scene.group)
    scene.trail.end()
    assert scene.group.committed == {T0: 30}
    assert "may be handled again" in caplog.text


def test_a_stop_tries_once_to_commit_where_it_has_waited_long(scene: Scene) -> None:
    """Y01: the brokers are in trouble, and what was handled comes again."""
    scene.handled((T0, 10), posted=unacknowledged()).posted = None
    scene.group.refusal = BrokerError("not now")
    with scene.lifecycle.running(lambda: None):
        scene.lifecycle.leave(-1.0)
        scene.trail.settle()
    assert scene.group.waited == 1


def test_a_record_that_fails_while_it_is_waited_for_ends_the_run(scene: Scene) -> None:
    """P01: its report has come, so that nothing is missing; it says that it was not written."""

    def fail(posted: Posted) -> None:
        posted.fail(DeliveryError("too large"))
        posted.report(None, Message(topic="t", partition=0, offset=1))
        scene.failures.append("too large")

    waiting(scene, fail)
    for offset in range(10, 10 * BEHIND + 11, 10):
        scene.handled((T0, offset), posted=unacknowledged())
    with pytest.raises(DeliveryError):
        scene.trail.follow(scene.group.member)
    assert scene.group.sent == []


@pytest.mark.parametrize("patience", [True, False])
@pytest.mark.parametrize("how", ["follow", "leave", "revoked"])
def test_reports_are_waited_for_as_long_as_somebody_has_patience(scene: Scene, how: str, *, patience: bool) -> None:
    """Y01: a client that stops does not wait for brokers that do not answer."""
    waits = waiting(scene)
    for offset in range(10, 10 * BEHIND + 11, 10):
        scene.handled((T0, offset), posted=unacknowledged())
    with scene.lifecycle.running(lambda: None):
        if not patience:
            scene.lifecycle.leave(-1.0)
        given: Any = {"follow": [scene.group.member], "leave": [], "revoked": [{T0}]}[how]
        getattr(scene.trail, how)(*given)
    assert waits.given_up[0] is not patience


@pytest.mark.parametrize(("how", "limit"), [("leave", "LEAVING"), ("revoked", "GIVING_AWAY")])
def test_nobody_waits_for_reports_for_ever(scene: Scene, monkeypatch: pytest.MonkeyPatch, how: str, limit: str) -> None:
    """C03: the whole group waits for a member that gives partitions away."""
    monkeypatch.setattr(f"kafka_guarantees._trail.{limit}", -1.0)
    waits = waiting(scene)
    scene.handled((T0, 10), posted=unacknowledged())
    getattr(scene.trail, how)(*([{T0}] if how == "revoked" else []))
    assert waits.given_up == [True]


def test_an_error_of_a_partition_does_not_say_that_it_is_committed(scene: Scene) -> None:
    """C06: whatever offset stands beside it."""

    class Unknown(Asked):
        def committed(self, places: list[TopicPartition], _timeout: float) -> list[Any]:  # type: ignore[override]
            error = KafkaError(KafkaError.UNSTABLE_OFFSET_COMMIT)
            return [SimpleNamespace(topic=p.topic, partition=p.partition, offset=99, error=error) for p in places]

    scene.handled((T0, 10), posted=unacknowledged()).posted = None
    scene.group.raw = Unknown(scene.group)
    scene.trail.revoked({T1})
    scene.trail.settle()
    assert scene.group.committed == {T0: 10}


def test_a_commit_that_was_refused_is_said(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """C06: it is tried again, and whoever looks for the reason of repeats finds it."""
    scene.handled((T0, 10))
    scene.group.answer(0, KafkaError(KafkaError.REQUEST_TIMED_OUT))
    assert len(caplog.records) == 1


def test_what_cannot_be_committed_at_the_end_does_not_hide_the_error(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """The run ends with another one, which is raised."""
    scene.handled((T0, 10), posted=unacknowledged()).posted = None
    scene.group.refusal = BrokerError("not now")
    scene.trail.leave()
    assert "may be handled again: not now" in caplog.text
    assert not scene.trail._portions


# -- the life of a client ----------------------------------------------------------------------------------------------------


def test_a_handler_that_returns_does_not_extend_a_close() -> None:
    """close() has said until when it waits."""
    lifecycle = Lifecycle("test")
    with lifecycle.running(lambda: None):
        lifecycle._end_by(time.monotonic() - 1)
        lifecycle.handled()
        assert lifecycle.out_of_patience


def test_a_handler_that_returns_takes_no_time_away() -> None:
    """A loop that is left has longer than STOP_GRACE to commit what was finished."""
    lifecycle = Lifecycle("test")
    with lifecycle.running(lambda: None):
        lifecycle.leave(60.0)
        lifecycle.handled()
        assert (lifecycle._give_up_at or 0) > time.monotonic() + 50


def test_a_stop_without_a_run_takes_no_patience_away() -> None:
    """It is for the next run. A flush() meanwhile waits for its records as ever (P02)."""
    lifecycle = Lifecycle("test")
    lifecycle.leave(-1.0)
    assert not lifecycle.out_of_patience


def test_a_run_after_one_that_was_stopped_has_all_its_patience() -> None:
    """Y01: else it would leave brokers alone that take longer than a moment, and its transactions open."""
    lifecycle = Lifecycle("test")
    with lifecycle.running(lambda: None):
        lifecycle._end_by(time.monotonic() - 1)
        assert lifecycle.out_of_patience
    with lifecycle.running(lambda: None):
        assert not lifecycle.out_of_patience
        lifecycle.leave(-1.0)
        lifecycle.handled()
        assert not lifecycle.out_of_patience


def test_a_run_whose_end_is_interrupted_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Y03: close() in another thread would wait for it until its time is up."""
    lifecycle = Lifecycle("test")

    def interrupted(_flag: Flag) -> None:
        raise KeyboardInterrupt

    def runs() -> None:
        with lifecycle.running(lambda: None):
            monkeypatch.setattr(Flag, "set", interrupted)

    with pytest.raises(KeyboardInterrupt):
        runs()
    assert lifecycle._over.is_set
    assert not lifecycle.in_run


def test_a_handler_that_python_does_not_know_becomes_that_of_the_system() -> None:
    """Another library has installed it: Python cannot put it back, and the run ends all the same."""
    before = signal.getsignal(signal.SIGUSR2)
    try:
        _restore(cast("Any", {signal.SIGUSR2: None}))
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_child_has_the_handlers_of_before_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Y04: a run in the handler of another stands in for the handlers of that one. None of either is the child's."""
    before = signal.getsignal(signal.SIGUSR2)
    handlers = [{signal.SIGUSR2: signal.SIG_IGN}, {signal.SIGUSR2: signal.SIG_DFL}]
    monkeypatch.setattr("kafka_guarantees._lifecycle._replaced", handlers)
    taken = Lifecycle("test")
    turn = taken._turn
    monkeypatch.setattr("kafka_guarantees._lifecycle._alive", [taken])
    try:
        _in_child()
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
        assert (taken.forked, taken.stopping) == (True, True)
        assert taken._turn is not turn, "a thread of the parent may have it"
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_run_stands_in_for_signal_handlers_no_longer_than_it_lasts() -> None:
    """Y04: a child would get handlers back that its parent has replaced since."""
    lifecycle, before = Lifecycle("test"), list(_replaced)
    with lifecycle.running():
        assert len(_replaced) == len(before) + 1
    assert _replaced == before


def test_an_exception_in_the_middle_leaves_no_handler_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Y03: a handler of the user's may raise when one of two is back. Else SIGTERM would ask a run to stop that is over."""
    restored: list[bool] = []

    def interrupted_once(handlers: Any) -> None:
        restored.append(True)
        if len(restored) == 1:
            raise KeyboardInterrupt
        _restore(handlers)

    def runs() -> None:
        with Lifecycle("test").running():
            monkeypatch.setattr("kafka_guarantees._lifecycle._restore", interrupted_once)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        runs()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loop_of_a_thread_that_is_gone_is_not_waited_for() -> None:
    """Nobody will come back to it; close() ends it here."""
    lifecycle, ended = Lifecycle("test"), list[bool]()

    def loop(itself: Itself) -> Iterator[int]:
        with lifecycle.running(itself):
            try:
                yield 1
            finally:
                ended.append(True)

    left = lifecycle.iterate(cast("Any", loop))
    thread = threading.Thread(target=next, args=(left,))
    thread.start()
    thread.join()
    began = time.monotonic()
    assert lifecycle.end_run(20.0)
    assert time.monotonic() - began < 10
    assert ended == [True]


# -- a handler on a thread of its own ----------------------------------------------------------------------------------------


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[HandlerThread]:
    monkeypatch.setattr("kafka_guarantees._handler_thread.SERVE_EVERY", 0.01)
    made = HandlerThread(Lifecycle("test"), 0.05)
    made._served = -math.inf
    yield made
    made.close()


def test_a_handler_that_hangs_is_named_now_and_then(thread: HandlerThread, caplog: pytest.LogCaptureFixture) -> None:
    """C10: the message that it is at, after twice as long each time; nothing else would tell of it."""

    def handler(message: Message) -> list[Record]:
        if message.offset() == 1:
            time.sleep(0.7)
        return []

    thread.each(handler, MESSAGES, [], 60)
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= 10  # and not some seventy
    assert all("partition 0 offset 1" in line for line in lines)


def test_nothing_is_begun_behind_a_handler_that_an_exception_waits_for(thread: HandlerThread) -> None:
    """Y03: whoever asked for the end waits for the one in hand, and not for a whole batch."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    thread.attend(interrupted, lambda: None)
    thread._served = -math.inf
    done: list[list[Record]] = []
    with pytest.raises(KeyboardInterrupt):
        thread.each(lambda _message: time.sleep(0.1) or [], MESSAGES, done, 60)  # type: ignore[func-returns-value]
    assert len(done) == 1


def test_only_what_was_kept_of_these_messages_is_taken(thread: HandlerThread) -> None:
    """L01: a result belongs to its message: what is behind a gap is handled."""
    handled: list[int | None] = []

    def handler(message: Message) -> list[Record]:
        handled.append(message.offset())
        return []

    thread.keep([(MESSAGES[0], []), (MESSAGES[1], [])])
    done: list[list[Record]] = []
    thread.each(handler, [MESSAGES[0], MESSAGES[2]], done, 60)
    assert (len(done), handled) == (1, [])
    thread.each(handler, [MESSAGES[2]], done, 60)
    assert handled == [2]


def test_a_second_ctrl_c_is_not_for_a_handler_on_another_thread() -> None:
    """Y03: it would interrupt whoever serves the group, and the handler would be waited for nevertheless."""
    lifecycle = Lifecycle("test")
    assert lifecycle.interruptible
    assert handler_thread(keep_alive=True, lifecycle=lifecycle, long=1.0) is not None
    assert not lifecycle.interruptible


@pytest.mark.parametrize(
    ("error", "status"),
    [(SystemExit(), 0), (SystemExit(3), 3), (SystemExit("no"), 1), (ValueError("no"), 1), (KeyboardInterrupt(), 1), (None, 1)],
)
def test_a_child_of_a_handler_ends_with_its_own_status(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, status: int
) -> None:
    """Y04: whoever waits for it is told the truth; one that comes back from the handler has failed."""
    processes, exits = iter([1, 2]), list[int]()
    system = SimpleNamespace(getpid=lambda: next(processes), _exit=exits.append)
    monkeypatch.setattr("kafka_guarantees._handler_thread.os", system)

    def handler() -> None:
        if error is not None:
            raise error

    with suppress(BaseException):
        _finished(handler, ())
    assert exits == [status]
