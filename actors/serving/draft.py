"""The draft of an answer: tokens that are guessed ahead. Where the guesses come from is another matter (`Source`)."""

from __future__ import annotations

from typing import Protocol

_WEIGHT = 1 / 16
"""Of the last guess in the measured rate. With 1/4 source texts, read as answers, came 1 % slower, with 1/32 0.1 %."""


class Source(Protocol):
    """Where the guesses of one answer come from (`ngrams.Ngrams`)."""

    def take(self, token: int) -> None:
        """The answer goes on with it."""

    def guess(self, most: int) -> list[int]:
        """How it may go on, in at most so many tokens."""


class Draft:
    """The guesses of one answer, and how often they are right.

    All are compared with what comes, also those that were not put into a batch: so it is known what they would bring
    while they are not used. `n_drafted`, `n_accepted`: of those in batches, as llama-server counts them.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._guessed: list[int] = []
        self._at = 0  # how many of them have come
        self._n_in_batch = 0
        self._rate = 0.5
        self.n_drafted = self.n_accepted = 0

    def guess(self, most: int) -> list[int]:
        """How the answer may go on."""
        self._guessed, self._at, self._n_in_batch = self._source.guess(most), 0, 0
        return self._guessed

    def use(self, count: int) -> list[int]:
        """The first `count` guesses, which are put into a batch."""
        self._n_in_batch = count
        self.n_drafted += count
        return self._guessed[:count]

    def take(self, token: int) -> None:
        """The answer goes on with it, guessed or not."""
        if self._at < len(self._guessed):
            is_right = self._guessed[self._at] == token
            self._rate += (is_right - self._rate) * _WEIGHT
            self.n_accepted += is_right and self._at < self._n_in_batch
            self._at = self._at + 1 if is_right else len(self._guessed)
        self._source.take(token)

    def expected(self, count: int) -> float:
        """How many of the next `count` guesses will be right: those up to the first wrong one."""
        return sum(self._rate**number for number in range(1, count + 1))
