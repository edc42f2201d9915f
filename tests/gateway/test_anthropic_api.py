"""Anthropic's routes, asked by Anthropic's own client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from gateway_fakes import MODEL, FakeBackend, content, serve, web

from actors.serving.anthropic_reply import AnthropicReply
from actors.serving.protocol import Chunk, Delta, GenerateRequest, ReplyForm
from scheduler.errors import EngineFailed, Unavailable

HELLO: Any = [{"role": "user", "content": "Hi"}]
TOOL: Any = {"name": "weather", "description": "now", "input_schema": {"type": "object", "properties": {}}}
DELTAS = (
    Delta(reasoning="Let me "), Delta(reasoning="see."), Delta(content="I look."), Delta(tool=0, name="wea"),
    Delta(tool=0, name="weather", arguments='{"city"'), Delta(tool=0, arguments=': "Lima"}'),
    Delta(tool=1, name="time"),
)  # fmt: skip
PARSED = (*(Chunk("", deltas=(delta,)) for delta in DELTAS), Chunk("", "stop", 9, 2, 30, deltas=()))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def url(backend: FakeBackend) -> Iterator[str]:
    with serve(backend, {"ann": "s3cret"}) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="s3cret", max_retries=0) as client:
        yield client


def asked(backend: FakeBackend) -> GenerateRequest:
    request = backend.saw("generate")[-1][-1]
    assert isinstance(request, GenerateRequest)
    return request


def test_a_stop_sequence_is_told(client: anthropic.Anthropic, backend: FakeBackend) -> None:
    backend.answers += [[Chunk("Hel"), Chunk("", "stop", 7, 0, 2, stopped_by="lo")]] * 2
    whole = client.messages.create(model=MODEL, max_tokens=50, messages=HELLO, stop_sequences=["lo"])
    with client.messages.stream(model=MODEL, max_tokens=50, messages=HELLO, stop_sequences=["lo"]) as stream:
        final = stream.get_final_message()
    for told in (whole, final):
        assert (told.stop_reason, told.stop_sequence) == ("stop_sequence", "lo")


def test_a_message_of_the_assistant_at_the_end_is_the_beginning_of_the_answer(
    client: anthropic.Anthropic, backend: FakeBackend
) -> None:
    begun: list[Any] = [*HELLO, {"role": "assistant", "content": '{"a":'}]
    client.messages.create(model=MODEL, max_tokens=50, messages=begun)
    assert content(asked(backend)) == {"messages": begun, "continue_final_message": True}
    used = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
    client.messages.create(model=MODEL, max_tokens=50, messages=[*HELLO, used])  # type: ignore[list-item]
    assert "continue_final_message" not in content(asked(backend))
    client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": []}])
    assert content(asked(backend))["messages"] == []


def test_a_message_whole_and_streamed(client: anthropic.Anthropic, backend: FakeBackend) -> None:
    whole = client.messages.create(model=MODEL, max_tokens=50, messages=HELLO, system="Be kind", stop_sequences=["x"])
    (block,) = whole.content
    assert block.type == "text" and block.text == "Hello"
    assert (whole.role, whole.stop_reason, whole.usage.input_tokens, whole.usage.output_tokens) == (
        "assistant", "end_turn", 7, 2,
    )  # fmt: skip
    request = asked(backend)
    assert content(request) == {"messages": [{"role": "system", "content": "Be kind"}, *HELLO]}
    assert (request.max_tokens, request.stop) == (50, ("x",))
    cooler = {"temperature": 0.5}
    with client.messages.stream(model=MODEL, max_tokens=50, messages=HELLO, extra_body=cooler) as stream:
        assert list(stream.text_stream) == ["Hel", "lo"]
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 2)
    assert asked(backend).sampling.temperature == 0.5


def test_thoughts_and_tools_whole_and_streamed(client: anthropic.Anthropic, backend: FakeBackend) -> None:
    expected = [
        ("thinking", "Let me see."),
        ("text", "I look."),
        ("tool_use", ("weather", {"city": "Lima"})),
        ("tool_use", ("time", {})),
    ]

    def blocks(message: Any) -> list[tuple[str, Any]]:
        return [
            (block.type, (block.name, block.input) if block.type == "tool_use" else getattr(block, block.type))
            for block in message.content
        ]

    backend.answers += [PARSED, PARSED]
    whole = client.messages.create(model=MODEL, max_tokens=50, messages=HELLO, tools=[TOOL])
    assert blocks(whole) == expected and whole.stop_reason == "tool_use"
    assert (whole.usage.input_tokens, whole.usage.cache_read_input_tokens) == (7, 2)
    with client.messages.stream(model=MODEL, max_tokens=50, messages=HELLO, tools=[TOOL]) as stream:
        final = stream.get_final_message()
    assert blocks(final) == expected and final.stop_reason == "tool_use"
    function = content(asked(backend))["tools"][0]["function"]
    assert function == {"name": "weather", "description": "now", "parameters": TOOL["input_schema"]}


def test_what_was_said_before_is_put_into_openais_words(client: anthropic.Anthropic, backend: FakeBackend) -> None:
    history: Any = [
        *HELLO,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "abc"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Lima"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    choice: Any = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    other = {**TOOL, "name": "time"}
    client.messages.create(
        model=MODEL, max_tokens=5, messages=history, tools=[TOOL, other], tool_choice=choice,
        thinking={"type": "disabled"},
    )  # fmt: skip
    said = content(asked(backend))
    function = {"name": "weather", "arguments": '{"city": "Lima"}'}
    assert said["messages"] == [
        *HELLO,
        {
            "role": "assistant", "content": "I look.", "reasoning_content": "Hm.",
            "tool_calls": [{"id": "toolu_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "sun"},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    assert [tool["function"]["name"] for tool in said["tools"]] == ["weather"]
    assert (said["tool_choice"], said["parallel_tool_calls"]) == ("required", False)
    assert said["chat_template_kwargs"] == {"enable_thinking": False}


def test_tokens_are_counted(client: anthropic.Anthropic, backend: FakeBackend) -> None:
    assert client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens == 7
    assert asked(backend).max_tokens == 1


def test_errors_come_in_anthropics_shape(client: anthropic.Anthropic, backend: FakeBackend, url: str) -> None:
    with pytest.raises(anthropic.NotFoundError, match="no model 'nope'") as unknown:
        client.messages.create(model="nope", max_tokens=5, messages=HELLO)
    body: Any = unknown.value.body
    assert body["type"] == "error" and body["error"]["type"] == "not_found_error"
    backend.acquisitions.append(Unavailable("not now"))
    with pytest.raises(anthropic.APIStatusError, match="not now") as away:
        client.messages.create(model=MODEL, max_tokens=5, messages=HELLO)
    assert away.value.status_code == 503
    backend.answers.append((Chunk("Hel"), EngineFailed("it broke")))
    with (
        pytest.raises(anthropic.APIStatusError, match="it broke"),
        client.messages.stream(model=MODEL, max_tokens=5, messages=HELLO) as stream,
    ):
        list(stream.text_stream)
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(model=MODEL, max_tokens=5, messages=HELLO)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": []}]}]}, "tool_use_id"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"stop_sequences": ["x"] * 33}, "stop_sequences"),
        ({"system": 7}, "system"),
    ],
)
def test_what_cannot_be_is_refused_by_name(url: str, body: dict[str, Any], named: str) -> None:
    whole = {"model": MODEL, "max_tokens": 5, "messages": HELLO, **body}
    reply = web.post(f"{url}/v1/messages", json=whole, headers={"x-api-key": "s3cret"})
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
    assert named in reply.json()["error"]["message"]


def test_events_come_in_their_order_and_blocks_are_closed() -> None:
    reply = AnthropicReply(ReplyForm("anthropic", stream=True, request_id="msg_1", model="m"))
    said = b"".join(map(reply.bytes_of, PARSED)).decode()
    events = [json.loads(part.split("\ndata: ")[1]) for part in said.split("\n\n") if part]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    open_block = None
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert open_block is None
                open_block = event["index"]
            case "content_block_delta":
                assert event["index"] == open_block
            case "content_block_stop":
                assert event["index"] == open_block
                open_block = None
    assert open_block is None and kinds.count("content_block_start") == 4
