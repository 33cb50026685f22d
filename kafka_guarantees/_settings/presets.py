"""What each guarantee sets: a table of data. ``merge.py`` walks it, and ``explain()`` is printed from it.

Rules. Values are in the one spelling of ``values.normalise``. ``see`` names the hazard, KIP or librdkafka file behind
a row. A row's ``why`` is one sentence for a reader who has never seen the setting: it is printed by ``explain()``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from .properties import BOTH, CONSUMER, PRODUCER
from .values import Value


class Guarantee(str, Enum):
    """How often a message's effect happens when something fails."""

    AT_MOST_ONCE = "at-most-once"
    AT_LEAST_ONCE = "at-least-once"
    EXACTLY_ONCE = "exactly-once"


class Kind(str, Enum):
    """How firmly a preset holds."""

    LOCKED = "locked"  # a contradicting override is refused
    ADDED = "added"  # the user's own entries of the list come behind it
    DEFAULT = "default"  # the user may change it
    TUNING = "tuning"  # a matter of speed or memory, not of the guarantee


AMO = (Guarantee.AT_MOST_ONCE,)
ALO = (Guarantee.AT_LEAST_ONCE,)
EOS = (Guarantee.EXACTLY_ONCE,)
ACKED = ALO + EOS
ALL = AMO + ALO + EOS

Known = Mapping[str, Value]  # settings by their one name

MAX_RETRIES = 2**31 - 1
TRANSACTION_TIMEOUT_MS = 15_000
_DELIVERY_TIMEOUT_MS = 120_000
_SOCKET_TIMEOUT_MS = 10_000
_REQUEST_TIMEOUT_MS = 30_000  # as Kafka's own clients have it
_FROZEN = "a broker that stands still holds up what it led for so long, though there is a new leader"
_SESSION_MS = 45_000  # librdkafka's default
_HEARTBEAT_MS = 3_000  # likewise
SOCKET_MARGIN_MS = 100  # librdkafka's CONFIGURATION.md: socket.timeout.ms at least this much below transaction.timeout.ms
MAX_IN_FLIGHT = 5
_LINGER_MS = 20
_RUN_LINGER_MS = 100  # as the producers of Kafka Streams have it
_LEAST_LINGER_MS = 5  # librdkafka's default
_QUEUE = 100_000  # records, likewise
_QUEUE_KBYTES = 65_536  # of records, which leave room for all that Python can produce while they linger longest


@dataclass(frozen=True)
class Preset:
    """One row: for these guarantees the setting has this value, unless the user may and does change it.

    ``value`` is a function where it depends on what the user gave. ``breaks`` and ``instead`` are for LOCKED rows.
    """

    guarantees: tuple[Guarantee, ...]
    setting: str
    value: Value | Callable[[Known], Value]
    kind: Kind
    side: str
    why: str
    see: str
    breaks: str = ""
    instead: str = ""


def _transaction_timeout(given: Known) -> int:
    return int(given.get("transaction.timeout.ms", TRANSACTION_TIMEOUT_MS))


def _delivery_timeout(given: Known) -> int:
    return min(_DELIVERY_TIMEOUT_MS, _transaction_timeout(given))


def _linger(given: Known) -> int:
    return _lingering(given, _LINGER_MS)


def _linger_in_runs(given: Known) -> int:
    return _lingering(given, _RUN_LINGER_MS if given.get("group.id") else _LINGER_MS)


def _lingering(given: Known, most: int) -> int:
    """Not so long that a small queue is full before, since librdkafka waits for it then as well."""
    timeout = int(given.get("delivery.timeout.ms", _DELIVERY_TIMEOUT_MS)) or _DELIVERY_TIMEOUT_MS  # 0: none
    room = int(given.get("queue.buffering.max.messages", _QUEUE)) or _QUEUE  # likewise
    kbytes = int(given.get("queue.buffering.max.kbytes", _QUEUE_KBYTES))
    wanted = min(most * room // _QUEUE, most * kbytes // _QUEUE_KBYTES)
    return min(most, max(_LEAST_LINGER_MS, wanted), timeout // 2)


def _socket_timeout(given: Known) -> int:
    return max(10, min(_SOCKET_TIMEOUT_MS, _transaction_timeout(given) - SOCKET_MARGIN_MS))


def _idempotence(given: Known) -> str:
    return "true" if given.get("acks", "all") == "all" else "false"


def _heartbeat(given: Known) -> int:
    return max(1, min(_HEARTBEAT_MS, int(given.get("session.timeout.ms", _SESSION_MS)) // 3))


PRESETS = (
    Preset(AMO, "acks", 0, Kind.DEFAULT, PRODUCER, "nothing is waited for; nothing can be sent twice", "P06 P07"),
    Preset(ALO, "acks", "all", Kind.DEFAULT, PRODUCER, "a record counts when all in-sync replicas have it", "B01"),
    Preset(
        EOS,
        "acks",
        "all",
        Kind.LOCKED,
        PRODUCER,
        "a record counts when all in-sync replicas have it",
        "KIP-98",
        "a committed transaction could lose records when a leader dies",
        "leave it out, or use AtLeastOnce",
    ),
    Preset(
        AMO,
        "retries",
        0,
        Kind.LOCKED,
        PRODUCER,
        "a record is sent once: a retry after a lost answer is a second copy",
        "P06",
        "a record whose answer got lost would be written twice",
        "leave it out, or use AtLeastOnce",
    ),
    Preset(
        ACKED,
        "retries",
        MAX_RETRIES,
        Kind.DEFAULT,
        PRODUCER,
        "delivery.timeout.ms ends the attempts, not their number",
        "P05",
    ),
    Preset(
        AMO,
        "retry.backoff.ms",
        500,
        Kind.DEFAULT,
        CONSUMER,
        "a commit slower by half of it may have been sent twice: its member leaves the group, so that a late one is refused",
        "M02",
    ),
    Preset(ALO, "retry.backoff.ms", 100, Kind.DEFAULT, BOTH, "pause before a request is repeated", "P16"),
    Preset(
        AMO,
        "enable.idempotence",
        "false",
        Kind.LOCKED,
        PRODUCER,
        "idempotence needs acks=all and retries",
        "P06",
        "it would switch retries and acks=all on",
        "leave it out, or use AtLeastOnce",
    ),
    Preset(
        ALO,
        "enable.idempotence",
        _idempotence,
        Kind.DEFAULT,
        PRODUCER,
        "keeps the order and removes most duplicates of retries (not all); off when acks is not all",
        "P08 P17",
    ),
    Preset(
        EOS,
        "enable.idempotence",
        "true",
        Kind.LOCKED,
        PRODUCER,
        "transactions are built on it",
        "KIP-98",
        "there are no transactions without it",
        "leave it out, or use AtLeastOnce",
    ),
    Preset(
        ACKED,
        "max.in.flight",
        MAX_IN_FLIGHT,
        Kind.DEFAULT,
        PRODUCER,
        "brokers remember five batches per producer: more could not be put in order again",
        "P17",
    ),
    Preset(
        ALO,
        "delivery.timeout.ms",
        _DELIVERY_TIMEOUT_MS,
        Kind.DEFAULT,
        PRODUCER,
        "after this a record may or may not have been written: long, so that it is rare",
        "P05 P16",
    ),
    Preset(
        EOS,
        "delivery.timeout.ms",
        _delivery_timeout,
        Kind.DEFAULT,
        PRODUCER,
        "not longer than the transaction that it belongs to",
        "P16",
    ),
    Preset(
        EOS,
        "transaction.timeout.ms",
        TRANSACTION_TIMEOUT_MS,
        Kind.DEFAULT,
        PRODUCER,
        "the coordinator aborts after this; readers of the output wait that long for a dead instance",
        "X16 X17",
    ),
    Preset(
        EOS,
        "socket.timeout.ms",
        _socket_timeout,
        Kind.DEFAULT,
        PRODUCER,
        "a request must be given up before its transaction times out",
        "P16",
    ),
    Preset(AMO + ALO, "socket.timeout.ms", _REQUEST_TIMEOUT_MS, Kind.DEFAULT, BOTH, _FROZEN, "docs/operations.md"),
    Preset(EOS, "socket.timeout.ms", _REQUEST_TIMEOUT_MS, Kind.DEFAULT, CONSUMER, _FROZEN, "docs/operations.md"),
    Preset(
        AMO,
        "delivery.report.only.error",
        True,  # noqa: FBT003 - a value in a table
        Kind.LOCKED,
        PRODUCER,
        "a success means nothing yet here; errors are reported",
        "MEASURED.md X19",
        "one callback into Python for every record, with nothing to tell",
        "leave it out",
    ),
    Preset(
        ALO,
        "delivery.report.only.error",
        False,  # noqa: FBT003 - a value in a table
        Kind.LOCKED,
        PRODUCER,
        "offsets wait for the success of each record",
        "P01",
        "no success would ever be reported, and no offset committed",
        "leave it out",
    ),
    Preset(
        EOS,
        "delivery.report.only.error",
        False,  # noqa: FBT003 - a value in a table
        Kind.LOCKED,
        PRODUCER,
        "librdkafka may count a record as written that no broker has: its report names no offset",
        "P13, confluent-kafka-go 921",
        "a transaction could be committed without a record of it",
        "leave it out",
    ),
    Preset(
        ALL,
        "partitioner",
        "murmur2_random",
        Kind.DEFAULT,
        PRODUCER,
        "the same key goes to the same partition as from a Java client",
        "P18",
    ),
    Preset(
        EOS,
        "log.connection.close",
        "true",
        Kind.LOCKED,
        PRODUCER,
        "a closed connection is how an ambiguous commit is noticed",
        "X01",
        "nobody would see when the producer must be re-created, and a late request could end another transaction",
        "leave it out; filter such lines in your logger",
    ),
    Preset(
        EOS,
        "log_level",
        6,
        Kind.DEFAULT,
        PRODUCER,
        "the library reads the lines about connections",
        "X01",
    ),
    Preset(
        ALL,
        "enable.auto.commit",
        "false",
        Kind.LOCKED,
        CONSUMER,
        "offsets are committed by the library, at the one right moment",
        "P03",
        "a background thread would commit messages that are not handled, or were not committed before they are",
        "leave it out: run() commits",
    ),
    Preset(
        ALL,
        "enable.auto.offset.store",
        "false",
        Kind.LOCKED,
        CONSUMER,
        "a message counts as done when its handler is done, not when it is fetched",
        "P03",
        "closing would commit messages that were fetched and never handled",
        "leave it out: run() keeps the offsets",
    ),
    Preset(
        ALL,
        "auto.offset.reset",
        "error",
        Kind.LOCKED,
        CONSUMER,
        "a lost position is an error, never a silent jump; start= says where a new group begins",
        "C11 M05",
        "a position that is gone would silently become a jump (messages lost) or a restart (messages repeated)",
        'leave it out; the start= argument ("earliest" or "latest") decides where a new group begins',
    ),
    Preset(
        ALO,
        "isolation.level",
        "read_committed",
        Kind.DEFAULT,
        CONSUMER,
        "records of aborted transactions are not handled",
        "X15",
    ),
    Preset(
        EOS,
        "isolation.level",
        "read_committed",
        Kind.LOCKED,
        CONSUMER,
        "aborted records are not handled, and offsets of open transactions are waited for",
        "X08 X15 KIP-447",
        "a new owner of a partition would start before the open transaction of the old one: messages handled twice",
        "leave it out, or use AtLeastOnce",
    ),
    Preset(
        ALL,
        "allow.auto.create.topics",
        "false",
        Kind.DEFAULT,
        BOTH,
        "a typing mistake is an error, not a new topic with one replica",
        "P19",
    ),
    Preset(
        ACKED,
        "topic.metadata.propagation.max.ms",
        5_000,
        Kind.DEFAULT,
        PRODUCER,
        "a topic that does not exist is an error after this, and within the transaction",
        "P19",
    ),
    Preset(ACKED, "check.crcs", "true", Kind.DEFAULT, CONSUMER, "damaged records are noticed", "C21"),
    Preset(
        ALL,
        "heartbeat.interval.ms",
        _heartbeat,
        Kind.DEFAULT,
        CONSUMER,
        "three heartbeats fit into a session: a late one does not end it",
        "C15",
    ),
    Preset(
        ALO,
        "linger.ms",
        _linger_in_runs,
        Kind.TUNING,
        PRODUCER,
        "fewer and fuller requests; 100 with a group.id. A run that is idle, result() and flush() send at once",
        "docs/performance.md",
    ),
    Preset(
        EOS,
        "linger.ms",
        _linger,
        Kind.TUNING,
        PRODUCER,
        "fewer and fuller requests: replicas have work with each. The commit of a transaction does not wait for this",
        "docs/performance.md",
    ),
    Preset(
        ALL,
        "fetch.wait.max.ms",
        100,
        Kind.TUNING,
        CONSUMER,
        "a partition that is read again waits for the request under way",
        "MEASURED",
    ),
    Preset(
        ALL,
        "fetch.queue.backoff.ms",
        2,
        Kind.TUNING,
        CONSUMER,
        "librdkafka's 1000 lets a fast consumer starve for a second",
        "MEASURED.md",
    ),
    Preset(
        ALL,
        "topic.blacklist",
        "^__consumer_offsets$,^__transaction_state$,^__share_group_state$",
        Kind.ADDED,
        CONSUMER,
        "a pattern must not take in Kafka's own topics: each commit would be a message, whose commit is another",
        "C19",
    ),
    Preset(
        ALL,
        "queued.max.messages.kbytes",
        32_768,
        Kind.TUNING,
        CONSUMER,
        "bounds the memory of what is fetched ahead",
        "C24",
    ),
)
