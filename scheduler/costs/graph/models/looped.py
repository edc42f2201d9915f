"""Models that run the same layers more than once, each time with a cache of its own."""

from __future__ import annotations

from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.nodes import Node, Undrawable


def _nanbeige(b: Build) -> None:
    """Llama's layers some times over; the last norm comes after each time, or after the last only."""
    x = b.embedding()
    positions = b.positions()
    b.attention_inputs()
    ids = b.output_ids()
    n_own = sum(kind.runs < 0 for kind in b.arch.layers)
    factors = [b.rope_factors(il) for il in range(n_own)]
    for il in range(b.last + 1):
        residual = x
        q, k, v = b.qkv(il, b.norm(x, il, "attn_norm"))
        q, k = (g.rope(y, positions, factors[b.run_by(il)]) for y in (q, k))
        x = b.attend(il, q, k, v)
        if il == b.last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        residual = g.add(x, residual)
        x = g.add(b.feed_forward(il, b.norm(residual, il, "ffn_norm")), residual)
        if b.hparams.norms_loops and (il + 1) % n_own == 0 and il < b.last:
            x = b.norm(x, -1, "output_norm", at=il)
    b.logits(b.norm(x, -1, "output_norm"))


def _hrm_text(b: Build) -> None:
    """A low and a high stack of layers take turns; both read the sum of what the two have returned last."""
    high = b.embedding()
    positions = b.positions()
    b.attention_inputs()
    ids = b.output_ids()
    low = b.weight("hrm.z_l_init")
    if low is None:
        raise Undrawable("there is no hrm.z_l_init")
    depth = b.hparams.stack_depth
    for first in range(0, b.last + 1, depth):
        x = _stack(b, g.add(high, low), range(first, first + depth), positions)
        if b.run_by(first) < depth:
            low = x
        else:
            high = x
    b.logits(g.get_rows(high, ids))


def _stack(b: Build, x: Node, layers: range, positions: Node) -> Node:
    """Layers that gate what attention returns, and a norm; no norm has a weight."""
    for il in layers:
        residual = x
        x = g.like("RMS_NORM", x)
        gate = b.project(il, "attn_gate", x, scaled=False)
        q, k, v = b.qkv(il, x)
        x = b.attended(il, g.rope(q, positions), g.rope(k, positions), v)
        x = b.project(il, "attn_output", g.mul(x, g.unary(gate)))
        residual = g.add(x, residual)
        x = g.add(b.feed_forward(il, g.like("RMS_NORM", residual)), residual)
    return g.like("RMS_NORM", x)


LOOPED: dict[str, Template] = {"nanbeige": _nanbeige, "hrm_text": _hrm_text}
