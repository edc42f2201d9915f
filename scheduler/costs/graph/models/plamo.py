"""PLaMo 2: Mamba layers and attention layers by turns."""

from __future__ import annotations

from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.nodes import Node, Undrawable

_MIN_STEPS = 64
_SCANNED_BY_CUDA = frozenset({96, 128, 256})
"""States that CUDA's `SSM_SCAN` takes where steps decay by head."""


def _mamba(b: Build, il: int, x: Node) -> Node:
    """Carry a state by heads, of inputs that are normed."""
    h, n_seqs = b.hparams, b.batch.n_seqs
    tokens, n_head = b.tokens // n_seqs, h.dt_rank
    head = h.d_inner // n_head
    if h.n_group:
        raise Undrawable("llama.cpp takes no groups in the Mamba layers of PLaMo 2")
    if b.on_cuda and (h.d_state not in _SCANNED_BY_CUDA or head % 16):
        raise Undrawable(f"CUDA leaves scans of {h.d_state} states by heads of {head} to the host")
    steps = max(_MIN_STEPS, b.arch.n_embd // 16)
    kernel = b.needed(il, "ssm_conv1d")
    convolved = b.states(il, (h.d_conv - 1) * h.d_inner)
    last = g.reshape(b.read_states(convolved), h.d_conv - 1, h.d_inner, n_seqs)
    zx = b.project(il, "ssm_in", g.reshape(x, x.ne[0], tokens, n_seqs), scaled=False)
    zx = g.cont(g.permute(zx, 0, 2, 1, 3), 2 * head, n_head, tokens, n_seqs)
    z, x = (g.view(zx, (head, *zx.ne[1:]), zx.nb[1:]) for _ in range(2))
    rows = g.concat(last, g.transpose(g.cont(x, h.d_inner, tokens, n_seqs)))
    b.write_states(convolved, g.view(rows, (h.d_conv - 1, h.d_inner, n_seqs), rows.nb[1:3]))
    x = g.unary(g.ssm_conv(rows, kernel))
    mixed = b.project(il, "ssm_x", x, scaled=False)

    def part(width: int, stem: str) -> Node:
        return b.norm(g.view(mixed, (width, tokens, n_seqs), mixed.nb[1:3]), il, stem)

    into, out = (part(h.d_state, stem) for stem in ("ssm_b_norm", "ssm_c_norm"))
    into, out = (g.view(y, (h.d_state, 1, tokens, n_seqs), y.nb[0:3]) for y in (into, out))
    dt = b.project(il, "ssm_dt", part(steps, "ssm_dt_norm"), scaled=False)
    decay = g.reshape(b.needed(il, "ssm_a"), 1, n_head)
    row = x.type.row_bytes
    nb = (row(head), row(h.d_inner), row(h.d_inner) * tokens)
    x = g.view(x, (head, n_head, tokens, n_seqs), nb)
    states = b.states(il, h.d_state * h.d_inner)

    def scan(cache: Node, ids: Node) -> Node:
        return g.ssm_scan(g.reshape(cache, h.d_state, head, n_head, b.size.n_seq_max), x, dt, decay, into, out, ids)

    both = b.read_states(states, scan)
    b.write_states(states, g.view(both, (h.d_state * h.d_inner * n_seqs,), ()))
    y = g.view(both, (head, n_head, tokens, n_seqs), nb)
    y = g.add(y, g.mul(x, g.reshape(b.needed(il, "ssm_d"), 1, n_head)))
    y = g.glu(g.cont(z), y)
    y = b.project(il, "ssm_out", g.view(y, (h.d_inner, tokens, n_seqs), y.nb[2:4]), scaled=False)
    return g.reshape(y, y.ne[0], b.tokens)


def _attention(b: Build, il: int, x: Node, positions: Node) -> Node:
    q, k, v = b.qkv(il, x)
    q = g.rope(b.norm(q, il, "attn_q_norm"), positions)
    k = g.rope(b.norm(k, il, "attn_k_norm"), positions)
    return b.attend(il, q, k, v)


def _plamo2(b: Build) -> None:
    x = b.embedding()
    positions = b.positions()
    b.recurrent_inputs()
    b.attention_inputs()
    ids = b.output_ids()
    for il in range(b.last + 1):
        residual = x
        x = b.norm(x, il, "attn_norm")
        x = _mamba(b, il, x) if b.arch.layers[il].is_recurrent else _attention(b, il, x, positions)
        if il == b.last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        residual = g.add(b.norm(x, il, "post_attention_norm"), residual)
        x = b.feed_forward(il, b.norm(residual, il, "ffn_norm"))
        x = g.add(b.norm(x, il, "post_ffw_norm"), residual)
    b.logits(b.norm(x, -1, "output_norm"))


PLAMO: dict[str, Template] = {"plamo2": _plamo2}
