"""Whether a pooler stands before PostgreSQL.

Rules.
* Behind one that has another connection of the server for each transaction (PgBouncer in transaction mode) the name of a
  prepared statement is unknown, or is that of somebody else's statement, which is executed instead: without an error where the
  parameters fit. psycopg prepares what comes again. So nothing is prepared where a pooler stands between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ._connecting import plain_cursor

if TYPE_CHECKING:
    import psycopg

_known: WeakKeyDictionary[psycopg.Connection[Any], bool] = WeakKeyDictionary()


def pooled(connection: psycopg.Connection[Any]) -> bool:
    """Ask, once for each connection and not in the middle of a pipeline: a pooler tells process numbers of its own."""
    known = _known.get(connection)
    if known is None:
        [(pid,)] = plain_cursor(connection).execute("SELECT pg_backend_pid()", prepare=False).fetchall()
        known = _known[connection] = pid != connection.info.backend_pid
    return known
