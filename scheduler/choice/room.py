"""How much is free on a node, now or once some replicas are gone.

    free = capacity - max(reserve, foreign) - booked        per device          foreign: in use, but not by us
    free = capacity - reserve - foreign - booked            host RAM            booked: held, promised, coming back

in integer bytes. With foreign = used - what our replicas account for, this is the live reading minus what is still to
be allocated, bounded by the books. What a replica accounts for in a reading is known when it is ready, or when the
driver tells bytes per process; while it loads or stops it is anything up to its booking, and the former estimate of
foreign memory is kept as far as that allows. File-backed pages of loaded models count as ours although the kernel shows
them as available.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from scheduler.cluster.inventory import Device, Inventory, Node
from scheduler.cluster.ledger import AccountId, Ledger, device_account, host_account
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.config import Policy, Reserves
from scheduler.units import DeviceId, NodeId, ReplicaId

NO_LIMIT = 1 << 30
SETTLING_S = 2.0  # a reading taken while a replica was still loading may arrive so long after it is ready


@dataclass(frozen=True, slots=True)
class Room:
    """Free bytes per usable device and in host RAM, seats for replicas that compute on the CPU, active models left."""

    devices: Mapping[DeviceId, int] = field(default_factory=dict)
    host_bytes: int = 0
    cpu_seats: int = 0
    active: int = NO_LIMIT


@dataclass(frozen=True, slots=True)
class View:
    """A node's room as a function of who goes: `staying` with nobody gone, and what each replica would give back."""

    staying: Room
    freed: Mapping[ReplicaId, Room]

    def without(self, victims: Iterable[ReplicaId]) -> Room:
        devices = dict(self.staying.devices)
        host_bytes, cpu_seats, active = self.staying.host_bytes, self.staying.cpu_seats, self.staying.active
        for victim in victims:
            freed = self.freed[victim]
            for device_id, count in freed.devices.items():
                devices[device_id] += count
            host_bytes += freed.host_bytes
            cpu_seats += freed.cpu_seats
            active += freed.active
        return Room(devices, host_bytes, cpu_seats, active)


class Rooms:
    """Computes `Room`s from the inventory and the books; each costs one pass over the bookings."""

    def __init__(
        self,
        inventory: Inventory,
        ledger: Ledger,
        replicas: Mapping[ReplicaId, Replica],
        policy: Policy,
        reserves: Reserves,
    ) -> None:
        self._inventory = inventory
        self._ledger = ledger
        self._replicas = replicas
        self._policy = policy
        self._reserves = reserves

    # ------------------------------------------------------------------ rooms

    def now(self, node_id: NodeId) -> Room:
        """What can be given away this moment: stopping replicas are still charged, and so is what is promised."""
        return self._room(node_id, self._ledger.totals("held", "releasing", "promised"), self._replicas.values())

    def to_start(self, pending: Replica) -> Room:
        """What a promised replica can take this moment: other promises are kept by the books, not from live memory."""
        others = [r for r in self._replicas.values() if r.state is not ReplicaState.PENDING]
        return self._room(pending.placement.node_id, self._ledger.totals("held", "releasing"), others)

    def view(self, node_id: NodeId) -> View:
        """The room when all stopping replicas are gone."""
        staying = [r for r in self._replicas.values() if r.state is not ReplicaState.STOPPING]
        room = self._room(node_id, self._ledger.totals("held", "promised"), staying)
        return View(room, {replica.replica_id: self._freed(replica, node_id, room) for replica in staying})

    def without(self, node_id: NodeId, victims: Iterable[ReplicaId]) -> Room:
        """The room when `victims` and all stopping replicas are gone."""
        return self.view(node_id).without(victims)

    def empty(self, node_id: NodeId, keeping: Iterable[Replica] = ()) -> Room:
        """The node with only the replicas `keeping` on it, nothing foreign, and every device well."""
        node = self._inventory.nodes[node_id]
        devices = {
            device_id: device.facts.total_bytes - self.device_reserve(node, device)
            for device_id, device in node.devices.items()
        }
        host_bytes = node.facts.memory_total_bytes - self._reserves.host_bytes
        room = Room(devices, host_bytes, node.facts.physical_cores, self._policy.max_active_models or NO_LIMIT)
        for replica in keeping:
            kept = self._freed(replica, node_id, room)
            for device_id, count in kept.devices.items():
                devices[device_id] -= count
            room = Room(
                devices, room.host_bytes - kept.host_bytes, room.cpu_seats - kept.cpu_seats, room.active - kept.active
            )
        return room

    def _room(self, node_id: NodeId, booked: Mapping[AccountId, int], staying: Iterable[Replica]) -> Room:
        node = self._inventory.nodes[node_id]
        devices = {}
        for device_id, device in node.devices.items():
            if device.usable:
                others = max(self.device_reserve(node, device), device.foreign_bytes)
                devices[device_id] = device.facts.total_bytes - others - booked.get(device_account(device_id), 0)
        host = node.facts.memory_total_bytes - self._reserves.host_bytes - booked.get(host_account(node_id), 0)
        active, seated = 0, 0
        for replica in staying:
            active += 1
            seated += replica.placement.computes_on_cpu and replica.placement.node_id == node_id
        return Room(
            devices,
            host - node.foreign_bytes,
            node.facts.physical_cores - seated,
            (self._policy.max_active_models or NO_LIMIT) - active,
        )

    def _freed(self, replica: Replica, node_id: NodeId, room: Room) -> Room:
        placement = replica.placement
        if placement.node_id != node_id:
            return Room(active=1)
        amounts = {d: self._ledger.amount(replica.replica_id, device_account(d)) for d in placement.device_ids}
        return Room(
            {device_id: amount for device_id, amount in amounts.items() if device_id in room.devices},
            self._ledger.amount(replica.replica_id, host_account(node_id)),
            int(placement.computes_on_cpu),
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
        """Work out from a new reading how much of the device others use."""
        reading = device.reading
        if reading is None or reading.lost_reason:
            return
        account = device_account(device.facts.device_id)
        least = most = 0
        for replica in self._replicas.values():
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
        """Work out from a new reading how much of the node's RAM others use."""
        if node.reading is None:
            return
        least = most = 0
        for replica in self._replicas.values():
            if replica.placement.node_id == node.facts.node_id and replica.state is not ReplicaState.PENDING:
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
    """Foreign bytes among `used`, of which between `least` and `most` are ours: as before, if that can be."""
    return min(max(before, used - most, 0), max(0, used - least))
