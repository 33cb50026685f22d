"""Laws of the size of batches, by plain numbers: no clock, no broker."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kafka_guarantees._pace import Pace

seconds = st.just(0.0) | st.floats(1e-9, 1e9)  # no clock is finer


def test_it_begins_with_the_limit_or_with_what_can_be_afforded() -> None:
    """One that can be cut begins with all that is allowed; one that cannot, with few, and never with more than the limit."""
    assert Pace(1000, 2).size == 1000
    assert Pace(1000, 2, 20).size == 20
    assert Pace(5, 2, 20).size == 5


def test_it_shrinks_at_once_and_grows_by_doubling() -> None:
    """C10: one batch that took too long is enough; a quick one is believed only as far as twice its size."""
    pace = Pace(1000, 2, 20)
    pace.took(20, 8)
    assert pace.size == 5
    pace.took(5, 0.001)
    assert pace.size == 10
    for expected in (20, 40, 80, 160, 320, 640, 1000, 1000):
        pace.took(pace.size, 0.001)
        assert pace.size == expected


def test_it_does_not_grow_by_batches_that_were_not_full() -> None:
    """A topic where little comes says nothing about how long many messages take."""
    pace = Pace(1000, 2, 20)
    for _ in range(10):
        pace.took(19, 0.001)
    assert pace.size == 20


@pytest.mark.parametrize(("limit", "late"), [(150.0, 2.0), (0.6, 0.6)])
def test_what_can_be_cut_is_given_back_soon(limit: float, late: float) -> None:
    """C10: in a rebalance a whole group waits. What is handled as a whole, or is served meanwhile, may take its time."""
    pace = Pace(4000, limit)
    pace.took(100, 3.0)
    assert pace.size == int(100 * min(1.0, limit) / 3)
    assert pace.late == late
    for other in (Pace(4000, limit, 20), Pace(4000, limit, served=True)):
        assert other.late == limit


def test_one_message_is_always_taken() -> None:
    """Also where a single one takes longer than a whole batch may."""
    pace = Pace(1000, 2)
    pace.took(1, 3600)
    assert pace.size == 1


def test_nothing_is_learned_from_nothing() -> None:
    """A batch that failed, or in which all were duplicates, took its time for other reasons."""
    pace = Pace(1000, 2, 20)
    pace.took(0, 3600)
    assert pace.size == 20


@pytest.mark.parametrize("max_wait", [-0.1, 1.1, math.inf, math.nan, "1", None])
def test_what_cannot_be_waited_for_is_refused(max_wait: Any) -> None:
    """And is named, so that the text "1" is not taken for the number."""
    with pytest.raises(ValueError, match=rf"max_wait is a number of seconds, up to a quarter .* not {max_wait!r}"):
        Pace(100, 2, 20, max_wait=max_wait)


def test_a_clock_that_stands_still_is_no_division_by_zero() -> None:
    """Some clocks do not move between two looks."""
    pace = Pace(100, 2, 20)
    pace.took(20, 0)
    assert pace.size == 40


@given(st.integers(1, 10**6), st.floats(0.001, 1e4), st.lists(st.tuples(st.integers(0, 10**6), seconds)))
def test_the_size_is_always_between_one_and_the_limit(limit: int, budget: float, took: list[tuple[int, float]]) -> None:
    """Whatever it is told."""
    pace = Pace(limit, budget, 20)
    for handled, seconds_taken in took:
        pace.took(min(handled, pace.size), seconds_taken)
        assert 1 <= pace.size <= limit


@pytest.mark.parametrize("each", [0.0001, 0.003, 0.05, 0.7, 5.0])
def test_it_comes_to_what_fits(each: float) -> None:
    """With a constant time for each message no batch after the first takes longer than the budget, and most of it is used."""
    pace, budget = Pace(100_000, 2, 20), 2.0
    pace.took(pace.size, pace.size * each)
    for _ in range(30):
        assert pace.size == 1 or pace.size * each <= budget * 1.0001
        pace.took(pace.size, pace.size * each)
    assert pace.size == pytest.approx(max(1, math.floor(budget / each)), abs=1)
