"""The memory of a context: KV cache, recurrent state and the logits buffer, to the byte.

Sources in llama.cpp: the constructors of `llama_context` (sizes in cells), `llama_kv_cache`, `llama_kv_cache_iswa`,
`llama_memory_recurrent`, and `output_reserve`. A cell holds one token of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from scheduler.costs.architecture import Architecture
from scheduler.costs.ggml_types import F32, KV_TYPES, GgmlType
from scheduler.costs.layer_kinds import LayerKind
from scheduler.costs.params import ContextParams, DeviceKind, Layout, SpecType
from scheduler.costs.weights import HOST, kv_bytes, pad
from scheduler.errors import Rejected

_INDEXED_RATIO = 4
"""`DSV4_CSA_RATIO`: layers compressed so little look for what matters with an indexer, and their windows overlap."""
_CELL_RECORD_BYTES = 16
_LAYER_RECORD_BYTES = 32
"""What a saved state says of a cell, and of a layer or all (`state_write_meta`, `state_write_data`), at the most."""
MAX_SEQUENCES = 256
"""`LLAMA_MAX_SEQ`."""


@dataclass(frozen=True, slots=True)
class EffectiveContext:
    """What a context really gets, after llama.cpp's rounding."""

    n_ctx: int
    """Tokens of all sequences together."""
    n_ctx_seq: int
    """Tokens that one sequence can hold: what a slot really has. Unified caches share them among all sequences."""
    n_stream: int
    n_swa_cells: int
    """Cells per stream of the window layers' cache; 0 when the model has none."""
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_rs_seq: int
    """Copies of a sequence's recurrent states besides the latest."""
    n_tokens: int
    """Tokens in the largest graph that llama.cpp reserves."""
    n_outputs: int
    """Rows of logits in that graph."""


_WITH_ENCODER = frozenset({"t5", "t5encoder", "eagle3", "dflash"})
"""`llama_model_has_encoder`: every token may have logits, whatever is asked for."""


def effective_context(arch: Architecture, context: ContextParams) -> EffectiveContext:
    """Round `context` as llama.cpp does. Raises Rejected for values it would refuse or that make no sense."""
    for name in ("n_seq_max", "n_batch", "n_ubatch"):
        if getattr(context, name) < 1:
            raise Rejected(f"{name} is {getattr(context, name)}, it must be at least 1")
    if context.n_ctx < 0 or context.n_ctx > 1 << 30:
        raise Rejected(f"n_ctx is {context.n_ctx}, it must be 0 (the model's own) to 2^30")
    if context.n_seq_max > MAX_SEQUENCES:
        raise Rejected(f"n_seq_max is {context.n_seq_max}, llama.cpp takes at most {MAX_SEQUENCES}")
    asked = context.n_ctx or arch.n_ctx_train
    n_batch = min(asked, context.n_batch) if arch.causal else context.n_batch
    n_ubatch = min(n_batch, context.n_ubatch)
    if context.n_seq_max > n_batch:  # llama.cpp would end the process over it
        raise Rejected(f"n_batch is {n_batch}: {context.n_seq_max} sequences need at least as many; raise n_batch")
    n_ctx = pad(asked, 256)
    n_ctx_seq = n_ctx if context.kv_unified else pad(n_ctx // context.n_seq_max, 256)
    if not n_ctx_seq:
        raise Rejected(f"n_ctx {asked} is too small for {context.n_seq_max} sequences; set a larger n_ctx")
    n_ctx = n_ctx if context.kv_unified else n_ctx_seq * context.n_seq_max
    if 0 < context.n_outputs_max < context.n_seq_max:  # likewise
        raise Rejected(f"n_outputs_max is {context.n_outputs_max}: {context.n_seq_max} sequences need at least as many")
    if context.spec_type not in get_args(SpecType):
        raise Rejected(f"spec_type is {context.spec_type!r}; it must be {' or '.join(get_args(SpecType))}")
    if context.n_rs_seq < 0:
        raise Rejected(f"n_rs_seq is {context.n_rs_seq}, it must be at least 0")
    if context.n_rs_seq and arch.name == "deepseek4":
        raise Rejected("n_rs_seq is not counted for deepseek4, whose compressors llama.cpp would copy; set it to 0")
    n_rs_seq = context.n_rs_seq if arch.row.copies_states else 0
    if n_rs_seq and n_ubatch < n_rs_seq + 2:  # llama.cpp would end the process over it
        raise Rejected(
            f"n_ubatch is {n_ubatch}: {n_rs_seq} copies of recurrent states need at least {n_rs_seq + 2}; "
            "raise n_ubatch, or lower spec_draft_n_max"
        )
    n_outputs = n_batch if arch.name in _WITH_ENCODER else context.n_outputs_max or n_batch
    shares = context.kv_unified and not arch.streams_apart
    swa = 0
    if arch.n_swa:
        window = arch.n_swa * (context.n_seq_max if shares else 1)
        swa = n_ctx_seq if context.swa_full else pad(min(n_ctx_seq, window + n_ubatch), 256)
    return EffectiveContext(
        n_ctx=n_ctx,
        n_ctx_seq=n_ctx_seq,
        n_stream=1 if shares else context.n_seq_max,
        n_swa_cells=swa,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_seq_max=context.n_seq_max,
        n_rs_seq=n_rs_seq,
        n_tokens=min(n_ctx, n_ubatch),
        n_outputs=min(n_ctx, n_ubatch, n_outputs),
    )


def cache_types(arch: Architecture, context: ContextParams) -> tuple[GgmlType, GgmlType]:
    """(type_k, type_v). Raises Rejected for types that llama.cpp does not take, alone or with this model."""
    if arch.row.refused:
        raise Rejected(f"{arch.name} models cannot be run: {arch.row.refused}")
    if arch.name in ("eagle3", "gemma4-assistant") and context.embeddings:
        raise Rejected(
            f"llama.cpp aborts on embeddings of {arch.name} models: they only draft tokens; set embeddings false"
        )
    for name, wanted in (("type_k", context.type_k), ("type_v", context.type_v)):
        if wanted not in KV_TYPES:
            raise Rejected(f"{name} is {wanted!r}; llama.cpp takes {', '.join(sorted(KV_TYPES))}")
    type_k, type_v = KV_TYPES[context.type_k], KV_TYPES[context.type_v]
    if context.flash_attn not in ("on", "off"):
        raise Rejected(f"flash_attn is {context.flash_attn!r}; it must be on or off")
    if arch.mla and type_k != type_v:
        raise Rejected(
            f"this model caches keys and values as one: type_k {type_k.name} and type_v {type_v.name} must be equal"
        )
    if type_v.is_quantized and arch.name == "grok":
        raise Rejected(
            "llama.cpp runs grok without flash attention, which a quantised V cache needs; set type_v to f16"
        )
    if type_v.is_quantized and context.flash_attn == "off":
        raise Rejected(f"a {type_v.name} V cache needs flash attention; set flash_attn to on, or type_v to f16")
    attention = [layer for layer in arch.layers if layer.k_width]
    for name, kind, head in (("type_k", type_k, arch.n_head_k), ("type_v", type_v, arch.n_head_v)):
        if kind.is_quantized and attention and head % kind.block:
            raise Rejected(
                f"{name} {kind.name} needs heads of a multiple of {kind.block} elements, this model has {head}; use f16"
            )
    if context.n_seq_max > 1 and not context.kv_unified:
        _refuse_streams(arch, context, type_k.is_quantized or type_v.is_quantized)
    return type_k, type_v


def _refuse_streams(arch: Architecture, context: ContextParams, is_quantized: bool) -> None:
    """Raise Rejected where llama.cpp ends the process over a stream per sequence."""
    tokens = min(context.n_ubatch, context.n_batch)
    if arch.name == "phi3" and is_quantized:
        raise Rejected(
            "llama.cpp aborts on phi3 models with a quantised cache and several sequences in separate streams; "
            "set kv_unified, n_seq_max 1, or type_k and type_v f16"
        )
    if arch.name == "t5":
        raise Rejected(
            "llama.cpp aborts on t5 models with sequences in separate streams; set kv_unified or n_seq_max 1"
        )
    if arch.name in ("kimi-linear", "minimax-01") and tokens % context.n_seq_max:
        raise Rejected(
            f"llama.cpp aborts on {arch.name} models when n_ubatch ({tokens}) is no multiple of n_seq_max "
            f"({context.n_seq_max}); set n_ubatch {tokens - tokens % context.n_seq_max}, or kv_unified"
        )


def place_cache(
    arch: Architecture, layout: Layout, places: Sequence[int], context: ContextParams
) -> tuple[list[int], int]:
    """Cache and state bytes (per device of the layout, on the host), each layer's beside its weights."""
    type_k, type_v = cache_types(arch, context)
    size = effective_context(arch, context)
    devices = [0] * (len(layout.devices) + 1)
    memo: dict[tuple[object, ...], int] = {}
    for il, layer in enumerate(arch.layers):
        place = places[il]
        kind: DeviceKind | None = None if place == HOST else layout.devices[place].kind
        key = (layer, kind)
        if key not in memo:
            rows = (size.n_swa_cells if layer.is_swa else size.n_ctx_seq) * size.n_stream
            v_width = layer.v_width
            if v_width and context.flash_attn == "off":  # V is stored transposed, at the same width in all layers
                v_width = arch.v_width_max
            widths = (
                (layer.k_width, type_k),
                (v_width, type_v),
                (layer.index_k_width, type_k),
                (layer.index_v_width, type_v),
            )
            total = sum(_tensor_bytes(width, of, rows, kind) for width, of in widths if width)
            if layer.is_recurrent and layer.is_loaded:
                states = (arch.state_r, arch.state_s, layer.state_extra)
                total += sum(_tensor_bytes(n, F32, size.n_seq_max * (1 + size.n_rs_seq), kind) for n in states if n)
            total += _compressed_bytes(arch, layer, size, type_k, kind)
            memo[key] = total if arch.known else 4 * total
        devices[place] += memo[key]
    return devices[:-1], devices[-1]


def window_and_state_bytes(arch: Architecture, context: ContextParams) -> int:
    """What one sequence holds, at the most, in the sliding windows and recurrent states of all layers: what llama.cpp
    saves of it with `LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY`. 0 where the cache can be cut anywhere."""
    type_k, type_v = cache_types(arch, context)
    cells = 0 if context.swa_full else effective_context(arch, context).n_swa_cells
    total = 0
    for layer in arch.layers:
        if layer.is_swa and cells:
            rows = type_k.row_bytes(layer.k_width) + type_v.row_bytes(layer.v_width) + _CELL_RECORD_BYTES
            total += cells * rows
        if layer.is_recurrent and layer.is_loaded:
            total += 4 * (arch.state_r + arch.state_s + layer.state_extra)
    return total + _LAYER_RECORD_BYTES * (len(arch.layers) + 2) if total else 0


def _compressed_bytes(
    arch: Architecture, layer: LayerKind, size: EffectiveContext, type_k: GgmlType, kind: DeviceKind | None
) -> int:
    """deepseek4's cache of compressed keys, with the states of its compressors (`llama_kv_cache_dsv4`)."""
    ratio = layer.compression
    if not ratio:
        return 0
    rows = pad(-(-size.n_ctx_seq // ratio), 256) * size.n_stream
    widths = [layer.k_width]
    if ratio == _INDEXED_RATIO:
        widths.append(arch.index_width)
    held = 2 * ratio if ratio == _INDEXED_RATIO else ratio
    factor = 2 if ratio == _INDEXED_RATIO else 1
    states = [factor * width for width in (layer.head_k, arch.index_width)[: len(widths)]]
    total = sum(_tensor_bytes(width, type_k, rows, kind) for width in widths)
    if layer.is_loaded:
        total += sum(2 * _tensor_bytes(width, F32, held * size.n_stream, kind) for width in states)
    return total


def _tensor_bytes(width: int, of: GgmlType, rows: int, kind: DeviceKind | None) -> int:
    rest = width % 512
    extra = of.row_bytes(512 - rest) if of.is_quantized and rest else 0
    return kv_bytes(of.row_bytes(width), extra, rows, kind)


def output_bytes(arch: Architecture, n_vocab: int, context: ContextParams) -> int:
    """The buffer for logits (and embeddings) of one token per sequence, in host RAM."""
    embeddings = context.embeddings or arch.name == "t5"
    return 4 * context.n_seq_max * (n_vocab + (arch.n_embd_out if embeddings else 0))
