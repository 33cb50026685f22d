"""The documents say what is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from kafka_guarantees.prove.checks import LAWS
from kafka_guarantees.prove.faults import KINDS

ROOT = Path(__file__).parent.parent


def existing() -> set[str]:
    """The names of all tests."""
    return {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_promise_names_tests_that_exist() -> None:
    """docs/guarantees.md: a promise whose test was renamed or deleted is held by nothing."""
    text = (ROOT / "docs" / "guarantees.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 40
    assert not named - existing()


def test_every_row_of_a_table_names_a_test() -> None:
    """docs/guarantees.md: a line without a test is a wish."""
    rows = [line for line in (ROOT / "docs" / "guarantees.md").read_text().splitlines() if line.startswith("| ")]
    headers = [line for line in rows if "held by" in line or line.startswith("| hazard")]
    assert len(headers) == 2
    assert not [row for row in rows if row not in headers and "`test_" not in row]


@pytest.mark.parametrize("document", ["README.md", "docs/guarantees.md", "docs/proof.md"])
def test_links_lead_somewhere(document: str) -> None:
    """A relative link points at a file of the repository."""
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert not [target for target in targets if not (path.parent / target).exists()]


def test_the_readmes_example_is_valid() -> None:
    """README: its code parses, and imports only what is public."""
    import kafka_guarantees  # noqa: PLC0415 - the test is about it

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert {alias.name for alias in node.names} <= set(kafka_guarantees.__all__)


def test_the_proof_is_described_as_it_is() -> None:
    """docs/proof.md: every fault is named, and the table of checks is that of the checks."""
    text = (ROOT / "docs" / "proof.md").read_text()
    assert not [name for name in KINDS if f"`{name}`" not in text]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    table = {row[0]: [cell == "x" for cell in row[1:4]] for row in rows if len(row) == 5 and set(row[1:4]) <= {"x", ""}}
    names = {check.name for laws in LAWS.values() for check in laws}
    assert table == {
        name: [
            name in {check.name for check in LAWS[guarantee]} for guarantee in ("at-most-once", "at-least-once", "exactly-once")
        ]
        for name in names
    }
