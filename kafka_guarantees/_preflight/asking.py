"""The brokers are asked: all at once, with one deadline, on a thread of their own.

Rules.
* Nothing is asked for by its coordinator, so neither groups nor transactional ids are: librdkafka 2.16 ends the process by an
  assertion when the connection to one breaks (librdkafka issue 4605).
* Nothing is asked for that creates a topic: ``list_topics(name)`` would, where ``allow.auto.create.topics`` is on.
* A C client is reached by its handle alone, and an error is not raised where it is a future's. Its traceback would keep the
  frames of this file in a cycle with it, and with them the client. Who collects that destroys the client; librdkafka ends the
  process by an assertion if that is the client's own thread, which runs Python to hand out answers.
* Clients are made beside each other, and before the time for answers begins: with an ``oauth_cb`` confluent-kafka has each
  of them wait for its token in whole seconds (confluent_kafka.c:2642).
* What the brokers refuse or do not answer is an answer too, and no exception.
"""

from __future__ import annotations

import time
from concurrent.futures import TimeoutError  # noqa: A004 - before Python 3.11 it is another one than the builtin
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined] # not re-exported by its stubs
    AdminClient,
    ConfigResource,
    ConfigSource,
)

from .._client import Abandoned, Caller, Handle
from .._dead_letters import TOPIC_NAME
from .._threads import Task, start
from ..errors import BrokerError, kafka_error
from .case import Case
from .checks import findings
from .report import PreflightReport
from .seen import NO_NAME, OFFSETS, PATTERN, TRANSACTIONS, Cluster, Config, Topic, matches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Future
    from datetime import timedelta

    from .._settings import Settings

NO_ANSWER = "_TIMED_OUT"
OF_TOPIC = (ConfigSource.DYNAMIC_TOPIC_CONFIG, ConfigSource.DYNAMIC_TOPIC_CONFIG.value)  # confluent-kafka gives the number
LEAST = 0.05  # seconds that a request is given at least
OTHERS = 0.25  # seconds until addresses that did not answer are not waited for: one that is down must not delay every start
TOKEN = 10.0  # seconds that confluent-kafka has a client wait for a token
GRACE = 1.0  # seconds after which not even librdkafka's own timeouts are waited for


def preflight(
    settings: Settings,
    topics: Sequence[str],
    *,
    dead_letter: str | None = None,
    retention: timedelta | None = None,
    timeout: float = 5.0,
    give_up: Callable[[], bool] = lambda: False,
) -> PreflightReport:
    """Ask the brokers whether they are as the guarantee needs them.

    Args:
        settings: the resolved settings of the guarantee.
        topics: those that are consumed or produced to: names, or patterns that begin with ``^``.
        dead_letter: the dead letter topic.
        retention: how long a deduplication store or an inbox remembers an id.
        timeout: seconds for everything but tokens of ``oauth_cb``, which are waited for before. Brokers that do not answer
            are a finding, not an exception.
        give_up: whether nobody waits any longer, as if they had not answered.

    Raises:
        TypeError: ``topics`` is a single name.
        UnsafeConfigError: no client can be made with these settings.
    """
    if isinstance(topics, str):
        raise TypeError(f"topics is a list of names: [{topics!r}]")
    names = tuple(dict.fromkeys(topics))
    wanted = names if dead_letter is None or dead_letter.startswith(PATTERN) else (*names, dead_letter)
    late = time.monotonic() + timeout + GRACE + (TOKEN if "oauth_cb" in settings.admin else 0.0)

    def begun() -> float:
        nonlocal late
        deadline = time.monotonic() + timeout
        late = deadline + GRACE
        return deadline

    caller = Caller("kafka-guarantees-preflight")
    try:
        seen = caller.call(
            lambda: ask(settings, wanted, begun),
            lambda: time.monotonic() > late or give_up(),
            "preflight",
        )
    except Abandoned:
        seen = Cluster(error=NO_ANSWER)
    except BrokerError as exc:  # there is no token
        seen = Cluster(error=str(exc))
    finally:
        caller.end()
    if dead_letter is not None and dead_letter.startswith(PATTERN):  # where one is written to, that is a name like any other
        seen = replace(seen, topics={**seen.topics, dead_letter: Topic(error=NO_NAME)})
    case = Case(settings, seen, names, dead_letter, retention)
    return PreflightReport(settings.guarantee, findings(case), seen.cluster_id)


def ask(settings: Settings, topics: Iterable[str], begun: Callable[[], float]) -> Cluster:
    """What there is to know about some topics and the cluster they are in.

    Args:
        settings: what reaches the cluster.
        topics: names and patterns.
        begun: hears that the clients are made. Returns the deadline, on the monotonic clock.

    Raises:
        UnsafeConfigError: no client can be made with these settings.
        BrokerError: ``oauth_cb`` gave no token.
    """
    admin = dict(settings.admin)
    addresses = [address.strip() for address in str(admin["bootstrap.servers"]).split(",") if address.strip()]
    heard: list[str] = []
    configs = [{**admin, "error_cb": lambda error: heard.append(error.str())}]
    if len(addresses) > 1:  # X29: two clusters in one list
        configs += [{**admin, "bootstrap.servers": address} for address in addresses]
    else:
        addresses = []
    main, *each = clients = [Handle() for _ in configs]
    try:
        _make(clients, configs)
        deadline = begun()
        asked = [one.raw.describe_cluster(request_timeout=_left(deadline)) for one in each]
        started = time.monotonic()
        seen = _ask(main, tuple(topics), deadline)
        if seen.cluster_id is None:
            main.raw.poll(0)  # serves error_cb, which knows better than a time-out
            return replace(seen, error=": ".join([seen.error, *heard[:1]]))
        until = min(deadline, started + OTHERS)
        answers = {address: _result(future, until)[0] for address, future in zip(addresses, asked, strict=True)}
        return replace(seen, others={address: one.cluster_id for address, one in answers.items() if one is not None})
    finally:
        for client in clients:
            if client.raw is not None:
                client.let_go()


def _ask(client: Handle, wanted: tuple[str, ...], deadline: float) -> Cluster:
    # authorized operations need brokers of 2.3, which is older than all that confluent-kafka supports
    cluster = client.raw.describe_cluster(include_authorized_operations=True, request_timeout=_left(deadline))
    named = [*(name for name in wanted if not name.startswith(PATTERN)), *_matching(client, wanted, deadline)]
    names = [name for name in dict.fromkeys((*named, OFFSETS, TRANSACTIONS)) if TOPIC_NAME.match(name)]
    described = client.raw.describe_topics(
        TopicCollection(names), include_authorized_operations=True, request_timeout=_left(deadline)
    )
    configured = client.raw.describe_configs(
        [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names], request_timeout=_left(deadline)
    )
    answer, error = _result(cluster, deadline)
    if answer is None:
        return Cluster(error=error)
    of_brokers = {}
    for node in answer.nodes:  # each has a file of its own
        broker = ConfigResource(ConfigResource.Type.BROKER, str(node.id))
        of_brokers[node.id] = client.raw.describe_configs([broker], request_timeout=_left(deadline))[broker]
    configs = {resource.name: future for resource, future in configured.items()}
    seen = {name: _topic(described[name], configs[name], deadline) for name in names}
    return Cluster(
        cluster_id=answer.cluster_id,
        brokers=len(answer.nodes),
        rights=_rights(answer),
        topics={**seen, **{name: Topic(error=NO_NAME) for name in named if name not in seen}},
        configs={broker: _config(future, deadline) for broker, future in of_brokers.items()},
    )


def _make(clients: Sequence[Handle], configs: Sequence[Mapping[str, object]]) -> None:
    """Make a client with each of these settings, all at once."""
    quiet = [{**config, "log_level": 0} for config in configs]  # they would log to stderr what is reported here
    made = [Task(partial(client.make, AdminClient, config)) for client, config in zip(clients, quiet, strict=True)]
    for task in made:
        start(task.run, name="kafka-guarantees-make")
    for task in made:
        task.ended.wait()
    for task in made:
        task.result()


def _matching(client: Handle, wanted: Iterable[str], deadline: float) -> list[str]:
    patterns = [name for name in wanted if name.startswith(PATTERN)]
    if not patterns:
        return []
    try:
        known = client.raw.list_topics(timeout=_left(deadline)).topics
    except KafkaException:
        return []
    return sorted(name for name in known if any(matches(pattern, name) for pattern in patterns))


def _topic(described: Future[Any], configured: Future[Any], deadline: float) -> Topic:
    answer, error = _result(described, deadline)
    if answer is None:
        return Topic(error=error)
    replicas = min((len(partition.replicas) for partition in answer.partitions), default=None)
    return Topic(replicas, _rights(answer), config=_config(configured, deadline))


def _config(future: Future[Any], deadline: float) -> Config:
    answer, error = _result(future, deadline)
    if answer is None:
        return Config(error=error)
    return Config(
        {name: entry.value for name, entry in answer.items() if entry.value is not None},
        inherited=frozenset(name for name, entry in answer.items() if entry.source not in OF_TOPIC),
    )


def _rights(answer: Any) -> frozenset[str] | None:
    operations = answer.authorized_operations
    return None if operations is None else frozenset(operation.name for operation in operations)


def _result(future: Future[Any], deadline: float) -> tuple[Any, str]:
    try:
        error = future.exception(max(0.0, deadline - time.monotonic()))  # not raised: see the rules above
    except TimeoutError:
        return None, NO_ANSWER
    if error is None:
        return future.result(), ""
    return None, kafka_error(error).name() if isinstance(error, KafkaException) else type(error).__name__


def _left(deadline: float) -> float:
    return max(LEAST, deadline - time.monotonic())
