"""The search for places: for each tier the best one that is free, or that could be made by stopping somebody.

Within a tier: fewest devices, no eviction before eviction, and of what costs nearly the same the victims that are
regretted least, and the tightest fit, so that big cards stay free for big models. A place that would cost nearly the
same without its victims ends the search; once there is one on GPUs, nobody is evicted for a later tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import groupby, islice
from math import fsum
from typing import Any

from scheduler.choice.candidates import (
    CPU_ONLY,
    EXPERTS_IN_RAM,
    ON_GPU,
    PARTIAL,
    SOME_LAYERS_IN_RAM,
    Candidate,
    exact,
    fits,
)
from scheduler.choice.eviction import Victims, cheapest_victims, evictable
from scheduler.choice.groups import Group, spilling
from scheduler.choice.need import Need
from scheduler.choice.outlook import Outlook
from scheduler.choice.room import Room
from scheduler.cluster.inventory import Inventory, Node
from scheduler.cluster.replica import Placement, Replica
from scheduler.cluster.replicas import Replicas
from scheduler.config import Policy
from scheduler.units import DeviceId

GOOD_ENOUGH = 0.9  # of the GPU layers that could be had; where prices are not known, nobody is evicted for the rest
NEARLY = 1.25  # of the lowest price: what costs no more counts as equally cheap
DRAWING_GAINS = 1.1  # times the price, at the most (1.07 were seen), when the drawn graph leaves room for a layer more
MOST_ROOMY = 2  # machines on which a free place is sought once there is a place on GPUs
MOST_COMPARED = 12  # combinations of GPUs for which victims are sought, the least memory first

Found = tuple[Placement, Victims]


@dataclass(slots=True)
class Search:
    """For one need at one moment. `may_evict` false: only `outgrown` replicas are stopped for it.

    `price` tells what a placement costs in seconds with its victims gone, or None: then the first tier that fits wins.
    """

    need: Need
    nodes: Sequence[Node]
    inventory: Inventory
    outlook: Outlook
    replicas: Replicas
    protected: Callable[[Replica], str]  # why it is never evicted, empty if it may be
    policy: Policy
    now: float
    outgrown: Victims = frozenset()  # smaller replicas of the same model, stopped first
    may_evict: bool = True
    price: Callable[[Placement, Victims], float | None] = lambda placement, victims: None
    regret: Callable[[Replica], float] = lambda replica: replica.last_used_at  # the least regretted goes first
    tokens_per_s: Callable[[Placement], float | None] = lambda placement: None
    every_node: Sequence[Node] = ()
    """`nodes` may be a shortlist of them."""

    def solve(self, candidate: Candidate, room: Room) -> Placement | None:
        """The candidate's best placement, if it is fast enough for the catalogue."""
        placement = candidate.solve(room)
        wanted = self.need.wishes.min_tokens_per_s
        if placement is None or not wanted:
            return placement
        tokens_per_s = self.tokens_per_s(placement)
        return placement if tokens_per_s is None or tokens_per_s >= wanted else None

    def feasible(self, candidate: Candidate, room: Room) -> bool:
        """Whether the candidate has any placement in the room that would do."""
        if self.need.wishes.min_tokens_per_s:
            return self.solve(candidate, room) is not None
        return candidate.feasible(room)

    def evictable(self, min_residency_s: float) -> list[Replica]:
        """Replicas that may make room for this one, the least regretted first."""
        if not self.may_evict:
            return []
        others = (replica for replica in self.there() if replica.replica_id not in self.outgrown)
        return evictable(others, self.protected, self.now, min_residency_s, self.need.model, self.regret)

    def there(self) -> Iterable[Replica]:
        """Replicas that may have to do with it: those on the machines in question, or everywhere where their number is
        limited."""
        if self.policy.max_active_models is not None:
            return self.replicas.values()
        return (replica for node in self.nodes for replica in self.replicas.on_node(node.facts.node_id))

    # ------------------------------------------------------------------ places

    def offers(self, groups: Sequence[Group], idle: Sequence[Replica], *, worse_too: bool = False) -> Iterator[Found]:
        """The best placement of each tier, on the fewest devices that will do. Once there is a place on GPUs, nobody is
        evicted for a place of a later tier; when it could hardly be cheaper, later ones are not sought, but for one on
        more GPUs that spares its victims, unless they are wanted all the same (`worse_too`)."""
        tiers: set[str] = set()
        hardly_cheaper, victims = False, Victims()
        for tier, each in groupby(groups, key=lambda group: group.tier):
            if hardly_cheaper and not worse_too and (tier not in ON_GPU or not victims):
                return
            best = self._best_on_any_size if tier == EXPERTS_IN_RAM else self._best_on_fewest
            found = best(tuple(each), idle, tiers)
            if found is not None:
                tiers.add(tier)
                yield found
                if tier in ON_GPU and self._could_hardly_be_cheaper(found):
                    hardly_cheaper, victims = True, found[1]

    def _could_hardly_be_cheaper(self, found: Found) -> bool:
        """Whether it would cost nearly the same without its victims, and a later tier no less than that."""
        price_s, without_s = self.price(*found), self.price(found[0], frozenset())
        return price_s is not None and without_s is not None and price_s <= NEARLY * without_s

    def _best_on_fewest(self, sizes: Sequence[Group], idle: Sequence[Replica], tiers: set[str]) -> Found | None:
        best = self._roomiest_free if tiers & ON_GPU else self._best_of
        return next((found for group in sizes if (found := best(group, idle))), None)

    def _best_on_any_size(self, sizes: Sequence[Group], idle: Sequence[Replica], tiers: set[str]) -> Found | None:
        """The more GPUs, the fewer experts are left for host RAM: besides the fewest that will do, the roomiest of each
        larger number are looked at, and all of a machine's with victims too."""
        made: list[Found] = []
        for group in sizes:
            fewest_or_all = not made or group is sizes[-1]
            best = self._best_of if fewest_or_all and not tiers & ON_GPU else self._roomiest_free
            found = best(group, idle)
            if found is not None:
                made.append(found)
        return min(made, key=self._price_or_spill, default=None)

    def _price_or_spill(self, found: Found) -> tuple[float, int]:
        """By price; where it is not known, by what is left in host RAM."""
        price_s, spilled = self.price(*found), found[0].n_spilled_experts
        return (float(spilled) if price_s is None else price_s), len(found[0].device_ids)

    def cheapest(self, offers: Iterable[Found]) -> list[Found]:
        """The cheapest of what each tier offers, best tier first; the first of them where prices are not known. Behind
        it, partial offloads that may turn out to be cheaper when their graphs are drawn (`cheapest_drawn`)."""
        priced: list[tuple[float, int, Found]] = []
        for found in offers:
            price_s = self.price(*found)
            if price_s is None:
                return [min(priced)[2] if priced else found]
            priced.append((price_s, len(priced), found))
        priced.sort()
        most_s = DRAWING_GAINS * priced[0][0] if priced else 0.0
        return [
            found for price_s, i, found in priced if i == priced[0][1] or (_is_partial(found) and price_s <= most_s)
        ]

    def cheapest_drawn(self, close: Sequence[Found]) -> Found:
        """Of several that cost nearly the same by the bound, the cheapest with the graph drawn, which takes time."""
        if len(close) == 1:
            return close[0]
        drawn = [self._drawn(found) if _is_partial(found) else found for found in close]
        return min(drawn, key=lambda found: self.price(*found) or 0.0)

    def _best_of(self, group: Group, idle: Sequence[Replica]) -> Found | None:
        """The best placement of equally good candidates, evicting the `idle` replicas if nothing is free; of partial
        offloads the cheapest of what is free, most layers, and nearly so many, where prices are known."""
        free = self._best_free(group, idle)
        if group.tier not in PARTIAL or (free is not None and self.price(*free) is None):
            return free or self.make_best_room(group, idle)
        made = [self.make_best_room(group, idle, share) for share in (GOOD_ENOUGH, 1.0)]
        found = [(price_s, i, each) for i, each in enumerate((free, *made)) if each and (price_s := self.price(*each))]
        return min(found)[2] if found else free or made[0]

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
        if placement is None or candidate.tier not in PARTIAL or self.price(placement, frozenset()) is not None:
            return placement
        best = self.solve(candidate, self.outlook.without(candidate.node_id, (replica.replica_id for replica in idle)))
        least = GOOD_ENOUGH * best.n_resident_layers if best else 0  # fewer are not worth taking
        return placement if placement.n_resident_layers >= least else None

    def make_best_room(self, group: Group, removable: Sequence[Replica], share: float = GOOD_ENOUGH) -> Found | None:
        """The best placement with some of `removable` gone, with `share` of the layers on GPUs that could be there."""
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
            here = (self._make_room(c, removable, cleared[c.node_id], share) for c in every if c.node is node)
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

    def _make_room(
        self, candidate: Candidate, removable: Sequence[Replica], cleared: Room, share: float
    ) -> Found | None:
        """The placement after stopping the set of `removable` (the least regretted first) that is regretted least;
        `cleared` is the room without all of them."""
        best = self.solve(candidate, cleared)
        if best is None:
            return None
        least = share * best.n_resident_layers if best.tier in PARTIAL else 0
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

    # ------------------------------------------------------------------ comparing

    def _drawn(self, found: Found) -> Found:
        """The same with the graph drawn, and the layers more that this leaves room for."""
        placement, victims = found
        drawn = exact(placement, self.need, self.inventory.nodes[placement.node_id])
        return (self._grown(drawn, victims), victims) if within(drawn, placement) else found

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
        regret_s = fsum(self.regret(self.replicas[victim]) for victim in victims)  # the same in any order
        return len(placement.device_ids), regret_s, len(victims), self._tightness(found)


def _is_partial(found: Found) -> bool:
    return found[0].tier in PARTIAL


def within(one: Placement, other: Placement) -> bool:
    """Whether `one` needs no more than `other` anywhere."""
    devices = zip(one.device_bytes, other.device_bytes, strict=True)
    return one.host_bytes <= other.host_bytes and all(mine <= theirs for mine, theirs in devices)
