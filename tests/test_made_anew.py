"""A topic that is deleted and made anew while it is read: its leader epochs begin again, which librdkafka does not notice."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, OffsetsLost
from kafka_guarantees.dedup import SqliteInbox
from kafka_guarantees.testing.local_kafka import LocalKafka

from .conftest import fill
from .test_truncation import PROTOCOLS
from .world import in_thread, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from confluent_kafka import Message

pytestmark = pytest.mark.broker

KINDS = ["AtMostOnce", "AtLeastOnce", "ExactlyOnce", "inbox"]
TOPICS = [f"{kind}-{name}" for kind in KINDS for name in PROTOCOLS] + [f"busy-{kind}" for kind in KINDS] + ["open"]


@pytest.fixture(scope="module")
def restarted() -> Iterator[LocalKafka]:
    """Partitions with records, whose leader epoch is above 0, as after any restart of a broker."""
    with LocalKafka() as kafka:
        for topic in TOPICS:
            kafka.create_topic(topic)
            fill(kafka.bootstrap, topic, [b"%d" % number for number in range(20)])
        kafka.kill(0)
        kafka.restart(0)
        yield kafka


@pytest.fixture
def client(restarted: LocalKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setattr("kafka_guarantees._vanished.EVERY", 1.0)
    with ExitStack() as stack:

        def make(kind: str, topic: str, protocol: str) -> Any:
            config = {"bootstrap.servers": restarted.bootstrap, "group.id": topic, **PROTOCOLS[protocol]}
            options: dict[str, Any] = {"start": "earliest", "preflight": "off"}
            if kind == "ExactlyOnce":
                config["transactional.id"] = topic
            if kind == "inbox":
                inbox = stack.enter_context(closing(SqliteInbox(tmp_path / "inbox.db")))
                options |= {"inbox": inbox, "message_id": None}
            made: dict[str, Any] = {"AtMostOnce": AtMostOnce, "ExactlyOnce": ExactlyOnce}
            return stack.enter_context(made.get(kind, AtLeastOnce)(config, **options))

        yield make


def make_anew(kafka: LocalKafka, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.delete_topics([topic])[topic].result()
    while True:
        with suppress(Exception):  # it is still being deleted
            kafka.create_topic(topic)
            break
        time.sleep(0.05)
    fill(kafka.bootstrap, topic, [b"new"] * 5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_topic_that_is_made_anew_while_it_is_read_is_noticed(
    restarted: LocalKafka, client: Callable[..., Any], kind: str, protocol: str
) -> None:
    """Nothing would come from it any more, in silence: neither the new records nor an error."""
    topic = f"{kind}-{protocol}"
    read: list[Message] = []
    reader = client(kind, topic, protocol)
    running = in_thread(lambda: reader.run([topic], lambda message, *_: read.append(message)))
    try:
        until(lambda: len(read) == 20, "it was read")
        time.sleep(0.5)  # committed
        make_anew(restarted, topic)
        error = running()
    finally:
        reader.stop()
    assert isinstance(error, OffsetsLost), error
    assert "Nothing " in str(error)
    assert len(read) == 20


def test_a_group_ahead_of_an_open_transaction_has_lost_nothing(restarted: LocalKafka, client: Callable[..., Any]) -> None:
    """As kafka-consumer-groups.sh --to-latest sets it, or a reader of what is not committed: it waits for the end of that."""
    producer = Producer({"bootstrap.servers": restarted.bootstrap, "transactional.id": "open"})
    producer.init_transactions(30)
    producer.begin_transaction()
    for _ in range(5):
        producer.produce("open", b"")
    producer.flush()
    with closing(Consumer({"bootstrap.servers": restarted.bootstrap, "group.id": "open"})) as group:
        group.commit(offsets=[TopicPartition("open", 0, 25)], asynchronous=False)
    reader, read = client("AtLeastOnce", "open", "eager"), list[bytes | None]()
    running = in_thread(lambda: reader.run(["open"], lambda message: read.append(message.value())))
    try:
        time.sleep(5)  # some looks
        producer.commit_transaction(30)
        fill(restarted.bootstrap, "open", [b"new"])
        until(lambda: read == [b"new"], "it goes on")
    finally:
        reader.stop()
    assert running() is None


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_noticed_where_the_group_has_committed_since(
    restarted: LocalKafka, client: Callable[..., Any], kind: str
) -> None:
    """What is in hand in that moment is committed to the new topic, which takes any offset."""
    topic = f"busy-{kind}"
    read: list[Message] = []
    reader = client(kind, topic, "eager")

    def handler(message: Message, *_: object) -> None:
        read.append(message)
        if len(read) == 10:
            make_anew(restarted, topic)

    running = in_thread(lambda: reader.run([topic], handler))
    try:
        error = running()
    finally:
        reader.stop()
    assert isinstance(error, OffsetsLost), error
    assert b"new" not in {message.value() for message in read}
