"""A handler on a thread of its own, while the thread of its consumer serves the group (C10).

Rules.
* One handler at a time; the thread that called it does nothing meanwhile but poll, with everything paused (Y01).
* Messages go there together, and what the handler returned for them comes back together: a way to and fro for each message
  takes longer than most handlers. It is sent by the thread of the consumer, which knows what is on its way.
* It is waited for, whatever happens: a handler that nobody waits for could write into a transaction that is not its own.
* One that takes longer than ``max.poll.interval.ms`` is named in the log: nothing else would tell one that hangs, since the
  group is served.
"""

from __future__ import annotations

import contextvars
import logging
import os
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ._offsets import fields, where
from ._threads import Task, hand

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from confluent_kafka import Message

    from ._lifecycle import Lifecycle
    from ._threads import Calls, Flag
    from .records import Record

log = logging.getLogger("kafka_guarantees")

AT_ONCE = 1.0  # seconds that a handler may take before the group is served: a quick one costs no pause and no resume
SERVE_EVERY = 0.1  # seconds
MOST = 10_000  # records, or messages, that are handled together


class HandlerThread:
    """Runs handlers on a thread of its own.

    Args:
        lifecycle: of the client: calls from that thread count as calls of the handler.
        long: seconds until a handler that has not returned is named in the log; again after twice as many, and so on.
    """

    def __init__(self, lifecycle: Lifecycle, long: float) -> None:
        self._lifecycle = lifecycle
        self._long = long
        lifecycle.interruptible = False
        self._calls: Calls | None = None  # of its thread, once there is one
        self._left = False  # an exception came while a handler worked: it is waited for, and nothing after it
        self._kept: list[tuple[Message, list[Record] | Exception]] = []
        self._at: Message | None = None  # which is handled, where they are handled one by one
        self._served = 0.0  # when the group was, or would have been by the loop
        self._most = MOST
        self._serve: Callable[[], object] = _nothing
        self._resume: Callable[[], object] = _nothing

    def attend(self, serve: Callable[[], object], resume: Callable[[], object]) -> None:
        """What to do for the group while a handler works: ``serve()`` again and again, and ``resume()`` after it."""
        self._serve, self._resume = serve, resume
        self._kept = []  # of the batch before, part of which was given back
        self._served = time.monotonic()

    def call(self, handler: Callable[..., Any], *given: Any) -> Any:
        """Return what ``handler(*given)`` returns, a generator as a list; or raise what it raises.

        Raises:
            BaseException: serving the group failed. The handler has returned or raised by then.
        """
        if self._calls is None:
            self._calls = hand("kafka-guarantees-handler", self._lifecycle.hands)
        task = Task(partial(contextvars.copy_context().run, _finished, handler, given))
        problem: BaseException | None = None
        # several calls, none of which takes so long, may be one after the other
        patience = AT_ONCE if time.monotonic() - self._served < 2 * AT_ONCE else SERVE_EVERY
        served, began, long = False, time.monotonic(), self._long
        self._left, self._at = False, None
        try:
            self._calls.put(task.run)
            while not task.ended.wait(patience):
                patience, served = SERVE_EVERY, True
                self._serve()
                self._served = time.monotonic()
                if self._served - began > long:
                    long *= 2
                    self._tell(self._served - began, given)
        except BaseException as error:  # noqa: BLE001 - also out of a signal handler; raised below
            problem = error
            self._left = True
            if not task.call_off():
                _wait_whatever_comes(task.ended)
        if served:
            self._resume()
        if problem is not None:
            raise problem
        return task.result()

    def _tell(self, seconds: float, given: tuple[Any, ...]) -> None:
        message = given[0][0] if self._at is None else self._at  # the first of a batch
        log.warning(
            "the handler has not returned for %.0f s: %s. It is waited for, and the group served meanwhile",
            seconds,
            where(message),
            extra=fields(message),
        )

    def each(
        self, handler: Callable[[Message], list[Record]], messages: Sequence[Message], done: list[list[Record]], seconds: float
    ) -> Exception | None:
        """Call a handler with one message after the other, for so many seconds, or until the client is to stop.

        Not for longer than half of AT_ONCE either, nor with more than MOST records: they are in memory. Each message has a
        context of its own, as if it were alone.

        Args:
            handler: gives records as they are produced, which nothing can change any more.
            messages: to handle. What ``keep()`` has of the first of them is not asked for again.
            done: gets what came of each that is handled, also where this raises.
            seconds: of handling.

        Returns:
            What the handler raised for the message after these.

        Raises:
            BaseException: as ``call`` does.
        """
        if self._kept and self._kept[0][0] is messages[0]:
            return self._take(messages, done)
        until = time.monotonic() + min(seconds, AT_ONCE / 2)
        most, self._most = self._most, min(2 * self._most, MOST)
        error: Exception | None = self.call(self._each, handler, messages[:most], done, until)
        return error

    def _each(
        self, handler: Callable[[Message], list[Record]], messages: Sequence[Message], done: list[list[Record]], until: float
    ) -> Exception | None:
        count = 0
        for message in messages:
            self._at = message
            try:
                records: list[Record] = contextvars.copy_context().run(_finished, handler, (message,))
            except Exception as error:  # noqa: BLE001 - the caller decides what becomes of it
                return error
            done.append(records)
            count += len(records)
            if self._left or self._lifecycle.stopping or count >= MOST or time.monotonic() >= until:
                break
        return None

    def keep(self, handled: list[tuple[Message, list[Record] | Exception]]) -> None:
        """Have these for when their turn comes: they are handled, and behind one whose record was refused."""
        self._kept = handled

    def _take(self, messages: Sequence[Message], done: list[list[Record]]) -> Exception | None:
        kept, self._kept = self._kept, []
        for (message, came), wanted in zip(kept, messages, strict=False):
            if message is not wanted:
                break
            if isinstance(came, Exception):
                return came
            done.append(came)
        return None

    def narrow(self) -> None:
        """Begin with one message again: whatever comes behind one that is refused is handled again."""
        self._most = 1

    def close(self) -> None:
        """Let the thread go, once its handler has returned."""
        self._kept = []
        calls, self._calls = self._calls, None  # first: the next run has another
        if calls is not None:
            calls.put(None)


def handler_thread(keep_alive: bool, lifecycle: Lifecycle, long: float) -> HandlerThread | None:  # noqa: FBT001 - as given
    """The thread for handlers, where there is to be one. Raises TypeError for "false", which would be true."""
    if not isinstance(keep_alive, bool):
        raise TypeError(f"keep_alive is True or False, not {keep_alive!r}")
    return HandlerThread(lifecycle, long) if keep_alive else None


def ended_after(thread: HandlerThread | None) -> AbstractContextManager[object]:
    """What a run is in, so that its thread for handlers ends with it."""
    return nullcontext() if thread is None else closing(thread)


def _nothing() -> None: ...


def _wait_whatever_comes(ended: Flag) -> None:
    while not ended.is_set:
        with suppress(BaseException):  # out of signal handlers; the first one is raised
            ended.wait()


def _finished(handler: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """What a handler returns, with nothing of it left to be done in another thread."""
    process = os.getpid()
    status = 1  # of a child that comes back from a handler
    try:
        result = handler(*given)
        return list(result) if isinstance(result, Iterator) else result
    except BaseException as error:
        status = status_of(error)
        raise
    finally:
        if os.getpid() != process:
            os._exit(status)  # a child that the handler forked: there is nobody for it to return to


def status_of(error: BaseException) -> int:
    """The exit status of a process that ends with an exception."""
    code = error.code if isinstance(error, SystemExit) else 1
    return 0 if code is None else code if isinstance(code, int) else 1
