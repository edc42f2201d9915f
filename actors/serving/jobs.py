"""The work of a replica: one `Generation` per answer, one `Embedding` per text. Each occupies one slot while it runs.

A job knows what it still wants from the model and what it has to say to its caller; the batcher knows when. The
caller's thread reads `results` (chunks or a vector, then None); only the batcher's thread writes them, and it always
ends them, with None or with the error that ended the job.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from actors.serving.protocol import Chunk, FinishReason
from actors.serving.text import TextStream
from scheduler.costs.paces import Pace
from scheduler.errors import ArrieroError

TELLING_TOKENS = 32
"""From so many tokens on, a piece of a prompt shows how fast prompts are read."""

Result = TypeVar("Result")


class Sampler(Protocol):
    """A sampler chain; `close()` frees it."""

    def close(self) -> object: ...


class Constraint(Protocol):
    """What the tokens of an answer must follow (`preparation.Constraint`)."""

    def choose(self, pick: Callable[[Any], int]) -> int: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


class Job(Generic[Result]):
    """What generations and embeddings have in common."""

    def __init__(self, lease_id: str, prompt: list[int]) -> None:
        self.lease_id = lease_id
        self.prompt = prompt
        self.cancelled = False
        self._results: SimpleQueue[Result | BaseException | None] = SimpleQueue()

    def say(self, result: Result) -> None:
        self._results.put(result)

    def end(self, error: BaseException | None = None) -> None:
        """No more results; `error`, if any, is raised in the caller. Frees what the job holds."""
        self._results.put(error)

    def results(self) -> Iterator[Result]:
        """The results as they come; blocks in between. Raises the error that ended the job."""
        while (result := self._results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result


class Generation(Job[Chunk]):
    """One answer under way. `pending` is the sampled token that the next batch has to decode.

    With a `constraint` the token is chosen beside the engine's thread: `choosing` until then, `chosen` after it.
    """

    def __init__(
        self,
        lease_id: str,
        prompt: list[int],
        sampler: Sampler,
        text: TextStream,
        max_tokens: int,
        constraint: Constraint | None = None,
    ) -> None:
        super().__init__(lease_id, prompt)
        self.sampler: Any = sampler
        self.constraint = constraint
        self.choosing = False
        self.chosen: int | ArrieroError | None = None
        self.pending: int | None = None
        self.cached_tokens = 0
        self._text = text
        self._max_tokens = max_tokens
        self._n_tokens = 0
        self._prompt_alone, self._prompt_s = 0, 0.0
        self._answer_alone, self._answer_s = 0, 0.0

    def took(self, n_tokens: int, seconds: float) -> None:
        """A batch with nothing but `n_tokens` of this job was decoded. Short pieces of a prompt say little."""
        if self.pending is not None:
            self._answer_alone, self._answer_s = self._answer_alone + n_tokens, self._answer_s + seconds
        elif n_tokens >= TELLING_TOKENS:
            self._prompt_alone, self._prompt_s = self._prompt_alone + n_tokens, self._prompt_s + seconds

    def _pace(self) -> Pace | None:
        if not self._prompt_alone and not self._answer_alone:
            return None
        n_past = len(self.prompt) + self._n_tokens // 2
        return Pace(self._prompt_alone, self._prompt_s, self._answer_alone, self._answer_s, n_past)

    def accept(self, token: int, piece: bytes, *, ends: bool) -> bool:
        """Takes the sampled token and says its text; True when it was the answer's last."""
        if ends:
            self._finish("stop", "")
            return True
        self._n_tokens += 1
        shown = self._text.push(piece)
        if self._text.stopped:
            self._finish("stop", shown)
        elif self._n_tokens >= self._max_tokens:
            self._finish("length", shown)
        else:
            self.pending = token
            if shown:
                self.say(Chunk(shown))
            return False
        return True

    def cut_short(self) -> None:
        """Ends the answer because the context is full."""
        self._finish("length", "")

    def _finish(self, reason: FinishReason, shown: str) -> None:
        self.say(
            Chunk(
                text=shown + self._text.finish(),
                finish_reason=reason,
                prompt_tokens=len(self.prompt),
                cached_tokens=self.cached_tokens,
                completion_tokens=self._n_tokens,
                pace=self._pace(),
            )
        )
        self.end()

    def end(self, error: BaseException | None = None) -> None:
        self.sampler.close()
        if self.constraint is not None:
            self.constraint.close()
        super().end(error)


class Embedding(Job["array[float]"]):
    """One text to embed. `total` sums the token vectors seen so far (or is the pooled one)."""

    def __init__(self, lease_id: str, prompt: list[int]) -> None:
        super().__init__(lease_id, prompt)
        self.total: Any = None

    def add(self, vectors: Any) -> None:
        """`vectors`: an array of shape (tokens, n_embd)."""
        summed = vectors.sum(axis=0, dtype="float64")
        self.total = summed if self.total is None else self.total + summed

    def finish(self) -> None:
        """Says the vector with length 1. The mean and the sum of the token vectors point the same way."""
        length = float((self.total**2).sum()) ** 0.5
        self.say(array("f", self.total / (length or 1.0)))
        self.end()
