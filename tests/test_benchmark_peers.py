"""Other clients in the benchmarks: what cannot be had is reported with its reason, and what was made is not made again."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from benchmarks.peers import environments, peers
from benchmarks.peers.environments import Unavailable

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build folder of the test's own."""
    monkeypatch.setattr(environments, "BUILD", tmp_path / "bench")
    return tmp_path / "bench"


def test_a_command_ends_with_its_job() -> None:
    """The last word of a peer's command is the job, as JSON."""
    found, missing = peers(["confluent_tuned"])
    assert not missing
    assert json.loads(found[0].command({"work": "produce", "messages": 3})[-1]) == {"work": "produce", "messages": 3}


def test_an_unknown_name_is_missing() -> None:
    """A name that is no peer's is reported; the others take part."""
    found, missing = peers(["confluent_default", "nobody"])
    assert [peer.name for peer in found] == ["confluent_default"]
    assert list(missing) == ["nobody"]


def test_a_tool_that_is_not_installed_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Go and Maven their peers are missing, each with the name of its tool."""
    monkeypatch.setattr(shutil, "which", lambda _command, path=None: path and None)
    found, missing = peers(["franz-go", "kafka-streams"])
    assert not found
    assert missing == {"franz-go": "go is not installed", "kafka-streams": "mvn is not installed"}


def test_a_build_that_fails_says_what_the_tool_said(build: Path) -> None:
    """The reason is the tool's own line, and the next call tries again: a half-made folder is not taken for a whole one."""
    calls: list[Path] = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "half").touch()
        environments._run(["sh", "-c", "echo preparing; echo 'error: no such compiler' >&2; exit 3"])

    for _ in range(2):
        with pytest.raises(Unavailable, match="error: no such compiler"):
            environments._made("tool", [environments.REQUIREMENTS], fill)
    assert len(calls) == 2
    assert not list(build.glob("*/complete"))


def test_what_was_made_is_made_once(build: Path) -> None:
    """A second call takes the folder of the first; other sources get another folder."""
    calls: list[Path] = []
    first = environments._made("tool", [environments.REQUIREMENTS], calls.append)
    again = environments._made("tool", [environments.REQUIREMENTS], calls.append)
    other = environments._made("tool", [environments.GO / "go.mod"], calls.append)
    assert first == again
    assert calls == [first, other]
    assert {path.parent for path in build.glob("*/complete")} == {first, other}
