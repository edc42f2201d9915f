"""Ollama's client asks real models for chats, completions and vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from typing import Any

import ollama
import pytest
from real_models import CALLER, CITIES, CITY, N_CTX_SLOT, SAMPLE, Served

pytestmark = pytest.mark.llama

HELLO: Any = [{"role": "user", "content": "Where is the salt?"}]
ASKED: dict[str, Any] = {
    "model": SAMPLE, "messages": HELLO, "think": False, "options": {"temperature": 0, "num_predict": 8},
}  # fmt: skip
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": CITY}}
CALLS: dict[str, Any] = {
    **ASKED, "model": CALLER, "tools": [WEATHER], "options": {"temperature": 0, "num_predict": 500},
}  # fmt: skip


@pytest.fixture
def backend(real_models: tuple[str, Served]) -> Served:
    _, backend = real_models
    backend.orders.clear()
    return backend


@pytest.fixture
def client(real_models: tuple[str, Served]) -> Iterator[ollama.Client]:
    with closing(ollama.Client(real_models[0], trust_env=False)) as client:
        yield client


def test_a_chat_whole_and_streamed(client: ollama.Client) -> None:
    whole = client.chat(**ASKED)
    assert (whole.model, whole.message.role, whole.done, whole.done_reason) == (SAMPLE, "assistant", True, "length")
    assert whole.message.content and not whole.message.thinking and not whole.message.tool_calls
    assert whole.prompt_eval_count is not None and whole.prompt_eval_count > 10 and whole.eval_count == 8
    assert all(
        each is not None and each >= 0
        for each in (whole.total_duration, whole.load_duration, whole.prompt_eval_duration, whole.eval_duration)
    )
    assert whole.eval_duration and datetime.fromisoformat(str(whole.created_at).replace("Z", "+00:00"))
    *parts, last = client.chat(**ASKED, stream=True)
    assert "".join(part.message.content or "" for part in (*parts, last)) == whole.message.content
    assert not any(part.done for part in parts) and (last.done, last.done_reason, last.eval_count) == (
        True,
        "length",
        8,
    )
    assert last.prompt_eval_count == whole.prompt_eval_count


def test_thoughts_are_apart_from_the_answer(client: ollama.Client) -> None:
    """Nothing limits them here, and the sample model would think for ever."""
    whole = client.chat(**{**ASKED, "think": True})
    assert whole.message.thinking and not whole.message.content
    parts = list(client.chat(**{**ASKED, "think": True}, stream=True))
    assert "".join(part.message.thinking or "" for part in parts) == whole.message.thinking
    again = client.chat(**{**ASKED, "messages": [*HELLO, whole.message, *HELLO]})
    assert again.prompt_eval_count is not None and whole.prompt_eval_count is not None
    assert again.prompt_eval_count > whole.prompt_eval_count


def test_a_tool_is_called_whole_and_streamed(client: ollama.Client) -> None:
    """There is no tool_choice here: a model must want to call. This one does; its arguments follow the schema."""
    whole = client.chat(**CALLS)
    assert whole.message.tool_calls and whole.done_reason == "stop"
    (call,) = whole.message.tool_calls
    assert call.function.name == "weather" and call.function.arguments["city"] in CITIES
    parts = list(client.chat(**CALLS, stream=True))
    called = [call for part in parts for call in part.message.tool_calls or ()]
    assert called == [call] and parts[-1].done and not parts[-1].message.tool_calls
    result = {"role": "tool", "content": "drizzle", "tool_name": "weather"}
    history = [*HELLO, whole.message, result]
    again = client.chat(**{**CALLS, "messages": history, "options": {"temperature": 0, "num_predict": 5}})
    assert again.prompt_eval_count is not None and whole.prompt_eval_count is not None
    assert again.prompt_eval_count > whole.prompt_eval_count


def weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: of Peru
    """
    return f"drizzle in {city}"


def test_a_function_of_python_is_a_tool(client: ollama.Client) -> None:
    """The client makes the tool of it. Its text would have no end: the client's own schema has no values to choose."""
    whole = client.chat(**{**CALLS, "tools": [weather], "options": {"temperature": 0, "num_predict": 60}})
    assert whole.done_reason == "length" and whole.prompt_eval_count is not None
    assert whole.prompt_eval_count > (client.chat(**ASKED).prompt_eval_count or 0)


@pytest.mark.parametrize("route", ["chat", "generate"])
def test_an_answer_in_a_format(client: ollama.Client, route: str) -> None:
    options = {"temperature": 0, "num_predict": 200}

    def ask(stream: bool) -> str:
        if route == "chat":
            answer: Any = client.chat(**{**ASKED, "options": options}, format=CITY, stream=stream)
            return "".join(part.message.content or "" for part in answer) if stream else answer.message.content
        answer = client.generate(SAMPLE, "Where?", think=False, options=options, format=CITY, stream=stream)
        return "".join(part.response for part in answer) if stream else answer.response

    assert json.loads(ask(stream=False))["city"] in CITIES
    assert ask(stream=True) == ask(stream=False)


def test_an_answer_is_generated_whole_and_streamed(client: ollama.Client) -> None:
    asked: dict[str, Any] = {"model": SAMPLE, "prompt": "Where is the salt?", "options": ASKED["options"]}
    whole = client.generate(**asked, think=False, system="Be kind.")
    assert (whole.model, whole.done, whole.done_reason, whole.eval_count) == (SAMPLE, True, "length", 8)
    parts = list(client.generate(**asked, think=False, system="Be kind.", stream=True))
    assert "".join(part.response for part in parts) == whole.response != ""
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    raw = client.generate(**asked, raw=True)
    assert raw.prompt_eval_count is not None and whole.prompt_eval_count is not None
    assert 0 < raw.prompt_eval_count < whole.prompt_eval_count  # without template and system
    assert "".join(part.response for part in client.generate(**asked, raw=True, stream=True)) == raw.response


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop(client: ollama.Client, stream: bool) -> None:
    def said(**more: Any) -> str:
        answer: Any = client.chat(**{**ASKED, "options": {**ASKED["options"], **more}}, stream=stream)
        return "".join(part.message.content or "" for part in answer) if stream else answer.message.content

    text = said()
    word = text.split()[3]
    assert said(stop=["☂", word]) == text[: text.index(word)]


def test_vectors(client: ollama.Client) -> None:
    embedded = client.embed(SAMPLE, ["The drover", "Nobody"])
    assert embedded.model == SAMPLE and [len(vector) for vector in embedded.embeddings] == [128, 128]
    assert sum(value * value for value in embedded.embeddings[0]) == pytest.approx(1, abs=1e-3)
    assert embedded.prompt_eval_count is not None and embedded.prompt_eval_count > 2
    assert len(client.embed(SAMPLE, "The drover", dimensions=16).embeddings[0]) == 16
    older = client.embeddings(SAMPLE, "The drover").embedding
    assert list(older) == pytest.approx(list(embedded.embeddings[0]), abs=1e-2)


def test_what_is_there(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == [SAMPLE, CALLER]
    shown = client.show(f"{SAMPLE}:latest")
    assert shown.modelinfo is not None and shown.modelinfo["llama.context_length"] == 4096
    assert shown.capabilities is not None and {"completion", "tools"} <= set(shown.capabilities)
    running = client.ps().models
    assert [(model.model, model.context_length) for model in running] == [(SAMPLE, N_CTX_SLOT), (CALLER, N_CTX_SLOT)]
    assert running[0].expires_at is not None and running[0].expires_at > datetime.now(timezone.utc)


def test_keep_alive_is_told_after_the_answer(client: ollama.Client, backend: Served) -> None:
    assert client.generate(SAMPLE).done_reason == "load"
    assert backend.orders == [("load", SAMPLE)]
    backend.orders.clear()
    short = {**ASKED, "options": {"num_predict": 1}}
    client.chat(**short, keep_alive="5m")
    assert list(client.chat(**short, keep_alive=-1, stream=True))[-1].done
    client.chat(**short, keep_alive=0)
    assert client.generate(SAMPLE, keep_alive=0).done_reason == "unload"
    assert backend.orders == [
        ("keep_alive", SAMPLE, 300.0), ("keep_alive", SAMPLE, -1.0), ("unload", SAMPLE), ("unload", SAMPLE),
    ]  # fmt: skip


def test_what_is_wrong_is_said_in_ollamas_shape(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="no model 'nope'") as unknown:
        client.chat(**{**ASKED, "model": "nope"})
    assert unknown.value.status_code == 404
    long = [{"role": "user", "content": "salt " * 300}]
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError, match="the slot holds 1024") as refused:
            list(client.chat(**{**ASKED, "messages": long}, stream=stream))
        assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match=r"schema") as strange:
        client.chat(**ASKED, format={"type": "object", "properties": 7})
    assert strange.value.status_code == 400
