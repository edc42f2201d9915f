"""`/openapi.json`: what FastAPI knows of the routes, the bodies that the gateway reads itself, and every error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from actors.gateway.dialects import ANTHROPIC, ANTHROPIC_KINDS, OLLAMA, OPENAI, Dialect, dialect_of
from actors.gateway.errors import (
    BodyTooLarge,
    BodyTooSlow,
    Forbidden,
    NoSuchRoute,
    TooMuchHeld,
    Unauthorized,
)
from actors.gateway.forms import FORMS
from actors.gateway.ollama_requests import ModelName
from actors.records import LoadRequest, PinRequest, UnloadRequest
from scheduler.errors import (
    ArrieroError,
    Condemned,
    DeadlineExceeded,
    EngineFailed,
    Impossible,
    InvalidGGUF,
    InvariantBroken,
    QueueFull,
    Rejected,
    Unavailable,
    UnknownModel,
)

Errors = Sequence[type[ArrieroError]]

ANYWHERE: Errors = (
    Rejected, Unauthorized, Forbidden, NoSuchRoute, BodyTooSlow, BodyTooLarge, TooMuchHeld, Unavailable,
    InvariantBroken,
)  # fmt: skip
"""Of every route: what is asked wrongly, whoever asks too much, and what Arriero cannot do now or at all."""

OF_MODELS: Errors = (UnknownModel, InvalidGGUF, Impossible)
OF_SLOTS: Errors = (*OF_MODELS, Condemned, QueueFull, DeadlineExceeded, EngineFailed)

BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": FORMS["chat"],
    "/v1/completions": FORMS["text"],
    "/v1/embeddings": FORMS["embed"],
    "/v1/rerank": FORMS["rerank"],
    "/completion": FORMS["completion"],
    "/infill": FORMS["infill"],
    "/tokenize": FORMS["tokenize"],
    "/detokenize": FORMS["detokenize"],
    "/apply-template": FORMS["apply-template"],
    "/v1/responses": FORMS["responses"],
    "/v1/messages": FORMS["anthropic"],
    "/v1/messages/count_tokens": FORMS["anthropic-count"],
    "/api/chat": FORMS["ollama-chat"],
    "/api/generate": FORMS["ollama-generate"],
    "/api/embed": FORMS["ollama-embed"],
    "/api/embeddings": FORMS["ollama-embedding"],
    "/api/show": ModelName,
    "/api/v1/load": LoadRequest,
    "/api/v1/unload": UnloadRequest,
    "/api/v1/pin": PinRequest,
}
ERRORS_OF: Mapping[str, Errors] = {
    "/v1/models/{name}": (UnknownModel,),
    "/v1/chat/completions": OF_SLOTS,
    "/v1/completions": OF_SLOTS,
    "/v1/embeddings": OF_SLOTS,
    "/v1/rerank": OF_SLOTS,
    "/completion": OF_SLOTS,
    "/infill": OF_SLOTS,
    "/tokenize": OF_SLOTS,
    "/detokenize": OF_SLOTS,
    "/apply-template": OF_SLOTS,
    "/v1/responses": OF_SLOTS,
    "/v1/messages": OF_SLOTS,
    "/v1/messages/count_tokens": OF_SLOTS,
    "/api/chat": OF_SLOTS,
    "/api/generate": OF_SLOTS,
    "/api/embed": OF_SLOTS,
    "/api/embeddings": OF_SLOTS,
    "/api/show": (UnknownModel,),
    "/api/v1/plan": OF_MODELS,
    "/api/v1/load": OF_SLOTS,
    "/api/v1/unload": OF_MODELS,
    "/api/v1/pin": OF_MODELS,
}
CLIENT_CLOSED_REQUEST = 499  # what proxies log for a client that left

_REF = "#/components/schemas/{model}"
_ERROR_SCHEMAS: Mapping[Dialect, tuple[str, dict[str, Any]]] = {
    OPENAI: (
        "Error",
        {
            "type": "object",
            "required": ["error"],
            "properties": {
                "error": {
                    "type": "object",
                    "required": ["message", "type", "param", "code", "details"],
                    "properties": {
                        "message": {"type": "string", "description": "the cause, the numbers and the way out"},
                        "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                        "param": {"type": ["string", "null"], "description": "the field that is wrong"},
                        "code": {"type": "string", "description": "names the error, for programs"},
                        "details": {"type": "object", "description": "the numbers, for programs"},
                    },
                }
            },
        },
    ),
    ANTHROPIC: (
        "AnthropicError",
        {
            "type": "object",
            "required": ["type", "error"],
            "properties": {
                "type": {"const": "error"},
                "error": {
                    "type": "object",
                    "required": ["type", "message"],
                    "properties": {
                        "type": {"enum": ANTHROPIC_KINDS},
                        "message": {"type": "string", "description": "the cause, the numbers and the way out"},
                    },
                },
            },
        },
    ),
    OLLAMA: (
        "OllamaError",
        {
            "type": "object",
            "required": ["error"],
            "properties": {"error": {"type": "string", "description": "the cause, the numbers and the way out"}},
        },
    ),
}
"""How each dialect tells an error: the name of the schema, and the schema."""


def errors_of(path: str) -> Errors:
    """All that a route may answer with, but for its answer."""
    return (*ANYWHERE, *ERRORS_OF.get(path, ()))


def document(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """What makes the document of `app`, once."""
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(get_openapi(title=app.title, version="1", routes=app.routes))
            _complete(made)
        return made

    return openapi


def _complete(made: dict[str, Any]) -> None:
    models = sorted(set(BODIES.values()), key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"], **dict(_ERROR_SCHEMAS.values()))
    for leftover in ("HTTPValidationError", "ValidationError"):  # FastAPI's own shape, which is never sent
        schemas.pop(leftover, None)
    for path, methods in made["paths"].items():
        for operation in methods.values():
            if path in BODIES:
                schema = {"$ref": _REF.format(model=BODIES[path].__name__)}
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
            responses = operation["responses"]
            responses.pop("422", None)
            error, _ = _ERROR_SCHEMAS[dialect_of(path)]
            for status, codes in _codes(errors_of(path)).items():
                responses[str(status)] = {
                    "description": " or ".join(codes),
                    "content": {"application/json": {"schema": {"$ref": _REF.format(model=error)}}},
                }
            responses[str(CLIENT_CLOSED_REQUEST)] = {"description": "the client has disconnected"}


def _codes(errors: Errors) -> dict[int, list[str]]:
    """The codes of `errors` by HTTP status, in order."""
    codes: dict[int, list[str]] = {}
    for error in sorted(errors, key=lambda error: error.http_status):
        codes.setdefault(error.http_status, []).append(f"`{error.code}`")
    return codes
