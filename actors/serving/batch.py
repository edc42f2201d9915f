"""What a turn computes: the next token of every answer under way, and pieces of the prompts that are being read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, cycle
from typing import Any, NamedTuple

from actors.serving.fairness import Rotation, shares
from actors.serving.generation import Generation
from actors.serving.jobs import Embedding
from actors.serving.model import Model, Row
from actors.serving.pieces import Piece, Placed
from actors.serving.row_times import Reading
from actors.serving.slot import Slot
from actors.serving.slots import Slots
from scheduler.costs.host import embedding_rows

JUDGED_AT_ONCE = 32
"""Tokens of prompts that are judged in a turn. Their logits are copied: 1 MiB each for 262,144 tokens."""


class Part(NamedTuple):
    """What of a batch is a job's: the row that its next token comes from, and rows that judge its prompt. `guessed`:
    its last tokens, whose rows follow that one."""

    slot: Slot
    job: Generation
    tokens: list[int]
    row: int | None
    judging: list[int]
    guessed: list[int]


class MediumPart(NamedTuple):
    """A piece of a picture or a sound, and whose prompt it belongs to."""

    slot: Slot
    job: Generation
    piece: Piece


class Batch(NamedTuple):
    """Of a turn: rows of text, and pieces of what is no text. llama.cpp takes them one after the other."""

    rows: list[Row]
    parts: list[Part]
    pieces: list[MediumPart]


def next_batch(
    running: Sequence[tuple[Slot, Generation]],
    slots: Slots,
    model: Model,
    guesses: Mapping[Generation, list[int]] | None = None,
) -> Batch:
    """One micro-batch at the most, for `running`: those that answer come first, then the shortest prompts. Those share
    the room that is left, by source. No more rows want logits than the context keeps. `guesses`: what may follow the
    next tokens of answers, where there is room. What must be read at once is not in it (`next_whole`)."""
    batch = Batch([], [], [])
    guesses = guesses or {}
    answering = [job for _, job in running if job.pending is not None]
    room = max(model.n_ubatch, model.n_seq_max) - sum(1 + len(guesses.get(job, ())) for job in answering)
    reading = [(job, _unread(slot, job, slots)) for slot, job in running if job.pending is None]
    counts = shares([(job.source, count) for job, count in reading], room)
    share = {job: count for (job, _), count in zip(reading, counts, strict=True)}
    judgements = min(model.n_outputs - len(running), JUDGED_AT_ONCE)
    rows = batch.rows
    for slot, job in running:
        start = len(slot.tokens)
        guessed: list[int] = []
        if job.pending is not None:
            guessed = guesses.get(job, guessed)
            tokens = [job.pending, *guessed]
        else:
            tokens = job.prompt[start : start + share[job]]
        if not tokens:
            continue
        if job.pending is None and (placed := job.media.at(start)) is not None:
            batch.pieces.append(MediumPart(slot, job, _piece(slot, job, placed, len(tokens))))
            continue
        samples = job.pending is not None or start + len(tokens) == len(job.prompt)
        to_judge = job.to_judge(start, len(tokens))
        if len(to_judge) + samples > 1 + judgements:  # the rest in the next turn
            to_judge = to_judge[: 1 + judgements]
            tokens, samples = tokens[: to_judge.stop - start], False
        judgements -= max(0, len(to_judge) + samples - 1)
        first_row = len(rows) - start
        position = job.media.position(start) if job.media else start
        says = len(tokens) - 1 - len(guessed) if samples else len(tokens)  # from here on, rows say what comes next
        rows += (
            Row(token, position + at, slot.sequence, at >= says or start + at in to_judge)
            for at, token in enumerate(tokens)
        )
        row = first_row + start + says if samples else None
        batch.parts.append(Part(slot, job, tokens, row, [first_row + at for at in to_judge], guessed))
    return batch


def read_by(parts: Sequence[Part]) -> list[Reading]:
    """What a batch reads of prompts, before their slots hold it."""
    reading = [part for part in parts if part.job.pending is None]
    return [Reading(len(part.slot.tokens), len(part.tokens)) for part in reading]


def next_whole(running: Sequence[tuple[Slot, Generation]], sources: Rotation[str]) -> list[MediumPart]:
    """What is encoded and must be read at once: one of it, or nothing. `sources` take turns."""
    ready = [
        MediumPart(slot, job, _piece(slot, job, placed, placed.medium.n_tokens))
        for slot, job in running
        if (placed := _next_medium(slot, job)) is not None and placed.medium.at_once
    ]
    sources.keep(part.job.source for part in ready)
    if not ready:
        return []
    chosen = min(ready, key=lambda part: sources.place(part.job.source))
    sources.serve([chosen.job.source])
    return [chosen]


def _next_medium(slot: Slot, job: Generation) -> Placed | None:
    """What `job` reads next, if that is no text, and encoded."""
    placed = job.media.at(len(slot.tokens)) if job.media and job.pending is None else None
    return placed if placed is not None and placed.medium.embedding is not None else None


def _piece(slot: Slot, job: Generation, placed: Placed, count: int) -> Piece:
    start = len(slot.tokens) - placed.start
    return Piece(placed.medium, start, start + count, job.media.position(placed.start), slot.sequence)


def _unread(slot: Slot, job: Generation, slots: Slots) -> int:
    """Tokens of its prompt that may be read in one turn: text, or pieces of the same picture, and no further than to
    its next checkpoint."""
    start, end = len(slot.tokens), len(job.prompt)
    if job.media and job.media.at(start) is not None:
        placed = _next_medium(slot, job)
        return 0 if placed is None or placed.medium.at_once else placed.end - start
    checkpoint = slots.checkpoint_of(slot, job)
    end = checkpoint if start < checkpoint < end else end
    return job.media.text_end(start, end) - start


class TextPart(NamedTuple):
    """What of a batch is of a text to embed."""

    slot: Slot
    job: Embedding
    tokens: list[int]


def next_texts(own: Sequence[tuple[Slot, Embedding]], slots: Slots, model: Model) -> tuple[list[Row], list[TextPart]]:
    """One batch of texts to embed. Those whose slots were used longest ago come first.

    A pooled model takes each text whole, several in a batch. Sequences that nobody uses help those who have several. Of
    others it is a micro-batch of one text: those half done would hold the cache.
    """
    pooled = model.is_pooled
    in_order = sorted(own, key=lambda pair: (not pooled and not pair[0].tokens, pair[0].last_used))
    if not pooled:
        del in_order[1:]
    room = model.n_ubatch if pooled else embed_step(model)
    free = [slot for slot in slots if slot.job is None] if pooled else []
    rows: list[Row] = []
    parts: list[TextPart] = []
    taken: Counter[Embedding] = Counter()
    for slot, job in chain(in_order, zip(free, cycle([job for _, job in in_order]))):
        if job.done + taken[job] == len(job.texts):
            continue
        text = job.texts[job.done + taken[job]]
        start = 0 if pooled else len(slot.tokens)
        tokens = text if pooled else text[start : start + room - len(rows)]
        if not tokens or len(rows) + len(tokens) > room:
            continue
        if slot.job is None:
            slots.forget(slot)
        rows += (Row(token, start + index, slot.sequence, True) for index, token in enumerate(tokens))
        parts.append(TextPart(slot, job, tokens))
        taken[job] += 1
    return rows, parts


def take_vectors(parts: Sequence[TextPart], vectors: Any, slots: Slots, *, pooled: bool) -> None:
    """What was computed of texts: one vector of each, if `pooled`, or one of each token."""
    at = 0
    for slot, job, tokens in parts:
        count = 1 if pooled else len(tokens)
        job.add(vectors[at : at + count])
        at += count
        slot.tokens += tokens
        if len(slot.tokens) == len(job.texts[job.done]):
            slots.forget(slot)
            slots.use(slot)  # the others' turn
            job.finish_text()


def embed_step(model: Model) -> int:
    """Tokens per embedding turn."""
    return embedding_rows(4 * (model.n_vocab + model.n_embd), model.n_ubatch)


def longest_text(model: Model, n_ctx: int) -> int:
    """Tokens of a text that can be embedded, in a slot of `n_ctx`."""
    if model.is_pooled:
        return model.n_ubatch
    return embed_step(model) if model.reads_whole else n_ctx
