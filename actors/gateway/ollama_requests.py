"""What Ollama's clients send, and what it means here: the same requests as OpenAI's, in other words.

`options` that Arriero does not know are ignored, because clients send many; so is `options.num_gpu` and its like:
layers are placed by the scheduler. `keep_alive` 0 unloads the model after the answer, a negative one pins it; any other
says how long it may be idle.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from actors.gateway.attached import picture
from actors.gateway.hashes import fingerprint_of, opening_of, prefix_of
from actors.gateway.lora_settings import LoraSettings
from actors.gateway.openai_requests import (
    MAX_INPUTS,
    Ask,
    Tool,
    checked_stops,
    refused,
)
from actors.gateway.sampler_settings import SamplerSettings
from actors.records import MAX_NAME_LENGTH, MAX_TOKENS
from actors.serving.protocol import EmbedRequest, GenerateRequest, ReplyForm, content_of
from scheduler.events import RequestArrived
from scheduler.units import RequestId

LATEST = ":latest"
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ns|us|µs|ms|s|m|h)")
_LONGEST_DURATION = 32  # characters
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(given: object) -> object:
    """Of Ollama's durations: a number of seconds, or a text such as "1h30m"."""
    if not isinstance(given, str):
        return given
    text = given.strip() if len(given) <= _LONGEST_DURATION else ""
    sign, text = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        return sign * float(text)
    if not text or _DURATION.sub("", text):
        raise ValueError('a duration is a number of seconds, or a text such as "5m"')
    return sign * sum(float(number) * _UNITS_S[unit] for number, unit in _DURATION.findall(text))


Seconds = Annotated[float | None, BeforeValidator(seconds_of)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class Options(SamplerSettings, LoraSettings):
    """llama.cpp's settings, in Ollama's spelling. `lora` is among them: Ollama's own clients send no other fields."""

    model_config = ConfigDict(allow_inf_nan=False)

    num_ctx: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    num_predict: int | None = Field(default=None, ge=-2, le=MAX_TOKENS)  # -1, -2: no limit
    stop: str | Texts | None = None

    def max_tokens(self) -> int | None:
        return None if self.num_predict is None or self.num_predict < 0 else self.num_predict


class _Spoken(BaseModel):
    """As Go reads it: null says as little as a field that is not there."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class OllamaRequest(_Spoken):
    """What every request says. Unknown fields are ignored."""

    model: str = Field(min_length=1, max_length=MAX_NAME_LENGTH)
    keep_alive: Seconds = None
    options: Options | None = None

    @property
    def name(self) -> str:
        return self.model.removesuffix(LATEST)

    def asked(
        self,
        request_id: str,
        key: str,
        request: GenerateRequest | EmbedRequest,
        kind: Literal["generate", "embed", "load"],
        prefix: str = "",
    ) -> Ask:
        n_ctx = self.options.num_ctx if self.options else None
        need = RequestArrived(
            RequestId(request_id), self.name, kind, n_ctx, None, None, key, prefix, fingerprint_of(self.name, request)
        )
        return Ask(need, request, keep_alive_s=self.keep_alive)


class GeneratingRequest(OllamaRequest):
    """What chats and completions share."""

    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None

    def generation(
        self,
        form: Literal["ollama-chat", "ollama-generate"],
        request_id: str,
        key: str,
        beginning: object,
        **content: object,
    ) -> Ask:
        options = self.options or Options()
        schema = {} if self.format == "json" else self.format or None
        thinking: dict[str, Any] = {}
        if self.think is False:
            thinking["chat_template_kwargs"] = {"enable_thinking": False}
        elif isinstance(self.think, str):
            thinking["reasoning_effort"] = self.think
        request = GenerateRequest(
            content_of(
                **content,
                **(thinking if "messages" in content else {}),
                json_schema=schema,
                logit_bias=options.biased_texts(),
            ),
            max_tokens=options.max_tokens(),
            stop=checked_stops("options.stop", options.stop),
            sampling=options.sampling(randomly=options.seed is not None and options.seed < 0),
            reply=ReplyForm(form, self.stream, request_id=request_id, model=self.model, created=time.time()),
            lora=options.scales(),
        )
        return self.asked(request_id, key, request, "generate", prefix_of(beginning, request.lora))

    def only_load(self, request_id: str, key: str) -> Ask:
        return self.asked(request_id, key, GenerateRequest(b""), "load")


def with_images(param: str, text: str, images: Sequence[str] | None) -> str | list[dict[str, Any]]:
    """The content of a message. Ollama shows pictures before the text that came with them."""
    if not images:
        return text
    return [*(picture(param, image) for image in images), {"type": "text", "text": text}]


class CalledFunction(BaseModel):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class ToolCall(BaseModel):
    id: str = ""
    function: CalledFunction


class OllamaMessage(_Spoken):
    role: str
    content: str = ""
    thinking: str | None = None
    images: Texts | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    def as_openai(self, index: int) -> dict[str, Any]:
        content = with_images(f"messages.{index}.images", self.content, self.images)
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id or f"call_{number}",
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": json.dumps(call.function.arguments)},
                }
                for number, call in enumerate(self.tool_calls)
            ]
        if self.tool_name:
            message["name"] = self.tool_name
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id or "call_0"
        return message


class OllamaChatRequest(GeneratingRequest):
    """`POST /api/chat`. Without messages it only loads the model."""

    messages: Annotated[list[OllamaMessage], Field(fail_fast=True)] = Field(default_factory=list)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None

    def ask(self, request_id: str, key: str) -> Ask:
        """Raises Rejected for what Arriero cannot do. `key`: the name of the API key."""
        if not self.messages:
            return self.only_load(request_id, key)
        messages = [message.as_openai(index) for index, message in enumerate(self.messages)]
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()] or None
        beginning: Sequence[Mapping[str, Any]] = opening_of(messages)
        if tools:
            beginning = [*tools, *beginning]
        return self.generation("ollama-chat", request_id, key, beginning, messages=messages, tools=tools)


class OllamaGenerateRequest(GeneratingRequest):
    """`POST /api/generate`. Without a prompt it only loads the model. `raw`: no chat template."""

    prompt: str = ""
    system: str | None = None
    suffix: str | None = None
    template: str | None = None
    images: Texts | None = None
    raw: bool = False

    def ask(self, request_id: str, key: str) -> Ask:
        """Raises Rejected for what Arriero cannot do. `key`: the name of the API key."""
        if self.template:
            raise refused("template", "it is not supported; leave it out")
        if not self.prompt and not self.images:
            return self.only_load(request_id, key)
        if self.images and (self.suffix or self.raw):
            raise refused("images", "they need the chat template; send them without suffix and raw")
        if self.suffix:
            gap = {"input_prefix": self.prompt, "input_suffix": self.suffix}
            return self.generation("ollama-generate", request_id, key, self.prompt[:256], infill=gap)
        if self.raw:
            return self.generation("ollama-generate", request_id, key, self.prompt[:256], prompt=self.prompt)
        messages: list[dict[str, Any]] = [{"role": "user", "content": with_images("images", self.prompt, self.images)}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return self.generation("ollama-generate", request_id, key, opening_of(messages), messages=messages)


class OllamaEmbedRequest(OllamaRequest):
    """`POST /api/embed`."""

    input: str | Texts
    dimensions: int | None = Field(default=None, ge=1, le=MAX_TOKENS)

    def ask(self, request_id: str, key: str) -> Ask:
        """Raises Rejected for what Arriero cannot do. `key`: the name of the API key."""
        inputs = [self.input] if isinstance(self.input, str) else self.input
        if not inputs or not all(inputs):
            raise refused("input", "it is empty")
        if len(inputs) > MAX_INPUTS:
            raise refused("input", f"{len(inputs)} inputs; at most {MAX_INPUTS} are allowed in one request")
        request = EmbedRequest(content_of(inputs=inputs), dimensions=self.dimensions)
        return self.asked(request_id, key, request, "embed")


class OllamaEmbeddingRequest(OllamaRequest):
    """`POST /api/embeddings`, which came before `/api/embed`."""

    prompt: str = Field(min_length=1)

    def ask(self, request_id: str, key: str) -> Ask:
        """`key`: the name of the API key."""
        return self.asked(request_id, key, EmbedRequest(content_of(inputs=[self.prompt])), "embed")


class ModelName(BaseModel):
    """`POST /api/show`: `model`, or `name` as it was before."""

    model: str = Field(default="", max_length=MAX_NAME_LENGTH)
    name: str = Field(default="", max_length=MAX_NAME_LENGTH)

    @property
    def wanted(self) -> str:
        return (self.model or self.name).removesuffix(LATEST)
