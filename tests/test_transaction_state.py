"""Laws of the transaction state machine and of what each error in it asks for. Times are plain numbers; no broker needed."""

from __future__ import annotations

import itertools

import pytest
from confluent_kafka import KafkaError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kafka_guarantees._transaction_state import (
    IDLE_LIMIT,
    NEVER,
    NOT_SENT,
    SLOW_END,
    TRANSITIONS,
    Event,
    State,
    TransactionState,
    Verdict,
    judge,
)
from kafka_guarantees.errors import FENCED, MISSING_ACL

# The drawing at the head of the module, written out once more by hand.
LEADS = {
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
    (State.NEW, Event.LOST): State.LOST,
    (State.READY, Event.LOST): State.LOST,
    (State.IN_TRANSACTION, Event.LOST): State.LOST,
    (State.MUST_ABORT, Event.LOST): State.LOST,
    (State.COMMITTING, Event.LOST): State.LOST,
    (State.ABORTING, Event.LOST): State.LOST,
    (State.LOST, Event.LOST): State.LOST,
}

# The shortest way from NEW to each state.
WAYS: dict[State, tuple[Event, ...]] = {
    State.NEW: (),
    State.READY: (Event.INITIALISED,),
    State.IN_TRANSACTION: (Event.INITIALISED, Event.BEGUN),
    State.MUST_ABORT: (Event.INITIALISED, Event.BEGUN, Event.FAILED),
    State.COMMITTING: (Event.INITIALISED, Event.BEGUN, Event.COMMIT),
    State.ABORTING: (Event.INITIALISED, Event.BEGUN, Event.ABORT),
    State.LOST: (Event.LOST,),
}


def at(state: State, now: float = 0.0) -> TransactionState:
    reached = TransactionState()
    for event in WAYS[state]:
        reached.on(event, now)
    assert reached.state is state
    return reached


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_an_event_leads_where_the_drawing_says_or_is_refused(state: State, event: Event) -> None:
    """Every pair of state and event: a legal one leads to the one state drawn; any other raises and changes nothing."""
    machine = at(state, now=3.0)
    following = LEADS.get((state, event))
    if following is None:
        with pytest.raises(RuntimeError, match=f"{state.value!r} cannot be {event.value!r}"):
            machine.on(event, 7.0)
        assert (machine.state, machine.used, machine.dirty) == (state, at(state, 3.0).used, None)
    else:
        assert machine.on(event, 7.0) is machine
        assert machine.state is following
        assert machine.used == 7.0


def test_the_table_has_no_transition_that_is_not_drawn() -> None:
    """The table of the code is the table of this test: a new transition is a decision, and is written down twice."""
    assert TRANSITIONS == LEADS


@pytest.mark.parametrize("state", [State.COMMITTING, State.ABORTING])
def test_a_pending_end_allows_no_other_call(state: State) -> None:
    """X10: after commit (or abort) timed out, calling anything else desynchronizes librdkafka."""
    calls = {Event.INITIALISED, Event.BEGUN, Event.COMMIT, Event.ABORT}
    assert not {event for event in calls if (state, event) in TRANSITIONS}


@pytest.mark.parametrize("state", State)
def test_any_state_can_be_lost(state: State) -> None:
    """The producer can be thrown away at every moment, also twice."""
    assert at(state).on(Event.LOST, 1.0).state is State.LOST


class Machine(RuleBasedStateMachine):
    """Every sequence of legal events, with time going on and things going wrong in between."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.machine = TransactionState()
        self.reason: str | None = None
        self.must_abort = False
        self.was_lost = False

    @precondition(lambda self: not self.was_lost)
    @rule(data=st.data(), seconds=st.floats(0, 100))
    def step(self, data: st.DataObject, seconds: float) -> None:
        before = self.machine.state
        # LOST is always legal, and rare on purpose: else no long life is ever seen
        legal = [event for event in Event if (before, event) in TRANSITIONS and event is not Event.LOST]
        event = data.draw(st.sampled_from(legal))
        self.now += seconds
        self.machine.on(event, self.now)
        if event is Event.BEGUN:
            assert not self.must_abort, "a new transaction began although the last one was never aborted"
            assert self.machine.began == self.now
        if event is Event.ABORTED:
            self.must_abort = False
        if self.machine.state is State.MUST_ABORT:
            self.must_abort = True

    @precondition(lambda self: self.machine.began > 0)
    @rule()
    def lose(self) -> None:
        self.machine.on(Event.LOST, self.now)
        self.was_lost = True

    @precondition(lambda self: self.was_lost)
    @rule(event=st.sampled_from(Event))
    def use_what_is_lost(self, event: Event) -> None:
        """X06: no event brings a lost producer back."""
        if event is Event.LOST:
            self.machine.on(event, self.now)
        else:
            with pytest.raises(RuntimeError):
                self.machine.on(event, self.now)

    @rule(why=st.sampled_from(["a disconnect", "a timeout"]))
    def soil(self, why: str) -> None:
        self.reason = self.reason or why
        self.machine.soil(why)

    @invariant()
    def lost_is_for_good(self) -> None:
        assert (self.machine.state is State.LOST) is self.was_lost

    @invariant()
    def what_must_abort_is_never_committed(self) -> None:
        """X05: between a failure and the abort, no call of commit is possible."""
        if self.must_abort and not self.was_lost:
            assert self.machine.state in (State.MUST_ABORT, State.ABORTING)
            assert (self.machine.state, Event.COMMIT) not in TRANSITIONS

    @invariant()
    def dirt_stays(self) -> None:
        """X01: nothing makes a producer clean again; the first reason is told."""
        assert self.machine.dirty == self.reason

    @invariant()
    def only_a_clean_ready_producer_may_begin(self) -> None:
        good = self.machine.state is State.READY and self.reason is None
        assert (self.machine.renewal(self.now) is None) is good


TestLives = Machine.TestCase
TestLives.settings = settings(deadline=None)


# --- when a producer is made anew ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "seconds", "expected"),
    [
        (1, 0.0, None),
        (1, SLOW_END, None),
        (1, SLOW_END + 0.01, "took 1.0 s"),
        (1, 7.25, "took 7.2 s"),
        (2, 0.0, "needed 2 calls"),
        (3, 9.0, "needed 3 calls"),
    ],
)
def test_an_end_that_was_slow_or_repeated_makes_the_producer_dirty(calls: int, seconds: float, expected: str | None) -> None:
    """X01 a, c: a second EndTxn may be on its way, so the next transaction needs another epoch."""
    machine = at(State.READY)
    machine.ended(calls=calls, seconds=seconds)
    if expected is None:
        assert machine.renewal(0.0) is None
    else:
        assert expected in (machine.renewal(0.0) or "")


@pytest.mark.parametrize("state", State)
def test_what_is_not_ready_is_made_anew(state: State) -> None:
    """Whatever the last transaction was left in, the next one does not begin in it."""
    why = at(state).renewal(0.0)
    assert why is None if state is State.READY else why is not None and state.value in why


def test_a_producer_that_nobody_used_for_a_day_is_made_anew() -> None:
    """B04: brokers forget a transactional.id that is not used. Use, not age, is what counts."""
    machine = at(State.READY, now=1000.0)
    assert machine.renewal(1000.0 + IDLE_LIMIT) is None
    assert "idle" in (machine.renewal(1000.0 + IDLE_LIMIT + 1) or "")
    machine.on(Event.BEGUN, 50_000.0).on(Event.COMMIT, 50_001.0).on(Event.COMMITTED, 50_002.0)
    assert machine.renewal(1000.0 + IDLE_LIMIT + 1) is None
    assert machine.renewal(50_002.0 + IDLE_LIMIT + 1) is not None


def test_the_first_reason_is_kept() -> None:
    """What made a producer dirty first is what an operator wants to read."""
    machine = at(State.READY)
    machine.soil("first")
    machine.soil("second")
    assert machine.renewal(0.0) == "first"
    assert machine.renewal(IDLE_LIMIT * 3) == "first"


def test_a_dirty_producer_may_finish_its_transaction() -> None:
    """X01: the open transaction is not the one that a stray request can hurt; the next one is."""
    machine = at(State.IN_TRANSACTION)
    machine.soil("a disconnect")
    machine.on(Event.COMMIT, 1.0).on(Event.COMMITTED, 2.0)
    assert machine.renewal(2.0) == "a disconnect"


def test_began_is_the_time_of_the_last_begin() -> None:
    """The age of a transaction is counted from its own beginning, not from the first one."""
    machine = TransactionState()
    for event, now in [
        (Event.INITIALISED, 1.0),
        (Event.BEGUN, 2.0),
        (Event.ABORT, 3.0),
        (Event.ABORTED, 4.0),
        (Event.BEGUN, 5.0),
        (Event.FAILED, 6.0),
    ]:
        machine.on(event, now)
    assert (machine.began, machine.used) == (5.0, 6.0)


# --- what an error asks for ------------------------------------------------------------------------------------------

TIMEOUT = 15.0
E = KafkaError


def error(code: int, *, retriable: bool = False, abort: bool = False, fatal: bool = False) -> KafkaError:
    return KafkaError(code, "as measured", fatal, retriable, abort)


# HAZARDS 2.2, row by row: situation, call, error, verdict while the transaction is young.
MEASURED = [
    ("newer instance, transaction open", "commit", error(E._FENCED, fatal=True), Verdict.FENCED),
    ("after that", "abort", error(E._CONFLICT, retriable=True), Verdict.RENEW),
    ("after that", "begin", error(E._CONFLICT, retriable=True), Verdict.RENEW),
    ("after that, flag missing", "produce", error(E._FATAL), Verdict.RENEW),
    ("commit with too small timeout", "commit", error(E._TIMED_OUT, retriable=True), Verdict.RETRY),
    ("while that is pending", "begin", error(E._CONFLICT, retriable=True), Verdict.RENEW),
    ("while that is pending", "abort", error(E._CONFLICT, retriable=True), Verdict.RENEW),
    ("while that is pending", "produce", error(E._STATE), Verdict.RENEW),
    ("init with too small timeout", "init", error(E._TIMED_OUT, retriable=True), Verdict.RETRY),
    ("stale generation", "send_offsets", error(E.ILLEGAL_GENERATION, abort=True), Verdict.ABORT),
    ("kicked-out member", "send_offsets", error(E.UNKNOWN_MEMBER_ID, abort=True), Verdict.ABORT),
    ("late EndTxn injected", "abort", error(E.INVALID_TXN_STATE, fatal=True), Verdict.RENEW),
    ("old transaction still ending", "init", error(E.CONCURRENT_TRANSACTIONS, retriable=True), Verdict.RETRY),
    ("coordinator moves", "commit", error(E.NOT_COORDINATOR, retriable=True), Verdict.RETRY),
    ("no flag at all", "commit", error(E.UNKNOWN), Verdict.RENEW),
    ("no flag at all", "commit", error(E._TIMED_OUT), Verdict.RENEW),
    ("metadata that librdkafka does not read", "send_offsets", error(E._BAD_MSG), Verdict.REFUSED),
    ("a response that it does not read", "send_offsets", error(E._BAD_MSG, abort=True), Verdict.ABORT),
    ("no offsets given", "send_offsets", error(E._INVALID_ARG), Verdict.REFUSED),
]


@pytest.mark.parametrize(
    ("found", "expected"),
    [pytest.param(found, verdict, id=f"{situation}: {call} {found.name()}") for situation, call, found, verdict in MEASURED],
)
def test_every_measured_error_gets_its_verdict(found: KafkaError, expected: Verdict) -> None:
    """HAZARDS 2.2: each row of the table that was measured on a real cluster, while the transaction is young."""
    assert judge(found, age=0.5, transaction_timeout=TIMEOUT) is expected


@pytest.mark.parametrize("code", sorted(FENCED))
@pytest.mark.parametrize(("age", "expected"), [(0.0, Verdict.FENCED), (14.99, Verdict.FENCED), (15.0, Verdict.RENEW)])
@pytest.mark.parametrize("flags", [{"fatal": True}, {"abort": True}, {}])
def test_age_tells_a_fence_from_a_timeout(code: int, age: float, expected: Verdict, flags: dict[str, bool]) -> None:
    """X07: one error for two situations. Ours began earlier than the coordinator's clock: younger cannot have timed out."""
    assert judge(error(code, **flags), age=age, transaction_timeout=TIMEOUT) is expected


FLAGS = st.fixed_dictionaries({"retriable": st.booleans(), "abort": st.booleans(), "fatal": st.booleans()})
CODES = st.sampled_from(
    sorted({value for name, value in vars(KafkaError).items() if name.isupper() and isinstance(value, int)})
)
AGES = st.floats(0, 4 * TIMEOUT)


@settings(deadline=None)
@given(FLAGS, AGES)
def test_conflict_is_never_retried(flags: dict[str, bool], age: float) -> None:
    """X06: a poisoned producer answers _CONFLICT for ever and calls that retriable."""
    assert judge(error(E._CONFLICT, **flags), age=age, transaction_timeout=TIMEOUT) is Verdict.RENEW


@settings(deadline=None)
@given(CODES, AGES)
def test_what_is_fatal_is_never_tried_again(code: int, age: float) -> None:
    """After a fatal error no call on that producer can succeed, whatever else the error claims."""
    verdict = judge(error(code, fatal=True, retriable=True, abort=True), age=age, transaction_timeout=TIMEOUT)
    assert verdict in (Verdict.RENEW, Verdict.FENCED, Verdict.REFUSED)


@settings(deadline=None)
@given(CODES, FLAGS, AGES)
def test_a_call_is_repeated_only_where_librdkafka_says_that_it_may(code: int, flags: dict[str, bool], age: float) -> None:
    """RETRY needs the flag, ABORT needs the flag: without one, the outcome is unknown (X09)."""
    verdict = judge(error(code, **flags), age=age, transaction_timeout=TIMEOUT)
    if verdict is Verdict.RETRY:
        assert flags["retriable"]
        assert not flags["abort"]
        assert not flags["fatal"]
    if verdict is Verdict.ABORT:
        assert flags["abort"]
        assert not flags["fatal"]


@pytest.mark.parametrize("code", sorted(MISSING_ACL))
@pytest.mark.parametrize("flags", [{}, {"fatal": True}, {"abort": True}, {"retriable": True}])
def test_a_missing_acl_is_refused_whatever_its_flags(code: int, flags: dict[str, bool]) -> None:
    """S07: no retry and no new producer gives a right that was not granted."""
    assert judge(error(code, **flags), age=99.0, transaction_timeout=TIMEOUT) is Verdict.REFUSED


# The default of every code that is in no table: what librdkafka's own flags say, and without one the outcome is unknown.
BY_FLAGS = [
    ({"retriable": True}, Verdict.RETRY),
    ({"abort": True}, Verdict.ABORT),
    ({"retriable": True, "abort": True}, Verdict.ABORT),
    ({"fatal": True}, Verdict.RENEW),
    ({}, Verdict.RENEW),
]
POISONED = {E._FATAL, E._CONFLICT, E._STATE}


@pytest.mark.parametrize(("flags", "expected"), BY_FLAGS)
def test_every_code_gets_its_verdict(flags: dict[str, bool], expected: Verdict) -> None:
    """E01: of transactional calls the flags are true. They decide, unless the code says that it is over, or will ever be."""
    for name, code in vars(KafkaError).items():
        if not (name.isupper() and isinstance(code, int)):
            continue
        verdict = judge(error(code, **flags), age=0.5, transaction_timeout=TIMEOUT)
        if code in FENCED:
            assert verdict is Verdict.FENCED
        elif code in MISSING_ACL or code in NEVER or (code in NOT_SENT and not flags):
            assert verdict is Verdict.REFUSED
        else:
            assert verdict is (Verdict.RENEW if code in POISONED else expected), name


@pytest.mark.parametrize("code", sorted(NEVER))
@pytest.mark.parametrize("flags", [{}, {"fatal": True}, {"abort": True}, {"retriable": True}])
def test_what_can_never_be_is_not_tried_for_ever(code: int, flags: dict[str, bool]) -> None:
    """Brokers that are too old, a group.id that is none: to abort and fetch again would never end, and say nothing."""
    assert judge(error(code, **flags), age=99.0, transaction_timeout=TIMEOUT) is Verdict.REFUSED


def test_what_can_never_be_is_what_is_written_here() -> None:
    """No code of a transaction in trouble is among them: there the next one succeeds."""
    assert {
        E._UNSUPPORTED_FEATURE,
        E.INVALID_COMMIT_OFFSET_SIZE,
        E.INVALID_GROUP_ID,
        E.INVALID_REQUEST,
        E.INVALID_TRANSACTION_TIMEOUT,
        E.OFFSET_METADATA_TOO_LARGE,
        E.SECURITY_DISABLED,
        E.UNSUPPORTED_FOR_MESSAGE_FORMAT,
        E.UNSUPPORTED_VERSION,
    } == NEVER
