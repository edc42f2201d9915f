"""Slots: the sequences of a context, and the tokens that each still holds.

A slot keeps its tokens in the KV cache after an answer ends. The next request goes to the free slot that shares the
longest prefix with it. Among equals it goes to the one that was idle longest, so that the others keep their tokens.
Invariant: `slot.tokens` is exactly what the model's memory holds for that sequence, computed with `slot.adapters`.
What was computed with other adapters, or other scales of them, is of no use to a request.
A recurrent state and a sliding window cannot be cut. So a slot keeps *checkpoints* of them, near the ends of its
prompts: a chat that goes on, or an answer that is made anew, begins at one of these instead of at nothing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from actors.serving.generation import Generation
from actors.serving.jobs import Job
from actors.serving.model import Adapters, Model
from actors.serving.pieces import Media
from actors.serving.states import Checkpoint, SavedState, drop
from scheduler.costs.host import CHECKPOINTS_PER_SLOT, MOST_CHECKPOINT_BYTES

MOST_PASSED = 8
"""A prompt nearly as long as the cache waits until the cache is empty. If no other could pass it, all would wait with
free slots (TTFT 2.9 s instead of 0.01 s for a model of 2 MB). If all could, it would wait for ever."""


_COMPARED = 1024  # tokens at once

LEAST_SHARED = 32
"""Tokens that are worth a copy of another slot's beginning. A guess: a few tokens are read in one batch with others."""


CHECKPOINT_TAIL = 4
"""Tokens of a prompt after its checkpoint. Templates end a prompt with a few tokens that the next turn of the chat may
not have (it leaves thoughts out); llama-server has the same number."""

LEAST_BETWEEN = 64
"""Tokens between two checkpoints. A small Gemma 3 saves its state (1.3 MiB) in 1.4 ms, and reads 64 tokens in 66 ms."""


@dataclass(slots=True)
class Slot:
    sequence: int
    tokens: list[int] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)  # in order
    adapters: Adapters = ()
    job: Job[Any] | None = None
    last_used: int = 0  # a counter, not a time

    def shares(self, prompt: Sequence[int], adapters: Adapters) -> int:
        """How many leading tokens of `prompt` it holds, computed with these adapters."""
        return common_prefix(self.tokens, prompt) if self.adapters == adapters else 0


def common_prefix(known: Sequence[int], wanted: Sequence[int]) -> int:
    """How many leading tokens are equal. Slices are compared in C: 2.5 ms for 100,000."""
    shorter = min(len(known), len(wanted))
    for start in range(0, shorter, _COMPARED):
        end = min(start + _COMPARED, shorter)
        if known[start:end] != wanted[start:end]:
            return next(index for index in range(start, end) if known[index] != wanted[index])
    return shorter


def best_slot(slots: Sequence[Slot], prompt: Sequence[int], adapters: Adapters = ()) -> tuple[Slot, int] | None:
    """The free slot for `prompt` and how many of its tokens it already holds; None when all are busy.

    At least one token is left to decode, because sampling needs fresh logits.
    """
    free = [(min(slot.shares(prompt, adapters), len(prompt) - 1), slot) for slot in slots if slot.job is None]
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

        A job that needs more room than there is may be passed by others, `MOST_PASSED` of them, and after that by
        sources that hold less of the cache than its own. A source that has several slots, and more of the cache than
        another would have, gives one back where that helps the other.
        Further answers of one request come last, and give way to everybody else.
        """
        some_wait = False  # for room
        held_back: set[str] = set()  # sources whose jobs would pass one of their own too often
        limit = self._model.n_cells + 1  # sources that hold so much would pass one of another too often
        first: list[Job[Any]] = []
        extra: list[Generation] = []
        for job in self.waiting:
            if _is_extra(job):
                extra.append(job)
            else:
                first.append(job)
        for job in first:
            if _is_choosing(job) or job.source in held_back or self._held_of(job.source) >= limit:
                continue
            while not self._has_room_for(job) and (self._postpone_extra() or self._postpone_for(job)):
                pass
            if not self._has_room_for(job):
                some_wait = True
                if job.passed >= MOST_PASSED:
                    if self._waits_for_its_own(job):
                        held_back.add(job.source)
                    else:
                        limit = min(limit, self._held_of(job.source))
                continue
            if not self._give_slot(job) and not (self._postpone_extra() and self._give_slot(job)):
                return
        for further in () if some_wait else extra:
            if (
                not further.choosing
                and self._is_next(further)
                and self._has_room_for(further)
                and not self._give_slot(further)
            ):
                return

    def _give_slot(self, job: Job[Any]) -> bool:
        choice = best_slot(self._all, job.prompt, job.adapters)
        if choice is None:
            return False
        slot, shared = choice
        for earlier in self.waiting:
            if earlier is job:
                break
            earlier.passed += 1
        self.waiting.remove(job)
        if isinstance(job, Generation) and not job.wish.judge_prompt:
            kept = self._known(slot, job, shared)
        else:  # all of it is to be computed
            self.forget(slot)
            kept = 0
        slot.job, slot.adapters = job, job.adapters
        self.use(slot)
        if isinstance(job, Generation):
            job.begin(kept)
        return True

    def _known(self, slot: Slot, job: Generation, shared: int) -> int:
        """How much of its prompt `slot` holds now: its own beginning, or that of another."""
        saved, job.saved = job.saved, None
        if saved is not None and (kept := self._restored(slot, job, saved, shared)) is not None:
            return kept
        if self._model.shares_cells:
            others = [(other.shares(job.prompt, job.adapters), other) for other in self._all if other is not slot]
            most, donor = max(others, key=lambda pair: pair[0], default=(0, slot))
            most = job.media.whole(min(most, len(job.prompt) - 1))  # the other may be reading the same picture
            if most >= shared + LEAST_SHARED:
                self.forget(slot)
                self._model.copy_prefix(donor.sequence, slot.sequence, job.media.position(most))
                slot.tokens += job.prompt[:most]
                return most
        return self._cut(slot, shared, job.media)

    def _restored(self, slot: Slot, job: Generation, saved: SavedState, shared: int) -> int | None:
        """How much of its prompt `slot` holds after `saved` was loaded; None: it was not, and nothing has changed."""
        common = min(common_prefix(saved.tokens, job.prompt), len(job.prompt) - 1)
        if common < shared + LEAST_SHARED:  # meanwhile it became known here
            return None
        ends = [len(saved.tokens), *(each.n_tokens for each in saved.checkpoints)]
        if self._model.keeps_states and min(ends) > common:  # it cannot be cut there
            return None
        room = self._model.n_cells - len(saved.tokens)
        if sum(len(each.tokens) for each in self._all if each is not slot) > room:
            if _held_by(self._all) > room:
                return None
            self.forget_idle()
        self.forget(slot)
        if not self._model.load_sequence(slot.sequence, saved.state):
            drop(saved.path)
            return 0
        slot.tokens += saved.tokens
        slot.checkpoints += saved.checkpoints
        return self._cut(slot, common, job.media)

    def known(self, prompt: Sequence[int], adapters: Adapters) -> int:
        """Tokens of `prompt` that some slot holds now. Any thread may ask: the answer may be old."""
        held = [([*slot.tokens], slot.adapters) for slot in self._all]
        return max(common_prefix(tokens, prompt) if used == adapters else 0 for tokens, used in held)

    def _cut(self, slot: Slot, count: int, media: Media) -> int:
        """Leaves `count` tokens, or as many as can be; says how many. `media`: what is among them."""
        before = [each for each in slot.checkpoints if each.n_tokens <= count]
        if count and self._model.cut(slot.sequence, media.position(count), len(slot.tokens)):
            kept = count
        elif before and self._model.load_state(slot.sequence, before[-1].state, media.position(before[-1].n_tokens)):
            kept = before[-1].n_tokens
        else:
            self._model.clear(slot.sequence)
            kept, before = 0, []
        del slot.tokens[kept:]
        slot.checkpoints = before
        return kept

    def take_back(self, slot: Slot, job: Generation, count: int) -> None:
        """The last `count` tokens that it holds were guessed, and wrong."""
        kept = len(slot.tokens) - count
        if self._model.cut(slot.sequence, job.media.position(kept), len(slot.tokens)):
            del slot.tokens[kept:]
        else:  # nobody guesses again, where all has to be read anew
            job.draft = None
            job.begin_again(slot.tokens[:kept])
            self.forget(slot)

    def checkpoint_of(self, slot: Slot, job: Generation) -> int:
        """Where in its prompt a checkpoint is to be made; 0: nowhere."""
        at = job.media.whole(len(job.prompt) - CHECKPOINT_TAIL)
        last = slot.checkpoints[-1].n_tokens if slot.checkpoints else 0
        return at if self._model.keeps_states and at >= last + LEAST_BETWEEN else 0

    def keep_checkpoint(self, slot: Slot) -> None:
        """Of what it holds now. The oldest of this slot, and then of those idle for longest, give way."""
        state = self._model.save_state(slot.sequence)
        if state is None:
            return
        slot.checkpoints = [*slot.checkpoints[1 - CHECKPOINTS_PER_SLOT :], Checkpoint(len(slot.tokens), state)]
        by_use = sorted(self._all, key=lambda each: each.last_used)
        while sum(len(one.state) for each in self._all for one in each.checkpoints) > MOST_CHECKPOINT_BYTES:
            next(each for each in by_use if each.checkpoints).checkpoints.pop(0)

    def _waits_for_its_own(self, job: Job[Any]) -> bool:
        """Whether the running jobs of its own source leave it no room, even if all others ended. Then no other source
        waits for it."""
        held = self._held_of(job.source)
        return held > 0 and held + len(job.prompt) >= self._model.n_cells

    def _is_next(self, job: Generation) -> bool:
        """Whether the first answer to the same prompt has read it, as far as that helps this one."""
        return not self._model.shares_cells or job.first is None or job.first.is_read

    def _postpone_extra(self) -> bool:
        """Takes a slot from a request that has another one."""
        for slot in self._all:
            if slot.job is not None and _is_extra(slot.job):
                self._postpone(slot, slot.job)
                return True
        return False

    def _postpone_for(self, job: Job[Any]) -> bool:
        """Takes the youngest slot from the source that holds most of the cache, if it has several, and holds more than
        the job's source would. Without this, 31 streams of one source kept others waiting for 23 s.

        A job that gave way itself waits until another has ended: else two sources would drive each other out for ever.
        """
        if isinstance(job, Generation) and job.postponed_at >= 0:
            return False
        most, richest = self._held_of(job.source) + len(job.prompt), list[tuple[Slot, Generation]]()
        room = self._model.n_cells - _held_by(self._all)
        for source in {slot.job.source for slot in self._all if slot.job is not None} - {job.source}:
            answers = [(slot, slot.job) for slot in self._of(source) if isinstance(slot.job, Generation)]
            answers.sort(key=lambda pair: pair[0].last_used)
            held = self._held_of(source)
            if len(answers) > 1 and held > self._held_of(job.source) + len(job.prompt):
                room += _held_by(slot for slot, _ in answers[1:])
                if held > most:
                    most, richest = held, answers
        if not richest or room <= len(job.prompt):  # it would not be enough
            return False
        self._postpone(*richest[-1])
        return True

    def give_back(self, slot: Slot) -> bool:
        """Takes the slot from a job between two of its texts if another source waits for room. It waits in its turn."""
        job = slot.job
        assert job is not None
        if not any(other.source != job.source and not self._has_room_for(other) for other in self.waiting):
            return False
        self.release(slot)
        job.passed = 0
        self.waiting.append(job)
        return True

    def _of(self, source: str) -> list[Slot]:
        return [slot for slot in self._all if slot.job is not None and slot.job.source == source]

    def _held_of(self, source: str) -> int:
        return _held_by(self._of(source))

    def _has_room_for(self, job: Job[Any]) -> bool:
        """Whether the cache has room for its prompt, and for one more token of each running job.

        What idle slots hold does not count: it is dropped when needed. A postponed answer waits until another has
        ended. Else it would be read again and again, for a few tokens each time.
        """
        held = _held_by(self._all)
        if not held:
            return True
        if isinstance(job, Generation) and job.postponed_at == self._releases:
            return False
        return held + len(job.prompt) < self._model.n_cells

    def release(self, slot: Slot) -> Job[Any]:
        """Take its job from it. Its tokens stay in the cache, but for a picture that is read in part."""
        job, slot.job = slot.job, None
        assert job is not None
        if isinstance(job, Generation) and (whole := job.media.whole(len(slot.tokens))) < len(slot.tokens):
            self._cut(slot, whole, job.media)
        self._releases += 1
        self.use(slot)
        return job

    def use(self, slot: Slot) -> None:
        """It was used last."""
        self._ticks += 1
        slot.last_used = self._ticks

    def forget(self, slot: Slot) -> None:
        self._model.clear(slot.sequence)
        slot.tokens.clear()
        slot.checkpoints.clear()

    def forget_idle(self) -> bool:
        """Frees the cache cells of idle slots (all slots share a unified cache). True if there were any."""
        idle = [slot for slot in self._all if slot.job is None and slot.tokens]
        for slot in idle:
            self.forget(slot)
        return bool(idle)

    def postpone_one(self) -> bool:
        """When the cache is full, pause one answer until there is room: one whose reader is stalled, or the youngest of
        the source that holds most of the cache. If its next token is being chosen, it takes that without a slot. False
        when only one job runs: it has the whole cache."""
        if sum(slot.job is not None for slot in self._all) < 2:
            return False
        answers = [(slot, slot.job) for slot in self._all if isinstance(slot.job, Generation)]
        if not answers:
            return False
        held: Counter[str] = Counter()
        for slot, job in answers:
            held[job.source] += len(slot.tokens)
        slot, job = max(
            answers,
            key=lambda pair: (pair[1].hearer.stalled, pair[1].is_extra, held[pair[1].source], pair[0].last_used),
        )
        self._postpone(slot, job)
        return True

    def _postpone(self, slot: Slot, job: Generation) -> None:
        job.begin_again(slot.tokens)
        self.forget(slot)
        self.release(slot)
        job.postponed_at = self._releases
        self.waiting.appendleft(job)


def _held_by(slots: Iterable[Slot]) -> int:
    """Cells of running jobs: what they hold, or will hold when their prompts are read, and one more for each."""
    return sum(max(len(slot.tokens) + 1, len(slot.job.prompt)) for slot in slots if slot.job is not None)


def _is_choosing(job: Job[Any]) -> bool:
    """Whether its next token is being chosen beside the engine's thread, or was and is not taken."""
    return isinstance(job, Generation) and job.choosing


def _is_extra(job: Job[Any]) -> TypeGuard[Generation]:
    return isinstance(job, Generation) and job.is_extra
