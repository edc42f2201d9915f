"""A draft model, and prediction layers, with real models: the same text as without them, whoever shares the caches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import SIZES

from actors.devices.node import NodeMonitor, NodeSettings
from actors.serving.drafting import Drafting
from actors.serving.engine import Engine
from actors.serving.preflight import ask_llama_cpp
from actors.serving.protocol import Chunk, GenerateRequest, LoadDevice, LoadDraft, LoadFailed, Sampling, content_of
from arriero import sample_models
from scheduler.choice.workload import Workload
from scheduler.config import Reserves
from scheduler.costs.companions import Companions, accompanied
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import DeviceSpec, Layout
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.errors import InvalidGGUF
from scheduler.units import MIB, NodeId

pytestmark = pytest.mark.llama

TEXT = "The llama is in the valley. The salt is in the house. " * 8
EXACT = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
GREEDY = Sampling(temperature=0)
SEEDED = Sampling(temperature=0.6, seed=7, repeat_penalty=1.1)
SIMPLE, MTP = "draft-simple", "draft-mtp"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be guessed is tried: every turn seems to take equally long, and guesses cost nothing."""
    monkeypatch.setattr(Drafting, "_seconds", lambda self, n_rows: 1.0)
    monkeypatch.setattr(Drafting, "_computing_s", lambda *given: 0.0)


@pytest.fixture
def main(sample: Any) -> Callable[[str], Path]:
    return lambda kind: sample("llama", "f32") if kind == SIMPLE else sample("glm4moe", "f32", n_nextn=1)


@pytest.fixture
def drafted(sample: Any, spec: Any, main: Any) -> Callable[..., Any]:
    """`drafted(kind, …)`: the model's spec, with a draft of one layer that speaks the same language, or with its own
    prediction layers."""

    def make(kind: str, **given: Any) -> Any:
        n_max = given.pop("n_max", 15 if kind == SIMPLE else 3)
        draft = LoadDraft(str(sample("llama", "f32", n_layer=1)) if kind == SIMPLE else "", n_max)
        context = {"n_ctx": 1024, "n_seq_max": 1, **EXACT, **given}
        loaded = spec(main(kind), spec_type=kind, n_outputs_max=context["n_seq_max"] + n_max, **context)
        return replace(loaded, draft=draft)

    return make


@pytest.fixture(params=[SIMPLE, MTP])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def plain(kind: str, spec: Any, main: Any) -> Iterator[Engine]:
    with closing(Engine(spec(main(kind), n_ctx=1024, n_outputs_max=1, **EXACT))) as engine:
        yield engine


def asked(engine: Engine, sampling: Sampling, **given: Any) -> list[Chunk]:
    content = content_of(prompt=given.pop("prompt", TEXT))
    return list(engine.generate(GenerateRequest(content, "r", **{"sampling": sampling, "max_tokens": 80, **given})))


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "with a seed"])
def test_the_text_is_that_without_drafts(kind: str, sampling: Sampling, plain: Engine, drafted: Any) -> None:
    with closing(Engine(drafted(kind))) as engine:
        expected, chunks = asked(plain, sampling), asked(engine, sampling)
        following = TEXT + text_of(expected) + " And then"
        next_expected, next_chunks = asked(plain, sampling, prompt=following), asked(engine, sampling, prompt=following)
    assert text_of(chunks) == text_of(expected)
    assert text_of(next_chunks) == text_of(next_expected)
    assert next_chunks[-1].cached_tokens == next_expected[-1].cached_tokens > 100
    last = chunks[-1]
    assert (last.completion_tokens, last.finish_reason) == (expected[-1].completion_tokens, expected[-1].finish_reason)
    assert last.timings is not None and last.timings.draft_n >= last.timings.draft_n_accepted > 20


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("unified", [True, False], ids=["shared", "apart"])
def test_answers_that_share_or_lose_their_caches_are_those_without_drafts(
    kind: str, unified: bool, plain: Engine, drafted: Any
) -> None:
    """More answers than slots, one of them cancelled, in a cache that has no room for all of them."""
    prompts = [TEXT, "Where is the salt? " * 12, "A llama. " * 20, TEXT[7:], TEXT + "And", "The maize. " * 15]
    cells = {"n_ctx": 768} if unified else {"n_ctx": 3072}
    stop = threading.Event()

    def cancelled(engine: Engine) -> None:
        content = content_of(prompt="Nobody speaks. " * 9)
        for chunk in engine.generate(GenerateRequest(content, "gone", sampling=GREEDY, max_tokens=400)):
            if chunk.text and not stop.is_set():
                stop.set()
                engine.cancel("gone")

    shared = drafted(kind, n_seq_max=3, kv_unified=unified, **cells)
    with closing(Engine(shared)) as engine, ThreadPoolExecutor() as threads:
        leaving = threads.submit(cancelled, engine)
        told = list(threads.map(lambda prompt: asked(engine, GREEDY, prompt=prompt), prompts))
        leaving.result()
    for prompt, chunks in zip(prompts, told, strict=True):
        assert text_of(chunks) == text_of(asked(plain, GREEDY, prompt=prompt))
    assert sum(chunks[-1].timings.draft_n_accepted for chunks in told if chunks[-1].timings is not None) > 20


@pytest.mark.usefixtures("eager")
def test_a_long_prompt_is_read_by_the_draft_in_pieces(drafted: Any, spec: Any, main: Any) -> None:
    prompt = TEXT * 3
    with closing(Engine(drafted(SIMPLE, n_ctx=2048, n_ubatch=64))) as engine:
        chunks = asked(engine, GREEDY, prompt=prompt)
    with closing(Engine(spec(main(SIMPLE), n_ctx=2048, n_ubatch=64, n_outputs_max=1, **EXACT))) as engine:
        assert text_of(chunks) == text_of(asked(engine, GREEDY, prompt=prompt))
    assert chunks[-1].timings is not None and chunks[-1].timings.draft_n_accepted > 10


@pytest.mark.usefixtures("eager")
def test_no_more_is_guessed_than_the_catalogue_says(drafted: Any) -> None:
    with closing(Engine(drafted(SIMPLE, n_max=2))) as engine:
        timings = asked(engine, GREEDY, max_tokens=41)[-1].timings
    assert timings is not None and 20 < timings.draft_n <= 2 * 40


@pytest.mark.usefixtures("eager")
def test_a_draft_that_is_unsure_stops(drafted: Any) -> None:
    unsure = drafted(SIMPLE)
    with closing(Engine(replace(unsure, draft=unsure.draft._replace(p_min=1.0)))) as engine:
        timings = asked(engine, GREEDY)[-1].timings
    assert timings is not None and timings.draft_n == 0


def test_a_draft_that_does_not_pay_is_left_alone(
    kind: str, drafted: Any, sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All turns seem to take a second, and so does every guess: after the first ones nobody guesses again."""

    def told(self: Drafting, seconds: float, n_unread: int, texts: Any) -> None:
        if any(text.ready for text in texts):
            self._step = 1.0, self._n_turns

    monkeypatch.setattr(Drafting, "_seconds", lambda self, n_rows: 1.0)
    monkeypatch.setattr(Drafting, "_computed", told)
    with closing(Engine(drafted(kind))) as engine:
        timings = asked(engine, GREEDY, max_tokens=200)[-1].timings
    assert timings is not None and 0 < timings.draft_n <= 15


def test_a_draft_with_another_vocabulary_is_refused(drafted: Any, tmp_path: Path, sample: Any) -> None:
    import gguf

    source = Path(sample("llama", "f32", n_layer=1))
    other = tmp_path / "other.gguf"
    other.write_bytes(source.read_bytes().replace(b"The old llama", b"The mad llama"))
    assert other.read_bytes() != source.read_bytes() and gguf.GGUFReader(other).tensors
    wrong = replace(drafted(SIMPLE), draft=LoadDraft(str(other)))
    with pytest.raises(LoadFailed, match=r"other\.gguf cannot guess for sample: .*leave it out"):
        Engine(wrong)


def shape_of(kind: str, main: Any, sample: Any) -> ModelShape:
    draft = read_shape(sample("llama", "f32", n_layer=1)) if kind == SIMPLE else None
    return accompanied(read_shape(main(kind)), Companions(draft=draft, mtp=kind == MTP))


def test_a_node_reads_the_headers_of_both(main: Any, sample: Any, tmp_path: Path) -> None:
    node = NodeMonitor(
        NodeId("box"), NodeSettings((), virtual_gpus=(MIB,), state_directory=str(tmp_path)), bool, address=""
    )
    model, predicting, draft = str(main(SIMPLE)), str(main(MTP)), str(sample("llama", "f32", n_layer=1))
    with_draft, with_layers = node.read_shape(model, draft=draft), node.read_shape(predicting, draft=predicting)
    assert isinstance(with_draft, ModelShape) and with_draft.draft is not None and not with_draft.runs_predictor
    assert isinstance(with_layers, ModelShape) and with_layers.runs_predictor and with_layers.draft is None
    for wrong, words in ((model, "no prediction layers"), (str(sample("mamba")), "a recurrent state")):
        fault = node.read_shape(model, draft=wrong)
        assert isinstance(fault, InvalidGGUF) and words in fault.message


@pytest.mark.parametrize("on_device", [False, True], ids=["in host RAM", "on a device"])
def test_what_is_planned_is_what_is_taken(
    kind: str, on_device: bool, drafted: Any, main: Any, sample: Any, virtual_gpus: tuple[LoadDevice, ...]
) -> None:
    """llama.cpp's own sums, asked before the load, are not above what placement counts with: weights and caches are
    equal, compute buffers at most."""
    wanted = drafted(kind, n_seq_max=2, kv_unified=True)
    shape = shape_of(kind, main, sample)
    devices = virtual_gpus[:1] if on_device else ()
    layout = Layout((DeviceSpec("gpu0", "rpc"),), -1, (1.0,)) if on_device else Layout()
    n_layers = shape.n_layer_all + 1
    wanted = replace(
        wanted,
        devices=devices,
        n_gpu_layers=n_layers if on_device else 0,
        draft=wanted.draft._replace(on_device=on_device),
        use_mmap=False,
    )
    workload = Workload("sample", shape, wanted.context, Reserves())
    plan = workload.footprint(layout, CHECKED_BUILD)
    truth = ask_llama_cpp(wanted)
    for ours, theirs in zip((*plan.devices, plan.host), (*truth.devices, truth.host), strict=True):
        assert (ours.weights_bytes, ours.kv_bytes) == (theirs.weights_bytes, theirs.kv_bytes)
        assert 0 <= ours.compute_bytes - theirs.compute_bytes < 8 * MIB
    assert abs(plan.host.output_bytes - truth.host.output_bytes) < 0.02 * MIB


def test_a_replica_reports_its_draft_too(kind: str, drafted: Any, spec: Any, main: Any, sample: Any) -> None:
    with closing(Engine(drafted(kind))) as engine:
        both = engine.buffers
        told = asked(engine, GREEDY, max_tokens=5)
    with closing(Engine(spec(main(kind), n_ctx=1024, n_outputs_max=4, **EXACT))) as engine:
        alone = engine.buffers
    assert told[-1].completion_tokens == 5
    assert both.host.weights_bytes > alone.host.weights_bytes and both.host.kv_bytes > alone.host.kv_bytes
    assert both.host.compute_bytes > alone.host.compute_bytes
    shape = shape_of(kind, main, sample)
    plan = Workload("sample", shape, drafted(kind).context, Reserves()).footprint(Layout(), CHECKED_BUILD)
    assert both.host.compute_bytes <= plan.host.compute_bytes + 20_000  # the report is rounded


MORE = 96  # tokens; llama.cpp takes a draft whose vocabulary is up to 128 tokens larger or smaller


@pytest.fixture
def larger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """`larger(weight, **sizes)`: a llama with `MORE` more tokens in its vocabulary. `weight`: above 1 it likes to say
    them."""
    add_vocabulary, embedding_and_output = sample_models.add_vocabulary, sample_models.embedding_and_output

    def add_more(writer: Any) -> None:
        def then(name: str, more: list[Any]) -> None:
            add = getattr(writer, name)
            monkeypatch.setattr(writer, name, lambda values: add([*values, *more]))

        then("add_token_list", [f" extra{number}" for number in range(MORE)])
        then("add_token_scores", [0.0] * MORE)
        then("add_token_types", [gguf.TokenType.NORMAL] * MORE)
        add_vocabulary(writer)

    def write(weight: float, **sizes: int) -> str:
        def matrices(*given: Any) -> tuple[Any, Any]:
            embedding, output = embedding_and_output(*given)
            return np.vstack([embedding, embedding[-MORE:]]), np.vstack([output, output[-MORE:] * np.float32(weight)])

        with monkeypatch.context() as patched:
            patched.setattr(sample_models, "add_vocabulary", add_more)
            patched.setattr(sample_models, "embedding_and_output", matrices)
            return str(
                sample_models.write_sample_model(
                    tmp_path / "larger.gguf", "llama", precision="f32", **{**SIZES, **sizes}
                )
            )

    return write


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", [SIMPLE], indirect=True)
def test_a_draft_that_knows_more_tokens(kind: str, plain: Engine, drafted: Any, larger: Any) -> None:
    spec = drafted(kind)
    with closing(Engine(replace(spec, draft=LoadDraft(larger(1.5, n_layer=1), spec.draft.n_max)))) as engine:
        assert text_of(asked(engine, GREEDY)) == text_of(asked(plain, GREEDY))


@pytest.mark.usefixtures("eager")
def test_a_draft_that_knows_fewer_tokens(drafted: Any, larger: Any) -> None:
    """Where the text has such a token, nothing is guessed; else as ever."""
    spec = drafted(SIMPLE)
    strange = [*range(300, 340), 500, *range(300, 340)]
    with closing(Engine(replace(spec, path=larger(0)))) as engine:
        for _ in range(2):
            chunks = asked(engine, GREEDY, prompt=strange, max_tokens=20)
            assert chunks[-1].completion_tokens and chunks[-1].timings is not None and not chunks[-1].timings.draft_n
            chunks = asked(engine, GREEDY)
            assert chunks[-1].timings is not None and chunks[-1].timings.draft_n
