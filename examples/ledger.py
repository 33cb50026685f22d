"""Credits, booked once in PostgreSQL: ids, offsets and the handler's own rows are one transaction. Needs LEDGER_DSN."""

from __future__ import annotations

import json
import os
import uuid
from typing import TYPE_CHECKING, Any

import psycopg
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kafka_guarantees import AtLeastOnce
from kafka_guarantees.dedup import PostgresInbox, json_field

if TYPE_CHECKING:
    from confluent_kafka import Message

BOOTSTRAP = os.environ.get("KAFKA_GUARANTEES_BOOTSTRAP", "localhost:9092")
DSN = os.environ.get("LEDGER_DSN", "postgresql://localhost/ledger")
CREDITS = "offer-credits"
CAMPAIGN = uuid.uuid4().hex  # each run of this example books another one
crashes = ["the worker crashed"]


def create(topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": BOOTSTRAP, "log_level": 4})
    if topic not in admin.list_topics(timeout=10).topics:
        admin.create_topics([NewTopic(topic, num_partitions=1)])[topic].result()


def book(message: Message, connection: psycopg.Connection[Any]) -> None:
    credit = json.loads(message.value() or b"")
    connection.execute("INSERT INTO ledger VALUES (%(campaign)s, %(user)s, %(amount)s)", credit)
    if credit["user"] == "bob" and crashes:
        print("rolled back:", crashes[0])
        raise RuntimeError(crashes.pop())  # his row is written, and not committed; he is tried again in a moment


create(CREDITS)
with psycopg.connect(DSN) as database:
    database.execute("CREATE TABLE IF NOT EXISTS ledger (campaign text, account text, amount int)")
with AtLeastOnce({"bootstrap.servers": BOOTSTRAP}) as shop:
    for user in ("alice", "bob", "carol", "alice", "bob", "carol"):  # each of them twice
        credit = {"id": f"{CAMPAIGN}-{user}", "campaign": CAMPAIGN, "user": user, "amount": 10}
        shop.produce(CREDITS, json.dumps(credit))

config = {"bootstrap.servers": BOOTSTRAP, "group.id": "ledger"}
with PostgresInbox(DSN) as inbox, AtLeastOnce(config, inbox=inbox, message_id=json_field("id")) as kafka:
    kafka.run([CREDITS], book, until_idle=1)
with psycopg.connect(DSN) as database:
    for row in database.execute("SELECT account, amount FROM ledger WHERE campaign = %s ORDER BY account", [CAMPAIGN]):
        print("booked:", *row)
