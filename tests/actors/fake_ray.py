"""Ray on a table: one event loop, machines that are records, and actors that fail at any step a test names.

`FakeRay` stands where modules have `import ray`. Its actors are reached through handles as in Ray: a call is checked
against the real actor's signature, its arguments and its answer are pickled, and what comes back is awaited. A call has
two steps, "is asked" and "answers"; so has whatever else Ray does one ("is created", "is killed", "is looked up").
`on_step` is told of each and may do harm there: end or stop processes, take machines away, or return what the call is
to fail with (an exception) or how many seconds it is to be late.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import pickle
from collections.abc import Awaitable, Callable, Generator
from types import SimpleNamespace
from typing import Any, Literal
from weakref import WeakValueDictionary

from fake_machines import FakeGpu, FakeNode, FakeRunner, Machine
from ray.exceptions import ActorDiedError, ActorUnavailableError, ActorUnschedulableError, RayTaskError

from actors.devices.gpu import GpuActor
from actors.devices.node import NodeActor
from actors.names import gpu_name, node_name
from actors.serving.runner import RunnerActor
from scheduler.cluster.facts import DeviceFacts
from scheduler.units import NodeId

HOP_S = 0.001  # a message's way
START_S = 1.0  # an actor's process
RESTART_S = 3.0  # until Ray has started one again
KILL_S = 0.02  # from ray.kill to the end of the process
REPORT_S = 1.0

Outcome = Exception | float | None

Kind = Literal["runner", "node", "gpu", "scheduler"]


class Ref:
    """What a call returns at once. Whoever awaits it may give up, and the call goes on."""

    def __init__(self, answer: asyncio.Future[Any]) -> None:
        self._answer = answer

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.shield(self._answer).__await__()


class Actor:
    """One actor as Ray keeps it: its process comes and goes, the actor stays until it has ended for good."""

    def __init__(self, kind: Kind, name: str, node_id: NodeId, real: type, restarts: bool, make: Callable[[], Any]):
        self.kind, self.name, self.node_id, self.real, self.restarts = kind, name, node_id, real, restarts
        self.make = make
        self.inside: Any = None  # its process; None where there is none
        self.dead: Exception | None = None  # for good, and what its calls fail with
        self.stands_still = False
        self.unnoticed: tuple[str, ...] = ()  # calls that do not fail when the process ends
        self._started = asyncio.Event()
        self._open: dict[asyncio.Future[Any], tuple[str, asyncio.Task[None]]] = {}
        asyncio.get_running_loop().call_later(START_S, self.start)

    def start(self) -> None:
        if self.dead is None and self.inside is None:
            self.inside = self.make()
            if isinstance(self.inside, FakeRunner):
                self.inside.body.on_end = self.end
            self._started.set()

    async def started(self) -> None:
        await self._started.wait()

    def begun(self, answer: asyncio.Future[Any], method: str, task: asyncio.Task[None]) -> None:
        self._open[answer] = method, task
        answer.add_done_callback(lambda done: self._open.pop(done, None))

    def end(self, *, for_good: bool = False) -> None:
        """Its process ends. Ray starts another one, unless it may not."""
        if self.dead is not None:
            return
        inside, self.inside = self.inside, None
        if isinstance(inside, FakeRunner) and inside.body.obeys:
            inside.body.end()
        self.stands_still = False
        if for_good or not self.restarts:
            self.dead = ActorDiedError()
            self._started.set()
        else:
            asyncio.get_running_loop().call_later(RESTART_S, self.start)
        self._fail_open(self.dead or ActorUnavailableError("its process has ended", None))

    def notice(self) -> None:
        """What was unnoticed so far is seen."""
        self.unnoticed = ()
        if self.dead is not None:
            self._fail_open(self.dead)

    def _fail_open(self, error: Exception) -> None:
        for answer, (method, task) in list(self._open.items()):
            task.cancel()
            if method not in self.unnoticed:
                fail(answer, error)

    @property
    def trouble(self) -> Exception | None:
        """What a call fails with now."""
        if self.dead is not None:
            return self.dead
        return ActorUnavailableError("it is being restarted", None) if self.inside is None else None


def fail(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # nobody need await it


_handles: WeakValueDictionary[int, Handle] = WeakValueDictionary()
_serial = itertools.count()


class Handle:
    """`handle.method.remote(...)`; survives pickling, as handles do."""

    def __init__(self, ray: FakeRay, actor: Actor) -> None:
        self._ray, self._actor = ray, actor
        self._number = next(_serial)
        _handles[self._number] = self

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        signature = inspect.signature(getattr(self._actor.real, method))

        def call(*arguments: Any) -> Ref:
            signature.bind(None, *arguments)
            return self._ray.call(self._actor, method, arguments)

        return SimpleNamespace(remote=call)

    def __reduce__(self) -> Any:
        return _handles.__getitem__, (self._number,)


def plain(actor_class: Any) -> type:
    """The class under `@ray.remote`."""
    found: type = actor_class.__ray_metadata__.modified_class
    return found


class ActorClass:
    """Stands where `RunnerActor`, `NodeActor` or `GpuActor` does."""

    def __init__(self, create: Callable[..., Handle]) -> None:
        self._create = create

    def options(self, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *arguments: self._create(options, *arguments))


class FakeRay:
    """One cluster. Patch it into modules with `stand_in`."""

    def __init__(self) -> None:
        self.machines: dict[NodeId, Machine] = {}
        self.actors: list[Actor] = []
        self.steps: list[str] = []
        self.on_step: Callable[[str, Actor | None], Outcome] = lambda step, actor: None
        self.restarted = False  # whether the scheduler is one that Ray has started again
        self.util = SimpleNamespace(list_named_actors=self._list_named_actors, get_node_ip_address=lambda: "127.0.0.1")
        self._serving: set[asyncio.Task[None]] = set()
        self._scheduler: Handle | None = None

    def stand_in(self, monkeypatch: Any) -> None:
        for module in ("questions", "spares", "nodes", "survivors", "scheduler"):
            monkeypatch.setattr(f"actors.{module}.ray", self)
        classes: dict[str, Callable[..., Handle]] = {
            "spares.RunnerActor": lambda options: self.add_runner(*_named_where(options)),
            "nodes.NodeActor": lambda options, node_id, settings, scheduler: self.add_node(node_id, scheduler),
            "nodes.GpuActor": lambda options, facts, scheduler: self.add_gpu(facts, scheduler),
        }
        for name, create in classes.items():
            monkeypatch.setattr(f"actors.{name}", ActorClass(create))

    def step(self, step: str, actor: Actor | None = None) -> Outcome:
        self.steps.append(step)
        return self.on_step(step, actor)

    # ------------------------------------------------------------------ machines

    def add(self, machine: Machine) -> None:
        self.machines[machine.node_id] = machine

    def lose(self, node_id: NodeId) -> None:
        """The machine is gone, and Ray has noticed."""
        machine = self.machines.pop(node_id, None)
        if machine is not None:
            for actor in self.living(node_id):
                actor.end(for_good=True)
            for body in machine.processes.values():
                body.end()

    def living(self, node_id: NodeId) -> list[Actor]:
        return [actor for actor in self.actors if actor.node_id == node_id and actor.dead is None]

    def runners(self) -> list[str]:
        """The names of those that live."""
        return [actor.name for actor in self.actors if actor.kind == "runner" and actor.dead is None]

    # ------------------------------------------------------------------ what `ray` has

    def get_actor(self, name: str, namespace: str) -> Handle:
        outcome = self.step(f"{name.split('-', maxsplit=1)[0]} is looked up")
        if isinstance(outcome, Exception):
            raise outcome
        actor = self._named(name)
        if actor is None:
            raise ValueError(f"Failed to look up actor with name '{name}'")
        return Handle(self, actor)

    def kill(self, handle: Handle, *, no_restart: bool = True) -> None:
        """What it raises says nothing of whether Ray has heard."""
        actor = handle._actor
        outcome = self.step(f"{actor.kind} is killed", actor)
        asyncio.get_running_loop().call_later(KILL_S, lambda: actor.end(for_good=no_restart))
        if isinstance(outcome, Exception):
            raise outcome

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node_id, "Alive": True, "Labels": {}} for node_id in self.machines]

    def _list_named_actors(self, all_namespaces: bool) -> list[dict[str, str]]:
        return [{"name": actor.name, "namespace": "arriero"} for actor in self.actors if actor.dead is None]

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(
            get_node_id=lambda: "head",
            current_actor=self._scheduler,
            was_current_actor_reconstructed=self.restarted,
        )

    def _named(self, name: str) -> Actor | None:
        return next((actor for actor in self.actors if actor.name == name and actor.dead is None), None)

    # ------------------------------------------------------------------ actors

    def add_runner(self, name: str, node_id: NodeId) -> Handle:
        machine = self.machines.get(node_id)
        return self._create("runner", name, node_id, plain(RunnerActor), False, lambda: FakeRunner(machine))

    def add_node(self, node_id: NodeId, scheduler: Any = None) -> Handle:
        """The node's actor; the one that is there when there is one."""
        machine, name = self.machines.get(node_id), node_name(node_id)
        make = lambda: FakeNode(machine, scheduler)  # noqa: E731
        return self._create("node", name, node_id, plain(NodeActor), True, make, reports=scheduler is not None)

    def add_gpu(self, facts: DeviceFacts, scheduler: Any = None) -> Handle:
        """Likewise."""
        machine, name = self.machines.get(facts.node_id), gpu_name(facts.device_id)
        make = lambda: FakeGpu(machine, facts, scheduler)  # noqa: E731
        return self._create("gpu", name, facts.node_id, plain(GpuActor), True, make, reports=scheduler is not None)

    def _create(
        self, kind: Kind, name: str, node_id: NodeId, real: type, restarts: bool, make: Any, *, reports: bool = False
    ) -> Handle:
        if (present := self._named(name)) is not None:
            if kind == "runner":
                raise ValueError(f"the name {name} is taken")
            return Handle(self, present)
        actor = Actor(kind, name, node_id, real, restarts, make)
        self.actors.append(actor)
        if node_id not in self.machines:
            actor.dead = ActorUnschedulableError("its node is not there")
        outcome = self.step(f"{kind} is created", actor)
        if isinstance(outcome, Exception):
            actor.end(for_good=True)
            raise outcome
        if reports:
            self._keep(self._report(actor))
        return Handle(self, actor)

    def host(self, real: type, make: Callable[[], Any]) -> Handle:
        """The scheduler actor: `make` constructs the real one."""
        actor = Actor("scheduler", "scheduler", NodeId("head"), real, False, make)
        self.actors.append(actor)
        self._scheduler = Handle(self, actor)
        actor.start()
        return self._scheduler

    async def _report(self, actor: Actor) -> None:
        """What the threads of nodes' and GPUs' actors do."""
        while actor.dead is None:
            await asyncio.sleep(REPORT_S)
            if actor.inside is not None and not actor.stands_still:
                actor.inside.report()

    def _keep(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return task

    # ------------------------------------------------------------------ calls

    def call(self, actor: Actor, method: str, arguments: tuple[Any, ...]) -> Ref:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        actor.begun(answer, method, self._keep(self._serve(actor, method, pickle.dumps(arguments), answer)))
        return Ref(answer)

    async def _serve(self, actor: Actor, method: str, arguments: bytes, answer: asyncio.Future[Any]) -> None:
        await asyncio.sleep(HOP_S)
        if not await self._passes(f"{actor.kind}.{method} is asked", actor, answer):
            return
        try:
            result = getattr(actor.inside, method)(*pickle.loads(arguments))
            result = pickle.loads(pickle.dumps(await result if isinstance(result, Awaitable) else result))
        except Exception as error:
            fail(answer, raised(error))
            return
        if await self._passes(f"{actor.kind}.{method} answers", actor, answer):
            answer.set_result(result)

    async def _passes(self, step: str, actor: Actor, answer: asyncio.Future[Any]) -> bool:
        """Whether the call goes on; it fails with its actor, and has no end in one that stands still."""
        outcome = None if actor.kind == "scheduler" else self.step(step, actor)
        if isinstance(outcome, Exception):
            fail(answer, outcome)
        elif outcome is not None:
            await asyncio.sleep(outcome)
        if actor.dead is None and actor.inside is None and step.endswith("is asked"):
            await actor.started()
        if actor.trouble is not None:
            fail(answer, actor.trouble)
        return not answer.done() and not actor.stands_still


def _named_where(options: dict[str, Any]) -> tuple[str, NodeId]:
    return options["name"], options["scheduling_strategy"].node_id


def raised(error: Exception) -> Exception:
    """What the caller of a method gets that raised."""
    return RayTaskError("a method", str(error), error, proctitle="fake", pid=1, ip="127.0.0.1").as_instanceof_cause()
