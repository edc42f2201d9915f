"""docs/planning.md names every key of a described cluster, and its example is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from arriero.cli.simulate import POLICIES
from scheduler.simulation.description import GpuDescription, NodeDescription, ReplicaDescription, parse_cluster

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()


@pytest.mark.parametrize(
    ("title", "model"), [("node", NodeDescription), ("GPU", GpuDescription), ("replica", ReplicaDescription)]
)
def test_every_key_is_described(title: str, model: type[BaseModel]) -> None:
    table = PAGE.split(f"| key of a {title} |", 1)[1].split("\n\n", 1)[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert sorted(name for cell in cells for name in re.findall(r"`(\w+)`", cell)) == sorted(model.model_fields)


def test_the_example_is_a_cluster() -> None:
    example = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    (node,) = parse_cluster(yaml.safe_load(example[1])).nodes
    assert len(node.gpus) == 2 and node.replicas[0].gpus == (0,)


def test_every_policy_is_described() -> None:
    assert all(f"`{name}`" in PAGE for name in POLICIES)
