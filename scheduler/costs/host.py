"""Host RAM of the process that runs a replica: what stays, what passes, and what the kernel may take back.

llama.cpp reports buffers; a process holds more: the vocabulary, tables of cache cells and graphs, a work buffer of the
CPU, rows of logits that grow with the first embeddings. Loading takes some on top and gives it back. Weights that are
mapped from the file are page cache: resident, and evictable at the price of reading them again.
Sources in llama.cpp: src/llama-context.cpp (`output_reserve`, `graph_max_nodes`), src/llama-kv-cells.h,
src/llama-model-loader.cpp (`load_all_data`), ggml/src/ggml-backend.cpp, ggml/src/ggml-cpu/.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.costs.architecture import Architecture
from scheduler.costs.cache import effective_context, window_and_state_bytes
from scheduler.costs.params import MOST_DRAFTED, ContextParams, Footprint, Layout
from scheduler.costs.shape import ModelShape
from scheduler.costs.weights import assign_layers, place_weights
from scheduler.units import KIB, MIB

PROCESS_BYTES = 128 * MIB
"""The interpreter with Ray, numpy and llama.cpp's libraries: the catalogue's default of `runner_overhead_bytes`."""
EMBEDDED_AT_ONCE_BYTES = 16 * MIB
CHECKPOINTS_PER_SLOT = 4
"""Of windows and recurrent states, which cannot be cut: the engine keeps so many, near the ends of prompts."""
MOST_CHECKPOINT_BYTES = 256 * MIB
"""Of a replica's checkpoints together."""
_NGRAM_BYTES = 200
"""Per token of a context: where it and the two before it were said last (`actors/serving/ngrams.py`)."""
_NODE_BYTES = 368
"""`ggml_tensor_overhead()`."""
_CELL_BYTES = 52
_GRAPHS = 3
"""Reserved, and the last with and without outputs (`gf_res_reserve`, `gf_res_prev`)."""
_COPIES = 4
_STAGING_BYTES = 4 * MIB
"""Four pinned buffers of 1 MiB through which a card is filled when the file is not mapped."""
_TILED_BYTES = 576 * KIB
"""Per thread: what the CPU's matrix products unpack their tiles to."""
_TILE = 64
"""Queries and keys that the CPU's attention looks at together (`GGML_FA_TILE_Q`, `GGML_FA_TILE_KV`)."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of one process. `steady_bytes` and `peak_bytes` are anonymous memory; mapped bytes come on top."""

    buffers_bytes: int
    """What llama.cpp reports on the host, without mapped weights."""
    repacked_bytes: int
    """At most: a second copy of host weights in the CPU's own order (`use_extra_bufts`), beside mapped or tied ones."""
    vocabulary_bytes: int
    tables_bytes: int
    growing_bytes: int
    """What requests make llama.cpp add later, at most: rows of logits and embeddings, the CPU's work buffer."""
    process_bytes: int
    loading_bytes: int
    """On top while loading, freed afterwards."""
    mapped_bytes: int
    """Host weights in the page cache: resident while there is room, evictable."""
    mapped_while_loading_bytes: int
    """The whole file is read through the page cache, whatever goes to devices."""

    @property
    def outside_bytes(self) -> int:
        """Steady bytes besides llama.cpp's own report."""
        return self.vocabulary_bytes + self.tables_bytes + self.growing_bytes + self.process_bytes

    @property
    def resting_bytes(self) -> int:
        """Anonymous memory of a replica that is loaded and has served nothing yet."""
        return self.steady_bytes - self.growing_bytes

    @property
    def steady_bytes(self) -> int:
        return self.buffers_bytes + self.repacked_bytes + self.outside_bytes

    @property
    def peak_bytes(self) -> int:
        """The most at any time: loading is over before requests make anything grow."""
        return max(self.steady_bytes, self.resting_bytes + self.loading_bytes)


def host_memory(
    shape: ModelShape,
    layout: Layout,
    context: ContextParams,
    cost: Footprint,
    *,
    use_mmap: bool = True,
    use_extra_bufts: bool = False,
    process_bytes: int,
    n_threads: int = 16,
) -> HostMemory:
    """Host RAM of the model in this layout and context, whose buffers are `cost`. Raises Rejected as `footprint`.

    `n_threads`: the most that ever compute on the CPU. `process_bytes`: the interpreter and its libraries.
    """
    host = cost.host
    repacks = use_extra_bufts and all(device.kind != "cuda" for device in layout.devices)
    adapters = _adapters_on_host(shape, layout) if shape.adapter_weights else 0  # placement asks thousands of times
    mapped = host.weights_bytes - adapters if use_mmap else 0
    copied = shape.weights.tied.plain if not use_mmap else host.weights_bytes - adapters
    return HostMemory(
        buffers_bytes=host.total_bytes - mapped,
        repacked_bytes=copied if repacks else 0,
        vocabulary_bytes=shape.vocabulary.resident_bytes,
        tables_bytes=_tables(shape, layout, context),
        growing_bytes=_growing(shape, layout, context, n_threads),
        process_bytes=process_bytes,
        loading_bytes=max(_staging(shape, layout, use_mmap, repacks), shape.vocabulary.loading_bytes),
        mapped_bytes=mapped,
        mapped_while_loading_bytes=shape.file_bytes if use_mmap else 0,
    )


def _adapters_on_host(shape: ModelShape, layout: Layout) -> int:
    places = assign_layers(layout, shape.n_layer_all)
    return sum(place_weights(sums, layout, places)[1] for sums in shape.adapter_weights)


def _staging(shape: ModelShape, layout: Layout, use_mmap: bool, repacks: bool) -> int:
    """The largest buffer through which weights pass on their way to a device, or into another order."""
    kinds = {device.kind for device in layout.devices}
    largest = shape.largest_tensor_bytes
    through = (2 if "rpc" in kinds else 1) * largest if "rpc" in kinds or repacks else 0
    if use_mmap:  # straight from the file; an RPC device is sent a message with a copy
        return largest if "rpc" in kinds else 0
    return max(through, _STAGING_BYTES if "cuda" in kinds else 0)


def _growing(shape: ModelShape, layout: Layout, context: ContextParams, n_threads: int) -> int:
    """Later growth: a row of logits per token of an embedding batch (`output_reserve`), the CPU's work buffer, and
    checkpoints."""
    size = effective_context(shape.arch, context)
    row = 4 * (shape.n_vocab + shape.arch.n_embd_out)
    at_once = 0
    if shape.is_embedding_only:  # what is pooled goes through in one piece
        at_once = size.n_ubatch
    elif context.embeddings:
        at_once = embedding_rows(row, size.n_ubatch)
    total = 0
    if context.spec_type != "none":
        at_once = max(at_once, size.n_seq_max + MOST_DRAFTED)
        total += _NGRAM_BYTES * size.n_ctx
    total += row * max(0, at_once - size.n_seq_max)
    offloaded = layout.n_gpu_layers < 0 or layout.n_gpu_layers > shape.n_layer_all
    if not layout.devices or not offloaded or layout.spills_experts:
        total += 2 * size.n_tokens * shape.widest_row
        widths = max((layer.head_k + layer.head_v for layer in shape.arch.layers if layer.is_attention), default=0)
        total += n_threads * (_TILED_BYTES + 4 * 2 * _TILE * (widths + _TILE))
    kept = CHECKPOINTS_PER_SLOT * size.n_seq_max * window_and_state_bytes(shape.arch, context)
    return total + min(kept, MOST_CHECKPOINT_BYTES)


def embedding_rows(row_bytes: int, n_ubatch: int) -> int:
    """Tokens that are embedded one by one in a turn: each costs a row of logits, which are held to about 16 MiB."""
    return max(1, min(n_ubatch, EMBEDDED_AT_ONCE_BYTES // row_bytes))


def _tables(shape: ModelShape, layout: Layout, context: ContextParams) -> int:
    """Cells of the caches, graphs, the scheduler's tables, and the tensors' own records."""
    size = effective_context(shape.arch, context)
    n_backends = len(layout.devices) + 1
    copies = _COPIES if len(layout.devices) > 1 else 1
    nodes = _max_nodes(shape.arch, shape.n_tensors, size.n_tokens) + 6 * shape.n_adapter_pairs
    slots = _hash_slots(2 * nodes)
    graph = _NODE_BYTES * nodes + 16 * nodes + 12 * slots + slots // 8
    scheduler = _hash_slots(nodes) * (12 + 8 * n_backends * copies) + 352 * nodes + 48 * _hash_slots(2 * nodes)
    cells = size.n_ctx_seq * size.n_stream if shape.arch.has_cache else 0
    caches = cells + size.n_swa_cells * size.n_stream
    if shape.arch.index_heads:
        caches += cells
    n_tensors = shape.n_tensors + 2 * shape.n_adapter_pairs
    records = 2 * _NODE_BYTES * (n_tensors + 2 * shape.n_layer_all) + 128 * n_tensors
    batch = 96 * size.n_batch + 16 * shape.n_vocab  # rows of a batch; candidates of a sampler
    return _GRAPHS * graph + scheduler + _CELL_BYTES * caches + records + batch


def _max_nodes(arch: Architecture, n_tensors: int, n_tokens: int) -> int:
    """The nodes that llama.cpp sets aside for a graph (`graph_max_nodes`)."""
    if arch.name in ("kimi-k3", "glm5-next"):
        return max(160 * n_tokens, 64 * n_tensors)
    if arch.name == "hrm_text":
        return max(80 * n_tokens, 64 * n_tensors)
    if arch.row.busy or arch.row.family == "draft":
        return max(40 * n_tokens, 32 * n_tensors)
    return max(1024, 8 * n_tensors)


def _hash_slots(n: int) -> int:
    """At most: ggml's primes are near the powers of two, and the next one is taken."""
    return 1 << max(n, 2).bit_length()
