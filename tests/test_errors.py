"""Laws of the error tree: its drawing is true, each code has its class, messages say what is safe, runs end where they must."""

from __future__ import annotations

import gc
import pickle
import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Message
from hypothesis import given, settings
from hypothesis import strategies as st

import kafka_guarantees
from kafka_guarantees import AtLeastOnce, AtMostOnce, Delivery, dedup, errors
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees._transaction_state import NEVER, NOT_SENT, Verdict, judge
from kafka_guarantees.errors import (
    FENCED,
    INSTANCE,
    MISSING_ACL,
    NO_TOPIC,
    REFUSED,
    STOPS,
    UNSENT,
    AuthorizationError,
    BrokerError,
    DeliveryError,
    DeliveryUnknown,
    FencedError,
    KafkaGuaranteesError,
    UnsafeConfigError,
    broker_failure,
    delivery_failure,
    describe,
    futile,
    kafka_error,
    stops,
)
from kafka_guarantees.prove.proxy import Proxy
from kafka_guarantees.testing.local_kafka import LocalKafka

from .conftest import committed, fill

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from kafka_guarantees.testing.local_kafka import RunningKafka

E = KafkaError
DEAD = "127.0.0.1:1"


class Request:
    """What a handler of requests has in its hands."""


@pytest.mark.parametrize("partition", [None, 0])
def test_a_refusal_keeps_nothing_of_the_exception_that_is_being_handled(partition: int | None) -> None:
    """The KafkaError that confluent-kafka raises is never freed, and before Python 3.12 that refers to this exception."""
    kept: list[weakref.ref[Request]] = []

    def serve(client: AtLeastOnce) -> None:
        request = Request()
        kept.append(weakref.ref(request))
        try:
            int("no number")
        except ValueError:
            client.produce("errors", b"x" * 2_000_000, partition=partition)

    with pytest.raises(DeliveryError), AtLeastOnce({"bootstrap.servers": DEAD, "log_level": 0}) as client:
        serve(client)
    gc.collect()
    assert [reference() for reference in kept] == [None]


def classes() -> dict[str, type[BaseException]]:
    """The classes that errors.py defines."""
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == errors.__name__
    }


# --- the tree --------------------------------------------------------------------------------------------------------


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    """Every class that is drawn exists, below what it is drawn below; every class that exists is drawn."""
    assert errors.__doc__ is not None
    branches = re.findall(r"^    (│   )?[├└]── (\w+) +(.*)", errors.__doc__, re.MULTILINE)
    found = classes()
    warnings = {"DurabilityWarning", "SecurityWarning"}
    assert {name for _, name, _ in branches} == set(found) - warnings - {"KafkaGuaranteesError"}
    parent: type[BaseException] = KafkaGuaranteesError
    for deeper, name, rest in branches:
        if not deeper:
            parent = found[name]
        assert found[name].__bases__[0] is (parent if deeper else KafkaGuaranteesError)
        assert (found[name].__bases__[1:] == (ValueError,)) is ("(also ValueError)" in rest)
    for name in warnings:
        assert f"{name:<26} (a UserWarning)" in errors.__doc__
        assert found[name].__bases__ == (UserWarning,)
    assert KafkaGuaranteesError.__bases__ == (Exception,)


def test_every_class_of_the_tree_is_public() -> None:
    """What can be raised can be imported from the package, or where it belongs to: and has a docstring of its own."""
    for name, found in classes().items():
        room = kafka_guarantees if name in kafka_guarantees.__all__ else dedup
        assert getattr(room, name) is found
        assert name in room.__all__
        assert found.__doc__


@pytest.mark.parametrize("name", sorted(set(classes()) - {"UnsafeConfigError"}))
def test_an_error_survives_pickle(name: str) -> None:
    """Errors cross process borders (multiprocessing, job queues) with their class and text."""
    error = pickle.loads(pickle.dumps(classes()[name]("what happened")))
    assert type(error) is classes()[name]
    assert str(error) == "what happened"


def test_an_unsafe_config_error_survives_pickle_with_its_parts() -> None:
    """Its constructor takes four arguments: without __reduce__, unpickling would raise TypeError."""
    with pytest.raises(UnsafeConfigError) as caught:
        AtLeastOnce({"bootstrap.servers": DEAD, "acks": 0})
    error = pickle.loads(pickle.dumps(caught.value))
    assert type(error) is UnsafeConfigError
    assert str(error) == str(caught.value)
    assert (error.setting, error.value) == ("acks", caught.value.value)
    assert (error.breaks, error.instead) == (caught.value.breaks, caught.value.instead)


def test_an_unsafe_config_error_names_setting_value_harm_and_remedy() -> None:
    """Who reads it knows what to change without opening the documentation."""
    text = str(UnsafeConfigError("acks", "0", "a record can be lost", "leave it out"))
    assert text == "acks='0' is refused: a record can be lost. Instead: leave it out."
    assert isinstance(UnsafeConfigError("a", 1, "b", "c"), ValueError)


# --- every code ------------------------------------------------------------------------------------------------------

CODES = sorted({value for name, value in vars(KafkaError).items() if name.isupper() and isinstance(value, int)})

# Those that somebody has looked at. What is in no table of errors.py has its default: a record that fails with it may be
# written, a run goes on.
DECIDED = {*range(-199, -136), *range(-1, 98), 100, 103, *range(110, 134)}


def test_every_code_was_looked_at() -> None:
    """E01: a code that a new librdkafka brings fails here, until somebody decides what it means to a record and to a run."""
    assert [KafkaError(code).name() for code in CODES if code not in DECIDED] == []


# P05: a code that moves to "certainly not written" permits a re-send, so it is written down twice.
REFUSED_THIS_TIME = {
    E._INVALID_ARG,
    E.MSG_SIZE_TOO_LARGE,
    E.RECORD_LIST_TOO_LARGE,
    E.INVALID_MSG_SIZE,
    E.INVALID_RECORD,
    E.INVALID_TIMESTAMP,
    E.INVALID_REQUIRED_ACKS,
    E.UNSUPPORTED_FOR_MESSAGE_FORMAT,
    E.UNSUPPORTED_COMPRESSION_TYPE,
    E.TOPIC_EXCEPTION,
    E._UNKNOWN_TOPIC,
    E._UNKNOWN_PARTITION,
    E.UNKNOWN_TOPIC_OR_PART,
    E.POLICY_VIOLATION,
    E.TOPIC_AUTHORIZATION_FAILED,
    E.CLUSTER_AUTHORIZATION_FAILED,
}
NOT_SENT_THIS_TIME = {E._QUEUE_FULL, E._PURGE_QUEUE, E._INVALID_DIFFERENT_RECORD, E._STATE, E._FATAL}


def test_the_tables_are_the_tables_here() -> None:
    """P05: and no code is in two of them."""
    assert (set(REFUSED), set(UNSENT)) == (REFUSED_THIS_TIME, NOT_SENT_THIS_TIME)
    assert not set(REFUSED) & set(UNSENT)


@pytest.mark.parametrize("partition", [None, 3])
def test_what_every_code_says_of_a_record(partition: int | None) -> None:
    """P05: not written for certain where this was the only try; else it may be written.

    Before librdkafka has chosen a partition, nothing of a record was sent. After that, one try may be written and its answer
    lost, and the next one be refused: by an ACL, a deleted topic, a purge, or for another record in its batch (P05).
    """
    for code in CODES:
        failure = delivery_failure(KafkaError(code, "as answered"), "orders", partition)
        certain = partition is None and code in REFUSED_THIS_TIME | NOT_SENT_THIS_TIME
        assert type(failure) is (DeliveryError if certain else DeliveryUnknown), KafkaError(code).name()
        text = str(failure)
        where = "topic 'orders'" if partition is None else "topic 'orders' partition 3"
        what = "was not written" if certain else "may or may not have been written"
        assert text.startswith(f"a record for {where} {what} ({KafkaError(code).name()}: as answered).")
        safe = "Sent again, it makes no duplicate." if certain else "Sending it again may make a duplicate: keep its message id"
        assert safe in text
        ends_with_advice(text)


@pytest.mark.parametrize("code", sorted({*REFUSED_THIS_TIME, *NOT_SENT_THIS_TIME}))
def test_a_try_that_was_refused_says_nothing_of_the_one_before(code: int) -> None:
    """P05: whoever reads of a refusal would conclude that the record is not there. The message says why it may be."""
    assert "one before it may have been written" in str(delivery_failure(KafkaError(code), "orders", 0))


@settings(deadline=None)
@given(st.sampled_from(CODES) | st.integers(1, 32_000), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_the_class_of_a_failure_depends_on_its_code_alone(code: int, flags: tuple[bool, bool, bool]) -> None:
    """E01: librdkafka sets its flags on transactional errors only: nothing is read from them. A new code is doubtful."""
    failure = delivery_failure(KafkaError(code, "x", *flags), "t")
    assert type(failure) is (DeliveryError if code in REFUSED_THIS_TIME | NOT_SENT_THIS_TIME else DeliveryUnknown)


@pytest.mark.parametrize("code", [E.ILLEGAL_GENERATION, E.UNKNOWN_MEMBER_ID, E.STALE_MEMBER_EPOCH])
def test_a_rebalance_is_not_blamed_on_the_brokers(code: int) -> None:
    """They are up, and have answered."""
    text = str(broker_failure(KafkaError(code), "committing offsets", "They may or may not be committed."))
    assert "assigned its partitions anew" in text
    assert "brokers are up" not in text


def test_the_same_record_is_not_tried_again_where_it_must_fail_again() -> None:
    """A transaction that is aborted for such a record, and begun again with it, never ends."""
    assert {code for code in CODES if futile(KafkaError(code))} == REFUSED_THIS_TIME


# What ends a run. Of everything else librdkafka, or the loop, tries again.
ENDS_A_RUN = {
    E.FENCED_INSTANCE_ID,
    E.UNRELEASED_INSTANCE_ID,
    E.INCONSISTENT_GROUP_PROTOCOL,
    E.UNSUPPORTED_ASSIGNOR,
    E.GROUP_MAX_SIZE_REACHED,
    E.INVALID_GROUP_ID,
    E.GROUP_ID_NOT_FOUND,
    E.INVALID_SESSION_TIMEOUT,
    E.INVALID_REGULAR_EXPRESSION,
    E.INVALID_REQUEST,
    E.UNSUPPORTED_VERSION,
    E._UNSUPPORTED_FEATURE,
    E.TOPIC_EXCEPTION,
    E._AUTHENTICATION,
    E.SASL_AUTHENTICATION_FAILED,
    E.UNSUPPORTED_SASL_MECHANISM,
    E._FATAL,
    E._BAD_MSG,
    E._BAD_COMPRESSION,
    E._NOT_IMPLEMENTED,
    E.INVALID_MSG,
    E.TOPIC_AUTHORIZATION_FAILED,
    E.GROUP_AUTHORIZATION_FAILED,
    E.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    E.CLUSTER_AUTHORIZATION_FAILED,
}


def test_what_ends_a_run_is_what_is_written_here() -> None:
    """A code too few is a run that waits for ever without a word; one too many is a run that a broker's restart ends."""
    assert {code for code in CODES if stops(KafkaError(code))} == ENDS_A_RUN
    passing = {E._TRANSPORT, E._ALL_BROKERS_DOWN, E._WAIT_COORD, E._TIMED_OUT, E.NOT_COORDINATOR, E.COORDINATOR_NOT_AVAILABLE}
    passing |= {E.REBALANCE_IN_PROGRESS, E.ILLEGAL_GENERATION, E.UNKNOWN_MEMBER_ID, E.STALE_MEMBER_EPOCH, E.FENCED_MEMBER_EPOCH}
    passing |= {E.LEADER_NOT_AVAILABLE, E.NOT_LEADER_FOR_PARTITION, E.UNSTABLE_OFFSET_COMMIT, E.KAFKA_STORAGE_ERROR, E.UNKNOWN}
    assert not passing & ENDS_A_RUN


def test_what_every_code_says_of_a_request() -> None:
    """Each names its class, what was being done, the code, what is safe, and what to do about it."""
    for code in CODES:
        failure = broker_failure(KafkaError(code, "as answered"), "committing offsets", "Nothing moved.")
        acl, instance = code in MISSING_ACL, code in (E.FENCED_INSTANCE_ID, E.UNRELEASED_INSTANCE_ID)
        assert type(failure) is (AuthorizationError if acl else FencedError if instance else BrokerError)
        text = str(failure)
        verb = "was refused" if acl else "failed"
        assert text.startswith(f"committing offsets {verb} ({KafkaError(code).name()}: as answered).")
        assert "Nothing moved." in text
        if acl:
            assert "Grant " in text
        else:
            ends_with_advice(text)


@pytest.mark.parametrize("code", sorted(ENDS_A_RUN - {E._FATAL}))
def test_the_reason_of_a_fatal_consumer_is_found_in_its_text(code: int) -> None:
    """The binding gives its code as _FATAL. What librdkafka makes of the reason is text, as in rd_kafka_set_fatal_error0()."""
    reason = KafkaError(code)
    fatal = KafkaError(E._FATAL, f"Fatal error: {reason.str()}: Fatal consumer error: {reason.str()}")
    found = broker_failure(fatal, "consuming", "Nothing was committed.")
    assert reason.name() in str(found)
    assert type(found) is type(broker_failure(reason, "consuming", ""))


def test_a_fatal_consumer_without_a_known_reason_is_one_all_the_same() -> None:
    """A reason that nobody has seen yet ends the run as well, and is quoted."""
    found = broker_failure(KafkaError(E._FATAL, "Fatal error: Broker: The moon is full"), "consuming", "Nothing moved.")
    assert type(found) is BrokerError
    assert "The moon is full" in str(found)
    ends_with_advice(str(found))


IMPERATIVES = (
    *("Ask", "Correct", "Change", "Create", "Give", "Grant", "Have", "Look", "Make", "Run", "Send", "Set", "Stop", "Upgrade"),
    *("After a crash", "To give up", "The group was deleted: run"),
)


def ends_with_advice(text: str) -> None:
    """Its last sentences say what to do."""
    sentences = re.split(r"(?<=[.)]) (?=[A-Z])", text)
    assert text.endswith((".", ")"))
    assert any(sentence.startswith(IMPERATIVES) for sentence in sentences[-2:]), text
    assert "None" not in text


# --- ACLs ------------------------------------------------------------------------------------------------------------

ACLS = {
    E.TOPIC_AUTHORIZATION_FAILED: ("READ on the topics", "WRITE on the topics"),
    E.GROUP_AUTHORIZATION_FAILED: ("READ on the consumer group",),
    E.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: ("WRITE on the transactional.id",),
    E.CLUSTER_AUTHORIZATION_FAILED: ("IDEMPOTENT_WRITE on the cluster",),
}


def test_every_kind_of_missing_acl_is_in_the_table() -> None:
    """S07: the four resources that a client of ours touches."""
    assert set(MISSING_ACL) == set(ACLS)


@pytest.mark.parametrize("code", sorted(ACLS))
def test_a_refused_request_names_the_acl_and_what_is_safe(code: int) -> None:
    """S07: the error is one that an operator can act on, and it keeps the sentence about what is safe."""
    failure = broker_failure(KafkaError(code, "denied"), "committing offsets", "Nothing moved.")
    assert type(failure) is AuthorizationError
    assert all(f"{acl}" in str(failure) for acl in ACLS[code])
    assert str(failure).startswith("committing offsets was refused")
    assert str(failure).endswith("Nothing moved.")


@pytest.mark.parametrize("partition", [None, 0])
def test_a_refused_record_names_the_acl(partition: int | None) -> None:
    """S07: also where the refusal comes as the fate of a record; and where an earlier try of it may be written."""
    topic, cluster = E.TOPIC_AUTHORIZATION_FAILED, E.CLUSTER_AUTHORIZATION_FAILED
    assert "Grant WRITE on topic 'orders'" in str(delivery_failure(KafkaError(topic), "orders", partition))
    assert ACLS[cluster][0] in str(delivery_failure(KafkaError(cluster), "orders", partition))


def test_a_fence_and_a_missing_acl_are_told_apart() -> None:
    """No code is in two tables that contradict each other: what to do next is unambiguous."""
    assert not FENCED & set(MISSING_ACL)
    assert not FENCED & {*REFUSED, *UNSENT, *STOPS}
    assert not NO_TOPIC & {*STOPS, *MISSING_ACL}  # a topic may be on its way
    assert not set(STOPS) & set(MISSING_ACL)
    assert set(STOPS) >= INSTANCE


# --- foreign errors --------------------------------------------------------------------------------------------------


def test_an_exception_without_a_kafka_error_gets_one() -> None:
    """Whatever confluent-kafka raises, there is a code to look at."""
    inner = KafkaError(E._TRANSPORT, "gone")
    assert kafka_error(KafkaException(inner)) is inner
    assert kafka_error(KafkaException("only text")).code() == E._FAIL
    assert "only text" in describe(kafka_error(KafkaException("only text")))
    assert kafka_error(KafkaException()).code() == E._FAIL


def test_a_quoted_error_has_its_name_and_its_text() -> None:
    """Names are what one searches for; texts say which broker."""
    assert describe(KafkaError(E._TRANSPORT, "broker 3 gone")) == "_TRANSPORT: broker 3 gone"


def refused_by_produce() -> BaseException:
    with AtMostOnce({"bootstrap.servers": DEAD}) as kafka, pytest.raises(DeliveryError) as caught:
        kafka.produce("t", b"x" * 2_000_000)
    return caught.value


def refused_and_waited_for() -> BaseException:
    with AtLeastOnce({"bootstrap.servers": DEAD}) as kafka, pytest.raises(DeliveryError) as caught:
        kafka.produce("t", b"x" * 2_000_000).result()
    return caught.value


def refused_by_the_report() -> BaseException:
    class Server:
        unacknowledged: set[Delivery] = set()  # noqa: RUF012 - one server, one set
        failed = False
        patience = 1.0

        def wait_for(self, delivery: Delivery, timeout: float) -> None:
            """Nothing comes."""

        def future_of(self, delivery: Delivery) -> Any:
            raise NotImplementedError

        def looked_at(self, delivery: Delivery) -> None:
            """It is not kept."""

    delivery = Delivery("t", Server())
    delivery(KafkaError(E._MSG_TIMED_OUT), Message(topic="t"))
    with pytest.raises(DeliveryUnknown) as caught:
        delivery.result()
    return caught.value


@pytest.mark.parametrize(
    "failed",
    [
        refused_by_produce,
        refused_and_waited_for,
        refused_by_the_report,
    ],
)
def test_the_kafka_exception_is_the_cause(failed: Callable[[], BaseException]) -> None:
    """The error of librdkafka is never lost: whoever needs its code finds it at __cause__."""
    assert isinstance(failed().__cause__, KafkaException)


def test_settings_that_librdkafka_refuses_are_unsafe_config_errors() -> None:
    """Not a bare KafkaException: it crosses the border in one place, and shows no secret."""
    with pytest.raises(UnsafeConfigError):
        resolve(Guarantee.AT_LEAST_ONCE, {"bootstrap.servers": DEAD, "linger.ms": "soon"})


# --- runs on a real broker ---------------------------------------------------------------------------------------------


class Member:
    """A run in a thread of its own, and what became of it."""

    def __init__(self, config: dict[str, Any], topic: str, handler: Callable[[Message], None] = lambda _message: None) -> None:
        self.kafka = AtLeastOnce(config)
        self.error: BaseException | None = None
        self.consuming = threading.Event()
        self._handler = handler
        self._thread = threading.Thread(target=self._run, args=(topic,))

    def _run(self, topic: str) -> None:
        try:
            self.kafka.run([topic], self._handle)
        except BaseException as error:  # noqa: BLE001 - it is what is looked at
            self.error = error

    def _handle(self, message: Message) -> None:
        self._handler(message)
        self.consuming.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kafka.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()
        with suppress(KafkaGuaranteesError):
            self.kafka.close()

    def ended(self) -> str:
        """What its run raised, once it has."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "it runs on"
        assert self.error is not None, "it returned"
        assert isinstance(self.error.__cause__, KafkaException)
        ends_with_advice(str(self.error))
        return f"{type(self.error).__name__}: {self.error}"


@pytest.mark.broker
def test_a_static_member_that_another_one_replaces_stops(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """KIP-345: the older of two with one group.instance.id hears that there is another, and which setting to change."""
    topic, group = kafka_topic(), fresh("static")
    fill(kafka.bootstrap, topic, [b"x"])
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": group, "group.instance.id": "one"}
    with Member(config, topic) as old:
        assert old.consuming.wait(30)
        with Member(config, topic) as new:
            text = old.ended()
            assert new.error is None
    assert text.startswith(f"FencedError: consuming as a member of group {group!r} failed (FENCED_INSTANCE_ID: ")
    assert "Nothing was committed that was not handled. Stop one of them, or give each its own group.instance.id" in text


@pytest.mark.broker
@pytest.mark.parametrize("kind", [AtLeastOnce, AtMostOnce])
def test_a_static_member_that_is_replaced_while_it_handles_stops(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], kind: type[Any]
) -> None:
    """Its commit is the first to hear of it, and librdkafka does not say of what: it neither tries on nor takes the id back."""
    topic, group, busy, fenced = kafka_topic(), fresh("static"), threading.Event(), threading.Event()
    fill(kafka.bootstrap, topic, [b"x", b"y", b"z"])
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": group, "group.instance.id": "one", "heartbeat.interval.ms": 200}

    def handler(_message: Message) -> None:
        busy.set()
        fenced.wait(30)

    with kind(config, start="earliest", preflight="off") as old, ThreadPoolExecutor() as threads:
        run = threads.submit(old.run, [topic], handler, max_batch=1)
        assert busy.wait(30)
        with Member(config, topic) as new:
            assert new.consuming.wait(30)
            time.sleep(1)  # some heartbeats
            fenced.set()
            began = time.monotonic()
            with pytest.raises(FencedError):
                run.result(60)
            assert time.monotonic() - began < 10  # and not at the end of a session
            assert new.error is None


@pytest.mark.broker
def test_a_static_member_follows_one_of_the_consumer_protocol_that_was_not_heard_leaving(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """KIP-848: the brokers keep the id for the one that crashed, or whose leaving was lost, until its session is over."""
    topic, group = kafka_topic(), fresh("static")
    fill(kafka.bootstrap, topic, [b"x"])
    config = {"group.id": group, "group.instance.id": "one", "group.protocol": "consumer"}
    with Proxy(kafka.bootstrap) as proxy:
        with Member({**config, "bootstrap.servers": proxy.bootstrap}, topic) as old:
            assert old.consuming.wait(30)
            with proxy.refuse():
                old.kafka.stop()
                old._thread.join(30)
        fill(kafka.bootstrap, topic, [b"y"])
        with Member({**config, "bootstrap.servers": kafka.bootstrap}, topic) as new:
            assert new.consuming.wait(30)
            assert new.error is None


@pytest.mark.broker
def test_a_static_member_does_not_replace_one_of_the_consumer_protocol(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KIP-848: there the newer one is refused, once the older one cannot be one that crashed."""
    monkeypatch.setattr(GroupConsumer, "_until_released", lambda _self: time.monotonic() + 3)
    topic, group = kafka_topic(), fresh("static")
    fill(kafka.bootstrap, topic, [b"x"])
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": group, "group.instance.id": "one", "group.protocol": "consumer"}
    with Member(config, topic) as old:
        assert old.consuming.wait(30)
        with Member(config, topic) as new:
            text = new.ended()
        assert old.error is None
    assert text.startswith(f"FencedError: consuming as a member of group {group!r} failed (UNRELEASED_INSTANCE_ID: ")
    assert "group.consumer.session.timeout.ms" in text


@pytest.mark.broker
def test_members_without_a_common_protocol_are_told(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """C13: a member that the group does not take would wait for partitions for ever; half of a rolling change ends so."""
    topic, group = kafka_topic(), fresh("mixed")
    fill(kafka.bootstrap, topic, [b"x"])
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": group}
    with Member({**config, "partition.assignment.strategy": "range"}, topic) as old:
        assert old.consuming.wait(30)
        with Member({**config, "partition.assignment.strategy": "cooperative-sticky"}, topic) as new:
            text = new.ended()
        assert old.error is None
    assert text.startswith(f"BrokerError: consuming as a member of group {group!r} failed (INCONSISTENT_GROUP_PROTOCOL: ")
    assert "the same partition.assignment.strategy" in text


@pytest.mark.broker
def test_an_assignor_that_the_brokers_do_not_have_is_told(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """KIP-848: the same for settings of the group that the brokers refuse."""
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("assignor"), "group.protocol": "consumer"}
    with Member({**config, "group.remote.assignor": "nobody"}, kafka_topic()) as member:
        assert "UNSUPPORTED_ASSIGNOR" in member.ended()


@pytest.mark.broker
def test_brokers_of_which_kip_848_is_turned_off_are_not_to_be_upgraded(fresh: Callable[[str], str]) -> None:
    """C13: brokers of 4.x say so, by settings as by group.version=0, and the newest do: upgrading them is no advice."""
    with LocalKafka(config={"group.coordinator.rebalance.protocols": "classic"}) as kafka:
        kafka.create_topic("offers")
        config = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("off"), "group.protocol": "consumer"}
        with Member(config, "offers") as member:
            text = member.ended()
    assert "UNSUPPORTED_VERSION" in text
    assert "kafka-features.sh upgrade --feature group.version=1" in text


@pytest.mark.broker
def test_a_pattern_that_is_none_is_a_value_error(kafka: RunningKafka, fresh: Callable[[str], str]) -> None:
    """What subscribe() refuses does not come as a bare KafkaException."""
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("pattern")}
    with AtLeastOnce(config) as service, pytest.raises(ValueError, match=r"'\^\('\] are refused .*Correct the names"):
        service.run(["^("], lambda _message: None)


@pytest.mark.broker
def test_damaged_records_end_a_run(kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]) -> None:
    """C21: librdkafka passes over a batch with a bad checksum, and what comes after it would be committed: it would be lost.

    What came before it in the same fetch is handled first: who sets the group's offset behind it does not pass that over.
    """
    if not isinstance(kafka, LocalKafka):
        pytest.skip("needs the files of the brokers")
    topic, group, handled = kafka_topic(), fresh("damaged"), list[bytes | None]()
    for letter in (b"A", b"B", b"C"):
        fill(kafka.bootstrap, topic, [letter * 50])
    [segment] = kafka.data_dir.glob(f"broker-*/data/{topic}-0/*.log")
    place = segment.read_bytes().index(b"B" * 50)
    with segment.open("r+b") as file:
        file.seek(place + 10)
        file.write(b"X")
    ends = pytest.raises(BrokerError, match=rf"consuming topic '{topic}' partition 0 at offset 1 failed \(_BAD_MSG")
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": group}) as service, ends:
        service.run([topic], lambda message: handled.append(message.value()), until_idle=5)
    assert handled == [b"A" * 50]
    assert committed(kafka.bootstrap, group, topic) == [1]


# --- the document ----------------------------------------------------------------------------------------------------


def code_rows() -> list[tuple[str, ...]]:
    """What docs/errors.md says of each code that is more than its default: of a record, and of a run."""
    rows: list[tuple[str, ...]] = []
    for code in sorted({*REFUSED, *UNSENT, *STOPS, *MISSING_ACL, *FENCED, *NO_TOPIC, *NEVER, *NOT_SENT}):
        error = KafkaError(code)
        record = "`DeliveryError` / `DeliveryUnknown`" if code in {*REFUSED, *UNSENT} else ""
        ends = stops(error) or code in NO_TOPIC
        run = f"`{type(broker_failure(error, '', '')).__name__}`" if ends else ""
        verdict = judge(error, age=0, transaction_timeout=1)
        transaction = {Verdict.REFUSED: run or "`BrokerError`", Verdict.FENCED: "`FencedError`"}.get(verdict, "")
        rows.append((f"`{error.name()}`", record, run, transaction))
    return rows


def test_the_document_has_every_class_and_every_code() -> None:
    """docs/errors.md: one row for each class, each with what is safe and what to do; and one for each code of the tables."""
    text = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if line.startswith("| `")]
    described = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in classes()}
    assert set(described) == set(classes()) - {"KafkaGuaranteesError"}
    assert all(len(cells) == 3 and all(cells) for cells in described.values())
    assert [row for row in rows if row[0].strip("`") not in classes()] == code_rows()
