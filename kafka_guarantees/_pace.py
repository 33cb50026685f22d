"""How many messages to take in hand at a time. Pure."""

from __future__ import annotations


class Pace:
    """The size of batches, by what handling a message has taken so far: so that one is done within ``budget`` (C10).

    Args:
        limit: the most.
        budget: seconds that a batch may take.
        first: the size to begin with, where a batch that is too large could not be given back; else ``limit``.
    """

    def __init__(self, limit: int, budget: float, first: int | None = None) -> None:
        self._limit = limit
        self._budget = budget
        self.size = limit if first is None else min(limit, first)

    def took(self, handled: int, seconds: float) -> None:
        """Learn how long ``handled`` messages took. The size follows: at once where it is too large, else by doubling."""
        if handled:
            fits = int(handled * self._budget / seconds) if seconds > 0 else self._limit
            grown = 2 * self.size if handled >= self.size else self.size
            self.size = max(1, min(self._limit, fits, grown))
