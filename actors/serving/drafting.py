"""Which guesses are worth a place in a batch, and what became of them.

Guessed tokens are checked together, in the turn of the token before them: there is a row after each of them, and the
sampler goes through the rows in order, as it would in as many turns, until its token is not the guessed one. So the
answer is what it would be without drafts. What comes after a wrong guess is taken out of the cache again.
What a longer turn costs is measured, and so is what guesses bring (`Draft`). While a prompt is read, nothing is tried.
Cost: 10 microseconds per turn of an answer, and 40 where there are guesses.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.serving.batch import Part
from actors.serving.generation import Generation
from actors.serving.model import Model
from actors.serving.protocol import Likelihood
from actors.serving.slot import Slot
from actors.serving.slots import Slots
from scheduler.costs.params import MOST_DRAFTED

SIZES = (1, 3, 7, MOST_DRAFTED)
"""Guesses of one answer in a turn: with the token before them 2, 4, 8 or 16 rows. Few sizes are soon measured."""

_WEIGHT = 1 / 4
"""Of the last turn in the measured seconds. A guess: one turn that was held up should not decide, and four should."""

LONGEST_TURNS = 1000
"""After so many turns a measured time counts as unknown, and that size is tried again. Four sizes that take three times
as long as a turn without guesses cost 1 % of the time."""


class Drafting:
    """How long turns take that compute nothing but next tokens, by their rows; and what is guessed in the next one."""

    def __init__(self, slots: Slots, model: Model) -> None:
        self._slots = slots
        self._model = model
        self._n_turns = 0
        self._measured: dict[int, tuple[float, int]] = {}  # seconds, and when they were measured last

    def guesses(self, running: Sequence[tuple[Slot, Generation]]) -> dict[Generation, list[int]] | None:
        """What is to be tried in a turn of `running`. No answer loses its place in the cache over it. None: nobody
        guesses, or a prompt is read: such a turn says nothing of what rows cost."""
        jobs = [job for _, job in running if job.draft is not None]
        if not jobs or any(job.pending is None for _, job in running):
            return None
        n_free = min(
            max(self._model.n_ubatch, self._model.n_seq_max),
            self._model.n_outputs,
            self._model.n_cells - sum(len(slot.tokens) for slot in self._slots),
        )
        return self.choose(jobs, len(running), n_free - len(running))

    def took(self, n_rows: int, seconds: float) -> None:
        """A turn of next tokens and guesses."""
        self._n_turns += 1
        before = self._seconds(n_rows)
        mean = seconds if before is None else before + (seconds - before) * _WEIGHT
        self._measured[n_rows] = mean, self._n_turns

    def choose(self, jobs: Sequence[Generation], n_answers: int, n_free: int) -> dict[Generation, list[int]]:
        """The guesses that are worth their rows, at most `n_free` of them, in a turn of `n_answers`.

        They are worth it if the answers of the turn come faster all together: what one gains, the others wait for. What
        more rows cost than were measured is not known. They are taken to be free, and tried.
        """
        chosen: dict[Generation, list[int]] = {}
        known_s, tokens, n_rows = self._seconds(n_answers), float(n_answers), n_answers
        for job in jobs:
            assert job.draft is not None
            guessed = job.draft.guess(min(job.n_left - 1, MOST_DRAFTED))
            if known_s is None:
                continue
            best, best_gain, best_s = 0, 0.0, known_s
            for size in SIZES:
                if size > min(len(guessed), n_free):
                    break
                gain, turn_s = job.draft.expected(size), self._seconds_up_to(n_rows + size, n_rows, known_s)
                if (tokens + gain) * best_s > (tokens + best_gain) * turn_s:
                    best, best_gain, best_s = size, gain, turn_s
            if best:
                chosen[job] = job.draft.use(best)
                tokens, known_s = tokens + best_gain, best_s
                n_rows, n_free = n_rows + best, n_free - best
        return chosen

    def _seconds(self, n_rows: int) -> float | None:
        """None: not known, or not any more."""
        seconds, last = self._measured.get(n_rows, (0.0, -LONGEST_TURNS))
        return seconds if self._n_turns - last < LONGEST_TURNS else None

    def _seconds_up_to(self, n_rows: int, known_rows: int, known_s: float) -> float:
        """Of the most rows that were measured, between `known_rows`, which take `known_s`, and `n_rows`."""
        measured = (self._seconds(fewer) for fewer in range(n_rows, known_rows, -1))
        return next((seconds for seconds in measured if seconds is not None), known_s)


def answer(model: Model, part: Part) -> tuple[int, bool]:
    """Takes the tokens that the rows of an answer say. Returns how many guesses were right, and whether it ended."""
    assert part.row is not None
    n_right = 0
    while True:
        token = _next_token(model, part.job, part.row + n_right)
        if accept(model, part.job, token):
            return n_right, True
        if n_right == len(part.guessed) or part.guessed[n_right] != token:
            return n_right, False
        n_right += 1


def _next_token(model: Model, job: Generation, row: int) -> int:
    token = job.forced()
    if token is None:
        return model.sample(job.sampler, row)
    model.accept(job.sampler, token)
    return token


def accept(model: Model, job: Generation, token: int, likelihood: Likelihood | None = None) -> bool:
    """True when it was the answer's last token."""
    ends = model.ends_generation(token)
    piece = b"" if ends else model.piece(token, special=token in job.wish.preserved)
    return job.accept(token, piece, ends=ends, likelihood=likelihood)
