"""A topic that is deleted and made anew while it is read: its leader epochs begin again, which librdkafka does not notice."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka.admin import AdminClient

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, OffsetsLost
from kafka_guarantees.dedup import SqliteInbox
from kafka_guarantees.testing.local_kafka import LocalKafka

from .conftest import fill
from .world import in_thread, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from confluent_kafka import Message

pytestmark = pytest.mark.broker

PROTOCOLS: dict[str, dict[str, str]] = {
    "eager": {},
    "cooperative": {"partition.assignment.strategy": "cooperative-sticky"},
    "KIP-848": {"group.protocol": "consumer"},
}
TOPICS = [f"{kind}-{name}" for kind in ("AtMostOnce", "AtLeastOnce", "ExactlyOnce", "inbox") for name in PROTOCOLS]


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


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", [AtMostOnce, AtLeastOnce, ExactlyOnce, SqliteInbox])
def test_a_topic_that_is_made_anew_while_it_is_read_is_noticed(
    restarted: LocalKafka, kind: type[Any], protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing would come from it any more, in silence: neither the new records nor an error."""
    monkeypatch.setattr("kafka_guarantees._vanished.EVERY", 1.0)
    topic = f"{'inbox' if kind is SqliteInbox else kind.__name__}-{protocol}"
    config = {"bootstrap.servers": restarted.bootstrap, "group.id": topic, **PROTOCOLS[protocol]}
    options: dict[str, Any] = {"start": "earliest", "preflight": "off"}
    read: list[Message] = []
    handler: Callable[..., None] = lambda message, *_: read.append(message)  # noqa: E731
    with closing(SqliteInbox(tmp_path / "inbox.db")) as inbox:
        if kind is ExactlyOnce:
            config["transactional.id"] = topic
        if kind is SqliteInbox:
            options |= {"inbox": inbox, "message_id": None}
        with (AtLeastOnce if kind is SqliteInbox else kind)(config, **options) as client:
            running = in_thread(lambda: client.run([topic], handler))
            try:
                until(lambda: len(read) == 20, "it was read")
                time.sleep(0.5)  # committed
                admin = AdminClient({"bootstrap.servers": restarted.bootstrap})
                admin.delete_topics([topic])[topic].result()
                time.sleep(1)
                restarted.create_topic(topic)
                fill(restarted.bootstrap, topic, [b"new"] * 5)
                error = running()
            finally:
                client.stop()
    assert isinstance(error, OffsetsLost), error
    assert "Nothing was" in str(error)
    assert len(read) == 20
