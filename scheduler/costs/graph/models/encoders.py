"""BERT and its kin: they read a batch at once, without a cache, and write nothing."""

from __future__ import annotations

from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.nodes import Node

_ROPED = ("nomic-bert", "nomic-bert-moe", "jina-bert-v3")


def _bert(b: Build) -> None:
    """Norms come after the residual sums, and one comes before the first layer."""
    positions = b.positions()
    x = b.embedding()
    types, placed = b.weight("token_types.weight"), b.weight("position_embd.weight")
    if types:
        x = g.add(x, g.view(types, (b.arch.n_embd,), ()))
    if placed:
        x = g.add(g.get_rows(placed, positions), x)
    x = b.embedding_norm(x)
    b.batch_masks()
    ids = b.output_ids()
    for il in range(b.last + 1):
        residual = x
        q, k, v = b.qkv(il, x)
        q, k = b.head_norm(q, il, "attn_q_norm", rms=False), b.head_norm(k, il, "attn_k_norm", rms=False)
        if b.arch.name in _ROPED:
            q, k = g.rope(q, positions), g.rope(k, positions)
        x = b.attend_batch(il, q, k, v)
        if il == b.last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        x = b.norm(g.add(x, residual), il, "attn_output_norm", rms=False)
        if b.layer(il, "attn_norm_2"):
            x = b.norm(g.add(x, residual), il, "attn_norm_2", rms=False)
        x = g.add(_feed_forward(b, il, x), x)
        x = b.norm(x, il, "layer_output_norm", rms=False)
    _embed(b, x)


def _modern_bert(b: Build) -> None:
    """Norms come before each block, as in decoders."""
    positions = b.positions()
    x = b.embedding_norm(b.embedding())
    ids = b.output_ids()
    b.batch_masks()
    for il in range(b.last + 1):
        residual = x
        if b.layer(il, "attn_norm"):
            x = b.norm(x, il, "attn_norm", rms=False)
        q, k, v = b.qkv(il, x)
        x = b.attend_batch(il, g.rope(q, positions), g.rope(k, positions), v)
        if il == b.last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        residual = g.add(x, residual)
        x = g.add(b.feed_forward(il, b.norm(residual, il, "ffn_norm", rms=False)), residual)
    _embed(b, b.norm(x, -1, "output_norm", rms=False))


def _gemma(b: Build) -> None:
    x = g.scale(b.embedding())
    positions = b.positions()
    b.batch_masks()
    ids = b.output_ids()
    for il in range(b.last + 1):
        residual = x
        q, k, v = b.qkv(il, b.norm(x, il, "attn_norm"))
        q = g.scale(g.rope(b.head_norm(q, il, "attn_q_norm"), positions))
        k = g.rope(b.head_norm(k, il, "attn_k_norm"), positions)
        x = b.attend_batch(il, q, k, v)
        if il == b.last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        residual = g.add(b.norm(x, il, "post_attention_norm"), residual)
        x = b.feed_forward(il, b.norm(residual, il, "ffn_norm"))
        x = g.add(b.norm(x, il, "post_ffw_norm", pinned=False), residual)
    _embed(b, b.norm(x, -1, "output_norm"))


def _feed_forward(b: Build, il: int, x: Node) -> Node:
    if b.layer(il, "ffn_gate_inp"):
        return b.experts(il, x, normalise=False, plain=True)
    up, down = b.needed(il, "ffn_up"), b.needed(il, "ffn_down")
    gated = b.layer(il, "ffn_gate") is not None or up.ne[1] != down.ne[0]
    return b.feed_forward(il, x, plain=not gated)


def _embed(b: Build, x: Node) -> None:
    x.is_output = True
    b.graph.expand(x)
    b.pool(x)


ENCODERS: dict[str, Template] = {
    "bert": _bert,
    "modern-bert": _modern_bert,
    "gemma-embedding": _gemma,
}
