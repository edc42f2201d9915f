"""The deadline of a decode, from how long such decodes have taken: the engine thread's promise to its node. The thread
that encodes pictures and sounds has a promise of its own.

A hang inside llama.cpp or a driver looks like a long computation. So before each decode the engine says when it will be
over at the latest. If it is not, the node ends the process (`actors.devices.watchdog`). Decodes are of the same kind
when they have about as many rows (the same power of two) and compute the same outputs: they run the same kernels over
the same weights. Encodings are when they make about as many tokens, of pictures or of sounds.
Cost: less than ten microseconds per decode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

FACTOR = 30.0
"""A decode may take this many times as long as the slowest of its kind. Fewer threads (16 to 1), as many other models
on the same cores, and a fuller context make it slower: each by less than this factor, and never all at once."""

FLOOR_S = 60.0
"""No decode counts as hung before this time: a machine that swaps or is suddenly overloaded computes hundreds of times
slower. The watchdog allows for load, but it knows only the average of the last minute."""

FIRST_S = 600.0
"""The first decodes of a kind may take this long: a driver may have to compile kernels for its card."""

FIRST = 2
"""How many decodes of a kind are first ones. The second may still capture a graph."""


class Beat:
    """For one thread at a time. `promise(within_s, slowest_s)` and `rest()` tell the node; by default nobody."""

    def __init__(
        self,
        promise: Callable[[float, float], object] = lambda within_s, slowest_s: None,
        rest: Callable[[], object] = lambda: None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._promise, self._rest, self._clock = promise, rest, clock
        self._seen: dict[tuple[str, int], tuple[int, float]] = {}  # per kind: how many, the slowest in seconds
        self._slowest_row_s = 0.0

    @contextmanager
    def computing(self, n_rows: int, what: str = "tokens") -> Iterator[None]:
        """Around one computation of so many rows; `what`: other kernels compute other things."""
        kind = what, n_rows.bit_length()
        count, slowest_s = self._seen.get(kind, (0, 0.0))
        self._promise(self._allowed_s(n_rows, count, slowest_s), slowest_s)
        began = self._clock()
        try:
            yield
        finally:
            took_s = self._clock() - began
            self._rest()
            self._seen[kind] = count + 1, max(slowest_s, took_s)
            self._slowest_row_s = max(self._slowest_row_s, took_s / n_rows)

    def _allowed_s(self, n_rows: int, count: int, slowest_s: float) -> float:
        if count < FIRST:  # a machine on which one token takes seconds needs longer for a prompt, too
            return max(FIRST_S, FACTOR * self._slowest_row_s * n_rows)
        return max(FLOOR_S, FACTOR * slowest_s)


@dataclass(frozen=True, slots=True)
class Beats:
    """Of the two threads that compute: decodes are not watched less because a picture is encoded meanwhile."""

    decodes: Beat = field(default_factory=Beat)
    encodings: Beat = field(default_factory=Beat)
