"""Deliveries that coroutines wait for: one thread for all of them serves librdkafka, and tells their event loops.

Rules.
* The thread is there while something is awaited, and a moment longer. It holds the producer for as long.
* An event loop is never held up: nothing here waits in its thread.
* Nothing depends on there being one thread only: where it is not known to be at work, another one begins.
"""

from __future__ import annotations

import _thread
import asyncio
import time
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from ._threads import Flag
from .records import LOST, Silence

if TYPE_CHECKING:
    from collections.abc import Callable

    from .records import Delivery

    Wait = Callable[[Delivery, float], "int | None"]

LOOK = 0.05  # seconds until an awaited delivery that was cancelled is let go of
LINGER = 1.0  # seconds without anything to wait for until the thread ends: to begin one takes a while
NEVER = float("-inf")
SILENT = 5.0  # seconds without a sign of it until it counts as gone


class _One(NamedTuple):
    """A delivery that is awaited, until ``deadline`` at the latest: no report on it can come then."""

    delivery: Delivery
    deadline: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]

    def tell(self, error: BaseException | None = None) -> None:
        with suppress(RuntimeError):  # its event loop is closed
            self.loop.call_soon_threadsafe(_settle, self.future, None if self.delivery.done else error)


class Awaited:
    """The deliveries of one producer that are awaited."""

    def __init__(self) -> None:
        self._ones: list[_One] = []
        self._alive = NEVER  # when the thread has last looked
        self._more = Flag()
        self._lock = Lock()

    def future(self, delivery: Delivery, patience: float, wait: Wait) -> asyncio.Future[None]:
        """A future of the running event loop, which is done when the delivery is.

        Args:
            delivery: on its way.
            patience: seconds after which its record must have been settled.
            wait: serves librdkafka for a moment.

        Raises:
            RuntimeError: the system has no thread left.
        """
        loop = asyncio.get_running_loop()
        one = _One(delivery, time.monotonic() + patience + LOST, loop, loop.create_future())
        with self._lock:
            self._ones.append(one)
            gone = time.monotonic() - self._alive > SILENT
            if gone:
                self._alive = time.monotonic()
        self._more.set()
        if gone:
            try:
                _thread.start_new_thread(self._work, (wait,))  # not start(): that would wait until it runs
            except RuntimeError as error:
                with self._lock:
                    ones, self._ones, self._alive = self._ones, [], NEVER
                for other in ones:
                    if other is not one:  # who called hears it now, and nobody will ask this future
                        other.tell(error)
                raise
        return one.future

    def _work(self, wait: Wait) -> None:
        silence = Silence()
        while True:
            with self._lock:
                self._alive = time.monotonic()
                waiting = [one for one in self._ones if not (one.delivery.done or one.future.done())]
                over, self._ones = [one for one in self._ones if one.delivery.done], waiting
                self._more = more = Flag()
            for one in over:
                one.tell()
            if waiting:
                self._serve(waiting, wait, silence)
            elif more.wait(LINGER):
                silence = Silence()
            else:
                with self._lock:
                    if not self._ones:
                        self._alive = NEVER
                        return

    def _serve(self, waiting: list[_One], wait: Wait, silence: Silence) -> None:
        left = None
        try:
            left = wait(waiting[0].delivery, LOOK)
        except BaseException as error:  # noqa: BLE001 - for those who wait: nobody serves them any more
            self._fail(waiting, error)
        now, lasts = time.monotonic(), silence.lasts(left)
        for one in waiting:
            if (lasts or now > one.deadline) and not one.delivery.done:
                one.delivery._lost()

    def _fail(self, ones: list[_One], error: BaseException) -> None:
        failed = {id(one) for one in ones}
        with self._lock:
            self._ones = [one for one in self._ones if id(one) not in failed]
        for one in ones:
            one.tell(error)


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
