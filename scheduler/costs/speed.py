"""How fast a model will be in a layout, and how long it takes to load, before it is loaded.

One token of an answer reads every weight that takes part in it (of the experts, those in use) and the cache so far: the
time is bytes over bandwidth, device after device, and a hop between two. A prompt is arithmetic: two operations per
weight in use and token, unless reading all weights once per micro-batch takes longer. Loading reads the file once.
Kernels, queues and drivers are left out on purpose: `Paces` learns what they cost from what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from scheduler.costs.cache import cache_types
from scheduler.costs.params import ContextParams, Layout, Rates
from scheduler.costs.shape import ModelShape
from scheduler.costs.weights import HOST, assign_layers

HOP_S = 50e-6
"""An activation from one device to the next, synchronisation included; an assumption of this module."""
CACHE_BYTES_PER_S = 2e9
DISK_BYTES_PER_S = 0.5e9
"""What loading gets from the page cache and from a disk before anything was measured: assumptions, too."""
SETTING_UP_S = 0.25
"""A load without its bytes: the same."""


@dataclass(slots=True)
class _Work:
    """What one place does: bytes per token of an answer, bytes per micro-batch of a prompt, operations per token."""

    token_bytes: float = 0.0
    batch_bytes: float = 0.0
    operations: float = 0.0


@lru_cache(maxsize=4096)  # every request is priced in places that were priced before
def seconds_per_token(
    shape: ModelShape, layout: Layout, context: ContextParams, rates: tuple[Rates, ...], host: Rates, n_past: int
) -> tuple[float, float]:
    """Seconds per token of (an answer with `n_past` tokens before it, a long prompt). `rates`: one per device.

    Raises Rejected as `footprint`, and ValueError for rates that are not positive.
    """
    if min(rate for each in (*rates, host) for rate in (each.bytes_per_s, each.flops)) <= 0:
        raise ValueError("a device that reads or computes nothing has no speed")
    places = assign_layers(layout, shape.n_layer_all)
    work = {place: _Work() for place in {*places, HOST}}
    in_use = shape.n_expert_used / shape.n_expert if shape.n_expert else 1.0
    type_k, type_v = cache_types(shape.arch, context)
    for il, kind in enumerate(shape.arch.layers):
        if not kind.is_loaded:
            continue
        stored = shape.stored.layers[kind.runs if kind.runs >= 0 else il]
        here = work[places[il]]
        there = work[HOST] if layout.spills_experts_of(il) else here
        seen = min(n_past, shape.arch.n_swa) if kind.is_swa else n_past
        here.token_bytes += stored.weights + seen * (type_k.row_bytes(kind.k_width) + type_v.row_bytes(kind.v_width))
        here.batch_bytes += stored.weights
        here.operations += 2 * stored.weights_elements
        there.token_bytes += stored.experts * in_use
        there.batch_bytes += stored.experts
        there.operations += 2 * stored.experts_elements * in_use
    last = work[places[-1]]
    last.token_bytes += shape.stored.output or shape.stored.input  # a tied embedding is the output matrix
    last.operations += 2 * shape.n_vocab * shape.n_embd / context.n_ubatch  # only the last token has logits
    hops = sum(places[i] != places[i + 1] for i in range(len(places) - 1))
    experts = (il for il, stored in enumerate(shape.stored.layers) if stored.experts)
    hops += 2 * sum(layout.spills_experts_of(il) and places[il] != HOST for il in experts)
    answer, prompt = hops * HOP_S, hops * HOP_S / context.n_ubatch
    for place, each in work.items():
        rate = host if place == HOST else rates[place]
        answer += each.token_bytes / rate.bytes_per_s
        prompt += max(each.operations / rate.flops, each.batch_bytes / rate.bytes_per_s / context.n_ubatch)
    return answer, prompt


def load_seconds(file_bytes: int, cached_fraction: float, disk_bytes_per_s: float = 0.0) -> float:
    """Seconds to load a file of which the page cache holds `cached_fraction` (0 to 1); a rate of 0 is not known."""
    cached = file_bytes * cached_fraction
    return SETTING_UP_S + cached / CACHE_BYTES_PER_S + (file_bytes - cached) / (disk_bytes_per_s or DISK_BYTES_PER_S)
