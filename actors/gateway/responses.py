"""OpenAI's route for responses. Nothing is stored: each request brings all that its answer is made from."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from actors.gateway.answer import generated
from actors.gateway.dialects import OPENAI, Dialect
from actors.gateway.reader import Reader
from actors.gateway.relay import Relay
from actors.serving.protocol import GenerateRequest, ReplyForm
from actors.serving.responses_reply import failure_events


def responses_routes(relay: Relay, reader: Reader, pulse_s: float) -> APIRouter:
    """`/v1/responses`. While a stream waits for its first token, a comment goes out every `pulse_s` seconds."""
    router = APIRouter(prefix="/v1/responses", tags=["OpenAI"])

    @router.post("")
    async def respond(request: Request) -> Response:
        ask = await reader.ask(request, "responses", f"resp_{secrets.token_hex(12)}")
        assert isinstance(ask.request, GenerateRequest)
        return await generated(request, relay, ask, pulse_s, _dialect_of(ask.request.reply))

    return router


def _dialect_of(wanted: ReplyForm) -> Dialect:
    """OpenAI's, but for the end of a stream that fails: it names the response, and its events are numbered."""

    def ending(error: bytes, events: int) -> bytes:
        return failure_events(wanted, json.loads(error)["error"], events)

    return replace(OPENAI, ending=ending)
