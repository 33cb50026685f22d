"""Calls of a store or an inbox that does not answer, made again until it does, by a member of a group that stays one (D16)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from tenacity import Retrying, retry_if_exception_type, wait_random_exponential

if TYPE_CHECKING:
    from collections.abc import Callable

    from tenacity import RetryCallState

    from .._batch import Batch
    from .._consumer import GroupConsumer

log = logging.getLogger("kafka_guarantees")

T = TypeVar("T")

LONGEST = 5.0  # seconds between two calls


def patiently(
    call: Callable[[], T], consumer: GroupConsumer, batch: Batch, give_up: Callable[[], bool], *unanswered: type[Exception]
) -> T:
    """Make a call until it is answered, with a batch in hand: until it raises none of ``unanswered``.

    Raises:
        Exception: one of these, and ``give_up()`` says so; and any other.
    """
    return Retrying(
        retry=retry_if_exception_type(unanswered),
        wait=wait_random_exponential(multiplier=0.1, max=LONGEST),
        stop=lambda _state: give_up(),
        sleep=lambda seconds: consumer.keep_alive(batch, seconds),
        before_sleep=_log_call,
        reraise=True,
    )(call)


def _log_call(state: RetryCallState) -> None:
    failure = None if state.outcome is None else state.outcome.exception()
    number, pause = state.attempt_number, state.upcoming_sleep
    log.warning("%s It is asked again in %.1f s; nothing is handled meanwhile (call %d)", failure, pause, number)
