"""Which layers of an architecture attend, slide a window, carry recurrent state or share what another layer has.

The per-layer half of `load_hparams` and `load_arch_hparams` (see `architecture`): each rule gives one value per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.costs.families import row_of
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


def depth(meta: Metadata) -> tuple[int, int]:
    """(layers that take part in the split, those without prediction layers)."""
    n_block = meta.number("block_count")
    n_layer_all = n_block
    if meta.arch == "nanbeige":  # runs the same layers several times, each time with a cache of its own
        n_layer_all = n_block * max(meta.number("num_loops", 1), 1)
    elif meta.arch == "graniteswitch":  # the last layer routes between adapters
        n_layer_all = n_block + 1
    if n_block == 0 or n_layer_all > MAX_LAYERS:
        raise meta.refuse(f"block_count {n_block} makes {n_layer_all} layers; llama.cpp takes 1 to {MAX_LAYERS}")
    return n_layer_all, n_layer_all - min(meta.number("nextn_predict_layers", 0), n_layer_all)


def deepened(meta: Metadata, values: tuple[int, ...], router: int) -> tuple[int, ...]:
    """Per block of the file, turned to per layer; `router` is the value of a layer that routes."""
    if meta.arch == "nanbeige":
        return values * max(meta.number("num_loops", 1), 1)
    return (*values, router) if meta.arch == "graniteswitch" else values


def runs(meta: Metadata, n_layer_all: int) -> list[int]:
    """Per layer, the one whose weights it runs where that is another, else -1."""
    if meta.arch == "nanbeige":
        n_block = meta.number("block_count")
        return [il % n_block if il >= n_block else -1 for il in range(n_layer_all)]
    if meta.arch == "hrm_text":  # a low stack some times, then the high stack, and all that again
        stack, cycles = meta.number("hrm.layers_per_stack"), meta.number("hrm.l_cycles")
        n_run = stack * meta.number("hrm.h_cycles") * (cycles + 1)
        if not cycles or n_run != n_layer_all:
            raise meta.refuse(f"hrm.layers_per_stack, h_cycles and l_cycles make {n_run} layers of {n_layer_all}")
        first = [(il // stack % (cycles + 1) == cycles) * stack + il % stack for il in range(n_layer_all)]
        return [run if run != il else -1 for il, run in enumerate(first)]
    return [-1] * n_layer_all


def compressions(meta: Metadata, n_layer_all: int) -> list[int]:
    """Compression ratios of deepseek4; other than these two get no cache (`filter_csa`, `filter_hca`)."""
    if meta.arch != "deepseek4":
        return [0] * n_layer_all
    ratios = meta.array("attention.compress_ratios") or ()
    if len(ratios) < n_layer_all:
        raise meta.refuse("attention.compress_ratios is shorter than block_count")
    return [ratio if ratio in (4, 128) else 0 for ratio in ratios[:n_layer_all]]


def extra_states(meta: Metadata, n_layer_all: int, n_embd: int) -> list[int]:
    """The history of qwen4exp's n-gram embeddings (`ple_conv_state`)."""
    layers = (meta.array("ple.layers") or ()) if meta.arch == "qwen4exp" else ()
    if not layers:
        return [0] * n_layer_all
    history = (max(meta.number("ple.conv_kernel"), 1) - 1) * meta.number("ple.ngram_size")
    return [
        history * meta.number("hyper_connection.count") * n_embd if il in layers else 0 for il in range(n_layer_all)
    ]


def sliding(meta: Metadata, n_layer_all: int, n_layer: int, kv_heads: Sequence[int]) -> tuple[int, list[bool]]:
    """Window in tokens, and which layers slide (`load_swa_pattern`, `set_swa_pattern`)."""
    none = 0, [False] * n_layer_all
    if meta.arch == "lfm2":
        window = meta.number("attention.sliding_window", 0)
        return (window, [il < n_layer and kv_heads[il] != 0 for il in range(n_layer_all)]) if window else none
    rule = row_of(meta.arch).window
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


def recurrent(meta: Metadata, n_all: int, n_layer: int, kv_heads: Sequence[int], n_ff: Sequence[int]) -> list[bool]:
    """Which layers carry recurrent state; prediction layers never do."""
    row = row_of(meta.arch)
    if row.family in ("recurrent", "both"):
        flags = [True] * n_all
    elif row.family == "by width":
        flags = [heads == 0 and width == 0 for heads, width in zip(kv_heads, n_ff, strict=True)]
    elif row.family == "by heads" or not row.is_known:
        flags = [heads == 0 for heads in kv_heads]
    elif row.family == "by interval":
        interval = meta.number("full_attention_interval", row.interval)
        if interval == 0:
            raise meta.refuse("full_attention_interval is 0")
        periodic = [int((il + 1) % interval != 0) for il in range(n_all)]
        flags = [bool(flag) for flag in meta.per_layer("attention.recurrent_layers", n_all, periodic)]
    else:
        flags = [False] * n_all
    return [flag and il < n_layer for il, flag in enumerate(flags)]


def attending(meta: Metadata, n_all: int, n_layer: int, recurrent: Sequence[bool], n_ff: Sequence[int]) -> list[bool]:
    """Which layers attend and so get a cache (the layer filters of `create_memory`)."""
    arch, family = meta.arch, row_of(meta.arch).family
    if family == "recurrent":
        return [False] * n_all
    if family == "both" or arch in ("minimax-m3", "deepseek4", "gemma4-assistant"):
        return [True] * n_all
    if family == "by width":
        return [not recurrent[il] and n_ff[il] == 0 for il in range(n_all)]
    if family == "by heads" and arch != "glm5-next":
        return [not r for r in recurrent]
    return [(il < n_layer or n_layer == 0) and not recurrent[il] for il in range(n_all)]


def owners(meta: Metadata, n_layer_all: int) -> int:
    """The first so many layers own a cache; the others read one of theirs (gemma3n, gemma4)."""
    if meta.arch == "gemma3n":
        return min(20, n_layer_all)
    if meta.arch == "gemma4":
        shared = meta.number("attention.shared_kv_layers", 0)
        if n_layer_all - shared < 2 and shared:
            raise meta.refuse(f"attention.shared_kv_layers is {shared} of {n_layer_all} layers; two must own a cache")
        return n_layer_all - shared
    return 0 if meta.arch == "gemma4-assistant" else n_layer_all  # which reads the caches of its target


def indexer(meta: Metadata, n_all: int, n_layer: int, recurrent: Sequence[bool]) -> tuple[list[int], bool]:
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
