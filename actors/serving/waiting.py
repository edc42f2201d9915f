"""Which jobs have nothing to compute now, because another thread or a reader is to go first; and which have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from actors.serving.generation import Generation
from actors.serving.jobs import Job
from actors.serving.model import Adapters
from actors.serving.pieces import Medium
from actors.serving.slots import Slot


def is_being_chosen(job: Job[Any]) -> bool:
    """Whether its next token is chosen, or its next picture encoded, beside the engine's thread."""
    return isinstance(job, Generation) and job.choosing and job.chosen is None


def uses_sampler(job: Job[Any]) -> bool:
    """Whether another thread may use its sampler."""
    return is_being_chosen(job) and not (isinstance(job, Generation) and job.encoding)


def waits(job: Job[Any]) -> bool:
    """Whether there is nothing to compute for `job` until somebody says so."""
    return is_being_chosen(job) or stalls(job)


def is_in_line(job: Job[Any]) -> bool:
    """Whether `job` wants turns of the engine's thread, now or within a token. Not while its picture is encoded: its
    adapters would keep others waiting for nothing."""
    return not stalls(job) and not (isinstance(job, Generation) and job.encoding)


def stalls(job: Job[Any]) -> bool:
    """Whether its reader does not take what it was told."""
    return job.hearer.stalled and not job.cancelled


def next_answers(slots: Iterable[Slot], adapters: Adapters) -> list[tuple[Slot, Generation]]:
    """All that are to go on with these adapters: first those that say something, then the shortest prompts."""
    generating = [(slot, slot.job) for slot in slots if isinstance(slot.job, Generation)]
    generating = [(slot, job) for slot, job in generating if job.adapters == adapters]
    running = [(slot, job) for slot, job in generating if not job.choosing and not job.hearer.stalled]
    return sorted(running, key=lambda pair: (pair[1].pending is None, len(pair[1].prompt) - len(pair[0].tokens)))


def next_encodings(running: Iterable[tuple[Slot, Generation]]) -> Iterator[tuple[Generation, Medium]]:
    """Pictures and sounds that are to be encoded before `running` can go on."""
    for slot, job in running:
        placed = job.media.at(len(slot.tokens)) if job.media and not job.cancelled else None
        if placed is not None and placed.medium.embedding is None:
            yield job, placed.medium
