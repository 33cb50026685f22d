"""How many messages to take in hand at a time, and how long to wait until they are so many. Pure."""

from __future__ import annotations

import math

MOST = 1_000_000  # messages that confluent-kafka fetches at a time
FIRST_BATCH = 20  # messages: nobody knows yet how long they take
PROMPT = 1.0  # seconds of handling after which the group should hear of us: in a rebalance all its members wait for the last


class Pace:
    """The size of batches, by what handling a message has taken so far: so that one is done in good time (C10).

    Args:
        max_batch: the most messages.
        limit: seconds that a batch may take at most: half of max.poll.interval.ms.
        first: the size to begin with, where a batch is handled as a whole. None: it can be cut, and what is left of it given
            back, so that it should take PROMPT.
        aim: seconds that handling it should take, where that is less than ``limit``.
        served: the group is served while a batch is in hand, which may take its time.
        max_wait: seconds that a batch which is not full waits for more messages, once it has one.

    Attributes:
        size: messages of the next batch.
        late: seconds after its fetch from which on the rest of a batch is given back.
        max_wait: as given.

    Raises:
        ValueError: ``max_batch`` or ``max_wait`` is not valid.
    """

    def __init__(
        self,
        max_batch: int,
        limit: float,
        first: int | None = None,
        *,
        aim: float = math.inf,
        served: bool = False,
        max_wait: float = 0.0,
    ) -> None:
        if not isinstance(max_batch, int) or not 1 <= max_batch <= MOST:
            raise ValueError(f"max_batch is a number of messages, from 1 to {MOST}, not {max_batch!r}")
        if not (isinstance(max_wait, (int, float)) and 0 <= max_wait < math.inf) or max_wait > limit / 2:
            raise ValueError(f"max_wait is a number of seconds, up to a quarter of max.poll.interval.ms, not {max_wait!r}")
        prompt = first is None and not served
        self._max_batch = max_batch
        self._aim = min(limit, aim, PROMPT) if prompt else min(limit, aim)
        self.size = max_batch if first is None else min(max_batch, first)
        self.late = min(limit, 2 * PROMPT) if prompt else limit
        self.max_wait = max_wait

    def took(self, handled: int, seconds: float) -> None:
        """Learn how long ``handled`` messages took. The size follows: at once where it is too large, else by doubling."""
        if handled:
            fits = int(handled * self._aim / seconds) if seconds > 0 else self._max_batch
            grown = 2 * self.size if handled >= self.size else self.size
            self.size = max(1, min(self._max_batch, fits, grown))
