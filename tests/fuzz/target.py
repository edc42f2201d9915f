"""What the fuzzer runs, and the test of its corpus: any bytes as a GGUF file, down to the footprint of its model.

The first byte of an input says what the rest is:

- bit 0 clear: the rest is a file, as it stands. Set: the rest edits a valid model of one of the tested architectures,
  whose tensor offsets are made right again, so that odd numbers reach the formulas behind the header.
- bit 1 set: a sparse terabyte follows the header, so that no claim is refused for the file's size alone.
- the other bits choose the layout whose footprint is asked, if footprints are asked at all.

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

from gguf_file import ARRAY, BOOL, F32, I32, STRING, U32, U64, Gguf
from gguf_shapes import SMALL, model_file

from scheduler.costs.footprint import footprint
from scheduler.costs.ggml_types import TYPES
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.shape import read_shape
from scheduler.errors import InvalidGGUF, Rejected

_SPARSE_BYTES = 1 << 40
_NAMES = sorted(SMALL)
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
        header = edited(rest) if flags & 1 else rest
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, header, 0)
        if flags & 2:
            os.ftruncate(self._file, _SPARSE_BYTES)
        try:
            shape = read_shape(self._path)
            if self._footprints:
                footprint(shape, _LAYOUTS[flags >> 2 & 3], ContextParams(n_ctx=512, n_ubatch=64))
        except (InvalidGGUF, Rejected):
            pass


@cache
def _model(index: int) -> tuple[dict[str, tuple[int, object]], list[tuple[str, tuple[int, ...], str]]]:
    spec = SMALL[_NAMES[index % len(_NAMES)]]
    file = model_file(replace(spec, n_layer=min(spec.n_layer, 4)), "fuzzed", vocabulary=False)
    return file.metadata, file.tensors


def edited(data: bytes) -> bytes:
    """The header of a model of the architecture that the first byte names, after the edits that follow: five-byte
    records of what to change (a key's value, a dimension, a type, a name) and a number to put there."""
    metadata, tensors = _model(data[0] if data else 0)
    file = Gguf(metadata=dict(metadata), tensors=list(tensors))
    keys = list(metadata)
    for at in range(1, len(data) - 4, 5):
        what, which, value, shift = struct.unpack_from("<BBHB", data, at)
        number = value << (shift & 31)
        key = keys[which % len(keys)]
        index = which % max(len(file.tensors), 1)
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
