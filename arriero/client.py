"""`Client` and `AsyncClient`: Arriero from Python, over HTTP.

    with Client() as client:
        for piece in client.chat("my-model", "Why is the sky blue?", stream=True):
            print(piece, end="", flush=True)

Both find the gateway by `base_url`, else `ARRIERO_URL`, else port 11535 of this machine; the key by `api_key`, else
`ARRIERO_API_KEY`. Results are typed (`arriero.api`); failures are `ArrieroError`s with the gateway's message. Calls
that may wait for a cold load wait as long as it takes. Closing a stream early cancels the generation.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any, Literal, TypeVar, overload

import httpx
from typing_extensions import Self, Unpack

from actors.records import (
    Answer,
    Embeddings,
    Health,
    LoadResult,
    ModelInfo,
    Notice,
    PinResult,
    Plan,
    Status,
    UnloadResult,
)
from arriero import calls
from arriero.calls import Call, Messages, Options, Progress, connection_error, error_of, http_settings, request_of

T = TypeVar("T")


class TextStream(Progress):
    """Iterates over the pieces of an answer. Leaving it (`with`, `close()`) cancels what is left."""

    def __init__(self, response: httpx.Response, base_url: httpx.URL) -> None:
        super().__init__()
        self._response = response
        self._base_url = base_url

    def __iter__(self) -> Iterator[str]:
        with closing(_lines(self._response, self._base_url)) as lines:
            for line in lines:
                if piece := self.feed(line):
                    yield piece
        self.check_end()

    def close(self) -> None:
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """Blocking. May be shared by threads; `with` or `close()` closes its connections."""

    def __init__(self, base_url: str | None = None, *, api_key: str | None = None) -> None:
        self._http = httpx.Client(**http_settings(base_url, api_key))

    @overload
    def chat(
        self, model: str, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Answer: ...
    @overload
    def chat(
        self, model: str, messages: Messages, *, stream: Literal[True], **options: Unpack[Options]
    ) -> TextStream: ...
    def chat(
        self, model: str, messages: Messages, *, stream: bool = False, **options: Unpack[Options]
    ) -> Answer | TextStream:
        """The answer to `messages` (OpenAI's format, or one user message as text), whole or as a stream of text."""
        call = calls.chat(model, messages, stream, options)
        return self._stream(call) if stream else self._do(call)

    @overload
    def complete(
        self, model: str, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Answer: ...
    @overload
    def complete(
        self, model: str, prompt: str | Sequence[int], *, stream: Literal[True], **options: Unpack[Options]
    ) -> TextStream: ...
    def complete(
        self, model: str, prompt: str | Sequence[int], *, stream: bool = False, **options: Unpack[Options]
    ) -> Answer | TextStream:
        """What follows `prompt` (text, or token ids), without a chat template."""
        call = calls.complete(model, prompt, stream, options)
        return self._stream(call) if stream else self._do(call)

    def embed(self, model: str, inputs: str | Sequence[str] | Sequence[Sequence[int]]) -> Embeddings:
        """One vector per input."""
        return self._do(calls.embed(model, inputs))

    def models(self) -> list[ModelInfo]:
        """The catalogue."""
        return self._do(calls.models())

    def status(self) -> Status:
        """Nodes, GPUs, replicas and the queue at this moment."""
        return self._do(calls.status())

    def health(self) -> Health:
        """Raises Unavailable when nothing answers."""
        return self._do(calls.health())

    def plan(self, model: str, *, n_ctx: int | None = None) -> Plan:
        """What a request for `model` would cause now; starts nothing."""
        return self._do(calls.plan(model, n_ctx))

    def load(self, model: str, *, n_ctx: int | None = None) -> LoadResult:
        """Load `model` and wait until it is ready."""
        return self._do(calls.load(model, n_ctx))

    def unload(self, model: str) -> UnloadResult:
        """Stop the replicas of `model`; busy ones finish first."""
        return self._do(calls.unload(model))

    def pin(self, model: str, pinned: bool = True) -> PinResult:
        """Protect `model` from eviction, or give that up."""
        return self._do(calls.pin(model, pinned))

    def events(self, *, after: int = 0, follow: bool = True) -> Generator[Notice, None, None]:
        """What happened after event number `after` (0: all that is remembered), and with `follow` what happens on."""
        call = calls.events(after, follow)
        with closing(_lines(self._open(call), self._http.base_url)) as lines:
            for line in lines:
                if data := calls.data_of(line):
                    yield call.read(data.encode())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, call: Call[T]) -> T:
        try:
            response = self._http.send(request_of(call, self._http))
        except httpx.TransportError as error:
            raise connection_error(self._http.base_url, error) from error
        return call.result(response.status_code, response.content)

    def _stream(self, call: Call[Answer]) -> TextStream:
        return TextStream(self._open(call), self._http.base_url)

    def _open(self, call: Call[Any]) -> httpx.Response:
        try:
            response = self._http.send(request_of(call, self._http), stream=True)
            if response.status_code != httpx.codes.OK:
                raise error_of(response.status_code, response.read())
        except httpx.TransportError as error:
            raise connection_error(self._http.base_url, error) from error
        return response


def _lines(response: httpx.Response, base_url: httpx.URL) -> Generator[str, None, None]:
    try:
        yield from response.iter_lines()
    except httpx.TransportError as error:
        raise connection_error(base_url, error) from error
    finally:
        response.close()


class AsyncTextStream(Progress):
    """`TextStream` for `async for` and `async with`."""

    def __init__(self, response: httpx.Response, base_url: httpx.URL) -> None:
        super().__init__()
        self._response = response
        self._base_url = base_url

    async def __aiter__(self) -> AsyncIterator[str]:
        async with aclosing(_async_lines(self._response, self._base_url)) as lines:
            async for line in lines:
                if piece := self.feed(line):
                    yield piece
        self.check_end()

    async def close(self) -> None:
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncClient:
    """`Client` for asyncio: the same calls, awaited. `await client.chat(..., stream=True)` gives the stream."""

    def __init__(self, base_url: str | None = None, *, api_key: str | None = None) -> None:
        self._http = httpx.AsyncClient(**http_settings(base_url, api_key))

    @overload
    async def chat(
        self, model: str, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Answer: ...
    @overload
    async def chat(
        self, model: str, messages: Messages, *, stream: Literal[True], **options: Unpack[Options]
    ) -> AsyncTextStream: ...
    async def chat(
        self, model: str, messages: Messages, *, stream: bool = False, **options: Unpack[Options]
    ) -> Answer | AsyncTextStream:
        """The answer to `messages` (OpenAI's format, or one user message as text), whole or as a stream of text."""
        call = calls.chat(model, messages, stream, options)
        return await self._stream(call) if stream else await self._do(call)

    @overload
    async def complete(
        self, model: str, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Answer: ...
    @overload
    async def complete(
        self, model: str, prompt: str | Sequence[int], *, stream: Literal[True], **options: Unpack[Options]
    ) -> AsyncTextStream: ...
    async def complete(
        self, model: str, prompt: str | Sequence[int], *, stream: bool = False, **options: Unpack[Options]
    ) -> Answer | AsyncTextStream:
        """What follows `prompt` (text, or token ids), without a chat template."""
        call = calls.complete(model, prompt, stream, options)
        return await self._stream(call) if stream else await self._do(call)

    async def embed(self, model: str, inputs: str | Sequence[str] | Sequence[Sequence[int]]) -> Embeddings:
        """One vector per input."""
        return await self._do(calls.embed(model, inputs))

    async def models(self) -> list[ModelInfo]:
        """The catalogue."""
        return await self._do(calls.models())

    async def status(self) -> Status:
        """Nodes, GPUs, replicas and the queue at this moment."""
        return await self._do(calls.status())

    async def health(self) -> Health:
        """Raises Unavailable when nothing answers."""
        return await self._do(calls.health())

    async def plan(self, model: str, *, n_ctx: int | None = None) -> Plan:
        """What a request for `model` would cause now; starts nothing."""
        return await self._do(calls.plan(model, n_ctx))

    async def load(self, model: str, *, n_ctx: int | None = None) -> LoadResult:
        """Load `model` and wait until it is ready."""
        return await self._do(calls.load(model, n_ctx))

    async def unload(self, model: str) -> UnloadResult:
        """Stop the replicas of `model`; busy ones finish first."""
        return await self._do(calls.unload(model))

    async def pin(self, model: str, pinned: bool = True) -> PinResult:
        """Protect `model` from eviction, or give that up."""
        return await self._do(calls.pin(model, pinned))

    async def events(self, *, after: int = 0, follow: bool = True) -> AsyncGenerator[Notice, None]:
        """What happened after event number `after` (0: all that is remembered), and with `follow` what happens on."""
        call = calls.events(after, follow)
        async with aclosing(_async_lines(await self._open(call), self._http.base_url)) as lines:
            async for line in lines:
                if data := calls.data_of(line):
                    yield call.read(data.encode())

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _do(self, call: Call[T]) -> T:
        try:
            response = await self._http.send(request_of(call, self._http))
        except httpx.TransportError as error:
            raise connection_error(self._http.base_url, error) from error
        return call.result(response.status_code, response.content)

    async def _stream(self, call: Call[Answer]) -> AsyncTextStream:
        return AsyncTextStream(await self._open(call), self._http.base_url)

    async def _open(self, call: Call[Any]) -> httpx.Response:
        try:
            response = await self._http.send(request_of(call, self._http), stream=True)
            if response.status_code != httpx.codes.OK:
                raise error_of(response.status_code, await response.aread())
        except httpx.TransportError as error:
            raise connection_error(self._http.base_url, error) from error
        return response


async def _async_lines(response: httpx.Response, base_url: httpx.URL) -> AsyncGenerator[str, None]:
    try:
        async for line in response.aiter_lines():
            yield line
    except httpx.TransportError as error:
        raise connection_error(base_url, error) from error
    finally:
        await response.aclose()
