"""Bytes and typed names: the vocabulary that every room shares.

Memory is `int` bytes everywhere; text such as "1.5GiB" exists only at the edges (files, flags, screens).
"""

from __future__ import annotations

import re
from typing import NewType

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

NodeId = NewType("NodeId", str)
DeviceId = NewType("DeviceId", str)
ReplicaId = NewType("ReplicaId", str)
RequestId = NewType("RequestId", str)
LeaseId = NewType("LeaseId", str)
LoadKey = NewType("LoadKey", str)

_FACTORS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": TIB, "tib": TIB, "tb": 1000**4,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes named by `text`: "96MiB", "1.5 GiB", "8GB", "512"; an `int` is taken as it is.

    Raises ValueError with the accepted spellings when the text is not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ValueError(f"a size cannot be negative: {text}")
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write bytes as 512, 96MiB, 1.5GiB or 8GB")
    try:
        return int(float(match.group(1)) * factor)
    except OverflowError:
        raise ValueError(f"{str(text)[:20]}... is more than any machine has") from None


def format_bytes(count: int, *, up: bool = False) -> str:
    """`count` bytes for people: one decimal, binary units ("9.1 GiB", "512 B"); `up`: never less than it is."""
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            tenths = -(-10 * count // size) if up else round(10 * count / size)
            return f"{tenths / 10:.1f} {unit}"
    return f"{count} B"


_RATE = re.compile(r"(.*?)\s*/\s*s(?:ec)?", re.I)


def parse_rate(text: str | float) -> float:
    """Bytes per second named by `text`: "936GB/s", "3 GiB/s", "500MB/s"; a number is taken as it is.

    Raises ValueError with the accepted spellings when the text is not a rate.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        try:
            rate = float(text)
        except OverflowError:
            rate = float("inf")
    else:
        match = _RATE.fullmatch(str(text).strip())
        if match is None:
            raise ValueError(f"{text!r} is not a rate; write bytes per second as 936GB/s or 500MB/s")
        rate = float(parse_bytes(match.group(1)))
    if not 1 <= rate <= 1e18:
        raise ValueError(f"{str(text)[:40]} is not a possible rate; write bytes per second as 936GB/s")
    return rate
