"""A slot: a sequence of a context, and the tokens that it still holds.

A slot keeps its tokens in the KV cache after an answer ends. The next request goes to the free slot whose text it
continues, or else to the one that was idle longest, so that the others keep their tokens.
Invariant: `slot.tokens` is exactly what the model's memory holds for that sequence, computed with `slot.adapters`.
What was computed with other adapters, or other scales of them, is of no use to a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.serving.jobs import Job
from actors.serving.model import Adapters
from actors.serving.pieces import NO_PLACES, Places
from actors.serving.states import Checkpoint

_COMPARED = 1024  # tokens at once


@dataclass(slots=True)
class Slot:
    """`is_new`: its job has come, and what the slot holds is not yet made ready for it. `places`: of the pictures among
    its tokens. `source`: who asked for what it holds."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)  # in order
    adapters: Adapters = ()
    places: Places = NO_PLACES
    source: str = ""
    job: Job[Any] | None = None
    is_new: bool = False
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


def best_slot(slots: Sequence[Slot], prompt: Sequence[int], adapters: Adapters = ()) -> Slot | None:
    """The free slot for `prompt`; None when all are busy.

    The one that shares most with it, if that is more than half of what the slot holds: then it is the same text that
    goes on. Else an empty one, or the one that was idle longest. A beginning that all prompts have, if only one token,
    must not cost another's long conversation.
    """
    free = [slot for slot in slots if slot.job is None]
    shared = {slot.sequence: slot.shares(prompt, adapters) for slot in free}
    own = [slot for slot in free if 2 * shared[slot.sequence] > len(slot.tokens)]
    if own:
        return max(own, key=lambda slot: (shared[slot.sequence], -slot.last_used))
    return min(free, key=lambda slot: (bool(slot.tokens), slot.last_used), default=None)


def held_by(slots: Iterable[Slot]) -> int:
    """Cells of running jobs: what they hold, or will hold when their prompts are read, and one more for each."""
    held = ((0 if slot.is_new else len(slot.tokens) + 1, slot.job) for slot in slots if slot.job is not None)
    return sum(max(n_cells, len(job.prompt)) for n_cells, job in held)
