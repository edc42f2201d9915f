"""Why places were passed over: what is worked out when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.choice.candidates import ONE_GPU, TIERS, Candidate
from scheduler.choice.explain import Rejection, explain_candidate
from scheduler.choice.groups import Group
from scheduler.choice.search import Search
from scheduler.cluster.replica import Placement
from scheduler.units import NodeId


def rejections(
    search: Search, found: Sequence[Group], chosen: Placement | None, *, waits: bool
) -> tuple[Rejection, ...]:
    """Why each candidate as good as the chosen one or better was passed over, or has to wait, as the chosen one may
    (`waits`). Of several GPUs, all together speak for every smaller combination."""
    taken = None if waits else chosen
    speakers: dict[tuple[str, NodeId, object], Candidate] = {}
    for candidate in (c for group in found for c in group):
        if chosen and TIERS.index(candidate.tier) > TIERS.index(chosen.tier):
            break
        each = candidate.devices if candidate.tier == ONE_GPU else None
        speakers[candidate.tier, candidate.node_id, each] = candidate
    idle = {replica.replica_id: search.now - replica.last_used_at for replica in search.evictable(0.0)}
    return tuple(
        explain_candidate(
            candidate,
            now=search.outlook.now(candidate.node_id),
            later=search.outlook.without(candidate.node_id, idle),
            idle=idle,
            replicas=search.replicas.on_node(candidate.node_id),
            protected=search.protected,
            apart=search.outlook.apart,
            tokens_per_s=search.tokens_per_s,
            inventory=search.inventory,
        )
        for candidate in speakers.values()
        if not (taken and _same_place(candidate, taken))
    )


def _same_place(candidate: Candidate, placement: Placement) -> bool:
    devices = {device.device_id for device in candidate.devices}
    return (candidate.tier, candidate.node_id) == (placement.tier, placement.node_id) and devices >= set(
        placement.device_ids
    )
