"""How many messages to take in hand at a time, and how long to wait until they are so many. Pure."""

from __future__ import annotations

import math


class Pace:
    """The size of batches, by what handling a message has taken so far: so that one is done within ``budget`` (C10).

    Args:
        max_batch: the most.
        budget: seconds that a batch may take: half of max.poll.interval.ms.
        first: the size to begin with, where a batch that is too large could not be given back; else ``max_batch``.
        max_wait: seconds that a batch which is not full waits for more messages, once it has one.

    Raises:
        ValueError: such batches cannot be.
    """

    def __init__(self, max_batch: int, budget: float, first: int | None = None, *, max_wait: float = 0.0) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be 1 or more, not {max_batch}")
        if not 0 <= max_wait < math.inf or max_wait > budget / 2:
            raise ValueError(f"max_wait is a number of seconds, up to a quarter of max.poll.interval.ms, not {max_wait}")
        self._limit = max_batch
        self._budget = budget
        self.size = max_batch if first is None else min(max_batch, first)
        self.max_wait = max_wait

    def took(self, handled: int, seconds: float) -> None:
        """Learn how long ``handled`` messages took. The size follows: at once where it is too large, else by doubling."""
        if handled:
            fits = int(handled * self._budget / seconds) if seconds > 0 else self._limit
            grown = 2 * self.size if handled >= self.size else self.size
            self.size = max(1, min(self._limit, fits, grown))
