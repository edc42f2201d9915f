"""LoRA adapters: what they add to a model. An adapted model is a `ModelShape` like any other.

Both matrices of a pair lie where the weight lies that they belong to, padded as it is, and the graph multiplies by them
beside it: so weights stay exact, and compute buffers too where a template draws the graph.
Source in llama.cpp: src/llama-adapter.cpp, `build_lora_mm` in src/llama-graph.cpp.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from scheduler.costs.demand import ModelDemand
from scheduler.costs.graph.model import Width, adapted_graph_model
from scheduler.costs.header import Tensor, read_header, split_name
from scheduler.costs.shape import ModelShape
from scheduler.costs.weights import Padded, WeightSums, sum_weights
from scheduler.errors import InvalidGGUF, Rejected

_HALVES = (".lora_a", ".lora_b")
_INVOCATION = "adapter.alora.invocation_tokens"


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter file: its two matrices by the name of the weight that they belong to."""

    path: str
    architecture: str
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest among its pairs."""
        return max(b.ne[0] for _, b in self.pairs.values())


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in the file at `path`. Raises InvalidGGUF when it is none, or damaged, and OSError."""
    header = read_header(path)

    def refuse(why: str) -> InvalidGGUF:
        return InvalidGGUF(f"{header.path}: {why}", path=header.path, offset=0)

    if header.metadata.get("general.type") != "adapter" or header.metadata.get("adapter.type") != "lora":
        raise refuse("this is not a LoRA adapter: general.type must be adapter and adapter.type lora")
    if _INVOCATION in header.metadata:
        raise refuse("this is an activated LoRA (aLoRA): it applies only after certain tokens, which is not supported")
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise refuse("general.architecture is missing")
    halves: dict[str, dict[str, Tensor]] = {}
    for tensor in header.tensors:
        if tensor.name.endswith("_norm.weight"):  # llama.cpp passes them over
            continue
        name, half = tensor.name[:-7], tensor.name[-7:]
        if half not in _HALVES:
            raise refuse(f"tensor {tensor.name!r} is neither half of a pair (.lora_a, .lora_b)")
        halves.setdefault(name, {})[half] = tensor
    pairs = {}
    for name, both in halves.items():
        if len(both) != len(_HALVES):
            raise refuse(f"{name} has one half of its pair only")
        a, b = (both[half] for half in _HALVES)
        inner = (a.ne[0], b.ne[0]) if _is_table(name) else (_rows(a), b.ne[0])
        if inner[0] != inner[1]:
            raise refuse(f"the ranks of {name} differ: {inner[0]} and {inner[1]}")
        pairs[name] = (a, b)
    if not pairs:
        raise refuse("the adapter changes nothing: it has no pairs")
    return Adapter(header.path, architecture, pairs)


def _is_table(name: str) -> bool:
    """Rows are looked up, not multiplied by: the pair is the other way round."""
    return name.endswith("token_embd.weight")


def _rows(tensor: Tensor) -> int:
    return tensor.ne[1] if len(tensor.ne) > 1 else 1


def adapted(shape: ModelShape, adapters: Sequence[Adapter]) -> ModelShape:
    """`shape` with `adapters` attached. Raises Rejected for an adapter that llama.cpp refuses, or aborts on."""
    if not adapters:
        return shape
    for adapter in adapters:
        _check(shape, adapter)
    rank = max(adapter.rank for adapter in adapters)
    unlike = len({adapter.rank for adapter in adapters}) > 1  # their order is chance: all are drawn as large as any
    pairs = [_widths(adapter, rank if unlike else 0) for adapter in adapters]
    extra = [half for adapter in adapters for half in _halves(shape, adapter)]
    graph = adapted_graph_model(shape.graph, pairs)
    digest = hashlib.blake2b(shape.fingerprint.encode(), digest_size=16)
    for adapter in adapters:
        digest.update(repr(sorted((t.name, t.type.id, t.ne) for _, t in _matrices(adapter))).encode())
    return replace(
        shape,
        weights=_sum(shape.weights, extra),
        demand=_demand(shape, adapters),
        graph=graph,
        weights_bytes=shape.weights_bytes + sum(t.n_bytes for adapter in adapters for _, t in _matrices(adapter)),
        adapter_weights=tuple(extra),
        n_adapter_pairs=sum(len(adapter.pairs) for adapter in adapters),
        fingerprint=digest.hexdigest(),
    )


def _halves(shape: ModelShape, adapter: Adapter) -> Iterable[WeightSums]:
    """Both halves where the weights lie that they belong to; nothing of them is tied."""
    for half in range(len(_HALVES)):
        tensors = {name: replace(pair[half], name=name) for name, pair in adapter.pairs.items()}
        yield replace(sum_weights(shape.arch, tensors), tied=Padded(), tied_on_host=Padded())


def _matrices(adapter: Adapter) -> Iterable[tuple[str, Tensor]]:
    return ((name, tensor) for name, pair in adapter.pairs.items() for tensor in pair)


def _check(shape: ModelShape, adapter: Adapter) -> None:
    if adapter.architecture != shape.architecture:
        raise Rejected(f"{adapter.path} adapts {adapter.architecture} models, this one is {shape.architecture}")
    is_tied = shape.weights.tied != Padded()
    for name, (a, b) in adapter.pairs.items():
        width = _weight(shape, name)
        if width is None:
            raise Rejected(f"{adapter.path} changes {name}, which the model does not have; it was made for another one")
        if _is_table(name):
            if is_tied and name == "token_embd.weight":
                raise Rejected(
                    f"{adapter.path} changes token_embd.weight, which is this model's output matrix too: llama.cpp "
                    "would end the process; leave the embedding out of the adapter"
                )
            fits = width.ne[0] == _rows(b) and width.ne[1:2] == (_rows(a),)
        else:
            fits = a.ne[0] == width.ne[0] and width.ne[1:2] == (_rows(b),)
        if not fits:
            raise Rejected(f"{adapter.path}: {a.ne} and {b.ne} do not fit {name}, which is {width.ne}")


def _weight(shape: ModelShape, name: str) -> Width | None:
    il, stem = split_name(name)
    if il < 0:
        return shape.graph.rest.get(name)
    known = il < shape.n_layer_all and shape.arch.layers[il].is_loaded
    return shape.graph.layers[il].get(stem) if known else None


def _widths(adapter: Adapter, rank: int) -> dict[str, tuple[Width, Width]]:
    """Shapes of the pairs for the graph, with `rank` in place of their own unless it is 0."""
    widths = {}
    for name, (a, b) in adapter.pairs.items():
        wide = rank or b.ne[0]
        of_a = (wide, *a.ne[1:]) if _is_table(name) else (a.ne[0], wide, *a.ne[2:])
        widths[name] = Width(of_a, a.type), Width((wide, *b.ne[1:]), b.type)
    return widths


def _sum(base: WeightSums, extra: Sequence[WeightSums]) -> WeightSums:
    """All sums together; what is tied or rotates is the model's own."""
    every = (base, *extra)
    return replace(
        base,
        input=sum((sums.input for sums in every), Padded()),
        layers=tuple(sum(layer, Padded()) for layer in zip(*(sums.layers for sums in every), strict=True)),
        experts=tuple(sum(layer, Padded()) for layer in zip(*(sums.experts for sums in every), strict=True)),
        output=sum((sums.output for sums in every), Padded()),
    )


def _demand(shape: ModelShape, adapters: Sequence[Adapter]) -> ModelDemand:
    """The bound with the largest detour over an adapter in every moment."""
    detour = sum(max(b.ne[0] + _rows(b) for _, b in adapter.pairs.values()) for adapter in adapters)
    layers = tuple(
        replace(
            layer,
            feed_forward=layer.feed_forward + detour,
            beside=layer.beside + detour,
            routed=layer.routed + detour if layer.routed else 0,
            attention=layer.attention + detour,
            recurrent=layer.recurrent + detour if layer.recurrent else 0,
        )
        for layer in shape.demand.layers
    )
    return replace(shape.demand, layers=layers, logits=shape.demand.logits + detour)
