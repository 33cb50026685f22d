"""X01: a request of an earlier transaction that arrives late cannot end a later one.

Two parts: whatever made the end of a transaction ambiguous leads to a new producer epoch before the next one begins, and
nothing else does. Each fault is run with the library's rule and, as a control, without it: there the same late request must
be seen to tear the next transaction, or the test could not fail.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from kafka_guarantees import ExactlyOnce
from kafka_guarantees._transaction_state import State, TransactionState
from kafka_guarantees.testing.local_kafka import LocalKafka, RunningKafka

from .conftest import has_open_transaction
from .kafka_wire import END_TXN, INVALID_PRODUCER_EPOCH, PRODUCE, PRODUCER_FENCED, TIMEOUT, Held, Proxy, Wire, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


pytestmark = pytest.mark.broker

REFUSED = (INVALID_PRODUCER_EPOCH, PRODUCER_FENCED)


class Setting:
    """One ExactlyOnce that reaches its broker through a proxy."""

    def __init__(self, kafka: ExactlyOnce, proxy: Proxy, topic: str, lines: Lines) -> None:
        self.kafka = kafka
        self.proxy = proxy
        self.topic = topic
        self.lines = lines

    @property
    def renewals(self) -> int:
        return self.kafka._producer.renewals

    def write(self, value: bytes) -> None:
        with self.kafka.transaction() as tx:
            tx.produce(self.topic, value)


class Lines(logging.Handler):
    """Counts what librdkafka logs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())

    def having(self, text: str) -> int:
        return sum(text in line for line in self.seen)


@pytest.fixture
def make(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> Iterator[Callable[..., AbstractContextManager[Setting]]]:
    """A setting for a ``with``: keyword arguments are librdkafka's, with ``_`` for dots."""

    @contextmanager
    def making(transactional_id: str | None = None, more_bootstrap: str = "", **config: object) -> Iterator[Setting]:
        logger, lines = logging.Logger("test"), Lines()  # noqa: LOG001 - a logger that belongs to this test alone
        logger.addHandler(lines)
        with Proxy(kafka.bootstrap) as proxy:
            given = {
                "bootstrap.servers": proxy.bootstrap + more_bootstrap,
                "transactional.id": transactional_id or fresh("tx"),
                "logger": logger,
                **{name.replace("_", "."): value for name, value in config.items()},
            }
            with ExactlyOnce(given) as client:
                yield Setting(client, proxy, kafka_topic(), lines)

    return making  # type: ignore[return-value]


# -- what makes the end of a transaction ambiguous ---------------------------------------------------------------------


def slow(setting: Setting) -> None:
    """The EndTxn of the commit arrives after more than a second."""

    def later(held: Held) -> None:
        threading.Timer(1.3, held.send).start()  # the client waits for the answer, and the test may be over before it comes

    setting.proxy.hold_next(END_TXN, later)
    setting.write(b"first")


def second_call(setting: Setting) -> None:
    """commit_transaction() times out and is called again."""
    setting.kafka._producer.prepare()
    setting.kafka._producer.raw = TimesOutOnce(setting.kafka._producer.raw)
    setting.write(b"first")
    assert setting.kafka._producer.raw.calls == 2


class TimesOutOnce:
    """A C producer whose first commit says that it timed out."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def commit_transaction(self, timeout: float) -> None:
        self.calls += 1
        if self.calls == 1:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "for the test", retriable=True))
        self._raw.commit_transaction(timeout)


def cut_in_commit(setting: Setting) -> None:
    """The connection is lost after the EndTxn was sent, so that librdkafka sends another."""
    setting.proxy.hold_next(END_TXN, lambda _held: setting.proxy.cut())
    setting.write(b"first")


def request_timeout(setting: Setting) -> None:
    """The EndTxn is not answered within socket.timeout.ms, so that librdkafka sends another."""
    setting.proxy.hold_next(END_TXN, lambda _held: None)
    setting.write(b"first")
    await_line(setting, "REQTMOUT")


def idle_disconnect(setting: Setting) -> None:
    """The connection is lost while there is no transaction."""
    setting.write(b"first")
    setting.proxy.cut()
    await_line(setting, "Disconnected")


def await_line(setting: Setting, text: str, count: int = 1) -> None:
    deadline = time.monotonic() + TIMEOUT
    while setting.lines.having(text) < count:
        assert time.monotonic() < deadline, setting.lines.seen
        setting.kafka._producer.raw.poll(0.01)


FAULTS = [slow, second_call, cut_in_commit, request_timeout, idle_disconnect]


def inject(setting: Setting, wire: Wire, fault: Callable[[Setting], None]) -> int:
    """Transaction 1 meets a fault, 2 is open with its record at the broker, the EndTxn(commit) of 1 comes, 2 is aborted."""
    fault(setting)
    old = wire.identity()
    code = -1

    def second() -> None:
        nonlocal code
        with setting.kafka.transaction() as tx:
            tx.produce(setting.topic, b"aborted")
            setting.kafka._producer.flush()
            code = wire.end_txn(old, commit=True)
            raise InterruptedError

    with suppress(InterruptedError):
        second()
    return code


def keep_dirty(state: TransactionState, _now: float) -> str | None:
    """The library without epoch hygiene: a producer is made anew only where librdkafka leaves no choice."""
    return None if state.state is State.READY else state.state.value


@pytest.mark.parametrize("fault", FAULTS)
def test_x01_a_late_end_of_an_ambiguous_transaction_is_refused(
    fault: Callable[[Setting], None],
    kafka: RunningKafka,
    make: Callable[..., AbstractContextManager[Setting]],
    fresh: Callable[[str], str],
) -> None:
    """X01: after anything ambiguous the old epoch is refused, and the aborted transaction stays invisible."""
    name = fresh("tx")
    with make(name, socket_timeout_ms=600) as setting:
        code = inject(setting, Wire(kafka.bootstrap, name), fault)
        assert code in REFUSED
        assert setting.renewals == 2, "one before the transaction, since the last was ambiguous, and one since it was aborted"
        setting.write(b"third")
        assert setting.renewals == 2, "the new producer is clean"
        assert visible(kafka.bootstrap, setting.topic) == [b"first", b"third"]


@pytest.mark.parametrize("fault", FAULTS)
def test_x01_control_without_hygiene_the_same_request_tears_the_transaction(
    fault: Callable[[Setting], None],
    kafka: RunningKafka,
    make: Callable[..., AbstractContextManager[Setting]],
    fresh: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control of X01: with a dirty producer kept, the late request makes an aborted record visible."""
    monkeypatch.setattr(TransactionState, "renewal", keep_dirty)
    name = fresh("tx")
    with make(name, socket_timeout_ms=600) as setting:
        code = inject(setting, Wire(kafka.bootstrap, name), fault)
        assert code == 0
        assert visible(kafka.bootstrap, setting.topic) == [b"aborted", b"first"]


@pytest.mark.parametrize("hygiene", [True, False])
def test_x01_an_endtxn_that_was_on_its_way_all_the_time(
    hygiene: bool,  # noqa: FBT001 - the two rows of a table
    kafka: RunningKafka,
    make: Callable[..., AbstractContextManager[Setting]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """X01: librdkafka's own first EndTxn, held by the network, its connection lost, arrives within the next transaction."""
    if not hygiene:
        monkeypatch.setattr(TransactionState, "renewal", keep_dirty)
    held: list[Held] = []

    def hold_and_cut(request: Held) -> None:
        held.append(request)
        setting.proxy.cut()

    def second() -> int:
        with setting.kafka.transaction() as tx:
            tx.produce(setting.topic, b"aborted")
            setting.kafka._producer.flush()
            codes.append(held[0].release())
            raise InterruptedError

    codes: list[int] = []
    with make() as setting:
        setting.proxy.hold_next(END_TXN, hold_and_cut)
        setting.write(b"first")
        with suppress(InterruptedError):
            second()
        seen = visible(kafka.bootstrap, setting.topic)
        if hygiene:
            assert codes[0] in REFUSED
            assert seen == [b"first"]
        else:
            assert codes == [0]
            assert seen == [b"aborted", b"first"], "the control must see the tear"


@pytest.fixture(scope="module")
def trusting() -> Iterator[LocalKafka]:
    """A broker that does not ask whether a record is of an open transaction: none before Kafka 3.6 does."""
    with LocalKafka(config={"transaction.partition.verification.enable": "false"}) as kafka:
        yield kafka


@pytest.mark.parametrize(
    ("cut", "hygiene"), [(True, True), (False, True), (True, False)], ids=["cut", "no answer", "control: cut"]
)
def test_x01_a_record_that_arrives_behind_the_abort_of_its_transaction(
    trusting: LocalKafka,
    fresh: Callable[[str], str],
    *,
    cut: bool,
    hygiene: bool,
) -> None:
    """X01: it is refused. Without the rule it becomes part of the next transaction, which commits what was aborted."""
    topic, held = fresh("topic"), list[Held]()
    trusting.create_topic(topic)

    def hold(request: Held) -> None:
        held.append(request)
        if cut:
            proxy.cut()

    def aborted() -> None:
        with client.transaction() as tx:
            tx.produce(topic, b"aborted")
            deadline = time.monotonic() + TIMEOUT
            while not held and time.monotonic() < deadline:
                time.sleep(0.01)
            raise InterruptedError

    with Proxy(trusting.bootstrap) as proxy:
        config = {"bootstrap.servers": proxy.bootstrap, "transactional.id": fresh("tx")}
        with ExactlyOnce(config) as client:
            client._producer.late_records = hygiene  # what preflight finds when a run starts: see below
            with client.transaction() as tx:
                tx.produce(topic, b"first")
            proxy.hold_next(PRODUCE, hold)
            with suppress(InterruptedError):
                aborted()
            held[0].send()
            admin, until = AdminClient({"bootstrap.servers": trusting.bootstrap}), time.monotonic() + TIMEOUT
            time.sleep(0.5)  # it has no answer that anybody could wait for
            while not hygiene and not has_open_transaction(admin, topic) and time.monotonic() < until:
                time.sleep(0.1)
            assert has_open_transaction(admin, topic) is not hygiene
            with client.transaction() as tx:
                tx.produce(topic, b"second")
    assert visible(trusting.bootstrap, topic) == [*([] if hygiene else [b"aborted"]), b"first", b"second"]


def test_a_run_finds_out_whether_its_brokers_take_late_records(
    trusting: LocalKafka, kafka: RunningKafka, fresh: Callable[[str], str]
) -> None:
    """By preflight. Where they do not, whoever aborts asks for the end of the transaction, and hears that it is fenced."""
    for brokers, late in ((trusting, True), (kafka, False)):
        topic = fresh("topic")
        brokers.create_topic(topic)
        config = {"bootstrap.servers": brokers.bootstrap, "transactional.id": fresh("tx"), "group.id": fresh("group")}
        with ExactlyOnce(config) as client:
            client.run([topic], lambda _message: None, until_idle=0.1)
            assert [producer.late_records for producer in client._in_flight.producers] == [late] * 3


# -- and nothing else is -----------------------------------------------------------------------------------------------


def test_x01_hygiene_costs_nothing_where_nothing_happened(
    kafka: RunningKafka, make: Callable[..., AbstractContextManager[Setting]]
) -> None:
    """X01: of 200 undisturbed transactions only the aborted ones are followed by a new producer."""
    with make() as setting:
        for number in range(200):
            with suppress(InterruptedError), setting.kafka.transaction() as tx:
                tx.produce(setting.topic, b"%d" % number)
                if number % 10 == 9:
                    raise InterruptedError
        assert setting.renewals == 20
        assert len(visible(kafka.bootstrap, setting.topic)) == 180


def test_x01_one_disconnect_is_one_renewal(make: Callable[..., AbstractContextManager[Setting]]) -> None:
    """X01: a connection that was closed for being idle costs one new producer, not one for each transaction after it."""
    with make() as setting:
        setting.write(b"1")
        setting.proxy.cut()
        await_line(setting, "Disconnected")
        for number in range(20):
            setting.write(b"%d" % number)
        assert setting.renewals == 1


def test_x01_a_server_that_is_never_there_costs_nothing(make: Callable[..., AbstractContextManager[Setting]]) -> None:
    """X01: a connection that never came up carried no request: no new producer for bootstrap servers that are not there."""
    nobody = "".join(f",127.0.0.1:{port}" for port in refusing_ports(5))
    deadline = time.monotonic() + TIMEOUT
    refusals = 0
    while not refusals:  # librdkafka begins with any of the servers, in some rounds with the one that is there
        assert time.monotonic() < deadline
        with make(more_bootstrap=nobody) as setting:
            for number in range(20):
                setting.write(b"%d" % number)
            refusals = setting.lines.having("Connection refused")
            assert setting.renewals == 0, setting.lines.seen


def refusing_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def test_x01_a_restart_of_the_broker_is_two_renewals_at_most(make: Callable[..., AbstractContextManager[Setting]]) -> None:
    """X01: a broker that goes and comes back costs a new producer or two, however long it was away."""
    with make() as setting:
        setting.write(b"1")
        setting.proxy.down()
        await_line(setting, "Connection refused", 2)
        threading.Timer(0.5, setting.proxy.up).start()
        for number in range(20):
            setting.write(b"%d" % number)
        assert 1 <= setting.renewals <= 2
