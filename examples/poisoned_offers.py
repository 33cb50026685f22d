"""Poisoned offers: one user's requests fail twice, another's for ever. They are tried again, set aside, and sent back later."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kafka_guarantees import AtLeastOnce, ExactlyOnce, Record, attempt
from kafka_guarantees.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

    from confluent_kafka import Message

BOOTSTRAP = os.environ.get("KAFKA_GUARANTEES_BOOTSTRAP", "localhost:9092")
REQUESTS, OFFERS, DEAD_LETTERS = "poisoned-requests", "poisoned-offers", "poisoned-requests-dead-letters"
failing = {"bob": 2, "mallory": 1_000_000}  # attempts at a request of theirs


def create(topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": BOOTSTRAP, "log_level": 4})
    if topic not in admin.list_topics(timeout=10).topics:
        admin.create_topics([NewTopic(topic, num_partitions=1)])[topic].result()


def grant(message: Message) -> Iterator[Record]:
    user = (message.key() or b"").decode()
    print(f"attempt {attempt.get()}: {user}")
    if attempt.get() <= failing.get(user, 0):
        raise ConnectionError(f"no code for {user}")
    yield Record(OFFERS, key=user, value=f"CODE-FOR-{user.upper()}")


def run() -> None:
    config = {"bootstrap.servers": BOOTSTRAP, "group.id": "poisoned", "transactional.id": "poisoned-0"}
    with ExactlyOnce(config, dead_letter=DEAD_LETTERS) as kafka:
        kafka.run([REQUESTS], grant, until_idle=1)
    with AtLeastOnce({"bootstrap.servers": BOOTSTRAP, "group.id": "poisoned-shop"}) as shop:
        for message in shop.messages([OFFERS], until_idle=1):
            print("visible:", (message.value() or b"").decode())


for topic in (REQUESTS, OFFERS, DEAD_LETTERS):
    create(topic)
with AtLeastOnce({"bootstrap.servers": BOOTSTRAP}) as site:
    for user in ("alice", "bob", "mallory", "carol"):
        site.produce(REQUESTS, key=user)
run()
failing.clear()  # what was wrong is mended, and what was set aside goes back to where it came from
with redirect_stdout(io.StringIO()) as sent:
    main(["dead-letters", "replay", DEAD_LETTERS, "--all", "-b", BOOTSTRAP])
print("replayed:", len(sent.getvalue().splitlines()))
run()
