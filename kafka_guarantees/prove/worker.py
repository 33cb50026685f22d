"""The process that is hurt: one client of the public API that sends, or handles, until it is told to stop.

``python -m kafka_guarantees.prove.worker``, with a ``Job`` in JSON as the first line of its stdin. Three roles:

* a *sender* sends records, each with an id of its own; under exactly-once in transactions, some of which it abandons.
* a *transformer* handles messages and writes ``OUTPUTS`` records for each: consume, transform, produce.
* a *consumer* handles messages of the same topic in a group of its own, and writes nothing.

A worker goes on after the exceptions that it makes itself; any other ends this life, and the next begins.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from tenacity import Retrying, stop_after_attempt, wait_random

import kafka_guarantees
from kafka_guarantees import (
    AtLeastOnce,
    AtMostOnce,
    BrokerError,
    DeliveryError,
    DeliveryUnknown,
    ExactlyOnce,
    FencedError,
    HandlerError,
    TransactionAborted,
)

from .consuming import Consuming
from .evidence import INFO, INVOKE, OK
from .life import CRASHED, Deliberate, Job, Life, Storm
from .sending import SENDING

if TYPE_CHECKING:
    from types import FrameType

CLASSES: dict[str, Any] = {"at-most-once": AtMostOnce, "at-least-once": AtLeastOnce, "exactly-once": ExactlyOnce}
EXPLAINED = (BrokerError, DeliveryError, DeliveryUnknown, FencedError, Storm)  # by brokers that come and go, and by storms
TWICE = Retrying(stop=stop_after_attempt(2), wait=wait_random(max=0.1))
PR_SET_PDEATHSIG = 1
CALLBACK_RAISES = 0.3  # of the calls of a callback that is to raise

log = logging.getLogger(__name__)


def serve(life: Life) -> None:
    """Send or handle until SIGTERM."""
    with _client(life) as client:

        def stop(_number: int, _frame: FrameType | None) -> None:
            life.stopping = True
            client.stop()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGUSR1, _raise)
        work = SENDING[life.job.guarantee](life) if life.job.role == "sender" else Consuming(life)
        while not life.stopping:
            try:
                work.run(client)
            except (Storm, Deliberate, DeliveryError, TransactionAborted):  # the last two: what cannot be written was to be
                continue
            except HandlerError as error:
                if not isinstance(error.__cause__, (Storm, Deliberate)):
                    raise
        _no_more_storms()
    work.closed()


def _client(life: Life) -> Any:
    """The client under test, with callbacks."""

    def callback(*_: object) -> None:
        if life.callbacks_raise and life.dice.random() < CALLBACK_RAISES:
            raise RuntimeError("a callback of the user raises")

    callbacks = {"error_cb": callback, "stats_cb": callback, "statistics.interval.ms": 200}
    start: dict[str, Any] = {} if life.job.role == "sender" else {"start": "earliest"}
    if life.job.guarantee != "at-most-once":
        start["retry"] = life.dice.choice([None, TWICE])
    return CLASSES[life.job.guarantee]({**_config(life.job), **callbacks}, **start)


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise Storm


def _obey(life: Life) -> NoReturn:
    """Do what else is said on stdin, a line of JSON each. Its end means that nobody is there any more."""
    for line in sys.stdin:
        order = json.loads(line)
        life.slow = order.get("slow", life.slow)
        life.slowed += "slow" in order
        life.failing = order.get("failing", life.failing)
        life.callbacks_raise = order.get("callbacks raise", life.callbacks_raise)
    os._exit(1)


class _ToHistory(logging.Handler):
    """Warnings of the library go into the history: whoever looks for the cause of an anomaly needs them in its order."""

    def __init__(self, life: Life) -> None:
        super().__init__(logging.WARNING)
        self._life = life

    def emit(self, record: logging.LogRecord) -> None:
        self._life.history.note("log", INFO, detail=record.getMessage()[:500])


def _owed_answers(job: Job) -> bool:
    """Whether brokers owe this client answers to what it must not send again."""
    return job.guarantee == "at-most-once" and str(job.config.get("acks", 0)) == "1"


def _config(job: Job) -> dict[str, Any]:
    """With what ``_Departures`` needs to hear."""
    debug = ",".join(filter(None, (job.config.get("debug"), "broker")))
    return {**job.config, "debug": debug} if _owed_answers(job) else dict(job.config)


class _Departures(logging.Handler):
    """Notes brokers that leave the cluster's metadata before they have answered: see ``duplicate``."""

    def __init__(self, life: Life) -> None:
        super().__init__(logging.DEBUG)
        self._life = life

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if "Decommissioning this broker" in said and "in state UP" in said and "/bootstrap:" not in said:
            self._life.history.note("broker left", INFO, detail=said[:300])


def _listen(life: Life) -> None:
    """Have what the library and librdkafka say in the history, as far as somebody needs it there."""
    logging.getLogger("kafka_guarantees").addHandler(_ToHistory(life))
    if _owed_answers(life.job):
        librdkafka = logging.getLogger("kafka_guarantees.librdkafka")
        librdkafka.setLevel(logging.DEBUG)
        logging.getLogger().handlers[0].setLevel(logging.INFO)  # else all of it would be in the log of the worker
        librdkafka.addHandler(_Departures(life))


def main() -> None:
    """Serve the job on stdin.

    Exit status 0: in order. CRASHED: an error ended it that a fault explains. Any other: an error that none explains. Both are
    in the history.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(levelname)s %(message)s")
    job = Job(**json.loads(sys.stdin.readline()))
    _die_with_the_driver()
    life = Life(job)
    threading.Thread(target=_obey, args=(life,), daemon=True).start()
    _listen(life)
    life.history.note("life", INVOKE, detail=f"pid {os.getpid()}, {kafka_guarantees.__file__}")
    try:
        serve(life)
    except Exception as error:
        _no_more_storms()
        life.history.note("life", INFO, detail=f"{type(error).__name__}: {error}")
        log.exception("this life is over")
        sys.exit(CRASHED if explained(error, life.slowed) else 1)
    life.history.note("life", OK)


def _die_with_the_driver() -> None:
    """The end of stdin does not reach a process that is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def explained(error: BaseException, slowed: int) -> bool:
    """Whether a fault explains an error: brokers that come and go, storms, and handlings that were made slow so often.

    A storm that hits a call of C comes as SystemError, with the storm as its cause. A handler that takes too long twice in a
    row at the same message ends a run.
    """
    if isinstance(error, SystemError):
        return isinstance(error.__cause__ or error.__context__, Storm)
    too_slow = isinstance(error, HandlerError) and error.__cause__ is None and "for the second time" in str(error)
    return isinstance(error, EXPLAINED) or (too_slow and slowed > 0)


def _no_more_storms() -> None:
    while True:
        try:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        except Storm:
            continue
        return


if __name__ == "__main__":
    main()
