"""Where a model would go on a described cluster, at what price, and what else could be had; or what would help.

Nothing is started: the production core is asked for its plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scheduler.choice.offer import Offer
from scheduler.choice.placement import Choice
from scheduler.choice.price import Price
from scheduler.cluster.replica import Placement
from scheduler.costs.params import Footprint
from scheduler.errors import ArrieroError, InvalidGGUF
from scheduler.simulation.described import NOW, DescribedCluster
from scheduler.units import ReplicaId


@dataclass(frozen=True, slots=True)
class PricedPlacement:
    """`evicts`: models, the ones that finish what they are doing first included. `beside`: what lies beside the model,
    by name, on the devices of the placement's layout. Only a projector (mmproj) is a part of the placement's own
    bytes."""

    placement: Placement
    evicts: tuple[str, ...]
    price: Price
    tokens_per_s: float | None
    beside: Mapping[str, Footprint] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refusal:
    """`would_fit_if`: the smallest changes that help, each by itself."""

    reasons: tuple[str, ...]
    would_fit_if: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DescribedPlan:
    """Either `best`, with the `alternatives` in the order in which they would be taken, or a `refusal`.

    `passed_over` says why places that would have been better were not taken.
    """

    best: PricedPlacement | None
    alternatives: tuple[PricedPlacement, ...] = ()
    passed_over: tuple[str, ...] = ()
    refusal: Refusal | None = None

    @property
    def places(self) -> tuple[PricedPlacement, ...]:
        """All that could be had, the best first."""
        return () if self.best is None else (self.best, *self.alternatives)


def plan_on(cluster: DescribedCluster, model: str, n_ctx: int | None = None) -> DescribedPlan:
    """The plan for a request of `model` with `n_ctx` tokens (None: its default).

    Raises UnknownModel, and InvalidGGUF for a file that is none.
    """
    core = cluster.core
    try:
        found = core.plan(model, n_ctx, NOW)
    except InvalidGGUF:
        raise
    except ArrieroError as error:
        trained = cluster.models[model].shape.n_ctx_train if model in cluster.models else None
        if n_ctx is None or not trained or n_ctx <= trained:
            return DescribedPlan(None, refusal=Refusal((error.message,), ()))
        shorter = plan_on(cluster, model, trained).refusal
        if shorter is None:
            return DescribedPlan(None, refusal=Refusal((error.message,), (f"n_ctx <= {trained}",)))
        only = tuple(way for way in shorter.would_fit_if if way.startswith("n_ctx"))
        return DescribedPlan(None, refusal=Refusal((error.message, *shorter.reasons), only))
    pricing = _Pricing(cluster, model)
    if found.serving is not None:
        beside = tuple(pricing.priced(option) for option in found.options)
        return DescribedPlan(pricing.served(found.serving.replica_id), beside)
    choice = found.choice
    assert choice is not None
    passed_over = tuple(filter(None, (found.reason, *map(str, choice.rejections))))
    if choice.placement is None:
        return DescribedPlan(None, refusal=Refusal(passed_over, choice.would_fit_if))
    best = pricing.priced(Offer(choice.placement, choice.victims))
    others = (pricing.priced(option) for option in found.options if not _is_chosen(option, choice))
    return DescribedPlan(best, tuple(others), passed_over)


def _is_chosen(option: Offer, choice: Choice) -> bool:
    placement, chosen = option.placement, choice.placement
    assert chosen is not None
    there = (placement.tier, placement.node_id, option.victims)  # layers differ where the graph was drawn
    return there == (chosen.tier, chosen.node_id, choice.victims)


class _Pricing:
    """Prices of one model's placements."""

    def __init__(self, cluster: DescribedCluster, model: str) -> None:
        self._core, self._model = cluster.core, model
        self._shape = cluster.models[model].shape

    def priced(self, offer: Offer) -> PricedPlacement:
        placement, victims = offer.placement, offer.victims
        core = self._core
        price = core.prices.of(self._shape, self._model, placement, victims, NOW)
        gone = (core.replicas[victim].model for victim in sorted(victims))
        evicts = tuple(name for name in gone if name != self._model)  # its own replica is replaced
        return PricedPlacement(placement, evicts, price, self._tokens_per_s(placement))

    def served(self, replica_id: ReplicaId) -> PricedPlacement:
        replica = self._core.replicas[replica_id]
        price = self._core.prices.service(self._shape, self._model, replica)
        return PricedPlacement(replica.placement, (), price, self._tokens_per_s(replica.placement))

    def _tokens_per_s(self, placement: Placement) -> float | None:
        return self._core.prices.tokens_per_s(self._shape, self._model, placement)
