"""Turns in which wrong guesses can only be taken back from a batch that is computed in one piece."""

from __future__ import annotations

import pytest
from fake_model import FakeModel, expected, heard, job
from hypothesis import given, settings
from hypothesis import strategies as st
from test_computed_drafts import PROMPT, FakeGuesser

from actors.serving.batcher import Batcher
from actors.serving.draft import Draft, Text
from actors.serving.splitting import in_pieces


@pytest.mark.parametrize(
    ("counts", "in_order", "pieces"),
    [
        ({0: 1, 1: 1, 2: 1}, True, [[0, 1, 2]]),
        ({0: 4, 1: 2, 2: 4}, False, [[0, 2], [1]]),
        ({0: 4, 1: 2, 2: 4}, True, [[0], [2], [1]]),
        ({1: 2, 3: 2, 4: 2}, True, [[1], [3, 4]]),
        ({}, True, []),
    ],
)
def test_a_piece_has_as_many_rows_of_each(counts: dict[int, int], in_order: bool, pieces: list[list[int]]) -> None:
    assert in_pieces(counts, in_order=in_order) == pieces


def test_the_order_of_answers_does_not_divide_a_turn() -> None:
    """They come sorted by how much they have said."""
    batcher = Batcher(model := FakeModel(4, 64, can_cut=False))
    model.n_copies, model.shares_stream = 15, False
    slots = sorted(batcher._slots, key=lambda slot: (3, 1, 2, 0).index(slot.sequence))
    running = [(slot, job([1, 2, 3], 5)) for slot in slots]
    ((piece, is_last),) = batcher._drafting.in_pieces(running, {one: [4, 5] for _, one in running})
    batcher.close()
    assert is_last and [slot.sequence for slot, _ in piece] == [0, 1, 2, 3]


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.tuples(PROMPT, st.integers(1, 30), st.booleans()), min_size=1, max_size=8),
    n_slots=st.integers(1, 4),
    n_ubatch=st.integers(5, 24),
    shares_stream=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.slow
def test_every_answer_is_that_of_a_clean_run_and_no_guess_is_stuck(
    prompts: list[tuple[list[int], int, bool]], n_slots: int, n_ubatch: int, shares_stream: bool, seed: int
) -> None:
    model = FakeModel(n_slots, n_ubatch, can_cut=False)
    model.n_copies, model.shares_stream = 15, shares_stream
    model.n_outputs, model.guesser = n_slots * 16, FakeGuesser(seed)
    batcher = Batcher(model)
    taken_back = []
    take_back = batcher._slots.take_back

    def noted(slot: object, one: object, count: int) -> None:
        before = model.n_stuck
        take_back(slot, one, count)  # type: ignore[arg-type]
        taken_back.append(model.n_stuck == before)

    batcher._slots.take_back = noted  # type: ignore[assignment]
    try:
        jobs = [
            job(prompt, max_tokens, draft=Draft(Text(prompt)) if guesses else None)
            for prompt, max_tokens, guesses in prompts
        ]
        for one in jobs:
            batcher.submit(one)
        for one, (prompt, max_tokens, _) in zip(jobs, prompts, strict=True):
            assert heard(list(one.hearer)) == expected(prompt, max_tokens)
    finally:
        batcher.close()
    assert all(taken_back)
