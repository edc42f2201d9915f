"""The costs of one model's offers, and the regret and protection of replicas, at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from scheduler.choice.layouts import ON_GPU, TIERS
from scheduler.choice.offer import Cost, Offer
from scheduler.choice.price import Prices
from scheduler.choice.workload import Workload
from scheduler.cluster.inventory import Node
from scheduler.cluster.models import Models
from scheduler.cluster.replica import Placement, Replica
from scheduler.units import ReplicaId

ALWAYS_LOADED = "always loaded (min_replicas)"
TENTHS = 10


class Appraiser:
    """Belongs to one decision. Reads prices and models."""

    def __init__(self, workload: Workload, nodes: Sequence[Node], prices: Prices, models: Models, now: float) -> None:
        self._workload = workload
        self._prices = prices
        self._models = models
        self._now = now
        self._regrets: dict[ReplicaId, float] = {}
        self.in_seconds = all(node.tells_speeds for node in nodes)

    def cost(self, offer: Offer) -> Cost:
        placement = offer.placement
        if self.in_seconds:
            price = self._prices.of(self._workload.shape, self._workload.model, placement, offer.victims, self._now)
            return Cost(seconds=price.total_s)
        missing = TENTHS * (placement.n_layers - placement.n_resident_layers) // placement.n_layers
        return Cost(TIERS.index(placement.tier), missing, regret=self.regret_of(offer))

    def can_be_beaten(self, offer: Offer) -> bool:
        """Whether a place of a later tier may cost clearly less."""
        if offer.placement.tier in ON_GPU:
            return not self.cost(offer).is_near(self.cost(Offer(offer.placement)))
        return self.in_seconds

    def tokens_per_s(self, placement: Placement) -> float | None:
        """Speed of an answer; None where speeds are not known."""
        return self._prices.tokens_per_s(self._workload.shape, self._workload.model, placement)

    def regret(self, replica: Replica) -> float:
        """The least regretted replica is evicted first."""
        if replica.replica_id not in self._regrets:  # one decision asks many times
            self._regrets[replica.replica_id] = self._prices.worth(replica, self._now)
        return self._regrets[replica.replica_id]

    def regret_of(self, offer: Offer) -> float:
        """The regret of all its victims together."""
        return fsum(self.regret(self._prices.replicas[victim]) for victim in offer.victims)  # the same in any order

    def protection(self, replica: Replica) -> str:
        """Why the replica is never evicted, or "". Its model is pinned, or has no more replicas than it must have."""
        return protection(replica, self._models, self._prices)


def protection(replica: Replica, models: Models, prices: Prices) -> str:
    """See `Appraiser.protection`."""
    model = models.by_name.get(replica.model)
    if model is None:
        return ""
    if model.pinned:
        return "pinned"
    kept = models.params(model).min_replicas and not prices.surplus(replica)
    return ALWAYS_LOADED if kept else ""
