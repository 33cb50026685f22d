"""``max_wait``: batches that wait for more messages, on a real broker; through a stop and a rebalance as well."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Message, Producer

from kafka_guarantees import AtLeastOnce, BrokerError, ExactlyOnce, Record
from kafka_guarantees._assignment import Assignment
from kafka_guarantees._consumer import GroupConsumer

from .conftest import committed, fill, read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kafka_guarantees.testing.local_kafka import RunningKafka

    Took = Callable[[Sequence[Message]], list[Record] | None]

pytestmark = pytest.mark.broker
WAYS = ["at least once", "exactly once", "transactions"]
EVERY = 0.02  # seconds between two messages that trickle in
TRICKLE = 60  # messages


class Service:
    """One of the three ways to take batches, in a group of its own."""

    def __init__(self, bootstrap: str, name: str, topic: str, way: str) -> None:
        self.topic, self.group, self.way = topic, name, way
        config = {"bootstrap.servers": bootstrap, "group.id": name}
        self.kafka: Any = AtLeastOnce(config) if way == "at least once" else ExactlyOnce({**config, "transactional.id": name})

    def take(self, took: Took, **options: Any) -> None:
        """Hand batches to ``took`` until the client stops."""
        if self.way != "transactions":
            self.kafka.run_batches([self.topic], took, **options)
            return
        for transaction in self.kafka.transactions([self.topic], **options):
            with transaction:
                for record in took(transaction.messages) or ():
                    transaction.produce(record.topic, record.value)


@pytest.fixture(params=WAYS)
def service(
    request: pytest.FixtureRequest, kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> Iterator[Service]:
    made = Service(kafka.bootstrap, fresh("group"), kafka_topic(), request.param)
    with made.kafka:
        yield made


def trickle(bootstrap: str, topic: str) -> None:
    """Send messages one by one, from 1 on."""
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
    for number in range(1, TRICKLE):
        producer.produce(topic, b"%d" % number)
        producer.poll(0)
        time.sleep(EVERY)
    producer.flush()


@pytest.mark.parametrize("max_wait", [0.0, 0.5])
def test_a_batch_waits_for_more(service: Service, kafka: RunningKafka, max_wait: float) -> None:
    """Messages that trickle in come in few batches, each as long as max_wait; without it in many. All once, in order."""
    sizes: list[int] = []
    seen: list[bytes] = []
    fill(kafka.bootstrap, service.topic, [b"0"])
    others = threading.Thread(target=trickle, args=(kafka.bootstrap, service.topic))

    def took(messages: Sequence[Message]) -> None:
        if not sizes:
            others.start()  # not while the group is still being joined
        sizes.append(len(messages))
        seen.extend(message.value() or b"" for message in messages)
        if len(seen) == TRICKLE:
            service.kafka.stop()

    service.take(took, max_wait=max_wait)
    others.join()
    assert seen == [b"%d" % number for number in range(TRICKLE)]
    # 1.2 s of messages: half a second in each batch, or 20 of them as long as nobody knows how long these take
    assert len(sizes) <= 6 if max_wait else len(sizes) >= 10
    assert committed(kafka.bootstrap, service.group, service.topic) == [TRICKLE]


def test_a_full_batch_does_not_wait(service: Service, kafka: RunningKafka) -> None:
    """max_batch messages are a batch, however long it might wait; the rest, which is not full, is waited for."""
    fill(kafka.bootstrap, service.topic, [b"%d" % number for number in range(14)])
    sizes: list[int] = []

    def took(messages: Sequence[Message]) -> None:
        sizes.append(len(messages))
        if sum(sizes) == 10:
            threading.Timer(0.5, service.kafka.stop).start()

    began = time.monotonic()
    service.take(took, max_batch=5, max_wait=60.0)
    assert time.monotonic() - began < 20
    assert sizes == [5, 5, 4]  # the last: what there was when it was to stop, which was in hand
    assert committed(kafka.bootstrap, service.group, service.topic) == [14]


def test_nothing_is_lost_or_doubled_by_a_rebalance_meanwhile(
    service: Service, kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """C03: a batch that is gathered while partitions are assigned anew is dropped, and comes again."""
    service.topic, target = kafka_topic(partitions=4), kafka_topic()
    other = Service(kafka.bootstrap, service.group, service.topic, service.way)
    other.kafka.close()
    other.kafka = type(service.kafka)(
        {"bootstrap.servers": kafka.bootstrap, "group.id": service.group}
        | ({} if service.way == "at least once" else {"transactional.id": fresh("tx")})
    )
    fill(kafka.bootstrap, service.topic, [b"%d" % number for number in range(40)], partitions=4)
    seen: set[bytes] = set()
    joining = threading.Thread(target=lambda: other.take(took, max_wait=3.0))

    def took(messages: Sequence[Message]) -> list[Record]:
        seen.update(values(messages))
        if len(seen) == 40:
            service.kafka.stop()
            other.kafka.stop()
        return [Record(target, message.value()) for message in messages]

    threading.Timer(1.0, joining.start).start()  # the first one has its batch by then, and waits for the rest
    with other.kafka:
        service.take(took, max_wait=8.0)
        joining.join(60)
    copied = values(read_all(kafka.bootstrap, target))
    assert sorted(copied) == sorted(b"%d" % number for number in range(40))
    assert committed(kafka.bootstrap, service.group, service.topic, 4) == [10] * 4


@pytest.mark.parametrize("max_wait", [-0.1, 75.1, float("inf"), float("nan")])
def test_what_cannot_be_waited_for_is_refused(service: Service, max_wait: float) -> None:
    """Before anything is connected."""
    with pytest.raises(ValueError, match="max_wait is a number of seconds, up to a quarter"):
        service.take(lambda _messages: None, max_wait=max_wait)


def test_what_was_gathered_before_an_error_is_not_passed_over() -> None:
    """An error comes with the next fetch: who sets the offset behind it must not pass over what is in hand."""
    problem, messages = BrokerError("damaged"), [Message(topic="t", value=b"1")]

    def events(_fetched: list[Message]) -> list[Message]:
        raise problem

    stub = SimpleNamespace(
        _assignment=Assignment(),
        _problem=None,
        _lifecycle=SimpleNamespace(stopping=False),
        idle=None,
        _take=lambda *_: ([Message(topic="t")], 0, None),
        _without_events=events,
    )
    GroupConsumer._gather(stub, messages, 10, 60.0, 0)  # type: ignore[arg-type] # what it needs of one
    assert [message.value() for message in messages] == [b"1"]
    assert stub._problem is problem
