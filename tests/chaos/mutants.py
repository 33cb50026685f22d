"""Workers that break their guarantee in the common way, each written by hand: a check that misses them proves nothing (H01).

* AtMostOnce by auto-commit: commits by the clock, after handling (M01).
* AtLeastOnce by auto-commit: commits what was handed out, before it is handled (P03).
* ExactlyOnce by transactions without the offsets in them, which are committed by the clock.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, ClassVar

from confluent_kafka import Consumer, Producer

from .worker import Work, main

if TYPE_CHECKING:
    from types import FrameType

    from .worker import Job

CONSUMER_ONLY = ("group.id", "session.timeout.ms", "heartbeat.interval.ms", "group.protocol", "partition.assignment.strategy")


class Mutant:
    """Consume, handle, produce; the differences are in the settings and in ``finish``."""

    consumer: ClassVar[dict[str, Any]] = {"enable.auto.commit": True, "auto.commit.interval.ms": 1000}
    batch = 20

    def __init__(self, job: Job) -> None:
        shared = {key: value for key, value in job.config.items() if key not in CONSUMER_ONLY}
        consumer = {key: value for key, value in job.config.items() if key != "transactional.id"}
        self.job = job
        self.consume = Consumer({**consumer, "auto.offset.reset": "earliest", **self.consumer})
        self.produce = Producer(shared)
        self.begin()

    def begin(self) -> None: ...

    def finish(self) -> None:
        self.produce.flush()

    def serve(self) -> None:
        stopping: list[bool] = []

        def stop(_number: int, _frame: FrameType | None) -> None:
            stopping.append(True)

        signal.signal(signal.SIGTERM, stop)
        self.consume.subscribe([self.job.source])
        work = Work(self.job)
        while not stopping:
            messages = self.consume.consume(self.batch, 0.1)
            for message in messages:
                for record in work.handle(message):
                    self.produce.produce(record.topic, str(record.value), partition=record.partition or 0)
            if messages:
                self.finish()
        self.consume.close()


class Hasty(Mutant):
    consumer: ClassVar[dict[str, Any]] = {"enable.auto.commit": True, "auto.commit.interval.ms": 20}
    batch = 500


class Torn(Mutant):
    def begin(self) -> None:
        self.produce.init_transactions(30)
        self.produce.begin_transaction()

    def finish(self) -> None:
        self.produce.commit_transaction(30)
        self.produce.begin_transaction()


MUTANTS: dict[str, type[Mutant]] = {"AtMostOnce": Mutant, "AtLeastOnce": Hasty, "ExactlyOnce": Torn}

if __name__ == "__main__":
    main(lambda job: MUTANTS[job.guarantee](job).serve())
