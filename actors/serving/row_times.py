"""How long a token of a prompt takes, by the tokens before it: a few may be read sooner together with known ones.

llama.cpp's attention on a CPU takes tiles of 64 rows of a sequence, and goes row by row below that. Behind 20,000
tokens 63 rows took 4.9 s, and 64 rows 0.8 s. Everybody in the batch waits for it. Where that is so is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MANY = 64
"""Rows of a tile (`GGML_FA_TILE_Q`, ggml-cpu/common.h)."""

WORTH_S = 0.25
"""To spare less time is not worth reading anything again."""

_SHORT = 512  # tokens: behind fewer, a row takes about as long as behind none
_WEIGHT = 0.5  # of the latest turn


class Reading(NamedTuple):
    """Of a prompt, in a turn: so many tokens, behind so many that are known."""

    known: int
    n_tokens: int


class RowTimes:
    """Of one context. Not thread-safe."""

    def __init__(self) -> None:
        self._row_s: dict[tuple[int, bool], float] = {}
        self._answers_s = 0.0  # of the latest turn that read nothing

    def took(self, read: Sequence[Reading], seconds: float) -> None:
        """A turn that read this. What several prompts take together says nothing of one. What it takes to go through
        the weights, and for the answers of the turn, is not the rows'."""
        if not read:
            self._answers_s = seconds
        if len(read) != 1:
            return
        [piece] = read
        row_s = max(seconds - self._answers_s, 0.0) / piece.n_tokens
        before = self._row_s.get(key := _class_of(*piece), row_s)
        self._row_s[key] = before + (row_s - before) * _WEIGHT

    def better_read_again(self, known: int, count: int) -> int:
        """How many of the `known` tokens before `count` new ones are worth reading once more: as many as make them
        `MANY`, where that spares time."""
        few_s, many_s = self._row_s.get(_class_of(known, count)), self._row_s.get(_class_of(known, MANY))
        if count >= MANY or known < MANY or few_s is None or many_s is None:
            return 0
        return MANY - count if count * few_s - MANY * many_s > WORTH_S else 0


def _class_of(known: int, count: int) -> tuple[int, bool]:
    """What is measured together: behind a doubling of tokens, many rows or few."""
    return (known // _SHORT).bit_length(), count >= MANY
