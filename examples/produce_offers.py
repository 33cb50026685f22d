"""Offers produced in transactions: all of a campaign becomes visible, or nothing of it."""

from __future__ import annotations

import os

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kafka_guarantees import AtLeastOnce, ExactlyOnce

BOOTSTRAP = os.environ.get("KAFKA_GUARANTEES_BOOTSTRAP", "localhost:9092")
TOPIC = "offer-campaigns"


def create(topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": BOOTSTRAP, "log_level": 4})
    if topic not in admin.list_topics(timeout=10).topics:
        admin.create_topics([NewTopic(topic, num_partitions=1)])[topic].result()


create(TOPIC)
with ExactlyOnce({"bootstrap.servers": BOOTSTRAP, "transactional.id": "campaigns-0"}) as kafka:
    with kafka.transaction() as tx:
        for user in ("alice", "bob"):
            tx.produce(TOPIC, key=user, value=f"winter offer for {user}")
    print("committed: the winter campaign")

    try:
        with kafka.transaction() as tx:
            tx.produce(TOPIC, key="alice", value="summer offer for alice")
            raise LookupError("bob is not a customer any more")  # noqa: TRY301 - the failure that is shown
    except LookupError as error:
        print(f"aborted: the summer campaign ({error})")

with AtLeastOnce({"bootstrap.servers": BOOTSTRAP, "group.id": "campaign-reader"}) as reader:
    for message in reader.messages([TOPIC], until_idle=1):
        print("visible:", (message.value() or b"").decode())
