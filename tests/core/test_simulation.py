"""Simulations: the production core under a virtual clock, deterministic, with books that balance."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from scenario import LARGE, MEDIUM, MOE, SMALL, shape

from scheduler.config import Catalogue, parse_catalogue
from scheduler.errors import Rejected
from scheduler.simulation.described import ModelOnDisk
from scheduler.simulation.description import ClusterDescription, parse_cluster
from scheduler.simulation.report import busy_share, quantiles, summary
from scheduler.simulation.simulator import Occupation, Run, _Simulation, simulate
from scheduler.simulation.trace import Popularity, TraceRequest, made_trace, read_trace
from scheduler.units import GIB, DeviceId

MODELS = {
    name: ModelOnDisk(f"/models/{name}.gguf", shape(*dims))
    for name, dims in {"small": SMALL, "medium": MEDIUM, "large": LARGE, "moe": MOE}.items()
}


def catalogue(**policy: Any) -> Catalogue:
    entries = {name: {"path": model.path} for name, model in MODELS.items()}
    return parse_catalogue({"models": entries, "policy": policy})


def cluster(*gpus: str, **node: Any) -> ClusterDescription:
    return parse_cluster(
        {"nodes": [{"name": "box", "ram": "64GiB", "disk_read": "1GB/s", "gpus": [{"name": g} for g in gpus], **node}]}
    )


def ask(*requests: tuple[float, str], prompt: int = 100, output: int = 50) -> list[TraceRequest]:
    return [TraceRequest(at_s, model, prompt, output) for at_s, model in requests]


def test_the_first_request_waits_for_the_load_and_the_second_does_not() -> None:
    run = simulate(cluster("RTX 3090"), catalogue(), MODELS, ask((0, "medium"), (60, "medium")))
    cold, warm = run.outcomes
    assert cold.granted_s is not None and warm.granted_s is not None
    assert cold.granted_s == pytest.approx(0.25 + MODELS["medium"].shape.file_bytes / 1e9, rel=0.01)
    assert warm.granted_s == 60
    assert (run.cold_loads, run.evictions, run.bytes_loaded) == (1, 0, MODELS["medium"].shape.file_bytes)


def test_prompt_and_answer_take_what_the_speed_model_says() -> None:
    """A longer prompt delays the first token, a longer answer the last."""
    plain, prompted, answered = (
        simulate(cluster("RTX 3090"), catalogue(), MODELS, ask((0, "medium"), **more)).outcomes[0]  # type: ignore[arg-type]
        for more in ({}, {"prompt": 4000}, {"output": 500})
    )

    def spans(outcome: Any) -> tuple[float, float]:
        return outcome.first_token_s - outcome.granted_s, outcome.done_s - outcome.first_token_s

    assert spans(prompted)[0] > 5 * spans(plain)[0] and spans(prompted)[1] == pytest.approx(spans(plain)[1])
    assert spans(answered)[1] == pytest.approx(spans(plain)[1] * 499 / 49)


def test_what_does_not_fit_together_is_evicted_and_loaded_again_from_the_page_cache() -> None:
    trace = ask((0, "large"), (100, "moe"), (200, "large"))
    run = simulate(cluster("RTX 3060 Ti", ram="32GiB"), catalogue(), MODELS, trace)
    assert all(outcome.done_s for outcome in run.outcomes)
    assert run.cold_loads >= 2
    first, _, again = (o.granted_s - o.request.at_s for o in run.outcomes if o.granted_s is not None)
    assert again < first  # the file is still in RAM, or the model is still loaded


def test_a_single_active_model_swaps_where_several_stay() -> None:
    trace = ask(*((20.0 * i, ("small", "medium")[i % 2]) for i in range(10)))
    several = simulate(cluster("RTX 3090"), catalogue(), MODELS, trace)
    single = simulate(cluster("RTX 3090"), catalogue(max_active_models=1), MODELS, trace)
    assert (several.cold_loads, several.evictions) == (2, 0)
    assert (single.cold_loads, single.evictions) == (10, 9)


def test_what_can_never_fit_is_refused_with_its_reason() -> None:
    run = simulate(cluster(ram="4GiB"), catalogue(), MODELS, ask((0, "large"), (1, "small")))
    refused, served = run.outcomes
    assert "can never fit" in refused.refusal and refused.done_s is None
    assert served.done_s is not None
    assert summary(run, "lru", 1)["refused"] == 1


def test_replicas_of_the_description_serve_at_once() -> None:
    loaded = {"replicas": [{"model": "medium", "file": "medium.gguf", "gpus": [0]}]}
    run = simulate(cluster("RTX 3090", **loaded), catalogue(), MODELS, ask((5, "medium")))
    assert run.outcomes[0].granted_s == 5 and run.cold_loads == 0


def test_memory_of_others_stays_theirs_whatever_is_loaded() -> None:
    """Else models would be placed in memory that is in use, and nothing the core decides may get lost on the way."""
    gpus = [{"name": "RTX 3090", "free": "14GiB"}, {"name": "RTX 3060", "free": "7GiB"}]
    described = parse_cluster({"nodes": [{"name": "box", "ram": "64GiB", "ram_free": "40GiB", "gpus": gpus}]})
    trace = made_trace(Popularity(list(MODELS), 0.5), 3, n_requests=120, mean_gap_s=6)
    simulation = _Simulation(described, catalogue(), MODELS, trace)
    core = simulation._core
    foreign = {
        d.facts.device_id: d.foreign_bytes for node in core.inventory.nodes.values() for d in node.devices.values()
    }
    assert sorted(foreign.values()) == [5 * GIB, 10 * GIB]
    run = simulation.run()
    assert all(outcome.done_s for outcome in run.outcomes)
    for node in core.inventory.nodes.values():
        for device in node.devices.values():
            assert abs(device.foreign_bytes - foreign[device.facts.device_id]) <= 4 << 20


def test_a_described_replica_may_go_at_once_and_come_back() -> None:
    loaded = {"replicas": [{"model": "medium", "file": "medium.gguf", "gpus": [0], "idle_s": 100}]}
    settings = parse_catalogue(
        {
            "models": {name: {"path": model.path} for name, model in MODELS.items()},
            "defaults": {"keep_alive_s": 60},
            "policy": {"max_active_models": 1},
        }
    )
    run = simulate(cluster("RTX 3090", **loaded), settings, MODELS, ask((0, "medium"), (5, "small")))
    assert all(outcome.done_s for outcome in run.outcomes)


def test_a_long_answer_does_not_keep_others_waiting_for_ever() -> None:
    """The longer a wait has been, the longer it is taken to be: in the end host RAM is cheaper."""
    trace = [TraceRequest(0, "large", 100, 30_000), TraceRequest(20, "other", 100, 20)]
    models = {**MODELS, "other": ModelOnDisk("/models/other.gguf", MODELS["large"].shape)}
    entries = {name: {"path": model.path} for name, model in models.items()}
    settings = parse_catalogue({"models": entries, "defaults": {"n_ctx": 32768}})
    run = simulate(cluster("RTX 3090"), settings, models, trace)
    assert all(outcome.done_s for outcome in run.outcomes), [o.refusal for o in run.outcomes]


def test_gaps_cost_nothing() -> None:
    run = simulate(cluster("RTX 3090"), catalogue(), MODELS, ask((0, "medium"), (3e7, "medium")))
    assert run.events < 1000 and all(outcome.done_s for outcome in run.outcomes)


def test_one_seed_one_result() -> None:
    def once(seed: int) -> dict[str, Any]:
        trace = made_trace(Popularity(list(MODELS), 1.0, drift_s=300), seed, n_requests=60, mean_gap_s=10)
        return summary(simulate(cluster("RTX 3060", "GTX 1080"), catalogue(), MODELS, trace), "lru", seed)

    assert once(7) == once(7)
    assert {**once(7), "seed": 0} != {**once(8), "seed": 0}


@pytest.mark.slow
def test_every_request_ends_and_nothing_is_left_behind() -> None:
    trace = made_trace(Popularity(list(MODELS), 0.5), 3, n_requests=80, mean_gap_s=4)
    run = simulate(cluster("RTX 3060", ram="16GiB"), catalogue(), MODELS, trace)
    assert all((outcome.done_s is None) == bool(outcome.refusal) for outcome in run.outcomes)
    figures = summary(run, "lru", 3)
    assert figures["served"] + figures["refused"] == figures["requests"] == 80
    assert 0 < figures["gpu_busy_share"] <= 1 and 0 < figures["fairness"] <= 1
    assert all(o.from_s <= begin <= end <= o.to_s + 1e-6 for o in run.occupations for begin, end in o.busy)


def test_models_that_are_not_there_are_named() -> None:
    with pytest.raises(Rejected, match="asks for nobody; the catalogue has large, medium"):
        simulate(cluster("RTX 3090"), catalogue(), MODELS, ask((0, "nobody")))


# ---------------------------------------------------------------------- figures


def test_quantiles_are_values_that_occurred() -> None:
    assert quantiles([float(i) for i in range(1, 101)]) == {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert quantiles([3.0]) == dict.fromkeys(("p50", "p95", "p99", "max"), 3.0)
    assert quantiles([]) == dict.fromkeys(("p50", "p95", "p99", "max"), 0.0)


def test_a_gpu_is_busy_once_however_many_answer() -> None:
    gpu = DeviceId("gpu0")
    both = Occupation(gpu, "a", 0, 10, ((0, 4), (2, 5))), Occupation(gpu, "b", 0, 10, ((8, 9),))
    assert busy_share(Run([], duration_s=10, occupations=list(both), gpus=(gpu, DeviceId("gpu1")))) == 6 / 20


# ---------------------------------------------------------------------- traces


def read(text: str) -> list[TraceRequest]:
    return read_trace(text.splitlines(), Popularity(["a", "b"]), 1, "t.csv")


def test_traces_are_read_in_order_of_time_from_their_first_request() -> None:
    found = read("timestamp_s,model,prompt_tokens,output_tokens\n12.5,b,20,0\n10,a,5,7\n")
    assert found == [TraceRequest(0.0, "a", 5, 7), TraceRequest(2.5, "b", 20, 1)]


def test_azure_traces_get_their_models_by_chance() -> None:
    lines = "\n".join(f"2023-11-16 18:17:0{i}.9799600,{100 + i},{i + 1}" for i in range(9))
    found = read(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{lines}\n")
    assert [each.at_s for each in found] == [float(i) for i in range(9)]
    assert {each.model for each in found} == {"a", "b"} and found[3].prompt_tokens == 103
    assert found == read(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{lines}\n")


def test_a_popularity_law_prefers_the_first_and_drifts() -> None:
    law = Popularity(["a", "b", "c"], 2.0, drift_s=100)
    trace = made_trace(law, 5, n_requests=400, mean_gap_s=0.4)
    early = [each.model for each in trace if each.at_s < 100]
    assert early.count("a") > early.count("b") > early.count("c")
    later = [each.model for each in trace if 100 <= each.at_s < 200]
    assert later.count("b") > later.count("a")


def test_made_requests_come_alone_or_in_bursts_by_day_or_at_all_hours() -> None:
    def models(trace: list[TraceRequest]) -> int:
        return sum(one.model != other.model for one, other in pairwise(trace))

    many = [str(i) for i in range(50)]
    alone, bursts = (
        made_trace(Popularity(many, 0.0), 3, n_requests=500, mean_gap_s=9, burst=burst, day_s=0) for burst in (1, 20)
    )
    assert models(alone) > 450 and models(bursts) < 100
    assert alone[-1].at_s / 500 == pytest.approx(9 + 9 / 3, rel=0.15)
    shorter = made_trace(Popularity(many, 0.0), 3, n_requests=500, mean_gap_s=0.009, burst=1, day_s=0)
    assert shorter[-1].at_s == pytest.approx(alone[-1].at_s / 1000)


def test_made_requests_over_years_are_refused() -> None:
    with pytest.raises(Rejected, match=r"would come over \d+ days"):
        made_trace(Popularity(["a"]), 1, n_requests=1000, mean_gap_s=1e6)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "its columns are none; needed are timestamp_s"),
        ("a,b\n1,2\n", "its columns are a, b"),
        ("timestamp_s,model,prompt_tokens,output_tokens\n", "holds no requests"),
        ("timestamp_s,model,prompt_tokens,output_tokens\nsoon,a,1,1\n", "line 2: timestamp_s is 'soon', not a number"),
        ("timestamp_s,model,prompt_tokens,output_tokens\nnan,a,1,1\n", "line 2: timestamp_s is 'nan', not a number"),
        ("timestamp_s,model,prompt_tokens,output_tokens\n1,,1,1\n", "line 2: no model is named"),
        ("timestamp_s,model,prompt_tokens,output_tokens\n1,a,-1,1\n", "line 2: prompt_tokens is '-1'; it must be"),
        ("timestamp_s,model,prompt_tokens,output_tokens\n1,a,1\n", "line 2: output_tokens is None, not a number"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "line 2: 'yesterday' is no time"),
        ("timestamp_s,model,prompt_tokens,output_tokens\n0,a,1,1\n1e12,a,1,1\n", "are its times in seconds?"),
        (f"timestamp_s,model,prompt_tokens,output_tokens\n0,{'a' * 140_000},1,1\n", "field larger than"),
    ],
)
def test_mistakes_in_traces_are_named_with_their_line(text: str, error: str) -> None:
    with pytest.raises(Rejected) as found:
        read(text)
    assert found.value.message.startswith("t.csv") and error in found.value.message
