"""What stays in memory: one batch, and a garbage collector that works whenever a handler does."""

from __future__ import annotations

import gc
import os
import threading
from contextlib import ExitStack, contextmanager
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Message

from kafka_guarantees import AtLeastOnce, ExactlyOnce, Record, _serialization
from kafka_guarantees._collector import REST, collector_rests
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._serialization import Reading
from kafka_guarantees.dedup import POSITION, MemoryDedupStore, SqliteInbox

from .conftest import fill
from .test_at_least_once import IDLE, config, numbers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kafka_guarantees.testing.local_kafka import RunningKafka

__all__ = ["config"]

BATCH, BATCHES = 40, 6
WAYS = list(product(["at least once", "store", "inbox", "deserializer", "exactly once"], ["run", "run_batches"]))


@pytest.fixture(autouse=True)
def working() -> Iterator[None]:
    """The collector works before each test, and, in the end, after each."""
    before = gc.get_threshold()
    assert before[0] < REST
    yield
    after = gc.get_threshold()
    gc.set_threshold(*before)
    assert after == before


def rests() -> bool:
    return gc.get_threshold()[0] == REST


# -- one batch --------------------------------------------------------------------------------------------------------------


@contextmanager
def client(kind: str, config: dict[str, Any], folder: Path, resting: list[bool]) -> Iterator[Any]:
    """One of the ways to consume."""

    def message_id(_message: Message) -> Any:
        resting.append(rests())
        return POSITION

    options: dict[str, dict[str, Any]] = {
        "at least once": {},
        "deserializer": {"value_deserializer": lambda value, _context: value.decode()},
        "store": {"dedup": MemoryDedupStore(), "message_id": message_id},
        "inbox": {"message_id": message_id},
    }
    with ExitStack() as opened:
        if kind == "exactly once":
            service: Any = ExactlyOnce({**config, "transactional.id": config["group.id"]}, commit_interval=10)
        else:
            inbox = opened.enter_context(SqliteInbox(folder / "inbox.db")) if kind == "inbox" else None
            service = AtLeastOnce(config, inbox=inbox, **options[kind])
        yield opened.enter_context(service)


@pytest.fixture(autouse=True)
def others_rest() -> Iterator[None]:
    """What earlier tests have left is not looked through, for each message: in a long session that takes most of a minute."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive(kind: type) -> int:
    return sum(type(thing) is kind for thing in gc.get_objects())


@pytest.mark.broker
@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_no_batch_is_kept_while_the_next_one_is_fetched(
    way: tuple[str, str], config: dict[str, Any], kafka: RunningKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its messages are let go of once they are handled, also while their commit is on its way. So is what they produced."""
    kind, how = way
    topic = config["group.id"]
    kafka.create_topic(topic, 1)
    fill(kafka.bootstrap, topic, numbers(BATCH * BATCHES))
    gc.collect()
    before, records_before = alive(Message), alive(Record)
    handled: list[int] = []
    in_hand: list[int] = []
    records: list[int] = []
    kept: list[int] = []
    resting: list[bool] = []
    fetch = GroupConsumer.fetch

    def counting(self: GroupConsumer, max_batch: int, max_wait: float) -> Any:
        if handled:
            kept.append(alive(Message) - before)
        return fetch(self, max_batch, max_wait)

    def handler(messages: Any, *_connection: object) -> list[Record]:
        assert not rests()
        several = [messages] if isinstance(messages, Message) else messages
        handled.append(len(several))
        in_hand.append(alive(Message) - before)
        records.append(alive(Record) - records_before)
        return [Record(f"{topic}-out", b"x") for _ in several]

    kafka.create_topic(f"{topic}-out", 1)
    monkeypatch.setattr(GroupConsumer, "fetch", counting)
    with client(kind, config, tmp_path, resting) as service:
        getattr(service, how)([topic], handler, max_batch=BATCH, until_idle=IDLE)
    assert sum(handled) == BATCH * BATCHES
    some = BATCH // 2  # a report that is served meanwhile, in another thread, is a message as well
    assert BATCH <= max(in_hand) < BATCH + some, "they are counted"
    assert max(kept) < some
    assert max(records) <= (BATCH - 1 if kind == "exactly once" else 1)
    assert all(resting)
    assert len(resting) == (BATCH * BATCHES if kind in ("store", "inbox") else 0)


# -- the collector ----------------------------------------------------------------------------------------------------------


def test_the_collector_rests_and_works_again() -> None:
    """Also after an exception, and where one rest is inside of another."""

    def fail() -> None:
        assert rests()
        raise KeyError

    with pytest.raises(KeyError), collector_rests:
        fail()
    assert not rests()
    with collector_rests, collector_rests:
        assert rests()
        assert gc.isenabled(), "that is the user's business"
    assert not rests()


@pytest.mark.broker
def test_it_rests_while_a_batch_is_fetched(
    config: dict[str, Any], kafka: RunningKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only while a first message is waited for, and after it."""
    topic, resting = config["group.id"], []
    kafka.create_topic(topic, 1)
    fill(kafka.bootstrap, topic, numbers(10))
    take = GroupConsumer._take

    class Watched:
        def __init__(self, raw: Any) -> None:
            self._raw = raw

        def __getattr__(self, name: str) -> Any:
            return getattr(self._raw, name)

        def consume(self, number: int, timeout: float) -> Any:
            resting.append(rests())
            return self._raw.consume(number, timeout)

    def watched(self: GroupConsumer, *arguments: Any) -> Any:
        raw, self._client.raw = self.raw, Watched(self.raw)
        try:
            return take(self, *arguments)
        finally:
            self._client.raw = raw

    monkeypatch.setattr(GroupConsumer, "_take", watched)
    with AtLeastOnce(config) as service:
        service.run([topic], lambda _: None, until_idle=IDLE)
    assert resting
    assert all(resting)


def test_it_rests_while_headers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of what is made."""
    resting: list[bool] = []
    monkeypatch.setattr(_serialization, "Message", SimpleNamespace(headers=lambda _message: resting.append(rests())))
    messages: Any = [object()] * 3
    Reading(None, None).begin(messages)
    assert resting == [True] * 3


@pytest.mark.parametrize("threshold", [(0, 10, 10), (REST + 1, 10, 10)])
def test_a_collector_that_works_less_is_left_alone(threshold: tuple[int, int, int]) -> None:
    """0 is never."""
    before = gc.get_threshold()
    gc.set_threshold(*threshold)
    try:
        with collector_rests:
            assert gc.get_threshold()[0] == threshold[0]
        assert gc.get_threshold()[0] == threshold[0]
    finally:
        gc.set_threshold(*before)


def test_what_the_user_sets_meanwhile_stays() -> None:
    """In another thread, or in a callback: also if he turns it off."""
    before = gc.get_threshold()
    try:
        with collector_rests:
            gc.set_threshold(5000, *before[1:])
        assert gc.get_threshold()[0] == 5000
        gc.set_threshold(*before)
        with collector_rests:
            gc.disable()
        assert not gc.isenabled()
        assert not rests()
    finally:
        gc.enable()
        gc.set_threshold(*before)


def test_an_interrupt_in_the_middle_is_made_good_by_the_next_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that raises as soon as it rests, where no ``with`` has begun. It is not off then, only less eager."""
    set_threshold = gc.set_threshold

    def interrupted(*threshold: int) -> None:
        set_threshold(*threshold)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gc, "set_threshold", interrupted)
        with pytest.raises(KeyboardInterrupt), collector_rests:
            pass
    assert rests()
    with collector_rests:
        pass
    assert not rests()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_it_works_in_a_child_that_was_forked_meanwhile() -> None:
    """By another thread, while this one took a batch."""
    resting, forked = threading.Event(), threading.Event()

    def rest() -> None:
        with collector_rests:
            resting.set()
            forked.wait(30)

    thread = threading.Thread(target=rest)
    thread.start()
    assert resting.wait(30)
    assert rests()
    child = os.fork()
    if child == 0:
        os._exit(1 if rests() else 0)
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
