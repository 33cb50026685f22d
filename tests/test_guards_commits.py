"""Guards of commits that trail behind, one by one and without a broker.

Each is removed by a mutant that no other test would notice, or only one that takes its time with a broker.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import KafkaError, TopicPartition

from kafka_guarantees import AuthorizationError, BrokerError
from kafka_guarantees._at_least_once_run import Run
from kafka_guarantees._offsets import Membership
from kafka_guarantees._posted import Posted
from kafka_guarantees._trail import AGAIN

from .test_commit_overlap import T0, T1, Asked, Scene

if TYPE_CHECKING:
    from collections.abc import Iterable

REFUSED = KafkaError(KafkaError.REQUEST_TIMED_OUT)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def arrives_late(scene: Scene, number: int) -> None:
    """A commit of long ago takes effect once more, behind newer ones, and only then it is answered."""
    scene.group.committed.update(scene.group.sent[number])
    scene.trail.answered(None, [TopicPartition(*place, offset) for place, offset in scene.group.sent[number].items()])


def unacknowledged() -> Posted:
    posted = Posted([])
    posted.sent = 1
    return posted


class Uncommitted(Asked):
    """The brokers say that nothing was committed: what was sent has not arrived."""

    def committed(self, places: list[TopicPartition], _timeout: float) -> list[TopicPartition]:  # type: ignore[override]
        return [TopicPartition(place.topic, place.partition, -1001) for place in places]


# -- what was overtaken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", [True, False])
def test_what_was_sent_since_an_overtaken_commit_is_set_right_as_well(scene: Scene, answered: bool) -> None:  # noqa: FBT001
    """C06: not only what was waited for. Else setting right would itself set the group back."""
    scene.handled((T0, 10))
    scene.handled((T0, 20))
    scene.trail.settle()
    scene.handled((T0, 30))
    assert scene.group.sent == [{T0: 10}, {T0: 20}, {T0: 30}]
    if answered:
        scene.group.answer(2)
    arrives_late(scene, 0)
    if not answered:
        scene.group.committed[T0] = 10
        scene.group.answer(2)
        scene.group.committed[T0] = 10
    scene.trail.idle()
    assert scene.group.sent[3:] == [{T0: 30}]


def test_all_that_was_waited_for_since_an_overtaken_commit_is_set_right(scene: Scene) -> None:
    """C06: of every partition, not of those in the newest commit alone."""
    scene.handled((T0, 10))
    scene.handled((T0, 20))
    scene.trail.settle()
    scene.handled((T1, 5), posted=unacknowledged())
    scene.trail._portions[0].posted = None
    scene.trail.settle()
    arrives_late(scene, 0)
    scene.trail.settle()
    assert scene.group.committed == {T0: 20, T1: 5}


def test_a_commit_that_somebody_elses_has_overtaken_is_remembered(scene: Scene) -> None:
    """C06: a portion that did not trail behind is committed at once, with all that does."""
    scene.handled((T0, 10))
    assert scene.trail.commit({T0: TopicPartition(*T0, 20)})
    arrives_late(scene, 0)
    scene.trail.idle()
    assert scene.group.sent[2:] == [{T0: 20}]


def test_a_commit_that_that_of_a_rebalance_has_overtaken_is_remembered(scene: Scene) -> None:
    """C06: another partition is given away, and this one stays."""
    scene.handled((T0, 10))
    scene.handled((T0, 20))
    scene.group.raw = Uncommitted(scene.group)
    scene.trail.revoked({T1})
    scene.trail.settle()
    assert scene.group.committed == {T0: 20}
    arrives_late(scene, 0)
    scene.trail.settle()
    assert scene.group.committed == {T0: 20}


@pytest.mark.parametrize("more", [True, False])
def test_a_commit_that_has_arrived_may_arrive_once_more(scene: Scene, more: bool) -> None:  # noqa: FBT001 - two rows
    """C06: in a rebalance the group is asked whether it has it; librdkafka, which has lost its connection, sends it again."""
    scene.handled((T0, 10))
    scene.group.arrive(0)
    if more:
        scene.handled((T0, 20))
    scene.trail.revoked({T1})
    scene.handled((T0, 30))
    scene.trail.settle()
    arrives_late(scene, 0)
    scene.trail.settle()
    assert scene.group.committed == {T0: 30}


def test_a_commit_of_a_rebalance_that_nobody_answered_is_remembered(scene: Scene) -> None:
    """C06: it was the only one, and may arrive behind what is committed later."""
    scene.handled((T0, 10), posted=unacknowledged())
    scene.group.raw = Uncommitted(scene.group)
    scene.trail.revoked({T1})
    assert scene.group.sent == [{T0: 10}]
    scene.handled((T0, 20))
    scene.trail.settle()
    arrives_late(scene, 0)
    scene.trail.settle()
    assert scene.group.committed == {T0: 20}


@pytest.mark.parametrize("how", ["idle", "end"])
def test_what_sets_a_group_right_is_sent_until_it_is_taken(scene: Scene, how: str) -> None:
    """C06: it may be refused as any other commit; and a run does not end before it is answered."""
    scene.handled((T0, 10))
    scene.handled((T0, 20))
    scene.trail.settle()
    arrives_late(scene, 0)
    scene.trail.idle()
    assert scene.group.sent[2:] == [{T0: 20}]

    class Raw(Asked):
        def poll(self, _timeout: float) -> None:
            self._group.answer(2, REFUSED)

    if how == "end":
        scene.group.raw = Raw(scene.group)
        scene.trail.end()
        assert scene.group.committed == {T0: 20}
    else:
        scene.group.answer(2, REFUSED)
        time.sleep(AGAIN)
        scene.trail.idle()
    assert scene.group.sent[3:] == [{T0: 20}]


# -- what is in flight ---------------------------------------------------------------------------------------------------


def test_the_answer_to_a_commit_that_was_waited_for_is_not_that_of_the_next(scene: Scene) -> None:
    """C06: on_commit hears of both, in whatever order. What is refused afterwards is sent again."""
    scene.handled((T0, 10), posted=unacknowledged())
    scene.trail._portions[0].posted = None
    scene.trail.settle()
    scene.handled((T0, 20))
    assert scene.group.sent == [{T0: 10}, {T0: 20}]
    scene.trail.answered(None, [TopicPartition(*T0, 10)])
    scene.group.answer(1, REFUSED)
    time.sleep(AGAIN)
    scene.trail.idle()
    assert scene.group.sent[2:] == [{T0: 20}]


def test_a_commit_that_was_refused_waits_a_moment(scene: Scene) -> None:
    """Else brokers that are in trouble would be asked as often as there are batches."""
    scene.handled((T0, 10))
    scene.group.answer(0, REFUSED)
    scene.trail.idle()
    scene.trail.follow(scene.group.member)
    assert len(scene.group.sent) == 1


def test_after_a_rebalance_commits_trail_again(scene: Scene) -> None:
    """One that nobody had answered by then does not keep all that comes later from being sent."""
    scene.handled((T0, 10))
    scene.group.raw = Uncommitted(scene.group)
    scene.trail.revoked({T1})
    scene.group.answer(-1)
    scene.handled((T0, 20))
    assert scene.group.sent[-1] == {T0: 20}
    scene.group.answer(-1)
    scene.handled((T0, 30))
    assert scene.group.sent[-1] == {T0: 30}


# -- what may be committed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["idle", "settle", "leave", "revoked"])
def test_after_its_time_a_portion_is_not_committed(scene: Scene, how: str) -> None:
    """M03: a process that was stopped does not know yet that the group has gone on without it."""
    portion = scene.handled((T0, 10), posted=unacknowledged())
    portion.posted = None
    portion.served -= 61
    getattr(scene.trail, how)(*([{T0}] if how == "revoked" else []))
    assert scene.group.sent == []


def test_what_cannot_be_committed_any_more_does_not_hold_up_what_can(scene: Scene) -> None:
    """C09: it was handled as a member that is gone. What is handled as the new one is committed, and not dropped with it."""
    scene.handled((T0, 10), posted=unacknowledged()).posted = None
    scene.group.member = Membership(3, "me, again")
    scene.trail.follow(scene.group.member)
    scene.handled((T0, 20))
    scene.trail.settle()
    assert scene.group.committed == {T0: 20}


def test_a_commit_of_nothing_is_not_sent(scene: Scene) -> None:
    """C07: all that a portion had is lost. librdkafka refuses such a commit, which would end the run."""
    scene.handled((T0, 10), posted=unacknowledged()).posted = None
    scene.trail.lost({T0})
    scene.trail.idle()
    assert scene.group.sent == []
    scene.handled((T1, 5))
    assert scene.group.sent == [{T1: 5}]


def test_a_missing_right_is_not_waited_for(scene: Scene) -> None:
    """Else a run whose right to the group was taken away would try ten times a second, for ever."""
    scene.handled((T0, 10), posted=unacknowledged()).posted = None
    scene.group.refusal = AuthorizationError("no")
    with pytest.raises(AuthorizationError):
        scene.trail.settle()
    assert scene.group.waited == 1


def test_what_is_given_away_waits_for_its_records(scene: Scene) -> None:
    """C03, P01: a moment later they are acknowledged, and its next owner begins behind it."""
    scene.handled((T0, 10), posted=unacknowledged())
    scene.trail.revoked({T0})
    assert scene.group.committed == {T0: 10}


def test_what_the_brokers_do_not_have_after_a_rebalance_is_committed_again(scene: Scene) -> None:
    """C06: the partition was kept, the commit of the rebalance came to nothing, and nobody said so."""
    scene.handled((T0, 10), posted=unacknowledged())
    scene.group.raw = Uncommitted(scene.group)
    scene.trail.revoked({T1})
    scene.trail.settle()
    assert scene.group.committed == {T0: 10}


# -- in a client that stops ----------------------------------------------------------------------------------------------


def settled(scene: Scene) -> bool:
    """What trails behind is committed, at the end of a run."""
    scene.handled((T0, 10), posted=unacknowledged()).posted = None
    scene.trail.settle()
    return scene.group.committed == {T0: 10}


def committed_with_a_portion(scene: Scene) -> bool:
    """What was handled last is committed, with what trails behind."""
    consumer = SimpleNamespace(still_ours=lambda _batch: True)
    run: Any = SimpleNamespace(consumer=consumer, trail=scene.trail, _lifecycle=scene.lifecycle)
    batch: Any = SimpleNamespace(next_offsets=lambda _finished: {T0: TopicPartition(*T0, 10)})
    said = Run._commit(run, batch, [])
    assert said == (scene.group.committed == {T0: 10})
    return said


COMMITS = pytest.mark.parametrize("commit", [settled, committed_with_a_portion])


class Refusing:
    """Stands for brokers that refuse some commits, as of a generation that a rebalance has just ended."""

    def __init__(self, scene: Scene, times: float) -> None:
        self._accept, self._left = scene.group.commit, times
        self.at: list[float] = []

    def __call__(self, offsets: Iterable[TopicPartition]) -> None:
        self.at.append(time.monotonic())
        if len(self.at) <= self._left:
            raise BrokerError("ILLEGAL_GENERATION")
        self._accept(offsets)


@COMMITS
def test_a_client_that_stops_commits_again_what_a_rebalance_refused(
    scene: Scene, commit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C06: else what was handled would come again, though the member has it still. Not at once: brokers need a moment."""
    refusing = Refusing(scene, 2)
    monkeypatch.setattr(scene.group, "commit", refusing)
    with scene.lifecycle.running(lambda: None):
        scene.lifecycle.stop()
        assert commit(scene)
    assert len(refusing.at) == 3
    assert refusing.at[-1] - refusing.at[0] > 1.9 * AGAIN


@COMMITS
def test_a_client_that_stops_does_not_commit_again_for_ever(scene: Scene, commit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Y01: brokers that refuse for as long as a stop waits are left."""
    refusing = Refusing(scene, 50)
    monkeypatch.setattr(scene.group, "commit", refusing)
    with scene.lifecycle.running(lambda: None):
        scene.lifecycle.leave(2 * AGAIN)
        assert not commit(scene)
    assert 1 < len(refusing.at) < 10
