"""Clusters and batches of requests by chance, and what each model takes at the least: what `placement` plays."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from arriero.example_models import EXAMPLES, Dimensions, write_example_model
from scheduler.config import Reserves, parse_catalogue
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import ContextParams, DeviceBytes, DeviceSpec, Layout
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.simulation.cards import known_card
from scheduler.simulation.described import DescribedCluster, ModelOnDisk
from scheduler.simulation.description import ClusterDescription, parse_cluster
from scheduler.units import DeviceId, NodeId

CARDS = (
    *("RTX 3080", "RTX 2080 Ti", "RTX 3060", "RTX 3060", "RTX 4070", "RTX 4060 Ti", "Tesla T4", "RTX 4080"),
    *("RTX 3090", "RTX 3090", "RTX 4090", "Tesla P40", "RTX 5090", "RTX A6000", "GTX 1080"),
)
"""Of 8 to 48 GiB; those that people have more often are there twice."""
DISKS = ("500MB/s", "2GB/s", "5GB/s")
KINDS = {
    **EXAMPLES,
    "chat-24b": Dimensions(40, 5120, 40, 8, 32768, 131072),
    "moe-47b": Dimensions(32, 4096, 32, 8, 14336, 32000, 8, 2),
}
"""0.8 to 37 GiB in Q4_K."""
CONTEXT = ContextParams(n_ctx=8192)
OVERHEAD_BYTES = Reserves().cuda_overhead_bytes


class Costs(NamedTuple):
    """What a kind of model takes at the least, in bytes, overheads included."""

    file_bytes: int
    n_layers: int
    """Without the output."""
    alone: int
    """On one GPU."""
    share: int
    """On each of several, before its layers."""
    layer: int
    output: int
    """On the one of several that has the output, besides."""


@dataclass(frozen=True)
class Case:
    """A cluster and a batch: names of models in the order in which they are asked for, "KIND.NUMBER"."""

    seed: int
    cluster: ClusterDescription
    batch: tuple[str, ...]


def read_shapes() -> dict[str, ModelShape]:
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: write_example_model(Path(folder) / f"{kind}.gguf", kind, of) for kind, of in KINDS.items()}
        return {kind: read_shape(file) for kind, file in files.items()}


def least_costs(shape: ModelShape) -> Costs:
    """From the production footprint; all layers of these models are alike, which is checked.

    Of a GPU's compute buffer among several, what counts is whether it is the last; how many there are does not.
    """
    n = shape.n_layer_all
    whole = _held(_devices(shape, n + 1)[0])
    output = _held(_devices(shape, 1)[0])
    layer = _held(_devices(shape, 2)[0]) - output
    assert whole == output + n * layer, "layers differ"
    pairs = [_devices(shape, first, n + 1 - first) for first in range(1, n + 1)]
    share = min(first.compute_bytes for first, _ in pairs)
    last = min(last.compute_bytes for _, last in pairs)
    return Costs(
        file_bytes=shape.file_bytes,
        n_layers=n,
        alone=_devices(shape, n + 1)[0].total_bytes + OVERHEAD_BYTES,
        share=min(share, last) + OVERHEAD_BYTES,
        layer=layer,
        output=output + last - min(share, last),
    )


def _devices(shape: ModelShape, *counts: int) -> tuple[DeviceBytes, ...]:
    """With so many layers on each of some CUDA devices, the output counted as one; others in host RAM."""
    specs = tuple(DeviceSpec(f"d{i}", "cuda") for i in range(len(counts)))
    return footprint(shape, Layout(specs, sum(counts), tuple(map(float, counts))), CONTEXT, CHECKED_BUILD).devices


def _held(device: DeviceBytes) -> int:
    return device.weights_bytes + device.kv_bytes


def kind_of(name: str) -> str:
    return name.partition(".")[0]


def worth_bytes(names: Iterable[str], costs: Mapping[str, Costs]) -> int:
    return sum(costs[kind_of(name)].file_bytes for name in names)


def largest_first(case: Case, costs: Mapping[str, Costs]) -> list[str]:
    return sorted(case.batch, key=lambda name: -costs[kind_of(name)].file_bytes)


def random_case(seed: int, costs: Mapping[str, Costs]) -> Case:
    chance = random.Random(seed)
    nodes = [_random_node(f"box{i}", chance) for i in range(chance.randint(1, 3))]
    cluster = parse_cluster({"nodes": nodes})
    free = [[gpu.free or 0 for gpu in node.gpus] for node in cluster.nodes]
    kinds = [kind for kind in costs if any(_may_fit(costs[kind], each) for each in free)]
    wanted_bytes = chance.uniform(0.6, 1.6) * sum(map(sum, free))
    batch: list[str] = []
    while kinds and wanted_bytes > 0:
        kind = chance.choice(kinds)
        batch.append(f"{kind}.{len(batch)}")
        wanted_bytes -= costs[kind].alone
    return Case(seed, cluster, tuple(batch))


def _random_node(name: str, chance: random.Random) -> dict[str, Any]:
    cards = [chance.choice(CARDS) for _ in range(chance.randint(1, 4))]
    return {
        "name": name,
        "ram": "2TiB",
        "cores": 64,
        "disk_read": chance.choice(DISKS),
        "gpus": [{"name": card, "free": _free_of(card, chance)} for card in cards],
    }


def _free_of(card: str, chance: random.Random) -> int:
    """Others use up to a third of every third card."""
    known = known_card(card)
    assert known is not None
    foreign = chance.uniform(0, 1 / 3) if chance.random() < 1 / 3 else 0.0
    return int(known.total_bytes * (1 - foreign))


def _may_fit(costs: Costs, free: Sequence[int]) -> bool:
    """On a machine with nothing else on it, roughly."""
    several = costs.n_layers * costs.layer + costs.output + len(free) * costs.share
    return costs.alone <= max(free) or several <= 0.97 * sum(free)


def described(case: Case, shapes: Mapping[str, ModelShape], *, spill: bool) -> DescribedCluster:
    models = {name: ModelOnDisk(f"/models/{name}.gguf", shapes[kind_of(name)]) for name in case.batch}
    entries = {name: {"path": model.path, "spill": spill} for name, model in models.items()}
    return DescribedCluster(case.cluster, parse_catalogue({"models": entries}), models)


def rooms_of(case: Case, shapes: Mapping[str, ModelShape]) -> list[Mapping[DeviceId, int]]:
    """What the core has free on each node before it loads anything."""
    core = described(case, shapes, spill=False).core
    return [core.rooms.now(NodeId(node.name)).devices for node in case.cluster.nodes]
