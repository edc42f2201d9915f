"""Where models go: tiers in their order, the tightest fit, several machines, and why not elsewhere."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from scenario import LARGE, MEDIUM, MOE, SMALL, Scenario, gpu, shape

import scheduler.choice.workload
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import ContextParams, DeviceSpec, Footprint, Layout
from scheduler.errors import Impossible, InvalidGGUF, QueueFull, Unavailable
from scheduler.units import GIB, DeviceId, NodeId

ALL = {"small": SMALL, "medium": MEDIUM, "large": LARGE, "moe": MOE}


@pytest.mark.parametrize(
    ("model", "sizes", "tier", "where"),
    [
        ("small", ["8GiB", "1GiB", "2GiB"], "one GPU", ["gpu1"]),  # the tightest
        ("medium", ["8GiB", "1GiB", "3GiB"], "one GPU", ["gpu2"]),
        ("large", ["8GiB", "6GiB", "5GiB"], "several GPUs", ["gpu2", "gpu0"]),  # two of three, with the least left
        ("large", ["5GiB", "5GiB", "5GiB"], "several GPUs", ["gpu0", "gpu1", "gpu2"]),
        ("moe", ["3GiB", "2GiB"], "experts in host RAM", ["gpu1", "gpu0"]),  # the more GPUs, the more experts on them
        ("moe", ["3GiB"], "experts in host RAM", ["gpu0"]),
        ("large", ["8GiB"], "some layers in host RAM", ["gpu0"]),
        ("moe", ["500MiB"], "some layers in host RAM", ["gpu0"]),
        ("small", [], "CPU only", []),
        ("medium", ["64MiB"], "CPU only", []),
    ],
)
def test_the_first_tier_that_fits(model: str, sizes: list[str], tier: str, where: list[str]) -> None:
    s = Scenario([gpu(size, f"gpu{i}") for i, size in enumerate(sizes)], ALL)
    s.run(model)
    assert (s.tier(model), s.where(model)) == (tier, where)


def test_a_bound_that_is_too_low_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    lies = lambda *asked: Footprint(  # noqa: E731
        tuple(replace(share, compute_bytes=0) for share in footprint(*asked, CHECKED_BUILD).devices),
        footprint(*asked, CHECKED_BUILD).host,
    )
    monkeypatch.setattr(scheduler.choice.workload, "_bounded_footprint", lies)
    whole = Layout((DeviceSpec("d0", "rpc"),), -1, (1.0,))
    share = footprint(shape(*SMALL), whole, ContextParams(n_ctx=8192, n_outputs_max=1), CHECKED_BUILD).devices[0]
    s = Scenario([gpu(f"{share.total_bytes - 1}B"), gpu("8GiB", "gpu1")], ALL)
    s.run("small")
    assert s.where("small") == ["gpu1"]


def wishing(model: str, sizes: list[str], **wishes: object) -> Scenario:
    entry = {"path": f"/models/{model}.gguf", **wishes}
    return Scenario([gpu(size, f"gpu{i}") for i, size in enumerate(sizes)], ALL, catalogue={"models": {model: entry}})


def test_a_model_that_may_not_spill_is_on_gpus_or_not_at_all() -> None:
    s = wishing("large", ["8GiB"], spill=False)
    why = s.why(s.ask("large"))
    assert "can never fit this cluster, the catalogue wants it not in host RAM; it would fit" in why
    assert "one GPU (gpu0): needs 11.9 GiB" in why
    assert "CPU only" not in why and "some layers" not in why
    s = wishing("moe", ["3GiB"], spill=False)
    assert s.ask("moe") in s.refusals
    s = wishing("large", ["8GiB", "6GiB"], spill=False)
    s.run("large")
    assert s.tier("large") == "several GPUs"


@pytest.mark.parametrize(("most", "tier", "n_gpus"), [(1, "some layers in host RAM", 1), (2, "several GPUs", 2)])
def test_no_more_gpus_are_taken_than_the_catalogue_allows(most: int, tier: str, n_gpus: int) -> None:
    s = wishing("large", ["8GiB", "6GiB", "2GiB"], max_gpus=most)
    s.run("large")
    assert (s.tier("large"), len(s.where("large"))) == (tier, n_gpus)
    assert "gpu0" in s.where("large"), "the biggest, where not all may be used"


def test_the_largest_cards_are_tried_together_however_many_there_are() -> None:
    sizes = ["2GiB"] * 4 + ["4GiB"] * 4
    s = wishing("large", sizes, max_gpus=4, spill=False)
    s.run("large")
    assert s.tier("large") == "several GPUs"
    many = Scenario([gpu("1200MiB", f"gpu{i}") for i in range(24)], ALL)
    many.run("large")
    assert many.tier("large") == "several GPUs" and len(many.where("large")) > 10


@pytest.mark.parametrize("name", ["gpu1", "box/gpu1", "id-gpu1"])
def test_only_the_gpus_that_the_catalogue_names_are_used(name: str) -> None:
    s = wishing("small", ["1GiB", "8GiB"], gpus=[name])
    s.run("small")
    assert s.where("small") == ["gpu1"]
    full = wishing("large", ["16GiB", "8GiB"], gpus=[name], spill=False)
    why = full.why(full.ask("large"))
    assert f"the catalogue wants it only on {name}, not in host RAM" in why and "gpu0" not in why


def test_gpus_that_no_machine_has_leave_host_ram_or_nothing() -> None:
    s = wishing("small", ["8GiB"], gpus=["gpu7"])
    s.run("small")
    assert s.tier("small") == "CPU only"
    s = wishing("small", ["8GiB"], gpus=["gpu7"], spill=False)
    assert "only on gpu7, not in host RAM: no GPU is left for it" in s.why(s.ask("small"))


def test_layers_are_set_explicitly_and_sum_up() -> None:
    s = Scenario([gpu("8GiB"), gpu("6GiB", "gpu1")], ALL)
    s.run("large")
    layout = s.replica("large").placement.layout
    assert layout.n_gpu_layers == 33 == sum(layout.tensor_split)
    assert all(share >= 1 and share == int(share) for share in layout.tensor_split)


def test_unlike_gpus_get_shares_by_their_room() -> None:
    s = Scenario([gpu("10GiB"), gpu("3GiB", "gpu1")], ALL)
    s.run("large")
    shares = dict(zip(s.where("large"), s.replica("large").placement.layers, strict=True))
    assert shares["gpu0"] > 2 * shares["gpu1"]


def test_a_partial_offload_takes_as_many_layers_as_fit() -> None:
    s = Scenario([gpu("8GiB")], ALL)
    s.run("large")
    placement = s.replica("large").placement
    one_more = 8 * GIB - placement.device_bytes[0]
    assert 0 <= one_more < 400 * 1024**2  # a layer of LARGE is about 390 MiB


def test_experts_on_host_are_told_to_the_engine() -> None:
    s = Scenario([gpu("3GiB")], ALL)
    s.run("moe")
    assert s.started[-1].placement.layout.spills_experts and s.started[-1].placement.computes_on_cpu


def test_reserves_stay_free() -> None:
    s = Scenario([gpu("3GiB"), gpu("3GiB", "gpu1")], ALL, catalogue={"reserves": {"gpus": {"gpu0": "1GiB"}}})
    s.run("medium")
    assert s.where("medium") == ["gpu1"]


@pytest.mark.parametrize("name", ["id-gpu0", "box/gpu0", "gpu0"])
def test_a_reserve_names_its_gpu_in_three_ways(name: str) -> None:
    s = Scenario([gpu("3GiB")], ALL, catalogue={"reserves": {"gpus": {name: "2GiB"}}})
    s.run("medium")
    assert s.tier("medium") == "some layers in host RAM"


def test_a_reserve_covers_what_others_use() -> None:
    s = Scenario([gpu("4GiB")], ALL, catalogue={"reserves": {"gpu_bytes": "1GiB"}})
    s.foreign[DeviceId("id-gpu0")] = GIB
    s.read_devices()
    s.run("medium")  # 2.6 GiB fit into 3 GiB; reserve and desktop are not added up
    assert s.tier("medium") == "one GPU"


def test_memory_of_others_is_left_alone() -> None:
    s = Scenario([gpu("3GiB"), gpu("8GiB", "gpu1")], ALL)
    s.foreign[DeviceId("id-gpu0")] = GIB
    s.read_devices()
    s.run("medium")
    assert s.where("medium") == ["gpu1"]


def test_host_ram_is_booked_for_mapped_weights() -> None:
    s = Scenario(
        [], ALL, ram="6GiB"
    )  # 4 GiB beyond the reserve hold one of them, though the kernel calls them available
    s.ask("medium")
    second = s.ask("medium", n_ctx=16384)
    assert s.waits(second)


def test_what_others_use_of_host_ram_is_not_given_away() -> None:
    s = Scenario([], ALL, ram="8GiB")
    s.host_foreign[NodeId("box")] = 4 * GIB
    s.report_node()
    request = s.ask("medium")
    assert s.why(request) == "waiting for memory that other programs use"
    s.host_foreign.clear()
    s.report_node()
    s.wait(1)
    assert request in s.grants


def test_cuda_devices_are_charged_their_overhead() -> None:
    s = Scenario([gpu("3GiB", kind="cuda"), gpu("4GiB", "gpu1", kind="cuda")], ALL)
    s.run("medium")
    assert s.where("medium") == ["gpu1"]


def test_the_impossible_is_refused_before_anybody_is_evicted() -> None:
    s = Scenario([gpu("4GiB")], ALL, ram="8GiB")
    s.run("medium")
    s.wait(60)
    request = s.ask("large")
    assert isinstance(s.error(request), Impossible) and s.evicted() == []
    for part in ("one GPU (gpu0): needs 11.9 GiB on gpu0", "free of 4.0 GiB", "CPU only", "of host RAM"):
        assert part in s.why(request)


def test_a_refusal_names_the_context_that_would_fit() -> None:
    s = Scenario([gpu("600MiB")], ALL, ram="2340MiB")
    request = s.ask("small", n_ctx=32768)
    named = re.search(r"it would fit with n_ctx <= (\d+)", s.why(request))
    assert isinstance(s.error(request), Impossible) and named is not None
    most = int(named[1])
    assert s.ask("small", n_ctx=most + 256) in s.refusals
    assert s.ask("small", n_ctx=most) in s.grants


def test_an_impossible_request_does_not_take_others_of_its_model_with_it() -> None:
    s = Scenario([gpu("600MiB")], ALL, ram="2340MiB", auto=False)
    s.ask("medium")  # keeps nothing: it does not fit at all
    first = s.ask("small")
    huge, small = s.ask("small", n_ctx=32768), s.ask("small", n_ctx=1024)
    s.finish_load("small")
    s.done(first)
    assert isinstance(s.error(huge), Impossible) and small in s.grants


def test_who_waits_behind_an_impossible_request_is_served_when_it_is_refused() -> None:
    s = Scenario([gpu("600MiB")], ALL, ram="2340MiB")
    s.run("small")
    s.join("attic")  # nobody knows yet what it has
    huge, small = s.ask("small", n_ctx=32768), s.ask("small")
    assert s.waits(huge) and s.waits(small)
    s.report_node("attic", has=[])
    s.wait(1.0)
    assert isinstance(s.error(huge), Impossible) and small in s.grants


def test_a_file_that_no_machine_has() -> None:
    s = Scenario([gpu("2GiB")], ALL, catalogue={"models": {"ghost": {"path": "/else/ghost.gguf"}}})
    request = s.ask("ghost")
    assert isinstance(s.error(request), Unavailable) and "/else/ghost.gguf" in s.why(request)


def test_a_damaged_file_is_refused_with_its_reason() -> None:
    s = Scenario([gpu("2GiB")], {})
    s.models, s.invalid = {"small": SMALL}, {"small": "tensor 3 ends past the file at offset 99"}
    s.report_node()
    request = s.ask("small")
    assert isinstance(s.error(request), InvalidGGUF) and "offset 99" in s.why(request)
    assert s.announced("model_invalid")


def test_the_tightest_fit_over_machines() -> None:
    s = Scenario([gpu("8GiB")], ALL)
    s.add_node("attic", [gpu("3GiB", "gpu9")])
    s.run("medium")
    assert s.node("medium") == "attic"


def test_a_model_goes_where_its_file_is() -> None:
    s = Scenario([gpu("8GiB")], {"small": SMALL})
    s.models = dict(ALL)
    s.add_node("attic", [], has=["large"])
    s.run("large")
    assert s.node("large") == "attic" and s.tier("large") == "CPU only"


def test_never_spread_over_machines() -> None:
    s = Scenario([gpu("8GiB")], ALL, ram="4GiB")
    s.add_node("attic", [gpu("8GiB", "gpu9")], ram="4GiB")
    request = s.ask("large")
    assert isinstance(s.error(request), Impossible)
    assert "on box" in s.why(request) and "on attic" in s.why(request)


def test_cpu_only_takes_the_machine_with_the_most_ram() -> None:
    s = Scenario([], ALL, ram="16GiB")
    s.add_node("attic", [], ram="32GiB")
    s.run("large")
    assert s.node("large") == "attic"


def test_plan_starts_nothing_and_says_what_a_request_would_find() -> None:
    s = Scenario([gpu("3GiB"), gpu("1GiB", "gpu1")], ALL)
    s.run("medium")
    s.wait(60)
    before = len(s.log)
    plan = s.core.plan("large", None, s.now)
    assert plan.choice is not None and plan.choice.verdict == "evict" and len(s.log) == before
    assert [r.tier for r in plan.choice.rejections] == ["one GPU", "one GPU", "several GPUs"]
    serving = s.core.plan("medium", None, s.now).serving
    assert serving is not None and serving.model == "medium"


def test_a_model_is_loaded_while_it_is_busy_and_not_before_it_is_ready() -> None:
    s = Scenario([gpu("8GiB")], ALL, auto=False)
    request = s.ask("medium")
    assert s.core.busy("medium", None, s.now) is None
    s.finish_load("medium")
    assert request in s.grants
    busy = s.core.busy("medium", None, s.now)
    assert busy is not None and busy.free_slots == 0
    assert s.core.busy("medium", busy.n_ctx + 1, s.now) is None
    assert s.core.busy("small", None, s.now) is None
    s.done(request)
    assert s.core.busy("medium", None, s.now) is None


def test_plan_explains_why_not_the_larger_gpu() -> None:
    s = Scenario([gpu("8GiB"), gpu("1GiB", "gpu1")], ALL)
    plan = s.core.plan("small", None, s.now)
    assert plan.choice is not None and [str(r) for r in plan.choice.rejections] == [
        "one GPU (gpu0): fits, too, but ranks lower"
    ]


def test_plan_refuses_as_the_request_would() -> None:
    s = Scenario([gpu("1GiB")], ALL, ram="4GiB")
    plan = s.core.plan("large", None, s.now)
    assert plan.choice is not None and plan.choice.verdict == "impossible"
    s.join("attic", [gpu("24GiB", "gpu9")])
    with pytest.raises(Unavailable, match="reading its header and the machines"):
        s.core.plan("large", None, s.now)


def test_a_plan_knows_that_a_busy_replica_has_to_go_first() -> None:
    s = Scenario([gpu("8GiB")], ALL, catalogue={"defaults": {"max_replicas": 1}})
    short = s.ask("small", 1024)
    replica = s.replica("small")
    plan = s.core.plan("small", replica.n_ctx + 1, s.now)
    assert plan.choice is not None and plan.choice.verdict == "wait" and plan.choice.victims == {replica.replica_id}
    longer = s.ask("small", replica.n_ctx + 1)
    assert s.waits(longer) and s.why(longer) == plan.reason == "waiting for small (busy)"
    s.done(short)
    assert longer in s.grants


def test_a_plan_knows_who_stands_in_line() -> None:
    s = Scenario([gpu("8GiB")], ALL)
    s.ask("small")
    s.ask("small")
    plan = s.core.plan("small", None, s.now)
    assert plan.serving is s.replica("small") and "1 earlier requests for this model come first" in plan.reason


def test_a_plan_for_a_full_queue_is_refused_as_the_request_would_be() -> None:
    s = Scenario([gpu("8GiB")], ALL, catalogue={"policy": {"queue_limit": 1}})
    s.ask("small")
    s.ask("small")
    with pytest.raises(QueueFull):
        s.core.plan("small", None, s.now)


def test_plan_before_the_header_is_read() -> None:
    s = Scenario([gpu("1GiB")], {})
    s.models, s.reads_headers = dict(ALL), False
    s.report_node()
    with pytest.raises(Unavailable):
        s.core.plan("small", None, s.now)
