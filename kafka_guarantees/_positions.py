"""Where librdkafka fetches each partition from: put there at first, and put right after whatever was unusual.

Rules.
* A position is what ``Places`` says, which asks each time; never a memory of ours, never ``position()``.
* One that is not known now waits, and is asked for again. It holds up no other partition: at most now and then, for a moment;
  but where a commit may still be on its way, after which another member takes over, that waits for it (M02).
* A start that is decided is committed by whoever calls this, before it is fetched from (M05).
"""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from ._client import Rarely
from ._group_client import SAFE, WITHIN
from ._offsets import named, with_epoch
from ._places import Outdated
from .errors import BrokerError, StoreUnavailable, broker_failure, describe, kafka_error, stops

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from confluent_kafka import Message

    from ._assignment import Assignment
    from ._group_client import GroupClient
    from ._offsets import Partition
    from ._places import Ask, Places
    from ._settings import Settings

    Commit = Callable[[list[TopicPartition]], None]

log = logging.getLogger("kafka_guarantees")
T = TypeVar("T")

PATIENT = 5  # how often is asked while there are messages of other partitions in hand, until these wait for it
UNKNOWN = 30.0  # seconds after which it is a warning that nobody knows where to go on
REFUSED = 0.05  # seconds until is asked again where nothing else waits: an answer may come at once
LEADERLESS = 5.0  # seconds until is asked again for what could not be told


class Positions:
    """Of a member, and of the one that takes over.

    Args:
        settings: the resolved settings of the guarantee.
        client: has the C consumer.
        assignment: what that was told.
        places: where the group goes on.

    Attributes:
        outdated_since: when it was that the group first said less than was committed, and has not said more since.
    """

    def __init__(self, settings: Settings, client: GroupClient, assignment: Assignment, places: Places) -> None:
        self.outdated_since = math.inf
        self._settings = settings
        self._client = client
        self._assignment = assignment
        self._places = places
        self._within = client.within
        self._again_at = 0.0  # not asked before, where the last answer was that it is not known
        self._brief = 0  # how often was asked while other messages waited: each PATIENT-th question may take longer
        self._rarely = Rarely()
        self._unknown_since = math.inf

    def find(self, commit: Commit, messages: Iterable[Message]) -> set[Partition]:
        """Put right what is unplaced, and begin to fetch what is due.

        Returns the partitions that go on elsewhere, now or once the brokers answer: what was fetched of them comes again.

        Args:
            commit: commits where partitions begin.
            messages: in hand. Those of other partitions do not wait for long.

        Raises:
            OffsetsLost, AuthorizationError: see ``Places``.
        """
        moved = set(self._assignment.unplaced)
        if self._too_early(messages):
            return moved
        busy = any((message.topic(), message.partition()) not in moved for message in messages)
        limit = math.inf
        if busy:  # they wait for a long answer now and then only, and never so long that nobody knows whose they are (M03)
            self._brief += 1
            limit = max(WITHIN, self._settings.session_timeout / 4)
            if self._brief % PATIENT:
                limit = min(limit, self._client.within)
        ask: Ask = partial(self.asked, limit=limit)
        try:
            if due := self._assignment.due(time.monotonic()):
                moved |= self._fetch_waiting(due, ask, commit)
            misplaced = self._assignment.misplaced
            places = self._places.of(misplaced, ask, commit)
            for place in places:
                self._client.raw.seek(place)
            if unknown := self._without_place(misplaced, places):
                self.rest(unknown, LEADERLESS)
            self._within = self._client.within
            self._assignment.put_right(moved)
        except KafkaException as exc:
            self._not_now(exc)
            self._again_at = time.monotonic() + REFUSED
        except (StoreUnavailable, BrokerError) as exc:
            log.warning("where to go on is not known yet: %s", exc)
        else:
            self._unknown_since = self.outdated_since = math.inf
        return moved

    def _too_early(self, messages: Iterable[Message]) -> bool:
        """Whether not to ask again yet: others do not wait for it. Where there are none, that is waited for."""
        early = self._again_at - time.monotonic()
        if early > 0 and not messages:
            time.sleep(early)
        return early > 0 and bool(messages)

    def _not_now(self, exc: KafkaException) -> None:
        """The brokers do not say where to go on. Raises where they never will."""
        error = kafka_error(exc)
        if stops(error):
            names = {"topic": {topic for topic, _ in self._assignment.owned}, "group": self._settings.group_id}
            raise broker_failure(error, "asking for offsets, or committing where to begin,", SAFE, **names) from exc
        if isinstance(exc, Outdated):
            self.outdated_since = min(self.outdated_since, time.monotonic())
        self._unknown(describe(error))

    def _unknown(self, why: str) -> None:
        """Mostly it passes in a moment. What does not, as an offset in a transaction that nobody ends, is to be heard of."""
        now = time.monotonic()
        self._unknown_since = min(now, self._unknown_since)
        lasts = now - self._unknown_since > UNKNOWN and self._rarely(why)
        (log.warning if lasts else log.info)("where to go on is not known yet: %s", why)

    def _fetch_waiting(self, due: set[Partition], ask: Ask, commit: Commit) -> set[Partition]:
        """Begin to fetch those of which it is known where. Returns what goes on elsewhere by that."""
        places = self._places.of(due, ask, commit)
        unknown = self._without_place(due, places)
        others: set[Partition] = set()
        if places and self._client.incremental:
            self._client.raw.incremental_assign(places)
        elif places:
            others = self._assignment.fetched  # the eager protocol knows only the whole
            places += self._places.of(others, ask, commit)
            unknown = self._without_place(due | others, places)
            self._client.raw.assign(places)
            self._assignment.put_right(others | due)
        self._assignment.begin(due, unknown, time.monotonic() + LEADERLESS)
        self._assignment.unplace(with_epoch(places))
        return others

    def _without_place(self, asked: set[Partition], places: Iterable[TopicPartition]) -> set[Partition]:
        """Those of which it is not known where to go on; they must not hold up the others."""
        unknown = asked - {(place.topic, place.partition) for place in places}
        if unknown and self._rarely(named(unknown)):
            log.warning("%s: where to go on is not known: it has no leader, or was deleted. Others go on.", named(unknown))
        return unknown

    def assigned(self, partitions: set[Partition]) -> list[TopicPartition]:
        """Where the group has committed these partitions, in the callback that assigns them.

        Those without a committed offset wait for the next fetch: their start is committed, by a call of another thread, which
        would wait for the end of this callback. So do those of topics of which something is not known yet: see _InCallback.
        """
        try:
            committed = self._places.committed(partitions, self._asked_in_callback)
        except KafkaException as exc:
            log.info("where to begin is not known yet: %s", describe(kafka_error(exc)))
            committed = []
        except (StoreUnavailable, BrokerError) as exc:
            log.warning("where to begin is not known yet: %s", exc)
            committed = []
        placed = [place for place in committed if place.offset >= 0]
        self._assignment.wait(partitions - {(place.topic, place.partition) for place in placed})
        return placed

    # -- rest ---------------------------------------------------------------------------------------------------------

    def rest(self, partitions: Collection[Partition], seconds: float) -> None:
        """Fetch nothing of these for some time, and then go on where the group is."""
        self._client.raw.pause([TopicPartition(*partition) for partition in partitions])
        self._assignment.rest(partitions, time.monotonic() + seconds)

    def wake(self) -> None:
        """Go on with the partitions whose rest is over: they are unplaced from now on."""
        if due := self._assignment.rested(time.monotonic()):
            self._client.raw.resume([TopicPartition(*partition) for partition in due])
            self._assignment.wake(due)

    # -- questions ----------------------------------------------------------------------------------------------------

    def asked(self, question: Callable[[Any, float], T], *, limit: float | None = None) -> T:
        """What the brokers answer. They have more time while they do not: they may be far away, or have much to do.

        Args:
            question: see ``Ask``.
            limit: of these seconds, where it is not that of a first question.
        """
        within = min(self._within, self._client.within if limit is None else limit)
        try:
            return self._client.call(lambda: question(self._client.raw, within), "asking where to go on")
        except KafkaException:
            if within == self._within:
                self._within = min(2 * within, self._client.longest)
            raise

    def _asked_in_callback(self, question: Callable[[Any, float], T]) -> T:
        """The same where no other thread may be waited for. Whoever gets no answer asks again with the next fetch."""
        return question(_InCallback(self._client.raw), WITHIN)


class _InCallback:
    """What of a C consumer may be asked in one of its callbacks.

    With list_topics() confluent-kafka forgets the thread of the poll that the callback came in (CallState_end in its
    confluent_kafka.c:3535): the next one of that poll, as of statistics or a log line, would abort the process. These do not.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        if name not in {"committed", "offsets_for_times"}:
            raise KafkaException(KafkaError(KafkaError._IN_PROGRESS, f"{name}() is not called in a callback"))
        return getattr(self._raw, name)
