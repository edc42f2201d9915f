"""The core against random machines and events: safety after each step, liveness at the end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scenario import SMALL, Scenario, gpu

from scheduler import events as ev
from scheduler.cluster.leases import Ending
from scheduler.cluster.ledger import STATES
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.dispatch import Preview
from scheduler.errors import ArrieroError, Impossible, Unavailable
from scheduler.simulation import physics
from scheduler.units import GIB, MIB, NodeId

MODELS = {
    "ant": SMALL,
    "bee": (8, 1024, 2816, 0),
    "cat": (24, 2048, 5632),
    "dog": (12, 2048, 5632),
    "elk": (8, 2048, 5632, 8),
    "yak": (48, 4096, 11008),  # 18 GiB: fits few machines
}
SIZES = ("512MiB", "1GiB", "3GiB", "6GiB")
MISHAPS = (
    *("embed", "load", "pin", "unpin", "keep alive", "unload", "a load fails", "a runner dies", "others use memory"),
    *("a GPU is lost", "GPUs come back", "a machine joins or leaves", "the gateway restarts"),
)
FAILURES = ("refused", "out_of_memory", "crashed", "failed", "invalid_model")


class CoreMachine(RuleBasedStateMachine):
    @initialize(
        sizes=st.lists(st.sampled_from(SIZES), max_size=3),
        ram=st.sampled_from(("3GiB", "5GiB", "12GiB")),
        cores=st.integers(1, 4),
        slots=st.integers(1, 2),
        active=st.sampled_from((None, None, 1, 2)),
        residency_s=st.sampled_from((0.0, 5.0)),
        spill_after_s=st.sampled_from((0.0, 10.0)),
        keep_alive_s=st.sampled_from((None, 8.0)),
        most=st.sampled_from((None, 1, 2)),
        tells_processes=st.booleans(),
        outsiders=st.booleans(),
    )
    def start(
        self,
        sizes: list[str],
        ram: str,
        cores: int,
        slots: int,
        active: int | None,
        residency_s: float,
        spill_after_s: float,
        keep_alive_s: float | None,
        most: int | None,
        tells_processes: bool,
        outsiders: bool,
    ) -> None:
        self.outsiders = outsiders
        self.requests: list[str] = []
        self.scenario = Scenario(
            gpus=[gpu(size, f"gpu{i}") for i, size in enumerate(sizes)],
            models=MODELS,
            ram=ram,
            cores=cores,
            catalogue={
                "defaults": {
                    "n_ctx": 1024 * slots,
                    "n_seq_max": slots,
                    "keep_alive_s": keep_alive_s,
                    "max_replicas": most,
                },
                "policy": {
                    "max_active_models": active,
                    "min_residency_s": residency_s,
                    "spill_after_s": spill_after_s,
                    "deadline_s": 1e6,
                    "queue_limit": 12,
                },
            },
            auto=False,
            tells_processes=tells_processes,
        )

    # ------------------------------------------------------------------ what clients do

    @rule(
        model=st.sampled_from(sorted(MODELS)),
        n_ctx=st.sampled_from((None, None, 256, 4096)),
        fingerprint=st.sampled_from(("", "one", "other")),
    )
    def ask(self, model: str, n_ctx: int | None, fingerprint: str) -> None:
        self.requests.append(self.scenario.ask(model, n_ctx, fingerprint=fingerprint))

    @rule(model=st.sampled_from(sorted(MODELS)), n_ctx=st.sampled_from((None, None, 256, 4096)))
    def what_the_plan_says_is_what_the_next_request_gets(self, model: str, n_ctx: int | None) -> None:
        scenario, core = self.scenario, self.scenario.core
        before = set(core.replicas)
        try:
            plan: Preview | ArrieroError = core.plan(model, n_ctx, scenario.now)
        except ArrieroError as error:
            plan = error
        stops = len(scenario.stopped)
        request_id = scenario.ask(model, n_ctx)
        self.requests.append(request_id)
        if isinstance(plan, ArrieroError):
            if scenario.waits(request_id):  # for a machine or a header to be read
                assert scenario.why(request_id) in plan.message
            else:
                assert type(scenario.error(request_id)) is type(plan), scenario.why(request_id)
        elif plan.serving is not None and not plan.reason:
            assert scenario.grants[request_id].replica_id == plan.serving.replica_id
        elif plan.choice is not None and plan.choice.verdict in ("blocked", "impossible"):
            assert isinstance(scenario.error(request_id), Impossible | Unavailable)
        elif plan.choice is not None and plan.choice.verdict in ("free", "evict"):
            (placed,) = [r for r in core.replicas.values() if r.replica_id not in before and r.model == model]
            assert placed.placement == plan.choice.placement
            assert {command.replica_id for command in scenario.stopped[stops:]} >= plan.choice.victims
        else:
            assert scenario.waits(request_id), scenario.why(request_id)
            if core.queue.length(model) == 1:
                assert scenario.why(request_id) == plan.reason

    @rule(models=st.lists(st.sampled_from(("ant", "bee", "cat", "dog")), min_size=2, max_size=4))
    def many_ask(self, models: list[str]) -> None:
        self.requests += [self.scenario.ask(model) for model in models]

    @precondition(lambda self: self.scenario.core.fleet.leases)
    @rule(data=st.data(), ending=st.sampled_from(("served", "failed", "left")))
    def finish(self, data: st.DataObject, ending: Ending) -> None:
        leases = [lease for replica in self.replicas() for lease in sorted(replica.leases)]
        self.scenario.send(ev.LeaseReleased(data.draw(st.sampled_from(leases)), ending))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.requests))
        self.scenario.cancel(request_id)
        self.requests.remove(request_id)  # nobody waits for its answer any more

    # ------------------------------------------------------------------ what runners do

    @precondition(lambda self: self.replicas(ReplicaState.LOADING))
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        self.finish_load(self.draw(data, ReplicaState.LOADING))

    @rule(times=st.integers(1, 3))
    def all_loads_and_stops_end(self, times: int) -> None:
        for _ in range(times):
            for replica in self.replicas(ReplicaState.LOADING):
                if replica.state is ReplicaState.LOADING:
                    self.finish_load(replica)
            self.scenario.finish_stops()

    @rule()
    def some_clients_finish(self) -> None:
        for replica in self.replicas()[::2]:
            for lease_id in sorted(replica.leases):
                self.scenario.send(ev.LeaseReleased(lease_id))

    @precondition(lambda self: self.replicas(ReplicaState.LOADING))
    @rule(data=st.data(), share=st.sampled_from((0.3, 0.9)))
    def load_partly(self, data: st.DataObject, share: float) -> None:
        replica = self.draw(data, ReplicaState.LOADING)
        command = next(c for c in self.scenario.started if c.replica_id == replica.replica_id)
        if self.there_is_room(replica):
            self.scenario.allocate(command, share)
            self.scenario.read_devices()

    @precondition(lambda self: self.replicas(ReplicaState.STOPPING))
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        self.scenario.gone(self.draw(data, ReplicaState.STOPPING).replica_id)

    # ------------------------------------------------------------------ what machines do

    @rule(seconds=st.sampled_from((0.25, 3.0, 20.0, 70.0)))
    def time_passes(self, seconds: float) -> None:
        self.scenario.wait(seconds, longest_step_s=10.0)

    # ------------------------------------------------------------------ what goes wrong, or is done by hand

    @rule(data=st.data(), kind=st.sampled_from(MISHAPS))
    def mishap(self, data: st.DataObject, kind: str) -> None:
        scenario, model = self.scenario, data.draw(st.sampled_from(sorted(MODELS)))
        devices, loading = scenario.gpus, self.replicas(ReplicaState.LOADING)
        known = model in scenario.core.models.by_name
        match kind:
            case "embed" | "load":
                self.requests.append(scenario.ask(model, kind=kind))
            case "pin" | "unpin" if known:
                scenario.send(ev.PinAsked(model, kind == "pin"))
            case "keep alive" if known:
                scenario.send(ev.KeepAliveAsked(model, data.draw(st.sampled_from([0.0, 1.0, 300.0]))))
            case "unload" if known:
                scenario.unload(model)
            case "a load fails" if loading:
                failure: Any = data.draw(st.sampled_from(FAILURES))
                scenario.send(ev.ReplicaFailed(self.draw(data, ReplicaState.LOADING).replica_id, failure, failure))
            case "a runner dies" if self.replicas(ReplicaState.READY):
                scenario.send(ev.ReplicaDied(self.draw(data, ReplicaState.READY).replica_id, "killed"))
            case "others use memory" if self.outsiders and devices:
                device = data.draw(st.sampled_from(devices))
                wanted = data.draw(st.sampled_from((0, 300 * MIB, 2 * GIB)))
                scenario.foreign[device.device_id] = 0
                scenario.foreign[device.device_id] = min(wanted, scenario.free(device))
                scenario.read_devices()
            case "a GPU is lost" if self.outsiders and devices:
                scenario.lost[data.draw(st.sampled_from(devices)).device_id] = "fell off the bus"
                scenario.read_devices()
            case "GPUs come back":
                scenario.lost.clear()
                scenario.read_devices()
            case "a machine joins or leaves" if NodeId("attic") in scenario.core.inventory.nodes:
                scenario.lose_node("attic")
            case "a machine joins or leaves":
                attic = [gpu(data.draw(st.sampled_from(SIZES)), "gpu-attic")]
                scenario.add_node("attic", attic, ram="6GiB", cores=2, has=["ant", "cat"])
            case "the gateway restarts":
                scenario.send(ev.ClientsLost())
            case _:
                pass

    # ------------------------------------------------------------------ safety

    @invariant()
    def devices_hold_what_they_can(self) -> None:
        if hasattr(self, "scenario"):
            self.scenario.check()
            for replica in self.replicas(ReplicaState.LOADING):
                assert self.outsiders or self.there_is_room(replica), f"{replica.replica_id} would not find its room"

    @invariant()
    def everybody_is_somewhere(self) -> None:
        if hasattr(self, "scenario"):
            for request_id in self.requests:
                answers = (request_id in self.scenario.grants) + (request_id in self.scenario.refusals)
                assert answers + self.scenario.waits(request_id) == 1

    # ------------------------------------------------------------------ liveness

    def teardown(self) -> None:
        if not hasattr(self, "scenario"):
            return
        scenario = self.scenario
        scenario.foreign.clear()
        scenario.lost.clear()
        for _ in range(600):
            self.settle()
            if not len(scenario.core.queue):
                break
            scenario.wait(1.0)
        assert not len(scenario.core.queue), [(w.model, w.reason) for w in scenario.core.queue]
        for name in MODELS:
            if name in scenario.core.models.by_name:
                scenario.unload(name)
        self.settle()
        assert not scenario.core.replicas
        ledger = scenario.core.ledger
        assert not any(ledger.booked(account, *STATES) for account in ledger.accounts())
        assert not len(scenario.core.fleet.leases)

    def settle(self) -> None:
        """Everything that is under way ends."""
        for _ in range(100):
            for replica in self.replicas(ReplicaState.LOADING):
                if replica.state is ReplicaState.LOADING:
                    self.finish_load(replica)
            self.scenario.finish_stops()
            for replica in self.replicas():
                for lease_id in sorted(replica.leases):
                    self.scenario.send(ev.LeaseReleased(lease_id))
            moving = self.replicas(ReplicaState.LOADING) + self.replicas(ReplicaState.STOPPING)
            if not moving and not self.scenario.core.fleet.leases:
                return
        raise AssertionError("the core never comes to rest")

    # ------------------------------------------------------------------ helpers

    def replicas(self, state: ReplicaState | None = None) -> list[Replica]:
        return [r for r in self.scenario.core.replicas.values() if state is None or r.state is state]

    def draw(self, data: st.DataObject, state: ReplicaState) -> Replica:
        return self.scenario.core.replicas[data.draw(st.sampled_from([r.replica_id for r in self.replicas(state)]))]

    def there_is_room(self, replica: Replica) -> bool:
        """What the runner sees before it loads."""
        scenario, needs = self.scenario, physics.loaded(replica.placement).device_bytes
        devices = scenario.core.inventory.nodes[replica.placement.node_id].facts.devices
        fits = all(needs.get(each.device_id, 0) <= scenario.free(each, but=replica.replica_id) for each in devices)
        return fits and not any(device_id in scenario.lost for device_id in needs)

    def finish_load(self, replica: Replica) -> None:
        command = next(c for c in self.scenario.started if c.replica_id == replica.replica_id)
        if self.there_is_room(replica):
            self.scenario.loaded(command)
        else:
            self.scenario.send(ev.ReplicaFailed(replica.replica_id, "refused", "others took its memory"))


CoreMachine.TestCase.settings = settings(
    max_examples=30,
    phases=[Phase.generate],  # a failure is shown as it was found: shrinking would take minutes
    stateful_step_count=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestCoreMachine = pytest.mark.slow(CoreMachine.TestCase)
