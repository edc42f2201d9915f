"""Pages agree with the product: links lead somewhere, every verb and option of the command line is described."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from arriero.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
COMMANDS = typer.main.get_command(app)
assert isinstance(COMMANDS, TyperGroup)
CLI = (ROOT / "docs" / "cli.md").read_text()
LOCAL_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LOCAL_LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("verb", sorted(COMMANDS.commands))
def test_every_verb_is_described(verb: str) -> None:
    assert f"`arriero {verb}" in CLI


@pytest.mark.parametrize("verb", sorted(COMMANDS.commands))
def test_every_option_is_described(verb: str) -> None:
    options = {name for parameter in COMMANDS.commands[verb].params for name in parameter.opts if name.startswith("--")}
    assert not sorted(option for option in options if f"{option}" not in CLI)


def test_every_decision_is_listed_by_its_number() -> None:
    numbers = [int(path.name.split("-")[0]) for path in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
