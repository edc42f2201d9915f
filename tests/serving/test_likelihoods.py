"""How likely tokens were: those of an answer, and those of a prompt that is judged while it is read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, heard, job, next_token, submitted, talkative
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.serving.batcher import Batcher
from actors.serving.generation import Generation
from actors.serving.likelihood import Told, judged
from actors.serving.protocol import Chunk, Likelihood

LIKELY, OTHER = math.log(4 / (FakeModel.n_vocab + 3)), math.log(1 / (FakeModel.n_vocab + 3))


def likelihoods_of(chunks: list[Chunk]) -> list[Likelihood]:
    return [each for chunk in chunks for each in chunk.likelihoods]


def check(one: Generation, prompt: list[int], chunks: list[Chunk]) -> None:
    told = likelihoods_of(chunks)
    said = [int(word) for word in heard(chunks)[0].split()]
    known = prompt if one.wish.judge_prompt else []
    assert [each.token for each in told] == known + said
    tokens = [] if one.wish.judge_prompt else list(prompt)
    for each in told:
        if not tokens:
            assert each.logprob is None and each.top == ()
        else:
            best = next_token(tokens)
            assert each.logprob == pytest.approx(LIKELY if each.token == best else OTHER, abs=1e-6)
            assert len(each.top) == one.wish.n_probs
            if each.top:
                assert each.top[0][0] == best and each.top[0][2] == pytest.approx(LIKELY, abs=1e-6)
        tokens.append(each.token)


@settings(max_examples=80, deadline=None)
@given(
    wanted=st.lists(
        st.tuples(
            st.lists(st.integers(1, 9), min_size=1, max_size=20),
            st.integers(0, 6),
            st.one_of(st.none(), st.integers(0, 3)),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
    n_slots=st.integers(1, 3),
    room=st.sampled_from([60, 10_000]),
)
@pytest.mark.slow
def test_likelihoods_are_those_of_each_token_whoever_shares_the_batch(
    wanted: list[tuple[list[int], int, int | None, bool]], n_slots: int, room: int
) -> None:
    """Also in a cache so small that answers lose their slots. The fake counts the rows that want logits."""
    batcher = Batcher(FakeModel(n_slots, n_ubatch=6, room=room))
    jobs = [
        (prompt, job(prompt, max_tokens, n_probs=n_probs, judge_prompt=judge and n_probs is not None))
        for prompt, max_tokens, n_probs, judge in wanted
    ]
    for _, one in jobs:
        batcher.submit(one)
    for prompt, one in jobs:
        chunks = list(one.hearer)  # type: ignore[call-overload]
        if one.wish.n_probs is None:
            assert likelihoods_of(chunks) == []
        else:
            check(one, prompt, chunks)
        assert one.wish.max_tokens or chunks[-1].completion_tokens == 0
    batcher.close()


def test_likelihoods_of_tokens_without_text_are_told_one_by_one(running: Any) -> None:
    """All at once, those of 4,000 tokens kept a model's other streams waiting for six seconds."""
    model = FakeModel(1)
    model.piece = lambda token, special=False: b""  # type: ignore[method-assign,misc]
    silent = job(talkative(4, 12), 12, n_probs=1)
    chunks = list(submitted(running(model), silent).hearer)  # type: ignore[call-overload]
    assert [len(chunk.likelihoods) for chunk in chunks] == [1] * 12


def test_a_prompt_that_is_judged_is_read_whole(running: Any) -> None:
    """What a slot remembers has no logits."""
    batcher = running(FakeModel(1))
    prompt = [5, 6, 7, 8]
    for _ in range(2):
        one = submitted(batcher, job(prompt, 0, n_probs=1, judge_prompt=True))
        chunks = list(one.hearer)
        assert chunks[-1].cached_tokens == 0 and chunks[-1].finish_reason == "length"
        check(one, prompt, chunks)


def test_the_figures_are_those_of_a_softmax() -> None:
    logits = np.array([1.0, 3.0, -2.0, 2.5], np.float32)
    true = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    told = judged(logits, 2, 3, lambda token: b"%d" % token)
    assert told.logprob == pytest.approx(true[2]) and told.piece == b"2"
    assert [(token, piece) for token, piece, _ in told.top] == [(1, b"1"), (3, b"3"), (0, b"0")]
    assert [logprob for *_, logprob in told.top] == pytest.approx([true[1], true[3], true[0]])
    assert len(judged(logits, 0, 99, lambda token: b"").top) == 4


def test_a_stop_string_takes_the_likelihoods_of_its_tokens_with_it() -> None:
    told = Told()
    told.add_prompt([Likelihood(9, b"x", None)])
    for token, piece in enumerate((b"ab", b"cd", b"ef")):
        told.add(Likelihood(token, piece, -1.0), len(piece))
    assert [each.token for each in told.take("abc", cut=True)] == [9, 0, 1]
