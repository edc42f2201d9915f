"""Whose turn it is: a context applies one set of LoRA adapters at a time, so those who use the same set share batches.

The turn is for whoever was served longest ago: first a source (an API key, or an address), then one of its sets. All
who use that set are served with it. A turn ends when nobody uses its set any more, or after `TURN_S` while others wait.
So a source waits for as many turns as there are other sources at most, however many sets they use.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from actors.serving.fairness import Rotation
from actors.serving.model import Adapters

TURN_S = 0.25
"""After a change llama.cpp reserves its graph anew: 13 to 25 ms for 32 layers, 30 to 100 for 80, on a busy CPU. So a
change at every token would cost more than the tokens do; with this, a tenth."""


class Turns:
    """Belongs to the batcher."""

    def __init__(self) -> None:
        self.adapters: Adapters = ()
        """The set whose turn it is."""
        self._sources = Rotation[str]()
        self._sets = Rotation[Adapters]()
        self._began_s = -inf

    def take(self, wanted: Iterable[tuple[str, Adapters]], now_s: float) -> float | None:
        """Decides whose turn it is among the sets in use, and by which sources. Returns the seconds that are left of
        it; None: others do not wait, so it does not end."""
        pairs = dict.fromkeys(wanted)
        sets = dict.fromkeys(adapters for _, adapters in pairs)
        self._sources.keep(source for source, _ in pairs)
        self._sets.keep(sets)
        self._serve(pairs)
        if pairs and (self.adapters not in sets or (len(sets) > 1 and now_s - self._began_s >= TURN_S)):
            _, self.adapters = min(pairs, key=lambda pair: (self._sources.place(pair[0]), self._sets.place(pair[1])))
            self._began_s = now_s
            self._serve(pairs)  # at once: by its end they may use another set
        return max(0.0, self._began_s + TURN_S - now_s) if len(sets) > 1 else None

    def _serve(self, pairs: Iterable[tuple[str, Adapters]]) -> None:
        served = [pair for pair in pairs if pair[1] == self.adapters]
        self._sources.serve(source for source, _ in served)
        self._sets.serve(adapters for _, adapters in served)
