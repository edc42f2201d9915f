"""What the gateway gets from the scheduler for a request, and gives back: frozen and picklable."""

from __future__ import annotations

from dataclasses import dataclass

from actors.endpoint import Endpoint
from scheduler.costs.paces import Pace
from scheduler.units import LeaseId, ReplicaId


@dataclass(frozen=True, slots=True)
class Grant:
    """A time-limited right to a slot of `n_ctx` tokens, renewed within `ttl_s` seconds (the same for every lease).

    `endpoint`: where its runner answers; None when that has ended meanwhile.
    """

    lease_id: LeaseId
    replica_id: ReplicaId
    endpoint: Endpoint | None
    model: str
    ttl_s: float
    n_ctx: int


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What a lease was used for; zeros where the answer broke off before its last chunk."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    pace: Pace | None = None
