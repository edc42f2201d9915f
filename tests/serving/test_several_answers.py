"""Requests that ask for several answers: the prompt is read once, and nobody else waits for the further ones."""

from __future__ import annotations

from typing import Any

import pytest
from fake_model import FakeModel, expected, heard, job, submitted
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.serving.batcher import Batcher
from actors.serving.jobs import Choices, Results, Together
from actors.serving.protocol import Chunk, Timings
from scheduler.errors import EngineFailed

LONG = [1 + index % 9 for index in range(60)]


def sharing(n_seq_max: int, **given: Any) -> FakeModel:
    model = FakeModel(n_seq_max, **given)
    model.shares_cells = True
    return model


def rows_read(model: FakeModel) -> int:
    return sum(len(batch) for batch in model.batches)


def test_further_answers_begin_with_the_cells_of_the_first(running: Any) -> None:
    model = sharing(4)
    batcher = running(model)
    first = job(LONG, 4)
    for one in (first, *(job(LONG, 4, first=first) for _ in range(3))):
        batcher.submit(one)
    assert heard(list(first.hearer)) == expected(LONG, 4)
    batcher.close()
    assert rows_read(model) <= len(LONG) + 4 * 4


def test_another_request_with_the_same_beginning_shares_it_too(running: Any) -> None:
    """Also while the first answer is under way, in another slot."""
    model = sharing(2)
    batcher = running(model)
    first = submitted(batcher, job(LONG, 500))
    next(iter(first.hearer))
    one = submitted(batcher, job([*LONG, 7], 3))
    chunks = list(one.hearer)
    assert heard(chunks) == expected([*LONG, 7], 3)
    assert chunks[-1].cached_tokens == len(LONG)
    batcher.cancel(first)


def test_further_answers_give_way(running: Any) -> None:
    """Their slots are taken by whoever comes, and they are continued afterwards."""
    model = sharing(2)
    batcher = running(model)
    talkative = next([n] for n in range(1, 999) if len(expected([n], 200)[0].split()) == 200)
    first = job(talkative, 200)
    further = [job(talkative, 200, first=first) for _ in range(2)]
    for one in (first, *further):
        batcher.submit(one)
    next(iter(further[0].hearer))
    other = submitted(batcher, job([3, 4], 3))
    assert heard(list(other.hearer)) == expected([3, 4], 3)
    assert not further[1].ended
    for one in further:
        text, reason = heard(list(one.hearer))
        assert reason == "length" and expected(talkative, 200)[0].endswith(text)


def test_answers_to_other_prompts_of_a_request_give_way_too(running: Any) -> None:
    batcher = running(FakeModel(1))
    talkative = next([n] for n in range(1, 999) if len(expected([n], 200)[0].split()) == 200)
    extra = submitted(batcher, job(talkative, 200, is_extra=True))
    next(iter(extra.hearer))
    other = submitted(batcher, job([3, 4], 3))
    assert heard(list(other.hearer)) == expected([3, 4], 3) and not extra.ended
    text, reason = heard(list(extra.hearer))
    assert reason == "length" and expected(talkative, 200)[0].endswith(text)


def test_further_answers_give_way_for_room_in_the_cache(running: Any) -> None:
    batcher = running(sharing(3, room=100))
    talkative = next([*LONG[:30], n] for n in range(1, 999) if expected([*LONG[:30], n], 30)[1] == "length")
    first = job(talkative, 30)
    further = job(talkative, 30, first=first)
    for one in (first, further):
        batcher.submit(one)
    next(iter(further.hearer))
    other = submitted(batcher, job([3] * 45, 3))
    assert heard(list(other.hearer)) == expected([3] * 45, 3)
    for one in (first, further):
        assert heard(list(one.hearer))[1] == "length"


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=50), st.integers(1, 4), st.integers(1, 8)),
        min_size=1,
        max_size=5,
    ),
    n_slots=st.integers(1, 4),
    shares=st.booleans(),
)
def test_every_answer_is_that_of_a_clean_run(
    requests: list[tuple[list[int], int, int]], n_slots: int, shares: bool
) -> None:
    model = FakeModel(n_slots)
    model.shares_cells = shares
    batcher = Batcher(model)
    jobs = []
    for prompt, count, max_tokens in requests:
        first = job(prompt, max_tokens)
        jobs += [
            (prompt, max_tokens, one)
            for one in (first, *(job(prompt, max_tokens, first=first) for _ in range(count - 1)))
        ]
    for _, _, one in jobs:
        batcher.submit(one)
    for prompt, max_tokens, one in jobs:
        assert heard(list(one.hearer)) == expected(prompt, max_tokens)  # type: ignore[call-overload]
    batcher.close()


def last(prompt_tokens: int, completion_tokens: int) -> Chunk:
    return Chunk("", "stop", prompt_tokens, 0, completion_tokens, reasoning_tokens=2, timings=Timings(1.0, 1.0))


def test_prompts_count_once_and_the_last_answer_tells_it() -> None:
    results: Results[Chunk] = Results()
    together = Together(results, 4, per_prompt=2)
    hearers = [together.of(index) for index in range(4)]
    for index in (3, 0, 2, 1):
        hearers[index].say(last((10, 10, 20, 20)[index], 5))
        hearers[index].end(None)
    chunks = list(results)
    assert [(chunk.index, chunk.left) for chunk in chunks] == [(3, 3), (0, 2), (2, 1), (1, 0)]
    assert (chunks[-1].prompt_tokens, chunks[-1].completion_tokens, chunks[-1].reasoning_tokens) == (30, 20, 8)
    assert chunks[-1].timings is None


def test_the_first_failure_ends_the_others() -> None:
    results: Results[Chunk] = Results()
    together = Together(results, 2, per_prompt=2)
    given_up = []
    together.give_up = lambda: given_up.append(True)
    together.of(0).end(EngineFailed("no"))
    assert given_up == [True]
    together.of(1).end(None)
    with pytest.raises(EngineFailed, match="no"):
        list(results)
    assert given_up == [True]


def test_work_of_several_parts_is_freed_as_one() -> None:
    parts = [job([1], 1), job([1], 1)]
    Choices(parts).close()
    assert all(part.sampler.closed for part in parts)
