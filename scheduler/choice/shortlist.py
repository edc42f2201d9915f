"""Selects the machines that a decision examines. A decision must not take longer on a larger cluster.

Up to `ALL` machines are all examined. Of more machines, a quick pass over free memory selects those on which the model
fits most tightly, those where it is fastest, and those with the most free VRAM or host RAM. If no GPU has room, it adds
machines where the eviction of a least recently used replica makes room. It also adds machines that have the file in the
page cache, or a replica of the model. If none of these has a place on GPUs, more are examined: up to `MANY` all,
else the largest of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import nlargest, nsmallest
from itertools import islice

from scheduler.choice.snapshot import Snapshot
from scheduler.choice.workload import Workload
from scheduler.cluster.inventory import Node
from scheduler.cluster.replica import Replica
from scheduler.units import GIB, NodeId

ALL = 8
OF_A_KIND = 2  # machines for each criterion
MANY = 32
LOOKED_THROUGH = 512  # replicas, the least recently used first


def shortlist(
    workload: Workload,
    nodes: Sequence[Node],
    snapshot: Snapshot,
    protected: Callable[[Replica], str],
    cached: Callable[[NodeId], float],
) -> list[Node]:
    """The machines of `nodes` to examine. `cached`: the share of the model's file in a machine's page cache."""
    if len(nodes) <= ALL:
        return list(nodes)
    least, replicas = workload.least_bytes(), snapshot.replicas
    by_id = {node.facts.node_id: node for node in nodes}
    some_only = bool(workload.wishes.gpus or workload.wishes.not_on)
    tight: list[tuple[int, NodeId]] = []
    fast: list[tuple[float, NodeId]] = []
    roomy: list[tuple[int, NodeId]] = []
    ram: list[tuple[int, NodeId]] = []
    for node_id, node in by_id.items():
        room = snapshot.now(node_id)
        free = room.devices
        if some_only:
            free = {d.device_id: free.get(d.device_id, 0) for d in workload.wishes.devices(node)}
        roomy.append((sum(free.values()), node_id))
        ram.append((room.host_bytes, node_id))
        fitting = [device_id for device_id, count in free.items() if count >= least]
        if fitting:
            tight.append((min(free[device_id] for device_id in fitting), node_id))
            fast.append((max(node.devices[d].facts.rates.bytes_per_s for d in fitting), node_id))
    named = [node_id for _, node_id in nsmallest(OF_A_KIND, tight)]
    for ranked in (fast, roomy, ram):
        named += [node_id for _, node_id in nlargest(OF_A_KIND, ranked)]
    if not tight:
        named += islice(_with_victims(workload, by_id, snapshot, protected), 2 * OF_A_KIND)
    named += islice((node_id for node_id in by_id if cached(node_id) >= 0.5), OF_A_KIND)
    named += [r.placement.node_id for r in replicas.of_model(workload.model) if r.placement.node_id in by_id]
    return [by_id[node_id] for node_id in dict.fromkeys(named)]


def wider(workload: Workload, nodes: Sequence[Node], snapshot: Snapshot) -> list[Node]:
    """The machines to examine next: all of `nodes`; of many, the two of each kind with the most free memory. If the
    model fits on any of `nodes`, it fits on one of these."""
    if len(nodes) <= MANY:
        return list(nodes)
    kinds: dict[tuple[object, ...], list[tuple[int, int, Node]]] = {}
    for number, node in enumerate(nodes):
        totals = tuple(device.total_bytes for device in workload.wishes.devices(node))
        kind = totals, node.facts.memory_total_bytes // GIB, node.facts.physical_cores
        here = snapshot.replicas.on_node(node.facts.node_id)
        room = snapshot.without(node.facts.node_id, [replica.replica_id for replica in here if replica.idle])
        kinds.setdefault(kind, []).append((-sum(room.devices.values()), number, node))
    return [node for kind in kinds.values() for _, _, node in nsmallest(OF_A_KIND, kind)]


def _with_victims(
    workload: Workload, by_id: dict[NodeId, Node], snapshot: Snapshot, protected: Callable[[Replica], str]
) -> Iterable[NodeId]:
    """Machines where the eviction of one idle replica frees enough of one GPU, the least recently used first."""
    seen: set[NodeId] = set()
    least = workload.least_bytes()
    for replica in islice(snapshot.replicas.least_recently_used(), LOOKED_THROUGH):
        placement = replica.placement
        if placement.node_id in seen or placement.node_id not in by_id or not replica.idle or protected(replica):
            continue
        free = snapshot.now(placement.node_id).devices
        shares = zip(placement.device_ids, placement.device_bytes, strict=True)
        if any(free.get(device_id, 0) + count >= least for device_id, count in shares):
            seen.add(placement.node_id)
            yield placement.node_id
