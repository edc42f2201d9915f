"""How each of the three APIs says what is not an answer: an error, before an answer or at the end of a stream, and that
there is nothing new yet. What is no route of Ollama's or Anthropic's is told as OpenAI's clients expect it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import Response

from actors.gateway.errors import MAX_MESSAGE_LENGTH, clipped, error_headers, error_json
from scheduler.errors import ArrieroError

OLLAMA_PATHS = frozenset(
    {"/", *(f"/api/{name}" for name in (
        "chat", "generate", "embed", "embeddings", "tags", "ps", "show", "version", "create", "copy", "pull", "push",
        "delete",
    ))}
)  # fmt: skip
ANTHROPIC_PATHS = frozenset({"/v1/messages", "/v1/messages/count_tokens"})

_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          413: "request_too_large", 422: "invalid_request_error", 429: "rate_limit_error",
          503: "overloaded_error"}  # fmt: skip
"""Anthropic's names of errors, by HTTP status; all others are api_error."""

ANTHROPIC_KINDS = sorted({*_KINDS.values(), "api_error"})


@dataclass(frozen=True, slots=True)
class Dialect:
    """`stream_type`: the media type of streams; `waiting`: what a stream says in silence; `body`: an error as JSON;
    `ending`: that as the end of a stream, after so many named events."""

    stream_type: str
    waiting: bytes
    body: Callable[[ArrieroError], bytes]
    ending: Callable[[bytes, int], bytes]

    def refusal(self, error: ArrieroError) -> Response:
        """The error as an answer."""
        return Response(self.body(error), error.http_status, error_headers(error), "application/json")

    def failure(self, error: ArrieroError, events: int) -> bytes:
        """The error in a stream that has begun, after so many named events."""
        return self.ending(self.body(error), events)


def event(data: bytes, event_id: int | None = None) -> bytes:
    """One server-sent event; `data` is a single line."""
    prefix = b"" if event_id is None else b"id: %d\n" % event_id
    return b"%sdata: %s\n\n" % (prefix, data)


def _ollama(error: ArrieroError) -> bytes:
    return json.dumps({"error": clipped(error.message, MAX_MESSAGE_LENGTH)}).encode()


def _anthropic(error: ArrieroError) -> bytes:
    kind = _KINDS.get(error.http_status, "api_error")
    told = {"type": kind, "message": clipped(error.message, MAX_MESSAGE_LENGTH)}
    return json.dumps({"type": "error", "error": told}).encode()


_EVENTS, _WAITING = "text/event-stream", b": waiting\n\n"
OPENAI = Dialect(_EVENTS, _WAITING, error_json, lambda body, _: event(body))
ANTHROPIC = Dialect(_EVENTS, _WAITING, _anthropic, lambda body, _: b"event: error\n" + event(body))
OLLAMA = Dialect("application/x-ndjson", b"", _ollama, lambda body, _: body + b"\n")


def dialect_of(path: str) -> Dialect:
    """The one that clients of `path` speak."""
    return OLLAMA if path in OLLAMA_PATHS else ANTHROPIC if path in ANTHROPIC_PATHS else OPENAI
