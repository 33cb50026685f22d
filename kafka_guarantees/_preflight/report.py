"""What a preflight returns: findings, as text or as data. No secrets (S01)."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import UnsafeConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .._settings import Guarantee

Level = Literal["unsafe", "warning", "unknown", "info"]
LEVELS: tuple[Level, ...] = get_args(Level)  # the gravest first
_WIDTH = 118
_MARGIN = " " * 9  # as wide as the longest level, and a gap


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the guarantee needs it, or could not be asked.

    Attributes:
        level: ``"unsafe"``: the guarantee does not hold. ``"warning"``: it may not hold, or work stops. ``"unknown"``: could
            not ask. ``"info"``: good to know.
        subject: what it is about, such as ``"topic 'offers'"``.
        check: the setting or the right.
        value: what was seen.
        needed: what it should be.
        why: what would come of it, in one sentence.
        command: that mends it; empty where no command does.
    """

    level: Level
    subject: str
    check: str
    value: str
    needed: str
    why: str
    command: str = ""

    def __str__(self) -> str:
        return f"{self.heading}. {self.why}"

    @property
    def heading(self) -> str:
        """What was seen and what is needed, in one line."""
        return f"{self.subject}: {self.check}: {self.value}; needed: {self.needed}"


@dataclass(frozen=True)
class PreflightReport:
    """What the brokers are like, compared with what a guarantee needs: ``print`` it, or take ``as_dict()`` or ``to_json()``.

    It says how things were when it was made. It does not know what role a topic has: what only an output needs is said of an
    input too, as a warning at most.

    Attributes:
        guarantee: ``"at-most-once"``, ``"at-least-once"`` or ``"exactly-once"``.
        findings: the gravest first. Each has ``level`` ("unsafe", "warning", "unknown" or "info"), ``subject``, ``check``,
            ``value``, ``needed``, ``why`` and ``command``.
        cluster_id: of the cluster that answered; None if none did.
    """

    guarantee: Guarantee
    findings: tuple[Finding, ...]
    cluster_id: str | None

    @property
    def ok(self) -> bool:
        """Whether a broker answered, and nothing is unsafe. What else could not be asked does not count: see the findings."""
        return self.cluster_id is not None and not self._unsafe()

    def raise_if_unsafe(self) -> None:
        """Raise one error that names everything unsafe.

        Raises:
            UnsafeConfigError: something is.
        """
        unsafe = self._unsafe()
        if not unsafe:
            return
        first, others = unsafe[0], unsafe[1:]
        raise UnsafeConfigError(
            f"{first.subject}: {first.check}",
            first.value,
            "".join([first.why.rstrip("."), *(f";\n  and {str(one).rstrip('.')}" for one in others)])
            + f" ({self.guarantee.value})",
            "\n  ".join(one.command or f"{one.check}: {one.needed}" for one in unsafe),
        )

    def as_dict(self) -> dict[str, object]:
        """The same as data that ``json.dumps`` takes."""
        return {
            "guarantee": self.guarantee.value,
            "cluster_id": self.cluster_id,
            "ok": self.ok,
            "findings": [asdict(one) for one in self.findings],
        }

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return f"<PreflightReport {self.guarantee.value}: {self._counts() or 'nothing found'}>"

    def _unsafe(self) -> list[Finding]:
        return [one for one in self.findings if one.level == "unsafe"]

    def _counts(self) -> str:
        count = Counter(one.level for one in self.findings)
        return ", ".join(f"{count[level]} {level}" for level in LEVELS if count[level])

    def _lines(self) -> Iterator[str]:
        where = f"cluster {self.cluster_id}" if self.cluster_id is not None else "no cluster answered"
        yield f"{self.guarantee.value}, {where}: {self._counts() or 'nothing found'}"
        for one in self.findings:
            yield ""
            yield from _wrapped(one.heading, one.level.ljust(len(_MARGIN)))
            yield from _wrapped(one.why, _MARGIN)
            if one.command:
                yield f"{_MARGIN}{one.command}"  # on one line, to be copied


def _wrapped(text: str, first: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=_MARGIN, break_on_hyphens=False)
