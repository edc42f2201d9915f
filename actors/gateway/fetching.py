"""Fetches pictures from the hosts that the catalogue allows (`media_hosts`), and from no others.

A gateway that fetches any address opens its own network to strangers. So a host is one that the operator has named, by
scheme, name and port; redirects are held against the same list. An allowed name may lead anywhere, to a private
address too. No proxy, no password and no cookie of this machine is used. All of it happens in a thread with an event
loop of its own, so that neither TLS nor a slow server delays the tokens of others. What comes is looked at in the
preparer, as if the client had sent it.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import threading
from binascii import b2a_base64
from collections.abc import Callable, Collection, Coroutine
from dataclasses import replace
from io import BytesIO
from typing import Any, TypeVar

import httpx

from actors.gateway.attached import SEND_IT
from actors.gateway.bodies import TOLD_LENGTH
from actors.gateway.errors import clipped
from actors.gateway.limits import (
    FETCH_S,
    FETCHES,
    FETCHES_OF_ONE,
    MAX_CONTENT_BYTES,
    MAX_FETCH_WAIT_S,
    MAX_FETCHED_BYTES,
    MAX_REDIRECTS,
)
from actors.gateway.openai_requests import Ask
from actors.gateway.seats import Seats
from actors.serving.attachments import MOST_FILE_BYTES
from scheduler.errors import Rejected, Unavailable
from scheduler.server import PORTS
from scheduler.units import format_bytes

HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "arriero"}
CONNECT_S = 5.0
FREE_PIECES, MIN_PIECE_BYTES = 1024, 256
"""Of an answer: so many pieces, and then one for so many bytes. A server that writes single bytes costs a core."""
_BLOCK = 48 * 1024  # a multiple of 3 bytes: its base64 has no end in the middle
_COPIED_BYTES = 1024 * 1024
_RETRY_S = 5.0  # a guess: others' fetches end within seconds

Result = TypeVar("Result")

_ADDRESS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
"""RFC 3986. httpx would write all other characters anew, which takes 30 ms for 4,000 of them."""


class Fetcher:
    """`origins`: as `Server.media_hosts` of the catalogue has them. Belongs to one event loop; `close()` ends its
    thread."""

    def __init__(self, origins: Collection[str] = ()) -> None:
        self._origins = frozenset(origins)
        self._seats = Seats(FETCHES, FETCHES_OF_ONE)
        self._reading = Seats(1, 1)  # addresses, of one request at a time: or a turn of the loop would read one of each
        self._aside = _Aside()
        self._trust: ssl.SSLContext | None = None  # reading the certificates takes 20 ms

    async def complete(self, ask: Ask, source: str, hold: Callable[[int], None]) -> Ask:
        """`ask` with the files that it wants to be fetched. `hold` counts bytes of `source`, who asks.

        Raises Rejected for an address that is not allowed or gives no picture, Unavailable when it takes too long.
        """
        urls = []
        async with self._reading.one(source):
            for fetch in ask.fetches:
                urls.append(self._allowed(fetch.param, fetch.url))
                await asyncio.sleep(0)  # to read an address of 4,000 characters takes 4 ms
        most_bytes = left_bytes = min(MAX_FETCHED_BYTES * 4 // 3, MAX_CONTENT_BYTES - len(ask.request.content))
        files: list[bytes] = [b""] * len(urls)
        in_order = enumerate(zip(ask.fetches, urls, strict=True))

        async def fetch_next() -> None:
            nonlocal left_bytes
            for index, (fetch, url) in in_order:
                async with self._seats.one(source):
                    file = await self._aside.run(self._fetched(fetch.param, url))
                left_bytes -= len(file)
                if left_bytes < 0:
                    most = format_bytes(most_bytes * 3 // 4)
                    raise _refused(fetch.param, f"the files of this request are more than {most} together; send fewer")
                hold(len(file))
                files[index] = file

        # As many tasks as there are seats for them: a task for each of a hundred files would be 100,000 tasks for a
        # thousand requests. When these end together, the loop stops for seconds.
        fetching = [asyncio.ensure_future(fetch_next()) for _ in range(min(FETCHES_OF_ONE, len(urls)))]
        try:
            ended, late = await asyncio.wait(fetching, timeout=MAX_FETCH_WAIT_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in ended:
                task.result()
            if late:
                raise Unavailable(
                    f"the files of this request were not fetched within {MAX_FETCH_WAIT_S:.0f} s; {SEND_IT}",
                    retry_after_s=_RETRY_S,
                )
        finally:
            for task in fetching:
                task.cancel()
            await asyncio.gather(*fetching, return_exceptions=True)
        return replace(ask, request=replace(ask.request, content=await _filled(ask, files)), fetches=())

    def close(self) -> None:
        """Ends what is being fetched. Safe to call twice."""
        self._aside.close()

    def _allowed(self, param: str, given: str | httpx.URL) -> httpx.URL:
        """Raises Rejected for an address whose host is not in the catalogue."""
        told = repr(clipped(str(given), TOLD_LENGTH))
        if not _ADDRESS.fullmatch(str(given)):
            raise _refused(
                param, f"{told} is not a URL: it has characters that a URL must not have (write them as %xx)"
            )
        try:
            url = httpx.URL(given)
        except httpx.InvalidURL as error:
            raise _refused(param, f"{told} is not a valid URL ({clipped(str(error), TOLD_LENGTH)})") from None
        if url.userinfo:
            raise _refused(param, "a URL with a user name or password is not fetched; leave them out")
        host = f"[{_host_of(url)}]" if ":" in _host_of(url) else _host_of(url)
        if f"{url.scheme}://{host}:{url.port or PORTS.get(url.scheme)}" not in self._origins:
            raise _refused(
                param,
                f"{told} is not fetched: media_hosts of the catalogue (under server) does not name its host; {SEND_IT}",
            )
        return url

    async def _fetched(self, param: str, url: httpx.URL) -> bytes:
        """What is at `url`, as base64. In the thread. Raises Rejected."""
        host = _host_of(url)
        try:
            return _base64(await asyncio.wait_for(self._got(param, url), FETCH_S))
        except asyncio.TimeoutError:
            why = f"it took more than {FETCH_S:.0f} s"
        except httpx.TimeoutException:
            why = f"it did not connect within {CONNECT_S:.0f} s"
        except (httpx.HTTPError, OSError) as error:
            why = clipped(str(error) or type(error).__name__, TOLD_LENGTH)
        raise _refused(param, f"the file cannot be fetched from {host!r}: {why}; {SEND_IT}")

    async def _got(self, param: str, url: httpx.URL) -> bytearray:
        self._trust = self._trust or httpx.create_ssl_context()
        timeout = httpx.Timeout(None, connect=CONNECT_S)  # `FETCH_S` bounds all of it
        async with httpx.AsyncClient(verify=self._trust, trust_env=False, timeout=timeout, headers=HEADERS) as client:
            for _ in range(MAX_REDIRECTS + 1):
                async with client.stream("GET", url) as reply:
                    if not reply.has_redirect_location:
                        return await _file_in(param, reply)
                    try:
                        further = url.join(reply.headers["location"])
                    except httpx.InvalidURL:
                        raise _refused(param, f"{_host_of(url)!r} redirects to an invalid URL") from None
                    url = self._allowed(param, further)
        raise _refused(param, f"more than {MAX_REDIRECTS} redirects")


async def _file_in(param: str, reply: httpx.Response) -> bytearray:
    """The body of an answer, as it is sent. Raises Rejected."""
    host, most = _host_of(reply.url), format_bytes(MOST_FILE_BYTES)
    if reply.status_code != 200:
        raise _refused(param, f"{host!r} answered with HTTP status {reply.status_code}; {SEND_IT}")
    kind = reply.headers.get("content-type", "image/").partition(";")[0].strip().lower()
    if not kind.startswith("image/") and kind not in ("application/octet-stream", "binary/octet-stream"):
        raise _refused(param, f"{host!r} answered with {clipped(kind, TOLD_LENGTH)!r}, which is not a picture")
    if reply.headers.get("content-encoding", "identity").lower() != "identity":
        raise _refused(param, f"{host!r} answered with a compressed file, against the request; {SEND_IT}")
    file, pieces = bytearray(), 0
    async for piece in reply.aiter_raw():
        file += piece
        pieces += 1
        if len(file) > MOST_FILE_BYTES:
            raise _refused(param, f"the file from {host!r} is larger than {most}; make it smaller")
        if pieces > FREE_PIECES + len(file) // MIN_PIECE_BYTES:
            raise _refused(param, f"{host!r} sends the file in pieces of a few bytes; {SEND_IT}")
    if not file:
        raise _refused(param, f"the file from {host!r} is empty")
    return file


def _base64(file: bytearray) -> bytes:
    """In blocks: of 20 MiB at once nothing else would run in this process for 20 ms."""
    return b"".join(b2a_base64(file[at : at + _BLOCK], newline=False) for at in range(0, len(file), _BLOCK))


async def _filled(ask: Ask, files: list[bytes]) -> bytes:
    """The request's content with the files in their places."""
    content, begin = memoryview(ask.request.content), 0
    pieces: list[memoryview] = []
    for fetch, file in zip(ask.fetches, files, strict=True):
        pieces += [content[begin : fetch.at], memoryview(file)]
        begin = fetch.at
    filled = BytesIO()
    for piece in [*pieces, content[begin:]]:
        for at in range(0, len(piece), _COPIED_BYTES):
            filled.write(piece[at : at + _COPIED_BYTES])
            await asyncio.sleep(0)  # 50 MiB in one stretch take 0.1 s on a busy machine
    return filled.getvalue()  # which is no copy


def _host_of(url: httpx.URL) -> str:
    return url.raw_host.decode("ascii")


def _refused(param: str, why: str) -> Rejected:
    return Rejected(f"{param}: {why}", param=param)


class _Aside:
    """An event loop in a thread of its own, which starts with the first task."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What `work` returns there. Cancelling this cancels it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._serve, args=(self._loop,), name="fetches", daemon=True)
            self._thread.start()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop) -> None:
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
            loop.run_until_complete(asyncio.wait({task}))
        loop.run_until_complete(asyncio.sleep(0))  # connections end one turn after they are closed
        loop.close()

    def close(self) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop = self._thread = None
