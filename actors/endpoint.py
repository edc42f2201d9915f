"""Where a runner, or the scheduler, answers gateways, and how these prove that they may ask there."""

from __future__ import annotations

import hmac
import secrets
import socket
from dataclasses import dataclass, field

from scheduler.units import LeaseId, NodeId

_DIGEST, _DIGEST_BYTES = "sha256", 32
LONGEST_PROOF_BYTES = 256
_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`name`: of a Unix socket, in the abstract namespace of its node; `host` and `port`: for gateways on other nodes.
    `secret` goes to the scheduler and to gateways, and nowhere else."""

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


def listen(node_id: NodeId, host: str) -> tuple[Endpoint, tuple[socket.socket, socket.socket]]:
    """A new endpoint on this node, with a secret of its own, and the two sockets that listen there: Unix and TCP."""
    name = f"arriero-{secrets.token_hex(16)}"
    here = socket.socket(socket.AF_UNIX)
    here.bind(f"\0{name}")
    here.listen(_BACKLOG)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    there = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    return Endpoint(node_id, name, host, there.getsockname()[1], secrets.token_bytes(32)), (here, there)
