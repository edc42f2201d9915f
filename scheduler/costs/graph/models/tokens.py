"""Models that can say only a part of their vocabulary: the logits of the rest are overwritten, or made up."""

from __future__ import annotations

from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.models.decoders import DECODERS
from scheduler.costs.graph.nodes import Node, Undrawable

_IMAGE_TOKENS = range(4, 8196)
"""Tokens of chameleon that stand for parts of images."""


def _chameleon(b: Build) -> None:
    """Heads are normed by mean and variance, all else by RMS: what blocks read, or what they return."""
    x = b.embedding()
    positions = b.positions()
    b.attention_inputs()
    ids = b.output_ids()
    norms_results = b.hparams.norms_results
    for il in range(b.last + 1):
        residual = x
        q, k, v = b.qkv(il, x if norms_results else b.norm(x, il, "attn_norm"))
        q, k = (b.head_norm(y, il, f"attn_{name}_norm", rms=False) for y, name in ((q, "q"), (k, "k")))
        x = b.attend(il, g.rope(q, positions), g.rope(k, positions), v)
        if il == b.last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        if norms_results:
            x = b.norm(x, il, "attn_norm")
        residual = g.add(x, residual)
        x = b.feed_forward(il, x if norms_results else b.norm(residual, il, "ffn_norm"))
        if norms_results:
            x = b.norm(x, il, "ffn_norm")
        x = g.add(x, residual)
    b.finish_logits = _without_images
    b.logits(b.norm(x, -1, "output_norm"))


def _without_images(logits: Node) -> Node:
    """A copy of the logits in which those of image tokens are the lowest there are."""
    if logits.ne[0] < len(_IMAGE_TOKENS):
        raise Undrawable(f"{logits.ne[0]} tokens do not include those of images")
    lowest = g.like("CLAMP", Node("NONE", (len(_IMAGE_TOKENS),)))
    return g.like("SET", logits, lowest)


def _qwen3tts(b: Build) -> None:
    """Qwen3 whose output matrix knows the tokens of speech only; logits of the others are put before."""
    if b.hparams.n_deep:
        raise Undrawable("layers have a part of the input of their own")
    table, norm = b.weight("token_embd.weight"), b.weight("output_norm.weight")
    if not table or not norm:
        raise Undrawable("there is no token_embd.weight or output_norm.weight")
    n_vocab = table.ne[1]

    def padded(logits: Node) -> Node:
        missing = n_vocab - logits.ne[0]
        if missing < 0:
            raise Undrawable(f"{logits.ne[0]} logits for {n_vocab} tokens")
        if not missing:
            return logits
        lowest = g.repeat(g.scale(g.view(norm, (1,), ())), missing, logits.ne[1])
        return g.concat(lowest, logits)

    b.finish_logits = padded
    DECODERS["llama"](b)


TOKENS: dict[str, Template] = {"qwen3tts": _qwen3tts, "chameleon": _chameleon}
