"""What has nothing to do with messages: who runs a client, when it is to stop, and what a fork does to it.

Rules.
* ``stop()`` only sets a flag, so it is safe in threads and signal handlers. One that comes before a run ends the next one.
* One thread at a time runs a client (X26, Y01). The C clients are touched by that thread alone.
* A signal handler of ours never raises: an exception out of a C call destroys the messages it had fetched (C01, Y03).
* After a fork every call raises in the child, and the child never destroys the parent's C client (Y04).
"""

from __future__ import annotations

import ctypes
import inspect
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from confluent_kafka import KafkaException

from ._settings import creation_failure
from .errors import BrokerError, ForkedClientError, KafkaGuaranteesError, describe

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from types import FrameType

    from confluent_kafka import KafkaError

log = logging.getLogger("kafka_guarantees")

T = TypeVar("T")
Itself = Callable[[], "Generator[Any, None, None] | None"]  # the iteration that is running, while its user has it

STOP_GRACE = 1.3  # seconds that a stopping client still waits for brokers that do not answer
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Lifecycle:
    """Whether one client is open, running, stopping or closed, and who may touch it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = False
        self.forked = False
        self.stopping = False  # a stop was asked for; read once per message, so no property
        self._stopped_at: float | None = None
        self._runner: threading.Thread | None = None
        self._iteration: Itself | None = None
        self._turn = threading.Condition()
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

    def stop(self) -> None:
        """Ask the run to end; returns at once."""
        self._stopped_at = self._stopped_at or time.monotonic()
        self.stopping = True

    @property
    def out_of_patience(self) -> bool:
        """True once a stop was asked for so long ago that brokers which do not answer are not waited for."""
        return self._stopped_at is not None and time.monotonic() - self._stopped_at > STOP_GRACE

    @property
    def in_run(self) -> bool:
        """True while a run of this client is on."""
        return self._runner is not None

    @property
    def in_hand(self) -> bool:
        """True in the thread that runs this client: a call comes from its handler."""
        return self._runner is threading.current_thread()

    @contextmanager
    def running(self, iteration: Itself | None = None) -> Iterator[None]:
        """One run: owned by this thread, and ended by ``stop()``.

        Without ``iteration`` SIGINT and SIGTERM end it as well. An iteration leaves signals to its user, who may also leave it
        half way: then ``close()`` ends it.
        """
        self.check()
        with self._turn:
            if self._runner is not None:
                raise KafkaGuaranteesError(
                    f"this {self.name} is running already (thread {self._runner.name!r}). "
                    "One client runs one loop: stop() or close() it first, or make a second client."
                )
            self._runner, self._iteration = threading.current_thread(), iteration
        try:
            with _stop_on_signal(self.stop) if iteration is None else _nothing():
                yield
        finally:
            with self._turn:
                self._runner = self._iteration = None
                self._stopped_at = None
                self.stopping = False
                self._turn.notify_all()

    @staticmethod
    def iterate(generate: Callable[[Itself], Generator[T, None, None]]) -> Generator[T, None, None]:
        """A generator that knows itself, by a reference that does not keep it alive once its user has dropped it."""
        itself: list[weakref.ref[Generator[T, None, None]]] = []
        generator = generate(lambda: itself[0]())  # noqa: PLW0108 - the list is filled in the next line
        itself.append(weakref.ref(generator))
        return generator

    def end_run(self, timeout: float) -> bool:
        """End the run, wherever it is. False: the handler of another thread has not returned within ``timeout`` seconds."""
        iteration = None if self._iteration is None else self._iteration()
        if self._runner is threading.current_thread():
            if iteration is None:
                raise KafkaGuaranteesError("close() was called in the handler: call stop() there, and close() after run().")
            iteration.close()  # a loop that was left by break or by an exception
        with self._turn:
            if self._runner is None:
                return True
            self.stop()
            alone = not self._runner.is_alive()  # nobody will come back to a loop whose thread is gone
            ended = not alone and self._turn.wait_for(lambda: self._runner is None, timeout)
        if not ended and iteration is not None and inspect.getgeneratorstate(iteration) == inspect.GEN_SUSPENDED:
            iteration.close()
            return True
        return ended


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _stop_on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call ``stop`` while the block runs in the main thread; then the old handlers are back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop()  # and nothing else: logging is not reentrant

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class Abandoned(BrokerError):
    """The client is to stop, and no broker answers: what is open is left to the brokers."""


class Caller:
    """Makes blocking C calls that take no timeout on a daemon thread, so that the caller need not wait for ever.

    One call at a time, and the caller waits meanwhile: the C client is still never used by two threads at once (Y01).
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._wake, self._done = threading.Lock(), threading.Lock()  # as binary semaphores, the fastest that there are
        self._wake.acquire()
        self._done.acquire()
        self._pending = False  # a call is out whose end nobody has seen
        self._call: Callable[[], Any] | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], T], give_up: Callable[[], bool], doing: str) -> T:
        """Return what ``function()`` returns, or raise Abandoned once ``give_up()`` is true before it is done."""
        self._wait(give_up, doing)  # for a call that a signal's exception had walked away from
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._call, self._error, self._pending = function, None, True
        self._wake.release()
        self._wait(give_up, doing)
        if self._error is not None:
            raise self._error
        result: T = self._result
        return result

    def _wait(self, give_up: Callable[[], bool], doing: str) -> None:
        while self._pending:
            if self._done.acquire(timeout=0.1):
                self._pending = False
            elif give_up():
                raise Abandoned(f"{doing} got no answer from the brokers: its outcome is unknown.")

    def end(self) -> None:
        """Let the thread go, once it is done."""
        self._call = None
        if self._thread is not None and self._wake.locked():
            self._wake.release()

    def _serve(self) -> None:
        while True:
            self._wake.acquire()
            call, self._call = self._call, None
            if call is None:
                return
            try:
                self._result = call()
            except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that called
                self._error = error
            del call  # with it goes the last reference to the C client
            self._done.release()


class Callbacks:
    """User callbacks, made harmless for the C client: what they raise is logged, or raised after the C call (C01, P12)."""

    def __init__(self) -> None:
        self._interrupt: BaseException | None = None

    def shim(self, name: str, callback: Callable[..., object]) -> Callable[..., None]:
        """``callback`` in a form that never raises."""

        def harmless(*args: object) -> None:
            try:
                callback(*args)
            except Exception:
                log.exception("%s raised; this does not disturb the delivery of messages", name)
            except BaseException as interrupt:  # noqa: BLE001 - KeyboardInterrupt and its like go on after the C call
                self._interrupt = interrupt

        return harmless

    def of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The callbacks that a C client is made with: the user's, harmless, and ours where there is none."""
        found: dict[str, Any] = {
            name: self.shim(name, given[name]) for name in ("error_cb", "stats_cb", "throttle_cb") if name in given
        }
        found.setdefault("error_cb", self.shim("error_cb", _log_error))
        found["logger"] = given.get("logger", logging.getLogger("kafka_guarantees.librdkafka"))
        return found

    def interrupt(self, problem: BaseException) -> None:
        """Keep something that must be raised once the C call is over."""
        self._interrupt = problem

    def raise_interrupt(self) -> None:
        """Raise what must not be lost, outside of the C call."""
        if self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            raise interrupt


def _log_error(error: KafkaError) -> None:
    log.warning("%s", describe(error))


class Handle:
    """Owner of one C client: makes it, knows the fork rule, and lets it go without waiting for the brokers."""

    def __init__(self) -> None:
        self.raw: Any = None
        self.finalizer: weakref.finalize[..., Any] | None = None
        _handles.add(self)

    def warn_if_forgotten(self, owner: object, warn: Callable[..., None], *args: object) -> None:
        """Call ``warn(*args)`` when ``owner`` is collected, or the process ends, before ``closed()``."""
        self.finalizer = weakref.finalize(owner, warn, *args)

    def closed(self) -> None:
        """The owner has closed it: nothing to warn of."""
        if self.finalizer is not None:
            self.finalizer.detach()

    def make(self, client: type, config: dict[str, Any]) -> None:
        """Make the C client. Raises UnsafeConfigError, without a secret, where librdkafka cannot."""
        failure = None
        try:
            self.raw = client(config)
        except (KafkaException, TypeError, ValueError) as error:  # its text may echo a secret
            failure = creation_failure(error, config)
        if failure is not None:
            raise failure

    def let_go(self) -> None:
        """Destroy the C client on a thread of its own, since that waits for librdkafka's threads (X20)."""
        box = [self.raw]
        self.raw = None
        threading.Thread(target=box.clear, name="kafka-guarantees-destroy", daemon=True).start()


_alive: weakref.WeakSet[Lifecycle] = weakref.WeakSet()
_handles: weakref.WeakSet[Handle] = weakref.WeakSet()


def _in_child() -> None:
    for lifecycle in _alive:
        lifecycle.forked = True
    for handle in _handles:
        handle.closed()  # the parent's business
        if handle.raw is not None:
            # destroying would wait for threads that are not there, and touch the parent's sockets: leak it on purpose
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle.raw))


os.register_at_fork(after_in_child=_in_child)
