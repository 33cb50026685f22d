"""What senders do: send records with ids of their own, and note what they know of each one's fate."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypedDict

from kafka_guarantees import DeliveryError, DeliveryUnknown, TransactionAborted

from .evidence import FAIL, INFO, INVOKE, OK
from .life import ID, LARGE, TOO_LARGE, Deliberate, Storm, content

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kafka_guarantees import AtLeastOnce, AtMostOnce, Delivery, ExactlyOnce
    from kafka_guarantees.records import Payload

    from .life import Life

KEYS = 24  # of each sender: few enough to come again soon
ON_THE_WAY = 200  # records that are unacknowledged at most
ABANDONED = 0.1  # of transactions
SWALLOWED = 0.03  # of transactions contain a record that cannot be sent, and nobody looks
UNSENDABLE = 0.01  # of records are too large for librdkafka, and as many for the topic
PATIENCE = 3.0  # seconds that a sender who is to stop waits for outcomes: the rest is left to close()
FLUSHES = 1 / 200  # after this share of the records
LINGERING = 0.2  # of transactions stay open for a while


HEADERS: Sequence[list[tuple[str, bytes | None]]] = ([], [("a", b"1"), ("a", b"\0\xff"), ("none", None), ("empty", b"")])
FORMS: Sequence[Callable[[bytes], Payload]] = (bytes, bytearray, memoryview, bytes.decode)


class Arguments(TypedDict):
    """Of produce()."""

    topic: str
    value: Payload
    key: str
    headers: Sequence[tuple[str, Payload]]


class _Sending:
    """Ids, keys and payloads of a life; and the pace."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._number = 0
        self._due = time.monotonic()

    def _invoke(self, transaction: str | None = None, value: bytes | None = None) -> tuple[str, Arguments]:
        """A new send, noted: its id, and what to produce."""
        job, dice = self._life.job, self._life.dice
        self._number += 1
        id_, key = f"{job.who}.{job.life}.{self._number}", f"{job.who}.{dice.randrange(KEYS)}"
        # C14: a message without a value, or with an empty one, is a message
        data = value or dice.choices([id_.ljust(100, ".").encode(), b"", None, id_.encode() * 800], [90, 4, 4, 2])[0]
        headers = dice.choice(HEADERS)
        self._life.history.note(
            "send",
            INVOKE,
            id=id_,
            key=key,
            number=self._number,
            transaction=transaction,
            content=content(key.encode(), data, headers),
        )
        given = None if data is None else dice.choice(FORMS)(data)
        return id_, {"topic": job.source, "value": given, "key": key, "headers": [*headers, (ID, id_)]}

    def closed(self) -> None:
        """The client was closed, and has raised nothing."""

    def _pace(self, sent: int) -> None:
        self._due = max(self._due + sent / self._life.job.rate, time.monotonic() - 0.5)  # a pause is not made up for
        time.sleep(max(0.0, self._due - time.monotonic()))


class Forgetful(_Sending):
    """At most once: nobody ever knows more than that a record was not sent."""

    def run(self, client: AtMostOnce) -> None:
        """Send until stopped."""
        while not self._life.stopping:
            id_, record = self._invoke()
            try:
                client.produce(**record)
            except DeliveryError:
                self._life.history.note("send", FAIL, id=id_)
            self._pace(1)


class Tracking(_Sending):
    """At least once: each record's delivery is followed."""

    def __init__(self, life: Life) -> None:
        super().__init__(life)
        self._pending: deque[tuple[str, Delivery]] = deque()

    def run(self, client: AtLeastOnce) -> None:
        """Send until stopped."""
        while not self._life.stopping:
            self._send(client)
            self._pace(1)
            while self._pending and (self._pending[0][1].done or len(self._pending) > ON_THE_WAY):
                self._settle()
            if self._life.dice.random() < FLUSHES:
                self._flush(client)
        until = time.monotonic() + PATIENCE
        while self._pending and time.monotonic() < until:
            with suppress(TimeoutError):
                self._settle(until - time.monotonic())

    def closed(self) -> None:
        """The client was closed, and has raised nothing: so nothing may be unknown."""
        if not all(delivery.done for _, delivery in self._pending):
            self._life.broken("close() has returned, and a delivery is not done")

    def _send(self, client: AtLeastOnce) -> None:
        kind = self._life.dice.random()
        id_, record = self._invoke(value=TOO_LARGE if kind < UNSENDABLE else LARGE if kind < 2 * UNSENDABLE else None)
        try:
            self._pending.append((id_, client.produce(**record)))
        except (DeliveryError, DeliveryUnknown):
            # of this one; or of an earlier one that nobody had looked at: then this one was not sent
            self._life.history.note("send", FAIL, id=id_)

    def _flush(self, client: AtLeastOnce) -> None:
        with suppress(DeliveryError, DeliveryUnknown):  # of those that are still looked at below
            client.flush()
            if not all(delivery.done for _, delivery in self._pending):
                self._life.broken("flush() has returned, and a delivery is not done")

    def _settle(self, timeout: float | None = None) -> None:
        id_, delivery = self._pending[0]
        try:
            delivery.result(timeout)
        except DeliveryError as error:
            self._life.history.note("send", FAIL, id=id_, detail=str(error)[:300])
        except DeliveryUnknown as error:
            self._life.history.note("send", INFO, id=id_, detail=str(error)[:300])
        else:
            self._life.history.note(
                "send", OK, id=id_, topic=delivery.topic, partition=delivery.partition, offset=delivery.offset
            )
        self._pending.popleft()


class Transactional(_Sending):
    """Exactly once: some records in each transaction, and some transactions abandoned in the middle."""

    def __init__(self, life: Life) -> None:
        super().__init__(life)
        self._transactions = 0

    def run(self, client: ExactlyOnce) -> None:
        """Send until stopped."""
        while not self._life.stopping:
            self._pace(self._transaction(client))

    def _transaction(self, client: ExactlyOnce) -> int:
        job, dice = self._life.job, self._life.dice
        self._transactions += 1
        name, size = f"{job.who}.{job.life}.t{self._transactions}", dice.choice((1, 2, 5, 20))
        note: dict[str, Any] = {"what": "transaction", "transaction": name}
        self._life.history.note(type=INVOKE, **note)
        try:
            with client.transaction() as transaction:
                for _ in range(size):
                    transaction.produce(**self._invoke(name)[1])
                if dice.random() < SWALLOWED:
                    with suppress(DeliveryError):  # X05: whoever swallows it must not commit without it
                        transaction.produce(**self._invoke(name, TOO_LARGE)[1])
                if dice.random() < LINGERING:
                    time.sleep(dice.uniform(0, 0.3))
                if dice.random() < ABANDONED:
                    raise Deliberate  # noqa: TRY301 - it is to be raised in the block
                self._life.history.note(type="commit", **note)
        except (Deliberate, TransactionAborted, DeliveryError) as error:
            self._life.history.note(type=FAIL, detail=repr(error), **note)
        except (DeliveryUnknown, Storm) as error:
            self._life.history.note(type=INFO, detail=repr(error), **note)
        else:
            self._life.history.note(type=OK, **note)
        return size


SENDING: Mapping[str, Any] = {"at-most-once": Forgetful, "at-least-once": Tracking, "exactly-once": Transactional}
