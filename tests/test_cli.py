"""Laws of the command line: what it prints, what it answers to mistakes, and that it leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from confluent_kafka.admin import AdminClient

from kafka_guarantees import AtLeastOnce, ExactlyOnce, __version__, _preflight
from kafka_guarantees.cli import _config, main, properties
from kafka_guarantees.demo import topics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kafka_guarantees.testing.local_kafka import RunningKafka

COMMAND = (sys.executable, "-W", "error", "-m", "kafka_guarantees")
DEADLINE = 60.0


# -- explain --------------------------------------------------------------------------------------------------------------


def test_explain_prints_what_the_class_explains(capsys: pytest.CaptureFixture[str]) -> None:
    """``explain`` is the class's own ``explain()``, printed."""
    assert main(["explain", "at-least-once", "--set", "linger.ms=20", "--set", "group.id = offers"]) == 0
    assert capsys.readouterr().out == f"{AtLeastOnce.explain({'linger.ms': '20', 'group.id': 'offers'})}\n"


def test_set_wins_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A setting of the command line replaces that of the file; the others of the file stay."""
    file = tmp_path / "client.properties"
    file.write_text("# offers\nlinger.ms = 1\n\ngroup.id=offers\n")
    assert main(["explain", "exactly-once", "--config", str(file), "--set", "linger.ms=7"]) == 0
    assert capsys.readouterr().out == f"{ExactlyOnce.explain({'linger.ms': '7', 'group.id': 'offers'})}\n"


def test_the_command_line_wins_whatever_name_the_file_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Librdkafka has two names for some settings; what is given twice is no contradiction there."""
    file = tmp_path / "client.properties"
    file.write_text("metadata.broker.list=a:1\nqueue.buffering.max.ms=1\nclient.id=offers\n")
    wanted = {"client.id": "offers", "linger.ms": "7", "bootstrap.servers": "a:3"}
    assert _config(file, [("linger.ms", "7"), ("bootstrap.servers", "a:2")], "a:3") == wanted
    assert _config(file, ())["bootstrap.servers"] == "a:1"
    command = ["explain", "at-least-once", "--config", str(file), "--set", "linger.ms=7", "--set", "bootstrap.servers=a:2"]
    assert main(command) == 0
    assert "a:2" in capsys.readouterr().out


def test_an_unsafe_setting_is_one_message_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    """What the guarantee refuses is said once, on stderr, without a traceback and without a table."""
    assert main(["explain", "exactly-once", "--set", "acks=1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kafka-guarantees: acks='1' is refused: ")
    assert err.count("\n") == 1


def test_a_weaker_setting_is_marked_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that is allowed and weaker is marked in the table; warnings being errors does not change that."""
    assert main(["explain", "at-least-once", "--set", "acks=1"]) == 0
    assert "! acks" in capsys.readouterr().out


def test_a_file_that_is_not_there_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that cannot be read is named."""
    assert main(["explain", "at-most-once", "--config", str(tmp_path / "none")]) == 2
    assert f"'{tmp_path / 'none'}'" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"linger.ms=1\nsasl.password s3cr3t\n", b"linger.ms=1\n=s3cr3t\n"])
def test_a_broken_line_is_named_by_its_number(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that is no setting is told by file and number, and not shown: it may hold a secret."""
    file = tmp_path / "client.properties"
    file.write_bytes(content)
    assert main(["explain", "at-most-once", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert f"{file}: line 2 " in err
    assert "s3cr3t" not in err


def test_a_file_of_another_encoding_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not UTF-8 is an error of the user, not a traceback."""
    file = tmp_path / "client.properties"
    file.write_bytes(b"client.id=\xff\n")
    assert main(["explain", "at-most-once", "--config", str(file)]) == 2
    assert "not a text in UTF-8" in capsys.readouterr().err


def test_properties_keep_what_belongs_to_the_value() -> None:
    """Only the first = separates, and # begins a comment only at the beginning of a line."""
    text = "  # comment\n\nssl.ca.pem = a=b#c \r\nclient.id=\n"
    assert properties(text) == {"ssl.ca.pem": "a=b#c", "client.id": ""}


@pytest.mark.parametrize("separator", ["\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_a_password_is_one_line(separator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """S01: what others call a line break does not make a line, whose beginning would be shown as the name of a setting."""
    file = tmp_path / "client.properties"
    file.write_bytes(f"sasl.password=ab{separator}s3cr3t=d\nlinger.ms=5\n".encode())
    assert main(["explain", "at-least-once", "--config", str(file)]) == 0
    assert "s3cr3t" not in "".join(capsys.readouterr())


def test_a_mark_of_the_byte_order_is_no_part_of_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Editors of Windows put it there."""
    file = tmp_path / "client.properties"
    file.write_bytes(b"\xef\xbb\xbfgroup.id=offers\r\n")
    assert main(["explain", "at-least-once", "--config", str(file)]) == 0
    assert "offers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("explain",),
        ("explain", "twice"),
        ("explain", "at-most-once", "--set", "sasl.password:s3cr3t"),
        ("broker", "--brokers", "2"),
        ("demo", "--kills", "0"),
        ("demo", "--rate", "many"),
        ("demo", "--kills", "²"),
    ],
)
def test_a_wrong_command_line_is_status_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """A command line that makes no sense ends with a usage line on stderr, and shows no secret."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: kafka-guarantees")
    assert "s3cr3t" not in err


def test_a_kafka_that_does_not_answer_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``demo`` says in one line that nobody answers where KAFKA_GUARANTEES_BOOTSTRAP points to, and fails."""
    monkeypatch.setenv("KAFKA_GUARANTEES_BOOTSTRAP", "127.0.0.1:1")
    monkeypatch.setattr(topics, "ANSWER", 0.5)
    assert main(["demo"]) == 1
    assert re.fullmatch(r"kafka-guarantees: .*127\.0\.0\.1:1.*\n", capsys.readouterr().err)


def test_a_reader_that_went_away_is_no_error() -> None:
    """``kafka-guarantees explain ... | head``."""
    pipe = f"{' '.join(COMMAND)} explain at-least-once --set bootstrap.servers=b | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() in {"0", "141"}  # by whether it was faster
    assert not done.stderr


def test_output_that_is_not_utf_8_says_what_it_can() -> None:
    """A terminal of another encoding gets escapes in place of nothing."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [*COMMAND, "explain", "at-least-once", "--set", "bootstrap.servers=b", "--set", "client.id=Zürich"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "acks" in done.stdout


def test_version() -> None:
    """``python -m kafka_guarantees`` is the same command, and says the version of the package."""
    ran = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout == f"kafka-guarantees {__version__}\n"


def test_the_command_line_is_cheap_to_import() -> None:
    """What only one command needs is not loaded before that command runs."""
    code = "import sys, kafka_guarantees.cli; print([m for m in sys.modules if m.startswith('kafka_guarantees.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "kafka_guarantees.cli" in loaded
    assert not re.search(r"kafka_guarantees\.(demo|testing)", loaded)


# -- processes ------------------------------------------------------------------------------------------------------------


@contextmanager
def started(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs meanwhile, without a Kafka that it could use, and that is gone afterwards."""
    env = {name: value for name, value in os.environ.items() if name != "KAFKA_GUARANTEES_BOOTSTRAP"}
    with subprocess.Popen([*COMMAND, *argv], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.kill()


def line_with(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """Wait for a line of its output; pytest's timeout is the deadline."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if match := re.search(pattern, line):
            return match
    pytest.fail(f"{pattern!r} did not come: {seen}")


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and that they have started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {DEADLINE} s in vain until {what}")
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_broker_runs_until_it_is_told_to_stop(number: signal.Signals) -> None:
    """``broker`` prints an address that works, and ends with status 0 and without its Kafka on Ctrl-C or SIGTERM."""
    with started("broker") as process:
        bootstrap = line_with(process, r"Kafka runs at (\S+)")[1]
        line_with(process, f"export KAFKA_GUARANTEES_BOOTSTRAP={bootstrap}")
        assert len(AdminClient({"bootstrap.servers": bootstrap}).list_topics(timeout=10).brokers) == 1
        children = descendants(process.pid)
        assert children
        process.send_signal(number)
        assert process.wait(DEADLINE) == 0
    wait_until(lambda: not any(map(alive, children)), "its processes are gone")


@needs_proc
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_demo_leaves_no_process_behind(
    number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However ``demo`` is ended in the middle, its worker and its Kafka end with it; where it can, it tidies up."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with started("demo", "--kills", "100") as process:
        line_with(process, r"[1-9]\d* handled")
        children = descendants(process.pid)
        assert len(children) >= 3, "a worker, the keeper of the broker, the broker"
        process.send_signal(number)
        assert process.wait(DEADLINE) == status
    wait_until(lambda: not any(map(alive, children)), "its processes are gone")
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())


# -- preflight ------------------------------------------------------------------------------------------------------------


@pytest.mark.broker
def test_preflight_says_what_is_unsafe(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 0 and a report where nothing is unsafe; 1 where something is, with the command; -b wins over the settings."""
    there, missing = kafka_topic(), fresh("missing")
    argv = ["preflight", "exactly-once", "-b", kafka.bootstrap, "--set", "bootstrap.servers=127.0.0.1:1", "-t", there]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("exactly-once, cluster ")
    assert f"topic '{there}': replication factor: 1" in out
    assert main([*argv, "--topic", missing, "--dead-letter", fresh("dead")]) == 1
    out = capsys.readouterr().out
    assert f"--create --topic {missing} " in out
    assert "dead letter topic 'dead-" in out


@pytest.mark.broker
def test_preflight_as_data(
    kafka: RunningKafka, fresh: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--format json`` prints the report for other programs; the settings may come from a file."""
    file = tmp_path / "client.properties"
    file.write_text(f"bootstrap.servers={kafka.bootstrap}\ngroup.id=offers\n")
    missing = fresh("missing")
    assert main(["preflight", "at-least-once", "--config", str(file), "-t", missing, "--format", "json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["guarantee"], report["ok"]) == ("at-least-once", False)
    assert {(row["level"], row["subject"]) for row in report["findings"]} >= {
        ("unsafe", f"topic '{missing}'"),
        ("warning", "internal topic '__consumer_offsets'"),
    }


def test_preflight_without_an_answer_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing unsafe was seen, but nothing was seen at all: that is no success. It says what librdkafka knows of the reason."""
    monkeypatch.setattr(_preflight, "preflight", partial(_preflight.preflight, timeout=0.3))
    assert main(["preflight", "at-most-once", "-b", "127.0.0.1:1"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("at-most-once, no cluster answered: 1 unknown\n")
    assert "Connection refused" in " ".join(out.split())


@pytest.mark.parametrize("argv", [(), ("-b", "127.0.0.1:1", "--set", "acks=1"), ("--config", "/nowhere/client.properties")])
def test_preflight_with_settings_that_cannot_be_is_status_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """No address, a setting that the guarantee refuses, a file that is not there: said before anybody is asked."""
    assert main(["preflight", "exactly-once", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kafka-guarantees: ")


# -- dead letters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["dead-letters"],
        ["dead-letters", "list"],
        ["dead-letters", "list", "dlq", "--since", "yesterday"],
        ["dead-letters", "list", "dlq", "--limit", "0"],
        ["dead-letters", "list", "dlq", "--format", "xml"],
        ["dead-letters", "show", "dlq"],
        ["dead-letters", "show", "dlq", "0"],
        ["dead-letters", "show", "dlq", "-1:0"],
        ["dead-letters", "show", "dlq", "0:99999999999999999999"],
        ["dead-letters", "show", "dlq", "0:1", "--raw", "--full"],
        ["dead-letters", "replay", "dlq"],
        ["dead-letters", "replay", "dlq", "0:1", "--all"],
        ["dead-letters", "replay", "dlq", "--all", "--set", "s3cr3t"],
    ],
)
def test_a_wrong_command_about_dead_letters_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Usage and status 2, before anybody is asked; nothing is replayed that was not named."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: kafka-guarantees dead-letters")
    assert "s3cr3t" not in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["list", "dlq"], "bootstrap"),
        (["show", "dlq", "0:1"], "bootstrap"),
        (["replay", "dlq", "0:1", "--origin", "orders", "-b", "127.0.0.1:1"], "--all"),
        (["list", "dlq", "--config", "/no/such/file"], "/no/such/file"),
        (["list", "dlq", "-b", "127.0.0.1:1", "--set", "no.such.setting=1"], "no.such.setting"),
    ],
)
def test_settings_that_cannot_be_are_one_message(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, and a line that says which."""
    assert main(["dead-letters", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"kafka-guarantees: [^\n]*\n", err)
    assert says in err
