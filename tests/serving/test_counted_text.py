"""Tokens of thoughts, counted in the text of an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.serving.counted_text import CountedText

PIECES = [b"<t>", b"So", b" ", "☂".encode()[:1], "☂".encode()[1:], b". Then", b"</t>", b"Yes", b"."]


def counted(pieces: list[bytes] = PIECES, stops: tuple[str, ...] = ()) -> CountedText:
    text = CountedText(stops)
    for piece in pieces:
        text.push(piece)
    return text


@pytest.mark.parametrize(
    ("thoughts", "expected"),
    [
        ([], 0),
        (["So ☂. Then"], 5),
        (["☂"], 2),  # both of its tokens
        (["hen", "Yes"], 2),  # a part of a token, and another thought
        (["So", " "], 2),
        (["T", "h"], 1),  # a token counts once
        (["Yes", "So"], 1 + 1),  # the second one is not behind the first: its share of 9 tokens, by 2 of 21 characters
        (["what the text does not have"], 9),
    ],
)
def test_tokens_with_text_of_thoughts_count(thoughts: list[str], expected: int) -> None:
    assert counted().tokens_of(thoughts) == expected


def test_a_thought_may_end_in_the_middle_of_a_character() -> None:
    assert counted(PIECES[:4]).tokens_of(["So \N{REPLACEMENT CHARACTER}"]) == 3


@given(st.text(), st.data())
def test_whatever_the_tokens_are_the_text_is_the_same_and_no_more_tokens_are_counted(
    said: str, data: st.DataObject
) -> None:
    raw, pieces = said.encode(), []
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        pieces.append(raw[:size])
        raw = raw[size:]
    text = CountedText()
    assert "".join(map(text.push, pieces)) + text.finish() == said
    start = data.draw(st.integers(0, len(said)))
    end = data.draw(st.integers(start, len(said)))
    assert text.tokens_of([said]) == len(pieces)
    assert text.tokens_of([said[start:end]]) <= len(pieces)
