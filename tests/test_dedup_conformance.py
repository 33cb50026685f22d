"""The conformance suites on our own stores and inboxes; and on broken ones, which they must find."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar
from xml.etree import ElementTree as ET

import psycopg
import pytest
import redis

from kafka_guarantees.dedup import (
    MemoryDedupStore,
    PostgresDedupStore,
    PostgresInbox,
    RedisDedupStore,
    SqliteDedupStore,
    SqliteInbox,
)
from kafka_guarantees.testing import DedupStoreConformance, InboxConformance
from kafka_guarantees.testing.broken_stores import CAUGHT_BY
from kafka_guarantees.testing.conformance.reference import ReferenceInbox, ReferenceStore
from kafka_guarantees.testing.conformance.running import in_processes
from kafka_guarantees.testing.conformance.stores import Journal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import timedelta
    from pathlib import Path

    from kafka_guarantees.dedup import DedupStore, Inbox
    from kafka_guarantees.testing import LocalPostgres, LocalRedis
    from kafka_guarantees.testing.conformance import Clock

# -- stores ---------------------------------------------------------------------------------------------------------------


class TestReferenceStore(DedupStoreConformance):
    def make_store(self, place: Path, retention: timedelta, clock: Clock) -> DedupStore:
        return ReferenceStore(place, retention, clock)


class TestMemory(DedupStoreConformance):
    def make_store(self, place: Path, retention: timedelta, clock: Clock) -> DedupStore:
        return MemoryDedupStore(retention=retention, clock=clock)


class TestSqlite(DedupStoreConformance):
    def make_store(self, place: Path, retention: timedelta, clock: Clock) -> DedupStore:
        return SqliteDedupStore(place, retention=retention, clock=clock)


class TestRedis(DedupStoreConformance):
    clients: ClassVar[list[redis.Redis]] = []

    @pytest.fixture(autouse=True)
    def _server(self, redis_server: LocalRedis, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv("KG_TEST_REDIS", redis_server.url)  # read in other processes too
        yield
        while self.clients:
            self.clients.pop().close()

    def make_store(self, place: Path, retention: timedelta, clock: Clock) -> DedupStore:
        self.clients.append(redis.Redis.from_url(os.environ["KG_TEST_REDIS"], socket_timeout=5))
        return RedisDedupStore(self.clients[-1], retention=retention, prefix=place.name)


class TestPostgres(DedupStoreConformance):
    @pytest.fixture(autouse=True)
    def _server(self, postgres_server: LocalPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KG_TEST_POSTGRES", postgres_server.dsn)

    def make_store(self, place: Path, retention: timedelta, clock: Clock) -> DedupStore:
        return PostgresDedupStore(os.environ["KG_TEST_POSTGRES"], table=place.name, retention=retention)


# -- inboxes --------------------------------------------------------------------------------------------------------------


class SqliteEffects(InboxConformance):
    """Effects in the file that the inbox is in."""

    def prepare(self, place: Path) -> None:
        with closing(sqlite3.connect(place)) as connection:
            connection.execute("CREATE TABLE effects (text)")

    def effect(self, place: Path, connection: Any, text: str) -> None:
        connection.execute("INSERT INTO effects VALUES (?)", (text,))

    def effects(self, place: Path) -> list[str]:
        with closing(sqlite3.connect(place)) as connection:
            return [text for (text,) in connection.execute("SELECT text FROM effects")]


class TestReferenceInbox(SqliteEffects):
    def make_inbox(self, place: Path, retention: timedelta, clock: Clock) -> Inbox[Any]:
        return ReferenceInbox(place, retention, clock)


class TestSqliteInbox(SqliteEffects):
    def make_inbox(self, place: Path, retention: timedelta, clock: Clock) -> Inbox[Any]:
        return SqliteInbox(place, retention=retention, clock=clock)


class TestPostgresInbox(InboxConformance):
    clock = "server"

    @pytest.fixture(autouse=True)
    def _server(self, postgres_server: LocalPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KG_TEST_POSTGRES", postgres_server.dsn)

    def make_inbox(self, place: Path, retention: timedelta, clock: Clock) -> Inbox[Any]:
        return PostgresInbox(os.environ["KG_TEST_POSTGRES"], prefix=place.name, retention=retention)

    def prepare(self, place: Path) -> None:
        with psycopg.connect(os.environ["KG_TEST_POSTGRES"]) as connection:
            connection.execute(f"CREATE TABLE {place.name}_effects (text text)")

    def effect(self, place: Path, connection: Any, text: str) -> None:
        connection.execute(f"INSERT INTO {place.name}_effects VALUES (%s)", (text,))

    def effects(self, place: Path) -> list[str]:
        with psycopg.connect(os.environ["KG_TEST_POSTGRES"]) as connection:
            return [text for (text,) in connection.execute(f"SELECT text FROM {place.name}_effects")]


# -- processes --------------------------------------------------------------------------------------------------------------


class Meets:
    """Processes that wait for each other: they end if all of them are at work at the same time."""

    def work(self, place: Path, number: int, ready: Callable[[], None]) -> None:
        ready()
        (place / str(number)).touch()
        until = time.monotonic() + 20
        while len(list(place.iterdir())) < MEETING:
            assert time.monotonic() < until, "the others are not at work"
            time.sleep(0.001)


MEETING = 4


def test_processes_are_at_work_together(tmp_path: Path) -> None:
    """Else the tests of many processes would be tests of one after the other."""
    suite = Meets()
    in_processes(suite, "together", suite.work, tmp_path, count=MEETING, patience=30)


# -- broken ones ----------------------------------------------------------------------------------------------------------

BROKEN_SUITES = """
from kafka_guarantees.testing import broken_stores
from kafka_guarantees.testing.conformance import DedupStoreConformance
from tests.test_dedup_conformance import SqliteEffects

class Store(DedupStoreConformance):
    def make_store(self, place, retention, clock):
        return self.broken(place, retention, clock)

class Inbox(SqliteEffects):
    def make_inbox(self, place, retention, clock):
        return self.broken(place, retention, clock)

for one in broken_stores.CAUGHT_BY:
    suite = Store if issubclass(one, broken_stores.ReferenceStore) else Inbox
    globals()[f"Test{one.__name__}"] = type(f"Test{one.__name__}", (suite,), {"broken": one, "__module__": __name__})
"""


AT_ONCE = 400  # seconds for all of them, which take ten; one that hangs is ended after a minute, and is a failure of its own


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, set[str]]:
    """The tests that failed of those named, by the name of the broken class."""
    directory = tmp_path_factory.mktemp("broken")
    (directory / "test_broken.py").write_text(BROKEN_SUITES)
    report = directory / "report.xml"
    named = [f"test_broken.py::Test{one.__name__}::{test}" for one, test in CAUGHT_BY.items()]
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "--timeout=60",
            f"--junitxml={report}",
            *named,
        ],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CI": "true"},  # where pytest looks for the shortest diff
        capture_output=True,
        text=True,
        timeout=AT_ONCE,
        check=False,
    )
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED, ended.stdout + ended.stderr
    found = defaultdict(set)
    for case in ET.parse(report).iter("testcase"):
        failure = case.find("failure")
        if failure is not None and not any(
            late in (failure.text or "") for late in ("have not ended within", "from pytest-timeout")
        ):
            found[case.get("classname", "").rpartition(".Test")[2]].add(case.get("name", "").partition("[")[0])
    return found


@pytest.mark.timeout(AT_ONCE + 20)  # the first one waits for the fixture
@pytest.mark.parametrize(("broken", "test"), [(one.__name__, test) for one, test in CAUGHT_BY.items()])
def test_a_mistake_is_found_by_its_test(failed: Mapping[str, set[str]], broken: str, test: str) -> None:
    """The suite fails for every broken store and inbox, by the test that states the law which it breaks."""
    assert test in failed[broken], f"{broken} fails in {sorted(failed[broken]) or 'no test'}"


def test_a_journal_leaves_out_what_a_kill_has_cut_off(tmp_path: Path) -> None:
    """And reads on behind it: its writer is killed at any moment, and the next one appends."""
    journal = Journal(tmp_path / "place", 0)
    journal.write([("NEW", 1), ("NEW", 23)])
    path = next(tmp_path.iterdir())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        before = len(journal.read())
        journal.write([("completed", 23)])
        assert journal.read() == [*[("NEW", 1), ("NEW", 23)][:before], ("completed", 23)]
