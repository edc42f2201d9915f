"""Scenarios in three lines: machines, models, and a driver that plays runners, devices, clock and Ray around the core.

Every event and command is pickled on its way, as between processes; the books are balanced and the promises of
placement (no stop under a lease, no oversubscribed memory) are checked after each event.
"""

from __future__ import annotations

import pickle
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.facts import DeviceFacts, DeviceReading, ModelFile, NodeFacts
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.config import parse_catalogue
from scheduler.core import SchedulerCore
from scheduler.costs.adapter import Adapter
from scheduler.costs.companions import Companions, accompanied
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.measurements import Record
from scheduler.costs.params import NO_RATES, DeviceBytes, Footprint, HostBytes, Rates
from scheduler.costs.projector import Projector
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.simulation import physics
from scheduler.simulation.physics import Process
from scheduler.units import DeviceId, NodeId, ReplicaId, RequestId, parse_bytes


@cache
def shape(n_layer: int, n_embd: int, n_ff: int, n_expert: int = 0, n_vocab: int = 32000) -> ModelShape:
    """A llama (or Mixtral-like) model in F16; the file exists only as a header while it is read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(n_layer)
        writer.add_context_length(32768)
        writer.add_embedding_length(n_embd)
        writer.add_feed_forward_length(n_ff)
        writer.add_head_count(n_embd // 128)
        writer.add_head_count_kv(max(1, n_embd // 512))
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(n_vocab)
        if n_expert:
            writer.add_expert_count(n_expert)
            writer.add_expert_used_count(2)
        tensors: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (n_vocab, n_embd), "output_norm.weight": (n_embd,), "output.weight": (n_vocab, n_embd),
        }  # fmt: skip
        for i in range(n_layer):
            block = f"blk.{i}."
            kv = 128 * max(1, n_embd // 512)
            tensors |= {
                block + "attn_norm.weight": (n_embd,), block + "ffn_norm.weight": (n_embd,),
                block + "attn_q.weight": (n_embd, n_embd), block + "attn_output.weight": (n_embd, n_embd),
                block + "attn_k.weight": (kv, n_embd), block + "attn_v.weight": (kv, n_embd),
            }  # fmt: skip
            if n_expert:
                tensors[block + "ffn_gate_inp.weight"] = (n_expert, n_embd)
                for part in ("gate", "up"):
                    tensors[f"{block}ffn_{part}_exps.weight"] = (n_expert, n_ff, n_embd)
                tensors[block + "ffn_down_exps.weight"] = (n_expert, n_embd, n_ff)
            else:
                tensors |= {
                    block + "ffn_gate.weight": (n_ff, n_embd), block + "ffn_up.weight": (n_ff, n_embd),
                    block + "ffn_down.weight": (n_embd, n_ff),
                }  # fmt: skip
        for name, dims in tensors.items():
            size = 2 * int(np.prod(dims))
            writer.add_tensor_info(name, dims, np.dtype(np.float16), size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        end = writer.fout[0].tell()
        writer.close()
        data = sum((2 * int(np.prod(dims)) + 31) // 32 * 32 for dims in tensors.values())
        with path.open("r+b") as file:
            file.truncate((end + 31) // 32 * 32 + data)
        return read_shape(path)


SMALL = (8, 1024, 2816)  # 0.32 GiB
MEDIUM = (24, 2048, 5632)  # 2.4 GiB
LARGE = (32, 4096, 11008)  # 12.1 GiB
MOE = (24, 2048, 5632, 8)  # 13.6 GiB, of which 12.4 GiB experts


def buffers(*device_bytes: int, host_bytes: int = 0) -> Footprint:
    """A report of llama.cpp in which these are the sums per device."""
    return Footprint(tuple(DeviceBytes(weights_bytes=count) for count in device_bytes), HostBytes(host_bytes))


def gpu(size: str, label: str = "gpu0", kind: Any = "rpc") -> DeviceFacts:
    return DeviceFacts(DeviceId(f"id-{label}"), NodeId("box"), label, "test card", kind, parse_bytes(size))


@dataclass
class Scenario:
    """One machine (or several) around a real core. `models` maps names to shapes' parameters.

    With `auto` (the default) loads and stops are done at once; without, when a test says so.
    """

    gpus: Sequence[DeviceFacts] = ()
    models: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ram: str = "64GiB"
    cores: int = 8
    catalogue: dict[str, Any] = field(default_factory=dict)
    auto: bool = True
    tells_processes: bool = False  # whether device readings say which process holds what
    records: Sequence[Record] = ()  # what an earlier scheduler remembered
    companions: dict[str, Adapter | Projector] = field(default_factory=dict)  # by path: they are on every machine
    rates: Rates = NO_RATES  # of the CPU and RAM of every machine
    llama_build: str = CHECKED_BUILD

    def __post_init__(self) -> None:
        # One slot, unless a test says otherwise: then a request makes its replica busy.
        catalogue = {**self.catalogue, "defaults": {"n_seq_max": 1, **self.catalogue.get("defaults", {})}}
        self.core = SchedulerCore(parse_catalogue(catalogue), records=self.records)
        self.now = 100.0
        self.log: list[cmd.Command] = []
        self.grants: dict[str, cmd.GrantLease] = {}
        self.refusals: dict[str, cmd.RefuseRequest] = {}
        self.started: list[cmd.StartReplica] = []
        self.stopped: list[cmd.StopReplica] = []
        self.foreign: dict[DeviceId, int] = {}
        self.lost: dict[DeviceId, str] = {}
        self.host_foreign: dict[NodeId, int] = {}
        self.runners: dict[ReplicaId, Process] = {}
        self.invalid: dict[str, str] = {}  # model -> why its header cannot be read
        self.reads_headers = True
        self.file_age: dict[str, float] = {}
        self.reported: dict[str, Footprint] = {}
        self.serial = 0
        self._replies: deque[ev.Event] = deque()
        self._sending = False
        self.add_node("box", self.gpus, self.ram, self.cores)

    # ------------------------------------------------------------------ machines

    def add_node(
        self, name: str, gpus: Sequence[DeviceFacts] = (), ram: str = "64GiB", cores: int = 8, has: Any = None
    ) -> None:
        """A machine joins and reports; it has the files of all models, or of those in `has`."""
        self.join(name, gpus, ram, cores)
        self.read_devices()
        self.report_node(name, has)

    def join(self, name: str, gpus: Sequence[DeviceFacts] = (), ram: str = "64GiB", cores: int = 8) -> None:
        devices = tuple(replace(g, node_id=NodeId(name)) for g in gpus)
        facts = NodeFacts(
            NodeId(name), name, "127.0.0.1", cores, parse_bytes(ram), devices, self.rates, llama_build=self.llama_build
        )
        self.send(ev.NodeJoined(facts))

    def report_node(self, name: str = "box", has: Any = None) -> None:
        node_id = NodeId(name)
        files = tuple(
            ModelFile(path, (path,), 1000, self.file_age.get(Path(path).stem, 1.0))
            for path in (*(f"/models/{m}.gguf" for m in (self.models if has is None else has)), *self.companions)
        )
        self._read_host(node_id, files)

    def _read_host(self, node_id: NodeId, files: tuple[ModelFile, ...]) -> None:
        facts, foreign = self.core.inventory.nodes[node_id].facts, self.host_foreign.get(node_id, 0)
        reading = physics.node_reading(facts, self.runners.values(), foreign, self.now, files)
        self.send(ev.NodeSampled(reading))

    def read_hosts(self) -> None:
        """Machines that have reported before do it again, so often that none is called silent."""
        for node_id, node in list(self.core.inventory.nodes.items()):
            if node.reading is not None and self.now - node.read_at > 5.0:
                self._read_host(node_id, node.reading.files)

    def lose_node(self, name: str) -> None:
        self.runners = {r: runner for r, runner in self.runners.items() if runner.node_id != name}
        self.send(ev.NodeLost(NodeId(name), "unplugged"))

    def read_devices(self) -> None:
        for node in list(self.core.inventory.nodes.values()):
            for device in node.facts.devices:
                self.read_device(device)

    def read_device(self, device: DeviceFacts) -> None:
        if device.device_id in self.lost:
            reading = DeviceReading(device.device_id, 0, 0, 0, self.now, lost_reason=self.lost[device.device_id])
        else:
            runners, foreign = self.runners.values(), self.foreign.get(device.device_id, 0)
            assert self.free(device) >= 0, f"out of memory on {device.label}"
            reading = physics.device_reading(device, runners, foreign, self.now, self.tells_processes)
        self.send(ev.DeviceSampled(reading))

    def free(self, device: DeviceFacts, but: ReplicaId | None = None) -> int:
        """Bytes that nobody holds, the runner `but` left out."""
        others = [runner for replica_id, runner in self.runners.items() if replica_id != but]
        return physics.free_bytes(device, others, self.foreign.get(device.device_id, 0))

    # ------------------------------------------------------------------ events

    def send(self, event: ev.Event) -> None:
        """One event in, its commands carried out, the events that they end in too, all pickled."""
        self._replies.append(event)
        if self._sending:
            return
        self._sending = True
        try:
            while self._replies:
                self._handle(self._replies.popleft())
        finally:
            self._sending = False

    def _handle(self, event: ev.Event) -> None:
        there = self.core.replicas.values()
        loading = {r.replica_id for r in there if r.state is ReplicaState.LOADING and not r.preloaded}
        if isinstance(event, ev.ReplicaReady):
            loading.discard(event.replica_id)
        before = self.stamps()
        commands = pickle.loads(pickle.dumps(self.core.handle(pickle.loads(pickle.dumps(event)), self.now)))
        self.log += commands
        if not isinstance(event, ev.ReplicaAdopted):  # whose load was long ago
            for what, at in self.stamps().items():
                fresh = before.get(what, at) == at or at >= self.now or not at  # 0: no longer
                assert fresh, f"{what} became {at} at {self.now}: the time of an earlier event"
        for command in commands:
            if isinstance(command, cmd.StopReplica) and command.reason.startswith("evicted"):
                assert command.replica_id not in loading, "a replica was evicted while it was loading"
                own = command.reason == f"evicted for {self.core.replicas[command.replica_id].model}"
                assert own or not self._pinned(command.replica_id), "a pinned replica was evicted"
            self._carry_out(command)
        self.check()

    def stamps(self) -> dict[str, float]:
        """Every time of day that the core keeps, by where it is kept."""
        core = self.core
        kept: list[tuple[str, Any]] = [(str(replica_id), replica) for replica_id, replica in core.replicas.items()]
        kept += [(lease.lease_id, lease) for lease in core.fleet.leases.all()]
        kept += [(waiting.request_id, waiting) for waiting in core.queue]
        kept += [(f"node {node_id}", node) for node_id, node in core.inventory.nodes.items()]
        devices = (each for node in core.inventory.nodes.values() for each in node.devices.items())
        kept += [(f"device {device_id}", device) for device_id, device in devices]
        kept += [(f"suspect {key}", record) for key, record in core.fleet.suspects._records.items()]
        for name, model in core.models.by_name.items():
            kept += [(name, model), (f"{name}'s history", model.history), (f"{name}'s popularity", model.popularity)]
        return {f"{who}.{each.name}": getattr(what, each.name) for who, what in kept for each in times_of(type(what))}

    def _carry_out(self, command: cmd.Command) -> None:
        match command:
            case cmd.GrantLease():
                self.grants[command.request_id] = command
            case cmd.RefuseRequest():
                self.refusals[command.request_id] = command
            case cmd.StartReplica():
                self.started.append(command)
                if self.auto:
                    self.loaded(command)
            case cmd.StopReplica():
                self.stopped.append(command)
                if self.auto:
                    self.gone(command.replica_id)
            case cmd.CheckReplica() if command.replica_id in self.runners:
                self.send(ev.ReplicaVouched(command.replica_id))
            case cmd.CheckReplica():
                self.send(ev.ReplicaDied(command.replica_id, "its process has ended"))
            case cmd.ReadShape() if self.reads_headers:
                self.read_header(command)
            case _:
                pass

    def read_header(self, command: cmd.ReadShape) -> None:
        name = Path(command.path).stem
        invalid = self.invalid.get(name, "")
        found = None if invalid else accompanied(shape(*self.models[name]), self._companions(command))
        beside = command.adapters, command.mmproj, command.draft
        self.send(ev.ShapeRead(command.node_id, command.path, found, invalid, "", *beside))

    def _companions(self, command: cmd.ReadShape) -> Companions:
        adapters = [self.companions[path] for path in command.adapters]
        projector = self.companions[command.mmproj] if command.mmproj else None
        assert projector is None or isinstance(projector, Projector)
        draft = shape(*self.models[Path(command.draft).stem]) if command.draft else None
        return Companions(tuple(each for each in adapters if isinstance(each, Adapter)), projector, draft)

    def check(self) -> None:
        """What must hold at any time."""
        core = self.core
        core.ledger.check()
        core.rooms.check()
        entries = {"pending": "promised", "loading": "held", "ready": "held", "stopping": "releasing"}
        for replica in core.replicas.values():
            assert core.ledger.state(replica.replica_id) == entries[replica.state.value]
            assert len(replica.leases) <= replica.slots
            if replica.leases:
                assert replica.state is ReplicaState.READY, f"{replica.replica_id} is {replica.state} under a lease"
        assert len(core.fleet.leases) == sum(len(replica.leases) for replica in core.replicas.values())

    def _pinned(self, replica_id: ReplicaId) -> bool:
        model = self.core.models.by_name.get(self.core.replicas[replica_id].model)
        return bool(model and model.pinned)

    # ------------------------------------------------------------------ runners

    def loaded(self, command: cmd.StartReplica, n_ctx: int | None = None) -> None:
        """The load succeeds and takes what was predicted."""
        n_ctx = n_ctx or command.placement.context.n_ctx_slot
        runner = self.allocate(command)
        self.read_devices()
        self.send(ev.ReplicaReady(command.replica_id, runner.pid, self.report(command), n_ctx, 0.5))

    def report(self, command: cmd.StartReplica) -> Footprint:
        """What llama.cpp says it allocated: what was predicted, unless a test has it say something else."""
        placement = command.placement
        known = self.core.models.by_name[command.model].shape or shape(*self.models[command.model])
        predicted = footprint(known, placement.layout, placement.context, self.llama_build)
        return self.reported.get(command.model, predicted)

    def allocate(self, command: cmd.StartReplica, share: float = 1.0) -> Process:
        """The runner's process takes `share` of its memory."""
        self.serial += 1
        runner = physics.loaded(command.placement, 1000 + self.serial, share)
        self.runners[command.replica_id] = runner
        self.send(ev.ReplicaStarted(command.replica_id, runner.pid))
        return runner

    def fail_load(
        self, model: str, kind: Any = "crashed", message: str = "it crashed", buffers: Footprint | None = None
    ) -> None:
        """The newest load of `model` fails; its process is gone at once."""
        command = next(c for c in reversed(self.started) if c.model == model)
        self.runners.pop(command.replica_id, None)
        self.send(ev.ReplicaFailed(command.replica_id, kind, message, buffers))
        if not self.auto:
            self.gone(command.replica_id)

    def finish_load(self, model: str) -> None:
        self.loaded(next(c for c in reversed(self.started) if c.model == model))

    def gone(self, replica_id: ReplicaId) -> None:
        self.runners.pop(replica_id, None)
        self.read_devices()
        self.send(ev.ReplicaGone(replica_id))

    def finish_stops(self) -> None:
        """Every stopping replica's process is gone and its memory back."""
        for replica in [r for r in self.core.replicas.values() if r.state is ReplicaState.STOPPING]:
            self.gone(replica.replica_id)

    def kill(self, model: str) -> None:
        """The runner's process dies by itself."""
        replica = self.replica(model)
        self.runners.pop(replica.replica_id, None)
        self.send(ev.ReplicaDied(replica.replica_id, "killed"))

    # ------------------------------------------------------------------ clients

    def ask(self, model: str, n_ctx: int | None = None, **more: Any) -> str:
        self.serial += 1
        request_id = f"r{self.serial}"
        self.send(ev.RequestArrived(RequestId(request_id), model, n_ctx=n_ctx, **more))
        return request_id

    def done(self, request_id: str, failed: bool = False) -> None:
        self.send(ev.LeaseReleased(self.grants[request_id].lease_id, "failed" if failed else "served"))

    def cancel(self, request_id: str) -> None:
        self.send(ev.RequestCancelled(RequestId(request_id)))

    def unload(self, model: str) -> None:
        self.send(ev.UnloadAsked(model))

    def run(self, model: str, n_ctx: int | None = None) -> str:
        """A whole request: ask, be granted, finish a second later."""
        request_id = self.ask(model, n_ctx)
        assert request_id in self.grants, self.why(request_id)
        self.wait(1.0)
        self.done(request_id)
        return request_id

    def wait(self, seconds: float, longest_step_s: float = 1.0) -> None:
        """Time passes in small steps, with readings and ticks as in real life."""
        while seconds > 0:
            step = min(seconds, longest_step_s)
            self.now += step
            seconds -= step
            self.read_devices()
            self.read_hosts()
            self.send(ev.Ticked())

    # ------------------------------------------------------------------ what came of it

    def waits(self, request_id: str) -> bool:
        return any(waiting.request_id == request_id for waiting in self.core.queue)

    def why(self, request_id: str) -> str:
        """Why a request was refused, or what it waits for."""
        if request_id in self.refusals:
            return self.refusals[request_id].error.message
        return next((w.reason for w in self.core.queue if w.request_id == request_id), "it was granted")

    def error(self, request_id: str) -> Any:
        return self.refusals[request_id].error

    def replica(self, model: str) -> Replica:
        """The model's newest replica."""
        return [r for r in self.core.replicas.values() if r.model == model][-1]

    def tier(self, model: str) -> str:
        return self.replica(model).placement.tier

    def where(self, model: str) -> list[str]:
        return [self.core.inventory.label(d).split(" ")[0] for d in self.replica(model).placement.device_ids]

    def node(self, model: str) -> str:
        return str(self.replica(model).placement.node_id)

    def loaded_models(self) -> set[str]:
        return {r.model for r in self.core.replicas.values() if r.state is ReplicaState.READY}

    def states(self, model: str) -> list[str]:
        return [r.state.value for r in self.core.replicas.values() if r.model == model]

    def announced(self, kind: str) -> list[cmd.Announce]:
        return [c for c in self.log if isinstance(c, cmd.Announce) and c.kind == kind]

    def evicted(self) -> list[str]:
        return [notice.model for notice in self.announced("replica_evicted")]

    def remembered(self) -> list[Record]:
        """What would be in the database now: the newest record of each kind and key."""
        newest = {(c.record.kind, c.record.key): c.record for c in self.log if isinstance(c, cmd.Remember)}
        return [*self.records, *newest.values()]


@cache
def times_of(record: type[Any]) -> list[Field[Any]]:
    """The fields of a record that are times of day."""
    return [each for each in fields(record) if each.name.endswith("_at")]
