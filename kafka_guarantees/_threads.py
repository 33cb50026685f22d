"""Threads, and waiting for them, where an exception out of a signal handler may come at any instant.

``threading.Event``, ``Condition``, ``Future`` and ``Thread.start()`` are written in Python, and can be left anywhere in the
middle (Y03): Ctrl-C then comes out as ``RuntimeError: release unlocked lock``, a thread that was started ends before its first
line, or a lock stays taken that another thread waits for. A lock by itself is in C: it is taken or it is not.
"""

from __future__ import annotations

import _thread
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    Calls = SimpleQueue[Callable[[], object] | None]  # of one thread, until None comes

T = TypeVar("T")

LATE = 0.1  # seconds: of one that waits, where the one that was to wake it was interrupted
BEGUN = 1.0  # seconds: where a signal handler came into threading's own lock, a thread begins after it only
CALLED_OFF = object()


class Flag:
    """An event that comes once.

    Attributes:
        is_set: it has come.
    """

    __slots__ = ("_key", "_lock", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._lock = threading.Lock()  # not SimpleQueue: get() with a timeout may wait for ever once a signal came into it
        self._lock.acquire()
        self._key = {None: True}  # whoever pops it opens the lock

    def set(self) -> None:
        """Let all go on that wait for it."""
        self.is_set = True
        if self._key.pop(None, False):
            self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it, at most ``timeout`` seconds. Returns whether it has come."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self.is_set:
            left = LATE if until is None else min(LATE, until - time.monotonic())
            if left <= 0:
                break
            if self._lock.acquire(timeout=left):
                self._lock.release()  # for the next that waits
        return self.is_set


class Task:
    """A call that is made once, in whichever thread comes to it, or never.

    Attributes:
        ended: it has returned, or raised, or will never be made.
        error: what it raised.
    """

    __slots__ = ("_call", "_claim", "_value", "ended", "error")

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call: Callable[[], Any] | None = call
        self._claim: dict[None, object] = {}  # whose it is: setdefault() cannot be left half way, and says the same again
        self._value: Any = None
        self.error: BaseException | None = None
        self.ended = Flag()

    @property
    def begun(self) -> bool:
        """Whether a thread has begun it."""
        return bool(self._claim)

    def run(self) -> bool:
        """Make the call, where no other thread does. Returns whether it did. Never raises, where signal handlers do not."""
        me = object()
        if self._call is None or self._claim.setdefault(None, me) is not me:
            return False
        try:
            self._value = self._call()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that asks for the result
            trace = error.__traceback__
            self.error = error.with_traceback(trace and trace.tb_next)  # this frame holds the task, and so the error
            del trace
        finally:
            self._call = None  # whoever holds the task does not hold what it was about
            self.ended.set()
        return True

    def call_off(self) -> bool:
        """See to it that it does not begin. False: it has begun."""
        if self._claim.setdefault(None, CALLED_OFF) is not CALLED_OFF:
            return False
        self._call = None
        self.ended.set()
        return True

    def result(self) -> Any:
        """Wait for its end. Returns what it returned, or raises what it raised, once."""
        self.ended.wait()
        error, self.error = self.error, None  # its traceback will hold the task
        if error is not None:
            try:
                raise error
            finally:
                del error
        return self._value


def start(work: Callable[..., object], *given: Any, name: str) -> None:
    """Call ``work(*given)`` in a daemon thread.

    Raises:
        RuntimeError: the system has no thread left.
        BaseException: out of a signal handler. ``work`` is called nevertheless, or never will be.
    """
    begin = Task(threading.Thread(target=work, args=given, name=name, daemon=True).start)
    _thread.start_new_thread(begin.run, ())  # in a thread no signal handler raises
    if begin.ended.wait(BEGUN):
        begin.result()


def beside(call: Callable[[], T], name: str) -> T:
    """Return what ``call()`` returns, made in a thread of its own: where no signal handler raises inside of a C call (Y03)."""
    task = Task(call)
    start(task.run, name=name)
    result: T = task.result()
    return result


def hand(name: str, hands: set[threading.Thread]) -> Calls:
    """A daemon thread that makes the calls that are put into its queue, one after the other, until None comes.

    Args:
        name: of the thread.
        hands: the thread is one of these as long as it lives.

    Raises: what ``start`` raises. The thread ends then, if it came to be: it shares its queue with nobody.
    """
    calls: Calls = SimpleQueue()
    try:
        start(_work_off, calls, hands, name=name)
    except BaseException:
        calls.put(None)
        raise
    return calls


def _work_off(calls: Calls, hands: set[threading.Thread]) -> None:
    hands.add(threading.current_thread())
    while (call := calls.get()) is not None:
        call()
        del call  # with it may go the last reference to a C client
    hands.discard(threading.current_thread())
