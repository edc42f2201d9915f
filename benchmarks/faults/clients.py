"""Those who ask: a dozen kinds of requests, each with the ends that it may have."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import anyio
import httpx
from typing_extensions import Self

from benchmarks.faults.mishaps import Mishaps

DEADLINE_S = 60.0
LIMIT_S = 3 * DEADLINE_S
"""After so long a request hangs: it may wait for DEADLINE_S, be replayed twice, and answer for some seconds."""
BACK_OFF_S = 1.0
"""What a client waits that found no gateway."""
FAILURES = frozenset({"unavailable", "engine_failed", "queue_full", "deadline_exceeded"})
"""Errors that any good request may have while processes are killed around it."""
ANSWERED, LEFT, BROKEN = "answered", "left", "broken with the gateway"

Ask = Callable[["Clients", random.Random], Awaitable[str]]


class Clients:
    """`ended`: how requests ended, by kind and end."""

    def __init__(self, url: str, seed: int, models: tuple[str, ...], mishaps: Mishaps) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=None, trust_env=False)
        self._seed, self._models, self._mishaps = seed, models, mishaps
        self.ended: Counter[tuple[str, str]] = Counter()
        self.violations: list[str] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def rows(self) -> list[tuple[str, str, str]]:
        return [(kind, end, str(count)) for (kind, end), count in sorted(self.ended.items())]

    async def ask_until(self, end: float, number: int) -> None:
        """One client after the other, until this moment of the monotonic clock."""
        chance = random.Random(f"client {self._seed} {number}")
        while time.monotonic() < end:
            broken = await self._ask(chance.choice(list(KINDS)), chance) == BROKEN
            await asyncio.sleep(BACK_OFF_S if broken else chance.expovariate(4.0))

    async def all_models_answer(self) -> None:
        """In peace again, every model has to."""
        for model in self._models:
            try:
                with anyio.fail_after(LIMIT_S):
                    end = await self._whole(self._chat(random.Random(model), model=model))
            except TimeoutError:
                end = "silent"
            if end != ANSWERED:
                self.violations.append(f"after the last mishap {model} does not answer: {end}")

    async def _ask(self, kind: str, chance: random.Random) -> str:
        ask, expected = KINDS[kind]
        began, at = time.monotonic(), time.strftime("%H:%M:%S")
        try:
            with anyio.fail_after(LIMIT_S):
                end = await ask(self, chance)
        except TimeoutError:
            end = "silent"
        except httpx.TransportError as error:
            gone = self._mishaps.gateway_was_gone(began)
            end = BROKEN if gone else f"{type(error).__name__} without a cause"
        self.ended[kind, end] += 1
        if end not in expected | {BROKEN}:
            self.violations.append(f"{kind}, asked at {at}: {end} after {time.monotonic() - began:.1f} s")
        return end

    # ------------------------------------------------------------------ ways to ask

    def _chat(self, chance: random.Random, **more: Any) -> dict[str, Any]:
        question = f"What do you carry over the pass on day {chance.randint(1, 99)}?"
        body = {"model": chance.choice(self._models), "messages": [{"role": "user", "content": question}]}
        return {**body, "max_tokens": chance.choice((1, 8, 40, 200)), "deadline_s": DEADLINE_S, **more}

    async def _whole(self, body: Any, path: str = "chat/completions") -> str:
        response = await self._http.post(f"/v1/{path}", json=body)
        return ANSWERED if response.status_code == httpx.codes.OK else _code(response.content)

    async def _stream(self, body: dict[str, Any], pause_s: float = 0.0, leave_s: float = inf) -> str:
        """Follow a stream to its end; `leave_s`: for so many seconds. Between two reads `pause_s` go by."""
        with anyio.move_on_after(leave_s) as staying:
            async with self._http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                if response.status_code != httpx.codes.OK:
                    return _code(await response.aread())
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        return ANSWERED
                    if line.startswith('data: {"error"'):
                        return _code(line.removeprefix("data: ").encode())
                    await asyncio.sleep(pause_s)
        if staying.cancelled_caught:
            return LEFT
        raise httpx.RemoteProtocolError("the stream ended without its last event")

    # ------------------------------------------------------------------ kinds

    async def stream(self, chance: random.Random) -> str:
        return await self._stream(self._chat(chance))

    async def slow_reader(self, chance: random.Random) -> str:
        return await self._stream(self._chat(chance, max_tokens=40), pause_s=0.2)

    async def leaver(self, chance: random.Random) -> str:
        return await self._stream(self._chat(chance, max_tokens=900), leave_s=chance.uniform(0.005, 1.0))

    async def whole(self, chance: random.Random) -> str:
        return await self._whole(self._chat(chance))

    async def impatient(self, chance: random.Random) -> str:
        return await self._whole(self._chat(chance, deadline_s=chance.uniform(0.1, 2.0)))

    async def schema(self, chance: random.Random) -> str:
        wanted = {"type": "object", "properties": {"load": {"enum": ["salt", "maize"]}}, "required": ["load"]}
        form = {"type": "json_schema", "json_schema": {"name": "load", "schema": wanted}}
        return await self._whole(self._chat(chance, response_format=form, max_tokens=60))

    async def completion(self, chance: random.Random) -> str:
        body = {"model": chance.choice(self._models), "prompt": "Over the pass", "max_tokens": 20}
        return await self._whole({**body, "deadline_s": DEADLINE_S}, "completions")

    async def embeddings(self, chance: random.Random) -> str:
        return await self._whole({"model": chance.choice(self._models), "input": ["salt", "maize"]}, "embeddings")

    async def bad(self, chance: random.Random) -> str:
        wrong: dict[str, Any] = chance.choice(
            ({"max_tokens": "many"}, {"messages": []}, {"temperature": -3}, {"messages": 7})
        )
        return await self._whole(self._chat(chance, **wrong))

    async def stranger(self, chance: random.Random) -> str:
        return await self._whole(self._chat(chance, model="unicorn"))

    async def too_long(self, chance: random.Random) -> str:
        return await self._whole(self._chat(chance, messages=[{"role": "user", "content": "salt " * 60_000}]))

    async def too_big(self, chance: random.Random) -> str:
        return await self._whole(self._chat(chance, user="x" * (33 << 20)))

    async def onlooker(self, _: random.Random) -> str:
        response = await self._http.get("/api/v1/status")
        return ANSWERED if response.status_code == httpx.codes.OK else _code(response.content)


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"no error of ours: {body[:80]!r}"


_GOOD = FAILURES | {ANSWERED}
KINDS: dict[str, tuple[Ask, frozenset[str]]] = {
    "stream": (Clients.stream, _GOOD),
    "slow reader": (Clients.slow_reader, _GOOD),
    "leaver": (Clients.leaver, _GOOD | {LEFT}),
    "whole": (Clients.whole, _GOOD),
    "impatient": (Clients.impatient, _GOOD),
    "schema": (Clients.schema, _GOOD),
    "completion": (Clients.completion, _GOOD),
    "embeddings": (Clients.embeddings, _GOOD | {"invalid_request"}),  # the samples are no embedding models
    "bad": (Clients.bad, frozenset({"invalid_request"})),
    "stranger": (Clients.stranger, FAILURES | {"model_not_found"}),
    "too long": (Clients.too_long, FAILURES | {"invalid_request", "context_length_exceeded"}),
    "too big": (Clients.too_big, frozenset({"request_too_large"})),
    "onlooker": (Clients.onlooker, FAILURES | {ANSWERED}),
}
"""What each kind does, and how it may end."""
