"""confluent-kafka as it is written first: one ``poll()`` for each message, and librdkafka's own settings.

* Consuming commits every 500 messages, transforming flushes and commits every ``batch``.
* Exactly-once is the loop of confluent-kafka-python's examples/eos-transactions.py: poll, produce, the consumer's position into
  the transaction, commit, and no ``flush()`` before the position. It subscribes, where the example assigns one partition.
"""

from __future__ import annotations

from contestant import BATCH, JOB, KEYS, MESSAGES, SIZE, Clock, empty, ready  # isort: skip - its clock starts first

from typing import TYPE_CHECKING

import confluent_kafka
from confluent_kafka import Consumer, KafkaException, Message, Producer

if TYPE_CHECKING:
    from collections.abc import Callable

    from confluent_kafka import KafkaError

    Copy = Callable[[Message], None]

COMMIT_EVERY = 500
VERSION = f"confluent-kafka {confluent_kafka.__version__}"


def delivery_report(error: KafkaError | None, _message: Message) -> None:
    if error is not None:
        raise KafkaException(error)


def new_consumer() -> Consumer:
    return Consumer(
        {
            "bootstrap.servers": JOB["bootstrap"],
            "group.id": JOB["group"],
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )


def new_producer(**settings: object) -> Producer:
    return Producer({"bootstrap.servers": JOB["bootstrap"], **settings})


def idempotent_producer() -> Producer:
    return new_producer(**{"acks": "all", "enable.idempotence": True})


def transactional_producer() -> Producer:
    producer = new_producer(**{"transactional.id": JOB["transactional_id"]})
    producer.init_transactions()
    return producer


def next_message(consumer: Consumer, clock: Clock) -> Message | None:
    """The next message; None when the job is done."""
    while clock.left:
        message = consumer.poll(0.1)
        if message is None:
            continue
        if message.error() is not None:
            raise KafkaException(message.error())
        clock.start()
        clock.handled += 1
        return message
    return None


def end_transaction(consumer: Consumer, producer: Producer, clock: Clock) -> None:
    producer.send_offsets_to_transaction(consumer.position(consumer.assignment()), consumer.consumer_group_metadata())
    producer.commit_transaction()
    clock.transactions += 1


def produce(clock: Clock) -> None:
    topic, value, producer = JOB["output"], b"v" * SIZE, idempotent_producer()
    producer.produce(topic, value, KEYS[0], on_delivery=delivery_report)
    producer.flush()
    clock.start()
    for number in range(MESSAGES):
        while True:
            try:
                producer.produce(topic, value, KEYS[number % len(KEYS)], on_delivery=delivery_report)
            except BufferError:
                producer.poll(0.1)
            else:
                break
        producer.poll(0)
    producer.flush()
    clock.handled = MESSAGES
    clock.done(VERSION)


def consume(clock: Clock) -> None:
    consumer = new_consumer()
    consumer.subscribe([JOB["input"]])
    while (message := next_message(consumer, clock)) is not None:
        empty(message)
        if clock.handled % COMMIT_EVERY == 0 or clock.handled == MESSAGES:
            consumer.commit(asynchronous=False)
    clock.done(VERSION)
    consumer.close()


def transform(clock: Clock) -> None:
    consumer, producer = new_consumer(), idempotent_producer()
    consumer.subscribe([JOB["input"]])
    while (message := next_message(consumer, clock)) is not None:
        producer.produce(JOB["output"], message.value(), message.key(), on_delivery=delivery_report)
        producer.poll(0)
        if clock.handled % BATCH == 0 or clock.handled == MESSAGES:
            producer.flush()
            consumer.commit(asynchronous=False)
    clock.done(VERSION)
    consumer.close()


def exactly_once(clock: Clock) -> None:
    consumer, producer = new_consumer(), transactional_producer()
    consumer.subscribe([JOB["input"]])
    producer.begin_transaction()
    while (message := next_message(consumer, clock)) is not None:
        producer.poll(0)
        producer.produce(JOB["output"], message.value(), message.key(), on_delivery=delivery_report)
        if clock.handled % BATCH == 0 or clock.handled == MESSAGES:
            end_transaction(consumer, producer, clock)
            if clock.handled < MESSAGES:
                producer.begin_transaction()
    clock.done(VERSION)
    consumer.close()


def echo(clock: Clock) -> None:
    """The same loops, each message at once."""
    consumer = new_consumer()
    producer, copy = COPY[JOB["guarantee"]](consumer, clock)
    consumer.subscribe([JOB["input"]], on_assign=lambda *_: ready())
    while (message := next_message(consumer, clock)) is not None:
        copy(message)
    producer.flush()
    clock.done(VERSION)
    consumer.close()


def at_most_once(consumer: Consumer, _clock: Clock) -> tuple[Producer, Copy]:
    producer = new_producer(acks=0)

    def copy(message: Message) -> None:
        consumer.commit(message, asynchronous=False)
        producer.produce(JOB["output"], message.value(), message.key())
        producer.poll(0)

    return producer, copy


def at_least_once(consumer: Consumer, _clock: Clock) -> tuple[Producer, Copy]:
    producer = idempotent_producer()

    def copy(message: Message) -> None:
        producer.produce(JOB["output"], message.value(), message.key(), on_delivery=delivery_report)
        producer.flush()
        consumer.commit(message, asynchronous=False)

    return producer, copy


def in_transactions(consumer: Consumer, clock: Clock) -> tuple[Producer, Copy]:
    producer = transactional_producer()

    def copy(message: Message) -> None:
        producer.begin_transaction()
        producer.produce(JOB["output"], message.value(), message.key(), on_delivery=delivery_report)
        end_transaction(consumer, producer, clock)

    return producer, copy


COPY = {"at-most-once": at_most_once, "at-least-once": at_least_once, "exactly-once": in_transactions}
WORKS = {"produce": produce, "consume": consume, "transform": transform, "exactly-once": exactly_once, "echo": echo}

if __name__ == "__main__":
    WORKS[JOB["work"]](Clock())
