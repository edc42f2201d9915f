"""What the batcher needs of a model. `NativeModel` is the real one; tests bring a fake one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from actors.serving.pieces import Eyes, Medium, Piece

if TYPE_CHECKING:
    from actors.serving.draft import Guesser

Adapters = tuple[tuple[int, float], ...]
"""LoRA adapters by their number, with scales other than 0, in order. A batch is computed with one such set."""


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
    n_cells: int  # tokens that all slots may hold together
    n_vocab: int
    n_embd: int
    bos: int  # the token that begins every text; -1 where there is none
    n_outputs: int  # rows of a batch that may want logits
    is_pooled: bool
    reads_whole: bool  # a text must be in one batch: a token knows those behind it, or there is no memory
    keeps_states: bool  # a sequence cannot be cut everywhere (`cut`), but it can be set back (`load_state`)
    copies_states: (
        bool  # what cannot be cut can be taken back after a batch that is computed in one piece (`in_pieces`)
    )
    shares_stream: bool  # all sequences share the cells of its cache
    shares_cells: bool  # a sequence may begin with cells of another (`copy_prefix`)
    most_drafted: int  # tokens of an answer that are guessed at once

    @property
    def guesser(self) -> Guesser | None:
        """What computes guesses for it."""

    @property
    def eyes(self) -> Eyes | None:
        """What takes pictures and sounds for it."""

    def warm_up(self) -> None: ...
    def use_adapters(self, adapters: Adapters) -> None: ...
    def decode(self, rows: Sequence[Row]) -> int: ...
    def embed(self, rows: Sequence[Row]) -> Any: ...
    def encode(self, medium: Medium) -> None: ...
    def decode_media(self, pieces: Sequence[Piece]) -> int: ...
    def sample(self, sampler: Any, row: int) -> int: ...
    def logits(self, row: int) -> Any: ...
    def pick(self, sampler: Any, logits: Any, allowed: Any) -> int: ...
    def accept(self, sampler: Any, token: int) -> None: ...
    def piece(self, token: int, *, special: bool = False) -> bytes: ...
    def ends_generation(self, token: int) -> bool: ...
    def cut(self, sequence: int, kept: int, stored: int) -> bool: ...
    def clear(self, sequence: int) -> None: ...
    def save_state(self, sequence: int) -> Any | None: ...
    def load_state(self, sequence: int, state: Any, kept: int) -> bool: ...
    def copy_prefix(self, source: int, sequence: int, count: int) -> None: ...
    def sequence_bytes(self, sequence: int) -> int: ...
    def save_sequence(self, sequence: int, into: Any) -> bool: ...
    def load_sequence(self, sequence: int, state: Any) -> bool: ...
    def set_threads(self, n_threads: int) -> None: ...
    def abort(self, wanted: bool) -> None: ...
