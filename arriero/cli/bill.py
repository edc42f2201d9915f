"""One case of `arriero footprint`, costed: the model, what lies beside it, and the process that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arriero.cli.grid import Case
from scheduler.costs.companions import Companions, companion_footprints
from scheduler.costs.footprint import footprint
from scheduler.costs.host import HostMemory, host_memory
from scheduler.costs.params import ContextParams, Footprint, Layout
from scheduler.costs.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Bill:
    """`beside` holds footprints by companion; `host` is the process without them."""

    layout: Layout
    context: ContextParams
    cost: Footprint
    beside: Mapping[str, Footprint]
    host: HostMemory
    verified: Footprint | None = None
    """What llama.cpp says, where it was asked and did answer."""
    unverified: str = ""
    """Why it did not."""

    @property
    def beside_host_bytes(self) -> int:
        return sum(cost.host.total_bytes for cost in self.beside.values())

    @property
    def steady_bytes(self) -> int:
        """Anonymous memory of the process, with all that lies beside the model."""
        return self.host.steady_bytes + self.beside_host_bytes

    @property
    def peak_bytes(self) -> int:
        return self.host.peak_bytes + self.beside_host_bytes


def make_bill(shape: ModelShape, companions: Companions, case: Case) -> Bill:
    """The bill of `shape`, which is accompanied already. Raises Rejected as `footprint`."""
    cost = footprint(shape, case.layout, case.context)
    beside = companion_footprints(shape, companions, case.layout, case.context)
    host = host_memory(
        shape, case.layout, case.context, cost, use_mmap=case.use_mmap, use_extra_bufts=case.use_extra_bufts
    )
    return Bill(case.layout, case.context, cost, beside, host)
