"""What a runner and its preparer say to each other: frames on a stream socket.

A frame is 4 bytes of length (little-endian), 1 byte of kind, and the payload. The runner asks, the preparer answers:

    PREPARE n_ctx, content   -> STEP* PROMPT* READY {"stops", "constrained"}, or REJECTED
    TRY token                -> TAKEN, or ALLOWED bits: only these tokens may come next
    (whoever was asked ended) -> ENDED why
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum

N_CTX = struct.Struct("<I")
TOKEN = struct.Struct("<i")
_HEAD = struct.Struct("<IB")
LONGEST_BYTES = 256 * 1024 * 1024
"""Of a payload: a request body of 32 MiB becomes at most as many tokens of 4 bytes."""


class Kind(IntEnum):
    PREPARE = 1
    STEP = 2  # what is being done, for whoever has to say what it ended over
    PROMPT = 3  # tokens, 4 bytes each
    READY = 4
    REJECTED = 5
    TRY = 6
    TAKEN = 7
    ALLOWED = 8
    ENDED = 9


class BrokenFrame(OSError):
    """The other side ended in the middle of a frame, or speaks something else."""


def send(to: socket.socket, kind: int, payload: bytes = b"") -> None:
    """Send one frame. Raises OSError when nobody listens any more."""
    head = _HEAD.pack(len(payload), kind)
    if len(payload) < 65536:
        to.sendall(head + payload)
    else:  # no copy of a large one
        to.sendall(head)
        to.sendall(payload)


def receive(source: socket.socket) -> tuple[int, bytes] | None:
    """The next frame's kind and payload; None at the end of the stream. Raises BrokenFrame, or what the socket does."""
    head = _exactly(source, _HEAD.size)
    if head is None:
        return None
    length, kind = _HEAD.unpack(head)
    if length > LONGEST_BYTES:
        raise BrokenFrame(f"a frame of {length} bytes; {LONGEST_BYTES} are the most")
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
