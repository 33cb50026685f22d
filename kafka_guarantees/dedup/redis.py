"""A deduplication store in Redis or Valkey: several hosts, effects outside of any database.

Rules.
* One Lua script per call, over the whole batch: a claim is atomic, and costs one round trip.
* The clock is the server's, for leases and for retention (D15).
* All keys of a scope are in one hash slot, so that it runs in a cluster too.
* Nothing of ``redis`` is imported: a client of redis-py and one of valkey-py are used alike.
* A call has a number, which its answer begins with. A client may give us the answer to another call: its own, where a signal
  handler raised before that was read, or another process's, where a connection is older than a fork. Believed, it would say
  DUPLICATE of ids that nobody has seen, and their messages would be lost.
* Numbers are given as bytes: packing an int hiredis 3.5.0 may crash under a signal handler that raises.

What is stored for an id. While it is claimed: ``c``, 16 bytes of token, 15 digits that are the end of the lease in
milliseconds, 16 bytes of position. Completed: ``d``, and 8 bytes of fingerprint; zeros for none. Redis itself forgets the one
when the retention is over after the lease, and the other when it is over after the completion.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from contextlib import suppress
from datetime import timedelta
from hashlib import sha1
from inspect import iscoroutinefunction
from itertools import count
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..errors import AuthorizationError, DurabilityWarning, StoreUnavailable, UnsafeConfigError
from .contract import Capabilities, Outcome, check_retention
from .ids import FINGERPRINT_SIZE, KEY_SIZE, NO_FINGERPRINT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from .contract import Item, Takeover

logger = logging.getLogger(__name__)

_PREFIX: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")  # S03: nothing that ends a hash tag or looks like something else
_SIZES: Final = (KEY_SIZE, KEY_SIZE, FINGERPRINT_SIZE)

# MGET takes its keys from Lua's stack, which holds 8000 values at most.
_READ = """
local call, sub = redis.call, string.sub
local function read(first)
  return call('MGET', unpack(KEYS, first, math.min(first + 999, #KEYS)))
end
"""

_CLAIM = (
    _READ
    + """
local token, lease, ttl, by_position, positions, fingerprints = unpack(ARGV)
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local claimed, none = 'c' .. token, string.rep('\\0', 8)
local claim = claimed .. string.format('%015.0f', now + lease)
local outcomes = {}
for first = 1, #KEYS, 1000 do
  local found = read(first)
  for n = 1, #found do
    local i, old, outcome = first + n - 1, found[n], '1'
    local position = sub(positions, i * 16 - 15, i * 16)
    if old then
      if sub(old, 1, 1) == 'd' then
        local mine, theirs = sub(fingerprints, i * 8 - 7, i * 8), sub(old, 2)
        outcome = (mine == theirs or mine == none or theirs == none) and '3' or '5'
      elseif sub(old, 1, 17) ~= claimed then
        local over = tonumber(sub(old, 18, 32)) <= now
        outcome = (over or (by_position == '1' and sub(old, 33) == position)) and '2' or '4'
      end
    end
    if outcome == '1' or outcome == '2' then
      call('SET', KEYS[i], claim .. position, 'PX', ttl)
    end
    outcomes[i] = outcome
  end
end
return ARGV[#ARGV] .. table.concat(outcomes)
"""
)

_COMPLETE = (
    _READ
    + """
local token, retention, fingerprints = unpack(ARGV)
local claimed = 'c' .. token
local done = {}
for first = 1, #KEYS, 1000 do
  local found = read(first)
  for n = 1, #found do
    local i, old = first + n - 1, found[n]
    if old and sub(old, 1, 17) == claimed then
      call('SET', KEYS[i], 'd' .. sub(fingerprints, i * 8 - 7, i * 8), 'PX', retention)
      done[i] = '1'
    else
      done[i] = old and sub(old, 1, 1) == 'd' and '1' or '0'
    end
  end
end
return ARGV[#ARGV] .. table.concat(done)
"""
)

_RELEASE = (
    _READ
    + """
local claimed = 'c' .. ARGV[1]
for first = 1, #KEYS, 1000 do
  local found = read(first)
  for n = 1, #found do
    if found[n] and sub(found[n], 1, 17) == claimed then
      call('DEL', KEYS[first + n - 1])
    end
  end
end
return ARGV[#ARGV]
"""
)

# What is no error of the program. That of a cluster which cannot be reached is no RedisError.
_OUTSIDE: Final = ("RedisError", "ValkeyError", "RedisClusterException", "ValkeyClusterException", "OSError")
# An ACL that forbids a command, or a key, inside of a script: Redis 6 and 7.0, then newer ones and Valkey.
_NO_RIGHT: Final = re.compile(r"executing the script can't|ACL failure")
_DIGESTS: Final = {script: sha1(script.encode(), usedforsecurity=False).hexdigest() for script in (_CLAIM, _COMPLETE, _RELEASE)}
_OUTCOMES: Final = {ord(str(int(outcome))): outcome for outcome in Outcome}


class Client(Protocol):
    """What is used of a client: redis-py's and valkey-py's ``Redis`` have it, and their cluster clients."""

    def evalsha(self, sha: Any, numkeys: Any, /, *keys_and_args: Any) -> Any: ...

    def eval(self, script: Any, numkeys: Any, /, *keys_and_args: Any) -> Any: ...

    def config_get(self, pattern: Any, /) -> Any: ...


class RedisDedupStore:
    """Message ids in Redis 5 or newer, or Valkey.

    Redis replicates after it has answered: a failover can forget the last ids, so that their messages are handled again. It
    never leaves out one that was not handled.

    On its first use it looks at ``maxmemory-policy`` and ``appendonly``.

    Args:
        client: of redis-py or valkey-py, synchronous, with a ``socket_timeout``, which redis-py before 8 has not by itself; it
            stays the caller's, also after ``close()``. Retries that end do no harm: a call may take
            ``socket_timeout`` for each of them.
        retention: how long a completed id is remembered.
        prefix: what the names of all keys begin with: up to 64 letters, digits and ``_ . : -``.

    Raises:
        ValueError: the prefix or the retention is not valid.
        TypeError: that is no client, or a pipeline, or one of ``redis.asyncio``.
        UnsafeConfigError: the client waits, or tries again, for ever, or lets threads take each other's.
    """

    def __init__(self, client: Client, *, retention: timedelta = timedelta(hours=24), prefix: str = "kg") -> None:
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise ValueError(f"prefix={prefix!r}: up to 64 letters, digits and _ . : - are allowed")
        if not hasattr(client, "evalsha"):
            raise TypeError(f"client is one of redis-py, such as redis.Redis.from_url(...), not a {type(client).__name__}")
        if hasattr(client, "pipeline_execute_command"):
            raise TypeError("client is a pipeline, which answers nothing before its execute(): give the client itself")
        if iscoroutinefunction(getattr(client, "execute_command", None)):
            raise TypeError("client is one of asyncio, whose calls are coroutines: give a redis.Redis, or a redis.RedisCluster")
        check_retention(retention, timedelta(milliseconds=1))
        if _waits_for_ever(client):
            raise UnsafeConfigError(
                "socket_timeout",
                None,
                "where Redis takes a call and does not answer, as when its host stands still, the run would wait for ever, "
                "lose its partitions, and not hear stop()",
                "give the client one, in seconds: redis.Redis.from_url(url, socket_timeout=5)",
            )
        if retries := _tries_for_ever(client):
            raise UnsafeConfigError(
                "retry",
                retries,
                "where Redis is away the client would try again for ever, and the run lose its partitions, and not hear stop()",
                "give the client one that ends, as Retry(ExponentialBackoff(), 3) of redis-py; a run tries again itself",
            )
        if _mixes_threads_up(client):
            raise UnsafeConfigError(
                "single_connection_client",
                True,  # noqa: FBT003 - the value that was given
                "with this version of the client two threads that share it read each other's answers",
                "leave it out; or use redis-py 6 or newer, where a thread waits for the other",
            )
        self._client = client
        self._retention = retention
        self._prefix = prefix
        self._looked = False
        self._calls = count()
        self._pid, self._begin = os.getpid(), token_hex(8)

    def __repr__(self) -> str:
        return f"RedisDedupStore(retention={self._retention}, prefix={self._prefix!r})"  # S01: nothing of the client

    @property
    def capabilities(self) -> Capabilities:
        """Shared, and durable as far as Redis is: with ``appendfsync everysec`` a power loss forgets a second."""
        return Capabilities(shared=True, durable="process", clock="server")

    @property
    def retention(self) -> timedelta:
        """How long a completed id is remembered."""
        return self._retention

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        """See ``DedupStore.claim``.

        Raises:
            StoreUnavailable: Redis did not answer.
            AuthorizationError: it does not let this client in.
            ValueError: a key, position, fingerprint or token of another size than the contract says.
        """
        milliseconds = _milliseconds(lease)
        arguments = (
            _token(token),
            b"%d" % milliseconds,
            b"%d" % (milliseconds + self._retention_ms),
            b"%d" % (takeover == "position"),
            _positions(items),
            _fingerprints(items),
        )
        return [_OUTCOMES[digit] for digit in self._run(_CLAIM, scope, items, arguments)]

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        """See ``DedupStore.complete``.

        Raises:
            StoreUnavailable: Redis did not answer.
            AuthorizationError: it does not let this client in.
            ValueError: a key, fingerprint or token of another size than the contract says.
        """
        arguments = (_token(token), b"%d" % self._retention_ms, _fingerprints(items))
        return [digit == ord("1") for digit in self._run(_COMPLETE, scope, items, arguments)]

    def release(self, scope: str, items: Sequence[Item], *, token: bytes) -> None:
        """See ``DedupStore.release``.

        Raises:
            StoreUnavailable: Redis did not answer.
            AuthorizationError: it does not let this client in.
            ValueError: a key or token of another size than the contract says.
        """
        self._run(_RELEASE, scope, items, (_token(token),))

    def purge(self, *, limit: int = 10_000) -> int:  # noqa: ARG002 - Redis does it by itself
        """0: Redis removes what is expired by itself."""
        return 0

    def close(self) -> None:
        """Nothing: the client is the caller's."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def _retention_ms(self) -> int:
        return _milliseconds(self._retention.total_seconds())

    def _run(self, script: str, scope: str, items: Sequence[Item], arguments: tuple[bytes, ...]) -> bytes:
        if not items:
            return b""
        names = _checked(items, 0)
        # What is between { and the first } chooses the slot, so a scope must not end it; % keeps two scopes apart.
        tag = scope.replace("%", "%25").replace("}", "%7D")
        start = f"{self._prefix}:{{{tag}}}:".encode("utf-8", "surrogatepass")
        keys = [start + name for name in names]
        try:
            if self._pid != os.getpid():  # a connection that the client keeps is the parent's, too
                _connect_anew(self._client)
                self._begin = token_hex(8)
                self._pid = os.getpid()
            if not self._looked:
                self._check()
            number = f"{self._begin}{next(self._calls):016x}".encode()  # ASCII: the client may decode responses
            answer = self._ask(script, _number_of(keys, self._client), *keys, *arguments, number)
        except BaseException as exc:
            if not _is_a(exc, *_OUTSIDE):
                _connect_anew(self._client)  # the answer may come yet, and whoever calls next would take it for his
                raise
            said = _said(exc)
            if _is_a(exc, "AuthenticationError", "NoPermissionError") or _NO_RIGHT.search(said):
                raise AuthorizationError(
                    f"Redis does not let this client in ({said}). No id was written. Correct its user and "
                    "password; or its rights: EVALSHA and EVAL, and the commands of these scripts on its keys."
                ) from exc
            if _is_a(exc, "ReadOnlyError") or "READONLY" in said:  # Redis 5 and 6 say it in the text of a script's error
                _connect_anew(self._client)
            raise StoreUnavailable(
                f"Redis did not answer, or refused ({said}): whether ids were written is unknown. "
                "The same call may be made again."
            ) from exc
        answer = answer.encode() if isinstance(answer, str) else answer
        if not isinstance(answer, bytes) or not answer.startswith(number):
            _connect_anew(self._client)
            raise StoreUnavailable(
                "The client of Redis gave the answer to another call, as where an exception out of a signal handler has "
                "interrupted that, or processes share a connection: whether ids were written is unknown. The connection was "
                "closed. The same call may be made again."
            )
        return answer[len(number) :]

    def _ask(self, script: str, *keys_and_arguments: Any) -> Any:
        try:
            return self._client.evalsha(_DIGESTS[script], *keys_and_arguments)
        except Exception as exc:
            if not _is_a(exc, "NoScriptError"):
                raise
            # The server was restarted, or another one has taken over. EVAL loads it there. Not SCRIPT LOAD, which a cluster
            # gets on every master: it fails where one is away, and with redis-py before 8 for ever where all were.
            return self._client.eval(script, *keys_and_arguments)

    def _check(self) -> None:
        """D12: look for settings by which ids are forgotten before their time."""
        try:
            settings = {**self._client.config_get("maxmemory-policy"), **self._client.config_get("appendonly")}
        except Exception as exc:
            if not _is_a(exc, "ResponseError"):
                raise
            settings = {}
        self._looked = True
        policy, append_only = settings.get("maxmemory-policy"), settings.get("appendonly")
        if policy is None or append_only is None:
            logger.info(
                "Redis does not let us see its settings: make sure that maxmemory-policy is noeviction and appendonly is yes"
            )
        if policy not in {None, "noeviction"}:
            _warn(
                f"Redis has maxmemory-policy={policy}: when its memory is full it forgets message ids, and their messages are "
                "handled again. Set maxmemory-policy to noeviction."
            )
        if append_only == "no":
            _warn(
                "Redis has appendonly=no: when it restarts it forgets message ids, and their messages are handled again. Set "
                "appendonly to yes."
            )


def _warn(text: str) -> None:
    warnings.warn(text, DurabilityWarning, stacklevel=5)  # the line that called claim()


def _is_a(exc: BaseException, *names: str) -> bool:
    """Whether it is of a class with one of these names, in redis-py or in valkey-py."""
    return any(kind.__name__ in names for kind in type(exc).__mro__)


def _waits_for_ever(client: Any) -> bool:
    """Whether it has no ``socket_timeout``. False also where nobody knows."""
    with suppress(Exception):  # of a client that is like none of these
        return _connection_like_those_of(client).socket_timeout is None
    return False


def _tries_for_ever(client: Any) -> int:
    """The number of its retries, if that is one without end; else 0. 0 also where nobody knows."""
    places: tuple[Callable[[], Any], ...] = (
        lambda: client,
        lambda: client.connection,
        lambda: _connection_like_those_of(client),
    )
    for get in places:
        with suppress(Exception):
            if (retries := get().retry._retries) < 0:
                return int(retries)
    return 0


def _connection_like_those_of(client: Any) -> Any:
    """One that is not made: what is the default is up to its class."""
    for get in ("get_redis_connection", "get_valkey_connection"):  # a cluster's, with a client for each node
        if hasattr(client, get):
            client = getattr(client, get)(client.get_default_node())
    pool = client.connection_pool
    return pool.connection_class(**pool.connection_kwargs)


def _said(exc: BaseException) -> str:
    """Its class, and what the server said. Not what the client says, which has addresses and ids in it (S01)."""
    name = type(exc).__name__
    if not _is_a(exc, "ResponseError", "AuthenticationError") or _is_a(exc, "AskError"):
        return name
    line, _, _ = str(exc).partition("\n")
    words, _, _ = line.partition(", with args")  # of a command that is unknown: there are ids among them
    return f"{name}: {words:.300}"


def _number_of(keys: Sequence[bytes], client: Any) -> bytes | int:
    """How many these are. Clients of clusters count with that: before redis-py 6 as it is given."""
    return len(keys) if hasattr(client, "get_nodes") else b"%d" % len(keys)


def _mixes_threads_up(client: Any) -> bool:
    """Whether it has one connection, and no lock around it: redis-py before 5.3, and valkey-py."""
    return getattr(client, "connection", None) is not None and not hasattr(client, "_single_connection_client")


def _connect_anew(client: Any) -> None:
    """Have the next call make a connection of its own. Those that other threads use stay.

    A server that has become a replica, as in a planned failover, keeps our connections, and the name that the client has leads
    to another one by now. Or there may be an answer in a connection that is not to the next call.
    """
    nodes = client.get_nodes() if hasattr(client, "get_nodes") else ()  # a cluster's, with a client for each node
    for one in (client, *nodes):
        used = getattr(one, "redis_connection", getattr(one, "valkey_connection", one))
        for where in ("connection", "connection_pool"):  # the first is that of single_connection_client
            found = getattr(used, where, None)
            if found is not None:
                try:
                    found.disconnect(False)  # noqa: FBT003 - Redis and Valkey name it differently
                except TypeError:  # a BlockingConnectionPool before redis-py 7 leaves all or none
                    found.disconnect()


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _token(token: bytes) -> bytes:
    if len(token) != 16:  # noqa: PLR2004 - the contract's number
        raise ValueError(f"a token has 16 bytes, not {len(token)}")
    return token


def _checked(items: Sequence[Item], field: int) -> list[bytes]:
    """One field of all items."""
    values = [item[field] for item in items]
    if not {_SIZES[field]}.issuperset(map(len, values)):
        raise ValueError(f"a key and a position have 16 bytes, a fingerprint 8 or none: {values!r:.200}")
    return values


def _positions(items: Sequence[Item]) -> bytes:
    """All in one argument: that is packed and parsed faster than a thousand."""
    return b"".join(_checked(items, 1))


def _fingerprints(items: Sequence[Item]) -> bytes:
    return b"".join(_checked([item if item[2] else item._replace(fingerprint=NO_FINGERPRINT) for item in items], 2))
