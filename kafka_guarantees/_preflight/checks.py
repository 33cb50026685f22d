"""Whether brokers and topics have what a guarantee needs: a walk over the tables. No I/O: everything is in a ``Case``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .brokers import BROKERS, BrokerRow
from .case import AMO, DATA, DEAD_LETTERS, EXO, IN_SYNC, NAMES, REPLICAS, Case
from .commands import Commands
from .report import LEVELS, Finding, Level
from .seen import DENIED, MISSING, NO_NAME, OFFSETS, PATTERN, Topic, matches
from .topics import LOST_WITH_A_BROKER, TOPICS, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER = "server.properties of every broker"
PROTOCOLS = "group.coordinator.rebalance.protocols"
VERIFICATION = "transaction.partition.verification.enable"
OLDER = "not there: older than Kafka 3.6"
OF_TRANSACTIONS = "transaction.abort.timed.out.transaction.cleanup.interval.ms"  # a setting of brokers since 0.11
BEFORE_4 = "inter.broker.protocol.version"  # a setting of brokers before Kafka 4.0
OF_CLASSIC, OF_KIP_848 = "group.min.session.timeout.ms", "group.consumer.session.timeout.ms"  # settings of brokers


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
        *_protocol(case),
        *_verification(case),
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
        elif topic.error == NO_NAME:
            why = "There can be no such topic: nothing can be read from it or written to it."
            yield Finding("unsafe", subject, "name", repr(name), "1 to 249 letters, digits, '.', '_' or '-'", why)
        elif topic.error in DENIED:
            right = "WRITE" if role == DEAD_LETTERS else "READ to consume, WRITE to produce"
            why = "The brokers refuse it to this client; or it does not exist."
            command = commands.allow("Write" if role == DEAD_LETTERS else "Read", "topic", name)
            yield Finding("unsafe", subject, "rights", "none", right, why, command)
        elif topic.error:
            why = "It could not be described, so nothing about it is known."
            yield Finding("unknown", subject, "description", topic.error, "an answer", why)


def _replication(case: Case, role: str, commands: Commands) -> Iterator[Finding]:
    levels, lost = LOST_WITH_A_BROKER[role]
    with_one = levels.get(case.settings.guarantee)
    if with_one is None:
        return
    for name, topic in case.asked_for(role).items():
        if topic.replicas is None or topic.replicas >= REPLICAS:
            continue
        enough = case.seen.brokers >= REPLICAS
        level, why = with_one, lost
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
    level, values = row.levels.get(case.settings.guarantee), case.seen.numbers(row.setting)
    if level is None or not values:
        return
    value = row.worst(values.values())
    needed = row.needed(case, value)
    if needed is None or not _asked(case, row):
        return
    lower = row.replicated and case.seen.brokers < REPLICAS
    yield Finding(
        needed.level or (_lower(level) if lower else level),
        case.seen.named([broker for broker in values if values[broker] == value]),
        row.setting,
        str(value),
        needed.text,
        f"{row.why} {_few(case)}" if lower else row.why,
        f"{row.setting}={needed.set_to} in {SERVER}, restarted one by one" if not lower else "",
    )


def _protocol(case: Case) -> Iterator[Finding]:
    """KIP-848 with brokers that do not speak it. Before 4.0 they do not say so. Of group.version nobody is told here."""
    if case.settings.group_id is None or case.settings.consumer.get("group.protocol") != "consumer":
        return
    config = case.seen.config
    offered, older = config.text(PROTOCOLS), config.text(BEFORE_4)
    level: Level = "unsafe"
    if older is not None:  # some of them have its settings, and from 3.7 on offer a draft of it, if they are told to
        offered = f"{offered or 'not there'}, of brokers before Kafka 4.0 ({BEFORE_4} is {older})"
    elif offered is None and config.text(OF_CLASSIC) is not None and config.text(OF_KIP_848) is None:
        offered, level = "not there: the brokers are older than KIP-848", "warning"  # or do not tell of some settings
    if offered is not None and (older is not None or "consumer" not in offered.replace(",", " ").split()):
        yield Finding(
            level,
            "the brokers",
            PROTOCOLS,
            offered,
            "consumer among them, as by default from 4.0 on; or leave out group.protocol=consumer",
            "Nothing is consumed: the run ends with BrokerError, or, with brokers before 4.0, waits to be let into its group "
            "and says nothing.",
        )


def _verification(case: Case) -> Iterator[Finding]:
    """X01: brokers that take a record into a transaction that its partition is not a part of."""
    if case.settings.guarantee is not EXO:
        return
    found: dict[str, list[int]] = {}
    for broker, config in case.seen.configs.items():
        verified = config.text(VERIFICATION)
        if verified is None and config.text(OF_TRANSACTIONS) is not None:
            verified = OLDER
        if verified not in (None, "true"):
            found.setdefault(verified, []).append(broker)
    for verified, brokers in found.items():
        yield Finding(
            "warning",
            case.seen.named(brokers),
            VERIFICATION,
            verified,
            "true, as by default from 3.6 on",
            "A record that arrives late opens a transaction that nobody ends, and readers of its partition stand still; or it "
            "becomes part of the next one.",
            f"{VERIFICATION}=true in {SERVER}, restarted one by one" if verified != OLDER else "",
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
    silent: dict[str, list[int]] = {}
    for broker, config in case.seen.configs.items():
        if config.error:
            silent.setdefault(config.error, []).append(broker)
    wanted = sorted({row.setting for row in BROKERS if case.settings.guarantee in row.levels and _asked(case, row)})
    for code, brokers in silent.items():
        denied = code in DENIED
        yield Finding(
            "unknown",
            case.seen.named(brokers),
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
