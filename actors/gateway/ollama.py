"""Ollama's routes, for the clients that know no other: chats, generation, embeddings, and what is there.

The catalogue says which models there are, so nothing is created, copied, pulled or deleted here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime, timezone
from hashlib import sha256
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from actors.gateway.backend import Backend
from actors.gateway.dialects import OLLAMA
from actors.gateway.embeddings import OllamaVectors
from actors.gateway.forms import Form
from actors.gateway.ollama_requests import ModelName
from actors.gateway.openai_requests import Ask
from actors.gateway.reader import Reader
from actors.gateway.relay import Relay
from actors.gateway.security import hold
from actors.gateway.shortcut import Shortcut
from actors.gateway.stream import EventStream, while_connected
from actors.records import ModelInfo, ReplicaStatus
from actors.serving.protocol import EmbedRequest, EmbedResult, GenerateRequest
from scheduler.errors import ArrieroError, Rejected, UnknownModel

VERSION = "0.12.0"
"""Of Ollama's API, whose words these are: clients ask for it, and some refuse an older one."""

NEVER = "2318-01-01T00:00:00Z"  # as Ollama says it of a model that stays


def ollama_routes(backend: Backend, relay: Relay, reader: Reader, pulse_s: float) -> APIRouter:
    """`/api/*` and `/`."""
    router = APIRouter(tags=["Ollama"])

    @router.head("/", include_in_schema=False)
    @router.get("/")
    async def root() -> Response:
        return PlainTextResponse("Ollama is running")  # what clients look for

    @router.head("/api/version", include_in_schema=False)
    @router.get("/api/version")
    async def version() -> Response:
        return JSONResponse({"version": VERSION})

    @router.head("/api/tags", include_in_schema=False)
    @router.get("/api/tags")
    async def tags() -> Response:
        models = [_described(model) for model in await backend.models() if model.state != "invalid"]
        return JSONResponse({"models": models})

    @router.head("/api/ps", include_in_schema=False)
    @router.get("/api/ps")
    async def ps() -> Response:
        models = {model.name: model for model in await backend.models()}
        replicas = [replica for replica in (await backend.status()).replicas if replica.state == "ready"]
        return JSONResponse({"models": [_running(replica, models.get(replica.model)) for replica in replicas]})

    @router.post("/api/show")
    async def show(request: Request) -> Response:
        wanted = (await reader.order(request, ModelName, any_type=True)).wanted
        for model in await backend.models():
            if model.name == wanted and model.state != "invalid":
                return JSONResponse(_shown(model))
        raise UnknownModel(f"model {wanted!r} not found")

    @router.post("/api/chat")
    async def chat(request: Request) -> Response:
        return await generate("ollama-chat", request)

    @router.post("/api/generate")
    async def complete(request: Request) -> Response:
        return await generate("ollama-generate", request)

    @router.post("/api/embed")
    async def embed(request: Request) -> Response:
        began_s = time.monotonic()
        ask, result = await embedded("ollama-embed", request)
        return OllamaVectors(ask.need.model, result, time.monotonic() - began_s)

    @router.post("/api/embeddings")
    async def embedding(request: Request) -> Response:
        _, result = await embedded("ollama-embedding", request)
        return JSONResponse({"embedding": list(result.vectors[0])})

    @router.api_route("/api/{order}", methods=["POST", "DELETE"], include_in_schema=False)  # refused
    async def other(order: str) -> Response:
        if order in ("create", "copy", "push", "pull", "delete"):
            raise Rejected(f"{order}: Arriero serves the files that its catalogue names; change them there")
        raise UnknownModel(f"there is no /api/{order}")

    async def generate(form: Form, request: Request) -> Response:
        ask = await reader.ask(request, form, f"ollama-{secrets.token_hex(12)}", any_type=True)
        if ask.need.kind == "load":
            return await loaded(form, ask, request)
        assert isinstance(ask.request, GenerateRequest)
        if ask.request.reply.stream:
            shortcut = Shortcut()
            answer = kept(relay.generate(ask.need, ask.request, shortcut), ask)
            return EventStream(answer, pulse_s, shortcut, OLLAMA)
        whole = await while_connected(request, relay.generate_whole(ask.need, ask.request))
        await keep(ask)
        return Response(whole, media_type="application/json")

    async def loaded(form: Form, ask: Ask, request: Request) -> Response:
        """A request without a question: the model is loaded, or unloaded."""
        if ask.keep_alive_s != 0:
            await while_connected(request, backend.load(ask.need))
        await keep(ask)
        said = {"message": {"role": "assistant", "content": ""}} if form == "ollama-chat" else {"response": ""}
        reason = "unload" if ask.keep_alive_s == 0 else "load"
        told = {"model": ask.need.model, "created_at": _time_of(time.time()), **said}
        return JSONResponse({**told, "done": True, "done_reason": reason})

    async def embedded(form: Form, request: Request) -> tuple[Ask, EmbedResult]:
        ask = await reader.ask(request, form, f"ollama-{secrets.token_hex(12)}", any_type=True)
        assert isinstance(ask.request, EmbedRequest)
        result = await while_connected(request, relay.embed(ask.need, ask.request))
        hold(request, sum(4 * len(vector) for vector in result.vectors))
        await keep(ask)
        return ask, result

    async def kept(answer: AsyncGenerator[bytes, None], ask: Ask) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(answer):
                async for piece in answer:
                    yield piece
        except ArrieroError:
            raise
        except BaseException:  # the client has left
            await keep(ask)
            raise
        await keep(ask)

    async def keep(ask: Ask) -> None:
        """What `keep_alive` asks for after the answer."""
        if ask.keep_alive_s == 0:
            await backend.unload(ask.need.model, unless_wanted=True)
        elif ask.keep_alive_s is not None:
            await backend.keep_alive(ask.need.model, ask.keep_alive_s)

    return router


def _time_of(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, timezone.utc).isoformat().replace("+00:00", "Z")


def _described(model: ModelInfo) -> dict[str, Any]:
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": _time_of(model.modified_at_s or 0),
        "size": model.size_bytes or 0,
        "digest": sha256(model.name.encode()).hexdigest(),  # of the name: nobody reads whole files for it
        "details": _details(model),
    }


def _details(model: ModelInfo) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": model.architecture or "",
        "families": [model.architecture] if model.architecture else [],
        "parameter_size": "",
        "quantization_level": model.quantization or "",
    }


def _running(replica: ReplicaStatus, model: ModelInfo | None) -> dict[str, Any]:
    size = sum(replica.reserved_bytes.values())
    expires = NEVER if replica.expires_in_s is None else _time_of(time.time() + replica.expires_in_s)
    return {
        **_described(model or ModelInfo(name=replica.model, state="unknown")),
        "size": size,
        "size_vram": size - replica.reserved_bytes.get("host", 0),
        "context_length": replica.n_ctx,
        "expires_at": expires,
    }


def _capabilities(model: ModelInfo) -> list[str]:
    if model.embeds_only:
        return ["embedding"]
    return ["completion", "tools", *(["vision"] if "images" in model.takes else [])]


def _shown(model: ModelInfo) -> dict[str, Any]:
    info: dict[str, Any] = {"general.architecture": model.architecture}
    if model.architecture and model.n_ctx_train:
        info[f"{model.architecture}.context_length"] = model.n_ctx_train
    return {
        "modelfile": f"FROM {model.path}",
        "parameters": "",
        "template": "",
        "details": _details(model),
        "model_info": info,
        "capabilities": _capabilities(model),
        "modified_at": _time_of(model.modified_at_s or 0),
    }
