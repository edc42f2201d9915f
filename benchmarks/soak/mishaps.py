"""What goes wrong, and what is done by hand: processes, GPUs and machines that go, files that change, restarts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.soak.players import Machine, Runner
from benchmarks.soak.stage import MODELS, facts_of
from scheduler import events as ev
from scheduler.units import GIB, MIB, NodeId

if TYPE_CHECKING:
    from benchmarks.soak.world import World


class Mishaps:
    """Strikes the world around it."""

    def __init__(self, world: World) -> None:
        self._world = world

    def strike(self) -> None:
        chance = self._world.chance
        machine = chance.choice(list(self._world.machines.values()))
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
            self._world.later(chance.expovariate(0.05), lambda: machine.find(device_id))
        elif what == "silence":
            machine.silent.add(device_id)
            self._world.later(chance.expovariate(0.05), lambda: machine.silent.discard(device_id))
        elif what == "lose machine" and machine.there:
            self._lose(machine)
        elif what in ("file", "caches"):
            self._change_file(machine, what == "file")
        elif what in ("pin", "unpin"):
            self._world.send(ev.PinAsked(model, what == "pin"))
        elif what == "unload":
            self._world.send(ev.UnloadAsked(model))
        elif what == "gateway":
            self._world.clients.held.clear()
            self._world.send(ev.ClientsLost())

    def _die(self, runner: Runner) -> None:
        """A ready runner's process ends by itself; sometimes those who hold a lease see it first."""
        replica_id = runner.command.replica_id
        runner.device_bytes, runner.anonymous_bytes, runner.state = {}, 0, "dead"
        self._world.clients.notice(runner)
        delay_s = self._world.chance.choice((0.0, 0.1, 3.0))
        died = ev.ReplicaDied(replica_id, "its process ended", by_itself=self._world.chance.random() < 0.7)
        self._world.answer(delay_s, lambda: self._world.send(died))

    def _lose(self, machine: Machine) -> None:
        """Ray calls it by another name when it is back, mostly: its raylet has started anew, or was only not heard."""
        node_id = machine.facts.node_id
        for everybody in (self._world.runners, self._world.leftovers):
            for replica_id in [each for each, r in everybody.items() if r.placement.node_id == node_id]:
                runner = everybody.pop(replica_id)
                runner.state = "dead"
                self._world.clients.notice(runner)
        self._world.send(ev.NodeLost(node_id, "unplugged"))
        machine.there = False
        machine.lost.clear()
        machine.silent.clear()
        if self._world.chance.random() < 0.7:
            machine.lives += 1
            machine.facts = facts_of(machine.box, NodeId(f"{machine.box.name}#{machine.lives}"))
        self._world.later(self._world.chance.expovariate(0.03), lambda: self._world.join(machine))

    def _change_file(self, machine: Machine, truly: bool) -> None:
        """A file is written anew, comes, or goes; or just the page cache holds other ones."""
        chance = self._world.chance
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
            self._world.later(chance.expovariate(0.02), lambda: self._bring_back(machine, name))
        self._world.read_node(machine)

    def _bring_back(self, machine: Machine, name: str) -> None:
        if not any(file.path == f"/m/{name}.gguf" for file in machine.files):
            machine.files = (*machine.files, self._world.file(name, self._world.now))

    def others_use_memory(self) -> None:
        chance = self._world.chance
        machine = chance.choice(list(self._world.machines.values()))
        device = chance.choice(machine.facts.devices)
        if chance.random() < 0.3:
            machine.host_foreign = chance.choice((0, 0, GIB, 4 * GIB, 10 * GIB))
            return
        machine.foreign[device.device_id] = 0
        wanted = chance.choice((0, 0, 300 * MIB, 2 * GIB, device.total_bytes))
        machine.foreign[device.device_id] = min(wanted, max(0, self._world.free(machine, device)))
        if chance.random() < 0.5:
            self._world.read_device(machine, device)

    def restart(self) -> None:
        """The scheduler starts anew: ready runners are found, all others are killed, and who waited asks again."""
        kept = {each: runner for each, runner in self._world.runners.items() if runner.state == "ready"}
        for replica_id, runner in self._world.runners.items():
            if replica_id not in kept:
                self._world.leftovers[replica_id] = runner
                self._world.clients.notice(runner)
                self._world.later(
                    self._world.chance.expovariate(1.0), partial(self._world.leftovers.pop, replica_id, None)
                )
        self._world.runners = kept
        self._world.begin_scheduler()
