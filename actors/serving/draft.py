"""The draft of an answer: tokens that are guessed ahead. Where the guesses come from is another matter (`Source`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from actors.serving.model import Row

_WEIGHT = 1 / 16
"""Of the last guess in the measured rate. With 1/4 source texts, read as answers, came 1 % slower, with 1/32 0.1 %."""

HOPED, FORETOLD = 0.5, 0.8
"""How many of the next guesses are right before any was seen: of those that cost nothing, and of those that are
computed. The second would seldom be tried with a lower number, and it is soon known better."""


class Source(Protocol):
    """Where the guesses of one answer come from (`ngrams.Ngrams`, `Text`)."""

    def take(self, token: int) -> None:
        """The answer goes on with it."""

    def guess(self, most: int) -> list[int]:
        """How it may go on, in at most so many tokens. Costs next to nothing."""


class Text:
    """The source of an answer whose guesses are computed, by a `Guesser`, for several answers at once."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens = list(prompt)
        self.sequence = 0  # of the context, that its slot has
        self.ready: list[int] = []  # what was computed

    def take(self, token: int) -> None:
        self.tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """What was computed last."""
        return self.ready[:most]


class Guesser(Protocol):
    """Computes guesses (`draft_model.DraftModel`, `prediction.PredictionLayers`). All calls come from the thread that
    owns the model's context."""

    least_steps: int  # it takes as many as for so many guesses, however few are wanted
    rests: bool  # nobody is to be guessed for: `follow` does nothing
    followed_s: float  # how long the last `follow` took

    def can_guess(self, text: Text) -> bool:
        """Whether it knows enough of it."""

    def unread(self, text: Text) -> int:
        """Tokens that must be read before anything is guessed of it, besides the last."""

    def guess(self, wanted: Mapping[Text, int]) -> None:
        """Makes at most so many guesses `ready` for each text; none where it had to read too much first."""

    def follow(self, rows: Sequence[Row]) -> None:
        """The model has computed this batch."""

    def judge(self, sequence: int, n_right: int) -> None:
        """So many of the guesses in the last batch were right."""

    def forget(self, sequence: int, kept: int) -> None:
        """The model keeps no more than so many tokens of `sequence`."""

    def copy(self, source: int, sequence: int, count: int) -> None:
        """`sequence`, of which the model kept nothing, begins as `source` does, with so many tokens."""


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
        self.text = source if isinstance(source, Text) else None  # what a `Guesser` is to go on
        self._rate = FORETOLD if self.text else HOPED
        self.rated_at = -1  # a count of turns; -1: never
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

    def rate_as(self, rate: float, n_turns: int) -> None:
        """So many of its next guesses are expected to be right, as long as nothing else is seen."""
        self._rate, self.rated_at = rate, n_turns

    def expected(self, count: int) -> float:
        """How many of the next `count` guesses will be right: those up to the first wrong one."""
        return sum(self._rate**number for number in range(1, count + 1))
