"""Models with layers that carry a state from token to token: Mamba 1 and 2, short convolutions, and hybrids of them."""

from __future__ import annotations

from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.nodes import Node


def _by_sequence(b: Build, x: Node) -> Node:
    return g.reshape(x, x.ne[0], b.tokens // b.batch.n_seqs, b.batch.n_seqs)


def _convolve(b: Build, states: Node, read: Node, x: Node, kernel: Node) -> Node:
    """Put the last inputs before the new ones, store what the next batch needs of them, convolve."""
    rows = g.concat(g.reshape(read, kernel.ne[0] - 1, kernel.ne[1], b.batch.n_seqs), x)
    for _ in range(b.n_written):
        b.write_states(states, g.view(rows, (kernel.ne[0] - 1, kernel.ne[1], b.batch.n_seqs), rows.nb[1:3]))
    return g.ssm_conv(rows, kernel)


def _mamba(b: Build, il: int, x: Node) -> Node:
    h, n_seqs = b.hparams, b.batch.n_seqs
    n_tokens = b.tokens // n_seqs
    kernel = b.needed(il, "ssm_conv1d")
    convolved = b.states(il, (h.d_conv - 1) * h.d_inner)
    read = b.read_states(convolved)
    xz = g.mul_mat(b.needed(il, "ssm_in"), _by_sequence(b, x))
    x, z = (g.view(xz, (h.d_inner, *xz.ne[1:3]), xz.nb[1:3]) for _ in range(2))
    x = _convolve(b, convolved, read, g.transpose(x), kernel)
    x = g.unary(g.add(x, b.needed(il, "ssm_conv1d", "bias")))
    parts = g.mul_mat(b.needed(il, "ssm_x"), x)
    dt = g.view(parts, (h.dt_rank, n_tokens, n_seqs), parts.nb[1:3])
    nb = (parts.type.row_bytes(h.d_state), *parts.nb[1:3])
    into, out = (g.view(parts, (h.d_state, 1, n_tokens, n_seqs), nb) for _ in range(2))
    if h.norms_steps or b.layer(il, "ssm_dt_norm"):
        dt, into, out = b.norm(dt, il, "ssm_dt_norm"), b.norm(into, il, "ssm_b_norm"), b.norm(out, il, "ssm_c_norm")
    else:
        dt = g.cont(dt)
    dt = b.project(il, "ssm_dt", dt)
    heads = g.reshape(x, 1, h.d_inner, n_tokens, n_seqs)
    states = b.states(il, h.d_state * h.d_inner)

    def scan(cache: Node, ids: Node) -> Node:
        shaped = g.reshape(cache, h.d_state, 1, h.d_inner, b.size.n_seq_max)
        return g.ssm_scan(shaped, heads, dt, b.needed(il, "ssm_a"), into, out, ids)

    both = b.read_states(states, scan)
    b.write_states(states, g.view(both, (h.d_state * h.d_inner * n_seqs,), ()))
    y = g.view(both, (h.d_inner, n_tokens, n_seqs), heads.nb[2:4])
    y = g.add(y, g.mul(x, b.needed(il, "ssm_d")))
    y = b.project(il, "ssm_out", g.glu(g.cont(z), y))
    return g.reshape(y, y.ne[0], b.tokens)


def _mamba2(b: Build, il: int, x: Node) -> Node:
    h, n_seqs = b.hparams, b.batch.n_seqs
    n_tokens, n_head = b.tokens // n_seqs, h.dt_rank
    head = h.d_inner // n_head
    channels = h.d_inner + 2 * h.n_group * h.d_state
    convolved = b.states(il, (h.d_conv - 1) * channels)
    read = b.read_states(convolved)
    all_ = _by_sequence(b, b.project(il, "ssm_in", x))
    row = all_.type.row_bytes
    z = g.view(all_, (head, n_head, n_tokens, n_seqs), (row(head), *all_.nb[1:3]))
    mixed = g.view(all_, (channels, n_tokens, n_seqs), all_.nb[1:3])
    dt = g.view(all_, (n_head, n_tokens, n_seqs), all_.nb[1:3])
    mixed = _convolve(b, convolved, read, g.transpose(mixed), b.needed(il, "ssm_conv1d"))
    mixed = g.unary(g.add(mixed, b.needed(il, "ssm_conv1d", "bias")))
    heads = g.view(mixed, (head, n_head, n_tokens, n_seqs), (row(head), *mixed.nb[1:3]))
    nb = (row(h.d_state), *mixed.nb[1:3])
    into, out = (g.view(mixed, (h.d_state, h.n_group, n_tokens, n_seqs), nb) for _ in range(2))
    dt = g.add(g.cont(dt), b.needed(il, "ssm_dt", "bias"))
    states = b.states(il, h.d_state * h.d_inner)

    def scan(cache: Node, ids: Node) -> Node:
        shaped = g.reshape(cache, h.d_state, head, n_head, cache.ne[1])
        return g.ssm_scan(shaped, heads, dt, b.needed(il, "ssm_a"), into, out, ids, b.n_kept)

    both = b.read_states(states, scan)
    b.write_results(states, both)
    nb = (row(head), row(head * n_head), row(head * n_head * n_tokens))
    y = g.view(both, (head, n_head, n_tokens, n_seqs), nb)
    y = g.add(y, g.mul(heads, b.needed(il, "ssm_d")))
    y = g.glu(g.cont(z), y)
    if b.layer(il, "ssm_norm"):
        y = b.norm(g.reshape(y, h.d_inner // h.n_group, h.n_group, n_tokens, n_seqs), il, "ssm_norm")
    return b.project(il, "ssm_out", g.reshape(y, h.d_inner, b.tokens))


def _short_convolution(b: Build, il: int, x: Node) -> Node:
    n_embd = b.arch.n_embd
    x = _by_sequence(b, x)
    kernel = b.needed(il, "shortconv.conv")
    parts = g.mul_mat(b.needed(il, "shortconv.in_proj"), x)
    first, gate, last = (g.view(parts, (n_embd, *parts.ne[1:3]), parts.nb[1:3]) for _ in range(3))
    states = b.states(il, (kernel.ne[0] - 1) * n_embd)
    read = b.read_states(states)
    y = g.mul(gate, _convolve(b, states, read, g.transpose(g.mul(first, last)), kernel))
    y = g.mul_mat(b.needed(il, "shortconv.out_proj"), y)
    return g.reshape(y, y.ne[0], b.tokens)


def _attention(b: Build, il: int, x: Node, positions: Node | None) -> Node:
    q, k, v = b.qkv(il, x)
    q, k = b.head_norm(q, il, "attn_q_norm"), b.head_norm(k, il, "attn_k_norm")
    if positions:
        factors = b.rope_factors(il)
        q, k = g.rope(q, positions, factors), g.rope(k, positions, factors)
    return b.attend(il, q, k, v)


def _pure(b: Build) -> None:
    x = b.embedding()
    b.recurrent_inputs()
    ids = b.output_ids()
    layer = _mamba2 if b.arch.name == "mamba2" else _mamba
    for il in range(b.last + 1):
        y = layer(b, il, b.norm(x, il, "attn_norm"))
        if il == b.last:
            x, y = g.get_rows(x, ids), g.get_rows(y, ids)
        x = g.add(y, x)
    b.logits(b.norm(x, -1, "output_norm"))


def _hybrid(b: Build) -> None:
    """Layers attend or carry a state, and feed forward after it: granite, jamba, LFM2."""
    x = b.embedding()
    b.recurrent_inputs()
    b.attention_inputs()
    ids = b.output_ids()
    positions = b.positions() if b.hparams.ropes and b.arch.name != "jamba" else None
    carry = {"granitehybrid": _mamba2, "jamba": _mamba}.get(b.arch.name, _short_convolution)
    residual_first = not b.arch.name.startswith("granite")
    scales = b.hparams.scales_residual and not residual_first
    for il in range(b.last + 1):
        residual = x
        x = b.norm(x, il, "attn_norm")
        x = carry(b, il, x) if b.arch.layers[il].is_recurrent else _attention(b, il, x, positions)
        if il == b.last:
            x, residual = g.get_rows(x, ids), g.get_rows(residual, ids)
        if scales:
            x = g.scale(x)
        residual = g.add(residual, x) if residual_first else g.add(x, residual)
        x = b.norm(residual, il, "ffn_norm")
        if b.layer(il, "ffn_gate_inp"):
            routed = b.experts(il, x, normalise=b.arch.name != "jamba")
            shared = b.layer(il, "ffn_up_shexp")
            x = g.add(routed, b.feed_forward(il, x, "_shexp")) if shared else routed
        else:
            x = b.feed_forward(il, x)
        if scales:
            x = g.scale(x)
        x = g.add(residual, x) if residual_first else g.add(x, residual)
    output_norm = "token_embd_norm" if b.weight("token_embd_norm.weight") else "output_norm"
    x = b.norm(x, -1, output_norm)
    if b.embeds and b.arch.name.startswith("lfm2"):  # which are not asked for logits then
        x.is_output = True
        b.graph.expand(x)
        b.pool(x)
    else:
        b.logits(x)


def _falcon_h1(b: Build) -> None:
    """Every layer attends and carries a state, side by side."""
    x = b.embedding()
    positions = b.positions()
    b.recurrent_inputs()
    b.attention_inputs()
    ids = b.output_ids()
    for il in range(b.last + 1):
        attended = _attention(b, il, b.norm(x, il, "attn_norm"), positions)
        carried = _mamba2(b, il, b.norm(x, il, "attn_norm"))
        x = g.add(g.add(attended, carried), x)
        if il == b.last:
            x = g.get_rows(x, ids)
        x = g.add(b.feed_forward(il, b.norm(x, il, "ffn_norm")), x)
    b.logits(b.norm(x, -1, "output_norm"))


def _nemotron_h(b: Build) -> None:
    """Every layer does one of three things: it carries a state, attends, or feeds forward."""
    x = b.embedding()
    b.recurrent_inputs()
    b.attention_inputs()
    ids = b.output_ids()
    for il in range(b.last + 1):
        residual = x
        x = b.norm(x, il, "attn_norm")
        if b.arch.layers[il].is_recurrent:
            x = _mamba2(b, il, x)
        elif b.arch.layers[il].is_attention:
            x = _attention(b, il, x, None)
        elif b.layer(il, "ffn_gate_inp"):
            into, out_of = b.layer(il, "ffn_latent_down"), b.layer(il, "ffn_latent_up")
            latent = g.mul_mat(into, x) if into else x
            routed = b.experts(il, latent, normalise=b.hparams.normalises_experts, squared=True, routed_by=x)
            routed = g.mul_mat(out_of, routed) if out_of else routed
            x = g.add(routed, b.feed_forward(il, x, "_shexp", squared=True))
        else:
            x = b.feed_forward(il, x, squared=True)
        x = g.add(x, residual)
    x = b.norm(x, -1, "output_norm")
    x.is_output = True  # `t_h_nextn`
    b.logits(g.get_rows(x, ids))


def _delta_net(b: Build, il: int, x: Node) -> Node:
    """Linear attention by the gated delta rule, in one operation (`build_layer_attn_linear`)."""
    h, n_seqs = b.hparams, b.batch.n_seqs
    n_tokens, k_heads, v_heads = b.tokens // n_seqs, h.n_group, h.dt_rank
    k_width, v_width = h.d_state, h.d_inner // v_heads
    mixed = _by_sequence(b, b.project(il, "attn_qkv", x))
    z = b.project(il, "attn_gate", x)
    if b.layer(il, "ssm_ba"):
        both = g.mul_mat(b.needed(il, "ssm_ba"), x)
        both = g.reshape(both, 2 * v_heads // k_heads, k_heads, n_tokens, n_seqs)
        beta, alpha = (g.view(both, (v_heads // k_heads, *both.ne[1:]), both.nb[1:]) for _ in range(2))
        beta = g.reshape(g.unary(g.cont(beta)), 1, v_heads, n_tokens, n_seqs)
        alpha = g.cont(alpha, v_heads, n_tokens, n_seqs)
    else:
        beta = g.unary(g.reshape(b.project(il, "ssm_beta", x), 1, v_heads, n_tokens, n_seqs))
        alpha = g.reshape(b.project(il, "ssm_alpha", x), v_heads, n_tokens, n_seqs)
    gate = g.mul(g.unary(g.add(alpha, b.needed(il, "ssm_dt", "bias"))), b.needed(il, "ssm_a"))
    gate = g.reshape(gate, 1, v_heads, n_tokens, n_seqs)
    kernel = b.needed(il, "ssm_conv1d")
    convolved = b.states(il, (kernel.ne[0] - 1) * kernel.ne[1])
    read = b.read_states(convolved)
    rows = g.concat(g.reshape(read, kernel.ne[0] - 1, kernel.ne[1], n_seqs), g.transpose(mixed))
    for _ in range(b.n_kept):
        b.write_states(convolved, g.view(rows, (kernel.ne[0] - 1, kernel.ne[1], n_seqs), rows.nb[1:3]))
    states = b.states(il, v_width * v_width * v_heads)
    state = g.reshape(b.read_states(states), v_width, v_width, v_heads, n_seqs)
    mixed = g.unary(g.ssm_conv(rows, kernel))
    row = mixed.type.row_bytes
    after = (row(mixed.ne[0]), row(mixed.ne[0]) * n_tokens)
    q, k = (g.view(mixed, (k_width, k_heads, n_tokens, n_seqs), (row(k_width), *after)) for _ in range(2))
    v = g.view(mixed, (v_width, v_heads, n_tokens, n_seqs), (row(v_width), *after))
    q, k = g.like("L2_NORM", q), g.like("L2_NORM", k)
    if k_heads != v_heads and b.arch.name == "qwen3next":
        q, k = (_repeated(y, v_heads // k_heads) for y in (q, k))
    both = g.gated_delta_net(q, k, v, gate, beta, state, b.n_kept)
    nb = (row(v_width), row(v_width * v_heads), row(v_width * v_heads * n_tokens))
    y = g.view(both, (v_width, v_heads, n_tokens, n_seqs), nb)
    b.write_results(states, both)
    z = g.reshape(z, v_width, v_heads, n_tokens, n_seqs)
    y = g.mul(b.norm(y, il, "ssm_norm"), g.unary(z))
    y = b.project(il, "ssm_out", g.reshape(y, v_width * v_heads, n_tokens, n_seqs))
    return g.reshape(y, b.arch.n_embd, b.tokens)


def _repeated(x: Node, times: int) -> Node:
    width, heads, n_tokens, n_seqs = x.ne
    each = g.repeat(g.reshape(x, width, 1, heads, n_tokens * n_seqs), width, times, heads, n_tokens * n_seqs)
    return g.reshape(each, width, heads * times, n_tokens, n_seqs)


def _gated_attention(b: Build, il: int, x: Node, positions: Node) -> Node:
    """One matrix makes queries and a gate for what attention returns."""
    kind, t = b.arch.layers[il], b.tokens
    both, k, v = b.qkv(il, x, by_head=False)
    if b.arch.name == "qwen3next":
        both = g.reshape(both, 2 * kind.head_k, kind.n_head, t)
    step = both.type.row_bytes(2 * kind.head_k)
    q, gate = (g.view(both, (kind.head_k, kind.n_head, t), (step, step * kind.n_head)) for _ in range(2))
    k = g.reshape(k, kind.head_k, k.ne[0] // kind.head_k, t)
    v = g.reshape(v, kind.head_v, v.ne[0] // kind.head_v, t)
    q = g.rope(b.norm(q, il, "attn_q_norm"), positions)
    k = g.rope(b.norm(k, il, "attn_k_norm"), positions)
    y = b.attended(il, q, k, v)
    return b.project(il, "attn_output", g.mul(y, g.unary(g.cont(gate, kind.head_k * kind.n_head, t))))


def _qwen3next(b: Build) -> None:
    x = b.embedding()
    b.recurrent_inputs()
    b.attention_inputs()
    positions = b.positions()
    ids = b.output_ids()
    for il in range(b.last + 1):
        residual = x
        x = b.graph.expand(b.norm(x, il, "attn_norm"))
        x = _delta_net(b, il, x) if b.arch.layers[il].is_recurrent else _gated_attention(b, il, x, positions)
        residual = g.add(x, residual)
        x = b.norm(residual, il, "post_attention_norm")
        if b.layer(il, "ffn_gate_inp"):
            y = b.experts(il, x)
            if b.layer(il, "ffn_up_shexp"):
                shared = b.feed_forward(il, x, "_shexp")
                y = g.add(y, g.mul(shared, g.unary(g.mul_mat(b.needed(il, "ffn_gate_inp_shexp"), x))))
        else:
            y = b.feed_forward(il, x)
        x = g.add(y, residual)
    x = b.norm(x, -1, "output_norm")
    x.is_output = True  # `t_h_nextn`
    b.logits(g.get_rows(x, ids))


RECURRENT: dict[str, Template] = {
    "mamba": _pure,
    "hybrid": _hybrid,
    "falcon-h1": _falcon_h1,
    "nemotron_h": _nemotron_h,
    "qwen3next": _qwen3next,
}
