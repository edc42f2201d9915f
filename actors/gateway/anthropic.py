"""Anthropic's routes: messages, and how many tokens they are."""

from __future__ import annotations

import json
import secrets

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from actors.gateway.answer import generated
from actors.gateway.dialects import ANTHROPIC
from actors.gateway.reader import Reader
from actors.gateway.relay import Relay
from actors.gateway.stream import while_connected
from actors.serving.protocol import GenerateRequest


def anthropic_routes(relay: Relay, reader: Reader, pulse_s: float) -> APIRouter:
    """`/v1/messages`. While a stream waits for its first token, a comment goes out every `pulse_s` seconds."""
    router = APIRouter(prefix="/v1/messages", tags=["Anthropic"])

    @router.post("")
    async def messages(request: Request) -> Response:
        ask = await reader.ask(request, "anthropic", _new_id())
        return await generated(request, relay, ask, pulse_s, ANTHROPIC)

    @router.post("/count_tokens")
    async def count(request: Request) -> Response:
        """The prompt is read for it, and need not be read again for the answer."""
        ask = await reader.ask(request, "anthropic-count", _new_id())
        assert isinstance(ask.request, GenerateRequest)
        usage = json.loads(await while_connected(request, relay.generate_whole(ask.need, ask.request)))["usage"]
        return JSONResponse({"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]})

    return router


def _new_id() -> str:
    return f"msg_{secrets.token_hex(12)}"
