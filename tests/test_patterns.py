"""Patterns of librdkafka that take in what nobody meant: Kafka's own topics, and the dead letters of the run itself."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees import AtLeastOnce, AtMostOnce, UnsafeConfigError

from .conftest import fill, read_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from confluent_kafka import Message

    from kafka_guarantees.testing.local_kafka import RunningKafka

pytestmark = pytest.mark.broker


@pytest.mark.parametrize("kind", [AtMostOnce, AtLeastOnce])
def test_dead_letters_that_a_pattern_of_the_group_matches_are_not_consumed(
    kind: type[AtMostOnce | AtLeastOnce], kafka: RunningKafka, fresh: Callable[[str], str]
) -> None:
    """What librdkafka's patterns match, and Python's do not: each letter would be handled, and set aside, for ever."""
    name = fresh("jobs").replace("-", "")
    source, letters = f"{name}-in", f"{name}-dead"
    kafka.create_topic(source, 1, None, None)
    kafka.create_topic(letters, 1, None, None)
    fill(kafka.bootstrap, source, [b"poison"])

    def handler(_message: Message) -> None:
        raise ValueError("for the test")

    config = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("group")}
    with kind(config, start="earliest", dead_letter=letters) as client:
        end = threading.Timer(5, client.stop)
        end.start()
        try:
            with pytest.raises(UnsafeConfigError, match="dead_letter"):
                client.run([f"^[[:alpha:]]+{name[4:]}-.*"], handler)
        finally:
            end.cancel()
    assert len(read_all(kafka.bootstrap, letters)) <= 1


@pytest.mark.parametrize("protocol", [{}, {"group.protocol": "consumer"}], ids=["classic", "consumer"])
def test_a_pattern_does_not_read_what_its_own_commits_write(
    protocol: dict[str, Any], kafka: RunningKafka, fresh: Callable[[str], str]
) -> None:
    """Kafka's own topics are not meant by a pattern: each commit would be a message, whose commit would be another."""
    topic = fresh("own")
    kafka.create_topic(topic, 1, None, None)
    fill(kafka.bootstrap, topic, [b"1", b"2"])
    seen: list[str | None] = []
    with AtLeastOnce({"bootstrap.servers": kafka.bootstrap, "group.id": fresh("group"), **protocol}) as client:
        end = threading.Timer(10, client.stop)
        end.start()
        client.run([f"^(__consumer_offsets|{topic})$"], lambda message: seen.append(message.topic()), until_idle=1)
        end.cancel()
    assert seen == [topic] * 2


@pytest.mark.parametrize(
    ("protocol", "pattern", "silent"),
    [
        ("classic", "^{}-one", False),
        ("classic", "^{}-t", True),
        ("consumer", "^{}-.*", False),
        ("consumer", "^{}-", True),
    ],
)
def test_a_pattern_that_no_topic_matches_is_told(
    kafka: RunningKafka,
    fresh: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    protocol: str,
    pattern: str,
    silent: bool,
) -> None:
    """A service would wait without a word. Brokers match the whole name (C17), librdkafka what it begins with."""
    monkeypatch.setattr("kafka_guarantees._topics.SILENT", 0.5)
    name = fresh("told")
    kafka.create_topic(f"{name}-one", 1, None, None)
    fill(kafka.bootstrap, f"{name}-one", [b"1"])
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("group"), "group.protocol": protocol}
    with AtLeastOnce(config, preflight="off") as client:
        end = threading.Timer(2.5, client.stop)
        end.start()
        client.run([pattern.format(name)], lambda _message: client.stop())
        end.cancel()
    told = [text for text in caplog.messages if "no topic matches" in text]
    assert told == [f"no topic matches {pattern.format(name)}"] * silent
