"""How fast stores, inboxes and what stands around them are, beside what one writes by hand for the same server.

    python benchmarks/dedup.py [result.json] [--only memory,sqlite,...] [--rounds 7]

Rules.
* Only ratios are compared, of two loops in one run on one server. They take turns, batch by batch, so that both meet the same
  disturbances; each has its own table, with 300,000 ids in it (--ids), and gets the same ids, none of which was there before.
* A round is some thousand ids. Of all rounds the median counts; the smallest and the largest say how much to believe it.
* What needs no server, and the wrapper, go by the CPU time of the thread, which a busy machine changes little; the rest by the
  clock.
* It reports, and does not judge: the exit status is 0 unless it fails itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import uuid
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import psycopg
import redis
from confluent_kafka import KafkaException, Producer

from kafka_guarantees import AtLeastOnce
from kafka_guarantees.dedup import (
    MemoryDedupStore,
    PostgresDedupStore,
    PostgresInbox,
    RedisDedupStore,
    SqliteDedupStore,
    SqliteInbox,
)
from kafka_guarantees.dedup.contract import (
    Capabilities,
    DedupStore,
    Entry,
    Inbox,
    InboxTransaction,
    Item,
    Outcome,
    Source,
)
from kafka_guarantees.dedup.sqlite import CACHE, CHECKPOINT
from kafka_guarantees.testing.local_kafka import RunningKafka, local_or_running
from kafka_guarantees.testing.servers import LocalPostgres, LocalRedis, ServerNotInstalled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from confluent_kafka import KafkaError, Message

T = TypeVar("T")

SCOPE = "benchmark"
TOKEN = b"t" * 16
LEASE = 360.0
RECORDS = 100_000  # of the wrapper
DAY_MS = 86_400_000
FENCED = ", by hand as safe"  # a zombie writes nothing there, either

# Batches of a round, by their size: enough time for a clock, and for a checkpoint of SQLite every other round.
BATCHES = {1: 300, 100: 40, 500: 10, 1000: 10}


@dataclass
class Row:
    """One comparison, by rounds.

    Attributes:
        ours, reference: by unit; no reference where only a limit counts.
        values: what the target is for: ratios, or ours where there is no reference.
        target: the least ratio, or the most of ours; None where there is none.
    """

    name: str
    unit: str
    ours: list[float]
    reference: list[float]
    target: float | None

    @property
    def values(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.reference, strict=True)] if self.reference else self.ours

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        value = median(self.values)
        return value >= self.target if self.reference else value <= self.target

    def line(self) -> str:
        digits = 2 if self.reference or self.unit != "B/id" else 0
        value, low, high = (f"{v:.{digits}f}" for v in (median(self.values), min(self.values), max(self.values)))
        shown = [f"{median(side):,.0f}" if side and self.unit.endswith("/s") else "" for side in (self.ours, self.reference)]
        goal = "-"
        if self.target is not None:
            goal = f"{'>=' if self.reference else '<='} {self.target:<5g} {'met' if self.met else 'MISSED'}"
        unit = "" if self.reference else self.unit
        spread = f"({low}..{high})"
        return f"{self.name:62} {shown[0]:>11} {shown[1]:>11} {value:>7} {spread:>16} {unit:9} {goal}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "median": median(self.values), "met": self.met}


class Bench:
    """Runs comparisons and prints each as soon as it is known."""

    def __init__(self, rounds: int, ids: int) -> None:
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.rounds = rounds
        self._ids = ids

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(row.line(), flush=True)

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(f"{what}: {why}")
        print(f"skipped: {self.skipped[-1]}", flush=True)

    def fill(self, *sides: Callable[[list[Any]], object], make: Callable[[int], list[Any]]) -> int:
        """Ids that are there before anything is measured. Returns how many."""
        for _ in range(self._ids // 1000):
            batch = make(1000)
            for side in sides:
                side(batch)
        return self._ids // 1000 * 1000

    def compare(
        self,
        name: str,
        target: float | None,
        size: int,
        *,
        make: Callable[[int], Sequence[T]],
        ours: Callable[[Sequence[T]], object],
        reference: Callable[[Sequence[T]], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Give both the same batches, in turns; the one that begins changes with each batch."""
        sides = (ours, reference)
        count = BATCHES[size]
        for side in sides:  # connections, statements that are prepared, scripts that are loaded
            side(make(size))
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.rounds):
            batches = [make(size) for _ in range(count)]
            spent = [0.0, 0.0]
            gc.collect()
            for number, batch in enumerate(batches):
                for which in (0, 1) if number % 2 == 0 else (1, 0):
                    began = clock()
                    sides[which](batch)
                    spent[which] += clock() - began
            for which in (0, 1):
                rates[which].append(size * count / spent[which])
        self.add(Row(f"{name}, batch {size}", "ids/s", rates[0], rates[1], target))


def items(count: int) -> list[Item]:
    return [Item(os.urandom(16), os.urandom(16), os.urandom(8)) for _ in range(count)]


def plain(count: int) -> list[Item]:
    return [item._replace(fingerprint=b"") for item in items(count)]


class Entries:
    """Makes batches for inboxes: one partition, its offsets without gaps."""

    def __init__(self, *, ids: bool) -> None:
        self._source = Source("orders", bytes(16), 0)
        self._next = 0
        self._ids = ids

    def __call__(self, count: int) -> list[Entry]:
        first, self._next = self._next, self._next + count
        return [Entry(self._source, offset, os.urandom(16) if self._ids else None) for offset in range(first, self._next)]


def fresh_of(batch: Sequence[Entry], opened: InboxTransaction[Any]) -> Sequence[Entry]:
    """As the loop of at least once does it."""
    return batch if len(opened.fresh) == len(batch) else [batch[index] for index in opened.fresh]


def claim_and_complete(store: DedupStore) -> Callable[[Sequence[Item]], object]:
    def run(batch: Sequence[Item]) -> None:
        outcomes = store.claim(SCOPE, batch, token=TOKEN, lease=LEASE)
        if outcomes.count(Outcome.NEW) != len(batch) or not all(store.complete(SCOPE, batch, token=TOKEN)):
            raise AssertionError("an id that nobody has used was not new")

    return run


# -- memory ---------------------------------------------------------------------------------------------------------------


def memory(bench: Bench) -> None:
    """Beside a dict and a lock, id by id."""
    lock, seen = threading.Lock(), {}

    def by_hand(batch: Sequence[Item]) -> None:
        for key, _, _ in batch:
            with lock:
                if key not in seen:
                    seen[key] = True

    with MemoryDedupStore() as store:
        ours = claim_and_complete(store)
        bench.fill(ours, by_hand, make=items)
        bench.compare("memory store", 0.3, 1000, make=items, ours=ours, reference=by_hand, clock=time.thread_time)
    for make, name in ((plain, "without fingerprints"), (items, "with fingerprints")):
        tracemalloc.start()
        with MemoryDedupStore() as store:
            ours = claim_and_complete(store)
            before = tracemalloc.get_traced_memory()[0]
            count = bench.fill(ours, make=make)
            taken = (tracemalloc.get_traced_memory()[0] - before) / count
        tracemalloc.stop()
        bench.add(Row(f"memory store, {name}", "B/id", [taken], [], 110))


# -- SQLite ---------------------------------------------------------------------------------------------------------------


def connect_sqlite(path: Path, *schema: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in (
        "journal_mode = WAL",
        "synchronous = NORMAL",
        f"wal_autocheckpoint = {CHECKPOINT}",
        f"cache_size = -{CACHE}",
        "temp_store = MEMORY",
    ):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    for statement in schema:
        connection.execute(statement)
    return connection


def sqlite(bench: Bench) -> None:
    """Beside SELECT .. IN and INSERT, one transaction each, with the same pragmas and sorted keys as well."""
    with tempfile.TemporaryDirectory() as folder:
        schema = "CREATE TABLE seen (key BLOB PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID"
        with SqliteDedupStore(Path(folder, "ours")) as store, closing(connect_sqlite(Path(folder, "hand"), schema)) as hand:

            def by_hand(batch: Sequence[Item]) -> None:
                keys = sorted(item.key for item in batch)
                hand.execute("BEGIN")
                known = hand.execute(f"SELECT key FROM seen WHERE key IN ({', '.join('?' * len(keys))})", keys).fetchall()
                hand.execute("COMMIT")
                new = set(keys).difference(key for (key,) in known)
                hand.execute("BEGIN IMMEDIATE")
                now = time.time()
                hand.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", [(key, now) for key in keys if key in new])
                hand.execute("COMMIT")

            ours = claim_and_complete(store)
            bench.fill(ours, by_hand, make=items)
            for size, target in ((1, None), (100, None), (1000, 0.75)):
                bench.compare("SQLite store", target, size, make=items, ours=ours, reference=by_hand, clock=time.thread_time)


def sqlite_inbox(bench: Bench) -> None:
    """Beside one transaction: ids, effects, offset; and beside one that sees whether the offset is where it was."""
    effects = "CREATE TABLE effects (number INTEGER PRIMARY KEY, amount INTEGER NOT NULL)"
    insert = "INSERT INTO effects (amount) VALUES (?)"
    for ids, target in ((True, 0.9), (False, 0.95)):
        make = Entries(ids=ids)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "hand")
            schema = [
                effects,
                "CREATE TABLE seen (key BLOB PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",
                "CREATE TABLE place (topic TEXT, partition INT, next INTEGER, PRIMARY KEY (topic, partition)) WITHOUT ROWID",
                "INSERT INTO place VALUES ('orders', 0, 0)",
            ]
            with SqliteInbox(Path(folder, "ours")) as inbox, closing(connect_sqlite(path, *schema)) as hand:
                with closing(sqlite3.connect(Path(folder, "ours"))) as other:
                    other.execute(effects)
                inbox._connection.execute(f"PRAGMA cache_size = -{CACHE}")  # the file and its cache are the user's
                inbox._connection.execute("PRAGMA temp_store = MEMORY")

                def ours(batch: Sequence[Entry], inbox: SqliteInbox = inbox) -> None:
                    with inbox.transaction(SCOPE, batch) as opened:
                        opened.connection.executemany(insert, [(entry.offset,) for entry in fresh_of(batch, opened)])
                        opened.finish()

                def by_hand(batch: Sequence[Entry], hand: sqlite3.Connection = hand, *, fenced: bool = False) -> None:
                    hand.execute("BEGIN IMMEDIATE")
                    if fenced:
                        [(next_offset,)] = hand.execute("SELECT next FROM place WHERE topic = 'orders' AND partition = 0")
                        if next_offset > batch[0].offset:
                            raise AssertionError("another owner was here")
                    if batch[0].key is not None:
                        now = time.time()
                        rows = [(entry.key, now) for entry in sorted(batch, key=lambda entry: entry.key or b"")]
                        new = hand.executemany("INSERT INTO seen VALUES (?, ?) ON CONFLICT DO NOTHING", rows).rowcount
                        if new < len(batch):
                            raise AssertionError("an id that nobody has used was not new")
                    hand.executemany(insert, [(entry.offset,) for entry in batch])
                    hand.execute("UPDATE place SET next = ? WHERE topic = 'orders' AND partition = 0", [batch[-1].offset + 1])
                    hand.execute("COMMIT")

                bench.fill(ours, by_hand, make=make)
                for size, fenced in product((100, 1000), (False, True)):
                    name = f"SQLite inbox, {'ids and offsets' if ids else 'offsets only'}{FENCED * fenced}"
                    goal, hands = None if fenced else target, partial(by_hand, fenced=fenced)
                    bench.compare(name, goal, size, make=make, ours=ours, reference=hands, clock=time.thread_time)


# -- Redis ----------------------------------------------------------------------------------------------------------------

SEEN = """
local new = {}
for i, key in ipairs(KEYS) do
  if redis.call('SET', key, ARGV[1], 'NX', 'PX', ARGV[2]) then new[#new + 1] = i end
end
return new
"""
MARK = "for _, key in ipairs(KEYS) do redis.call('SET', key, 'done', 'XX', 'PX', ARGV[1]) end"


def redis_store(bench: Bench) -> None:
    """Beside two bare scripts: SET NX for each key, SET XX for each key."""
    with LocalRedis() as server, redis.Redis.from_url(server.url, socket_timeout=5) as client:
        ours = claim_and_complete(RedisDedupStore(client))
        seen, mark = client.register_script(SEEN), client.register_script(MARK)

        def by_hand(batch: Sequence[Item]) -> None:
            keys = [b"hand:" + item.key for item in batch]
            new = cast("list[int]", seen(keys=keys, args=[TOKEN, DAY_MS]))
            mark(keys=[keys[number - 1] for number in new], args=[DAY_MS])

        bench.fill(ours, by_hand, make=items)
        for size in (100, 1000):
            bench.compare("Redis store", 0.7, size, make=items, ours=ours, reference=by_hand)


# -- PostgreSQL -----------------------------------------------------------------------------------------------------------


@contextmanager
def postgres_server() -> Iterator[tuple[str, psycopg.Connection[Any]]]:
    """With room for the whole run between two checkpoints: after one, each page is written to the log as a whole."""
    settings = {"max_wal_size": "8GB", "checkpoint_timeout": "1h", "shared_buffers": "256MB"}
    with LocalPostgres(config=settings) as server, psycopg.connect(server.dsn, autocommit=True) as connection:
        yield server.dsn, connection


def settle(connection: psycopg.Connection[Any]) -> None:
    connection.execute("VACUUM ANALYZE")
    connection.execute("CHECKPOINT")


def postgres(bench: Bench) -> None:
    """Beside SELECT .. ANY and INSERT .. unnest, one transaction each."""
    with postgres_server() as (dsn, hand), closing(PostgresDedupStore(dsn)) as store:
        hand.execute("CREATE TABLE seen (key bytea PRIMARY KEY, at timestamptz NOT NULL)")

        def by_hand(batch: Sequence[Item]) -> None:
            keys = sorted(item.key for item in batch)
            known = {key for (key,) in hand.execute("SELECT key FROM seen WHERE key = ANY(%b)", [keys], binary=True)}
            new = [key for key in keys if key not in known]
            hand.execute("INSERT INTO seen SELECT unnest(%b::bytea[]), now() ON CONFLICT DO NOTHING", [new])

        ours = claim_and_complete(store)
        bench.fill(ours, by_hand, make=items)
        settle(hand)
        for size in (100, 1000):
            bench.compare("PostgreSQL store", 0.75, size, make=items, ours=ours, reference=by_hand)


def postgres_inbox(bench: Bench) -> None:
    """Beside one transaction: ids, effects, offset; and beside one that locks the offset and looks at it."""
    schema = [
        "CREATE TABLE effects_{0} (number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, amount bigint NOT NULL)",
        "CREATE TABLE seen_{0} (key bytea PRIMARY KEY, at timestamptz NOT NULL)",
        "CREATE TABLE place_{0} (topic text, partition int, next bigint, PRIMARY KEY (topic, partition))",
        "INSERT INTO place_{0} VALUES ('orders', 0, 0)",
    ]
    with postgres_server() as (dsn, hand):
        for ids, target in ((True, 0.9), (False, 0.95)):
            kind = "ids" if ids else "offsets"
            for statement in schema:
                hand.execute(statement.format(kind).encode())
            hand.execute(f"CREATE TABLE ours_{kind} (LIKE effects_{kind} INCLUDING ALL)".encode())
            make = Entries(ids=ids)
            with PostgresInbox(dsn, prefix=f"kg_{kind}") as inbox:

                def ours(batch: Sequence[Entry], inbox: Inbox[Any] = inbox, kind: str = kind) -> None:
                    with inbox.transaction(SCOPE, batch) as opened:
                        amounts = [entry.offset for entry in fresh_of(batch, opened)]
                        opened.connection.execute(
                            f"INSERT INTO ours_{kind} (amount) SELECT unnest(%b::bigint[])".encode(), [amounts]
                        )
                        opened.finish()

                def by_hand(batch: Sequence[Entry], kind: str = kind, *, fenced: bool = False) -> None:
                    with hand.transaction():
                        if fenced:
                            lock = f"SELECT next FROM place_{kind} WHERE topic = 'orders' AND partition = 0 FOR UPDATE"
                            [(next_offset,)] = hand.execute(lock.encode())
                            if next_offset > batch[0].offset:
                                raise AssertionError("another owner was here")
                        if batch[0].key is not None:
                            remember = f"INSERT INTO seen_{kind} SELECT unnest(%b::bytea[]), now() ON CONFLICT DO NOTHING"
                            keys = sorted(entry.key for entry in batch if entry.key is not None)
                            if hand.execute(remember.encode(), [keys]).rowcount < len(batch):
                                raise AssertionError("an id that nobody has used was not new")
                        effect = f"INSERT INTO effects_{kind} (amount) SELECT unnest(%b::bigint[])"
                        hand.execute(effect.encode(), [[entry.offset for entry in batch]])
                        move = f"UPDATE place_{kind} SET next = %s WHERE topic = 'orders' AND partition = 0"
                        hand.execute(move.encode(), [batch[-1].offset + 1])

                bench.fill(ours, by_hand, make=make)
                settle(hand)
                for size, fenced in product((100, 1000), (False, True)):
                    name = f"PostgreSQL inbox, {'ids and offsets' if ids else 'offsets only'}{FENCED * fenced}"
                    goal, hands = None if fenced else target, partial(by_hand, fenced=fenced)
                    bench.compare(name, goal, size, make=make, ours=ours, reference=hands)


# -- the wrapper ----------------------------------------------------------------------------------------------------------


class AtOnce:
    """A store that answers at once: everything is new, and is completed."""

    capabilities = Capabilities(shared=True, durable="power", clock="server")
    retention = timedelta(hours=24)

    def claim(self, _scope: str, batch: Sequence[Item], **_named: object) -> list[Outcome]:
        return [Outcome.NEW] * len(batch)

    def complete(self, _scope: str, batch: Sequence[Item], **_named: object) -> list[bool]:
        return [True] * len(batch)

    def release(self, _scope: str, _batch: Sequence[Item], **_named: object) -> None:
        pass

    def purge(self, **_named: object) -> int:
        return 0

    def close(self) -> None:
        pass


class OddOnce(AtOnce):
    """Every other id was handled before."""

    def claim(self, _scope: str, batch: Sequence[Item], **_named: object) -> list[Outcome]:
        return ([Outcome.NEW, Outcome.DUPLICATE] * len(batch))[: len(batch)]


def wrapper(bench: Bench) -> None:
    """What claiming and completing add to each record of a run, with a store that costs nothing."""
    topic = f"benchmark-{uuid.uuid4().hex}"
    ways: dict[str, dict[str, Any]] = {
        "all new": {"dedup": AtOnce()},
        "all new, fingerprint=False": {"dedup": AtOnce(), "fingerprint": False},
        "half known": {"dedup": OddOnce()},
    }
    added: dict[str, list[float]] = {name: [] for name in ways}
    with local_or_running() as bootstrap:
        RunningKafka(bootstrap).create_topic(topic, 1)
        send(bootstrap, topic)
        consume(bootstrap, topic, {})
        for _ in range(bench.rounds):
            alone = consume(bootstrap, topic, {})
            for name, options in ways.items():
                added[name].append(consume(bootstrap, topic, options) - alone)
    for name, values in added.items():
        bench.add(Row(f"whole wrapper, {name}", "us/record", values, [], 3.0))


def consume(bootstrap: str, topic: str, options: dict[str, Any]) -> float:
    """Run over all records with a handler that does nothing. Returns its microseconds of CPU time for each record."""
    config = {"bootstrap.servers": bootstrap, "group.id": f"benchmark-{uuid.uuid4().hex}"}
    with AtLeastOnce(config, preflight="off", **options) as client:

        def handler(message: Message) -> None:
            if (message.offset() or 0) >= RECORDS - 2:  # of every other one the last is left out
                client.stop()

        began = time.thread_time()
        client.run([topic], handler)
        return (time.thread_time() - began) / RECORDS * 1e6


def send(bootstrap: str, topic: str) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20, "queue.buffering.max.messages": RECORDS + 1})

    def check(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            raise KafkaException(error)

    for number in range(RECORDS):
        headers: list[tuple[str, str | bytes | None]] = [
            ("message-id", str(uuid.uuid4()).encode()),
            ("trace", b"4bf92f3577b34da6"),
        ]
        producer.produce(topic, b"x" * 200, key=b"key-%d" % (number % 1000), headers=headers, on_delivery=check)
        if number % 1000 == 0:
            producer.poll(0)
    if producer.flush(120):
        raise AssertionError("not every record was acknowledged within two minutes")


# -- a peer ---------------------------------------------------------------------------------------------------------------

PEER = ("aws-lambda-powertools[redis]==3.37.0", "boto3")  # which its DynamoDB layer imports
CALLS = r"""
import sys, time, uuid, warnings
import redis
from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig, idempotent_function
from aws_lambda_powertools.utilities.idempotency.persistence.redis import RedisCachePersistenceLayer

warnings.simplefilter("ignore")
class Context:
    def get_remaining_time_in_millis(self):
        return 300_000
config = IdempotencyConfig(event_key_jmespath="id", use_local_cache=False, expires_after_seconds=86400)
config.register_lambda_context(Context())
layer = RedisCachePersistenceLayer(client=redis.Redis.from_url(sys.argv[1]))
handled = []
@idempotent_function(data_keyword_argument="record", persistence_store=layer, config=config)
def handle(record):
    handled.append(record["id"])
for line in sys.stdin:
    records = [{"id": uuid.uuid4().hex} for _ in range(int(line))]
    handled.clear()
    began = time.perf_counter()
    for record in records:
        handle(record=record)
    spent = time.perf_counter() - began
    assert len(handled) == len(records)
    print(spent, flush=True)
"""


class Peer(NamedTuple):
    """A process in an environment of its own, that handles as many records as it is told, and says how long it took."""

    process: subprocess.Popen[str]

    def __call__(self, count: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(count, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise AssertionError(f"the peer ended with exit status {self.process.wait(10)}")
        return float(answer)


def peer(bench: Bench) -> None:
    """Powertools for AWS Lambda, its Redis layer: one call for each record, which is what it has."""
    with tempfile.TemporaryDirectory() as folder:
        python = str(Path(folder, "bin", "python"))
        try:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, timeout=120)
            install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEER]
            subprocess.run(install, check=True, capture_output=True, text=True, timeout=300)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = str(getattr(error, "stderr", "") or error).strip().splitlines()
            bench.skip("Powertools", f"{PEER[0]} cannot be installed: {said[-1] if said else error}")
            return
        with LocalRedis() as server, redis.Redis.from_url(server.url, socket_timeout=5) as client:
            ours = claim_and_complete(RedisDedupStore(client))
            pipe = subprocess.PIPE
            with subprocess.Popen([python, "-c", CALLS, server.url], stdin=pipe, stdout=pipe, text=True) as process:
                rates = compare_with_peer(bench, ours, Peer(process))
                with suppress(BrokenPipeError):
                    assert process.stdin is not None
                    process.stdin.close()
        bench.add(Row("Redis store against Powertools, batch 500", "ids/s", *rates, 20))


def compare_with_peer(bench: Bench, ours: Callable[[Sequence[Item]], object], theirs: Peer) -> tuple[list[float], list[float]]:
    size = 500
    rates: tuple[list[float], list[float]] = ([], [])
    ours(items(size))
    theirs(size)
    for _ in range(bench.rounds):
        spent = [0.0, 0.0]
        for batch in [items(size) for _ in range(BATCHES[size])]:
            began = time.perf_counter()
            ours(batch)
            spent[0] += time.perf_counter() - began
        for _ in range(2):
            spent[1] += theirs(size)
        rates[0].append(size * BATCHES[size] / spent[0])
        rates[1].append(size * 2 / spent[1])
    return rates


# -- all ------------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "memory": memory,
    "sqlite": sqlite,
    "sqlite-inbox": sqlite_inbox,
    "redis": redis_store,
    "postgres": postgres,
    "postgres-inbox": postgres_inbox,
    "wrapper": wrapper,
    "powertools": peer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("json", nargs="?", type=Path, help="a file for the result")
    parser.add_argument("--only", default=",".join(SECTIONS), help="some of: %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ids", type=int, default=300_000, help="that are there before anything is measured")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"no section is called {', '.join(sorted(unknown))}")
    bench = Bench(options.rounds, options.ids)
    print(f"{'':62} {'ours':>11} {'reference':>11} {'median':>7} {'(least..most)':>16} {'':9} target")
    for name in chosen:
        try:
            SECTIONS[name](bench)
        except ServerNotInstalled as error:
            bench.skip(name, str(error))
    load, cpus = os.getloadavg()[1], os.cpu_count() or 1
    if load > cpus:
        print(f"load {load:.1f} on {cpus} CPUs: what goes by the clock is partly the time that others took")
    if options.json is not None:
        machine = {
            "python": platform.python_version(),
            "machine": platform.platform(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg(),
        }
        result = {**machine, "rows": [row.as_json() for row in bench.rows], "skipped": bench.skipped}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
