"""Requests that mean harm, and what must hold for the answers. By hand, for as long as you like:

    python tests/fuzz/hostile_requests.py SECONDS [SEED]

A gateway in a process of its own is asked, and notes how long its event loop stood still: by the clock, which wants a
quiet machine, and in processor time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import random
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "gateway"))

from fastapi import FastAPI
from gateway_fakes import FakeBackend, asked_in_process, connect, web

from actors.gateway.app import make_app
from actors.gateway.limits import INLINE_BYTES
from actors.gateway.server import listen, make_server, url_of

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
    "/v1/responses": {
        "model": "tiny", "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], "tools": [],
        "instructions": "a", "stream": True, "tool_choice": "auto", "reasoning": {"effort": "low"}, "user": "a",
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}, "max_output_tokens": 3,
        "metadata": {"a": "b"}, "include": ["a"], "top_logprobs": 0, "previous_response_id": None, "conversation": None,
    },
    "/v1/messages": {
        "model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "system": [{"type": "text", "text": "a"}], "stop_sequences": ["a"], "stream": True, "temperature": 0.5,
        "tools": [{"name": "a", "input_schema": {}}], "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 2},
    },
    "/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "system": "a"},
    "/v1/rerank": {"model": "tiny", "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1},
    "/api/chat": {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi", "images": ["aGk="]}], "format": {},
        "think": "low",
        "tools": [{"type": "function", "function": {"name": "a"}}], "options": {"num_ctx": 512, "stop": ["a"]},
        "keep_alive": "5m",
    },
    "/api/generate": {"model": "tiny", "prompt": "a", "system": "c", "raw": False, "options": {"seed": 1}},
    "/api/embed": {"model": "tiny", "input": ["a"], "dimensions": 2, "keep_alive": 0},
    "/api/embeddings": {"model": "tiny", "prompt": "a"},
    "/api/show": {"model": "tiny"},
    "/completion": {
        "model": "tiny", "prompt": "a", "n_predict": 3, "samplers": ["top_k"], "logit_bias": [[1, 2.0], ["a", False]],
        "grammar": "root ::= [a]", "n_probs": 2, "dry_sequence_breakers": ["a"],
    },
    "/infill": {
        "model": "tiny", "input_prefix": "a", "input_suffix": "b", "input_extra": [{"text": "a", "filename": "b"}],
    },
    "/tokenize": {"model": "tiny", "content": "a", "with_pieces": True},
    "/detokenize": {"model": "tiny", "tokens": [1, 2]},
    "/apply-template": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
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
MOST_COMPUTED_S = 0.1
EVERY_S = 0.002  # the loop looks at the clock


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


def answered(app: FastAPI, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer that `app` gives in this process."""
    return asyncio.run(asked_in_process(app, path, body))


def check(app: FastAPI, path: str, status: int, answer: bytes) -> None:
    """An answer, or an error in the shape of the dialect that the document knows, and never much of either."""
    assert status != 500, answer[:500]
    assert len(answer) < MOST_ANSWERED, (status, len(answer))
    responses = app.openapi()["paths"][path]["post"]["responses"]
    assert str(status) in responses, status
    if status == 200:
        return
    told = json.loads(answer)
    if path.startswith("/v1/messages"):
        assert told["type"] == "error" and set(told["error"]) == {"type", "message"}
    elif path.startswith("/api/") and not path.startswith("/api/v1/"):
        assert isinstance(told["error"], str)
    else:
        assert set(told["error"]) == {"message", "type", "param", "code", "details"}
        assert f"`{told['error']['code']}`" in responses[str(status)]["description"]


async def _serve(stood_s: Any, computed_s: Any, listener: socket.socket) -> None:
    """A gateway whose event loop notes the longest that it stood still: by the clock, and in processor time."""
    server = make_server(make_app(FakeBackend()))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not serving.done():
        before, before_cpu = time.monotonic(), time.thread_time()
        await asyncio.sleep(EVERY_S)
        stood_s.value = max(stood_s.value, time.monotonic() - before - EVERY_S)
        computed_s.value = max(computed_s.value, time.thread_time() - before_cpu)


def _gateway(stood_s: Any, computed_s: Any, listener: socket.socket) -> None:
    asyncio.run(_serve(stood_s, computed_s, listener))


def _odd(chance: random.Random) -> bytes:
    """What is wrong before any body."""
    n = int(10 ** chance.uniform(1, 6))
    noise = bytes(chance.randrange(256) for _ in range(min(n, 60_000)))
    return chance.choice([
        b"GET /" + b"a" * n + b" HTTP/1.1\r\n\r\n",
        b"GET /api/v1/events?" + b"after=1&" * n + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * n + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nCookie: " + b"a=b;" * n + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n{\r\n" * n,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * min(n, 1000),
        noise,
    ])  # fmt: skip


def _ask_oddly(url: str, what: bytes) -> None:
    with connect(url) as connection, contextlib.suppress(OSError):
        connection.settimeout(2.0)
        connection.sendall(what)
        connection.recv(65536)


def _run(seconds: float, seed: int) -> None:
    chance = random.Random(seed)
    spawning = multiprocessing.get_context("spawn")
    stood_s, computed_s = spawning.Value("d", 0.0), spawning.Value("d", 0.0)
    listener = listen("127.0.0.1", 0)
    url, app = url_of(listener), make_app(FakeBackend())
    gateway = spawning.Process(target=_gateway, args=(stood_s, computed_s, listener), daemon=True)
    gateway.start()
    counts: Counter[tuple[str, int]] = Counter()
    try:
        web.get(f"{url}/health")
        stood_s.value = computed_s.value = 0.0  # what it took to start does not count
        worst_s, end = 0.0, time.monotonic() + seconds
        while time.monotonic() < end:
            if chance.random() < 0.3:
                path, body = "odd", _odd(chance)
                _ask_oddly(url, body)
                counts[path, 0] += 1
            else:
                path, body = hostile(chance, chance.choice([INLINE_BYTES, INLINE_BYTES, 2**20, 2**23, 2**25]))
                reply = web.post(url + path, content=body, headers={"Content-Type": "application/json"})
                check(app, path, reply.status_code, reply.content)
                counts[path, reply.status_code] += 1
            if stood_s.value > worst_s:
                worst_s = stood_s.value
                print(f"{worst_s * 1e3:6.1f} ms: {path}, {len(body)} bytes: {body[:100]!r}", flush=True)
    finally:
        gateway.kill()
    for (path, status), count in sorted(counts.items()):
        print(f"{path:22} {status} {count:7}")
    print(f"the loop stood still for {stood_s.value * 1e3:.1f} ms, and computed for {computed_s.value * 1e3:.1f} ms")
    if computed_s.value > MOST_COMPUTED_S:
        sys.exit(f"it must not compute for more than {MOST_COMPUTED_S * 1e3:.0f} ms at once: all others wait")


if __name__ == "__main__":
    _run(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
