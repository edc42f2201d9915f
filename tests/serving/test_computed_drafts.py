"""Guesses that are computed: every answer is that of a clean run, and only what pays is computed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest
from fake_model import FakeModel, expected, heard, job, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.serving.batcher import Batcher
from actors.serving.draft import Draft, Text
from actors.serving.drafting import LONGEST_TURNS, Drafting
from actors.serving.generation import Generation
from actors.serving.model import Row
from actors.serving.slots import Slots

PROMPT = st.lists(st.integers(1, 3), min_size=1, max_size=20)


class FakeGuesser:
    """Guesses right, wrong, or both, by chance; and may have something to read first."""

    least_steps, rests, followed_s = 0, False, 0.0

    def __init__(self, seed: int = 0, n_unread: int = 0, knows: bool = True) -> None:
        self._chance = random.Random(seed)
        self.n_unread, self.knows = n_unread, knows
        self.asked: list[int] = []
        self.judged: list[tuple[int, int]] = []
        self.followed: list[list[Row]] = []

    def can_guess(self, text: Text) -> bool:
        return self.knows

    def unread(self, text: Text) -> int:
        return self.n_unread

    def guess(self, wanted: Mapping[Text, int]) -> None:
        for text, most in wanted.items():
            self.asked.append(most)
            text.ready = []
            if self.n_unread:
                continue
            n_right = self._chance.randrange(most + 1)
            for at in range(self._chance.randrange(most + 1)):
                right = next_token([*text.tokens, *text.ready])
                text.ready.append(right if at < n_right else self._chance.randrange(16))

    def follow(self, rows: Sequence[Row]) -> None:
        self.followed.append(list(rows))

    def judge(self, sequence: int, n_right: int) -> None:
        self.judged.append((sequence, n_right))

    def forget(self, sequence: int, kept: int) -> None: ...

    def copy(self, source: int, sequence: int, count: int) -> None: ...


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.tuples(PROMPT, st.integers(1, 30), st.booleans()), min_size=1, max_size=8),
    n_slots=st.integers(1, 4),
    n_ubatch=st.integers(1, 24),
    n_spare=st.integers(0, 15),
    room=st.sampled_from([60, 100, 10_000]),
    cancelled=st.sets(st.integers(0, 7), max_size=2),
    seed=st.integers(0, 1000),
)
@pytest.mark.slow
def test_every_answer_is_that_of_a_clean_run(
    prompts: list[tuple[list[int], int, bool]],
    n_slots: int,
    n_ubatch: int,
    n_spare: int,
    room: int,
    cancelled: set[int],
    seed: int,
) -> None:
    model = FakeModel(n_slots, n_ubatch, True, room)
    model.n_outputs, model.guesser = n_slots + n_spare, FakeGuesser(seed)
    batcher = Batcher(model)
    try:
        jobs = []
        for prompt, max_tokens, guesses in prompts:
            jobs.append(job(prompt, max_tokens, draft=Draft(Text(prompt)) if guesses else None))
            batcher.submit(jobs[-1])
        for index in cancelled & set(range(len(jobs))):
            batcher.cancel(jobs[index])
        for index, (one, (prompt, max_tokens, _)) in enumerate(zip(jobs, prompts, strict=True)):
            chunks = list(one.hearer)
            if index not in cancelled:
                assert heard(chunks) == expected(prompt, max_tokens)
    finally:
        batcher.close()
    for slot in batcher.slots():
        assert slot.tokens == model.memory[slot.sequence], "the slot's tokens are not what the memory holds"


# What pays


def drafting(rows: dict[int, float], guesser: FakeGuesser, step_s: float | None = None) -> Drafting:
    """How many seconds turns take, by their rows, and a guess."""
    model = FakeModel(1)
    model.guesser = guesser
    found = Drafting(Slots(model), model)
    for n_rows, seconds in rows.items():
        found.took(n_rows, seconds)
    if step_s is not None:
        found._step = step_s, found._n_turns
    return found


def guessing(rate: float, max_tokens: int = 1000) -> Generation:
    draft = Draft(Text([1]))
    draft.rate_as(rate, 1)
    return job([1], max_tokens, draft=draft)


FREE = dict.fromkeys((1, 2, 4, 8, 16), 1.0)


@pytest.mark.parametrize(
    ("rows", "step_s", "rate", "asked"),
    [
        (FREE, None, 0.8, [15]),  # nobody knows what a guess costs: it is tried
        (FREE, 0.1, 0.8, [7]),
        (FREE, 0.1, 0.95, [15]),
        (FREE, 0.1, 0.05, []),
        (FREE, 1.0, 0.8, []),  # a draft as slow as its model
        ({1: 1.0, 2: 1.9, 4: 2.66, 8: 3.82, 16: 7.54}, 0.1, 0.8, []),  # a CPU
        ({1: 1.0, 2: 1.9, 4: 2.66, 8: 3.82, 16: 7.54}, 0.02, 0.95, [7]),
    ],
)
def test_as_many_are_computed_as_make_the_answer_faster(
    rows: dict[int, float], step_s: float | None, rate: float, asked: list[int]
) -> None:
    guesser = FakeGuesser()
    drafting(rows, guesser, step_s).choose([guessing(rate)], 1, 15)
    assert guesser.asked == asked


def test_a_prompt_is_read_for_guesses_only_where_the_answer_is_long_enough() -> None:
    for max_tokens, asked in ((20, []), (1000, [7])):
        guesser = FakeGuesser(n_unread=5000)
        found = drafting(FREE, guesser, step_s=0.1)
        found._read_s = 0.005
        found.choose([guessing(0.8, max_tokens)], 1, 15)
        assert guesser.asked == asked


def test_what_knows_too_little_is_not_asked() -> None:
    guesser = FakeGuesser(knows=False)
    assert drafting(FREE, guesser).choose([guessing(1.0)], 1, 15) == {}
    assert guesser.asked == []


def test_steps_that_are_taken_in_any_case_are_paid_for() -> None:
    guesser = FakeGuesser()
    guesser.least_steps = 15
    drafting(FREE, guesser, step_s=0.1).choose([guessing(0.8)], 1, 15)
    assert guesser.asked == [15]


def test_guesses_that_were_wrong_are_tried_again_later_and_rested_meanwhile() -> None:
    guesser = FakeGuesser()
    found = drafting(FREE, guesser, step_s=0.1)
    wrong = guessing(0.0)
    wrong.draft.rated_at = found._rated_at = found._n_turns  # type: ignore[union-attr]
    for _ in range(50):
        assert found.choose([wrong], 1, 15) == {}
    assert guesser.rests and guesser.asked == []
    for _ in range(LONGEST_TURNS):
        for n_rows in FREE:
            found._measured[n_rows] = 1.0, found._n_turns
        found.took(1, 1.0)
    found.choose([wrong], 1, 15)
    assert not guesser.rests and guesser.asked


def test_new_answers_begin_with_what_others_have_seen(running: object) -> None:
    found = drafting(FREE, FakeGuesser(), step_s=0.1)
    found._rate, found._rated_at = 0.1, found._n_turns
    fresh = job([1], 100, draft=Draft(Text([1])))
    assert found.choose([fresh], 1, 15) == {}
    found._rated_at = -LONGEST_TURNS
    again = job([1], 100, draft=Draft(Text([1])))
    found.choose([again], 1, 15)
    assert again.draft is not None and again.draft.expected(1) == 0.8
