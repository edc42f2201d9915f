"""Chooses the replicas to evict: of all sets of idle replicas that free enough memory, the one with the least regret.

The regret of a replica says how likely it is wanted soon, or what its eviction will cost (`Prices.worth`). The regret
of a set is the sum. For replicas of one size on one device, this is least recently used. Busy, pinned and loading
replicas are never evicted. A replica in its first seconds is evicted only if nothing else helps.

Sets are tried in the order of their regret. So the first set that frees enough is the best one. This is exact up to a
thousand sets. Beyond that, replicas are chosen one by one, the least regretted first, until there is enough room. Then
replicas that turn out not to be needed are taken off the list.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from scheduler.cluster.replica import Placement, Replica
from scheduler.units import ReplicaId

MOST_SETS = 1024  # sets that are tried; each costs about one footprint lookup, most cost less

Victims = frozenset[ReplicaId]


def evictable(
    replicas: Iterable[Replica],
    protected: Callable[[Replica], str],
    now: float,
    min_residency_s: float,
    claimant: str,
    regret: Callable[[Replica], float],
) -> list[Replica]:
    """Replicas that may be evicted now for the model `claimant`, the least regretted first.

    A replica that drains for another model is left out: its room is promised to that model.
    """
    return sorted(
        (
            replica
            for replica in replicas
            if replica.removable
            and not protected(replica)
            and replica.drain_for in ("", claimant)
            and (replica.preloaded or now - replica.ready_at >= min_residency_s)
        ),
        key=lambda replica: (regret(replica), replica.last_used_at, replica.replica_id),
    )


def cheapest_victims(
    replicas: Sequence[Replica],
    regret: Callable[[Replica], float],
    solve: Callable[[Victims], Placement | None],
) -> tuple[Placement, Victims] | None:
    """The set of replicas with the least regret whose eviction makes room, and the placement that `solve` then finds.

    Of sets with equal regret, the smallest. None if not even the eviction of all replicas is enough.
    """
    least_first = sorted(replicas, key=regret)
    ids = [replica.replica_id for replica in least_first]
    if solve(frozenset(ids)) is None:
        return None
    for chosen in islice(_by_regret([regret(replica) for replica in least_first]), MOST_SETS):
        victims = frozenset(ids[i] for i in chosen)
        placement = solve(victims)
        if placement is not None:
            return placement, victims
    return _one_by_one(ids, solve)


def _by_regret(ascending: Sequence[float]) -> Iterator[tuple[int, ...]]:
    """All sets of indices, ordered by the sum of their values. The empty set comes first."""
    yield ()
    heap: list[tuple[float, int, tuple[int, ...]]] = [(ascending[0], 1, (0,))] if ascending else []
    while heap:
        total, size, chosen = heapq.heappop(heap)
        yield chosen
        last = chosen[-1]
        if last + 1 < len(ascending):
            heapq.heappush(heap, (total + ascending[last + 1], size + 1, (*chosen, last + 1)))
            swapped = total - ascending[last] + ascending[last + 1]
            heapq.heappush(heap, (swapped, size, (*chosen[:-1], last + 1)))


def _one_by_one(
    ids: Sequence[ReplicaId], solve: Callable[[Victims], Placement | None]
) -> tuple[Placement, Victims] | None:
    chosen: list[ReplicaId] = []
    for replica_id in ids:
        chosen.append(replica_id)
        if solve(frozenset(chosen)) is not None:
            break
    for replica_id in reversed(chosen[:-1]):  # keep replicas that need not be evicted, the most regretted first
        fewer = frozenset(chosen) - {replica_id}
        if solve(fewer) is not None:
            chosen.remove(replica_id)
    placement = solve(frozenset(chosen))
    return (placement, frozenset(chosen)) if placement else None
