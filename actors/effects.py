"""Carries commands out and posts what came of them: every command ends in exactly one event, or with its node.

A replica's runner is the node's spare (see `spares`) or a fresh one. It ends by `ray.kill`; its memory counts as free
only after its process is gone (SIGKILL by the node actor as a backstop) and its devices have been read again.
An actor that does not answer is asked again for as long as its node is there: Ray restarts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Union

from ray.exceptions import RayActorError, RayError

from actors.devices.processes import Process
from actors.devices.watchdog import STOOD_STILL
from actors.endpoint import Endpoint
from actors.names import gpu_name, node_name
from actors.questions import QUESTION_TIMEOUT_S, Questions, brief
from actors.serving.protocol import (
    Introduction,
    LoadAdapter,
    LoadDevice,
    LoadDraft,
    LoadFailure,
    LoadReport,
    LoadSpec,
    RunnerStatus,
)
from actors.spares import RunnerHandle, Spares
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.inventory import Inventory
from scheduler.config import Policy
from scheduler.costs.companions import is_on_device
from scheduler.costs.params import Footprint
from scheduler.costs.shape import ModelShape
from scheduler.costs.weights import experts_pattern
from scheduler.errors import ArrieroError, InvalidGGUF, Unavailable
from scheduler.units import NodeId, ReplicaId

PROGRESS_EVERY_S = 0.25
ASK_AGAIN_S = 1.0
SPARE_AFTER_S = 1.0
"""Started at once, it makes the first answer wait: swaps of a 398 MB model then take 0.6 to 1.1 s, else 0.55 to 0.7."""

SAVING_TIMEOUT_S = 10.0
"""A runner begins no save after 2 s; one of 4 GB takes 8 s at the speed of an SSD."""

Order = Union[  # noqa: UP007
    cmd.StartReplica,
    cmd.StopReplica,
    cmd.CheckReplica,
    cmd.CancelAnswer,
    cmd.ReadShape,
    cmd.ReadAhead,
    cmd.StopReadAhead,
]

log = logging.getLogger(__name__)


class Effects:
    """Belongs to the scheduler actor's event loop. `post` hands an event to the core."""

    def __init__(self, inventory: Inventory, policy: Policy, namespace: str, post: Callable[[ev.Event], None]) -> None:
        self._inventory = inventory
        self._policy = policy
        self._namespace = namespace
        self._post = post
        self._spares = Spares(namespace)
        self._runners: dict[ReplicaId, RunnerHandle] = {}
        self._questions = Questions(namespace)
        self._tasks: set[asyncio.Task[None]] = set()

    def carry_out(self, command: Order) -> None:
        """Start carrying the command out; returns at once."""
        match command:
            case cmd.StartReplica():
                self._spawn(self._start(command))
            case cmd.StopReplica():
                self._spawn(self._stop(command))
            case cmd.CheckReplica():
                self._spawn(self._check(command.replica_id))
            case cmd.CancelAnswer():
                self._cancel(command)
            case cmd.ReadShape():
                self._spawn(self._read_shape(command))
            case cmd.ReadAhead():
                self._spawn(self._read_ahead(command))
            case cmd.StopReadAhead():
                self._spawn(self._stop_reading_ahead(command))

    def adopt(self, replica_id: ReplicaId, runner: RunnerHandle) -> None:
        """Take over a runner that outlived a restart of the scheduler."""
        self._runners[replica_id] = runner
        self._spawn(self._watch(replica_id, runner))

    def node_joined(self, node_id: NodeId) -> None:
        """Make the first load there as quick as those that follow."""
        self._spares.stand_by(node_id)

    def forget_node(self, node_id: NodeId) -> None:
        """The node is lost, and its runners with it: no StopReplica comes for them."""
        self._spares.forget(node_id)
        for replica_id in [known for known, runner in self._runners.items() if runner.node_id == node_id]:
            self._runners.pop(replica_id).kill()

    def endpoint(self, replica_id: ReplicaId) -> Endpoint | None:
        """Where the replica's runner answers; None when it has none any more."""
        runner = self._runners.get(replica_id)
        return runner.endpoint if runner else None

    def pid(self, replica_id: ReplicaId) -> int | None:
        runner = self._runners.get(replica_id)
        return runner.process.pid if runner and runner.process else None

    def close(self) -> None:
        """Stop all that is under way; no runner is started after this."""
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an effect failed", exc_info=error)

    # ------------------------------------------------------------------ loading

    async def _start(self, command: cmd.StartReplica) -> None:
        try:
            event = await self._load(command)
        except Exception as error:
            if isinstance(error, RayError) and not await self._outlives(command.placement.node_id):
                return  # the node took the replica with it: that says nothing of the model
            event = ev.ReplicaFailed(command.replica_id, *await self._failure(command.replica_id, error))
        runner = self._runners.get(command.replica_id)
        if runner is not None and isinstance(event, ev.ReplicaFailed):
            await self._read_again(runner)  # what made it fail is to be known to the next plan
        self._post(event)
        self._spawn(self._stand_by(command.placement.node_id))
        if runner is not None and isinstance(event, ev.ReplicaReady):
            await self._watch(command.replica_id, runner)

    async def _stand_by(self, node_id: NodeId) -> None:
        """A spare for the next load, when the first answer no longer needs the cores: starting one takes a second."""
        await asyncio.sleep(SPARE_AFTER_S)
        if node_id in self._inventory.nodes:
            self._spares.stand_by(node_id)

    async def _outlives(self, node_id: NodeId) -> bool:
        """Whether a node is still there after a runner on it has ended: Ray takes a while to notice that it is not."""
        while node_id in self._inventory.nodes:
            if await self._questions.sample(node_name(node_id)) is not None:
                return True
            await asyncio.sleep(ASK_AGAIN_S)
        return False

    async def _failure(self, replica_id: ReplicaId, error: Exception) -> tuple[ev.FailureKind, str]:
        if isinstance(error, asyncio.TimeoutError):
            return "failed", f"the load took more than {self._policy.load_timeout_s:.0f} s"
        if isinstance(error, RayError):
            words = await self._questions.last_words(self._runners.get(replica_id))
            return "crashed", f"the runner's process ended while loading: {words or brief(error)}"
        if isinstance(error, ArrieroError):
            return "failed", error.message
        log.error("a load failed for a reason of our own", exc_info=error)
        return "failed", f"{type(error).__name__}: {brief(error)}"

    async def _load(self, command: cmd.StartReplica) -> ev.ReplicaReady | ev.ReplicaFailed:
        replica_id, spec = command.replica_id, self._spec(command)
        actor, pid = await self._start_runner(command)
        self._post(ev.ReplicaStarted(replica_id, pid))
        reporting = asyncio.ensure_future(self._report_progress(replica_id, actor))
        try:
            loading = actor.load.remote(replica_id, spec)
            outcome: LoadReport | LoadFailure = await asyncio.wait_for(loading, self._policy.load_timeout_s)
        finally:
            reporting.cancel()
        if isinstance(outcome, LoadFailure):
            buffers = outcome.buffers
            would_take = Footprint(buffers.devices, buffers.host) if buffers else None
            return ev.ReplicaFailed(replica_id, outcome.kind, outcome.message, would_take)
        return ready_event(replica_id, outcome)

    async def _start_runner(self, command: cmd.StartReplica) -> tuple[Any, int]:
        """The replica's actor and its pid: the node's spare, or a fresh one when there is none that lives."""
        node_id = command.placement.node_id
        spare = self._spares.take(node_id)
        runner = spare or self._spares.start(node_id)
        while True:
            self._runners[command.replica_id] = runner
            runner.device_ids = command.placement.device_ids
            try:
                asked = runner.actor.introduce.remote()
                said: Introduction = await asyncio.wait_for(asked, self._policy.load_timeout_s)
                if self._runners.get(command.replica_id) is not runner:  # its memory counts as free already
                    raise Unavailable(f"{command.model} was stopped before it was loaded")
                runner.process, runner.endpoint = said.process, said.endpoint
                return runner.actor, said.process.pid
            except RayActorError:
                if runner is not spare or self._runners.get(command.replica_id) is not runner:  # it was stopped
                    raise
                runner.kill()  # it may only have been out of reach
                runner = self._spares.start(node_id)

    def _spec(self, command: cmd.StartReplica) -> LoadSpec:
        placement = command.placement
        node = self._inventory.nodes.get(placement.node_id)
        if node is None:
            raise Unavailable(f"its node left the cluster before {command.model} was loaded")
        devices = []
        for device_id, need in zip(placement.device_ids, placement.device_bytes, strict=True):
            if (device := self._inventory.device(device_id)) is None:
                raise Unavailable(f"device {device_id} left the cluster before {command.model} was loaded")
            facts = device.facts
            devices.append(LoadDevice(device_id, facts.kind, need, facts.state_path, facts.total_bytes))
        return LoadSpec(
            model=command.model,
            path=command.path,
            devices=tuple(devices),
            n_gpu_layers=placement.layout.n_gpu_layers,
            tensor_split=placement.layout.tensor_split,
            experts_pattern=experts_pattern(placement.layout),
            context=placement.context,
            n_threads=node.facts.physical_cores if placement.computes_on_cpu else 1,
            host_required_bytes=placement.host_bytes,
            use_mmap=command.use_mmap,
            use_extra_bufts=command.use_extra_bufts,
            preflight=command.preflight,
            chat_template=command.chat_template,
            placement=placement,
            saved_state_bytes=self._policy.saved_state_bytes,
            adapters=tuple(LoadAdapter(*adapter) for adapter in command.adapters),
            mmproj=command.mmproj,
            mmproj_on_device=placement.mmproj_on_device,
            matryoshka_dimensions=command.matryoshka_dimensions,
            draft=LoadDraft(*command.draft, on_device=is_on_device(placement.layout)),
        )

    async def _report_progress(self, replica_id: ReplicaId, actor: Any) -> None:
        with contextlib.suppress(RayError):
            while True:
                await asyncio.sleep(PROGRESS_EVERY_S)
                self._post(ev.ReplicaProgressed(replica_id, await actor.progress.remote()))

    async def _watch(self, replica_id: ReplicaId, runner: RunnerHandle) -> None:
        """Notice the end of a ready runner within milliseconds: the call returns only when the replica is broken."""
        try:
            reason = await runner.actor.watch.remote()
            words = await self._questions.last_words(runner)
            died = ev.ReplicaDied(replica_id, f"{reason}; {words}" if words else reason, _by_itself(words))
        except RayError as error:
            died = await self._end_of(replica_id, runner, error)
        if self._runners.get(replica_id) is runner:
            self._post(died)

    async def _end_of(self, replica_id: ReplicaId, runner: RunnerHandle, error: RayError) -> ev.ReplicaDied:
        """How a runner's process ended, by its own last words where it left any."""
        words = await self._questions.last_words(runner)
        reason = f"its process ended: {words}" if words else f"its process ended without a message ({brief(error)})"
        return ev.ReplicaDied(replica_id, reason, _by_itself(words))

    async def _check(self, replica_id: ReplicaId) -> None:
        """One that does not answer is as good as dead: on a machine that was lost it dies long before Ray tells."""
        runner = self._runners.get(replica_id)
        if runner is None:
            return  # it is being stopped, and its ReplicaGone on the way
        found: ev.ReplicaDied | ev.ReplicaVouched
        try:
            status: RunnerStatus = await asyncio.wait_for(runner.actor.describe.remote(), QUESTION_TIMEOUT_S)
        except RayError as error:
            found = await self._end_of(replica_id, runner, error)
        except asyncio.TimeoutError:
            reason = f"it failed a request and has not answered for {QUESTION_TIMEOUT_S:.0f} s"
            found = ev.ReplicaDied(replica_id, reason)
        else:
            found = ev.ReplicaVouched(replica_id)
            if status.state != "ready":
                words = await self._questions.last_words(runner)
                found = ev.ReplicaDied(replica_id, status.reason or status.state, _by_itself(words))
        self._post(found)

    # ------------------------------------------------------------------ ending

    async def _stop(self, command: cmd.StopReplica) -> None:
        runner = self._runners.pop(command.replica_id, None)
        if runner is not None:
            if command.saves and self._policy.saved_state_bytes:
                await self._save(command.replica_id, runner)
            runner.kill()
            await self._await_end(command.replica_id, runner)
            await self._read_again(runner)
        self._post(ev.ReplicaGone(command.replica_id))

    async def _save(self, replica_id: ReplicaId, runner: RunnerHandle) -> None:
        """Let it save its conversations, for as long as that may take."""
        try:
            n_saved = await asyncio.wait_for(runner.actor.park.remote(), SAVING_TIMEOUT_S)
        except (asyncio.TimeoutError, RayError, AttributeError) as error:  # nothing is lost but time
            log.warning("%s did not save its conversations: %s", replica_id, brief(error))
        else:
            log.info("%s saved %d conversations", replica_id, n_saved)

    async def _await_end(self, replica_id: ReplicaId, runner: RunnerHandle) -> None:
        """Return when the process is gone, or its node: a lost node frees its memory by itself."""
        while runner.process is not None and runner.node_id in self._inventory.nodes:
            try:
                if await self._gone(runner.node_id, runner.process):
                    return
                log.error("process %s of %s does not end; its memory stays charged", runner.process.pid, replica_id)
            except Exception as error:  # whatever it was, the memory is not known to be free
                log.warning("node %s does not say whether %s is gone: %s", runner.node_id, replica_id, brief(error))
            await asyncio.sleep(ASK_AGAIN_S)

    async def _gone(self, node_id: NodeId, process: Process) -> bool:
        """Wait for the process to end; kill it as a backstop when Ray's kill did not."""
        wait_s = self._policy.release_timeout_s
        patience_s = wait_s + QUESTION_TIMEOUT_S
        node = node_name(node_id)
        if not await self._questions.ask(node, "wait_gone", (process.identity,), wait_s, timeout_s=patience_s):
            return True
        await self._questions.ask(node, "kill_process", *process.identity)
        return not await self._questions.ask(node, "wait_gone", (process.identity,), wait_s, timeout_s=patience_s)

    async def _read_again(self, runner: RunnerHandle) -> None:
        """Fresh readings, so that what was freed can be given away at once; else the next report brings them."""
        for device_id in runner.device_ids:
            if (reading := await self._questions.sample(gpu_name(device_id))) is not None:
                self._post(ev.DeviceSampled(reading))
        if (reading := await self._questions.sample(node_name(runner.node_id))) is not None:
            self._post(ev.NodeSampled(reading))

    # ------------------------------------------------------------------ small things

    def _cancel(self, command: cmd.CancelAnswer) -> None:
        runner = self._runners.get(command.replica_id)
        if runner is not None:
            runner.actor.cancel.remote(command.lease_id)  # runners know a request by its lease

    async def _read_shape(self, command: cmd.ReadShape) -> None:
        shape, invalid, trouble = None, "", "its node left the cluster"
        beside = command.adapters, command.mmproj, command.draft
        while command.node_id in self._inventory.nodes:
            try:
                node = node_name(command.node_id)
                answer: ModelShape | ArrieroError = await self._questions.ask(
                    node, "read_shape", command.path, *beside, timeout_s=None
                )
            except Exception as error:  # the file is not to blame for it
                log.warning("%s was not read, trying again: %s", command.path, brief(error))
                await asyncio.sleep(ASK_AGAIN_S)
                continue
            trouble = ""
            if isinstance(answer, InvalidGGUF):
                invalid = answer.message
            elif isinstance(answer, ArrieroError):  # not readable now: the core asks again
                trouble = answer.message
            else:
                shape = answer
            break
        self._post(ev.ShapeRead(command.node_id, command.path, shape, invalid, trouble, *beside))

    async def _read_ahead(self, command: cmd.ReadAhead) -> None:
        try:
            await self._questions.ask(node_name(command.node_id), "read_ahead", command.path, timeout_s=None)
        except Exception as error:  # a load that reads from the disk is no worse than before
            log.warning("%s was not read ahead: %s", command.path, brief(error))
        self._post(ev.ReadAheadEnded(command.node_id, command.path))

    async def _stop_reading_ahead(self, command: cmd.StopReadAhead) -> None:
        try:
            await self._questions.ask(node_name(command.node_id), "stop_reading_ahead")
        except Exception as error:
            log.warning("reading ahead was not stopped: %s", brief(error))


def _by_itself(words: str) -> bool:
    """Whether a process that left these words ended by itself: ggml, C++ and Ray's signal handlers say something."""
    return bool(words) and STOOD_STILL not in words


def ready_event(replica_id: ReplicaId, report: LoadReport) -> ev.ReplicaReady:
    """The event for a load that succeeded, with llama.cpp's own figures."""
    buffers = report.buffers
    return ev.ReplicaReady(
        replica_id=replica_id,
        pid=report.pid,
        buffers=Footprint(buffers.devices, buffers.host),
        n_ctx=buffers.n_ctx_per_slot,
        load_s=report.load_s,
    )
