"""Anthropic's routes: messages, and how many tokens they are."""

from __future__ import annotations

import json
import secrets

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from actors.gateway.dialects import ANTHROPIC
from actors.gateway.reader import Reader
from actors.gateway.relay import Relay
from actors.gateway.shortcut import Shortcut
from actors.gateway.stream import EventStream, while_connected
from actors.serving.protocol import GenerateRequest


def anthropic_routes(relay: Relay, reader: Reader, pulse_s: float) -> APIRouter:
    """`/v1/messages`. While a stream waits for its first token, a comment goes out every `pulse_s` seconds."""
    router = APIRouter(prefix="/v1/messages", include_in_schema=False)

    @router.post("")
    async def messages(request: Request) -> Response:
        ask = await reader.ask(request, "anthropic", _new_id())
        assert isinstance(ask.request, GenerateRequest)
        if ask.request.reply.stream:
            shortcut = Shortcut()
            return EventStream(relay.generate(ask.need, ask.request, shortcut), pulse_s, shortcut, ANTHROPIC)
        whole = await while_connected(request, relay.generate_whole(ask.need, ask.request))
        return Response(whole, media_type="application/json")

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
