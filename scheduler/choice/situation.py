"""The input of one decision: the workload, the machines to examine, and what is known about them at that moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduler.choice.appraiser import Appraiser
from scheduler.choice.eviction import Victims, evictable
from scheduler.choice.layouts import LayoutFamily
from scheduler.choice.snapshot import Snapshot
from scheduler.choice.workload import Workload
from scheduler.cluster.free_memory import Room
from scheduler.cluster.inventory import Inventory, Node
from scheduler.cluster.replica import Placement, Replica
from scheduler.cluster.replicas import Replicas
from scheduler.config import Policy


@dataclass(frozen=True, slots=True)
class Situation:
    """`nodes` may be a shortlist of `every_node`. `waited_s`: how long the request has waited already."""

    workload: Workload
    nodes: Sequence[Node]
    every_node: Sequence[Node]
    inventory: Inventory
    snapshot: Snapshot
    replicas: Replicas
    appraiser: Appraiser
    policy: Policy
    now: float
    waited_s: float = 0.0
    outgrown: Victims = frozenset()
    """Replicas of the same model that are too small. They are evicted first, whatever their regret."""
    may_evict: bool = True
    """False: only `outgrown` replicas are evicted."""
    unprotected: frozenset[str] = frozenset()
    """Models whose protection is ignored."""

    def protection(self, replica: Replica) -> str:
        """Why the replica is never evicted, or ""."""
        return "" if replica.model in self.unprotected else self.appraiser.protection(replica)

    def evictable(self, min_residency_s: float) -> list[Replica]:
        """Replicas that may be evicted now, the least regretted first."""
        if not self.may_evict:
            return []
        others = (replica for replica in self.there() if replica.replica_id not in self.outgrown)
        return evictable(others, self.protection, self.now, min_residency_s, self.workload.model, self.appraiser.regret)

    def there(self) -> Iterable[Replica]:
        """Replicas on the machines to examine; all replicas if the number of active models is limited."""
        if self.policy.max_active_models is not None:
            return self.replicas.values()
        return (replica for node in self.nodes for replica in self.replicas.on_node(node.facts.node_id))

    def solve(self, candidate: LayoutFamily, room: Room) -> Placement | None:
        """The candidate's best placement, if it is fast enough for the catalogue."""
        placement = candidate.solve(room)
        wanted = self.workload.wishes.min_tokens_per_s
        if placement is None or not wanted:
            return placement
        tokens_per_s = self.appraiser.tokens_per_s(placement)
        return placement if tokens_per_s is None or tokens_per_s >= wanted else None

    def feasible(self, candidate: LayoutFamily, room: Room) -> bool:
        """Whether the candidate has any placement in the room that is fast enough for the catalogue."""
        if self.workload.wishes.min_tokens_per_s:
            return self.solve(candidate, room) is not None
        return candidate.feasible(room)
