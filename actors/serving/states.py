"""What can be kept of a sequence, besides its tokens, while others use its cells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


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
