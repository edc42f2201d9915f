"""Multimodal projectors (mmproj): what the encoder of images or sounds takes beside its model.

All weights go to one device, or to host RAM: to the byte where the file holds one encoder. Compute buffers are reserved
for a warm-up input when the projector is loaded; they are bounded here from the widths of the first layer, one moment
after the other: patches, attention, feed-forward block, projection. A larger image than that would make the buffer
grow; so runners let no image have more tokens (`Encoder.most_tokens`). Where more are wanted (`image_max_tokens`),
runners warm up with so many, and the bound is that of such an image (`taking`).
Source in llama.cpp: tools/mtmd/clip.cpp (`warmup`, `load_tensors`), tools/mtmd/models/. Checked with libmtmd's own
`mtmd_get_memory_usage` (tests/costs/test_projectors.py; 2,000 random shapes once: none below).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isqrt

from scheduler.costs.header import Header, Scalar, Tensor, read_header
from scheduler.costs.params import DeviceBytes, DeviceKind, HostBytes
from scheduler.costs.weights import Padded, padded
from scheduler.errors import InvalidGGUF
from scheduler.units import KIB

_WARM_UP = {
    16: "phi4 pixtral lightonocr kimivl gemma4v gemma4uv minimax_m3 youtuvl deepseek4v",
    28: "paddleocr",
    32: "hunyuanvl muse-glimmer",
    46: "dots_ocr dots3note_v qwen2vl_merger qwen2.5vl_merger qwen3vl_merger ling3vl mimovl glm4v glm5v exaone4_5",
}
"""Merged patches along a side of the warm-up image (`set_warmup_n_tokens`); others take the file's image size."""
_PATCHES_A_SIDE = {name: side for side, names in _WARM_UP.items() for name in names.split()}
_CHOOSABLE = frozenset(
    """
    pixtral lightonocr kimivl gemma4v gemma4uv minimax_m3 youtuvl muse-glimmer qwen2vl_merger qwen2.5vl_merger
    qwen3vl_merger ling3vl glm4v glm5v
    """.split()
)
"""Whose images get as many tokens as libmtmd is told (`set_limit_image_tokens`); for others the file says it."""
_MERGES_BY_KEY = {
    "spatial_merge_size": """
        pixtral lightonocr dots3note_v qwen2vl_merger qwen2.5vl_merger qwen3vl_merger ling3vl mimovl glm4v glm5v
        exaone4_5 hunyuanvl muse-glimmer minimax_m3 youtuvl
        """.split(),
    "projector.scale_factor": """
        gemma3 idefics3 internvl nemotron_v2_vl llama4 minicpmv4_6 lfm2 kimivl kimik25 gemma4v gemma4uv dots_ocr
        deepseek4v step3vl
        """.split(),
}
_MERGE_DEFAULT = {
    **dict.fromkeys("gemma3 minicpmv4_6 step3vl".split(), 4),
    **dict.fromkeys("gemma4v gemma4uv".split(), 3),
    **dict.fromkeys(
        """
        qwen2vl_merger qwen2.5vl_merger qwen3vl_merger ling3vl mimovl glm4v glm5v exaone4_5 hunyuanvl muse-glimmer
        paddleocr minimax_m3 youtuvl
        """.split(),
        2,
    ),
}
_WINDOWED = frozenset("mimovl youtuvl minicpmv4_6 muse-glimmer".split())
_WINDOWED_BY_KEY = frozenset({"qwen2.5vl_merger", "exaone4_5"})
_BOUNDED = frozenset(
    """
    mlp gemma3 qwen2vl_merger qwen2.5vl_merger qwen3vl_merger pixtral lightonocr idefics3 internvl llama4 resampler
    gemma4v kimivl lfm2 janus_pro glm4v paddleocr ultravox qwen2a voxtral qwen3a
    """.split()
)
"""Whose bound was held against libmtmd."""
_UNKNOWN_FACTOR = 4
_FRAMES = 3000
"""Of a mel spectrogram: half a minute of sound, the piece that encoders of sound take at once."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """One encoder of a projector file. Counts are F32 values of its graph."""

    kind: str
    """llama.cpp's name of the projector (`clip.projector_type`)."""
    is_audio: bool
    heads: int
    width: int
    q: int
    k: int
    is_fused: bool
    feed_forward: int
    """Values per position while the block feeds forward."""
    merge: int
    positions: int
    """At warm-up."""
    raw: int
    """Values of the input at warm-up."""
    patching: int
    """Values per position while patches are made, on top of what is said here."""
    patching_once: int
    has_window: bool
    projected: int
    """The widest row of the projection."""
    projection_steps: int
    stacked: int
    """Positions of sound that become one."""
    deep_layers: int
    deep_width: int
    kept: int
    """Values that stay until the end: a projection turned over."""
    resampled: int

    @property
    def is_bounded(self) -> bool:
        """False: the kind was not looked at, and its bound is several times what the others need."""
        return self.kind in _BOUNDED

    @property
    def most_tokens(self) -> int:
        """Of an image that needs no larger buffer than the warm-up did; 0: all images have the warm-up's size."""
        return 0 if self.is_audio else _PATCHES_A_SIDE.get(self.kind, 0) ** 2

    @property
    def is_choosable(self) -> bool:
        """Whether libmtmd can be told how many tokens an image may have."""
        return not self.is_audio and self.kind in _CHOOSABLE

    @property
    def side_pixels(self) -> int:
        """Of the warm-up image, which is a square."""
        return isqrt(self.raw // 3)

    def taking(self, image_tokens: int) -> Encoder:
        """With a warm-up image of so many tokens (a square of them), where those are more than without."""
        side, wanted = isqrt(self.most_tokens), isqrt(image_tokens)
        if not self.is_choosable or wanted <= side:
            return self

        def grown(count: int) -> int:
            return count * wanted**2 // side**2

        extra = self.positions % side  # a class token
        return replace(
            self,
            positions=grown(self.positions - extra) + extra,
            raw=grown(self.raw),
            patching_once=grown(self.patching_once),
        )

    def compute_bytes(self, *, flash_attn: bool) -> tuple[int, int]:
        """(the compute buffer where the weights are, the inputs' share in host RAM when that is a device)."""
        n, raw = self.positions, self.raw
        w, square = self.width, n * n
        inputs, kept = raw + 8 * n + 64, self.kept
        if self.has_window:
            inputs += square
            kept += square // 2 if flash_attn else 0
        out = n if self.merge == 1 else -(-n // self.merge**2) + self.merge
        deep = out * self.deep_width
        kept += (self.deep_layers + 1) * deep if self.deep_layers else 0
        rows = n // self.stacked + 1 if self.is_audio else n if self.resampled else out
        attention = n * (w + 7 * self.q if self.is_fused else 2 * w + self.q + (2 if flash_attn else 3) * self.k)
        attention += 0 if flash_attn else self.heads * square
        projection = 3 * n * w + self.projection_steps * rows * self.projected + (self.deep_layers + 2) * deep
        if self.resampled:
            projection = n * (5 * self.resampled + 2 * w)
        patches = n * (self.patching + 4 * w) + self.patching_once
        moments = max(attention, n * self.feed_forward, projection, patches)
        factor = 1 if self.is_bounded else _UNKNOWN_FACTOR
        total = inputs + factor * (kept + moments + 2 * n * w)
        return 4 * total + 64 * KIB, 4 * inputs + 4 * KIB


@dataclass(frozen=True, eq=False)
class Projector:
    """A projector file."""

    path: str
    weights: Padded
    """Never mapped."""
    encoders: tuple[Encoder, ...]

    def taking(self, image_tokens: int) -> Projector:
        """The same, for images of so many tokens; 0: as its own warm-up."""
        return replace(self, encoders=tuple(encoder.taking(image_tokens) for encoder in self.encoders))

    def unsuited(self, least_tokens: int, most_tokens: int) -> str:
        """Why its images cannot have at least and at most so many tokens (0: not said), or empty."""
        eyes = [encoder for encoder in self.encoders if not encoder.is_audio]
        if not eyes:
            return "the projector takes no images"
        if unable := [encoder.kind for encoder in eyes if not encoder.is_choosable]:
            return f"a projector of kind {unable[0]} has a fixed image size in its file"
        if least_tokens > (most := most_tokens or max(encoder.most_tokens for encoder in eyes)):
            return f"image_min_tokens is {least_tokens}, but images have at most {most} tokens: raise image_max_tokens"
        return ""

    def on_device(self, kind: DeviceKind, *, flash_attn: bool = False) -> DeviceBytes:
        """Bytes on the device that holds the projector."""
        compute_bytes = sum(e.compute_bytes(flash_attn=flash_attn)[0] for e in self.encoders)
        return DeviceBytes(self.weights.on(kind), 0, compute_bytes)

    def beside_device(self, *, flash_attn: bool = False) -> HostBytes:
        """Bytes in host RAM when a device holds the projector."""
        return HostBytes(compute_bytes=sum(e.compute_bytes(flash_attn=flash_attn)[1] for e in self.encoders))

    def on_host(self, *, flash_attn: bool = False) -> HostBytes:
        """Bytes in host RAM when that holds the projector."""
        compute_bytes = sum(e.compute_bytes(flash_attn=flash_attn)[0] for e in self.encoders)
        return HostBytes(self.weights.plain, 0, compute_bytes)


def read_projector(path: str | os.PathLike[str]) -> Projector:
    """The projector in the file at `path`. Raises InvalidGGUF when it is none, or damaged, and OSError."""
    header = read_header(path)
    reader = _Reader(header)
    encoders = tuple(reader.encoders())
    weights = sum((padded(tensor) for tensor in header.tensors), Padded())
    if len(encoders) > 1:  # the encoder of sounds loads what both have names for a second time
        shared = ("v.class_embd", "v.patch_embd.", "v.norm_embd.", "v.deepstack.")
        weights += sum((padded(t) for t in header.tensors if t.name.startswith(shared)), Padded())
    return Projector(header.path, weights, encoders)


@dataclass
class _Reader:
    header: Header
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {tensor.name: tensor for tensor in self.header.tensors}

    def refuse(self, why: str) -> InvalidGGUF:
        return InvalidGGUF(f"{self.header.path}: {why}", path=self.header.path, offset=0)

    def number(self, key: str, default: int | None = None) -> int:
        value = self.header.metadata.get(f"clip.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 24:
            raise self.refuse(f"metadata key clip.{key} is {value!r}, not a sensible whole number")
        return value

    def encoders(self) -> Iterator[Encoder]:
        meta: Mapping[str, Scalar | object] = self.header.metadata
        if meta.get("general.architecture") != "clip":
            raise self.refuse("this is not a multimodal projector: general.architecture must be clip")
        wanted = [part for part in ("vision", "audio") if meta.get(f"clip.has_{part}_encoder") is True]
        if not wanted:
            raise self.refuse("the projector has neither an encoder of images nor one of sounds")
        for part in wanted:
            kind = meta.get("clip.projector_type") or meta.get(f"clip.{part}.projector_type")
            if not isinstance(kind, str):
                raise self.refuse("clip.projector_type is missing")
            if kind == "qwen2.5o":
                kind = "qwen2a" if part == "audio" else "qwen2.5vl_merger"
            yield self.encoder(kind, part)

    def encoder(self, kind: str, part: str) -> Encoder:
        is_audio = part == "audio"
        letter = "a" if is_audio else "v"
        block = {
            name.removeprefix(f"{letter}.blk.0.").removesuffix(".weight"): tensor.ne
            for name, tensor in self.tensors.items()
            if name.startswith(f"{letter}.blk.0.") and len(tensor.ne) > 1
        }
        width = self.number(f"{part}.embedding_length")
        fused = block.get("attn_qkv")
        q = fused[1] // 3 if fused else block.get("attn_q", (0, width))[1]
        k = q if fused else block.get("attn_k", (0, q))[1]
        wide = max((max(block[stem]) for stem in ("ffn_up", "ffn_down") if stem in block), default=4 * width)
        w = max(width, q)
        feed_forward = 3 * wide + 2 * w if "ffn_gate" in block else wide + 3 * w
        merge = 1 if is_audio else self.merge(kind)
        positions, raw, patching, once = self.sound(kind, w) if is_audio else self.image(kind, merge)
        if not positions:
            raise self.refuse(f"the input of {kind} has no positions: image or patch size is 0")
        prefixes = ("mm.a.",) if is_audio else ("mm.", "resampler.", "v.deepstack")
        projections = [
            t.ne for name, t in self.tensors.items() if name.startswith(prefixes) and name.endswith(".weight")
        ]
        deep = [t.ne for name, t in self.tensors.items() if name.startswith("v.deepstack.") and "fc2.weight" in name]
        turned = self.tensors.get("mm.input_projection.weight") if kind == "gemma3" else None
        resampler = self.tensors.get("resampler.kv.weight") if kind == "resampler" else None
        return Encoder(
            kind=kind,
            is_audio=is_audio,
            heads=self.number(f"{part}.attention.head_count"),
            width=w,
            q=q,
            k=k,
            is_fused=fused is not None,
            feed_forward=feed_forward,
            merge=1 if kind == "gemma4uv" else merge,  # its patches are merged as they are cut
            positions=positions,
            raw=raw,
            patching=patching,
            patching_once=once,
            has_window=kind in _WINDOWED or kind in _WINDOWED_BY_KEY and self.number(f"{part}.n_wa_pattern", 0) > 0,
            projected=max((max(ne[:2]) for ne in projections if len(ne) > 1), default=width),
            projection_steps=3 if "mm.gate.weight" in self.tensors else 2,
            stacked=max(1, self.number("audio.projector.stack_factor", 1)),
            deep_layers=0 if is_audio else len(deep),
            deep_width=0 if is_audio else max((ne[1] for ne in deep if len(ne) > 1), default=0),
            kept=turned.ne[0] * (turned.ne[1:2] or (1,))[0] if turned else 0,
            resampled=(resampler.ne[1:2] or (0,))[0] if resampler else 0,
        )

    def merge(self, kind: str) -> int:
        default = _MERGE_DEFAULT.get(kind, 1)
        key = next((key for key, kinds in _MERGES_BY_KEY.items() if kind in kinds), None)
        return max(1, self.number(f"vision.{key}", default) if key else default)

    def image(self, kind: str, merge: int) -> tuple[int, int, int, int]:
        patch = self.number("vision.patch_size")
        if kind == "gemma4uv":
            patch *= merge
        side = self.number("vision.image_size")
        if kind in _PATCHES_A_SIDE:
            side = _PATCHES_A_SIDE[kind] * patch * (1 if kind == "gemma4uv" else merge)
        elif kind == "lfm2":
            side = isqrt(256 * (patch * merge) ** 2)
        elif kind == "kimik25":
            side = isqrt(self.number("vision.image_max_pixels", 0) or 4096 * (patch * merge) ** 2)
        elif kind.startswith("deepseekocr"):
            side, patch = 1024, 16
        extra = int("v.class_embd" in self.tensors)
        positions = (side // patch) ** 2 + extra if patch else 0
        kernel = self.tensors.get("v.patch_embd.weight")
        unfolded = 3 * patch * patch * (2 if kernel and kernel.type.name == "bf16" else 1) // 2
        twice = 2 if "v.patch_embd.weight.1" in self.tensors else 1
        raw = 3 * side * side
        return positions, raw, unfolded * twice, raw if kind == "gemma4v" else 0

    def sound(self, kind: str, w: int) -> tuple[int, int, int, int]:
        bins = self.number("audio.num_mel_bins")
        raw, positions = _FRAMES * bins, _FRAMES // 2
        if kind != "qwen3a":
            return positions, raw, 3 * w // 2, 0
        kernel = self.tensors.get("a.conv2d.1.weight")
        channels = max(kernel.ne) if kernel else w
        first = channels * 50 * (bins // 2) * (_FRAMES // 100)
        return _FRAMES // 100 * 13, raw, 0, 2 * first + 9 * first // 8 + 4 * raw
