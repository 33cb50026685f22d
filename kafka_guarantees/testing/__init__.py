"""A real Kafka for tests, examples and experiments, without Docker; and what every deduplication store and inbox must do.

What is exported is imported when it is asked for: the suites need pytest, the servers do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kafka_guarantees.testing.local_kafka import LocalKafka, LocalKafkaError, RunningKafka, local_or_running

if TYPE_CHECKING:
    from kafka_guarantees.testing.conformance.inboxes import InboxConformance
    from kafka_guarantees.testing.conformance.stores import DedupStoreConformance
    from kafka_guarantees.testing.servers import LocalPostgres, LocalRedis

_LAZY = {
    "DedupStoreConformance": "conformance",
    "InboxConformance": "conformance",
    "LocalPostgres": "servers",
    "LocalRedis": "servers",
}

__all__ = [
    "DedupStoreConformance",
    "InboxConformance",
    "LocalKafka",
    "LocalKafkaError",
    "LocalPostgres",
    "LocalRedis",
    "RunningKafka",
    "local_or_running",
]


def __getattr__(name: str) -> Any:
    """Import a suite or a server when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - only on this way

    try:
        module = import_module(f".{_LAZY[name]}", __name__)
    except ModuleNotFoundError as error:
        text = f"{name} needs {error.name}, which is not installed: pip install 'kafka-guarantees[testing]'"
        raise ModuleNotFoundError(text, name=error.name) from error
    return getattr(module, name)
