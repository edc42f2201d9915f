"""Slots: the sequences of a context, and what each still remembers.

A slot keeps its tokens in the KV cache after an answer ends. The next request goes to the free slot that shares the
longest beginning with it; among equals, to the one idle for longest, so that the others keep what they know.
Invariant: `slot.tokens` is exactly what the model's memory holds for that sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.serving.jobs import Job


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
