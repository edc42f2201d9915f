"""Every form that a request for an answer or for vectors may have, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from actors.gateway import (
    anthropic_requests,
    llama_server_requests,
    ollama_requests,
    openai_requests,
    responses_requests,
)
from actors.gateway.bodies import checked
from actors.gateway.openai_requests import Ask

Form = Literal[
    "chat", "text", "embed", "ollama-chat", "ollama-generate", "ollama-embed", "ollama-embedding", "anthropic",
    "anthropic-count", "completion", "infill", "tokenize", "detokenize", "apply-template", "rerank",
    "responses",
]  # fmt: skip

Body = (
    openai_requests.ChatRequest
    | openai_requests.CompletionRequest
    | openai_requests.EmbeddingsRequest
    | ollama_requests.OllamaChatRequest
    | ollama_requests.OllamaGenerateRequest
    | ollama_requests.OllamaEmbedRequest
    | ollama_requests.OllamaEmbeddingRequest
    | anthropic_requests.MessagesRequest
    | anthropic_requests.CountTokensRequest
    | llama_server_requests.LlamaCompletionRequest
    | llama_server_requests.InfillRequest
    | llama_server_requests.TokenizeRequest
    | llama_server_requests.DetokenizeRequest
    | llama_server_requests.ApplyTemplateRequest
    | llama_server_requests.RerankRequest
    | responses_requests.ResponsesRequest
)

FORMS: Mapping[Form, type[Body]] = {
    "chat": openai_requests.ChatRequest,
    "text": openai_requests.CompletionRequest,
    "embed": openai_requests.EmbeddingsRequest,
    "ollama-chat": ollama_requests.OllamaChatRequest,
    "ollama-generate": ollama_requests.OllamaGenerateRequest,
    "ollama-embed": ollama_requests.OllamaEmbedRequest,
    "ollama-embedding": ollama_requests.OllamaEmbeddingRequest,
    "anthropic": anthropic_requests.MessagesRequest,
    "anthropic-count": anthropic_requests.CountTokensRequest,
    "completion": llama_server_requests.LlamaCompletionRequest,
    "infill": llama_server_requests.InfillRequest,
    "tokenize": llama_server_requests.TokenizeRequest,
    "detokenize": llama_server_requests.DetokenizeRequest,
    "apply-template": llama_server_requests.ApplyTemplateRequest,
    "rerank": llama_server_requests.RerankRequest,
    "responses": responses_requests.ResponsesRequest,
}


def read_ask(form: Form, body: bytes | bytearray, request_id: str, key: str) -> Ask:
    """What `body` asks for. Raises Rejected. Costs time and memory by the size of `body`: see `parsers`."""
    return checked(FORMS[form], body).ask(request_id, key)
