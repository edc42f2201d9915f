"""Chooses the cheapest place for a model, now or after evictions. Or says what it waits for, or why it never fits.

Each tier makes its best offer (`search`), and the cheapest offer is taken. If speeds are known, costs are in seconds,
and waiting for a better place competes with what can be had now. If speeds are not known, the order of the tiers
decides, and a place in host RAM is not taken before `spill_after_s`. `benchmarks/decisions.py` measures decisions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from scheduler.choice.eviction import Victims
from scheduler.choice.explain import Rejection, rejections
from scheduler.choice.layouts import CONTEXT_STEP, ON_GPU, fits
from scheduler.choice.offer import Offer
from scheduler.choice.search import Search, within
from scheduler.choice.shortlist import wider
from scheduler.choice.situation import Situation
from scheduler.choice.spanning import over_machines
from scheduler.choice.tiers import Tier, tiers_of
from scheduler.choice.ways_out import cleared, ways_out
from scheduler.choice.workload import Workload
from scheduler.cluster.free_memory import STAYING
from scheduler.cluster.replica import Placement, Replica

Verdict = Literal["free", "evict", "wait", "blocked", "impossible"]
Tiers = Sequence[Tier]


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do. For "free" and "evict", `placement` is the place to load the model. For "wait", it is the place that
    the model waits for. It is None while other programs use the memory, or while a device cannot be used.

    `victims`: replicas to evict; for "wait", the busy replicas that are in the way. `rejections`: why each better
    candidate was not taken. `would_fit_if`: the smallest changes, each of which alone would make room. The last two are
    filled only on request (`explain`).
    """

    verdict: Verdict
    placement: Placement | None
    victims: Victims
    rejections: tuple[Rejection, ...] = ()
    would_fit_if: tuple[str, ...] = ()

    @property
    def offer(self) -> Offer | None:
        return Offer(self.placement, self.victims) if self.placement is not None else None

    @property
    def is_on_gpus_now(self) -> bool:
        return self.verdict in ("free", "evict") and self.placement is not None and self.placement.tier in ON_GPU


@dataclass(frozen=True, slots=True)
class Chooser:
    """Decides what to do in one situation."""

    situation: Situation

    @property
    def workload(self) -> Workload:
        return self.situation.workload

    @property
    def _search(self) -> Search:
        return Search(self.situation)

    def choose(self, *, explain: bool = False) -> Choice:
        """Raises Rejected for parameters that llama.cpp refuses."""
        here = self.situation
        tiers = self._tiers()
        choice = self._choose(tiers)
        if len(here.nodes) < len(here.every_node) and not choice.is_on_gpus_now:
            more = wider(here.workload, here.every_node, here.snapshot)
            nodes = list({node.facts.node_id: node for node in (*here.nodes, *more)}.values())
            return self.when(nodes=nodes, every_node=nodes).choose(explain=explain)
        precise = here.workload.precision == "exact"
        if choice.placement is not None and not precise and (explain or choice.verdict != "wait"):
            drawn = here.workload.drawn(choice.placement, here.inventory.nodes[choice.placement.node_id])
            if not within(drawn, choice.placement):  # the bound was too low: decide without it
                return self.when(workload=here.workload.at("exact")).choose(explain=explain)
            choice = replace(choice, placement=self._search.grown(drawn, choice.victims))
            choice = replace(choice, placement=self._lengthened(choice))
        return self._explained(choice, tiers) if explain else choice

    def when(self, **changes: Any) -> Chooser:
        """The same decision, with these fields of the situation changed."""
        return Chooser(replace(self.situation, **changes))

    def _explained(self, choice: Choice, tiers: Tiers) -> Choice:
        here = self.situation
        why_not = rejections(here, tiers, choice.placement, waits=choice.verdict == "wait")
        if choice.placement is not None:
            return replace(choice, rejections=why_not)
        rooms = cleared(here)
        if choice.verdict != "wait":
            why_not = (*over_machines(here.workload, rooms), *why_not)
        return replace(choice, rejections=why_not, would_fit_if=ways_out(here, rooms, self._fits_unprotected))

    def _fits_unprotected(self, names: frozenset[str]) -> bool:
        """Whether there would be a place if the models `names` were not protected."""
        return self.when(unprotected=names, may_evict=True).choose().placement is not None

    def _lengthened(self, choice: Choice) -> Placement | None:
        """The same layout with the longest context that has room, up to the workload's limit."""
        here, offer, most = self.situation, choice.offer, self.situation.workload.rounded_n_ctx
        if offer is None:
            return None
        placement = offer.placement
        if placement.tier in ON_GPU:
            most = max(most, here.workload.longest_n_ctx)
        room, node = self._search.room_of(offer), here.inventory.nodes[placement.node_id]
        step = CONTEXT_STEP * placement.context.n_streams
        low, high = placement.context.n_ctx // step, most // step + 1
        while high - low > 1:  # `low` fits, `high` does not
            middle = (low + high) // 2
            longer = here.workload.with_n_ctx(placement.context, middle * step).drawn(placement, node)
            low, high, placement = (middle, high, longer) if fits(longer, room) else (low, middle, placement)
        return placement

    def with_alternatives(self, *, explain: bool = False) -> Choice:
        """The choice for the workload itself. If that is not on GPUs now, the choice for the first alternative that is.
        If it has no place at all, the choice for the first alternative that has one. Raises as `choose`."""
        choice, workload = self.choose(explain=explain), self.situation.workload
        if not workload.alternatives or choice.is_on_gpus_now:
            return choice
        others = [
            self.when(workload=workload.with_context(context)).choose(explain=explain)
            for context in workload.alternatives
        ]
        better = [other for other in others if other.is_on_gpus_now]
        if not better and choice.verdict in ("blocked", "impossible"):
            better = [other for other in others if other.verdict not in ("blocked", "impossible")]
        return better[0] if better else choice

    def options(self) -> list[Offer]:
        """The best offer of each tier, with any idle replica evicted, in the order of the tiers. Raises as `choose`."""
        return list(self._search.offers(self._tiers(), self.situation.evictable(0.0), worse_too=True))

    def _choose(self, tiers: Tiers) -> Choice:
        close = self._find(tiers, self.situation.policy.min_residency_s)
        if not close or close[0].placement.tier not in ON_GPU:
            close = self._find(tiers, 0.0) or close
        if close and (close[0].placement.tier in ON_GPU or self._is_out_of_patience()):
            return self._go(close)
        later = self._later(tiers)
        if later and (not close or self._is_worth_waiting(later, close[0])):
            return Choice("wait", later.placement, later.victims)
        return self._go(close) if close else self._refuse(tiers)

    def _tiers(self) -> list[Tier]:
        return tiers_of(self.situation.workload, self.situation.nodes)

    def _go(self, close: Sequence[Offer]) -> Choice:
        offer = self._search.cheapest_drawn(close)
        free = not offer.victims and fits(offer.placement, self.situation.snapshot.now(offer.placement.node_id))
        return Choice("free" if free else "evict", offer.placement, offer.victims)

    def _is_feasible(self, tiers: Tiers, keeping: Sequence[Replica]) -> bool:
        """Whether the model fits on some machine with only the replicas `keeping` on it. Only the devices with the most
        memory are checked: if the model fits on others, it fits on these."""
        here = self.situation
        for node, room in here.snapshot.unlike(here.nodes, keeping):
            roomiest = (tier.roomiest(node, room) for tier in tiers if node in tier.nodes)
            if any(candidate is not None and here.feasible(candidate, room) for candidate in roomiest):
                return True
        return False

    def ever_fits(self) -> bool:
        """Whether the model fits on one of the machines if they are empty."""
        return self._is_feasible(self._tiers(), ())

    def _refuse(self, tiers: Tiers) -> Choice:
        here = self.situation
        if not self._is_feasible(tiers, ()):
            return Choice("impossible", None, frozenset())
        kept = [replica for replica in here.there() if here.protection(replica)]
        if here.may_evict and self._is_feasible(tiers, kept):
            return Choice("wait", None, frozenset())
        return Choice("blocked", None, frozenset())

    # ------------------------------------------------------------------ finding

    def _find(self, tiers: Tiers, min_residency_s: float) -> list[Offer]:
        """The cheapest offer that can be had now, and offers close to it. Idle replicas may be evicted for it if they
        are at least `min_residency_s` old."""
        return self._search.cheapest(self._search.offers(tiers, self.situation.evictable(min_residency_s)))

    def _later(self, tiers: Tiers) -> Offer | None:
        """The cheapest offer after busy, loading or pending replicas have ended. Replicas that already make room for
        another model are considered last."""
        here = self.situation
        if not here.may_evict:
            return None
        ending = sorted(
            (replica for replica in here.there() if replica.state in STAYING and not here.protection(replica)),
            key=lambda replica: (not (replica.idle or replica.drain_for), replica.replica_id),
        )
        unclaimed = [replica for replica in ending if replica.drain_for in ("", here.workload.model)]
        pools = (unclaimed, ending) if len(unclaimed) < len(ending) else (ending,)

        def offers() -> Iterator[Offer]:
            offered: set[str] = set()
            for tier in tiers:
                if tier.name in offered:
                    continue
                offer = next((made for pool in pools if (made := self._search.make_room(tier, pool))), None)
                if offer is not None:
                    yield offer
                    offered.add(tier.name)
                if offered & ON_GPU:
                    return

        return next(iter(self._search.cheapest(offers())), None)

    # ------------------------------------------------------------------ waiting

    def _is_out_of_patience(self) -> bool:
        """Whether a place in host RAM is taken now, whatever may come later. If costs are in seconds, they decide."""
        here = self.situation
        return not here.appraiser.in_seconds and here.waited_s >= here.policy.spill_after_s

    def _is_worth_waiting(self, later: Offer, now: Offer) -> bool:
        """Whether the later offer is better than the one that can be had now. Its cost includes the wait. The longer
        the request has waited already, the longer the rest of the wait is estimated."""
        cost = self.situation.appraiser.cost
        return cost(later).is_worth(self.situation.waited_s, cost(now))
