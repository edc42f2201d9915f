"""What can be kept of a sequence, besides its tokens, while others use its cells."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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


def drop(path: Path) -> None:
    """Deletes a state's file that cannot be used."""
    log.warning("%s cannot be used, and is deleted", path)
    with contextlib.suppress(OSError):
        path.unlink()
