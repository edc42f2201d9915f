"""Attention over caches of keys and values, or over the batch alone. After src/llama-graph.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from scheduler.costs.ggml_types import F16, F32, GgmlType
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.drawing import Drawing
from scheduler.costs.graph.nodes import I64, Node, Undrawable


@dataclass(slots=True)
class _Cache:
    """Inputs of attention over one kind of cache, and the cells it has per stream."""

    cells: int
    k_ids: Node
    v_ids: Node
    mask: Node
    k_rotation: Node | None
    v_rotation: Node | None


class Attention(Drawing):
    """A graph whose layers attend."""

    @cached_property
    def _caches(self) -> dict[bool, _Cache]:
        """By whether layers see a window."""
        return {}

    @cached_property
    def _masks(self) -> dict[bool, Node]:
        """The same within the batch."""
        return {}

    @cached_property
    def _seen(self) -> dict[int, Callable[[], tuple[Node, Node]]]:
        """All that a layer has stored, for others that borrow it."""
        return {}

    def batch_masks(self) -> None:
        """Who sees whom within the batch, for attention without a cache."""
        of = F16 if self.flash else F32
        self._masks = {is_swa: g.fresh_input((self.tokens, self.tokens), of) for is_swa in (False, True)}

    def attend_batch(self, il: int, q: Node, k: Node, v: Node) -> Node:
        """Attend to the tokens of the batch, project the result."""
        return self.project(il, "attn_output", self.attend_to(q, k, v, self._masks[self.arch.layers[il].is_swa]))

    def attend_to(
        self, q: Node, k: Node, v: Node, mask: Node, bias: Node | None = None, sinks: Node | None = None
    ) -> Node:
        """Attend to what is not stored, and may have a bias added to its scores; the result is not projected."""
        for node in (q, k, v):
            self.graph.expand(node)
        return self._attend(q, k, v, mask, sinks, False, bias=bias)

    def slides(self, il: int) -> bool:
        """Whether layer `il` sees a window only, or no layer does."""
        return self.arch.layers[il].is_swa or True not in self._caches

    def attention_inputs(self) -> None:
        """Inputs for every kind of cache that the model has."""
        kinds = {layer.is_swa for layer in self.arch.layers if layer.is_attention}
        for is_swa in sorted(kinds):
            self._caches[is_swa] = self._cache(is_swa)

    def _cache(self, is_swa: bool) -> _Cache:
        streams, arch = self.size.n_stream, self.arch
        cells = self.size.n_swa_cells if is_swa else self.size.n_ctx_seq
        head_k = next(kind.head_k for kind in arch.layers if kind.is_attention and kind.is_swa is is_swa)
        streams = 1 if streams == 1 else self.batch.n_seqs
        return _Cache(
            cells=cells,
            k_ids=g.fresh_input((self.tokens,), I64),
            v_ids=g.fresh_input((self.tokens * (1 if self.flash else arch.v_width_max),), I64),
            mask=g.fresh_input((cells, self.tokens // streams, 1, streams), F16 if self.flash else F32),
            k_rotation=self._rotation(self._type_k, arch.layers[0].head_k, max(head_k & -head_k, 64)),
            v_rotation=self._rotation(self._type_v, arch.layers[0].head_v, 64),
        )

    def _rotation(self, of: GgmlType, head: int, n: int) -> Node | None:
        """What quantised rows are turned by; whether they are is asked of the first layer's heads, for all layers.

        `build_inp_mem_hybrid_iswa` leaves it out: windows beside layers that carry a state.
        """
        layers = self.arch.layers
        hybrid = any(layer.is_recurrent for layer in layers) and any(layer.is_swa for layer in layers)
        turned = of.is_quantized and head % 64 == 0 and not self.arch.mla and not hybrid
        return g.fresh_input((n, n)) if turned else None

    def qkv(self, il: int, x: Node, *, by_head: bool = True) -> tuple[Node, Node, Node]:
        """Queries, keys and values by head (or as rows of all heads), from one matrix or three (`build_qkv`)."""
        kind = self.arch.layers[il]
        head_q, head_v, t = kind.head_k, kind.head_v, self.tokens
        if self.layer(il, "attn_qkv"):
            if not by_head or self.layer(il, "attn_q", "bias"):
                raise Undrawable(f"blk.{il}.attn_qkv is one matrix where three were expected")
            qkv = self.project(il, "attn_qkv", x)
            n_kv = (qkv.ne[0] - kind.n_head * head_q) // (head_q + head_v)
            nb = (qkv.type.row_bytes(head_q), qkv.nb[1])
            q = g.view(qkv, (head_q, kind.n_head, t), nb)
            k = g.view(qkv, (head_q, n_kv, t), nb)
            return q, k, g.view(qkv, (head_v, n_kv, t), (qkv.type.row_bytes(head_v), qkv.nb[1]))
        q, k, v = (self.project(il, stem, x) for stem in ("attn_q", "attn_k", "attn_v"))
        if not by_head:
            return q, k, v
        n_kv = k.ne[0] // head_q
        return g.reshape(q, head_q, kind.n_head, t), g.reshape(k, head_q, n_kv, t), g.reshape(v, head_v, n_kv, t)

    def attend(self, il: int, q: Node, k: Node, v: Node, *, sinks: Node | None = None, caps: bool = False) -> Node:
        """Store keys and values, attend to all that is stored, project the result (`build_attn`)."""
        return self.project(il, "attn_output", self.attended(il, q, k, v, sinks=sinks, caps=caps))

    def attended(
        self,
        il: int,
        q: Node,
        k: Node,
        v: Node,
        *,
        sinks: Node | None = None,
        caps: bool = False,
        bias: Node | None = None,
        by: Callable[[Node, Node, Node, Node], Node] | None = None,
        narrow: Callable[[Node], Node] | None = None,
    ) -> Node:
        """The same before the projection; `bias` is added to the scores.

        `by`: what attends, if not `build_attn_mha`, given queries, all keys, all values and the mask. `narrow` makes
        the mask of the layer from that of the cache.
        """
        kind = self.arch.layers[il]
        cache = self._caches[kind.is_swa]
        expand = self.graph.expand
        if cache.k_rotation:
            q, k = g.hadamard(q, cache.k_rotation), g.hadamard(k, cache.k_rotation)
        if cache.v_rotation:
            v = g.hadamard(v, cache.v_rotation)
        with_swa = len(self._caches) > 1 or kind.is_swa
        for node in (q, k, v) if with_swa or by else (q, v, k):
            expand(node)
        stored_k, stored_v = self._stored(il, cache, k, v)
        if by:
            result = by(q, stored_k, stored_v, cache.mask)
        else:
            mask = narrow(cache.mask) if narrow else cache.mask
            result = self._attend(q, stored_k, stored_v, mask, sinks, caps, bias=bias)
        return g.hadamard(result, cache.v_rotation) if cache.v_rotation else result

    def attend_borrowed(self, il: int, q: Node) -> Node:
        """Attend to what an earlier layer has stored."""
        cache = self._caches[self.arch.layers[il].is_swa]
        if cache.k_rotation:
            q = g.hadamard(q, cache.k_rotation)
        self.graph.expand(q)
        result = self._attend(q, *self._seen[self.arch.kv_source(il)](), cache.mask, None, False)
        return self.project(il, "attn_output", g.hadamard(result, cache.v_rotation) if cache.v_rotation else result)

    def attend_latent(self, il: int, q: Node, k: Node, v: Node) -> Node:
        """The same where the values are the front of the keys, and are expanded by `attn_v_b` afterwards."""
        return self.project(il, "attn_output", self.attended_latent(il, q, k, v))

    def attended_latent(
        self,
        il: int,
        q: Node,
        k: Node,
        v: Node,
        narrow: Callable[[Node], Node] | None = None,
        sinks: Node | None = None,
        by: Callable[[Node, Node], Node] | None = None,
    ) -> Node:
        """The same before the projection. `narrow` makes the mask of the layer from that of the cache.

        `by`: what attends, if not `build_attn_mha`, given all keys and the mask.
        """
        kind = self.arch.layers[il]
        cache = self._caches[kind.is_swa]
        for node in (q, v, k):
            self.graph.expand(node)
        stored = self._store(il, k, kind.k_width, self._type_k, cache.cells, cache.k_ids)
        keys = self._keys(stored, k)
        if by:
            return by(keys, cache.mask)
        values = g.view(keys, (v.ne[0], *keys.ne[1:]), keys.nb[1:])
        mask = narrow(cache.mask) if narrow else cache.mask
        return self._attend(q, keys, values, mask, sinks, False, self.layer(il, "attn_v_b"))

    def index(self, il: int, k: Node, ids: Node, cells: int = 0) -> Node:
        """Store an indexer's keys in the second cache of layer `il`; a view of all that it holds.

        `cells`: how many a sequence has, if not as many as its context.
        """
        return self._keys(self._store(il, k, k.ne[0] * k.ne[1], self._type_k, cells or self.size.n_ctx_seq, ids), k)

    def key_rotation(self, head: int) -> Node | None:
        """What keys of `head` elements are turned by before they are stored, if they are."""
        return self._rotation(self._type_k, self.arch.layers[0].head_k, max(head & -head, 64))

    def _keys(self, stored: Node, k: Node) -> Node:
        """All that a cache of keys such as `k` holds, by head."""
        width, cells = stored.ne[:2]
        used = 1 if self.size.n_stream == 1 else self.batch.n_seqs
        row = self._type_k.row_bytes
        return g.view(stored, (k.ne[0], k.ne[1], cells, used), (row(k.ne[0]), row(width), row(width * cells)))

    def _store(self, il: int, rows: Node, width: int, of: GgmlType, cells: int, ids: Node) -> Node:
        """Write rows of all heads to a cache of layer `il`, which is returned."""
        streams = self.size.n_stream
        cache = g.stored((width, cells, streams), of, self._places[il], weight=False)
        flat = g.view(rows, (width, rows.ne[2]), (rows.nb[2],))
        self.graph.expand(g.set_rows(g.reshape(cache, width, cells * streams) if streams > 1 else cache, flat, ids))
        return cache

    def _stored(self, il: int, cache: _Cache, k: Node, v: Node) -> tuple[Node, Node]:
        """Write to the cache of layer `il`; views of all that it holds."""
        kind, streams, cells = self.arch.layers[il], self.size.n_stream, cache.cells
        head_k, n_kv, head_v = k.ne[0], k.ne[1], v.ne[0]
        k_width, v_width = kind.k_width, kind.v_width
        all_v = v_width if self.flash else self.arch.v_width_max
        k_cache = self._store(il, k, k_width, self._type_k, cells, cache.k_ids)
        if self.flash:
            v_cache = self._store(il, v, v_width, self._type_v, cells, cache.v_ids)
        else:
            v_cache = g.stored((all_v, cells, streams), self._type_v, self._places[il], weight=False)
            flat = v.type.row_bytes(v_width) == v.nb[2]
            rows = g.reshape(v, v_width, self.tokens) if flat else g.cont(v, v_width, self.tokens)
            if v_width < all_v:
                rows = Node("PAD", (all_v, self.tokens), F32, (rows,))
            into = g.reshape(v_cache, 1, all_v * cells * streams)
            self.graph.expand(g.set_rows(into, g.reshape(rows, 1, all_v * self.tokens), cache.v_ids))
        used = 1 if streams == 1 else self.batch.n_seqs

        def seen() -> tuple[Node, Node]:
            row = self._type_k.row_bytes
            seen_k = g.view(k_cache, (head_k, n_kv, cells, used), (row(head_k), row(k_width), row(k_width * cells)))
            row = self._type_v.row_bytes
            if self.flash:
                nb = (row(head_v), row(all_v), row(all_v * cells))
                return seen_k, g.view(v_cache, (head_v, n_kv, cells, used), nb)
            nb = (row(cells * head_v), row(cells), row(cells * all_v))
            return seen_k, g.view(v_cache, (cells, n_kv, head_v, used), nb)

        self._seen[il] = seen
        return seen()

    def _attend(
        self,
        q: Node,
        k: Node,
        v: Node,
        mask: Node,
        sinks: Node | None,
        caps: bool,
        expands_by: Node | None = None,
        bias: Node | None = None,
    ) -> Node:
        """`build_attn_mha`; `expands_by` turns latent values into those of each head, `bias` is added to the scores."""
        transposed = v.nb[1] > v.nb[2]
        streams = k.ne[3]
        per = q.ne[2] // streams
        q = g.view(q, (q.ne[0], q.ne[1], per, streams), (q.nb[1], q.nb[2], q.nb[2] * per))
        q, k, v = (g.permute(x, 0, 2, 1, 3) for x in (q, k, v))
        extra = [sinks] if sinks else []
        if self.flash and not bias:
            v = g.transpose(v) if transposed else v
            k, v = (g.cast(x, F16) if x.type is F32 else x for x in (k, v))
            out = g.flash_attn_ext(q, k, v, mask, *extra)
            if expands_by:
                out = g.cont(g.permute(g.mul_mat(expands_by, g.permute(out, 0, 2, 1, 3)), 0, 2, 1, 3))
            return self.graph.expand(g.reshape(out, out.ne[0] * out.ne[1], out.ne[2] * out.ne[3]))
        scores = g.mul_mat(k, q)
        if caps:
            scores = g.scale(g.unary(g.scale(scores)))
        scores = g.add(scores, bias) if bias else scores
        scores = g.soft_max(scores, mask, *extra)
        if not transposed:
            v = g.cont(g.transpose(v))
        out = g.mul_mat(v, scores)
        out = g.permute(g.mul_mat(expands_by, out) if expands_by else out, 0, 2, 1, 3)
        return self.graph.expand(g.cont(out, out.ne[0] * out.ne[1], out.ne[2] * out.ne[3]))
