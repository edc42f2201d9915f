"""The routes that stream, each with its own shape of pieces, end and error."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway_fakes import MODEL

from actors.gateway.dialects import OPENAI

MESSAGES = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Route:
    """`text_in`: what one piece of a stream says; `is_end`: whether it ends an answer; `told`: kind and message of the
    error that a refusal is, or a stream's last piece; `kinds`: how kinds are called where not as in OpenAI's API."""

    path: str
    asked: dict[str, Any]
    text_in: Callable[[Any], str]
    is_end: Callable[[Any], bool]
    told: Callable[[Any], tuple[str, str]]
    kinds: dict[str, str] = field(default_factory=dict)
    lines: bool = False  # instead of events

    def body(self, *, stream: bool = True) -> dict[str, Any]:
        return {"model": MODEL, **self.asked, "stream": stream}

    def pieces(self, stream: str) -> list[Any]:
        """Of a stream, without what it says in silence."""
        if self.lines:
            return [json.loads(line) for line in stream.splitlines()]
        events = [event for event in stream.split("\n\n") if event and f"{event}\n\n" != OPENAI.waiting.decode()]
        data = [event.rpartition("data: ")[2] for event in events]
        return [each if each == "[DONE]" else json.loads(each) for each in data]

    def text(self, pieces: Sequence[Any]) -> str:
        return "".join(self.text_in(piece) for piece in pieces if piece != "[DONE]")

    def error(self, pieces: Sequence[Any]) -> tuple[str, str]:
        """Kind and message of the error that a stream ended with; nothing follows it that looks like an end."""
        assert not any(self.is_end(piece) for piece in pieces)
        if self.path == "/v1/responses":
            *_, error, failed = pieces
            assert failed["type"] == "response.failed" and failed["response"]["error"]["message"] == error["message"]
            assert failed["sequence_number"] == error["sequence_number"] + 1 == len(pieces) - 1
            assert error["type"] == "error"
            return self.told(error)
        return self.told(pieces[-1])

    def kind(self, code: str) -> str:
        """How this API calls the error that is `code` in OpenAI's."""
        return self.kinds.get(code, self.kinds.get("", code))


def _openai(body: Any) -> tuple[str, str]:
    return body["error"]["code"], body["error"]["message"]


def _anthropic(body: Any) -> tuple[str, str]:
    assert set(body) == {"type", "error"} and body["type"] == "error"
    return body["error"]["type"], body["error"]["message"]


def _ollama(body: Any) -> tuple[str, str]:
    assert set(body) == {"error"}
    return "", body["error"]


def _is_done(piece: Any) -> bool:
    return bool(piece == "[DONE]")


def _text_of_response(event: Any) -> str:
    return event["delta"] if event["type"] == "response.output_text.delta" else ""


def _text_of_message(event: Any) -> str:
    return event["delta"]["text"] if event["type"] == "content_block_delta" else ""


def _choices(piece: Any) -> list[Any]:
    return piece.get("choices") or []


ROUTES = {
    "chat": Route(
        "/v1/chat/completions", {"messages": MESSAGES},
        lambda piece: "".join(each["delta"].get("content") or "" for each in _choices(piece)), _is_done, _openai,
    ),
    "text": Route(
        "/v1/completions", {"prompt": "Hi"},
        lambda piece: "".join(each["text"] for each in _choices(piece)), _is_done, _openai,
    ),
    "responses": Route(
        "/v1/responses", {"input": "Hi"},
        _text_of_response, lambda event: event["type"] in ("response.completed", "response.incomplete"), _openai,
    ),
    "messages": Route(
        "/v1/messages", {"messages": MESSAGES, "max_tokens": 50},
        _text_of_message, lambda event: event["type"] == "message_stop", _anthropic,
        {"unavailable": "overloaded_error", "": "api_error"},
    ),
    "ollama-chat": Route(
        "/api/chat", {"messages": MESSAGES},
        lambda line: line.get("message", {}).get("content", ""), lambda line: line.get("done") is True, _ollama,
        {"": ""}, lines=True,
    ),
    "ollama-generate": Route(
        "/api/generate", {"prompt": "Hi"},
        lambda line: line.get("response", ""), lambda line: line.get("done") is True, _ollama,
        {"": ""}, lines=True,
    ),
}  # fmt: skip
