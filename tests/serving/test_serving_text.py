"""Text streams: whatever the tokens are, what is shown is the text up to the first stop string."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from actors.serving.text import TextStream

TEXT = st.text(alphabet="abcé€🦙 ", max_size=30)


def pieces_of(raw: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(raw) + 1) for cut in cuts), len(raw)]
    return [raw[start:end] for start, end in pairwise(edges)]


@given(TEXT, st.lists(st.integers(0, 200), max_size=20), st.lists(st.text("abcé€", min_size=1, max_size=4), max_size=3))
def test_shows_the_text_up_to_the_first_stop(text: str, cuts: list[int], stops: list[str]) -> None:
    stream = TextStream(stops)
    shown = ""
    for piece in pieces_of(text.encode(), cuts):
        shown += stream.push(piece)
        assert not any(stop in shown for stop in stops)
    shown += stream.finish()
    found = [text.find(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(found)
    # A stop string that completes first may begin later than one that would have completed after it.
    assert text.startswith(shown)
    assert shown == text if not found else len(shown) >= min(found)
    assert not any(stop in shown for stop in stops)


def test_a_character_in_two_tokens_waits_for_the_second() -> None:
    stream = TextStream()
    llama = "🦙".encode()
    assert stream.push(b"a" + llama[:2]) == "a"
    assert stream.push(llama[2:]) == "🦙"


def test_half_a_character_at_the_end_is_a_replacement() -> None:
    stream = TextStream()
    assert stream.push("é".encode()[:1]) == ""
    assert stream.finish() == "�"


def test_the_start_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    stream = TextStream(["</end>"])
    assert stream.push(b"salt </e") == "salt "
    assert stream.push(b"x") == "</ex"
    assert stream.push(b" wool </end> more") == " wool "
    assert stream.stopped
    assert stream.push(b"nothing") == stream.finish() == ""


def test_it_says_which_stop_string_it_was() -> None:
    for pieces, stops, others, stopped_by in (
        (["ab", "cd"], ["bc", "abc"], [], "abc"),
        (["ab", "cd"], ["zz"], ["bc"], ""),
        (["ab"], ["bc"], [], ""),
    ):
        stream = TextStream(stops, others)
        for piece in pieces:
            stream.push(piece.encode())
        stream.finish()
        assert stream.stopped_by == stopped_by
