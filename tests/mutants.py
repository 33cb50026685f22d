"""Mutants: the library with one lie built in, for ``test_prove_mutants.py``. A proof that misses them proves nothing (H01).

``python tests/mutants.py NAME`` is a worker of a proof, as the mutant NAME. What is patched is the library's behaviour, in that
process, before it begins; never the checks or the faults.

Each mutant is a function that patches. Its docstring says which lie it tells, and which hazard that is; its decorator, which
faults bring it to light, and under the name of which check.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import random
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException, Producer, TopicPartition

from kafka_guarantees import (
    AtLeastOnce,
    AtMostOnce,
    DeliveryUnknown,
    ExactlyOnce,
    Record,
    TransactionAborted,
    at_least_once,
    at_most_once,
    exactly_once,
)
from kafka_guarantees._at_least_once_run import Run
from kafka_guarantees._client import Callbacks
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._enqueue import enqueue
from kafka_guarantees._in_flight import Flight
from kafka_guarantees._offsets import next_offsets, not_before
from kafka_guarantees._pace import Pace
from kafka_guarantees._posted import Posted
from kafka_guarantees._producer import PlainProducer
from kafka_guarantees._trail import Portion
from kafka_guarantees._transaction_state import State, TransactionState
from kafka_guarantees._transactional import AbortNeeded, InDoubt, TransactionalProducer
from kafka_guarantees.errors import BrokerError
from kafka_guarantees.prove import life, worker
from kafka_guarantees.records import Delivery, records_in
from kafka_guarantees.transaction import Transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


AMO, ALO, EOS = "at-most-once", "at-least-once", "exactly-once"


@dataclass(frozen=True)
class Mutant:
    """One lie.

    Attributes:
        name: of the function that patches.
        guarantee: that it breaks.
        lie: what it does wrong, with the hazard.
        patch: makes this process lie.
        faults: by their names in ``test_prove_mutants.py``, which bring it to light.
        caught_by: names of checks: at least one must complain.
        failing: the share of handlings that raise.
        plan: more of the plan of its proof.
    """

    name: str
    guarantee: str
    lie: str
    patch: Callable[[], None]
    faults: Sequence[str]
    caught_by: frozenset[str]
    failing: float
    plan: Mapping[str, Any] = field(default_factory=dict)


MUTANTS: dict[str, Mutant] = {}
AT_WORK: Mapping[str, Any] = {"session": 1500, "duration": 11.0}  # time for some kills, each once the group has recovered
IN_HAND: Mapping[str, Any] = {"session": 1200, "handling": 0.008, "rate": 60.0, "duration": 17.0}  # much is in hand at a time
FAILING = 1 / 30  # of handlings raise, where that is what brings a lie to light


def mutant(
    guarantee: str, *caught_by: str, faults: Sequence[str] = (), failing: float = life.FAILING, **plan: Any
) -> Callable[[Callable[[], None]], None]:
    """Make a mutant of a function that patches."""

    def made(patch: Callable[[], None]) -> None:
        name, lie = patch.__name__.strip("_"), " ".join((inspect.getdoc(patch) or "").split())
        MUTANTS[name] = Mutant(name, guarantee, lie, patch, faults, frozenset(caught_by), failing, plan)

    return made


# -- how to lie -----------------------------------------------------------------------------------------------------------


def instead(owner: Any, *names: str) -> Callable[[Callable[..., Any]], None]:
    """Put a function in the place of others, each of which it gets as its first argument."""

    def put(function: Callable[..., Any]) -> None:
        for name in names:
            setattr(owner, name, _with(getattr(owner, name), function))

    return put


def _with(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    called = inspect.signature(original).parameters.values()
    by_name = {parameter.name: None for parameter in called if parameter.kind is parameter.KEYWORD_ONLY}
    by_place = [
        parameter for parameter in called if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    inspect.signature(function).bind(original, *by_place, **by_name)  # else it would crash, and be caught for that

    @functools.wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    return changed


def configured(*, producer: Mapping[str, object] | None = None, consumer: Mapping[str, object] | None = None) -> None:
    """Change what the C clients are made with, behind the back of all refusals."""
    for module in (at_most_once, at_least_once, exactly_once):

        @instead(module, "resolve")
        def _(original: Any, *args: Any, **kwargs: Any) -> Any:
            settings = original(*args, **kwargs)
            return dataclasses.replace(
                settings,
                producer={**settings.producer, **(producer or {})},
                consumer={**settings.consumer, **(consumer or {})},
            )


def handlers_are(changed: Callable[[Callable[[Any], Iterator[Any]]], Callable[[Any], Iterator[Any]]], owner: Any) -> None:
    """Change the handlers that a user gives."""
    for way in ("run", "run_batches"):

        @instead(owner, way)
        def _(original: Any, self: Any, topics: Any, handler: Any, **options: Any) -> None:
            original(self, topics, changed(handler), **options)


def swallowing(handler: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    """A handler that never raises; what it had produced by then counts."""

    def swallowed(given: Any) -> Iterator[Any]:
        with suppress(Exception):
            yield from records_in(handler(given))

    return swallowed


def nobody_looks_at_the_membership() -> None:
    """Whatever is in hand counts as ours, and is not given back, however long that takes."""

    @instead(GroupConsumer, "still_ours")
    def _(_original: Any, _self: Any, _batch: Any, *, within: float) -> bool:
        return True

    @instead(Pace, "__init__")
    def _(original: Any, self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.late = math.inf


def keep_alive(consumer: Any, batch: Any) -> None:
    """Poll with messages in hand for long: rebalances are served, and a member that was thrown out joins again."""
    asked = until = time.monotonic()
    if asked - batch.served > 1.0 and consumer.__dict__.get("kept") is not batch:
        consumer.__dict__["kept"] = batch
        until += 4.0
    while time.monotonic() < until:
        message = consumer.raw.poll(0.1)
        if message is not None and message.error() is None:
            consumer.unplace([(message.topic(), message.partition())])
        now = consumer.membership()
        if (time.monotonic() > asked + 0.5) if now == batch.member else (now.active and consumer._assignment.owned):
            break


# -- at most once ---------------------------------------------------------------------------------------------------------


@mutant(AMO, "handled more than once", faults=["kill handlers at work"], **AT_WORK)
def amo_commits_by_the_clock() -> None:
    """What was handed out is committed in the background, instead of a commit before the handling (P03, M01)."""
    configured(consumer={"enable.auto.commit": True, "enable.auto.offset.store": True})

    @instead(GroupConsumer, "commit")
    def _(_original: Any, _self: Any, _offsets: Any) -> None:
        pass


@mutant(AMO, "handled more than once", faults=["kill handlers at work"], **AT_WORK)
def amo_commits_after_handling() -> None:
    """A portion is committed once it is handled, not before (M01)."""

    @instead(AtMostOnce, "_portions_of")
    def _(_original: Any, self: Any, consumer: Any, pace: Pace, until_idle: Any) -> Iterator[Any]:
        for batch in consumer.batches(pace, until_idle, self._reading):
            rest = not_before(batch.messages, self._handled, batch.spans)
            while rest and not self._lifecycle.stopping:
                portion, rest = rest[:50], rest[50:]
                yield portion
                if not self._committed(consumer, batch, portion):
                    break


@mutant(AMO, "handled more than once", "offset regression", faults=["freeze in hand"], **IN_HAND)
def amo_does_not_ask_whether_it_is_a_member() -> None:
    """A member polls with messages in hand, and handles them also if the group has given them away meanwhile (M03, X02)."""
    nobody_looks_at_the_membership()

    @instead(AtMostOnce, "_committed")
    def _(original: Any, self: Any, consumer: Any, batch: Any, portion: Any) -> bool:
        keep_alive(consumer, batch)
        return bool(original(self, consumer, batch, portion))


@mutant(AMO, "handled more than once", "offset regression", faults=["churn one"], duration=14.0)
def amo_commits_what_it_remembers() -> None:
    """A member commits once more what it had committed last, as it gets a partition back that others had meanwhile (M03)."""
    mine: dict[tuple[str, int], TopicPartition] = {}

    @instead(GroupConsumer, "_check_commit")
    def _(original: Any, self: Any, answer: Any) -> None:
        original(self, answer)
        mine.update(
            {(place.topic, place.partition): TopicPartition(place.topic, place.partition, place.offset) for place in answer}
        )

    @instead(GroupConsumer, "_on_assign")
    def _(original: Any, self: Any, raw: Any, partitions: Any) -> None:
        offsets = [mine[place.topic, place.partition] for place in partitions if (place.topic, place.partition) in mine]
        with suppress(KafkaException):
            raw.commit(offsets=offsets, asynchronous=False)
        original(self, raw, partitions)


@mutant(AMO, "handled more than once", faults=["freeze in hand"], **IN_HAND)
def amo_handles_after_a_commit_that_failed() -> None:
    """A commit without an answer, or with a refusal, counts as done, and nobody looks at the clock (M02)."""

    @instead(GroupConsumer, "commit")
    def _(original: Any, *args: Any) -> None:
        with suppress(BrokerError):
            original(*args)

    nobody_looks_at_the_membership()


@mutant(AMO, "handled more than once", faults=["churn"], patience=4.0)
def amo_commits_the_offset_of_the_last() -> None:
    """The offset that is committed is the one of the last message, not the one after it (C04)."""

    def same(messages: Any, topic: Any = None) -> Any:
        offsets = next_offsets(messages, topic)
        for offset in offsets.values():
            offset.offset -= 1
        return offsets

    at_most_once.next_offsets = same  # type: ignore[attr-defined]


@mutant(AMO, "handled more than once", faults=["churn"])
def amo_tries_again() -> None:
    """A handler that raises is called again for the same message (M04)."""

    def again(handler: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        def twice(given: Any) -> Iterator[Any]:
            try:
                yield from records_in(handler(given))
            except Exception:  # noqa: BLE001 - that is the mutant
                yield from records_in(handler(given))

        return twice

    handlers_are(again, AtMostOnce)
    left: list[Any] = []

    @instead(AtMostOnce, "_messages")
    def _(original: Any, *args: Any) -> Iterator[Any]:
        while left:
            yield left.pop()
        for message in original(*args):
            left[:] = [message]
            yield message
            left.clear()


@mutant(AMO, "activity", patience=4.0)
def amo_does_nothing() -> None:
    """Nothing is ever handled, and so nothing is handled twice (H10)."""

    @instead(GroupConsumer, "batches")
    def _(original: Any, *args: Any) -> Iterator[Any]:
        for _ in original(*args):
            pass
        yield from ()


@mutant(AMO, "activity", "calm loss")
def amo_drops_half() -> None:
    """Every other portion is committed, and not handled (H10, M07)."""

    @instead(AtMostOnce, "_committed")
    def _(original: Any, *args: Any) -> bool:
        return bool(original(*args)) and random.random() < 0.5


# -- at least once --------------------------------------------------------------------------------------------------------


@mutant(ALO, "unseen", faults=["kill handlers at work"], **AT_WORK)
def alo_commits_before_handling() -> None:
    """A batch is committed as it is fetched (L01)."""

    @instead(GroupConsumer, "batches")
    def _(original: Any, self: Any, *args: Any) -> Iterator[Any]:
        for batch in original(self, *args):
            self.commit(next_offsets(batch.messages).values())
            yield batch


@mutant(ALO, "unseen", faults=["churn"])
def alo_commits_its_position() -> None:
    """What is committed is the consumer's position: everything that was handed out, handled or not (C02)."""
    for way in ("commit", "send_commit"):

        @instead(GroupConsumer, way)
        def _(original: Any, self: Any, offsets: Any) -> None:
            original(self, [place for place in self.raw.position(list(offsets)) if place.offset >= 0])


@mutant(ALO, "unseen", faults=["kill handlers at work"], **AT_WORK)
def alo_commits_by_the_clock() -> None:
    """What was handed out is committed in the background, handled or not (P03)."""
    configured(consumer={"enable.auto.commit": True, "enable.auto.offset.store": True, "auto.commit.interval.ms": 200})

    for way in ("commit", "send_commit"):

        @instead(GroupConsumer, way)
        def _(_original: Any, _self: Any, _offsets: Any) -> None:
            pass


@mutant(ALO, "unseen", "poll skip", faults=["churn"])
def alo_goes_on_past_a_failure() -> None:
    """A handler that raised is logged, and the highest offset that is done is committed: max(done) (L01)."""
    handlers_are(swallowing, AtLeastOnce)

    @instead(Run, "finish")
    def _(original: Any, *args: Any, to_the_end: bool = False) -> Any:
        *given, work, handled = args
        left = sys.exc_info()[0] is GeneratorExit  # a loop over messages() that was left by an exception
        return original(*given, work, len(work.fresh) if left else handled, to_the_end=to_the_end)


@mutant(ALO, "lost output", faults=["kill transformers at work"], config={"linger.ms": 300}, **AT_WORK)
def alo_does_not_wait_for_acknowledgements() -> None:
    """An offset is committed while the records that were produced for it are still in the queue (P01, L03)."""

    @instead(Run, "acknowledged")
    def _(_original: Any, _self: Any) -> None:
        pass

    Portion.acknowledged = True  # type: ignore[assignment,method-assign]


@mutant(ALO, "lost output", failing=FAILING)
def alo_believes_every_report() -> None:
    """An output that the brokers have refused, or that timed out, counts as written: a report came (P01, L03)."""

    @instead(Posted, "report")
    def _(original: Any, self: Any, _error: Any, message: Any) -> None:
        original(self, None, message)


@mutant(ALO, "lost write", faults=["kill senders"], config={"linger.ms": 300})
def alo_says_acknowledged_at_once() -> None:
    """A delivery counts as done as soon as it is queued (P01, P04)."""

    @instead(PlainProducer, "deliver")
    def _(_original: Any, self: Any, topic: Any, *parts: Any) -> Delivery:
        value, key, headers, partition, timestamp, _timeout = parts
        delivery = Delivery(topic, self)
        self.send(Record(topic, value, key, headers=headers, partition=partition, timestamp=timestamp))
        delivery._outcome = None, 0
        return delivery


@mutant(ALO, "unseen", "poll skip")
def alo_skips_what_is_empty() -> None:
    """`if message.value()` for `is not None`: a message with an empty value, or with none, is passed over (L02)."""

    @instead(GroupConsumer, "_without_events")
    def _(original: Any, self: Any, fetched: Any) -> Any:
        return [message for message in original(self, fetched) if message.value()]


@mutant(ALO, "poll skip", "order per key")
def alo_handles_backwards() -> None:
    """A batch is handled from its end to its beginning (L01)."""

    @instead(GroupConsumer, "fetch")
    def _(original: Any, *args: Any) -> Any:
        batch = original(*args)
        if batch is not None:
            batch.messages = batch.messages[::-1]
        return batch


@mutant(ALO, "order per key")
def alo_chooses_any_partition() -> None:
    """Records go to any partition, whatever their key (P18)."""
    configured(producer={"partitioner": "random"})


@mutant(ALO, "unseen", "poll skip", faults=["storm", "raising callbacks"], duration=12.0)
def alo_goes_on_after_a_poll_that_raised() -> None:
    """An exception out of a poll, which destroys what it has fetched, is caught, and the loop goes on (C01)."""

    @instead(Callbacks, "shim")
    def _(_original: Any, _self: Any, _name: str, callback: Any) -> Any:
        return callback

    @instead(GroupConsumer, "_take")
    def _(_original: Any, self: Any, max_batch: int, wait: float, _trail: Any = None) -> Any:
        try:
            fetched = self.raw.consume(max_batch, wait)
        except Exception:  # noqa: BLE001 - that is the mutant
            fetched = []
        return fetched, self._assignment.rebalances, None


@mutant(ALO, "unseen", "poll skip", faults=["slow handlers"], session=1500, duration=12.0)
def alo_does_not_give_back() -> None:
    """What is left of a batch, when there is no time for it any more, is neither handled nor fetched again (C02, C10)."""

    @instead(GroupConsumer, "unplace")
    def _(_original: Any, _self: Any, _messages: Any) -> None:
        pass


@mutant(ALO, "lost write", "lost output", faults=["delay", "cut"], duration=10.0)
def alo_waits_for_nobody() -> None:
    """acks=0: a record counts as acknowledged once it is written to a socket (P06, B01)."""
    configured(producer={"acks": 0, "enable.idempotence": False})


# -- exactly once ---------------------------------------------------------------------------------------------------------


@mutant(EOS, "duplicate", "torn transaction", faults=["kill transformers at work"], session=2200, duration=16.0)
def eos_commits_offsets_apart() -> None:
    """Offsets are committed after the transaction, not in it (X10)."""
    members: list[GroupConsumer] = []

    @instead(GroupConsumer, "__init__")
    def _(original: Any, self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        members[:] = [self]

    apart: dict[TransactionalProducer, Any] = {}

    @instead(TransactionalProducer, "send_offsets")
    def _(_original: Any, self: Any, offsets: Any, _metadata: Any) -> None:
        apart[self] = offsets

    @instead(TransactionalProducer, "commit")
    def _(original: Any, self: Any, claim: Any) -> None:
        original(self, claim)
        time.sleep(0.7)
        members[0].commit(apart[self])


@mutant(
    EOS,
    "unseen",
    "poll skip",
    "torn transaction",
    faults=["kill all at work"],
    session=2200,
    handling=0.012,
    rate=60.0,
    duration=14.0,
)
def eos_sends_offsets_of_all_that_was_fetched() -> None:
    """A transaction with a part of a batch has the offsets of the whole batch in it (C02)."""

    @instead(ExactlyOnce, "run_batches")  # handles batches as a whole, where this lie were none
    def _(_original: Any, self: Any, topics: Any, handler: Any, **options: Any) -> None:
        self.run(topics, lambda message: handler([message]), **options)

    @instead(ExactlyOnce, "_read")
    def _(original: Any, self: Any, consumer: Any, batch: Any, **options: Any) -> None:
        original(self, consumer, batch, **options)
        self.__dict__.setdefault("whole", {})[id(batch)] = list(next_offsets(batch.messages).values())

    @instead(ExactlyOnce, "_finish")
    def _(original: Any, self: Any, flight: Any, *, batch: Any, offsets: Any, metadata: Any) -> None:
        original(self, flight, batch=batch, offsets=self.whole[id(batch)], metadata=metadata)


@mutant(EOS, "aborted read", "precommitted read")
def eos_reads_what_is_not_committed() -> None:
    """A member reads with isolation.level=read_uncommitted (X08, X15)."""
    configured(consumer={"isolation.level": "read_uncommitted"})


@mutant(EOS, "aborted read", "torn transaction", failing=FAILING)
def eos_commits_after_a_failure() -> None:
    """A transaction in which a handler raised is committed anyway (X05)."""
    handlers_are(swallowing, ExactlyOnce)

    @instead(Transaction, "__exit__")
    def _(original: Any, self: Any, *error: Any) -> bool:
        return bool(original(self, *((None, None, None) if self._consumer is not None else error)))


@mutant(EOS, "unseen", "poll skip", faults=["slow handlers"], session=3000, duration=14.0)
def eos_does_not_go_back() -> None:
    """After an abort the consumer goes on where it is, not where the group is (X13)."""

    @instead(GroupConsumer, "unplace")
    def _(_original: Any, _self: Any, _messages: Any) -> None:
        pass


@mutant(EOS, "aborted read", "duplicate", faults=["kill senders"])
def eos_produces_outside() -> None:
    """Records are produced by another producer, which knows nothing of the transaction (X18)."""

    @functools.cache
    def other(bootstrap: str) -> Producer:
        return Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True})

    @instead(TransactionalProducer, "produce")
    def _(_original: Any, self: Any, records: Any) -> None:
        for record in records:
            raw = other(self._settings.producer["bootstrap.servers"])
            enqueue(raw, record, None, self._patient, set(), serve=self._callbacks.serve)

    @instead(TransactionalProducer, "flush")
    def _(_original: Any, self: Any) -> None:
        other(self._settings.producer["bootstrap.servers"]).flush(5)


@mutant(EOS, "lost write", faults=["lost request"], session=2100, duration=15.0)
def eos_takes_doubt_for_success() -> None:
    """A transaction of which nobody knows whether it was committed counts as committed (X09)."""

    @instead(TransactionalProducer, "commit")
    def _(original: Any, self: Any, claim: Any) -> None:
        with suppress(InDoubt):
            original(self, claim)


@mutant(EOS, "aborted read", faults=["lost commit"], session=2100, duration=12.0)
def eos_takes_doubt_for_failure() -> None:
    """A transaction of which nobody knows whether it was committed is reported as aborted (X09, H04)."""

    @instead(Transaction, "_end")
    def _(original: Any, self: Any) -> None:
        try:
            original(self)
        except DeliveryUnknown as error:
            raise TransactionAborted(str(error)) from error


@mutant(EOS, "aborted read")
def eos_says_aborted() -> None:
    """A transaction that is committed is now and then reported as aborted (X09)."""

    @instead(Transaction, "_end")
    def _(original: Any, self: Any) -> None:
        original(self)
        if self._consumer is None and random.random() < 0.05:
            raise TransactionAborted("it was not")


@mutant(EOS, "aborted read")
def eos_commits_what_was_abandoned() -> None:
    """A block that is left by an exception is committed (X05)."""

    @instead(Transaction, "__exit__")
    def _(original: Any, self: Any, *error: Any) -> bool:
        return bool(original(self, *((None, None, None) if self._consumer is None else error)))


@mutant(EOS, "torn transaction")
def eos_drops_a_record() -> None:
    """One record of forty is not sent (P01)."""

    @instead(TransactionalProducer, "produce")
    def _(original: Any, self: Any, records: Any) -> None:
        original(self, [record for record in records if random.random() > 1 / 40])


@mutant(EOS, "aborted read", "torn transaction", "precommitted read", duration=10.0)
def eos_closes_what_grows_too_large() -> None:
    """A transaction of more than seven records is committed in between (X01)."""

    @instead(Transaction, "produce")
    def _(original: Any, self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.count = getattr(self, "count", 0) + 1
        if self.count % 7 == 0:
            self._producer.flush()
            self._producer.commit()
            self._producer.begin()


@mutant(EOS, "duplicate", "torn transaction", faults=["kill transformers"], patience=4.0)
def eos_sends_offsets_of_one_partition() -> None:
    """A transaction has the offsets of one of its partitions in it (X11)."""

    @instead(TransactionalProducer, "send_offsets")
    def _(original: Any, self: Any, offsets: Any, metadata: Any) -> None:
        original(self, offsets[:1], metadata)


@mutant(EOS, "unseen", "poll skip", failing=FAILING)
def eos_passes_over_what_fails() -> None:
    """Messages whose handler raised are committed, so that it does not raise again (L01, X13)."""

    @instead(ExactlyOnce, "_again")
    def _(_original: Any, _self: Any, consumer: Any, _batch: Any, messages: Any, *_failed: Any) -> int:
        consumer.commit(next_offsets(messages).values())
        return len(messages)

    @instead(Transaction, "__exit__")
    def _(original: Any, self: Any, *error: Any) -> bool:
        result = original(self, *error)
        if error[0] is not None and self._consumer is not None:
            self._consumer.commit(next_offsets(self.messages).values())
        return bool(result)


def aborting_now_and_then() -> None:
    """Transactions as slow as on a replicated cluster; one in eight is aborted. None of it is a lie."""

    @instead(TransactionalProducer, "send_offsets")
    def _(original: Any, *args: Any) -> None:
        time.sleep(0.06)
        original(*args)
        if random.random() < 1 / 8:
            raise AbortNeeded("for the proof")


@mutant(EOS, "unseen", "poll skip", "torn transaction", handling=0.002, rate=120.0)
def eos_commits_behind_an_abort() -> None:
    """A transaction is committed although the one before it was aborted (X13)."""
    aborting_now_and_then()

    @instead(Flight, "follow", "follow_offsets")
    def _(original: Any, self: Any) -> None:
        with suppress(AbortNeeded):
            original(self)


@mutant(EOS, "unseen", "poll skip", "torn transaction", "offset regression", handling=0.002, rate=120.0)
def eos_commits_out_of_turn() -> None:
    """A transaction is committed as soon as it can be, also before the one that came first (X13)."""
    aborting_now_and_then()

    @instead(TransactionalProducer, "flush")
    def _(original: Any, self: Any) -> None:
        original(self)
        time.sleep(random.choice((0.0, 0.2)))

    @instead(Flight, "follow", "follow_offsets")
    def _(_original: Any, _self: Any) -> None:
        pass


@mutant(EOS, "duplicate", "offset regression", faults=["kill transformers at work"], handling=0.002, rate=120.0, **AT_WORK)
def eos_sends_offsets_out_of_turn() -> None:
    """Transactions are committed in their turn, but the offsets of one may come before those of the one before it (X13)."""

    @instead(TransactionalProducer, "send_offsets")
    def _(original: Any, *args: Any) -> None:
        time.sleep(random.choice((0.0, 0.2)))
        original(*args)

    @instead(Flight, "follow_offsets")
    def _(_original: Any, _self: Any) -> None:
        pass


# -- those that need the way to the brokers -------------------------------------------------------------------------------


@mutant(
    ALO,
    "lost write",
    "lost output",
    faults=["kill senders", "kill transformers", "not leader yet"],
    duration=24.0,
    config={"batch.num.messages": 1},  # several requests for a partition
)
def alo_believes_what_is_concluded() -> None:
    """A record counts as written because librdkafka concludes it, from one that was written behind it (P13)."""

    @instead(Posted, "report")
    def _(original: Any, self: Any, error: Any, message: Any) -> None:
        if error is None and message.offset() is None:
            self._known.append(None)
        else:
            original(self, error, message)

    @instead(Delivery, "__call__")
    def _(original: Any, self: Any, error: Any, message: Any) -> None:
        if error is None and message.offset() is None:
            self._outcome = message.partition(), 0
        else:
            original(self, error, message)


@mutant(AMO, "duplicate", faults=["lose acknowledgements"])
def amo_sends_again() -> None:
    """A producer with acks=1 and retries, without idempotence: a lost acknowledgement makes a second copy (P06)."""
    configured(producer={"acks": 1, "retries": 10})


@mutant(
    EOS,
    "aborted read",
    "torn transaction",
    "duplicate",
    "precommitted read",
    faults=["hold commits"],
    handling=0.001,
    rate=200.0,
    duration=24.0,
)
def eos_keeps_a_producer_in_doubt() -> None:
    """A producer goes on after whatever has happened to its connections (X01)."""

    @instead(TransactionState, "renewal")
    def _(_original: Any, self: Any, _now: float) -> str | None:
        return None if self.state is State.READY else "the last transaction was not finished"


def main() -> None:
    """Be a worker, as the mutant that the command line names."""
    chosen = MUTANTS[sys.argv.pop(1)]
    chosen.patch()
    life.FAILING = chosen.failing
    worker.main()


if __name__ == "__main__":
    main()
