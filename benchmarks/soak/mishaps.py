"""What goes wrong, and what is done by hand: processes, GPUs and machines that go, files that change."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from benchmarks.soak.clients import Clients
from benchmarks.soak.players import Machine, Runner
from benchmarks.soak.processes import Processes
from benchmarks.soak.stage import MODELS, facts_of
from benchmarks.soak.world import Events, World
from scheduler import events as ev
from scheduler.units import GIB, MIB, NodeId


class Mishaps:
    """Strikes the world, those who run in it, and those who are answered."""

    def __init__(self, world: World, clients: Clients, processes: Processes) -> None:
        self._world = world
        self._chance = world.chance
        self._clients = clients
        self._processes = processes

    def strike(self) -> Events:
        chance = self._chance
        machine = self._world.some_machine()
        device_id = chance.choice(machine.facts.devices).device_id
        model = chance.choice((*MODELS, "unicorn"))
        ready = [runner for runner in self._world.runners.values() if runner.state == "ready"]
        what = chance.choices(
            ("die", "lose GPU", "silence", "lose machine", "file", "caches", "pin", "unpin", "unload", "gateway"),
            (4, 2, 2, 1, 2, 2, 1, 2, 3, 0.5),
        )[0]
        if what == "die" and ready:
            self._die(chance.choice(ready))
        elif what == "lose GPU" and machine.there:
            machine.lost[device_id] = "it fell off the bus"
            self._world.later(chance.expovariate(0.05), partial(machine.find, device_id))
        elif what == "silence":
            machine.silent.add(device_id)
            self._world.later(chance.expovariate(0.05), partial(machine.silent.discard, device_id))
        elif what == "lose machine" and machine.there:
            yield from self._lose(machine)
        elif what in ("file", "caches"):
            yield from self._change_file(machine, what == "file")
        elif what in ("pin", "unpin"):
            yield ev.PinAsked(model, what == "pin")
        elif what == "unload":
            yield ev.UnloadAsked(model)
        elif what == "gateway":
            yield from self._clients.lose_gateway()

    def _die(self, runner: Runner) -> None:
        """A ready runner's process ends by itself; sometimes those who hold a lease see it first."""
        replica_id = runner.command.replica_id
        runner.device_bytes, runner.anonymous_bytes, runner.state = {}, 0, "dead"
        self._clients.notice(runner)
        delay_s = self._chance.choice((0.0, 0.1, 3.0))
        died = ev.ReplicaDied(replica_id, "its process ended", by_itself=self._chance.random() < 0.7)
        self._world.answer(delay_s, lambda: (died,))

    def _lose(self, machine: Machine) -> Events:
        """Ray calls it by another name when it is back, mostly: its raylet has started anew, or was only not heard."""
        node_id = machine.facts.node_id
        for everybody in (self._world.runners, self._world.leftovers):
            for replica_id in [each for each, r in everybody.items() if r.placement.node_id == node_id]:
                runner = everybody.pop(replica_id)
                runner.state = "dead"
                self._clients.notice(runner)
        yield ev.NodeLost(node_id, "unplugged")
        machine.there = False
        machine.lost.clear()
        machine.silent.clear()
        if self._chance.random() < 0.7:
            machine.lives += 1
            machine.facts = facts_of(machine.box, NodeId(f"{machine.box.name}#{machine.lives}"))
        self._world.later(self._chance.expovariate(0.03), partial(self._processes.join, machine))

    def _change_file(self, machine: Machine, truly: bool) -> Events:
        """A file is written anew, comes, or goes; or just the page cache holds other ones."""
        chance = self._chance
        name = chance.choice(machine.box.files.split())
        others = tuple(file for file in machine.files if file.path != f"/m/{name}.gguf")
        if not truly:
            machine.files = tuple(
                replace(f, cached_fraction=chance.choice((None, 0.0, 0.5, 1.0))) for f in machine.files
            )
        elif len(others) == len(machine.files) or chance.random() < 0.7:
            machine.files = (*others, self._world.file(name, self._world.now))
        else:
            machine.files = others
            self._world.later(chance.expovariate(0.02), partial(self._bring_back, machine, name))
        return self._world.read_node(machine)

    def _bring_back(self, machine: Machine, name: str) -> None:
        if not any(file.path == f"/m/{name}.gguf" for file in machine.files):
            machine.files = (*machine.files, self._world.file(name, self._world.now))

    def others_use_memory(self) -> Events:
        chance = self._chance
        machine = self._world.some_machine()
        device = chance.choice(machine.facts.devices)
        if chance.random() < 0.3:
            machine.host_foreign = chance.choice((0, 0, GIB, 4 * GIB, 10 * GIB))
            return
        machine.foreign[device.device_id] = 0
        wanted = chance.choice((0, 0, 300 * MIB, 2 * GIB, device.total_bytes))
        machine.foreign[device.device_id] = min(wanted, max(0, self._world.free(machine, device)))
        if chance.random() < 0.5:
            yield from self._world.read_device(machine, device)
