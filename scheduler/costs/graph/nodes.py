"""The results of a compute graph and the operations that make them: shapes, strides and who reads whom, no numbers.

The operations are those of ggml/include/ggml.h, under ggml's own names, as far as the templates need them. What counts
for memory is kept: sizes, strides, which results are views of others, and the order in which a graph visits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from scheduler.costs.ggml_types import F32, TYPES, GgmlType

I32, I64 = TYPES[26], TYPES[27]

NOWHERE = -1
"""The backend of a node that has none yet."""

VIEWS = frozenset({"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
"""Operations that only look at memory (`ggml_is_view_op`)."""


class Undrawable(Exception):
    """The weights do not fit the graph of the architecture: llama.cpp would refuse the file."""


class Node:
    """One tensor of a graph. `ne` counts elements and `nb` bytes per step, for four dimensions, rows first."""

    __slots__ = (
        "addr", "allocated", "backend", "buffer", "children", "is_input", "is_output", "is_weight", "n_bytes", "nb",
        "ne", "op", "pin", "place", "size", "src", "type", "view_of", "views",
    )  # fmt: skip

    def __init__(
        self, op: str, ne: Sequence[int], of: GgmlType = F32, src: Sequence[Node] = (), view_of: Node | None = None
    ) -> None:
        self.op = op
        self.type = of
        a, b, c, d = ne = (*ne, 1, 1, 1)[:4]
        self.ne = ne
        row = of.row_bytes(a)
        self.nb = (of.block_bytes, row, row * b, row * b * c)
        self.n_bytes = row * b * c * d
        self.src = list(src)
        self.view_of = view_of
        self.is_input = self.is_output = self.is_weight = False
        self.place: int | None = None
        """Where a tensor lies that is there before the graph: weights and caches."""
        self.pin: int | None = None
        """The backend that llama.cpp insists on."""
        self.backend = NOWHERE
        # the allocator's books
        self.children = self.views = 0
        self.allocated = False
        self.buffer = self.addr = self.size = 0

    def strided(self, nb: tuple[int, int, int, int]) -> Node:
        """This node with other strides; its bytes are those from the first to the last element (`ggml_nbytes`)."""
        self.nb = nb
        if 0 in self.ne:
            self.n_bytes = 0
        elif self.type.block == 1:
            self.n_bytes = self.type.block_bytes + sum((n - 1) * step for n, step in zip(self.ne, nb, strict=True))
        else:
            steps = zip(self.ne[1:], nb[1:], strict=True)
            self.n_bytes = self.ne[0] * nb[0] // self.type.block + sum((n - 1) * step for n, step in steps)
        return self

    @property
    def is_contiguous(self) -> bool:
        step = self.type.block_bytes
        for n, nb, unit in zip(self.ne, self.nb, (self.type.block, 1, 1, 1), strict=True):
            if n != unit and nb != step:
                return False
            step *= n // unit
        return True

    def same_layout(self, other: Node) -> bool:
        return self.type is other.type and self.ne == other.ne and self.nb == other.nb


class Graph:
    """Nodes in the order in which they are computed, as `ggml_build_forward_expand` finds them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.leafs: list[Node] = []
        self._seen: set[Node] = set()

    def expand(self, node: Node) -> Node:
        """Visit `node` after everything it reads."""
        if node in self._seen:
            return node
        self._seen.add(node)
        for src in node.src:
            self.expand(src)
        (self.leafs if node.op == "NONE" else self.nodes).append(node)
        return node

    def take_apart(self) -> None:
        """Nobody reads it any more: without cycles (`cast`), it is freed at once."""
        for node in self.nodes:
            node.src.clear()


def fresh_input(ne: Sequence[int], of: GgmlType = F32) -> Node:
    node = Node("NONE", ne, of)
    node.is_input = True
    return node


def stored(ne: Sequence[int], of: GgmlType, place: int, *, weight: bool) -> Node:
    """A tensor that has its memory already."""
    node = Node("NONE", ne, of)
    node.place, node.is_weight = place, weight
    return node


def like(op: str, a: Node, *others: Node) -> Node:
    """An element-wise operation: the result is shaped as its first operand."""
    return Node(op, a.ne, a.type, (a, *others))


def unary(a: Node) -> Node:
    return like("UNARY", a)


def add(a: Node, b: Node) -> Node:
    return like("ADD", a, b)


def mul(a: Node, b: Node) -> Node:
    return like("MUL", a, b)


def scale(a: Node) -> Node:
    return like("SCALE", a)


def scale_inplace(a: Node) -> Node:
    return Node("SCALE", a.ne, a.type, (a,), a.view_of or a).strided(a.nb)


def copy(a: Node, into: Node) -> Node:
    return Node("CPY", into.ne, into.type, (a, into), into.view_of or into).strided(into.nb)


def cast(a: Node, of: GgmlType) -> Node:
    """`a` as another type. The node reads itself, too."""
    node = Node("CPY", a.ne, of, (a,))
    node.src.append(node)
    return node


def ssm_conv(rows: Node, kernel: Node) -> Node:
    return Node("SSM_CONV", (kernel.ne[1], rows.ne[0] - kernel.ne[0] + 1, rows.ne[2]), F32, (rows, kernel))


def ssm_scan(states: Node, x: Node, dt: Node, a: Node, b: Node, c: Node, ids: Node, n_kept: int = 1) -> Node:
    """The results of all tokens, and after them the states after the last `n_kept` of them, as one row."""
    n = prod(x.ne) + n_kept * prod(states.ne[:3]) * ids.ne[0]
    return Node("SSM_SCAN", (n,), F32, (states, x, dt, a, b, c, ids))


def repeat(a: Node, *ne: int) -> Node:
    return Node("REPEAT", ne, a.type, (a,))


def gated_delta_net(q: Node, k: Node, v: Node, gate: Node, beta: Node, states: Node, n_kept: int) -> Node:
    """The results of all tokens, and after them the states after the last `n_kept` of them."""
    width, heads, tokens, seqs = v.ne
    rows = (tokens + n_kept * width) * seqs
    return Node("GATED_DELTA_NET", (width * heads, rows), F32, (q, k, v, gate, beta, states))


def rope(a: Node, positions: Node, factors: Node | None = None) -> Node:
    return like("ROPE", a, positions, *([factors] if factors else []))


def glu(a: Node, b: Node | None = None) -> Node:
    """A gated activation: of two operands, or of the two halves of one."""
    if b is not None:
        return like("GLU", a, b)
    return Node("GLU", (a.ne[0] // 2, *a.ne[1:]), a.type, (a,))


def mul_mat(a: Node, b: Node) -> Node:
    if a.ne[0] != b.ne[0]:
        raise Undrawable(f"rows of {a.ne[0]} and {b.ne[0]} elements cannot be multiplied")
    return Node("MUL_MAT", (a.ne[1], b.ne[1], b.ne[2], b.ne[3]), F32, (a, b))


def mul_mat_id(experts: Node, b: Node, ids: Node) -> Node:
    if experts.ne[0] != b.ne[0]:
        raise Undrawable(f"rows of {experts.ne[0]} and {b.ne[0]} elements cannot be multiplied")
    return Node("MUL_MAT_ID", (experts.ne[1], ids.ne[0], b.ne[2], 1), F32, (experts, b, ids))


def get_rows(a: Node, ids: Node) -> Node:
    return Node("GET_ROWS", (a.ne[0], ids.ne[0], ids.ne[1], ids.ne[2]), I32 if a.type is I32 else F32, (a, ids))


def set_rows(into: Node, rows: Node, ids: Node) -> Node:
    node = Node("SET_ROWS", into.ne, into.type, (rows, ids, into), into.view_of or into)
    return node.strided(into.nb)


def sum_rows(a: Node) -> Node:
    return Node("SUM_ROWS", (1, *a.ne[1:]), a.type, (a,))


def concat(a: Node, b: Node) -> Node:
    """Rows of `a` with those of `b` after them."""
    return Node("CONCAT", (a.ne[0] + b.ne[0], *a.ne[1:]), a.type, (a, b))


def stack(a: Node, b: Node) -> Node:
    """Matrices of `a` with those of `b` after them."""
    return Node("CONCAT", (*a.ne[:2], a.ne[2] + b.ne[2]), a.type, (a, b))


def soft_max(a: Node, *others: Node) -> Node:
    return like("SOFT_MAX", a, *others)


def argsort_top_k(a: Node, k: int) -> Node:
    order = Node("ARGSORT", a.ne, I32, (a,))
    return view(order, (k, *a.ne[1:]), order.nb[1:])


def flash_attn_ext(q: Node, k: Node, v: Node, *others: Node) -> Node:
    return Node("FLASH_ATTN_EXT", (v.ne[0], q.ne[2], q.ne[1], q.ne[3]), F32, (q, k, v, *others))


def cont(a: Node, *ne: int) -> Node:
    return Node("CONT", ne or a.ne, a.type, (a,))


def view(a: Node, ne: Sequence[int], nb: Sequence[int]) -> Node:
    """A view with its own strides (`nb` for the dimensions after the first); missing ones follow from the last."""
    node = Node("VIEW", ne, a.type, (a,), a.view_of or a)
    steps = [a.type.block_bytes, *nb]
    while len(steps) < 4:
        steps.append(steps[-1] * node.ne[len(steps) - 1])
    return node.strided((steps[0], steps[1], steps[2], steps[3]))


def reshape(a: Node, *ne: int) -> Node:
    if prod(ne) != prod(a.ne):
        raise Undrawable(f"{a.ne} elements cannot be shaped as {ne}")
    return Node("RESHAPE", ne, a.type, (a,), a.view_of or a)


def permute(a: Node, *axes: int) -> Node:
    """Dimension `i` of `a` becomes dimension `axes[i]`."""
    ne, nb = [0] * 4, [0] * 4
    for i, axis in enumerate(axes):
        ne[axis], nb[axis] = a.ne[i], a.nb[i]
    node = Node("PERMUTE", (1, 1, 1, 1), a.type, (a,), a.view_of or a)
    node.ne = (ne[0], ne[1], ne[2], ne[3])
    return node.strided((nb[0], nb[1], nb[2], nb[3]))


def transpose(a: Node) -> Node:
    node = permute(a, 1, 0, 2, 3)
    node.op = "TRANSPOSE"
    return node


def hadamard(a: Node, rotation: Node) -> Node:
    """`a` rotated block by block (`llama_mul_mat_hadamard`)."""
    n = rotation.ne[0]
    rows = prod(a.ne) // n
    flat = reshape(a, n, rows) if a.is_contiguous else cont(a, n, rows)
    return reshape(mul_mat(rotation, flat), *a.ne)
