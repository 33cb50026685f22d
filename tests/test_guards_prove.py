"""Guards of the judge: each is removed by a mutant of ``prove`` that nothing else in the suite would notice.

A mutant that lets a broken guarantee pass, or that accuses one that was kept. No broker is needed.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

pytest.importorskip("rich", reason="a proof needs the extra `prove`")
pytest.importorskip("jinja2", reason="a proof needs the extra `prove`")
pytest.importorskip("matplotlib", reason="a proof needs the extra `prove`")

from kafka_guarantees.cli import main
from kafka_guarantees.prove import command, run
from kafka_guarantees.prove.crew import Crew
from kafka_guarantees.prove.evidence import FAIL, GROUPS, INFO, INVOKE, OK, Event, Evidence, Proof, Sample, Seen, Verdict, View
from kafka_guarantees.prove.history import History
from kafka_guarantees.prove.life import CRASHED, Job
from kafka_guarantees.prove.run import CALM, Plan, _promises, _Run
from kafka_guarantees.prove.worker import _config, _listen

from . import test_prove_checks
from .test_prove_checks import ALO, AMO, EOS, EVERY, MS, PARTITIONS, at, clean, judge, outputs_of, work_on
from .world import until

if TYPE_CHECKING:
    from pathlib import Path

SECOND = 1_000_000_000


# --- what the groups have committed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", EVERY)
@pytest.mark.parametrize("group", GROUPS)
def test_drained_means_behind_the_last_record(guarantee: str, group: str) -> None:
    """L01: the offset of the last record, in the place of the one after it, has it handled again at the next start."""
    made = clean(guarantee)
    last = at(made, 1, -1)
    made.sample(group, {1: last.offset})
    (line,) = made.found("drained")
    assert f"the group {group} has committed 1/{last.offset}, and the last record is {last.id}" in line


@pytest.mark.parametrize("guarantee", EVERY)
def test_drained_is_broken_by_an_open_transaction_in_the_output_topic(guarantee: str) -> None:
    """X24: its readers wait, though all that they got so far is right."""
    evidence = clean(guarantee).evidence()
    sink = evidence.sink._replace(unfinished=[2])
    found = {verdict.check: verdict.anomalies for verdict in judge(replace(evidence, sink=sink)) if verdict.found}
    assert found == {"drained": ("a transaction is left open in partition 2 of the output topic",)}


def test_activity_wants_something_to_be_sent_in_the_calm() -> None:
    """M01, H10: at-most-once may lose everything before it; where nothing is sent in it, nothing is known."""
    made = clean(AMO)
    made.calm = made.tick()
    assert made.lacking() == ["nothing was sent after the faults, while nothing was wrong"]
    made.send("sender-0", 1, None)
    work_on(made)
    assert made.lacking() == []


@pytest.mark.parametrize("guarantee", [ALO, EOS])
def test_activity_wants_something_to_be_acknowledged(guarantee: str) -> None:
    """H10: nobody was told that anything is safe, so that nothing could be lost."""
    made = clean(guarantee)
    made.events = [
        event._replace(type=INFO) if event.what in {"send", "transaction"} and event.type == OK else event
        for event in made.events
    ]
    (line,) = made.lacking()
    assert "acknowledged, or known to be committed" in line
    assert made.broken() == {}


@pytest.mark.parametrize("guarantee", [AMO, EOS])
@pytest.mark.parametrize(("ms", "found"), [(900, 0), (1000, 1)])
def test_offset_regression_takes_a_second(guarantee: str, ms: int, found: int) -> None:
    """A broker that is just waking may answer from the past for a moment."""
    made = clean(guarantee)
    back = {**made.committed["consumer"], 1: 4}
    made.sample("consumer", back)
    made.tick(ms // 2)
    made.samples["consumer"].append(Sample(made.now, made.samples["consumer"][-1].answered + ms * MS, back))
    made.sample("consumer")
    assert len(made.found("offset regression")) == found


@pytest.mark.parametrize(("lost", "found"), [(1, 0), (2, 2)])
def test_calm_loss_tolerates_one_in_twenty(lost: int, found: int) -> None:
    """A busy machine lets a request time out now and then; and what is more than that is told in full."""
    made = clean(AMO)
    made.calm = made.tick()
    for number in range(20):
        made.send("sender-0", number, None, written=number >= lost)
    work_on(made)
    assert len(made.found("calm loss")) == found
    assert made.verdict("calm loss").examined == 20


@pytest.mark.parametrize("guarantee", EVERY)
def test_what_belongs_to_nothing_is_a_verdict_and_no_crash(guarantee: str) -> None:
    """A record without our headers, in either topic, or an output of a message that is not there: all checks can look at it."""
    strangers: list[tuple[str, Seen]] = [
        ("source", Seen(1, 99_999, None, "a record without id at 1:99999", content="0")),
        ("sink", Seen(0, 99_999, None, "a record without id at 0:99999", content="0")),
        ("sink", Seen(0, 99_999, None, "nobody/x", "a1", (0, 0), "0")),
        ("sink", Seen(0, 99_999, None, "nobody/0", "a1", (0, 99_999), "0")),
    ]
    for topic, stranger in strangers:
        made = clean(guarantee)
        getattr(made, topic).append(stranger)
        assert stranger.id in made.broken()["inconsistent offset"][0]


@pytest.mark.parametrize("guarantee", EVERY)
def test_inconsistent_offset_between_the_two_readers(guarantee: str) -> None:
    """H02: each has what the other one has not, at one place."""
    evidence = clean(guarantee).evidence()
    for topic in ("source", "sink"):
        view = getattr(evidence, topic)
        one, other = view.committed[3], view.committed[4]
        for changed in (
            view._replace(committed=[*view.committed[:3], one._replace(id=other.id), *view.committed[4:]]),
            view._replace(uncommitted=[*view.uncommitted[:3], one._replace(id=other.id), *view.uncommitted[4:]]),
        ):
            found = {verdict.check: verdict.anomalies for verdict in judge(replace(evidence, **{topic: changed}))}
            both = [line for line in found["inconsistent offset"] if f"{one.id}, says" in line]
            assert any("the committed reader" in line and "the uncommitted reader" in line for line in both)


@pytest.mark.parametrize("guarantee", EVERY)
def test_how_and_when_a_life_ends_says_nothing_of_how_it_began(guarantee: str) -> None:
    """Nor do its warnings: what it has committed itself was not committed before it."""
    made = clean(guarantee)
    for who in list(made.lives):
        made.note(who, "log", INFO, detail="a warning")
        made.note(who, "life", OK)
    assert made.broken() == {}


# --- what is in the topics -------------------------------------------------------------------------------------------------


def test_order_per_key_is_asked_under_exactly_once_of_what_failed_at_first() -> None:
    """X13: only where a failed attempt leaves its outputs behind may those of its message come late."""
    made = clean(EOS)
    early, late = outputs_of(made, at(made, 1, 4))[0], outputs_of(made, at(made, 1, 5))[0]
    made.sink = [output for output in made.sink if output not in {early, late}]
    made.sink += [early._replace(offset=late.offset), late._replace(offset=early.offset)]
    begun = made.index("handle", INVOKE, who="transformer-0", id=at(made, 1, 4).id)
    failed = made.events[begun]._replace(attempt="failed")
    made.events[begun:begun] = [failed, failed._replace(type=FAIL)]
    assert early.id in made.found("order per key")[0]


@pytest.mark.parametrize("guarantee", EVERY)
def test_one_partition_is_enough(guarantee: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All outputs of a message are in it then, one behind the other."""
    monkeypatch.setattr(test_prove_checks, "PARTITIONS", 1)
    made = clean(guarantee)
    made.partitions = 1
    assert made.broken() == {}
    assert made.lacking() == []


def test_torn_transaction_is_not_a_message_that_nobody_has_finished() -> None:
    """It has no outputs, and is not committed: none of both is missing."""
    made = clean(EOS)
    made.transaction("sender-0", [1])
    assert made.found("torn transaction") == []
    assert made.found("drained")


@pytest.mark.parametrize("guarantee", [AMO, EOS])
def test_duplicate_is_not_one_place_that_was_read_twice(guarantee: str) -> None:
    """A reader that fetches again after an error has seen the same record."""
    made = clean(guarantee)
    made.sink.append(made.sink[7])
    made.source.append(made.source[7])
    assert made.found("duplicate") == []


def test_inconsistent_offset_of_a_handler_that_never_ended() -> None:
    """It was given something else than what is there; that a kill followed explains nothing."""
    made = clean(ALO)
    made.begin("consumer-1")
    made.handle("consumer-1", at(made, 1, 5)._replace(id=at(made, 2, 5).id), None)
    assert "the handler of consumer-1 (life 1)" in made.found("inconsistent offset")[0]


def test_inconsistent_offset_of_an_output_that_was_aborted() -> None:
    """Also what nobody else sees belongs to a message: else the harness mixes things up."""
    made = clean(EOS)
    made.aborted_sink.append(made.sink[7]._replace(offset=10_000, origin=(0, 99_999)))
    assert "where no record is" in made.found("inconsistent offset")[0]


@pytest.mark.parametrize("guarantee", EVERY)
def test_a_phantom_is_judged_by_all(guarantee: str) -> None:
    """A record that nobody has sent, which somebody handles, in a partition where nothing else is: a verdict, not a crash."""
    made = clean(guarantee)
    made.handle("consumer-0", Seen(7, 0, None, "phantom", content="sum of phantom"))
    assert "phantom at 7/0 of the input topic was never sent" in made.broken()["inconsistent offset"][0]


def test_aborted_read_by_a_handler_that_never_ended() -> None:
    """X08: it had begun, with what its sender was told is not there."""
    made = clean(EOS)
    made.handle("consumer-0", made.aborted_source[0], None)
    assert "is handled" in made.found("aborted read")[0]


# --- who handled what ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", [ALO, EOS])
@pytest.mark.parametrize("partition", range(PARTITIONS))
def test_poll_skip_of_the_first_message_of_a_partition(guarantee: str, partition: int) -> None:
    """C02: a group that begins one too late. That it comes to it in the end makes it no better."""
    made = clean(guarantee)
    first = at(made, partition, 0)
    late = [event for event in made.events if event.who == "consumer-0" and event.id == first.id]
    made.events = [event for event in made.events if event not in late]
    made.events += [event._replace(at=made.tick()) for event in late]
    (line,) = made.found("poll skip")
    assert f"handled {first.id} at {partition}/{first.offset}" in line


@pytest.mark.parametrize("guarantee", [ALO, EOS])
def test_poll_skip_counts_from_the_beginning(guarantee: str) -> None:
    """C01: the message before it is handled while this one is, or this one never to its end: it was skipped all the same."""
    for ends in (True, False):
        made = clean(guarantee)
        skipped, next_one = at(made, 1, 5), at(made, 1, 6)
        before = made.events[made.index("handle", INVOKE, who="consumer-0", id=skipped.id)].at
        index = made.index("handle", INVOKE, who="consumer-0", id=next_one.id)
        if ends:
            made.events[index] = made.events[index]._replace(at=before - 1)
        else:
            made.events.append(made.events[index]._replace(at=before - 1, attempt="cut short"))
        (line,) = made.found("poll skip")
        assert f"handled {skipped.id} at 1/{skipped.offset}" in line


@pytest.mark.parametrize("guarantee", [AMO, EOS])
def test_non_monotonic_poll_of_a_newcomer_that_never_ended(guarantee: str) -> None:
    """M01: it was killed in the middle of what was finished before it came."""
    made = clean(guarantee)
    made.tick()
    made.begin("transformer-0")
    made.handle("transformer-0", at(made, 1, 2), None, visible=False, made=0)
    (line,) = made.found("non-monotonic poll")
    assert "transformer-0 (life 2)" in line


def test_non_monotonic_poll_is_not_what_was_committed_while_the_life_began() -> None:
    """The question came before it, the answer after it: it may have found the group where it was."""
    made = clean(EOS)
    sample = made.samples["consumer"][-1]
    made.begin("consumer-1")
    made.events[-1] = made.events[-1]._replace(at=(sample.asked + sample.answered) // 2)
    made.samples["consumer"] = [sample]
    made.handle("consumer-1", at(made, 0, 1))
    assert made.broken() == {}


def test_precommitted_read_by_a_handler_that_never_ended() -> None:
    """X08: it had begun, and its sender had not asked for the commit yet."""
    made = clean(EOS)
    index = made.index("handle", INVOKE, who="consumer-0")
    handled = made.events[index]
    sent = made.events[made.index("send", INVOKE, id=handled.id)]
    made.events.append(handled._replace(at=sent.at, attempt="cut short"))
    (line,) = made.found("precommitted read")
    assert handled.id is not None
    assert handled.id in line


# --- how a life ends -------------------------------------------------------------------------------------------------------


ENDS = "import sys; sys.stdin.readline(); sys.exit({})"
TOLD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({}))
sys.stdin.readline()
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""


def crew_of(folder: Path, code: str) -> Crew:
    job = Job(EOS, "sender-0", 0, {}, "in", "out", 1, str(folder / "history"), "1", 1.0, 0.0)
    return Crew([job], folder, (sys.executable, "-c", code), within=30.0)


@pytest.mark.parametrize(("status", "explained"), [(0, False), (1, False), (CRASHED, True)])
def test_a_life_that_ends_by_itself(status: int, explained: bool, tmp_path: Path) -> None:  # noqa: FBT001 - pytest's
    """With the status of an error that a fault explains it is counted; with any other it breaks the proof. Both go on."""
    with crew_of(tmp_path, ENDS.format(status)) as crew:
        crew.start("sender-0")

        def again() -> bool:
            crew.tend()
            return crew.lives > 1

        until(again, "it has another life")
        assert crew.ended["ended by an error"] >= explained
        assert bool(crew.troubles) is not explained
        assert all(f"sender-0 ended by itself, with exit status {status}" in trouble for trouble in crew.troubles)


@pytest.mark.parametrize(("status", "troubles", "counted"), [(0, 0, 0), (1, 1, 0), (CRASHED, 0, 1)])
def test_a_life_that_is_told_to_end(status: int, troubles: int, counted: int, tmp_path: Path) -> None:
    """In order, or with an error: that is judged as it is of one that ends by itself."""
    with crew_of(tmp_path, TOLD.format(status)) as crew:
        crew.start("sender-0")
        until(lambda: "ready" in crew.last_words("sender-0"), "it works")
        crew.dismiss("sender")
        crew.tend()
        assert (len(crew.troubles), crew.ended["ended by an error"], crew.lives) == (troubles, counted, 1)


def test_a_life_that_is_killed_or_has_not_begun_is_no_trouble(tmp_path: Path) -> None:
    """Those are faults; and whoever killed it starts the next."""
    with crew_of(tmp_path, "import time; time.sleep(60)") as crew:
        crew.start("sender-0")
        crew.stop("sender-0")
        crew.start("sender-0")
        crew.kill("sender-0")
        crew.tend()
        assert (crew.troubles, crew.ended, crew.lives) == ([], {}, 2)


# --- a run, without brokers ------------------------------------------------------------------------------------------------


def run_of(folder: Path, guarantee: str = EOS, **more: Any) -> Any:
    """What is asked of a run, with nobody behind it."""
    said: list[object] = []
    parts: dict[str, Any] = {
        "said": said,
        "_plan": Plan(guarantee, [], 1, folder, session=1000),
        "_config": {},
        "_crew": SimpleNamespace(troubles=[], everybody=["sender-0"], dismiss=said.append, tell_all=said.append),
        "_lanes": [],
        "_sampler": SimpleNamespace(
            trouble=None, samples={group: [] for group in GROUPS}, settle=lambda: said.append("settle")
        ),
        "_proxy": None,
        "_kafka": None,
        "_topics": SimpleNamespace(source="in", sink="out"),
        "_look": said.append,
    }
    return SimpleNamespace(**{**parts, **more})


def proxy_of(**more: Any) -> Any:
    parts: dict[str, Any] = {"not_understood": {}, "requests": lambda _clients: {"Produce": 1}, "acks": {}}
    return SimpleNamespace(**{**parts, **more})


def troubles_of(a_run: Any) -> list[str]:
    return list(_Run._troubles(a_run))


@pytest.mark.parametrize("proxy", [None, proxy_of()])
def test_every_trouble_is_told(proxy: Any, tmp_path: Path) -> None:
    """A run in which a worker, a fault or the questions for offsets went wrong is no proof, with or without a proxy."""
    assert troubles_of(run_of(tmp_path, _proxy=proxy)) == []
    a_run = run_of(tmp_path, _proxy=proxy)
    a_run._crew.troubles = ["a worker"]
    a_run._lanes = [SimpleNamespace(trouble=None), SimpleNamespace(trouble="a fault")]
    a_run._sampler.trouble = "the offsets"
    assert troubles_of(a_run) == ["a worker", "a fault", "the offsets"]


def test_a_worker_that_went_past_the_proxy_is_a_trouble(tmp_path: Path) -> None:
    """No fault of connections has hit it. One that has never begun went nowhere."""
    asked: list[bool] = []

    def requests(clients: Any) -> dict[str, int]:
        asked.append(clients("sender-0") and not clients("sender-1"))
        return {}

    a_run = run_of(tmp_path, _proxy=proxy_of(requests=requests))
    assert troubles_of(a_run) == []
    (tmp_path / "sender-0.history").touch()
    assert ["sender-0 never came through the proxy" in line for line in troubles_of(a_run)] == [True]
    assert asked == [True, True]
    a_run._proxy = proxy_of(not_understood={"Metadata v99": 3})
    (line,) = troubles_of(a_run)
    assert "did not understand 3 times Metadata v99" in line


@pytest.mark.parametrize(("guarantee", "wrong"), [(AMO, -1), (ALO, 1), (ALO, 0), (EOS, 1)])
def test_other_acks_than_the_guarantee_s_are_a_trouble(guarantee: str, wrong: int, tmp_path: Path) -> None:
    """P06: what was proven is something else then; unless the user wanted it so."""
    right = {AMO: {0, 1}, ALO: {-1}, EOS: {-1}}[guarantee]
    a_run = run_of(tmp_path, guarantee, _proxy=proxy_of(acks={"sender-0": right, "transformer-0": set()}))
    assert troubles_of(a_run) == []
    a_run._proxy = proxy_of(acks={"sender-0": right | {wrong}})
    (line,) = troubles_of(a_run)
    assert line.startswith("sender-0 has produced with acks")
    for name in ("acks", "request.required.acks"):
        a_run._config = {name: str(wrong)}
        assert troubles_of(a_run) == []


def test_what_a_worker_has_seen_the_library_break_is_told() -> None:
    """``flush()`` that returns with a delivery open, a batch that is too large; and nothing else of a history."""
    said = Event(1, "sender-0", 2, "broken", INFO, detail="close() has returned, and a delivery is not done")
    others = [Event(1, "sender-0", 2, "log", INFO, detail="a warning"), Event(1, "sender-0", 2, "life", INFO, detail="it died")]
    assert list(_promises([*others, said])) == [f"sender-0 (life 2): {said.detail}"]


@pytest.mark.parametrize("outcome", ["held", "broken"])
def test_a_run_judges_all_that_it_has_seen(outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs are read, and the offsets asked for, when nobody works any more. What is found is looked into."""
    dumped: list[object] = []
    monkeypatch.setattr(run, "dump", lambda *what: dumped.append(what))
    with History(tmp_path / "sender-0.history", "sender-0", 1) as history:
        history.note("broken", INFO, detail="it lied")
    source, sink, judged = View(["the source"], []), View(["the sink"], []), []  # type: ignore[list-item]

    def view(topic: str) -> View:
        a_run.said.append(topic)
        return sink

    def proof(evidence: Evidence, _repeat: object) -> Any:
        judged.append(evidence)
        return SimpleNamespace(outcome=outcome)

    a_run: Any = run_of(tmp_path, _calm_down=lambda: 7, _settle=lambda: source, _proof=proof)
    a_run._hurt, a_run._troubles = lambda: a_run.said.append("hurt"), lambda: iter(["a trouble"])
    a_run._reader, a_run._kafka = SimpleNamespace(view=view), SimpleNamespace(data_dir="disk")
    _Run.whole(a_run, ())
    (evidence,) = judged
    assert a_run.said == ["hurt", *GROUPS, "reading", "settle", "out"]
    assert [event.detail for event in evidence.events] == ["it lied"]
    assert evidence == Evidence(
        EOS, evidence.events, source, sink, a_run._sampler.samples, 7, 8, ["a trouble", "sender-0 (life 1): it lied"]
    )
    assert bool(dumped) is (outcome == "broken")


def test_only_at_most_once_has_a_calm_and_only_when_nobody_is_missing(tmp_path: Path) -> None:
    """Handlers raise no more, every member is back or forgotten, then comes the calm, and it takes its time."""
    for guarantee in EVERY:
        a_run = run_of(tmp_path, guarantee)
        a_run._wait = lambda seconds, a_run=a_run: a_run.said.append((seconds, time.monotonic_ns()))
        before = time.monotonic_ns()
        calm = _Run._calm_down(a_run)
        if guarantee == AMO:
            told, (rest, first), (calm_for, then) = a_run.said
            assert rest > (a_run._plan.session + a_run._plan.poll) / 1000
            assert calm_for == CALM
            assert before < first <= cast("int", calm) <= then
        else:
            (told,), rest = a_run.said, None
            assert calm is None
        assert told == {"failing": 0}


class Clock:
    """Of a run that settles: each look takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("commits", [[3, 3, 3, 9, 9, 9, 20], [], [1, 2, 3]])
def test_a_run_settles_once_everything_is_committed_or_nothing_moves(
    commits: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sender is left as the topic is read; and whoever makes progress has time for more."""
    clock, seconds = Clock(), 5.0
    monkeypatch.setattr(run, "time", clock)
    a_run = run_of(tmp_path)
    a_run._plan = replace(a_run._plan, patience=seconds)
    source = View([Seen(0, 19, None, "last")], [])
    now = [0]

    def look(_phase: str) -> None:
        clock.now += 1.0
        now[0] = commits[min(int(clock.now), len(commits)) - 1] if commits else 0

    a_run._look, a_run._reader = look, SimpleNamespace(view=lambda topic: (a_run.said.append(topic), source)[1])
    a_run._sampler.last = lambda name: {0: now[0]}
    a_run._sampler.reached = lambda goal: goal == {0: 20} and now[0] >= goal[0]
    assert _Run._settle(a_run) is source
    assert a_run.said == ["sender", "in"]
    ends = {(3, 20): 7.0, (): 6.0, (1, 3): 8.0}
    assert clock.now == ends[(commits[0], commits[-1]) if commits else ()]


def test_a_time_without_faults_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has died meanwhile is looked after all the while."""
    clock = Clock()
    monkeypatch.setattr(run, "time", clock)
    a_run = run_of(tmp_path)

    def look(phase: str) -> None:
        a_run.said.append(phase)
        clock.now += 1.0

    a_run._look = look
    _Run._wait(a_run, 3.0)
    assert clock.now == 3.0
    assert a_run.said == ["calming down"] * 3


def test_what_a_fault_has_left_behind_is_undone(tmp_path: Path) -> None:
    """Workers go on, paused brokers too, and those that are down are started: else nobody could finish anything."""
    resumed: list[int] = []
    restarted: list[int] = []
    kafka = SimpleNamespace(brokers=3, resume=resumed.append, running=lambda number: number != 1, restart=restarted.append)
    a_run = run_of(tmp_path, _kafka=kafka)
    a_run._crew.resume_all = lambda: a_run.said.append("resume all")
    _Run._heal(a_run)
    assert (a_run.said, resumed, restarted) == (["resume all"], [0, 1, 2], [1])
    a_run._kafka = None
    _Run._heal(a_run)
    assert a_run.said == ["resume all"] * 2


# --- the command -----------------------------------------------------------------------------------------------------------


KEPT = Verdict("lost write", "nothing is lost", 500)


@pytest.mark.parametrize(
    ("verdicts", "troubles", "status"),
    [
        ([KEPT], [], 0),
        ([replace(KEPT, anomalies=["x is gone"])], [], 1),
        ([replace(KEPT, lacking=["12 records"])], [], 1),
        ([replace(KEPT, examined=0)], [], 1),
        ([KEPT], ["it hangs"], 1),
    ],
    ids=["held", "broken", "too little", "nothing examined", "a trouble"],
)
def test_the_status_is_0_only_where_the_proof_held(  # noqa: PLR0917 - pytest gives them
    verdicts: list[Verdict],
    troubles: list[str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CI looks at nothing else."""

    def prove(plan: Plan, *_: object) -> Proof:
        return Proof(plan.guarantee, "v", "c", "today", 1.0, {}, {}, verdicts, [], troubles=troubles)

    monkeypatch.setattr(command, "prove", prove)
    assert main(["prove", EOS, "--report", str(tmp_path / "out.html")]) == status
    assert (tmp_path / "out.json").exists()
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("guarantee", "config", "heard"), [(AMO, {"acks": 1}, 1), (AMO, {"acks": "1"}, 1), (AMO, {}, 0), (ALO, {"acks": 1}, 0)]
)
def test_brokers_that_leave_with_answers_owed_are_noted(
    monkeypatch: pytest.MonkeyPatch, guarantee: str, config: dict[str, Any], heard: int
) -> None:
    """P06: of one that was not connected, or of a bootstrap address, no request is under way. As librdkafka says it."""
    librdkafka = logging.Logger("librdkafka", logging.INFO)  # noqa: LOG001 - one that no other test has
    monkeypatch.setattr("kafka_guarantees.prove.worker.logging.getLogger", lambda *_: librdkafka)
    noted: list[tuple[str, str]] = []
    history = SimpleNamespace(note=lambda what, _type, detail: noted.append((what, detail)))
    librdkafka.addHandler(logging.NullHandler())
    job: Any = SimpleNamespace(guarantee=guarantee, config=config)
    _listen(cast("Any", SimpleNamespace(history=history, job=job)))
    assert ("debug" in _config(job)) is bool(heard)
    for where, state in (("a:1/0", "UP"), ("a:1/0", "TRY_CONNECT"), ("a:1/bootstrap", "UP")):
        librdkafka.debug(
            "FAIL [p] [thrd:%s]: %s: Decommissioning this broker (after 5ms in state %s) (_DESTROY_BROKER)", where, where, state
        )
    librdkafka.debug("CONNECT [p] [thrd:a:1/0]: a:1/0: Connected (#1)")
    assert [what for what, _ in noted] == ["broker left"] * heard
    assert all("a:1/0" in said for _, said in noted)
