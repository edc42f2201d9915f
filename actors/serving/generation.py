"""One answer under way: what it still wants from the model, and what it tells of what the model says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from actors.serving.draft import Draft
from actors.serving.jobs import Hearer, Job
from actors.serving.likelihood import Told
from actors.serving.model import Adapters
from actors.serving.pieces import NO_MEDIA, Media
from actors.serving.protocol import Chunk, FinishReason, Likelihood, Timings
from actors.serving.states import SavedState
from actors.serving.text import TextStream
from actors.serving.thoughts import ThinkingBudget
from scheduler.costs.paces import Pace
from scheduler.errors import ArrieroError

TELLING_TOKENS = 32
"""From so many tokens on, a piece of a prompt shows how fast prompts are read."""


class Sampler(Protocol):
    """A sampler chain; `close()` frees it."""

    def allow_the_end(self) -> None: ...
    def close(self) -> object: ...


class Constraint(Protocol):
    """What the tokens of an answer must follow (`preparation.Constraint`)."""

    def choose(self, pick: Callable[[Any], int]) -> int: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


class Choice(NamedTuple):
    """What was found beside the engine's thread: the next token, how likely it was, and of tokens of the prompt."""

    token: int | None
    likelihood: Likelihood | None = None
    of_prompt: tuple[Likelihood, ...] = ()


@dataclass(frozen=True, slots=True)
class Wish:
    """What an answer is to be like, besides its sampler.

    `max_tokens` 0: the prompt is read and nothing is said. `min_tokens`: the sampler may not end it before. `opening`:
    what is told before it. `is_extra`: its request has another one, so it has a slot only while nobody else wants it.
    `n_probs`: how many likely tokens are told with each (None: nothing of the kind), and with
    `judge_prompt` with the prompt's tokens, too. `preserved`: special tokens that belong to the text.
    """

    max_tokens: int
    min_tokens: int = 0
    opening: str = ""
    n_probs: int | None = None
    judge_prompt: bool = False
    preserved: frozenset[int] = frozenset()
    is_extra: bool = False

    @property
    def takes_states(self) -> bool:
        """Whether its prompt may begin with a saved state: not if all of it is judged, or the first answer reads it."""
        return not (self.judge_prompt or self.is_extra)


class Generation(Job[Chunk]):
    """`pending` is the sampled token that the next batch has to decode.

    What must follow a `constraint`, or tells how likely its tokens are, is chosen beside the engine's thread:
    `choosing` until then, `chosen` after it.
    `first`: the first answer to the same prompt in a request that has several; this one waits until it has read it.
    `saved`: a state that spares it a part of its prompt; None once it was used, or where there is none.
    `media`: pictures and sounds of its prompt. What it reads next is encoded beside the engine's thread, too: it is
    `choosing` and `encoding` meanwhile.
    `draft`: guesses of its next tokens; None: nobody guesses.
    """

    def __init__(
        self,
        lease_id: str,
        prompt: list[int],
        hearer: Hearer[Chunk],
        sampler: Sampler,
        text: TextStream,
        wish: Wish,
        *,
        constraint: Constraint | None = None,
        budget: ThinkingBudget | None = None,
        first: Generation | None = None,
        source: str = "",
        saved: SavedState | None = None,
        adapters: Adapters = (),
        media: Media = NO_MEDIA,
        draft: Draft | None = None,
    ) -> None:
        super().__init__(lease_id, prompt, hearer, source, adapters)
        self.media = media
        self.draft = draft
        self.wish = wish
        self.sampler: Any = sampler
        self.constraint = constraint
        self.first = first
        self.saved = saved
        self.choosing = self.encoding = False
        self.chosen: Choice | ArrieroError | None = None
        self.pending: int | None = None
        self.ended = False
        self.cached_tokens: int | None = None  # of the prompt; None until it has had a slot
        self.n_shared = 0  # tokens of its prompt that an earlier one began with, too
        self.postponed_at = -1  # when it lost its slot: a count of the batcher's
        self._budget = budget
        self._prompt_tokens = len(prompt)
        self._text = text
        self._opening = wish.opening
        self._n_tokens = 0
        self._told = Told()
        self.n_judged = 0  # tokens of the prompt
        self._prompt_alone, self._prompt_s = 0, 0.0
        self._answer_alone, self._answer_s = 0, 0.0
        self._began_s = self._first_s = 0.0

    @property
    def is_read(self) -> bool:
        """Whether the model has read its prompt, or never will."""
        return self.pending is not None or self._n_tokens > 0 or self.ended

    @property
    def is_extra(self) -> bool:
        return self.wish.is_extra

    @property
    def is_deliberate(self) -> bool:
        """Whether its tokens are chosen beside the engine's thread."""
        return self.constraint is not None or self.wish.n_probs is not None

    @property
    def n_left(self) -> int:
        """Tokens that it may still say."""
        return self.wish.max_tokens - self._n_tokens

    def begin(self, cached_tokens: int) -> None:
        """It has a slot, which holds so many tokens of the prompt."""
        if self.cached_tokens is None:
            self.cached_tokens = cached_tokens
            self._began_s = self._first_s = time.perf_counter()

    def begin_again(self, known: list[int]) -> None:
        """It loses its slot, which holds the tokens `known`: they, and the pending one, are to be read once more."""
        if self.pending is not None:  # while the next one is chosen, it is among the known
            self.prompt = list(known) if self.choosing else [*known, self.pending]
            self.pending = None

    def took(self, n_tokens: int, seconds: float) -> None:
        """A batch with nothing but `n_tokens` of this job was decoded. Short pieces of a prompt say little."""
        if self.pending is not None:
            self._answer_alone, self._answer_s = self._answer_alone + n_tokens, self._answer_s + seconds
        elif n_tokens >= TELLING_TOKENS:
            self._prompt_alone, self._prompt_s = self._prompt_alone + n_tokens, self._prompt_s + seconds

    def _pace(self) -> Pace | None:
        if not self._prompt_alone and not self._answer_alone:
            return None
        n_past = self._prompt_tokens + self._n_tokens // 2
        return Pace(self._prompt_alone, self._prompt_s, self._answer_alone, self._answer_s, n_past)

    def forced(self) -> int | None:
        """The token that must come next, whatever the model says; None for none."""
        return self._budget.forced.popleft() if self._budget is not None and self._budget.forced else None

    @property
    def is_unjudged(self) -> bool:
        """Whether its prompt is to be judged, and nothing of it was."""
        return self.wish.judge_prompt and not self.n_judged

    def to_judge(self, start: int, count: int) -> range:
        """Which of the `count` places from `start` on say how likely the next token of the prompt is, and are asked."""
        if not self.wish.judge_prompt:
            return range(0)
        return range(max(start, self.n_judged - 1), min(start + count, self._prompt_tokens - 1))

    def judge(self, likelihoods: Sequence[Likelihood]) -> None:
        """Of the next tokens of the prompt."""
        self.n_judged += len(likelihoods)
        self._told.add_prompt(likelihoods)

    def accept(self, token: int, piece: bytes, *, ends: bool, likelihood: Likelihood | None = None) -> bool:
        """Takes the chosen token and says its text; True when it was the answer's last."""
        if not self._n_tokens:
            self._first_s = time.perf_counter()
        if ends:
            self._finish("stop", "")
            return True
        self._n_tokens += 1
        if self.draft is not None:
            self.draft.take(token)
        if self._n_tokens == self.wish.min_tokens:
            self.sampler.allow_the_end()
        if likelihood is not None:
            self._told.add(likelihood, len(piece))
        shown = self._text.push(piece)
        if self._budget is not None:
            self._budget.take(piece, is_whole=self._text.is_whole)
        if self._text.stopped:
            self._finish("stop", shown)
        elif self._n_tokens >= self.wish.max_tokens:
            self._finish("length", shown)
        else:
            self.pending = token
            if shown or self._opening or (likelihood is not None and not piece):  # else those of a whole answer pile up
                self.hearer.say(Chunk(self._opened(shown), likelihoods=self._told.take(shown)))
            return False
        return True

    def cut_short(self) -> None:
        """Ends the answer: the context is full, or nothing was to be said."""
        self._finish("length", "")

    def _opened(self, shown: str) -> str:
        opening, self._opening = self._opening, ""
        return opening + shown

    def _finish(self, reason: FinishReason, shown: str) -> None:
        stopped = self._text.stopped
        shown += self._text.finish()
        now_s = time.perf_counter()
        first_s = self._first_s if self._n_tokens else now_s
        drafted = (self.draft.n_drafted, self.draft.n_accepted) if self.draft is not None else (0, 0)
        self.hearer.say(
            Chunk(
                text=self._opened(shown),
                finish_reason=reason,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self.cached_tokens or 0,
                completion_tokens=self._n_tokens,
                pace=self._pace(),
                likelihoods=self._told.take(shown, cut=stopped),
                stopped_by=self._text.stopped_by,
                timings=Timings(first_s - self._began_s, now_s - first_s, *drafted),
            )
        )
        self.end()

    def close(self) -> None:
        self.ended = True
        super().close()
        self.sampler.close()
        if self.constraint is not None:
            self.constraint.close()
