"""The laws of LocalKafka. Real brokers, real signals, real processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from kafka_guarantees.errors import KafkaGuaranteesError
from kafka_guarantees.testing import LocalKafka, LocalKafkaError, RunningKafka, _jars, local_kafka, local_or_running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 30


@pytest.fixture(scope="module")
def own() -> Iterator[LocalKafka]:
    """One broker for the tests that hurt it."""
    with LocalKafka() as kafka:
        yield kafka


def send(bootstrap: str, topic: str, value: bytes, timeout: float = DEADLINE_S) -> bool:
    """Produce with acks=all; True if it was acknowledged within the time."""
    acknowledged: list[bool] = []  # not the errors: comparing a KafkaError with None leaves a stray TypeError behind
    producer = Producer({"bootstrap.servers": bootstrap, "delivery.timeout.ms": int(timeout * 1000), "log_level": 0})
    producer.produce(topic, value, on_delivery=lambda error, _message: acknowledged.append(error is None))
    producer.flush(timeout + 5)
    return acknowledged == [True]


def read(bootstrap: str, topic: str, count: int = 1) -> list[bytes | None]:
    """The first messages of partition 0."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": uuid.uuid4().hex, "log_level": 0})
    consumer.assign([TopicPartition(topic, 0, 0)])
    values: list[bytes | None] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(values) < count and time.monotonic() < deadline:
        values += [message.value() for message in consumer.consume(count - len(values), 0.2) if not message.error()]
    consumer.close()
    return values


def becomes_true(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return true


def processes(mentioning: str) -> list[str]:
    listing = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True, check=True)
    return [line for line in listing.stdout.splitlines() if mentioning in line]


def command(folder: Path, name: str, script: str) -> None:
    """An executable of this name that runs the shell script instead."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with only a shell's tools and a cache that was never filled; the folder for commands, first on the PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for tool in ("mkdir", "touch", "sleep"):
        found = shutil.which(tool)
        assert found
        (commands / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(commands))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return commands


@pytest.mark.broker
def test_what_is_produced_can_be_consumed(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """LocalKafka is a Kafka: a record that was acknowledged is read back."""
    topic = kafka_topic(partitions=1)
    assert send(kafka.bootstrap, topic, b"offer")
    assert read(kafka.bootstrap, topic) == [b"offer"]


@pytest.mark.broker
def test_a_topic_can_be_used_at_once(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """When create_topic returns, every partition has a leader; creating it again is refused by the broker."""
    topic = kafka_topic(partitions=7, config={"cleanup.policy": "compact"})
    found = AdminClient({"bootstrap.servers": kafka.bootstrap}).list_topics(topic, timeout=5).topics[topic]
    assert [partition.leader >= 0 for partition in found.partitions.values()] == [True] * 7
    with pytest.raises(KafkaException, match="already exists"):
        kafka.create_topic(topic)


def test_a_request_that_was_sent_twice_makes_a_topic(kafka: RunningKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """Librdkafka sends it again where the answer was lost, and the second answer is that the topic exists: it is ours."""

    class Twice(AdminClient):
        def create_topics(self, *args: Any, **options: Any) -> Any:
            super().create_topics(*args, **options)[args[0][0].topic].result()
            return super().create_topics(*args, **options)

    monkeypatch.setattr(local_kafka, "AdminClient", Twice)
    kafka.create_topic(f"twice-{uuid.uuid4().hex[:12]}")


@pytest.mark.broker
def test_internal_topics_are_there_after_the_start(own: LocalKafka) -> None:
    """The first group and the first transaction do not pay for creating the coordinators' topics."""
    topics = AdminClient({"bootstrap.servers": own.bootstrap}).list_topics(timeout=5).topics
    assert {"__consumer_offsets", "__transaction_state"} <= set(topics)


@pytest.mark.broker
def test_consumer_protocol_groups_may_have_short_sessions(own: LocalKafka) -> None:
    """A group of the consumer protocol (KIP-848) gets its partitions and its heartbeat interval from these settings."""
    own.create_topic("kip-848")
    assert send(own.bootstrap, "kip-848", b"x")
    consumer = Consumer(
        {
            "bootstrap.servers": own.bootstrap,
            "group.id": "kip-848",
            "group.protocol": "consumer",
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe(["kip-848"])
    message = consumer.poll(DEADLINE_S)
    consumer.close()
    assert message is not None
    assert message.value() == b"x"


@pytest.mark.broker
def test_kill_is_sigkill_and_restart_keeps_the_data(own: LocalKafka) -> None:
    """A killed broker is gone on return; restarted on its port, it still has what it acknowledged."""
    own.create_topic("kept")
    assert send(own.bootstrap, "kept", b"before")
    before = own.bootstrap
    own.kill(0)
    assert not own.running(0)
    assert processes(f"{own.data_dir}/broker-0") == []
    assert "shutting down" not in own.log(0)
    own.restart(0)
    assert own.running(0)
    assert own.bootstrap == before
    assert send(own.bootstrap, "kept", b"after")
    assert read(own.bootstrap, "kept", 2) == [b"before", b"after"]


@pytest.mark.broker
def test_a_paused_broker_answers_nothing_until_it_is_resumed(own: LocalKafka) -> None:
    """Between pause and resume nothing is acknowledged, though the process runs; afterwards all is as before."""
    own.create_topic("paused")
    assert send(own.bootstrap, "paused", b"1")
    own.pause(0)
    assert own.running(0)
    assert not send(own.bootstrap, "paused", b"2", timeout=1)
    own.resume(0)
    assert send(own.bootstrap, "paused", b"3")


@pytest.mark.broker
def test_a_paused_broker_can_be_killed(own: LocalKafka) -> None:
    """SIGKILL ends a paused broker too, and a restart begins unpaused."""
    own.pause(0)
    own.kill(0)
    own.restart(0)
    own.create_topic("after-pause")
    assert send(own.bootstrap, "after-pause", b"1")


@pytest.mark.broker
def test_clusters_side_by_side_know_nothing_of_each_other(own: LocalKafka) -> None:
    """Clusters that start at the same time get other ports, other folders and other cluster ids."""
    with ThreadPoolExecutor(2) as pool:
        others = [LocalKafka(), LocalKafka()]
        try:
            list(pool.map(LocalKafka.start, others))
            clusters = [own, *others]
            ids = {AdminClient({"bootstrap.servers": k.bootstrap}).list_topics(timeout=5).cluster_id for k in clusters}
            assert len(ids) == len({k.bootstrap for k in clusters}) == len({k.data_dir for k in clusters}) == 3
        finally:
            for other in others:
                other.stop()


@pytest.mark.broker
def test_a_port_that_is_taken_is_replaced(own: LocalKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losing the race for a port costs another attempt, not the start."""
    taken = int(own.bootstrap.rpartition(":")[2])
    choose, answers = local_kafka._free_ports, [[taken, taken + 1]]
    monkeypatch.setattr(local_kafka, "_free_ports", lambda count: answers.pop() if answers else choose(count))
    with LocalKafka() as kafka:
        assert kafka.bootstrap != own.bootstrap
    assert not answers


@pytest.mark.broker
def test_a_broker_that_cannot_start_says_why() -> None:
    """A setting that Kafka refuses is an error with the last lines of the broker's log, and leaves nothing behind."""
    kafka = LocalKafka(config={"num.io.threads": "none"})
    with pytest.raises(LocalKafkaError, match=r"exit code 1(.|\n)*num\.io\.threads") as raised:
        kafka.start()
    assert isinstance(raised.value, KafkaGuaranteesError)
    with pytest.raises(LocalKafkaError, match="not started"):
        _ = kafka.bootstrap


@pytest.mark.broker
def test_server_properties_of_the_user_win(own: LocalKafka) -> None:
    """``config`` is merged over what LocalKafka sets."""
    with LocalKafka(config={"auto.create.topics.enable": "true"}) as kafka:
        assert send(kafka.bootstrap, "made-by-the-broker", b"1")
    assert not send(own.bootstrap, "not-made", b"1", timeout=1)


@pytest.mark.broker
def test_brokers_for_measurements_have_the_jvm_that_kafkas_own_scripts_give_them() -> None:
    with LocalKafka(full_jvm=True) as kafka:
        kafka.create_topic("full")
        assert send(kafka.bootstrap, "full", b"full")
        (command,) = [line.split() for line in processes(str(kafka.data_dir)) if "_keeper.py" not in line]
    assert "-XX:+UseG1GC" in command
    assert "-XX:TieredStopAtLevel=1" not in command


OWNER = """
import os, sys, time
from kafka_guarantees.testing import LocalKafka

with LocalKafka() as kafka:
    leaver = os.fork()
    if leaver == 0:
        sys.exit()  # leaves the block in a forked child
    os.waitpid(leaver, 0)
    holder = os.fork()
    if holder == 0:
        time.sleep(60)  # keeps every file descriptor of its parent
        os._exit(0)
    print(kafka.running(0), holder, kafka.data_dir, flush=True)
    time.sleep(60)
"""


@pytest.mark.broker
def test_everything_dies_with_its_owner() -> None:
    """SIGKILL of the owner ends brokers and keeper and removes the data, though a forked child lives on.

    A forked child that leaves the block does not stop its parent's brokers.
    """
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        running, holder, data_dir = owner.stdout.readline().split()
        assert running == "True"
        assert len(processes(data_dir)) == 1
        owner.kill()
        owner.wait()
        try:
            assert becomes_true(lambda: not processes(data_dir) and not Path(data_dir).exists(), 10)
            assert becomes_true(lambda: not processes(f"_keeper.py {owner.pid}"), 10)
        finally:
            os.kill(int(holder), signal.SIGKILL)


@pytest.mark.broker
def test_brokers_die_with_their_keeper() -> None:
    """SIGKILL of the keeper ends the brokers, and the next call says so."""
    kafka = LocalKafka()
    kafka.start()
    data_dir, keeper = kafka.data_dir, kafka._running_keeper()._process
    keeper.kill()
    with pytest.raises(LocalKafkaError, match="was killed"):
        kafka.kill(0)
    kafka.stop()
    if sys.platform == "linux":
        assert becomes_true(lambda: not processes(str(data_dir)), 10)
    shutil.rmtree(data_dir)


@pytest.mark.cluster
def test_three_brokers_go_on_without_one(kafka_cluster: LocalKafka) -> None:
    """With one of three brokers dead, acks=all goes on and topics can be made; restarted, it is in sync again."""
    kafka_cluster.create_topic("survives", partitions=3)
    assert send(kafka_cluster.bootstrap, "survives", b"three")
    kafka_cluster.kill(0)
    assert [kafka_cluster.running(n) for n in range(3)] == [False, True, True]
    assert send(kafka_cluster.bootstrap, "survives", b"two")
    kafka_cluster.create_topic("made-by-two", replication=2)
    kafka_cluster.restart(0)
    metadata = AdminClient({"bootstrap.servers": kafka_cluster.bootstrap}).list_topics("survives", timeout=5)
    assert all(len(partition.isrs) == 3 for partition in metadata.topics["survives"].partitions.values())


def test_misuse_is_refused() -> None:
    """Two brokers, a broker that does not exist and a cluster that was not started are errors with a sentence."""
    with pytest.raises(ValueError, match="1 or 3"):
        LocalKafka(brokers=2)  # type: ignore[arg-type] # the point of the test
    with pytest.raises(ValueError, match="counted from 0"):
        LocalKafka().kill(1)
    with pytest.raises(LocalKafkaError, match="not started"):
        LocalKafka().kill(0)
    LocalKafka().stop()


def test_a_running_kafka_is_used_where_the_variable_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """KAFKA_GUARANTEES_BOOTSTRAP replaces the start of a broker."""
    monkeypatch.setenv("KAFKA_GUARANTEES_BOOTSTRAP", "kafka.example:9092")
    with local_or_running() as bootstrap:
        assert bootstrap == "kafka.example:9092"


def test_missing_java_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without ``java`` on the PATH the error says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalKafkaError, match=r"needs Java 17 or newer.*install"):
        _jars.java()


@pytest.mark.usefixtures("empty_cache")
def test_missing_maven_is_one_sentence() -> None:
    """Without ``mvn`` on the PATH and with nothing in the cache the error says what to install."""
    with pytest.raises(LocalKafkaError, match=r"needs Maven \(mvn\).*install"):
        _jars.kafka_home()


def test_failing_maven_is_quoted(empty_cache: Path) -> None:
    """When Maven fails, its last lines are in the error, and the cache is as empty as before."""
    command(empty_cache, "mvn", "echo '[ERROR] no route to the repository'; exit 1")
    with pytest.raises(LocalKafkaError, match=r"mvn failed \(exit code 1\)(.|\n)*no route to the repository"):
        _jars.kafka_home()
    with pytest.raises(LocalKafkaError, match="no route to the repository"):
        _jars.kafka_home()


def test_old_java_is_one_sentence(empty_cache: Path) -> None:
    """A Java that cannot load Kafka's classes is recognised by what it says."""
    command(empty_cache, "mvn", "mkdir lib")
    command(empty_cache, "java", "echo 'java.lang.UnsupportedClassVersionError: kafka/Kafka'; exit 1")
    with pytest.raises(LocalKafkaError, match="needs Java 17 or newer"):
        _jars.kafka_home()


def test_many_at_once_fill_the_cache_once(empty_cache: Path, tmp_path: Path) -> None:
    """Whoever needs the jars while they are being fetched waits for them; Maven runs once."""
    command(empty_cache, "mvn", f"echo run >> {tmp_path}/runs; sleep 0.3; mkdir lib")
    command(empty_cache, "java", "mkdir scratch; touch scratch/bootstrap.checkpoint")
    with ThreadPoolExecutor(4) as pool:
        homes = set(pool.map(lambda _: _jars.kafka_home(), range(4)))
    assert len(homes) == 1
    assert (homes.pop() / "bootstrap.checkpoint").exists()
    assert (tmp_path / "runs").read_text() == "run\n"


# -- SASL_SSL -------------------------------------------------------------------------------------------------------------


@pytest.mark.broker
def test_a_user_of_a_secure_kafka_may_do_nothing_until_an_acl_says_so() -> None:
    """The operator's way in stays open; users log in over SASL_SSL, see no topic, and are still known after a restart."""
    with LocalKafka(security="sasl_ssl") as kafka:
        kafka.create_topic("t")
        user = kafka.add_user("alice")
        for restarted in (False, True):
            if restarted:
                kafka.restart(0)
            error = AdminClient({**user, "log_level": 0}).list_topics("t", timeout=DEADLINE_S).topics["t"].error
            assert error is not None
            assert error.name() == "TOPIC_AUTHORIZATION_FAILED"
            assert send(kafka.bootstrap, "t", b"operator")
        elsewhere = user["bootstrap.servers"].replace("127.0.0.1", "localhost")
        for wrong in ({"sasl.password": "wrong"}, {"bootstrap.servers": elsewhere}):
            client = AdminClient({**user, **wrong, "log_level": 0})
            with pytest.raises(KafkaException):
                client.list_topics(timeout=1)


@pytest.mark.broker
def test_users_of_three_brokers_are_known_to_all_of_them() -> None:
    """add_user() returns when every broker lets the user in."""
    with LocalKafka(brokers=3, security="sasl_ssl") as kafka:
        user = kafka.add_user("alice")
        for address in user["bootstrap.servers"].split(","):
            metadata = AdminClient({**user, "bootstrap.servers": address}).list_topics(timeout=DEADLINE_S)
            assert set(metadata.brokers) == {0, 1, 2}


@pytest.mark.broker
def test_an_open_kafka_has_no_users(own: LocalKafka) -> None:
    """Asking for one says what to do."""
    with pytest.raises(LocalKafkaError, match='security="sasl_ssl"'):
        own.add_user("alice")


def test_another_security_is_refused() -> None:
    """Before anything is started."""
    with pytest.raises(ValueError, match="sasl_ssl"):
        LocalKafka(security="ssl")  # type: ignore[arg-type]
