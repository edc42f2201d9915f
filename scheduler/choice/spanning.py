"""For a model that has no place: whether several machines together have enough memory, if no single one has.

Arriero does not spread a model over machines. A refusal says so, because users may add up the free memory of all
machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scheduler.choice.explain import Rejection
from scheduler.choice.tiers import tiers_of
from scheduler.choice.workload import Wishes, Workload
from scheduler.cluster.free_memory import Room
from scheduler.cluster.inventory import Node
from scheduler.units import NodeId, format_bytes

SEVERAL_MACHINES = "several machines"
MOST_MACHINES = 16
"""More would not help: this is llama.cpp's limit on devices (`llama_max_devices`)."""


def over_machines(workload: Workload, rooms: Sequence[tuple[Node, Room]]) -> tuple[Rejection, ...]:
    """The rejection which says that the model would fit over several machines, the fewest that hold it. Empty if it
    would not. `rooms`: each machine with its room."""
    allowed = [(node, _part(workload, node, room)) for node, room in rooms if workload.wishes.allow(node)]
    largest = sorted(allowed, key=lambda each: (-sum(each[1].devices.values()), -each[1].host_bytes))[:MOST_MACHINES]
    wishes = Wishes(spill=workload.wishes.spill, max_gpus=workload.wishes.max_gpus)
    anywhere = replace(workload, wishes=wishes, precision="bound", known={})
    for count in range(2, len(largest) + 1):
        some = largest[:count]
        if _fits_together(anywhere, some):
            names = ", ".join(node.facts.hostname for node, _ in some)
            needs = format_bytes(workload.least_bytes())
            why = f"its {needs} would fit over {count} machines together, but a model does not span machines yet"
            return (Rejection(SEVERAL_MACHINES, names, why),)
    return ()


def _part(workload: Workload, node: Node, room: Room) -> Room:
    """The room on the devices that may be used."""
    usable = (device.device_id for device in workload.wishes.devices(node))
    return replace(room, devices={each: max(0, room.devices.get(each, 0)) for each in usable})


def _fits_together(workload: Workload, some: Sequence[tuple[Node, Room]]) -> bool:
    """Whether the model fits on an imaginary machine with the devices and the RAM of all these machines."""
    nodes, rooms = zip(*some, strict=True)
    room = Room(
        devices={device_id: free for each in rooms for device_id, free in each.devices.items() if free},
        host_bytes=sum(max(0, each.host_bytes) for each in rooms),
        active=min(each.active for each in rooms),
    )
    if sum(room.devices.values()) + workload.wishes.spill * room.host_bytes < workload.least_bytes():
        return False
    devices = {d: device for node in nodes for d, device in node.devices.items() if d in room.devices}
    facts = replace(
        nodes[0].facts,
        node_id=NodeId("+".join(node.facts.node_id for node in nodes)),
        devices=tuple(device.facts for device in devices.values()),
    )
    machine = replace(nodes[0], facts=facts, devices=devices)
    ways = (each.roomiest(machine, room) for each in tiers_of(workload, [machine]) if each.size in (0, len(devices)))
    return any(way is not None and way.feasible(room) for way in ways)
