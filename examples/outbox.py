"""A row and its event, both or neither: events are rows of the same transaction, and a relay sends them afterwards."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kafka_guarantees import AtLeastOnce
from kafka_guarantees.dedup import SqliteInbox

if TYPE_CHECKING:
    from confluent_kafka import Message

BOOTSTRAP = os.environ.get("KAFKA_GUARANTEES_BOOTSTRAP", "localhost:9092")
PAYMENTS, BOOKED, REFUSED = topics = [f"{name}-{uuid.uuid4().hex[:8]}" for name in ("payments", "booked", "refused")]
admin = AdminClient({"bootstrap.servers": BOOTSTRAP, "log_level": 4})
for created in admin.create_topics([NewTopic(name, num_partitions=1) for name in topics]).values():
    created.result()


def book(message: Message, connection: sqlite3.Connection) -> None:
    user = (message.key() or b"").decode()
    connection.execute("INSERT INTO outbox (key, value) VALUES (?, ?)", (user, f"booked for {user}"))
    connection.execute("INSERT INTO ledger VALUES (?)", (user,))  # refused for mallory: then her event is not there, either


def relay(database: sqlite3.Connection, kafka: AtLeastOnce) -> None:
    """Send what is in the outbox, oldest first. It leaves once it is acknowledged. Run one relay, or events get mixed up."""
    while events := database.execute("SELECT id, key, value FROM outbox ORDER BY id LIMIT 500").fetchall():
        for number, key, value in events:
            kafka.produce(BOOKED, value, key, message_id=f"booked-{number}")  # after a crash the same event has the same id
        kafka.flush()  # raises where one was not acknowledged
        with database:
            database.executemany("DELETE FROM outbox WHERE id = ?", [event[:1] for event in events])


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "bank.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE ledger (account TEXT CHECK (account <> 'mallory'))")
        database.execute("CREATE TABLE outbox (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT, value TEXT)")
    config = {"bootstrap.servers": BOOTSTRAP, "group.id": PAYMENTS}
    with SqliteInbox(path) as inbox, AtLeastOnce(config, inbox=inbox, dead_letter=REFUSED, retry=None) as kafka:
        for user in ("alice", "mallory", "bob"):
            kafka.produce(PAYMENTS, key=user, message_id=user)
        kafka.run([PAYMENTS], book, until_idle=1)
        relay(database, kafka)
    database.close()
with AtLeastOnce({"bootstrap.servers": BOOTSTRAP, "group.id": BOOKED}) as reader:
    reader.run([BOOKED], lambda message: print((message.value() or b"").decode()), until_idle=1)
