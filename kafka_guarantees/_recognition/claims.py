"""Which messages of a batch are handled, left out, or wait: what stands between a store and the at-least-once loop.

    ids -> one claim for the batch -> NEW, TAKEN_OVER  handle
                                      DUPLICATE        leave out, and count as finished
                                      IN_PROGRESS      give back with everything after it in its partition (D09)
                                      MISMATCH         stop before it, or set it aside (D08)

Rules.
* Of an id that comes twice in a batch the first is handled. The second is finished when the first is, so it stands behind it.
* Every claim of a batch is completed or released before the next batch; what a crash leaves is taken over by its position.
* One token for each run: what an earlier run, or another member, still believes to own is fenced.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from .._collector import collector_rests
from ..dedup.contract import Item, Outcome
from ..errors import AuthorizationError, StoreUnavailable
from .message_ids import Problem, place, reused_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from confluent_kafka import Message

    from .._offsets import Partition
    from ..dedup.contract import DedupStore, Inbox, Takeover
    from ..errors import MessageIdMissing
    from .message_ids import MessageIds

log = logging.getLogger("kafka_guarantees")

OnStoreError = Literal["wait", "process"]

LEASE_MARGIN = 60.0  # seconds that a claim lasts beyond max.poll.interval.ms: by then its owner has lost the partition
TIDY_EVERY = 60.0  # seconds between two removals of expired ids
TIDY_AT_ONCE = 10_000  # ids
_NO_STORE = (StoreUnavailable, AuthorizationError)  # of a call that need not succeed: the next claim raises it again
_FIRST_REST, _LONGEST_REST = 0.1, 5.0  # seconds until an id that somebody handles is claimed again
_ITEM: Callable[[tuple[bytes | None, bytes, bytes]], Item] = partial(tuple.__new__, Item)  # half the time of Item(...)


class Work:
    """Messages of a batch that are in hand, and which of them are to be handled; the others are left out.

    Attributes:
        messages: in their order.
        fresh: those to handle, in the same order.
        problem: the message after these, if it must not be handled, and why.
    """

    __slots__ = ("_places", "fresh", "messages", "problem")

    def __init__(
        self,
        messages: Sequence[Message],
        places: Sequence[int] | None = None,
        problem: Problem | None = None,
    ) -> None:
        self.messages = messages
        if places is not None and len(places) == len(messages):
            places = None
        self._places = places  # of fresh, in messages; None: all are fresh
        self.problem = problem
        self.fresh = messages if places is None else [messages[place] for place in places]

    def finished(self, handled: int) -> Sequence[Message]:
        """The messages before the first that is not handled, when ``handled`` of ``fresh`` are."""
        return self.messages[: self._end(handled)]

    def rest(self, handled: int) -> Work:
        """What is left, when ``handled`` of ``fresh`` are handled."""
        end = self._end(handled)
        places = None if self._places is None else [place - end for place in self._places[handled:]]
        return Work(self.messages[end:], places, self.problem)

    def first(self) -> Work:
        """What is in hand up to the first that is to be handled, without repeats behind it."""
        if self._places is None:
            return Work(self.messages[:1])
        return Work(self.messages[: self._places[0] + 1], self._places[:1])

    def _end(self, handled: int) -> int:
        if self._places is None:
            return handled
        return self._places[handled] if handled < len(self._places) else len(self.messages)


class Sorted(NamedTuple):
    """What a batch comes to, by indexes into it.

    Attributes:
        kept: in hand.
        fresh: of these, to be handled.
        held: to be given back, since an id is being handled elsewhere.
        stop: the first that must not be handled at all; None if there is none.
    """

    kept: Sequence[int]
    fresh: Sequence[int]
    held: Sequence[int]
    stop: int | None


def sort_out(partitions: Iterable[Partition], items: Sequence[Item | None], outcomes: Mapping[bytes, Outcome]) -> Sorted:
    """Decide what becomes of each message of a batch. Pure.

    Args:
        partitions: of each message.
        items: of each message; None where it has no id and is handled without.
        outcomes: of the claims, by key.
    """
    if len(outcomes) == len(items):  # the usual batches: no id is missing, none comes twice
        found, everything = list(outcomes.values()), range(len(items))
        if found.count(Outcome.NEW) == len(found):
            return Sorted(everything, everything, (), None)
        if Outcome.IN_PROGRESS not in found and Outcome.MISMATCH not in found:
            new = [index for index, item in enumerate(items) if item and outcomes[item.key] is not Outcome.DUPLICATE]
            return Sorted(everything, new, (), None)
    kept: list[int] = []
    fresh: list[int] = []
    held: list[int] = []
    closed: set[Partition] = set()  # an earlier message of these is given back: the offset must not pass it
    waiting: set[bytes] = set()
    before: dict[bytes, bytes] = {}  # fingerprints of the ids in hand
    for index, (partition, item) in enumerate(zip(partitions, items, strict=True)):
        outcome = item and outcomes[item.key]
        if partition in closed or (item and (item.key in waiting or outcome is Outcome.IN_PROGRESS)):
            closed.add(partition)
            if item:
                waiting.add(item.key)
            held.append(index)
            continue
        if item:
            earlier = before.get(item.key)
            if outcome is Outcome.MISMATCH or (earlier and item.fingerprint and earlier != item.fingerprint):
                return Sorted(kept, fresh, held, index)
            before.setdefault(item.key, item.fingerprint)
        if item is None or (earlier is None and outcome is not Outcome.DUPLICATE):
            fresh.append(index)
        kept.append(index)
    return Sorted(kept, fresh, held, None)


class Claims:
    """The claims of one run.

    Args:
        store: where they are.
        ids: of the messages.
        scope: whose ids these are.
        max_poll_interval: seconds.
        takeover: whether a record that comes again is taken over at once, or when the lease is over.
        counts: to count in.
    """

    def __init__(
        self,
        store: DedupStore,
        ids: MessageIds,
        scope: str,
        *,
        max_poll_interval: float,
        takeover: Takeover,
        counts: Counter[str],
    ) -> None:
        self._store = store
        self._ids = ids
        self._scope = scope
        self._lease = max_poll_interval + LEASE_MARGIN
        self._takeover: Takeover = takeover
        self._counts = counts
        self._token = os.urandom(16)
        self._pid = os.getpid()
        self._open: list[Item | None] = []  # of what is fresh and not finished, in its order
        self._owed: list[Item] = []  # is finished, and not completed yet
        self._repeated: set[bytes] = set()  # ids that come more than once in the batch
        self._renew_at = 0.0
        self._rests: Counter[Partition] = Counter()  # how often a partition was given back in a row
        self._tidy_at = time.monotonic() + TIDY_EVERY

    def claim(self, messages: Sequence[Message]) -> tuple[Work, Sequence[Message]]:
        """Claim a batch, in one call of the store if nobody else is at its ids.

        Returns:
            What is in hand, and what must be given back for a while.

        Raises:
            StoreUnavailable: whether anything was claimed is unknown. The same call may be made again.
        """
        if self._owed:  # repeats of these would be handled again, or wait until their leases are over
            self._complete(self._owed)
            self._owed = []
        items, missing = self._items(messages)
        known = [item for item in items if item is not None]
        first = {item.key: item for item in reversed(known)}
        answers = self._ask(first)
        others = []
        self._repeated = set()
        if len(first) < len(known):
            self._repeated = {key for key, count in Counter(item.key for item in known).items() if count > 1}
            others = [item for item in known if answers[item.key] is Outcome.IN_PROGRESS and item is not first[item.key]]
        while others:  # a worker that died may have claimed an id at a place of it that comes later in this batch
            again = {item.key: item for item in reversed(others)}
            answers.update(self._ask(again))
            others = [i for i in others if answers[i.key] is Outcome.IN_PROGRESS and i is not again[i.key]]
        partitions = (place(message)[:2] for message in messages[: len(items)])
        sorted_out = sort_out(partitions, items, answers)
        self._open = [items[index] for index in sorted_out.fresh]
        self._renew_at = time.monotonic() + self._lease / 3
        if len(sorted_out.kept) < len(items):
            self._let_go(list(first.values()), answers)
        self._count(sorted_out, answers)
        problem = None if missing is None else Problem(messages[len(items)], missing)
        if sorted_out.stop is not None:
            problem = Problem(messages[sorted_out.stop], reused_id(messages[sorted_out.stop]))
        if len(sorted_out.fresh) == len(items):
            return Work(messages[: len(items)], None, problem), ()
        if len(sorted_out.kept) == len(items):
            return Work(messages[: len(items)], sorted_out.fresh, problem), ()
        kept = [messages[index] for index in sorted_out.kept]
        where = {index: number for number, index in enumerate(sorted_out.kept)}
        held = [messages[index] for index in sorted_out.held]
        if problem is not None and place(problem.message)[:2] in {place(message)[:2] for message in held}:
            # its turn has not come: set aside now, its offset would pass those that are given back
            held, problem = [*held, *messages[len(items) :]], None
        return Work(kept, [where[index] for index in sorted_out.fresh], problem), held

    def _ask(self, items: Mapping[bytes, Item]) -> dict[bytes, Outcome]:
        """Claim items by their keys, in one call."""
        asked = list(items.values())
        outcomes = self._store.claim(self._scope, asked, token=self._token, lease=self._lease, takeover=self._takeover)
        if len(outcomes) == len(asked) == outcomes.count(Outcome.NEW):
            return dict.fromkeys(items, Outcome.NEW)
        allowed = {outcome: Outcome(outcome) for outcome in set(outcomes)}
        return {key: allowed[outcome] for key, outcome in zip(items, outcomes, strict=True)}

    def _items(self, messages: Sequence[Message]) -> tuple[list[Item | None], MessageIdMissing | None]:
        """The items of the messages before the first that has no id and must have one."""
        with collector_rests:
            keys, missing = self._ids.keys(messages)
            messages = messages[: len(keys)]
            rows = zip(keys, self._ids.places_of(messages), self._ids.fingerprints_of(messages), strict=False)
            items: list[Item | None] = list(map(_ITEM, rows))
        if None in keys:
            items = [None if key is None else item for key, item in zip(keys, items, strict=True)]
        return items, missing

    def _let_go(self, asked: Sequence[Item], answers: Mapping[bytes, Outcome]) -> None:
        """Release what was claimed and is not in hand: it stands behind a message that is given back."""
        in_hand = {item.key for item in self._open if item is not None}
        mine = (Outcome.NEW, Outcome.TAKEN_OVER)
        unwanted = [item for item in asked if answers[item.key] in mine and item.key not in in_hand]
        if unwanted:
            self._store.release(self._scope, unwanted, token=self._token)

    def _count(self, sorted_out: Sorted, answers: Mapping[bytes, Outcome]) -> None:
        self._counts["duplicate"] += len(sorted_out.kept) - len(sorted_out.fresh)
        if Outcome.TAKEN_OVER in answers.values():
            in_hand = [answers[item.key] for item in self._open if item is not None]
            self._counts["taken over"] += in_hand.count(Outcome.TAKEN_OVER)
        self._counts["waited for"] += len(sorted_out.held)
        self._counts["unprotected"] += self._open.count(None)

    def rest_for(self, held: Sequence[Message]) -> float:
        """Seconds until these may be claimed again: longer each time, until something of their partitions is finished."""
        self._rests.update({place(message)[:2] for message in held})
        times = max(self._rests[place(message)[:2]] for message in held)
        return float(min(_LONGEST_REST, _FIRST_REST * 2 ** min(times - 1, 10)))

    def complete(self, handled: int, finished: Sequence[Message]) -> None:
        """Complete the ids of the next ``handled`` fresh messages.

        Raises:
            StoreUnavailable: they are handled, and perhaps not completed. The same call may be made again.
        """
        items = [item for item in self._open[:handled] if item is not None]
        if items:
            self._complete(items)
        self._open = self._open[handled:]
        for message in finished if self._rests else ():
            self._rests.pop(place(message)[:2], None)

    def _complete(self, items: list[Item]) -> None:
        completed = self._store.complete(self._scope, items, token=self._token)
        if not all(completed):
            lost = [item for item, done in zip(items, completed, strict=True) if not done]
            self._recover(lost)

    def _recover(self, lost: list[Item]) -> None:
        """Complete ids that another member has taken over, or has let go since, or that the store has forgotten.

        They are handled, whoever has them now.
        """
        outcomes = self._store.claim(self._scope, lost, token=self._token, lease=self._lease, takeover="position")
        mine = [item for item, outcome in zip(lost, outcomes, strict=True) if outcome in (Outcome.NEW, Outcome.TAKEN_OVER)]
        self._store.complete(self._scope, mine, token=self._token)
        self._counts["lost"] += len(lost)
        log.warning(
            "%d ids were taken over by another member, or forgotten by the store, while they were handled: "
            "perhaps handled twice",
            len(lost),
        )

    def unprotected(self, messages: Sequence[Message]) -> Work:
        """A batch that is handled without its store."""
        self._open = [None] * len(messages)
        self._counts["unprotected"] += len(messages)
        return Work(messages)

    def renew(self) -> None:
        """Have the leases of what is in hand begin anew, before they are over: a handler or a retry takes its time.

        Not of what a new owner of the partition has taken over: that is claimed in its name, whatever ``takeover`` says (D04).
        """
        if time.monotonic() < self._renew_at:
            return
        self._renew_at = time.monotonic() + self._lease / 3
        items = [item for item in self._open if item is not None]
        try:
            self._store.claim(self._scope, items, token=self._token, lease=self._lease, takeover="lease")
        except _NO_STORE as error:
            log.info("claims were not renewed: %s", error)

    def set_aside(self) -> bool:
        """The next fresh message goes to the dead letter topic: its id is released, so that it can be sent again.

        Returns:
            Whether it has been sent again, in this batch.
        """
        first, self._open[0] = self._open[0], None
        if first is None:
            return False
        try:
            self._store.release(self._scope, [first], token=self._token)
        except _NO_STORE as error:
            log.info("a claim is left until its lease is over: %s", error)
        return first.key in self._repeated

    def skip(self, handled: int, *, finished: bool) -> None:
        """Go on behind the next ``handled`` fresh messages, whose ids could not be completed.

        Args:
            handled: how many they are.
            finished: they do not come again. So they count as unprotected, and their ids are completed before the next claim.
        """
        if finished:
            items = [item for item in self._open[:handled] if item is not None]
            self._owed += items
            self._counts["unprotected"] += len(items)
        self._open = self._open[handled:]

    def release(self) -> None:
        """Release what is claimed and not completed, so that nobody has to wait for it. Does nothing if the store is down."""
        if os.getpid() != self._pid:
            return  # a child that leaves the handler: its parent is still about them (Y04)
        items = [item for item in self._open if item is not None]
        self._open = []
        if items:
            try:
                self._store.release(self._scope, items, token=self._token)
            except _NO_STORE as error:
                log.info("claims are left to be taken over: %s", error)

    def tidy(self) -> None:
        """Remove expired ids, a few at a time."""
        self._tidy_at = tidy(self._store, self._tidy_at)


def tidy(store: DedupStore | Inbox[object], due: float) -> float:
    """Remove some of what is expired, if it is time to. Returns when to do so again."""
    if time.monotonic() < due:
        return due
    try:
        removed = store.purge(limit=TIDY_AT_ONCE)
    except _NO_STORE as error:
        log.info("expired ids were not removed: %s", error)
        removed = 0
    return time.monotonic() + (0 if removed >= TIDY_AT_ONCE else TIDY_EVERY)
