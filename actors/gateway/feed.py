"""What followers of the events are sent: fetched from the scheduler and encoded once for all of them.

Without it every follower would have the scheduler send all that it remembers: some megabytes each. One fetch is under
way at a time, and asks only for what is newer than the newest notice kept here.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from itertools import islice

from actors.gateway import limits
from actors.gateway.backend import Backend
from actors.gateway.dialects import event
from actors.gateway.errors import TooMuchHeld
from actors.notices import REMEMBERED
from actors.records import Notice

POLL_S = 0.25  # followers hear of something new within so long
PAGE = 100  # notices that one follower is sent at once


class Feed:
    """Belongs to one event loop."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=REMEMBERED)  # number, and the event
        self._dropped = 0  # from the beginning of `_kept` since the start
        self._fetched_at = -POLL_S
        self._fetching: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self._followers: Counter[str] = Counter()

    async def events(self, after: int, follow: bool, source: str) -> AsyncGenerator[bytes, None]:
        """Events newer than number `after`; one beyond the newest is of an earlier scheduler, and counts as 0. Raises
        TooMuchHeld when too many follow already, or too many of this `source` (an API key, or an address)."""
        with self._place(source):
            await self._fetch()
            position = self._position(after)
            while True:
                position = max(position, self._dropped)
                page = list(islice(self._kept, position - self._dropped, position - self._dropped + PAGE))
                position += len(page)
                if page:
                    yield b"".join(data for _, data in page)
                    await asyncio.sleep(0)  # a client that takes all at once keeps nobody else waiting
                    continue
                if not follow:
                    return
                await asyncio.sleep(POLL_S)
                if asyncio.get_running_loop().time() - self._fetched_at >= POLL_S:
                    await self._fetch()

    def _position(self, after: int) -> int:
        if not self._kept or after > self._kept[-1][0]:
            after = 0
        older = sum(1 for number, _ in self._kept if number <= after)
        return self._dropped + older

    @contextmanager
    def _place(self, source: str) -> Iterator[None]:
        for count, most, of in (
            (self._followers.total(), limits.MAX_FOLLOWERS, ""),
            (self._followers[source], limits.MAX_FOLLOWERS_OF_ONE, " for one key or address"),
        ):
            if count >= most:
                raise TooMuchHeld(f"{most} clients follow the events, the maximum{of}", retry_after_s=limits.RETRY_S)
        self._followers[source] += 1
        try:
            yield
        finally:
            self._followers[source] -= 1
            if not self._followers[source]:
                del self._followers[source]

    # ------------------------------------------------------------------ fetching

    async def _fetch(self) -> None:
        """When it returns, all that had been announced when it was called is kept. Those who call together share it."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._fetch_after(self._fetching))
        await asyncio.shield(self._next)

    async def _fetch_after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        self._fetching, self._next = self._next, None
        async for notice in self._backend.notices(self._kept[-1][0] if self._kept else 0):
            self._keep(notice)
        self._fetched_at = asyncio.get_running_loop().time()

    def _keep(self, notice: Notice) -> None:
        if self._kept and notice.seq <= self._kept[-1][0]:  # the scheduler was restarted, and counts anew
            self._dropped += len(self._kept)
            self._kept.clear()
        self._dropped += len(self._kept) == REMEMBERED
        self._kept.append((notice.seq, event(notice.model_dump_json().encode(), notice.seq)))
