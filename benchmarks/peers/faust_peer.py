"""Faust (faust-streaming): an app with one agent, which takes batches from its stream.

* Topics are raw bytes, the web server and the leader's topic are off, ``cython_optimizations`` on; ``stream_buffer_maxsize``
  is the size that its documentation names for throughput.
* ``take_events`` with the job's batch; a plain ``async for`` consumes no faster. Transforming awaits all that it sent for one
  before that is acknowledged: with ``async for`` it would commit messages whose records are still on their way.
* ``broker_commit_every`` is the job's batch, and the last commit of a run is waited for.
* Its producer has acks=all, but is idempotent only in transactions.
* No exactly-once: it has a transaction for each partition, all ended at once, so that there are no batches to compare. No echo
  either, as that is asked of all three guarantees.
"""

from __future__ import annotations

from contestant import BATCH, JOB, KEYS, MESSAGES, SIZE, Clock, empty  # isort: skip - its clock starts first

import asyncio
from typing import TYPE_CHECKING

import faust

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[list[faust.EventT]], Awaitable[None]]

TAKE_SECONDS = 0.2  # for a batch that is not full
BUFFER = 131_072  # messages


def new_app() -> faust.App:
    return faust.App(
        JOB["group"],
        broker=f"kafka://{JOB['bootstrap']}",
        broker_commit_every=BATCH,
        broker_max_poll_records=BATCH,
        consumer_auto_offset_reset="earliest",
        cython_optimizations=True,
        producer_acks=-1,
        stream_buffer_maxsize=BUFFER,
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_enabled=False,
    )


def raw(app: faust.App, name: str) -> faust.TopicT:
    return app.topic(name, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")


async def produce(clock: Clock) -> None:
    app, value = new_app(), b"v" * SIZE
    topic = raw(app, JOB["output"])
    await app.start_client()
    await (await topic.send(key=KEYS[0], value=value))
    clock.start()
    futures = [await topic.send(key=KEYS[number % len(KEYS)], value=value) for number in range(MESSAGES)]
    await asyncio.gather(*futures)
    clock.handled = MESSAGES
    clock.done(VERSION)
    await app.stop()


async def consume(clock: Clock) -> None:
    async def handle(events: list[faust.EventT]) -> None:
        for event in events:
            empty(event)

    await run(new_app(), handle, clock)


async def transform(clock: Clock) -> None:
    app = new_app()
    output = raw(app, JOB["output"])

    async def handle(events: list[faust.EventT]) -> None:
        await asyncio.gather(*[await output.send(key=event.key, value=event.value) for event in events])

    await run(app, handle, clock)


async def run(app: faust.App, handle: Handler, clock: Clock) -> None:
    """Until all messages are handled and their offsets are committed."""
    source, over = raw(app, JOB["input"]), asyncio.Event()

    @app.agent(source)
    async def agent(stream: faust.StreamT) -> None:
        async for events in stream.take_events(BATCH, within=TAKE_SECONDS):
            clock.start()
            await handle(events)
            clock.handled += len(events)
            if not clock.left:
                over.set()

    app.finalize()
    await app.start()
    await over.wait()
    for _ in range(2):  # the first one may only wait for a commit that is under way
        await app.commit({JOB["input"]})
    clock.done(VERSION)
    await app.stop()


VERSION = f"faust-streaming {faust.__version__}"
WORKS = {"produce": produce, "consume": consume, "transform": transform}

if __name__ == "__main__":
    asyncio.run(WORKS[JOB["work"]](Clock()))
