"""A trace of requests played to the production core on a described cluster, under a virtual clock.

The core decides as in production; loads, answers and the end of a replica take the time that its own speed model
predicts, and memory is what the footprint says. Slots of one replica do not slow each other down, disks and the page
cache are as large and as fast as described, and nothing fails: what is compared are decisions. One seed, one result.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.choice.price import RELEASE_S
from scheduler.cluster.replica import Placement, ReplicaState
from scheduler.config import Catalogue
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.errors import Rejected
from scheduler.simulation.described import NOW, DescribedCluster, ModelOnDisk
from scheduler.simulation.description import ClusterDescription, NodeDescription
from scheduler.simulation.trace import TraceRequest
from scheduler.units import DeviceId, LeaseId, NodeId, ReplicaId, RequestId

TICK_S = 1.0
"""How often the core is told that time has passed, while anything goes on."""
IDLE_TICK_S = 5.0
"""And while nothing does, where models are unloaded after some idle time."""
_READ_S = 5.0
"""Readings come at least this often: a device without recent readings gets no new models."""
_UNDER_WAY_S = 5.0
"""How long answers go on that were under way when it began."""
_FALLBACK_S_PER_TOKEN = 0.05
"""Where a device does not tell its rates."""


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are seconds from the start of the trace; None: it did not come to that."""

    request: TraceRequest
    granted_s: float | None = None
    first_token_s: float | None = None
    done_s: float | None = None
    tokens: int = 0
    """Of the answer, as far as the slot holds it."""
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Occupation:
    """A replica on a GPU: `busy` are the spans in which it answered, all in seconds from the start."""

    gpu: DeviceId
    model: str
    from_s: float
    to_s: float
    busy: tuple[tuple[float, float], ...]


@dataclass(slots=True)
class Run:
    """What a simulation came to."""

    outcomes: list[Outcome]
    duration_s: float = 0.0
    events: int = 0
    cold_loads: int = 0
    bytes_loaded: int = 0
    evictions: int = 0
    occupations: list[Occupation] = field(default_factory=list)
    gpus: tuple[DeviceId, ...] = ()


@dataclass(slots=True)
class _Runner:
    """A replica's process: since when it is there, and what it was doing."""

    model: str
    placement: Placement
    started_s: float
    busy: list[tuple[float, float]] = field(default_factory=list)
    pace: tuple[float, float] | None = None


def simulate(
    description: ClusterDescription,
    catalogue: Catalogue,
    models: dict[str, ModelOnDisk],
    trace: Sequence[TraceRequest],
) -> Run:
    """Play `trace`. Raises Rejected for a trace that asks for models that are not there."""
    unknown = sorted({request.model for request in trace} - set(models))
    if unknown:
        raise Rejected(f"the trace asks for {', '.join(unknown[:5])}; the catalogue has {', '.join(sorted(models))}")
    return _Simulation(description, catalogue, models, trace).run()


class _Simulation:
    def __init__(
        self,
        description: ClusterDescription,
        catalogue: Catalogue,
        models: dict[str, ModelOnDisk],
        trace: Sequence[TraceRequest],
    ) -> None:
        self._cluster = DescribedCluster(description, catalogue, models)
        self._core = self._cluster.core
        self._models = models
        self._now = NOW
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = count()
        self._runners = {r.replica_id: _Runner(r.model, r.placement, 0.0) for r in self._core.replicas.values()}
        self._caches = {node.name: _PageCache(node) for node in description.nodes}
        self._read_at = NOW
        self._leases: dict[LeaseId, Outcome | None] = {}  # None: of somebody who was answered when it began
        every = (catalogue.defaults, *catalogue.models.values())
        self._some_expire = any(params.keep_alive_s is not None for params in every)
        self._loading = 0
        self._ahead: dict[NodeId, int] = {}
        gpus = [device.device_id for node in self._core.inventory.nodes.values() for device in node.facts.devices]
        self._run = Run([Outcome(request) for request in trace], gpus=tuple(gpus))

    def run(self) -> Run:
        self._agenda += [
            (NOW + outcome.request.at_s, next(self._serial), partial(self._arrive, number))
            for number, outcome in enumerate(self._run.outcomes)
        ]
        heapq.heapify(self._agenda)
        self._at(TICK_S, self._tick)
        self._carry_out(self._cluster.commands)
        for lease_id in self._cluster.leases:  # of those who were answered when it began
            self._leases[lease_id] = None
            self._at(_UNDER_WAY_S, partial(self._served, lease_id))
        while self._agenda:
            self._now, _, happen = heapq.heappop(self._agenda)
            happen()
        self._run.duration_s = max((o.done_s or o.request.at_s for o in self._run.outcomes), default=0.0)
        for replica_id in list(self._runners):
            self._end(replica_id)
        return self._run

    @property
    def _elapsed_s(self) -> float:
        return self._now - NOW

    def _at(self, elapsed_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (NOW + elapsed_s, next(self._serial), happen))

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self._now + seconds, next(self._serial), happen))

    # ------------------------------------------------------------------ the core

    def _send(self, event: ev.Event) -> None:
        self._run.events += 1
        self._carry_out(self._core.handle(event, self._now))

    def _carry_out(self, commands: Sequence[cmd.Command]) -> None:
        for command in commands:
            match command:
                case cmd.GrantLease():
                    self._serve(command)
                case cmd.RefuseRequest():
                    self._outcome(command.request_id).refusal = command.error.message
                case cmd.StartReplica():
                    self._load(command)
                case cmd.StopReplica():
                    self._after(RELEASE_S, partial(self._gone, command.replica_id))
                case cmd.Announce() if command.kind == "replica_evicted":
                    self._run.evictions += 1
                case cmd.CancelAnswer():
                    self._broken_off(command.lease_id)
                case cmd.ReadAhead():
                    self._read_ahead(command)
                case cmd.StopReadAhead():
                    self._stop_reading_ahead(command)
                case cmd.CheckReplica():
                    self._send(ev.ReplicaVouched(command.replica_id))
                case _:
                    pass

    def _outcome(self, request_id: RequestId) -> Outcome:
        return self._run.outcomes[int(request_id)]

    def _tick(self) -> None:
        if self._now - self._read_at >= _READ_S:
            self._read_all()
        self._send(ev.LeasesRenewed(tuple(self._leases)))
        self._send(ev.Ticked())
        if self._leases or self._loading or len(self._core.queue):
            self._after(TICK_S, self._tick)
        elif self._agenda and self._some_expire and self._core.replicas:
            self._after(IDLE_TICK_S, self._tick)
        elif self._agenda:  # nothing can happen before
            self._at(max(self._agenda[0][0] - NOW, self._elapsed_s + TICK_S), self._tick)

    # ------------------------------------------------------------------ requests

    def _arrive(self, number: int) -> None:
        self._send(ev.RequestArrived(RequestId(str(number)), self._run.outcomes[number].request.model))

    def _serve(self, grant: cmd.GrantLease) -> None:
        outcome = self._outcome(grant.request_id)
        prompt_s, answer_s = self._pace(grant.replica_id, grant.model)
        request, elapsed_s = outcome.request, self._elapsed_s
        first_s = min(request.prompt_tokens, grant.n_ctx) * prompt_s + answer_s
        outcome.tokens = min(request.output_tokens, grant.n_ctx)
        taken_s = first_s + max(0, outcome.tokens - 1) * answer_s
        outcome.granted_s, outcome.first_token_s = elapsed_s, elapsed_s + first_s
        outcome.done_s = elapsed_s + taken_s
        self._runners[grant.replica_id].busy.append((elapsed_s, outcome.done_s))
        self._leases[grant.lease_id] = outcome
        self._after(taken_s, partial(self._served, grant.lease_id))

    def _pace(self, replica_id: ReplicaId, model: str) -> tuple[float, float]:
        """Seconds per token of a prompt and of an answer."""
        runner = self._runners[replica_id]
        if runner.pace is None:
            speed = self._core.speeds.predict(self._models[model].shape, runner.placement, None)
            prompt, answer = (each.seconds if each else _FALLBACK_S_PER_TOKEN for each in (speed.prompt, speed.answer))
            runner.pace = prompt, answer
        return runner.pace

    def _broken_off(self, lease_id: LeaseId) -> None:
        """The rest of an answer is not wanted, or not to be had, any more."""
        outcome = self._leases.pop(lease_id, None)
        if outcome is not None and outcome.done_s is not None and outcome.done_s > self._elapsed_s:
            outcome.tokens, outcome.done_s = 0, None
            outcome.refusal = "its answer was ended for a request of higher priority"

    def _served(self, lease_id: LeaseId) -> None:
        if lease_id in self._leases:
            del self._leases[lease_id]
            self._send(ev.LeaseReleased(lease_id))

    # ------------------------------------------------------------------ replicas

    def _load(self, command: cmd.StartReplica) -> None:
        self._runners[command.replica_id] = _Runner(command.model, command.placement, self._elapsed_s)
        shape = self._models[command.model].shape
        cache = self._caches[command.placement.node_id]
        cached = command.path in cache
        speed = self._core.speeds.predict(shape, command.placement, float(cached))
        self._run.cold_loads += 1
        self._run.bytes_loaded += shape.file_bytes
        cache.read(command.path, shape.file_bytes)
        self._loading += 1
        self._send(ev.ReplicaStarted(command.replica_id, next(self._serial)))
        self._after(speed.load.seconds, partial(self._loaded, command, speed.load.seconds))

    def _loaded(self, command: cmd.StartReplica, load_s: float) -> None:
        self._loading -= 1
        replica = self._core.replicas.get(command.replica_id)
        if replica is None or replica.state is not ReplicaState.LOADING:
            return
        context = command.placement.context
        buffers = footprint(self._models[command.model].shape, command.placement.layout, context, CHECKED_BUILD)
        self._read(command.placement.node_id)
        self._send(ev.ReplicaReady(command.replica_id, replica.pid, buffers, context.n_ctx_slot, load_s))

    def _gone(self, replica_id: ReplicaId) -> None:
        runner = self._end(replica_id)
        if runner is not None:
            self._read(runner.placement.node_id)
        self._send(ev.ReplicaGone(replica_id))

    def _end(self, replica_id: ReplicaId) -> _Runner | None:
        runner = self._runners.pop(replica_id, None)
        if runner is not None:
            self._run.occupations += [
                Occupation(gpu, runner.model, runner.started_s, self._elapsed_s, tuple(runner.busy))
                for gpu in runner.placement.device_ids
            ]
        return runner

    # ------------------------------------------------------------------ reading ahead

    def _read_ahead(self, command: cmd.ReadAhead) -> None:
        shape = next(model.shape for model in self._models.values() if model.path == command.path)
        load_s = self._core.speeds.load(shape, command.node_id, 0.0).seconds
        number = next(self._serial)
        self._ahead[command.node_id] = number
        self._after(load_s, partial(self._was_read_ahead, command, number, shape.file_bytes))

    def _was_read_ahead(self, command: cmd.ReadAhead, number: int, file_bytes: int) -> None:
        if self._ahead.get(command.node_id) == number:
            del self._ahead[command.node_id]
            self._caches[command.node_id].read(command.path, file_bytes)
            self._read(command.node_id)
            self._send(ev.ReadAheadEnded(command.node_id, command.path))

    def _stop_reading_ahead(self, command: cmd.StopReadAhead) -> None:
        """What was read of the file so far does not count."""
        if self._ahead.pop(command.node_id, None) is not None:
            self._send(ev.ReadAheadEnded(command.node_id, command.path))

    # ------------------------------------------------------------------ readings

    def _read_all(self) -> None:
        self._read_at = self._now
        for node in self._cluster.description.nodes:
            self._read(NodeId(node.name))

    def _read(self, node_id: NodeId) -> None:
        node = next(each for each in self._cluster.description.nodes if each.name == node_id)
        there = [r.placement for r in self._runners.values() if r.placement.node_id == node_id]
        commands = self._cluster.report(node, there, self._now, self._caches[node_id].paths)
        self._run.events += 1 + len(node.gpus)
        self._carry_out(commands)


class _PageCache:
    """Files that a machine has read and still holds in RAM: least recently used ones go first."""

    def __init__(self, node: NodeDescription) -> None:
        self._left = node.ram if node.ram_free is None else node.ram_free
        self._files: OrderedDict[str, int] = OrderedDict()

    def __contains__(self, path: str) -> bool:
        return path in self._files

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self._files)

    def read(self, path: str, size_bytes: int) -> None:
        self._left += self._files.pop(path, 0)
        while self._left < size_bytes and self._files:
            _, freed = self._files.popitem(last=False)
            self._left += freed
        if size_bytes <= self._left:
            self._files[path] = size_bytes
            self._left -= size_bytes
