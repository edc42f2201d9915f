"""A plan for a model with the files that come with it: room is kept free for a draft and a second context.

Adapters and prediction layers are part of the model's own figures. The projector is part of its placement, as in a
service. Everything else goes to the first GPU of a layout, which is known only with the layout. So the plan is made
first. Then the memory of the other files is computed for its layouts, and the plan is made again with this much kept
free on every GPU and machine, until it is enough. With several GPUs this is cautious: all but the first keep the memory
free for nothing. Prices and speeds are those of the model alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from arriero.cli.bill import Bill, make_bill
from arriero.cli.grid import Case
from scheduler.costs.companions import Companions
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.errors import Rejected
from scheduler.simulation.described import DescribedCluster, Kept
from scheduler.simulation.planning import DescribedPlan, PricedPlacement, plan_on

MOST_ROUNDS = 8  # two or three are enough; each keeps more free than the one before


def plan_beside(
    cluster: Callable[[Kept], DescribedCluster], model: str, n_ctx: int | None, companions: Companions
) -> tuple[DescribedPlan, Kept]:
    """The plan, and what it keeps free. `cluster` has the model's shape with what changes it (`accompanied`).

    Raises as `plan_on`, and Rejected where a context grows with the room so that no plan is the last one.
    """
    kept = Kept()
    for _ in range(MOST_ROUNDS):
        asked = cluster(kept)
        plan = plan_on(asked, model, n_ctx)
        others = replace(companions, projector=None)
        bills = [_bill(asked, model, found, others) for found in plan.places]
        gpu_bytes = max((count for bill in bills for count in _device_bytes(bill)), default=0)
        host_bytes = max((bill.beside_host_bytes + bill.beside_mapped_bytes for bill in bills), default=0)
        if gpu_bytes <= kept.gpu_bytes and host_bytes <= kept.host_bytes:
            places = [replace(found, beside=_bill(asked, model, found, companions).beside) for found in plan.places]
            return replace(plan, best=next(iter(places), None), alternatives=tuple(places[1:])), kept
        kept = Kept(max(kept.gpu_bytes, gpu_bytes), max(kept.host_bytes, host_bytes))
    raise Rejected("n_ctx auto does not work with files that grow with the context; give --n-ctx")


def _bill(cluster: DescribedCluster, model: str, found: PricedPlacement, companions: Companions) -> Bill:
    case = Case(found.placement.layout, found.placement.context)
    return make_bill(cluster.models[model].shape, companions, case, CHECKED_BUILD)


def _device_bytes(bill: Bill) -> list[int]:
    """On each device of the layout, beside the model."""
    return [sum(cost.devices[i].total_bytes for cost in bill.beside.values()) for i in range(len(bill.layout.devices))]
