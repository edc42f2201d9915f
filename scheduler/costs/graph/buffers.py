"""Compute buffers to the byte, where a template says how the model's graph looks.

llama.cpp reserves a graph for its largest batch and one for one token per sequence, and each backend's buffer is as
large as the greedier of the two asks (`sched_reserve` in src/llama-context.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduler.costs.architecture import Architecture
from scheduler.costs.cache import cache_types, effective_context
from scheduler.costs.graph.allocate import buffer_sizes
from scheduler.costs.graph.blocks import Batch, Build, Hparams, Width
from scheduler.costs.graph.schedule import schedule
from scheduler.costs.graph.templates import TEMPLATES
from scheduler.costs.params import ContextParams, Layout
from scheduler.costs.weights import HOST, pad

PIPELINE_COPIES = 4
"""`GGML_SCHED_MAX_COPIES`: how often inputs exist when several devices work as a pipeline."""
_PINS_BELOW_TOKENS = 32


def exact_compute(
    arch: Architecture,
    hparams: Hparams,
    weights: Mapping[str, Width],
    layout: Layout,
    places: Sequence[int],
    context: ContextParams,
) -> tuple[list[int], int] | None:
    """Compute buffer bytes (per device of the layout, on the host), or None where no template covers the model."""
    draw = TEMPLATES.get(arch.name)
    if draw is None or arch.pools:
        return None
    size = effective_context(arch, context)
    types = cache_types(arch, context)
    n_devices = len(layout.devices)
    whole = HOST not in places
    copies = PIPELINE_COPIES if n_devices > 1 and whole and not layout.experts_on_host else 1
    kinds = [device.kind for device in layout.devices]
    totals = [0] * (n_devices + 1)
    tokens = pad(size.n_tokens, size.n_seq_max)
    for batch in (
        Batch(tokens, size.n_seq_max, min(size.n_tokens, size.n_batch)),
        Batch(size.n_seq_max, size.n_seq_max, size.n_seq_max),
    ):
        build = Build(
            arch, hparams, weights, size, types, context.flash_attn == "on", batch, places, n_devices,
            layout.experts_on_host, pins=whole or batch.tokens < _PINS_BELOW_TOKENS,
        )  # fmt: skip
        draw(build)
        offloads_to = kinds.index("cuda") if context.op_offload and "cuda" in kinds else None
        sizes = buffer_sizes(schedule(build.graph, n_devices, copies, offloads_to), kinds)
        totals = [max(pair) for pair in zip(totals, sizes, strict=True)]
    return totals[:-1], totals[-1]
