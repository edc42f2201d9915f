"""The OpenAI-compatible routes: models, chat completions, completions, embeddings.

Answers come from the runner in the client's own words and are passed on as they are (`actors.serving.replies`). They
carry the request's id ("chatcmpl-…"), which the queue and the event log show too.
"""

from __future__ import annotations

import secrets
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from actors.gateway.answer import generated
from actors.gateway.backend import Backend
from actors.gateway.dialects import OPENAI
from actors.gateway.embeddings import Vectors
from actors.gateway.forms import Form
from actors.gateway.reader import Reader
from actors.gateway.relay import Relay
from actors.gateway.security import hold
from actors.gateway.stream import while_connected
from actors.records import ModelInfo
from actors.serving.protocol import EmbedRequest
from scheduler.errors import UnknownModel


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
        hold(request, sum(4 * len(vector) for vector in result.vectors))
        return Vectors(ask.need.model, result, ask.encoding_format)

    async def generate(form: Form, request: Request, prefix: str) -> Response:
        ask = await reader.ask(request, form, _new_id(prefix))
        return await generated(request, relay, ask, pulse_s, OPENAI)

    return router


def _new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def _model(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.modified_at_s or 0),
        "owned_by": "arriero",
        "meta": model.model_dump(include={"architecture", "quantization", "size_bytes", "n_ctx_train", "n_ctx"}),
    }
