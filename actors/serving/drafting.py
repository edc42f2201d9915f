"""Which guesses are worth a place in a batch, and what became of them.

Guessed tokens are checked together, in the turn of the token before them: there is a row after each of them, and the
sampler goes through the rows in order, as it would in as many turns, until its token is not the guessed one. So the
answer is what it would be without drafts. What comes after a wrong guess is taken out of the cache again.
What a longer turn costs is measured, and so is what guesses bring (`Draft`). While a prompt is read, nothing is tried.
Guesses that are computed (`Guesser`) have a price of their own, which is measured too: how many there are to be is
decided before there is one. Where they do not pay, none is computed, and they are tried again after `LONGEST_TURNS`.
Cost: 10 microseconds per turn of an answer, and 40 where there are guesses, without those that compute them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from actors.serving.batch import Part
from actors.serving.draft import FORETOLD, Draft, Text
from actors.serving.generation import Generation
from actors.serving.model import Model
from actors.serving.protocol import Likelihood
from actors.serving.slot import Slot
from actors.serving.slots import Slots
from actors.serving.splitting import in_pieces

SIZES = (1, 3, 7)
"""Guesses of one answer in a turn, besides the most that there may be: with the token before them 2, 4, 8 or 16 rows.
Few sizes are soon measured."""

_WEIGHT = 1 / 4
"""Of the last turn in the measured seconds. A guess: one turn that was held up should not decide, and four should."""

LONGEST_TURNS = 1000
"""After so many turns a measured time counts as unknown, and that size is tried again. Four sizes that take three times
as long as a turn without guesses cost 1 % of the time."""

_STEADY = 2
"""Tokens that are to be read at the most before a guess, where texts go on from turn to turn: more are a prompt."""

_LASTING = 256
"""Tokens that an answer is expected to have left at the most, when a draft model has yet to read its prompt."""

_UNWANTED = 32
"""Turns without a computed guess after which what computes them rests."""

_SLOW_WEIGHT = 1 / 32
"""Of the last guess in the rate that new answers begin with."""


Computing = Callable[[int, Sequence[Generation]], AbstractContextManager[None]]
"""What is around a computation for these answers, of so many rows."""


class Drafting:
    """How long turns take that compute nothing but next tokens, by their rows; and what is guessed in the next one."""

    def __init__(
        self,
        slots: Slots,
        model: Model,
        computing: Computing = lambda n_rows, jobs: nullcontext(),
    ) -> None:
        """`computing`: around the computation of guesses for these answers."""
        self._slots = slots
        self._model = model
        self._computing = computing
        self._sizes = (*(size for size in SIZES if size < model.most_drafted), model.most_drafted)
        self._n_turns = 0
        self._turn = 0, 0.0, 0.0  # of the batches of this one: rows, seconds, and seconds of what guesses
        self._followed_s = 0.0  # how long what guesses followed the last turn
        self._measured: dict[int, tuple[float, int]] = {}  # seconds, and when they were measured last
        self._step: tuple[float, int] | None = None  # seconds for one more guess, and when they were measured last
        self._unwanted = 0  # turns in a row in which no guesses were to be computed
        self._read_s = 0.0  # per token that is read before guesses are computed
        self._rate, self._rated_at = FORETOLD, 0  # of guesses that are computed, for all answers

    def guesses(self, running: Sequence[tuple[Slot, Generation]]) -> dict[Generation, list[int]] | None:
        """What is to be tried in a turn of `running`. No answer loses its place in the cache over it. None: nobody
        guesses, or a prompt is read: such a turn says nothing of what rows cost."""
        jobs = [job for _, job in running if job.draft is not None]
        for slot, job in running:
            if job.draft is not None and job.draft.text is not None:
                job.draft.text.sequence = slot.sequence
        self._turn = 0, 0.0, 0.0
        if not jobs or any(job.pending is None for _, job in running):
            return None
        n_free = min(
            max(self._model.n_ubatch, self._model.n_seq_max),
            self._model.n_outputs,
            self._model.n_cells - sum(len(slot.tokens) for slot in self._slots),
        )
        return self.choose(jobs, len(running), n_free - len(running))

    def in_pieces(
        self, running: Sequence[tuple[Slot, Generation]], guesses: Mapping[Generation, list[int]] | None
    ) -> list[tuple[list[tuple[Slot, Generation]], bool]]:
        """Those of `running` that share a batch, one group after the other, and whether it is the last: all together,
        unless guesses can only be taken back where a batch is computed in one piece."""
        if not guesses or not self._model.copies_states:
            return [(list(running), True)]
        there = {slot.sequence: (slot, job) for slot, job in sorted(running, key=lambda pair: pair[0].sequence)}
        counts = {sequence: 1 + len(guesses.get(job, ())) for sequence, (_, job) in there.items()}
        pieces = in_pieces(counts, in_order=not self._model.shares_stream)
        return [([there[sequence] for sequence in piece], piece is pieces[-1]) for piece in pieces]

    def took(self, n_rows: int, seconds: float, *, is_last: bool = True) -> None:
        """A batch of next tokens and guesses. `is_last`: of its turn."""
        followed_s = self._model.guesser.followed_s if self._model.guesser is not None else 0.0
        rows_before, before_s, followed_before_s = self._turn
        self._turn = rows_before + n_rows, before_s + seconds - followed_s, followed_before_s + followed_s
        if not is_last:
            return
        (n_rows, seconds, self._followed_s), self._turn = self._turn, (0, 0.0, 0.0)
        self._n_turns += 1
        before = self._seconds(n_rows)
        mean = seconds if before is None else before + (seconds - before) * _WEIGHT
        self._measured[n_rows] = mean, self._n_turns

    def choose(self, jobs: Sequence[Generation], n_answers: int, n_free: int) -> dict[Generation, list[int]]:
        """The guesses that are worth their rows, at most `n_free` of them, in a turn of `n_answers`.

        They are worth it if the answers of the turn come faster all together: what one gains, the others wait for. What
        more rows cost than were measured is not known. They are taken to be free, and tried.
        """
        sizes: dict[Generation, int] = {}
        known_s, tokens, n_rows = self._seconds(n_answers), float(n_answers), n_answers
        spent_s, n_steps = 0.0, 0  # by all those that are computed
        for job in jobs:
            assert job.draft is not None
            most = min(job.n_left - 1, self._sizes[-1])
            if job.draft.text is None:
                most = len(job.draft.guess(most))
            if known_s is None or not self._may_guess(job.draft):
                continue
            best, best_gain, best_s, best_spent_s = 0, 0.0, known_s, spent_s
            self._rate_anew(job.draft)
            for size in self._sizes:
                if size > min(most, n_free):
                    break
                gain, turn_s = job.draft.expected(size), self._seconds_up_to(n_rows + size, n_rows, known_s)
                more_s = spent_s + self._computing_s(job, size, n_steps, gain)
                if (tokens + gain) * (best_s + best_spent_s) > (tokens + best_gain) * (turn_s + more_s):
                    best, best_gain, best_s, best_spent_s = size, gain, turn_s, more_s
            if best:
                sizes[job] = best
                tokens, known_s, spent_s = tokens + best_gain, best_s, best_spent_s
                n_rows, n_free = n_rows + best, n_free - best
                n_steps = max(n_steps, self._n_steps(job.draft, best))
        self._rest(sizes, known=known_s is not None)
        return self._used(sizes)

    def _may_guess(self, draft: Draft) -> bool:
        """Whether what computes its guesses knows enough of it."""
        return draft.text is None or (self._model.guesser is not None and self._model.guesser.can_guess(draft.text))

    def _n_steps(self, draft: Draft, size: int) -> int:
        """That are computed for so many guesses."""
        if draft.text is None or self._model.guesser is None:
            return 0
        return max(size, self._model.guesser.least_steps)

    def _rest(self, sizes: Mapping[Generation, int], *, known: bool) -> None:
        """What computes guesses rests after some turns in which nobody wanted any, until it is tried again."""
        guesser = self._model.guesser
        if guesser is None or not known:
            return
        self._unwanted = 0 if sizes else self._unwanted + 1
        guesser.rests = self._unwanted >= _UNWANTED and self._n_turns - self._rated_at < LONGEST_TURNS

    def _used(self, sizes: Mapping[Generation, int]) -> dict[Generation, list[int]]:
        """The guesses of these answers, at most so many. Those that have a price are computed now."""
        drafts = {job: job.draft for job in sizes if job.draft is not None}
        texts = {draft.text: sizes[job] for job, draft in drafts.items() if draft.text is not None}
        if texts and self._model.guesser is not None:
            n_unread = sum(self._model.guesser.unread(text) for text in texts)
            with self._computing(len(texts), list(drafts)):
                began = time.perf_counter()
                self._model.guesser.guess(texts)
                took_s = time.perf_counter() - began
            self._computed(took_s, n_unread, texts)
        used = {}
        for job, draft in drafts.items():
            guessed = draft.guess(sizes[job]) if draft.text is not None else None
            count = sizes[job] if guessed is None else len(guessed)
            if count:
                used[job] = draft.use(count)
        return used

    def _computed(self, seconds: float, n_unread: int, texts: Mapping[Text, int]) -> None:
        assert self._model.guesser is not None
        if n_unread > _STEADY * len(texts):
            if not any(text.ready for text in texts):
                per_token_s = seconds / n_unread
                self._read_s += (per_token_s - self._read_s) * (_WEIGHT if self._read_s else 1)
            return
        if not all(text.ready for text in texts):  # it was stopped, or too unsure
            return
        n_steps = max(self._model.guesser.least_steps, *(len(text.ready) for text in texts))
        step_s = (seconds + self._followed_s) / n_steps
        before = self._step[0] if self._step is not None else step_s
        self._step = before + (step_s - before) * _WEIGHT, self._n_turns

    def _computing_s(self, job: Generation, size: int, n_steps: int, gain: float) -> float:
        """How many seconds so many guesses take of their own, where `n_steps` are taken in any case: reading what comes
        before them, too, as far as a turn's share of it goes."""
        assert job.draft is not None
        if job.draft.text is None or self._model.guesser is None:
            return 0.0
        known = self._step is not None and self._n_turns - self._step[1] < LONGEST_TURNS
        step_s = self._step[0] if known and self._step is not None else 0.0
        n_unread = self._model.guesser.unread(job.draft.text)
        n_turns = min(job.n_left, _LASTING) / (1 + gain)
        reading_s = self._read_s * n_unread / n_turns if n_unread > _STEADY else 0.0
        return step_s * max(0, self._n_steps(job.draft, size) - n_steps) + reading_s

    def _rate_anew(self, draft: Draft) -> None:
        """What was seen of guesses long ago, or never, counts as what is seen of all answers, or as unknown."""
        if draft.text is None or (draft.rated_at >= 0 and self._n_turns - draft.rated_at < LONGEST_TURNS):
            return
        is_known = self._n_turns - self._rated_at < LONGEST_TURNS
        draft.rate_as(self._rate if is_known else FORETOLD, self._n_turns)

    def judged(self, part: Part, n_right: int) -> None:
        """So many of the guesses of an answer were right."""
        draft = part.job.draft
        if draft is None or draft.text is None or not part.guessed:
            return
        draft.rated_at = self._rated_at = self._n_turns
        if self._model.guesser is not None:
            self._model.guesser.judge(part.slot.sequence, n_right)
        for is_right in [True] * n_right + [False] * (n_right < len(part.guessed)):
            self._rate += (is_right - self._rate) * _SLOW_WEIGHT

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
