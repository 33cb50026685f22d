"""KIP-848: a group without members forgets each offset whose commit is older than a limit. So members commit again."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce
from kafka_guarantees.testing import LocalKafka

from .conftest import fill, read_all
from .world import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from confluent_kafka import Message

    from kafka_guarantees.testing.local_kafka import RunningKafka

pytestmark = pytest.mark.broker

CLASSES = pytest.mark.parametrize("guarantee", [AtMostOnce, AtLeastOnce, ExactlyOnce])
EXPIRED = 65.0  # seconds: brokers count in whole minutes


def _run(bootstrap: str, guarantee: type[Any], topic: str, protocol: str, *, idle: float) -> list[tuple[int, int]]:
    """Partitions and offsets of what one member handles."""
    handled: list[tuple[int, int]] = []

    def handler(message: Message) -> None:
        handled.append((message.partition() or 0, message.offset() or 0))

    config = {"bootstrap.servers": bootstrap, "group.id": f"group-{topic}", "group.protocol": protocol}
    if guarantee is ExactlyOnce:
        config["transactional.id"] = f"tx-{topic}"
    with guarantee(config, start="earliest", preflight="off") as client:
        client.run([topic], handler, until_idle=idle)
    return handled


def _commits(bootstrap: str, topic: str) -> list[tuple[int, int]]:
    """Partitions and offsets of all commits that the brokers have written down for the group, transactional ones as well."""
    found = []
    for record in read_all(bootstrap, "__consumer_offsets"):
        key, value = record.key() or b"", record.value()
        if struct.unpack_from(">h", key)[0] > 1 or value is None:
            continue  # not of an offset
        names, place = [], 2
        for _ in range(2):
            length = struct.unpack_from(">h", key, place)[0]
            names.append(key[place + 2 : place + 2 + length].decode())
            place += 2 + length
        if names == [f"group-{topic}", topic]:
            found.append((struct.unpack_from(">i", key, place)[0], struct.unpack_from(">q", value, 2)[0]))
    return found


@CLASSES
@pytest.mark.parametrize("protocol", ["consumer", "classic"])
def test_where_nothing_comes_the_offset_is_committed_again(
    guarantee: type[Any],
    protocol: str,
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once in REFRESH seconds, and where it has not moved. Groups of the classic protocol keep what they have read of late."""
    monkeypatch.setattr("kafka_guarantees._offset_expiry.REFRESH", 0.3)
    topic = kafka_topic(2)
    fill(kafka.bootstrap, topic, [b"%d" % number for number in range(10)], 2)
    assert len(_run(kafka.bootstrap, guarantee, topic, protocol, idle=2.0)) == 10
    before = len(_commits(kafka.bootstrap, topic))
    assert not _run(kafka.bootstrap, guarantee, topic, protocol, idle=2.0)
    again = _commits(kafka.bootstrap, topic)[before:]
    if protocol == "classic":
        assert not again
    else:
        assert again.count((0, 5)) >= 2  # when it was assigned, and later
        assert again.count((1, 5)) >= 2
        assert set(again) == {(0, 5), (1, 5)}


@pytest.mark.soak
@CLASSES
def test_a_quiet_partition_is_not_read_again_after_a_restart(guarantee: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It was: all that the partition still holds, since its offset was gone in the first moment without members."""
    monkeypatch.setattr("kafka_guarantees._offset_expiry.REFRESH", 5.0)
    settings = {"offsets.retention.minutes": 1, "offsets.retention.check.interval.ms": 500}
    with LocalKafka(config=settings) as kafka:
        kafka.create_topic("offers", 2)
        fill(kafka.bootstrap, "offers", [b"quiet"] * 10, 2)

        def keep_busy() -> None:
            until = time.monotonic() + EXPIRED
            while time.monotonic() < until:
                fill(kafka.bootstrap, "offers", [b"busy"])
                time.sleep(1)

        ended = in_thread(keep_busy)
        handled = _run(kafka.bootstrap, guarantee, "offers", "consumer", idle=5.0)
        assert ended() is None
        time.sleep(3)  # nobody is a member
        fill(kafka.bootstrap, "offers", [b"after"])
        again = _run(kafka.bootstrap, guarantee, "offers", "consumer", idle=5.0)
    assert len(handled) == len(set(handled)) >= 60
    assert len(again) == 1
