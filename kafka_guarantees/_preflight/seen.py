"""What the brokers said, as plain data: the checks need nothing else of them.

Rules. An ``error`` is the name of a Kafka error code, and empty where the answer came. What nobody could be asked for is None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

OFFSETS = "__consumer_offsets"
TRANSACTIONS = "__transaction_state"

PATTERN = "^"  # what a topic begins with that is a pattern
MISSING = "UNKNOWN_TOPIC_OR_PART"
NO_NAME = "TOPIC_EXCEPTION"  # what the brokers would say of one that can be no topic's
DENIED = frozenset({"TOPIC_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED"})


@dataclass(frozen=True)
class Config:
    """The settings of a topic or of a broker, defaults included. ``inherited``: those of a topic that are its brokers' own."""

    values: Mapping[str, str] | None = None
    error: str = ""
    inherited: frozenset[str] = frozenset()

    def text(self, setting: str) -> str | None:
        """None where it was not told, as by brokers of a version that does not have it."""
        return None if self.values is None else self.values.get(setting)

    def number(self, setting: str) -> int | None:
        """Likewise."""
        text = self.text(setting)
        try:
            return None if text is None else int(text)
        except ValueError:
            return None


@dataclass(frozen=True)
class Topic:
    """One topic: ``replicas`` of its worst partition, the ``rights`` that this client has on it, and its settings."""

    replicas: int | None = None
    rights: frozenset[str] | None = None
    error: str = ""
    config: Config = field(default_factory=Config)


@dataclass(frozen=True)
class Cluster:
    """What was seen of a cluster.

    Attributes:
        cluster_id: None where nobody answered.
        brokers: how many there are.
        rights: what this client may do with the cluster itself.
        others: the cluster that each address of ``bootstrap.servers`` leads to, as far as they answered.
        topics: those that were asked for, the internal ones, and those that a pattern matches.
        configs: of each broker, by its id.
        error: why nobody answered.
    """

    cluster_id: str | None = None
    brokers: int = 0
    rights: frozenset[str] | None = None
    others: Mapping[str, str] = field(default_factory=dict)
    topics: Mapping[str, Topic] = field(default_factory=dict)
    configs: Mapping[int, Config] = field(default_factory=dict)
    error: str = ""

    @property
    def config(self) -> Config:
        """Of one broker that has told, for what all have alike."""
        return next((one for one in self.configs.values() if one.values is not None), Config())

    def numbers(self, setting: str) -> dict[int, int]:
        """What each broker has, as far as they told."""
        numbers = {broker: config.number(setting) for broker, config in self.configs.items()}
        return {broker: number for broker, number in numbers.items() if number is not None}

    def named(self, some: Collection[int]) -> str:
        """Some of the brokers, for people."""
        if len(some) == len(self.configs):
            return "the brokers"
        return f"broker{'s' if len(some) > 1 else ''} {', '.join(map(str, sorted(some)))}"


def matches(pattern: str, topic: str) -> bool:
    """Whether a pattern takes a topic in. Internal ones are not meant; Python and librdkafka agree on most patterns."""
    try:
        return not topic.startswith("__") and "[:" not in pattern and re.search(pattern, topic) is not None
    except re.error:
        return False  # one of librdkafka's own
