"""Sets of adapters take turns: nobody is mixed, nobody waits for ever, and a change is not made at every token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import pytest
from fake_model import FakeModel, FakeSampler, expected, heard, submitted
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.serving.adapter_choice import chosen_adapters
from actors.serving.batcher import Batcher
from actors.serving.generation import Generation, Wish
from actors.serving.jobs import Results
from actors.serving.model import Adapters, Row
from actors.serving.protocol import LoadAdapter
from actors.serving.slot import Slot, best_slot
from actors.serving.text import TextStream
from actors.serving.turns import TURN_S, Turns

A, B, C = ((0, 1.0),), ((1, 1.0),), ((0, 0.5), (1, 1.0))


class AdaptedModel(FakeModel):
    """Knows with which adapters each token in its memory was computed, and refuses to mix them."""

    def __init__(self, *args: Any, slow_s: float = 0.0, **given: Any) -> None:
        super().__init__(*args, **given)
        self.computed: list[list[Adapters]] = [[] for _ in range(self.n_seq_max)]
        self.turns: list[Adapters] = []
        self.slow_s = slow_s

    def decode(self, rows: Sequence[Row]) -> int:
        time.sleep(self.slow_s)
        code = super().decode(rows)
        if not code:
            self.turns.append(self.adapters)
            for row in rows:
                del self.computed[row.sequence][row.position :]
                self.computed[row.sequence].append(self.adapters)
                assert set(self.computed[row.sequence]) == {self.adapters}, "a cache of several sets"
        return code

    def copy_prefix(self, source: int, sequence: int, count: int) -> None:
        super().copy_prefix(source, sequence, count)
        self.computed[sequence] = self.computed[source][:count]

    def clear(self, sequence: int) -> None:
        super().clear(sequence)
        self.computed[sequence].clear()


def job(prompt: Sequence[int], max_tokens: int = 20, adapters: Adapters = ()) -> Generation:
    return Generation("r", list(prompt), Results(), FakeSampler(), TextStream(), Wish(max_tokens), adapters=adapters)


def of(source: str, *sets: Adapters) -> list[tuple[str, Adapters]]:
    return [(source, each) for each in sets]


PROMPT = st.lists(st.integers(1, 3), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(st.tuples(PROMPT, st.integers(1, 12), st.sampled_from([(), A, B, C])), min_size=1, max_size=10),
    n_slots=st.integers(1, 4),
    can_cut=st.booleans(),
    shares=st.booleans(),
)
def test_no_batch_and_no_cache_mixes_adapters(
    asked: list[tuple[list[int], int, Adapters]], n_slots: int, can_cut: bool, shares: bool
) -> None:
    model = AdaptedModel(n_slots, 5, can_cut)
    model.shares_cells = shares and can_cut
    batcher = Batcher(model)
    try:
        jobs = [job(*each) for each in asked]
        for one in jobs:
            batcher.submit(one)
        for one, (prompt, max_tokens, _) in zip(jobs, asked, strict=True):
            assert heard(list(one.hearer)) == expected(prompt, max_tokens)
    finally:
        batcher.close()
    assert not batcher.broken


def test_no_set_waits_longer_than_the_turns_of_the_others() -> None:
    turns, now, last = Turns(), 0.0, {A: 0.0, B: 0.0, C: 0.0}
    for _ in range(1000):
        now += 0.01
        turns.take([("", each) for each in last], now)
        last[turns.adapters] = now
        assert min(last.values()) > now - 3 * (TURN_S + 0.02)
    changes = []
    for _ in range(1000):
        now += 0.01
        turns.take([("", each) for each in last], now)
        changes.append(turns.adapters)
    assert 10 / TURN_S - 2 <= len(list(groupby(changes))) <= 10 / TURN_S + 1


MANY = [((0, number / 100),) for number in range(1, 16)]


def served(turns: Turns, wanted: list[tuple[str, Adapters]], n_turns: int) -> list[Adapters]:
    """Whose turns these were, one after the other."""
    seen = []
    for number in range(n_turns):
        turns.take(wanted, 1.0 + number * TURN_S)
        seen.append(turns.adapters)
    return seen


@pytest.mark.parametrize("shared", [(), (B,)])
def test_many_sets_of_one_source_let_another_wait_for_one_turn(shared: tuple[Adapters, ...]) -> None:
    seen = served(Turns(), [*of("ann", *MANY, *shared), *of("bob", B)], 64)
    assert all(B in pair for pair in pairwise(seen))
    assert set(seen) == {*MANY, B}, "its sets take turns among themselves"


def test_one_who_uses_another_set_than_many_gets_half_of_the_time() -> None:
    """They are all served by one turn."""
    seen = served(Turns(), [*((f"user-{number}", ()) for number in range(30)), ("ann", A)], 40)
    assert seen.count(A) == seen.count(()) == 20


def test_a_source_that_is_always_served_with_others_gets_turns_for_its_own_sets() -> None:
    seen = served(Turns(), [*of("ann", (), A), ("bob", ()), *of("cat", (), B), ("dan", C)], 60)
    assert min(map(seen.count, ((), A, B, C))) >= 8


@given(
    wanted=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([(), A, B, C])), min_size=1, unique=True),
    others=st.lists(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from(MANY))), min_size=40, max_size=40),
)
@pytest.mark.slow
def test_every_source_is_served_whoever_comes_and_goes(
    wanted: list[tuple[str, Adapters]], others: list[list[tuple[str, Adapters]]]
) -> None:
    turns, waits = Turns(), dict.fromkeys((source for source, _ in wanted), 0)
    for number, more in enumerate(others):
        turns.take([*wanted, *more], 1.0 + number * TURN_S)
        for source in waits:
            waits[source] = 0 if (source, turns.adapters) in wanted else waits[source] + 1
        assert max(waits.values()) < 7, "there are seven sources"


def test_new_sets_do_not_pass_those_that_wait() -> None:
    turns = Turns()
    turns.take(of("ann", A, B), 1.0)
    others = [((5, number / 100),) for number in range(1, 50)]
    seen = []
    for number, other in enumerate(others):  # each comes for one turn only
        turns.take(of("ann", A, B, other), 1.0 + number * TURN_S)
        seen.append(turns.adapters)
    assert seen.count(A) > 10 and seen.count(B) > 10


def test_a_turn_ends_at_once_when_nobody_uses_its_set_any_more() -> None:
    turns = Turns()
    assert turns.take(of("ann", A), 1.0) is None and turns.adapters == A
    assert turns.take(of("ann", A, B), 1.1) == pytest.approx(TURN_S - 0.1) and turns.adapters == A
    assert turns.take(of("ann", B), 1.11) is None and turns.adapters == B
    assert turns.take([], 1.12) is None and turns.adapters == B
    assert turns.take(of("ann", ()), 1.13) is None and turns.adapters == ()


@pytest.mark.slow
def test_long_answers_with_other_adapters_go_on_by_turns() -> None:
    model = AdaptedModel(2, slow_s=0.01)
    model.ends_generation = lambda token: False  # type: ignore[method-assign]
    batcher = Batcher(model)
    try:
        jobs = [submitted(batcher, job([1], 100, adapters)) for adapters in (A, B)]
        for one in jobs:
            assert len(heard(list(one.hearer))[0].split()) == 100
    finally:
        batcher.close()
    turns = [len(list(group)) for _, group in groupby(model.turns)]
    assert 4 <= len(turns) <= 12 and sum(turns) == 200


def test_a_slot_s_tokens_help_its_own_adapters_only() -> None:
    slots = [Slot(0, [1, 2, 3], adapters=A), Slot(1, [1, 2], last_used=1), Slot(2, [1, 2, 3], adapters=B, last_used=2)]
    for adapters, wanted in ((A, slots[0]), ((), slots[1]), (B, slots[2]), (C, slots[0])):
        assert best_slot(slots, [1, 2, 3, 4], adapters) is wanted


def test_a_new_chat_does_not_take_the_slot_of_a_long_one() -> None:
    """All chats begin with the same tokens."""
    long, new = Slot(0, [1, 2, *range(10, 100)], last_used=5), Slot(1)
    assert best_slot([long, new], [1, 2, 3]) is new
    assert best_slot([long, new], [*long.tokens, 7]) is long
    assert best_slot([long, new], [*long.tokens[:-30], 7]) is long, "its last answer is left out"
    emptied = Slot(1, last_used=9)
    assert best_slot([long, emptied], [1, 2, 3]) is emptied
    used = Slot(1, [1, 2, 8, 9, 9, 9], last_used=7)
    assert best_slot([long, used], [1, 2, 3]) is long, "it was idle longest"
    assert best_slot([long, used], [1, 2, 8, 9, 3]) is used


def test_what_a_request_asks_for() -> None:
    known = [LoadAdapter("fun", "f", 0.0), LoadAdapter("terse", "t", 0.5)]
    assert chosen_adapters("m", known, None) == chosen_adapters("m", known, ()) == ((1, 0.5),)
    assert chosen_adapters("m", known, (("terse", 0.25), (0, 1.0))) == ((0, 1.0), (1, 0.25))
    assert chosen_adapters("m", known, ((1, 0.0),)) == chosen_adapters("m", [], None) == ()
