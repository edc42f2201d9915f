"""Leases: each is one client's time-limited right to one slot of a replica."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from scheduler.cluster.replica import Replica
from scheduler.units import LeaseId, ReplicaId, RequestId

Ending = Literal["served", "failed", "left"]
"""How a lease ends: after the whole answer, by a failure of the replica, or because the client has disconnected."""


@dataclass(slots=True)
class Lease:
    lease_id: LeaseId
    request_id: RequestId
    replica_id: ReplicaId
    granted_at: float  # seconds of the core's clock
    expires_at: float
    priority: int = 0
    answers: bool = True  # it is for an answer; False: only for loading the model
    fingerprint: str = ""  # of the request


class Leases:
    """Keeps `Replica.leases` equal to the granted leases. `tag` makes ids unique across restarts."""

    def __init__(self, ttl_s: float, tag: str) -> None:
        self.ttl_s = ttl_s
        self._tag = tag
        self._serial = 0
        self._leases: dict[LeaseId, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease_id: LeaseId) -> bool:
        return lease_id in self._leases

    def grant(
        self,
        request_id: RequestId,
        replica: Replica,
        now: float,
        priority: int = 0,
        *,
        answers: bool = True,
        fingerprint: str = "",
    ) -> Lease:
        self._serial += 1
        lease_id = LeaseId(f"lease-{self._tag}{self._serial}")
        lease = Lease(lease_id, request_id, replica.replica_id, now, now + self.ttl_s, priority, answers, fingerprint)
        self._leases[lease_id] = lease
        replica.leases.add(lease.lease_id)
        replica.last_used_at = now
        return lease

    def adopt(self, lease_ids: Iterable[LeaseId], replica: Replica, now: float) -> None:
        """Take over leases of an earlier scheduler whose answers continue; their holders renew and release them."""
        for lease_id in lease_ids:
            self._leases[lease_id] = Lease(lease_id, RequestId(lease_id), replica.replica_id, now, now + self.ttl_s)
            replica.leases.add(lease_id)

    def take_back(self, lease_id: LeaseId) -> Lease | None:
        """Forget the lease; the caller removes it from its replica. None if it is unknown or was dropped before."""
        return self._leases.pop(lease_id, None)

    def drop(self, replica: Replica) -> None:
        """The replica can no longer serve: its leases end."""
        for lease_id in replica.leases:
            del self._leases[lease_id]
        replica.leases.clear()

    def renew(self, lease_ids: Iterable[LeaseId], now: float) -> None:
        for lease_id in lease_ids:
            if lease_id in self._leases:
                self._leases[lease_id].expires_at = now + self.ttl_s

    def of(self, replica: Replica) -> list[Lease]:
        return [self._leases[lease_id] for lease_id in sorted(replica.leases)]

    def of_request(self, request_id: RequestId) -> list[Lease]:
        return [lease for lease in self._leases.values() if lease.request_id == request_id]

    def all(self) -> list[Lease]:
        return list(self._leases.values())

    def expired(self, now: float) -> list[Lease]:
        return [lease for lease in self._leases.values() if now >= lease.expires_at]
