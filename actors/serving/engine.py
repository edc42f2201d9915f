"""The engine: one loaded model that answers several callers at once. Free of Ray; llama_cpp is imported by loading.

`Engine(spec, endpoints, on_progress)` loads; `prepare` has a request made into tokens by the preparer and checks it;
`submit` hands it to the batcher; `close` frees everything. Every method may be called from any thread.
Invariant: a request that cannot be served as asked is Rejected before it takes a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from actors.devices.cores import Cores
from actors.serving.batcher import Batcher
from actors.serving.beat import Beat
from actors.serving.jobs import Embedded, Embedding, Generation, Hearer, Job, Results
from actors.serving.parsing import ParsedAnswer
from actors.serving.preparation import Errand, Prepared, Preparer
from actors.serving.protocol import BufferSizes, Chunk, EmbedRequest, GenerateRequest, LoadSpec
from actors.serving.text import TextStream
from scheduler.errors import Rejected

Result = TypeVar("Result")

MOST_EMBEDDED = 300_000
"""Tokens of all inputs of a request, OpenAI's own bound: it keeps its slot until all are embedded."""


class Engine:
    """A loaded replica. Raises LoadFailed when loading does not work; an exception of `on_progress` stops the load."""

    def __init__(
        self,
        spec: LoadSpec,
        rpc_endpoints: Sequence[str] = (),
        on_progress: Callable[[float], object] = lambda progress: None,
        beat: Beat | None = None,
        cores: Cores | None = None,
        preparer: Preparer | None = None,
    ) -> None:
        """`preparer`: one that has started, and is closed with the engine."""
        from actors.serving.journal import llama_log
        from actors.serving.native import NativeModel

        self._spec = spec
        self._preparer = preparer or Preparer()
        with ExitStack() as unless_loaded:
            unless_loaded.callback(self._preparer.close)
            self._preparer.read(spec.path, spec.chat_template)  # while the weights are loaded
            self._model = NativeModel(spec, rpc_endpoints, on_progress)
            unless_loaded.callback(self._model.close)
            self._batcher = Batcher(
                self._model, last_words=llama_log().last_errors, beat=beat, cores=cores or Cores.alone(spec.n_threads)
            )
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

    def prepare(
        self, request: GenerateRequest | EmbedRequest, hearer: Hearer[Any], errand: Errand | None = None
    ) -> Job[Any]:
        """The work that `request` makes: `submit`, `end` or `close` it. Its hearer gets chunks (the last one has the
        finish reason and the counts), or what was embedded: a vector of length 1 per input. Ending the `errand` ends
        the wait for it.

        Raises Rejected for a request that cannot be served, EngineFailed when there is nobody to ask.
        """
        if isinstance(request, EmbedRequest):
            return self._embedding(request, hearer, errand)
        if not self._model.can_generate:
            raise Rejected(f"{self._spec.model} is an embedding model; ask it for embeddings")
        if request.max_tokens is not None and request.max_tokens < 1:
            raise Rejected(f"max_tokens is {request.max_tokens}; it must be at least 1")
        prepared = self._preparer.prepare(request.content, self.n_ctx_per_slot, errand)
        try:
            return self._generation(request, prepared, hearer)
        except BaseException:
            if prepared.constraint is not None:
                prepared.constraint.close()
            raise

    def _generation(self, request: GenerateRequest, prepared: Prepared, hearer: Hearer[Chunk]) -> Generation:
        (prompt,) = prepared.prompts
        room = self.n_ctx_per_slot - len(prompt)
        if room < 1:
            raise Rejected(
                f"prompt is {len(prompt)} tokens; the slot holds {self.n_ctx_per_slot} with the answer. "
                "Shorten the prompt or load the model with a larger n_ctx",
                prompt_tokens=len(prompt),
                n_ctx=self.n_ctx_per_slot,
            )
        sampler = self._model.sampler(request.sampling)
        try:
            parsing = self._preparer.parsing(prepared.syntax) if prepared.syntax is not None else None
        except BaseException:
            sampler.close()
            raise
        parsed = ParsedAnswer(hearer, parsing) if parsing is not None else None
        job = Generation(
            request.lease_id,
            prompt,
            parsed or hearer,
            sampler,
            TextStream(request.stop + prepared.stops),
            room if request.max_tokens is None else min(room, request.max_tokens),
            prepared.constraint,
            prepared.preserved,
            request.source,
        )
        if parsed is not None:
            parsed.give_up = lambda: self.drop(job)
        return job

    def _embedding(self, request: EmbedRequest, hearer: Hearer[Embedded], errand: Errand | None) -> Embedding:
        """The model's own pooling, or the mean of the token vectors."""
        if self._model.is_reranker:
            raise Rejected(f"{self._spec.model} is a reranker; it has scores, not embeddings")
        if not self._spec.context.embeddings:  # its context has no room for them
            raise Rejected(f"{self._spec.model} is not loaded for embeddings; set embeddings: true for it")
        texts = self._preparer.prepare(request.content, self.n_ctx_per_slot, errand).prompts
        limit = self._model.n_ubatch if self._model.is_pooled else self.n_ctx_per_slot
        for index, text in enumerate(texts):
            if len(text) > limit:
                raise Rejected(f"input {index} is {len(text)} tokens; at most {limit} can be embedded at once")
        if (total := sum(map(len, texts))) > MOST_EMBEDDED:
            raise Rejected(f"the inputs are {total} tokens; at most {MOST_EMBEDDED} are allowed in one request")
        return Embedding(request.lease_id, texts, hearer, request.source)

    def submit(self, job: Job[Any]) -> None:
        """Queues `job`. Raises EngineFailed, and has closed it, when the engine is broken or closed."""
        self._batcher.submit(job)

    def drop(self, job: Job[Any]) -> None:
        """Ends `job` within one token, in the middle of its prompt too; nothing happens if it has ended already."""
        self._batcher.cancel(job)

    def resume(self) -> None:
        """A hearer takes again what it is told."""
        self._batcher.resume()

    def generate(self, request: GenerateRequest) -> Iterator[Chunk]:
        """The answer's chunks, for a caller in this process. Closing the iterator cancels it. Raises as `prepare` does,
        and EngineFailed when the engine fails. The request is queued when the first chunk is asked for."""
        results: Results[Chunk] = Results()
        return self._heard(self.prepare(request, results), results)

    def embed(self, request: EmbedRequest) -> list[Embedded]:
        """What `request` embeds, for a caller in this process. Raises as `generate` does."""
        results: Results[Embedded] = Results()
        return list(self._heard(self.prepare(request, results), results))

    def _heard(self, job: Job[Any], results: Results[Result]) -> Iterator[Result]:
        try:
            self.submit(job)
            yield from results
        finally:
            self.drop(job)

    def cancel(self, lease_id: str) -> bool:
        """Ends a request within one token: its stream stops without a last chunk. False when it is not running."""
        jobs = [job for job in self._batcher.jobs() if job.lease_id == lease_id]
        for job in jobs:
            self._batcher.cancel(job)
        return bool(jobs)

    def close(self) -> None:
        """Stops serving and frees the memory; requests under way fail with EngineFailed. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._batcher.close()
            self._model.close()
            self._preparer.close()
