"""aiokafka, as its documentation does it: ``getmany``, ``send``, and its recipe for a transactional consume-process-produce.

* ``retry_backoff_ms`` is 10: with its default of 100, a transaction that begins before the last one's markers are written waits
  that long. Nearly twice as fast with batches of 100. A larger ``max_batch_size`` or uvloop made nothing faster.
* A transaction has the messages of one or more ``getmany``: one returns what was fetched already, which may be fewer.
* A record is sent when its future is made; the futures are looked at after ``flush``, so no outcome goes unknown.
"""

from __future__ import annotations

from contestant import BATCH, JOB, KEYS, MESSAGES, SIZE, Clock, empty, ready  # isort: skip - its clock starts first

import asyncio

import aiokafka
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

POLL_MS = 200
RETRY_BACKOFF_MS = 10


def new_consumer(**config: object) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        JOB["input"],
        bootstrap_servers=JOB["bootstrap"],
        group_id=JOB["group"],
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        **config,
    )


def new_producer(**config: object) -> AIOKafkaProducer:
    return AIOKafkaProducer(bootstrap_servers=JOB["bootstrap"], retry_backoff_ms=RETRY_BACKOFF_MS, **config)


async def produce(clock: Clock) -> None:
    topic, value = JOB["output"], b"v" * SIZE
    async with new_producer(acks="all", enable_idempotence=True) as producer:
        await producer.send_and_wait(topic, value, KEYS[0])
        clock.start()
        futures = [await producer.send(topic, value, KEYS[i % len(KEYS)]) for i in range(MESSAGES)]
        await producer.flush()
        for future in futures:
            future.result()
        clock.handled = MESSAGES


async def consume(clock: Clock) -> None:
    async with new_consumer() as consumer:
        while clock.left:
            for messages in (await consumer.getmany(timeout_ms=POLL_MS, max_records=min(BATCH, clock.left))).values():
                clock.start()
                for message in messages:
                    empty(message)
                clock.handled += len(messages)
            await consumer.commit()


async def send(producer: AIOKafkaProducer, messages: list) -> list[asyncio.Future]:
    return [await producer.send(JOB["output"], message.value, message.key) for message in messages]


async def transform(clock: Clock) -> None:
    async with new_consumer() as consumer, new_producer(acks="all", enable_idempotence=True) as producer:
        while clock.left:
            futures = []
            wanted = min(BATCH, clock.left)
            while len(futures) < wanted:
                for messages in (await consumer.getmany(timeout_ms=POLL_MS, max_records=wanted - len(futures))).values():
                    clock.start()
                    futures += await send(producer, messages)
            await producer.flush()
            for future in futures:
                future.result()
            await consumer.commit()
            clock.handled += len(futures)


async def exactly_once(clock: Clock) -> None:
    async with (
        new_consumer(isolation_level="read_committed") as consumer,
        new_producer(transactional_id=JOB["transactional_id"]) as producer,
    ):
        while clock.left:
            fetched = await consumer.getmany(timeout_ms=POLL_MS, max_records=min(BATCH, clock.left))
            if not fetched:
                continue
            clock.start()
            wanted = min(BATCH, clock.left)
            async with producer.transaction():
                offsets, sent = {}, 0
                while True:
                    for partition, messages in fetched.items():
                        await send(producer, messages)
                        offsets[partition] = messages[-1].offset + 1
                        sent += len(messages)
                    if sent >= wanted:
                        break
                    fetched = await consumer.getmany(timeout_ms=POLL_MS, max_records=wanted - sent)
                await producer.send_offsets_to_transaction(offsets, JOB["group"])
            clock.transactions += 1
            clock.handled += sent


async def echo(clock: Clock) -> None:
    """Each ``getmany`` returns as soon as there is a message, and what it returns is sent on as the guarantee asks."""
    guarantee = JOB["guarantee"]
    transactional = guarantee == "exactly-once"
    acks = {"transactional_id": JOB["transactional_id"]} if transactional else {"acks": "all", "enable_idempotence": True}
    config = {"acks": 0} if guarantee == "at-most-once" else acks
    isolation = "read_committed" if transactional else "read_uncommitted"
    async with new_consumer(isolation_level=isolation) as consumer, new_producer(**config) as producer:
        ready()  # start() returns when the partitions are assigned
        while clock.left:
            fetched = await consumer.getmany(timeout_ms=POLL_MS)
            if fetched:
                clock.start()
                await COPY[guarantee](consumer, producer, fetched)
                clock.handled += sum(map(len, fetched.values()))


async def copy_at_most_once(consumer: AIOKafkaConsumer, producer: AIOKafkaProducer, fetched: dict) -> None:
    await consumer.commit()
    for messages in fetched.values():
        await send(producer, messages)


async def copy_at_least_once(consumer: AIOKafkaConsumer, producer: AIOKafkaProducer, fetched: dict) -> None:
    for messages in fetched.values():
        await asyncio.gather(*await send(producer, messages))
    await consumer.commit()


async def copy_exactly_once(_consumer: AIOKafkaConsumer, producer: AIOKafkaProducer, fetched: dict) -> None:
    async with producer.transaction():
        for messages in fetched.values():
            await send(producer, messages)
        offsets = {partition: messages[-1].offset + 1 for partition, messages in fetched.items()}
        await producer.send_offsets_to_transaction(offsets, JOB["group"])


COPY = {"at-most-once": copy_at_most_once, "at-least-once": copy_at_least_once, "exactly-once": copy_exactly_once}
WORKS = {"produce": produce, "consume": consume, "transform": transform, "exactly-once": exactly_once, "echo": echo}

if __name__ == "__main__":
    the_clock = Clock()
    asyncio.run(WORKS[JOB["work"]](the_clock))
    the_clock.done(f"aiokafka {aiokafka.__version__}")
