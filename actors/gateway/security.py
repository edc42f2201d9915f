"""Who may talk to the gateway, and how much. One ASGI layer in front of every route.

    API key   needed wherever the gateway can be reached from outside this machine; compared in constant time
    names     without a key, only loopback names in `Host` and `Origin`: a web page must not reach the gateway through
              a name that its author points at 127.0.0.1, nor with a form of its own. Keyed gateways need no such rule,
              for the page does not know the key
    turns     one request of each source begins in a turn of the event loop (`turns`)
    bodies    bounded, each, all of a source, and all together, before anything reads them (`limits`)
    the end   when the gateway closes, every request gets a last word

Health stays open, for probes. There are no CORS headers: pages of other origins cannot read answers.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.gateway.address import is_loopback
from actors.gateway.closing import Closing, shutting_down
from actors.gateway.dialects import dialect_of
from actors.gateway.errors import Forbidden, Unauthorized
from actors.gateway.limits import MAX_BODY_BYTES, MAX_ORDER_BYTES, MAX_QUERY_PARTS, Held, too_large
from actors.gateway.stream import LAST_WORDS
from actors.gateway.turns import Turns
from scheduler.errors import ArrieroError, Rejected

OPEN_PATHS = frozenset({"/health", "/api/v1/health"})
LARGE_PATHS = frozenset(
    f"{before}/{name}"
    for before, names in (
        (
            "/v1",
            (
                "chat/completions",
                "completions",
                "embeddings",
                "messages",
                "messages/count_tokens",
                "rerank",
                "reranking",
                "responses",
            ),
        ),
        ("", ("completion", "completions", "infill", "tokenize", "detokenize", "apply-template", "rerank")),
        ("/v2", ("rerank",)),
        ("/api", ("chat", "generate", "embed", "embeddings")),
    )
    for name in names
)
"""Whose bodies may be large."""
_KEY = "arriero.key"
_BODY = "arriero.body"


class Guard:
    """The layer itself. `api_keys`: by name, none for a gateway without."""

    def __init__(self, app: ASGIApp, api_keys: Mapping[str, str], held: Held, closing: Closing) -> None:
        self._app = app
        self._api_keys = {name: key.encode() for name, key in api_keys.items()}
        self._held = held
        self._closing = closing
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            with self._closing.request():
                await self._serve(scope, receive, answer)
        except ArrieroError as error:
            await dialect_of(scope["path"]).refusal(error)(scope, receive, send)
        except asyncio.CancelledError:
            if not self._closing.begun:
                raise
            await answer.end(scope, receive, shutting_down())

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        limit = MAX_BODY_BYTES if scope["path"] in LARGE_PATHS else MAX_ORDER_BYTES
        source = scope["client"][0] if scope["client"] else ""
        try:
            scope[_KEY] = self._check(scope, Headers(scope=scope), limit)
            source = scope[_KEY] or source
        finally:
            await self._turns.take(source)
        with self._held.request(source, limit) as body:
            scope[_BODY] = body

            async def counted() -> Message:
                message = await receive()
                if message["type"] == "http.request":
                    body.add(len(message.get("body", b"")))
                return message

            await self._app(scope, counted, answer.send)

    def _check(self, scope: Scope, headers: Headers, max_body_bytes: int) -> str:
        """The name of the key that the request carries."""
        name = ""
        if not self._api_keys:
            _check_names(headers)
        elif scope["path"] not in OPEN_PATHS:
            name = self._name_of_key(headers.get("authorization") or f"Bearer {headers.get('x-api-key', '')}")
        if scope["query_string"].count(b"&") >= MAX_QUERY_PARTS:
            raise Rejected(f"the URL has more than {MAX_QUERY_PARTS} parameters")
        announced = headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > max_body_bytes:
            raise too_large(max_body_bytes)
        return name

    def _name_of_key(self, authorization: str) -> str:
        carried = [name for name, key in self._api_keys.items() if _carries(authorization, key)]
        if not carried:
            raise Unauthorized(
                "this gateway needs its API key: send 'Authorization: Bearer KEY' (the client reads ARRIERO_API_KEY)"
            )
        return carried[0]


class _Answer:
    """What has been sent of an answer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif not message.get("more_body", False):
            self._complete = True
        await self._send(message)

    async def end(self, scope: Scope, receive: Receive, error: ArrieroError) -> None:
        """Say `error` in the place of what has not been sent: as an answer, or as the end of a stream. Any other
        answer that has begun stays cut off, which its client notices."""
        if self._start is None:
            await dialect_of(scope["path"]).refusal(error)(scope, receive, self._send)
        elif not self._complete and LAST_WORDS in self._start:
            last_words = self._start[LAST_WORDS](error)
            await self._send({"type": "http.response.body", "body": last_words, "more_body": False})


def hold(request: Request, answer_bytes: int) -> None:
    """Count an answer that is held until its client has taken it. Raises TooMuchHeld."""
    request.scope[_BODY].hold(answer_bytes)


def key_of(request: Request) -> str:
    """The name of the API key that the request came with; empty where there is none, or but one."""
    name: str = request.scope.get(_KEY, "")
    return name


def source_of(request: Request) -> str:
    """Who asks, as far as that can be told: the API key's name, else the address."""
    return key_of(request) or (request.client.host if request.client else "")


def _carries(authorization: str, api_key: bytes) -> bool:
    scheme, _, token = authorization.partition(" ")
    # Header text is the raw bytes read as Latin-1.
    return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), api_key)


def _check_names(headers: Headers) -> None:
    host = headers.get("host", "")
    if not is_loopback(_hostname(f"//{host}")):
        raise Forbidden(
            f"this gateway answers only to localhost, 127.0.0.1 and [::1], not to {host!r}; "
            "to use another name (a reverse proxy, a tunnel) start it with an API key"
        )
    origin = headers.get("origin")
    if origin is not None and not is_loopback(_hostname(origin)):
        raise Forbidden(f"this gateway refuses web pages from {origin!r}; start it with an API key to allow them")


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
