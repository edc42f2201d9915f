"""What OpenAI's clients send to `/v1/responses`, and what it means here: a chat in other words.

A request becomes a `ChatRequest`, so both are read and refused alike. Nothing is stored: what refers to an earlier
response is refused, and `store` is always answered as false. What changes only how OpenAI serves it is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from actors.gateway.attached import input_image_of, part_of
from actors.gateway.bodies import TOLD_LENGTH
from actors.gateway.errors import clipped
from actors.gateway.lora_settings import LoraSettings
from actors.gateway.openai_requests import (
    MAX_PROBS,
    MAX_TOOL_NAME,
    Ask,
    ChatRequest,
    Function,
    ModelRequest,
    NamedTool,
    Texts,
    Tool,
    ToolName,
    refused,
)
from actors.gateway.sampler_settings import SamplerSettings
from actors.records import MAX_TOKENS
from actors.serving.protocol import GenerateRequest, Sampling

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512  # OpenAI's own bounds of `metadata`
MAX_TOLD = 65536
"""Characters of the settings that a response tells again, three times in a stream. OpenAI tells all of them."""

_AS_IN_CHATS = (
    *ModelRequest.model_fields,
    *SamplerSettings.model_fields,
    *LoraSettings.model_fields,
    "parallel_tool_calls",
    "stream",
)
_SAME_FOR_ALL = {
    "background": False, "max_tool_calls": None, "previous_response_id": None, "service_tier": "default",
    "store": False, "truncation": "disabled",
}  # fmt: skip
_TOLD_AGAIN = ("max_output_tokens", "user", "safety_identifier", "prompt_cache_key")
_TOLD_OF_SAMPLING = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_LOGPROBS = "message.output_text.logprobs"  # in `include`
_ITEMS = "message, function_call, function_call_output or reasoning"
_NOT_TOLD: dict[str, Any] = {"instructions": None, "text": {}, "tools": []}  # where they are too long


def _named(kind: object) -> str:
    """What a client calls something, as it is told back."""
    return repr(clipped(kind, TOLD_LENGTH)) if isinstance(kind, str) else "unknown"


def _few_pairs(given: object) -> object:
    if isinstance(given, Mapping) and len(given) > MAX_PAIRS:
        raise ValueError(f"{len(given)} pairs; at most {MAX_PAIRS} are allowed")
    return given


def _only_functions(given: object) -> object:
    """Says what is wrong with OpenAI's own tools before it is said that they have no name."""
    if isinstance(given, Mapping) and (kind := given.get("type")) != "function":
        raise ValueError(f"the type {_named(kind)} is not supported; only function is")
    return given


Items = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Value = Annotated[str, Field(max_length=MAX_VALUE)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=MAX_KEY)], Value], BeforeValidator(_few_pairs)]


class FunctionTool(Function):
    """A tool. Answers always follow the schema of its parameters, so `strict` changes nothing."""

    type: Literal["function"]
    strict: bool | None = None


class NamedFunction(BaseModel):
    """A tool that must be called."""

    type: Literal["function"]
    name: str


Tools = Annotated[list[Annotated[FunctionTool, BeforeValidator(_only_functions)]], Field(fail_fast=True)]
Choice = Annotated[NamedFunction, BeforeValidator(_only_functions)]


class Reasoning(BaseModel):
    effort: str | None = Field(default=None, max_length=MAX_TOOL_NAME)


class TextFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Value | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextSettings(BaseModel):
    format: TextFormat | None = None


class ResponsesRequest(ModelRequest, SamplerSettings, LoraSettings):
    """`POST /v1/responses`."""

    input: str | Items
    instructions: str | None = None
    tools: Tools | None = None
    tool_choice: Literal["auto", "none", "required"] | Choice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextSettings | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    stream: bool | None = None
    metadata: Metadata | None = None
    user: Value | None = None
    safety_identifier: Value | None = None
    prompt_cache_key: Value | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None
    include: Texts | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_PROBS)

    def ask(self, request_id: str, key: str) -> Ask:
        """Raises Rejected for what Arriero cannot do. `key`: the name of the API key."""
        self._refuse()
        tools, choice = self.tools or [], self.tool_choice
        functions = [
            Function(name=each.name, description=each.description, parameters=each.parameters) for each in tools
        ]
        chat = ChatRequest(
            **{name: getattr(self, name) for name in _AS_IN_CHATS},
            messages=_messages_of(self.instructions, self.input),
            tools=[Tool(type="function", function=function) for function in functions],
            tool_choice=NamedTool(function=ToolName(name=choice.name)) if isinstance(choice, NamedFunction) else choice,
            max_completion_tokens=self.max_output_tokens,
            reasoning_effort=self._effort,
            response_format=self._response_format(),
            logprobs=_LOGPROBS in (self.include or ()) or bool(self.top_logprobs),
            top_logprobs=self.top_logprobs or None,
        )
        ask = chat.ask(request_id, key)
        assert isinstance(ask.request, GenerateRequest)
        reply = replace(ask.request.reply, form="responses", settings=self._settings(ask.request.sampling))
        fetches = tuple(fetch._replace(param="input") for fetch in ask.fetches)
        return replace(ask, request=replace(ask.request, reply=reply), fetches=fetches)

    def _refuse(self) -> None:
        """What would give another answer."""
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise refused(name, "nothing is stored here; leave it out and send the earlier items in input")
        if self.prompt is not None:
            raise refused("prompt", "no prompts are stored here; send their text as instructions or input")
        if self.background:
            raise refused("background", "nothing is stored here; leave it out, or read the answer as a stream")

    @property
    def _effort(self) -> str | None:
        return self.reasoning.effort if self.reasoning else None

    @property
    def _format(self) -> TextFormat:
        return (self.text and self.text.format) or TextFormat()

    def _response_format(self) -> dict[str, Any]:
        """As chats say it."""
        wanted = self._format
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise refused("text", 'a format of type "json_schema" needs its "schema": {…}')
        return {"type": wanted.type, "json_schema": {"schema": wanted.json_schema}}

    def _settings(self, sampling: Sampling) -> str:
        """What the response tells of its request, as JSON: what holds, not what was asked for."""
        choice = self.tool_choice
        short = {
            **_SAME_FOR_ALL,
            **{name: getattr(self, name) for name in _TOLD_AGAIN},
            **{name: getattr(sampling, name) for name in _TOLD_OF_SAMPLING},
            "metadata": self.metadata or {},
            "top_logprobs": self.top_logprobs or 0,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "reasoning": {"effort": self._effort, "summary": None},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto",
        }
        long = {
            "instructions": self.instructions,
            "text": {"format": self._format.model_dump(by_alias=True, exclude_none=True)},
            "tools": [{**tool.model_dump(), "strict": tool.strict is not False} for tool in self.tools or ()],
        }
        whole = json.dumps(short | long)
        return whole if len(whole) <= MAX_TOLD else json.dumps(short | _NOT_TOLD)


def _messages_of(instructions: str | None, given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The chat. What comes before its first turn is one system message: many templates take only one."""
    turns = [{"role": "user", "content": given}] if isinstance(given, str) else _turns_of(given)
    if not turns:
        raise refused("input", "it has no messages; send a text or at least one message")
    begin = next((index for index, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    opening = [instructions] if instructions else []
    opening += [turn["content"] for turn in turns[:begin]]
    return ([{"role": "system", "content": "\n\n".join(opening)}] if opening else []) + turns[begin:]


def _turns_of(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chats say them. There, thoughts and calls of tools belong to a message of the assistant's."""
    turns: list[dict[str, Any]] = []
    thoughts: list[str] = []  # that no message has yet

    def said(content: str | None) -> dict[str, Any]:
        """A new message of the assistant's, with the thoughts that led to it."""
        turns.append({"role": "assistant", "content": content})
        if thoughts:
            turns[-1]["reasoning_content"] = "\n\n".join(thoughts)
            thoughts.clear()
        return turns[-1]

    for index, item in enumerate(items):
        where = f"input.{index}"
        match item.get("type") or ("message" if "role" in item else None):
            case "message":
                role = _role_of(where, item)
                if role == "assistant":
                    said(_text_of(where, item, "content", "input_text", "output_text"))
                else:
                    thoughts.clear()
                    turns.append({"role": role, "content": _content_of(where, item, role)})
            case "reasoning":
                name, kind = ("content", "reasoning_text") if item.get("content") else ("summary", "summary_text")
                if item.get(name) and (text := _text_of(where, item, name, kind)):
                    thoughts.append(text)
            case "function_call":
                function = {"name": _string(where, item, "name"), "arguments": _string(where, item, "arguments")}
                call = {"id": _string(where, item, "call_id"), "type": "function", "function": function}
                goes_on = turns and turns[-1]["role"] == "assistant" and not thoughts
                (turns[-1] if goes_on else said(None)).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                thoughts.clear()
                call_id, output = _string(where, item, "call_id"), _text_of(where, item, "output", "input_text")
                turns.append({"role": "tool", "tool_call_id": call_id, "content": output})
            case "item_reference":
                raise refused(where, "nothing is stored here; send the item itself in place of the reference")
            case kind:
                raise refused(where, f"an item of type {_named(kind)} is not supported; send {_ITEMS}")
    return turns


def _role_of(where: str, item: Mapping[str, Any]) -> str:
    """As chat templates know it."""
    match item.get("role"):
        case "user" | "assistant" | "system" as role:
            return str(role)
        case "developer":
            return "system"
        case role:
            raise refused(where, f"the role {_named(role)} is not supported; send user, assistant, system or developer")


def _content_of(where: str, item: Mapping[str, Any], role: str) -> str | list[dict[str, Any]]:
    """Of a message: a text; or, where the user sends pictures or sounds, parts as chats have them."""
    content = item.get("content")
    if role != "user" or not isinstance(content, list) or not any(map(_is_file, content)):
        return _text_of(where, item, "content", "input_text", "output_text")
    parts: list[dict[str, Any]] = []
    for part in content:
        if _is_file(part):
            file = input_image_of(f"{where}.content", part) if part["type"] == "input_image" else part
            part_of(f"{where}.content", file)  # is it right?
            parts.append(file)
        else:
            text = _text_of(where, {"content": [part]}, "content", "input_text", "output_text")
            parts.append({"type": "text", "text": text})
    return parts


def _is_file(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in ("input_image", "input_audio")


def _text_of(where: str, item: Mapping[str, Any], name: str, *kinds: str) -> str:
    """The text of a field: a text, or parts of these kinds."""
    content = item.get(name)
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise refused(f"{where}.{name}", "it must be a text or a list of parts")
    for part in content:
        if part.get("type") not in kinds:
            raise refused(
                f"{where}.{name}", f"a part of type {_named(part.get('type'))} is not supported; only {kinds[0]} is"
            )
    return "".join(_string(f"{where}.{name}", part, "text") for part in content)


def _string(where: str, given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise refused(where, f'what has the type {_named(given.get("type"))} needs its "{name}", a text')
    return value
