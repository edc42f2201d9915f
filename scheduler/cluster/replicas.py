"""All replicas by id, and the views of them that decisions need: of a model, on a node, in a state.

A search through all replicas for each event would take longer on a larger cluster. So the views are updated at each
change. Every view keeps the insertion order, so that decisions do not depend on hashes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.units import NodeId, ReplicaId

K = TypeVar("K")


class Replicas(Mapping[ReplicaId, Replica]):
    """A mapping that only the fleet changes. Views are snapshots: later changes do not affect them."""

    def __init__(self) -> None:
        self._all: dict[ReplicaId, Replica] = {}
        self._of_model: dict[str, tuple[Replica, ...]] = {}
        self._on_node: dict[NodeId, tuple[Replica, ...]] = {}
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
        return self._of_model.get(model, ())

    def on_node(self, node_id: NodeId) -> Sequence[Replica]:
        return self._on_node.get(node_id, ())

    def in_state(self, state: ReplicaState) -> Sequence[Replica]:
        return tuple(self._in_state[state].values())

    def count(self, *states: ReplicaState) -> int:
        return sum([len(self._in_state[state]) for state in states])

    def add(self, replica: Replica) -> None:
        self._all[replica.replica_id] = self._by_use[replica.replica_id] = replica
        self._in_state[replica.state][replica.replica_id] = replica
        self._of_model[replica.model] = (*self.of_model(replica.model), replica)
        node_id = replica.placement.node_id
        self._on_node[node_id] = (*self.on_node(node_id), replica)

    def remove(self, replica: Replica) -> None:
        del self._all[replica.replica_id], self._by_use[replica.replica_id]
        del self._in_state[replica.state][replica.replica_id]
        _take_out(self._of_model, replica.model, replica)
        _take_out(self._on_node, replica.placement.node_id, replica)

    def used(self, replica: Replica) -> None:
        """It was used just now."""
        del self._by_use[replica.replica_id]
        self._by_use[replica.replica_id] = replica

    def least_recently_used(self) -> Iterator[Replica]:
        """All replicas, the least recently used first. No change is allowed during the iteration."""
        return iter(self._by_use.values())

    def become(self, replica: Replica, state: ReplicaState) -> None:
        """Change the replica's state. For a step that is not allowed: raises InvariantBroken and changes nothing."""
        before = replica.state
        replica.become(state)
        del self._in_state[before][replica.replica_id]
        self._in_state[state][replica.replica_id] = replica


def _take_out(view: dict[K, tuple[Replica, ...]], key: K, replica: Replica) -> None:
    left = tuple(each for each in view[key] if each is not replica)
    if left:
        view[key] = left
    else:
        del view[key]
