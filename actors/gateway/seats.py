"""A bound on how much is done at a time, fair between those who ask."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Seats:
    """`most` at a time, `most_of_one` of one source. Sources that wait take turns. Belongs to one event loop."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._taken: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the source whose turn is next comes first

    @asynccontextmanager
    async def one(self, source: str) -> AsyncGenerator[None, None]:
        """A seat for `source`, as soon as it has one."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(source, deque()).append(mine)
        self._fill()
        try:
            await mine
            yield
        finally:
            if mine.done() and not mine.cancelled():
                self._taken[source] -= 1
            else:
                mine.cancel()
            self._fill()

    def _fill(self) -> None:
        """Gives free seats to those who wait."""
        while (source := next(filter(self._may_sit, self._waiting), None)) is not None:
            line = self._waiting.pop(source)
            while line:
                if not (next_one := line.popleft()).done():  # it may have left
                    next_one.set_result(None)
                    self._taken[source] += 1
                    break
            if line:
                self._waiting[source] = line  # behind all others
        self._taken += Counter()  # without those who have none

    def _may_sit(self, source: str) -> bool:
        return self._taken.total() < self._most and self._taken[source] < self._most_of_one
