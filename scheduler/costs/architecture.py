"""What the metadata of a GGUF says about its layers: which attend, which slide a window, which carry recurrent state.

A transcription of `load_hparams` and of the `load_arch_hparams` of src/models/*.cpp (llama.cpp of llama-cpp-python
0.3.36), as tables: most architectures need no entry, because the general keys say it all. An architecture that is not
in `KNOWN` gets the general rules and `known=False`, and every figure derived from it must say so.

Widths are elements per cell (one token of one sequence), never bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.costs.metadata import Metadata

MAX_LAYERS = 512
"""`LLAMA_MAX_LAYERS`."""

KNOWN = frozenset(
    """
    llama llama4 llama-embed deci falcon grok gpt2 gptneox mpt baichuan starcoder starcoder2 refact bloom stablelm
    bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding
    qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3next qwen3vl qwen3vlmoe qwen35 qwen35moe
    phi2 phi3 phimoe plamo plamo2 plamo3 codeshell orion internlm2 minicpm minicpm3
    gemma gemma2 gemma3 gemma3n gemma4 mamba mamba2 jamba falcon-h1 xverse command-r cohere2 cohere2moe dbrx
    olmo olmo2 olmoe openelm arctic deepseek deepseek2 deepseek2-ocr deepseek32 glm-dsa chatglm glm4 glm4moe bitnet
    jais jais2 nemotron nemotron_h nemotron_h_moe exaone exaone4 exaone-moe rwkv6 rwkv6qwen2 rwkv7 arwkv7
    granite granitemoe granitehybrid granite_swa plm bailingmoe bailingmoe2 bailingmoe3 dots1 arcee afmoe laguna
    ernie4_5 ernie4_5-moe paddleocr hunyuan-moe hunyuan-dense hunyuan_vl hy_v3 smollm3 gpt-oss lfm2 lfm2moe
    dream llada llada-moe rnd1 smallthinker seed_oss grovemoe apertus minimax-01 minimax-m2 minimax-m3 cogvlm
    pangu-embedded mistral3 mistral4 mimo2 step35 spark2_5 maincoder kimi-linear talkie mellum maple muse-glimmer
    """.split()
)

CACHELESS = frozenset(
    """
    bert jina-bert-v2 jina-bert-v3 nomic-bert nomic-bert-moe neo-bert eurobert modern-bert gemma-embedding
    wavtokenizer-dec dream llada llada-moe rnd1
    """.split()
)
"""No memory at all: `create_memory` returns nullptr."""

ENCODERS = CACHELESS - {"dream", "llada", "llada-moe", "rnd1"} | {"t5encoder", "llama-embed"}
"""They embed texts; they do not write any."""

_RECURRENT = frozenset("mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7".split())
_HYBRID_BY_HEADS = frozenset("jamba plamo2 granitehybrid lfm2 lfm2moe kimi-linear bailingmoe3".split())
_HYBRID_BY_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "minimax-01": 8}
_NEMOTRON_H = frozenset({"nemotron_h", "nemotron_h_moe"})
_HYBRID = _HYBRID_BY_HEADS | _HYBRID_BY_INTERVAL.keys() | _NEMOTRON_H | {"falcon-h1"}
_MLA = frozenset("deepseek2 mistral4 deepseek32 glm-dsa kimi-linear bailingmoe3".split())
_GROUPED_SSM = frozenset(
    "mamba2 falcon-h1 granitehybrid nemotron_h nemotron_h_moe plamo2 qwen3next qwen35 qwen35moe".split()
)
_SSM = _GROUPED_SSM | {"mamba", "jamba"}
_SHIFTED = frozenset("rwkv6 rwkv6qwen2 rwkv7 arwkv7".split())
_MROPE = frozenset("qwen2vl paddleocr qwen3vl qwen3vlmoe qwen35 qwen35moe qwen3tts".split())
_MROPE_IF_SECTIONS = frozenset("glm4 glm4moe hunyuan_vl".split())


@dataclass(frozen=True, slots=True)
class _Window:
    """How an architecture declares its sliding window: default period of full layers, and where the size comes from."""

    period: int | None
    """Every n-th layer is full unless the file says otherwise; None: the file must carry the list of layers."""
    dense_first: bool = False
    default: int = 0
    """Window where the file gives none; 0: then there are no window layers at all."""
    forced: int = 0
    """Window whatever the file says."""


_WINDOWS = {
    "afmoe": _Window(4), "cohere2": _Window(4), "cohere2moe": _Window(4, dense_first=True),
    "exaone-moe": _Window(4, default=128), "exaone4": _Window(4, default=4096), "gemma2": _Window(2, default=4096),
    "gemma3": _Window(6), "gemma3n": _Window(5), "gemma4": _Window(None), "gemma-embedding": _Window(6),
    "granite_swa": _Window(None), "laguna": _Window(4, dense_first=True),
    "llama4": _Window(4, default=8192, forced=8192), "maple": _Window(None), "mellum": _Window(4),
    "mimo2": _Window(None), "modern-bert": _Window(3, dense_first=True),
    "muse-glimmer": _Window(4), "olmo2": _Window(4), "gpt-oss": _Window(2), "plamo3": _Window(8),
    "smallthinker": _Window(4, dense_first=True, forced=4096), "spark2_5": _Window(None), "step35": _Window(None),
}  # fmt: skip


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
    conv_width: int
    """Channels that the convolution of a recurrent layer runs over, for the compute bound."""
    layers: tuple[LayerKind, ...]

    def kv_source(self, il: int) -> int:
        """The layer whose cache layer `il` reads (the `reuse` callback of `create_memory`)."""
        if il < self.n_layer_kv:
            return il
        return self.n_layer_kv - (2 if self.layers[il].is_swa else 1)


def read_architecture(meta: Metadata) -> Architecture:
    """The architecture that `meta` describes. Raises InvalidGGUF when keys are missing or absurd."""
    arch = meta.arch
    n_layer_all = meta.number("block_count")
    if not 0 < n_layer_all <= MAX_LAYERS:
        raise meta.refuse(f"block_count is {n_layer_all}; llama.cpp takes 1 to {MAX_LAYERS}")
    n_layer = n_layer_all - min(meta.number("nextn_predict_layers", 0), n_layer_all)
    n_embd = meta.number("embedding_length")
    if n_embd == 0:
        raise meta.refuse("embedding_length is 0")
    heads = meta.per_layer("attention.head_count", n_layer_all, 0)
    kv_heads = meta.per_layer("attention.head_count_kv", n_layer_all, heads)
    n_ff = meta.per_layer("feed_forward_length", n_layer_all, 0)

    head_k = head_v = n_embd // heads[0] if heads[0] else 0
    if heads[0] or arch == "plamo2":
        head_k, head_v = meta.number("attention.key_length", head_k), meta.number("attention.value_length", head_v)
    head_k_swa = meta.number("attention.key_length_swa", head_k)
    head_v_swa = meta.number("attention.value_length_swa", head_v)

    n_swa, swa = _sliding(meta, n_layer_all, n_layer, kv_heads)
    recurrent = _recurrent(meta, n_layer_all, n_layer, kv_heads, n_ff)
    attends = _attending(meta, n_layer_all, n_layer, recurrent, n_ff)
    owners = _owners(meta, n_layer_all)
    mla = arch in _MLA and bool(
        meta.number("attention.key_length_mla", 0) and meta.number("attention.value_length_mla", 0)
    )
    index = _indexer(meta, n_layer_all, n_layer)
    state_r, state_s, conv_width = _state(meta, n_embd, heads[0], head_k)
    has_cache = arch not in CACHELESS

    v_widths = [(head_v_swa if s else head_v) * n for s, n in zip(swa, kv_heads, strict=True)]
    layers = []
    for il in range(n_layer_all):
        cached = has_cache and attends[il] and il < owners and arch not in _RECURRENT
        layers.append(
            LayerKind(
                n_head=heads[il],
                head_k=head_k_swa if swa[il] else head_k,
                head_v=head_v_swa if swa[il] else head_v,
                k_width=(head_k_swa if swa[il] else head_k) * kv_heads[il] if cached else 0,
                v_width=v_widths[il] if cached and not mla else 0,
                index_k_width=index[il],
                index_v_width=index[il] and (0 if mla else head_v),
                is_swa=swa[il],
                is_recurrent=recurrent[il],
                is_attention=attends[il],
                is_loaded=il < n_layer,
            )
        )
    if owners < n_layer_all and (layers[owners - 1].is_swa or not layers[owners - 2].is_swa):
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
        n_embd_out=meta.number("embedding_length_out", 0) or n_embd,
        n_expert=meta.number("expert_count", 0),
        n_expert_used=max(meta.per_layer("expert_used_count", n_layer_all, 0)),
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
        index_heads=meta.number("attention.indexer.head_count") if any(index) else 0,
        conv_width=conv_width,
        layers=tuple(layers),
    )


def _sliding(meta: Metadata, n_layer_all: int, n_layer: int, kv_heads: Sequence[int]) -> tuple[int, list[bool]]:
    """Window in tokens, and which layers slide (`load_swa_pattern`, `set_swa_pattern`)."""
    none = 0, [False] * n_layer_all
    if meta.arch == "lfm2":
        window = meta.number("attention.sliding_window", 0)
        return (window, [il < n_layer and kv_heads[il] != 0 for il in range(n_layer_all)]) if window else none
    rule = _WINDOWS.get(meta.arch)
    if rule is None or meta.arch == "exaone4" and n_layer != 64:
        return none
    window = meta.number("attention.sliding_window", rule.default)
    if window == 0:
        return none
    window = rule.forced or window
    listed = meta.array("attention.sliding_window_pattern")
    if listed is not None:
        flags = [bool(v) for v in listed[:n_layer_all]]
        return window, flags + [False] * (n_layer_all - len(flags))
    if rule.period is None:
        raise meta.refuse(f"metadata key {meta.arch}.attention.sliding_window_pattern is missing")
    period = meta.number("attention.sliding_window_pattern", rule.period)
    return window, [il < n_layer and _slides(il, period, rule.dense_first) for il in range(n_layer_all)]


def _slides(il: int, period: int, dense_first: bool) -> bool:
    if period == 0:
        return True
    return il % period != 0 if dense_first else il % period < period - 1


def _recurrent(meta: Metadata, n_all: int, n_layer: int, kv_heads: Sequence[int], n_ff: Sequence[int]) -> list[bool]:
    """Which layers carry recurrent state; prediction layers never do."""
    arch = meta.arch
    if arch in _RECURRENT or arch == "falcon-h1":
        flags = [True] * n_all
    elif arch in _NEMOTRON_H:
        flags = [heads == 0 and width == 0 for heads, width in zip(kv_heads, n_ff, strict=True)]
    elif arch in _HYBRID_BY_HEADS or arch not in KNOWN:
        flags = [heads == 0 for heads in kv_heads]
    elif arch in _HYBRID_BY_INTERVAL:
        interval = meta.number("full_attention_interval", _HYBRID_BY_INTERVAL[arch])
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
    if arch in _RECURRENT:
        return [False] * n_all
    if arch in ("falcon-h1", "minimax-m3"):
        return [True] * n_all
    if arch in _NEMOTRON_H:
        return [not recurrent[il] and n_ff[il] == 0 for il in range(n_all)]
    if arch in _HYBRID_BY_HEADS:
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
    return n_layer_all


def _indexer(meta: Metadata, n_layer_all: int, n_layer: int) -> list[int]:
    """Indexer key width per layer (sparse attention; one key head each)."""
    if meta.arch == "minimax-m3":
        first = meta.number("leading_dense_block_count", 0)
        return [meta.number("attention.indexer.key_length") if il >= first else 0 for il in range(n_layer_all)]
    if meta.arch not in ("deepseek32", "glm-dsa"):
        return [0] * n_layer_all
    width = meta.number("attention.indexer.key_length")
    full = (1,) * n_layer
    if meta.arch == "glm-dsa":
        if (
            meta.number("context_length") >= 1 << 20
        ):  # GLM 5.2: files may lack the list, llama.cpp then assumes this one
            full = tuple(int(il < 2 or il % 4 == 2) for il in range(n_layer))
        full = meta.per_layer("attention.indexer.types", n_layer, full)
    return [width if il < n_layer and full[il] else 0 for il in range(n_layer_all)]


def _state(meta: Metadata, n_embd: int, n_head: int, head_k: int) -> tuple[int, int, int]:
    """(`n_embd_r`, `n_embd_s`, convolution channels): F32 elements per sequence of a recurrent layer."""
    arch = meta.arch
    if arch in _SHIFTED:
        head = meta.number("wkv.head_size")
        return meta.number("token_shift_count", 2) * n_embd, n_embd * head, n_embd
    if arch in ("lfm2", "lfm2moe"):
        return n_embd * (meta.number("shortconv.l_cache") - 1), 0, n_embd
    if arch in ("kimi-linear", "bailingmoe3") or (arch not in KNOWN and f"{arch}.kda.head_dim" in meta.values):
        head, d_conv = meta.number("kda.head_dim"), meta.number("ssm.conv_kernel")
        return 3 * (d_conv - 1 if d_conv else 3) * n_head * head, head * head * n_head, 3 * n_head * head
    if arch == "minimax-01":
        return 0, head_k * head_k * n_head, n_head * head_k
    if arch in _SSM or (arch not in KNOWN and f"{arch}.ssm.inner_size" in meta.values):
        d_inner, d_state = meta.number("ssm.inner_size"), meta.number("ssm.state_size")
        groups = meta.number("ssm.group_count", 0) if arch not in ("mamba", "jamba") else 0
        channels = d_inner + 2 * groups * d_state
        return max(meta.number("ssm.conv_kernel") - 1, 0) * channels, d_state * d_inner, channels
    return 0, 0, 0


def _positions(meta: Metadata) -> int:
    sections = meta.array("rope.dimension_sections") or ()
    if meta.arch in _MROPE or meta.arch in _MROPE_IF_SECTIONS and len(sections) > 1 and sections[0] and sections[1]:
        return 4
    return 1
