"""Laws of fork (Y04), on a real broker: a child neither uses nor disturbs what its parent has. Each test runs a script."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from .conftest import committed, fill, read_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kafka_guarantees.testing.local_kafka import RunningKafka
    from kafka_guarantees.testing.servers import LocalPostgres

pytestmark = pytest.mark.broker

# Python 3.12 warns of every fork in a process with threads, which is what is tried here. All other warnings are errors.
WARNINGS = ("-W", "error", "-W", "ignore:.*multi-threaded.*:DeprecationWarning")

BEGIN = """
import multiprocessing, os, signal, subprocess, sys, threading, time, warnings
from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, ForkedClientError, Record

config, topic, output, path = {config!r}, {topic!r}, {output!r}, {path!r}

def note(*what):
    # one write, so that lines of several processes do not mix
    os.write(1, (repr((os.getpid() == PARENT, *what)) + chr(10)).encode())

def ended(child, seconds=8):
    # the exit status of a child, which must end soon
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed: it did not end"

PARENT = os.getpid()
"""

COUNT = 20


class Script:
    """Runs a script whose parent handles COUNT messages, and reads what its processes noted."""

    def __init__(self, kafka: RunningKafka, topics: tuple[str, str], group: str, directory: Path) -> None:
        self.kafka = kafka
        self.topic, self.output = topics
        self.group = group
        self.directory = directory
        fill(kafka.bootstrap, self.topic, [str(number).encode() for number in range(COUNT)])

    def run(self, script: str) -> list[tuple[Any, ...]]:
        """What was noted, as ``(by the parent?, *what)``."""
        config = {"bootstrap.servers": self.kafka.bootstrap, "group.id": self.group, "transactional.id": self.group}
        path = self.directory / "script.py"  # spawn imports it
        begin = BEGIN.format(config=config, topic=self.topic, output=self.output, path=str(self.directory))
        path.write_text(begin + textwrap.dedent(script))
        command = [sys.executable, *WARNINGS, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr
        self.stderr = done.stderr
        return [ast.literal_eval(line) for line in done.stdout.splitlines()]

    def check_nothing_lost_nothing_twice(self, handled: list[Any]) -> None:
        """The parent handled every message once, and committed all of them."""
        assert Counter(handled) == Counter(range(COUNT))
        assert committed(self.kafka.bootstrap, self.group, self.topic)[0] >= COUNT


@pytest.fixture
def script(kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], tmp_path: Path) -> Script:
    return Script(kafka, (kafka_topic(), kafka_topic()), fresh("fork"), tmp_path)


MAKE = {
    "AtMostOnce": "AtMostOnce(BASE, start='earliest')",
    "AtLeastOnce": "AtLeastOnce(BASE)",
    "ExactlyOnce": "ExactlyOnce(config)",
}
BASE = "BASE = {name: value for name, value in config.items() if name != 'transactional.id'}\n"

# What a child may do in the handler that it was forked in, and what its parent sees of it.
LEAVES = {
    "os._exit": ("os._exit(7)", 7),
    "sys.exit": ("sys.exit(7)", 7),
    "an error": ("raise ZeroDivisionError", 1),
}

FORK_IN_HANDLER = """
def handler(message):
    if message.offset() == 5:
        child = os.fork()
        if child == 0:
            {leave}
        note("child", ended(child))
    note("handled", message.offset())
    return [Record(output, message.value())]

with {make} as kafka:
    kafka.run([topic], handler, until_idle=1)
"""


@pytest.mark.parametrize("leave", LEAVES)
@pytest.mark.parametrize("kind", sorted(MAKE))
def test_a_child_that_leaves_the_handler_takes_nothing_with_it(script: Script, kind: str, leave: str) -> None:
    """A handler forks, and its child goes through the run to get out: it leaves no group, aborts and commits nothing."""
    how, status = LEAVES[leave]
    if (kind, leave) == ("AtMostOnce", "an error"):
        pytest.skip("there an error of the handler ends nothing")
    noted = script.run(BASE + FORK_IN_HANDLER.format(leave=how, make=MAKE[kind]))
    assert [what[2] for what in noted if what[1] == "child"] == [status]
    script.check_nothing_lost_nothing_twice([what[2] for what in noted if what[1] == "handled"])
    assert all(by_parent for by_parent, *_ in noted)
    assert len(read_all(script.kafka.bootstrap, script.output)) == COUNT


@pytest.mark.parametrize("leave", ["os._exit(7)", "sys.exit(7)"])
def test_a_child_of_a_handler_on_its_own_thread_ends(script: Script, leave: str) -> None:
    """With keep_alive the handler has a thread, which in a child is the only one: nobody else would end the process."""
    make = "AtLeastOnce(BASE, keep_alive=True)"
    noted = script.run(BASE + FORK_IN_HANDLER.format(leave=leave, make=make))
    assert [what[2] for what in noted if what[1] == "child"] == [7]
    script.check_nothing_lost_nothing_twice([what[2] for what in noted if what[1] == "handled"])


FORK_AND_RETURN = """
child = None
forked = {{}}

def handler(message):
    if message.offset() == 5 and os.getpid() == PARENT and not forked:
        forked["child"] = child = os.fork()
        if child == 0:
            return
        note("child", ended(child))
    note("handled", message.offset())

try:
    with {make} as kafka:
        kafka.run([topic], handler, until_idle=1)
except ForkedClientError as error:
    assert "Make the client after the fork" in str(error), error
    note("refused")
    sys.exit(3)
"""


@pytest.mark.parametrize("kind", sorted(MAKE))
def test_a_child_that_returns_into_the_run_is_refused(script: Script, kind: str) -> None:
    """The handler returns in parent and child: only the parent goes on, and the child's run ends with ForkedClientError."""
    noted = script.run(BASE + FORK_AND_RETURN.format(make=MAKE[kind]))
    assert [what[2] for what in noted if what[1] == "child"] == [3]
    assert [by_parent for by_parent, what, *_ in noted if what == "refused"] == [False]
    script.check_nothing_lost_nothing_twice([what[2] for what in noted if what[1] == "handled"])
    assert all(by_parent for by_parent, what, *_ in noted if what == "handled")


def test_generators_of_the_parent_are_refused_in_a_child(script: Script) -> None:
    """messages() and transactions() that were begun before the fork: asked for more in the child they raise at once."""
    noted = script.run(
        BASE
        + """
kafka, exactly = AtLeastOnce(BASE), ExactlyOnce({**config, "group.id": config["group.id"] + "-x"})
begun = {"messages": kafka.messages([topic]), "transactions": exactly.transactions([topic])}
next(begun["messages"])
with next(begun["transactions"]):
    pass
child = os.fork()
if child == 0:
    for name, generator in begun.items():
        try:
            next(generator)
        except ForkedClientError as error:
            note(name, "Nothing was sent" in str(error))
    os._exit(0)
assert ended(child) == 0
first = begun.pop("messages")
note("next", next(first).offset())
kafka.close()
begun.pop("transactions").close()
exactly.close()
"""
    )
    assert noted == [(False, "messages", True), (False, "transactions", True), (True, "next", 1)]


def test_a_transaction_goes_on_after_a_child_that_left_it(script: Script) -> None:
    """A child that leaves `with tx` by an exception aborts nothing: the parent commits, and all records are there."""
    noted = script.run("""
with ExactlyOnce(config) as kafka:
    with kafka.transaction() as tx:
        tx.produce(output, b"before")
        child = os.fork()
        if child == 0:
            sys.exit(4)
        note(ended(child))
        tx.produce(output, b"after")
""")
    assert noted == [(True, 4)]
    assert [message.value() for message in read_all(script.kafka.bootstrap, script.output)] == [b"before", b"after"]
    assert "Traceback" not in script.stderr


def test_processes_of_a_pool_in_a_handler(script: Script) -> None:
    """A Pool of multiprocessing, forked in a handler: it works, and SIGTERM, by which it ends its workers, ends them."""
    noted = script.run(
        BASE
        + """
def twice(number):
    return 2 * number

def handler(message):
    if message.offset() == 5:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            note("pool", pool.map(twice, [1, 2, 3]))
    note("handled", message.offset())

if __name__ == "__main__":
    with AtLeastOnce(BASE) as kafka:
        kafka.run([topic], handler, until_idle=1)
"""
    )
    assert [what[2] for what in noted if what[1] == "pool"] == [[2, 4, 6]]
    script.check_nothing_lost_nothing_twice([what[2] for what in noted if what[1] == "handled"])


AT_ONCE = """
import os, signal, time
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))  # before that of the library
from kafka_guarantees._lifecycle import _stop_on_signal
with _stop_on_signal(lambda: None, lambda: True):
    child = os.fork()
    if child == 0:
        time.sleep(5)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_signal_that_comes_at_once_is_a_childs_own() -> None:
    """A Pool may end its workers in the moment in which they are forked: SIGTERM is not taken for a stop of the run then."""
    ran = subprocess.run([sys.executable, *WARNINGS, "-c", AT_ONCE], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout.split() == ["-15"], ran.stderr


def test_signals_are_a_childs_own(script: Script) -> None:
    """SIGTERM ends a child that was forked in a handler: what a run does with it is no business of the child's."""
    noted = script.run(
        BASE
        + """
def handler(message):
    if message.offset() == 5:
        child = os.fork()
        if child == 0:
            note("ready", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        note("child", ended(child, 5))
    note("handled", message.offset())

with AtLeastOnce(BASE) as kafka:
    kafka.run([topic], handler, until_idle=1)
"""
    )
    assert [what[1:] for what in noted if what[1] != "handled"] == [("ready", True), ("child", -15)]
    script.check_nothing_lost_nothing_twice([what[2] for what in noted if what[1] == "handled"])


def test_a_program_that_a_handler_starts(script: Script) -> None:
    """subprocess.run is no fork that Python code comes out of: nothing is refused, nothing disturbed, in both its ways."""
    noted = script.run(
        BASE
        + """
def handler(message):
    for more in ({}, {"preexec_fn": lambda: None}):
        done = subprocess.run(["echo", str(message.offset())], capture_output=True, text=True, check=True, **more)
        assert done.stdout.strip() == str(message.offset())
    note("handled", message.offset())

with AtLeastOnce(BASE) as kafka:
    kafka.run([topic], handler, until_idle=1)
"""
    )
    script.check_nothing_lost_nothing_twice([what[2] for what in noted])


def test_a_preforking_server(script: Script) -> None:
    """As with gunicorn --preload: the client is made before the workers. Each is refused it, and one of its own works."""
    noted = script.run(
        BASE
        + """
preloaded = AtLeastOnce(BASE)  # the mistake
preloaded.produce(output, b"of the parent").result(10)

def worker(number):
    try:
        preloaded.produce(output, b"lost")
    except ForkedClientError as error:
        note("refused", "Make the client after the fork" in str(error))
    with AtLeastOnce(BASE) as own:
        own.produce(output, b"of worker %d" % number).result(10)

workers = []
for number in range(3):
    child = os.fork()
    if child == 0:
        worker(number)
        sys.exit(0)
    workers.append(child)
note("ended", [ended(child) for child in workers])
preloaded.produce(output, b"of the parent").result(10)
preloaded.close()
"""
    )
    assert sorted(noted) == [(False, "refused", True)] * 3 + [(True, "ended", [0, 0, 0])]
    values = Counter(message.value() for message in read_all(script.kafka.bootstrap, script.output))
    assert values == Counter({b"of the parent": 2, b"of worker 0": 1, b"of worker 1": 1, b"of worker 2": 1})


def test_a_fork_while_other_threads_run_clients(script: Script) -> None:
    """Children are forked again and again beside a run and a producer that are busy: none hangs, and nothing is missing."""
    noted = script.run(
        BASE
        + """
kafka, producer, over = AtLeastOnce(BASE), AtLeastOnce(BASE), threading.Event()

def produce():
    count = 0
    while not over.is_set():
        producer.produce(output, b"x")
        count += 1
        time.sleep(0.001)
    producer.flush()
    note("produced", count)

def handler(message):
    note("handled", message.offset())
    time.sleep(0.05)

threads = [threading.Thread(target=produce), threading.Thread(target=lambda: kafka.run([topic], handler, until_idle=1))]
for thread in threads:
    thread.start()
for _ in range(30):
    child = os.fork()
    if child == 0:
        for call in (lambda: kafka.run([topic], print), lambda: producer.produce(output, b"lost"), lambda: producer.flush()):
            try:
                call()
            except ForkedClientError:
                continue
            os._exit(1)
        kafka.close()
        producer.close()
        os._exit(0)
    assert (ended(child) == 0), "a child hung, or was not refused"
threads[1].join()
over.set()
threads[0].join()
producer.close()
kafka.close()
"""
    )
    script.check_nothing_lost_nothing_twice([what[2] for what in noted if what[1] == "handled"])
    [produced] = [what[2] for what in noted if what[1] == "produced"]
    assert len(read_all(script.kafka.bootstrap, script.output)) == produced


@pytest.mark.parametrize("leave", ["os._exit(0)", "sys.exit(0)", "return None"])
def test_claims_stay_with_the_parent(script: Script, leave: str) -> None:
    """A child that leaves the handler does not release the ids in hand: nobody else may take them while they are handled."""
    noted = script.run(
        BASE
        + """
from kafka_guarantees.dedup import SqliteDedupStore

class Store(SqliteDedupStore):
    def release(self, scope, items, *, token):
        note("released", len(items))
        super().release(scope, items, token=token)

def handler(message):
    if message.offset() == 5:
        child = os.fork()
        if child == 0:
            LEAVE
        note("child", ended(child))
    note("handled", message.offset())

try:
    with Store(path + "/ids.db") as store, AtLeastOnce(BASE, dedup=store, message_id=lambda m: m.value()) as kafka:
        kafka.run([topic], handler, until_idle=1)
except ForkedClientError:
    sys.exit(0)
""".replace("LEAVE", leave)
    )
    assert not [what for what in noted if what[1] == "released" and not what[0]]
    assert [what[2] for what in noted if what[1] == "child"] == [0]
    script.check_nothing_lost_nothing_twice([what[2] for what in noted if what[1] == "handled"])


@pytest.mark.parametrize("leave", ["os._exit(0)", "sys.exit(0)", "return None"])
def test_a_transaction_of_an_inbox_stays_with_the_parent(script: Script, leave: str) -> None:
    """A child that leaves the handler neither commits nor rolls back what its parent has open in the inbox's database."""
    noted = script.run(
        BASE
        + """
import sqlite3
from kafka_guarantees.dedup import SqliteInbox

def handler(message, connection):
    if message.offset() == 5:
        child = os.fork()
        if child == 0:
            LEAVE
        note("child", ended(child))
    connection.execute("CREATE TABLE IF NOT EXISTS effects (n INTEGER)")
    connection.execute("INSERT INTO effects VALUES (?)", (message.offset(),))

try:
    with SqliteInbox(path + "/effects.db") as inbox, AtLeastOnce(BASE, inbox=inbox, message_id=None) as kafka:
        kafka.run([topic], handler, until_idle=1)
except ForkedClientError:
    sys.exit(0)
connection = sqlite3.connect(path + "/effects.db")
note("effects", sorted(n for (n,) in connection.execute("SELECT n FROM effects")))
connection.close()
""".replace("LEAVE", leave)
    )
    assert noted == [(True, "child", 0), (True, "effects", list(range(COUNT)))]


POSTGRES = """
import os, sys
from datetime import timedelta
from kafka_guarantees import ForkedClientError
from kafka_guarantees.dedup import Entry, Item, PostgresDedupStore, PostgresInbox, Source

dsn, end = {dsn!r}, {end!r}
with PostgresDedupStore(dsn, table="fork_store") as store, PostgresInbox(dsn, prefix="fork") as inbox:
    item = Item(os.urandom(16), os.urandom(16), bytes(8))
    store.claim("s", [item], token=bytes(16), lease=60)
    source = Source("t", os.urandom(16), 0)
    with inbox.transaction("s" + end, [Entry(source, 0, os.urandom(16))]) as transaction:
        transaction.connection.execute("CREATE TABLE IF NOT EXISTS fork_effects (who text)")
        transaction.connection.execute("INSERT INTO fork_effects VALUES (%s)", [end])
        child = os.fork()
        if child == 0:
            try:
                store.complete("s", [item], token=bytes(16))
            except ForkedClientError:
                print("refused", flush=True)
            if end == "returns":
                raise KeyboardInterrupt  # out of the block, as a child that returns would leave it
            getattr(os if end == "_exit" else sys, end)(7)
        os.waitpid(child, 0)
    print(store.complete("s", [item], token=bytes(16)))
    with inbox.transaction("s" + end, [Entry(source, 1, os.urandom(16))]) as transaction:
        [(count,)] = transaction.connection.execute("SELECT count(*) FROM fork_effects WHERE who = %s", [end]).fetchall()
        print(count)
"""


@pytest.mark.parametrize("end", ["exit", "_exit", "returns"])
def test_a_child_leaves_the_database_connections_of_its_parent_alone(postgres_server: LocalPostgres, end: str) -> None:
    """However it ends: the parent's transaction is committed, its store goes on, and the child may not use the store."""
    script = POSTGRES.format(dsn=postgres_server.dsn, end=end)
    ran = subprocess.run([sys.executable, *WARNINGS, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout.splitlines() == ["refused", "[True]", "1"], ran.stderr
    assert ran.returncode == 0
