"""What the gateway asks the scheduler for, and gets: records that cross a process border, frozen and picklable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scheduler.costs.paces import Pace
from scheduler.units import LeaseId, ReplicaId, RequestId


@dataclass(frozen=True, slots=True)
class AcquireRequest:
    """A request for a slot. `n_ctx`: tokens that the slot must hold (None: what the catalogue says).

    `deadline_s`: seconds the caller will wait for a slot from now on (None: as long as it takes). `priority`: None is
    the model's. `key`: the name of the API key. `prefix`: a hash of what the prompt begins with. `fingerprint`: a hash
    of all that is asked: a request that ends runners is known by it when it comes again.
    """

    request_id: RequestId
    model: str
    n_ctx: int | None = None
    kind: Literal["generate", "embed", "load"] = "generate"
    deadline_s: float | None = None
    priority: int | None = None
    key: str = ""
    prefix: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """A time-limited right to a slot of `n_ctx` tokens, renewed within `ttl_s` seconds (the same for every lease).

    `runner` is the name of the replica's actor.
    """

    lease_id: LeaseId
    replica_id: ReplicaId
    runner: str
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
