"""One request from slot to last token: acquire a lease, relay the replica's tokens, give the lease back.

A replica that dies while nothing of its answer has gone out is nobody's fault that the client should see: the request
is replayed on another one, at most `REPLAYS` times. A stream that has begun passes the failure on, since a second
answer would not continue the first. However a relay ends (last token, error, client gone), its lease is released or its
place in the queue given up. Leases are renewed by one task for all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from actors.gateway.backend import Backend
from actors.gateway.shortcut import Shortcut
from actors.leasing import Grant, TokenCounts
from actors.serving.protocol import EmbedRequest, EmbedResult, GenerateRequest
from scheduler.cluster.leases import Ending
from scheduler.errors import ArrieroError, EngineFailed
from scheduler.events import RequestArrived
from scheduler.units import LeaseId

Answer = TypeVar("Answer")

REPLAYS = 2

log = logging.getLogger(__name__)


class Relay:
    """Serves requests through a backend. Belongs to one event loop; `close()` ends its renewals."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._leases: dict[LeaseId, Grant] = {}
        self._renewals: asyncio.Task[None] | None = None

    async def generate(
        self, need: RequestArrived, request: GenerateRequest, shortcut: Shortcut | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The answer as it comes, as far as it does not take the shortcut. Closing the generator cancels the
        generation. Raises ArrieroError."""
        replays_left = REPLAYS
        while True:
            started = False
            try:
                async with aclosing(self._pieces(need, request, shortcut)) as pieces:
                    async for piece in pieces:
                        started = True
                        yield piece
                return
            except EngineFailed as error:
                if started or not replays_left:
                    raise await self._explained(error) from error
                replays_left -= 1
                log.warning("replaying %s: %s", need.request_id, error)

    async def generate_whole(self, need: RequestArrived, request: GenerateRequest) -> bytes:
        """All of the answer at once. Raises ArrieroError."""

        async def attempt() -> bytes:
            async with aclosing(self._pieces(need, request)) as pieces:
                return b"".join([piece async for piece in pieces])

        return await self._replayed(need, attempt)

    async def embed(self, need: RequestArrived, request: EmbedRequest) -> EmbedResult:
        """The vectors of `request`. Raises ArrieroError."""
        return await self._replayed(need, lambda: self._embed(need, request))

    async def _replayed(self, need: RequestArrived, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        """The first answer of at most `1 + REPLAYS` attempts; nothing of one that failed has reached the client."""
        for replays_left in range(REPLAYS, -1, -1):
            try:
                return await attempt()
            except EngineFailed as error:
                if not replays_left:
                    raise await self._explained(error) from error
                log.warning("replaying %s, at most %d times: %s", need.request_id, replays_left, error)
        raise AssertionError("the last attempt returns or raises")

    async def _explained(self, error: EngineFailed) -> EngineFailed:
        """The error with what the replica's process ended of, if it did."""
        replica_id = error.details.get("replica_id")
        try:
            fate = await self._backend.fate(replica_id) if replica_id else ""
        except ArrieroError:  # the scheduler is away: what is known has to do
            fate = ""
        return EngineFailed(f"{error.message}. {fate}", **error.details) if fate else error

    async def _pieces(
        self, need: RequestArrived, request: GenerateRequest, shortcut: Shortcut | None = None
    ) -> AsyncGenerator[bytes, None]:
        """One attempt: what one replica says, under a lease."""
        lease = await self._acquire(need)
        answer = self._backend.generate(lease, request, shortcut)
        usage: TokenCounts | None = None
        ending: Ending = "left"
        try:
            async for piece in answer:
                if isinstance(piece, TokenCounts):
                    usage, ending = piece, "served"
                else:
                    yield piece
            if usage is None:
                raise EngineFailed(f"replica {lease.replica_id} of {lease.model} ended its answer early")
        except ArrieroError as error:  # what the replica refuses, it has answered
            ending = "failed" if isinstance(error, EngineFailed) else "served"
            raise
        finally:
            await answer.aclose()
            await self._release(lease, ending, TokenCounts() if usage is None else usage)

    async def _embed(self, need: RequestArrived, request: EmbedRequest) -> EmbedResult:
        """One attempt."""
        lease = await self._acquire(need)
        ending: Ending = "left"
        usage = TokenCounts()
        try:
            result = await self._backend.embed(lease, request)
            ending = "served"
            usage = TokenCounts(prompt_tokens=result.prompt_tokens)
            return result
        except ArrieroError as error:
            ending = "failed" if isinstance(error, EngineFailed) else "served"
            raise
        finally:
            await self._release(lease, ending, usage)

    def close(self) -> None:
        """Stop renewing; leases that are still held expire."""
        if self._renewals is not None:
            self._renewals.cancel()

    async def _acquire(self, need: RequestArrived) -> Grant:
        try:
            lease = await self._backend.acquire(need)
        except asyncio.CancelledError:
            await self._backend.cancel(need.request_id)
            raise
        self._leases[lease.lease_id] = lease
        if self._renewals is None or self._renewals.done():
            self._renewals = asyncio.ensure_future(self._renew())
        return lease

    async def _release(self, lease: Grant, ending: Ending, usage: TokenCounts) -> None:
        del self._leases[lease.lease_id]
        try:
            await self._backend.release(lease.lease_id, ending, usage)
        except ArrieroError as error:
            log.warning("lease %s was not released and will expire: %s", lease.lease_id, error)

    async def _renew(self) -> None:
        while self._leases:
            await asyncio.sleep(min(lease.ttl_s for lease in self._leases.values()) / 3)
            if self._leases:
                try:
                    await self._backend.renew(tuple(self._leases))
                except ArrieroError as error:
                    log.warning("leases were not renewed: %s", error)
