"""What a guarantee needs of topics: a table. No I/O.

Rules. A row says what is needed, None where it is so already. Its level is that of the guarantee; a guarantee that is not in a
row does not need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .case import (
    ALO,
    AMO,
    DATA,
    DAY,
    DEAD_LETTERS,
    EXO,
    IN_SYNC,
    KEPT,
    OUTCOMES,
    POSITION,
    POSITIONS,
    REPLICAS,
    TRANSACTED,
    WEEK,
    Needed,
    span,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .case import Case, Levels
    from .seen import Topic

DEAD_LETTER_HEADERS = 8 * 1024  # bytes that a dead letter is larger than its message
BEFORE, AFTER = "message.timestamp.before.max.ms", "message.timestamp.after.max.ms"
DIFFERENCE = "message.timestamp.difference.max.ms"  # before Kafka 4.0: where BEFORE and AFTER are not set, or not there
NO_LIMIT = 2**63 - 1  # what these say of any time at all
FETCH_OVERHEAD = 512  # bytes that librdkafka adds to what it fetches


class Row(NamedTuple):
    """One setting of topics of one role."""

    role: str
    setting: str
    levels: Levels
    needed: Callable[[Case, Topic], Needed | None]
    why: str
    replicated: bool = False  # it takes REPLICAS brokers to be right


def _in_sync(case: Case, topic: Topic) -> Needed | None:
    number, seen = topic.config.number("min.insync.replicas"), None
    numbers = case.seen.numbers("min.insync.replicas")
    if "min.insync.replicas" in topic.config.inherited and len(set(numbers.values())) > 1:  # that of its leader counts
        number = min(numbers.values())
        seen = f"{number}, of {case.seen.named([broker for broker in numbers if numbers[broker] == number])}"
    if number is None or (topic.replicas == 1 and case.seen.brokers < REPLICAS):
        return None  # the one copy is reported already, and cannot be mended there
    if number < IN_SYNC:
        return Needed(f"{IN_SYNC} or more", str(IN_SYNC), seen=seen)
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
    time = kept(topic)
    minutes = min(case.seen.numbers("offsets.retention.minutes").values(), default=None)
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


def _deleted(_case: Case, topic: Topic) -> Needed | None:
    return Needed("compact", "compact") if "delete" in (topic.config.text("cleanup.policy") or "") else None


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


def _takes_old_dead_letters(case: Case, topic: Topic) -> Needed | None:
    return _takes_times(topic, BEFORE, _oldest(case), "as long as messages are kept")


def _takes_dead_letters_of_any_time(case: Case, topic: Topic) -> Needed | None:
    if topic.config.number(BEFORE) not in (None, NO_LIMIT):
        return None  # which counts then
    return _takes_times(topic, DIFFERENCE, _oldest(case), "as long as messages are kept")


def _takes_future_dead_letters(case: Case, topic: Topic) -> Needed | None:
    inputs = [one for one in case.inputs.values() if not _by_arrival(one)]
    limits = [limit for one in inputs if (limit := one.config.number(AFTER)) is not None]
    return _takes_times(topic, AFTER, max(limits, default=0), "as much as for messages")


def _oldest(case: Case) -> int:
    """Milliseconds that messages are kept."""
    ages = [NO_LIMIT if time < 0 else time for one in case.inputs.values() if (time := kept(one)) is not None]
    return max(ages, default=0)


def _takes_times(topic: Topic, setting: str, need: int, what: str) -> Needed | None:
    limit = topic.config.number(setting)
    if limit is None or limit >= need or _by_arrival(topic):
        return None
    least = "without a limit" if need == NO_LIMIT else f"{span(need)} or more"
    return Needed(f"{what}, {least}; or message.timestamp.type=LogAppendTime", str(need), seen=span(limit))


def _by_arrival(topic: Topic) -> bool:
    return topic.config.text("message.timestamp.type") == "LogAppendTime"


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
        DEAD_LETTERS,
        BEFORE,
        {AMO: "info", ALO: "warning", EXO: "warning"},
        _takes_old_dead_letters,
        "A dead letter has the timestamp of its message: one that is older is refused, and the consumer stops at it.",
    ),
    Row(
        DEAD_LETTERS,
        DIFFERENCE,
        {AMO: "info", ALO: "warning", EXO: "warning"},
        _takes_dead_letters_of_any_time,
        "A dead letter has the timestamp of its message: one that is older is refused, and the consumer stops at it.",
    ),
    Row(
        DEAD_LETTERS,
        AFTER,
        {AMO: "info", ALO: "warning", EXO: "warning"},
        _takes_future_dead_letters,
        "A dead letter has the timestamp of its message: one further in the future is refused, and the consumer stops at it.",
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
        POSITIONS,
        "cleanup.policy",
        POSITION,
        _deleted,
        "Committed offsets are deleted in time, which shows when another broker reads them: the group begins anew.",
    ),
    Row(
        OUTCOMES,
        "min.insync.replicas",
        TRANSACTED,
        _in_sync,
        "The outcome of a transaction has a single copy: when it is lost, the transaction is torn.",
        replicated=True,
    ),
    Row(
        OUTCOMES,
        "unclean.leader.election.enable",
        TRANSACTED,
        _clean,
        "The outcomes of transactions are lost when a replica that is behind becomes leader: a transaction is torn.",
        replicated=True,
    ),
    Row(
        OUTCOMES,
        "cleanup.policy",
        TRANSACTED,
        _deleted,
        "The outcomes of transactions are deleted in time, which shows when another broker reads them: one is torn, or its "
        "producer forgotten.",
    ),
)

LOST_WITH_A_BROKER = {
    DATA: (KEPT, "The topic is gone with its broker, and every message in it."),
    DEAD_LETTERS: (KEPT, "The dead letters are gone with their broker."),
    POSITIONS: (POSITION, "The committed offsets are gone with their broker: messages are handled again."),
    OUTCOMES: (TRANSACTED, "The outcomes of transactions are gone with their broker: none can be ended."),
}
