"""A store of one's own, which passes DedupStoreConformance: ids in a table beside the service's other tables."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kafka_guarantees import AtLeastOnce, StoreUnavailable
from kafka_guarantees.dedup import Capabilities, Item, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from confluent_kafka import Message

TABLE = "CREATE TABLE IF NOT EXISTS handled (scope, id, token, place, print, until, PRIMARY KEY (scope, id))"
KNOWN = "SELECT token, place, print, until FROM handled WHERE scope = ? AND id = ?"
WRITE = "REPLACE INTO handled VALUES (?, ?, ?, ?, ?, ?)"  # a completed id has no token
FORGET = "DELETE FROM handled WHERE scope = ? AND id = ? AND token = ?"
EXPIRED = "SELECT scope, id, token FROM handled WHERE until <= CASE token WHEN x'' THEN ? ELSE ? END"


class TableStore:
    capabilities = Capabilities(shared=False, durable="power", clock="client")

    def __init__(self, database: Path, retention: timedelta, clock: Callable[[], float] = time.time) -> None:
        self._database, self.retention, self._clock = database, retention, clock

    @contextmanager
    def _rows(self, scope: str, items: Sequence[Item]) -> Iterator[tuple[sqlite3.Connection, list[Any]]]:
        try:
            with closing(sqlite3.connect(self._database, timeout=30, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")  # nobody else looks or writes from here on; a server has SELECT FOR UPDATE
                database.execute(TABLE)
                yield database, [database.execute(KNOWN, (scope, item.key)).fetchone() for item in items]
                database.execute("COMMIT")  # closed without it, nothing is written
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(f"{self._database}: {error}. The same call may be made again.") from error

    def _outcome(self, row: Any, item: Item, token: bytes, takeover: str) -> Outcome:
        owner, place, fingerprint, until = row or (b"", b"", b"", 0.0)
        over = until <= self._clock()
        if owner == token or (over and not owner):
            return Outcome.NEW
        if not owner:
            return Outcome.MISMATCH if b"" != fingerprint != item.fingerprint != b"" else Outcome.DUPLICATE
        return Outcome.TAKEN_OVER if over or (takeover == "position" and place == item.position) else Outcome.IN_PROGRESS

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: str = "position"
    ) -> list[Outcome]:
        with self._rows(scope, items) as (database, rows):
            outcomes = [self._outcome(row, item, token, takeover) for row, item in zip(rows, items, strict=True)]
            mine = [item for item, outcome in zip(items, outcomes, strict=True) if outcome <= Outcome.TAKEN_OVER]
            database.executemany(WRITE, [(scope, i.key, token, i.position, b"", self._clock() + lease) for i in mine])
        return outcomes

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        with self._rows(scope, items) as (database, rows):
            owners, until = [row and row[0] for row in rows], self._clock() + self.retention.total_seconds()
            mine = [item for item, owner in zip(items, owners, strict=True) if owner == token]
            database.executemany(WRITE, [(scope, i.key, b"", i.position, i.fingerprint, until) for i in mine])
        return [owner in {token, b""} for owner in owners]

    def release(self, scope: str, items: Sequence[Item], *, token: bytes) -> None:
        with self._rows(scope, ()) as (database, _):
            database.executemany(FORGET, [(scope, item.key, token) for item in items])

    def purge(self, *, limit: int = 10_000) -> int:
        now = self._clock()  # a claim stays for a retention after its lease: a late complete() counts
        with self._rows("", ()) as (database, _):
            expired = database.execute(EXPIRED, (now, now - self.retention.total_seconds())).fetchmany(limit)
            return database.executemany(FORGET, expired).rowcount if expired else 0

    def close(self) -> None:
        pass


def mail(message: Message) -> None:
    print("mailed:", (message.value() or b"").decode())


if __name__ == "__main__":
    broker = {"bootstrap.servers": os.environ.get("KAFKA_GUARANTEES_BOOTSTRAP", "localhost:9092")}
    admin = AdminClient({**broker, "log_level": 4})
    if "coupons" not in admin.list_topics(timeout=10).topics:
        admin.create_topics([NewTopic("coupons", num_partitions=1)])["coupons"].result()
    with tempfile.TemporaryDirectory() as folder:
        store = TableStore(Path(folder) / "service.db", timedelta(days=1))
        with AtLeastOnce({**broker, "group.id": "coupon-mailer"}, dedup=store) as kafka:
            for user in ("alice", "bob", "alice", "bob"):
                kafka.produce("coupons", f"a coupon for {user}", message_id=f"winter-{user}")
            kafka.run(["coupons"], mail, until_idle=1)
            print("left out:", kafka.dedup_counts["duplicate"])
