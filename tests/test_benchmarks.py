"""The benchmark's own arithmetic, its targets and its page; and one small race on a real broker."""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks.contestants import WORKS, Contestant, contestants
from benchmarks.latency import Ways, measure
from benchmarks.peers import _PEERS, environments
from benchmarks.plan import BARE, BATCHES, OURS, STREAMS, Entry, Race, messages, plan
from benchmarks.results import Column, Result
from benchmarks.runs import RunFailed, Sample, TookTooLong, run
from benchmarks.show import as_html, drawing
from benchmarks.stage import Stage
from benchmarks.targets import TARGETS, verdicts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kafka_guarantees.testing import RunningKafka

PEERS = dict.fromkeys((BARE, "confluent_default", "aiokafka", "franz-go", STREAMS), WORKS)


def sample(rate: float) -> Sample:
    return Sample(messages=1000, seconds=1000 / rate, transactions=10, first=0.5, rss=10**7, version="1")


def result(race: str, rates: Mapping[str, Sequence[float | None]]) -> Result:
    """A race with these rates by round; None is a run that failed."""
    found = next(one for one in plan(PEERS) if one.name == race)
    columns = {label: Column(label) for label in rates}
    for label, column in columns.items():
        for rate in rates[label]:
            column.fail("it did not start") if rate is None else column.add(sample(rate))
    return Result(found, columns)


# -- numbers ---------------------------------------------------------------------------------------------------------------


def test_a_ratio_is_taken_within_a_round() -> None:
    """A machine that became slower half-way changes both sides of a round, and no ratio."""
    found = result("consume", {OURS: [800, 80, 8], BARE: [1000, 100, 10]})
    assert found.ratios(BARE) == pytest.approx([0.8, 0.8, 0.8])


def test_a_round_that_one_failed_has_no_ratio() -> None:
    """The others count, and the failure is kept with its reason, once."""
    found = result("consume", {OURS: [800, 800, 800], BARE: [None, None, 1000]})
    assert found.ratios(BARE) == [0.8]
    column = found.as_json()["contestants"][1]
    assert (column["failures"], column["troubles"], column["rates"]) == (2, ["it did not start"], [1000])


@pytest.mark.parametrize("race", [pytest.param(race, id=race.name) for race in plan(PEERS)])
@pytest.mark.parametrize("rate", [0.5, 13.0, 4_321.0, 3_000_000.0])
def test_messages_are_whole_batches_for_every_worker(race: Race, rate: float) -> None:
    """Each worker ends with a full transaction, each partition has a message, and no topic is huge."""
    count = messages(race, rate, 1.5)
    assert count > 0
    assert count % ((race.batch or 1) * race.workers) == 0
    assert count >= race.partitions
    assert count * race.size <= 500_000_000


# -- the plan and its targets ----------------------------------------------------------------------------------------------


def test_every_target_is_about_a_race_of_the_plan() -> None:
    """A target whose race was renamed would never be looked at."""
    labels = {race.name: [entry.label for entry in race.entries] for race in plan(PEERS)}
    for target in TARGETS:
        assert target.race in labels, target
        assert any(label.startswith(target.peer) for label in labels[target.race]), target


def test_every_race_has_a_name_of_its_own() -> None:
    """Names are what targets and reports tell races by."""
    names = [race.name for race in plan(PEERS)]
    assert len(names) == len(set(names))
    assert all(f"exactly-once, batch {batch:,}" in names for batch in BATCHES)


SCRIPTS = {
    "confluent_default": "confluent_default",
    "confluent_tuned": "confluent_tuned",
    "aiokafka": "aiokafka_peer",
    "quixstreams": "quixstreams_peer",
    "kafka-python": "kafka_python_peer",
    "faststream": "faststream_peer",
    "faust": "faust_peer",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_peer_is_given_the_works_that_its_script_has(name: str) -> None:
    """No race is run with a client that does not know it, and none is left out."""
    script = ast.parse((environments.HERE / f"{SCRIPTS[name]}.py").read_text())
    table = next(node.value for node in script.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WORKS")
    assert isinstance(table, ast.Dict)
    assert {ast.literal_eval(key) for key in table.keys if key} == _PEERS[name][0]


def a_wheel(folder: Path, name: str) -> Path:
    """A package of one empty module, which pip installs without a network."""
    wheel = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr(f"{name}.py", "")
        files.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        files.writestr(f"{name}-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr(f"{name}-1.dist-info/RECORD", "")
    return wheel


def test_a_client_that_cannot_be_installed_keeps_no_other_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is missing, and pip's reason is said; what could be installed is, and only once."""
    wheels = {name: a_wheel(tmp_path, name) for name in ("first", "refused", "last")}
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# all\n" + "".join(f"{name} @ {wheel.as_uri()}\n" for name, wheel in wheels.items()))
    monkeypatch.setattr(environments, "BUILD", tmp_path / "build")
    monkeypatch.setattr(environments, "REQUIREMENTS", requirements)
    wheels["refused"].unlink()
    python = environments.python_with("first", "first")
    assert environments.python_with("last", "last") == python
    with pytest.raises(environments.Unavailable, match=r"No such file.*refused"):
        environments.python_with("refused", "refused")
    for wheel in (wheels["first"], wheels["last"]):
        wheel.unlink()
    assert environments.python_with("first", "first") == environments.python_with("last", "last") == python


def test_a_peer_takes_part_in_what_it_can() -> None:
    """Who has no transactions is not asked for them."""
    races = list(plan({"kafka-python": frozenset({"produce", "consume"})}))
    for race in races:
        assert ("kafka-python" in {entry.name for entry in race.entries}) == (
            race.section in {"produce", "consume"} and race.brokers == 1
        )


def test_a_target_is_met_by_the_median() -> None:
    """One bad round does not miss it, one good round does not meet it."""
    for rates, value, met in (([90, 10, 85], 0.85, True), ([70, 99, 75], 0.75, False)):
        found = verdicts([result("consume", {OURS: rates, BARE: [100, 100, 100]})], [])
        (verdict,) = [one for one in found if BARE in one.what]
        assert verdict.value == pytest.approx(value)
        assert verdict.met is met


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    """A peer that is missing, or failed, says nothing about ours."""
    found = verdicts([result("consume", {OURS: [90], BARE: [None]})], [])
    assert {one.met for one in found} == {None}


def test_the_best_of_several_counts() -> None:
    """Kafka Streams races with more than one interval: its best is what ours is compared with."""
    rates = {OURS: [300.0], f"{STREAMS}, 100 ms": [100.0], f"{STREAMS}, 500 ms": [200.0]}
    (found,) = [one for one in verdicts([result("exactly-once, batch 10,000", rates)], []) if STREAMS in one.what]
    assert (found.value, found.met) == (1.5, False)


def test_what_is_added_to_latency_is_a_difference_of_medians() -> None:
    """In each round, ours less the bare client."""
    ways = [
        Ways(OURS, "at-least-once", 1, [[1.0, 2.0, 9.0], [3.0]]),
        Ways(BARE, "at-least-once", 1, [[1.9, 1.9, 1.9], [2.9]]),
        Ways(OURS, "at-most-once", 3, [[50.0]]),
    ]
    (found,) = verdicts([], ways)
    assert found.value == pytest.approx(0.1)
    assert found.met


# -- the page --------------------------------------------------------------------------------------------------------------


def report(results: Sequence[Result]) -> dict[str, Any]:
    ways = [Ways(OURS, "at-least-once", 1, [[1.0, 2.0]]), Ways(BARE, "at-least-once", 1, [], ["<it> was late"])]
    made = {
        "format": 1,
        "began": "2025-01-01 00:00",
        "python": "3.11",
        "machine": "a machine",
        "cpus": 2,
        "load": 0.5,
        "rounds": 3,
        "races": [one.as_json() for one in results],
        "latency": [way.as_json() for way in ways],
        "targets": [one.as_json() for one in verdicts(results, ways)],
        "missing": {"faust": "it cannot be <installed>"},
    }
    return dict(json.loads(json.dumps(made)))


def test_bars_are_as_long_as_rates_on_a_logarithmic_scale() -> None:
    """Ten times as fast is one step longer, from one power of ten to the next."""
    drawn = drawing(result("consume", {OURS: [1000.0], BARE: [100.0], "aiokafka": [10.0]}).as_json())
    first, second, third = (bar.end for bar in drawn.bars)
    assert first - second == pytest.approx(second - third)
    assert {text for _, text in drawn.ticks} == {"1", "10", "100", "1,000", "10,000"}
    assert [bar.ours for bar in drawn.bars] == [True, False, False]


def test_the_page_shows_all_and_stands_alone() -> None:
    """Failures and what is missing are on it too; nothing is loaded from elsewhere, nothing is taken for markup."""
    page = as_html(report([result("consume", {OURS: [800, 900], BARE: [1000, 1000], "aiokafka": [None, None]})]))
    for text in (
        "consume",
        "0.85",
        "aiokafka failed: it did not start",
        "it cannot be &lt;installed&gt;",
        "&lt;it&gt; was late",
    ):
        assert text in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_page_of_nothing_is_a_page() -> None:
    """Where everything failed, the reasons are what there is to show."""
    assert "it did not start" in as_html(report([result("consume", {OURS: [None]})]))


# -- on a broker -----------------------------------------------------------------------------------------------------------

LIMIT = 60.0


@pytest.fixture
def stage(kafka: RunningKafka) -> Stage:
    return Stage(kafka, 1)


def says(*lines: str, status: int = 0) -> Contestant:
    """A contestant that prints lines and ends."""
    program = f"import sys; print({chr(10).join(lines)!r}); print('last words', file=sys.stderr); sys.exit({status})"
    return Contestant("liar", WORKS, lambda _job: [sys.executable, "-c", program])


@pytest.mark.broker
@pytest.mark.parametrize(
    ("contestant", "why"),
    [
        (says('{"messages": 1000, "seconds": 0.001}'), "0 committed records instead of 1,000"),
        (says("hello"), "printed no result: last words"),
        (says(status=3), "exit status 3: last words"),
        (Contestant("gone", WORKS, lambda _job: ["/no/such/program"]), "cannot be started"),
    ],
)
def test_who_has_not_done_it_has_no_rate(stage: Stage, contestant: Contestant, why: str) -> None:
    """A run counts if the brokers agree, and a failure has its reason."""
    with pytest.raises(RunFailed, match=why):
        run(stage, Race("transform", "transform", ()), contestant, {}, messages=1000, limit=LIMIT)


@pytest.mark.broker
def test_who_takes_too_long_is_ended(stage: Stage, tmp_path: Path) -> None:
    """With all its children: nothing of it disturbs the next one."""
    child = tmp_path / "child"
    script = f"sleep 300 & echo $! > {child}; sleep 300"
    sleeper = Contestant("sleeper", WORKS, lambda _job: ["/bin/sh", "-c", script])
    with pytest.raises(TookTooLong):
        run(stage, Race("produce", "produce", ()), sleeper, {}, messages=10, limit=1)
    assert not is_alive(int(child.read_text()))


def is_alive(pid: int) -> bool:
    """A zombie is not: whoever adopted it has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.broker
def test_only_what_is_committed_counts(stage: Stage) -> None:
    """An aborted transaction has written nothing, however many records are in the log."""
    with stage.fresh(2) as topic:
        producer = Producer({"bootstrap.servers": stage.bootstrap, "transactional.id": topic})
        producer.init_transactions()
        for count, end in ((3, producer.abort_transaction), (5, producer.commit_transaction)):
            producer.begin_transaction()
            for number in range(count):
                producer.produce(topic, b"", partition=number % 2)
            producer.flush()
            end()
        assert stage.records(topic) == 5


@pytest.mark.broker
def test_who_commits_less_than_all_has_no_rate(stage: Stage, fresh: Callable[[str], str]) -> None:
    """What it says of itself is not believed: its group has come as far as the brokers say."""
    topic, group = stage.filled(100, 10, 2), fresh("group")
    assert stage.committed(group, topic) == 0
    consumer = Consumer({"bootstrap.servers": stage.bootstrap, "group.id": group})
    consumer.commit(offsets=[TopicPartition(topic, 0, 50), TopicPartition(topic, 1, 20)], asynchronous=False)
    consumer.close()
    assert stage.committed(group, topic) == 70
    assert stage.records(topic) == 100
    with pytest.raises(RunFailed, match=r"committed 0 of 100 messages"):
        run(
            stage,
            Race("consume", "consume", (), size=10, partitions=2),
            says('{"messages": 100, "seconds": 1}'),
            {},
            messages=100,
            limit=LIMIT,
        )


@pytest.mark.broker
@pytest.mark.parametrize("work", ["produce", "consume", "transform", "exactly-once"])
@pytest.mark.parametrize("name", [OURS, BARE, "confluent_default"])
def test_a_small_race(stage: Stage, name: str, work: str) -> None:
    """Ours and the loops by hand do each work, as the brokers see it too."""
    everyone, _ = contestants([BARE, "confluent_default"])
    race = Race(work, work, (Entry(name),), batch=500 if work in {"transform", "exactly-once"} else None)
    found = run(stage, race, everyone[name], {}, messages=2000, limit=LIMIT)
    assert found.messages == 2000
    assert found.rate > 0
    assert found.first is not None
    assert found.rss is not None
    assert 0 < found.first < LIMIT
    assert found.rss > 10**7


@pytest.mark.broker
def test_two_workers_share_the_messages(stage: Stage) -> None:
    """Together they handle all, and produce all."""
    everyone, _ = contestants([BARE])
    race = Race("workers", "exactly-once", (Entry(BARE),), batch=100, workers=2)
    assert run(stage, race, everyone[BARE], {}, messages=2000, limit=LIMIT).transactions == 20


@pytest.mark.broker
def test_the_way_of_a_message_is_measured(stage: Stage) -> None:
    """Each message once; none takes less than no time."""
    everyone, _ = contestants([BARE])
    ways = measure(stage, everyone[BARE], "at-least-once", {}, 0.5)
    assert len(ways) == 50
    assert min(ways) > 0
