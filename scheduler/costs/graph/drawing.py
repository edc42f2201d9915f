"""A graph in the making: its weights, products with them, norms, and the states of recurrent layers.

After src/llama-graph.cpp. Weights are named as in the file. Order matters: nodes are computed in the order in which
they are expanded, and that decides what is alive at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scheduler.costs.cache import EffectiveContext
from scheduler.costs.ggml_types import F32, GgmlType
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.model import GraphModel, Width
from scheduler.costs.graph.nodes import I32, Graph, Node, Undrawable

_OF_INPUT = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")
_BEFORE_LAYERS = ("token_embd_norm.", "per_layer_model_proj.", "per_layer_proj_norm.", "conv1d.", "hrm.z_l_init")
"""Weights that llama.cpp puts with the first layer, though they have no number."""
_WITHOUT_ADAPTERS = frozenset("attn_q_a attn_q_b attn_kv_a_mqa attn_k_b attn_v_b".split())
"""Latent attention multiplies by these without looking for adapters."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one graph is reserved for."""

    tokens: int
    n_seqs: int
    outputs: int


class Drawing:
    """A graph in the making. `places`: where each layer lies and, last, the output; the host is the highest.

    `experts_on_host`: for each layer, whether its experts lie there whatever its place.
    """

    def __init__(
        self,
        model: GraphModel,
        size: EffectiveContext,
        types: tuple[GgmlType, GgmlType],
        flash: bool,
        batch: Batch,
        places: Sequence[int],
        host: int,
        experts_on_host: Sequence[bool],
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
        place = self._host if self._experts_on_host[il] and "_exps" in stem else self._places[il]
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
        kind = "experts" if "_exps" in stem else "shared" if "_shexp" in stem else "dense"
        return kind in self.arch.row.scaled

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

    # ------------------------------------------------------------------ recurrent state

    def recurrent_inputs(self) -> None:
        """Which states of the cache are those of the batch; all of them are, in a graph that is only reserved."""
        ids = g.fresh_input((self.size.n_seq_max,), I32)
        self._state_ids = g.view(ids, (self.batch.n_seqs,), ())
        self._other_ids = g.view(ids, (self.size.n_seq_max - self.batch.n_seqs,), ())

    @property
    def n_kept(self) -> int:
        """States of a sequence that are kept: the latest, and its copies."""
        return 1 + self.size.n_rs_seq

    @property
    def n_written(self) -> int:
        """Of these, as many as this batch has tokens for."""
        return min(self.tokens // self.batch.n_seqs, self.n_kept)

    def states(self, il: int, width: int) -> Node:
        """A cache of `width` elements per sequence and copy."""
        return g.stored((width, self.size.n_seq_max * self.n_kept), F32, self._places[il], weight=False)

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
        """The states of the batch after one of its tokens."""
        self.graph.expand(g.copy(states, g.view(cache, (cache.ne[0], self.batch.n_seqs), (cache.nb[1],))))

    def write_results(self, cache: Node, results: Node) -> None:
        """The states at the end of what a recurrent operation returns, all at once."""
        ne, step = (cache.ne[0], self.batch.n_seqs, self.n_written), results.type.row_bytes(cache.ne[0])
        behind = g.view(results, ne, (step, step * self.batch.n_seqs))
        into = g.view(cache, ne, (cache.nb[1], self.size.n_seq_max * cache.nb[1]))
        self.graph.expand(g.copy(behind, into))
