"""The two topics and two groups of a run: made at its beginning, removed at its end. Nothing else in the cluster is touched."""

from __future__ import annotations

import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from .evidence import GROUPS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

PREFIX = "kafka-guarantees-prove-"
ANSWER = 30.0  # seconds
LARGEST = 300_000  # bytes that these topics take: so that some records fail at the brokers
LEAVING = 30.0  # seconds that members who were killed may count as members: their session
GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.GROUP_ID_NOT_FOUND)

log = logging.getLogger(__name__)


class Topics:
    """A context manager.

    Args:
        config: librdkafka's properties that reach the cluster.
        partitions: of each topic. Three replicas, or one for each broker if there are fewer.

    Attributes:
        prefix: of every name that the run uses.
        source, sink: the topics.
        groups: group.id by role.

    Raises:
        KafkaException: the brokers refuse it, or do not answer.
    """

    def __init__(self, config: Mapping[str, Any], partitions: int) -> None:
        self.prefix = f"{PREFIX}{uuid.uuid4().hex[:8]}"
        self.source, self.sink = f"{self.prefix}-in", f"{self.prefix}-out"
        self.groups = {role: f"{self.prefix}-{role}" for role in GROUPS}
        self._admin = AdminClient({"log_level": 0, **config})
        self._partitions = partitions

    def __enter__(self) -> Self:
        names = [self.source, self.sink]
        replication = min(3, len(self._admin.list_topics(timeout=ANSWER).brokers))
        # as on every cluster that is meant to keep what it acknowledges
        settings = {"min.insync.replicas": str(max(1, replication - 1)), "max.message.bytes": str(LARGEST)}
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
            **self._admin.delete_topics([self.source, self.sink], request_timeout=ANSWER),
            **self._admin.delete_consumer_groups(list(self.groups.values()), request_timeout=ANSWER),
        }
        left = {}
        for name, answer in answers.items():
            try:
                answer.result()
            except KafkaException as exc:
                left[name] = exc.args[0]
        return {name: error for name, error in left.items() if error.code() not in GONE}
