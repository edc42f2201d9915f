"""A file that holds what was kept of a sequence: how it is written, and how it is read.

It begins with a head and a checksum of all else. Then come the tokens, a table of checkpoints, one of pictures and
sounds (their tokens do not fit 4 bytes), the checkpoints, and llama.cpp's state.
A file is written under another name first: an incomplete or damaged one is never loaded.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from actors.serving.pieces import folded, media_runs
from actors.serving.states import Checkpoint, SavedState

Bytes = npt.NDArray[np.uint8]

_HEAD = struct.Struct("<8sIIIQf")  # magic, tokens, checkpoints, media, bytes of the state, tokens/s
_CHECKSUM = struct.Struct("<I")  # of all else
_FIRST = _HEAD.size + _CHECKSUM.size  # where the tokens begin
_CHECKPOINT = struct.Struct("<IQ")  # tokens, bytes
_MEDIUM = struct.Struct("<II16s")  # where it begins, of how many tokens it is, and which is the first
_MAGIC = b"arriero2"


class Glance(NamedTuple):
    """What is known of a file without reading its state. `tokens` are `folded`; `ends`: tokens of its checkpoints."""

    tokens: array[int]
    ends: tuple[int, ...]
    tokens_per_s: float
    state_bytes: int


class Part:
    """A file under way. Fill its `memory` with the state, and `finish` it, or `discard` it."""

    def __init__(
        self,
        path: Path,
        tokens: Sequence[int],
        checkpoints: Sequence[Checkpoint],
        state_bytes: int,
        tokens_per_s: float,
        *,
        in_ram: bool = False,
    ) -> None:
        """`in_ram`: its memory is RAM, which is filled several times as fast, and nothing is written before the end.
        Else it is the file's own: the kernel can take it back. Raises OSError."""
        held, media = folded(tokens), media_runs(tokens)
        self.path, self.tokens, self.in_ram = path, held, in_ram
        self._head = _HEAD.pack(_MAGIC, len(held), len(checkpoints), len(media), state_bytes, tokens_per_s)
        self._smaller = b"".join(
            [
                held.tobytes(),
                *(_CHECKPOINT.pack(each.n_tokens, len(each.state)) for each in checkpoints),
                *(_MEDIUM.pack(at, count, (-1 - tokens[at]).to_bytes(16, "big")) for at, count in media),
                *(each.state.tobytes() for each in checkpoints),
            ]
        )
        begins = _FIRST + len(self._smaller)
        self.n_bytes = begins + state_bytes
        self._own = path.with_suffix(f".{os.getpid()}")
        if in_ram:
            self.memory: Bytes = np.empty(state_bytes, np.uint8)
            self._pages: Bytes = self.memory[:0]
        else:
            self._pages = _mapped(self._own, self.n_bytes)
            self.memory = self._pages[begins:]

    def finish(self) -> None:
        """It is complete, and gets its name. Raises OSError."""
        checksum = zlib.crc32(self.memory.data, zlib.crc32(self._smaller, zlib.crc32(self._head)))
        first = self._head + _CHECKSUM.pack(checksum) + self._smaller
        if self.in_ram:
            with os.fdopen(os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(first)
                file.write(self.memory.data)
        else:
            self._pages[: len(first)] = np.frombuffer(first, np.uint8)
        self._own.rename(self.path)
        self.discard()

    def discard(self) -> None:
        """Whatever is incomplete is deleted. Safe to call twice."""
        self._pages = self.memory = np.empty(0, np.uint8)  # which gives the memory back
        with contextlib.suppress(OSError):
            self._own.unlink()


def _mapped(path: Path, n_bytes: int) -> Bytes:
    """A new file of so many bytes, as memory. They are set aside at once: on a full disk, writing to memory would end
    the process. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
        return np.frombuffer(mmap.mmap(descriptor, n_bytes), np.uint8)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def glance(path: Path) -> Glance | None:
    """None: it cannot be a state. Raises OSError."""
    try:
        with path.open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            magic, n_tokens, n_checkpoints, _, state_bytes, tokens_per_s = _HEAD.unpack(file.read(_HEAD.size))
            tables = 4 * n_tokens + _CHECKPOINT.size * n_checkpoints
            if magic != _MAGIC or _FIRST + tables + state_bytes > n_bytes:
                return None
            file.seek(_FIRST)
            tokens = array("i", file.read(4 * n_tokens))
            ends = _CHECKPOINT.iter_unpack(file.read(_CHECKPOINT.size * n_checkpoints))
            return Glance(tokens, tuple(n for n, _ in ends), tokens_per_s, state_bytes)
    except (ValueError, struct.error):
        return None


def read_state(path: Path) -> SavedState:
    """All of it is read from the disk; it stays in the page cache until it is used. Raises ValueError and struct.error
    for a damaged one, OSError."""
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    _, n_tokens, n_checkpoints, n_media, state_bytes, tokens_per_s = _HEAD.unpack_from(pages)
    memory = np.frombuffer(pages, np.uint8)
    checksum = zlib.crc32(memory[_FIRST:].data, zlib.crc32(pages[: _HEAD.size]))
    if _CHECKSUM.unpack_from(pages, _HEAD.size) != (checksum,):
        raise ValueError("its checksum is wrong")
    at = _FIRST + 4 * n_tokens
    tokens: list[int] = memory[_FIRST:at].view(np.int32).tolist()
    sizes = list(_CHECKPOINT.iter_unpack(pages[at : at + n_checkpoints * _CHECKPOINT.size]))
    at += n_checkpoints * _CHECKPOINT.size
    for start, count, digest in _MEDIUM.iter_unpack(pages[at : at + n_media * _MEDIUM.size]):
        first = -1 - int.from_bytes(digest, "big")
        tokens[start : start + count] = range(first, first - count, -1)
    at += n_media * _MEDIUM.size
    checkpoints = []
    for of_tokens, n_bytes in sizes:
        checkpoints.append(Checkpoint(of_tokens, memory[at : at + n_bytes].copy()))
        at += n_bytes
    return SavedState(tokens, checkpoints, memory[at : at + state_bytes], tokens_per_s, path)
