"""llama-server's own routes, and reranking, by hand: no official client speaks them."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest
from gateway_fakes import MODEL, FakeBackend, content, web

from actors.gateway.llama_server_requests import MAX_EXAMINED
from actors.serving.protocol import Chunk, EmbedResult, Likelihood, Sampling

DOCUMENTS = ["salt", {"text": "rope"}, "maize"]


def asked(backend: FakeBackend, what: str = "generate") -> Any:
    return backend.saw(what)[-1][-1]


def test_a_completion_whole_and_streamed(url: str, backend: FakeBackend) -> None:
    likely = (Likelihood(5, b"lo", -0.5, ((5, b"lo", -0.5),)),)
    backend.answers.append((Chunk("Hel"), Chunk("lo", likelihoods=likely), Chunk("", "length", 7, 3, 2)))
    body = {
        "model": MODEL,
        "prompt": "p",
        "n_predict": 2,
        "n_probs": 1,
        "temperature": 0,
        "seed": -1,
        "cache_prompt": 1,
    }
    told = web.post(f"{url}/completion", json=body).json()
    assert (told["content"], told["stop"], told["stop_type"]) == ("Hello", True, "limit")
    assert (told["tokens_evaluated"], told["tokens_cached"], told["tokens_predicted"]) == (7, 3, 2)
    assert told["completion_probabilities"][0]["top_logprobs"][0]["logprob"] == -0.5
    request = asked(backend)
    assert (request.max_tokens, request.n_probs, request.sampling) == (2, 1, Sampling(temperature=0))
    with web.stream("POST", f"{url}/completion", json={**body, "stream": True}) as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]
    assert [event["content"] for event in events] == ["Hel", "lo", ""]
    assert [event["stop"] for event in events] == [False, False, True]


def test_a_gap(url: str, backend: FakeBackend) -> None:
    extra = [{"text": "x", "filename": "a.py"}]
    body = {"model": MODEL, "input_prefix": "def f(", "input_suffix": "return", "input_extra": extra, "prompt": "a"}
    assert web.post(f"{url}/infill", json=body).json()["content"] == "Hello"
    gap = {"input_prefix": "def f(", "input_suffix": "return", "input_extra": extra, "prompt": "a"}
    assert content(asked(backend)) == {"infill": gap}
    reply = web.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "def f(", "suffix": "return"})
    assert reply.json()["choices"][0]["text"] == "Hello"
    assert content(asked(backend)) == {"infill": {"input_prefix": "def f(", "input_suffix": "return"}}


@pytest.mark.parametrize(
    ("route", "body", "seen"),
    [
        (
            "tokenize",
            {"content": "a b", "add_special": True, "with_pieces": True},
            {"tokenize": "a b", "add_special": True, "parse_special": True, "with_pieces": True},
        ),
        ("detokenize", {"tokens": [1, 2]}, {"detokenize": [1, 2]}),
        (
            "apply-template",
            {"messages": [{"role": "user", "content": "Hi"}]},
            {"apply_template": {"messages": [{"role": "user", "content": "Hi"}]}},
        ),
    ],
)
def test_questions_are_answered_by_the_runner(
    url: str, backend: FakeBackend, route: str, body: dict[str, Any], seen: dict[str, Any]
) -> None:
    backend.answers.append((Chunk('{"tokens": [1]}', "stop"),))
    reply = web.post(f"{url}/{route}", json={"model": MODEL, **body})
    assert reply.json() == {"tokens": [1]} and reply.headers["content-type"] == "application/json"
    assert content(asked(backend))["examine"] == seen


def test_documents_are_ranked(url: str, backend: FakeBackend) -> None:
    backend.embeddings.append(EmbedResult(tuple(array("f", [score]) for score in (0.25, 0.75, 0.5)), 12))
    body = {"model": MODEL, "query": "q", "documents": DOCUMENTS, "top_n": 2, "return_documents": True}
    told = web.post(f"{url}/v1/rerank", json=body).json()
    assert told["results"] == [
        {"index": 1, "relevance_score": 0.75, "document": {"text": "rope"}},
        {"index": 2, "relevance_score": 0.5, "document": {"text": "maize"}},
    ]
    assert told["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    request = asked(backend, "embed")
    assert request.rerank and content(request) == {"rerank": {"query": "q", "documents": ["salt", "rope", "maize"]}}


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("completion", {"prompt": ["a", "b"]}, "prompt"),
        ("completion", {"prompt": "a", "grammar": "root ::= x", "json_schema": {}}, "grammar"),
        ("infill", {"input_prefix": "a"}, "input_suffix"),
        ("tokenize", {"content": "x" * (MAX_EXAMINED + 1)}, "content"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("apply-template", {"messages": []}, "messages"),
        ("v1/rerank", {"query": "q", "documents": []}, "documents"),
        ("v1/rerank", {"query": "q", "documents": ["x" * 600_000] * 2, "return_documents": True}, "return_documents"),
        ("v1/rerank", {"query": "q", "documents": ["x"], "top_n": 0}, "top_n"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    url: str, backend: FakeBackend, route: str, body: dict[str, Any], param: str
) -> None:
    reply = web.post(f"{url}/{route}", json={"model": MODEL, **body})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert not backend.saw("acquire")
