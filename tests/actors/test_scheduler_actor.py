"""The scheduler actor without Ray: its plain class, with the real core, effects and watch of nodes, before fake actors.

Each scene begins with one machine that has a card and the models "ant" and "bee", of one slot each, and room for one of
them. At its end the books must balance and the actor's process must live, unless the scene says otherwise.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_machines import FakeRunner, Machine
from fake_ray import Actor, FakeRay, Handle, Outcome, plain
from ray.exceptions import ActorDiedError, RaySystemError
from virtual_time import now_s, play

from actors.devices.node import NodeSettings
from actors.effects import SPARE_AFTER_S
from actors.leasing import Grant, TokenCounts
from actors.records import Notice, Status
from actors.scheduler import SchedulerActor, SchedulerSettings
from arriero.example_models import Dimensions, write_example_model
from scheduler import events as ev
from scheduler.cluster.facts import DeviceFacts
from scheduler.config import parse_catalogue
from scheduler.core import SchedulerCore
from scheduler.costs.shape import read_shape
from scheduler.errors import ArrieroError, InvariantBroken, Unavailable, UnknownModel
from scheduler.units import GIB, DeviceId, NodeId, ReplicaId, RequestId

BOX, BARN = NodeId("b0" * 28), NodeId("ba" * 28)
CATALOGUE = {
    "defaults": {"n_ctx": 2048, "n_seq_max": 1, "max_replicas": 1, "spill": False},
    "policy": {"max_active_models": 1, "min_residency_s": 0.0, "lease_ttl_s": 20.0, "drain_after_s": 0.0},
}
SERIAL = itertools.count()


def machine(node_id: NodeId, *models: str) -> Machine:
    card = DeviceFacts(DeviceId(f"card-{node_id}"), node_id, "gpu0", "test card", "rpc", 8 * GIB)
    with tempfile.TemporaryDirectory() as folder:
        path = write_example_model(Path(folder) / "ant.gguf", "ant", Dimensions(4, 1024, 8, 4, 4096, 16000))
        shape = read_shape(path)
    return Machine(node_id, (card,), {f"/m/{model}.gguf": shape for model in models}, last_words="ggml: a fault")


class ProcessEnded(BaseException):
    """What `os._exit` does here."""


class Stage:
    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, catalogue: dict[str, Any]) -> None:
        self.ray = FakeRay()
        self.ray.stand_in(patch)
        self.ray.add(machine(BOX, "ant", "bee"))
        self.patch = patch
        self.exits: list[int] = []
        self.settings = SchedulerSettings(parse_catalogue(catalogue), NodeSettings(), "v1")
        self.scheduler: Handle
        self.actor: Actor
        silence = SimpleNamespace(promise=lambda within_s: None, rest=lambda: None)
        patch.setattr("actors.scheduler.sign_in", lambda *arguments: silence)
        patch.setattr("actors.scheduler.measurements_path", lambda: folder / "measurements.sqlite")
        patch.setattr("actors.scheduler.time", SimpleNamespace(monotonic=now_s))
        patch.setattr("actors.scheduler.os", SimpleNamespace(_exit=self._exit))
        patch.setattr("logging.shutdown", lambda: None)
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "set_threshold", lambda *thresholds: None)

    def _exit(self, code: int) -> None:
        if self.actor.dead is None:  # what is still to be done in a process that has ended is not done
            self.exits.append(code)
            self.actor.end()
        raise ProcessEnded

    def begin(self, *, again: bool = False) -> None:
        """The scheduler's process starts; `again`: Ray has started it before."""
        self.ray.restarted = again
        self.scheduler = self.ray.host(plain(SchedulerActor), lambda: plain(SchedulerActor)(self.settings))
        self.actor = self.scheduler._actor

    async def settled(self) -> None:
        assert await self.scheduler.await_ready.remote(30.0) == ""

    def ask(self, model: str = "ant", name: str = "", **wishes: Any) -> asyncio.Future[Grant | ArrieroError]:
        request_id = RequestId(name or f"q{next(SERIAL)}")
        return asyncio.ensure_future(self.scheduler.acquire.remote(ev.RequestArrived(request_id, model, **wishes)))

    async def lease(self, model: str = "ant", name: str = "", **wishes: Any) -> Grant:
        answer = await self.ask(model, name, **wishes)
        assert isinstance(answer, Grant), answer
        return answer

    async def release(self, lease: Grant, *, failed: bool = False) -> None:
        await self.scheduler.release.remote(lease.lease_id, "failed" if failed else "served", TokenCounts())

    async def status(self) -> Status:
        found: Status = await self.scheduler.status.remote()
        return found

    async def notices(self, kind: str = "") -> list[Notice]:
        told: list[Notice] = await self.scheduler.notices.remote(0)
        return [notice for notice in told if not kind or notice.kind == kind]

    def state(self, actor: Actor) -> str:
        return actor.inside.state if isinstance(actor.inside, FakeRunner) else ""

    def runner(self, lease: Grant) -> FakeRunner:
        inside: FakeRunner = self.runner_actor(lease).inside
        return inside

    def runner_actor(self, lease: Grant) -> Actor:
        """The runner's."""
        [actor] = [
            actor
            for actor in self.ray.actors
            if isinstance(actor.inside, FakeRunner) and actor.inside.endpoint == lease.endpoint
        ]
        return actor


Scene = Callable[[Stage], Coroutine[Any, Any, None]]


def perform(scene: Scene, *, catalogue: dict[str, Any] = CATALOGUE, begins: bool = True, exits: int = 0) -> None:
    async def played(patch: pytest.MonkeyPatch, folder: Path) -> None:
        stage = Stage(patch, folder, catalogue)
        if begins:
            stage.begin()
            await stage.settled()
        await scene(stage)
        assert stage.exits == [1] * exits
        if stage.actor.inside is not None:
            stage.actor.inside._core.ledger.check()
            await stage.scheduler.close.remote()

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        play(played(patch, Path(folder)))


# ---------------------------------------------------------------------- leases


def test_a_request_gets_a_lease_of_the_runner_that_loaded_for_it() -> None:
    async def scene(stage: Stage) -> None:
        lease = await stage.lease()
        assert stage.runner(lease).state == "ready"
        assert (lease.model, lease.n_ctx, lease.ttl_s) == ("ant", 2048, 20.0)
        [replica] = (await stage.status()).replicas
        assert (replica.state, replica.active, replica.pid) == ("ready", 1, stage.runner(lease).process().pid)

    perform(scene)


def test_a_slot_that_is_given_back_is_given_to_the_next() -> None:
    async def scene(stage: Stage) -> None:
        first, second = await stage.lease(), stage.ask()
        await asyncio.sleep(5.0)
        assert not second.done()
        await stage.release(first)
        granted = await second
        assert isinstance(granted, Grant) and granted.endpoint == first.endpoint

    perform(scene)


def test_a_lease_is_kept_as_long_as_it_is_renewed() -> None:
    async def scene(stage: Stage) -> None:
        first, second = await stage.lease(), stage.ask()
        for _ in range(10):
            await asyncio.sleep(10.0)
            await stage.scheduler.renew.remote((first.lease_id,))
        assert not second.done()
        await asyncio.sleep(30.0)
        assert isinstance(await second, Grant)
        assert stage.runner(first).cancelled == [first.lease_id]  # nobody reads that answer any more
        assert len(await stage.notices("lease_expired")) == 1

    perform(scene)


def test_a_model_makes_room_for_another_once_it_is_idle() -> None:
    async def scene(stage: Stage) -> None:
        ant, bee = await stage.lease("ant"), stage.ask("bee")
        await asyncio.sleep(5.0)
        assert not bee.done()
        body = stage.runner(ant).body
        await stage.release(ant)
        granted = await bee
        assert isinstance(granted, Grant) and granted.model == "bee" and granted.endpoint != ant.endpoint
        assert not body.alive

    perform(scene)


# ---------------------------------------------------------------------- cancelling


def test_a_request_that_is_cancelled_leaves_the_queue() -> None:
    async def scene(stage: Stage) -> None:
        first, second, third = await stage.lease(), stage.ask(name="second"), stage.ask()
        await asyncio.sleep(1.0)
        await stage.scheduler.cancel.remote(RequestId("second"))
        assert isinstance(await second, Unavailable)
        await stage.release(first)
        assert isinstance(await third, Grant)

    perform(scene)


def test_a_cancel_that_crosses_its_grant_gives_the_lease_back() -> None:
    async def scene(stage: Stage) -> None:
        await stage.lease(name="first")
        await stage.scheduler.cancel.remote(RequestId("first"))
        assert (await stage.status()).replicas[0].active == 0

    perform(scene)


def test_a_cancel_that_comes_before_the_cluster_is_known_counts() -> None:
    async def scene(stage: Stage) -> None:
        stage.begin()
        asked = stage.ask(name="early")
        await asyncio.sleep(0.1)
        await stage.scheduler.cancel.remote(RequestId("early"))
        assert isinstance(await asked, Unavailable)
        await stage.settled()
        await asyncio.sleep(10.0)
        assert (await stage.status()).replicas == []

    perform(scene, begins=False)


def test_a_cancel_that_overtakes_its_request_leaves_no_lease() -> None:
    async def scene(stage: Stage) -> None:
        await stage.scheduler.cancel.remote(RequestId("late"))
        assert isinstance(await stage.ask(name="late"), Unavailable)  # nobody would use or renew it
        asked_at = now_s()
        assert isinstance(await stage.ask(), Grant)
        assert now_s() - asked_at < 20.0  # when a lease would have ended

    perform(scene)


def test_asked_again_under_the_same_id_the_second_is_answered() -> None:
    async def scene(stage: Stage) -> None:
        held, first = await stage.lease(), stage.ask(name="twice")
        await asyncio.sleep(1.0)
        second = stage.ask(name="twice")
        assert isinstance(await first, Unavailable)
        await stage.release(held)
        assert isinstance(await second, Grant)

    perform(scene)


def test_what_a_gateway_had_asked_for_is_void_when_another_begins() -> None:
    async def scene(stage: Stage) -> None:
        held, waiting = await stage.lease(), stage.ask()
        await asyncio.sleep(1.0)
        await stage.scheduler.forget_clients.remote()
        assert isinstance(await waiting, Unavailable)
        assert isinstance(await stage.ask(), Grant)
        assert stage.runner(held).cancelled == [held.lease_id]

    perform(scene)


# ---------------------------------------------------------------------- before, after and between


def test_a_request_waits_until_it_is_known_what_there_is() -> None:
    async def scene(stage: Stage) -> None:
        stage.begin()
        assert isinstance(await stage.ask(), Grant)

    perform(scene, begins=False)


def test_a_scheduler_that_starts_again_takes_back_what_serves_and_ends_what_does_not() -> None:
    async def scene(stage: Stage) -> None:
        lease = await stage.lease()
        serving = stage.runner(lease)
        serving.answering = (lease.lease_id,)
        await asyncio.sleep(2 * SPARE_AFTER_S)
        before = stage.ray.runners()
        stage.actor.end()
        stage.begin(again=True)
        await stage.settled()
        waiting = stage.ask()
        await asyncio.sleep(10.0)
        assert not waiting.done()  # the answer under way still holds the slot
        await stage.release(lease)
        granted = await waiting
        assert isinstance(granted, Grant) and granted.endpoint == lease.endpoint
        spares = set(before) - {stage.runner_actor(lease).name}
        assert len(spares) == 1 and not spares & set(stage.ray.runners())
        assert len(stage.ray.runners()) == 2
        assert len(await stage.notices("scheduler_restarted")) == 1

    perform(scene)


def test_an_answer_that_ends_while_a_scheduler_starts_again_holds_no_slot() -> None:
    """Its runner was asked before that, and said that it was answering."""

    async def scene(stage: Stage) -> None:
        lease = await stage.lease()
        stage.runner(lease).answering = (lease.lease_id,)
        stage.actor.end()
        stage.begin(again=True)
        await stage.release(lease)
        await stage.settled()
        waiting = stage.ask()
        await asyncio.sleep(1.0)
        assert waiting.done() and isinstance(await waiting, Grant)

    perform(scene)


def test_a_scheduler_that_starts_again_ends_a_load_under_way() -> None:
    async def scene(stage: Stage) -> None:
        stage.ask()
        while not (loading := [each for each in stage.ray.actors if stage.state(each) == "loading"]):
            await asyncio.sleep(0.1)
        stage.actor.end()
        stage.begin(again=True)
        granted = await stage.lease()
        assert loading[0].dead is not None and stage.runner_actor(granted) is not loading[0]

    perform(scene)


def test_one_that_closes_refuses_who_waits_and_starts_nothing_more() -> None:
    async def scene(stage: Stage) -> None:
        lease = await stage.lease()
        waiting = stage.ask("bee")
        await asyncio.sleep(2 * SPARE_AFTER_S)
        runners = stage.ray.runners()
        await stage.scheduler.close.remote()
        assert isinstance(await waiting, Unavailable)
        await stage.release(lease)
        await asyncio.sleep(100.0)
        assert stage.ray.runners() == runners

    perform(scene)


def test_one_that_closes_during_a_load_starts_no_runner_after_it() -> None:
    async def scene(stage: Stage) -> None:
        asked = stage.ask()
        while not any(stage.state(actor) == "loading" for actor in stage.ray.actors):
            await asyncio.sleep(0.1)
        runners = stage.ray.runners()
        await stage.scheduler.close.remote()
        assert isinstance(await asked, Unavailable)
        await asyncio.sleep(100.0)
        assert stage.ray.runners() == runners

    perform(scene)


def test_one_that_has_closed_lets_the_actors_of_nodes_and_gpus_end() -> None:
    async def scene(stage: Stage) -> None:
        await stage.scheduler.close.remote()
        for actor in stage.ray.living(BOX):
            stage.ray.kill(Handle(stage.ray, actor))
        await asyncio.sleep(100.0)
        assert stage.ray.living(BOX) == []

    perform(scene)


# ---------------------------------------------------------------------- what the core raises


@pytest.mark.parametrize("error", [RuntimeError("nobody expected it"), InvariantBroken("the books do not balance")])
def test_an_error_of_the_core_that_nobody_expected_ends_the_process(error: Exception) -> None:
    async def scene(stage: Stage) -> None:
        handle = SchedulerCore.handle

        def broken(core: SchedulerCore, event: ev.Event, now: float) -> Any:
            if isinstance(event, ev.RequestCancelled):
                raise error
            return handle(core, event, now)

        stage.patch.setattr(SchedulerCore, "handle", broken)
        with pytest.raises(ActorDiedError):
            await stage.scheduler.cancel.remote(RequestId("any"))

    perform(scene, exits=1)


def test_an_error_in_a_tick_ends_the_process() -> None:
    async def scene(stage: Stage) -> None:
        stage.patch.setattr(SchedulerCore, "_tick", lambda core: 1 / 0)
        await asyncio.sleep(1.0)

    perform(scene, exits=1)


def test_an_error_in_the_search_for_nodes_ends_the_process() -> None:
    async def scene(stage: Stage) -> None:
        async def broken(namespace: str) -> None:
            raise RuntimeError("nobody expected it")

        stage.patch.setattr("actors.scheduler.find_survivors", broken)
        stage.begin()
        await asyncio.sleep(1.0)

    perform(scene, begins=False, exits=1)


def test_an_expected_error_is_an_answer() -> None:
    async def scene(stage: Stage) -> None:
        for answer in (
            await stage.ask("unicorn"),
            await stage.scheduler.load.remote(ev.RequestArrived(RequestId("load"), "unicorn", kind="load")),
            await stage.scheduler.plan.remote("unicorn", None),
            await stage.scheduler.pin.remote("unicorn", True),
            await stage.scheduler.unload.remote("unicorn"),
        ):
            assert isinstance(answer, UnknownModel)

    perform(scene)


# ---------------------------------------------------------------------- loading by hand


def test_a_model_is_loaded_pinned_and_unloaded_by_hand() -> None:
    async def scene(stage: Stage) -> None:
        loaded = await stage.scheduler.load.remote(ev.RequestArrived(RequestId("load"), "ant", kind="load"))
        [replica] = (await stage.status()).replicas
        assert (loaded.model, loaded.replica_id, replica.active) == ("ant", replica.replica_id, 0)
        await stage.scheduler.pin.remote("ant", True)
        assert (await stage.status()).replicas[0].pinned
        unloaded = await stage.scheduler.unload.remote("ant")
        assert unloaded.replicas == [replica.replica_id]
        await asyncio.sleep(5.0)
        assert (await stage.status()).replicas == []

    perform(scene)


def test_to_load_what_is_loaded_and_busy_does_not_wait() -> None:
    async def scene(stage: Stage) -> None:
        lease = await stage.lease()
        asked_at = now_s()
        loaded = await stage.scheduler.load.remote(ev.RequestArrived(RequestId("load"), "ant", kind="load"))
        assert (loaded.replica_id, loaded.load_s) == (lease.replica_id, 0.0)
        assert now_s() - asked_at < 1.0

    perform(scene)


# ---------------------------------------------------------------------- notices


def test_notices_are_numbered() -> None:
    async def scene(stage: Stage) -> None:
        last = (await stage.notices())[-1].seq
        await stage.lease()
        [first, *_] = await stage.scheduler.notices.remote(last)
        assert first.seq == last + 1
        told = await stage.notices()
        assert [notice.seq for notice in told] == list(range(1, len(told) + 1))
        assert {"node_joined", "replica_ready"} <= {notice.kind for notice in told}

    perform(scene)


def test_who_has_the_newest_notice_gets_none() -> None:
    async def scene(stage: Stage) -> None:
        last = (await stage.notices())[-1].seq
        assert await stage.scheduler.notices.remote(last) == []
        assert await stage.scheduler.notices.remote(last + 1000)  # of an earlier scheduler: from the beginning

    perform(scene)


def test_the_fate_of_a_replica_is_told_with_its_last_words() -> None:
    async def scene(stage: Stage) -> None:
        lease = await stage.lease()
        asking = asyncio.ensure_future(stage.scheduler.fate.remote(lease.replica_id))
        await asyncio.sleep(0.5)
        stage.ray.kill(Handle(stage.ray, stage.runner_actor(lease)))
        assert "ggml: a fault" in await asking
        assert await stage.scheduler.fate.remote(ReplicaId("another")) == ""

    perform(scene)


# ---------------------------------------------------------------------- replicas and machines that are lost


def test_a_runner_that_dies_is_replaced() -> None:
    async def scene(stage: Stage) -> None:
        first = await stage.lease()
        stage.ray.kill(Handle(stage.ray, stage.runner_actor(first)))
        assert (await stage.lease()).endpoint != first.endpoint

    perform(scene)


def test_a_replica_that_failed_a_request_and_serves_after_all_is_kept() -> None:
    async def scene(stage: Stage) -> None:
        first = await stage.lease()
        await stage.release(first, failed=True)
        assert (await stage.lease()).endpoint == first.endpoint
        assert "runner.describe answers" in stage.ray.steps

    perform(scene)


def test_one_that_failed_a_request_and_does_not_answer_is_replaced() -> None:
    async def scene(stage: Stage) -> None:
        first = await stage.lease()
        stage.runner_actor(first).stands_still = True
        await stage.release(first, failed=True)
        assert (await stage.lease()).endpoint != first.endpoint

    perform(scene)


def test_what_a_lost_machine_held_is_loaded_on_another() -> None:
    async def scene(stage: Stage) -> None:
        first = await stage.lease()
        stage.ray.add(machine(BARN, "ant"))
        await asyncio.sleep(10.0)
        stage.ray.steps.clear()
        stage.ray.lose(BOX)
        second = await stage.lease()
        assert stage.ray.steps.count("runner is killed") == 2  # it may only be cut off; its spare too
        assert second.endpoint != first.endpoint
        assert [node.node_id for node in (await stage.status()).nodes] == [BARN]
        assert stage.runner(second).body in stage.ray.machines[BARN].processes.values()

    perform(scene)


def test_a_header_is_read_though_the_actor_of_its_node_stands_still() -> None:
    """Nothing in `Effects` ends that wait: the watch of the nodes has to."""

    async def scene(stage: Stage) -> None:
        def stop_at_the_header(step: str, actor: Actor | None) -> Outcome:
            if step == "node.read_shape is asked" and actor is not None and not struck:
                struck.append(step)
                actor.stands_still = True
            return None

        struck: list[str] = []
        stage.ray.on_step = stop_at_the_header
        stage.begin()
        assert isinstance(await stage.ask(), Grant)
        assert len(await stage.notices("node_silent")) == 1
        assert stage.ray.steps.count("node.read_shape answers") == 2  # one for each file

    perform(scene, begins=False)


def test_a_node_or_gpu_actor_that_ends_for_good_is_started_again() -> None:
    async def scene(stage: Stage) -> None:
        for name in [actor.name for actor in stage.ray.living(BOX) if actor.kind in ("node", "gpu")]:
            stage.ray.kill(stage.ray.get_actor(name, "arriero"))
        await asyncio.sleep(10.0)
        assert sorted(actor.kind for actor in stage.ray.living(BOX)) == ["gpu", "node", "runner"]
        assert isinstance(await stage.ask(), Grant)

    perform(scene)


def test_a_machine_that_cannot_join_is_told_of_once_and_tried_again() -> None:
    async def scene(stage: Stage) -> None:
        def refuse(step: str, actor: Actor | None) -> Outcome:
            return RaySystemError("no room for it") if step == "node is created" else None

        stage.ray.on_step = refuse
        stage.begin()
        assert "no room for it" in await stage.scheduler.await_ready.remote(20.0)
        assert len(await stage.notices("node_failed")) == 1
        stage.ray.on_step = lambda step, actor: None
        await stage.settled()

    perform(scene, begins=False)


def test_cards_whose_ray_gpus_others_hold_are_used_without_a_claim() -> None:
    """An actor that claims what others hold never starts, and its first reading never comes."""

    async def scene(stage: Stage) -> None:
        card = replace(stage.ray.machines[BOX].devices[0], kind="cuda")
        stage.ray.machines[BOX].devices = (card,)
        created: list[Actor] = []

        def never_starts(step: str, actor: Actor | None) -> Outcome:
            if step == "gpu is created" and actor is not None:
                created.append(actor)
                actor.stands_still = len(created) == 1
            return None

        stage.ray.on_step = never_starts
        stage.begin()
        await stage.settled()
        assert len(created) == 2 and created[0].dead is not None and created[1].dead is None

    perform(scene, begins=False)
