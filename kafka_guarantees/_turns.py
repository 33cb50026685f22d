"""Several threads wait for delivery reports, one of them serves librdkafka.

Were they all to poll, each would sleep in there until its time is up, since reports that another thread was given wake nobody.

Rules.
* Who serves does so for a moment, then tells those whose report has come, and one of the others, which serves next.
* Nothing depends on it: a turn that was not given back, since a signal handler raised, ends by itself; two that serve at the
  same time do no harm.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from ._threads import Flag

if TYPE_CHECKING:
    from collections.abc import Callable

    from .records import Delivery

T = TypeVar("T")

TURN = 0.02  # seconds: much longer than it takes


class Turns:
    """Whose turn it is to serve one producer."""

    def __init__(self) -> None:
        self._until = 0.0  # somebody serves
        self._waiting: dict[Flag, Delivery] = {}

    def wait(self, delivery: Delivery, timeout: float, serve: Callable[[], T]) -> T | None:
        """Serve for a moment, or wait for at most ``timeout`` seconds while another thread does: then it returns None."""
        told = Flag()
        self._waiting[told] = delivery  # before it is asked whose turn it is: who gives it back sees this one
        try:
            if time.monotonic() < self._until:
                if told.wait(timeout) and delivery.done and not self._until:
                    self._tell(told)  # it was to serve, and need not: the others are not to wait for it
                return None
            self._until = time.monotonic() + TURN
            try:
                return serve()
            finally:
                self._until = 0.0
                self._tell(told)
        finally:
            del self._waiting[told]

    def _tell(self, itself: Flag) -> None:
        heir = False
        for told, delivery in list(self._waiting.items()):
            if delivery.done:
                told.set()
            elif not heir and told is not itself:
                heir = True
                told.set()
