"""How long single messages take, as readers of committed records see it: plain clients, beside the process that is measured."""

from __future__ import annotations

import struct
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, Producer, TopicPartition

from .plan import RATE, WARM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from confluent_kafka import Message
    from typing_extensions import Self

ANSWER = 30.0  # seconds that one request, and the first copy, may take
LATE = 5.0  # seconds after which a copy that has not come is missing
STAMP = struct.Struct("<qq")  # of a message: its number, and when it was sent, in nanoseconds of the monotonic clock
_QUIET: dict[str, Any] = {"log_level": 0}


class Audience:
    """Reads committed records as they become visible, from now on until no more come. A context manager.

    Args:
        config: librdkafka's properties that reach the cluster.
        topic, partitions: what is read.
        note: called with each record.
    """

    def __init__(
        self, config: Mapping[str, Any], topic: str, partitions: Iterable[int], note: Callable[[Message], object]
    ) -> None:
        self._note = note
        self._reader = Consumer(
            {
                **_QUIET,
                **config,
                "group.id": f"{topic}-reader",  # required, and not used: nothing is subscribed or committed
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 10,
                "fetch.queue.backoff.ms": 2,
            }
        )
        places = [TopicPartition(topic, number) for number in partitions]
        for place in places:
            place.offset = self._reader.get_watermark_offsets(place, timeout=ANSWER)[1]
        self._reader.assign(places)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _read(self) -> None:
        with closing(self._reader):
            while True:
                over = self._over.is_set()
                first = self._reader.poll(0.2)  # consume() alone would wait until it has as many as it was asked for
                if first is not None:
                    for message in (first, *self._reader.consume(1000, 0)):
                        if message.error() is None:
                            self._note(message)
                elif over:
                    return  # not before: the records that waited longest come last


class Ages:
    """How old records are when they are read, by the time in them that their producer has set."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def note(self, message: Message) -> None:
        """One was read."""
        self.seconds.append(max(0.0, time.time() - message.timestamp()[1] / 1000))


class Echoes:
    """Sends messages at a steady pace, and notes when their copies can be read.

    Args:
        config: librdkafka's properties that reach the cluster.
        topic: where something copies messages from.
        size: bytes of a value; those that the stamp needs, at least.
        count: messages that count.
    """

    def __init__(self, config: Mapping[str, Any], topic: str, size: int, count: int) -> None:
        self._producer = Producer({**_QUIET, **config, "linger.ms": 0, "acks": "all"})
        self._topic = topic
        self._rest = bytes(max(0, size - STAMP.size))
        self._count = count
        self._came = threading.Condition()
        self._times: dict[int, float] = {}  # by number; the first copy counts

    @property
    def all(self) -> int:
        """Messages, with those that do not count."""
        return 1 + WARM + self._count

    def note(self, message: Message) -> None:
        """A copy was read."""
        value = message.value()
        number, sent = STAMP.unpack_from(value if isinstance(value, bytes) else b"")
        with self._came:
            self._times.setdefault(number, (time.monotonic_ns() - sent) / 1e9)
            self._came.notify_all()

    def send_all(self) -> list[float]:
        """Send all at the pace, wait for their copies, and say how many seconds those that count took.

        Raises:
            TimeoutError: nothing is copied.
        """
        self._send(0)
        self._producer.flush(ANSWER)
        with self._came:
            if not self._came.wait_for(lambda: 0 in self._times, ANSWER):
                raise TimeoutError(f"no copy of a message came within {ANSWER:.0f} s")
        began = time.monotonic()
        for number in range(1, self.all):
            time.sleep(max(0.0, began + number / RATE - time.monotonic()))
            self._send(number)
        self._producer.flush(ANSWER)
        with self._came:
            self._came.wait_for(lambda: len(self._times) >= self.all, LATE)
            return [seconds for number, seconds in self._times.items() if number > WARM]

    def _send(self, number: int) -> None:
        self._producer.produce(self._topic, STAMP.pack(number, time.monotonic_ns()) + self._rest, b"%08d" % (number % 500))
        self._producer.poll(0)
