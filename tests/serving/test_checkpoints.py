"""Chats of models whose memory cannot be cut: windows and recurrent states are set back to a checkpoint."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
from fake_model import FakeModel, expected, heard, job, submitted
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.serving import holdings
from actors.serving.batcher import Batcher
from actors.serving.engine import Engine
from actors.serving.holdings import CHECKPOINT_TAIL, LEAST_BETWEEN
from actors.serving.protocol import GenerateRequest, Sampling, content_of
from scheduler.costs.cache import window_and_state_bytes
from scheduler.costs.host import CHECKPOINTS_PER_SLOT
from scheduler.costs.shape import read_shape

PROMPT = [1 + index % 9 for index in range(LEAST_BETWEEN + 40)]


def answered(batcher: Batcher, prompt: list[int], max_tokens: int = 5) -> int:
    """How many tokens of the prompt were known; the answer is that of a clean run."""
    chunks = list(submitted(batcher, job(prompt, max_tokens)).hearer)  # type: ignore[call-overload]
    assert heard(chunks) == expected(prompt, max_tokens)
    known: int = chunks[-1].cached_tokens
    return known


def test_a_turn_that_leaves_something_out_begins_at_the_checkpoint(running: Any) -> None:
    batcher = running(FakeModel(1, n_ubatch=32, can_cut=False))
    assert answered(batcher, PROMPT) == 0
    assert answered(batcher, [*PROMPT[:-2], 8, 8, 8]) == len(PROMPT) - CHECKPOINT_TAIL
    assert answered(batcher, PROMPT) == len(PROMPT) - CHECKPOINT_TAIL
    assert answered(batcher, PROMPT[:40]) == 0


def test_a_slot_keeps_the_latest(running: Any) -> None:
    batcher = running(FakeModel(1, n_ubatch=64, can_cut=False))
    turns = CHECKPOINTS_PER_SLOT + 2
    longest = [1 + index % 9 for index in range(turns * LEAST_BETWEEN + 40)]
    ends = [LEAST_BETWEEN * turn + 40 for turn in range(1, turns + 1)]
    for end in ends:
        answered(batcher, [*longest[:end], 5, 5])
    kept = [end + 2 - CHECKPOINT_TAIL for end in ends[-CHECKPOINTS_PER_SLOT:]]
    assert answered(batcher, [*longest[: kept[1] + 1], 7, 7]) == kept[1]
    assert answered(batcher, [*longest[: kept[0] - 1], 7, 7]) == 0


def test_all_slots_share_the_room(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one idle for longest gives way."""
    monkeypatch.setattr(holdings, "MOST_CHECKPOINT_BYTES", len(PROMPT))
    batcher = running(FakeModel(2, n_ubatch=64, can_cut=False))
    other = [9, *PROMPT[1:]]
    answered(batcher, PROMPT)
    answered(batcher, other)
    assert answered(batcher, [*other[:-2], 8]) == len(PROMPT) - CHECKPOINT_TAIL
    assert answered(batcher, [*PROMPT[:-2], 8]) == 0


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(st.integers(0, 250), st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=8),
    n_slots=st.integers(1, 3),
    room=st.sampled_from([300, 10_000]),
)
def test_every_answer_is_that_of_a_clean_run(turns: list[tuple[int, int, int]], n_slots: int, room: int) -> None:
    """The fake says when a state is loaded under which the sequence does not hold what belongs to it."""
    batcher = Batcher(FakeModel(n_slots, n_ubatch=50, can_cut=False, room=room))
    jobs = []
    for shared, more, max_tokens in turns:
        prompt = [1 + index % 9 for index in range(shared)] + [1 + more] * (1 + more)
        jobs.append((prompt, max_tokens, submitted(batcher, job(prompt, max_tokens))))
    for prompt, max_tokens, one in jobs:
        assert heard(list(one.hearer)) == expected(prompt, max_tokens)  # type: ignore[call-overload]
    batcher.close()


EXACT = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
TEXT = "The traders of the valley carry salt and maize over the pass. " * 4


@pytest.mark.llama
@pytest.mark.parametrize("kind", ["gemma3", "granitehybrid", "mamba"])
def test_a_real_model_goes_on_from_its_checkpoint(kind: str, sample: Any, spec: Any) -> None:
    """Its answers are those of a fresh one, and what a checkpoint takes is no more than was predicted."""
    path = sample(kind, "f32", sliding_window=32)

    def ask(engine: Engine, text: str) -> tuple[str, int]:
        request = GenerateRequest(content_of(prompt=text), "r", max_tokens=12, sampling=Sampling(temperature=0))
        chunks = list(engine.generate(request))
        return "".join(chunk.text for chunk in chunks), chunks[-1].cached_tokens

    loaded = spec(path, n_ctx=1024, n_ubatch=64, **EXACT)
    with closing(Engine(loaded)) as engine, closing(Engine(loaded)) as fresh:
        ask(engine, TEXT)
        for text in (TEXT[:-3] + "!", TEXT + " And then?"):
            said, known = ask(engine, text)
            assert known > 100
            fresh._batcher._slots.forget(next(iter(fresh._batcher._slots)))
            assert (said, 0) == ask(fresh, text)
        (slot,) = engine._batcher._slots
        most = window_and_state_bytes(read_shape(path).arch, loaded.context)
        assert slot.checkpoints and all(0 < len(each.state) <= most for each in slot.checkpoints)
