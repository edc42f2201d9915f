"""Several residual streams that are mixed around every block (hyper-connections): DeepSeek 4 and Hunyuan 4.

A block reads a weighted sum of the streams, and its result is spread over all of them again.
"""

from __future__ import annotations

from scheduler.costs.ggml_types import F16, F32
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.models.indexer import by_stream, choose, narrowed
from scheduler.costs.graph.models.streams import (
    FUSES_BELOW_SEQUENCES,
    both_shares,
    joined,
    mix,
    one_share,
    one_stream,
    returned,
    spread,
    stream_mixes,
    stream_shares,
    weighted_sum,
)
from scheduler.costs.graph.nodes import I32, I64, Node, Undrawable
from scheduler.costs.weights import pad

_STREAMS = 4
"""How many streams llama.cpp can mix in DeepSeek 4."""
_INDEXED_RATIO = 4
"""Layers that are compressed so little look for what matters with an indexer, and their windows overlap."""


def _whole(b: Build, name: str) -> Node:
    """A weight outside the layers. Raises Undrawable when it is missing."""
    node = b.weight(name)
    if node is None:
        raise Undrawable(f"there is no {name}")
    return node


def _norm(b: Build, x: Node, il: int, stem: str, *, rms: bool = True) -> Node:
    """A norm whose weight cannot be left out."""
    b.needed(il, stem)
    return b.norm(x, il, stem, rms=rms)


def _answer(b: Build, x: Node, ids: Node, *, copies: bool = False) -> None:
    """Pick the tokens to answer, make their streams one, and multiply by the output matrix and by nothing else.

    `copies`: streams and sum are copied, because the sum could be of another type.
    """
    n, count, tokens, _ = x.ne
    rows = g.get_rows(g.reshape(x, n * count, tokens), ids)
    x = g.reshape(rows, n, count, rows.ne[1])
    matrix, factor, base = (_whole(b, f"output_hc_{part}.weight") for part in ("fn", "scale", "base"))
    shares = stream_shares(stream_mixes(x, matrix), factor, base)
    _whole(b, "output_norm.weight")
    y = b.norm(
        g.cast(weighted_sum(g.cast(x, F32), shares), F32) if copies else weighted_sum(x, shares), -1, "output_norm"
    )
    logits = g.mul_mat(_whole(b, "output.weight"), y)
    y.is_output = logits.is_output = True
    b.graph.expand(logits)
    b.pool(y)


# ---------------------------------------------------------------------- DeepSeek 4


class _Compressor:
    """Makes one key of each `ratio` tokens that follow each other, and keeps what is left over as state.

    Holds the inputs that all layers with the same ratio share. `stem`: how its weights are called.
    """

    def __init__(self, b: Build, ratio: int, width: int, stem: str) -> None:
        self._build, self._ratio, self._width, self._stem = b, ratio, width, stem
        self._overlaps = ratio == _INDEXED_RATIO
        indexes = stem.startswith("indexer")
        seqs = b.batch.n_seqs
        self._blocks = b.tokens // ratio + seqs
        self._held = ratio * self._halves * b.size.n_stream
        self._cells = pad(-(-b.size.n_ctx_seq // ratio), 256)
        kept = min(b.tokens, self._held)
        self._places_in_block = g.fresh_input((b.tokens,), I32)
        self._kept, self._kept_at = (g.fresh_input((kept,), I32) for _ in range(2))
        self._reads = g.fresh_input((self._halves * ratio * self._blocks,), I32)
        self._writes = g.fresh_input((self._blocks,), I64)
        self._positions = g.fresh_input((self._blocks,), I32)
        self.mask = g.fresh_input((self._cells, b.tokens // seqs, 1, seqs), F16 if b.flash or indexes else F32)
        turns = indexes or b.arch.n_head_k == b.arch.index_width
        self.rotation = _rotation(width) if turns else b.key_rotation(width)

    @property
    def _halves(self) -> int:
        """Windows that a key is made of."""
        return 2 if self._overlaps else 1

    def store(self, il: int, x: Node) -> Node:
        """Make and store the keys of all windows that end within the batch; a view of all keys."""
        b, stem = self._build, self._stem
        values = b.project(il, f"{stem}_kv", x, scaled=False)
        scores = b.project(il, f"{stem}_gate", x, scaled=False)
        scores = g.add(scores, g.get_rows(b.needed(il, f"{stem}_ape"), self._places_in_block))
        states = [self._state(il) for _ in range(2)]
        k = self._compress(il, *(joined(state, new, 1) for state, new in zip(states, (values, scores), strict=True)))
        keys = b.index(il, g.hadamard(k, self.rotation) if self.rotation else k, self._writes, self._cells)
        kept = [
            g.set_rows(state, g.get_rows(new, self._kept), self._kept_at)
            for state, new in zip(states, (values, scores), strict=True)
        ]
        for node in kept:
            b.graph.expand(node)
        return keys

    def _state(self, il: int) -> Node:
        """What is left over of all sequences, as rows."""
        b, row = self._build, self._width * self._halves
        state = b.states(il, row * self._held // b.size.n_stream)
        return g.view(state, (row, self._held), (F32.row_bytes(row),))

    def _compress(self, il: int, values: Node, scores: Node) -> Node:
        """One key of each window: the sum of its values, weighted by the scores."""
        values, scores = (g.cont(g.permute(self._windows(rows), 1, 0, 2, 3)) for rows in (values, scores))
        sums = g.sum_rows(g.mul(values, g.soft_max(scores)))
        k = _norm(self._build, g.cont(g.permute(sums, 1, 0, 2, 3)), il, f"{self._stem}_norm")
        return g.rope(k, self._positions)

    def _windows(self, rows: Node) -> Node:
        """The rows of each window; where windows overlap, one half of the row is for the earlier of two."""
        shape = (self._width, self._ratio, self._blocks)
        if not self._overlaps:
            return g.reshape(g.get_rows(rows, self._reads), *shape)
        nothing = g.reshape(g.scale(g.view(rows, rows.ne[:1], ())), rows.ne[0], 1)
        read = g.get_rows(joined(rows, nothing, 1), self._reads)
        before, now = (
            g.reshape(g.cont(g.view(read, (self._width, read.ne[1] // 2), (read.nb[1],))), *shape) for _ in range(2)
        )
        return joined(before, now, 1)


def _rotation(width: int) -> Node:
    """What keys are turned by where they always are."""
    n = max(width & -width, 64)
    return g.fresh_input((n, n))


class _Attention:
    """Attention to the last tokens and, in most layers, to compressed keys of all tokens, as if both were one cache."""

    def __init__(self, b: Build) -> None:
        self._build = b
        self._positions = b.positions()
        seqs, head, index = b.batch.n_seqs, b.arch.layers[0].head_k, b.arch.index_width
        self._ids = g.fresh_input((b.tokens,), I64)
        mask_type = F16 if b.flash else F32
        self._mask = b.graph.expand(g.fresh_input((b.size.n_swa_cells, b.tokens // seqs, 1, seqs), mask_type))
        self._rotation = _rotation(head) if b.arch.n_head_k == index else b.key_rotation(head)
        ratios = {kind.compression for kind in b.arch.layers} - {0}
        self._compressors = {ratio: _Compressor(b, ratio, head, "attn_compressor") for ratio in ratios}
        self._indexer = _Compressor(b, _INDEXED_RATIO, index, "indexer_compressor")

    def __call__(self, il: int, x: Node) -> Node:
        b, kind = self._build, self._build.arch.layers[il]
        low = _norm(b, b.project(il, "attn_q_a", x, scaled=False), il, "attn_q_a_norm")
        q = g.reshape(b.project(il, "attn_q_b", low, scaled=False), kind.head_k, kind.n_head, b.tokens)
        q = g.rope(g.like("RMS_NORM", q), self._positions)
        kv = _norm(b, b.project(il, "attn_kv", x, scaled=False), il, "attn_kv_a_norm")
        kv = g.rope(g.reshape(kv, kind.head_k, 1, b.tokens), self._positions)
        compressor = self._compressors.get(kind.compression)
        compressed = compressor.store(il, x) if compressor else None
        chosen = self._chosen(il, x, low) if kind.compression == _INDEXED_RATIO else None
        if self._rotation:
            q, kv = g.hadamard(q, self._rotation), g.hadamard(kv, self._rotation)
        b.graph.expand(q)
        b.graph.expand(kv)
        keys, mask = b.index(il, kv, self._ids, b.size.n_swa_cells), self._mask
        if compressor and compressed:
            keys = joined(keys, compressed, 2)
            visible = narrowed(compressor.mask, chosen, mask.type) if chosen else compressor.mask
            mask = joined(mask, visible, 0)
        out = b.attend_to(q, keys, keys, mask, sinks=b.needed(il, "attn_sinks"))
        return self._output(il, g.hadamard(out, self._rotation) if self._rotation else out)

    def _chosen(self, il: int, x: Node, low: Node) -> Node:
        """The compressed keys that matter to each token."""
        b = self._build
        keys = self._indexer.store(il, x)
        q = b.project(il, "indexer.attn_q_b", low, scaled=False)
        q = g.rope(g.reshape(q, keys.ne[0], q.ne[0] // keys.ne[0], b.tokens), self._positions)
        if self._indexer.rotation:
            q = g.hadamard(q, self._indexer.rotation)
        weights = g.scale(b.project(il, "indexer.proj", x, scaled=False))
        q, weights = by_stream(q, weights, keys.ne[3])
        return choose(b, q, keys, weights, self._indexer.mask)

    def _output(self, il: int, out: Node) -> Node:
        """Turn the heads back, and project them in two steps, of which the first is done by groups of heads."""
        b, kind = self._build, self._build.arch.layers[il]
        out = g.reshape(out, kind.head_k, kind.n_head, b.tokens)
        out = g.like("ROPE_BACK", out, self._positions)
        matrix = b.needed(il, "attn_output_a")
        width = matrix.ne[0]
        groups = kind.head_k * kind.n_head // width
        rank = matrix.ne[1] * matrix.ne[2] // groups
        out = g.permute(g.reshape(out, width, groups, b.tokens), 0, 2, 1, 3)
        low = Node("MUL_MAT", (rank, b.tokens, groups), F32, (matrix, out))
        return b.project(il, "attn_output_b", g.cont(g.permute(low, 0, 2, 1, 3), rank * groups, b.tokens), scaled=False)


def _deepseek4(b: Build) -> None:
    if b.arch.residual_streams != _STREAMS:
        raise Undrawable(f"llama.cpp mixes {_STREAMS} streams, not {b.arch.residual_streams}")
    if not b.hparams.gates_by_softplus:
        raise Undrawable("llama.cpp wants experts to be chosen by the roots of their softplus")
    x = b.embedding()
    ids = b.output_ids()
    attention = _Attention(b)
    fuses = not b.is_torn or b.size.n_seq_max < FUSES_BELOW_SEQUENCES
    x = spread(b, x)
    for il in range(b.last + 1):
        mixed = mix(b, il, "attn", x)
        x = returned(b, attention(il, _norm(b, mixed.read, il, "attn_norm")), x, mixed, fuses=fuses)
        mixed = mix(b, il, "ffn", x)
        for node in (x, mixed.shares, mixed.across):
            b.graph.expand(node)
        normed = _norm(b, mixed.read, il, "ffn_norm")
        table = b.layer(il, "ffn_gate_tid2eid")
        if table is None:
            b.needed(il, "exp_probs_b", "bias")
        chosen = g.get_rows(table, b.token_ids) if table else None
        routed = b.experts(il, normed, normalise=b.hparams.normalises_experts, chosen=chosen)
        y = g.add(routed, b.feed_forward(il, normed, "_shexp"))
        x = b.pinned(returned(b, y, x, mixed, fuses=fuses), il)
    _answer(b, x, ids)


# ---------------------------------------------------------------------- Hunyuan 4


class _Hunyuan:
    """Latent attention to what indexers have chosen. A layer without an indexer leaves the choice of the one before."""

    def __init__(self, b: Build) -> None:
        self._build = b
        self._positions = b.positions()
        b.attention_inputs()
        streams = 1 if b.size.n_stream == 1 else b.batch.n_seqs
        self._ids = g.fresh_input((b.tokens,), I64)
        self._mask = g.fresh_input((b.size.n_ctx_seq, b.tokens // streams, 1, streams), F16)
        self._indexes = b.hparams.index_top_k > 0
        self._chosen: Node | None = None

    def attend(self, il: int, x: Node) -> Node:
        """Queries are moved into the latent space (`attn_k_b`), the result is moved out of it and gated."""
        b, kind = self._build, self._build.arch.layers[il]
        latent, tokens = b.arch.kv_lora_rank, b.tokens
        low = _norm(b, g.mul_mat(b.needed(il, "attn_q_a"), x), il, "attn_q_a_norm")
        if kind.index_k_width:
            self._chosen = self._choose(il, x, low)
        q = g.mul_mat(b.needed(il, "attn_q_b"), low)
        q = g.reshape(q, q.ne[0] // kind.n_head, kind.n_head, tokens)
        both = g.mul_mat(b.needed(il, "attn_kv_a_mqa"), x)
        rope, row = both.ne[0] - latent, both.nb[1]
        q_rope = g.rope(g.view(q, (rope, *q.ne[1:3]), q.nb[1:3]), self._positions)
        k_rope = g.rope(g.view(both, (rope, 1, tokens), (row, row)), self._positions)
        compressed = _norm(b, g.view(both, (latent, tokens), (row,)), il, "attn_kv_a_norm")
        q_plain = g.permute(g.view(q, (q.ne[0] - rope, *q.ne[1:3]), q.nb[1:3]), 0, 2, 1, 3)
        q = g.concat(g.permute(g.mul_mat(b.needed(il, "attn_k_b"), q_plain), 0, 2, 1, 3), q_rope)
        v = g.reshape(compressed, latent, 1, tokens)
        narrow = self._narrow if self._indexes else None
        out = b.attended_latent(il, q, g.concat(v, k_rope), v, narrow, b.needed(il, "attn_sinks"))
        out = g.mul(out, g.unary(g.mul_mat(b.needed(il, "attn_gate"), x)))
        return b.project(il, "attn_output", out, scaled=False)

    def _choose(self, il: int, x: Node, low: Node) -> Node:
        """Store the keys of the layer's indexer, and let it choose."""
        b = self._build
        b.needed(il, "indexer.k_norm", "bias")
        k = _norm(b, g.mul_mat(b.needed(il, "indexer.attn_k"), x), il, "indexer.k_norm", rms=False)
        keys = b.index(il, g.rope(g.reshape(k, k.ne[0], 1, b.tokens), self._positions), self._ids)
        q = g.mul_mat(b.needed(il, "indexer.attn_q_b"), low)
        q = g.rope(g.reshape(q, k.ne[0], q.ne[0] // k.ne[0], b.tokens), self._positions)
        q, weights = by_stream(q, g.mul_mat(b.needed(il, "indexer.proj"), x), keys.ne[3])
        return choose(b, q, keys, g.scale(weights), self._mask)

    def _narrow(self, mask: Node) -> Node:
        if self._chosen is None:
            raise Undrawable("the first layer has no indexer")
        return narrowed(mask, self._chosen, F32)


def _read_copies(b: Build, il: int, block: str, x: Node) -> tuple[Node, Node]:
    """What a block reads, and what each stream weighs when its result is written to them."""
    matrix, factors, bases = (b.needed(il, f"hc_{block}_{part}") for part in ("fn", "scale", "base"))
    read, written = both_shares(stream_mixes(x, matrix), factors, bases, x.ne[1])
    return g.cast(weighted_sum(g.cast(x, F32), read), F32), g.scale(written)


def _write_copies(x: Node, streams: Node, shares: Node) -> Node:
    """The streams, each with its share of the result `x` added."""
    n, count, tokens, _ = streams.ne
    x, shares, streams = (g.cast(node, F32) for node in (x, shares, streams))
    parts = [g.reshape(g.add(one_stream(streams), g.mul(x, one_share(shares))), n, 1, tokens) for _ in range(count)]
    out = parts[0]
    for part in parts[1:]:
        out = joined(out, part, 1)
    return g.cast(out, F32)


def _hunyuan4(b: Build) -> None:
    x = b.embedding()
    attention = _Hunyuan(b)
    ids = b.output_ids()
    x = spread(b, x)
    for il in range(b.last + 1):
        read, shares = _read_copies(b, il, "attn", x)
        x = _write_copies(attention.attend(il, _norm(b, read, il, "attn_norm")), x, shares)
        read, shares = _read_copies(b, il, "ffn", x)
        x = _write_copies(b.experts_or_dense(il, _norm(b, read, il, "ffn_norm")), x, shares)
    _answer(b, x, ids, copies=True)


HYPER: dict[str, Template] = {"deepseek4": _deepseek4, "hy_v4": _hunyuan4}
