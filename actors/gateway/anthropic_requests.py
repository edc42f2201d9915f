"""What Anthropic's clients send, and what it means here: a chat in other words.

Thoughts of earlier messages go to the chat template; their signatures are Anthropic's own and are ignored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from actors.gateway.attached import block_of, content_to_fetch, joined
from actors.gateway.bodies import TOLD_LENGTH
from actors.gateway.errors import clipped
from actors.gateway.hashes import fingerprint_of, opening_of, prefix_of
from actors.gateway.lora_settings import LoraSettings
from actors.gateway.openai_requests import (
    MAX_TOOL_NAME,
    MAX_TOOLS,
    Ask,
    checked_stops,
    refused,
)
from actors.records import MAX_NAME_LENGTH, MAX_TOKENS
from actors.serving.protocol import GenerateRequest, ReplyForm, Sampling
from scheduler.events import RequestArrived
from scheduler.units import RequestId

Blocks = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class AnthropicMessage(BaseModel):
    role: Literal["user", "assistant"]
    content: str | Blocks


class AnthropicTool(BaseModel):
    name: str = Field(min_length=1, max_length=MAX_TOOL_NAME)
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(BaseModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(BaseModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)


class CountTokensRequest(LoraSettings):
    """`POST /v1/messages/count_tokens`. Unknown fields are ignored. `lora` is llama-server's: the prompt is read with
    these adapters, and found again only by them."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=MAX_NAME_LENGTH)
    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True)] = Field(min_length=1)
    system: str | Blocks | None = None
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def ask(self, request_id: str, key: str) -> Ask:
        """One token of an answer: what counts is the prompt. Raises Rejected for what Arriero cannot do."""
        return self.asked(request_id, key, 1, (), Sampling(), stream=False)

    def asked(
        self,
        request_id: str,
        key: str,
        max_tokens: int,
        stop: tuple[str, ...],
        sampling: Sampling,
        *,
        stream: bool,
    ) -> Ask:
        """`key`: the name of the API key."""
        messages = [each for index, message in enumerate(self.messages) for each in _as_openai(index, message)]
        if system := _text_of("system", self.system or ""):
            messages.insert(0, {"role": "system", "content": system})
        tools, choice = self._tools()
        thinking = {"enable_thinking": False} if self.thinking and self.thinking.type == "disabled" else None
        parallel = False if tools and self.tool_choice and self.tool_choice.disable_parallel_tool_use else None
        content, fetches = content_to_fetch(
            messages=messages,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=parallel,
            chat_template_kwargs=thinking,
            continue_final_message=_is_begun(messages) or None,
            thinking_budget_tokens=self.thinking.budget_tokens if self.thinking else None,
        )
        request = GenerateRequest(
            content,
            max_tokens=max_tokens,
            stop=stop,
            sampling=sampling,
            reply=ReplyForm("anthropic", stream, request_id=request_id, model=self.model, created=int(time.time())),
            lora=self.scales(),
        )
        beginning = [*(tools or ()), *opening_of(messages)]
        need = RequestArrived(
            RequestId(request_id), self.model, "generate", None, None, None, key, prefix_of(beginning, request.lora),
            fingerprint_of(self.model, request),
        )  # fmt: skip
        return Ask(need, request, fetches=fetches)

    def _tools(self) -> tuple[list[dict[str, Any]] | None, str | None]:
        """In OpenAI's words. A named one is the only one."""
        given = self.tools or []
        choice = self.tool_choice.type if self.tool_choice else "auto"
        if len(given) > MAX_TOOLS:
            raise refused("tools", f"{len(given)} tools; at most {MAX_TOOLS} are allowed")
        if self.tool_choice and choice == "tool":
            given = [tool for tool in given if tool.name == self.tool_choice.name]
            if not given:
                raise refused("tool_choice", f"there is no tool {clipped(str(self.tool_choice.name), TOLD_LENGTH)!r}")
        if not given:
            return None, None
        tools = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    **({"description": tool.description} if tool.description else {}),
                    "parameters": tool.input_schema,
                },
            }
            for tool in given
        ]
        return tools, {"auto": "auto", "none": "none", "any": "required", "tool": "required"}[choice]


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`."""

    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_TOKENS)

    def ask(self, request_id: str, key: str) -> Ask:
        """Raises Rejected for what Arriero cannot do. `key`: the name of the API key."""
        given = {
            name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(self, name)) is not None
        }
        stop = checked_stops("stop_sequences", self.stop_sequences)
        return self.asked(request_id, key, self.max_tokens, stop, Sampling(**given), stream=self.stream)


def _is_begun(messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is the beginning of the answer."""
    last = messages[-1] if messages else {"role": "user"}  # blocks may say nothing
    return last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last


def _as_openai(index: int, message: AnthropicMessage) -> Iterator[dict[str, Any]]:
    """One message may be several there: the results of tools are messages of their own."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    where = f"messages.{index}.content"
    parts: list[dict[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in message.content:
        match block.get("type"):
            case "text":
                parts.append({"type": "text", "text": _string(where, block, "text")})
            case "image":
                parts.append(block_of(where, block))
            case "thinking":
                thoughts.append(_string(where, block, "thinking"))
            case "redacted_thinking":
                pass
            case "tool_use":
                function = {"name": _string(where, block, "name"), "arguments": json.dumps(block.get("input") or {})}
                calls.append({"id": _string(where, block, "id"), "type": "function", "function": function})
            case "tool_result":
                result = _text_of(where, block.get("content") or "")
                yield {"role": "tool", "tool_call_id": _string(where, block, "tool_use_id"), "content": result}
            case kind:
                raise refused(where, f"a block of type {clipped(str(kind), TOLD_LENGTH)!r} is not supported")
    if parts or calls or thoughts:
        said: dict[str, Any] = {"role": message.role, "content": joined(parts)}
        if calls:
            said |= {"tool_calls": calls, "content": said["content"] or None}
        if thoughts:
            said["reasoning_content"] = "".join(thoughts)
        yield said


def _text_of(where: str, content: object) -> str:
    """Of a text, or of blocks of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise refused(where, "it must be a text or a list of blocks")
    for block in content:
        if block.get("type") != "text":
            kind = clipped(str(block.get("type")), TOLD_LENGTH)
            raise refused(where, f"a block of type {kind!r} is not supported here; only text is")
    return "\n".join(_string(where, block, "text") for block in content)


def _string(where: str, block: dict[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise refused(where, f'a block of type {clipped(str(block.get("type")), TOLD_LENGTH)!r} needs its "{name}"')
    return value
