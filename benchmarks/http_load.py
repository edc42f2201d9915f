"""Clients that cost little: they ask over plain sockets and look at no more of an answer than they must.

`ask_all(url, bodies, at_once)` sends streamed requests, so many at a time, and tells when the pieces of each came.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

EVENT = b"data: {"
COUNTED = re.compile(rb'"completion_tokens": *(\d+)[,}]')


@dataclass
class Answer:
    """Seconds on one clock: when it was asked, when each event came. `tokens`: as the server counts them."""

    asked_s: float
    events_s: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def first_s(self) -> float:
        return self.events_s[0] - self.asked_s

    def gaps_s(self) -> list[float]:
        """Between one event and the next. The last two say no text: why it ended, and what it used."""
        texts = self.events_s[:-2]
        return [after - before for before, after in itertools.pairwise(texts)]


def streamed(model: str, prompt: str, max_tokens: int, **more: Any) -> Mapping[str, Any]:
    """The body of a streamed completion; the same for any server that speaks OpenAI's API."""
    return _body(model, max_tokens, prompt=prompt, **more)


def streamed_chat(model: str, prompt: str, max_tokens: int, **more: Any) -> Mapping[str, Any]:
    """The same as a chat of one message."""
    return _body(model, max_tokens, messages=[{"role": "user", "content": prompt}], **more)


def _body(model: str, max_tokens: int, **more: Any) -> Mapping[str, Any]:
    return {
        "model": model, "max_tokens": max_tokens, "stream": True, "temperature": 0,
        "stream_options": {"include_usage": True}, **more,
    }  # fmt: skip


def ask_all(url: str, bodies: Iterable[Mapping[str, Any]], at_once: int) -> tuple[list[Answer], float]:
    """The answers to all requests, `at_once` under way at any time, and how many seconds they took together."""
    return asyncio.run(_ask_all(url, list(bodies), at_once))


async def _ask_all(url: str, bodies: list[Mapping[str, Any]], at_once: int) -> tuple[list[Answer], float]:
    waiting = iter(bodies)
    answers: list[Answer] = []

    async def client() -> None:
        parts = urlsplit(url)
        for body in waiting:  # each on a connection of its own: llama-server ends them after a stream
            transport, connection = await asyncio.get_running_loop().create_connection(
                _Connection, parts.hostname or "", parts.port or 80
            )
            answers.append(await connection.ask(body, f"{parts.hostname}:{parts.port}"))
            transport.close()

    began_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return answers, time.perf_counter() - began_s


class _Connection(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def ask(self, body: Mapping[str, Any], host: str) -> Answer:
        content = json.dumps(body).encode()
        self._tail = b""
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answer = Answer(time.perf_counter())
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self._transport.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await self._ended
        return self._answer

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if b"HTTP/1.1 " in data and b"HTTP/1.1 200" not in data:
            self._ended.set_exception(RuntimeError(data.decode(errors="replace")))
            return
        self._answer.events_s += [now_s] * data.count(EVENT)
        tail = self._tail + data
        for counted in COUNTED.finditer(tail):
            self._answer.tokens = int(counted[1])
        self._tail = tail[-1000:]
        if tail.endswith(b"\n0\r\n\r\n"):
            self._ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if hasattr(self, "_ended") and not self._ended.done():
            self._ended.set_exception(ConnectionError("the server closed the connection"))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of `values` lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
