"""AtLeastOnce on a real broker: what is committed, when, and what a failure leaves behind."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Message, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions  # type: ignore[attr-defined] # not re-exported by its stubs

from kafka_guarantees import (
    AtLeastOnce,
    BrokerError,
    Delivery,
    DeliveryError,
    DeliveryUnknown,
    HandlerError,
    KafkaGuaranteesError,
    OffsetsLost,
    Record,
    UnsafeConfigError,
)
from kafka_guarantees._consumer import GroupConsumer
from kafka_guarantees._posted import Posted

from .conftest import committed, fill, read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kafka_guarantees.testing.local_kafka import RunningKafka

pytestmark = pytest.mark.broker
PROTOCOLS: dict[str, dict[str, str]] = {
    "classic": {},
    "cooperative": {"partition.assignment.strategy": "cooperative-sticky"},
    "consumer": {"group.protocol": "consumer"},
}
IDLE = 0.5  # seconds without a message that end a run here


@pytest.fixture
def config(kafka: RunningKafka, fresh: Callable[[str], str]) -> dict[str, object]:
    return {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("group")}


def numbers(count: int) -> Iterator[bytes]:
    return (str(number).encode() for number in range(count))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_message_is_handled_and_committed(
    protocol: str, config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """Under each group protocol: all are handled, their records are in the output, and a second run finds nothing."""
    source, target = kafka_topic(partitions=4), kafka_topic(partitions=2)
    fill(kafka.bootstrap, source, numbers(1000), partitions=4)
    with AtLeastOnce({**config, **PROTOCOLS[protocol]}) as service:
        service.run([source], lambda message: [Record(target, message.value())], until_idle=IDLE)
        again: list[Message] = []
        service.run([source], again.append, until_idle=IDLE)
    assert not again
    assert values(read_all(kafka.bootstrap, target)) == sorted(numbers(1000))
    assert committed(kafka.bootstrap, str(config["group.id"]), source, 4) == [250] * 4


def test_nothing_is_committed_past_a_failure(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """L01, P03: message 5 of 20 fails: 0 to 4 are committed, 5 is not, the error names it, and the next run begins with it."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(20))

    def handler(message: Message) -> None:
        if message.offset() == 5:
            raise RuntimeError("no such user")

    with AtLeastOnce(config) as service:
        with pytest.raises(HandlerError, match=r"partition 0 offset 5.*no such user") as caught:
            service.run([topic], handler, until_idle=IDLE)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert committed(kafka.bootstrap, config["group.id"], topic) == [5]
        rest: list[int | None] = []
        service.run([topic], lambda message: rest.append(message.offset()), until_idle=IDLE)
    assert rest == list(range(5, 20))


def test_a_failing_batch_is_not_committed_at_all(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """run_batches: where the handler raises, every message of its batch comes again."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(20))

    def handler(messages: Any) -> None:
        raise ValueError(len(messages))

    with AtLeastOnce(config) as service:
        with pytest.raises(HandlerError):
            service.run_batches([topic], handler, until_idle=IDLE)
        seen: list[int] = []
        service.run_batches([topic], lambda messages: seen.extend(m.offset() or 0 for m in messages), until_idle=IDLE)
    assert seen == list(range(20))


def test_tombstones_and_empty_values_reach_the_handler(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """L02: ``bool(message)`` is false for them, and they are messages all the same."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, [b"a", None, b"", b"b"])
    with AtLeastOnce(config) as service:
        seen = [message.value() for message in service.messages([topic], until_idle=IDLE)]
    assert seen == [b"a", None, b"", b"b"]


def test_a_swallowed_produce_error_stops_the_run(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """P01, L03: a record that a handler failed to produce is not committed past, also where the handler did not look."""
    source, target = kafka_topic(), kafka_topic()
    fill(kafka.bootstrap, source, numbers(10))
    with AtLeastOnce(config) as service:

        def handler(message: Message) -> None:
            size = 2_000_000 if message.offset() == 5 else 10
            service.produce(target, b"x" * size)  # nobody looks at the delivery

        with pytest.raises(DeliveryError, match=r"MSG_SIZE_TOO_LARGE.*Nothing was committed"):
            service.run([source], handler, until_idle=IDLE)
    assert committed(kafka.bootstrap, config["group.id"], source)[0] <= 5


def test_a_swallowed_type_error_stops_the_run(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """P01: so is one that was not a record at all."""
    source, target = kafka_topic(), kafka_topic()
    fill(kafka.bootstrap, source, numbers(3))
    with AtLeastOnce(config) as service:

        def handler(message: Message) -> None:
            with suppress(TypeError):
                service.produce(target, 42)

        with pytest.raises(DeliveryError):
            service.run([source], handler, until_idle=IDLE)
    assert committed(kafka.bootstrap, config["group.id"], source) == [0]


def test_an_output_topic_that_does_not_exist_is_an_error(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """P19: it is not created, the run ends, and nothing is committed."""
    source, missing = kafka_topic(), fresh("missing")
    fill(kafka.bootstrap, source, numbers(3))
    with AtLeastOnce(config) as service, pytest.raises(DeliveryError, match=missing):
        service.run([source], lambda message: [Record(missing, message.value())], until_idle=IDLE)
    assert committed(kafka.bootstrap, config["group.id"], source) == [0]
    assert missing not in AdminClient({"bootstrap.servers": kafka.bootstrap}).list_topics(timeout=10).topics


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_input_topic_that_does_not_exist_is_an_error(
    protocol: str, config: dict[str, Any], fresh: Callable[[str], str]
) -> None:
    """C19: a misspelt topic is an error within seconds, not a silence."""
    started = time.monotonic()
    with AtLeastOnce({**config, **PROTOCOLS[protocol]}) as service, pytest.raises(BrokerError, match="does not exist"):
        service.run([fresh("missing")], lambda message: None)
    assert time.monotonic() - started < 10


def test_a_loop_that_is_left_has_not_finished_its_message(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """messages(): what came before a ``break`` is committed; the message in hand comes again."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(20))
    with AtLeastOnce(config) as service:
        for message in service.messages([topic], until_idle=IDLE):
            if message.offset() == 7:
                break
    assert committed(kafka.bootstrap, config["group.id"], topic) == [7]
    with AtLeastOnce(config) as service:
        loop = service.messages([topic], until_idle=IDLE)
        assert [next(loop).offset() for _ in range(3)] == [7, 8, 9]  # left by close(), as by an exception
    assert committed(kafka.bootstrap, config["group.id"], topic) == [9]


@pytest.mark.parametrize("kept", [True, False])
def test_a_record_that_failed_in_a_loop_that_is_left_is_told_by_close(
    config: dict[str, Any],
    kafka: RunningKafka,
    kafka_topic: Callable[..., str],
    kept: bool,  # noqa: FBT001 - two rows
) -> None:
    """P01: nobody hears what a loop raises that is left by ``break``. And close() closes the client all the same."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(20))
    service = AtLeastOnce(config)
    loop = service.messages([topic])
    for message in loop:
        if message.offset() == 7:
            service.produce(topic, b"x" * 2_000_000)
            break
    if not kept:
        del loop
        assert not service._lifecycle.in_run
    with pytest.raises(DeliveryError, match="MSG_SIZE_TOO_LARGE"):
        service.close()
    assert service._lifecycle.closed
    assert service._producer is not None
    assert service._producer.raw is None
    assert committed(kafka.bootstrap, config["group.id"], topic) in ([-1001], [0])


def test_stop_ends_the_run_after_the_message_in_hand(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """L07: a clean stop commits exactly what was handled, and returns soon."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(100))
    handled: list[int | None] = []
    third = threading.Event()

    def handler(message: Message) -> None:
        handled.append(message.offset())
        if len(handled) == 3:
            third.set()
            time.sleep(0.3)

    with AtLeastOnce(config) as service:
        runner = threading.Thread(target=service.run, args=([topic], handler))
        runner.start()
        assert third.wait(20)
        asked = time.monotonic()
        service.stop()
        runner.join(10)
        assert time.monotonic() - asked < 2
    assert committed(kafka.bootstrap, config["group.id"], topic) == [len(handled)]
    assert len(handled) == 3


def test_a_slow_batch_is_committed_as_it_goes(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """What a crash repeats is about a second of work, not a whole batch of slow messages."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(10))
    seen: list[int] = []

    def handler(message: Message) -> None:
        time.sleep(0.4)
        if message.offset() == 6:
            seen.append(committed(kafka.bootstrap, config["group.id"], topic)[0])
            service.stop()

    with AtLeastOnce(config) as service:
        service.run([topic], handler)
    assert 3 <= seen[0] <= 6


def test_a_batch_is_given_back_before_the_group_loses_patience(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """C10: a batch that would take longer than half of max.poll.interval.ms is cut: nothing is repeated, nothing lost."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(15))
    seen: list[int | None] = []

    def handler(message: Message) -> None:
        time.sleep(0.3)
        seen.append(message.offset())

    with AtLeastOnce({**config, "max.poll.interval.ms": 3000, "session.timeout.ms": 3000}) as service:
        service.run([topic], handler, until_idle=IDLE)
    assert seen == list(range(15))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_group_that_starts_latest_misses_nothing_from_then_on(
    protocol: str, config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """M05, C11: the start is committed at once, and a partition added later is read from its beginning."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(5))
    settings = {**config, **PROTOCOLS[protocol]}
    with AtLeastOnce(settings, start="latest") as service:
        assert not list(service.messages([topic], until_idle=IDLE))
    assert committed(kafka.bootstrap, config["group.id"], topic) == [5]
    admin, deadline = AdminClient({"bootstrap.servers": kafka.bootstrap}), time.monotonic() + 30
    admin.create_partitions([NewPartitions(topic, 2)])[topic].result(30)
    while len(admin.list_topics(topic, timeout=10).topics[topic].partitions) < 2:
        assert time.monotonic() < deadline
    fill(kafka.bootstrap, topic, [b"old", b"new"], partitions=2)
    with AtLeastOnce(settings, start="latest") as service:
        seen = {(m.partition(), m.value()) for m in service.messages([topic], until_idle=IDLE)}
    assert seen == {(0, b"old"), (1, b"new")}


def test_a_position_outside_the_log_is_an_error(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """B05: offsets that point behind the end (a topic made anew) are not skipped silently."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(3))
    with AtLeastOnce(config) as service:
        list(service.messages([topic], until_idle=IDLE))
        _set_offset(kafka, config["group.id"], topic, 50)
        with pytest.raises(OffsetsLost, match="kafka-consumer-groups"):
            service.run([topic], lambda message: None, until_idle=5)


def _set_offset(kafka: RunningKafka, group: str, topic: str, offset: int) -> None:
    request = [ConsumerGroupTopicPartitions(group, [TopicPartition(topic, 0, offset)])]
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})  # kept: a future dies with its client
    admin.alter_consumer_group_offsets(request)[group].result(30)


def test_offsets_that_vanish_while_the_process_lives_are_an_error(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """M05: a group that had offsets and has none was reset by somebody: going on would repeat or lose."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(3))
    with AtLeastOnce(config) as service:
        list(service.messages([topic], until_idle=IDLE))
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
        admin.delete_consumer_groups([config["group.id"]])[config["group.id"]].result(30)
        with pytest.raises(OffsetsLost, match="expired or was deleted"):
            service.run([topic], lambda message: None, until_idle=5)


def test_an_unknown_commit_outcome_is_retried_with_the_same_offsets(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C06: a commit that raises is tried again while the membership holds; nothing is handled twice for it."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(10))
    calls: list[Any] = []
    waiting, trailing = GroupConsumer.commit, GroupConsumer.check_commit

    def flaky(self: GroupConsumer, offsets: Any) -> None:
        calls.append([(o.partition, o.offset) for o in offsets])
        if len(calls) < 3:
            raise BrokerError("the answer got lost")
        waiting(self, list(offsets))

    def lost(self: GroupConsumer, error: Any, answer: Any) -> None:
        calls.append([(o.partition, o.offset) for o in answer])
        if len(calls) < 3:
            raise BrokerError("the answer got lost")
        trailing(self, error, answer)

    monkeypatch.setattr(GroupConsumer, "commit", flaky)
    monkeypatch.setattr(GroupConsumer, "check_commit", lost)
    with AtLeastOnce(config) as service:
        seen = [message.offset() for message in service.messages([topic], until_idle=IDLE)]
    assert seen == list(range(10))
    assert calls == [[(0, 10)]] * 3


def test_what_makes_no_run_is_refused_before_anything_is_connected() -> None:
    """Bad input is refused: no group.id, topics that are one string, an empty list, a batch of nothing."""
    nowhere = {"bootstrap.servers": "127.0.0.1:1"}
    with AtLeastOnce(nowhere) as service, pytest.raises(UnsafeConfigError, match=r"group\.id"):
        service.run(["topic"], lambda message: None)
    with AtLeastOnce({**nowhere, "group.id": "g"}) as service:
        for topics in ("topic", [], [""], [1]):
            with pytest.raises(TypeError):
                service.run(topics, lambda message: None)  # type: ignore[arg-type] # that is the point
        with pytest.raises(ValueError, match="max_batch"):
            service.run(["topic"], lambda message: None, max_batch=0)


def test_handlers_that_return_no_records_are_errors(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """A handler's mistake is a HandlerError that says what to return; nothing is committed past it."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(1))

    handlers: list[Any] = [lambda m: "text", lambda m: [m], lambda m: 1]
    for handler in handlers:
        with AtLeastOnce(config) as service, pytest.raises(HandlerError) as caught:
            service.run([topic], handler, until_idle=IDLE)
        assert isinstance(caught.value.__cause__, TypeError)
    assert committed(kafka.bootstrap, config["group.id"], topic) == [0]


def test_a_run_in_a_run_is_refused(config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """X26: one client runs one loop."""
    topic = kafka_topic()
    fill(kafka.bootstrap, topic, numbers(1))
    with AtLeastOnce(config) as service, pytest.raises(HandlerError, match="running already") as caught:
        service.run([topic], lambda message: service.run([topic], print), until_idle=IDLE)
    assert isinstance(caught.value.__cause__, KafkaGuaranteesError)


def test_what_another_thread_was_told_still_stops_the_run(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """P01: flush() in another thread raises the failure of a record that the handler produced; the run does not commit it."""
    source, target = kafka_topic(), kafka_topic()
    fill(kafka.bootstrap, source, numbers(1))
    told: list[BaseException] = []
    with AtLeastOnce(config) as service:

        def ask() -> None:
            try:
                service.flush(10)
            except DeliveryError as error:
                told.append(error)

        def handler(message: Message) -> None:
            service.produce(target, b"x" * 2_000_000)
            asker = threading.Thread(target=ask)
            asker.start()
            asker.join(20)

        with pytest.raises(DeliveryError):
            service.run([source], handler, until_idle=IDLE)
    assert told
    assert committed(kafka.bootstrap, config["group.id"], source) == [0]


def test_a_report_that_was_destroyed_is_an_unknown_outcome(
    config: dict[str, Any], kafka: RunningKafka, kafka_topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P01, C01: an exception out of a signal handler can hit the delivery callback; then nothing says that it was written."""
    source, target = kafka_topic(), kafka_topic()
    fill(kafka.bootstrap, source, numbers(1))
    for owner, callback in ((Delivery, "__call__"), (Posted, "report")):
        monkeypatch.setattr(owner, callback, lambda *_: None)  # what is left of a callback that was hit at its first step
    with AtLeastOnce(config) as service:
        with pytest.raises(DeliveryUnknown, match=r"report .* was lost"):
            service.run([source], lambda message: [Record(target, message.value())], until_idle=IDLE)
        service.produce(target, b"x")
        with pytest.raises(DeliveryUnknown):
            service.flush(10)
    assert committed(kafka.bootstrap, config["group.id"], source) == [0]


def test_partitions_are_given_back_before_the_consumer_is_closed(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside of close() librdkafka may never answer the callback, which has the GIL: the process would stand still."""
    where: list[str] = []
    revoke = GroupConsumer._on_revoke

    def noted(self: GroupConsumer, raw: Any, partitions: list[Any]) -> None:
        where.append(threading.current_thread().name)
        revoke(self, raw, partitions)

    monkeypatch.setattr(GroupConsumer, "_on_revoke", noted)
    topic = kafka_topic(partitions=4)
    for protocol in ("range", "cooperative-sticky"):
        config = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("g"), "partition.assignment.strategy": protocol}
        with AtLeastOnce(config) as client:
            client.run([topic], lambda _message: None, until_idle=0.5)
    assert where == [threading.current_thread().name] * 2
