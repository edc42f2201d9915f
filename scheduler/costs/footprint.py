"""What a model costs on given devices: the one function that placement asks.

Weights, cache, state and the logits buffer are exact to the byte; compute buffers too where a template draws the
model's graph as the machine's release of llama-cpp-python does (`build`, as in `NodeFacts.llama_build`; see `checked`),
else they are a bound that no load exceeds. It takes a quarter of a millisecond for a model of 80 layers, and some
milliseconds the first time a graph is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from scheduler.costs import cache
from scheduler.costs.cache import EffectiveContext, output_bytes, place_cache
from scheduler.costs.checked import verdict
from scheduler.costs.compute import place_compute
from scheduler.costs.graph.buffers import exact_compute, has_template
from scheduler.costs.graph.model import filled_graph_model
from scheduler.costs.graph.nodes import Undrawable
from scheduler.costs.params import ContextParams, DeviceBytes, DeviceKind, DeviceSpec, Footprint, HostBytes, Layout
from scheduler.costs.predictor import Predictor
from scheduler.costs.shape import ModelShape
from scheduler.costs.weights import Padded, assign_layers, place_weights
from scheduler.errors import Rejected


def effective_context(shape: ModelShape, context: ContextParams) -> EffectiveContext:
    """What `context` gets after llama.cpp's rounding; `n_ctx_seq` is what one slot really has.

    Raises Rejected for values that llama.cpp would refuse.
    """
    return cache.effective_context(shape.arch, context)


def computes_exactly(shape: ModelShape, build: str) -> bool:
    """Whether the compute bytes of `footprint` are llama.cpp's own, and not a bound that no load exceeds."""
    return verdict(shape.architecture, build) == "exact" and has_template(shape.graph)


def is_verified(shape: ModelShape, build: str) -> bool:
    """Whether a load is known to take no more than the formulas say: they were compared with this release of
    llama-cpp-python, and held for this architecture."""
    return verdict(shape.architecture, build) in ("exact", "bounded")


def with_mtp(shape: ModelShape) -> ModelShape:
    """`shape` with its prediction layers loaded (`load_mtp`). Raises Rejected where it has none that llama.cpp runs."""
    marked = hashlib.blake2b(f"{shape.fingerprint} with its prediction layers".encode(), digest_size=16)
    return replace(shape, weights=_predictor(shape).weights, fingerprint=marked.hexdigest())


def mtp_footprint(shape: ModelShape, layout: Layout, context: ContextParams) -> Footprint:
    """What a second context that runs the prediction layers takes besides the first; weights are `with_mtp`'s.

    Cache and logits are exact, compute buffers a bound. Raises Rejected as `with_mtp` and `footprint`.
    """
    predictor = _predictor(shape)
    places = assign_layers(layout, shape.n_layer_all)
    kv, host_kv = place_cache(predictor.arch, layout, places, context)
    compute, host_compute = place_compute(predictor.arch, predictor.demand, predictor.weights, layout, places, context)
    return Footprint(
        devices=tuple(DeviceBytes(0, k, c) for k, c in zip(kv, compute, strict=True)),
        host=HostBytes(0, host_kv, host_compute, output_bytes(predictor.arch, shape.n_vocab, context)),
    )


def _predictor(shape: ModelShape) -> Predictor:
    if shape.predictor is None:
        raise Rejected(
            f"this {shape.architecture} model has no prediction layers that llama.cpp can run: leave out draft-mtp"
        )
    if (count := len(shape.arch.predictors)) > 1 and not shape.arch.row.chains:  # it would end the process
        raise Rejected(
            f"this {shape.architecture} model has {count} prediction layers, and llama.cpp runs a single one of such "
            "models: leave out draft-mtp"
        )
    return shape.predictor


def grows(shape: ModelShape) -> bool:
    """Whether a replica's compute buffers are larger after its cache has been filled than after the load."""
    return shape.arch.row.grows


def filled_footprint(shape: ModelShape, layout: Layout, context: ContextParams, build: str) -> Footprint:
    """`footprint` once every cell of the cache is in use: larger than after the load where a model's buffers `grow`.

    The bound knows nothing of that growth, so where it is what counts, it is no less than what the template draws.
    """
    if not grows(shape):
        return footprint(shape, layout, context, build)
    filled = replace(shape, graph=filled_graph_model(shape.graph))
    if computes_exactly(shape, build):
        return footprint(filled, layout, context, build)
    bound, drawn = bounded_footprint(shape, layout, context), drawn_footprint(filled, layout, context)
    return _larger(bound, drawn) if drawn else bound


def _larger(cost: Footprint, other: Footprint) -> Footprint:
    """`cost` with the larger compute buffer of both in each place."""
    devices = (
        replace(ours, compute_bytes=max(ours.compute_bytes, theirs.compute_bytes))
        for ours, theirs in zip(cost.devices, other.devices, strict=True)
    )
    host_bytes = max(cost.host.compute_bytes, other.host.compute_bytes)
    return Footprint(tuple(devices), replace(cost.host, compute_bytes=host_bytes))


def footprint(shape: ModelShape, layout: Layout, context: ContextParams, build: str) -> Footprint:
    """Bytes per device of `layout` and in host RAM, once a machine with this build of llama-cpp-python has loaded the
    model and made its context.

    Raises Rejected for combinations that llama.cpp refuses or aborts on, naming the way out.
    """
    drawn = drawn_footprint(shape, layout, context) if computes_exactly(shape, build) else None
    return drawn or bounded_footprint(shape, layout, context)


def drawn_footprint(shape: ModelShape, layout: Layout, context: ContextParams) -> Footprint | None:
    """`footprint` with compute buffers as the template draws them, whatever the build; None where there is no template,
    or it does not know how these devices compute the model."""
    if not has_template(shape.graph):
        return None
    places = assign_layers(layout, shape.n_layer_all)
    try:
        compute = exact_compute(shape.graph, layout, places, context)
    except Undrawable:
        return None
    return _footprint(shape, layout, places, context, compute)


def bounded_footprint(shape: ModelShape, layout: Layout, context: ContextParams) -> Footprint:
    """`footprint` with the bound on compute buffers for every architecture and build: higher, but no graph has to be
    drawn."""
    places = assign_layers(layout, shape.n_layer_all)
    compute = place_compute(shape.arch, shape.demand, shape.weights, layout, places, context)
    return _footprint(shape, layout, places, context, compute)


def layer_bytes(shape: ModelShape, context: ContextParams, kind: DeviceKind, n_cpu_moe: int) -> tuple[int, ...]:
    """Weights and cache of each layer on such a device, and last the output's, with the experts of the first
    `n_cpu_moe` layers in host RAM; without what a device has once, however many layers it holds (RoPE factors).

    Raises Rejected as `footprint`.
    """
    places = range(shape.n_layer_all + 1)
    layout = Layout((DeviceSpec("", kind),) * len(places), n_cpu_moe=n_cpu_moe)
    weights, _ = place_weights(replace(shape.weights, rope=Padded()), layout, places)
    cache, _ = place_cache(shape.arch, layout, places, context)
    return tuple(map(sum, zip(weights, cache, strict=True)))


def _footprint(
    shape: ModelShape,
    layout: Layout,
    places: Sequence[int],
    context: ContextParams,
    computing: tuple[Sequence[int], int],
) -> Footprint:
    weights, host_weights = place_weights(shape.weights, layout, places)
    kv, host_kv = place_cache(shape.arch, layout, places, context)
    compute, host_compute = computing
    return Footprint(
        devices=tuple(DeviceBytes(w, k, c) for w, k, c in zip(weights, kv, compute, strict=True)),
        host=HostBytes(host_weights, host_kv, host_compute, output_bytes(shape.arch, shape.n_vocab, context)),
    )
