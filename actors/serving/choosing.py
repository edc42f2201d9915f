"""Tokens that are chosen beside the engine's thread: under a grammar, which may take seconds for one, or with their
likelihoods, which take milliseconds. The tokens of a prompt are judged here, too."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from actors.serving.fair_threads import FairThreads
from actors.serving.generation import Choice, Generation
from actors.serving.likelihood import judged
from actors.serving.model import Model
from actors.serving.protocol import Likelihood
from scheduler.errors import ArrieroError, EngineFailed

Told = Callable[[Generation, Choice | ArrieroError], object]


class Chooser:
    """Its threads start with the first choice. An answer that loses its slot while it chooses keeps its thread, so
    there are more of them than slots. One source has as many as there are cores, or its grammars would take the time
    of all models: with 31 slow ones, streams of others took 60 to 100 ms per token instead of 3."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._threads = FairThreads(2 * model.n_seq_max, len(os.sched_getaffinity(0)), "choosing")

    def begin(self, job: Generation, row: int | None, judging: Sequence[int], tell: Told) -> None:
        """The engine's thread: the last batch's `row` says the job's next token (None: none is wanted), and the rows
        `judging` how likely the next tokens of its prompt are. Another thread tells what came of it."""
        logits = None if row is None else self._model.logits(row)
        judged_by = [self._model.logits(each) for each in judging]
        self._threads.submit(job.source, partial(self._choose, job, logits, judged_by, tell))

    def close(self) -> None:
        """Waits for whoever chooses: interrupt their constraints first."""
        self._threads.shutdown()

    def _choose(self, job: Generation, logits: Any, judging: Sequence[Any], tell: Told) -> None:
        chosen: Choice | ArrieroError
        try:
            of_prompt = self._judge(job, judging)
            if logits is None:
                chosen = Choice(None, None, of_prompt)
            else:
                token = self._pick(job, logits)
                n_probs = job.wish.n_probs
                likelihood = None if n_probs is None else judged(logits, token, n_probs, self._spell)
                chosen = Choice(token, likelihood, of_prompt)
        except ArrieroError as error:
            chosen = error
        except Exception as error:
            chosen = EngineFailed(f"no token could be chosen ({type(error).__name__}: {error})")
        tell(job, chosen)

    def _judge(self, job: Generation, judging: Sequence[Any]) -> tuple[Likelihood, ...]:
        """The first token of all comes after nothing."""
        prompt, n_probs = job.prompt, job.wish.n_probs or 0
        piece = b"" if prompt[0] == self._model.bos else self._spell(prompt[0])  # no part of what the client sent
        first = (Likelihood(prompt[0], piece, None),) if job.is_unjudged else ()
        following = prompt[max(1, job.n_judged) :]
        return first + tuple(
            judged(logits, token, n_probs, self._spell) for logits, token in zip(judging, following, strict=False)
        )

    def _pick(self, job: Generation, logits: Any) -> int:
        forced = job.forced()

        def pick(allowed: Any) -> int:
            if forced is not None and (allowed is None or allowed[forced]):
                return forced
            return self._model.pick(job.sampler, logits, allowed)

        token = job.constraint.choose(pick) if job.constraint is not None else pick(None)
        self._model.accept(job.sampler, token)
        return token

    def _spell(self, token: int) -> bytes:
        return self._model.piece(token, special=True)
