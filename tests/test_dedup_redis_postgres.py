"""What is particular to the stores in Redis and PostgreSQL: real servers that restart, refuse, pause and are slow."""

from __future__ import annotations

import logging
import os
import random
import re
import socketserver
import subprocess
import sys
import threading
import time
import traceback
import uuid
import warnings
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool, ConnectionPool, NullConnectionPool
from redis.backoff import ExponentialBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel

from kafka_guarantees import dedup, testing
from kafka_guarantees.dedup import Entry, Item, Outcome, Source, postgres
from kafka_guarantees.dedup._connecting import _no_connection, connection_of
from kafka_guarantees.dedup.postgres import PostgresDedupStore
from kafka_guarantees.dedup.postgres_inbox import PostgresInbox
from kafka_guarantees.dedup.redis import RedisDedupStore
from kafka_guarantees.errors import (
    AuthorizationError,
    DurabilityWarning,
    KafkaGuaranteesError,
    StoreUnavailable,
    UnsafeConfigError,
)
from kafka_guarantees.testing.conformance import reference
from kafka_guarantees.testing.local_kafka import _free_ports
from kafka_guarantees.testing.pytest_plugin import _installed
from kafka_guarantees.testing.servers import LocalPostgres, LocalRedis, LocalServerError, ServerNotInstalled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kafka_guarantees.dedup import DedupStore

NEW, TAKEN_OVER, DUPLICATE, IN_PROGRESS, MISMATCH = Outcome
OURS, THEIRS = b"o" * 16, b"t" * 16
SCOPE = "group"
PLACE = Source("t", bytes(16), 0)
LONG = 3600.0
DAY = timedelta(days=1)
TOUCHED = {"enable_bitmapscan": "on", "enable_seqscan": "on", "lock_timeout": "0", "statement_timeout": "0"}
WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_blocking_pids(pid) @> ARRAY[pg_backend_pid()]"
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"


def item(number: int, place: int = 0, fingerprint: bytes = b"") -> Item:
    return Item(number.to_bytes(16, "big"), place.to_bytes(16, "big"), fingerprint)


def items(count: int, place: int = 0) -> list[Item]:
    return [item(number, place) for number in range(count)]


def eventually(done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def answers(store: DedupStore) -> bool:
    try:
        store.claim("somebody else", [item(0)], token=OURS, lease=LONG)
    except StoreUnavailable:
        return False
    return True


@pytest.fixture
def client(redis_server: LocalRedis) -> Iterator[redis.Redis]:
    with closing(redis.Redis.from_url(redis_server.url, socket_timeout=5)) as connected:
        connected.flushdb()
        yield connected


@pytest.fixture
def table() -> str:
    return f"ids_{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["redis", "postgres"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[timedelta], DedupStore]]:
    """``make(retention)`` is a store; all of one test have the same ids."""
    opened: list[DedupStore] = []

    def store(retention: timedelta) -> DedupStore:
        made: DedupStore
        if request.param == "redis":
            made = RedisDedupStore(request.getfixturevalue("client"), retention=retention)
        else:
            dsn = request.getfixturevalue("postgres_server").dsn
            made = PostgresDedupStore(dsn, table=request.getfixturevalue("table"), retention=retention)
        opened.append(made)
        return made

    yield store
    for one in opened:
        one.close()


@pytest.fixture(params=["redis", "postgres"])
def server(request: pytest.FixtureRequest) -> LocalRedis | LocalPostgres:
    found: LocalRedis | LocalPostgres = request.getfixturevalue(f"{request.param}_server")
    return found


@contextmanager
def store_on(server: LocalRedis | LocalPostgres, table: str, retention: timedelta = DAY) -> Iterator[DedupStore]:
    if isinstance(server, LocalPostgres):
        with closing(PostgresDedupStore(server.dsn, table=table, retention=retention)) as store:
            yield store
        return
    with closing(redis.Redis.from_url(server.url, socket_timeout=5)) as client:
        yield RedisDedupStore(client, retention=retention, prefix=table)


# -- states ---------------------------------------------------------------------------------------------------------------


def test_every_outcome(make: Callable[[timedelta], DedupStore]) -> None:
    """One batch has them all, in the order of its items."""
    store = make(DAY)
    first = [item(1), item(2), item(3, fingerprint=b"f" * 8), item(4, fingerprint=b"f" * 8), item(5)]
    assert store.claim(SCOPE, first, token=OURS, lease=LONG) == [NEW] * 5
    assert store.complete(SCOPE, first[2:], token=OURS) == [True] * 3
    second = [
        item(9),
        item(3, 7, b"g" * 8),
        item(2, 7),
        item(4, 7, b"f" * 8),
        item(1),
        item(5, 7, b"f" * 8),
    ]
    expected = [NEW, MISMATCH, IN_PROGRESS, DUPLICATE, TAKEN_OVER, DUPLICATE]
    assert store.claim(SCOPE, second, token=THEIRS, lease=LONG) == expected


def test_a_claim_that_comes_again_is_new(make: Callable[[timedelta], DedupStore]) -> None:
    """A client that retries by itself, or an answer that got lost, changes nothing."""
    store = make(DAY)
    for _ in range(3):
        assert store.claim(SCOPE, items(5), token=OURS, lease=LONG) == [NEW] * 5
    for _ in range(3):
        assert store.complete(SCOPE, items(5), token=OURS) == [True] * 5
    store.release(SCOPE, items(5), token=OURS)
    assert store.claim(SCOPE, items(5), token=OURS, lease=LONG) == [DUPLICATE] * 5


def test_who_lost_a_claim_completes_and_releases_nothing(make: Callable[[timedelta], DedupStore]) -> None:
    """The token fences: after a takeover the mark is the new owner's (D04)."""
    store = make(DAY)
    store.claim(SCOPE, items(3), token=OURS, lease=LONG)
    assert store.claim(SCOPE, [item(1)], token=THEIRS, lease=LONG, takeover="lease") == [IN_PROGRESS]
    assert store.claim(SCOPE, [item(1)], token=THEIRS, lease=LONG) == [TAKEN_OVER]
    store.release(SCOPE, [item(1)], token=OURS)
    assert store.complete(SCOPE, [item(0), item(1), item(8)], token=OURS) == [True, False, False]
    assert store.claim(SCOPE, [item(8), item(1, 5)], token=b"x" * 16, lease=LONG) == [NEW, IN_PROGRESS]
    assert store.complete(SCOPE, [item(1)], token=THEIRS) == [True]
    store.release(SCOPE, items(3), token=OURS)
    assert store.claim(SCOPE, items(3), token=THEIRS, lease=LONG) == [DUPLICATE, DUPLICATE, NEW]


def test_the_lease_and_the_retention_go_by_the_servers_clock(make: Callable[[timedelta], DedupStore]) -> None:
    """A lease that is over can be taken, and completed by whoever had it; the retention counts from completion (D05, D15)."""
    store = make(timedelta(seconds=0.6))
    store.claim(SCOPE, [item(1), item(2)], token=OURS, lease=0.2)
    eventually(lambda: store.claim(SCOPE, [item(1, 7)], token=THEIRS, lease=LONG, takeover="lease") == [TAKEN_OVER])
    completed = time.monotonic()
    assert store.complete(SCOPE, [item(1), item(2)], token=OURS) == [False, True]
    while (answer := store.claim(SCOPE, [item(2, 7)], token=THEIRS, lease=LONG)) == [DUPLICATE]:
        assert time.monotonic() < completed + 20
    assert answer == [NEW]
    assert time.monotonic() - completed >= 0.6


def test_what_was_completed_is_not_completed_for_ever(make: Callable[[timedelta], DedupStore]) -> None:
    """D05: after its retention nobody knows the id. Told that all is well, its owner would not note it again."""
    short = make(timedelta(seconds=0.3))
    short.claim(SCOPE, items(2), token=OURS, lease=LONG)
    assert short.complete(SCOPE, items(2), token=OURS) == [True, True]
    eventually(lambda: short.complete(SCOPE, items(2), token=OURS) == [False, False])


def test_a_late_complete_counts_although_it_was_tidied_up(make: Callable[[timedelta], DedupStore]) -> None:
    """D04: a claim outlives its lease by a retention; else a handler that was slow is called again for the same message."""
    store = make(DAY)
    store.claim(SCOPE, items(2), token=OURS, lease=0.001)
    time.sleep(0.1)
    assert store.purge() == 0
    assert store.complete(SCOPE, items(2), token=OURS) == [True, True]


def test_one_owner_may_claim_in_two_scopes(make: Callable[[timedelta], DedupStore]) -> None:
    """D07: what it completes in one is not completed in the other; there the message would be lost."""
    store = make(DAY)
    for scope in ("one", "two"):
        store.claim(scope, items(2), token=OURS, lease=LONG)
    store.complete("one", items(2), token=OURS)
    assert store.claim("two", items(2, 1), token=THEIRS, lease=LONG) == [IN_PROGRESS] * 2
    store.release("two", items(2), token=OURS)
    assert store.claim("one", items(2, 1), token=THEIRS, lease=LONG) == [DUPLICATE] * 2


@pytest.mark.parametrize("count", [0, 1, 7999, 10_000])
def test_a_batch_may_be_large(count: int, make: Callable[[timedelta], DedupStore]) -> None:
    """Lua unpacks 8000 values at most, PostgreSQL binds 65 535: neither is a limit of ours."""
    store = make(DAY)
    assert store.claim(SCOPE, items(count), token=OURS, lease=LONG) == [NEW] * count
    assert store.complete(SCOPE, items(count), token=OURS) == [True] * count
    assert store.claim(SCOPE, items(count, 3), token=THEIRS, lease=LONG) == [DUPLICATE] * count
    assert store.complete(SCOPE, items(count), token=THEIRS) == [True] * count
    store.release(SCOPE, items(count), token=OURS)


@pytest.mark.parametrize("wrong", [Item(b"k", bytes(16)), Item(bytes(16), b""), Item(bytes(16), bytes(16), b"f")])
def test_what_has_another_size_is_refused(wrong: Item, make: Callable[[timedelta], DedupStore]) -> None:
    """The parts of a batch travel side by side, without separators: a short one would shift the others."""
    store = make(DAY)
    with pytest.raises(ValueError, match=r"16 bytes|8 bytes"):
        store.claim(SCOPE, [item(1), wrong], token=OURS, lease=LONG)
    with pytest.raises(ValueError, match="16 bytes"):
        store.claim(SCOPE, [item(1)], token=b"short", lease=LONG)


def test_threads_with_overlapping_batches_share_them_out(make: Callable[[timedelta], DedupStore]) -> None:
    """Each id is new for one of eight threads, whatever the order in their batches (D01)."""
    assert share_out(make(DAY)) == dict.fromkeys(range(200), 1)


def test_batches_in_any_order_do_not_deadlock(postgres_server: LocalPostgres, table: str) -> None:
    """D13: rows are locked in one order by claim, complete and release, so that there is no deadlock to be tried again."""
    with psycopg.connect(postgres_server.dsn, autocommit=True) as connection:
        before = connection.execute(DEADLOCKS).fetchone()
        with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
            for scope in "abc":
                share_out(store, scope)
        eventually(lambda: connection.execute(SESSIONS).fetchone() == (0,))  # they report when they end
        assert connection.execute(DEADLOCKS).fetchone() == before


def share_out(store: DedupStore, scope: str = SCOPE) -> dict[int, int]:
    """Eight threads claim 200 ids in overlapping batches; a half of what they get is released and claimed again."""
    barrier, counting, failures = threading.Barrier(8), threading.Lock(), list[BaseException]()
    completed = dict.fromkeys(range(200), 0)

    def work(number: int) -> None:
        order, token = random.Random(number), uuid.uuid4().bytes
        barrier.wait()
        for _ in range(12):
            mine = [item(n, 1 + number) for n in order.sample(range(200), 120)]
            outcomes = store.claim(scope, mine, token=token, lease=LONG, takeover="lease")
            claimed = [one for one, outcome in zip(mine, outcomes, strict=True) if outcome == NEW]
            done, failed = claimed[::2], claimed[1::2]
            assert store.complete(scope, done, token=token) == [True] * len(done)
            store.release(scope, failed, token=token)
            with counting:
                for one in done:
                    completed[int.from_bytes(one.key, "big")] += 1

    def watched(number: int) -> None:
        try:
            work(number)
        except BaseException as exc:  # noqa: BLE001 - raised below
            failures.append(exc)

    threads = [threading.Thread(target=watched, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    left = [number for number, times in completed.items() if times == 0]
    assert store.claim(scope, [item(number) for number in left], token=OURS, lease=LONG) == [NEW] * len(left)
    return completed | dict.fromkeys(left, 1)


# -- servers that fail ----------------------------------------------------------------------------------------------------


def test_a_server_that_was_killed_is_an_error_until_it_is_back(server: LocalRedis | LocalPostgres, table: str) -> None:
    """The outcome is unknown while it is away (D16), and afterwards everything that was answered is still there."""
    with store_on(server, table) as store:
        store.claim(SCOPE, items(3), token=OURS, lease=LONG)
        store.complete(SCOPE, items(1), token=OURS)
        server.kill()
        try:
            with pytest.raises(StoreUnavailable, match="may be made again") as failed:
                store.claim(SCOPE, items(3), token=OURS, lease=LONG)
            assert failed.value.__cause__ is not None
        finally:
            server.restart()
        eventually(lambda: answers(store))
        assert store.complete(SCOPE, items(2), token=OURS) == [True, True]
        assert store.claim(SCOPE, items(4, 1), token=THEIRS, lease=LONG) == [DUPLICATE, DUPLICATE, IN_PROGRESS, NEW]


def test_a_store_can_be_made_before_its_server_runs(
    server: LocalRedis | LocalPostgres, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is connected until the first call, and a first call that fails is made up for by the next."""
    monkeypatch.setattr("kafka_guarantees.dedup.postgres._CONNECTION_WAIT", 2.0)
    with store_on(server, table) as store:
        server.kill()
        try:
            with pytest.raises(StoreUnavailable):
                store.claim(SCOPE, items(1), token=OURS, lease=LONG)
        finally:
            server.restart()
        eventually(lambda: answers(store))


def test_a_password_is_in_no_message(table: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """S01: neither in an error, nor in a repr, nor in a log, whatever is wrong with the address."""
    monkeypatch.setattr("kafka_guarantees.dedup.postgres._CONNECTION_WAIT", 1.0)
    marker = "s3cr3t-marker"
    seen: list[str] = []
    for dsn in (
        f"postgresql://u:{marker}@127.0.0.1:1/db?connect_timeout=2",
        f"postgresql://u:p@{marker}@127.0.0.1:1/db",
        f"host=127.0.0.1 port=1 password='{marker}",
        f"postgresql://u:{marker}/b@127.0.0.1/db",
    ):
        try:
            store = PostgresDedupStore(dsn, table=table)
        except ValueError as exc:
            seen.append("".join(traceback.format_exception(exc)))
            continue
        with closing(store), pytest.raises(StoreUnavailable) as failed:
            store.claim(SCOPE, items(1), token=OURS, lease=LONG)
        seen += [repr(store), str(failed.value)]
        assert "127.0.0.1" not in str(failed.value)
    with closing(redis.Redis.from_url(f"redis://:{marker}@127.0.0.1:1/0", socket_timeout=5)) as client:
        kept = RedisDedupStore(client)
        with pytest.raises(StoreUnavailable) as refused:
            kept.claim(SCOPE, items(1), token=OURS, lease=LONG)
        seen += [repr(kept), str(refused.value)]
    seen.append(caplog.text)
    assert len(seen) == 8
    assert not [text for text in seen if marker in text]


# -- Redis ----------------------------------------------------------------------------------------------------------------


def test_scripts_that_are_flushed_are_loaded_again(client: redis.Redis) -> None:
    """A server that restarted has forgotten them."""
    store = RedisDedupStore(client)
    for _ in range(3):
        client.script_flush()
        store.claim(SCOPE, items(2), token=OURS, lease=LONG)
        client.script_flush()
        assert store.complete(SCOPE, items(2), token=OURS) == [True, True]
        client.script_flush()
        store.release(SCOPE, items(2), token=OURS)


def test_redis_forgets_by_itself(client: redis.Redis) -> None:
    """Every key expires, a claim too: nothing is left to purge (D18)."""
    store = RedisDedupStore(client, retention=timedelta(seconds=50), prefix="app:1")
    store.claim(SCOPE, items(2), token=OURS, lease=100)
    store.complete(SCOPE, items(1), token=OURS)
    claimed, completed = (client.pttl(b"app:1:{group}:" + item(number).key) for number in (1, 0))
    assert 140_000 < claimed <= 150_000
    assert 40_000 < completed <= 50_000
    assert client.dbsize() == 2
    assert store.purge() == 0


def test_the_keys_of_a_scope_are_in_one_slot(client: redis.Redis) -> None:
    """A script in a cluster may use one hash slot only, whatever the group is called; and two scopes never meet (D07)."""
    from redis.crc import key_slot  # noqa: PLC0415 - a part of redis-py that few need

    store = RedisDedupStore(client)
    scopes = ["a", "a}b", "}", "}a", "{a}", "%7D", "a%7Db", "ä", "a b\n"]
    for scope in scopes:
        client.flushdb()
        store.claim(scope, items(50), token=OURS, lease=LONG)
        assert len({key_slot(key) for key in client.scan_iter()}) == 1, scope
        assert client.dbsize() == 50
    client.flushdb()
    for scope in scopes:
        assert store.claim(scope, items(2), token=OURS, lease=LONG) == [NEW, NEW], scope
        assert store.complete(scope, items(2), token=OURS) == [True, True], scope


def test_a_cluster_that_is_away_is_unavailable_until_it_is_back() -> None:
    """D16: its client has an error of its own for that. What was answered is still there afterwards."""
    (bus,) = _free_ports(1)
    with LocalRedis(config={"cluster-enabled": "yes", "cluster-port": bus}) as node:
        with closing(redis.Redis.from_url(node.url)) as admin:
            admin.cluster("addslotsrange", 0, 16383)
            eventually(lambda: admin.cluster("info")["cluster_state"] == "ok")
        with (
            closing(RedisCluster(host="127.0.0.1", port=node.port, socket_timeout=None)) as patient,
            pytest.raises(UnsafeConfigError, match="wait for ever"),
        ):
            RedisDedupStore(patient)
        with closing(RedisCluster(host="127.0.0.1", port=node.port, socket_timeout=5)) as client:
            store = RedisDedupStore(client)
            assert store.claim(SCOPE, items(2), token=OURS, lease=LONG) == [NEW] * 2
            node.kill()
            try:
                for _ in range(3):
                    with pytest.raises(StoreUnavailable, match="may be made again"):
                        store.complete(SCOPE, items(2), token=OURS)
            finally:
                node.restart()
            eventually(lambda: answers(store))
            assert store.complete(SCOPE, items(2), token=OURS) == [True] * 2


def test_a_login_that_is_refused_is_not_waited_for() -> None:
    """Only somebody who corrects it can help; a server that is away comes back by itself."""

    def claims(**login: str) -> None:
        with closing(redis.Redis.from_url(local.url, **login, socket_timeout=5)) as client:
            RedisDedupStore(client).claim("s", [item(0)], token=b"t" * 16, lease=60)

    with LocalRedis() as local, closing(redis.Redis.from_url(local.url)) as admin:
        admin.acl_setuser("app", enabled=True, passwords=["+pw"], categories=["+@all"], commands=["-evalsha"], keys=["*"])
        with pytest.raises(AuthorizationError, match=r"does not let this client in \(NoPermission"):
            claims(username="app", password="pw")
        admin.config_set("requirepass", "another")
        with pytest.raises(AuthorizationError, match=r"does not let this client in \(Authentication"):
            claims()
        claims(password="another")


@pytest.mark.parametrize("kind", ["pool", "blocking pool", "socket", "sentinel"])
def test_a_client_that_waits_for_ever_is_refused(kind: str) -> None:
    """D16, C10: a server that stands still would hold up the run, and stop(). With a timeout it is unavailable."""
    blocking: Any = redis.BlockingConnectionPool
    sentinel: Any = Sentinel
    clients: dict[str, Callable[[float | None], redis.Redis]] = {
        "pool": lambda seconds: redis.Redis.from_url("redis://127.0.0.1:1/0", socket_timeout=seconds),
        "blocking pool": lambda seconds: redis.Redis(connection_pool=blocking(socket_timeout=seconds)),
        "socket": lambda seconds: redis.Redis(unix_socket_path="/nowhere/redis.sock", socket_timeout=seconds),
        "sentinel": lambda seconds: sentinel([("127.0.0.1", 1)]).master_for("cache", socket_timeout=seconds),
    }
    with closing(clients[kind](None)) as client, pytest.raises(UnsafeConfigError, match=r"wait for ever.*socket_timeout=5"):
        RedisDedupStore(client)
    with closing(clients[kind](5)) as client:
        RedisDedupStore(client)


@pytest.mark.parametrize("kind", ["pool", "blocking pool", "of the pool", "sentinel"])
def test_a_client_that_tries_again_for_ever_is_refused(kind: str) -> None:
    """D16, C10: its call would not end while Redis is away, whatever its timeout is, and nobody serve the group."""
    blocking: Any = redis.BlockingConnectionPool
    sentinel: Any = Sentinel

    def client(retries: int) -> redis.Redis:
        settings: dict[str, Any] = {"socket_timeout": 5, "retry": Retry(ExponentialBackoff(), retries)}
        made: redis.Redis
        if kind == "sentinel":
            made = sentinel([("127.0.0.1", 1)]).master_for("cache", **settings)
        elif kind == "blocking pool":
            made = redis.Redis(connection_pool=blocking(**settings))
        elif kind == "of the pool":
            made = redis.Redis(connection_pool=redis.ConnectionPool(**settings))
        else:
            made = redis.Redis.from_url("redis://127.0.0.1:1/0", **settings)
        return made

    for retries in (-1, -7):
        with (
            closing(client(retries)) as endless,
            pytest.raises(UnsafeConfigError, match=rf"retry={retries} is refused: .*for ever"),
        ):
            RedisDedupStore(endless)
    for retries in (0, 3):
        with closing(client(retries)) as ending:
            RedisDedupStore(ending)


@pytest.mark.parametrize("command", ["time", "mget", "set"])
def test_a_right_that_a_script_lacks_is_not_waited_for(redis_server: LocalRedis, client: redis.Redis, command: str) -> None:
    """Redis looks at the ACL of each command in it, and says so in an error of the script: nobody else can help here either."""
    client.acl_setuser("app", enabled=True, passwords=["+pw"], categories=["+@all"], commands=[f"-{command}"], keys=["*"])
    with closing(redis.Redis.from_url(redis_server.url, username="app", password="pw", socket_timeout=5)) as limited:
        store = RedisDedupStore(limited)
        with pytest.raises(AuthorizationError, match=r"does not let this client in \(ResponseError: .* can't run this command"):
            store.claim(SCOPE, items(1), token=OURS, lease=LONG)
    client.acl_deluser("app")


REFUSALS = {
    redis.ResponseError("ACL failure in script: User app has no permissions to run the 'set' command"): AuthorizationError,
    redis.ResponseError("The user executing the script can't access at least one of the keys"): AuthorizationError,
    redis.ResponseError("BUSY Redis is busy running a script."): StoreUnavailable,
    redis.ResponseError("NOREPLICAS Not enough good replicas to write."): StoreUnavailable,
    redis.ResponseError("unknown command 'EVALSHA', with args beginning with: 'sha' 'kg:{group}:s3cr3t'"): StoreUnavailable,
    redis.exceptions.MovedError("3999 s3cr3t:6381"): StoreUnavailable,
    redis.ConnectionError("Error 111 connecting to s3cr3t:6379. Connection refused."): StoreUnavailable,
    redis.ResponseError("first line\ns3cr3t"): StoreUnavailable,
}


@pytest.mark.parametrize("error", REFUSALS, ids=str)
def test_what_redis_says_is_quoted_without_ids_and_addresses(
    client: redis.Redis, error: redis.RedisError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is on call can tell a full disk from a script that hangs; and S01."""
    store = RedisDedupStore(client)
    store.claim(SCOPE, items(1), token=OURS, lease=LONG)
    monkeypatch.setattr(client, "evalsha", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(REFUSALS[error]) as refused:
        store.claim(SCOPE, items(1), token=OURS, lease=LONG)
    assert "s3cr3t" not in str(refused.value)
    if "s3cr3t" not in str(error):
        assert str(error) in str(refused.value)


def test_a_redis_that_refuses_to_write_says_why() -> None:
    """It is waited for, and the log has the server's own words."""
    with LocalRedis() as server, closing(redis.Redis.from_url(server.url, socket_timeout=5)) as client:
        store = RedisDedupStore(client)
        store.claim(SCOPE, items(1), token=OURS, lease=LONG)
        client.config_set("min-replicas-to-write", "1")
        with pytest.raises(StoreUnavailable, match="NOREPLICAS Not enough good replicas"):
            store.claim(SCOPE, items(1), token=OURS, lease=LONG)


@pytest.mark.parametrize("kind", ["pool", "blocking pool", "single connection"])
def test_a_failover_behind_a_name_that_stays_is_followed(kind: str, tmp_path: Path) -> None:
    """D16: a master that becomes a replica keeps our connections, and refuses to write; the name leads to the other one."""
    name, servers = tmp_path / "redis.sock", [tmp_path / "1.sock", tmp_path / "2.sock"]
    first = LocalRedis(config={"unixsocket": servers[0], "repl-diskless-sync-delay": 0})
    second = LocalRedis(config={"unixsocket": servers[1]})  # a server that loads says something else: this one takes its time
    name.symlink_to(servers[0])
    where: dict[str, Any] = {"unix_socket_path": str(name), "single_connection_client": kind == "single connection"}
    if kind == "blocking pool":
        pool: Any = redis.BlockingConnectionPool
        where = {"connection_pool": pool(connection_class=redis.UnixDomainSocketConnection, path=str(name), socket_timeout=5)}
    with first, second, closing(redis.Redis(**where, socket_timeout=5)) as client:
        with closing(redis.Redis.from_url(first.url)) as one, closing(redis.Redis.from_url(second.url)) as other:
            other.replicaof("127.0.0.1", str(first.port))
            eventually(lambda: other.info("replication")["master_link_status"] == "up")
            store = RedisDedupStore(client)
            assert store.claim(SCOPE, items(2), token=OURS, lease=LONG) == [NEW] * 2
            eventually(lambda: other.dbsize() == 2)
            other.replicaof("no", "one")
            one.replicaof("127.0.0.1", str(second.port))
        name.unlink()
        name.symlink_to(servers[1])
        with pytest.raises(StoreUnavailable, match="ReadOnlyError"):
            store.complete(SCOPE, items(2), token=OURS)
        assert store.complete(SCOPE, items(2), token=OURS) == [True] * 2


def test_a_replica_of_redis_6_is_left_as_well(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the error of a script is one of its own, and only its text says why."""
    store = RedisDedupStore(client)
    store.claim(SCOPE, items(1), token=OURS, lease=LONG)
    number, text = (
        client.client_id(),
        "Error running script (call to f_0): @user_script:15: @user_script: 15: -READONLY You can't write",
    )
    with monkeypatch.context() as patch:
        patch.setattr(client, "evalsha", lambda *_: (_ for _ in ()).throw(redis.ResponseError(text)))
        with pytest.raises(StoreUnavailable):
            store.claim(SCOPE, items(1), token=OURS, lease=LONG)
    assert client.client_id() != number


def interrupted(*_: Any) -> None:
    """As a signal handler that raises, in the place of what it interrupts."""
    raise ZeroDivisionError


def leave_an_answer(connection: Any, calls: int = 1) -> None:
    """As a call of the client does that was interrupted before its answer came."""
    for _ in range(calls):
        connection.send_command("PING", "3" * 50)


@pytest.mark.filterwarnings("ignore:.*'get_connection':DeprecationWarning")  # older versions need the argument
@pytest.mark.parametrize("kind", ["pool", "blocking pool", "single connection", "decoding"])
def test_the_answer_to_another_call_is_not_believed(redis_server: LocalRedis, client: redis.Redis, kind: str) -> None:
    """D01: it would say of ids that nobody has seen that they are completed, and their messages would be left out."""
    pool: Any = redis.BlockingConnectionPool if kind == "blocking pool" else redis.ConnectionPool
    where = {"connection_pool": pool.from_url(redis_server.url, socket_timeout=5, decode_responses=kind == "decoding")}
    with closing(redis.Redis(**where, single_connection_client=kind == "single connection")) as used:
        store = RedisDedupStore(used)
        store.claim(SCOPE, items(1), token=OURS, lease=LONG)
        for calls, ask in (
            (1, lambda: store.claim(SCOPE, items(5), token=OURS, lease=LONG)),
            (2, lambda: store.complete(SCOPE, items(5), token=OURS)),
            (1, lambda: store.release(SCOPE, items(5), token=OURS)),
        ):
            connection = used.connection or used.connection_pool.get_connection("PING")
            with monkey_patched(connection, "can_read", lambda *_, **__: False):  # the answers come a little later
                leave_an_answer(connection, calls)
                if not used.connection:
                    used.connection_pool.release(connection)
                with pytest.raises(StoreUnavailable, match=r"answer to another call.*may be made again"):
                    ask()
            ask()
        assert store.claim(SCOPE, items(6), token=THEIRS, lease=LONG) == [*[DUPLICATE] * 5, NEW]


@contextmanager
def monkey_patched(where: object, name: str, what: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, what)
        yield


@pytest.mark.filterwarnings("ignore:.*'get_connection':DeprecationWarning")
def test_the_answer_to_another_call_of_a_cluster_is_not_believed() -> None:
    """D01: there each node has connections, of which the one with that answer is given up."""
    (bus,) = _free_ports(1)
    with LocalRedis(config={"cluster-enabled": "yes", "cluster-port": bus}) as node:
        with closing(redis.Redis.from_url(node.url)) as admin:
            admin.cluster("addslotsrange", 0, 16383)
            eventually(lambda: admin.cluster("info")["cluster_state"] == "ok")
        with closing(RedisCluster(host="127.0.0.1", port=node.port, socket_timeout=5)) as client:
            store = RedisDedupStore(client)
            store.claim(SCOPE, items(1), token=OURS, lease=LONG)
            found: Any = client
            pool = found.get_redis_connection(found.get_default_node()).connection_pool
            connection = pool.get_connection("PING")
            with monkey_patched(connection, "can_read", lambda *_, **__: False):
                leave_an_answer(connection)
                pool.release(connection)
                with pytest.raises(StoreUnavailable, match="answer to another call"):
                    store.claim(SCOPE, items(5), token=OURS, lease=LONG)
                assert store.claim(SCOPE, items(5), token=OURS, lease=LONG) == [NEW] * 5


def test_a_call_that_was_interrupted_leaves_no_answer_behind(client: redis.Redis) -> None:
    """A signal handler raises between question and answer: the client keeps the connection, and the answer for the next."""
    store = RedisDedupStore(client)
    store.claim(SCOPE, items(1), token=OURS, lease=LONG)
    number = client.client_id()
    client.client_pause(500)
    with monkey_patched(client, "parse_response", interrupted), pytest.raises(ZeroDivisionError):
        store.claim(SCOPE, items(2), token=OURS, lease=LONG)
    new = client.client_id()
    assert isinstance(new, int)
    assert new != number


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # where there are threads of other tests
def test_a_child_leaves_the_connection_of_its_parent_alone(redis_server: LocalRedis, client: redis.Redis) -> None:
    """D01: a client with a single connection would share it, and each would read the answers of the other."""
    with closing(redis.Redis.from_url(redis_server.url, socket_timeout=5, single_connection_client=True)) as single:
        store, mine = RedisDedupStore(single), [item(number) for number in range(100)]
        store.claim(SCOPE, mine, token=OURS, lease=LONG)
        store.complete(SCOPE, mine, token=OURS)
        child = os.fork()
        if child == 0:
            status = 1
            with suppress(BaseException):
                asked = [[item(1000 + 50 * turn + number) for number in range(50)] for turn in range(200)]
                status = not all(store.claim("other", batch, token=THEIRS, lease=LONG) == [NEW] * 50 for batch in asked)
            os._exit(status)
        try:
            for _ in range(200):
                assert store.claim(SCOPE, mine, token=OURS, lease=LONG) == [DUPLICATE] * 100
        finally:
            _, status = os.waitpid(child, 0)
        assert status == 0


def test_a_client_whose_threads_read_each_others_answers_is_refused() -> None:
    """D01: redis-py before 5.3, and valkey-py, have no lock around the connection of ``single_connection_client=True``."""

    class Old:
        evalsha = eval = config_get = staticmethod(print)
        connection = object()

    with pytest.raises(UnsafeConfigError, match=r"single_connection_client=True.* each other's answers.*leave it out"):
        RedisDedupStore(Old())
    Old.connection = None  # as it is without
    RedisDedupStore(Old())


def test_a_client_that_decodes_is_welcome(redis_server: LocalRedis, client: redis.Redis) -> None:
    """``decode_responses=True`` is common, and changes nothing: no binary value ever comes back."""
    with closing(redis.Redis.from_url(redis_server.url, decode_responses=True, socket_timeout=5)) as decoding:
        store = RedisDedupStore(decoding)
        assert store.claim(SCOPE, items(2), token=b"\xff" * 16, lease=LONG) == [NEW, NEW]
        assert store.complete(SCOPE, items(2), token=b"\xff" * 16) == [True, True]


@pytest.mark.parametrize(
    ("setting", "value", "advice"),
    [("maxmemory-policy", "allkeys-lru", "noeviction"), ("appendonly", "no", "appendonly to yes")],
)
def test_a_redis_that_forgets_is_warned_of_once(setting: str, value: str, advice: str) -> None:
    """D12: eviction forgets ids when the memory is full, and a restart without an append-only file forgets all."""
    with (
        LocalRedis(config={setting: value}) as forgetful,
        closing(redis.Redis.from_url(forgetful.url, socket_timeout=5)) as client,
    ):
        store = RedisDedupStore(client)
        with pytest.warns(DurabilityWarning, match=advice) as caught:
            store.claim(SCOPE, items(1), token=OURS, lease=LONG)
        assert [warning.filename for warning in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store.claim(SCOPE, items(1), token=OURS, lease=LONG)


def test_a_redis_that_hides_its_settings_is_used(caplog: pytest.LogCaptureFixture) -> None:
    """Managed services forbid CONFIG: that is said in the log, and no reason to stop."""
    with (
        LocalRedis(config={"rename-command CONFIG": ""}) as managed,
        closing(redis.Redis.from_url(managed.url, socket_timeout=5)) as client,
    ):
        with caplog.at_level(logging.INFO, "kafka_guarantees"):
            assert RedisDedupStore(client).claim(SCOPE, items(1), token=OURS, lease=LONG) == [NEW]
        assert "noeviction" in caplog.text


def test_a_redis_that_is_full_is_unavailable() -> None:
    """With noeviction a full Redis refuses writes: then nothing may be handled, and nothing is left out (D16)."""
    with LocalRedis(config={"maxmemory": "1"}) as full, closing(redis.Redis.from_url(full.url, socket_timeout=5)) as client:
        store = RedisDedupStore(client)
        with pytest.raises(StoreUnavailable, match="OutOfMemoryError"):
            store.claim(SCOPE, items(1), token=OURS, lease=LONG)


def test_what_is_no_error_of_redis_passes(client: redis.Redis) -> None:
    """A mistake in the program is not taken for a server that is away."""

    class Broken:
        eval = config_get = staticmethod(client.config_get)

        def evalsha(self, *_: Any) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        RedisDedupStore(Broken()).claim(SCOPE, items(1), token=OURS, lease=LONG)


def test_an_address_is_no_client_of_redis() -> None:
    """It would be noticed with the first message only."""
    with pytest.raises(TypeError, match=r"redis\.Redis\.from_url"):
        RedisDedupStore("redis://127.0.0.1:1")  # type: ignore[arg-type] # that is the point


@pytest.mark.parametrize("made", [PostgresDedupStore, PostgresInbox])
def test_what_is_no_pool_is_refused(made: type[Any]) -> None:
    """At once, and with its name: a run would end with an error that names neither."""
    with pytest.raises(TypeError, match=r"psycopg_pool\.ConnectionPool, or a str .* not a AsyncConnectionPool"):
        made(AsyncConnectionPool("", open=False))
    with pytest.raises(TypeError, match="not a NoneType"):
        made(None)


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("kind", ["pipeline", "of asyncio"])
def test_a_client_that_does_not_answer_at_once_is_refused(kind: str, cluster: bool) -> None:  # noqa: FBT001
    """A pipeline answers with itself, which has no end, and never stops growing; asyncio's with a coroutine."""
    made: Any
    if kind == "pipeline":  # of a cluster that nobody asks who is in it
        made = redis.cluster.ClusterPipeline.__new__(redis.cluster.ClusterPipeline) if cluster else redis.Redis().pipeline()
    else:
        here = [redis.asyncio.cluster.ClusterNode("127.0.0.1", 1)]
        made = redis.asyncio.RedisCluster(startup_nodes=here) if cluster else redis.asyncio.Redis(socket_timeout=5)
    with pytest.raises(TypeError, match=f"client is .*{kind}.*give"):
        RedisDedupStore(made)


@pytest.mark.parametrize(("name", "module"), [("PostgresInbox", "postgres_inbox"), ("PostgresDedupStore", "postgres")])
def test_what_is_not_installed_is_named_with_how_to_install_it(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only as a module that is missing."""
    monkeypatch.delitem(sys.modules, f"kafka_guarantees.dedup.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} needs psycopg.* 'kafka-guarantees\[postgres\]'") as caught:
        getattr(dedup, name)
    assert caught.value.name == "psycopg"


def test_a_suite_without_pytest_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers beside it need none."""
    for name in [name for name in sys.modules if name.startswith("kafka_guarantees.testing.conformance")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(ModuleNotFoundError, match=r"Conformance needs pytest.* 'kafka-guarantees\[testing\]'") as caught:
        testing.__getattr__("DedupStoreConformance")
    assert caught.value.name == "pytest"


def test_all_names_can_be_imported_without_postgresql() -> None:
    """``import *`` asks for each name of ``__all__``."""
    program = "import sys; sys.modules['psycopg'] = None; from kafka_guarantees.dedup import *; RedisDedupStore; SqliteInbox"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_suites_pass_where_warnings_are_errors() -> None:
    """Python 3.13 deprecates all arguments of ``sqlite3.connect`` by position but the first."""
    source = Path(reference.__file__).read_text("utf-8")
    assert re.findall(r"sqlite3\.connect\([\w.]+, (\w+)=", source) == ["timeout"] * source.count("sqlite3.connect(")


@given(prefix=st.text())
@example(prefix="a" * 64)
@example(prefix="a" * 65)
def test_a_prefix_cannot_be_anything(prefix: str) -> None:
    """S03: no control characters, no braces, bounded."""
    allowed = 0 < len(prefix) <= 64 and prefix.isascii() and all(one.isalnum() or one in "_.:-" for one in prefix)
    if allowed:
        RedisDedupStore(redis.Redis(socket_timeout=5), prefix=prefix)
        return
    with pytest.raises(ValueError, match="prefix="):
        RedisDedupStore(redis.Redis(socket_timeout=5), prefix=prefix)


# -- PostgreSQL -----------------------------------------------------------------------------------------------------------


def test_the_table_is_created_by_whoever_is_first(postgres_server: LocalPostgres, table: str) -> None:
    """Eight workers that start at once: one creates it, and all of them use it."""
    barrier, results = threading.Barrier(8), []

    def start() -> None:
        with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
            barrier.wait()
            results.append(store.claim(SCOPE, items(1), token=uuid.uuid4().bytes, lease=LONG, takeover="lease"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == [[NEW], *[[IN_PROGRESS]] * 7]


@pytest.mark.parametrize("kind", ["store", "inbox"])
def test_a_server_that_has_become_a_standby_is_left(kind: str, postgres_server: LocalPostgres, table: str) -> None:
    """D16: behind a name that stays: the connections that are there lead to it on, and it reads only."""
    read_only = f'ALTER ROLE "{table}" SET default_transaction_read_only = on'  # of connections that are made from then on
    with psycopg.connect(postgres_server.dsn, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {table} LOGIN SUPERUSER PASSWORD 'known'".encode())
        where = make_conninfo(postgres_server.dsn, user=table, password="known")
        made = PostgresDedupStore(where, table=table) if kind == "store" else PostgresInbox(where, prefix=table)
        with closing(made):

            def call() -> None:
                if isinstance(made, PostgresInbox):
                    with made.transaction(SCOPE, [Entry(PLACE, 0, None)]):
                        pass
                else:
                    made.claim(SCOPE, items(1), token=OURS, lease=LONG)

            call()
            admin.execute(read_only.encode())
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [table])
            eventually(lambda: _says(call, "ReadOnlySqlTransaction"))
            admin.execute(f'ALTER ROLE "{table}" RESET ALL'.encode())  # from now on it leads to the other one
            eventually(lambda: _says(call, ""))


def _says(call: Callable[[], None], what: str) -> bool:
    try:
        call()
    except StoreUnavailable as exc:
        return bool(what) and (what in str(exc) or what in type(exc.__cause__).__name__)
    return not what


def test_a_handler_that_reads_only_fails_by_itself(postgres_server: LocalPostgres, table: str) -> None:
    """It is not taken for a server that is away: its message would come again for ever."""
    with closing(PostgresInbox(postgres_server.dsn, prefix=table)) as inbox:

        def handle() -> None:
            with inbox.transaction(SCOPE, [Entry(PLACE, 0, None)]) as opened:
                opened.connection.execute("SET TRANSACTION READ ONLY")
                opened.connection.execute("CREATE TABLE effects (what text)")

        for _ in range(2):
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                handle()
        with inbox.transaction(SCOPE, [Entry(PLACE, 0, None)]) as opened:
            assert list(opened.fresh) == [0]
            opened.finish()


def test_a_table_of_somebody_else_is_left_alone(postgres_server: LocalPostgres, table: str) -> None:
    """D19: a table of another version, or with another purpose, is an error and not written to."""
    with psycopg.connect(postgres_server.dsn, autocommit=True) as connection:
        connection.execute(f'CREATE TABLE "{table}" (scope text, key bytea)'.encode())
        with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
            with pytest.raises(KafkaGuaranteesError, match="not of this version") as refused:
                store.claim(SCOPE, items(1), token=OURS, lease=LONG)
            assert not isinstance(refused.value, StoreUnavailable)


def test_what_waiting_does_not_help_is_said_at_once(postgres_server: LocalPostgres, table: str) -> None:
    """No rights, no schema, no table any more: ``on_store_error="wait"`` must not wait for these."""
    with psycopg.connect(postgres_server.dsn, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {table} LOGIN PASSWORD 'known'".encode())
        as_role = make_conninfo(postgres_server.dsn, user=table, password="known")
        with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
            store.claim(SCOPE, [item(0)], token=OURS, lease=LONG)
            for name, kind, advice in (
                (f"public.{table}2", AuthorizationError, "CREATE on"),
                (f"no{table}.ids", KafkaGuaranteesError, "Create the schema"),
                (table, AuthorizationError, "Grant"),
            ):
                with closing(PostgresDedupStore(as_role, table=name)) as other, pytest.raises(kind) as caught:
                    other.claim(SCOPE, [item(0)], token=OURS, lease=LONG)
                assert not isinstance(caught.value, StoreUnavailable)
                assert advice in str(caught.value)
            admin.execute(f"DROP TABLE {table}, {table}_batches".encode())
            with pytest.raises(KafkaGuaranteesError, match="dropped") as caught:
                store.complete(SCOPE, [item(0)], token=OURS)
            assert not isinstance(caught.value, StoreUnavailable)


def wrong_logins(server: LocalPostgres, role: str) -> dict[str, str]:
    """Addresses of a server that refuses, by what it says."""
    dsn = server.dsn
    with psycopg.connect(dsn, autocommit=True) as admin:
        for statement in (
            f"CREATE ROLE {role} LOGIN PASSWORD 'known'",
            f"CREATE ROLE {role}_group NOLOGIN PASSWORD 'known'",
            f"CREATE DATABASE {role}_closed",
            f"REVOKE CONNECT ON DATABASE {role}_closed FROM public",
        ):
            admin.execute(statement.encode())
    return {
        f'password authentication failed for user "{role}"': make_conninfo(dsn, user=role, password="another"),
        'password authentication failed for user "nobody"': make_conninfo(dsn, user="nobody"),
        "no password supplied": dsn.replace(f":{server.password}@", "@"),
        f'role "{role}_group" is not permitted to log in': make_conninfo(dsn, user=f"{role}_group", password="known"),
        'database "nowhere" does not exist': make_conninfo(dsn, dbname="nowhere"),
        f'permission denied for database "{role}_closed"': make_conninfo(
            dsn, user=role, password="known", dbname=f"{role}_closed"
        ),
    }


def calls_on(conninfo: str, table: str) -> Iterator[Callable[[], object]]:
    """The first call of a store and of an inbox, with pools of their own and of the user."""
    with (
        closing(PostgresDedupStore(conninfo, table=table)) as store,
        PostgresInbox(conninfo, prefix=table) as inbox,
        ConnectionPool(conninfo, min_size=0, max_size=1, open=True) as pool,
        NullConnectionPool(conninfo, max_size=1, open=True) as null_pool,
    ):
        for a_store in (store, PostgresDedupStore(pool, table=table), PostgresDedupStore(null_pool, table=table)):
            yield partial(a_store.claim, SCOPE, items(1), token=OURS, lease=LONG)
        for an_inbox in (inbox, PostgresInbox(pool, prefix=table)):
            yield partial(an_inbox.start_offsets, SCOPE, [PLACE])


def test_a_login_that_postgresql_refuses_is_not_waited_for(postgres_server: LocalPostgres, table: str) -> None:
    """Only somebody who corrects it can help: it is said within a second or two, with what the server says."""
    for number, (said, conninfo) in enumerate(wrong_logins(postgres_server, table).items()):
        for call in islice(calls_on(conninfo, table), 1 if number else None):
            began = time.monotonic()
            with pytest.raises(AuthorizationError, match="PostgreSQL does not let this client in") as caught:
                call()
            assert said in str(caught.value)
            assert "127.0.0.1" not in str(caught.value)
            assert time.monotonic() - began < 6  # 10 s were waited for a connection
            assert "known" not in str(caught.value)
            assert postgres_server.password not in str(caught.value)


def test_a_password_that_is_changed_ends_the_waiting_too(postgres_server: LocalPostgres, table: str) -> None:
    """A store that was at work, and whose connections are gone."""
    with psycopg.connect(postgres_server.dsn, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {table} SUPERUSER LOGIN PASSWORD 'known'".encode())
        as_role = make_conninfo(postgres_server.dsn, user=table, password="known")
        with closing(PostgresDedupStore(as_role, table=table)) as store:
            assert answers(store)
            admin.execute(f"ALTER ROLE {table} PASSWORD 'another'".encode())
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (table,))
            eventually(lambda: refuses(store))


def test_a_login_that_is_asked_for_anew_each_time_is_waited_for() -> None:
    """A password that is rotated: for a while the old one is given, or the new one is not yet the database's."""
    with (
        says("28P01", 'password authentication failed for user "me"') as conninfo,
        ConnectionPool(lambda: conninfo, min_size=0, max_size=1, open=True) as pool,
        pytest.raises(StoreUnavailable, match="password authentication failed"),
        connection_of(pool, 2.5),
    ):
        pass


@pytest.mark.parametrize("opened", [True, False])
def test_a_pool_that_is_not_open_is_not_waited_for(opened: bool) -> None:  # noqa: FBT001
    """It is a mistake of the program, and does not pass."""
    pool = ConnectionPool("postgresql://me:pw@127.0.0.1:1/app", min_size=0, max_size=1, open=opened)
    pool.close()
    with pytest.raises(KafkaGuaranteesError, match="Open the pool before the run") as caught, connection_of(pool, 2.5):
        pass
    assert type(caught.value) is KafkaGuaranteesError


def test_who_is_asked_for_a_login_may_be_away() -> None:
    """As the pool does, which asks on: a run does not end with what the user's function raises."""
    asked: list[int] = []

    def conninfo() -> str:
        asked.append(1)
        if len(asked) > 1:
            raise ConnectionError("the keeper of secrets is away")
        return "postgresql://me:pw@127.0.0.1:1/app"

    with (
        ConnectionPool(conninfo, min_size=0, max_size=1, open=True) as pool,
        pytest.raises(StoreUnavailable, match="ConnectionError where it was asked how to log in"),
        connection_of(pool, 2.5),
    ):
        pass


def test_why_there_is_no_connection_is_not_asked_for_longer_than_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group is not served meanwhile, and no stop is noticed: a resolver has a timeout of its own, and a long one."""
    monkeypatch.setattr("kafka_guarantees.dedup._connecting._reason", lambda _pool: time.sleep(6))
    began = time.monotonic()
    with (
        ConnectionPool("postgresql://me:pw@127.0.0.1:1/app", min_size=0, max_size=1, open=True) as pool,
        pytest.raises(StoreUnavailable),
        connection_of(pool, 2.0),
    ):
        pass
    assert time.monotonic() - began < 4


AT = 'connection failed: connection to server at "10.0.0.1", port 5432 failed: '
AGAIN = '\nconnection to server at "10.0.0.1", port 5432 failed: '
PLAIN = 'FATAL:  no pg_hba.conf entry for host "10.0.0.9", user "me", database "app", no encryption'
REFUSED = 'FATAL:  password authentication failed for user "me"'


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (StoreUnavailable, f'{AT}FATAL:  LDAP authentication failed for user "me"'),
        (StoreUnavailable, f'{AT}FATAL:  RADIUS authentication failed for user "me"'),
        (StoreUnavailable, f'{AT}FATAL:  PAM authentication failed for user "me"'),
        (StoreUnavailable, f"{AT}SSL error: ssl/tls alert certificate expired{AGAIN}{PLAIN}"),
        (StoreUnavailable, f"{AT}FATAL:  canceling authentication due to timeout{AGAIN}{PLAIN}"),
        (AuthorizationError, f"{AT}{REFUSED}"),
        (AuthorizationError, f"{AT}{REFUSED}{AGAIN}{PLAIN}"),
        (AuthorizationError, f"{AT}{REFUSED}{AGAIN}{REFUSED}"),
        (AuthorizationError, f'{AT}FATAL:  role "me" does not exist'),
    ],
)
def test_a_refusal_that_may_pass_is_none(kind: type[Exception], said: str) -> None:
    """Whoever PostgreSQL asks may be away, or a certificate just be renewed; libpq tries again without TLS, and is refused."""
    assert isinstance(_no_connection(psycopg.OperationalError(said), rotates=False), kind)


def refuses(store: DedupStore) -> bool:
    try:
        answers(store)
    except AuthorizationError:
        return True
    return False


@contextmanager
def says(sqlstate: str, text: str) -> Iterator[str]:
    """A server that answers each login with this error. Gives its address."""
    fields = b"".join(f"{name}{value}\0".encode() for name, value in (("S", "FATAL"), ("C", sqlstate), ("M", text)))
    error = b"E" + (len(fields) + 5).to_bytes(4, "big") + fields + b"\0"

    class Refuser(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while len(size := self.request.recv(4)) == 4:
                request = self.request.recv(int.from_bytes(size, "big") - 4)
                if request.startswith((b"\x04\xd2\x16\x2f", b"\x04\xd2\x16\x30")):  # may it be encrypted?
                    self.request.sendall(b"N")
                else:
                    self.request.sendall(error)
                    return

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refuser) as refuser:
        serving = threading.Thread(target=refuser.serve_forever, args=(0.05,))
        serving.start()
        yield f"postgresql://me:secret@127.0.0.1:{refuser.server_address[1]}/app"
        refuser.shutdown()
        serving.join()


@pytest.mark.parametrize(
    ("sqlstate", "text"),
    [
        ("57P03", "the database system is starting up"),
        ("57P03", "the database system is not yet accepting connections"),
        ("53300", "sorry, too many clients already"),
        ("28P01", "Passwort-Authentifizierung für Benutzer »me« fehlgeschlagen"),
    ],
)
def test_what_passes_is_waited_for_and_says_why(
    sqlstate: str, text: str, table: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that starts, or is full, comes back by itself; a refusal in another language is taken for such, and quoted."""
    monkeypatch.setattr("kafka_guarantees.dedup.postgres._CONNECTION_WAIT", 2.0)
    monkeypatch.setattr("kafka_guarantees.dedup.postgres_inbox.CONNECT_TIMEOUT", 2)
    with says(sqlstate, text) as conninfo, closing(PostgresDedupStore(conninfo, table=table)) as store:
        with pytest.raises(StoreUnavailable, match=f"PostgreSQL gave no connection .*{text}"):
            store.claim(SCOPE, items(1), token=OURS, lease=LONG)
        with PostgresInbox(conninfo) as inbox, pytest.raises(StoreUnavailable, match=text):
            inbox.start_offsets(SCOPE, [PLACE])
    assert "secret" not in caplog.text


def test_a_server_that_is_away_is_waited_for_and_says_why(
    postgres_server: LocalPostgres, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log line is the error: it has what happened, not only that a pool has waited."""
    monkeypatch.setattr("kafka_guarantees.dedup.postgres._CONNECTION_WAIT", 2.0)
    with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
        assert answers(store)
        postgres_server.kill()
        try:
            eventually(lambda: "Connection refused" in str(unavailable(store)))
        finally:
            postgres_server.restart()
        eventually(lambda: answers(store))


def unavailable(store: DedupStore) -> StoreUnavailable:
    with pytest.raises(StoreUnavailable) as caught:
        store.claim(SCOPE, items(1), token=OURS, lease=LONG)
    return caught.value


def test_of_several_hosts_all_must_refuse(postgres_server: LocalPostgres, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is away may be the one that lets us in; but a host has several addresses, and is not at all of them."""
    monkeypatch.setattr("kafka_guarantees.dedup.postgres._CONNECTION_WAIT", 2.0)
    wrong = make_conninfo(postgres_server.dsn, password="wrong")
    port = str(postgres_server.port)
    for hosts, ports, kind in (
        ("127.0.0.1,127.0.0.2", f"{port},1", StoreUnavailable),
        ("127.0.0.1,127.0.0.1", f"{port},{port}", AuthorizationError),
        ("localhost", port, AuthorizationError),  # and nobody is at ::1
    ):
        conninfo = make_conninfo(wrong, host=hosts, port=ports)
        with closing(PostgresDedupStore(conninfo, table=table)) as store, pytest.raises(kind):
            store.claim(SCOPE, items(1), token=OURS, lease=LONG)


def test_a_pool_whose_connections_are_in_use_is_not_asked_why(postgres_server: LocalPostgres, table: str) -> None:
    """Nothing has failed; a connection of ours beside it would be one more than the user allows."""
    made = []

    class Connection(psycopg.Connection[Any]):
        @classmethod
        def connect(cls, *args: Any, **kwargs: Any) -> Any:
            made.append(args)
            return super().connect(*args, **kwargs)

    dsn = postgres_server.dsn
    with ConnectionPool(dsn, connection_class=Connection, min_size=1, max_size=1, timeout=2.0, open=True) as pool:
        inbox = PostgresInbox(pool, prefix=table)
        inbox.start_offsets(SCOPE, [PLACE])
        with pool.connection(), pytest.raises(StoreUnavailable, match="couldn't get a connection"):
            inbox.start_offsets(SCOPE, [PLACE])
    assert len(made) == 1


def test_the_users_pool_is_used_and_left_as_it_was(postgres_server: LocalPostgres, table: str) -> None:
    """Whatever its connections are set to: dicts as rows, repeatable read, no autocommit. close() does not close it."""
    settings = {"row_factory": psycopg.rows.dict_row, "options": "-c default_transaction_isolation=serializable"}
    with ConnectionPool(postgres_server.dsn, kwargs=settings, min_size=1, max_size=1, open=True) as pool:
        store = PostgresDedupStore(pool, table=table)
        assert store.claim(SCOPE, items(2), token=OURS, lease=LONG) == [NEW, NEW]
        assert store.complete(SCOPE, items(2), token=OURS) == [True, True]
        assert store.claim(SCOPE, items(3, 1), token=THEIRS, lease=LONG) == [DUPLICATE, DUPLICATE, NEW]
        store.close()
        with pool.connection() as connection:
            assert not connection.autocommit
            changed = connection.execute(
                "SELECT setting FROM pg_settings WHERE name = ANY(%s) ORDER BY name", ([*TOUCHED],)
            ).fetchall()
            assert [dict(row) for row in changed] == [{"setting": TOUCHED[name]} for name in sorted(TOUCHED)]


@pytest.mark.parametrize("cursors", [psycopg.ClientCursor, psycopg.RawCursor])
def test_the_users_pool_may_have_other_cursors(
    cursors: type[psycopg.Cursor[Any]], postgres_server: LocalPostgres, table: str
) -> None:
    """Those that bind by themselves are common behind a PgBouncer."""
    with ConnectionPool(postgres_server.dsn, kwargs={"cursor_factory": cursors}, min_size=1, open=True) as pool:
        store = PostgresDedupStore(pool, table=table)
        assert store.claim(SCOPE, items(3), token=OURS, lease=LONG) == [NEW] * 3
        assert store.claim(SCOPE, items(3), token=THEIRS, lease=LONG) == [TAKEN_OVER] * 3
        assert store.complete(SCOPE, items(2), token=THEIRS) == [True] * 2
        store.release(SCOPE, items(3), token=THEIRS)
        assert store.purge() == 0
        assert store.claim(SCOPE, items(3, 1), token=OURS, lease=LONG) == [DUPLICATE, DUPLICATE, NEW]


def test_a_database_without_an_encoding_will_do(postgres_server: LocalPostgres, table: str) -> None:
    """SQL_ASCII, which initdb chooses for the locale C: there texts come as bytes."""
    dsn = make_conninfo(postgres_server.dsn, client_encoding="SQL_ASCII")
    for _ in range(2):
        with closing(PostgresDedupStore(dsn, table=table)) as store:
            assert store.claim("größe", items(3), token=OURS, lease=LONG) == [NEW] * 3
            assert store.claim("größe", items(3, 1), token=THEIRS, lease=LONG) == [IN_PROGRESS] * 3


def test_a_host_that_is_gone_is_noticed_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """D13: without keepalives a run would stand still for two hours. What the user says himself counts."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(postgres, "ConnectionPool", lambda *_, **named: made.append(named["kwargs"]))
    PostgresDedupStore("host=db")
    PostgresDedupStore("host=db keepalives_idle=60 tcp_user_timeout=5000")
    usual, his = made
    assert usual["keepalives_idle"] + usual["keepalives_interval"] * usual["keepalives_count"] <= 30
    assert usual["tcp_user_timeout"] <= 30_000
    assert his == usual | {"keepalives_idle": "60", "tcp_user_timeout": "5000"}


def test_an_interrupt_in_a_call_is_not_taken_for_a_server_that_is_away(
    postgres_server: LocalPostgres, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Y03: Ctrl-C would be swallowed, and the call made again. The connection serves the next call."""

    def interrupt(_store: PostgresDedupStore, _statement: str) -> bytes:
        raise KeyboardInterrupt

    with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
        store.claim(SCOPE, items(1), token=OURS, lease=LONG)
        with monkeypatch.context() as patch:
            patch.setattr(PostgresDedupStore, "_sql", interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.complete(SCOPE, items(1), token=OURS)
        assert store.complete(SCOPE, items(1), token=OURS) == [True]


def test_a_rival_that_stands_still_does_not_hold_us(postgres_server: LocalPostgres, table: str) -> None:
    """D13: a transaction that has the rows and does not end is waited for seconds, not for ever; the call can be repeated."""
    with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
        store.claim(SCOPE, items(2), token=OURS, lease=LONG)
        with psycopg.connect(postgres_server.dsn) as rival:
            rival.execute(f'SELECT * FROM "{table}_batches" FOR UPDATE'.encode())
            start = time.monotonic()
            with pytest.raises(StoreUnavailable, match="55P03"):
                store.complete(SCOPE, items(2), token=OURS)
            assert 4 < time.monotonic() - start < 60
        assert store.complete(SCOPE, items(2), token=OURS) == [True, True]


def move_to(rival: psycopg.Connection[Any], table: str, token: bytes, how: str) -> None:
    """What a claim with this token writes, in a transaction that stays open: a batch, and ids that are in it."""
    batch = uuid.uuid4()
    note = f"INSERT INTO \"{table}_batches\" SELECT %s, %s, %s, false, now() + interval '1 hour'"
    rival.execute(note.encode(), (batch, SCOPE, token))
    rival.execute(how.encode(), (SCOPE, batch))


@pytest.mark.parametrize("default", ["read committed", "serializable"])
def test_a_claim_waits_for_a_rival_and_sees_what_it_did(
    default: str, postgres_server: LocalPostgres, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D13: at the first attempt, whatever the default is. By an older snapshot the rival's row were neither new nor known."""
    monkeypatch.setattr("kafka_guarantees.dedup.postgres._ATTEMPTS", 1)
    dsn = make_conninfo(postgres_server.dsn, options=f"-c default_transaction_isolation={default.replace(' ', chr(92) + ' ')}")
    with closing(PostgresDedupStore(dsn, table=table)) as store, psycopg.connect(postgres_server.dsn) as rival:
        store.claim("other", items(1), token=OURS, lease=LONG)
        move_to(rival, table, THEIRS, f'INSERT INTO "{table}" SELECT key, %s, %s, position, fingerprint FROM "{table}"')
        answer: list[Outcome] = []
        thread = threading.Thread(target=lambda: answer.extend(store.claim(SCOPE, items(2, 9), token=OURS, lease=LONG)))
        thread.start()
        eventually(lambda: rival.execute(WAITING).fetchone() == (1,), 4)
        rival.commit()
        thread.join(30)
        assert answer == [IN_PROGRESS, NEW]


def test_a_complete_that_waits_for_a_takeover_is_refused(postgres_server: LocalPostgres, table: str) -> None:
    """D04, D13: whose claim it is, is decided on the newest version of the row, not on that from before the wait."""
    with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store, psycopg.connect(postgres_server.dsn) as rival:
        store.claim(SCOPE, items(2), token=OURS, lease=LONG)
        rival.execute(f'UPDATE "{table}_batches" SET digest = NULL'.encode())
        move_to(rival, table, THEIRS, f"UPDATE \"{table}\" SET scope = %s, batch = %s WHERE key = '\\x{item(0).key.hex()}'")
        done: list[bool] = []
        thread = threading.Thread(target=lambda: done.extend(store.complete(SCOPE, items(2), token=OURS)))
        thread.start()
        eventually(lambda: rival.execute(WAITING).fetchone() == (1,), 4)
        rival.commit()
        thread.join(30)
        assert done == [False, True]


def test_purge_removes_what_is_expired_and_nothing_else(postgres_server: LocalPostgres, table: str) -> None:
    """D18: completed ids after their retention, claims a retention after their lease, at most as many as asked for."""
    with closing(PostgresDedupStore(postgres_server.dsn, table=table, retention=timedelta(seconds=0.5))) as store:
        store.claim(SCOPE, items(2500), token=OURS, lease=0.1)
        store.complete(SCOPE, items(2000), token=OURS)
        with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as lasting:
            lasting.claim("other", items(10), token=OURS, lease=LONG)
            lasting.complete("other", items(5), token=OURS)
        assert store.purge(limit=0) == 0
        removed: list[int] = []

        def all_gone() -> bool:
            removed.append(store.purge(limit=300))
            return sum(removed) == 2500

        eventually(all_gone)  # the claims first or the ids that are completed, whichever the server was sooner with
        assert max(removed) == 300
        assert store.claim(SCOPE, items(1), token=THEIRS, lease=LONG, takeover="lease") == [NEW]
        assert store.claim("other", items(10, 1), token=THEIRS, lease=LONG) == [DUPLICATE] * 5 + [IN_PROGRESS] * 5


def test_purge_walks_through_the_table(postgres_server: LocalPostgres, table: str) -> None:
    """D18: it looks at some pages in a call, removes what is expired there, and goes on behind them the next time."""
    with (
        closing(PostgresDedupStore(postgres_server.dsn, table=table, retention=timedelta(milliseconds=1))) as store,
        closing(PostgresDedupStore(postgres_server.dsn, table=table)) as lasting,
    ):
        for start in range(0, 20_000, 2000):
            batch = items(20_000)[start : start + 2000]
            for one, scope in ((store, SCOPE), (lasting, "other")):
                one.claim(scope, batch, token=OURS, lease=LONG)
                one.complete(scope, batch, token=OURS)
        removed = [store.purge(limit=1500) for _ in range(40)]
        assert sum(removed) == 20_000
        assert max(removed) == 1500
        assert set(lasting.claim("other", items(20_000), token=THEIRS, lease=LONG)) == {DUPLICATE}


def test_purge_by_processes_that_end_soon_comes_to_the_last_page(postgres_server: LocalPostgres, table: str) -> None:
    """D18: each store begins somewhere else, so that nothing is left for ever by workers that begin anew each day."""
    with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as lasting:
        lasting.claim(SCOPE, items(20_000), token=OURS, lease=LONG)  # these are more pages than one call looks at
    with closing(PostgresDedupStore(postgres_server.dsn, table=table, retention=timedelta(milliseconds=1))) as store:
        store.claim("other", items(9), token=OURS, lease=LONG)
        store.complete("other", items(9), token=OURS)

    def purged() -> bool:
        with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
            return store.purge(limit=1000) == 9

    eventually(purged)


def test_purge_leaves_rows_that_somebody_uses(postgres_server: LocalPostgres, table: str) -> None:
    """It waits for nobody: what is locked is for the next time."""
    with closing(PostgresDedupStore(postgres_server.dsn, table=table, retention=timedelta(seconds=0.1))) as store:
        store.claim(SCOPE, items(3), token=OURS, lease=LONG)
        store.complete(SCOPE, items(3), token=OURS)
        with psycopg.connect(postgres_server.dsn) as rival:
            rival.execute(f'SELECT * FROM "{table}" WHERE key = %s FOR UPDATE'.encode(), (item(1).key,))
            eventually(lambda: store.purge() == 2)
        eventually(lambda: store.purge() == 1)


def test_a_batch_that_is_completed_as_it_was_claimed_changes_one_row(postgres_server: LocalPostgres, table: str) -> None:
    """Not one for each id; also when some in it were known, and whoever asks in whatever order."""
    with (
        closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store,
        psycopg.connect(postgres_server.dsn, autocommit=True) as connection,
    ):
        versions, batches = f'SELECT key, ctid FROM "{table}"'.encode(), f'SELECT completed FROM "{table}_batches"'.encode()
        store.claim(SCOPE, items(3), token=THEIRS, lease=LONG)
        assert store.claim(SCOPE, items(9, 1), token=OURS, lease=LONG) == [IN_PROGRESS] * 3 + [NEW] * 6
        before = connection.execute(versions).fetchall()
        assert store.complete(SCOPE, items(9, 2)[:2:-1], token=OURS) == [True] * 6
        assert connection.execute(versions).fetchall() == before
        assert sorted(connection.execute(batches).fetchall()) == [(False,), (True,)]


def test_a_batch_of_which_something_was_taken_is_not_completed_as_a_whole(postgres_server: LocalPostgres, table: str) -> None:
    """D04: by a takeover, a release, or a completion of a part. The rest of it is completed all the same."""
    with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
        store.claim(SCOPE, items(4), token=OURS, lease=LONG)
        assert store.claim(SCOPE, items(4)[:1], token=THEIRS, lease=LONG) == [TAKEN_OVER]
        store.release(SCOPE, items(4)[1:2], token=OURS)
        assert store.complete(SCOPE, items(4)[2:3], token=OURS) == [True]
        assert store.complete(SCOPE, items(4), token=OURS) == [False, False, True, True]
        assert store.claim(SCOPE, items(4, 1), token=b"x" * 16, lease=LONG) == [IN_PROGRESS, NEW, DUPLICATE, DUPLICATE]


def test_an_id_that_comes_back_while_others_are_taken_is_left_to_its_owner(postgres_server: LocalPostgres, table: str) -> None:
    """D04: its batch is completed as a whole. Its owner would be told that it is completed, and nobody would know of it."""

    class Interrupted(PostgresDedupStore):
        def _rows(self, statements: Any, arguments: dict[str, Any]) -> list[tuple[Any, ...]]:
            if statements is postgres._TAKE:
                owner.release(SCOPE, [item(1)], token=THEIRS)
                rival.execute(f'SELECT FROM "{table}_batches" FOR UPDATE'.encode())
                thread.start()
            return super()._rows(statements, arguments)

    def come_back() -> None:
        eventually(lambda: rival.execute(WAITING).fetchone() == (1,), 4)
        came.extend(owner.claim(SCOPE, [item(1)], token=THEIRS, lease=LONG))
        rival.rollback()

    came: list[Outcome] = []
    thread = threading.Thread(target=come_back)
    with (
        closing(PostgresDedupStore(postgres_server.dsn, table=table)) as owner,
        closing(Interrupted(postgres_server.dsn, table=table)) as store,
        psycopg.connect(postgres_server.dsn) as rival,
    ):
        for number in range(2):
            owner.claim(SCOPE, [item(number)], token=THEIRS, lease=LONG)
        assert store.claim(SCOPE, items(2), token=OURS, lease=LONG) == [TAKEN_OVER, IN_PROGRESS]
        thread.join(30)
        assert came == [NEW]
        assert owner.complete(SCOPE, [item(1)], token=THEIRS) == [True]
        assert store.claim(SCOPE, [item(1)], token=OURS, lease=LONG) == [DUPLICATE]


def test_a_fingerprint_may_change_until_the_completion(postgres_server: LocalPostgres, table: str) -> None:
    """It is what complete() says that counts."""
    with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
        store.claim(SCOPE, [item(1, 0, b"claimed-")], token=OURS, lease=LONG)
        assert store.complete(SCOPE, [item(1, 0, b"complete")], token=OURS) == [True]
        answers = [store.claim(SCOPE, [item(1, 0, mine)], token=THEIRS, lease=LONG) for mine in (b"claimed-", b"complete")]
        assert answers == [[MISMATCH], [DUPLICATE]]


def test_a_claim_that_was_purged_is_not_completed(postgres_server: LocalPostgres, table: str) -> None:
    """D18: its batch goes first, so that a completion that comes too late is told so, and an id is new before it is removed."""
    with (
        closing(PostgresDedupStore(postgres_server.dsn, table=table, retention=timedelta(milliseconds=1))) as store,
        psycopg.connect(postgres_server.dsn, autocommit=True) as connection,
    ):
        store.claim(SCOPE, items(3), token=OURS, lease=0.001)
        with connection.transaction():
            connection.execute(f'SELECT FROM "{table}" FOR UPDATE'.encode())
            eventually(
                lambda: store.purge() == 0 and not connection.execute(f'SELECT FROM "{table}_batches"'.encode()).rowcount
            )
        assert store.complete(SCOPE, items(3), token=OURS) == [False] * 3
        assert store.claim(SCOPE, items(1), token=THEIRS, lease=LONG) == [NEW]
        assert store.purge() == 2
        assert store.claim(SCOPE, items(3, 1), token=OURS, lease=LONG) == [IN_PROGRESS, NEW, NEW]


def test_an_id_that_is_being_taken_is_not_purged(postgres_server: LocalPostgres, table: str) -> None:
    """Its new batch is not committed yet, and so looks like one that is gone."""
    with (
        closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store,
        psycopg.connect(postgres_server.dsn) as rival,
    ):
        store.claim(SCOPE, items(2), token=OURS, lease=LONG)
        rival.execute(f'DELETE FROM "{table}_batches"'.encode())
        rival.commit()
        move_to(rival, table, THEIRS, f"UPDATE \"{table}\" SET scope = %s, batch = %s WHERE key = '\\x{item(0).key.hex()}'")
        assert store.purge() == 1
        rival.commit()
        assert store.purge() == 0
        assert store.claim(SCOPE, items(2, 1), token=OURS, lease=LONG) == [IN_PROGRESS, NEW]


def test_a_complete_of_an_id_that_nobody_claimed_writes_nothing(postgres_server: LocalPostgres, table: str) -> None:
    """Neither an id nor a batch."""
    with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
        assert store.complete(SCOPE, items(3), token=OURS) == [False] * 3
        with psycopg.connect(postgres_server.dsn) as connection:
            for written in (table, f"{table}_batches"):
                assert connection.execute(f'SELECT FROM "{written}"'.encode()).rowcount == 0


def test_a_plan_from_when_the_table_was_small_is_good_when_it_is_large(postgres_server: LocalPostgres, table: str) -> None:
    """A worker keeps its plans until the next ANALYZE, which may be hours away: none reads the whole index for a few ids."""
    with ConnectionPool(postgres_server.dsn, min_size=1, max_size=1, open=True) as pool:
        worker = PostgresDedupStore(pool, table=table)
        worker.claim(SCOPE, items(1), token=OURS, lease=LONG)
        with psycopg.connect(postgres_server.dsn, autocommit=True) as connection:
            for one in (table, f"{table}_batches"):
                connection.execute(f'ALTER TABLE "{one}" SET (autovacuum_enabled = off)'.encode())

        def parts() -> None:
            for _ in range(2):
                worker.claim(SCOPE, items(8), token=OURS, lease=LONG)
            worker.complete(SCOPE, items(4), token=OURS)
            worker.release(SCOPE, items(8)[4:], token=OURS)

        for _ in range(12):
            parts()
        with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as others:
            others.claim(SCOPE, items(20_000)[8:], token=THEIRS, lease=LONG)
        parts()
    with psycopg.connect(postgres_server.dsn, autocommit=True) as connection:
        eventually(lambda: connection.execute(SESSIONS).fetchone() == (0,))  # they report when they end
        found = connection.execute("SELECT idx_tup_read FROM pg_stat_user_indexes WHERE relname = %s", (table,)).fetchone()
        assert found is not None
        assert 0 < found[0] < 10_000


def test_an_id_twice_in_a_call_is_one_id(postgres_server: LocalPostgres, table: str) -> None:
    """Callers should not; what is claimed by then must not end in an error of ours."""
    with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store:
        twice = [item(1), item(2), item(1)]
        for expected in ([NEW] * 3, [NEW] * 3):
            assert store.claim(SCOPE, twice, token=OURS, lease=LONG) == expected
        assert store.complete(SCOPE, twice, token=OURS) == [True] * 3
        assert store.claim(SCOPE, twice, token=THEIRS, lease=LONG) == [DUPLICATE] * 3


@pytest.mark.parametrize("call", ["complete", "purge"])
def test_a_plan_from_when_there_were_few_batches_is_good_when_there_are_many(
    call: str, postgres_server: LocalPostgres, table: str
) -> None:
    """They are looked up one by one, too: by whoever takes one apart, and by purge."""
    dsn = make_conninfo(postgres_server.dsn, options="-c plan_cache_mode=force_generic_plan")
    with (
        ConnectionPool(dsn, min_size=1, max_size=1, open=True) as pool,
        psycopg.connect(postgres_server.dsn, autocommit=True) as connection,
    ):
        store = PostgresDedupStore(pool, table=table)
        store.claim(SCOPE, items(50), token=OURS, lease=LONG)
        for one in (table, f"{table}_batches"):
            connection.execute(f'ALTER TABLE "{one}" SET (autovacuum_enabled = off)'.encode())
            connection.execute(f'ANALYZE "{one}"'.encode())

        def calls() -> None:
            for number in range(8):  # a statement is prepared when it comes the sixth time
                store.complete(SCOPE, items(50)[number : number + 2], token=OURS) if call == "complete" else store.purge()

        calls()
        many = "SELECT md5(n::text)::uuid, md5(n::text)::bytea FROM generate_series(1, 5000) AS n"
        note = "batch, 'other', '', false, now() + interval '1 hour', id"
        connection.execute(f'INSERT INTO "{table}_batches" SELECT {note} FROM ({many}) AS m (batch, id)'.encode())
        connection.execute(f"INSERT INTO \"{table}\" SELECT id, 'other', batch, '', '' FROM ({many}) AS m (batch, id)".encode())
        calls()
    with psycopg.connect(postgres_server.dsn, autocommit=True) as connection:
        eventually(lambda: connection.execute(SESSIONS).fetchone() == (0,))  # they report when they end
        read = "SELECT sum(idx_tup_read) / 8 FROM pg_stat_user_indexes WHERE relname = %s"
        found = connection.execute(read, (f"{table}_batches",)).fetchone()
        assert found is not None
        assert found[0] < (1000 if call == "complete" else 10_000)


def test_deadlocks_are_tried_again(postgres_server: LocalPostgres, table: str) -> None:
    """Somebody else's transaction may lock rows in another order; PostgreSQL ends one of the two, and we try again."""
    with closing(PostgresDedupStore(postgres_server.dsn, table=table)) as store, psycopg.connect(postgres_server.dsn) as rival:
        store.claim(SCOPE, items(3), token=OURS, lease=LONG)
        row = f'SELECT 1 FROM "{table}" WHERE key = %s FOR UPDATE'.encode()
        rival.execute("SET deadlock_timeout = '1min'")  # so that it is ours that is ended
        rival.execute(row, (item(1).key,))
        done: list[bool] = []
        thread = threading.Thread(target=lambda: done.extend(store.complete(SCOPE, items(2), token=OURS)))
        thread.start()
        eventually(lambda: rival.execute(WAITING).fetchone() == (1,), 4)
        rival.execute(row, (item(0).key,))  # goes on when the store's transaction was ended
        rival.commit()
        thread.join(30)
        assert done == [True, True]


@example(table=f"{'a' * 63}.{'a' * 55}")
@example(table="a" * 56)
@example(table="s.t")
@example(table="s.t.u")
@given(table=st.text() | st.from_regex(r"[a-z\"'.;\x00 ]{1,20}"))
def test_a_table_name_cannot_be_anything(table: str) -> None:
    """S03: what is not a plain name, or two with a dot, is refused; nothing that is allowed needs escaping."""
    parts = table.split(".")
    allowed = len(parts) <= 2 and all(
        part.isascii() and part.replace("_", "a").isalnum() and not part[0].isdigit() and len(part) <= longest
        for part, longest in zip(reversed(parts), (55, 63), strict=False)
    )
    if allowed:
        PostgresDedupStore("", table=table).close()
        return
    with pytest.raises(ValueError, match="table="):
        PostgresDedupStore("", table=table)


def test_a_schema_may_be_named(postgres_server: LocalPostgres, table: str) -> None:
    """``schema.table`` is two names, and capitals stay."""
    with psycopg.connect(postgres_server.dsn, autocommit=True) as connection:
        connection.execute('CREATE SCHEMA IF NOT EXISTS "Other"')
        with closing(PostgresDedupStore(postgres_server.dsn, table=f"Other.{table}")) as store:
            store.claim(SCOPE, items(1), token=OURS, lease=LONG)
        assert connection.execute(f'SELECT count(*) FROM "Other"."{table}"'.encode()).fetchone() == (1,)


@pytest.mark.parametrize("retention", [timedelta(0), timedelta(seconds=-1)])
def test_a_retention_is_more_than_nothing(retention: timedelta) -> None:
    """Else every repeat would be handled."""
    with pytest.raises(ValueError, match="retention is"):
        PostgresDedupStore("", retention=retention)
    with pytest.raises(ValueError, match=r"retention is 0\.001 s or longer"):
        RedisDedupStore(redis.Redis(socket_timeout=5), retention=retention)
    with pytest.raises(TypeError, match="a timedelta, such as"):
        RedisDedupStore(redis.Redis(socket_timeout=5), retention=3600)  # type: ignore[arg-type] # on purpose


# -- the servers of the tests -----------------------------------------------------------------------------------------------


def test_a_paused_server_keeps_its_connections_and_does_not_answer(server: LocalRedis | LocalPostgres, table: str) -> None:
    """pause() stops every process of it, so that a call that is under way ends only after resume()."""
    with store_on(server, table) as store:
        store.claim(SCOPE, items(1), token=OURS, lease=LONG)
        answered: list[bool] = []
        thread = threading.Thread(target=lambda: answered.extend(store.complete(SCOPE, items(1), token=OURS)))
        server.pause()
        try:
            thread.start()
            thread.join(0.5)
            assert not answered
        finally:
            server.resume()
        thread.join(30)
        assert answered == [True]


@pytest.mark.parametrize("kind", [LocalRedis, LocalPostgres])
def test_a_server_that_is_not_installed_is_named(
    kind: type[LocalRedis | LocalPostgres], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what to install."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("kafka_guarantees.testing.servers._DEBIAN_POSTGRES", "/nowhere")
    with pytest.raises(ServerNotInstalled, match="apt-get install"), kind():
        pass


@pytest.mark.parametrize(("ci", "raised"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_without_a_server_its_tests_are_skipped_but_not_in_ci(
    ci: str, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A developer need not install everything; where everything is installed on purpose, nothing is left out in silence."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(raised, match="apt-get install redis-server"):
        next(_installed(LocalRedis()))


@pytest.mark.parametrize("kind", [LocalRedis, LocalPostgres])
def test_a_server_that_does_not_start_says_why(kind: type[LocalRedis | LocalPostgres]) -> None:
    """The end of its log is in the error, and nothing is left running."""
    with pytest.raises(LocalServerError, match=r"Its log ends:\n.*"), kind(config={"port": "no-number"}):
        pass


@pytest.mark.parametrize("kind", [LocalRedis, LocalPostgres])
def test_a_server_is_entered_before_it_is_used(kind: type[LocalRedis | LocalPostgres]) -> None:
    """Nothing is started by the constructor."""
    with pytest.raises(LocalServerError, match="not started"):
        kind().kill()
