"""A connection of a pool; or why there is none. And how our own are made and used.

Rules.
* A pool does not say why: it tries on, and says after a while that it has none. So where its attempts have failed, one is made
  here, and what comes of that is told.
* Whom the server refuses is told at once: only somebody who corrects it can help. A server that is away, starts, or has no
  connection left comes back by itself, and is waited for.
* Of a login that fails libpq has no SQLSTATE, only what the server says, in its language (``lc_messages``). English is read
  here. A refusal in another language is waited for, and its words are in the log.
* What is quoted has no address and no password, only what the server says of a user and a database (S01).
"""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import psycopg
from psycopg.rows import tuple_row
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from .._threads import Task, start
from ..errors import AuthorizationError, KafkaGuaranteesError, StoreUnavailable
from ._conninfo import options_of

if TYPE_CHECKING:
    from collections.abc import Iterator

SOON = 1.0  # seconds after which it is asked why there is none yet
ASKING = 2  # seconds that this may take; libpq takes no less
# Of a connection of our own: a host that is gone is noticed in about 20 seconds, not in two hours.
_KEEPALIVES = {"keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}

_REFUSAL = re.compile(
    r"(password|SASL|certificate|Peer|peer) authentication failed|no password supplied"  # 28P01, 28000; LDAP may be away
    r"|no pg_hba\.conf entry|pg_hba\.conf rejects"  # 28000
    r'|role ".*" does not exist|role ".*" is not permitted to log in|no such user'  # 28000; the last one is PgBouncer's
    r'|database ".*" does not exist|no such database'  # 3D000; likewise
    r"|permission denied for database"  # 42501
)
_TRIES = re.compile(r"(?=connection to server )")  # libpq tries again without TLS, which may be refused for that
_EACH = "\n- host: "  # before each attempt, where psycopg made several
_PLACE = re.compile(r"^.*?connection (failed|is bad): |connection to server .*? failed: |(?<=resolve host) '.*?'(?=: )")

_let_in: WeakKeyDictionary[ConnectionPool[Any], int] = WeakKeyDictionary()  # what had failed when an attempt of ours succeeded


def own_options(conninfo: str, **more: object) -> dict[str, Any]:
    """What a connection of our own is made with, unless the user says something else.

    Raises:
        ValueError: what he says cannot be read.
    """
    return {**_KEEPALIVES, **more, **options_of(conninfo)}


def plain_cursor(connection: psycopg.Connection[Any]) -> psycopg.Cursor[tuple[Any, ...]]:
    """Rows are tuples, and parameters are bound by the server, whatever its owner has chosen for the connection."""
    return psycopg.Cursor(connection, row_factory=tuple_row)


def check_pool(given: object) -> None:
    """Raise where that is neither a pool of psycopg's nor where to connect."""
    if not isinstance(given, (ConnectionPool, str)):
        raise TypeError(
            f"give a psycopg_pool.ConnectionPool, or a str that says where to connect, not a {type(given).__name__}"
        )


@contextmanager
def connection_of(pool: ConnectionPool[Any], within: float | None = None) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the pool, that goes back to it afterwards.

    Args:
        pool: of the library, or of the user.
        within: seconds to wait for one; else as long as the pool says.

    Raises:
        AuthorizationError: the server does not let this client in.
        KafkaGuaranteesError: the pool is closed, or was never opened.
        StoreUnavailable: there is no connection for another reason.
    """
    with ExitStack() as stack:
        try:
            connection = _entered(stack, pool, pool.timeout if within is None else within)
        except PoolClosed as exc:
            raise KafkaGuaranteesError(
                f"{exc}. Nothing was written. Open the pool before the run, and close it, and its store or inbox, after it."
            ) from exc
        except psycopg.Error as exc:
            raise _no_connection(exc, rotates=_rotates(pool)) from exc
        try:
            yield connection
        except Exception as exc:
            # of a standby, to which the name led, or leads no more: the pool would go on with it for an hour
            if any(isinstance(one, psycopg.errors.ReadOnlySqlTransaction) for one in (exc, exc.__cause__)):
                connection.close()
            raise


def _entered(stack: ExitStack, pool: ConnectionPool[Any], within: float) -> psycopg.Connection[Any]:
    deadline = time.monotonic() + within
    soon = min(SOON, within / 2)
    connection: psycopg.Connection[Any]
    try:
        connection = stack.enter_context(pool.connection(soon))
    except PoolTimeout:
        reason = _asked(pool, deadline)
        if reason is not None and _refusal(reason) and not _rotates(pool):
            raise reason from None
    else:
        return connection
    try:
        connection = stack.enter_context(pool.connection(max(0.0, deadline - time.monotonic())))
    except PoolTimeout as exc:
        raise (exc if reason is None else reason) from None
    return connection


def _asked(pool: ConnectionPool[Any], deadline: float) -> psycopg.Error | None:
    """The same, in time: there may be many addresses, and a resolver has no timeout of ours."""
    task = Task(partial(_reason, pool))
    start(task.run, name="kafka-guarantees-login")
    task.ended.wait(max(0.0, deadline - time.monotonic()))
    found: psycopg.Error | None = task.result() if task.ended.is_set else None
    return found


def _rotates(pool: ConnectionPool[Any]) -> bool:
    """Whether it is asked anew each time how to log in: then a refusal may pass."""
    return callable(pool.conninfo) or callable(pool.kwargs)


def _reason(pool: ConnectionPool[Any]) -> psycopg.Error | None:
    """Why the pool cannot connect; None where it can, and all that it has are in use."""
    failed = pool.get_stats().get("connections_errors", 0)
    if failed == _let_in.get(pool, 0):
        return None
    try:
        conninfo = pool.conninfo() if callable(pool.conninfo) else pool.conninfo
        options = pool.kwargs() if callable(pool.kwargs) else pool.kwargs
    except Exception as exc:  # noqa: BLE001 - of the user's: as for the pool, it may pass
        return psycopg.OperationalError(f"{type(exc).__name__} where it was asked how to log in")
    try:
        pool.connection_class.connect(conninfo, **{**(options or {}), "connect_timeout": ASKING}).close()
    except psycopg.Error as exc:
        return exc if _quotable(conninfo) else type(exc)("its connection string cannot be read")
    _let_in[pool] = failed
    return None


def _quotable(conninfo: str) -> bool:
    """Whether what the server says can be shown: a part of a password may stand where a host is expected (S01)."""
    try:
        options_of(conninfo)
    except ValueError:
        return False
    return True


def _no_connection(exc: psycopg.Error, *, rotates: bool) -> AuthorizationError | StoreUnavailable:
    refusal = _refusal(exc)
    if refusal and not rotates:
        return AuthorizationError(
            f"PostgreSQL does not let this client in ({refusal}). Nothing was written. Correct its user and password, or the "
            "name of the database; or have it let in: the role must be there and may LOGIN, have CONNECT on the database, and "
            "a line in pg_hba.conf."
        )
    return StoreUnavailable(
        f"PostgreSQL gave no connection ({type(exc).__name__}: {first_line(exc)}). Nothing was written. "
        "The same call may be made again."
    )


def _refusal(exc: psycopg.Error) -> str:
    """What the server says, if it refuses this client. Of several hosts all have to; one may have several addresses."""
    text, *attempts = str(exc).split(_EACH)
    refusals = [attempt for attempt in attempts or [text] if _refuses(attempt)]
    hosts, refusing = ({attempt.partition(",")[0] for attempt in some} for some in (attempts, refusals))
    return first_line(refusals[0]) if refusals and hosts <= refusing else ""


def _refuses(attempt: str) -> bool:
    _, *tries = _TRIES.split(attempt)
    return all(map(_REFUSAL.search, tries or [attempt]))


def shut_down(connection: psycopg.Connection[Any]) -> None:
    """End a connection from any thread: whoever waits for its server is told that it has closed it."""
    with suppress(OSError, psycopg.Error):
        number = connection.fileno()
        with socket.socket(fileno=os.dup(number)) as same:
            if connection.fileno() == number:  # else it was closed in between, and the number may be another connection's
                same.shutdown(socket.SHUT_RDWR)


def first_line(error: BaseException | str) -> str:
    """The first line of what is said, without addresses: the others quote statements and values."""
    return " ".join(_PLACE.sub("", str(error).partition("\n")[0]).split())
