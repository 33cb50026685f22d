"""Asking the installed librdkafka about a configuration, without a client and without a connection.

The trick: a dict whose last entry is a property that does not exist can never become a client. librdkafka reads the
dict in order and complains about the first entry it does not like, so a complaint about anything but that last entry
is about the user's. It takes some microseconds.

Rule. librdkafka's texts echo values ("Unsupported SASL mechanism: <value>"): they never leave this file unread (S01).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from confluent_kafka import Producer

from .._threads import beside
from ..errors import CONFIG, UnsafeConfigError
from .properties import PROPERTIES
from .values import HIDDEN, shown, shown_raw

if TYPE_CHECKING:
    from collections.abc import Mapping

_NO_SUCH = "kafka.guarantees.no.such.property"
_RANGE = re.compile(r"is outside allowed range (-?[0-9]+)\.\.(-?[0-9]+)")
_WORD = re.compile(r"[^\s\"'`:;,=()\[\]]+")
_SHORT = 3  # a word shorter than this is hidden only if it is a whole value, and such a value hides no longer word by itself
_PLUGINS = "plugin.library.paths"  # its libraries may bring properties of their own


def knows(name: str, config: Mapping[str, object]) -> bool:
    """True if the installed librdkafka (or a plugin that the config loads) has this property."""
    plugins = {_PLUGINS: config[_PLUGINS]} if isinstance(config.get(_PLUGINS), str) else {}
    return f'No such configuration property: "{name}"' not in _complaint({**plugins, name: ""})


def check(config: Mapping[str, object]) -> None:
    """Let librdkafka read every value.

    Raises:
        UnsafeConfigError: it does not accept one. The text has neither the value of a secret nor librdkafka's words.
    """
    if not _complaint(config):
        return
    plugins = {_PLUGINS: config[_PLUGINS]} if _PLUGINS in config else {}
    for name, value in [*plugins.items(), *config.items()]:  # plugins first: one that cannot be loaded spoils all others
        complaint = _complaint({**plugins, name: value})
        if complaint:
            raise _refusal(name, value, complaint)
    raise UnsafeConfigError(CONFIG, HIDDEN, "librdkafka does not accept it", "check the settings that are yours")


def creation_failure(error: Exception, config: Mapping[str, object]) -> UnsafeConfigError:
    """What to raise (``from None``: the cause echoes values) when a client's constructor failed.

    Some checks run only while a client is made: SASL mechanisms, certificates, keys, the combination of settings.

    Args:
        error: what ``Producer(config)`` or ``Consumer(config)`` raised.
        config: that dict.
    """
    text = _scrubbed(_text(error), config)
    named = max((name for name in config if name in text), key=len, default=CONFIG)
    instead = "correct the setting; docs: librdkafka's CONFIGURATION.md"
    if "No provider for SASL mechanism" in text:  # librdkafka's default is GSSAPI, which few builds have
        named, instead = "sasl.mechanism", "give the mechanism of your brokers, such as SCRAM-SHA-512, PLAIN or OAUTHBEARER"
    return UnsafeConfigError(
        named, shown_raw(named, config.get(named)), f"librdkafka cannot make a client with it ({text.strip()})", instead
    )


def _complaint(config: Mapping[str, object]) -> str:
    # beside the main thread: what a signal handler raises inside of the C call comes out of it as a complaint (Y03)
    return beside(lambda: _asked(config), "kafka-guarantees-asked")


def _asked(config: Mapping[str, object]) -> str:
    # oauth_cb: without one, confluent-kafka would go and make an AWS token for sasl.oauthbearer...type=aws_iam
    try:
        client = Producer({"oauth_cb": _no_token, **config, _NO_SUCH: ""})
    except Exception as error:  # noqa: BLE001 - KafkaException, TypeError, ValueError: each is a complaint
        text = _text(error)
    else:
        client.close()  # a plugin took even the property that does not exist
        text = ""
    return "" if _NO_SUCH in text else text


def _no_token(_config: str) -> tuple[str, float]:
    return "", 0.0


def _text(error: Exception) -> str:
    reason = error.args[0] if error.args else error
    return str(reason.str()) if hasattr(reason, "str") else str(reason)


def _refusal(name: str, value: object, complaint: str) -> UnsafeConfigError:
    allowed = _RANGE.search(complaint)
    values = PROPERTIES[name].values if name in PROPERTIES else ()
    if allowed:
        takes = f"a number from {allowed[1]} to {allowed[2]}"
    elif values:
        takes = f"one of {', '.join(values)}"
    else:
        takes = "a value that it can read"
    return UnsafeConfigError(name, shown_raw(name, value), "librdkafka does not accept this value", f"give {takes}")


def _as_a_word(value: str) -> re.Pattern[str]:
    """A value of few characters, where its letters and digits are not those of a longer word."""
    before = r"(?<![^\W_])" if value[0].isalnum() else ""
    behind = r"(?![^\W_])" if value[-1].isalnum() else ""
    return re.compile(before + re.escape(value) + behind)


def _scrubbed(text: str, config: Mapping[str, object]) -> str:
    given = [(name, value) for name, value in config.items() if not callable(value) and name != "logger"]
    hidden = [str(value) for name, value in given if shown(name, value) == HIDDEN and value != ""]

    def scrub(word: re.Match[str]) -> str:
        secret = any(word[0] == value or (len(word[0]) >= _SHORT and word[0] in value) for value in hidden)
        # a word may also be longer than the value: librdkafka appends to it (".so" to a plugin's path)
        within = any(value in word[0] if len(value) >= _SHORT else _as_a_word(value).search(word[0]) for value in hidden)
        return HIDDEN if secret or within else word[0]

    return _WORD.sub(scrub, text)
