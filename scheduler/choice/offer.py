"""An offer is a place, and the replicas that are evicted for it. It has a cost, in one currency for all offers.

If the speeds of all machines are known, a cost is in seconds. If not, the tier is compared first, then the layers that
are not on GPUs, then the regret of the victims. So the offers of one decision can always be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from scheduler.choice.eviction import Victims
from scheduler.cluster.replica import Placement

NEARLY = 1.25
"""Up to this factor times the lowest cost, offers count as equally cheap, and other criteria decide (decision 015)."""


@dataclass(frozen=True, slots=True)
class Offer:
    """`victims`: replicas that are evicted for the placement."""

    placement: Placement
    victims: Victims = frozenset()


class Cost(NamedTuple):
    """Compared field by field. If speeds are known, only `seconds` is not zero; otherwise `seconds` is zero."""

    tier: int = 0
    missing: int = 0
    """Layers that are not on GPUs, in tenths of all layers."""
    seconds: float = 0.0
    regret: float = 0.0

    def is_near(self, least: Cost) -> bool:
        """Whether it counts as equally cheap as `least`, the lowest cost."""
        return self[:2] == least[:2] and self.seconds <= NEARLY * least.seconds

    def is_worth(self, wait_s: float, now: Cost) -> bool:
        """Whether waiting `wait_s` seconds for this is better than taking at once what costs `now`."""
        return (*self[:2], self.seconds + wait_s) < now[:3]
