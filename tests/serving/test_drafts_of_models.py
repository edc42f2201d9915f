"""Drafts with real models: the same text as without, and a cache that holds what was said and nothing else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from actors.serving.drafting import Drafting
from actors.serving.engine import Engine
from actors.serving.protocol import Chunk, GenerateRequest, Sampling, content_of

pytestmark = pytest.mark.llama

TEXT = "The llama is in the valley. The salt is in the house. " * 8
EXACT = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
GREEDY = Sampling(temperature=0)
SEEDED = Sampling(temperature=0.6, seed=7, repeat_penalty=1.1, dry_multiplier=0.2)


@pytest.fixture(scope="module")
def plain(sample: Any, spec: Any) -> Any:
    with closing(Engine(spec(sample("llama", "f32"), n_ctx=1024, n_outputs_max=1, **EXACT))) as engine:
        yield engine


@pytest.fixture
def guessing(sample: Any, spec: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whatever is guessed is tried: every turn seems to take equally long."""
    monkeypatch.setattr(Drafting, "_seconds", lambda self, n_rows: 1.0)
    with closing(Engine(spec(sample("llama", "f32"), n_ctx=1024, **drafts(1), **EXACT))) as engine:
        yield engine


def drafts(n_slots: int) -> dict[str, Any]:
    return {"spec_type": "ngram-simple", "n_outputs_max": n_slots + 15}


def asked(engine: Engine, sampling: Sampling, **given: Any) -> list[Chunk]:
    content = content_of(prompt=given.pop("prompt", TEXT))
    return list(engine.generate(GenerateRequest(content, "r", **{"sampling": sampling, "max_tokens": 80, **given})))


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "with a seed"])
def test_the_text_is_that_without_drafts(sampling: Sampling, plain: Engine, guessing: Engine) -> None:
    expected, chunks = asked(plain, sampling), asked(guessing, sampling)
    assert text_of(chunks) == text_of(expected)
    last, before = chunks[-1], expected[-1]
    assert (last.completion_tokens, last.finish_reason) == (before.completion_tokens, before.finish_reason)
    assert last.timings is not None and last.timings.draft_n > last.timings.draft_n_accepted >= 0
    if sampling is GREEDY:
        assert last.timings.draft_n_accepted > 10


def test_the_next_turn_goes_on_where_the_last_one_ended(plain: Engine, guessing: Engine) -> None:
    first, same = asked(plain, SEEDED), asked(guessing, SEEDED)
    following = TEXT + text_of(first) + " And then"
    expected, chunks = asked(plain, SEEDED, prompt=following), asked(guessing, SEEDED, prompt=following)
    assert text_of(same) == text_of(first)
    assert text_of(chunks) == text_of(expected)
    assert chunks[-1].cached_tokens == expected[-1].cached_tokens > 100


def test_several_answers_at_once_are_those_without_drafts(
    plain: Engine, sample: Any, spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Drafting, "_seconds", lambda self, n_rows: 1.0)
    prompts = [TEXT, "Where is the salt? " * 12, "A llama. " * 20, TEXT[7:]]
    shared = spec(sample("llama", "f32"), n_ctx=2048, n_seq_max=3, kv_unified=True, **drafts(3), **EXACT)
    with closing(Engine(shared)) as engine, ThreadPoolExecutor() as threads:
        told = list(threads.map(lambda prompt: asked(engine, GREEDY, prompt=prompt), prompts))
    for prompt, chunks in zip(prompts, told, strict=True):
        assert text_of(chunks) == text_of(asked(plain, GREEDY, prompt=prompt))
    assert sum(chunks[-1].timings.draft_n_accepted for chunks in told if chunks[-1].timings is not None) > 10


def test_answers_that_are_chosen_one_by_one_have_no_drafts(guessing: Engine) -> None:
    for given in ({"n_probs": 1}, {"n": 2}):
        timings = [chunk.timings for chunk in asked(guessing, GREEDY, **given) if chunk.timings is not None]
        assert all(each.draft_n == 0 for each in timings) and len(timings) == (given.get("n", 1) == 1)


@pytest.mark.parametrize("kind", ["gemma3", "mamba"])
def test_a_memory_that_cannot_be_cut_has_no_drafts(kind: str, engine: Any, sample: Any) -> None:
    loaded = engine(sample(kind), n_ctx=1024, **drafts(1))
    timings = asked(loaded, GREEDY)[-1].timings
    assert timings is not None and timings.draft_n == 0
