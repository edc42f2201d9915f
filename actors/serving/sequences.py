"""The sequences of a context: what llama.cpp's memory keeps of them is cut, forgotten, copied, saved and loaded.

A part of `NativeModel`. All calls belong to the thread that owns the context.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from actors.serving.draft import Guesser
from actors.serving.model import Row
from actors.serving.splitting import in_pieces
from scheduler.costs.host import MOST_CHECKPOINT_BYTES

_PARTIAL = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY, llama.h


class Sequences:
    """Of a context, which its owner makes and frees."""

    _context: Any
    _memory: Any
    _window: int  # tokens of the sliding window; 0: none, or all is kept
    n_ubatch: int
    _unified: bool  # all sequences share the cells
    _n_copies: int  # of each sequence's recurrent states, besides the latest
    _revocable: dict[int, int]  # tokens of the last batch that can be taken back, by sequence
    guesser: Guesser | None  # hears what is forgotten

    def cut(self, sequence: int, kept: int, stored: int) -> bool:
        """Forgets the `stored` tokens of `sequence` from position `kept` on. False, and nothing changed, where the
        memory cannot be cut there: a recurrent state has no past but its copies, and a sliding window has dropped what
        the cut would need."""
        usable = bool(self._memory) and (kept == stored or self._covers(sequence, kept))
        usable = usable and self._has_copy(sequence, kept)
        self._forgets(sequence, kept)
        return usable and bool(llama_cpp.llama_memory_seq_rm(self._memory, sequence, kept, -1))

    def _forgets(self, sequence: int, kept: int) -> None:
        if self.guesser is not None:
            self.guesser.forget(sequence, kept)

    def _has_copy(self, sequence: int, kept: int) -> bool:
        """Whether the recurrent states are what they were at position `kept`, or have a copy of that.

        llama.cpp keeps copies by how many tokens ago they were made, and goes back to them once, however old they are:
        it does not know whether the last batch made new ones, or moved the states to another cell without them.
        """
        if not self._n_copies:
            return True
        n_back = int(llama_cpp.llama_memory_seq_pos_max(self._memory, sequence)) + 1 - kept
        return n_back <= self._revocable.pop(sequence, 0)

    def _decoded(self, rows: Sequence[Row]) -> None:
        """They were the last batch."""
        self._revocable = {}
        counts = Counter(row.sequence for row in rows)
        if self._n_copies and len(rows) <= self.n_ubatch and len(in_pieces(counts, in_order=not self._unified)) == 1:
            self._revocable = {sequence: min(self._n_copies, n - 1) for sequence, n in counts.items()}

    def clear(self, sequence: int) -> None:
        """Forgets all of `sequence`."""
        self._forgets(sequence, 0)
        self._revocable.pop(sequence, None)
        if self._memory:
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def save_state(self, sequence: int) -> npt.NDArray[np.uint8] | None:
        """What cannot be cut of `sequence` (its windows and recurrent states), as it is now; None: it cannot be had."""
        size = llama_cpp.llama_state_seq_get_size_ext(self._context, sequence, _PARTIAL)
        if not 0 < size <= MOST_CHECKPOINT_BYTES:
            return None
        state = np.empty(size, np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        got = llama_cpp.llama_state_seq_get_data_ext(self._context, pointer, size, sequence, _PARTIAL)
        return state if got == size else None

    def load_state(self, sequence: int, state: npt.NDArray[np.uint8], kept: int) -> bool:
        """`sequence` is again as it was with its first `kept` tokens, when `state` was saved. False where that fails;
        then it is to be cleared."""
        self._revocable.pop(sequence, None)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read = llama_cpp.llama_state_seq_set_data_ext(self._context, pointer, len(state), sequence, _PARTIAL)
        return bool(read) and bool(llama_cpp.llama_memory_seq_rm(self._memory, sequence, kept, -1))

    def sequence_bytes(self, sequence: int) -> int:
        """Of all that is kept of `sequence`."""
        return int(llama_cpp.llama_state_seq_get_size(self._context, sequence))

    def save_sequence(self, sequence: int, into: npt.NDArray[np.uint8]) -> bool:
        """Writes all that is kept of `sequence`. False where that fails."""
        pointer = into.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return bool(llama_cpp.llama_state_seq_get_data(self._context, pointer, len(into), sequence) == len(into))

    def load_sequence(self, sequence: int, state: npt.NDArray[np.uint8]) -> bool:
        """`sequence`, which holds nothing, is what was saved. False where that fails, as in a cache without room; then
        it holds nothing."""
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama_cpp.llama_state_seq_set_data(self._context, pointer, len(state), sequence):
            return True
        self.clear(sequence)
        return False

    def copy_prefix(self, source: int, sequence: int, count: int) -> None:
        """`sequence`, which holds nothing, begins with the first `count` cells of `source`. Takes no memory."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, sequence, 0, count)
        if self.guesser is not None:
            self.guesser.copy(source, sequence, count)

    def _covers(self, sequence: int, kept: int) -> bool:
        """Whether the window of position `kept` is still cached (in a shared cache nobody can tell)."""
        if self._window == 0:
            return True
        oldest = llama_cpp.llama_memory_seq_pos_min(self._memory, sequence)
        return not self._unified and 0 <= oldest <= max(0, kept - self._window)
