"""How much happened: the numbers for the report."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..evidence import FAIL, INFO, INVOKE, OK
from .story import where

if TYPE_CHECKING:
    from .story import Story


def count(story: Story) -> dict[str, int]:
    """Counts, by names for people. What is said of messages is said of the transformers' group."""
    evidence = story.evidence
    outcomes = Counter(story.outcomes.values())
    transactions = Counter(transaction.outcome for transaction in story.transactions.values())
    steps = Counter(step.type for step in story.steps["transformer"])
    begun, done = story.handled("transformer", INVOKE), story.handled("transformer")
    visible = {where(seen) for seen in evidence.sink.committed}
    ended = {(event.who, event.life) for event in evidence.events if event.what == "life" and event.type != INVOKE}
    of_transactions = {
        "transactions committed": transactions[OK],
        "transactions aborted": transactions[FAIL],
        "transactions unknown": transactions[INFO],
    }
    return {
        "ids sent": len(story.sends),
        "acknowledged": outcomes[OK],
        "failed": outcomes[FAIL],
        "unknown": outcomes[INFO],
        **(of_transactions if story.transactions else {}),
        "records in the input topic": len(story.source),
        "records in the output topic (committed)": len(visible),
        "records in the output topic (aborted)": len({where(seen) for seen in evidence.sink.uncommitted} - visible),
        "messages handled": len(done),
        "handled again": steps[INVOKE] - len(begun),
        "not handled": len(story.source.keys() - done),
        "handlers that raised": steps[FAIL],
        "handlers cut short": steps[INVOKE] - steps[OK] - steps[FAIL],
        "lives": len(story.lives),
        "lives cut short": len(story.lives.keys() - ended),
    }
