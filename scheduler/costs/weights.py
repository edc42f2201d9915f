"""Where llama.cpp puts the weights of a layout, to the byte.

Input tensors stay in host RAM, layer `il` goes where `tensor_split` sends it, the output is layer `n_layer_all`. Every
tensor is padded as its buffer type pads. Sums are made per layer once (`sum_weights`), so that placing a layout costs
one addition per layer. Sources in llama.cpp: `load_tensors` in src/llama-model.cpp, `create_tensor` in
src/llama-model-loader.cpp, `LLM_TENSOR_INFOS` in src/llama-arch.cpp, get_alloc_size in ggml/src/ggml-cuda/ggml-cuda.cu.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from scheduler.costs.architecture import Architecture
from scheduler.costs.header import Tensor
from scheduler.costs.params import DeviceKind, Layout
from scheduler.errors import Rejected
from scheduler.units import GIB

_EXPERTS_PATTERN = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
"""The expert tensors of a layer (`LLM_FFN_EXPS_REGEX` in common/common.h)."""

HOST = -1
"""The device index that means host RAM."""

_ALIGNMENT = {"host": 32, "rpc": 32, "cuda": 128}
_CUDA_ROW = 512

_INPUT = frozenset({"token_embd", "position_embd", "token_types", "per_layer_token_embd"})
_OUTPUT = re.compile(
    r"output|output_norm|(dec|enc)\.output_norm|cls(\.output|\.norm)?|dense_[23]|altup(_unembd)?_proj|output_hc_\w+"
    r"|output_res_score|nextn\.post_projection|fc|d2t|markov_w[12]|conf_proj|selector_\w+"
)
_LAYER = re.compile(r"(?:(?:enc\.|dec\.)?blk|posnet|convnext)\.(\d+)\.(.+)")
_ROPE = frozenset({"rope_freqs", "rope_factors_long", "rope_factors_short"})
_UNUSED = re.compile(r"masked_embd_\w+|dec\.blk\.\d+\.cross_attn_rel_b")
_EXPERTS = re.compile(_EXPERTS_PATTERN)
_LAZY_BYTES = 4 * GIB


@dataclass(frozen=True, slots=True)
class Padded:
    """Bytes as the two families of buffer types pad them: host and RPC devices, CUDA devices."""

    plain: int = 0
    cuda: int = 0

    def __add__(self, other: Padded) -> Padded:
        return Padded(self.plain + other.plain, self.cuda + other.cuda)

    def on(self, kind: DeviceKind) -> int:
        return self.cuda if kind == "cuda" else self.plain


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """Bytes of one layer as the file stores them."""

    weights: int
    """Without its experts."""
    experts: int
    weights_elements: int
    experts_elements: int


@dataclass(frozen=True, slots=True)
class StoredSums:
    """Bytes as the file stores them: before the layers, in each, after them."""

    input: int
    layers: tuple[StoredLayer, ...]
    output: int


def sum_stored(arch: Architecture, tensors: Mapping[str, Tensor]) -> StoredSums:
    """Add up what the file holds, prediction layers included."""
    inputs = outputs = 0
    n = arch.n_layer_all
    weights, experts = ([0] * n, [0] * n), ([0] * n, [0] * n)  # bytes, elements
    for tensor in tensors.values():
        match = _LAYER.fullmatch(tensor.name)
        if match:
            into = experts if _EXPERTS.search(tensor.name) else weights
            il = min(int(match[1]), n - 1)
            into[0][il] += tensor.n_bytes
            into[1][il] += prod(tensor.ne)
        elif _OUTPUT.fullmatch(_stem(tensor.name)):
            outputs += tensor.n_bytes
        else:
            inputs += tensor.n_bytes
    return StoredSums(inputs, tuple(map(StoredLayer, weights[0], experts[0], weights[1], experts[1])), outputs)


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0] if name.endswith((".weight", ".bias", ".scale")) else name


@dataclass(frozen=True, slots=True)
class WeightSums:
    """Padded bytes by what decides their place."""

    input: Padded
    layers: tuple[Padded, ...]
    """Per layer, without its experts."""
    experts: tuple[Padded, ...]
    output: Padded
    tied: Padded
    """The token embedding again, where it serves as output matrix on a device; zero when the output is its own."""
    tied_on_host: Padded
    """The same, where the output stays on the host: zero, but for architectures that make the copy there too."""
    rope: Padded
    """RoPE factors: one copy on every device that holds a layer of `rope_layers`."""
    rope_layers: tuple[bool, ...]
    experts_bytes: int
    largest_layer_tensor_bytes: tuple[int, ...]
    """Per layer, its largest matrix without experts."""
    largest_expert_tensor_bytes: tuple[int, ...]
    output_tensor_bytes: int


def pad(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment


def padded(tensor: Tensor) -> Padded:
    """Bytes of `tensor` in a host or RPC buffer, and in a CUDA buffer, where quantised rows are padded to 512."""
    size = tensor.n_bytes
    rest = tensor.ne[0] % _CUDA_ROW
    extra = tensor.type.row_bytes(_CUDA_ROW - rest) if tensor.type.is_quantized and rest else 0
    return Padded(pad(size, _ALIGNMENT["host"]), pad(size + extra, _ALIGNMENT["cuda"]))


def kv_bytes(row_bytes: int, row_pad_bytes: int, rows: int, kind: DeviceKind | None) -> int:
    """A cache tensor of `rows` rows; `row_pad_bytes` is what CUDA adds once for a quantised row."""
    if kind == "cuda":
        return pad(row_bytes * rows + row_pad_bytes, _ALIGNMENT["cuda"])
    return pad(row_bytes * rows, _ALIGNMENT["host"])


def sum_weights(arch: Architecture, tensors: Mapping[str, Tensor], *, load_mtp: bool = False) -> WeightSums:
    """Sort the tensors by place and add up their padded sizes; with `load_mtp` those of prediction layers, too."""
    n = arch.n_layer_all
    inputs, outputs, ropes = Padded(), Padded(), Padded()
    layers, experts = [Padded()] * n, [Padded()] * n
    largest, largest_expert = [0] * n, [0] * n
    experts_bytes = 0
    kept = re.compile(arch.row.kept) if arch.row.kept else None
    for tensor in tensors.values():
        stem = _stem(tensor.name)
        match = _LAYER.fullmatch(tensor.name)
        if _UNUSED.fullmatch(stem):
            continue
        if match:
            il = min(int(match[1]), n - 1)
            if not (load_mtp or arch.layers[il].is_loaded) and not (kept and kept.match(match[2])):
                continue
            if _EXPERTS.search(tensor.name):
                experts[il] += padded(tensor)
                largest_expert[il] = max(largest_expert[il], tensor.n_bytes)
                experts_bytes += tensor.n_bytes
            else:
                layers[il] += padded(tensor)
                largest[il] = max(largest[il], tensor.n_bytes)
        elif stem in _ROPE or not (arch.known or stem in _INPUT or _OUTPUT.fullmatch(stem)):
            ropes += padded(tensor)  # also tensors of unknown purpose in unknown architectures: counted on every device
        elif stem in _INPUT:
            # A lazily read table is mapped from the file whatever the load mode, and never becomes resident as a whole.
            if not (stem == "per_layer_token_embd" and arch.row.lazy and tensor.n_bytes > _LAZY_BYTES):
                inputs += padded(tensor)
        elif _OUTPUT.fullmatch(stem) or stem == "token_embd_norm" and arch.name.startswith("lfm2"):
            outputs += padded(tensor)
        else:  # norms and projections before the first layer are counted as the first layer's
            layers[0] += padded(tensor)
    embedding = tensors.get("token_embd.weight")
    head = tensors.get("output.weight")
    is_tied = head is None and embedding is not None and not arch.row.headless
    matrix = head or (embedding if is_tied else None)
    return WeightSums(
        input=inputs,
        layers=tuple(layers),
        experts=tuple(experts),
        output=outputs,
        tied=padded(embedding) if is_tied and embedding else Padded(),
        tied_on_host=padded(embedding) if is_tied and embedding and arch.row.copied_on_host else Padded(),
        rope=ropes,
        rope_layers=tuple(_takes_rope(arch, il, layers[il]) or load_mtp for il in range(n)),
        experts_bytes=experts_bytes,
        largest_layer_tensor_bytes=tuple(largest),
        largest_expert_tensor_bytes=tuple(largest_expert),
        output_tensor_bytes=matrix.n_bytes if matrix else 0,
    )


def _takes_rope(arch: Architecture, il: int, weights: Padded) -> bool:
    if arch.name == "nanbeige":  # its layers are run again as others, which have no weights of their own
        return weights.plain > 0
    if arch.name in ("gemma4", "gemma4-assistant"):
        return not arch.layers[il].is_swa
    return arch.layers[il].is_loaded or arch.name == "step35"


@lru_cache(maxsize=4096)  # every step of a decision asks for the same few again
def assign_layers(layout: Layout, n_layer_all: int) -> tuple[int, ...]:
    """Device index (or HOST) of every layer and, last, of the output: the split of `load_tensors`.

    The shares are normalised in float32, as llama.cpp does it, so that ratios land on the same layer.
    Raises Rejected when `tensor_split` does not fit the devices.
    """
    total = n_layer_all + 1
    offloaded = total if layout.n_gpu_layers < 0 else min(layout.n_gpu_layers, total)
    if not layout.devices or not offloaded:
        return (HOST,) * total
    bounds = _bounds(layout)
    first = total - offloaded
    devices = (bisect_right(bounds, _f32(_f32(i) / _f32(offloaded))) for i in range(offloaded))
    return (HOST,) * first + tuple(min(d, len(bounds) - 1) for d in devices)


def _bounds(layout: Layout) -> list[float]:
    split: Sequence[float] = layout.tensor_split
    n = len(layout.devices)
    if not split and n == 1:
        split = (1.0,)
    if len(split) != n:
        raise Rejected(
            f"tensor_split has {len(split)} shares for {n} devices; give one share per device, "
            "or llama.cpp would divide by the memory that happens to be free"
        )
    if min(split) < 0 or not sum(split):
        raise Rejected(f"tensor_split {tuple(split)} must not be negative, and not zero for all devices")
    bounds, running = [], 0.0
    for share in split:
        running = _f32(running + _f32(share))
        bounds.append(running)
    return [_f32(bound / running) for bound in bounds]


def _f32(value: float) -> float:
    number: float = struct.unpack("f", struct.pack("f", value))[0]
    return number


def experts_pattern(layout: Layout) -> str:
    """What is overridden to the CPU buffer type, as a regular expression for tensor names; empty for nothing."""
    if layout.experts_on_host:
        return _EXPERTS_PATTERN
    layers = "|".join(map(str, range(layout.n_cpu_moe)))
    return rf"blk\.({layers}){_EXPERTS_PATTERN}" if layers else ""


def place_weights(sums: WeightSums, layout: Layout, places: Sequence[int]) -> tuple[list[int], int]:
    """Weight bytes (per device of the layout, on the host) with every layer where `places` says."""
    devices = [0] * len(layout.devices)
    kinds = [device.kind for device in layout.devices]
    host = sums.input.plain
    for il, place in enumerate(places[:-1]):
        if place == HOST:
            host += sums.layers[il].plain + sums.experts[il].plain
            continue
        devices[place] += sums.layers[il].on(kinds[place])
        if layout.spills_experts_of(il):
            host += sums.experts[il].plain
        else:
            devices[place] += sums.experts[il].on(kinds[place])
    if places[-1] == HOST:
        host += sums.output.plain + sums.tied_on_host.plain
    else:
        kind = kinds[places[-1]]
        devices[places[-1]] += sums.output.on(kind) + sums.tied.on(kind)
    for place in _rope_places(sums, places):
        if place == HOST:
            host += sums.rope.plain
        else:
            devices[place] += sums.rope.on(kinds[place])
    return devices, host


def _rope_places(sums: WeightSums, places: Sequence[int]) -> Iterable[int]:
    if not sums.rope.plain:
        return ()
    return {place for place, takes in zip(places, sums.rope_layers, strict=False) if takes}
