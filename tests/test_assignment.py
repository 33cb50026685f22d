"""Laws of what a member owns, by plain numbers: no clock, no broker."""

from __future__ import annotations

import math

import pytest

from kafka_guarantees._assignment import Assignment

T0, T1, T2 = ("t", 0), ("t", 1), ("t", 2)


@pytest.fixture
def owned() -> Assignment:
    """Two partitions that were read to their end, and a third that waits."""
    made = Assignment()
    made.rebalance()
    made.assign({T0, T1, T2})
    made.wait({T2})
    for partition in (T0, T1, T2):
        made.ends_at(partition, 9)
    made.reach({T0: 9, T1: 9})
    return made


def test_what_waits_is_asked_for_when_its_time_has_come(owned: Assignment) -> None:
    """Each has its own: one that has no leader is not asked for with every fetch, because another has none either."""
    assert owned.fetched == {T0, T1}
    assert owned.due(0) == {T2}
    owned.begin({T2}, {T2}, again=5)
    assert owned.waiting == {T2}
    assert (owned.due(4), owned.due(5)) == (set(), {T2})
    owned.wait({T1})
    assert owned.due(4) == {T1}
    owned.begin({T1}, set(), again=9)
    assert owned.waiting == {T2}


def test_the_end_is_known_of_what_goes_on_from_where_it_is(owned: Assignment) -> None:
    """What waits, rests or is unplaced may have been given back, and not be committed up to where it was read."""
    owned.ends_at(T1, 10)
    assert owned.ends == {T0: (9, 9), T1: (9, 10)}
    owned.rest({T1}, 5)
    assert owned.ends == {T0: (9, 9)}
    owned.unplace({T0})
    assert owned.ends == {}


def test_what_was_fetched_may_wait_again(owned: Assignment) -> None:
    """The eager protocol assigns all anew, also what has lost its leader meanwhile."""
    owned.begin({T2}, {T1}, again=5)
    assert owned.fetched == {T0, T2}
    assert owned.due(5) == {T1}


def test_only_what_is_owned_and_fetched_is_sought(owned: Assignment) -> None:
    """Librdkafka refuses anything else, and no other partition would be put right, for ever."""
    owned.unplace([T0, T2, ("other", 0)])
    assert owned.misplaced == {T0}
    owned.put_right()
    assert not owned.misplaced
    assert not owned.unplaced


@pytest.mark.parametrize("why", ["unplaced", "due"])
def test_a_message_waits_until_it_is_known_where_to_go_on(owned: Assignment, why: str) -> None:
    """C01: of what is unplaced, or may be asked for; what waits for its time holds up nothing."""
    owned.begin({T2}, {T2}, again=5)
    assert not owned.unsettled(4)
    if why == "unplaced":
        owned.unplace([T0])
    assert owned.unsettled(4 if why == "unplaced" else 5)


def test_what_rests_wakes_in_its_time_and_goes_on_elsewhere(owned: Assignment) -> None:
    """D09: behind where it was paused are the messages that were given back."""
    owned.rest([T0], until=5)
    owned.rest([T1], until=7)
    assert owned.awake == {T2}
    assert (owned.rested(4), owned.rested(5)) == (set(), {T0})
    owned.wake({T0})
    assert owned.awake == {T0, T2}
    assert owned.unplaced == {T0}
    assert not owned.rested(6)


def test_a_partition_is_at_its_end_when_what_was_there_was_handed_out(owned: Assignment) -> None:
    """And one of which no end is known is not, nor one of which there is more."""
    assert owned.at_end(0)
    owned.reach({T0: 10})
    assert not owned.at_end(0)
    owned.ends_at(T0, 10)
    assert owned.at_end(0)
    owned.assign({("t", 3)})
    assert not owned.at_end(0)


@pytest.mark.parametrize("why", ["rests", "unplaced", "moved"])
def test_what_comes_again_is_not_at_its_end(owned: Assignment, why: str) -> None:
    """A run with until_idle would end without it."""
    if why == "rests":
        owned.rest([T0], until=5)
    else:
        owned.unplace([T0])
    if why == "moved":
        owned.put_right([T0])
    assert not owned.at_end(9)


def test_nothing_is_at_its_end_while_the_group_is_joined_again(owned: Assignment) -> None:
    """The eager protocol takes all away for a moment. It has an end: others may get what there is."""
    owned.revoke({T0, T1, T2}, rejoining_until=5)
    assert not owned.owned
    assert (owned.at_end(4), owned.at_end(5)) == (False, True)
    owned.revoke(set(), rejoining_until=9)
    owned.assign(set())
    assert owned.at_end(4)


def test_to_lose_one_of_many_is_not_to_join_again(owned: Assignment) -> None:
    """Where partitions are revoked one by one, the others are read on."""
    owned.revoke({T2})
    assert owned.at_end(0)


def test_what_is_taken_away_takes_all_along_that_is_known_of_it(owned: Assignment) -> None:
    """X02: when it comes back, its next owner has gone on, and perhaps there is more of it. Others are left alone."""
    owned.begin({T2}, {T2}, again=math.inf)
    owned.rest([T0, T1], until=5)
    owned.unplace([T0, T1])
    owned.revoke({T0, T2})
    assert (owned.owned, owned.waiting, owned.unplaced) == ({T1}, set(), {T1})
    assert owned.rested(5) == {T1}
    assert owned.given_away == {T0, T2}
    owned.wake({T1})
    owned.put_right()
    assert owned.at_end(0)
    owned.assign({T0, T2})
    owned.wait({T2})
    assert owned.awake == {T0, T1, T2}
    assert owned.due(0) == {T2}
    assert not owned.at_end(0)
    for partition in (T0, T2):
        owned.ends_at(partition, 0)
    assert owned.at_end(0), "nothing of it was handed out since"


@pytest.mark.parametrize("partition", [T0, T1, T2])
def test_who_takes_over_begins_anew(owned: Assignment, partition: tuple[str, int]) -> None:
    """And what was fetched before it is of an assignment that is over (C03)."""
    before = owned.rebalances
    owned.begin({T2}, {T2}, again=math.inf)
    owned.rest([T0], until=5)
    owned.unplace([T1])
    owned.clear()
    assert owned.rebalances > before
    assert not any((owned.owned, owned.waiting, owned.unplaced, owned.rested(math.inf)))
    owned.assign({partition})
    owned.wait({partition})
    assert owned.due(0) == {partition}
    assert not owned.at_end(0)
    owned.ends_at(partition, 0)
    assert owned.at_end(0)
