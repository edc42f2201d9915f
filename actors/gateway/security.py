"""Who may talk to the gateway. One ASGI layer in front of every route.

    API key   needed wherever the gateway can be reached from outside this machine; compared in constant time
    names     without a key, only loopback names in `Host` and `Origin`: a web page must not reach the gateway through
              a name that its author points at 127.0.0.1, nor with a form of its own. Keyed gateways need no such rule,
              for the page does not know the key
    bodies    bounded, before anything reads them

Health stays open, for probes. There are no CORS headers: pages of other origins cannot read answers.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.gateway.address import is_loopback
from actors.gateway.errors import BodyTooLarge, Forbidden, Unauthorized
from actors.gateway.stream import error_response
from scheduler.errors import ArrieroError
from scheduler.units import MIB, format_bytes

OPEN_PATHS = frozenset({"/health", "/api/v1/health"})
MAX_BODY_BYTES = 32 * MIB
_KEY = "arriero.key"


class Guard:
    """The layer itself. `api_keys`: by name, none for a gateway without; `max_body_bytes` bounds what a request may
    send."""

    def __init__(self, app: ASGIApp, api_keys: Mapping[str, str], max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._api_keys = {name: key.encode() for name, key in api_keys.items()}
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope[_KEY] = self._check(scope["path"], Headers(scope=scope))
        except ArrieroError as error:
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, _BoundedBody(receive, self._max_body_bytes).receive, send)

    def _check(self, path: str, headers: Headers) -> str:
        """The name of the key that the request carries."""
        name = ""
        if not self._api_keys:
            _check_names(headers)
        elif path not in OPEN_PATHS:
            name = self._name_of_key(headers.get("authorization", ""))
        if int(headers.get("content-length") or 0) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        return name

    def _name_of_key(self, authorization: str) -> str:
        carried = [name for name, key in self._api_keys.items() if _carries(authorization, key)]
        if not carried:
            raise Unauthorized(
                "this gateway needs its API key: send 'Authorization: Bearer KEY' (the client reads ARRIERO_API_KEY)"
            )
        return carried[0]


def key_of(request: Request) -> str:
    """The name of the API key that the request came with; empty where there is none, or but one."""
    name: str = request.scope.get(_KEY, "")
    return name


def _carries(authorization: str, api_key: bytes) -> bool:
    scheme, _, token = authorization.partition(" ")
    # Header text is the raw bytes read as Latin-1.
    return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), api_key)


def _check_names(headers: Headers) -> None:
    host = headers.get("host", "")
    if not is_loopback(_hostname(f"//{host}")):
        raise Forbidden(
            f"this gateway answers to localhost, 127.0.0.1 and [::1] only, not to {host!r}; "
            "to use another name (a reverse proxy, a tunnel) start it with an API key"
        )
    origin = headers.get("origin")
    if origin is not None and not is_loopback(_hostname(origin)):
        raise Forbidden(f"a web page of {origin!r} must not use this gateway; start it with an API key to allow it")


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {format_bytes(limit)}, the most that the gateway takes")


class _BoundedBody:
    """Counts the bytes of a body whose length nobody announced."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._seen = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > self._limit:
                raise _too_large(self._limit)
        return message
