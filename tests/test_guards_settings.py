"""Guards of settings, of preflight and of replays, one by one: each is removed by a mutant that no other test saw."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import KafkaError, Message

from kafka_guarantees import TransactionAborted
from kafka_guarantees._dead_letters import DeadLetter
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._preflight import Finding, Preflight, PreflightReport, preflight
from kafka_guarantees._preflight.asking import _topic
from kafka_guarantees._preflight.commands import Commands
from kafka_guarantees._settings import Guarantee, librdkafka, resolve
from kafka_guarantees._settings.values import HIDDEN, shown
from kafka_guarantees.dead_letters import reading, replay
from kafka_guarantees.dead_letters.reading import Entry
from kafka_guarantees.errors import UnsafeConfigError

from .test_preflight import ALO, cluster, found, settings, topic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SECRET = "s3cret/w0rd"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (SECRET, f"cannot load {SECRET}.so: no such file"),  # librdkafka puts an ending behind it
        (f"/keys/{SECRET} of mine", f"'/keys/{SECRET} of mine' is no key"),  # of several words
        (f"{SECRET};{SECRET}", f"unknown: {SECRET}"),  # it quotes a part
        ("pw", "'pw' is too short"),
        ("pw", "cannot load pw.so: no such file"),
        ("p+", "'p+a' is no key"),
    ],
)
def test_no_part_of_a_secret_is_in_the_words_of_librdkafka(value: str, said: str) -> None:
    """S01: an error of a constructor goes into logs and trackers, with what librdkafka quotes."""
    error = librdkafka.creation_failure(ValueError(said), {"ssl.key.password": value})
    assert SECRET not in str(error)
    assert "pw" not in str(error)
    assert HIDDEN in str(error)


def test_a_secret_of_a_letter_does_not_hide_the_words_of_librdkafka() -> None:
    """They say what is wrong."""
    said = "Failed to create producer: sasl.username and sasl.password must be set"
    error = librdkafka.creation_failure(ValueError(said), {"sasl.username": "a"})
    assert said in str(error)
    assert error.setting == "sasl.username"


def test_where_no_setting_is_named_the_configuration_is_refused() -> None:
    """There is none of that name that the user could look for."""
    error = librdkafka.creation_failure(ValueError("sasl.username and sasl.password must be set"), {"sasl.mechanism": "PLAIN"})
    assert str(error).startswith("the configuration is refused: librdkafka cannot make a client with it (sasl.username and")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable.idempotence", "true sasl.password=hunter2"),
        ("acks", "all,sasl.password=hunter2"),
        ("linger.ms", "5;key=x"),
    ],
)
def test_two_settings_on_one_line_are_not_shown(name: str, value: str) -> None:
    """S01: the second one may be a password."""
    assert shown(name, value) == HIDDEN


def test_whoever_asks_about_the_cluster_can_log_in_with_tokens() -> None:
    """S02: without the callback preflight and the ids of topics get no answer from brokers that take OAUTHBEARER only."""
    config = {"bootstrap.servers": "h:1", "group.id": "g", "security.protocol": "sasl_ssl", "sasl.mechanism": "OAUTHBEARER"}
    admin = resolve(Guarantee.AT_LEAST_ONCE, {**config, "oauth_cb": print}).admin
    assert admin["oauth_cb"] is print
    assert "group.id" not in admin


def test_what_a_plugin_brings_is_not_blamed_for_another_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user would look for a mistake in a property that is right, and without its plugin nobody knows."""

    def complaint(config: Mapping[str, object]) -> str:
        if "of.a.plugin" in config and "plugin.library.paths" not in config:
            return "no such property"
        return "" if config.get("linger.ms", 5) == 5 else "not accepted"

    monkeypatch.setattr(librdkafka, "_complaint", complaint)
    with pytest.raises(UnsafeConfigError) as caught:
        librdkafka.check({"of.a.plugin": "1", "plugin.library.paths": "x", "linger.ms": -1})
    assert caught.value.setting == "linger.ms"


# -- preflight ---------------------------------------------------------------------------------------------------------------


def answered(value: object) -> Any:
    return SimpleNamespace(exception=lambda _timeout: None, result=lambda: value)


def test_a_topic_is_as_safe_as_its_worst_partition() -> None:
    """B01: one that was left with a single copy, by a reassignment that somebody interrupted, is lost with its broker."""
    partitions = [SimpleNamespace(replicas=[1, 2, 3][:count]) for count in (3, 1, 2)]
    described = answered(SimpleNamespace(partitions=partitions, authorized_operations=None))
    assert _topic(described, answered({}), 0.0).replicas == 1


def test_no_command_stops_a_small_cluster() -> None:
    """B01: with two brokers and two in sync nothing can be written as soon as one is down. Nobody is told to do that."""
    (one,) = [
        one
        for one in found(ALO, cluster({"offers": topic(2, min_insync_replicas="1")}, brokers=2))
        if one.check == "min.insync.replicas"
    ]
    assert (one.level, one.command) == ("warning", "")


def looking(at_start: Any, *reports: PreflightReport) -> tuple[Preflight, list[PreflightReport]]:
    """A preflight that is answered with these; and those that are left."""
    left = list(reports)
    tested = Preflight(settings(ALO), Lifecycle("test"), at_start, dead_letter=None)
    tested._ask = lambda *_args, **_named: left.pop(0)  # type: ignore[assignment]
    return tested, left


def report(*findings: Finding, cluster_id: str | None = "id-1") -> PreflightReport:
    return PreflightReport(ALO, findings, cluster_id)


def finding(level: Any, subject: str) -> Finding:
    return Finding(level, subject, "check", "value", "needed", "Why.")


def test_brokers_that_gave_no_answer_are_asked_by_the_next_run() -> None:
    """And only then: a run that begins again each minute need not ask each time."""
    nobody = report(finding("unknown", "the brokers"), cluster_id=None)
    tested, left = looking("warn", nobody, report(), report())
    for expected in (2, 1, 1):
        tested.start(["t"])
        assert len(left) == expected


@pytest.mark.parametrize(("at_start", "said"), [("warn", (0, 1)), ("raise", (1, 1))])
def test_what_could_not_be_asked_is_said_to_whom_it_matters(
    caplog: pytest.LogCaptureFixture, fresh: Callable[[str], str], at_start: str, said: tuple[int, int]
) -> None:
    """``preflight="raise"`` lets the run begin: its user believes that all was looked at. Said once in a process."""
    subject = fresh("topic")
    for _ in range(2):
        tested, _left = looking(at_start, report(finding("unknown", subject), finding("warning", f"{subject}-w")))
        with caplog.at_level(logging.WARNING, "kafka_guarantees"):
            tested.start(["t"])
        assert tuple(caplog.text.count(f"{level}: {subject}") for level in ("unknown", "warning")) == said


def test_what_did_not_matter_to_one_client_is_said_to_another(caplog: pytest.LogCaptureFixture) -> None:
    """A client that only warns had it among what was said already, for the whole process."""
    unknown = finding("unknown", "topic 'that nobody may see'")
    for at_start in ("warn", "raise"):
        looking(at_start, report(unknown))[0].start(["t"])
    assert sum("that nobody may see" in text for text in caplog.messages if text.startswith("preflight")) == 1


def test_why_no_broker_answered_is_said() -> None:
    """The client knows: refused, unknown host, wrong password. A time-out alone sends people to look at the network."""
    (one,) = preflight(settings(ALO, "127.0.0.1:1"), ["offers"], timeout=1.5).findings
    assert "refused" in one.value


def test_no_command_shows_what_could_be_a_password() -> None:
    """S01: findings are logged, and commands are pasted into tickets."""
    command = Commands(settings(ALO, "s3cret@h:9092")).create("t", 3, 2)
    assert "--bootstrap-server HOST:PORT" in command
    assert "s3cret" not in command


# -- dead letters ------------------------------------------------------------------------------------------------------------


def entry(number: int, size: int = 1, partition: int = 0) -> Entry:
    letter = DeadLetter("orders", 0, number, None, None, "ValueError", "bad", 1, 0, (), ())
    return Entry((partition, number), letter, size)


def test_two_replays_meet_whatever_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """X14: that of a service may have an id of its own. Two operators with two ids would send each dead letter twice."""
    monkeypatch.setattr(replay, "ExactlyOnce", lambda config: config)
    given = {"bootstrap.servers": "h:1", "transactional.id": "mine", "message.max.bytes": "7"}
    made: Any = replay.producer(given, "dlq")
    assert made["transactional.id"] == replay.transactional_id("dlq") != replay.transactional_id("other")
    assert made["message.max.bytes"] == "7"


def test_a_reader_touches_nothing_whatever_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """X15: records of aborted transactions are no dead letters, and no group of the service's own is joined or moved."""
    monkeypatch.setattr(reading, "Consumer", lambda config: config)
    service = {
        "group.id": "service",
        "group.instance.id": "service-1",
        "isolation.level": "read_uncommitted",
        "enable.auto.commit": "true",
        "allow.auto.create.topics": "true",
        "enable.partition.eof": "false",
    }
    made: Any = reading._consumer(service, "read_committed")
    assert {name: made.get(name) for name in service} == {
        "group.id": reading.UNUSED,
        "group.instance.id": None,
        "isolation.level": "read_committed",
        "enable.auto.commit": False,
        "allow.auto.create.topics": False,
        "enable.partition.eof": True,
    }


def test_the_reader_needs_no_right_to_a_group() -> None:
    """S07: librdkafka looks for the coordinator of a group that is not used, and an operator may have no right to it."""
    refused = Message(topic="dlq", partition=0, offset=0, error=KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED))
    assert not reading._is_answer(refused)


def test_a_transaction_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """X17: five hundred large records do not get through before their transaction times out. One that is larger goes alone."""
    monkeypatch.setattr(replay, "PORTION_SIZE", 10)
    monkeypatch.setattr(replay, "PORTION", 4)
    sizes = [4, 4, 4, 11, 1, 1, 1, 1, 1]
    portions = replay._portions([entry(number, size) for number, size in enumerate(sizes)])
    assert [[one.size for one in portion] for portion in portions] == [[4, 4], [4], [11], [1, 1, 1, 1], [1]]


def test_transactions_that_are_aborted_now_and_then_end_no_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """X16: three in a row do; of many thousand some are, as brokers restart."""
    monkeypatch.setattr(replay, "PORTION", 1)
    aborted = [True, True, False] * 4
    outcome = replay.Outcome()

    class Scripted(replay.Replay):
        def _transaction(self, portion: Sequence[Entry]) -> None:
            if aborted.pop(0):
                raise TransactionAborted("for the test")
            outcome.sent += [one.place for one in portion]

    nothing: Any = None
    tested = Scripted(nothing, nothing, nothing, outcome, lambda _entry: None)
    tested.run([entry(number) for number in range(4)])
    assert outcome.sent == [(0, 0), (0, 1), (0, 2), (0, 3)]
