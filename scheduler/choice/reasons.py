"""Why places were passed over, and with how much context there would be one: what is worked out when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scheduler.choice.candidates import CONTEXT_STEP, ONE_GPU, TIERS, Candidate
from scheduler.choice.explain import Rejection, explain_candidate
from scheduler.choice.groups import Group, groups
from scheduler.choice.search import Search
from scheduler.cluster.replica import Placement
from scheduler.units import NodeId

SMALLEST_CONTEXT = 2048  # tokens per slot: the least that a refusal proposes


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


def context_that_fits(search: Search) -> int:
    """The largest context per slot below the one asked for that an empty cluster could hold, to 256 tokens."""
    context = search.need.context

    def fits(steps: int) -> bool:
        smaller = search.need.with_context(replace(context, n_ctx=steps * CONTEXT_STEP * context.n_seq_max))
        found = groups(smaller, search.nodes)
        for node, room in search.outlook.unlike(search.nodes):
            roomiest = (group.roomiest(node, room) for group in found if node in group.nodes)
            if any(candidate is not None and candidate.feasible(room) for candidate in roomiest):
                return True
        return False

    low, high = SMALLEST_CONTEXT // CONTEXT_STEP, -(-context.n_ctx // context.n_seq_max) // CONTEXT_STEP
    if high <= low or not fits(low):
        return 0
    while high - low > 1:  # `low` fits, `high` does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * CONTEXT_STEP


def _same_place(candidate: Candidate, placement: Placement) -> bool:
    devices = {device.device_id for device in candidate.devices}
    return (candidate.tier, candidate.node_id) == (placement.tier, placement.node_id) and devices >= set(
        placement.device_ids
    )
