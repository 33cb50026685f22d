"""A producer under asyncio: what is awaited, what is not waited for, and whose failure it is."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees import AtLeastOnce, AtMostOnce, BrokerError, Delivery, DeliveryError, DeliveryUnknown
from kafka_guarantees._awaited import Awaited

from .conftest import fill, read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable

    from kafka_guarantees.testing.local_kafka import RunningKafka

DEAD = {"bootstrap.servers": "127.0.0.1:1"}
FULL = {**DEAD, "queue.buffering.max.messages": 2}
TURNS = 5  # of an event loop, while it has deliveries to wait for


def settle(client: AtLeastOnce, delivery: Delivery) -> None:
    deadline = time.monotonic() + 10
    while not delivery.done and time.monotonic() < deadline:
        client._made("t").serve(0.05)
    assert delivery.done


def at_work(client: AtLeastOnce) -> bool:
    return client._made("t")._awaited._alive > 0


@pytest.mark.broker
def test_deliveries_are_awaited_together(
    kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand coroutines, each with its record: the loop turns meanwhile, one thread serves all, and it ends after them."""
    topic = kafka_topic(partitions=3)
    turns = 0
    begun = Counter[int]()
    work = Awaited._work

    def working(awaited: Awaited, wait: Any) -> None:
        begun[id(awaited)] += 1

        def wait_while_the_loop_turns(delivery: Delivery, timeout: float) -> None:
            deadline = time.monotonic() + 5
            while turns < TURNS and time.monotonic() < deadline:
                time.sleep(0.001)
            wait(delivery, timeout)

        work(awaited, wait_while_the_loop_turns)

    monkeypatch.setattr(Awaited, "_work", working)

    async def main(client: AtLeastOnce) -> list[Delivery]:
        async def send(number: int) -> Delivery:
            return await client.produce(topic, b"%d" % number, timeout=0)

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.001)

        turning = asyncio.create_task(turn())
        sent = await asyncio.gather(*map(send, range(1000)))
        turning.cancel()
        return sent

    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap}) as client:
        deliveries = asyncio.run(main(client))
        assert all(delivery.done and delivery.offset is not None for delivery in deliveries)
        assert turns >= TURNS, "the event loop was held up"
        assert list(begun.values()) == [1]
        assert asyncio.run(_again(client, topic)).done  # another loop, and the same thread
        assert list(begun.values()) == [1]
        deadline = time.monotonic() + 10
        while at_work(client) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not at_work(client)
        assert asyncio.run(_again(client, topic)).done
        assert list(begun.values()) == [2]
    assert (
        sorted(values(read_all(kafka.bootstrap, topic)), key=int) == [b"%d" % number for number in range(1000)] + [b"1000"] * 2
    )


async def _again(client: AtLeastOnce, topic: str) -> Delivery:
    return await client.produce(topic, b"1000")


def test_a_failure_is_raised_where_it_is_awaited() -> None:
    """And counts as looked at: neither the next produce() nor close() raises it."""

    async def main(client: AtLeastOnce) -> None:
        with pytest.raises((DeliveryError, DeliveryUnknown), match="MSG_TIMED_OUT"):
            await client.produce("t", b"x", timeout=0)
        client.produce("t", b"y", timeout=0)

    client = AtLeastOnce({**DEAD, "delivery.timeout.ms": 300})
    asyncio.run(main(client))
    with pytest.raises((DeliveryError, DeliveryUnknown), match="MSG_TIMED_OUT"):
        client.close(5)  # of the second


def test_what_was_raised_where_it_was_awaited_is_nobody_elses(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand fail together, while others produce: none counts as waited for in vain, and close() has nothing to say."""

    async def send(client: AtLeastOnce) -> str:
        try:
            await client.produce("t", b"x", timeout=0)
        except (DeliveryError, DeliveryUnknown) as error:
            return str(error)
        return "sent"

    async def main(client: AtLeastOnce) -> list[str]:
        sending = [asyncio.create_task(send(client)) for _ in range(1000)]
        await asyncio.wait([sending[0]])
        sending += [asyncio.create_task(send(client)) for _ in range(10)]  # before the others have been told
        return await asyncio.gather(*sending)

    client = AtLeastOnce({**DEAD, "delivery.timeout.ms": 300})
    assert all("MSG_TIMED_OUT" in said for said in asyncio.run(main(client)))
    assert "in vain" not in caplog.text
    client.close(5)


def test_a_failure_that_is_asked_for_again_is_told_once() -> None:
    """result() in vain, logged by the next produce(), raised by result() after all: flush() has nothing to add."""
    client = AtLeastOnce({**DEAD, "delivery.timeout.ms": 300})
    earlier = client.produce("t", b"A")
    with pytest.raises(TimeoutError):
        earlier.result(0.05)
    settle(client, earlier)
    later = client.produce("t", b"B")
    for delivery in (earlier, later):
        with pytest.raises(DeliveryUnknown):
            delivery.result()
    client.flush(0)
    client.close(1)


@pytest.mark.broker
def test_a_run_does_not_end_by_what_a_request_has_let_go_of(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """It was of no message of the run; flush() still raises it."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, [b"1", b"2"])
    small = {"bootstrap.servers": kafka.bootstrap, "group.id": topic}
    with AtLeastOnce(small, preflight="off") as client:
        producer = client._made(topic)
        failed = Delivery(topic, producer)
        failed._asked = True
        failed._fail(DeliveryUnknown("of a request"))
        producer.unacknowledged.add(failed)
        client.produce(topic, b"3").result()
        client.run([topic], lambda _message: time.sleep(1.1), until_idle=0.3)
        with pytest.raises(DeliveryUnknown, match="of a request"):
            client.flush()


@pytest.mark.broker
def test_what_is_acknowledged_makes_room_without_patience(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """Room is made where reports are served: produce(timeout=0) looks at those that have come."""
    topic = kafka_topic()
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "queue.buffering.max.messages": 100, "linger.ms": 0}) as client:
        client.produce(topic, b"first").result()
        for _ in range(100):
            client.produce(topic, b"x", timeout=0)
        deadline = time.monotonic() + 10
        while len(read_all(kafka.bootstrap, topic)) < 101:
            assert time.monotonic() < deadline
        client._made(topic)._served = time.monotonic() + 60  # nobody serves meanwhile
        client.produce(topic, b"x", timeout=0).result()
        client.produce(topic, b"y", partition=0, timeout=0).result()


def test_an_event_loop_is_not_held_up_where_the_queue_is_full() -> None:
    """timeout=0: the record has failed as not sent, at once. Without it produce() waits as long as a record may take."""

    async def main(client: AtLeastOnce) -> None:
        began = time.monotonic()
        for _ in range(2):
            client.produce("t", b"x", timeout=0)
        refused = client.produce("t", b"x", timeout=0)
        assert time.monotonic() - began < 0.5, "nor does the first one wait for brokers"
        with pytest.raises(DeliveryError, match="queue stayed full"):
            await refused

    client = AtLeastOnce(FULL)
    asyncio.run(main(client))
    began = time.monotonic()
    with pytest.raises(DeliveryError, match="queue stayed full"):
        client.produce("t", b"x", partition=0, timeout=0.3).result()
    assert 0.2 < time.monotonic() - began < 2
    with pytest.raises(DeliveryError, match="PURGE_QUEUE"):
        client.close(0.1)  # of the first two


def test_at_most_once_waits_for_a_full_queue_as_long_as_it_is_told() -> None:
    """The error says that the record was not sent."""
    client = AtMostOnce({**FULL, "delivery.timeout.ms": 60_000})
    for _ in range(2):
        client.produce("t", b"x", timeout=0)
    began = time.monotonic()
    with pytest.raises(DeliveryError, match="queue stayed full"):
        client.produce("t", b"x", timeout=0.3)
    assert 0.2 < time.monotonic() - began < 5
    client.close(0.1)


@pytest.mark.parametrize("how", ["result", "await"])
def test_a_request_does_not_pay_for_an_earlier_one(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Who has waited in vain knows. The record of the next one is sent; the failure is logged, and raised by flush()."""
    client = AtLeastOnce({**DEAD, "delivery.timeout.ms": 500})
    earlier = client.produce("t", b"A")
    if how == "result":
        with pytest.raises(TimeoutError):
            earlier.result(0.05)
    else:
        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(_wait_for(earlier, 0.05))
    settle(client, earlier)
    later = client.produce("t", b"B")
    assert "It had been waited for in vain" in caplog.text
    with pytest.raises(DeliveryUnknown, match="MSG_TIMED_OUT"):
        later.result()
    with pytest.raises(DeliveryUnknown, match="MSG_TIMED_OUT"):
        client.flush(0)
    client.flush(0)  # once
    forgotten = client.produce("t", b"C")
    settle(client, forgotten)
    with pytest.raises(DeliveryUnknown, match=r"That is of earlier calls; the record of this one, for topic 'u', was not"):
        client.produce("u", b"D")  # C was never asked about: that is told as before
    client.close(1)


async def _wait_for(delivery: Delivery, seconds: float) -> None:
    await asyncio.wait_for(delivery, seconds)


def acknowledge(delivery: Delivery) -> None:
    """What librdkafka does once a record is written."""
    delivery._outcome = 0, 0


class Server:
    """What a delivery needs of a producer, and no more."""

    failed = False
    patience = 30.0

    def __init__(self) -> None:
        self.unacknowledged: set[Delivery] = set()
        self._awaited = Awaited()
        self.waits = 0
        self.error: BaseException | None = None
        self.settle: Callable[[], object] = lambda: None

    def wait_for(self, _delivery: Delivery, timeout: float) -> None:
        self.waits += 1
        time.sleep(min(timeout, 0.005))
        self.settle()
        if self.error is not None:
            raise self.error

    def future_of(self, delivery: Delivery) -> asyncio.Future[None]:
        return self._awaited.future(delivery, self.patience, self.wait_for)

    def looked_at(self, delivery: Delivery) -> None:
        self.unacknowledged.discard(delivery)


def test_who_awaits_hears_that_nobody_serves_any_more() -> None:
    """The client was closed, or cannot go on: all who wait are told, and who comes later has another thread."""
    server = Server()
    server.error = BrokerError("the producer cannot go on")

    async def main() -> list[Any]:
        return await asyncio.gather(*(Delivery("t", server) for _ in range(3)), return_exceptions=True)

    for _ in range(2):
        assert [str(error) for error in asyncio.run(main())] == ["the producer cannot go on"] * 3


def test_a_report_that_never_comes_ends_the_wait() -> None:
    """P01: something destroyed it. That is said, after the time in which it must have come."""
    server = Server()
    server.patience = -1.9

    async def main() -> None:
        with pytest.raises(DeliveryUnknown, match="was lost"):
            await Delivery("t", server)

    asyncio.run(main())


def test_a_loop_that_is_gone_harms_nobody() -> None:
    """Its deliveries are let go of, and those of others are told."""
    server = Server()
    gone, other = Delivery("t", server), Delivery("t", server)

    async def abandon() -> None:
        task = asyncio.ensure_future(_wait_for(gone, 60))
        await asyncio.sleep(0.02)
        task.cancel()

    asyncio.run(abandon())

    async def main() -> None:
        server.settle = lambda: acknowledge(other)
        await other

    asyncio.run(main())
    assert gone.asked
    assert not gone.done


def test_a_delivery_that_is_done_needs_no_event_loop() -> None:
    """It answers at once."""
    server = Server()
    delivery = Delivery("t", server)
    acknowledge(delivery)
    with pytest.raises(StopIteration) as answer:
        next(iter(delivery.__await__()))
    assert answer.value.value is delivery
    assert not server.waits


def test_who_is_done_meanwhile_hears_nothing_of_an_error() -> None:
    """The client was closed between two looks, and its last report had come: the record is acknowledged."""
    server = Server()
    server.error = BrokerError("closed")
    delivery = Delivery("t", server)
    server.settle = lambda: acknowledge(delivery)

    async def main() -> Delivery:
        return await delivery

    assert asyncio.run(main()) is delivery


def test_a_system_without_threads_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who awaits is told, and so are others that came meanwhile; later it works again."""
    server = Server()

    def none_left(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        with pytest.raises(RuntimeError, match="new thread"):
            await Delivery("t", server)

    with monkeypatch.context() as patched:
        patched.setattr("kafka_guarantees._awaited._thread.start_new_thread", none_left)
        asyncio.run(main())
    delivery = Delivery("t", server)
    server.settle = lambda: acknowledge(delivery)
    asyncio.run(_wait_for(delivery, 10))


def test_a_thread_that_is_gone_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Y03: an exception out of a signal handler came before it had begun. Who awaits next begins another, for all."""
    server = Server()
    monkeypatch.setattr("kafka_guarantees._awaited.SILENT", 0.2)
    one, two = Delivery("t", server), Delivery("t", server)

    async def main() -> None:
        with monkeypatch.context() as patched:
            patched.setattr("kafka_guarantees._awaited._thread.start_new_thread", lambda *_: 0)
            first = asyncio.ensure_future(_wait_for(one, 10))
            await asyncio.sleep(0.3)

        def settle_both() -> None:
            acknowledge(one)
            acknowledge(two)

        server.settle = settle_both
        await asyncio.gather(first, _wait_for(two, 10))

    asyncio.run(main())
