"""At-most-once, at-least-once and exactly-once for Kafka: three classes that keep what their names say."""

from ._failures import attempt
from ._preflight import PreflightReport
from ._settings import Explanation
from .at_least_once import AtLeastOnce
from .at_most_once import AtMostOnce
from .errors import (
    AuthorizationError,
    BrokerError,
    DeliveryError,
    DeliveryUnknown,
    DurabilityWarning,
    FencedError,
    ForkedClientError,
    HandlerError,
    KafkaGuaranteesError,
    OffsetsLost,
    SecurityWarning,
    StoreUnavailable,
    TransactionAborted,
    UnsafeConfigError,
)
from .exactly_once import ExactlyOnce
from .records import Delivery, Record
from .transaction import Transaction

__version__ = "0.1.0.dev0"

__all__ = [
    "AtLeastOnce",
    "AtMostOnce",
    "AuthorizationError",
    "BrokerError",
    "Delivery",
    "DeliveryError",
    "DeliveryUnknown",
    "DurabilityWarning",
    "ExactlyOnce",
    "Explanation",
    "FencedError",
    "ForkedClientError",
    "HandlerError",
    "KafkaGuaranteesError",
    "OffsetsLost",
    "PreflightReport",
    "Record",
    "SecurityWarning",
    "StoreUnavailable",
    "Transaction",
    "TransactionAborted",
    "UnsafeConfigError",
    "attempt",
]
