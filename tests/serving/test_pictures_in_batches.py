"""Pictures among the prompts of a batcher, over a fake model that must see them whole and in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fake_model import FakeModel, expected, heard, job, submitted
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.serving.batch import next_batch, next_whole
from actors.serving.batcher import Batcher
from actors.serving.beat import Beat, Beats
from actors.serving.fairness import Rotation
from actors.serving.generation import Generation
from actors.serving.model import Row
from actors.serving.pieces import Media, Medium, Piece, Placed
from actors.serving.slots import Slot, Slots
from scheduler.errors import EngineFailed


def seen(*parts: int | str) -> tuple[list[int], Media]:
    """A prompt: numbers are tokens, and every letter is a picture of as many tokens as it stands in the alphabet. That
    of a large letter must be read at once."""
    tokens: list[int] = []
    placed: list[Placed] = []
    for part in parts:
        if isinstance(part, str):
            n_tokens = ord(part.lower()) - 96
            medium = Medium(part.encode(), n_tokens, n_tokens, None, at_once=part.isupper())
            placed.append(Placed(len(tokens), len(tokens) + medium.n_tokens, medium))
            tokens += medium.tokens
        else:
            tokens.append(part)
    return tokens, Media(placed)


class Logged(FakeModel):
    """Says in which order text and pictures are read, and may be disturbed in the midst of them."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.order: list[str] = []
        self.in_piece: Callable[[int], object] = lambda number: None  # is called with how many there were

    def decode(self, rows: Sequence[Row]) -> int:
        self.order.append("text")
        return super().decode(rows)

    def decode_media(self, pieces: Sequence[Piece]) -> int:
        self.order.append("picture")
        code = super().decode_media(pieces)
        self.in_piece(len(self.seen))
        return code


def looking(*parts: int | str, max_tokens: int = 20, **given: Any) -> tuple[Generation, tuple[str, str]]:
    tokens, media = seen(*parts)
    return job(tokens, max_tokens, media=media, **given), expected(tokens, max_tokens)


PART = st.one_of(st.integers(1, 3), st.sampled_from("abdkAD"))


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(PART, max_size=8), min_size=1, max_size=8),
    n_slots=st.integers(1, 3),
    n_ubatch=st.integers(4, 9),  # the large letters fit
    can_cut=st.booleans(),
    shares=st.booleans(),
)
@pytest.mark.slow
def test_every_answer_is_that_of_a_clean_run(
    prompts: list[list[int | str]], n_slots: int, n_ubatch: int, can_cut: bool, shares: bool
) -> None:
    model = FakeModel(n_slots, n_ubatch, can_cut)
    model.shares_cells = shares and can_cut
    batcher = Batcher(model)
    try:
        jobs = [looking(*parts, 3) for parts in prompts]
        for one, _ in jobs:
            batcher.submit(one)
        for one, wanted in jobs:
            chunks = list(one.hearer)
            assert heard(chunks) == wanted
            assert chunks[-1].prompt_tokens == len(seen(*prompts[jobs.index((one, wanted))], 3)[0])
    finally:
        batcher.close()


def test_a_picture_is_not_encoded_again_while_the_slot_knows_it(running: Any) -> None:
    model = FakeModel(n_seq_max=1)
    batcher = running(model)
    first, wanted = looking(1, "d", 2, "e", 3)
    assert heard(list(submitted(batcher, first).hearer)) == wanted
    again, wanted = looking(1, "d", 2, "e", 3)
    chunks = list(submitted(batcher, again).hearer)
    assert heard(chunks) == wanted and chunks[-1].cached_tokens == 1 + 4 + 1 + 5
    other, wanted = looking(1, "d", 2, "f", 3)
    chunks = list(submitted(batcher, other).hearer)
    assert heard(chunks) == wanted and chunks[-1].cached_tokens == 1 + 4 + 1
    assert [medium.n_tokens for medium in model.encoded] == [4, 5, 6]
    assert all(medium.embedding is None for medium in model.encoded)  # they are large


def test_other_answers_go_on_while_a_picture_is_encoded(running: Any) -> None:
    model = FakeModel(n_seq_max=2)
    model.encode_pause.clear()
    batcher = running(model)
    one, wanted = looking(1, "d", 3)
    batcher.submit(one)
    for _ in range(3):
        prompt = [5, 6, 7]
        assert heard(list(submitted(batcher, job(prompt)).hearer)) == expected(prompt, 20)
    assert [each.n_tokens for each in model.encoded] == [4] and one in batcher.jobs()
    model.encode_pause.set()
    assert heard(list(one.hearer)) == wanted and not model.was_left


def test_a_checkpoint_comes_before_a_picture_that_ends_the_prompt(running: Any) -> None:
    batcher = running(FakeModel(n_seq_max=1, can_cut=False))
    for last in (3, 2):
        one, wanted = looking(*[1] * 80, "d", last)
        chunks = list(submitted(batcher, one).hearer)
        assert heard(chunks) == wanted
    assert chunks[-1].cached_tokens == 80


def test_whoever_leaves_during_encoding_frees_the_slot_at_once(running: Any) -> None:
    model = FakeModel(n_seq_max=1)
    model.encode_pause.clear()
    batcher = running(model)
    one, _ = looking(1, "d", 3)
    batcher.submit(one)
    while not model.encoded:
        pass
    batcher.cancel(one)
    assert list(one.hearer) == [] and one.sampler.closed
    assert heard(list(submitted(batcher, job([5, 6])).hearer)) == expected([5, 6], 20)  # the encoder is still busy
    waiting, wanted = looking(2, "e", 3)
    left, _ = looking(2, "f", 3)
    batcher.submit(waiting)
    batcher.submit(left)
    batcher.cancel(left)
    model.encode_pause.set()
    assert heard(list(waiting.hearer)) == wanted
    assert [medium.n_tokens for medium in model.encoded] == [4, 5]
    assert batcher.jobs() == [] and not model.was_left


def test_a_picture_that_cannot_be_encoded_fails_its_request_only(running: Any) -> None:
    model = FakeModel(n_seq_max=2)
    model.blindness = EngineFailed("the projector failed")
    batcher = running(model)
    one, _ = looking(1, "d", 3)
    with pytest.raises(EngineFailed, match="projector"):
        list(submitted(batcher, one).hearer)
    model.blindness = None
    one, wanted = looking(1, "d", 3)
    assert heard(list(submitted(batcher, one).hearer)) == wanted and not batcher.broken


def test_a_picture_that_finds_no_room_waits_for_it(running: Any) -> None:
    model = FakeModel(n_seq_max=2, room=30)
    batcher = running(model)
    idle, _ = looking(9, 9, "h", 9, max_tokens=1)
    list(submitted(batcher, idle).hearer)
    model.codes = [0, 0, 1]  # a part of it is read; then there is no room, until the idle slot is cleared
    one, wanted = looking(1, "t", 3, max_tokens=3)
    assert heard(list(submitted(batcher, one).hearer)) == wanted
    model.codes = [0, 0, -3]
    broken, _ = looking(4, "u", 3)
    with pytest.raises(EngineFailed, match="-3"):
        list(submitted(batcher, broken).hearer)
    one, wanted = looking(4, "u", 3, max_tokens=3)
    assert heard(list(submitted(batcher, one).hearer)) == wanted


def test_tokens_of_others_come_between_the_pieces_of_a_picture(running: Any) -> None:
    model = Logged(n_seq_max=3, n_ubatch=8)
    model.ends_generation = lambda token: False  # type: ignore[method-assign]
    batcher = running(model)
    speaking = submitted(batcher, job([5], 400))
    next(iter(speaking.hearer))
    one, _ = looking(1, "z", 3, max_tokens=1)
    assert heard(list(submitted(batcher, one).hearer))[1] == "length"
    batcher.cancel(speaking)
    pieces = [count for batch in model.seen for _, count in batch]
    assert sum(pieces) == 26 and max(pieces) == 7, "the eighth row is the other's token"
    assert "picture picture" not in " ".join(model.order), "two of its pieces without a token of the other"


def test_pictures_and_texts_share_the_room_by_source() -> None:
    model = FakeModel(n_seq_max=4, n_ubatch=24)
    slots = Slots(model)
    asked = [looking("z", 3, source="ann"), looking("y", 3, source="ann"), (job([1] * 90, source="bob"), ("", ""))]
    slots.waiting += [one for one, _ in asked]
    slots.assign()
    running = [(slot, slot.job) for slot in slots if isinstance(slot.job, Generation)]
    assert not next_batch(running, slots, model).pieces, "nothing is encoded"
    for _, one in running:
        if (placed := one.media.at(0)) is not None:
            placed.medium.embedding = "seen"
    batch = next_batch(running, slots, model)
    assert [len(part.tokens) for part in batch.parts] == [12]
    assert [part.piece.end for part in batch.pieces] == [6, 6]


def test_who_leaves_in_the_midst_of_a_picture_leaves_no_part_of_it(running: Any) -> None:
    for can_cut in (True, False):
        model = Logged(n_seq_max=1, n_ubatch=8, can_cut=can_cut)
        batcher = running(model)
        one, _ = looking(1, 2, "z", 3)
        model.in_piece = lambda number, leaver=one, batcher=batcher: batcher.cancel(leaver) if number == 2 else None
        assert list(submitted(batcher, one).hearer) == []
        assert 0 < sum(count for batch in model.seen for _, count in batch) < 26
        model.in_piece = lambda number: None
        again, wanted = looking(1, 2, "z", 3)
        chunks = list(submitted(batcher, again).hearer)
        assert heard(chunks) == wanted and chunks[-1].cached_tokens == (2 if can_cut else 0)


def test_nobody_begins_with_a_half_of_another_ones_picture(running: Any) -> None:
    model = Logged(n_seq_max=2, n_ubatch=8)
    model.shares_cells = True
    batcher = running(model)
    text = [1 + index % 3 for index in range(40)]
    one, wanted = looking(*text, "z", 3)
    other, _ = looking(*text, "z", 3)
    model.in_piece = lambda number: batcher.submit(other) if number == 2 else None
    assert heard(list(submitted(batcher, one).hearer)) == wanted
    chunks = list(other.hearer)
    assert heard(chunks) == wanted and chunks[-1].cached_tokens == 40


def test_pictures_that_must_be_read_at_once_are_and_sources_take_turns(running: Any) -> None:
    model = Logged(n_seq_max=4, n_ubatch=8)
    batcher = running(model)
    pairs = [looking(1, letter, 3, source=source) for letter, source in zip("HGFE", "aaab", strict=True)]
    for one, _ in pairs:
        batcher.submit(one)
    for one, wanted in pairs:
        assert heard(list(one.hearer)) == wanted
    assert sorted(count for batch in model.seen for _, count in batch) == [5, 6, 7, 8]
    waiting = [(Slot(index), looking("D", 3, source=source)[0]) for index, source in enumerate("aaab")]
    for _, one in waiting:
        if (placed := one.media.at(0)) is not None:
            placed.medium.embedding = "seen"
    sources, order = Rotation[str](), []
    while waiting:
        (part,) = next_whole(waiting, sources)
        order.append(part.job.source)
        waiting.remove((part.slot, part.job))
    assert order == ["a", "b", "a", "a"] and next_whole([], sources) == []


def test_encodings_of_one_source_let_another_wait_for_one(running: Any) -> None:
    model = FakeModel(n_seq_max=6)
    model.encode_pause.clear()
    batcher = running(model)
    pairs = [looking(1, letter, 3, source="ann") for letter in "abcde"] + [looking(2, "f", 3, source="bob")]
    batcher.submit(pairs[0][0])
    while not model.encoded:
        pass
    for one, _ in pairs[1:]:
        batcher.submit(one)
    while len(batcher._encoder._waiting) < 5:
        pass
    left = pairs.pop(2)[0]
    batcher.cancel(left)
    assert list(left.hearer) == []
    model.encode_pause.set()
    for one, wanted in pairs:
        assert heard(list(one.hearer)) == wanted
    assert [medium.n_tokens for medium in model.encoded] == [1, 6, 2, 4, 5] and not model.was_left


def test_the_node_hears_of_every_encoding(running: Any) -> None:
    said: list[str] = []
    model = FakeModel()
    model.encode_pause.clear()
    beats = Beats(encodings=Beat(lambda *_: said.append("busy"), lambda: said.append("idle")))
    batcher = Batcher(model, beats=beats)
    try:
        one, wanted = looking(1, "d", 2, "e", 3)
        batcher.submit(one)
        while not model.encoded:
            pass
        assert said == ["busy"], "an encoding that hangs is overdue some day"
        model.encode_pause.set()
        assert heard(list(one.hearer)) == wanted
        assert said == ["busy", "idle"] * 2
        model.blindness = EngineFailed("the projector failed")
        blind, _ = looking(4, "d", 3)
        with pytest.raises(EngineFailed, match="projector"):
            list(submitted(batcher, blind).hearer)
        assert said == ["busy", "idle"] * 3
    finally:
        batcher.close()


def test_an_answer_that_was_postponed_sees_its_picture_again(running: Any) -> None:
    model = FakeModel(n_seq_max=2, n_ubatch=64, room=40)
    batcher = running(model)
    model.encode_pause.clear()
    pairs = [looking(index, "j", 3, max_tokens=14) for index in (1, 2)]
    for one, _ in pairs:
        batcher.submit(one)
    model.encode_pause.set()
    for one, wanted in pairs:
        assert heard(list(one.hearer)) == wanted


@pytest.mark.parametrize("parts", [[1, "d", 2], ["a", "a", 3], [1]])
def test_places_in_a_prompt(parts: Sequence[int | str]) -> None:
    tokens, media = seen(*parts)
    starts = [at for at in range(len(tokens)) if (placed := media.at(at)) is not None and placed.start == at]
    assert [media.at(at) is not None for at in range(len(tokens))] == [token < 0 for token in tokens]
    assert len(starts) == sum(isinstance(part, str) for part in parts)
    for count in range(len(tokens) + 1):
        whole = media.whole(count)
        assert whole <= count and (whole == count or tokens[whole] < 0)
        end = media.text_end(count, len(tokens))
        assert all(token >= 0 for token in tokens[count:end]) or tokens[count] < 0
        assert media.position(count) == count


def test_positions_of_two_dimensions_grow_by_less_than_the_tokens() -> None:
    medium = Medium(b"x", 40, 8, None)
    media = Media([Placed(2, 42, medium), Placed(45, 85, medium)])
    assert [media.position(count) for count in (0, 2, 42, 45, 85, 90)] == [0, 2, 10, 13, 21, 26]


def test_equal_tokens_are_equal_pictures() -> None:
    assert Medium(b"x", 4, 4, None).tokens == Medium(b"x", 4, 4, None).tokens
    assert set(Medium(b"x", 4, 4, None).tokens).isdisjoint(Medium(b"x", 5, 5, None).tokens)
    assert set(Medium(b"x", 4, 4, None).tokens).isdisjoint(Medium(b"y", 4, 4, None).tokens)
    assert all(token < 0 for token in Medium(b"x", 400, 4, None).tokens)
