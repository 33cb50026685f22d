"""The partitions that a member owns, and what keeps each of them from being read on. Pure: sets and clocks, no I/O.

Rules.
* What a partition is, and what ends it:

      waiting     owned, and not fetched: nobody knows from where     until that is known; it is asked when it is ``due``
      fetched     owned, and not waiting
      unplaced    fetched, but perhaps from the wrong place           before the next message: ``put_right``
      resting     fetched, but paused: it was given back              until its time has come; then it is unplaced

* Whoever changes something here tells librdkafka the same; the time is an argument.
* What is known of a partition ends when it is taken away, and where it ends is not known any more once it goes on elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from ._offsets import Partition


class Assignment:
    """What the group has assigned to a member, and later to the one that takes over.

    Attributes:
        rebalances: how many there have been. What was taken before the last one may be of an assignment that is over (C03).
        owned: partitions.
        waiting: see above.
        unplaced: see above. It may have some that are not owned any more.
        given_away: since the batch in hand was fetched.
        assigned: whether the member was assigned anything since it joined, if only nothing.
    """

    def __init__(self) -> None:
        self.rebalances = 0
        self.owned: set[Partition] = set()
        self.waiting: set[Partition] = set()
        self.unplaced: set[Partition] = set()
        self.given_away: set[Partition] = set()
        self.assigned = False
        self._not_before: dict[Partition, float] = {}  # when some of those that wait are asked for again
        self._resting: dict[Partition, float] = {}  # until when
        self._ends: dict[Partition, int] = {}  # where librdkafka saw the end of a partition, when it came to it
        self.reached: dict[Partition, int] = {}  # up to where messages were handed out, until it goes on elsewhere
        self._rejoining_until = 0.0  # when there should be partitions again, after all were given away for a moment

    # -- rebalances ---------------------------------------------------------------------------------------------------

    def rebalance(self) -> None:
        """There is one, whatever comes of it."""
        self.rebalances += 1

    def assign(self, partitions: AbstractSet[Partition]) -> None:
        """These are owned from now on, and fetched, unless ``wait`` says otherwise."""
        self.owned |= partitions
        self.assigned = True
        self._rejoining_until = 0.0

    def revoke(self, gone: AbstractSet[Partition], rejoining_until: float | None = None) -> None:
        """These are somebody else's, perhaps only for a moment.

        Args:
            gone: partitions.
            rejoining_until: when there should be others, where the member joins the group again.
        """
        self.owned -= gone
        self.given_away |= gone
        if rejoining_until is not None:
            self._rejoining_until = rejoining_until
        self.waiting -= gone
        self.unplaced -= gone
        for partition in gone:
            self._not_before.pop(partition, None)
            self._resting.pop(partition, None)
        self._forget_ends(gone)

    def clear(self) -> None:
        """Another member takes over, which owns what it is assigned."""
        self.rebalance()
        self.assigned = False
        for partitions in (
            self.owned,
            self.waiting,
            self._not_before,
            self._resting,
            self.unplaced,
            self._ends,
            self.reached,
        ):
            partitions.clear()

    # -- where they go on ---------------------------------------------------------------------------------------------

    @property
    def fetched(self) -> set[Partition]:
        """Those that librdkafka was told to fetch."""
        return self.owned - self.waiting

    @property
    def misplaced(self) -> set[Partition]:
        """Those of the unplaced that can be sought: what is not fetched librdkafka refuses to seek."""
        return self.unplaced & self.fetched

    def wait(self, partitions: AbstractSet[Partition]) -> None:
        """Nobody knows now from where these are to be fetched."""
        self.waiting |= partitions

    def due(self, now: float) -> set[Partition]:
        """Those of which may be asked now where they begin."""
        return {partition for partition in self.waiting if self._not_before.get(partition, 0.0) <= now}

    def begin(self, due: AbstractSet[Partition], unknown: AbstractSet[Partition], again: float) -> None:
        """Those that were due are fetched now, but for the unknown ones, which wait and are asked for again then."""
        self.waiting = (self.waiting - due) | unknown
        self._not_before.update(dict.fromkeys(unknown, again))

    def unplace(self, partitions: Iterable[Partition]) -> None:
        """These are to be fetched again."""
        self.unplaced.update(partitions)

    def put_right(self, moved: Iterable[Partition] = ()) -> None:
        """Nothing is fetched from the wrong place any more. Those that moved may come to their end once more."""
        self._forget_ends(moved)
        self.unplaced.clear()

    def unsettled(self, now: float) -> bool:
        """Whether the brokers are to be asked where to go on, before another message is handed out."""
        return bool(self.unplaced or self.due(now))

    # -- rest ---------------------------------------------------------------------------------------------------------

    @property
    def resting(self) -> AbstractSet[Partition]:
        """Those that rest."""
        return self._resting.keys()

    @property
    def awake(self) -> set[Partition]:
        """Those that do not rest."""
        return self.owned - self._resting.keys()

    def rest(self, partitions: Iterable[Partition], until: float) -> None:
        """These are paused, and not fetched again before that time."""
        self._resting.update(dict.fromkeys(partitions, until))

    def rested(self, now: float) -> set[Partition]:
        """Those whose rest is over."""
        return {partition for partition, until in self._resting.items() if until <= now}

    def wake(self, partitions: AbstractSet[Partition]) -> None:
        """These are not paused any more, and go on where the group is: behind that are messages that were given back."""
        self.unplaced |= partitions
        for partition in partitions:
            del self._resting[partition]

    # -- ends ---------------------------------------------------------------------------------------------------------

    def ends_at(self, partition: Partition, offset: int) -> None:
        """Librdkafka has come to the end of a partition."""
        self._ends[partition] = offset

    @property
    def ends(self) -> dict[Partition, tuple[int, int]]:
        """Of partitions that were read to their end: where the last message was, or -1, and where the end."""
        read = self.awake - self.waiting - self.unplaced
        return {partition: (self.reached.get(partition, -1), end) for partition, end in self._ends.items() if partition in read}

    def reach(self, offsets: Mapping[Partition, int]) -> None:
        """The messages before these offsets were handed out."""
        self.reached.update(offsets)

    def at_end(self, now: float) -> bool:
        """Whether every partition was read to its end: none of them rests or is unplaced, and no others are waited for."""
        if self.unplaced or self._resting or now < self._rejoining_until:
            return False
        return all(self.reached.get(partition, 0) <= self._ends.get(partition, -1) for partition in self.owned)

    def _forget_ends(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self._ends.pop(partition, None)
            self.reached.pop(partition, None)
