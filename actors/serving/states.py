"""What can be kept of a sequence, besides its tokens, while others use its cells; and how fast that is moved."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from scheduler.units import MIB

DISK_BYTES_PER_S = 500e6
"""At which a state is taken to be written, and to be read, before that was measured: that of a SATA SSD."""

MEMORY_BYTES_PER_S = 4e9
"""The same for a copy into the cache. A guess: a half of what one channel of memory copies."""

TELLING_BYTES = MIB
"""Smaller states say little about speeds: to make a file takes longer than to fill it."""

_WEIGHT = 1 / 4
"""Of the last state in a measured speed. A guess: one that was held up should not decide, and four should."""

log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """What of the first `n_tokens` of a slot cannot be cut."""

    n_tokens: int
    state: Any


@dataclass(frozen=True, slots=True)
class SavedState:
    """All that was kept of a sequence when it was saved, in the file at `path`. `tokens_per_s`: how fast its tokens had
    been read."""

    tokens: list[int]
    checkpoints: list[Checkpoint]
    state: Any
    tokens_per_s: float
    path: Path


class Speed:
    """How fast states are moved, as measured. Before that it is a guess."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._is_measured = False

    def took(self, n_bytes: int, seconds: float) -> None:
        """A state of so many bytes was moved."""
        if n_bytes < TELLING_BYTES or seconds <= 0:
            return
        weight = _WEIGHT if self._is_measured else 1.0
        self._bytes_per_s += (n_bytes / seconds - self._bytes_per_s) * weight
        self._is_measured = True

    def seconds(self, n_bytes: int) -> float:
        """That so many bytes will take."""
        return n_bytes / self._bytes_per_s


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of a replica. `copying`: out of the cache into RAM; `saving`: out of the cache into a file's pages; `reading`: a
    file, with its checksum; `loading`: into the cache."""

    copying: Speed = field(default_factory=lambda: Speed(MEMORY_BYTES_PER_S / 4))
    saving: Speed = field(default_factory=lambda: Speed(DISK_BYTES_PER_S))
    reading: Speed = field(default_factory=lambda: Speed(DISK_BYTES_PER_S))
    loading: Speed = field(default_factory=lambda: Speed(MEMORY_BYTES_PER_S))

    def restoring_s(self, n_bytes: int) -> float:
        """From the file to the cache."""
        return self.reading.seconds(n_bytes) + self.loading.seconds(n_bytes)


def drop(path: Path) -> None:
    """Deletes a state's file that cannot be used."""
    log.warning("%s cannot be used, and is deleted", path)
    with contextlib.suppress(OSError):
        path.unlink()
