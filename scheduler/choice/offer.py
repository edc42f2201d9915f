"""An offer: a place, and the replicas that are evicted for it; and its cost, in one currency for all offers.

Where the speeds of all machines are known, a cost is seconds. Where they are not, the tier counts first, then the
layers that are not on GPUs, then the regret of the victims. So offers of one decision can always be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from scheduler.choice.eviction import Victims
from scheduler.cluster.replica import Placement

NEARLY = 1.25
"""Times the lowest cost: up to here offers count as equally cheap, and other things decide. See decision 015."""


@dataclass(frozen=True, slots=True)
class Offer:
    """`victims`: replicas that are evicted for the placement."""

    placement: Placement
    victims: Victims = frozenset()


class Cost(NamedTuple):
    """Compared field by field. Where speeds are known, only `seconds` is not zero; else `seconds` is zero."""

    tier: int = 0
    missing: int = 0
    """Layers that are not on GPUs, in tenths of all layers."""
    seconds: float = 0.0
    regret: float = 0.0

    def is_near(self, least: Cost) -> bool:
        """Whether it counts as equally cheap as `least`, the lowest cost."""
        return self[:2] == least[:2] and self.seconds <= NEARLY * least.seconds

    def is_worth(self, wait_s: float, now: Cost) -> bool:
        """Whether to wait so long for this instead of taking what costs `now`."""
        return (*self[:2], self.seconds + wait_s) < now[:3]
