"""P13: what librdkafka takes for written because a later record was. On a real broker, behind a proxy that answers once for it.

A partition gets a new leader, or is made, while a producer sends its first records to it: the first request is answered with
"not the leader", and the one after it is taken, since a broker that has nothing of a producer takes any sequence number.
"""

from __future__ import annotations

import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees import AtLeastOnce, DeliveryUnknown, ExactlyOnce, Record, TransactionAborted

from .conftest import fill, read_all, values
from .kafka_wire import Held, Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kafka_guarantees.testing.local_kafka import RunningKafka

pytestmark = pytest.mark.broker

PRODUCE, NOT_LEADER = 0, 6
DEADLINE = 20.0  # seconds


def not_leader(topic: str) -> bytes:
    """An answer to Produce, of version 9 or 10, for partition 0."""
    name = bytes([len(topic) + 1]) + topic.encode()
    partition = struct.pack(">ihqqq", 0, NOT_LEADER, -1, -1, -1) + b"\1\0\0"
    return b"\0\2" + name + b"\2" + partition + b"\0" + struct.pack(">i", 0) + b"\0"


def refuse_first(proxy: Proxy, topic: str) -> threading.Event:
    """Have the next Produce answered as by a broker that is not the leader, once another one is on its way.

    Returns what is set as soon as the next one has come.
    """
    came = threading.Event()

    def keep(first: Held) -> None:
        def pass_on(second: Held) -> None:
            first.answer(not_leader(topic))
            second.send()

        proxy.hold_next(PRODUCE, pass_on)
        came.set()

    proxy.hold_next(PRODUCE, keep)
    return came


@pytest.fixture
def proxy(kafka: RunningKafka) -> Iterator[Proxy]:
    with Proxy(kafka.bootstrap) as proxy:
        yield proxy


def config(proxy: Proxy, topic: str) -> dict[str, Any]:
    return {"bootstrap.servers": proxy.bootstrap, "linger.ms": 0, "group.id": topic}


def test_a_record_that_is_taken_for_written_is_not_acknowledged(
    kafka: RunningKafka, proxy: Proxy, kafka_topic: Callable[..., str]
) -> None:
    """A success was reported of a record that is nowhere. Who asks is told that it may not be there."""
    topic = kafka_topic()
    with AtLeastOnce(config(proxy, topic)) as client:
        came = refuse_first(proxy, topic)
        first = client.produce(topic, b"1")
        assert came.wait(DEADLINE)
        client.produce(topic, b"2").result(DEADLINE)
        with pytest.raises(DeliveryUnknown, match="no broker has said where this one is"):
            first.result(DEADLINE)
    assert values(read_all(kafka.bootstrap, topic)) == [b"2"], "then this test shows nothing"


def test_no_offset_is_committed_for_an_output_that_is_taken_for_written(
    kafka: RunningKafka, proxy: Proxy, kafka_topic: Callable[..., str]
) -> None:
    """The message that it was made of is handled again."""
    source, topic = kafka_topic(), kafka_topic()
    fill(kafka.bootstrap, source, [b"1", b"2"])
    came = refuse_first(proxy, topic)

    def handler(message: Any) -> Record:
        if message.value() == b"2":
            assert came.wait(DEADLINE)
        return Record(topic, message.value())

    with AtLeastOnce(config(proxy, topic)) as client, suppress(DeliveryUnknown):
        client.run([source], handler, until_idle=1)
    with AtLeastOnce(config(proxy, topic)) as client:
        client.run([source], handler, until_idle=1)
    assert set(values(read_all(kafka.bootstrap, topic))) == {b"1", b"2"}


def test_a_transaction_is_not_committed_without_a_record_of_it(
    kafka: RunningKafka, proxy: Proxy, kafka_topic: Callable[..., str]
) -> None:
    """It was, with a record that no broker has. It is aborted, and can be tried again."""
    topic = kafka_topic()
    with ExactlyOnce({**config(proxy, topic), "transactional.id": topic}) as client:
        came = refuse_first(proxy, topic)
        with pytest.raises(TransactionAborted), client.transaction() as transaction:  # noqa: PT012 - the block commits
            transaction.produce(topic, b"1")
            assert came.wait(DEADLINE)
            transaction.produce(topic, b"2")
        with client.transaction() as transaction:
            transaction.produce(topic, b"3")
    assert values(read_all(kafka.bootstrap, topic)) == [b"3"]
