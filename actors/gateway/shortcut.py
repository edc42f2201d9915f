"""A shortcut for the bytes of a stream: from the runner's connection straight to the client's.

The ordinary way of a token through the gateway wakes a task and passes five generators, the layers of the application
and h11. That costs 0.1 ms, taken from the cores that compute the next token. So a stream opens its shortcut once its
answer has begun. What arrives while nothing else of it is under way is then written at once; all else, and whatever
ends an answer, goes the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable


class Shortcut:
    """One stream's. Belongs to the event loop."""

    def __init__(self) -> None:
        self._write: Callable[[bytes], bool] | None = None

    def open(self, write: Callable[[bytes], bool]) -> None:
        """From now on it leads to `write`, which says whether it took the bytes."""
        self._write = write

    def take(self, data: bytes) -> bool:
        """Whether `data`, whole events, was sent. If not, it has to go the ordinary way."""
        return self._write is not None and self._write(data)
