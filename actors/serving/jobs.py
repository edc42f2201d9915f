"""The work of a replica: one `Generation` per answer, one `Embedding` per request for vectors. Each occupies one slot
while it runs.

A job knows what it still wants from the model and what it has to say to its caller; the batcher knows when. It says
it to its `Hearer`: results, and then always the end, with the error that ended the job if there was one. Only the
batcher's thread does.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from actors.serving.protocol import Chunk, FinishReason
from actors.serving.text import TextStream
from scheduler.costs.paces import Pace
from scheduler.errors import ArrieroError

TELLING_TOKENS = 32
"""From so many tokens on, a piece of a prompt shows how fast prompts are read."""

Result = TypeVar("Result")
Said_contra = TypeVar("Said_contra", contravariant=True)


class Sampler(Protocol):
    """A sampler chain; `close()` frees it."""

    def close(self) -> object: ...


class Constraint(Protocol):
    """What the tokens of an answer must follow (`preparation.Constraint`)."""

    def choose(self, pick: Callable[[Any], int]) -> int: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


class Hearer(Protocol[Said_contra]):
    """Whom a job speaks to. No call blocks.

    `stalled`: what was said is not taken, and the job waits until the batcher hears of a `resume`.
    """

    @property
    def stalled(self) -> bool: ...
    def say(self, result: Said_contra) -> None: ...
    def flush(self) -> None:
        """Nothing more will be said in this turn."""

    def end(self, error: BaseException | None) -> None: ...
    def close(self) -> None:
        """Frees what it holds before anything was said, for a job that is closed without an end."""


class Results(Generic[Result]):
    """Keeps the results of a job for a thread that iterates over them."""

    stalled = False

    def __init__(self) -> None:
        self._results: SimpleQueue[Result | BaseException | None] = SimpleQueue()

    def say(self, result: Result) -> None:
        self._results.put(result)

    def flush(self) -> None:
        """They are there already."""

    def end(self, error: BaseException | None) -> None:
        self._results.put(error)

    def close(self) -> None:
        """It holds nothing."""

    def __iter__(self) -> Iterator[Result]:
        """The results as they come; blocks in between. Raises the error that ended the job."""
        while (result := self._results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result


class Embedded(NamedTuple):
    """A text's vector, how many tokens it has, and how many texts follow."""

    vector: array[float]
    prompt_tokens: int
    left: int


class Job(Generic[Result]):
    """What generations and embeddings have in common."""

    def __init__(self, lease_id: str, prompt: list[int], hearer: Hearer[Result], source: str = "") -> None:
        self.lease_id = lease_id
        self.source = source  # who asks for it: an API key's name, or an address
        self.passed = 0  # how many that came later got a slot before it
        self.prompt = prompt
        self.hearer = hearer
        self.cancelled = False

    def end(self, error: BaseException | None = None) -> None:
        """No more results. Frees what the job holds."""
        self.close()
        self.hearer.end(error)

    def close(self) -> None:
        """Frees what the job holds."""
        self.hearer.close()


class Generation(Job[Chunk]):
    """One answer under way. `pending` is the sampled token that the next batch has to decode.

    With a `constraint` the token is chosen beside the engine's thread: `choosing` until then, `chosen` after it.
    `preserved`: special tokens that belong to the text.
    """

    def __init__(
        self,
        lease_id: str,
        prompt: list[int],
        hearer: Hearer[Chunk],
        sampler: Sampler,
        text: TextStream,
        max_tokens: int,
        constraint: Constraint | None = None,
        preserved: frozenset[int] = frozenset(),
        source: str = "",
    ) -> None:
        super().__init__(lease_id, prompt, hearer, source)
        self.preserved = preserved
        self.sampler: Any = sampler
        self.constraint = constraint
        self.choosing = False
        self.chosen: int | ArrieroError | None = None
        self.pending: int | None = None
        self.cached_tokens: int | None = None  # of the prompt; None until it has had a slot
        self.postponed_at = -1  # when it lost its slot: a count of the batcher's
        self._prompt_tokens = len(prompt)
        self._text = text
        self._max_tokens = max_tokens
        self._n_tokens = 0
        self._prompt_alone, self._prompt_s = 0, 0.0
        self._answer_alone, self._answer_s = 0, 0.0

    def begin_again(self, known: list[int]) -> None:
        """It loses its slot, which holds the tokens `known`: they, and the pending one, are to be read once more."""
        if self.pending is not None:
            self.prompt = [*known, self.pending]
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
                self.hearer.say(Chunk(shown))
            return False
        return True

    def cut_short(self) -> None:
        """Ends the answer because the context is full."""
        self._finish("length", "")

    def _finish(self, reason: FinishReason, shown: str) -> None:
        self.hearer.say(
            Chunk(
                text=shown + self._text.finish(),
                finish_reason=reason,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self.cached_tokens or 0,
                completion_tokens=self._n_tokens,
                pace=self._pace(),
            )
        )
        self.end()

    def close(self) -> None:
        super().close()
        self.sampler.close()
        if self.constraint is not None:
            self.constraint.close()


class Embedding(Job[Embedded]):
    """Texts to embed, one after the other; `done` of them are. Several may be in one batch."""

    def __init__(self, lease_id: str, texts: Sequence[list[int]], hearer: Hearer[Embedded], source: str = "") -> None:
        super().__init__(lease_id, max(texts, key=len), hearer, source)
        self.texts = texts
        self.done = 0
        self._total: Any = None  # of the vectors of the next text, so far

    def add(self, vectors: Any) -> None:
        """`vectors` of the next text: an array of shape (tokens, n_embd), or (1, n_embd) for a pooled one."""
        summed = vectors.sum(axis=0, dtype="float64")
        self._total = summed if self._total is None else self._total + summed

    def finish_text(self) -> None:
        """Says its vector with length 1. The mean and the sum of the token vectors point the same way."""
        length = float((self._total**2).sum()) ** 0.5
        prompt_tokens = len(self.texts[self.done])
        self.done += 1
        left = len(self.texts) - self.done
        self.hearer.say(Embedded(array("f", self._total / (length or 1.0)), prompt_tokens, left))
        self._total = None
