"""Deduplication in the memory of one process.

Two generations of ids: completed ones go into the recent generation; after the retention it becomes the older one, and the one
that was the older is dropped as a whole. So an id is remembered for one to two retentions, and nothing is ever scanned.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from ..errors import KafkaGuaranteesError
from .contract import Capabilities, Outcome, check_retention

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from .contract import Item, Takeover

Completed = dict[str, dict[bytes, int]]  # short fingerprints by scope and key

# A fingerprint is kept as 16 bits of it, in integers that all ids share: an object of its own would take half as much again as
# its id. So one of 65,536 reused ids passes for a duplicate.
_NONE = 0
_SHARED = list(range(1, 2**16 + 1))


def _short(fingerprint: bytes) -> int:
    return _SHARED[hash(fingerprint) & 0xFFFF] if fingerprint else _NONE


class Claim(NamedTuple):
    token: bytes
    position: bytes
    until: float


class MemoryDedupStore:
    """Remembers ids in the memory of this process. FORGETS EVERYTHING when the process ends.

    For tests, and for one process whose repeats come within minutes. Two things it cannot do (D11):

    * After a restart every message that comes again is handled again.
    * It does not know what other members of the consumer group handled: when a partition moves, its ids stay behind.

    Takes about 85 bytes for an id.

    Args:
        retention: how long a completed id is remembered at least; at most twice as long.
        clock: seconds that only grow.
    """

    def __init__(self, *, retention: timedelta = timedelta(hours=24), clock: Callable[[], float] = time.monotonic) -> None:
        check_retention(retention)
        self._retention = retention
        self._period = retention.total_seconds()
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()  # when the recent generation began
        self._recent: Completed = {}
        self._older: Completed = {}
        self._claims: dict[str, dict[bytes, Claim]] = {}
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """Not shared, not durable."""
        return Capabilities(shared=False, durable="none", clock="client")

    @property
    def retention(self) -> timedelta:
        """How long a completed id is remembered at least."""
        return self._retention

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        """Claim each key that may be claimed. See ``DedupStore.claim``."""
        outcomes: list[Outcome] = []
        with self._lock:
            now, _ = self._rotate()
            recent, older = self._recent.get(scope, {}), self._older.get(scope, {})
            claims = self._claims.setdefault(scope, {})
            for key, position, fingerprint in items:
                known = recent.get(key)
                if known is None:
                    known = older.get(key)
                if known is not None:
                    differs = known and fingerprint and known != _short(fingerprint)
                    outcomes.append(Outcome.MISMATCH if differs else Outcome.DUPLICATE)
                    continue
                held = claims.get(key)
                if held is None or held.token == token:
                    outcome = Outcome.NEW
                elif held.until <= now or (takeover == "position" and held.position == position):
                    outcome = Outcome.TAKEN_OVER
                else:
                    outcomes.append(Outcome.IN_PROGRESS)
                    continue
                claims[key] = Claim(token, position, now + lease)
                outcomes.append(outcome)
        return outcomes

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        """Turn claims with this token into completed ids. See ``DedupStore.complete``."""
        completed: list[bool] = []
        with self._lock:
            self._rotate()
            recent, older = self._recent.setdefault(scope, {}), self._older.get(scope, {})
            claims = self._claims.get(scope, {})
            for key, _position, fingerprint in items:
                held = claims.get(key)
                if held is not None and held.token == token:
                    recent[key] = _short(fingerprint)
                    del claims[key]
                    completed.append(True)
                else:
                    completed.append(key in recent or key in older)
        return completed

    def release(self, scope: str, items: Sequence[Item], *, token: bytes) -> None:
        """Forget claims with this token. See ``DedupStore.release``."""
        with self._lock:
            self._rotate()
            claims = self._claims.get(scope, {})
            for item in items:
                held = claims.get(item.key)
                if held is not None and held.token == token:
                    del claims[item.key]

    def purge(self, *, limit: int = 10_000) -> int:  # noqa: ARG002 - a generation goes as a whole, in no time
        """Drop what is expired, as every call does. Returns how many ids went."""
        with self._lock:
            return self._rotate()[1]

    def close(self) -> None:
        """Forget everything. Later calls raise, for nothing would be a duplicate to them."""
        with self._lock:
            self._closed = True
            self._recent, self._older, self._claims = {}, {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _rotate(self) -> tuple[float, int]:
        """Drop generations that are due. Returns the time, and how many completed ids went."""
        if self._closed:
            raise KafkaGuaranteesError("this MemoryDedupStore is closed and has forgotten its ids. Make a new one.")
        now = self._clock()
        age = now - self._since
        if age < self._period:
            return now, 0
        dropped = [self._older]
        if age < 2 * self._period:
            self._older = self._recent
            self._since += self._period
        else:  # nothing was asked for so long that both are over
            dropped.append(self._recent)
            self._older = {}
            self._since = now
        self._recent = {}
        over = now - self._period  # a claim outlives its lease by a retention: until then a late complete() counts
        self._claims = {
            scope: kept
            for scope, claims in self._claims.items()
            if (kept := {key: claim for key, claim in claims.items() if claim.until > over})
        }
        return now, sum(len(ids) for generation in dropped for ids in generation.values())
