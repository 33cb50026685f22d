"""What ``explain()`` returns: the effective settings, who set them and why, as a table or as data. No secrets (S01)."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from .presets import Guarantee

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BY_LOCK = "guarantee (locked)"
BY_GUARANTEE = "guarantee"
BY_USER = "you"
BY_LIBRDKAFKA = "librdkafka"

STARTS = {
    Guarantee.AT_MOST_ONCE: ("latest", "the only start that can never handle a message twice"),
    Guarantee.AT_LEAST_ONCE: ("earliest", "a new group begins with the first message there is: none is missed"),
    Guarantee.EXACTLY_ONCE: ("earliest", "a new group begins with the first message there is: none is missed"),
}

COMMITTED = {
    Guarantee.AT_MOST_ONCE: ("before", "handled at most once: the offsets move before the handler runs"),
    Guarantee.AT_LEAST_ONCE: ("after", "the offsets move when the handler is done and its records are acknowledged"),
    Guarantee.EXACTLY_ONCE: ("with", "offsets and records are in one transaction"),
}

PROMISES = {
    Guarantee.AT_MOST_ONCE: "No message is handled twice; some may not be handled at all.",
    Guarantee.AT_LEAST_ONCE: "Every message is handled and no acknowledged record is lost; some may be handled twice.",
    Guarantee.EXACTLY_ONCE: "The records that a handler returns appear once, together with the offsets they came from.",
}

_EVERYWHERE = "Surviving the power loss of all replicas at once: Kafka acknowledges before a disk has it."
NOT_PROMISED = {
    Guarantee.AT_MOST_ONCE: (
        "Up to one portion is lost when the process dies; a handler that raises is not called again.",
        "A record that produce() took may be lost without an error.",
        "An event that its producer wrote twice is handled twice: Kafka cannot know.",
    ),
    Guarantee.AT_LEAST_ONCE: (
        "Handling once: a handler must bear repeats. Even the idempotent producer can write duplicates.",
        "An event that its producer wrote twice is handled twice: Kafka cannot know.",
        _EVERYWHERE,
    ),
    Guarantee.EXACTLY_ONCE: (
        "Effects outside Kafka (mail, HTTP, databases): a handler may run again after an abort.",
        "Readers with isolation.level=read_uncommitted see records of aborted transactions.",
        "Isolation between transactions, and more than one cluster in one transaction.",
        "An event that its producer wrote twice is handled twice: Kafka cannot know.",
        _EVERYWHERE,
    ),
}

# Rows of explain() for what librdkafka decides and a reader of the guarantee asks for.
NOTABLE = {
    "acks": "replicas that must have a record before it counts",
    "max.in.flight": "requests under way per connection",
    "delivery.timeout.ms": "how long a record is tried",
    "linger.ms": "how long a record waits for company",
    "isolation.level": "whether records of aborted transactions are handled",
    "check.crcs": "whether damaged records are noticed",
    "socket.timeout.ms": "how long a request is waited for",
    "group.protocol": "classic, or consumer for KIP-848",
    "session.timeout.ms": "silence after which the group counts a member as dead",
    "max.poll.interval.ms": "the longest that a message may take to handle",
}

_WIDTH = 118
_GAP = "  "
_CAPS = (33, 18, 18, 8)  # setting, value, set by, side; the reason gets the rest
_HEADER = ("setting", "value", "set by", "side", "why")


@dataclass(frozen=True)
class Row:
    """One setting: its value as text, who set it, the side that reads it, the reason; ``weaker`` if it is marked."""

    setting: str
    value: str
    set_by: str
    side: str
    why: str
    weaker: bool = False


@dataclass(frozen=True)
class Explanation:
    """The settings of one guarantee, readable: ``print`` it, iterate over its rows, or take ``as_dict()``.

    Values that could be secrets are shown as ``<hidden>``: only what is known to be harmless is printed.

    Attributes:
        guarantee: ``"at-most-once"``, ``"at-least-once"`` or ``"exactly-once"``.
        rows: one for each setting: ``setting``, ``value``, ``set_by`` ("guarantee (locked)", "guarantee", "you" or
            "librdkafka"), ``side`` ("producer", "consumer" or "both"), ``why``, ``weaker``.
        warnings: a sentence for each of your settings that is weaker than the guarantee's own.
    """

    guarantee: Guarantee
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def as_dict(self) -> dict[str, object]:
        """The same as data that ``json.dumps`` takes."""
        return {
            "guarantee": self.guarantee.value,
            "promise": PROMISES[self.guarantee],
            "not_promised": list(NOT_PROMISED[self.guarantee]),
            "settings": [asdict(row) for row in self.rows],
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        lines = [*_wrapped(f"{self.guarantee.value}: {PROMISES[self.guarantee]}"), "", *_table(self.rows), ""]
        if self.warnings:
            lines += ["! weaker than the guarantee's own:", *_listed(self.warnings), ""]
        lines += ["Not promised:", *_listed(NOT_PROMISED[self.guarantee])]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Explanation {self.guarantee.value}: {len(self.rows)} settings, {len(self.warnings)} weaker>"


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [_HEADER, *((_marked(row), row.value, row.set_by, row.side, row.why) for row in rows)]
    widths = [min(cap, max(len(cell[i]) for cell in cells)) for i, cap in enumerate(_CAPS)]
    widths.append(_WIDTH - sum(widths) - len(_GAP) * len(widths))
    lines = [line for cell in cells for line in _lines(cell, widths)]
    return [lines[0], "-" * _WIDTH, *lines[1:]]


def _marked(row: Row) -> str:
    return f"! {row.setting}" if row.weaker else row.setting


def _lines(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    wrapped = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(cells, widths, strict=True)]
    for parts in zip_longest(*wrapped, fillvalue=""):
        yield _GAP.join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()


def _listed(sentences: Sequence[str]) -> list[str]:
    return [line for sentence in sentences for line in _wrapped(sentence, "  - ", "    ")]


def _wrapped(text: str, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=others)
