"""confluent-kafka as somebody writes it who has measured: the limit of what Python and librdkafka do together.

* ``poll()`` for the first message and ``consume(n - 1, 0)`` for those that are there already; ``fetch.queue.backoff.ms=2``.
* ``flush()`` before ``send_offsets_to_transaction()``; callbacks only for errors inside transactions; no ``poll(0)`` of the
  producer for each record.
* The consumer's stored positions are committed, so that there is nothing to do for each message.
* It keeps its guarantee as long as nothing goes wrong: it looks at no rebalance, and rewinds nothing.
"""

from __future__ import annotations

from contestant import BATCH, JOB, KEYS, MESSAGES, SIZE, Clock, empty, ready  # isort: skip - its clock starts first

from typing import TYPE_CHECKING

import confluent_kafka
from confluent_kafka import Consumer, KafkaException, Message, Producer

if TYPE_CHECKING:
    from collections.abc import Callable

    from confluent_kafka import KafkaError

    Copy = Callable[[list[Message]], None]

CONSUMED = JOB.get("batch") or 2000  # messages of a batch where nothing is produced
AT_ONCE = 500  # of echo
SERVE_EVERY = 1000  # records
LINGER_MS = 20  # fuller requests, which is what counts on a replicated cluster
VERSION = f"confluent-kafka {confluent_kafka.__version__}"


class Delivered:
    """A delivery callback that counts, and keeps the first error."""

    def __init__(self) -> None:
        self.count = 0
        self.error: KafkaError | None = None

    def __call__(self, error: KafkaError | None, _message: Message) -> None:
        self.count += 1
        if error is not None:
            self.error = self.error or error

    def check(self, expected: int) -> None:
        if self.error is not None:
            raise KafkaException(self.error)
        if self.count != expected:
            raise AssertionError(f"{self.count} outcomes of {expected} records")


def new_consumer() -> Consumer:
    return Consumer(
        {
            "bootstrap.servers": JOB["bootstrap"],
            "group.id": JOB["group"],
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "fetch.queue.backoff.ms": 2,
        }
    )


def new_producer(**settings: object) -> Producer:
    return Producer({"bootstrap.servers": JOB["bootstrap"], **settings})


def idempotent_producer() -> Producer:
    return new_producer(**{"acks": "all", "enable.idempotence": True, "linger.ms": LINGER_MS})


def fetch(consumer: Consumer, clock: Clock, most: int) -> list[Message]:
    """What is there; waits for the first message only, and not for long."""
    most = min(most, clock.left)
    if most == 0 or (first := consumer.poll(0.1)) is None:
        return []
    messages = [first]
    if most > 1:
        messages += consumer.consume(most - 1, 0)
    clock.start()
    for message in messages:
        if message.error() is not None:
            raise KafkaException(message.error())
    return messages


def produce(clock: Clock) -> None:
    topic, value, producer, delivered = JOB["output"], b"v" * SIZE, idempotent_producer(), Delivered()
    send, poll, keys = producer.produce, producer.poll, KEYS
    send(topic, value, keys[0], on_delivery=delivered)
    producer.flush()
    clock.start()
    for number in range(MESSAGES):
        while True:
            try:
                send(topic, value, keys[number % 500], on_delivery=delivered)
            except BufferError:
                poll(0.01)
            else:
                break
        if number % SERVE_EVERY == 0:
            poll(0)
    producer.flush()
    delivered.check(MESSAGES + 1)
    clock.handled = MESSAGES
    clock.done(VERSION)


def consume(clock: Clock) -> None:
    consumer = new_consumer()
    consumer.subscribe([JOB["input"]])
    while clock.left:
        if messages := fetch(consumer, clock, CONSUMED):
            for message in messages:
                empty(message)
            consumer.commit(asynchronous=False)
            clock.handled += len(messages)
    clock.done(VERSION)
    consumer.close()


def transform(clock: Clock) -> None:
    topic, consumer, producer, delivered = JOB["output"], new_consumer(), idempotent_producer(), Delivered()
    send = producer.produce
    consumer.subscribe([JOB["input"]])
    while clock.left:
        if messages := fetch(consumer, clock, BATCH):
            for message in messages:
                send(topic, message.value(), message.key(), on_delivery=delivered)
            producer.flush()
            clock.handled += len(messages)
            delivered.check(clock.handled)
            consumer.commit(asynchronous=False)
    clock.done(VERSION)
    consumer.close()


def in_transactions(consumer: Consumer, clock: Clock) -> tuple[Producer, Copy]:
    topic = JOB["output"]
    producer = new_producer(
        **{"transactional.id": JOB["transactional_id"], "delivery.report.only.error": True, "linger.ms": LINGER_MS}
    )
    producer.init_transactions()
    send = producer.produce

    def copy(messages: list[Message]) -> None:
        producer.begin_transaction()
        for message in messages:
            send(topic, message.value(), message.key())
        producer.flush()
        producer.send_offsets_to_transaction(consumer.position(consumer.assignment()), consumer.consumer_group_metadata())
        producer.commit_transaction()
        clock.transactions += 1

    return producer, copy


def exactly_once(clock: Clock) -> None:
    consumer = new_consumer()
    _, copy = in_transactions(consumer, clock)
    consumer.subscribe([JOB["input"]])
    while clock.left:
        wanted = min(BATCH, clock.left)
        messages: list[Message] = []
        while len(messages) < wanted:
            messages += fetch(consumer, clock, wanted - len(messages))
        copy(messages)
        clock.handled += wanted
    clock.done(VERSION)
    consumer.close()


def at_least_once(consumer: Consumer, clock: Clock) -> tuple[Producer, Copy]:
    producer, delivered = idempotent_producer(), Delivered()

    def copy(messages: list[Message]) -> None:
        for message in messages:
            producer.produce(JOB["output"], message.value(), message.key(), on_delivery=delivered)
        producer.flush()
        delivered.check(clock.handled + len(messages))
        consumer.commit(asynchronous=False)

    return producer, copy


def at_most_once(consumer: Consumer, _clock: Clock) -> tuple[Producer, Copy]:
    producer = new_producer(acks=0, retries=0)

    def copy(messages: list[Message]) -> None:
        consumer.commit(asynchronous=False)
        for message in messages:
            producer.produce(JOB["output"], message.value(), message.key())
        producer.poll(0)

    return producer, copy


def echo(clock: Clock) -> None:
    consumer = new_consumer()
    producer, copy = COPY[JOB["guarantee"]](consumer, clock)
    consumer.subscribe([JOB["input"]], on_assign=lambda *_: ready())
    while clock.left:
        if messages := fetch(consumer, clock, AT_ONCE):
            copy(messages)
            clock.handled += len(messages)
    producer.flush()
    clock.done(VERSION)
    consumer.close()


COPY = {"at-most-once": at_most_once, "at-least-once": at_least_once, "exactly-once": in_transactions}
WORKS = {"produce": produce, "consume": consume, "transform": transform, "exactly-once": exactly_once, "echo": echo}

if __name__ == "__main__":
    WORKS[JOB["work"]](Clock())
