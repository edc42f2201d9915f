"""OpenAI's responses, asked by OpenAI's own client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
from gateway_fakes import MODEL, FakeBackend, Gate, all_of, connect, content, head_of, running, serve, web
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from actors.gateway.app import make_app
from actors.gateway.forms import read_ask
from actors.gateway.openai_requests import Ask
from actors.gateway.responses_requests import MAX_TOLD
from actors.serving.protocol import Chunk, Delta, GenerateRequest, Likelihood, ReplyForm, Sampling
from actors.serving.responses_reply import ResponsesReply
from scheduler.errors import EngineFailed, Rejected, Unavailable

WEATHER: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
TIME: Any = {"type": "function", "name": "time", "description": "now", "parameters": None, "strict": None}
THOUGHT = (Delta(reasoning="Let me "), Delta(reasoning="see."))
CALLS = (
    Delta(tool=0, name="wea"), Delta(tool=0, name="weather", arguments='{"city"'), Delta(tool=0, arguments=': "Lima"}'),
    Delta(tool=1, name="time"),
)  # fmt: skip
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SETTINGS = read_ask("responses", b'{"model": "m", "input": ""}', "resp_1", "").request.reply.settings  # type: ignore[union-attr]


def parsed(*deltas: Delta, finish_reason: Any = "stop") -> tuple[Chunk, ...]:
    return (*(Chunk("", deltas=(delta,)) for delta in deltas), Chunk("", finish_reason, 9, 2, 30, 4, deltas=()))


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def asked(backend: FakeBackend) -> GenerateRequest:
    request = backend.saw("generate")[-1][-1]
    assert isinstance(request, GenerateRequest)
    return request


def items(response: Any) -> list[tuple[str, str]]:
    """Kinds and texts of the output."""
    return [
        (item.type, f"{item.name} {item.arguments}" if item.type == "function_call" else item.content[0].text)
        for item in response.output
    ]


# ---------------------------------------------------------------------- through OpenAI's client


def test_a_text_whole_and_streamed(client: openai.OpenAI, backend: FakeBackend) -> None:
    whole = client.responses.create(model=MODEL, input="Hi", instructions="Be kind", max_output_tokens=50)
    assert (whole.output_text, whole.status, whole.error, whole.incomplete_details) == (
        "Hello",
        "completed",
        None,
        None,
    )
    assert whole.id.startswith("resp_") and whole.model == MODEL and whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.total_tokens) == (7, 2, 9)
    assert content(asked(backend)) == {
        "messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}]
    }
    assert (asked(backend).max_tokens, asked(backend).sampling) == (50, Sampling())
    assert backend.saw("acquire")[-1][0].request_id == whole.id
    events = list(client.responses.create(model=MODEL, input="Hi", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == "Hello"


def test_thoughts_and_tools_whole_and_streamed(client: openai.OpenAI, backend: FakeBackend) -> None:
    expected = [
        ("reasoning", "Let me see."),
        ("message", "I look."),
        ("function_call", 'weather {"city": "Lima"}'),
        ("function_call", "time {}"),
    ]
    backend.answers += [parsed(*THOUGHT, Delta(content="I look."), *CALLS)] * 2
    whole = client.responses.create(model=MODEL, input="Hi", tools=[WEATHER, TIME])
    assert items(whole) == expected and whole.status == "completed" and whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.input_tokens_details.cached_tokens) == (9, 2)
    assert (whole.usage.output_tokens, whole.usage.output_tokens_details.reasoning_tokens) == (30, 4)
    assert [tool["function"]["name"] for tool in content(asked(backend))["tools"]] == ["weather", "time"]
    with client.responses.stream(model=MODEL, input="Hi", tools=[WEATHER, TIME]) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert snapshots == ['{"city"', '{"city": "Lima"}', "{}"]
    assert items(final) == expected
    call = final.output[2]
    assert call.type == "function_call" and call.parsed_arguments == {"city": "Lima"}


class Answer(BaseModel):
    city: str


def test_an_answer_in_a_format(client: openai.OpenAI, backend: FakeBackend) -> None:
    said = (Chunk('{"city": '), Chunk('"Lima"}'), Chunk("", "stop", 5, 0, 4))
    backend.answers += [said, said]
    whole = client.responses.parse(model=MODEL, input="Where?", text_format=Answer)
    assert whole.output_parsed == Answer(city="Lima")
    assert content(asked(backend))["json_schema"]["properties"] == {"city": {"title": "City", "type": "string"}}
    assert whole.text is not None and whole.text.format is not None and whole.text.format.type == "json_schema"
    with client.responses.stream(model=MODEL, input="Where?", text_format=Answer) as stream:
        assert stream.get_final_response().output_parsed == Answer(city="Lima")


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI, backend: FakeBackend) -> None:
    cut = (Chunk("Hel"), Chunk("", "length", 7, 0, 1))
    backend.answers += [cut, cut]
    whole = client.responses.create(model=MODEL, input="Hi", max_output_tokens=1)
    assert (whole.status, whole.output_text) == ("incomplete", "Hel")
    assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(model=MODEL, input="Hi", max_output_tokens=1, stream=True)
    assert last.type == "response.incomplete"
    message = last.response.output[0]
    assert message.type == "message" and message.status == "incomplete"


def test_what_was_said_comes_back_as_it_was_told(client: openai.OpenAI, backend: FakeBackend) -> None:
    """The output of one response is input of the next one."""
    backend.answers.append(parsed(*THOUGHT, Delta(content="I look."), *CALLS))
    first = client.responses.create(model=MODEL, input="Hi", tools=[WEATHER, TIME])
    calls = [item for item in first.output if item.type == "function_call"]
    results: Any = [
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": "sun"},
        {"type": "function_call_output", "call_id": calls[1].call_id, "output": [{"type": "input_text", "text": "9"}]},
    ]
    client.responses.create(
        model=MODEL, input=[{"role": "user", "content": "Hi"}, *first.model_dump()["output"], *results]
    )
    functions = [{"name": "weather", "arguments": '{"city": "Lima"}'}, {"name": "time", "arguments": "{}"}]
    assert content(asked(backend))["messages"] == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant", "content": "I look.", "reasoning_content": "Let me see.",
            "tool_calls": [
                {"id": call.call_id, "type": "function", "function": function}
                for call, function in zip(calls, functions, strict=True)
            ],
        },
        {"role": "tool", "tool_call_id": calls[0].call_id, "content": "sun"},
        {"role": "tool", "tool_call_id": calls[1].call_id, "content": "9"},
    ]  # fmt: skip


def test_the_response_tells_the_settings_that_hold(client: openai.OpenAI, backend: FakeBackend) -> None:
    whole = client.responses.create(
        model=MODEL, input="Hi", instructions="Be kind", tools=[WEATHER], parallel_tool_calls=False, temperature=0.5,
        tool_choice={"type": "function", "name": "weather"}, metadata={"a": "b"}, user="ann", store=True,
        truncation="auto", reasoning={"effort": "low", "summary": "auto"}, include=["reasoning.encrypted_content"],
        extra_body={"top_k": 3, "n_ctx": 512},
    )  # fmt: skip
    assert (whole.instructions, whole.temperature, whole.top_p) == ("Be kind", 0.5, 0.95)
    assert (whole.metadata, whole.user, whole.store) == ({"a": "b"}, "ann", False)  # type: ignore[attr-defined]
    assert (whole.truncation, whole.parallel_tool_calls, whole.background) == ("disabled", False, False)
    assert whole.reasoning is not None and (whole.reasoning.effort, whole.reasoning.summary) == ("low", None)
    assert whole.tool_choice.model_dump(exclude_none=True) == {"type": "function", "name": "weather"}  # type: ignore[union-attr]
    (tool,) = whole.tools
    assert tool.model_dump(include=set(WEATHER)) == WEATHER
    said = content(asked(backend))
    assert (said["tool_choice"], said["parallel_tool_calls"], said["reasoning_effort"]) == ("required", False, "low")
    assert asked(backend).sampling == Sampling(temperature=0.5, top_k=3)
    assert backend.saw("acquire")[-1][0].n_ctx == 512


def test_errors_come_as_the_client_knows_them(client: openai.OpenAI, backend: FakeBackend) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError, match="no model 'nope'"):
            client.responses.create(model="nope", input="Hi", stream=stream)  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="previous_response_id") as stored:
        client.responses.create(model=MODEL, input="Hi", previous_response_id="resp_1")
    assert stored.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError, match="no route GET"):
        client.responses.retrieve("resp_1")
    backend.answers.append((Chunk("Hel"), EngineFailed("the process that ran tiny ended")))
    texts = []
    with (
        pytest.raises(openai.APIError, match="the process that ran tiny ended") as broken,
        client.responses.stream(model=MODEL, input="Hi") as events,
    ):
        texts += [event.delta for event in events if event.type == "response.output_text.delta"]
    assert broken.value.code == "engine_failed"


def test_likelihoods_belong_to_the_text(client: openai.OpenAI, backend: FakeBackend) -> None:
    said = (
        Chunk("", deltas=(Delta(reasoning="Hm."),), likelihoods=(Likelihood(4, b"Hm", -2.0),)),
        Chunk("", deltas=(Delta(content="H\u00e9"),), likelihoods=(Likelihood(1, b"H", -0.5, ((1, b"H", -0.5),)),
                                                               Likelihood(2, b"\xc3", -0.1))),
        Chunk("", "stop", 7, 0, 3, deltas=(), likelihoods=(Likelihood(3, b"\xa9", -0.2),)),
    )  # fmt: skip
    backend.answers += [said, said]
    asked_for: Any = {"model": MODEL, "input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    whole = client.responses.create(**asked_for)
    message = whole.output[1]
    assert message.type == "message" and message.content[0].type == "output_text"
    told = message.content[0].logprobs or []
    assert [(each.logprob, bytes(each.bytes)) for each in told] == [(-0.5, b"H"), (-0.1, b"\xc3"), (-0.2, b"\xa9")]
    assert told[0].top_logprobs[0].token == "H"
    assert asked(backend).n_probs == 1 and whole.top_logprobs == 1
    events = list(client.responses.create(**asked_for, stream=True))
    assert [
        [each.logprob for each in event.logprobs] for event in events if event.type == "response.output_text.delta"
    ] == [[-0.5, -0.1]]
    client.responses.create(model=MODEL, input="Hi", include=["message.output_text.logprobs"])
    assert asked(backend).n_probs == 0


# ---------------------------------------------------------------------- events


def told(raw: str) -> list[dict[str, Any]]:
    """The events of a stream. Each is what the client's own types say, and they are numbered."""
    events = []
    for part in raw.strip("\n").split("\n\n"):
        if not part.startswith(":"):
            name, data = part.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}" and EVENT.validate_python(event).type == event["type"]
            events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def streamed(chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    reply = ResponsesReply(ReplyForm("responses", True, request_id="resp_1", model="m", settings=SETTINGS))
    return told(b"".join(map(reply.bytes_of, chunks)).decode())


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


TEXT = ["output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done"]  # fmt: skip
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done"]  # fmt: skip


def test_events_of_a_text_come_in_their_order() -> None:
    events = streamed((Chunk("Hel"), Chunk("lo"), Chunk("", "stop", 7, 0, 2)))
    assert kinds(events) == ["created", "in_progress", *TEXT, "completed"]
    item = events[-1]["response"]["output"][0]
    assert events[-2]["item"] == item and item["content"] == [events[-3]["part"]]
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}
    assert events[2]["item"] == {**item, "status": "in_progress", "content": []}
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"


def test_events_of_thoughts_and_calls_come_in_their_order() -> None:
    events = streamed(parsed(*THOUGHT, Delta(content="I "), Delta(content="look."), *CALLS))
    thought = [kind.replace("output_text", "reasoning_text") for kind in TEXT]
    empty = [kind for index, kind in enumerate(CALL) if index != 2]
    assert kinds(events) == ["created", "in_progress", *thought, *TEXT, *CALL, *empty, "completed"]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in done] == [0, 1, 2, 3]
    assert [event["item"] for event in done] == events[-1]["response"]["output"]
    call = next(event["item"] for event in events if event.get("item", {}).get("type") == "function_call")
    assert (call["name"], call["arguments"], call["status"]) == ("weather", "", "in_progress")


def test_text_after_a_call_is_another_message() -> None:
    events = streamed(parsed(Delta(content="a"), Delta(tool=0, name="f", arguments="{}"), Delta(content="b")))
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "message"]
    assert len({item["id"] for item in output}) == 3


def test_what_is_cut_off_says_so_and_stays_as_it_is() -> None:
    events = streamed(parsed(*THOUGHT, *CALLS[:2], finish_reason="length"))
    thought, call = events[-1]["response"]["output"]
    assert events[-1]["type"] == "response.incomplete"
    assert (thought["status"], call["status"], call["arguments"]) == ("completed", "incomplete", '{"city"')
    (nameless,) = streamed(parsed(CALLS[0], finish_reason="length"))[-1]["response"]["output"]
    assert nameless["arguments"] == ""


def test_an_answer_without_a_word_is_an_empty_message() -> None:
    (message,) = streamed((Chunk("", "stop", 3, 0, 0),))[-1]["response"]["output"]
    assert message["content"][0]["text"] == ""


def test_a_whole_answer_is_what_a_stream_ends_with() -> None:
    form = ReplyForm("responses", request_id="resp_1", model="m", settings=SETTINGS)
    reply = ResponsesReply(form)
    *earlier, last = map(reply.bytes_of, parsed(*THOUGHT, *CALLS))
    assert not any(earlier)
    response = Response.model_validate(json.loads(last))
    assert [item.type for item in response.output] == ["reasoning", "function_call", "function_call"]


def test_a_stream_that_fails_tells_why_in_numbered_events(backend: FakeBackend) -> None:
    waiting, answering = Gate(), Gate()
    backend.acquisitions.append(waiting)
    backend.answers.append([Chunk("Hel"), answering, EngineFailed("it broke")])
    with (
        serve(backend, pulse_s=0.05) as url,
        web.stream("POST", f"{url}/v1/responses", json={"model": MODEL, "input": "Hi", "stream": True}) as reply,
    ):
        lines = reply.iter_lines()
        assert next(lines) == ": waiting"
        waiting.open()
        answering.open()
        events = told("\n".join(lines))
    assert kinds(events)[-2:] == ["error", "failed"]
    error, failed = events[-2:]
    assert (error["code"], error["message"], error["error"]["type"]) == ("engine_failed", "it broke", "server_error")
    assert failed["response"]["error"] == {"code": "server_error", "message": "it broke"}
    assert failed["response"]["id"] == events[0]["response"]["id"] and failed["response"]["status"] == "failed"


def test_a_gateway_that_goes_ends_a_stream_in_the_same_way(backend: FakeBackend) -> None:
    backend.answers.append([Chunk("Hel"), Gate()])
    body = json.dumps({"model": MODEL, "input": "Hi", "stream": True}).encode()
    with running(make_app(backend)) as (url, server), connect(url) as connection:
        connection.sendall(head_of("/v1/responses", len(body)) + body)
        received = b""
        while b"Hel" not in received:
            received += connection.recv(65536)
        server.should_exit = True
        received += all_of(connection)
    numbers = [
        json.loads(line[6:])["sequence_number"] for line in received.decode().splitlines() if line[:5] == "data:"
    ]
    assert numbers == list(range(7)) and b"shutting down" in received


# ---------------------------------------------------------------------- what is read


def read(**body: Any) -> Ask:
    return read_ask("responses", json.dumps({"model": "m", "input": "Hi", **body}).encode(), "resp_1", "ann")


def chat_of(given: list[dict[str, Any]], **body: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = json.loads(read(input=given, **body).request.content)["messages"]
    return messages


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "input_text", "text": text}]}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}


def test_all_that_comes_before_the_first_turn_is_one_system_message() -> None:
    given = [{"role": "developer", "content": "b"}, {"role": "system", "content": "c"}, user("Hi"),
             {"type": "message", "role": "developer", "content": "d"}]  # fmt: skip
    assert chat_of(given, instructions="a") == [
        {"role": "system", "content": "a\n\nb\n\nc"}, {"role": "user", "content": "Hi"},
        {"role": "system", "content": "d"},
    ]  # fmt: skip


def test_thoughts_go_to_the_message_that_they_led_to() -> None:
    said = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "b", "annotations": []}],
    }
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert chat_of([user("a"), thought("x"), said, call, user("c"), thought("lost"), user("d")]) == [
        {"role": "user", "content": "a"}, assistant("b", reasoning_content="x", tool_calls=calls),
        {"role": "user", "content": "c"}, {"role": "user", "content": "d"},
    ]  # fmt: skip
    alone = {"role": "assistant", "content": None, "tool_calls": calls}
    assert chat_of([user("a"), said, thought("x"), thought("y"), call, call]) == [
        {"role": "user", "content": "a"}, assistant("b"),
        {**alone, "reasoning_content": "x\n\ny", "tool_calls": calls * 2},
    ]  # fmt: skip
    silent = {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}
    assert chat_of([user("a"), silent, call])[1] == alone


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({"input": []}, "input", "no messages"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "no messages"),
        ({"input": 7}, "input", "string"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0", "'tool'"),
        ({"input": [{"role": "user", "content": 7}]}, "input.0.content", "a list of parts"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content", "data:image/png"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content", '"text"'),
        ({"input": [user("a"), {"type": "computer_call"}]}, "input.1", "computer_call"),
        ({"input": [{"type": "item_reference", "id": "rs_1"}]}, "input.0", "send the item itself"),
        ({"input": [{}, {"type": 7}]}, "input.0", "type unknown"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0", "call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input.0.output", "a list of parts"),
        ({"tools": [{"type": "web_search"}]}, "tools", "'web_search' is not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "name"),
        ({"tools": [WEATHER] * 129}, "tools", "128"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice", "'other'"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "'allowed_tools' is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "send tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text", "schema"),
        ({"text": {"format": {"type": "xml"}}}, "text", "json_schema"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1"),
        ({"temperature": -1}, "temperature", "0"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
        ({"metadata": {"a": 1}}, "metadata", "string"),
        ({"user": "x" * 513}, "user", "512"),
        ({"previous_response_id": "resp_0"}, "previous_response_id", "input"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "input"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "instructions"),
        ({"background": True}, "background", "stream"),
        ({"top_logprobs": 101}, "top_logprobs", "100"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(body: dict[str, Any], param: str, named: str) -> None:
    with pytest.raises(Rejected) as refused:
        read(**body)
    assert refused.value.details["param"] == param and param in refused.value.message
    assert named in refused.value.message and len(refused.value.message) < 500


@pytest.mark.parametrize(
    "body",
    [
        {"input": [{"type": "x" * 2000}]},
        {"input": [{"role": "x" * 2000}]},
        {"input": [{"role": "user", "content": [{"type": "x" * 2000}]}]},
        {"tools": [{"type": "x" * 2000}]},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x" * 2000}},
        {"metadata": {"x" * 2000: 1}},
    ],
)
def test_no_refusal_is_as_long_as_what_was_sent(body: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as refused:
        read(**body)
    assert len(refused.value.message) < 500


def test_what_changes_nothing_is_ignored() -> None:
    ignored = {
        "store": True, "truncation": "auto", "service_tier": "flex", "max_tool_calls": 3, "tomorrow": 1,
        "include": ["reasoning.encrypted_content"], "stream_options": {"include_obfuscation": False},
        "text": {"verbosity": "low", "format": None}, "reasoning": {"effort": None, "summary": "auto"}, "tools": None,
        "previous_response_id": None, "background": False, "top_logprobs": 0, "metadata": None,
    }  # fmt: skip
    assert read(**ignored).request == read().request


def test_settings_that_are_too_long_are_not_told_again() -> None:
    reply = read(instructions="x" * MAX_TOLD, tools=[WEATHER], metadata={"a": "b"}).request.reply  # type: ignore[union-attr]
    settings = json.loads(reply.settings)
    assert (settings["instructions"], settings["tools"], settings["metadata"]) == (None, [], {"a": "b"})


def test_a_large_body_is_read_elsewhere(url: str, backend: FakeBackend) -> None:
    reply = web.post(f"{url}/v1/responses", json={"model": MODEL, "input": [user("a" * 10_000)] * 20})
    assert reply.status_code == 200 and len(content(asked(backend))["messages"]) == 20


def test_a_million_wrong_items_are_one_refusal(url: str) -> None:
    body = b'{"model": "tiny", "input": [%s{}]}' % (b"7," * 1_000_000)
    reply = web.post(f"{url}/v1/responses", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and len(reply.content) < 1000


def test_an_unavailable_cluster_says_when_to_come_back(client: openai.OpenAI, backend: FakeBackend) -> None:
    backend.acquisitions.append(Unavailable("not now"))
    with pytest.raises(openai.InternalServerError, match="not now") as away:
        client.responses.create(model=MODEL, input="Hi", stream=True)
    assert away.value.status_code == 503 and away.value.response.headers["retry-after"]
