"""What the fuzzer runs, and the test of its corpus: any bytes as a GGUF file, down to the footprint of its model.

Models, LoRA adapters and multimodal projectors are read.

The first byte of an input says what the rest is:

- bit 0 clear: the rest is a file, as it stands. Set: the rest edits a valid model of one of the tested architectures,
  whose tensor offsets are made right again, so that odd numbers reach the formulas behind the header.
- bit 1 set: a sparse terabyte follows the header, so that no claim is refused for the file's size alone.
- bits 2 and 3 choose the layout whose footprint is asked, if footprints are asked at all.
- bits 4 and 5: 2 reads an adapter, 3 a projector, everything else a model.

What is refused must be refused with the project's own errors; everything else that is raised is a finding.
"""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "costs"))

import contextlib

from gguf_file import ARRAY, BOOL, F32, I32, STRING, U32, U64, Gguf
from gguf_shapes import SMALL, model_file
from test_adapters import adapter_file
from test_projectors import MADE

from scheduler.costs.adapter import adapted, read_adapter
from scheduler.costs.families import KNOWN
from scheduler.costs.footprint import footprint, mtp_footprint, with_mtp
from scheduler.costs.ggml_types import TYPES
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.host import host_memory
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.projector import read_projector
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.errors import InvalidGGUF, Rejected

_SPARSE_BYTES = 1 << 40
_NAMES = sorted(SMALL)
_ARCHITECTURES = sorted(KNOWN)
_PROJECTORS = sorted(MADE)
_KEYS_OF_OTHERS = {
    "attention.indexer.key_length": 64, "attention.indexer.head_count": 4, "attention.indexer.top_k": 64,
    "hyper_connection.count": 4, "attention.compress_ratios": [4] * 8, "ple.layers": [0], "ple.conv_kernel": 4,
    "ple.ngram_size": 3, "kda.head_dim": 64, "ssm.conv_kernel": 4, "ssm.inner_size": 256, "ssm.state_size": 16,
    "wkv.head_size": 64, "shortconv.l_cache": 3, "num_loops": 2, "hrm.layers_per_stack": 1, "hrm.l_cycles": 2,
    "attn_res.block_size": 2, "attention.sliding_window": 64, "attention.sliding_window_pattern": [0, 1] * 4,
}  # fmt: skip
"""What some architectures want and the tested ones have not."""
_MODEL, _ADAPTER, _PROJECTOR = 0, 2, 3
Base = tuple[dict[str, tuple[int, object]], list[tuple[str, tuple[int, ...], str]]]
_TYPES = [kind.name for kind in TYPES.values()]
_LAYOUTS = (
    Layout(),
    Layout((DeviceSpec("a"),), -1),
    Layout((DeviceSpec("a"), DeviceSpec("b", "rpc")), 3, (1.0, 2.0)),
    Layout((DeviceSpec("a"), DeviceSpec("b")), -1, (1.0, 1.0), experts_on_host=True),
)


class Target:
    """Runs inputs, all through one file in memory. Without `footprints` it is ten times faster."""

    def __init__(self, *, footprints: bool = True) -> None:
        self._footprints = footprints
        self._file = os.memfd_create("gguf")
        self._path = f"/proc/self/fd/{self._file}"

    def run(self, data: bytes) -> None:
        """Read `data` as the module says. Raises what must never be raised."""
        if not data:
            return
        flags, rest = data[0], data[1:]
        kind = flags >> 4 & 3
        header = edited(rest, kind) if flags & 1 else rest
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, header, 0)
        if flags & 2:
            os.ftruncate(self._file, _SPARSE_BYTES)
        with contextlib.suppress(InvalidGGUF, Rejected):
            self._cost(kind, flags >> 2 & 3)

    def _cost(self, kind: int, layout_no: int) -> None:
        if kind == _PROJECTOR:
            read_projector(self._path).on_host(flash_attn=bool(layout_no & 1))
            return
        shape = adapted(_plain(), [read_adapter(self._path)]) if kind == _ADAPTER else read_shape(self._path)
        if not self._footprints:
            return
        layout, context = _LAYOUTS[layout_no], ContextParams(n_ctx=512, n_ubatch=64)
        host_memory(shape, layout, context, footprint(shape, layout, context, CHECKED_BUILD), process_bytes=0)
        if shape.predictor is not None:
            mtp_footprint(with_mtp(shape), layout, context)


@cache
def _plain() -> ModelShape:
    """The model that adapters are made for."""
    file = os.memfd_create("plain")
    os.pwrite(file, model_file(SMALL["llama"], "plain", vocabulary=False).header(), 0)
    os.ftruncate(file, _SPARSE_BYTES)
    return read_shape(f"/proc/self/fd/{file}")


@cache
def _adapter(index: int) -> Base:
    file = adapter_file(SMALL["llama"], 1 << index % 8)
    return file.metadata, file.tensors


@cache
def _projector(index: int) -> Base:
    file = MADE[_PROJECTORS[index % len(_PROJECTORS)]]()
    return file.metadata, file.tensors


@cache
def _model(index: int) -> Base:
    spec = SMALL[_NAMES[index % len(_NAMES)]]
    file = model_file(replace(spec, n_layer=min(spec.n_layer, 4)), "fuzzed", vocabulary=False)
    return file.metadata, file.tensors


def _become(file: Gguf, arch: str) -> None:
    """Rename the model's architecture, with its keys, and give it those that it may want."""
    was = file.metadata["general.architecture"][1] if "general.architecture" in file.metadata else ""
    for key in list(file.metadata):
        if was and key.startswith(f"{was}."):
            file.metadata[f"{arch}.{key[len(str(was)) + 1 :]}"] = file.metadata.pop(key)
    file.set("general.architecture", arch)
    for key, value in _KEYS_OF_OTHERS.items():
        if f"{arch}.{key}" not in file.metadata:
            file.set(f"{arch}.{key}", value)


def edited(data: bytes, kind: int = _MODEL) -> bytes:
    """The header of a model of the architecture that the first byte names, after the edits that follow: five-byte
    records of what to change (a key's value, a dimension, a type, a name) and a number to put there. Among adapters
    and projectors, the first byte chooses one."""
    base = {_ADAPTER: _adapter, _PROJECTOR: _projector}.get(kind, _model)
    metadata, tensors = base(data[0] if data else 0)
    file = Gguf(metadata=dict(metadata), tensors=list(tensors))
    keys = list(metadata)
    for at in range(1, len(data) - 4, 5):
        what, which, value, shift = struct.unpack_from("<BBHB", data, at)
        number = value << (shift & 31)
        key = keys[which % len(keys)]
        index = which % max(len(file.tensors), 1)
        if what >= 240 and kind == _MODEL:
            _become(file, _ARCHITECTURES[which % len(_ARCHITECTURES)])
            keys = list(file.metadata)
            continue
        match what % 10:
            case 0:
                file.metadata[key] = (U32, number & 0xFFFFFFFF)
            case 1:
                file.metadata[key] = (U64, number << (shift >> 5))
            case 2:
                file.metadata[key] = (I32, (number & 0xFFFFFFFF) - (1 << 31))
            case 3:
                file.metadata[key] = (ARRAY, (U32, [(number >> i) & 0xFFFFFFFF for i in range(shift)]))
            case 4:
                file.metadata.pop(key, None)
            case 5:
                file.metadata[key] = (F32, (float("nan"), float("inf"), -1.0, 0.5)[shift & 3])
            case 6:
                file.metadata[key] = (STRING, "x" * shift) if value & 1 else (BOOL, bool(shift & 1))
            case 7 if file.tensors:
                name, ne, kind = file.tensors[index]
                dimensions = list(ne) + [1] * (value & 1)
                dimensions[shift % len(dimensions)] = number >> 1
                file.tensors[index] = (name, tuple(dimensions[:4]), kind)
            case 8 if file.tensors:
                name, ne, _ = file.tensors[index]
                file.tensors[index] = (name, ne, _TYPES[value % len(_TYPES)])
            case 9 if file.tensors:
                file.tensors.pop(index)
            case _:
                pass
    try:
        return file.header()
    except struct.error:  # a number that no field can hold
        return b""
