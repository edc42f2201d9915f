"""Small picture and sound files, good and bad."""

from __future__ import annotations

import io
import struct
import wave
import zlib

import numpy as np
from PIL import Image


def png(seed: int = 1, width: int = 60, height: int = 50) -> bytes:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return png_of(width, height, b"".join(b"\0" + row.tobytes() for row in pixels))


def png_of(width: int, height: int, raw: bytes, depth: int = 8, colours: int = 2) -> bytes:
    """`raw`: its rows, each after a byte for its filter."""
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def webp(seed: int = 1, frames: int = 1, quality: int = 0) -> bytes:
    """The same noise as `png(seed)`, and others in frames that follow. `quality`: 0 keeps all of it."""
    pictures = [Image.open(io.BytesIO(png(seed + frame))) for frame in range(frames)]
    file = io.BytesIO()
    pictures[0].save(
        file, "WEBP", lossless=not quality, quality=quality or 100, save_all=frames > 1, append_images=pictures[1:]
    )
    return file.getvalue()


def webp_head(width: int, height: int) -> bytes:
    """The beginning of one with frames, up to its size."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\0\0\0\0WEBPVP8X" + struct.pack("<II", 10, 2) + size


def of_xcode(width: int, height: int) -> bytes:
    """A PNG with a chunk of Apple's before its header, which says another size."""
    file = png_of(width, height, b"\0" * (3 * width + 1) * height)
    return file[:8] + struct.pack(">I", 8) + b"CgBI" + struct.pack(">II", 1, 1) + b"\0" * 4 + file[8:]


def gif(width: int, height: int) -> bytes:
    """A header only."""
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0" * 20


def bmp(width: int, height: int) -> bytes:
    """Black; the smallest header that there is."""
    row = (3 * width + 3) // 4 * 4
    pixels = b"\0" * row * height
    head = struct.pack("<IiiHHIIiiII", 40, width, -height, 1, 24, 0, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + head + pixels


def jpeg_head(width: int, height: int) -> bytes:
    """The beginning of one, up to its size."""
    return (
        b"\xff\xd8\xff\xe0\x00\x10"
        + b"\0" * 14
        + b"\xff\xff\xc0\x00\x11\x08"
        + struct.pack(">HH", height, width)
        + b"\3"
    )


def wav(hertz: float, seconds: float = 1.0, rate: int = 44100, width: int = 2, channels: int = 2) -> bytes:
    """A tone."""
    tone = np.sin(np.arange(int(rate * seconds)) * hertz * 2 * np.pi / rate)
    if width == 1:
        numbers = (128 + 100 * tone).astype(np.uint8).tobytes()
    else:
        high = (tone * 2**30).astype("<i4").view(np.uint8).reshape(-1, 4)
        numbers = high[:, 4 - width :].tobytes()
    frames = np.frombuffer(numbers, np.uint8).reshape(-1, width).repeat(channels, axis=0).tobytes()
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(width)
        writer.setframerate(rate)
        writer.writeframes(frames)
    return file.getvalue()
