"""What the gateway needs from the rest of Arriero, as one protocol: the scheduler's answers and the runners' tokens.

Every record is frozen, small and picklable: with `RayBackend` behind it each crosses a process border. Methods raise
`ArrieroError`s and nothing else. The scheduler actor offers the same methods under the same names (all but `generate`
and `embed`, which runners answer), but *returns* its errors, because an exception over Ray costs a traceback.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol

from actors.gateway.shortcut import Shortcut
from actors.leasing import Grant, TokenCounts
from actors.records import Health, LoadResult, ModelInfo, Notice, PinResult, Plan, Status, UnloadResult
from actors.serving.protocol import EmbedRequest, EmbedResult, GenerateRequest
from scheduler.cluster.leases import Ending
from scheduler.events import RequestArrived
from scheduler.units import LeaseId, ReplicaId, RequestId


class Backend(Protocol):
    """Raises `ArrieroError`s only. A cancelled call leaves nothing behind."""

    async def acquire(self, request: RequestArrived) -> Grant:
        """Wait for a slot, loading the model where needed. Asking twice with one `request_id` replaces the first."""
        ...

    async def release(self, lease_id: LeaseId, ending: Ending, usage: TokenCounts) -> None:
        """Give a slot back; one way, so it returns before the scheduler has heard."""
        ...

    async def renew(self, lease_ids: Sequence[LeaseId]) -> None:
        """Keep leases for another `ttl_s`; ids that the scheduler does not know are ignored."""
        ...

    async def cancel(self, request_id: RequestId) -> None:
        """Take a request out of the queue, or release the lease that it was granted meanwhile; one way."""
        ...

    def generate(
        self, lease: Grant, request: GenerateRequest, shortcut: Shortcut | None = None
    ) -> AsyncGenerator[bytes | TokenCounts, None]:
        """The answer straight from the lease's replica: bytes for the client, as far as they do not take the shortcut,
        then the counts. `aclose()` ends generation within one token."""
        ...

    async def embed(self, lease: Grant, request: EmbedRequest) -> EmbedResult: ...

    async def fate(self, replica_id: ReplicaId) -> str:
        """How a replica ended, with its process's last words; empty when it is not known to have ended."""
        ...

    async def status(self) -> Status: ...

    async def plan(self, model: str, n_ctx: int | None) -> Plan: ...

    async def load(self, request: RequestArrived) -> LoadResult:
        """Wait in the queue until the model is loaded. A load that has begun goes on when the caller leaves."""
        ...

    async def unload(self, model: str, unless_wanted: bool = False) -> UnloadResult: ...

    async def pin(self, model: str, pinned: bool) -> PinResult: ...

    async def keep_alive(self, model: str, keep_alive_s: float) -> None: ...

    async def models(self) -> list[ModelInfo]: ...

    def notices(self, after_seq: int) -> AsyncIterator[Notice]:
        """What happened after `after_seq` (0: all that is remembered).

        An `after_seq` beyond the newest one (the scheduler restarted meanwhile) counts as 0.
        """
        ...

    async def health(self) -> Health: ...
