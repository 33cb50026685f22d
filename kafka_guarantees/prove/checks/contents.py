"""Laws about what is in a record, and where an output goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evidence import INVOKE
from .law import Found, check
from .story import by, named, spot, where

if TYPE_CHECKING:
    from .story import Story


@check("altered record")
def altered_record(story: Story) -> Found:
    """A record is everywhere what was sent: key, value and headers; and an output is in the partition that it was sent to.

    P01, P02, C01: what is in the input topic is what was given to the library, a handler is given what is there, and its
    outputs are what it made of that. What has no content, or is compared with nothing, is not judged.
    """
    looks = (_records(story), _handlings(story), _outputs(story), _partitions(story))
    return Found(sum(look.examined for look in looks), [line for look in looks for line in look.anomalies])


def _records(story: Story) -> Found:
    examined, anomalies = 0, []
    for place, seen in story.source.items():
        send = story.sends.get(seen.id)
        if send is None or send.content is None or seen.content is None:
            continue
        examined += 1
        if seen.content != send.content:
            anomalies.append(
                f"{seen.id} at {spot(place)} of the input topic has the content {seen.content}, and "
                f"{by((send.who, send.life))} sent {send.content}"
            )
    return Found(examined, anomalies)


def _handlings(story: Story) -> Found:
    examined, anomalies = 0, []
    for steps in story.steps.values():
        for step in steps:
            seen = story.source.get(step.place)
            if step.type != INVOKE or step.content is None or seen is None or seen.content is None:
                continue
            examined += 1
            if step.content != seen.content:
                anomalies.append(
                    f"{step.id} at {spot(step.place)} is handled by {by(step.life)} with the content {step.content}; in the "
                    f"input topic it has {seen.content}"
                )
    return Found(examined, anomalies)


def _outputs(story: Story) -> Found:
    examined, anomalies = 0, []
    for place, outputs in story.outputs.items():
        origin = story.source.get(place)
        if origin is None or origin.content is None:
            continue
        for seen in outputs:
            if seen.content is None:
                continue
            examined += 1
            if seen.content != origin.content:
                anomalies.append(
                    f"output {seen.id} at {spot(where(seen))} has the content {seen.content}; its message at {spot(place)} "
                    f"has {origin.content}"
                )
    return Found(examined, anomalies)


def _partitions(story: Story) -> Found:
    partitions = story.evidence.partitions
    if partitions is None:
        return Found(0, ())
    examined, anomalies = 0, []
    for place, outputs in story.outputs.items():
        for seen in outputs:
            number = named(seen.id)[1]
            if number is None:
                continue
            examined += 1
            target = (place[0] + number) % partitions
            if seen.partition != target:
                anomalies.append(
                    f"output {seen.id} at {spot(where(seen))}, for the message at {spot(place)}, was sent to partition {target}"
                )
    return Found(examined, anomalies)
