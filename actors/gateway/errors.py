"""Errors on the wire, both ways: an `ArrieroError` becomes OpenAI's JSON shape, and the client gets the class back.

    {"error": {"message": "...", "type": "invalid_request_error", "param": null, "code": "model_not_found",
               "details": {...}}}

`code` names the class, `details` keeps its numbers. The refusals that only HTTP knows are defined here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from scheduler import errors
from scheduler.errors import ArrieroError, InvariantBroken, QueueFull, Rejected, Unavailable


class Unauthorized(Rejected):
    """The API key is missing or wrong."""

    code = "invalid_api_key"
    http_status = 401


class Forbidden(Rejected):
    """A web page of another site, or a name that this address should not have."""

    code = "forbidden"
    http_status = 403


class NoSuchRoute(Rejected):
    """No such path, or not with this method."""

    code = "no_such_route"
    http_status = 404


class BodyTooSlow(Rejected):
    """The request did not arrive in time."""

    code = "request_timeout"
    http_status = 408


class BodyTooLarge(Rejected):
    """The request body is over the limit, or takes too much to read."""

    code = "request_too_large"
    http_status = 413


class TooMuchHeld(Unavailable):
    """Too many large requests, or too many connections."""

    code = "too_much_held"
    http_status = 429


ERRORS: tuple[type[ArrieroError], ...] = (
    *errors.ERRORS,
    Unauthorized,
    Forbidden,
    NoSuchRoute,
    BodyTooSlow,
    BodyTooLarge,
    TooMuchHeld,
)
"""Every error that a caller can meet, by `code`."""

MAX_MESSAGE_LENGTH = 4000
"""Characters. A name in a message may be a client's, and a megabyte long."""

_BY_CODE = {kind.code: kind for kind in ERRORS}


def error_body(error: ArrieroError) -> dict[str, Any]:
    """`error` as OpenAI's clients expect it."""
    if isinstance(error, Rejected):
        kind = "invalid_request_error"
    elif isinstance(error, (QueueFull, TooMuchHeld)):
        kind = "rate_limit_error"
    else:
        kind = "server_error"
    return {
        "error": {
            "message": clipped(error.message, MAX_MESSAGE_LENGTH),
            "type": kind,
            "param": error.details.get("param"),
            "code": error.code,
            "details": error.details,
        }
    }


def error_json(error: ArrieroError) -> bytes:
    return json.dumps(error_body(error), default=str).encode()


def error_headers(error: ArrieroError) -> dict[str, str]:
    """Headers that belong to `error`: when to come back, or how to authenticate."""
    if isinstance(error, Unavailable):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    return {}


def error_from_body(body: object, http_status: int) -> ArrieroError:
    """The error that `error_body` wrote; anything else (a proxy's page) is judged by its HTTP status."""
    wire = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(wire, Mapping):
        kind = Rejected if 400 <= http_status < 500 else Unavailable
        return kind(f"HTTP {http_status}: {str(body)[:500]}")
    kind_of_code = _BY_CODE.get(str(wire.get("code")))
    if kind_of_code is None:
        kind_of_code = Rejected if 400 <= http_status < 500 else ArrieroError
    details = wire.get("details")
    return kind_of_code(str(wire.get("message")), **(dict(details) if isinstance(details, Mapping) else {}))


def unexpected(error: BaseException) -> InvariantBroken:
    """What a caller is told about a failure that nobody foresaw; the log has the traceback."""
    return InvariantBroken(f"Arriero failed unexpectedly ({type(error).__name__}: {error}); its log has the details")


def clipped(text: str, length: int) -> str:
    """`text`, or its beginning where it is longer than `length` characters."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"
