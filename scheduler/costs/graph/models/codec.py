"""Sound: the decoder of WavTokenizer.

Channels lie beside each other for norms and matrices, and tokens for convolutions, so results are transposed often. All
tokens are answered, with as many values each as a spectrum has.
"""

from __future__ import annotations

from scheduler.costs.ggml_types import F16, F32, TYPES
from scheduler.costs.graph import nodes as g
from scheduler.costs.graph.blocks import Build, Template
from scheduler.costs.graph.nodes import Node, Undrawable

_BF16 = TYPES[30]
_AROUND_STAGES = ("conv1d.weight", "conv1d.bias", "token_embd_norm.weight", "output_norm.weight", "output.weight")
_ATTENDS, _ENDS = 2, 5
"""The layers of the first stage (`posnet`) that do something else than the others."""


def _wavtokenizer(b: Build) -> None:
    weight, bias, *others = (b.weight(name) for name in _AROUND_STAGES)
    if not (weight and bias and all(others)):
        raise Undrawable(f"one of {', '.join(_AROUND_STAGES)} is missing")
    x = g.add(_convolve(weight, _turned(b.embedding())), bias)
    for il in range(_depth(b, "posnet.norm1", "posnet.attn_norm")):
        x = _first_stage(b, il, x)
    x = _turned(b.embedding_norm(_turned(x)))
    for il in range(_depth(b, "convnext.dw")):
        x = _second_stage(b, il, x)
    x = b.outputs(b.norm(_turned(x), -1, "output_norm", rms=False))
    x.is_output = True
    b.graph.expand(x)
    b.pool(x)


def _depth(b: Build, *stems: str) -> int:
    """How many layers a stage has: up to the last that has one of these weights."""
    return max((il + 1 for il in range(b.last + 1) if any(b.layer(il, stem) for stem in stems)), default=0)


def _first_stage(b: Build, il: int, x: Node) -> Node:
    if il > _ENDS:
        raise Undrawable(f"llama.cpp knows no posnet.{il}")
    if il == _ENDS:
        return _group_norm(b, il, "attn_norm", x)
    if il == _ATTENDS:
        return g.add(_attend(b, il, _group_norm(b, il, "attn_norm", x)), x)
    y = x
    for part in ("1", "2"):
        y = _group_norm(b, il, f"norm{part}", y)
        y = _convolved(b, il, f"conv{part}", g.mul(g.unary(y), y))
    return g.add(y, x)


def _attend(b: Build, il: int, x: Node) -> Node:
    """All tokens see all others, with one head."""
    q, k, v = (_convolved(b, il, f"attn_{which}", x) for which in "qkv")
    scores = g.soft_max(g.mul_mat(_turned(k), _turned(q)))
    return _convolved(b, il, "attn_output", g.mul_mat(scores, v))


def _second_stage(b: Build, il: int, x: Node) -> Node:
    """A convolution of each channel by itself, then a feed-forward block, around a residual."""
    y = g.add(_convolve_apart(b.needed(il, "convnext.dw"), x), b.needed(il, "convnext.dw", "bias"))
    b.needed(il, "convnext.norm")
    y = b.norm(_turned(y), il, "convnext.norm", rms=False, pinned=False)
    y = b.project(il, "convnext.pw2", g.unary(b.project(il, "convnext.pw1", y)))
    return g.add(_turned(g.mul(y, b.needed(il, "convnext.gamma"))), x)


def _group_norm(b: Build, il: int, stem: str, x: Node) -> Node:
    """A norm over groups of channels. llama.cpp takes them all to belong to the first layer."""
    tokens, channels = x.ne[:2]
    y = g.reshape(g.like("GROUP_NORM", g.reshape(x, tokens, 1, channels)), tokens, channels)
    y = g.mul(b.pinned(y, 0), b.needed(il, f"posnet.{stem}"))
    return g.add(y, b.needed(il, f"posnet.{stem}", "bias"))


def _convolved(b: Build, il: int, stem: str, x: Node) -> Node:
    return g.add(_convolve(b.needed(il, f"posnet.{stem}"), x), b.needed(il, f"posnet.{stem}", "bias"))


def _convolve(kernel: Node, x: Node) -> Node:
    """A convolution over tokens that leaves their number as it is (`ggml_conv_1d_ph`)."""
    size, inputs, outputs = kernel.ne[:3]
    columns = _columns(kernel, x)
    tokens = columns.ne[1]
    rows = g.reshape(columns, columns.ne[0], tokens)
    return g.reshape(g.mul_mat(rows, g.reshape(kernel, size * inputs, outputs)), tokens, outputs)


def _convolve_apart(kernel: Node, x: Node) -> Node:
    """The same for each channel by itself (`ggml_conv_1d_dw_ph`)."""
    y = g.mul_mat(_columns(kernel, g.reshape(x, x.ne[0], 1, x.ne[1])), kernel)
    return g.reshape(y, y.ne[0], y.ne[2])


def _columns(kernel: Node, x: Node) -> Node:
    """What each step of the kernel sees, side by side (`ggml_im2col`), padded by half of the kernel at both ends."""
    size, inputs = kernel.ne[:2]
    if inputs != x.ne[1]:
        raise Undrawable(f"a convolution of {inputs} channels cannot read {x.ne[1]}")
    tokens = x.ne[0] + 2 * (size // 2) - size + 1
    return Node("IM2COL", (inputs * size, tokens, x.ne[2]), F32 if kernel.type is _BF16 else F16, (kernel, x))


def _turned(x: Node) -> Node:
    return g.cont(g.transpose(x))


CODEC: dict[str, Template] = {"wavtokenizer": _wavtokenizer}
