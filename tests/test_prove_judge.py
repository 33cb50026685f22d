"""What the judge did not see, or saw wrongly: each of these is red without its fix. No broker is needed."""

from __future__ import annotations

import json
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("rich", reason="a proof needs the extra `prove`")
pytest.importorskip("jinja2", reason="a proof needs the extra `prove`")
pytest.importorskip("matplotlib", reason="a proof needs the extra `prove`")

from kafka_guarantees.prove.crew import Crew
from kafka_guarantees.prove.evidence import FAIL, GROUPS, INFO, OK
from kafka_guarantees.prove.evidence import Fault as Done
from kafka_guarantees.prove.faults import NOBODY, Aim, DropResponse, Fault
from kafka_guarantees.prove.life import Job
from kafka_guarantees.prove.run import _hit
from kafka_guarantees.prove.schedule import Lane, Step

from .test_prove_checks import ALO, AMO, EOS, clean, work_on
from .world import until

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("outcome", [INFO, None])
@pytest.mark.parametrize("group", GROUPS)
def test_aborted_read_of_what_nobody_knows_but_readers_do_not_find(outcome: str | None, group: str) -> None:
    """X08: a member that reads uncommitted records handles one whose transaction timed out after its commit was asked for."""
    made = clean(EOS)
    made.transaction("sender-0", [1], outcome, written=False)
    gone = made.aborted_source[-1]
    made.handle(f"{group}-0", gone)
    made.transaction("sender-0", [1])
    work_on(made)
    lines = made.broken()["aborted read"]
    assert f"{gone.id} was not committed, and is handled at 1/{gone.offset} by {group}-0 (life 1)" in lines
    assert len(lines) == (3 if group == "transformer" else 1)  # two outputs
    assert set(made.broken()) == {"aborted read"}


def test_aborted_read_of_a_failure_is_told_once() -> None:
    made = clean(EOS)
    made.handle("consumer-0", made.aborted_source[0])
    assert len(made.found("aborted read")) == 1


def test_activity_wants_sends_in_the_calm_that_do_not_fail() -> None:
    """H10: a library that refuses everything once nothing is wrong loses nothing, and must not pass."""
    made = clean(AMO)
    made.calm = made.tick()
    for _ in range(30):
        made.send("sender-0", 1, FAIL, written=False)
    assert made.lacking() == ["nothing was sent after the faults, while nothing was wrong"]
    made.calm = None
    assert made.lacking() == ["nothing was sent after the faults, while nothing was wrong"]


@pytest.mark.parametrize("guarantee", [ALO, EOS])
def test_activity_wants_enough_to_be_acknowledged(guarantee: str) -> None:
    """H10: with one acknowledgement, or one commit, there is one record that could be lost."""
    made = clean(guarantee)
    first = True
    for index, event in enumerate(made.events):
        if event.what in {"send", "transaction"} and event.type == OK:
            made.events[index] = event if first else event._replace(type=INFO)
            first = False
    (line,) = made.lacking()
    assert "records were acknowledged, or known to be committed: fewer than 100" in line


def test_order_per_key_leaves_out_what_was_not_acknowledged_at_first() -> None:
    """At-least-once: an output was given up, and those behind it were not; then all of the messages were handled again."""
    made = clean(ALO)
    first, second, third = (next(s for s in made.source if s.id == id_) for id_ in [made.send("sender-0", 0) for _ in range(3)])
    made.handle("transformer-0", first)
    made.handle("transformer-0", second, made=0)
    made.handle("transformer-0", third)
    work_on(made)
    assert made.broken() == {}
    late = next(seen for seen in made.sink if seen.id == f"{first.id}/0")  # by its first attempt: that was overtaken
    made.sink.remove(late)
    made.sink.append(late._replace(offset=9999))
    made.sink = [seen for seen in made.sink if seen.id != late.id or seen.offset == 9999]
    assert late.id in made.found("order per key")[0]


def test_disorder_is_told_with_those_that_are_in_disorder() -> None:
    """The one that a record comes after was sent later, and not just before it in the topic."""
    made = clean(ALO)
    ids = [made.send("sender-0", 4) for _ in range(3)]
    places = [next(seen for seen in made.source if seen.id == id_) for id_ in ids]
    others = [seen for seen in made.source if seen.id not in ids]
    made.source = [*others, *(seen._replace(id=ids[nth]) for seen, nth in zip(places, (2, 0, 1), strict=True))]
    lines = made.found("order per key")
    assert [line.split()[0] for line in lines] == [ids[0], ids[1]]
    assert all(f"comes after {ids[2]} at" in line for line in lines)


# --- faults that hit nothing --------------------------------------------------------------------------------------------------


def test_a_run_whose_faults_hit_nothing_says_nothing() -> None:
    """H09: neither one in which none was done, nor one in which there was nothing to be hit."""
    asked: list[Fault] = [DropResponse(["CreateTopics"])]
    nothing = Done("drop-response", "CreateTopics", 1.0, 2.0, NOBODY)
    assert list(_hit([], [])) == []
    for done in ([], [nothing]):
        (verdict,) = _hit(asked, done)
        assert verdict.lacking == ("no fault has hit anything",)
        assert not verdict.found
    (verdict,) = _hit(asked, [nothing, Done("cut", "connections", 1.0, 1.0, "all")])
    assert (verdict.examined, verdict.lacking) == (1, ())


def test_answers_of_nobody_were_not_dropped() -> None:
    started: Any = SimpleNamespace(cancel=lambda: None, dropped=[])
    stage: Any = None
    assert DropResponse(["CreateTopics"]).stop(stage, Aim("CreateTopics", 1.0), started) == NOBODY
    started.dropped = [SimpleNamespace(client_id="sender-0")] * 2
    assert DropResponse(["Produce"]).stop(stage, Aim("Produce", 1.0), started) == "2 of sender-0"


class Noted(Fault):
    """Tells when it is done."""

    name, lane = "noted", "workers"

    def __init__(self) -> None:
        self.started = threading.Event()

    def start(self, stage: Any, aim: Aim) -> None:
        self.started.set()


def test_a_lane_that_is_ended_starts_nothing_more() -> None:
    """What was due later is not done now: the time without faults has begun."""
    first, later = Noted(), Noted()
    done: list[Done] = []
    stage: Any = None
    lane = Lane([Step(0.0, first, Aim("x", 0.0)), Step(1e6, later, Aim("x", 0.0))], stage, 0.0, done.append)
    lane._began = lane._now()  # now
    lane.start()
    assert first.started.wait(10)
    lane.end()
    assert not later.started.is_set()
    assert len(done) == 1


# --- orders ---------------------------------------------------------------------------------------------------------------

LISTENS = "import sys\nfor line in sys.stdin: print('got', line, file=sys.stderr, flush=True)"


def test_lives_that_begin_later_are_told_what_everybody_was(tmp_path: Path) -> None:
    """A handler that raises in the calm would count against at-most-once."""
    job = Job(AMO, "consumer-0", 0, {}, "in", "out", 1, str(tmp_path / "history"), "1", 1.0, 0.0)
    with Crew([job], tmp_path, (sys.executable, "-c", LISTENS)) as crew:
        crew.tell_all({"failing": 0})
        crew.start("consumer-0")
        until(lambda: "got" in crew.last_words("consumer-0"), "it has its job")
        until(lambda: json.dumps({"failing": 0}) in crew.last_words("consumer-0"), "it is told")
