"""`arriero plan FILE --cluster` and `arriero simulate`, as they are called."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

from arriero.cli.main import app
from arriero.cli.plots import _colors, _curve, _lanes, _merged, _unit
from arriero.cli.printing import console
from arriero.example_models import EXAMPLES, Dimensions, write_example_model
from scheduler.costs.footprint import computes_exactly
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.shape import read_shape
from scheduler.errors import InvalidGGUF, Rejected
from scheduler.simulation.simulator import Occupation
from scheduler.units import DeviceId

SMALL = Dimensions(8, 1024, 8, 4, 2816, 4096)

SLOTS = {"n_seq_max": 4, "kv_unified": True, "n_outputs_max": 4}
"""Of a context that nobody has said anything of."""


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
    assert list(plan) == [
        "placement", "cost_s", "tokens_per_s", "alternatives", "passed_over", "refusal", "kept_bytes",
    ]  # fmt: skip
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


def planned(folder: Path, *options: object) -> Any:
    return json.loads(run("plan", folder / "a.gguf", "--cluster", folder / "one.yaml", *options, "--json"))


def test_parameters_of_a_catalogue_may_be_given(folder: Path) -> None:
    plain = planned(folder)["placement"]
    cached = planned(folder, "--n-seq-max", 2, "--n-ctx", 8192, "--type-k", "q8_0", "--type-v", "q8_0")["placement"]
    assert cached["n_ctx"] == 8192  # of each of two slots, whose caches together take 17 thirty-seconds of one in F16
    same = planned(
        folder, "--set", "n_ctx=16384", *(f"--set={each}" for each in ("n_seq_max=2", "type_k=q8_0", "type_v=q8_0"))
    )
    assert same["placement"] == cached and cached["devices"][0]["bytes"] > plain["devices"][0]["bytes"]
    assert planned(folder, "--n-ctx", "auto")["placement"]["n_ctx"] == 32768  # as much as was trained
    assert planned(folder, "--set", "gpus=[gpu7]", "--set", "spill=false")["placement"] is None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--set n_bacth=512", "--set: unknown key models.a.n_bacth; did you mean n_batch?"),
        ("--set n_batch=many", "--set: models.a.n_batch: Input should be a valid integer"),
        ("--type-k q9", "--set: models.a.type_k: Input should be 'f32', 'f16'"),
        ("--set n_batch", "--set must be key=value, such as n_batch=512, not 'n_batch'"),
        ("--set path=b.gguf", "--set path: the file is named by MODEL"),
        ("--set n_seq_max=2 --n-seq-max 2", "n_seq_max is given twice"),
        ("--set gpus=[a", "--set gpus: '[a' is not YAML"),
        ("--n-ctx many", "--n-ctx must be a number of tokens, or auto with --cluster, not 'many'"),
        ("--n-ctx 0", "--n-ctx must be a number of tokens"),
        ("--draft none.gguf", "none.gguf: No such file"),
    ],
)
def test_parameters_that_are_none_are_named(folder: Path, options: str, error: str) -> None:
    with pytest.raises(Rejected) as found:
        planned(folder, *options.split())
    assert found.value.message.startswith(error)


def test_a_service_plans_with_its_own_catalogue() -> None:
    for options in (
        ("--set", "n_batch=512"),
        ("--n-seq-max", 2),
        ("--draft", "d.gguf"),
        ("--mtp",),
        ("--n-ctx", "auto"),
    ):
        with pytest.raises(Rejected, match="with --cluster"):
            run("plan", "a", *options)


def test_a_draft_takes_the_room_that_its_footprint_says(folder: Path) -> None:
    plan = planned(folder, "--draft", folder / "b.gguf", "--n-ctx", 8192)
    (folder / "grid.json").write_text(json.dumps([{"devices": [{}], "n_ctx": 8192, **SLOTS}]))
    grid = ("--grid", folder / "grid.json", "--draft", folder / "b.gguf", "--json")
    (bill,) = json.loads(run("footprint", folder / "a.gguf", *grid))
    draft = bill["beside"]["draft"]
    expected = {"devices": [sum(draft["devices"]["gpu0"].values())], "host": sum(draft["host"].values())}
    assert plan["placement"]["beside"] == {"draft": expected}
    assert plan["kept_bytes"]["gpu"] == expected["devices"][0]

    alone, together = plan["placement"]["devices"][0]["bytes"], expected["devices"][0]
    for total, on_gpu in ((alone + together, True), (alone + together - 4096, False)):
        gpu = {"name": "RTX 3060", "total": total}
        (folder / "one.yaml").write_text(yaml.safe_dump({"nodes": [{"name": "box", "ram": "16GiB", "gpus": [gpu]}]}))
        assert planned(folder, "--n-ctx", 8192)["placement"]["host"]["layers"] == 0
        host = planned(folder, "--draft", folder / "b.gguf", "--n-ctx", 8192)["placement"]["host"]
        assert (host["layers"] == 0) == on_gpu
    text = run("plan", folder / "a.gguf", "--cluster", folder / "one.yaml", "--draft", folder / "b.gguf")
    assert "are kept free for the files that come with the model" in text and "+ draft: " in text


def test_the_file_of_a_replica_with_a_draft_is_another_model(folder: Path) -> None:
    arguments = ("plan", folder / "b.gguf", "--cluster", folder / "busy.yaml", "--draft", folder / "a.gguf", "--json")
    assert json.loads(run(*arguments))["cost_s"]["load"] > 0


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
    with pytest.raises(Rejected, match="unknown policy 'lfu'; known policies: lru, gdsf, single"):
        run("simulate", *common, "--policy", "lfu")


def test_clusters_are_compared_with_every_policy(folder: Path) -> None:
    common = ("-c", folder / "models.yaml", "--trace", folder / "trace.csv", "--policy", "lru", "--policy", "single")
    both = (*common, "--cluster", folder / "one.yaml", "--cluster", folder / "tiny.yaml")
    told = json.loads(run("simulate", *both, "--json"))
    assert [(each["cluster"], each["policy"]) for each in told] == [
        ("one", "lru"), ("one", "single"), ("tiny", "lru"), ("tiny", "single"),
    ]  # fmt: skip
    alone = json.loads(run("simulate", *common, "--cluster", folder / "tiny.yaml", "--json"))
    assert alone == [{k: v for k, v in each.items() if k != "cluster"} for each in told[2:]]
    table = run("simulate", *both)
    assert all(name in table for name in ("one, lru", "one, single", "tiny, lru", "tiny, single"))


def test_clusters_in_files_of_one_name_are_told_apart_by_their_paths(folder: Path) -> None:
    (folder / "other").mkdir()
    other = folder / "other" / "one.yaml"
    other.write_text((folder / "one.yaml").read_text())
    common = ("-c", folder / "models.yaml", "--trace", folder / "trace.csv", "--json")
    told = json.loads(run("simulate", *common, "--cluster", folder / "one.yaml", "--cluster", other))
    assert [each["cluster"] for each in told] == [str(folder / "one.yaml"), str(other)]


def test_many_columns_become_several_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 100)
    clusters = []
    for i in range(4):
        clusters += ["--cluster", folder / f"a-long-name-of-a-cluster-{i}.yaml"]
        clusters[-1].write_text((folder / "one.yaml").read_text())
    policies = [each for name in ("lru", "gdsf", "single") for each in ("--policy", name)]
    made = ("-c", folder / "models.yaml", "--requests", 4)
    lines = run("simulate", *clusters, *policies, *made).splitlines()
    assert max(map(len, lines)) <= 100
    served = [line for line in lines if "served" in line]
    assert [line.count(" 4 ") for line in served] == [3, 3, 3, 3]


def test_requests_are_made_as_options_say(folder: Path) -> None:
    made = ("simulate", "--cluster", folder / "one.yaml", "-c", folder / "models.yaml", "--requests", 30)

    def arrivals(*options: object) -> list[tuple[float, str]]:
        run(*made, *options, "--csv", folder / "out.csv")
        with (folder / "out.csv").open() as file:
            return [(float(row["arrived_s"]), row["model"]) for row in csv.DictReader(file)]

    plain = arrivals()
    assert len(plain) == 30 and plain == arrivals("--gap", 15, "--burst", 4, "--day", 3600, "--drift", 1800)
    assert arrivals("--gap", 150)[-1][0] > 3 * plain[-1][0]
    assert arrivals("--day", 0)[0][0] * 5 == pytest.approx(plain[0][0])  # no longer the quietest hour
    steady, drifting = (arrivals("--popularity", 10, "--drift", s) for s in (0, 60))
    assert {model for _, model in steady} == {"a"} and {model for _, model in drifting} == {"a", "b"}
    alone = arrivals("--burst", 1, "--drift", 1)
    assert len({model for _, model in alone}) == 2


def test_popularity_drifts_where_a_trace_names_no_models(folder: Path) -> None:
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", *(f"2023-11-16 18:17:{i:02}.0,100,2" for i in range(0, 60, 10))]
    (folder / "azure.csv").write_text("\n".join(rows))
    common = ("--cluster", folder / "one.yaml", "-c", folder / "models.yaml", "--trace", folder / "azure.csv")
    models = []
    for drift in (0, 10):
        run("simulate", *common, "--popularity", 10, "--drift", drift, "--csv", folder / "out.csv")
        with (folder / "out.csv").open() as file:
            models.append("".join(row["model"] for row in csv.DictReader(file)))
    assert models == ["aaaaaa", "ababab"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--gap 0", "--gap is 0.0; it must be between 0.001 and 1000000"),
        ("--gap inf", "--gap is inf"),
        ("--requests 0", "--requests is 0; it must be between 1 and 100000"),
        ("--requests 100001", "--requests is 100001"),
        ("--burst 0.5", "--burst is 0.5"),
        ("--day nan", "--day is nan; it must be 0, or between 1"),
        ("--drift 1e-9", "--drift is 1e-09; it must be 0, or between 1"),
        ("--popularity -1", "--popularity is -1.0"),
        ("--gap 1e6", "these requests would come over"),
        ("--trace t.csv --gap 5 --day 0", "--gap, --day: only for random requests"),
        ("--policy lru --policy lru", "--policy lru is given twice"),
        ("--cluster c.yaml --cluster c.yaml", "--cluster c.yaml is given twice"),
        ("--csv out.csv --policy lru --policy gdsf", "--csv writes the requests of one run"),
    ],
)
def test_options_that_make_no_sense_are_named(options: str, error: str) -> None:
    with pytest.raises(Rejected) as found:
        run("simulate", *options.split())
    assert found.value.message.startswith(error)


# ---------------------------------------------------------------------- pictures


def test_without_matplotlib_pictures_are_refused_before_anything_is_played(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Rejected, match="install it with: pip install matplotlib"):
        run("simulate", "--plot", folder / "pictures")
    assert not (folder / "pictures").exists()


def test_pictures_are_the_same_each_time(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    gpus: list[Any] = [{"name": "RTX 3060"}, {"name": "a $card$ <of> ours", "total": "8GiB"}]
    (folder / "$x$.yaml").write_text(yaml.safe_dump({"nodes": [{"name": "b\x07ox", "ram": "16GiB", "gpus": gpus}]}))
    clusters = [each for name in ("$x$", "tiny") for each in ("--cluster", folder / f"{name}.yaml")]
    common = ("simulate", *clusters, "-c", folder / "models.yaml", "--trace", folder / "trace.csv", "--json")
    told = [json.loads(run(*common, "--plot", folder / name)) for name in ("once", "twice")]
    assert told[0] == told[1] == json.loads(run(*common))
    once, twice = ({path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("once", "twice"))
    assert once == twice and sorted(once) == ["occupancy-$x$-lru.svg", "occupancy-tiny-lru.svg", "times.svg"]
    assert all(ElementTree.fromstring(picture).tag.endswith("svg") for picture in once.values())
    assert b"a $card$" in once["occupancy-$x$-lru.svg"] and b"no GPUs" in once["occupancy-tiny-lru.svg"]


def test_pictures_that_cannot_be_written_are_named(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(Rejected, match=r"trace\.csv"):
        run("simulate", "--requests", 1, "--plot", folder / "trace.csv")
    (folder / "times.svg").mkdir()
    with pytest.raises(Rejected, match=r"times\.svg: Is a directory"):
        run("simulate", "--requests", 1, "--plot", folder)


def test_replicas_that_are_there_at_once_lie_in_different_lanes() -> None:
    first, second, third, last = (
        Occupation(DeviceId("g"), "m", begin, end, ()) for begin, end in ((0, 5), (2, 9), (5, 6), (6, 7))
    )
    assert _lanes([last, second, first, third]) == [[first, third, last], [second]]


def test_spans_that_the_picture_cannot_part_are_one() -> None:
    assert _merged([(5, 6), (0, 2), (1, 1.5), (2.1, 3)], 0.2) == [(0, 3), (5, 6)]


def test_curves_are_of_all_requests_and_no_longer_than_a_picture_needs() -> None:
    assert _curve([3.0, 0.0], 4) == ([0.01, 0.01, 3.0], [0.0, 25.0, 50.0])
    assert _curve([], 4) == ([0.01], [0.0])
    seconds, shares = _curve([float(i) for i in range(1, 100_001)], 100_000)
    assert len(seconds) < 2100 and (seconds[-1], shares[-1]) == (100_000, 100)


def test_colours_differ_and_units_are_handy() -> None:
    assert all(len(set(_colors(count))) == count for count in (1, 10, 11, 40))
    assert [_unit(s)[1] for s in (100, 1000, 20_000, 1e6)] == ["seconds", "minutes", "hours", "days"]


@pytest.mark.slow
def test_without_arguments_an_example_is_run() -> None:
    told = json.loads(run("simulate", "--json"))
    assert told["requests"] == told["served"] + told["refused"] == 600
    assert told == json.loads(run("simulate", "--json"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_the_shapes_of_real_models(name: str, tmp_path: Path) -> None:
    shape = read_shape(write_example_model(tmp_path / "m.gguf", name, EXAMPLES[name]))
    billions = float(name.rsplit("-", 1)[1].removesuffix("b"))
    assert 0.3 * billions < shape.file_bytes / 1e9 < 1.1 * billions
    assert shape.n_layer_all == EXAMPLES[name].n_layer and computes_exactly(shape, CHECKED_BUILD)
