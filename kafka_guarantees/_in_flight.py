"""Transactions in flight: each one ends in a thread of its own, while the loop fetches and handles what comes next.

On a replicated cluster a transaction spends most of its time waiting for the markers of the last one to be replicated. So
several producers take turns. Rules.
* Records of a transaction are produced once those of the one before it are with the brokers: outputs keep the order of inputs.
* Its offsets are sent once those of the one before it are: of two offsets of a group the one that came last counts, whichever
  is committed last. Where those may have been sent twice, once the one before it is over: one of the two may still come.
* It is committed once the one before it is committed: nothing overtakes.
* Where one is not committed, none behind it is, and the messages of all of them are fetched again. Each is aborted in its
  thread: the loop may be with a handler that takes its time, and readers wait for an open transaction (X16).
* Nothing is in flight while partitions are given away, or while the brokers are asked where the group is: what is in flight
  would be fetched a second time.
* A producer belongs to the thread of its flight until that ended, and to the loop from then on (X26). So a run does not end
  before that, whatever signal handlers raise meanwhile.
* These threads are daemons, unlike those of an executor: a run may go on in a thread when the main thread is done, and a
  process that ends waits for no broker.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from ._threads import Flag, Task, hand
from ._transactional import AbortNeeded, InDoubt
from .errors import AuthorizationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ._lifecycle import Lifecycle
    from ._offsets import Partition
    from ._threads import Calls
    from ._transactional import TransactionalProducer

log = logging.getLogger("kafka_guarantees")

SERVE = 0.5  # seconds between two looks at the callbacks of producers that have nothing to do
GRACE = 1.0  # seconds for what is in flight when a run ends with an error; then it is not waited for any longer


class Flight:
    """The end of one transaction, after its last record was produced.

    Args:
        producer: has the transaction.
        partitions: what it consumed is of these. Not the messages: they may be many, and are handled.
        size: how many messages it consumed.
        before: the transaction before it, where that is in flight.
        finish: ends it, in another thread.
    """

    __slots__ = (
        "_acknowledged",
        "_before",
        "_sent",
        "_task",
        "committing",
        "ended",
        "grounded",
        "partitions",
        "producer",
        "size",
    )

    def __init__(
        self,
        producer: TransactionalProducer,
        partitions: Iterable[Partition],
        size: int,
        before: Flight | None,
        finish: Callable[[Flight], None],
    ) -> None:
        self.producer = producer
        self.partitions = partitions
        self.size = size
        self._before = before
        self._task = Task(partial(self._end, finish))
        self._acknowledged = Flag()
        self._sent = Flag()
        self.committing = False  # its commit was asked for
        self.grounded = False  # not to be begun any more
        self.ended = self._task.ended

    @property
    def begun(self) -> bool:
        """Whether a thread has begun it."""
        return self._task.begun

    def fly(self) -> None:
        """End the transaction, where no other thread does. Never raises."""
        if self._task.run():
            self._before = None
            self._acknowledged.set()
            self._sent.set()

    def _end(self, finish: Callable[[Flight], None]) -> None:
        if self.grounded:
            raise AbortNeeded("it was not begun")
        try:
            finish(self)
        except (AbortNeeded, InDoubt):
            if not self.producer.hurry:  # else the end of the run sees to it
                self.producer.abort()
            raise

    def acknowledged(self) -> None:
        """Its records are with the brokers: those of the next one may follow."""
        self._acknowledged.set()

    def until_acknowledged(self) -> None:
        """Wait for its records to be with the brokers, or for its end."""
        self._acknowledged.wait()

    def follow_offsets(self) -> None:
        """Wait until the offsets of the transaction before it are with the brokers.

        Raises:
            AbortNeeded: that has failed, and so this one must not be committed.
        """
        if self._before is not None:
            self._before._sent.wait()
            if self._before.failed:
                raise AbortNeeded("one before it was not committed")

    def offsets_sent(self) -> None:
        """Its offsets are with the brokers: those of the next one may follow."""
        self._sent.set()

    def follow(self) -> None:
        """Wait until the transaction before it is committed.

        Raises:
            AbortNeeded: it is not, and so this one must not be.
        """
        if self._before is not None and self._before.failure is not None:
            raise AbortNeeded("one before it was not committed")

    @property
    def failure(self) -> BaseException | None:
        """Waits for its end, and tells why it is not committed; None: it is."""
        self.ended.wait()
        return self._task.error

    @property
    def failed(self) -> bool:
        """Whether it has ended without being committed."""
        return self.ended.is_set and self._task.error is not None

    @property
    def landed(self) -> bool:
        """Whether it is committed."""
        return self.ended.is_set and self._task.error is None


class InFlight:
    """The transactions of one client that are in flight.

    Args:
        producers: each has one transaction in flight; the next one begins once a producer is free.
        lifecycle: of the client.
    """

    def __init__(self, producers: Sequence[TransactionalProducer], lifecycle: Lifecycle) -> None:
        self.producers = producers
        self._lifecycle = lifecycle
        self._free = deque(producers)
        self._flights: deque[Flight] = deque()
        self._preparing: list[Task] = []
        self._served = 0.0
        self._ended = True  # the last run
        self._hands: dict[TransactionalProducer, Calls] = {}

    def prepare(self) -> None:
        """Have producers for a run, and end what the last one left open with their ids: at the same time, since each takes it.

        Where an ACL allows the first id only, there is one transaction in flight.

        Raises:
            FencedError, AuthorizationError, BrokerError: see the class.
        """
        self.end()  # an exception out of a signal handler may have kept the last run from it
        self._ended = False
        first, *others = self.producers
        for producer in others:
            task = Task(producer.prepare)
            self._preparing.append(task)
            self._hand(producer).put(task.run)
        first.prepare()
        self._free = deque([first])
        for producer, prepared in zip(others, self._preparing, strict=True):
            try:
                prepared.result()
            except AuthorizationError as error:
                log.warning("%d of %d transactions in flight: %s", len(self._free), len(self.producers), error)
                break
            self._free.append(producer)
        for producer in self._free:
            producer.persists = True

    # -- the loop ---------------------------------------------------------------------------------------------------------

    def next_producer(self) -> TransactionalProducer | None:
        """Wait for a producer whose transaction may begin. None: something in flight was not committed; see ``settle()``."""
        self._lifecycle.check_fork()
        while self._flights and (self._flights[0].landed or not self._free):
            if self._flights[0].failure is not None:
                return None
            self._free.append(self._flights.popleft().producer)
        if self._flights:
            self._flights[-1].until_acknowledged()
        return None if self.failed else self._free[0]

    def serve(self) -> None:
        """Serve what is free, now and then: librdkafka piles up statistics and log lines until it is polled.

        Without a limit (rd_kafka_stats_emit_all), and also while nothing is produced. Where a transaction begins, that does it.

        Raises:
            FencedError, AuthorizationError, BrokerError: as where a transaction begins.
        """
        now = time.monotonic()
        if now - self._served < SERVE:
            return
        self._served = now
        while self._flights and self._flights[0].landed:
            self._free.append(self._flights.popleft().producer)
        for producer in self._free:
            producer.serve()

    def take_off(self, partitions: Iterable[Partition], size: int, finish: Callable[[Flight], None]) -> None:
        """End the transaction of the next producer, which consumed ``size`` messages of these, while the loop goes on."""
        calls = self._hand(self._free[0])
        flight = Flight(self._free[0], partitions, size, self._flights[-1] if self._flights else None, finish)
        self._flights.append(flight)  # before anything else: ``end`` must know of it
        self._free.popleft()
        calls.put(flight.fly)

    # -- what was handled, and is not committed yet ------------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        """Whether something has ended without being committed."""
        return any(flight.failed for flight in self._flights)

    @property
    def unfinished(self) -> bool:
        """Whether something is not committed."""
        return not all(flight.landed for flight in self._flights)

    def wait(self) -> None:
        """Wait until nothing is in flight, whatever its end."""
        for flight in self._flights:
            flight.ended.wait()

    def settle(self) -> set[Partition]:
        """Wait until nothing is in flight. Returns the partitions of what was aborted: its messages come again.

        Raises:
            DeliveryError: a record cannot be written. Its transaction was aborted.
            KafkaGuaranteesError: the client was closed meanwhile.
            FencedError, AuthorizationError, BrokerError: see the class.
        """
        self._lifecycle.check_fork()
        self.wait()
        self._lifecycle.check()  # whoever closed the client meanwhile has ended its transactions in his own way
        again: set[Partition] = set()
        while self._flights:
            flight = self._flights.popleft()
            self._free.append(flight.producer)
            if flight.failure is not None:
                _aborted(flight, flight.failure, log.info if again else log.warning)
                again.update(flight.partitions)
        return again

    def end(self) -> None:
        """The end of a run. What is in flight then, after an error, is aborted where that is quick.

        Raises:
            BaseException: out of a signal handler, once nothing is in flight.
        """
        if self._lifecycle.forked or self._ended:
            return
        interrupt: BaseException | None = None
        grace = GRACE
        while True:
            try:
                self._land(grace)
                break
            except BaseException as exc:  # noqa: BLE001 - raised below
                interrupt, grace = interrupt or exc, 0.0
        for producer in self.producers:  # also one that an exception kept from taking off
            try:
                producer.abandon()
            except BaseException as exc:  # noqa: BLE001 - raised below
                interrupt = interrupt or exc
            producer.hurry = producer.persists = False
        hands, self._hands = self._hands, {}  # first: the next run has others
        for calls in hands.values():
            calls.put(None)
        self._ended = True
        if interrupt is not None:
            raise interrupt

    def _land(self, grace: float) -> None:
        """Wait for what other threads do, after ``grace`` seconds without patience."""
        for task in self._preparing:
            task.call_off()
        under_way = [*(task.ended for task in self._preparing), *(flight.ended for flight in self._flights)]
        until = time.monotonic() + grace
        for ended in under_way:
            ended.wait(until - time.monotonic())
        for flight in self._flights:
            if not flight.begun:
                flight.grounded = True
                self._hand(flight.producer).put(flight.fly)  # it may not have heard of it; here signal handlers raise
        for producer in self.producers:
            producer.hurry = True
        for ended in under_way:
            ended.wait()
        self._flights.clear()
        self._preparing.clear()

    def _hand(self, producer: TransactionalProducer) -> Calls:
        """The thread of a producer, as long as this run lasts."""
        if producer not in self._hands:
            self._hands[producer] = hand("kafka-guarantees-transaction", self._lifecycle.hands)
        return self._hands[producer]


def _aborted(flight: Flight, error: BaseException, say: Callable[..., None]) -> None:
    """A transaction was aborted, or nobody could say, and now the committed offsets tell.

    Raises:
        BaseException: what the next one would end with as well.
    """
    if not isinstance(error, (AbortNeeded, InDoubt)):
        raise error
    if flight.committing and isinstance(error, InDoubt):
        say("a transaction of %d messages is in doubt; its offsets will tell: %s", flight.size, error)
    else:
        say("a transaction of %d messages is aborted, and they are fetched again: %s", flight.size, error)
    failure = flight.producer.failure
    if failure is not None:
        raise failure  # it would fail again
