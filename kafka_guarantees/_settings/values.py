"""Values of the configuration dict: made comparable, and shown without secrets. Pure.

Rules. Two spellings of one value become equal here (``"all"``, ``"-1"`` and ``-1``; ``True`` and ``"true"``), and are
what librdkafka reads. It drops white space at the start of a string; here that at the end goes too, unless it may be one of a
secret. librdkafka reads ``"5ms"`` as 5, ``2**32 + 5`` as 5 and cuts a string at its first NUL without a word, so numbers and
strings are checked here. Only values that cannot be a secret are ever shown (S01). One that is mistyped
is shown if it is short; but where a password may have come into the wrong line, beside the settings that take one, only if it
looks like what belongs there.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from ..errors import UnsafeConfigError
from .properties import BOOLEAN, CALLBACK, ENUM, FLOAT, INTEGER, PATHS, PROPERTIES, SHOWN, STRING, canonical

if TYPE_CHECKING:
    from collections.abc import Callable

Value = str | int | float | bool

HIDDEN = "<hidden>"

_INT_MAX = 2**31 - 1  # every number of librdkafka's dict is a C int
_PRINTABLE = 10**24  # Python refuses to print integers of thousands of digits
_MISTYPED = 32  # characters of what is no number, or none of the words that are known; a key or a token is longer
_NEAR = 0.75  # how much it is like one of the words that are known
_PASSWORDS_ARE_NEAR = ("sasl.", "ssl.", "security.", "https.", "enable.sasl.", "enable.ssl.")
_NUMBER_MISTYPED = re.compile(r"[+-]?[0-9][0-9_., ]{0,15}[a-z%]{0,2}", re.ASCII)
_PATH = re.compile(r"(~|\.{0,2})/.*|[A-Za-z]:[\\/].*|[\w.-]*\.(pem|crt|cer|der|crl|so|dll|dylib)")
_LONG = 10_000  # characters of a text that has no secret: as many brokers as a cluster may have
_INTEGER = re.compile(r"[+-]?[0-9]{1,12}", re.ASCII)
_NUMBER = re.compile(r"[+-]?[0-9]{1,12}(\.[0-9]{0,9})?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}", re.ASCII)
_BOOLEANS = {"true": "true", "t": "true", "1": "true", "false": "false", "f": "false", "0": "false"}
_WHITE = " \t\n\v\f\r"  # what C calls so
_LISTS = ("partition.assignment.strategy", "topic.blacklist")  # librdkafka's are of parts, and an empty pattern takes in all
_NEED = {
    INTEGER: "a whole number of at most 2147483647",
    FLOAT: "a number of at most 2147483647",
    BOOLEAN: "true or false",
    "acks": "0, 1 or all",  # librdkafka lets other numbers pass, and brokers then refuse every record
}


def normalise(name: str, value: object, spelled: str = "") -> Value:
    """The value as librdkafka takes it, one spelling for each.

    Args:
        name: the one name of the property.
        value: what the user gave.
        spelled: the name that the user wrote, for the error.

    Raises:
        UnsafeConfigError: it is not a value of this property's kind.
    """
    spelled = spelled or name
    text = _text(spelled, value)
    if not may_be_secret(name):
        text = text.strip(_WHITE)
    if name in _LISTS:
        text = ",".join(dict.fromkeys(part for one in text.split(",") if (part := one.strip(_WHITE))))
    kind = name if name == "acks" else PROPERTIES[name].kind if name in PROPERTIES else ""
    result = _READ[kind](text, name) if kind in _READ else text
    if result is None:
        raise UnsafeConfigError(spelled, shown_raw(name, value), f"it takes {_NEED[kind]}", f"give {_NEED[kind]}")
    return result


def may_be_secret(name: str) -> bool:
    """Whether a value of this setting is never looked at, nor changed."""
    known = PROPERTIES.get(name)
    return known is None or (known.kind == STRING and not known.values and name not in SHOWN and name not in PATHS)


def shown(name: str, value: object) -> str:
    """The value as text if it cannot be a secret, else ``<hidden>``."""
    if value is None or isinstance(value, bool):
        return "None" if value is None else str(value).lower()
    if not isinstance(value, (str, int, float)) or (isinstance(value, int) and abs(value) >= _PRINTABLE):
        return HIDDEN
    one, text = canonical(name), str.__str__(value) if isinstance(value, str) else str(value)
    return text if one in PROPERTIES and _harmless(one, text) else HIDDEN


def shown_raw(name: str, value: object) -> object:
    """The value as the user gave it if it cannot be a secret, else ``<hidden>``: for ``UnsafeConfigError.value``."""
    return HIDDEN if shown(name, value) == HIDDEN else value


def shown_name(name: str) -> str:
    """A name from the user's dict, if it looks like one."""
    return name if _NAME.fullmatch(name) else HIDDEN


def _text(name: str, value: object) -> str:
    if value is None:
        raise UnsafeConfigError(
            name, None, "None is not a value", "leave the setting out to keep its default. Is an environment variable missing?"
        )
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _encodable(name, value)
    if isinstance(value, (int, float)):
        return _number_text(value)
    kind = type(value).__name__
    raise UnsafeConfigError(
        name,
        HIDDEN,
        f"librdkafka takes no {kind}",
        "give a str, int, float or bool; a list is written as a, b, c",
    )


def _encodable(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        bad = True
    else:
        bad = "\0" in value
    if bad:  # outside the except block: the codec's error holds the value (S01)
        raise UnsafeConfigError(
            name, HIDDEN, "a NUL or a lone surrogate cannot reach librdkafka, which would cut it off", "give plain text"
        )
    return str.__str__(value)  # a member of a str Enum is its value


def _number_text(value: float) -> str:
    if not abs(value) <= _INT_MAX:  # also true of nan, inf and integers that no float can hold
        return "out of range"
    return str(int(value)) if value == int(value) else repr(float(value))


def _acks(text: str, name: str) -> Value | None:
    if text.strip().lower() in {"all", "-1"}:
        return "all"
    number = _integer(text.strip(), name)
    return number if number in {0, 1} else None


def _integer(text: str, _name: str) -> int | None:
    number = int(text) if _INTEGER.fullmatch(text) else None
    return number if number is not None and abs(number) <= _INT_MAX else None


def _float(text: str, _name: str) -> float | None:
    if not _NUMBER.fullmatch(text) or abs(float(text)) > _INT_MAX:
        return None
    return int(float(text)) if float(text).is_integer() else float(text)


def _boolean(text: str, name: str) -> Value | None:
    word = _BOOLEANS.get(text.strip().lower())
    if name == "delivery.report.only.error" and word:
        return word == "true"  # the one property that confluent-kafka reads itself, as a Python bool
    return word


def _enum(text: str, name: str) -> str:
    spellings = {value.lower(): value for value in PROPERTIES[name].values}
    return spellings.get(text.strip().lower(), text)


_READ: dict[str, Callable[[str, str], Value | None]] = {
    "acks": _acks,
    INTEGER: _integer,
    FLOAT: _float,
    BOOLEAN: _boolean,
    ENUM: _enum,
}


def _harmless(name: str, text: str) -> bool:
    if not text.isprintable() or "@" in text:  # "@": a URL with a password in it
        return False
    kind, values = PROPERTIES[name].kind, PROPERTIES[name].values
    if kind == CALLBACK or (kind == STRING and not values):
        fits = name in SHOWN or (name in PATHS and bool(_PATH.fullmatch(text)))
        return fits and len(text) <= _LONG and "PRIVATE KEY" not in text
    if len(text) <= _MISTYPED and "=" not in text and not name.startswith(_PASSWORDS_ARE_NEAR):
        return True
    if kind in {INTEGER, FLOAT}:
        return bool(_NUMBER_MISTYPED.fullmatch(text))
    known = [*_BOOLEANS] if kind == BOOLEAN else [value.lower() for value in values]
    return all(difflib.get_close_matches(word.strip().lower(), known, 1, _NEAR) for word in text.split(","))
