"""Attention to the cells that an indexer has chosen for each token."""

from __future__ import annotations

from scheduler.costs.ggml_types import F32, GgmlType
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build
from scheduler.costs.graph.nodes import I32, Node, Undrawable

INDEX_WIDTH = 128
_HEADS = (32, 64)
"""What CUDA has kernels for; an indexer of another shape would be run on the host."""


def check_indexer(heads: int, width: int) -> None:
    """Raises Undrawable for an indexer without kernels."""
    if width != INDEX_WIDTH or heads not in _HEADS:
        raise Undrawable(f"{heads} heads of {width} elements are no usual indexer")


def choose(b: Build, q: Node, keys: Node, weights: Node, mask: Node) -> Node:
    """The cells that an indexer ranks highest for each token; its `weights` are those of its heads."""
    width, heads, per, streams = q.ne
    check_indexer(heads, width)
    scores = Node("LIGHTNING_INDEXER", (keys.ne[2], per, 1, streams), F32, (q, keys, weights, mask))
    best = min(b.hparams.index_top_k, scores.ne[0])
    return g.cont(Node("TOP_K", (best, *scores.ne[1:]), I32, (scores,)))


def by_stream(q: Node, weights: Node, streams: int) -> tuple[Node, Node]:
    """An indexer's queries and weights with the tokens of each sequence apart."""
    width, heads, tokens, _ = q.ne
    per = tokens // streams
    q = g.view(q, (width, heads, per, streams), (q.nb[1], q.nb[2], q.nb[3] // streams))
    nb = (weights.nb[1], weights.nb[2] // streams, weights.nb[3] // streams)
    return q, g.view(weights, (heads, per, 1, streams), nb)


def narrowed(mask: Node, chosen: Node, of: GgmlType) -> Node:
    """`mask` where all but the chosen cells are hidden as well; `of`: the type of what shows them."""
    cells, per, _, streams = mask.ne
    hidden = g.like("FILL", mask)
    rows = g.view(hidden, (1, cells, per, streams), hidden.nb[:3])
    ids = g.view(chosen, (chosen.ne[0], per, streams), (chosen.nb[1], chosen.nb[2]))
    shown = g.set_rows(rows, g.like("FILL", Node("NONE", (1, *ids.ne[:3]), of)), ids)
    return g.add(g.view(shown, mask.ne, (shown.nb[2], shown.nb[3], shown.nb[3])), mask)
