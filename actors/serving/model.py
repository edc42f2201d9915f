"""What the batcher needs of a model. `NativeModel` is the real one; tests bring a fake one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class Row(NamedTuple):
    """One token of a batch. Only rows that want logits can be sampled afterwards."""

    token: int
    position: int
    sequence: int
    wants_logits: bool


class Model(Protocol):
    """What the batcher needs of a model (`NativeModel`, or a fake one in tests)."""

    n_seq_max: int
    n_ubatch: int
    n_vocab: int
    n_embd: int
    is_pooled: bool

    def warm_up(self) -> None: ...
    def decode(self, rows: Sequence[Row]) -> int: ...
    def embed(self, rows: Sequence[Row]) -> Any: ...
    def sample(self, sampler: Any, row: int) -> int: ...
    def piece(self, token: int) -> bytes: ...
    def ends_generation(self, token: int) -> bool: ...
    def keep_prefix(self, sequence: int, kept: int, stored: int) -> int: ...
    def set_threads(self, n_threads: int) -> None: ...
    def abort(self, wanted: bool) -> None: ...
