"""The process that is measured: one work, done with the public API as its users write it.

``python -m kafka_guarantees.bench.work JOB``, where JOB is a JSON object; with ``-`` it comes as a line on stdin, as it must
where its settings hold a secret. When the work is done, one line of JSON says what came of it; everything else goes to stderr.

Rules. The clock runs from the first message in hand, or after the first record acknowledged, until everything is handled,
acknowledged and committed; for what consumes that includes leaving the group. Nothing else is done meanwhile.

==================== ======================================================================================================
of a job
==================== ======================================================================================================
work                 "produce", "consume", "transform", "exactly-once" (as transform) or "echo"
bootstrap            host:port of the cluster
messages             how many
input, output        topics, which exist
size                 bytes of a value that is produced
batch                the most messages that are handled, or records that are sent, together; None: what the class does by itself
group                group.id
transactional_id     transactional.id
guarantee            by its name; None: that of the work, which is at-least-once but for "exactly-once"
transactions_in_flight  of ``ExactlyOnce``; not there: its default
config               more of librdkafka's properties
==================== ======================================================================================================
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaException, TopicPartition, libversion

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, Record, __version__

if TYPE_CHECKING:
    from collections.abc import Generator

    from confluent_kafka import Message

    from kafka_guarantees.records import Records

    Job = dict[str, Any]
    Result = dict[str, Any]
    Handling = Generator[Records, Message, None]

CLASSES: dict[str, Any] = {"at-most-once": AtMostOnce, "at-least-once": AtLeastOnce, "exactly-once": ExactlyOnce}
BEGAN = time.monotonic() - time.process_time()  # of the process: what was imported until here counts
KEYS = [b"%08d" % number for number in range(500)]
FIRST = 60.0  # seconds that the first record may take: connection, metadata
TRANSACTION = 1000  # records of one, where a job does not say
WHOLE = 10.0  # seconds a transaction may be open: so that its size, and not its age, ends it. Below transaction.timeout.ms


def main() -> None:
    """Do the job that the command line names, and print what came of it."""
    logging.basicConfig(level=logging.WARNING)
    result = do(_job(sys.argv[-1]))
    print(json.dumps(result), flush=True)  # noqa: T201 - the result is what it is for


def do(job: Job) -> Result:
    """Do one job.

    Returns:
        messages, seconds, transactions (None: not known), first (seconds from the start of the process to the first message
        handled or record acknowledged), rss (the most bytes of memory), version.
    """
    result = WORKS[job["work"]](job)
    version = f"kafka-guarantees {__version__}, librdkafka {libversion()[0]}"
    return {"messages": job["messages"], "transactions": None, **result, "rss": peak_memory(), "version": version}


def _job(argument: str) -> Job:
    if argument != "-":
        return dict(json.loads(argument))
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_driver, daemon=True).start()
    return dict(job)


def _end_with_driver() -> None:
    """End this process when the one that started it is gone: nobody waits for the result any more."""
    os.read(sys.stdin.fileno(), 1)  # nothing more is written to it: it returns at its end
    os._exit(1)


def peak_memory() -> int:
    """The most bytes that this process had in memory at a time."""
    try:  # Linux counts in ru_maxrss also what the process that forked this one had
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def guarantee_of(job: Job) -> str:
    """The guarantee by its name."""
    return str(job.get("guarantee") or ("exactly-once" if job["work"] == "exactly-once" else "at-least-once"))


def client(job: Job) -> Any:
    """The client that the job is for."""
    guarantee = guarantee_of(job)
    config = {"bootstrap.servers": job["bootstrap"], **job.get("config", {})}
    if job.get("group"):
        config["group.id"] = job["group"]
    options: dict[str, Any] = {"start": "earliest"}
    if guarantee == "exactly-once":
        config["transactional.id"] = job["transactional_id"]
        if job.get("batch"):
            options["commit_interval"] = WHOLE
        if job.get("transactions_in_flight"):
            options["transactions_in_flight"] = job["transactions_in_flight"]
    return CLASSES[guarantee](config, **options)


# -- producing --------------------------------------------------------------------------------------------------------------


def produce(job: Job) -> Result:
    """Send records, until the outcome of each is known; at most once: until all are sent."""
    value = os.urandom(job["size"])
    with client(job) as kafka:
        send = _send_in_transactions if guarantee_of(job) == "exactly-once" else _send
        send(kafka, job, value, 1)
        first = time.monotonic()
        transactions = send(kafka, job, value, job["messages"])
        return {"seconds": time.monotonic() - first, "first": first - BEGAN, "transactions": transactions}


def _send(kafka: AtLeastOnce | AtMostOnce, job: Job, value: bytes, count: int) -> None:
    topic, keys, produce = job["output"], KEYS, kafka.produce
    for number in range(count):
        produce(topic, value, keys[number % 500])
    kafka.flush(FIRST)  # raises what became of any of them


def _send_in_transactions(kafka: ExactlyOnce, job: Job, value: bytes, count: int) -> int:
    topic, keys, size, transactions = job["output"], KEYS, job.get("batch") or TRANSACTION, 0
    for start in range(0, count, size):
        with kafka.transaction() as tx:
            for number in range(start, min(start + size, count)):
                tx.produce(topic, value, keys[number % 500])
        transactions += 1
    return transactions


# -- consuming --------------------------------------------------------------------------------------------------------------


class Counted:
    """A handler that ends its run after so many messages.

    It is a generator that messages are sent into: counting then costs no more than the call of an empty function.

    Args:
        kafka: the client whose run it is.
        count: messages.
        output: topic for a copy of each; None: nothing is done with them.

    Attributes:
        first: when the first message was in hand.
    """

    def __init__(self, kafka: Any, count: int, output: str | None) -> None:
        self.first = BEGAN  # until it is
        self._kafka = kafka
        handling = self._ignoring(count) if output is None else self._copying(count, output)
        next(handling)
        self.handle = handling.send

    def _ignoring(self, count: int) -> Handling:
        yield None
        self.first = time.monotonic()
        for _ in range(count - 1):
            yield None
        yield from self._over()

    def _copying(self, count: int, output: str) -> Handling:
        message = yield None
        self.first = time.monotonic()
        for _ in range(count - 1):
            message = yield [Record(output, message.value(), message.key())]
        self._kafka.stop()
        yield [Record(output, message.value(), message.key())]
        while True:
            yield None

    def _over(self) -> Handling:
        self._kafka.stop()
        while True:
            yield None


def consume(job: Job) -> Result:
    """Handle messages by an empty handler, offsets committed as the guarantee does it."""
    return _run(job, None)


def transform(job: Job) -> Result:
    """Copy each message to the output."""
    return _run(job, job["output"])


def _run(job: Job, output: str | None) -> Result:
    with client(job) as kafka:
        counted = Counted(kafka, job["messages"], output)
        kafka.run([job["input"]], counted.handle, **({"max_batch": job["batch"]} if job.get("batch") else {}))
        return {"seconds": time.monotonic() - counted.first, "first": counted.first - BEGAN}


def echo(job: Job) -> Result:
    """Copy each message to the output as soon as it comes. Says ``ready`` when it is a member of its group."""
    with client(job) as kafka:
        counted = Counted(kafka, job["messages"], job["output"])
        threading.Thread(target=_announce, args=(job,), daemon=True).start()
        kafka.run([job["input"]], counted.handle)
        return {"seconds": time.monotonic() - counted.first, "first": counted.first - BEGAN}


def _announce(job: Job) -> None:
    """Say ``ready`` once the group, which is new, has decided where it begins."""
    quiet = {"log_level": 0, "bootstrap.servers": job["bootstrap"], **job.get("config", {})}
    asker = Consumer({**quiet, "group.id": job["group"]})
    partitions = [
        TopicPartition(job["input"], number) for number in asker.list_topics(job["input"]).topics[job["input"]].partitions
    ]
    while not _all_committed(asker, partitions):
        time.sleep(0.05)
    asker.close()
    print("ready", flush=True)  # noqa: T201 - whoever started it waits for that


def _all_committed(asker: Consumer, partitions: list[TopicPartition]) -> bool:
    try:
        return all(partition.offset >= 0 for partition in asker.committed(partitions, timeout=FIRST))
    except KafkaException:
        return False  # the coordinator is not there yet


WORKS = {"produce": produce, "consume": consume, "transform": transform, "exactly-once": transform, "echo": echo}

if __name__ == "__main__":
    main()
