"""A server that takes what it is sent and never answers: its kernel keeps the connection well, so that TCP notices nothing.

Rules.
* A call of ours ends, if not with an answer: another thread shuts its socket down, and whoever waits there is told that the
  server has closed the connection. A run serves its group then, and hears of a stop.
* What a handler executes is not ours, and may take as long as it likes.
* The thread is there while there are calls, and a moment longer: no call is slower for it, and no process is kept awake.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .._threads import start
from ._connecting import shut_down

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg
    from typing_extensions import Self

log = logging.getLogger("kafka_guarantees")

SILENCE = 40.0  # seconds: longer than a store lets its server work (30), and short beside max.poll.interval.ms (300)
LOOK = 2.0  # seconds between two looks

_asked: dict[int, Asked] = {}  # of all threads
_lock = threading.Lock()  # who holds it keeps these connections open
_looking = False


class Asked:
    """A while in which the server is asked, over one connection: until its end, each time for so many seconds at most.

    Args:
        connection: which is ended if there is no answer.
    """

    __slots__ = ("connection", "until")

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.until = 0.0

    def __enter__(self) -> Self:
        global _looking  # noqa: PLW0603 - there is one thread for all
        self.until = time.monotonic() + SILENCE
        with _lock:
            _asked[id(self)] = self
            begin, _looking = not _looking, True
        if begin:
            try:
                start(_look, name="kafka-guarantees-silence")
            except BaseException:
                _looking = False
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _asked.pop(id(self), None)

    @contextmanager
    def in_other_hands(self) -> Iterator[None]:
        """Meanwhile somebody else asks, for as long as he likes."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


def _look() -> None:
    global _looking  # noqa: PLW0603 - see above
    while True:
        time.sleep(LOOK)
        with _lock:
            now = time.monotonic()
            silent = [key for key, asked in _asked.items() if asked.until < now]
            for key in silent:
                shut_down(_asked.pop(key).connection)
            _looking = more = bool(_asked)
        for _ in silent:
            log.warning("PostgreSQL has not answered for %.0f s: the connection is given up", SILENCE)
        if not more:
            return


def _in_child() -> None:
    global _lock, _looking  # noqa: PLW0603 - the thread is the parent's, and may have held the lock
    _lock = threading.Lock()
    _looking = False
    _asked.clear()


os.register_at_fork(after_in_child=_in_child)
