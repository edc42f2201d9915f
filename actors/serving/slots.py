"""Slots: the sequences of a context, and the tokens that each still holds.

A slot keeps its tokens in the KV cache after an answer ends. The next request goes to the free slot that shares the
longest prefix with it. Among equals it goes to the one that was idle longest, so that the others keep their tokens.
Invariant: `slot.tokens` is exactly what the model's memory holds for that sequence.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.serving.jobs import Embedding, Generation, Job
from actors.serving.model import Model

MOST_PASSED = 8
"""A prompt nearly as long as the cache waits until the cache is empty. If no other could pass it, all would wait with
free slots (TTFT 2.9 s instead of 0.01 s for a model of 2 MB). If all could, it would wait for ever."""


@dataclass(slots=True)
class Slot:
    sequence: int
    tokens: list[int] = field(default_factory=list)
    job: Job[Any] | None = None
    last_used: int = 0  # a counter, not a time


def common_prefix(known: Sequence[int], wanted: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    shorter = min(len(known), len(wanted))
    if known[:shorter] == wanted[:shorter]:  # one comparison in C covers the usual case: a longer chat
        return shorter
    return next(index for index in range(shorter) if known[index] != wanted[index])


def best_slot(slots: Sequence[Slot], prompt: Sequence[int]) -> tuple[Slot, int] | None:
    """The free slot for `prompt` and how many of its tokens it already holds; None when all are busy.

    At least one token is left to decode, because sampling needs fresh logits.
    """
    free = [(min(common_prefix(slot.tokens, prompt), len(prompt) - 1), slot) for slot in slots if slot.job is None]
    if not free:
        return None
    shared, slot = max(free, key=lambda choice: (choice[0], -choice[1].last_used))
    return slot, shared


class Slots:
    """Who has which slot, and who waits for one. The caller ensures that one thread at a time changes it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._all = [Slot(sequence) for sequence in range(model.n_seq_max)]
        self.waiting: deque[Job[Any]] = deque()
        self._ticks = 0
        self._releases = 0  # how often a job has left its slot

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._all)

    def assign(self) -> None:
        """Gives slots to waiting jobs, in order, as long as there are slots and room in the cache.

        A job that needs more room than there is may be passed by others, `MOST_PASSED` of them.
        """
        for job in list(self.waiting):
            if not self._has_room_for(job):
                if job.passed >= MOST_PASSED:
                    return
                continue
            choice = best_slot(self._all, job.prompt)
            if choice is None:
                return
            slot, shared = choice
            for earlier in self.waiting:
                if earlier is job:
                    break
                earlier.passed += 1
            self.waiting.remove(job)
            if isinstance(job, Embedding):
                shared = 0
            kept = self._model.keep_prefix(slot.sequence, shared, len(slot.tokens))
            del slot.tokens[kept:]
            slot.job = job
            slot.last_used = self._tick()
            if isinstance(job, Generation) and job.cached_tokens is None:
                job.cached_tokens = kept

    def _has_room_for(self, job: Job[Any]) -> bool:
        """Whether the cache has room for its prompt, and for one more token of each running job.

        What idle slots hold does not count: it is dropped when needed. A postponed answer waits until another has
        ended. Else it would be read again and again, for a few tokens each time.
        """
        held = sum(max(len(slot.tokens) + 1, len(slot.job.prompt)) for slot in self._all if slot.job is not None)
        if not held:
            return True
        if isinstance(job, Generation) and job.postponed_at == self._releases:
            return False
        return held + len(job.prompt) < self._model.n_cells

    def release(self, slot: Slot) -> Job[Any]:
        """Take its job from it. Its tokens stay in the cache."""
        job, slot.job = slot.job, None
        assert job is not None
        self._releases += 1
        slot.last_used = self._tick()
        return job

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def forget(self, slot: Slot) -> None:
        self._model.keep_prefix(slot.sequence, 0, len(slot.tokens))
        slot.tokens.clear()

    def forget_idle(self) -> bool:
        """Frees the cache cells of idle slots (all slots share a unified cache). True if there were any."""
        idle = [slot for slot in self._all if slot.job is None and slot.tokens]
        for slot in idle:
            self.forget(slot)
        return bool(idle)

    def postpone_one(self) -> bool:
        """When the cache is full, pause one answer until there is room: one whose reader is stalled, or the youngest of
        the source that holds most of the cache. False when only one job runs: it has the whole cache."""
        if sum(slot.job is not None for slot in self._all) < 2:
            return False
        answers = [(slot, slot.job) for slot in self._all if isinstance(slot.job, Generation)]
        may_wait = [(slot, job) for slot, job in answers if not job.choosing]
        if not may_wait:
            return False
        held: Counter[str] = Counter()
        for slot, job in answers:
            held[job.source] += len(slot.tokens)
        slot, job = max(may_wait, key=lambda pair: (pair[1].hearer.stalled, held[pair[1].source], pair[0].last_used))
        job.begin_again(slot.tokens)
        self.forget(slot)
        self.release(slot)
        job.postponed_at = self._releases
        self.waiting.appendleft(job)
        return True
