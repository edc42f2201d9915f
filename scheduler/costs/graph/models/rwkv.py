"""RWKV 6 and 7, and hybrids of their time mixing with other feed-forward blocks."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.costs.ggml_types import F32
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.nodes import Node, Undrawable

_BLENDS = 5
"""Version 6 blends every token with the one before it in so many ways: for decay, key, value, receptance and gate."""


def _demand(b: Build, ends: Sequence[str], norms: Sequence[str], kinds: Sequence[str]) -> None:
    """Refuse a model without an output matrix of its own, or without a norm: at the `ends`, or in every layer."""
    for name in ("output.weight", *(f"{end}.{kind}" for end in ends for kind in kinds)):
        if not b.weight(name):
            raise Undrawable(f"there is no {name}")
    for il in range(b.last + 1):
        for norm in norms:
            for kind in kinds:
                b.needed(il, norm, kind)


def _difference(a: Node, b: Node) -> Node:
    return g.like("SUB", a, b)


def _append(a: Node, b: Node) -> Node:
    """Tokens of `a` with those of `b` after them, in every sequence."""
    return Node("CONCAT", (a.ne[0], a.ne[1] + b.ne[1], *a.ne[2:]), a.type, (a, b))


def _some_tokens(x: Node, n: int) -> Node:
    return g.view(x, (x.ne[0], n, x.ne[2]), x.nb[1:3])


def _one_before(newest: Node, x: Node) -> Node:
    """What comes before each token of `x`; before the first, the `newest` of the last batch."""
    return _append(newest, _some_tokens(x, x.ne[1] - 1))


def _as_row(x: Node, n: int) -> Node:
    return g.view(x, (n,), ())


def _by_sequence(b: Build, x: Node) -> Node:
    return g.reshape(x, x.ne[0], b.tokens // b.batch.n_seqs, b.batch.n_seqs)


def _by_head(b: Build, x: Node) -> Node:
    head = b.arch.state_s // b.arch.n_embd
    return g.reshape(x, head, b.arch.n_embd // head, b.tokens)


def _flat(b: Build, x: Node) -> Node:
    return g.reshape(x, b.arch.n_embd, b.tokens)


def _read_newest(b: Build, il: int, n: int) -> tuple[Node, Node]:
    """The cache of the `n` activations that a layer keeps of each sequence's newest token, and what it holds."""
    if b.arch.state_r != n * b.arch.n_embd:
        raise Undrawable(f"{b.arch.name} keeps {n} activations of the newest token")
    cache = b.states(il, b.arch.state_r)
    return cache, g.reshape(b.read_states(cache), b.arch.n_embd, n, b.batch.n_seqs)


def _write_newest(b: Build, cache: Node, newest: Node) -> None:
    b.write_states(cache, _as_row(newest, b.arch.state_r * b.batch.n_seqs))


def _fused(b: Build, il: int, n: int) -> Node:
    """The weights of `n` blends as one."""
    fused = b.needed(il, "time_mix_lerp_fused")
    if fused.ne[3] != n:
        raise Undrawable(f"blk.{il}.time_mix_lerp_fused blends in {fused.ne[3]} ways, not in {n}")
    return fused


def _blended(b: Build, x: Node, n: int) -> list[Node]:
    """The results of `n` blends, which lie behind each other."""
    return [g.view(x, (b.arch.n_embd, b.tokens), x.nb[1:2]) for _ in range(n)]


def _carry(b: Build, il: int, op: str, *operands: Node) -> Node:
    """Run `op` over the batch: it returns results of all tokens, and after them the new states, which are stored."""
    n_embd, n_seqs = b.arch.n_embd, b.batch.n_seqs
    states = b.states(il, b.arch.state_s)
    read = b.read_states(states)
    both = Node(op, (n_embd, b.tokens + b.arch.state_s // n_embd * n_seqs), F32, (*operands, read))
    b.write_states(states, _as_row(both, b.arch.state_s * n_seqs))
    return _as_row(both, n_embd * b.tokens)


def _norm_of_heads(b: Build, il: int, x: Node) -> Node:
    x = _flat(b, g.like("NORM", _by_head(b, x)))
    return g.add(g.mul(x, b.needed(il, "time_mix_ln")), b.needed(il, "time_mix_ln", "bias"))


def _low_rank(b: Build, il: int, name: str, x: Node, *, bends: bool = False) -> Node:
    """`x` times two small matrices, with an activation between them or none."""
    inner = g.mul_mat(b.needed(il, f"{name}1"), x)
    return g.mul_mat(b.needed(il, f"{name}2"), g.unary(inner) if bends else inner)


def _matrix(b: Build, il: int, name: str, x: Node) -> Node:
    return b.project(il, name, x, scaled=False)


# ---------------------------------------------------------------------- version 7


def _mix_7(b: Build, il: int, x: Node, before: Node, first: Node | None) -> tuple[Node, Node]:
    """The time mixing of version 7; `first` are the values of the first layer, which are returned, too."""
    strict = b.arch.name == "rwkv7"
    gates = strict or bool(b.layer(il, "time_mix_g1") and b.layer(il, "time_mix_g2"))
    n = 6 if gates else 5
    moved = g.repeat(_difference(before, x), *x.ne[:3], n)
    xr, xw, xk, xv, xa, *xg = _blended(b, g.add(g.mul(moved, _fused(b, il, n)), x), n)
    r = _matrix(b, il, "time_mix_receptance", xr)
    w = g.add(_low_rank(b, il, "time_mix_w", xw, bends=True), b.needed(il, "time_mix_w0"))
    w = g.unary(g.scale(g.unary(w)))
    k, v = _matrix(b, il, "time_mix_key", xk), _matrix(b, il, "time_mix_value", xv)
    if first is None:
        first = v
    else:
        share = g.unary(g.add(_low_rank(b, il, "time_mix_v", xv), b.needed(il, "time_mix_v0")))
        v = g.add(v, g.mul(_difference(first, v), share))
    a = g.unary(g.add(_low_rank(b, il, "time_mix_a", xa), b.needed(il, "time_mix_a0")))
    kk = g.like("L2_NORM", _by_head(b, g.mul(k, b.needed(il, "time_mix_k_k"))))
    ka = g.mul(k, b.needed(il, "time_mix_k_a"))
    k = g.add(k, _difference(g.mul(a, ka), ka))
    r, w, k, v, a = (_by_head(b, y) for y in (r, w, k, v, a))
    y = _carry(b, il, "RWKV_WKV7", r, w, k, v, g.unary(kk), g.mul(kk, a))
    normed = strict or b.layer(il, "time_mix_ln")
    y = _norm_of_heads(b, il, y) if normed else _flat(b, y)
    rk = g.reshape(b.needed(il, "time_mix_r_k"), *k.ne[:2])
    y = g.add(y, _flat(b, g.mul(v, g.sum_rows(g.mul(g.mul(k, r), rk)))))
    if gates:
        y = g.mul(y, _low_rank(b, il, "time_mix_g", xg[0], bends=True))
    return _by_sequence(b, _matrix(b, il, "time_mix_output", y)), first


# ---------------------------------------------------------------------- version 6


def _blends_6(b: Build, il: int, x: Node, before: Node) -> list[Node]:
    """Blends whose shares depend on the token; old files have a weight for each where newer ones have one for all."""
    moved, x = _flat(b, _difference(before, x)), _flat(b, x)
    into, out_of = b.needed(il, "time_mix_w1"), b.needed(il, "time_mix_w2")
    y = g.add(g.mul(moved, b.needed(il, "time_mix_lerp_x")), x)
    y = g.reshape(g.unary(g.mul_mat(into, y)), into.ne[1] // _BLENDS, 1, _BLENDS, b.tokens)
    y = g.cont(g.permute(y, 0, 1, 3, 2))
    y = g.mul_mat(g.reshape(out_of, *out_of.ne[:2], 1, _BLENDS), y)
    if b.layer(il, "time_mix_lerp_fused"):
        moved, x = (g.reshape(z, b.arch.n_embd, 1, b.tokens) for z in (moved, x))
        return _blended(b, g.add(g.mul(g.add(y, _fused(b, il, _BLENDS)), moved), x), _BLENDS)
    weights = [b.needed(il, f"time_mix_lerp_{name}") for name in "wkvrg"]
    parts = zip(_blended(b, y, _BLENDS), weights, strict=True)
    return [g.add(g.mul(g.add(part, weight), moved), x) for part, weight in parts]


def _all_heads(b: Build, x: Node) -> Node:
    """Keys or values by head, those that several heads share once for each."""
    head = b.arch.state_s // b.arch.n_embd
    n_head, n_kv = b.arch.n_embd // head, x.ne[0] // head
    if n_kv < n_head:
        x = g.repeat(g.reshape(x, head, 1, n_kv, b.tokens), head, n_head // n_kv, n_kv, b.tokens)
    return _by_head(b, x)


def _mix_6(b: Build, il: int, x: Node, before: Node) -> Node:
    """The time mixing of version 6, or gated linear attention in its place where there is no `time_mix_first`."""
    xw, xk, xv, xr, xg = _blends_6(b, il, x, before)
    r = _by_head(b, _matrix(b, il, "time_mix_receptance", xr))
    k = _all_heads(b, _matrix(b, il, "time_mix_key", xk))
    v = _all_heads(b, _matrix(b, il, "time_mix_value", xv))
    gate = g.unary(_matrix(b, il, "time_mix_gate", xg))
    w = g.add(_low_rank(b, il, "time_mix_decay_w", xw, bends=True), b.needed(il, "time_mix_decay"))
    w = _by_head(b, g.unary(g.unary(g.unary(w))))
    if b.arch.name == "rwkv6" or b.layer(il, "time_mix_first"):
        y = _carry(b, il, "RWKV_WKV6", k, v, r, b.needed(il, "time_mix_first"), w)
        y = _norm_of_heads(b, il, y)
    else:
        k = _difference(k, g.mul(k, w))
        y = _flat(b, _carry(b, il, "GATED_LINEAR_ATTN", k, v, r, w))
    return _by_sequence(b, _matrix(b, il, "time_mix_output", g.mul(y, gate)))


# ---------------------------------------------------------------------- whole models


def _mix_channels(b: Build, il: int, x: Node, before: Node) -> Node:
    """The feed-forward block, which sees the token before as well; only version 6 has a gate."""
    moved = _difference(before, x)
    xk = g.add(g.mul(moved, b.needed(il, "channel_mix_lerp_k")), x)
    k = g.like("SQR", g.unary(_matrix(b, il, "channel_mix_key", xk)))
    if b.arch.name == "rwkv7":
        return _matrix(b, il, "channel_mix_value", k)
    xr = g.add(g.mul(moved, b.needed(il, "channel_mix_lerp_r")), x)
    r = g.unary(_matrix(b, il, "channel_mix_receptance", xr))
    return g.mul(r, _matrix(b, il, "channel_mix_value", k))


def _mix(b: Build, il: int, x: Node, before: Node, first: Node | None) -> tuple[Node, Node | None]:
    return _mix_7(b, il, x, before, first) if b.arch.name.endswith("7") else (_mix_6(b, il, x, before), None)


def _pure(b: Build) -> None:
    """Both blocks of a layer keep the newest token."""
    n_embd, every = b.arch.n_embd, b.hparams.halves_every
    _demand(b, ("token_embd_norm", "output_norm"), ("attn_norm", "attn_norm_2"), ("weight", "bias"))
    x = b.embedding_norm(b.embedding())
    b.recurrent_inputs()
    ids = b.output_ids()
    first: Node | None = None
    for il in range(b.last + 1):
        x = _by_sequence(b, x)
        cache, newest = _read_newest(b, il, 2)
        for_time, for_channels = (g.view(newest, (n_embd, 1, b.batch.n_seqs), newest.nb[1:3]) for _ in range(2))
        timed = b.norm(x, il, "attn_norm", rms=False)
        y, first = _mix(b, il, timed, _one_before(for_time, timed), first)
        x = g.add(y, x)
        channels = b.norm(x, il, "attn_norm_2", rms=False)
        before = _one_before(for_channels, channels)
        _write_newest(b, cache, _append(_some_tokens(timed, 1), _some_tokens(channels, 1)))
        x, channels, before = (_flat(b, y) for y in (x, channels, before))
        if il == b.last:
            x, channels, before = (g.get_rows(y, ids) for y in (x, channels, before))
        x = g.add(_mix_channels(b, il, channels, before), x)
        if b.arch.name == "rwkv6" and every and (il + 1) % every == 0:
            x = g.scale(x)
    b.logits(b.norm(x, -1, "output_norm", rms=False))


def _hybrid(b: Build) -> None:
    """Time mixing in the place of attention, and the usual feed-forward block."""
    _demand(b, ("output_norm",), ("attn_norm", "ffn_norm"), ("weight",))
    x = b.embedding()
    b.recurrent_inputs()
    ids = b.output_ids()
    first: Node | None = None
    for il in range(b.last + 1):
        x = _by_sequence(b, x)
        cache, newest = _read_newest(b, il, 1)
        normed = b.norm(x, il, "attn_norm")
        y, first = _mix(b, il, normed, _one_before(newest, normed), first)
        _write_newest(b, cache, _some_tokens(normed, 1))
        x = _flat(b, g.add(y, x))
        if il == b.last:
            x = g.get_rows(x, ids)
        x = g.add(b.feed_forward(il, b.norm(x, il, "ffn_norm")), x)
    b.logits(b.norm(x, -1, "output_norm"))


RWKV: dict[str, Template] = {"rwkv": _pure, "rwkv-hybrid": _hybrid}
