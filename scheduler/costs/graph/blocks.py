"""The parts that graphs are made of: inputs, norms, attention, feed-forward blocks. After src/llama-graph.cpp.

A `Build` draws one graph for one batch of one model. Weights are named as in the file. Order matters: nodes are
computed in the order in which they are expanded, and that decides what is alive at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scheduler.costs.cache import EffectiveContext
from scheduler.costs.ggml_types import F16, F32, GgmlType
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.model import GraphModel, Width
from scheduler.costs.graph.nodes import I32, I64, Graph, Node, Undrawable

_MEAN, _RANK = 1, 4
"""`LLAMA_POOLING_TYPE_MEAN`, and that of models that rank texts."""
_OF_INPUT = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")
_BEFORE_LAYERS = ("token_embd_norm.", "per_layer_model_proj.", "per_layer_proj_norm.", "conv1d.", "hrm.z_l_init")
"""Weights that llama.cpp puts with the first layer, though they have no number."""
_WITHOUT_ADAPTERS = frozenset("attn_q_a attn_q_b attn_kv_a_mqa attn_k_b attn_v_b".split())
"""Latent attention multiplies by these without looking for adapters."""
_PLAIN_OUTPUT = frozenset("deepseek2 deepseek32 glm-dsa dots3note glm5-next".split())
"""Whose output matrix is multiplied by as it is, without its scale or adapters."""
_SCALED_DENSE = frozenset(
    """
    llama mistral3 qwen3 qwen35 gemma4 cohere2 nemotron_h nemotron_h_moe nanbeige deepseek32 glm-dsa dots3note
    """.split()
)
_SCALED_SHARED = frozenset(
    "qwen3next qwen35moe qwen4exp nemotron_h nemotron_h_moe deepseek32 glm-dsa dots3note".split()
)
_SCALED_EXPERTS = frozenset(
    """
    llama mistral3 qwen3moe qwen3next qwen35moe gemma4 nemotron_h nemotron_h_moe deepseek32 glm-dsa dots3note qwen4exp
    """.split()
)
"""Whose feed-forward blocks multiply by the scale that comes with a matrix (NVFP4); the others leave it out."""
MAX_EXPERTS = 1024
"""`LLAMA_MAX_EXPERTS` in src/llama-hparams.h."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one graph is reserved for."""

    tokens: int
    n_seqs: int
    outputs: int


@dataclass(slots=True)
class _Cache:
    """Inputs of attention over one kind of cache, and the cells it has per stream."""

    cells: int
    k_ids: Node
    v_ids: Node
    mask: Node
    k_rotation: Node | None
    v_rotation: Node | None


class Build:
    """A graph in the making. `places`: where each layer lies and, last, the output; the host is the highest."""

    def __init__(
        self,
        model: GraphModel,
        size: EffectiveContext,
        types: tuple[GgmlType, GgmlType],
        flash: bool,
        batch: Batch,
        places: Sequence[int],
        host: int,
        experts_on_host: bool,
        embeds: bool,
        on_cuda: bool,
        pins: bool,
    ) -> None:
        self.graph = Graph()
        self.arch, self.hparams, self.size, self.batch = model.arch, model.hparams, size, batch
        self.filled = model.filled
        self.flash = flash
        self.tokens = batch.tokens
        self.last = len(model.layers) - 1
        self._layers, self._weights, self._n_adapters = model.layers, model.rest, model.n_adapters
        self._type_k, self._type_v = types
        self._places = places
        self._host = host
        self._experts_on_host = experts_on_host
        self.embeds = embeds
        self.on_cuda = on_cuda
        self._pins = pins
        self._made: dict[object, Node] = {}
        self._caches: dict[bool, _Cache] = {}
        self._masks: dict[bool, Node] = {}
        self._seen: dict[int, Callable[[], tuple[Node, Node]]] = {}
        self.finish_logits: Callable[[Node], Node] | None = None
        """What is done to the logits at last, where an architecture does more than multiply."""

    # ------------------------------------------------------------------ weights

    def weight(self, name: str) -> Node | None:
        """A weight outside the layers, or None when the model has none of that name."""
        place = self._places[-1]
        if name.startswith(_OF_INPUT):
            place = self._host
        elif name.startswith(_BEFORE_LAYERS) and not self.arch.name.startswith("lfm2"):
            place = self._places[0]  # in LFM2, it is the output's norm that is called token_embd_norm
        return self._stored_weight(name, self._weights.get(name), place)

    def layer(self, il: int, stem: str, kind: str = "weight") -> Node | None:
        """A weight of layer `il`, without `blk.` and its number, or None when the layer has none of that name.

        It is another layer's where that one is run again, except for scales. A few weights have no ending: `ssm_a`, and
        the `ffn_norm` of falcon-h1.
        """
        il = il if kind == "scale" else self.run_by(il)
        name = stem if kind == "weight" and stem in self._layers[il] else f"{stem}.{kind}"
        place = self._host if self._experts_on_host and "_exps" in stem else self._places[il]
        return self._stored_weight((il, name), self._layers[il].get(name), place)

    def run_by(self, il: int) -> int:
        """The layer whose weights layer `il` runs: mostly its own."""
        runs = self.arch.layers[il].runs
        return il if runs < 0 else runs

    def needed(self, il: int, stem: str, kind: str = "weight") -> Node:
        """The same for a weight that the architecture cannot do without. Raises Undrawable when it is missing."""
        node = self.layer(il, stem, kind)
        if node is None:
            raise Undrawable(f"there is no blk.{il}.{stem}.{kind}")
        return node

    def _stored_weight(self, key: object, width: Width | None, place: int) -> Node | None:
        if width is None:
            return None
        if key not in self._made:
            self._made[key] = g.stored(width.ne, width.type, place, weight=True)
        return self._made[key]

    def project(self, il: int, stem: str, x: Node, *, scaled: bool = True, scale_of: str = "") -> Node:
        """`x` times the matrix and its scale, plus its bias, where the model has them (`build_lora_mm`).

        `scale_of`: whose scale it is, if not the matrix's own.
        """
        y = g.mul_mat(self.needed(il, stem), x)
        scale = self.layer(il, scale_of or stem, "scale") if scaled and self._scales(stem) else None
        y = g.mul(y, scale) if scale else y
        if stem not in _WITHOUT_ADAPTERS or self.arch.name == "deepseek4":
            for a, b in self._adapters(lambda kind: self.layer(il, stem, kind)):
                y = g.add(y, g.scale(g.mul_mat(b, g.mul_mat(a, x))))
        bias = self.layer(il, stem, "bias")
        return g.add(y, bias) if bias else y

    def project_outside(self, stem: str, x: Node) -> Node:
        """`x` times a matrix outside the layers."""
        matrix = self.weight(f"{stem}.weight")
        if matrix is None:
            raise Undrawable(f"there is no {stem}.weight")
        y = g.mul_mat(matrix, x)
        for a, b in self._adapters(lambda kind: self.weight(f"{stem}.{kind}")):
            y = g.add(y, g.scale(g.mul_mat(b, g.mul_mat(a, x))))
        return y

    def _adapters(self, find: Callable[[str], Node | None]) -> Iterator[tuple[Node, Node]]:
        """The matrices that adapters bring for a weight; they are no weights to the scheduler."""
        for no in range(self._n_adapters):
            a, b = find(f"weight.lora_a.{no}"), find(f"weight.lora_b.{no}")
            if a and b:
                a.is_weight = b.is_weight = False
                yield a, b

    def _scales(self, stem: str) -> bool:
        """Whether the graph multiplies by the scale of such a matrix, if it has one."""
        if not stem.startswith("ffn_"):
            return True
        kind = _SCALED_EXPERTS if "_exps" in stem else _SCALED_SHARED if "_shexp" in stem else _SCALED_DENSE
        return self.arch.name in kind

    # ------------------------------------------------------------------ the ends

    def embedding(self) -> Node:
        table = self._table()
        tokens = self.token_ids = g.fresh_input((self.tokens,), I32)
        given = g.fresh_input((table.ne[0], self.tokens))
        looked_up = g.get_rows(table, tokens)
        for a, b in self._adapters(lambda kind: self.weight(f"token_embd.{kind}")):
            looked_up = g.add(looked_up, g.scale(g.mul_mat(b, g.get_rows(a, tokens))))
        looked_up = self.graph.expand(looked_up)
        self.graph.expand(given)
        if self.hparams.scales_embedding:
            looked_up = g.scale(looked_up)
        return self.graph.expand(looked_up)

    def positions(self) -> Node:
        return g.fresh_input((self.tokens * self.arch.n_pos,), I32)

    def output_ids(self) -> Node:
        return g.fresh_input((self.batch.outputs,), I32)

    def outputs(self, x: Node) -> Node:
        """`x` times the output matrix, or the token embedding a second time."""
        matrix = self.weight("output.weight") or self._tied()
        y = g.mul_mat(matrix, x)
        if self.arch.name not in _PLAIN_OUTPUT:
            scale = self.weight("output.scale")
            y = g.mul(y, scale) if scale else y
            for a, b in self._adapters(lambda kind: self.weight(f"output.{kind}")):
                y = g.add(y, g.scale(g.mul_mat(b, g.mul_mat(a, x))))
        bias = self.weight("output.bias")
        return g.add(y, bias) if bias else y

    def logits(self, x: Node) -> None:
        """What the output matrix makes of `x`, capped and scaled."""
        y = self.outputs(x)
        y = self.finish_logits(y) if self.finish_logits else y
        x.is_output = True
        if self.hparams.scales_logits:
            y = g.scale(y)
        if self.hparams.caps_logits:
            y = g.scale(g.unary(g.scale(y)))
        y.is_output = True
        self.graph.expand(y)
        self.pool(x)

    def pool(self, x: Node) -> None:
        """Make one embedding of each sequence, in a context that embeds (`build_pooling`)."""
        pooling, n_seqs = self.hparams.pooling, self.batch.n_seqs
        if not self.embeds:
            return
        dense = [self.weight(f"dense_{n}.weight") for n in (2, 3)]
        if pooling:
            x = self._pooled(x, pooling, n_seqs)
        if any(dense):
            for matrix in filter(None, dense):
                x = g.mul_mat(matrix, x)
            x.is_output = True
            self.graph.expand(x)

    def _pooled(self, x: Node, pooling: int, n_seqs: int) -> Node:
        if pooling == _MEAN or pooling == _RANK and self.arch.name == "modern-bert":
            pooled = g.mul_mat(g.cont(g.transpose(x)), g.fresh_input((self.tokens, n_seqs)))
        else:
            pooled = g.get_rows(x, g.fresh_input((n_seqs,), I32))
        if pooling == _RANK:
            pooled = self._ranked(pooled)
        pooled.is_output = True
        return self.graph.expand(pooled)

    def _ranked(self, x: Node) -> Node:
        """The head of a model that ranks texts, of the parts that it has."""
        head, norm, out = (self.weight(f"{name}.weight") for name in ("cls", "cls.norm", "cls.output"))
        if head:
            bias = self.weight("cls.bias")
            x = g.mul_mat(head, x)
            x = g.unary(g.add(x, bias) if bias else x)
            x = g.mul(g.like("NORM", x), norm) if norm else x
        if out:
            bias = self.weight("cls.output.bias")
            x = g.mul_mat(out, x)
            x = g.add(x, bias) if bias else x
        return g.soft_max(x) if self.arch.name in ("qwen3", "qwen3vl") else x

    def _table(self) -> Node:
        table = self.weight("token_embd.weight")
        if table is None:
            raise Undrawable("there is no token_embd.weight")
        return table

    def _tied(self) -> Node:
        """The token embedding, of which the output's device has a copy."""
        table = self._table()
        if self._places[-1] == self._host:
            return table
        return g.stored(table.ne, table.type, self._places[-1], weight=True)

    def rope_factors(self, il: int) -> Node | None:
        """Long-context factors of RoPE: a copy lies beside every layer."""
        for name in ("rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"):
            if name in self._weights:
                return g.stored(self._weights[name].ne, F32, self._places[il], weight=True)
        return None

    # ------------------------------------------------------------------ norms

    def norm(
        self, x: Node, il: int, stem: str, *, rms: bool = True, pinned: bool = True, at: int | None = None
    ) -> Node:
        """A norm with its weight and bias, kept on its layer's device where llama.cpp insists on that.

        `at`: the layer that it belongs to, if its weight is not of the same.
        """
        y = g.like("RMS_NORM" if rms else "NORM", x)
        weight, bias = (
            self.layer(il, stem, kind) if il >= 0 else self.weight(f"{stem}.{kind}") for kind in ("weight", "bias")
        )
        at = il if at is None else at
        if (weight or bias) and self._pins and pinned and at >= 0:
            y.pin = self._places[at]
        y = g.mul(y, weight) if weight else y
        return g.add(y, bias) if bias else y

    def pinned(self, x: Node, il: int) -> Node:
        """`x`, kept on the device of layer `il` where llama.cpp insists on that."""
        if self._pins:
            x.pin = self._places[il]
        return x

    def head_norm(self, x: Node, il: int, stem: str, *, rms: bool = True) -> Node:
        """A norm of queries or keys, if the layer has it: of each head, or of all heads as one row."""
        weight = self.layer(il, stem)
        if not weight:
            return x
        if weight.ne[0] == x.ne[0]:
            return self.norm(x, il, stem, rms=rms)
        rows = g.reshape(x, x.ne[0] * x.ne[1], x.ne[2])
        return g.reshape(self.norm(rows, il, stem, rms=rms), *x.ne)

    def embedding_norm(self, x: Node) -> Node:
        """The norm of the looked-up tokens, which runs where the first layer does."""
        y = g.like("NORM", x)
        if self._pins:
            y.pin = self._places[0]
        for combine, kind in ((g.mul, "weight"), (g.add, "bias")):
            weight = self.weight(f"token_embd_norm.{kind}")
            y = combine(y, weight) if weight else y
        return y

    @property
    def is_torn(self) -> bool:
        """Whether some layers lie on devices and some on the host."""
        return len({place == self._host for place in self._places}) > 1

    # ------------------------------------------------------------------ attention

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

    # ------------------------------------------------------------------ recurrent state

    def recurrent_inputs(self) -> None:
        """Which states of the cache are those of the batch; all of them are, in a graph that is only reserved."""
        ids = g.fresh_input((self.size.n_seq_max,), I32)
        self._state_ids = g.view(ids, (self.batch.n_seqs,), ())
        self._other_ids = g.view(ids, (self.size.n_seq_max - self.batch.n_seqs,), ())

    def states(self, il: int, width: int) -> Node:
        """A cache of `width` elements per sequence."""
        return g.stored((width, self.size.n_seq_max), F32, self._places[il], weight=False)

    def read_states(self, cache: Node, by: Callable[[Node, Node], Node] = g.get_rows) -> Node:
        """The batch's states (`build_rs`): one is cleared, and those of other sequences are moved aside."""
        expand = self.graph.expand
        flat = g.reshape(cache, *cache.ne[:2])
        expand(g.scale_inplace(g.view(flat, (flat.ne[0],), ())))
        read = expand(by(flat, self._state_ids))
        moved = g.get_rows(flat, self._other_ids)
        expand(g.copy(moved, g.view(cache, (flat.ne[0], self._other_ids.ne[0]), (cache.nb[1],))))
        return read

    def write_states(self, cache: Node, states: Node) -> None:
        self.graph.expand(g.copy(states, g.view(cache, (cache.ne[0], self.batch.n_seqs), (cache.nb[1],))))

    # ------------------------------------------------------------------ feed-forward

    def feed_forward(self, il: int, x: Node, suffix: str = "", *, plain: bool = False, squared: bool = False) -> Node:
        """Up, gate and down (`build_ffn`); without a gate matrix the one matrix holds both halves.

        `plain`: nothing is gated. `squared`: the same, and the activation is squared.
        """
        up = self.project(il, f"ffn_up{suffix}", x)
        if plain or squared:
            inner = g.like("SQR", g.unary(up)) if squared else g.unary(up)
        elif self.layer(il, f"ffn_gate{suffix}"):
            inner = g.glu(self.project(il, f"ffn_gate{suffix}", x), up)
        else:
            inner = g.glu(up)
        return self.project(il, f"ffn_down{suffix}", inner)

    def experts(
        self,
        il: int,
        x: Node,
        *,
        normalise: bool = True,
        softmax_weights: bool = False,
        squared: bool = False,
        routed_by: Node | None = None,
        plain: bool = False,
        chosen: Node | None = None,
    ) -> Node:
        """The routed experts (`build_moe_ffn`). `softmax_weights`: only the chosen experts' weights are soft-maxed.

        `plain`: experts have no gate. `squared`: neither, and their activation is squared. `routed_by`: what the router
        sees, if not `x`. `chosen`: the experts of each token, where the router has no say in that.
        """
        used, n, tokens, expand = self.arch.n_expert_used, self.arch.n_expert, x.ne[1], self.graph.expand
        if not 0 < used <= n <= MAX_EXPERTS:
            raise Undrawable(f"{used} of {n} experts are in use; llama.cpp has at most {MAX_EXPERTS}")
        logits = self.project(il, "ffn_gate_inp", routed_by or x, scaled=False)
        probabilities = logits
        if not softmax_weights:
            by_unary = self.hparams.gates_by_sigmoid or self.hparams.gates_by_softplus
            probabilities = g.unary(logits) if by_unary else g.soft_max(logits)
            if self.hparams.gates_by_softplus:
                probabilities = g.like("SQRT", probabilities)
        bias = self.layer(il, "exp_probs_b", "bias")
        choice = g.add(probabilities, bias) if bias else probabilities
        if self.hparams.n_expert_groups > 1:
            choice = self._from_best_groups(choice)
        ids = chosen or g.argsort_top_k(choice, used)
        weights = g.get_rows(g.reshape(probabilities, 1, n, tokens), ids)
        if softmax_weights:
            weights = g.reshape(g.soft_max(g.reshape(weights, used, tokens)), 1, used, tokens)
        if normalise:
            flat = g.reshape(weights, used, tokens)
            weights = g.reshape(g.like("DIV", flat, g.like("CLAMP", g.sum_rows(flat))), 1, used, tokens)
        if self.hparams.scales_experts:
            weights = g.scale(weights)
        expand(weights)
        x = g.reshape(x, x.ne[0], 1, tokens)
        if self.layer(il, "ffn_gate_up_exps"):
            both = self._expert(il, "ffn_gate_up_exps", x, ids)
            half = (both.ne[0] // 2, both.ne[1], both.ne[2])
            gate, up = (g.view(both, half, both.nb[1:3]) for _ in range(2))
            inner = g.glu(gate, up)
        else:
            up = self._expert(il, "ffn_up_exps", x, ids)
            if plain or squared:
                inner = g.like("SQR", g.unary(up)) if squared else g.unary(up)
            else:
                inner = g.glu(self._expert(il, "ffn_gate_exps", x, ids), up)
        out = g.mul(self._expert(il, "ffn_down_exps", inner, ids), weights)
        expand(out)
        parts = [expand(g.view(out, (out.ne[0], tokens), (out.nb[2],))) for _ in range(used)]
        total = parts[0]
        for part in parts[1:]:
            total = expand(g.add(total, part))
        return g.cont(total) if used == 1 else total

    def experts_or_dense(self, il: int, x: Node) -> Node:
        """The routed experts with a shared one beside them, or a dense block in layers without a router."""
        if not self.layer(il, "ffn_gate_inp"):
            return self.feed_forward(il, x)
        routed = self.experts(il, x, normalise=self.hparams.normalises_experts)
        return g.add(routed, self.feed_forward(il, x, "_shexp"))

    def _from_best_groups(self, scores: Node) -> Node:
        """Scores in which only the groups with the best two experts are left."""
        n, groups, tokens = scores.ne[0], self.hparams.n_expert_groups, scores.ne[1]
        grouped = g.reshape(scores, n // groups, groups, tokens)
        best = g.get_rows(g.reshape(grouped, 1, n // groups, groups, tokens), g.argsort_top_k(grouped, 2))
        sums = g.reshape(g.sum_rows(g.reshape(best, 2, groups, tokens)), groups, tokens)
        chosen = g.argsort_top_k(sums, self.hparams.n_group_used)
        kept = g.set_rows(g.like("FILL", grouped), g.get_rows(grouped, chosen), chosen)
        return g.reshape(kept, n, tokens)

    def _expert(self, il: int, stem: str, x: Node, ids: Node) -> Node:
        y = g.mul_mat_id(self.needed(il, stem), x, ids)
        scale = self.layer(il, "ffn_up_exps" if stem == "ffn_gate_up_exps" else stem, "scale")
        if scale and self._scales(stem):
            n = scale.ne[0]
            y = g.mul(y, g.get_rows(g.repeat(g.reshape(scale, 1, n, 1), 1, n, x.ne[2]), ids))
        for a, b in self._adapters(lambda kind: self.layer(il, stem, kind)):
            y = g.add(y, g.scale(g.mul_mat_id(b, g.mul_mat_id(a, x, ids), ids)))
        bias = self.layer(il, stem, "bias")
        return g.like("ADD_ID", y, bias, ids) if bias else y


Template = Callable[[Build], None]
"""Draws the graph of one architecture."""
