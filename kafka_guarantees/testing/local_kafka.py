"""A real Apache Kafka on this machine: brokers started from their jars, ready in seconds, gone with their owner.

What lives here: ``LocalKafka`` (one or three nodes, each broker and controller), ``RunningKafka`` (a cluster that
somebody else runs, with the same ``bootstrap`` and ``create_topic``), and ``local_or_running`` to choose between them.

Rules.
    * It is Kafka as it ships: settings differ only to make it start and notice failures fast (``_SETTINGS``).
    * Every process belongs to a keeper (``_keeper.py``), which ends them all when the owner is gone, however it went.
    * Nothing here waits without a deadline.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined] # not re-exported by its stubs
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from confluent_kafka.cimpl import NewTopic
from typing_extensions import Self

from kafka_guarantees.testing._jars import CHECKPOINT, LIB, LocalKafkaError, explain_java, java, kafka_home
from kafka_guarantees.testing._sasl_ssl import MECHANISM, broker_settings, make_certificate

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from confluent_kafka.admin._metadata import ClusterMetadata  # the stubs do not re-export it

__all__ = ["BOOTSTRAP_VARIABLE", "LocalKafka", "LocalKafkaError", "RunningKafka", "local_or_running"]

BOOTSTRAP_VARIABLE = "KAFKA_GUARANTEES_BOOTSTRAP"

_START_DEADLINE_S = 60.0
_TOPIC_DEADLINE_S = 30.0
_POLL_S = 0.05
_LOG_LINES = 20
_PORT_ATTEMPTS = 5
_KEEPER_GONE = "the process that keeps LocalKafka's brokers was killed, and they died with it"
_INTERNAL = ("__consumer_offsets", "__transaction_state")
# Below every system's range of ephemeral ports: a client that connects again and again to a dead broker's port can
# otherwise be given that very port as its own, connect to itself, and keep the broker from coming back.
_PORTS = range(15_000, 32_000)

_SETTINGS: dict[str, object] = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "auto.create.topics.enable": "false",  # a misspelt topic is an error, not a new topic
    # Internal topics that are made in a moment.
    "offsets.topic.num.partitions": 4,
    "transaction.state.log.num.partitions": 4,
    "share.coordinator.state.topic.num.partitions": 4,
    # Groups: no waiting for more members, and sessions as short as a test needs.
    "group.initial.rebalance.delay.ms": 0,
    "group.min.session.timeout.ms": 1000,
    "group.consumer.min.session.timeout.ms": 1000,
    "group.consumer.session.timeout.ms": 6000,
    "group.consumer.min.heartbeat.interval.ms": 200,
    "group.consumer.heartbeat.interval.ms": 1000,
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": 1000,  # abandoned transactions end soon
    # Failures are noticed in seconds.
    "broker.heartbeat.interval.ms": 300,
    "broker.session.timeout.ms": 2000,
    "controller.quorum.fetch.timeout.ms": 1500,
    "controller.quorum.election.timeout.ms": 500,
    "controller.quorum.election.backoff.max.ms": 500,
    "log.cleaner.dedupe.buffer.size": 4 * 1024 * 1024,  # 128 MiB of heap by default
}

_QUICK_JVM = ("-Xms64m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_FULL_JVM = (  # as Kafka's own kafka-run-class.sh has it
    "-Xmx1G",
    "-server",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
)
_JVM = (
    "-XX:-UsePerfData",  # or each killed JVM leaves a file in /tmp
    "-XX:+ExitOnOutOfMemoryError",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
    "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.common.config.AbstractConfig=warn",  # 400 lines of settings
)


class RunningKafka:
    """A Kafka that runs already, seen through its bootstrap servers.

    Args:
        bootstrap: ``"host:port,host:port"``.
    """

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap

    @property
    def bootstrap(self) -> str:
        """What goes into ``bootstrap.servers``."""
        return self._bootstrap

    def create_topic(
        self,
        name: str,
        partitions: int = 1,
        replication: int | None = None,
        config: Mapping[str, object] | None = None,
    ) -> None:
        """Create a topic and wait until it can be used: every partition has a leader, on every broker's account.

        Not while a broker is paused: the request may go to that one.

        Args:
            name: the topic.
            partitions: how many.
            replication: copies of each partition; None means three, or the number of brokers if that is smaller.
            config: topic settings, such as ``{"cleanup.policy": "compact"}``.

        Raises:
            confluent_kafka.KafkaException: the brokers refuse it, for example because it exists.
            LocalKafkaError: it was created and had no leader within 30 seconds.
        """
        admin = AdminClient({**_QUIET, "bootstrap.servers": self.bootstrap})
        brokers, known = self._addresses(admin), admin.list_topics(timeout=_TOPIC_DEADLINE_S).topics
        topic = NewTopic(
            name,
            num_partitions=partitions,
            replication_factor=min(3, len(brokers)) if replication is None else replication,
            config={key: str(value) for key, value in (config or {}).items()},
        )
        try:
            admin.create_topics([topic], request_timeout=_TOPIC_DEADLINE_S)[name].result()
        except KafkaException as exc:
            # librdkafka sends a request again whose answer was lost: then its first copy has made the topic
            if name in known or exc.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
        deadline = time.monotonic() + _TOPIC_DEADLINE_S
        while not all(_has_leaders(_metadata(address, name), name) for address in brokers):
            if time.monotonic() > deadline:
                raise LocalKafkaError(f"topic {name!r} was created, but has no leaders after {_TOPIC_DEADLINE_S:.0f} s")
            time.sleep(_POLL_S)

    def _addresses(self, admin: AdminClient) -> list[str]:
        """One address for each broker that should know of a new topic."""
        metadata = admin.list_topics(timeout=_TOPIC_DEADLINE_S)
        return [f"{broker.host}:{broker.port}" for broker in metadata.brokers.values()]


class LocalKafka(RunningKafka):
    """Apache Kafka from its jars, on loopback, in a temporary folder: one broker, or three that replicate.

    A context manager. Three brokers have replication factor 3 and ``min.insync.replicas`` 2. The first use on a machine
    lets Maven fetch the jars into the user's cache. Brokers die and their data is removed when the block ends, and also
    when the process that started them dies in any way.

    Args:
        brokers: 1 or 3.
        config: server properties that win over the ones that LocalKafka sets.
        security: ``"sasl_ssl"`` adds a listener for the users of :meth:`add_user`, and Kafka's own authorizer, which denies
            them everything that no ACL allows. ``bootstrap`` stays the way in of the operator, who may do anything.
        full_jvm: brokers have the compiler, the garbage collector and the memory that Kafka's own scripts give them. For
            measurements: without it they start sooner and are smaller, and slower once there is much to do.

    Raises:
        ValueError: another number of brokers, or another security.
    """

    def __init__(
        self,
        brokers: Literal[1, 3] = 1,
        *,
        config: Mapping[str, object] | None = None,
        security: Literal["sasl_ssl"] | None = None,
        full_jvm: bool = False,
    ) -> None:
        if brokers not in (1, 3):
            raise ValueError(f"brokers={brokers!r}: LocalKafka runs 1 or 3 of them")
        if security not in (None, "sasl_ssl"):
            raise ValueError(f'security={security!r}: LocalKafka knows "sasl_ssl", or None')
        super().__init__("")
        self._nodes = range(brokers)
        self._config = dict(config or {})
        self._secure = security is not None
        self._jvm = (*(_FULL_JVM if full_jvm else _QUICK_JVM), *_JVM)
        self._ca = Path()
        self._sasl_ports: dict[int, int] = {}  # node -> port of the SASL_SSL listener, if there is one
        self._keeper: _KeeperPipe | None = None
        self._java: list[str] = []
        self._cluster_id = ""
        self._ports: dict[int, tuple[int, int]] = {}  # node -> (broker, controller)
        self._paused: set[int] = set()

    @property
    def bootstrap(self) -> str:
        """What goes into ``bootstrap.servers``: all brokers, whether they run at the moment or not."""
        self._running_keeper()
        return ",".join(self._address(n) for n in self._nodes)

    def add_user(self, name: str) -> dict[str, str]:
        """Make a user with a random password and no rights. Returns its configuration for librdkafka.

        The certificate is for 127.0.0.1 alone: with ``localhost`` in ``bootstrap.servers`` the host name is wrong.

        Args:
            name: of the user; its principal is ``User:name``. One that exists gets a new password.

        Raises:
            LocalKafkaError: this cluster has no security; or the user could not log in within 30 seconds.
        """
        self._running_keeper()
        if not self._secure:
            raise LocalKafkaError('this LocalKafka has no users: make it with security="sasl_ssl"')
        password = uuid.uuid4().hex
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        credential = UserScramCredentialUpsertion(name, info, password.encode())
        admin = AdminClient({**_QUIET, "bootstrap.servers": self.bootstrap})
        admin.alter_user_scram_credentials([credential])[name].result(_TOPIC_DEADLINE_S)
        addresses = {n: f"127.0.0.1:{port}" for n, port in self._sasl_ports.items()}
        user = {
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self._ca),
            "sasl.mechanism": MECHANISM,
            "sasl.username": name,
            "sasl.password": password,
        }
        deadline = time.monotonic() + _TOPIC_DEADLINE_S
        for address in [addresses[n] for n in self._nodes if self.running(n) and n not in self._paused]:
            while _metadata(address, security=user) is None:  # brokers hear of it one after the other
                if time.monotonic() > deadline:
                    raise LocalKafkaError(f"user {name!r} cannot log in at {address} after {_TOPIC_DEADLINE_S:.0f} s")
                time.sleep(_POLL_S)
        return {"bootstrap.servers": ",".join(addresses.values()), **user}

    @property
    def brokers(self) -> int:
        """How many brokers the cluster has."""
        return len(self._nodes)

    @property
    def data_dir(self) -> Path:
        """The folder with the brokers' data, settings and logs. It is removed when they stop."""
        return self._running_keeper().data_dir

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the brokers and wait until each of them answers and knows the others.

        Raises:
            LocalKafkaError: Java or Maven is missing, or a broker did not come up within 60 seconds (with the last
                lines of its log). Nothing is left running.
        """
        if self._keeper is not None:
            raise LocalKafkaError("this LocalKafka runs already")
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            try:
                self._start_once()
            except _AddressInUse:
                self.stop()
                if attempt == _PORT_ATTEMPTS:
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                return

    def stop(self) -> None:
        """Kill the brokers and remove their data. Does nothing when they are stopped already."""
        keeper, self._keeper = self._keeper, None
        self._paused.clear()
        if keeper is not None:
            keeper.close()

    def wait(self) -> NoReturn:
        """Block for as long as all brokers run: for a Kafka in the foreground. Ctrl-C ends it as usual.

        Raises:
            LocalKafkaError: a broker ended by itself.
        """
        while True:
            for n in self._nodes:
                self._raise_if_ended(n)
            time.sleep(1)

    def running(self, n: int) -> bool:
        """True while broker ``n`` (counted from 0) has a process, paused or not."""
        return self._exit_code(n) is None

    def kill(self, n: int) -> None:
        """SIGKILL broker ``n`` and wait until it is gone. Its data stays for :meth:`restart`."""
        self._tell("kill", n)
        self._paused.discard(n)

    def pause(self, n: int) -> None:
        """SIGSTOP broker ``n``: its connections stay open and nothing is answered. It stands still on return."""
        if n in self._paused:
            return  # it has stopped already, and would not stop again
        self._tell("pause", n)
        self._paused.add(n)

    def resume(self, n: int) -> None:
        """SIGCONT broker ``n`` after :meth:`pause`."""
        self._tell("resume", n)
        self._paused.discard(n)

    def restart(self, n: int, *, wait: bool = True) -> None:
        """Start broker ``n`` again on the same ports with its data. A broker that still runs is killed first.

        Args:
            n: the broker, counted from 0.
            wait: return when it answers, the other running brokers see it, and its replicas are in sync where there is
                a leader. Without it, return at once.

        Raises:
            LocalKafkaError: it did not come back within 60 seconds, with the last lines of its log.
        """
        self.kill(n)
        self._spawn(n)
        if wait:
            deadline = time.monotonic() + _START_DEADLINE_S
            self._wait_ready(deadline)
            self._wait_until(lambda: _in_sync(_metadata(self._address(n)), n), n, "its replicas are in sync", deadline)

    def log_path(self, n: int) -> Path:
        """The file with everything that broker ``n`` wrote, over all its restarts."""
        self._check(n)
        return self.data_dir / f"broker-{n}.log"

    def log(self, n: int, lines: int = _LOG_LINES) -> str:
        """The last lines of the log of broker ``n``."""
        return _tail(self.log_path(n), lines)

    def _start_once(self) -> None:
        home, command = kafka_home(), java()
        self._java = [command, *self._jvm, "-cp", f"{home / LIB}/*"]
        self._keeper = _KeeperPipe()
        ports = iter(_free_ports((3 if self._secure else 2) * self.brokers))
        self._ports = {n: (next(ports), next(ports)) for n in self._nodes}
        if self._secure:
            self._sasl_ports = {n: next(ports) for n in self._nodes}
            self._ca = make_certificate(self.data_dir, command)
        self._cluster_id = _kafka_uuid()
        for n in self._nodes:
            self._format(n, home / CHECKPOINT)
            self._spawn(n)
        deadline = time.monotonic() + _START_DEADLINE_S
        self._wait_ready(deadline)
        self._warm_up(deadline)

    def _format(self, n: int, checkpoint: Path) -> None:
        """Write what ``StorageTool format`` writes: the features to begin with, and who this node is."""
        storage = self._node_dir(n) / "data"
        storage.mkdir(parents=True)
        (self._node_dir(n) / "tmp").mkdir()
        shutil.copy(checkpoint, storage / CHECKPOINT)
        identity = {"version": 1, "cluster.id": self._cluster_id, "node.id": n, "directory.id": _kafka_uuid()}
        _write_properties(storage / "meta.properties", identity)
        _write_properties(self._node_dir(n) / "server.properties", self._settings(n))

    def _settings(self, n: int) -> dict[str, object]:
        port, controller_port = self._ports[n]
        copies = self.brokers
        in_sync = 1 if copies == 1 else copies - 1
        sasl_ssl = f",SASL_SSL://127.0.0.1:{self._sasl_ports[n]}" if self._secure else ""
        return {
            **_SETTINGS,
            **(broker_settings(self.data_dir) if self._secure else {}),
            "node.id": n,
            "log.dirs": self._node_dir(n) / "data",
            "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}{sasl_ssl}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}{sasl_ssl}",
            "controller.quorum.voters": ",".join(f"{i}@127.0.0.1:{self._ports[i][1]}" for i in self._nodes),
            "default.replication.factor": copies,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": in_sync,
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": in_sync,
            **self._config,
        }

    def _spawn(self, n: int) -> None:
        node = self._node_dir(n)
        argv = [*self._java, f"-Djava.io.tmpdir={node / 'tmp'}", "kafka.Kafka", str(node / "server.properties")]
        self._running_keeper().ask("start", name=str(n), argv=argv, log=str(self.log_path(n)))

    def _wait_ready(self, deadline: float) -> None:
        expected = {n for n in self._nodes if self.running(n)} - self._paused
        for n in sorted(expected):
            self._wait_until(partial(self._answers, n, expected), n, "it is ready", deadline)

    def _answers(self, n: int, expected: Collection[int]) -> bool:
        """True once broker ``n`` itself knows a controller and all expected brokers."""
        metadata = _metadata(self._address(n))
        return (
            metadata is not None
            and metadata.cluster_id == self._cluster_id  # another cluster may have taken the port first
            and metadata.orig_broker_id == n
            and metadata.controller_id >= 0
            and set(metadata.brokers).issuperset(expected)
        )

    def _wait_until(self, happened: Callable[[], bool], n: int, what: str, deadline: float) -> None:
        while not happened():
            self._raise_if_ended(n)
            if time.monotonic() > deadline:
                raise LocalKafkaError(f"waited in vain for broker {n} until {what}. Its log ends:\n{self.log(n)}")
            time.sleep(_POLL_S)

    def _raise_if_ended(self, n: int) -> None:
        code = self._exit_code(n)
        if code is None:
            return
        log = self.log(n, 200)
        error = _AddressInUse if "Address already in use" in log else LocalKafkaError
        why = explain_java(log) or f"broker {n} ended (exit code {code})."
        raise error(f"{why} Its log ends:\n{self.log(n)}")

    def _warm_up(self, deadline: float) -> None:
        """Let the coordinators create their topics now, so that the first group and transaction are no slower.

        Asking for a coordinator creates its topic. The answer comes too early to be of use, and librdkafka asks again
        after 0.5 s, so the topics are waited for and not the answer.
        """
        config = {**_QUIET, "bootstrap.servers": self.bootstrap}
        admin, producer = AdminClient(config), Producer({**config, "transactional.id": "kafka-guarantees-warm-up"})
        admin.describe_consumer_groups(["kafka-guarantees-warm-up"])
        with suppress(KafkaException):
            producer.init_transactions(_POLL_S)
        self._wait_until(
            lambda: all(_has_leaders(_metadata(self._address(n)), topic) for n in self._nodes for topic in _INTERNAL),
            0,
            f"{' and '.join(_INTERNAL)} have leaders",
            deadline,
        )
        del admin, producer  # held until here: a client that is dropped asks for nothing

    def _addresses(self, admin: AdminClient) -> list[str]:
        del admin  # we know better: a killed broker stays in the metadata for some seconds
        return [self._address(n) for n in self._nodes if self.running(n) and n not in self._paused]

    def _address(self, n: int) -> str:
        return f"127.0.0.1:{self._ports[n][0]}"

    def _node_dir(self, n: int) -> Path:
        return self.data_dir / f"broker-{n}"

    def _exit_code(self, n: int) -> int | None:
        code: int | None = self._tell("poll", n)
        return code

    def _tell(self, verb: str, n: int) -> Any:
        self._check(n)
        return self._running_keeper().ask(verb, name=str(n))

    def _check(self, n: int) -> None:
        if n not in self._nodes:
            raise ValueError(f"broker {n!r}: this cluster has {self.brokers}, counted from 0")

    def _running_keeper(self) -> _KeeperPipe:
        if self._keeper is None:
            raise LocalKafkaError("this LocalKafka is not started: use it as `with LocalKafka() as kafka:`")
        return self._keeper


@contextmanager
def local_or_running(brokers: Literal[1, 3] = 1) -> Iterator[str]:
    """The bootstrap servers of the Kafka that ``KAFKA_GUARANTEES_BOOTSTRAP`` names, or of one started for this block.

    Args:
        brokers: how many to start, 1 or 3, where the variable is not set.

    Raises:
        LocalKafkaError: as :meth:`LocalKafka.start`.
    """
    running = os.environ.get(BOOTSTRAP_VARIABLE)
    if running:
        yield running
        return
    with LocalKafka(brokers) as kafka:
        yield kafka.bootstrap


class _AddressInUse(LocalKafkaError):
    """Somebody took a port between our looking and the broker's binding it: others are tried."""


class _KeeperPipe:
    """The owner's end of the connection to ``_keeper.py``. One request at a time, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._socket, theirs = socket.socketpair()
        script = Path(__file__).with_name("_keeper.py")
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own script, without a shell
                [sys.executable, "-I", "-S", str(script), str(self._owner), "kafka-guarantees-"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                start_new_session=True,
            )
        self._pipe = self._socket.makefile("rw", encoding="utf-8")
        self.data_dir = Path(self._answer())

    def ask(self, verb: str, **arguments: object) -> Any:
        with self._lock, suppress(ConnectionError):
            self._write({"do": verb, **arguments})
            return self._answer()
        raise LocalKafkaError(_KEEPER_GONE)

    def close(self) -> None:
        if os.getpid() != self._owner:
            return  # a forked child that leaves the block: the brokers are its parent's
        with self._lock, self._socket:
            with suppress(ConnectionError):  # the keeper is gone already
                self._write({"do": "close"})  # closing alone is not enough: a forked child may hold the socket too
            self._process.wait()
            with suppress(ConnectionError):
                self._pipe.close()

    def _write(self, request: Mapping[str, object]) -> None:
        self._pipe.write(json.dumps(request) + "\n")
        self._pipe.flush()

    def _answer(self) -> Any:
        line = self._pipe.readline()
        answer = json.loads(line) if line else {"error": _KEEPER_GONE}
        if "error" in answer:
            raise LocalKafkaError(answer["error"])
        return answer["ok"]


_QUIET: dict[str, str | int | float | bool] = {
    "log_level": 0,
    "reconnect.backoff.max.ms": 200,
}  # refused connections are expected


def _metadata(address: str, topic: str | None = None, *, security: Mapping[str, str] | None = None) -> ClusterMetadata | None:
    """What the broker at this address says of the cluster, or None if it does not answer.

    A new client each time: one that knows the whole cluster may ask another broker.
    """
    if not _accepts(address):
        return None
    client = AdminClient({**_QUIET, **(security or {}), "bootstrap.servers": address})
    try:
        return client.list_topics(topic, timeout=2) if topic else client.list_topics(timeout=2)
    except KafkaException:
        return None


def _accepts(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def _has_leaders(metadata: ClusterMetadata | None, topic: str) -> bool:
    if metadata is None or topic not in metadata.topics:
        return False
    partitions = metadata.topics[topic].partitions.values()  # none, while the broker has not heard of the topic
    return bool(partitions) and all(partition.leader >= 0 for partition in partitions)


def _in_sync(metadata: ClusterMetadata | None, n: int) -> bool:
    """True once ``n`` is an in-sync replica of all its partitions, save those that have no leader to be in sync with."""
    return metadata is not None and all(
        n in partition.isrs
        for topic in metadata.topics.values()
        for partition in topic.partitions.values()
        if n in partition.replicas and partition.leader >= 0
    )


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if _is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise LocalKafkaError(f"fewer than {count} free ports between {_PORTS.start} and {_PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the JVM does
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _kafka_uuid() -> str:
    """A random id in Kafka's spelling, which never begins with a dash."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()).startswith("-"):
        pass
    return text


def _write_properties(path: Path, values: Mapping[str, object]) -> None:
    path.write_text("".join(f"{key}={value}\n" for key, value in values.items()))


def _tail(path: Path, lines: int) -> str:
    with path.open(errors="replace") as log:
        return "".join(deque(log, lines)).rstrip()
