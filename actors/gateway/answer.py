"""An answer that is generated, for its client: as a stream, or whole."""

from __future__ import annotations

from fastapi import Request, Response

from actors.gateway.dialects import Dialect
from actors.gateway.openai_requests import Ask
from actors.gateway.relay import Relay
from actors.gateway.shortcut import Shortcut
from actors.gateway.stream import EventStream, while_connected
from actors.serving.protocol import GenerateRequest


async def generated(request: Request, relay: Relay, ask: Ask, pulse_s: float, dialect: Dialect) -> Response:
    """The answer to `request`, which asks for `ask`. While a stream waits for its first token, it says so every
    `pulse_s` seconds. Raises ArrieroError, or ClientGone."""
    assert isinstance(ask.request, GenerateRequest)
    if ask.request.reply.stream:
        shortcut = Shortcut()
        return EventStream(relay.generate(ask.need, ask.request, shortcut), pulse_s, shortcut, dialect)
    whole = await while_connected(request, relay.generate_whole(ask.need, ask.request))
    return Response(whole, media_type="application/json")
