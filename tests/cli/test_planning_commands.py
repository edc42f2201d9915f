"""`arriero plan FILE --cluster` and `arriero simulate`, as they are called."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from arriero.cli.main import app
from arriero.example_models import EXAMPLES, Dimensions, write_example_model
from scheduler.costs.footprint import computes_exactly
from scheduler.costs.shape import read_shape
from scheduler.errors import InvalidGGUF, Rejected

SMALL = Dimensions(8, 1024, 8, 4, 2816, 4096)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write_example_model(tmp_path / f"{name}.gguf", name, SMALL)
    node: dict[str, Any] = {"name": "box", "ram": "16GiB", "gpus": [{"name": "RTX 3060"}]}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"nodes": [node]}))
    node["replicas"] = [{"model": "loaded", "file": "b.gguf", "gpus": [0]}]
    (tmp_path / "busy.yaml").write_text(yaml.safe_dump({"nodes": [node]}))
    node["gpus"], node["ram"] = [], "2GiB"
    node["replicas"] = []
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"nodes": [node]}))
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": {n: {"path": f"{n}.gguf"} for n in ("a", "b")}}))
    rows = ["timestamp_s,model,prompt_tokens,output_tokens", *(f"{10 * i},{'ab'[i % 2]},100,20" for i in range(8))]
    (tmp_path / "trace.csv").write_text("\n".join(rows))
    return tmp_path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_plan_as_json_has_the_documented_keys(folder: Path) -> None:
    plan = json.loads(run("plan", folder / "a.gguf", "--cluster", folder / "one.yaml", "--json"))
    assert list(plan) == ["placement", "cost_s", "tokens_per_s", "alternatives", "passed_over", "refusal"]
    placement = plan["placement"]
    assert placement["devices"] == [{"gpu": 0, "layers": [0, 8], "bytes": placement["devices"][0]["bytes"]}]
    assert (placement["node"], placement["n_ctx"], placement["evicts"]) == ("box", 8192, [])
    assert placement["host"].keys() == {"layers", "bytes", "experts"} and placement["host"]["layers"] == 0
    assert list(plan["cost_s"]) == ["wait", "release", "load", "service", "regret", "total"]
    assert plan["cost_s"]["total"] == pytest.approx(sum(v for k, v in plan["cost_s"].items() if k != "total"))
    assert plan["alternatives"][0].keys() == {"placement", "cost_s", "tokens_per_s"}
    assert plan["refusal"] is None


def test_layers_are_counted_from_the_first_that_is_on_a_gpu(folder: Path) -> None:
    plan = json.loads(run("plan", folder / "a.gguf", "--cluster", folder / "one.yaml", "--json"))
    partial = next(o["placement"] for o in plan["alternatives"] if o["placement"]["host"]["layers"] == 1)
    assert partial["devices"][0]["layers"] == [1, 8]


def test_a_refusal_as_json(folder: Path) -> None:
    plan = json.loads(run("plan", folder / "a.gguf", "--cluster", folder / "tiny.yaml", "--json"))
    assert plan["placement"] is None and plan["cost_s"] is None
    assert plan["refusal"]["reasons"] and any("more host RAM" in way for way in plan["refusal"]["would_fit_if"])
    assert "it would fit with" in run("plan", folder / "a.gguf", "--cluster", folder / "tiny.yaml")


def test_the_file_of_a_replica_is_that_replica(folder: Path) -> None:
    text = run("plan", folder / "b.gguf", "--cluster", folder / "busy.yaml")
    assert "loaded: the plan" in text
    plan = json.loads(run("plan", folder / "b.gguf", "--cluster", folder / "busy.yaml", "--json"))
    assert plan["cost_s"]["load"] == 0


def test_the_context_asked_for_is_the_context_planned(folder: Path) -> None:
    plan = json.loads(run("plan", folder / "a.gguf", "--cluster", folder / "one.yaml", "--n-ctx", 4096, "--json"))
    assert plan["placement"]["n_ctx"] >= 4096


def test_what_cannot_be_read_is_named(folder: Path) -> None:
    for file, spec, kind, what in (
        ("none.gguf", "one.yaml", Rejected, "none.gguf: No such file"),
        ("a.gguf", "none.yaml", Rejected, "none.yaml: No such file"),
        ("trace.csv", "one.yaml", InvalidGGUF, "trace.csv"),
        ("a.gguf", "trace.csv", Rejected, "trace.csv"),
    ):
        with pytest.raises(kind, match=what):
            run("plan", folder / file, "--cluster", folder / spec)


def test_a_simulation_as_json_has_the_documented_keys(folder: Path) -> None:
    told = [
        json.loads(
            run(
                "simulate", "--cluster", folder / "one.yaml", "--catalogue", folder / "models.yaml", "--trace",
                folder / "trace.csv", "--policy", policy, "--seed", 7, "--json",
            )
        )
        for policy in ("lru", "lru", "single")
    ]  # fmt: skip
    assert told[0] == told[1]
    assert told[0].keys() >= {
        "requests", "served", "refused", "cold_loads", "bytes_loaded", "evictions", "wait_s", "ttft_s", "tokens_per_s",
        "gpu_busy_share", "policy", "seed",
    }  # fmt: skip
    assert (told[0]["requests"], told[0]["served"], told[0]["cold_loads"], told[0]["evictions"]) == (8, 8, 2, 0)
    assert (told[2]["cold_loads"], told[2]["evictions"], told[2]["policy"], told[2]["seed"]) == (8, 7, "single", 7)
    assert told[0]["wait_s"].keys() == {"p50", "p95", "p99", "max"}


def test_policies_are_compared_side_by_side_and_requests_written(folder: Path) -> None:
    common = ("--cluster", folder / "one.yaml", "-c", folder / "models.yaml", "--trace", folder / "trace.csv")
    text = run("simulate", *common, "--policy", "lru", "--policy", "single")
    assert "lru" in text and "single" in text and "cold loads" in text
    run("simulate", *common, "--csv", folder / "out.csv")
    with (folder / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and all(float(row["granted_s"]) <= float(row["first_token_s"]) for row in rows)
    with pytest.raises(Rejected, match="there is no policy 'lfu'; known are lru, gdsf, single"):
        run("simulate", *common, "--policy", "lfu")


def test_without_arguments_an_example_is_run() -> None:
    told = json.loads(run("simulate", "--json"))
    assert told["requests"] == told["served"] + told["refused"] == 600
    assert told == json.loads(run("simulate", "--json"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_the_shapes_of_real_models(name: str, tmp_path: Path) -> None:
    shape = read_shape(write_example_model(tmp_path / "m.gguf", name, EXAMPLES[name]))
    billions = float(name.rsplit("-", 1)[1].removesuffix("b"))
    assert 0.3 * billions < shape.file_bytes / 1e9 < 1.1 * billions
    assert shape.n_layer_all == EXAMPLES[name].n_layer and computes_exactly(shape)
