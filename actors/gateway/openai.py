"""The OpenAI-compatible routes: models, chat completions, completions, embeddings.

What goes out per token is one small dict through `json.dumps`: no pydantic, no task, no copy on that path.
Answers carry the request's id ("chatcmpl-…"), which the queue and the event log show too.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from array import array
from base64 import b64encode
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from actors.gateway.backend import Backend
from actors.gateway.openai_requests import ChatRequest, CompletionRequest, EmbeddingsRequest, SamplingRequest, prefix_of
from actors.gateway.relay import Relay
from actors.gateway.security import key_of
from actors.gateway.stream import EventStream, event, while_connected
from actors.gateway.wire import ModelInfo
from actors.serving.protocol import Chunk, EmbedResult, GenerateRequest
from scheduler.errors import UnknownModel

DONE = event(b"[DONE]")


def openai_routes(backend: Backend, relay: Relay, pulse_s: float) -> APIRouter:
    """`/v1/*`. While a stream waits for its first token, a comment goes out every `pulse_s` seconds."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models")
    async def list_models() -> JSONResponse:
        models = [_model(model) for model in await backend.models() if model.state != "invalid"]
        return JSONResponse({"object": "list", "data": models})

    @router.get("/models/{name:path}")
    async def show_model(name: str) -> JSONResponse:
        models = await backend.models()
        for model in models:
            if model.name == name:
                return JSONResponse(_model(model))
        raise UnknownModel(f"no model {name!r} in the catalogue; it has {', '.join(m.name for m in models) or 'none'}")

    @router.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await generate("chat", body, body.generation(_new_id("chatcmpl")), request)

    @router.post("/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await generate("text", body, body.generation(_new_id("cmpl")), request)

    @router.post("/embeddings")
    async def embed(body: EmbeddingsRequest, request: Request) -> JSONResponse:
        asked = body.embedding(_new_id("embd"))
        need = body.need(asked.request_id, "embed", key_of(request))
        result = await while_connected(request, relay.embed(need, asked))
        return JSONResponse(_embeddings(body, result))

    async def generate(
        form: Literal["chat", "text"], body: SamplingRequest, asked: GenerateRequest, request: Request
    ) -> Response:
        need = body.need(asked.request_id, "generate", key_of(request), prefix_of(asked))
        reply = _Reply(form, asked.request_id, body.model)
        if body.stream:
            return EventStream(reply.events(relay.generate(need, asked), body.include_usage), pulse_s)
        return JSONResponse(reply.whole(await while_connected(request, relay.generate_whole(need, asked))))

    return router


class _Reply:
    """One answer in OpenAI's words: whole, or as events."""

    def __init__(self, form: Literal["chat", "text"], request_id: str, model: str) -> None:
        self._chat = form == "chat"
        self._head: dict[str, Any] = {
            "id": request_id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        text, last = "".join(chunk.text for chunk in chunks), chunks[-1]
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": last.finish_reason}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return {**self._head, "choices": [choice], "usage": _usage(last)}

    async def events(self, chunks: AsyncGenerator[Chunk, None], include_usage: bool) -> AsyncGenerator[bytes, None]:
        head = {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head
        # OpenAI's clients expect `usage` in every event once they have asked for it: null until the end.
        tail: dict[str, Any] = {"usage": None} if include_usage else {}
        role = {"role": "assistant"}
        try:
            async for chunk in chunks:
                choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": chunk.finish_reason}
                if self._chat:
                    choice["delta"] = {**role, "content": chunk.text} if chunk.text or role else {}
                    role = {}
                else:
                    choice["text"] = chunk.text
                yield event(json.dumps({**head, "choices": [choice], **tail}).encode())
            if include_usage:
                yield event(json.dumps({**head, "choices": [], "usage": _usage(chunk)}).encode())
            yield DONE
        finally:
            await chunks.aclose()


def _new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def _usage(last: Chunk) -> dict[str, Any]:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
    }


def _model(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.modified_at_s or 0),
        "owned_by": "arriero",
        "meta": model.model_dump(include={"architecture", "quantization", "size_bytes", "n_ctx_train", "n_ctx"}),
    }


def _embeddings(body: EmbeddingsRequest, result: EmbedResult) -> dict[str, Any]:
    encode = _base64 if body.encoding_format == "base64" else list
    return {
        "object": "list",
        "model": body.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(result.vectors)
        ],
        "usage": {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens},
    }


def _base64(vector: tuple[float, ...]) -> str:
    """Little-endian float32, as OpenAI's clients decode it."""
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return b64encode(floats.tobytes()).decode()
