"""What a user installs: the wheel and the sdist, in an environment that has nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
RUNTIME = {"confluent-kafka", "tenacity", "typing-extensions"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and, built from that, the wheel."""
    target = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT))
    return target


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_sdist_has_what_a_packager_needs(built: Path) -> None:
    """Tests, examples, docs, the licence and the changelog come with the source."""
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/test_package.py"} <= names
    assert any(name.startswith("examples/") for name in names)


def test_the_wheel_has_its_data(built: Path) -> None:
    """The marker for type checkers and the pom that names Kafka's jars are in the wheel; the tests are not."""
    with zipfile.ZipFile(only(built, "*.whl")) as archive:
        names = set(archive.namelist())
    assert {"kafka_guarantees/py.typed", "kafka_guarantees/testing/pom.xml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_it_installs_into_an_empty_environment(pattern: str, built: Path, tmp_path: Path) -> None:
    """Only the three runtime dependencies come with it, it imports, and its command runs."""
    run(sys.executable, "-m", "venv", str(tmp_path))
    python = str(tmp_path / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", str(only(built, pattern)))
    listed = run(python, "-m", "pip", "list", "--format", "freeze").split()
    installed = {line.split("==")[0].lower().replace("_", "-") for line in listed}
    assert installed - {"pip", "setuptools", "wheel"} == RUNTIME | {"kafka-guarantees"}
    assert "AtLeastOnce" in run(python, "-c", "import kafka_guarantees; print(kafka_guarantees.__all__)")
    assert "isolation.level" in run(str(tmp_path / "bin" / "kafka-guarantees"), "explain", "exactly-once")


def test_the_version_is_said_once(run_version: Callable[[], str]) -> None:
    """``--version`` prints what the package says of itself."""
    from kafka_guarantees import __version__  # noqa: PLC0415 - the test is about it

    assert __version__ in run_version()


@pytest.fixture
def run_version() -> Callable[[], str]:
    return lambda: run(sys.executable, "-m", "kafka_guarantees", "--version")
