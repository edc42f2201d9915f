"""Requests that mean harm, and what must hold for the answers. By hand, for as long as you like:

    python tests/fuzz/hostile_requests.py SECONDS [SEED]

It prints the longest that the event loop was kept busy at once (processor time, so that a busy machine does not count).
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "gateway"))

from fastapi import FastAPI
from gateway_fakes import FakeBackend, asked_in_process

from actors.gateway.app import make_app
from actors.gateway.limits import INLINE_BYTES

VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "stream": True,
        "stop": ["a"], "logit_bias": {"1": 2}, "tools": [], "modalities": ["text"],
        "response_format": {"type": "json_schema", "json_schema": {"schema": {}}},
        "stream_options": {"include_usage": True}, "n_ctx": 512, "deadline_s": 3, "priority": 1, "seed": 4, "n": 1,
        "temperature": 0.5, "max_tokens": 3,
    },
    "/v1/completions": {"model": "tiny", "prompt": [1, 2], "echo": False, "best_of": 1, "top_k": 3},
    "/v1/embeddings": {"model": "tiny", "input": ["a", "b"], "encoding_format": "base64"},
    "/api/v1/load": {"model": "tiny", "n_ctx": 512},
    "/api/v1/unload": {"model": "tiny"},
    "/api/v1/pin": {"model": "tiny", "pinned": True},
}  # fmt: skip
"""A request that is answered, by route: what harms is put into it."""

PIECES = [
    b"{}", b"[]", b"0", b"-1", b"1e999", b"1e-999", b"9" * 4400, b"0.1", b"null", b"true", b'"a"', b'"\\ud800"', b'""',
    b'"\\u0000"', b'"\xff"', b"NaN", b"[[]]", b'{"a":0}', b'{"role":"user"}', b'{"role":"user","content":[{}]}', b'[1]',
    b'{"type":"text","text":"a"}', b'"' + b"x" * 5000 + b'"',
]  # fmt: skip
MOST_ANSWERED = 64 * 1024


def hostile(chance: random.Random, most_bytes: int) -> tuple[str, bytes]:
    """A route and a body for it of at most about `most_bytes`."""
    path = chance.choice(sorted(VALID))
    fields = [b'"%s":%s' % (name.encode(), json.dumps(value).encode()) for name, value in VALID[path].items()]
    for _ in range(chance.randint(1, 3)):
        name = chance.choice([*VALID[path], "unknown"]).encode()
        field = b'"%s":%s' % (name, value_of(chance, most_bytes // 3))
        fields = [kept for kept in fields if not kept.startswith(b'"%s"' % name)] + [field]
    body = b"{" + b",".join(fields) + b"}"
    if chance.random() < 0.15:
        at = chance.randrange(len(body))
        body = chance.choice([body[:at], body[:at] + bytes([chance.randrange(256)]) + body[at:], body * 2, body[at:]])
    return path, body


def value_of(chance: random.Random, most_bytes: int) -> bytes:
    """JSON, or nearly: one value, one nested in itself, or as many as there is room for."""
    piece = chance.choice(PIECES)
    if chance.random() < 0.3:
        return piece
    n = max(1, int(min(most_bytes, 10 ** chance.uniform(0, 8)) / (len(piece) + 1)))
    if chance.random() < 0.2:
        return b"[" * min(n, 10**5) + piece + b"]" * min(n, 10**5)
    if chance.random() < 0.2:
        return b"{" + b",".join(b'"k%d":%s' % (i, piece) for i in range(min(n, 10**5))) + b"}"
    last = chance.choice(PIECES)
    return b"[" + (piece + b",") * n + last + b"]"


def check(app: FastAPI, path: str, status: int, answer: bytes) -> None:
    """An answer, or an error in the product's shape that the document knows, and never much of either."""
    assert status != 500, answer[:500]
    assert len(answer) < MOST_ANSWERED, (status, len(answer))
    responses = app.openapi()["paths"][path]["post"]["responses"]
    assert str(status) in responses, status
    if status != 200:
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code", "details"}
        assert f"`{error['code']}`" in responses[str(status)]["description"]


async def _watch(longest_s: list[float], note: Callable[[float], None]) -> None:
    while True:
        before = time.thread_time()
        await asyncio.sleep(0.005)
        took = time.thread_time() - before
        if took > longest_s[0]:
            longest_s[0] = took
            note(took)


async def _run(seconds: float, seed: int) -> None:
    chance = random.Random(seed)
    asked: list[Any] = ["", b""]
    longest_s = [0.0]
    counts: Counter[tuple[str, int]] = Counter()
    end = time.monotonic() + seconds

    def note(took: float) -> None:
        print(f"{took * 1e3:6.1f} ms: {asked[0]}, {len(asked[1])} bytes: {asked[1][:150]!r}", flush=True)

    app = make_app(FakeBackend())
    async with app.router.lifespan_context(app):
        watching = asyncio.ensure_future(_watch(longest_s, note))
        while time.monotonic() < end:
            asked[:] = hostile(chance, chance.choice([INLINE_BYTES, INLINE_BYTES, 2**20, 2**23]))
            await asyncio.sleep(0.006)  # what it took to make it does not count
            status, answer = await asked_in_process(app, *asked)
            check(app, asked[0], status, answer)
            counts[asked[0], status] += 1
        watching.cancel()
    for (path, status), count in sorted(counts.items()):
        print(f"{path:22} {status} {count:7}")


if __name__ == "__main__":
    asyncio.run(_run(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
