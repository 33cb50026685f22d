"""What senders do: send records with ids of their own, and note what they know of each one's fate."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypedDict

from kafka_guarantees import DeliveryError, DeliveryUnknown, TransactionAborted

from .evidence import FAIL, INFO, INVOKE, OK
from .life import ID, Deliberate, Storm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kafka_guarantees import AtLeastOnce, AtMostOnce, Delivery, ExactlyOnce

    from .life import Life

KEYS = 24  # of each sender: few enough to come again soon
ON_THE_WAY = 200  # records that are unacknowledged at most
ABANDONED = 0.1  # of transactions
LINGERING = 0.2  # of transactions stay open for a while


class Arguments(TypedDict):
    """Of produce()."""

    topic: str
    value: str | None
    key: str
    headers: Mapping[str, str]


class _Sending:
    """Ids, keys and payloads of a life; and the pace."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._number = 0
        self._due = time.monotonic()

    def _invoke(self, transaction: str | None = None) -> tuple[str, Arguments]:
        """A new send, noted: its id, and what to produce."""
        job, dice = self._life.job, self._life.dice
        self._number += 1
        id_, key = f"{job.who}.{job.life}.{self._number}", f"{job.who}.{dice.randrange(KEYS)}"
        self._life.history.note("send", INVOKE, id=id_, key=key, number=self._number, transaction=transaction)
        # C14: a message without a value, or with an empty one, is a message
        value = dice.choices([id_.ljust(100, "."), "", None, id_.ljust(10_000, ".")], [90, 4, 4, 2])[0]
        return id_, {"topic": job.source, "value": value, "key": key, "headers": {ID: id_}}

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
            id_, record = self._invoke()
            with suppress(DeliveryError, DeliveryUnknown):  # of an earlier one that nobody has looked at: this one is unknown
                self._pending.append((id_, client.produce(**record)))
            self._pace(1)
            while self._pending and (self._pending[0][1].done or len(self._pending) > ON_THE_WAY):
                self._settle()
        while self._pending:
            self._settle()

    def _settle(self) -> None:
        id_, delivery = self._pending[0]
        try:
            delivery.result()
        except DeliveryError:
            self._life.history.note("send", FAIL, id=id_)
        except DeliveryUnknown:
            self._life.history.note("send", INFO, id=id_)
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
