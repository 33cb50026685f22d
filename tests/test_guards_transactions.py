"""Guards of transactions: their producers, their blocks, and their flights, one by one and without a broker.

Each is removed by a mutant that no other test would notice, or only one that takes its time with a broker.
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from confluent_kafka import KafkaError, KafkaException, Message

from kafka_guarantees import (
    AuthorizationError,
    BrokerError,
    DeliveryError,
    DeliveryUnknown,
    ExactlyOnce,
    FencedError,
    KafkaGuaranteesError,
    Record,
    Transaction,
    TransactionAborted,
)
from kafka_guarantees._client import Abandoned
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._serialization import Writing
from kafka_guarantees._threads import hand
from kafka_guarantees._transaction_state import State
from kafka_guarantees._transactional import AbortNeeded, InDoubt
from kafka_guarantees.transaction import Consumed

from .test_guards_clients import DEAD, MESSAGES
from .test_in_flight import Sky
from .world import in_thread, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kafka_guarantees._transactional import TransactionalProducer

# -- transactions ------------------------------------------------------------------------------------------------------------


class Stub:
    """Stands for the C producer: its calls do nothing, or fail as a test says."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.calls: list[str] = []
        self.fails: dict[str, list[BaseException | Callable[[], object]]] = {}
        self.asked: list[str] = []

    def _do(self, name: str) -> None:
        self.calls.append(name)
        if self.fails.get(name):
            fails = self.fails[name].pop(0)
            if isinstance(fails, BaseException):
                raise fails
            fails()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.endswith(("_transaction", "_transactions")):
            raise AttributeError(name)
        return lambda *_: self._do(name)

    def __len__(self) -> int:
        return 0

    def list_topics(self, topic: str, _timeout: float) -> None:
        self.asked.append(topic)

    def produce(self, *_: object) -> None:
        self._do("produce")

    def poll(self, _timeout: float) -> int:
        self._do("poll")
        return 0

    def flush(self, _timeout: float) -> int:
        self._do("flush")
        return 0

    def purge(self, *, in_queue: bool, in_flight: bool) -> None:
        assert in_queue
        assert not in_flight, "librdkafka would count what was sent as not sent"
        self._do("purge")


FENCED = KafkaException(KafkaError(KafkaError._FENCED, "for the test", fatal=True))
AGAIN = KafkaException(KafkaError(KafkaError._TIMED_OUT, "for the test", retriable=True))
OVER = KafkaException(KafkaError(KafkaError.INVALID_TXN_STATE, "for the test", txn_requires_abort=True))
ABORT, COMMIT, INIT = "abort_transaction", "commit_transaction", "init_transactions"
CALLS = "kafka-guarantees-offsets"  # name of a thread


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExactlyOnce]:
    monkeypatch.setattr("kafka_guarantees._transactional.Producer", Stub)
    monkeypatch.setattr("kafka_guarantees._transactional.HUNG", 0.3)
    client = ExactlyOnce({**DEAD, "transactional.id": "t"}, preflight="off")
    yield client
    client._lifecycle.forked = False
    client.close()


@pytest.fixture
def producer(kafka: ExactlyOnce) -> TransactionalProducer:
    return kafka._producer


def test_why_the_last_transaction_was_aborted_is_not_held_against_the_next(producer: TransactionalProducer) -> None:
    """X05: else one record that could not be written would end every transaction that comes."""
    producer.begin()
    with pytest.raises(TypeError):
        producer.produce([Record("t", cast("Any", 5))])
    assert isinstance(producer.failure, DeliveryError)
    producer.abort()
    producer.begin()
    assert producer.failure is None
    producer.flush()
    producer.commit()


@pytest.mark.parametrize("disturbed", [False, True], ids=["no answer", "disturbed"])
def test_what_may_still_be_on_its_way_is_aborted_by_a_new_producer(
    producer: TransactionalProducer, monkeypatch: pytest.MonkeyPatch, *, disturbed: bool
) -> None:
    """X01: by its epoch brokers before Kafka 3.6 tell what arrives late. Nobody waits for long for an answer."""
    monkeypatch.setattr("kafka_guarantees._transactional.ANSWERS", 0.1)
    producer.late_records = True
    producer.begin()
    old = producer.raw
    if disturbed:
        producer._state.soil("for the test")
    else:
        monkeypatch.setattr(old, "flush", lambda _timeout: 1)
    producer.abort()
    assert ABORT not in old.calls
    assert producer.raw is not old
    assert producer.raw.calls == [INIT]


def test_what_is_no_topic_is_named_in_a_transaction_too(producer: TransactionalProducer) -> None:
    """X05: by the error of the record, and by that of the transaction where somebody swallows it."""
    producer.begin()
    producer.raw.fails["produce"] = [TypeError("argument 1 must be str, not None")]
    with pytest.raises(TypeError, match=r"topic must be str, not None\. Nothing was sent"):
        producer.produce([Record(cast("Any", None))])
    assert "topic must be str" in str(producer.failure)


def test_an_interrupt_while_a_record_is_produced_aborts_the_transaction(producer: TransactionalProducer) -> None:
    """X05, Y03: whoever swallows it must not commit without the record."""
    producer.begin()
    producer.raw.fails["produce"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        producer.produce([Record("t", b"1")])
    with pytest.raises(AbortNeeded):
        producer.flush()


def test_the_first_record_that_failed_is_the_reason(producer: TransactionalProducer) -> None:
    """X05: what fails after it does so because of it, or says less."""
    producer.begin()
    first = DeliveryError("the first")
    for failure in (first, None, DeliveryError("the second")):
        producer.poison(failure)
    assert producer.failure is first


def test_a_record_that_another_try_may_write_is_no_reason_to_end_a_run(producer: TransactionalProducer) -> None:
    """X21: the transaction is aborted and its messages come again; a record that is too large would fail again."""
    producer.begin()
    delivered = producer.raw.config["on_delivery"]
    delivered(KafkaError(KafkaError._MSG_TIMED_OUT), Message(topic="t"))
    assert producer._state.state is State.MUST_ABORT
    assert producer.failure is None
    delivered(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE), Message(topic="t"))
    assert isinstance(producer.failure, DeliveryError)


def test_what_an_abort_purged_is_not_held_against_the_next_transaction(producer: TransactionalProducer) -> None:
    """X05: reports of it may come late."""
    producer.begin()
    for code in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
        producer.raw.config["on_delivery"](KafkaError(code), Message(topic="t"))
    assert producer._state.state is State.IN_TRANSACTION


def test_a_client_that_is_closed_in_a_commit_does_not_say_that_it_was_committed(producer: TransactionalProducer) -> None:
    """X09: nobody knows."""
    producer.begin()
    producer.raw.fails[COMMIT] = [producer._lose]
    with pytest.raises(InDoubt, match="closed"):
        producer.commit()


def timed_out(producer: TransactionalProducer) -> BaseException | None:
    """A transaction that the coordinator has ended. Returns what the next one begins with."""
    producer.begin()
    producer.raw.fails[COMMIT] = [FENCED]
    producer._state.began -= 1000
    with pytest.raises((InDoubt, FencedError)) as raised:
        producer.commit()
    return raised.value


def test_transactions_that_time_out_now_and_then_end_no_run(producer: TransactionalProducer) -> None:
    """X07: three in a row do, since it would go on for ever, or two instances fence each other."""
    for _ in range(5):
        assert isinstance(timed_out(producer), InDoubt)
        producer.begin()
        producer.commit()
    assert [type(timed_out(producer)) for _ in range(3)] == [InDoubt, InDoubt, FencedError]


def test_other_errors_are_no_fence_war(producer: TransactionalProducer) -> None:
    """X07: a broker in trouble loses a connection as often as it likes."""
    for _ in range(4):
        producer.begin()
        producer.raw.fails[COMMIT] = [KafkaException(KafkaError(KafkaError._FATAL))]
        with pytest.raises(InDoubt):
            producer.commit()
    assert isinstance(timed_out(producer), InDoubt)


def test_an_end_that_needed_two_calls_is_a_reason_for_a_new_producer(producer: TransactionalProducer) -> None:
    """X01: one of two requests may still be on its way, and end a transaction that comes later."""
    producer.begin()
    first = producer.raw
    producer.raw.fails["send_offsets_to_transaction"] = [AGAIN]
    producer.send_offsets([], None)
    assert not producer.undisturbed()
    producer.commit()
    producer.begin()
    assert producer.raw is not first


def test_offsets_that_librdkafka_does_not_take_end_the_run(producer: TransactionalProducer) -> None:
    """Of a member whose id has an umlaut it takes none, nor would a new producer's: the same messages would come for ever."""
    producer.begin()
    unsafe = KafkaError(KafkaError._BAD_MSG, "Input buffer member id is not safe")
    producer.raw.fails["send_offsets_to_transaction"] = [KafkaException(unsafe)]
    with pytest.raises(BrokerError, match=r"member id is not safe.*group\.id, group\.instance\.id or client\.id"):
        producer.send_offsets([], None)


def test_a_transaction_that_was_aborted_is_a_reason_for_a_new_producer(producer: TransactionalProducer) -> None:
    """X01: librdkafka may not have asked the brokers at all."""
    producer.begin()
    first = producer.raw
    producer.abort()
    assert producer.raw is not first


def test_what_the_log_says_between_transactions_counts(producer: TransactionalProducer) -> None:
    """X01: a connection that broke since the last commit is heard of with the next poll only."""
    producer.begin()
    producer.commit()
    first = producer.raw
    line = "[thrd:127.0.0.1:1/1]: 127.0.0.1:1/1: Disconnected (after 5ms in state UP)"
    first.fails["poll"] = [lambda: first.config["logger"].log(4, "%s [%s] %s", "FAIL", "rdkafka#producer-1", line)]
    producer.begin()
    assert producer.raw is not first


@pytest.mark.parametrize(("broker", "anew"), [("bootstrap", False), ("1", True)])
def test_an_address_that_has_served_is_no_disturbance(producer: TransactionalProducer, broker: str, *, anew: bool) -> None:
    """With debug=broker each new producer tells of it: the next one would be made for it, and so on. No broker has gone."""
    producer.begin()
    producer.commit()
    first = producer.raw
    line = f"[thrd:a:1/{broker}]: a:1/{broker}: Decommissioning this broker (after 5ms in state UP) (_DESTROY_BROKER)"
    first.fails["poll"] = [lambda: first.config["logger"].log(7, "%s [%s] %s", "FAIL", "rdkafka#producer-1", line)]
    producer.begin()
    assert (producer.raw is not first) is anew


@pytest.mark.parametrize(
    ("broker", "state", "anew"),
    [
        ("1", "APIVERSION_QUERY", True),
        ("1", "AUTH_REQ", True),
        ("1", "UP", True),
        ("1", "CONNECT", False),
        ("1", "SSL_HANDSHAKE", False),
        ("bootstrap", "APIVERSION_QUERY", False),
        ("bootstrap", "AUTH_REQ", False),
        ("bootstrap", "UP", True),
    ],
)
def test_a_connection_that_was_cut_may_have_carried_something(
    producer: TransactionalProducer, broker: str, state: str, *, anew: bool
) -> None:
    """X01: it logs in again while requests are under way. And librdkafka says the same of one that is up only once in 30 s."""
    producer.begin()
    producer.commit()
    first = producer.raw
    name = f"a:1/{broker}"
    line = (
        f"[thrd:{name}]: {name}: Disconnected: connection closed by peer: receive 0 after POLLIN (after 5ms in state {state})"
    )
    first.fails["poll"] = [lambda: first.config["logger"].log(4, "%s [%s] %s", "FAIL", "rdkafka#producer-1", line)]
    producer.begin()
    assert (producer.raw is not first) is anew


def test_a_producer_that_cannot_go_on_while_it_is_idle_ends_nothing(producer: TransactionalProducer) -> None:
    """P09: nothing is open that could be in doubt. The next transaction has a new one."""
    producer.serve()
    producer.begin()
    first = producer.raw
    producer.serve()
    assert "poll" not in first.calls  # it has a transaction
    producer.commit()
    first.fails["poll"] = [KafkaException(KafkaError(KafkaError._FATAL, "for the test", fatal=True))]
    producer.serve()
    producer.serve()
    producer.begin()
    assert producer.raw is not first


def test_a_disturbance_is_heard_of_before_the_next_offsets_are_sent(producer: TransactionalProducer) -> None:
    """X13: a first copy of the request may still come, behind those of the next transaction."""
    producer.begin()
    raw = producer.raw
    line = "[thrd:127.0.0.1:1/1]: 127.0.0.1:1/1: Disconnected (after 5ms in state UP)"
    raw.fails["poll"] = [lambda: raw.config["logger"].log(4, "%s [%s] %s", "FAIL", "rdkafka#producer-1", line)]
    assert not producer.undisturbed()


CUT = "[thrd:TxnCoordinator]: TxnCoordinator: 127.0.0.1:1: Disconnected (after 5ms in state UP)"


def cuts(producer: TransactionalProducer) -> None:
    """The log of its C producer says that a connection was cut."""
    producer.raw.config["logger"].log(4, "%s [%s] %s", "FAIL", "rdkafka#producer-1", CUT)


@pytest.mark.parametrize("consumes", [True, False])
@pytest.mark.parametrize(("when", "sure"), [("before the offsets", True), ("after them", False), ("in the commit", False)])
def test_a_commit_in_whose_moment_a_connection_was_cut_is_in_doubt(
    producer: TransactionalProducer, when: str, *, sure: bool, consumes: bool
) -> None:
    """X09: a broker that was the coordinator says that the transaction before is committed, and librdkafka takes it for this.

    To find its offsets, it has had to be the coordinator: what was cut before they were sent says nothing.
    """
    claims: list[None] = []
    producer.begin()
    if when == "before the offsets":
        producer.raw.fails["poll"] = [lambda: cuts(producer)]
    producer.flush()
    if consumes:
        producer.send_offsets([], None)
    if when == "in the commit":
        producer.raw.fails[COMMIT] = [lambda: cuts(producer)]
    elif when == "after them":
        producer.raw.fails["poll"] = [lambda: cuts(producer)]
    with nullcontext() if sure or not consumes else pytest.raises(InDoubt, match="former coordinator"):
        producer.commit((lambda: claims.append(None)) if consumes else None)
    assert len(claims) == consumes
    first = producer.raw
    producer.abort()
    producer.begin()
    assert producer.raw is not first


@pytest.mark.parametrize(
    ("error", "claimed"),
    [(OVER, 0), (KafkaException(KafkaError(KafkaError._FATAL)), 1), (KeyboardInterrupt(), 1), (None, 1)],
)
def test_what_may_be_committed_is_claimed(producer: TransactionalProducer, error: BaseException | None, claimed: int) -> None:
    """What certainly is not, is not: the group would never be as far."""
    claims: list[None] = []
    producer.begin()
    producer.send_offsets([], None)
    producer.raw.fails[COMMIT] = [] if error is None else [error]
    with suppress(AbortNeeded, InDoubt, KeyboardInterrupt):
        producer.commit(lambda: claims.append(None))
    assert len(claims) == claimed


def test_an_end_that_was_slow_is_no_doubt(producer: TransactionalProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brokers that have much to do would have everything behind it aborted. It only has a new producer."""
    monkeypatch.setattr("kafka_guarantees._transaction_state.SLOW_END", -1.0)
    producer.begin()
    first = producer.raw
    producer.send_offsets([], None)
    producer.commit(lambda: None)
    producer.begin()
    assert producer.raw is not first


@pytest.mark.parametrize(("committing", "said"), [(True, "Nobody knows"), (False, "nothing of it is visible")])
def test_who_is_fenced_while_it_commits_does_not_know(producer: TransactionalProducer, said: str, *, committing: bool) -> None:
    """X06, X09: the commit may have been done, and the answer lost; then librdkafka asked again, behind another instance."""
    producer.begin()
    producer.raw.fails[COMMIT if committing else ABORT] = [FENCED]
    with pytest.raises(FencedError, match=said):
        producer.commit() if committing else producer.abort()


@pytest.mark.parametrize(
    ("number", "named"), [(0, "'t' (committing"), (2, "'t-in-flight-2' (of this client's 't') (committing")]
)
def test_who_is_fenced_names_the_id_that_was_configured(kafka: ExactlyOnce, number: int, named: str) -> None:
    """Nobody has written the others down. Also where it may be that transactions took too long."""
    producer = kafka._in_flight.producers[number]
    producer.begin()
    producer.raw.fails[COMMIT] = [FENCED]
    with pytest.raises(FencedError) as caught:
        producer.commit()
    assert named in str(caught.value)
    *_, last = (timed_out(producer) for _ in range(3))
    assert isinstance(last, FencedError)
    assert named in str(last)


def test_who_is_fenced_as_it_takes_over_does_not_know_of_the_last_commit(producer: TransactionalProducer) -> None:
    """X09: that was in doubt, and the new producer is the one that would have found out."""
    producer.begin()
    producer.raw.fails[COMMIT] = [KafkaException(KafkaError(KafkaError._BAD_MSG, "for the test", txn_requires_abort=True))]
    with pytest.raises(InDoubt):
        producer.commit()
    making = producer._make

    def make() -> None:
        making()
        producer.raw.fails[INIT] = [FENCED]

    producer._make = make  # type: ignore[method-assign]
    with pytest.raises(FencedError, match="Nobody knows whether the last one was committed"):
        producer.abort()


ANSWERS = {
    KafkaError.UNKNOWN: InDoubt,
    KafkaError._BAD_MSG: InDoubt,
    KafkaError._RESOLVE: InDoubt,  # seen, with a broker that had committed: its answer was lost, and then its name
    KafkaError._SSL: InDoubt,
    KafkaError._AUTHENTICATION: InDoubt,
    KafkaError.INVALID_TXN_STATE: AbortNeeded,
}


@pytest.mark.parametrize(("code", "kind"), ANSWERS.items())
def test_an_answer_to_a_commit_that_says_nothing_is_no_abort(
    producer: TransactionalProducer, code: int, kind: type[Exception]
) -> None:
    """X09: librdkafka wants to abort after each error that it does not know. The brokers may have committed."""
    producer.begin()
    producer.raw.fails[COMMIT] = [KafkaException(KafkaError(code, "for the test", txn_requires_abort=True))]
    with pytest.raises(kind):
        producer.commit()


@pytest.mark.parametrize("call", [COMMIT, ABORT])
def test_an_interrupt_in_an_end_leaves_its_outcome_open(producer: TransactionalProducer, call: str) -> None:
    """X04: the call may have done its work. A new producer ends what is left, and the committed offsets tell."""
    producer.begin()
    producer.raw.fails[call] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        producer.commit() if call == COMMIT else producer.abort()
    assert producer.raw is None
    assert producer._state.state is State.LOST


def test_an_interrupt_in_a_callback_comes_out(producer: TransactionalProducer) -> None:
    """C01: raised after the C call, and not with some other one, once the transaction is committed."""
    producer.begin()
    producer.raw.fails["flush"] = [lambda: producer._callbacks.interrupt(KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        producer.flush()


def test_a_call_that_was_left_alone_does_not_hold_up_the_next(producer: TransactionalProducer) -> None:
    """X20: librdkafka may never return from it. The new producer has a thread of its own."""
    over = threading.Event()
    producer.begin()
    producer.raw.fails[ABORT] = [lambda: over.wait(30)]
    producer.abort()
    began = time.monotonic()
    producer.begin()
    producer.commit()
    assert time.monotonic() - began < 15
    over.set()


def test_who_hurries_makes_no_call_twice(producer: TransactionalProducer) -> None:
    """The end of a run waits for that."""
    producer.begin()
    producer.hurry = True
    producer.raw.fails[COMMIT] = [AGAIN]
    with pytest.raises(InDoubt):
        producer.commit()
    producer.hurry = False


def test_who_has_no_patience_leaves_the_transaction_to_the_brokers(producer: TransactionalProducer) -> None:
    """Y01: at once, and with it the producer, which cannot be used for another one."""
    producer.begin()
    producer.hurry = True
    calls = producer.raw.calls
    with pytest.raises(Abandoned):
        producer.abort()
    assert ABORT not in calls
    assert producer.raw is None
    producer.hurry = False


@pytest.mark.parametrize("error", [AGAIN, FENCED])
def test_what_could_not_be_aborted_is_not_used_again(producer: TransactionalProducer, error: BaseException) -> None:
    """X20: its successor ends what is open, and only that may begin another."""
    producer.begin()
    producer.raw.fails[ABORT] = [error]
    producer.abandon()
    assert producer.raw is None
    assert producer._state.state is State.LOST


@pytest.mark.parametrize("fails", [True, False])
def test_an_error_that_ends_a_block_does_not_take_the_patience_of_the_next(
    producer: TransactionalProducer,
    fails: bool,  # noqa: FBT001 - two rows
) -> None:
    """A run that goes on after it waits for its brokers as before."""
    waited: list[bool] = []

    def prepare() -> None:
        waited.append(producer.persists)
        if fails:
            raise BrokerError("for the test")

    producer.begin()
    producer.persists = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(producer, "prepare", prepare)
        with suppress(BrokerError):
            producer.abort(leaving=True)
    assert waited == [False]
    assert producer.persists
    producer.persists = False


def test_an_interrupted_start_leaves_no_producer(producer: TransactionalProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    """X20: one whose start nobody knows the end of is not used."""

    class Interrupted(Stub):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config)
            self.fails[INIT] = [KeyboardInterrupt()]

    monkeypatch.setattr("kafka_guarantees._transactional.Producer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        producer.prepare()
    assert producer.raw is None


@pytest.mark.parametrize("error", [None, AGAIN])
def test_a_client_that_is_closed_while_it_begins_says_so(
    kafka: ExactlyOnce, producer: TransactionalProducer, monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    """close() in another thread has let the producer go: it is not used, and no broker is blamed."""

    class Closed(Stub):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config)
            self.fails[INIT] = [self._closed]

        def _closed(self) -> None:
            kafka._lifecycle.closed = True
            producer._lose()
            if error is not None:
                raise error

    monkeypatch.setattr("kafka_guarantees._transactional.Producer", Closed)
    with pytest.raises(KafkaGuaranteesError, match="is closed"):
        producer.prepare()
    kafka._lifecycle.closed = False


@pytest.mark.parametrize(("persists", "hurry", "times"), [(True, False, 3), (False, False, 1), (True, True, 1)])
def test_a_start_is_tried_as_long_as_the_run_has_patience(
    producer: TransactionalProducer,
    monkeypatch: pytest.MonkeyPatch,
    persists: bool,  # noqa: FBT001 - a table
    hurry: bool,  # noqa: FBT001 - likewise
    times: int,
) -> None:
    """A run that is on waits for its brokers, however long they are away; one that begins, or is to stop, does not."""
    calls: list[Stub] = []

    class Away(Stub):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config)
            calls.append(self)
            self.fails[INIT] = [AGAIN, AGAIN]

    monkeypatch.setattr("kafka_guarantees._transactional.Producer", Away)
    monkeypatch.setattr(producer, "_init_deadline", lambda: -math.inf)
    producer.persists, producer.hurry = persists, hurry
    with nullcontext() if times == 3 else pytest.raises(BrokerError):
        producer.prepare()
    assert calls[0].calls.count(INIT) == times
    producer.persists = producer.hurry = False


def test_nobody_waits_for_room_in_a_callback(producer: TransactionalProducer) -> None:
    """Y09: room is made by callbacks, which would come in this one: that aborts the process."""
    producer.begin()
    assert producer._patient(0)
    assert not producer._callbacks.serve(lambda: producer._patient(0))


def test_who_hurries_does_not_wait_for_a_call_that_hangs(
    producer: TransactionalProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Y01: the end of a run waits for it."""
    monkeypatch.setattr("kafka_guarantees._transactional.HUNG", 60.0)
    monkeypatch.setattr("kafka_guarantees._transactional.STOPPING", 0.1)
    over = threading.Event()
    producer.begin()
    producer.raw.fails[COMMIT] = [lambda: over.wait(30)]
    producer.hurry = True
    began = time.monotonic()
    with pytest.raises(InDoubt):
        producer.commit()
    assert time.monotonic() - began < 15
    over.set()
    producer.hurry = False


def test_offsets_are_not_sent_for_longer_than_a_transaction_may_last(producer: TransactionalProducer) -> None:
    """X16: librdkafka waits for socket.timeout.ms. The coordinator has aborted it by then."""
    over = threading.Event()
    producer.begin()
    producer.raw.fails["send_offsets_to_transaction"] = [lambda: over.wait(30)]
    producer._state.began -= 1000
    began = time.monotonic()
    with pytest.raises(InDoubt):
        producer.send_offsets([], None)
    assert time.monotonic() - began < 15
    over.set()


def test_who_is_not_let_in_hears_of_it(producer: TransactionalProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    """C19: and does not wait for a producer id until the time is up."""

    class Shut(Stub):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config)
            refused = KafkaError(KafkaError._AUTHENTICATION)
            self.fails = {INIT: [AGAIN] * 3, "poll": [lambda: config["error_cb"](refused)]}

    monkeypatch.setattr("kafka_guarantees._transactional.Producer", Shut)
    with pytest.raises(BrokerError, match="no broker lets this client in"):
        producer.prepare()


def test_a_new_producer_knows_no_topic(producer: TransactionalProducer) -> None:
    """A record for a partition that there is not would be taken, and said later to be of no message in particular."""
    for _ in range(2):
        producer.begin()
        producer.produce([Record("t", b"1", partition=0), Record("t", b"2", partition=0)])
        assert producer.raw.asked == ["t"]
        producer.abort()


def test_no_thread_is_left_by_a_closed_client(kafka: ExactlyOnce, producer: TransactionalProducer) -> None:
    """A service may make clients as often as it likes."""
    before = set(threading.enumerate())
    producer.begin()
    producer.commit()
    kafka.close()

    def left() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == CALLS} - before

    until(lambda: not left(), "its thread has ended", 10.0)


class Noted:
    """Stands for the producer of a transaction: notes what is asked of it, and fails as a test says."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, list[BaseException]] = {}
        self.failure: KafkaGuaranteesError | None = None
        self.leaving: list[bool] = []
        self.claimed: list[object] = []

    def commit(self, claim: Callable[[], None] | None) -> None:
        self.__getattr__("commit")()
        if claim is not None:
            claim()

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*_: object, leaving: bool = False) -> None:
            self.calls.append(name)
            if name == "abort":
                self.leaving.append(leaving)
            if self.fails.get(name):
                raise self.fails[name].pop(0)

        return call


def transaction(producer: Noted, *, consumes: bool, letters: int = 0) -> Transaction:
    batch: Any = SimpleNamespace(messages=list(MESSAGES), metadata=b"")
    aside = {id(message): Record("letters", message.value()) for message in MESSAGES[:letters]}
    consumer: Any = SimpleNamespace(raw=object(), claim=producer.claimed.append)
    consumed = Consumed(consumer, batch, aside, lambda: ["offsets"]) if consumes else None  # type: ignore[list-item]
    return Transaction(cast("Any", producer), Lifecycle("test"), Writing(None, None), consumed)


def test_what_a_transaction_consumed_is_claimed_as_committed() -> None:
    """X13: a former coordinator is not to say later that it is not."""
    producer = Noted()
    with transaction(producer, consumes=True):
        pass
    assert producer.claimed == [["offsets"]]


def test_a_transaction_that_must_be_aborted_takes_no_more_records() -> None:
    """X05: each says why, and none is sent that could not be committed."""
    producer = Noted()
    producer.fails["produce"] = [AbortNeeded("too slow")]
    with transaction(producer, consumes=True) as tx:
        for _ in range(2):
            with pytest.raises(TransactionAborted, match="too slow"):
                tx.produce("t", b"1")
        assert producer.calls.count("produce") == 1
        tx.produce("t", b"1")  # and leaves the block
    assert producer.calls[-1] == "abort"


def test_an_abort_is_swallowed_in_a_loop_only() -> None:
    """There the messages come again. Nobody else runs a block once more: its records would be lost without a word."""
    for consumes in (True, False):
        producer = Noted()
        producer.fails["produce"] = [AbortNeeded("for the test")]
        with (
            nullcontext() if consumes else pytest.raises(TransactionAborted),
            transaction(producer, consumes=consumes) as tx,
        ):
            tx.produce("t", b"1")
        assert producer.calls[-1] == "abort"
        assert producer.leaving == [False]


def test_an_error_of_the_block_leaves_without_waiting_for_ever() -> None:
    """Y03: and what goes wrong with the abort does not hide it."""
    producer = Noted()
    producer.fails["abort"] = [BrokerError("away")]
    with pytest.raises(ValueError, match="of the block"), transaction(producer, consumes=True):
        raise ValueError("of the block")
    assert producer.leaving == [True]


@pytest.mark.parametrize("consumes", [True, False])
def test_an_abort_that_fails_for_good_is_raised(consumes: bool) -> None:  # noqa: FBT001 - two rows
    """X06: a fence ends the loop, which would go on for ever. A stop that no broker answers is no error of a loop."""
    for error in (FencedError("another"), Abandoned("no answer")):
        producer = Noted()
        producer.fails.update(produce=[AbortNeeded("for the test")], abort=[error])
        swallowed = consumes and isinstance(error, Abandoned)
        with nullcontext() if swallowed else pytest.raises(type(error)), transaction(producer, consumes=consumes) as tx:
            tx.produce("t", b"1")


def test_a_record_that_cannot_be_written_ends_the_loop() -> None:
    """X05: also where the block swallowed that: with the same messages it would fail again."""
    producer = Noted()
    producer.failure = DeliveryError("too large")
    producer.fails["flush"] = [AbortNeeded("a record failed")]
    with pytest.raises(TransactionAborted) as raised, transaction(producer, consumes=True):
        pass
    assert raised.value.__cause__ is producer.failure


@pytest.mark.parametrize("consumes", [True, False])
def test_a_commit_in_doubt_is_told_to_whom_no_offset_tells(consumes: bool) -> None:  # noqa: FBT001 - two rows
    """X09: in a loop the committed offsets will tell, unless nothing can be found out any more."""
    producer = Noted()
    producer.fails.update(commit=[InDoubt("no answer")], abort=[FencedError("another")])
    with pytest.raises(FencedError if consumes else DeliveryUnknown, match="another"), transaction(producer, consumes=consumes):
        pass
    producer = Noted()
    producer.fails["commit"] = [InDoubt("no answer")]
    with nullcontext() if consumes else pytest.raises(DeliveryUnknown), transaction(producer, consumes=consumes):
        pass
    assert producer.calls[-1] == "abort"


def test_a_transaction_that_could_not_begin_is_over() -> None:
    """X18: nothing is produced into it, and it is not begun once more."""
    producer = Noted()
    producer.fails["begin"] = [BrokerError("away")]
    tx = transaction(producer, consumes=False)
    with pytest.raises(BrokerError), tx:
        pass
    for call in (lambda: tx.produce("t", b"1"), tx.__enter__):
        with pytest.raises(KafkaGuaranteesError, match="is over"):
            call()


@pytest.mark.parametrize("error", [DeliveryError("too large"), KeyboardInterrupt()])
def test_a_letter_that_cannot_be_written_leaves_nothing_open(error: BaseException) -> None:
    """X16: the block is not run, and readers would wait for the open transaction."""
    producer = Noted()
    producer.fails["produce"] = [error]
    tx = transaction(producer, consumes=True, letters=1)
    with pytest.raises(type(error)), tx:
        pytest.fail("the block was run")
    assert producer.calls[-1] == "abandon"
    with pytest.raises(KafkaGuaranteesError, match="is over"):
        tx.produce("t", b"1")


def test_a_letter_that_the_brokers_did_not_take_aborts_the_transaction() -> None:
    """L05: its message would be passed over. Nothing more is sent, and the messages come again."""
    producer = Noted()
    producer.fails.update(produce=[AbortNeeded("queue full")], flush=[AbortNeeded("must abort")])
    with transaction(producer, consumes=True, letters=1) as tx:
        assert tx.messages == MESSAGES[1:]
        with pytest.raises(TransactionAborted, match="queue full"):
            tx.produce("t", b"1")
    assert producer.calls == ["begin", "produce", "flush", "abort"]


@pytest.mark.parametrize("how", ["flush", "abort"])
def test_brokers_have_their_grace_once_a_block_is_left(how: str) -> None:
    """Y01: a block may take longer than STOP_GRACE after a stop; its transaction is ended all the same."""
    producer = Noted()
    tx = transaction(producer, consumes=True)
    lifecycle, patience = tx._lifecycle, list[bool]()
    setattr(producer, how, lambda **_: patience.append(not lifecycle.out_of_patience))
    with lifecycle.running(lambda: None), suppress(ValueError), tx:
        lifecycle.leave(-1.0)
        assert lifecycle.out_of_patience
        if how == "abort":
            raise ValueError
    assert patience == [True]


# -- transactions in flight --------------------------------------------------------------------------------------------------


@pytest.fixture
def sky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sky]:
    monkeypatch.setattr("kafka_guarantees._in_flight.GRACE", 0.05)
    sky = Sky()
    yield sky
    sky.let("1", "2", "3")
    sky.lifecycle.closed = False
    sky.flights.end()


def test_producers_wait_for_brokers_as_long_as_a_run_is_on(sky: Sky) -> None:
    """Y01: a transaction of its own, later, does not wait for ever."""
    assert [turn.persists for turn in sky.turns] == [True] * 3  # type: ignore[attr-defined] # set from outside
    sky.flights.end()
    assert [turn.persists for turn in sky.turns] == [False] * 3  # type: ignore[attr-defined] # likewise


def test_who_was_closed_meanwhile_hears_of_it(sky: Sky) -> None:
    """Its transactions were ended in another way: nothing of them is fetched again, as if all was well."""
    sky.next()
    sky.take_off("1")
    sky.let("1")
    sky.flights.wait()
    sky.lifecycle.closed = True
    with pytest.raises(KafkaGuaranteesError, match="is closed"):
        sky.flights.settle()


def test_who_hurries_does_not_abort_by_itself(sky: Sky) -> None:
    """The end of the run sees to it, in a bounded time: an abort may wait for brokers."""
    sky.errors["1"] = AbortNeeded("for the test")
    sky.next()
    sky.take_off("1")
    sky.turns[0].hurry = True
    sky.let("1")
    sky.flights.wait()
    assert "abort a" not in sky.log


def test_a_flight_holds_no_other_once_it_has_ended(sky: Sky) -> None:
    """C24: else each would hold the one before it, and all of them the first of the run."""
    sky.unsent["1"] = AbortNeeded("for the test")
    for name in "12":
        sky.next()
        sky.take_off(name)
        sky.may_acknowledge[name].set()
    sky.let("1", "2")
    sky.flights.wait()
    until(lambda: all(flight._before is None for flight in sky.flights._flights), "nothing is held")


class Tick(Exception):
    """Out of a signal handler of the user's."""


def test_a_start_that_was_interrupted_is_not_waited_for(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """Y03: nobody has heard of it, and the end of the run would never come."""
    sky.flights.end()

    class Interrupted:
        def put(self, call: object) -> None:
            if call is not None:
                raise Tick

    with monkeypatch.context() as patch:
        patch.setattr("kafka_guarantees._in_flight.hand", lambda *_: Interrupted())
        with pytest.raises(Tick):
            sky.flights.prepare()
        assert in_thread(sky.flights.end)() is None


def test_one_that_cannot_let_go_does_not_keep_the_others_from_it(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """X16: what they have open would hold up readers. It is raised after that, and the next run is one like any."""

    def abandon() -> None:
        raise Tick

    with monkeypatch.context() as patch:
        patch.setattr(sky.turns[0], "abandon", abandon)
        with pytest.raises(Tick):
            sky.flights.end()
    assert sky.log == ["abandon b", "abandon c"]
    assert not any(turn.hurry for turn in sky.turns)


def test_as_many_transactions_are_in_flight_as_rights_allow(
    sky: Sky, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """S07: an id that may not be used is not, nor are those behind it; and that is said."""
    sky.flights.end()

    def denied() -> None:
        raise AuthorizationError("for the test")

    monkeypatch.setattr(sky.turns[1], "prepare", denied)
    sky.flights.prepare()
    assert [sky.turns.index(cast("Any", producer)) for producer in sky.flights._free] == [0]
    assert "1 of 3 transactions in flight" in caplog.text


def test_an_abort_is_a_warning_and_what_it_takes_along_is_not(sky: Sky, caplog: pytest.LogCaptureFixture) -> None:
    """One reason is one line that somebody is called for."""
    caplog.set_level("INFO")
    sky.errors["1"] = AbortNeeded("for the test")
    for name in "123":
        sky.next()
        sky.take_off(name)
        sky.may_acknowledge[name].set()
    sky.let("1", "2", "3")
    assert len(sky.flights.settle()) == 3
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]


def test_a_flight_is_known_before_it_takes_off(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    """X26: an exception out of a signal handler comes right after that; the run does not end before the flight."""

    class Interrupted:
        def __init__(self, calls: Any) -> None:
            self._calls, self._interrupts = calls, [Tick()]

        def put(self, call: object) -> None:
            self._calls.put(call)
            if self._interrupts:
                raise self._interrupts.pop()

    sky.flights._hands.clear()
    with monkeypatch.context() as patch:
        patch.setattr("kafka_guarantees._in_flight.hand", lambda *given: Interrupted(hand(*given)))
        sky.next()
        with pytest.raises(Tick):
            sky.take_off("1")
    assert sky.flights.unfinished
    sky.let("1")
    sky.flights.wait()
    assert sky.log[-1] == "committed 1"
