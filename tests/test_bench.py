"""The command ``bench``: what it counts, what it says and leaves behind; and the works that it, and others, measure."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("rich", reason="the report needs the extra `prove`")
pytest.importorskip("jinja2", reason="the report needs the extra `prove`")
pytest.importorskip("matplotlib", reason="the report needs the extra `prove`")

from kafka_guarantees.bench import command, plan, work
from kafka_guarantees.bench.figures import Bench, Latency, Row, Spread, row_of, spread
from kafka_guarantees.bench.latency import STAMP, Echoes
from kafka_guarantees.bench.plan import GUARANTEES, MEASURES, Measure, Plan
from kafka_guarantees.bench.process import Process, WorkFailed
from kafka_guarantees.bench.report import as_html, as_json, as_text
from kafka_guarantees.bench.run import PREFIX
from kafka_guarantees.cli import main
from kafka_guarantees.prove.page import WIDTH

from .conftest import committed, fill, read_all, values
from .test_cli import alive
from .test_prove import children
from .world import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from kafka_guarantees.testing.local_kafka import RunningKafka

COMMAND = (sys.executable, "-m", "kafka_guarantees", "bench")
SECRET = "hunter2-for-the-test"
NASTY = "<script>alert(1)</script>\x1b[31m"


# -- counting -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=3000))
def test_a_percentile_is_a_time_that_so_many_do_not_exceed(seconds: list[float]) -> None:
    """Each is one that was measured, at least that part of them is not above it, and of the next smaller one less."""
    found = spread(seconds)
    assert found is not None
    assert found.count == len(seconds)
    for part, milliseconds in ((0.5, found.p50), (0.99, found.p99), (0.999, found.p999)):
        times = [1000 * second for second in seconds]
        assert milliseconds in times
        assert sum(time <= milliseconds for time in times) >= part * len(times) - 1e-6
        assert sum(time < milliseconds for time in times) < part * len(times) + 1e-6


def test_of_no_messages_there_is_no_percentile() -> None:
    """What was not measured is not zero."""
    assert spread([]) is None


def test_a_row_is_the_median_of_its_rounds() -> None:
    """Rate and start-up: the median; memory: the most."""
    results = [
        {"messages": 100, "seconds": seconds, "first": first, "rss": rss}
        for seconds, first, rss in ((1.0, 0.1, 5), (2.0, 0.9, 9), (4.0, 0.2, 7))
    ]
    row = row_of(Measure("consume", "at-least-once"), results, None)
    assert (row.rate, row.first, row.memory) == (50.0, 0.2, 9)
    assert row.megabytes(1000) == 0.05


def test_the_price_is_relative_to_the_same_work_at_most_once() -> None:
    """And at most once costs what it costs."""
    bench = measured()
    assert {bench.price(row) for row in bench.rows if row.measure.guarantee == "at-most-once"} == {1.0}
    (produce,) = [row for row in bench.rows if row.measure.work == "produce" and row.measure.guarantee == "exactly-once"]
    assert bench.price(produce) == pytest.approx(produce.rate / bench.rows[0].rate)


def test_every_work_is_measured_under_every_guarantee() -> None:
    """Else a price is missing."""
    assert {(m.work, m.guarantee) for m in MEASURES} == {
        (w, g) for w in ("produce", "consume", "transform") for g in GUARANTEES
    }


def test_what_is_written_is_counted_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The announcement adds up all rounds, the watched one, and the messages that go there and back."""
    monkeypatch.setattr(plan, "MEASURES", [Measure("produce", "x"), Measure("consume", "x"), Measure("transform", "x", 2)])
    monkeypatch.setattr(plan, "TRANSFORMS", [Measure("transform", "x", 2)])
    few, many = Plan(100, 10, 3, 1, None), Plan(1000, 10, 3, 1, None)
    echoes = 2 * 3 * (1 + 50 + 300)
    assert few.records == 101 + 3 * 100 + 4 * 100 + echoes
    assert many.records == 1001 + 3 * 1000 + 4 * 100 + echoes, "a small batch takes no more than its transactions"


# -- the report -----------------------------------------------------------------------------------------------------------


def measured(setting: str = "8 partitions") -> Bench:
    """What a run could have measured."""
    rows = [
        Row(
            measure,
            [(1e6 / (n + 1)) * part for part in (0.9, 1.0, 1.3)],
            0.5,
            10**8,
            Spread(9, 1.0 + n, 9.0, 10.0) if measure.work == "transform" else None,
        )
        for n, measure in enumerate(MEASURES)
    ]
    latencies = [Latency(guarantee, Spread(2000, 2.5, 9.0, 20.0), 0) for guarantee in GUARANTEES]
    return Bench("kafka-guarantees 1", "kafka-guarantees bench", "2026-11-24", 60.0, 100, {"topics": setting}, rows, latencies)


def test_the_table_fits_and_has_every_figure() -> None:
    """Each row and each latency is in the text, which is no wider than it may be."""
    bench = measured(setting=NASTY)
    text = as_text(bench)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(f"{row.rate:,.0f}" in text for row in bench.rows)
    assert "…" not in text, "a column was cut off"
    assert text.count("2.5") >= len(GUARANTEES)
    assert "\x1b" not in text


def test_the_page_stands_alone() -> None:
    """No script, nothing from elsewhere, nothing that was given becomes markup; and the plot names every batch."""
    page = as_html(measured(setting=NASTY))
    assert NASTY not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"""<script|<link|<img|(src|href)=["'](?!#)|url\((?!#)""", page)
    assert page == as_html(measured(setting=NASTY)), "the same figures, the same bytes"
    for batch in ("1,000", "10,000"):
        assert f">{batch}</text>" in page
    assert all(guarantee in page for guarantee in GUARANTEES)


def test_the_json_has_what_the_table_has() -> None:
    """Rates of all rounds, and what is worked out of them."""
    bench = measured()
    data = json.loads(as_json(bench))
    assert data["format"] == 1
    assert [row["rate"] for row in data["rows"]] == [row.rate for row in bench.rows]
    assert data["rows"][0]["measure"] == {"work": "produce", "guarantee": "at-most-once", "batch": None, "in_flight": None}
    assert data["rows"][0]["price"] == 1.0
    assert data["latencies"][2]["there_and_back"]["p999"] == 20.0


def test_a_report_without_latencies_is_drawn() -> None:
    """Where nothing came back there is no time, and no crash after minutes of measuring."""
    bench = measured()
    bench = replace(bench, latencies=[Latency(guarantee, None, 7) for guarantee in GUARANTEES])
    bench = replace(bench, rows=[replace(row, readable=None) for row in bench.rows])
    assert "<svg" in as_html(bench)
    assert re.search(r"at-most-once +- +- +- +0 +7", as_text(bench))


# -- the command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", ["--messages 0", "--size x", "--seconds 0", "--replication 0", "exactly-once"])
def test_a_wrong_command_line_is_status_2(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A usage line, and nothing is started."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", *argv.split()])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: kafka-guarantees")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--set", "acks=1"), "acks='1' is refused"),
        (("--report", "/nowhere/bench.html"), "/nowhere"),
        (("--config", "/nowhere/client.properties"), "/nowhere/client.properties"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 2 and one line; no file is written and no broker is asked."""
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "-b", "127.0.0.1:1", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_the_extra_it_says_how_to_install_it(tmp_path: Path) -> None:
    """Before anything is measured: not when the report is due."""
    code = "import sys; sys.modules['jinja2'] = None; from kafka_guarantees.cli import main; sys.exit(main(['bench']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'kafka-guarantees[prove]'" in done.stderr


def test_a_right_that_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Status 1, and a line with all rights that it takes; where it is something else, the line does without."""
    monkeypatch.chdir(tmp_path)
    for code, rights in ((KafkaError.TOPIC_AUTHORIZATION_FAILED, True), (KafkaError.INVALID_REPLICATION_FACTOR, False)):

        def refuse(*_: object, code: int = code) -> Bench:
            raise KafkaException(KafkaError(code))

        monkeypatch.setattr(command, "bench", refuse)
        assert main(["bench", "-b", "127.0.0.1:1"]) == 1
        err = capsys.readouterr().err
        assert KafkaError(code).name() in err
        assert (f"prefix '{PREFIX}'" in err) is rights


# -- works ----------------------------------------------------------------------------------------------------------------


def job(kafka: RunningKafka, work_: str, fresh: Callable[[str], str], **more: Any) -> dict[str, Any]:
    names = {"group": fresh("group"), "transactional_id": fresh("tx")}
    return {"work": work_, "bootstrap": kafka.bootstrap, "messages": 300, "size": 10, "batch": None, **names, **more}


class Slow:
    """A client that takes a while to have everything acknowledged."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(1)

    def produce(self, *_: object) -> None:
        pass

    def flush(self, _timeout: float) -> None:
        time.sleep(0.1)


def test_the_clock_stops_when_all_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the last record was handed over, and not when the client is closed."""
    monkeypatch.setattr(work, "client", lambda _job: Slow())
    result = work.do({"work": "produce", "messages": 1, "size": 1, "output": "t"})
    assert 0.1 <= result["seconds"] < 1


@pytest.mark.broker
@pytest.mark.parametrize("guarantee", [None, *GUARANTEES])
def test_what_is_produced_is_there(
    guarantee: str | None, kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """As many records as were asked for, and the one that connects, each with a key and a value of that size."""
    topic = kafka_topic()
    result = work.do(job(kafka, "produce", fresh, output=topic, guarantee=guarantee, batch=100))
    records = read_all(kafka.bootstrap, topic)
    assert len(records) == 301
    assert {(len(record.key() or b""), len(record.value() or b"")) for record in records} == {(8, 10)}
    assert result["messages"] == 300
    assert result["transactions"] == (3 if guarantee == "exactly-once" else None)
    assert 0 < result["first"] < time.monotonic()
    assert result["seconds"] > 0
    assert result["rss"] > 10**7


@pytest.mark.broker
@pytest.mark.parametrize(
    ("work_", "guarantee"),
    [("transform", "at-most-once"), ("transform", None), ("exactly-once", None), ("transform", "exactly-once")],
)
def test_what_is_transformed_is_there_once(
    work_: str, guarantee: str | None, kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """A copy of each message, with its key, and no more; what was handled is committed."""
    source, sink = kafka_topic(), kafka_topic()
    numbers = [b"%d" % n for n in range(300)]
    fill(kafka.bootstrap, source, numbers)
    asked = job(kafka, work_, fresh, input=source, output=sink, guarantee=guarantee, batch=70)
    result = work.do(asked)
    assert values(read_all(kafka.bootstrap, sink)) == sorted(numbers)
    assert committed(kafka.bootstrap, asked["group"], source) == [300]
    assert result["messages"] == 300


@pytest.mark.broker
@pytest.mark.parametrize("guarantee", [None, *GUARANTEES])
def test_consuming_stops_after_so_many_messages(
    guarantee: str | None, kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """Also where there are more: what is handled is committed, and the clock stops."""
    source = kafka_topic()
    fill(kafka.bootstrap, source, [b"x"] * 900)
    asked = job(kafka, "consume", fresh, input=source, output=None, guarantee=guarantee)
    assert work.do(asked)["messages"] == 300
    (offset,) = committed(kafka.bootstrap, asked["group"], source)
    assert 300 <= offset <= (900 if guarantee == "at-most-once" else 300)  # which finishes a portion that is committed


@pytest.mark.broker
@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_an_echo_is_ready_then_copies_and_ends(
    guarantee: str, kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], tmp_path: Path
) -> None:
    """What comes after ``ready`` is copied; it ends after so many messages."""
    source, sink = kafka_topic(), kafka_topic()
    asked = job(kafka, "echo", fresh, input=source, output=sink, guarantee=guarantee, messages=2)
    with Process(asked, tmp_path) as process:
        process.ready()
        assert len(read_all(kafka.bootstrap, sink)) == 0
        fill(kafka.bootstrap, source, [b"1", b"2"])
        assert process.result()["messages"] == 2
    assert values(read_all(kafka.bootstrap, sink)) == [b"1", b"2"]


@pytest.mark.broker
def test_a_process_that_is_ended_early_leaves_its_group(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], tmp_path: Path
) -> None:
    """Else its group could not be removed until its session is over."""
    asked = job(kafka, "echo", fresh, input=kafka_topic(), output=kafka_topic(), guarantee="exactly-once")
    with Process(asked, tmp_path) as process:
        process.ready()
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})  # named, since its end would end its requests
    admin.delete_consumer_groups([asked["group"]])[asked["group"]].result()


@pytest.mark.broker
def test_a_work_that_fails_says_why(kafka: RunningKafka, fresh: Callable[[str], str], tmp_path: Path) -> None:
    """The last line of its traceback, and what it was to do."""
    asked = job(kafka, "consume", fresh, input=fresh("missing"), output=None, guarantee="at-least-once")
    with Process(asked, tmp_path) as process, pytest.raises(WorkFailed, match=r"consume, at-least-once: .*missing-"):
        process.result()


@pytest.mark.broker
def test_a_work_ends_with_its_driver(kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]) -> None:
    """A driver that is killed leaves nobody who consumes on and on: the end of stdin is the end."""
    asked = job(kafka, "echo", fresh, input=kafka_topic(), output=kafka_topic(), guarantee="at-least-once")
    argv = (sys.executable, "-m", "kafka_guarantees.bench.work", "-")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        process.stdin.close()
        assert process.wait(10) == 1


def test_a_copy_counts_once() -> None:
    """The first copy of a message is what a reader has waited for; a repeat is not another message."""
    echoes = Echoes({"bootstrap.servers": "127.0.0.1:1"}, "t", 20, 1)
    now = time.monotonic_ns()

    class Copy:
        def __init__(self, number: int, sent: int) -> None:
            self.value = lambda: STAMP.pack(number, sent) + b"...."

    for number, sent in ((51, now - 10**9), (51, now - 9 * 10**9)):
        echoes.note(Copy(number, sent))  # type: ignore[arg-type] # only its value is looked at
    assert list(echoes._times) == [51]
    assert 1.0 <= echoes._times[51] < 5.0


# -- the whole ------------------------------------------------------------------------------------------------------------


def mine(bootstrap: str) -> set[str]:
    """What is left on a cluster."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    groups = admin.list_consumer_groups().result().valid
    return {name for name in [*admin.list_topics(timeout=10).topics, *(g.group_id for g in groups)] if name.startswith(PREFIX)}


def gone(bootstrap: str) -> bool:
    """Whether nothing is left, as soon as all brokers know what the controller has answered already."""
    deadline = time.monotonic() + 10
    while mine(bootstrap) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not mine(bootstrap)


@pytest.mark.broker
def test_a_short_run(
    kafka: RunningKafka, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 0, every figure, a report in both forms; nothing is left on the cluster, and no secret is anywhere (S01)."""
    monkeypatch.setattr(plan, "ROUNDS", 1)
    config, report = tmp_path / "client.properties", tmp_path / "bench.html"
    config.write_text(f"sasl.password={SECRET}\ntransactional.id=mine\ngroup.id=mine\n")
    argv = ["-b", kafka.bootstrap, "--config", str(config), "--messages", "1000", "--seconds", "1", "--partitions", "2"]
    status = main(["bench", *argv, "--report", str(report)])
    out, err = capsys.readouterr()
    assert status == 0, err
    asked = Plan(1000, 100, 1, 2, None)
    assert f"Writes {asked.records:,} records" in err
    assert str(report) in out
    data = json.loads(report.with_suffix(".json").read_text())
    assert len(data["rows"]) == len(MEASURES)
    for row in data["rows"]:
        assert row["rate"] > 0
        assert row["first"] > 0
        assert (row["readable"] is not None) == (row["measure"]["work"] == "transform")
        if row["readable"] is not None:
            assert row["readable"]["count"] >= Measure(**row["measure"]).messages(1000), "few messages are all read"
    for latency in data["latencies"]:
        assert latency["missing"] == 0
        assert latency["there_and_back"]["count"] == 100
        assert 0 < latency["there_and_back"]["p50"] < 10_000
    assert "<svg" in report.read_text()
    assert gone(kafka.bootstrap)
    config.unlink()
    files = [path.read_text() for path in tmp_path.iterdir()]
    assert not [text for text in (out, err, *files) if SECRET in text]


@pytest.mark.broker
def test_ctrl_c_leaves_nothing_behind(kafka: RunningKafka, tmp_path: Path) -> None:
    """Ctrl-C in the middle: status 130, no process goes on, no report, and topics and groups are removed."""
    config, folder = tmp_path / "client.properties", tmp_path / "here"
    config.write_text(f"sasl.password={SECRET}\n")
    folder.mkdir()
    argv = [*COMMAND, "-b", kafka.bootstrap, "--messages", "1000", "--config", str(config)]
    with subprocess.Popen(argv, cwd=folder, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not any(topic.endswith("-in") for topic in mine(kafka.bootstrap)) or not (works := children(process.pid)):
            assert time.monotonic() < deadline, "nothing began"
            time.sleep(0.05)
        said = [Path(f"/proc/{pid}/cmdline").read_text() for pid in works if Path(f"/proc/{pid}").exists()]
        assert not [line for line in said if SECRET in line], "a secret is in everybody's ps"
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 130
    until(lambda: not any(map(alive, works)), "works that nobody waited for have noticed that their driver is gone")
    assert gone(kafka.bootstrap)
    assert not list(folder.iterdir())
