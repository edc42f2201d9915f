"""The tiers of a workload on some machines, the best first. The candidates of a tier are equally good.

A machine's candidates are remembered with the workload. The free memory alone shows whether any candidate of a tier can
fit on a machine. So most candidates are never examined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import combinations
from math import comb

from scheduler.choice.layouts import (
    CPU_ONLY,
    EXPERTS_IN_RAM,
    ONE_GPU,
    SEVERAL_GPUS,
    SOME_LAYERS_IN_RAM,
    LayoutFamily,
)
from scheduler.choice.workload import Workload
from scheduler.cluster.facts import DeviceFacts
from scheduler.cluster.free_memory import Room
from scheduler.cluster.inventory import Node

MOST_SORTED = 4096  # device combinations of one size that are sorted
LARGEST_SUBSETS = 8  # of the combinations that are tried, the largest
MOST_SUBSETS = 64  # device combinations tried per size: C(8, 4) = 70, so nearly all of eight GPUs are tried


@dataclass(frozen=True, slots=True)
class Tier:
    """The candidates of one tier on `size` devices each (0: as many as there are)."""

    name: str
    size: int
    workload: Workload
    nodes: tuple[Node, ...]
    least_bytes: int = 0

    def __iter__(self) -> Iterator[LayoutFamily]:
        return (candidate for node in self.nodes for candidate in self.on(node))

    def on(self, node: Node) -> Sequence[LayoutFamily]:
        key = "tier", self.name, self.size, node.facts.node_id
        return self.workload.once(key, lambda: self._on(node))

    def _on(self, node: Node) -> Sequence[LayoutFamily]:
        devices = self.workload.wishes.devices(node)
        if self.name == CPU_ONLY:
            return [LayoutFamily(CPU_ONLY, self.workload, node, ())]
        if self.name == SOME_LAYERS_IN_RAM:
            return [spilling(self.workload, node)] if devices else []
        return [
            LayoutFamily(self.name, self.workload, node, each, self.least_bytes)
            for each in _subsets(devices, self.size)
        ]

    def roomiest(self, node: Node, room: Room) -> LayoutFamily | None:
        """The candidate on the devices of the machine with the most free memory."""
        every = self.on(node)
        if not self.size:
            return every[0] if every else None
        devices = sorted(self.workload.wishes.devices(node), key=lambda facts: -room.devices.get(facts.device_id, 0))
        if len(devices) < self.size:
            return None
        most = sorted(devices[: self.size], key=lambda facts: facts.total_bytes)
        return LayoutFamily(self.name, self.workload, node, tuple(most), self.least_bytes)

    def may_fit(self, node: Node, room: Room) -> bool:
        """A quick check: whether the `size` devices with the most free memory may be enough."""
        if room.active < 1:
            return False
        if not self.size:
            return True
        if sum(nlargest(self.size, room.devices.values())) < self.least_bytes:
            return False
        if self.name != EXPERTS_IN_RAM:
            return True
        roomiest = self.roomiest(node, room)  # without this, every candidate would fail on the host RAM for experts
        return roomiest is not None and roomiest.feasible(room)


def tiers_of(workload: Workload, nodes: Sequence[Node]) -> list[Tier]:
    """All tiers in their order, then by number of devices.

    Devices that cannot be used now are candidates, too; a `Room` has no bytes for them. So "not now" differs from
    "never".
    """
    wishes = workload.wishes
    allowed = tuple(node for node in nodes if wishes.allow(node))
    most = max((len(wishes.devices(node)) for node in allowed), default=0)
    most = min(most, wishes.max_gpus or most)
    least = workload.least_bytes()
    found = [Tier(ONE_GPU, 1, workload, allowed, least)]
    found += [Tier(SEVERAL_GPUS, size, workload, allowed, least) for size in range(2, most + 1)]
    if workload.shape.is_moe and wishes.spill:
        without_experts = workload.least_bytes(workload.n_layers - 1)
        found += [Tier(EXPERTS_IN_RAM, size, workload, allowed, without_experts) for size in range(1, most + 1)]
    if wishes.spill:
        found += [Tier(tier, 0, workload, allowed) for tier in (SOME_LAYERS_IN_RAM, CPU_ONLY)]
    return found


def spilling(workload: Workload, node: Node) -> LayoutFamily:
    """As many layers on the node's devices as fit."""
    most = workload.wishes.max_gpus or len(node.devices)
    return LayoutFamily(
        SOME_LAYERS_IN_RAM, workload, node, workload.wishes.devices(node)[-most:], workload.least_bytes()
    )


def _subsets(devices: Sequence[DeviceFacts], size: int) -> list[tuple[DeviceFacts, ...]]:
    """Combinations of `size` devices, the least memory first, so that large GPUs stay free for large models. If there
    are many, the smallest and some of the largest. If there are very many, only devices next to each other by size."""
    if comb(len(devices), size) > MOST_SORTED:
        return [tuple(devices[i : i + size]) for i in range(len(devices) - size + 1)]
    sized = sorted(combinations(devices, size), key=lambda subset: sum(facts.total_bytes for facts in subset))
    return sized if len(sized) <= MOST_SUBSETS else sized[: MOST_SUBSETS - LARGEST_SUBSETS] + sized[-LARGEST_SUBSETS:]
