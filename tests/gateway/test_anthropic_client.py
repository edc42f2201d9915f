"""Anthropic's client asks real models for messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from real_models import CALLER, CITIES, CITY, SAMPLE, Served

pytestmark = pytest.mark.llama

HELLO: Any = [{"role": "user", "content": "Where is the salt?"}]
PLAIN: dict[str, Any] = {"type": "disabled"}  # no thoughts
ASKED: dict[str, Any] = {
    "model": SAMPLE, "messages": HELLO, "max_tokens": 8, "thinking": PLAIN, "extra_body": {"temperature": 0},
}  # fmt: skip
WEATHER: Any = {"name": "weather", "description": "now", "input_schema": CITY}
TIME: Any = {"name": "time", "input_schema": {"type": "object", "properties": {}}}
CALLS: dict[str, Any] = {**ASKED, "model": CALLER, "max_tokens": 500, "tools": [WEATHER]}


@pytest.fixture
def client(real_models: tuple[str, Served]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=real_models[0], api_key="unused", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_whole_and_streamed(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASKED)
    assert whole.id.startswith("msg_") and (whole.type, whole.role, whole.model) == ("message", "assistant", SAMPLE)
    assert (whole.stop_reason, whole.stop_sequence, [block.type for block in whole.content]) == (
        "max_tokens", None, ["text"],
    )  # fmt: skip
    read, found = whole.usage.input_tokens, whole.usage.cache_read_input_tokens or 0
    assert read > 0 and read + found > 10 and whole.usage.output_tokens == 8
    with client.messages.stream(**ASKED) as stream:
        events = list(stream)
        final = stream.get_final_message()
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert text_of(final) == text_of(whole) != ""
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 8
    assert (final.usage.input_tokens or 0) + (final.usage.cache_read_input_tokens or 0) == read + found
    assert (final.usage.cache_read_input_tokens or 0) > 0  # the first answer's prompt is still there


def test_a_system_of_blocks_is_part_of_the_prompt(client: anthropic.Anthropic) -> None:
    blocks: Any = [{"type": "text", "text": "Be short."}, {"type": "text", "text": "Be kind."}]
    counts = [
        client.messages.count_tokens(model=SAMPLE, messages=HELLO, thinking=PLAIN, **more).input_tokens
        for more in ({}, {"system": "Be short."}, {"system": blocks}, {"system": "Be short.\nBe kind."})
    ]
    assert counts[0] < counts[1] < counts[2] == counts[3]
    usage = client.messages.create(**ASKED, system=blocks).usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counts[2]


def test_tokens_of_tools_and_blocks_are_counted(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": SAMPLE, "thinking": PLAIN}
    alone = client.messages.count_tokens(**asked, messages=HELLO).input_tokens
    assert client.messages.count_tokens(**asked, messages=HELLO, tools=[WEATHER]).input_tokens > alone
    blocks: Any = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
    assert client.messages.count_tokens(**asked, messages=blocks).input_tokens == alone


@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ({"type": "auto"}, [WEATHER]),
        ({"type": "any", "disable_parallel_tool_use": True}, [WEATHER]),
        ({"type": "tool", "name": "weather"}, [TIME, WEATHER]),
        ({"type": "tool", "name": "time"}, [TIME, WEATHER]),
    ],
    ids=["auto", "any", "weather", "time"],
)
def test_a_tool_is_called_whole_and_streamed(client: anthropic.Anthropic, choice: Any, tools: Any) -> None:
    name = choice.get("name", "weather")
    asked = {**CALLS, "tools": tools, "tool_choice": choice}
    whole = client.messages.create(**asked)
    (call,) = [block for block in whole.content if block.type == "tool_use"]
    assert whole.stop_reason == "tool_use" and call.id.startswith("toolu_") and call.name == name
    assert isinstance(call.input, dict)
    assert call.input["city"] in CITIES if name == "weather" else call.input == {}
    with client.messages.stream(**asked) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    (streamed,) = [block for block in final.content if block.type == "tool_use"]
    assert (final.stop_reason, streamed.name, streamed.input) == ("tool_use", name, call.input)
    assert json.loads("".join(parts) or "{}") == call.input


def test_the_result_of_a_tool_is_taken(client: anthropic.Anthropic) -> None:
    first = client.messages.create(**CALLS, tool_choice={"type": "any"})
    call = next(block for block in first.content if block.type == "tool_use")
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "drizzle"}]}
    history: Any = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(**{**CALLS, "messages": history, "max_tokens": 5}, tool_choice={"type": "none"})
    assert not [block for block in second.content if block.type == "tool_use"]
    usage = second.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) > (
        first.usage.input_tokens + (first.usage.cache_read_input_tokens or 0)
    )


def test_thoughts_are_blocks_of_their_own(client: anthropic.Anthropic) -> None:
    asked = {**ASKED, "thinking": {"type": "enabled", "budget_tokens": 3}, "max_tokens": 30}
    whole = client.messages.create(**asked)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    thought = whole.content[0]
    assert thought.type == "thinking" and thought.thinking.strip() and text_of(whole).strip()
    with client.messages.stream(**asked) as stream:
        deltas = "".join(event.thinking for event in stream if event.type == "thinking")
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert (deltas, text_of(final)) == (thought.thinking, text_of(whole))
    history: Any = [*HELLO, {"role": "assistant", "content": final.content}, *HELLO]
    assert client.messages.create(**{**asked, "messages": history}).usage.output_tokens > 0


def test_a_tool_is_called_after_a_thought(client: anthropic.Anthropic) -> None:
    asked = {**CALLS, "thinking": {"type": "enabled", "budget_tokens": 3}}
    with client.messages.stream(**asked, tool_choice={"type": "any"}) as stream:
        final = stream.get_final_message()
    kinds = [block.type for block in final.content]
    assert (kinds[0], kinds[-1], final.stop_reason) == ("thinking", "tool_use", "tool_use")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_ends_before_a_stop_sequence(client: anthropic.Anthropic, streaming: bool) -> None:
    def said(**more: Any) -> str:
        if not streaming:
            return text_of(client.messages.create(**ASKED, **more))
        with client.messages.stream(**ASKED, **more) as stream:
            return "".join(stream.text_stream)

    text = said()
    word = text.split()[3]
    assert said(stop_sequences=["☂", word]) == text[: text.index(word)]


def test_what_is_wrong_is_said_in_anthropics_shape(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="no model 'nope'"):
        client.messages.create(**{**ASKED, "model": "nope"})
    long: Any = [{"role": "user", "content": "salt " * 300}]
    with pytest.raises(anthropic.BadRequestError, match="the slot holds 1024") as refused:
        client.messages.create(**{**ASKED, "messages": long})
    body: Any = refused.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    with (
        pytest.raises(anthropic.BadRequestError, match="the slot holds 1024"),
        client.messages.stream(**{**ASKED, "messages": long}) as stream,
    ):
        list(stream)
    strange: Any = {"name": "f", "input_schema": {"type": "object", "properties": 7}}
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**ASKED, tools=[strange], tool_choice={"type": "any"})
