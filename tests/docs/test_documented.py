"""Catalogue, notices, events, commands and states: the documentation names all of them, and nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from scheduler import commands, config, events, server
from scheduler.choice.layouts import TIERS
from scheduler.choice.placement import Verdict
from scheduler.cluster.replica import TRANSITIONS, ReplicaState
from scheduler.config import Catalogue, parse_catalogue

ROOT = Path(__file__).parents[2]
CATALOGUE, EVENTS, PLACEMENT = (
    (ROOT / "docs" / f"{page}.md").read_text() for page in ("catalogue", "events", "placement")
)


def section(page: str, title: str) -> str:
    return re.split(r"^## ", page.split(f"## {title}\n", 1)[1], flags=re.MULTILINE)[0]


def first_cells(text: str) -> list[str]:
    """The names in the first column of a table."""
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


# ---------------------------------------------------------------------- catalogue


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("`models` and `defaults`", config.ModelEntry),
        ("`policy`", config.Policy),
        ("`reserves`", config.Reserves),
        ("`server`", server.Server),
    ],
)
def test_every_key_of_the_catalogue_is_described(title: str, model: type[BaseModel]) -> None:
    assert sorted(first_cells(section(CATALOGUE, title))) == sorted(model.model_fields)


def test_every_section_of_the_catalogue_is_described() -> None:
    titles = re.findall(r"^## (.*)$", CATALOGUE, re.MULTILINE)
    assert sorted(name for title in titles for name in re.findall(r"`(\w+)`", title)) == sorted(Catalogue.model_fields)


@pytest.mark.parametrize("title", ["policy", "reserves", "server"])
def test_defaults_are_the_documented_ones(title: str) -> None:
    defaults = getattr(Catalogue(), title)
    for name, documented in re.findall(r"^\| `(\w+)` \| (\S+)", section(CATALOGUE, f"`{title}`"), re.MULTILINE):
        value = documented.strip("`")
        if value != "|":
            expected = None if value == "none" else yaml.safe_load(value)
            parsed = parse_catalogue({title: {name: expected}})
            assert getattr(getattr(parsed, title), name) == getattr(defaults, name)


def test_the_example_is_a_catalogue() -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", CATALOGUE, re.DOTALL)
    catalogue = parse_catalogue(yaml.safe_load(example))
    assert set(catalogue.models) == {"house", "long", "embedder"} and catalogue.models["house"].pinned


def test_the_schema_that_is_shipped_is_the_catalogue_s() -> None:
    shipped = (ROOT / "scheduler" / "catalogue.schema.json").read_text()
    assert shipped == config.json_schema(), "run: python -m scheduler.config > scheduler/catalogue.schema.json"


# ---------------------------------------------------------------------- notices, events, commands


def announced_kinds() -> set[str]:
    """Kinds of notices in the sources: first arguments of Announce(...) and announce(...)."""
    kinds = set()
    for path in [*(ROOT / "scheduler").rglob("*.py"), *(ROOT / "actors").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = node.func
                name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                if name in ("Announce", "announce"):
                    kinds.add(str(node.args[0].value))
    return kinds


def test_every_notice_is_described_and_none_that_does_not_exist() -> None:
    assert sorted(first_cells(section(EVENTS, "Notices"))) == sorted(announced_kinds())


def test_every_event_is_described() -> None:
    assert first_cells(section(EVENTS, "Events")) == [event.__name__ for event in get_args(events.Event)]


def test_every_command_is_described() -> None:
    assert first_cells(section(EVENTS, "Commands")) == [command.__name__ for command in get_args(commands.Command)]


def test_every_kind_of_failure_is_described() -> None:
    assert all(f"`{kind}`" in EVENTS for kind in get_args(events.FailureKind))


# ---------------------------------------------------------------------- placement


def test_the_states_are_drawn_as_they_are() -> None:
    drawn = set(re.findall(r"^    (\S+) --> (\S+)$", PLACEMENT, re.MULTILINE))
    steps = {(state.value, after.value) for state, nexts in TRANSITIONS.items() for after in nexts}
    ends = {(state.value, "[*]") for state, nexts in TRANSITIONS.items() if not nexts}
    assert drawn == steps | ends | {("[*]", ReplicaState.PENDING.value)}


def test_every_tier_and_verdict_is_described() -> None:
    assert all(f"`{name}`" in PLACEMENT for name in (*TIERS, *get_args(Verdict)))
