"""Laws of producing: no failure is dropped, no wait is endless, no callback does harm, and keys go where Java sends them."""

from __future__ import annotations

import gc
import logging
import selectors
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from hypothesis import given, settings
from hypothesis import strategies as st

from kafka_guarantees import AtLeastOnce, AtMostOnce, Delivery, ExactlyOnce, Record
from kafka_guarantees._client import QUIET, librdkafka_log
from kafka_guarantees._producer import PlainProducer
from kafka_guarantees.errors import (
    BrokerError,
    DeliveryError,
    DeliveryUnknown,
    DurabilityWarning,
    KafkaGuaranteesError,
    TransactionAborted,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kafka_guarantees.testing import RunningKafka

DEAD = "127.0.0.1:1"
DEADLINE = 20.0
TOO_LARGE = b"x" * 2_000_000


def dead(**more: object) -> dict[str, object]:
    """A configuration whose brokers never answer, with ``a__b`` in ``more`` standing for ``a.b``."""
    return {"bootstrap.servers": DEAD, **{name.replace("__", "."): value for name, value in more.items()}}


def becomes_true(condition: Callable[[], bool], seconds: float = DEADLINE) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return true


def arrived(bootstrap: str, topic: str, count: int, partitions: int = 1, quiet: float = 0.3) -> list[Message]:
    """The messages of a topic: ``count`` of them as soon as they are there, and whatever more comes in ``quiet`` seconds."""
    config = {
        "bootstrap.servers": bootstrap,
        "group.id": "reader",
        "enable.auto.commit": False,
        "isolation.level": "read_committed",
        "fetch.queue.backoff.ms": 2,
    }
    consumer = Consumer(config)
    found: list[Message] = []
    deadline = time.monotonic() + DEADLINE
    try:
        consumer.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
        while len(found) < count and time.monotonic() < deadline:
            found += [one for one in consumer.consume(1000, 0.1) if one.error() is None and one.value() != READY]
        found += [one for one in consumer.consume(1000, quiet) if one.error() is None and one.value() != READY]
    finally:
        consumer.close()
    return found


READY = b"ready"


def made_ready(bootstrap: str, topic: str, partitions: int = 1) -> str:
    """The topic, once every partition of it takes records: at most once (acks=0) loses what comes before that."""
    with AtLeastOnce({"bootstrap.servers": bootstrap, "linger.ms": 1}) as producer:
        for number in range(partitions):
            producer.produce(topic, READY, partition=number)
        producer.flush(DEADLINE)
    return topic


def warned(forget: Callable[[], None]) -> list[tuple[type[Warning], str]]:
    """What is warned of while something is forgotten."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        forget()
        gc.collect()
    return [(one.category, str(one.message)) for one in found]


# --- P01: no failure is dropped ------------------------------------------------------------------------------------------


def next_produce(kafka: AtLeastOnce) -> None:
    kafka.produce("t", b"next")


def next_flush(kafka: AtLeastOnce) -> None:
    kafka.flush(5)


def next_close(kafka: AtLeastOnce) -> None:
    kafka.close(5)


@pytest.mark.parametrize("then", [next_produce, next_flush, next_close])
def test_a_failure_that_nobody_looked_at_is_raised_by_the_next_call(then: Callable[[AtLeastOnce], None]) -> None:
    """P01: produce() returns a delivery; who ignores it is told by the next call, once."""
    with AtLeastOnce(dead()) as kafka:
        kafka.produce("orders", TOO_LARGE)
        with pytest.raises(DeliveryError, match="'orders' was not written"):
            then(kafka)
        if then is not next_close:
            kafka.flush(0)


@pytest.mark.parametrize("then", [next_flush, next_close])
def test_a_failed_report_that_nobody_looked_at_is_raised(then: Callable[[AtLeastOnce], None]) -> None:
    """P01, P05: the same where the record was taken and its time passed: then it is unknown."""
    with AtLeastOnce(dead(delivery__timeout__ms=300, linger__ms=1)) as kafka:
        kafka.produce("orders", b"x")
        with pytest.raises(DeliveryUnknown, match="'orders' may or may not have been written"):
            then(kafka)


def test_a_failure_that_result_raised_is_not_raised_again() -> None:
    """P01: looked at is looked at; neither produce, flush nor close repeat it."""
    with AtLeastOnce(dead()) as kafka:
        delivery = kafka.produce("orders", TOO_LARGE)
        with pytest.raises(DeliveryError):
            delivery.result()
        kafka.flush(0)


def test_failures_are_counted() -> None:
    """P02: three lost records are not one."""
    with AtLeastOnce(dead()) as kafka:
        seen = kafka.produce("orders", TOO_LARGE)
        failures = kafka._producer
        assert failures is not None
        for _ in range(2):
            failures.produce(Record("orders", TOO_LARGE))
        with pytest.raises(DeliveryError):
            seen.result()
        with pytest.raises(DeliveryError, match="And 1 more failed"):
            kafka.flush(0)


def test_one_unknown_among_the_failures_makes_all_of_them_unknown() -> None:
    """P05: DeliveryError permits a re-send without duplicates, so it must hold for every record that it speaks of."""
    with AtLeastOnce(dead(delivery__timeout__ms=300, linger__ms=1)) as kafka:
        kafka.produce("orders", b"times out")
        producer = kafka._producer
        assert producer is not None
        producer.produce(Record("orders", TOO_LARGE))
        with pytest.raises(DeliveryUnknown):
            kafka.flush(5)


def test_close_does_not_hide_the_first_error() -> None:
    """A block that fails raises its own error, also where close() has one too."""

    def block() -> None:
        with AtLeastOnce(dead()) as kafka:
            kafka.produce("orders", TOO_LARGE)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()


# --- P02, P15: flush and close are bounded, and count ----------------------------------------------------------------------


def test_flush_says_how_many_are_not_acknowledged() -> None:
    """P02: what flush() leaves is a failure, with its number; the records are still on their way."""
    with AtLeastOnce(dead()) as kafka:
        deliveries = [kafka.produce("orders", b"x") for _ in range(7)]
        started = time.monotonic()
        with pytest.raises(DeliveryUnknown, match="not acknowledged in time: 7 records,"):
            kafka.flush(0.5)
        assert time.monotonic() - started < 2
        assert not any(delivery.done for delivery in deliveries)
        with pytest.raises(DeliveryError, match="And 6 more"):
            kafka.close(0)
        assert all(delivery.done for delivery in deliveries)


def test_close_returns_in_time_and_settles_every_delivery() -> None:
    """P14, P15: brokers that are away do not hold a program up; what was purged is told, with its number."""
    kafka = AtLeastOnce(dead())
    deliveries = [kafka.produce("orders", b"x") for _ in range(1000)]
    started = time.monotonic()
    with pytest.raises(DeliveryError, match="And 999 more failed"):
        kafka.close(timeout=1)
    assert 0.9 < time.monotonic() - started < 3
    for delivery in deliveries:
        with pytest.raises(DeliveryError):
            delivery.result(0)
    kafka.close()


def test_close_of_a_full_queue_settles_every_delivery_too() -> None:
    """P14: the reports of what was purged are served to the last one, however many there are."""
    kafka = AtLeastOnce(dead())
    deliveries = [kafka.produce("orders", b"") for _ in range(20_000)]
    with pytest.raises(DeliveryError, match="And 19999 more failed"):
        kafka.close(timeout=0)
    assert all(delivery.done for delivery in deliveries)


def test_what_is_given_up_is_not_waited_for_with_the_gil() -> None:
    """P14: purge(blocking=False) waits while a thread of librdkafka looks up a name, and no thread of Python runs meanwhile."""
    kafka = AtMostOnce(dead())
    kafka.produce("orders", b"x")
    assert kafka._producer is not None
    raw, asked = kafka._producer.raw, list[dict[str, bool]]()

    class Purges:
        def purge(self, **how: bool) -> None:
            asked.append(how)
            raw.purge(**how)

        def __getattr__(self, name: str) -> Any:
            return getattr(raw, name)

        def __len__(self) -> int:
            return len(raw)

    kafka._producer.raw = Purges()
    kafka.close(0)
    assert asked == [{"in_queue": True, "in_flight": True, "blocking": True}]


def test_at_most_once_says_what_was_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    """At most once may lose, but not in silence: flush() returns the number, close() logs it, in time."""
    kafka = AtMostOnce(dead())
    for _ in range(5):
        kafka.produce("orders", b"x")
    assert kafka.flush(0.3) == 5
    started = time.monotonic()
    kafka.close(timeout=1)
    assert time.monotonic() - started < 3
    assert "5 records were not sent" in caplog.text


def test_closing_the_c_producer_waits_for_nobody() -> None:
    """X20: it is let go on a thread that ends, so twenty of them leave no thread behind."""
    before = threading.active_count()
    for _ in range(20):
        kafka = AtMostOnce(dead(log_level=0))
        kafka.produce("orders", b"x")
        kafka.close(0)
    assert becomes_true(lambda: threading.active_count() <= before)


def waiting_events(raw: Any) -> Callable[[], bool]:
    return lambda: len(raw) > 1


# --- P04: a client that is forgotten -------------------------------------------------------------------------------------


def test_a_forgotten_client_with_records_warns_that_they_are_lost() -> None:
    """P04: librdkafka drops the queue of a producer that is destroyed, without a word; we do not."""
    kafka: list[AtLeastOnce] = [AtLeastOnce(dead())]
    for _ in range(100):
        kafka[0].produce("orders", b"x")
    found = warned(kafka.clear)
    assert [kind for kind, _ in found] == [DurabilityWarning]
    assert "an at-least-once client was not closed, with 100 records that nobody has acknowledged" in found[0][1]


def test_the_warning_counts_records_only() -> None:
    """P04: the number is that of the records, whatever else waits in librdkafka's queue. And which client it is is said."""
    kafka: list[AtMostOnce] = [AtMostOnce(dead(**{"client.id": "offers"}))]
    kafka[0].produce("orders", b"x")
    producer = kafka[0]._producer
    assert producer is not None
    assert becomes_true(waiting_events(producer.raw)), "no event came"
    del producer
    assert "an at-most-once client (offers) was not closed, with 1 record that" in warned(kafka.clear)[0][1]


def test_a_forgotten_client_without_records_is_a_resource_warning(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """P04, Y10: nothing is lost, and yet it should have been closed."""
    topic = kafka_topic(1)
    forgotten: list[AtLeastOnce] = [AtLeastOnce({"bootstrap.servers": kafka.bootstrap})]
    forgotten[0].produce(topic, b"x").result(DEADLINE)
    assert warned(forgotten.clear) == [(ResourceWarning, "an at-least-once client was not closed. Use `with`, or close().")]


@pytest.mark.parametrize("make", [AtMostOnce, AtLeastOnce])
def test_a_closed_client_warns_of_nothing(make: type[AtMostOnce | AtLeastOnce]) -> None:
    """Neither does one that never connected."""
    used: list[AtMostOnce | AtLeastOnce] = [make(dead())]
    with pytest.raises(TypeError):
        used[0].produce("orders", 5)
    used[0].close(0)
    assert warned(used.clear) == []
    unused: list[AtMostOnce | AtLeastOnce] = [make(dead())]
    assert warned(unused.clear) == []


@pytest.mark.broker
def test_a_forgotten_exactly_once_client_is_a_resource_warning(kafka: RunningKafka, fresh: Callable[[str], str]) -> None:
    """P04: the rule is the same for all three classes."""
    forgotten: list[ExactlyOnce] = [ExactlyOnce({"bootstrap.servers": kafka.bootstrap, "transactional.id": fresh("eos")})]
    with forgotten[0].transaction():
        pass
    assert [kind for kind, _ in warned(forgotten.clear)] == [ResourceWarning]


def test_a_process_that_ends_without_close_says_so() -> None:
    """P04: also at the end of the interpreter, on stderr."""
    script = """
        from kafka_guarantees import AtLeastOnce
        kafka = AtLeastOnce({"bootstrap.servers": "127.0.0.1:1", "log_level": 0})
        for _ in range(100):
            kafka.produce("orders", b"x")
        """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0
    assert "DurabilityWarning: an at-least-once client was not closed" in done.stderr


def test_the_thread_of_a_forgotten_client_ends(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """Y12: the thread that serves an idle client lives no longer than the client."""
    topic = kafka_topic(1)
    before = set(threading.enumerate())
    forgotten: list[AtLeastOnce] = [AtLeastOnce({"bootstrap.servers": kafka.bootstrap})]
    forgotten[0].produce(topic, b"x").result(DEADLINE)
    producer = forgotten[0]._producer
    assert producer is not None
    served = producer._served
    (thread,) = [one for one in threading.enumerate() if one not in before and one.name == "kafka-guarantees-serve"]
    # it has looked at the client at least once when half a second has passed twice
    assert becomes_true(lambda: time.monotonic() - served > 1.2)
    del producer
    warned(forgotten.clear)
    thread.join(2)
    assert not thread.is_alive()


@pytest.mark.broker
def test_an_idle_client_is_served(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """Y12: a delivery becomes known within a second or two, although nobody calls the client."""
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "linger.ms": 1}) as producer:
        delivery = producer.produce(kafka_topic(1), b"x")
        assert becomes_true(lambda: delivery.done, 5)
        assert delivery.offset == 0


# --- P10: a full queue ---------------------------------------------------------------------------------------------------


def test_a_full_queue_is_waited_for_as_long_as_a_record_may_take() -> None:
    """P10: never a BufferError, never an endless wait: within delivery.timeout.ms the fourth of three is failed, or taken."""
    with AtLeastOnce(dead(queue__buffering__max__messages=3, delivery__timeout__ms=1000, linger__ms=1)) as kafka:
        taken = [kafka.produce("orders", b"x") for _ in range(3)]
        started = time.monotonic()
        fourth = kafka.produce("orders", b"x")
        assert 0.3 < time.monotonic() - started < 4
        for delivery in taken:
            with pytest.raises(DeliveryUnknown):
                delivery.result(5)
        with pytest.raises((DeliveryError, DeliveryUnknown)):
            fourth.result(5)
        producer = kafka._producer
        assert producer is not None
        assert producer._patient(0.99)
        assert not producer._patient(1.0)


def test_at_most_once_raises_where_the_queue_stays_full() -> None:
    """P10: and what it raises is DeliveryError: this record was certainly not sent."""
    with AtMostOnce(dead(queue__buffering__max__messages=3, delivery__timeout__ms=60_000)) as kafka:
        for _ in range(3):
            kafka.produce("orders", b"x")
        # patience is a setting of a minute at least here: a stop of the run that produces ends it earlier
        with kafka._lifecycle.running(lambda: None):
            kafka.stop()
            assert becomes_true(lambda: kafka._lifecycle.out_of_patience, 10)
            with pytest.raises(DeliveryError, match="the producer's queue stayed full"):
                kafka.produce("orders", b"x")
        kafka.close(0)


@contextmanager
def forwarder(port: int, target: str) -> Iterator[None]:
    """Connections to a local port go to ``target`` while the block runs."""
    host, _, number = target.partition(":")
    end = threading.Event()

    def pump(near: socket.socket) -> None:
        with closing(near), closing(socket.create_connection((host, int(number)))) as far, selectors.DefaultSelector() as ready:
            ready.register(near, selectors.EVENT_READ, far)
            ready.register(far, selectors.EVENT_READ, near)
            while not end.is_set():
                for key, _ in ready.select(0.1):
                    data = cast("socket.socket", key.fileobj).recv(65536)
                    if not data:
                        return
                    key.data.sendall(data)

    threads: list[threading.Thread] = []

    def accept(server: socket.socket) -> None:
        while not end.is_set():
            try:
                near, _ = server.accept()
            except TimeoutError:
                continue
            near.settimeout(None)
            threads.append(threading.Thread(target=pump, args=(near,)))
            threads[-1].start()

    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(0.1)
        threads.append(threading.Thread(target=accept, args=(server,)))
        threads[0].start()
        try:
            yield
        finally:
            end.set()
            for thread in threads:
                thread.join(5)


@pytest.mark.broker
def test_nothing_is_lost_or_doubled_when_the_brokers_come_back(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """P10: ten records through a queue of three, while no broker answers; once one does, each is there once, in order."""
    topic = kafka_topic(1)
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    config: dict[str, object] = {
        "bootstrap.servers": f"127.0.0.1:{port}",
        "queue.buffering.max.messages": 3,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 200,
        "linger.ms": 1,
    }
    with AtLeastOnce(config) as producer:
        produced: list[int] = []

        def work() -> None:
            for number in range(10):
                producer.produce(topic, str(number))
                produced.append(number)

        thread = threading.Thread(target=work)
        thread.start()
        assert becomes_true(lambda: len(produced) == 3)
        thread.join(0.5)
        assert thread.is_alive(), "a queue of three took a fourth"
        with forwarder(port, kafka.bootstrap.split(",")[0]):
            thread.join(DEADLINE)
            assert not thread.is_alive()
            producer.flush(DEADLINE)
    assert [message.value() for message in arrived(kafka.bootstrap, topic, 10)] == [b"%d" % number for number in range(10)]


# --- P12, X04: callbacks that raise --------------------------------------------------------------------------------------


@pytest.mark.broker
@pytest.mark.parametrize("make", [AtMostOnce, AtLeastOnce])
def test_a_raising_callback_does_not_disturb_a_flush(
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    make: type[AtMostOnce | AtLeastOnce],
) -> None:
    """P12: it is logged; the flush reports what became of the records, and nothing else."""
    topic = made_ready(kafka.bootstrap, kafka_topic(1))

    def fails(_statistics: str) -> None:
        raise ValueError("of the user")

    with make({"bootstrap.servers": kafka.bootstrap, "statistics.interval.ms": 10, "stats_cb": fails}) as producer:
        for number in range(20):
            producer.produce(topic, str(number))
            producer.flush(DEADLINE)
        assert becomes_true(lambda: producer.flush(0.1) in (None, 0) and "of the user" in caplog.text)
    assert "stats_cb raised" in caplog.text
    assert len(arrived(kafka.bootstrap, topic, 20)) == 20


@pytest.mark.broker
def test_an_interrupt_in_a_callback_comes_out_of_the_flush(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """P12: Ctrl-C in a callback is not swallowed; the records are delivered all the same."""
    topic = kafka_topic(1)
    once = iter([KeyboardInterrupt])

    def interrupted(_statistics: str) -> None:
        for kind in once:
            raise kind

    config = {"bootstrap.servers": kafka.bootstrap, "statistics.interval.ms": 10, "stats_cb": interrupted}
    with AtLeastOnce(config) as producer:

        def flush_until_it_comes() -> None:
            deadline = time.monotonic() + DEADLINE
            while time.monotonic() < deadline:
                producer.flush(0.2)

        producer.produce(topic, b"x")
        with pytest.raises(KeyboardInterrupt):
            flush_until_it_comes()
        producer.flush(DEADLINE)
    assert len(arrived(kafka.bootstrap, topic, 1)) == 1


class Wrapped:
    """A C producer whose commit is followed by something else, inside the same call."""

    def __init__(self, raw: Any, then: Callable[[], None]) -> None:
        self._raw = raw
        self._then: list[Callable[[], None]] = [then]

    def commit_transaction(self, *arguments: Any) -> None:
        self._raw.commit_transaction(*arguments)
        if self._then:
            self._then.pop()()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


@pytest.mark.broker
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_raising_callback_does_not_hide_that_a_transaction_was_committed(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], kind: type[BaseException]
) -> None:
    """X04: what a callback raises during the commit is logged, or raised after it; the transaction is there once."""
    topic = kafka_topic(1)

    def fails(_statistics: str) -> None:
        raise kind("of the user")

    interrupts = 0
    with ExactlyOnce({"bootstrap.servers": kafka.bootstrap, "transactional.id": fresh("x04")}) as producer:
        inside = producer._producer
        inside.prepare()
        inside.raw = Wrapped(inside.raw, lambda: inside._callbacks.shim("stats_cb", fails)("{}"))
        for value in (b"1", b"2"):
            try:
                with producer.transaction() as tx:
                    tx.produce(topic, value)
            except (KeyboardInterrupt, SystemExit):
                interrupts += 1
    assert interrupts == (kind is not ValueError)
    assert [message.value() for message in arrived(kafka.bootstrap, topic, 2)] == [b"1", b"2"]


@pytest.mark.broker
def test_an_interrupt_before_a_commit_loses_no_message(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """X13: signals are left to the caller of transactions(): one who catches Ctrl-C and goes on gets the messages again."""
    source, target, name = kafka_topic(1), kafka_topic(1), fresh("x13")
    config: dict[str, object] = {"bootstrap.servers": kafka.bootstrap, "transactional.id": name, "group.id": name}
    with ExactlyOnce(config) as client:
        with client.transaction() as tx:
            for number in range(3):
                tx.produce(source, str(number))
        send_offsets = client._producer.send_offsets
        once = iter([KeyboardInterrupt])

        def interrupted(*arguments: Any) -> None:
            for kind in once:
                raise kind
            send_offsets(*arguments)

        monkeypatch.setattr(client._producer, "send_offsets", interrupted)
        for tx in client.transactions([source], max_batch=1, until_idle=1):
            try:
                with tx:
                    for message in tx.messages:
                        tx.produce(target, message.value())
            except KeyboardInterrupt:
                continue
    assert sorted(message.value() or b"" for message in arrived(kafka.bootstrap, target, 2)) == [b"0", b"1", b"2"]


@pytest.mark.broker
def test_a_swallowed_failure_in_a_transaction_aborts_it(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """X05: librdkafka would commit the rest. The block cannot end well once a record was refused."""
    topic = kafka_topic(1)
    with ExactlyOnce({"bootstrap.servers": kafka.bootstrap, "transactional.id": fresh("x05")}) as producer:

        def swallow(value: Any) -> None:
            with producer.transaction() as tx:
                tx.produce(topic, b"before")
                with pytest.raises((DeliveryError, TypeError)):
                    tx.produce(topic, value)

        for value in (TOO_LARGE, 5):
            with pytest.raises(TransactionAborted, match="nothing of the transaction is visible"):
                swallow(value)
        with producer.transaction() as tx:
            tx.produce(topic, b"after")
    assert [message.value() for message in arrived(kafka.bootstrap, topic, 1)] == [b"after"]


# --- P18: partitions -------------------------------------------------------------------------------------------------------


def java_murmur2(data: bytes) -> int:
    """org.apache.kafka.common.utils.Utils.murmur2, as a signed int, written down from the Java source."""
    mask, multiplier = 0xFFFFFFFF, 0x5BD1E995
    digest = (0x9747B28C ^ len(data)) & mask
    whole = len(data) // 4 * 4
    for at in range(0, whole, 4):
        word = int.from_bytes(data[at : at + 4], "little") * multiplier & mask
        word = (word ^ word >> 24) * multiplier & mask
        digest = (digest * multiplier & mask) ^ word
    if data[whole:]:
        digest = (digest ^ int.from_bytes(data[whole:], "little")) * multiplier & mask
    digest = (digest ^ digest >> 13) * multiplier & mask
    digest ^= digest >> 15
    return digest - (1 << 32) if digest >> 31 else digest


def java_partition(key: bytes, partitions: int) -> int:
    """Where Java's default partitioner puts a key."""
    return (java_murmur2(key) & 0x7FFFFFFF) % partitions


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_the_reference_hash_gives_the_vectors_of_kafkas_own_test(key: bytes, expected: int) -> None:
    """P18: Kafka's UtilsTest.testMurmur2; so the comparison below is with Java, not with librdkafka itself."""
    assert java_murmur2(key) == expected


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(1, 100))
def test_librdkafka_hashes_as_java_does(key: bytes, partitions: int) -> None:
    """P18: for every key and number of partitions."""
    from confluent_kafka import murmur2  # noqa: PLC0415 - used here only

    assert murmur2(key, partitions) == java_partition(key, partitions)


@pytest.mark.broker
@pytest.mark.parametrize("make", [AtMostOnce, AtLeastOnce])
def test_a_key_goes_to_the_partition_where_java_puts_it(
    kafka: RunningKafka, kafka_topic: Callable[..., str], make: type[AtMostOnce | AtLeastOnce]
) -> None:
    """P18: one key, one partition, in a fleet of Java and Python clients; and an explicit partition wins over the key."""
    topic = made_ready(kafka.bootstrap, kafka_topic(7), 7)
    keys = [f"key-{number}".encode() for number in range(60)] + ["ü\0".encode(), b"\0"]
    with make({"bootstrap.servers": kafka.bootstrap}) as producer:
        for key in keys:
            producer.produce(topic, b"by key", key)
        producer.produce(topic, b"explicit", b"key-0", partition=(java_partition(b"key-0", 7) + 1) % 7)
        producer.flush(DEADLINE)
    found = arrived(kafka.bootstrap, topic, len(keys) + 1, partitions=7)
    places = {message.key(): message.partition() for message in found if message.value() == b"by key"}
    assert places == {key: java_partition(key, 7) for key in keys}
    explicit = [message.partition() for message in found if message.value() == b"explicit"]
    assert explicit == [(java_partition(b"key-0", 7) + 1) % 7]


# --- message ids, and the semantics of produce -------------------------------------------------------------------------------


@pytest.mark.broker
def test_a_message_id_is_a_header_beside_the_others(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """D06: the id goes through every retry; what the caller gave as headers is neither lost nor changed."""
    topic = kafka_topic(1)
    mine: dict[str, Any] = {"a": b"1"}
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap}) as producer:
        producer.produce(topic, b"1", message_id="id-1")
        producer.produce(topic, b"2", headers=mine, message_id=b"id-2")
        producer.produce(topic, b"3", headers=[("a", "1"), ("a", "2")], message_id="id\0-3")
        producer.produce(topic, b"4", headers=mine)
        producer.flush(DEADLINE)
    assert mine == {"a": b"1"}
    assert [message.headers() for message in arrived(kafka.bootstrap, topic, 4)] == [
        [("message-id", b"id-1")],
        [("a", b"1"), ("message-id", b"id-2")],
        [("a", b"1"), ("a", b"2"), ("message-id", b"id\0-3")],
        [("a", b"1")],
    ]


@pytest.mark.broker
def test_at_least_once_tells_where_a_record_went(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """The delivery has the partition and the offset, once it is acknowledged."""
    topic = kafka_topic(3)
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap}) as producer:
        first = producer.produce(topic, b"1", partition=2).result(DEADLINE)
        second = producer.produce(topic, b"2", partition=2).result(DEADLINE)
    assert (first.topic, first.partition, first.offset) == (topic, 2, 0)
    assert (second.partition, second.offset) == (2, 1)


@pytest.mark.broker
@pytest.mark.parametrize("make", [AtMostOnce, AtLeastOnce])
def test_threads_that_produce_first_have_one_producer(
    make: type[AtMostOnce | AtLeastOnce],
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of them would make its own, and nobody would wait for what the others took."""
    made: list[PlainProducer] = []
    init = PlainProducer.__init__

    def counted(self: PlainProducer, *given: Any) -> None:
        made.append(self)
        init(self, *given)

    monkeypatch.setattr(PlainProducer, "__init__", counted)
    topic = kafka_topic()
    begin = threading.Barrier(8)

    def produce(number: int) -> None:
        begin.wait()
        client.produce(topic, b"%d" % number)

    with make({"bootstrap.servers": kafka.bootstrap}) as client, ThreadPoolExecutor(8) as pool:
        for one in [pool.submit(produce, number) for number in range(8)]:
            one.result()
        client.flush()
        assert len(arrived(kafka.bootstrap, topic, 8)) == 8
    assert len(made) == 1


@pytest.mark.parametrize("make", [AtMostOnce, AtLeastOnce])
def test_a_client_that_is_closed_while_a_thread_produces_first(
    make: type[AtMostOnce | AtLeastOnce], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The producer that is being made is closed as well: no record is queued where nobody would flush it, and say so."""
    making, go_on = threading.Event(), threading.Event()
    init = PlainProducer.__init__
    made: list[PlainProducer] = []

    def slow(self: PlainProducer, *given: Any) -> None:
        making.set()
        go_on.wait(DEADLINE)
        made.append(self)
        init(self, *given)

    monkeypatch.setattr(PlainProducer, "__init__", slow)
    client = make(dead(log_level=0))
    with ThreadPoolExecutor(2) as pool:
        produced = pool.submit(client.produce, "t", b"x")
        assert making.wait(DEADLINE)
        closed = pool.submit(client.close, 0.2)
        time.sleep(0.1)
        go_on.set()
        with suppress(KafkaGuaranteesError):
            closed.result(DEADLINE)
        with suppress(KafkaGuaranteesError):
            delivery = produced.result(DEADLINE)
            assert delivery is None or delivery.done
    assert [producer.raw for producer in made] == [None]
    with pytest.raises(KafkaGuaranteesError, match="closed"):
        client.produce("t", b"x")


FROM_A_SIGNAL_HANDLER = """
import os, signal, sys, threading, time
from kafka_guarantees import AtLeastOnce, KafkaGuaranteesError

refused = 0

def handler(*_):
    global refused
    try:
        kafka.flush(1)
        kafka.produce(sys.argv[2], b"x").result(5)
    except KafkaGuaranteesError as error:
        assert "call stop()" in str(error), error
        refused += 1

def disturb():
    while time.monotonic() < until:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.003)

with AtLeastOnce({"bootstrap.servers": sys.argv[1]}) as kafka:
    kafka.produce(sys.argv[2], b"x").result(20)
    signal.signal(signal.SIGUSR1, handler)
    until = time.monotonic() + 30
    threading.Thread(target=disturb, daemon=True).start()
    while time.monotonic() < until:
        kafka.produce(sys.argv[2], b"x")
        if refused >= 20:
            until = 0
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
print("refused" if refused else "never in the middle of it", flush=True)
"""


@pytest.mark.broker
def test_waiting_in_a_signal_handler_does_not_abort_the_process(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """It may have come in the middle of a report: then it is refused, and where it has not, it waits."""
    command = [sys.executable, "-c", FROM_A_SIGNAL_HANDLER, kafka.bootstrap, kafka_topic(partitions=4)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "refused"), done.stderr


@pytest.mark.broker
def test_a_record_that_somebody_waits_for_does_not_linger(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """``result()`` sends it at once, also for a thread whose report another one is served."""
    topic = kafka_topic(partitions=8)
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "linger.ms": 60_000}) as client, ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(lambda: client.produce(topic, b"x").result(20)) for _ in range(64)]
        assert len({(one.result().partition, one.result().offset) for one in waiting}) == 64


@pytest.mark.broker
def test_an_idempotent_producer_has_asked_for_its_id_before_the_first_record(
    kafka: RunningKafka, kafka_topic: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """The connection to a bootstrap address is closed once the broker is known: librdkafka would ask half a second later."""
    topic = kafka_topic()
    caplog.set_level(logging.DEBUG, logger="kafka_guarantees")
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap}) as client:
        client.produce(topic, b"x").result(20)  # from here on the broker can give ids
    for _ in range(40):
        caplog.clear()
        with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "debug": "eos"}) as client:
            producer = client._made(topic)
            producer.serve()
            assert "Acquiring ProducerId" in caplog.text


def test_a_report_that_was_lost_is_waited_for_asleep() -> None:
    """With nothing in its queue librdkafka's flush() does not wait at all."""
    with AtLeastOnce(dead()) as client:
        producer = client._made("t")
        looks: list[float] = []
        serve = producer._hasten
        producer._hasten = lambda *given: looks.append(0) or serve(*given)  # type: ignore[func-returns-value,method-assign]
        with pytest.raises(TimeoutError):
            Delivery("t", producer).result(0.5)
    assert 0 < len(looks) < 1000


IN_A_CALLBACK = """
import os, time
from kafka_guarantees import AtLeastOnce, KafkaGuaranteesError

def stats(_):
    for name, call in calls.items():
        try:
            call()
        except KafkaGuaranteesError as error:
            said.setdefault(name, str(error))
    rounds.append(None)

said, rounds = {}, []
kafka = AtLeastOnce({"bootstrap.servers": "127.0.0.1:1", "statistics.interval.ms": 50, "stats_cb": stats, "log_level": 0})
calls = {
    "result": lambda: kafka.produce("t", b"x").result(1),
    "flush": lambda: kafka.flush(1),
    "produce": lambda: [kafka.produce("t", b"x") for _ in range(1000)] + [kafka.produce("new", b"x", partition=0)],
    "close": lambda: kafka.close(1),
}
first = kafka.produce("t", b"x")
while len(said) < 3 or len(rounds) < 30:  # the process is aborted in a later callback
    time.sleep(0.05)
for name, text in sorted(said.items()):
    print(name, "was called in a callback" in text, flush=True)
os._exit(0)
"""


def test_waiting_in_a_callback_is_refused() -> None:
    """Librdkafka's Python binding ends the process where a client is served in its own callback. Producing there is fine."""
    command = [sys.executable, "-c", IN_A_CALLBACK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["close", "True", "flush", "True", "result", "True"]), done.stderr


@pytest.mark.broker
def test_at_most_once_sends_and_does_not_look_back(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """P07: nothing is returned, since nothing is known; what is certainly not sent is raised at once."""
    topic = made_ready(kafka.bootstrap, kafka_topic(1))
    with AtMostOnce({"bootstrap.servers": kafka.bootstrap}) as producer:
        assert cast("Callable[..., object]", producer.produce)(topic, b"sent") is None
        with pytest.raises(DeliveryError, match="MSG_SIZE_TOO_LARGE"):
            producer.produce(topic, TOO_LARGE)
        assert producer.flush(DEADLINE) == 0
    assert [message.value() for message in arrived(kafka.bootstrap, topic, 1)] == [b"sent"]


@pytest.mark.broker
def test_an_unknown_topic_is_an_error_and_is_not_created(kafka: RunningKafka, fresh: Callable[[str], str]) -> None:
    """P19: a typo makes no topic with one replica."""
    topic = fresh("typo")
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "topic.metadata.propagation.max.ms": 100}) as producer:
        with pytest.raises(DeliveryError, match=r"_UNKNOWN_TOPIC|UNKNOWN_TOPIC_OR_PART"):
            producer.produce(topic, b"x").result(DEADLINE)
        raw = cast("Any", producer._producer).raw
        assert topic not in raw.list_topics(timeout=10).topics


@pytest.mark.parametrize("make", [AtMostOnce, AtLeastOnce])
def test_a_closed_client_refuses_to_produce(make: type[AtMostOnce | AtLeastOnce]) -> None:
    """And says that nothing was sent."""
    kafka = make(dead())
    kafka.close()
    for call in (lambda: kafka.produce("orders", b"x"), lambda: kafka.flush(0)):
        with pytest.raises(KafkaGuaranteesError, match=r"is closed\. Nothing was sent"):
            cast("Callable[[], object]", call)()


def test_librdkafkas_log_goes_to_our_logger(caplog: pytest.LogCaptureFixture) -> None:
    """Not to stderr: an application decides what becomes of it."""
    with caplog.at_level(logging.DEBUG), AtMostOnce(dead()) as kafka:
        kafka.produce("orders", b"x")
        kafka.flush(0.3)
        kafka.close(0)
    assert {"kafka_guarantees", "kafka_guarantees.librdkafka"} <= {record.name for record in caplog.records}


def test_librdkafka_does_not_fill_the_log_while_brokers_are_down(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for each try to connect would be some ten in a second; what it is asked for by debug= is not left out."""
    line = "FAIL [{}] [thrd:{}/bootstrap]: {}/bootstrap: Connect failed: refused (after {}ms in state CONNECT)"
    now = [1000.0]
    clients = (("rdkafka#producer-1", "a1:9092"), ("my.app#consumer-17", "a1:9092"), ("rdkafka#producer-1", "a2:9092"))
    monkeypatch.setattr("kafka_guarantees._client.time", SimpleNamespace(monotonic=lambda: now[0]))
    with caplog.at_level(logging.DEBUG):
        for number in range(100):
            for client, broker in clients:
                librdkafka_log.error("%s", line.format(client, broker, broker, number))
            librdkafka_log.debug("the same")
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert said == [line.format("rdkafka#producer-1", broker, broker, 0) for broker in ("a1:9092", "a2:9092")]
        assert len(caplog.records) == 102
        now[0] += QUIET
        librdkafka_log.error("%s", line.format("rdkafka#consumer-1", "a1:9092", "a1:9092", 7))
    assert len(caplog.records) == 103


class Fatal:
    """A C producer that cannot go on. It says so of a record, and why only when its callbacks are served (P09)."""

    def produce(self, *_: object) -> None:
        raise KafkaException(KafkaError(KafkaError._FATAL, "Fatal error", fatal=True))

    def poll(self, _timeout: float) -> int:
        raise KafkaException(KafkaError(KafkaError.CLUSTER_AUTHORIZATION_FAILED, "no id", fatal=True))

    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize("way", ["deliver", "post"])
def test_a_record_that_a_fatal_error_refused_says_which(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """S07, P09: without the right to write a record the idempotent producer ends, and the error names the ACL all the same."""
    with AtLeastOnce({"bootstrap.servers": DEAD}) as kafka:
        producer = kafka._made("t")
        monkeypatch.setattr(producer, "raw", Fatal())
        if way == "deliver":
            with pytest.raises(DeliveryError, match="Grant WRITE"):
                producer.produce(Record("t", b"v", b"k")).result(0)
        else:
            with pytest.raises(DeliveryError, match="Grant WRITE"):
                producer.post(Record("t", b"v", b"k"))
        monkeypatch.undo()


def test_a_producer_that_cannot_go_on_is_not_held_against_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """P09: it would be set aside, and the log say that its handler failed; and the next message after it."""

    class Dead(Fatal):
        def poll(self, _timeout: float) -> int:
            raise KafkaException(KafkaError(KafkaError.INVALID_PRODUCER_EPOCH, "for the test", fatal=True))

    with AtLeastOnce({"bootstrap.servers": DEAD}, dead_letter="letters") as kafka:
        producer = kafka._made("t")
        monkeypatch.setattr(producer, "raw", Dead())
        kafka._send_all([Record("t", b"v", b"k")])
        assert [type(failure) for failure in producer.not_written] == [DeliveryError]
        producer.not_written.clear()
        monkeypatch.undo()


def test_a_producer_that_cannot_go_on_is_let_go_by_close(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P09: close() raises its fatal error, and leaves no C client behind that would be warned of when it is collected."""
    client = AtLeastOnce(dead())
    producer = client._made("t")

    def fatal(_give_up: object) -> int:
        raise BrokerError("producing failed")

    monkeypatch.setattr(producer, "drain", fatal)
    with pytest.raises(BrokerError, match="producing failed"):
        client.close(0.1)
    assert producer.raw is None
    client.close()
    del client, producer
    gc.collect()
    assert not [warning for warning in recwarn if "not closed" in str(warning.message)]


@pytest.mark.parametrize("kind", [AtMostOnce, AtLeastOnce, ExactlyOnce])
def test_an_error_of_close_does_not_hide_the_one_of_the_block(
    kind: type[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first error is the one that says what happened; that of close() is logged, or raised where there is no other."""
    config = dead() | ({"transactional.id": "t"} if kind is ExactlyOnce else {})

    def fails(self: Any, _timeout: float | None = None) -> None:
        raise BrokerError("closing failed")

    with monkeypatch.context() as patched:
        patched.setattr(kind, "close", fails)
        with pytest.raises(ZeroDivisionError), kind(config) as client:
            raise ZeroDivisionError
        assert "closing failed" in caplog.text
        with pytest.raises(BrokerError, match="closing failed"), kind(config) as other:
            pass
    client.close(0.1)
    other.close(0.1)
