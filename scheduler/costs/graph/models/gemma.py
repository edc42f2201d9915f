"""Gemma 3n and 4: every layer has an embedding of its own, and the last layers attend to what earlier ones stored."""

from __future__ import annotations

from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.nodes import I32, Node, Undrawable

_SPARSE_LAYERS = 10
"""`n_layer_sparsity` of gemma3n: the first so many layers keep only the largest activations."""


def _gemma4(b: Build) -> None:
    x = g.scale(b.embedding())
    positions = b.positions()
    b.attention_inputs()
    ids = b.output_ids()
    per_layer = _per_layer_inputs(b, x) if b.weight("per_layer_token_embd.weight") else None
    for il in range(b.last + 1):
        residual = x
        factors = None if b.arch.layers[il].is_swa else b.rope_factors(il)
        x = _attend(b, il, b.norm(x, il, "attn_norm"), positions, factors)
        residual = g.add(b.norm(x, il, "post_attention_norm"), residual)
        if b.layer(il, "ffn_gate_inp"):
            x = _dense_and_experts(b, il, residual)
        else:
            x = b.feed_forward(il, b.norm(residual, il, "ffn_norm"))
        x = g.add(b.norm(x, il, "post_ffw_norm", pinned=False), residual)
        if per_layer:
            x = g.add(x, _own_embedding(b, il, x, per_layer))
        scale = b.layer(il, "layer_output_scale")
        if scale:
            x = g.mul(x, scale)
    x = b.norm(x, -1, "output_norm")
    x.is_output = True  # `t_h_nextn`
    b.logits(g.get_rows(x, ids))


def _dense_and_experts(b: Build, il: int, x: Node) -> Node:
    dense = b.norm(b.feed_forward(il, b.norm(x, il, "ffn_norm")), il, "post_ffw_norm_1")
    routed = b.norm(x, il, "pre_ffw_norm_2")
    router = g.mul(g.scale(g.like("RMS_NORM", x)), b.needed(il, "ffn_gate_inp", "scale"))
    experts = b.norm(b.experts(il, routed, routed_by=router), il, "post_ffw_norm_2")
    return g.add(dense, experts)


def _attend(b: Build, il: int, x: Node, positions: Node, factors: Node | None) -> Node:
    """Attention to the layer's own cache, or to the one that it shares with an earlier layer."""
    kind, t = b.arch.layers[il], b.tokens
    q_width, head = kind.head_k * kind.n_head, kind.head_k
    fused = b.project(il, "attn_qkv", x) if b.layer(il, "attn_qkv") else None

    def turned(y: Node, norm: str) -> Node:
        y = g.reshape(y, head, y.ne[0] // head, t)
        return g.rope(b.head_norm(y, il, norm), positions, factors)

    def part(width: int) -> Node:
        assert fused is not None
        return g.cont(g.view(fused, (width, t), (fused.nb[1],)))

    q = turned(part(q_width) if fused else b.project(il, "attn_q", x), "attn_q_norm")
    if b.arch.kv_source(il) != il:
        return b.attend_borrowed(il, q)
    if fused:
        k = part(kind.k_width)
        v = part(kind.v_width)
    else:
        k = b.project(il, "attn_k", x)
        v = b.project(il, "attn_v", x) if b.layer(il, "attn_v") else k
    values = g.reshape(v, kind.head_v, v.ne[0] // kind.head_v, t)
    k = g.reshape(k, head, k.ne[0] // head, t)
    k = b.head_norm(k, il, "attn_k_norm")
    values = g.like("RMS_NORM", values)
    return b.attend(il, q, g.rope(k, positions, factors), values)


def _per_layer_inputs(b: Build, x: Node) -> Node:
    """The embeddings of all layers: (their width, tokens, layers)."""
    table, matrix = b.weight("per_layer_token_embd.weight"), b.weight("per_layer_model_proj.weight")
    norm = b.weight("per_layer_proj_norm.weight")
    if not table or not matrix or not norm:
        raise Undrawable("the embeddings of each layer are incomplete")
    width, layers = norm.ne[0], b.last + 1
    looked_up = g.get_rows(table, g.fresh_input((b.tokens,), I32))
    looked_up = b.graph.expand(g.scale(g.reshape(looked_up, width, layers, b.tokens)))
    projected = g.reshape(g.scale(g.mul_mat(matrix, x)), width, layers, b.tokens)
    projected = g.mul(g.like("RMS_NORM", projected), norm)
    return g.cont(g.permute(g.scale(g.add(projected, looked_up)), 0, 2, 1, 3))


def _own_embedding(b: Build, il: int, x: Node, per_layer: Node) -> Node:
    """What layer `il`'s embedding adds to `x`."""
    gated = g.unary(b.project(il, "inp_gate", x))
    x = b.project(il, "proj", g.mul(gated, _slice(per_layer)))
    return b.norm(x, il, "post_norm")


def _slice(x: Node) -> Node:
    """One of the matrices that `x` holds; which one makes no difference to memory."""
    return g.view(x, x.ne[:2], (x.nb[1],))


def _rest(x: Node) -> Node:
    """All matrices but the first."""
    return g.view(x, (x.ne[0], x.ne[1], x.ne[2] - 1), x.nb[1:3])


def _gemma3n(b: Build) -> None:
    """Several residual streams (AltUp): each layer predicts all, works on one, and corrects the others by it."""
    x = g.scale(b.embedding())
    positions = b.positions()
    b.attention_inputs()
    per_layer = _per_layer_inputs(b, x)
    spread, merge = b.weight("altup_proj.weight"), b.weight("altup_unembd_proj.weight")
    if not spread or not merge or len(spread.ne) < 3:
        raise Undrawable("there is no altup_proj.weight or altup_unembd_proj.weight")
    others = spread.ne[2]
    magnitude = _magnitude(x)
    added = g.mul_mat(spread, g.repeat(x, b.arch.n_embd, b.tokens, others))
    x = g.stack(x, g.like("DIV", g.mul(added, magnitude), _magnitude(added)))
    for il in range(b.last + 1):
        predictions = _predicted(b, il, x)
        active = _slice(predictions)
        x = b.norm(active, il, "attn_norm")
        laurel = b.project(il, "laurel_r", b.project(il, "laurel_l", x))
        laurel = g.add(b.norm(laurel, il, "laurel_post_norm"), x)
        x = b.norm(_attend_3n(b, il, x, positions), il, "post_attention_norm")
        residual = g.scale(g.add(g.add(x, active), laurel))
        x = b.norm(residual, il, "ffn_norm")
        up, gate = b.project(il, "ffn_up", x), b.project(il, "ffn_gate", x)
        gate = g.unary(_largest(gate) if il < _SPARSE_LAYERS else gate)
        x = b.project(il, "ffn_down", g.mul(up, gate))
        x = g.add(b.norm(x, il, "post_ffw_norm", pinned=False), residual)
        corrected = _corrected(b, il, predictions, x)
        first = g.mul(_slice(corrected), b.needed(il, "altup_correct_scale"))
        first = _own_embedding(b, il, first, per_layer)
        head = _slice(corrected)
        x = g.stack(head, g.add(_rest(corrected), first))
    magnitude = _magnitude(_slice(x))
    merged = g.mul_mat(merge, _rest(x))
    merged = g.like("DIV", g.mul(merged, magnitude), _magnitude(merged))
    x = _slice(x)
    for _ in range(others):
        x = g.add(x, _slice(merged))
    x = g.get_rows(g.scale(x), b.output_ids())
    b.logits(b.norm(x, -1, "output_norm"))


def _attend_3n(b: Build, il: int, x: Node, positions: Node) -> Node:
    if b.arch.kv_source(il) != il:
        kind = b.arch.layers[il]
        q = g.reshape(b.project(il, "attn_q", x), kind.head_k, kind.n_head, b.tokens)
        return b.attend_borrowed(il, g.rope(b.head_norm(q, il, "attn_q_norm"), positions))
    q, k, v = b.qkv(il, x)
    q, k = b.head_norm(q, il, "attn_q_norm"), b.head_norm(k, il, "attn_k_norm")
    v = g.like("RMS_NORM", v)
    return b.attend(il, g.rope(q, positions), g.rope(k, positions), v)


def _magnitude(x: Node) -> Node:
    return g.like("SQRT", g.sum_rows(g.like("SQR", x)))


def _modalities(b: Build, il: int, x: Node) -> Node:
    return g.unary(g.mul_mat(b.needed(il, "altup_router"), g.scale(b.norm(x, il, "altup_router_norm"))))


def _predicted(b: Build, il: int, x: Node) -> Node:
    """All streams after layer `il`, as the router guesses: (width, tokens, streams)."""
    streams = x.ne[2]
    coefficients = b.project(il, "altup_predict_coef", _modalities(b, il, _slice(x)))
    coefficients = g.reshape(coefficients, streams, streams, b.tokens)
    predictions = g.mul_mat(g.cont(g.permute(x, 1, 2, 0, 3)), coefficients)
    return g.add(g.cont(g.permute(predictions, 0, 2, 1, 3)), x)


def _corrected(b: Build, il: int, predictions: Node, activated: Node) -> Node:
    modalities = _modalities(b, il, activated)
    innovation = g.like("SUB", activated, _slice(predictions))
    coefficients = g.transpose(g.scale(b.project(il, "altup_correct_coef", modalities)))
    width, tokens, streams = predictions.ne[:3]
    coefficients = g.cont(coefficients, 1, tokens, streams)
    return g.add(g.mul(g.repeat(innovation, width, tokens, streams), coefficients), predictions)


def _largest(x: Node) -> Node:
    """Activations over a cut-off that is some standard deviations above their mean."""
    mean = Node("MEAN", (1, *x.ne[1:]), x.type, (x,))
    deviation = g.like("SQRT", g.scale(g.sum_rows(g.like("SQR", g.like("SUB", x, mean)))))
    return g.unary(g.like("SUB", x, g.add(mean, g.scale(deviation))))


GEMMA: dict[str, Template] = {"gemma3n": _gemma3n, "gemma4": _gemma4}
