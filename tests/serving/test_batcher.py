"""The batcher over a fake model whose answers depend on every token that the cache holds."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, PooledModel, expected, heard, job, submitted, talkative
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import wait_until

from actors.devices.cores import Cores
from actors.serving.batcher import Batcher
from actors.serving.beat import Beat, Beats
from actors.serving.jobs import Embedding, Results
from actors.serving.model import Row
from actors.serving.protocol import LoadFailed
from actors.serving.slots import MOST_PASSED, Slots
from scheduler.errors import EngineFailed


def test_a_model_that_cannot_compute_makes_no_batcher() -> None:
    model = FakeModel()
    model.fault = LoadFailed("failed", "the first decode failed")
    with pytest.raises(LoadFailed, match="first decode"):
        Batcher(model)


PROMPT = st.lists(st.integers(1, 3), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.tuples(PROMPT, st.integers(1, 12)), min_size=1, max_size=10),
    n_slots=st.integers(1, 4),
    n_ubatch=st.integers(1, 9),
    can_cut=st.booleans(),
)
def test_every_answer_is_that_of_a_clean_run(
    prompts: list[tuple[list[int], int]], n_slots: int, n_ubatch: int, can_cut: bool
) -> None:
    model = FakeModel(n_slots, n_ubatch, can_cut)
    batcher = Batcher(model)
    try:
        jobs = [job(prompt, max_tokens) for prompt, max_tokens in prompts]
        for one in jobs:
            batcher.submit(one)
        for one, (prompt, max_tokens) in zip(jobs, prompts, strict=True):
            chunks = list(one.hearer)
            assert heard(chunks) == expected(prompt, max_tokens)
            last = chunks[-1]
            assert last.prompt_tokens == len(prompt)
            assert last.cached_tokens < len(prompt)
            assert last.completion_tokens == len(heard(chunks)[0].split())
            assert one.sampler.closed
        wait_until(lambda: not batcher.jobs())  # a job's end is heard before its slot is free
    finally:
        batcher.close()


def test_a_longer_chat_decodes_only_what_is_new(running: Any) -> None:
    model = FakeModel(n_seq_max=2, n_ubatch=100)
    batcher = running(model)
    first = list(range(1, 30))
    for prompt, cached in ((first, 0), ([5] * 20, 0), ([*first, 1, 2, 3], len(first)), ([*first, 4], len(first))):
        one = job(prompt, 1)
        batcher.submit(one)
        assert list(one.hearer)[-1].cached_tokens == cached
    assert [len(batch) for batch in model.batches] == [29, 20, 3, 1]


def test_a_memory_that_cannot_be_cut_starts_clean(running: Any) -> None:
    batcher = running(FakeModel(n_seq_max=1, can_cut=False))
    for prompt, cached in (([1, 2, 3, 4], 0), ([1, 2, 3, 4, 9], 4), ([1, 2, 8], 0)):
        one = job(prompt, 1)
        batcher.submit(one)
        assert list(one.hearer)[-1].cached_tokens == cached


def test_waiting_jobs_are_served_in_order(running: Any) -> None:
    model = FakeModel(n_seq_max=1)
    model.pause = threading.Event()
    batcher = running(model)
    jobs = [job([index + 1], 1, name=str(index)) for index in range(5)]
    for one in jobs:
        batcher.submit(one)
    assert [one.lease_id for one in batcher.jobs()] == ["0", "1", "2", "3", "4"]
    model.pause.set()
    for one in jobs:
        list(one.hearer)
    assert [batch[0].token for batch in model.batches] == [1, 2, 3, 4, 5]


def test_a_long_prompt_does_not_hold_up_another_answer(running: Any) -> None:
    model = FakeModel(n_seq_max=2, n_ubatch=4)
    model.pause = threading.Event()
    batcher = running(model)
    short, long = job([3], 12), job([2] * 40, 1)
    batcher.submit(short)
    batcher.submit(long)
    model.pause.set()
    list(short.hearer)
    list(long.hearer)
    while_reading = [batch for batch in model.batches if any(row.sequence == 1 for row in batch)]
    assert all(len(batch) <= 4 for batch in while_reading)
    assert sum(row.sequence == 0 for batch in while_reading for row in batch) >= 2


def test_cancelling_in_the_middle_of_a_decode_aborts_it_and_frees_the_slot(running: Any) -> None:
    model = FakeModel(n_seq_max=1)
    model.pause = threading.Event()
    batcher = running(model)
    doomed, next_one = job([1] * 30, 5), job([2, 2], 3)
    batcher.submit(doomed)
    batcher.submit(next_one)
    assert model.entered.wait(10)
    batcher.cancel(doomed)
    assert list(doomed.hearer) == []
    model.pause.set()
    assert heard(list(next_one.hearer)) == expected([2, 2], 3)
    assert doomed.sampler.closed


@pytest.mark.parametrize("can_cut", [True, False], ids=["cells", "states"])
def test_who_leaves_in_the_middle_of_a_prompt_leaves_what_was_known(running: Any, can_cut: bool) -> None:
    """Another client may have read it. A state that a batch may have changed is of no use."""
    model = FakeModel(n_seq_max=1, can_cut=can_cut)
    batcher = running(model)
    known = [3] * 40
    batcher.submit(first := job(known, 1))
    list(first.hearer)
    model.entered.clear()
    model.pause = threading.Event()
    batcher.submit(doomed := job([*known, *[1] * 30], 5))
    assert model.entered.wait(10)
    batcher.cancel(doomed)
    assert list(doomed.hearer) == []
    model.pause.set()
    batcher.submit(again := job([*known, 2, 2], 3))
    chunks = list(again.hearer)
    assert heard(chunks) == expected([*known, 2, 2], 3)
    assert chunks[-1].cached_tokens == (40 if can_cut else 0)


def test_cancelling_one_does_not_abort_another_in_the_same_batch(running: Any) -> None:
    model = FakeModel(n_seq_max=2)
    model.pause = threading.Event()
    batcher = running(model)
    blocker = job([9], 1)  # holds the thread until both others wait, so that they share a batch
    batcher.submit(blocker)
    assert model.entered.wait(10)
    kept, dropped = job([2, 2], 6), job([3, 3], 6)
    batcher.submit(kept)
    batcher.submit(dropped)
    batcher.cancel(dropped)
    model.pause.set()
    assert heard(list(kept.hearer)) == expected([2, 2], 6)
    assert list(dropped.hearer) == []


class SlowConstraint:
    """Chooses until it may `go` on, or is interrupted."""

    def __init__(self) -> None:
        self.began, self.go, self.interrupted = threading.Event(), threading.Event(), False

    def choose(self, pick: Any) -> int:
        self.began.set()
        self.go.wait()
        if self.interrupted:
            raise EngineFailed("interrupted")
        token: int = pick(None)
        return token

    def interrupt(self) -> None:
        self.interrupted = True
        self.go.set()

    def close(self) -> None: ...


def test_who_leaves_while_its_prompt_is_read_never_begins_to_choose(running: Any) -> None:
    model = FakeModel(n_seq_max=3)
    model.pause = threading.Event()
    batcher = running(model)
    blocker = submitted(batcher, job([9], 1))  # until both others wait, so that they start together
    assert model.entered.wait(10)
    constraint = SlowConstraint()
    other = submitted(batcher, job([1, 2], 3, "other"))
    left = submitted(batcher, job([3, 4], 20, "left", constraint=constraint))
    decode = model.decode

    def meanwhile(rows: Sequence[Row]) -> int:
        code = decode(rows)
        batcher.cancel(left)
        return code

    model.decode = meanwhile  # type: ignore[method-assign]
    model.pause.set()
    assert list(left.hearer) == []
    assert not constraint.began.is_set()
    for each in (blocker, other):
        assert list(each.hearer)


def test_a_failed_decode_fails_its_requests_and_the_next_one_works(running: Any) -> None:
    model = FakeModel(n_seq_max=1)
    model.codes = [-3]
    batcher = running(model)
    unlucky = job([1, 2])
    batcher.submit(unlucky)
    with pytest.raises(EngineFailed, match="returned -3"):
        list(unlucky.hearer)
    lucky = job([1, 2])
    batcher.submit(lucky)
    assert heard(list(lucky.hearer)) == expected([1, 2], 20)
    assert batcher.broken == ""


def test_two_failures_in_a_row_break_the_engine(running: Any) -> None:
    model = FakeModel(n_seq_max=1)
    model.codes = [-3, -2]
    batcher = running(model)
    for prompt in ([1], [2]):
        unlucky = job(prompt)
        batcher.submit(unlucky)
        with pytest.raises(EngineFailed):
            list(unlucky.hearer)
    batcher.close()
    assert "returned -2" in batcher.broken
    with pytest.raises(EngineFailed, match="two decodes"):
        batcher.submit(job([3]))


def test_a_bug_ends_every_request_with_the_reason(running: Any) -> None:
    model = FakeModel(n_seq_max=1)
    model.piece = lambda token, special: 1 // 0  # type: ignore[method-assign, assignment]
    model.pause = threading.Event()
    batcher = running(model)
    jobs = [job([1, 2]), job([3])]
    for one in jobs:
        batcher.submit(one)
    model.pause.set()
    for one in jobs:
        with pytest.raises(EngineFailed, match="ZeroDivisionError"):
            list(one.hearer)


def test_a_full_shared_cache_forgets_the_idle_first(running: Any) -> None:
    batcher = running(FakeModel(n_seq_max=2, n_ubatch=64, room=40))
    for prompt in ([1] * 18, [2] * 30):  # 48 tokens in all
        one = job(prompt, 1)
        batcher.submit(one)
        assert heard(list(one.hearer)) == expected(prompt, 1)


def test_in_a_full_shared_cache_the_youngest_answer_waits(running: Any) -> None:
    model = FakeModel(n_seq_max=3, n_ubatch=64, room=40)
    model.pause = threading.Event()
    batcher = running(model)
    blocker = job([9], 1)  # holds the thread until both others wait, so that they start together
    batcher.submit(blocker)
    assert model.entered.wait(10)
    prompts = talkative(20, 12), talkative(15, 12, of=3)
    jobs = [submitted(batcher, job(prompt, 12)) for prompt in prompts]
    model.pause.set()
    for one, prompt in zip(jobs, prompts, strict=True):
        chunks = list(one.hearer)
        assert heard(chunks) == expected(prompt, 12)
        assert (chunks[-1].prompt_tokens, chunks[-1].completion_tokens) == (len(prompt), 12)
    assert sum(map(len, model.batches)) > 1 + 20 + 11 + 15 + 11, "one of the two was read again"


def test_an_answer_that_fills_the_cache_alone_ends_there(running: Any) -> None:
    prompt = talkative(20, 30)
    alone = submitted(running(FakeModel(n_seq_max=3, n_ubatch=64, room=40)), job(prompt, 30))
    said, ending = heard(list(alone.hearer))
    assert ending == "length" and len(said.split()) == 21  # the last one is not decoded any more


def test_a_prompt_waits_until_the_shared_cache_has_room_for_it(running: Any) -> None:
    model = FakeModel(n_seq_max=3, n_ubatch=64, room=40)
    model.pause = threading.Event()
    batcher = running(model)
    first = submitted(batcher, job(talkative(25, 5), 5))
    assert model.entered.wait(10)
    second = submitted(batcher, job(talkative(20, 5), 5))
    model.pause.set()
    assert heard(list(first.hearer)) == expected(talkative(25, 5), 5)
    assert heard(list(second.hearer)) == expected(talkative(20, 5), 5)
    assert not any({row.sequence for row in batch} == {0, 1} for batch in model.batches)


def test_who_needs_little_passes_who_needs_the_whole_cache_but_not_for_ever() -> None:
    slots = Slots(FakeModel(n_seq_max=2, room=100))
    small = [job([1] * 5, name=f"small-{number}") for number in range(20)]
    slots.waiting += [job([1] * 20, name="running"), job([1] * 95, name="large"), *small]
    slots.assign()
    served = []
    while "large" not in served:  # those who need little leave one by one, at last nobody is left to wait for
        inside = [slot for slot in slots if slot.job is not None]
        served += [slot.job.lease_id for slot in inside if slot.job is not None and slot.job.lease_id not in served]
        slots.release(inside[-1])
        slots.assign()
    assert served == ["running", *(f"small-{number}" for number in range(MOST_PASSED)), "large"]


def test_whoever_waits_for_room_that_its_own_answers_hold_keeps_no_other_waiting() -> None:
    slots = Slots(FakeModel(n_seq_max=3, room=100))
    ann = [job([1] * 20, name="ann-long", source="ann"), job([2] * 95, name="ann-large", source="ann")]
    slots.waiting += [*ann, *(job([3] * 5, name=f"bob-{number}", source="bob") for number in range(3 * MOST_PASSED))]
    slots.waiting.append(job([4] * 5, name="ann-small", source="ann"))
    served = []
    for _ in range(40):
        slots.assign()
        inside = [slot for slot in slots if slot.job is not None and slot.job.lease_id != "ann-long"]
        served += [slot.job.lease_id for slot in inside if slot.job is not None]
        for slot in inside:
            slots.release(slot)
    assert served == [f"bob-{number}" for number in range(3 * MOST_PASSED)]
    slots.release(next(slot for slot in slots if slot.job is not None))
    slots.assign()
    assert [slot.job.lease_id for slot in slots if slot.job is not None] == ["ann-large"]


def test_a_source_with_many_answers_makes_room_for_another() -> None:
    """Whoever waits in vain for room of its own keeps nobody waiting that holds less."""
    slots = Slots(FakeModel(n_seq_max=8, room=100))
    slots.waiting += [job([1] * 24, name=f"ann-{number}", source="ann") for number in range(5)]
    slots.assign()
    assert running_of(slots) == ["ann-0", "ann-1", "ann-2", "ann-3"]
    slots.waiting[0].passed = MOST_PASSED
    slots.waiting.append(job([2] * 10, name="bob", source="bob"))
    slots.assign()
    assert running_of(slots) == ["ann-0", "ann-1", "ann-2", "bob"]
    slots.waiting.append(job([3] * 80, name="greedy-bob", source="bob"))
    slots.assign()
    assert "greedy-bob" not in running_of(slots), "he would hold more than ann"


def test_sources_do_not_drive_each_other_out() -> None:
    """Whoever gave way waits until somebody has ended."""
    slots = Slots(FakeModel(n_seq_max=4, room=100))
    for name in ("ann", "bob"):
        slots.waiting += [job([1] * 24, name=f"{name}-{number}", source=name) for number in range(2)]
    slots.assign()
    assert len(running_of(slots)) == 4
    for slot in slots:
        slot.tokens += [1] * 24
    assert slots.postpone_one()
    left = running_of(slots)
    for _ in range(10):
        slots.assign()
    assert running_of(slots) == left


def test_nobody_gives_way_where_that_would_not_be_enough() -> None:
    slots = Slots(FakeModel(n_seq_max=4, room=100))
    slots.waiting += [
        job([1] * 60, name="long", source="cat"),
        *(job([1] * 15, name="ann", source="ann") for _ in "12"),
    ]
    slots.assign()
    slots.waiting.append(job([2] * 28, name="bob", source="bob"))
    slots.assign()
    assert running_of(slots) == ["ann", "ann", "long"]


def test_who_embeds_long_texts_makes_room_between_two_of_them(running: Any) -> None:
    model = FakeModel(2, n_ubatch=64, room=40)
    model.pause = threading.Event()
    batcher = running(model)
    many = Embedding("ann", [[3] * 38] * 10, Results(), 4, "ann")
    batcher.submit(many)
    assert model.entered.wait(10)
    other = submitted(batcher, job(talkative(4, 6), 6, source="bob"))
    model.pause.set()
    assert heard(list(other.hearer)) == expected(talkative(4, 6), 6)
    assert len(list(many.hearer)) == 10
    first = next(turn for turn, rows in enumerate(model.batches) if rows[0].token != 3)
    assert first <= 2, "after the text that was under way"


def test_an_answer_that_is_its_sources_only_one_keeps_its_slot() -> None:
    slots = Slots(FakeModel(n_seq_max=4, room=100))
    slots.waiting += [job([1] * 95, name="ann", source="ann"), job([2] * 10, name="bob", source="bob")]
    slots.assign()
    assert running_of(slots) == ["ann"]


def running_of(slots: Slots) -> list[str]:
    return sorted(slot.job.lease_id for slot in slots if slot.job is not None)


@pytest.mark.parametrize("model", [FakeModel(2, n_ubatch=4), PooledModel(2, n_ubatch=4)])
def test_who_embeds_many_texts_takes_turns_with_others(running: Any, model: FakeModel) -> None:
    model.pause = threading.Event()
    batcher = running(model)
    many, one = Embedding("ann", [[3, 4, 5, 4]] * 20, Results(), 4), Embedding("bob", [[5, 5, 5]], Results(), 4)
    batcher.submit(many)
    assert model.entered.wait(10)
    batcher.submit(one)
    model.pause.set()
    assert len(list(one.hearer)) == 1
    assert len(list(many.hearer)) == 20
    (turn,) = [turn for turn, rows in enumerate(model.batches) if rows[0].token == 5]
    assert turn <= 3, "after the text that was under way"


def test_one_source_chooses_on_no_more_threads_than_there_are_cores(running: Any) -> None:
    cores = len(os.sched_getaffinity(0))
    batcher = running(FakeModel(n_seq_max=cores + 3))
    slow = [SlowConstraint() for _ in range(cores + 2)]
    for constraint in slow:
        submitted(batcher, job([1, 2], 1, source="ann", constraint=constraint))
    for constraint in slow[:cores]:
        assert constraint.began.wait(10)
    other = SlowConstraint()
    other.go.set()
    assert list(submitted(batcher, job([3, 4], 1, source="bob", constraint=other)).hearer), "bob does not wait"
    assert sum(constraint.began.is_set() for constraint in slow) == cores
    for constraint in slow:
        constraint.go.set()


def test_an_answer_whose_token_is_chosen_gives_way_like_any_other(running: Any) -> None:
    """It takes its token without a slot, and is continued with it."""
    batcher = running(FakeModel(2, room=60))
    constraint = SlowConstraint()
    long, short = talkative(40, at_least=12), talkative(2, at_least=40)
    slow = submitted(batcher, job(long, 12, name="ann", source="ann", constraint=constraint))
    assert constraint.began.wait(10)
    other = submitted(batcher, job(short, 40, name="bob", source="bob"))
    assert heard(list(other.hearer)) == expected(short, 40)
    constraint.go.set()
    assert heard(list(slow.hearer)) == expected(long, 12)


def test_in_a_full_cache_the_source_that_holds_most_of_it_gives_way(running: Any) -> None:
    model = FakeModel(n_seq_max=4, n_ubatch=64, room=60)
    model.pause = threading.Event()
    batcher = running(model)
    blocker = submitted(batcher, job([9], 1))
    assert model.entered.wait(10)
    greedy = [submitted(batcher, job(talkative(22, 12, of), 12, source="bob")) for of in (1, 2)]
    modest = submitted(batcher, job(talkative(4, 12, of=3), 12, source="ann"))  # the youngest
    model.pause.set()
    for each in (blocker, modest, *greedy):
        assert list(each.hearer)[-1].completion_tokens == (1 if each is blocker else 12)
    begun = [token for rows in model.batches for token, position, _, _ in rows if position == 0]
    assert begun.count(3) == 1 and len(begun) > 4, "only one of bob's was read again"


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.tuples(PROMPT, st.integers(1, 12)), min_size=1, max_size=8),
    n_slots=st.integers(1, 4),
    room=st.integers(33, 60),
)
def test_nobodys_answer_is_cut_in_a_small_shared_cache(
    prompts: list[tuple[list[int], int]], n_slots: int, room: int
) -> None:
    batcher = Batcher(FakeModel(n_slots, 16, room=room))
    try:
        jobs = [submitted(batcher, job(prompt, max_tokens)) for prompt, max_tokens in prompts]
        for one, (prompt, max_tokens) in zip(jobs, prompts, strict=True):
            assert heard(list(one.hearer)) == expected(prompt, max_tokens)
    finally:
        batcher.close()


def test_cores_are_divided_among_those_that_decode(tmp_path: Path) -> None:
    """Two replicas on a node of five cores: each has all of them, but for what the other takes while it computes."""
    models = FakeModel(n_seq_max=1), FakeModel(n_seq_max=1)
    batchers = [Batcher(model, cores=Cores.on_node("box", 5, folder=tmp_path / "node")) for model in models]
    try:
        list(submitted(batchers[0], job([1], 1)).hearer)
        assert models[0].threads == 5
        models[0].pause = threading.Event()
        models[0].entered.clear()
        long = submitted(batchers[0], job([1], 20))
        assert models[0].entered.wait(20) and models[0].threads == 5, "the other one is idle"
        list(submitted(batchers[1], job([1], 1)).hearer)
        assert models[1].threads == 2
        models[0].pause.set()
        list(long.hearer)
        list(submitted(batchers[1], job([2], 1)).hearer)
        assert models[1].threads == 5
    finally:
        for batcher in batchers:
            batcher.close()


def test_closing_fails_what_is_under_way(running: Any) -> None:
    model = FakeModel(n_seq_max=1)
    model.pause = threading.Event()
    batcher = running(model)
    jobs = [job([1]), job([2])]
    for one in jobs:
        batcher.submit(one)
    assert model.entered.wait(10)
    batcher.close()
    for one in jobs:
        with pytest.raises(EngineFailed, match="being stopped"):
            list(one.hearer)
    with pytest.raises(EngineFailed, match="being stopped"):
        batcher.submit(job([3]))


def test_embeddings_are_means_of_length_one_and_leave_no_trace(running: Any) -> None:
    model = FakeModel(n_seq_max=1, n_ubatch=4)
    batcher = running(model)
    text = Embedding("e", [[3, 4, 5, 4, 3, 5, 4, 4, 4]], Results(), 4)
    batcher.submit(text)
    ((vector, *_),) = text.hearer
    assert vector == pytest.approx([4 / 17**0.5, 1 / 17**0.5, 0, 0])
    assert model.memory == [[]]
    one = job([3, 4], 4)
    batcher.submit(one)
    assert heard(list(one.hearer)) == expected([3, 4], 4)


TEXT = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.lists(TEXT, min_size=1, max_size=6), min_size=1, max_size=4),
    n_slots=st.integers(1, 4),
    answers=st.integers(0, 2),
)
def test_texts_share_batches_and_every_vector_is_that_of_its_text(
    requests: list[list[list[int]]], n_slots: int, answers: int
) -> None:
    model = PooledModel(n_slots, n_ubatch=10)
    batcher = Batcher(model)
    try:
        jobs = [Embedding(f"e{number}", texts, Results(), 4) for number, texts in enumerate(requests)]
        written = [submitted(batcher, job([1, 2, 3], 5)) for _ in range(answers)]
        for one in jobs:
            batcher.submit(one)
        for one, texts in zip(jobs, requests, strict=True):
            vectors = list(one.hearer)
            assert [(v.prompt_tokens, v.left) for v in vectors] == [
                (len(text), len(texts) - place - 1) for place, text in enumerate(texts)
            ]
            for embedded, text in zip(vectors, texts, strict=True):
                assert embedded.vector[0] / embedded.vector[1] == pytest.approx(sum(text))
        for answer in written:
            assert heard(list(answer.hearer)) == expected([1, 2, 3], 5)
    finally:
        batcher.close()
    if n_slots == 4 and len(requests) == 1 and not answers and sum(map(len, requests[0])) <= 10:
        assert len(model.batches) == -(-len(requests[0]) // 4), "free sequences help"


def test_the_node_hears_of_every_decode_before_it_begins_and_when_it_is_over() -> None:
    said: list[str] = []
    model = FakeModel()
    model.pause = threading.Event()
    batcher = Batcher(model, beats=Beats(Beat(lambda *_: said.append("busy"), lambda: said.append("idle"))))
    try:
        asked = job([3, 4, 5], max_tokens=4)
        batcher.submit(asked)
        assert model.entered.wait(30)
        assert said == ["busy"], "a decode that hangs is overdue some day"
        model.pause.set()
        list(asked.hearer)
        assert said == ["busy", "idle"] * len(model.batches)
    finally:
        batcher.close()
