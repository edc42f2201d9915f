"""The search for offers: for each tier the best place that is free, or that evictions would free.

The order within a tier: the fewest devices, then places that need no eviction. Of places that cost nearly the same, the
one with the least regretted victims, then the tightest fit, so that large GPUs stay free for large models. The search
ends with an offer that later tiers cannot clearly beat. After an offer on GPUs, nothing is evicted for a later tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import groupby, islice
from typing import Any

from scheduler.choice.appraiser import Appraiser
from scheduler.choice.eviction import Victims, cheapest_victims
from scheduler.choice.layouts import (
    CPU_ONLY,
    EXPERTS_IN_RAM,
    ON_GPU,
    PARTIAL,
    SOME_LAYERS_IN_RAM,
    LayoutFamily,
    fits,
)
from scheduler.choice.offer import Offer
from scheduler.choice.situation import Situation
from scheduler.choice.tiers import Tier, spilling
from scheduler.cluster.free_memory import Room
from scheduler.cluster.replica import Placement, Replica
from scheduler.units import DeviceId, NodeId, ReplicaId

GOOD_ENOUGH = 0.9  # share of the layers that could be on GPUs: victims are searched for this share, and for all layers
DRAWING_GAINS = 1.1  # largest gain in speed (1.07 were seen) if the drawn graph leaves room for one more layer
MOST_ROOMY = 2  # machines on which a free place is searched after a place on GPUs was found
MOST_COMPARED = 12  # combinations of GPUs for which victims are searched, the least memory first


@dataclass(frozen=True, slots=True)
class Search:
    """The search in one situation."""

    situation: Situation

    @property
    def _appraiser(self) -> Appraiser:
        return self.situation.appraiser

    # ------------------------------------------------------------------ tiers

    def offers(self, tiers: Sequence[Tier], idle: Sequence[Replica], *, worse_too: bool = False) -> Iterator[Offer]:
        """The best offer of each tier. After an offer that can hardly be beaten, only a free place on more GPUs is
        searched, because it needs no victims. `worse_too`: all tiers are searched."""
        on_gpu = ended = False
        victims = Victims()
        for name, each in groupby(tiers, key=lambda tier: tier.name):
            if ended and not worse_too and (name not in ON_GPU or not victims):
                return
            best = self._best_on_any_size if name == EXPERTS_IN_RAM else self._best_on_fewest
            offer = best(tuple(each), idle, may_evict=not on_gpu)
            if offer is not None:
                yield offer
                on_gpu = on_gpu or name in ON_GPU
                if not ended and not self._appraiser.can_be_beaten(offer):
                    ended, victims = True, offer.victims

    def _best_on_fewest(self, sizes: Sequence[Tier], idle: Sequence[Replica], *, may_evict: bool) -> Offer | None:
        best = self._best_of if may_evict else self._roomiest_free
        return next((offer for tier in sizes if (offer := best(tier, idle))), None)

    def _best_on_any_size(self, sizes: Sequence[Tier], idle: Sequence[Replica], *, may_evict: bool) -> Offer | None:
        """With more GPUs, fewer experts are in host RAM. So larger numbers of GPUs are tried, too, not only the fewest
        that are enough. For each larger number, the GPUs with the most free memory are tried. For all GPUs of a
        machine, evictions are tried, too."""
        made: list[Offer] = []
        for tier in sizes:
            fewest_or_all = not made or tier is sizes[-1]
            best = self._best_of if fewest_or_all and may_evict else self._roomiest_free
            offer = best(tier, idle)
            if offer is not None:
                made.append(offer)
        return min(made, key=lambda offer: (self._appraiser.cost(offer), len(offer.placement.device_ids)), default=None)

    def cheapest(self, offers: Iterable[Offer]) -> list[Offer]:
        """The cheapest of the offers, followed by partial offloads that may be cheaper when their graphs are drawn."""
        priced = sorted((self._appraiser.cost(offer), number, offer) for number, offer in enumerate(offers))
        if not priced:
            return []
        least, _, cheapest = priced[0]
        most_s = DRAWING_GAINS * least.seconds
        partial = [offer for cost, _, offer in priced[1:] if cost[:2] == least[:2] and cost.seconds <= most_s]
        return [cheapest, *(offer for offer in partial if offer.placement.tier in PARTIAL)]

    # ------------------------------------------------------------------ candidates that are equally good

    def _best_of(self, tier: Tier, idle: Sequence[Replica]) -> Offer | None:
        """The best offer, with evictions if nothing is free. Of partial offloads, the cheapest of three: a free place,
        evictions for all layers that could be on GPUs, and evictions for nearly all of them."""
        free = self._best_free(tier)
        if tier.name not in PARTIAL:
            return free or self.make_room(tier, idle)
        made = (free, *(self.make_room(tier, idle, share) for share in (GOOD_ENOUGH, 1.0)))
        return min((offer for offer in made if offer), key=self._appraiser.cost, default=None)

    def _best_free(self, tier: Tier) -> Offer | None:
        there = (node for node in tier.nodes if tier.may_fit(node, self._now(node.facts.node_id)))
        return self._tightest(candidate for node in there for candidate in tier.on(node))

    def _roomiest_free(self, tier: Tier, _: Sequence[Replica] = ()) -> Offer | None:
        """A free place, searched only where most memory is free: it competes with a place that was found already, so
        a long search does not pay."""
        rooms = {node.facts.node_id: self._now(node.facts.node_id) for node in tier.nodes}
        roomy = nlargest(MOST_ROOMY, tier.nodes, key=lambda node: sum(rooms[node.facts.node_id].devices.values()))
        there = (node for node in roomy if tier.may_fit(node, rooms[node.facts.node_id]))
        each = (tier.roomiest(node, rooms[node.facts.node_id]) for node in there)
        return self._tightest(candidate for candidate in each if candidate is not None)

    def _tightest(self, candidates: Iterable[LayoutFamily]) -> Offer | None:
        """The tightest of the candidates that are free now."""
        if self.situation.outgrown:  # these are evicted first
            return None
        placements = (self.situation.solve(each, self._now(each.node_id)) for each in candidates)
        return self._best([Offer(placement) for placement in placements if placement], self._tightness)

    def make_room(self, tier: Tier, removable: Sequence[Replica], share: float = GOOD_ENOUGH) -> Offer | None:
        """The best offer with some of `removable` evicted. On GPUs are at least `share` of the layers that could be."""
        everybody = frozenset(r.replica_id for r in removable) | self.situation.outgrown
        cleared = {n.facts.node_id: self._without(n.facts.node_id, everybody) for n in tier.nodes}
        there = [node for node in tier.nodes if tier.may_fit(node, cleared[node.facts.node_id])]
        every = [candidate for node in there for candidate in tier.on(node)]
        if tier.size == 1 and len(every) > MOST_COMPARED:
            every = self._promising(every, removable)
            there = [node for node in there if any(c.node is node for c in every)]
        most = max(1, MOST_COMPARED // len(there)) if tier.size > 1 and there else None
        made: list[Offer] = []
        for node in there:
            here = (self._with_victims(c, removable, cleared[c.node_id], share) for c in every if c.node is node)
            made += islice((offer for offer in here if offer), most)
        return self._best(made, self._harm)

    def _promising(self, single: Sequence[LayoutFamily], removable: Sequence[Replica]) -> list[LayoutFamily]:
        """Of many single GPUs, a few of each kind: those where, by bytes alone, the least regret makes room."""
        residents: dict[DeviceId, list[tuple[Replica, int]]] = {}
        for replica in removable:
            for device_id, count in zip(replica.placement.device_ids, replica.placement.device_bytes, strict=True):
                residents.setdefault(device_id, []).append((replica, count))
        kinds: dict[str, list[tuple[float, int, LayoutFamily]]] = {}
        for number, candidate in enumerate(single):
            (device,) = candidate.devices
            short = candidate.least_bytes - self._now(candidate.node_id).devices.get(device.device_id, 0)
            regret = 0.0
            for replica, count in residents.get(device.device_id, ()):
                if short <= 0:
                    break
                short, regret = short - count, regret + self._appraiser.regret(replica)
            if short <= 0:
                kinds.setdefault(device.product, []).append((regret, number, candidate))
        few = max(1, MOST_COMPARED // max(1, len(kinds)))
        return [candidate for kind in kinds.values() for _, _, candidate in sorted(kind)[:few]]

    # ------------------------------------------------------------------ victims

    def _with_victims(
        self, candidate: LayoutFamily, removable: Sequence[Replica], cleared: Room, share: float
    ) -> Offer | None:
        """The offer with the least regretted set of `removable` evicted. `cleared`: the room without all of them."""
        best = self.situation.solve(candidate, cleared)
        if best is None:
            return None
        least = share * best.n_resident_layers if best.tier in PARTIAL else 0

        def enough(room: Room) -> Placement | None:
            placement = self.situation.solve(candidate, room) if not least or candidate.may_hold(least, room) else None
            return placement if placement and placement.n_resident_layers >= least else None

        pool, outgrown = self._in_the_way(candidate, removable, enough), self.situation.outgrown
        found = cheapest_victims(
            pool, self._appraiser.regret, lambda chosen: enough(self._without(candidate.node_id, chosen | outgrown))
        )
        return Offer(found[0], found[1] | outgrown) if found else None

    def _in_the_way(
        self,
        candidate: LayoutFamily,
        removable: Sequence[Replica],
        enough: Callable[[Room], Placement | None],
    ) -> Sequence[Replica]:
        """The replicas of `removable` that can help: those on the candidate's devices, if only devices are short."""
        devices = {device.device_id for device in candidate.devices}
        near = [r for r in removable if devices.intersection(r.placement.device_ids)]
        as_it_is = self._without(candidate.node_id, self.situation.outgrown)
        cleared = self._without(candidate.node_id, {r.replica_id for r in near} | self.situation.outgrown)
        if enough(replace(as_it_is, devices=cleared.devices)):
            return near
        anywhere = self.situation.policy.max_active_models is not None
        return [r for r in removable if anywhere or r.placement.node_id == candidate.node_id]

    # ------------------------------------------------------------------ drawn graphs

    def cheapest_drawn(self, close: Sequence[Offer]) -> Offer:
        """Of offers that cost nearly the same by the bound, the cheapest with the graph drawn. Drawing takes time."""
        if len(close) == 1:
            return close[0]
        drawn = [self._drawn(offer) if offer.placement.tier in PARTIAL else offer for offer in close]
        return min(drawn, key=self._appraiser.cost)

    def _drawn(self, offer: Offer) -> Offer:
        """The same offer with the graph drawn, and with the further layers for which this leaves room."""
        placement = offer.placement
        drawn = self.situation.workload.drawn(placement, self.situation.inventory.nodes[placement.node_id])
        return Offer(self.grown(drawn, offer.victims), offer.victims) if within(drawn, placement) else offer

    def grown(self, drawn: Placement, victims: Victims) -> Placement:
        """The placement with more layers on GPUs, if the drawn graph leaves room for them."""
        if drawn.tier not in PARTIAL:
            return drawn
        workload, node = self.situation.workload, self.situation.inventory.nodes[drawn.node_id]
        room = self.room_of(Offer(drawn, victims))
        if drawn.tier == SOME_LAYERS_IN_RAM:
            return spilling(workload, node).grown(drawn, room)
        devices = tuple(node.devices[device_id].facts for device_id in drawn.device_ids)
        return LayoutFamily(drawn.tier, workload, node, devices).grown(drawn, room)

    # ------------------------------------------------------------------ comparing

    def _best(self, offers: Sequence[Offer], key: Callable[[Offer], Any]) -> Offer | None:
        """The offer with the lowest `key`, of those that cost nearly the least."""
        if len(offers) > 1:
            costs = [self._appraiser.cost(offer) for offer in offers]
            least = min(costs)
            offers = [offer for offer, cost in zip(offers, costs, strict=True) if cost.is_near(least)]
        return min(offers, key=key, default=None)

    def _tightness(self, offer: Offer) -> tuple[int, int, int, int]:
        """The order: most layers on GPUs (they differ only for partial offload), fewest devices, and the least memory
        left: on all GPUs of the machine, then on the used ones. With `placement: spread`, the most memory left."""
        placement = offer.placement
        room = self._without(placement.node_id, offer.victims)
        taken = sum(placement.device_bytes)
        there = sum(room.devices[device_id] for device_id in placement.device_ids) - taken
        on_node = sum(room.devices.values()) - taken
        if placement.tier == CPU_ONLY:
            on_node = there = -room.host_bytes  # the node with the most free RAM
        elif self.situation.policy.placement == "spread":
            on_node, there = -on_node, -there
        return -placement.n_resident_layers, len(placement.device_ids), on_node, there

    def _harm(self, offer: Offer) -> tuple[int, float, int, tuple[int, int, int, int]]:
        n_devices, regret = len(offer.placement.device_ids), self._appraiser.regret_of(offer)
        return n_devices, regret, len(offer.victims), self._tightness(offer)

    def room_of(self, offer: Offer) -> Room:
        """The room that the offer uses: the room as it is now, if that is enough."""
        placement = offer.placement
        now = self._now(placement.node_id)
        free = not offer.victims and fits(placement, now)
        return now if free else self._without(placement.node_id, offer.victims)

    def _now(self, node_id: NodeId) -> Room:
        return self.situation.snapshot.now(node_id)

    def _without(self, node_id: NodeId, victims: Iterable[ReplicaId]) -> Room:
        return self.situation.snapshot.without(node_id, victims)


def within(one: Placement, other: Placement) -> bool:
    """Whether `one` needs no more than `other` anywhere."""
    devices = zip(one.device_bytes, other.device_bytes, strict=True)
    return one.host_bytes <= other.host_bytes and all(mine <= theirs for mine, theirs in devices)
