"""The OpenAI-compatible routes: models, chat completions, completions, embeddings.

What goes out per token is one small dict through `json.dumps`: no pydantic, no task, no copy on that path.
Answers carry the request's id ("chatcmpl-…"), which the queue and the event log show too.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from actors.gateway.backend import Backend
from actors.gateway.embeddings import Vectors
from actors.gateway.openai_requests import Ask, Form
from actors.gateway.reader import Reader
from actors.gateway.relay import Relay
from actors.gateway.stream import EventStream, event, while_connected
from actors.records import ModelInfo
from actors.serving.protocol import Chunk, EmbedRequest, GenerateRequest
from scheduler.errors import UnknownModel

DONE = event(b"[DONE]")


def openai_routes(backend: Backend, relay: Relay, reader: Reader, pulse_s: float) -> APIRouter:
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
    async def chat(request: Request) -> Response:
        return await generate("chat", request, "chatcmpl")

    @router.post("/completions")
    async def complete(request: Request) -> Response:
        return await generate("text", request, "cmpl")

    @router.post("/embeddings")
    async def embed(request: Request) -> Response:
        ask = await reader.ask(request, "embed", _new_id("embd"))
        assert isinstance(ask.request, EmbedRequest)
        result = await while_connected(request, relay.embed(ask.need, ask.request))
        return Vectors(ask.need.model, result, ask.encoding_format)

    async def generate(form: Form, request: Request, prefix: str) -> Response:
        ask = await reader.ask(request, form, _new_id(prefix))
        assert isinstance(ask.request, GenerateRequest)
        reply = _Reply(form, ask)
        if ask.stream:
            return EventStream(reply.events(relay.generate(ask.need, ask.request)), pulse_s)
        return JSONResponse(reply.whole(await while_connected(request, relay.generate_whole(ask.need, ask.request))))

    return router


class _Reply:
    """One answer in OpenAI's words: whole, or as events."""

    def __init__(self, form: Form, ask: Ask) -> None:
        self._chat = form == "chat"
        self._include_usage = ask.include_usage
        self._head: dict[str, Any] = {
            "id": ask.need.request_id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": ask.need.model,
        }

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        text, last = "".join(chunk.text for chunk in chunks), chunks[-1]
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": last.finish_reason}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return {**self._head, "choices": [choice], "usage": _usage(last)}

    async def events(self, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[bytes, None]:
        head = {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head
        # OpenAI's clients expect `usage` in every event once they have asked for it: null until the end.
        tail: dict[str, Any] = {"usage": None} if self._include_usage else {}
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
            if self._include_usage:
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
