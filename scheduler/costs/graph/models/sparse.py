"""Latent attention to the cells that an indexer has chosen: DeepSeek 3.2, GLM DSA and what follows them."""

from __future__ import annotations

from scheduler.costs.ggml_types import F16, F32
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.models.indexer import INDEX_WIDTH, by_stream, check_indexer, choose, narrowed
from scheduler.costs.graph.models.latent import draw_latent
from scheduler.costs.graph.nodes import I64, Node, Undrawable


def _draw(b: Build) -> None:
    """Layers that attend through an indexer, or to a window."""
    if not b.arch.mla:
        raise Undrawable("the lengths of expanded keys and values are missing")
    indexer = _Indexer(b)
    draw_latent(b, lambda b, il, x, positions: _attention(b, il, x, positions, indexer))


class _Indexer:
    """Inputs of the indexers of all layers, and what the last of them has chosen."""

    def __init__(self, b: Build) -> None:
        streams = 1 if b.size.n_stream == 1 else b.batch.n_seqs
        self._build = b
        self._ids = g.fresh_input((b.tokens,), I64)
        self._mask = g.fresh_input((b.size.n_ctx_seq, b.tokens // streams, 1, streams), F16)
        self._rotation = g.fresh_input((INDEX_WIDTH, INDEX_WIDTH))
        self._chosen: Node | None = None

    def choose(self, il: int, x: Node, queries: Node, positions: Node) -> None:
        """Store the keys of layer `il`, score all cells and choose the best for each token.

        A layer without an indexer keeps to what the one before has chosen.
        """
        b = self._build
        if not b.arch.layers[il].index_k_width:
            return
        k = b.norm(g.mul_mat(b.needed(il, "indexer.attn_k"), x), il, "indexer.k_norm", rms=False)
        q = g.mul_mat(b.needed(il, "indexer.attn_q_b"), queries)
        weights = g.mul_mat(b.needed(il, "indexer.proj"), x)
        width, heads, tokens = k.ne[0], weights.ne[0], b.tokens
        check_indexer(heads, width)
        q, k = (
            g.mul_mat(self._rotation, g.rope(g.reshape(y, width, n, tokens), positions))
            for y, n in ((q, heads), (k, 1))
        )
        keys = b.index(il, k, self._ids)
        q, weights = by_stream(q, weights, keys.ne[3])
        self._chosen = choose(b, q, keys, g.scale(weights), self._mask)

    def narrow(self, mask: Node) -> Node:
        """`mask` where all but the chosen cells are hidden as well."""
        chosen = self._chosen
        if chosen is None:
            raise Undrawable("the first layer has no indexer")
        return narrowed(mask, chosen, F32)


def _attention(b: Build, il: int, x: Node, positions: Node, indexer: _Indexer) -> Node:
    """Queries are moved into the latent space (`attn_k_b`), the result is moved out of it (`attn_v_b`).

    Layers with a window see all of it. dots3note also norms the part of the keys that is rotated, and gates the result
    by head.
    """
    kind, tokens, gated = b.arch.layers[il], b.tokens, b.arch.name == "dots3note"
    queries = b.norm(g.mul_mat(b.needed(il, "attn_q_a"), x), il, "attn_q_a_norm")
    if not kind.is_swa:
        indexer.choose(il, x, queries, positions)
    q = g.mul_mat(b.needed(il, "attn_q_b"), queries)
    q = g.reshape(q, q.ne[0] // kind.n_head, kind.n_head, tokens)
    both = g.mul_mat(b.needed(il, "attn_kv_a_mqa"), x)
    latent, row = b.needed(il, "attn_kv_a_norm").ne[0], both.nb[1]
    rope = both.ne[0] - latent
    k_rope = g.view(both, (rope, 1, tokens), (row, row))
    if gated:
        k_rope = b.norm(k_rope, il, "attn_k_norm")
    q_rope, k_rope = (g.rope(y, positions) for y in (g.view(q, (rope, *q.ne[1:3]), q.nb[1:3]), k_rope))
    q_plain = g.permute(g.view(q, (q.ne[0] - rope, *q.ne[1:3]), q.nb[1:3]), 0, 2, 1, 3)
    q = g.concat(g.permute(g.mul_mat(b.needed(il, "attn_k_b"), q_plain), 0, 2, 1, 3), q_rope)
    compressed = b.norm(g.view(both, (latent, tokens), (row,)), il, "attn_kv_a_norm")
    v = g.reshape(compressed, latent, 1, tokens)
    out = b.attended_latent(il, q, g.concat(v, k_rope), v, None if kind.is_swa else indexer.narrow)
    if gated:
        gate = g.unary(b.project(il, "attn_gate", x, scaled=False))
        by_head = g.reshape(out, out.ne[0] // kind.n_head, kind.n_head, tokens)
        out = g.reshape(g.mul(by_head, g.reshape(gate, 1, kind.n_head, tokens)), *out.ne)
    return b.project(il, "attn_output", out)


SPARSE: dict[str, Template] = {"sparse": _draw}
