"""What must hold under each guarantee, and who judges it. Pure: evidence goes in, verdicts and figures come out.

The names of the checks are those of Jepsen's Kafka workload, where it has them. All checks look at one ``Story``, which is told
once, so that a run of a million events is judged in seconds. ``writes`` has the laws about what is in the topics, ``handling``
those about who handled what, and when, ``offsets`` those about what the groups have committed, ``contents`` that about what is
in the records, ``calm`` that about a time in which nothing was wrong.

Not checked, since Kafka allows it: G0, G1c with ww edges, internal send skips.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from .calm import calm_loss
from .contents import altered_record
from .figures import count
from .handling import handled_more_than_once, non_monotonic_poll, poll_skip, precommitted_read, unseen
from .law import Check
from .offsets import activity, drained, offset_regression
from .story import tell
from .writes import aborted_read, duplicate, inconsistent_offset, lost_output, lost_write, order_per_key, torn_transaction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..evidence import Evidence, Verdict

__all__ = ["LAWS", "Check", "verdict_and_figures"]

_ALL = (altered_record, aborted_read, inconsistent_offset, drained, activity)
# a commit that arrives late may set a group back: at-least-once handles again then, as it may
_FORWARD = (offset_regression, non_monotonic_poll)

LAWS: Mapping[str, tuple[Check, ...]] = MappingProxyType(
    {
        "at-most-once": (duplicate, handled_more_than_once, calm_loss, *_FORWARD, *_ALL),
        "at-least-once": (lost_write, lost_output, unseen, poll_skip, order_per_key, *_ALL),
        "exactly-once": (
            lost_write,
            duplicate,
            torn_transaction,
            precommitted_read,
            unseen,
            poll_skip,
            order_per_key,
            *_FORWARD,
            *_ALL,
        ),
    }
)


def verdict_and_figures(evidence: Evidence) -> tuple[list[Verdict], dict[str, int]]:
    """What every check of the guarantee has found; and how much happened: counts, by names for people."""
    story = tell(evidence)
    return [check.on(story) for check in LAWS[story.guarantee]], count(story)
