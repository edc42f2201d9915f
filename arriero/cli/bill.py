"""One case of `arriero footprint`, costed: the model, what lies beside it, and the process that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from arriero.cli.grid import Case
from scheduler.costs.companions import Companions, companion_footprints, draft_context, draft_layout
from scheduler.costs.footprint import footprint
from scheduler.costs.host import PROCESS_BYTES, HostMemory, host_memory
from scheduler.costs.params import ContextParams, Footprint, Layout
from scheduler.costs.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Bill:
    """`beside` holds footprints by companion; `host` is the process with the model alone."""

    layout: Layout
    context: ContextParams
    cost: Footprint
    beside: Mapping[str, Footprint]
    host: HostMemory
    beside_host: Mapping[str, HostMemory]
    """Of the companions that are models, in the same process."""
    verified: Footprint | None = None
    """What llama.cpp says, where it was asked and did answer."""
    unverified: str = ""
    """Why it did not."""

    @property
    def beside_host_bytes(self) -> int:
        buffers = sum(cost.host.total_bytes for name, cost in self.beside.items() if name not in self.beside_host)
        tables = self.host.tables_bytes if "mtp" in self.beside else 0  # a context has graphs of its own
        return buffers + tables + sum(host.steady_bytes for host in self.beside_host.values())

    @property
    def beside_mapped_bytes(self) -> int:
        return sum(host.mapped_bytes for host in self.beside_host.values())

    @property
    def mapped_bytes(self) -> int:
        return self.host.mapped_bytes + self.beside_mapped_bytes

    @property
    def steady_bytes(self) -> int:
        """Anonymous memory of the process, with all that lies beside the model."""
        return self.host.steady_bytes + self.beside_host_bytes

    @property
    def peak_bytes(self) -> int:
        return max(host.peak_bytes - host.steady_bytes for host in self._processes) + self.steady_bytes

    @property
    def _processes(self) -> list[HostMemory]:
        return [self.host, *self.beside_host.values()]


def make_bill(shape: ModelShape, companions: Companions, case: Case, build: str) -> Bill:
    """The bill of `shape`, which is accompanied already, under this build of llama-cpp-python.

    Raises Rejected as `footprint`.
    """
    cost = footprint(shape, case.layout, case.context, build)
    beside = companion_footprints(shape, companions, case.layout, case.context, build)
    made = partial(host_memory, use_mmap=case.use_mmap, use_extra_bufts=case.use_extra_bufts)
    host = made(shape, case.layout, case.context, cost, process_bytes=PROCESS_BYTES)
    others = {}
    if companions.draft is not None:
        place = draft_layout(case.layout)
        context = draft_context(case.context)
        others["draft"] = made(companions.draft, place, context, beside["draft"], process_bytes=0)
    return Bill(case.layout, case.context, cost, beside, host, others)
