"""The families of layouts on a node, best first. Each finds its best placement in a given `Room`.

    one GPU            all layers on one device
    several GPUs       all layers over 2, 3, ... devices
    experts in RAM     MoE expert tensors of as few layers as possible in host RAM, everything else on GPUs (one, then
                       several)
    some layers in RAM as many layers on GPUs as fit
    CPU only

`solve(room)` is pure.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil

from scheduler.choice.splits import Sums, shares, split
from scheduler.choice.workload import Workload
from scheduler.cluster.facts import DeviceFacts
from scheduler.cluster.free_memory import Room
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
CONTEXT_STEP = 256  # llama.cpp rounds contexts up to a multiple of this, in tokens


def fits(placement: Placement, room: Room) -> bool:
    """Whether the placement fits in `room`, with host RAM and the limit on active models."""
    return (
        room.active >= 1
        and placement.host_bytes <= room.host_bytes
        and all(
            need <= room.devices.get(device_id, 0)
            for device_id, need in zip(placement.device_ids, placement.device_bytes, strict=True)
        )
    )


@dataclass(frozen=True, slots=True)
class LayoutFamily:
    """One layout family on concrete devices of one node. `least_bytes`: see `Workload.least_bytes`."""

    tier: str
    workload: Workload
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
            found = self._placement((), (), exact=self.workload.precision == "exact")
        if found and not fits(found, room) and self.workload.precision != "bound" and self._may_do_drawn(found, room):
            found = self.workload.drawn(found, self.node)
        return found if found and fits(found, room) else None

    def _may_do_drawn(self, bounded: Placement, room: Room) -> bool:
        """Whether it may fit `room` when its graph is drawn. If not, the graph need not be drawn."""
        most_bytes = self.workload.bounded_footprint(bounded.layout).host.compute_bytes
        return fits(replace(bounded, host_bytes=max(0, bounded.host_bytes - most_bytes)), room)

    def feasible(self, room: Room) -> bool:
        """Whether any placement of the family fits `room`."""
        if self.tier == EXPERTS_IN_RAM and not self.n_cpu_moe:
            most = self.workload.n_layers - 1
            if self._spilling(most, self.workload).solve(room) is not None:
                return True  # without a search for the best placement
        return self.solve(room) is not None

    def minimum(self) -> Placement:
        """The simplest placement of the family, whether it fits or not. Refusals take their numbers from it."""
        if not self.devices:
            return self._placement((), ())
        if self.tier == EXPERTS_IN_RAM and not self.n_cpu_moe:
            return replace(self, n_cpu_moe=self.workload.n_layers - 1).minimum()
        counts = _proportional([device.total_bytes for device in self.devices], self.workload.n_layers)
        return self._placement(self.devices, counts, exact=self.tier not in PARTIAL)

    def _placement(self, devices: Sequence[DeviceFacts], counts: Sequence[int], *, exact: bool = True) -> Placement:
        return self.workload.placement(self.tier, self.node, devices, self._layout(devices, counts), exact=exact)

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
        """The placement with `counts` layers per device, if it fits in `free`; and the bytes that are left there
        (negative: at least this many are missing). The graph is drawn only if weights and cache fit, but the bound does
        not. For partial offloads it is not drawn here: that takes long where CUDA copies weights. See `grown`."""
        layout = self._layout(devices, counts)
        spills = self.tier == SOME_LAYERS_IN_RAM or 0 < self.n_cpu_moe < self.workload.n_layers - 1
        bound_only = spills or self.workload.precision == "bound"
        for exact in (True,) if self.workload.precision == "exact" else (False,) if bound_only else (False, True):
            cost, _, needs = self.workload.shares(self.node, devices, layout, exact=exact)
            slack = [there - need for there, need in zip(free, needs, strict=True)]
            if min(slack) >= 0:
                return self.workload.placement(self.tier, self.node, devices, layout, exact=exact), slack
            if not exact and not bound_only:
                slack = [left + share.compute_bytes for left, share in zip(slack, cost.devices, strict=True)]
            if min(slack) < 0:
                break
        return None, slack

    def _spread(self, room: Room, besides: Sequence[int] = (), *, apart: int | None = None) -> Placement | None:
        """All layers over all devices. `besides`: an estimate of what each device needs besides weights and cache. A
        split that does not fit corrects the estimate. `apart`: a device that has layers with and without experts needs
        more memory. So one share is made to end where the experts begin: the share that ends nearest to that layer (0),
        or second nearest (1)."""
        free = [room.devices.get(device.device_id, 0) for device in self.devices]
        if sum(free) < self.least_bytes or min(free) <= 0:
            return None
        sums = [self.workload.layer_sums(device.kind, self.n_cpu_moe) for device in self.devices]
        besides = besides or [0] * len(free)
        seen: set[tuple[int, ...]] = set()
        while True:
            rooms = [there - other for there, other in zip(free, besides, strict=True)]
            wanted = self._wanted(free, rooms, sums)
            if apart is not None:
                nearest = sorted(range(len(wanted)), key=lambda i: abs(wanted[i] - self.n_cpu_moe))
                for i in nearest[apart : apart + 1]:
                    wanted[i] = self.n_cpu_moe
            counts = split(sums, rooms, wanted)
            if counts is None or counts in seen:
                return None
            seen.add(counts)
            placement, slack = self._fitting(self.devices, counts, free)
            if placement:
                return placement
            held = shares(sums, counts)
            besides = [there - left - share for there, left, share in zip(free, slack, held, strict=True)]

    def _most_experts(self, room: Room) -> Placement | None:
        """The placement with the experts of as few layers as possible in host RAM."""

        def without(n_cpu_moe: int) -> Placement | None:
            return self._spilling(n_cpu_moe, self.workload)._spread(room)

        most = self.workload.n_layers - 1
        best = without(most)
        if best is None:
            return None
        few, many = 0, most  # `many` fits, `few` does not
        while many - few > 1:
            middle = (few + many) // 2
            found = without(middle)
            few, many, best = (few, middle, found) if found else (middle, many, best)
        return self._less_spilled(best, room, self.workload)

    def _less_spilled(self, best: Placement, room: Room, workload: Workload) -> Placement:
        """Takes experts out of host RAM, one layer at a time, while there is room on GPUs. The layers are split again
        each time. The first try assumes that the devices need as much besides weights and cache as before. If that
        finds no placement, layers with and without experts are kept on different devices."""
        while (n_cpu_moe := best.layout.n_cpu_moe - 1) > 0:
            sums = [workload.layer_sums(device.kind, n_cpu_moe + 1) for device in self.devices]
            besides = [taken - share for taken, share in zip(best.device_bytes, shares(sums, best.layers), strict=True)]
            tries = ((besides, None), *((best.overhead_bytes, nth) for nth in range(min(2, len(self.devices) - 1))))
            found = (self._spilling(n_cpu_moe, workload)._spread(room, least, apart=apart) for least, apart in tries)
            more = next((placement for placement in found if placement and fits(placement, room)), None)
            if more is None:
                return best
            best = more
        return best

    def _spilling(self, n_cpu_moe: int, workload: Workload) -> LayoutFamily:
        """The family with the experts of `n_cpu_moe` layers in host RAM."""
        return replace(self, workload=workload, n_cpu_moe=n_cpu_moe, least_bytes=workload.least_bytes(n_cpu_moe))

    def _wanted(self, free: Sequence[int], rooms: Sequence[int], sums: Sequence[Sums]) -> list[int]:
        """The layers after which each device's share should end, without the last device. The fastest devices are
        filled first. If all are equally fast, the shares are in proportion to the free memory."""
        if len({device.rates.bytes_per_s for device in self.devices}) == 1:
            if self.workload.n_layers < len(free):
                return []
            return list(accumulate(_proportional(free, self.workload.n_layers)))[:-1]
        left, taken = self.least_bytes, [0] * len(free)
        for i in self._fastest_first(free):
            taken[i] = max(0, min(left, rooms[i], free[i] - self._overhead_bytes(i)))
            left -= taken[i]
        return [bisect_right(of, end) - 1 for of, end in zip(sums, accumulate(taken[:-1]), strict=False)]

    def _most_layers(self, room: Room) -> Placement | None:
        """As many layers on devices as fit, the fastest device first.

        The first estimate uses the size of the average layer. Then single layers are removed or added.
        """
        free = [room.devices.get(device.device_id, 0) for device in self.devices]
        most = self.workload.n_layers - 1
        counts = [0] * len(free)
        for i in self._fastest_first(free):
            there = max(0, free[i] - self._overhead_bytes(i))
            counts[i] = min(most - sum(counts), there // self._layer_bytes())
        if not any(counts):
            counts[free.index(max(free))] = 1  # the last layer may be small
        best = self._shrunk(counts, free)
        return self._filled_up(best, free) if best else None

    def _overhead_bytes(self, device: int) -> int:
        return self.workload.overhead_bytes(self.devices[device], self.node.facts.llama_build)

    def _fastest_first(self, free: Sequence[int]) -> list[int]:
        """Numbers of the devices: the fastest memory first, then the most free memory."""
        return sorted(range(len(free)), key=lambda i: (-self.devices[i].rates.bytes_per_s, -free[i]))

    def grown(self, placement: Placement, room: Room) -> Placement:
        """The partial offload with more layers (or their experts) on devices, if the drawn graph leaves room."""
        workload = self.workload.at("exact")
        if self.tier == EXPERTS_IN_RAM:
            return self._less_spilled(placement, room, workload)
        free = [room.devices.get(device.device_id, 0) for device in self.devices]
        more = replace(self, workload=workload)._filled_up(placement, free)
        return more if fits(more, room) else placement

    def _filled_up(self, best: Placement, free: Sequence[int]) -> Placement:
        """Adds layers one by one, each to the device with the most free memory."""
        most = self.workload.n_layers - 1
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
        """The placement with `counts` layers per device, without the layers that do not fit."""
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
        """The bytes of an average layer on a device."""
        return max(1, self.least_bytes // self.workload.n_layers)

    def may_hold(self, n_resident_layers: float, room: Room) -> bool:
        """A quick check before `solve`: whether the devices have room for weights and cache of this many layers."""
        least = ceil(n_resident_layers)
        n_cpu_moe = self.workload.n_layers - least if self.tier == EXPERTS_IN_RAM else 0
        begins = 0 if self.tier == EXPERTS_IN_RAM else self.workload.n_layers - least
        sums = (self.workload.layer_sums(kind, n_cpu_moe) for kind in {device.kind for device in self.devices})
        needed_bytes = min(of[-1] - of[begins] for of in sums)
        free = (
            room.devices.get(device.device_id, 0) - self._overhead_bytes(i) for i, device in enumerate(self.devices)
        )
        return sum(max(0, there) for there in free) >= needed_bytes


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
