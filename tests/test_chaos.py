"""Every guarantee on one real broker, with workers that are killed, frozen, interrupted and replaced.

Each test is one law of ``tests/chaos/checks.py`` under one fault; each law is also shown to a worker that breaks it.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions

from kafka_guarantees import (
    AtLeastOnce,
    DeliveryError,
    ExactlyOnce,
    FencedError,
    HandlerError,
    Record,
    TransactionAborted,
)

from .chaos import checks
from .chaos.harness import (
    PROTOCOLS,
    come_and_go,
    crew,
    interrupt_at_random,
    kill_at_random,
    pause_at_random,
    read_to_end,
)
from .conftest import committed, fill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from confluent_kafka import Message

    from kafka_guarantees.testing.local_kafka import RunningKafka

    from .chaos.harness import Crew

    MakeTopic = Callable[..., str]
    Fresh = Callable[[str], str]

pytestmark = pytest.mark.broker
GUARANTEES = ("AtMostOnce", "AtLeastOnce", "ExactlyOnce")


@pytest.fixture
def seed() -> int:
    """Of the instants of a test; every failure message has it."""
    return random.randrange(1_000_000)


# -- workers that die, stand still, come and go --------------------------------------------------------------------------


@contextmanager
def _crews(kafka: RunningKafka, directory: Path, *kinds: tuple[str, str], **job: Any) -> Iterator[list[Crew]]:
    """Two workers for each guarantee and protocol, side by side, all of them at work."""
    with ExitStack() as stack:
        teams = [
            stack.enter_context(crew(kafka, directory, guarantee, protocol, size=2, rate=500, **job))
            for guarantee, protocol in kinds
        ]
        for team in teams:
            team.until_history_grows()
        yield teams


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_workers_killed_at_random_instants(kafka: RunningKafka, tmp_path: Path, seed: int, guarantee: str) -> None:
    """SIGKILL between any two steps, under every group protocol: the guarantee holds (M01, X09, C16)."""
    with _crews(kafka, tmp_path, *((guarantee, protocol) for protocol in PROTOCOLS)) as teams:
        kill_at_random(teams, random.Random(seed), kills=8)
    for team in teams:
        assert not team.verdict(), f"seed {seed}, {team.group}"


def test_transactions_of_a_loop_of_ones_own_survive_kills(kafka: RunningKafka, tmp_path: Path, seed: int) -> None:
    """``transactions()`` is as exact as ``run``."""
    with _crews(kafka, tmp_path, ("ExactlyOnce", "range"), style="iterate") as teams:
        kill_at_random(teams, random.Random(seed), kills=8)
    assert not teams[0].verdict(), f"seed {seed}"


def test_checks_catch_workers_that_break_their_guarantee(kafka: RunningKafka, tmp_path: Path, seed: int) -> None:
    """Kills, and workers written by hand in the common wrong way: there are complaints about every one (H01)."""
    kinds = [(guarantee, "range") for guarantee in GUARANTEES]
    with _crews(kafka, tmp_path, *kinds, pause=0.002, program="tests.chaos.mutants") as teams:
        kill_at_random(teams, random.Random(seed), kills=4, longest=4.0)
    for team, wrong in zip(teams, ("handled twice", "not handled", "duplicate"), strict=True):
        verdict = team.verdict()
        assert any(complaint.startswith(wrong) for complaint in verdict), f"seed {seed}, {team.group}: {verdict}"


def test_workers_frozen_past_their_session(kafka: RunningKafka, tmp_path: Path, seed: int) -> None:
    """SIGSTOP for longer than session and transaction, SIGCONT: the zombie finds itself out (M03, X03, C07)."""
    config = {"transaction.timeout.ms": 3000}
    with ExitStack() as stack:
        teams = stack.enter_context(_crews(kafka, tmp_path, ("AtMostOnce", "range"), ("AtLeastOnce", "cooperative")))
        teams += stack.enter_context(_crews(kafka, tmp_path, ("ExactlyOnce", "range"), config=config))
        pause_at_random(teams, random.Random(seed), rounds=2, shortest=3.2, longest=4.5)
    for team in teams:
        assert not team.verdict(), f"seed {seed}, {team.group}"
        assert not team.crashes(), f"seed {seed}, {team.group}"


def test_members_come_and_go(kafka: RunningKafka, tmp_path: Path, seed: int) -> None:
    """SIGTERM under load: every worker ends within seconds, nothing is lost, order is kept (X12)."""
    with _crews(kafka, tmp_path, ("AtLeastOnce", "cooperative"), ("ExactlyOnce", "consumer")) as teams:
        come_and_go(teams, random.Random(seed), rounds=5)
    for team in teams:
        assert not team.verdict(), f"seed {seed}, {team.group}"
        assert not team.crashes(), f"seed {seed}, {team.group}"


def test_clean_stops_repeat_nothing(kafka: RunningKafka, tmp_path: Path, seed: int) -> None:
    """L07: AtLeastOnce workers that are stopped by SIGTERM again and again handle every message once."""
    with _crews(kafka, tmp_path, ("AtLeastOnce", "range")) as teams:
        come_and_go(teams, random.Random(seed), rounds=8)
    outcome = teams[0].outcome()
    assert not checks.complaints("AtLeastOnce", outcome), f"seed {seed}"
    assert not checks.handled_twice(outcome), f"seed {seed}"
    assert not checks.duplicates(outcome), f"seed {seed}"


def test_exceptions_out_of_signal_handlers_and_callbacks(kafka: RunningKafka, tmp_path: Path, seed: int) -> None:
    """C01: a raising SIGUSR1 and raising callbacks destroy no message, though run() is begun again every time."""
    with _crews(kafka, tmp_path, *((guarantee, "range") for guarantee in GUARANTEES), tantrums=True) as teams:
        interrupt_at_random(teams, random.Random(seed), signals=40)
    for team in teams:
        assert not team.verdict(), f"seed {seed}, {team.group}"


# -- handlers that fail ---------------------------------------------------------------------------------------------------


def _client(kind: Any, kafka: RunningKafka, group: str, **config: Any) -> Any:
    settings = {"bootstrap.servers": kafka.bootstrap, "group.id": group, **config}
    return kind({**settings, "transactional.id": group} if kind is ExactlyOnce else settings)


def test_swallowed_produce_error_stops_at_least_once(kafka: RunningKafka, kafka_topic: MakeTopic, fresh: Fresh) -> None:
    """P01: a record that is too large, whose error the handler swallows: the run raises, and nothing is committed past it."""
    source, sink, group = kafka_topic(), kafka_topic(), fresh("group")
    fill(kafka.bootstrap, source, [b"%d" % n for n in range(20)])
    with _client(AtLeastOnce, kafka, group) as client:

        def handler(message: Message) -> None:
            with suppress(DeliveryError):
                client.produce(sink, b"x" * 2_000_000 if message.value() == b"10" else message.value())

        with pytest.raises(DeliveryError):
            client.run([source], handler, until_idle=5)
    assert committed(kafka.bootstrap, group, source)[0] <= 10


def test_swallowed_produce_error_aborts_the_transaction(kafka: RunningKafka, kafka_topic: MakeTopic, fresh: Fresh) -> None:
    """X05: likewise inside a transaction, where librdkafka itself would commit: nothing of it is visible."""
    source, sink, group = kafka_topic(), kafka_topic(), fresh("group")
    fill(kafka.bootstrap, source, [b"%d" % n for n in range(20)])
    with _client(ExactlyOnce, kafka, group) as client:
        for transaction in client.transactions([source], until_idle=5):
            with pytest.raises(TransactionAborted), transaction:  # noqa: PT012 - it is raised on leaving the block
                transaction.produce(sink, b"before")
                with pytest.raises(DeliveryError):
                    transaction.produce(sink, b"x" * 2_000_000)
            break
    assert committed(kafka.bootstrap, group, source)[0] <= 0
    assert read_to_end(kafka.bootstrap, sink, 1) == []


@pytest.mark.parametrize("verb", ["flush", "send_offsets", "commit"])
def test_exception_at_the_end_of_a_transaction_rewinds(
    kafka: RunningKafka, kafka_topic: MakeTopic, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """X13: an exception out of the end of a ``with`` (a signal handler's, a missing ACL), caught in the loop, loses nothing."""
    source, sink, group = kafka_topic(), kafka_topic(), fresh("group")
    fill(kafka.bootstrap, source, [b"%d" % n for n in range(50)])
    with _client(ExactlyOnce, kafka, group) as client:
        original, calls = getattr(client._producer, verb), Counter[str]()

        def raises_the_second_time(*arguments: Any) -> Any:
            calls[verb] += 1
            if calls[verb] == 2:
                raise InterruptedError
            return original(*arguments)

        monkeypatch.setattr(client._producer, verb, raises_the_second_time)
        for transaction in client.transactions([source], max_batch=10, until_idle=1):
            with suppress(InterruptedError), transaction:
                for message in transaction.messages:
                    transaction.produce(sink, message.value())
    assert calls[verb] > 2
    assert sorted(int(seen.value) for seen in read_to_end(kafka.bootstrap, sink, 1)) == list(range(50))


@pytest.mark.parametrize("kind", [AtLeastOnce, ExactlyOnce])
def test_failing_handler_is_not_committed_past(kafka: RunningKafka, kafka_topic: MakeTopic, fresh: Fresh, kind: Any) -> None:
    """L01, P03: message 5 of 20 fails: the run raises, what came before is committed, and the next run begins there."""
    source, group = kafka_topic(), fresh("group")
    fill(kafka.bootstrap, source, [b"%d" % n for n in range(20)])

    def handler(message: Message) -> None:
        if message.value() == b"5":
            raise LookupError

    with _client(kind, kafka, group) as client:
        with pytest.raises(HandlerError):
            client.run([source], handler, until_idle=5)
        assert committed(kafka.bootstrap, group, source)[0] == 5
        seen: list[bytes | None] = []
        client.run([source], lambda message: seen.append(message.value()), until_idle=1)
    assert seen == [b"%d" % n for n in range(5, 20)]


@pytest.mark.parametrize("kind", [AtLeastOnce, ExactlyOnce])
def test_tombstones_and_empty_values_are_messages(kafka: RunningKafka, kafka_topic: MakeTopic, fresh: Fresh, kind: Any) -> None:
    """L02: ``bool(message)`` is False for both, and they are handled all the same."""
    source = kafka_topic()
    fill(kafka.bootstrap, source, [None, b"", b"x"])
    seen: list[bytes | None] = []
    with _client(kind, kafka, fresh("group")) as client:
        client.run([source], lambda message: seen.append(message.value()), until_idle=1)
    assert seen == [None, b"", b"x"]


# -- instances and partitions ---------------------------------------------------------------------------------------------


def test_second_instance_with_the_same_transactional_id(kafka: RunningKafka, kafka_topic: MakeTopic, fresh: Fresh) -> None:
    """X07: the first one gets FencedError within seconds, the second goes on, and the output is exact."""
    source, sink, group = kafka_topic(2), kafka_topic(2), fresh("group")
    fill(kafka.bootstrap, source, [b"%d" % n for n in range(2000)], 2)
    first = _client(ExactlyOnce, kafka, group, **PROTOCOLS["range"])
    second = _client(ExactlyOnce, kafka, group, **PROTOCOLS["range"])
    began, fenced = threading.Event(), threading.Event()

    def handler(message: Message) -> list[Record]:
        began.set()
        time.sleep(0.002)
        return [Record(sink, message.value(), partition=message.partition())]

    def be_fenced() -> None:
        try:
            first.run([source], handler)
        except FencedError:
            fenced.set()

    thread = threading.Thread(target=be_fenced)
    thread.start()
    try:
        assert began.wait(20)
        second.run([source], handler, until_idle=5)
        assert fenced.is_set(), "two instances with one transactional.id, and nobody was fenced"
    finally:
        first.stop()
        thread.join(20)
        first.close()
        second.close()
    counts = Counter(seen.value for seen in read_to_end(kafka.bootstrap, sink, 2))
    assert counts == Counter(str(n) for n in range(2000))


@pytest.mark.parametrize("kind", [AtLeastOnce, ExactlyOnce])
def test_partitions_added_while_running_lose_nothing(
    kafka: RunningKafka, kafka_topic: MakeTopic, fresh: Fresh, kind: Any
) -> None:
    """C11: with ``start="latest"`` too, a partition that is new to a group is read from its beginning."""
    source, group = kafka_topic(1), fresh("group")
    config: dict[str, Any] = {
        "bootstrap.servers": kafka.bootstrap,
        "group.id": group,
        "topic.metadata.refresh.interval.ms": 1000,
    }
    client = kind({**config, "transactional.id": group} if kind is ExactlyOnce else config, start="latest")
    seen: set[bytes | None] = set()
    thread = threading.Thread(target=client.run, args=([source], lambda message: seen.add(message.value())))
    thread.start()
    try:
        _until(lambda: committed(kafka.bootstrap, group, source)[0] >= 0)  # it has begun at the end
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap})  # a name, or it is destroyed before it has an answer
        admin.create_partitions([NewPartitions(source, 3)])[source].result()
        fill(kafka.bootstrap, source, [b"%d" % n for n in range(300)], 3)
        _until(lambda: len(seen) == 300)
    finally:
        client.stop()
        thread.join(20)
        client.close()


def _until(true: Callable[[], bool], within: float = 30.0) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {within} s"
        time.sleep(0.05)
