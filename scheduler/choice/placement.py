"""The place for a model: the cheapest that fits, now or after evicting; else what it waits for; else why never.

Each tier offers its best place, and the cheapest in seconds wins (`price`); where speeds are not known, the first tier
that fits. A place on GPUs for which nobody is evicted ends the search. Within a tier: fewest devices, no eviction
before eviction, and of what costs nearly the same the victims that are regretted least, and the tightest fit, so that
big cards stay free for big models. Host RAM is not settled for while a better place is only being
used, not before `spill_after_s`. `benchmarks/decisions.py` has the times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import islice
from math import inf
from typing import Any, Literal

from scheduler.choice.candidates import (
    CONTEXT_STEP,
    CPU_ONLY,
    ON_GPU,
    PARTIAL,
    SOME_LAYERS_IN_RAM,
    TIERS,
    Candidate,
    exact,
    fits,
)
from scheduler.choice.eviction import Victims, cheapest_victims, evictable
from scheduler.choice.explain import Rejection
from scheduler.choice.groups import Group, groups, spilling
from scheduler.choice.need import Need
from scheduler.choice.outlook import Outlook
from scheduler.choice.reasons import rejections
from scheduler.choice.room import STAYING, Room
from scheduler.choice.ways_out import ways_out
from scheduler.cluster.inventory import Inventory, Node
from scheduler.cluster.replica import Placement, Replica
from scheduler.cluster.replicas import Replicas
from scheduler.config import Policy
from scheduler.units import DeviceId

Verdict = Literal["free", "evict", "wait", "blocked", "impossible"]
GOOD_ENOUGH = 0.9  # of the GPU layers that could be had: nobody is evicted, and nothing waited for, for the rest
NEARLY = 1.25  # of the lowest price: what costs no more counts as equally cheap
MOST_ROOMY = 2  # machines on which a free place is sought once there is a place on GPUs
MOST_COMPARED = 12  # combinations of GPUs for which victims are sought, the least memory first

Found = tuple[Placement, Victims]
Groups = Sequence[Group]


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do. `placement` for "free" and "evict" is to be carried out; for "wait" it is what is waited for, None
    when that is memory of others or a device that cannot be used now.

    `victims` are replicas to stop (for "wait": the ones that are in the way, busy now). `rejections` say, per
    candidate that was passed over, why; `would_fit_if` are the smallest changes that help where there is no place, each
    by itself. Both are there when asked for.
    """

    verdict: Verdict
    placement: Placement | None
    victims: Victims
    rejections: tuple[Rejection, ...] = ()
    would_fit_if: tuple[str, ...] = ()


@dataclass(slots=True)
class Chooser:
    """Chooses for one need at one moment. `may_evict` false: only `outgrown` replicas are stopped for it.

    `price` tells what a placement costs in seconds with its victims gone, or None: then the first tier that fits wins.
    """

    need: Need
    nodes: Sequence[Node]
    inventory: Inventory
    outlook: Outlook
    replicas: Replicas
    protected: Callable[[Replica], bool]  # never evicted
    policy: Policy
    now: float
    waited_s: float
    outgrown: Victims = frozenset()  # smaller replicas of the same model, stopped first
    may_evict: bool = True
    price: Callable[[Placement, Victims], float | None] = lambda placement, victims: None
    regret: Callable[[Replica], float] = lambda replica: replica.last_used_at  # the least regretted goes first
    tokens_per_s: Callable[[Placement], float | None] = lambda placement: None

    def choose(self, *, explain: bool = False) -> Choice:
        """Raises Rejected for parameters that llama.cpp refuses."""
        groups = self._groups()
        choice = self._choose(groups)
        if choice.placement is not None and not self.need.draws:
            drawn = exact(choice.placement, self.need, self.inventory.nodes[choice.placement.node_id])
            if not _within(drawn, choice.placement):  # the bound lied: do without it
                return replace(self, need=self.need.drawn()).choose(explain=explain)
            choice = replace(choice, placement=self._grown(drawn, choice.victims))
            choice = replace(choice, placement=self._lengthened(choice))
        if not explain:
            return choice
        ways = () if choice.placement else ways_out(self, never=choice.verdict == "impossible")
        return replace(choice, rejections=rejections(self, groups, choice), would_fit_if=ways)

    def _lengthened(self, choice: Choice) -> Placement | None:
        """The same layout with the longest context that there is room for, where the catalogue leaves that open."""
        placement, most = choice.placement, self.need.longest_n_ctx
        if placement is None or placement.tier not in ON_GPU:
            return placement
        node = self.inventory.nodes[placement.node_id]
        room = self.outlook.now(placement.node_id)
        if choice.victims or not fits(placement, room):
            room = self.outlook.without(placement.node_id, choice.victims)
        step = CONTEXT_STEP * placement.context.n_seq_max
        low, high = placement.context.n_ctx // step, most // step + 1
        while high - low > 1:  # `low` fits, `high` does not
            middle = (low + high) // 2
            need = self.need.with_context(replace(placement.context, n_ctx=middle * step))
            longer = exact(placement, need, node)
            low, high, placement = (middle, high, longer) if fits(longer, room) else (low, middle, placement)
        return placement

    def _drawn(self, found: Found) -> Found:
        """The same with the graph drawn, and the layers more that this leaves room for."""
        placement, victims = found
        drawn = exact(placement, self.need, self.inventory.nodes[placement.node_id])
        return (self._grown(drawn, victims), victims) if _within(drawn, placement) else found

    def _grown(self, drawn: Placement, victims: Victims) -> Placement:
        """Some layers more, where the drawn graph leaves room for them."""
        if drawn.tier not in PARTIAL:
            return drawn
        room = self.outlook.now(drawn.node_id)
        if victims or not fits(drawn, room):
            room = self.outlook.without(drawn.node_id, victims)
        node = self.inventory.nodes[drawn.node_id]
        if drawn.tier == SOME_LAYERS_IN_RAM:
            return spilling(self.need, node).grown(drawn, room)
        devices = tuple(node.devices[device_id].facts for device_id in drawn.device_ids)
        return Candidate(drawn.tier, self.need, node, devices).grown(drawn, room)

    def with_alternatives(self, *, explain: bool = False) -> Choice:
        """The choice for the need itself; where that is not on GPUs now, for the first alternative that is, and where
        it cannot be had at all, for the first that can. Raises as `choose`."""
        choice = self.choose(explain=explain)
        if not self.need.alternatives or _is_on_gpus_now(choice):
            return choice
        others = [
            replace(self, need=self.need.with_context(context)).choose(explain=explain)
            for context in self.need.alternatives
        ]
        better = [other for other in others if _is_on_gpus_now(other)]
        if not better and choice.verdict in ("blocked", "impossible"):
            better = [other for other in others if other.verdict not in ("blocked", "impossible")]
        return better[0] if better else choice

    def options(self) -> list[Found]:
        """The best placement of each kind that could be had now, whoever is idle evicted for it: what is chosen among,
        in the order of preference. Raises as `choose`."""
        found = self._offers(self._groups(), self.evictable(0.0))
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

    def solve(self, candidate: Candidate, room: Room) -> Placement | None:
        """The candidate's best placement, if it is fast enough for the catalogue."""
        placement = candidate.solve(room)
        wanted = self.need.wishes.min_tokens_per_s
        if placement is None or not wanted:
            return placement
        tokens_per_s = self.tokens_per_s(placement)
        return placement if tokens_per_s is None or tokens_per_s >= wanted else None

    def evictable(self, min_residency_s: float) -> list[Replica]:
        """Replicas that may make room for this one, the least regretted first."""
        if not self.may_evict:
            return []
        others = (replica for replica in self._there() if replica.replica_id not in self.outgrown)
        return evictable(others, self.protected, self.now, min_residency_s, self.need.model, self.regret)

    def _there(self) -> Iterable[Replica]:
        """Replicas that may have to do with it: those on the machines in question, or everywhere where their number is
        limited."""
        if self.policy.max_active_models is not None:
            return self.replicas.values()
        return (replica for node in self.nodes for replica in self.replicas.on_node(node.facts.node_id))

    def _groups(self) -> list[Group]:
        return groups(self.need, self.nodes)

    def _go(self, placement: Placement, victims: Victims) -> Choice:
        free = not victims and fits(placement, self.outlook.now(placement.node_id))
        return Choice("free" if free else "evict", placement, victims)

    def _refuse(self, groups: Groups) -> Choice:
        if not any(self.solve(c, self.outlook.empty(c.node_id)) for group in groups for c in group):
            return Choice("impossible", None, frozenset())
        kept = [replica for replica in self._there() if self.protected(replica)]
        if self.may_evict and any(
            self.solve(c, self.outlook.empty(c.node_id, kept)) for group in groups for c in group
        ):
            return Choice("wait", None, frozenset())
        return Choice("blocked", None, frozenset())

    # ------------------------------------------------------------------ finding

    def _find(self, groups: Groups, min_residency_s: float) -> Found | None:
        """The best placement that can be had now, evicting idle replicas at least `min_residency_s` old."""
        return self._cheapest(self._offers(groups, self.evictable(min_residency_s)))

    def _offers(self, groups: Groups, idle: Sequence[Replica]) -> Iterator[Found]:
        """The best placement of each tier, on the fewest devices that will do. Once there is a place on GPUs, nobody is
        evicted for a place of a later tier."""
        tiers: set[str] = set()
        for group in groups:
            if group.tier in tiers:
                continue
            found = self._roomiest_free(group, idle) if tiers & ON_GPU else self._best_of(group, idle)
            if found is not None:
                tiers.add(found[0].tier)
                yield found

    def _cheapest(self, offers: Iterable[Found]) -> Found | None:
        """The cheapest of what each tier offers, best tier first; the first of them where prices are not known."""
        best, least_s = None, inf
        for offer in offers:
            found = self._drawn(offer) if offer[0].tier in PARTIAL else offer
            price_s = self.price(*found)
            if price_s is None:
                return best or found
            if best is None or price_s < least_s:
                best, least_s = found, price_s
            if found[0].tier in ON_GPU and price_s <= NEARLY * (self.price(found[0], frozenset()) or 0.0):
                break  # without its victims it would cost nearly the same, and a later tier no less than that
        return best

    def _best_of(self, group: Group, idle: Sequence[Replica]) -> Found | None:
        """The best placement of equally good candidates, evicting the `idle` replicas if nothing is free."""
        return self._best_free(group, idle) or self._make_best_room(group, idle)

    def _best_free(self, group: Group, idle: Sequence[Replica]) -> Found | None:
        if self.outgrown:
            return None
        there = [node for node in group.nodes if group.may_fit(node, self.outlook.now(node.facts.node_id))]
        free = [
            (placement, self.outgrown) for node in there for c in group.on(node) if (placement := self._free(c, idle))
        ]
        return self._best_priced(free, self._tightness)

    def _roomiest_free(self, group: Group, idle: Sequence[Replica]) -> Found | None:
        """The same, sought only where there is most memory: what could do without an eviction that is in hand already
        has to be good, and is not worth a long search."""
        if self.outgrown:
            return None
        rooms = {node.facts.node_id: self.outlook.now(node.facts.node_id) for node in group.nodes}
        roomy = nlargest(MOST_ROOMY, group.nodes, key=lambda node: sum(rooms[node.facts.node_id].devices.values()))
        there = (node for node in roomy if group.may_fit(node, rooms[node.facts.node_id]))
        each = (c for node in there if (c := group.roomiest(node, rooms[node.facts.node_id])) is not None)
        free = [(placement, self.outgrown) for c in each if (placement := self._free(c, idle))]
        return self._best_priced(free, self._tightness)

    def _free(self, candidate: Candidate, idle: Sequence[Replica]) -> Placement | None:
        placement = self.solve(candidate, self.outlook.now(candidate.node_id))
        if placement is None or candidate.tier not in PARTIAL:
            return placement
        best = self.solve(candidate, self.outlook.without(candidate.node_id, (replica.replica_id for replica in idle)))
        return placement if best is None or placement.n_resident_layers >= self._worth_taking(best) else None

    def _make_best_room(self, group: Group, removable: Sequence[Replica]) -> Found | None:
        everybody = frozenset(r.replica_id for r in removable) | self.outgrown
        cleared = {n.facts.node_id: self.outlook.without(n.facts.node_id, everybody) for n in group.nodes}
        there = [node for node in group.nodes if group.may_fit(node, cleared[node.facts.node_id])]
        every = [candidate for node in there for candidate in group.on(node)]
        if group.size == 1 and len(every) > MOST_COMPARED:
            every = self._promising(every, removable)
            there = [node for node in there if any(c.node is node for c in every)]
        most = max(1, MOST_COMPARED // len(there)) if group.size > 1 and there else None
        made: list[Found] = []
        for node in there:
            here = (self._make_room(c, removable, cleared[c.node_id]) for c in every if c.node is node)
            made += islice((found for found in here if found), most)
        return self._best_priced(made, self._cost)

    def _promising(self, single: Sequence[Candidate], removable: Sequence[Replica]) -> list[Candidate]:
        """Of many single GPUs the few of each kind where, by bytes alone, the least regretted would make room."""
        residents: dict[DeviceId, list[tuple[Replica, int]]] = {}
        for replica in removable:
            for device_id, count in zip(replica.placement.device_ids, replica.placement.device_bytes, strict=True):
                residents.setdefault(device_id, []).append((replica, count))
        kinds: dict[str, list[tuple[float, int, Candidate]]] = {}
        for number, candidate in enumerate(single):
            (device,) = candidate.devices
            short = candidate.least_bytes - self.outlook.now(candidate.node_id).devices.get(device.device_id, 0)
            regret_s = 0.0
            for replica, count in residents.get(device.device_id, ()):
                if short <= 0:
                    break
                short, regret_s = short - count, regret_s + self.regret(replica)
            if short <= 0:
                kinds.setdefault(device.product, []).append((regret_s, number, candidate))
        few = max(1, MOST_COMPARED // max(1, len(kinds)))
        return [candidate for kind in kinds.values() for _, _, candidate in sorted(kind)[:few]]

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
        best = self.solve(candidate, cleared)
        if best is None:
            return None
        least = self._worth_taking(best)
        node_id = candidate.node_id

        def enough(room: Room) -> Placement | None:
            placement = self.solve(candidate, room) if candidate.may_hold(least, room) else None
            return placement if placement and placement.n_resident_layers >= least else None

        pool = self._in_the_way(candidate, removable, enough)
        found = cheapest_victims(
            pool, self.regret, lambda chosen: enough(self.outlook.without(node_id, chosen | self.outgrown))
        )
        return (found[0], found[1] | self.outgrown) if found else None

    def _in_the_way(
        self,
        candidate: Candidate,
        removable: Sequence[Replica],
        enough: Callable[[Room], Placement | None],
    ) -> Sequence[Replica]:
        """Those of `removable` worth looking at: the ones on the candidate's devices, if only devices are short."""
        devices = {device.device_id for device in candidate.devices}
        near = [r for r in removable if devices.intersection(r.placement.device_ids)]
        as_it_is = self.outlook.without(candidate.node_id, self.outgrown)
        cleared = self.outlook.without(candidate.node_id, {r.replica_id for r in near} | self.outgrown)
        if enough(replace(as_it_is, devices=cleared.devices)):
            return near
        anywhere = self.policy.max_active_models is not None
        return [r for r in removable if anywhere or r.placement.node_id == candidate.node_id]

    @staticmethod
    def _worth_taking(best: Placement) -> float:
        """GPU layers below which a partial offload is not worth taking, since stopping others would give the best."""
        return GOOD_ENOUGH * best.n_resident_layers if best.tier in PARTIAL else 0

    def _later(self, groups: Groups) -> Found | None:
        """The best placement once replicas that are busy, loading or waiting themselves have ended; those that make
        room for another model already are asked last."""
        if not self.may_evict:
            return None
        ending = sorted(
            (replica for replica in self._there() if replica.state in STAYING and not self.protected(replica)),
            key=lambda replica: (not (replica.idle or replica.drain_for), replica.replica_id),
        )
        unclaimed = [replica for replica in ending if replica.drain_for in ("", self.need.model)]
        pools = (unclaimed, ending) if len(unclaimed) < len(ending) else (ending,)

        def offers() -> Iterator[Found]:
            tiers: set[str] = set()
            for group in groups:
                if group.tier in tiers:
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

    def _tightness(self, found: Found) -> tuple[int, int, int, int]:
        """Most layers on GPUs (they differ for partial offload only), fewest devices, and the least memory left: on the
        GPUs of the machine, then on those that are used. The most, where models are to be spread."""
        placement, victims = found
        room = self.outlook.without(placement.node_id, victims)
        taken = sum(placement.device_bytes)
        there = sum(room.devices[device_id] for device_id in placement.device_ids) - taken
        on_node = sum(room.devices.values()) - taken
        if placement.tier == CPU_ONLY:
            on_node = there = -room.host_bytes  # the node with the most RAM free
        elif self.policy.placement == "spread":
            on_node, there = -on_node, -there
        return -placement.n_resident_layers, len(placement.device_ids), on_node, there

    def _cost(self, found: Found) -> tuple[int, float, int, tuple[int, int, int, int]]:
        placement, victims = found
        regret_s = sum(self.regret(self.replicas[victim]) for victim in victims)
        return len(placement.device_ids), regret_s, len(victims), self._tightness(found)


def _within(one: Placement, other: Placement) -> bool:
    """Whether `one` needs no more than `other` anywhere."""
    devices = zip(one.device_bytes, other.device_bytes, strict=True)
    return one.host_bytes <= other.host_bytes and all(mine <= theirs for mine, theirs in devices)


def _is_on_gpus_now(choice: Choice) -> bool:
    return choice.verdict in ("free", "evict") and choice.placement is not None and choice.placement.tier in ON_GPU


def _clearly_better(one: Placement, other: Placement) -> bool:
    """Worth a wait: an earlier tier, or clearly more layers on GPUs."""
    if one.tier != other.tier:
        return TIERS.index(one.tier) < TIERS.index(other.tier)
    return GOOD_ENOUGH * one.n_resident_layers > other.n_resident_layers
