"""What gets installed is fixed: every package pinned, every pin with hashes, and no word on where to download from."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "requirements").glob("*.txt"))
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def entries(path: Path) -> list[str]:
    """The requirements of a pip file, one string each, continuation lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return [entry for entry in "\n".join(lines).replace("\\\n", " ").splitlines() if entry.strip()]


def pins() -> dict[str, Requirement]:
    """What this interpreter installs, by canonical name."""
    found = [Requirement(HASH.sub("", entry)) for path in FILES for entry in entries(path)]
    return {canonicalize_name(pin.name): pin for pin in found if pin.marker is None or pin.marker.evaluate()}


def test_there_is_a_lock_and_a_source_build() -> None:
    assert [path.name for path in FILES] == ["llama.txt", "lock.txt"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_entry_is_one_exact_version_with_hashes(path: Path) -> None:
    loose = [entry for entry in entries(path) if not re.match(r"[\w.\-]+==[\w.]+ ", entry) or not HASH.search(entry)]
    assert loose == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_option_and_no_address(path: Path) -> None:
    text = path.read_text()
    assert "://" not in text
    assert [line for line in text.splitlines() if line.startswith("-")] == []


def test_the_project_file_is_satisfied_by_the_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for group in project["dependency-groups"].values():
        wanted += group
    pinned = pins()
    for requirement in map(Requirement, wanted):
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} is not in the lock file; run make lock"
        (version,) = pin.specifier
        assert requirement.specifier.contains(version.version), f"{requirement} excludes the pin {pin}"


def test_the_environment_of_these_tests_has_the_pinned_versions() -> None:
    from importlib.metadata import version

    for name in ("ray", "llama-cpp-python", "gguf", "pydantic"):
        (pinned,) = pins()[canonicalize_name(name)].specifier
        assert version(name) == pinned.version
