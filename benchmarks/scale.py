"""The core at 10, 100 and 1,000 machines of eight GPUs: what a grant, a placement and a reading cost, and its memory.

Most models lie on twenty machines, five hundred on all; placements are of those. GPUs are full: most placements
evict somebody. Models have six shapes. Times are CPU time of this process for one event, with the garbage collector set
as in the scheduler's process. Run: python -m benchmarks.scale [MACHINES ...]
"""

from __future__ import annotations

import gc
import random
import resource
import statistics
import sys
import time

from arriero.cli.simulate import example_models
from benchmarks.table import print_table
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.facts import DeviceFacts, DeviceReading, ModelFile, NodeFacts, NodeReading
from scheduler.cluster.replica import ReplicaState
from scheduler.config import parse_catalogue
from scheduler.core import SchedulerCore
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import Rates
from scheduler.costs.shape import ModelShape
from scheduler.simulation.cards import known_card
from scheduler.units import GIB, DeviceId, LeaseId, NodeId, RequestId

MACHINES = (10, 100, 1000)
MODELS_PER_MACHINE = 16
CARDS = ("RTX 3060", "RTX 3060", "RTX 4070", "RTX 4070", "RTX 3090", "RTX 3090", "RTX 4090", "RTX A6000")
COPIES = 20  # machines that have a model's file,
EVERYWHERE = 500  # but for so many models, whose files all machines have
EVENTS, WARM_UP = 200, 100  # placements, after some whose layouts are new
SEED = 7
GC_THRESHOLDS = (50_000, 20, 1000)


class Cluster:
    """Machines with full GPUs around a core. Loads and stops are done at once."""

    def __init__(self, machines: int, shapes: list[ModelShape]) -> None:
        self.core = SchedulerCore(parse_catalogue({"policy": {"queue_limit": 1_000_000}}), tag="b")
        self.now = 1000.0
        self.leases: dict[RequestId, LeaseId] = {}
        self._files: dict[NodeId, tuple[ModelFile, ...]] = {}
        self.models = [f"model-{i}" for i in range(machines * MODELS_PER_MACHINE)]
        self._shapes = {name: shapes[i % len(shapes)] for i, name in enumerate(self.models)}
        self.everywhere = self.models[:: max(1, len(self.models) // EVERYWHERE)]
        self.serial = 0
        for number in range(machines):
            first = number * MODELS_PER_MACHINE
            near = (self.models[i % len(self.models)] for i in range(first, first + COPIES * MODELS_PER_MACHINE))
            self._join(number, list(dict.fromkeys([*near, *self.everywhere])))

    def _join(self, number: int, names: list[str]) -> None:
        node_id = NodeId(f"n{number}")
        devices = []
        for i, name in enumerate(CARDS):
            card = known_card(name)
            assert card is not None
            device_id = DeviceId(f"n{number}/gpu{i}")
            devices.append(DeviceFacts(device_id, node_id, f"gpu{i}", name, "cuda", card.total_bytes, card.rates))
        facts = NodeFacts(
            node_id, str(node_id), "", 32, 64 * GIB, tuple(devices), Rates(80e9, 1e12), 3e9, llama_build=CHECKED_BUILD
        )
        self.core.handle(ev.NodeJoined(facts), self.now)
        for device in devices:
            self.core.handle(self.reading(device), self.now)
        files = tuple(ModelFile(f"/m/{m}.gguf", (), self._shapes[m].file_bytes, 0.0, 0.0) for m in names)
        self._files[node_id] = files
        self.core.handle(ev.NodeSampled(NodeReading(node_id, 60 * GIB, self.now, files)), self.now)
        for name in names:
            self.core.handle(ev.ShapeRead(node_id, f"/m/{name}.gguf", self._shapes[name]), self.now)

    def hear_from_nodes(self) -> None:
        for node_id, files in self._files.items():
            self.core.handle(ev.NodeSampled(NodeReading(node_id, 60 * GIB, self.now, files)), self.now)

    def reading(self, device: DeviceFacts) -> ev.DeviceSampled:
        total = device.total_bytes
        return ev.DeviceSampled(DeviceReading(device.device_id, total, total, 0, self.now))

    def send(self, event: ev.Event) -> float:
        """Handle it and what follows; the seconds that it alone took."""
        began = time.process_time()
        commands = self.core.handle(event, self.now)
        taken_s = time.process_time() - began
        self._carry_out(commands)
        return taken_s

    def _carry_out(self, commands: list[cmd.Command]) -> None:
        for command in commands:
            match command:
                case cmd.StartReplica():
                    shape = self._shapes[command.model]
                    buffers = footprint(shape, command.placement.layout, command.placement.context, CHECKED_BUILD)
                    ready = ev.ReplicaReady(command.replica_id, 1, buffers, command.placement.context.n_ctx, 1.0)
                    self._carry_out(self.core.handle(ready, self.now))
                case cmd.StopReplica():
                    self._carry_out(self.core.handle(ev.ReplicaGone(command.replica_id), self.now))
                case cmd.GrantLease():
                    self.leases[command.request_id] = command.lease_id
                case _:
                    pass

    def ask(self, model: str) -> tuple[RequestId, float]:
        self.serial += 1
        request_id = RequestId(str(self.serial))
        return request_id, self.send(ev.RequestArrived(request_id, model))

    def done(self, request_id: RequestId) -> float:
        return self.send(ev.LeaseReleased(self.leases.pop(request_id)))

    def fill(self) -> None:
        """Load models until the first has to evict somebody."""
        for name in self.models:
            self.now += 1.0
            request_id, _ = self.ask(name)
            if request_id in self.leases:
                self.done(request_id)

    def loaded(self) -> list[str]:
        return [replica.model for replica in self.core.replicas.in_state(ReplicaState.READY)]


def main() -> None:
    _, models = example_models()
    kinds = [model.shape for name, model in models.items() if name not in ("chat-1b", "chat-3b")]
    gc.set_threshold(*GC_THRESHOLDS)
    rows = [measured(machines, kinds) for machines in map(int, sys.argv[1:] or MACHINES)]
    print_table(
        "The core at scale, CPU time of one event",
        ("machines", "GPUs", "models", "loaded", "grant µs", "release µs", "placement ms", "p99 ms", "reading µs",
         "tick ms", "memory MiB"),
        rows,
    )  # fmt: skip


def measured(machines: int, shapes: list[ModelShape]) -> tuple[str, ...]:
    chance = random.Random(SEED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cluster = Cluster(machines, shapes)
    cluster.fill()
    gc.freeze()
    warm: list[float] = []
    released: list[float] = []
    cold: list[float] = []
    readings: list[float] = []
    ticks: list[float] = []
    for _ in range(EVENTS):
        cluster.now += 0.01
        request_id, taken_s = cluster.ask(chance.choice(cluster.loaded()))
        warm.append(taken_s)
        released.append(cluster.done(request_id))
    for number in range(WARM_UP + EVENTS):
        cluster.now += 7.0
        for device in chance.sample([d for n in cluster.core.inventory.nodes.values() for d in n.facts.devices], 8):
            readings.append(cluster.send(cluster.reading(device)))
        there = set(cluster.loaded())
        absent = [name for name in cluster.everywhere if name not in there]
        if not absent:
            break
        request_id, taken_s = cluster.ask(chance.choice(absent))
        if request_id in cluster.leases:
            if number >= WARM_UP:
                cold.append(taken_s)
            cluster.done(request_id)
        else:
            cluster.send(ev.RequestCancelled(request_id))
    for _ in range(10):
        cluster.hear_from_nodes()  # else they would count as silent
        ticks.append(cluster.send(ev.Ticked()))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    ordered = sorted(cold)
    return (
        str(machines),
        str(machines * len(CARDS)),
        str(len(cluster.models)),
        str(len(cluster.loaded())),
        f"{1e6 * statistics.median(warm):.0f}",
        f"{1e6 * statistics.median(released):.0f}",
        f"{1e3 * statistics.median(cold):.1f}",
        f"{1e3 * ordered[len(ordered) * 99 // 100]:.1f}",
        f"{1e6 * statistics.median(readings):.0f}",
        f"{1e3 * statistics.median(ticks):.1f}",
        f"{memory:.0f}",
    )


if __name__ == "__main__":
    main()
