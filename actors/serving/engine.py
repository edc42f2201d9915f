"""The engine: one loaded model that answers several callers at once. Free of Ray; llama_cpp is imported by loading.

`Engine(spec, endpoints, on_progress)` loads; `prepare` has a request made into tokens by the preparer and checks it;
`submit` hands it to the batcher; `park` saves what was read of conversations; `close` frees everything. Every method
may be called from any thread.
Invariant: a request that cannot be served as asked is Rejected before it takes a slot.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from actors.devices.cores import Cores
from actors.serving.adapter_choice import chosen_adapters
from actors.serving.batch import longest_text
from actors.serving.batcher import Batcher
from actors.serving.beat import Beats
from actors.serving.child_memory import refuse_too_large
from actors.serving.counted_text import CountedText
from actors.serving.dialogue import prompt_too_long
from actors.serving.draft import Draft, Text
from actors.serving.generation import Generation, Wish
from actors.serving.jobs import Answered, Choices, Embedded, Embedding, Hearer, Results, Together, Work
from actors.serving.keeping import Keeper
from actors.serving.model import Adapters
from actors.serving.ngrams import Ngrams
from actors.serving.parsing import ParsedAnswer
from actors.serving.pieces import Media
from actors.serving.preparation import Errand, Prepared, Preparer
from actors.serving.protocol import BufferSizes, Chunk, EmbedRequest, GenerateRequest, LoadSpec, Sampling
from actors.serving.states import SavedState
from actors.serving.text import TextStream
from actors.serving.vector_sizes import refuse_cut
from scheduler.errors import EngineFailed, Rejected

Result = TypeVar("Result")

MOST_EMBEDDED = 300_000
"""Tokens of all inputs of a request, OpenAI's own bound: it keeps its slot until all are embedded."""

MOST_PREPARED = 8
"""Answers of one request that need a preparer's child each, or two, or large tables (`dry`)."""

MOST_OF_A_PROMPT = 16_000
"""Likelihoods of a prompt's tokens. The engine's thread tells them at once: 43 ms."""

MOST_LIKELIHOODS = 64_000
"""Of a request whose answers are sent whole. They are kept until the end, and put together there: 53 ms."""

MOST_IN_A_RESPONSE = 4_000
"""Of OpenAI's responses, whose last event tells all of them once more. The engine's thread makes it: 50,000 took 271
ms."""

MOST_PARKING_S = 2.0
"""No save begins after it: another model waits for the memory. A guess."""


class Engine:
    """A loaded replica. Raises LoadFailed when loading does not work; an exception of `on_progress` stops the load."""

    def __init__(
        self,
        spec: LoadSpec,
        rpc_endpoints: Sequence[str] = (),
        on_progress: Callable[[float], object] = lambda progress: None,
        beats: Beats | None = None,
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
            self._keeper = Keeper(spec, can_cut=not self._model.keeps_states) if spec.saved_state_bytes else None
            self._batcher = Batcher(
                self._model,
                last_words=llama_log().last_errors,
                beats=beats,
                cores=cores or Cores.alone(spec.n_threads),
                keeper=self._keeper,
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
    ) -> Work:
        """The work that `request` makes: `submit`, `end` or `close` it. Its hearer gets chunks (the last one has the
        finish reason and the counts), or what was embedded: a vector of length 1 per input. Ending the `errand` ends
        the wait for it.

        Raises Rejected for a request that cannot be served, EngineFailed when there is nobody to ask.
        """
        if isinstance(request, EmbedRequest):
            return self._embedding(request, hearer, errand)
        if request.max_tokens is not None and request.max_tokens < 0:
            raise Rejected(f"max_tokens is {request.max_tokens}; it must be at least 0")
        chosen_adapters(self._spec.model, self._spec.adapters, request.lora)  # a wrong one is refused before all else
        prepared = self._prepared(request, errand)
        if prepared.examined is not None:
            return Answered(request.lease_id, hearer, prepared.examined)
        with ExitStack() as unless_made:
            unless_made.callback(prepared.close)
            if not self._model.can_generate:
                raise Rejected(f"{self._spec.model} is an embedding model; ask it for embeddings")
            if len(prepared.prompts) == request.n == 1:
                job: Work = self._generation(request, prepared, prepared.prompts[0], hearer, prepared.media)
            else:
                job = self._choices(request, prepared, hearer, errand)
            unless_made.pop_all()
        return job

    def _prepared(self, request: GenerateRequest, errand: Errand | None) -> Prepared:
        return self._preparer.prepare(request.content, self.n_ctx_per_slot, errand, self._model.eyes, request.source)

    def _choices(
        self, request: GenerateRequest, prepared: Prepared, hearer: Hearer[Chunk], errand: Errand | None
    ) -> Choices:
        """`request.n` answers to each prompt. Each needs a grammar and a parser of its own; its pictures are shared."""
        count = len(prepared.prompts) * request.n
        costly = prepared.constraint is not None or prepared.syntax is not None or request.sampling.dry_multiplier > 0
        if count > MOST_PREPARED and costly:
            raise Rejected(
                f"{count} answers; at most {MOST_PREPARED} are allowed in a request with tools, reasoning, "
                "a grammar or the sampler dry"
            )
        if prepared.constraint is not None:
            refuse_too_large(count * prepared.held_bytes)
        together = Together(hearer, count, request.n)
        media = prepared.media
        choices: list[Generation] = []
        with ExitStack() as unless_made:
            for index in range(count):
                prompt, first = prepared.prompts[index // request.n], index - index % request.n
                if index and prepared.constraint is not None:
                    own = self._preparer.constraint(
                        request.content, self.n_ctx_per_slot, errand, self._model.eyes, request.source
                    )
                    unless_made.callback(own.close)
                    prepared = replace(prepared, constraint=own)
                job = self._generation(
                    request, prepared, prompt, together.of(index), media, choices[first : first + 1], index
                )
                unless_made.callback(job.close)
                choices.append(job)
            unless_made.pop_all()
        whole = Choices(choices)
        together.give_up = lambda: self.drop(whole)
        return whole

    def _generation(
        self,
        request: GenerateRequest,
        prepared: Prepared,
        prompt: list[int],
        hearer: Hearer[Chunk],
        media: Media,
        first: Sequence[Generation] = (),
        index: int = 0,
    ) -> Generation:
        """The answer with number `index`; `first`: the first one to the same prompt, if there is one."""
        if media and request.echo:
            raise Rejected("echo cannot be combined with pictures or sounds; leave it out")
        room = self.n_ctx_per_slot - len(prompt)
        if room < 1:
            raise prompt_too_long(len(prompt), self.n_ctx_per_slot)
        max_tokens = room if request.max_tokens is None else min(room, request.max_tokens)
        max_tokens = _told_tokens(request, len(prompt), len(prepared.prompts) * request.n, max_tokens)
        sampling = self._sampling(request.sampling, prepared, index)
        budget = prepared.budget()
        adapters = chosen_adapters(self._spec.model, self._spec.adapters, request.lora)
        wish = Wish(
            max_tokens=max_tokens,
            min_tokens=sampling.min_tokens,
            opening=self._model.text_of(prompt) if request.echo else "",
            n_probs=request.n_probs,
            judge_prompt=request.echo and request.n_probs is not None,
            preserved=prepared.preserved,
            is_extra=index > 0,
        )
        with ExitStack() as unless_made:
            sampler = self._model.sampler(sampling, prompt)
            unless_made.callback(sampler.close)
            parsed: ParsedAnswer | None = None
            text = TextStream(request.stop, prepared.stops)
            if prepared.syntax is not None:
                text = counted = CountedText(request.stop, prepared.stops)
                parsed = ParsedAnswer(hearer, self._preparer.parsing(prepared.syntax, request.source), counted)
                unless_made.callback(parsed.close)
            job = Generation(
                request.lease_id,
                prompt,
                parsed or hearer,
                sampler,
                text,
                wish,
                constraint=prepared.constraint,
                budget=budget,
                first=first[0] if first else None,
                source=request.source,
                saved=self._saved(prompt, wish, adapters),
                adapters=adapters,
                media=media,
                draft=self._draft(prepared, wish, prompt),
            )
            unless_made.pop_all()
        if parsed is not None:
            parsed.give_up = lambda: self.drop(job)
        return job

    def _draft(self, prepared: Prepared, wish: Wish, prompt: list[int]) -> Draft | None:
        """Not where tokens are chosen one by one, beside the engine's thread, or cannot be taken back from the memory.
        Further answers of a request have none: what theirs would take is not booked."""
        one_by_one = prepared.constraint is not None or wish.n_probs is not None
        cannot_go_back = self._model.keeps_states and not self._model.copies_states
        if self._spec.context.spec_type == "none" or one_by_one or wish.is_extra or cannot_go_back:
            return None
        if self._model.guesser is None:
            return Draft(Ngrams(prompt))
        return Draft(Text(prompt)) if min(prompt, default=0) >= 0 else None  # nobody but the model sees pictures

    def _saved(self, prompt: list[int], wish: Wish, adapters: Adapters) -> SavedState | None:
        """A state on disk that spares a good part of the prompt."""
        if self._keeper is None or not wish.takes_states:
            return None
        return self._keeper.find(prompt, self._batcher.known(prompt, adapters), adapters)

    def _sampling(self, asked: Sampling, prepared: Prepared, index: int) -> Sampling:
        """As it was asked for, with what only the preparer knew. Each answer to a prompt has a seed of its own."""
        if prepared.constraint is not None and (asked.min_tokens or asked.ignore_eos):
            raise Rejected("min_tokens and ignore_eos cannot be combined with tools or a grammar; send one of them")
        if prepared.constraint is not None and "infill" in asked.samplers:
            raise Rejected("the sampler infill cannot be combined with tools or a grammar; leave it out of samplers")
        seed = None if asked.seed is None else asked.seed + index
        return replace(asked, seed=seed, logit_bias={**prepared.biases, **(asked.logit_bias or {})})

    def _embedding(self, request: EmbedRequest, hearer: Hearer[Embedded], errand: Errand | None) -> Embedding:
        """The model's own pooling, or the mean of the token vectors; a reranker's scores, as vectors of one number."""
        if self._model.is_reranker != request.rerank:
            what = "has scores, not embeddings; use /v1/rerank" if self._model.is_reranker else "is no reranker"
            raise Rejected(f"{self._spec.model} {what}")
        if request.dimensions is not None:
            refuse_cut(self._spec, self._model.n_embd, request.dimensions)
        if not self._spec.context.embeddings:  # its context has no room for them
            raise Rejected(f"{self._spec.model} is not loaded for embeddings; set embeddings: true for it")
        texts = self._preparer.prepare(request.content, self.n_ctx_per_slot, errand).prompts
        limit = longest_text(self._model, self.n_ctx_per_slot)
        for index, text in enumerate(texts):
            if len(text) > limit:
                raise Rejected(f"input {index} is {len(text)} tokens; at most {limit} can be embedded at once")
        if (total := sum(map(len, texts))) > MOST_EMBEDDED:
            raise Rejected(f"the inputs are {total} tokens; at most {MOST_EMBEDDED} are allowed in one request")
        dimensions = None if request.rerank else request.dimensions or self._model.n_embd
        adapters = chosen_adapters(self._spec.model, self._spec.adapters, None)
        return Embedding(request.lease_id, texts, hearer, dimensions, request.source, adapters)

    def submit(self, job: Work) -> None:
        """Queues `job`. Raises EngineFailed, and has closed it, when the engine is broken or closed."""
        if isinstance(job, Answered):
            job.tell()
            return
        left = deque(job.parts)
        try:
            while left:
                self._batcher.submit(left.popleft())
        except EngineFailed:
            for part in left:
                part.close()
            raise

    def drop(self, job: Work) -> None:
        """Ends `job` within one token, in the middle of its prompt too; nothing happens if it has ended already."""
        for part in job.parts:
            self._batcher.cancel(part)

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

    def _heard(self, job: Work, results: Results[Result]) -> Iterator[Result]:
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

    def park(self) -> int:
        """Stops serving, and saves what slots hold of conversations, where that is worth it: those used last first, for
        `MOST_PARKING_S` seconds. Returns how many were saved. Requests under way fail with EngineFailed."""
        self._batcher.close()
        if self._keeper is None:
            return 0
        self._keeper.close()
        n_saved, until_s = 0, time.monotonic() + MOST_PARKING_S
        for slot in self._batcher.slots():
            if slot.tokens and time.monotonic() < until_s:
                n_bytes = self._model.sequence_bytes(slot.sequence)
                n_saved += self._keeper.park(slot, n_bytes, partial(self._model.save_sequence, slot.sequence))
        return n_saved

    def close(self) -> None:
        """Stops serving and frees the memory; requests under way fail with EngineFailed. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._batcher.close()
            if self._keeper is not None:
                self._keeper.close()
            self._model.close()
            self._preparer.close()


def _told_tokens(request: GenerateRequest, n_prompt: int, n_answers: int, max_tokens: int) -> int:
    """How many tokens an answer may have, of `max_tokens`, if their likelihoods are told: a stream tells them one by
    one, and what is sent whole ends where there are too many. Raises Rejected for a prompt that has too many itself."""
    if request.n_probs is None:
        return max_tokens
    each = request.n_probs + 1
    judged = n_prompt if request.echo else 0
    is_response = request.reply.form == "responses"
    most = MOST_IN_A_RESPONSE if is_response else MOST_LIKELIHOODS
    at_once = judged * n_answers
    if judged * each > MOST_OF_A_PROMPT or at_once * each >= most:
        raise Rejected(
            f"the prompt has {at_once * each} log probabilities; at most {MOST_OF_A_PROMPT} of one prompt and "
            f"{most - 1} of all are allowed. Ask for fewer likely tokens, or send shorter or fewer prompts"
        )
    if request.reply.stream and not is_response:
        return max_tokens
    return min(max_tokens, max(1, most // (each * n_answers) - judged))
