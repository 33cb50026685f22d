"""Debug events, at most once: fast, never handled twice; one whose handling fails is gone, and that is fine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kafka_guarantees import AtMostOnce

if TYPE_CHECKING:
    from confluent_kafka import Message

BOOTSTRAP = os.environ.get("KAFKA_GUARANTEES_BOOTSTRAP", "localhost:9092")
TOPIC = "debug-events"


def create(topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": BOOTSTRAP, "log_level": 4})
    if topic not in admin.list_topics(timeout=10).topics:
        admin.create_topics([NewTopic(topic, num_partitions=1)])[topic].result()


def show(message: Message) -> None:
    event = message.value()
    if event == b"the event that nobody can read":
        raise ValueError("not an event")
    print("handled:", (event or b"").decode())


def dropped(message: Message, error: Exception) -> None:
    print(f"dropped: {(message.value() or b'').decode()} ({error})")


create(TOPIC)
with AtMostOnce({"bootstrap.servers": BOOTSTRAP, "group.id": "debug-screen"}, on_error=dropped) as kafka:
    # A new group begins at the end of the topic, so it joins before there is something to see.
    kafka.run([TOPIC], show, until_idle=0.5)

    kafka.produce(TOPIC, "offer page opened")
    kafka.produce(TOPIC, "the event that nobody can read")
    kafka.produce(TOPIC, "offer page closed")
    kafka.flush()

    kafka.run([TOPIC], show, until_idle=1)
    kafka.run([TOPIC], show, until_idle=0.5)  # nothing comes a second time
print("done")
