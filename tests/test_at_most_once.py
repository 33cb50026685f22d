"""AtMostOnce on a real broker: committed before handled, never handled twice."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient

from kafka_guarantees import AtMostOnce, BrokerError, Record
from kafka_guarantees._consumer import GroupConsumer, sent_twice
from kafka_guarantees.at_most_once import PORTION, next_size
from kafka_guarantees.prove.proxy import API, Proxy

from .conftest import committed, fill, read_all, values
from .test_at_least_once import IDLE, PROTOCOLS, config, numbers
from .world import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from kafka_guarantees.testing.local_kafka import RunningKafka

__all__ = ["config"]
pytestmark = pytest.mark.broker
ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID = 22, 25


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_message_is_handled_once_when_nothing_fails(
    protocol: str, config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """Under each group protocol: all are handled once, and a second run finds nothing."""
    source, target = kafka_topic(partitions=4), kafka_topic()
    fill(kafka.bootstrap, source, numbers(1000), partitions=4)
    with AtMostOnce({**config, **PROTOCOLS[protocol]}, start="earliest") as service:
        service.run([source], lambda message: [Record(target, message.value())], until_idle=IDLE)
        assert not list(service.messages([source], until_idle=IDLE))
        assert service.flush(10) == 0
    assert values(read_all(kafka.bootstrap, target)) == sorted(numbers(1000))


STARTING = """
import sys
from kafka_guarantees import AtMostOnce

bootstrap, group, topic = sys.argv[1:]
config = {"bootstrap.servers": bootstrap, "group.id": group, "stats_cb": lambda _statistics: None, "statistics.interval.ms": 20}
with AtMostOnce(config, preflight="off") as service:
    service.run([topic], lambda _message: None, until_idle=1.0)
"""


def test_a_start_from_the_latest_survives_what_else_the_same_poll_calls_back(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """list_topics() in the callback that assigns leaves the next one, as of statistics, without its thread: SIGABRT."""
    topic = kafka_topic()
    command = [sys.executable, "-c", STARTING, kafka.bootstrap]
    started = [subprocess.Popen([*command, fresh("group"), topic]) for _ in range(3)]
    try:
        assert [process.wait(90) for process in started] == [0, 0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_record_for_a_topic_that_is_missing_is_said_to_be_lost(
    config: dict[str, Any], fresh: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    """P07: nobody is told by produce(), and nothing of it is in the way of others; but a misspelt name must not be silent."""
    missing = fresh("missing")
    with AtMostOnce({**config, "topic.metadata.propagation.max.ms": 500}) as client:
        client.produce(missing, b"x")
        until(lambda: f"a record for topic {missing!r} is lost" in caplog.text, "it is logged", 20)
        client.produce(missing, b"y")


def test_records_do_not_linger_while_there_is_nothing_else_to_handle(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """What waits for company waits in vain, where no other message is there to be handled."""
    source, target = kafka_topic(), kafka_topic()
    fill(kafka.bootstrap, source, numbers(5))
    with AtMostOnce({**config, "linger.ms": 100_000, "delivery.timeout.ms": 300_000}, start="earliest") as service:
        running = threading.Thread(
            target=service.run, args=([source], lambda message: [Record(target, message.value())]), kwargs={"until_idle": 20.0}
        )
        running.start()
        try:
            until(lambda: values(read_all(kafka.bootstrap, target)) == [*numbers(5)], "all are written", timeout=15)
            assert running.is_alive()
        finally:
            service.stop()
            running.join()


def test_a_message_is_committed_before_it_is_handled(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """M01: whenever a handler runs, the group's offset is past its message already."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(8))
    behind: list[tuple[int, int]] = []

    def handler(message: Message) -> None:
        offset = committed(kafka.bootstrap, config["group.id"], topic)[0]
        if offset <= (message.offset() or 0):
            behind.append((offset, message.offset() or 0))

    with AtMostOnce(config, start="earliest") as service:
        service.run([topic], handler, until_idle=IDLE)
    assert not behind


def test_a_commit_of_unknown_outcome_is_not_handled(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """M02: where the answer to a commit is lost, what the group has committed decides: committed means gone."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(10))
    real = GroupConsumer._check_commit
    lost: list[int] = []

    def flaky(self: GroupConsumer, answer: list[TopicPartition]) -> None:
        if not lost and answer[0].offset:  # else it is where the group begins
            lost.extend(range(answer[0].offset))
            raise KafkaException(KafkaError(KafkaError._TRANSPORT, "the answer got lost"))
        real(self, answer)

    monkeypatch.setattr(GroupConsumer, "_check_commit", flaky)
    with AtMostOnce(config, start="earliest") as service:
        seen = [message.offset() for message in service.messages([topic], until_idle=IDLE)]
    assert lost
    assert seen == list(range(len(lost), 10))


def test_a_commit_that_failed_is_made_again(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """M02: what was not committed was not handled, so it comes again and nothing is lost."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(10))
    real, calls = GroupConsumer.commit, []

    def refusing(self: GroupConsumer, offsets: Any) -> None:
        calls.append(1)
        if len(calls) in {1, 3}:
            raise BrokerError("refused")
        real(self, list(offsets))

    monkeypatch.setattr(GroupConsumer, "commit", refusing)
    with AtMostOnce(config, start="earliest") as service:
        seen = [message.offset() for message in service.messages([topic], until_idle=IDLE)]
    assert seen == list(range(10))


def test_a_member_that_was_thrown_out_does_not_handle(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """M03: the membership is looked at again after the commit; what the group gave away meanwhile is dropped, not handled."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(10))
    real, calls = GroupConsumer.still_ours, []

    def gone_after_the_first_commit(self: GroupConsumer, batch: Any, *, within: float) -> bool:
        calls.append(within)
        return len(calls) != 2 and real(self, batch, within=within)

    monkeypatch.setattr(GroupConsumer, "still_ours", gone_after_the_first_commit)
    with AtMostOnce(config, start="earliest") as service:
        seen = [message.offset() for message in service.messages([topic], until_idle=IDLE)]
    assert seen == list(range(1, 10))


def test_a_handler_that_raises_is_not_called_again(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """M04: the message is dropped and reported, the next one is handled."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(10))
    calls: list[int] = []
    dropped: list[tuple[int, str]] = []

    def handler(message: Message) -> None:
        calls.append(message.offset() or 0)
        if message.offset() in {2, 5}:
            raise RuntimeError("boom")

    def on_error(message: Message, error: Exception) -> None:
        dropped.append((message.offset() or 0, str(error)))
        raise ValueError("on_error may fail as well")

    with AtMostOnce(config, start="earliest", on_error=on_error) as service:
        service.run([topic], handler, until_idle=IDLE)
    assert calls == list(range(10))
    assert dropped == [(2, "boom"), (5, "boom")]


def test_offsets_that_are_set_back_repeat_nothing(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """M09: below what this process has handled nothing is handled again, whatever the group's offsets say. It is logged."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(10))
    with AtMostOnce(config, start="earliest") as service:
        first = [message.offset() for message in service.messages([topic], until_idle=IDLE)]
        request = [ConsumerGroupTopicPartitions(config["group.id"], [TopicPartition(topic, 0, 4)])]
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
        admin.alter_consumer_group_offsets(request)[config["group.id"]].result(30)
        fill(kafka.bootstrap, topic, [b"next"])
        second = [message.offset() for message in service.messages([topic], until_idle=IDLE)]
    with AtMostOnce(config, start="earliest") as service:
        admin.alter_consumer_group_offsets(request)[config["group.id"]].result(30)
        third = [message.offset() for message in service.messages([topic], until_idle=IDLE)]
    assert first == list(range(10))
    assert second == [10]
    assert "6 messages are left out: this client has had them in hand before (M09); a new client handles them" in caplog.text
    assert third == list(range(4, 11))


def test_a_group_begins_at_the_end_by_default(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """M05: the one start that can never handle twice, and it is committed at once: offsets that were deleted change nothing."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(5))
    with AtMostOnce(config) as service:
        assert not list(service.messages([topic], until_idle=IDLE))
    assert committed(kafka.bootstrap, config["group.id"], topic) == [5]
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.delete_consumer_groups([config["group.id"]])[config["group.id"]].result(30)
    with AtMostOnce(config) as service:
        assert not list(service.messages([topic], until_idle=IDLE))


def test_what_is_fetched_but_not_committed_is_not_lost(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """M07: a stop in the middle of a batch of slow messages loses nothing that was not committed for handling."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(50))
    handled: list[int] = []

    def handler(message: Message) -> None:
        handled.append(message.offset() or 0)
        time.sleep(2 * PORTION)
        if len(handled) == 4:
            service.stop()

    with AtMostOnce(config, start="earliest") as service:
        service.run([topic], handler)
        rest = [message.offset() for message in service.messages([topic], until_idle=IDLE)]
    assert handled == list(range(len(handled)))
    assert rest == list(range(len(handled), 50))


def test_portions_are_as_large_as_their_time_allows() -> None:
    """M07: a portion doubles while it is full and fast, shrinks to what PORTION seconds allow, and never leaves its limits."""
    assert next_size(1, 1, 0.0, 500) == 2
    assert next_size(400, 400, 0.01, 500) == 500
    assert next_size(3, 8, 0.01, 500) == 8
    assert next_size(100, 100, 10 * PORTION, 500) == 10
    assert next_size(1, 1, 100 * PORTION, 500) == 1


@pytest.mark.parametrize("backoff", [{}, {"retry.backoff.max.ms": 20}], ids=["usual", "soon"])
def test_m02_a_commit_that_arrives_late_does_not_set_the_group_back(
    backoff: dict[str, object], kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """A commit is held up and its connection lost, so that librdkafka sends it again; after later commits it arrives after all.

    It is refused: the member that sent it has left the group. Accepted, it would have whoever gets the partition next handle
    again what lies between.
    """
    topic, group = kafka_topic(), fresh("group")
    handled: list[int] = []

    def handler(message: Message) -> None:
        handled.append(message.offset() or 0)
        time.sleep(0.002)

    def until(count: int) -> None:
        deadline = time.monotonic() + 30
        while len(handled) < count:
            assert time.monotonic() < deadline, f"{len(handled)} of {count} were handled"
            time.sleep(0.02)

    with Proxy(kafka.bootstrap) as proxy:
        client = AtMostOnce({"bootstrap.servers": proxy.bootstrap, "group.id": group, **backoff}, start="earliest")
        running = threading.Thread(target=client.run, args=([topic], handler))
        running.start()
        try:
            fill(kafka.bootstrap, topic, [b"x"] * 200)
            until(50)
            held = proxy.hold([API["OffsetCommit"]])
            held.wait(10)
            until(200)
            fill(kafka.bootstrap, topic, [b"x"] * 200)
            until(400)
            outcome = held.release()
        finally:
            client.close()
            running.join()
    assert outcome.error in (ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID)
    assert committed(kafka.bootstrap, group, topic) == [400]
    assert handled == list(range(400))


def test_m02_a_slow_network_is_no_reason_to_leave_the_group() -> None:
    """A commit is judged by those before it: where all take long, one that takes as long was sent once."""
    assert not sent_twice(0.004, [], 0.5)
    assert sent_twice(0.41, [], 0.5)
    assert sent_twice(0.41, [0.003, 0.004, 0.005], 0.5)
    assert not sent_twice(0.41, [0.4, 0.38, 0.5], 0.5)
    assert sent_twice(0.8, [0.4, 0.38, 0.5], 0.5)
