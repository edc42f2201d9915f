"""What machines and GPUs show while processes hold memory there: in simulations, in the soak, in the tests' scenarios.

When things happen and what goes wrong is up to them. Sizes are bytes, times are seconds of the core's clock.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from scheduler.cluster.facts import DeviceFacts, DeviceReading, ModelFile, NodeFacts, NodeReading
from scheduler.cluster.replica import Placement
from scheduler.units import DeviceId, NodeId


@dataclass(eq=False, kw_only=True)
class Process:
    """A runner's process and the memory that it holds, of each GPU and of its machine's RAM (without mapped files)."""

    node_id: NodeId
    pid: int = 0
    device_bytes: dict[DeviceId, int] = field(default_factory=dict)
    anonymous_bytes: int = 0


def loaded(placement: Placement, pid: int = 0, share: float = 1.0) -> Process:
    """A process that holds this share of what the placement was booked with."""
    booked = zip(placement.device_ids, placement.device_bytes, strict=True)
    return Process(
        node_id=placement.node_id,
        pid=pid,
        device_bytes={device_id: int(count * share) for device_id, count in booked},
        anonymous_bytes=int(placement.host_resting_bytes * share),
    )


def free_bytes(device: DeviceFacts, processes: Collection[Process], foreign_bytes: int = 0) -> int:
    """What nobody holds. Below 0 where more is held than there is."""
    return device.total_bytes - foreign_bytes - sum(each.device_bytes.get(device.device_id, 0) for each in processes)


def device_reading(
    device: DeviceFacts, processes: Collection[Process], foreign_bytes: int, at: float, tells_processes: bool = False
) -> DeviceReading:
    """`foreign_bytes` are held by others. `tells_processes`: the driver says which process holds what."""
    free = max(0, free_bytes(device, processes, foreign_bytes))
    held = {each.pid: count for each in processes if (count := each.device_bytes.get(device.device_id, 0))}
    told = held if tells_processes else None
    return DeviceReading(device.device_id, device.total_bytes, free, device.total_bytes - free, at, told)


def node_reading(
    node: NodeFacts, processes: Collection[Process], foreign_bytes: int, at: float, files: tuple[ModelFile, ...]
) -> NodeReading:
    ours = sum(each.anonymous_bytes for each in processes if each.node_id == node.node_id)
    return NodeReading(node.node_id, max(0, node.memory_total_bytes - foreign_bytes - ours), at, files)
