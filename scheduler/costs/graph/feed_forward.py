"""Feed-forward blocks, dense and of experts. After src/llama-graph.cpp."""

from __future__ import annotations

from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.drawing import Drawing
from scheduler.costs.graph.nodes import Node, Undrawable

MAX_EXPERTS = 1024
"""`LLAMA_MAX_EXPERTS` in src/llama-hparams.h."""


class FeedForward(Drawing):
    """A graph whose layers feed forward."""

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
