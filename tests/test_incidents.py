"""What went wrong once, from outside: each test is an incident that must not come again."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient
from tenacity import Retrying, stop_after_attempt, wait_fixed

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, Record, _consumer
from kafka_guarantees._settings import librdkafka
from kafka_guarantees.dedup import MemoryDedupStore, SqliteInbox
from kafka_guarantees.prove.proxy import API, Proxy

from .conftest import committed, fill, read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from confluent_kafka import Message

    from kafka_guarantees.testing.local_kafka import RunningKafka

broker = pytest.mark.broker
KINDS = ["at-least-once", "store", "inbox", "exactly-once"]
COUNT = 12
# ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, FENCED_MEMBER_EPOCH, STALE_MEMBER_EPOCH: of a member that is not one any more
REFUSED = (22, 25, 110, 113)
SETTINGS = {"max.poll.interval.ms": 3000, "session.timeout.ms": 3000, "heartbeat.interval.ms": 500}


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return true


def send(bootstrap: str, topic: str) -> None:
    producer = Producer({"bootstrap.servers": bootstrap})
    producer.list_topics(topic, 30)
    for number in range(COUNT):
        producer.produce(topic, str(number).encode(), headers=[("message-id", f"id-{number}".encode())])
    assert producer.flush(30) == 0


def client(kind: str, config: dict[str, Any], stack: ExitStack, directory: Path, **options: Any) -> AtLeastOnce | ExactlyOnce:
    if kind == "exactly-once":
        config = {**config, "transactional.id": config["group.id"], "transaction.timeout.ms": 1500}
        return stack.enter_context(ExactlyOnce(config, **options))
    if kind == "store":
        options["dedup"] = stack.enter_context(MemoryDedupStore())
    if kind == "inbox":
        options["inbox"] = stack.enter_context(SqliteInbox(directory / "inbox.db"))
    return stack.enter_context(AtLeastOnce(config, **options))


@broker
@pytest.mark.parametrize("kind", KINDS)
def test_attempts_at_a_batch_may_take_longer_than_a_batch_may(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], tmp_path: Path, kind: str
) -> None:
    """C10, L08: after them its messages are handled one by one, all in one go. Given back, each costs all attempts anew."""
    topic, dead, calls, handled = kafka_topic(), kafka_topic(), Counter[bytes](), list[bytes]()

    def handler(messages: Sequence[Message], *_connection: object) -> None:
        got = [message.value() or b"" for message in messages]
        calls.update(got)
        if b"7" in got:
            raise OSError("seven")
        handled.extend(got)

    send(kafka.bootstrap, topic)
    config: dict[str, Any] = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("group"), **SETTINGS}
    retry = Retrying(stop=stop_after_attempt(2), wait=wait_fixed(2))  # half of the interval is 1.5 s
    with ExitStack() as stack:
        kafka_client = client(kind, config, stack, tmp_path, retry=retry, dead_letter=dead, preflight="off")
        kafka_client.run_batches([topic], handler, until_idle=0.3)
    expected = {str(number).encode(): 3 for number in range(COUNT)}  # twice in the batch, and once alone
    assert calls == {**expected, b"7": 4}  # which has both of its attempts there
    assert sorted(handled) == sorted(str(number).encode() for number in range(COUNT) if number != 7)
    assert values(read_all(kafka.bootstrap, dead)) == [b"7"]
    assert committed(kafka.bootstrap, config["group.id"], topic) == [COUNT]


@broker
def test_at_most_once_changes_its_member_without_its_dead_letter_topic(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead letters are best effort: a topic that is lost during a run does not end it, also where the run joins anew (M02)."""
    topic, dead, handled, members = kafka_topic(), kafka_topic(), list[bytes](), list[object]()
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    send(kafka.bootstrap, topic)

    def handler(message: Message) -> None:
        if not handled:
            admin.delete_topics([dead])[dead].result(20)
        handled.append(message.value() or b"")

    def once(*_: object) -> bool:
        members.append(None)
        return len(members) == 3  # behind that of the start, the commit behind the message at which the topic was deleted

    monkeypatch.setattr(_consumer, "sent_twice", once)
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": fresh("group")}
    with AtMostOnce(config, start="earliest", dead_letter=dead, preflight="off") as service:
        service.run([topic], handler, until_idle=0.3)
    assert handled == [str(number).encode() for number in range(COUNT)]


CONFIG = {"bootstrap.servers": "127.0.0.1:1", "group.id": "group"}


def made(kind: str, **options: Any) -> AtLeastOnce | AtMostOnce | ExactlyOnce:
    if kind == "exactly-once":
        return ExactlyOnce({**CONFIG, "transactional.id": "id"}, **options)
    return AtMostOnce(CONFIG, **options) if kind == "at-most-once" else AtLeastOnce(CONFIG, **options)


CLASSES = ["at-most-once", "at-least-once", "exactly-once"]


@broker
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
@pytest.mark.parametrize("kind", ["at-most-once", "exactly-once"])
def test_a_start_that_is_committed_late_does_not_set_the_group_back(
    kafka: RunningKafka, kafka_topic: Callable[..., str], fresh: Callable[[str], str], kind: str, protocol: str
) -> None:
    """M02, X01: the commit of the start is held up, and sent again. When the first arrives after all, it is an old member's."""
    topic, target, group, handled = kafka_topic(), kafka_topic(), fresh("group"), Counter[bytes]()

    def handler(message: Message) -> Record:
        handled[message.value() or b""] += 1
        return Record(target, message.value())

    def run(bootstrap: str, **options: Any) -> None:
        config = {"bootstrap.servers": bootstrap, "group.id": group, "group.protocol": protocol}
        made = (
            AtMostOnce(config, start="latest") if kind == "at-most-once" else ExactlyOnce({**config, "transactional.id": group})
        )
        clients.append(made)
        with made:
            made.run([topic], handler, **options)

    clients: list[AtMostOnce | ExactlyOnce] = []
    with Proxy(kafka.bootstrap) as proxy:
        held = proxy.hold([API["OffsetCommit"]])
        running = threading.Thread(target=run, args=(proxy.bootstrap,))
        running.start()
        try:
            assert held.wait(20)
            assert until(lambda: committed(kafka.bootstrap, group, topic) == [0])  # sent again
            fill(kafka.bootstrap, topic, numbers(200))
            assert until(lambda: committed(kafka.bootstrap, group, topic)[0] == 200)
            outcome = held.release()
        finally:
            clients[0].stop()
            running.join(30)
    assert outcome.error in REFUSED
    assert committed(kafka.bootstrap, group, topic) == [200]
    run(kafka.bootstrap, until_idle=0.5)
    assert handled == Counter(numbers(200))
    if kind == "exactly-once":
        assert values(read_all(kafka.bootstrap, target)) == sorted(numbers(200))


@broker
@pytest.mark.parametrize("kind", ["at-least-once", "exactly-once"])
def test_a_topic_that_is_deleted_in_hand_does_not_hold_up_others(
    kafka: RunningKafka, fresh: Callable[[str], str], tmp_path: Path, kind: str
) -> None:
    """A pattern has found both. Its offset cannot be committed any more, and that was tried for max.poll.interval.ms."""
    name, handled = fresh("pattern"), list[tuple[str, bytes]]()
    stays, goes = f"{name}-stays", f"{name}-goes"
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    for topic in (stays, goes):
        kafka.create_topic(topic)
        fill(kafka.bootstrap, topic, [b"first"])

    def handler(message: Message) -> None:
        handled.append((message.topic() or "", message.value() or b""))
        if message.topic() == goes:
            admin.delete_topics([goes])[goes].result(30)
            assert until(lambda: goes not in admin.list_topics(timeout=5).topics)
            fill(kafka.bootstrap, stays, [b"next"])
            time.sleep(1.2)  # so that its commit does not trail
        if message.value() == b"next":
            service.stop()

    config = {"bootstrap.servers": kafka.bootstrap, "group.id": name, "topic.metadata.refresh.interval.ms": 1000}
    with ExitStack() as stack:
        service = client(kind, config, stack, tmp_path, preflight="off")
        began = time.monotonic()
        service.run([f"^{name}-.*"], handler, until_idle=30)
        assert time.monotonic() - began < 25
    assert set(handled) == {(goes, b"first"), (stays, b"first"), (stays, b"next")}  # some perhaps in an aborted transaction too
    assert committed(kafka.bootstrap, name, stays) == [2]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("start", ["latset", "Latest", "", None, 5])
def test_a_start_that_is_none_is_refused(kind: str, start: object) -> None:
    """Else it would be taken for one of the two."""
    with pytest.raises(ValueError, match="start is one of 'earliest', 'latest', not"):
        made(kind, start=start)


async def coroutine(_message: Message) -> None: ...


async def generator(_message: Message) -> Any:
    yield None


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("keep_alive", [False, True])
@pytest.mark.parametrize("how", ["run", "run_batches"])
@pytest.mark.parametrize("handler", [None, "handler", coroutine, generator])
def test_what_can_handle_no_message_is_refused_before_the_first(kind: str, how: str, keep_alive: bool, handler: object) -> None:  # noqa: FBT001
    """Else each message would be dropped, or set aside, for a mistake that is the program's."""
    with made(kind, dead_letter="dead", keep_alive=keep_alive) as client:
        client.stop()  # a run would end at once
        with pytest.raises(TypeError, match="the handler is"):
            getattr(client, how)(["topic"], handler)


@pytest.mark.parametrize("kind", CLASSES)
def test_arguments_of_another_type_are_refused(kind: str) -> None:
    """Not somewhere in the middle of a run, nor taken for what they are not: "false" is true."""
    with pytest.raises(TypeError, match="keep_alive is True or False, not 'false'"):
        made(kind, keep_alive="false")
    wrong: dict[str, list[Any]] = {"until_idle": ["5", -1, float("nan")], "max_batch": ["10", 0, 1_000_001, None]}
    with made(kind) as service:
        for name, values in wrong.items():
            for value in values:
                with pytest.raises(ValueError, match=f"{name} is a number of"):
                    service.run(["topic"], print, **{name: value})


def test_what_is_told_of_failures_is_a_function() -> None:
    """It is needed when something fails: too late to find out."""
    with pytest.raises(TypeError, match="on_error is called with"):
        made("at-most-once", on_error="handler")


def test_settings_are_looked_at_beside_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Y03: Ctrl-C inside of the C call was lost, and came out of the constructor as a setting that is refused."""
    threads = []

    def asked(_config: object) -> None:
        threads.append(threading.current_thread())
        raise KafkaException(f'No such configuration property: "{librdkafka._NO_SUCH}"')

    monkeypatch.setattr(librdkafka, "Producer", asked)
    librdkafka.check({"acks": "all"})
    assert threads
    assert threading.main_thread() not in threads
