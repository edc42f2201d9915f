"""The end of the gateway: every request under way is told of it, and every new one refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from scheduler.errors import Unavailable

RETRY_S = 5.0  # a gateway that is replaced is back within seconds


class Closing:
    """Knows the tasks that answer requests, one each; `begin()` cancels them. Whoever runs them tells their clients."""

    def __init__(self) -> None:
        self.begun = False
        self._tasks: set[asyncio.Task[object]] = set()

    def begin(self) -> None:
        self.begun = True
        for task in self._tasks:
            task.cancel()

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request that the current task answers. Raises Unavailable once the end has begun."""
        if self.begun:
            raise shutting_down()
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)


def shutting_down() -> Unavailable:
    return Unavailable("Arriero is shutting down", retry_after_s=RETRY_S)
