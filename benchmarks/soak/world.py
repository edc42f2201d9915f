"""What is outside of the core: clients, runners, devices and the clock. What a command leads to comes later."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.soak.clients import Clients
from benchmarks.soak.mishaps import Mishaps
from benchmarks.soak.players import Machine, Runner
from benchmarks.soak.processes import Processes
from benchmarks.soak.referee import Referee
from benchmarks.soak.stage import (
    BOXES,
    REST_S,
    SHOWN,
    STEP_S,
    Box,
    Tally,
    Violation,
    catalogue_of,
    facts_of,
    shapes,
)
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.facts import DeviceFacts, DeviceReading, ModelFile, NodeReading
from scheduler.core import SchedulerCore
from scheduler.costs.measurements import Record
from scheduler.errors import UnknownModel
from scheduler.units import NodeId, ReplicaId


class World:
    """Everything around the core. Effects wait in a heap until they are due; they end with the scheduler that asked."""

    def __init__(self, seed: int, phase: int) -> None:
        self.chance = random.Random(f"{seed}/{phase}")
        self.catalogue = catalogue_of(phase, self.chance)
        self.phase = phase
        self.now = 1000.0
        self.tally = Tally()
        self.recent: deque[tuple[int, float, ev.Event]] = deque(maxlen=SHOWN)
        self.records: dict[tuple[str, str], Record] = {}
        self.runners: dict[ReplicaId, Runner] = {}
        self.leftovers: dict[ReplicaId, Runner] = {}  # of an earlier scheduler: others' memory as far as this one knows
        self.machines = {box.name: self._machine(box) for box in BOXES}
        self.calm = False  # from now on nothing goes wrong
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._serial = 0
        self._generation = 0  # of the scheduler
        self.processes = Processes(self)
        self.clients = Clients(self)
        self.mishaps = Mishaps(self)
        self._actions = self._weighed()
        self.begin_scheduler()

    def count(self) -> int:
        """A number that nothing else has."""
        self._serial += 1
        return self._serial

    def _machine(self, box: Box) -> Machine:
        files = tuple(self.file(name, 1.0) for name in box.files.split())
        return Machine(box, facts_of(box, NodeId(f"{box.name}#0")), files)

    def file(self, name: str, modified_at_s: float) -> ModelFile:
        cached = self.chance.choice((None, 0.0, 0.0, 0.3, 1.0))
        return ModelFile(f"/m/{name}.gguf", (f"/m/{name}.gguf",), shapes()[name].file_bytes, modified_at_s, cached)

    # ------------------------------------------------------------------ the core and its surroundings

    def begin_scheduler(self) -> None:
        self._generation += 1
        tag = f"{self._generation}."
        self.core = SchedulerCore(self.catalogue, tag, tuple(self.records.values()))
        self.referee = Referee(self.core, self.tally)
        for machine in self.machines.values():
            machine.there = False
            self.join(machine)

    def send(self, event: ev.Event) -> None:
        """One event; what its commands lead to comes later."""
        self.tally.events += 1
        self.recent.append((self.tally.events, self.now, event))
        self.referee.before(event)
        try:
            commands = self.core.handle(event, self.now)
        except UnknownModel:
            if not isinstance(event, (ev.UnloadAsked, ev.PinAsked)):
                raise
            commands = []
        self.referee.after(event, commands)
        for command in commands:
            self._carry_out(command)
        self.referee.check(event, self.now)

    def later(self, seconds: float, effect: Callable[[], object]) -> None:
        """Physics: happens whatever becomes of the scheduler."""
        heapq.heappush(self._heap, (self.now + seconds, self.count(), effect))

    def answer(self, seconds: float, effect: Callable[[], object]) -> None:
        """What this scheduler is told, unless it ends before."""
        generation = self._generation
        self.later(seconds, lambda: effect() if generation == self._generation else None)

    def _carry_out(self, command: cmd.Command) -> None:
        match command:
            case cmd.StartReplica():
                self.processes.start(command)
            case cmd.StopReplica():
                self.processes.stop(command)
            case cmd.GrantLease():
                self.clients.granted(command)
            case cmd.CancelAnswer():
                self.clients.cancelled(command.lease_id)
            case cmd.CheckReplica():
                self.answer(self.chance.random() * 2, lambda: self.processes.checked(command.replica_id))
            case cmd.ReadShape():
                self.answer(self.chance.expovariate(3.0), lambda: self._read_header(command))
            case cmd.ReadAhead():
                self.tally.prefetches += 1
                self.answer(self.chance.expovariate(0.2), lambda: self._read_ahead(command, 1.0))
            case cmd.StopReadAhead():
                pass  # read-ahead ends earlier, or just does not notice in time
            case cmd.Remember():
                self.records[command.record.kind, command.record.key] = command.record
            case cmd.RefuseRequest() | cmd.Announce():
                pass

    # ------------------------------------------------------------------ the loop

    def run(self, events: int) -> None:
        actions, weights = zip(*self._actions, strict=True)
        cumulative = [sum(weights[: i + 1]) for i in range(len(weights))]
        while self.tally.events < events:
            for action in self.chance.choices(actions, cum_weights=cumulative, k=1000):
                self._catch_up()
                action()
                self.now += self.chance.expovariate(1 / STEP_S)
                if self.tally.events >= events:
                    break

    def _catch_up(self) -> None:
        while self._heap and self._heap[0][0] <= self.now:
            heapq.heappop(self._heap)[2]()

    def come_to_rest(self) -> None:
        """Nothing goes wrong any more and nobody asks: everybody is answered, and everything can be unloaded."""
        self.calm = True
        for machine in self.machines.values():
            machine.foreign.clear()
            machine.lost.clear()
            machine.silent.clear()
            machine.host_foreign = 0
            self.join(machine)
        self._settle(lambda: not (len(self.core.queue) or self.clients.held or self.referee.leases), "requests")
        for name in list(self.core.models.by_name) + [replica.model for replica in self.core.replicas.values()]:
            self.send(ev.UnloadAsked(name))
        self._settle(lambda: not (self.core.replicas or self._heap), "replicas")
        self.referee.check_empty()
        if self.runners or self.leftovers:
            raise Violation(f"processes are left: {list(self.runners)} {list(self.leftovers)}")

    def _settle(self, done: Callable[[], bool], what: str) -> None:
        until = self.now + REST_S
        while not done():
            if self.now > until:
                waiting = [(w.request_id, w.model, w.reason) for w in self.core.queue]
                there = [(r.replica_id, r.state.value, len(r.leases)) for r in self.core.replicas.values()]
                raise Violation(f"{what} do not end: {waiting} {there}")
            self.now += 1.0
            self._catch_up()
            for machine in self.machines.values():
                self.read_machine(machine)
            self.clients.renew()
            self.send(ev.Ticked())

    def _weighed(self) -> list[tuple[Callable[[], object], float]]:
        return [
            (self.clients.ask, 24.0),
            (self._read_some_device, 22.0),
            (self._read_some_node, 8.0),
            (self._tick, 20.0),
            (self.clients.renew, 1.5),
            (self.clients.cancel, 1.0),
            (self.mishaps.strike, 0.15),
            (self.mishaps.others_use_memory, 0.1),
            (self.clients.turn_tide, 0.02),
            (self._time_jumps, 0.01),
            (self._quiet, 0.005),
            (self.mishaps.restart, 0.005),
        ]

    # ------------------------------------------------------------------ time

    def _tick(self) -> None:
        self.send(ev.Ticked())

    def _time_jumps(self) -> None:
        self.now += self.chance.choice((3.0, 12.0, 40.0, 130.0, 1000.0))

    def _quiet(self) -> None:
        """Nobody asks for a while."""
        for _ in range(self.chance.choice((20, 60, 200))):
            self.now += 1.0
            self._catch_up()
            self.read_machine(self.chance.choice(list(self.machines.values())))
            self.clients.renew()
            self.send(ev.Ticked())

    # ------------------------------------------------------------------ machines

    def free(self, machine: Machine, device: DeviceFacts, but: Runner | None = None) -> int:
        device_id = device.device_id
        everybody = (*self.runners.values(), *self.leftovers.values())
        used = sum(each.device_bytes.get(device_id, 0) for each in everybody if each is not but)
        return device.total_bytes - used - machine.foreign[device_id]

    def join(self, machine: Machine) -> None:
        """The machine is there: its facts, then what still runs on it, then the first readings."""
        if machine.there:
            return
        machine.there = True
        node_id = machine.facts.node_id
        self.send(ev.NodeJoined(machine.facts))
        for runner in [each for each in self.runners.values() if each.placement.node_id == node_id]:
            self._adopt(runner)
        if not self.calm and self.chance.random() < 0.1:
            self.answer(self.chance.choice((1.0, 35.0)), lambda: self.read_machine(machine))
        else:
            self.read_machine(machine)

    def _adopt(self, runner: Runner) -> None:
        command, replica_id = runner.command, runner.command.replica_id
        assert runner.ready is not None
        answering = tuple(
            lease_id
            for lease_id, client in self.clients.held.items()
            if client.replica_id == replica_id and not client.cancelled
        )
        self.send(
            ev.ReplicaAdopted(replica_id, command.model, command.path, command.placement, runner.ready, answering)
        )

    def read_machine(self, machine: Machine) -> None:
        for device in machine.facts.devices:
            self.read_device(machine, device)
        self.read_node(machine)

    def read_device(self, machine: Machine, device: DeviceFacts) -> None:
        device_id, total = device.device_id, device.total_bytes
        if not machine.there or device_id in machine.silent:
            return
        if device_id in machine.lost:
            reading = DeviceReading(device_id, 0, 0, 0, self.now, lost_reason=machine.lost[device_id])
        else:
            free = self.free(machine, device)
            if free < 0:
                raise Violation(f"{-free} bytes more than there are are in use on {device_id}")
            everybody = (*self.runners.values(), *self.leftovers.values())
            told = {r.pid: held for r in everybody if (held := r.device_bytes.get(device_id, 0))}
            at = self.now if self.chance.random() < 0.98 else self.now - self.chance.uniform(0.0, 8.0)
            processes = told if machine.box.tells_processes else None
            reading = DeviceReading(device_id, total, free, total - free, at, processes)
        self.send(ev.DeviceSampled(reading))

    def read_node(self, machine: Machine) -> None:
        if machine.there:
            name = machine.box.name + "#"
            everybody = (*self.runners.values(), *self.leftovers.values())
            ours = sum(r.anonymous_bytes for r in everybody if r.placement.node_id.startswith(name))
            available = max(0, machine.facts.memory_total_bytes - ours - machine.host_foreign)
            self.send(ev.NodeSampled(NodeReading(machine.facts.node_id, available, self.now, machine.files)))

    def _read_some_device(self) -> None:
        machine = self.chance.choice(list(self.machines.values()))
        self.read_device(machine, self.chance.choice(machine.facts.devices))

    def _read_some_node(self) -> None:
        self.read_node(self.chance.choice(list(self.machines.values())))

    def _read_header(self, command: cmd.ReadShape) -> None:
        name = Path(command.path).stem
        luck = 1.0 if self.calm else self.chance.random()
        if luck < 0.03:
            self.send(ev.ShapeRead(command.node_id, command.path, None, trouble="the disk is busy"))
        elif luck < 0.035:
            self.send(ev.ShapeRead(command.node_id, command.path, None, invalid="it is no GGUF"))
        else:
            self.send(ev.ShapeRead(command.node_id, command.path, shapes()[name]))

    def _read_ahead(self, command: cmd.ReadAhead, cached: float) -> None:
        for machine in self.machines.values():
            if machine.there and machine.facts.node_id == command.node_id:
                machine.files = tuple(
                    replace(file, cached_fraction=cached) if file.path == command.path else file
                    for file in machine.files
                )
        self.send(ev.ReadAheadEnded(command.node_id, command.path))
