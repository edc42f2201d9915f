"""Requests begin one after the other: of each source one in every turn of the event loop.

A turn serves all connections that have something to say. Without this, whoever has hundreds of them makes every turn
long, for everybody.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque


class Turns:
    """Belongs to one event loop. A source is an API key's name, or an address."""

    def __init__(self) -> None:
        self._begun: set[str] = set()  # in this turn
        self._waiting: defaultdict[str, deque[asyncio.Future[None]]] = defaultdict(deque)
        self._is_turning = False

    async def take(self, source: str) -> None:
        """Returns when it is the turn of a request of `source`."""
        if source in self._begun or source in self._waiting:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[source].append(mine)
            await mine
            return
        self._begun.add(source)
        if not self._is_turning:
            self._is_turning = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._begun.clear()
        for source, waiting in list(self._waiting.items()):
            while waiting:
                mine = waiting.popleft()
                if not mine.done():  # it may have been cancelled
                    mine.set_result(None)
                    self._begun.add(source)
                    break
            if not waiting:
                del self._waiting[source]
        self._is_turning = bool(self._begun)
        if self._is_turning:
            asyncio.get_running_loop().call_soon(self._next_turn)
