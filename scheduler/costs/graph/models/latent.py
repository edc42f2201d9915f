"""Multi-head latent attention: keys and values are cached as one short vector and expanded while attending."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.nodes import Node


def draw_latent(b: Build, attend: Callable[[Build, int, Node, Node], Node]) -> None:
    """Layers that attend, given a normed activation and the positions, then feed forward, with experts in most."""
    x = b.embedding()
    positions = b.positions()
    b.attention_inputs()
    ids = b.output_ids()
    for il in range(b.last + 1):
        residual = x
        x = attend(b, il, b.norm(x, il, "attn_norm"), positions)
        if il == b.last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        residual = g.add(x, residual)
        x = b.norm(residual, il, "ffn_norm")
        x = g.add(b.experts_or_dense(il, x), residual)
    b.logits(b.norm(x, -1, "output_norm"))


def _deepseek2(b: Build) -> None:
    draw_latent(b, _attention)


def _attention(b: Build, il: int, x: Node, positions: Node) -> Node:
    """Queries are moved into the latent space (`attn_k_b`), the result is moved out of it (`attn_v_b`)."""
    kind, latent, tokens = b.arch.layers[il], b.arch.kv_lora_rank, b.tokens
    rope = kind.head_k - latent
    if b.layer(il, "attn_q"):
        q = b.project(il, "attn_q", x)
    else:
        q = b.project(il, "attn_q_b", b.norm(b.project(il, "attn_q_a", x), il, "attn_q_a_norm"))
    head = q.ne[0] // kind.n_head
    q = g.reshape(q, head, kind.n_head, tokens)
    both = b.project(il, "attn_kv_a_mqa", x)
    row = both.nb[1]
    compressed = g.view(both, (latent, tokens), (row,))
    k_rope = g.rope(g.view(both, (rope, 1, tokens), (row, row)), positions)
    compressed = b.norm(compressed, il, "attn_kv_a_norm")
    q_rope = g.rope(g.view(q, (rope, kind.n_head, tokens), q.nb[1:3]), positions)
    q_plain = g.permute(g.view(q, (head - rope, kind.n_head, tokens), q.nb[1:3]), 0, 2, 1, 3)
    q = g.concat(g.permute(g.mul_mat(b.needed(il, "attn_k_b"), q_plain), 0, 2, 1, 3), q_rope)
    v = g.reshape(compressed, latent, 1, tokens)
    return b.attend_latent(il, q, g.concat(v, k_rope), v)


LATENT: dict[str, Template] = {"deepseek2": _deepseek2}
