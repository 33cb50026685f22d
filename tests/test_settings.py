"""Laws of the configuration: what each guarantee sets, refuses, calls weaker and shows. No broker is needed."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import inspect
import json
import logging
import math
import pickle
import re
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import confluent_kafka
import pytest
from confluent_kafka import Consumer, KafkaException, Producer
from hypothesis import given, settings
from hypothesis import strategies as st

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce
from kafka_guarantees._settings import Explanation, Guarantee, Settings, explain, librdkafka, resolve
from kafka_guarantees._settings.explanation import NOT_PROMISED, PROMISES
from kafka_guarantees._settings.names import FOREIGN_NAMES, OWN_ARGUMENTS, OWN_CALLBACKS
from kafka_guarantees._settings.presets import PRESETS, Kind
from kafka_guarantees._settings.properties import (
    ALIASES,
    CALLBACK,
    ENUM,
    FLAGS,
    INTEGER,
    PATHS,
    PROPERTIES,
    SHOWN,
    STRING,
    canonical,
)
from kafka_guarantees._settings.refusals import REFUSALS, WEAKENINGS
from kafka_guarantees._settings.values import HIDDEN, shown
from kafka_guarantees.errors import DurabilityWarning, SecurityWarning, UnsafeConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AMO, ALO, EOS = Guarantee
MARKER = "s3cr3t-Marker-9fQ"
BROKER = "127.0.0.1:1"


def minimal(guarantee: Guarantee, **more: object) -> dict[str, object]:
    """The smallest dict that resolves, with ``a__b`` in ``more`` standing for ``a.b``."""
    config: dict[str, object] = {"bootstrap.servers": BROKER, "group.id": "offers"}
    if guarantee is EOS:
        config["transactional.id"] = "offers-0"
    return {**config, **{name.replace("__", "."): value for name, value in more.items()}}


def resolved(guarantee: Guarantee, config: dict[str, object], **options: Any) -> Settings:
    """Resolve, without a word about weaker settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DurabilityWarning)
        warnings.simplefilter("ignore", SecurityWarning)
        return resolve(guarantee, config, **options)


def refused(guarantee: Guarantee, config: dict[str, object], **options: Any) -> UnsafeConfigError:
    with pytest.raises(UnsafeConfigError) as caught:
        resolved(guarantee, config, **options)
    return caught.value


def row(explanation: Explanation, setting: str, side: str = "") -> Any:
    return next(r for r in explanation if r.setting == setting and side in {"", r.side})


# --- presets ---------------------------------------------------------------------------------------------------------

LOCKED = [(guarantee, p) for p in PRESETS for guarantee in p.guarantees if p.kind is Kind.LOCKED]
FREE = [(guarantee, p) for p in PRESETS for guarantee in p.guarantees if p.kind in (Kind.DEFAULT, Kind.TUNING)]

# Per setting, a value that differs from every preset of it and that a user may want.
OTHER: dict[str, object] = {
    "acks": 1,
    "retries": 3,
    "retry.backoff.ms": 250,
    "enable.idempotence": "true",
    "max.in.flight": 2,
    "delivery.timeout.ms": 9_000,
    "transaction.timeout.ms": 20_000,
    "socket.timeout.ms": 5_000,
    "partitioner": "consistent_random",
    "log.connection.close": "false",
    "log_level": 7,
    "enable.auto.commit": "true",
    "enable.auto.offset.store": "true",
    "auto.offset.reset": "latest",
    "isolation.level": "read_uncommitted",
    "allow.auto.create.topics": "true",
    "topic.metadata.propagation.max.ms": 7_000,
    "check.crcs": "false",
    "heartbeat.interval.ms": 900,
    "linger.ms": 7,
    "fetch.wait.max.ms": 40,
    "fetch.queue.backoff.ms": 50,
    "queued.max.messages.kbytes": 1_024,
}


def contradiction(guarantee: Guarantee, setting: str) -> object:
    if setting == "delivery.report.only.error":
        return guarantee is not AMO
    if setting == "enable.idempotence":
        return guarantee is AMO
    return OTHER[setting]


@pytest.mark.parametrize(("guarantee", "preset"), LOCKED, ids=lambda x: getattr(x, "setting", None))
def test_a_locked_setting_cannot_be_contradicted(guarantee: Guarantee, preset: Any) -> None:
    """P03 P06 X15: the error names the setting, the value, what it would break and what to do instead."""
    value = contradiction(guarantee, preset.setting)
    error = refused(guarantee, minimal(guarantee) | {preset.setting: value})
    assert (error.setting, error.value) == (preset.setting, value)
    assert preset.breaks
    assert preset.instead
    for part in (preset.setting, repr(value), preset.breaks, preset.instead, guarantee.value):
        assert part in str(error)


@pytest.mark.parametrize(("guarantee", "preset"), LOCKED, ids=lambda x: getattr(x, "setting", None))
def test_a_locked_setting_may_be_repeated(guarantee: Guarantee, preset: Any) -> None:
    """Giving a locked setting its own value is no contradiction, and it stays the guarantee's."""
    config = minimal(guarantee) | {preset.setting: preset.value}
    resolved(guarantee, config)
    assert row(explain(guarantee, config), preset.setting).set_by == "guarantee (locked)"


@pytest.mark.parametrize(("guarantee", "preset"), FREE, ids=lambda x: getattr(x, "setting", None))
def test_a_default_can_be_overridden(guarantee: Guarantee, preset: Any) -> None:
    """A default or tuning row gives way to the user, reaches the client, and is shown as the user's."""
    value = False if preset.setting == "enable.idempotence" else OTHER[preset.setting]
    config = minimal(guarantee) | {preset.setting: value}
    result, explained = resolved(guarantee, config), row(explain(guarantee, config), preset.setting)
    wanted = "false" if value is False else value
    assert wanted in {result.producer.get(preset.setting), result.consumer.get(preset.setting)}
    assert (explained.set_by, explained.value) == ("you", str(wanted))


@pytest.mark.parametrize("guarantee", Guarantee)
@pytest.mark.parametrize("mine", ["^private-", " ^private-,", "^private-,^__consumer_offsets$"])
def test_a_blacklist_does_not_open_kafkas_own_topics(guarantee: Guarantee, mine: str) -> None:
    """C19: a run for a pattern would else feed on its own commits. An entry that is empty would take in all there is."""
    config = minimal(guarantee) | {"topic.blacklist": mine}
    wanted = "^__consumer_offsets$,^__transaction_state$,^__share_group_state$,^private-"
    assert resolved(guarantee, config).consumer["topic.blacklist"] == wanted
    explained = row(explain(guarantee, config), "topic.blacklist")
    assert (explained.value, explained.set_by) == (wanted, "you")


@pytest.mark.parametrize("guarantee", Guarantee)
def test_every_preset_reaches_its_side_and_is_explained(guarantee: Guarantee) -> None:
    """What the table says is what the clients get and what explain() shows."""
    result = resolved(guarantee, minimal(guarantee))
    rows = [p for p in PRESETS if guarantee in p.guarantees]
    for preset in rows:
        reached = {p.side for p in rows if p.setting == preset.setting}  # the sides may have rows of their own
        for side, config in {"producer": result.producer, "consumer": result.consumer}.items():
            assert (preset.setting in config) == (not reached.isdisjoint({side, "both"}))
        assert row(explain(guarantee, minimal(guarantee)), preset.setting, preset.side).why == preset.why


def test_the_tables_name_real_properties() -> None:
    """A row about a property that librdkafka does not have would protect nothing."""
    for table in (PRESETS, REFUSALS, WEAKENINGS):
        assert {r.setting for r in table} <= set(PROPERTIES)
    assert not {p.setting for p in PRESETS} & set(ALIASES)


# DESIGN 3, written down a second time: a row that is lost or changed shows here.
_PRODUCER = {"partitioner": "murmur2_random", "allow.auto.create.topics": "false", "bootstrap.servers": BROKER}
_IDEMPOTENT = {"acks": "all", "retries": 2147483647, "enable.idempotence": "true", "max.in.flight": 5}
_CONSUMER = {
    "enable.auto.commit": "false",
    "enable.auto.offset.store": "false",
    "auto.offset.reset": "error",
    "allow.auto.create.topics": "false",
    "heartbeat.interval.ms": 3_000,
    "socket.timeout.ms": 30_000,
    "fetch.wait.max.ms": 100,
    "fetch.queue.backoff.ms": 2,
    "queued.max.messages.kbytes": 32_768,
    "topic.blacklist": "^__consumer_offsets$,^__transaction_state$,^__share_group_state$",
    "bootstrap.servers": BROKER,
    "group.id": "offers",
}
_COMMITTED = {"isolation.level": "read_committed", "check.crcs": "true"}
WHOLE = {
    AMO: (
        {
            **_PRODUCER,
            "acks": 0,
            "retries": 0,
            "enable.idempotence": "false",
            "delivery.report.only.error": True,
            "socket.timeout.ms": 30_000,
        },
        {**_CONSUMER, "retry.backoff.ms": 500},
    ),
    ALO: (
        {
            **_PRODUCER,
            **_IDEMPOTENT,
            "retry.backoff.ms": 100,
            "delivery.timeout.ms": 120_000,
            "socket.timeout.ms": 30_000,
            "delivery.report.only.error": False,
            "linger.ms": 100,
            "topic.metadata.propagation.max.ms": 5_000,
        },
        {**_CONSUMER, **_COMMITTED, "retry.backoff.ms": 100},
    ),
    EOS: (
        {
            **_PRODUCER,
            **_IDEMPOTENT,
            "transactional.id": "offers-0",
            "transaction.timeout.ms": 15_000,
            "delivery.timeout.ms": 15_000,
            "socket.timeout.ms": 10_000,
            "delivery.report.only.error": False,
            "log.connection.close": "true",
            "log_level": 6,
            "linger.ms": 20,
            "topic.metadata.propagation.max.ms": 5_000,
        },
        {**_CONSUMER, **_COMMITTED},
    ),
}


@pytest.mark.parametrize("guarantee", Guarantee)
def test_the_clients_get_exactly_this(guarantee: Guarantee) -> None:
    """DESIGN 3: every preset of the guarantee, and nothing else."""
    result = resolved(guarantee, minimal(guarantee))
    assert (result.producer, result.consumer) == WHOLE[guarantee]


@pytest.mark.parametrize(
    ("given", "linger"),
    [
        ({}, 100),
        ({"group.id": None}, 20),
        ({"delivery.timeout.ms": 30}, 15),
        ({"delivery.timeout.ms": 0}, 100),
        ({"queue.buffering.max.messages": 50_000}, 50),
        ({"queue.buffering.max.messages": 1_000}, 5),
        ({"queue.buffering.max.messages": 1_000_000}, 100),
        ({"queue.buffering.max.messages": 1_000, "delivery.timeout.ms": 6}, 3),
        ({"queue.buffering.max.kbytes": 16_384}, 25),
        ({"queue.buffering.max.kbytes": 512}, 5),
        ({"queue.buffering.max.kbytes": 1_048_576}, 100),
        ({"queue.buffering.max.kbytes": 32_768, "queue.buffering.max.messages": 10_000}, 10),
        ({"queue.buffering.max.kbytes": 2_048, "group.id": None}, 5),
    ],
)
def test_records_linger_less_where_that_would_hold_them_up(given: dict[str, Any], linger: int) -> None:
    """P16: below delivery.timeout.ms; a queue that is full waits for it as well; only a run sends by itself what lingers."""
    config = {name: value for name, value in (minimal(ALO) | given).items() if value is not None}
    assert resolved(ALO, config).producer["linger.ms"] == linger


@pytest.mark.parametrize(
    ("addresses", "right"),
    [
        ("a", True),
        ("kafka-1.example.com:9092, kafka-2_b:9093,", True),
        ("SASL_SSL://kafka:9093", True),
        ("[::1]:9092,10.0.0.1:1", True),
        ("http://kafka:9092", False),
        ("kafka:9092,kafka://b", False),
        ("a:9092;b:9093", False),
        ("a:99999999", False),
        ("a:0", False),
        ("a:b", False),
        ("a b", False),
        ("::1:9092", False),
    ],
)
def test_what_is_no_address_is_refused(addresses: str, right: bool) -> None:  # noqa: FBT001
    """Librdkafka leaves it out, or takes another port; a client that has no other address waits for ever."""
    config = minimal(ALO) | {"bootstrap.servers": addresses}
    if right:
        assert resolved(ALO, config).producer["bootstrap.servers"] == addresses
    else:
        with pytest.raises(UnsafeConfigError, match=r"bootstrap\.servers.*no list of addresses.*host:port"):
            resolved(ALO, config)


def test_all_that_is_wrong_is_said_at_once() -> None:
    """Ten services with eight mistakes each are not eighty rounds. What is right is not named, and nothing is named twice."""
    wrong = {
        "bootstrap.servers": "http://kafka",
        "group.idd": "offers",
        "group.id": "offers",
        "linger.ms": "soon",
        "acks": 1,
        "isolation.level": "read_uncommitted",
        "sasl.password": "swordfish",
    }
    with pytest.raises(UnsafeConfigError) as caught:
        resolved(EOS, wrong)
    error = caught.value
    named = ["group.idd", "linger.ms", "acks", "isolation.level", "bootstrap.servers", "transactional.id"]
    assert [error.setting, *(other.setting for other in error.others)] == named
    assert [line.partition("=")[0].removeprefix("And ") for line in str(error).splitlines()] == named
    assert "swordfish" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with pytest.raises(UnsafeConfigError) as caught:
        resolved(EOS, {})
    assert [caught.value.setting, *(other.setting for other in caught.value.others)] == [
        "bootstrap.servers",
        "transactional.id",
    ]


def test_what_is_locked() -> None:
    """DESIGN 3, the word "locked", written down a second time."""
    always = {"enable.auto.commit", "enable.auto.offset.store", "auto.offset.reset", "delivery.report.only.error"}
    assert {g: {p.setting for guarantee, p in LOCKED if guarantee is g} for g in Guarantee} == {
        AMO: always | {"retries", "enable.idempotence"},
        ALO: always,
        EOS: always | {"acks", "enable.idempotence", "isolation.level", "log.connection.close"},
    }


@pytest.mark.parametrize("guarantee", Guarantee)
def test_the_consumer_never_moves_by_itself(guarantee: Guarantee) -> None:
    """P03 M05: no auto commit, no auto store, no reset, under all three guarantees."""
    consumer = resolved(guarantee, minimal(guarantee)).consumer
    assert consumer["enable.auto.commit"] == consumer["enable.auto.offset.store"] == "false"
    assert consumer["auto.offset.reset"] == "error"


# --- refusals and weaker settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guarantee", "setting", "value", "says"),
    [
        (AMO, "acks", 7, "0, 1 or all"),
        (AMO, "acks", "all", "a leader that steps down"),
        (AMO, "acks", "-1", "AtLeastOnce"),
        (ALO, "acks", 7, "0, 1 or all"),
        (ALO, "acks", 0, "AtMostOnce"),
        (EOS, "transactional.id", " ", "StatefulSet ordinal"),
        (ALO, "group.id", " \t\n", "group"),
        (ALO, "bootstrap.servers", " ", "host:port"),
        (ALO, "partition.assignment.strategy", " ,", "range, roundrobin or cooperative-sticky"),
        (ALO, "partition.assignment.strategy", "range, cooperative-sticky", "alone"),
        (EOS, "group.id", "größe", "printable ASCII"),
        (EOS, "group.id", "a\nb", "printable ASCII"),
        (EOS, "group.instance.id", "bestellungen-köln", "printable ASCII"),
        (EOS, "client.id", "bestellungen-köln", "printable ASCII"),
        (AMO, "client.id", "ö" * 51, "at most 100 bytes"),
        (ALO, "client.id", "x" * 99 + "ö", "at most 100 bytes"),
        (ALO, "acks", True, "0, 1 or all"),
        (ALO, "retries", 0, "delivery.timeout.ms"),
        (EOS, "retries", "0", "delivery.timeout.ms"),
        (ALO, "max.in.flight", 6, "1 to 5"),
        (EOS, "max.in.flight.requests.per.connection", "6", "1 to 5"),
        (AMO, "transactional.id", "a", "ExactlyOnce"),
        (ALO, "transactional.id", "a", "ExactlyOnce"),
        (EOS, "transactional.id", "", "StatefulSet ordinal"),
        (ALO, "group.id", "", "group"),
        (ALO, "bootstrap.servers", "", "host:port"),
        (ALO, "auto.offset.reset", "earliest", "start="),
        (ALO, "auto.commit.enable", True, "run()"),
        (ALO, "enable.gapless.guarantee", True, "experimental"),
        (ALO, "queuing.strategy", "LIFO", "order"),
        (ALO, "offset.store.method", "file", "group"),
        (ALO, "log.queue", "true", "logger"),
        (ALO, "enabled_events", 4, "delivery reports"),
        (EOS, "log_level", 5, "level 6"),
        (AMO, "metadata.recovery.rebootstrap.trigger.ms", 0, "hangs"),
        (ALO, "internal.termination.signal", 15, "stop()"),
        (ALO, "api.version.request", "false", "read_committed"),
        (EOS, "api.version.fallback.ms", 1, "read_committed"),
        (ALO, "group.protocol.type", "connect", "leave it out"),
        (ALO, "queue.buffering.backpressure.threshold", 2, "idempotent"),
        (EOS, "queue.buffering.backpressure.threshold", 2, "idempotent"),
        (ALO, "test.mock.num.brokers", 1, "LocalKafka"),
        (ALO, "ut_handle_ProduceResponse", "x", "LocalKafka"),
        (ALO, "ssl.endpoint.identification.algorithm", "", "give none"),
        (ALO, "max.poll.records", 100, "max_batch"),
        (ALO, "share.acknowledgement.mode", "explicit", "share groups"),
        (ALO, "client.id", None, "Is an environment variable missing"),
        (ALO, "client.id", b"x", "librdkafka takes no bytes. Instead: give a str"),
        (ALO, "client.id", "a\0b", "NUL"),
        (ALO, "client.id", "\ud800", "surrogate"),
        (ALO, "debug", ["eos"], "list"),
        (ALO, "linger.ms", "5ms", "a number"),
        (ALO, "linger.ms", math.nan, "a number"),
        (ALO, "linger.ms", -1, "0 to 900000"),
        (ALO, "retries", 2**32 + 5, "whole number"),
        (ALO, "retries", "4294967301", "whole number"),
        pytest.param(ALO, "retries", 10**5000, "whole number", id="a number that Python does not print"),
        (ALO, "retries", 1.5, "whole number"),
        (ALO, "check.crcs", "yes", "true or false"),
        (ALO, "isolation.level", "serializable", "read_committed"),
        (ALO, "compression.level", 100, "-1 to 12"),
        (ALO, "error_cb", 3, "a function"),
        (ALO, "logger", print, "logging.Logger"),
        (ALO, "partitioner", hash, "partition"),
        (ALO, "ssl_key", "x", "dict"),
        (ALO, "rebalance_cb", print, "rebalances"),
        (ALO, "default.topic.config", {"acks": 0}, "dict itself"),
    ],
)
def test_what_would_break_it_is_refused(guarantee: Guarantee, setting: str, value: object, says: str) -> None:
    """Each refusal names the setting as the user wrote it, and says what to do."""
    error = refused(guarantee, minimal(guarantee) | {setting: value})
    assert error.setting == setting
    assert says in str(error)


@pytest.mark.parametrize(
    ("guarantee", "config"),
    [
        (ALO, {"group.id": "größe", "client.id": "köln", "group.instance.id": "köln"}),
        (ALO, {"client.id": "ö" * 50}),
        (ALO, {"client.id": "x" * 200}),
        (EOS, {"client.id": "köln", "group.protocol": "consumer"}),
        (EOS, {"client.id": "köln", "group.id": None}),
    ],
)
def test_names_of_other_alphabets_are_fine_where_nothing_reads_them(guarantee: Guarantee, config: dict[str, Any]) -> None:
    """A classic member's id begins with client.id, and goes into a transaction; one of KIP-848 is a UUID."""
    assert resolved(guarantee, {n: v for n, v in (minimal(guarantee) | config).items() if v is not None})


def test_idempotence_needs_acks_all() -> None:
    """KIP-98: the contradiction is explained instead of librdkafka's late refusal."""
    assert "acks=all" in str(refused(ALO, minimal(ALO, acks=1, enable__idempotence=True)))


def test_more_in_flight_is_fine_without_idempotence() -> None:
    """P17: the limit of five is the idempotent producer's."""
    assert resolved(ALO, minimal(ALO, acks=1, max__in__flight=50)).producer["max.in.flight"] == 50


def test_what_is_librdkafkas_default_may_be_said() -> None:
    """Files of settings often list them all."""
    said = {
        "metadata.recovery.rebootstrap.trigger.ms": 300_000,
        "internal.termination.signal": 0,
        "api.version.request": True,
        "api.version.fallback.ms": 0,
        "group.protocol.type": "consumer",
        "queue.buffering.backpressure.threshold": 1,
    }
    assert resolved(ALO, minimal(ALO) | said)
    assert resolved(AMO, minimal(AMO, queue__buffering__backpressure__threshold=2))


def test_acks_1_switches_idempotence_off_and_says_so() -> None:
    """B01: one warning, and both consequences in the table."""
    with pytest.warns(DurabilityWarning, match="acks=1") as caught:
        result = resolve(ALO, minimal(ALO, acks="1"))
    assert len(caught) == 1
    assert result.producer["enable.idempotence"] == "false"
    explained = explain(ALO, minimal(ALO, acks="1"))
    assert row(explained, "acks").weaker
    assert "acks is not all" in row(explained, "enable.idempotence").why
    assert "! acks" in str(explained)


def test_at_most_once_with_acks_1_may_write_twice_and_says_so() -> None:
    """P06: with acks=all each leader that steps down may do that (reproduced), and librdkafka's retries=0 does not count it."""
    with pytest.warns(DurabilityWarning, match="may be there twice"):
        resolve(AMO, minimal(AMO, acks="1"))


def test_the_warning_points_at_the_users_line() -> None:
    """A constructor calls resolve(), and the warning is at the constructor's caller."""

    def constructor() -> Settings:
        return resolve(ALO, minimal(ALO, acks=1))

    with pytest.warns(DurabilityWarning) as caught:
        constructor()  # the line
    assert "constructor()  # the line" in Path(__file__).read_text().splitlines()[caught[0].lineno - 1]


@pytest.mark.parametrize(
    ("url", "weak"),
    [
        ("http://login.example.com/token", True),
        (" http://login.example.com/token", True),
        ("HTTP://127.example.com/token", True),
        ("https://login.example.com/token", False),
        ("http://localhost:8080/token", False),
        ("http://localhost", False),
        ("http://169.254.169.254/metadata/identity/oauth2/token", False),
        ("http://169.254.169.25/", True),
        ("http://localhost:pw@example.com/token", True),
        ("http://127.0.0.1:80@example.com/", True),
        ("http://[/token", True),
        ("http://127.0.0.1/token", False),
        ("http://[::1]:8080/token", False),
    ],
)
def test_a_secret_is_not_sent_readable_without_a_warning(url: str, weak: bool) -> None:  # noqa: FBT001
    """S02: unless the provider of tokens is on this host."""
    config = minimal(ALO) | {"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}
    assert bool(explain(ALO, config | {"sasl.oauthbearer.token.endpoint.url": url}).warnings) == weak


SASL = {"security.protocol": "SASL_SSL"}
TOKENS: dict[str, object] = {**SASL, "sasl.mechanism": "OAUTHBEARER"}


@pytest.mark.parametrize(
    "giver",
    [
        {"oauth_cb": print},
        {"sasl.oauthbearer.method": "OIDC"},
        {"enable.sasl.oauthbearer.unsecure.jwt": True},
        {"sasl.oauthbearer.metadata.authentication.type": "aws_iam"},
    ],
    ids=str,
)
def test_tokens_need_somebody_who_gives_them(giver: dict[str, object]) -> None:
    """S02: librdkafka waits for one for ever, and says nothing. A file that is explained has no functions in it."""
    spelled: dict[str, object] = {**SASL, "sasl.mechanisms": "OAUTHBEARER"}
    error = refused(ALO, minimal(ALO) | spelled)
    assert (error.setting, error.others) == ("sasl.mechanisms", ())
    for part in ("OAUTHBEARER", "nobody gives it tokens", "oauth_cb", "oidc"):
        assert part in str(error)
    assert explain(ALO, minimal(ALO) | spelled)
    assert resolved(ALO, minimal(ALO) | spelled | giver)
    assert resolved(ALO, minimal(ALO) | {"sasl.mechanism": "OAUTHBEARER"}), "a SecurityWarning: nobody logs in"


@pytest.mark.parametrize(
    "login", [{}, SASL, {"sasl.mechanism": "OAUTHBEARER"}, {**SASL, "sasl.mechanism": "PLAIN", "sasl.username": "u"}], ids=str
)
def test_an_oauth_cb_that_nobody_asks_is_refused(login: dict[str, object]) -> None:
    """confluent-kafka would wait for its first token for ten seconds, and then make no client."""
    config = minimal(ALO) | login | {"oauth_cb": print}
    for call in (resolved, explain):
        with pytest.raises(UnsafeConfigError, match=r"OAUTHBEARER.*set both, or leave it out") as caught:
            call(ALO, config)
        assert (caught.value.setting, caught.value.others) == ("oauth_cb", ())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"security.protocol": "sasl-ssl", "oauth_cb": print}, "security.protocol"),
        ({"oauth_cb": "print"}, "oauth_cb"),
        ({"sasl.oauthbearer.method": "odic"}, "sasl.oauthbearer.method"),
    ],
    ids=str,
)
def test_a_login_by_tokens_that_is_mistyped_is_one_mistake(wrong: dict[str, object], named: str) -> None:
    """What hangs on a setting that is refused is not known."""
    error = refused(ALO, minimal(ALO) | TOKENS | wrong)
    assert (error.setting, error.others) == (named, ())


@pytest.mark.parametrize("assigned", [{}, {"partition.assignment.strategy": "range"}, {"group.protocol": "consumer"}], ids=str)
def test_a_static_member_is_weaker_with_cooperative_sticky_alone(assigned: dict[str, object]) -> None:
    """C18: and with the other protocols it is what it is for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(ALO, minimal(ALO) | {"group.instance.id": "offers-0"} | assigned)


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "ssl", "SASL_PLAINTEXT", "SASL_SSL", None])
def test_credentials_that_are_not_used_are_a_warning(protocol: str | None) -> None:
    """S02: who gives them thinks that they protect something."""
    config = minimal(ALO) | ({} if protocol is None else {"security.protocol": protocol})
    tls = {"ssl.ca.location": "/etc/ssl/certs/ca-certificates.crt"}
    login = {"sasl.username": "u", "sasl.password": "p", "sasl.mechanism": "SCRAM-SHA-512"}
    key = {"ssl.certificate.location": "/etc/kafka/offers.pem", "ssl.key.location": "/etc/kafka/offers.key"}
    said = "".join(explain(ALO, config | login | tls | key).warnings)
    assert said.count("nobody logs in") == (protocol in (None, "PLAINTEXT", "ssl")), "once"
    assert said.count("has no TLS") == (protocol in (None, "PLAINTEXT", "SASL_PLAINTEXT")), "once"


WEAKER: dict[str, object] = {
    "acks": 1,
    "enable.idempotence": False,
    "isolation.level": "read_uncommitted",
    "allow.auto.create.topics": "True",
    "check.crcs": 0,
    "group.instance.id": "offers-0",
    "topic.metadata.refresh.interval.ms": -1,
    "enable.ssl.certificate.verification": False,
    "security.protocol": "SASL_PLAINTEXT",
    "ssl.endpoint.identification.algorithm": "none",
    "transaction.timeout.ms": 60_000,
    "sasl.username": "offers",
    "sasl.mechanism": "SCRAM-SHA-512",
    "ssl.ca.location": "/etc/ssl/certs/ca-certificates.crt",
    "ssl.ca.pem": "pem",
    "ssl.certificate.location": "/etc/kafka/offers.pem",
    "ssl.certificate.pem": "pem",
    "ssl.key.location": "/etc/kafka/offers.key",
    "ssl.key.pem": "pem",
    "ssl.keystore.location": "/etc/kafka/offers.p12",
    "sasl.oauthbearer.token.endpoint.url": "http://login/token",
    "enable.sasl.oauthbearer.unsecure.jwt": "true",
}


@pytest.mark.parametrize(
    ("guarantee", "weakening"),
    [(g, w) for w in WEAKENINGS for g in w.guarantees],
    ids=lambda x: getattr(x, "setting", None),
)
def test_a_weaker_setting_is_marked(guarantee: Guarantee, weakening: Any) -> None:
    """It is allowed, warned about if it costs durability or security, and marked in explain()."""
    config = minimal(guarantee) | {weakening.setting: WEAKER[weakening.setting]}
    if weakening.setting == "security.protocol":
        config |= {"sasl.mechanism": "PLAIN", "sasl.username": "offers", "sasl.password": "secret"}
    if weakening.setting == "group.instance.id":
        config |= {"partition.assignment.strategy": "cooperative-sticky"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resolve(guarantee, config)
    explained = explain(guarantee, config)
    assert [w.category for w in caught] == ([] if weakening.warning is None else [weakening.warning])
    assert row(explained, weakening.setting).weaker
    assert weakening.costs in explained.warnings[0]
    assert {str(w.message) for w in caught} <= set(explained.warnings)


def test_what_is_weaker() -> None:
    """DESIGN 3 S02: a weakening that is no longer marked shows here."""
    always = {
        "allow.auto.create.topics",
        "group.instance.id",
        "topic.metadata.refresh.interval.ms",
        "enable.ssl.certificate.verification",
        "security.protocol",
        "ssl.endpoint.identification.algorithm",
        "sasl.username",
        "sasl.mechanism",
        "ssl.ca.location",
        "ssl.ca.pem",
        "ssl.certificate.location",
        "ssl.certificate.pem",
        "ssl.key.location",
        "ssl.key.pem",
        "ssl.keystore.location",
        "sasl.oauthbearer.token.endpoint.url",
        "enable.sasl.oauthbearer.unsecure.jwt",
    }
    assert {g: {w.setting for w in WEAKENINGS if g in w.guarantees} for g in Guarantee} == {
        AMO: always | {"acks", "isolation.level"},
        ALO: always | {"acks", "enable.idempotence", "isolation.level", "check.crcs"},
        EOS: always | {"check.crcs", "transaction.timeout.ms"},
    }


@pytest.mark.parametrize(
    ("guarantee", "config", "options", "numbers"),
    [
        (ALO, {"linger.ms": 120_000}, {}, ("120000 ms", "linger.ms", "delivery.timeout.ms")),
        (AMO, {"linger.ms": 500, "message.timeout.ms": 400}, {}, ("500 ms", "400 ms")),
        (EOS, {"socket.timeout.ms": 14_901}, {}, ("14901 ms", "15000 ms", "100 ms")),
        (EOS, {"delivery.timeout.ms": 15_001}, {}, ("15001 ms", "15000 ms")),
        (EOS, {"message.timeout.ms": 0}, {}, ("no limit", "15000 ms")),
        (ALO, {"max.poll.interval.ms": 40_000}, {}, ("40000 ms", "45000 ms")),
        (EOS, {"transaction.timeout.ms": 300_000}, {}, ("300000 ms", "max.poll.interval.ms")),
        (AMO, {"heartbeat.interval.ms": 45_000}, {}, ("heartbeat.interval.ms (45000 ms) must be below", "session.timeout.ms")),
        (ALO, {"session.timeout.ms": 6_000, "heartbeat.interval.ms": 7_000}, {}, ("6000 ms", "7000 ms")),
        (EOS, {}, {"commit_interval": 15}, ("15", "15000 ms")),
        (EOS, {}, {"commit_interval": 0}, ("0", "15000 ms")),
        (EOS, {}, {"commit_interval": True}, ("commit_interval", "15000 ms")),
        (EOS, {}, {"commit_interval": "1"}, ("commit_interval", "15000 ms")),
        (EOS, {}, {"commit_interval": None}, ("commit_interval", "15000 ms")),
        (EOS, {}, {"commit_interval": 10**5000}, ("commit_interval", "15000 ms")),
        (EOS, {}, {"commit_interval": math.nan}, ("commit_interval", "15000 ms")),
    ],
)
def test_timeouts_must_fit_each_other(
    guarantee: Guarantee, config: dict[str, object], options: dict[str, object], numbers: tuple[str, ...]
) -> None:
    """P16 X17: what librdkafka accepts in silence is refused with both numbers."""
    error = refused(guarantee, minimal(guarantee) | config, **options)
    for number in numbers:
        assert number in str(error)
    assert error.setting in {*config, *options}


@pytest.mark.parametrize("timeout", [1_000, 5_000, 15_000, 60_000, 250_000])
def test_the_timeouts_follow_the_transaction(timeout: int) -> None:
    """P16: whatever transaction.timeout.ms is, the presets fit it; the consumer has its own socket timeout."""
    result = resolved(EOS, minimal(EOS, transaction__timeout__ms=timeout))
    assert result.producer["socket.timeout.ms"] == min(10_000, timeout - 100)
    assert result.producer["delivery.timeout.ms"] == min(120_000, timeout)
    assert result.consumer["socket.timeout.ms"] == 30_000
    assert result.transaction_timeout == timeout / 1000


def test_a_timeout_of_the_users_is_that_of_both_sides() -> None:
    """Also where they have presets of their own; and it is explained once."""
    given = minimal(EOS, socket__timeout__ms=9_000)
    result = resolved(EOS, given)
    assert result.producer["socket.timeout.ms"] == result.consumer["socket.timeout.ms"] == 9_000
    assert [r.side for r in explain(EOS, given).rows if r.setting == "socket.timeout.ms"] == ["both"]
    assert {r.side for r in explain(EOS, minimal(EOS)).rows if r.setting == "socket.timeout.ms"} == {"producer", "consumer"}


@pytest.mark.parametrize(
    "setting", ["session.timeout.ms", "heartbeat.interval.ms", "partition.assignment.strategy", "group.protocol.type"]
)
def test_kip_848_leaves_the_session_to_the_broker(setting: str) -> None:
    """C17: settings that the broker decides there are refused, and explained."""
    value = {"partition.assignment.strategy": "range", "group.protocol.type": "consumer"}.get(setting, 9_000)
    config = minimal(ALO, group__protocol="consumer")
    assert "KIP-848" in str(refused(ALO, config | {setting: value}))
    assert resolved(ALO, minimal(ALO) | {setting: value})
    settings = resolved(ALO, config)
    assert settings.session_timeout == 45.0
    assert setting not in {r.setting for r in explain(ALO, config)}
    assert resolved(ALO, config | {"max.poll.interval.ms": 40_000}).max_poll_interval == 40.0


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bootstrap.server", "did you mean 'bootstrap.servers'?"),
        ("bootstrap_servers", "did you mean 'bootstrap.servers'?"),
        ("group_id", "did you mean 'group.id'?"),
        ("session.timout.ms", "did you mean 'session.timeout.ms'?"),
        ("key.serializer", "to the constructor, as key_serializer"),
        ("value_serializer", "argument of the constructor"),
        ("zzz", "CONFIGURATION.md"),
    ],
)
def test_a_name_that_nobody_knows_is_refused_with_the_nearest(name: str, says: str) -> None:
    """A typing mistake must not be silence; its value may be a secret and is hidden."""
    error = refused(ALO, minimal(ALO) | {name: MARKER})
    assert (error.setting, error.value) == (name, HIDDEN)
    assert says in str(error)
    assert MARKER not in str(error)


def test_a_question_ends_with_its_mark() -> None:
    """As any sentence does."""
    assert str(refused(ALO, minimal(ALO) | {"group_id": "g"})).endswith("did you mean 'group.id'?")


def test_without_a_mechanism_for_sasl_it_is_asked_for_by_name() -> None:
    """Librdkafka's default is GSSAPI, which it was not built with. The name of a logger is no secret, and hides no words."""
    failure = KafkaException("No provider for SASL mechanism GSSAPI: recompile librdkafka with libsasl2")
    error = librdkafka.creation_failure(failure, {"security.protocol": "SASL_SSL", "logger": logging.getLogger("a.librdkafka")})
    assert error.setting == "sasl.mechanism"
    assert "recompile librdkafka with libsasl2" in str(error)
    assert "SCRAM-SHA-512" in str(error)


def test_java_names_point_at_names_that_exist() -> None:
    """The advice "use x" is worth something only if x is a property."""
    for name, advice in FOREIGN_NAMES.items():
        assert name not in PROPERTIES
        used = re.match(r"use ([a-z._]+\.[a-z._]+)", advice)
        assert not used or used[1] in PROPERTIES


@pytest.mark.parametrize("name", [*OWN_ARGUMENTS, *OWN_CALLBACKS])
def test_what_is_ours_is_refused_in_the_dict(name: str) -> None:
    """Arguments and callbacks of the library have their own place, and the error says which."""
    error = refused(ALO, minimal(ALO) | {name: print})
    assert error.setting == name
    assert name not in OWN_ARGUMENTS or "argument" in str(error)


def test_every_argument_has_its_place() -> None:
    """An argument of a class or of its runs that is given in the dict is not called unknown."""
    calls = [call for kind in (AtMostOnce, AtLeastOnce, ExactlyOnce) for call in (kind, kind.run, kind.run_batches)]
    names = {name for call in calls for name in inspect.signature(call).parameters}
    assert set(OWN_ARGUMENTS) == names - {"self", "config", "topics", "handler"}


def test_what_providers_of_brokers_hand_out_is_taken() -> None:
    """Templates of old have the fallback of a version, which counts only without the request that asks for it."""
    template = {"api.version.request": "true", "broker.version.fallback": "0.10.0.0", "api.version.fallback.ms": "0"}
    assert resolve(ALO, minimal(ALO) | template).producer["broker.version.fallback"] == "0.10.0.0"


def test_a_plugin_that_cannot_be_loaded_is_named() -> None:
    """And not the first other setting."""
    error = refused(ALO, minimal(ALO) | {"plugin.library.paths": "no-such-plugin"})
    assert error.setting == "plugin.library.paths"


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_two_names_are_one_setting(alias: str, name: str) -> None:
    """Giving the alias is giving the setting; two values for the two names are refused."""
    first, second = {"enable.auto.commit": ("false", "true")}.get(name, ("0", "1"))
    if name == "compression.type":
        first, second = "gzip", "lz4"
    if name in {"retries", "acks", "delivery.timeout.ms", "max.in.flight", "max.partition.fetch.bytes"}:
        first, second = ("1", "2") if name != "acks" else ("all", "1")
    config = minimal(ALO, linger__ms=0, max__in__flight=3)
    config.pop(name, None)
    one = resolved(ALO, config | {alias: first})
    assert str({**one.consumer, **one.producer}[name]) == first
    assert alias not in {**one.consumer, **one.producer}
    assert resolved(ALO, config | {alias: first, name: first})
    assert "one setting" in str(refused(ALO, config | {alias: first, name: second}))


@pytest.mark.parametrize(
    ("name", "spellings", "wanted"),
    [
        ("acks", ["all", "ALL", "-1", -1, -1.0], "all"),
        ("check.crcs", [True, "True", "true", "t", 1, "1"], "true"),
        ("linger.ms", [7, "7", 7.0, "7.0"], 7),
        ("linger.ms", [0.5, "0.5"], 0.5),
        ("retries", [3, "3", 3.0], 3),
        ("security.protocol", ["SASL_SSL", "sasl_ssl"], "sasl_ssl"),
        ("client.id", [5, "5"], "5"),
        ("client.id", [Guarantee.AT_LEAST_ONCE], "at-least-once"),
        ("group.id", ["offers", " offers", "offers\n", "\toffers "], "offers"),
        ("group.id", ["\xa0offers"], "\xa0offers"),
        ("sasl.mechanism", [" PLAIN", "PLAIN "], "PLAIN"),
        ("sasl.password", [" swordfish "], " swordfish "),
        ("ssl.key.pem", ["\npem\n"], "\npem\n"),
        (
            "partition.assignment.strategy",
            ["range,roundrobin", " range , roundrobin,", ",range,range,roundrobin"],
            "range,roundrobin",
        ),
        (
            "partition.assignment.strategy",
            [" cooperative-sticky,", "cooperative-sticky,cooperative-sticky"],
            "cooperative-sticky",
        ),
    ],
)
def test_spellings_of_one_value_are_equal(name: str, spellings: list[object], wanted: object) -> None:
    """The ways in which people write a value arrive as the one that librdkafka reads."""
    for value in spellings:
        both = resolved(ALO, minimal(ALO) | {name: value})
        assert {**both.consumer, **both.producer}[name] == wanted


def test_white_space_hides_nothing_from_the_tables() -> None:
    """S02: librdkafka drops it at the start, and then logs in with PLAIN all the same."""
    login = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": " PLAIN", "sasl.username": "u", "sasl.password": "p"}
    assert "readable" in "".join(explain(ALO, minimal(ALO) | login).warnings)


def test_librdkafka_mixes_no_strategies() -> None:
    """Once it does, the refusal can go."""
    with pytest.raises(KafkaException, match="must have the same protocol type"):
        Consumer({"group.id": "offers", "partition.assignment.strategy": "range,cooperative-sticky"})


def test_a_property_goes_to_the_side_that_reads_it() -> None:
    """One dict serves both sides; librdkafka would warn about the other side's properties."""
    result = resolved(ALO, minimal(ALO, linger__ms=7, fetch__min__bytes=2, client__id="c"))
    assert ("linger.ms" in result.producer, "linger.ms" in result.consumer) == (True, False)
    assert ("fetch.min.bytes" in result.producer, "fetch.min.bytes" in result.consumer) == (False, True)
    assert result.producer["client.id"] == result.consumer["client.id"] == "c"
    assert "group.id" not in result.producer


def test_a_property_that_only_librdkafka_knows_goes_to_both() -> None:
    """A newer librdkafka may know more than the table (client.software.name is one that it does not print)."""
    result = resolved(ALO, minimal(ALO, client__software__name="x"))
    assert result.producer["client.software.name"] == result.consumer["client.software.name"] == "x"
    assert row(explain(ALO, minimal(ALO, client__software__name="x")), "client.software.name").value == HIDDEN


def test_asking_librdkafka_makes_no_token() -> None:
    """S01: confluent-kafka fetches an AWS token while it reads a dict with this marker: a check must not."""
    marker = {"sasl.oauthbearer.metadata.authentication.type": "aws_iam"}
    assert resolved(ALO, minimal(ALO) | marker).producer.items() >= marker.items()


def bundled_librdkafka() -> Path | None:
    folder = Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs"
    return next(iter(folder.glob("librdkafka-*.so*")), None)


@pytest.mark.skipif(bundled_librdkafka() is None, reason="this confluent-kafka does not bundle a shared librdkafka")
def test_the_table_is_librdkafkas_own(tmp_path: Path) -> None:
    """Drift: every property, side, kind, default and value is what the installed library prints about itself."""
    printed = tmp_path / "properties.md"
    library, libc = ctypes.CDLL(str(bundled_librdkafka())), ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    libc.fclose.argtypes = library.rd_kafka_conf_properties_show.argtypes = [ctypes.c_void_p]
    stream = libc.fopen(str(printed).encode(), b"w")
    library.rd_kafka_conf_properties_show(stream)
    libc.fclose(stream)
    line = re.compile(
        r"^([a-z][a-z0-9._]*) *\| *([PC*]) *\|(.*?)\|(.*?)\| *(?:low|medium|high) *\|(.*?)<br>\*Type: (.*?)\*$",
        re.MULTILINE,
    )
    kinds = {"see dedicated API": CALLBACK, "enum value": ENUM, "CSV flags": FLAGS, "pattern list": STRING}
    seen: set[str] = set()
    aliases: dict[str, str] = {}
    for name, side, choices, default, text, kind in line.findall(printed.read_text()):
        alias = re.search(r"Alias for `([^`]*)`", text)
        if alias:
            aliases[alias[1]] = name
        if name in seen or name in ALIASES or name == "builtin.features":
            continue
        seen.add(name)
        ours = PROPERTIES[name]
        assert ours.side == {"P": "producer", "C": "consumer", "*": "both"}[side], name
        assert ours.kind == kinds.get(kind, kind), name
        assert ours.kind == STRING or ours.default == default.strip(), name
        assert ours.kind not in {ENUM, FLAGS} or ours.values == tuple(v.strip() for v in choices.split(",")), name
    assert seen == set(PROPERTIES) - {"builtin.features"}
    assert aliases == ALIASES


# --- secrets ---------------------------------------------------------------------------------------------------------


def outputs(call: Callable[[], object]) -> Iterator[str]:
    """Everything that a person, a log or a tracker could see of a call's result, error and warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except UnsafeConfigError as error:
            yield "".join(traceback.format_exception(error))
            yield repr((error, error.args, error.setting, error.value, error.__cause__, error.__context__))
            yield repr(pickle.loads(pickle.dumps(error)))
        else:
            yield repr(result)
            yield str(result)
            if isinstance(result, Explanation):
                yield json.dumps(result.as_dict())
                yield repr(list(result))
    yield from (str(w.message) for w in caught)


TAKES_SECRETS = sorted(
    name
    for name in (*PROPERTIES, *ALIASES)
    if (known := PROPERTIES[canonical(name)]).kind == CALLBACK
    or (known.kind == STRING and not known.values and canonical(name) not in SHOWN | PATHS)
)


@pytest.mark.parametrize("guarantee", Guarantee)
def test_no_output_has_a_secret(guarantee: Guarantee) -> None:
    """S01: a secret in any property, alias or mistyped name is in no text that leaves the library."""
    names = [*TAKES_SECRETS, "sasl.pasword", "sasl_plain_password", *FOREIGN_NAMES, *OWN_ARGUMENTS, *OWN_CALLBACKS]
    for name in names:
        for value in (MARKER, f"x,{MARKER}", [MARKER], MARKER.encode(), f"{MARKER}\0", f"{MARKER}\ud800"):
            config = minimal(guarantee) | {name: value}
            for call in (resolve, explain):
                for text in outputs(lambda call=call, config=config: call(guarantee, config)):  # type: ignore[misc]
                    assert MARKER not in text, name


@pytest.mark.parametrize("name", sorted(set(PROPERTIES) - set(TAKES_SECRETS)))
def test_what_may_be_a_key_is_hidden_in_any_setting(name: str) -> None:
    """S01: a setting that has no secret may be given one by mistake: what is as long as one, or looks like one."""
    for secret in (
        f"{MARKER * 3} {'x' * 10_000}",
        f"-----BEGIN PRIVATE KEY-----{MARKER}",
        f"u:{MARKER}@h",
        f"{MARKER}\n",
        [MARKER],
    ):
        assert shown(name, secret) == HIDDEN


@pytest.mark.parametrize("secret", [MARKER, f"5{MARKER}", f"{MARKER}.pem2", "12345", "hunter2"])
@pytest.mark.parametrize(
    "name", sorted(name for name in PROPERTIES if re.match("s?asl|ssl|security|https|plugin|enable.s", name))
)
def test_a_secret_in_the_wrong_line_is_hidden(name: str, secret: str) -> None:
    """S01: where a file has the settings of a login, the password may stand one line too high or too low."""
    assert shown(name, secret) == HIDDEN or (PROPERTIES[name].kind == INTEGER and secret == "12345")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("linger.ms", "5ms", "linger.ms='5ms' is refused"),
        ("queue.buffering.max.ms", "5 # a comment", "queue.buffering.max.ms='5 # a comment' is refused"),
        ("linger.ms", 10**13, "linger.ms=10000000000000 is refused"),
        ("linger.ms", math.nan, "linger.ms=nan is refused"),
        ("enable.idempotence", "yes", "enable.idempotence='yes' is refused"),
        ("acks", "some", "acks='some' is refused"),
        ("debug", "broker,brokers", "debug='broker,brokers' is refused"),
        ("security.protocol", "sasl-ssl", "security.protocol='sasl-ssl' is refused"),
        ("enable.ssl.certificate.verification", "flase", "enable.ssl.certificate.verification='flase' is refused"),
        ("sasl.kerberos.min.time.before.relogin", "60s", "sasl.kerberos.min.time.before.relogin='60s' is refused"),
    ],
)
def test_a_value_that_is_mistyped_is_named(name: str, value: object, says: str) -> None:
    """Of a setting that has no secret: who reads the error need not go and look what was given."""
    assert says in str(refused(ALO, minimal(ALO) | {name: value}))


def test_no_name_that_sounds_like_a_secret_is_shown() -> None:
    """S01: whatever a librdkafka to come calls its secrets."""
    sounds = re.compile("pass|secret|key|token|jaas|user|principal|credential|assertion|config|pem|cmd|url|extension")
    assert not [name for name in SHOWN | PATHS if sounds.search(name)]


def test_what_is_no_secret_is_explained() -> None:
    """S01: certificates, and what has to do with topics; but neither a key, nor where one is, nor who logs in."""
    plain = {"ssl.ca.location": "/etc/ca.pem", "ssl.crl.location": "crl.pem", "client.rack": "^a"}
    secret = {"ssl.key.location": "/etc/key.pem", "sasl.username": "me", "sasl.kerberos.principal": "me", "ssl.key.pem": "key"}
    explained = explain(ALO, minimal(ALO) | plain | secret | {"security.protocol": "sasl_ssl"})
    assert {r.setting: r.value for r in explained if r.setting in plain} == plain
    assert {r.value for r in explained if r.setting in secret} == {HIDDEN}


@pytest.mark.parametrize("name", ["sasl.password", "ssl.key.pem", "sasl.oauthbearer.client.secret", "ssl.key.password"])
def test_a_secret_reaches_the_clients_and_nobody_else(name: str) -> None:
    """S02: hidden does not mean dropped."""
    config = minimal(ALO) | {name: MARKER}
    result = resolved(ALO, config)
    assert MARKER in result.producer.values()
    assert MARKER in result.consumer.values()
    assert HIDDEN in {r.value for r in explain(ALO, config) if r.set_by == "you"}


def test_a_secret_in_a_place_that_is_shown_is_hidden() -> None:
    """S01: a name with a password in it, and text that would break a table or a log line (S09)."""
    texts = outputs(lambda: explain(ALO, {"bootstrap.servers": f"u:{MARKER}@h:1", "client.id": f"{MARKER}\n"}))
    assert not [text for text in texts if MARKER in text]
    assert MARKER not in str(refused(ALO, minimal(ALO) | {f"sasl.password={MARKER}": ""}))


@pytest.mark.parametrize(
    "config",
    [
        {"sasl.mechanism": MARKER, "security.protocol": "sasl_ssl"},
        {"ssl.key.location": f"/nowhere/{MARKER}", "security.protocol": "ssl"},
        {"ssl.key.pem": MARKER, "security.protocol": "ssl"},
        {"ssl.keystore.location": f"/{MARKER}", "ssl.keystore.password": MARKER, "security.protocol": "ssl"},
        {"ssl.ca.location": MARKER, "security.protocol": "ssl"},
        {"ssl.cipher.suites": MARKER, "security.protocol": "ssl"},
    ],
)
def test_a_constructor_that_fails_is_told_without_the_value(config: dict[str, object]) -> None:
    """S01: librdkafka echoes values when it makes a client; what is raised instead does not, and names the setting."""
    full = {**resolved(ALO, minimal(ALO) | config).producer, "error_cb": lambda _error: None, "log_level": 0}
    with pytest.raises(KafkaException) as caught:
        Producer(full)
    error = librdkafka.creation_failure(caught.value, full)
    assert MARKER not in str(error)
    assert "librdkafka cannot make a client" in str(error)


def test_a_file_that_is_not_there_is_named() -> None:
    """What is no secret is in the error that a client cannot be made."""
    full = resolved(ALO, minimal(ALO) | {"ssl.ca.location": "/nowhere/ca.pem", "security.protocol": "ssl"}).producer
    with pytest.raises(KafkaException) as caught:
        Producer({**full, "error_cb": lambda _error: None, "log_level": 0})
    assert "ssl.ca.location='/nowhere/ca.pem' is refused" in str(librdkafka.creation_failure(caught.value, full))


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", Guarantee)
def test_the_results_make_real_clients(guarantee: Guarantee) -> None:
    """Every preset is accepted by librdkafka and confluent-kafka: nothing is left for a late refusal."""
    result = resolved(guarantee, minimal(guarantee))
    producer = Producer({**result.producer, "error_cb": lambda _error: None, "logger": logging.getLogger("quiet")})
    consumer = Consumer({**result.consumer, "error_cb": lambda _error: None, "logger": logging.getLogger("quiet")})
    consumer.close()
    producer.close()


def test_the_users_dict_is_left_alone() -> None:
    """Y13: it is copied; later changes to it and to a result change nothing else."""
    config = minimal(EOS, message__send__max__retries="3", error_cb=print)
    before = copy.copy(config)
    first = resolved(EOS, config)
    assert config == before
    assert isinstance(first.producer, dict)
    first.producer["acks"] = 0
    config["retries"] = 5
    assert resolved(EOS, before).producer["acks"] == "all"
    assert first.producer["retries"] == 3


def test_callbacks_are_taken_out_except_oauth() -> None:
    """The library calls the user's callbacks from its own (C01); librdkafka must ask for tokens itself."""
    given_ = {"error_cb": print, "stats_cb": print, "throttle_cb": print, "oauth_cb": print}
    logger = logging.getLogger("x")
    result = resolved(ALO, minimal(ALO) | TOKENS | given_ | {"logger": logger})
    assert result.callbacks == {**given_, "logger": logger}
    for side in (result.producer, result.consumer):
        assert side["oauth_cb"] is print
        assert not {"error_cb", "stats_cb", "throttle_cb", "logger"} & set(side)


def test_the_times_are_effective_seconds() -> None:
    """Presets, overrides and librdkafka's defaults, in one unit."""
    eos = resolved(EOS, minimal(EOS))
    assert (eos.max_poll_interval, eos.session_timeout) == (300.0, 45.0)
    assert (eos.delivery_timeout, eos.transaction_timeout) == (15.0, 15.0)
    assert (eos.group_id, eos.transactional_id) == ("offers", "offers-0")
    alo = resolved(ALO, {"bootstrap.servers": BROKER, "message.timeout.ms": 0, "session.timeout.ms": "6000"})
    assert (alo.delivery_timeout, alo.transaction_timeout, alo.session_timeout) == (math.inf, 0.0, 6.0)
    assert (alo.group_id, alo.transactional_id) == (None, None)
    assert resolved(AMO, minimal(AMO)).delivery_timeout == 300.0


@pytest.mark.parametrize("guarantee", Guarantee)
@pytest.mark.parametrize("missing", ["bootstrap.servers", "transactional.id"])
def test_explain_needs_no_ids(guarantee: Guarantee, missing: str) -> None:
    """What a client cannot do without is asked for by resolve(), not by explain()."""
    config = minimal(guarantee)
    if config.pop(missing, None) is None:
        return
    assert missing in str(refused(guarantee, config))
    assert explain(guarantee, config)
    assert explain(guarantee)


def test_the_error_about_the_transactional_id_explains_the_choice() -> None:
    """X14: stable per instance, unique among instances, not random, not the pid."""
    text = str(refused(EOS, {"bootstrap.servers": BROKER}))
    for word in ("stable", "unique", "<service>-<StatefulSet ordinal>", "random", "process id"):
        assert word in text


@pytest.mark.parametrize("config", [None, 3, "acks=all", [("acks", "all")]])
def test_a_config_is_a_mapping(config: Any) -> None:
    """Anything else is a programming error."""
    with pytest.raises(TypeError, match="config is a dict"):
        resolve(ALO, config)


def test_a_name_is_a_str() -> None:
    """confluent-kafka would turn it into one."""
    assert "int" in str(refused(ALO, {3: "x"}))  # type: ignore[dict-item]  # the mistake under test


# --- explain() -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", Guarantee)
def test_the_table_is_readable(guarantee: Guarantee) -> None:
    """At most 120 columns, the promise above, every setting, what is not promised below."""
    explanation = explain(guarantee, {"ssl.ca.location": "x", "bootstrap.servers": ",".join(["host:9092"] * 30)})
    text = str(explanation)
    assert max(map(len, text.splitlines())) <= 120
    assert PROMISES[guarantee] in text.splitlines()[0]
    assert all(entry.setting in text for entry in explanation)
    flat = " ".join(text.split())
    assert all(sentence in flat for sentence in NOT_PROMISED[guarantee])


@pytest.mark.parametrize(("guarantee", "start"), [(AMO, "latest"), (ALO, "earliest"), (EOS, "earliest")])
def test_the_start_is_explained(guarantee: Guarantee, start: str) -> None:
    """C11 M05: at-most-once begins with what comes; the others miss nothing."""
    assert row(explain(guarantee), "start").value == start


def test_the_explanation_is_data() -> None:
    """as_dict() goes through JSON and has what the table has."""
    explanation = explain(ALO, {"acks": 1, "linger.ms": 9})
    data = json.loads(json.dumps(explanation.as_dict()))
    assert data["guarantee"] == "at-least-once"
    assert len(data["settings"]) == len(explanation)
    assert data["warnings"] == list(explanation.warnings)
    assert {r["set_by"] for r in data["settings"]} == {"guarantee (locked)", "guarantee", "you", "librdkafka"}
    assert {r["side"] for r in data["settings"]} == {"producer", "consumer", "both"}


@pytest.mark.parametrize("guarantee", Guarantee)
def test_no_setting_is_explained_twice_for_one_side(guarantee: Guarantee) -> None:
    """A reader finds one answer for each side."""
    rows = [(r.setting, side) for r in explain(guarantee) for side in ({r.side} - {"both"} or {"producer", "consumer"})]
    assert len(rows) == len(set(rows))


# --- anything --------------------------------------------------------------------------------------------------------

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.binary(max_size=4),
    st.sampled_from(["true", "all", "none", "0", "-1", "1e9", "read_committed", "5", "consumer", ""]),
    st.lists(st.integers(), max_size=2),
    st.just(print),
)
NAMES = st.one_of(
    # a plugin is loaded from the disk by its name: not a thing to try at random
    st.sampled_from(sorted((set(PROPERTIES) | set(ALIASES) | set(FOREIGN_NAMES)) - {"plugin.library.paths"})),
    st.text(max_size=20),
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(Guarantee), st.dictionaries(NAMES, JUNK, max_size=6), st.just(0.1) | st.floats() | st.integers())
def test_junk_is_refused_or_taken_and_nothing_else(
    guarantee: Guarantee, config: dict[str, object], commit_interval: float
) -> None:
    """Whatever the dict holds, the answer is settings or an UnsafeConfigError."""
    with contextlib.suppress(UnsafeConfigError):
        resolved(guarantee, minimal(guarantee) | config, commit_interval=commit_interval)


@pytest.mark.parametrize(("session", "heartbeat"), [(45_000, 3_000), (6_000, 2_000), (1_000, 333), (2, 1)])
def test_three_heartbeats_fit_into_a_session(session: int, heartbeat: int) -> None:
    """A short session brings a short heartbeat: with librdkafka's 3 s, a session of 3 s would end all the time."""
    given = {"session.timeout.ms": session, "max.poll.interval.ms": 45_000}
    assert resolved(ALO, minimal(ALO) | given).consumer["heartbeat.interval.ms"] == heartbeat


def test_heartbeats_are_the_brokers_under_kip_848() -> None:
    """C17: with group.protocol=consumer the setting would be refused by librdkafka, so it is not made."""
    assert "heartbeat.interval.ms" not in resolved(ALO, minimal(ALO, group__protocol="consumer")).consumer
