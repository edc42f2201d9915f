"""The tree itself: heads of files that teach, no traces of one machine, test names that do not collide."""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {".git", ".venv", "build", "dist", "models", "__pycache__", ".hypothesis"}
PRODUCT = ["scheduler", "actors", "arriero"]

# Pieces are joined here so that this file does not contain what it looks for.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.~-])/" + r"(?:work|root)\b(?!-)"),
    "a package registry": re.compile("|".join([r"pypi\." + "org", "python" + "hosted", r"registry\." + "npmjs"])),
}


def files() -> Iterator[Path]:
    """Every file that could be committed: all but generated folders and caches."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS and not name.endswith(("_cache", ".egg-info"))]
        yield from (Path(folder, name) for name in names if not name.endswith((".gguf", ".log")))


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    found = []
    for path in files():
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{relative(path)}: {match.group()}" for match in FORBIDDEN[what].finditer(text)]
    assert found == []


def test_every_source_folder_is_a_package_that_says_what_it_is() -> None:
    for path in modules(*PRODUCT):
        head = path.parent / "__init__.py"
        assert head.exists(), f"{relative(path.parent)} has no __init__.py"
        assert ast.get_docstring(ast.parse(head.read_text())), f"{relative(head)} has no docstring"


@pytest.mark.parametrize("path", modules(*PRODUCT, "setup", "benchmarks", "tests"), ids=relative)
def test_the_head_of_a_file_teaches_in_under_twenty_lines(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "no docstring"
    assert len(docstring.splitlines()) < 20


def test_test_files_have_names_of_their_own() -> None:
    names = Counter(path.name for path in modules("tests") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_the_version_is_the_same_everywhere() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert f"## {version.group(1)}" in (ROOT / "CHANGELOG.md").read_text()
