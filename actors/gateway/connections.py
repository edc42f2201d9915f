"""uvicorn's connection with limits on what it may cost: their number, the time that a request takes to arrive, the
time that a client may take nothing, and what is read at once.

What is wrong with a connection is answered in the shape of all errors, where an answer can still be given.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from actors.gateway import limits
from actors.gateway.errors import BodyTooSlow, TooMuchHeld, error_headers, error_json
from scheduler.errors import ArrieroError, Rejected

CONNECTION = "connection"

Phase = Literal["idle", "head", "body", "answer", "rest"]
"""`rest`: the request was answered before all of it had come, mostly with a refusal; the rest is still read."""

_CHUNKED = b"transfer-encoding"

READ_BYTES = 8192
"""Read at once. A body in chunks of one byte costs h11 40 µs a chunk on a busy machine: 55 ms for so much, 1.8 s
for the 256 KiB that asyncio would read."""


class Opened:
    """The open connections of a server, oldest first, by address."""

    def __init__(self) -> None:
        self._of: dict[str, dict[Connection, None]] = {}

    def add(self, address: str, connection: Connection) -> int:
        """How many there are of `address` now."""
        mine = self._of.setdefault(address, {})
        mine[connection] = None
        return len(mine)

    def remove(self, address: str, connection: Connection) -> None:
        del self._of[address][connection]
        if not self._of[address]:
            del self._of[address]

    def give_way(self, newcomer: str) -> bool:
        """Ends a connection without a request for one of the address `newcomer`, at the expense of the address that
        has most of all. False when there is none, or when that is the newcomer's own."""
        most = max(self._of, key=lambda address: len(self._of[address]))
        waiting = next((each for each in self._of[most] if each.is_waiting), None)
        if most == newcomer or waiting is None:
            return False
        waiting.transport.abort()
        return True


class Connection(H11Protocol):
    """`opened`: all connections of the server."""

    def __init__(self, *arguments: Any, opened: Opened, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.app_state = {**self.app_state, CONNECTION: self}  # the application finds it in the state of its scope
        self._opened = opened
        self._address = ""
        self._head_lines = 0
        self._comes_in_chunks = False
        self._seen = b""  # the end of what came, where the name of a header may begin
        self._lines = self._bytes = 0  # of a request whose body comes in chunks
        self._rest_bytes = 0
        self._refusal: ArrieroError | None = None
        self._phase: Phase = "idle"
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._stuck_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]  # of asyncio's selector loop
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._refusal = self._one_too_many(self._opened.add(self._address, self))
        self._enter("idle")

    def connection_lost(self, exc: Exception | None) -> None:
        self._opened.remove(self._address, self)
        for timer in (self._arrival, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._phase == "rest" and self._comes_in_chunks and self._is_too_much_rest(data):
            return
        if self._refusal is not None:  # not before it asks: an answer to nothing would be lost
            self._refuse(self._refusal)
        if self.transport.is_closing() or self._has_too_long_a_head(data) or self._has_too_small_chunks(data):
            return
        super().data_received(data)
        self._follow("head")

    def take(self, data: bytes) -> bool:
        """Sends `data`, not empty, as the next part of the answer under way: see `shortcut`. False when it cannot be
        sent at once, or the answer is not sent in chunks."""
        if (
            self.conn.our_state is not h11.SEND_BODY
            or self.scope["http_version"] != "1.1"
            or self.flow.write_paused
            or self.transport.is_closing()
        ):
            return False
        self.transport.write(b"%x\r\n%s\r\n" % (len(data), data))  # as h11 writes it
        return True

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls it for what is no HTTP."""
        self._refuse(Rejected(f"{msg.rstrip('.')}: not HTTP/1.1, or headers larger than {limits.MAX_HEAD_BYTES} bytes"))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow("idle")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck_bytes = self.transport.get_write_buffer_size()
        self._stall = self.loop.call_later(limits.STALL_S, self._look_at_stall)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    @property
    def is_waiting(self) -> bool:
        """Whether nothing of it waits for an answer."""
        return self._phase in ("idle", "head", "rest")

    def _has_too_long_a_head(self, data: bytes) -> bool:
        """Whether a request has too many headers; it is refused then. They are counted before anything is made of
        them: that costs much more than their bytes."""
        if self._phase in ("idle", "head"):
            end = data.find(b"\r\n\r\n")
            self._head_lines += data.count(b"\n") if end < 0 else data.count(b"\n", 0, end)
            if self._head_lines > limits.MAX_HEAD_LINES:
                self._refuse(Rejected(f"the request has more than {limits.MAX_HEAD_LINES} headers"))
                return True
        return False

    def _has_too_small_chunks(self, data: bytes) -> bool:
        """Whether a body comes in chunks so small that they cost much more than their bytes; it is refused then. Lines
        are counted, before anything is made of them: a chunk has two, and each header that follows the last has one."""
        if self._phase in ("body", "rest"):  # h11 has read its head
            self._comes_in_chunks = any(name == _CHUNKED for name, _ in self.headers or ())
        else:  # the head and what follows it may come together
            seen = self._seen + data
            self._comes_in_chunks = self._comes_in_chunks or _CHUNKED in seen.partition(b"\r\n\r\n")[0].lower()
            self._seen = seen[-len(_CHUNKED) :]
        if not self._comes_in_chunks:
            return False
        self._lines += data.count(b"\n")
        self._bytes += len(data)
        if self._lines <= limits.FREE_LINES or self._bytes >= limits.MIN_LINE_BYTES * self._lines:
            return False
        self._refuse(Rejected("the body comes in chunks that are too small; send larger ones, or its length"))
        return True

    def _is_too_much_rest(self, data: bytes) -> bool:
        """Whether what comes after the answer is not looked at any more: chunks cost more than their bytes. The
        connection is closed soon."""
        before, self._rest_bytes = self._rest_bytes, self._rest_bytes + len(data)
        if before <= limits.REST_BYTES < self._rest_bytes and self._arrival is not None:
            self._arrival.cancel()
            self._arrival = self.loop.call_later(limits.REST_S, self._too_late)
        return self._rest_bytes > limits.REST_BYTES

    def _one_too_many(self, of_address: int) -> TooMuchHeld | None:
        most = limits.connection_limit()
        if len(self.connections) > most and not self._opened.give_way(self._address):
            return TooMuchHeld(f"{most} connections are open, the maximum", retry_after_s=limits.RETRY_S)
        most = limits.connection_limit_of_address()
        if of_address > most:
            return TooMuchHeld(
                f"{most} connections from {self._address} are open, the maximum per address",
                retry_after_s=limits.RETRY_S,
            )
        return None

    def _follow(self, between: Phase) -> None:
        """Enter the phase that h11 is in; `between`: the one without a request."""
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._enter("rest" if self.conn.our_state is h11.DONE else "body")
        else:
            self._enter(between if state is h11.IDLE else "answer")

    def _enter(self, phase: Phase) -> None:
        """`phase` has a time limit from its beginning on."""
        if phase == self._phase and self._arrival is not None:
            return
        self._phase = phase
        if phase == "idle" and not self.conn.trailing_data[0]:  # else the next request has begun
            self._head_lines = self._lines = self._bytes = self._rest_bytes = 0
            self._comes_in_chunks = False
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None
        if phase != "answer":
            seconds = {
                "idle": limits.KEEP_ALIVE_S,
                "head": limits.HEAD_S,
                "body": limits.BODY_S,
                "rest": limits.BODY_S,
            }[phase]
            self._arrival = self.loop.call_later(seconds, self._too_late)

    def _too_late(self) -> None:
        if self._phase in ("idle", "rest"):
            self.transport.abort() if self.transport.get_write_buffer_size() else self.transport.close()
        else:
            what, seconds = ("headers", limits.HEAD_S) if self._phase == "head" else ("body", limits.BODY_S)
            self._refuse(BodyTooSlow(f"the {what} of the request did not arrive within {seconds:.0f} s"))

    def _refuse(self, error: ArrieroError) -> None:
        """Answer with `error` unless an answer has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error_json(error)
            headers = {
                **error_headers(error),
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
            }
            response = h11.Response(status_code=error.http_status, headers=list(headers.items()))
            events = (response, h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()

    def _look_at_stall(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= self._stuck_bytes:
            self.transport.abort()
        else:
            self._stuck_bytes = left
            self._stall = self.loop.call_later(limits.STALL_S, self._look_at_stall)
