"""At least once with a store or an inbox, on a real Kafka: what is handled, left out, waits, and where a run ends."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import confluent_kafka
import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from psycopg.conninfo import make_conninfo
from tenacity import Retrying, stop_after_attempt

from kafka_guarantees import (
    AtLeastOnce,
    AuthorizationError,
    BrokerError,
    DurabilityWarning,
    HandlerError,
    OffsetsLost,
    StoreUnavailable,
    UnsafeConfigError,
)
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._pace import Pace
from kafka_guarantees._places import Places
from kafka_guarantees._serialization import Reading
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees.dedup import (
    MemoryDedupStore,
    MessageIdMissing,
    MessageIdReused,
    OffsetBeyondEnd,
    Outcome,
    PostgresDedupStore,
    PostgresInbox,
    SqliteDedupStore,
    SqliteInbox,
    TopicRecreated,
    cloudevent,
    first_of,
    header,
    json_field,
    position,
)
from kafka_guarantees.dedup.contract import Item
from kafka_guarantees.dedup.ids import key_of

from .conftest import committed, read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from confluent_kafka import Message

    from kafka_guarantees.dedup.contract import Entry
    from kafka_guarantees.testing.local_kafka import RunningKafka
    from kafka_guarantees.testing.servers import LocalPostgres

pytestmark = pytest.mark.broker

FOREIGN = b"f" * 16  # the token of somebody else


@pytest.fixture
def config(kafka: RunningKafka, fresh: Callable[[str], str]) -> dict[str, Any]:
    return {
        "bootstrap.servers": kafka.bootstrap,
        "group.id": fresh("group"),
        "session.timeout.ms": 6000,
        "max.poll.interval.ms": 6000,
        "partition.assignment.strategy": "cooperative-sticky",
    }


def send(
    config: dict[str, Any], topic: str, ids: Sequence[str | None], partitions: int = 1, value: bytes | None = None
) -> None:
    """Each id as a record, round robin over partitions; its value is the id."""
    with AtLeastOnce({"bootstrap.servers": config["bootstrap.servers"]}) as producer:
        for number, name in enumerate(ids):
            content = value if value is not None else f"value of {name}".encode()
            producer.produce(topic, content, partition=number % partitions, message_id=name)


class Down:
    """A store in front of another, that does not answer while it is told so, and counts the calls."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()
        self.fails: Callable[[str], bool] = lambda _verb: False
        self.capabilities, self.retention = store.capabilities, store.retention

    def __getattr__(self, verb: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            self.calls[verb] += 1
            if self.fails(verb):
                raise StoreUnavailable("the store is down, says the test")
            return getattr(self._store, verb)(*args, **named)

        return call


class Handled(list[str]):
    """A handler that notes the values that it was given."""

    def __call__(self, message: Message, *_connection: object) -> None:
        self.append((message.value() or b"").decode().removeprefix("value of "))

    def all(self, batch: Sequence[Message]) -> None:
        for message in batch:
            self(message)


@pytest.fixture
def store() -> Iterator[Down]:
    with MemoryDedupStore() as memory:
        yield Down(memory)


# -- stores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["run", "run_batches", "messages"])
def test_an_event_that_was_sent_three_times_is_handled_once(
    config: dict[str, Any], kafka_topic: Callable[..., str], store: Down, how: str
) -> None:
    """D06: within a batch, across batches and across partitions; and every offset is committed."""
    topic, handled = kafka_topic(partitions=3), Handled()
    ids = [str(n) for n in range(200)]
    send(config, topic, ids + ids[::-1] + ids, partitions=3)
    with AtLeastOnce(config, dedup=store) as kafka:
        if how == "run":
            kafka.run([topic], handled, max_batch=70, until_idle=1)
        elif how == "run_batches":
            kafka.run_batches([topic], handled.all, max_batch=70, until_idle=1)
        else:
            for message in kafka.messages([topic], max_batch=70, until_idle=1):
                handled(message)
        counts = kafka.dedup_counts
    assert sorted(handled) == sorted(ids)
    assert sum(committed(config["bootstrap.servers"], config["group.id"], topic, 3)) == 600
    assert counts["duplicate"] == 400
    assert store.calls["complete"] <= store.calls["claim"]
    assert store.calls["release"] == 0


def test_a_message_that_failed_is_handled_by_the_next_run(
    config: dict[str, Any], kafka_topic: Callable[..., str], store: Down
) -> None:
    """D09: its id is released with those behind it; what came before is finished, and stays so."""
    topic, handled = kafka_topic(), Handled()
    send(config, topic, [str(n) for n in range(10)])
    with AtLeastOnce(config, dedup=store) as kafka:

        def failing(message: Message) -> None:
            if message.value() == b"value of 4":
                raise RuntimeError("not now")
            handled(message)

        with pytest.raises(HandlerError, match="offset 4"):
            kafka.run([topic], failing, until_idle=1)
        assert committed(config["bootstrap.servers"], config["group.id"], topic) == [4]
        assert store.claim(config["group.id"], [Item(key_of("4"), b"p" * 16)], token=FOREIGN, lease=60) == [Outcome.NEW]
        store.release(config["group.id"], [Item(key_of("4"), b"p" * 16)], token=FOREIGN)
        kafka.run([topic], handled, until_idle=1)
    assert handled == [str(n) for n in range(10)]


def test_an_id_that_somebody_handles_is_waited_for(
    config: dict[str, Any], kafka_topic: Callable[..., str], store: Down
) -> None:
    """D09: its partition rests, in order, the other goes on; nothing is left out."""
    topic, handled = kafka_topic(partitions=2), Handled()
    send(config, topic, ["a", "x", "busy", "y", "c", "z"], partitions=2)  # a busy c | x y z
    claim = Item(key_of("busy"), b"elsewhere at all")
    store.claim(config["group.id"], [claim], token=FOREIGN, lease=60)
    seen: list[list[str]] = []

    def let_go() -> None:
        time.sleep(3)
        seen.append(list(handled))
        store.release(config["group.id"], [claim], token=FOREIGN)

    other = threading.Thread(target=let_go)
    with AtLeastOnce(config, dedup=store) as kafka:
        other.start()
        kafka.run([topic], handled, until_idle=1)
        counts = kafka.dedup_counts
    other.join()
    assert sorted(seen[0]) == ["a", "x", "y", "z"]
    assert [name for name in handled if name in ["a", "busy", "c"]] == ["a", "busy", "c"]
    assert len(handled) == 6
    assert counts["waited for"] >= 2
    assert sum(committed(config["bootstrap.servers"], config["group.id"], topic, 2)) == 6


def test_one_that_was_completed_elsewhere_meanwhile_is_left_out(
    config: dict[str, Any], kafka_topic: Callable[..., str], store: Down
) -> None:
    """The other position handled it: this one is finished without."""
    topic, handled = kafka_topic(), Handled()
    send(config, topic, ["a", "busy", "c"])
    claim = Item(key_of("busy"), b"elsewhere at all")
    store.claim(config["group.id"], [claim], token=FOREIGN, lease=60)
    threading.Timer(1, lambda: store.complete(config["group.id"], [claim], token=FOREIGN)).start()
    with AtLeastOnce(config, dedup=store) as kafka:
        kafka.run([topic], handled, until_idle=1)
    assert handled == ["a", "c"]
    assert committed(config["bootstrap.servers"], config["group.id"], topic) == [3]


@pytest.mark.parametrize("verb", ["claim", "complete"])
def test_a_store_that_is_down_stops_handling_and_not_the_membership(
    config: dict[str, Any], kafka_topic: Callable[..., str], store: Down, verb: str
) -> None:
    """D16, D17: longer than max.poll.interval.ms; then everything is handled once, by the same member."""
    topic, handled = kafka_topic(partitions=2), Handled()
    send(config, topic, [str(n) for n in range(20)], partitions=2)
    back = time.monotonic() + 10
    store.fails = lambda called: called == verb and time.monotonic() < back
    with AtLeastOnce(config, dedup=store) as kafka:
        kafka.run([topic], handled, until_idle=1)
        counts = kafka.dedup_counts
    assert time.monotonic() > back
    assert Counter(handled) == Counter(str(n) for n in range(20))
    assert counts["taken over"] == 0
    assert sum(committed(config["bootstrap.servers"], config["group.id"], topic, 2)) == 20


def test_a_batch_that_was_given_away_while_it_waited_is_not_ours_again(
    config: dict[str, Any], kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """X02: a rebalance while a store is waited for; however often it is waited for after that, nothing may be committed."""
    topic = kafka_topic(partitions=2)
    send(config, topic, ["a", "b"], partitions=2)
    settings = resolve(Guarantee.AT_LEAST_ONCE, config)
    first = GroupConsumer(settings, Lifecycle("test"), [topic], Places(settings.group_id, "earliest"))
    second = None
    try:
        batch = next(first.batches(Pace(2, 60, max_wait=5), None, Reading(None, None)))
        assert len(batch.partitions) == 2, "one of them stays"
        first.keep_alive(batch, 0.3)
        assert first.still_ours(batch, within=6)
        second = GroupConsumer(settings, Lifecycle("test"), [topic], Places(settings.group_id, "earliest"))
        deadline = time.monotonic() + 30
        while first.still_ours(batch, within=6):
            assert time.monotonic() < deadline
            first.keep_alive(batch, 0.3)
            second.fetch(1)
        for _ in range(3):
            first.keep_alive(batch, 0.3)
            assert not first.still_ours(batch, within=6)
    finally:
        first.close()
        if second is not None:
            second.close()


def test_a_claim_whose_answer_stood_still_is_not_handled_behind_its_new_owner(
    config: dict[str, Any], kafka_topic: Callable[..., str], store: Down
) -> None:
    """X02: longer than max.poll.interval.ms. The new owner has taken the claim over, and is done with it."""
    topic, slow, quick = kafka_topic(), Handled(), Handled()
    send(config, topic, ["a", "b"])
    asked, answers = threading.Event(), threading.Event()

    class Slow(Down):
        def claim(self, *args: Any, **named: Any) -> Any:
            outcomes = store.claim(*args, **named)
            asked.set()
            assert answers.wait(60)
            return outcomes

    def wait(reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with (
        ThreadPoolExecutor(2) as pool,
        AtLeastOnce(config, dedup=Slow(store)) as first,
        AtLeastOnce(config, dedup=store) as other,
    ):
        runs = [pool.submit(first.run, [topic], slow)]
        try:
            assert asked.wait(30)
            runs.append(pool.submit(other.run, [topic], quick))
            wait(lambda: len(quick) == 2 and store.calls["complete"] > 0)
            answers.set()
            wait(lambda: store.calls["release"] > 0 or bool(slow))
        finally:
            answers.set()
            first.stop()
            other.stop()
        for run in runs:
            run.result(30)
    assert (slow, quick) == ([], ["a", "b"])


def test_a_stop_does_not_wait_for_a_store_that_is_down(
    config: dict[str, Any], kafka_topic: Callable[..., str], store: Down
) -> None:
    """Nothing is handled or committed, and the run returns."""
    topic, handled = kafka_topic(), Handled()
    send(config, topic, ["a"])
    store.fails = lambda verb: verb == "claim"
    with AtLeastOnce(config, dedup=store) as kafka:
        threading.Timer(4, kafka.stop).start()
        began = time.monotonic()
        kafka.run([topic], handled)
        assert time.monotonic() - began < 8
    assert store.calls["claim"] > 3
    assert handled == []
    assert committed(config["bootstrap.servers"], config["group.id"], topic)[0] <= 0


def test_an_error_of_the_brokers_while_the_store_is_down_ends_the_run(
    kafka: RunningKafka, config: dict[str, Any], kafka_topic: Callable[..., str], fresh: Callable[[str], str], store: Down
) -> None:
    """It is no answer of the store: the batch in hand must not be dropped with it. The next run handles it."""
    topic, other, handled = kafka_topic(), fresh("other"), Handled()
    kafka.create_topic(other, 1)
    send(config, topic, [str(n) for n in range(10)])
    store.fails = lambda verb: verb == "claim"
    with AtLeastOnce({**config, "topic.metadata.refresh.interval.ms": 500}, dedup=store) as client:
        threading.Timer(4, recreate, (kafka, other)).start()
        with pytest.raises(BrokerError, match="does not exist"):
            client.run([topic, other], handled)
        store.fails = lambda _verb: False
        assert committed(config["bootstrap.servers"], config["group.id"], topic)[0] <= 0
        client.run([topic], handled, until_idle=1)
    assert handled == [str(n) for n in range(10)]


def test_headers_that_cannot_be_read_are_no_id_and_crash_nobody(
    config: dict[str, Any], kafka_topic: Callable[..., str], store: Down
) -> None:
    """S04: a name that is not UTF-8. confluent-kafka raises for it once, and then gives a list that ends the process."""
    topic, letters, handled = kafka_topic(), kafka_topic(), Handled()
    send(config, topic, ["a"])
    produce_with_header(config["bootstrap.servers"], topic, b"bad\xff\xfe")
    send(config, topic, ["b"])
    seen: list[object] = []

    def looks(message: Message) -> None:
        seen.append(message.headers())
        seen.append(message.headers())
        handled(message)

    ids = first_of(cloudevent(), header("message-id"), header("id"))
    with AtLeastOnce(config, dedup=store, message_id=ids) as kafka, pytest.raises(MessageIdMissing, match="offset 1"):
        kafka.run([topic], looks, until_idle=1)
    without: dict[str, Any] = {"dedup": store, "message_id": ids, "on_missing_id": "process"}
    with AtLeastOnce(config, **without) as kafka, pytest.raises(HandlerError, match=r"offset 1 \(HeadersLost"):
        kafka.run([topic], looks, until_idle=1)
    with AtLeastOnce(config, **without, dead_letter=letters) as kafka:
        kafka.run([topic], looks, until_idle=1)
    assert handled == ["a", "b"]
    assert [message.value() for message in read_all(config["bootstrap.servers"], letters)] == [b"poison"]


def produce_with_header(bootstrap: str, topic: str, name: bytes) -> None:
    """Write a record with a header of any name, which the Python binding does not let one do."""
    (library,) = Path(confluent_kafka.__file__).parents[1].glob("confluent_kafka.libs/librdkafka*")
    script = f"""
import ctypes
lib = ctypes.CDLL({str(library)!r})
lib.rd_kafka_conf_new.restype = lib.rd_kafka_new.restype = ctypes.c_void_p
why = ctypes.create_string_buffer(512)
conf = ctypes.c_void_p(lib.rd_kafka_conf_new())
assert lib.rd_kafka_conf_set(conf, b"bootstrap.servers", {bootstrap.encode()!r}, why, 512) == 0
client = ctypes.c_void_p(lib.rd_kafka_new(0, conf, why, 512))
TOPIC, VALUE, FLAGS, HEADER, END, COPY = 1, 4, 7, 9, 0, 2
i, size = ctypes.c_int, ctypes.c_ssize_t
assert lib.rd_kafka_producev(client, i(TOPIC), {topic.encode()!r}, i(FLAGS), i(COPY), i(VALUE), b"poison", size(6),
                             i(HEADER), {name!r}, b"v", size(1), i(END)) == 0
assert lib.rd_kafka_flush(client, 10000) == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_without_its_store_it_goes_on_if_told_so(config: dict[str, Any], kafka_topic: Callable[..., str], store: Down) -> None:
    """D16: on_store_error="process" is plain at-least-once, and counted."""
    topic, handled = kafka_topic(), Handled()
    send(config, topic, ["a", "a", "b"])
    store.fails = lambda _verb: True
    with AtLeastOnce(config, dedup=store, on_store_error="process") as kafka:
        kafka.run([topic], handled, until_idle=1)
        counts = kafka.dedup_counts
    assert handled == ["a", "a", "b"]
    assert counts["unprotected"] == 3
    assert committed(config["bootstrap.servers"], config["group.id"], topic) == [3]


def test_ids_that_could_not_be_stored_are_counted_and_stored_later(
    config: dict[str, Any], kafka_topic: Callable[..., str], store: Down
) -> None:
    """D16: on_store_error="process", and a store that is away for one complete(): what comes again behind it is left out."""
    topic, handled = kafka_topic(), Handled()
    send(config, topic, ["a", "b", "a", "b", "c"])
    store.fails = lambda verb: verb == "complete" and store.calls["complete"] == 1
    with AtLeastOnce(config, dedup=store, on_store_error="process") as kafka:
        kafka.run([topic], handled, max_batch=2, until_idle=1)
        counts = kafka.dedup_counts
    assert handled == ["a", "b", "c"]
    assert (counts["unprotected"], counts["duplicate"]) == (2, 2)
    assert committed(config["bootstrap.servers"], config["group.id"], topic) == [5]


def test_a_message_without_an_id_ends_the_run(config: dict[str, Any], kafka_topic: Callable[..., str], store: Down) -> None:
    """It says where, what came before is committed, and a policy for such messages goes on."""
    topic, handled = kafka_topic(), Handled()
    send(config, topic, ["a", None, "b", None])
    with AtLeastOnce(config, dedup=store) as kafka, pytest.raises(MessageIdMissing, match="offset 1"):
        kafka.run([topic], handled, until_idle=1)
    assert handled == ["a"]
    assert committed(config["bootstrap.servers"], config["group.id"], topic) == [1]
    with AtLeastOnce(config, dedup=store, on_missing_id="position") as kafka:
        kafka.run([topic], handled, until_idle=1)
    assert handled == ["a", "None", "b", "None"]


@pytest.mark.parametrize("how", ["run", "messages"])
def test_what_is_behind_a_message_without_an_id_is_given_back_as_well(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str], store: Down, how: str
) -> None:
    """L01: what is in hand of a batch ends before that message. Where that takes too long, none behind it is forgotten."""
    topic, dead, handled = kafka_topic(partitions=2), kafka_topic(), Handled()
    slow = [f"slow {number}" for number in range(8)]
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap}) as producer:
        for name in slow:
            producer.produce(topic, name.encode(), partition=0, message_id=name)
        producer.flush()
        producer.produce(topic, b"without an id", partition=1)
        for name in ("a", "b"):
            producer.produce(topic, name.encode(), partition=1, message_id=name)

    def handle(message: Message) -> None:
        handled(message)
        if message.partition() == 0:
            time.sleep(0.4)
        if message.offset() == 6:
            with AtLeastOnce({"bootstrap.servers": kafka.bootstrap}) as another:
                another.produce(topic, b"later", partition=1, message_id="later")

    with AtLeastOnce(config, dedup=store, dead_letter=dead) as client:
        if how == "run":
            client.run([topic], handle, until_idle=2)
        else:
            for message in client.messages([topic], until_idle=2):
                handle(message)
    assert Counter(handled) == Counter([*slow, "a", "b", "later"])
    assert values(read_all(kafka.bootstrap, dead)) == [b"without an id"]


def test_without_protection_is_counted(config: dict[str, Any], kafka_topic: Callable[..., str], store: Down) -> None:
    """on_missing_id="process" handles what has no id each time it comes."""
    topic, handled = kafka_topic(), Handled()
    send(config, topic, [None, "a", None, "a"])
    with AtLeastOnce(config, dedup=store, on_missing_id="process") as kafka:
        kafka.run([topic], handled, until_idle=1)
        assert kafka.dedup_counts["unprotected"] == 2
    assert handled == ["None", "a", "None"]


@pytest.mark.parametrize("batch", [1, 100])
def test_one_id_for_two_messages_ends_the_run(
    config: dict[str, Any], kafka_topic: Callable[..., str], store: Down, batch: int
) -> None:
    """D08: within a batch and against the store; where the user allows it the second is left out."""
    topic, handled = kafka_topic(), Handled()
    send(config, topic, ["a", "b"])
    send(config, topic, ["a"], value=b"something else")
    send(config, topic, ["c"])
    with AtLeastOnce(config, dedup=store) as kafka, pytest.raises(MessageIdReused, match="offset 2"):
        kafka.run([topic], handled, max_batch=batch, until_idle=1)
    assert committed(config["bootstrap.servers"], config["group.id"], topic) == [2]
    with AtLeastOnce(config, dedup=store, fingerprint=False) as kafka:
        kafka.run([topic], handled, until_idle=1)
    assert handled == ["a", "b", "c"]


def test_groups_do_not_take_each_other_s_messages(
    config: dict[str, Any], kafka_topic: Callable[..., str], fresh: Callable[[str], str], store: Down
) -> None:
    """D07: two groups with one store both handle everything."""
    topic, handled = kafka_topic(), Handled()
    send(config, topic, ["a", "a"])
    for group in (config["group.id"], fresh("group")):
        with AtLeastOnce({**config, "group.id": group}, dedup=store) as kafka:
            kafka.run([topic], handled, until_idle=1)
    assert handled == ["a", "a"]


def test_a_local_store_says_that_others_do_not_see_it(
    config: dict[str, Any], kafka_topic: Callable[..., str], store: Down, caplog: pytest.LogCaptureFixture
) -> None:
    """D11: as soon as the group has other members, and only then; once."""
    topic = kafka_topic(partitions=2)
    send(config, topic, [str(n) for n in range(4)], partitions=2)
    with AtLeastOnce(config, dedup=store) as first, AtLeastOnce(config, dedup=store) as second:
        first.run([topic], Handled(), until_idle=1)
        assert "is local" not in caplog.text
        other = threading.Thread(target=second.run, args=([topic], Handled()))
        other.start()
        deadline = time.monotonic() + 60
        while "is local" not in caplog.text:
            assert time.monotonic() < deadline
            send(config, topic, [str(time.monotonic()), str(-time.monotonic())], partitions=2)
            first.run([topic], Handled(), until_idle=1)
        second.stop()
        other.join()
    assert caplog.text.count("is local") <= 2  # once for each client


def test_a_record_is_recognised_by_its_place_in_a_topic_that_exists(
    kafka: RunningKafka, config: dict[str, Any], fresh: Callable[[str], str], store: Down
) -> None:
    """D06: a topic that is created again under its name begins at offset 0, and these are other records."""
    topic, handled = fresh("again"), Handled()
    for _ in range(2):
        kafka.create_topic(topic, 1)
        send(config, topic, ["a", "b"])
        for _again in range(2):
            group = {**config, "group.id": fresh("group")}
            with AtLeastOnce(group, dedup=store, message_id=position(), scope="one") as client:
                client.run([topic], handled, until_idle=1)
        recreate(kafka, topic)
    assert handled == ["a", "b", "a", "b"]


def recreate(kafka: RunningKafka, topic: str) -> None:
    """Delete a topic, and wait until it is gone."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.delete_topics([topic])[topic].result(30)
    deadline = time.monotonic() + 30
    while topic in admin.list_topics(timeout=10).topics:
        assert time.monotonic() < deadline
        time.sleep(0.1)


# -- inboxes ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Iterator[tuple[SqliteInbox, Path]]:
    path = tmp_path / "effects.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE effects (name TEXT)")
    connection.close()
    with SqliteInbox(path) as inbox:
        yield inbox, path


def effect(message: Message, connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO effects VALUES (?)", [(message.value() or b"").decode().removeprefix("value of ")])


def all_effects(batch: Sequence[Message], connection: sqlite3.Connection) -> None:
    for message in batch:
        effect(message, connection)


def effects(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    try:
        return [name for (name,) in connection.execute("SELECT name FROM effects ORDER BY rowid")]
    finally:
        connection.close()


@pytest.mark.parametrize("how", ["run", "run_batches"])
def test_an_inbox_has_one_effect_for_each_id(
    config: dict[str, Any], kafka_topic: Callable[..., str], database: tuple[SqliteInbox, Path], how: str
) -> None:
    """Within a batch, across batches and partitions; the group shows how far it is."""
    inbox, path = database
    topic, ids = kafka_topic(partitions=3), [str(n) for n in range(100)]
    send(config, topic, ids + ids[::-1] + ids, partitions=3)
    with AtLeastOnce(config, inbox=inbox) as kafka:
        if how == "run":
            kafka.run([topic], effect, max_batch=40, until_idle=1)
        else:
            kafka.run_batches([topic], all_effects, max_batch=40, until_idle=1)
        assert kafka.dedup_counts["duplicate"] == 200
    assert Counter(effects(path)) == Counter(ids)
    assert sum(committed(config["bootstrap.servers"], config["group.id"], topic, 3)) == 300


@pytest.mark.parametrize("batch", [1, 100])
def test_one_id_for_two_messages_ends_the_run_of_an_inbox(
    config: dict[str, Any], kafka_topic: Callable[..., str], database: tuple[SqliteInbox, Path], batch: int
) -> None:
    """D08: likewise; what came before has its effect."""
    inbox, path = database
    topic = kafka_topic()
    send(config, topic, ["a", "b", "a"])
    send(config, topic, ["b"], value=b"something else")
    send(config, topic, ["c"])
    with AtLeastOnce(config, inbox=inbox) as kafka, pytest.raises(MessageIdReused, match="offset 3"):
        kafka.run([topic], effect, max_batch=batch, until_idle=1)
    assert len(effects(path)) == 2
    assert committed(config["bootstrap.servers"], config["group.id"], topic) == [3]
    with AtLeastOnce(config, inbox=inbox, fingerprint=False) as kafka:
        kafka.run([topic], effect, until_idle=1)
    assert len(effects(path)) == 3


def test_the_inbox_decides_where_to_go_on(
    config: dict[str, Any], kafka_topic: Callable[..., str], database: tuple[SqliteInbox, Path], fresh: Callable[[str], str]
) -> None:
    """The group's own offset may be lost, behind or ahead: what is in the database counts."""
    inbox, path = database
    topic = kafka_topic()
    send(config, topic, ["a", "b"])
    for _ in range(3):  # a new group each time, with the same scope
        group = {**config, "group.id": fresh("group")}
        with AtLeastOnce(group, inbox=inbox, message_id=None, scope="ledger") as kafka:
            kafka.run([topic], effect, until_idle=1)
            assert kafka.dedup_counts["duplicate"] == 0  # it went to its place, and did not read from the start
    send(config, topic, ["c"])
    with AtLeastOnce(config, inbox=inbox, message_id=None, scope="ledger") as kafka:
        kafka.run([topic], effect, until_idle=1)
    assert effects(path) == ["a", "b", "c"]


def test_a_failing_handler_leaves_no_effect(
    config: dict[str, Any], kafka_topic: Callable[..., str], database: tuple[SqliteInbox, Path]
) -> None:
    """What it wrote before it raised is gone; what came before is there, once; the next run goes on."""
    inbox, path = database
    topic = kafka_topic()
    send(config, topic, [str(n) for n in range(8)])

    def failing(message: Message, connection: sqlite3.Connection) -> None:
        effect(message, connection)
        if message.offset() == 5:
            raise RuntimeError("not now")

    with AtLeastOnce(config, inbox=inbox) as kafka:
        with pytest.raises(HandlerError, match="offset 5"):
            kafka.run([topic], failing, until_idle=1)
        assert effects(path) == ["0", "1", "2", "3", "4"]
        with pytest.raises(HandlerError, match="offset 5"):
            kafka.run([topic], failing, until_idle=1)
        assert effects(path) == ["0", "1", "2", "3", "4"]
        kafka.run([topic], effect, until_idle=1)
    assert effects(path) == [str(n) for n in range(8)]


def test_an_inbox_that_commits_nothing_ends_the_run_with_one_dead_letter(
    config: dict[str, Any], kafka_topic: Callable[..., str], database: tuple[SqliteInbox, Path]
) -> None:
    """L05: as where it cannot write its own tables: the message is not to blame, and would be set aside again and again."""

    class Broken(SqliteInbox):
        @contextmanager
        def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[Any]:
            with super().transaction(scope, entries) as transaction:
                yield transaction
                raise ValueError("it cannot be committed, says the test")

    _, path = database
    topic, dead = kafka_topic(), kafka_topic()
    send(config, topic, ["a"])
    retry = Retrying(stop=stop_after_attempt(2))
    with Broken(path) as inbox, AtLeastOnce(config, inbox=inbox, dead_letter=dead, retry=retry) as kafka:
        stop = threading.Timer(10, kafka.stop)
        stop.start()
        with pytest.raises(ValueError, match="says the test"):
            kafka.run([topic], effect)
        stop.cancel()
    assert len(read_all(config["bootstrap.servers"], dead)) == 1
    assert effects(path) == []


@pytest.mark.parametrize("keep_alive", [False, True])
def test_nothing_is_written_behind_a_rollback_that_a_handler_swallowed(
    config: dict[str, Any],
    kafka_topic: Callable[..., str],
    database: tuple[SqliteInbox, Path],
    keep_alive: bool,  # noqa: FBT001 - two rows
) -> None:
    """D14: SQLite itself ends a transaction for some errors; what follows would be committed at once, and come again."""
    inbox, path = database
    topic = kafka_topic()
    send(config, topic, [str(n) for n in range(5)])

    def swallows(message: Message, connection: sqlite3.Connection) -> None:
        if message.offset() == 2:
            with suppress(sqlite3.IntegrityError):
                connection.execute("INSERT OR ROLLBACK INTO kg_inbox_version VALUES (NULL)")
        else:
            effect(message, connection)

    with AtLeastOnce(config, inbox=inbox, retry=None, keep_alive=keep_alive) as kafka:
        with pytest.raises(HandlerError, match="offset 2") as failed:
            kafka.run([topic], swallows, until_idle=1)
        assert "an error by which SQLite did" in str(failed.value.__cause__)
        assert effects(path) == ["0", "1"]
        kafka.run([topic], effect, until_idle=1)
    assert effects(path) == ["0", "1", "2", "3", "4"]


def test_a_long_batch_is_several_transactions(
    config: dict[str, Any], kafka_topic: Callable[..., str], database: tuple[SqliteInbox, Path]
) -> None:
    """A transaction ends after a second of handling: a crash repeats no more, and others get at the database."""
    inbox, path = database
    topic, counts = kafka_topic(), []
    send(config, topic, [str(n) for n in range(12)])

    def slow(message: Message, connection: sqlite3.Connection) -> None:
        counts.append(len(effects(path)))
        time.sleep(0.3)
        effect(message, connection)

    with AtLeastOnce(config, inbox=inbox) as kafka:
        kafka.run([topic], slow, until_idle=1)
    assert effects(path) == [str(n) for n in range(12)]
    assert len(counts) == 12
    assert len(set(counts)) >= 3


def test_a_run_goes_back_to_a_backup_that_is_restored_into_its_file(
    config: dict[str, Any], kafka_topic: Callable[..., str], database: tuple[SqliteInbox, Path], tmp_path: Path
) -> None:
    """D20: the effects behind the backup are gone with their offsets; the run that is at work makes them again."""
    inbox, path = database
    topic = kafka_topic()

    def reach(count: int) -> None:
        send(config, topic, [str(n) for n in range(count - 3, count)])
        deadline = time.monotonic() + 30
        while len(effects(path)) < count:
            assert time.monotonic() < deadline, effects(path)
            time.sleep(0.05)

    def copy(source: Path, target: Path) -> None:
        with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
            one.backup(other)

    with AtLeastOnce(config, inbox=inbox) as kafka, ThreadPoolExecutor(1) as pool:
        run = pool.submit(kafka.run, [topic], effect)
        try:
            reach(3)
            copy(path, tmp_path / "backup.db")
            reach(6)
            copy(tmp_path / "backup.db", path)
            assert len(effects(path)) == 3
            reach(9)
        finally:
            kafka.stop()
        run.result(30)
    assert effects(path) == [str(n) for n in range(9)]


def test_a_topic_that_was_created_again_is_refused(
    kafka: RunningKafka, config: dict[str, Any], fresh: Callable[[str], str], database: tuple[SqliteInbox, Path]
) -> None:
    """D06: its offsets mean something else; going on would leave out what was never handled."""
    inbox, path = database
    topic = fresh("again")
    kafka.create_topic(topic, 1)
    send(config, topic, ["a", "b"])
    with AtLeastOnce(config, inbox=inbox) as client:
        client.run([topic], effect, until_idle=1)
    recreate(kafka, topic)
    kafka.create_topic(topic, 1)
    send(config, topic, ["c", "d", "e"])
    with AtLeastOnce(config, inbox=inbox) as client, pytest.raises(TopicRecreated, match=topic):
        client.run([topic], effect, until_idle=1)
    assert effects(path) == ["a", "b"]


def test_an_offset_that_the_topic_has_not_reached_is_refused(
    config: dict[str, Any], kafka_topic: Callable[..., str], database: tuple[SqliteInbox, Path]
) -> None:
    """Records that were handled are gone, as after an unclean leader election: what comes next would be left out."""
    inbox, path = database
    topic = kafka_topic()
    send(config, topic, ["a", "b"])
    with AtLeastOnce(config, inbox=inbox) as client:
        client.run([topic], effect, until_idle=1)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE kg_inbox_offset SET next_offset = 99")
        with pytest.raises(OffsetBeyondEnd, match=f"99 of topic '{topic}' partition 0, which ends at 2"):
            client.run([topic], effect, until_idle=1)
    assert effects(path) == ["a", "b"]


def test_an_inbox_that_lost_its_database_is_refused(
    config: dict[str, Any], kafka_topic: Callable[..., str], database: tuple[SqliteInbox, Path], tmp_path: Path
) -> None:
    """The group's offset is beyond effects that are gone: going on there would lose them in silence. The user decides."""
    inbox, path = database
    topic, empty = kafka_topic(), tmp_path / "restored.db"
    send(config, topic, ["a", "b"])
    with AtLeastOnce(config, inbox=inbox) as kafka:
        kafka.run([topic], effect, until_idle=1)
    with closing(sqlite3.connect(empty)) as connection, connection:
        connection.execute("CREATE TABLE effects (name TEXT)")
    with SqliteInbox(empty) as other, AtLeastOnce(config, inbox=other) as kafka:
        with pytest.raises(OffsetsLost, match="another database, or an older state"):
            kafka.run([topic], effect, until_idle=1)
        set_by_hand(config, topic, 0)
        kafka.run([topic], effect, until_idle=1)
    assert effects(path) == effects(empty) == ["a", "b"]


def set_by_hand(config: dict[str, Any], topic: str, offset: int) -> None:
    """As kafka-consumer-groups.sh --reset-offsets does, while the group is empty."""
    consumer = Consumer({"bootstrap.servers": config["bootstrap.servers"], "group.id": config["group.id"]})
    began = time.monotonic()
    while True:  # librdkafka does not wait until the group has let its member go
        try:
            consumer.commit(offsets=[TopicPartition(topic, 0, offset)], asynchronous=False)
            break
        except KafkaException:
            assert time.monotonic() < began + 3, "the member has not left: its session is six seconds"
            time.sleep(0.05)
    consumer.close()


def test_a_reset_of_the_group_that_an_inbox_overrules_is_told(
    config: dict[str, Any],
    kafka_topic: Callable[..., str],
    database: tuple[SqliteInbox, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ahead: in the log, and nothing is left out. Back, as after a crash: nothing is said, and nothing is handled twice."""
    inbox, path = database
    topic = kafka_topic()
    told = f"{topic} 0: the group's offsets were set ahead of the inbox's"

    def run() -> int:
        caplog.clear()
        with AtLeastOnce(config, inbox=inbox, message_id=None) as kafka:
            kafka.run([topic], effect, until_idle=1)
        return sum(record.levelno == logging.WARNING and told in record.getMessage() for record in caplog.records)

    send(config, topic, ["a", "b"])
    assert run() == 0
    set_by_hand(config, topic, 0)
    assert run() == 0
    send(config, topic, ["c", "d", "e"])
    set_by_hand(config, topic, 4)
    assert run() == 1
    assert effects(path) == ["a", "b", "c", "d", "e"]
    assert run() == 0


@pytest.mark.parametrize("kind", [PostgresDedupStore, PostgresInbox])
def test_a_database_that_refuses_ends_the_run(
    config: dict[str, Any], kafka_topic: Callable[..., str], postgres_server: LocalPostgres, kind: type[Any]
) -> None:
    """It would refuse again: the run says so at once, and nothing is handled or committed."""
    topic, handled = kafka_topic(), Handled()
    send(config, topic, ["a"])
    began = time.monotonic()
    with closing(kind(make_conninfo(postgres_server.dsn, password="wrong"))) as there:
        option = {"inbox" if kind is PostgresInbox else "dedup": there}
        with AtLeastOnce(config, **option) as kafka, pytest.raises(AuthorizationError, match="password authentication failed"):
            kafka.run([topic], handled, until_idle=20)
    assert time.monotonic() - began < 15
    assert handled == []
    assert committed(config["bootstrap.servers"], config["group.id"], topic)[0] <= 0


def test_while_a_database_is_away_the_log_says_why(
    config: dict[str, Any],
    kafka_topic: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """D16: it is waited for; and who reads the log need not guess what is wrong."""
    monkeypatch.setattr("kafka_guarantees.dedup.postgres._CONNECTION_WAIT", 2.0)
    send(config, topic := kafka_topic(), ["a"])
    with PostgresDedupStore("postgresql://me:secret@127.0.0.1:1/app") as away, AtLeastOnce(config, dedup=away) as kafka:
        stop = threading.Timer(10, kafka.stop)
        stop.start()
        kafka.run([topic], Handled())
        stop.join()
    [line, *_] = [record.getMessage() for record in caplog.records if "It is asked again in" in record.getMessage()]
    assert "Connection refused" in line
    assert "secret" not in caplog.text


class Interrupted(SqliteInbox):
    """Loses its connection under the handler for a while, as a database does that restarts."""

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[Any]:
        try:
            with super().transaction(scope, entries) as transaction:
                yield transaction
        except sqlite3.DatabaseError as error:
            raise StoreUnavailable("the connection is gone, says the test") from error


def test_a_connection_that_is_lost_under_the_handler_is_not_its_failure(
    config: dict[str, Any], kafka_topic: Callable[..., str], database: tuple[SqliteInbox, Path]
) -> None:
    """The database restarts: the run goes on when it is back, and each effect is there once."""
    _, path = database
    topic = kafka_topic()
    send(config, topic, [str(n) for n in range(5)])
    lost: list[int] = []

    def unlucky(message: Message, connection: sqlite3.Connection) -> None:
        effect(message, connection)
        if message.offset() == 3 and len(lost) < 3:
            lost.append(3)
            raise sqlite3.OperationalError("server closed the connection unexpectedly")

    with Interrupted(path) as inbox, AtLeastOnce(config, inbox=inbox) as kafka:
        kafka.run([topic], unlucky, until_idle=1)
    assert effects(path) == ["0", "1", "2", "3", "4"]
    assert len(lost) == 3


# -- options ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"message_id": header("id")}, ValueError, "no use without"),
        ({"dedup": MemoryDedupStore(), "message_id": None}, ValueError, "needs ids"),
        ({"dedup": MemoryDedupStore(), "message_id": "event-id"}, TypeError, "header"),
        ({"dedup": MemoryDedupStore(), "message_id": position}, TypeError, r"position itself.*: call it"),
        ({"dedup": MemoryDedupStore(), "message_id": first_of}, TypeError, r"first_of itself.*: call it"),
        ({"dedup": MemoryDedupStore(), "message_id": cloudevent}, TypeError, r"cloudevent itself.*: call it"),
        ({"dedup": MemoryDedupStore(), "message_id": header}, TypeError, r"header itself.*: call it"),
        ({"dedup": MemoryDedupStore(), "message_id": json_field}, TypeError, r"json_field itself.*: call it"),
        ({"dedup": MemoryDedupStore(), "fingerprint": "false"}, TypeError, "True or False, not 'false'"),
        ({"dedup": MemoryDedupStore(), "on_missing_id": "skip"}, ValueError, "on_missing_id"),
        ({"dedup": MemoryDedupStore(), "on_store_error": "ignore"}, ValueError, "on_store_error"),
        ({"dedup": MemoryDedupStore(), "takeover": "never"}, ValueError, "takeover"),
        ({"dedup": MemoryDedupStore(), "scope": ""}, ValueError, "scope"),
        ({"dedup": MemoryDedupStore(), "inbox": object()}, ValueError, "one of them"),
        ({"inbox": object(), "on_store_error": "process"}, UnsafeConfigError, "inbox"),
        ({"dedup": "ids.db"}, TypeError, "such as SqliteDedupStore"),
        ({"inbox": "postgresql://somewhere"}, TypeError, "such as SqliteInbox"),
        ({"dedup": SqliteDedupStore}, TypeError, "such as .* not the class SqliteDedupStore itself"),
        ({"inbox": PostgresInbox}, TypeError, "such as .* not the class PostgresInbox itself"),
        ({"dedup": MemoryDedupStore(retention=timedelta(seconds=2)), "message_id": json_field("id")}, DurabilityWarning, "day"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], error: type[Exception], says: str) -> None:
    """Before anything is connected; a retention that is short is a warning, at the line of the user (D05)."""
    if issubclass(error, Warning):
        with pytest.warns(error, match=says) as warned:
            AtLeastOnce({"bootstrap.servers": "127.0.0.1:1", "group.id": "g"}, **options)
        assert warned[0].filename == __file__
    else:
        with pytest.raises(error, match=says):
            AtLeastOnce({"bootstrap.servers": "127.0.0.1:1", "group.id": "g"}, **options)


def test_messages_is_refused_with_an_inbox(database: tuple[SqliteInbox, Path]) -> None:
    """A loop of the user's own has no place where its transaction could end."""
    with (
        AtLeastOnce({"bootstrap.servers": "127.0.0.1:1", "group.id": "g"}, inbox=database[0]) as kafka,
        pytest.raises(TypeError, match="run"),
    ):
        kafka.messages(["topic"])


def test_the_sqlite_store_recognises_across_processes(
    config: dict[str, Any], kafka_topic: Callable[..., str], tmp_path: Path
) -> None:
    """What one client handled the next leaves out, with the same file."""
    topic, handled = kafka_topic(), Handled()
    for _ in range(2):
        send(config, topic, ["a", "b"])
        with SqliteDedupStore(tmp_path / "ids.db") as store, AtLeastOnce(config, dedup=store) as kafka:
            kafka.run([topic], handled, until_idle=1)
    assert handled == ["a", "b"]
