"""quixstreams, as its documentation does it: an ``Application``, a dataframe of the input, ``to_topic``.

* ``commit_every`` is the job's batch, in both guarantees. ``commit_interval`` is longer than a batch takes, so that it commits
  nothing in between.
* "bytes" as (de)serializers: nothing is parsed. No state, so no changelog topics.
* ``fetch.queue.backoff.ms`` is 2: its own 100 lets a fast application wait for messages.
* Produce is its ``get_producer()``, which serves delivery callbacks after each record.
* No echo: it tells nobody when its partitions are assigned.
"""

from __future__ import annotations

from contestant import BATCH, JOB, KEYS, MESSAGES, SIZE, Clock, empty  # isort: skip - its clock starts first

import quixstreams
from quixstreams import Application

COMMIT_SECONDS = 30
VERSION = f"quixstreams {quixstreams.__version__}"
CLOCK = Clock()


class Timed(Application):
    """Its ``run`` calls ``stop`` when the last checkpoint is committed, before it leaves the group."""

    def stop(self, fail: bool = False) -> None:  # noqa: FBT001, FBT002 - as it is there
        if not fail:
            if JOB["work"] == "exactly-once":
                CLOCK.transactions = -(-CLOCK.handled // BATCH)
            CLOCK.done(VERSION)
        super().stop(fail)


def new_application(guarantee: str = "at-least-once", **producer: object) -> Application:
    return Timed(
        broker_address=JOB["bootstrap"],
        consumer_group=JOB["group"],
        auto_offset_reset="earliest",
        commit_every=BATCH,
        commit_interval=COMMIT_SECONDS,
        processing_guarantee=guarantee,
        consumer_extra_config={"fetch.queue.backoff.ms": 2},
        producer_extra_config={"acks": "all", **producer},
        auto_create_topics=False,
        use_changelog_topics=False,
        loglevel="WARNING",
    )


def produce() -> None:
    topic, value, acknowledged = JOB["output"], b"v" * SIZE, 0

    def on_delivery(error: object, _message: object) -> None:
        nonlocal acknowledged
        if error is not None:
            raise RuntimeError(str(error))
        acknowledged += 1

    with new_application().get_producer() as producer:
        producer.produce(topic, value, KEYS[0], on_delivery=on_delivery)
        producer.flush()
        CLOCK.start()
        for number in range(MESSAGES):
            producer.produce(topic, value, KEYS[number % len(KEYS)], on_delivery=on_delivery)
        producer.flush()
        CLOCK.handled = acknowledged - 1
        CLOCK.done(VERSION)


def at_least_once() -> None:
    run(new_application())


def exactly_once() -> None:
    run(new_application("exactly-once", **{"transactional.id": JOB["transactional_id"]}))


def run(application: Application) -> None:
    """Until as many messages as wanted went through."""

    def handle(message: bytes) -> None:
        CLOCK.start()
        empty(message)
        CLOCK.handled += 1

    messages = application.dataframe(application.topic(JOB["input"], value_deserializer="bytes")).update(handle)
    if JOB["output"]:
        messages.to_topic(application.topic(JOB["output"], value_serializer="bytes"))
    application.run(count=MESSAGES, collect=False)


WORKS = {"produce": produce, "consume": at_least_once, "transform": at_least_once, "exactly-once": exactly_once}

if __name__ == "__main__":
    WORKS[JOB["work"]]()
