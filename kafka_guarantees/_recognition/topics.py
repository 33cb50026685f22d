"""Which incarnation of a topic is read: created again it has another id, and its offsets mean something else (D06)."""

from __future__ import annotations

import logging
import time
from concurrent.futures import TimeoutError  # noqa: A004 - before Python 3.11 it is another one than the builtin
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from .._client import Handle
from ..errors import BrokerError, KafkaGuaranteesError, broker_failure, kafka_error

if TYPE_CHECKING:
    from .._settings import Settings

log = logging.getLogger("kafka_guarantees")

ANSWER = 5.0  # seconds
RENEW_EVERY = 30.0  # seconds


class TopicIds(Handle):
    """The ids of topics, for one run."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings
        self._known: dict[str, bytes] = {}
        self._renew_at = time.monotonic() + RENEW_EVERY

    def __call__(self, topic: str) -> bytes:
        """The 16 bytes of the topic's id.

        Raises:
            AuthorizationError, BrokerError: the brokers refuse to say, or do not answer.
        """
        known = self._known.get(topic)
        if known is None:
            known = self._known[topic] = self._ask(topic)
        return known

    def renew(self) -> None:
        """Ask again, from time to time: librdkafka goes on, in the new one, where a topic is created again while it is read."""
        if time.monotonic() >= self._renew_at:
            for topic in self._known:
                try:
                    self._known[topic] = self._ask(topic)
                except KafkaGuaranteesError as error:
                    log.info("%s It is asked again later.", error)
            self._renew_at = time.monotonic() + RENEW_EVERY

    def _ask(self, topic: str) -> bytes:
        if self.raw is None:
            # it would log to stderr; the consumer of the same run logs what there is to say
            self.make(AdminClient, {**self._settings.admin, "log_level": 0})
        try:
            (answer,) = self.raw.describe_topics(TopicCollection([topic]), request_timeout=ANSWER).values()
            described = answer.result(ANSWER + 1)
        except KafkaException as exc:
            raise broker_failure(kafka_error(exc), f"asking for the id of topic {topic!r}", "Nothing was handled.") from exc
        except TimeoutError as exc:  # of the future: a process may stand still
            raise BrokerError(f"asking for the id of topic {topic!r} got no answer. Nothing was handled.") from exc
        parts = described.topic_id.get_most_significant_bits(), described.topic_id.get_least_significant_bits()
        return b"".join((part % 2**64).to_bytes(8, "big") for part in parts)

    def close(self) -> None:
        """Let the client go, if there was one."""
        if self.raw is not None:
            self.let_go()
