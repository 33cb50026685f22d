"""Text from others, for a header, a terminal, a page or a log: what does not print is escaped (S09)."""

from __future__ import annotations


def printable(text: str, most: int | None = None, *, but: str = "") -> str:
    r"""The text, with everything that does not print (escape sequences, line ends, bidi marks) written as ``\x1b`` is.

    Args:
        text: from anywhere.
        most: characters; the rest of a longer text is left out.
        but: characters that are left as they are.
    """
    shown = text if most is None else text[: most + 1]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() or c in but else c.encode("unicode_escape").decode() for c in shown)
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"


def text_of(error: BaseException | None, most: int = 300) -> str:
    """What an exception says, in at most so many characters that print: it may quote the message that it is about."""
    try:
        text = str(error)
    except Exception as exc:  # noqa: BLE001 - the error is another's, and its text must not stop a dead letter
        text = f"({type(exc).__name__} in its __str__)"
    return printable(text, most)
