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
            self._known.update(self._ask([topic]))
        return self._known[topic]

    def renew(self) -> None:
        """Ask again, from time to time: librdkafka goes on, in the new one, where a topic is created again while it is read."""
        if self._known and time.monotonic() >= self._renew_at:
            try:
                self._known.update(self._ask(list(self._known)))
            except KafkaGuaranteesError as error:
                log.info("%s It is asked again later.", error)
            self._renew_at = time.monotonic() + RENEW_EVERY

    def _ask(self, topics: list[str]) -> dict[str, bytes]:
        if self.raw is None:
            # it would log to stderr; the consumer of the same run logs what there is to say
            self.make(AdminClient, {**self._settings.admin, "log_level": 0})
        doing = f"asking for the ids of topics {', '.join(map(repr, topics))}"
        try:
            answers = self.raw.describe_topics(TopicCollection(topics), request_timeout=ANSWER)
            found = {topic: _bytes(answer.result(ANSWER + 1).topic_id) for topic, answer in answers.items()}
        except KafkaException as exc:
            raise broker_failure(kafka_error(exc), doing, "Nothing was handled.") from exc
        except TimeoutError as exc:  # of the future: a process may stand still
            raise BrokerError(f"{doing} got no answer. Nothing was handled.") from exc
        if NONE in found.values():
            raise KafkaGuaranteesError(
                f"{doing}: these brokers give topics none, as before Kafka 2.8. Nothing was handled. Messages at the same "
                "place of two topics could not be told apart. Use newer brokers, or leave dedup and inbox out."
            )
        return found

    def close(self) -> None:
        """Let the client go, if there was one."""
        if self.raw is not None:
            self.let_go()


def _bytes(topic_id: Any) -> bytes:  # the stubs of Uuid have no methods
    parts = topic_id.get_most_significant_bits(), topic_id.get_least_significant_bits()
    return b"".join((part % 2**64).to_bytes(8, "big") for part in parts)
