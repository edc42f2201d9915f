"""A row of layers, split over devices. Each device takes the next layers in the row, at least one.

Layers differ in size: the experts of the first layers may be in host RAM, and layers with windows take less cache. So
sums over the real layers decide, not an average. A device that holds some layers in a row also holds any part of them.
So filling the devices from the end finds a split if there is one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

Sums = Sequence[int]
"""Bytes of the first 0, 1, 2, ... layers on one kind of device; the last entry is of all."""


def shares(sums: Sequence[Sums], counts: Iterable[int]) -> list[int]:
    """Bytes on each device with so many layers each; `sums`: one per device."""
    ends = pairwise(accumulate(counts, initial=0))
    return [of[end] - of[begin] for of, (begin, end) in zip(sums, ends, strict=True)]


def split(sums: Sequence[Sums], rooms: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...] | None:
    """Layers per device, whose bytes fit in `rooms`, as near as can be to shares that end after `wanted` layers (one
    number per device but the last). None where there is no such split, or one with fewer devices would do as well: one
    of them has no room for a layer when its turn comes."""
    n_layers, last = len(sums[0]) - 1, len(rooms) - 1
    begins = [0] * (last + 1) + [n_layers]  # where each device's share may begin at the earliest
    for i in range(last, -1, -1):  # with those after it full, and a layer left for each before it
        begins[i] = max(i, bisect_left(sums[i], sums[i][begins[i + 1]] - rooms[i]))
        if begins[i] >= begins[i + 1]:
            return None
    if begins[0] > 0:
        return None
    ends = [0]
    for i, aim in enumerate(wanted):
        most = min(bisect_right(sums[i], sums[i][ends[i]] + rooms[i]) - 1, n_layers - (last - i))
        end = max(begins[i + 1], min(aim, most))
        if not ends[i] < end <= most:  # a small device between large ones, for which only some layers are small enough
            return tuple(after - before for before, after in pairwise(begins))
        ends.append(end)
    return tuple(after - before for before, after in pairwise((*ends, n_layers)))
