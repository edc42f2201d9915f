"""Frames on a stream socket: 4 bytes of length (little-endian), 1 byte of kind, and the payload."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

_HEAD = struct.Struct("<IB")
LONGEST_BYTES = 256 * 1024 * 1024
"""Of a payload: a request body of 32 MiB becomes at most as many tokens of 4 bytes."""


class BrokenFrame(OSError):
    """The other side ended in the middle of a frame, or speaks something else."""


def packed(kind: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return _HEAD.pack(len(payload), kind) + payload


def send(to: socket.socket, kind: int, payload: bytes = b"") -> None:
    """Send one frame on a blocking socket. Raises OSError when nobody listens any more."""
    if len(payload) < 65536:
        to.sendall(packed(kind, payload))
    else:  # no copy of a large one
        to.sendall(_HEAD.pack(len(payload), kind))
        to.sendall(payload)


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
    """Cuts frames out of bytes as they come. `longest_bytes` of a payload may be changed between two frames."""

    def __init__(self, longest_bytes: int = LONGEST_BYTES) -> None:
        self.longest_bytes = longest_bytes
        self._begun = bytearray()  # of a frame
        self._wanted_bytes = _HEAD.size  # until more can be said of it

    def frames(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Kind and payload of each frame that ends in `data`. Take all of them. Raises BrokenFrame."""
        if self._begun:
            self._begun += data
            if len(self._begun) < self._wanted_bytes:
                return
            data = bytes(self._begun)
            self._begun.clear()
        at = 0
        self._wanted_bytes = _HEAD.size
        while len(data) - at >= _HEAD.size:
            length, kind = _HEAD.unpack_from(data, at)
            if length > self.longest_bytes:
                raise _too_long(length, self.longest_bytes)
            end = at + _HEAD.size + length
            if end > len(data):
                self._wanted_bytes = _HEAD.size + length
                break
            yield kind, data[at + _HEAD.size : end]
            at = end
        self._begun += data[at:]


def _too_long(length: int, longest_bytes: int) -> BrokenFrame:
    return BrokenFrame(f"a frame of {length} bytes; {longest_bytes} are the most")
