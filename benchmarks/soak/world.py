"""The physics of the soak: machines, the memory that processes hold there, files, the clock, and effects that are due.

Nothing here knows the core. Whatever happens yields the events that the core is told of it, one at a time: `Play`
delivers each before the next thing happens.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks.soak.players import Machine, Runner
from benchmarks.soak.stage import BOXES, Box, Violation, facts_of, shapes
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.facts import DeviceFacts, DeviceReading, ModelFile
from scheduler.simulation import physics
from scheduler.units import NodeId, ReplicaId

Events = Iterable[ev.Event]
Effect = Callable[[], Events | None]
"""Something that happens. It may lead to events; its later part sees what the core has made of the earlier ones."""


class World:
    """What is there, and what is on its way. All times are seconds of `now`, all chance comes from `chance`."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.now = 1000.0
        self.calm = False  # from now on nothing goes wrong
        self.runners: dict[ReplicaId, Runner] = {}
        self.leftovers: dict[ReplicaId, Runner] = {}  # of an earlier scheduler: others' memory as far as this one knows
        self.machines = {box.name: self._machine(box) for box in BOXES}
        self._heap: list[tuple[float, int, Effect]] = []
        self._serial = 0
        self._generation = 0  # of the scheduler

    def count(self) -> int:
        """A number that nothing else has."""
        self._serial += 1
        return self._serial

    def _machine(self, box: Box) -> Machine:
        files = tuple(self.file(name, 1.0) for name in box.files.split())
        return Machine(box, facts_of(box, NodeId(f"{box.name}#0")), files)

    # ------------------------------------------------------------------ time

    def later(self, seconds: float, effect: Effect) -> None:
        """Happens whatever becomes of the scheduler."""
        heapq.heappush(self._heap, (self.now + seconds, self.count(), effect))

    def answer(self, seconds: float, effect: Effect) -> None:
        """Happens unless the scheduler that asked for it ends before."""
        generation = self._generation
        self.later(seconds, lambda: effect() if generation == self._generation else None)

    def begin_generation(self) -> int:
        """A scheduler starts; nobody waits any more for what an earlier one asked. Returns how many there have been."""
        self._generation += 1
        return self._generation

    def due(self) -> Events:
        """All that has happened by now."""
        while self._heap and self._heap[0][0] <= self.now:
            yield from heapq.heappop(self._heap)[2]() or ()

    @property
    def at_rest(self) -> bool:
        """Nothing is on its way."""
        return not self._heap

    # ------------------------------------------------------------------ memory

    def machine_of(self, runner: Runner) -> Machine:
        return self.machines[runner.placement.node_id.partition("#")[0]]

    def processes(self) -> tuple[Runner, ...]:
        return (*self.runners.values(), *self.leftovers.values())

    def free(self, machine: Machine, device: DeviceFacts, but: Runner | None = None) -> int:
        """Bytes that nobody holds, `but` left out."""
        others = [each for each in self.processes() if each is not but]
        return physics.free_bytes(device, others, machine.foreign[device.device_id])

    # ------------------------------------------------------------------ readings

    def read_machine(self, machine: Machine) -> Events:
        for device in machine.facts.devices:
            yield from self.read_device(machine, device)
        yield from self.read_node(machine)

    def read_device(self, machine: Machine, device: DeviceFacts) -> Events:
        device_id = device.device_id
        if not machine.there or device_id in machine.silent:
            return
        if device_id in machine.lost:
            reading = DeviceReading(device_id, 0, 0, 0, self.now, lost_reason=machine.lost[device_id])
        else:
            if (free := self.free(machine, device)) < 0:
                raise Violation(f"{-free} bytes more than there are are in use on {device_id}")
            at = self.now if self.chance.random() < 0.98 else self.now - self.chance.uniform(0.0, 8.0)
            foreign, tells = machine.foreign[device_id], machine.box.tells_processes
            reading = physics.device_reading(device, self.processes(), foreign, at, tells)
        yield ev.DeviceSampled(reading)

    def read_node(self, machine: Machine) -> Events:
        if machine.there:
            yield ev.NodeSampled(
                physics.node_reading(machine.facts, self.processes(), machine.host_foreign, self.now, machine.files)
            )

    def read_some_device(self) -> Events:
        machine = self.some_machine()
        return self.read_device(machine, self.chance.choice(machine.facts.devices))

    def read_some_node(self) -> Events:
        return self.read_node(self.some_machine())

    def some_machine(self) -> Machine:
        return self.chance.choice(list(self.machines.values()))

    # ------------------------------------------------------------------ files

    def file(self, name: str, modified_at_s: float) -> ModelFile:
        cached = self.chance.choice((None, 0.0, 0.0, 0.3, 1.0))
        return ModelFile(f"/m/{name}.gguf", (f"/m/{name}.gguf",), shapes()[name].file_bytes, modified_at_s, cached)

    def read_header(self, command: cmd.ReadShape) -> Events:
        luck = 1.0 if self.calm else self.chance.random()
        if luck < 0.03:
            yield ev.ShapeRead(command.node_id, command.path, None, trouble="the disk is busy")
        elif luck < 0.035:
            yield ev.ShapeRead(command.node_id, command.path, None, invalid="it is no GGUF")
        else:
            yield ev.ShapeRead(command.node_id, command.path, shapes()[Path(command.path).stem])

    def read_ahead(self, command: cmd.ReadAhead) -> Events:
        for machine in self.machines.values():
            if machine.there and machine.facts.node_id == command.node_id:
                machine.files = tuple(
                    replace(file, cached_fraction=1.0) if file.path == command.path else file for file in machine.files
                )
        yield ev.ReadAheadEnded(command.node_id, command.path)
