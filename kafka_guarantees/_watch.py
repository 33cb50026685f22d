"""Reads from librdkafka's log and errors whether a request of a transaction may have gone astray (X01 b).

Rules.
* error_cb alone does not hear of ordinary disconnects: log.connection.close and log_level are preset for this.
* What cannot be read counts as a disturbance.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

    from confluent_kafka import KafkaError

    from ._transaction_state import TransactionState

# A connection that failed while it was up may still carry a request of ours; one that never came up cannot, nor can that to an
# address of bootstrap.servers, which is let go as soon as the brokers have said who they are (debug=broker tells of it). One
# that logs in may have been up: it does so again (KIP-368). And what is said of one behind its handshake, librdkafka leaves out
# where it would say it again of one that is up.
_HARMLESS = re.compile(
    r"in state (INIT|DOWN|TRY_CONNECT|CONNECT|SSL_HANDSHAKE)\b"
    r"|/bootstrap: (Decommissioning|.*in state (APIVERSION_QUERY|AUTH_))"
)
_REFUSED = re.compile(r'ADDPARTS .*Failed to add partition "([^"]+)" .*Topic authorization failed')
_DISTURBED = re.compile(r"\b(FAIL|REQTMOUT|ERROR|DISCONNECT)\b|[Dd]isconnected|closed|timed out")


class Watch:
    """The logger and the error_cb of one C producer: both pass on what they hear.

    librdkafka leaves out a line that is identical to the last one of the same broker within 30 s, whatever the state of the
    connection was: the first one must have made the producer dirty.

    Args:
        state: of the producer. It is disturbed.
        logger: of the user.
        error_cb: likewise, in a form that never raises.

    Attributes:
        refused: a topic that may not be written to: the error of the transaction does not name it.
    """

    def __init__(self, state: TransactionState, logger: logging.Logger, error_cb: Callable[[KafkaError], None]) -> None:
        self._state = state
        self._logger = logger
        self._error_cb = error_cb
        self.refused: str | None = None

    def log(self, level: int, text: str, *args: str) -> None:
        """Take one line, as (facility, client, line). Never raises: it is called from C."""
        try:
            self._read(f"{args[0]} {args[-1]}")
            self._logger.log(level, text, *args)
        except BaseException:  # noqa: BLE001 - also an exception out of a signal handler
            self._state.disturb("a log line that could not be read")

    def error(self, error: KafkaError) -> None:
        """Take one error. Never raises either."""
        try:
            self._read(f"ERROR {error.str()}")
            self._error_cb(error)
        except BaseException:  # noqa: BLE001 - as above
            self._state.disturb("an error that could not be read")

    def _read(self, line: str) -> None:
        if refused := _REFUSED.search(line):
            self.refused = refused[1]
        if _DISTURBED.search(line) and not _HARMLESS.search(line):
            self._state.disturb(line)
