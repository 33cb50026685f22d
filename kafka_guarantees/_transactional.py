"""The transactional producer: the verbs of a transaction, and a new C producer whenever the old one is in doubt.

Rules. Those of ``_transaction_state.py``, which decides what is legal and what each error means, and:
* The records are flushed before the offsets are sent: else that request races with the partitions being added (MEASURED).
* Whatever made a producer doubtful, its successor with the same id first ends what it had open (X01, X09).
* No call is waited for when the client is to stop, and has waited for a while.
"""

from __future__ import annotations

import logging
import time
import weakref
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, NoReturn

from confluent_kafka import KafkaError, KafkaException, Producer

from ._client import LOOK, Abandoned, Callbacks, Caller, Handle
from ._enqueue import AS_IT_IS, SLICE, QueueFull, checked_headers, enqueue, not_a_topic
from ._producer import introduced, warn_unclosed
from ._transaction_state import NOT_SENT, Event, State, TransactionState, Verdict, judge
from ._watch import Watch
from .errors import (
    FENCED,
    BrokerError,
    DeliveryError,
    FencedError,
    KafkaGuaranteesError,
    broker_failure,
    delivery_failure,
    describe,
    futile,
    kafka_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from confluent_kafka import Message, TopicPartition

    from ._lifecycle import Lifecycle
    from ._settings import Settings
    from .records import Record

log = logging.getLogger("kafka_guarantees")

CALL = 0.5  # seconds that a transactional call waits at a time
END = 5.0  # seconds likewise of a commit or an abort: a second call may be given what the first one was to return
HUNG = 10.0  # seconds after which a call that was to wait for CALL counts as one that never returns
STOPPING = 1.0  # the same, while the client is to stop and has waited for a while already
CALLER = "kafka-guarantees-offsets"  # name of a thread
UNANSWERED = 60.0  # seconds, or twice as long as a transaction may last, that a new producer waits for its id
ANSWERS = 1.0  # seconds that the answers to records are waited for before their transaction is aborted
WHY = 1.0  # seconds that the report on the record is waited for, since which librdkafka takes no other
TIMED_OUT = 3  # transactions in a row that may time out: it would go on for ever, or two instances fence each other (X07)


class AbortNeeded(Exception):
    """The transaction cannot commit. Abort it and rewind."""


class InDoubt(Exception):
    """Whether the transaction was committed is unknown. Recover, and let the committed offsets decide."""


def turns(settings: Settings, count: int) -> list[Settings]:
    """The settings of producers that take turns: each has an id of its own, the first the one that was given (KIP-98)."""
    first = settings.transactional_id
    ids = [f"{first}-in-flight-{number}" for number in range(1, count)]
    return [
        settings,
        *(replace(settings, transactional_id=i, producer={**settings.producer, "transactional.id": i}) for i in ids),
    ]


class TransactionalProducer(Handle):
    """A producer of exactly-once. Makes its C producer when it is needed, and anew whenever the old one is in doubt.

    Args:
        owner: the client that this belongs to; when it is forgotten without ``close()``, a warning says so.
        settings: the resolved settings.
        lifecycle: of the owner.
        given: the transactional.id that the user gave: that of the settings may be another, see ``turns``.
    """

    def __init__(self, owner: object, settings: Settings, lifecycle: Lifecycle, given: str | None) -> None:
        super().__init__()
        own = settings.transactional_id
        self._known_as = repr(own) if own == given else f"{own!r} (of this client's {given!r})"
        self._owner = weakref.ref(owner)
        self._settings = settings
        self._lifecycle = lifecycle
        self._callbacks = Callbacks()
        self._caller = Caller(CALLER, lifecycle.hands)
        self._state = TransactionState()
        self._failure: KafkaGuaranteesError | None = None
        self._inputs: set[str] = set()  # topics whose offsets go into the transaction
        self._known: set[str] = set()  # see enqueue()
        self._disturbances = 0  # by then, of this producer
        self._timed_out = 0  # transactions in a row that the coordinator ended
        self.persists = False  # a run is on, which goes on once the brokers are back, however long that takes
        self.late_records = False  # the brokers take records behind the end of their transaction
        self.hurry = False  # as if the client was to stop, and had waited for the brokers already
        self.renewals = 0

    @property
    def late(self) -> bool:
        """Whether the time of the transaction is up."""
        return time.monotonic() - self._state.began >= self._settings.transaction_timeout

    @property
    def too_long(self) -> str:
        """What is to be said where the brokers may have aborted the transaction since it took too long."""
        timeout = f"transaction.timeout.ms ({self._settings.transaction_timeout:.0f} s)"
        return f". It took longer than {timeout}: brokers were away, or that is too short for it" if self.late else ""

    @property
    def awaited(self) -> bool:
        """Whether there is time for another record, and no stop that was asked for long ago."""
        return self._patient(0)

    @property
    def failure(self) -> KafkaGuaranteesError | None:
        """Why the transaction must abort, where a record is the reason."""
        return self._failure

    # -- verbs ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Have a producer that is good for a transaction: a new one where the old one is in doubt.

        Raises:
            BrokerError: no producer id within the deadline, or the client is stopping.
            FencedError, AuthorizationError: see the class.
        """
        self._lifecycle.check()
        self.serve()  # the log lines of a disconnect since the last transaction
        why = self._state.renewal(time.monotonic())
        if why is not None:
            self._renew(why)

    def serve(self) -> None:
        """Serve callbacks between transactions, in the thread that begins the next one. Raises what ``prepare`` raises."""
        if self.raw is None or self._state.state is not State.READY:
            return
        try:
            self._serve(lambda: self.raw.poll(0))
        except InDoubt as exc:
            log.info("%s", exc)  # a fatal error between transactions: nothing is open that could be in doubt

    def begin(self) -> None:
        """Begin a transaction. Raises what ``prepare`` raises, and InDoubt where librdkafka refuses."""
        self.prepare()
        self._failure = None
        try:
            self.raw.begin_transaction()
        except KafkaException as exc:
            self._lose()
            raise InDoubt(describe(kafka_error(exc))) from exc
        self._state.on(Event.BEGUN, time.monotonic())

    def produce(self, records: Iterable[Record]) -> None:
        """Add records to the transaction. Whatever this raises, the transaction can only abort from then on (X05)."""
        if self._state.state is not State.IN_TRANSACTION:
            self._refuse_produce()
        raw, patient, known, topic = self.raw, self._patient, self._known, ""
        try:
            for record in records:
                topic, value, key, headers = record.topic, record.value, record.key, record.headers
                plain = record.partition is None and record.timestamp is None
                if plain and value.__class__ in AS_IT_IS and key.__class__ in AS_IT_IS:
                    try:
                        if headers:
                            raw.produce(topic, value, key, -1, None, None, 0, checked_headers(headers))
                        else:
                            raw.produce(topic, value, key)
                        continue
                    except BufferError:
                        pass
                enqueue(raw, record, None, patient, known, serve=self._callbacks.serve)
        except KafkaException as exc:
            self._not_taken(exc, topic)
        except QueueFull as exc:
            self.poison(None)
            raise AbortNeeded(str(exc)) from exc
        except (DeliveryError, TypeError, ValueError) as exc:
            problem = not_a_topic(topic) or exc
            why = f"a record for topic {topic!r} was not written: {problem}"
            self.poison(problem if isinstance(problem, DeliveryError) else DeliveryError(why))
            raise problem from problem.__cause__
        except BaseException:
            self.poison(None)
            raise

    def _not_taken(self, exc: KafkaException, topic: str) -> NoReturn:
        error = kafka_error(exc)
        if futile(error):
            failure = delivery_failure(error, topic)
            self.poison(failure)
            raise failure from exc
        # not about this record: librdkafka is in an error state
        self.poison(None)
        self._hear_why()
        raise AbortNeeded(str(self._failure or describe(error))) from (self._failure or exc)

    def _hear_why(self) -> None:
        """Wait a moment for the report on a record that was refused, if that is why librdkafka takes no other.

        Raises:
            AbortNeeded: there is a fatal error. What it means is judged by the abort, which is refused likewise: where it is a
                fence, another instance has the id, and to make a new producer would take it back.
        """
        until = time.monotonic() + WHY
        while self._failure is None and time.monotonic() < until and not (self._callbacks.serving or self._out_of_patience):
            self._lifecycle.check()
            try:
                self._callbacks.serve(lambda: self.raw.poll(SLICE))
            except KafkaException as fatal:
                raise AbortNeeded(describe(kafka_error(fatal))) from fatal
            finally:
                self._callbacks.raise_interrupt()
            if self._watch.refused is not None:  # not reported on before it is aborted
                self.poison(self._refused(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED), "producing"))

    def _refuse_produce(self) -> None:
        if self._state.state is State.MUST_ABORT:
            raise self._failure or AbortNeeded("the transaction must abort already")
        raise KafkaGuaranteesError(
            "there is no open transaction to produce in. Nothing was sent. Produce inside the `with` block (X18)."
        )

    def poison(self, failure: KafkaGuaranteesError | None) -> None:
        """The transaction must abort, whatever comes."""
        if self._state.state in (State.IN_TRANSACTION, State.MUST_ABORT):
            self._failure = self._failure or failure
            self._state.on(Event.FAILED, time.monotonic())

    def flush(self) -> None:
        """Wait until every record of the transaction is with the brokers.

        Before the offsets are sent: else that request races with the partitions being added and backs off (MEASURED).

        Raises:
            AbortNeeded: a record failed, or the time of the transaction is up.
        """
        while left := self._serve(lambda: self.raw.flush(SLICE)):
            if not self._patient(0):
                raise AbortNeeded(f"{left} records are still not acknowledged{self.too_long}")
        if self._state.state is State.MUST_ABORT:
            raise AbortNeeded(str(self._failure or "a record could not be written")) from self._failure
        self._heard_of_it()

    def send_offsets(self, offsets: Sequence[TopicPartition], metadata: object) -> None:
        """Make the offsets part of the transaction. A repeated call has the same arguments (X11).

        librdkafka does not keep to the timeout of this call. It only tries no more after that, and does not take an answer that
        comes later: so the call has all of the transaction's time. Once that is up it is left alone: the coordinator aborts it
        then, if no new producer has.

        Raises:
            AbortNeeded, InDoubt, FencedError, AuthorizationError: see the class.
        """
        doing = "sending offsets to the transaction"
        self._inputs = {offset.topic for offset in offsets}

        def send() -> None:
            left = self._state.began + self._settings.transaction_timeout - time.monotonic()
            self.raw.send_offsets_to_transaction(offsets, metadata, max(CALL, left))

        self._call(doing, lambda: self._left_alone(doing, send, lambda: not self._patient(0)))
        self._heard_of_it()

    def _heard_of_it(self) -> None:
        """The coordinator has answered for this transaction just now: what was cut before says nothing of its end."""
        self._serve(lambda: self.raw.poll(0))
        self._disturbances = self._state.disturbances

    def undisturbed(self) -> bool:
        """Whether no request of this producer can be on its way twice, as far as librdkafka's log tells by now."""
        self._serve(lambda: self.raw.poll(0))
        return self._state.dirty is None

    def commit(self, claim: Callable[[], None] | None = None) -> None:
        """Commit. Once this was called, only it is called again until its outcome is known (X10).

        Where a connection was cut meanwhile, a success of what has offsets proves nothing: a broker that was the coordinator,
        and has not heard that another is, answers for the transaction before, which it knows to be committed. That needs no
        replica, and is the same request. It may be the one that librdkafka finds next.

        Args:
            claim: is called where it is committed, or may be; None: it has no offsets.

        Raises:
            AbortNeeded: the brokers did not and will not commit it.
            InDoubt: nobody knows.
        """
        if self._state.state is State.MUST_ABORT:
            raise AbortNeeded(str(self._failure or "a record could not be written")) from self._failure
        self._state.on(Event.COMMIT, time.monotonic())
        try:
            self._end("committing the transaction", lambda: self.raw.commit_transaction(END))
        except AbortNeeded:
            claim = None
            raise
        except Abandoned as exc:
            raise InDoubt(str(exc)) from exc
        finally:
            if claim is not None:
                claim()
        if self._state.state is State.LOST:
            raise InDoubt("the client was closed while the transaction was committed")
        self._state.on(Event.COMMITTED, time.monotonic())
        self._timed_out = 0
        if claim is None:
            return  # nothing would tell what became of it: brokers that restart would make each such commit one in doubt
        self.serve()  # the log lines, which come before the answer
        if self._state.state is not State.READY or self._state.disturbances > self._disturbances:
            raise InDoubt("a connection was cut in the moment of the commit: a former coordinator has answered, perhaps")

    def abort(self, *, leaving: bool = False) -> None:
        """Abort the transaction, or where that is no longer possible replace the producer, which has the same effect.

        When this returns, the fate of the transaction is decided, and the group's committed offsets tell it.

        Args:
            leaving: an error ends what it is part of, and does not wait without an end for brokers that are away.

        Raises:
            BrokerError: the brokers do not answer, or the client is to stop and they have not for a while.
            FencedError, AuthorizationError: see the class.
        """
        if self._lifecycle.forked:
            return  # it is the parent's, who goes on with it
        if self._out_of_patience:
            self._lose()
            raise Abandoned(
                "a transaction is left to the brokers, which did not answer. They, or the next start, abort it, unless it was "
                "committed."
            )
        if self._state.state in (State.IN_TRANSACTION, State.MUST_ABORT):
            try:
                if self.late_records and not self._all_answered():
                    self._lose()
                else:
                    self._state.on(Event.ABORT, time.monotonic())
                    self._end("aborting the transaction", lambda: self.raw.abort_transaction(END))
                    self._aborted()
            except (AbortNeeded, InDoubt) as exc:
                log.warning("%s: a new producer takes over", exc)
                self._lose()
        persists, self.persists = self.persists, self.persists and not leaving
        try:
            self.prepare()
        finally:
            self.persists = persists

    def _all_answered(self) -> bool:
        """Whether nothing of an open transaction that is to be aborted can still be on its way; what was not sent is dropped.

        A record that arrives behind the end of its transaction is taken by brokers before Kafka 3.6 (KIP-890), and becomes part
        of the next one, which may commit it. They refuse it where a new producer has ended its transaction: what that has them
        write to the partitions is of another epoch. (Only there: whoever is fenced hears it from the end that it asks for.)
        """
        self.raw.purge(in_queue=True, in_flight=False)
        until = time.monotonic() + ANSWERS
        while left := self._serve(lambda: self.raw.flush(SLICE)):
            if time.monotonic() > until or self._out_of_patience:
                break
        return not left and self.undisturbed()

    def abandon(self) -> None:
        """Leave an open transaction: aborted where that is quick, else by the brokers or by the next ``prepare``."""
        if self._lifecycle.forked or self.raw is None:
            return
        if self._state.state in (State.IN_TRANSACTION, State.MUST_ABORT):
            try:
                self._within_time("aborting the transaction", lambda: self.raw.abort_transaction(CALL))
                self._state.on(Event.ABORT, time.monotonic())
                self._aborted()
            except KafkaException as exc:
                log.warning("an open transaction is left to the brokers: %s", describe(kafka_error(exc)))
            except (InDoubt, Abandoned) as exc:
                log.warning("an open transaction is left to the brokers: %s", exc)
        if self._state.state is not State.READY:
            self._lose()

    def _aborted(self) -> None:
        self._state.on(Event.ABORTED, time.monotonic())
        # librdkafka answers an abort without asking the brokers where it believes that they know of nothing to abort. If it is
        # wrong, the next producer ends what is left
        self._state.soil("a transaction was aborted")

    def close(self) -> None:
        """Let the producer go. An open transaction is aborted where that is quick."""
        self.abandon()
        self._lose()
        self._caller.end()
        self.closed()

    # -- how ----------------------------------------------------------------------------------------------------------

    @property
    def _out_of_patience(self) -> bool:
        return self.hurry or self._lifecycle.out_of_patience

    def _patient(self, _waited: float) -> bool:
        age = time.monotonic() - self._state.began
        return age < self._settings.transaction_timeout and not (self._out_of_patience or self._callbacks.serving)

    def _serve(self, serve: Callable[[], int]) -> int:
        """Serve callbacks. librdkafka raises a fatal error of the producer here as well (P09)."""
        self._lifecycle.check()
        try:
            return self._callbacks.serve(serve)
        except KafkaException as exc:
            self._give_up(self._judge(kafka_error(exc)), kafka_error(exc), "producing", exc)
        finally:
            self._callbacks.raise_interrupt()

    def _judge(self, error: KafkaError) -> Verdict:
        age = time.monotonic() - self._state.began
        return judge(error, age=age, transaction_timeout=self._settings.transaction_timeout)

    def _call(self, doing: str, call: Callable[[], object]) -> int:
        """Make one transactional call, again where that is what its error asks for. Returns how often it was made."""
        deadline = self._state.began + 2 * self._settings.transaction_timeout
        calls = 0
        while True:
            calls += 1
            try:
                call()
            except KafkaException as exc:
                error = kafka_error(exc)
                self._state.soil(f"{doing}: {describe(error)}")
                verdict = self._judge(error)
                out_of_time = time.monotonic() > deadline or self._out_of_patience
                if verdict is not Verdict.RETRY or out_of_time:
                    self._give_up(verdict, error, doing, exc)
                if error.code() != KafkaError._TIMED_OUT:
                    time.sleep(0.05)  # a retriable refusal; a timeout has waited already
            except BaseException:
                # an exception out of a signal handler or callback, or no answer: the call may have done its work (X04)
                self._lose()
                raise
            else:
                self._callbacks.raise_interrupt()
                return calls

    def _within_time(self, doing: str, call: Callable[[], object]) -> None:
        """Make a call that has a timeout, and leave it alone where it does not keep to it."""
        looks = count(1)  # and no clock: where this process stood still, so did the call

        def late() -> bool:
            return next(looks) * LOOK > (STOPPING if self._out_of_patience else HUNG)

        self._left_alone(doing, call, late)

    def _left_alone(self, doing: str, call: Callable[[], object], give_up: Callable[[], bool]) -> None:
        """Make a C call, and leave it to its thread once ``give_up()``: where brokers come and go, some never return.

        Seen with librdkafka 2.16.0 in send_offsets_to_transaction() and in abort_transaction().

        Raises:
            InDoubt: it was left. Its producer cannot be used any more.
            Abandoned: likewise, and the client is to stop.
        """
        try:
            self._caller.call(call, give_up, doing)
        except Abandoned as exc:
            self._caller.end()  # once it returns, if ever
            self._caller = Caller(CALLER, self._lifecycle.hands)
            if self._out_of_patience:
                raise
            raise InDoubt(str(exc)) from exc

    def _end(self, doing: str, call: Callable[[], object]) -> None:
        started = time.monotonic()
        calls = self._call(doing, lambda: self._within_time(doing, call))
        self._state.ended(calls=calls, seconds=time.monotonic() - started)

    def _give_up(self, verdict: Verdict, error: KafkaError, doing: str, exc: KafkaException) -> NoReturn:
        why = f"{doing}: {describe(error)}"
        open_states = (State.IN_TRANSACTION, State.MUST_ABORT, State.COMMITTING)
        committing = self._state.state is State.COMMITTING
        in_doubt = committing or (doing == "init_transactions" and self.renewals > 0)
        # of librdkafka's own errors only they know whether the request was sent: it goes out again after a cut connection, and
        # what ends it may be that its broker's name is not found the second time
        if verdict is Verdict.ABORT and self._state.state in open_states and not (committing and error.code() < 0):
            self._state.on(Event.FAILED, time.monotonic())
            raise AbortNeeded(why) from exc
        self._lose()
        fate = "Nobody knows whether the last one was committed: look for its records before you send them again."
        if error.code() in FENCED:
            self._timed_out += 1
        if verdict is Verdict.RENEW and self._timed_out >= TIMED_OUT:
            raise FencedError(
                f"{self._timed_out} transactions in a row were longer than transaction.timeout.ms "
                f"({self._settings.transaction_timeout:.0f} s), or another instance uses transactional.id "
                f"{self._known_as} ({why}). {fate if in_doubt else 'Nothing of them is visible.'} Make "
                "batches smaller or the timeout longer, and give each instance its own id."
            ) from exc
        if verdict is Verdict.FENCED:
            raise FencedError(
                f"another instance has begun to use transactional.id {self._known_as} ({why}). "
                f"{fate if in_doubt else 'The open transaction of this one was aborted and nothing of it is visible.'} Stop "
                "this instance, or give each its own id."
            ) from exc
        if error.code() in NOT_SENT and verdict is Verdict.REFUSED:
            raise BrokerError(
                f"{why}. The open transaction will be aborted. librdkafka does not take what it is given, nor will it the next "
                "time: look for a group.id, group.instance.id or client.id that is not printable ASCII."
            ) from exc
        if verdict is Verdict.REFUSED:
            raise self._refused(error, doing) from exc
        raise InDoubt(why) from exc

    def _refused(self, error: KafkaError, doing: str) -> KafkaGuaranteesError:
        return broker_failure(
            error,
            doing,
            "The open transaction will be aborted.",
            topic=self._inputs,
            output=self._watch.refused,
            group=self._settings.group_id,
            transactional_id=self._settings.transactional_id,
        )

    def _lose(self) -> None:
        """Throw the C producer away."""
        self._state.on(Event.LOST, time.monotonic())
        if self.raw is not None:
            self.let_go()

    def _renew(self, why: str) -> None:
        """A new C producer with the same id: fences what the old one may still have on its way, and ends its transaction."""
        if self._state.state is not State.NEW:
            log.info("transactional.id %r: a new producer, because %s", self._settings.transactional_id, why)
            self._lose()
            self.renewals += 1
        elif (owner := self._owner()) is not None:
            self.warn_if_forgotten(owner, warn_unclosed, introduced(self._settings))
        deadline = self._init_deadline()
        while True:
            self._make()
            try:
                self._initialise()
            except InDoubt as exc:  # that call may still end the transaction of another, which then counts as fenced
                self._lose()
                if self._out_of_patience or time.monotonic() > deadline:  # each leaves a thread and a client behind
                    raise BrokerError(f"{exc} {self._safe}") from exc
                log.warning("%s: a new producer takes over", exc)
            else:
                return

    def _make(self) -> None:
        state = TransactionState()
        callbacks = self._callbacks.of(self._settings.callbacks)
        self._watch = watch = Watch(state, callbacks["logger"], callbacks["error_cb"])
        not_delivered = self._callbacks.shim("on_delivery", self._not_delivered)

        def delivered(error: KafkaError | None, message: Message) -> None:
            """Of each record: nothing is done for those that are there. A success means nothing yet (X19)."""
            if error is not None or message.offset() is None:
                not_delivered(error, message)

        callbacks |= {"logger": watch, "error_cb": watch.error, "on_delivery": delivered}
        self.make(Producer, {**self._settings.producer, **callbacks})
        self._known.clear()
        self._state = state

    def _initialise(self) -> None:
        raw, deadline = self.raw, self._init_deadline()
        try:
            while True:
                try:
                    self._within_time("init_transactions", lambda: raw.init_transactions(CALL))
                except KafkaException as exc:
                    self._lifecycle.check()  # close(), in another thread, waits no longer: it has let the producer go
                    if self._init_failed(kafka_error(exc), deadline, exc):
                        deadline = self._init_deadline()
                except InDoubt:
                    self._lifecycle.check()
                    raise
                except BaseException:
                    self._lose()
                    raise
                else:
                    break
        finally:
            raw = None  # what is raised holds this frame: a producer that lives on asks for its id, and fences the next one
        self._lifecycle.check()
        self._callbacks.raise_interrupt()
        self._state.on(Event.INITIALISED, time.monotonic())

    def _init_deadline(self) -> float:
        return time.monotonic() + max(UNANSWERED, 2 * self._settings.transaction_timeout)

    @property
    def _safe(self) -> str:
        """What is safe where there is no new producer."""
        if self.renewals:
            return "The transaction before it is aborted by the brokers or the next start, unless it was committed."
        return "Nothing was consumed or sent."

    def _init_failed(self, error: KafkaError, deadline: float, exc: KafkaException) -> bool:
        """Raise what init_transactions() fails with, unless it is to be called again. True: this took as long as it may."""
        if error.code() == KafkaError._TIMED_OUT:
            self.raw.poll(0)  # serves error_cb
            self._callbacks.raise_shut_out()
        verdict = judge(error, age=0, transaction_timeout=self._settings.transaction_timeout)
        late = time.monotonic() > deadline
        if verdict is Verdict.RETRY and (not late or self.persists) and not self._out_of_patience:
            if late:
                log.warning("init_transactions: no producer id yet (%s). It is asked for again.", describe(error))
            if error.code() != KafkaError._TIMED_OUT:
                time.sleep(0.05)
            return late
        if verdict is Verdict.FENCED:
            self._give_up(verdict, error, "init_transactions", exc)
        self._lose()
        if error.code() == KafkaError.INVALID_TRANSACTION_TIMEOUT:
            raise BrokerError(
                f"transaction.timeout.ms={self._settings.transaction_timeout * 1000:.0f} is more than the brokers' "
                "transaction.max.timeout.ms. Nothing was sent. Lower the one or raise the other (B03)."
            ) from exc
        if self._out_of_patience:
            raise Abandoned(
                "init_transactions got no answer. What is open is aborted by the brokers, or the next start."
            ) from exc
        name = self._settings.transactional_id
        raise broker_failure(error, "init_transactions", self._safe, transactional_id=name) from exc

    def _not_delivered(self, error: KafkaError | None, message: Message) -> None:
        """A record was not written, or nobody has said where: see ``concluded`` (P13)."""
        if error is None:
            self.poison(None)
        elif error.code() in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
            # librdkafka says it also of what was sent by a connection that it closes, since the next request is half sent
            self._state.soil("records were dropped")
        else:
            # without its partition: whatever was written of it is aborted, as if it was never sent
            self.poison(delivery_failure(error, message.topic() or "?") if futile(error) else None)
