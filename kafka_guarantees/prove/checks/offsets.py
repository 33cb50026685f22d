"""Laws about what the groups have committed: on the way, and at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evidence import FAIL, GROUPS, INVOKE, OK, OUTPUTS
from .law import Found, check
from .story import few, spot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .story import Place, Story

STALE = 1_000_000_000  # ns: a broker that is just waking may answer once from the past; what lasts longer is not that
ENOUGH = 100  # records: fewer prove nothing (H10)
AT_MOST_ONCE_HANDLES = 0.8  # of the records, and writes of the outputs: a library that does nothing never does it twice (H10)
AT_MOST_ONCE_WRITES = 0.5  # of what was sent: acks=0 loses whatever is on its way to a broker that dies


@check("offset regression")
def offset_regression(story: Story) -> Found:
    """What a group has committed never goes back, for a second or longer.

    C04, M03, X02: a member that was thrown out commits what it knew. A partition that a sample does not have is not judged by
    it (H08), and a single answer from the past is not an anomaly.
    """
    examined, anomalies = 0, []
    for group, samples in story.evidence.samples.items():
        highest: dict[int, int] = {}
        since: dict[int, int] = {}  # partition -> when it was first seen below its highest, until it is back
        told: set[int] = set()
        for sample in samples:
            for partition, offset in sample.offsets.items():
                examined += 1
                if offset >= highest.get(partition, 0):
                    highest[partition] = offset
                    since.pop(partition, None)
                    told.discard(partition)
                    continue
                seconds = (sample.answered - since.setdefault(partition, sample.answered)) / 1e9
                if seconds * 1e9 >= STALE and partition not in told:
                    told.add(partition)
                    anomalies.append(
                        f"the group {group} went back from {spot((partition, highest[partition]))} to "
                        f"{spot((partition, offset))}, for {seconds:.1f} s or longer"
                    )
    return Found(examined, anomalies)


@check("drained")
def drained(story: Story) -> Found:
    """At the end both groups have committed everything, and no transaction is left open.

    H07. A lag or an open transaction (X24) would keep most other laws to the letter.
    """
    ends: dict[int, Place] = {place[0]: place for place in story.source}
    anomalies = [line for group in GROUPS for line in _lag(story, group, ends)]
    for topic, view in (("input", story.evidence.source), ("output", story.evidence.sink)):
        if view.unfinished:
            anomalies.append(f"a transaction is left open in partition {few(sorted(view.unfinished))} of the {topic} topic")
    return Found(len(GROUPS) * len(ends), anomalies)


def _lag(story: Story, group: str, ends: dict[int, Place]) -> Iterator[str]:
    if not story.evidence.samples.get(group):
        yield f"nobody knows what the group {group} has committed"
        return
    for partition, place in sorted(ends.items()):
        committed = story.committed[group].get(partition)
        if committed is None or committed <= place[1]:
            reached = "nothing" if committed is None else spot((partition, committed))
            yield f"the group {group} has committed {reached}, and the last record is {story.source[place].id} at {spot(place)}"


@check("activity")
def activity(story: Story) -> Found:
    """Enough has happened to say anything.

    H10. A library that does nothing would keep nearly all other laws to the letter: it must not pass.
    """
    lacking: list[str] = []
    if len(story.copies) < ENOUGH:
        lacking.append(f"{len(story.copies)} records are in the input topic: fewer than {ENOUGH} prove nothing")
    if story.guarantee == "at-most-once":
        lacking += _lost_to_faults(story)
        calm = story.evidence.calm
        if calm is None or not any(send.at > calm and story.outcomes[id_] != FAIL for id_, send in story.sends.items()):
            lacking.append("nothing was sent after the faults, while nothing was wrong")
    else:
        safe = sum(outcome == OK for outcome in story.outcomes.values())
        if safe < ENOUGH:
            lacking.append(f"{safe} records were acknowledged, or known to be committed: fewer than {ENOUGH} could be lost")
    return Found(len(story.copies), (), lacking)


def _lost_to_faults(story: Story) -> Iterator[str]:
    for group in GROUPS:
        handled = len(story.handled(group, INVOKE) & story.source.keys())
        if handled < AT_MOST_ONCE_HANDLES * len(story.source):
            yield f"{handled} of {len(story.source)} records were handled by the group {group}: too few to prove anything"
    done = story.handled("transformer")
    made = sum(OUTPUTS - len(story.missing(place)) for place in done)
    if made < AT_MOST_ONCE_HANDLES * OUTPUTS * len(done):
        yield (
            f"{made} of {OUTPUTS * len(done)} outputs of what the transformers have handled are in the output topic: too few "
            "to prove anything"
        )
    written = len(story.sends.keys() & story.copies.keys())
    if written < AT_MOST_ONCE_WRITES * len(story.sends):
        yield f"{written} of {len(story.sends)} records that were sent are in the input topic: too few to prove anything"
