"""MiniMax: lightning attention, and attention to the blocks that an indexer has chosen."""

from __future__ import annotations

from scheduler.costs.ggml_types import F16, F32, GgmlType
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.nodes import I32, I64, Node, Undrawable
from scheduler.costs.weights import pad

_RESERVED_POSITIONS = 256
"""As many as an empty cache is taken to hold (`llama_kv_cache_msa_context::get_n_pos`): buffers grow while it fills."""


def _add_inplace(a: Node, b: Node) -> Node:
    return Node("ADD", a.ne, a.type, (a, b), a.view_of or a).strided(a.nb)


def _count(n: int) -> Node:
    """The numbers from 0 to `n` - 1."""
    return Node("ARANGE", (n,))


def _best_blocks(scores: Node, bias: Node, block: int, n: int) -> Node:
    """The `n` blocks with the largest single score."""
    largest = Node("POOL_2D", (scores.ne[0] // block, *scores.ne[1:]), F32, (scores,))
    return Node("TOP_K", (n, *scores.ne[1:]), I32, (g.add(largest, bias),))


def _attended_by_group(q: Node, k: Node, v: Node, mask: Node) -> Node:
    """Flash attention where the heads of queries that see one head of keys are a sequence of their own."""
    head, n_head, tokens = q.ne[:3]
    groups, rows = k.ne[3], mask.ne[1]
    q = g.permute(g.reshape(q, head, n_head * tokens // (groups * rows), groups, rows), 0, 2, 3, 1)
    y = g.permute(g.flash_attn_ext(q, k, v, mask), 0, 1, 3, 2)
    return g.reshape(y if y.is_contiguous else g.cont(y), head * n_head, tokens)


class _Blocks:
    """MiniMax Sparse Attention: an indexer chooses blocks of positions, for each head of keys.

    Inputs that all layers share say which cell holds a position, and what is seen of either.
    """

    def __init__(self, b: Build) -> None:
        self.b = b
        self.block, self.heads = b.hparams.index_block, b.arch.index_heads
        if not b.hparams.index_top_k or self.block.bit_count() != 1:
            raise Undrawable(f"blocks of {self.block} positions are not what the indexer can choose")
        self.streams = b.batch.n_seqs if b.size.n_stream > 1 else 1
        self.positions = pad(b.size.n_ctx_seq if b.filled else _RESERVED_POSITIONS, self.block)
        self.n_blocks = self.positions // self.block
        self.chosen = min(b.hparams.index_top_k, self.n_blocks)
        self.ids = g.fresh_input((b.tokens,), I64)
        self.bias = g.fresh_input((self.n_blocks, b.tokens))
        self.mask = g.fresh_input((self.positions, b.tokens))
        self.cells = g.fresh_input((self.positions, self.streams), I32)
        self.cells_as_values = g.fresh_input((self.positions, self.streams))
        self.block_of_cell = g.fresh_input((b.size.n_ctx_seq, self.streams), I32)
        self.causal: Node | None = None

    def attend(self, il: int, x: Node, q: Node, k: Node, v: Node, positions: Node) -> Node:
        """Attend from `x` to the best blocks, project the result."""
        b = self.b
        if k.ne[1] != self.heads:
            raise Undrawable(f"the indexer has {self.heads} heads, and {k.ne[1]} heads of keys to choose for")
        width = b.arch.layers[il].index_k_width
        index_q = g.reshape(b.project(il, "indexer.q_proj", x, scaled=False), width, self.heads, b.tokens)
        index_k = g.reshape(b.project(il, "indexer.k_proj", x, scaled=False), width, 1, b.tokens)
        index_q = g.rope(b.norm(index_q, il, "indexer.q_norm"), positions)
        keys = b.index(il, g.rope(b.norm(index_k, il, "indexer.k_norm"), positions), self.ids)

        def by(q: Node, k: Node, v: Node, mask: Node) -> Node:
            if b.tokens == self.streams:
                return self._gathered(index_q, keys, q, k, v)
            parts = [self._masked(stream, index_q, keys, q, k, v, mask) for stream in range(self.streams)]
            y = parts[0]
            for part in parts[1:]:
                y = Node("CONCAT", (y.ne[0], y.ne[1] + part.ne[1]), F32, (y, part))
            return y

        return b.project(il, "attn_output", b.attended(il, q, k, v, by=by))

    def _gathered(self, index_q: Node, index_keys: Node, q: Node, k: Node, v: Node) -> Node:
        """One token per stream: take the chosen blocks out of the cache, and attend to these."""
        n, streams, heads = self.positions, self.streams, self.heads
        block, chosen = self.block, self.chosen
        every = block * chosen * heads
        keys = g.view(index_keys, (index_q.ne[0], k.ne[2], streams), index_keys.nb[2:4])
        keys = g.reshape(g.get_rows(keys, self.cells), index_q.ne[0], n, 1, streams)
        scores = g.mul_mat(keys, g.reshape(index_q, index_q.ne[0], heads, 1, streams))
        scores = _add_inplace(scores, g.reshape(self.mask, n, 1, 1, streams))
        best = _best_blocks(scores, g.reshape(self.bias, self.n_blocks, 1, 1, streams), block, chosen)
        first = g.reshape(g.scale(g.cast(best, F32)), 1, chosen, heads, streams)
        within = g.add(g.repeat(first, block, chosen, heads, streams), g.reshape(_count(block), block, 1, 1))
        within = g.cast(g.reshape(within, every, streams), I32)
        cells = g.get_rows(g.reshape(self.cells_as_values, 1, n, streams), within)
        rows = g.scale(g.reshape(cells, block, chosen, heads, streams))
        rows = g.add(rows, g.reshape(_count(heads), 1, 1, heads))
        rows = g.cast(g.reshape(rows, every, streams), I32)

        def taken(cache: Node) -> Node:
            every_head = g.view(cache, (cache.ne[0], heads * cache.ne[2], streams), (cache.nb[1], cache.nb[3]))
            y = g.reshape(g.get_rows(every_head, rows), cache.ne[0], block * chosen, 1, heads * streams)
            of: GgmlType = F16 if cache.type.is_quantized else cache.type
            return y if of is F32 else g.cast(y, of)

        seen = g.get_rows(g.reshape(self.mask, 1, n, streams), within)
        seen = g.cast(g.reshape(seen, block * chosen, 1, 1, heads * streams), F16)
        return _attended_by_group(q, taken(k), taken(v), seen)

    def _masked(self, stream: int, index_q: Node, index_keys: Node, q: Node, k: Node, v: Node, mask: Node) -> Node:
        """Many tokens of one stream: attend to the whole cache, but hide what was not chosen."""
        n, heads, cells, tokens = self.positions, self.heads, k.ne[2], self.b.tokens // self.streams
        n_blocks = self.n_blocks
        self.causal = self.causal or g.cast(mask, F32)
        index_q = g.view(index_q, (index_q.ne[0], heads, tokens), index_q.nb[1:3])
        keys = g.view(index_keys, (index_q.ne[0], cells), index_keys.nb[2:3])
        keys = g.get_rows(keys, g.view(self.cells, (n,), ()))
        scores = g.mul_mat(keys, g.reshape(index_q, index_q.ne[0], heads * tokens))
        seen = g.view(self.mask, (n, 1, tokens), (self.mask.nb[1],) * 2)
        scores = _add_inplace(g.reshape(scores, n, heads, tokens), seen)
        bias = g.view(self.bias, (n_blocks, 1, tokens), (self.bias.nb[1],) * 2)
        best = _best_blocks(scores, bias, self.block, self.chosen)
        hidden = g.repeat(g.cast(g.scale(bias), F16), n_blocks, heads, tokens)
        shown = g.reshape(g.scale(g.cast(best, F32)), 1, self.chosen, heads * tokens)
        blocks = g.set_rows(
            g.reshape(hidden, 1, n_blocks, heads * tokens), shown, g.reshape(best, self.chosen, heads * tokens)
        )
        blocks = g.cont(g.permute(g.reshape(blocks, n_blocks, heads, tokens), 0, 2, 1, 3))
        blocks = g.cont(g.transpose(g.reshape(blocks, n_blocks, tokens * heads)))
        by_cell = g.get_rows(blocks, g.view(self.block_of_cell, (cells,), ()))
        by_cell = g.reshape(g.cont(g.transpose(by_cell)), cells, tokens, heads)
        causal = g.view(self.causal, (cells, tokens, 1), (self.causal.nb[1], self.causal.nb[3]))
        by_cell = g.cast(g.reshape(_add_inplace(by_cell, causal), cells, tokens, 1, heads), F16)
        q = g.view(q, (q.ne[0], q.ne[1], tokens), q.nb[1:3])
        k, v = (g.permute(g.view(y, (*y.ne[:3], 1), y.nb[1:]), 0, 3, 1, 2) for y in (k, v))
        return _attended_by_group(q, k, v, by_cell)


def _minimax_m3(b: Build) -> None:
    """Without flash attention, or where sequences share a cache, every layer attends to all."""
    x = b.embedding()
    positions = b.positions()
    b.attention_inputs()
    blocks = _Blocks(b) if b.flash and b.size.n_stream == b.size.n_seq_max else None
    ids = b.output_ids()
    for il in range(b.last + 1):
        residual = x
        x = b.norm(x, il, "attn_norm")
        q, k, v = b.qkv(il, x)
        q = g.rope(b.norm(q, il, "attn_q_norm"), positions)
        k = g.rope(b.norm(k, il, "attn_k_norm"), positions)
        if blocks and b.arch.layers[il].index_k_width:
            x = blocks.attend(il, x, q, k, v, positions)
        else:
            x = b.attend(il, q, k, v)
        if il == b.last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        residual = g.add(x, residual)
        x = b.norm(residual, il, "ffn_norm")
        if b.layer(il, "ffn_gate_inp"):
            y = b.experts(il, x, normalise=b.hparams.normalises_experts)
            x = g.add(y, b.feed_forward(il, x, "_shexp"))
        else:
            x = b.feed_forward(il, x)
        x = g.add(x, residual)
    b.logits(b.norm(x, -1, "output_norm"))


class _Lightning:
    """Lightning attention: within the batch as usual but without a softmax, and to a state that decays."""

    def __init__(self, b: Build) -> None:
        self.b = b
        self.n_head, self.n_seqs = b.arch.layers[0].n_head, b.batch.n_seqs
        self.tokens = b.tokens // self.n_seqs
        self.slopes = g.fresh_input((self.n_head,))
        self.q_decay = g.fresh_input((1, self.n_head, self.tokens, self.n_seqs))
        self.k_decay = g.fresh_input((1, self.n_head, self.tokens, self.n_seqs))
        self.decay = g.fresh_input((self.tokens, self.tokens, self.n_head, self.n_seqs))

    def attend(self, il: int, x: Node) -> Node:
        """Read the state, attend, write the state; the result is gated and projected."""
        b, n_head, tokens, n_seqs = self.b, self.n_head, self.tokens, self.n_seqs
        head = b.arch.layers[il].head_k
        b.read_states(b.states(il, b.arch.state_r))
        x = g.reshape(x, x.ne[0], tokens, 1, n_seqs)
        mixed = g.unary(b.project(il, "attn_qkv", x, scaled=False))
        mixed = g.reshape(mixed, 3 * head, n_head, tokens, n_seqs)
        q, k, v = (g.view(mixed, (head, *mixed.ne[1:]), mixed.nb[1:]) for _ in range(3))
        states = b.states(il, b.arch.state_s)
        state = g.reshape(b.read_states(states), head, head, n_head, n_seqs)
        q_decay, k_decay, decay = (g.unary(g.scale(y)) for y in (self.q_decay, self.k_decay, self.decay))
        y = g.mul_mat(state, g.permute(g.mul(q, q_decay), 0, 2, 1, 3))
        scores = g.mul_mat(g.permute(k, 0, 2, 1, 3), g.permute(q, 0, 2, 1, 3))
        v = g.cont(g.permute(v, 1, 2, 0, 3))
        y = b.graph.expand(g.add(y, g.mul_mat(v, g.mul(scores, decay))))
        faded = g.mul(state, g.reshape(g.unary(g.scale(g.scale(self.slopes))), 1, 1, n_head))
        k = g.cont(g.permute(g.mul(k, k_decay), 1, 2, 0, 3))
        b.write_states(states, g.add(faded, g.mul_mat(k, v)))
        y = g.cont(g.permute(y, 0, 2, 1, 3))
        y = b.norm(g.reshape(y, head * n_head, tokens, 1, n_seqs), il, "attn_norm_2")
        y = g.mul(g.unary(b.project(il, "attn_gate", x, scaled=False)), y)
        y = b.project(il, "attn_output", y, scaled=False)
        return g.reshape(y, y.ne[0], b.tokens)


def _minimax_01(b: Build) -> None:
    """What a layer adds to is its own normed input, scaled."""
    x = b.embedding()
    b.recurrent_inputs()
    b.attention_inputs()
    positions = b.positions()
    ids = b.output_ids()
    lightning = _Lightning(b)
    for il in range(b.last + 1):
        residual = x = b.norm(x, il, "attn_norm")
        if b.arch.layers[il].is_recurrent:
            x = lightning.attend(il, x)
        else:
            q, k, v = b.qkv(il, x)
            x = b.attend(il, g.rope(q, positions), g.rope(k, positions), v)
        if il == b.last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        x = residual = b.norm(g.add(x, g.scale(residual)), il, "ffn_norm")
        x = b.experts(il, x, plain=b.layer(il, "ffn_gate_exps") is None)
        x = g.add(x, g.scale(residual))
    b.logits(b.norm(x, -1, "output_norm"))


MINIMAX: dict[str, Template] = {
    "minimax-m3": _minimax_m3,
    "minimax-01": _minimax_01,
}
