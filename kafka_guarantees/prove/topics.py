"""Topics and groups of a run: made at its beginning, removed at its end. Nothing else in the cluster is touched."""

from __future__ import annotations

import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from .evidence import GROUPS
from .life import REFUSING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Self

PREFIX = "kafka-guarantees-prove-"
ANSWER = 30.0  # seconds
LARGEST = 300_000  # bytes that these topics take: so that some records fail at the brokers
LEAVING = 30.0  # seconds that members who were killed may count as members: their session
GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.GROUP_ID_NOT_FOUND)

log = logging.getLogger(__name__)


class OwnTopics:
    """Topics and groups whose names begin with a prefix that nobody has used. A context manager.

    Args:
        config: librdkafka's properties that reach the cluster.
        prefix: what all of them begin with.
        roles: of the topics.
        partitions: of each topic.
        replication: of each topic; None: three replicas, or one for each broker if there are fewer.
        settings: of each topic.

    Attributes:
        prefix: of every name that the run uses.
        topics: names by role.
        groups: names of groups by role, which are removed as well; more may be added.
        replication: of each topic.

    Raises:
        KafkaException: the brokers refuse it, or do not answer.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        prefix: str,
        roles: Sequence[str],
        *,
        partitions: int,
        replication: int | None = None,
        settings: Mapping[str, str],
    ) -> None:
        self.prefix = f"{prefix}{uuid.uuid4().hex[:8]}"
        self.topics = {role: f"{self.prefix}-{role}" for role in roles}
        self.groups: dict[str, str] = {}
        self._admin = AdminClient({"log_level": 0, **config})
        self._partitions = partitions
        self.replication = replication or 0
        self._settings = settings

    def __enter__(self) -> Self:
        names = list(self.topics.values())
        replication = self.replication = self.replication or min(3, len(self._admin.list_topics(timeout=ANSWER).brokers))
        # as on every cluster that is meant to keep what it acknowledges
        settings = {"min.insync.replicas": str(max(1, replication - 1)), **self._settings}
        topics = [NewTopic(name, self._partitions, replication, config=settings) for name in names]
        try:
            for created in self._admin.create_topics(topics, request_timeout=ANSWER).values():
                created.result()
            self._wait(names)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _wait(self, names: list[str]) -> None:
        deadline = time.monotonic() + ANSWER
        while not all(self._has_leaders(name) for name in names):
            if time.monotonic() > deadline:
                raise TimeoutError(f"topics {names} were created, but have no leaders after {ANSWER:.0f} s")
            time.sleep(0.1)

    def _has_leaders(self, name: str) -> bool:
        partitions = self._admin.list_topics(name, timeout=ANSWER).topics[name].partitions.values()
        return len(partitions) == self._partitions and all(partition.leader >= 0 for partition in partitions)

    def _remove(self) -> None:
        """Tidying up is no reason to fail: what stays is named."""
        until = time.monotonic() + LEAVING
        left = self._try_to_remove()
        while any(error.code() == KafkaError.NON_EMPTY_GROUP for error in left.values()) and time.monotonic() < until:
            time.sleep(0.5)
            left = self._try_to_remove()
        for name, error in left.items():
            log.warning("%s was not removed: %s", name, error)

    def _try_to_remove(self) -> dict[str, KafkaError]:
        """What is still there, and why."""
        answers = {
            **self._admin.delete_topics(list(self.topics.values()), request_timeout=ANSWER),
            **(self._admin.delete_consumer_groups(list(self.groups.values()), request_timeout=ANSWER) if self.groups else {}),
        }
        left = {}
        for name, answer in answers.items():
            try:
                answer.result()
            except KafkaException as exc:
                left[name] = exc.args[0]
        return {name: error for name, error in left.items() if error.code() not in GONE}


class Topics(OwnTopics):
    """The topics and groups of a proof: one to read and one to write, and one for records that brokers refuse.

    Attributes:
        source, sink: the topics.
    """

    def __init__(self, config: Mapping[str, Any], partitions: int) -> None:
        # whatever the brokers' defaults are: what is gone before it is read would count as lost
        kept = {"cleanup.policy": "delete", "retention.ms": str(7 * 86_400_000), "retention.bytes": "-1"}
        settings = {"max.message.bytes": str(LARGEST), **kept}
        super().__init__(config, PREFIX, ("in", "out", REFUSING), partitions=partitions, settings=settings)
        self.source, self.sink = self.topics["in"], self.topics["out"]
        self.groups = {role: f"{self.prefix}-{role}" for role in GROUPS}
