"""Frames on a stream socket: 4 bytes of length (little-endian), 1 byte of kind, and the payload."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence

_HEAD = struct.Struct("<IB")
LONGEST_BYTES = 256 * 1024 * 1024
"""Of a payload: a request body of 32 MiB becomes at most as many tokens of 4 bytes."""

_LARGE_BYTES, _PIECE_BYTES = 65536, 256 * 1024


class BrokenFrame(OSError):
    """The other side ended in the middle of a frame, or speaks something else."""


def packed(kind: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return _HEAD.pack(len(payload), kind) + payload


def pieces(kind: int, payload: Sequence[bytes]) -> Iterator[bytes | memoryview]:
    """One frame, whose payload comes in parts: in one piece where it is small, else in pieces of `_PIECE_BYTES`. A
    large part is not copied as a whole, which takes 0.1 s on a busy machine."""
    length = sum(map(len, payload))
    head = _HEAD.pack(length, kind)
    if length <= _LARGE_BYTES:
        yield b"".join([head, *payload])
        return
    yield head
    for part in payload:
        yield from (memoryview(part)[at : at + _PIECE_BYTES] for at in range(0, len(part), _PIECE_BYTES))


def send(to: socket.socket, kind: int, *payload: bytes) -> None:
    """Send one frame on a blocking socket; its payload may come in parts. Raises OSError when nobody listens any
    more."""
    for piece in pieces(kind, payload):
        to.sendall(piece)


def receive(source: socket.socket) -> tuple[int, bytes] | None:
    """The next frame's kind and payload, from a blocking socket; None at the end of the stream.

    Raises BrokenFrame, or what the socket does.
    """
    head = _exactly(source, _HEAD.size)
    if head is None:
        return None
    length, kind = _HEAD.unpack(head)
    if length > LONGEST_BYTES:
        raise _too_long(length, LONGEST_BYTES)
    payload = _exactly(source, length) if length else b""
    if payload is None:
        raise BrokenFrame("the stream ended in the middle of a frame")
    return kind, payload


def _exactly(source: socket.socket, length: int) -> bytes | None:
    """So many bytes; None when the stream ends before the first."""
    parts: list[bytes] = []
    missing = length
    while missing:
        part = source.recv(min(missing, 1 << 20))
        if not part:
            if parts:
                raise BrokenFrame("the stream ended in the middle of a frame")
            return None
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


class FrameReader:
    """Cuts frames out of bytes as they come. `longest_bytes` of a payload may be changed between two frames.

    Other threads go on while a large payload is put together: joining `bytes` does not hold the interpreter's lock.
    """

    def __init__(self, longest_bytes: int = LONGEST_BYTES) -> None:
        self.longest_bytes = longest_bytes
        self._begun = b""  # of a frame
        self._large: list[bytes] = []  # parts of a large payload
        self._large_kind = self._missing_bytes = 0  # of it

    def frames(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Kind and payload of each frame that ends in `data`. Take all of them. Raises BrokenFrame."""
        if self._missing_bytes:
            part, data = data[: self._missing_bytes], data[self._missing_bytes :]
            self._large.append(part)
            self._missing_bytes -= len(part)
            if self._missing_bytes:
                return
            whole, self._large = b"".join(self._large), []
            yield self._large_kind, whole
        if self._begun:
            data, self._begun = self._begun + data, b""
        at = 0
        while len(data) - at >= _HEAD.size:
            length, kind = _HEAD.unpack_from(data, at)
            if length > self.longest_bytes:
                raise _too_long(length, self.longest_bytes)
            end = at + _HEAD.size + length
            if end > len(data):
                if length > _LARGE_BYTES:
                    self._large, self._large_kind = [data[at + _HEAD.size :]], kind
                    self._missing_bytes = end - len(data)
                    return
                break
            yield kind, data[at + _HEAD.size : end]
            at = end
        self._begun = data[at:]


def _too_long(length: int, longest_bytes: int) -> BrokenFrame:
    return BrokenFrame(f"a frame of {length} bytes; {longest_bytes} are the most")
