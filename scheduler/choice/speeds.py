"""Tokens per second and load times of placements: predicted, and corrected by what replicas really took."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from scheduler.cluster.inventory import Inventory, Node
from scheduler.cluster.replica import Placement, Replica
from scheduler.costs.measurements import Record
from scheduler.costs.paces import Estimate, Pace, Paces
from scheduler.costs.shape import ModelShape
from scheduler.costs.speed import load_seconds, seconds_per_token
from scheduler.units import NodeId

REMEMBERED = 4096
USUAL_TOKENS = 512
"""The speed of an answer is given for this many tokens in the context, or for half the context if that is less."""
MOSTLY = 0.5
"""If at least this share of a file is in the page cache, its load is compared with other cached loads."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per token of an answer and of a prompt, and seconds of a load. None if a device's rates are not known."""

    answer: Estimate | None
    prompt: Estimate | None
    load: Estimate


class Speeds:
    """Reads the inventory; keeps what was learned."""

    def __init__(self, inventory: Inventory, paces: Paces) -> None:
        self._inventory = inventory
        self._paces = paces
        self._known: dict[Hashable, Speed] = {}
        self._changes = paces.changes

    def predict(self, shape: ModelShape, placement: Placement, cached_fraction: float | None) -> Speed:
        """The speed of a model in a place. `cached_fraction`: the share of its file in the page cache (None: not known,
        counts as none)."""
        if self._changes != self._paces.changes or len(self._known) > REMEMBERED:
            self._known.clear()
            self._changes = self._paces.changes
        there = placement.node_id, placement.device_ids, placement.layout, placement.context
        key = shape.fingerprint, there, cached_fraction
        if key not in self._known:
            self._known[key] = self._predict(shape, placement, cached_fraction)
        return self._known[key]

    def _predict(self, shape: ModelShape, placement: Placement, cached_fraction: float | None) -> Speed:
        context = placement.context
        n_past = min(USUAL_TOKENS, context.n_ctx_slot // 2)
        load = self.load(shape, placement.node_id, cached_fraction)
        formulas = self._seconds(shape, placement, n_past)
        if formulas is None:
            return Speed(None, None, load)
        answer, prompt = (
            self._paces.corrected(seconds, self._keys(phase, shape, placement))
            for phase, seconds in zip(("answer", "prompt"), formulas, strict=True)
        )
        return Speed(answer, prompt, load)

    def load(self, shape: ModelShape, node_id: NodeId, cached_fraction: float | None) -> Estimate:
        """The seconds of a load of the model on the machine."""
        node, fraction = self._inventory.nodes[node_id], cached_fraction or 0.0
        return self._paces.corrected(_load_seconds(shape, node, fraction), _load_keys(shape, node, fraction))

    def knows_loads(self, shape: ModelShape, node_id: NodeId, cached_fraction: float | None) -> bool:
        """Whether such a load was measured, or the machine's disk is known."""
        node = self._inventory.nodes.get(node_id)
        if node is None:
            return False
        return node.facts.disk_bytes_per_s > 0 or self.load(shape, node_id, cached_fraction).samples > 0

    def answered(self, shape: ModelShape, replica: Replica, pace: Pace) -> list[Record]:
        """Learn from an answer that had the replica to itself."""
        formulas = self._seconds(shape, replica.placement, pace.n_past)
        if formulas is None:
            return []
        records = []
        timed = (("answer", pace.answer_tokens, pace.answer_s), ("prompt", pace.prompt_tokens, pace.prompt_s))
        for (phase, tokens, seconds), formula in zip(timed, formulas, strict=True):
            if tokens and seconds > 0:
                keys = self._keys(phase, shape, replica.placement)
                records += self._paces.learn(formula, seconds / tokens, keys)
        return records

    def loaded(self, shape: ModelShape, replica: Replica, load_s: float) -> list[Record]:
        """Learn from a load."""
        node = self._inventory.nodes[replica.placement.node_id]
        fraction = replica.cached_fraction
        return self._paces.learn(_load_seconds(shape, node, fraction), load_s, _load_keys(shape, node, fraction))

    def _seconds(self, shape: ModelShape, placement: Placement, n_past: int) -> tuple[float, float] | None:
        """Seconds per token of an answer and of a prompt, by the formulas alone. None if a device does not tell its
        rates."""
        host = self._inventory.nodes[placement.node_id].facts.rates
        rates = []
        for device_id in placement.device_ids:
            device = self._inventory.device(device_id)
            if device is None:
                return None
            rates.append(host if device.facts.kind == "rpc" else device.facts.rates)
        if any(each.bytes_per_s <= 0 or each.flops <= 0 for each in (host, *rates)):
            return None
        return seconds_per_token(shape, placement.layout, placement.context, tuple(rates), host, n_past)

    def _keys(self, phase: str, shape: ModelShape, placement: Placement) -> Sequence[str]:
        """The keys to learn under: this model in this layout on this kind of hardware; then any model there."""
        node = self._inventory.nodes[placement.node_id].facts
        found = (self._inventory.device(device_id) for device_id in placement.device_ids)
        products = "+".join(device.facts.product for device in found if device) or "CPU"
        if placement.computes_on_cpu or not placement.device_ids:
            products += f" with RAM of {node.hostname}"
        hardware = f"{phase} on {products}, llama-cpp-python {node.llama_build}"
        layers = "+".join(map(str, placement.layers)) or "0"
        spilled = placement.layout.n_cpu_moe or placement.layout.experts_on_host
        return f"{hardware}: {shape.fingerprint} {layers} {spilled}", hardware


def _load_seconds(shape: ModelShape, node: Node, cached_fraction: float) -> float:
    return load_seconds(shape.file_bytes, cached_fraction, node.facts.disk_bytes_per_s)


def _load_keys(shape: ModelShape, node: Node, cached_fraction: float) -> Sequence[str]:
    tier = f"load from {'page cache' if cached_fraction >= MOSTLY else 'disk'} on {node.facts.hostname}"
    return f"{tier}: {shape.fingerprint}", tier
