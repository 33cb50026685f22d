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
    if isinstance(error, SerializationError):
        return _of_elsewhere(error)
    return isinstance(error, OSError) or not isinstance(error, FUTILE)


def _of_elsewhere(error: SerializationError) -> bool:
    """Whether it was not the bytes: the network is among its causes, or a rule of a schema failed, as one that asks a KMS."""
    cause, seen = error.__cause__, {id(error)}
    while cause is not None and id(cause) not in seen:
        kinds = {kind.__name__ for kind in type(cause).__mro__}  # of a package that need not be there
        if isinstance(cause, OSError) or ("RuleError" in kinds and "RuleConditionError" not in kinds):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return False
