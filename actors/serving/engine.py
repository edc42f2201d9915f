"""The engine: one loaded model that answers several callers at once. Free of Ray; llama_cpp is imported by loading.

`Engine(spec, endpoints, on_progress)` loads; `generate` and `embed` have a request made into tokens by the preparer,
check it and hand it to the batcher; `close` frees everything. Every method may be called from any thread.
Invariant: a request that cannot be served as asked is Rejected before it takes a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from actors.serving.batcher import Batcher
from actors.serving.beat import Beat
from actors.serving.jobs import Embedding, Generation
from actors.serving.preparation import Prepared, Preparer
from actors.serving.protocol import BufferSizes, Chunk, EmbedRequest, EmbedResult, GenerateRequest, LoadSpec
from actors.serving.text import TextStream
from scheduler.errors import EngineFailed, Rejected


class Engine:
    """A loaded replica. Raises LoadFailed when loading does not work; an exception of `on_progress` stops the load."""

    def __init__(
        self,
        spec: LoadSpec,
        rpc_endpoints: Sequence[str] = (),
        on_progress: Callable[[float], object] = lambda progress: None,
        beat: Beat | None = None,
    ) -> None:
        from actors.serving.journal import llama_log
        from actors.serving.native import NativeModel

        self._spec = spec
        self._preparer = Preparer(spec.path)  # reads the vocabulary while the weights are loaded
        with ExitStack() as unless_loaded:
            unless_loaded.callback(self._preparer.close)
            self._model = NativeModel(spec, rpc_endpoints, on_progress)
            unless_loaded.callback(self._model.close)
            self._batcher = Batcher(self._model, last_words=llama_log().last_errors, beat=beat)
            unless_loaded.pop_all()
        self._closed = False

    @property
    def buffers(self) -> BufferSizes:
        """What llama.cpp allocated, in its own words."""
        return self._model.buffers

    @property
    def n_ctx_per_slot(self) -> int:
        """Tokens that one sequence may hold, prompt and answer together."""
        return self._model.n_ctx_per_slot

    @property
    def broken(self) -> str:
        """Why the engine works no longer; "" while it does."""
        return self._batcher.broken

    @property
    def active_requests(self) -> tuple[str, ...]:
        """Ids of the requests running or waiting."""
        return tuple(dict.fromkeys(job.lease_id for job in self._batcher.jobs()))

    def generate(self, request: GenerateRequest) -> Iterator[Chunk]:
        """Streams the answer; the last chunk has the finish reason and the counts.

        Raises Rejected at once for a request that cannot be served, EngineFailed (also in mid-stream) when the engine
        fails. The request is queued when the first chunk is asked for; closing the iterator cancels it.
        """
        if not self._model.can_generate:
            raise Rejected(f"{self._spec.model} is an embedding model; ask it for embeddings")
        if request.max_tokens is not None and request.max_tokens < 1:
            raise Rejected(f"max_tokens is {request.max_tokens}; it must be at least 1")
        prepared = self._preparer.prepare(request.content, self.n_ctx_per_slot)
        try:
            return self._stream(self._generation(request, prepared))
        except BaseException:
            if prepared.constraint is not None:
                prepared.constraint.close()
            raise

    def _generation(self, request: GenerateRequest, prepared: Prepared) -> Generation:
        (prompt,) = prepared.prompts
        room = self.n_ctx_per_slot - len(prompt)
        if room < 1:
            raise Rejected(
                f"prompt is {len(prompt)} tokens; the slot holds {self.n_ctx_per_slot} with the answer. "
                "Shorten the prompt or load the model with a larger n_ctx",
                prompt_tokens=len(prompt),
                n_ctx=self.n_ctx_per_slot,
            )
        return Generation(
            request.lease_id,
            prompt,
            self._model.sampler(request.sampling),
            TextStream(request.stop + prepared.stops),
            room if request.max_tokens is None else min(room, request.max_tokens),
            prepared.constraint,
        )

    def _stream(self, job: Generation) -> Iterator[Chunk]:
        try:
            self._batcher.submit(job)
            yield from job.results()
        finally:
            self._batcher.cancel(job)

    def embed(self, request: EmbedRequest) -> EmbedResult:
        """One vector of length 1 per input: the model's own pooling, or the mean of its token vectors.

        Raises Rejected for an input that is empty or too long, EngineFailed when the engine fails.
        """
        if self._model.is_reranker:
            raise Rejected(f"{self._spec.model} is a reranker; it has scores, not embeddings")
        prompts = self._preparer.prepare(request.content, self.n_ctx_per_slot).prompts
        limit = self._model.n_ubatch if self._model.is_pooled else self.n_ctx_per_slot
        for index, prompt in enumerate(prompts):
            if len(prompt) > limit:
                raise Rejected(f"input {index} is {len(prompt)} tokens; at most {limit} can be embedded at once")
        # One after the other: a request has one lease, and takes no more slots than one.
        vectors = tuple(self._vector(Embedding(request.lease_id, prompt)) for prompt in prompts)
        return EmbedResult(vectors, sum(map(len, prompts)))

    def _vector(self, job: Embedding) -> Sequence[float]:
        try:
            self._batcher.submit(job)
            for vector in job.results():
                return vector
        finally:
            self._batcher.cancel(job)
        raise EngineFailed(f"the request of lease {job.lease_id} was cancelled")

    def cancel(self, lease_id: str) -> bool:
        """Ends a request within one token: its stream stops without a last chunk. False when it is not running."""
        jobs = [job for job in self._batcher.jobs() if job.lease_id == lease_id]
        for job in jobs:
            self._batcher.cancel(job)
        return bool(jobs)

    def set_threads(self, n_threads: int) -> None:
        """CPU threads to compute with, from the next token on."""
        if n_threads < 1:
            raise Rejected(f"n_threads is {n_threads}; at least one thread has to compute")
        self._batcher.set_threads(n_threads)

    def close(self) -> None:
        """Stops serving and frees the memory; requests under way fail with EngineFailed. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._batcher.close()
            self._model.close()
            self._preparer.close()
