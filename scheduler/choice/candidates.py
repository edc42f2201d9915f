"""Ways to lay a model out on a node, best first, each able to find its best placement in a given `Room`.

    one GPU            all layers on one device
    several GPUs       all layers over 2, 3, ... devices
    experts in RAM     MoE expert tensors of as few layers as possible in host RAM, everything else on GPUs (one, then
                       several)
    some layers in RAM as many layers on GPUs as fit
    CPU only

`solve(room)` is pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scheduler.choice.need import Need
from scheduler.choice.room import Room
from scheduler.cluster.facts import DeviceFacts
from scheduler.cluster.inventory import Node
from scheduler.cluster.replica import Placement
from scheduler.costs.params import DeviceSpec, Layout
from scheduler.units import NodeId

ONE_GPU = "one GPU"
SEVERAL_GPUS = "several GPUs"
EXPERTS_IN_RAM = "experts in host RAM"
SOME_LAYERS_IN_RAM = "some layers in host RAM"
CPU_ONLY = "CPU only"
TIERS = (ONE_GPU, SEVERAL_GPUS, EXPERTS_IN_RAM, SOME_LAYERS_IN_RAM, CPU_ONLY)
ON_GPU = frozenset({ONE_GPU, SEVERAL_GPUS})
PARTIAL = frozenset({EXPERTS_IN_RAM, SOME_LAYERS_IN_RAM})
CONTEXT_STEP = 256  # llama.cpp rounds contexts up to so many tokens


def fits(placement: Placement, room: Room) -> bool:
    """Whether the placement fits in `room`, host RAM, CPU seats and the active-model limit included."""
    return (
        room.active >= 1
        and placement.host_bytes <= room.host_bytes
        and (not placement.computes_on_cpu or room.cpu_seats >= 1)
        and all(
            need <= room.devices.get(device_id, 0)
            for device_id, need in zip(placement.device_ids, placement.device_bytes, strict=True)
        )
    )


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout family on concrete devices of one node. `least_bytes` as `Need.least_bytes` says."""

    tier: str
    need: Need
    node: Node
    devices: tuple[DeviceFacts, ...]
    least_bytes: int = 0
    n_cpu_moe: int = 0

    @property
    def node_id(self) -> NodeId:
        return self.node.facts.node_id

    def solve(self, room: Room) -> Placement | None:
        """The best placement of this family that fits `room`, or None."""
        if room.active < 1:
            return None
        if self.tier == SOME_LAYERS_IN_RAM:
            found = self._most_layers(room)
        elif self.tier == EXPERTS_IN_RAM and not self.n_cpu_moe:
            found = self._most_experts(room)
        elif self.devices:
            found = self._spread(room)
        else:
            found = self._placement((), (), bounded=not self.need.draws)
        if found and not fits(found, room) and not self.need.never_draws and self._may_do_drawn(found, room):
            found = exact(found, self.need, self.node)
        return found if found and fits(found, room) else None

    def _may_do_drawn(self, bounded: Placement, room: Room) -> bool:
        """Whether it could fit `room` with a graph that takes less than the bound: nothing is drawn in vain."""
        most_bytes = self.need.bounded_footprint(bounded.layout).host.compute_bytes
        return fits(replace(bounded, host_bytes=max(0, bounded.host_bytes - most_bytes)), room)

    def feasible(self, room: Room) -> bool:
        """Whether it fits `room` somehow, the best way or not."""
        if self.tier == EXPERTS_IN_RAM and not self.n_cpu_moe:
            most = self.need.n_layers - 1
            if replace(self, n_cpu_moe=most, least_bytes=self.need.least_bytes(most)).solve(room) is not None:
                return True  # without looking for the best way
        return self.solve(room) is not None

    def minimum(self) -> Placement:
        """The family's plainest placement, whether or not it fits: what the numbers in a refusal are taken from."""
        if not self.devices:
            return self._placement((), ())
        if self.tier == EXPERTS_IN_RAM and not self.n_cpu_moe:
            return replace(self, n_cpu_moe=self.need.n_layers - 1).minimum()
        counts = _proportional([device.total_bytes for device in self.devices], self.need.n_layers)
        return self._placement(self.devices, counts, bounded=self.tier in PARTIAL)

    def _placement(self, devices: Sequence[DeviceFacts], counts: Sequence[int], *, bounded: bool = False) -> Placement:
        return self.need.placement(self.tier, self.node, devices, self._layout(devices, counts), bounded=bounded)

    def _layout(self, devices: Sequence[DeviceFacts], counts: Sequence[int]) -> Layout:
        return Layout(
            devices=tuple(DeviceSpec(f"d{i}", device.kind) for i, device in enumerate(devices)),
            n_gpu_layers=sum(counts),
            tensor_split=tuple(float(count) for count in counts),
            n_cpu_moe=self.n_cpu_moe,
        )

    def _fitting(
        self, devices: Sequence[DeviceFacts], counts: Sequence[int], free: Sequence[int]
    ) -> tuple[Placement | None, list[int]]:
        """The placement with `counts` layers per device, if it fits in `free`, and the bytes left there (negative: at
        least so much is missing). The graph is drawn only if weights and cache fit and the bound does not; of partial
        offloads not at all, which would cost much where CUDA copies weights over: see `grown`."""
        layout = self._layout(devices, counts)
        spills = self.tier == SOME_LAYERS_IN_RAM or 0 < self.n_cpu_moe < self.need.n_layers - 1
        spills = spills or self.need.never_draws
        for bounded in (False,) if self.need.draws else (True,) if spills else (True, False):
            cost, _, needs = self.need.shares(self.node, devices, layout, bounded=bounded)
            slack = [there - need for there, need in zip(free, needs, strict=True)]
            if min(slack) >= 0:
                return self.need.placement(self.tier, self.node, devices, layout, bounded=bounded), slack
            if bounded and not spills:
                slack = [left + share.compute_bytes for left, share in zip(slack, cost.devices, strict=True)]
            if min(slack) < 0:
                break
        return None, slack

    def _spread(self, room: Room) -> Placement | None:
        """All layers over all devices: from shares proportional to free memory, move layers off the fullest device
        until every share fits."""
        free = [room.devices.get(device.device_id, 0) for device in self.devices]
        n_layers = self.need.n_layers
        if sum(free) < self.least_bytes or min(free) <= 0 or n_layers < len(free):
            return None
        counts = self._shares_of_layers(free)
        layer_bytes = self._layer_bytes()
        seen: set[tuple[int, ...]] = set()
        while tuple(counts) not in seen:
            seen.add(tuple(counts))
            placement, slack = self._fitting(self.devices, counts, free)
            if placement:
                return placement
            fullest, emptiest = slack.index(min(slack)), slack.index(max(slack))
            moved = min(max(1, min(-slack[fullest], slack[emptiest]) // layer_bytes), counts[fullest] - 1)
            if slack[emptiest] <= 0 or moved < 1:
                return None
            counts[fullest] -= moved
            counts[emptiest] += moved
        return None

    def _most_experts(self, room: Room) -> Placement | None:
        """The experts of as few layers as possible in host RAM."""

        def without(n_cpu_moe: int) -> Placement | None:
            least = self.need.least_bytes(n_cpu_moe)
            return replace(self, n_cpu_moe=n_cpu_moe, least_bytes=least)._spread(room)

        most = self.need.n_layers - 1
        best = without(most)
        if best is None:
            return None
        few, many = 0, most  # with `many` it fits, with `few` it does not
        while many - few > 1:
            middle = (few + many) // 2
            found = without(middle)
            few, many, best = (few, middle, found) if found else (middle, many, best)
        return best

    def _shares_of_layers(self, free: Sequence[int]) -> list[int]:
        """Layers per device to begin with: as many as will fit where they are read fastest, at least one everywhere;
        in proportion to the free memory where all are equally fast."""
        rates = {device.rates.bytes_per_s for device in self.devices}
        if len(rates) == 1:
            return _proportional(free, self.need.n_layers)
        left = self.need.n_layers - len(free)
        counts = [1] * len(free)
        for i in self._fastest_first(free):
            more = min(left, max(0, (free[i] - self._overhead_bytes(i)) // self._layer_bytes() - 1))
            counts[i], left = counts[i] + more, left - more
        counts[self._fastest_first(free)[0]] += left  # more than fits: what is too much moves on from there
        return counts

    def _most_layers(self, room: Room) -> Placement | None:
        """As many layers on devices as fit, the fastest device first; fewer would only need more host RAM.

        The average layer says how many to begin with; then single layers are taken off or added.
        """
        free = [room.devices.get(device.device_id, 0) for device in self.devices]
        most = self.need.n_layers - 1
        counts = [0] * len(free)
        for i in self._fastest_first(free):
            there = max(0, free[i] - self._overhead_bytes(i))
            counts[i] = min(most - sum(counts), there // self._layer_bytes())
        if not any(counts):
            counts[free.index(max(free))] = 1  # the last layer may be a small one
        best = self._shrunk(counts, free)
        return self._filled_up(best, free) if best else None

    def _overhead_bytes(self, device: int) -> int:
        return self.need.overhead_bytes(self.devices[device], self.node.facts.llama_build)

    def _fastest_first(self, free: Sequence[int]) -> list[int]:
        """Numbers of the devices: whoever reads its memory fastest first, then the roomiest."""
        return sorted(range(len(free)), key=lambda i: (-self.devices[i].rates.bytes_per_s, -free[i]))

    def grown(self, placement: Placement, room: Room) -> Placement:
        """A partial offload, with the layers (or their experts) more that the drawn graph leaves room for."""
        if self.tier == EXPERTS_IN_RAM:
            return self._with_more_experts(placement, room)
        free = [room.devices.get(device.device_id, 0) for device in self.devices]
        more = replace(self, need=replace(self.need, draws=True))._filled_up(placement, free)
        return more if fits(more, room) else placement

    def _with_more_experts(self, best: Placement, room: Room) -> Placement:
        while best.layout.n_cpu_moe > 1:
            layout = replace(best.layout, n_cpu_moe=best.layout.n_cpu_moe - 1)
            cost = self.need.bounded_footprint(layout)
            needs = [share.weights_bytes + share.kv_bytes for share in cost.devices]  # nothing is drawn in vain
            if any(need > room.devices.get(d, 0) for d, need in zip(best.device_ids, needs, strict=True)):
                return best
            more = self.need.placement(self.tier, self.node, self.devices, layout)
            if not fits(more, room):
                return best
            best = more
        return best

    def _filled_up(self, best: Placement, free: Sequence[int]) -> Placement:
        """Layers are added one by one, each to the roomiest device."""
        most = self.need.n_layers - 1
        while best.layout.n_gpu_layers < most:
            taken = dict(zip(best.device_ids, best.device_bytes, strict=True))
            layers = dict(zip(best.device_ids, best.layers, strict=True))
            slack = [there - taken.get(d.device_id, 0) for d, there in zip(self.devices, free, strict=True)]
            counts = [layers.get(device.device_id, 0) for device in self.devices]
            counts[slack.index(max(slack))] += 1
            more = self._shrunk(counts, free)
            if more is None or more.layout.n_gpu_layers <= best.layout.n_gpu_layers:
                return best
            best = more
        return best

    def _shrunk(self, counts: Sequence[int], free: Sequence[int]) -> Placement | None:
        """The placement with `counts` layers per device, less what does not fit there."""
        used = [
            (device, count, there) for device, count, there in zip(self.devices, counts, free, strict=True) if count
        ]
        while used:
            devices, layers, there = zip(*used, strict=True)
            placement, slack = self._fitting(devices, layers, there)
            if placement:
                return placement
            fewer = [max(1, -left // self._layer_bytes()) if left < 0 else 0 for left in slack]
            used = [(d, n - less, there) for (d, n, there), less in zip(used, fewer, strict=True) if n > less]
        return None

    def _layer_bytes(self) -> int:
        """What an average layer takes on a device."""
        return max(1, self.least_bytes // self.need.n_layers)

    def may_hold(self, n_gpu_layers: float, room: Room) -> bool:
        """Whether so many layers could be on devices at all: a quick look before `solve`. Layers that are less than
        three quarters of the average may be overlooked."""
        if self.tier == EXPERTS_IN_RAM:
            return True
        there = sum(max(0, room.devices.get(device.device_id, 0)) for device in self.devices)
        return there >= 0.75 * n_gpu_layers * self._layer_bytes()


def exact(placement: Placement, need: Need, node: Node) -> Placement:
    """The same placement, with the graph drawn."""
    devices = [node.devices[device_id].facts for device_id in placement.device_ids]
    return need.placement(placement.tier, node, devices, placement.layout)


def _proportional(weights: Sequence[int], total: int) -> list[int]:
    """`total` split into whole shares of at least 1, proportional to `weights` (largest remainder)."""
    spare = total - len(weights)
    whole = sum(weights)
    exact = [spare * weight / whole for weight in weights]
    shares = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: exact[i] - shares[i], reverse=True)
    for i in order[: spare - sum(shares)]:
        shares[i] += 1
    return [share + 1 for share in shares]
