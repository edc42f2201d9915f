"""GLM 5 (next): residual streams, linear attention, and latent attention to the pools of cells an indexer chose."""

from __future__ import annotations

from scheduler.costs.ggml_types import F16, F32
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.models.indexer import check_indexer
from scheduler.costs.graph.models.streams import mix, returned
from scheduler.costs.graph.nodes import I32, I64, Node, Undrawable
from scheduler.costs.weights import pad

_STREAMS = 4
"""How many streams llama.cpp can mix."""
_POOLS = 64
"""Pools come in multiples of this."""
_GATHERS_UP_TO_TOKENS = 16
"""So few tokens attend to copies of their cells, if that is fewer than all; more get a mask."""


def _zeros(*ne: int) -> Node:
    return g.like("FILL", Node("NONE", ne))


def _mean(x: Node) -> Node:
    width, streams, tokens = x.ne[:3]
    total, *others = (g.view(x, (width, tokens), (x.nb[2],)) for _ in range(streams))
    for other in others:
        total = g.add(total, other)
    return g.scale(total)


# ---------------------------------------------------------------------- linear attention


def _delta_net(b: Build, il: int, x: Node) -> Node:
    """Linear attention by the delta rule, with a gate for each element of the state's rows."""
    n_seqs, tokens = b.batch.n_seqs, b.tokens
    n_tokens = tokens // n_seqs
    width = b.needed(il, "ssm_norm").ne[0]
    inner = b.needed(il, "ssm_f_b").ne[1]
    heads = inner // width
    history = b.states(il, b.arch.state_r)
    read = b.read_states(history)
    q, k, v = (_convolved(b, il, part, x, history, read) for part in "qkv")
    q, k, v = (g.reshape(y, width, heads, n_tokens, n_seqs) for y in (q, k, v))
    gate = g.mul_mat(b.needed(il, "ssm_f_b"), g.mul_mat(b.needed(il, "ssm_f_a"), x))
    gate = g.reshape(g.add(gate, b.needed(il, "ssm_dt", "bias")), width, heads, tokens)
    gate = g.mul(gate, g.reshape(b.needed(il, "ssm_a"), 1, heads, 1))
    gate = g.reshape(g.scale(g.unary(g.scale(gate))), width, heads, n_tokens, n_seqs)
    beta = g.unary(g.reshape(g.mul_mat(b.needed(il, "ssm_beta"), x), 1, heads, n_tokens, n_seqs))
    states = b.states(il, width * width * heads)
    state = g.reshape(b.read_states(states), width, width, heads, n_seqs)
    q, k = (g.scale(g.like("RMS_NORM", y)) for y in (q, k))
    both = g.gated_delta_net(q, k, v, gate, beta, state, b.n_kept)
    row = both.type.row_bytes
    nb = (row(width), row(width * heads), row(width * heads * n_tokens))
    y = g.view(both, (width, heads, n_tokens, n_seqs), nb)
    b.write_results(states, both)
    y = b.norm(g.reshape(g.cont(y), width, heads, tokens), il, "ssm_norm")
    z = g.mul_mat(b.needed(il, "ssm_g_b"), g.mul_mat(b.needed(il, "ssm_g_a"), x))
    y = g.mul(y, g.unary(g.reshape(z, width, heads, tokens)))
    return g.mul_mat(b.needed(il, "attn_output"), g.cont(y, inner, tokens))


def _convolved(b: Build, il: int, part: str, x: Node, history: Node, read: Node) -> Node:
    """Queries, keys or values after a convolution along the sequence; each has a third of the history."""
    n_seqs = b.batch.n_seqs
    x = g.mul_mat(b.needed(il, f"attn_{part}"), x)
    kernel = b.needed(il, f"ssm_conv1d_{part}")
    past, inner = kernel.ne[0] - 1, x.ne[0]
    nb = (F32.row_bytes(past), F32.row_bytes(read.ne[0]))
    before = g.view(read, (past, inner, n_seqs), nb)
    rows = g.concat(before, g.transpose(g.reshape(x, inner, b.tokens // n_seqs, n_seqs)))
    for _ in range(b.n_kept):
        newest = g.view(rows, before.ne, rows.nb[1:3])
        b.graph.expand(g.copy(newest, g.view(history, before.ne, nb)))
    y = g.ssm_conv(rows, g.reshape(kernel, kernel.ne[0], inner))
    return g.unary(g.reshape(y, inner, b.tokens))


# ---------------------------------------------------------------------- attention


class _Attention:
    """Latent attention without positions to the cells that an indexer has chosen.

    A layer without an indexer leaves the choice of the one before.
    """

    def __init__(self, b: Build) -> None:
        self._build = b
        sizes = [kernel.ne[1] for il in range(b.last + 1) if (kernel := b.layer(il, "indexer_compressor_ape"))]
        best = b.hparams.index_top_k
        if not sizes or sizes[0] < 2 or best % sizes[0]:
            raise Undrawable(f"an indexer that chooses {best} cells has pools of {sizes[:1]}")
        self._pool = pool = sizes[0]
        self._cells = b.size.n_ctx_seq
        full = self._cells // pool * b.size.n_seq_max
        self._new = max(full, 1)
        self._pools = pad(full + 1, _POOLS)
        self._best = min(self._pools, best // pool)
        n = pool * self._best + (pool - 1 if b.hparams.index_tail else 0)
        self._gathers = b.tokens <= _GATHERS_UP_TO_TOKENS and self._cells > n
        self._ids = g.fresh_input((b.tokens,), I64)
        self._stored_at = b.graph.expand(g.fresh_input((self._pools,), I32))
        self._members = b.graph.expand(g.fresh_input((pool, self._pools), I32))
        self._mask = b.graph.expand(g.fresh_input((self._pools, b.tokens), F16))
        self._tail = b.graph.expand(g.fresh_input((pool - 1, b.tokens), I32))
        self._alive = b.graph.expand(g.fresh_input((n, 1, 1, b.tokens)))
        self._new_members = g.fresh_input((pool, self._new), I32)
        self._new_stored_at = g.fresh_input((self._new,), I64)
        self._chosen: Node | None = None
        self._shown: Node | None = None

    def __call__(self, il: int, x: Node) -> Node:
        """Queries are moved into the latent space (`attn_k_b`), the result is moved out of it (`attn_v_b`)."""
        b, kind, latent = self._build, self._build.arch.layers[il], self._build.arch.kv_lora_rank
        low = b.norm(g.mul_mat(b.needed(il, "attn_q_a"), x), il, "attn_q_a_norm")
        q = g.mul_mat(b.needed(il, "attn_q_b"), low)
        q = g.permute(g.reshape(q, q.ne[0] // kind.n_head, kind.n_head, b.tokens), 0, 2, 1, 3)
        q = g.permute(g.mul_mat(b.needed(il, "attn_k_b"), q), 0, 2, 1, 3)
        kv = b.norm(g.mul_mat(b.needed(il, "attn_kv_a_mqa"), x), il, "attn_kv_a_norm")
        kv = g.reshape(kv, latent, 1, b.tokens)
        if kind.index_k_width:
            self._chosen, self._shown = self._choose(il, x, low), None
        if self._gathers:
            out = b.attended_latent(il, q, kv, kv, by=lambda keys, mask: self._gathered(il, q, keys, mask))
        else:
            out = b.attended_latent(il, q, kv, kv, self._narrow)
        return g.mul_mat(b.needed(il, "attn_output"), out)

    def _choose(self, il: int, x: Node, low: Node) -> Node:
        """Store the indexer's keys, pool those of all pools that are full, and choose cells for each token."""
        b, pool = self._build, self._pool
        q = g.mul_mat(b.needed(il, "indexer.attn_q_b"), low)
        k = b.norm(g.mul_mat(b.needed(il, "indexer.attn_k"), x), il, "indexer.k_norm", rms=False)
        gate = g.mul_mat(b.needed(il, "indexer_compressor_gate"), x)
        width, heads = k.ne[0], q.ne[0] // k.ne[0]
        check_indexer(heads, width)
        rows = g.concat(g.concat(k, gate), _zeros(width, b.tokens))
        cache = b.index(il, g.reshape(rows, 3 * width, 1, b.tokens), self._ids).src[0]
        pooled = g.view(cache, (width, cache.ne[1] * cache.ne[2]), (cache.nb[1],))
        b.graph.expand(g.set_rows(pooled, self._pooled(il, cache, width), self._new_stored_at))
        pooled = g.reshape(g.get_rows(pooled, self._stored_at), width, 1, self._pools)
        weights = g.scale(g.mul_mat(b.needed(il, "indexer.proj"), x))
        q = g.reshape(q, width, heads, b.tokens)
        scores = Node("LIGHTNING_INDEXER", (self._pools, b.tokens), src=(q, pooled, weights, self._mask))
        best = self._in_order(scores)
        cells = g.get_rows(self._members, g.reshape(best, self._best * b.tokens))
        cells = g.reshape(cells, pool * self._best, b.tokens)
        return g.concat(cells, self._tail) if b.hparams.index_tail else cells

    def _pooled(self, il: int, cache: Node, width: int) -> Node:
        """One key of each full pool: the sum of its keys, weighted by a softmax of their gates."""
        b, pool, new = self._build, self._pool, self._new
        rows = g.view(cache, (2 * width, cache.ne[1] * cache.ne[2]), (cache.nb[1],))
        rows = g.get_rows(rows, g.reshape(self._new_members, pool * new))
        rows = g.reshape(rows, 2 * width, pool, new)
        keys, gates = (g.view(rows, (width, pool, new), rows.nb[1:3]) for _ in range(2))
        gates = g.add(gates, b.needed(il, "indexer_compressor_ape"))
        gates, keys = (g.cont(g.permute(y, 1, 0, 2, 3)) for y in (gates, keys))
        weights = g.reshape(g.soft_max(g.reshape(gates, pool, width * new)), pool, width, new)
        return g.reshape(g.sum_rows(g.mul(weights, keys)), width, new)

    def _in_order(self, scores: Node) -> Node:
        """The pools with the best scores, the best one first."""
        best, tokens = self._best, self._build.tokens
        top = Node("TOP_K", (best, tokens), I32, (scores,))
        picked = g.get_rows(g.reshape(scores, 1, self._pools, tokens), top)
        order = Node("ARGSORT", (best, tokens), I32, (g.reshape(picked, best, tokens),))
        top = g.get_rows(g.reshape(g.cast(top, F32), 1, best, tokens), order)
        return g.cast(g.cont(g.reshape(top, best, tokens)), I32)

    def _narrow(self, mask: Node) -> Node:
        """`mask` where all but the chosen cells are hidden as well. Layers that share a choice share it, too."""
        if self._chosen is None:
            raise Undrawable("the first layer that attends has no indexer")
        if self._shown is None:
            self._shown = self._hidden_but(self._chosen, mask)
        return g.reshape(self._shown, *mask.ne)

    def _hidden_but(self, chosen: Node, mask: Node) -> Node:
        """Slots of `chosen` that hold no cell write to places behind the mask."""
        n, tokens = chosen.ne[:2]
        seed = g.cast(g.view(chosen, (1,), ()), F32)
        hidden = g.like("FILL", seed if mask.type is F32 else g.cast(seed, mask.type))
        hidden = g.reshape(g.repeat(hidden, 1, self._cells + n, tokens, 1), 1, self._cells + n, tokens)
        zeros = g.reshape(g.repeat(g.like("FILL", seed), 1, n, tokens, 1), 1, n, tokens)
        alive = g.unary(g.reshape(self._alive, n, tokens))
        behind = Node("ARANGE", (n,))
        places = g.add(g.mul(g.like("SUB", g.cast(chosen, F32), behind), alive), behind)
        shown = g.set_rows(hidden, zeros, g.reshape(g.cast(places, I32), n, tokens, 1))
        shown = g.view(shown, (self._cells, tokens), (shown.nb[2],))
        return g.add(shown, g.reshape(mask, self._cells, tokens))

    def _gathered(self, il: int, q: Node, keys: Node, mask: Node) -> Node:
        """Attend to copies of the chosen cells, for each token by itself."""
        b, chosen = self._build, self._chosen
        if chosen is None:
            raise Undrawable("the first layer that attends has no indexer")
        b.graph.expand(mask)
        n, tokens = chosen.ne[:2]
        cache = keys.src[0]
        rows = g.view(cache, (cache.ne[0], cache.ne[1] * cache.ne[2]), (cache.nb[1],))
        k = g.reshape(g.get_rows(rows, g.reshape(chosen, n * tokens)), cache.ne[0], n, 1, tokens)
        scores = g.soft_max(g.mul_mat(k, g.permute(q, 0, 2, 3, 1)), self._alive)
        out = g.mul_mat(b.needed(il, "attn_v_b"), g.mul_mat(g.cont(g.transpose(k)), scores))
        return g.reshape(g.cont(g.permute(out, 0, 2, 1, 3)), out.ne[0] * q.ne[1], tokens)


# ---------------------------------------------------------------------- the whole


def _glm5(b: Build) -> None:
    if b.arch.residual_streams != _STREAMS:
        raise Undrawable(f"llama.cpp mixes {_STREAMS} streams, not {b.arch.residual_streams}")
    x = b.embedding()
    b.recurrent_inputs()
    b.attention_inputs()
    attention = _Attention(b)
    ids = b.output_ids()
    width = x.ne[0]
    x = g.repeat(g.reshape(x, width, 1, b.tokens), width, _STREAMS, b.tokens, 1)
    for il in range(b.last + 1):
        mixed = mix(b, il, "attn", x)
        y = b.graph.expand(b.norm(mixed.read, il, "attn_norm"))
        y = _delta_net(b, il, y) if b.arch.layers[il].is_recurrent else attention(il, y)
        x = returned(b, y, x, mixed, fuses=not b.is_torn)
        mixed = mix(b, il, "ffn", x)
        y = b.experts_or_dense(il, b.norm(mixed.read, il, "ffn_norm"))
        x = returned(b, y, x, mixed, fuses=not b.is_torn)
    x = g.get_rows(g.reshape(x, width * _STREAMS, b.tokens), ids)
    b.logits(b.norm(_mean(g.reshape(x, width, _STREAMS, x.ne[1])), -1, "output_norm"))


GLM5: dict[str, Template] = {"glm5-next": _glm5}
