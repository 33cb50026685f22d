"""FastStream with its Confluent broker: batch subscribers, and ``publish`` with ``no_confirm``.

* ``batch=True``: a subscriber to single messages handles a hundredth of that. ``max_records`` is the job's batch.
* ``apply_types=False``, and a decoder that hands the messages over as they are: nothing is parsed or validated.
* ``no_confirm=True`` gives a future for each record, and those of a batch are awaited together. ``publish_batch``, with a task
  for each record, is slower. The producer is idempotent, with acks=all.
* Each batch is committed after its handler, without waiting for the answer; the last of a run is waited for.
* ``fetch.queue.backoff.ms`` is 2: with librdkafka's 1000 a fast consumer waits for messages.
* No exactly-once: it takes a ``transactional_id``, but nothing begins a transaction or puts offsets into it. No echo either, as
  that is asked of all three guarantees.
"""

from __future__ import annotations

from contestant import BATCH, JOB, KEYS, SIZE, Clock, empty  # isort: skip - its clock starts first

import asyncio
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException
from faststream import AckPolicy
from faststream.__about__ import __version__
from faststream.confluent import KafkaBroker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from confluent_kafka import Message
    from faststream.confluent import KafkaMessage

    Handler = Callable[[tuple[Message, ...]], Awaitable[None]]

VERSION = f"faststream {__version__}"


def new_broker() -> KafkaBroker:
    return KafkaBroker(
        JOB["bootstrap"],
        acks="all",
        enable_idempotence=True,
        apply_types=False,
        logger=None,
        config={"fetch.queue.backoff.ms": 2},
    )


async def produce(clock: Clock) -> None:
    topic, value = JOB["output"], b"v" * SIZE
    async with new_broker() as broker:
        await broker.start()
        await broker.publish(value, topic, key=KEYS[0])
        clock.start()
        while clock.left:
            numbers = range(clock.handled, clock.handled + min(BATCH, clock.left))
            sent = [await broker.publish(value, topic, key=KEYS[number % len(KEYS)], no_confirm=True) for number in numbers]
            await asyncio.gather(*sent)
            clock.handled += len(sent)
        clock.done(VERSION)


async def consume(clock: Clock) -> None:
    async def handle(messages: tuple[Message, ...]) -> None:
        for message in messages:
            empty(message)

    await run(new_broker(), handle, clock)


async def transform(clock: Clock) -> None:
    broker, topic = new_broker(), JOB["output"]

    async def handle(messages: tuple[Message, ...]) -> None:
        await asyncio.gather(
            *[await broker.publish(message.value(), topic, key=message.key(), no_confirm=True) for message in messages]
        )

    await run(broker, handle, clock)


async def run(broker: KafkaBroker, handle: Handler, clock: Clock) -> None:
    """Until all messages are handled and their offsets are committed."""
    over = asyncio.Event()

    async def as_it_is(message: KafkaMessage) -> tuple[Message, ...]:
        return message.raw_message

    subscriber = broker.subscriber(
        JOB["input"],
        group_id=JOB["group"],
        auto_offset_reset="earliest",
        batch=True,
        max_records=BATCH,
        decoder=as_it_is,
        ack_policy=AckPolicy.ACK,
    )

    @subscriber
    async def counted(messages: tuple[Message, ...]) -> None:
        clock.start()
        await handle(messages)
        clock.handled += len(messages)
        if not clock.left:
            over.set()

    async with broker:
        await broker.start()
        await over.wait()
        await last_commit(subscriber)
        clock.done(VERSION)


async def last_commit(subscriber: object) -> None:
    try:
        await subscriber.consumer.commit(asynchronous=False)
    except KafkaException as exc:
        if exc.args[0].code() != KafkaError._NO_OFFSET:  # the subscriber's own commit has come back already
            raise


WORKS = {"produce": produce, "consume": consume, "transform": transform}

if __name__ == "__main__":
    asyncio.run(WORKS[JOB["work"]](Clock()))
