"""llama.cpp's own speculative decoding (`common_speculative`), which has no C interface.

`llama_drafts.cpp` gives it one, in the library that set-up builds for chats (`llama_common`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import llama_cpp

from actors.serving.llama_common import library
from actors.serving.protocol import LoadFailed

_INTS = ctypes.POINTER(ctypes.c_int32)


@cache
def _library() -> ctypes.CDLL:
    loaded = library()
    pointer, count = ctypes.c_void_p, ctypes.c_int32
    making = [pointer, pointer, ctypes.c_char_p, count, ctypes.c_float, ctypes.c_uint32, ctypes.POINTER(pointer)]
    for name, result, arguments in (
        ("arriero_speculator", pointer, making),
        ("arriero_speculator_free", None, [pointer]),
        ("arriero_speculator_read", ctypes.c_bool, [pointer, _INTS, _INTS, _INTS, count]),
        ("arriero_speculator_guess", ctypes.c_bool, [pointer, _INTS, _INTS, _INTS, _INTS, count, _INTS, count, _INTS]),
        ("arriero_speculator_accept", ctypes.c_bool, [pointer, count, count]),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


class Speculator:
    """Guesses for all sequences of a context. `close()` frees it, before the contexts."""

    def __init__(self, target: Any, draft: Any, spec_type: str, n_max: int, p_min: float, n_seq: int) -> None:
        """`target`, `draft`: the `llama_context *` of the model, and of what guesses. Raises LoadFailed."""
        self._n_max = n_max
        error = ctypes.c_void_p()
        self._made = _library().arriero_speculator(
            target, draft, spec_type.encode(), n_max, p_min, n_seq, ctypes.byref(error)
        )
        if not self._made:
            reason = ctypes.string_at(error.value).decode("utf-8", "replace") if error.value else "no reason given"
            _library().arriero_free(error)
            raise LoadFailed("failed", f"llama.cpp takes no drafts from it: {reason}")

    def close(self) -> None:
        """Safe to call twice."""
        if self._made:
            _library().arriero_speculator_free(self._made)
            self._made = None

    def read(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]) -> bool:
        """What guesses reads these; False where that failed."""
        count = len(tokens)
        return bool(
            _library().arriero_speculator_read(self._made, _ints(tokens), _ints(positions), _ints(sequences), count)
        )

    def guess(self, asked: Sequence[tuple[int, int, int, int]]) -> list[list[int]]:
        """What follows, for each (sequence, its last token, the position of that, how many at most)."""
        count = len(asked)
        sequences, lasts, positions, most = (_ints(column) for column in zip(*asked, strict=True))
        guessed, counts = (ctypes.c_int32 * (count * self._n_max))(), (ctypes.c_int32 * count)()
        if not _library().arriero_speculator_guess(
            self._made, sequences, lasts, positions, most, count, guessed, self._n_max, counts
        ):
            return [[] for _ in asked]
        return [list(guessed[at * self._n_max : at * self._n_max + counts[at]]) for at in range(count)]

    def accept(self, sequence: int, n_right: int) -> None:
        """So many of the last guesses for `sequence` were right."""
        _library().arriero_speculator_accept(self._made, sequence, n_right)


def _ints(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int32 * len(numbers))(*numbers)


class GuessingContext:
    """What guesses: a context beside the model's own, and a speculator once it knows for whom."""

    context: Any = None
    _speculator: Speculator | None = None

    def set_threads(self, n_threads: int) -> None:
        llama_cpp.llama_set_n_threads(self.context, n_threads, n_threads)

    def close(self) -> None:
        """Safe to call twice."""
        if self._speculator is not None:
            self._speculator.close()
        if self.context:
            llama_cpp.llama_free(self.context)
        self._speculator = self.context = None
