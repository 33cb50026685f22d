"""Notifications, one for each event although a relay sends events twice: what was handled before is in an SQLite file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kafka_guarantees import AtLeastOnce
from kafka_guarantees.dedup import SqliteDedupStore, header

if TYPE_CHECKING:
    from confluent_kafka import Message

BOOTSTRAP = os.environ.get("KAFKA_GUARANTEES_BOOTSTRAP", "localhost:9092")
EVENTS = "offer-events"


def create(topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": BOOTSTRAP, "log_level": 4})
    if topic not in admin.list_topics(timeout=10).topics:
        admin.create_topics([NewTopic(topic, num_partitions=1)])[topic].result()


def relay(*users: str) -> None:
    """What an outbox relay does after a crash: it does not know what it has sent, and sends it again, at other offsets."""
    with AtLeastOnce({"bootstrap.servers": BOOTSTRAP}) as outbox:
        for user in users:
            outbox.produce(EVENTS, key=user, value="ends today", headers={"event-id": f"ends-today-{user}"})
    print("relayed:", ", ".join(users))


def notify(message: Message) -> None:
    print(f"notified {(message.key() or b'').decode()}: your offer {(message.value() or b'').decode()}")


def work(ids: Path) -> None:
    """A worker from its start to its end. The next one opens the same file."""
    config = {"bootstrap.servers": BOOTSTRAP, "group.id": "notifier-once"}
    with SqliteDedupStore(ids) as store, AtLeastOnce(config, dedup=store, message_id=header("event-id")) as kafka:
        kafka.run([EVENTS], notify, until_idle=1)
        print("left out:", kafka.dedup_counts["duplicate"])


create(EVENTS)
with tempfile.TemporaryDirectory() as folder:  # yours is a folder that outlives the process
    relay("alice", "bob")
    relay("alice", "bob")
    work(Path(folder) / "ids.db")
    relay("alice", "bob", "carol")
    work(Path(folder) / "ids.db")
