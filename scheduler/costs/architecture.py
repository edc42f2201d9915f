"""What the metadata of a GGUF says about its layers: which attend, which slide a window, which carry recurrent state.

A transcription of `load_hparams` and of the `load_arch_hparams` of src/models/*.cpp (llama.cpp of llama-cpp-python
0.3.36), as tables: most architectures need no entry, because the general keys say it all. An architecture that is not
in `KNOWN` gets the general rules and `known=False`, and every figure derived from it must say so.

Widths are elements per cell (one token of one sequence), never bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scheduler.costs.families import (
    CACHELESS,
    HYBRID_BY_HEADS,
    HYBRID_BY_INTERVAL,
    HYPER_CONNECTED,
    KDA,
    KNOWN,
    MLA,
    MROPE,
    MROPE_IF_SECTIONS,
    NEMOTRON_H,
    RECURRENT,
    SHIFTED,
    SSM,
    UNUSABLE,
    WINDOWS,
)
from scheduler.costs.metadata import Metadata

MAX_LAYERS = 512
"""`LLAMA_MAX_LAYERS`."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What one layer needs besides its weights. All zero: the layer keeps nothing between tokens."""

    n_head: int
    head_k: int
    """Elements per key head."""
    head_v: int
    k_width: int
    """Key elements cached per cell; 0 when the layer owns no attention cache."""
    v_width: int
    index_k_width: int
    """The same for the second cache of sparse attention (the indexer's keys)."""
    index_v_width: int
    is_swa: bool
    is_recurrent: bool
    is_attention: bool
    """Attends, be it to a cache of its own, to another layer's, or to none."""
    is_loaded: bool
    """False for the prediction layers at the end (nextn, MTP): they take a place in the split, and no memory."""
    compression: int = 0
    """Tokens to a cell of the compressed cache that the layer keeps besides its own (deepseek4); 0: it has none."""
    state_extra: int = 0
    """F32 elements of state per sequence besides those of all recurrent layers (qwen4exp's n-gram embeddings)."""
    runs: int = -1
    """The layer whose weights are run; -1: its own. Some architectures run the same ones several times."""


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

    def kv_source(self, il: int) -> int:
        """The layer whose cache layer `il` reads (the `reuse` callback of `create_memory`)."""
        if il < self.n_layer_kv:
            return il
        return self.n_layer_kv - (2 if self.layers[il].is_swa else 1)


def read_architecture(meta: Metadata) -> Architecture:
    """The architecture that `meta` describes. Raises InvalidGGUF when keys are missing or absurd."""
    arch = meta.arch
    if arch == "clip":
        raise meta.refuse(UNUSABLE[arch])
    n_layer_all, n_layer = _depth(meta)
    n_embd = meta.number("embedding_length")
    if n_embd == 0:
        raise meta.refuse("embedding_length is 0")
    heads = _deepened(meta, meta.per_layer("attention.head_count", meta.number("block_count"), 0), 1)
    default = heads[: meta.number("block_count")]
    kv_heads = _deepened(meta, meta.per_layer("attention.head_count_kv", meta.number("block_count"), default), 1)
    n_ff = _deepened(meta, meta.per_layer("feed_forward_length", meta.number("block_count"), 0), 0)

    head_k = head_v = n_embd // heads[0] if heads[0] else 0
    if heads[0] or arch == "plamo2":
        head_k, head_v = meta.number("attention.key_length", head_k), meta.number("attention.value_length", head_v)
    head_k_swa = meta.number("attention.key_length_swa", head_k)
    head_v_swa = meta.number("attention.value_length_swa", head_v)

    n_swa, swa = _sliding(meta, n_layer_all, n_layer, kv_heads)
    recurrent = _recurrent(meta, n_layer_all, n_layer, kv_heads, n_ff)
    attends = _attending(meta, n_layer_all, n_layer, recurrent, n_ff)
    owners = _owners(meta, n_layer_all)
    mla = arch in MLA and bool(
        meta.number("attention.key_length_mla", 0) and meta.number("attention.value_length_mla", 0)
    )
    index, index_has_v = _indexer(meta, n_layer_all, n_layer, recurrent)
    compressions = _compressions(meta, n_layer_all)
    extras = _extra_states(meta, n_layer_all, n_embd)
    runs = _runs(meta, n_layer_all)
    state_r, state_s, conv_width = _state(meta, n_embd, heads[0], head_k)
    has_cache = arch not in CACHELESS

    v_widths = [(head_v_swa if s else head_v) * n for s, n in zip(swa, kv_heads, strict=True)]
    layers = []
    for il in range(n_layer_all):
        cached = has_cache and attends[il] and il < owners and arch not in RECURRENT
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
        known=arch in KNOWN,
        n_layer_all=n_layer_all,
        n_ctx_train=meta.number("context_length"),
        n_embd=n_embd,
        n_embd_out=n_embd * meta.number("hyper_connection.count")
        if arch in HYPER_CONNECTED
        else meta.number("embedding_length_out", 0) or n_embd,
        n_expert=meta.number("expert_count", 0),
        n_expert_used=max(meta.per_layer("expert_used_count", meta.number("block_count"), 0)),
        n_head_k=head_k,
        n_head_v=head_v,
        causal=meta.flag("attention.causal", True)
        and arch not in ("dream", "llada", "llada-moe", "rnd1", "gemma-embedding"),
        pools=meta.number("pooling_type", 0) != 0,
        has_cache=has_cache,
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


def _depth(meta: Metadata) -> tuple[int, int]:
    """(layers that take part in the split, those without prediction layers)."""
    n_block = meta.number("block_count")
    n_layer_all = n_block
    if meta.arch == "nanbeige":  # runs the same layers several times, each time with a cache of its own
        n_layer_all = n_block * max(meta.number("num_loops", 1), 1)
    elif meta.arch == "graniteswitch":  # the last layer routes between adapters
        n_layer_all = n_block + 1
    if not 0 < n_layer_all <= MAX_LAYERS:
        raise meta.refuse(f"block_count makes {n_layer_all} layers; llama.cpp takes 1 to {MAX_LAYERS}")
    return n_layer_all, n_layer_all - min(meta.number("nextn_predict_layers", 0), n_layer_all)


def _deepened(meta: Metadata, values: tuple[int, ...], router: int) -> tuple[int, ...]:
    """Per block of the file, turned to per layer; `router` is the value of a layer that routes."""
    if meta.arch == "nanbeige":
        return values * max(meta.number("num_loops", 1), 1)
    return (*values, router) if meta.arch == "graniteswitch" else values


def _runs(meta: Metadata, n_layer_all: int) -> list[int]:
    """Per layer, the one whose weights it runs where that is another, else -1."""
    if meta.arch == "nanbeige":
        n_block = meta.number("block_count")
        return [il % n_block if il >= n_block else -1 for il in range(n_layer_all)]
    if meta.arch == "hrm_text":  # a low stack some times, then the high stack, and all that again
        stack, cycles = max(meta.number("hrm.layers_per_stack"), 1), meta.number("hrm.l_cycles")
        first = [(il // stack % (cycles + 1) == cycles) * stack + il % stack for il in range(n_layer_all)]
        return [run if run != il else -1 for il, run in enumerate(first)]
    return [-1] * n_layer_all


def _residual_streams(meta: Metadata, n_layer: int) -> int:
    if meta.arch == "gemma3n":
        return 4  # AltUp
    if meta.arch == "kimi-k3":  # each block of layers attends to the results of all before it
        return 1 + -(-n_layer // max(meta.number("attn_res.block_size", 1), 1))
    return max(meta.number("hyper_connection.count", 1), 1)


def _compressions(meta: Metadata, n_layer_all: int) -> list[int]:
    """Compression ratios of deepseek4; other than these two get no cache (`filter_csa`, `filter_hca`)."""
    if meta.arch != "deepseek4":
        return [0] * n_layer_all
    ratios = meta.array("attention.compress_ratios") or ()
    if len(ratios) < n_layer_all:
        raise meta.refuse("attention.compress_ratios is shorter than block_count")
    return [ratio if ratio in (4, 128) else 0 for ratio in ratios[:n_layer_all]]


def _index_pool(meta: Metadata, n_layer_all: int) -> int:
    if meta.arch != "qwen4exp":
        return 0
    ratios = meta.per_layer("attention.compress_ratios", n_layer_all, 0)
    return min((ratio for ratio in ratios if ratio), default=0) if any(ratios) else 0


def _extra_states(meta: Metadata, n_layer_all: int, n_embd: int) -> list[int]:
    """The history of qwen4exp's n-gram embeddings (`ple_conv_state`)."""
    layers = (meta.array("ple.layers") or ()) if meta.arch == "qwen4exp" else ()
    if not layers:
        return [0] * n_layer_all
    history = (max(meta.number("ple.conv_kernel"), 1) - 1) * meta.number("ple.ngram_size")
    return [
        history * meta.number("hyper_connection.count") * n_embd if il in layers else 0 for il in range(n_layer_all)
    ]


def _sliding(meta: Metadata, n_layer_all: int, n_layer: int, kv_heads: Sequence[int]) -> tuple[int, list[bool]]:
    """Window in tokens, and which layers slide (`load_swa_pattern`, `set_swa_pattern`)."""
    none = 0, [False] * n_layer_all
    if meta.arch == "lfm2":
        window = meta.number("attention.sliding_window", 0)
        return (window, [il < n_layer and kv_heads[il] != 0 for il in range(n_layer_all)]) if window else none
    rule = WINDOWS.get(meta.arch)
    if rule is None or meta.arch == "exaone4" and n_layer != 64:
        return none
    window = meta.number("attention.sliding_window", rule.default)
    if window == 0:
        return none
    window = rule.forced or window
    listed = None if rule.fixed else meta.array("attention.sliding_window_pattern")
    if listed is not None:
        flags = [bool(v) for v in listed[:n_layer_all]]
        return window, flags + [False] * (n_layer_all - len(flags))
    if rule.period is None:
        raise meta.refuse(f"metadata key {meta.arch}.attention.sliding_window_pattern is missing")
    period = rule.period if rule.fixed else meta.number("attention.sliding_window_pattern", rule.period)
    if meta.arch == "deepseek4":  # its prediction layers slide too
        return window, [True] * n_layer_all
    return window, [il < n_layer and _slides(il, period, rule.dense_first) for il in range(n_layer_all)]


def _slides(il: int, period: int, dense_first: bool) -> bool:
    if period == 0:
        return True
    return il % period != 0 if dense_first else il % period < period - 1


def _recurrent(meta: Metadata, n_all: int, n_layer: int, kv_heads: Sequence[int], n_ff: Sequence[int]) -> list[bool]:
    """Which layers carry recurrent state; prediction layers never do."""
    arch = meta.arch
    if arch in RECURRENT or arch == "falcon-h1":
        flags = [True] * n_all
    elif arch in NEMOTRON_H:
        flags = [heads == 0 and width == 0 for heads, width in zip(kv_heads, n_ff, strict=True)]
    elif arch in HYBRID_BY_HEADS or arch not in KNOWN:
        flags = [heads == 0 for heads in kv_heads]
    elif arch in HYBRID_BY_INTERVAL:
        interval = meta.number("full_attention_interval", HYBRID_BY_INTERVAL[arch])
        if interval == 0:
            raise meta.refuse("full_attention_interval is 0")
        periodic = [int((il + 1) % interval != 0) for il in range(n_all)]
        flags = [bool(flag) for flag in meta.per_layer("attention.recurrent_layers", n_all, periodic)]
    else:
        flags = [False] * n_all
    return [flag and il < n_layer for il, flag in enumerate(flags)]


def _attending(meta: Metadata, n_all: int, n_layer: int, recurrent: Sequence[bool], n_ff: Sequence[int]) -> list[bool]:
    """Which layers attend and so get a cache (the layer filters of `create_memory`)."""
    arch = meta.arch
    if arch in RECURRENT:
        return [False] * n_all
    if arch in ("falcon-h1", "minimax-m3", "deepseek4", "gemma4-assistant"):
        return [True] * n_all
    if arch in NEMOTRON_H:
        return [not recurrent[il] and n_ff[il] == 0 for il in range(n_all)]
    if arch in HYBRID_BY_HEADS:
        return [not r for r in recurrent]
    return [(il < n_layer or n_layer == 0) and not recurrent[il] for il in range(n_all)]


def _owners(meta: Metadata, n_layer_all: int) -> int:
    """The first so many layers own a cache; the others read one of theirs (gemma3n, gemma4)."""
    if meta.arch == "gemma3n":
        return min(20, n_layer_all)
    if meta.arch == "gemma4":
        shared = meta.number("attention.shared_kv_layers", 0)
        if n_layer_all - shared < 2 and shared:
            raise meta.refuse(f"attention.shared_kv_layers is {shared} of {n_layer_all} layers; two must own a cache")
        return n_layer_all - shared
    return 0 if meta.arch == "gemma4-assistant" else n_layer_all  # which reads the caches of its target


def _indexer(meta: Metadata, n_all: int, n_layer: int, recurrent: Sequence[bool]) -> tuple[list[int], bool]:
    """Indexer key width per layer (sparse attention; one key head each), and whether values are cached as well."""
    arch = meta.arch
    if arch == "minimax-m3":
        first = meta.number("leading_dense_block_count", 0)
        return [meta.number("attention.indexer.key_length") if il >= first else 0 for il in range(n_all)], True
    sparse = arch in ("deepseek32", "glm-dsa", "dots3note", "hy_v4", "glm5-next", "qwen4exp")
    if not sparse or arch == "hy_v4" and not meta.number("attention.indexer.top_k", 0):
        return [0] * n_all, False
    width = meta.number("attention.indexer.key_length")
    full = (1,) * n_layer
    if arch == "glm5-next":
        width *= 3  # key, gate and pooled value
    if arch in ("glm-dsa", "dots3note", "hy_v4", "glm5-next"):
        if arch == "glm-dsa" and meta.number("context_length") >= 1 << 20:
            # GLM 5.2: files may lack the list, llama.cpp then assumes this one
            full = tuple(int(il < 2 or il % 4 == 2) for il in range(n_layer))
        full = meta.per_layer("attention.indexer.types", n_layer, full)
    return [width if il < n_layer and full[il] and not recurrent[il] else 0 for il in range(n_all)], False


def _state(meta: Metadata, n_embd: int, n_head: int, head_k: int) -> tuple[int, int, int]:
    """(`n_embd_r`, `n_embd_s`, convolution channels): F32 elements per sequence of a recurrent layer."""
    arch = meta.arch
    if arch in SHIFTED:
        head = meta.number("wkv.head_size")
        return meta.number("token_shift_count", 2) * n_embd, n_embd * head, n_embd
    if arch in ("lfm2", "lfm2moe"):
        return n_embd * (meta.number("shortconv.l_cache") - 1), 0, n_embd
    if arch in KDA or (arch not in KNOWN and f"{arch}.kda.head_dim" in meta.values):
        head, d_conv = meta.number("kda.head_dim"), meta.number("ssm.conv_kernel")
        return 3 * (d_conv - 1 if d_conv else 3) * n_head * head, head * head * n_head, 3 * n_head * head
    if arch == "minimax-01":
        return 0, head_k * head_k * n_head, n_head * head_k
    if arch in SSM or (arch not in KNOWN and f"{arch}.ssm.inner_size" in meta.values):
        d_inner, d_state = meta.number("ssm.inner_size"), meta.number("ssm.state_size")
        groups = meta.number("ssm.group_count", 0) if arch not in ("mamba", "jamba") else 0
        channels = d_inner + 2 * groups * d_state
        return max(meta.number("ssm.conv_kernel") - 1, 0) * channels, d_state * d_inner, channels
    return 0, 0, 0


def _positions(meta: Metadata) -> int:
    sections = meta.array("rope.dimension_sections") or ()
    if meta.arch in MROPE or meta.arch in MROPE_IF_SECTIONS and len(sections) > 1 and sections[0] and sections[1]:
        return 4
    return 1
