"""Server-sent events over raw ASGI, and the care for clients that leave.

    EventStream       sends an async generator's bytes; silence is bridged with comments, so that proxies stay patient
    while_connected   awaits an answer and gives up when the client has gone

A generator is always closed: at its end, when the client disconnects (which one that stops reading is made to do:
`connections`), and when the gateway closes.
An error before the first byte is an ordinary HTTP error; after it, an `{"error": ...}` event ends the stream.
Cost per event: one lock and one send, no task; less by a `Shortcut`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from actors.gateway.connections import CONNECTION, Connection
from actors.gateway.errors import MAX_MESSAGE_LENGTH, clipped, error_headers, error_json, unexpected
from actors.gateway.shortcut import Shortcut
from scheduler.errors import ArrieroError

T = TypeVar("T")

EVENT_STREAM = "text/event-stream"
LINES = "application/x-ndjson"
COMMENT = b": waiting\n\n"

log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client closed its connection before the answer was ready."""


def event(data: bytes, event_id: int | None = None) -> bytes:
    """One server-sent event; `data` is a single line."""
    prefix = b"" if event_id is None else b"id: %d\n" % event_id
    return b"%sdata: %s\n\n" % (prefix, data)


def failure_in(media_type: str, error: ArrieroError) -> bytes:
    """How a stream of that type says that it ends with `error`; empty for other answers."""
    kind = media_type.partition(";")[0]
    if kind == LINES:
        return json.dumps({"error": error.message}).encode() + b"\n"
    return event(error_json(error)) if kind == EVENT_STREAM else b""


def error_response(error: ArrieroError) -> Response:
    return Response(error_json(error), error.http_status, error_headers(error), "application/json")


def lines_error(error: ArrieroError) -> Response:
    """An error as Ollama's clients expect it."""
    body = json.dumps({"error": clipped(error.message, MAX_MESSAGE_LENGTH)})
    return Response(body, error.http_status, error_headers(error), "application/json")


async def while_connected(request: Request, answer: Awaitable[T]) -> T:
    """`answer`, or ClientGone (and `answer` cancelled) as soon as the client of `request` disconnects.

    The request's body must have been read.
    """
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        await _end(work, gone)


class EventStream(Response):
    """Sends what `events` yields: server-sent events, or `LINES` of JSON. After `pulse_s` seconds of silence a comment
    goes out, and again every `pulse_s`; among lines there are none.

    `shortcut` is opened to the client's connection once the first of them is sent.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        pulse_s: float,
        shortcut: Shortcut | None = None,
        media_type: str = EVENT_STREAM,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type=media_type)
        del self.headers["content-length"]
        self._events = events
        self._pulse_s = pulse_s
        self._shortcut = shortcut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection | None = scope.get("state", {}).get(CONNECTION)
        line = _Line(send, self.status_code, self.raw_headers, connection, self.media_type or EVENT_STREAM)
        pump = asyncio.ensure_future(self._pump(line))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while True:
                sent = line.sent
                await asyncio.wait({pump, gone}, timeout=self._pulse_s, return_when=asyncio.FIRST_COMPLETED)
                if pump.done() or gone.done():
                    break
                if line.sent == sent and not line.blocked and self.media_type == EVENT_STREAM:
                    await line.write(COMMENT)
        finally:
            await _end(pump, gone)
        if line.failure is not None:
            refusal = lines_error if self.media_type == LINES else error_response
            await refusal(line.failure)(scope, receive, send)

    async def _pump(self, line: _Line) -> None:
        try:
            async for data in self._events:
                await line.write(data)
                if self._shortcut is not None:
                    self._shortcut.open(line.take)
        except ArrieroError as error:
            await line.fail(error)
        except Exception as error:
            log.exception("a stream failed")
            await line.fail(unexpected(error))
        else:
            await line.write(b"", more=False)
        finally:
            await self._events.aclose()


class _Line:
    """The response being sent. Two tasks write to it (events and comments), one at a time, or a shortcut."""

    def __init__(
        self,
        send: Send,
        status: int,
        headers: list[tuple[bytes, bytes]],
        connection: Connection | None,
        media_type: str,
    ) -> None:
        self._media_type = media_type
        self._send = send
        self._connection = connection
        self._start = {"type": "http.response.start", "status": status, "headers": headers}
        self._turn = asyncio.Lock()
        self.sent = 0
        self.failure: ArrieroError | None = None  # an error that came before the first byte

    @property
    def blocked(self) -> bool:
        return self._turn.locked()

    async def write(self, data: bytes, more: bool = True) -> None:
        async with self._turn:
            if not self.sent:
                await self._send(self._start)
            self.sent += 1
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def take(self, data: bytes) -> bool:
        """Whether `data` was sent at once: nothing else is being written, and the client takes it."""
        taken = self._connection is not None and not self.blocked and self._connection.take(data)
        self.sent += taken
        return taken

    async def fail(self, error: ArrieroError) -> None:
        if self.sent:
            await self.write(failure_in(self._media_type, error), more=False)
        else:
            self.failure = error


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[T] | asyncio.Future[None]) -> None:
    """Cancel what still runs and wait until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
