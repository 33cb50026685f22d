"""The sending side: a paced stream of offers, each through the class that its guarantee is named after."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce

from .offers import INBOX, STORE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kafka_guarantees import Delivery


class Sender(Protocol):
    """Sends offers, and knows afterwards which of them are written."""

    def send(self, offers: Sequence[str]) -> None:
        """Give these offers to Kafka."""

    def acknowledged(self) -> frozenset[str]:
        """The offers that are certainly written, of all that were sent."""

    def close(self) -> None:
        """Let the client go."""


class _AtMostOnceSender:
    """With acks=0 nobody knows what is written: the topic is asked."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._kafka = AtMostOnce({"bootstrap.servers": bootstrap})
        self._topic = topic
        self.close = self._kafka.close

    def send(self, offers: Sequence[str]) -> None:
        for offer in offers:
            self._kafka.produce(self._topic, key=offer)

    def acknowledged(self) -> frozenset[str]:
        self._kafka.flush()
        return frozenset()


class _AtLeastOnceSender:
    """Every offer has a Delivery, which tells."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._kafka = AtLeastOnce({"bootstrap.servers": bootstrap})
        self._topic = topic
        self._deliveries: dict[str, Delivery] = {}
        self.close = self._kafka.close

    def send(self, offers: Sequence[str]) -> None:
        self._deliveries.update((offer, self._kafka.produce(self._topic, key=offer)) for offer in offers)

    def acknowledged(self) -> frozenset[str]:
        self._kafka.flush()
        return frozenset(offer for offer, delivery in self._deliveries.items() if delivery.result(0))


class _RepeatingSender:
    """A relay that sends everything again a little later, with the same id at another offset."""

    LATER = 25  # sends in between

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._kafka = AtLeastOnce({"bootstrap.servers": bootstrap})
        self._topic = topic
        self._deliveries: dict[str, Delivery] = {}
        self._again: deque[Sequence[str]] = deque()
        self.close = self._kafka.close

    def send(self, offers: Sequence[str]) -> None:
        self._deliveries.update((offer, self._produce(offer)) for offer in offers)
        self._again.append(offers)
        if len(self._again) > self.LATER:
            self._send_again()

    def acknowledged(self) -> frozenset[str]:
        while self._again:
            self._send_again()
        self._kafka.flush()
        return frozenset(offer for offer, delivery in self._deliveries.items() if delivery.result(0))

    def _send_again(self) -> None:
        for offer in self._again.popleft():
            self._produce(offer)

    def _produce(self, offer: str) -> Delivery:
        return self._kafka.produce(self._topic, key=offer, message_id=offer)


class _ExactlyOnceSender:
    """What is sent together is one transaction: all of it is written, or the block raises."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._kafka = ExactlyOnce({"bootstrap.servers": bootstrap, "transactional.id": f"{topic}-sender"})
        self._topic = topic
        self._committed: set[str] = set()
        self.close = self._kafka.close

    def send(self, offers: Sequence[str]) -> None:
        with self._kafka.transaction() as transaction:
            for offer in offers:
                transaction.produce(self._topic, key=offer)
        self._committed.update(offers)

    def acknowledged(self) -> frozenset[str]:
        return frozenset(self._committed)


SENDERS: dict[str, Callable[[str, str], Sender]] = {
    "at-most-once": _AtMostOnceSender,
    "at-least-once": _AtLeastOnceSender,
    STORE: _RepeatingSender,
    INBOX: _RepeatingSender,
    "exactly-once": _ExactlyOnceSender,
}


class Stream:
    """A paced stream: at each ``tick`` it sends the offers that are due.

    Args:
        sender: where to.
        rate: offers per second.
    """

    def __init__(self, sender: Sender, rate: int) -> None:
        self._sender = sender
        self._rate = rate
        self._began: float | None = None
        self.tried: dict[str, int] = {}

    def tick(self) -> None:
        """Send what is due by now."""
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        due = int((now - self._began) * self._rate) - len(self.tried)
        offers = [f"offer-{len(self.tried) + i:06}" for i in range(due)]
        if offers:
            at = time.monotonic_ns()
            self.tried.update((offer, at) for offer in offers)
            self._sender.send(offers)
