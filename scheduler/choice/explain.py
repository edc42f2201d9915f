"""Explains decisions: every refusal has its reasons, with numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scheduler.choice.layouts import ONE_GPU, SOME_LAYERS_IN_RAM, TIERS, LayoutFamily
from scheduler.choice.situation import Situation
from scheduler.choice.tiers import Tier
from scheduler.cluster.facts import DeviceFacts
from scheduler.cluster.inventory import Inventory
from scheduler.cluster.replica import Placement, Replica, ReplicaState
from scheduler.errors import ArrieroError, Impossible
from scheduler.units import NodeId, ReplicaId, format_bytes


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a candidate was not chosen: `tier`, `where` (devices), and the sentence."""

    tier: str
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.tier} ({self.where}): {self.reason}"


def rejections(
    here: Situation, found: Sequence[Tier], chosen: Placement | None, *, waits: bool
) -> tuple[Rejection, ...]:
    """Why each candidate that is as good as the chosen one, or better, was not taken. `waits`: the request waits for
    the chosen one, so its own reason is included. Of combinations of GPUs, only the largest is included."""
    taken = None if waits else chosen
    speakers: dict[tuple[str, NodeId, object], LayoutFamily] = {}
    for candidate in (c for tier in found for c in tier):
        if chosen and TIERS.index(candidate.tier) > TIERS.index(chosen.tier):
            break
        each = candidate.devices if candidate.tier == ONE_GPU else None
        speakers[candidate.tier, candidate.node_id, each] = candidate
    idle = {replica.replica_id: here.now - replica.last_used_at for replica in here.evictable(0.0)}
    return tuple(
        _explained(candidate, here, idle)
        for candidate in speakers.values()
        if not (taken and _same_place(candidate, taken))
    )


def _same_place(candidate: LayoutFamily, placement: Placement) -> bool:
    devices = {device.device_id for device in candidate.devices}
    return (candidate.tier, candidate.node_id) == (placement.tier, placement.node_id) and devices >= set(
        placement.device_ids
    )


def _explained(candidate: LayoutFamily, here: Situation, idle: Mapping[ReplicaId, float]) -> Rejection:
    """The memory that the candidate needs, and what is free: now, and without the `idle` replicas (idle seconds by id).
    Then the replicas that hold the rest, those that must not share a GPU with it, and whether it would be too slow."""
    now = here.snapshot.now(candidate.node_id)
    later = here.snapshot.without(candidate.node_id, idle)
    residents, apart = list(here.replicas.on_node(candidate.node_id)), here.snapshot.apart
    node = candidate.node
    plain = candidate.minimum()
    where = "+".join(facts.label for facts in candidate.devices) or "host RAM"
    if len(here.inventory.nodes) > 1:
        where += f" on {node.facts.hostname}"
    if node.trouble:
        return Rejection(candidate.tier, where, f"{node.facts.hostname} cannot be used: {node.trouble}")
    parts: list[str] = []
    for facts, need in zip(candidate.devices, plain.device_bytes, strict=True):
        device = node.devices[facts.device_id]
        if device.trouble:
            parts.append(f"{facts.label} cannot be used: {device.trouble}")
            continue
        free, could = now.devices[facts.device_id], later.devices[facts.device_id]
        partial = candidate.tier == SOME_LAYERS_IN_RAM
        if not partial and need <= free:
            continue
        wants = f"{facts.label}: " if partial else f"needs {format_bytes(need)} on {facts.label}; "
        parts.append(f"{wants}{format_bytes(max(0, free))} free of {format_bytes(facts.total_bytes)}")
        parts += [f"{r.model} must not share this GPU" for r in residents if r.replica_id in apart and _is_on(r, facts)]
        parts += _holders(facts, free, could, device.foreign_bytes, idle, residents, here.protection)
    if plain.host_bytes > now.host_bytes:
        host = f"needs {format_bytes(plain.host_bytes)} of host RAM; "
        host += f"{format_bytes(max(0, now.host_bytes))} free beyond the reserve"
        if later.host_bytes > now.host_bytes:
            host += f", {format_bytes(max(0, later.host_bytes))} after evicting idle replicas"
        parts.append(host)
    if now.active < 1:
        parts.append("the limit on active models is reached")
    parts += _too_slow(plain, candidate.workload.wishes.min_tokens_per_s, here.appraiser.tokens_per_s)
    return Rejection(candidate.tier, where, "; ".join(parts) or "fits, too, but ranks lower")


def _too_slow(placement: Placement, wanted: float, tokens_per_s: Callable[[Placement], float | None]) -> list[str]:
    if not wanted or placement.layout.n_gpu_layers < 0:
        return []
    predicted = tokens_per_s(placement)
    too_slow = predicted is not None and predicted < wanted
    return [f"{predicted:.1f} tokens/s are predicted, {wanted:g} are wanted"] if too_slow else []


def _is_on(replica: Replica, device: DeviceFacts) -> bool:
    return device.device_id in replica.placement.device_ids


def _holders(
    device: DeviceFacts,
    free: int,
    could: int,
    foreign_bytes: int,
    idle: Mapping[ReplicaId, float],
    residents: Sequence[Replica],
    protected: Callable[[Replica], str],
) -> list[str]:
    here = [replica for replica in residents if _is_on(replica, device)]
    parts = []
    frees = [f"{r.model} (idle {idle[r.replica_id]:.0f} s)" for r in here if r.replica_id in idle]
    if frees and could > free:
        parts.append(f"evicting {', '.join(frees)} frees {format_bytes(could - free)}")
    parts += [f"{r.model} is {_hold(r, protected)}" for r in here if r.replica_id not in idle]
    if foreign_bytes:
        parts.append(f"other programs use {format_bytes(foreign_bytes)}")
    return parts


def _hold(replica: Replica, protected: Callable[[Replica], str]) -> str:
    """Why the replica cannot be evicted now."""
    if why := protected(replica):
        return why
    if replica.drain_for:
        return f"making room for {replica.drain_for}"
    if replica.busy:
        return "busy"
    return "kept" if replica.state is ReplicaState.READY else str(replica.state.value)


def describe_placement(
    placement: Placement, model: str, freed: Sequence[tuple[str, float]], inventory: Inventory
) -> str:
    """The placement in one line. `freed`: the evicted models, and how long each was idle, in seconds."""
    shares = [
        f"{layers} layers ({format_bytes(need)}) on {inventory.label(device_id)}"
        for device_id, layers, need in zip(placement.device_ids, placement.layers, placement.device_bytes, strict=True)
    ]
    on_host = placement.n_layers - placement.layout.n_gpu_layers
    if on_host:
        shares.append(f"{on_host} layers in host RAM ({format_bytes(placement.host_bytes)})")
    if placement.layout.spills_experts:
        which = f"experts of {placement.n_spilled_experts} layers"
        shares.append(f"{which} in host RAM ({format_bytes(placement.host_bytes)})")
    evicting = "; evicting " + ", ".join(f"{m} (idle {idle_s:.0f} s)" for m, idle_s in freed) if freed else ""
    return f"{model}: {placement.tier}: {', '.join(shares)}{evicting}"


def explain_coming(replica: Replica) -> str:
    """What a request waits for if its replica is loaded or will be."""
    if replica.state is ReplicaState.READY:
        return "all slots are taken"
    return "loading" if replica.state is ReplicaState.LOADING else "waiting for evicted memory to come back"


def explain_waiting(victims: Iterable[Replica]) -> str:
    """What a request waits for when it has no replica."""
    names = ", ".join(f"{r.model} ({_doing(r)})" for r in victims)
    return f"waiting for {names}" if names else "waiting for memory that other programs use"


def _doing(replica: Replica) -> str:
    if replica.busy:
        return "busy"
    return f"making room for {replica.drain_for}" if replica.drain_for else replica.state.value


def explain_refusal(
    kind: type[ArrieroError],
    model: str,
    rejections: Sequence[Rejection],
    would_fit_if: Sequence[str] = (),
    because: str = "",
) -> ArrieroError:
    """The error for a model that has no place, with the reason of every candidate and the ways out."""
    what = "can never fit this cluster" if kind is Impossible else "does not fit now, and nothing can make room for it"
    why = f", {because}" if because else ""
    way_out = f"; it would fit with {' or '.join(would_fit_if)}" if would_fit_if else ""
    reasons = "; ".join(map(str, rejections)) or ("no GPU is left for it" if because else "no machine has its file")
    return kind(
        f"{model} {what}{why}{way_out}: {reasons}",
        model=model,
        retry_after_s=30.0,
        reasons=list(map(str, rejections)),
        would_fit_if=list(would_fit_if),
    )
