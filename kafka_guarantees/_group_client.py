"""The C consumer of a run: made, asked without waiting for ever, and a member of its group until it leaves.

Rules.
* Calls that wait for brokers are made one after the other, beside the thread of the run. A client that stops walks away from
  one without an answer, and nothing else is asked of the consumer then: it would wait for the end of that (Y01).
* A consumer that has left is not used again. Where a new member takes over, that is another one.
* Leaving takes a bounded time. What is not given back by then the group takes when the session ends.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException

from ._client import Caller, Handle
from ._offsets import membership
from .errors import BrokerError, kafka_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ._assignment import Assignment
    from ._lifecycle import Lifecycle
    from ._settings import Settings

log = logging.getLogger("kafka_guarantees")
T = TypeVar("T")

WITHIN = 1.0  # seconds that a question may take at first, once a broker comes to it
LONGEST = 8.0  # seconds that it may take at all
CLOSING = 10.0  # seconds that leaving the group may take
GIVING_BACK = 1.0  # seconds of these for giving back the partitions, which needs no answer
LET_IN = 0.5  # seconds that a member that is about to be let in waits for it, before it leaves
SERVING = 0.01  # seconds that each poll for that waits
SAFE = "Nothing was committed that was not handled."  # what is to be said of whatever fails here, and in what builds on it


class GroupClient(Handle):
    """The C consumer of a member of a group, and after it that of the one that takes over.

    Args:
        settings: the resolved settings of the guarantee.
        lifecycle: of the client that runs.
        assignment: what the group has assigned to the member.
        config: what the C consumer is made with.

    Attributes:
        kip_848: the group speaks the protocol of KIP-848.
        incremental: partitions are assigned and revoked one by one. Else all of them, each time: the eager protocol.
        joined: or about to. From then on a poll takes messages, and serves rebalances.
        leaving: what is assigned now is revoked in the next moment.
        within: seconds that a question may take at first: by the same connection as a fetch it waits for the end of that.
        longest: seconds that it may take after it got no answer several times. The loop waits meanwhile.
    """

    def __init__(self, settings: Settings, lifecycle: Lifecycle, assignment: Assignment, config: dict[str, Any]) -> None:
        super().__init__()
        self.kip_848 = settings.consumer.get("group.protocol") == "consumer"
        self.incremental = self.kip_848 or settings.consumer.get("partition.assignment.strategy") == "cooperative-sticky"
        self.joined = self.leaving = False
        self.longest = max(WITHIN, min(LONGEST, settings.max_poll_interval / 4))
        self.within = min(WITHIN + settings.fetch_wait, self.longest)
        # KIP-345: such a member keeps its partitions while it restarts, and only close() knows not to leave the group
        self._static = "group.instance.id" in settings.consumer and not self.kip_848
        self._group = settings.group_id
        self._lifecycle = lifecycle
        self._assignment = assignment
        self._config = config
        self._caller = self._new_caller()
        self.make(Consumer, config)

    def _new_caller(self) -> Caller:
        return Caller("kafka-guarantees-consumer", self._lifecycle.hands)

    @property
    def gone_silent(self) -> bool:
        """Whether a call was left without an answer, in a client that stops. Another one would wait for its end (Y01)."""
        return self._caller.left

    def call(self, function: Callable[[], T], doing: str) -> T:
        """What ``function()`` returns, which asks the brokers. Abandoned in a client that stops, where there is no answer."""
        return self._caller.call(function, self._given_up, doing)

    def _given_up(self) -> bool:
        return self._lifecycle.out_of_patience

    def join(self, topics: list[str], callbacks: Mapping[str, Callable[..., None]]) -> None:
        """Subscribe to topics, as a member that hears of rebalances by these callbacks."""
        log.info("joining group %r for %s", self._group, ", ".join(topics))
        self.joined = True
        # beside the main thread for the same reason as in make()
        self.call(lambda: self.raw.subscribe(topics, **callbacks), "subscribing")

    def renew(self) -> None:
        """Make another consumer in place of the one that has left."""
        self._caller.end()
        self._caller = self._new_caller()
        self.leaving = False
        self.make(Consumer, self._config)

    def close(self, why: str = "") -> None:
        """Leave the group, and let the consumer go. Waits for that CLOSING seconds, or STOP_GRACE in a client that stops.

        Args:
            why: for the log.
        """
        try:
            self._be_let_in()
        finally:
            try:
                self.leave(why=why)
            finally:
                self._caller.end()

    def leave(self, level: int = logging.WARNING, *, why: str = "") -> None:
        """The same; a new member takes over. ``level``: of the line that says that this was not heard."""
        if self.raw is None:
            return  # what interrupted a rejoin is not to be hidden
        log.info("leaving group %r%s", self._group, why and f": {why}")
        deadline = time.monotonic() + CLOSING
        self.leaving = True

        def given_up() -> bool:
            return time.monotonic() > deadline or self._given_up()

        try:
            if not self._static:
                self._give_back(given_up)
            self._caller.call(self.raw.close, given_up, "leaving the group")
        except (BrokerError, KafkaException, RuntimeError) as exc:
            if isinstance(exc, KafkaException) and kafka_error(exc).code() == KafkaError._FATAL:
                level = logging.INFO  # what that is has been raised, or was when the poll before told of it
            log.log(level, "%s The group gives the partitions to others when the session ends.", exc)
        finally:
            self.let_go()

    def _give_back(self, given_up: Callable[[], bool]) -> None:
        """Have the partitions revoked by a poll, and the group told, before ``raw.close()``.

        Inside of it librdkafka 2.16.0 may end the group before the revocation is answered, and then never answers:
        confluent-kafka waits for that with the GIL, so that the whole process stands still (seen after max.poll.interval.ms
        had passed). And if it comes while partitions of a classic cooperative member are being let go of, no LeaveGroup is
        sent: the group would not give them to anybody before the session ends (seen at one of 660 stops on a busy machine).
        """
        self._caller.call(self.raw.unsubscribe, given_up, "leaving the group")
        until = time.monotonic() + GIVING_BACK
        with suppress(KafkaException):
            self.raw.poll(0)
            while self._still_a_member() and time.monotonic() < until:
                self.raw.poll(SERVING)

    def _be_let_in(self) -> None:
        """Wait a moment for the answer to the first heartbeat: before it librdkafka 2.16.0 does not say that it leaves.

        The group would have the member all the same, and give it partitions that nobody reads.
        """
        if self.raw is None or not self.kip_848 or not self.joined or self.gone_silent:
            return
        self.leaving, until = True, time.monotonic() + LET_IN
        with suppress(KafkaException, ValueError):  # the latter: metadata of another librdkafka
            while membership(self.raw.consumer_group_metadata()).generation <= 0:
                if time.monotonic() > until or self._given_up():
                    return
                self.raw.poll(SERVING)

    def _still_a_member(self) -> bool:
        """Whether there is something to give back, or a group to leave: librdkafka forgets its member id as it does."""
        classic_cooperative = self.incremental and not self.kip_848
        return bool(self._assignment.owned or (classic_cooperative and self.raw.memberid()))
