"""Reads the bodies of requests: short ones at once, long ones in a process of their own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from actors.gateway.bodies import checked
from actors.gateway.fetching import Fetcher
from actors.gateway.forms import Form, read_ask
from actors.gateway.limits import INLINE_BYTES, MAX_CONTENT_BYTES, too_large
from actors.gateway.openai_requests import Ask
from actors.gateway.parsers import Parsers
from actors.gateway.security import hold, key_of, source_of
from actors.gateway.stream import ClientGone, while_connected
from scheduler.errors import Rejected

Order = TypeVar("Order", bound=BaseModel)


class Reader:
    """Belongs to one event loop; `close()` ends its processes. `media_hosts`: see `Fetcher`."""

    def __init__(self, media_hosts: Collection[str] = ()) -> None:
        self._parsers = Parsers()
        self._fetcher = Fetcher(media_hosts)

    async def ask(self, request: Request, form: Form, request_id: str, *, any_type: bool = False) -> Ask:
        """What `request` asks for, with the files that it names. `any_type`: whatever its Content-Type says. Raises
        Rejected, Unavailable, or ClientGone."""
        body = await _body_of(request, any_type=any_type)
        source = source_of(request)
        if len(body) <= INLINE_BYTES:
            ask = read_ask(form, body, request_id, key_of(request))
        else:
            reading = self._parsers.read_ask(form, body, request_id, key_of(request), source)
            ask = await while_connected(request, reading)
        if len(ask.request.content) > MAX_CONTENT_BYTES:
            raise too_large(MAX_CONTENT_BYTES)
        if ask.fetches:
            ask = await while_connected(request, self._fetcher.complete(ask, source, partial(hold, request)))
        return replace(ask, request=replace(ask.request, source=source))

    async def order(self, request: Request, kind: type[Order], *, any_type: bool = False) -> Order:
        """The order that `request` gives: these are short (`MAX_ORDER_BYTES`). Raises Rejected, or ClientGone."""
        return checked(kind, await _body_of(request, any_type=any_type))

    def close(self) -> None:
        self._parsers.close()
        self._fetcher.close()


async def _body_of(request: Request, *, any_type: bool) -> bytes | bytearray:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not any_type and not (
        media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))
    ):
        raise Rejected("the body must be JSON, with the header Content-Type: application/json")
    body: bytes | bytearray = b""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece: bytes = message.get("body", b"")
        if not message.get("more_body", False) and not body:
            return piece  # most are one piece
        body = bytearray(body) if isinstance(body, bytes) else body
        body += piece
        if not message.get("more_body", False):
            return body
