"""Handle a message once although it comes twice: deduplication stores, inboxes, and where the id of a message is.

Pass a store or an inbox to ``AtLeastOnce``::

    AtLeastOnce(config, dedup=SqliteDedupStore("ids.db"), message_id=header("event-id"))

The stores and inboxes for Redis and PostgreSQL need the extras ``redis`` and ``postgres``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import (
    MessageIdMissing,
    MessageIdReused,
    OffsetBeyondEnd,
    PartitionFenced,
    TopicRecreated,
)
from .contract import Capabilities, DedupStore, Entry, Inbox, InboxTransaction, Item, Outcome, Source
from .ids import POSITION, cloudevent, first_of, header, json_field, position

if TYPE_CHECKING:
    from .memory import MemoryDedupStore
    from .postgres import PostgresDedupStore
    from .postgres_inbox import PostgresInbox
    from .redis import RedisDedupStore
    from .sqlite import SqliteDedupStore
    from .sqlite_inbox import SqliteInbox

# What needs a database is imported when it is asked for: nobody pays for, or must install, what is not used.
_LAZY = {
    "MemoryDedupStore": "memory",
    "PostgresDedupStore": "postgres",
    "PostgresInbox": "postgres_inbox",
    "RedisDedupStore": "redis",
    "SqliteDedupStore": "sqlite",
    "SqliteInbox": "sqlite_inbox",
}

__all__ = [
    "POSITION",
    "Capabilities",
    "DedupStore",
    "Entry",
    "Inbox",
    "InboxTransaction",
    "Item",
    "MemoryDedupStore",
    "MessageIdMissing",
    "MessageIdReused",
    "OffsetBeyondEnd",
    "Outcome",
    "PartitionFenced",
    "PostgresDedupStore",
    "PostgresInbox",
    "RedisDedupStore",
    "Source",
    "SqliteDedupStore",
    "SqliteInbox",
    "TopicRecreated",
    "cloudevent",
    "first_of",
    "header",
    "json_field",
    "position",
]

if not TYPE_CHECKING and not all(map(find_spec, ("psycopg", "psycopg_pool"))):  # else `import *` would ask for them
    __all__.remove("PostgresDedupStore")  # noqa: PYI056 - they see all names
    __all__.remove("PostgresInbox")  # noqa: PYI056 - they see all names


def __getattr__(name: str) -> Any:
    """Import a store or an inbox when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - only on this way

    try:
        module = import_module(f".{_LAZY[name]}", __name__)
    except ModuleNotFoundError as error:  # of PostgreSQL: the others need nothing, or are given it
        text = f"{name} needs {error.name}, which is not installed: pip install 'kafka-guarantees[postgres]'"
        raise ModuleNotFoundError(text, name=error.name) from error
    return getattr(module, name)
