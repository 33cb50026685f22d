"""What has nothing to do with messages: who runs a client, when it is to stop, and what a fork does to it.

Rules.
* ``stop()`` only sets a flag, so it is safe in threads and signal handlers. One that comes before a run ends the next one.
* One thread at a time runs a client (X26, Y01).
* A signal handler of ours never raises: an exception out of a C call destroys the messages it had fetched (C01, Y03). But a
  second Ctrl-C is for whoever had it before, since the handler of a message may never return.
* After a fork every call raises in the child (Y04). A run that was forked in its handler ends there with that error, once the
  handler returns; it commits, closes and aborts nothing, and signals are the child's own again.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from ._threads import Flag
from .errors import ForkedClientError, KafkaGuaranteesError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import FrameType

log = logging.getLogger("kafka_guarantees")

T = TypeVar("T")
Itself = Callable[[], "Generator[Any, None, None] | None"]  # the iteration that is running, while its user has it

# Seconds that a stopping client still waits for brokers that do not answer. In a rebalance they answer neither a commit nor the
# leaving of a classic member, or refuse the former, before all others have joined again. They hear of it by a heartbeat (3 s),
# and by another one of the second half of a cooperative rebalance.
STOP_GRACE = 6.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECOND_THOUGHTS = 1.0  # seconds after which another SIGINT is one: a terminal and a wrapper may both pass on the first


class Lifecycle:
    """Whether one client is open, running, stopping or closed, and who may touch it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = False
        self.forked = False
        self.stopping = False  # a stop was asked for; read once per message, so no property
        self.why = ""  # by what, while stopping: for the log, where that is not an error
        self.interruptible = True  # handlers are called in the thread that runs
        self._give_up_at: float | None = None
        self._closing = False  # close() has said until when the run may take: handled() must not extend that
        self._runner: threading.Thread | None = None
        self.hands: set[threading.Thread] = set()  # of handlers, flights, C calls: its run waits for these
        self._iteration: Itself | None = None
        self._turn = threading.RLock()  # also by a signal handler, in the middle of it
        self._over = Flag()  # of the last run
        _alive.add(self)

    def check(self) -> None:
        """Raise where no call is allowed any more."""
        self.check_fork()
        if self.closed:
            raise KafkaGuaranteesError(f"this {self.name} is closed. Nothing was sent. Make a new one.")

    def check_fork(self) -> None:
        """Raise in a child of the process that made the client."""
        if self.forked:
            raise ForkedClientError(
                f"this {self.name} was made in another process; librdkafka's threads do not survive fork(). "
                "Nothing was sent. Make the client after the fork, in the process that uses it."
            )

    def stop(self, why: str = "stop()") -> None:
        """Ask the run to end; returns at once."""
        self.leave(STOP_GRACE, why)

    def leave(self, grace: float, why: str = "") -> None:
        """Ask the run to end, and not to wait longer than ``grace`` seconds for brokers that do not answer."""
        if not self.stopping:  # else the first counts
            self.why = why
        self._give_up_at = self._give_up_at or time.monotonic() + grace
        self.stopping = True

    def handled(self) -> None:
        """A handler has returned: the brokers have their grace from now on, however long ago the stop was."""
        until = self._give_up_at  # read once: the run of another thread may end here
        if until is not None and not self._closing:
            self._give_up_at = max(until, time.monotonic() + STOP_GRACE)

    @property
    def out_of_patience(self) -> bool:
        """True once a stop was asked for so long ago that brokers which do not answer are not waited for."""
        until = self._give_up_at  # likewise
        return self._runner is not None and until is not None and time.monotonic() > until

    @property
    def in_run(self) -> bool:
        """True while a run of this client is on."""
        return self._runner is not None

    @property
    def in_hand(self) -> bool:
        """True in a thread that runs this client, or that its run waits for: a call comes from a handler, or a callback."""
        here = threading.current_thread()
        return self._runner is not None and (here is self._runner or here in self.hands)

    @property
    def in_other_hands(self) -> bool:
        """True while a run of this client is on that this thread has no part in."""
        return self.in_run and not self.in_hand

    @contextmanager
    def running(self, iteration: Itself | None = None, *, consumes: bool = True) -> Iterator[None]:
        """One run: owned by this thread, and ended by ``stop()``. One that only produces leaves that to the next.

        Without ``iteration`` SIGINT and SIGTERM end it as well. An iteration leaves signals to its user, who may also leave it
        half way: then ``close()`` ends it. A stop that a run answered with an error ends the next run: a signal came for the
        process, and its loop around ``run`` cannot know of it.
        """
        self.check()
        over = Flag()
        honoured = consumes and iteration is not None
        try:
            with self._turn:
                if self._runner is not None:
                    raise KafkaGuaranteesError(
                        f"this {self.name} is running already (thread {self._runner.name!r}). "
                        "One client runs one loop: stop() or close() it first, or make a second client."
                    )
                self._over, self._runner, self._iteration = over, threading.current_thread(), iteration
                if self.stopping:  # a stop that came before the run; what only produces has as much time as without it
                    self._give_up_at = time.monotonic() + STOP_GRACE if consumes else None
            with _stop_on_signal(self.stop, lambda: self.interruptible) if iteration is None else nullcontext():
                yield
            self.check_fork()  # the handler returned in a child: not as if all was done
            honoured = consumes
        finally:
            with self._turn:
                if self._over is over:  # else this run has not begun
                    over.is_set = True  # set() is a call, and may be interrupted
                    self._runner = self._iteration = None
                    if honoured:  # else an error came in between: whoever runs again after it is still to stop
                        self.stopping = False
                    self._give_up_at = None  # behind that, as in answered()
                    self._closing = False
                    over.set()

    def answered(self) -> None:
        """The run returns because of the stop, also if an error told it to."""
        self.stopping = False  # first, as leave() sets it last: one that comes in between leaves no time without a stop
        self._give_up_at = None

    @staticmethod
    def iterate(generate: Callable[[Itself], Generator[T, None, None]]) -> Generator[T, None, None]:
        """A generator that knows itself, by a reference that does not keep it alive once its user has dropped it."""
        itself: list[weakref.ref[Generator[T, None, None]]] = []
        generator = generate(lambda: itself[0]())  # noqa: PLW0108 - the list is filled in the next line
        itself.append(weakref.ref(generator))
        return generator

    def _end_by(self, until: float) -> None:
        """Ask the run to end by this moment. Also after a stop, whose grace is shorter."""
        if not self.stopping:
            self.why = "close()"
        self._closing = self.stopping = True
        self._give_up_at = until

    @contextmanager
    def ending(self, timeout: float) -> Iterator[bool]:
        """End the run as ``end_run`` does, and close the client in the block. What a loop that was left raises comes behind it.

        Raises:
            KafkaGuaranteesError: it is called in the handler, or a callback. Nothing has changed, and the block is left out.
        """
        try:
            ended = self.end_run(timeout)
        except Exception:
            if self.in_run:  # it goes on, also in another thread, where a signal handler has raised while it was waited for
                raise
            yield True  # it has ended, by what its loop has raised
            raise
        yield ended

    def end_run(self, timeout: float) -> bool:
        """End the run, wherever it is. False: the handler of another thread has not returned within ``timeout`` seconds."""
        itself = self._iteration  # read once: the run of another thread may end here
        iteration = None if itself is None else itself()
        if self.in_hand:
            if iteration is None:
                raise KafkaGuaranteesError(
                    "close() was called in the handler, or a callback: call stop() there, and close() after run()."
                )
            self._end_by(time.monotonic() + timeout)
            iteration.close()  # a loop that was left by break or by an exception
        until = time.monotonic() + timeout
        while True:
            with self._turn:
                if self._runner is None:
                    return True
                self._end_by(until)
                alone = itself is not None and _gone(self._runner)  # nobody will come back to that loop
                over = self._over
            if alone or not over.wait(until - time.monotonic()):
                break  # else look again: that thread may have begun another
        if iteration is not None and inspect.getgeneratorstate(iteration) == inspect.GEN_SUSPENDED:
            iteration.close()
            return True
        return False


def close_behind(error: BaseException | None, close: Callable[[], None]) -> None:
    """Close a client whose ``with`` block is left, by an error perhaps: one of ``close()`` never hides that."""
    try:
        close()
    except Exception:
        if error is None:
            raise
        log.exception("close() failed after the error that is raised")


def _gone(thread: threading.Thread) -> bool:
    """Whether it has ended. Not by ``is_alive()``: if a signal handler raises in that, one that lives is taken for dead."""
    if thread is threading.main_thread():
        return not thread.is_alive()  # asked in another one; it has a frame while it waits for these
    return thread.ident not in sys._current_frames()


@contextmanager
def _stop_on_signal(stop: Callable[[str], None], interruptible: Callable[[], bool]) -> Iterator[None]:
    """SIGINT and SIGTERM call ``stop`` while the block runs in the main thread; then the old handlers are back.

    From the second on a SIGINT is also what it was before, KeyboardInterrupt mostly, where that would interrupt the handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    process = os.getpid()
    interrupted: list[float] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a child that was just forked, and has not got its own handlers back yet
            _restore(before)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        try:
            stop(name)  # and nothing else: logging is not reentrant
        except BaseException:  # out of another signal's handler, in the middle of this one
            stop(name)
            raise
        if number == signal.SIGINT:
            interrupted.append(time.monotonic())
            earlier = before[signal.SIGINT]
            if interrupted[-1] - interrupted[0] > SECOND_THOUGHTS and callable(earlier) and interruptible():
                try:
                    earlier(number, frame)
                except BaseException:  # noqa: TRY203 - it has a value then; without one confluent-kafka loses it (Python 3.11)
                    raise

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        _replaced.append(before)
        for number in SIGNALS:
            signal.signal(number, on_signal)
        yield
    finally:
        try:
            _restore(before)
        except BaseException:  # out of a handler of the user's, in the middle of it
            _restore(before)
            raise
        finally:
            _replaced[:] = [one for one in _replaced if one is not before]


_replaced: list[dict[signal.Signals, Any]] = []  # handlers of the process that runs stand in for, the first run first


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)


_alive: weakref.WeakSet[Lifecycle] = weakref.WeakSet()


def _in_child() -> None:
    for lifecycle in _alive:
        lifecycle.forked = True
        lifecycle.stopping = True  # the handler that forked may return here: the loop around it reads only this
        lifecycle._turn = threading.RLock()  # another thread may have had it
    for handlers in reversed(_replaced):  # else SIGTERM, as a Pool of multiprocessing ends its workers by, would not end them
        _restore(handlers)


os.register_at_fork(after_in_child=_in_child)
