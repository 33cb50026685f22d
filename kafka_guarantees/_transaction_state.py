"""The life of a transactional producer, as a table, and what each error of librdkafka means in it. Pure: no I/O, no clock.

    NEW -> READY -> IN_TRANSACTION -> COMMITTING -> READY
                       |       |           |
                       |       v           |
                       |   MUST_ABORT <----+
                       |       |
                       +-------+-> ABORTING -> READY
    any ----------------> LOST      (the producer object is thrown away; a new one begins at NEW)

Rules.
* MUST_ABORT is for good: a produce that raised, a failed delivery or an exception of the handler cannot be undone by a
  later success. librdkafka itself would commit (X05).
* COMMITTING and ABORTING last until the call that began them has an answer: it is made again, and no other is legal (X10).
* LOST is for good too: after a fatal error every call of librdkafka answers ``_CONFLICT`` and calls that retriable (X06).
* A producer is *dirty* once something ambiguous happened. It may finish its transaction, but before the next one begins it
  is made anew, so that a stray EndTxn of the past is refused by its epoch (X01: librdkafka does not speak KIP-890).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError

from .errors import FENCED, MISSING_ACL

if TYPE_CHECKING:
    from typing_extensions import Self


class State(Enum):
    """Where a transactional producer stands."""

    NEW = "new"
    READY = "ready"
    IN_TRANSACTION = "in transaction"
    MUST_ABORT = "must abort"
    COMMITTING = "committing"
    ABORTING = "aborting"
    LOST = "lost"


class Event(Enum):
    """What happened to it."""

    INITIALISED = "initialised"
    BEGUN = "begun"
    FAILED = "failed"
    COMMIT = "commit called"
    COMMITTED = "committed"
    ABORT = "abort called"
    ABORTED = "aborted"
    LOST = "lost"


TRANSITIONS = {
    (State.NEW, Event.INITIALISED): State.READY,
    (State.READY, Event.BEGUN): State.IN_TRANSACTION,
    (State.IN_TRANSACTION, Event.FAILED): State.MUST_ABORT,
    (State.IN_TRANSACTION, Event.COMMIT): State.COMMITTING,
    (State.IN_TRANSACTION, Event.ABORT): State.ABORTING,
    (State.MUST_ABORT, Event.FAILED): State.MUST_ABORT,
    (State.MUST_ABORT, Event.ABORT): State.ABORTING,
    (State.COMMITTING, Event.COMMITTED): State.READY,
    (State.COMMITTING, Event.FAILED): State.MUST_ABORT,
    (State.ABORTING, Event.ABORTED): State.READY,
    **{(state, Event.LOST): State.LOST for state in State},
}

SLOW_END = 1.0  # seconds: an end call that took longer may have been sent twice (X01 c)
IDLE_LIMIT = 86_400.0  # seconds: brokers forget a transactional.id after 7 days without use (B04)


class TransactionState:
    """The state of one producer object. Times are monotonic seconds that the caller gives."""

    def __init__(self) -> None:
        self.state = State.NEW
        self.dirty: str | None = None  # why the producer must be made anew before the next transaction
        self.disturbances = 0  # of its connections
        self.began = 0.0
        self.used = 0.0

    def on(self, event: Event, now: float) -> Self:
        """Apply an event. Raises RuntimeError for a call that is not legal: that is a bug in this library."""
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise RuntimeError(f"a transactional producer that is {self.state.value!r} cannot be {event.value!r}")
        if event is Event.BEGUN:
            self.began = now
        self.state = following
        self.used = now
        return self

    def soil(self, why: str) -> None:
        """Note something ambiguous. The first reason is kept."""
        if self.dirty is None:
            self.dirty = why

    def disturb(self, why: str) -> None:
        """Note that a connection was cut, or may have been."""
        self.disturbances += 1
        self.soil(why)

    def ended(self, *, calls: int, seconds: float) -> None:
        """An end call succeeded, at which try and after how long."""
        if calls > 1:
            self.soil(f"an end of transaction needed {calls} calls")
        if seconds > SLOW_END:
            self.soil(f"an end of transaction took {seconds:.1f} s")

    def renewal(self, now: float) -> str | None:
        """Why a new producer object is needed before the next transaction; None: this one is good."""
        if self.state is not State.READY:
            return f"the last transaction was left {self.state.value!r}"
        if self.dirty is None and now - self.used > IDLE_LIMIT:
            return "it was idle for a day"
        return self.dirty


class Verdict(Enum):
    """What an error of a transactional call asks for."""

    RETRY = "the same call again, with the same arguments"
    ABORT = "abort, rewind"
    RENEW = "outcome unknown: new producer, init_transactions(), committed() decides"
    FENCED = "another instance has this transactional.id: stop"
    REFUSED = "an ACL is missing, or the brokers or librdkafka cannot do this: stop"


# The brokers would answer the next transaction in the same way, and the one after it. They are no codes of a transaction in
# trouble, but of brokers that are too old, of a group.id that is none, of settings: whoever aborts and goes on never ends.
NEVER = frozenset(
    {
        KafkaError._UNSUPPORTED_FEATURE,
        KafkaError.INVALID_COMMIT_OFFSET_SIZE,
        KafkaError.INVALID_GROUP_ID,
        KafkaError.INVALID_REQUEST,
        KafkaError.INVALID_TRANSACTION_TIMEOUT,
        KafkaError.OFFSET_METADATA_TOO_LARGE,
        KafkaError.SECURITY_DISABLED,
        KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT,
        KafkaError.UNSUPPORTED_VERSION,
    }
)


# librdkafka refused the arguments: nothing was sent, and that is why it gives no flag. It will refuse them again. A response
# that it could not read has the same code, and the flag that the transaction must abort.
NOT_SENT = frozenset({KafkaError._BAD_MSG, KafkaError._INVALID_ARG})


def judge(error: KafkaError, *, age: float, transaction_timeout: float) -> Verdict:
    """What to do about an error of init, begin, send_offsets, commit or abort (the table of HAZARDS 2.2).

    A transaction that the coordinator timed out and one that a newer instance fenced give the same error (X07). The clock
    tells them apart: ours began before the coordinator's, so a transaction younger than its timeout was not timed out.
    """
    if error.code() in FENCED:
        return Verdict.RENEW if age >= transaction_timeout else Verdict.FENCED
    if error.code() in MISSING_ACL or error.code() in NEVER:
        return Verdict.REFUSED
    if error.fatal() or error.code() in (KafkaError._FATAL, KafkaError._CONFLICT, KafkaError._STATE):
        return Verdict.RENEW
    if error.txn_requires_abort():
        return Verdict.ABORT
    if error.retriable():
        return Verdict.RETRY
    return Verdict.REFUSED if error.code() in NOT_SENT else Verdict.RENEW
