"""A producer under asyncio: what is awaited, what is not waited for, and whose failure it is."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees import AtLeastOnce, AtMostOnce, BrokerError, Delivery, DeliveryError, DeliveryUnknown
from kafka_guarantees._awaited import Awaited

from .conftest import read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable

    from kafka_guarantees.testing.local_kafka import RunningKafka

DEAD = {"bootstrap.servers": "127.0.0.1:1"}
FULL = {**DEAD, "queue.buffering.max.messages": 2}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kafka-guarantees-await"]


@pytest.mark.broker
def test_deliveries_are_awaited_together(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """A thousand coroutines, each with its record: the loop turns meanwhile, one thread serves all, and it ends with them."""
    topic = kafka_topic(partitions=3)
    turns = 0
    most = 0

    async def main(client: AtLeastOnce) -> list[Delivery]:
        async def send(number: int) -> Delivery:
            return await client.produce(topic, b"%d" % number, timeout=0)

        async def turn() -> None:
            nonlocal turns, most
            while True:
                turns += 1
                most = max(most, len(threads()))
                await asyncio.sleep(0.001)

        turning = asyncio.create_task(turn())
        sent = await asyncio.gather(*map(send, range(1000)))
        turning.cancel()
        return sent

    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap}) as client:
        deliveries = asyncio.run(main(client))
        assert all(delivery.done and delivery.offset is not None for delivery in deliveries)
        assert turns > 3
        assert most == 1
        deadline = time.monotonic() + 5
        while threads() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not threads()
        assert asyncio.run(_again(client, topic)).done  # another loop, and another thread
    assert sorted(values(read_all(kafka.bootstrap, topic)), key=int) == [b"%d" % number for number in range(1001)]


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
    deadline = time.monotonic() + 10
    while not earlier.done and time.monotonic() < deadline:
        client._made("t").serve(0.05)
    assert earlier.done
    later = client.produce("t", b"B")
    assert "It had been waited for in vain" in caplog.text
    with pytest.raises(DeliveryUnknown, match="MSG_TIMED_OUT"):
        later.result()
    with pytest.raises(DeliveryUnknown, match="MSG_TIMED_OUT"):
        client.flush(0)
    client.flush(0)  # once
    forgotten = client.produce("t", b"C")
    while not forgotten.done and time.monotonic() < deadline + 10:
        client._made("t").serve(0.05)
    with pytest.raises(DeliveryUnknown, match="This record was not sent"):
        client.produce("t", b"D")  # C was never asked about: that is told as before
    client.close(1)


async def _wait_for(delivery: Delivery, seconds: float) -> None:
    await asyncio.wait_for(delivery, seconds)


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
        server.settle = lambda: setattr(other, "done", True)
        await other

    asyncio.run(main())
    assert gone.asked
    assert not gone.done


def test_a_delivery_that_is_done_needs_no_event_loop() -> None:
    """It answers at once."""
    server = Server()
    delivery = Delivery("t", server)
    delivery.done = True
    with pytest.raises(StopIteration) as answer:
        next(iter(delivery.__await__()))
    assert answer.value.value is delivery
    assert not server.waits
