"""OpenAI's client asks real models for chats, completions and vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from real_models import CALLER, CITIES, CITY, SAMPLE, Served

pytestmark = pytest.mark.llama

HELLO: Any = [{"role": "user", "content": "Where is the salt?"}]
PLAIN: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}  # no thoughts
ASKED: dict[str, Any] = {
    "model": SAMPLE, "messages": HELLO, "max_completion_tokens": 8, "temperature": 0, "extra_body": PLAIN,
}  # fmt: skip
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": CITY}}
TIME: Any = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
CALLS: dict[str, Any] = {
    "model": CALLER, "messages": HELLO, "max_completion_tokens": 500, "temperature": 0, "extra_body": PLAIN,
    "tools": [WEATHER, TIME],
}  # fmt: skip


@pytest.fixture
def client(real_models: tuple[str, Served]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_models[0]}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_a_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED)
    (choice,) = whole.choices
    assert (whole.object, whole.model, choice.index, choice.finish_reason) == ("chat.completion", SAMPLE, 0, "length")
    assert (choice.message.role, choice.message.tool_calls) == ("assistant", None) and choice.message.content
    assert whole.id.startswith("chatcmpl-") and whole.usage is not None
    assert whole.usage.prompt_tokens > 10 and whole.usage.completion_tokens == 8
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 8
    *parts, last = client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
    assert {(part.id, part.object) for part in (*parts, last)} == {(last.id, "chat.completion.chunk")}
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == choice.message.content
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert not last.choices and last.usage is not None and last.usage.completion_tokens == 8
    details = last.usage.prompt_tokens_details
    assert details is not None and 0 < (details.cached_tokens or 0) < last.usage.prompt_tokens


def test_thoughts_are_apart_from_the_answer(client: openai.OpenAI) -> None:
    asked = {**ASKED, "extra_body": {"thinking_budget_tokens": 3}, "max_completion_tokens": 30}
    whole: Any = client.chat.completions.create(**asked).choices[0].message
    assert whole.reasoning_content.strip() and whole.content.strip() and "</think>" not in whole.content
    deltas: list[Any] = [part.choices[0].delta for part in client.chat.completions.create(**asked, stream=True)]
    thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert (thoughts, "".join(delta.content or "" for delta in deltas)) == (whole.reasoning_content, whole.content)


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_is_called_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    asked = {**CALLS, "tools": [WEATHER]} if isinstance(choice, str) else CALLS
    whole = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.tool_calls
    (call,) = whole.message.tool_calls
    assert call.type == "function" and call.id and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in CITIES
    with client.chat.completions.stream(**asked, tool_choice=choice) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and final.message.tool_calls
    (streamed,) = final.message.tool_calls
    assert streamed.id and streamed.function.name == "weather"
    assert streamed.function.arguments == call.function.arguments
    deltas = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(deltas) == call.function.arguments


def test_several_calls_are_told_apart(client: openai.OpenAI) -> None:
    """What is biased to go on with a comma calls again and again, until its tokens are used up."""
    asked = {**CALLS, "tools": [WEATHER], "logit_bias": {",": 2}, "max_completion_tokens": 150}
    ids, names, arguments = {}, {}, {}
    parts = list(client.chat.completions.create(**asked, parallel_tool_calls=True, stream=True))
    for part in parts:
        for delta in part.choices[0].delta.tool_calls or ():
            assert delta.function is not None
            if delta.id:
                assert delta.index not in ids and delta.type == "function"
                ids[delta.index], names[delta.index] = delta.id, delta.function.name
            arguments[delta.index] = arguments.get(delta.index, "") + (delta.function.arguments or "")
    assert list(ids) == list(range(len(ids))) and len(set(ids.values())) == len(ids) > 1
    assert set(names.values()) == {"weather"} and parts[-1].choices[0].finish_reason == "length"
    assert all(json.loads(arguments[index])["city"] in CITIES for index in range(len(ids) - 1))
    whole = client.chat.completions.create(**asked, parallel_tool_calls=True).choices[0].message
    assert [call.function.arguments for call in whole.tool_calls or () if call.type == "function"] == [
        *arguments.values()
    ]


def test_the_result_of_a_tool_is_taken(client: openai.OpenAI) -> None:
    called = client.chat.completions.create(**CALLS, tool_choice="required").choices[0].message
    assert called.tool_calls
    result: Any = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "drizzle"}
    history: Any = [*HELLO, called.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(**{**CALLS, "messages": history}, tool_choice="none").choices[0]
    assert answer.message.tool_calls is None and answer.finish_reason in ("length", "stop")


def test_how_likely_each_token_was(client: openai.OpenAI) -> None:
    def told(choice: Any) -> list[tuple[str, float]]:
        return [(each.token, each.logprob) for each in choice.logprobs.content] if choice.logprobs else []

    whole = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=2).choices[0]
    content = whole.logprobs.content if whole.logprobs else None
    assert content and b"".join(bytes(each.bytes or ()) for each in content).decode() == whole.message.content
    for each in content:
        assert len(each.top_logprobs) == 2 and each.top_logprobs[0].token == each.token  # greedy
        assert each.logprob == each.top_logprobs[0].logprob <= 0
    parts = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=2, stream=True)
    streamed = [each for part in parts for choice in part.choices for each in told(choice)]
    assert [token for token, _ in streamed] == [token for token, _ in told(whole)]
    assert [value for _, value in streamed] == pytest.approx([value for _, value in told(whole)], abs=1e-2)


def test_several_answers(client: openai.OpenAI) -> None:
    asked = {**ASKED, "temperature": 5, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert whole.usage is not None and whole.usage.completion_tokens == 16
    texts = {0: "", 1: ""}
    ends = {}
    for part in client.chat.completions.create(**asked, stream=True):
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason
    assert ends == {0: "length", 1: "length"} and all(texts.values())


def test_an_answer_in_a_format(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY, "strict": True}}
    asked = {**ASKED, "max_completion_tokens": 200, "response_format": form}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "stop" and json.loads(whole.message.content or "")["city"] in CITIES
    with client.chat.completions.stream(**asked) as stream:
        texts = [event.snapshot for event in stream if event.type == "content.delta"]
    assert texts[-1] == whole.message.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop(client: openai.OpenAI, stream: bool) -> None:
    def said(**more: Any) -> tuple[str, Any]:
        if not stream:
            choice = client.chat.completions.create(**ASKED, **more).choices[0]
            return choice.message.content or "", choice.finish_reason
        parts = list(client.chat.completions.create(**ASKED, **more, stream=True))
        return "".join(part.choices[0].delta.content or "" for part in parts), parts[-1].choices[0].finish_reason

    text, _ = said()
    word = text.split()[3]
    assert said(stop=["☂", word]) == (text[: text.index(word)], "stop")


def test_a_completion_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": SAMPLE, "prompt": "The old llama", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=1)
    (choice,) = whole.choices
    assert (whole.object, choice.finish_reason) == ("text_completion", "length") and whole.id.startswith("cmpl-")
    assert whole.usage is not None and whole.usage.completion_tokens == 6
    assert choice.logprobs is not None and "".join(choice.logprobs.tokens or ()) == choice.text
    assert choice.logprobs.text_offset and len(choice.logprobs.token_logprobs or ()) == 6
    parts = list(client.completions.create(**asked, stream=True))
    assert "".join(part.choices[0].text for part in parts) == choice.text
    assert parts[-1].choices[0].finish_reason == "length"
    word = choice.text.split()[2]
    stopped = client.completions.create(**asked, stop=word).choices[0]
    assert (stopped.text, stopped.finish_reason) == (choice.text[: choice.text.index(word)], "stop")
    echoed = client.completions.create(**{**asked, "max_tokens": 0}, echo=True, logprobs=1).choices[0]
    assert echoed.text == asked["prompt"] and echoed.logprobs is not None


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": SAMPLE, "max_tokens": 3, "temperature": 0, "n": 2}
    many = client.completions.create(**asked, prompt=["The drover", "Nobody"])
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in many.choices]
    assert texts[0] == texts[1] and texts[2] == texts[3]


def test_vectors(client: openai.OpenAI) -> None:
    """As floats and, as the client asks by default, in base64."""
    default = client.embeddings.create(model=SAMPLE, input=["The drover", "Nobody"])
    floats = client.embeddings.create(model=SAMPLE, input=["The drover", "Nobody"], encoding_format="float")
    for one, other in zip(default.data, floats.data, strict=True):
        assert len(one.embedding) == 128 and one.embedding == pytest.approx(other.embedding, abs=1e-5)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-3)
    assert default.usage.prompt_tokens == floats.usage.prompt_tokens > 2


def test_which_models_there_are_and_what_is_wrong(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [SAMPLE, CALLER]
    assert client.models.retrieve(CALLER).id == CALLER
    with pytest.raises(openai.NotFoundError, match="no model 'nope'"):
        client.chat.completions.create(**{**ASKED, "model": "nope"})
    for stream in (False, True):
        long: Any = [{"role": "user", "content": "salt " * 300}]
        with pytest.raises(openai.BadRequestError, match="the slot holds 1024"):
            client.chat.completions.create(**{**ASKED, "messages": long}, stream=stream)
