"""The official OpenAI client against the gateway, and what that client never sends."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from gateway_fakes import MODEL, FakeBackend, content, serve, web

from actors.serving.protocol import Chunk, EmbedRequest, GenerateRequest, Sampling
from scheduler.errors import EngineFailed, Impossible, QueueFull, Rejected

HELLO = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def asked(backend: FakeBackend) -> GenerateRequest:
    (_, request), *_ = backend.wait_for("generate")
    assert isinstance(request, GenerateRequest)
    return request


def test_chat(client: openai.OpenAI, backend: FakeBackend) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=HELLO)  # type: ignore[arg-type]
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello", "stop")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (7, 2, 9)
    assert reply.id.startswith("chatcmpl-") and reply.model == MODEL
    assert backend.wait_for("acquire")[0][0].request_id == reply.id
    assert content(asked(backend)) == {"messages": [{"role": "user", "content": "Hi"}]}
    ((_, ending, usage),) = backend.wait_for("release")
    assert ending == "served" and (usage.prompt_tokens, usage.completion_tokens) == (7, 2)


def test_chat_stream(client: openai.OpenAI, backend: FakeBackend) -> None:
    events = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))  # type: ignore[arg-type]
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == "Hello"
    assert [event.choices[0].finish_reason for event in events] == [None, None, "stop"]
    assert all(event.usage is None for event in events)
    assert len({event.id for event in events}) == 1


def test_stream_tells_usage_when_asked(client: openai.OpenAI) -> None:
    events = list(
        client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}  # type: ignore[arg-type]
        )
    )  # fmt: skip
    assert events[-1].choices == [] and events[-1].usage is not None
    assert events[-1].usage.total_tokens == 9
    assert all(event.usage is None for event in events[:-1])


def test_completion(client: openai.OpenAI, backend: FakeBackend) -> None:
    reply = client.completions.create(model=MODEL, prompt="Once", max_tokens=4)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("Hello", "stop")
    assert (content(asked(backend)), asked(backend).max_tokens) == ({"prompt": "Once"}, 4)


def test_completion_stream_of_tokens(client: openai.OpenAI, backend: FakeBackend) -> None:
    events = list(client.completions.create(model=MODEL, prompt=[5, 6, 7], stream=True))
    assert "".join(event.choices[0].text for event in events) == "Hello"
    assert content(asked(backend)) == {"prompt": [5, 6, 7]}


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_embeddings(client: openai.OpenAI, encoding: Any) -> None:
    more = {} if encoding is None else {"encoding_format": encoding}
    reply = client.embeddings.create(model=MODEL, input=["one", "two"], **more)
    assert [item.index for item in reply.data] == [0, 1]
    for item in reply.data:
        vector: Any = item.embedding
        if isinstance(vector, str):
            vector = struct.unpack("<2f", base64.b64decode(vector))
        assert list(vector) == pytest.approx([0.6, -0.8])
    assert reply.usage.prompt_tokens == 10


@pytest.mark.parametrize(
    ("given", "inputs"),
    [("text", ["text"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_embedding_inputs(client: openai.OpenAI, backend: FakeBackend, given: Any, inputs: Any) -> None:
    client.embeddings.create(model=MODEL, input=given)
    ((_, request),) = backend.wait_for("embed")
    assert isinstance(request, EmbedRequest) and content(request) == {"inputs": inputs}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "team/big"]
    assert client.models.retrieve("team/big").owned_by == "arriero"
    assert client.models.retrieve(MODEL).created == 12
    with pytest.raises(openai.NotFoundError, match="'nope'"):
        client.models.retrieve("nope")


def test_an_unknown_model_is_not_found(client: openai.OpenAI, backend: FakeBackend) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="nope", messages=HELLO, stream=stream)  # type: ignore[call-overload]
        assert caught.value.code == "model_not_found"
        assert caught.value.type == "invalid_request_error"
    assert not backend.saw("release")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Rejected("prompt is 5000 tokens; the slot holds 4096"), 400, "invalid_request"),
        (Impossible("needs 80 GiB, the cluster has 24 GiB"), 422, "impossible"),
        (QueueFull("64 requests wait already", retry_after_s=2.5), 429, "queue_full"),
    ],
)
def test_refusals_have_a_status_and_a_code(
    client: openai.OpenAI, backend: FakeBackend, error: Any, status: int, code: str
) -> None:
    backend.acquisitions.append(error)
    with pytest.raises(openai.APIStatusError, match=error.message) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)  # type: ignore[arg-type]
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.response.headers.get("retry-after") == ("3" if code == "queue_full" else None)


def test_an_error_in_mid_stream_is_an_event(client: openai.OpenAI, backend: FakeBackend) -> None:
    backend.answers.append((Chunk("Hel"), EngineFailed("the process that ran tiny ended")))
    texts = []
    with pytest.raises(openai.APIError, match="the process that ran tiny ended"):
        for event in client.chat.completions.create(model=MODEL, messages=HELLO, stream=True):  # type: ignore[arg-type]
            texts.append(event.choices[0].delta.content)
    assert texts == ["Hel"]
    ((_, ending, _),) = backend.wait_for("release")
    assert ending == "failed"


def test_with_a_key(backend: FakeBackend) -> None:
    with serve(backend, api_keys={"": "s3cret"}) as url:
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="ARRIERO_API_KEY"),
        ):
            client.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0) as client:
            assert client.chat.completions.create(model=MODEL, messages=HELLO).choices  # type: ignore[arg-type]


def test_every_setting_reaches_the_engine(url: str, backend: FakeBackend) -> None:
    reply = web.post(
        f"{url}/v1/chat/completions",
        json={
            "model": MODEL, "messages": HELLO, "max_completion_tokens": 9, "max_tokens": 3, "stop": "END",
            "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repeat_penalty": 1.2, "presence_penalty": 0.3,
            "frequency_penalty": -0.4, "seed": 42, "logit_bias": {"17": -100},
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}},
            "n_ctx": 2048, "deadline_s": 30, "user": "me", "a_field_of_tomorrow": 1,
            "dynatemp_range": 0.5, "dynatemp_exponent": 1.5, "typical_p": 0.9, "top_n_sigma": 2, "xtc_probability": 0.5,
            "xtc_threshold": 0.2, "repeat_last_n": -1, "dry_multiplier": 0.8, "dry_base": 2, "dry_allowed_length": 3,
            "dry_penalty_last_n": 100, "dry_sequence_breakers": ["."], "mirostat": 2, "mirostat_tau": 4,
            "mirostat_eta": 0.2, "adaptive_target": 0.5, "adaptive_decay": 0.8, "min_keep": 2, "ignore_eos": True,
            "samplers": ["top-k", "temp", "typ", "adaptive_p"], "min_tokens": 2, "n": 3, "logprobs": True,
            "top_logprobs": 4, "thinking_budget_tokens": 50,
        },
    )  # fmt: skip
    assert reply.status_code == 200
    request = asked(backend)
    assert (request.max_tokens, request.stop, request.n, request.n_probs) == (9, ("END",), 3, 4)
    assert request.sampling == Sampling(
        temperature=0.0, top_p=0.5, top_k=7, min_p=0.1, repeat_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=-0.4, seed=42, logit_bias={17: -100.0}, dynatemp_range=0.5, dynatemp_exponent=1.5,
        typ_p=0.9, top_n_sigma=2, xtc_probability=0.5, xtc_threshold=0.2, repeat_last_n=-1, dry_multiplier=0.8,
        dry_base=2, dry_allowed_length=3, dry_penalty_last_n=100, dry_sequence_breakers=(".",), mirostat=2,
        mirostat_tau=4, mirostat_eta=0.2, adaptive_target=0.5, adaptive_decay=0.8, min_keep=2, ignore_eos=True,
        samplers=("top_k", "temperature", "typ_p", "adaptive_p"), min_tokens=2,
    )  # fmt: skip
    assert content(request)["thinking_budget_tokens"] == 50
    assert content(request)["json_schema"] == {"type": "integer"}
    ((need,),) = backend.saw("acquire")
    assert (need.n_ctx, need.deadline_s, need.kind) == (2048, 30.0, "generate")


def test_settings_left_out_are_llama_cpps(client: openai.OpenAI, backend: FakeBackend) -> None:
    client.chat.completions.create(model=MODEL, messages=HELLO)  # type: ignore[arg-type]
    assert asked(backend).sampling == Sampling()
    assert (asked(backend).max_tokens, asked(backend).stop) == (None, ())


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        ({"max_tokens": -1}, {"max_tokens": None}),
        ({"stop": ["a", "", "b"]}, {"stop": ("a", "b")}),
        ({"seed": -1}, {"sampling": Sampling()}),
        ({"max_tokens": 0}, {"max_tokens": 0}),
        ({"samplers": "kpt"}, {"sampling": Sampling(samplers=("top_k", "top_p", "temperature"))}),
        (
            {"logit_bias": [[5, False], ["yes", 2]]},
            {"sampling": Sampling(logit_bias={5: -100}), "logit_bias": {"yes": 2}},
        ),
        ({"logit_bias": {}}, {"sampling": Sampling(logit_bias={})}),
        ({"logit_bias": []}, {"sampling": Sampling(logit_bias={})}),
        ({"logit_bias": {"7": 1, "no": -3}}, {"sampling": Sampling(logit_bias={7: 1}), "logit_bias": {"no": -3}}),
        ({"logprobs": True}, {"n_probs": 0}),
        ({"n_probs": 3}, {"n_probs": 3}),
        ({"reasoning_budget_tokens": 9}, {"thinking_budget_tokens": 9}),
        ({"thinking_budget_tokens": -1}, {"thinking_budget_tokens": None}),
        ({"seed": 2**40 + 5}, {"sampling": Sampling(seed=5)}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": {}}),
        ({"response_format": {"type": "json_object", "schema": {"type": "array"}}}, {"json_schema": {"type": "array"}}),
        ({"response_format": {"type": "text"}, "n": 1, "tools": []}, {"json_schema": None}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            {"messages": [{"role": "user", "content": "ab"}]},
        ),
        (
            {"messages": [{"role": "tool", "content": "4", "tool_call_id": "c1"}]},
            {"messages": [{"role": "tool", "content": "4", "tool_call_id": "c1"}]},
        ),
        ({"messages": [{"role": "assistant"}]}, {"messages": [{"role": "assistant", "content": None}]}),
    ],
)
def test_spellings(url: str, backend: FakeBackend, body: dict[str, Any], seen: dict[str, Any]) -> None:
    reply = web.post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": HELLO, **body})
    assert reply.status_code == 200, reply.text
    request = asked(backend)
    assert {name: getattr(request, name, content(request).get(name)) for name in seen} == seen


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("chat/completions", {"n": 129}, "n"),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"functions": [{"description": "f"}]}, "functions"),
        ("chat/completions", {"tools": [TOOL], "functions": [{"name": "f"}]}, "functions"),
        ("chat/completions", {"tools": [TOOL] * 129}, "tools"),
        ("chat/completions", {"tools": [TOOL], "tool_choice": {"function": {"name": "other"}}}, "tool_choice"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"tools": [TOOL], "grammar": "root ::= x"}, "grammar"),
        ("completions", {"response_format": {"type": "json_object"}, "grammar": "root ::= x"}, "grammar"),
        ("chat/completions", {"tool_choice": "sometimes"}, "tool_choice"),
        (
            "chat/completions",
            {"chat_template_kwargs": {"enable_thinking": "no"}},
            "chat_template_kwargs",
        ),
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 101}, "top_logprobs"),
        ("chat/completions", {"samplers": ["dice"]}, "samplers"),
        ("chat/completions", {"mirostat": 3}, "mirostat"),
        ("chat/completions", {"logit_bias": [["x" * 65, 1]]}, "logit_bias"),
        ("chat/completions", {"thinking_budget_tokens": -2}, "thinking_budget_tokens"),
        ("chat/completions", {"modalities": ["audio"]}, "modalities"),
        ("chat/completions", {"max_tokens": -2}, "max_tokens"),
        ("chat/completions", {"stop": ["x"] * 33}, "stop"),
        ("chat/completions", {"temperature": -1}, "temperature"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"model": ""}, "model"),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ("completions", {"suffix": "end", "prompt": [1, 2]}, "suffix"),
        ("completions", {"logprobs": 101}, "logprobs"),
        ("completions", {"best_of": 3}, "best_of"),
        ("completions", {"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("embeddings", {"dimensions": 0}, "dimensions"),
        ("embeddings", {"input": ["a", ""]}, "input"),
        ("embeddings", {"input": ["a"] * 2049}, "input"),
        ("embeddings", {"encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    url: str, backend: FakeBackend, route: str, body: dict[str, Any], param: str
) -> None:
    whole = {"model": MODEL, "messages": HELLO, "prompt": "p", "input": "i", **body}
    reply = web.post(f"{url}/v1/{route}", json=whole)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param in error["message"]
    assert not backend.saw("acquire")


@pytest.mark.parametrize("route", ["chat/completions", "completions", "embeddings"])
def test_half_a_surrogate_pair_is_the_callers_fault(url: str, backend: FakeBackend, route: str) -> None:
    body = (
        b'{"model": "m", "prompt": "\\ud800", "input": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}'
    )
    reply = web.post(f"{url}/v1/{route}", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and "half of a surrogate pair" in reply.json()["error"]["message"]
    assert not backend.saw("acquire")


@pytest.mark.parametrize("route", ["chat/completions", "completions", "embeddings"])
def test_a_body_that_does_not_come_as_json_is_the_callers_fault(url: str, route: str) -> None:
    reply = web.post(f"{url}/v1/{route}", content=b'{"model": "m"}', headers={"Content-Type": "text/plain"})
    assert reply.status_code == 400 and "Content-Type: application/json" in reply.json()["error"]["message"]


def test_chats_that_begin_alike_are_known_as_such(client: openai.OpenAI, backend: FakeBackend) -> None:
    """What is said later does not change what a chat begins with."""
    later = [*HELLO, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And then?"}]
    for messages in (HELLO, later, [{"role": "user", "content": "Something else"}]):
        client.chat.completions.create(model=MODEL, messages=messages)  # type: ignore[arg-type]
    first, on, other = [request.prefix for (request,) in backend.wait_for("acquire", 3)]
    assert first and first == on != other
