"""Writing GGUF files for the tests of costs: headers of full-size models on sparse files, in either byte order.

A tensor's data is never written: the file is only made long enough. So a 40 GB model takes a few MiB of disk, and
llama.cpp can still be asked what it would allocate for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.costs.ggml_types import TYPES, GgmlType

BY_NAME: dict[str, GgmlType] = {kind.name: kind for kind in TYPES.values()}
U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", 11: "q", 12: "d"}


@dataclass
class Gguf:
    """A GGUF in the making. `metadata` maps a key to (type, value), for arrays to (ARRAY, (element type, values))."""

    metadata: dict[str, tuple[int, Any]] = field(default_factory=dict)
    tensors: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)
    version: int = 3
    order: str = "<"
    alignment: int = 32

    def set(self, key: str, value: Any) -> None:
        """Add a key with the type that fits its Python value."""
        if isinstance(value, bool):
            self.metadata[key] = (BOOL, value)
        elif isinstance(value, int):
            self.metadata[key] = (U32, value)
        elif isinstance(value, float):
            self.metadata[key] = (F32, value)
        elif isinstance(value, str):
            self.metadata[key] = (STRING, value)
        else:
            kind = {bool: BOOL, int: I32, float: F32, str: STRING}[type(value[0])]
            self.metadata[key] = (ARRAY, (kind, value))

    def header(self) -> bytes:
        """All bytes before the tensor data, without the padding that aligns it."""
        order = self.order
        out = [b"GGUF", struct.pack(order + "IQQ", self.version, len(self.tensors), len(self.metadata))]
        for key, (kind, value) in self.metadata.items():
            out += [self._text(key), struct.pack(order + "I", kind), self._value(kind, value)]
        offset = 0
        for name, ne, kind_name in self.tensors:
            kind = BY_NAME[kind_name]
            out += [self._text(name), struct.pack(f"{order}I{len(ne)}QIQ", len(ne), *ne, kind.id, offset)]
            offset += -(-tensor_bytes(ne, kind) // self.alignment) * self.alignment
        return b"".join(out)

    def write(self, path: Path) -> Path:
        """Write header and sparse data to `path`."""
        header = self.header()
        start = -(-len(header) // self.alignment) * self.alignment
        data = sum(
            -(-tensor_bytes(ne, BY_NAME[kind]) // self.alignment) * self.alignment for _, ne, kind in self.tensors
        )
        with path.open("wb") as file:
            file.write(header)
            file.truncate(start + data)
        return path

    def _text(self, text: str) -> bytes:
        data = text.encode()
        return struct.pack(self.order + "Q", len(data)) + data

    def _value(self, kind: int, value: Any) -> bytes:
        if kind == STRING:
            return self._text(value)
        if kind != ARRAY:
            return struct.pack(self.order + _CODES[kind], value)
        element, values = value
        head = struct.pack(self.order + "IQ", element, len(values))
        if element == STRING:
            return head + b"".join(map(self._text, values))
        return head + struct.pack(f"{self.order}{len(values)}{_CODES[element]}", *values)


def tensor_bytes(ne: Sequence[int], kind: GgmlType) -> int:
    elements = 1
    for n in ne:
        elements *= n
    return kind.row_bytes(elements)


def add_vocabulary(gguf: Gguf, n_vocab: int, n_merges: int = 0) -> None:
    """A vocabulary that llama.cpp accepts: control tokens, all bytes, then made-up words up to `n_vocab`."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    tokens += [f"\u2581w{i}" for i in range(n_vocab - len(tokens))]
    types += [1] * (n_vocab - len(types))
    gguf.set("tokenizer.ggml.model", "llama")
    gguf.set("tokenizer.ggml.tokens", tokens[:n_vocab])
    gguf.set("tokenizer.ggml.scores", [-float(i) for i in range(n_vocab)])
    gguf.set("tokenizer.ggml.token_type", types[:n_vocab])
    gguf.set("tokenizer.ggml.bos_token_id", 1)
    gguf.set("tokenizer.ggml.eos_token_id", 2)
    if n_merges:
        gguf.set("tokenizer.ggml.merges", [f"w{i} w{i + 1}" for i in range(n_merges)])


def per_layer(arch: str, values: Iterable[tuple[str, Any]], gguf: Gguf) -> None:
    """Set hyper-parameters under the architecture's prefix."""
    for key, value in values:
        gguf.set(f"{arch}.{key}", value)
