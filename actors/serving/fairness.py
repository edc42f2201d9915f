"""Fair by source: who goes next, and who gets how much. A source is an API key's name, or an address.

One rule for turns and for the room of prompts: sources count, however much each of them asks for. Answers under way are
not shared out so: each gets its next token in every turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Rotation(Generic[Key]):
    """Who goes next: whoever was served longest ago. Who comes new stands behind all who wait. So nobody waits for more
    turns than there are others. Not thread-safe."""

    def __init__(self) -> None:
        self._places: dict[Key, int] = {}
        self._count = 0

    def keep(self, present: Iterable[Key]) -> None:
        """These are there now; all others are forgotten."""
        self._count += 1
        self._places = {key: self._places.get(key, self._count) for key in present}

    def serve(self, keys: Iterable[Key]) -> None:
        """These have had a turn until now."""
        self._count += 1
        self._places |= dict.fromkeys(keys, self._count)

    def place(self, key: Key) -> int:
        """The smallest goes next. Raises KeyError for who is not there."""
        return self._places[key]


def shares(wanted: Sequence[tuple[str, int]], room: int) -> list[int]:
    """How much of `room` each of `wanted` gets: a source, and how much it can use. Every source gets as much as any
    other, and of that each of its own gets as much as any other. What somebody does not need is for the rest."""
    of: defaultdict[str, list[int]] = defaultdict(list)
    for index, (source, _) in enumerate(wanted):
        of[source].append(index)
    given = [0] * len(wanted)
    per_source = _evenly([sum(wanted[index][1] for index in of[source]) for source in of], room)
    for indices, part in zip(of.values(), per_source, strict=True):
        for index, count in zip(indices, _evenly([wanted[index][1] for index in indices], part), strict=True):
            given[index] = count
    return given


def _evenly(needs: Sequence[int], room: int) -> list[int]:
    given = [0] * len(needs)
    for n_done, index in enumerate(sorted(range(len(needs)), key=needs.__getitem__)):
        given[index] = min(needs[index], room // (len(needs) - n_done))
        room -= given[index]
    return given
