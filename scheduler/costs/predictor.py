"""Prediction layers (nextn, MTP): heads at the end of a model that guess tokens ahead.

Left alone they take a place in the split and no memory. Loaded (`load_mtp`), their weights lie on the devices of their
layers, and a second context (`ctx_type` MTP) runs them: with a cache of its own, compute buffers, and rows of logits.
Source in llama.cpp: `create_memory` in src/llama-model.cpp, the MTP graphs in src/models/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from scheduler.costs.architecture import Architecture
from scheduler.costs.demand import ModelDemand, model_demand
from scheduler.costs.header import Tensor, split_name
from scheduler.costs.layer_kinds import LayerKind
from scheduler.costs.weights import WeightSums, sum_weights

_NOTHING = LayerKind(
    n_head=0, head_k=0, head_v=0, k_width=0, v_width=0, index_k_width=0, index_v_width=0, is_swa=False,
    is_recurrent=False, is_attention=False, is_loaded=False,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Predictor:
    """What a context for the prediction layers sees of the model: these layers and nothing else."""

    arch: Architecture
    weights: WeightSums
    """Of the whole model, prediction layers included."""
    demand: ModelDemand


def read_predictor(arch: Architecture, tensors: Mapping[str, Tensor], n_vocab: int) -> Predictor | None:
    """The predictor of a model with these tensors; None where there is none that llama.cpp runs."""
    first = arch.n_layer_all - len(arch.predictors)
    if not arch.row.predicts or not arch.predictors or f"blk.{first}.nextn.eh_proj.weight" not in tensors:
        return None
    alone = replace(
        arch,
        layers=(_NOTHING,) * first + arch.predictors,
        state_r=0,
        state_s=0,
        index_heads=0,
        index_width=0,
        streams_apart=False,
        n_layer_kv=arch.n_layer_all,
    )
    theirs = {name: tensor for name, tensor in tensors.items() if _belongs(name, first)}
    demand = model_demand(alone, theirs, n_vocab)
    entering = 6 * arch.n_embd_out  # the embedding and the last activation, normed, side by side, and projected
    layers = tuple(
        replace(layer, feed_forward=layer.feed_forward + entering, attention=layer.attention + entering)
        if il >= first
        else layer
        for il, layer in enumerate(demand.layers)
    )
    lookups = demand.host_lookups + arch.n_embd_out
    demand = replace(demand, layers=layers, beside_logits=entering, host_lookups=lookups)
    return Predictor(alone, sum_weights(arch, tensors, load_mtp=True), demand)


def _belongs(name: str, first: int) -> bool:
    il, _ = split_name(name)
    return il < 0 or il >= first
