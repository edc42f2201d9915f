"""Who goes next, and who gets how much: sources count, however much each of them asks for."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fake_model import FakeModel, expected, heard, job, submitted
from hypothesis import given
from hypothesis import strategies as st

from actors.serving.batch import next_batch
from actors.serving.fairness import Rotation, shares
from actors.serving.slots import Slots

WANTED = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=12)


@given(wanted=WANTED, room=st.integers(0, 100))
def test_a_source_gets_an_even_part_or_all_that_it_needs(wanted: list[tuple[str, int]], room: int) -> None:
    given = shares(wanted, room)
    needs, got = defaultdict[str, int](int), defaultdict[str, int](int)
    for (source, need), count in zip(wanted, given, strict=True):
        assert 0 <= count <= need
        needs[source] += need
        got[source] += count
    assert sum(given) == min(room, sum(needs.values())), "nothing is left over"
    for source, count in got.items():
        assert count == needs[source] or count >= max(got.values()) - 1


@given(first=st.integers(0, 40), others=st.lists(st.integers(0, 40), max_size=8), room=st.integers(1, 100))
def test_who_asks_more_often_gets_no_more(first: int, others: list[int], room: int) -> None:
    alone, *_ = shares([("ann", first), *[("bob", need) for need in others]], room)
    assert alone >= min(first, room // 2)


def test_prompts_of_one_source_share_what_a_single_one_has() -> None:
    assert shares([("ann", 90), ("ann", 90), ("ann", 90), ("bob", 90)], 60) == [10, 10, 10, 30]
    assert shares([("ann", 5), ("ann", 90), ("bob", 7)], 60) == [5, 48, 7]
    assert shares([("ann", 9)] * 9, 4).count(1) == 4


def test_who_was_served_longest_ago_goes_next() -> None:
    sources = Rotation[str]()
    served = []
    for _ in range(9):
        sources.keep("abc")
        served.append(min("abc", key=sources.place))
        sources.serve([served[-1]])
    assert "".join(served) == "abcabcabc"


def test_who_comes_new_or_comes_back_stands_behind_those_who_wait() -> None:
    sources = Rotation[str]()
    sources.keep("ab")
    sources.serve("a")
    sources.keep("bac")
    assert sorted("abc", key=sources.place) == ["b", "a", "c"]
    sources.serve("a")
    sources.keep("bc")  # a leaves
    sources.keep("abc")  # and comes back
    assert sorted("abc", key=sources.place) == ["b", "c", "a"]


def test_long_prompts_of_one_source_take_half_of_a_batch() -> None:
    model = FakeModel(n_seq_max=6, n_ubatch=40)
    slots = Slots(model)
    slots.waiting += [*(job([1] * 90, source="ann") for _ in range(4)), job([2] * 70, source="bob")]
    slots.assign()
    running = [(slot, slot.job) for slot in slots if slot.job is not None]
    batch = next_batch(running, slots, model)  # type: ignore[arg-type]
    assert sorted(len(part.tokens) for part in batch.parts) == [5, 5, 5, 5, 20]
    assert [len(part.tokens) for part in batch.parts if part.job.source == "bob"] == [20]


def test_all_prompts_are_read_to_their_ends(running: Any) -> None:
    batcher = running(FakeModel(n_seq_max=5, n_ubatch=7))
    asked = [([1 + index] * (10 * index + 3), source) for index, source in enumerate("aaabb")]
    jobs = [submitted(batcher, job(prompt, 3, source=source)) for prompt, source in asked]
    for one, (prompt, _) in zip(jobs, asked, strict=True):
        assert heard(list(one.hearer)) == expected(prompt, 3)
