"""llama-server's own routes, and reranking: what its clients use beyond OpenAI's API."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from actors.gateway.answer import generated
from actors.gateway.backend import Backend
from actors.gateway.dialects import OPENAI
from actors.gateway.forms import Form
from actors.gateway.openai_requests import Ranking
from actors.gateway.reader import Reader
from actors.gateway.relay import Relay
from actors.gateway.stream import while_connected
from actors.records import MAX_NAME_LENGTH
from actors.serving.protocol import EmbedRequest, EmbedResult
from scheduler.errors import Rejected, UnknownModel

ROUTES: Mapping[str, Form] = {
    "/completion": "completion",
    "/infill": "infill",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
    "/apply-template": "apply-template",
}


def llama_server_routes(backend: Backend, relay: Relay, reader: Reader, pulse_s: float) -> APIRouter:
    """`/completion`, `/infill`, `/tokenize`, `/detokenize`, `/apply-template`, `/lora-adapters` and `/v1/rerank`. While
    a stream waits for its first token, a comment goes out every `pulse_s` seconds."""
    router = APIRouter(tags=["llama-server"])

    @router.post("/v1/rerank")
    @router.post("/v2/rerank", include_in_schema=False)
    @router.post("/rerank", include_in_schema=False)
    @router.post("/v1/reranking", include_in_schema=False)
    async def rerank(request: Request) -> Response:
        ask = await reader.ask(request, "rerank", _new_id("rerank"))
        assert isinstance(ask.request, EmbedRequest) and ask.ranking is not None
        result = await while_connected(request, relay.embed(ask.need, ask.request))
        return JSONResponse(_ranked(ask.need.request_id, ask.need.model, ask.ranking, result))

    def answering(form: Form) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            ask = await reader.ask(request, form, _new_id("cmpl"))
            return await generated(request, relay, ask, pulse_s, OPENAI)

        return answer

    for path, form in ROUTES.items():
        router.add_api_route(path, answering(form), methods=["POST"], name=form)

    @router.get("/lora-adapters")
    async def lora_adapters(model: Annotated[str, Query(min_length=1, max_length=MAX_NAME_LENGTH)]) -> JSONResponse:
        """As llama-server tells them; which model's, it need not ask."""
        found = next((each for each in await backend.models() if each.name == model), None)
        if found is None:
            raise UnknownModel(f"no model {model!r} in the catalogue; GET /v1/models lists them", model=model)
        numbered = enumerate(found.adapters)
        return JSONResponse([{"id": number, **adapter.model_dump()} for number, adapter in numbered])

    @router.post("/lora-adapters", include_in_schema=False)  # refused
    async def set_lora_adapters() -> Response:
        raise Rejected(
            "scales cannot be changed for all requests; send lora with each one, or set scale under adapters in the "
            "catalogue"
        )

    router.add_api_route("/completions", answering("completion"), methods=["POST"], include_in_schema=False)
    return router


def _new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def _ranked(request_id: str, model: str, wanted: Ranking, result: EmbedResult) -> dict[str, object]:
    """The best documents first, as Jina, Cohere and llama-server tell them."""
    scores = [vector[0] for vector in result.vectors]
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: wanted.top_n]
    results: list[dict[str, object]] = [{"index": index, "relevance_score": scores[index]} for index in best]
    if wanted.documents:
        for each, index in zip(results, best, strict=True):
            each["document"] = {"text": wanted.documents[index]}
    usage = {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens}
    return {"id": request_id, "object": "list", "model": model, "results": results, "usage": usage}
