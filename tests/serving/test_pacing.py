"""How much of prompts a turn reads while others wait, by how long the model takes for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from fake_model import FakeModel, job

from actors.serving.batch import next_batch
from actors.serving.pacing import MANY, TURN_S, Pacing, Reading
from actors.serving.slots import Slots

UBATCH = 512


def turn_s(read: Sequence[Reading], row_s: Callable[[int, int], float]) -> float:
    return sum(piece.n_tokens * row_s(piece.known, piece.n_tokens) for piece in read)


def read_prompt(
    pacing: Pacing, row_s: Callable[[int, int], float], start: int, end: int, answers_s: float = 0.003
) -> list[tuple[int, float]]:
    """The turns of one prompt, while another answers: how many tokens, and how many seconds they took."""
    turns = []
    while start < end:
        wanted = Reading("ann", start, min(UBATCH, end - start))
        read = wanted._replace(n_tokens=pacing.limited([wanted], beside_answers=True)[0])
        assert 0 <= read.n_tokens <= wanted.n_tokens
        if not read.n_tokens:
            pacing.took([], answers_s)
            continue
        took_s = turn_s([read], row_s)
        pacing.took([read], took_s + answers_s)
        turns.append((read.n_tokens, took_s))
        start += read.n_tokens
    return turns


def fast(known: int, count: int) -> float:
    return 0.0001 + 1e-8 * known


def slow(known: int, count: int) -> float:
    return 0.02 + 2e-6 * known


def row_by_row(known: int, count: int) -> float:
    """As llama.cpp's attention on a CPU: six times as long for each of a few rows as for each of many."""
    return 0.0005 + (1 if count >= MANY else 6) * 6e-7 * known


def test_what_is_fast_is_read_in_whole_batches() -> None:
    counts = [count for count, _ in read_prompt(Pacing(), fast, 0, 20_000)]
    assert counts == [UBATCH] * (20_000 // UBATCH) + [20_000 % UBATCH]


def test_what_is_slow_keeps_others_waiting_for_a_quarter_of_a_second() -> None:
    turns = read_prompt(Pacing(), slow, 0, 4_000)
    assert all(took_s < TURN_S * 1.2 for _, took_s in turns[1:]), "only the first is not known"
    assert sum(took_s > TURN_S / 2 for _, took_s in turns) > 0.9 * len(turns), "and the time is used"


def test_a_turn_may_read_for_as_long_as_its_answers_take() -> None:
    """A model whose every turn takes 2 s would else read one token in each."""
    pacing = Pacing()
    pacing.took([], 2.0)
    turns = read_prompt(pacing, slow, 0, 4_000, answers_s=2.0)
    assert all(0.9 < took_s < 2.4 for _, took_s in turns[1:-2])


def test_few_tokens_behind_many_known_ones_are_divided() -> None:
    """The first time nobody knows. From then on a turn takes no longer than it may."""
    pacing = Pacing()
    read_prompt(pacing, row_by_row, 0, 20_000)
    for _ in range(3):
        turns = read_prompt(pacing, row_by_row, 20_000, 20_035)
    assert all(took_s < TURN_S * 1.2 for _, took_s in turns)


def test_many_tokens_are_read_together_where_few_would_take_as_long() -> None:
    pacing = Pacing()
    read_prompt(pacing, row_by_row, 0, 20_000)
    read_prompt(pacing, row_by_row, 20_000, 20_063)
    turns = read_prompt(pacing, row_by_row, 20_000, 21_000)
    assert [count for count, _ in turns[: 1000 // MANY]] == [MANY] * (1000 // MANY)


def test_a_few_tokens_are_read_with_known_ones_where_that_is_faster() -> None:
    pacing = Pacing()
    read_prompt(pacing, row_by_row, 0, 20_000)
    read_prompt(pacing, row_by_row, 20_000, 20_063)
    read_prompt(pacing, row_by_row, 20_000, 20_200)
    assert pacing.better_read_again(20_000, 40) == MANY - 40
    assert not pacing.better_read_again(20_000, 5), "five tokens take less time than 64"
    assert not pacing.better_read_again(20_000, MANY)
    assert not pacing.better_read_again(100, 40), "it spares no time worth a word"


def test_a_long_text_does_not_slow_down_the_short_prompt_of_another() -> None:
    pacing = Pacing()
    for known in (0, 20_000):
        for count in (35, MANY):
            pacing.took([Reading("ann", known, count)], turn_s([Reading("", known, count)], row_by_row))
    deep, short = Reading("ann", 20_000, 63), Reading("bob", 0, 63)
    n_deep, n_short = pacing.limited([deep, short], beside_answers=False)
    assert n_short == 63 and 1 <= n_deep < 5


@pytest.mark.parametrize("answers_s", [0.2, 1.0])
def test_what_long_answers_take_is_not_the_prompts(answers_s: float) -> None:
    """Answers become longer while prompts are read all the time."""
    pacing = Pacing()
    pacing.took([], 0.003)
    read_prompt(pacing, slow, 0, 1_000)
    turns = read_prompt(pacing, slow, 0, 4_000, answers_s=answers_s)
    assert all(took_s > TURN_S / 2 for _, took_s in turns[40:-2])
    shorter = read_prompt(pacing, slow, 0, 4_000)
    assert all(took_s < 2 * TURN_S for _, took_s in shorter[40:])


def test_a_stalled_turn_is_forgotten() -> None:
    pacing = Pacing()
    read_prompt(pacing, fast, 0, 5_000)
    pacing.took([Reading("ann", 5_000, UBATCH)], 30.0)
    counts = [count for count, _ in read_prompt(pacing, fast, 5_000, 12_000)]
    assert counts[0] < UBATCH and counts.count(UBATCH) > 5


@pytest.mark.parametrize(
    ("sources", "answers", "limited"),
    [(("ann",), False, False), (("ann", "ann"), False, False), (("ann", "bob"), False, True), (("ann",), True, True)],
    ids=["alone", "two of one source", "two sources", "an answer waits"],
)
def test_prompts_are_limited_where_others_wait(sources: tuple[str, ...], answers: bool, limited: bool) -> None:
    model, pacing = FakeModel(n_seq_max=3, n_ubatch=128), Pacing()
    pacing.took([Reading("", 0, 100)], 10.0)
    slots = Slots(model)
    slots.waiting += [job([1] * 90, source=source) for source in sources]
    slots.waiting += [job([1], source="ann")] * answers
    slots.assign()
    running = [(slot, slot.job) for slot in slots if slot.job is not None]
    if answers:
        running[-1][1].pending = 1  # type: ignore[union-attr]
    batch = next_batch(running, slots, model, pacing)  # type: ignore[arg-type]
    n_read = sum(len(part.tokens) for part in batch.parts if part.job.pending is None)
    assert n_read == (2 if limited else min(128, 90 * len(sources)))
