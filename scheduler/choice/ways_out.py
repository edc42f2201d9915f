"""For a model that has no place: the smallest changes each of which alone would give it one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from scheduler.choice.groups import groups
from scheduler.choice.reasons import context_that_fits
from scheduler.choice.room import Room
from scheduler.choice.search import Search
from scheduler.cluster.inventory import Node
from scheduler.units import MIB, DeviceId, format_bytes

STEP_BYTES = 64 * MIB
"""Memory that is missing is said to this much."""
MOST_NODES = 4
"""Machines for which it is worked out: it takes some milliseconds for each of their devices."""
_SPARE_STEPS = 128
"""More than buffers take that are not weights or cache; with twice these two and so much, any model fits."""


def ways_out(search: Search, fits_unpinned: Callable[[frozenset[str]], bool], *, never: bool) -> tuple[str, ...]:
    """A shorter context (for what fits `never`), models that are pinned, memory on the GPU for which it is least, and
    host RAM. `fits_unpinned`: whether there would be a place if such models were not protected."""
    n_ctx = context_that_fits(search) if never else 0
    ways = [f"n_ctx <= {n_ctx}"] if n_ctx else []
    return (*ways, *_unpinned(search, fits_unpinned), *_more_memory(search))


def _unpinned(search: Search, fits_unpinned: Callable[[frozenset[str]], bool]) -> list[str]:
    """Single protected models, or all of them, without whose protection there would be a place."""
    kept = sorted({replica.model for replica in search.replicas.values() if search.protected(replica)})
    helped = [name for name in kept if fits_unpinned(frozenset({name}))]
    if helped or len(kept) < 2:
        return [f"unpin {name}" for name in helped]
    return [f"unpin {', '.join(kept)}"] if fits_unpinned(frozenset(kept)) else []


def _more_memory(search: Search) -> list[str]:
    devices: list[tuple[int, str]] = []
    memories: list[tuple[int, str]] = []
    for node in search.nodes[:MOST_NODES]:
        # what could be had with everybody gone who may be stopped
        here = search.replicas.on_node(node.facts.node_id)
        gone = [replica.replica_id for replica in here if not search.protected(replica)]
        room = search.outlook.without(node.facts.node_id, gone)
        on = f" of {node.facts.hostname}" if len(search.nodes) > 1 else ""
        alike = {(d.product, d.total_bytes, room.devices.get(d.device_id)): d for d in search.need.wishes.devices(node)}
        for device in alike.values():
            more = _missing(search, node, partial(_with_device, room, device.device_id))
            if more:
                devices.append((more, f"{format_bytes(more)} more on {device.label}{on}"))
        more = _missing(search, node, partial(_with_host, room))
        if more:
            memories.append((more, f"{format_bytes(more)} more host RAM{on}"))
    return [min(found)[1] for found in (devices, memories) if found]


def _with_device(room: Room, device_id: DeviceId, extra: int) -> Room:
    return replace(room, devices={**room.devices, device_id: room.devices.get(device_id, 0) + extra})


def _with_host(room: Room, extra: int) -> Room:
    return replace(room, host_bytes=room.host_bytes + extra)


def _missing(search: Search, node: Node, room_with: Callable[[int], Room]) -> int:
    """The least extra bytes, to `STEP_BYTES`, with which the model fits on the node somehow; 0: no amount helps."""
    ways = groups(search.need, [node])

    def fits(steps: int) -> bool:
        room = room_with(steps * STEP_BYTES)
        roomiest = (way.roomiest(node, room) for way in ways)
        return any(candidate is not None and search.feasible(candidate, room) for candidate in roomiest)

    enough = -(-2 * search.need.least_bytes() // STEP_BYTES) + _SPARE_STEPS
    if not fits(enough):
        return 0
    high = 1
    while not fits(high):
        high = min(2 * high, enough)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * STEP_BYTES
