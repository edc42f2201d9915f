"""Where a runner answers requests, and how somebody proves that they may ask there."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field

from scheduler.units import LeaseId, NodeId

_DIGEST, _DIGEST_BYTES = "sha256", 32
LONGEST_PROOF_BYTES = 256


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`name`: of the runner's Unix socket, in the abstract namespace of its node; `host` and `port`: for gateways on
    other nodes. `secret` goes from the runner through the scheduler to gateways, and nowhere else."""

    node_id: NodeId
    name: str
    host: str
    port: int
    secret: bytes = field(repr=False)

    def proof(self, lease_id: LeaseId) -> bytes:
        """Proves that its sender may speak for the lease: an HMAC under the secret, then the lease."""
        lease = lease_id.encode()
        return hmac.digest(self.secret, lease, _DIGEST) + lease

    def proved(self, proof: bytes) -> LeaseId | None:
        """The lease that `proof` is for; None when it is wrong, however wrong, after the same time."""
        given, lease = proof[:_DIGEST_BYTES], proof[_DIGEST_BYTES:]
        if not hmac.compare_digest(given, hmac.digest(self.secret, lease, _DIGEST)):
            return None
        return LeaseId(lease.decode())
