"""Laws about what is in the topics, when everything is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evidence import FAIL, INVOKE, OK
from .law import Found, check
from .story import NUMBERS, by, few, named, spot, where

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..evidence import Seen
    from .story import Life, Place, Story

UNANSWERED = 10_000_000_000  # nanoseconds before a broker leaves: what was sent in them may be without its answer then


@check("lost write")
def lost_write(story: Story) -> Found:
    """Every record that was acknowledged, or whose transaction was committed, is in the input topic.

    P01, P05: a record of which the library said that it is safe. One of unknown outcome may be missing (H04).
    """
    safe = [id_ for id_, outcome in story.outcomes.items() if outcome == OK]
    return Found(len(safe), [f"{_sent(story, id_)} and is not in the input topic" for id_ in safe if id_ not in story.copies])


def _sent(story: Story, id_: str) -> str:
    send = story.sends[id_]
    how = "was acknowledged" if send.transaction is None else f"was committed in transaction {send.transaction}"
    return f"{id_} of {by((send.who, send.life))} {how}"


@check("duplicate")
def duplicate(story: Story) -> Found:
    """No record is at two places of the input topic, and no output at two places of the output topic.

    M01, P08, X01, X09: written again after an outcome that nobody knew, or consumed again after it was committed. Not asked of
    at-least-once, which allows it, nor of what a broker of ``acks=1`` owed an answer for as it left (P06, see ``_owed``).
    """
    sink: dict[tuple[str, Place | None], list[Place]] = {}
    for seen in story.evidence.sink.committed:
        copied = _owed(story, named(seen.id)[0])  # then each copy of the message has outputs of its own
        sink.setdefault((seen.id, seen.origin if copied else None), []).append(where(seen))
    found = [("input", id_, places) for id_, places in story.copies.items() if not _owed(story, id_)]
    found += [("output", id_, places) for (id_, _origin), places in sink.items()]
    anomalies = [
        f"{id_} is at {few([spot(place) for place in sorted(set(places))])} of the {topic} topic"
        for topic, id_, places in found
        if len(set(places)) > 1
    ]
    return Found(len(story.source) + len(story.evidence.sink.committed), anomalies)


def _owed(story: Story, id_: str) -> bool:
    """Whether librdkafka may have sent a record of at-most-once again: its broker left before it had answered (P06)."""
    send = story.sends.get(id_)
    if send is None or story.guarantee != "at-most-once":
        return False
    return any(0 <= left - send.at <= UNANSWERED for left in story.left.get((send.who, send.life), ()))


@check("aborted read")
def aborted_read(story: Story) -> Found:
    """Nothing that certainly failed, or was certainly aborted, can be read, and nobody handles it.

    G1a; X05, X08, X13, H03. A record whose send or transaction failed; under exactly-once also the output of an attempt that
    was aborted. Only a definite failure counts (H04). But what was handled under exactly-once, or has an output, must be there
    for readers of committed records in the end, whatever its sender knows.
    """
    failed = {id_ for id_, outcome in story.outcomes.items() if outcome == FAIL}
    anomalies = [
        f"{id_} of {_sender(story, id_)} failed, and is at {spot(places[0])} of the input topic"
        for id_, places in story.copies.items()
        if id_ in failed
    ]
    handlers = (step for steps in story.steps.values() for step in steps if step.type == INVOKE and step.id in failed)
    anomalies += [f"{step.id} failed, and is handled at {spot(step.place)} by {by(step.life)}" for step in handlers]
    if not story.exactly_once:
        return Found(len(failed), anomalies)
    steps = [step for steps in story.steps.values() for step in steps if step.type == INVOKE]
    anomalies += [
        f"{step.id} was not committed, and is handled at {spot(step.place)} by {by(step.life)}"
        for step in steps
        if step.place not in story.source and step.id not in failed
    ]
    anomalies += [
        f"{seen.id} is visible at {spot(where(seen))} of the output topic, and its message at {spot(place)} was not committed"
        for place, outputs in story.outputs.items()
        if place not in story.source
        for seen in outputs
    ]
    anomalies += [
        f"{seen.id} is visible at {spot(where(seen))} of the output topic, but of its attempt {seen.attempt} is known: "
        f"{story.aborted[seen.attempt]}"
        for seen in story.evidence.sink.committed
        if seen.attempt is not None and seen.attempt in story.aborted
    ]
    return Found(len(failed) + len(story.aborted) + len(steps), anomalies)


def _sender(story: Story, id_: str) -> str:
    send = story.sends[id_]
    return by((send.who, send.life)) + (f" in transaction {send.transaction}" if send.transaction else "")


@check("torn transaction")
def torn_transaction(story: Story) -> Found:
    """A transaction is visible with all of its records or with none, and with the offsets of what it consumed.

    X01, X02, X05, X09, X10. Of a sender's transaction, whatever its outcome, all records are in the input topic or none. A
    message has all of its outputs, made by one attempt, where the group has committed it, and none where it has not.
    """
    anomalies = [*_torn_sends(story), *_torn_handlings(story)]
    return Found(sum(1 for transaction in story.transactions.values() if transaction.ids) + len(story.source), anomalies)


def _torn_sends(story: Story) -> Iterator[str]:
    for name, transaction in story.transactions.items():
        missing = [id_ for id_ in transaction.ids if id_ not in story.copies]
        if 0 < len(missing) < len(transaction.ids):
            yield (
                f"transaction {name} of {by(transaction.life)} ({transaction.outcome}) is in the input topic without "
                f"{len(missing)} of its {len(transaction.ids)} records: {few(missing)}"
            )


def _torn_handlings(story: Story) -> Iterator[str]:
    for place, seen in story.source.items():
        outputs = story.outputs.get(place, ())
        attempts = sorted({str(output.attempt) for output in outputs})
        what = f"{seen.id} at {spot(place)}"
        missing = story.missing(place)
        if outputs and not story.below(place):
            yield f"{what} is not committed by the transformers, and has outputs: {_listed(outputs)}"
        elif story.below(place) and missing:
            yield f"{what} is committed by the transformers, without {_absent(seen.id, missing)}; it has: {_listed(outputs)}"
        if len(attempts) > 1:
            yield f"{what} has outputs of {len(attempts)} attempts: {_listed(outputs)}"


def _absent(id_: str, numbers: Sequence[int]) -> str:
    return few([f"{id_}/{number}" for number in numbers])


def _listed(outputs: Sequence[Seen]) -> str:
    return few([f"{output.id} at {spot(where(output))} by attempt {output.attempt}" for output in outputs]) or "none"


@check("lost output")
def lost_output(story: Story) -> Found:
    """Every message that the transformers have committed has each of its outputs in the output topic.

    P01, L01, L03: an offset that moved past a record that no broker had. More than one of each is allowed.
    """
    below = [(place, seen) for place, seen in story.source.items() if story.below(place)]
    anomalies = []
    for place, seen in below:
        missing = story.missing(place)
        if missing:
            anomalies.append(
                f"{seen.id} at {spot(place)} is committed by the transformers, without {_absent(seen.id, missing)}"
            )
    return Found(len(below), anomalies)


@check("inconsistent offset")
def inconsistent_offset(story: Story) -> Found:
    """Everybody finds the same record at a place, it was sent once upon a time, and an output belongs to its message.

    Both readers, the acknowledgement and every handler; otherwise a log was cut, or the harness mixes things up (H02). An id
    that no sender has used is a phantom.
    """
    evidence, anomalies = story.evidence, []
    inputs: dict[Place, tuple[str, str]] = {}
    outputs: dict[Place, tuple[str, str]] = {}
    for who, view, found in (
        ("the committed reader", evidence.source.committed, inputs),
        ("the uncommitted reader", evidence.source.uncommitted, inputs),
        ("the committed reader", evidence.sink.committed, outputs),
        ("the uncommitted reader", evidence.sink.uncommitted, outputs),
    ):
        anomalies += [line for seen in view for line in _differs(found, where(seen), seen.id, who)]
    for event in story.acknowledged:
        if event.partition is not None and event.offset is not None and event.id is not None:
            who = f"the acknowledgement to {by((event.who, event.life))}"
            anomalies += _differs(inputs, (event.partition, event.offset), event.id, who)
    for steps in story.steps.values():
        for step in steps:
            if step.type == INVOKE:
                anomalies += _differs(inputs, step.place, step.id, f"the handler of {by(step.life)}")
    anomalies += [
        f"{id_} at {spot(place)} of the input topic was never sent, says {who}"
        for place, (id_, who) in inputs.items()
        if id_ not in story.sends
    ]
    made = {where(seen): seen for view in (evidence.sink.committed, evidence.sink.uncommitted) for seen in view}
    anomalies += [line for seen in made.values() for line in _stray(story, inputs, seen)]
    return Found(len(inputs) + len(made), anomalies)


def _differs(found: dict[Place, tuple[str, str]], place: Place, id_: str, who: str) -> Iterator[str]:
    before, said = found.setdefault(place, (id_, who))
    if before != id_:
        yield f"at {spot(place)} is {before}, says {said}, and {id_}, says {who}"


def _stray(story: Story, inputs: Mapping[Place, tuple[str, str]], seen: Seen) -> Iterator[str]:
    what = f"output {seen.id} at {spot(where(seen))}"
    id_, number = named(seen.id)
    if number not in NUMBERS or id_ not in story.sends:
        yield f"{what} belongs to no record that was sent"
    elif seen.origin is None or seen.origin not in inputs:
        yield f"{what} is said to come from {spot(seen.origin) if seen.origin else 'nowhere'}, where no record is"
    elif inputs[seen.origin][0] != id_:
        yield f"{what} is said to come from {spot(seen.origin)}, where {inputs[seen.origin][0]} is"


@check("order per key")
def order_per_key(story: Story) -> Found:
    """Records of one key stay in the order in which a sender sent them, and outputs in the order of their messages.

    P02, X13. Input topic: in one life of a sender, the records of one key are in one partition, in order. Output topic: the
    outputs with one number, for the messages of one partition, are in the order of these. Where repeats are allowed, the first
    of them counts, and messages whose handling failed are left out, as are outputs that an earlier attempt was to have written
    (it was not acknowledged, so that its message was handled again): they may come after those of later messages.
    """
    anomalies = [*_disorder_of_sends(story), *_disorder_of_outputs(story)]
    return Found(len(story.source) + len(story.evidence.sink.committed), anomalies)


def _disorder_of_sends(story: Story) -> Iterator[str]:
    last: dict[tuple[Life, str], tuple[int, Place, str]] = {}
    for id_, (place, *_) in story.copies.items():
        send = story.sends.get(id_)
        if send is None or send.key is None or send.number is None:
            continue
        stream = ((send.who, send.life), send.key)
        number, before, other = last.get(stream, (-1, place, id_))
        if place[0] != before[0]:
            yield f"key {send.key} of {by(stream[0])} is in two partitions: {other} at {spot(before)}, {id_} at {spot(place)}"
        elif send.number < number:
            yield f"{id_} at {spot(place)} comes after {other} at {spot(before)}, but {by(stream[0])} sent it first"
        if place[0] != before[0] or send.number > number:
            last[stream] = (send.number, place, id_)


def _disorder_of_outputs(story: Story) -> Iterator[str]:
    last: dict[tuple[int, int, int | None], tuple[int, Seen]] = {}
    done: set[tuple[Place, int | None]] = set()
    failed = set() if story.exactly_once else {step.place for step in story.steps["transformer"] if step.type == FAIL}
    first: dict[Place, str | None] = {}
    for step in story.steps["transformer"]:
        if step.type == INVOKE:
            first.setdefault(step.place, step.attempt)
    for seen in sorted(story.evidence.sink.committed, key=where):
        number = named(seen.id)[1]
        if seen.origin is None or seen.origin in failed or (not story.exactly_once and (seen.origin, number) in done):
            continue
        done.add((seen.origin, number))
        partition, offset = seen.origin
        stream = (seen.partition, partition, number)
        highest, before = last.get(stream, (-1, seen))
        if offset <= highest and not story.exactly_once and seen.attempt != first.get(seen.origin):
            continue
        if offset <= highest:
            yield (
                f"output {seen.id} at {spot(where(seen))}, for the message at {spot(seen.origin)}, comes after "
                f"{before.id} at {spot(where(before))}, for that at {spot((partition, highest))}"
            )
        else:
            last[stream] = (offset, seen)
