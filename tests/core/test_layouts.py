"""Layouts: what each way of spreading a model needs, and the best that fits a room."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario import LARGE, MEDIUM, MOE, SMALL, gpu, shape

from scheduler.choice.layouts import (
    CPU_ONLY,
    EXPERTS_IN_RAM,
    ONE_GPU,
    PARTIAL,
    SEVERAL_GPUS,
    SOME_LAYERS_IN_RAM,
    TIERS,
    LayoutFamily,
    fits,
)
from scheduler.choice.tiers import tiers_of
from scheduler.choice.workload import Workload
from scheduler.cluster.facts import NodeFacts
from scheduler.cluster.free_memory import Room
from scheduler.cluster.inventory import Device, Node
from scheduler.config import Reserves
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.host import PROCESS_BYTES
from scheduler.costs.params import ContextParams, Rates
from scheduler.units import GIB, MIB, NodeId

CONTEXT = ContextParams(n_ctx=4096)


def node(*sizes: str, kind: str = "rpc", build: str = CHECKED_BUILD) -> Node:
    devices = tuple(gpu(size, f"gpu{i}", kind) for i, size in enumerate(sizes))
    facts = NodeFacts(NodeId("box"), "box", "127.0.0.1", 8, 64 * GIB, devices, llama_build=build)
    return Node(facts, 0.0, devices={device.device_id: Device(device) for device in devices})


def workload(dims: tuple[int, ...], **more: object) -> Workload:
    return Workload("m", shape(*dims), CONTEXT, Reserves(), **more)  # type: ignore[arg-type]


def room(machine: Node, host: int = 64 * GIB) -> Room:
    return Room({d: device.facts.total_bytes for d, device in machine.devices.items()}, host)


def tiers(dims: tuple[int, ...], machine: Node) -> list[tuple[str, int]]:
    return [(g.name, len(list(g))) for g in tiers_of(workload(dims), [machine]) if list(g)]


def test_tiers_come_in_their_order() -> None:
    machine = node("1GiB", "2GiB", "3GiB")
    assert tiers(SMALL, machine) == [
        (ONE_GPU, 3), (SEVERAL_GPUS, 3), (SEVERAL_GPUS, 1), (SOME_LAYERS_IN_RAM, 1), (CPU_ONLY, 1)
    ]  # fmt: skip
    found = [tier for tier, _ in tiers(MOE, machine)]
    assert found == sorted(found, key=TIERS.index) and EXPERTS_IN_RAM in found


def test_without_gpus_there_is_the_cpu() -> None:
    assert tiers(MOE, node()) == [(CPU_ONLY, 1)]


def test_a_need_counts_overheads() -> None:
    machine = node("8GiB", kind="cuda")
    plain = LayoutFamily(ONE_GPU, workload(SMALL), machine, tuple(d.facts for d in machine.devices.values())).minimum()
    spec = workload(SMALL).footprint(plain.layout, CHECKED_BUILD)
    assert plain.device_bytes[0] == spec.devices[0].total_bytes + 600 * MIB
    assert plain.host_bytes > spec.host.total_bytes + plain.host_outside_bytes > spec.host.total_bytes + 128 * MIB
    grown = LayoutFamily(ONE_GPU, workload(SMALL, extra_bytes=MIB), machine, plain_devices(machine)).minimum()
    assert grown.device_bytes[0] == plain.device_bytes[0] + MIB


@pytest.mark.parametrize("tier", [ONE_GPU, CPU_ONLY])
def test_each_machine_is_judged_by_its_own_llama_cpp(tier: str) -> None:
    """Graphs were drawn after one release; under others, and where it is not known, the bound holds."""
    wanted = workload(LARGE)
    layout = LayoutFamily(tier, wanted, node("16GiB"), plain_devices(node("16GiB"))[: tier == ONE_GPU]).minimum().layout

    def taken(build: str, *, exact: bool) -> tuple[int, ...]:
        machine = node("16GiB", build=build)
        devices = plain_devices(machine)[: tier == ONE_GPU]
        found = wanted.placement(tier, machine, devices, layout, exact=exact)
        return *found.device_bytes, found.host_bytes

    bound = taken(CHECKED_BUILD, exact=False)
    drawn = taken(CHECKED_BUILD, exact=True)
    assert drawn != bound and all(one <= other for one, other in zip(drawn, bound, strict=True))
    assert taken(f"{CHECKED_BUILD}+cpu", exact=True) == taken(f"{CHECKED_BUILD}+cuda", exact=True) == drawn
    assert taken("0.3.99+cuda", exact=True) == taken("", exact=True) == bound


def plain_devices(machine: Node) -> tuple:  # type: ignore[type-arg]
    return tuple(device.facts for device in machine.devices.values())


def test_repacked_weights_take_their_memory_again_and_mapped_ones_are_file_backed() -> None:
    mapped = LayoutFamily(CPU_ONLY, workload(SMALL), node(), ()).minimum()
    read = LayoutFamily(CPU_ONLY, workload(SMALL, use_mmap=False), node(), ()).minimum()
    repacked = LayoutFamily(CPU_ONLY, workload(SMALL, use_extra_bufts=True), node(), ()).minimum()
    assert mapped.host_bytes == read.host_bytes and read.host_mapped_bytes == 0
    assert repacked.host_bytes == mapped.host_bytes + mapped.host_mapped_bytes


@pytest.mark.parametrize(
    "changed",
    [{"active": 0}, {"host_bytes": 1}, {"devices": {}}],
)
def test_fits_looks_at_everything(changed: dict[str, object]) -> None:
    machine = node("3GiB")
    placement = LayoutFamily(EXPERTS_IN_RAM, workload(MOE), machine, plain_devices(machine)).minimum()
    assert fits(placement, room(machine))
    assert not fits(placement, replace(room(machine), **changed))  # type: ignore[arg-type]


def test_layers_move_off_the_fullest_device() -> None:
    machine = node("9GiB", "3500MiB")
    [candidate] = next(g for g in tiers_of(workload(LARGE), [machine]) if g.name == SEVERAL_GPUS)
    placement = candidate.solve(room(machine))
    assert placement is not None and sum(placement.layers) == 33 and fits(placement, room(machine))


def test_too_little_in_all_is_seen_at_once() -> None:
    machine = node("1GiB", "1GiB")
    [candidate] = next(g for g in tiers_of(workload(LARGE), [machine]) if g.name == SEVERAL_GPUS)
    assert candidate.solve(room(machine)) is None


def test_more_devices_than_layers_is_no_spread() -> None:
    machine = node(*["100MiB"] * 10)
    found = tiers_of(workload((8, 1024, 2816)), [machine])
    ten = [c for tier in found for c in tier if len(c.devices) == 10 and c.tier == SEVERAL_GPUS]
    assert len(ten) == 1 and ten[0].solve(room(machine)) is None


def test_a_partial_offload_needs_the_host_for_the_rest() -> None:
    machine = node("8GiB")
    [candidate] = next(g for g in tiers_of(workload(LARGE), [machine]) if g.name == SOME_LAYERS_IN_RAM)
    assert candidate.solve(room(machine, host=GIB)) is None
    tight = candidate.solve(room(machine, host=6 * GIB))
    roomy = candidate.solve(room(machine))
    assert tight == roomy  # the most layers on the GPU also need the least host RAM


def test_a_partial_offload_uses_a_second_device_only_for_more_layers() -> None:
    machine = node("8GiB", "100MiB")
    [candidate] = next(g for g in tiers_of(workload(LARGE), [machine]) if g.name == SOME_LAYERS_IN_RAM)
    placement = candidate.solve(room(machine))
    assert placement is not None and len(placement.device_ids) == 1


@pytest.mark.parametrize("dims", [MEDIUM, LARGE, MOE])
@pytest.mark.slow
def test_drawing_only_where_the_bound_does_not_decide_changes_no_layout(dims: tuple[int, ...]) -> None:
    chance = random.Random(str(dims))
    for _ in range(12):
        machine = node(*(f"{chance.randint(500, 9000)}MiB" for _ in range(chance.randint(1, 4))))
        space = room(machine, chance.randint(2, 30) * GIB)
        pairs = zip(
            tiers_of(workload(dims), [machine]), tiers_of(workload(dims, precision="exact"), [machine]), strict=True
        )
        for quick, drawn in ((a, b) for tier, other in pairs for a, b in zip(tier, other, strict=True)):
            found, truth = quick.solve(space), drawn.solve(space)
            if quick.tier in PARTIAL and found and truth:
                grown = quick.grown(quick.workload.drawn(found, machine), space)
                assert fits(grown, space)
                assert truth.n_resident_layers - grown.n_resident_layers <= 1
                continue
            assert (found and found.layout) == (truth and truth.layout), quick.tier
            assert truth is None or found is None or quick.workload.drawn(found, machine) == truth


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(100, 9000), min_size=1, max_size=4),
    host_mib=st.integers(200, 20000),
    dims=st.sampled_from((SMALL, MEDIUM, LARGE, MOE)),
)
def test_whatever_is_found_fits_and_is_complete(sizes: list[int], host_mib: int, dims: tuple[int, ...]) -> None:
    machine = node(*(f"{size}MiB" for size in sizes))
    free = room(machine, host=host_mib * MIB)
    for tier in tiers_of(workload(dims), [machine]):
        for candidate in tier:
            placement = candidate.solve(free)
            if placement is None:
                continue
            layout = placement.layout
            assert fits(placement, free)
            assert sum(placement.layers) == layout.n_gpu_layers <= placement.n_layers
            assert (layout.n_gpu_layers == placement.n_layers) == (
                candidate.tier in (ONE_GPU, SEVERAL_GPUS, EXPERTS_IN_RAM)
            )
            assert placement.computes_on_cpu == (candidate.tier not in (ONE_GPU, SEVERAL_GPUS))


def test_a_runner_is_charged_what_the_command_line_says() -> None:
    assert Reserves().runner_overhead_bytes == PROCESS_BYTES


@pytest.mark.parametrize("gib", [2, 4, 8, 12])
def test_as_many_experts_as_fit_stay_on_the_gpu(gib: int) -> None:
    """One layer's experts more would not fit."""
    machine, wanted = node(f"{gib}GiB"), workload(MOE, precision="exact")
    (experts,) = (c for tier in tiers_of(wanted, [machine]) for c in tier if c.tier == EXPERTS_IN_RAM)
    found = experts.solve(room(machine))
    assert found is not None and found.computes_on_cpu and found.layout.n_gpu_layers == wanted.n_layers
    assert found.n_resident_layers == wanted.n_layers - found.layout.n_cpu_moe
    fewer = replace(found.layout, n_cpu_moe=found.layout.n_cpu_moe - 1)
    more = wanted.placement(EXPERTS_IN_RAM, machine, machine.facts.devices, fewer)
    assert more.device_bytes[0] > gib * GIB >= found.device_bytes[0]


def test_the_fastest_gpu_is_filled_first() -> None:
    """A token reads every layer once: the more of them where memory is read fast, the sooner it is there."""
    slow, fast = (replace(gpu("8GiB", f"gpu{i}"), rates=Rates(r, 1e13)) for i, r in enumerate((300e9, 900e9)))
    facts = NodeFacts(NodeId("box"), "box", "127.0.0.1", 8, 64 * GIB, (slow, fast), llama_build=CHECKED_BUILD)
    machine = Node(facts, 0.0, devices={device.device_id: Device(device) for device in (slow, fast)})
    both = next(c for tier in tiers_of(workload(LARGE), [machine]) for c in tier if c.tier == SEVERAL_GPUS)
    found = both.solve(room(machine))
    assert found is not None
    share = dict(zip(found.device_ids, found.device_bytes, strict=True))
    layer_bytes = both.least_bytes // both.workload.n_layers
    assert 8 * GIB - share[fast.device_id] < 2 * layer_bytes
