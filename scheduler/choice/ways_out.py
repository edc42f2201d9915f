"""For a model that has no place: the smallest changes, each of which alone would make room for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from heapq import nlargest

from scheduler.choice.appraiser import ALWAYS_LOADED
from scheduler.choice.layouts import CONTEXT_STEP
from scheduler.choice.situation import Situation
from scheduler.choice.tiers import Tier, tiers_of
from scheduler.choice.workload import Precision
from scheduler.cluster.free_memory import Room
from scheduler.cluster.inventory import Node
from scheduler.units import MIB, DeviceId, format_bytes

STEP_BYTES = 64 * MIB
"""Missing memory is given in multiples of this."""
MOST_NODES = 4
"""About as many machines are examined: each of their devices takes some milliseconds."""
BOUND_SLACK, DRAWN = 1.15, 5
"""The bound on compute buffers is assumed to be too high by this factor at most. The exact figure is searched with this
many drawn graphs at most; each takes some ten milliseconds."""
_SLACK_STEPS = 32
"""And too high by this many steps of memory at most."""
SMALLEST_CONTEXT = 2048
"""The smallest context that is proposed, in tokens per slot."""
_SPARE_STEPS = 128
"""More than all buffers besides weights and cache take. Any model fits in twice its weights and cache plus this."""


def ways_out(
    here: Situation, every: Sequence[tuple[Node, Room]], fits_unpinned: Callable[[frozenset[str]], bool]
) -> tuple[str, ...]:
    """A shorter context, fewer protected models, more memory on one GPU, more host RAM. `every`: the result of
    `cleared`. `fits_unpinned`: whether there would be a place if the given models were not protected."""
    rooms = _most_room(every)
    n_ctx = _context_that_fits(here, rooms)
    ways = [f"n_ctx <= {n_ctx}"] if n_ctx else []
    return (*ways, *_unpinned(here, fits_unpinned), *_more_memory(here, rooms))


def cleared(here: Situation) -> list[tuple[Node, Room]]:
    """All machines, with their room after the eviction of every replica that may be evicted."""
    rooms = []
    for node in here.every_node:
        residents = here.replicas.on_node(node.facts.node_id)
        gone = [replica.replica_id for replica in residents if not here.protection(replica)]
        rooms.append((node, here.snapshot.without(node.facts.node_id, gone)))
    return rooms


def _most_room(rooms: Sequence[tuple[Node, Room]]) -> list[tuple[Node, Room]]:
    """The machines with the most memory on GPUs, and those with the most host RAM."""
    by_gpus = nlargest(MOST_NODES // 2, rooms, key=lambda each: sum(each[1].devices.values()))
    by_gpu = nlargest(MOST_NODES // 2, rooms, key=lambda each: max(each[1].devices.values(), default=0))
    by_host = nlargest(MOST_NODES // 2, rooms, key=lambda each: each[1].host_bytes)
    return list({node.facts.node_id: (node, room) for node, room in (*by_gpus, *by_gpu, *by_host)}.values())


def _context_that_fits(here: Situation, rooms: Sequence[tuple[Node, Room]]) -> int:
    """The largest context per slot that may fit, shorter than the requested one, in steps of 256 tokens. 0: none."""
    context = here.workload.context

    def fits(steps: int, precision: Precision) -> bool:
        smaller = here.workload.with_n_ctx(context, steps * CONTEXT_STEP * context.n_streams).at(precision)
        return any(_fits(here, tiers_of(smaller, [node]), node, room) for node, room in rooms)

    low, most = SMALLEST_CONTEXT // CONTEXT_STEP, -(-context.n_ctx // context.n_streams) // CONTEXT_STEP
    if most <= low or not fits(low, "if needed"):
        return 0
    low, _ = _bisected(low, most, lambda steps: not fits(steps, "bound"))
    low, _ = _bisected(low, min(most, int(low * BOUND_SLACK) + 1), lambda steps: not fits(steps, "if needed"), DRAWN)
    return low * CONTEXT_STEP


def _bisected(low: int, high: int, holds: Callable[[int], bool], tries: int = 64) -> tuple[int, int]:
    """Bisects: `high` holds, `low` does not. Returns neighbours with this property, or the range after `tries`."""
    while high - low > 1 and tries:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
        tries -= 1
    return low, high


def _fits(here: Situation, ways: Sequence[Tier], node: Node, room: Room) -> bool:
    roomiest = (way.roomiest(node, room) for way in ways)
    return any(candidate is not None and here.feasible(candidate, room) for candidate in roomiest)


def _unpinned(here: Situation, fits_unpinned: Callable[[frozenset[str]], bool]) -> list[str]:
    """Protected models that are in the way: each one that is enough alone, or else all of them together."""
    kept = {each.model: why for each in here.replicas.values() if (why := here.protection(each))}
    helped = [name for name in sorted(kept) if fits_unpinned(frozenset({name}))]
    if helped or len(kept) < 2:
        return [_without(name, kept[name]) for name in helped]
    if not fits_unpinned(frozenset(kept)):
        return []
    pinned = ", ".join(name for name in sorted(kept) if kept[name] != ALWAYS_LOADED)
    others = [_without(name, ALWAYS_LOADED) for name in sorted(kept) if kept[name] == ALWAYS_LOADED]
    return [", ".join([_without(pinned, ""), *others] if pinned else others)]


def _without(names: str, why: str) -> str:
    return f"fewer min_replicas of {names}" if why == ALWAYS_LOADED else f"unpin {names}"


def _more_memory(here: Situation, rooms: Sequence[tuple[Node, Room]]) -> list[str]:
    devices: list[tuple[int, str]] = []
    memories: list[tuple[int, str]] = []
    for node, room in rooms:
        on = f" of {node.facts.hostname}" if len(here.every_node) > 1 else ""
        alike = {
            (d.product, d.total_bytes, room.devices.get(d.device_id)): d for d in here.workload.wishes.devices(node)
        }
        for device in alike.values():
            more = _missing(here, node, partial(_with_device, room, device.device_id))
            if more:
                devices.append((more, f"{format_bytes(more, up=True)} more on {device.label}{on}"))
        more = _missing(here, node, partial(_with_host, room))
        if more:
            memories.append((more, f"{format_bytes(more, up=True)} more host RAM{on}"))
    return [min(found)[1] for found in (devices, memories) if found]


def _with_device(room: Room, device_id: DeviceId, extra: int) -> Room:
    return replace(room, devices={**room.devices, device_id: room.devices.get(device_id, 0) + extra})


def _with_host(room: Room, extra: int) -> Room:
    return replace(room, host_bytes=room.host_bytes + extra)


def _missing(here: Situation, node: Node, room_with: Callable[[int], Room]) -> int:
    """The least extra bytes, in steps of `STEP_BYTES`, with which the model fits on the node. 0: no amount helps."""
    drawn, bounded = tiers_of(here.workload, [node]), tiers_of(here.workload.at("bound"), [node])

    def fits(steps: int, ways: Sequence[Tier]) -> bool:
        return _fits(here, ways, node, room_with(steps * STEP_BYTES))

    enough = -(-2 * here.workload.least_bytes() // STEP_BYTES) + _SPARE_STEPS
    if not fits(enough, bounded):
        return 0
    _, high = _bisected(0, enough, lambda steps: fits(steps, bounded))
    low = max(int(high / BOUND_SLACK), high - _SLACK_STEPS)
    _, high = _bisected(low, high, lambda steps: fits(steps, drawn), DRAWN)
    return high * STEP_BYTES
