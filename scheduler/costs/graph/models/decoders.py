"""Transformers that attend, then feed forward, each around a residual: most of today's models.

What the weights tell is not said twice: biases, norms of queries and keys, shared experts and gates are drawn where the
file has them, for llama.cpp refuses files with too many or too few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.nodes import Node


@dataclass(frozen=True)
class _Decoder:
    """How one architecture differs from llama. Called with a `Build`, it draws the graph."""

    rms: bool = True
    """Norms are RMS norms."""
    scales_input: bool = False
    scales_q: bool = False
    ropes: Literal["all", "sliding", "three of four"] = "all"
    norms_rows: bool = False
    """Queries and keys are normed before they are taken apart into heads."""
    norms_after_rope: bool = False
    """Queries and keys are normed after their rotation, not before."""
    caps: bool = False
    sinks: bool = False
    parallel: Literal["", "feed-forward first", "attention first"] = ""
    """Both blocks read the same norm; which result is added to the residual first."""
    ffn_norm: str = "ffn_norm"
    post_norms: bool = False
    """Norms after each block. Elsewhere `post_attention_norm` may be the name of `ffn_norm`."""
    pins_last_norm: bool = False
    """The norm after the feed-forward block is kept on its layer's device."""
    residual_first: bool = False
    """The second sum of a layer is kept where its residual lay, not where the feed-forward block's result did."""
    plain_ffn: bool = False
    """One matrix up, an activation, one matrix down."""
    normalise: bool | None = True
    """The weights of the experts in use sum up to 1; None: the file says."""
    softmax_weights: bool = False
    picks_last: bool = False
    """The rows to answer are picked after the last layer, not inside."""

    def __call__(self, b: Build) -> None:
        x = b.embedding()
        if self.scales_input:
            x = g.scale(x)
        positions = b.positions()
        attention_scale = g.fresh_input((1, 1, b.tokens)) if b.hparams.scales_attention else None
        b.attention_inputs()
        ids = b.output_ids()
        for il in range(b.last + 1):
            residual = x
            normed = b.norm(x, il, "attn_norm", rms=self.rms) if b.layer(il, "attn_norm") else x
            x = self._attention(b, il, normed, positions, attention_scale)
            if il == b.last and not self.picks_last:
                x, residual, normed = (g.get_rows(y, ids) for y in (x, residual, normed))
            x = (
                self._parallel(b, il, x, normed, residual)
                if self.parallel
                else self._serial(b, il, x, normed, residual)
            )
        if self.picks_last:
            x.is_output = True  # `t_h_nextn`
            x = g.get_rows(x, ids)
        b.logits(b.norm(x, -1, "output_norm", rms=self.rms))

    def _attention(self, b: Build, il: int, x: Node, positions: Node, attention_scale: Node | None) -> Node:
        q, k, v = b.qkv(il, x, by_head=not self.norms_rows)
        if self.norms_rows:
            kind, t = b.arch.layers[il], b.tokens
            q, k = b.norm(q, il, "attn_q_norm"), b.norm(k, il, "attn_k_norm")
            q, k = (g.reshape(y, kind.head_k, y.ne[0] // kind.head_k, t) for y in (q, k))
            v = g.reshape(v, kind.head_v, v.ne[0] // kind.head_v, t)
        turns = {"all": b.hparams.ropes, "sliding": b.slides(il), "three of four": (il + 1) % 4 != 0}[self.ropes]
        factors = b.rope_factors(il)

        def turn(y: Node, norm: str) -> Node:
            if not self.norms_after_rope and not self.norms_rows:
                y = b.head_norm(y, il, norm, rms=self.rms)
            if turns:
                y = g.rope(y, positions, factors)
            return b.head_norm(y, il, norm, rms=self.rms) if self.norms_after_rope else y

        q, k = turn(q, "attn_q_norm"), turn(k, "attn_k_norm")
        if self.scales_q:
            q = g.scale(q)
        if attention_scale:
            q = g.mul(q, attention_scale)
        return b.attend(il, q, k, v, sinks=b.layer(il, "attn_sinks") if self.sinks else None, caps=self.caps)

    def _serial(self, b: Build, il: int, x: Node, normed: Node, residual: Node) -> Node:
        if self.post_norms:
            x = b.norm(x, il, "post_attention_norm", rms=self.rms)
        if b.hparams.scales_residual:
            x = g.scale(x)
        residual = g.add(x, residual)
        if b.layer(il, self.ffn_norm):
            x = b.norm(residual, il, self.ffn_norm, rms=self.rms)
        else:
            x = normed if b.layer(il, "attn_norm") else residual
        x = self._feed_forward(b, il, x)
        if self.post_norms:
            x = b.norm(x, il, "post_ffw_norm", rms=self.rms, pinned=self.pins_last_norm)
        if b.hparams.scales_residual:
            x = g.scale(x)
        return g.add(residual, x) if self.residual_first else g.add(x, residual)

    def _parallel(self, b: Build, il: int, x: Node, normed: Node, residual: Node) -> Node:
        y = self._feed_forward(b, il, normed)
        if self.parallel == "feed-forward first":
            return g.add(g.add(y, residual), x)
        return g.add(g.add(x, y), residual)

    def _feed_forward(self, b: Build, il: int, x: Node) -> Node:
        if not b.layer(il, "ffn_gate_inp"):
            return b.feed_forward(il, x, plain=self.plain_ffn)
        normalise = b.hparams.normalises_experts if self.normalise is None else self.normalise
        shared = b.feed_forward(il, x, "_shexp") if b.layer(il, "ffn_up_shexp") else None
        gate = b.layer(il, "ffn_gate_inp_shexp")
        if shared and gate:
            opened = g.mul_mat(gate, x)
            shared = g.mul(shared, g.like("DIV", g.unary(opened), opened))
        routed = b.experts(il, x, normalise=normalise, softmax_weights=self.softmax_weights)
        return g.add(routed, shared) if shared else routed


DECODERS: dict[str, Template] = {
    "llama": _Decoder(),
    "qwen2moe": _Decoder(normalise=False),
    "gemma": _Decoder(scales_input=True, scales_q=True),
    "gemma2": _Decoder(scales_input=True, scales_q=True, post_norms=True, caps=True),
    "gemma3": _Decoder(scales_input=True, scales_q=True, post_norms=True),
    "phi2": _Decoder(rms=False, scales_q=True, parallel="attention first", plain_ffn=True),
    "phi3": _Decoder(scales_q=True, residual_first=True),
    "gpt-oss": _Decoder(
        sinks=True, ffn_norm="post_attention_norm", normalise=False, softmax_weights=True, picks_last=True
    ),
    "glm4": _Decoder(post_norms=True, pins_last_norm=True),
    "glm4moe": _Decoder(ffn_norm="post_attention_norm", normalise=None),
    "command-r": _Decoder(rms=False, parallel="feed-forward first"),
    "cohere2": _Decoder(rms=False, parallel="feed-forward first", ropes="sliding"),
    "starcoder2": _Decoder(rms=False, plain_ffn=True),
    "stablelm": _Decoder(rms=False),
    "smollm3": _Decoder(ropes="three of four"),
    "exaone4": _Decoder(post_norms=True, ropes="sliding"),
    "hunyuan-moe": _Decoder(norms_after_rope=True),
    "seed_oss": _Decoder(ffn_norm="post_attention_norm"),
    "dots1": _Decoder(normalise=None),
    "olmo2": _Decoder(post_norms=True, norms_rows=True),
    "olmoe": _Decoder(normalise=False, norms_rows=True),
}
