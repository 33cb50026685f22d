"""Names in the configuration dict that are refused before any value is looked at. Tables, and the nearest name.

Rule. A value beside a name that is not known is never shown: it may be a secret whose name is mistyped (S01).
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from ..errors import UnsafeConfigError
from . import librdkafka
from .properties import ALIASES, CALLBACK, PROPERTIES, canonical
from .values import HIDDEN, shown_name

if TYPE_CHECKING:
    from collections.abc import Mapping

USER_CALLBACKS = ("error_cb", "stats_cb", "throttle_cb", "oauth_cb", "logger")

_ARGUMENTS = {
    "the constructor": (
        *("start", "retry", "on_error", "dead_letter", "keep_alive", "preflight", "commit_interval", "transactions_in_flight"),
        *("key_deserializer", "value_deserializer", "key_serializer", "value_serializer"),
        *("dedup", "inbox", "message_id", "on_missing_id", "on_store_error", "takeover", "scope", "fingerprint"),
    ),
    "run() and run_batches()": ("max_batch", "max_wait", "until_idle"),
}
OWN_ARGUMENTS = {name: whose for whose, names in _ARGUMENTS.items() for name in names}

_REPORTS = "delivery reports are how the library knows what was written"
_REBALANCE = "rebalances are how the library knows which messages are still its own"
OWN_CALLBACKS = {
    "on_delivery": (_REPORTS, "look at the Delivery that produce() returns"),
    "dr_cb": (_REPORTS, "look at the Delivery that produce() returns"),
    "dr_msg_cb": (_REPORTS, "look at the Delivery that produce() returns"),
    "on_commit": ("commits are made and checked by the library", "leave it out"),
    "offset_commit_cb": ("commits are made and checked by the library", "leave it out"),
    "rebalance_cb": (_REBALANCE, "leave it out"),
    "on_assign": (_REBALANCE, "leave it out"),
    "on_revoke": (_REBALANCE, "leave it out"),
    "on_lost": (_REBALANCE, "leave it out"),
    "log_cb": ("confluent-kafka has another way", "give a logging.Logger as logger"),
    "default.topic.config": ("its entries would not be checked", "put them into the dict itself"),
}

# The beginnings of librdkafka's own hooks for tests. A mock cluster acknowledges what nobody keeps; others crash the process.
_HOOKS = ("test.", "ut_")

# Names that people bring along from Java and other clients, and what does the same here.
FOREIGN_NAMES = {
    "application.id": "use group.id",
    "auto.create.topics.enable": "use allow.auto.create.topics",
    "buffer.memory": "use queue.buffering.max.kbytes",
    "default.api.timeout.ms": "use the timeout arguments of the methods",
    "fetch.max.wait.ms": "use fetch.wait.max.ms",
    "interceptor.classes": "wrap the handler",
    "key.deserializer": "give it to the constructor, as key_deserializer",
    "key.serializer": "give it to the constructor, as key_serializer",
    "max.block.ms": "use the timeout arguments of the methods",
    "max.request.size": "use message.max.bytes",
    "metric.reporters": "use statistics.interval.ms and stats_cb",
    "partitioner.class": "use partitioner",
    "processing.guarantee": "choose the class: AtMostOnce, AtLeastOnce or ExactlyOnce",
    "receive.buffer.bytes": "use socket.receive.buffer.bytes",
    "sasl.jaas.config": "use sasl.username and sasl.password",
    "sasl.login.callback.handler.class": "use oauth_cb",
    "send.buffer.bytes": "use socket.send.buffer.bytes",
    "ssl.keystore.type": "leave it out: PKCS#12 it is",
    "ssl.truststore.location": "use ssl.ca.location, a PEM file",
    "ssl.truststore.password": "use ssl.ca.location, a PEM file without a password",
    "ssl.truststore.type": "use ssl.ca.location, a PEM file",
    "value.deserializer": "give it to the constructor, as value_deserializer",
    "value.serializer": "give it to the constructor, as value_serializer",
}


def refuse_name(name: object, config: Mapping[str, object]) -> None:
    """Raise ``UnsafeConfigError`` for a name that nobody knows, or that the library keeps for itself."""
    if not isinstance(name, str):
        raise UnsafeConfigError(HIDDEN, HIDDEN, f"a name of type {type(name).__name__} is not a setting", "give a str")
    if name in OWN_ARGUMENTS:
        raise UnsafeConfigError(
            name, HIDDEN, "it is not a property of librdkafka", f"give it as an argument of {OWN_ARGUMENTS[name]}"
        )
    if name in OWN_CALLBACKS:
        raise UnsafeConfigError(name, HIDDEN, *OWN_CALLBACKS[name])
    if name.startswith(_HOOKS):
        raise UnsafeConfigError(
            shown_name(name),
            HIDDEN,
            "it is for the tests of librdkafka: its mock brokers acknowledge what nobody keeps",
            "leave it out; kafka_guarantees.testing.LocalKafka is a real Kafka for tests",
        )
    if name in USER_CALLBACKS:
        return
    known = PROPERTIES.get(canonical(name))
    if known is not None and known.kind == CALLBACK:
        raise UnsafeConfigError(name, HIDDEN, "it cannot be set through a dict", "leave it out")
    if known is None and (shown_name(name) == HIDDEN or name in FOREIGN_NAMES or not librdkafka.knows(name, config)):
        raise UnsafeConfigError(shown_name(name), HIDDEN, "neither librdkafka nor this library knows it", _nearest(name))


def _nearest(name: str) -> str:
    dotted = name.strip().lower().replace("_", ".")
    advice = FOREIGN_NAMES.get(dotted)
    if advice:
        return advice
    names = [one for one, known in PROPERTIES.items() if known.kind != CALLBACK] + [*ALIASES, *USER_CALLBACKS]
    near = difflib.get_close_matches(dotted, names, 1, 0.75)
    return f"did you mean {near[0]!r}?" if near else "leave it out; the names are in librdkafka's CONFIGURATION.md"
