"""The place for a model: the cheapest that fits, now or after evicting; else what it waits for; else why never.

Each tier offers its best place, and the cheapest in seconds wins (`price`); where speeds are not known, the first tier
that fits. A place on GPUs for which nobody is evicted ends the search. Within a tier: fewest devices, no eviction
before eviction, and of what costs nearly the same the victims that are regretted least, and the tightest fit, so that
big cards stay free for big models. Host RAM is not settled for while a better place is only being
used, not before `spill_after_s`. `benchmarks/decisions.py` has the times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf
from typing import Any, Literal

from scheduler.choice.candidates import (
    CPU_ONLY,
    EXPERTS_IN_RAM,
    ON_GPU,
    ONE_GPU,
    SOME_LAYERS_IN_RAM,
    TIERS,
    Candidate,
    Need,
    candidates,
    exact,
    fits,
    spilling,
)
from scheduler.choice.eviction import Victims, cheapest_victims, evictable
from scheduler.choice.explain import Rejection, explain_candidate
from scheduler.choice.room import STAYING, Room, Rooms, View
from scheduler.cluster.inventory import Inventory, Node
from scheduler.cluster.replica import Placement, Replica, ReplicaState
from scheduler.cluster.replicas import Replicas
from scheduler.config import Policy
from scheduler.units import NodeId

Verdict = Literal["free", "evict", "wait", "blocked", "impossible"]
GOOD_ENOUGH = 0.9  # of the GPU layers that could be had: nobody is evicted, and nothing waited for, for the rest
PARTIAL = frozenset({EXPERTS_IN_RAM, SOME_LAYERS_IN_RAM})
NEARLY = 1.1  # of the lowest price: what costs no more counts as equally cheap
MOST_COMPARED = 16  # combinations of GPUs for which victims are sought, the least memory first
CONTEXT_STEP = 256  # llama.cpp rounds contexts up to so many tokens
SMALLEST_CONTEXT = 2048  # tokens per slot: the least that a refusal proposes

Found = tuple[Placement, Victims]
Groups = Sequence[Sequence[Candidate]]


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do. `placement` for "free" and "evict" is to be carried out; for "wait" it is what is waited for, None
    when that is memory of others or a device that cannot be used now.

    `victims` are replicas to stop (for "wait": the ones that are in the way, busy now). `rejections` say, per
    candidate that was passed over, why; they are there when asked for. `n_ctx_that_fits` (tokens per slot) is what an
    impossible request could have instead, 0 if nothing.
    """

    verdict: Verdict
    placement: Placement | None
    victims: Victims
    rejections: tuple[Rejection, ...] = ()
    n_ctx_that_fits: int = 0


@dataclass(slots=True)
class Chooser:
    """Chooses for one need at one moment. `may_evict` false: only `outgrown` replicas are stopped for it.

    `price` tells what a placement costs in seconds with its victims gone, or None: then the first tier that fits wins.
    """

    need: Need
    nodes: Sequence[Node]
    inventory: Inventory
    rooms: Rooms
    replicas: Replicas
    pinned: Callable[[str], bool]
    policy: Policy
    now: float
    waited_s: float
    outgrown: Victims = frozenset()  # smaller replicas of the same model, stopped first
    may_evict: bool = True
    price: Callable[[Placement, Victims], float | None] = lambda placement, victims: None
    regret: Callable[[Replica], float] = lambda replica: replica.last_used_at  # the least regretted goes first
    _views: dict[NodeId, View] = field(default_factory=dict)
    _free_now: dict[NodeId, Room] = field(default_factory=dict)

    def choose(self, *, explain: bool = False) -> Choice:
        """Raises Rejected for parameters that llama.cpp refuses."""
        groups = list(candidates(self.need, self.nodes))
        choice = self._choose(groups)
        if choice.placement is not None and not self.need.draws:
            drawn = exact(choice.placement, self.need, self.inventory.nodes[choice.placement.node_id])
            if not _within(drawn, choice.placement):  # the bound lied: do without it
                return replace(self, need=replace(self.need, draws=True)).choose(explain=explain)
            choice = replace(choice, placement=self._grown(drawn, choice.victims))
        return replace(choice, rejections=self._rejections(groups, choice)) if explain else choice

    def _drawn(self, found: Found) -> Found:
        """The same with the graph drawn, and the layers more that this leaves room for."""
        placement, victims = found
        drawn = exact(placement, self.need, self.inventory.nodes[placement.node_id])
        return (self._grown(drawn, victims), victims) if _within(drawn, placement) else found

    def _grown(self, drawn: Placement, victims: Victims) -> Placement:
        """Some layers more, where the drawn graph leaves room for them."""
        if drawn.tier != SOME_LAYERS_IN_RAM:
            return drawn
        room = self._now_on(drawn.node_id)
        if victims or not fits(drawn, room):
            room = self._view_of(drawn.node_id).without(victims)
        return spilling(self.need, self.inventory.nodes[drawn.node_id]).grown(drawn, room)

    def options(self) -> list[Found]:
        """The best placement of each kind that could be had now, whoever is idle evicted for it: what is chosen among,
        in the order of preference. Raises as `choose`."""
        found = self._offers(list(candidates(self.need, self.nodes)), self._evictable(0.0))
        return [self._drawn(each) for each in found]

    def _choose(self, groups: Groups) -> Choice:
        found = self._find(groups, self.policy.min_residency_s)
        if found is None or found[0].tier not in ON_GPU:
            found = self._find(groups, 0.0) or found
        if found and (found[0].tier in ON_GPU or self._has_waited_long_enough(found)):
            return self._go(*found)
        later = self._later(groups)
        if later and (found is None or self._worth_waiting(later, found)):
            return Choice("wait", *later)
        if found:
            return self._go(*found)
        return self._refuse(groups)

    def _go(self, placement: Placement, victims: Victims) -> Choice:
        free = not victims and fits(placement, self._now_on(placement.node_id))
        return Choice("free" if free else "evict", placement, victims)

    def _refuse(self, groups: Groups) -> Choice:
        if not any(c.solve(self.rooms.empty(_node_id(c))) for group in groups for c in group):
            return Choice("impossible", None, frozenset(), n_ctx_that_fits=self._context_that_fits())
        kept = [replica for replica in self.replicas.values() if self.pinned(replica.model)]
        if self.may_evict and any(c.solve(self.rooms.empty(_node_id(c), kept)) for group in groups for c in group):
            return Choice("wait", None, frozenset())
        return Choice("blocked", None, frozenset())

    # ------------------------------------------------------------------ finding

    def _find(self, groups: Groups, min_residency_s: float) -> Found | None:
        """The best placement that can be had now, evicting idle replicas at least `min_residency_s` old."""
        return self._cheapest(self._offers(groups, self._evictable(min_residency_s)))

    def _evictable(self, min_residency_s: float) -> list[Replica]:
        """Replicas that may make room for this one, the least regretted first."""
        if not self.may_evict:
            return []
        others = (r for r in self.replicas.in_state(ReplicaState.READY) if r.replica_id not in self.outgrown)
        return evictable(others, self.pinned, self.now, min_residency_s, self.need.model, self.regret)

    def _offers(self, groups: Groups, idle: Sequence[Replica]) -> Iterator[Found]:
        """The best placement of each tier, on the fewest devices that will do. Once there is a place on GPUs, nobody is
        evicted for a place of a later tier."""
        tiers: set[str] = set()
        for group in groups:
            if not group or group[0].tier in tiers:
                continue
            found = self._best_free(group, idle) if tiers & ON_GPU else self._best_of(group, idle)
            if found is not None:
                tiers.add(found[0].tier)
                yield found

    def _cheapest(self, offers: Iterable[Found]) -> Found | None:
        """The cheapest of what each tier offers, best tier first; the first of them where prices are not known."""
        best, least_s = None, inf
        for found in offers:
            price_s = self.price(*found)
            if price_s is None:
                return best or found
            if found[0].tier == SOME_LAYERS_IN_RAM:
                found = self._drawn(found)
                price_s = self.price(*found) or price_s
            if best is None or price_s < least_s:
                best, least_s = found, price_s
            if found[0].tier in ON_GPU and not found[1]:
                break
        return best

    def _best_of(self, group: Sequence[Candidate], idle: Sequence[Replica]) -> Found | None:
        """The best placement of equally good candidates, evicting the `idle` replicas if nothing is free."""
        return self._best_free(group, idle) or self._make_best_room(group, idle)

    def _best_free(self, group: Sequence[Candidate], idle: Sequence[Replica]) -> Found | None:
        free = [(placement, self.outgrown) for c in group if (placement := self._free(c, idle))]
        return self._best_priced(free, self._tightness)

    def _free(self, candidate: Candidate, idle: Sequence[Replica]) -> Placement | None:
        if self.outgrown:
            return None
        placement = candidate.solve(self._now_on(_node_id(candidate)))
        if placement is None or candidate.tier not in PARTIAL:
            return placement
        best = candidate.solve(self._view_of(_node_id(candidate)).without(replica.replica_id for replica in idle))
        return placement if best is None or placement.n_resident_layers >= self._worth_taking(best) else None

    def _make_best_room(self, group: Sequence[Candidate], removable: Sequence[Replica]) -> Found | None:
        everybody = frozenset(r.replica_id for r in removable) | self.outgrown
        cleared = {node_id: self._view_of(node_id).without(everybody) for node_id in {_node_id(c) for c in group}}
        made = (found for c in group if (found := self._make_room(c, removable, cleared[_node_id(c)])))
        several = bool(group) and len(group[0].devices) > 1
        return self._best_priced(list(islice(made, MOST_COMPARED if several else None)), self._cost)

    def _best_priced(self, found: Sequence[Found], key: Callable[[Found], Any]) -> Found | None:
        """The first by `key` of those that cost nearly the least; of all, where prices are not known."""
        if len(found) > 1:
            prices = [price_s for each in found if (price_s := self.price(*each)) is not None]
            if len(prices) == len(found):
                most_s = NEARLY * min(prices)
                found = [each for each, price_s in zip(found, prices, strict=True) if price_s <= most_s]
        return min(found, key=key, default=None)

    def _make_room(self, candidate: Candidate, removable: Sequence[Replica], cleared: Room) -> Found | None:
        """The placement after stopping the set of `removable` (the least regretted first) that is regretted least;
        `cleared` is the room without all of them."""
        best = candidate.solve(cleared)
        if best is None:
            return None
        least = self._worth_taking(best)
        view = self._view_of(_node_id(candidate))

        def enough(room: Room) -> Placement | None:
            placement = candidate.solve(room) if candidate.may_hold(least, room) else None
            return placement if placement and placement.n_resident_layers >= least else None

        pool = self._in_the_way(candidate, removable, view, enough)
        found = cheapest_victims(pool, self.regret, lambda chosen: enough(view.without(chosen | self.outgrown)))
        return (found[0], found[1] | self.outgrown) if found else None

    def _in_the_way(
        self,
        candidate: Candidate,
        removable: Sequence[Replica],
        view: View,
        enough: Callable[[Room], Placement | None],
    ) -> Sequence[Replica]:
        """Those of `removable` worth looking at: the ones on the candidate's devices, if only devices are short."""
        devices = {device.device_id for device in candidate.devices}
        near = [r for r in removable if devices.intersection(r.placement.device_ids)]
        as_it_is = view.without(self.outgrown)
        cleared = view.without({r.replica_id for r in near} | self.outgrown)
        if enough(replace(as_it_is, devices=cleared.devices)):
            return near
        anywhere = self.policy.max_active_models is not None
        return [r for r in removable if anywhere or r.placement.node_id == _node_id(candidate)]

    @staticmethod
    def _worth_taking(best: Placement) -> float:
        """GPU layers below which a partial offload is not worth taking, since stopping others would give the best."""
        return GOOD_ENOUGH * best.n_resident_layers if best.tier in PARTIAL else 0

    def _later(self, groups: Groups) -> Found | None:
        """The best placement once replicas that are busy, loading or waiting themselves have ended; those that make
        room for another model already are asked last."""
        if not self.may_evict:
            return None
        staying = self.replicas.in_state(*STAYING)
        ending = sorted(
            (replica for replica in staying if not self.pinned(replica.model)),
            key=lambda replica: (not (replica.idle or replica.drain_for), replica.replica_id),
        )
        unclaimed = [replica for replica in ending if replica.drain_for in ("", self.need.model)]
        pools = (unclaimed, ending) if len(unclaimed) < len(ending) else (ending,)

        def offers() -> Iterator[Found]:
            tiers: set[str] = set()
            for group in groups:
                if not group or group[0].tier in tiers:
                    continue
                found = next((made for pool in pools if (made := self._make_best_room(group, pool))), None)
                if found is not None:
                    yield found
                    tiers.add(found[0].tier)
                if tiers & ON_GPU:
                    return

        return self._cheapest(offers())

    # ------------------------------------------------------------------ comparing

    def _has_waited_long_enough(self, found: Found) -> bool:
        """To settle for host RAM whatever may come later. Where prices are known, they say what is worth a wait."""
        return self.waited_s >= self.policy.spill_after_s and self.price(*found) is None

    def _worth_waiting(self, later: Found, found: Found) -> bool:
        """Whether what could be had later is better than what can be had now: the wait is in its price, and the longer
        it has been already, the longer it is taken to be."""
        later_s, now_s = self.price(*later), self.price(*found)
        if later_s is None or now_s is None:
            return _clearly_better(later[0], found[0])
        return later_s + self.waited_s < now_s

    def _tightness(self, found: Found) -> tuple[int, int, int]:
        """Most layers on GPUs (they differ for partial offload only), fewest devices, least memory left over there."""
        placement, victims = found
        room = self._view_of(placement.node_id).without(victims)
        left = sum(room.devices[device_id] for device_id in placement.device_ids) - sum(placement.device_bytes)
        if placement.tier == CPU_ONLY:
            left = -room.host_bytes  # the node with the most RAM free
        return -placement.n_resident_layers, len(placement.device_ids), left

    def _cost(self, found: Found) -> tuple[int, float, int, tuple[int, int, int]]:
        placement, victims = found
        regret_s = sum(self.regret(self.replicas[victim]) for victim in victims)
        return len(placement.device_ids), regret_s, len(victims), self._tightness(found)

    def _view_of(self, node_id: NodeId) -> View:
        if node_id not in self._views:
            self._views[node_id] = self.rooms.view(node_id)
        return self._views[node_id]

    def _now_on(self, node_id: NodeId) -> Room:
        if node_id not in self._free_now:
            self._free_now[node_id] = self.rooms.now(node_id)
        return self._free_now[node_id]

    # ------------------------------------------------------------------ explaining

    def _rejections(self, groups: Groups, choice: Choice) -> tuple[Rejection, ...]:
        """Why each candidate as good as the chosen one or better was passed over, or has to wait. Of several GPUs, all
        together speak for every smaller combination."""
        chosen = choice.placement
        taken = chosen if choice.verdict != "wait" else None
        speakers: dict[tuple[str, NodeId, object], Candidate] = {}
        for candidate in (c for group in groups for c in group):
            if chosen and TIERS.index(candidate.tier) > TIERS.index(chosen.tier):
                break
            each = candidate.devices if candidate.tier == ONE_GPU else None
            speakers[candidate.tier, _node_id(candidate), each] = candidate
        idle = self._evictable(0.0)
        return tuple(
            explain_candidate(
                candidate,
                now=self._now_on(_node_id(candidate)),
                later=self._view_of(_node_id(candidate)).without(replica.replica_id for replica in idle),
                idle={replica.replica_id: self.now - replica.last_used_at for replica in idle},
                replicas=self.replicas.values(),
                pinned=self.pinned,
                inventory=self.inventory,
            )
            for candidate in speakers.values()
            if not (taken and _same_place(candidate, taken))
        )

    def _context_that_fits(self) -> int:
        """The largest context per slot below the one asked for that an empty cluster could hold, to 256 tokens."""
        context = self.need.context

        def fits(steps: int) -> bool:
            smaller = self.need.with_context(replace(context, n_ctx=steps * CONTEXT_STEP * context.n_seq_max))
            groups = candidates(smaller, self.nodes)
            return any(c.solve(self.rooms.empty(_node_id(c))) for group in groups for c in group)

        low, high = SMALLEST_CONTEXT // CONTEXT_STEP, -(-context.n_ctx // context.n_seq_max) // CONTEXT_STEP
        if high <= low or not fits(low):
            return 0
        while high - low > 1:  # `low` fits, `high` does not
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * CONTEXT_STEP


def _within(one: Placement, other: Placement) -> bool:
    """Whether `one` needs no more than `other` anywhere."""
    devices = zip(one.device_bytes, other.device_bytes, strict=True)
    return one.host_bytes <= other.host_bytes and all(mine <= theirs for mine, theirs in devices)


def _node_id(candidate: Candidate) -> NodeId:
    return candidate.node.facts.node_id


def _same_place(candidate: Candidate, placement: Placement) -> bool:
    devices = {device.device_id for device in candidate.devices}
    return (candidate.tier, _node_id(candidate)) == (placement.tier, placement.node_id) and devices >= set(
        placement.device_ids
    )


def _clearly_better(one: Placement, other: Placement) -> bool:
    """Worth a wait: an earlier tier, or clearly more layers on GPUs."""
    if one.tier != other.tier:
        return TIERS.index(one.tier) < TIERS.index(other.tier)
    return GOOD_ENOUGH * one.n_resident_layers > other.n_resident_layers
