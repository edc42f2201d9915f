"""The room on each machine during one decision: now, without some replicas, and empty.

Some models must not share a GPU (`not_with`). A device with a replica of such a model has no room while the replica
stays. Every room is computed once in a decision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from scheduler.choice.eviction import Victims
from scheduler.cluster.free_memory import Room, Rooms, View
from scheduler.cluster.inventory import Node
from scheduler.cluster.replica import Replica
from scheduler.cluster.replicas import Replicas
from scheduler.units import NodeId, ReplicaId


@dataclass(slots=True)
class Snapshot:
    """`apart`: replicas that must not share a GPU with the model."""

    rooms: Rooms
    replicas: Replicas
    apart: Victims = frozenset()
    _views: dict[NodeId, View] = field(default_factory=dict)
    _now: dict[NodeId, Room] = field(default_factory=dict)
    _empty: dict[NodeId, Room] = field(default_factory=dict)

    def now(self, node_id: NodeId) -> Room:
        if node_id not in self._now:
            self._now[node_id] = self._open(self.rooms.now(node_id), self.replicas.on_node(node_id), frozenset())
        return self._now[node_id]

    def without(self, node_id: NodeId, victims: Iterable[ReplicaId]) -> Room:
        """The room after the `victims` are gone, and all replicas that are already stopping."""
        if node_id not in self._views:
            self._views[node_id] = self.rooms.view(node_id)
        view = self._views[node_id]
        if not self.apart:
            return view.without(victims)
        gone = frozenset(victims)
        staying = (replica for replica in self.replicas.on_node(node_id) if replica.replica_id in view.freed)
        return self._open(view.without(gone), staying, gone)

    def empty(self, node_id: NodeId, keeping: Iterable[Replica] = ()) -> Room:
        """The room with only the replicas `keeping`, without memory of other programs, and with every device usable."""
        keeping = tuple(keeping)
        if not keeping and node_id in self._empty:
            return self._empty[node_id]
        room = self._open(self.rooms.empty(node_id, keeping), keeping, frozenset())
        if not keeping:
            self._empty[node_id] = room
        return room

    def unlike(self, nodes: Iterable[Node], keeping: Iterable[Replica] = ()) -> Iterator[tuple[Node, Room]]:
        """Machines and their rooms with only the replicas `keeping` on them. Of equal machines, only one."""
        seen = set()
        for node in nodes:
            room = self.empty(node.facts.node_id, keeping)
            kind = tuple(device.product for device in node.facts.devices), tuple(room.devices.values()), room.host_bytes
            if kind not in seen:
                seen.add(kind)
                yield node, room

    def _open(self, room: Room, staying: Iterable[Replica], gone: Victims) -> Room:
        """The room without the devices that are closed to this model."""
        if not self.apart:
            return room
        there = (r for r in staying if r.replica_id in self.apart and r.replica_id not in gone)
        closed = {device_id for replica in there for device_id in replica.placement.device_ids}
        return replace(room, devices={d: 0 if d in closed else free for d, free in room.devices.items()})
