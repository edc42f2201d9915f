"""What the children of a preparer hold in memory for answers under way: grammars, and parsers of tool calls.

Each child has a limit of its own (`preparer`). Without a limit for all of them together, a few requests would take the
RAM of the machine.
"""

from __future__ import annotations

from collections import Counter
from threading import Lock

from scheduler.errors import Rejected, Unavailable
from scheduler.units import MIB, format_bytes

MOST_BYTES = 512 * MIB
MOST_OF_ONE_BYTES = 256 * MIB
"""Of a replica, and of one source there. A child that prepared a chat with 200 tools had grown by 7 MiB, with 50 by
less than one (a vocabulary of 32,000 tokens)."""

_RETRY_S = 5.0  # a guess: until some answer under way ends


class ChildMemory:
    """Counts it, by source. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._held: Counter[str] = Counter()

    def hold(self, source: str, n_bytes: int) -> Held:
        """For one answer of `source`. Raises as `Held.resize` does."""
        held = Held(self, source)
        held.resize(n_bytes)
        return held

    def change(self, source: str, before_bytes: int, n_bytes: int) -> None:
        """What an answer of `source` holds. Raises Rejected for what is never allowed, and Unavailable for what is not
        allowed now."""
        refuse_too_large(n_bytes)
        with self._lock:
            own, total = self._held[source] - before_bytes, self._held.total() - before_bytes
            if n_bytes > before_bytes and (own + n_bytes > MOST_OF_ONE_BYTES or total + n_bytes > MOST_BYTES):
                most, most_of_one = format_bytes(MOST_BYTES), format_bytes(MOST_OF_ONE_BYTES)
                raise Unavailable(
                    f"an answer with the grammar or the tools of this request needs {format_bytes(n_bytes)} of memory. "
                    f"Your other answers in progress hold {format_bytes(own)} (at most {most_of_one} in all), those of "
                    f"all clients {format_bytes(total)} (at most {most}). Try again later, or simplify them",
                    retry_after_s=_RETRY_S,
                )
            self._held[source] = own + n_bytes
            if not self._held[source]:
                del self._held[source]

    @property
    def held_bytes(self) -> int:
        with self._lock:
            return self._held.total()


class Held:
    """The bytes of one answer. One thread at a time."""

    def __init__(self, memory: ChildMemory, source: str) -> None:
        self._memory, self._source = memory, source
        self.n_bytes = 0

    def resize(self, n_bytes: int) -> None:
        """Raises Rejected for what is never allowed, and Unavailable for what is not allowed now."""
        self._memory.change(self._source, self.n_bytes, n_bytes)
        self.n_bytes = n_bytes

    def free(self) -> None:
        """Safe to call twice."""
        self.resize(0)


def refuse_too_large(n_bytes: int) -> None:
    """Raises Rejected for what no source may hold."""
    if n_bytes > MOST_OF_ONE_BYTES:
        raise Rejected(
            f"the grammar or the tools of this request need {format_bytes(n_bytes)} of memory; at most "
            f"{format_bytes(MOST_OF_ONE_BYTES)} are allowed. Simplify them, or ask for fewer answers"
        )
