"""The engine on real models: it says what llama-cpp-python alone would say, wherever the layers lie."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from actors.devices.virtual import start_device_process
from actors.serving.engine import Engine
from actors.serving.protocol import EmbedRequest, GenerateRequest, LoadDevice, LoadFailed, Sampling, content_of
from actors.serving.vocabulary import Vocabulary
from scheduler.costs.params import Layout
from scheduler.costs.weights import experts_pattern
from scheduler.errors import Rejected
from scheduler.units import MIB

pytestmark = pytest.mark.llama

KINDS = ("llama", "qwen3moe", "gemma3", "deepseek2", "glm4moe", "granitehybrid", "mamba")
EXPERTS = ("qwen3moe", "deepseek2")
EXACT = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}  # rounding of a millionth: no tie is that close


def text(engine: Engine, request: GenerateRequest) -> str:
    return "".join(chunk.text for chunk in engine.generate(request))


@pytest.fixture
def endpoints(virtual_gpus: tuple[LoadDevice, ...]) -> Iterator[Callable[[int], list[str]]]:
    """`endpoints(n)`: device processes on the first n virtual GPUs."""
    processes = []

    def start(count: int) -> list[str]:
        processes.extend(start_device_process(gpu.state_path, gpu.total_bytes) for gpu in virtual_gpus[:count])
        return [process.endpoint for process in processes]

    yield start
    for process in processes:
        process.close()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_like_llama_cpp_python(
    kind: str, sample: Any, engine: Any, ask: Any, baseline: Callable[..., str]
) -> None:
    path = sample(kind)
    answer = text(engine(path), ask())
    assert answer == baseline(path, ask())
    assert len(answer) > 60


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((kind, layout) for kind in KINDS for layout in ("two", "partial")),
        *((kind, layout) for kind in EXPERTS for layout in ("experts", "some experts")),
    ],
)
def test_answers_the_same_wherever_the_layers_lie(
    kind: str,
    layout: str,
    sample: Any,
    spec: Any,
    ask: Any,
    baseline: Callable[..., str],
    virtual_gpus: tuple[LoadDevice, ...],
    endpoints: Callable[[int], list[str]],
) -> None:
    path = sample(kind)
    count, n_gpu_layers, split, experts = {
        "two": (2, 5, (2, 3), ""),
        "partial": (2, 3, (1, 2), ""),
        "experts": (1, -1, (5,), experts_pattern(Layout(experts_on_host=True))),
        "some experts": (1, -1, (5,), experts_pattern(Layout(n_cpu_moe=2))),
    }[layout]
    loaded = spec(
        path,
        devices=virtual_gpus[:count],
        n_gpu_layers=n_gpu_layers,
        tensor_split=tuple(map(float, split)),
        experts_pattern=experts,
    )
    with closing(Engine(loaded, endpoints(count))) as engine:
        assert text(engine, ask()) == baseline(path, ask())
        buffers = engine.buffers
    assert len(buffers.devices) == count
    assert all(device.weights_bytes > 0 and device.compute_bytes > 0 for device in buffers.devices)
    assert (buffers.host.weights_bytes > 0.25 * path.stat().st_size) == (layout != "two")


def test_an_answer_says_how_fast_it_was_while_it_was_alone(sample: Any, engine: Any, ask: Any) -> None:
    *_, last = engine(sample("llama")).generate(ask("Who carries the salt over the pass?" * 5))
    pace = last.pace
    assert 32 <= pace.prompt_tokens <= last.prompt_tokens and pace.prompt_s > 0
    assert pace.answer_tokens == last.completion_tokens - 1 and pace.answer_s > 0  # the prompt's batch gives the first
    assert last.prompt_tokens <= pace.n_past <= last.prompt_tokens + last.completion_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_several_at_once_are_those_of_each_alone(
    kind: str, sample: Any, engine: Any, ask: Any, baseline: Callable[..., str]
) -> None:
    path = sample(kind, "f32")
    shared = engine(path, n_ctx=1024, n_seq_max=2, **EXACT)
    questions = ["Where is the salt?", "Who carries it?" * 12, "Why?", "Where is the salt?"]
    answers: dict[int, str] = {}

    def listen(index: int) -> None:
        answers[index] = text(shared, ask(questions[index], lease_id=str(index)))

    threads = [threading.Thread(target=listen, args=(index,)) for index in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = [baseline(path, ask(question), flash_attn=False, type_k=0, type_v=0) for question in questions]
    assert [answers[index] for index in range(len(questions))] == wanted


@pytest.mark.parametrize(
    ("kind", "extra"),
    [(kind, {}) for kind in KINDS] + [("llama", {"kv_unified": True}), ("gemma3", {"kv_unified": True})],
)
def test_a_conversation_reuses_what_it_can_and_answers_the_same(
    kind: str, extra: dict[str, Any], sample: Any, engine: Any, ask: Any
) -> None:
    path = sample(kind, "f32", sliding_window=32)
    long_lived = engine(path, n_ctx=2048, n_seq_max=2, n_ubatch=64, **EXACT, **extra)
    messages: list[dict[str, str]] = []
    cached = []
    for question in ("Where is the salt?", "Who carries it?" * 35, "And then?"):
        messages.append({"role": "user", "content": question})
        request = ask(messages=tuple(messages))
        chunks = list(long_lived.generate(request))
        answer = "".join(chunk.text for chunk in chunks)
        assert answer == text(engine(path, n_ctx=1024, n_ubatch=64, **EXACT), request)
        cached.append(chunks[-1].cached_tokens / chunks[-1].prompt_tokens)
        messages.append({"role": "assistant", "content": answer})
    assert cached[0] == 0
    assert cached[2] > 0.7, "the history of a chat is not decoded again"
    # Back to the first question: a cut that some memories cannot make; the answer must not care.
    again = ask(messages=tuple(messages[:1]))
    assert text(long_lived, again) == messages[1]["content"]


def test_the_last_chunk_counts(sample: Any, engine: Any, ask: Any) -> None:
    chunks = list(engine(sample("llama")).generate(ask(max_tokens=7)))
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1].completion_tokens == 7
    assert chunks[-1].prompt_tokens > 10
    assert "".join(chunk.text for chunk in chunks).startswith(" ")


def test_a_stop_string_ends_the_answer_before_it(sample: Any, engine: Any, ask: Any) -> None:
    loaded = engine(sample("llama"))
    answer = text(loaded, ask())
    stop = answer[20:29]
    chunks = list(loaded.generate(ask(stop=(stop,))))
    assert "".join(chunk.text for chunk in chunks) == answer[: answer.index(stop)]
    assert chunks[-1].finish_reason == "stop"


def test_a_full_context_ends_the_answer(sample: Any, engine: Any, ask: Any) -> None:
    loaded = engine(sample("llama"), n_ctx=256)
    chunks = list(loaded.generate(ask("x" * 200, max_tokens=None)))
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].prompt_tokens + chunks[-1].completion_tokens == loaded.n_ctx_per_slot == 256


def test_seeds_repeat_and_temperature_matters(sample: Any, engine: Any, ask: Any) -> None:
    loaded = engine(sample("llama"))
    warm = [text(loaded, ask(sampling=Sampling(temperature=2.0, seed=seed))) for seed in (1, 1, 2, 3, 4)]
    assert warm[0] == warm[1]
    assert len(set(warm)) > 2


def test_logit_bias_and_penalties_change_the_choice(sample: Any, engine: Any, ask: Any) -> None:
    loaded = engine(path := sample("llama"))
    letter = Vocabulary(str(path)).tokenize("Q", add_special=False)[-1]
    assert text(loaded, ask(max_tokens=3, sampling=Sampling(temperature=0, logit_bias={letter: 100.0}))) == "QQQ"
    once = Sampling(temperature=0, logit_bias={letter: 20.0}, repeat_penalty=100.0)
    assert text(loaded, ask(max_tokens=8, sampling=once)).count("Q") == 1


def test_a_json_schema_is_obeyed(sample: Any, engine: Any, ask: Any) -> None:
    loaded = engine(sample("llama"))
    schema = {
        "type": "object",
        "properties": {"animal": {"enum": ["llama", "alpaca"]}, "tame": {"type": "boolean"}},
        "required": ["animal", "tame"],
    }
    chunks = list(loaded.generate(ask(max_tokens=600, json_schema=schema)))
    assert chunks[-1].finish_reason == "stop"
    answer = json.loads("".join(chunk.text for chunk in chunks))
    assert answer["animal"] in ("llama", "alpaca")
    assert isinstance(answer["tame"], bool)
    anything = text(loaded, ask(max_tokens=200, json_schema={}))
    assert anything.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"prompt": None}, "either messages or a prompt"),
        ({"prompt": "x", "messages": ({"role": "user", "content": "x"},)}, "not both"),
        ({"prompt": ()}, "empty"),
        ({"prompt": (1, 99999)}, "token 99999"),
        ({"prompt": tuple([5] * 600)}, "prompt is 600 tokens; the slot holds 512"),
        ({"max_tokens": -1}, "at least 0"),
        ({"sampling": Sampling(adaptive_decay=1.0)}, "adaptive_decay is 1.0"),
        ({"sampling": Sampling(temperature=-1)}, "temperature is -1"),
        ({"sampling": Sampling(logit_bias={-5: 1.0})}, "token -5"),
        ({"json_schema": [1]}, "must be an object"),
        ({"json_schema": {"type": "object", "properties": 7}}, "JSON schema"),
    ],
)
def test_refuses_what_it_cannot_do_before_taking_a_slot(
    given: dict[str, Any], reason: str, sample: Any, engine: Any, ask: Any
) -> None:
    loaded = engine(sample("llama"))
    with pytest.raises(Rejected, match=reason):
        loaded.generate(ask(**given))
    assert loaded.active_requests == ()
    assert text(loaded, ask(max_tokens=2))


def test_closing_the_iterator_frees_the_slot(sample: Any, engine: Any, ask: Any) -> None:
    loaded = engine(sample("llama"), n_ctx=4096)
    stream = loaded.generate(ask(lease_id="long", max_tokens=None))
    next(stream)
    assert loaded.active_requests == ("long",)
    stream.close()
    assert text(loaded, ask(lease_id="next"))  # there is only one slot
    assert loaded.active_requests == ()


def test_cancel_by_name_ends_the_stream_without_a_last_chunk(sample: Any, engine: Any, ask: Any) -> None:
    loaded = engine(sample("llama"), n_ctx=4096)
    stream = loaded.generate(ask(lease_id="long", max_tokens=None))
    first = next(stream)
    assert loaded.cancel("long")
    assert all(chunk.finish_reason is None for chunk in [first, *stream])
    assert not loaded.cancel("long")


def test_a_long_prompt_on_the_cpu_is_aborted_in_its_midst(sample: Any, engine: Any, ask: Any) -> None:
    """The micro-batch is the whole prompt here, so only an abort inside it can end this soon."""
    path = sample("llama", n_layer=6, n_embd=512, n_ff=2048)
    loaded = engine(path, n_ctx=8192, n_batch=8192, n_ubatch=8192)
    results: list[Any] = []
    stream = loaded.generate(ask(prompt=tuple([5] * 8000), lease_id="long"))
    thread = threading.Thread(target=lambda: results.extend(stream))
    thread.start()
    while not loaded.cancel("long"):
        pass
    thread.join()
    assert results == []
    assert text(loaded, ask())


def test_embeddings_are_of_length_one_and_of_the_text(sample: Any, engine: Any, ask: Any) -> None:
    for kind in ("llama", "mamba"):
        loaded = engine(sample(kind), n_seq_max=2, n_ctx=1024, embeddings=True)
        before = text(loaded, ask())
        embedded = loaded.embed(EmbedRequest(content_of(inputs=("the salt", "the salt", "a bell " * 30))))
        one, same, other = (each.vector for each in embedded)
        assert one == pytest.approx(same)
        assert sum(a * b for a, b in zip(one, other, strict=True)) < 0.99
        assert all(sum(a * a for a in each.vector) == pytest.approx(1) for each in embedded)
        assert len(one) == 128
        assert sum(each.prompt_tokens for each in embedded) > 50
        assert text(loaded, ask()) == before
        with pytest.raises(Rejected, match="the slot holds 512"):
            loaded.embed(EmbedRequest(content_of(inputs=("x" * 600,))))


def test_a_model_that_pools_embeds_several_texts_at_once(
    sample: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    from arriero import sample_models

    add_parameters = sample_models._add_parameters

    def with_pooling(writer: Any, *rest: Any) -> None:
        add_parameters(writer, *rest)
        writer.add_pooling_type(gguf.PoolingType.MEAN)

    monkeypatch.setattr(sample_models, "_add_parameters", with_pooling)
    path = sample("llama", n_layer=3)
    texts = ["the salt", "a bell " * 20, "two blankets and some rope", "the salt", "maize"]
    apart = engine(path, n_ctx=1024, n_batch=1024, n_ubatch=1024, embeddings=True)
    together = engine(path, n_ctx=1024, n_batch=1024, n_ubatch=1024, n_seq_max=4, kv_unified=True, embeddings=True)
    assert apart._model.is_pooled and together._model.is_pooled
    batches: list[int] = []
    embed = together._model.embed
    monkeypatch.setattr(together._model, "embed", lambda rows: batches.append(len(rows)) or embed(rows))
    one, other = (each.embed(EmbedRequest(content_of(inputs=texts))) for each in (apart, together))
    assert len(batches) == 2, "four texts, and one"
    for mine, theirs in zip(one, other, strict=True):
        assert mine.prompt_tokens == theirs.prompt_tokens
        assert sum(a * b for a, b in zip(mine.vector, theirs.vector, strict=True)) == pytest.approx(1, abs=1e-4)


def test_progress_rises_to_one_and_may_stop_the_load(sample: Any, spec: Any) -> None:
    seen: list[float] = []
    Engine(spec(sample("llama")), (), seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0

    class Enough(Exception):
        pass

    def stop(progress: float) -> None:
        raise Enough

    with pytest.raises(Enough):
        Engine(spec(sample("llama")), (), stop)


@pytest.mark.parametrize("content", [b"GGUF", b"not a model at all" * 100, b""])
def test_a_bad_file_is_an_invalid_model(content: bytes, tmp_path: Path, spec: Any) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(LoadFailed) as caught:
        Engine(spec(path))
    assert caught.value.failure.kind == "invalid_model"
    assert str(path) in caught.value.failure.message


def test_a_truncated_file_is_an_invalid_model(tmp_path: Path, sample: Any, spec: Any) -> None:
    path = tmp_path / "cut.gguf"
    whole = sample("llama").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadFailed) as caught:
        Engine(spec(path))
    assert caught.value.failure.kind == "invalid_model"


@pytest.mark.parametrize(("given", "what"), [({"n_layer": 40}, "weights"), ({"n_ctx": 65536}, "cache")])
def test_too_much_for_the_device_is_out_of_memory(
    given: dict[str, Any],
    what: str,
    sample: Any,
    spec: Any,
    virtual_gpus: tuple[LoadDevice, ...],
    endpoints: Callable[[int], list[str]],
) -> None:
    path = sample("llama", n_layer=given.get("n_layer", 4), n_embd=256, n_ff=768)
    loaded = spec(path, devices=virtual_gpus[:1], n_gpu_layers=-1, tensor_split=(1.0,), n_ctx=given.get("n_ctx", 512))
    with pytest.raises(LoadFailed) as caught:
        Engine(loaded, endpoints(1))
    assert caught.value.failure.kind == "out_of_memory", what
    assert "allocate" in caught.value.failure.message


def test_a_quantised_cache_without_flash_attention_is_refused_by_llama_cpp(sample: Any, spec: Any) -> None:
    with pytest.raises(LoadFailed, match="quantized V cache requires flash_attn") as caught:
        Engine(spec(sample("llama"), type_v="q8_0", flash_attn="off"))
    assert caught.value.failure.kind == "failed"


def test_more_slots_than_a_batch_has_rows_are_refused(sample: Any, spec: Any) -> None:
    with pytest.raises(LoadFailed, match="n_batch is 2; 3 sequences"):
        Engine(spec(sample("llama"), n_seq_max=3, n_ctx=768, n_batch=2, n_ubatch=2))


def test_the_report_is_near_what_was_taken_from_the_device(
    sample: Any, spec: Any, virtual_gpus: tuple[LoadDevice, ...], endpoints: Callable[[int], list[str]]
) -> None:
    from actors.devices.byte_count import ByteCount

    loaded = spec(sample("llama"), devices=virtual_gpus[:1], n_gpu_layers=-1, tensor_split=(1.0,))
    with closing(Engine(loaded, endpoints(1))) as engine:
        held = sum(holder.held_bytes for holder in ByteCount(virtual_gpus[0].state_path).holders())
        assert engine.buffers.devices[0].total_bytes == pytest.approx(held, abs=0.03 * MIB)
