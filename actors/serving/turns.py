"""Whose turn it is: a context applies one set of LoRA adapters at a time, so those who use the same set share batches.

Sets take turns, in the order in which they came. A turn ends when nobody uses its set any more, or after `TURN_S` while
others wait. So no set waits longer than the turns of the others take.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from actors.serving.model import Adapters

TURN_S = 0.25
"""After a change llama.cpp reserves its graph anew: 13 to 25 ms for 32 layers, 30 to 100 for 80, on a busy CPU. So a
change at every token would cost more than the tokens do; with this, a tenth."""


class Turns:
    """Belongs to the batcher."""

    def __init__(self) -> None:
        self.adapters: Adapters = ()
        """The set whose turn it is."""
        self._queue: list[Adapters] = [()]  # of those in use: the first one has its turn
        self._began_s = -inf

    def take(self, wanted: Iterable[Adapters], now_s: float) -> float | None:
        """Decides whose turn it is among the sets in use. Returns the seconds that are left of it; None: others do not
        wait, so it does not end."""
        present = dict.fromkeys(wanted)
        if len(present) == 1 and self.adapters in present and len(self._queue) == 1:
            return None
        queue = [each for each in self._queue if each in present]
        queue += [each for each in present if each not in queue]
        if not queue:
            return None
        if queue[0] == self.adapters and len(queue) > 1 and now_s - self._began_s >= TURN_S:
            queue.append(queue.pop(0))
        if queue[0] != self.adapters:
            self.adapters, self._began_s = queue[0], now_s
        self._queue = queue
        return max(0.0, self._began_s + TURN_S - now_s) if len(queue) > 1 else None
