"""What slots hold of prompts: a new one begins with as much as is known of it, in its slot, in another, or on disk.

A recurrent state and a sliding window cannot be cut. So a slot keeps *checkpoints* of them, near the ends of its
prompts, and where several prompts part: what goes on, or is made anew, begins at one of these instead of at nothing.
A beginning that several requests had is saved on disk before the last slot that holds it loses it, where that pays: see
`Keeper`. All of this belongs to the engine's thread, and other threads may read meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from actors.serving.beginnings import Beginnings
from actors.serving.generation import Generation
from actors.serving.jobs import Job
from actors.serving.keeping import Keeper
from actors.serving.model import Adapters, Model
from actors.serving.pieces import NO_PLACES, Places
from actors.serving.row_times import RowTimes
from actors.serving.slot import Slot, common_prefix, held_by
from actors.serving.states import Checkpoint, SavedState, drop
from scheduler.costs.host import CHECKPOINTS_PER_SLOT, MOST_CHECKPOINT_BYTES

LEAST_SHARED = 32
"""Tokens that are worth a copy of another slot's beginning. A guess: a few tokens are read in one batch with others."""


CHECKPOINT_TAIL = 4
"""Tokens of a prompt after its checkpoint. Templates end a prompt with a few tokens that the next turn of the chat may
not have (it leaves thoughts out); llama-server has the same number."""

LEAST_BETWEEN = 64
"""Tokens between two checkpoints. A small Gemma 3 saves its state (1.3 MiB) in 1.4 ms, and reads 64 tokens in 66 ms."""


class Holdings:
    """Of all slots of a context."""

    def __init__(self, model: Model, slots: list[Slot], keeper: Keeper | None, times: RowTimes) -> None:
        self._model = model
        self._row_times = times
        self._all = slots
        self._keeper = keeper
        self.waiting: deque[Job[Any]] = deque()
        self._beginnings = Beginnings()

    def settle(self) -> None:
        """Makes the slots ready for the jobs that have come to them."""
        for slot in self._all:
            if slot.is_new and slot.job is not None:
                self._settle(slot, slot.job)
                slot.is_new = False

    def _settle(self, slot: Slot, job: Job[Any]) -> None:
        if not isinstance(job, Generation):  # all of it is to be computed
            self._keep(slot, 0)
            self.forget(slot)
            slot.adapters, slot.source, slot.places = job.adapters, job.source, NO_PLACES
            return
        if job.cached_tokens is None and not job.is_extra:  # else it, or its request, was here before
            job.n_shared = job.media.whole(self._beginnings.note(job.prompt, job.adapters))
        shared = 0 if job.wish.judge_prompt else slot.shares(job.prompt, job.adapters)
        shared = job.media.whole(min(shared, len(job.prompt) - 1))
        self._keep(slot, shared)
        if slot.adapters != job.adapters:
            self.forget(slot)
        slot.adapters, slot.source = job.adapters, job.source
        kept = 0
        if job.wish.judge_prompt:
            self.forget(slot)
        else:
            kept = self._known(slot, job, min(shared, len(slot.tokens)))
            if self._model.keeps_states and kept == job.n_shared > 0 and kept not in [n for n, _ in slot.checkpoints]:
                self.keep_checkpoint(slot)  # it may be possible now, and not later
        slot.places = job.media.places
        job.begin(kept)

    def _known(self, slot: Slot, job: Generation, shared: int) -> int:
        """How much of its prompt `slot` holds now: its own beginning, that of another, or what was saved."""
        most, donor = 0, slot
        if self._model.shares_cells:
            others = [(other.shares(job.prompt, job.adapters), other) for other in self._all if other is not slot]
            most, donor = max(others, key=lambda pair: pair[0], default=(0, slot))
            most = job.media.whole(min(most, len(job.prompt) - 1))  # the other may be reading the same picture
            most = self._worth_keeping(job, most)
        saved, job.saved = job.saved, None
        if saved is not None and (kept := self._restored(slot, job, saved, max(most, shared))) is not None:
            return kept
        spares_pictures = bool(job.media) and any(job.media.at(at) is not None for at in range(shared, most))
        if most >= shared + LEAST_SHARED or spares_pictures:
            self.forget(slot)
            self._model.copy_prefix(donor.sequence, slot.sequence, job.media.position(most))
            slot.tokens += job.prompt[:most]
            return most
        return self._cut(slot, self._worth_keeping(job, shared), job.media)

    def _worth_keeping(self, job: Generation, known: int) -> int:
        """Of the tokens of its prompt that are known. The last of them are read again where the rest is faster so."""
        if self._model.keeps_states or job.media:
            return known
        return known - min(known, self._row_times.better_read_again(known, len(job.prompt) - known))

    def _restored(self, slot: Slot, job: Generation, saved: SavedState, known: int) -> int | None:
        """How much of its prompt `slot` holds after `saved` was loaded; None: it was not, and nothing has changed.
        `known`: what it would hold without it."""
        assert self._keeper is not None, "it has found the state"
        common = job.media.whole(min(common_prefix(saved.tokens, job.prompt), len(job.prompt) - 1))
        if common < known + LEAST_SHARED:  # meanwhile it became known here
            return None
        ends = [len(saved.tokens), *(each.n_tokens for each in saved.checkpoints)]
        if self._model.keeps_states and min(ends) > common:  # it cannot be cut there
            return None
        n_bytes, others_run = len(saved.state), self._some_run()
        if others_run and not self._keeper.may_load(job.source, n_bytes):
            return None
        room = self._model.n_cells - len(saved.tokens)
        others = [each for each in self._all if each is not slot]
        if sum(len(each.tokens) for each in others) > room:
            if held_by(others) > room:
                return None
            self.forget_idle()
        self.forget(slot)
        load = partial(self._model.load_sequence, slot.sequence, saved.state)
        if not self._keeper.load(load, job.source, n_bytes, others_run=others_run):
            drop(saved.path)
            return 0
        slot.tokens += saved.tokens
        slot.checkpoints += saved.checkpoints
        kept = self._cut(slot, self._worth_keeping(job, common), job.media)
        self._trim(slot)
        return kept

    def _some_run(self) -> bool:
        """Whether answers under way wait for what is done now."""
        return any(each.job is not None and not each.is_new for each in self._all)

    def known(self, prompt: Sequence[int], adapters: Adapters) -> int:
        """Tokens of `prompt` that some slot holds now. Any thread may ask: the answer may be old."""
        held = [([*slot.tokens], slot.adapters) for slot in self._all]
        return max(common_prefix(tokens, prompt) if used == adapters else 0 for tokens, used in held)

    def _cut(self, slot: Slot, count: int, places: Places) -> int:
        """Leaves `count` tokens, or as many as can be; says how many. `places`: of the pictures among them."""
        before = [each for each in slot.checkpoints if each.n_tokens <= count]
        if count and self._model.cut(slot.sequence, places.position(count), len(slot.tokens)):
            kept = count
        elif before and self._model.load_state(slot.sequence, before[-1].state, places.position(before[-1].n_tokens)):
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

    def undo(self, slot: Slot, job: Job[Any]) -> bool:
        """Takes out what a batch has left that was aborted: the slot holds its tokens as before. False where it cannot
        be: states of layers may have changed, and texts to embed are computed whole."""
        if self._model.keeps_states or not isinstance(job, Generation):
            return False
        count = len(slot.tokens)
        return self._model.cut(slot.sequence, job.media.position(count), count)

    def forget(self, slot: Slot) -> None:
        self._model.clear(slot.sequence)
        slot.tokens.clear()
        slot.checkpoints.clear()

    def forget_idle(self) -> bool:
        """Frees the cache cells of idle slots (all slots share a unified cache). True if there were any. What a slot
        holds whose job has just come is not yet that job's."""
        idle = [slot for slot in self._all if (slot.job is None or slot.is_new) and slot.tokens]
        for slot in sorted(idle, key=lambda slot: -slot.last_used):
            self._keep(slot, 0)
        for slot in idle:
            self.forget(slot)
        return bool(idle)

    # ------------------------------------------------------------------ beginnings that are worth a file

    def _keep(self, slot: Slot, left: int) -> None:
        """All but the first `left` tokens of `slot` are to be lost. What several requests began with is saved, if no
        other slot holds it, and that pays. Then the slot holds no more than that."""
        if self._keeper is None or len(slot.tokens) <= left:
            return
        count = slot.places.whole(self._beginnings.shared(slot.tokens, slot.adapters))
        if self._model.keeps_states and count < len(slot.tokens):
            count = max((each.n_tokens for each in slot.checkpoints if each.n_tokens <= count), default=0)
        beginning = slot.tokens[:count]
        if count <= left or any(
            each.shares(beginning, slot.adapters) == count for each in self._all if each is not slot
        ):
            return
        about_bytes = self._model.sequence_bytes(slot.sequence) * count // len(slot.tokens)
        if not self._keeper.would_keep(beginning, slot.adapters, about_bytes, others_run=self._some_run()):
            return
        if self._cut(slot, count, slot.places) == count:
            self._keeper.keep(
                slot,
                self._model.sequence_bytes(slot.sequence),
                partial(self._model.save_sequence, slot.sequence),
                self._offer,
            )

    def _offer(self, adapters: Adapters) -> None:
        """A file was made: to whoever waits and may begin with it. In a thread of the keeper's."""
        assert self._keeper is not None, "who else made it?"
        for job in [*self.waiting]:
            if isinstance(job, Generation) and job.wish.takes_states and job.saved is None and job.adapters == adapters:
                job.saved = self._keeper.find(job.prompt, self.known(job.prompt, adapters), adapters)

    # ------------------------------------------------------------------ checkpoints

    def checkpoint_of(self, slot: Slot, job: Generation) -> int:
        """Where in its prompt the next checkpoint is to be made; 0: nowhere."""
        if not self._model.keeps_states:
            return 0
        last = slot.checkpoints[-1].n_tokens if slot.checkpoints else 0
        end = job.media.whole(len(job.prompt) - CHECKPOINT_TAIL)
        wanted = [at for at in (job.n_shared,) if at <= end - LEAST_BETWEEN]
        return next((at for at in (*wanted, end) if at >= max(last + LEAST_BETWEEN, len(slot.tokens))), 0)

    def keep_checkpoint(self, slot: Slot) -> None:
        """Of what it holds now."""
        state = self._model.save_state(slot.sequence)
        if state is not None:
            slot.checkpoints.append(Checkpoint(len(slot.tokens), state))
            self._trim(slot)

    def _trim(self, slot: Slot) -> None:
        """The oldest checkpoints of this slot, and then of those idle for longest, give way."""
        slot.checkpoints = slot.checkpoints[-CHECKPOINTS_PER_SLOT:]
        by_use = sorted(self._all, key=lambda each: each.last_used)
        while sum(len(one.state) for each in self._all for one in each.checkpoints) > MOST_CHECKPOINT_BYTES:
            next(each for each in by_use if each.checkpoints).checkpoints.pop(0)
