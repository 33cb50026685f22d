"""Preflight: what is found in what the brokers say, by table; and asking real brokers, which may refuse or not answer."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined] # not re-exported by its stubs
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ConfigEntry,
    ConfigResource,
    ConfigSource,
    ResourcePatternType,
    ResourceType,
)

from kafka_guarantees import BrokerError, UnsafeConfigError
from kafka_guarantees._client import Handle
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._preflight import Finding, Preflight, PreflightReport, asking, preflight
from kafka_guarantees._preflight.brokers import BROKERS
from kafka_guarantees._preflight.case import NAMES, Case, span
from kafka_guarantees._preflight.checks import findings
from kafka_guarantees._preflight.seen import DENIED, MISSING, OFFSETS, TRANSACTIONS, Cluster, Config, Topic, matches
from kafka_guarantees._preflight.topics import LOST_WITH_A_BROKER, TOPICS
from kafka_guarantees._settings import Guarantee, Settings, resolve
from kafka_guarantees.testing.local_kafka import LocalKafka

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from confluent_kafka import TopicCollection

    from kafka_guarantees.testing.local_kafka import RunningKafka

AMO, ALO, EXO = Guarantee.AT_MOST_ONCE, Guarantee.AT_LEAST_ONCE, Guarantee.EXACTLY_ONCE
HOUR, DAY = 3_600_000, 86_400_000
NOW = 10.0  # seconds in which anything here must happen

RIGHTS = frozenset({"READ", "WRITE", "DESCRIBE", "DESCRIBE_CONFIGS"})
TOPIC_CONFIG = {
    "min.insync.replicas": "2",
    "unclean.leader.election.enable": "false",
    "retention.ms": str(7 * DAY),
    "retention.bytes": "-1",
    "cleanup.policy": "delete",
    "max.message.bytes": "1048588",
}
BROKER_CONFIG = {
    "transaction.max.timeout.ms": "900000",
    "transactional.id.expiration.ms": str(7 * DAY),
    "producer.id.expiration.ms": str(DAY),
    "offsets.retention.minutes": "10080",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
}


def settings(guarantee: Guarantee, bootstrap: str = "127.0.0.1:9092", /, **more: object) -> Settings:
    ids = {"group.id": "payments", **({"transactional.id": "payments-0"} if guarantee is EXO else {})}
    return resolve(
        guarantee, {"bootstrap.servers": bootstrap, **ids, **{name.replace("_", "."): v for name, v in more.items()}}
    )


def topic(replicas: int = 3, rights: frozenset[str] | None = RIGHTS, error: str = "", **config: str) -> Topic:
    changed = {**TOPIC_CONFIG, **{name.replace("_", "."): value for name, value in config.items()}}
    return Topic(None, None, error) if error else Topic(replicas, rights, config=Config(changed))


def cluster(topics: Mapping[str, Topic] | None = None, *, brokers: int = 3, **config: str) -> Cluster:
    good = {
        "offers": topic(),
        "dead": topic(max_message_bytes="2000000"),
        OFFSETS: topic(cleanup_policy="compact"),
        TRANSACTIONS: topic(cleanup_policy="compact"),
    }
    changed = {**BROKER_CONFIG, **{name.replace("_", "."): value for name, value in config.items()}}
    configs = dict.fromkeys(range(brokers), Config(changed))
    return Cluster("id-1", brokers, frozenset({"ALTER"}), topics={**good, **(topics or {})}, configs=configs)


def with_configs(seen: Cluster, *each: Config) -> Cluster:
    """The same, with these settings of its brokers, which are 0 and so on."""
    return replace(seen, configs=dict(enumerate(each)))


def found(guarantee: Guarantee, seen: Cluster, retention: timedelta | None = None, **more: object) -> tuple[Finding, ...]:
    return findings(Case(settings(guarantee, "127.0.0.1:9092", **more), seen, ("offers",), "dead", retention))


def only(found: tuple[Finding, ...]) -> Finding:
    (one,) = found
    return one


# -- what is found --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", Guarantee)
def test_what_is_as_it_should_be_is_not_mentioned(guarantee: Guarantee) -> None:
    """Three replicas, two in sync, and the defaults of Kafka: nothing to say under any guarantee."""
    assert found(guarantee, cluster()) == ()


class Bad(NamedTuple):
    """One thing that is wrong: where it is reported, and at which level under each guarantee."""

    subject: str
    check: str
    seen: Cluster
    levels: Mapping[Guarantee, str]
    more: Mapping[str, object] = {}
    retention: timedelta | None = None


OFFERS, DEAD = "topic 'offers'", "dead letter topic 'dead'"
CLASSIC_ONLY = cluster(group_coordinator_rebalance_protocols="classic", group_consumer_session_timeout_ms="45000")
KEPT_BY, STATE = f"internal topic '{OFFSETS}'", f"internal topic '{TRANSACTIONS}'"
KEPT = {ALO: "unsafe", EXO: "unsafe"}
POSITION = {AMO: "unsafe", ALO: "warning", EXO: "unsafe"}
SENT = {AMO: "info", ALO: "warning", EXO: "warning"}
OLD = {AMO: "warning", ALO: "warning", EXO: "warning"}
LATE = {AMO: "warning", ALO: "info", EXO: "warning"}
TXN = {EXO: "unsafe"}
GONE = topic(error=MISSING)

BAD = {
    "one replica": Bad(OFFERS, "replication factor", cluster({"offers": topic(1)}), KEPT),
    "two replicas": Bad(
        OFFERS, "replication factor", cluster({"offers": topic(2, min_insync_replicas="1")}), {ALO: "warning", EXO: "warning"}
    ),
    "one in sync": Bad(OFFERS, "min.insync.replicas", cluster({"offers": topic(min_insync_replicas="1")}), KEPT),
    "all in sync": Bad(
        OFFERS,
        "min.insync.replicas",
        cluster({"offers": topic(min_insync_replicas="3")}),
        {ALO: "warning", EXO: "warning"},
    ),
    "unclean": Bad(
        OFFERS, "unclean.leader.election.enable", cluster({"offers": topic(unclean_leader_election_enable="true")}), KEPT
    ),
    "kept for an hour": Bad(
        OFFERS, "retention.ms", cluster({"offers": topic(retention_ms=str(HOUR))}), {ALO: "warning", EXO: "warning"}
    ),
    "kept by size": Bad(
        OFFERS, "retention.bytes", cluster({"offers": topic(retention_bytes="1000")}), {ALO: "info", EXO: "info"}
    ),
    "kept longer than offsets": Bad(OFFERS, "retention.ms", cluster({"offers": topic(retention_ms=str(8 * DAY))}), LATE),
    "kept for ever": Bad(OFFERS, "retention.ms", cluster({"offers": topic(retention_ms="-1")}), LATE),
    "kept longer than ids": Bad(OFFERS, "retention.ms", cluster(), {ALO: "info"}, retention=timedelta(days=1)),
    "compacted": Bad(
        OFFERS, "cleanup.policy", cluster({"offers": topic(cleanup_policy="compact,delete")}), {ALO: "info", EXO: "info"}
    ),
    "small messages": Bad(OFFERS, "max.message.bytes", cluster({"offers": topic(max_message_bytes="999999")}), SENT),
    "huge messages": Bad(
        OFFERS,
        "max.message.bytes",
        cluster({"offers": topic(max_message_bytes="99999489"), "dead": topic(max_message_bytes="200000000")}),
        OLD,
    ),
    "one replica of dead letters": Bad(
        DEAD, "replication factor", cluster({"dead": topic(1, max_message_bytes="2000000")}), KEPT
    ),
    "one in sync of dead letters": Bad(
        DEAD, "min.insync.replicas", cluster({"dead": topic(max_message_bytes="2000000", min_insync_replicas="1")}), KEPT
    ),
    "unclean dead letters": Bad(
        DEAD,
        "unclean.leader.election.enable",
        cluster({"dead": topic(max_message_bytes="2000000", unclean_leader_election_enable="true")}),
        KEPT,
    ),
    "compacted dead letters": Bad(
        DEAD,
        "cleanup.policy",
        cluster({"dead": topic(max_message_bytes="2000000", cleanup_policy="compact")}),
        {AMO: "warning", ALO: "unsafe", EXO: "unsafe"},
    ),
    "dead letters kept for an hour": Bad(
        DEAD,
        "retention.ms",
        cluster({"dead": topic(max_message_bytes="2000000", retention_ms=str(HOUR))}),
        {ALO: "warning", EXO: "warning"},
    ),
    "dead letters by the time of their messages": Bad(
        DEAD,
        "message.timestamp.type",
        cluster({"dead": topic(max_message_bytes="2000000", message_timestamp_type="CreateTime")}),
        {ALO: "warning", EXO: "warning"},
    ),
    "dead letters that are too old": Bad(
        DEAD,
        "message.timestamp.before.max.ms",
        cluster({"dead": topic(max_message_bytes="2000000", message_timestamp_before_max_ms=str(7 * DAY - 1))}),
        SENT,
    ),
    "dead letters of what is kept for ever": Bad(
        DEAD,
        "message.timestamp.before.max.ms",
        cluster(
            {
                "offers": topic(cleanup_policy="compact"),
                "dead": topic(max_message_bytes="2000000", message_timestamp_before_max_ms=str(10 * DAY)),
            }
        ),
        SENT,
    ),
    "dead letters that are too old for brokers of 3.5": Bad(
        DEAD,
        "message.timestamp.difference.max.ms",
        cluster({"dead": topic(max_message_bytes="2000000", message_timestamp_difference_max_ms=str(7 * DAY - 1))}),
        SENT,
    ),
    "dead letters that are too old for brokers of 3.9": Bad(
        DEAD,
        "message.timestamp.difference.max.ms",
        cluster(
            {
                "dead": topic(
                    max_message_bytes="2000000",
                    message_timestamp_difference_max_ms=str(HOUR),
                    message_timestamp_before_max_ms=str(2**63 - 1),
                )
            }
        ),
        SENT,
    ),
    "dead letters from the future": Bad(
        DEAD,
        "message.timestamp.after.max.ms",
        cluster(
            {
                "offers": topic(message_timestamp_after_max_ms=str(2 * HOUR)),
                "dead": topic(max_message_bytes="2000000", message_timestamp_after_max_ms=str(HOUR)),
            }
        ),
        SENT,
    ),
    "small dead letters": Bad(DEAD, "max.message.bytes", cluster({"dead": topic(max_message_bytes="1056779")}), SENT),
    "one replica of offsets": Bad(KEPT_BY, "replication factor", cluster({OFFSETS: topic(1)}), POSITION),
    "one in sync of offsets": Bad(KEPT_BY, "min.insync.replicas", cluster({OFFSETS: topic(min_insync_replicas="1")}), POSITION),
    "unclean offsets": Bad(
        KEPT_BY,
        "unclean.leader.election.enable",
        cluster({OFFSETS: topic(unclean_leader_election_enable="true")}),
        POSITION,
    ),
    "offsets that are deleted": Bad(KEPT_BY, "cleanup.policy", cluster({OFFSETS: topic(cleanup_policy="delete")}), POSITION),
    "offsets that are compacted and deleted": Bad(
        KEPT_BY, "cleanup.policy", cluster({OFFSETS: topic(cleanup_policy="compact,delete")}), POSITION
    ),
    "transactions that are deleted": Bad(
        STATE, "cleanup.policy", cluster({TRANSACTIONS: topic(cleanup_policy="compact,delete")}), TXN
    ),
    "unclean transactions": Bad(
        STATE,
        "unclean.leader.election.enable",
        cluster({TRANSACTIONS: topic(cleanup_policy="compact", unclean_leader_election_enable="true")}),
        TXN,
    ),
    "one replica of transactions": Bad(STATE, "replication factor", cluster({TRANSACTIONS: topic(1)}), TXN),
    "one in sync of transactions": Bad(
        STATE, "min.insync.replicas", cluster({TRANSACTIONS: topic(min_insync_replicas="1")}), TXN
    ),
    "short transactions": Bad(
        "the brokers",
        "transaction.max.timeout.ms",
        cluster(transaction_max_timeout_ms="29999"),
        TXN,
        {"transaction_timeout_ms": 30_000},
    ),
    "ids that expire": Bad(
        "the brokers", "transactional.id.expiration.ms", cluster(transactional_id_expiration_ms=str(HOUR - 1)), {EXO: "warning"}
    ),
    "ids that expire within days": Bad(
        "the brokers", "transactional.id.expiration.ms", cluster(transactional_id_expiration_ms=str(DAY)), {EXO: "info"}
    ),
    "producers that expire": Bad(
        "the brokers", "producer.id.expiration.ms", cluster(producer_id_expiration_ms="1000"), {ALO: "warning", EXO: "warning"}
    ),
    "no offsets topic yet": Bad(
        "the brokers",
        "offsets.topic.replication.factor",
        cluster({OFFSETS: GONE}, offsets_topic_replication_factor="1"),
        POSITION,
    ),
    "no transactions topic yet": Bad(
        "the brokers",
        "transaction.state.log.replication.factor",
        cluster({TRANSACTIONS: GONE}, transaction_state_log_replication_factor="1"),
        TXN,
    ),
    "no transactions topic in sync yet": Bad(
        "the brokers",
        "transaction.state.log.min.isr",
        cluster({TRANSACTIONS: topic(error="TOPIC_AUTHORIZATION_FAILED")}, transaction_state_log_min_isr="1"),
        TXN,
    ),
    "no name": Bad(
        OFFERS,
        "name",
        cluster({"offers": topic(error="TOPIC_EXCEPTION")}),
        {AMO: "unsafe", ALO: "unsafe", EXO: "unsafe"},
    ),
    "missing": Bad(OFFERS, "existence", cluster({"offers": GONE}), {AMO: "unsafe", ALO: "unsafe", EXO: "unsafe"}),
    "missing dead letters": Bad(DEAD, "existence", cluster({"dead": GONE}), {AMO: "unsafe", ALO: "unsafe", EXO: "unsafe"}),
    "all denied": Bad(
        OFFERS,
        "rights",
        cluster({"offers": topic(error="TOPIC_AUTHORIZATION_FAILED")}),
        {AMO: "unsafe", ALO: "unsafe", EXO: "unsafe"},
    ),
    "read denied": Bad(
        OFFERS,
        "right to READ",
        cluster({"offers": topic(rights=RIGHTS - {"READ"})}),
        {AMO: "info", ALO: "info", EXO: "info"},
    ),
    "dead letters denied": Bad(
        DEAD,
        "right to WRITE",
        cluster({"dead": topic(rights=RIGHTS - {"WRITE"}, max_message_bytes="2000000")}),
        {AMO: "warning", ALO: "unsafe", EXO: "unsafe"},
    ),
    "older than KIP-848": Bad(
        "the brokers",
        "group.coordinator.rebalance.protocols",
        cluster(group_min_session_timeout_ms="6000"),
        {AMO: "warning", ALO: "warning", EXO: "warning"},
        {"group_protocol": "consumer"},
    ),
    "a draft of KIP-848": Bad(
        "the brokers",
        "group.coordinator.rebalance.protocols",
        cluster(
            group_coordinator_rebalance_protocols="classic,consumer",
            group_min_session_timeout_ms="6000",
            group_consumer_session_timeout_ms="45000",
            inter_broker_protocol_version="3.9-IV0",
        ),
        {AMO: "unsafe", ALO: "unsafe", EXO: "unsafe"},
        {"group_protocol": "consumer"},
    ),
    "settings of a draft of KIP-848": Bad(
        "the brokers",
        "group.coordinator.rebalance.protocols",
        cluster(
            group_min_session_timeout_ms="6000",
            group_consumer_session_timeout_ms="45000",
            inter_broker_protocol_version="3.6-IV2",
        ),
        {AMO: "unsafe", ALO: "unsafe", EXO: "unsafe"},
        {"group_protocol": "consumer"},
    ),
    "long sessions of static members": Bad(
        "the brokers",
        "group.consumer.session.timeout.ms",
        cluster(group_consumer_session_timeout_ms="60000"),
        OLD,
        {"group_protocol": "consumer", "group_instance_id": "payments-0"},
    ),
    "KIP-848 is off": Bad(
        "the brokers",
        "group.coordinator.rebalance.protocols",
        CLASSIC_ONLY,
        {AMO: "unsafe", ALO: "unsafe", EXO: "unsafe"},
        {"group_protocol": "consumer"},
    ),
    "records of no transaction": Bad(
        "the brokers",
        "transaction.partition.verification.enable",
        cluster(transaction_partition_verification_enable="false"),
        {EXO: "warning"},
    ),
    "older than KIP-890": Bad(
        "the brokers",
        "transaction.partition.verification.enable",
        cluster(transaction_abort_timed_out_transaction_cleanup_interval_ms="10000"),
        {EXO: "warning"},
    ),
    "two clusters": Bad(
        "bootstrap.servers",
        "cluster id",
        replace(cluster(), others={"a:1": "id-1", "b:1": "id-2"}),
        {AMO: "unsafe", ALO: "unsafe", EXO: "unsafe"},
    ),
}


@pytest.mark.parametrize("guarantee", Guarantee)
@pytest.mark.parametrize("name", BAD)
def test_each_thing_that_is_wrong_is_found_where_it_matters(name: str, guarantee: Guarantee) -> None:
    """B01-B05, M05, X29, D05: at the level of the guarantee, with value and need; and not where the guarantee does without."""
    bad = BAD[name]
    all_found = found(guarantee, bad.seen, bad.retention, **bad.more)
    mine = [one for one in all_found if (one.subject, one.check) == (bad.subject, bad.check)]
    assert [one.level for one in mine] == ([bad.levels[guarantee]] if guarantee in bad.levels else [])
    for one in mine:
        assert one.value
        assert one.needed
        assert re.fullmatch(r"[A-Z].*\.", one.why)


@pytest.mark.parametrize(
    ("offers", "dead"),
    [
        ({}, {"message_timestamp_before_max_ms": str(7 * DAY)}),
        ({}, {"message_timestamp_before_max_ms": str(2**63 - 1)}),
        ({}, {"message_timestamp_difference_max_ms": str(2**63 - 1)}),
        # the latter counts
        ({}, {"message_timestamp_difference_max_ms": "1", "message_timestamp_before_max_ms": str(7 * DAY)}),
        ({}, {"message_timestamp_before_max_ms": "1", "message_timestamp_type": "LogAppendTime"}),
        ({"message_timestamp_after_max_ms": "10"}, {"message_timestamp_after_max_ms": "10"}),
        ({}, {"message_timestamp_after_max_ms": "10"}),  # brokers of 3.5 do not have it
        (
            {"message_timestamp_after_max_ms": "20", "message_timestamp_type": "LogAppendTime"},
            {"message_timestamp_after_max_ms": "10"},
        ),
    ],
)
def test_dead_letters_of_any_time_that_may_come_are_fine(offers: dict[str, Any], dead: dict[str, Any]) -> None:
    """L05: as old as the input keeps them, as far in the future as it takes them; or with the time of their arrival."""
    letters = topic(max_message_bytes="2000000", retention_ms="-1", **dead)
    checks = [one.check for one in found(ALO, cluster({"offers": topic(**offers), "dead": letters}))]
    assert not [check for check in checks if "max.ms" in check]


def test_no_row_of_the_tables_is_untested() -> None:
    """A row that is added is tested too: what is wrong above names all of them."""
    tested = {(bad.subject, bad.check) for bad in BAD.values()} | {
        ("the brokers", "offsets.retention.minutes")  # it goes with retention.ms, and has a test of its own
    }
    subject = dict(zip(NAMES, (OFFERS, DEAD, KEPT_BY, STATE), strict=True))
    assert {(subject[row.role], row.setting) for row in TOPICS} <= tested
    assert {(subject[role], "replication factor") for role in LOST_WITH_A_BROKER} <= tested
    assert {("the brokers", row.setting) for row in BROKERS} <= tested


def differing(setting: str, *values: str) -> Cluster:
    """Brokers that are alike but for one setting."""
    return with_configs(cluster(), *(Config({**BROKER_CONFIG, setting: value}) for value in values))


@pytest.mark.parametrize(
    ("setting", "values", "subject", "value"),
    [
        ("producer.id.expiration.ms", (str(DAY), "1000", "2000"), "broker 1", "1000"),
        ("producer.id.expiration.ms", (str(DAY), "1000", "1000"), "brokers 1, 2", "1000"),
        ("producer.id.expiration.ms", ("1000", "1000", "1000"), "the brokers", "1000"),
        ("transaction.partition.verification.enable", ("true", "true", "false"), "broker 2", "false"),
        ("transaction.partition.verification.enable", ("false", "true", "false"), "brokers 0, 2", "false"),
    ],
)
def test_each_broker_has_a_file_of_its_own(setting: str, values: tuple[str, ...], subject: str, value: str) -> None:
    """B04, X01: the worst of their values counts, and the brokers that have it are named."""
    one = only(found(EXO, differing(setting, *values)))
    assert (one.subject, one.check, one.value) == (subject, setting, value)


def test_a_broker_that_is_older_than_the_others_is_found() -> None:
    """X01: as in the middle of an upgrade."""
    new = {**BROKER_CONFIG, "transaction.partition.verification.enable": "true"}
    old = {**BROKER_CONFIG, "transaction.abort.timed.out.transaction.cleanup.interval.ms": "10000"}
    one = only(found(EXO, with_configs(cluster(), Config(new), Config(old), Config(new))))
    assert (one.level, one.subject, one.value) == ("warning", "broker 1", "not there: older than Kafka 3.6")


def test_a_broker_that_tells_nothing_hides_no_other() -> None:
    """S07: it is named, and what the others have is looked at all the same."""
    seen = with_configs(
        cluster(), Config(error="_TIMED_OUT"), Config(BROKER_CONFIG), Config({"offsets.retention.minutes": "60"})
    )
    assert {(one.level, one.subject, one.check, one.value) for one in found(ALO, seen) if one.check != "retention.ms"} == {
        ("unknown", "broker 0", "settings", "_TIMED_OUT"),
        ("warning", "broker 2", "offsets.retention.minutes", "60"),
    }


@pytest.mark.parametrize("inherited", [True, False])
def test_what_a_topic_has_from_its_brokers_each_has_from_its_own(inherited: bool) -> None:  # noqa: FBT001
    """B01: the leader's ``min.insync.replicas`` counts, and any may be leader; not where the topic has one of its own."""
    setting = "min.insync.replicas"
    names = frozenset({setting} if inherited else ())
    seen = differing(setting, "2", "1", "2")
    offers = Topic(3, RIGHTS, config=Config(TOPIC_CONFIG, inherited=names))
    all_found = found(ALO, replace(seen, topics={**seen.topics, "offers": offers}))
    assert [(one.level, one.subject, one.value) for one in all_found] == [("unsafe", OFFERS, "1, of broker 1")] * inherited
    assert all("min.insync.replicas=2" in one.command for one in all_found)


@pytest.mark.parametrize(
    ("protocol", "seen"),
    [
        ("consumer", cluster(group_coordinator_rebalance_protocols="classic,consumer", group_min_session_timeout_ms="6000")),
        ("consumer", cluster(group_min_session_timeout_ms="6000", group_consumer_session_timeout_ms="45000")),
        ("consumer", cluster()),
        ("classic", CLASSIC_ONLY),
    ],
    ids=["as it should be", "a later version, without the setting", "hidden", "not wanted"],
)
def test_brokers_that_know_the_group_protocol(protocol: str, seen: Cluster) -> None:
    """Nothing is found where they may well know it: with ``preflight="raise"`` that would keep a client from its work."""
    assert not found(ALO, seen, group_protocol=protocol)


@pytest.mark.parametrize(
    ("session", "config"),
    [
        ("45000", {"group.protocol": "consumer", "group.instance.id": "payments-0"}),
        ("60000", {"group.protocol": "consumer"}),
        ("60000", {"group.instance.id": "payments-0"}),
    ],
)
def test_sessions_that_are_waited_for(session: str, config: dict[str, Any]) -> None:
    """X06: only a static member of KIP-848 waits for the session of another to end."""
    assert found(ALO, cluster(group_consumer_session_timeout_ms=session), **config) == ()


def test_the_longest_session_counts() -> None:
    """Any broker may be the coordinator."""
    seen = differing("group.consumer.session.timeout.ms", "45000", "60000", "45000")
    one = only(found(ALO, seen, group_protocol="consumer", group_instance_id="payments-0"))
    assert (one.subject, one.value) == ("broker 1", "60000")


def test_offsets_that_are_forgotten_early() -> None:
    """B05, C11: offsets that live shorter than an outage are reported, and what each topic keeps beyond that as well."""
    checks = [one.check for one in found(EXO, cluster(offsets_retention_minutes="60"))]
    assert checks == ["retention.ms", "offsets.retention.minutes"]


@pytest.mark.parametrize("guarantee", [ALO, EXO])
def test_without_a_group_nobody_asks_for_offsets(guarantee: Guarantee) -> None:
    """A client that only produces has no offsets to lose."""
    config = {"bootstrap.servers": "a:1", **({"transactional.id": "payments-0"} if guarantee is EXO else {})}
    seen = cluster({OFFSETS: topic(1), "offers": topic(retention_ms="-1")}, offsets_retention_minutes="60")
    assert findings(Case(resolve(guarantee, config), seen, ("offers",))) == ()
    assert findings(Case(resolve(guarantee, config), replace(seen, topics={}), ())) == ()


@pytest.mark.parametrize("names", [("two", "one"), ("one", "two")])
def test_each_topic_is_judged_by_its_own_replicas(names: tuple[str, ...]) -> None:
    """Behind one with two replicas, one with a single copy was a warning only: preflight="raise" let the run begin."""
    seen = cluster({"two": topic(2), "one": topic(1)})
    found = findings(Case(settings(ALO), replace(seen, topics={**seen.topics}), names))
    levels = {one.subject: one.level for one in found if one.check == "replication factor"}
    assert levels == {"topic 'one'": "unsafe", "topic 'two'": "warning"}


@pytest.mark.parametrize("brokers", [1, 2])
def test_a_small_cluster_is_warned_of_and_not_refused(brokers: int) -> None:
    """What takes three brokers is a warning that says so where there are fewer, without a command that would stop writing."""
    small = topic(1, min_insync_replicas="1")
    internal = topic(1, min_insync_replicas="1", cleanup_policy="compact")
    seen = cluster({"offers": small, OFFSETS: internal, TRANSACTIONS: internal}, brokers=brokers)
    small_ones = [one for one in found(EXO, seen) if one.level != "info"]
    assert {one.check for one in small_ones} == {"replication factor"}, "with one copy, min.insync.replicas says nothing new"
    for one in small_ones:
        assert one.level == "warning"
        assert f"has {brokers} broker" in one.why
        assert not one.command
    (unclean,) = found(EXO, cluster({"offers": topic(unclean_leader_election_enable="true")}, brokers=brokers))
    assert unclean.level == "warning"


@pytest.mark.parametrize(("pattern", "taken"), [("^alpha|beta", True), ("^beta", False), ("^x", True), ("^(", False)])
def test_a_pattern_takes_in_what_librdkafka_would(pattern: str, taken: bool) -> None:  # noqa: FBT001
    """It searches: an alternative behind ``|`` that has no ``^`` of its own is found anywhere."""
    assert matches(pattern, "xbeta") is taken


def test_patterns_stand_for_the_topics_that_they_match() -> None:
    """What a pattern matches is checked like a topic that is named; one that matches nothing is mentioned."""
    seen = cluster({"offers": topic(), "orders": topic(min_insync_replicas="1"), "dead": topic(error="_TIMED_OUT")})
    by_pattern = findings(Case(settings(ALO), seen, ("^o.*", "^nothing", "^(", "^__.*", "^dead"), "dead"))
    assert [(one.level, one.subject) for one in by_pattern] == [
        ("unsafe", "topic 'orders'"),
        ("unknown", DEAD),
        ("info", "pattern '^nothing'"),
        ("info", "pattern '^('"),
        ("info", "pattern '^__.*'"),
        ("info", "pattern '^dead'"),
    ]


@pytest.mark.parametrize("error", [*sorted(DENIED), "_TIMED_OUT"])
def test_what_could_not_be_asked_is_unknown(error: str) -> None:
    """S07: a right that is missing, or no answer, is a finding that names what was not asked, and the ACL that would let it."""
    seen = with_configs(cluster({"offers": Topic(3, RIGHTS, config=Config(error=error))}), *[Config(error=error)] * 3)
    of_topic, of_brokers = found(ALO, seen)
    for one in (of_topic, of_brokers):
        assert (one.level, one.check, one.value) == ("unknown", "settings", error)
        assert ("--operation DescribeConfigs" in one.command) == (error in DENIED)
    assert "min.insync.replicas" in of_topic.why
    assert "offsets.retention.minutes" in of_brokers.why
    assert "transaction.max.timeout.ms" not in of_brokers.why, "at-least-once has no transactions"
    assert "replication" not in of_brokers.why, "the offsets topic itself was seen"
    blind = replace(seen, topics={**seen.topics, OFFSETS: Topic(error=error)})
    assert "offsets.topic.replication.factor" in found(ALO, blind)[1].why


def test_without_any_right_nothing_is_promised() -> None:
    """A topic that can be neither read nor written is unsafe; one right is enough, since its role is not known."""
    seen = cluster({"offers": topic(rights=frozenset({"DESCRIBE"}))})
    assert [(one.level, one.check) for one in found(AMO, seen)] == [("unsafe", "right to READ"), ("unsafe", "right to WRITE")]


def test_rights_that_only_the_coordinator_knows_are_named_where_rights_are_limited() -> None:
    """S07: groups and transactional ids are not asked for; a client that is no operator is told what it needs."""
    limited = found(EXO, replace(cluster(), rights=frozenset({"DESCRIBE"})))
    assert [(one.level, one.subject, one.check) for one in limited] == [
        ("info", "group 'payments'", "right to READ"),
        ("info", "transactional.id 'payments-0'", "right to WRITE"),
    ]
    assert limited[0].command.endswith("--add --allow-principal User:NAME --operation Read --group payments")
    assert limited[1].command.endswith("--operation Write --transactional-id payments-0")


def test_no_answer_is_one_finding() -> None:
    """Where nobody answered there is nothing else to say."""
    one = only(found(EXO, Cluster(error="_TIMED_OUT")))
    assert (one.level, one.subject) == ("unknown", "the brokers")
    assert "_TIMED_OUT" in one.value


def test_settings_that_brokers_do_not_have_are_passed_over() -> None:
    """Brokers of another version, or of another maker, do not tell everything: nothing is made up."""
    empty = Topic(3, None, config=Config({"retention.ms": "much"}))
    seen = Cluster("id", 3, frozenset({"ALTER"}), topics={"offers": empty, OFFSETS: empty}, configs={1: Config({})})
    assert findings(Case(settings(EXO), seen, ("offers",), None, timedelta(hours=1))) == ()


def test_times_are_written_for_people_and_for_brokers() -> None:
    """The number that the brokers know, and what it comes to."""
    assert [span(ms) for ms in (-1, 0, 1, 1500, 2000, 3 * HOUR, 604_800_000)] == [
        "for ever",
        "0",
        "1",
        "1500",
        "2000 (2 s)",
        "10800000 (3 h)",
        "604800000 (7 d)",
    ]


# -- the report -----------------------------------------------------------------------------------------------------------


def report() -> PreflightReport:
    seen = cluster(
        {"offers": topic(1, min_insync_replicas="1", retention_bytes="1"), "dead": GONE}, offsets_retention_minutes="9"
    )
    return PreflightReport(EXO, found(EXO, seen), "id-1")


def test_a_report_puts_the_gravest_first() -> None:
    """Findings, text and counts go from unsafe to info."""
    levels = [one.level for one in report().findings]
    assert levels == ["unsafe", "unsafe", "unsafe", "warning", "warning", "info"]
    assert repr(report()) == "<PreflightReport exactly-once: 3 unsafe, 2 warning, 1 info>"
    assert str(report()).startswith("exactly-once, cluster id-1: 3 unsafe, 2 warning, 1 info\n")


def test_a_report_says_everything_as_text_and_as_data() -> None:
    """Each finding is in both; commands stand on one line each, so that they can be copied."""
    text, data = str(report()), json.loads(report().to_json())
    assert data == report().as_dict()
    assert (data["guarantee"], data["cluster_id"], data["ok"]) == ("exactly-once", "id-1", False)
    for one, row in zip(report().findings, data["findings"], strict=True):
        assert all(part in re.sub(r"\s+", " ", text) for part in (one.subject, one.check, one.value, one.needed, one.why))
        assert not one.command or f"\n         {one.command}\n" in f"{text}\n"
        assert row["why"] == one.why


def test_raise_if_unsafe_names_everything_unsafe_and_nothing_else() -> None:
    """One error for all of it, with the commands; it is an UnsafeConfigError like that of a setting."""
    with pytest.raises(UnsafeConfigError) as caught:
        report().raise_if_unsafe()
    text = str(caught.value)
    for one in report().findings:
        assert ((one.why.rstrip(".") in text) and (one.command in text)) == (one.level == "unsafe")
    assert "exactly-once" in text


def test_warnings_do_not_raise() -> None:
    """``ok`` and ``raise_if_unsafe()`` go by what is unsafe, and by nothing less."""
    fine = PreflightReport(ALO, tuple(one for one in report().findings if one.level != "unsafe"), "id-1")
    assert fine.ok
    fine.raise_if_unsafe()
    assert not report().ok


def test_commands_carry_the_real_names_quoted() -> None:
    """A command can be pasted into a shell: names are quoted, and a secured cluster is told that it takes a file."""
    seen = cluster({"my topic": topic(unclean_leader_election_enable="true")})
    case = Case(settings(ALO, "h1:1,h2:2", security_protocol="ssl"), seen, ("my topic",))
    assert only(findings(case)).command == (
        "kafka-configs.sh --bootstrap-server h1:1,h2:2 --command-config admin.properties --alter --entity-type topics "
        "--entity-name 'my topic' --add-config unclean.leader.election.enable=false"
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_secret_is_in_any_text() -> None:
    """S01: what gets a client into the cluster is in no finding, however the report is turned into text."""
    secret = "m4rker"
    config = {
        "bootstrap.servers": "h1:1",
        "group.id": "g",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "someone",
        "sasl.password": secret,
        "ssl.key.password": secret,
    }
    seen = replace(cluster({"offers": GONE, "dead": topic(rights=frozenset({"READ"}))}), rights=None)
    limited = findings(Case(resolve(ALO, config), with_configs(seen, Config(error=min(DENIED))), ("offers",), "dead"))
    one = PreflightReport(ALO, limited, "id")
    with pytest.raises(UnsafeConfigError) as caught:
        one.raise_if_unsafe()
    texts = (str(one), repr(one), one.to_json(), str(caught.value), repr(caught.value), repr(limited))
    assert len(limited) >= 4
    assert not [text for text in texts if secret in text]


# -- asking ---------------------------------------------------------------------------------------------------------------


@contextmanager
def silent() -> Iterator[str]:
    """An address where connections are taken and nothing is ever answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("topics", [["offers"], ["^offers"], []])
def test_brokers_that_do_not_answer_are_a_finding_in_time(topics: list[str]) -> None:
    """The timeout is for everything together, and running out of it is no exception."""
    with silent() as address:
        started = time.monotonic()
        one = preflight(settings(EXO, address), topics, timeout=0.5)
        assert time.monotonic() - started < 0.5 + 2
    assert [finding.level for finding in one.findings] == ["unknown"]
    assert not one.ok
    assert one.cluster_id is None


def test_ctrl_c_ends_the_asking_at_once() -> None:
    """The main thread stays interruptible while nobody answers."""
    with silent() as address:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        started = time.monotonic()
        try:
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                preflight(settings(ALO, address), ["offers"], timeout=4)
        finally:
            timer.join()
        assert time.monotonic() - started < 3
        wait_until(lambda: not mine(), "the thread that asks has ended")


def of_tokens(oauth_cb: Callable[[str], tuple[str, float]]) -> Settings:
    """Of a client with three addresses, where nobody is."""
    login = {"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER", "oauth_cb": oauth_cb}
    return resolve(ALO, {"bootstrap.servers": "127.0.0.1:1,127.0.0.1:2,127.0.0.1:3", "group.id": "g", **login})


def test_clients_that_wait_for_tokens_take_nothing_from_the_time_for_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for a whole second at least: a start would never look at what ``preflight="raise"`` is to refuse."""
    left: list[float] = []

    def answered(_client: object, _topics: object, deadline: float) -> Cluster:
        left.append(deadline - time.monotonic())
        return cluster({})

    monkeypatch.setattr(asking, "_ask", answered)
    one = preflight(of_tokens(lambda _config: ("token", time.time() + 60)), ["offers"], timeout=0.9)
    assert one.cluster_id is not None
    assert 0 < left[0] <= 0.9


class Brokers:
    """A client of three brokers, of which the last never tells its settings."""

    def describe_cluster(self, **_: object) -> Future[Any]:
        nodes = [SimpleNamespace(id=number) for number in (1, 2, 3)]
        return done(SimpleNamespace(cluster_id="id-1", nodes=nodes, authorized_operations=None))

    def describe_topics(self, names: TopicCollection, **_: object) -> dict[str, Future[Any]]:
        answer = SimpleNamespace(partitions=[], authorized_operations=None)
        return {name: done(answer) for name in (OFFSETS, TRANSACTIONS)}

    def describe_configs(self, asked: list[ConfigResource], **_: object) -> dict[ConfigResource, Future[Any]]:
        return {one: Future() if one.name == "3" else done(self.entries(one.name)) for one in asked}

    def entries(self, name: str) -> dict[str, ConfigEntry]:
        """Of topic or broker: min.insync.replicas as all have it, and something of its own."""
        own, all_have = ConfigSource.DYNAMIC_TOPIC_CONFIG, ConfigSource.STATIC_BROKER_CONFIG
        return {"min.insync.replicas": ConfigEntry("", "2", all_have), "own": ConfigEntry("", name, own)}


def done(answer: object) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(answer)
    return future


def test_each_broker_is_asked_and_one_that_does_not_answer_hides_no_other() -> None:
    """X01, B04: all at once, in the time that there is."""
    client = Handle()
    client.raw = Brokers()
    started = time.monotonic()
    seen = asking._ask(client, (), started + 0.3)
    assert time.monotonic() - started < 2
    assert {broker: (one.text("own"), one.error) for broker, one in seen.configs.items()} == {
        1: ("1", ""),
        2: ("2", ""),
        3: (None, "_TIMED_OUT"),
    }
    assert seen.topics[OFFSETS].config.inherited == {"min.insync.replicas"}


def test_a_token_that_nobody_gives_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As brokers are that do not answer: the run will say it."""

    def refused(*_: object) -> None:
        raise BrokerError("oauth_cb gave no token")

    monkeypatch.setattr(Handle, "make", refused)
    one = preflight(of_tokens(lambda _config: ("token", 0.0)), ["offers"])
    assert one.cluster_id is None
    assert one.findings[0].value == "none (oauth_cb gave no token)"


def test_not_even_librdkafka_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline holds also where a request does not end with its own timeout."""
    over = threading.Event()

    def ask(*_: object) -> Cluster:
        over.wait(NOW)
        return Cluster()

    monkeypatch.setattr(asking, "ask", ask)
    monkeypatch.setattr(asking, "GRACE", 0.1)
    try:
        assert preflight(settings(ALO), ["offers"], timeout=0.1).cluster_id is None
        assert not over.is_set()
        assert mine()
    finally:
        over.set()


def test_a_run_that_is_stopped_meanwhile_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it say what it has not found out: it consumes nothing."""
    caplog.set_level(logging.DEBUG)
    asked, over = threading.Event(), threading.Event()

    def ask(*_: object) -> Cluster:
        asked.set()
        over.wait(60)
        return Cluster()

    monkeypatch.setattr(asking, "ask", ask)
    monkeypatch.setattr("kafka_guarantees._preflight.starting.AT_START", 60)
    monkeypatch.setattr("kafka_guarantees._preflight.starting._LOGGED", set())
    lifecycle = Lifecycle("AtLeastOnce")
    before = Preflight(settings(EXO), lifecycle, "warn", dead_letter=None)
    run = threading.Thread(target=before.start, args=(["offers"],))
    run.start()
    try:
        assert asked.wait(NOW)
        lifecycle.stop()
        run.join(NOW)
        assert not run.is_alive()
        assert not [record for record in caplog.records if "preflight" in record.getMessage()]
    finally:
        over.set()


@pytest.mark.parametrize("at_start", ["warn", "raise"])
def test_brokers_that_are_starting_are_waited_for_where_it_matters(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at_start: Literal["warn", "raise"]
) -> None:
    """With "raise" a run does not begin unseen; in any case it is said that nothing was looked at."""
    answers = [Cluster(error="down"), Cluster(error="down"), cluster({"offers": topic(1, min_insync_replicas="1")})]
    monkeypatch.setattr(asking, "ask", lambda *_: answers.pop(0))
    monkeypatch.setattr("kafka_guarantees._preflight.starting._LOGGED", set())
    before = Preflight(settings(EXO), Lifecycle("ExactlyOnce"), at_start, dead_letter=None)
    said = "nothing was looked at, since the brokers gave no answer: none (down)"
    if at_start == "raise":
        with pytest.raises(UnsafeConfigError, match="offers"):
            before.start(["offers"])
        answers += [Cluster(error="down")] * 3
        monkeypatch.setattr("kafka_guarantees._preflight.starting.PATIENCE", 0.0)
        assert said not in caplog.text
    before.start(["offers"])
    assert said in caplog.text


def test_a_single_name_is_no_list() -> None:
    """``topics="offers"`` would be six topics of one letter."""
    with pytest.raises(TypeError, match=r"\['offers'\]"):
        preflight(settings(ALO), "offers")


def mine() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "kafka-guarantees-preflight"]


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + NOW
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


def by_subject(one: PreflightReport) -> set[tuple[str, str, str, str]]:
    return {(finding.level, finding.subject, finding.check, finding.value) for finding in one.findings}


@pytest.mark.broker
def test_one_broker_is_warned_of(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """B01, B02: on one broker nothing is refused for it, and topic and internal topics are named with what they have."""
    name = kafka_topic()
    one = preflight(settings(EXO, kafka.bootstrap), [name])
    assert one.ok
    assert by_subject(one) == {
        ("warning", subject, "replication factor", "1") for subject in (f"topic {name!r}", KEPT_BY, STATE)
    }
    wait_until(lambda: not mine(), "its threads have ended")


@pytest.mark.broker
def test_what_can_be_no_topic_is_unsafe(kafka: RunningKafka) -> None:
    """It is not asked for, and the others are."""
    one = preflight(settings(ALO, kafka.bootstrap), ["bad name", "..", "x" * 250], dead_letter="^dead")
    names = ("topic 'bad name'", "topic '..'", f"topic {'x' * 250!r}", "dead letter topic '^dead'")
    assert [(f.level, f.subject, f.check) for f in one.findings if f.check == "name"] == [("unsafe", n, "name") for n in names]
    assert not one.ok


@pytest.mark.broker
def test_at_most_once_does_without_durable_topics(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """Only its offsets must not be lost (M05)."""
    one = preflight(settings(AMO, kafka.bootstrap), [kafka_topic(config={"unclean.leader.election.enable": "true"})])
    assert by_subject(one) == {("warning", KEPT_BY, "replication factor", "1")}


@pytest.mark.broker
def test_settings_of_topics_are_read(kafka: RunningKafka, kafka_topic: Callable[..., str]) -> None:
    """What a topic was made with is what is compared, also where only a pattern says its name."""
    config = {"unclean.leader.election.enable": "true", "max.message.bytes": "2000", "retention.ms": "1000"}
    name, dead = kafka_topic(config=config), kafka_topic(config={"cleanup.policy": "compact"})
    one = preflight(settings(ALO, kafka.bootstrap), [f"^{name}$"], dead_letter=dead)
    assert by_subject(one) >= {
        ("warning", f"topic {name!r}", "unclean.leader.election.enable", "true"),
        ("warning", f"topic {name!r}", "max.message.bytes", "2000"),
        ("warning", f"topic {name!r}", "retention.ms", "1000 (1 s)"),
        ("unsafe", f"dead letter topic {dead!r}", "cleanup.policy", "compact"),
    }


@pytest.mark.broker
def test_what_a_topic_has_of_its_own_is_told_from_what_it_inherits(
    kafka: RunningKafka, kafka_topic: Callable[..., str]
) -> None:
    """B01: what it inherits is another one with each leader."""
    own, none = kafka_topic(config={"min.insync.replicas": "1"}), kafka_topic()
    seen = asking.ask(settings(ALO, kafka.bootstrap), [own, none], lambda: time.monotonic() + NOW)
    assert "min.insync.replicas" not in seen.topics[own].config.inherited
    assert "min.insync.replicas" in seen.topics[none].config.inherited
    assert [one.number("min.insync.replicas") for one in seen.configs.values()] == [1]


@pytest.fixture(scope="module")
def peculiar() -> Iterator[LocalKafka]:
    """A broker that creates topics by itself, allows short transactions only, forgets soon, and asks users for their rights."""
    config = {
        "auto.create.topics.enable": "true",
        "transaction.max.timeout.ms": 20_000,
        "transactional.id.expiration.ms": 30_000,
        "offsets.retention.minutes": 60,
    }
    with LocalKafka(config=config, security="sasl_ssl") as kafka:
        yield kafka


@pytest.mark.broker
def test_settings_of_brokers_are_read(peculiar: LocalKafka) -> None:
    """B03, B04, B05: transactions longer than the brokers allow are unsafe; ids and offsets that expire, a warning."""
    one = preflight(settings(EXO, peculiar.bootstrap, transaction_timeout_ms=30_000), [])
    assert by_subject(one) >= {
        ("unsafe", "the brokers", "transaction.max.timeout.ms", "20000"),
        ("warning", "the brokers", "transactional.id.expiration.ms", "30000"),
        ("warning", "the brokers", "offsets.retention.minutes", "60"),
    }


@pytest.mark.broker
def test_asking_creates_no_topic(peculiar: LocalKafka, fresh: Callable[[str], str]) -> None:
    """A topic that is missing is unsafe, and is still missing afterwards, although the brokers create topics by themselves."""
    name, dead = fresh("missing"), fresh("dead")
    for _ in range(2):
        one = preflight(settings(ALO, peculiar.bootstrap), [name, f"^{name}"], dead_letter=dead)
        assert {(finding.subject, finding.check) for finding in one.findings if finding.level == "unsafe"} == {
            (f"topic {name!r}", "existence"),
            (f"dead letter topic {dead!r}", "existence"),
        }
    known = AdminClient({"bootstrap.servers": peculiar.bootstrap, "log_level": 0}).list_topics(timeout=NOW).topics
    assert not {name, dead} & set(known)


@pytest.mark.broker
def test_two_clusters_in_one_list_are_found(kafka: RunningKafka, peculiar: LocalKafka) -> None:
    """X29: addresses of two clusters are unsafe; one that does not answer is not waited for."""
    with silent() as address:
        two = preflight(settings(ALO, f"{kafka.bootstrap},{peculiar.bootstrap},{address}"), [], timeout=NOW)
        (both,) = [finding for finding in two.findings if finding.check == "cluster id"]
        assert both.level == "unsafe"
        assert kafka.bootstrap in both.value
        assert peculiar.bootstrap in both.value
        started = time.monotonic()
        one = preflight(settings(ALO, f"{kafka.bootstrap},{address}"), [], timeout=NOW)
        assert one.cluster_id is not None
        assert not [finding for finding in one.findings if finding.check == "cluster id"]
        assert time.monotonic() - started < NOW / 2


@pytest.mark.broker
def test_a_broker_that_stands_still_or_is_gone_is_no_exception(peculiar: LocalKafka) -> None:
    """However the broker fails, the answer is a report in time; and once it is back, everything is asked again."""
    for fail, mend in ((peculiar.pause, peculiar.resume), (peculiar.kill, peculiar.restart)):
        fail(0)
        try:
            started = time.monotonic()
            one = preflight(settings(EXO, peculiar.bootstrap), ["offers"], timeout=0.5)
            assert time.monotonic() - started < 0.5 + 2
            assert [finding.subject for finding in one.findings] == ["the brokers"]
        finally:
            mend(0)
        assert preflight(settings(EXO, peculiar.bootstrap), [], timeout=NOW).cluster_id is not None


@pytest.mark.broker
def test_missing_rights_are_findings(peculiar: LocalKafka, fresh: Callable[[str], str]) -> None:
    """S07: who may only read gets the rest as unknown, with the ACL that would let it be asked; given that, it is asked."""
    name, hidden = fresh("topic"), fresh("hidden")
    user = {key.replace(".", "_"): value for key, value in peculiar.add_user("reader").items()}
    peculiar.create_topic(name)
    peculiar.create_topic(hidden)
    limited = settings(ALO, str(user.pop("bootstrap_servers")), **user)

    def asked() -> set[tuple[str, str, str, str]]:
        return by_subject(preflight(limited, [name, hidden], timeout=NOW))

    allow(peculiar, ResourceType.TOPIC, name, AclOperation.READ)
    denied = ("unknown", f"topic {name!r}", "settings", "TOPIC_AUTHORIZATION_FAILED")
    wait_until(lambda: denied in asked(), "the right to read has come into force")
    assert asked() >= {
        denied,
        ("unsafe", f"topic {hidden!r}", "rights", "none"),
        ("info", f"topic {name!r}", "right to WRITE", "denied"),
        ("info", "group 'payments'", "right to READ", "not asked"),
        ("unknown", "the brokers", "settings", "CLUSTER_AUTHORIZATION_FAILED"),
    }
    report = preflight(limited, [name, hidden], timeout=NOW)
    assert user["sasl_password"] not in f"{report}{report!r}{report.to_json()}"
    allow(peculiar, ResourceType.TOPIC, name, AclOperation.DESCRIBE_CONFIGS)
    allow(peculiar, ResourceType.BROKER, "kafka-cluster", AclOperation.DESCRIBE_CONFIGS)
    wait_until(lambda: not {one for one in asked() if one[0] == "unknown"}, "the rights have come into force")


def allow(kafka: LocalKafka, kind: ResourceType, name: str, operation: AclOperation) -> None:
    acl = AclBinding(kind, name, ResourcePatternType.LITERAL, "User:reader", "*", operation, AclPermissionType.ALLOW)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 0})
    for future in admin.create_acls([acl]).values():
        future.result(NOW)


@pytest.mark.cluster
@pytest.mark.parametrize("guarantee", Guarantee)
def test_three_brokers_as_they_should_be(guarantee: Guarantee, kafka_cluster: LocalKafka, fresh: Callable[[str], str]) -> None:
    """Replication 3 and two in sync: ok, and nothing above info."""
    name, dead = fresh("topic"), fresh("dead")
    kafka_cluster.create_topic(name, 3)
    kafka_cluster.create_topic(dead, config={"max.message.bytes": 2_000_000, "message.timestamp.type": "LogAppendTime"})
    one = preflight(settings(guarantee, kafka_cluster.bootstrap), [name], dead_letter=dead, timeout=NOW)
    assert one.ok
    assert {finding.level for finding in one.findings} <= {"info"}
    assert one.cluster_id == kafka_cluster._cluster_id


@pytest.mark.cluster
def test_one_copy_on_three_brokers_is_unsafe(kafka_cluster: LocalKafka, fresh: Callable[[str], str]) -> None:
    """B01: where three brokers could keep it, a topic with one copy is refused, and the error names topic and values."""
    name = fresh("topic")
    kafka_cluster.create_topic(name, 2, replication=1, config={"min.insync.replicas": 1})
    one = preflight(settings(ALO, kafka_cluster.bootstrap), [name], timeout=NOW)
    with pytest.raises(UnsafeConfigError, match=rf"(?s){name}.*replication factor='1'.*min\.insync\.replicas: 1"):
        one.raise_if_unsafe()
