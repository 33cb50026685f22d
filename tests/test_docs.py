"""The documents say what is so."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from kafka_guarantees import dedup
from kafka_guarantees._recognition.options import COUNTED
from kafka_guarantees.prove.checks import LAWS
from kafka_guarantees.prove.faults import KINDS

ROOT = Path(__file__).parent.parent


def existing() -> set[str]:
    """The names of all tests, and of those that a suite for users gives to the classes that inherit from it."""
    suites = (ROOT / "kafka_guarantees" / "testing" / "conformance").glob("*.py")
    return {
        node.name
        for path in (*(ROOT / "tests").glob("test_*.py"), *suites)
        for node in ast.walk(ast.parse(path.read_text()))
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
    assert len(headers) == 3
    assert not [row for row in rows if row not in headers and "`test_" not in row]


@pytest.mark.parametrize("document", ["README.md", "docs/dedup.md", "docs/guarantees.md", "docs/proof.md", "docs/security.md"])
def test_links_lead_somewhere(document: str) -> None:
    """A relative link points at a file of the repository."""
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert not [target for target in targets if not (path.parent / target).exists()]


@pytest.mark.parametrize("document", ["README.md", "docs/dedup.md", "docs/security.md"])
def test_examples_in_documents_are_valid(document: str) -> None:
    """Their code parses, and imports only what is public."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert {alias.name for alias in node.names} <= set(import_module(node.module or "").__all__)


def test_stores_and_inboxes_are_described_as_they_are() -> None:
    """docs/dedup.md: every store, inbox, extractor, count and error is named, and the table has all stores and inboxes."""
    text = (ROOT / "docs" / "dedup.md").read_text()
    contract = {"Capabilities", "DedupStore", "Entry", "Inbox", "InboxTransaction", "Item", "Outcome", "Source"}
    assert not [name for name in set(dedup.__all__) - contract if name not in text]
    counted = re.findall(r"^\| `([a-z ]+)` \|", text, re.MULTILINE)
    assert counted == list(COUNTED)
    [header] = [line for line in text.splitlines() if line.startswith("| | `")]
    assert (
        set(re.findall(r"`(\w+)`", header))
        == {name for name in dedup.__all__ if name.endswith(("DedupStore", "Inbox"))} - contract
    )


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
