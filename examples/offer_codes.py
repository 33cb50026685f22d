"""Offer codes, exactly once: consume requests, produce codes; a failure in between leaves no code behind, and none twice."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kafka_guarantees import AtLeastOnce, ExactlyOnce, Record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from confluent_kafka import Message

BOOTSTRAP = os.environ.get("KAFKA_GUARANTEES_BOOTSTRAP", "localhost:9092")
REQUESTS, OFFERS = "offer-requests", "user-offers"
failures = ["the code generator is away"]


def create(topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": BOOTSTRAP, "log_level": 4})
    if topic not in admin.list_topics(timeout=10).topics:
        admin.create_topics([NewTopic(topic, num_partitions=1)])[topic].result()


def grant(message: Message) -> Iterator[Record]:
    user = (message.key() or b"").decode()
    print(f"granting: {user}")
    yield Record(OFFERS, key=user, value=f"CODE-FOR-{user.upper()}")
    if user == "bob" and failures:
        print(f"failed: {failures[0]}")
        raise ConnectionError(failures.pop())  # his code is dropped, and his request is tried again in a moment


create(REQUESTS)
create(OFFERS)
with AtLeastOnce({"bootstrap.servers": BOOTSTRAP}) as site:
    for user in ("alice", "bob", "carol"):
        site.produce(REQUESTS, key=user)

with ExactlyOnce({"bootstrap.servers": BOOTSTRAP, "group.id": "offers", "transactional.id": "offers-0"}) as kafka:
    kafka.run([REQUESTS], grant, until_idle=1)

with AtLeastOnce({"bootstrap.servers": BOOTSTRAP, "group.id": "offer-shop"}) as shop:
    for message in shop.messages([OFFERS], until_idle=1):
        print("visible:", (message.value() or b"").decode())
