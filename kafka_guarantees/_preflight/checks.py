"""What a guarantee needs of brokers and topics: a table, and the code that walks over it.

Rules. No I/O: everything is in a ``Case``. A row says what is needed, None where it is so already. Its level is that of the
guarantee; a guarantee that is not in a row does not need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from .._settings import Guarantee
from .._settings.properties import PROPERTIES
from .commands import Commands
from .report import LEVELS, Finding, Level
from .seen import DENIED, MISSING, OFFSETS, PATTERN, TRANSACTIONS, Cluster, Topic, matches

if TYPE_CHECKING:
    from .._settings import Settings

AMO, ALO, EXO = Guarantee.AT_MOST_ONCE, Guarantee.AT_LEAST_ONCE, Guarantee.EXACTLY_ONCE

REPLICAS = 3  # one may be repaired, and another one die
IN_SYNC = 2
DEAD_LETTER_HEADERS = 8 * 1024  # bytes that a dead letter is larger than its message
FETCH_OVERHEAD = 512  # bytes that librdkafka adds to what it fetches
HOUR, DAY, WEEK = (int(timedelta(hours=hours).total_seconds() * 1000) for hours in (1, 24, 7 * 24))
SERVER = "server.properties of every broker"

Levels = Mapping[Guarantee, Level]
KEPT: Levels = {ALO: "unsafe", EXO: "unsafe"}  # what loses acknowledged records
POSITION: Levels = {AMO: "unsafe", ALO: "warning", EXO: "unsafe"}  # what loses committed offsets (M05)
TRANSACTED: Levels = {EXO: "unsafe"}


@dataclass(frozen=True)
class Case:
    """Everything that checks look at.

    Attributes:
        settings: of the client.
        seen: what the brokers said.
        topics: names and patterns.
        dead_letter: the dead letter topic.
        retention: how long an id is remembered.
    """

    settings: Settings
    seen: Cluster
    topics: tuple[str, ...] = ()
    dead_letter: str | None = None
    retention: timedelta | None = None

    @property
    def inputs(self) -> dict[str, Topic]:
        """The topics, those that patterns match among them, without the dead letter topic."""
        return {
            name: topic
            for name, topic in self.seen.topics.items()
            if name in self.topics
            or any(p.startswith(PATTERN) and name != self.dead_letter and matches(p, name) for p in self.topics)
        }

    def asked_for(self, role: str) -> dict[str, Topic]:
        """The topics of a role that this client has a use for."""
        if role == DATA:
            return self.inputs
        name = {
            DEAD_LETTERS: self.dead_letter,
            POSITIONS: OFFSETS if self.settings.group_id is not None else None,
            OUTCOMES: TRANSACTIONS if self.settings.guarantee is EXO else None,
        }[role]
        topic = self.seen.topics.get(name) if name is not None else None
        return {} if name is None or topic is None else {name: topic}

    def limit(self, name: str, side: str = "producer") -> int:
        """A setting of the client that is a number."""
        given: Mapping[str, object] = getattr(self.settings, side)
        return int(str(given.get(name, PROPERTIES[name].default)))


DATA, DEAD_LETTERS, POSITIONS, OUTCOMES = "topic", "dead letter topic", "offsets topic", "transactions topic"
NAMES = {DATA: "topic", DEAD_LETTERS: "dead letter topic", POSITIONS: "internal topic", OUTCOMES: "internal topic"}


class Needed(NamedTuple):
    """What is needed instead: for people, and what to set (None where that is not the way)."""

    text: str
    set_to: str | None = None
    level: Level | None = None  # where it is not that of the row
    seen: str | None = None  # where the bare value does not say it


class Row(NamedTuple):
    """One setting of topics of one role."""

    role: str
    setting: str
    levels: Levels
    needed: Callable[[Case, Topic], Needed | None]
    why: str
    replicated: bool = False  # it takes REPLICAS brokers to be right


# -- topics ---------------------------------------------------------------------------------------------------------------


def _in_sync(case: Case, topic: Topic) -> Needed | None:
    number = topic.config.number("min.insync.replicas")
    if number is None or (topic.replicas == 1 and case.seen.brokers < REPLICAS):
        return None  # the one copy is reported already, and cannot be mended there
    if number < IN_SYNC:
        return Needed(f"{IN_SYNC} or more", str(IN_SYNC))
    if topic.replicas is not None and number >= topic.replicas > 1:
        few = f"below {topic.replicas}, the number of replicas: with one broker down nothing can be written"
        return Needed(few, str(topic.replicas - 1) if topic.replicas > IN_SYNC else None, "warning")
    return None


def _clean(_case: Case, topic: Topic) -> Needed | None:
    return Needed("false", "false") if topic.config.text("unclean.leader.election.enable") == "true" else None


def kept(topic: Topic) -> int | None:
    """Milliseconds that a topic keeps a message by time; -1 for ever, None if unknown."""
    policy = topic.config.text("cleanup.policy")
    if policy is not None and "delete" not in policy:
        return -1
    return topic.config.number("retention.ms")


def _kept_from_now_on(_case: Case, topic: Topic) -> Needed | None:
    time = kept(topic)
    by_message = topic.config.text("message.timestamp.type") == "CreateTime"
    if not by_message or time in (None, -1):
        return None
    return Needed("LogAppendTime, or no limit in retention.ms", "LogAppendTime")


def _kept_for_a_day(_case: Case, topic: Topic) -> Needed | None:
    time = kept(topic)
    return (
        Needed("longer than any outage, a day at least", str(WEEK), seen=span(time))
        if time is not None and 0 <= time < DAY
        else None
    )


def _kept_by_size(_case: Case, topic: Topic) -> Needed | None:
    size = topic.config.number("retention.bytes")
    return (
        Needed("-1, or more than a consumer ever lags behind")
        if size is not None and size >= 0 and kept(topic) is not None
        else None
    )


def _kept_as_long_as_offsets(case: Case, topic: Topic) -> Needed | None:
    time, minutes = kept(topic), case.seen.config.number("offsets.retention.minutes")
    if case.settings.group_id is None or time is None or minutes is None or 0 <= time <= minutes * 60_000:
        return None
    return Needed(
        f"at most offsets.retention.minutes of the brokers, {span(minutes * 60_000)}; or raise that one", seen=span(time)
    )


def _kept_as_long_as_ids(case: Case, topic: Topic) -> Needed | None:
    time = kept(topic)
    if case.retention is None or time is None:
        return None
    remembered = int(case.retention.total_seconds() * 1000)
    return (
        Needed(f"at most {span(remembered)}, for which ids are remembered", seen=span(time))
        if not 0 <= time <= remembered
        else None
    )


def _compacted(_case: Case, topic: Topic) -> Needed | None:
    return Needed("delete", "delete") if "compact" in (topic.config.text("cleanup.policy") or "") else None


def _takes_what_is_produced(case: Case, topic: Topic) -> Needed | None:
    most, ours = topic.config.number("max.message.bytes"), case.limit("message.max.bytes")
    return (
        Needed(f"{ours} or more, message.max.bytes of the producer; or lower that one", str(ours))
        if most is not None and most < ours
        else None
    )


def _can_be_fetched(case: Case, topic: Topic) -> Needed | None:
    most, ours = topic.config.number("max.message.bytes"), case.limit("receive.message.max.bytes", "consumer")
    if most is None or most + FETCH_OVERHEAD <= ours:
        return None
    return Needed(f"at most {ours - FETCH_OVERHEAD}: receive.message.max.bytes of the consumer, less {FETCH_OVERHEAD}")


def _takes_dead_letters(case: Case, topic: Topic) -> Needed | None:
    most, largest = topic.config.number("max.message.bytes"), _largest(case)
    if most is None or largest is None or most >= largest + DEAD_LETTER_HEADERS:
        return None
    need = largest + DEAD_LETTER_HEADERS
    return Needed(f"{need} or more: the largest message that may come, and {DEAD_LETTER_HEADERS} for its headers", str(need))


def _largest(case: Case) -> int | None:
    sizes = [size for topic in case.inputs.values() if (size := topic.config.number("max.message.bytes")) is not None]
    return max(sizes, default=None)


TOPICS = (
    Row(
        DATA,
        "min.insync.replicas",
        KEPT,
        _in_sync,
        "A record counts as acknowledged with a single copy, and is gone with that broker.",
        replicated=True,
    ),
    Row(
        DATA,
        "unclean.leader.election.enable",
        KEPT,
        _clean,
        "A replica that is behind may become leader, and acknowledged records are gone.",
        replicated=True,
    ),
    Row(
        DATA,
        "retention.ms",
        {ALO: "warning", EXO: "warning"},
        _kept_for_a_day,
        "A message is deleted after that, handled or not: a consumer that was down for longer has lost it.",
    ),
    Row(
        DATA,
        "retention.bytes",
        {ALO: "info", EXO: "info"},
        _kept_by_size,
        "What is beyond that is deleted, handled or not: a consumer that lags further behind has lost it.",
    ),
    Row(
        DATA,
        "retention.ms",
        {AMO: "warning", ALO: "info", EXO: "warning"},
        _kept_as_long_as_offsets,
        "A group that has no members for that long forgets its offsets and begins anew: what it handled comes again, "
        'or, with start="latest", what came meanwhile is left out.',
    ),
    Row(
        DATA,
        "retention.ms",
        {ALO: "info"},
        _kept_as_long_as_ids,
        "A message that is read or written again after its id was forgotten is handled again.",
    ),
    Row(
        DATA,
        "cleanup.policy",
        {ALO: "info", EXO: "info"},
        _compacted,
        "Of the messages of one key only the last one is kept: a consumer that lags behind does not see the others.",
    ),
    Row(
        DATA,
        "max.message.bytes",
        {AMO: "info", ALO: "warning", EXO: "warning"},
        _takes_what_is_produced,
        "What librdkafka sends may be larger, and is refused as a whole: batches of small records too.",
    ),
    Row(
        DATA,
        "max.message.bytes",
        {AMO: "warning", ALO: "warning", EXO: "warning"},
        _can_be_fetched,
        "A larger message can never be fetched, and its partition stands still.",
    ),
    Row(
        DEAD_LETTERS,
        "min.insync.replicas",
        KEPT,
        _in_sync,
        "A dead letter counts as acknowledged with a single copy, and is gone with that broker: so is its message.",
        replicated=True,
    ),
    Row(
        DEAD_LETTERS,
        "unclean.leader.election.enable",
        KEPT,
        _clean,
        "A replica that is behind may become leader, and acknowledged dead letters are gone.",
        replicated=True,
    ),
    Row(
        DEAD_LETTERS,
        "cleanup.policy",
        {AMO: "warning", ALO: "unsafe", EXO: "unsafe"},
        _compacted,
        "Of the dead letters of one key only the last one is kept, and those without a key are refused.",
    ),
    Row(
        DEAD_LETTERS,
        "retention.ms",
        {ALO: "warning", EXO: "warning"},
        _kept_for_a_day,
        "A dead letter that nobody has looked at is deleted after that.",
    ),
    Row(
        DEAD_LETTERS,
        "message.timestamp.type",
        {ALO: "warning", EXO: "warning"},
        _kept_from_now_on,
        "A dead letter has the timestamp of its message: if that is older than the retention, it may be deleted at once.",
    ),
    Row(
        DEAD_LETTERS,
        "max.message.bytes",
        {AMO: "info", ALO: "warning", EXO: "warning"},
        _takes_dead_letters,
        "A message of the largest size cannot become a dead letter: the consumer stops at it.",
    ),
    Row(
        POSITIONS,
        "min.insync.replicas",
        POSITION,
        _in_sync,
        "A committed offset has a single copy: when it is lost, messages are handled again.",
        replicated=True,
    ),
    Row(
        POSITIONS,
        "unclean.leader.election.enable",
        POSITION,
        _clean,
        "Committed offsets are lost when a replica that is behind becomes leader: messages are handled again.",
        replicated=True,
    ),
    Row(
        OUTCOMES,
        "min.insync.replicas",
        TRANSACTED,
        _in_sync,
        "The outcome of a transaction has a single copy: when it is lost, the transaction is torn.",
        replicated=True,
    ),
)

LOST_WITH_A_BROKER = {
    DATA: (KEPT, "The topic is gone with its broker, and every message in it."),
    DEAD_LETTERS: (KEPT, "The dead letters are gone with their broker."),
    POSITIONS: (POSITION, "The committed offsets are gone with their broker: messages are handled again."),
    OUTCOMES: (TRANSACTED, "The outcomes of transactions are gone with their broker: none can be ended."),
}


# -- brokers --------------------------------------------------------------------------------------------------------------


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


def _copies(least: int) -> Callable[[Case, int], Needed | None]:
    return lambda _case, number: Needed(f"{least} or more", str(least)) if number < least else None


class BrokerRow(NamedTuple):
    """One setting of the brokers."""

    setting: str
    levels: Levels
    needed: Callable[[Case, int], Needed | None]
    why: str
    instead_of: str | None = None  # asked only where this internal topic could not be seen
    replicated: bool = False


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
        "A record that is sent again after that is not recognised, and is written twice.",
    ),
    BrokerRow(
        "offsets.retention.minutes",
        {AMO: "warning", ALO: "warning", EXO: "warning"},
        _offsets_kept,
        "A group that has no members for that long forgets its offsets and begins anew.",
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


# -- the walk -------------------------------------------------------------------------------------------------------------


def findings(case: Case) -> tuple[Finding, ...]:
    """Everything there is to say, the gravest first."""
    if case.seen.cluster_id is None:
        return (_no_answer(case),)
    commands = Commands(case.settings)
    found = [
        *_clusters(case),
        *(finding for role in NAMES for finding in _existing(case, role, commands)),
        *(finding for role in NAMES for finding in _replication(case, role, commands)),
        *(finding for row in TOPICS for finding in _row(case, row, commands)),
        *(finding for row in BROKERS for finding in _broker_row(case, row)),
        *_rights(case, commands),
        *_not_told(case, commands),
    ]
    return tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))


def _no_answer(case: Case) -> Finding:
    return Finding(
        "unknown",
        "the brokers",
        "answer",
        f"none ({case.seen.error})",
        "an answer in time",
        "Nothing could be asked: whether the guarantee holds there is not known.",
    )


def _clusters(case: Case) -> Iterator[Finding]:
    by_id: dict[str, list[str]] = {}
    for address, cluster in case.seen.others.items():
        by_id.setdefault(cluster, []).append(address)
    if len(by_id) > 1:  # X29
        yield Finding(
            "unsafe",
            "bootstrap.servers",
            "cluster id",
            "; ".join(f"{cluster} at {', '.join(addresses)}" for cluster, addresses in by_id.items()),
            "one cluster",
            "Each client takes one of the addresses: messages come from one cluster, and what is written may go to another.",
        )


def _existing(case: Case, role: str, commands: Commands) -> Iterator[Finding]:
    """Topics that could not be described; internal ones are made when they are needed, and have rows of their own till then."""
    if role not in (DATA, DEAD_LETTERS):
        return
    for pattern in case.topics if role == DATA else ():
        if pattern.startswith(PATTERN) and not any(matches(pattern, name) for name in case.inputs):
            why = "Nothing is consumed until a topic of such a name is created."
            yield Finding("info", f"pattern {pattern!r}", "topics", "none", "one or more", why)
    for name, topic in case.asked_for(role).items():
        subject = f"{NAMES[role]} {name!r}"
        replicas = min(REPLICAS, case.seen.brokers)
        if topic.error == MISSING:
            why = (
                "Nothing can be read from it or written to it; where brokers create topics by themselves, "
                "it is made with their defaults."
            )
            command = commands.create(name, replicas, min(IN_SYNC, replicas))
            yield Finding("unsafe", subject, "existence", "none", "created beforehand", why, command)
        elif topic.error in DENIED:
            right = "WRITE" if role == DEAD_LETTERS else "READ to consume, WRITE to produce"
            why = "The brokers refuse it to this client; or it does not exist."
            command = commands.allow("Write" if role == DEAD_LETTERS else "Read", "topic", name)
            yield Finding("unsafe", subject, "rights", "none", right, why, command)
        elif topic.error:
            why = "It could not be described, so nothing about it is known."
            yield Finding("unknown", subject, "description", topic.error, "an answer", why)


def _replication(case: Case, role: str, commands: Commands) -> Iterator[Finding]:
    levels, why = LOST_WITH_A_BROKER[role]
    level = levels.get(case.settings.guarantee)
    if level is None:
        return
    for name, topic in case.asked_for(role).items():
        if topic.replicas is None or topic.replicas >= REPLICAS:
            continue
        enough = case.seen.brokers >= REPLICAS
        if topic.replicas > 1:
            level, why = "warning", "With one broker down, either nothing can be written or a single copy counts."
        yield Finding(
            level if enough else _lower(level),
            f"{NAMES[role]} {name!r}",
            "replication factor",
            str(topic.replicas),
            f"{REPLICAS} or more",
            why if enough else f"{why} {_few(case)}",
            commands.replicate(name) if enough else "",
        )


def _row(case: Case, row: Row, commands: Commands) -> Iterator[Finding]:
    level = row.levels.get(case.settings.guarantee)
    if level is None:
        return
    for name, topic in case.asked_for(row.role).items():
        needed = row.needed(case, topic)
        if needed is None:
            continue
        lower = row.replicated and case.seen.brokers < REPLICAS
        set_to = needed.set_to
        if set_to is not None and row.setting == "min.insync.replicas" and lower:
            set_to = None  # it would stop all writing as soon as one of so few brokers is down
        yield Finding(
            needed.level or (_lower(level) if lower else level),
            f"{NAMES[row.role]} {name!r}",
            row.setting,
            needed.seen or topic.config.text(row.setting) or "",
            needed.text,
            f"{row.why} {_few(case)}" if lower else row.why,
            "" if set_to is None else commands.set(name, row.setting, set_to),
        )


def _broker_row(case: Case, row: BrokerRow) -> Iterator[Finding]:
    level, value = row.levels.get(case.settings.guarantee), case.seen.config.number(row.setting)
    if level is None or value is None:
        return
    needed = row.needed(case, value)
    if needed is None or not _asked(case, row):
        return
    lower = row.replicated and case.seen.brokers < REPLICAS
    yield Finding(
        needed.level or (_lower(level) if lower else level),
        "the brokers",
        row.setting,
        str(value),
        needed.text,
        f"{row.why} {_few(case)}" if lower else row.why,
        f"{row.setting}={needed.set_to} in {SERVER}, restarted one by one" if not lower else "",
    )


def _asked(case: Case, row: BrokerRow) -> bool:
    """Whether a row counts: the internal topic that it stands for, if it stands for one, could not be seen."""
    if row.instead_of is None:
        return True
    unseen = case.seen.topics.get(row.instead_of, Topic()).replicas is None
    return unseen and (row.instead_of != OFFSETS or case.settings.group_id is not None)


def _rights(case: Case, commands: Commands) -> Iterator[Finding]:
    """ACLs, as far as the brokers tell this client its own (S07)."""
    for name, topic in case.inputs.items():
        missing = {"READ", "WRITE"} - topic.rights if topic.rights is not None else set()
        for right in sorted(missing):
            alone = len(missing) == 1
            other = "consumed" if right == "WRITE" else "produced to"
            why = f"It can only be {other}." if alone else "It can be neither consumed nor produced to."
            yield Finding(
                "info" if alone else "unsafe",
                f"topic {name!r}",
                f"right to {right}",
                "denied",
                "READ to consume, WRITE to produce",
                why,
                commands.allow(right.capitalize(), "topic", name),
            )
    for name, topic in case.asked_for(DEAD_LETTERS).items():
        if topic.rights is not None and "WRITE" not in topic.rights:
            why = "A message that fails cannot become a dead letter: the consumer stops at it."
            level: Level = "warning" if case.settings.guarantee is AMO else "unsafe"
            command = commands.allow("Write", "topic", name)
            yield Finding(level, f"dead letter topic {name!r}", "right to WRITE", "denied", "allowed", why, command)
    if case.seen.rights is not None and "ALTER" in case.seen.rights:
        return  # of an operator, or nobody is asked for rights there
    own = (
        (case.settings.group_id, "group", "Read", "group"),
        (case.settings.transactional_id, "transactional.id", "Write", "transactional-id"),
    )
    for given, kind, operation, option in own:
        if given is not None:
            why = "It is not asked for, since only the coordinator knows; without it the first use is refused."
            command = commands.allow(operation, option, given)
            yield Finding("info", f"{kind} {given!r}", f"right to {operation.upper()}", "not asked", "allowed", why, command)


def _not_told(case: Case, commands: Commands) -> Iterator[Finding]:
    """Settings that were not told."""
    for role in (DATA, DEAD_LETTERS):
        for name, topic in case.asked_for(role).items():
            code = topic.config.error
            if code and not topic.error:
                denied = code in DENIED
                settings = sorted({row.setting for row in TOPICS if row.role == role and case.settings.guarantee in row.levels})
                yield Finding(
                    "unknown",
                    f"{NAMES[role]} {name!r}",
                    "settings",
                    code,
                    "DESCRIBE_CONFIGS on the topic" if denied else "an answer",
                    f"Could not ask for {', '.join(settings)}.",
                    commands.allow("DescribeConfigs", "topic", name) if denied else "",
                )
    code = case.seen.config.error
    wanted = sorted({row.setting for row in BROKERS if case.settings.guarantee in row.levels and _asked(case, row)})
    if code:
        denied = code in DENIED
        yield Finding(
            "unknown",
            "the brokers",
            "settings",
            code,
            "DESCRIBE_CONFIGS on the cluster" if denied else "an answer",
            f"Could not ask for {', '.join(wanted)}.",
            commands.allow("DescribeConfigs", "cluster") if denied else "",
        )


def _lower(level: Level) -> Level:
    return "warning" if level == "unsafe" else level


def _few(case: Case) -> str:
    count = case.seen.brokers
    return f"The cluster has {count} broker{'s' if count > 1 else ''}: it takes {REPLICAS} to mend that."


def span(milliseconds: int) -> str:
    """A time for people, with the number that the brokers know it by."""
    if milliseconds < 0:
        return "for ever"
    for unit, size in (("d", DAY), ("h", HOUR), ("min", 60_000), ("s", 1000)):
        if milliseconds >= size and not milliseconds % size:
            return f"{milliseconds} ({milliseconds // size} {unit})"
    return str(milliseconds)
