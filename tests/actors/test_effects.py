"""Every command ends in exactly one event, or with its node, wherever and however its actors fail.

Each command is played once undisturbed, which gives the steps of all actors it needs; then again with a fault at each
of them, and with many faults by chance. At the end every process is ended, so that whatever still waits is seen.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fake_machines import FakeRunner, Machine
from fake_ray import Actor, FakeRay, Handle, Outcome, raised
from ray.exceptions import ActorUnavailableError, RaySystemError
from virtual_time import play

from actors.devices.watchdog import STOOD_STILL
from actors.effects import SPARE_AFTER_S, Effects, Order
from actors.serving.protocol import LoadDevice, LoadFailure, LoadSpec
from actors.spares import RunnerHandle
from arriero.example_models import Dimensions, write_example_model
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.facts import DeviceFacts
from scheduler.cluster.inventory import Inventory
from scheduler.cluster.replica import Placement
from scheduler.config import parse_catalogue
from scheduler.costs.params import ContextParams, Layout
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.errors import InvalidGGUF
from scheduler.units import GIB, DeviceId, LeaseId, NodeId, ReplicaId

BOX = NodeId("b0" * 28)
GPU = DeviceId("card")
DEVICE = DeviceFacts(GPU, BOX, "gpu0", "test card", "rpc", 8 * GIB)
REPLICA = ReplicaId("r1")
POLICY = parse_catalogue({"policy": {"load_timeout_s": 60.0, "release_timeout_s": 5.0}}).policy
PLACEMENT = Placement(
    tier="one GPU",
    node_id=BOX,
    device_ids=(GPU,),
    layout=Layout(n_gpu_layers=5, tensor_split=(5.0,)),
    context=ContextParams(),
    device_bytes=(2 * GIB,),
    overhead_bytes=(0,),
    host_bytes=GIB,
    host_mapped_bytes=0,
    host_outside_bytes=0,
    host_resting_bytes=0,
    computes_on_cpu=False,
    n_layers=5,
)
SPEC = LoadSpec(
    "ant", "/m/ant.gguf", (LoadDevice(GPU, "rpc", 2 * GIB),), 5, (5.0,), "", ContextParams(), 4, GIB,
    placement=PLACEMENT,
)  # fmt: skip

NOTICED_S = 20.0  # until Ray has noticed that a machine is gone
WATCHDOG_S = 40.0  # until an actor of a node or a GPU that stands still is ended, and started again
REST_S = 400.0  # in which every command has to end

START = cmd.StartReplica(REPLICA, "ant", "/m/ant.gguf", PLACEMENT, 4, True, False)
STOP = cmd.StopReplica(REPLICA, BOX, "evicted")
STOP_AND_SAVE = cmd.StopReplica(REPLICA, BOX, "evicted", saves=True)
CHECK = cmd.CheckReplica(REPLICA)
SHAPE = cmd.ReadShape(BOX, "/m/ant.gguf")
AHEAD = cmd.ReadAhead(BOX, "/m/ant.gguf")


@cache
def shape() -> ModelShape:
    with tempfile.TemporaryDirectory() as folder:
        path = write_example_model(Path(folder) / "ant.gguf", "ant", Dimensions(4, 1024, 8, 4, 4096, 16000))
        return read_shape(path)


def ends(command: Order) -> tuple[type, ...]:
    """The events that the command may end in; see `scheduler.commands`."""
    match command:
        case cmd.StartReplica():
            return ev.ReplicaReady, ev.ReplicaFailed
        case cmd.StopReplica():
            return (ev.ReplicaGone,)
        case cmd.CheckReplica():
            return ev.ReplicaVouched, ev.ReplicaDied
        case cmd.ReadShape():
            return (ev.ShapeRead,)
        case cmd.ReadAhead():
            return (ev.ReadAheadEnded,)
        case cmd.CancelAnswer() | cmd.StopReadAhead():
            return ()


Strike = Callable[[int, Actor | None], Outcome]


class Stage:
    """Effects before fake actors of one machine with one card."""

    def __init__(self) -> None:
        self.ray = FakeRay()
        self.machine = Machine(BOX, (DEVICE,), {"/m/ant.gguf": shape()}, last_words="ggml: a fault")
        self.ray.add(self.machine)
        self.inventory = Inventory()
        self.inventory.join(self.machine.facts, 0.0)
        self.ordered: list[Order] = []
        self.posted: list[ev.Event] = []
        self.told: list[ev.Event] = []  # what was posted before all was ended,
        self.steps: list[str] = []  # and the steps that led there
        self.runners_left: list[str] = []
        self.wrong: list[str] = []
        self.strike: Strike = lambda step, actor: None
        self.effects = Effects(self.inventory, POLICY, "arriero", self._post)
        self.ray.add_node(BOX)
        self.ray.add_gpu(DEVICE)

    @property
    def there(self) -> bool:
        return BOX in self.inventory.nodes

    @property
    def is_stopped(self) -> bool:
        return any(isinstance(command, cmd.StopReplica) for command in self.ordered)

    def carry_out(self, command: Order) -> None:
        """From the first command on, steps are counted and may be struck."""
        if not self.ordered:
            self.ray.steps.clear()
            self.ray.on_step = lambda step, actor: self.strike(len(self.ray.steps) - 1, actor)
        self.ordered.append(command)
        self.effects.carry_out(pickle.loads(pickle.dumps(command)))

    def _post(self, event: ev.Event) -> None:
        self.posted.append(pickle.loads(pickle.dumps(event)))
        holders = [body for body in self.machine.processes.values() if body.holds]
        if isinstance(event, ev.ReplicaGone) and self.there and holders:
            self.wrong.append("memory is said to be free that a process holds")
        if isinstance(event, ev.ReplicaDied) and CHECK not in self.ordered and not self.there:
            self.wrong.append("it is told of what was lost with its node")

    # ------------------------------------------------------------------ what scenes and faults do

    def adopt(self) -> Actor:
        """A runner that is ready."""
        actor = self.ray.add_runner("runner-old", BOX)._actor
        actor.start()
        actor.inside.hold(REPLICA, SPEC)
        said = actor.inside.introduce()
        handle = Handle(self.ray, actor)
        self.effects.adopt(REPLICA, RunnerHandle(actor.name, handle, BOX, (GPU,), said.process, said.endpoint))
        return actor

    def stop(self) -> None:
        if not self.is_stopped and self.there:
            self.carry_out(STOP)

    def lose_node(self) -> None:
        """See `SchedulerActor._node_left`."""
        if self.there:
            self.effects.forget_node(BOX)
            self.inventory.leave(BOX)
            self.ray.lose(BOX)

    def later(self, seconds: float, what: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_later(seconds, what)

    def recreate(self, actor: Actor) -> None:
        """See `NodeWatch`: an actor that has ended for good is started again."""
        if self.there:
            _ = self.ray.add_node(BOX) if actor.kind == "node" else self.ray.add_gpu(DEVICE)

    # ------------------------------------------------------------------ the end

    def count(self, *kinds: type) -> int:
        return sum(isinstance(event, kinds) for event in self.posted)

    async def end(self) -> None:
        """Every command must have ended by now; then every runner's process ends, and the others answer again."""
        for command in self.ordered:
            ended = self.count(*ends(command))
            if ended > 1 or ended == 0 and ends(command) and self.there:
                self.wrong.append(f"{type(command).__name__} ended in {ended} events")
        if self.count(ev.ReplicaStarted) > 1:
            self.wrong.append("its process was said to have started twice")
        shapes = [event for event in self.posted if isinstance(event, ev.ShapeRead)]
        if self.there and any(event.shape is None and not event.invalid for event in shapes):
            self.wrong.append("a header that can be read was not read")
        self.runners_left = self.ray.runners()
        if len(self.runners_left) > 1 + (REPLICA in self.effects._runners):  # a spare
            self.wrong.append(f"runners are left that nobody knows: {self.runners_left}")
        before = self.count(ev.ReplicaDied)
        self.told, self.steps = list(self.posted), list(self.ray.steps)
        self.ray.on_step = lambda step, actor: None
        for actor in list(self.ray.actors):
            if actor.kind == "runner" or actor.stands_still:
                actor.end()
            actor.notice()
        for body in self.machine.processes.values():
            body.end()
        await asyncio.sleep(60.0)
        watched = self.count(ev.ReplicaReady) and not self.is_stopped and self.there
        if watched and self.count(ev.ReplicaDied) != 1 or self.count(ev.ReplicaDied) > before + 1:
            self.wrong.append(f"its end was told {self.count(ev.ReplicaDied)} times")
        left = [name for task in asyncio.all_tasks() if (name := task.get_coro().__qualname__).startswith("Effects.")]
        if left:
            self.wrong.append(f"still under way: {left}")


# ---------------------------------------------------------------------- scenes

Scene = Callable[[Stage], None]


def start_with_a_spare(stage: Stage) -> None:
    stage.effects.node_joined(BOX)
    stage.later(5.0, lambda: stage.carry_out(START))


def start_with_a_spare_that_is_starting(stage: Stage) -> None:
    stage.effects.node_joined(BOX)
    stage.carry_out(START)


def start_without_a_spare(stage: Stage) -> None:
    stage.carry_out(START)


def start_that_fails(stage: Stage) -> None:
    stage.machine.failure = LoadFailure("out_of_memory", "there was not enough")
    stage.carry_out(START)


def start_and_stop(stage: Stage) -> None:
    stage.carry_out(START)
    stage.carry_out(STOP)


def start_and_stop_while_it_loads(stage: Stage) -> None:
    stage.carry_out(START)
    stage.later(1.5, stage.stop)


def stop(stage: Stage) -> None:
    stage.adopt()
    stage.carry_out(STOP)


def stop_what_saves_before(stage: Stage) -> None:
    stage.adopt()
    stage.carry_out(STOP_AND_SAVE)


def stop_what_only_sigkill_ends(stage: Stage) -> None:
    stage.adopt().inside.body.obeys = False
    stage.carry_out(STOP)


def stop_what_nothing_ends_for_long(stage: Stage) -> None:
    body = stage.adopt().inside.body
    body.obeys = body.mortal = False
    stage.carry_out(STOP)
    stage.later(100.0, body.end)


def check(stage: Stage) -> None:
    stage.adopt().unnoticed = ("watch",)  # so that all that is told comes of the check
    stage.later(1.0, lambda: stage.carry_out(CHECK))


def check_of_one_that_is_broken(stage: Stage) -> None:
    actor = stage.adopt()
    actor.unnoticed = ("watch",)
    actor.inside.state, actor.inside.reason = "broken", "its device is gone"
    stage.later(1.0, lambda: stage.carry_out(CHECK))


def read_a_header(stage: Stage) -> None:
    stage.carry_out(SHAPE)


def read_what_is_no_header(stage: Stage) -> None:
    stage.machine.headers["/m/ant.gguf"] = InvalidGGUF("it is no GGUF")
    stage.carry_out(SHAPE)


def read_ahead(stage: Stage) -> None:
    stage.carry_out(AHEAD)


def small_things(stage: Stage) -> None:
    stage.adopt()
    for command in (
        cmd.CancelAnswer(REPLICA, LeaseId("l1")),
        cmd.StopReadAhead(BOX, "/m/ant.gguf"),
    ):
        stage.carry_out(command)


LOADED = (ev.ReplicaStarted, ev.ReplicaReady)
READ_AGAIN = (ev.DeviceSampled, ev.NodeSampled)

# What is to be posted without a fault, progress aside.
SCENES: dict[Scene, tuple[type, ...]] = {
    start_with_a_spare: LOADED,
    start_with_a_spare_that_is_starting: LOADED,
    start_without_a_spare: LOADED,
    start_that_fails: (ev.ReplicaStarted, *READ_AGAIN, ev.ReplicaFailed),
    start_and_stop: (*READ_AGAIN, ev.ReplicaGone, ev.ReplicaFailed),
    start_and_stop_while_it_loads: (ev.ReplicaStarted, ev.ReplicaFailed, *READ_AGAIN, ev.ReplicaGone),
    stop: (*READ_AGAIN, ev.ReplicaGone),
    stop_what_saves_before: (*READ_AGAIN, ev.ReplicaGone),
    stop_what_only_sigkill_ends: (*READ_AGAIN, ev.ReplicaGone),
    stop_what_nothing_ends_for_long: (*READ_AGAIN, ev.ReplicaGone),
    check: (ev.ReplicaVouched,),
    check_of_one_that_is_broken: (ev.ReplicaDied,),
    read_a_header: (ev.ShapeRead,),
    read_what_is_no_header: (ev.ShapeRead,),
    read_ahead: (ev.ReadAheadEnded,),
    small_things: (),
}

# ---------------------------------------------------------------------- faults

Fault = Callable[[Stage, Any], Outcome]


def its_process_ends(stage: Stage, actor: Actor | None) -> None:
    if actor is not None:
        actor.end()


def it_ends_for_good(stage: Stage, actor: Actor | None) -> None:
    if actor is not None:
        actor.end(for_good=True)
        if actor.restarts:
            stage.later(4.0, lambda: stage.recreate(actor))


def its_process_is_not_seen_to_end(stage: Stage, actor: Actor | None) -> None:
    """Ray says that it has ended, and it has not."""
    if actor is not None and isinstance(actor.inside, FakeRunner):
        actor.inside.body.obeys = False
        actor.end()


def it_stands_still(stage: Stage, actor: Actor | None) -> None:
    """See `NodeWatch` and the nodes' watchdog: an actor of a node or a GPU is ended before long."""
    if actor is not None:
        actor.stands_still = True
        if actor.restarts:
            stage.later(WATCHDOG_S, lambda: actor.end() if actor.stands_still else None)


def it_is_unavailable(stage: Stage, actor: Actor | None) -> Outcome:
    return ActorUnavailableError("no way leads there", None)


def it_raises(stage: Stage, actor: Actor | None) -> Outcome:
    return raised(OSError("too many open files"))


def ray_does_not_answer(stage: Stage, actor: Actor | None) -> Outcome:
    return RaySystemError("the head is away")


def it_is_late(stage: Stage, actor: Actor | None) -> Outcome:
    return 12.0


def it_is_very_late(stage: Stage, actor: Actor | None) -> Outcome:
    return 70.0


def its_node_is_lost(stage: Stage, actor: Actor | None) -> None:
    stage.lose_node()


def its_node_is_unplugged(stage: Stage, actor: Actor | None) -> None:
    """Nobody answers there any more; Ray notices after a while."""
    for each in stage.ray.living(BOX):
        each.stands_still = True
    stage.later(NOTICED_S, stage.lose_node)


def its_node_is_unplugged_and_the_runner_missed_first(stage: Stage, actor: Actor | None) -> None:
    for each in stage.ray.living(BOX):
        if each.kind == "runner":
            each.end()
        else:
            each.stands_still = True
    stage.later(NOTICED_S, stage.lose_node)


def it_is_stopped(stage: Stage, actor: Actor | None) -> None:
    stage.stop()


UNPLUGGED = (its_node_is_unplugged, its_node_is_unplugged_and_the_runner_missed_first)
FAULTS: tuple[Fault, ...] = (
    its_process_ends,
    it_ends_for_good,
    its_process_is_not_seen_to_end,
    it_stands_still,
    it_is_unavailable,
    it_raises,
    ray_does_not_answer,
    it_is_late,
    it_is_very_late,
    its_node_is_lost,
    *UNPLUGGED,
    it_is_stopped,
)


class Complaints(logging.Handler):
    """Effects that ended in an exception of their own, which is never to be."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.heard.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


def perform(scene: Scene, strike: Callable[[Stage, int, Actor | None], Outcome]) -> Stage:
    """Play the scene; `strike` is asked at each of its steps for the harm that is done there."""

    async def played() -> Stage:
        stage = Stage()
        stage.ray.stand_in(patch)
        await asyncio.sleep(5.0)
        stage.strike = lambda step, actor: strike(stage, step, actor)
        scene(stage)
        await asyncio.sleep(REST_S)
        stage.wrong += complaints.heard
        await stage.end()
        return stage

    complaints, log = Complaints(), logging.getLogger("actors.effects")
    log.addHandler(complaints)
    try:
        with pytest.MonkeyPatch.context() as patch:
            return play(played())
    finally:
        log.removeHandler(complaints)


def undisturbed(scene: Scene) -> Stage:
    return perform(scene, lambda stage, step, actor: None)


@pytest.mark.parametrize("scene", SCENES)
def test_without_a_fault_this_is_told_and_nothing_else(scene: Scene) -> None:
    stage = undisturbed(scene)
    assert stage.wrong == []
    told = [type(event) for event in stage.told if not isinstance(event, ev.ReplicaProgressed)]
    assert tuple(told) == SCENES[scene]


LONG = (stop_what_nothing_ends_for_long,)  # a second for each fault
SOME_LONG = [pytest.param(scene, marks=pytest.mark.slow if scene in LONG else ()) for scene in SCENES]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scene", SOME_LONG)
def test_whatever_fails_at_whichever_step(scene: Scene, fault: Fault) -> None:
    wrong = []
    for at, what in enumerate(undisturbed(scene).steps):
        stage = perform(scene, lambda stage, step, actor: fault(stage, actor) if step == at else None)  # noqa: B023
        crashes = [e for e in stage.posted if isinstance(e, ev.ReplicaFailed) and e.kind == "crashed"]
        if fault in UNPLUGGED and crashes and not stage.is_stopped:
            stage.wrong.append("the model is blamed for what its machine did")
        wrong += [f"step {at}, {what}: {complaint}" for complaint in stage.wrong]
    assert wrong == []


@pytest.mark.parametrize("scene", SCENES)
def test_whatever_fails_together(scene: Scene) -> None:
    wrong = []
    for seed in range(40):
        chance = random.Random(f"{scene.__name__}/{seed}")
        stage = perform(
            scene,
            lambda stage, step, actor: chance.choice(FAULTS)(stage, actor) if chance.random() < 0.2 else None,  # noqa: B023
        )
        wrong += [f"seed {seed}: {complaint}" for complaint in stage.wrong]
    assert wrong == []


@pytest.mark.parametrize("fault", [its_process_ends, it_ends_for_good, it_is_unavailable, it_raises])
def test_on_a_machine_where_no_runner_can_live_a_load_fails_once(fault: Fault) -> None:
    def strike(stage: Stage, step: int, actor: Actor | None) -> Outcome:
        return fault(stage, actor) if stage.ray.steps[step].startswith("runner.") else None

    stage = perform(start_with_a_spare, strike)
    assert stage.wrong == []
    assert [event.kind for event in stage.told if isinstance(event, ev.ReplicaFailed)] == ["crashed"]


@pytest.mark.parametrize(("words", "by_itself"), [("ggml: a fault", True), ("", False), (f"it {STOOD_STILL}", False)])
def test_a_death_is_told_with_the_last_words_of_its_process(words: str, by_itself: bool) -> None:
    def dies(stage: Stage) -> None:
        stage.machine.last_words = words
        stage.later(1.0, stage.adopt().end)

    [died] = undisturbed(dies).told
    assert isinstance(died, ev.ReplicaDied)
    assert words in died.reason and died.by_itself is by_itself


def test_a_load_that_takes_too_long_has_failed() -> None:
    def late(stage: Stage, step: int, actor: Actor | None) -> Outcome:
        return 70.0 if stage.ray.steps[step] == "runner.load answers" else None

    [failed] = [event for event in perform(start_without_a_spare, late).told if isinstance(event, ev.ReplicaFailed)]
    assert failed.kind == "failed" and "60 s" in failed.message


def test_what_the_catalogue_says_of_a_model_reaches_its_runner() -> None:
    order = replace(START, chat_template="{{ messages }}", mmproj="/m/eyes.gguf", matryoshka_dimensions=(64, 32))

    specs = []

    def look(stage: Stage, step: int, actor: Actor | None) -> Outcome:
        if stage.ray.steps[step] == "runner.load answers" and actor is not None:
            specs.append(actor.inside.describe().spec)
        return None

    perform(lambda stage: stage.carry_out(order), look)
    (spec,) = specs
    assert (spec.chat_template, spec.mmproj, spec.matryoshka_dimensions) == (
        order.chat_template, order.mmproj, order.matryoshka_dimensions,
    )  # fmt: skip


def test_conversations_are_saved_before_the_end_and_only_where_that_is_asked() -> None:
    in_order = ["runner.park answers", "runner is killed"]
    assert [step for step in undisturbed(stop_what_saves_before).steps if step in in_order] == in_order
    assert not any("park" in step for step in undisturbed(stop).steps)


def test_a_runner_that_does_not_save_in_time_is_stopped_all_the_same() -> None:
    def late(stage: Stage, step: int, actor: Actor | None) -> Outcome:
        return 60.0 if stage.ray.steps[step] == "runner.park answers" else None

    stage = perform(stop_what_saves_before, late)
    assert stage.wrong == []
    assert stage.count(ev.ReplicaGone) == 1


@pytest.mark.parametrize("scene", [start_with_a_spare, start_without_a_spare, start_that_fails])
def test_once_closed_no_command_ends_and_no_runner_is_started(scene: Scene) -> None:
    for at, what in enumerate(undisturbed(scene).steps):
        ended, runners = 0, [""]

        def close(stage: Stage, step: int, actor: Actor | None, at: int = at) -> None:
            nonlocal ended, runners
            if step == at:
                stage.effects.close()
                ended, runners = stage.count(*ends(START)), stage.ray.runners()

        stage = perform(scene, close)
        assert stage.count(*ends(START)) == ended, what
        assert set(stage.runners_left) <= set(runners), what


def test_a_node_has_one_spare_however_often_it_is_asked_for() -> None:
    def again(stage: Stage) -> None:
        for _ in range(3):
            stage.effects.node_joined(BOX)

    assert len(undisturbed(again).runners_left) == 1


def test_the_next_spare_leaves_the_cores_to_the_first_answer() -> None:
    counted: list[tuple[bool, int]] = []  # whether it is loaded, and runners

    def load(stage: Stage) -> None:
        stage.carry_out(START)

        def look() -> None:
            ready = any(isinstance(event, ev.ReplicaReady) for event in stage.posted)
            counted.append((ready, len(stage.ray.runners())))

        for moment in range(60):
            stage.later(0.1 * moment, look)

    undisturbed(load)
    runners = [count for ready, count in counted if ready]
    assert runners[: round(SPARE_AFTER_S / 0.1) - 1] == [1] * (round(SPARE_AFTER_S / 0.1) - 1)
    assert runners[-1] == 2


def test_a_lost_node_s_spare_is_not_taken_for_another_load() -> None:
    def lost(stage: Stage) -> None:
        stage.effects.node_joined(BOX)
        stage.later(5.0, stage.lose_node)

    assert undisturbed(lost).runners_left == []
