"""Which incarnation of a topic is read: created again it has another id, and its offsets mean something else (D06)."""

from __future__ import annotations

import logging
import time
from concurrent.futures import TimeoutError  # noqa: A004 - before Python 3.11 it is another one than the builtin
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from .._client import Handle
from ..errors import BrokerError, KafkaGuaranteesError, broker_failure, kafka_error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Future

    from .._settings import Settings

log = logging.getLogger("kafka_guarantees")

ANSWER = 2.0  # seconds
RENEW_EVERY = 30.0  # seconds
NONE = bytes(16)


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
        if topic not in self._known:
            (answer,) = self._ask([topic]).values()
            self._known[topic] = _id_of(topic, answer, time.monotonic() + ANSWER + 1)
        return self._known[topic]

    def renew(self) -> None:
        """Ask again, from time to time: librdkafka goes on, in the new one, where a topic is created again while it is read."""
        if self._known and time.monotonic() >= self._renew_at:
            until = time.monotonic() + ANSWER + 1
            for topic, answer in self._ask(list(self._known)).items():
                try:
                    self._known[topic] = _id_of(topic, answer, until)
                except KafkaGuaranteesError as error:  # one that was deleted holds up no other
                    log.info("%s It is asked again later.", error)
            self._renew_at = time.monotonic() + RENEW_EVERY

    def _ask(self, topics: list[str]) -> Mapping[str, Future[Any]]:
        if self.raw is None:
            # it would log to stderr; the consumer of the same run logs what there is to say
            self.make(AdminClient, {**self._settings.admin, "log_level": 0})
        asked: Mapping[str, Future[Any]] = self.raw.describe_topics(TopicCollection(topics), request_timeout=ANSWER)
        return asked

    def close(self) -> None:
        """Let the client go, if there was one."""
        if self.raw is not None:
            self.let_go()


def _id_of(topic: str, answer: Future[Any], until: float) -> bytes:
    doing = f"asking for the id of topic {topic!r}"
    try:
        topic_id = answer.result(max(0.0, until - time.monotonic())).topic_id
    except KafkaException as exc:
        raise broker_failure(kafka_error(exc), doing, "Nothing was handled.") from exc
    except TimeoutError as exc:  # of the future: a process may stand still
        raise BrokerError(f"{doing} got no answer. Nothing was handled.") from exc
    parts = topic_id.get_most_significant_bits(), topic_id.get_least_significant_bits()
    found = b"".join((part % 2**64).to_bytes(8, "big") for part in parts)
    if found == NONE:
        raise KafkaGuaranteesError(
            f"{doing}: these brokers give topics none, as before Kafka 2.8. Nothing was handled. Messages at the same "
            "place of two topics could not be told apart. Use newer brokers, or leave dedup and inbox out."
        )
    return found
