"""The place for a model: the cheapest that fits, now or after evicting; else what it waits for; else why never.

Each tier offers its best place (`search`), and the cheapest in seconds wins (`price`); where speeds are not known, the
first tier that fits. Host RAM is not settled for while a better place is only being used; where speeds are not known,
not before `spill_after_s`. `benchmarks/decisions.py` has the times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scheduler.choice.candidates import CONTEXT_STEP, ON_GPU, TIERS, exact, fits
from scheduler.choice.eviction import Victims
from scheduler.choice.explain import Rejection
from scheduler.choice.groups import Group, groups
from scheduler.choice.reasons import rejections
from scheduler.choice.room import STAYING
from scheduler.choice.search import GOOD_ENOUGH, Found, Search, within
from scheduler.choice.shortlist import wider
from scheduler.choice.spanning import over_machines
from scheduler.choice.ways_out import cleared, ways_out
from scheduler.cluster.replica import Placement, Replica

Verdict = Literal["free", "evict", "wait", "blocked", "impossible"]
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
class Chooser(Search):
    """Decides what to do about the need. `waited_s`: seconds that it has been waited for already."""

    waited_s: float = 0.0

    def choose(self, *, explain: bool = False) -> Choice:
        """Raises Rejected for parameters that llama.cpp refuses."""
        groups = self._groups()
        choice = self._choose(groups)
        if len(self.nodes) < len(self.every_node) and not _is_on_gpus_now(choice):
            more = wider(self.need, self.every_node, self.outlook)
            nodes = list({node.facts.node_id: node for node in (*self.nodes, *more)}.values())
            return replace(self, nodes=nodes, every_node=()).choose(explain=explain)
        if choice.placement is not None and not self.need.draws and (explain or choice.verdict != "wait"):
            drawn = exact(choice.placement, self.need, self.inventory.nodes[choice.placement.node_id])
            if not within(drawn, choice.placement):  # the bound lied: do without it
                return replace(self, need=self.need.drawn()).choose(explain=explain)
            choice = replace(choice, placement=self._grown(drawn, choice.victims))
            choice = replace(choice, placement=self._lengthened(choice))
        if not explain:
            return choice
        why_not = rejections(self, groups, choice.placement, waits=choice.verdict == "wait")
        if choice.placement is not None:
            return replace(choice, rejections=why_not)
        rooms = cleared(self)
        if choice.verdict != "wait":
            why_not = (*over_machines(self.need, rooms), *why_not)
        return replace(choice, rejections=why_not, would_fit_if=ways_out(self, rooms, self._fits_unpinned))

    def _fits_unpinned(self, names: frozenset[str]) -> bool:
        """Whether there would be a place if those models were not protected."""
        bolder = replace(self, protected=lambda r: "" if r.model in names else self.protected(r), may_evict=True)
        return bolder.choose().placement is not None

    def _lengthened(self, choice: Choice) -> Placement | None:
        """The same layout with the longest context that there is room for, up to what the need says."""
        placement, most = choice.placement, self.need.rounded_n_ctx
        if placement is None:
            return None
        if placement.tier in ON_GPU:
            most = max(most, self.need.longest_n_ctx)
        node = self.inventory.nodes[placement.node_id]
        room = self.outlook.now(placement.node_id)
        if choice.victims or not fits(placement, room):
            room = self.outlook.without(placement.node_id, choice.victims)
        step = CONTEXT_STEP * placement.context.n_seq_max
        low, high = placement.context.n_ctx // step, most // step + 1
        while high - low > 1:  # `low` fits, `high` does not
            middle = (low + high) // 2
            longer = exact(placement, self.need.with_n_ctx(placement.context, middle * step), node)
            low, high, placement = (middle, high, longer) if fits(longer, room) else (low, middle, placement)
        return placement

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
        return list(self.offers(self._groups(), self.evictable(0.0), worse_too=True))

    def _choose(self, groups: Groups) -> Choice:
        close = self._find(groups, self.policy.min_residency_s)
        if not close or close[0][0].tier not in ON_GPU:
            close = self._find(groups, 0.0) or close
        found = close[0] if close else None
        if found and (found[0].tier in ON_GPU or self._has_waited_long_enough(found)):
            return self._go(close)
        later = self._later(groups)
        if later and (found is None or self._worth_waiting(later, found)):
            return Choice("wait", *later)
        if found:
            return self._go(close)
        return self._refuse(groups)

    def _groups(self) -> list[Group]:
        return groups(self.need, self.nodes)

    def _go(self, close: Sequence[Found]) -> Choice:
        placement, victims = self.cheapest_drawn(close)
        free = not victims and fits(placement, self.outlook.now(placement.node_id))
        return Choice("free" if free else "evict", placement, victims)

    def _feasible_somewhere(self, groups: Groups, keeping: Sequence[Replica]) -> bool:
        """Whether the model fits on some machine with only the replicas `keeping` on it. On the devices with the most
        memory it does, if it does on as many others."""
        for node, room in self.outlook.unlike(self.nodes, keeping):
            roomiest = (group.roomiest(node, room) for group in groups if node in group.nodes)
            if any(candidate is not None and self.feasible(candidate, room) for candidate in roomiest):
                return True
        return False

    def ever_fits(self) -> bool:
        """Whether the model fits on one of the machines when nobody else is there."""
        return self._feasible_somewhere(self._groups(), ())

    def _refuse(self, groups: Groups) -> Choice:
        if not self._feasible_somewhere(groups, ()):
            return Choice("impossible", None, frozenset())
        kept = [replica for replica in self.there() if self.protected(replica)]
        if self.may_evict and self._feasible_somewhere(groups, kept):
            return Choice("wait", None, frozenset())
        return Choice("blocked", None, frozenset())

    # ------------------------------------------------------------------ finding

    def _find(self, groups: Groups, min_residency_s: float) -> list[Found]:
        """The best placement that can be had now, evicting idle replicas at least `min_residency_s` old, and those
        close to it."""
        return self.cheapest(self.offers(groups, self.evictable(min_residency_s)))

    def _later(self, groups: Groups) -> Found | None:
        """The best placement once replicas that are busy, loading or waiting themselves have ended; those that make
        room for another model already are asked last."""
        if not self.may_evict:
            return None
        ending = sorted(
            (replica for replica in self.there() if replica.state in STAYING and not self.protected(replica)),
            key=lambda replica: (not (replica.idle or replica.drain_for), replica.replica_id),
        )
        unclaimed = [replica for replica in ending if replica.drain_for in ("", self.need.model)]
        pools = (unclaimed, ending) if len(unclaimed) < len(ending) else (ending,)

        def offers() -> Iterator[Found]:
            tiers: set[str] = set()
            for group in groups:
                if group.tier in tiers:
                    continue
                found = next((made for pool in pools if (made := self.make_best_room(group, pool))), None)
                if found is not None:
                    yield found
                    tiers.add(found[0].tier)
                if tiers & ON_GPU:
                    return

        return next(iter(self.cheapest(offers())), None)

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


def _is_on_gpus_now(choice: Choice) -> bool:
    return choice.verdict in ("free", "evict") and choice.placement is not None and choice.placement.tier in ON_GPU


def _clearly_better(one: Placement, other: Placement) -> bool:
    """Worth a wait: an earlier tier, or clearly more layers on GPUs."""
    if one.tier != other.tier:
        return TIERS.index(one.tier) < TIERS.index(other.tier)
    return GOOD_ENOUGH * one.n_resident_layers > other.n_resident_layers
