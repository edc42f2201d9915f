"""Ollama's routes, asked by Ollama's own client and by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import ollama
import pytest
from gateway_fakes import MODEL, FakeBackend, Gate, content, serve, web

from actors.gateway.ollama_requests import seconds_of
from actors.serving.message import Message
from actors.serving.ollama_reply import OllamaReply
from actors.serving.protocol import Chunk, Delta, EmbedResult, GenerateRequest, ReplyForm, Timings
from scheduler.errors import EngineFailed, Unavailable

HELLO = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def url(backend: FakeBackend) -> Iterator[str]:
    with serve(backend, pulse_s=0.1) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[ollama.Client]:
    with closing(ollama.Client(url, trust_env=False)) as client:
        yield client


def asked(backend: FakeBackend) -> GenerateRequest:
    request = backend.saw("generate")[-1][-1]
    assert isinstance(request, GenerateRequest)
    return request


def test_a_chat_whole_and_streamed(client: ollama.Client, backend: FakeBackend) -> None:
    whole = client.chat(f"{MODEL}:latest", HELLO)
    assert (whole.message.role, whole.message.content, whole.done, whole.done_reason) == (
        "assistant", "Hello", True, "stop",
    )  # fmt: skip
    assert (whole.prompt_eval_count, whole.eval_count, whole.model) == (7, 2, f"{MODEL}:latest")
    assert whole.total_duration is not None and whole.total_duration >= 0
    parts = list(client.chat(MODEL, HELLO, stream=True))
    assert [part.message.content for part in parts] == ["Hel", "lo", ""]
    assert [part.done for part in parts] == [False, False, True] and parts[-1].eval_count == 2
    assert content(asked(backend)) == {"messages": [{"role": "user", "content": "Hi"}]}


def test_options_format_thinking_and_tools_are_passed_on(client: ollama.Client, backend: FakeBackend) -> None:
    called = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "sun", "tool_name": "weather"},
    ]
    options = {"num_ctx": 9000, "num_predict": 5, "temperature": 0, "seed": 3, "stop": ["x"], "num_gpu": 99}
    client.chat(MODEL, called, tools=[TOOL], format={"type": "object"}, think=False, options=options)
    request = asked(backend)
    said = content(request)
    assert said["tools"][0]["function"]["name"] == "weather" and said["json_schema"] == {"type": "object"}
    assert said["chat_template_kwargs"] == {"enable_thinking": False}
    call = said["messages"][1]["tool_calls"][0]
    assert call["function"] == {"name": "weather", "arguments": '{"a": 1}'} and call["type"] == "function"
    assert (said["messages"][2]["name"], said["messages"][2]["content"]) == ("weather", "sun")
    assert (request.max_tokens, request.stop) == (5, ("x",))
    assert (request.sampling.temperature, request.sampling.seed) == (0, 3)
    need = backend.saw("acquire")[-1][-1]
    assert (need.model, need.n_ctx) == (MODEL, 9000)
    client.chat(MODEL, HELLO, format="json", think="high")
    assert content(asked(backend))["json_schema"] == {} and content(asked(backend))["reasoning_effort"] == "high"


def test_generate_goes_through_the_template_unless_it_is_raw(client: ollama.Client, backend: FakeBackend) -> None:
    assert client.generate(MODEL, "Hi", system="Be kind").response == "Hello"
    assert content(asked(backend))["messages"] == [{"role": "system", "content": "Be kind"}, *HELLO]
    assert "".join(part.response or "" for part in client.generate(MODEL, "Hi", raw=True, stream=True)) == "Hello"
    assert content(asked(backend)) == {"prompt": "Hi"}


def test_a_request_without_a_question_loads_and_keep_alive_ends_or_pins(
    client: ollama.Client, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[tuple[str, Any]] = []

    async def unload(model: str, unless_wanted: bool) -> None:
        assert unless_wanted
        orders.append(("unload", model))

    monkeypatch.setattr(backend, "unload", unload)
    assert client.generate(MODEL).done_reason == "load"
    assert [name for name, *_ in backend.journal] == ["load"] and not orders
    assert client.generate(MODEL, keep_alive=0).done_reason == "unload"
    assert client.chat(MODEL, keep_alive=-1).done_reason == "load"
    list(client.chat(MODEL, HELLO, stream=True, keep_alive="0s"))
    client.chat(MODEL, HELLO, keep_alive="5m")
    assert backend.saw("keep_alive") == [(MODEL, -1.0), (MODEL, 300.0)]
    assert orders == [("unload", MODEL)] * 2


def test_who_leaves_has_the_model_kept_as_it_asked(
    url: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unload(model: str, unless_wanted: bool) -> None:
        backend.note("unload", model, unless_wanted)

    monkeypatch.setattr(backend, "unload", unload)
    backend.answers.append([Chunk("Hel"), Gate()])
    body = {"model": MODEL, "messages": HELLO, "keep_alive": 0}
    with httpx.Client(trust_env=False) as web_client, web_client.stream("POST", f"{url}/api/chat", json=body) as answer:
        assert "Hel" in next(answer.iter_lines())
    assert backend.wait_for("unload") == [(MODEL, True)]
    assert backend.saw("release"), "before that"


def test_a_model_that_did_not_answer_is_not_pinned(url: str, backend: FakeBackend) -> None:
    backend.answers.append([Unavailable("no room", retry_after_s=1.0)])
    body = {"model": MODEL, "messages": HELLO, "keep_alive": -1}
    assert httpx.post(f"{url}/api/chat", json=body, trust_env=False).status_code == 503
    assert not backend.saw("keep_alive")


def test_null_is_what_is_not_there(url: str, backend: FakeBackend) -> None:
    body = {"model": MODEL, "stream": None, "format": None, "options": None, "tools": None}
    message = {"role": "assistant", "content": None, "tool_calls": None}
    answer = httpx.post(f"{url}/api/chat", json={**body, "messages": [*HELLO, message]}, trust_env=False)
    assert answer.status_code == 200 and answer.text.count("\n") == 3, "a stream"
    assert content(asked(backend))["messages"][1] == {"role": "assistant", "content": ""}
    assert httpx.head(f"{url}/api/ps", trust_env=False).status_code == 200


def test_vectors(client: ollama.Client, backend: FakeBackend) -> None:
    backend.embeddings.append(EmbedResult(((0.5, 0.25), (1.0, 0.0)), 9))
    embedded = client.embed(MODEL, ["a", "b"])
    assert [list(vector) for vector in embedded.embeddings] == [[0.5, 0.25], [1.0, 0.0]]
    assert embedded.prompt_eval_count == 9
    assert list(client.embeddings(MODEL, "a").embedding) == pytest.approx([0.6, -0.8])


def test_durations_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that came 0.9 s after the full second waits for nothing."""
    monkeypatch.setattr("actors.serving.ollama_reply.time.time", lambda: 1000.95)
    reply = OllamaReply(ReplyForm("ollama-chat", created=1000.9))
    told = json.loads(reply.bytes_of(Chunk("Hi", "stop", 3, 0, 1, timings=Timings(0.01, 0.02))))
    assert told["total_duration"] == pytest.approx(0.05e9, rel=1e-3)
    assert told["load_duration"] == pytest.approx(0.02e9, rel=1e-3)


def test_what_is_there(client: ollama.Client, url: str) -> None:
    listed = client.list().models
    assert [model.model for model in listed] == [MODEL, "team/big"]
    assert listed[0].details is not None and listed[0].details.family == "llama"
    (running,) = client.ps().models
    assert (running.model, running.context_length) == (MODEL, 4096)
    shown = client.show(f"{MODEL}:latest")
    assert shown.capabilities == ["completion", "tools", "vision"]
    assert client.show("team/big").capabilities == ["embedding"]
    with pytest.raises(ollama.ResponseError, match="not found") as missing:
        client.show("nothing")
    assert missing.value.status_code == 404
    for method in ("GET", "HEAD"):
        assert web.request(method, f"{url}/").status_code == 200
        assert web.request(method, f"{url}/api/version").status_code == 200
    assert web.get(f"{url}/").text == "Ollama is running"


def test_what_the_catalogue_rules_is_said(client: ollama.Client) -> None:
    for order in (lambda: client.pull("x"), lambda: client.delete("x"), lambda: client.copy("x", "y")):
        with pytest.raises(ollama.ResponseError, match="catalogue"):
            order()


def test_errors_come_in_ollamas_shape(client: ollama.Client, backend: FakeBackend, url: str) -> None:
    with pytest.raises(ollama.ResponseError, match="no model 'nope'") as unknown:
        client.chat("nope", HELLO)
    assert unknown.value.status_code == 404
    backend.acquisitions.append(Unavailable("not now"))
    with pytest.raises(ollama.ResponseError, match="not now"):
        list(client.chat(MODEL, HELLO, stream=True))
    backend.answers.append((Chunk("Hel"), EngineFailed("it broke")))
    parts = []
    with pytest.raises(ollama.ResponseError, match="it broke"):
        for part in client.chat(MODEL, HELLO, stream=True):
            parts.append(part.message.content)
    assert parts == ["Hel"]
    for body in ({"model": MODEL, "messages": 7}, {"model": MODEL, "messages": HELLO, "keep_alive": "soon"}):
        reply = web.post(f"{url}/api/chat", json=body)
        assert reply.status_code == 400 and isinstance(reply.json()["error"], str)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [(7, 7), (-1, -1), ("0", 0), ("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), ("-1", -1), ("-5m", -300),
     ("250ms", 0.25), ("soon", None), ("5 minutes", None), ("1" * 4000 + "x", None), ("1.1" * 1000, None)],
)  # fmt: skip
def test_durations(said: object, seconds: float | None) -> None:
    if seconds is None:
        with pytest.raises(ValueError, match="duration"):
            seconds_of(said)
    else:
        assert seconds_of(said) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x", "template": "y"},
        {"prompt": "x", "images": ["abc"], "raw": True},
        {"prompt": "x", "options": {"num_predict": -3}},
        {"prompt": "x", "options": {"stop": ["s"] * 33}},
    ],
)
def test_what_cannot_be_is_refused_by_name(url: str, body: dict[str, Any]) -> None:
    reply = web.post(f"{url}/api/generate", json={"model": MODEL, **body})
    assert reply.status_code == 400 and next(name for name in body if name != "prompt") in reply.json()["error"]


def test_a_body_needs_no_content_type_and_silence_no_lines(url: str, backend: FakeBackend) -> None:
    gate = Gate()
    backend.acquisitions.append(gate)
    body = json.dumps({"model": MODEL, "messages": HELLO}).encode()
    threading.Timer(0.5, gate.open).start()  # several times as long as the pulse
    with httpx.stream("POST", f"{url}/api/chat", content=body, timeout=60) as answer:
        assert not answer.request.headers.get("content-type")
        lines = [json.loads(line) for line in answer.iter_lines()]
    assert answer.headers["content-type"] == "application/x-ndjson" and lines[-1]["done"]


# ---------------------------------------------------------------------- parsed answers

DELTAS = (
    Delta(reasoning="Let me "), Delta(reasoning="see."), Delta(content="I look."),
    Delta(tool=0, name="weather"), Delta(tool=0, arguments='{"city"'), Delta(tool=0, arguments=': "Lima"}'),
    Delta(tool=1, name="time"), Delta(tool=2, name="broken", arguments='{"a": '),
)  # fmt: skip
LAST = Chunk("", "stop", 9, 2, 30, deltas=())
CALLS = [("weather", {"city": "Lima"}), ("time", {}), ("broken", {})]


def functions(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]


def test_a_stream_tells_calls_when_they_are_whole() -> None:
    reply = OllamaReply(ReplyForm("ollama-chat", stream=True, model="m"))
    said = b"".join(reply.bytes_of(Chunk("", deltas=(delta,))) for delta in DELTAS) + reply.bytes_of(LAST)
    lines = [json.loads(line) for line in said.splitlines()]
    assert "".join(line["message"].get("thinking", "") for line in lines) == "Let me see."
    assert "".join(line["message"]["content"] for line in lines) == "I look."
    assert [call for line in lines for call in functions(line["message"])] == CALLS
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]


def test_a_whole_answer_has_everything() -> None:
    reply = OllamaReply(ReplyForm("ollama-chat", model="m"))
    assert not any(reply.bytes_of(Chunk("", deltas=(delta,))) for delta in DELTAS)
    told = json.loads(reply.bytes_of(LAST))
    assert (told["message"]["thinking"], told["message"]["content"]) == ("Let me see.", "I look.")
    assert functions(told["message"]) == CALLS and told["done"]


def test_a_message_is_what_its_deltas_say() -> None:
    message = Message()
    for delta in DELTAS:
        message.add(delta)
    assert (message.content, message.thoughts) == ("I look.", "Let me see.")
    assert next((call.name, call.arguments) for call in message.calls.values()) == ("weather", '{"city": "Lima"}')
