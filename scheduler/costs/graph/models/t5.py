"""T5: an encoder and a decoder with biases by distance.

A context reserves the graph that its calls run by default: with t5 that of the decoder, which attends to what the
encoder has made of a question as long as the model allows; the encoder has a graph to reserve in t5encoder only.
"""

from __future__ import annotations

from scheduler.costs.ggml_types import F16, F32
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.nodes import I32, Node, Undrawable

_OWN_SCALES = {"attn_q": "attn_q", "attn_k": "attn_k", "attn_v": "attn_v", "attn_o": "attn_output"}
"""The scales of the decoder's attention (NVFP4) are named as if it had no encoder."""


def _encoder(b: Build) -> None:
    x = b.embedding()
    buckets = g.fresh_input((b.tokens, b.tokens), I32)
    mask = g.fresh_input((b.tokens, b.tokens), F16 if b.flash else F32)
    ids = b.output_ids()
    for il in range(b.last + 1):
        residual = x
        x = _norm(b, il, "enc.attn_norm", x)
        q, k, v = (_by_head(b, il, b.project(il, f"enc.attn_{which}", x)) for which in "qkv")
        x = b.project(il, "enc.attn_o", b.attend_to(q, k, v, mask, _bias(b, il, "enc", buckets)))
        if il == b.last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        x = _feed_forward(b, il, "enc", g.add(x, residual))
    x = _output_norm(b, "enc", x)
    x.is_output = True
    b.graph.expand(x)
    b.pool(x)


def _decoder(b: Build) -> None:
    last = max((il for il in range(b.last + 1) if b.layer(il, "dec.attn_norm")), default=-1)
    if b.weight(f"dec.blk.{b.last + 1}.attn_norm.weight"):
        raise Undrawable("the decoder has more layers than the encoder, and llama.cpp a place for those only")
    x = b.embedding()
    answer = g.fresh_input((b.arch.n_embd, b.arch.n_ctx_train))
    buckets = g.fresh_input((b.size.n_ctx_seq, b.tokens), I32)
    b.attention_inputs()
    mask = g.fresh_input((b.arch.n_ctx_train, b.tokens), F16 if b.flash else F32)
    ids = b.output_ids()
    for il in range(last + 1):
        x = _attend_to_itself(b, il, x, buckets)
        residual = x
        q = b.project(il, "dec.cross_attn_q", _norm(b, il, "dec.cross_attn_norm", x))
        k, v = (b.project(il, f"dec.cross_attn_{which}", answer) for which in "kv")
        q, k, v = (_by_head(b, il, rows) for rows in (q, k, v))
        x = b.project(il, "dec.cross_attn_o", b.attend_to(q, k, v, mask))
        if il == last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        x = _feed_forward(b, il, "dec", g.add(x, residual))
    b.logits(_output_norm(b, "dec", x))


def _attend_to_itself(b: Build, il: int, x: Node, buckets: Node) -> Node:
    normed = _norm(b, il, "dec.attn_norm", x)
    q, k, v = (
        _by_head(b, il, b.project(il, f"dec.{stem}", normed, scale_of=_OWN_SCALES[stem]))
        for stem in ("attn_q", "attn_k", "attn_v")
    )
    found = b.attended(il, q, k, v, bias=_bias(b, il, "dec", buckets))
    return g.add(b.project(il, "dec.attn_o", found, scale_of=_OWN_SCALES["attn_o"]), x)


def _norm(b: Build, il: int, stem: str, x: Node) -> Node:
    b.needed(il, stem)
    return b.norm(x, il, stem)


def _output_norm(b: Build, part: str, x: Node) -> Node:
    if not b.weight(f"{part}.output_norm.weight"):
        raise Undrawable(f"there is no {part}.output_norm.weight")
    return b.norm(x, -1, f"{part}.output_norm")


def _by_head(b: Build, il: int, rows: Node) -> Node:
    head = b.arch.layers[il].head_v
    return g.reshape(rows, head, rows.ne[0] // head, rows.ne[1])


def _bias(b: Build, il: int, part: str, buckets: Node) -> Node:
    """What distances add to the scores of each head; a layer without weights of its own has the first one's."""
    table = b.layer(il, f"{part}.attn_rel_b") or b.needed(0, f"{part}.attn_rel_b")
    cells, tokens = buckets.ne[:2]
    rows = g.get_rows(table, g.reshape(buckets, cells * tokens))
    return g.cont(g.permute(g.reshape(rows, rows.ne[0], cells, tokens), 2, 0, 1, 3))


def _feed_forward(b: Build, il: int, part: str, x: Node) -> Node:
    """A block around a residual, gated if it has the matrix for that."""
    normed = _norm(b, il, f"{part}.ffn_norm", x)
    up = b.project(il, f"{part}.ffn_up", normed)
    gated = b.layer(il, f"{part}.ffn_gate")
    inner = g.glu(b.project(il, f"{part}.ffn_gate", normed), up) if gated else g.unary(up)
    return g.add(b.project(il, f"{part}.ffn_down", inner), x)


T5: dict[str, Template] = {"t5": _decoder, "t5encoder": _encoder}
