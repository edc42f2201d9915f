"""All replicas by id, and the views of them that decisions ask for: of a model, on a node, in a state.

Looking through every replica for each event costs what the cluster is large; these are kept as they change instead.
Insertion order is kept in every view, so that decisions do not depend on hashes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.units import NodeId, ReplicaId


class Replicas(Mapping[ReplicaId, Replica]):
    """A mapping that only the fleet changes. Views are snapshots: what is changed meanwhile does not disturb them."""

    def __init__(self) -> None:
        self._all: dict[ReplicaId, Replica] = {}
        self._of_model: dict[str, dict[ReplicaId, Replica]] = {}
        self._on_node: dict[NodeId, dict[ReplicaId, Replica]] = {}
        self._by_use: dict[ReplicaId, Replica] = {}
        self._in_state: dict[ReplicaState, dict[ReplicaId, Replica]] = {state: {} for state in ReplicaState}

    def __getitem__(self, replica_id: ReplicaId) -> Replica:
        return self._all[replica_id]

    def __iter__(self) -> Iterator[ReplicaId]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, replica_id: object) -> bool:
        return replica_id in self._all

    def of_model(self, model: str) -> Sequence[Replica]:
        return tuple(self._of_model.get(model, {}).values())

    def on_node(self, node_id: NodeId) -> Sequence[Replica]:
        return tuple(self._on_node.get(node_id, {}).values())

    def in_state(self, *states: ReplicaState) -> Sequence[Replica]:
        return tuple(replica for state in states for replica in self._in_state[state].values())

    def count(self, *states: ReplicaState) -> int:
        return sum(len(self._in_state[state]) for state in states)

    def add(self, replica: Replica) -> None:
        self._all[replica.replica_id] = self._by_use[replica.replica_id] = replica
        for view in self._views(replica):
            view[replica.replica_id] = replica

    def remove(self, replica: Replica) -> None:
        del self._all[replica.replica_id], self._by_use[replica.replica_id]
        for view in self._views(replica):
            del view[replica.replica_id]
        if not self._of_model[replica.model]:
            del self._of_model[replica.model]
        if not self._on_node[replica.placement.node_id]:
            del self._on_node[replica.placement.node_id]

    def used(self, replica: Replica) -> None:
        """It was used just now."""
        del self._by_use[replica.replica_id]
        self._by_use[replica.replica_id] = replica

    def least_recently_used(self) -> Iterator[Replica]:
        """All of them, used longest ago first; not to be changed meanwhile."""
        return iter(self._by_use.values())

    def become(self, replica: Replica, state: ReplicaState) -> None:
        """Change the replica's state. Raises InvariantBroken, and changes nothing, for a step that its table lacks."""
        before = replica.state
        replica.become(state)
        del self._in_state[before][replica.replica_id]
        self._in_state[state][replica.replica_id] = replica

    def _views(self, replica: Replica) -> tuple[dict[ReplicaId, Replica], ...]:
        return (
            self._of_model.setdefault(replica.model, {}),
            self._on_node.setdefault(replica.placement.node_id, {}),
            self._in_state[replica.state],
        )
