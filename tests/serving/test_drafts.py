"""Guessed tokens: whatever is guessed, every answer is that of a clean run; and it is guessed only while that pays."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fake_model import FakeModel, expected, heard, job, next_token, talkative
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.serving.batcher import Batcher
from actors.serving.draft import Draft
from actors.serving.drafting import LONGEST_TURNS, Drafting
from actors.serving.generation import Generation
from actors.serving.ngrams import Ngrams
from actors.serving.slots import Slots
from actors.serving.text import TextStream
from scheduler.costs.params import MOST_DRAFTED

PROMPT = st.lists(st.integers(1, 3), min_size=1, max_size=20)


class Hostile:
    """Guesses right, wrong, or both, by chance."""

    def __init__(self, prompt: list[int], chance: random.Random) -> None:
        self._tokens, self._chance = list(prompt), chance

    def take(self, token: int) -> None:
        self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        guessed: list[int] = []
        n_right = self._chance.randrange(most + 1)
        for at in range(self._chance.randrange(most + 1)):
            right = next_token([*self._tokens, *guessed])
            guessed.append(right if at < n_right else self._chance.randrange(16))
        return guessed


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess is tried, as far as there is room."""
    monkeypatch.setattr(Drafting, "choose", _try_all)


def _try_all(self: Drafting, jobs: list[Generation], n_answers: int, n_free: int) -> dict[Generation, list[int]]:
    chosen = {}
    for one in jobs:
        assert one.draft is not None
        guessed = one.draft.guess(min(one.n_left - 1, MOST_DRAFTED))[: max(0, n_free)]
        if guessed:
            n_free -= len(guessed)
            chosen[one] = one.draft.use(len(guessed))
    return chosen


@pytest.mark.usefixtures("eager")
@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.tuples(PROMPT, st.integers(1, 30), st.booleans()), min_size=1, max_size=8),
    n_slots=st.integers(1, 4),
    n_ubatch=st.integers(1, 24),
    n_spare=st.integers(0, MOST_DRAFTED),
    room=st.sampled_from([60, 100, 10_000]),
    can_cut=st.booleans(),
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
    can_cut: bool,
    cancelled: set[int],
    seed: int,
) -> None:
    chance = random.Random(seed)
    model = FakeModel(n_slots, n_ubatch, can_cut, room)
    model.n_outputs = n_slots + n_spare
    batcher = Batcher(model)
    try:
        jobs = []
        for prompt, max_tokens, guesses in prompts:
            jobs.append(job(prompt, max_tokens, draft=Draft(Hostile(prompt, chance)) if guesses else None))
            batcher.submit(jobs[-1])
        for index in cancelled & set(range(len(jobs))):
            batcher.cancel(jobs[index])
        for index, (one, (prompt, max_tokens, _)) in enumerate(zip(jobs, prompts, strict=True)):
            chunks = list(one.hearer)
            if index in cancelled:
                continue
            assert heard(chunks) == expected(prompt, max_tokens)
            assert chunks[-1].completion_tokens == len(heard(chunks)[0].split())
            assert one.sampler.closed
    finally:
        batcher.close()
    for slot in batcher.slots():
        assert slot.tokens == model.memory[slot.sequence], "the slot's tokens are not what the memory holds"


@pytest.mark.usefixtures("eager")
def test_right_guesses_spare_turns_and_wrong_ones_are_taken_back(running: Any) -> None:
    prompt = talkative(5, at_least=30)
    model = FakeModel(n_seq_max=1, n_ubatch=32)
    model.n_outputs = 16
    one = job(prompt, 30, draft=Draft(Certain(prompt)))
    batcher = running(model)
    batcher.submit(one)
    chunks = list(one.hearer)
    assert heard(chunks) == expected(prompt, 30)
    assert [len(batch) for batch in model.batches] == [5, 16, 13]
    timings = chunks[-1].timings
    assert timings is not None
    assert (timings.draft_n, timings.draft_n_accepted) == (27, 27)


class Certain(Hostile):
    def __init__(self, prompt: list[int]) -> None:
        super().__init__(prompt, random.Random())

    def guess(self, most: int) -> list[int]:
        guessed: list[int] = []
        for _ in range(most):
            guessed.append(next_token([*self._tokens, *guessed]))
        return guessed


@pytest.mark.usefixtures("eager")
def test_a_stop_string_in_the_middle_of_guesses_ends_the_answer(running: Any) -> None:
    prompt = talkative(5, at_least=20)
    said = expected(prompt, 20)[0].split()
    at = next(at for at in range(4, 20) if said[at] not in said[:at])
    model = FakeModel(n_seq_max=1, n_ubatch=32)
    model.n_outputs = 16
    one = job(prompt, 20, draft=Draft(Certain(prompt)))
    one._text = TextStream([f" {said[at]} "])
    batcher = running(model)
    batcher.submit(one)
    chunks = list(one.hearer)
    assert heard(chunks) == (" ".join(said[:at]), "stop")
    assert chunks[-1].completion_tokens == at + 1
    batcher.close()
    assert batcher.slots()[0].tokens == model.memory[0] == [*prompt, *map(int, said[:at])]


@pytest.mark.usefixtures("eager")
def test_the_next_turn_of_a_chat_finds_what_was_said_and_nothing_else(running: Any) -> None:
    prompt = talkative(5, at_least=12)
    model = FakeModel(n_seq_max=1, n_ubatch=32)
    model.n_outputs = 16
    batcher = running(model)
    first = job(prompt, 12, draft=Draft(Hostile(prompt, random.Random(1))))
    batcher.submit(first)
    said = [int(word) for word in heard(list(first.hearer))[0].split()]
    following = job([*prompt, *said, 1], 5, draft=Draft(Hostile([*prompt, *said, 1], random.Random(2))))
    batcher.submit(following)
    chunks = list(following.hearer)
    assert heard(chunks) == expected([*prompt, *said, 1], 5)
    assert chunks[-1].cached_tokens == len(prompt) + len(said) - 1  # the last token was never decoded


@pytest.mark.usefixtures("eager")
def test_nothing_is_guessed_while_a_prompt_is_read(running: Any) -> None:
    model = FakeModel(n_seq_max=2, n_ubatch=32)
    model.n_outputs = 17
    batcher = running(model)
    answering, reading = talkative(3, at_least=30), [2] * 300
    one = job(answering, 30, draft=Draft(Certain(answering)))
    batcher.submit(one)
    batcher.submit(job(reading, 1))
    list(one.hearer)
    for batch in model.batches:
        if any(row.sequence == 1 and row.position < len(reading) for row in batch):
            assert sum(row.sequence == 0 and row.wants_logits for row in batch) <= 1


# Where guesses come from


def test_a_text_that_repeats_itself_is_guessed_to_go_on() -> None:
    source = Ngrams([1, 2, 3, 4, 5, 6, 1, 2])
    assert source.guess(5) == []
    source.take(3)
    assert source.guess(5) == [4, 5, 6, 1, 2]
    source.take(4)
    assert source.guess(3) == [5, 6, 1]
    source.take(9)
    assert source.guess(3) == []


def test_a_loop_is_guessed_to_go_round() -> None:
    source = Ngrams([7, 8, 7, 8])
    source.take(7)
    assert source.guess(6) == [8, 7, 8, 7, 8, 7]


def test_of_several_places_the_latest_is_followed_and_left_with_the_first_wrong_token() -> None:
    source = Ngrams([1, 2, 3, 4, 0, 1, 2, 3, 5, 6, 7, 0, 1, 2])
    source.take(3)
    assert source.guess(2) == [5, 6]
    source.take(4)
    assert source.guess(2) == [0, 1], "it was 2, 3, 4 that was said last"


def test_no_picture_is_guessed() -> None:
    source = Ngrams([1, 2, 3, 4, -5, -6, 1, 2])
    source.take(3)
    assert source.guess(5) == [4]


def test_a_prompt_that_is_shorter_than_what_is_looked_for_is_no_trouble() -> None:
    source = Ngrams([1])
    for token in (1, 1, 1):
        source.take(token)
    assert source.guess(2) == [1, 1]


# What pays


class Fixed:
    """Guesses the same for ever."""

    def take(self, token: int) -> None:
        pass

    def guess(self, most: int) -> list[int]:
        return [1] * most


def drafting(n_slots: int = 1) -> Drafting:
    model = FakeModel(n_slots)
    return Drafting(Slots(model), model)


def guessing(n_right: int = 0, n_wrong: int = 0, max_tokens: int = 1000) -> Generation:
    """An answer with guesses that were right and wrong so often."""
    draft = Draft(Fixed())
    for token in [1] * n_right + [2] * n_wrong:
        draft.guess(1)
        draft.take(token)
    return job([1], max_tokens, draft=draft)


def measured(rows: dict[int, float]) -> Drafting:
    """How many seconds turns take, by their rows."""
    found = drafting()
    for n_rows, seconds in rows.items():
        found.took(n_rows, seconds)
    return found


def test_nothing_is_guessed_before_a_turn_without_guesses_was_measured() -> None:
    one = guessing(n_right=50)
    assert drafting().choose([one], 1, 15) == {}
    assert len(measured({1: 1.0}).choose([one], 1, 15)[one]) == 15


CPU = {1: 1.0, 2: 1.9, 4: 2.66, 8: 3.82, 16: 7.54}
FREE = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}


@pytest.mark.parametrize(
    ("rows", "n_right", "n_wrong", "count"),
    [
        (CPU, 0, 0, 0),  # half of the guesses right is not enough where rows are dear
        (CPU, 5, 0, 0),
        (CPU, 25, 0, 7),
        (CPU, 25, 20, 0),
        (FREE, 0, 20, 15),  # where they cost nothing, few right guesses are
        ({1: 1.0, 2: 5.0, 4: 5.0, 8: 5.0, 16: 5.0}, 6, 0, 0),
    ],
)
def test_guesses_are_tried_where_they_make_the_answer_faster(
    rows: dict[int, float], n_right: int, n_wrong: int, count: int
) -> None:
    one = guessing(n_right, n_wrong)
    assert len(measured(rows).choose([one], 1, 15).get(one, [])) == count


def test_others_do_not_wait_for_what_one_gains() -> None:
    """Three guesses bring 2.7 tokens. A turn of 4 rows with one answer may take twice as long; with four answers
    one of 7 rows may not."""
    one = guessing(n_right=40)
    assert len(measured({1: 1.0, 2: 2.0, 4: 2.0, 8: 9.0, 16: 9.0}).choose([one], 1, 15)[one]) == 3
    assert measured({4: 1.0, 5: 2.0, 7: 2.0, 11: 9.0, 19: 9.0}).choose([one], 4, 15) == {}
    assert len(measured({4: 1.0, 5: 2.0, 7: 1.4, 11: 9.0, 19: 9.0}).choose([one], 4, 15)[one]) == 3


def test_no_more_is_guessed_than_there_is_room_for_or_may_be_said() -> None:
    one, short = guessing(n_right=20), guessing(n_right=20, max_tokens=4)
    assert len(measured(FREE).choose([one], 1, 6)[one]) == 3
    assert len(measured(FREE).choose([short], 1, 15)[short]) == 3
    assert measured(FREE).choose([one], 1, 0) == {}
    both = measured({2: 1.0}).choose([one, guessing(n_right=20)], 2, 15)
    assert sum(map(len, both.values())) <= 15


def test_what_did_not_pay_is_tried_again_after_a_thousand_turns() -> None:
    found, one = measured({1: 1.0, 2: 9.0, 4: 9.0, 8: 9.0, 16: 9.0}), guessing(n_right=20)
    for _ in range(LONGEST_TURNS - 1):
        found.took(1, 1.0)
        if found.choose([one], 1, 15):
            break
    assert found._n_turns > LONGEST_TURNS - 5
    assert found.choose([one], 1, 15)


def test_guesses_that_are_not_tried_are_compared_all_the_same() -> None:
    draft = Draft(Fixed())
    for _ in range(20):
        draft.guess(15)
        draft.take(1)
    assert draft.expected(3) > 2
    assert (draft.n_drafted, draft.n_accepted) == (0, 0)
    draft.guess(15)
    draft.use(2)
    for token in (1, 1, 1, 2):
        draft.take(token)
    assert (draft.n_drafted, draft.n_accepted) == (2, 2)
