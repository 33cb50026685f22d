"""Notifications, at least once: what fails stops the run, is not committed, and comes again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kafka_guarantees import AtLeastOnce, HandlerError, Record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from confluent_kafka import Message

BOOTSTRAP = os.environ.get("KAFKA_GUARANTEES_BOOTSTRAP", "localhost:9092")
CHANGES, NOTIFICATIONS = "offer-changes", "notifications"
mail_works = False


def create(topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": BOOTSTRAP, "log_level": 4})
    if topic not in admin.list_topics(timeout=10).topics:
        admin.create_topics([NewTopic(topic, num_partitions=1)])[topic].result()


def notify(message: Message) -> Iterator[Record]:
    user, change = (message.key() or b"").decode(), (message.value() or b"").decode()
    if user == "bob" and not mail_works:
        raise ConnectionError("the mail server is away")
    print(f"notified {user}: {change}")
    yield Record(NOTIFICATIONS, key=user, value=f"your offer {change}")


create(CHANGES)
create(NOTIFICATIONS)
with AtLeastOnce({"bootstrap.servers": BOOTSTRAP, "group.id": "notifier"}) as kafka:
    for user in ("alice", "bob", "carol"):
        kafka.produce(CHANGES, key=user, value="ends today", message_id=f"ends-today-{user}")
    kafka.flush()  # all three are acknowledged, or this raises
    print("acknowledged: 3 changes")

    try:
        kafka.run([CHANGES], notify, until_idle=1)
    except HandlerError as error:
        print(f"stopped: {error.__cause__}")
    mail_works = True
    kafka.run([CHANGES], notify, until_idle=1)  # goes on with the one that failed
print("done")
