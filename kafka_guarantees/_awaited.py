"""Deliveries that coroutines wait for: one thread for all of them serves librdkafka, and tells their event loops.

Rules.
* The thread is there while something is awaited. It holds the producer for as long, and no longer.
* An event loop is never held up: nothing here waits in its thread.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from ._threads import start
from .records import LOST

if TYPE_CHECKING:
    from collections.abc import Callable

    from .records import Delivery

    Wait = Callable[[Delivery, float], None]

LOOK = 0.05  # seconds until an awaited delivery that was cancelled is let go of


class _One(NamedTuple):
    """A delivery that is awaited, until ``deadline`` at the latest: no report on it can come then."""

    delivery: Delivery
    deadline: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]

    def tell(self, error: BaseException | None = None) -> None:
        with suppress(RuntimeError):  # its event loop is closed
            self.loop.call_soon_threadsafe(_settle, self.future, error)


class Awaited:
    """The deliveries of one producer that are awaited."""

    def __init__(self) -> None:
        self._ones: list[_One] = []
        self._working = False
        self._lock = Lock()

    def future(self, delivery: Delivery, patience: float, wait: Wait) -> asyncio.Future[None]:
        """A future of the running event loop, which is done when the delivery is.

        Args:
            delivery: on its way.
            patience: seconds after which its record must have been settled.
            wait: serves librdkafka for a moment.
        """
        loop = asyncio.get_running_loop()
        one = _One(delivery, time.monotonic() + patience + LOST, loop, loop.create_future())
        with self._lock:
            self._ones.append(one)
            begin, self._working = not self._working, True
        if begin:
            try:
                start(self._work, wait, name="kafka-guarantees-await")
            except BaseException:
                self._working = False  # two of them do no harm
                raise
        return one.future

    def _work(self, wait: Wait) -> None:
        while True:
            with self._lock:
                waiting = [one for one in self._ones if not (one.delivery.done or one.future.done())]
                over, self._ones = [one for one in self._ones if one.delivery.done], waiting
                self._working = bool(waiting)
            for one in over:
                one.tell()
            if not waiting:
                return
            try:
                wait(waiting[0].delivery, LOOK)
            except BaseException as error:  # noqa: BLE001 - for those who wait: nobody serves them any more
                with self._lock:
                    self._ones = [one for one in self._ones if one not in waiting]
                for one in waiting:
                    one.tell(error)
            now = time.monotonic()
            for one in waiting:
                if now > one.deadline and not one.delivery.done:
                    one.delivery._lost()


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
