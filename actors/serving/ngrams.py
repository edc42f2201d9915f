"""Drafts without a model: a text that says again what it said before is guessed to go on as it did then.

What llama.cpp calls `ngram-simple`: the last tokens are looked for in the prompt and the answer, and what followed them
the last time is the guess. Here a place that was found is followed for as long as it is right.
Cost: 1 microsecond per token of the answer, whatever the context holds, and 0.4 per token of the prompt, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice, takewhile

SIZE_N = 3
"""Tokens that are looked for. llama.cpp takes 12: it does not measure what wrong guesses cost. In source texts (of this
project) 65 of 100 guesses are right with 3, and for 58 of 100 tokens there is one; with 12 it is 86, and 10. Where 16
rows take 1.25 times as long as one, that makes 1.56 and 1.10 times the speed; where they take 7.5 times as long, 1.02
and 1.03."""


class Ngrams:
    """The tokens of one answer and of its prompt, and where each run of `SIZE_N` of them ended last."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = list(prompt)
        grams = zip(*(prompt[at:] for at in range(SIZE_N)), strict=False)
        self._ends = {hash(gram): end for end, gram in enumerate(grams, SIZE_N)}
        self._distance = 0  # how long ago the text was as it is now; 0: never

    def take(self, token: int) -> None:
        """The answer goes on with it."""
        tokens = self._tokens
        if self._distance and tokens[-self._distance] != token:
            self._distance = 0
        tokens.append(token)
        gram, end = hash(tuple(tokens[-SIZE_N:])), len(tokens)
        if not self._distance:
            self._distance = end - self._ends.get(gram, end)
        self._ends[gram] = end

    def guess(self, most: int) -> list[int]:
        """How it may go on, in at most so many tokens. Pictures are no part of an answer."""
        if not self._distance:
            return []
        start = len(self._tokens) - self._distance
        since = self._tokens[start : start + most]
        # what was said since then may be short, and be said again and again
        return list(takewhile(lambda token: token >= 0, islice(cycle(since), most)))
