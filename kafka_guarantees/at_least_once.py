"""At least once: no message is lost, some may be handled again.

What happens to one message::

    fetched with others -> handled -> every record produced meanwhile is acknowledged -> still a member of the group?
    -> its offset committed, synchronously, with those of its portion

* A portion ends with the batch, after COMMIT_EVERY seconds of handling, or with the message before one that failed. What is
  repeated after a crash is at most one portion.
* A failing handler stops the run: nothing at or after its message is committed (L01).
* A record that was not acknowledged stops the run as well, whoever produced it, unless its ``result()`` raised that in the
  handler, which then knows (P01, L03).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ._consumer import GroupConsumer, check_run
from ._lifecycle import Lifecycle
from ._offsets import next_offsets
from ._producer import PlainProducer, raise_failures
from ._settings import Guarantee, explain, resolve
from .errors import AuthorizationError, BrokerError
from .records import Record, handler_error, records_in

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from types import TracebackType

    from confluent_kafka import Message
    from typing_extensions import Self

    from ._consumer import Batch, Start
    from ._lifecycle import Itself
    from ._offsets import Partition
    from ._settings import Explanation
    from .errors import KafkaGuaranteesError
    from .records import BatchHandler, Delivery, Handler, Headers, Payload

log = logging.getLogger("kafka_guarantees")

LEAVING = 10.0  # seconds that a loop which is left waits for brokers that do not answer
COMMIT_EVERY = 1.0  # seconds of handling between two commits inside a batch
MESSAGE_ID = "message-id"  # the header that carries the id of a logical message through every retry (D06)


class AtLeastOnce:
    """Produce and consume at least once: nothing acknowledged is lost; after a failure something may come again.

    Args:
        config: librdkafka's properties, for both sides. See ``explain()`` for what is set on top.
        start: where a group without committed offsets begins.

    Promised: every message is handled to its end at least once; an offset moves only after that, and after every record that
    was produced meanwhile is acknowledged by all in-sync replicas.
    Not promised: that it is handled only once. Even the idempotent producer can write a record twice (P08).

    Raises:
        UnsafeConfigError: a setting contradicts the guarantee. Nothing was connected.
    """

    def __init__(self, config: Mapping[str, object], /, *, start: Start = "earliest") -> None:
        self._settings = resolve(Guarantee.AT_LEAST_ONCE, config)
        self._start = start
        self._lifecycle = Lifecycle("AtLeastOnce")
        self._producer: PlainProducer | None = None
        self._seen: set[Partition] = set()

    # -- consuming ----------------------------------------------------------------------------------------------------

    def run(self, topics: Sequence[str], handler: Handler, *, max_batch: int = 2000, until_idle: float | None = None) -> None:
        """Call ``handler`` for every message of ``topics``; records that it returns are produced before its offset moves.

        Blocks until ``stop()``, until SIGINT or SIGTERM if this is the main thread, or until no message has come for
        ``until_idle`` seconds. The message in hand is finished and committed, and the group left, before it returns.

        Args:
            topics: names, or patterns that begin with ``^``.
            handler: called with a ``confluent_kafka.Message``; returns or yields ``Record``, or returns None.
            max_batch: messages fetched at a time, and the most that are repeated after a crash.
            until_idle: seconds.

        Raises:
            HandlerError: the handler raised. What it finished before is committed, nothing at or after that message.
            DeliveryError, DeliveryUnknown: a record was not acknowledged; nothing of its portion is committed.
            OffsetsLost, AuthorizationError, BrokerError: see there.
        """
        with self._consuming(topics, max_batch) as consumer:
            for batch in consumer.batches(max_batch, until_idle):
                rest = batch.messages
                while rest:
                    done, failure = self._handle(handler, rest)
                    if not self._finish(consumer, batch, rest[:done]):
                        break
                    if failure is not None:
                        raise failure
                    rest = rest[done:]
                    if rest and self._must_poll(batch):
                        consumer.rewind(rest)
                        break

    def _handle(self, handler: Handler, messages: Sequence[Message]) -> tuple[int, KafkaGuaranteesError | None]:
        """Handle messages until the portion is full, the client is to stop, or one fails. Returns how many are finished."""
        clock, lifecycle, done = time.monotonic, self._lifecycle, 0
        until = clock() + COMMIT_EVERY
        for message in messages:
            try:
                records = handler(message)
                if records is not None:
                    for record in records_in(records):
                        self._send(record)
            except Exception as error:  # noqa: BLE001 - it is raised as HandlerError, after what came before is committed
                failure = handler_error(message, error)
                failure.__cause__ = error
                return done, failure
            done += 1
            if clock() >= until or lifecycle.stopping:
                break
        return done, None

    def run_batches(
        self, topics: Sequence[str], handler: BatchHandler, *, max_batch: int = 2000, until_idle: float | None = None
    ) -> None:
        """Like ``run``, with a handler that takes a whole batch. Where it raises, nothing of the batch is committed."""
        with self._consuming(topics, max_batch) as consumer:
            for batch in consumer.batches(max_batch, until_idle):
                try:
                    for record in records_in(handler(batch.messages)):
                        self._send(record)
                except Exception as error:
                    raise handler_error(batch.messages[0], error) from error
                self._finish(consumer, batch, batch.messages)

    def messages(
        self, topics: Sequence[str], *, max_batch: int = 2000, until_idle: float | None = None
    ) -> Generator[Message, None, None]:
        """Iterate over messages; a message is finished when the loop asks for the next one.

        A loop that is left by ``break`` or by an exception has not finished the message in hand: it comes again. Signals are
        left to the caller. Use ``with`` around the client, so that the group is left at once.

        Raises:
            DeliveryError, DeliveryUnknown: a record was not acknowledged; nothing of its portion is committed.
            OffsetsLost, AuthorizationError, BrokerError: see there.
        """
        check_run(self._settings, self._lifecycle, topics, max_batch)
        return self._lifecycle.iterate(lambda itself: self._messages(topics, max_batch, until_idle, itself))

    def _messages(
        self, topics: Sequence[str], max_batch: int, until_idle: float | None, itself: Itself
    ) -> Generator[Message, None, None]:
        with self._consuming(topics, max_batch, itself) as consumer:
            for batch in consumer.batches(max_batch, until_idle):
                rest = batch.messages
                while rest:
                    done, until = 0, time.monotonic() + COMMIT_EVERY
                    try:
                        for message in rest:
                            yield message
                            done += 1
                            if time.monotonic() >= until or self._lifecycle.stopping:
                                break
                    except GeneratorExit:
                        self._lifecycle.leave(LEAVING)
                        self._finish(consumer, batch, rest[:done])
                        raise
                    if not self._finish(consumer, batch, rest[:done]):
                        break
                    rest = rest[done:]
                    if rest and self._must_poll(batch):
                        consumer.rewind(rest)
                        break

    def _must_poll(self, batch: Batch) -> bool:
        """Whether the rest of a batch must be given back: to stop, or since the group wants to hear of us (C10)."""
        late = time.monotonic() - batch.fetched > self._settings.max_poll_interval / 2
        return late or self._lifecycle.stopping

    def _finish(self, consumer: GroupConsumer, batch: Batch, messages: Sequence[Message]) -> bool:
        """Wait for what was produced, then commit what was handled. False: it was not committed, and comes again.

        Raises:
            DeliveryError, DeliveryUnknown: nothing was committed.
        """
        self._acknowledged()
        if not messages:
            return True
        while consumer.still_ours(batch, within=self._settings.max_poll_interval):
            try:
                consumer.commit(next_offsets(messages).values())
            except AuthorizationError:
                raise
            except BrokerError as exc:
                log.warning("%s", exc)
                if self._lifecycle.stopping:
                    return False
                time.sleep(0.1)
            else:
                return True
        log.warning("the group gave partitions away: up to %d messages that were handled are handled again", len(messages))
        consumer.rewind(batch.messages)
        return False

    def _acknowledged(self) -> None:
        """Wait until everything produced is acknowledged. Nothing is committed past a record that is not (P01)."""
        if self._producer is not None:
            left = self._producer.flush(lambda: self._lifecycle.out_of_patience)
            self._raise_failures(left, "Nothing was committed past the messages it came from.")

    @contextmanager
    def _consuming(self, topics: Sequence[str], max_batch: int, itself: Itself | None = None) -> Iterator[GroupConsumer]:
        check_run(self._settings, self._lifecycle, topics, max_batch)
        with self._lifecycle.running(itself):
            consumer = GroupConsumer(self._settings, self._lifecycle, topics, self._start, self._seen)
            try:
                yield consumer
            finally:
                consumer.close()

    # -- producing ----------------------------------------------------------------------------------------------------

    def produce(
        self,
        topic: str,
        value: Payload = None,
        key: Payload = None,
        *,
        headers: Headers = None,
        partition: int | None = None,
        timestamp: int | None = None,
        message_id: str | bytes | None = None,
    ) -> Delivery:
        """Send a record, and keep trying until it is acknowledged or ``delivery.timeout.ms`` has passed.

        Args:
            topic, value, key, headers, partition, timestamp: see ``Record``.
            message_id: written to the header ``message-id``, by which a reader can tell a repeat.

        Returns:
            What becomes of it. A failure that ``result()`` has not raised is raised by the next ``produce``, ``flush`` or
            ``close``; inside a run it is raised by the run, which commits nothing past it.

        Raises:
            DeliveryError, DeliveryUnknown: an *earlier* record failed and nobody looked. This one was not sent.
            TypeError, ValueError: it is not a record.
            ForkedClientError: made by another process.
        """
        self._lifecycle.check()
        if message_id is not None:
            pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
            headers = [*pairs, (MESSAGE_ID, message_id)]
        record = Record(topic, value, key, headers=headers, partition=partition, timestamp=timestamp)
        if self._producer is not None and self._producer.failed and not self._lifecycle.in_run:
            self._raise_failures(0, "This record was not sent.")
        return self._send(record)

    def _send(self, record: Record) -> Delivery:
        self._lifecycle.check()
        if self._producer is None:
            self._producer = PlainProducer(self, self._settings, self._lifecycle)
        return self._producer.produce(record)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every record is acknowledged.

        Args:
            timeout: seconds; None waits as long as ``delivery.timeout.ms`` allows each record.

        Raises:
            DeliveryError, DeliveryUnknown: records were not written, or not acknowledged in time; with their number.
        """
        self._lifecycle.check()
        if self._producer is not None:
            deadline = None if timeout is None else time.monotonic() + timeout
            left = self._producer.flush(lambda: deadline is not None and time.monotonic() >= deadline)
            self._raise_failures(left, "What was acknowledged is safe.")

    def _raise_failures(self, left: int, safe: str) -> None:
        if self._producer is None:
            return
        # in a run only the run forgets them: it must not commit past them, whoever saw them
        forget = self._lifecycle.in_hand or not self._lifecycle.in_run
        raise_failures(self._producer.failures(forget=forget), left, safe)

    # -- ending -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask ``run`` to return after what is in hand. Safe in threads and signal handlers; without a run it ends the next."""
        self._lifecycle.stop()

    def close(self, timeout: float | None = None) -> None:
        """End a run, wait for acknowledgements, and let the clients go, within ``timeout`` seconds (None: 30).

        Raises:
            DeliveryError, DeliveryUnknown: records were not written, or not acknowledged in time; with their number.
        """
        if self._lifecycle.closed or self._lifecycle.forked:
            return
        timeout = 30.0 if timeout is None else timeout
        deadline = time.monotonic() + timeout
        if not self._lifecycle.end_run(timeout):
            log.warning("the handler has not returned within %.1f s; what it has in hand is not committed", timeout)
        self._lifecycle.closed = True
        if self._producer is not None:
            self._producer.close(max(0.0, deadline - time.monotonic()))
            self._raise_failures(0, "What was acknowledged is safe.")

    def __enter__(self) -> Self:
        self._lifecycle.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            log.exception("close() failed after the error that is raised")  # never hide the first error

    @classmethod
    def explain(cls, config: Mapping[str, object] | None = None) -> Explanation:
        """What this guarantee sets and why, with ``config`` on top. Needs no broker; never shows a secret."""
        return explain(Guarantee.AT_LEAST_ONCE, config)
