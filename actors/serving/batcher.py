"""Continuous batching: one thread owns the context and turns waiting jobs into batches.

The very first decode runs in that thread too. OpenMP keeps a team of threads for every thread that has computed. With a
second team there are more threads than cores, and they sleep at every barrier instead of spinning.
Each turn decodes one batch: the next token of every answer under way, plus prompt tokens of slots still reading, up to
one micro-batch (`n_ubatch`) in all. Prompts share that room by source (`fairness`). So a long prompt delays the others,
their first tokens too, by one micro-batch at a time, and a cancelled job is gone after one. Jobs that find no free slot
wait in order. Embeddings take their own turns, because they make every token an output. Tokens that are guessed to
follow an answer's next one share its turn, where that is faster (`drafting`). Jobs with the same LoRA adapters share
batches; those with other ones take turns with them (`turns`).
An answer that its reader does not take waits: no token is computed that nobody reads.
Tokens under a grammar, and tokens whose likelihood is wanted, are chosen in another thread, because a grammar may take
seconds for one. Other answers do not wait for it. Its slot skips turns until the token is there. So it does while a
picture of its prompt is encoded. The pieces of that share the room of prompts, in a batch of their own: they are no
tokens. When a shared cache is full, the youngest answer waits until there is room.
A failed decode fails the jobs in that batch and forgets their slots (an aborted one leaves them as they were); two in a
row, or any error of our own, break the batcher for good: everything fails from then on, with the reason.
Cost of a turn besides the decode: some microseconds per row.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from actors.devices.cores import Cores
from actors.serving.batch import Batch, MediumPart, Part, next_batch, next_texts, next_whole, read_by, take_vectors
from actors.serving.beat import Beats
from actors.serving.choosing import Chooser
from actors.serving.drafting import Drafting, accept, answer
from actors.serving.encoding import Encoder
from actors.serving.fairness import Rotation
from actors.serving.generation import Choice, Generation
from actors.serving.jobs import Embedding, Job
from actors.serving.keeping import Keeper
from actors.serving.model import Adapters, Model
from actors.serving.row_times import RowTimes
from actors.serving.slot import Slot
from actors.serving.slots import Slots
from actors.serving.turns import Turns
from actors.serving.waiting import is_in_line, next_answers, next_encodings, uses_sampler, waits
from scheduler.errors import ArrieroError, EngineFailed

_NO_ROOM, _ABORTED = 1, 2  # llama_decode, llama.h


class Batcher:
    """Runs jobs on a model in a thread of its own, from construction to `close()`. Constructed once the model is warm;
    raises what warming it up raised. `keeper`: of states on disk; None: none are."""

    def __init__(
        self,
        model: Model,
        *,
        last_words: Callable[[], str] = lambda: "",
        beats: Beats | None = None,
        cores: Cores | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self._model = model
        self._beats = beats or Beats()
        self._cores = cores or Cores.alone(1)
        self._last_words = last_words
        self._row_times = RowTimes()
        self._slots = Slots(model, keeper, self._row_times)
        self._keeper = keeper
        self._drafting = Drafting(self._slots, model, self._computing)
        self._turns = Turns()
        self._in_batch: tuple[Job[Any], ...] = ()
        self._changed = threading.Condition()
        self._chooser = Chooser(model)
        self._encoder = Encoder(model, self._beats.encodings)
        self._viewers = Rotation[str]()  # sources whose pictures must be read at once
        self._n_threads = self._failed_turns = 0
        self._closing = False
        self.broken = ""  # why nothing works any more
        warm: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(warm,), name="engine", daemon=True)
        self._thread.start()
        warm.result()

    # Called from any thread

    def submit(self, job: Job[Any]) -> None:
        """Queues `job`. Raises EngineFailed, and has closed it, when the engine is broken or closed."""
        with self._changed:
            if self.broken or self._closing:
                job.close()
                raise EngineFailed(self.broken or "this replica is being stopped")
            self._slots.waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job[Any]) -> None:
        """Ends `job` without a result, within one token or micro-batch; nothing happens if it has ended already."""
        with self._changed:
            job.cancelled = True
            if isinstance(job, Generation) and job.choosing and job.constraint is not None:
                job.constraint.interrupt()
            if self._in_batch and all(other.cancelled for other in self._in_batch):
                self._model.abort(True)
            self._changed.notify()

    def resume(self) -> None:
        """The hearer of a job takes again what it is told."""
        with self._changed:
            self._changed.notify()

    def jobs(self) -> list[Job[Any]]:
        """All jobs running or waiting, running ones first."""
        with self._changed:
            return [slot.job for slot in self._slots if slot.job is not None] + list(self._slots.waiting)

    def known(self, prompt: Sequence[int], adapters: Adapters) -> int:
        """How much of `prompt` some slot holds now."""
        return self._slots.known(prompt, adapters)

    def close(self) -> None:
        """Stops the thread; jobs that have not ended fail with EngineFailed."""
        with self._changed:
            self._closing = True
            self._model.abort(True)
            self._changed.notify()
        self._thread.join()

    # The engine thread

    def _run(self, warm: Future[None]) -> None:
        try:
            self._model.warm_up()
        except BaseException as error:
            warm.set_exception(error)
            return
        warm.set_result(None)
        try:
            while self._prepare():
                self._slots.settle()  # without the lock, which others wait for
                self._model.use_adapters(self._turns.adapters)
                self._encode()
                self._generate()
                self._embed()
        except BaseException as error:  # a bug must not leave callers waiting for ever
            self.broken = f"the engine thread failed: {type(error).__name__}: {error}"
        self._cores.leave()
        self._stop_choosing()
        self._end_all(EngineFailed(self.broken or "this replica is being stopped"))

    def _stop_choosing(self) -> None:
        """Nobody uses a sampler any more."""
        for job in self.jobs():
            if isinstance(job, Generation) and job.constraint is not None:
                job.constraint.interrupt()
        self._chooser.close()
        self._encoder.close()

    def _prepare(self) -> bool:
        """Waits for work and gives waiting jobs their slots; False when there is nothing more to do."""
        with self._changed:
            while True:
                self._take_chosen()
                self._drop_cancelled()
                self._slots.assign()
                if self._closing or self.broken:
                    return False
                in_line = [slot.job for slot in self._slots if slot.job is not None and is_in_line(slot.job)]
                left_s = self._turns.take(((job.source, job.adapters) for job in in_line), time.perf_counter())
                if any(slot.job is not None and self._may_go_on(slot.job) for slot in self._slots):
                    return True
                self._cores.leave()
                self._changed.wait(left_s)  # for a token that is being chosen, or for the turn of others

    def _may_go_on(self, job: Job[Any]) -> bool:
        return job.adapters == self._turns.adapters and not waits(job)

    def _drop_cancelled(self) -> None:
        for slot in self._slots:
            if slot.job is not None and slot.job.cancelled and not uses_sampler(slot.job):
                self._slots.release(slot).end()
        for job in [job for job in self._slots.waiting if job.cancelled and not uses_sampler(job)]:
            self._slots.waiting.remove(job)
            job.end()

    def _encode(self) -> None:
        """What is next in a prompt and no text is encoded beside this thread, before it is read."""
        if self._model.eyes is None:
            return
        for job, medium in next_encodings(next_answers(self._slots, self._turns.adapters)):
            with self._changed:
                job.choosing = job.encoding = True
            self._encoder.begin(job, medium, self._was_chosen)

    def _generate(self) -> None:
        """One turn of all generations."""
        running = next_answers(self._slots, self._turns.adapters)
        guesses = self._drafting.guesses(running)
        for alike, is_last in self._drafting.in_pieces(running, guesses):
            batch = next_batch(alike, self._slots, self._model, guesses)
            if batch.rows and not self._decode_text(batch, guesses, is_last=is_last):
                return
        if batch.pieces and not self._decode_media(batch.pieces):
            return
        if whole := next_whole(next_answers(self._slots, self._turns.adapters), self._viewers):
            self._decode_media(whole)

    def _decode_text(self, batch: Batch, guesses: Mapping[Generation, list[int]] | None, *, is_last: bool) -> bool:
        rows, parts, _ = batch
        began = time.perf_counter()
        if not self._decode(parts, len(rows), lambda: self._model.decode(rows)):
            return False
        took_s = time.perf_counter() - began
        if guesses is not None:
            self._drafting.took(len(rows), took_s, is_last=is_last)
        if len(parts) == 1 and not guesses:  # how fast an answer comes with guesses says little of the next one
            parts[0].job.took(len(rows), took_s)
        read = read_by(parts)
        self._row_times.took(read, took_s)
        if self._keeper is not None:
            self._keeper.was_read(sum(piece.n_tokens for piece in read), took_s)
        for part in parts:
            part.slot.tokens += part.tokens
            if part.row is None and len(part.slot.tokens) == self._slots.checkpoint_of(part.slot, part.job):
                self._slots.keep_checkpoint(part.slot)
            self._go_on(part)
        for part in parts:
            part.job.hearer.flush()
        return True

    def _decode_media(self, parts: list[MediumPart]) -> bool:
        pieces = [part.piece for part in parts]
        n_rows = sum(piece.end - piece.start for piece in pieces)
        if not self._decode(parts, n_rows, lambda: self._model.decode_media(pieces)):
            return False
        for slot, job, piece in parts:
            known = len(slot.tokens)
            slot.tokens += job.prompt[known : known + piece.end - piece.start]
            if piece.end == piece.medium.n_tokens:
                piece.medium.embedding = None  # they are large
        return True

    def _go_on(self, part: Part) -> None:
        """After its rows were decoded."""
        slot, job, row = part.slot, part.job, part.row
        if part.judging or job.is_unjudged or (row is not None and job.is_deliberate and job.wish.max_tokens):
            self._begin_to_choose(part)
        elif row is not None and not job.wish.max_tokens:
            job.cut_short()
            self._release_locked(slot)
        elif row is not None:
            n_right, has_ended = answer(self._model, part)
            self._drafting.judged(part, n_right)
            if n_right < len(part.guessed):
                self._slots.take_back(slot, job, len(part.guessed) - n_right)
            if has_ended:
                self._release_locked(slot)

    def _begin_to_choose(self, part: Part) -> None:
        job = part.job
        with self._changed:
            if job.cancelled:  # meanwhile: nobody would interrupt it any more
                return
            job.choosing = True
        self._chooser.begin(job, part.row if job.wish.max_tokens else None, part.judging, self._was_chosen)

    def _was_chosen(self, job: Generation, chosen: Choice | ArrieroError) -> None:
        """In a thread of the chooser's."""
        with self._changed:
            job.chosen = chosen
            self._changed.notify()

    def _take_chosen(self) -> None:
        """What was chosen and judged meanwhile."""
        for slot in self._slots:
            if isinstance(slot.job, Generation) and slot.job.chosen is not None and self._take(slot.job):
                self._slots.release(slot)
        for job in [*self._slots.waiting]:  # it has lost its slot meanwhile
            if isinstance(job, Generation) and job.chosen is not None:
                if self._take(job):
                    self._slots.waiting.remove(job)
                else:
                    job.begin_again(job.prompt)

    def _take(self, job: Generation) -> bool:
        """Its choice; True when the job has ended with it."""
        chosen, job.chosen, job.choosing, job.encoding = job.chosen, None, False, False
        if isinstance(chosen, ArrieroError):
            job.end(None if job.cancelled else chosen)
            return True
        if job.cancelled or chosen is None:
            return False
        job.judge(chosen.of_prompt)
        ended = False
        if chosen.token is not None:
            ended = accept(self._model, job, chosen.token, chosen.likelihood)
        elif not job.wish.max_tokens and job.n_judged == len(job.prompt):
            job.cut_short()
            ended = True
        job.hearer.flush()
        return ended

    def _embed(self) -> None:
        """One batch of texts to embed."""
        there = [(slot, slot.job) for slot in self._slots if isinstance(slot.job, Embedding)]
        own = [(slot, job) for slot, job in there if self._may_go_on(job) and not job.cancelled]
        if not own:
            return
        rows, parts = next_texts(own, self._slots, self._model)
        jobs = list(dict.fromkeys(job for _, job, _ in parts))
        with self._computing(len(rows), jobs, "embeddings"):
            vectors = self._model.embed(rows)
        if isinstance(vectors, int) and vectors == _NO_ROOM and (self._slots.forget_idle() or self._postpone_one()):
            return  # the same again in the next turn
        if isinstance(vectors, int):
            self._decode_failed(vectors, [(slot, job) for slot, job in own if job in jobs])
            return
        self._failed_turns = 0
        take_vectors(parts, vectors, self._slots, pooled=self._model.is_pooled)
        for slot, job in own:
            if job.done == len(job.texts):
                self._release_locked(slot)
                job.end()
                continue
            job.hearer.flush()
            if not slot.tokens:
                with self._changed:
                    self._slots.give_back(slot)

    def _release_locked(self, slot: Slot) -> None:
        with self._changed:
            self._slots.release(slot)

    def _decode(self, parts: Sequence[Part | MediumPart], n_rows: int, compute: Callable[[], int]) -> bool:
        """Whether it went well."""
        with self._computing(n_rows, [part.job for part in parts]):
            code = compute()
        if code == _NO_ROOM and self._slots.forget_idle():
            return self._decode(parts, n_rows, compute)
        if code != 0:
            self._decode_failed(code, [(part.slot, part.job) for part in parts])
            return False
        self._failed_turns = 0
        return True

    @contextmanager
    def _computing(self, n_rows: int, jobs: Sequence[Job[Any]], what: str = "tokens") -> Iterator[None]:
        """A batch of these jobs is computed: cancelling them all aborts it, and the node hears of it."""
        with self._changed:
            self._in_batch = tuple(jobs)
            self._model.abort(self._closing or all(job.cancelled for job in jobs))
        self._take_cores()
        with self._beats.decodes.computing(n_rows, what):
            yield
        with self._changed:
            self._in_batch = ()

    def _take_cores(self) -> None:
        """Compute with as many threads as are this replica's now."""
        n_threads = self._cores.share()
        if n_threads != self._n_threads:
            self._model.set_threads(n_threads)
            self._n_threads = n_threads

    def _decode_failed(self, code: int, parts: Sequence[tuple[Slot, Job[Any]]]) -> None:
        if self._closing:
            return  # the abort was ours; all jobs are about to end
        if code == _NO_ROOM and self._postpone_one():
            return
        for slot, job in parts:
            if code != _ABORTED or not self._slots.undo(slot, job):
                self._slots.forget(slot)
            self._release_locked(slot)
            if code == _NO_ROOM and isinstance(job, Generation) and job.pending is not None:
                job.cut_short()
            elif code == _ABORTED and job.cancelled:
                job.end()
            else:
                job.end(EngineFailed(f"llama_decode returned {code}: {self._last_words() or 'no reason given'}"))
        if code not in (_NO_ROOM, _ABORTED):
            self._failed_turns += 1
            if self._failed_turns > 1:
                self.broken = f"two decodes in a row failed; the last returned {code}: {self._last_words()}"

    def _postpone_one(self) -> bool:
        with self._changed:
            return self._slots.postpone_one()

    def slots(self) -> list[Slot]:
        """What is left after `close`, most recently used first."""
        return sorted(self._slots, key=lambda slot: -slot.last_used)

    def _end_all(self, error: EngineFailed) -> None:
        with self._changed:
            self._closing = True
            for slot in self._slots:
                if slot.job is not None:
                    self._slots.release(slot).end(error)
            while self._slots.waiting:
                self._slots.waiting.popleft().end(error)
