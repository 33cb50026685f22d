"""The command ``prove``: what it plans, refuses and leaves behind. Whether it catches liars is in test_prove_mutants."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Message, Producer
from confluent_kafka.admin import AdminClient

from kafka_guarantees import BrokerError, HandlerError, OffsetsLost
from kafka_guarantees._failures import Failures
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._serialization import Reading
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees.cli import main
from kafka_guarantees.prove.crew import Crew
from kafka_guarantees.prove.curves import lag, rates
from kafka_guarantees.prove.evidence import Event, Evidence, Sample, Seen, View
from kafka_guarantees.prove.faults import BROKERS, KINDS, Scene, fault, possible
from kafka_guarantees.prove.life import Job
from kafka_guarantees.prove.run import Plan, prove_on, storms_ignored
from kafka_guarantees.prove.schedule import CALM, WAVE, Step, schedule
from kafka_guarantees.prove.screen import Screen
from kafka_guarantees.prove.segments import batches, dump
from kafka_guarantees.prove.topics import PREFIX
from kafka_guarantees.prove.worker import explained

from .conftest import fill, read_all
from .world import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from kafka_guarantees.testing.local_kafka import LocalKafka, RunningKafka

GUARANTEES = ("at-most-once", "at-least-once", "exactly-once")
SCENE = Scene(("transformer-0", "transformer-1", "consumer-0", "sender-0"), 3, session=3.0, transaction=5.0, poll=6.0)
COMMAND = (sys.executable, "-m", "kafka_guarantees", "prove")
SECRET = "hunter2-for-the-test"


# -- the plan -------------------------------------------------------------------------------------------------------------


def told(steps: list[list[Step]]) -> list[tuple[float, str, object]]:
    return [(step.at, step.fault.text, step.aim) for lane in steps for step in lane]


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_a_seed_repeats_the_schedule(guarantee: str) -> None:
    """The same seed gives the same faults at the same times to the same targets; another seed does not."""
    faults = possible(guarantee, brokers=True, connections=True)
    first = told(schedule(faults, 7, 120, SCENE))
    assert first == told(schedule(possible(guarantee, brokers=True, connections=True), 7, 120, SCENE))
    assert first != told(schedule(faults, 8, 120, SCENE))


@pytest.mark.parametrize("seed", range(20))
def test_a_minute_has_every_fault_and_calms(seed: int) -> None:
    """Within the default duration every fault that is possible is done, and each wave begins with a calm."""
    lanes = schedule(possible("exactly-once", brokers=True, connections=True), seed, 60, SCENE)
    assert {step.fault.name for lane in lanes for step in lane} >= set(KINDS) - {
        "rolling-restart",
        "pause-broker",
        "kill-broker",
    }
    assert {step.fault.name for lane in lanes for step in lane} & {"rolling-restart", "pause-broker", "kill-broker"}
    for step in (step for lane in lanes for step in lane if step.fault.lane != BROKERS):
        assert step.at % WAVE >= CALM
        assert step.at < 60


def test_one_broker_is_hurt_at_a_time() -> None:
    """Two of three must be there: else nothing is shown but that nothing works."""
    (steps,) = schedule([fault("kill-broker", "exactly-once"), fault("pause-broker", "exactly-once")], 3, 600, SCENE)
    assert len(steps) > 20
    for one, next_one in pairwise(steps):
        assert next_one.at >= one.at + one.aim.seconds


def test_a_user_s_cluster_keeps_its_brokers() -> None:
    """What is not ours is not hurt: neither brokers, nor connections that cannot be looked into."""
    assert {one.name for one in possible("exactly-once", brokers=False, connections=True)} == set(KINDS) - {
        "kill-broker",
        "pause-broker",
        "rolling-restart",
    }
    assert {one.lane for one in possible("exactly-once", brokers=False, connections=False)} == {"workers"}


# -- the command line -----------------------------------------------------------------------------------------------------

REFUSED = {
    "--faults kill-everybody": "there is no fault 'kill-everybody'",
    "--faults hold-frame:EndTransaction": "there is no request 'EndTransaction'",
    "--faults kill-worker:EndTxn": "kill-worker is not a fault of requests",
    "-b 127.0.0.1:1 --faults kill-broker": "the brokers are not ours to hurt",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_is_refused_before_anything_starts(
    arguments: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 2 and one line; no file is written and no broker is started or asked."""
    monkeypatch.chdir(tmp_path)
    assert main(["prove", "exactly-once", *arguments.split()]) == 2
    assert REFUSED[arguments] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_breaks_the_guarantee_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A proof of a weaker configuration would prove something else."""
    file = tmp_path / "client.properties"
    file.write_text("bootstrap.servers=127.0.0.1:1\nacks=1\n")
    assert main(["prove", "exactly-once", "--config", str(file), "--report", str(tmp_path / "out.html")]) == 2
    assert "acks='1' is refused" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["client.properties"]


@pytest.mark.parametrize(
    ("guarantee", "setting", "more"),
    [
        ("exactly-once", "delivery.timeout.ms=10000", ()),
        ("at-least-once", "linger.ms=6000", ()),
        ("at-least-once", "partition.assignment.strategy=range", ("--protocol", "consumer")),
    ],
)
def test_a_configuration_that_contradicts_a_proof_s_own_is_refused(  # noqa: PLR0917 - pytest gives them
    guarantee: str, setting: str, more: tuple[str, ...], kafka: RunningKafka, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each worker would end at once, and the verdict would be that the guarantee is broken."""
    file = tmp_path / "client.properties"
    file.write_text(f"bootstrap.servers={kafka.bootstrap}\n{setting}\n")
    where = ["--config", str(file), "--report", str(tmp_path / "out.html")]
    assert main(["prove", guarantee, *where, "--duration", "5", "--faults", "none", *more]) == 2
    err = capsys.readouterr().err
    assert setting.partition("=")[0] in err
    assert "leave what contradicts that out of the configuration" in err
    assert not list(tmp_path.glob("*.html"))
    until(lambda: not mine(kafka.bootstrap), "what was made for it is removed")


@pytest.mark.parametrize(
    ("setting", "argument", "said"),
    [
        ("group.protocol=consumer", "--protocol=classic", "contradict each other"),
        ("group.protocol=classic", "--protocol=consumer", "contradict each other"),
        ("", "--faults=hold-frame:EndTxn", "makes no such request"),
    ],
)
def test_what_would_show_nothing_is_refused(
    setting: str, argument: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Workers that end at once, or a fault that hits nothing, would leave a verdict that says nothing."""
    file = tmp_path / "client.properties"
    file.write_text(f"bootstrap.servers=127.0.0.1:1\n{setting}\n")
    assert main(["prove", "at-least-once", argument, "--config", str(file), "--report", str(tmp_path / "out.html")]) == 2
    assert said in capsys.readouterr().err


def test_two_proofs_do_not_share_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Their histories would be mixed, and accuse the library of everything."""
    (tmp_path / "out-files").mkdir()
    with (tmp_path / "out-files" / "driver.log").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main(["prove", "exactly-once", "--report", str(tmp_path / "out.html")]) == 2
    assert "another proof writes into" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out.json", "folder", "denied/out.html"])
@pytest.mark.parametrize("command", [("prove", "exactly-once"), ("bench", "-b", "127.0.0.1:1")])
def test_a_report_that_cannot_be_written_is_refused_before_it_is_earned(
    name: str, command: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The JSON would overwrite the page, or ten minutes would end with an error in place of a verdict."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "denied").mkdir()
    (tmp_path / "denied" / "out.json").mkdir()
    assert main([*command, "--report", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / name).removesuffix(".html") in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("whose", ["others may write to it", "it is a link"])
def test_a_folder_that_others_may_have_prepared_is_refused(
    whose: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its files could be links to the operator's own, which would be emptied."""
    folder, theirs = tmp_path / "out-files", tmp_path / "theirs"
    theirs.mkdir()
    if whose == "it is a link":
        folder.symlink_to(theirs)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    assert main(["prove", "exactly-once", "--report", str(tmp_path / "out.html")]) == 2
    assert "is somebody else's, or others may write to it" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_a_plan_does_not_show_its_passwords() -> None:
    """Tracebacks with locals, and error collectors, print what is at hand."""
    secret = {"sasl.password": "s3cr3t"}
    job = Job("exactly-once", "sender-0", 1, secret, "in", "out", 1, "h", "1", 1.0, 0.0)
    assert "s3cr3t" not in repr(Plan("exactly-once", [], 1, Path(), config=secret)) + repr(job)
    assert "s3cr3t" in str(job)


def test_with_tls_connections_are_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A proxy cannot look into TLS, and says so."""
    file = tmp_path / "client.properties"
    file.write_text("bootstrap.servers=127.0.0.1:1\nsecurity.protocol=SSL\n")
    assert main(["prove", "at-least-once", "--config", str(file), "--faults", "cut"]) == 2
    assert "TLS" in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_install_it(tmp_path: Path) -> None:
    """Before anything is started: not after ten minutes, when the report is due."""
    code = "import sys; sys.modules['jinja2'] = None; from kafka_guarantees.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "prove", "exactly-once"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "jinja2" in done.stderr
    assert "pip install 'kafka-guarantees[prove]'" in done.stderr
    assert not list(tmp_path.iterdir())


# -- on a cluster that runs -----------------------------------------------------------------------------------------------


def mine(bootstrap: str) -> set[str]:
    """What is left of proofs on a cluster."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    groups = admin.list_consumer_groups().result().valid
    return {name for name in [*admin.list_topics(timeout=10).topics, *(g.group_id for g in groups)] if name.startswith(PREFIX)}


@pytest.mark.broker
@pytest.mark.parametrize(("guarantee", "protocol"), list(zip(GUARANTEES, ("cooperative", "consumer", "classic"), strict=True)))
def test_a_short_proof_on_a_cluster_that_runs(
    kafka: RunningKafka, tmp_path: Path, capsys: pytest.CaptureFixture[str], guarantee: str, protocol: str
) -> None:
    """Status 0, a report in both forms, histories; nothing is left on the cluster, and no secret is anywhere (S01)."""
    out, config = tmp_path / "out.html", tmp_path / "client.properties"
    config.write_text(f"bootstrap.servers={kafka.bootstrap}\nsasl.password={SECRET}\n")
    arguments = ["--config", str(config), "--duration", "14", "--workers", "2", "--partitions", "4", "--report", str(out)]
    status = main(["prove", guarantee, *arguments, "--protocol", protocol, "--seed", "5"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert f"kept  {guarantee}" in said
    proof = json.loads(out.with_suffix(".json").read_text())
    assert proof["held"]
    assert not proof["troubles"]
    assert len(proof["faults"]) > 5
    assert {verdict["check"] for verdict in proof["verdicts"] if verdict["examined"]} >= {"inconsistent offset", "drained"}
    assert "--seed 5" in proof["command"]
    assert guarantee in out.read_text()
    assert (tmp_path / "out-files" / "transformer-0.history").stat().st_size
    assert not mine(kafka.bootstrap)
    config.unlink()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert SECRET not in said


@pytest.mark.broker
def test_ctrl_c_leaves_nothing_behind(kafka: RunningKafka, tmp_path: Path) -> None:
    """Ctrl-C in the middle: status 130, no worker goes on, and topics and groups are removed."""
    command = [*COMMAND, "exactly-once", "-b", kafka.bootstrap, "--duration", "60", "--report", str(tmp_path / "out.html")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + 30
        files = tmp_path / "out-files"
        while not any(path.stat().st_size for path in files.glob("transformer-*.history")):
            assert time.monotonic() < deadline, "no worker began"
            time.sleep(0.1)
        workers = children(process.pid)
        assert workers
        commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in workers]
        assert not [line for line in commands if "bootstrap" in line], "settings, and with them secrets, are in everybody's ps"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Interrupted, so there is no report" in said
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert not mine(kafka.bootstrap)


@pytest.mark.broker
def test_workers_end_with_a_driver_that_is_killed(kafka: RunningKafka, tmp_path: Path) -> None:
    """SIGKILL of the driver: its workers see the end of their stdin."""
    command = [*COMMAND, "at-least-once", "-b", kafka.bootstrap, "--faults", "none", "--report", str(tmp_path / "out.html")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 30
        while not list((tmp_path / "out-files").glob("transformer-*.history")):
            assert time.monotonic() < deadline, "no worker began"
            time.sleep(0.1)
        workers = children(process.pid)
        process.kill()
    deadline = time.monotonic() + 10
    while left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"{left} go on"
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_exactly_once_under_all_faults_at_once(kafka_cluster: LocalKafka, tmp_path: Path) -> None:
    """Three brokers, and everything that can be done to workers, brokers and connections."""
    faults = possible("exactly-once", brokers=True, connections=True)
    plan = Plan("exactly-once", faults, int.from_bytes(os.urandom(2), "big"), tmp_path, duration=40, brokers=3)
    with storms_ignored(), Screen() as screen:
        proof = prove_on(plan, {"bootstrap.servers": kafka_cluster.bootstrap}, screen, kafka=kafka_cluster)
    complaints = [verdict for verdict in proof.verdicts if verdict.found or verdict.lacking]
    assert proof.outcome == "held", (plan.seed, proof.troubles, complaints)
    assert {one.lane for name in {done.name for done in proof.faults} for one in [KINDS[name]]} == {
        "workers",
        "brokers",
        "connections",
    }


# -- what is kept and drawn -----------------------------------------------------------------------------------------------


@pytest.mark.broker
def test_a_dump_tells_producers_epochs_and_markers(
    kafka: LocalKafka, kafka_topic: Callable[..., str], tmp_path: Path, fresh: Callable[[str], str]
) -> None:
    """What readers of a topic do not see, and what explains nearly every anomaly."""
    topic = kafka_topic()
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": fresh("tx")})
    producer.init_transactions(30)
    for end in (producer.commit_transaction, producer.abort_transaction):
        producer.begin_transaction()
        producer.produce(topic, b"x")
        producer.flush()
        end(30)
    fill(kafka.bootstrap, topic, [b"y"])
    assert len(read_all(kafka.bootstrap, topic)) == 2  # the markers are written once a reader has got to the end
    dump(kafka.data_dir, [topic], tmp_path)
    (path,) = tmp_path.glob(f"{topic}-*.dump")
    lines = path.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["0-0", "1-1", "2-2", "3-3", "4-4"]
    assert "in a transaction" in lines[0]
    assert "COMMIT" in lines[1]
    assert "ABORT" in lines[3]
    assert "in a transaction" not in lines[4]
    assert {" ".join(line.split()[1:5]) for line in lines[:4]} == {" ".join(lines[0].split()[1:5])}
    assert list(tmp_path.glob("__transaction_state-*"))


def test_a_segment_that_is_cut_off_is_read_as_far_as_it_goes() -> None:
    """A broker that is killed leaves half a batch; garbage is no reason to fail in the middle of an anomaly."""
    assert not list(batches(b""))
    assert not list(batches(b"\0" * 40))
    assert not list(batches(b"\xff" * 400))


def test_curves_count_what_the_evidence_has() -> None:
    """Rates per second, and the lag of the transformers' group at each sample."""
    second = 1_000_000_000

    def event(at: float, what: str, id_: str, who: str = "sender-0") -> Event:
        return Event(int(at * second), who, 1, what, "invoke", id=id_)

    events = [
        event(10.0, "send", "a"),
        event(10.9, "send", "b"),
        event(11.5, "send", "c"),
        event(11.6, "handle", "a", "transformer-0"),
        event(11.7, "handle", "a", "consumer-0"),
    ]
    there = [Seen(0, 5, "k", "a"), Seen(0, 7, "k", "b"), Seen(1, 0, "k", "c")]
    samples = [Sample(11 * second, 11 * second, {}), Sample(12 * second, 12 * second, {0: 6})]
    evidence = Evidence("at-least-once", events, View(there, there), View([], []), {"transformer": samples, "consumer": []})
    assert rates(evidence, [12 * second], 10 * second) == [(0.0, 2, 0, 0), (1.0, 1, 1, 0), (2.0, 0, 0, 1)]
    assert lag(evidence, 10 * second) == [(1.0, 2), (2.0, 2)]


def test_every_fault_says_what_it_stands_for() -> None:
    """``--faults`` lists names; the class behind each says what it does."""
    assert all(kind.__doc__ for kind in KINDS.values())


def plan_of(**more: Any) -> Plan:
    return Plan("exactly-once", [], 1, Path("/nowhere"), **more)


def test_time_outs_fit_together() -> None:
    """A zombie's transaction, a member's session and its polls end in an order that the settings allow."""
    plan = plan_of(session=6000)
    assert plan.session < plan.transaction
    assert plan.session < plan.poll


HANGS = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.readline()
print("ready", file=sys.stderr, flush=True)
def where_it_hangs(): time.sleep(600)
where_it_hangs()
"""


def test_a_worker_that_does_not_end_says_where_it_is(tmp_path: Path) -> None:
    """Else nobody can tell in which call it hung."""
    job = Job("exactly-once", "sender-0", 0, {}, "in", "out", 1, str(tmp_path / "history"), "1", 1.0, 0.0)
    with Crew([job], tmp_path, (sys.executable, "-X", "faulthandler", "-c", HANGS)) as crew:
        crew.start("sender-0")
        deadline = time.monotonic() + 30
        while "ready" not in crew.last_words("sender-0"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        crew.stop("sender-0", within=0.1)
        (trouble,) = crew.troubles
    assert "did not end" in trouble
    assert "where_it_hangs" in trouble


def test_what_a_fault_explains_is_no_trouble() -> None:
    """A handler that is made slow twice in a row ends a run, as it should; without that nothing explains it."""
    batch: Any = SimpleNamespace(served=time.monotonic() - 20)
    message = Message(topic="t", partition=0, offset=5)
    config = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "max.poll.interval.ms": 10_000, "session.timeout.ms": 6000}
    failures = Failures(
        resolve(Guarantee.AT_LEAST_ONCE, config), Lifecycle("test"), Reading(None, None), retry=None, dead_letter=None
    )
    failures.given_away([message], batch)
    with pytest.raises(HandlerError) as caught:
        failures.given_away([message], batch)
    assert explained(caught.value, slowed=1)
    assert not explained(caught.value, slowed=0)
    of_the_handler = HandlerError("it raised, for the second time")
    of_the_handler.__cause__ = ValueError()
    assert not explained(of_the_handler, slowed=1)
    assert explained(BrokerError("they come and go"), slowed=0)
    assert not explained(OffsetsLost("why"), slowed=1)
