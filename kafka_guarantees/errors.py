"""What can go wrong, as one tree, and the one place where librdkafka's error codes become classes of it.

    KafkaGuaranteesError
    ├── UnsafeConfigError      (also ValueError) a setting that breaks the guarantee: nothing was consumed or sent
    ├── DeliveryError          a record was certainly not written
    ├── DeliveryUnknown        a record may or may not have been written
    ├── HandlerError           the handler raised; nothing was committed past its message
    ├── TransactionAborted     nothing of the transaction is visible; the consumer is rewound already
    ├── FencedError            another instance has this transactional.id or group.instance.id: stop this one
    ├── OffsetsLost            the committed position no longer exists in the log
    │   ├── TopicRecreated     an inbox has the offset of an earlier topic of the same name
    │   └── OffsetBeyondEnd    an inbox has an offset that the topic has not reached
    ├── AuthorizationError     the brokers refuse it; names the ACL that is missing
    ├── MessageIdMissing       a message has no id, where every message must have one
    ├── MessageIdReused        a message has the id of another message that was handled
    ├── PartitionFenced        another member handles this partition: its offset in the inbox moved
    ├── StoreUnavailable       a deduplication store or inbox did not answer
    ├── BrokerError            the brokers refused or did not answer in time
    └── ForkedClientError      a client used in a child process of the one that made it

    DurabilityWarning          (a UserWarning) allowed, but weaker than the guarantee's default
    SecurityWarning            (a UserWarning) allowed, but anybody on the way can read or answer what is sent

Rules.
* The ``KafkaException``, where there was one, is in the chain of causes, not always the first.
* The class is chosen by error code: ``retriable()``, ``fatal()`` and ``txn_requires_abort()`` are set by librdkafka only on
  errors of its transactional calls (E01). The tables below have the codes that are more than their default; docs/errors.md
  is checked against them.
* A message says what happened and where, what is safe, and what to do, in this order.
"""

from __future__ import annotations

import ctypes
import shlex
import sys
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException

if TYPE_CHECKING:
    from collections.abc import Collection


CONFIG = "config"  # stands for a setting where it is not known which one of them is refused


class KafkaGuaranteesError(Exception):
    """The root of every error that this library raises on its own account."""


class UnsafeConfigError(KafkaGuaranteesError, ValueError):
    """A setting contradicts the guarantee; or the brokers do, where a run asks them. Nothing was consumed or sent.

    Attributes:
        setting: the name of the librdkafka property or of our own argument; ``"config"``: it is not known which.
        value: what was given (a secret is replaced by ``"<hidden>"``).
        others: what else is wrong with the same configuration; it is in the text as well.
    """

    others: tuple[UnsafeConfigError, ...] = ()

    def __init__(self, setting: str, value: object, breaks: str, instead: str) -> None:
        stop = "" if instead.endswith("?") else "."
        refused = "the configuration" if setting == CONFIG else f"{setting}={value!r}"
        super().__init__(f"{refused} is refused: {breaks}. Instead: {instead}{stop}")
        self.setting = setting
        self.value = value
        self.breaks = breaks
        self.instead = instead

    def __str__(self) -> str:
        return "\nAnd ".join([super().__str__(), *map(str, self.others)])

    def __reduce__(self) -> tuple[type[UnsafeConfigError], tuple[str, object, str, str], dict[str, object]]:
        return type(self), (self.setting, self.value, self.breaks, self.instead), {"others": self.others}


class DeliveryError(KafkaGuaranteesError):
    """A record was certainly not written to Kafka. It can be sent again without a duplicate."""


class DeliveryUnknown(KafkaGuaranteesError):
    """A record may or may not have been written. Sending it again may make a duplicate (P05)."""


class HandlerError(KafkaGuaranteesError):
    """The handler raised (it is the ``__cause__``), or returned something that is not records.

    Nothing is committed past the message, so the next ``run`` begins with it again.

    Attributes:
        topic, partition, offset: of the message, or of the first of its batch.
    """

    topic: str | None = None
    partition: int | None = None
    offset: int | None = None


class TransactionAborted(KafkaGuaranteesError):
    """The transaction was aborted: none of its records is visible to read_committed readers, no offset moved.

    Where a consumer belongs to it, the next transaction begins with the same messages again.
    """


class FencedError(KafkaGuaranteesError):
    """Another instance uses this ``transactional.id`` or ``group.instance.id``: this one must stop.

    A transaction that it had open was aborted; nothing was committed that was not handled. Where it was being committed, nobody
    knows whether it was, and the text says so: a run finds that out by its offsets.
    """


class OffsetsLost(KafkaGuaranteesError):
    """The group's committed position does not exist in the log: going on would lose or repeat messages."""


class TopicRecreated(OffsetsLost):
    """The topic was deleted and created again: the offset in the inbox belongs to the topic that was. Nothing was handled."""


class OffsetBeyondEnd(OffsetsLost):
    """The inbox has an offset that the partition has not reached: records that were handled are gone. Nothing was handled."""


class AuthorizationError(KafkaGuaranteesError):
    """The brokers, or a store, refuse this client something it needs. The message names it, as an ACL, and how to grant it."""


class MessageIdMissing(KafkaGuaranteesError):
    """A message has no id. It was not handled, and nothing is committed past it."""


class MessageIdReused(KafkaGuaranteesError):
    """A message has the id of another one, which was handled. It was not handled, and nothing is committed past it (D08).

    Attributes:
        index: which of its entries it is, where an inbox raises this.
    """

    def __init__(self, text: str, index: int | None = None) -> None:
        super().__init__(text)
        self.index = index


class PartitionFenced(KafkaGuaranteesError):
    """Another member advanced the partition's offset in the inbox. What this one did there was rolled back."""


class StoreUnavailable(KafkaGuaranteesError):
    """A deduplication store or inbox did not answer. What became of the call is unknown; the same call may be made again."""


class BrokerError(KafkaGuaranteesError):
    """The brokers refused a request, or did not answer in time. The message says what is safe."""


class ForkedClientError(KafkaGuaranteesError):
    """The client was made by the parent process. librdkafka's threads do not survive ``fork()`` (Y04)."""


class DurabilityWarning(UserWarning):
    """Allowed, but weaker than the guarantee's default: acknowledged records can be lost."""


class SecurityWarning(UserWarning):
    """Allowed, but anybody on the way to the brokers can read what is sent, or answer in their place (S02)."""


# -- what became of a record, by the code of its failure (P05: rd_kafka_message_status() is not in the Python binding) ------

# This try was not written, and another would end alike. But one before it may have been written, and its answer lost. So it may
# where a batch is too large: librdkafka 2.16 may have formed it anew, out of what it had sent before and more (P05).
REFUSED = {
    KafkaError._INVALID_ARG: "Correct the record.",
    KafkaError.MSG_SIZE_TOO_LARGE: (
        "Make it smaller; or raise message.max.bytes of this client, and max.message.bytes of the topic, whichever is exceeded."
    ),
    KafkaError.RECORD_LIST_TOO_LARGE: "Make it smaller, or lower batch.size, or raise segment.bytes of the topic.",
    KafkaError.INVALID_MSG_SIZE: "Make it smaller.",
    KafkaError.INVALID_RECORD: "Give it what the topic asks of its records: a key, where it is compacted.",
    KafkaError.INVALID_TIMESTAMP: (
        "Correct its timestamp, or message.timestamp.before.max.ms and ...after.max.ms of the topic (before Kafka 3.6: "
        "message.timestamp.difference.max.ms)."
    ),
    KafkaError.INVALID_REQUIRED_ACKS: "Correct acks.",
    KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT: "Give the topic a message format that has headers and idempotence.",
    KafkaError.UNSUPPORTED_COMPRESSION_TYPE: "Change compression.type.",
    KafkaError.TOPIC_EXCEPTION: "Correct the name of the topic; internal topics cannot be written to.",
    KafkaError._UNKNOWN_TOPIC: "Create the topic, or correct its name.",
    KafkaError._UNKNOWN_PARTITION: (
        "Correct the number of the partition, or leave it out. Where it was right before, or none was given, the topic was "
        "deleted, or made anew with fewer partitions, while this client ran: look at it, and run again."
    ),
    KafkaError.UNKNOWN_TOPIC_OR_PART: "Create the topic, or correct its name.",
    KafkaError.POLICY_VIOLATION: "Ask who runs the brokers for their policy.",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "",  # the ACL is the advice
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "",
}

# Of these, what is said of a record, or of a request of several; not of a topic, or of who writes to it.
OF_RECORD = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
    }
)

# This try was not made, and another may succeed. One before it may have been written, too.
UNSENT = {
    KafkaError._QUEUE_FULL: "Send fewer at a time.",
    KafkaError._PURGE_QUEUE: "Give close() more time, and look whether the brokers are up.",
    KafkaError._INVALID_DIFFERENT_RECORD: "Correct the other record, which was sent along with it.",
    KafkaError._STATE: "Make a new client.",
    KafkaError._FATAL: "Make a new client.",  # P09: raised by produce() itself once the producer is dead
}

# Every other code says nothing about it. Among them are some that sound definite: NOT_ENOUGH_REPLICAS and INVALID_MSG (a bad
# checksum) are tried again by librdkafka, and what is reported is the last of several tries.

# -- what ends a run, by the code of the event or answer -----------------------------------------------------------------

_RESET = "with kafka-consumer-groups.sh --reset-offsets"
_DAMAGED = f"Have the brokers' disks looked at. To give up what is damaged, set the group's offset behind it, {_RESET}."
_CREDENTIALS = "Correct the credentials, or security.protocol and sasl.mechanism."
_KIP_848 = (
    "Have the brokers speak KIP-848 (4.0 or later; kafka-features.sh upgrade --feature group.version=1; consumer in their "
    "group.coordinator.rebalance.protocols), or leave out group.protocol=consumer."
)

# Asked again, the brokers would answer the same; or librdkafka goes on as if nothing was missing. Any other code passes: it is
# logged, and librdkafka tries again by itself.
STOPS = {
    KafkaError.FENCED_INSTANCE_ID: "Stop one of them, or give each its own group.instance.id.",
    KafkaError.UNRELEASED_INSTANCE_ID: (
        "Stop one of them, or give each its own group.instance.id. After a crash of this one: wait until the brokers' "
        "group.consumer.session.timeout.ms is over."
    ),
    KafkaError.INCONSISTENT_GROUP_PROTOCOL: (
        "Give all members of the group the same partition.assignment.strategy and the same group.protocol, and stop those that "
        "differ: range and cooperative-sticky do not mix."
    ),
    KafkaError.UNSUPPORTED_ASSIGNOR: "Correct group.remote.assignor: the brokers list theirs in group.consumer.assignors.",
    KafkaError.GROUP_MAX_SIZE_REACHED: "Run fewer members, or raise the brokers' group.max.size or group.consumer.max.size.",
    KafkaError.INVALID_GROUP_ID: "Correct group.id; a group of another kind may have it.",
    KafkaError.GROUP_ID_NOT_FOUND: (
        "The group was deleted: run again to make it anew; where it goes on is up to start=. Or, with "
        "group.protocol=consumer, it has members with cooperative-sticky, and cannot change while it has: stop all of them "
        "(static ones: until their session is over), and run again; its offsets stay."
    ),
    KafkaError.INVALID_SESSION_TIMEOUT: (
        "Set session.timeout.ms between the brokers' group.min.session.timeout.ms and group.max.session.timeout.ms."
    ),
    KafkaError.INVALID_REGULAR_EXPRESSION: "Correct the pattern: with group.protocol=consumer the brokers read it, as RE2.",
    KafkaError.INVALID_REQUEST: "Look into the brokers' log: they and this client do not understand each other.",
    KafkaError.UNSUPPORTED_VERSION: _KIP_848,
    KafkaError._UNSUPPORTED_FEATURE: _KIP_848,
    KafkaError.TOPIC_EXCEPTION: "Correct the name of the topic.",
    KafkaError._AUTHENTICATION: _CREDENTIALS,
    KafkaError.SASL_AUTHENTICATION_FAILED: _CREDENTIALS,
    KafkaError.UNSUPPORTED_SASL_MECHANISM: _CREDENTIALS,
    KafkaError._FATAL: "Run again: that makes a new client.",
    # librdkafka passes over records that it cannot read, and would have what comes after them committed
    KafkaError._BAD_MSG: _DAMAGED,
    KafkaError._BAD_COMPRESSION: _DAMAGED,
    KafkaError._NOT_IMPLEMENTED: "Upgrade confluent-kafka: this one does not know the compression, or the format.",
    KafkaError.INVALID_MSG: _DAMAGED,
}

# The group has changed, or this member is not one any more: the run goes on, and asks where.
REBALANCED = frozenset(
    {
        KafkaError.ILLEGAL_GENERATION,
        KafkaError.UNKNOWN_MEMBER_ID,
        KafkaError.REBALANCE_IN_PROGRESS,
        KafkaError.FENCED_MEMBER_EPOCH,
        KafkaError.STALE_MEMBER_EPOCH,
    }
)

# What a commit ends with that was not taken, neither now nor later. With a fatal error librdkafka does not send it.
NOT_TAKEN = REBALANCED | {KafkaError._FATAL}

INSTANCE = frozenset({KafkaError.FENCED_INSTANCE_ID, KafkaError.UNRELEASED_INSTANCE_ID})

# What says that a topic, or its partition, is not there.
NO_TOPIC = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION})

# S07: what to grant, by the code of the refusal.
MISSING_ACL = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "READ on the topics that are consumed, WRITE on the topics that are produced to",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "READ on the consumer group (group.id)",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "WRITE on the transactional.id (or its prefix)",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: (
        "WRITE on the topics that are produced to (brokers older than 2.8 ask for IDEMPOTENT_WRITE on the cluster)"
    ),
}

# What it is where the caller knows the name: by the argument of broker_failure() that has it.
_NAMED_ACL = {
    "topic": ({KafkaError.TOPIC_AUTHORIZATION_FAILED}, "READ", "topic"),
    # KIP-679: an idempotent producer may be refused as such, and what it needs is WRITE on any topic
    "output": ({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED}, "WRITE", "topic"),
    "group": ({KafkaError.GROUP_AUTHORIZATION_FAILED}, "READ", "group"),
    "transactional_id": ({KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED}, "WRITE", "transactional.id"),
}

FENCED = frozenset({KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED})


_PRETENDS = bool(KafkaError.__flags__ & 1 << 30)  # Py_TPFLAGS_BASE_EXC_SUBCLASS: to C it is an exception, though not to Python


def kafka_error(exc: KafkaException) -> KafkaError:
    """The ``KafkaError`` inside an exception of confluent-kafka.

    That is never freed (cfl_PyErr_Format, confluent_kafka.h:319). Before Python 3.12 it refers to the exception that was being
    handled when it was raised, and with that to the locals of all its frames: this is ended here.
    """
    error = exc.args[0] if exc.args else None
    if not isinstance(error, KafkaError):
        return KafkaError(KafkaError._FAIL, str(exc))
    if sys.version_info < (3, 12) and _PRETENDS:  # it has no attribute for that
        ctypes.pythonapi.PyException_SetContext(ctypes.py_object(error), None)
    return error


def describe(error: KafkaError) -> str:
    """``NAME: text``, the form in which every message of ours quotes a Kafka error."""
    return f"{error.name()}: {error.str()}"


def stops(error: KafkaError) -> bool:
    """Whether a run ends with this error, instead of waiting until it passes."""
    return error.fatal() or error.code() in STOPS or error.code() in MISSING_ACL


def of_topic(failure: Exception) -> bool:
    """Whether a record failed for its topic, or its producer, and no message is to blame: the next ones would fail alike."""
    return _code(failure) in {*MISSING_ACL, KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._FATAL}


def of_record(failure: Exception) -> bool:
    """Whether brokers refused a record for what it is, or another one of its request: a message is to blame."""
    return _code(failure) in OF_RECORD


def _code(failure: Exception) -> int | None:
    cause = failure.__cause__
    return kafka_error(cause).code() if isinstance(cause, KafkaException) else None


def futile(error: KafkaError) -> bool:
    """Whether the same record would fail again."""
    return error.code() in REFUSED


def delivery_failure(error: KafkaError, topic: str, partition: int | None = None) -> DeliveryError | DeliveryUnknown:
    """The error for a record that was not acknowledged: certainly not written, or unknown. The KafkaError is its cause.

    Args:
        error: of ``produce()`` or of the delivery report.
        topic: where the record was to go.
        partition: likewise. None where librdkafka had not chosen one yet: then no try was made before.
    """
    code = error.code()
    where = f"topic {topic!r}" if partition is None else f"topic {topic!r} partition {partition}"
    acl = MISSING_ACL.get(code)
    if code == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        acl = _grant("WRITE", "topic", [topic])
    advice = f"Grant {acl}." if acl else REFUSED.get(code) or UNSENT.get(code) or ""
    known = code in REFUSED or code in UNSENT
    failure: DeliveryError | DeliveryUnknown
    if known and partition is None:
        failure = DeliveryError(
            f"a record for {where} was not written ({describe(error)}). Sent again, it makes no duplicate. {advice}"
        )
    else:
        earlier = " So ended the last try; one before it may have been written." if known else ""
        failure = DeliveryUnknown(
            f"a record for {where} may or may not have been written ({describe(error)}).{earlier} "
            f"Sending it again may make a duplicate: keep its message id, so that a reader can tell. {advice or _LOOK}"
        )
    failure.__cause__ = KafkaException(error)
    return failure


def concluded(topic: str, partition: int | None) -> DeliveryUnknown:
    """The error for a record that counts as acknowledged, and no broker has said where it is.

    Of an idempotent producer librdkafka 2.16 concludes that from the success of a later one. But a broker that has nothing of
    this producer in the partition takes any sequence number: where it first said that it is not the leader yet, and then is,
    the earlier record is not there (P13, confluent-kafka-go 921).
    """
    return DeliveryUnknown(
        f"a record for topic {topic!r} partition {partition} may or may not have been written: a later one was acknowledged, "
        "and no broker has said where this one is. Sending it again may make a duplicate: keep its message id, so that a "
        "reader can tell."
    )


def broker_failure(error: KafkaError, doing: str, safe: str, **names: str | Collection[str] | None) -> KafkaGuaranteesError:
    """The error for a request other than a produce.

    Args:
        error: what was answered.
        doing, safe: complete its sentences.
        names: of ``topic`` (that is consumed), ``output`` (a topic that is produced to), ``group`` and ``transactional_id``,
            one or several, as far as the request has to do with them. A later one wins over an earlier one.
    """
    error = _behind(error)
    code = error.code()
    acl = MISSING_ACL.get(code)
    for argument, named in names.items():
        refusals, operation, resource = _NAMED_ACL[argument]
        if named and code in refusals:
            acl = _grant(operation, resource, [named] if isinstance(named, str) else named)
    if acl:
        missing = code == KafkaError.TOPIC_AUTHORIZATION_FAILED  # what may not be looked at may as well not be there
        name = " Or correct the name: of a topic that does not exist brokers may say the same." if missing else ""
        return AuthorizationError(f"{doing} was refused ({describe(error)}). Grant {acl}.{name} {safe}")
    kind = FencedError if code in INSTANCE else BrokerError
    advice = _NOTHING_TO_DO if code in REBALANCED else STOPS.get(code, _LOOK)
    return kind(f"{doing} failed ({describe(error)}). {safe} {advice}")


def unreleased(failure: FencedError) -> bool:
    """Whether the brokers believe that another member has the ``group.instance.id``, which may be gone (KIP-848)."""
    return KafkaError(KafkaError.UNRELEASED_INSTANCE_ID).name() in str(failure)


def _grant(operation: str, resource: str, names: Collection[str]) -> str:
    """The ACL, and the command that grants it."""
    options = " ".join(f"--{resource.replace('.', '-')} {shlex.quote(name)}" for name in sorted(names))
    named = " or ".join(map(repr, sorted(names)))
    return (
        f"{operation} on {resource} {named} (kafka-acls.sh --add --allow-principal User:... --operation {operation} {options})"
    )


_LOOK = "Look whether the brokers are up and can be reached."
_NOTHING_TO_DO = "The group has assigned its partitions anew meanwhile. Look for members that come and go, if it happens often."


def _behind(error: KafkaError) -> KafkaError:
    """What made a consumer fatal: the binding gives its code as ``_FATAL``, and the reason only in the text."""
    if error.code() == KafkaError._FATAL:
        for code in (*STOPS, *MISSING_ACL):
            if code != KafkaError._FATAL and KafkaError(code).str() in error.str():
                return KafkaError(code, error.str())
    return error
