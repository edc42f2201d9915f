"""What a template asks about a model: its weights by layer, and the hyper-parameters that only the graph depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from scheduler.costs.architecture import Architecture
from scheduler.costs.ggml_types import GgmlType
from scheduler.costs.header import Tensor, split_name
from scheduler.costs.metadata import Metadata

_SIGMOID, _SQRT_SOFTPLUS = 2, 4
"""`LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID` and `.._SQRT_SOFTPLUS`."""


@dataclass(frozen=True, slots=True)
class Width:
    """Elements per dimension of a weight, and its type."""

    ne: tuple[int, ...]
    type: GgmlType


@dataclass(frozen=True, slots=True)
class Hparams:
    """Hyper-parameters that only the graph depends on."""

    scales_experts: bool
    """The weights of the experts in use are multiplied by a factor other than 1."""
    scales_embedding: bool
    caps_logits: bool
    normalises_experts: bool
    """The weights of the experts in use are made to sum up to 1, for architectures that leave it to the file."""
    n_expert_groups: int
    """Experts are chosen from the `n_group_used` best groups; 0 or 1: from all."""
    n_group_used: int
    scales_attention: bool
    """Attention is scaled by position."""
    scales_residual: bool
    scales_logits: bool
    gates_by_sigmoid: bool
    """Experts are chosen by their sigmoids, not by a softmax over all."""
    gates_by_softplus: bool
    """Experts are chosen by the roots of their softplus."""
    ropes: bool
    d_conv: int
    d_inner: int
    d_state: int
    dt_rank: int
    n_group: int
    pooling: int
    """How embeddings of a sequence become one (`llama_pooling_type`); 0: not at all."""
    index_top_k: int
    """Cells that an indexer chooses for each token; blocks of them where it chooses by the block."""
    index_block: int
    """Positions to a block of those that an indexer chooses; 0: it chooses single cells."""
    norms_steps: bool
    """Mamba's steps and projections are normed even without weights (`ssm_dt_b_c_rms`)."""
    index_tail: bool
    """Besides whole blocks, an indexer chooses the last one, which is not full yet (glm5-next)."""
    index_ratios: tuple[int, ...]
    """Per layer, cells to a block of those that qwen4exp's indexer scores as one; 0: the layer attends to all."""
    halves_every: int
    """After so many layers, results are halved (rwkv6); 0: never."""
    norms_results: bool
    """Layers norm what their blocks return, not what these read (`swin_norm`)."""
    norms_loops: bool
    """The last norm also ends every earlier run through the layers."""
    stack_depth: int
    """Layers of one of the stacks that take turns (hrm_text)."""
    n_deep: int
    """Layers that are given a part of the input of their own (deepstack)."""


def read_hparams(meta: Metadata) -> Hparams:
    """What `meta` says of them, with llama.cpp's defaults."""

    def factor(key: str) -> object:
        return meta.values.get(f"{meta.arch}.{key}", 0.0)

    sigmoid_by_default = meta.arch.startswith("nemotron_h") or (
        meta.arch in ("glm4moe", "glm5-next") and not factor("expert_gating_func")
    )
    return Hparams(
        scales_experts=factor("expert_weights_scale") not in (0.0, 1.0),
        scales_embedding=meta.arch.startswith(("granite", "hrm_text")) and factor("embedding_scale") != 0.0,
        caps_logits=meta.arch == "gemma2" or factor("final_logit_softcapping") != 0.0,
        normalises_experts=meta.flag("expert_weights_norm", False),
        n_expert_groups=meta.number("expert_group_count", 0),
        n_group_used=meta.number("expert_group_used_count", 0),
        scales_attention=factor("attention.temperature_scale") != 0.0,
        scales_residual=factor("residual_scale") != 0.0,
        scales_logits=meta.arch in ("granite", "granitemoe") or factor("logit_scale") != 0.0,
        gates_by_sigmoid=meta.number("expert_gating_func", 0) == _SIGMOID or sigmoid_by_default,
        gates_by_softplus=meta.number("expert_gating_func", 0) == _SQRT_SOFTPLUS,
        ropes=not meta.arch.startswith("granite") or meta.flag("rope.scaling.finetuned", True),
        d_conv=meta.number("ssm.conv_kernel", 0) or meta.number("shortconv.l_cache", 0),
        d_inner=meta.number("ssm.inner_size", 0),
        d_state=meta.number("ssm.state_size", 0),
        dt_rank=meta.number("ssm.time_step_rank", 0),
        n_group=meta.number("ssm.group_count", 0),
        pooling=meta.number("pooling_type", 0),
        index_top_k=meta.number("attention.indexer.top_k", 0),
        index_block=meta.number("attention.indexer.block_size", 0),
        norms_steps=meta.flag("ssm.dt_b_c_rms", False),
        index_tail=meta.flag("attention.indexer.kpool_select_tail", False),
        index_ratios=meta.per_layer("attention.compress_ratios", meta.number("block_count"), 0)
        if meta.arch == "qwen4exp"
        else (),
        halves_every=meta.number("rescale_every_n_layers", 0),
        norms_results=meta.flag("swin_norm", False),
        norms_loops=not meta.flag("skip_loop_final_norm", False),
        stack_depth=meta.number("hrm.layers_per_stack", 0),
        n_deep=meta.number("n_deepstack_layers", 0),
    )


@dataclass(frozen=True, eq=False)
class GraphModel:
    """All that a template asks about a model. Compared by identity, so that it is cheap to use as a key."""

    arch: Architecture
    hparams: Hparams
    layers: tuple[Mapping[str, Width], ...]
    """The weights of each layer, by name without `blk.` and number."""
    rest: Mapping[str, Width]
    alike: tuple[int, ...]
    """Per layer, the first layer that its graph does not differ from."""
    same: tuple[int, ...]
    """The same, where also the types of the weights matter."""
    filled: bool = False
    """It is drawn as if every cell of its cache were in use, not as llama.cpp reserves it for an empty one."""
    n_adapters: int = 0
    """LoRA adapters: their matrices lie beside the weights, as `attn_q.weight.lora_a.0` and so on."""


def graph_model(arch: Architecture, meta: Metadata, tensors: Mapping[str, Tensor]) -> GraphModel:
    """Sort the tensors by layer, and find the layers that are alike."""
    layers: list[dict[str, Width]] = [{} for _ in range(arch.n_layer_all)]
    rest = {}
    for tensor in tensors.values():
        width = Width(tensor.ne, tensor.type)
        il, stem = split_name(tensor.name)
        if 0 <= il < arch.n_layer_all:
            layers[il][stem] = width
        else:
            rest[tensor.name] = width
    return GraphModel(arch, read_hparams(meta), tuple(layers), rest, *_likeness(arch, layers))


@lru_cache(maxsize=256)
def filled_graph_model(model: GraphModel) -> GraphModel:
    return replace(model, filled=True)


def adapted_graph_model(model: GraphModel, pairs: Sequence[Mapping[str, tuple[Width, Width]]]) -> GraphModel:
    """`model` with a LoRA adapter for each of `pairs`: two matrices by the name of the weight that they belong to."""
    layers: list[dict[str, Width]] = [dict(weights) for weights in model.layers]
    rest = dict(model.rest)
    for no, adapter in enumerate(pairs):
        for name, both in adapter.items():
            il, key = split_name(name)
            into = rest if il < 0 else layers[il]
            into[f"{key}.lora_a.{no}"], into[f"{key}.lora_b.{no}"] = both
    alike, same = _likeness(model.arch, layers)
    return replace(model, layers=tuple(layers), rest=rest, alike=alike, same=same, n_adapters=len(pairs))


def _likeness(arch: Architecture, layers: Sequence[Mapping[str, Width]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Per layer, the first like it: in shapes, and in types as well."""
    loose: dict[object, int] = {}
    strict: dict[object, int] = {}
    alike, same = [], []
    for i, (kind, weights) in enumerate(zip(arch.layers, layers, strict=True)):
        alike.append(loose.setdefault((kind, *sorted((name, w.ne) for name, w in weights.items())), i))
        same.append(strict.setdefault((kind, *sorted((name, w.ne, w.type.id) for name, w in weights.items())), i))
    return tuple(alike), tuple(same)
