"""Who makes room: idle replicas worth the least, the smallest set that is enough where room is needed.

Worth is when a replica was last used (`lru`), or how often its model is asked for times the seconds of loading it
again, for each byte that it takes (`gdsf`: greedy dual size frequency, with counts that fade instead of an inflating
clock).

Never a busy, pinned or loading replica; a fresh one only when nothing else helps. With up to a few thousand subsets to
look at, the smallest set is found exactly; beyond that, oldest first until it fits, then whoever was not needed stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from math import comb

from scheduler.cluster.replica import Placement, Replica
from scheduler.units import ReplicaId

MOST_SETS = 256  # sets of one size that are looked at, each about one footprint lookup

Victims = frozenset[ReplicaId]


def evictable(
    replicas: Iterable[Replica],
    pinned: Callable[[str], bool],
    now: float,
    min_residency_s: float,
    claimant: str,
    worth: Callable[[Replica], float] = lambda replica: replica.last_used_at,
) -> list[Replica]:
    """Replicas that may be stopped now for the model `claimant`, those worth least first.

    One that was drained for another model that waits longer is spoken for.
    """
    return sorted(
        (
            replica
            for replica in replicas
            if replica.idle
            and not pinned(replica.model)
            and replica.drain_for in ("", claimant)
            and now - replica.ready_at >= min_residency_s
        ),
        key=lambda replica: (worth(replica), replica.last_used_at, replica.replica_id),
    )


def smallest_victims(
    oldest_first: Sequence[Replica], solve: Callable[[Victims], Placement | None]
) -> tuple[Placement, Victims] | None:
    """The smallest set of `oldest_first` without which `solve` finds a placement, and that placement.

    Among sets of one size, the one whose most recently used member is the oldest. None when even all are not enough.
    """
    ids = [replica.replica_id for replica in oldest_first]
    if solve(frozenset(ids)) is None:
        return None
    for size in range(len(ids) + 1):
        if comb(len(ids), size) > MOST_SETS:
            return _oldest_first(ids, solve)
        for chosen in sorted(combinations(range(len(ids)), size), key=lambda indices: indices[::-1]):
            victims = frozenset(ids[i] for i in chosen)
            placement = solve(victims)
            if placement is not None:
                return placement, victims
    return None


def _oldest_first(
    ids: Sequence[ReplicaId], solve: Callable[[Victims], Placement | None]
) -> tuple[Placement, Victims] | None:
    chosen: list[ReplicaId] = []
    for replica_id in ids:
        chosen.append(replica_id)
        if solve(frozenset(chosen)) is not None:
            break
    for replica_id in reversed(chosen[:-1]):  # spare the most recently used of those that turn out not to be needed
        fewer = frozenset(chosen) - {replica_id}
        if solve(fewer) is not None:
            chosen.remove(replica_id)
    placement = solve(frozenset(chosen))
    return (placement, frozenset(chosen)) if placement else None
