"""The experimental Qwen 4: residual streams, linear attention, and attention to the blocks that an indexer chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduler.costs.ggml_types import F32
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.models.streams import FUSES_BELOW_SEQUENCES
from scheduler.costs.graph.nodes import I32, I64, Node, Undrawable

_MOST_CELLS = 256
"""Per block; the graph has two operations for each."""


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The inputs of an indexer that scores cells by blocks."""

    ids: Node
    block_of: Node
    """Each cell's block."""
    cells_of: Node
    """Each block's cells."""
    positions: Node
    bias: Node


def _inputs_by_block(b: Build, ratio: int) -> _Blocks:
    cells, streams = b.size.n_ctx_seq, _streams(b)
    n = -(-cells // ratio)
    return _Blocks(
        ids=g.fresh_input((b.tokens,), I64),
        block_of=g.fresh_input((cells, streams), I32),
        cells_of=g.fresh_input((ratio * n, streams), I32),
        positions=g.fresh_input((b.arch.n_pos * n * streams,), I32),
        bias=g.fresh_input((n, b.tokens // streams, streams)),
    )


def _streams(b: Build) -> int:
    return 1 if b.size.n_stream == 1 else b.batch.n_seqs


def _sum(parts: list[Node]) -> Node:
    total = parts[0]
    for part in parts[1:]:
        total = g.add(total, part)
    return total


# ---------------------------------------------------------------------- residual streams


def _mixed(b: Build, il: int, block: str, x: Node) -> tuple[Node, Node]:
    """The input of a block, and what each stream is given of its result."""
    width, streams, tokens = x.ne[:3]
    rows = g.mul(g.like("RMS_NORM", x), b.needed(il, f"hc_{block}_norm"))
    rows = g.reshape(rows, width * streams, tokens)
    gate = b.project(il, f"hc_{block}_up", g.unary(g.scale(b.project(il, f"hc_{block}_down", rows))))
    sources = tuple(g.reshape(y, width, streams, tokens) for y in (rows, gate))
    return Node("DSV4_HC_PRE", (width, tokens), src=sources), b.project(il, f"hc_{block}_inject", rows)


def _collapsed(b: Build, x: Node) -> Node:
    """The last mixer, which makes one stream of all, without the fused operation."""
    width, streams, tokens = x.ne[:3]
    norm = b.weight("output_hc_norm.weight")
    if norm is None:
        raise Undrawable("there is no output_hc_norm.weight")
    rows = g.reshape(g.mul(g.like("RMS_NORM", x), norm), width * streams, tokens)
    gate = b.project_outside("output_hc_up", g.unary(g.scale(b.project_outside("output_hc_down", rows))))
    gated = g.reshape(g.mul(rows, g.unary(gate)), width, streams, tokens)
    parts = [g.view(gated, (width, tokens), (gated.nb[2],)) for _ in range(streams)]
    return g.scale(_sum([g.cont(parts[0]), *parts[1:]]))


def _combined(b: Build, x: Node, y: Node, inject: Node) -> Node:
    """A block's result added to all streams."""
    width, streams, tokens = x.ne[:3]
    share = g.scale(g.unary(g.scale(inject)))
    if not b.is_torn or b.size.n_seq_max < FUSES_BELOW_SEQUENCES:
        return Node("DSV4_HC_POST", x.ne, src=(y, x, share))
    y = g.repeat(g.reshape(y, width, 1, tokens), width, streams, tokens, 1)
    return g.add(x, g.mul(y, g.reshape(share, 1, streams, tokens)))


# ---------------------------------------------------------------------- recurrent state


def _after_history(b: Build, cache: Node, x: Node) -> Node:
    """`x` behind the history of a convolution, time first; the next batch's history is stored."""
    channels = x.ne[0]
    read = b.read_states(cache)
    rows = g.concat(g.reshape(read, cache.ne[0] // channels, channels, b.batch.n_seqs), g.transpose(x))
    for _ in range(b.n_kept):
        newest = g.view(rows, (cache.ne[0] // channels, channels, b.batch.n_seqs), rows.nb[1:3])
        b.write_states(cache, g.cont(newest))
    return rows


def _delta_net(b: Build, il: int, x: Node) -> Node:
    """Linear attention by the gated delta rule."""
    h, n_seqs = b.hparams, b.batch.n_seqs
    n_tokens, width, k_heads, v_heads = b.tokens // n_seqs, h.d_state, h.n_group, h.dt_rank
    mixed = b.project(il, "attn_qkv", x)
    z = b.project(il, "attn_gate", x)
    beta = g.unary(g.reshape(b.project(il, "ssm_beta", x), 1, v_heads, n_tokens, n_seqs))
    alpha = g.reshape(b.project(il, "ssm_alpha", x), v_heads, n_tokens, n_seqs)
    gate = g.mul(g.unary(g.add(alpha, b.needed(il, "ssm_dt", "bias"))), b.needed(il, "ssm_a"))
    gate = g.reshape(gate, 1, v_heads, n_tokens, n_seqs)
    kernel = b.needed(il, "ssm_conv1d")
    history = b.states(il, (kernel.ne[0] - 1) * kernel.ne[1])
    rows = _after_history(b, history, g.reshape(mixed, mixed.ne[0], n_tokens, n_seqs))
    states = b.states(il, width * width * v_heads)
    state = g.reshape(b.read_states(states), width, width, v_heads, n_seqs)
    mixed = g.unary(g.ssm_conv(rows, kernel))
    row = mixed.type.row_bytes
    nb = (row(width), row(mixed.ne[0]), row(mixed.ne[0]) * n_tokens)
    q, k, v = (g.view(mixed, (width, heads, n_tokens, n_seqs), nb) for heads in (k_heads, k_heads, v_heads))
    q, k = (g.scale(g.like("RMS_NORM", y)) for y in (q, k))
    both = g.gated_delta_net(q, k, v, gate, beta, state, b.n_kept)
    nb = (row(width), row(width * v_heads), row(width * v_heads * n_tokens))
    y = g.view(both, (width, v_heads, n_tokens, n_seqs), nb)
    b.write_results(states, both)
    z = g.reshape(z, width, v_heads, n_tokens, n_seqs)
    y = g.mul(b.norm(y, il, "ssm_norm"), g.unary(z))
    y = b.project(il, "ssm_out", g.reshape(y, width * v_heads, n_tokens, n_seqs))
    return g.reshape(y, y.ne[0], b.tokens)


# ---------------------------------------------------------------------- n-gram embeddings


def _grams(b: Build) -> Node | None:
    """Rows of a table for the n-grams that end in each token, if some layer reads them."""
    key = next((key for il in range(b.last + 1) if (key := b.layer(il, "ple_key"))), None)
    table = b.weight("per_layer_token_embd.weight")
    if key is None:
        return None
    if table is None or key.ne[0] % table.ne[0]:
        raise Undrawable("per_layer_token_embd.weight does not fit ple_key.weight")
    rows = g.fresh_input((key.ne[0] // table.ne[0] * b.tokens,), I32)
    return b.graph.expand(g.reshape(g.get_rows(table, rows), key.ne[0], b.tokens))


def _with_grams(b: Build, il: int, grams: Node, x: Node) -> Node:
    """The streams, plus what they take of the n-grams, plus that once more after a convolution along the sequence."""
    shape, width = x.ne[:3], x.ne[0] * x.ne[1]

    def normed(y: Node, stem: str) -> Node:
        return g.mul(g.like("RMS_NORM", g.reshape(y, *shape)), b.needed(il, stem))

    key, value = (b.project(il, stem, grams) for stem in ("ple_key", "ple_value"))
    likeness = g.mul(normed(key, "ple_norm_key"), normed(x, "ple_norm_query"))
    likeness = g.scale(g.sum_rows(likeness))
    size = g.like("SQRT", g.like("CLAMP", g.unary(likeness)))
    gate = g.unary(g.mul(g.unary(likeness), size))
    value = g.repeat(g.reshape(value, shape[0], 1, b.tokens), *shape, 1)
    gated = g.mul(value, gate)
    rows = normed(g.reshape(gated, width, b.tokens), "ple_norm_conv")
    convolved = g.reshape(g.cont(_convolved(b, il, g.reshape(rows, width, b.tokens))), *shape)
    return g.add(x, g.add(gated, convolved))


def _convolved(b: Build, il: int, x: Node) -> Node:
    """A dilated convolution of each channel by itself, as a sum of shifted copies."""
    kernel = b.needed(il, "ple_conv1d")
    channels, n_seqs = x.ne[0], b.batch.n_seqs
    n_tokens = b.tokens // n_seqs
    history = b.arch.layers[il].state_extra
    if not history or kernel.ne[1] != channels:
        raise Undrawable(f"blk.{il}.ple_conv1d.weight has no history, or one that does not fit")
    rows = _after_history(b, b.states(il, history), g.reshape(x, channels, n_tokens, n_seqs))
    terms = []
    for _ in range(kernel.ne[0]):
        shifted = g.cont(g.transpose(g.view(rows, (n_tokens, channels, n_seqs), rows.nb[1:3])))
        factors = g.reshape(g.cont(g.view(kernel, (1, channels), (kernel.nb[1],))), channels)
        terms.append(g.mul(shifted, factors if factors.type is F32 else g.cast(factors, F32)))
    return g.unary(_sum(terms))


# ---------------------------------------------------------------------- attention


def _unbiased(b: Build, il: int, stem: str, x: Node) -> Node:
    """`x` times a matrix whose bias, if the file has one, llama.cpp does not add."""
    y = b.project(il, stem, x)
    return y.src[0] if b.layer(il, stem, "bias") else y


def _attention(b: Build, il: int, x: Node, positions: Node, blocks: dict[int, _Blocks]) -> Node:
    """Attention to the cells that the indexer chose, if the layer has one. One matrix makes queries and a gate."""
    kind, t = b.arch.layers[il], b.tokens
    ratio = b.hparams.index_ratios[il] if kind.index_k_width else 0
    narrow = None
    if ratio > _MOST_CELLS:
        raise Undrawable(f"blocks of {ratio} cells are too many to sum up one by one")
    if ratio:
        if ratio not in blocks:
            blocks[ratio] = _inputs_by_block(b, ratio)
        narrow = _chosen(b, il, x, positions, blocks[ratio], ratio)
    both, k, v = (_unbiased(b, il, stem, x) for stem in ("attn_q", "attn_k", "attn_v"))
    step = both.type.row_bytes(2 * kind.head_k)
    q, gate = (g.view(both, (kind.head_k, kind.n_head, t), (step, step * kind.n_head)) for _ in range(2))
    k, v = (g.reshape(y, kind.head_k, y.ne[0] // kind.head_k, t) for y in (k, v))
    q = g.rope(b.norm(q, il, "attn_q_norm"), positions)
    k = g.rope(b.norm(k, il, "attn_k_norm"), positions)
    y = b.attended(il, q, k, v, narrow=narrow)
    return _unbiased(b, il, "attn_output", g.mul(y, g.unary(g.cont(gate, kind.head_k * kind.n_head, t))))


def _chosen(b: Build, il: int, x: Node, positions: Node, blocks: _Blocks, ratio: int) -> Callable[[Node], Node]:
    """Store the indexer's keys. What is returned makes a mask that leaves only the best blocks' cells to each token."""
    width = b.needed(il, "indexer.k_proj").ne[1]
    keys = b.index(il, g.reshape(b.project(il, "indexer.k_proj", x), width, 1, b.tokens), blocks.ids)

    def narrow(mask: Node) -> Node:
        score = _score(b, il, x, positions, keys, blocks, ratio)
        wide = mask if mask.type is F32 else g.cast(mask, F32)
        score = g.add(score, g.reshape(wide, *score.ne[:3]))
        return _unmasked(mask, score, min(score.ne[0], b.hparams.index_top_k + ratio - 1))

    return narrow


def _score(b: Build, il: int, x: Node, positions: Node, keys: Node, blocks: _Blocks, ratio: int) -> Node:
    """For each token, the score of every cell: that of its block."""
    width, streams = keys.ne[0], keys.ne[3]
    cells, per = keys.ne[2], b.tokens // streams
    n = blocks.bias.ne[0]
    keys = g.view(keys, (width, cells, streams), keys.nb[2:4])
    members = g.reshape(g.get_rows(keys, blocks.cells_of), width, ratio, n, streams)
    slices = [g.cont(g.view(members, (width, n, streams), members.nb[2:4])) for _ in range(ratio)]
    pooled = b.norm(g.reshape(g.scale(_sum(slices)), width, n * streams, 1), il, "indexer.k_norm")
    pooled = g.reshape(g.rope(g.reshape(pooled, width, 1, n * streams), blocks.positions), width, n, streams)
    q = b.project(il, "indexer.q_proj", x)
    heads = q.ne[0] // width
    q = g.rope(b.norm(g.reshape(q, width, heads, b.tokens), il, "indexer.q_norm"), positions)
    score = g.mul_mat(pooled, g.reshape(q, width, heads * per, streams))
    score = g.unary(g.reshape(score, n, heads, per, streams))
    by_head = [g.view(score, (n, per, streams), score.nb[2:4]) for _ in range(heads)]
    score = g.add(_sum([g.cont(by_head[0]), *by_head[1:]]), blocks.bias)
    by_cell = g.get_rows(g.cont(g.permute(score, 1, 0, 2, 3)), blocks.block_of)
    return g.cont(g.permute(by_cell, 1, 0, 2, 3))


def _unmasked(mask: Node, score: Node, k: int) -> Node:
    """A mask that is open only where the `k` best scores are, and where `mask` is."""
    cells, per, streams = score.ne[:3]
    top = Node("TOP_K", (k, per, streams), I32, (score,))
    top = g.reshape(g.cont(top), k, per, 1, streams)
    shut = g.like("FILL", mask)
    shut = g.view(shut, (1, cells, per, streams), shut.nb[:3])
    top = g.view(top, (k, per, streams), (top.nb[1], top.nb[2], streams * top.nb[3]))
    zeros = g.like("FILL", Node("NONE", (1, k, per, streams)))
    opened = g.set_rows(shut, zeros, top)
    opened = g.view(opened, (cells, per, 1, streams), (opened.nb[2], opened.nb[3], opened.nb[3]))
    return g.add(opened, mask)


# ---------------------------------------------------------------------- the whole


def _feed_forward(b: Build, il: int, x: Node) -> Node:
    routed = b.experts(il, x)
    if not b.layer(il, "ffn_up_shexp"):
        return routed
    shared = b.feed_forward(il, x, "_shexp")
    return g.add(routed, g.mul(shared, g.unary(b.project(il, "ffn_gate_inp_shexp", x, scaled=False))))


def _qwen4(b: Build) -> None:
    streams = b.needed(0, "hc_attn_inject").ne[1]
    x = b.embedding()
    b.recurrent_inputs()
    b.attention_inputs()
    positions = b.positions()
    ids = b.output_ids()
    grams = _grams(b)
    blocks: dict[int, _Blocks] = {}
    width = x.ne[0]
    x = g.repeat(g.reshape(x, width, 1, b.tokens), width, streams, b.tokens, 1)
    for il in range(b.last + 1):
        if grams and b.layer(il, "ple_key"):
            x = _with_grams(b, il, grams, x)
        y, inject = _mixed(b, il, "attn", x)
        b.graph.expand(y)
        y = _delta_net(b, il, y) if b.arch.layers[il].is_recurrent else _attention(b, il, y, positions, blocks)
        if il == b.last:
            y, inject, x = (g.get_rows(z, ids) for z in (y, inject, g.reshape(x, width * streams, b.tokens)))
            x = g.reshape(x, width, streams, x.ne[1])
        x = _combined(b, x, y, inject)
        y, inject = _mixed(b, il, "ffn", x)
        x = b.pinned(_combined(b, x, _feed_forward(b, il, y), inject), il)
    b.logits(_collapsed(b, x))


QWEN4: dict[str, Template] = {"qwen4exp": _qwen4}
