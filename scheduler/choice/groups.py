"""The candidates for a need on some machines, in groups of equally good ones, best group first.

A machine's candidates are remembered with the need; whether any of a group may fit on a machine is known from its free
memory alone, so that most of them are never looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import combinations
from math import comb

from scheduler.choice.candidates import (
    CPU_ONLY,
    EXPERTS_IN_RAM,
    ONE_GPU,
    SEVERAL_GPUS,
    SOME_LAYERS_IN_RAM,
    Candidate,
)
from scheduler.choice.need import Need
from scheduler.choice.room import Room
from scheduler.cluster.facts import DeviceFacts
from scheduler.cluster.inventory import Node

MOST_SORTED = 4096  # device combinations of one size that are looked through
LARGEST_SUBSETS = 8  # of those tried
MOST_SUBSETS = 64  # device combinations tried per size: C(8, 4) = 70, so eight GPUs are searched almost whole


@dataclass(frozen=True, slots=True)
class Group:
    """Candidates of one tier on `size` devices each (0: as many as there are)."""

    tier: str
    size: int
    need: Need
    nodes: tuple[Node, ...]
    least_bytes: int = 0

    def __iter__(self) -> Iterator[Candidate]:
        return (candidate for node in self.nodes for candidate in self.on(node))

    def on(self, node: Node) -> Sequence[Candidate]:
        key = "group", self.tier, self.size, node.facts.node_id
        if key not in self.need.known:
            self.need.known[key] = self._on(node)
        found: Sequence[Candidate] = self.need.known[key]
        return found

    def _on(self, node: Node) -> Sequence[Candidate]:
        devices = self.need.wishes.devices(node)
        if self.tier == CPU_ONLY:
            return [Candidate(CPU_ONLY, self.need, node, ())]
        if self.tier == SOME_LAYERS_IN_RAM:
            return [spilling(self.need, node)] if devices else []
        return [Candidate(self.tier, self.need, node, each, self.least_bytes) for each in _subsets(devices, self.size)]

    def roomiest(self, node: Node, room: Room) -> Candidate | None:
        """The candidate on the machine's devices with the most free memory."""
        every = self.on(node)
        if not self.size:
            return every[0] if every else None
        devices = sorted(self.need.wishes.devices(node), key=lambda facts: -room.devices.get(facts.device_id, 0))
        if len(devices) < self.size:
            return None
        most = sorted(devices[: self.size], key=lambda facts: facts.total_bytes)
        return Candidate(self.tier, self.need, node, tuple(most), self.least_bytes)

    def may_fit(self, node: Node, room: Room) -> bool:
        """Whether the most memory that so many devices of the machine have free is enough at all."""
        if room.active < 1:
            return False
        if not self.size:
            return True
        if sum(nlargest(self.size, room.devices.values())) < self.least_bytes:
            return False
        if self.tier != EXPERTS_IN_RAM:
            return True
        roomiest = self.roomiest(node, room)  # else the host RAM for the experts would be found short again and again
        return roomiest is not None and roomiest.feasible(room)


def groups(need: Need, nodes: Sequence[Node]) -> list[Group]:
    """By tier, then by number of devices.

    Devices that cannot be used now are candidates too (a `Room` has no bytes for them), so that "not now" and "never"
    are told apart.
    """
    wishes = need.wishes
    allowed = tuple(node for node in nodes if wishes.allow(node))
    most = max((len(wishes.devices(node)) for node in allowed), default=0)
    most = min(most, wishes.max_gpus or most)
    least = need.least_bytes()
    found = [Group(ONE_GPU, 1, need, allowed, least)]
    found += [Group(SEVERAL_GPUS, size, need, allowed, least) for size in range(2, most + 1)]
    if need.shape.is_moe and wishes.spill:
        without_experts = need.least_bytes(need.n_layers - 1)
        found += [Group(EXPERTS_IN_RAM, size, need, allowed, without_experts) for size in range(1, most + 1)]
    if wishes.spill:
        found += [Group(tier, 0, need, allowed) for tier in (SOME_LAYERS_IN_RAM, CPU_ONLY)]
    return found


def spilling(need: Need, node: Node) -> Candidate:
    """As many layers on the node's devices as fit."""
    most = need.wishes.max_gpus or len(node.devices)
    return Candidate(SOME_LAYERS_IN_RAM, need, node, need.wishes.devices(node)[-most:], need.least_bytes())


def _subsets(devices: Sequence[DeviceFacts], size: int) -> list[tuple[DeviceFacts, ...]]:
    """Combinations of `size` devices, the least memory first: big cards stay free for big models. Of many, the smallest
    and some of the largest; of very many, those of neighbours in size."""
    if comb(len(devices), size) > MOST_SORTED:
        return [tuple(devices[i : i + size]) for i in range(len(devices) - size + 1)]
    sized = sorted(combinations(devices, size), key=lambda subset: sum(facts.total_bytes for facts in subset))
    return sized if len(sized) <= MOST_SUBSETS else sized[: MOST_SUBSETS - LARGEST_SUBSETS] + sized[-LARGEST_SUBSETS:]
