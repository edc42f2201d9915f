"""Streams over raw ASGI, and the care for clients that leave.

    EventStream       sends an async generator's bytes; silence is bridged, so that proxies stay patient
    while_connected   awaits an answer and gives up when the client has gone

A generator is always closed: at its end, when the client disconnects (which one that stops reading is made to do:
`connections`), and when the gateway closes.
An error before the first byte is an ordinary HTTP error; after it, it ends the stream (`dialects`).
Cost per event: one lock and one send, no task; less by a `Shortcut`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from actors.gateway.connections import CONNECTION, Connection
from actors.gateway.dialects import OPENAI, Dialect
from actors.gateway.errors import unexpected
from actors.gateway.shortcut import Shortcut
from scheduler.errors import ArrieroError

T = TypeVar("T")

LAST_WORDS = "arriero.last_words"
"""In the message that starts a stream: what makes its end out of an error."""
_NAMED = b"\ndata: "  # stands once in each named event, and nowhere else: JSON has no line breaks in its texts

log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client closed its connection before the answer was ready."""


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
    """Sends what `events` yields, in a dialect. After `pulse_s` seconds of silence it says that it waits, and again
    every `pulse_s`, where the dialect has a word for it.

    `shortcut` is opened to the client's connection once the first of them is sent.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        pulse_s: float,
        shortcut: Shortcut | None = None,
        dialect: Dialect = OPENAI,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=dialect.stream_type)
        del self.headers["content-length"]
        self._events = events
        self._pulse_s = pulse_s
        self._shortcut = shortcut
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection | None = scope.get("state", {}).get(CONNECTION)
        line = _Line(send, self.status_code, self.raw_headers, connection, self._dialect)
        pump = asyncio.ensure_future(self._pump(line))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while True:
                sent = line.sent
                await asyncio.wait({pump, gone}, timeout=self._pulse_s, return_when=asyncio.FIRST_COMPLETED)
                if pump.done() or gone.done():
                    break
                if line.sent == sent and not line.blocked and self._dialect.waiting:
                    await line.write(self._dialect.waiting)
        finally:
            await _end(pump, gone)
        if line.failure is not None:
            await self._dialect.refusal(line.failure)(scope, receive, send)

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
        dialect: Dialect,
    ) -> None:
        self._dialect = dialect
        self._send = send
        self._connection = connection
        self._start = {
            "type": "http.response.start",
            "status": status,
            "headers": headers,
            LAST_WORDS: self._last_words,
        }
        self._turn = asyncio.Lock()
        self._events = 0  # named ones
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
            self._events += data.count(_NAMED)
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def take(self, data: bytes) -> bool:
        """Whether `data` was sent at once: nothing else is being written, and the client takes it."""
        taken = self._connection is not None and not self.blocked and self._connection.take(data)
        if taken:
            self.sent += 1
            self._events += data.count(_NAMED)
        return taken

    def _last_words(self, error: ArrieroError) -> bytes:
        return self._dialect.failure(error, self._events)

    async def fail(self, error: ArrieroError) -> None:
        if self.sent:
            await self.write(self._last_words(error), more=False)
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
