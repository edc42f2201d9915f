"""What OpenAI's clients send, and what it means here.

Fields that change the answer and that Arriero cannot honour are refused with their name (`param`); other unknown
fields are ignored, because clients send many. Sampling settings that are left out take llama.cpp's defaults (those of
`Sampling`), not OpenAI's: small quantised models ramble at temperature 1 with nothing cut off.

Beyond OpenAI's fields: `top_k`, `min_p`, `repeat_penalty` (llama.cpp), `n_ctx`, `deadline_s` and `priority`
(Arriero).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.gateway.backend import AcquireRequest
from actors.gateway.wire import MAX_NAME_LENGTH
from actors.serving.protocol import EmbedRequest, GenerateRequest, Sampling
from scheduler.errors import Rejected
from scheduler.units import RequestId

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
MAX_STOPS = 32
PREFIX_LENGTH = 256  # characters or tokens
MAX_INPUTS = 2048  # OpenAI's own bound on an embeddings request

# These have the same names in `Sampling`; what the caller leaves out takes its default.
_SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
)  # fmt: skip


class Message(BaseModel):
    """One turn of a chat. Further keys (`name`, `tool_calls`) go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = None


class ModelRequest(BaseModel):
    """What every request says. Unknown fields are ignored."""

    model: str = Field(min_length=1, max_length=MAX_NAME_LENGTH)
    n_ctx: int | None = Field(default=None, ge=1)
    deadline_s: float | None = Field(default=None, gt=0)
    priority: int | None = Field(default=None, ge=-10, le=10)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        """JSON can spell halves of surrogate pairs, which no tokenizer takes."""
        if isinstance(data, bytes):  # it did not come as JSON, which is said elsewhere
            return data
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"a text holds {half}, half of a surrogate pair: that is no Unicode") from None
        return data

    def need(
        self, request_id: str, kind: Literal["generate", "embed"], key: str = "", prefix: str = ""
    ) -> AcquireRequest:
        """`key`: the name of the API key that it came with; `prefix`: what its prompt begins with, as a hash."""
        return AcquireRequest(
            RequestId(request_id), self.model, self.n_ctx, kind, self.deadline_s, self.priority, key, prefix
        )


class SamplingRequest(ModelRequest):
    """What chats and completions share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=-1)  # -1: no limit, as llama.cpp's clients say it
    max_completion_tokens: int | None = Field(default=None, ge=-1)  # OpenAI's newer name; it wins
    stop: str | list[str] | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repeat_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    n: int | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def token_limit(self) -> int | None:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if limit == 0:
            raise _refused("max_tokens", "0 tokens make no answer: ask for one at least, or leave the limit out")
        return None if limit == -1 else limit

    def stops(self) -> tuple[str, ...]:
        texts = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(texts) > MAX_STOPS:
            raise _refused("stop", f"{len(texts)} stop strings; {MAX_STOPS} are the most")
        return tuple(text for text in texts if text)

    def sampling(self) -> Sampling:
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        # llama.cpp's seeds have 32 bits; -1 is its spelling of "random".
        seed = None if self.seed is None or self.seed == -1 else self.seed & 0xFFFFFFFF
        return Sampling(**given, seed=seed, json_schema=self._json_schema())

    def check_choices(self) -> None:
        if self.n not in (None, 1):
            raise _refused("n", f"{self.n} choices; Arriero gives one answer per request: send several requests")

    def _json_schema(self) -> str | None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return "{}"
        schema = (wanted.json_schema or {}).get("schema")
        if not isinstance(schema, Mapping):
            raise _refused("response_format", 'json_schema needs {"name": …, "schema": {…}}')
        return json.dumps(schema)


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    logprobs: bool | None = None
    modalities: list[str] | None = None

    def generation(self, request_id: str) -> GenerateRequest:
        """Raises Rejected for what Arriero cannot do."""
        self.check_choices()
        if self.tools or self.functions:
            raise _refused("tools" if self.tools else "functions", "tools are not supported yet: leave them out")
        if self.logprobs:
            raise _refused("logprobs", "token probabilities are not supported")
        if self.modalities not in (None, ["text"]):
            raise _refused("modalities", "text is the only modality")
        return GenerateRequest(
            request_id,
            messages=tuple(_plain(index, message) for index, message in enumerate(self.messages)),
            max_tokens=self.token_limit(),
            stop=self.stops(),
            sampling=self.sampling(),
        )


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`: one prompt, as text or as token ids."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    def generation(self, request_id: str) -> GenerateRequest:
        """Raises Rejected for what Arriero cannot do."""
        self.check_choices()
        if self.suffix:
            raise _refused("suffix", "filling in the middle is not supported")
        if self.echo:
            raise _refused("echo", "echoing the prompt is not supported")
        if self.logprobs is not None:
            raise _refused("logprobs", "token probabilities are not supported")
        if self.best_of not in (None, 1):
            raise _refused("best_of", "Arriero gives one answer per request")
        prompts = _texts_or_tokens("prompt", self.prompt)
        if len(prompts) > 1:
            raise _refused("prompt", f"{len(prompts)} prompts; send each as a request of its own")
        return GenerateRequest(
            request_id,
            prompt=prompts[0],
            max_tokens=self.token_limit(),
            stop=self.stops(),
            sampling=self.sampling(),
        )


class EmbeddingsRequest(ModelRequest):
    """`POST /v1/embeddings`."""

    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def embedding(self, request_id: str) -> EmbedRequest:
        """Raises Rejected for what Arriero cannot do."""
        if self.dimensions is not None:
            raise _refused("dimensions", "vectors come in the model's own length only: leave it out")
        inputs = _texts_or_tokens("input", self.input)
        if len(inputs) > MAX_INPUTS:
            raise _refused("input", f"{len(inputs)} inputs; {MAX_INPUTS} are the most in one request")
        return EmbedRequest(request_id, inputs)


def prefix_of(asked: GenerateRequest) -> str:
    """A hash of what the prompt begins with: of a chat, all up to the first message of the user, which stays while it
    goes on; of a text, its first characters."""
    beginning: object = asked.prompt[:PREFIX_LENGTH] if asked.prompt is not None else _opening(asked.messages or ())
    return blake2b(json.dumps(beginning, default=str).encode(), digest_size=12).hexdigest()


def _opening(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    first = next((i for i, message in enumerate(messages) if message.get("role") == "user"), 0)
    return messages[: first + 1]


def _refused(param: str, message: str) -> Rejected:
    return Rejected(f"{param}: {message}", param=param)


def _plain(index: int, message: Message) -> dict[str, Any]:
    """The message with its content as one text."""
    plain = message.model_dump()
    if isinstance(message.content, list):
        plain["content"] = "".join(_text_of_part(index, part) for part in message.content)
    return plain


def _text_of_part(index: int, part: Mapping[str, Any]) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        raise _refused(
            f"messages.{index}.content", f"a part of type {part.get('type')!r} is not supported: only text is"
        )
    return text


def _texts_or_tokens(
    param: str, given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
) -> tuple[str | tuple[int, ...], ...]:
    """One entry per input, whichever of OpenAI's four spellings was used."""
    inputs: tuple[str | tuple[int, ...], ...]
    if isinstance(given, str):
        inputs = (given,)
    elif given and isinstance(given[0], int):
        inputs = (tuple(token for token in given if isinstance(token, int)),)
    else:
        inputs = tuple(item if isinstance(item, str) else tuple(item) for item in given if not isinstance(item, int))
    if not inputs or not all(inputs):
        raise _refused(param, "it is empty" if len(inputs) < 2 else f"item {_first_empty(inputs)} is empty")
    return inputs


def _first_empty(inputs: Sequence[Sequence[object]]) -> int:
    return next(index for index, item in enumerate(inputs) if not item)
