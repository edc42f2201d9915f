"""The production core on a cluster that is only described: its machines have joined, its replicas are loaded.

What is said to be free of a device is taken as a tool would show it, replicas included, unless they would not fit in
the rest: then it is what is free besides them. A replica that could not be loaded where it is said to lie is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.choice.layouts import CPU_ONLY, ONE_GPU, SEVERAL_GPUS, SOME_LAYERS_IN_RAM, LayoutFamily
from scheduler.choice.workload import Workload
from scheduler.cluster.facts import DeviceFacts, ModelFile, NodeFacts
from scheduler.cluster.replica import Placement
from scheduler.config import Catalogue
from scheduler.core import SchedulerCore
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import Rates
from scheduler.costs.shape import ModelShape
from scheduler.errors import Rejected
from scheduler.simulation import physics
from scheduler.simulation.description import ClusterDescription, NodeDescription, ReplicaDescription
from scheduler.units import DeviceId, LeaseId, NodeId, ReplicaId, format_bytes

_MOST_LISTINGS = 256
NOW = 1e6
"""The moment described, on the core's clock: late enough for any idle time."""


@dataclass(frozen=True, slots=True)
class ModelOnDisk:
    """A model that all machines have: its file, and what its header says."""

    path: str
    shape: ModelShape


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that are kept from models, as if others used them: on each GPU, and of each machine's RAM."""

    gpu_bytes: int = 0
    host_bytes: int = 0


NOTHING_KEPT = Kept()


@dataclass(frozen=True, slots=True)
class _Loaded:
    said: ReplicaDescription
    placement: Placement


class DescribedCluster:
    """`core` knows all machines and replicas at `NOW`. `models`: those that may be asked for, replicas' included.

    Raises Rejected for a replica whose model is not among them, or that does not fit where it is said to be.
    """

    def __init__(
        self,
        description: ClusterDescription,
        catalogue: Catalogue,
        models: Mapping[str, ModelOnDisk],
        kept: Kept = NOTHING_KEPT,
    ) -> None:
        self.description = description
        self.models = models
        self.core = SchedulerCore(catalogue, tag="s")
        self.commands: list[cmd.Command] = []
        """What the core wants done at `NOW`."""
        self._listings: dict[frozenset[str], tuple[ModelFile, ...]] = {}
        self._foreign: defaultdict[DeviceId | NodeId, int] = defaultdict(int)
        self._kept = kept
        for node in description.nodes:
            self.core.handle(ev.NodeJoined(_facts(node)), 0.0)
            self.report(node, [], 0.0)
            for name, model in models.items():
                entry = catalogue.models.get(name)
                draft = model.path if entry is not None and entry.spec_type == "draft-mtp" else ""
                self.core.handle(ev.ShapeRead(NodeId(node.name), model.path, model.shape, draft=draft), 0.0)
        for name in sorted({said.model for node in description.nodes for said in node.replicas if said.pinned}):
            self.core.handle(ev.PinAsked(name, True), 0.0)
        loaded = {
            node.name: [_Loaded(said, self._placement(node, said)) for said in node.replicas]
            for node in description.nodes
        }
        arrivals = [each for node in description.nodes for each in loaded[node.name]]
        for serial, each in enumerate(sorted(arrivals, key=lambda each: -each.said.idle_s), start=1):
            self._adopt(each, serial)
        for node in description.nodes:
            placements = [each.placement for each in loaded[node.name]]
            self._foreign |= self._others(node, placements)
            self.commands += self.report(node, placements, NOW)
        self.commands += self.core.handle(ev.LeasesRenewed(self.leases), NOW)
        self.commands += self.core.handle(ev.Ticked(), NOW)

    @property
    def leases(self) -> tuple[LeaseId, ...]:
        """Of the replicas that are said to be busy."""
        return tuple(lease for replica in self.core.replicas.values() for lease in sorted(replica.leases))

    def _adopt(self, loaded: _Loaded, serial: int) -> None:
        said, placement = loaded.said, loaded.placement
        shape = self.models[said.model].shape
        context = placement.context
        replica_id = ReplicaId(f"{said.model}-{serial}")
        buffers = footprint(shape, placement.layout, context, CHECKED_BUILD)
        ready = ev.ReplicaReady(replica_id, serial, buffers, context.n_ctx_slot, 0.0)
        leases = (LeaseId(f"{replica_id}-lease"),) if said.busy else ()
        adopted = ev.ReplicaAdopted(replica_id, said.model, self.models[said.model].path, placement, ready, leases)
        self.core.handle(adopted, NOW - said.idle_s)
        if replica_id not in self.core.replicas:
            raise Rejected(
                f"the cluster has no room for replica {said.model} on {placement.node_id}: it needs "
                f"{', '.join(map(format_bytes, placement.device_bytes)) or format_bytes(placement.host_bytes)}"
            )

    def _placement(self, node: NodeDescription, said: ReplicaDescription) -> Placement:
        """Where the replica lies: its layers in shares that suit the memory of its GPUs, the rest in RAM if it must."""
        if said.model not in self.models:
            raise Rejected(f"replica {said.model} on {node.name}: there is no such model")
        shape = self.models[said.model].shape
        there = self.core.inventory.nodes[NodeId(node.name)]
        context = self.core.models.context(self.core.models.by_name[said.model], shape, said.n_ctx)
        workload = Workload(said.model, shape, context, self.core.catalogue.reserves, precision="exact")
        devices = tuple(device for i, device in enumerate(there.facts.devices) if i in said.gpus)
        room = self.core.rooms.empty(there.facts.node_id)
        tiers = (ONE_GPU if len(devices) == 1 else SEVERAL_GPUS, SOME_LAYERS_IN_RAM) if devices else (CPU_ONLY,)
        for tier in tiers:
            placement = LayoutFamily(tier, workload, there, devices, workload.least_bytes()).solve(room)
            if placement is not None:
                return placement
        raise Rejected(
            f"replica {said.model} does not fit where it is said to be, on {node.name} "
            f"{list(said.gpus) or 'in host RAM'}: it takes {format_bytes(workload.least_bytes())} at least"
        )

    def report(
        self, node: NodeDescription, replicas: Iterable[Placement], at: float, cached: Iterable[str] = ()
    ) -> list[cmd.Command]:
        """Tell the core what the machine and its GPUs show, with these replicas on it and the files `cached` (by path)
        in its page cache. Returns the commands that this leads to."""
        there = self.core.inventory.nodes[NodeId(node.name)].facts
        processes = [physics.loaded(placement) for placement in replicas]
        commands: list[cmd.Command] = []
        for device in there.devices:
            reading = physics.device_reading(device, processes, self._foreign[device.device_id], at)
            commands += self.core.handle(ev.DeviceSampled(reading), at)
        files = self._files(frozenset(cached))
        host = physics.node_reading(there, processes, self._foreign[there.node_id], at, files)
        return commands + self.core.handle(ev.NodeSampled(host), at)

    def _files(self, cached: frozenset[str]) -> tuple[ModelFile, ...]:
        if cached not in self._listings:
            if len(self._listings) > _MOST_LISTINGS:
                self._listings.clear()
            self._listings[cached] = tuple(
                ModelFile(model.path, model.shape.paths, model.shape.file_bytes, 0.0, float(model.path in cached))
                for model in self.models.values()
            )
        return self._listings[cached]

    def _others(self, node: NodeDescription, replicas: Sequence[Placement]) -> dict[DeviceId | NodeId, int]:
        """Bytes that others use, by what is said to be free and what the replicas of the description hold."""
        there = self.core.inventory.nodes[NodeId(node.name)].facts
        processes, kept = [physics.loaded(placement) for placement in replicas], self._kept
        others = _foreign_bytes(node.ram, node.ram_free, sum(each.anonymous_bytes for each in processes))
        found: dict[DeviceId | NodeId, int] = {there.node_id: others + kept.host_bytes}
        for device, said in zip(there.devices, node.gpus, strict=True):
            ours = device.total_bytes - physics.free_bytes(device, processes)
            others = _foreign_bytes(device.total_bytes, said.free, ours)
            found[device.device_id] = others + kept.gpu_bytes
        return found


def _foreign_bytes(total_bytes: int, free_bytes: int | None, ours_bytes: int) -> int:
    """Of what is in use, replicas may be shown, and the rest is others'; or not, where they would not fit in it. Where
    they would fit neither in what is in use nor in what is free, they take a little less than was predicted."""
    shown = total_bytes - free_bytes if free_bytes is not None else 0
    if shown >= ours_bytes:
        return shown - ours_bytes
    return shown if shown + ours_bytes <= total_bytes else 0


def _facts(node: NodeDescription) -> NodeFacts:
    node_id = NodeId(node.name)
    devices = tuple(
        DeviceFacts(
            device_id=DeviceId(f"{node.name}/gpu{i}"),
            node_id=node_id,
            label=f"gpu{i}",
            product=gpu.name or "GPU",
            kind=gpu.kind,
            total_bytes=gpu.total_bytes,
            rates=gpu.rates,
        )
        for i, gpu in enumerate(node.gpus)
    )
    return NodeFacts(
        node_id=node_id,
        hostname=node.name,
        address="",
        physical_cores=node.cores,
        memory_total_bytes=node.ram,
        devices=devices,
        rates=Rates(node.ram_bandwidth, node.tflops * 1e12),
        disk_bytes_per_s=node.disk_read or 0.0,
        labels=node.labels,
        llama_build=CHECKED_BUILD,
    )
