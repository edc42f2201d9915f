"""A backend that grants everything; answers come over the road, from a real listener."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from actors.endpoint import Endpoint
from actors.gateway.ray_backend import RayBackend
from actors.leasing import Grant, TokenCounts
from scheduler.cluster.leases import Ending
from scheduler.events import RequestArrived
from scheduler.units import LeaseId, NodeId, ReplicaId, RequestId

NODE = NodeId("here")
TTL_S = 60.0


class Granting(RayBackend):
    """Knows one runner."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(None, NODE)
        self._endpoint = endpoint
        self._serial = itertools.count(1)

    async def acquire(self, request: RequestArrived) -> Grant:
        lease = LeaseId(f"l{next(self._serial)}")
        return Grant(lease, ReplicaId("r"), self._endpoint, request.model, TTL_S, 4096)

    async def renew(self, lease_ids: Sequence[LeaseId]) -> None: ...

    async def release(self, lease_id: LeaseId, ending: Ending, usage: TokenCounts) -> None: ...

    async def cancel(self, request_id: RequestId) -> None: ...

    async def fate(self, replica_id: ReplicaId) -> str:
        return ""
