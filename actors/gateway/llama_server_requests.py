"""What clients of llama-server and of rerankers send, beyond OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, Field

from actors.gateway.hashes import prefix_of
from actors.gateway.lora_settings import LoraSettings
from actors.gateway.openai_requests import (
    MAX_GRAMMAR_LENGTH,
    MAX_INPUTS,
    MAX_PROBS,
    PREFIX_LENGTH,
    Ask,
    ChatRequest,
    ModelRequest,
    Ranking,
    TextOrTokens,
    Texts,
    Tokens,
    checked_stops,
    refused,
    texts_or_tokens,
)
from actors.gateway.sampler_settings import SamplerSettings
from actors.records import MAX_NAME_LENGTH, MAX_TOKENS
from actors.serving.protocol import EmbedRequest, GenerateRequest, ReplyForm, content_of, given_of

MAX_FILES = 1024  # in `input_extra`
MAX_EXAMINED = 262_144  # characters or tokens
MAX_RETURNED = 1_048_576  # characters of documents that are sent back


class LlamaServerRequest(ModelRequest, SamplerSettings, LoraSettings):
    """What `/completion` and `/infill` share."""

    stream: bool = False
    n_predict: int | None = Field(
        default=None, ge=-1, le=MAX_TOKENS, validation_alias=AliasChoices("n_predict", "max_tokens")
    )
    stop: str | Texts | None = None
    n_probs: int = Field(default=0, ge=0, le=MAX_PROBS)
    grammar: str | None = Field(default=None, max_length=MAX_GRAMMAR_LENGTH)
    json_schema: dict[str, Any] | None = None

    def generation(self, request_id: str, key: str, beginning: object, content: Mapping[str, object]) -> Ask:
        if self.grammar and self.json_schema is not None:
            raise refused("grammar", "it cannot be combined with a JSON schema; send one of them")
        request = GenerateRequest(
            content_of(
                **content,
                json_schema=self.json_schema,
                grammar=self.grammar or None,
                logit_bias=self.biased_texts(),
            ),
            max_tokens=None if self.n_predict == -1 else self.n_predict,
            stop=checked_stops("stop", self.stop),
            sampling=self.sampling(randomly=self.seed == -1),
            reply=ReplyForm(
                "completion", self.stream, request_id=request_id, model=self.model, created=int(time.time())
            ),
            n_probs=self.n_probs or None,
            lora=self.scales(),
        )
        return Ask(self.need(request_id, request, "generate", key, prefix_of(beginning, request.lora)), request)


class LlamaCompletionRequest(LlamaServerRequest):
    """`POST /completion`."""

    prompt: TextOrTokens

    def ask(self, request_id: str, key: str) -> Ask:
        """Raises Rejected for what Arriero cannot do. `key`: the name of the API key."""
        prompts = texts_or_tokens("prompt", self.prompt)
        if len(prompts) > 1:
            raise refused("prompt", f"{len(prompts)} prompts; send one, or use /v1/completions")
        return self.generation(request_id, key, prompts[0][:PREFIX_LENGTH], {"prompt": prompts[0]})


class OtherFile(BaseModel):
    text: str
    filename: str = Field(default="tmp", max_length=MAX_NAME_LENGTH)


class InfillRequest(LlamaServerRequest):
    """`POST /infill`: what stands between `input_prefix` and `input_suffix`, and begins with `prompt`."""

    input_prefix: str
    input_suffix: str
    input_extra: Annotated[list[OtherFile], Field(fail_fast=True, max_length=MAX_FILES)] = Field(default_factory=list)
    prompt: str = ""

    def ask(self, request_id: str, key: str) -> Ask:
        """`key`: the name of the API key. Raises Rejected."""
        wanted = {
            "input_prefix": self.input_prefix,
            "input_suffix": self.input_suffix,
            "input_extra": [each.model_dump() for each in self.input_extra],
            "prompt": self.prompt,
        }
        return self.generation(request_id, key, self.input_prefix[:PREFIX_LENGTH], {"infill": wanted})


class ExaminingRequest(ModelRequest):
    """A question that needs the model's vocabulary and no computing."""

    def examination(self, request_id: str, key: str, asked: Mapping[str, object]) -> Ask:
        reply = ReplyForm("plain", request_id=request_id, model=self.model)
        request = GenerateRequest(content_of(examine=asked), reply=reply)
        return Ask(self.need(request_id, request, "generate", key), request)


class TokenizeRequest(ExaminingRequest):
    """`POST /tokenize`."""

    content: str = Field(max_length=MAX_EXAMINED)
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False

    def ask(self, request_id: str, key: str) -> Ask:
        """`key`: the name of the API key."""
        asked = {
            "tokenize": self.content,
            "add_special": self.add_special,
            "parse_special": self.parse_special,
            "with_pieces": self.with_pieces,
        }
        return self.examination(request_id, key, asked)


class DetokenizeRequest(ExaminingRequest):
    """`POST /detokenize`."""

    tokens: Tokens = Field(max_length=MAX_EXAMINED)

    def ask(self, request_id: str, key: str) -> Ask:
        """`key`: the name of the API key."""
        return self.examination(request_id, key, {"detokenize": self.tokens})


class ApplyTemplateRequest(ChatRequest):
    """`POST /apply-template`: the prompt that a chat would be."""

    def ask(self, request_id: str, key: str) -> Ask:
        """`key`: the name of the API key. Raises Rejected."""
        reply = ReplyForm("plain", request_id=request_id, model=self.model)
        content = content_of(examine={"apply_template": given_of(self.content())})
        request = GenerateRequest(content, reply=reply)
        return Ask(self.need(request_id, request, "generate", key), request)


class Document(BaseModel):
    text: str


class RerankRequest(ModelRequest):
    """`POST /v1/rerank`, as Jina, Cohere and llama-server have it."""

    query: str
    documents: Annotated[list[str | Document], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = False

    def texts(self) -> Sequence[str]:
        return [each if isinstance(each, str) else each.text for each in self.documents]

    def ask(self, request_id: str, key: str) -> Ask:
        """`key`: the name of the API key. Raises Rejected."""
        texts = self.texts()
        if self.return_documents and (length := sum(map(len, texts))) > MAX_RETURNED:
            raise refused(
                "return_documents", f"the documents have {length} characters, more than {MAX_RETURNED}; use their index"
            )
        request = EmbedRequest(content_of(rerank={"query": self.query, "documents": texts}), rerank=True)
        wanted = Ranking(min(self.top_n or len(texts), len(texts)), tuple(texts) if self.return_documents else ())
        return Ask(self.need(request_id, request, "embed", key), request, ranking=wanted)
