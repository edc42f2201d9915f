"""A workload is what has to be placed: a model, its context, and the catalogue's wishes. It knows the memory of each
layout.

Shares and placements are remembered with the workload, because every decision needs them. A new one takes the time of
one footprint: 0.2 ms with the bound on compute buffers, some milliseconds with the drawn graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, TypeVar

from scheduler.choice.splits import Sums
from scheduler.cluster.facts import DeviceFacts
from scheduler.cluster.inventory import Node
from scheduler.cluster.replica import Placement
from scheduler.config import Reserves
from scheduler.costs.companions import draft_footprint, draft_host, is_on_device, projector_footprint
from scheduler.costs.footprint import bounded_footprint, computes_exactly, filled_footprint, grows, layer_bytes
from scheduler.costs.host import host_memory
from scheduler.costs.measurements import Measurements
from scheduler.costs.params import ContextParams, DeviceKind, Footprint, Layout
from scheduler.costs.shape import ModelShape
from scheduler.units import DeviceId

Precision = Literal["bound", "if needed", "exact"]
"""How compute buffers are computed: by their upper bound; by the drawn graph if the bound does not decide; or by the
drawn graph for every layout that is tried."""

REMEMBERED = 4096  # footprints, a kilobyte each; also the limit for shares and placements of one workload
_T = TypeVar("_T")
_footprint = lru_cache(maxsize=REMEMBERED)(filled_footprint)
_bounded_footprint = lru_cache(maxsize=4 * REMEMBERED)(bounded_footprint)
_draft_footprint = lru_cache(maxsize=REMEMBERED)(draft_footprint)


@dataclass(frozen=True, slots=True)
class Wishes:
    """Where a model may be. `gpus`: UUIDs, labels or node/label; empty: all GPUs. `not_on`: GPUs that are left out.
    `nodes`: host names. `labels`: labels that the machines must have."""

    spill: bool = True
    max_gpus: int | None = None
    gpus: tuple[str, ...] = ()
    not_on: frozenset[DeviceId] = frozenset()
    nodes: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    min_tokens_per_s: float = 0.0

    def allow(self, node: Node) -> bool:
        """Whether the machine may be used."""
        facts = node.facts
        named = not self.nodes or facts.hostname in self.nodes
        return named and all(facts.labels.get(label) == value for label, value in self.labels)

    def devices(self, node: Node) -> tuple[DeviceFacts, ...]:
        """The devices of the node that may be used, the smallest memory first."""
        return tuple(
            sorted(
                (each.facts for each in node.devices.values() if self._allows(node, each.facts)),
                key=lambda facts: facts.total_bytes,
            )
        )

    def _allows(self, node: Node, facts: DeviceFacts) -> bool:
        names = {str(facts.device_id), facts.label, f"{node.facts.hostname}/{facts.label}"}
        return facts.device_id not in self.not_on and (not self.gpus or not names.isdisjoint(self.gpus))

    def __str__(self) -> str:
        parts = [f"only on {', '.join(self.gpus)}"] if self.gpus else []
        parts += [f"on at most {self.max_gpus} GPUs"] if self.max_gpus else []
        parts += [f"on {', '.join(self.nodes)}"] if self.nodes else []
        parts += [f"where {label} is {value}" for label, value in self.labels]
        parts += [f"with at least {self.min_tokens_per_s:g} tokens/s"] if self.min_tokens_per_s else []
        parts += [] if self.spill else ["not in host RAM"]
        return "the catalogue wants it " + ", ".join(parts) if parts else ""


@dataclass(frozen=True, slots=True)
class Workload:
    """What has to be placed."""

    model: str
    shape: ModelShape
    context: ContextParams
    reserves: Reserves
    use_mmap: bool = True
    use_extra_bufts: bool = False
    extra_bytes: int = 0
    measurements: Measurements = field(default_factory=Measurements)
    wishes: Wishes = Wishes()
    alternatives: tuple[ContextParams, ...] = ()
    """Other contexts that are allowed, in order of preference."""
    longest_n_ctx: int = 0
    """The context may grow to this if GPUs have room for it. 0: it stays as in `context`."""
    rounded_n_ctx: int = 0
    """The context may grow to this if there is room, on GPUs or not."""
    precision: Precision = "if needed"
    """How compute buffers are computed."""
    known: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """Shares and placements that were computed before."""

    @property
    def n_layers(self) -> int:
        """Layers that can be placed; llama.cpp counts the output as one."""
        return self.shape.n_layer_all + 1

    def least_bytes(self, n_cpu_moe: int = 0) -> int:
        """The least memory that all layers take on devices, in any split, without the experts of the first `n_cpu_moe`
        layers. With less memory, no layout needs to be tried."""
        return self.layer_sums("rpc", n_cpu_moe)[-1]

    def layer_sums(self, kind: DeviceKind, n_cpu_moe: int = 0) -> Sums:
        """Bytes of weights and cache on such a device, with the experts of the first `n_cpu_moe` layers in host RAM."""
        key = "layers", kind, n_cpu_moe
        return self.once(
            key, lambda: tuple(accumulate(layer_bytes(self.shape, self.context, kind, n_cpu_moe), initial=0))
        )

    def footprint(self, layout: Layout, build: str) -> Footprint:
        """The footprint with the model's draft, on a machine with this build of llama-cpp-python."""
        if not computes_exactly(self.shape, build):
            return self.bounded_footprint(layout)
        return self._with_draft(_footprint(self.shape, layout, self.context, build), layout, build)

    def bounded_footprint(self, layout: Layout) -> Footprint:
        return self._with_draft(_bounded_footprint(self.shape, layout, self.context), layout, "")

    def _with_draft(self, cost: Footprint, layout: Layout, build: str) -> Footprint:
        draft = _draft_footprint(self.shape, layout, self.context, build)
        return cost if draft is None else cost + draft

    def shares(
        self, node: Node, devices: Sequence[DeviceFacts], layout: Layout, *, exact: bool
    ) -> tuple[Footprint, tuple[int, ...], tuple[int, ...]]:
        """The buffers of the layout; and per device, the overhead and the total bytes."""
        products = tuple(device.product for device in devices)
        key = "shares", node.facts.llama_build, products, layout, exact
        return self.once(key, lambda: self._shares(node, devices, layout, exact))

    def once(self, key: Hashable, work: Callable[[], _T]) -> _T:
        """The result of `work`, remembered under this key."""
        if key not in self.known:
            if len(self.known) >= REMEMBERED:
                self.known.clear()
            self.known[key] = work()
        found: _T = self.known[key]
        return found

    def _shares(
        self, node: Node, devices: Sequence[DeviceFacts], layout: Layout, exact: bool
    ) -> tuple[Footprint, tuple[int, ...], tuple[int, ...]]:
        build = node.facts.llama_build
        cost = self.footprint(layout, build) if exact else self.bounded_footprint(layout)
        measured = self.measurements.load(self.shape, layout, self.context, build)
        outside = measured.outside_bytes if measured else (0,) * len(devices)
        if measured and not grows(self.shape):  # what was measured is what the load took
            cost = measured.settle(cost, layout)
        beside = self._beside(layout)
        overheads = tuple(
            (seen or self.overhead_bytes(device, build)) + (share.total_bytes if beside else 0)
            for device, seen, share in zip(devices, outside, (beside or cost).devices, strict=True)
        )
        device_bytes = tuple(
            share.total_bytes + self.extra_bytes + overhead
            for share, overhead in zip(cost.devices, overheads, strict=True)
        )
        return cost, overheads, device_bytes

    def _beside(self, layout: Layout) -> Footprint | None:
        """The projector's footprint, if the model has one."""
        projector = self.shape.projector
        return projector_footprint(projector, layout, self.context) if projector else None

    def placement(
        self, tier: str, node: Node, devices: Sequence[DeviceFacts], layout: Layout, *, exact: bool = True
    ) -> Placement:
        """The layout on these devices with all the memory that it needs, overheads included. If not `exact`, the memory
        may be a little more than needed."""
        there = node.facts.node_id, node.facts.llama_build, tuple(device.device_id for device in devices)
        key = "placement", tier, there, layout, exact
        return self.once(key, lambda: self._placement(tier, node, devices, layout, exact))

    def drawn(self, placement: Placement, node: Node) -> Placement:
        """The same placement, with the graph drawn."""
        devices = [node.devices[device_id].facts for device_id in placement.device_ids]
        return self.placement(placement.tier, node, devices, placement.layout)

    def _placement(
        self, tier: str, node: Node, devices: Sequence[DeviceFacts], layout: Layout, exact: bool
    ) -> Placement:
        cost, overheads, device_bytes = self.shares(node, devices, layout, exact=exact)
        host = host_memory(
            self.shape,
            layout,
            self.context,
            cost,
            use_mmap=self.use_mmap,
            use_extra_bufts=self.use_extra_bufts,
            process_bytes=self.reserves.runner_overhead_bytes,
            n_threads=node.facts.physical_cores,
        )
        beside = self._beside(layout)
        beside_bytes = beside.host.total_bytes if beside else 0
        draft = draft_host(self.shape, layout, self.context, n_threads=node.facts.physical_cores)
        on_device = beside is not None and is_on_device(layout)
        return Placement(
            tier=tier,
            node_id=node.facts.node_id,
            device_ids=tuple(device.device_id for device in devices),
            layout=layout,
            context=self.context,
            device_bytes=device_bytes,
            overhead_bytes=overheads,
            host_bytes=host.peak_bytes + host.mapped_bytes + beside_bytes + draft.peak_bytes,
            host_mapped_bytes=host.mapped_bytes,
            host_outside_bytes=host.outside_bytes + beside_bytes + draft.outside_bytes,
            host_resting_bytes=host.resting_bytes + beside_bytes + draft.resting_bytes,
            mmproj_bytes=beside.devices[0].total_bytes if beside and on_device else beside_bytes,
            mmproj_on_device=on_device,
            computes_on_cpu=layout.n_gpu_layers < self.n_layers or layout.spills_experts,
            n_layers=self.n_layers,
            grows=grows(self.shape),
        )

    def with_context(self, context: ContextParams) -> Workload:
        return self.once(("with", context), lambda: replace(self, context=context, known={}))

    def with_n_ctx(self, context: ContextParams, n_ctx: int) -> Workload:
        """The same workload with `context`, changed to `n_ctx` tokens."""
        longer = replace(context, n_ctx=n_ctx)
        return self.with_context(longer.for_whole_sequences() if self.shape.is_embedding_only else longer)

    def elsewhere(self, taken: frozenset[DeviceId]) -> Workload:
        """The same workload on other GPUs than `taken`, and without host RAM."""
        wishes = replace(self.wishes, spill=False, not_on=taken)
        return self.once(("elsewhere", taken), lambda: replace(self, wishes=wishes, known={}))

    def at(self, precision: Precision) -> Workload:
        """The same workload with this precision."""
        return self.once(("at", precision), lambda: replace(self, precision=precision, known={}))

    def overhead_bytes(self, device: DeviceFacts, build: str) -> int:
        """Memory of a replica on the device besides llama.cpp's buffers: as measured there, or as in the reserves."""
        if device.kind != "cuda":
            return 0
        learned = self.measurements.overhead_bytes(device.product, build)
        return self.reserves.cuda_overhead_bytes if learned is None else learned
