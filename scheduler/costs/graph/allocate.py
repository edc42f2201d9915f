"""How many bytes each backend's compute buffer needs: ggml's allocator, replayed.

Results take the best-fitting hole, or the end; element-wise operations take over an operand's memory when nobody else
reads it; what nobody reads any more is freed. Holes of no bytes are kept, as ggml keeps them, because they prevent
merging. Source: ggml/src/ggml-alloc.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from scheduler.costs.ggml_types import F16
from scheduler.costs.graph.nodes import Node
from scheduler.costs.graph.schedule import Schedule
from scheduler.costs.params import DeviceKind
from scheduler.costs.weights import pad

_INPLACE = frozenset(
    """
    FILL SCALE DIAG_MASK_ZERO DIAG_MASK_INF ADD ADD_ID ADD1 SUB MUL DIV SQR SQRT LOG UNARY ROPE ROPE_BACK SILU_BACK
    RMS_NORM RMS_NORM_BACK CLAMP SOFT_MAX SOFT_MAX_BACK
    """.split()
)
_ENDLESS = 1 << 62


class Arena:
    """The addresses of one backend's buffer: free blocks in order of address, the last of which never ends."""

    def __init__(self) -> None:
        self.max_bytes = 0
        self._offsets = [0]
        self._sizes = [_ENDLESS]

    def take(self, size: int) -> int:
        """The address of `size` bytes."""
        best, best_size = len(self._sizes) - 1, _ENDLESS
        for i, free in enumerate(self._sizes[:-1]):
            if size <= free <= best_size:
                best, best_size = i, free
        at = self._offsets[best]
        self._offsets[best] += size
        self._sizes[best] -= size
        if not self._sizes[best]:
            del self._offsets[best], self._sizes[best]
        self.max_bytes = max(self.max_bytes, at + size)
        return at

    def give(self, at: int, size: int) -> None:
        """Free `size` bytes at `at`, merging with the first neighbour found, then with the one behind it."""
        offsets, sizes = self._offsets, self._sizes
        for i, offset in enumerate(offsets):
            if offset + sizes[i] == at:
                sizes[i] += size
                if i + 1 < len(offsets) and offset + sizes[i] == offsets[i + 1]:
                    sizes[i] += sizes[i + 1]
                    del offsets[i + 1], sizes[i + 1]
                return
            if at + size == offset:
                offsets[i] = at
                sizes[i] += size
                if i and offsets[i - 1] + sizes[i - 1] == at:
                    sizes[i - 1] += sizes[i]
                    del offsets[i], sizes[i]
                return
        # the first that lies behind: an empty hole in a free block may have left the list out of order
        where = next((i for i, offset in enumerate(offsets) if offset >= at), len(offsets))
        offsets.insert(where, at)
        sizes.insert(where, size)


def buffer_sizes(plan: Schedule, kinds: Sequence[DeviceKind]) -> list[int]:
    """Bytes per backend: the devices, whose kinds are given, and the host."""
    return _Replay(plan, kinds).run()


def _alloc_bytes(node: Node, kind: DeviceKind | None) -> int:
    """What a backend sets aside for a node (`get_alloc_size`): on CUDA also padded rows and f16 copies of a cache."""
    if kind != "cuda":
        return pad(node.n_bytes, 32)
    extra = 0
    if node.op == "FLASH_ATTN_EXT":
        extra = sum(2 * prod(src.ne) for src in node.src[1:3] if src.type is not F16)
    elif node.type.is_quantized and node.ne[0] % 512:
        extra = node.type.row_bytes(512 - node.ne[0] % 512)
    return pad(node.n_bytes + extra, 128)


class _Replay:
    def __init__(self, plan: Schedule, kinds: Sequence[DeviceKind]) -> None:
        self.plan = plan
        self.kinds: list[DeviceKind | None] = [*kinds, None]
        self.arenas = [Arena() for _ in self.kinds]

    def run(self) -> list[int]:
        nodes = self.plan.nodes
        for leaf, backend in self.plan.leafs:
            self.allocate(leaf, backend)
        for node, backend in nodes:
            if node.view_of is not None and node.op != "NONE":
                node.view_of.views += 1
            if node.is_input:
                self.allocate(node, backend)
            for src in node.src:
                src.children += 1
                if src.is_input:
                    self.allocate(src, backend)
        for node, backend in nodes:
            for src in node.src:
                self.allocate(src, backend)
            self.allocate(node, backend)
            for src in node.src:
                src.children -= 1
                if not src.children and not src.views:
                    self.release(src)
        return [arena.max_bytes for arena in self.arenas]

    def allocate(self, node: Node, backend: int) -> None:
        if node.allocated or node.view_of is not None or node.place is not None:
            return
        node.allocated = True
        if node.op in _INPLACE:
            for parent in node.src:
                # a view never counts as allocated, so that its memory is never taken over
                if not parent.allocated or parent.is_output or not node.same_layout(parent):
                    continue
                if parent.children == 1 and not parent.views:
                    node.buffer, node.addr, node.size = parent.buffer, parent.addr, parent.size
                    parent.allocated = False
                    return
        node.buffer = backend
        node.size = _alloc_bytes(node, self.kinds[backend])
        node.addr = self.arenas[backend].take(node.size)

    def release(self, node: Node) -> None:
        owner = node
        if node.view_of is not None:
            owner = node.view_of
            owner.views -= 1
            if owner.views or owner.children:
                return
        if owner.allocated and not owner.is_output:
            self.arenas[owner.buffer].give(owner.addr, owner.size)
            owner.allocated = False
