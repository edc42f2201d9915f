"""Runners' processes: they start, look at what is free, load or fail, and end; and what they hold meanwhile."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial

from benchmarks.soak.clients import Clients
from benchmarks.soak.players import Machine, Runner
from benchmarks.soak.stage import FAILURES, MODELS, Violation, predicted
from benchmarks.soak.world import Events, World
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.costs.measurements import ROUNDING_BYTES
from scheduler.costs.params import DeviceBytes, Footprint
from scheduler.simulation.physics import loaded
from scheduler.units import MIB, DeviceId, ReplicaId


class Processes:
    """What `World.runners` do. The memory that models really take is drawn once."""

    def __init__(self, world: World, clients: Clients, load_timeout_s: float) -> None:
        self._world = world
        self._chance = world.chance
        self._clients = clients
        self._load_timeout_s = load_timeout_s
        self._truth = {name: self._chance.choice((0.85, 1.0, 1.0, 1.0, 1.0, 1.06)) for name in MODELS}
        self._overhead = {name: self._chance.choice((60, 150, 250, 280)) * MIB for name in MODELS}

    # ------------------------------------------------------------------ loads

    def start(self, command: cmd.StartReplica) -> None:
        """A process is started. What the others may hold and what was promised to it must fit by now."""
        promised, node_id = loaded(command.placement).device_bytes, command.placement.node_id
        runner = Runner(node_id=node_id, pid=self._world.count(), command=command, promised=promised)
        self._world.runners[command.replica_id] = runner
        for device in self._world.machine_of(runner).facts.devices:
            if need := runner.promised.get(device.device_id, 0):
                others = self._ours(device.device_id, runner)
                if need + others > device.total_bytes and not self._somebody_exceeds(device.device_id):
                    raise Violation(f"{command.replica_id}: {need} + {others} on {device.device_id} are oversubscribed")
        self._world.answer(self._chance.expovariate(5.0), partial(self._begin, runner))

    def _begin(self, runner: Runner) -> Events:
        """The process looks at what is free, and begins to load."""
        if runner.state != "starting":
            return
        runner.state = "loading"
        yield ev.ReplicaStarted(runner.command.replica_id, runner.pid)
        machine = self._world.machine_of(runner)
        short = [
            device.device_id
            for device in machine.facts.devices
            if (need := runner.promised.get(device.device_id, 0))
            and (device.device_id in machine.lost or need > self._world.free(machine, device, runner))
        ]
        if short:
            yield from self._fail(runner, "refused", f"there is not enough on {short}")
        elif runner.command.preflight and self._would_take_more(runner):
            yield from self._fail(runner, "underestimated", "llama.cpp would take more", self._report(runner))
        elif (yield from self._allocate(runner, self._chance.uniform(0.2, 0.9))):
            load_s = runner.placement.n_layers * self._chance.lognormvariate(-3.0, 0.8)
            if not self._world.calm and self._chance.random() < 0.001:
                load_s = self._load_timeout_s
            self._world.answer(load_s * self._chance.random(), partial(self._progress, runner))
            self._world.answer(load_s, partial(self._finish, runner, load_s))

    def _progress(self, runner: Runner) -> Events:
        if runner.state == "loading":
            yield ev.ReplicaProgressed(runner.command.replica_id, self._chance.random())

    def _finish(self, runner: Runner, load_s: float) -> Events:
        if runner.state != "loading":
            return
        chance, n_ctx = self._chance, runner.placement.context.n_ctx_slot
        if not self._world.calm and chance.random() < 0.04:
            kind = "invalid_model" if chance.random() < 0.02 else chance.choice(FAILURES)
            yield from self._fail(runner, kind, f"it {kind}")
        elif load_s >= self._load_timeout_s:
            yield from self._fail(runner, "failed", "the load took too long")
        elif (yield from self._allocate(runner, 1.0)):
            runner.state = "ready"
            if not self._world.calm and chance.random() < 0.003:
                n_ctx //= 2
            runner.ready = ev.ReplicaReady(runner.command.replica_id, runner.pid, self._report(runner), n_ctx, load_s)
            yield runner.ready

    def _fail(self, runner: Runner, kind: ev.FailureKind, message: str, buffers: Footprint | None = None) -> Events:
        """The load has failed; the process holds what it holds until it is stopped."""
        runner.state = "failed"
        if self._chance.random() < 0.7:  # else the event is overtaken by the next readings
            yield from self._world.read_machine(self._world.machine_of(runner))
        yield ev.ReplicaFailed(runner.command.replica_id, kind, message, buffers)

    def _report(self, runner: Runner) -> Footprint:
        """What llama.cpp says: some models take a little more or less than the formulas say, always the same."""
        found = predicted(runner.command.model, runner.placement.layout, runner.placement.context)
        factor = self._truth[runner.command.model]
        if factor == 1.0:
            return found
        return replace(found, devices=tuple(_scaled(share, factor) for share in found.devices))

    def _would_take_more(self, runner: Runner) -> bool:
        placement = runner.placement
        shares = zip(self._report(runner).devices, placement.overhead_bytes, placement.device_bytes, strict=True)
        return any(truth.total_bytes + overhead > need + ROUNDING_BYTES for truth, overhead, need in shares)

    def _allocate(self, runner: Runner, share: float) -> Generator[ev.Event, None, bool]:
        """It takes a share of its memory; False when a device has not got that and the load has failed."""
        machine, placement = self._world.machine_of(runner), runner.placement
        overhead = self._overhead[runner.command.model]
        devices = {device.device_id: device for device in machine.facts.devices}
        for device_id, truth in zip(placement.device_ids, self._report(runner).devices, strict=True):
            device = devices[device_id]
            wanted = truth.total_bytes + (overhead if device.kind == "cuda" else 0)
            if device_id in machine.lost or int(wanted * share) > self._world.free(machine, device, runner):
                yield from self._fail(runner, "out_of_memory", f"{device_id} has no memory left")
                return False
            runner.device_bytes[device_id] = int(wanted * share)
            ours = self._ours(device_id, runner) + runner.device_bytes[device_id]
            if ours > device.total_bytes and not self._somebody_exceeds(device_id):
                raise Violation(f"{runner.command.replica_id} finds {device_id} oversubscribed: {ours}")
        runner.anonymous_bytes = int(placement.host_resting_bytes * share)
        return True

    def _ours(self, device_id: DeviceId, but: Runner | None = None) -> int:
        return sum(each.may_hold(device_id) for each in self._world.runners.values() if each is not but)

    def _somebody_exceeds(self, device_id: DeviceId) -> bool:
        return any(each.exceeds(device_id) for each in self._world.runners.values())

    # ------------------------------------------------------------------ ends

    def stop(self, command: cmd.StopReplica) -> None:
        """The process is killed, and its memory comes back after a while."""
        runner = self._world.runners.get(command.replica_id)
        if runner is not None:
            if runner.state == "loading" and self._chance.random() < 0.3:  # its last word is on the way already
                report, pid = self._report(runner), runner.pid
                late: ev.Event = ev.ReplicaFailed(command.replica_id, "crashed", "its process ended while loading")
                if self._chance.random() < 0.5:
                    late = ev.ReplicaReady(command.replica_id, pid, report, runner.placement.context.n_ctx, 1.0)
                self._world.answer(0.0, lambda: (late,))
            runner.state = "stopping"
            self._clients.notice(runner)
        self._world.answer(self._chance.expovariate(1.5), partial(self._gone, command.replica_id))

    def _gone(self, replica_id: ReplicaId) -> Events:
        runner = self._world.runners.pop(replica_id, None)
        if runner is not None and self._is_there(runner):
            yield from self._world.read_machine(self._world.machine_of(runner))
        yield ev.ReplicaGone(replica_id)

    def _is_there(self, runner: Runner) -> bool:
        machine = self._world.machine_of(runner)
        return machine.there and machine.facts.node_id == runner.placement.node_id

    def check(self, replica_id: ReplicaId) -> Events:
        """Whether it still serves."""
        runner = self._world.runners.get(replica_id)
        if runner is None or runner.state == "stopping":
            return  # its ReplicaGone is on the way
        if runner.state == "ready" and self._chance.random() < 0.9:
            yield ev.ReplicaVouched(replica_id)
        else:
            yield ev.ReplicaDied(replica_id, "it does not answer")

    # ------------------------------------------------------------------ machines

    def join(self, machine: Machine) -> Events:
        """The machine is there: its facts, then what still runs on it, then the first readings."""
        world = self._world
        if machine.there:
            return
        machine.there = True
        yield ev.NodeJoined(machine.facts)
        for runner in [r for r in world.runners.values() if r.placement.node_id == machine.facts.node_id]:
            yield self._adopted(runner)
        if not world.calm and self._chance.random() < 0.1:
            world.answer(self._chance.choice((1.0, 35.0)), partial(world.read_machine, machine))
        else:
            yield from world.read_machine(machine)

    def _adopted(self, runner: Runner) -> ev.ReplicaAdopted:
        command = runner.command
        assert runner.ready is not None
        leases = self._clients.of_runner(command.replica_id)
        return ev.ReplicaAdopted(
            command.replica_id, command.model, command.path, command.placement, runner.ready, leases
        )

    def outlive_scheduler(self) -> None:
        """The scheduler has ended. Runners that are ready stay for the next one; all others are killed."""
        world = self._world
        kept = {replica_id: runner for replica_id, runner in world.runners.items() if runner.state == "ready"}
        for replica_id, runner in world.runners.items():
            if replica_id not in kept:
                world.leftovers[replica_id] = runner
                self._clients.notice(runner)
                world.later(self._chance.expovariate(1.0), partial(self._forget, replica_id))
        world.runners = kept

    def _forget(self, replica_id: ReplicaId) -> None:
        self._world.leftovers.pop(replica_id, None)


def _scaled(share: DeviceBytes, factor: float) -> DeviceBytes:
    counts = (share.weights_bytes, share.kv_bytes, share.compute_bytes)
    return DeviceBytes(*(int(count * factor) for count in counts))
