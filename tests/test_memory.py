"""What stays in memory: one batch, and a garbage collector that works whenever a handler does."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Message

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce
from kafka_guarantees._collector import _Rest, collector_rests
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees.dedup import MemoryDedupStore, SqliteInbox, position

from .conftest import fill
from .test_at_least_once import IDLE, config, numbers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kafka_guarantees.testing.local_kafka import RunningKafka

__all__ = ["config"]

BATCH, BATCHES = 40, 6
WAYS = list(product(["at most once", "at least once", "store", "inbox", "exactly once"], ["run", "run_batches"]))


@pytest.fixture(autouse=True)
def working() -> Iterator[None]:
    """The collector works before each test, and, in the end, after each."""
    assert gc.isenabled()
    yield
    left = gc.isenabled()
    gc.enable()
    assert left


# -- one batch --------------------------------------------------------------------------------------------------------------


def client(kind: str, config: dict[str, Any], folder: Path) -> Any:
    """One of the ways to consume."""
    if kind == "at most once":
        return AtMostOnce(config, start="earliest")
    if kind == "exactly once":
        return ExactlyOnce({**config, "transactional.id": config["group.id"]}, commit_interval=10)
    options: dict[str, Any] = {
        "at least once": {},
        "store": {"dedup": MemoryDedupStore(), "message_id": position()},
        "inbox": {"inbox": SqliteInbox(folder / "inbox.db"), "message_id": position()},
    }[kind]
    return AtLeastOnce(config, **options)


def alive() -> int:
    return sum(type(thing) is Message for thing in gc.get_objects())


@pytest.mark.broker
@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_no_batch_is_kept_while_the_next_one_is_fetched(
    way: tuple[str, str], config: dict[str, Any], kafka: RunningKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its messages are let go of once they are handled, also while their commit is on its way."""
    kind, how = way
    topic = config["group.id"]
    kafka.create_topic(topic, 1)
    fill(kafka.bootstrap, topic, numbers(BATCH * BATCHES))
    gc.collect()
    before = alive()
    handled: list[int] = []
    in_hand: list[int] = []
    kept: list[int] = []
    fetch = GroupConsumer.fetch

    def counting(self: GroupConsumer, max_batch: int) -> Any:
        if handled:
            kept.append(alive() - before)
        return fetch(self, max_batch)

    def handler(messages: Any, *_connection: object) -> None:
        assert gc.isenabled()
        handled.append(1 if isinstance(messages, Message) else len(messages))
        in_hand.append(alive() - before)

    monkeypatch.setattr(GroupConsumer, "fetch", counting)
    with client(kind, config, tmp_path) as service:
        getattr(service, how)([topic], handler, max_batch=BATCH, until_idle=IDLE)
    assert sum(handled) == BATCH * BATCHES
    assert max(in_hand) == BATCH, "they are counted"
    assert max(kept) <= (BATCH if kind == "at most once" else 0)  # there it is what was committed together, which is little


# -- the collector ----------------------------------------------------------------------------------------------------------


def test_the_collector_rests_and_works_again() -> None:
    """Also after an exception, and where one rest is inside of another."""

    def fail() -> None:
        assert not gc.isenabled()
        raise KeyError

    with pytest.raises(KeyError), collector_rests:
        fail()
    assert gc.isenabled()
    with collector_rests, collector_rests:
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_the_user_has_turned_off_stays_off() -> None:
    """It is his to turn on."""
    gc.disable()
    try:
        with collector_rests:
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_interrupt_in_the_middle_is_made_good_by_the_next_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that raises after the collector was turned off, and before anybody could turn it on."""
    rest = _Rest()
    disable = gc.disable

    def interrupted() -> None:
        disable()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gc, "disable", interrupted)
        with pytest.raises(KeyboardInterrupt), rest:
            pass
    assert not gc.isenabled()
    with rest:
        pass
    assert gc.isenabled()


def test_threads_that_rest_at_the_same_time_leave_it_working() -> None:
    """Whoever is through first ends it for all: that costs time, and nobody may leave it off."""
    rest, interval = _Rest(), sys.getswitchinterval()
    left_off: list[bool] = []

    def loop() -> None:
        for _ in range(20_000):
            with rest:
                pass

    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            threads = [threading.Thread(target=loop) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            left_off.append(not gc.isenabled())
    finally:
        sys.setswitchinterval(interval)
    assert not any(left_off)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_it_works_in_a_child_that_was_forked_meanwhile() -> None:
    """By another thread, while this one took a batch: nobody would turn it on in the child."""
    resting, forked = threading.Event(), threading.Event()

    def rest() -> None:
        with collector_rests, collector_rests._lock:
            resting.set()
            forked.wait(30)

    thread = threading.Thread(target=rest)
    thread.start()
    assert resting.wait(30)
    assert not gc.isenabled()
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends it where it waits for the lock
        works = gc.isenabled()
        with collector_rests:
            rests = not gc.isenabled()
        os._exit(0 if works and rests else 1)
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
