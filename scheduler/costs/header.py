"""Reading the header of one GGUF file: one walk from front to back, in bounded time and memory.

The file may be truncated, corrupt or hostile, so every count and length is checked before it is used, against the bytes
that are left and against the limits below (several times what real models have). What is wrong raises `InvalidGGUF`
with the offset. Only what costs are computed from is kept: tokenizer arrays, megabytes of strings, are stepped over,
and of them only type and length remain.

Cost: a 128k-token vocabulary with its merges takes about 50 ms and a few MiB. The format is described in docs/gguf.md
of the ggml repository. The order and packing of tensors is held to what `gguf_init_from_reader` (ggml/src/gguf.cpp)
demands, since a file that llama.cpp refuses is of no use to us.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from scheduler.costs.ggml_types import TYPES, GgmlType
from scheduler.errors import InvalidGGUF
from scheduler.units import MIB

MAX_HEADER_BYTES = 128 * MIB
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 22
"""Array elements of type string, over the whole header; a vocabulary with its merges has about half a million."""
MAX_KEPT_TEXT_BYTES = 8 * MIB
MAX_KEPT_ARRAY = 1024
"""Numeric arrays up to this length are kept (llama.cpp allows 512 layers); longer ones are vocabulary data."""
MAX_KEY_BYTES = 65535
MAX_TENSOR_NAME_BYTES = 63
_WINDOW_BYTES = 1 * MIB

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Array:
    """A metadata array. `values` is None where only its type and length are kept; `n_bytes`: of its elements' data."""

    type: str
    length: int
    values: tuple[int | float | bool, ...] | None
    n_bytes: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: `ne` counts elements, a row first; `offset` is in bytes from the start of the data section."""

    name: str
    type: GgmlType
    ne: tuple[int, ...]
    offset: int
    n_bytes: int


_LAYERED = {
    "blk.": "",
    "enc.blk.": "enc.",
    "dec.blk.": "dec.",
    "posnet.": "posnet.",
    "convnext.": "convnext.",
}
"""How the names of weights in layers begin, and how their stems do."""


def split_name(name: str) -> tuple[int, str]:
    """(3, "attn_q.weight") of `blk.3.attn_q.weight`; -1 and the whole name for a tensor outside of layers.

    Where a layer has parts of several kinds, the stem says which: "enc.attn_q.weight" of `enc.blk.3.attn_q.weight`.
    """
    for prefix, part in _LAYERED.items():
        if name.startswith(prefix):
            il, _, stem = name.removeprefix(prefix).partition(".")
            if il.isascii() and il.isdigit() and len(il) < 10:
                return int(il), part + stem
    return -1, name


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of one file says. `header_bytes` ends the tensor list, `data_offset` starts the tensor data."""

    path: str
    version: int
    endianness: Literal["little", "big"]
    metadata: dict[str, Scalar | Array]
    tensors: tuple[Tensor, ...]
    alignment: int
    header_bytes: int
    data_offset: int
    file_bytes: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of the GGUF file at `path`.

    Raises InvalidGGUF, with `path` and `offset` in its details, when the file is not a GGUF that can be loaded, and
    OSError when it cannot be read.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise InvalidGGUF(f"{os.fspath(path)} is not a file", path=os.fspath(path), offset=0)
    with Path(path).open("rb", buffering=0) as file:
        return header_of(file, os.fspath(path), os.fstat(file.fileno()).st_size)


def header_of(file: BinaryIO, path: str, file_bytes: int) -> Header:
    """The header of an open file of `file_bytes` bytes, which messages call `path`. Reads a MiB at once, from front to
    back, and no more than the header: the file may be far away. Raises InvalidGGUF, and what `file` raises."""
    return _Walk(file, path, file_bytes).header()


_SCALARS = {
    0: ("uint8", "B"), 1: ("int8", "b"), 2: ("uint16", "H"), 3: ("int16", "h"), 4: ("uint32", "I"), 5: ("int32", "i"),
    6: ("float32", "f"), 7: ("bool", "?"), 10: ("uint64", "Q"), 11: ("int64", "q"), 12: ("float64", "d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class _Walk:
    """A cursor over the file: a window of bytes that moves forward only."""

    def __init__(self, file: BinaryIO, path: str, file_bytes: int) -> None:
        self._file = file
        self._path = path
        self._file_bytes = file_bytes
        self._window = b""
        self._base = 0
        self._pos = 0
        self._strings_left = MAX_STRINGS
        self._text_left = MAX_KEPT_TEXT_BYTES
        self._order = "<"
        self._length = struct.Struct("<Q").unpack_from

    # ---- the format, in file order ---------------------------------------------------------------------------------

    def header(self) -> Header:
        if self._take(4) != b"GGUF":
            self._fail("this is not a GGUF file: it does not begin with the letters GGUF", 0)
        version = self._scalar("I")
        if version & 0xFFFF == 0:
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
            self._order = ">"
            self._length = struct.Struct(">Q").unpack_from
        if version not in (2, 3):
            self._fail(f"GGUF version {version} cannot be read, only 2 and 3 can; convert the model anew", 4)
        n_tensors = self._count("tensors", MAX_TENSORS)
        n_keys = self._count("metadata keys", MAX_KEYS)
        metadata: dict[str, Scalar | Array] = {}
        for _ in range(n_keys):
            at = self._offset()
            key = self._string(MAX_KEY_BYTES, "a metadata key")
            if not key or key in metadata:
                self._fail(f"metadata key {key!r} occurs twice" if key else "a metadata key is empty", at)
            metadata[key] = self._value(key)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > MIB:
            self._fail(f"general.alignment is {alignment!r}, not a power of two up to 1 MiB")
        tensors = self._tensors(n_tensors, alignment)
        header_bytes = self._offset()
        data_offset = _pad(header_bytes, alignment) if tensors else header_bytes
        if tensors:
            last = tensors[-1]
            needed = data_offset + last.offset + last.n_bytes
            if needed > self._file_bytes:
                self._fail(
                    f"the file is truncated: its tensors end at byte {needed} but it has {self._file_bytes}; "
                    "download or copy it again",
                    self._file_bytes,
                )
        return Header(
            path=self._path,
            version=version,
            endianness="little" if self._order == "<" else "big",
            metadata=metadata,
            tensors=tensors,
            alignment=alignment,
            header_bytes=header_bytes,
            data_offset=data_offset,
            file_bytes=self._file_bytes,
        )

    def _value(self, key: str) -> Scalar | Array:
        at = self._offset()
        kind = self._scalar("I")
        if kind == _STRING:
            text = self._string(self._text_left, f"the value of {key!r}")
            self._text_left -= len(text)
            return text
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            self._fail(f"metadata key {key!r} has the unknown value type {kind}", at)
        number: Scalar = self._scalar(_SCALARS[kind][1])
        return number

    def _array(self, key: str) -> Array:
        at = self._offset()
        kind = self._scalar("I")
        length = self._scalar("Q")
        if kind == _STRING:
            if length > self._strings_left:
                self._fail(f"array {key!r} claims {length} strings; more than {MAX_STRINGS} is absurd", at)
            self._strings_left -= length
            start = self._offset()
            self._skip_strings(length, at)
            return Array("string", length, None, self._offset() - start - 8 * length)
        if kind == _ARRAY:
            self._fail(f"array {key!r} holds arrays, which llama.cpp does not read", at)
        if kind not in _SCALARS:
            self._fail(f"array {key!r} has the unknown element type {kind}", at)
        name, code = _SCALARS[kind]
        size = struct.calcsize(code) * length
        self._need(size, f"the {length} elements of array {key!r}", at)
        if length > MAX_KEPT_ARRAY or key.startswith("tokenizer."):
            self._pos += size
            return Array(name, length, None, size)
        return Array(name, length, struct.unpack(f"{self._order}{length}{code}", self._take(size)), size)

    def _tensors(self, count: int, alignment: int) -> tuple[Tensor, ...]:
        tensors: dict[str, Tensor] = {}
        end = 0  # of the last tensor's data, padded
        for _ in range(count):
            at = self._offset()
            name = self._string(MAX_TENSOR_NAME_BYTES, "a tensor name")
            if name in tensors:
                self._fail(f"two tensors are named {name!r}", at)
            n_dims = self._scalar("I")
            if n_dims > 4:
                self._fail(f"tensor {name!r} has {n_dims} dimensions; ggml has at most 4", at)
            ne = struct.unpack(f"{self._order}{n_dims}Q", self._take(8 * n_dims)) or (1,)
            type_id = self._scalar("I")
            offset = self._scalar("Q")
            kind = TYPES.get(type_id)
            if kind is None:
                self._fail(f"tensor {name!r} has type {type_id}, which ggml does not know (any more)", at)
            elements = 1
            for n in ne:
                elements *= n
            if not 0 < elements < 1 << 62:
                self._fail(f"tensor {name!r} has absurd dimensions {ne}", at)
            if ne[0] % kind.block:
                self._fail(
                    f"rows of tensor {name!r} have {ne[0]} elements, not a multiple of {kind.block} ({kind.name})", at
                )
            if offset != end:
                where = "overlaps the tensor before it" if offset < end else "leaves a gap after the tensor before it"
                self._fail(f"tensor {name!r} lies at data offset {offset}, expected {end}: it {where}", at)
            n_bytes = kind.row_bytes(elements)
            if offset + n_bytes > self._file_bytes:
                self._fail(
                    f"tensor {name!r} ends at data offset {offset + n_bytes}, past the end of the file "
                    f"({self._file_bytes} bytes); the file is truncated or corrupt",
                    at,
                )
            end = _pad(offset + n_bytes, alignment)
            tensors[name] = Tensor(name, kind, ne, offset, n_bytes)
        return tuple(tensors.values())

    # ---- bytes -----------------------------------------------------------------------------------------------------

    def _offset(self) -> int:
        return self._base + self._pos

    def _fail(self, why: str, offset: int | None = None) -> NoReturn:
        at = self._offset() if offset is None else offset
        raise InvalidGGUF(f"{self._path}: {why} (at byte {at})", path=self._path, offset=at)

    def _need(self, size: int, what: str, at: int) -> None:
        """Refuse unless `size` more bytes can follow the cursor."""
        end = self._offset() + size
        if not self._file_bytes:
            self._fail("the file is empty; copy or download it again", 0)
        if end > self._file_bytes:
            self._fail(f"{what} would end at byte {end}, past the end of the file ({self._file_bytes} bytes)", at)
        if end > MAX_HEADER_BYTES:
            self._fail(f"{what} would end at byte {end}; a header over {MAX_HEADER_BYTES} bytes is absurd", at)

    def _refill(self) -> None:
        """Move the window so that it begins at the cursor."""
        self._base += self._pos
        self._pos = 0
        self._file.seek(self._base)
        self._window = self._file.read(_WINDOW_BYTES)

    def _take(self, size: int) -> bytes:
        if self._pos + size > len(self._window):
            self._need(size, f"{size} bytes", self._offset())
            self._refill()
            while len(self._window) < size:
                more = self._file.read(size - len(self._window))
                if not more:
                    self._fail("the file shrank while it was being read")
                self._window += more
        self._pos += size
        return self._window[self._pos - size : self._pos]

    def _scalar(self, code: str) -> Any:
        return struct.unpack(self._order + code, self._take(struct.calcsize(code)))[0]

    def _count(self, what: str, limit: int) -> int:
        at = self._offset()
        count: int = self._scalar("Q")
        if count > limit:
            self._fail(f"the file claims {count} {what}; more than {limit} is absurd", at)
        return count

    def _string(self, limit: int, what: str) -> str:
        at = self._offset()
        length = self._scalar("Q")
        if length > limit:
            self._fail(f"{what} is {length} bytes long; at most {limit} are accepted here", at)
        return self._take(length).decode("utf-8", "replace")

    def _skip_strings(self, count: int, at: int) -> None:
        """Step over `count` strings. The inner loop is most of the cost of reading a header."""
        while count:
            window, pos, length = self._window, self._pos, self._length
            done = 0
            try:
                for done in range(count):  # noqa: B007
                    pos += 8 + length(window, pos)[0]
                done = count
            except (struct.error, OverflowError):
                pass  # the window ends here, or a length leads out of it
            self._pos = pos
            count -= done
            self._need(8 * count, f"an array of strings, {count} of them left,", at)
            if count:
                self._refill()
                if len(self._window) < 8:
                    self._fail("the file shrank while it was being read", at)


def _pad(size: int, alignment: int) -> int:
    return (size + alignment - 1) & ~(alignment - 1)
