"""Where thoughts begin and end in a text, and what ends them after their budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.serving.thoughts import ThinkingBudget, Thoughts

CLOSING = [70, 71]


def thoughts(begun: str = "") -> Thoughts:
    return Thoughts("<think>", ["</think>", "<|end|>"], begun)


@given(
    st.lists(st.sampled_from([b"<think>", b"</think>", b"<|end|>", b"a", b"<", b">", b"think"]), max_size=12), st.data()
)
def test_token_borders_do_not_matter(pieces: list[bytes], data: st.DataObject) -> None:
    text = b"".join(pieces)
    whole = thoughts()
    whole.look(text)
    cut = thoughts()
    while text:
        size = data.draw(st.integers(1, len(text)))
        cut.look(text[:size])
        text = text[size:]
    assert cut.thinks == whole.thinks


def forced(budget: ThinkingBudget) -> list[int]:
    taken = list(budget.forced)
    budget.forced.clear()
    return taken


@pytest.mark.parametrize("n_tokens", [0, 1, 3])
def test_thoughts_end_after_their_budget(n_tokens: int) -> None:
    budget = ThinkingBudget(thoughts("<think>"), n_tokens, CLOSING)
    for _ in range(n_tokens):
        assert not forced(budget)
        budget.take(b"hm", is_whole=True)
    assert forced(budget) == CLOSING
    budget.take(b"</think>", is_whole=True)
    budget.take(b"The answer.", is_whole=True)
    assert not forced(budget)


def test_a_thought_is_not_cut_in_the_middle_of_a_character() -> None:
    budget = ThinkingBudget(thoughts("<think>"), 1, CLOSING)
    budget.take("é".encode()[:1], is_whole=False)
    assert not forced(budget)
    budget.take("é".encode()[1:], is_whole=True)
    assert forced(budget) == CLOSING


def test_what_is_no_thought_is_not_limited() -> None:
    budget = ThinkingBudget(thoughts(), 1, CLOSING)
    for _ in range(5):
        budget.take(b"word", is_whole=True)
    assert not forced(budget)


def test_thousands_of_thoughts_are_no_deep_matter() -> None:
    assert not thoughts("<think></think>" * 5000).thinks
    assert thoughts("<think></think>" * 5000 + "<think>").thinks
