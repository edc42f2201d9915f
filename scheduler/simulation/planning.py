"""Where a model would go on a described cluster, at what price, and what else could be had; or what would help.

Nothing is started: the production core is asked for its plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from scheduler.choice.candidates import candidates
from scheduler.choice.need import Need
from scheduler.choice.placement import Choice, Found
from scheduler.choice.price import Price
from scheduler.choice.room import Room
from scheduler.cluster.inventory import Node
from scheduler.cluster.replica import Placement
from scheduler.core import SchedulerCore
from scheduler.dispatch import Plan
from scheduler.errors import ArrieroError, InvalidGGUF
from scheduler.events import PinAsked
from scheduler.simulation.described import NOW, DescribedCluster
from scheduler.units import MIB, DeviceId, ReplicaId, format_bytes

_STEP_BYTES = 64 * MIB
"""Memory that is missing is said to this much."""


@dataclass(frozen=True, slots=True)
class PricedPlacement:
    """`evicts`: models, the ones that finish what they are doing first included."""

    placement: Placement
    evicts: tuple[str, ...]
    price: Price
    tokens_per_s: float | None


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
        return DescribedPlan(pricing.served(found.serving.replica_id))
    choice = found.choice
    assert choice is not None
    passed_over = tuple(map(str, choice.rejections))
    if choice.placement is None:
        return DescribedPlan(None, refusal=Refusal(passed_over, tuple(_ways_out(cluster, model, n_ctx, choice))))
    best = pricing.priced((choice.placement, choice.victims))
    others = (pricing.priced(option) for option in found.options if not _is_chosen(option, choice))
    return DescribedPlan(best, tuple(others), passed_over)


def _is_chosen(option: Found, choice: Choice) -> bool:
    placement, chosen = option[0], choice.placement
    assert chosen is not None
    there = (placement.tier, placement.node_id, placement.device_ids, placement.layers, option[1])
    return there == (chosen.tier, chosen.node_id, chosen.device_ids, chosen.layers, choice.victims)


class _Pricing:
    """Prices of one model's placements."""

    def __init__(self, cluster: DescribedCluster, model: str) -> None:
        self._core, self._model = cluster.core, model
        self._shape = cluster.models[model].shape

    def priced(self, found: Found) -> PricedPlacement:
        placement, victims = found
        core = self._core
        price = core.prices.of(self._shape, self._model, placement, victims, NOW)
        evicts = tuple(core.replicas[victim].model for victim in sorted(victims))
        return PricedPlacement(placement, evicts, price, self._tokens_per_s(placement))

    def served(self, replica_id: ReplicaId) -> PricedPlacement:
        replica = self._core.replicas[replica_id]
        price = self._core.prices.service(self._shape, self._model, replica)
        return PricedPlacement(replica.placement, (), price, self._tokens_per_s(replica.placement))

    def _tokens_per_s(self, placement: Placement) -> float | None:
        return self._core.prices.tokens_per_s(self._shape, self._model, placement)


def _ways_out(cluster: DescribedCluster, model: str, n_ctx: int | None, choice: Choice) -> list[str]:
    """The smallest changes, each of which alone would let the model in."""
    core = cluster.core
    ways = [f"n_ctx <= {choice.n_ctx_that_fits}"] if choice.n_ctx_that_fits else []
    ways += _unpinned(core, lambda: core.plan(model, n_ctx, NOW))
    need = core.need(model, n_ctx, NOW)
    if need is None:
        return ways
    devices: list[tuple[int, str]] = []
    memories: list[tuple[int, str]] = []
    for node in core.inventory.nodes.values():
        # what could be had with everybody gone who may be stopped
        gone = [r.replica_id for r in core.replicas.values() if not core.models.find(r.model).pinned]
        room = core.rooms.without(node.facts.node_id, gone)
        on = f" of {node.facts.hostname}" if len(core.inventory.nodes) > 1 else ""
        for device in node.facts.devices:
            more = _missing(need, node, partial(_with_device, room, device.device_id))
            if more:
                devices.append((more, f"{format_bytes(more)} more on {device.label}{on}"))
        more = _missing(need, node, partial(_with_host, room))
        if more:
            memories.append((more, f"{format_bytes(more)} more host RAM{on}"))
    return ways + [min(found)[1] for found in (devices, memories) if found]


def _unpinned(core: SchedulerCore, plan: Callable[[], Plan]) -> list[str]:
    """Single pinned models, or all of them, without whose pin there would be a place."""
    pinned = sorted({r.model for r in core.replicas.values() if core.models.find(r.model).pinned})
    helped = [name for name in pinned if _fits_without([name], core, plan)]
    if helped or not pinned:
        return [f"unpin {name}" for name in helped]
    return [f"unpin {', '.join(pinned)}"] if _fits_without(pinned, core, plan) else []


def _fits_without(pins: Iterable[str], core: SchedulerCore, plan: Callable[[], Plan]) -> bool:
    pins = list(pins)
    for name in pins:
        core.handle(PinAsked(name, False), NOW)
    choice = plan().choice
    for name in pins:
        core.handle(PinAsked(name, True), NOW)
    return choice is not None and choice.placement is not None


def _with_device(room: Room, device_id: DeviceId, extra: int) -> Room:
    return replace(room, devices={**room.devices, device_id: room.devices.get(device_id, 0) + extra})


def _with_host(room: Room, extra: int) -> Room:
    return replace(room, host_bytes=room.host_bytes + extra)


def _missing(need: Need, node: Node, room_with: Callable[[int], Room]) -> int:
    """The least extra bytes, to `_STEP_BYTES`, with which the model fits on the node somehow; 0: no amount helps."""
    ways = [candidate for group in candidates(need, [node]) for candidate in group]

    def fits(steps: int) -> bool:
        room = room_with(steps * _STEP_BYTES)
        return any(candidate.solve(room) for candidate in ways)

    high = 1
    while not fits(high):
        high *= 2
        if high * _STEP_BYTES > 16 * need.least_bytes() + (1 << 40):
            return 0
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * _STEP_BYTES
