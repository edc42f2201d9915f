"""Guesses for models that carry recurrent states: wrong ones are taken back by copies of the states, and the text is
that without drafts, whoever shares a turn."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_draft_models import EXACT, GREEDY, MTP, SEEDED, SIMPLE, TEXT, asked, text_of

from actors.serving import drafting
from actors.serving.draft import Text
from actors.serving.drafting import Drafting
from actors.serving.drafting import _next_token as next_token
from actors.serving.engine import Engine
from actors.serving.model import Row
from actors.serving.native import NativeModel
from actors.serving.preflight import ask_llama_cpp
from actors.serving.protocol import GenerateRequest, LoadDevice, LoadDraft, LoadFailed, Sampling, content_of
from scheduler.choice.workload import Workload
from scheduler.config import Reserves
from scheduler.costs.companions import Companions, accompanied
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import DeviceSpec, Layout
from scheduler.costs.shape import read_shape
from scheduler.units import MIB

pytestmark = pytest.mark.llama

N_MAX = 3


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be guessed is tried: every turn seems to take equally long, and guesses cost nothing. Of every two
    turns with guesses, one has a wrong one, in all places by turns."""
    monkeypatch.setattr(Drafting, "_seconds", lambda self, n_rows: 1.0)
    monkeypatch.setattr(Drafting, "_computing_s", lambda *given: 0.0)
    turns = count()

    def spoiled(self: Text, most: int) -> list[int]:
        guessed, turn = self.ready[:most], next(turns)
        if guessed and turn % 2:
            guessed[turn // 2 % len(guessed)] -= 1
        return guessed

    monkeypatch.setattr(Text, "guess", spoiled)


@pytest.fixture
def main(sample: Any) -> Path:
    path: Path = sample("qwen35", "f32", n_layer=7, n_nextn=1)
    return path


@pytest.fixture(params=[SIMPLE, MTP])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def drafted(sample: Any, spec: Any, main: Path) -> Any:
    """`drafted(kind, …)`: the model's spec with a draft of one layer, or with its own prediction layer."""

    def make(kind: str, **given: Any) -> Any:
        n_max = given.pop("n_max", N_MAX)
        context = {"n_ctx": 1024, "n_seq_max": 1, "n_rs_seq": n_max, **EXACT, **given}
        loaded = spec(main, spec_type=kind, n_outputs_max=context["n_seq_max"] * (1 + n_max), **context)
        return replace(loaded, draft=LoadDraft(str(sample("llama", "f32", n_layer=1)) if kind == SIMPLE else "", n_max))

    return make


@pytest.fixture
def plain(spec: Any, main: Path) -> Iterator[Engine]:
    with closing(Engine(spec(main, n_ctx=1024, n_outputs_max=1, **EXACT))) as engine:
        yield engine


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many guesses could not be taken back, and had their answers read anew."""
    from actors.serving.holdings import Holdings

    found: list[int] = []
    take_back = Holdings.take_back

    def noted(self: Holdings, slot: Any, job: Any, count: int) -> None:
        take_back(self, slot, job, count)
        if not slot.tokens:
            found.append(count)

    monkeypatch.setattr(Holdings, "take_back", noted)
    return found


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "with a seed"])
def test_the_text_is_that_without_drafts(
    kind: str, sampling: Sampling, plain: Engine, drafted: Any, stuck: list[int]
) -> None:
    with closing(Engine(drafted(kind))) as engine:
        expected, chunks = asked(plain, sampling), asked(engine, sampling)
        following = TEXT + text_of(expected) + " And then"
        next_expected, next_chunks = asked(plain, sampling, prompt=following), asked(engine, sampling, prompt=following)
    assert text_of(chunks) == text_of(expected)
    assert text_of(next_chunks) == text_of(next_expected)
    assert next_chunks[-1].cached_tokens == next_expected[-1].cached_tokens > 100
    last = chunks[-1]
    assert (last.completion_tokens, last.finish_reason) == (expected[-1].completion_tokens, expected[-1].finish_reason)
    assert last.timings is not None and last.timings.draft_n > last.timings.draft_n_accepted > 20
    assert not stuck


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("unified", [True, False], ids=["shared", "apart"])
def test_answers_that_share_turns_are_those_without_drafts(
    kind: str, unified: bool, plain: Engine, drafted: Any, stuck: list[int]
) -> None:
    """More answers than slots, with unlike numbers of guesses, and in a cache that has no room for all of them."""
    prompts = [TEXT, "Where is the salt? " * 12, "A llama. " * 20, TEXT[7:], TEXT + "And", "The maize. " * 15]
    cells = {"n_ctx": 768} if unified else {"n_ctx": 4096}
    shared = drafted(kind, n_seq_max=4, kv_unified=unified, **cells)
    with closing(Engine(shared)) as engine, ThreadPoolExecutor() as threads:
        told = list(threads.map(lambda prompt: asked(engine, GREEDY, prompt=prompt), prompts))
    for prompt, chunks in zip(prompts, told, strict=True):
        assert text_of(chunks) == text_of(asked(plain, GREEDY, prompt=prompt))
    assert sum(chunks[-1].timings.draft_n_accepted for chunks in told if chunks[-1].timings is not None) > 20
    assert not stuck


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("unified", [True, False], ids=["shared", "apart"])
def test_no_guess_changes_what_the_model_says_of_the_next_token(
    kind: str, unified: bool, plain: Engine, drafted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its logits are those without guesses, but for rounding: equal text would not show a state that is slightly
    wrong. Answers end in the middle meanwhile, and conversations go on."""
    said: dict[str, list[Any]] = {}

    def noted(model: Any, job: Any, row: int) -> int:
        said.setdefault(job.lease_id, []).append(model.logits(row))
        return next_token(model, job, row)

    monkeypatch.setattr(drafting, "_next_token", noted)
    prompts = [f"{TEXT[at:]} The {word} " for at, word in enumerate(["salt", "llama", "maize", "ford", "rope"] * 2)]

    def ask(engine: Engine, prompt: str, name: str, n_chunks: int = 1000) -> str:
        chunks = engine.generate(GenerateRequest(content_of(prompt=prompt), name, sampling=GREEDY, max_tokens=40))
        with closing(chunks):
            return text_of([*islice(chunks, n_chunks)])

    def talk(index: int) -> None:
        ask(engine, prompts[index], f"left {index}", index % 7)
        answer = ask(engine, prompts[index], f"first {index}")
        ask(engine, f"{prompts[index]}{answer} And then", f"second {index}")

    with (
        closing(Engine(drafted(kind, n_seq_max=4, kv_unified=unified, n_ctx=2048 if unified else 4096))) as engine,
        ThreadPoolExecutor(6) as threads,
    ):
        list(threads.map(talk, range(len(prompts))))
    for index, prompt in enumerate(prompts):
        answer = ask(plain, prompt, "first")
        ask(plain, f"{prompt}{answer} And then", "second")
        for name in ("first", "second"):
            np.testing.assert_allclose(said[f"{name} {index}"], said.pop(name), atol=1e-4)


@pytest.mark.usefixtures("eager")
def test_a_chat_goes_on_from_its_checkpoint_and_from_disk(
    plain: Engine, drafted: Any, spec: Any, main: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves something out is set back to a checkpoint; and a state that was saved with copies serves an engine
    without any, and the other way round."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = text_of(asked(plain, GREEDY))
    following, other = TEXT + first + " And then", TEXT + first[:20] + " But now"
    expected = [text_of(asked(plain, GREEDY, prompt=each)) for each in (following, other)]
    with_copies = replace(drafted(MTP), saved_state_bytes=64 * MIB)
    without = replace(spec(main, n_ctx=1024, n_outputs_max=1, **EXACT), saved_state_bytes=64 * MIB)
    for saving, going_on in ((with_copies, without), (without, with_copies)):
        with closing(Engine(saving)) as engine:
            assert text_of(asked(engine, GREEDY)) == first
            assert text_of(asked(engine, GREEDY, prompt=following)) == expected[0]
            again = asked(engine, GREEDY, prompt=other)
            assert text_of(again) == expected[1] and again[-1].cached_tokens > 100
        with closing(Engine(going_on)) as engine:
            chunks = asked(engine, GREEDY, prompt=other)
            assert text_of(chunks) == expected[1]


def test_old_copies_are_not_gone_back_to(drafted: Any) -> None:
    """llama.cpp would: it does not know when they were made."""
    with closing(NativeModel(drafted(MTP, n_seq_max=3, kv_unified=True), (), lambda progress: None)) as model:
        model.warm_up()

        def decode(*counts: int) -> None:
            assert (
                model.decode([Row(300, at, each, True) for each, n in enumerate(counts) for at in more(each, n)]) == 0
            )

        held = [0, 0, 0]

        def more(sequence: int, n: int) -> range:
            held[sequence] += n
            return range(held[sequence] - n, held[sequence])

        def cut(sequence: int, n: int) -> bool:
            done = model.cut(sequence, held[sequence] - n, held[sequence])
            held[sequence] -= n * done
            return done

        decode(6, 6)
        assert cut(0, 3) and not cut(0, 1) and not cut(1, 4)
        decode(4)
        decode(0, 0, 4)
        assert not cut(0, 1) and cut(2, 2)  # another batch came between
        decode(1)
        assert not cut(0, 1)  # there was one token in it
        decode(4, 2)
        assert not cut(0, 1) and not cut(1, 1)  # they were computed one after the other
        decode(2, 2)
        assert cut(0, 1) and cut(1, 1)


@pytest.mark.parametrize("on_device", [False, True], ids=["in host RAM", "on a device"])
def test_what_is_planned_is_what_is_taken(
    kind: str, on_device: bool, drafted: Any, main: Path, sample: Any, virtual_gpus: tuple[LoadDevice, ...]
) -> None:
    wanted = drafted(kind, n_seq_max=2, kv_unified=True)
    draft = read_shape(sample("llama", "f32", n_layer=1)) if kind == SIMPLE else None
    shape = accompanied(read_shape(main), Companions(draft=draft, mtp=kind == MTP))
    devices = virtual_gpus[:1] if on_device else ()
    layout = Layout((DeviceSpec("gpu0", "rpc"),), -1, (1.0,)) if on_device else Layout()
    wanted = replace(
        wanted,
        devices=devices,
        n_gpu_layers=shape.n_layer_all + 1 if on_device else 0,
        draft=wanted.draft._replace(on_device=on_device),
        use_mmap=False,
    )
    plan = Workload("sample", shape, wanted.context, Reserves()).footprint(layout, CHECKED_BUILD)
    truth = ask_llama_cpp(wanted)
    for ours, theirs in zip((*plan.devices, plan.host), (*truth.devices, truth.host), strict=True):
        assert (ours.weights_bytes, ours.kv_bytes) == (theirs.weights_bytes, theirs.kv_bytes)
        assert 0 <= ours.compute_bytes - theirs.compute_bytes < 8 * MIB
    if not on_device:
        with closing(Engine(wanted)) as engine:
            asked(engine, GREEDY, max_tokens=9)
            assert engine.buffers.host.compute_bytes <= plan.host.compute_bytes + 20_000  # the report is rounded


def test_a_model_without_copies_is_not_loaded_with_them(sample: Any, spec: Any) -> None:
    with pytest.raises(LoadFailed, match="has 0 copies of the model's recurrent states instead of 3, so wrong guesses"):
        Engine(spec(sample("granitehybrid"), spec_type=SIMPLE, n_rs_seq=3, n_outputs_max=4))
