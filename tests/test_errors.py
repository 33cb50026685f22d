"""Laws of the error tree: its drawing is true, each code has its class, a message says what is safe. No broker needed."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import KafkaError, KafkaException, Message
from hypothesis import given, settings
from hypothesis import strategies as st

import kafka_guarantees
from kafka_guarantees import AtLeastOnce, AtMostOnce, Delivery, dedup, errors
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees.errors import (
    FENCED,
    MISSING_ACL,
    NOT_WRITTEN,
    AuthorizationError,
    BrokerError,
    DeliveryError,
    DeliveryUnknown,
    DurabilityWarning,
    KafkaGuaranteesError,
    UnsafeConfigError,
    broker_failure,
    delivery_failure,
    describe,
    kafka_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable

E = KafkaError
DEAD = "127.0.0.1:1"


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
    assert {name for _, name, _ in branches} == set(found) - {"KafkaGuaranteesError", "DurabilityWarning"}
    parent: type[BaseException] = KafkaGuaranteesError
    for deeper, name, rest in branches:
        if not deeper:
            parent = found[name]
        assert found[name].__bases__[0] is (parent if deeper else KafkaGuaranteesError)
        assert (found[name].__bases__[1:] == (ValueError,)) is ("(also ValueError)" in rest)
    assert "DurabilityWarning          (a UserWarning)" in errors.__doc__
    assert DurabilityWarning.__bases__ == (UserWarning,)
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


# --- delivery_failure ------------------------------------------------------------------------------------------------

CERTAIN = [
    E._QUEUE_FULL,
    E._PURGE_QUEUE,
    E._UNKNOWN_TOPIC,
    E._UNKNOWN_PARTITION,
    E._INVALID_ARG,
    E._FATAL,
    E.MSG_SIZE_TOO_LARGE,
    E.RECORD_LIST_TOO_LARGE,
    E.INVALID_MSG,
    E.INVALID_MSG_SIZE,
    E.INVALID_RECORD,
    E.INVALID_TIMESTAMP,
    E.INVALID_REQUIRED_ACKS,
    E.UNSUPPORTED_FOR_MESSAGE_FORMAT,
    E.UNSUPPORTED_COMPRESSION_TYPE,
    E.POLICY_VIOLATION,
    E.TOPIC_EXCEPTION,
    E.UNKNOWN_TOPIC_OR_PART,
    E.NOT_ENOUGH_REPLICAS,
    E.TOPIC_AUTHORIZATION_FAILED,
    E.CLUSTER_AUTHORIZATION_FAILED,
]
DOUBTFUL = [
    E._MSG_TIMED_OUT,
    E._TIMED_OUT,
    E._TRANSPORT,
    E._PURGE_INFLIGHT,
    E._DESTROY,
    E._FAIL,
    E._ALL_BROKERS_DOWN,
    E._GAPLESS_GUARANTEE,
    E._INCONSISTENT,
    E._FENCED,
    E._AUTHENTICATION,
    E.UNKNOWN,
    E.REQUEST_TIMED_OUT,
    E.NETWORK_EXCEPTION,
    E.NOT_LEADER_FOR_PARTITION,
    E.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
    E.OUT_OF_ORDER_SEQUENCE_NUMBER,
    E.DUPLICATE_SEQUENCE_NUMBER,
    E.INVALID_PRODUCER_EPOCH,
    E.UNKNOWN_PRODUCER_ID,
    E.KAFKA_STORAGE_ERROR,
]


def test_the_list_of_certain_failures_is_the_list_here() -> None:
    """P05: a code that moves to "certainly not written" permits a re-send, so it is written down twice."""
    assert set(CERTAIN) == NOT_WRITTEN


@pytest.mark.parametrize("code", CERTAIN)
def test_a_certain_failure_is_a_delivery_error(code: int) -> None:
    """The record never reached a log: sending it again makes no duplicate."""
    failure = delivery_failure(KafkaError(code, "as answered"), "orders")
    assert type(failure) is DeliveryError
    assert "'orders' was not written" in str(failure)
    assert "may or may not" not in str(failure)
    assert f"({KafkaError(code).name()}: as answered)" in str(failure)


@pytest.mark.parametrize("code", DOUBTFUL)
def test_a_doubtful_failure_is_delivery_unknown(code: int) -> None:
    """P05: it may be in the log. The message says so, and what to keep when it is sent again."""
    failure = delivery_failure(KafkaError(code, "as answered"), "orders")
    assert type(failure) is DeliveryUnknown
    assert "'orders' may or may not have been written" in str(failure)
    assert "keep its message id" in str(failure)
    assert f"({KafkaError(code).name()}: as answered)" in str(failure)


CODES = sorted({value for name, value in vars(KafkaError).items() if name.isupper() and isinstance(value, int)})
FLAGS = st.tuples(st.booleans(), st.booleans(), st.booleans())


@settings(deadline=None)
@given(st.sampled_from(CODES) | st.integers(1, 32_000), FLAGS)
def test_the_class_of_a_failure_depends_on_its_code_alone(code: int, flags: tuple[bool, bool, bool]) -> None:
    """E01: librdkafka sets its flags on transactional errors only: nothing is read from them. A new code is doubtful."""
    failure = delivery_failure(KafkaError(code, "x", *flags), "t")
    assert type(failure) is (DeliveryError if code in CERTAIN else DeliveryUnknown)


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


@pytest.mark.parametrize("code", [E.TOPIC_AUTHORIZATION_FAILED, E.CLUSTER_AUTHORIZATION_FAILED])
def test_a_refused_record_names_the_acl(code: int) -> None:
    """S07: also where the refusal comes as the fate of a record."""
    assert all(f"{acl}" in str(delivery_failure(KafkaError(code), "orders")) for acl in ACLS[code])


@pytest.mark.parametrize("code", [E._TIMED_OUT, E._WAIT_COORD, E.REBALANCE_IN_PROGRESS, E.NOT_COORDINATOR])
def test_any_other_refusal_is_a_broker_error_that_says_what_is_safe(code: int) -> None:
    """No request fails without a sentence about what was not done."""
    failure = broker_failure(KafkaError(code, "busy"), "committing offsets", "Nothing moved.")
    assert type(failure) is BrokerError
    assert str(failure) == f"committing offsets failed ({KafkaError(code).name()}: busy). Nothing moved."


def test_a_fence_and_a_missing_acl_are_told_apart() -> None:
    """No code is in two tables: what to do next is unambiguous."""
    assert not FENCED & set(MISSING_ACL)
    assert not FENCED & NOT_WRITTEN


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

        def serve(self, timeout: float = 0) -> None:
            """Nothing waits."""

    delivery = Delivery("t", Server())
    delivery._settle(KafkaError(E._MSG_TIMED_OUT), Message(topic="t"))
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
