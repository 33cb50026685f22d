"""The documents say what is so."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees import AtLeastOnce, AtMostOnce, DeliveryError, ExactlyOnce, dedup, errors
from kafka_guarantees._recognition.options import COUNTED
from kafka_guarantees.prove.checks import LAWS
from kafka_guarantees.prove.faults import KINDS

from .mutants import MUTANTS
from .test_architecture import library

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
WITH_CODE = [name for name in DOCUMENTS if "```python" in (ROOT / name).read_text()]


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


def anchors(path: Path) -> set[str]:
    """The headings of a document, in the form in which a link names them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    """A relative link points at a file of the repository, and at a heading that is in it."""
    path = ROOT / document
    links = re.findall(r"\]\(([^)#:]*)(?:#([^):]+))?\)", path.read_text())
    assert not [target for target, _ in links if not (path.parent / target).exists()]
    targets = [((path.parent / target) if target else path, anchor) for target, anchor in links if anchor]
    assert not [anchor for target, anchor in targets if anchor not in anchors(target)]


@pytest.mark.parametrize("document", [name for name in WITH_CODE if name != "docs/testing.md"])  # which imports the user's
def test_examples_in_documents_are_valid(document: str) -> None:
    """Their code parses, and imports only what is public."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert {alias.name for alias in node.names} <= set(import_module(node.module or "").__all__)


def block(document: str, words: str) -> str:
    """The one block of Python in a document that has these words."""
    [found] = [code for code in re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL) if words in code]
    return str(found)


SIGTERM = """
import os, signal, threading, time
from kafka_guarantees import AtLeastOnce

def later():
    while not callable(signal.getsignal(signal.SIGTERM)):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=later, daemon=True).start()
config, handler = {"bootstrap.servers": "127.0.0.1:1", "group.id": "batch"}, print
"""


def test_a_batch_job_that_is_stopped_does_not_look_finished() -> None:
    """docs/operations.md: its exit status is that of SIGTERM, although run() returned."""
    code = SIGTERM + block("docs/operations.md", "caught = []")
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, check=False)
    assert done.returncode == 143, done.stderr


def test_a_stand_in_for_a_client_is_waited_for_and_awaited() -> None:
    """docs/testing.md: it returns, or raises, what it was told to."""
    names: dict[str, Any] = {}
    exec(block("docs/testing.md", "create_autospec"), names)
    kafka, result = names["kafka"], names["delivery"].result

    async def awaited() -> object:
        return await kafka.produce("orders", b"...")

    for ask in (lambda: kafka.produce("orders", b"...").result(10), lambda: asyncio.run(awaited())):
        with pytest.raises(DeliveryError):
            ask()
    result.side_effect = None
    assert asyncio.run(awaited()) is result.return_value
    kafka.produce.assert_called_with("orders", b"...")


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
    """docs/proof.md: every fault is named, and the table of checks is that of the checks. Liars are counted."""
    assert f"{len(MUTANTS)} liars" in (ROOT / "docs" / "guarantees.md").read_text()
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


OPERATIONS = ROOT / "docs" / "operations.md"
ELSEWHERE = ("preflight: ", "Retrying ", "_ALL_BROKERS_DOWN: ", "_TRANSPORT: ")  # levels; tenacity; librdkafka
CALLS = {"log.warning": 0, "log.error": 0, "log.exception": 0, "log.log": 1}  # which argument is the line


def chapter(title: str) -> list[list[str]]:
    """The rows of the tables below a heading of docs/operations.md, without their headers, as cells."""
    text = OPERATIONS.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


def logged() -> Iterator[str]:
    """Every line that the library logs at WARNING or above, with ``...`` for what is filled in."""
    for path in library():
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in CALLS:
                line = node.args[CALLS[name]]
                assert isinstance(line, ast.Constant), ast.unparse(node)
                yield re.sub(r"%(\.\d+)?[a-z]", "...", str(line.value))


def fixed(line: str) -> list[str]:
    """The parts of a line that are always the same."""
    return [part.strip() for part in line.split("...") if part.strip()]


def strings() -> str:
    """Every piece of text in the library, one below the other."""
    nodes = (node for path in library() for node in ast.walk(ast.parse(path.read_text())))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_operations_explain_every_log_line() -> None:
    """docs/operations.md: who is on call finds each line of the log, word for word, and none that does not exist any more."""
    rows = [re.findall(r"`([^`]+)`", row[0]) for row in chapter("What each log line means")]
    lines = [line for row in rows for line in row]
    ours = {line for line in logged() if fixed(line)}
    quoted = {line: re.compile(".*".join(re.escape(part) for part in line.split("..."))) for line in lines}
    assert not [line for line in ours if not any(pattern.match(line) for pattern in quoted.values())]
    written = strings()
    others = [line for line in lines if not any(quoted[line].match(each) for each in ours)]
    others = [line for line in others if not line.startswith(ELSEWHERE)]
    assert not [line for line in others if not all(part in written for part in fixed(line))]


def test_operations_have_a_row_for_every_error() -> None:
    """docs/operations.md: every class of errors.py has a row in the runbook, and nothing else has."""
    classes = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and kind.__module__ == errors.__name__}
    named = {name for row in chapter("Runbook") for name in re.findall(r"`(\w+)`", row[0])}
    assert named == classes


def test_operations_name_every_option() -> None:
    """docs/operations.md: every argument of the three classes and of their runs is named, and none that they do not have."""
    options = {
        kind: [name for name in inspect.signature(kind).parameters if name != "config"]
        for kind in (AtMostOnce, AtLeastOnce, ExactlyOnce)
    }
    rows = {name: row[1] for row in chapter("Every option") for name in re.findall(r"`(\w+)`", row[0])}
    assert rows.keys() == {name for names in options.values() for name in names}
    for name, whose in rows.items():
        having = {kind.__name__ for kind, names in options.items() if name in names}
        assert having == ({kind.__name__ for kind in options} if whose == "all" else set(re.findall(r"`(\w+)`", whose)))
    runs = {name for kind in options for name in inspect.signature(kind.run).parameters} - {"self", "topics", "handler"}
    assert not [name for name in runs if f"`{name}`" not in OPERATIONS.read_text()]
