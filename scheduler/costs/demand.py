"""What a model's layers ask of the compute buffers, counted once from the widths of their weight matrices.

While a graph runs, a result is kept until its last reader is done. A *moment* is a point where much is alive at once:
up, gate and product of a feed-forward block; queries, keys, values and output of attention; the many steps of a
recurrent block. Counts are "floats": F32 values per token of the graph (or per sequence, where it says so).

Derived from `build_ffn`, `build_moe_ffn`, `build_attn_mha` in src/llama-graph.cpp, from mamba-base.cpp and
delta-net-base.cpp in src/models, and from ggml-alloc's rule that element-wise steps reuse their operand's memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduler.costs.architecture import Architecture
from scheduler.costs.header import Tensor, split_name
from scheduler.costs.layer_kinds import LayerKind

UNKNOWN_FACTOR = 8
"""By which moments of architectures outside `KNOWN` are multiplied; enough for the greediest in llama.cpp today."""


@dataclass(frozen=True, slots=True)
class LayerDemand:
    """Floats per token alive in the moments of one layer; the residual stream is counted in each."""

    feed_forward: int
    routed: int
    """The routed experts' part of it, which runs where the experts lie; 0 in dense layers."""
    gathered: int
    """Outputs of all experts in use, before they are summed up."""
    returned: int
    """What comes back to the device when the experts are in host RAM, and is summed up there."""
    beside: int
    """The feed-forward block without its routed experts."""
    attention: int
    """Without scores, which grow with the context."""
    score_heads: int
    """Heads whose scores are materialised when there is no flash attention; 0: the layer does not attend."""
    always_scores: bool
    """Scores are materialised even with flash attention."""
    value_cells: int
    """Elements per cell of values that are made contiguous without flash attention (MLA); per stream, as F16."""
    index: int
    """Floats per cell and token of a sparse-attention indexer."""
    recurrent: int
    state: int
    """Floats per sequence in the recurrent moment."""
    inner: int
    """Floats of one of the experts' inner results (up, gate or product)."""
    shared: bool
    """A dense block stands beside the routed experts, and reads the same activation after them."""
    above_masks: bool
    """The layer's result never lands in the hole that the first activation left."""


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """`LayerDemand` of every layer, and what the two ends of the graph need."""

    layers: tuple[LayerDemand, ...]
    logits: int
    """Floats per output token; 0 for models that only embed."""
    logits_on_host: bool
    """The output matrix is the token embedding itself, which never leaves the host."""
    host_lookups: int
    """Floats per token that the host looks up besides the token embedding."""
    per_layer_inputs: int
    """Floats per token of per-layer embeddings (gemma3n, gemma4), which travel with the activations."""
    streams: int
    """Copies of the residual stream; architectures that the formulas do not know may have several."""
    beside_logits: int = 0
    """Floats per token that are kept until the logits are computed."""

    def borrows_index(self, layers: Sequence[int]) -> bool:
        """Whether any of `layers` attends to what the indexer of an earlier layer has found."""
        indexed = [layer.index > 0 for layer in self.layers]
        return any(not indexed[il] and any(indexed[:il]) for il in layers)


def model_demand(arch: Architecture, tensors: Mapping[str, Tensor], n_vocab: int) -> ModelDemand:
    """The demand of a model with these hyper-parameters and weight matrices."""
    rows: list[dict[str, Tensor]] = [{} for _ in range(arch.n_layer_all)]
    for tensor in tensors.values():
        il, stem = split_name(tensor.name.removeprefix("enc.").removeprefix("dec.").removesuffix(".weight"))
        if 0 <= il < arch.n_layer_all:
            rows[il][stem] = tensor
    memo: dict[tuple[object, ...], LayerDemand] = {}
    layers = []
    for kind, weights in zip(arch.layers, rows, strict=True):
        key = (kind, *((stem, tensor.ne) for stem, tensor in weights.items()))
        if key not in memo:
            memo[key] = _Layer(arch, kind, weights).demand()
        layers.append(memo[key])
    lookups = [
        tensors[f"{name}.weight"].ne[0] for name in ("position_embd", "token_types") if f"{name}.weight" in tensors
    ]
    per_layer = tensors["per_layer_token_embd.weight"].ne[0] if "per_layer_token_embd.weight" in tensors else 0
    return ModelDemand(
        layers=tuple(layers),
        logits=0 if arch.row.family == "encoder" else n_vocab * arch.row.logits_alive,
        logits_on_host=arch.name == "bitnet",
        host_lookups=sum(lookups) + per_layer,
        per_layer_inputs=per_layer,
        streams=arch.residual_streams if arch.known else max(arch.residual_streams, 4),
    )


class _Layer:
    """Counts one layer."""

    def __init__(self, arch: Architecture, kind: LayerKind, weights: Mapping[str, Tensor]) -> None:
        self.arch = arch
        self.kind = kind
        self.weights = weights
        self.e = arch.n_embd
        self.heads_width = kind.n_head * max(arch.n_head_k, arch.n_head_v)

    def rows(self, *stems: str) -> int:
        """Output widths of the named matrices together."""
        found = (self.weights.get(stem) for stem in stems)
        return sum(tensor.ne[1] for tensor in found if tensor is not None and len(tensor.ne) > 1)

    def demand(self) -> LayerDemand:
        arch, kind, e = self.arch, self.kind, self.e
        width, gathered = self.expert_widths()
        routed = 3 * width + (gathered if 2 * width < gathered else 0) + (4 * arch.n_expert if width else 0)
        if arch.name == "llama4":  # the experts' input is repeated and weighted first
            routed += gathered
        dense = max(self.gated(""), self.gated("_shexp"), self.gated("_chexps"))
        waiting = arch.row.waiting + arch.row.convolved
        stream = (2 + waiting) * e + max(self.heads_width, e)
        beside = stream + dense + (2 * e if width and dense else 0)
        unknown = UNKNOWN_FACTOR if not arch.known else 2 if arch.row.family == "draft" else 1
        return LayerDemand(
            feed_forward=unknown * max(beside, stream + routed + (e if width and dense else 0)),
            routed=routed,
            gathered=gathered,
            returned=(8 if arch.name == "llama4" else 2) * gathered,
            beside=unknown * (beside + 8 * arch.n_expert),
            attention=unknown * self.attention(),
            score_heads=kind.n_head * (1 if arch.known else 4) if kind.is_attention else 0,
            always_scores=arch.row.always_scores or not arch.known,
            value_cells=arch.kv_lora_rank if arch.mla else 0,
            index=self.index() if arch.known else 32,
            recurrent=unknown * self.recurrent() if kind.is_recurrent else 0,
            state=2 * (arch.state_r + arch.state_s) if kind.is_recurrent else 0,
            inner=width,
            shared=bool(width and dense),
            above_masks=arch.row.above_masks,
        )

    def gated(self, suffix: str) -> int:
        """Up, gate and their product: three widths, or two where there is no gate."""
        down = self.weights.get(f"ffn_down{suffix}")
        if down is None:
            return 0
        return (3 if f"ffn_gate{suffix}" in self.weights or self.rows(f"ffn_up{suffix}") > down.ne[0] else 2) * down.ne[
            0
        ]

    def expert_widths(self) -> tuple[int, int]:
        """(inner, outer) floats of the experts in use."""
        down = self.weights.get("ffn_down_exps")
        if down is None:
            return 0, 0
        return down.ne[0] * self.arch.n_expert_used, self.rows("ffn_down_exps") * self.arch.n_expert_used

    def attention(self) -> int:
        if not self.kind.is_attention:
            return 0
        out = self.weights["attn_output"].ne[0] if "attn_output" in self.weights else self.heads_width
        projected = self.rows("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate")
        if self.arch.name == "step35":  # gated per head, after attention
            projected += self.heads_width
        if "attn_kv_a_mqa" not in self.weights:
            waiting = (3 + self.arch.row.waiting) * self.e
            waiting += 4 * self.arch.n_expert + self.index_queries()
            return waiting + projected + 2 * out + self.kind.k_width + self.kind.v_width
        latent = self.rows("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b")
        absorbed = (
            self.kind.n_head * (2 * self.arch.n_head_k + self.arch.kv_lora_rank) if self.arch.mla else 2 * projected
        )
        return 3 * self.e + projected + latent + absorbed + out + self.index_queries()

    def index(self) -> int:
        if not self.kind.index_k_width and not self.kind.compression:
            return 0
        if self.arch.row.lightning:  # scores, their order and the mask that follows from it
            return 8
        if self.arch.name == "minimax-m3":  # an indexer's head for each head of keys
            return 2 * self.arch.index_heads + 8
        if self.arch.name == "qwen4exp":  # keys are pooled first
            return 2 * self.arch.index_heads // max(self.arch.index_pool, 1) + 16
        return 2 * max(self.kind.n_head, self.arch.index_heads) + 16

    def index_queries(self) -> int:
        return 3 * self.arch.index_heads * max(self.kind.index_k_width, self.arch.index_width)

    def recurrent(self) -> int:
        """Input projections, the convolution's input and output, and the scan's operands and result."""
        projected = sum(
            tensor.ne[1]
            for stem, tensor in self.weights.items()
            if len(tensor.ne) == 2
            and stem.startswith(("ssm_", "attn_", "time_mix", "shortconv"))
            and "conv" not in stem
        )
        inner = self.weights["ssm_out"].ne[0] if "ssm_out" in self.weights else 2 * self.e
        return 2 * self.e + projected + 3 * self.arch.conv_width + 5 * inner
