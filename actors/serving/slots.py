"""Who has which slot, and who waits for one. What slots hold is another matter (`holdings`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeGuard

from actors.serving.generation import Generation
from actors.serving.holdings import Holdings
from actors.serving.jobs import Job
from actors.serving.keeping import Keeper
from actors.serving.model import Model
from actors.serving.row_times import RowTimes
from actors.serving.slot import Slot, best_slot, held_by

MOST_PASSED = 8
"""A prompt nearly as long as the cache waits until the cache is empty. If no other could pass it, all would wait with
free slots (TTFT 2.9 s instead of 0.01 s for a model of 2 MB). If all could, it would wait for ever."""


class Slots(Holdings):
    """The caller ensures that one thread at a time changes it."""

    def __init__(self, model: Model, keeper: Keeper | None = None, times: RowTimes | None = None) -> None:
        """`keeper`: of states on disk; None: nothing is saved."""
        super().__init__(model, [Slot(sequence) for sequence in range(model.n_seq_max)], keeper, times or RowTimes())
        self._ticks = 0
        self._releases = 0  # how often a job has left its slot

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._all)

    def assign(self) -> None:
        """Gives slots to waiting jobs, in order, as long as there are slots and room in the cache.

        What they hold is to be made ready afterwards (`settle`).
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
        slot = best_slot(self._all, job.prompt, job.adapters)
        if slot is None:
            return False
        for earlier in self.waiting:
            if earlier is job:
                break
            earlier.passed += 1
        self.waiting.remove(job)
        slot.job, slot.is_new = job, True
        self.use(slot)
        return True

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
        room = self._model.n_cells - held_by(self._all)
        for source in {slot.job.source for slot in self._all if slot.job is not None} - {job.source}:
            answers = [(slot, slot.job) for slot in self._of(source) if isinstance(slot.job, Generation)]
            answers.sort(key=lambda pair: pair[0].last_used)
            held = self._held_of(source)
            if len(answers) > 1 and held > self._held_of(job.source) + len(job.prompt):
                room += held_by(slot for slot, _ in answers[1:])
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
        return held_by(self._of(source))

    def _has_room_for(self, job: Job[Any]) -> bool:
        """Whether the cache has room for its prompt, and for one more token of each running job.

        What idle slots hold does not count: it is dropped when needed. A postponed answer waits until another has
        ended. Else it would be read again and again, for a few tokens each time.
        """
        held = held_by(self._all)
        if not held:
            return True
        if isinstance(job, Generation) and job.postponed_at == self._releases:
            return False
        return held + len(job.prompt) < self._model.n_cells

    def release(self, slot: Slot) -> Job[Any]:
        """Take its job from it. Its tokens stay in the cache, but for a picture that is read in part."""
        job, slot.job, slot.is_new = slot.job, None, False
        assert job is not None
        if (whole := slot.places.whole(len(slot.tokens))) < len(slot.tokens):
            self._cut(slot, whole, slot.places)
        self._releases += 1
        self.use(slot)
        return job

    def use(self, slot: Slot) -> None:
        """It was used last."""
        self._ticks += 1
        slot.last_used = self._ticks

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


def _is_choosing(job: Job[Any]) -> bool:
    """Whether its next token is being chosen beside the engine's thread, or was and is not taken."""
    return isinstance(job, Generation) and job.choosing


def _is_extra(job: Job[Any]) -> TypeGuard[Generation]:
    return isinstance(job, Generation) and job.is_extra
