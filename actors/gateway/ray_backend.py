"""The backend: leases and tokens over sockets of the scheduler and the runners, everything else over Ray.

The scheduler's expected errors come back as values and are raised here. What Ray raises is translated: a scheduler that
restarts is asked again for a few seconds and is then `Unavailable`; a runner that died is `EngineFailed`.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from actors import road
from actors.endpoint import Endpoint
from actors.gateway.lease_client import LeaseClient
from actors.gateway.roads import Frame, Roads
from actors.gateway.shortcut import Shortcut
from actors.leasing import Grant, TokenCounts
from actors.records import Health, LoadResult, ModelInfo, Notice, PinResult, Plan, Status, UnloadResult
from actors.road import Kind
from actors.serving.protocol import EmbedRequest, EmbedResult, GenerateRequest
from scheduler.cluster.leases import Ending
from scheduler.errors import ArrieroError, EngineFailed, InvariantBroken, Unavailable
from scheduler.events import RequestArrived
from scheduler.units import LeaseId, NodeId, ReplicaId, RequestId

RESTART_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Pauses while the scheduler actor restarts: it answers again after ~2 s, an old machine takes longer."""

log = logging.getLogger(__name__)


class RayBackend:
    """Implements `Backend`. Belongs to the event loop of the gateway actor."""

    def __init__(self, scheduler: ActorHandle[Any], node_id: NodeId) -> None:
        """`node_id`: where the gateway runs; runners of that node are reached without a network."""
        self._scheduler = scheduler
        self._roads = Roads(node_id)
        self._leases = LeaseClient(self._lease_endpoint, node_id)

    async def acquire(self, request: RequestArrived) -> Grant:
        pauses_s = iter(RESTART_PAUSES_S)
        while True:
            try:
                return await self._leases.acquire(request)
            except (OSError, asyncio.TimeoutError) as error:  # it restarts; to ask twice is safe
                pause_s = next(pauses_s, None)
                if pause_s is None:
                    raise _away() from error
                await asyncio.sleep(pause_s)

    async def release(self, lease_id: LeaseId, ending: Ending, usage: TokenCounts) -> None:
        self._leases.release(lease_id, ending, usage)

    async def renew(self, lease_ids: Sequence[LeaseId]) -> None:
        await self._ask("renew", tuple(lease_ids))

    async def cancel(self, request_id: RequestId) -> None:
        self._leases.cancel(request_id)

    async def fate(self, replica_id: ReplicaId) -> str:
        fate: str = await self._ask("fate", replica_id)
        return fate

    async def status(self) -> Status:
        status: Status = await self._ask("status")
        return status

    async def plan(self, model: str, n_ctx: int | None) -> Plan:
        plan: Plan = await self._ask("plan", model, n_ctx)
        return plan

    async def load(self, request: RequestArrived) -> LoadResult:
        try:
            result: LoadResult = await self._ask("load", request)
        except asyncio.CancelledError:
            await self.cancel(request.request_id)
            raise
        return result

    async def unload(self, model: str, unless_wanted: bool = False) -> UnloadResult:
        result: UnloadResult = await self._ask("unload", model, unless_wanted)
        return result

    async def pin(self, model: str, pinned: bool) -> PinResult:
        result: PinResult = await self._ask("pin", model, pinned)
        return result

    async def keep_alive(self, model: str, keep_alive_s: float) -> None:
        await self._ask("keep_alive", model, keep_alive_s)

    async def models(self) -> list[ModelInfo]:
        models: list[ModelInfo] = await self._ask("models")
        return models

    async def health(self) -> Health:
        health: Health = await self._ask("health")
        return health

    async def notices(self, after_seq: int) -> AsyncIterator[Notice]:
        page: list[Notice]
        while page := await self._ask("notices", after_seq):
            for notice in page:
                yield notice
                after_seq = notice.seq

    async def generate(
        self, lease: Grant, request: GenerateRequest, shortcut: Shortcut | None = None
    ) -> AsyncGenerator[bytes | TokenCounts, None]:
        async with aclosing(self._answer(lease, Kind.GENERATE, road.packed_generate(request), shortcut)) as answer:
            async for arrived in answer:
                if events := b"".join(payload for kind, payload in arrived if kind == Kind.EVENT):
                    yield events
                if counts := self._counts(lease, arrived):
                    yield counts

    async def embed(self, lease: Grant, request: EmbedRequest) -> EmbedResult:
        vectors: list[array[float]] = []
        async with aclosing(self._answer(lease, Kind.EMBED, road.packed_embed(request))) as answer:
            async for arrived in answer:
                vectors += (array("f", payload) for kind, payload in arrived if kind == Kind.VECTOR)
                if counts := self._counts(lease, arrived):
                    return EmbedResult(tuple(vectors), counts.prompt_tokens)
        raise AssertionError("an answer ends or raises")

    async def _answer(
        self, lease: Grant, kind: Kind, payload: Sequence[bytes], shortcut: Shortcut | None = None
    ) -> AsyncGenerator[list[Frame], None]:
        """What the lease's runner says. Raises EngineFailed when it is gone, or goes."""
        replica = f"replica {lease.replica_id} of {lease.model}"
        if lease.endpoint is None:
            raise EngineFailed(f"{replica} is gone; try again", replica_id=lease.replica_id)
        try:
            answer_of = self._roads.answer(lease.endpoint, lease.lease_id, kind, payload, shortcut)
            async with aclosing(answer_of) as answer:
                async for arrived in answer:
                    yield arrived
        except (OSError, asyncio.TimeoutError) as error:
            what = f"the process that ran {lease.model} (replica {lease.replica_id}) ended while it answered"
            raise EngineFailed(f"{what}; try again", replica_id=lease.replica_id) from error

    @staticmethod
    def _counts(lease: Grant, arrived: Sequence[Frame]) -> TokenCounts | None:
        """The counts that end an answer, or None. Raises the error that does."""
        kind, payload = arrived[-1]
        if kind == Kind.FAILED:
            error = road.read_error(payload)
            if isinstance(error, EngineFailed):
                error.details.setdefault("replica_id", lease.replica_id)
            raise error
        return road.read_counts(payload) if kind == Kind.ENDED else None

    async def _lease_endpoint(self) -> Endpoint:
        endpoint: Endpoint = await self._ask("lease_endpoint")
        return endpoint

    async def _ask(self, method: str, *arguments: object) -> Any:
        """The scheduler's answer. Safe to repeat: each of its methods may be called twice with the same effect."""
        pauses_s = iter(RESTART_PAUSES_S)
        while True:
            try:
                answer = await getattr(self._scheduler, method).remote(*arguments)
            except RayActorError as error:
                pause_s = next(pauses_s, None)
                if pause_s is None:
                    raise _away() from error
                log.warning("the scheduler does not answer, asking again in %.1f s: %s", pause_s, error)
                await asyncio.sleep(pause_s)
            except RayTaskError as error:
                raise _cause(error) or InvariantBroken(f"the scheduler failed in {method}: {error.cause}") from error
            else:
                if isinstance(answer, ArrieroError):
                    raise answer
                return answer


def _away() -> Unavailable:
    return Unavailable(
        "the scheduler does not answer; Ray restarts it. Try again in a few seconds. "
        "If this continues, run `arriero up`",
        retry_after_s=5.0,
    )


def _cause(error: RayTaskError) -> ArrieroError | None:
    """The error that was raised in the actor, without Ray's wrapping."""
    return error.cause if isinstance(error.cause, ArrieroError) else None
