"""What the cost of a model depends on besides the model: devices, layer split, context.

Names and meanings are llama.cpp's own (`llama_model_params`, `llama_context_params`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

DeviceKind = Literal["cuda", "rpc"]
"""How a device's backend sizes tensors. "rpc" is a loopback CPU device (a virtual GPU)."""

FlashAttn = Literal["on", "off"]

SpecType = Literal["none", "ngram-simple", "draft-simple", "draft-mtp"]
"""Where guesses of next tokens come from (llama.cpp's `--spec-type`): what was said before, a smaller model, or the
model's own prediction layers."""

MOST_DRAFTED = 15
"""Tokens that are guessed ahead in a turn: each is a row of logits. With the token before them they are 16 rows. On a
CPU 16 rows took twice as long as 8, so more would bring nothing there."""


MOST_PREDICTED = 3
"""By prediction layers, where the catalogue says nothing: they always compute so many, and mostly there is one of them,
which sees less and less of the text (llama.cpp's default)."""


def most_drafted(spec_type: SpecType, n_max: int | None, *, copies_states: bool = False) -> int:
    """Tokens of an answer that are guessed at once; `n_max`: what the catalogue says. `copies_states`: for each of them
    there is a copy of the model's recurrent states."""
    return n_max or (MOST_PREDICTED if spec_type == "draft-mtp" or copies_states else MOST_DRAFTED)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device, or a node's CPU with its RAM, does at best; zeros: not known."""

    bytes_per_s: float = 0.0
    """Read from its memory."""
    flops: float = 0.0
    """F32 operations per second; a multiplication with its addition counts two."""


NO_RATES = Rates()


@dataclass(frozen=True, slots=True)
class ContextParams:
    """`llama_context_params`, as far as they cost memory. `n_ctx` counts all `n_seq_max` sequences together."""

    n_ctx: int = 4096
    n_seq_max: int = 1
    n_batch: int = 2048
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: FlashAttn = "on"
    kv_unified: bool = False
    swa_full: bool = False
    embeddings: bool = False
    op_offload: bool = True
    n_outputs_max: int = 0
    """Rows of logits in one micro-batch; 0: `n_batch`. llama.cpp ends the process when more are asked for."""
    n_rs_seq: int = 0
    """Copies of a sequence's recurrent states that are kept besides the latest: so many tokens can be taken back. Only
    some architectures have them (`Row.copies_states`)."""
    spec_type: SpecType = "none"
    image_min_tokens: int = 0
    image_max_tokens: int = 0
    """Of a picture, as its projector makes it; 0: as the projector's own warm-up has it."""

    @property
    def n_streams(self) -> int:
        """Among how many the cache is divided: slots that share one may each use all of it."""
        return 1 if self.kv_unified else self.n_seq_max

    @property
    def n_ctx_slot(self) -> int:
        """Tokens that a slot may hold."""
        return self.n_ctx // self.n_streams

    def for_whole_sequences(self) -> ContextParams:
        """The same with batches that hold all that a slot does, as non-causal attention wants it: it sees a whole
        sequence in one graph."""
        n_ubatch = max(self.n_ubatch, self.n_ctx_slot)
        return replace(self, n_batch=n_ubatch, n_ubatch=n_ubatch)


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device that layers may be put on; `name` is the caller's label for it."""

    name: str
    kind: DeviceKind = "cuda"


@dataclass(frozen=True, slots=True)
class Layout:
    """Which layers lie on which device.

    `n_gpu_layers`: the last so many of the `n_layer_all + 1` layers (the output counts as one) go to devices;
    negative means all. `tensor_split`: one share per device, as llama.cpp takes it; Arriero itself always gives layer
    counts that sum to the offloaded layers. `experts_on_host`: MoE expert tensors stay in host RAM; `n_cpu_moe`: those
    of the first so many layers do.
    """

    devices: tuple[DeviceSpec, ...] = ()
    n_gpu_layers: int = 0
    tensor_split: tuple[float, ...] = ()
    experts_on_host: bool = False
    n_cpu_moe: int = 0

    @property
    def spills_experts(self) -> bool:
        return self.experts_on_host or self.n_cpu_moe > 0

    def spills_experts_of(self, il: int) -> bool:
        """Whether the experts of layer `il` stay in host RAM, wherever the rest of it lies."""
        return self.experts_on_host or il < self.n_cpu_moe


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """Bytes on one device."""

    weights_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes

    def __add__(self, other: DeviceBytes) -> DeviceBytes:
        return DeviceBytes(
            self.weights_bytes + other.weights_bytes,
            self.kv_bytes + other.kv_bytes,
            self.compute_bytes + other.compute_bytes,
        )


@dataclass(frozen=True, slots=True)
class HostBytes:
    """Bytes in host RAM; `output_bytes` is the logits buffer."""

    weights_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0
    output_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.output_bytes

    def __add__(self, other: HostBytes) -> HostBytes:
        return HostBytes(
            self.weights_bytes + other.weights_bytes,
            self.kv_bytes + other.kv_bytes,
            self.compute_bytes + other.compute_bytes,
            self.output_bytes + other.output_bytes,
        )


@dataclass(frozen=True, slots=True)
class Footprint:
    """Predicted bytes: one `DeviceBytes` per layout device, in that order, and the host's share."""

    devices: tuple[DeviceBytes, ...]
    host: HostBytes

    def __add__(self, other: Footprint) -> Footprint:
        """Both, on the same devices."""
        devices = (ours + theirs for ours, theirs in zip(self.devices, other.devices, strict=True))
        return Footprint(tuple(devices), self.host + other.host)
