"""Runners' processes: they start, look at what is free, load or fail, and end; and what they hold meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.soak.players import Machine, Runner
from benchmarks.soak.stage import FAILURES, MODELS, Violation, predicted
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.costs.measurements import ROUNDING_BYTES
from scheduler.costs.params import DeviceBytes, Footprint
from scheduler.units import MIB, DeviceId, ReplicaId

if TYPE_CHECKING:
    from benchmarks.soak.world import World


class Processes:
    """What `World.runners` do. The memory that models really take is drawn once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._truth = {name: world.chance.choice((0.85, 1.0, 1.0, 1.0, 1.0, 1.06)) for name in MODELS}
        self._overhead = {name: world.chance.choice((60, 150, 250, 280)) * MIB for name in MODELS}

    def start(self, command: cmd.StartReplica) -> None:
        """A process is started. What the others may hold and what was promised to it must fit by now."""
        runner = Runner(command, pid=self._world.count())
        self._world.runners[command.replica_id] = runner
        for device in self._machine_of(runner).facts.devices:
            if need := runner.promised.get(device.device_id, 0):
                others = self._ours(device.device_id, runner)
                if need + others > device.total_bytes and not self._somebody_exceeds(device.device_id):
                    raise Violation(f"{command.replica_id}: {need} + {others} on {device.device_id} are oversubscribed")
        self._world.answer(self._world.chance.expovariate(5.0), lambda: self._begin(runner))

    def _begin(self, runner: Runner) -> None:
        """The process looks at what is free, and begins to load."""
        if runner.state != "starting":
            return
        runner.state = "loading"
        replica_id, chance = runner.command.replica_id, self._world.chance
        self._world.send(ev.ReplicaStarted(replica_id, runner.pid))
        machine = self._machine_of(runner)
        short = [
            device.device_id
            for device in machine.facts.devices
            if (need := runner.promised.get(device.device_id, 0))
            and (device.device_id in machine.lost or need > self._world.free(machine, device, runner))
        ]
        if short:
            self._fail(runner, "refused", f"there is not enough on {short}")
        elif runner.command.preflight and self._would_take_more(runner):
            self._fail(runner, "underestimated", "llama.cpp would take more", self._report(runner))
        elif self._allocate(runner, chance.uniform(0.2, 0.9)):
            load_s = runner.placement.n_layers * chance.lognormvariate(-3.0, 0.8)
            if not self._world.calm and chance.random() < 0.001:
                load_s = self._world.core.policy.load_timeout_s
            self._world.answer(load_s * chance.random(), lambda: self._progress(runner))
            self._world.answer(load_s, lambda: self._finish(runner, load_s))

    def _progress(self, runner: Runner) -> None:
        if runner.state == "loading":
            self._world.send(ev.ReplicaProgressed(runner.command.replica_id, self._world.chance.random()))

    def _finish(self, runner: Runner, load_s: float) -> None:
        if runner.state != "loading":
            return
        chance, context = self._world.chance, runner.placement.context
        if not self._world.calm and chance.random() < 0.04:
            kind = "invalid_model" if chance.random() < 0.02 else chance.choice(FAILURES)
            self._fail(runner, kind, f"it {kind}")
        elif load_s >= self._world.core.policy.load_timeout_s:
            self._fail(runner, "failed", "the load took too long")
        elif self._allocate(runner, 1.0):
            runner.state = "ready"
            n_ctx = context.n_ctx if context.kv_unified else context.n_ctx // context.n_seq_max
            if not self._world.calm and chance.random() < 0.003:
                n_ctx //= 2
            runner.ready = ev.ReplicaReady(runner.command.replica_id, runner.pid, self._report(runner), n_ctx, load_s)
            self._world.send(runner.ready)

    def _fail(self, runner: Runner, kind: ev.FailureKind, message: str, buffers: Footprint | None = None) -> None:
        """The load has failed; the process holds what it holds until it is stopped."""
        runner.state = "failed"
        if self._world.chance.random() < 0.7:  # else the event is overtaken by the next readings
            self._world.read_machine(self._machine_of(runner))
        self._world.send(ev.ReplicaFailed(runner.command.replica_id, kind, message, buffers))

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

    def _allocate(self, runner: Runner, share: float) -> bool:
        """It takes a share of its memory; False when a device has not got that and the load has failed."""
        machine, placement = self._machine_of(runner), runner.placement
        overhead = self._overhead[runner.command.model]
        devices = {device.device_id: device for device in machine.facts.devices}
        for device_id, truth in zip(placement.device_ids, self._report(runner).devices, strict=True):
            device = devices[device_id]
            wanted = truth.total_bytes + (overhead if device.kind == "cuda" else 0)
            if device_id in machine.lost or int(wanted * share) > self._world.free(machine, device, runner):
                self._fail(runner, "out_of_memory", f"{device_id} has no memory left")
                return False
            runner.device_bytes[device_id] = int(wanted * share)
            ours = self._ours(device_id, runner) + runner.device_bytes[device_id]
            if ours > device.total_bytes and not self._somebody_exceeds(device_id):
                raise Violation(f"{runner.command.replica_id} finds {device_id} oversubscribed: {ours}")
        runner.anonymous_bytes = int(placement.host_resting_bytes * share)
        return True

    def stop(self, command: cmd.StopReplica) -> None:
        """The process is killed, and its memory comes back after a while."""
        runner = self._world.runners.get(command.replica_id)
        if runner is not None:
            if runner.state == "loading" and self._world.chance.random() < 0.3:  # its last word is on the way already
                report, pid = self._report(runner), runner.pid
                late: ev.Event = ev.ReplicaFailed(command.replica_id, "crashed", "its process ended while loading")
                if self._world.chance.random() < 0.5:
                    late = ev.ReplicaReady(command.replica_id, pid, report, runner.placement.context.n_ctx, 1.0)
                self._world.answer(0.0, lambda: self._world.send(late))
            runner.state = "stopping"
            self._world.clients.notice(runner)
        self._world.answer(self._world.chance.expovariate(1.5), lambda: self._gone(command.replica_id))

    def _gone(self, replica_id: ReplicaId) -> None:
        runner = self._world.runners.pop(replica_id, None)
        if runner is not None and self._is_there(runner):
            self._world.read_machine(self._machine_of(runner))
        self._world.send(ev.ReplicaGone(replica_id))

    def checked(self, replica_id: ReplicaId) -> None:
        runner = self._world.runners.get(replica_id)
        if runner is None or runner.state == "stopping":
            return  # its ReplicaGone is on the way
        if runner.state == "ready" and self._world.chance.random() < 0.9:
            self._world.send(ev.ReplicaVouched(replica_id))
        else:
            self._world.send(ev.ReplicaDied(replica_id, "it does not answer"))

    def _machine_of(self, runner: Runner) -> Machine:
        return self._world.machines[runner.placement.node_id.partition("#")[0]]

    def _is_there(self, runner: Runner) -> bool:
        machine = self._machine_of(runner)
        return machine.there and machine.facts.node_id == runner.placement.node_id

    def _ours(self, device_id: DeviceId, but: Runner | None = None) -> int:
        return sum(each.may_hold(device_id) for each in self._world.runners.values() if each is not but)

    def _somebody_exceeds(self, device_id: DeviceId) -> bool:
        return any(each.exceeds(device_id) for each in self._world.runners.values())


def _scaled(share: DeviceBytes, factor: float) -> DeviceBytes:
    counts = (share.weights_bytes, share.kv_bytes, share.compute_bytes)
    return DeviceBytes(*(int(count * factor) for count in counts))
