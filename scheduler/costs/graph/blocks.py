"""Whole graphs: from the tokens that come in to the logits or embeddings that go out. After src/llama-graph.cpp.

A `Build` draws one graph for one batch of one model; a template is a function that does so for an architecture.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.costs.ggml_types import F32
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.attention import Attention
from scheduler.costs.graph.feed_forward import FeedForward
from scheduler.costs.graph.nodes import I32, Node, Undrawable

_MEAN, _RANK = 1, 4
"""`LLAMA_POOLING_TYPE_MEAN`, and that of models that rank texts."""


class Build(Attention, FeedForward):
    """A graph with its two ends."""

    finish_logits: Callable[[Node], Node] | None = None
    """What is done to the logits at last, where an architecture does more than multiply."""

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
        if not self.arch.row.plain_output:
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


Template = Callable[[Build], None]
"""Draws the graph of one architecture."""
