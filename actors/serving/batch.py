"""What a turn computes: the next token of every answer under way, and pieces of the prompts that are being read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, cycle
from typing import NamedTuple

from actors.serving.generation import Generation
from actors.serving.jobs import Embedding
from actors.serving.model import Model, Row
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


def next_batch(
    running: Sequence[tuple[Slot, Generation]],
    slots: Slots,
    model: Model,
    guesses: Mapping[Generation, list[int]] | None = None,
) -> tuple[list[Row], list[Part]]:
    """One micro-batch at the most, for `running`: those that answer come first, then the shortest prompts. No more rows
    want logits than the context keeps. `guesses`: what may follow the next tokens of answers, where there is room."""
    rows: list[Row] = []
    parts: list[Part] = []
    room = max(model.n_ubatch, model.n_seq_max)
    judgements = min(model.n_outputs - len(running), JUDGED_AT_ONCE)
    for index, (slot, job) in enumerate(running):
        start = len(slot.tokens)
        guessed: list[int] = []
        if job.pending is not None:
            guessed = guesses.get(job, guessed) if guesses else guessed
            tokens = [job.pending, *guessed]
        else:  # the room that is left is shared evenly; what a short prompt does not need goes to the longer ones
            end = start + (room - len(rows)) // (len(running) - index)
            tokens = job.prompt[start : job.media.text_end(start, end) if job.media else end]
        checkpoint = 0 if job.pending is not None else slots.checkpoint_of(slot, job)
        if start < checkpoint < start + len(tokens):
            tokens = tokens[: checkpoint - start]
        if not tokens:
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
        parts.append(Part(slot, job, tokens, row, [first_row + at for at in to_judge], guessed))
    return rows, parts


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


def embed_step(model: Model) -> int:
    """Tokens per embedding turn."""
    return embedding_rows(4 * (model.n_vocab + model.n_embd), model.n_ubatch)
