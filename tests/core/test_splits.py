"""Layers of unlike sizes over unlike devices: nobody who tries every split finds a better one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario import gpu

from arriero.example_models import Dimensions, write_example_model
from scheduler.choice.layouts import EXPERTS_IN_RAM, LayoutFamily
from scheduler.choice.splits import shares, split
from scheduler.choice.workload import Workload
from scheduler.cluster.facts import NodeFacts
from scheduler.cluster.free_memory import Room
from scheduler.cluster.inventory import Device, Node
from scheduler.cluster.replica import Placement
from scheduler.config import Reserves
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import ContextParams, DeviceSpec, Layout, Rates
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.units import GIB, MIB, NodeId

MIXTURE = Dimensions(14, 2048, 16, 4, 1024, 64000, 64, 4)  # 0.21 GiB of experts a layer, 0.01 without


def every_split(n_layers: int, n_devices: int) -> Iterator[tuple[int, ...]]:
    for ends in combinations(range(1, n_layers), n_devices - 1):
        yield tuple(end - begin for begin, end in pairwise((0, *ends, n_layers)))


def fit(sums: Sequence[Sequence[int]], rooms: Sequence[int]) -> list[tuple[int, ...]]:
    """All splits that fit."""
    return [
        counts
        for counts in every_split(len(sums[0]) - 1, len(rooms))
        if all(share <= room for share, room in zip(shares(sums, counts), rooms, strict=True))
    ]


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_a_split_is_found_where_there_is_one(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    rooms = data.draw(st.lists(st.integers(-1, 25), min_size=1, max_size=3))
    wanted = [data.draw(st.integers(0, len(sizes))) for _ in rooms[1:]]
    padded = [[size + data.draw(st.integers(0, 1)) for size in sizes] for _ in rooms]
    sums = [[sum(each[:count]) for count in range(len(sizes) + 1)] for each in padded]
    found, fitting = split(sums, rooms, wanted), fit(sums, rooms)
    if found is not None:
        assert found in fitting
        if len(rooms) == 2:
            assert abs(found[0] - wanted[0]) == min(abs(counts[0] - wanted[0]) for counts in fitting)
    elif fitting:  # fewer devices do as well
        fewer = [i for size in range(1, len(rooms)) for i in combinations(range(len(rooms)), size)]
        assert any(fit([sums[i] for i in some], [rooms[i] for i in some]) for some in fewer)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return read_shape(write_example_model(tmp_path_factory.mktemp("models") / "moe.gguf", "moe", MIXTURE))


class Cards:
    """A machine with some unlike CUDA cards, and a model on them with some experts in host RAM."""

    def __init__(self, shape: ModelShape, n_cards: int, seed: int) -> None:
        chance = random.Random(seed)
        self.workload = Workload("m", shape, ContextParams(n_ctx=chance.choice((4096, 16384))), Reserves())
        least, most = self.workload.least_bytes(self.workload.n_layers - 1), self.workload.least_bytes()
        besides = 1.25 * n_cards * GIB
        sizes = [chance.uniform(0.2, 1) for _ in range(n_cards)]
        total = chance.uniform(least, 0.9 * most) + besides
        self.free = sorted(int(total * size / sum(sizes)) for size in sizes)
        speeds = [chance.choice((300e9, 900e9)) if seed % 2 else 0.0 for _ in sizes]
        devices = tuple(
            replace(gpu(f"{count // MIB}MiB", f"gpu{i}", "cuda"), total_bytes=count, rates=Rates(speed, 1e13))
            for i, (count, speed) in enumerate(zip(self.free, speeds, strict=True))
        )
        facts = NodeFacts(NodeId("box"), "box", "", 8, 64 * GIB, devices, llama_build=CHECKED_BUILD)
        self.node = Node(facts, 0.0, devices={device.device_id: Device(device) for device in devices})
        self.room = Room({d.device_id: d.total_bytes for d in devices}, 64 * GIB, 8)
        self.candidate = LayoutFamily(EXPERTS_IN_RAM, self.workload, self.node, devices, least)

    def found(self) -> Placement | None:
        return self.candidate.solve(self.room)

    def least_experts(self, *, drawn: bool) -> int | None:
        """Of as few layers as can be, whatever the split."""
        layers = range(1, self.workload.n_layers)
        return next((n for n in layers if any(self._fits(n, counts, drawn) for counts in self._splits())), None)

    def _splits(self) -> Iterator[tuple[int, ...]]:
        return every_split(self.workload.n_layers, len(self.free))

    def _fits(self, n_cpu_moe: int, counts: tuple[int, ...], drawn: bool) -> bool:
        specs = tuple(DeviceSpec(f"d{i}", "cuda") for i in range(len(counts)))
        layout = Layout(specs, sum(counts), tuple(map(float, counts)), n_cpu_moe=n_cpu_moe)
        devices = self.candidate.devices
        cost, _, needs = self.workload.shares(self.node, devices, layout, exact=False)
        if drawn and any(need > there for need, there in zip(needs, self.free, strict=True)):
            held = (need - share.compute_bytes for need, share in zip(needs, cost.devices, strict=True))
            if any(need > there for need, there in zip(held, self.free, strict=True)):
                return False
            _, _, needs = self.workload.shares(self.node, devices, layout, exact=True)
        return all(need <= there for need, there in zip(needs, self.free, strict=True))


@pytest.mark.parametrize(("n_cards", "seed"), [*((2, seed) for seed in range(16)), *((3, seed) for seed in range(8))])
def test_no_split_leaves_fewer_experts_in_host_ram(n_cards: int, seed: int, mixture: ModelShape) -> None:
    cards = Cards(mixture, n_cards, seed)
    found, least = cards.found(), cards.least_experts(drawn=False)
    n_cpu_moe = found.layout.n_cpu_moe if found else None
    if n_cpu_moe == MIXTURE.n_layer:  # all of them: then the graph is drawn at once
        least = least or n_cpu_moe
    assert n_cpu_moe == least


@pytest.mark.parametrize(("n_cards", "seed"), [*((2, seed) for seed in range(10)), (3, 0), (3, 2)])
def test_nor_does_one_by_its_graph(n_cards: int, seed: int, mixture: ModelShape) -> None:
    cards = Cards(mixture, n_cards, seed)
    found = cards.found()
    assert found is not None
    grown = cards.candidate.grown(cards.workload.drawn(found, cards.node), cards.room)
    assert grown.layout.n_cpu_moe == cards.least_experts(drawn=True)
