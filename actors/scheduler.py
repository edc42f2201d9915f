"""The scheduler actor: the single writer around the core.

It stamps the time, hands events to `SchedulerCore.handle` on one event loop (never an `await` between reading and
writing the core's state), gives the commands to `Effects`, and answers the gateway. Expected errors are returned, not
raised: an exception over Ray costs a traceback.

Nothing is kept that could not be found again. After a restart it finds the nodes and adopts the runners that still
serve, before it decides anything. An error that nobody expected ends the process: books that cannot be trusted are
made anew from what is true, by the restart.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import ray

from actors import views
from actors.answers import Answers
from actors.devices.node import NodeSettings
from actors.devices.pulse import LOOP_WITHIN_S, sign_in
from actors.effects import Effects
from actors.endpoint import Endpoint
from actors.lease_server import LeaseServer
from actors.leasing import Grant, TokenCounts
from actors.measurements import MeasurementStore, measurements_path
from actors.metrics import FootprintMetrics
from actors.names import NAMESPACE
from actors.nodes import Joined, NodeWatch
from actors.notices import NoticeBoard
from actors.records import Health, LoadResult, ModelInfo, Notice, PinResult, Plan, Status, UnloadResult
from actors.survivors import Survivor, find_survivors
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.facts import DeviceReading, NodeReading
from scheduler.cluster.leases import Ending
from scheduler.config import Catalogue
from scheduler.core import SchedulerCore
from scheduler.errors import ArrieroError, EngineFailed, InvariantBroken, Unavailable
from scheduler.units import LeaseId, NodeId, ReplicaId, RequestId

TICK_S = 0.25
FIRST_LOOK_S = 15.0
FATE_TIMEOUT_S = 3.0  # for a death to be noticed and its last words to be read; both take milliseconds as a rule
MAX_CONCURRENCY = 10_000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What the actor is started with. `version` names the code; `node` goes to every node actor."""

    catalogue: Catalogue
    node: NodeSettings
    version: str
    namespace: str = NAMESPACE


GC_THRESHOLDS = (50_000, 20, 1000)
"""Of the garbage collector: what is known of a large cluster is looked through seldom, for that takes tenths of a
second in which nobody is granted anything."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=MAX_CONCURRENCY)
class SchedulerActor:
    """Create it detached under `names.SCHEDULER`, on the head."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        self._started_at = time.monotonic()
        self._pulse = sign_in(ray.get_runtime_context().get_node_id(), "SchedulerActor", "a turn of its event loop")
        self._board = NoticeBoard()
        self._metrics = FootprintMetrics()
        self._store = MeasurementStore(measurements_path())
        self._core = SchedulerCore(settings.catalogue, secrets.token_hex(2), self._store.records)
        if self._store.trouble:
            self._announce(cmd.Announce("measurements_lost", self._store.trouble))
        self._answers = Answers(self._post)
        self._effects = Effects(self._core.inventory, self._core.policy, settings.namespace, self._post)
        node_id = NodeId(ray.get_runtime_context().get_node_id())
        self._leases = LeaseServer(self, node_id, ray.util.get_node_ip_address())
        self._lease_endpoint: asyncio.Future[Endpoint] | None = None
        self._survivors: dict[NodeId, list[Survivor]] = defaultdict(list)
        self._ended_early: set[LeaseId] = set()  # before all runners of an earlier scheduler were taken over
        self._failures: dict[NodeId, str] = {}  # of nodes that cannot join
        self._closing = False
        self._loops: list[asyncio.Task[None]] = []
        self._spawn(self._tick())
        self._spawn(self._run())
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)

    # ------------------------------------------------------------------ the core and its surroundings

    def _post(self, event: ev.Event) -> None:
        if self._closing:
            return
        try:
            commands = self._core.handle(event, time.monotonic())
        except InvariantBroken as error:
            _die(error)
        except ArrieroError:
            raise
        except Exception as error:
            _die(error)
        for command in commands:
            match command:
                case cmd.Announce():
                    self._announce(command)
                case cmd.Remember():
                    self._store.put(command.record)
                case cmd.GrantLease():
                    self._granted(command)
                case cmd.RefuseRequest():
                    self._answers.give(command.request_id, command.error)
                case _:
                    self._effects.carry_out(command)

    def _announce(self, notice: cmd.Announce) -> None:
        log.info("%s", notice.message)
        self._board.post(notice)
        try:
            self._metrics.observe(notice)
        except Exception:  # a figure that is missed must not cost a grant
            log.exception("metrics were not updated")

    def _granted(self, grant: cmd.GrantLease) -> None:
        endpoint = self._effects.endpoint(grant.replica_id)
        lease = Grant(grant.lease_id, grant.replica_id, endpoint, grant.model, grant.ttl_s, grant.n_ctx)
        if not self._answers.give(grant.request_id, lease):  # whoever asked has left
            asyncio.get_running_loop().call_soon(self._post, ev.LeaseReleased(grant.lease_id, "left"))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a loop that ends with the actor only."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda ended: ended.cancelled() or _die(ended.exception()))
        self._loops.append(task)

    async def _run(self) -> None:
        for survivor in await find_survivors(self._settings.namespace):
            self._survivors[survivor.runner.node_id].append(survivor)
        nodes = NodeWatch(
            ray.get_runtime_context().current_actor,
            self._settings.node,
            self._core.policy.gpu_claim,
            self._settings.namespace,
            joined=self._node_joined,
            left=self._node_left,
            failed=self._node_failed,
            silent=self._core.inventory.silent_nodes,
        )
        await nodes.first_look(FIRST_LOOK_S)
        self._answers.settled.set()
        if ray.get_runtime_context().was_current_actor_reconstructed:
            loaded = len(self._core.replicas)
            self._announce(
                cmd.Announce("scheduler_restarted", f"the scheduler was restarted and found {loaded} loaded models")
            )
        await nodes.keep_looking()

    async def _tick(self) -> None:
        while True:
            self._pulse.promise(LOOP_WITHIN_S)
            await asyncio.sleep(TICK_S)
            self._post(ev.Ticked())

    def _node_joined(self, joined: Joined) -> None:
        if self._closing:
            return
        node_id = joined.facts.node_id
        self._failures.pop(node_id, None)
        self._post(ev.NodeJoined(joined.facts))
        # Before the first readings: until all are in, the core places nothing on the node.
        for survivor in self._survivors.pop(node_id, ()):
            self._effects.adopt(survivor.adopted.replica_id, survivor.runner)
            held = tuple(each for each in survivor.adopted.lease_ids if each not in self._ended_early)
            self._post(replace(survivor.adopted, lease_ids=held))
        for reading in joined.device_readings:
            self._post(ev.DeviceSampled(reading))
        self._post(ev.NodeSampled(joined.node_reading))
        self._effects.node_joined(node_id)

    def _node_left(self, node_id: NodeId) -> None:
        self._effects.forget_node(node_id)
        self._post(ev.NodeLost(node_id, "Ray lost it"))

    def _node_failed(self, node_id: NodeId, reason: str) -> None:
        if self._failures.get(node_id) != reason:
            self._failures[node_id] = reason
            self._announce(cmd.Announce("node_failed", f"node {node_id[:12]} cannot join: {reason}"))

    # ------------------------------------------------------------------ reports

    async def report_device(self, reading: DeviceReading) -> None:
        self._post(ev.DeviceSampled(reading))

    async def report_node(self, reading: NodeReading) -> None:
        self._post(ev.NodeSampled(reading))

    # ------------------------------------------------------------------ what the gateway asks

    async def lease_endpoint(self) -> Endpoint:
        """Where gateways ask for leases, and give them back."""
        if self._lease_endpoint is None:
            self._lease_endpoint = asyncio.ensure_future(self._leases.start())
        return await self._lease_endpoint

    async def acquire(self, request: ev.RequestArrived) -> Grant | ArrieroError:
        return await self._answers.ask(request)

    async def release(self, lease_id: LeaseId, ending: Ending, usage: TokenCounts) -> None:
        if lease_id not in self._core.fleet.leases and (not self._answers.settled.is_set() or self._survivors):
            self._ended_early.add(lease_id)
        self._post(ev.LeaseReleased(lease_id, ending, usage.pace))

    async def renew(self, lease_ids: tuple[LeaseId, ...]) -> None:
        self._post(ev.LeasesRenewed(lease_ids))

    async def forget_clients(self) -> None:
        """A gateway has started: whatever the one before had asked for is void."""
        self._post(ev.ClientsLost())

    async def cancel(self, request_id: RequestId) -> None:
        self._answers.cancel(request_id)

    async def fate(self, replica_id: ReplicaId) -> str:
        """See `Backend.fate`. Whoever asks has just seen the replica fail: the news may take a moment."""
        return await self._board.fate(replica_id, FATE_TIMEOUT_S)

    async def status(self) -> Status:
        return views.status(
            self._core,
            self._settings.version,
            time.monotonic(),
            self._started_at,
            self._board.last_seq,
            self._effects.pid,
        )

    async def plan(self, model: str, n_ctx: int | None) -> Plan | ArrieroError:
        await self._answers.settled.wait()
        now = time.monotonic()
        try:
            return views.plan(self._core, model, self._core.plan(model, n_ctx, now), now)
        except ArrieroError as error:
            return error

    async def load(self, request: ev.RequestArrived) -> LoadResult | ArrieroError:
        await self._answers.settled.wait()
        began = time.monotonic()
        if (busy := self._core.busy(request.model, request.n_ctx, began)) is not None:
            return views.load_result(self._core, busy.replica_id, began)
        answer = await self.acquire(request)
        if isinstance(answer, ArrieroError):
            return answer
        if answer.replica_id not in self._core.replicas:
            return EngineFailed(f"{request.model} was loaded and died at once; `arriero events` has the reason")
        result = views.load_result(self._core, answer.replica_id, began)
        self._post(ev.LeaseReleased(answer.lease_id))
        return result

    async def unload(self, model: str, unless_wanted: bool = False) -> UnloadResult | ArrieroError:
        await self._answers.settled.wait()
        replicas = [r.replica_id for r in self._core.replicas.values() if r.model == model]
        try:
            self._post(ev.UnloadAsked(model, unless_wanted))
        except ArrieroError as error:
            return error
        return UnloadResult(model=model, replicas=[str(replica_id) for replica_id in replicas])

    async def pin(self, model: str, pinned: bool) -> PinResult | ArrieroError:
        try:
            self._post(ev.PinAsked(model, pinned))
        except ArrieroError as error:
            return error
        return PinResult(model=model, pinned=pinned)

    async def keep_alive(self, model: str, keep_alive_s: float) -> ArrieroError | None:
        try:
            self._post(ev.KeepAliveAsked(model, keep_alive_s))
        except ArrieroError as error:
            return error
        return None

    async def models(self) -> list[ModelInfo]:
        return views.models(self._core)

    async def notices(self, after_seq: int) -> list[Notice]:
        return self._board.after(after_seq)

    async def health(self) -> Health:
        return views.health(self._core, self._settings.version, time.monotonic() - self._started_at)

    # ------------------------------------------------------------------ its own life

    async def version(self) -> str:
        return self._settings.version

    async def await_ready(self, timeout_s: float) -> str:
        """Wait until a node has joined and been read; returns "" then, and what was in the way after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._answers.settled.is_set() and any(node.known for node in self._core.inventory.nodes.values()):
                return ""
            await asyncio.sleep(0.05)
        return "; ".join(sorted(set(self._failures.values()))) or "no node has reported"

    async def free_port(self, host: str, port: int = 0) -> int:
        """`port` (0: any) if it is free on this machine now, else 0: the gateway keeps it when it restarts."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host.strip("[]"), port))
            except OSError:
                return 0
            found: int = probe.getsockname()[1]
            return found

    async def close(self) -> None:
        """Refuse what waits and stop deciding; runners are ended by whoever asked (see `bootstrap.take_down`)."""
        self._closing = True
        self._effects.close()
        for loop in self._loops:
            loop.cancel()
        self._pulse.rest()
        self._answers.refuse_all(Unavailable("Arriero is shutting down", retry_after_s=10.0))
        self._store.close()
        self._leases.close()
        await asyncio.sleep(0)  # lets the answers go out


def _die(error: BaseException | None) -> Any:
    """End this process; Ray starts it again and it finds its runners."""
    log.critical("the scheduler starts anew: %s", error, exc_info=error)
    logging.shutdown()
    os._exit(1)
