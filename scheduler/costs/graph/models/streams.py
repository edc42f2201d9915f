"""Several residual streams: a block reads a weighted sum of them, and its result is spread over all of them again."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.costs.ggml_types import F32
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build
from scheduler.costs.graph.nodes import Node

FUSES_BELOW_SEQUENCES = 32
"""From here on llama.cpp's trial of its fused sums may see the last one of a layer run where the next layer lies."""


def joined(a: Node, b: Node, axis: int) -> Node:
    """`a` with `b` after it in one dimension."""
    ne = list(a.ne)
    ne[axis] += b.ne[axis]
    return Node("CONCAT", ne, a.type, (a, b))


def spread(b: Build, x: Node) -> Node:
    """The embedding, once per stream."""
    n, count = b.arch.n_embd, b.arch.residual_streams
    return g.repeat(g.reshape(x, n, 1, b.tokens), n, count, b.tokens)


def stream_mixes(x: Node, matrix: Node) -> Node:
    """Numbers by token that say how to mix the streams."""
    return g.mul_mat(matrix, g.like("RMS_NORM", g.reshape(x, x.ne[0] * x.ne[1], x.ne[2])))


def stream_shares(mixes: Node, factor: Node, base: Node) -> Node:
    """What each stream weighs."""
    return g.scale(g.unary(g.add(g.mul(mixes, factor), base)))


def both_shares(mixes: Node, factors: Node, bases: Node, count: int) -> tuple[Node, Node]:
    """What each stream weighs when it is read, and when it is written to."""

    def part() -> Node:
        mix = g.view(mixes, (count, mixes.ne[1]), (mixes.nb[1],))
        return stream_shares(mix, g.view(factors, (1,), ()), g.view(bases, (count,), ()))

    return part(), part()


def one_stream(x: Node) -> Node:
    """One stream of all tokens."""
    return g.view(x, (x.ne[0], x.ne[2]), (x.nb[2],))


def one_share(shares: Node) -> Node:
    """What one stream weighs."""
    return g.view(shares, (1, shares.ne[1]), (shares.nb[1],))


def weighted_sum(x: Node, shares: Node) -> Node:
    """The weighted sum of all streams, step by step."""
    total = g.mul(one_stream(x), one_share(shares))
    for _ in range(x.ne[1] - 1):
        total = g.add(total, g.mul(one_stream(x), one_share(shares)))
    return total


@dataclass(frozen=True, slots=True)
class Mixed:
    """What a block reads, and how its result gets back to the streams."""

    read: Node
    shares: Node
    across: Node
    """How much of each stream goes over to each other."""


def mix(b: Build, il: int, block: str, x: Node) -> Mixed:
    """What the attention or feed-forward `block` of a layer reads of the streams `x`."""
    matrix, factors, bases = (b.needed(il, f"hc_{block}_{part}") for part in ("fn", "scale", "base"))
    n, count, tokens, _ = x.ne
    mixes = stream_mixes(x, matrix)
    read, written = both_shares(mixes, factors, bases, count)
    across = Node("DSV4_HC_COMB", (count, count, tokens), F32, (mixes, factors, bases))
    return Mixed(Node("DSV4_HC_PRE", (n, tokens), F32, (x, read)), written, across)


def returned(b: Build, x: Node, streams: Node, mixed: Mixed, *, fuses: bool) -> Node:
    """The streams after a block whose result is `x`, by one operation or by many."""
    if fuses:
        return Node("DSV4_HC_POST", streams.ne, F32, (x, streams, mixed.shares, mixed.across))
    width, count, tokens, _ = streams.ne

    def written() -> Node:
        total = g.mul(x, one_share(mixed.shares))
        for _ in range(count):
            share = g.view(mixed.across, (1, tokens), (mixed.across.nb[2],))
            total = g.add(total, g.mul(one_stream(streams), share))
        return g.reshape(total, width, 1, tokens)

    out = written()
    for _ in range(count - 1):
        out = joined(out, written(), 1)
    return out
