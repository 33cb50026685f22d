"""What can go wrong, as one tree, and the one place where librdkafka's error codes become classes of it.

    KafkaGuaranteesError
    ├── UnsafeConfigError      (also ValueError) a setting that breaks the guarantee: nothing was connected
    ├── DeliveryError          a record was certainly not written
    ├── DeliveryUnknown        a record may or may not have been written
    ├── HandlerError           the handler raised; nothing was committed past its message
    ├── TransactionAborted     nothing of the transaction is visible; the consumer is rewound already
    ├── FencedError            another instance has this transactional.id: stop this one
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

Rules. The ``KafkaException`` is always the ``__cause__``. The class is chosen by error code: ``retriable()``,
``fatal()`` and ``txn_requires_abort()`` are set by librdkafka only on errors of its transactional calls (E01).
"""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException


class KafkaGuaranteesError(Exception):
    """The root of every error that this library raises on its own account."""


class UnsafeConfigError(KafkaGuaranteesError, ValueError):
    """A setting contradicts the guarantee. Raised by constructors, before anything is connected or sent.

    Attributes:
        setting: the name of the librdkafka property or of our own argument.
        value: what was given (a secret is replaced by ``"<hidden>"``).
    """

    def __init__(self, setting: str, value: object, breaks: str, instead: str) -> None:
        super().__init__(f"{setting}={value!r} is refused: {breaks}. Instead: {instead}.")
        self.setting = setting
        self.value = value
        self.breaks = breaks
        self.instead = instead

    def __reduce__(self) -> tuple[type[UnsafeConfigError], tuple[str, object, str, str]]:
        return type(self), (self.setting, self.value, self.breaks, self.instead)


class DeliveryError(KafkaGuaranteesError):
    """A record was certainly not written to Kafka. It can be sent again without a duplicate."""


class DeliveryUnknown(KafkaGuaranteesError):
    """A record may or may not have been written. Sending it again may make a duplicate (P05)."""


class HandlerError(KafkaGuaranteesError):
    """The handler raised (it is the ``__cause__``), or returned something that is not records.

    Nothing is committed past the message, so the next ``run`` begins with it again.
    """


class TransactionAborted(KafkaGuaranteesError):
    """The transaction was aborted: none of its records is visible to read_committed readers, no offset moved.

    Where a consumer belongs to it, the next transaction begins with the same messages again.
    """


class FencedError(KafkaGuaranteesError):
    """Another instance began to use this ``transactional.id``: this one must stop. Its open transaction was aborted."""


class OffsetsLost(KafkaGuaranteesError):
    """The group's committed position does not exist in the log: going on would lose or repeat messages."""


class TopicRecreated(OffsetsLost):
    """The topic was deleted and created again: the offset in the inbox belongs to the topic that was. Nothing was handled."""


class OffsetBeyondEnd(OffsetsLost):
    """The inbox has an offset that the partition has not reached: records that were handled are gone. Nothing was handled."""


class AuthorizationError(KafkaGuaranteesError):
    """The brokers refuse this client something it needs. The message names the ACL."""


class MessageIdMissing(KafkaGuaranteesError):
    """A message has no id. It was not handled, and nothing is committed past it."""


class MessageIdReused(KafkaGuaranteesError):
    """A message has the id of another one, which was handled. It was not handled, and nothing is committed past it (D08)."""


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


# The record never reached a log: librdkafka refused it, or the broker answered that it did not append it.
# Every other failure is unknown: rd_kafka_message_status() is not in the Python binding (P05).
NOT_WRITTEN = frozenset(
    {
        KafkaError._QUEUE_FULL,
        KafkaError._PURGE_QUEUE,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError._INVALID_ARG,
        KafkaError._FATAL,  # P09: raised by produce() itself once the producer is dead
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
        KafkaError.INVALID_REQUIRED_ACKS,
        KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT,
        KafkaError.UNSUPPORTED_COMPRESSION_TYPE,
        KafkaError.POLICY_VIOLATION,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    }
)

# S07: what to grant, by the code of the refusal.
MISSING_ACL = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "READ on the topics that are consumed, WRITE on the topics that are produced to",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "READ on the consumer group (group.id)",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "WRITE on the transactional.id (or its prefix)",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "IDEMPOTENT_WRITE on the cluster (only brokers older than 3.0 ask for it)",
}

FENCED = frozenset({KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED})


def kafka_error(exc: KafkaException) -> KafkaError:
    """The ``KafkaError`` inside an exception of confluent-kafka."""
    error = exc.args[0] if exc.args else None
    return error if isinstance(error, KafkaError) else KafkaError(KafkaError._FAIL, str(exc))


def describe(error: KafkaError) -> str:
    """``NAME: text``, the form in which every message of ours quotes a Kafka error."""
    return f"{error.name()}: {error.str()}"


def delivery_failure(error: KafkaError, topic: str) -> DeliveryError | DeliveryUnknown:
    """The error for a record that was not acknowledged: certainly not written, or unknown."""
    if error.code() not in NOT_WRITTEN:
        return DeliveryUnknown(
            f"a record for topic {topic!r} may or may not have been written ({describe(error)}). "
            "Sending it again may make a duplicate: keep its message id, so that a reader can tell."
        )
    acl = MISSING_ACL.get(error.code())
    advice = f" Grant {acl}." if acl else ""
    return DeliveryError(f"a record for topic {topic!r} was not written ({describe(error)}).{advice}")


def broker_failure(error: KafkaError, doing: str, safe: str) -> KafkaGuaranteesError:
    """The error for a request other than a produce. ``doing`` and ``safe`` complete its sentences."""
    acl = MISSING_ACL.get(error.code())
    if acl:
        return AuthorizationError(f"{doing} was refused ({describe(error)}). Grant {acl}. {safe}")
    return BrokerError(f"{doing} failed ({describe(error)}). {safe}")
