"""What a real model is asked besides plain answers: likelihoods, several answers, gaps to fill, ranks."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.serving import engine as engines
from actors.serving.engine import Engine
from actors.serving.protocol import Chunk, EmbedRequest, GenerateRequest, ReplyForm, Sampling, content_of
from actors.serving.replies import reply_in
from actors.serving.vector_sizes import refuse_cut
from scheduler.errors import Rejected

pytestmark = pytest.mark.llama

TEXT = "The traders of the valley carry salt and maize over the pass."
GREEDY = Sampling(temperature=0)


def chunks_of(engine: Engine, **given: Any) -> list[Chunk]:
    content = {name: given.pop(name) for name in list(given) if name in ("prompt", "prompts", "infill", "logit_bias")}
    return list(engine.generate(GenerateRequest(content_of(**content), "r", **{"sampling": GREEDY, **given})))


def reply_to(engine: Engine, form: Any = "text", **given: Any) -> dict[str, Any]:
    reply = reply_in(ReplyForm(form, model="m"))
    told: dict[str, Any] = json.loads(b"".join(map(reply.bytes_of, chunks_of(engine, **given))))
    return told


@pytest.fixture(scope="module")
def llama(sample: Any, spec: Any) -> Any:
    with closing(
        Engine(spec(sample("llama", "f32"), n_ctx=2048, n_seq_max=4, kv_unified=True, n_outputs_max=4))
    ) as one:
        yield one


def test_likelihoods_are_llama_cpps(sample: Any, spec: Any) -> None:
    """Of the prompt and of the answer: within 1e-5 of what llama-cpp-python computes from all logits, at the same
    precision."""
    import llama_cpp

    path, precise = sample("llama", "f32"), {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
    with closing(Engine(spec(path, n_ctx=512, n_seq_max=4, kv_unified=True, n_outputs_max=4, **precise))) as engine:
        told = reply_to(engine, prompt=TEXT, max_tokens=12, n_probs=3, echo=True)["choices"][0]
    exact: Any = {"type_k": 0, "type_v": 0, "flash_attn": False}
    with closing(llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False, **exact)) as other:
        theirs: Any = other.create_completion(TEXT, max_tokens=12, temperature=0, logprobs=3, echo=True)
    assert told["text"] == theirs["choices"][0]["text"]
    mine, truth = told["logprobs"], theirs["choices"][0]["logprobs"]
    assert mine["token_logprobs"][0] is None
    count = sum(each is not None for each in truth["token_logprobs"])  # they leave out the first token of all
    assert count == len(mine["token_logprobs"]) - 2
    np.testing.assert_allclose(mine["token_logprobs"][-count:], truth["token_logprobs"][-count:], atol=1e-5)
    for ours, those in zip(mine["top_logprobs"][-count:], truth["top_logprobs"][-count:], strict=True):
        assert sorted(ours.values())[-3:] == pytest.approx(sorted(those.values())[-3:], abs=1e-5)
    for text, offset in zip(mine["tokens"], mine["text_offset"], strict=True):
        assert told["text"][offset : offset + len(text)] == text


def test_a_harness_asks_for_the_prompt_alone(llama: Engine) -> None:
    told = reply_to(llama, prompt=TEXT, max_tokens=0, n_probs=1, echo=True)
    choice = told["choices"][0]
    assert choice["text"] == TEXT and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == told["usage"]["prompt_tokens"]
    assert told["usage"]["completion_tokens"] == 0


def test_chats_tell_likelihoods_in_their_own_way(llama: Engine) -> None:
    logprobs = reply_to(llama, "chat", prompt=TEXT, max_tokens=3, n_probs=2)["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    told = logprobs["content"]
    assert len(told) == 3
    for each in told:
        assert bytes(each["bytes"]).decode() == each["token"]
        assert each["top_logprobs"][0]["logprob"] == pytest.approx(each["logprob"])  # greedy
        assert len(each["top_logprobs"]) == 2


def test_several_answers_to_several_prompts(llama: Engine) -> None:
    alone = [reply_to(llama, prompt=text, max_tokens=6)["choices"][0]["text"] for text in (TEXT, "Salt")]
    told = reply_to(llama, prompts=[TEXT, "Salt"], n=3, max_tokens=6)
    assert [choice["index"] for choice in told["choices"]] == list(range(6))
    assert [choice["text"] for choice in told["choices"]] == [alone[0]] * 3 + [alone[1]] * 3
    one, other = (reply_to(llama, prompt=text, max_tokens=1)["usage"]["prompt_tokens"] for text in (TEXT, "Salt"))
    assert told["usage"]["prompt_tokens"] == one + other and told["usage"]["completion_tokens"] == 36


def test_each_answer_has_a_seed_of_its_own(llama: Engine) -> None:
    warm = Sampling(temperature=2.0, seed=5)
    texts = [choice["text"] for choice in reply_to(llama, prompt=TEXT, n=4, max_tokens=8, sampling=warm)["choices"]]
    again = [choice["text"] for choice in reply_to(llama, prompt=TEXT, n=4, max_tokens=8, sampling=warm)["choices"]]
    assert texts == again and len(set(texts)) == 4


def test_several_answers_under_a_grammar(llama: Engine) -> None:
    content = content_of(prompt=TEXT, grammar='root ::= "yes" | "no"')
    request = GenerateRequest(content, "r", sampling=Sampling(temperature=2.0, seed=1), n=4, max_tokens=20)
    reply = reply_in(ReplyForm("text"))
    told = json.loads(b"".join(map(reply.bytes_of, llama.generate(request))))
    assert {choice["text"] for choice in told["choices"]} <= {"yes", "no"} and len(told["choices"]) == 4
    with pytest.raises(Rejected, match="9 answers; at most 8"):
        list(llama.generate(GenerateRequest(content, "r", n=9)))


def test_likelihoods_that_are_told_at_once_are_bounded(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer ends where they are too many, however long it may be."""
    monkeypatch.setattr(engines, "MOST_LIKELIHOODS", 100)
    monkeypatch.setattr(engines, "MOST_IN_A_RESPONSE", 40)
    monkeypatch.setattr(engines, "MOST_OF_A_PROMPT", 60)
    asked: dict[str, Any] = {"prompt": TEXT, "n_probs": 4}
    for n, n_tokens in ((1, 20), (2, 20)):
        last = chunks_of(llama, n=n, sampling=Sampling(ignore_eos=True), **asked)[-1]
        assert (last.completion_tokens, last.finish_reason) == (n_tokens, "length")
    for stream in (False, True):  # the last event of a streamed response tells all of them once more
        assert chunks_of(llama, reply=ReplyForm("responses", stream), **asked)[-1].completion_tokens <= 8
    streamed = chunks_of(
        llama, reply=ReplyForm(stream=True), max_tokens=30, sampling=Sampling(ignore_eos=True), **asked
    )
    assert streamed[-1].completion_tokens == 30
    with pytest.raises(Rejected, match="log probabilities; at most 60 of one prompt and 99 of all are allowed"):
        chunks_of(llama, echo=True, max_tokens=0, **asked)


def test_closing_the_iterator_ends_every_answer(llama: Engine) -> None:
    answer = llama.generate(GenerateRequest(content_of(prompt=TEXT), "r", n=4, max_tokens=500, sampling=GREEDY))
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert reply_to(llama, prompt=TEXT, max_tokens=2)["usage"]["completion_tokens"] == 2
    assert not llama.active_requests


def test_a_text_can_be_biased(llama: Engine) -> None:
    """Its tokens are what the vocabulary makes of it."""
    assert reply_to(llama, prompt=TEXT, max_tokens=2, logit_bias={"Q": 100.0})["choices"][0]["text"] == "QQ"


def test_timings_are_those_of_the_answer(llama: Engine) -> None:
    told = reply_to(llama, "completion", prompt=TEXT, max_tokens=5)
    timings = told["timings"]
    assert (timings["predicted_n"], timings["prompt_n"] + timings["cache_n"]) == (5, told["tokens_evaluated"])
    assert timings["predicted_per_second"] == pytest.approx(5000 / timings["predicted_ms"])
    assert told["stop"] is True and told["stop_type"] == "limit"


def examined(engine: Engine, **asked: Any) -> Any:
    (chunk,) = engine.generate(GenerateRequest(content_of(examine=asked), "r"))
    return json.loads(chunk.text)


def test_what_needs_no_computing(llama: Engine) -> None:
    tokens = examined(llama, tokenize=TEXT)["tokens"]
    assert examined(llama, detokenize=tokens) == {"content": TEXT}
    spelled = examined(llama, tokenize="salt é", with_pieces=True)["tokens"]
    assert [each["id"] for each in spelled] == examined(llama, tokenize="salt é")["tokens"]
    assert examined(llama, tokenize=TEXT, add_special=True)["tokens"][1:] == tokens
    prompt = examined(llama, apply_template={"messages": [{"role": "user", "content": "Hi"}]})["prompt"]
    assert "Hi" in prompt
    with pytest.raises(Rejected, match="tokens are 0 to"):
        examined(llama, detokenize=[10**9])


def written(sample: Any, monkeypatch: pytest.MonkeyPatch, change: Any, kind: str = "llama", **sizes: int) -> Path:
    """A sample with other parameters."""
    from arriero import sample_models

    add_parameters = sample_models._add_parameters

    def changed(writer: Any, *rest: Any) -> None:
        add_parameters(writer, *rest)
        change(writer)

    monkeypatch.setattr(sample_models, "_add_parameters", changed)
    path: Path = sample(kind, **sizes)
    return path


def test_a_gap_is_filled_between_its_ends(
    llama: Engine, sample: Any, spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_gaps(writer: Any) -> None:
        for name, token in (("pre", 10), ("suf", 11), ("mid", 12)):
            writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", token)

    gap = {"input_prefix": "one two", "input_suffix": "four"}
    with pytest.raises(Rejected, match="cannot fill in the middle of a text"):
        chunks_of(llama, infill=gap, max_tokens=2)
    with closing(Engine(spec(written(sample, monkeypatch, with_gaps, n_layer=2), n_ctx=512))) as engine:
        prompt = engine._preparer.prepare(content_of(infill=gap), 512).prompts[0]
        one, two, four = (examined(engine, tokenize=text)["tokens"] for text in ("one two", "four", "two"))
        assert prompt[-len(two) - 2 :] == [11, *two, 12]
        start = prompt.index(10)
        assert prompt[start + 1 : start + 1 + len(one)] == one
        extra = {**gap, "input_extra": [{"text": "two", "filename": "a.py"}], "prompt": "two"}
        longer = engine._preparer.prepare(content_of(infill=extra), 512).prompts[0]
        assert longer[longer.index(11) - len(four) : longer.index(11)] == four and len(longer) > len(prompt)
        long = engine._preparer.prepare(content_of(infill={**gap, "input_prefix": TEXT * 90}), 512).prompts[0]
        assert len(long) < 256
        assert chunks_of(engine, infill=gap, max_tokens=2)[-1].completion_tokens == 2


@pytest.fixture
def reranker(sample: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Qwen3 that says yes or no: its score is the probability of yes."""
    import gguf

    from arriero import sample_models

    tensors = sample_models._tensors

    def with_a_head(kind: Any, shape: Any) -> Any:
        for name, dims, fill in tensors(kind, shape):
            yield name, dims, fill
            if name.endswith("attn_k.weight"):
                for norm in ("attn_q_norm", "attn_k_norm"):
                    yield name.replace("attn_k", norm), (shape.head_dim,), ("constant", 1.0)
        yield "cls.output.weight", (2, shape.n_embd), ("normal", 0.1)

    def ranks(writer: Any) -> None:
        writer.add_pooling_type(gguf.PoolingType.RANK)
        writer.add_array("qwen3.classifier.output_labels", ["yes", "no"])

    monkeypatch.setattr(sample_models, "_tensors", with_a_head)
    return written(sample, monkeypatch, ranks, kind="qwen3", n_layer=1)


def test_a_reranker_scores_each_document(reranker: Path, spec: Any) -> None:
    documents = ["Salt is carried over the pass.", "A bell.", "Maize and rope " * 3, "A bell."]
    with closing(Engine(spec(reranker, n_ctx=1024, n_seq_max=4, kv_unified=True, embeddings=True))) as engine:
        content = content_of(rerank={"query": "Who carries salt?", "documents": documents})
        scores = [next(iter(each.vector)) for each in engine.embed(EmbedRequest(content, "r", rerank=True))]
        assert all(0 < score < 1 for score in scores) and len(scores) == 4
        assert scores[1] == pytest.approx(scores[3], abs=1e-3)
        assert len({round(score, 3) for score in scores}) == 3
        with pytest.raises(Rejected, match="has scores, not embeddings"):
            engine.embed(EmbedRequest(content_of(inputs=["x"]), "r"))
        with pytest.raises(Rejected, match="document with the query is"):
            content = content_of(rerank={"query": TEXT * 99, "documents": documents})
            engine.embed(EmbedRequest(content, "r", rerank=True))


def test_vectors_are_cut_only_where_the_catalogue_says_so(spec: Any) -> None:
    plain = spec(Path("model.gguf"))
    refuse_cut(plain, 128, 128)
    refuse_cut(replace(plain, matryoshka_dimensions="any"), 128, 1)
    with pytest.raises(Rejected, match=r"have 128, and the catalogue does not say .*set matryoshka_dimensions"):
        refuse_cut(plain, 128, 64)
    with pytest.raises(Rejected, match="dimensions is 129"):
        refuse_cut(replace(plain, matryoshka_dimensions="any"), 128, 129)


def test_vectors_are_cut_and_scaled(sample: Any, spec: Any) -> None:
    trained = replace(spec(sample("llama", n_layer=2), n_ctx=512, embeddings=True), matryoshka_dimensions=(16, 64))
    with closing(Engine(trained)) as engine:
        (whole,) = engine.embed(EmbedRequest(content_of(inputs=[TEXT]), "r"))
        (cut,) = engine.embed(EmbedRequest(content_of(inputs=[TEXT]), "r", dimensions=16))
        expected = np.array(whole.vector[:16])
        np.testing.assert_allclose(cut.vector, expected / np.linalg.norm(expected), rtol=1e-3)
        with pytest.raises(Rejected, match=r"can have 16, 64, 128. Ask for one of these"):
            engine.embed(EmbedRequest(content_of(inputs=[TEXT]), "r", dimensions=32))
        with pytest.raises(Rejected, match="is no reranker"):
            engine.embed(EmbedRequest(content_of(rerank={"query": "a", "documents": ["b"]}), "r", rerank=True))
