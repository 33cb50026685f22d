"""The ledger with SQLAlchemy: an inbox that joins the transaction of a Session, which handlers get. Needs LEDGER_DSN."""

from __future__ import annotations

import os
import uuid
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from sqlalchemy import Column, Engine, MetaData, Table, Text, create_engine, insert, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from kafka_guarantees import AtLeastOnce, StoreUnavailable
from kafka_guarantees.dedup import Entry, PostgresInbox

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from confluent_kafka import Message

BOOTSTRAP = os.environ.get("KAFKA_GUARANTEES_BOOTSTRAP", "localhost:9092")
DSN = os.environ.get("LEDGER_DSN", "postgresql://localhost/ledger")
CREDITS, CAMPAIGN = "orm-credits", uuid.uuid4().hex  # each run of this example books another campaign
LEDGER = Table("orm_ledger", MetaData(), Column("campaign", Text), Column("account", Text))


class OrmInbox(PostgresInbox):
    """Ids and offsets by PostgresInbox; begin, commit and rollback by a Session."""

    def __init__(self, dsn: str, engine: Engine) -> None:
        super().__init__(dsn)
        self._engine = engine

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[Any]:
        try:
            with Session(self._engine) as session, session.begin():
                driver: Any = session.connection().connection.driver_connection
                joined = self.enlist(driver, scope, entries)
                yield SimpleNamespace(connection=session, fresh=joined.fresh, finish=joined.finish)
        except OperationalError as error:
            if not of_the_database(error):
                raise  # a statement that took too long, for example, is the fault of its message
            raise StoreUnavailable(f"the database did not answer ({error.orig})") from error


def of_the_database(error: OperationalError) -> bool:
    """Whether the same transaction may succeed when it is tried again: connection lost (08, 57P, no code), deadlock (40)."""
    code = getattr(error.orig, "sqlstate", None)
    return code is None or code.startswith(("08", "40", "57P"))


def book(message: Message, session: Session) -> None:  # with session.add(), end by session.flush(): see docs/dedup.md
    session.execute(insert(LEDGER).values(campaign=CAMPAIGN, account=(message.key() or b"").decode()))


engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(DSN))
LEDGER.metadata.create_all(engine)
admin = AdminClient({"bootstrap.servers": BOOTSTRAP, "log_level": 4})
if CREDITS not in admin.list_topics(timeout=10).topics:
    admin.create_topics([NewTopic(CREDITS, num_partitions=1)])[CREDITS].result()
with (
    OrmInbox(DSN, engine) as inbox,
    AtLeastOnce({"bootstrap.servers": BOOTSTRAP, "group.id": "orm-ledger"}, inbox=inbox) as kafka,
):
    for user in ("alice", "bob", "alice", "bob"):
        kafka.produce(CREDITS, key=user, message_id=f"{CAMPAIGN}-{user}")
    kafka.run([CREDITS], book, until_idle=1)
with Session(engine) as session:
    for account in session.scalars(select(LEDGER.c.account).where(LEDGER.c.campaign == CAMPAIGN).order_by(LEDGER.c.account)):
        print("booked:", account)
engine.dispose()
