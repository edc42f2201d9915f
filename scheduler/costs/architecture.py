"""What the metadata of a GGUF says about its model: the hyper-parameters that cost memory.

A transcription of `load_hparams` and of the `load_arch_hparams` of src/models/*.cpp of llama.cpp, as a row per
architecture (`families`) and, per layer, as the rules of `layer_kinds`. An architecture that is not in `KNOWN` gets the
general rules and `known=False`, and every figure derived from it must say so.

Widths are elements per cell (one token of one sequence), never bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scheduler.costs import layer_kinds
from scheduler.costs.families import Row, row_of
from scheduler.costs.layer_kinds import LayerKind
from scheduler.costs.metadata import Metadata


@dataclass(frozen=True, slots=True)
class Architecture:
    """The hyper-parameters that cost memory."""

    name: str
    known: bool
    n_layer_all: int
    """All layers that take part in the split, prediction layers included."""
    n_ctx_train: int
    n_embd: int
    n_embd_out: int
    n_expert: int
    n_expert_used: int
    n_head_k: int
    """Key elements per head of a full-attention layer (`n_embd_head_k_full`)."""
    n_head_v: int
    causal: bool
    pools: bool
    """The file says how to pool token embeddings into one: it was made to embed or to rank."""
    has_cache: bool
    """False: no memory between calls, the whole batch attends to itself."""
    mla: bool
    kv_lora_rank: int
    n_swa: int
    """Window in tokens; 0 when no layer slides."""
    v_width_max: int
    n_layer_kv: int
    """The first so many layers own a cache; a later one reads that of layer `kv_source(il)`."""
    state_r: int
    """F32 elements of convolution (or token shift) state per sequence and recurrent layer."""
    state_s: int
    n_pos: int
    """Position entries per token: 4 with multi-section RoPE."""
    index_heads: int
    """Heads of the sparse-attention indexer; 0 when there is none."""
    index_width: int
    """Elements per key of the indexer over compressed caches (deepseek4)."""
    index_pool: int
    """Keys that an indexer looks at together, at least (qwen4exp); 0: one by one."""
    conv_width: int
    """Channels that the convolution of a recurrent layer runs over, for the compute bound."""
    residual_streams: int
    """Activations that are carried from layer to layer."""
    streams_apart: bool
    """Sequences never share a cache, not even a unified one (deepseek4)."""
    layers: tuple[LayerKind, ...]
    predictors: tuple[LayerKind, ...]
    """The prediction layers at the end as a context of their own sees them: loaded, with a cache."""

    @property
    def row(self) -> Row:
        """What llama.cpp's code says about it."""
        return row_of(self.name)

    def kv_source(self, il: int) -> int:
        """The layer whose cache layer `il` reads (the `reuse` callback of `create_memory`)."""
        if il < self.n_layer_kv:
            return il
        return self.n_layer_kv - (2 if self.layers[il].is_swa else 1)


def read_architecture(meta: Metadata) -> Architecture:
    """The architecture that `meta` describes. Raises InvalidGGUF when keys are missing or absurd."""
    arch, row = meta.arch, row_of(meta.arch)
    if arch == "clip":
        raise meta.refuse(row.refused)
    n_layer_all, n_layer = layer_kinds.depth(meta)
    n_embd = meta.number("embedding_length")
    if n_embd == 0:
        raise meta.refuse("embedding_length is 0")
    heads = layer_kinds.deepened(meta, meta.per_layer("attention.head_count", meta.number("block_count"), 0), 1)
    default = heads[: meta.number("block_count")]
    kv_heads = layer_kinds.deepened(
        meta, meta.per_layer("attention.head_count_kv", meta.number("block_count"), default), 1
    )
    n_ff = layer_kinds.deepened(meta, meta.per_layer("feed_forward_length", meta.number("block_count"), 0), 0)

    head_k = head_v = n_embd // heads[0] if heads[0] else 0
    if heads[0] or arch == "plamo2":
        head_k, head_v = meta.number("attention.key_length", head_k), meta.number("attention.value_length", head_v)
    head_k_swa = meta.number("attention.key_length_swa", head_k)
    head_v_swa = meta.number("attention.value_length_swa", head_v)

    n_swa, swa = layer_kinds.sliding(meta, n_layer_all, n_layer, kv_heads)
    recurrent = layer_kinds.recurrent(meta, n_layer_all, n_layer, kv_heads, n_ff)
    attends = layer_kinds.attending(meta, n_layer_all, n_layer, recurrent, n_ff)
    owners = layer_kinds.owners(meta, n_layer_all)
    mla = row.latent and bool(
        meta.number("attention.key_length_mla", 0) and meta.number("attention.value_length_mla", 0)
    )
    index, index_has_v = layer_kinds.indexer(meta, n_layer_all, n_layer, recurrent)
    compressions = layer_kinds.compressions(meta, n_layer_all)
    extras = layer_kinds.extra_states(meta, n_layer_all, n_embd)
    runs = layer_kinds.runs(meta, n_layer_all)
    state_r, state_s, conv_width = _state(meta, n_embd, heads[0], head_k)

    v_widths = [(head_v_swa if s else head_v) * n for s, n in zip(swa, kv_heads, strict=True)]
    layers = []
    for il in range(n_layer_all):
        cached = row.has_cache and attends[il] and il < owners and row.family != "recurrent"
        has_v = cached and not mla and arch != "deepseek4"
        layers.append(
            LayerKind(
                n_head=heads[il],
                head_k=head_k_swa if swa[il] else head_k,
                head_v=head_v_swa if swa[il] else head_v,
                k_width=(head_k_swa if swa[il] else head_k) * kv_heads[il] if cached else 0,
                v_width=v_widths[il] if has_v else 0,
                index_k_width=index[il],
                index_v_width=head_v if index[il] and index_has_v else 0,
                is_swa=swa[il],
                is_recurrent=recurrent[il],
                is_attention=attends[il],
                is_loaded=il < n_layer or arch == "gemma4-assistant",
                compression=compressions[il],
                state_extra=extras[il],
                runs=runs[il],
            )
        )
    if 0 < owners < n_layer_all and (layers[owners - 1].is_swa or not layers[owners - 2].is_swa):
        raise meta.refuse(
            f"layers from {owners} on share the caches of layers {owners - 2} and {owners - 1}, of which llama.cpp "
            "needs the first to slide a window and the second to see all"
        )
    return Architecture(
        name=arch,
        known=row.is_known,
        n_layer_all=n_layer_all,
        n_ctx_train=meta.number("context_length"),
        n_embd=n_embd,
        n_embd_out=n_embd * meta.number("hyper_connection.count")
        if row.streams_out
        else meta.number("embedding_length_out", 0) or n_embd,
        n_expert=meta.number("expert_count", 0),
        n_expert_used=max(meta.per_layer("expert_used_count", meta.number("block_count"), 0)),
        n_head_k=head_k,
        n_head_v=head_v,
        causal=meta.flag("attention.causal", True) and row.family != "diffusion" and arch != "gemma-embedding",
        pools=meta.number("pooling_type", 0) != 0,
        has_cache=row.has_cache,
        mla=mla,
        kv_lora_rank=meta.number("attention.kv_lora_rank", 0),
        n_swa=n_swa,
        v_width_max=max(v_widths),
        n_layer_kv=owners,
        state_r=state_r,
        state_s=state_s,
        n_pos=_positions(meta),
        index_heads=meta.number("attention.indexer.head_count") if any((*index, *compressions)) else 0,
        index_width=meta.number("attention.indexer.key_length") if any(compressions) else 0,
        index_pool=_index_pool(meta, n_layer_all),
        conv_width=conv_width,
        residual_streams=_residual_streams(meta, n_layer),
        streams_apart=arch == "deepseek4",
        layers=tuple(layers),
        predictors=tuple(
            replace(
                layers[il],
                k_width=layers[il].head_k * kv_heads[il],
                v_width=0 if mla else v_widths[il],
                is_attention=True,
                is_loaded=True,
                compression=0,
            )
            for il in range(n_layer, n_layer_all)
        ),
    )


def _residual_streams(meta: Metadata, n_layer: int) -> int:
    if meta.arch == "gemma3n":
        return 4  # AltUp
    if meta.arch == "kimi-k3":  # each block of layers attends to the results of all before it
        return 1 + -(-n_layer // max(meta.number("attn_res.block_size", 1), 1))
    return max(meta.number("hyper_connection.count", 1), 1)


def _index_pool(meta: Metadata, n_layer_all: int) -> int:
    if meta.arch != "qwen4exp":
        return 0
    ratios = meta.per_layer("attention.compress_ratios", n_layer_all, 0)
    return min((ratio for ratio in ratios if ratio), default=0) if any(ratios) else 0


def _state(meta: Metadata, n_embd: int, n_head: int, head_k: int) -> tuple[int, int, int]:
    """(`n_embd_r`, `n_embd_s`, convolution channels): F32 elements per sequence of a recurrent layer."""
    arch, row = meta.arch, row_of(meta.arch)
    if row.state == "shift":
        head = meta.number("wkv.head_size")
        return meta.number("token_shift_count", 2) * n_embd, n_embd * head, n_embd
    if row.state == "convolution":
        return n_embd * (meta.number("shortconv.l_cache") - 1), 0, n_embd
    if row.state == "kda" or (not row.is_known and f"{arch}.kda.head_dim" in meta.values):
        head, d_conv = meta.number("kda.head_dim"), meta.number("ssm.conv_kernel")
        return 3 * (d_conv - 1 if d_conv else 3) * n_head * head, head * head * n_head, 3 * n_head * head
    if row.state == "decay":
        return 0, head_k * head_k * n_head, n_head * head_k
    if row.state in ("ssm", "grouped ssm") or (not row.is_known and f"{arch}.ssm.inner_size" in meta.values):
        d_inner, d_state = meta.number("ssm.inner_size"), meta.number("ssm.state_size")
        groups = meta.number("ssm.group_count", 0) if row.state != "ssm" else 0
        channels = d_inner + 2 * groups * d_state
        return max(meta.number("ssm.conv_kernel") - 1, 0) * channels, d_state * d_inner, channels
    return 0, 0, 0


def _positions(meta: Metadata) -> int:
    sections = meta.array("rope.dimension_sections") or ()
    told = len(sections) > 1 and bool(sections[0] and sections[1])
    how = row_of(meta.arch).positions
    return 4 if how == "four" or how == "four if told" and told else 1
