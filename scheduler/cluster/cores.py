"""CPU cores are shared like memory: replicas that compute on the CPU divide their node's physical cores evenly.

Never more threads in all than cores: two models decoding at once with more threads than cores are several times slower
than with a fair share each. A replica that leaves gives its cores to those that stay.
"""

from __future__ import annotations

from scheduler.cluster.ledger import Ledger, cores_account
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.cluster.replicas import Replicas
from scheduler.units import NodeId


class CoreShares:
    """Books threads on each node's cores account and keeps `Replica.n_threads` equal to what is booked."""

    def __init__(self, ledger: Ledger, replicas: Replicas) -> None:
        self._ledger = ledger
        self._replicas = replicas

    def share(self, node_id: NodeId, newcomers: int = 0) -> int:
        """Threads for each replica that computes on this node's CPU, those still waiting for room and `newcomers`
        that are yet to be placed included."""
        sharers = max(1, len(self._on_cpu(node_id)) + newcomers)
        return max(1, self._ledger.capacity(cores_account(node_id)) // sharers)

    def balance(self, node_id: NodeId) -> list[Replica]:
        """Give everyone the fair share: the ones with more shrink first, then the others grow into cores that nobody
        books. Returns the replicas whose threads changed."""
        account, share = cores_account(node_id), self.share(node_id)
        changed = []
        for replica in sorted(self._on_cpu(node_id), key=lambda replica: -replica.n_threads):
            if self._ledger.state(replica.replica_id) is None:
                continue
            n_threads = min(share, replica.n_threads + max(0, self._free(node_id)))
            if n_threads != replica.n_threads:
                replica.n_threads = n_threads
                self._ledger.rebook(replica.replica_id, account, n_threads)
                changed.append(replica)
        return changed

    def take_free(self, replica: Replica) -> bool:
        """Fit a promised replica's threads into the cores that are free now; False when there is none."""
        node_id = replica.placement.node_id
        free = self._free(node_id) + self._ledger.amount(replica.replica_id, cores_account(node_id))
        if free < 1:
            return False
        if replica.n_threads > free:
            replica.n_threads = free
            self._ledger.rebook(replica.replica_id, cores_account(node_id), free)
        return True

    def _free(self, node_id: NodeId) -> int:
        account = cores_account(node_id)
        return self._ledger.capacity(account) - self._ledger.booked(account, "held", "releasing", "promised")

    def _on_cpu(self, node_id: NodeId) -> list[Replica]:
        return [
            replica
            for replica in self._replicas.on_node(node_id)
            if replica.placement.computes_on_cpu and replica.state is not ReplicaState.STOPPING
        ]
