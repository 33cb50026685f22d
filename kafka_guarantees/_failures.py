"""What becomes of a message whose handler raised: tried again, set aside in the dead letter topic, or the end of the run.

Rules.
* tenacity decides whether and when; waiting is ours: everything is paused, and the group served (L08, Y15).
* The message is tried again in its place, and nothing of its partition overtakes it (L01).
* A message that the group gives to another member while it waits, or that waits in a client which is to stop, is left: it was
  neither handled nor set aside, and comes again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from ._client import Rarely
from ._dead_letters import TOPIC_NAME, dead_letter
from ._futile import may_pass
from ._offsets import fields, where
from ._pace import PROMPT
from ._printable import text_of
from ._settings import Guarantee
from .errors import HandlerError, of_record
from .records import NotRecords, RecordRefused

if TYPE_CHECKING:
    from confluent_kafka import Message
    from tenacity import RetryCallState

    from ._batch import Batch
    from ._consumer import GroupConsumer
    from ._lifecycle import Lifecycle
    from ._serialization import Reading
    from ._settings import Settings
    from .errors import KafkaGuaranteesError
    from .records import Record

log = logging.getLogger("kafka_guarantees")

T = TypeVar("T")

attempt: ContextVar[int] = ContextVar("kafka_guarantees.attempt", default=1)
"""Which attempt at a message its handler is called for: 1 is the first. For log records, and for handlers that act on it."""

RETRY = Retrying(
    stop=stop_after_attempt(5),
    wait=wait_random_exponential(multiplier=0.2, max=10),  # seconds: 3 in all at the most
    retry=retry_if_exception(may_pass),
)

CLOSELY, WELL = 60.0, 20  # seconds, and portions that end well, after which it is not looked closely any more
SLICE = 0.5  # seconds between two looks whether the message is still ours


class Failed(NamedTuple):
    """What a handler raised.

    Attributes:
        size: how many messages failed together.
        error: what it raised.
    """

    size: int
    error: Exception


# Takes messages, and with an inbox its connection. Returns how many are finished, or what they produce, and what failed next.
Handling = Callable[..., tuple[Any, "Failed | None"]]


def attempted(handle: Handling, messages: Sequence[Message]) -> Any:
    """One attempt at messages, which raises where it fails."""
    done, failed = handle(messages)
    if failed is not None:
        raise failed.error
    return done


class Left(Exception):
    """The message is not tried again here: the group gave it away, or the client is to stop. It comes again."""


class Ends(Left):
    """The same, since the run ends with an error that is not of the message.

    Args:
        error: which.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class GaveUp(NamedTuple):
    """The end of all attempts.

    Attributes:
        error: what the last one raised.
        attempts: how many there were.
        size: how many messages failed together.
    """

    error: Exception
    attempts: int
    size: int = 1

    @property
    def tried(self) -> str:
        """How often, for a sentence, where it was more than once. Without an id it is not at all."""
        return f", in {self.attempts} attempts" if self.attempts > 1 else ""


class Failures:
    """What a client does about messages that fail.

    Args:
        settings: of the client.
        lifecycle: of the client.
        reading: of the client: has the bytes of messages as they came.
        retry: decides about attempts; None: there is only one.
        dead_letter: the topic for what cannot be handled; None: the run ends with it.

    Raises:
        TypeError, ValueError: one of these is not valid.
    """

    def __init__(
        self, settings: Settings, lifecycle: Lifecycle, reading: Reading, *, retry: Retrying | None, dead_letter: str | None
    ) -> None:
        if not (retry is None or isinstance(retry, Retrying)):
            raise TypeError(f"retry is a tenacity.Retrying, or None for one attempt only, not {retry!r}")
        if dead_letter is not None and not (isinstance(dead_letter, str) and TOPIC_NAME.match(dead_letter)):
            raise ValueError(
                f"dead_letter is the name of a topic, 1 to 249 letters, digits, '.', '_' or '-', not {dead_letter!r}"
            )
        self._settings = settings
        self._lifecycle = lifecycle
        self._reading = reading
        self._retry = retry
        self._acked = settings.guarantee is not Guarantee.AT_MOST_ONCE
        self.topic = dead_letter
        room = 1024 * int(str(settings.producer.get("queue.buffering.max.kbytes", 1_048_576)))
        self._largest = min(room, int(str(settings.producer.get("message.max.bytes", 1_000_000))))  # bytes of a record
        self._too_slow: tuple[object, ...] | None = None  # the place of the last message whose handler was
        self.closely = False  # the end of each portion is waited for before the next one: what brokers refuse is in hand
        self.flush_each = False  # each record is waited for before the next one: several may be too large for one request
        self._closely_until = 0.0
        self._well = 0
        self._rarely = Rarely()

    @property
    def topics(self) -> list[str]:
        """What must exist besides the topics that are consumed."""
        return [] if self.topic is None else [self.topic]

    def again(
        self,
        call: Callable[[], T],
        message: Message,
        error: Exception,
        wait: Callable[[float], None],
    ) -> T | GaveUp:
        """Try again what has failed once.

        Args:
            call: one attempt.
            message: the one that failed, or the first of several; is the argument of the call that tenacity shows to callbacks.
            error: of the first attempt.
            wait: waits for so many seconds.

        Returns:
            What ``call`` returned, or why there is no further attempt.

        Raises:
            Left: see the class.
        """
        if self._retry is None or isinstance(error, NotRecords):
            return GaveUp(error, 1)
        tries = _Tries(call, error)
        retry = self._retry.retry
        retrying = self._retry.copy(
            sleep=wait,
            retry=lambda state: state.outcome is not None and state.outcome.failed and retry(state),  # what is done stays done
            reraise=True,
            # for want of one tenacity asks a future, which raises only what is true: an exception with a length of 0 is not
            retry_error_callback=self._retry.retry_error_callback or _nothing,
            before_sleep=self._retry.before_sleep or _log_attempt,
        )
        try:
            result: T = retrying(tries, message)
        except Exception as last:
            if last is not tries.error:
                raise  # of waiting, or of a callback of the user's: the message has not failed for good
            return tries.gave_up()
        if tries.interrupt is not None:
            raise tries.interrupt
        # else the result is that of retry_error_callback, which does not finish a message
        return result if tries.done else tries.gave_up()

    def look_closely(self, failure: KafkaGuaranteesError) -> None:
        """Find the message whose record the brokers refuse: a run begins anew with what is not committed, and goes on so.

        Until it has gone well for a while, and often: it may take any time until that message is in hand again.
        """
        if not self.closely or self._rarely("refused"):
            log.warning("what is not committed is handled again, to find the message of a record that is refused: %s", failure)
        self.closely, self._well = True, 0
        self._closely_until = time.monotonic() + CLOSELY

    def went_well(self) -> None:
        """A portion is committed, while it is looked closely."""
        self._well += 1
        self.closely = self._well < WELL or time.monotonic() < self._closely_until

    def blames(self, failure: KafkaGuaranteesError) -> bool:
        """Whether a record was not written for what it is, and its message can be set aside for that."""
        return self.topic is not None and of_record(failure)

    def narrows(self, failed: GaveUp) -> bool:
        """Whether there is a use in finding out which messages of a batch fail."""
        return self.topic is not None and not isinstance(failed.error, NotRecords)

    def waiting(
        self, consumer: GroupConsumer, batch: Batch, meanwhile: Callable[[], object] = lambda: None
    ) -> Callable[[float], None]:
        """The way to wait with ``batch`` in hand. Raises Left where it is not any more, or the client is to stop."""

        def wait(seconds: float) -> None:
            until = time.monotonic() + seconds
            while True:
                consumer.keep_alive(batch, min(until - time.monotonic(), SLICE))
                if self._lifecycle.stopping or not consumer.still_ours(batch):
                    raise Left
                meanwhile()
                if time.monotonic() >= until:
                    return

        return wait

    def in_hand(self, consumer: GroupConsumer, batch: Batch, meanwhile: Callable[[], object] = lambda: None) -> bool:
        """Whether the next message of ``batch`` may be handled, after all attempts at them together.

        These may have taken any time, so the group is served first, where it should hear of us (C10). To give the rest back
        instead would begin all attempts anew, for each single message.
        """
        try:
            if time.monotonic() - batch.served > min(2 * PROMPT, self._settings.max_poll_interval / 2):
                self.waiting(consumer, batch, meanwhile)(0)
        except Left:
            return False
        return not self._lifecycle.stopping

    def given_away(self, messages: Sequence[Message], batch: Batch, error: Exception | None = None) -> None:
        """Messages were handled, or failed with an ``error``, and the group gave their partitions away meanwhile.

        Raises:
            HandlerError: because the handler was too slow, twice in a row at the same message: it would go on for ever.
        """
        seconds = time.monotonic() - batch.served
        if not self._settings.max_poll_interval < seconds < math.inf:
            return
        message = messages[0]
        place = message.topic(), message.partition(), message.offset()
        if self._too_slow != place:
            self._too_slow = place
            return
        failure = HandlerError(
            f"the handler took {seconds:.1f} s from topic {place[0]!r} partition {place[1]} offset {place[2]} on, for the "
            f"second time; max.poll.interval.ms is {self._settings.max_poll_interval:.1f} s: the group gave it to others. "
            "Nothing of it was committed, so it would be handled again and again. Say keep_alive=True; or make "
            "max.poll.interval.ms longer, or max_batch smaller."
        )
        failure.topic, failure.partition, failure.offset = place
        raise failure from error

    def letter(self, message: Message, failed: GaveUp) -> Record:
        """The dead letter for a message.

        Raises:
            HandlerError: this ends the run. There is no dead letter topic; or the handler returns no records, and all messages
                would be set aside, each after its effect. At most once what was in hand would be lost with that: it goes on.
        """
        if self.topic is None or (self._acked and isinstance(failed.error, NotRecords)):
            if isinstance(failed.error, RecordRefused):
                raise failed.error.failure
            raise handler_error(message, failed) from failed.error
        log.error(
            "%s could not be handled%s (%s), and goes to the dead letter topic %r",
            where(message),
            failed.tried,
            type(failed.error).__name__,
            self.topic,
            exc_info=failed.error,
            extra={**fields(message), "kafka_dead_letter": self.topic},
        )
        return dead_letter(
            self.topic,
            message,
            failed.error,
            group=self._settings.group_id,
            attempts=failed.attempts,
            raw=self._reading.raw(message),
            headers_lost=self._reading.headers_lost(message),
            now=time.time(),
            most=self._largest,
        )


class _Tries:
    """Attempts after the first, as tenacity makes them. Remembers what the last of them raised."""

    def __init__(self, call: Callable[[], Any], error: Exception) -> None:
        self._call = call
        self.error = error
        self._trace = error.__traceback__  # without the way through tenacity, which is nobody's business
        self.made = 0
        self.done = False
        self.interrupt: BaseException | None = None  # Left, or out of a signal handler: not for tenacity to judge

    def __call__(self, _message: Message) -> Any:
        self.made += 1
        if self.made == 1:
            raise self.error  # this attempt was made already
        token = attempt.set(self.made)
        try:
            result = self._call()
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, Left):
                self.error, self._trace = error, error.__traceback__
                raise
            self.interrupt = error  # raised once tenacity has returned
            return None
        finally:
            attempt.reset(token)
        self.done = True
        return result

    def gave_up(self) -> GaveUp:
        """How it ended."""
        return GaveUp(self.error.with_traceback(self._trace), self.made)


def _nothing(_state: RetryCallState) -> None:
    """No result, where there is no further attempt."""


def _log_attempt(state: RetryCallState) -> None:
    message: Message = state.args[0]
    error = None if state.outcome is None else state.outcome.exception()
    log.warning(
        "attempt %d at topic %r partition %s offset %s failed (%s: %s); the next is in %.1f s",
        state.attempt_number,
        message.topic(),
        message.partition(),
        message.offset(),
        type(error).__name__,
        text_of(error),
        state.upcoming_sleep,
        extra=fields(message),
    )


def not_set_aside(error: Exception) -> Exception:
    """Why a dead letter could not be written."""
    return error.failure if isinstance(error, RecordRefused) else error


def handler_error(message: Message, failed: GaveUp) -> HandlerError:
    """The error for a message that could not be handled, and ends the run."""
    error, _, size = failed
    together = "" if size == 1 else f"a batch of {size} messages, the first of which is "
    what = "Correct the handler or the message; or give dead_letter=, a topic where such messages are set aside."
    if isinstance(error, NotRecords):
        what = "Correct the handler. What it does besides is done again for this message, outside of an inbox."
    failure = HandlerError(
        f"the handler failed at {together}{where(message)}{failed.tried} "
        f"({type(error).__name__}: {text_of(error)}). Nothing at or after that offset was committed, so the next run begins "
        f"there again. {what}"
    )
    failure.topic, failure.partition, failure.offset = message.topic(), message.partition(), message.offset()
    return failure
