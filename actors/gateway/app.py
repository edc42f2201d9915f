"""The gateway's ASGI application: routes, one shape for every error, the guard in front. Knows nothing of Ray."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from actors.gateway.backend import Backend
from actors.gateway.errors import NoSuchRoute, unexpected
from actors.gateway.management import management_routes
from actors.gateway.openai import openai_routes
from actors.gateway.relay import Relay
from actors.gateway.security import Guard
from actors.gateway.stream import ClientGone, error_response
from scheduler.errors import ArrieroError, Rejected

PULSE_S = 5.0
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is what proxies log for a client that left

log = logging.getLogger(__name__)


def make_app(backend: Backend, api_keys: Mapping[str, str] | None = None, pulse_s: float = PULSE_S) -> FastAPI:
    """The application over `backend`. Without `api_keys` (by name) it answers to loopback names only: `security`."""
    relay = Relay(backend)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        relay.close()

    # The interactive pages would load scripts from other sites.
    app = FastAPI(title="Arriero", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_keys=api_keys or {})
    app.include_router(openai_routes(backend, relay, pulse_s))
    app.include_router(management_routes(backend, pulse_s))

    @app.exception_handler(ArrieroError)
    async def arriero_error(_: Request, error: ArrieroError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return error_response(_rejected(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ArrieroError):  # raised while the body was read
            return error_response(error.__cause__)
        if error.status_code in (404, 405):
            return error_response(NoSuchRoute(f"no route {request.method} {request.url.path}; see /openapi.json"))
        return error_response(Rejected(str(error.detail)))

    @app.exception_handler(ClientGone)
    async def client_gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return error_response(unexpected(error))

    return app


def _rejected(error: RequestValidationError) -> Rejected:
    if isinstance(error.body, bytes):
        return Rejected("the body must be JSON, with the header Content-Type: application/json")
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Rejected(f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    problems = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query", "header"))
        problems.append(f"{where}: {problem['msg']}" if where else problem["msg"])
    return Rejected("; ".join(problems), param=str(error.errors()[0]["loc"][-1]))
