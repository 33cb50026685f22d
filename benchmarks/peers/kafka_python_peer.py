"""kafka-python, as its documentation does it: ``poll``, ``send``, and its transactions, with offsets and group in them.

* ``crc32c``, the extra of C that it recommends, is installed. Without it checksums are Python.
* ``retry_backoff_ms`` is 10: with its default of 100, a transaction that begins before the last one's markers are written waits
  that long. Two to three times as fast with batches of 1 and of 100.
* ``linger_ms`` and ``batch_size`` are larger than its 0 and 16 kB, so that its sender's thread wakes less often.
* A ``poll`` returns at most the job's batch; a transaction has the messages of one or more.
* The producer is idempotent, with acks=all, by its defaults. Futures are looked at after ``flush``, so no outcome goes unknown.
"""

from __future__ import annotations

from contestant import BATCH, JOB, KEYS, MESSAGES, SIZE, Clock, empty, ready  # isort: skip - its clock starts first

from typing import TYPE_CHECKING

import kafka
from kafka import ConsumerRebalanceListener, KafkaConsumer, KafkaProducer
from kafka.structs import OffsetAndMetadata

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kafka.structs import TopicPartition

    Fetched = dict[TopicPartition, list]

POLL_MS = 100
BATCH_BYTES = 131_072
LINGER_MS = 5
RETRY_BACKOFF_MS = 10


class Ready(ConsumerRebalanceListener):
    """Of echo."""

    def on_partitions_revoked(self, revoked: object) -> None:
        pass

    def on_partitions_assigned(self, assigned: object) -> None:
        if assigned:
            ready()


def new_consumer(isolation_level: str = "read_uncommitted", listener: ConsumerRebalanceListener | None = None) -> KafkaConsumer:
    consumer = KafkaConsumer(
        bootstrap_servers=JOB["bootstrap"],
        group_id=JOB["group"],
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        isolation_level=isolation_level,
    )
    consumer.subscribe([JOB["input"]], listener=listener)
    return consumer


def new_producer(linger_ms: int = LINGER_MS, **config: object) -> KafkaProducer:
    return KafkaProducer(
        bootstrap_servers=JOB["bootstrap"],
        batch_size=BATCH_BYTES,
        linger_ms=linger_ms,
        retry_backoff_ms=RETRY_BACKOFF_MS,
        **config,
    )


def transactional_producer(linger_ms: int = LINGER_MS) -> KafkaProducer:
    producer = new_producer(linger_ms, transactional_id=JOB["transactional_id"])
    producer.init_transactions()
    return producer


def fetch(consumer: KafkaConsumer, clock: Clock, most: int) -> Fetched:
    fetched = consumer.poll(POLL_MS, max_records=min(most, clock.left))
    if fetched:
        clock.start()
    return fetched


def send(producer: KafkaProducer, fetched: Fetched) -> list:
    topic = JOB["output"]
    return [producer.send(topic, message.value, message.key) for messages in fetched.values() for message in messages]


def acknowledged(producer: KafkaProducer, futures: Iterable) -> None:
    producer.flush()
    for future in futures:
        future.get(0)


def positions(fetched: Fetched) -> dict[TopicPartition, OffsetAndMetadata]:
    return {
        partition: OffsetAndMetadata(messages[-1].offset + 1, "", messages[-1].leader_epoch)
        for partition, messages in fetched.items()
    }


def produce(clock: Clock) -> None:
    topic, value, producer = JOB["output"], b"v" * SIZE, new_producer()
    producer.send(topic, value, KEYS[0]).get(60)
    clock.start()
    acknowledged(producer, [producer.send(topic, value, KEYS[number % len(KEYS)]) for number in range(MESSAGES)])
    clock.handled = MESSAGES


def consume(clock: Clock) -> None:
    consumer = new_consumer()
    while clock.left:
        for messages in fetch(consumer, clock, BATCH).values():
            for message in messages:
                empty(message)
            clock.handled += len(messages)
        consumer.commit()


def transform(clock: Clock) -> None:
    consumer, producer = new_consumer(), new_producer()
    while clock.left:
        wanted, futures = min(BATCH, clock.left), []
        while len(futures) < wanted:
            futures += send(producer, fetch(consumer, clock, wanted - len(futures)))
        acknowledged(producer, futures)
        consumer.commit()
        clock.handled += len(futures)


def exactly_once(clock: Clock) -> None:
    consumer, producer = new_consumer("read_committed"), transactional_producer()
    while clock.left:
        wanted, sent, offsets = min(BATCH, clock.left), 0, {}
        producer.begin_transaction()
        while sent < wanted:
            fetched = fetch(consumer, clock, wanted - sent)
            sent += len(send(producer, fetched))
            offsets.update(positions(fetched))
        producer.send_offsets_to_transaction(offsets, consumer.group_metadata())
        producer.commit_transaction()
        clock.transactions += 1
        clock.handled += sent


def echo(clock: Clock) -> None:
    """What a ``poll`` returns is sent on at once, as the guarantee asks."""
    guarantee = JOB["guarantee"]
    consumer = new_consumer("read_committed" if guarantee == "exactly-once" else "read_uncommitted", Ready())
    if guarantee == "exactly-once":
        producer = transactional_producer(0)
    else:
        producer = new_producer(0, **({"acks": 0, "enable_idempotence": False} if guarantee == "at-most-once" else {}))
    while clock.left:
        if fetched := fetch(consumer, clock, BATCH):
            COPY[guarantee](consumer, producer, fetched)
            clock.handled += sum(map(len, fetched.values()))
    producer.flush()


def copy_at_most_once(consumer: KafkaConsumer, producer: KafkaProducer, fetched: Fetched) -> None:
    consumer.commit()
    send(producer, fetched)


def copy_at_least_once(consumer: KafkaConsumer, producer: KafkaProducer, fetched: Fetched) -> None:
    acknowledged(producer, send(producer, fetched))
    consumer.commit()


def copy_exactly_once(consumer: KafkaConsumer, producer: KafkaProducer, fetched: Fetched) -> None:
    producer.begin_transaction()
    send(producer, fetched)
    producer.send_offsets_to_transaction(positions(fetched), consumer.group_metadata())
    producer.commit_transaction()


COPY = {"at-most-once": copy_at_most_once, "at-least-once": copy_at_least_once, "exactly-once": copy_exactly_once}
WORKS = {"produce": produce, "consume": consume, "transform": transform, "exactly-once": exactly_once, "echo": echo}

if __name__ == "__main__":
    the_clock = Clock()
    WORKS[JOB["work"]](the_clock)
    the_clock.done(f"kafka-python {kafka.__version__}")
