"""Embeddings as OpenAI's clients read them: numbers, or base64 of little-endian float32.

The answer to 2048 inputs may have millions of numbers. It is made and sent vector by vector, and others have the event
loop in between: a vector of 4096 numbers takes 0.2 ms.
"""

from __future__ import annotations

import asyncio
import sys
from array import array
from base64 import b64encode
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from actors.serving.protocol import EmbedResult

PIECE_BYTES = 64 * 1024  # sent at once; as much as a socket's buffer takes


class Vectors(Response):
    """The vectors of `result`, in order."""

    def __init__(self, model: str, result: EmbedResult, encoding: Literal["float", "base64"]) -> None:
        super().__init__(media_type="application/json")
        del self.headers["content-length"]
        self._model = model
        self._result = result
        self._encode = _base64 if encoding == "base64" else _numbers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        piece = bytearray()
        for part in self._parts():
            piece += part
            if len(piece) > PIECE_BYTES:
                await send({"type": "http.response.body", "body": bytes(piece), "more_body": True})
                piece.clear()
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": bytes(piece), "more_body": False})

    def _parts(self) -> Iterator[bytes]:
        yield b'{"object":"list","model":%s,"data":[' % to_json(self._model)
        for index, vector in enumerate(self._result.vectors):
            comma = b"," if index else b""
            yield b'%s{"object":"embedding","index":%d,"embedding":%s}' % (comma, index, self._encode(vector))
        tokens = self._result.prompt_tokens
        yield b'],"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (tokens, tokens)


class OllamaVectors(Vectors):
    """The same in Ollama's words. `took_s`: seconds."""

    def __init__(self, model: str, result: EmbedResult, took_s: float) -> None:
        super().__init__(model, result, "float")
        self._took_s = took_s

    def _parts(self) -> Iterator[bytes]:
        yield b'{"model":%s,"embeddings":[' % to_json(self._model)
        for index, vector in enumerate(self._result.vectors):
            yield (b"," if index else b"") + self._encode(vector)
        took_ns = round(1e9 * self._took_s)
        tokens = self._result.prompt_tokens
        yield b'],"total_duration":%d,"load_duration":0,"prompt_eval_count":%d}' % (took_ns, tokens)


def _numbers(vector: Sequence[float]) -> bytes:
    return to_json(list(vector), inf_nan_mode="null")


def _base64(vector: Sequence[float]) -> bytes:
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return b'"%s"' % b64encode(floats.tobytes())
