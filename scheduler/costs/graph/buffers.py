"""Compute buffers to the byte, where a template says how the model's graph looks.

llama.cpp reserves a graph for its largest batch and one for one token per sequence, and each backend's buffer is as
large as the greedier of the two asks (`sched_reserve` in src/llama-context.cpp).

Like layers that follow each other leave the same holes, or a few sets of holes by turns: the allocator goes round in a
cycle. So whole cycles are left out of long rows before the graph is drawn, and layouts that differ in no other way
share one answer. Graphs are drawn whole where layers of several kinds take turns, where CUDA copies weights over from
the host, and for architectures that do not settle like that.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import TypeVar

from scheduler.costs.cache import cache_types, effective_context
from scheduler.costs.graph.allocate import buffer_sizes
from scheduler.costs.graph.blocks import Build
from scheduler.costs.graph.drawing import Batch
from scheduler.costs.graph.model import GraphModel
from scheduler.costs.graph.nodes import Undrawable
from scheduler.costs.graph.schedule import schedule
from scheduler.costs.graph.templates import TEMPLATES
from scheduler.costs.params import ContextParams, DeviceKind, Layout
from scheduler.costs.weights import HOST, pad

T = TypeVar("T")

PIPELINE_COPIES = 4
"""`GGML_SCHED_MAX_COPIES`: how often inputs exist when several devices work as a pipeline."""
_PINS_BELOW_TOKENS = 32
_REPEATS = 3
"""How many of a row of like layers are drawn: one after something else, one before, one between."""
_CYCLE_WITH_EXPERTS = 6
"""Layers after which results lie where they lay before, where it may be two or three; without experts, as `settles`."""
_DWARFS = 32
"""A batch so many times larger than one token per sequence asks for more in every buffer, if run in the same places."""
_REMEMBERED = 4096


@lru_cache(maxsize=_REMEMBERED)
def has_template(model: GraphModel) -> bool:
    """Whether the model's graph can be drawn: its architecture has a template, and the weights are those it names."""
    arch = model.arch
    undrawn = arch.name == "deepseek2" and (model.hparams.scales_attention or not arch.mla)
    if arch.name not in TEMPLATES or undrawn:
        return False
    try:
        for context in (ContextParams(n_ctx=256), ContextParams(n_ctx=256, flash_attn="off")):
            exact_compute(model, Layout(), (HOST,) * (arch.n_layer_all + 1), context)
    except (Undrawable, ArithmeticError, LookupError, ValueError):  # a file may claim anything
        return False
    return True


def exact_compute(
    model: GraphModel, layout: Layout, places: Sequence[int], context: ContextParams
) -> tuple[list[int], int]:
    """Compute buffer bytes (per device of the layout, on the host) of a model that has a template.

    Raises Undrawable where these devices compute it in another way than the template knows.
    """
    arch = model.arch
    cache_types(arch, context)  # refuses what llama.cpp refuses
    kinds = tuple(device.kind for device in layout.devices)
    offloads = context.op_offload and "cuda" in kinds and (HOST in places or layout.spills_experts)
    alike = model.same if offloads else model.alike
    loaded = sum(layer.is_loaded for layer in arch.layers)
    drawn = [(alike[il], places[il], layout.spills_experts_of(il)) for il in range(loaded)]
    if arch.row.settles and not offloads:  # copied weights leave holes that wander from layer to layer
        drawn = shortened(drawn, _CYCLE_WITH_EXPERTS if arch.n_expert else arch.row.settles)
    whole = HOST not in places
    totals = _reserved(model, tuple(drawn), places[-1], whole, offloads, kinds, context)
    return list(totals[:-1]), totals[-1]


def shortened(row: Sequence[T], cycle: int) -> list[T]:
    """`row` with `_REPEATS` or a few more of what is repeated more often: as many more as leaves whole cycles out."""
    kept: list[T] = []
    for _, group in groupby(row):
        alike = list(group)
        left_out = max(0, len(alike) - _REPEATS) // cycle * cycle
        kept += alike[left_out:]
    return kept


@contextmanager
def _without_collections() -> Iterator[None]:
    """A graph is thousands of objects that all go at once. Searching them for cycles takes as long as drawing them: 24
    layers with experts take 55 ms instead of 30, and 270 where all objects of the process are searched."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@lru_cache(maxsize=_REMEMBERED)
def _reserved(
    model: GraphModel,
    drawn: tuple[tuple[int, int, bool], ...],
    output: int,
    whole: bool,
    offloads: bool,
    kinds: tuple[DeviceKind, ...],
    context: ContextParams,
) -> list[int]:
    """Bytes per backend for these layers of `model`, each where it says, the experts in host RAM if it says so.

    `whole`: nothing is left on the host. `offloads`: a device takes over large products from the host.
    """
    size = effective_context(model.arch, context)
    types = cache_types(model.arch, context)
    host = len(kinds)
    layers = tuple(il for il, _, _ in drawn)
    row = replace(
        model,
        arch=replace(model.arch, layers=tuple(model.arch.layers[il] for il in layers)),
        layers=tuple(model.layers[il] for il in layers),
    )
    places = [host if place == HOST else place for _, place, _ in drawn] + [host if output == HOST else output]
    experts_on_host = tuple(spilled for _, _, spilled in drawn)
    copies = PIPELINE_COPIES if host > 1 and whole and not any(experts_on_host) else 1
    offloads_to = kinds.index("cuda") if offloads else None
    totals = [0] * (host + 1)
    batches = [Batch(pad(size.n_tokens, size.n_seq_max), size.n_seq_max, size.n_outputs)]
    if offloads or batches[0].tokens < _DWARFS * size.n_seq_max or model.arch.row.gathers:
        batches.append(Batch(size.n_seq_max, size.n_seq_max, size.n_seq_max))
    if model.arch.row.alone_too and size.n_seq_max > 1:
        batches.append(Batch(size.n_tokens, 1, batches[0].outputs))
    for batch in batches:
        pins = whole or batch.tokens < _PINS_BELOW_TOKENS
        flash, embeds = context.flash_attn == "on", context.embeddings
        build = Build(row, size, types, flash, batch, places, host, experts_on_host, embeds, "cuda" in kinds, pins)
        with _without_collections():
            TEMPLATES[model.arch.name](build)
            sizes = buffer_sizes(schedule(build.graph, host, copies, offloads_to), kinds)
            build.graph.take_apart()
        totals = [max(pair) for pair in zip(totals, sizes, strict=True)]
    return totals
