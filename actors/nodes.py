"""Keeps up with the cluster: a node actor for every node, a GPU actor for every GPU.

Asks Ray once a second which nodes are alive and which actors have their names. A node that joins gets its actors at
once, one that leaves is reported, an actor that has ended for good is started again. A node whose actors cannot be
started is tried again and again, and no other node waits for it. A node's actor watches the other processes there; it
is watched from here itself: one that neither reports nor answers is ended, and Ray starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.devices.gpu import GpuActor
from actors.devices.node import NodeActor, NodeSettings
from actors.names import gpu_name, node_name
from actors.questions import brief
from actors.spares import remote
from scheduler.cluster.facts import DeviceFacts, DeviceReading, NodeFacts, NodeReading
from scheduler.units import NodeId

LOOK_EVERY_S = 1.0
TRY_AGAIN_S = 3.0
CLAIM_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 5.0  # to a question that takes a node's actor a millisecond
RESTART_S = 20.0  # what ending a stopped process (5 s) and starting it anew take on a busy machine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Joined:
    """A node whose actors run, and what they read first."""

    facts: NodeFacts
    node: Any
    gpus: tuple[Any, ...]
    node_reading: NodeReading
    device_readings: tuple[DeviceReading, ...]

    @property
    def names(self) -> set[str]:
        return {node_name(self.facts.node_id), *(gpu_name(device.device_id) for device in self.facts.devices)}


class NodeWatch:
    """Belongs to the scheduler actor's event loop; `scheduler` is the handle that the actors report to.

    Calls `joined` and `left` as nodes come and go, and `failed` with what keeps a node from joining; `silent` names the
    nodes that do not report.
    """

    def __init__(
        self,
        scheduler: Any,
        settings: NodeSettings,
        gpu_claim: float,
        namespace: str,
        *,
        joined: Callable[[Joined], None],
        left: Callable[[NodeId], None],
        failed: Callable[[NodeId, str], None],
        silent: Callable[[], Iterable[NodeId]],
    ) -> None:
        self._scheduler = scheduler
        self._settings = settings
        self._gpu_claim = gpu_claim
        self._namespace = namespace
        self._on_joined, self._on_left, self._on_failed, self._silent = joined, left, failed, silent
        self._joined: dict[NodeId, Joined] = {}
        self._joining: dict[NodeId, asyncio.Task[None]] = {}
        self._waking: dict[NodeId, asyncio.Task[None]] = {}

    async def first_look(self, timeout_s: float) -> None:
        """Returns when every node that is alive now has joined, after `timeout_s` seconds at the latest."""
        await self._look()
        if self._joining:
            await asyncio.wait(list(self._joining.values()), timeout=timeout_s)

    async def keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self._look()
            except Exception as error:  # the head may be busy or away: nothing is known to have changed
                log.warning("could not look at the cluster: %s", brief(error))

    async def _look(self) -> None:
        nodes = {NodeId(node["NodeID"]): node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]}
        alive = set(nodes)
        for node_id in set(self._joined) - alive:
            self._leave(self._joined.pop(node_id))
        named = await asyncio.to_thread(ray.util.list_named_actors, True)
        present = {actor["name"] for actor in named if actor["namespace"] == self._namespace}
        for node_id in alive - set(self._joining):
            joined = self._joined.get(node_id)
            if joined is None or joined.names - present:
                labels = nodes[node_id].get("Labels") or {}
                self._joining[node_id] = asyncio.ensure_future(self._join(node_id, labels))
        for node_id in set(self._silent()) & set(self._joined) - set(self._joining) - set(self._waking):
            self._waking[node_id] = asyncio.ensure_future(self._wake(node_id))

    async def _wake(self, node_id: NodeId) -> None:
        """Have a node's actor report again; end the process of one that does not answer."""
        actor = self._joined[node_id].node
        try:
            await asyncio.wait_for(actor.sample_now.remote(), ANSWER_TIMEOUT_S)
        except (RayError, asyncio.TimeoutError) as error:
            log.error("the actor of node %s does not answer and is ended: %s", node_id, brief(error))
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor, no_restart=False)
            await asyncio.sleep(RESTART_S)
        finally:
            del self._waking[node_id]

    async def _join(self, node_id: NodeId, labels: Mapping[str, str]) -> None:
        try:
            joined = await self._start_actors(node_id)
            joined = replace(joined, facts=replace(joined.facts, labels=dict(labels)))
            if self._joined.setdefault(node_id, joined) is joined:
                self._on_joined(joined)
        except Exception as error:  # whatever it was, the next try may do better
            log.warning("node %s could not join, trying again: %s", node_id, error)
            self._on_failed(node_id, _last_line(error))
            await asyncio.sleep(TRY_AGAIN_S)
        finally:
            del self._joining[node_id]

    async def _start_actors(self, node_id: NodeId) -> Joined:
        on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
        node = (
            remote(NodeActor)
            .options(
                name=node_name(node_id),
                namespace=self._namespace,
                lifetime="detached",
                get_if_exists=True,
                scheduling_strategy=on_node,
            )
            .remote(node_id, self._settings, self._scheduler)
        )
        facts: NodeFacts = await asyncio.wait_for(node.facts.remote(), START_TIMEOUT_S)
        started = await asyncio.gather(*(self._start_gpu(device, on_node) for device in facts.devices))
        reading: NodeReading = await asyncio.wait_for(node.sample_now.remote(), START_TIMEOUT_S)
        return Joined(facts, node, tuple(gpu for gpu, _ in started), reading, tuple(first for _, first in started))

    async def _start_gpu(self, device: DeviceFacts, on_node: Any) -> tuple[Any, DeviceReading]:
        """The GPU's actor and its first reading; with a claim on Ray's num_gpus when there is one to be had."""
        claim = self._gpu_claim if device.kind == "cuda" else 0.0
        if claim:
            gpu = self._gpu_actor(device, on_node, claim)
            try:
                return gpu, await asyncio.wait_for(gpu.sample_now.remote(), CLAIM_TIMEOUT_S)
            except asyncio.TimeoutError:
                log.warning("%s: other Ray jobs hold num_gpus=%s; going on without a claim", device.label, claim)
                ray.kill(gpu, no_restart=True)
                await asyncio.sleep(0.5)  # until its name is free
        gpu = self._gpu_actor(device, on_node, 0.0)
        return gpu, await asyncio.wait_for(gpu.sample_now.remote(), START_TIMEOUT_S)

    def _gpu_actor(self, device: DeviceFacts, on_node: Any, num_gpus: float) -> Any:
        return (
            remote(GpuActor)
            .options(
                name=gpu_name(device.device_id),
                namespace=self._namespace,
                lifetime="detached",
                get_if_exists=True,
                scheduling_strategy=on_node,
                num_gpus=num_gpus,
            )
            .remote(device, self._scheduler)
        )

    def _leave(self, joined: Joined) -> None:
        self._on_left(joined.facts.node_id)
        for actor in (joined.node, *joined.gpus):  # Ray would go on trying to restart them there
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor, no_restart=True)


def _last_line(error: BaseException) -> str:
    """The end of a remote traceback, where the cause is."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
