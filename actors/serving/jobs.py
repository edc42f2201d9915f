"""The work of a replica: one `Generation` (see there) per answer, one `Embedding` per request for vectors. Each takes a
slot while it runs.

A job knows what it still wants from the model and what it has to say to its caller; the batcher knows when. It says
it to its `Hearer`: results, and then always the end, with the error that ended the job if there was one. Only the
batcher's thread does.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from threading import Lock
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from actors.serving.model import Adapters
from actors.serving.protocol import Chunk

Result = TypeVar("Result")
Said_contra = TypeVar("Said_contra", contravariant=True)


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

    def __init__(
        self,
        lease_id: str,
        prompt: list[int],
        hearer: Hearer[Result],
        source: str = "",
        adapters: Adapters = (),
    ) -> None:
        self.lease_id = lease_id
        self.adapters = adapters  # that it is computed with
        self.source = source  # who asks for it: an API key's name, or an address
        self.passed = 0  # how many that came later got a slot before it
        self.prompt = prompt
        self.hearer = hearer
        self.cancelled = False

    @property
    def parts(self) -> Sequence[Job[Result]]:
        """What the batcher sees of it."""
        return (self,)

    def end(self, error: BaseException | None = None) -> None:
        """No more results. Frees what the job holds."""
        self.close()
        self.hearer.end(error)

    def close(self) -> None:
        """Frees what the job holds."""
        self.hearer.close()


class Choices:
    """The answers of one request, as one piece of work. The caller hears them together (`Together`)."""

    def __init__(self, parts: Sequence[Job[Chunk]]) -> None:
        self.parts = parts
        self.lease_id = parts[0].lease_id

    def end(self, error: BaseException | None = None) -> None:
        """No more results. Frees what they hold."""
        for part in self.parts:
            part.end(error)

    def close(self) -> None:
        """Frees what they hold."""
        for part in self.parts:
            part.close()


class Answered:
    """A question that needs no model, with its answer, a JSON text. It is told when it is submitted."""

    def __init__(self, lease_id: str, hearer: Hearer[Chunk], answer: str) -> None:
        self.lease_id = lease_id
        self.parts: Sequence[Job[Chunk]] = ()
        self._hearer = hearer
        self._answer = answer

    def tell(self) -> None:
        self._hearer.say(Chunk(self._answer, "stop"))
        self._hearer.end(None)

    def end(self, error: BaseException | None = None) -> None:
        """Nobody wants it any more."""
        self._hearer.end(error)

    def close(self) -> None:
        """It holds nothing."""


Work = Job[Any] | Choices | Answered
"""What a request makes."""


class Together:
    """Hears several answers and tells `hearer` of them as of one: it ends with the last of them, or with the first
    error. Prompts count once, however many answers they get.

    `give_up`: called when an answer fails; the others are to end.
    """

    def __init__(self, hearer: Hearer[Chunk], count: int, per_prompt: int) -> None:
        self._hearer = hearer
        self._per_prompt = per_prompt
        self._lock = Lock()  # parsed answers speak in threads of their own
        self._left = self._open = count
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = self._reasoning_tokens = 0
        self._error: BaseException | None = None
        self.give_up: Callable[[], object] = lambda: None

    def of(self, index: int) -> Hearer[Chunk]:
        """Who hears the answer with this number."""
        return _OneOf(self, index)

    @property
    def stalled(self) -> bool:
        return self._hearer.stalled

    def say(self, index: int, chunk: Chunk) -> None:
        with self._lock:
            if chunk.finish_reason is not None:
                self._left -= 1
                if index % self._per_prompt == 0:
                    self._prompt_tokens += chunk.prompt_tokens
                    self._cached_tokens += chunk.cached_tokens
                self._completion_tokens += chunk.completion_tokens
                self._reasoning_tokens += chunk.reasoning_tokens
                chunk = replace(
                    chunk,
                    prompt_tokens=self._prompt_tokens,
                    cached_tokens=self._cached_tokens,
                    completion_tokens=self._completion_tokens,
                    reasoning_tokens=self._reasoning_tokens,
                    pace=None,
                    timings=None,
                )
            self._hearer.say(replace(chunk, index=index, left=self._left))

    def flush(self) -> None:
        with self._lock:
            self._hearer.flush()

    def end(self, error: BaseException | None) -> None:
        with self._lock:
            self._open -= 1
            first_error, self._error = self._error is None and error is not None, self._error or error
            if not self._open:
                self._hearer.end(self._error)
        if first_error:
            self.give_up()


class _OneOf:
    def __init__(self, together: Together, index: int) -> None:
        self._together = together
        self._index = index

    @property
    def stalled(self) -> bool:
        return self._together.stalled

    def say(self, result: Chunk) -> None:
        self._together.say(self._index, result)

    def flush(self) -> None:
        self._together.flush()

    def end(self, error: BaseException | None) -> None:
        self._together.end(error)

    def close(self) -> None:
        """It holds nothing."""


class Embedding(Job[Embedded]):
    """Texts to embed, one after the other; `done` of them are. Several may be in one batch.

    `dimensions`: the vectors' first numbers, which are scaled to length 1. None: as the model gives them.
    """

    def __init__(
        self,
        lease_id: str,
        texts: Sequence[list[int]],
        hearer: Hearer[Embedded],
        dimensions: int | None,
        source: str = "",
        adapters: Adapters = (),
    ) -> None:
        super().__init__(lease_id, max(texts, key=len), hearer, source, adapters)
        self.texts = texts
        self._dimensions = dimensions
        self.done = 0
        self._total: Any = None  # of the vectors of the next text, so far

    def add(self, vectors: Any) -> None:
        """`vectors` of the next text: an array of shape (tokens, n_embd), or (1, n_embd) for a pooled one."""
        summed = vectors.sum(axis=0, dtype="float64")
        self._total = summed if self._total is None else self._total + summed

    def finish_text(self) -> None:
        """Says its vector. The mean and the sum of the token vectors point the same way."""
        vector = self._total
        if self._dimensions is not None:
            vector = vector[: self._dimensions]
            vector = vector / (float((vector**2).sum()) ** 0.5 or 1.0)
        prompt_tokens = len(self.texts[self.done])
        self.done += 1
        left = len(self.texts) - self.done
        self.hearer.say(Embedded(array("f", vector), prompt_tokens, left))
        self._total = None
