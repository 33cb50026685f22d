"""The topics of a run: which arguments are refused before anything is connected, and whether the topics exist.

Rules.
* A topic that does not exist is an error, not a silence (C19). Brokers in trouble are not the topic's fault: that passes.
* Nothing here polls once the group is joined: with a batch in hand that would take a message which nobody gets, or serve a
  rebalance.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException

from ._client import Rarely
from ._group_client import SAFE, WITHIN
from ._settings.values import shown_raw
from .errors import NO_TOPIC, BrokerError, UnsafeConfigError, broker_failure, describe, kafka_error, stops

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._client import Callbacks
    from ._group_client import GroupClient
    from ._lifecycle import Lifecycle
    from ._settings import Settings

log = logging.getLogger("kafka_guarantees")

UNKNOWN_TOPIC = 5.0  # seconds until a topic that the brokers do not know is an error: metadata takes a moment to spread
AGAIN = 0.1  # seconds until that is asked again
SILENT = 5.0  # seconds without partitions until a run looks whether there is a topic for its patterns
LOOK = 300.0  # seconds until it looks again


def check_run(
    settings: Settings,
    lifecycle: Lifecycle,
    topics: Sequence[str],
    until_idle: float | None,
    *,
    dead_letter: str | None,
) -> None:
    """Refuse arguments that are not valid, before anything is connected."""
    lifecycle.check()
    if settings.group_id is None:
        raise UnsafeConfigError(
            "group.id",
            None,
            "a consumer group keeps the offsets of what is finished",
            "give group.id in the configuration",
        )
    if until_idle is not None and not (isinstance(until_idle, (int, float)) and until_idle >= 0):
        raise ValueError(f"until_idle is a number of seconds, or None, not {until_idle!r}")
    listed = isinstance(topics, Sequence) and not isinstance(topics, str)  # a set has no order, and a generator ends
    if not (listed and topics and all(isinstance(topic, str) and topic for topic in topics)):
        raise TypeError(f"topics must be a list of topic names that is not empty, not {topics!r}")
    if twice := next((topic for topic in topics if topics.count(topic) > 1), None):
        raise ValueError(
            f"topic {twice!r} is named twice. Nothing was consumed. Name it once: librdkafka takes no list with both."
        )
    _refuse_blacklisted(settings, topics)
    if dead_letter is not None and any(_includes(topic, dead_letter) for topic in topics):
        raise own_dead_letters(dead_letter, topics)


def own_dead_letters(dead_letter: str, topics: Sequence[str]) -> UnsafeConfigError:
    """The error for a run that would consume what it sets aside."""
    return UnsafeConfigError(
        "dead_letter",
        dead_letter,
        f"it is among the topics of this run, {', '.join(topics)}: what is set aside would come again, for ever",
        "choose another topic for dead letters, or leave it out of what is consumed",
    )


def _refuse_blacklisted(settings: Settings, topics: Sequence[str]) -> None:
    """Topics that librdkafka would act as if they did not exist, without a word: nothing would ever come."""
    blacklist = str(settings.consumer["topic.blacklist"])
    for topic in topics:
        if not topic.startswith("^") and any(_matches(pattern, topic) for pattern in blacklist.split(",")):
            raise UnsafeConfigError(
                "topic.blacklist",
                shown_raw("topic.blacklist", blacklist),
                f"it takes in topic {topic!r} of this run, which would wait for it for ever",
                "leave that out of one of the two; what Kafka itself writes cannot be read here",
            )


def _includes(topic: str, name: str) -> bool:
    """Whether a name of a topic, or a pattern of librdkafka, which is close enough to one of Python, is for this topic."""
    if not topic.startswith("^"):
        return topic == name
    return _matches(topic, name)  # where it is not known, who is assigned the topic hears of it


_ANOTHER = re.compile(r"\[:|\(\?|\\[A-Za-z0-9]")  # classes of POSIX; what Python has besides, as \d


def _matches(pattern: str, name: str, match: Callable[[str, str], object] = re.search) -> bool:
    """Whether a pattern of librdkafka is for a topic, as far as Python knows it."""
    if _ANOTHER.search(pattern):
        return False  # which Python takes for something else
    with suppress(re.error):
        return match(pattern, name) is not None
    return False


class Topics:
    """What a run subscribes to.

    Args:
        names: or patterns that begin with ``^``.
        client: to ask the brokers with.
        callbacks: of its C consumer.
        lifecycle: of the client that runs.

    Attributes:
        names: as given.
    """

    def __init__(self, names: Sequence[str], client: GroupClient, callbacks: Callbacks, lifecycle: Lifecycle) -> None:
        self.names = list(names)
        self._client = client
        self._callbacks = callbacks
        self._lifecycle = lifecycle
        self._rarely = Rarely()
        self._look_at = time.monotonic() + SILENT

    def require(self, topics: Sequence[str], *, written: bool = False) -> None:
        """A topic that does not exist is an error, not a silence (C19).

        Raises:
            BrokerError, AuthorizationError: it does not exist, or may not be used.
            KafkaException: none can have such a name.
        """
        for topic in topics:
            if topic.startswith("^"):
                self._error(topic)  # whether a broker answers at all
                continue
            deadline = time.monotonic() + UNKNOWN_TOPIC
            while (error := self._error(topic)) is not None:
                if error.code() == KafkaError._INVALID_ARG:
                    raise KafkaException(error)
                if stops(error):
                    doing = f"{'writing to' if written else 'consuming'} topic {topic!r}"
                    failure = broker_failure(error, doing, SAFE, **{"output" if written else "topic": topic})
                    raise failure from KafkaException(error)
                if error.code() not in NO_TOPIC:
                    log.warning("asking for topic %r: %s", topic, describe(error))
                    break  # it exists, and its brokers are in trouble: that passes
                if time.monotonic() > deadline:
                    raise BrokerError(
                        f"topic {topic!r} does not exist ({describe(error)}). {SAFE} Create it, or correct the name."
                    )
                if self._lifecycle.stopping:
                    return
                time.sleep(AGAIN)

    def deleted(self, topic: str) -> bool:
        """Whether the brokers know that there is no such topic, of which nothing can be committed any more."""
        error = self._error(topic)
        return error is not None and error.code() in NO_TOPIC

    def nothing_comes(self) -> None:
        """This member has no partition: now and then, say so where there is no topic for its patterns."""
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK
            self.match_nothing()

    def match_nothing(self) -> bool:
        """Whether there are only patterns, and no topic for any of them: then nobody joins the group."""
        if not all(topic.startswith("^") and not _ANOTHER.search(topic) for topic in self.names):
            return False  # or Python does not know the pattern
        try:
            known = self._client.raw.list_topics(timeout=self._client.within).topics
        except KafkaException:
            return False
        time.sleep(AGAIN)  # it is asked with every fetch
        match = re.fullmatch if self._client.kip_848 else re.search  # C17: of brokers that match, the whole name
        if any(_matches(pattern, name, match) for pattern in self.names for name in known):
            return False
        if self._rarely("patterns"):
            log.warning("no topic matches %s", ", ".join(self.names))
        return True

    def _error(self, topic: str) -> KafkaError | None:
        within = self._client.within if self._client.joined else WITHIN  # before that no fetch is in the way
        try:
            metadata = self._client.raw.list_topics(topic, timeout=within).topics[topic]
        except KafkaException as exc:
            if self._lifecycle.stopping:
                return None
            if not self._client.joined:  # later it would take a message that nobody gets, or serve a rebalance
                self._client.raw.poll(0)  # serves error_cb
                self._callbacks.raise_shut_out()
            log.warning("asking for topic %r: %s", topic, describe(kafka_error(exc)))
            return None  # no broker answers: that is not the topic's fault, and joining the group waits for one
        except RuntimeError:  # librdkafka makes no topic of such a name (Metadata.c:388-394)
            return KafkaError(KafkaError._INVALID_ARG, f"the name of a topic has 249 characters at most, not {len(topic)}")
        else:
            error: KafkaError | None = metadata.error
            return error
