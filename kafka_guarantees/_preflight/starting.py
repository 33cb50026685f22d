"""The preflight of a client: asked for by its user, or looked at when a run starts."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

from .asking import preflight
from .checks import VERIFICATION

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from .._lifecycle import Lifecycle
    from .._settings import Settings
    from .report import PreflightReport

log = logging.getLogger("kafka_guarantees")

AtStart = Literal["raise", "warn", "off"]

AT_START = 2.0  # seconds that the start of a run waits for brokers: without them nothing can start anyway
PATIENCE = 30.0  # seconds that it waits where findings are to end it: they may be starting
_LOGGED: set[str] = set()  # by this process: what is wrong with a topic is said once


class Preflight:
    """What one client asks the brokers before it relies on them.

    Args:
        settings: of the client.
        lifecycle: of the client.
        at_start: what to do about findings when a run starts.
        dead_letter: topic.
        retention: of the deduplication store or inbox.

    Attributes:
        late_records: the brokers take records into a transaction that is over, as those before Kafka 3.6 do. Known once a
            run has started.

    Raises:
        ValueError: ``at_start`` is something else.
    """

    def __init__(
        self,
        settings: Settings,
        lifecycle: Lifecycle,
        at_start: AtStart,
        *,
        dead_letter: str | None,
        retention: timedelta | None = None,
    ) -> None:
        if at_start not in get_args(AtStart):
            raise ValueError(f"preflight is one of {', '.join(map(repr, get_args(AtStart)))}, not {at_start!r}")
        self._ask = partial(preflight, settings, dead_letter=dead_letter, retention=retention)
        self._lifecycle = lifecycle
        self._at_start = at_start
        self._looked: set[frozenset[str]] = set()
        self.late_records = False

    def report(self, topics: Sequence[str]) -> PreflightReport:
        """Ask now. See ``AtLeastOnce.preflight``."""
        self._lifecycle.check()
        return self._ask(topics)

    def start(self, topics: Sequence[str]) -> None:
        """Look at the topics of a run, the first time that they are run.

        Raises:
            UnsafeConfigError: the brokers would break the guarantee, and this is to be an error. Nothing was consumed.
        """
        if self._at_start == "off" or frozenset(topics) in self._looked:
            return
        ask = partial(self._ask, topics, timeout=AT_START, give_up=lambda: self._lifecycle.stopping)
        report = ask()
        until = time.monotonic() + (PATIENCE if self._at_start == "raise" else 0.0)
        while report.cluster_id is None and time.monotonic() < until and not self._lifecycle.stopping:
            report = ask()
        if report.cluster_id is None and not self._lifecycle.stopping:
            log.warning("preflight: nothing was looked at, since the brokers gave no answer: %s", report.findings[0].value)
        if self._lifecycle.stopping:
            return  # the run consumes nothing
        if self._at_start == "raise":
            report.raise_if_unsafe()
        if report.cluster_id is not None:
            self._looked.add(frozenset(topics))
            self.late_records = any(one.check == VERIFICATION for one in report.findings)
        for one in report.findings:
            text = f"preflight: {one.level}: {one}"
            told = ("unsafe", "warning", "unknown") if self._at_start == "raise" else ("unsafe", "warning")
            if one.level not in told:
                log.debug("%s", text)
            elif text not in _LOGGED:
                _LOGGED.add(text)
                log.warning("%s", text)
