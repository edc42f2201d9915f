"""Which backend computes which node, and where results are copied across: `ggml_backend_sched_split_graph`.

Backends are numbered as places: the devices in order, then the host (`n_devices`), which has the lowest priority. Every
backend is taken to support every operation. Source: ggml/src/ggml-backend.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from scheduler.costs.graph.nodes import NOWHERE, VIEWS, Graph, Node

_BY_OPERAND = frozenset({"ROPE", "FLASH_ATTN_EXT"})
"""Operations whose weights are too small to say where they should run."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the allocator is given: leafs and nodes in order, each with its backend."""

    leafs: list[tuple[Node, int]]
    nodes: list[tuple[Node, int]]


def schedule(graph: Graph, n_devices: int, n_copies: int, offloads_to: int | None) -> Schedule:
    """Split `graph` over `n_devices` devices and the host. Changes the nodes' `src` to the copies they read.

    `n_copies`: how often inputs exist (4 with pipeline parallelism). `offloads_to`: the device, if any, that multiplies
    by weights in host RAM when the batch is large (`op_offload`).
    """
    host = n_devices
    for leaf in graph.leafs:
        leaf.backend = _own(leaf, host, offloads_to)
    for node in graph.nodes:
        node.backend = _own(node, host, offloads_to) if node.pin is None else node.pin
    _spread(graph.nodes, host)
    for node in graph.nodes:
        if node.backend == NOWHERE and node.view_of is not None:
            node.backend = node.view_of.backend
        for src in node.src:
            if src.backend == NOWHERE:
                src.backend = node.backend if src.view_of is None else src.view_of.backend
        if node.backend == NOWHERE:
            node.backend = 0
    return _split(graph, host, n_copies)


def _own(node: Node, host: int, offloads_to: int | None) -> int:
    """The backend that a node's own memory or weights call for (`ggml_backend_sched_backend_id_from_cur`)."""
    root = node.view_of or node
    if root.place is not None:
        return root.place
    if node.is_input:
        return host
    if node.op not in _BY_OPERAND:
        for src in node.src:
            if src.is_weight:
                assert src.place is not None
                if offloads_to is not None and src.place == host and _offloaded(node):
                    return offloads_to
                return src.place
    return NOWHERE


def _offloaded(node: Node) -> bool:
    """Whether CUDA takes the operation over from the host: large batches (`ggml_backend_cuda_device_offload_op`)."""
    if node.op == "GET_ROWS":
        return False
    if node.op == "MUL_MAT":
        batch = node.ne[1]
    elif node.op in ("MUL_MAT_ID", "ROPE", "ROPE_BACK"):
        batch = node.ne[2]
    else:
        batch = prod(node.ne[1:])
    return batch >= 32


def _spread(nodes: list[Node], host: int) -> None:
    """Nodes without a backend take a neighbour's: devices first, downwards before upwards; then the host's."""
    moving = [node for node in nodes if node.op not in VIEWS]
    for devices_only in (True, False):
        for order in (moving, moving[::-1]):
            current = NOWHERE
            for node in order:
                if node.backend != NOWHERE:
                    current = NOWHERE if devices_only and node.backend == host else node.backend
                elif current != NOWHERE:
                    node.backend = current


@dataclass(slots=True)
class _Split:
    backend: int
    nodes: list[Node]
    inputs: list[Node]


def _split(graph: Graph, host: int, n_copies: int) -> Schedule:
    copies: dict[tuple[Node, int], list[Node]] = {}
    splits = [_Split(next((n.backend for n in graph.nodes if n.op not in VIEWS), host), [], [])]
    for node in graph.nodes:
        split = splits[-1]
        if node.op in VIEWS:
            split.nodes.append(node)
            continue
        foreign_weight = bool(split.inputs) and any(s.is_weight and s.backend != split.backend for s in node.src)
        if node.backend != split.backend or foreign_weight:
            split = _Split(node.backend, [], [])
            splits.append(split)
        for j, src in enumerate(node.src):
            if src.backend == split.backend or (src.view_of or src).place == split.backend:
                continue
            key = (src, split.backend)
            if key not in copies:
                copies[key] = [_copy(src, n_copies) for _ in range(n_copies)]
                split.inputs.append(src)
            node.src[j] = copies[key][0]
        split.nodes.append(node)
    leafs: list[tuple[Node, int]] = []
    if n_copies > 1:
        leafs += _input_copies(graph, n_copies)
        for split in splits:
            leafs += [(copy, split.backend) for src in split.inputs for copy in copies[src, split.backend]]
    leafs += [(leaf, leaf.backend) for leaf in graph.leafs]
    nodes: list[tuple[Node, int]] = []
    for split in splits:
        for src in split.inputs:
            nodes.append((_dependency(src), src.backend))
            nodes.append((copies[src, split.backend][0], split.backend))
        nodes += [(node, node.backend) for node in split.nodes]
    return Schedule(leafs, nodes)


def _input_copies(graph: Graph, n_copies: int) -> list[tuple[Node, int]]:
    """Inputs exist `n_copies` times where they are filled in, too; the first is the input itself."""
    leafs = []
    for leaf in graph.leafs:
        if leaf.is_input:
            leaf.is_output = True  # keeps the allocator from using its memory again
            for copy in [leaf, *(_copy(leaf, n_copies) for _ in range(n_copies - 1))]:
                leafs.append((copy, leaf.backend))
    return leafs


def _copy(src: Node, n_copies: int) -> Node:
    """A tensor with the layout of `src`, strides included (`ggml_dup_tensor_layout`)."""
    copy = Node("NONE", src.ne, src.type).strided(src.nb)
    copy.is_input = copy.is_output = n_copies > 1
    return copy


def _dependency(src: Node) -> Node:
    """Keeps `src` alive until the copy is made; the allocator does not count it as a view."""
    return Node("NONE", src.ne, src.type, (src,), src.view_of or src)
