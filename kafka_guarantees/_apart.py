"""A handler on a thread of its own, while the thread of its consumer serves the group (C10).

Rules.
* One handler at a time; the thread that called it does nothing meanwhile but poll, with everything paused (Y01).
* It is waited for, whatever happens: a handler that nobody waits for could write into a transaction that is not its own.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Iterator
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from .records import check_handler

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._lifecycle import Lifecycle

AT_ONCE = 1.0  # seconds that a handler may take before the group is served: a quick one costs no pause and no resume
SERVE_EVERY = 0.1  # seconds


class Apart:
    """Runs handlers on a thread of its own.

    Args:
        lifecycle: of the client: calls from that thread count as calls of the handler.
    """

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._status = 1  # of a child that comes back from a handler
        self._serve: Callable[[], object] = _nothing
        self._resume: Callable[[], object] = _nothing

    def attend(self, serve: Callable[[], object], resume: Callable[[], object]) -> None:
        """What to do for the group while a handler works: ``serve()`` again and again, and ``resume()`` after it."""
        self._serve, self._resume = serve, resume

    def call(self, handler: Callable[..., Any], *given: Any) -> Any:
        """Return what ``handler(*given)`` returns, a generator as a list; or raise what it raises.

        Raises:
            BaseException: serving the group failed. The handler has returned or raised by then.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="kafka-guarantees-handler", daemon=True)
            thread.start()
            self._thread = thread
            self._lifecycle.hands.add(thread)
        context = contextvars.copy_context()
        done = threading.Event()
        result: list[Any] = []
        raised: list[BaseException] = []

        def work() -> None:
            try:
                result.append(context.run(_finished, handler, given))
            except BaseException as error:  # noqa: BLE001 - raised in the thread that called
                raised.append(error)
                self._status = status_of(error)
            finally:
                done.set()

        self._calls.put(work)
        self._wait(done)
        if raised:
            raise raised[0]
        return result[0]

    def _wait(self, done: threading.Event) -> None:
        """Wait for the handler, and serve the group meanwhile; then raise what went wrong in that."""
        problem: BaseException | None = None
        patience = AT_ONCE
        while not done.is_set():
            try:
                if not done.wait(patience) and problem is None:
                    patience = SERVE_EVERY
                    self._serve()
            except BaseException as error:  # noqa: BLE001 - also out of a signal handler
                problem = problem or error
        if patience == SERVE_EVERY:
            self._resume()
        if problem is not None:
            raise problem

    def _work(self) -> None:
        process = os.getpid()
        while (call := self._calls.get()) is not None:
            call()
            del call
            if os.getpid() != process:
                os._exit(self._status)  # a child that the handler forked: there is nobody for it to return to

    def close(self) -> None:
        """Let the thread go, once its handler has returned."""
        if self._thread is not None:  # else the thread of the next run would take it for its own end
            self._lifecycle.hands.discard(self._thread)
            self._thread = None
            self._calls.put(None)


def apart_or_here(apart: Apart | None, handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler as a run calls it: itself, or on the thread for handlers.

    Raises:
        TypeError: it can handle no message at all.
    """
    check_handler(handler)
    return handler if apart is None else partial(apart.call, handler)


def _nothing() -> None: ...


def status_of(error: BaseException) -> int:
    """The exit status of a process that ends with an exception."""
    code = error.code if isinstance(error, SystemExit) else 1
    return 0 if code is None else code if isinstance(code, int) else 1


def _finished(handler: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """What a handler returns, with nothing of it left to be done in another thread."""
    result = handler(*given)
    return list(result) if isinstance(result, Iterator) else result
