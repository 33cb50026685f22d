"""The verdict: what happened goes in, figures and broken guarantees come out. Pure: no clock, no file, no Kafka.

What is counted differs, since the guarantees promise different things:

* at-most-once and at-least-once promise how often an offer is *handled*: counted in the effect log, where each beginning of a
  handler has a line. With a store an offer that was sent twice is handled twice only where the worker was killed in between.
* exactly-once promises how often its *output* is there: counted in the output topic, by a reader of committed records. With an
  inbox the output is a row of its database.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .offers import INBOX, STORE, code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_SHOWN = 3  # offers named in a complaint


@dataclass(frozen=True)
class History:
    """What happened under one guarantee. Times are nanoseconds of the monotonic clock.

    Args:
        guarantee: its name.
        tried: offer -> when it was given to the producer.
        acknowledged: offers of which the producer knows that they are written; nobody knows it with ``acks=0``.
        inputs: offers in the input topic, read back by a reader of committed records.
        handled: the effect log: offers and times, one for each time that a handler began.
        outputs: key and value of every record in the output topic, read back by a reader of committed records; of every row
            with an inbox.
        visible: offer -> when its output was first seen by a reader of committed records.
        killed: when the worker was killed.
        seconds: from the first offer sent to the last one finished.
        troubles: what no kill explains: a worker that ended by itself, or did not get to the end.
    """

    guarantee: str
    tried: Mapping[str, int]
    acknowledged: frozenset[str]
    inputs: Sequence[str]
    handled: Sequence[tuple[str, int]]
    outputs: Sequence[tuple[str, str]]
    visible: Mapping[str, int]
    killed: Sequence[int]
    seconds: float
    troubles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figures:
    """A row of the table, and what was broken: nothing, where the guarantee was kept.

    ``again`` is how often a handler ran for an offer that it had run for before; ``unwritten`` is how many offers were tried
    and do not count as sent; ``repeats`` is how many records of the input topic repeat an earlier one.
    """

    guarantee: str
    sent: int
    handled: int
    lost: int
    twice: int
    again: int
    unwritten: int
    repeats: int
    rate: float
    p50: float | None
    p99: float | None
    kills: int
    broken: tuple[str, ...]


def judge(history: History) -> Figures:
    """Count one history."""
    sent = _sent(history)
    began = Counter(offer for offer, _ in history.handled)
    written = Counter(offer for offer, _ in history.outputs)
    done = _effects(history, began, written)
    latencies = sorted(_latencies(history, sent))
    return Figures(
        guarantee=history.guarantee,
        sent=len(sent),
        handled=len(sent & done.keys()),
        lost=len(_lost(history, sent, began, written)),
        twice=len(_repeated(done)),
        again=began.total() - len(began),
        unwritten=len(history.tried.keys() - sent),
        repeats=len(history.inputs) - len(set(history.inputs)),
        rate=len(sent & done.keys()) / history.seconds,
        p50=percentile(latencies, 50),
        p99=percentile(latencies, 99),
        kills=len(history.killed),
        broken=(*history.troubles, *_broken(history, sent, began, written)),
    )


def percentile(ordered: Sequence[float], percent: int) -> float | None:
    """The smallest value that at least ``percent`` percent of the values do not exceed; None without values."""
    if not ordered:
        return None
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def _sent(history: History) -> frozenset[str]:
    return frozenset(history.inputs) if history.guarantee == "at-most-once" else history.acknowledged


def _effects(history: History, began: Counter[str], written: Counter[str]) -> Counter[str]:
    return written if history.guarantee in {"exactly-once", INBOX} else began


def _lost(history: History, sent: frozenset[str], began: Counter[str], written: Counter[str]) -> set[str]:
    """Sent, and not handled; where the guarantee covers the output too, also without output."""
    missing = {
        "at-most-once": sent - began.keys(),
        "at-least-once": sent - (began.keys() & written.keys()),
        STORE: sent - (began.keys() & written.keys()),
        INBOX: sent - written.keys(),
        "exactly-once": sent - written.keys(),
    }
    return set(missing[history.guarantee])


def _repeated(counts: Counter[str]) -> list[str]:
    return [offer for offer, count in counts.items() if count > 1]


def _handled_again_without_a_kill(history: History) -> list[str]:
    """Offers that were handled again while the worker that had handled them lived: it knew them, and so did its store."""
    last: dict[str, int] = {}
    found = []
    for offer, at in history.handled:
        if offer in last and bisect(history.killed, last[offer]) == bisect(history.killed, at):
            found.append(offer)
        last[offer] = at
    return found


def _latencies(history: History, sent: Iterable[str]) -> Iterable[float]:
    """Milliseconds from sending to the first effect."""
    first: dict[str, int] = {}
    for offer, at in history.visible.items() if history.guarantee == "exactly-once" else history.handled:
        first.setdefault(offer, at)
    return ((first[offer] - history.tried[offer]) / 1e6 for offer in sent if offer in first and offer in history.tried)


# -- what each guarantee forbids ------------------------------------------------------------------------------------------


def _broken(history: History, sent: frozenset[str], began: Counter[str], written: Counter[str]) -> list[str]:
    """A sentence for each promise that was not kept."""
    forbidden: dict[str, dict[str, Iterable[str]]] = {
        "at-most-once": {
            "in the topic more than once": _repeated(Counter(history.inputs)),
            "handled more than once": _repeated(began),
            "with more than one output": _repeated(written),
        },
        "at-least-once": {
            "acknowledged and not in the topic": sent - frozenset(history.inputs),
            "acknowledged and never handled": sent - began.keys(),
            "acknowledged and without output": sent - written.keys(),
        },
        STORE: {
            "acknowledged and not in the topic": sent - frozenset(history.inputs),
            "acknowledged and never handled": sent - began.keys(),
            "acknowledged and without output": sent - written.keys(),
            "handled again by a worker that lived": _handled_again_without_a_kill(history),
        },
        INBOX: {
            "acknowledged and not in the topic": sent - frozenset(history.inputs),
            "acknowledged and without a row": sent - written.keys(),
            "with more than one row": _repeated(written),
        },
        "exactly-once": {
            "committed and not in the topic": sent - frozenset(history.inputs),
            "in the topic more than once": _repeated(Counter(history.inputs)),
            "committed and without output": sent - written.keys(),
            "with more than one output": _repeated(written),
        },
    }
    everywhere: dict[str, Iterable[str]] = {
        "handled and never sent": (began.keys() | written.keys() | set(history.inputs)) - _may_arrive(history),
        "with an output that is not f(input)": [offer for offer, value in history.outputs if value != code(offer)],
    }
    found = [_complaint(set(offers), what) for what, offers in {**forbidden[history.guarantee], **everywhere}.items() if offers]
    return found + _no_progress(history, len(sent), len(sent & _effects(history, began, written).keys()))


def _may_arrive(history: History) -> frozenset[str]:
    """What a worker may ever see: an aborted transaction of the sender is not among it."""
    return history.acknowledged if history.guarantee == "exactly-once" else frozenset(history.tried)


def _no_progress(history: History, sent: int, handled: int) -> list[str]:
    """Doing nothing keeps at-most-once to the letter: less than half handled does not count as kept."""
    if not sent:
        return ["nothing was sent"]
    if not history.killed:
        return ["nothing was killed"]
    return [] if 2 * handled >= sent else [f"no progress: {handled} of {sent} handled"]


def _complaint(offers: set[str], what: str) -> str:
    named = ", ".join(sorted(offers)[:_SHOWN])
    return f"{len(offers)} {what} ({named}{', ...' if len(offers) > _SHOWN else ''})"


PROMISES: Mapping[str, Callable[[Figures], str]] = {
    "at-most-once": lambda f: f"none of {f.handled} handled twice ({f.lost} lost, {f.unwritten} not written: allowed)",
    "at-least-once": lambda f: f"none of {f.sent} lost ({f.twice} handled twice: allowed)",
    STORE: lambda f: f"none of {f.sent} lost, {f.repeats} repeats left out ({f.twice} twice, by kills: allowed)",
    INBOX: lambda f: f"each of {f.sent} has one row, {f.repeats} repeats left out ({f.again} more rolled back)",
    "exactly-once": lambda f: f"each of {f.sent} has one output ({f.again} handlings more, in aborted transactions)",
}


def verdict(figures: Figures) -> str:
    """One line: the guarantee was kept, or what was broken."""
    if figures.broken:
        return f"BROKEN  {figures.guarantee}: {'; '.join(figures.broken)}"
    return f"kept    {figures.guarantee}: {PROMISES[figures.guarantee](figures)}"
