"""Transformers that attend, then feed forward, each around a residual: most of today's models."""

from __future__ import annotations

from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template


def _decoder(
    *,
    qk_norm: bool = False,
    scales_input: bool = False,
    scales_q: bool = False,
    post_norms: bool = False,
    caps: bool = False,
    sinks: bool = False,
    ffn_norm: str = "ffn_norm",
    softmax_weights: bool = False,
    picks_last: bool = False,
) -> Template:
    """Attention, then a feed-forward block, each around a residual: most of today's models."""

    def draw(b: Build) -> None:
        x = b.embedding()
        if scales_input:
            x = g.scale(x)
        positions = b.positions()
        b.attention_inputs()
        ids = b.output_ids()
        last = sum(layer.is_loaded for layer in b.arch.layers) - 1
        for il in range(last + 1):
            residual = x
            x = b.norm(x, il, "attn_norm")
            factors = b.rope_factors(il)
            q, k, v = b.qkv(il, x)
            q = g.rope(b.norm(q, il, "attn_q_norm") if qk_norm else q, positions, factors)
            k = g.rope(b.norm(k, il, "attn_k_norm") if qk_norm else k, positions, factors)
            if scales_q:
                q = g.scale(q)
            x = b.attend(il, q, k, v, sinks=b.layer(il, "attn_sinks") if sinks else None, caps=caps)
            if il == last and not picks_last:
                x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
            if post_norms:
                x = b.norm(x, il, "post_attention_norm")
            residual = g.add(x, residual)
            x = b.norm(residual, il, ffn_norm)
            if b.layer(il, "ffn_gate_inp"):
                x = b.experts(il, x, normalise=not softmax_weights, softmax_weights=softmax_weights)
            else:
                x = b.feed_forward(il, x)
            if post_norms:
                x = b.norm(x, il, "post_ffw_norm", pinned=False)
            x = g.add(x, residual)
        if picks_last:
            x.is_output = True  # `t_h_nextn`
            x = g.get_rows(x, ids)
        b.logits(b.norm(x, -1, "output_norm"))

    return draw


DECODERS: dict[str, Template] = {
    "llama": _decoder(),
    "qwen2": _decoder(),
    "qwen3": _decoder(qk_norm=True),
    "qwen3moe": _decoder(qk_norm=True),
    "gemma2": _decoder(scales_input=True, scales_q=True, post_norms=True, caps=True),
    "gemma3": _decoder(qk_norm=True, scales_input=True, scales_q=True, post_norms=True),
    "phi3": _decoder(scales_q=True),
    "gpt-oss": _decoder(sinks=True, ffn_norm="post_attention_norm", softmax_weights=True, picks_last=True),
}
