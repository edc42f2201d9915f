"""What OpenAI's clients send, and what it means here.

Fields that change the answer and that Arriero cannot honour are refused with their name (`param`); other unknown
fields are ignored, because clients send many. Sampling settings that are left out take llama.cpp's defaults (those of
`Sampling`), not OpenAI's: small quantised models ramble at temperature 1 with nothing cut off.

Beyond OpenAI's fields: llama.cpp's samplers (`SamplerSettings`), and Arriero's `n_ctx`, `deadline_s` and `priority`.
Lists may have millions of elements: they fail at their first wrong one (see `bodies`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from actors.gateway.attached import Fetch, content_to_fetch, joined, part_of
from actors.gateway.bodies import TOLD_LENGTH
from actors.gateway.errors import clipped
from actors.gateway.hashes import fingerprint_of, opening_of, prefix_of
from actors.gateway.lora_settings import LoraSettings
from actors.gateway.sampler_settings import SamplerSettings
from actors.records import MAX_NAME_LENGTH, MAX_TOKENS
from actors.serving.protocol import EmbedRequest, GenerateRequest, ReplyForm, content_of
from scheduler.errors import Rejected
from scheduler.events import RequestArrived
from scheduler.units import RequestId

MAX_STOPS = 32
MAX_STOP_LENGTH = 1024  # characters: they are looked for at every token
MAX_CHOICES = 128  # OpenAI's own bound: answers of one request
MAX_PROBS = 100  # OpenAI takes 20
PREFIX_LENGTH = 256  # characters or tokens
MAX_GRAMMAR_LENGTH = 65536  # characters; what it costs is limited in the preparer
MAX_TOOLS = 128  # OpenAI's own bound
MAX_TOOL_NAME = 256
MAX_INPUTS = 2048  # OpenAI's own bound on an embeddings request


TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Tokens = Annotated[list[TokenId], Field(fail_fast=True)]
TextOrTokens = str | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]


@dataclass(frozen=True, slots=True)
class Ranking:
    """How many of the best documents are told, and all documents where they are to be told with their texts."""

    top_n: int
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """What a body asks for, and all that the gateway needs to know of it. Small, but for the request's content."""

    need: RequestArrived
    request: GenerateRequest | EmbedRequest
    encoding_format: Literal["float", "base64"] = "float"
    ranking: Ranking | None = None  # of a request to a reranker
    keep_alive_s: float | None = None  # Ollama's: 0 unloads the model after the answer, a negative one pins it
    fetches: tuple[Fetch, ...] = ()  # what the request's content lacks


class Message(BaseModel):
    """One turn of a chat. Further keys (`name`, `tool_calls`) go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None


class Function(BaseModel):
    """What a tool is called, what it is for, and the JSON schema of its arguments."""

    name: str = Field(min_length=1, max_length=MAX_TOOL_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class ToolName(BaseModel):
    name: str


class NamedTool(BaseModel):
    """A tool that must be called."""

    type: Literal["function"] = "function"
    function: ToolName


class StreamOptions(BaseModel):
    include_usage: bool = False


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = None
    object_schema: dict[str, Any] | None = Field(default=None, alias="schema")  # llama-server's, with json_object


class ModelRequest(BaseModel):
    """What every request says. Unknown fields are ignored."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=MAX_NAME_LENGTH)
    n_ctx: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    deadline_s: float | None = Field(default=None, gt=0)
    priority: int | None = Field(default=None, ge=-10, le=10)

    def need(
        self,
        request_id: str,
        request: GenerateRequest | EmbedRequest,
        kind: Literal["generate", "embed"],
        key: str,
        prefix: str = "",
    ) -> RequestArrived:
        """The slot that `request` needs. `key`: the name of the API key that it came with; `prefix`: what its prompt
        begins with, as a hash."""
        return RequestArrived(
            RequestId(request_id), self.model, kind, self.n_ctx, self.deadline_s, self.priority, key, prefix,
            fingerprint_of(self.model, request),
        )  # fmt: skip


class SamplingRequest(ModelRequest, SamplerSettings, LoraSettings):
    """What chats and completions share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=-1, le=MAX_TOKENS)  # -1: no limit, as llama.cpp's clients say it
    max_completion_tokens: int | None = Field(default=None, ge=-1, le=MAX_TOKENS)  # OpenAI's newer name; it wins
    stop: str | Texts | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = Field(default=None, max_length=MAX_GRAMMAR_LENGTH)  # GBNF, llama.cpp's own
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, validation_alias=AliasChoices("n", "n_cmpl"))
    n_probs: int | None = Field(default=None, ge=0, le=MAX_PROBS)  # llama.cpp's name for `logprobs`

    def generation(
        self,
        form: Literal["chat", "text"],
        request_id: str,
        key: str,
        beginning: object,
        *,
        as_functions: bool = False,
        n_probs: int | None = None,
        echo: bool = False,
        **content: object,
    ) -> Ask:
        """`content`: the parts of the request's content; `beginning`: that of its prompt. Raises Rejected."""
        if self.grammar and (content.get("tools") or self._json_schema() is not None):
            raise refused("grammar", "it cannot be combined with tools or a response format; send one of them")
        whole, fetches = content_to_fetch(
            **content,
            json_schema=self._json_schema(),
            grammar=self.grammar or None,
            logit_bias=self.biased_texts(),
        )
        request = GenerateRequest(
            whole,
            max_tokens=self._token_limit(),
            stop=checked_stops("stop", self.stop),
            sampling=self.sampling(randomly=self.seed == -1),  # as llama.cpp spells it
            reply=ReplyForm(
                form,
                stream=bool(self.stream),
                include_usage=self.stream_options is not None and self.stream_options.include_usage,
                request_id=request_id,
                model=self.model,
                created=int(time.time()),
                as_functions=as_functions,
            ),
            n=self.n or 1,
            n_probs=self.n_probs or n_probs,
            echo=echo,
            lora=self.scales(),
        )
        need = self.need(request_id, request, "generate", key, prefix_of(beginning, request.lora))
        return Ask(need, request, fetches=fetches)

    def _token_limit(self) -> int | None:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if limit == -1 else limit

    def _json_schema(self) -> Mapping[str, Any] | None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return wanted.object_schema or {}
        schema = (wanted.json_schema or {}).get("schema")
        if not isinstance(schema, Mapping):
            raise refused("response_format", 'json_schema needs {"name": …, "schema": {…}}')
        return schema


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(fail_fast=True)] | None = None  # what tools were before
    function_call: Literal["auto", "none"] | ToolName | None = None
    reasoning_effort: str | None = Field(default=None, max_length=MAX_TOOL_NAME)
    reasoning_format: Literal["none", "auto", "deepseek", "deepseek-legacy"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | Literal["reasoning_content", "content"] | None = None
    thinking_budget_tokens: int | None = Field(
        default=None,
        ge=-1,  # no limit
        le=MAX_TOKENS,
        validation_alias=AliasChoices("thinking_budget_tokens", "reasoning_budget_tokens"),
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_PROBS)
    modalities: Texts | None = None

    def ask(self, request_id: str, key: str) -> Ask:
        """Raises Rejected for what Arriero cannot do. `key`: the name of the API key."""
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "it needs logprobs: true")
        content = self.content()
        opening = opening_of(content["messages"])
        return self.generation(
            "chat",
            request_id,
            key,
            [content["tools"], *opening] if content["tools"] else opening,
            as_functions=bool(self.functions),
            n_probs=(self.top_logprobs or 0) if self.logprobs else None,
            **content,
        )

    def content(self) -> dict[str, Any]:
        """What the prompt is made from, and how the answer is read. Raises Rejected for what Arriero cannot do."""
        if self.modalities not in (None, ["text"]):
            raise refused("modalities", "only the modality text is supported")
        messages = [_plain(index, message) for index, message in enumerate(self.messages)]
        options = self.chat_template_kwargs or {}
        if not isinstance(options.get("enable_thinking", True), bool):
            raise refused("chat_template_kwargs", "enable_thinking must be true or false")
        tools, choice = self._tools()
        return {
            "messages": messages,
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls if tools else None,
            "reasoning_effort": self.reasoning_effort,
            "reasoning_format": self.reasoning_format,
            "chat_template_kwargs": options or None,
            "continue_final_message": self.continue_final_message or None,
            "thinking_budget_tokens": None if self.thinking_budget_tokens == -1 else self.thinking_budget_tokens,
        }

    def _tools(self) -> tuple[list[dict[str, Any]] | None, str | None]:
        """The tools that may be called, and whether one must be. A named one is the only one."""
        if self.tools and self.functions:
            raise refused("functions", "they are the older form of tools; send only one of them")
        given = self.tools or [Tool(type="function", function=each) for each in self.functions or ()]
        if not given:
            if self.tool_choice not in (None, "auto", "none"):
                raise refused("tool_choice", "there are no tools to choose from; send tools")
            return None, None
        if len(given) > MAX_TOOLS:
            raise refused("tools", f"{len(given)} tools; at most {MAX_TOOLS} are allowed")
        choice = self.tool_choice or self.function_call
        if isinstance(choice, NamedTool | ToolName):
            wanted = choice.function.name if isinstance(choice, NamedTool) else choice.name
            given = [tool for tool in given if tool.function.name == wanted]
            if not given:
                raise refused("tool_choice", f"there is no tool {clipped(wanted, TOLD_LENGTH)!r}")
            choice = "required"
        return [tool.model_dump(exclude_none=True) for tool in given], choice or "auto"


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`: prompts, as texts or as token ids."""

    prompt: TextOrTokens
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_PROBS)
    best_of: int | None = None

    def ask(self, request_id: str, key: str) -> Ask:
        """Raises Rejected for what Arriero cannot do. `key`: the name of the API key."""
        if self.best_of not in (None, self.n or 1):
            raise refused("best_of", "all answers are returned; ask for this many with n")
        prompts = texts_or_tokens("prompt", self.prompt)
        if (count := len(prompts) * (self.n or 1)) > MAX_CHOICES:
            raise refused("prompt", f"it asks for {count} answers; at most {MAX_CHOICES} are allowed in one request")
        if self.suffix and (len(prompts) > 1 or not isinstance(prompts[0], str)):
            raise refused("suffix", "it needs one prompt, as text")
        content: dict[str, Any] = {"prompt": prompts[0]} if len(prompts) == 1 else {"prompts": prompts}
        if self.suffix:
            content = {"infill": {"input_prefix": prompts[0], "input_suffix": self.suffix}}
        return self.generation(
            "text",
            request_id,
            key,
            prompts[0][:PREFIX_LENGTH],
            n_probs=self.logprobs,
            echo=bool(self.echo),
            **content,
        )


class EmbeddingsRequest(ModelRequest):
    """`POST /v1/embeddings`."""

    input: TextOrTokens
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, le=MAX_TOKENS)

    def ask(self, request_id: str, key: str) -> Ask:
        """Raises Rejected for what Arriero cannot do. `key`: the name of the API key."""
        inputs = texts_or_tokens("input", self.input)
        if len(inputs) > MAX_INPUTS:
            raise refused("input", f"{len(inputs)} inputs; at most {MAX_INPUTS} are allowed in one request")
        request = EmbedRequest(content_of(inputs=inputs), dimensions=self.dimensions)
        return Ask(self.need(request_id, request, "embed", key), request, encoding_format=self.encoding_format)


def checked_stops(param: str, given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings of a request. Raises Rejected when they are too many or too long."""
    texts = (given,) if isinstance(given, str) else tuple(given or ())
    if len(texts) > MAX_STOPS:
        raise refused(param, f"{len(texts)} stop strings; at most {MAX_STOPS} are allowed")
    if (longest := max(map(len, texts), default=0)) > MAX_STOP_LENGTH:
        raise refused(param, f"a stop string has {longest} characters; at most {MAX_STOP_LENGTH} are allowed")
    return tuple(text for text in texts if text)


def refused(param: str, message: str) -> Rejected:
    return Rejected(f"{param}: {message}", param=param)


def _plain(index: int, message: Message) -> dict[str, Any]:
    """The message with its content as one text, or, where it has pictures or sounds, as parts."""
    plain = message.model_dump()
    if isinstance(message.content, list):
        plain["content"] = joined([_part(f"messages.{index}.content", part) for part in message.content])
    return plain


def _part(param: str, part: Mapping[str, Any]) -> dict[str, Any]:
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        if (attached := part_of(param, part)) is not None:
            return attached
        named = clipped(kind, TOLD_LENGTH) if isinstance(kind, str) else "unknown"
        raise refused(param, f"a part of type {named!r} is not supported; only text, image_url and input_audio are")
    if not isinstance(text, str):
        raise refused(param, 'a part of type "text" needs its "text"')
    return {"type": "text", "text": text}


def texts_or_tokens(
    param: str, given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
) -> Sequence[str | Sequence[int]]:
    """One entry per input, whichever of OpenAI's four spellings was used."""
    inputs: Sequence[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not inputs or not all(inputs):
        raise refused(param, "it is empty" if len(inputs) < 2 else f"item {_first_empty(inputs)} is empty")
    return inputs


def _first_empty(inputs: Sequence[Sequence[object]]) -> int:
    return next(index for index, item in enumerate(inputs) if not item)
