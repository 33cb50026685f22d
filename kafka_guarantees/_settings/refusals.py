"""What each guarantee refuses, and what it allows but calls weaker: tables of data. ``merge.py`` walks them.

Rules. LOCKED presets are refused by their own row in ``presets.py``; here is what is left. Only what the user gave is
looked at, in the one spelling of ``values.normalise``. ``see`` names the hazard or KIP behind a row. ``breaks`` and
``instead`` complete the sentence "x=y is refused: BREAKS. Instead: INSTEAD."
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ..errors import DurabilityWarning, SecurityWarning
from .presets import ACKED, ALL, ALO, AMO, EOS, MAX_IN_FLIGHT, SOCKET_MARGIN_MS

if TYPE_CHECKING:
    from collections.abc import Callable

    from .presets import Guarantee, Known
    from .values import Value


@dataclass(frozen=True)
class Refusal:
    """One row: the user's value is refused when ``when(value, effective settings)``."""

    guarantees: tuple[Guarantee, ...]
    setting: str
    when: Callable[[Value, Known], bool]
    breaks: str
    instead: str
    see: str


@dataclass(frozen=True)
class Weakening:
    """One row: the user's value is allowed but marked, and said as a ``warning`` of this class where there is one."""

    guarantees: tuple[Guarantee, ...]
    setting: str
    when: Callable[[Value, Known], bool]
    costs: str
    see: str
    warning: type[UserWarning] | None = DurabilityWarning


@dataclass(frozen=True)
class Order:
    """One row: ``shorter + margin`` must be below ``longer``, or at most equal to it where ``equal``; milliseconds."""

    guarantees: tuple[Guarantee, ...]
    shorter: str
    longer: str
    margin: int
    equal: bool
    breaks: str
    see: str


def milliseconds(effective: Known, name: str) -> float:
    """The setting as a number; 0 means no limit for ``delivery.timeout.ms``."""
    value = float(effective[name])
    return float("inf") if name == "delivery.timeout.ms" and value == 0 else value


def _readable(url: str) -> bool:
    """Whether what is sent there can be read on the way: not what stays on this host, or goes to its cloud's own service."""
    try:
        where = urlsplit(url.strip())
    except ValueError:
        return True
    ours = where.hostname in ("localhost", "::1") or bool(_LOCAL.fullmatch(where.hostname or ""))
    return where.scheme == "http" and not ours


_LOCAL = re.compile(r"127(\.[0-9]+){3}|169\.254\.169\.254")
_ADDRESS = re.compile(
    r"((plaintext|ssl|sasl_plaintext|sasl_ssl)://)?(\[[^\]/;]+\]|[^][:/;\s]+)(:(?P<port>[0-9]+))?", re.IGNORECASE
)
_PORTS = range(1, 65536)
NAME_BYTES = 100  # of client.id: what librdkafka adds, as "#producer-12", goes behind it
_PRINTABLE = re.compile("[ -~]*")
_OLD_REQUESTS = "requests as of old brokers: those do not know read_committed, nor idempotence, nor the times of records"
_NO_OFFSETS = "librdkafka takes no offsets into a transaction with it: each would abort, and its messages come again, for ever"


def _no_addresses(value: Value, _effective: Known) -> bool:
    """Whether one of them is none: librdkafka drops it with a line in its log, or takes another port."""
    found = [_ADDRESS.fullmatch(address.strip()) for address in str(value).split(",") if address.strip()]
    return not found or not all(one and int(one["port"] or 9092) in _PORTS for one in found)


def _unused(names: tuple[str, ...], protocols: tuple[str, ...], costs: str) -> list[Weakening]:
    """For what is given and not used with these protocols, which is said of the first of them alone."""

    def unused(before: tuple[str, ...]) -> Callable[[Value, Known], bool]:
        return lambda _value, given: given["security.protocol"] in protocols and given.keys().isdisjoint(before)

    return [Weakening(ALL, name, unused(names[:number]), costs, "S02", SecurityWarning) for number, name in enumerate(names)]


def _always(_value: Value, _effective: Known) -> bool:
    return True


def _is(*values: Value) -> Callable[[Value, Known], bool]:
    return lambda value, _effective: value in values


def _not_taken(value: Value, effective: Known) -> bool:
    """Whether librdkafka's producer would not take the group's metadata with this in it: see rdkafka_cgrp.c."""
    return "group.id" in effective and not _PRINTABLE.fullmatch(str(value))


def _is_not(*values: Value) -> Callable[[Value, Known], bool]:
    return lambda value, _effective: value not in values


REFUSALS = (
    Refusal(ALL, "bootstrap.servers", _is(""), "there is no broker to connect to", "give host:port, comma-separated", "-"),
    Refusal(
        ALL,
        "bootstrap.servers",
        _no_addresses,
        "that is no list of addresses: librdkafka leaves out what it cannot read, and the client would wait for ever",
        "give host:port, comma-separated, without http:// or the like",
        "-",
    ),
    Refusal(
        ALL,
        "group.id",
        _is(""),
        "committed offsets belong to a group with a name (and confluent-kafka aborts the process without one)",
        "give a name that all instances of this service share, or leave it out to produce only",
        "C11",
    ),
    Refusal(
        AMO + ALO,
        "transactional.id",
        _always,
        "this guarantee uses no transactions: the setting would promise something that is not done",
        "use ExactlyOnce, or leave it out",
        "X14",
    ),
    Refusal(
        EOS,
        "transactional.id",
        _is(""),
        "an empty id means no transactions to librdkafka",
        'give one that is stable per instance and unique among instances, e.g. "<service>-<StatefulSet ordinal>"',
        "X14",
    ),
    Refusal(EOS, "group.id", _not_taken, _NO_OFFSETS, "give a name of printable ASCII", "rdkafka_cgrp.c"),
    Refusal(EOS, "group.instance.id", _not_taken, _NO_OFFSETS, "give a name of printable ASCII", "rdkafka_cgrp.c"),
    Refusal(
        EOS,
        "client.id",  # which the id of a member begins with; with KIP-848 that is a UUID
        lambda value, effective: effective["group.protocol"] == "classic" and _not_taken(value, effective),
        _NO_OFFSETS,
        "give a name of printable ASCII",
        "rdkafka_cgrp.c",
    ),
    Refusal(
        ALL,
        "client.id",  # rk_name has 128 bytes (rdkafka_int.h:415); where that is no UTF-8, stats_cb() drops a NULL
        lambda value, _effective: not str(value).isascii() and len(str(value).encode()) > NAME_BYTES,
        "librdkafka cuts the client's name, perhaps inside of a character, and confluent-kafka then ends the process",
        f"give a name of ASCII, or one of at most {NAME_BYTES} bytes in UTF-8",
        "confluent_kafka.c:2516",
    ),
    Refusal(
        ALL,
        "partition.assignment.strategy",
        _is(""),
        "without one no consumer can be made",
        "leave it out, or give range, roundrobin or cooperative-sticky",
        "-",
    ),
    Refusal(
        ALL,
        "partition.assignment.strategy",
        lambda value, _effective: "," in str(value) and "cooperative-sticky" in str(value).split(","),
        "librdkafka takes cooperative-sticky alone or not at all: groups cannot go over to it while they run",
        "give cooperative-sticky alone, and start all members anew; or leave it out",
        "rdkafka_assignor.c",
    ),
    Refusal(
        AMO,
        "acks",
        _is("all"),
        "a leader that steps down before all replicas have a record answers that it is not the leader; librdkafka takes that"
        " for not written and sends the record to the next leader, with retries=0 too: it is there twice",
        "leave it out, or use AtLeastOnce: its producer is idempotent",
        "P06",
    ),
    Refusal(
        ALO,
        "acks",
        _is(0),
        "nothing is acknowledged, so nothing can be sent again: records would be lost without a word",
        "leave it out, or use AtMostOnce",
        "P07",
    ),
    Refusal(
        ALO,
        "enable.idempotence",
        lambda value, effective: value == "true" and effective["acks"] != "all",
        "idempotence needs acks=all",
        "leave acks out, or leave enable.idempotence out",
        "KIP-98",
    ),
    Refusal(
        ACKED,
        "retries",
        _is(0),
        "the first hiccup of a broker would fail the record",
        "leave it out; delivery.timeout.ms bounds the attempts",
        "P05",
    ),
    Refusal(
        ACKED,
        "max.in.flight",
        lambda value, effective: effective["enable.idempotence"] == "true" and float(value) > MAX_IN_FLIGHT,
        "brokers remember five batches per idempotent producer: records could change order or be refused",
        "give 1 to 5",
        "P17",
    ),
    Refusal(
        EOS,
        "log_level",
        lambda value, _effective: float(value) < 6,  # noqa: PLR2004 - LOG_INFO of syslog(3)
        "the library reads the lines about closed connections (level 6) to know when the producer must be re-created",
        "leave it out; filter lines in your logger",
        "X01",
    ),
    Refusal(
        ALL,
        "log.queue",
        _is("true"),
        "nobody would serve that queue: librdkafka's log lines would be lost",
        "leave it out; give a logger",
        "X01",
    ),
    Refusal(
        ALL,
        "enabled_events",
        _is_not(0),
        "events would take the place of the delivery reports and errors that the library waits for",
        "leave it out",
        "P01",
    ),
    Refusal(
        ALL,
        "enable.gapless.guarantee",
        _is("true"),
        "it is experimental, does not cover timeouts and makes the producer useless after one lost record",
        "leave it out",
        "P21",
    ),
    Refusal(ALL, "queuing.strategy", _is("lifo"), "records would be sent in the wrong order", "leave it out", "P21"),
    Refusal(
        ALL,
        "offset.store.method",
        _is_not("broker"),
        "offsets would not be in the group, where other members and the transaction look for them",
        "leave it out",
        "P03",
    ),
    Refusal(
        ALL,
        "metadata.recovery.rebootstrap.trigger.ms",
        _is(0),
        "librdkafka would begin anew with bootstrap.servers all the time: the client hangs, with brokers that are well",
        "leave it out",
        "KIP-1102",
    ),
    Refusal(
        ALL,
        "internal.termination.signal",
        _is_not(0),
        "librdkafka would take the signal from the process: stop() would not hear of it, or the process would be killed",
        "leave it out",
        "Y03",
    ),
    Refusal(
        ALL,
        "api.version.request",
        _is("false"),
        _OLD_REQUESTS,
        "leave it out",
        "X15",
    ),
    Refusal(
        ALL,
        "api.version.fallback.ms",
        _is_not(0),
        _OLD_REQUESTS,
        "leave it out",
        "X15",
    ),
    Refusal(
        ALL,
        "group.protocol.type",
        _is_not("consumer"),
        "members of other kinds could not be in the group, nor tools read its offsets",
        "leave it out",
        "-",
    ),
    Refusal(
        ALL,
        "queue.buffering.backpressure.threshold",
        lambda value, effective: effective["enable.idempotence"] == "true" and float(value) > 1,
        "librdkafka makes no idempotent producer with it",
        "leave it out",
        "rdkafka_conf.c",
    ),
    Refusal(
        ALL,
        "ssl.endpoint.identification.algorithm",
        _is(""),
        "nothing is Java's way to say none, which librdkafka wants to be said",
        "give none, if any host with a certificate may answer; else leave it out",
        "S02",
    ),
    Refusal(
        ALL,
        "max.poll.records",
        _always,
        "consumers of librdkafka ignore it (it is for share groups)",
        "use the max_batch argument of run()",
        "HAZARDS 2.5",
    ),
    Refusal(
        ALL,
        "share.acknowledgement.mode",
        _always,
        "it belongs to share groups, which have none of the three guarantees",
        "leave it out",
        "DESIGN 8",
    ),
)

# C17: with KIP-848 the broker decides these, for the whole group.
BROKERS_WITH_KIP_848 = (
    "session.timeout.ms",
    "heartbeat.interval.ms",
    "partition.assignment.strategy",
    "group.protocol.type",
)

WEAKENINGS = (
    Weakening(
        AMO,
        "acks",
        _is(1),
        "a record whose broker leaves the cluster's metadata before it has answered is sent again, with retries=0 too, and may"
        " be there twice",
        "P06",
    ),
    Weakening(
        ALO,
        "acks",
        _is(1),
        "an acknowledged record is lost if its leader dies before a replica has it; enable.idempotence goes off too",
        "B01",
    ),
    Weakening(
        ALO,
        "enable.idempotence",
        _is("false"),
        "a retry can write a record twice and behind later ones",
        "P17",
    ),
    Weakening(
        AMO + ALO,
        "isolation.level",
        _is("read_uncommitted"),
        "records of aborted transactions are handled, and a group that a transaction commits for can handle twice",
        "X15",
    ),
    Weakening(
        ALL,
        "allow.auto.create.topics",
        _is("true"),
        "a mistyped topic is created with the broker's defaults, which may be one replica",
        "P19",
    ),
    Weakening(
        ALL,
        "topic.metadata.refresh.interval.ms",
        _is(-1),
        "partitions that are added to a topic are never read, and nothing says so",
        "C19",
    ),
    Weakening(
        ALL,
        "group.instance.id",
        lambda _value, effective: effective["partition.assignment.strategy"] == "cooperative-sticky",
        "with cooperative-sticky, a static member that is killed in the middle of a rebalance comes back to a part of its "
        "partitions, and nobody reads the others until members come or go: choose group.protocol=consumer, or range",
        "C18",
    ),
    Weakening(ACKED, "check.crcs", _is("false"), "records damaged on the way are handled as if they were whole", "C21"),
    Weakening(
        ALL,
        "enable.ssl.certificate.verification",
        _is("false"),
        "anybody on the way can answer in the broker's place: an acknowledgement proves nothing",
        "S02",
        SecurityWarning,
    ),
    Weakening(
        ALL,
        "ssl.endpoint.identification.algorithm",
        _is("none"),
        "any host with a certificate can answer in the broker's place: an acknowledgement proves nothing",
        "S02",
        SecurityWarning,
    ),
    Weakening(
        ALL,
        "security.protocol",
        lambda value, effective: value == "sasl_plaintext" and effective["sasl.mechanism"] in ("PLAIN", "OAUTHBEARER"),
        "the password or token goes to the broker readable: anybody on the way can use it from then on",
        "S02",
        SecurityWarning,
    ),
    *_unused(
        ("sasl.username", "sasl.mechanism"),
        ("plaintext", "ssl"),
        "security.protocol has no SASL: nobody logs in with it",
    ),
    *_unused(
        (
            *("ssl.ca.location", "ssl.ca.pem", "ssl.certificate.location", "ssl.certificate.pem"),
            *("ssl.key.location", "ssl.key.pem", "ssl.keystore.location"),
        ),
        ("plaintext", "sasl_plaintext"),
        "security.protocol has no TLS: no certificate is looked at, and everybody on the way can read and answer",
    ),
    Weakening(
        ALL,
        "sasl.oauthbearer.token.endpoint.url",
        lambda value, _effective: _readable(str(value)),
        "the client's secret goes there readable: anybody on the way can use it from then on",
        "S02",
        SecurityWarning,
    ),
    Weakening(
        ALL,
        "enable.sasl.oauthbearer.unsecure.jwt",
        _is("true"),
        "tokens without a signature: brokers that take them let in anybody",
        "S02",
        SecurityWarning,
    ),
    Weakening(
        EOS,
        "transaction.timeout.ms",
        lambda value, effective: float(value) > float(effective["session.timeout.ms"]),
        "longer than session.timeout.ms: after a crash the next owner of the partitions waits for the old transaction",
        "X17",
        warning=None,
    ),
)

ORDERS = (
    Order(
        ALL,
        "linger.ms",
        "delivery.timeout.ms",
        0,
        equal=False,
        breaks="records would time out while they wait to be sent",
        see="P16",
    ),
    Order(
        EOS,
        "socket.timeout.ms",
        "transaction.timeout.ms",
        SOCKET_MARGIN_MS,
        equal=True,
        breaks="a request that hangs would outlive its transaction",
        see="P16",
    ),
    Order(
        EOS,
        "delivery.timeout.ms",
        "transaction.timeout.ms",
        0,
        equal=True,
        breaks="a record could still be on its way when its transaction is over",
        see="P16",
    ),
    Order(
        ALL,
        "heartbeat.interval.ms",
        "session.timeout.ms",
        0,
        equal=False,
        breaks="a member would be thrown out before its next heartbeat, again and again",
        see="C15",
    ),
    Order(
        ALL,
        "session.timeout.ms",
        "max.poll.interval.ms",
        0,
        equal=True,
        breaks="a member would be thrown out as slow before it could be noticed as dead",
        see="X17",
    ),
    Order(
        EOS,
        "transaction.timeout.ms",
        "max.poll.interval.ms",
        0,
        equal=False,
        breaks="the group would give the partitions away while their transaction is still open",
        see="X17",
    ),
)
