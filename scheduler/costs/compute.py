"""Compute buffers: a bound in closed form that no load exceeds.

llama.cpp reserves one graph for its largest batch and packs the intermediate results into one buffer per device,
reusing space as results die. The peak is that of the greediest moment, so the bound is: inputs + the largest moment of
any layer on the device, or the logits. Nothing depends on weight types nor on how many layers a device holds, only on
their kinds. Several devices without anything on the host work as a pipeline: then every input exists four times.

Sources in llama.cpp: `sched_reserve` and `graph_reserve` in src/llama-context.cpp, `build_attn_inp_*` in
src/llama-graph.cpp, ggml/src/ggml-backend.cpp (splits, copies), ggml/src/ggml-alloc.c (packing). docs/costs.md has the
figures: how far above llama.cpp's own numbers the bound lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from scheduler.costs.architecture import Architecture
from scheduler.costs.cache import EffectiveContext, cache_types, effective_context
from scheduler.costs.demand import ModelDemand
from scheduler.costs.ggml_types import GgmlType
from scheduler.costs.params import ContextParams, Layout
from scheduler.costs.weights import HOST, WeightSums, pad

PIPELINE_COPIES = 4
"""`GGML_SCHED_MAX_COPIES`."""
MORE_HOLES = 12
"""And one part in so many more where only some layers have their experts in host RAM: 5 % was seen."""
HOLES = 32
"""One part in so many is added for holes, where layers lie on the host as well: up to one in fifty was seen."""
_SMALL_INPUTS_BYTES = 1536
"""Padding of each input, and the indices of recurrent states."""
_GATHERS_UP_TO_TOKENS = 16
"""So few tokens attend to copies of the cells that the indexer of glm5-next has chosen."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """One reserved graph: the model, its context and the batch."""

    arch: Architecture
    demand: ModelDemand
    size: EffectiveContext
    tokens: int
    flash: bool
    type_k: GgmlType
    type_v: GgmlType
    rotation_bytes: int
    f16_copies: bool

    def floats(self, per_token: int) -> int:
        return 4 * self.tokens * per_token

    @property
    def logits_bytes(self) -> int:
        """All that are computed at once, with what the output matrix needs besides."""
        return 4 * self.size.n_outputs * self.demand.logits * (1 if self.arch.known else 2)

    def cells(self, is_swa: bool) -> int:
        if not self.arch.has_cache or self.arch.row.idle_cache:
            return self.tokens
        return self.size.n_swa_cells if is_swa else self.size.n_ctx_seq

    def seen(self, is_swa: bool) -> int:
        """Cells that a layer attends to; the decoder of t5 attends to the encoder's results as well."""
        cells = self.cells(is_swa)
        return max(cells, self.arch.n_ctx_train) if self.arch.name == "t5" else cells

    def inputs(self, layers: Iterable[int], with_output: bool) -> int:
        """Bytes of the inputs that these layers read: masks, cell indices, positions, rows to output."""
        masks = {layer.is_swa for layer in map(self.arch.layers.__getitem__, layers) if layer.is_attention}
        total = self.floats(self.arch.n_pos + self.arch.row.scaled_by_position) + _SMALL_INPUTS_BYTES
        if self.arch.state_s or self.arch.state_r:
            total += 32768 + 4 * self.size.n_seq_max * self.arch.state_r
        for is_swa in masks:
            indices = 8 + (0 if self.arch.mla else 8 if self.flash else 8 * self.arch.v_width_max)
            total += self.tokens * (self.cells(is_swa) * (2 if self.flash else 4) + indices) + self.rotation_bytes
        if self.arch.index_heads or not self.arch.known:
            total += self.tokens * (self.cells(False) * (4 if self.arch.known else 32) + 16)
        total += self.floats(round(self.arch.row.index_inputs * self.cells(False)))
        if self.arch.row.bucketed:
            total += self.floats(self.seen(False))
        if self.arch.name == "t5":  # what the encoder has made of the question
            total += self.arch.n_ctx_train * 4 * self.arch.n_embd + self.floats(self.arch.n_ctx_train)
        if self.arch.name == "minimax-01":
            total += self.floats(self.tokens * max(layer.n_head for layer in self.arch.layers) + 64)
        return total + (self.floats(1) if with_output else 0)

    def attention(self, il: int) -> int:
        """Bytes alive while layer `il` attends."""
        layer, kind = self.demand.layers[il], self.arch.layers[il]
        if not kind.is_attention:
            return 0
        total = self.floats(layer.attention)
        if not self.flash and any(each.shared for each in self.demand.layers):  # holes that nothing fits
            total += self.floats(2 * self.arch.n_embd)
        cells = self.seen(kind.is_swa)
        if self.arch.row.bucketed:
            total += self.floats(5 * cells * kind.n_head)  # a bias by distance, for every head, beside the scores
        if layer.score_heads and (not self.flash or layer.always_scores):
            total += self.floats(cells * layer.score_heads) + 2 * cells * self.size.n_stream * layer.value_cells
        if self.rotation_bytes:
            total += self.floats(kind.n_head * self.arch.n_head_k + kind.k_width + kind.v_width)
        if self.flash and self.f16_copies:
            total += 2 * cells * self.size.n_stream * (kind.k_width + (kind.v_width or kind.k_width))
        if self.arch.name == "glm5-next":
            few = self.tokens if self.tokens <= _GATHERS_UP_TO_TOKENS else self.size.n_seq_max
            total += 4 * 4 * few * cells * kind.k_width
        return total + self.floats(cells * layer.index)

    def cache(self, il: int) -> int:
        """Bytes of what layer `il` has stored, as far as it is read."""
        kind = self.arch.layers[il]
        n_states = self.size.n_seq_max * (1 + self.size.n_rs_seq)
        total = 4 * n_states * (self.arch.state_r + self.arch.state_s) if kind.is_recurrent else 0
        if self.arch.has_cache and kind.is_attention:
            cells = self.cells(kind.is_swa) * self.size.n_stream
            total += cells * (self.type_k.row_bytes(kind.k_width) + self.type_v.row_bytes(kind.v_width)) + 256
        return total

    def moment(self, il: int, experts_away: bool = False) -> int:
        """Bytes alive in the greediest moment of layer `il`."""
        layer = self.demand.layers[il]
        away = experts_away and layer.routed > 0
        feed = layer.beside + layer.returned if away else layer.feed_forward
        if self.rotation_bytes:
            feed += self.arch.layers[il].n_head * self.arch.n_head_k
        recurrent = self.floats(layer.recurrent) + 4 * self.size.n_seq_max * layer.state
        if recurrent:  # the new states are computed with their copies, and then put away
            recurrent += 4 * self.size.n_seq_max * self.size.n_rs_seq * self.arch.state_s
        if recurrent and self.arch.name == "minimax-01":
            recurrent += self.floats(4 * self.tokens * self.arch.layers[il].n_head + 28 * self.arch.n_embd)
        attention = self.attention(il) + (self.floats(2 * self.arch.n_embd + layer.returned) if away else 0)
        if layer.recurrent and attention:  # both in one layer, side by side
            return max(self.floats(feed), attention + recurrent)
        return max(self.floats(feed + (self.demand.streams - 1) * 6 * self.arch.n_embd), attention, recurrent)

    def logits(self, hole: int, experts_away: bool = False) -> int:
        """Bytes alive at the end of the graph, where masks of `hole` bytes at the bottom have been freed.

        Best-fit gives the last layer's result the hole that the first activation left, unless that is still read, or
        larger results nest in the masks' hole first and leave a remainder that fits better: then the result, and the
        logits after it, lie above them.
        """
        last = self.demand.layers[-1]
        free = hole // self.floats(1)
        nested = 3 * last.inner + last.gathered
        below = (4 + (self.demand.streams - 1) * 6) * self.arch.n_embd + 8
        if experts_away:
            below += last.returned // 2
        elif last.above_masks or (last.shared and free < nested):
            below += 3 * self.arch.n_embd + free + (last.gathered if 2 * last.inner >= last.gathered else 0)
        elif free >= nested:
            below += nested + 2 * self.arch.n_embd if last.shared or free - nested < 3 * last.inner else 0
        elif nested and free >= 2 * last.inner:
            below += free
        elif 2 * last.inner >= last.gathered:
            below += last.gathered
        below += self.demand.beside_logits
        total = self.logits_bytes + self.floats(self.arch.n_embd + below) + _SMALL_INPUTS_BYTES
        total += 8 * self.size.n_seq_max * self.arch.state_r
        states = self.demand.layers if self.arch.name.startswith("nemotron_h") else (last,)
        return total + max(self.floats(layer.recurrent) + 4 * self.size.n_seq_max * layer.state for layer in states)

    def followed(self, il: int) -> int:
        """Bytes of a cache on the host that go to the device of the layer after `il`: where some layers carry a state,
        the last to attend before it may do so there."""
        if not any(kind.is_recurrent for kind in self.arch.layers):
            return 0
        before = [j for j in range(il + 1) if self.arch.layers[j].is_attention]
        return (
            self.cache(before[-1]) + self.inputs(before[-1:], False) + self.floats(6 * self.arch.n_embd)
            if before
            else 0
        )

    def unfolded(self, layers: Iterable[int]) -> int:
        """Bytes of what these layers' convolutions read, once for every copy of their states: a device that computes
        for the host sends it back for each."""
        if not any(self.arch.layers[il].is_recurrent for il in layers):
            return 0
        return self.size.n_rs_seq * (self.floats(self.arch.conv_width) + 4 * self.size.n_seq_max * self.arch.state_r)

    def borrowed(self, il: int, places: Sequence[int]) -> int:
        """Bytes of another layer's cache that layer `il` reads across devices: copied whole, for every such layer."""
        source = self.arch.kv_source(il)
        return 0 if source == il or places[source] == places[il] else self.cache(source)


def place_compute(
    arch: Architecture,
    demand: ModelDemand,
    weights: WeightSums,
    layout: Layout,
    places: Sequence[int],
    context: ContextParams,
) -> tuple[list[int], int]:
    """Compute buffer bytes (per device of the layout, on the host)."""
    size = effective_context(arch, context)
    type_k, type_v = cache_types(arch, context)
    rotated = [head for of, head in ((type_k, arch.n_head_k), (type_v, arch.n_head_v)) if of.is_quantized]
    graph = _Graph(
        arch=arch,
        demand=demand,
        size=size,
        tokens=pad(size.n_tokens, size.n_seq_max),
        flash=context.flash_attn == "on" and arch.name != "grok",
        type_k=type_k,
        type_v=type_v,
        rotation_bytes=sum(4 * (head & -head) ** 2 for head in rotated if head % 64 == 0),
        f16_copies=(type_k.name, type_v.name) != ("f16", "f16"),
    )
    layers: dict[int, list[int]] = {}
    for il, place in enumerate(places[:-1]):
        layers.setdefault(place, []).append(il)
    pipelined = len(layout.devices) > 1 and HOST not in places and not layout.spills_experts
    copies = PIPELINE_COPIES if pipelined else 1
    devices = _devices(graph, layout, places, layers, copies)
    if context.op_offload and layout.devices and layout.devices[0].kind == "cuda":
        devices[0] = max(devices[0], _offloaded(graph, weights, layout, places, layers))
    host = _host(graph, layout, places, layers, copies)
    if context.op_offload and any(device.kind == "cuda" for device in layout.devices):
        host += graph.unfolded(layers.get(HOST, []))
    if layout.n_cpu_moe:  # where layers differ in where their experts are, holes fit the next layer less well
        return [_with_holes(total + total // MORE_HOLES) for total in devices], _with_holes(host)
    if HOST in places or layout.spills_experts:
        return [_with_holes(total) for total in devices], _with_holes(host)
    return devices, host


def _with_holes(total: int) -> int:
    return total + total // HOLES if total else 0


def _run_elsewhere(graph: _Graph, places: Sequence[int], copies: int) -> dict[int, int]:
    """Floats per token that reach a place because layers run there whose cache or weights lie elsewhere.

    They stay where everything is copied for a pipeline; else they make room for those of the next layer.
    """
    arriving: dict[int, list[int]] = {}
    for il, kind in enumerate(graph.arch.layers):
        weights = places[kind.runs] if kind.runs >= 0 else places[il]
        if weights != places[il]:
            heads = kind.n_head * max(kind.head_k, kind.head_v)
            width = heads + (6 if graph.arch.name == "hrm_text" else 3) * graph.arch.n_embd
            arriving.setdefault(places[il], []).append(width + kind.k_width + kind.v_width)
            arriving.setdefault(weights, []).append(width)
    return {place: copies * sum(each) if copies > 1 else 2 * max(each) for place, each in arriving.items()}


def _devices(
    graph: _Graph, layout: Layout, places: Sequence[int], layers: dict[int, list[int]], copies: int
) -> list[int]:
    totals = [0] * len(layout.devices)
    used = sorted(set(places) - {HOST})
    e = graph.arch.n_embd
    elsewhere = _run_elsewhere(graph, places, copies)
    for place in used:
        here = layers.get(place, [])
        with_output = places[-1] == place
        cuda = layout.devices[place].kind == "cuda"
        device_graph = graph if cuda or not graph.f16_copies else _without_f16_copies(graph)
        inputs = graph.inputs(here, with_output)
        moments = [device_graph.moment(il, layout.spills_experts_of(il)) for il in here]
        if here and here[0] > 0 and places[here[0] - 1] == HOST:  # steps without weights follow the device
            before = graph.demand.layers[here[0] - 1]
            moments.append(max(moments) + graph.floats((5 if before.gathered else 2) * e))
            moments.append(graph.floats(4 * e + before.returned))
            il = here[0] - 1
            moments.append(device_graph.moment(il, layout.spills_experts_of(il)) + graph.followed(il))
        end = 0
        if with_output:
            hole = inputs if copies == 1 else 0
            end = graph.floats(5 * e) if graph.demand.logits_on_host else graph.logits(hole, layout.spills_experts)
        inputs += sum(graph.borrowed(il, places) for il in here)
        if copies == 1:
            total = max(max(moments, default=0) + inputs, end + graph.floats(graph.demand.per_layer_inputs))
        else:
            later = place != used[0]
            arriving = graph.demand.streams * e + graph.demand.host_lookups
            arriving += graph.demand.per_layer_inputs if later else 0
            if later and graph.arch.name == "minimax-m3":  # masks of what the indexer has chosen
                arriving += 4 * graph.cells(False)
            if later and graph.arch.name in ("deepseek4", "hy_v4"):
                arriving += graph.demand.streams * e
            if graph.arch.name == "graniteswitch":  # which adapter a token takes is found out behind the last layer
                arriving += 4 * graph.arch.n_head_k
            if later and graph.arch.row.bucketed:
                arriving += graph.seen(False) * graph.arch.layers[0].n_head
            total = copies * (inputs + graph.floats(arriving)) + max(max(moments, default=0), end)
            if later:
                # only `no_alloc` counts this, a real load does without; it keeps the bound above both
                total += copies * graph.floats(e * graph.demand.streams)
        if place != used[0] and graph.demand.borrows_index(here):
            total += copies * graph.floats(3 * graph.cells(False))
        total += graph.floats(elsewhere.get(place, 0))
        totals[place] = total + graph.floats(3 * graph.demand.per_layer_inputs)
    return totals


def _without_f16_copies(graph: _Graph) -> _Graph:
    return replace(graph, f16_copies=False)


def _offloaded(
    graph: _Graph, weights: WeightSums, layout: Layout, places: Sequence[int], layers: dict[int, list[int]]
) -> int:
    """Bytes on the first device when it multiplies by weights that lie in host RAM: a weight, what it is multiplied by,
    and the cache of the layer, for the steps between two products follow them to the device."""
    total = 0
    for il in layers.get(HOST, []):
        largest = max(weights.largest_layer_tensor_bytes[il], weights.largest_expert_tensor_bytes[il])
        total = max(
            total, graph.moment(il) + 2 * graph.cache(il) + 2 * pad(largest, 128) + graph.floats(4 * graph.arch.n_embd)
        )
    if layout.spills_experts:
        at_once = 2 if layout.n_cpu_moe or len(layout.devices) > 1 else 1  # of two layers, as they follow each other
        total = max(
            [total]
            + [
                graph.moment(il)
                + graph.floats(layer.feed_forward)
                + at_once * pad(weights.largest_expert_tensor_bytes[il], 128)
                for il, layer in enumerate(graph.demand.layers)
                if layer.routed and layout.spills_experts_of(il)
            ]
        )
    if places[-1] == HOST and graph.demand.logits:
        at_end = graph.logits_bytes + graph.floats(graph.demand.beside_logits + 4 * graph.arch.n_embd)
        total = max(total, at_end + pad(weights.output_tensor_bytes, 128))
    if total:
        total += graph.inputs(range(graph.arch.n_layer_all), True)
    return total


def _host(graph: _Graph, layout: Layout, places: Sequence[int], layers: dict[int, list[int]], copies: int) -> int:
    e = graph.arch.n_embd
    every = graph.inputs(range(graph.arch.n_layer_all), True)
    every += sum(graph.borrowed(il, places) for il in layers.get(HOST, []))
    every += graph.floats(_run_elsewhere(graph, places, 1).get(HOST, 0))
    start = graph.floats(e + 1 + graph.demand.host_lookups + (8 if graph.demand.per_layer_inputs else 0))
    total = copies * (every + graph.floats(e + 1)) + start
    moments = [graph.moment(il) + graph.floats(3 * graph.demand.per_layer_inputs) for il in layers.get(HOST, [])]
    moments += [
        graph.floats(2 * e + layer.routed + layer.gathered)
        for il, layer in enumerate(graph.demand.layers)
        if layer.routed and layout.spills_experts_of(il)
    ]
    if moments:
        streams = graph.demand.streams if graph.arch.name == "deepseek4" else 0
        total = max(total, every + start + max(moments) + graph.floats(streams * e))
    if graph.demand.logits_on_host and copies > 1:
        return total + graph.logits(0)
    if places[-1] == HOST or graph.demand.logits_on_host:
        total = max(total, start + graph.logits(every) + min(every, graph.floats(4 * e)))
    return total
