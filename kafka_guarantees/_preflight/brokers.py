"""What a guarantee needs of brokers: a table, as that of topics. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .case import (
    ALO,
    AMO,
    DAY,
    EXO,
    HOUR,
    IN_SYNC,
    OUTCOMES,
    POSITION,
    POSITIONS,
    REPLICAS,
    TRANSACTED,
    WEEK,
    Needed,
)
from .seen import OFFSETS, TRANSACTIONS
from .topics import LOST_WITH_A_BROKER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .case import Case, Levels


class BrokerRow(NamedTuple):
    """One setting of the brokers."""

    setting: str
    levels: Levels
    needed: Callable[[Case, int], Needed | None]
    why: str
    instead_of: str | None = None  # asked only where this internal topic could not be seen
    replicated: bool = False
    worst: Callable[[Iterable[int]], int] = min  # of what the brokers have


def _transaction_timeout(case: Case, most: int) -> Needed | None:
    ours = int(case.settings.transaction_timeout * 1000)
    return (
        Needed(f"{ours} or more, the transaction.timeout.ms of this client; or lower that one", str(ours))
        if most < ours
        else None
    )


def _idle_transactional_id(_case: Case, time: int) -> Needed | None:
    if time >= WEEK:
        return None
    return Needed(
        f"more than the longest pause between transactions; {WEEK} is usual", str(WEEK), "warning" if time < HOUR else "info"
    )


def _idle_producer(case: Case, time: int) -> Needed | None:
    tried = case.settings.delivery_timeout * 1000
    text = "delivery.timeout.ms of this client" + (
        f", {tried:.0f}, or more" if tried < float("inf") else ", which has no limit"
    )
    return Needed(text, str(DAY)) if time < tried else None


def _offsets_kept(case: Case, minutes: int) -> Needed | None:
    if case.settings.group_id is None or minutes * 60_000 >= DAY:
        return None
    return Needed(f"longer than any outage; {WEEK // 60_000} is usual", str(WEEK // 60_000))


def _static_session(case: Case, time: int) -> Needed | None:
    consumer, ours = case.settings.consumer, int(case.settings.session_timeout * 1000)
    static = consumer.get("group.protocol") == "consumer" and "group.instance.id" in consumer
    return Needed(f"at most {ours}, for which this client waits", str(ours)) if static and time > ours else None


def _copies(least: int) -> Callable[[Case, int], Needed | None]:
    return lambda _case, number: Needed(f"{least} or more", str(least)) if number < least else None


BROKERS = (
    BrokerRow(
        "transaction.max.timeout.ms",
        {EXO: "unsafe"},
        _transaction_timeout,
        "No transaction can be begun: the brokers refuse its timeout.",
    ),
    BrokerRow(
        "transactional.id.expiration.ms",
        {EXO: "warning"},
        _idle_transactional_id,
        "A producer without a transaction for that long is forgotten, and its next transaction fails.",
    ),
    BrokerRow(
        "producer.id.expiration.ms",
        {ALO: "warning", EXO: "warning"},
        _idle_producer,
        "A record that is sent again after that is not recognised, and is written twice. With CreateTime it counts from the "
        "record's own timestamp on: one that is older than that is not recognised from the brokers' next look on.",
    ),
    BrokerRow(
        "offsets.retention.minutes",
        {AMO: "warning", ALO: "warning", EXO: "warning"},
        _offsets_kept,
        "A group that has no members for that long forgets its offsets and begins anew. With group.protocol=consumer, and less "
        "than an hour, it forgets that of a quiet partition as soon as it has no members for a moment.",
    ),
    BrokerRow(
        "group.consumer.session.timeout.ms",
        {AMO: "warning", ALO: "warning", EXO: "warning"},
        _static_session,
        "The brokers keep a group.instance.id for a member that was killed until its session is over: one that starts earlier "
        "ends with FencedError, as if the other one lived. Start it again after that.",
        worst=max,
    ),
    BrokerRow(
        "offsets.topic.replication.factor",
        POSITION,
        _copies(REPLICAS),
        LOST_WITH_A_BROKER[POSITIONS][1],
        OFFSETS,
        replicated=True,
    ),
    BrokerRow(
        "transaction.state.log.replication.factor",
        TRANSACTED,
        _copies(REPLICAS),
        LOST_WITH_A_BROKER[OUTCOMES][1],
        TRANSACTIONS,
        replicated=True,
    ),
    BrokerRow(
        "transaction.state.log.min.isr",
        TRANSACTED,
        _copies(IN_SYNC),
        "The outcome of a transaction has a single copy: when it is lost, the transaction is torn.",
        TRANSACTIONS,
        replicated=True,
    ),
)
