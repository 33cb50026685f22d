"""Which errors another attempt may pass, and which come each time."""

from __future__ import annotations

from confluent_kafka.serialization import SerializationError

from .records import RecordRefused

# Mistakes of the program, records that no topic takes, bytes that mean nothing.
FUTILE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    RecordRefused,
    RecursionError,
    SerializationError,
    SyntaxError,
    TypeError,
    ValueError,
)


def may_pass(error: BaseException) -> bool:
    """Whether another attempt has a use. What the system or a network says may pass, as a certificate that is just renewed."""
    if isinstance(error, SerializationError) and error.__cause__ is not None:
        error = error.__cause__  # of a rule of a schema, for example, which wanted a key of a KMS
    return isinstance(error, OSError) or not isinstance(error, FUTILE)
