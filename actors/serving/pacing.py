"""How much of the prompts a turn reads while others wait for it: no more than it can in a quarter of a second.

A token of a prompt takes longer the more tokens come before it, and everybody in the batch waits for it. How long is
measured, by the tokens before it (a doubling of them is a class). A turn of answers takes its own time in any case.
With large models that is long, so reading may take as long as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from actors.serving.fairness import shares

TURN_S = 0.25
"""That a turn may read, while others wait for it. Answers then come with four tokens per second, which is about as fast
as one reads."""

MANY = 64
"""Rows of a sequence from which on attention on a CPU takes tiles (`GGML_FA_TILE_Q`, ggml-cpu/common.h), and not row by
row. Behind 20,000 tokens 63 rows took 4.9 s, and 64 rows 0.8 s."""

ANSWERS_ALONE = 16
"""Of so many turns with answers, one reads nothing: so it is known what the answers take. Else what longer answers take
would count as the prompts', fewer rows would be read, and seem to take longer still."""

_SHORT = 512  # tokens: behind fewer, a row takes about as long as behind none
_WEIGHT = 0.5  # of the latest turn


class Reading(NamedTuple):
    """Of a prompt, in a turn: so many tokens, behind so many that are known."""

    source: str
    known: int
    n_tokens: int


class Pacing:
    """Of one context. Not thread-safe."""

    def __init__(self) -> None:
        self._row_s: dict[tuple[int, bool], tuple[float, int]] = {}  # with the tokens that came before, then
        self._answers_s = 0.0  # of the latest turn that read nothing
        self._n_mixed = 0  # turns since then

    def took(self, read: Sequence[Reading], seconds: float) -> None:
        """A turn that read this. What it takes to go through the weights is not the rows'."""
        if not read:
            self._n_mixed = 0
            self._answers_s = seconds
            return
        self._n_mixed += 1
        seconds = max(seconds - self._answers_s, seconds / 8)  # the answers may have become shorter
        n_rows = sum(piece.n_tokens for piece in read)
        expected = [self._seconds(piece.known, piece.n_tokens) or seconds / n_rows for piece in read]
        ratio = seconds / sum(piece.n_tokens * row_s for piece, row_s in zip(read, expected, strict=True))
        for piece, row_s in zip(read, expected, strict=True):
            key = _class_of(piece.known, piece.n_tokens)
            mean_s = row_s * (1 + (ratio - 1) * (_WEIGHT if key in self._row_s else 1))
            self._row_s[key] = mean_s, piece.known

    def limited(self, wanted: Sequence[Reading], *, beside_answers: bool) -> list[int]:
        """How many tokens of each are read in a turn that others wait for: at least one, or nothing at all once in a
        while. Sources share the time."""
        if beside_answers and self._n_mixed >= ANSWERS_ALONE:
            return [0] * len(wanted)
        row_s = [self._seconds(*piece[1:]) for piece in wanted]
        needs_us = [int(piece.n_tokens * each_s * 1e6) for piece, each_s in zip(wanted, row_s, strict=True)]
        limit_us = int(max(TURN_S, self._answers_s) * 1e6)
        if sum(needs_us) <= limit_us:
            return [piece.n_tokens for piece in wanted]
        given_us = shares([(piece.source, need) for piece, need in zip(wanted, needs_us, strict=True)], limit_us)
        return [
            piece.n_tokens if given >= need else self._rows(piece, given / 1e6)
            for piece, need, given in zip(wanted, needs_us, given_us, strict=True)
        ]

    def better_read_again(self, known: int, count: int) -> int:
        """How many of the tokens before `count` new ones are worth reading once more: as many as make them `MANY`, if
        that spares a turn's time."""
        if not {_class_of(known, count), _class_of(known, MANY)} <= self._row_s.keys() or count >= MANY:
            return 0
        spared_s = count * self._seconds(known, count) - MANY * self._seconds(known, MANY)
        return MANY - count if spared_s > TURN_S else 0

    def _rows(self, piece: Reading, seconds: float) -> int:
        """That are read in so many seconds. `MANY` may take longer, where that serves both sides: the speed of the
        prompt times that of the answers is greater."""
        few_s, many_s = self._seconds(piece.known, 1), self._seconds(piece.known, MANY)
        if piece.n_tokens >= MANY and MANY * many_s <= seconds:
            return min(piece.n_tokens, int(seconds / many_s))
        few = max(1, min(piece.n_tokens, MANY - 1, int(seconds / few_s) if few_s else MANY))
        if piece.n_tokens < MANY:
            return few
        few_turn_s, many_turn_s = self._answers_s + few * few_s, self._answers_s + MANY * many_s
        return MANY if MANY * few_turn_s**2 > few * many_turn_s**2 else few

    def _seconds(self, known: int, count: int) -> float:
        """Per row; 0: nothing is known. Where nothing was measured, `MANY` rows take no longer each than few."""
        size, are_many = _class_of(known, count)
        own, other = self._foretold(known, are_many), self._foretold(known, not are_many)
        if (size, are_many) in self._row_s or not (own and other):
            return own or other
        return min(own, other) if are_many else max(own, other)

    def _foretold(self, known: int, are_many: bool) -> float:
        """From what was measured behind about as much, or else less, or else more; 0: nothing. At the most a row's time
        grows as what comes before it."""
        size, _ = _class_of(known, 0)
        sizes = [each for each, many in self._row_s if many == are_many]
        nearest = max((each for each in sizes if each <= size), default=min(sizes, default=size))
        row_s, measured_at = self._row_s.get((nearest, are_many), (0.0, known))
        return row_s * max(1.0, (known + _SHORT) / (measured_at + _SHORT))


def _class_of(known: int, count: int) -> tuple[int, bool]:
    return (known // _SHORT).bit_length(), count >= MANY
