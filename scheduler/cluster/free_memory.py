"""How much memory is free on a node, now or after some replicas are gone. All figures are integer bytes.

    free = capacity - max(reserve, foreign) - booked        per device          foreign: in use, but not by us
    free = capacity - reserve - foreign - booked            host RAM            booked: held, promised, releasing

foreign = used - ours. *Ours* is the part of a reading that our replicas use. It is known exactly for ready replicas, or
if the driver tells bytes per process. While a replica loads or stops, it may be anything up to its booking. Then the
former estimate of foreign memory is kept as far as possible. File-backed pages of loaded models count as ours, although
the kernel shows them as available.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from scheduler.cluster.inventory import Device, Inventory, Node
from scheduler.cluster.ledger import STATES, EntryState, Ledger, device_account, host_account
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.cluster.replicas import Replicas
from scheduler.config import Policy, Reserves
from scheduler.errors import InvariantBroken
from scheduler.units import DeviceId, NodeId, ReplicaId

NO_LIMIT = 1 << 30
STAYING = (ReplicaState.PENDING, ReplicaState.LOADING, ReplicaState.READY)
SETTLING_S = 2.0  # a reading from the time of the load may arrive this long after the replica is ready


@dataclass(frozen=True, slots=True)
class Room:
    """Free bytes per usable device and in host RAM, and how many more models may be active."""

    devices: Mapping[DeviceId, int] = field(default_factory=dict)
    host_bytes: int = 0
    active: int = NO_LIMIT


ELSEWHERE = Room(active=1)
"""What the eviction of a replica on another node frees."""


@dataclass(frozen=True, slots=True)
class View:
    """A node's room as a function of the evicted replicas. `staying`: the room without any eviction. `freed`: what the
    eviction of each replica would add."""

    staying: Room
    freed: Mapping[ReplicaId, Room]

    def without(self, victims: Iterable[ReplicaId]) -> Room:
        devices = dict(self.staying.devices)
        host_bytes, active = self.staying.host_bytes, self.staying.active
        for victim in victims:
            freed = self.freed.get(victim, ELSEWHERE)
            for device_id, count in freed.devices.items():
                devices[device_id] += count
            host_bytes += freed.host_bytes
            active += freed.active
        return Room(devices, host_bytes, active)


class Rooms:
    """Computes `Room`s from the inventory and the books, in one pass over a node's devices and replicas. The result of
    `now` is remembered until the node has `changed`."""

    def __init__(
        self,
        inventory: Inventory,
        ledger: Ledger,
        replicas: Replicas,
        policy: Policy,
        reserves: Reserves,
    ) -> None:
        self._inventory = inventory
        self._ledger = ledger
        self._replicas = replicas
        self._policy = policy
        self._reserves = reserves
        self._now: dict[NodeId, Room] = {}

    # ------------------------------------------------------------------ rooms

    def now(self, node_id: NodeId) -> Room:
        """The room at this moment: stopping replicas are still charged, and so are promises."""
        if self._policy.max_active_models:  # changes on other nodes count here, too
            return self._room(node_id, STATES, tuple(ReplicaState))
        if node_id not in self._now:
            self._now[node_id] = self._room(node_id, STATES, tuple(ReplicaState))
        return self._now[node_id]

    def changed(self, node_id: NodeId) -> None:
        """Bookings or readings of the node have changed."""
        self._now.pop(node_id, None)

    def check(self) -> None:
        """Raise InvariantBroken if something has changed without a call of `changed`."""
        for node_id, kept in self._now.items():
            if kept != self._room(node_id, STATES, tuple(ReplicaState)):
                raise InvariantBroken(
                    f"the room of {node_id} is {self._room(node_id, STATES, tuple(ReplicaState))}, not {kept}"
                )

    def to_start(self, pending: Replica) -> Room:
        """The room for a promised replica at this moment. Other promises do not count: only the books keep them."""
        others = (ReplicaState.LOADING, ReplicaState.READY, ReplicaState.STOPPING)
        return self._room(pending.placement.node_id, ("held", "releasing"), others)

    def view(self, node_id: NodeId) -> View:
        """The room when all stopping replicas are gone."""
        room = self._room(node_id, ("held", "promised"), STAYING)
        if self._inventory.nodes[node_id].silent:
            return View(room, {})  # an eviction there would make no room
        staying = (r for r in self._replicas.on_node(node_id) if r.state in STAYING)
        return View(room, {replica.replica_id: self._freed(replica, node_id, room) for replica in staying})

    def without(self, node_id: NodeId, victims: Iterable[ReplicaId]) -> Room:
        """The room when `victims` and all stopping replicas are gone."""
        return self.view(node_id).without(victims)

    def empty(self, node_id: NodeId, keeping: Iterable[Replica] = ()) -> Room:
        """The node with only the replicas `keeping` on it, without foreign memory, and with every device usable."""
        node = self._inventory.nodes[node_id]
        devices = {
            device_id: device.facts.total_bytes - self.device_reserve(node, device)
            for device_id, device in node.devices.items()
        }
        host_bytes = node.facts.memory_total_bytes - self._reserves.host_bytes
        room = Room(devices, host_bytes, self._policy.max_active_models or NO_LIMIT)
        for replica in keeping:
            kept = self._freed(replica, node_id, room)
            for device_id, count in kept.devices.items():
                devices[device_id] -= count
            room = Room(devices, room.host_bytes - kept.host_bytes, room.active - kept.active)
        return room

    def _room(self, node_id: NodeId, entries: Sequence[EntryState], states: Sequence[ReplicaState]) -> Room:
        """The room that bookings in `entries` and replicas in `states` leave."""
        node, booked = self._inventory.nodes[node_id], self._ledger.booked
        if node.silent:
            return Room()
        devices = {}
        for device_id, device in node.devices.items():
            if device.usable:
                others = max(self.device_reserve(node, device), device.foreign_bytes)
                devices[device_id] = device.facts.total_bytes - others - booked(device_account(device_id), *entries)
        host = node.facts.memory_total_bytes - self._reserves.host_bytes - booked(host_account(node_id), *entries)
        return Room(
            devices,
            host - node.foreign_bytes,
            self._policy.max_active_models - self._replicas.count(*states)
            if self._policy.max_active_models
            else NO_LIMIT,
        )

    def _freed(self, replica: Replica, node_id: NodeId, room: Room) -> Room:
        placement = replica.placement
        if placement.node_id != node_id:
            return ELSEWHERE
        amounts = {d: self._ledger.amount(replica.replica_id, device_account(d)) for d in placement.device_ids}
        return Room(
            {device_id: amount for device_id, amount in amounts.items() if device_id in room.devices},
            self._ledger.amount(replica.replica_id, host_account(node_id)),
            active=1,
        )

    # ------------------------------------------------------------------ other people's memory

    def device_reserve(self, node: Node, device: Device) -> int:
        facts = device.facts
        by_name = self._reserves.gpus
        for name in (str(facts.device_id), f"{node.facts.hostname}/{facts.label}", facts.label):
            if name in by_name:
                return by_name[name]
        return self._reserves.gpu_bytes

    def attribute_device(self, device: Device, now: float) -> None:
        """Compute from a new reading how much of the device other programs use."""
        self.changed(device.facts.node_id)
        reading = device.reading
        if reading is None or reading.lost_reason:
            return
        account = device_account(device.facts.device_id)
        least = most = 0
        for replica in self._replicas.on_node(device.facts.node_id):
            amount = self._ledger.amount(replica.replica_id, account)
            if amount and replica.state is not ReplicaState.PENDING:
                if reading.processes is not None and replica.pid:
                    seen = min(amount, reading.processes.get(replica.pid, 0))
                    least, most = least + seen, most + seen
                else:
                    least, most = least + (amount if _settled(replica, now) else 0), most + amount
        used = device.facts.total_bytes - reading.free_bytes
        device.foreign_bytes = _estimate(device.foreign_bytes, used, least, most)

    def attribute_host(self, node: Node, now: float) -> None:
        """Compute from a new reading how much of the node's RAM other programs use."""
        self.changed(node.facts.node_id)
        if node.reading is None:
            return
        least = most = 0
        for replica in self._replicas.on_node(node.facts.node_id):
            if replica.state is not ReplicaState.PENDING:
                booked = self._ledger.amount(replica.replica_id, host_account(node.facts.node_id))
                if _settled(replica, now):
                    least += min(booked, replica.placement.host_resting_bytes)
                most += min(booked, replica.anonymous_bytes)
        used = node.facts.memory_total_bytes - node.reading.memory_available_bytes
        node.foreign_bytes = _estimate(node.foreign_bytes, used, least, most)


def _settled(replica: Replica, now: float) -> bool:
    """Whether a reading that arrives now shows all that the replica holds."""
    return replica.state is ReplicaState.READY and now - replica.ready_at >= SETTLING_S


def _estimate(before: int, used: int, least: int, most: int) -> int:
    """Foreign bytes among `used`, if between `least` and `most` of these are ours: as before, if this is possible."""
    return min(max(before, used - most, 0), max(0, used - least))
