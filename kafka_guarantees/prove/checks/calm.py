"""The law about a time in which nothing was wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evidence import FAIL, GROUPS, INVOKE
from .law import Found, check
from .story import by, few

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from .story import Place, Story

ALLOWED = 0.05  # of what is sent in the calm


@check("calm loss")
def calm_loss(story: Story) -> Found:
    """What was sent after the last fault is in the input topic, both groups have begun with it, and it has its outputs.

    M01, P01, L03, H10: at most once may lose while something is wrong, and has no reason to where nothing is. A send that
    certainly failed is not lost; without a calm nothing is judged. A few are tolerated (ALLOWED): a machine that is too busy
    lets requests time out, and those are not sent again.
    """
    calm = story.evidence.calm
    if calm is None:
        return Found(0, ())
    begun = {group: story.handled(group, INVOKE) for group in GROUPS}
    sent = [id_ for id_, send in story.sends.items() if send.at > calm and story.outcomes[id_] != FAIL]
    anomalies = []
    for id_ in sent:
        lacks = list(_lacks(story, id_, begun))
        if lacks:
            send = story.sends[id_]
            seconds = (send.at - calm) / 1e9
            anomalies.append(f"{id_} of {by((send.who, send.life))}, sent {seconds:.1f} s into the calm, {' and '.join(lacks)}")
    return Found(len(sent), anomalies if len(anomalies) > ALLOWED * len(sent) else ())


def _lacks(story: Story, id_: str, begun: Mapping[str, Collection[Place]]) -> Iterator[str]:
    places = story.copies.get(id_)
    if not places:
        yield "is not in the input topic"
        return
    for group in GROUPS:
        if not any(place in begun[group] for place in places):
            yield f"was never begun by the group {group}"
    missing = set.intersection(*(set(story.missing(place)) for place in places))
    if missing:
        yield f"is without {few([f'{id_}/{number}' for number in sorted(missing)])}"
