"""Care for one C client: made without echoing secrets, called without waiting for ever, let go without waiting at all.

Rules.
* A callback never raises into C: there it would destroy messages, or hide the success of a commit (C01, P12, X04).
* A child process never destroys the C client of its parent (Y04).
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import logging
import os
import re
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeVar

from confluent_kafka import KafkaError, KafkaException

from ._settings import creation_failure
from ._threads import Task, beside, hand
from .errors import BrokerError, ForkedClientError, KafkaGuaranteesError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ._threads import Calls, Flag

log = logging.getLogger("kafka_guarantees")

T = TypeVar("T")

QUIET = 10.0  # seconds in which an error of the same kind is not logged again
LOOK = 0.1  # seconds between two looks whether a call is still to be waited for
KINDS = 1000  # of lines that are remembered for that

# What to look at where no connection comes about. Neither passes by itself.
SHUT_OUT = {
    KafkaError._AUTHENTICATION: "Check sasl.username and sasl.password, or the token, and sasl.mechanism.",
    KafkaError._SSL: (
        "Check that ssl.ca.location has the authority of the brokers' certificates, that these are for the host names in "
        "bootstrap.servers and have not expired (openssl s_client -connect HOST:PORT), and that the port is one for TLS."
    ),
}


class Abandoned(BrokerError):
    """The client is to stop, and no broker answers: what is open is left to the brokers."""


class Caller:
    """Makes blocking C calls on a daemon thread, so that the caller need not wait for ever.

    Calls are made one after the other, also one that its caller has walked away from: the C client is never used by two
    threads at once (Y01).

    Args:
        name: of the thread.
        hands: threads that a run waits for, of which this is one, where callbacks may come in its calls.
    """

    def __init__(self, name: str, hands: set[threading.Thread] | None = None) -> None:
        self._name = name
        self._hands = set() if hands is None else hands
        self._calls: Calls | None = None  # of its thread, once there is one
        self._left: Flag | None = None  # of a call that its caller has walked away from
        self._pid = os.getpid()

    def call(self, function: Callable[[], T], give_up: Callable[[], bool], doing: str) -> T:
        """Return what ``function()`` returns, or raise Abandoned once ``give_up()`` is true before it is done."""
        if self._pid != os.getpid():
            raise ForkedClientError(FORKED)  # its thread is not here: nobody would answer
        if self._calls is None:
            self._calls = hand(self._name, self._hands)
        task = Task(function)
        del function  # what is raised holds this frame: a C client that lives on is a member of its group for as long
        try:
            self._calls.put(task.run)
            while not task.ended.wait(LOOK):
                if give_up():
                    raise Abandoned(f"{doing} got no answer from the brokers: its outcome is unknown.")  # noqa: TRY301 - see below
        except BaseException:
            before, self._left = self._left, task.ended
            if task.call_off():  # also after an exception out of a signal handler: what has not begun does not begin
                self._left = before  # one that is on still
            raise
        result: T = task.result()
        return result

    @property
    def left(self) -> bool:
        """Whether a call is still on that its caller has walked away from: what else is asked of the C client waits for it."""
        return self._left is not None and not self._left.is_set

    def end(self) -> None:
        """Let the thread go, once it is done."""
        if self._calls is not None:
            self._calls.put(None)


class Callbacks:
    """User callbacks, made harmless for the C client: what they raise is logged, or raised after the C call (C01, P12).

    They come while the client is served, and so do reports, log lines and signal handlers. Serving it once more in one of
    them would abort the process: confluent-kafka asserts that it is not.
    """

    def __init__(self) -> None:
        self._interrupt: BaseException | None = None
        self._shut_out: KafkaError | None = None
        self._serving: set[int] = set()  # threads
        self._complains = Rarely()

    @property
    def serving(self) -> bool:
        """Whether this thread serves the client already: it is in a callback, or in a signal handler that came meanwhile."""
        return threading.get_ident() in self._serving

    def check(self) -> None:
        """Refuse to serve the client from inside one of its callbacks.

        Raises:
            KafkaGuaranteesError: it does already.
        """
        if self.serving:
            raise KafkaGuaranteesError(
                "result(), flush() and close() wait for callbacks, and one of them was called in a callback, or in a signal "
                "handler that came in the middle of one: that would abort the process. What was produced is on its way. Wait "
                "for it somewhere else; in a signal handler call stop()."
            )

    def serve(self, call: Callable[[], T]) -> T:
        """Make a C call in which callbacks come. Raises what ``check`` raises."""
        self.check()
        thread = threading.get_ident()
        try:
            self._serving.add(thread)
            return call()
        finally:
            self._serving.discard(thread)

    def shim(self, name: str, callback: Callable[..., object]) -> Callable[..., None]:
        """``callback`` in a form that never raises."""

        def harmless(*args: object) -> None:
            try:
                callback(*args)
            except Exception as error:
                if isinstance(error, SystemError) and isinstance(error.__cause__, KafkaException):
                    return  # no fault of it: confluent-kafka called while it was raising that, for want of a token
                # A traceback takes time. Statistics that come faster than they are logged would never let a flush end.
                if self._complains((name, type(error))):
                    log.exception("%s raised; this does not disturb the delivery of messages", name)
            except BaseException as interrupt:  # noqa: BLE001 - KeyboardInterrupt and its like go on after the C call
                self._interrupt = interrupt

        return harmless

    def of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The callbacks that a C client is made with: the user's, harmless, and ours where there is none."""
        found: dict[str, Any] = {
            name: self.shim(name, given[name]) for name in ("error_cb", "stats_cb", "throttle_cb") if name in given
        }
        self._shut_out = None  # what kept an earlier client out may have passed
        found["error_cb"] = self._noting(found.get("error_cb") or self.shim("error_cb", _ErrorLog()))
        found["logger"] = given.get("logger", librdkafka_log)
        return found

    def _noting(self, error_cb: Callable[[KafkaError], None]) -> Callable[[KafkaError], None]:
        def noting(error: KafkaError) -> None:
            if error.code() in SHUT_OUT and "isconnected" not in error.str():  # a broker that dies in a handshake
                self._shut_out = error
            error_cb(error)

        return noting

    def raise_shut_out(self) -> None:
        """Raise what keeps a client out that has reached no broker yet: librdkafka would try for ever, without an answer.

        Raises:
            BrokerError: it could not log in, or does not trust the broker.
        """
        if self._shut_out is not None:
            advice = SHUT_OUT[self._shut_out.code()]
            raise BrokerError(f"no broker lets this client in ({describe(self._shut_out)}). Nothing was done. {advice}")

    def interrupt(self, problem: BaseException) -> None:
        """Keep something that must be raised once the C call is over."""
        self._interrupt = problem

    def raise_interrupt(self) -> None:
        """Raise what must not be lost, outside of the C call."""
        if self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            raise interrupt


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A callback that does not keep its client alive.

    An exception out of a signal handler may come between any two steps, and leave a consumer that nobody closes. In a cycle
    with the C client it would stay a member of the group, which nobody serves, until the garbage collector comes.
    """
    held = weakref.WeakMethod(method)

    def call(*arguments: object) -> None:
        found = held()
        if found is not None:
            found(*arguments)

    return call


class Rarely:
    """Whether something is to be said again: once in QUIET seconds."""

    def __init__(self) -> None:
        self._quiet_until: dict[object, float] = {}

    def __call__(self, what: object) -> bool:
        now = time.monotonic()
        if now < self._quiet_until.get(what, 0.0):
            return False
        if len(self._quiet_until) >= KINDS:
            self._quiet_until.clear()
        self._quiet_until[what] = now + QUIET
        return True


class _ErrorLog:
    """What stands for ``error_cb`` where the user gave none. librdkafka tries several times a second, and logs it as well."""

    def __init__(self) -> None:
        self._passes = Rarely()

    def __call__(self, error: KafkaError) -> None:
        if self._passes(error.code()):
            log.warning("%s", describe(error))


class _Seldom(logging.Filter):
    """Lets a line of librdkafka pass rarely: one for each try to connect would be some ten in a second."""

    def __init__(self) -> None:
        super().__init__()
        self._passes = Rarely()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line passes. Other numbers of clients or milliseconds make no other line. Nothing of debug is left out."""
        return record.levelno < logging.WARNING or self._passes(_CHANGING.sub("", record.getMessage()))


_CHANGING = re.compile(r"[^\s\[]+#(?:producer|consumer)-\d+|\bafter \d+ms.*", re.DOTALL)
librdkafka_log = logging.getLogger("kafka_guarantees.librdkafka")
librdkafka_log.addFilter(_Seldom())

FORKED = (
    "a client of the parent process was used after fork(); librdkafka's threads do not survive that. Nothing was sent. "
    "Make the client after the fork, in the process that uses it."
)


class _Forked:
    """Stands for the parent's C client in a child: whatever is asked of it raises."""

    def __getattr__(self, name: str) -> Any:
        raise ForkedClientError(FORKED)


class _Tokens:
    """The user's ``oauth_cb``, which librdkafka asks on a thread of its own. Remembers why it gave none."""

    def __init__(self, oauth_cb: Callable[[str], tuple[Any, ...]]) -> None:
        self._ask = oauth_cb
        self._given = False  # one that is over by now, perhaps
        self._problem: Exception | None = None

    def __call__(self, config: str) -> tuple[Any, ...]:
        try:
            given = self._ask(config)
            _check_token(given)
        except Exception as error:
            self._problem = error
            if self._given:
                log.exception("oauth_cb raised; it is asked again after 10 s, and the token before serves until it is over")
            else:
                log.exception("oauth_cb raised; there is no token before, and without one no client is made")
            raise
        self._problem, self._given = None, True
        return given

    def missing(self, error: Exception) -> BrokerError | None:
        """What to raise where this is why a client could not be made: confluent-kafka says its limit, or a SystemError."""
        if not isinstance(error, SystemError) and "OAuth token not set" not in str(error):
            return None
        why = "what it returned was refused: that is the token, and the time.time() when it is over"
        if self._problem is not None:
            why = type(self._problem).__name__
        failure = BrokerError(f"oauth_cb gave no token within 10 s ({why}). No client was made. Begin again once it gives one.")
        failure.__cause__ = self._problem
        return failure


def _check_token(given: object) -> None:
    """Refuse what confluent-kafka cannot read: it tells librdkafka nothing then, which never asks again.

    Its oauth_cb() goes to ``err``, and not to ``fail`` (confluent_kafka.c:2701).
    """
    parts: tuple[Any, ...] = given if isinstance(given, tuple) else ()
    absent: tuple[Any, ...] = (None, None, "", {})
    token, over, principal, extensions, *more = (*parts, *absent[len(parts) :])
    texts = [token, principal, *extensions, *extensions.values()] if isinstance(extensions, dict) else [None]
    if more or not _is_number(over) or not all(map(_is_c_string, texts)):
        raise TypeError(
            "oauth_cb returns a tuple of the token and the time.time() when it is over, or of these, a principal and a dict of "
            "extensions; all but the time are str"
        )


def _is_number(over: object) -> bool:
    try:
        float(over)  # type: ignore[arg-type] # it may be anything
    except (TypeError, ValueError, OverflowError):
        return False
    return isinstance(over, SupportsFloat)  # a str is none for C


def _is_c_string(text: object) -> bool:
    return isinstance(text, str) and "\0" not in text and text.encode(errors="replace").decode() == text


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
        """Make the C client.

        Not in the main thread: an exception out of a signal handler, as Ctrl-C is, would come as a TypeError about the
        configuration there.

        Raises:
            UnsafeConfigError: librdkafka cannot. It has no secret in it.
            BrokerError: ``oauth_cb`` gave no token.
        """
        failure: Exception | None = None
        tokens = _Tokens(config["oauth_cb"]) if "oauth_cb" in config else None
        if tokens is not None:
            config = {**config, "oauth_cb": tokens}
        try:
            self.raw = beside(lambda: client(config), "kafka-guarantees-make")
        except SystemError as error:
            failure = error if tokens is None else tokens.missing(error)
        except (KafkaException, TypeError, ValueError) as error:  # its text may echo a secret
            failure = (tokens and tokens.missing(error)) or creation_failure(error, config)
        if failure is not None:
            raise failure

    def let_go(self) -> None:
        """Destroy the C client on a thread of its own, since that waits for librdkafka's threads (X20)."""
        box = [self.raw]
        self.raw = None
        try:
            _thread.start_new_thread(box.clear, ())  # not start(): left half way in that, this thread would destroy it
        except RuntimeError:  # the interpreter ends (Python 3.12), or there is no thread to be had
            _leak(box[0])


_handles: weakref.WeakSet[Handle] = weakref.WeakSet()


def _leak(raw: object) -> None:
    """Have a C client never destroyed."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(raw))


def _in_child() -> None:
    for handle in _handles:
        handle.closed()  # the parent's business
        if handle.raw is not None:
            _leak(handle.raw)  # to destroy it would wait for threads that are not there, and touch the parent's sockets
            handle.raw = _Forked()


def _at_exit() -> None:
    """Keep what is left from the interpreter's last collection, which would wait for librdkafka's threads, perhaps for ever."""
    for handle in _handles:
        if handle.raw is not None:
            _leak(handle.raw)


os.register_at_fork(after_in_child=_in_child)
atexit.register(_at_exit)
