"""The gateway's ASGI application: routes, one shape for every error, the guard in front. Knows nothing of Ray."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from actors.gateway.anthropic import anthropic_routes
from actors.gateway.backend import Backend
from actors.gateway.bodies import problems_of
from actors.gateway.closing import Closing
from actors.gateway.dialects import dialect_of
from actors.gateway.errors import NoSuchRoute, unexpected
from actors.gateway.limits import MAX_HELD_BYTES, Held
from actors.gateway.llama_server import llama_server_routes
from actors.gateway.management import management_routes
from actors.gateway.ollama import ollama_routes
from actors.gateway.openai import openai_routes
from actors.gateway.openapi import CLIENT_CLOSED_REQUEST, document
from actors.gateway.reader import Reader
from actors.gateway.relay import Relay
from actors.gateway.responses import responses_routes
from actors.gateway.security import Guard
from actors.gateway.stream import ClientGone
from scheduler.errors import ArrieroError, Rejected

PULSE_S = 5.0

log = logging.getLogger(__name__)


def make_app(
    backend: Backend,
    api_keys: Mapping[str, str] | None = None,
    pulse_s: float = PULSE_S,
    max_held_bytes: int = MAX_HELD_BYTES,
    media_hosts: Collection[str] = (),
) -> FastAPI:
    """The application over `backend`. Without `api_keys` (by name) it answers to loopback names only: `security`.
    `media_hosts`: where pictures are fetched from, as the catalogue has them.

    `state.closing` of the application ends its requests when it has to go.
    """
    relay = Relay(backend)
    reader = Reader(media_hosts)
    closing = Closing()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        app.openapi()  # a tenth of a second: not when somebody asks for it
        yield
        relay.close()
        reader.close()

    # The interactive pages would load scripts from other sites.
    app = FastAPI(title="Arriero", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.closing = closing
    app.add_middleware(Guard, api_keys=api_keys or {}, held=Held(max_held_bytes), closing=closing)
    app.include_router(openai_routes(backend, relay, reader, pulse_s))
    app.include_router(responses_routes(relay, reader, pulse_s))
    app.include_router(management_routes(backend, reader, pulse_s))
    app.include_router(llama_server_routes(backend, relay, reader, pulse_s))
    app.include_router(ollama_routes(backend, relay, reader, pulse_s))
    app.include_router(anthropic_routes(relay, reader, pulse_s))
    app.openapi = document(app)  # type: ignore[method-assign]

    def refusal(request: Request, error: ArrieroError) -> Response:
        return dialect_of(request.url.path).refusal(error)

    @app.exception_handler(ArrieroError)
    async def arriero_error(request: Request, error: ArrieroError) -> Response:
        return refusal(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refusal(request, problems_of(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405):
            return refusal(request, NoSuchRoute(f"no route {request.method} {request.url.path}; see /openapi.json"))
        return refusal(request, Rejected(str(error.detail)))

    @app.exception_handler(ClientGone)
    async def client_gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return refusal(request, unexpected(error))

    return app
