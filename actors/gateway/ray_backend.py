"""The backend on Ray: answers from the scheduler actor, tokens straight from the runner actors.

Expected errors come back as values and are raised here. What Ray raises is translated: a scheduler that restarts is
asked again for a few seconds and is then `Unavailable`; a runner that died is `EngineFailed`. Runner handles are
cached, so that a request to a loaded model costs one round trip to the scheduler (~1 ms) and the stream itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.leasing import Grant, TokenCounts
from actors.records import Health, LoadResult, ModelInfo, Notice, PinResult, Plan, Status, UnloadResult
from actors.serving.protocol import Chunk, EmbedRequest, EmbedResult, GenerateRequest
from scheduler.errors import ArrieroError, EngineFailed, InvariantBroken, Unavailable
from scheduler.events import RequestArrived
from scheduler.units import LeaseId, ReplicaId, RequestId

RESTART_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Pauses while the scheduler actor restarts: it answers again after ~2 s, an old machine takes longer."""

MAX_CACHED_RUNNERS = 256

log = logging.getLogger(__name__)


class RayBackend:
    """Implements `Backend`. Belongs to the event loop of the gateway actor."""

    def __init__(self, scheduler: ActorHandle[Any], namespace: str) -> None:
        self._scheduler = scheduler
        self._namespace = namespace
        self._runners: dict[ReplicaId, ActorHandle[Any]] = {}

    async def acquire(self, request: RequestArrived) -> Grant:
        lease: Grant = await self._ask("acquire", request)
        return lease

    async def release(self, lease_id: LeaseId, failed: bool, usage: TokenCounts) -> None:
        self._scheduler.release.remote(lease_id, failed, usage)

    async def renew(self, lease_ids: Sequence[LeaseId]) -> None:
        await self._ask("renew", tuple(lease_ids))

    async def cancel(self, request_id: RequestId) -> None:
        self._scheduler.cancel.remote(request_id)

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

    async def unload(self, model: str) -> UnloadResult:
        result: UnloadResult = await self._ask("unload", model)
        return result

    async def pin(self, model: str, pinned: bool) -> PinResult:
        result: PinResult = await self._ask("pin", model, pinned)
        return result

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

    async def generate(self, lease: Grant, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        runner = await self._runner(lease)
        request = replace(request, lease_id=lease.lease_id)  # a restarted scheduler finds its leases at the runners
        items = runner.generate.remote(request)
        running = True
        try:
            async for reference in items:
                # The loop has waited for it, and to await it again would cost every token another hop between threads.
                item: Chunk | ArrieroError = ray.get(reference)
                if isinstance(item, ArrieroError):
                    running = False
                    raise item
                yield item
            running = False
        except RayError as error:
            running = False
            raise self._engine_failure(lease, error) from error
        finally:
            if running:
                # Ray's cancel takes effect at the next token; the runner's own also reaches into a long prompt.
                ray.cancel(items)
                runner.cancel.remote(lease.lease_id)

    async def embed(self, lease: Grant, request: EmbedRequest) -> EmbedResult:
        runner = await self._runner(lease)
        request = replace(request, lease_id=lease.lease_id)
        try:
            result: EmbedResult | ArrieroError = await runner.embed.remote(request)
        except RayError as error:
            raise self._engine_failure(lease, error) from error
        except asyncio.CancelledError:
            runner.cancel.remote(lease.lease_id)
            raise
        if isinstance(result, ArrieroError):
            raise result
        return result

    async def _ask(self, method: str, *arguments: object) -> Any:
        """The scheduler's answer. Safe to repeat: each of its methods may be called twice with the same effect."""
        pauses_s = iter(RESTART_PAUSES_S)
        while True:
            try:
                answer = await getattr(self._scheduler, method).remote(*arguments)
            except RayActorError as error:
                pause_s = next(pauses_s, None)
                if pause_s is None:
                    raise Unavailable(
                        "the scheduler does not answer; Ray restarts it. Try again in a few seconds. "
                        "If this continues, run `arriero up`",
                        retry_after_s=5.0,
                    ) from error
                log.warning("the scheduler does not answer, asking again in %.1f s: %s", pause_s, error)
                await asyncio.sleep(pause_s)
            except RayTaskError as error:
                raise _cause(error) or InvariantBroken(f"the scheduler failed in {method}: {error.cause}") from error
            else:
                if isinstance(answer, ArrieroError):
                    raise answer
                return answer

    async def _runner(self, lease: Grant) -> ActorHandle[Any]:
        runner = self._runners.get(lease.replica_id)
        if runner is None:
            try:
                # A blocking question to the head: off the event loop, where everybody's tokens pass.
                runner = await asyncio.to_thread(ray.get_actor, lease.runner, namespace=self._namespace)
            except ValueError as error:
                gone = f"replica {lease.replica_id} of {lease.model} is gone; try again"
                raise EngineFailed(gone, replica_id=lease.replica_id) from error
            if len(self._runners) >= MAX_CACHED_RUNNERS:
                self._runners.clear()  # replica ids are never used twice: what is still alive is looked up again
            self._runners[lease.replica_id] = runner
        return runner

    def _engine_failure(self, lease: Grant, error: RayError) -> ArrieroError:
        if isinstance(error, RayTaskError):
            return _cause(error) or EngineFailed(f"replica {lease.replica_id} of {lease.model} failed: {error.cause}")
        self._runners.pop(lease.replica_id, None)
        return EngineFailed(
            f"the process that ran {lease.model} (replica {lease.replica_id}) ended while it answered; try again",
            replica_id=lease.replica_id,
        )


def _cause(error: RayTaskError) -> ArrieroError | None:
    """The error that was raised in the actor, without Ray's wrapping."""
    return error.cause if isinstance(error.cause, ArrieroError) else None
