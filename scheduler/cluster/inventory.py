"""The hardware of the cluster: nodes, their devices, the latest reading of each, and how much other programs use.

Only facts, no bookings. `now` is the core's clock in seconds. Only events change anything here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.cluster.facts import DeviceFacts, DeviceReading, NodeFacts, NodeReading
from scheduler.units import DeviceId, NodeId

SILENT_AFTER_S = 10.0  # readings come every second; after this silence, no new models are placed there
OVERDUE_AFTER_S = 30.0  # the time that a new node has to read its host and devices for the first time
OUT_OF_ORDER_S = 5.0  # readings may overtake each other; one that is older than this means that the clock was set back


@dataclass(slots=True)
class Device:
    """`foreign_bytes`: memory in use that no replica of ours explains; it belongs to other programs."""

    facts: DeviceFacts
    reading: DeviceReading | None = None
    read_at: float = 0.0
    silent: bool = False
    foreign_bytes: int = 0

    @property
    def usable(self) -> bool:
        return not self.trouble

    @property
    def trouble(self) -> str:
        """Why no new models are placed on the device, or empty."""
        if self.reading is None:
            return "it has not been read yet"
        if self.reading.lost_reason:
            return f"it is lost: {self.reading.lost_reason}"
        return f"it has not reported for {SILENT_AFTER_S:.0f} s" if self.silent else ""


@dataclass(slots=True)
class Node:
    """`foreign_bytes`: host RAM in use that no replica of ours explains."""

    facts: NodeFacts
    joined_at: float
    reading: NodeReading | None = None
    read_at: float = 0.0
    silent: bool = False
    devices: dict[DeviceId, Device] = field(default_factory=dict)
    foreign_bytes: int = 0
    overdue: bool = False  # waited long enough for devices that never reported
    _all_read: bool = False
    _tells_speeds: bool | None = None

    @property
    def trouble(self) -> str:
        """Why no new models are placed on the machine, or empty."""
        return f"it has not reported for {SILENT_AFTER_S:.0f} s" if self.silent else ""

    @property
    def known(self) -> bool:
        """The host and every device have been read at least once. An earlier decision could overlook a GPU."""
        if not self._all_read:
            devices_read = all(device.reading is not None for device in self.devices.values())
            self._all_read = devices_read and self.reading is not None
        return self._all_read or (self.overdue and self.reading is not None)

    @property
    def tells_speeds(self) -> bool:
        """Whether host and devices tell their rates, so that every placement here has a complete price. Virtual GPUs do
        not: they are as fast as the CPU that they run on."""
        if self._tells_speeds is None:
            rates = (self.facts.rates, *(device.rates for device in self.facts.devices))
            told = all(each.bytes_per_s > 0 and each.flops > 0 for each in rates)
            self._tells_speeds = told and all(device.kind != "rpc" for device in self.facts.devices)
        return self._tells_speeds


class Inventory:
    """Nodes by id; devices by id. Readings with unknown ids are ignored: their node has just left."""

    def __init__(self) -> None:
        self.nodes: dict[NodeId, Node] = {}
        self.changes = 0  # machines that have come or gone so far
        self._devices: dict[DeviceId, Device] = {}

    @property
    def complete(self) -> bool:
        """There is a node, and all nodes are known. Only then is a missing model or a lack of room final."""
        return bool(self.nodes) and all(node.known or node.overdue for node in self.nodes.values())

    def join(self, facts: NodeFacts, now: float) -> None:
        devices = {device.device_id: Device(device) for device in facts.devices}
        self.nodes[facts.node_id] = Node(facts, now, devices=devices)
        self._devices.update(devices)
        self.changes += 1

    def leave(self, node_id: NodeId) -> Node | None:
        node = self.nodes.pop(node_id, None)
        self.changes += 1
        for device_id in node.devices if node else ():
            self._devices.pop(device_id, None)
        return node

    def sample_node(self, reading: NodeReading, now: float) -> Node | None:
        """Store the reading. Returns the node, or None if it is unknown or already has a newer reading."""
        node = self.nodes.get(reading.node_id)
        if node is None or (node.reading and _older(reading.sampled_at_s, node.reading.sampled_at_s)):
            return None
        node.reading, node.read_at, node.silent = reading, now, False
        return node

    def sample_device(self, reading: DeviceReading, now: float) -> Device | None:
        """Store the reading. Returns the device, or None if it is unknown or already has a newer reading."""
        device = self._devices.get(reading.device_id)
        if device is None or (device.reading and _older(reading.sampled_at_s, device.reading.sampled_at_s)):
            return None
        device.reading, device.read_at, device.silent = reading, now, False
        return device

    def age(self, now: float) -> tuple[list[Node], list[Device]]:
        """Time has passed. Returns the nodes and the devices that have just become silent."""
        mute, silent = [], []
        for node in self.nodes.values():
            node.overdue = node.overdue or now - node.joined_at >= OVERDUE_AFTER_S
            if node.reading and not node.silent and now - node.read_at >= SILENT_AFTER_S:
                node.silent = True
                mute.append(node)
            for device in node.devices.values():
                if device.reading and not device.silent and now - device.read_at >= SILENT_AFTER_S:
                    device.silent = True
                    silent.append(device)
        return mute, silent

    def silent_nodes(self) -> list[NodeId]:
        """Nodes that have stopped reporting."""
        return [node_id for node_id, node in self.nodes.items() if node.silent]

    def device(self, device_id: DeviceId) -> Device | None:
        return self._devices.get(device_id)

    def label(self, device_id: DeviceId) -> str:
        """The device's name for people: "gpu0", with the host name when there are several nodes."""
        device = self._devices.get(device_id)
        if device is None:
            return str(device_id)
        host = f" on {self.nodes[device.facts.node_id].facts.hostname}" if len(self.nodes) > 1 else ""
        return device.facts.label + host


def _older(sampled_at_s: float, than_s: float) -> bool:
    return 0.0 < than_s - sampled_at_s < OUT_OF_ORDER_S
