"""Small MP3 and FLAC files, made by hand: no encoder is needed for a tone."""

from __future__ import annotations

from functools import cache

import numpy as np

RATE = 44100


class _Bits:
    """Numbers of any width, one after the other."""

    def __init__(self) -> None:
        self._text: list[str] = []

    def put(self, number: int, width: int) -> None:
        self._text.append(f"{number % 2**width:0{width}b}")

    def bytes(self, size: int = 0) -> bytes:
        text = "".join(self._text)
        text += "0" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big").ljust(size, b"\0")


@cache
def _table(polynomial: int, width: int) -> list[int]:
    found = []
    for byte in range(256):
        crc = byte << (width - 8)
        for _ in range(8):
            crc = ((crc << 1) ^ (polynomial if crc >> (width - 1) & 1 else 0)) & (2**width - 1)
        found.append(crc)
    return found


def _crc(data: bytes, polynomial: int, width: int) -> bytes:
    crc, table = 0, _table(polynomial, width)
    for byte in data:
        crc = (crc << 8) & (2**width - 1) ^ table[(crc >> (width - 8)) ^ byte]
    return crc.to_bytes(width // 8, "big")


def flac(hertz: float, seconds: float = 1.0, rate: int = RATE, channels: int = 2, told: int | None = None) -> bytes:
    """A tone of half the loudness there is. `told`: samples that its header claims to have."""
    tone = (np.sin(np.arange(int(rate * seconds)) * hertz * 2 * np.pi / rate) * 2**14).astype(">i2")
    blocks = [tone[at : at + _BLOCK] for at in range(0, len(tone), _BLOCK)]
    frames = [_frame(i, len(block), b"\x02" + block.tobytes(), channels) for i, block in enumerate(blocks)]
    return _flac_head(rate, channels, len(tone) if told is None else told) + b"".join(frames)


def flac_bomb(frames: int, rate: int = RATE) -> bytes:
    """Frames of 65,535 equal samples, in 20 bytes each."""
    made = b"".join(_frame(i, _LARGEST, b"\x00\x10\x00", 2) for i in range(min(frames, 0xD800)))
    return _flac_head(rate, 2, 0) + made * -(-frames // 0xD800)


_BLOCK, _LARGEST = 4096, 65535


def _flac_head(rate: int, channels: int, count: int) -> bytes:
    head = _Bits()
    for number, width in (
        (_BLOCK, 16), (_LARGEST, 16), (0, 24), (0, 24), (rate, 20), (channels - 1, 3), (15, 5), (count, 36), (0, 128),
    ):  # fmt: skip
        head.put(number, width)
    return b"fLaC\x80\0\0\x22" + head.bytes()


def _frame(index: int, count: int, samples: bytes, channels: int) -> bytes:
    """`samples`: those of every channel, 16 bits each, after a byte for how they are written."""
    head = _Bits()
    for number, width in ((0b111111111111100, 15), (0, 1), (7, 4), (0, 4), (channels - 1, 4), (4, 3), (0, 1)):
        head.put(number, width)
    started = head.bytes() + chr(index).encode() + (count - 1).to_bytes(2, "big")
    body = started + _crc(started, 0x07, 8) + samples * channels
    return body + _crc(body, 0x8005, 16)


def mp3(seconds: float = 1.0, line: int = 26) -> bytes:
    """A tone of (`line` + 0.5) x 38.3 Hz, one channel, 44.1 kHz: one number of the spectrum in each granule. `line`: an
    even number."""
    frame = _Bits()
    frame.put(0xFFFB90C0, 32)  # MPEG 1, layer 3, no checksum, 128 kbit/s, 44.1 kHz, one channel
    frame.put(0, 9 + 5 + 4)
    for _ in range(2):
        for number, width in (
            (line // 2 + 3, 12),  # bits of the spectrum
            (line // 2 + 1, 9),  # pairs of numbers
            (196, 8),  # how loud
            (0, 4), (0, 1), (1, 5), (0, 5), (0, 5), (15, 4), (7, 3), (0, 1), (0, 1), (0, 1),
        ):  # fmt: skip
            frame.put(number, width)
    for _ in range(2):
        for _ in range(line // 2):
            frame.put(1, 1)  # by table 1: two zeros
        frame.put(0b010, 3)  # a one and a zero, and the sign of the one
    return frame.bytes(417) * max(1, round(seconds * RATE / 1152))
