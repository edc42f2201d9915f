"""OpenAI's client asks a real model for responses: through the gateway, over the road, and from llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import openai
import pytest
from gateway_fakes import running
from granting import NODE, Granting

from actors.gateway.app import make_app
from actors.serving.engine import Engine
from actors.serving.listener import Listener
from actors.serving.protocol import LoadSpec
from arriero.sample_models import write_sample_model
from scheduler.costs.params import ContextParams

pytestmark = pytest.mark.llama

TEMPLATE = """{% if tools %}Answer with {"name": name of a tool, "parameters": its arguments}. There are: \
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>
{% if message.tool_calls %}{% for call in message.tool_calls %}{"name": "{{ call.function.name }}", "parameters": \
{{ call.function.arguments | tojson }}}{% endfor %}{% else %}{{ message.content }}{% endif %}<|eot_id|>{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>
{% endif %}"""
CITY: dict[str, Any] = {
    "type": "object", "properties": {"city": {"enum": ["Lima", "Cusco"]}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
WEATHER: Any = {"type": "function", "name": "weather", "description": "now", "parameters": CITY, "strict": True}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    path = tmp_path_factory.mktemp("models") / "llama.gguf"
    write_sample_model(path, "llama", n_layer=2, n_embd=128, n_ff=256, n_head=4, n_head_kv=2, head_dim=32)
    spec = LoadSpec(
        "sample", str(path), devices=(), n_gpu_layers=0, tensor_split=(), experts_pattern="",
        context=ContextParams(n_ctx=2048), n_threads=1, host_required_bytes=0, chat_template=TEMPLATE,
    )  # fmt: skip
    with (
        closing(Engine(spec)) as engine,
        closing(Listener(engine, NODE, "127.0.0.1")) as listener,
        running(make_app(Granting(listener.endpoint))) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client


def test_a_text_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: Any = {"model": "sample", "input": "Where is the salt?", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**asked, instructions="Be short.")
    again = client.responses.create(**asked, instructions="Be short.", stream=True)
    events = list(again)
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert whole.output_text == said != ""
    assert (whole.status, whole.incomplete_details and whole.incomplete_details.reason) == (
        "incomplete", "max_output_tokens",
    )  # fmt: skip
    assert whole.usage is not None and whole.usage.output_tokens == 12
    assert whole.usage.input_tokens > 10 and events[-1].type == "response.incomplete"
    usage = events[-1].response.usage
    assert usage is not None and 0 < usage.input_tokens_details.cached_tokens < usage.input_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))
    likely = client.responses.create(**asked, top_logprobs=2)
    message = likely.output[0]
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs or []
    assert b"".join(bytes(each.bytes) for each in logprobs).decode() == likely.output_text
    assert all(each.token == each.top_logprobs[0].token and len(each.top_logprobs) == 2 for each in logprobs)


def test_an_answer_in_a_format(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "place", "schema": CITY, "strict": True}}
    whole = client.responses.create(model="sample", input="Where?", text=form, temperature=0)
    assert whole.status == "completed" and json.loads(whole.output_text)["city"] in ("Lima", "Cusco")
    with client.responses.stream(model="sample", input="Where?", text=form, temperature=0) as stream:
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_text == texts[-1] == whole.output_text


def test_a_tool_is_called_and_its_result_is_taken(client: openai.OpenAI) -> None:
    """The model says anything before it calls. Where all is equally likely, it soon says what a call begins with."""
    anything = {"temperature": 100, "top_p": 1, "top_k": -1, "min_p": 0, "seed": 4}
    asked: Any = {"model": "sample", "tools": [WEATHER], "parallel_tool_calls": False, "extra_body": anything}
    first = client.responses.create(**asked, input="Weather?", tool_choice="required")
    calls = [item for item in first.output if item.type == "function_call"]
    assert calls and first.status == "completed"
    assert calls[0].name == "weather" and json.loads(calls[0].arguments)["city"] in ("Lima", "Cusco")
    named: Any = {"type": "function", "name": "weather"}
    with client.responses.stream(**asked, input="Weather?", tool_choice=named) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.function_call_arguments.delta")
        final = stream.get_final_response()
    (call,) = [item for item in final.output if item.type == "function_call"]
    assert call.arguments == deltas and call.parsed_arguments == json.loads(deltas)
    result: Any = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "drizzle"}
    history: Any = [{"role": "user", "content": "Weather?"}, *calls, result]
    second = client.responses.create(model="sample", tools=[WEATHER], input=history, max_output_tokens=5)
    alone = client.responses.create(model="sample", tools=[WEATHER], input="Weather?", max_output_tokens=5)
    assert second.usage is not None and alone.usage is not None
    assert second.usage.input_tokens > alone.usage.input_tokens


def test_a_prompt_that_is_too_long_is_refused_whatever_truncation_says(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="the slot holds 2048"):
            client.responses.create(model="sample", input="salt " * 3000, truncation="auto", stream=stream)  # type: ignore[call-overload]


def test_a_tool_whose_schema_is_none_is_refused(client: openai.OpenAI) -> None:
    strange: Any = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": 7}, "strict": True}
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="sample", input="Hi", tools=[strange], tool_choice="required")
