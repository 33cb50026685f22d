"""Laws about who handled what, and when."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from ..evidence import GROUPS, INVOKE, OK
from .law import Found, check
from .story import by, few, group_of, spot

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..evidence import Sample
    from .story import Life, Place, Step, Story


@check("handled more than once")
def handled_more_than_once(story: Story) -> Found:
    """No group begins to handle a message twice.

    M01-M05: whatever became of the first time, a second one is one too many.
    """
    begun: dict[tuple[str, Place], list[Step]] = {}
    for group, steps in story.steps.items():
        for step in steps:
            if step.type == INVOKE:
                begun.setdefault((group, step.place), []).append(step)
    anomalies = [
        f"{steps[0].id} at {spot(place)} is handled {len(steps)} times by the group {group}: {few([by(s.life) for s in steps])}"
        for (group, place), steps in begun.items()
        if len(steps) > 1
    ]
    return Found(len(begun), anomalies)


@check("unseen")
def unseen(story: Story) -> Found:
    """Every record of the input topic was handled to its end by both groups.

    L01, L02, P03, H10. All of them, since a run drains before it ends.
    """
    anomalies = []
    for group in GROUPS:
        done = story.handled(group)
        anomalies += [
            f"{seen.id} at {spot(place)} was never handled to its end by the group {group}"
            for place, seen in story.source.items()
            if place not in done
        ]
    return Found(len(GROUPS) * len(story.source), anomalies)


@check("poll skip")
def poll_skip(story: Story) -> Found:
    """When a handler begins, its group has handled everything before that message to its end.

    C01, C02, L01, X13: a message that was fetched and lost, or jumped over, even where a later life finds it again. Each
    message that was skipped is told once. A handling counts as well where only a record which the handler returned cannot be
    written: that is known when later messages are handled, and then nothing of it is committed (L03, X05).
    """
    offsets: dict[int, list[int]] = {}
    for partition, offset in story.source:
        offsets.setdefault(partition, []).append(offset)
    anomalies: list[str] = []
    examined = 0
    for group, steps in story.steps.items():
        examined += sum(1 for step in steps if step.type == INVOKE)
        anomalies += _skips(story, group, steps, offsets)
    return Found(examined, anomalies)


def _skips(story: Story, group: str, steps: Sequence[Step], offsets: Mapping[int, Sequence[int]]) -> Iterator[str]:
    done: set[Place] = set()
    reached = dict.fromkeys(offsets, 0)  # everything before that index is handled, or was told
    for step in steps:
        partition, offset = step.place
        if step.type == OK or step.refused:
            done.add(step.place)
        if step.type != INVOKE or partition not in offsets:
            continue
        index = reached[partition]
        for before in offsets[partition][index : bisect_left(offsets[partition], offset, index)]:
            place = (partition, before)
            if place not in done:
                yield (
                    f"{step.id} at {spot(step.place)} is handled by {by(step.life)}, while nobody of the group {group} has "
                    f"handled {story.source[place].id} at {spot(place)} to its end"
                )
            reached[partition] += 1


@check("non-monotonic poll")
def non_monotonic_poll(story: Story) -> Found:
    """What a group had committed before a process began is not handled by that process.

    M01, C02, X08: work that was finished is done again by a newcomer. Under at-most-once, besides, one process never goes back
    in a partition; under the others that is what happens after an abort.
    """
    examined, anomalies = 0, []
    for group, steps in story.steps.items():
        floors = _committed_before(story, group)
        last: dict[tuple[Life, int], int] = {}
        for step in steps:
            if step.type != INVOKE:
                continue
            examined += 1
            partition, offset = step.place
            floor = floors.get(step.life, {}).get(partition, 0)
            if offset < floor:
                anomalies.append(
                    f"{step.id} at {spot(step.place)} is handled by {by(step.life)}, which began when the group {group} had "
                    f"committed {spot((partition, floor))}"
                )
            highest = last.get((step.life, partition), -1)
            if story.guarantee == "at-most-once" and offset <= highest:
                anomalies.append(
                    f"{by(step.life)} goes back from {spot((partition, highest))} to {step.id} at {spot(step.place)}"
                )
            last[step.life, partition] = max(highest, offset)
    return Found(examined, anomalies)


def _committed_before(story: Story, group: str) -> dict[Life, dict[int, int]]:
    """For each process of a group, the highest offsets that were known to be committed before it began."""
    lives = sorted((at, life) for life, at in story.lives.items() if group_of(life[0]) == group)
    samples: Sequence[Sample] = sorted(story.evidence.samples.get(group, ()), key=lambda sample: sample.answered)
    known: dict[int, int] = {}
    floors, index = {}, 0
    for at, life in lives:
        while index < len(samples) and samples[index].answered < at:
            for partition, offset in samples[index].offsets.items():
                known[partition] = max(known.get(partition, 0), offset)
            index += 1
        floors[life] = dict(known)
    return floors


@check("precommitted read")
def precommitted_read(story: Story) -> Found:
    """Nobody handles a record before the block of its transaction was about to be left in order.

    X08, H03: a member with read_uncommitted. A transaction of which nobody ever asked the commit cannot be committed.
    """
    examined, anomalies = 0, []
    for steps in story.steps.values():
        for step in steps:
            send = story.sends.get(step.id)
            if step.type != INVOKE or send is None or send.transaction is None:
                continue
            examined += 1
            committing = story.transactions[send.transaction].committing
            if committing is None or step.at < committing:
                when = (
                    "is never committed" if committing is None else f"is committed {(committing - step.at) / 1e6:.1f} ms later"
                )
                anomalies.append(
                    f"{step.id} at {spot(step.place)} is handled by {by(step.life)}; its transaction {send.transaction} of "
                    f"{by((send.who, send.life))} {when}"
                )
    return Found(examined, anomalies)
